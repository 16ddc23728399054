"""Dense causal attention on Hopper by cuDNN, forward and backward.

The warm-up phase attends with it. For query t and head h, over keys j <= t:
out = softmax_j(scale q.k) v and lse = log sum_j exp(scale q.k). There is no
Pallas kernel here: cuDNN owns the tiles and shared memory.

The float32 lse is the one that cuDNN's forward keeps for its backward.
cuDNN multiplies masked entries by zero, so a NaN would reach queries that do
not see it. Therefore non-finite operands are zeroed before the call, and the
queries that see one are set to NaN after it. cuDNN's backward repeats its bits
only under `--xla_gpu_exclude_nondeterministic_ops`.

cuDNN's backward takes no cotangent dlse of lse. With p = softmax(scale q k^T),

  dq = scale dlse (p k)    dk = scale p^T (dlse q)

where p k is the output of attention whose values are the keys, and p^T (dlse q)
is its gradient of the values for the cotangent dlse q. So the gradient of lse
takes a forward and a backward call of its own, which are part of a program only
if lse is differentiated.

Not supported: another number of keys than of queries, kv_lengths, packed rows
(`masked_attention` takes all three), and what `mosaic.check_supported` and
`mosaic.check_dense_supported` refuse. cuDNN has a packed layout for documents,
but its backward pass takes each one to be as long as the row. Its workspace is
about 2 x documents x H x T x D float32, 79 GiB for 9 documents in a row of 128K
tokens (H 64, D 128).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool, Float

from pallas_kernels import mosaic


def _cudnn_attention(q, k, v, scale) -> Any:
  """cuDNN's causal attention: out and the natural log sum exp in float32.

  jax.nn.dot_product_attention returns the log sum exp in q's dtype, whose 8
  bits put an error of a few per cent on the probabilities that the KL computes
  from it. This calls the private function beneath it instead, which returns
  float32.

  cuDNN's gradients need an even number of tokens, so an odd number is padded by
  one token, which no query sees.
  """
  from jax._src.cudnn import fused_attention_stablehlo as cudnn

  tokens = q.shape[1]
  q, k, v = (
    jnp.pad(x, ((0, 0), (0, tokens % 2), (0, 0), (0, 0))) for x in (q, k, v)
  )
  both: Any = cudnn.dot_product_attention(
    q, k, v, scale=scale, mask_type=cudnn.MaskType.CAUSAL, return_residual=True
  )
  out, lse = both
  return out[:, :tokens], lse[..., :tokens]


def _seeing(bad: Bool[Array, "B S K"], num_heads: int) -> Bool[Array, "B T H"]:
  """Which queries see a bad key: those from the first bad one on."""
  slot = jnp.arange(bad.shape[1], dtype=jnp.int32)[None, :, None]
  first = jnp.min(jnp.where(bad, slot, mosaic.NEVER), axis=1, keepdims=True)
  return jnp.repeat(slot >= first, num_heads // bad.shape[-1], axis=-1)


def _seen(bad: Bool[Array, "B T H"], num_kv_heads: int) -> Bool[Array, "B S K"]:
  """Which keys a bad query sees: those up to the last bad one."""
  bad = jnp.any(bad.reshape(*bad.shape[:2], num_kv_heads, -1), axis=-1)
  slot = jnp.arange(bad.shape[1], dtype=jnp.int32)[None, :, None]
  return slot <= jnp.max(jnp.where(bad, slot, -1), axis=1, keepdims=True)


def _poison(x, bad):
  return jnp.where(bad[..., None], jnp.nan, x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _attention(q, k, v, scale) -> Any:
  return _attention_forward(q, k, v, scale)[0]


@mosaic.in_32_bits
def _attention_forward(q, k, v, scale):
  (q, bad_q), (k, bad_k), (v, bad_v) = (
    mosaic.zero_non_finite(x) for x in (q, k, v)
  )
  num_heads = q.shape[2]
  attend = functools.partial(_cudnn_attention, scale=scale)
  (out, lse), pull = jax.vjp(attend, q, k, v)
  bad_scores = bad_q | _seeing(bad_k, num_heads)
  bad_out = bad_scores | _seeing(bad_v, num_heads)
  lse = jnp.where(jnp.moveaxis(bad_scores, 1, 2), jnp.nan, lse)
  return (_poison(out, bad_out), lse), (pull, bad_scores, bad_out)


@mosaic.in_32_bits
def _attention_backward(scale, residuals, cotangents):
  del scale
  pull, bad_scores, bad_out = residuals
  dout, dlse = cotangents  # the gradient of lse is that of `_lse`
  dout, bad_dout = mosaic.zero_non_finite(dout)
  dq, dk, dv = pull((dout, jnp.zeros_like(dlse)))
  bad_ds, bad_p = bad_out | bad_dout, bad_scores | bad_dout
  num_kv_heads = dk.shape[2]
  return (
    _poison(dq, bad_ds),
    _poison(dk, _seen(bad_ds, num_kv_heads)),
    _poison(dv, _seen(bad_p, num_kv_heads)),
  )


_attention.defvjp(_attention_forward, _attention_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _lse(q, k, lse, scale) -> Any:
  """lse of q and k, with its gradient."""
  del q, k, scale
  return lse


def _lse_forward(q, k, lse, scale):
  del scale
  return lse.value, (q.value, k.value)


@mosaic.in_32_bits
def _lse_backward(scale, residuals, dlse):
  q, k = residuals
  if isinstance(dlse, SymbolicZero):
    return None, None, None
  (q, bad_q), (k, bad_k) = (mosaic.zero_non_finite(x) for x in (q, k))
  dlse, bad_dlse = mosaic.zero_non_finite(jnp.moveaxis(dlse, 1, 2)[..., None])
  num_heads, num_kv_heads = q.shape[2], k.shape[2]
  pk, pull = jax.vjp(lambda v: _cudnn_attention(q, k, v, scale)[0], k)
  (dk,) = pull((dlse * q.astype(dlse.dtype)).astype(q.dtype))
  dq = (scale * dlse * pk.astype(dlse.dtype)).astype(q.dtype)
  dk = (scale * dk.astype(jnp.float32)).astype(k.dtype)
  bad = bad_q | _seeing(bad_k, num_heads) | bad_dlse
  return _poison(dq, bad), _poison(dk, _seen(bad, num_kv_heads)), None


_lse.defvjp(_lse_forward, _lse_backward, symbolic_zeros=True)


@mosaic.in_32_bits
def attention(
  q: Float[Array, "B T H D"],
  k: Float[Array, "B T K D"],
  v: Float[Array, "B T K D"],
  *,
  scale: float | None = None,
) -> tuple[Float[Array, "B T H D"], Float[Array, "B H T"]]:
  """Dense causal attention by cuDNN.

  Args:
    q: queries; bf16 or f16.
    k: keys, as many as queries.
    v: values.
    scale: of the scores; D^-0.5 if None.

  Returns:
    out in q's dtype and lse (natural log, float32); both have gradients.

  Raises:
    NotImplementedError: the call is legal but beyond `mosaic`'s limits, or
      there are more keys than queries.
  """
  d = q.shape[-1]
  mosaic.check_supported(dtype=q.dtype, head_dim=d)
  mosaic.check_dense_supported(d)
  if q.shape[1] != k.shape[1]:
    raise NotImplementedError(
      "mosaic_gpu attention of the warm-up phase supports as many keys as"
      f" queries, got {k.shape[1]} keys and {q.shape[1]} queries"
    )
  scale = d**-0.5 if scale is None else float(scale)
  result: Any = _attention(q, k, v, scale)
  out, lse = result
  return out, _lse(q, k, lax.stop_gradient(lse), scale)
