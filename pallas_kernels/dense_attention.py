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

Not supported: another number of keys than of queries, kv_lengths, and what
`mosaic.check_supported` refuses.

`document_attention` attends inside the documents of packed rows, in cuDNN's
packed layout. It returns no lse, and its statistics for the backward pass have
the size B x documents x H x T, which bounds the number of documents.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool, Float, Int32

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
  if q.shape[1] != k.shape[1]:
    raise NotImplementedError(
      "mosaic_gpu attention of the warm-up phase supports as many keys as"
      f" queries, got {k.shape[1]} keys and {q.shape[1]} queries"
    )
  scale = d**-0.5 if scale is None else float(scale)
  result: Any = _attention(q, k, v, scale)
  out, lse = result
  return out, _lse(q, k, lax.stop_gradient(lse), scale)


# Bytes that cuDNN's statistics of a packed call may take.
_MAX_STATISTICS = 1 << 30


@mosaic.in_32_bits
def document_attention(
  q: Float[Array, "B T H D"],
  k: Float[Array, "B T K D"],
  v: Float[Array, "B T K D"],
  document: Int32[Array, "B T"],
  starts: Int32[Array, "B M"],
  ends: Int32[Array, "B M"],
  *,
  scale: float | None = None,
) -> Float[Array, "B T H D"]:
  """Causal attention inside each document of packed rows, by cuDNN.

  Padding gets zeros. What lies in no document is never read by cuDNN, which
  leaves its results undefined, so they are replaced.

  Args:
    q: queries; bf16 or f16.
    k: keys, as many as queries.
    v: values.
    document: number of each slot's document; -1 for padding.
    starts: first slot of each document; starts[b, m] == ends[b, m] for numbers
      that a row does not use, which come last.
    ends: slot after its last one.
    scale: of the scores; D^-0.5 if None.

  Raises:
    NotImplementedError: the call is legal but beyond `mosaic`'s limits, there
      is no cuDNN, or the statistics would take more than 1 GiB.
  """
  batch, tokens, num_heads, d = q.shape
  mosaic.check_supported(dtype=q.dtype, head_dim=d)
  # One document is no packed layout to JAX.
  most = max(starts.shape[1], 2)
  size = 4 * batch * most * num_heads * (tokens + tokens % 2)
  if size > _MAX_STATISTICS:
    raise NotImplementedError(
      f"cuDNN's packed attention of {batch} batch rows of {tokens} tokens,"
      f" {num_heads} heads and up to {most} documents needs {size >> 20} MiB of"
      f" statistics; supported are {_MAX_STATISTICS >> 20} MiB: wanted smaller"
      " max_segments"
    )
  scale = d**-0.5 if scale is None else float(scale)
  pad = ((0, 0), (0, most - starts.shape[1]))
  starts, ends = jnp.pad(starts, pad), jnp.pad(ends, pad)
  result: Any = _documents(q, k, v, document, starts, ends, scale)
  return result


def _cudnn_documents(q, k, v, document, starts, ends, scale) -> Any:
  from jax._src.cudnn import fused_attention_stablehlo as cudnn

  tokens = q.shape[1]
  real = (document >= 0)[..., None, None]
  # The gradient of `where` drops what cuDNN leaves in the slots of padding.
  q, k, v = (
    jnp.pad(jnp.where(real, x, 0), ((0, 0), (0, tokens % 2), (0, 0), (0, 0)))
    for x in (q, k, v)
  )
  used = ends > starts
  lengths = jnp.where(used, ends - starts, -1)
  offsets = jnp.where(used, starts, -1)
  offsets = jnp.pad(offsets, ((0, 0), (0, 1)), constant_values=-1)
  try:
    out: Any = cudnn.dot_product_attention(
      q,
      k,
      v,
      q_seqlen=lengths,
      kv_seqlen=lengths,
      q_offsets=offsets,
      kv_offsets=offsets,
      scale=scale,
      mask_type=cudnn.MaskType.PADDING_CAUSAL,
    )
  except RuntimeError as error:
    raise NotImplementedError(
      f"implementation='cudnn' is not possible here: {error}"
    ) from error
  return jnp.where(real, out[:, :tokens], 0)


def _bad_before(bad: Bool[Array, "B T X"], document, starts, ends, *, behind):
  """Whether a slot's document holds a bad slot at or before it.

  `behind` asks for one at or behind it instead.
  """
  row = jnp.arange(bad.shape[0])[:, None]
  count = jnp.cumsum(bad, axis=1, dtype=jnp.int32)
  count = jnp.pad(count, ((0, 0), (1, 0), (0, 0)))
  at = jnp.arange(bad.shape[1], dtype=jnp.int32)[None]
  number = jnp.maximum(document, 0)
  if behind:
    found = count[row, ends[row, number]] > count[row, at]
  else:
    found = count[row, at + 1] > count[row, starts[row, number]]
  return found & (document >= 0)[..., None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _documents(q, k, v, document, starts, ends, scale) -> Any:
  return _documents_forward(q, k, v, document, starts, ends, scale)[0]


@mosaic.in_32_bits
def _documents_forward(q, k, v, document, starts, ends, scale):
  (q, bad_q), (k, bad_k), (v, bad_v) = (
    mosaic.zero_non_finite(x) for x in (q, k, v)
  )
  group = q.shape[2] // k.shape[2]
  attend = functools.partial(
    _cudnn_documents, document=document, starts=starts, ends=ends, scale=scale
  )
  out, pull = jax.vjp(attend, q, k, v)
  seeing = functools.partial(
    _bad_before, document=document, starts=starts, ends=ends, behind=False
  )
  bad_q = bad_q & (document >= 0)[..., None]
  bad_scores = bad_q | jnp.repeat(seeing(bad_k), group, axis=-1)
  bad_out = bad_scores | jnp.repeat(seeing(bad_v), group, axis=-1)
  spans = (document, starts, ends)
  return _poison(out, bad_out), (pull, bad_scores, bad_out, *spans)


@mosaic.in_32_bits
def _documents_backward(scale, residuals, dout):
  del scale
  pull, bad_scores, bad_out, document, starts, ends = residuals
  dout, bad_dout = mosaic.zero_non_finite(dout)
  bad_dout = bad_dout & (document >= 0)[..., None]
  dq, dk, dv = pull(dout)
  num_kv_heads = dk.shape[2]

  def seen(bad):
    bad = jnp.any(bad.reshape(*bad.shape[:2], num_kv_heads, -1), axis=-1)
    return _bad_before(bad, document, starts, ends, behind=True)

  bad_ds, bad_p = bad_out | bad_dout, bad_scores | bad_dout
  return (
    _poison(dq, bad_ds),
    _poison(dk, seen(bad_ds)),
    _poison(dv, seen(bad_p)),
    *(None,) * 3,
  )


_documents.defvjp(_documents_forward, _documents_backward)
