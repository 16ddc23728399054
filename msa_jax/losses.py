"""Cross-entropy of a language model's head without all logits in memory."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from msa_jax.checks import (
  check_array,
  check_floats,
  check_integer,
  check_integers,
  compute_dtype,
  reverse_mode,
)
from msa_jax.layers import Sharding, split_beyond_batch
from msa_jax.meshes import any_mesh_function, varying_zeros


@any_mesh_function(lambda *args, **named: PartitionSpec())
def head_loss(
  hidden: Float[Array, "B T E"],
  weight: Float[Array, "E V"],
  targets: Int[Array, "B T"],
  target_weights: Float[Array, "B T"],
  chunk_tokens: int = 8192,
  *,
  sharding: Sharding | None = None,
) -> Float[Array, ""]:
  """Weighted sum of the cross-entropy of softmax(hidden weight), in nats.

  sum over b, t of w (log sum_v exp(z_v) - z_target), with z = hidden weight
  accumulated in float32. Logits exist for `chunk_tokens` tokens at a time.
  Their gradient, w (softmax(z) - one_hot(target)), is computed in the same pass
  and rounded to hidden's dtype, as the gradients of all activations are. The
  gradients of hidden and weight follow from it at once; the backward pass only
  scales them.

  Args:
    hidden: the model's last activations, `LMOutput.hidden`.
    weight: the output projection, `DecoderLM.head_weight()`; cast to hidden's
      dtype.
    targets: the next token of each position. Negative ones count from the end;
      one outside of V makes the loss NaN, whatever its weight.
    target_weights: w, how much each target counts. They have no gradient.
    chunk_tokens: tokens, over the whole batch, whose logits exist at once.
    sharding: of the model. Where a mesh axis splits the tokens of a sequence,
      or the heads (`Sharding.between_layers`), each device takes the loss of
      its own tokens. None leaves the division to XLA, which gathers tokens and
      repeats the loss on devices that share heads.

  Raises:
    NotImplementedError: forward mode; the loss has a gradient in reverse mode.
    ValueError: an argument is wrong.
  """
  check_floats(hidden=(hidden, "B T E"))
  check_floats(weight=(weight, "E V"))
  shape = hidden.shape[:2]
  check_array("weight", weight, (hidden.shape[2], None), "[E, V]")
  check_array("targets", targets, shape, "[B, T]")
  check_integers("targets", targets)
  check_array("target_weights", target_weights, shape, "[B, T]")
  chunk_tokens = check_integer("chunk_tokens", chunk_tokens)
  args = (hidden, weight, targets, target_weights)
  split = split_beyond_batch(sharding, *shape)
  if split is None:
    return _reverse_mode(lambda: _head_loss(*args, chunk_tokens))
  axes = sum(split, ())  # of batch rows, then of tokens
  mesh = jax.sharding.get_abstract_mesh()
  chunk = max(chunk_tokens // math.prod(mesh.shape[name] for name in axes), 1)

  def local(*args):
    return lax.psum(_head_loss(*args, chunk), axes)

  tokens = PartitionSpec(*split)
  over_tokens = jax.shard_map(
    local,
    in_specs=(tokens, PartitionSpec(), tokens, tokens),
    out_specs=PartitionSpec(),
    check_vma=False,
  )
  return _reverse_mode(lambda: over_tokens(*args))


def _reverse_mode(function: Callable[[], Any]) -> Any:
  return reverse_mode(
    function,
    "head_loss supports reverse mode only (jax.grad, jax.vjp), not jax.jvp,"
    " jax.jacfwd or jax.hessian",
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _head_loss(hidden, weight, targets, target_weights, chunk_tokens):
  (total, _), _ = _over_chunks(
    hidden, weight, targets, target_weights, chunk_tokens, False
  )
  return total


def _over_chunks(
  hidden, weight, targets, target_weights, chunk_tokens, with_gradients
) -> Any:
  """((loss, gradient of weight), gradients of hidden by chunk).

  Without gradients, the first is a zero and the second None.
  """
  batch, tokens, _ = hidden.shape
  dtype = compute_dtype(hidden.dtype)
  size = min(max(chunk_tokens // batch, 1), tokens)
  count = -(-tokens // size)

  def split(x):
    pad = ((0, 0), (0, count * size - tokens)) + ((0, 0),) * (x.ndim - 2)
    x = jnp.pad(x, pad).reshape(batch, count, size, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)

  head = weight.astype(hidden.dtype)

  def body(carry, chunk):
    total, d_weight = carry
    x, target, w = chunk
    z = jnp.einsum("bte,ev->btv", x, head, preferred_element_type=dtype)
    lse = jax.nn.logsumexp(z, axis=-1)
    at_target = jnp.take_along_axis(z, target[..., None], axis=-1)[..., 0]
    total += jnp.sum(w * (lse - at_target))
    if not with_gradients:
      return (total, d_weight), None
    right = jax.nn.one_hot(target, z.shape[-1], dtype=dtype)
    dz = (jnp.exp(z - lse[..., None]) - right) * w[..., None]
    dz = dz.astype(x.dtype)
    d_weight += jnp.einsum("bte,btv->ev", x, dz, preferred_element_type=dtype)
    return (total, d_weight), jnp.einsum("btv,ev->bte", dz, head)

  operands = (hidden, weight, targets, target_weights)
  d_weight = varying_zeros(
    weight.shape if with_gradients else (), dtype, operands
  )
  return lax.scan(
    body,
    (varying_zeros((), dtype, operands), d_weight),
    (split(hidden), split(targets), split(target_weights.astype(dtype))),
  )


def _forward(hidden, weight, targets, target_weights, chunk_tokens):
  (total, d_weight), d_hidden = _over_chunks(
    hidden, weight, targets, target_weights, chunk_tokens, True
  )
  batch, tokens, width = hidden.shape
  d_hidden = jnp.moveaxis(d_hidden, 0, 1).reshape(batch, -1, width)
  return total, (d_hidden[:, :tokens], d_weight, weight)


def _backward(chunk_tokens, residuals, cotangent):
  del chunk_tokens
  d_hidden, d_weight, weight = residuals
  return (
    (d_hidden.astype(cotangent.dtype) * cotangent).astype(d_hidden.dtype),
    (d_weight.astype(cotangent.dtype) * cotangent).astype(weight.dtype),
    None,
    None,
  )


_head_loss.defvjp(_forward, _backward)
