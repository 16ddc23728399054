"""Cross-entropy of a language model's head without all logits in memory."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def head_loss(
  hidden: Float[Array, "B T E"],
  weight: Float[Array, "E V"],
  targets: Int[Array, "B T"],
  target_weights: Float[Array, "B T"],
  chunk_tokens: int = 8192,
) -> Float[Array, ""]:
  """Weighted sum of the cross-entropy of softmax(hidden weight), in nats.

  sum over b, t of w (log sum_v exp(z_v) - z_target) with z = hidden weight in
  float32. Logits exist for `chunk_tokens` tokens at a time. Their gradient,
  w (softmax(z) - one_hot(target)), is made while they do and rounded to
  hidden's dtype, as the gradients of all activations are; the gradients of
  hidden and weight follow at once, and the backward pass scales them.

  Args:
    hidden: the model's last activations, `LMOutput.hidden`.
    weight: the output projection, `DecoderLM.head_weight`; used in hidden's
      dtype.
    targets: the next tokens.
    target_weights: w, what each token counts. Has no gradient.
    chunk_tokens: tokens whose logits exist at once, over the batch.
  """
  return _over_chunks(
    hidden, weight, targets, target_weights, chunk_tokens, False
  )[0]


def _over_chunks(
  hidden, weight, targets, target_weights, chunk_tokens, with_gradients
):
  """The loss, and its gradients by hidden and weight (float32), or zeros."""
  batch, tokens, _ = hidden.shape
  dtype = jnp.promote_types(hidden.dtype, jnp.float32)
  size = min(max(chunk_tokens // batch, 1), tokens)
  count = -(-tokens // size)
  pad = count * size - tokens

  def split(x):
    x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
    x = x.reshape(batch, count, size, *x.shape[2:])
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
    right = jnp.arange(z.shape[-1]) == target[..., None]
    dz = (jnp.exp(z - lse[..., None]) - right) * w[..., None]
    dz = dz.astype(x.dtype)
    d_weight += jnp.einsum("bte,btv->ev", x, dz, preferred_element_type=dtype)
    return (total, d_weight), jnp.einsum("btv,ev->bte", dz, head)

  zeros = jnp.zeros(weight.shape if with_gradients else (), dtype)
  (total, d_weight), d_hidden = lax.scan(
    body,
    (jnp.zeros((), dtype), zeros),
    (split(hidden), split(targets), split(target_weights.astype(dtype))),
  )
  if with_gradients:
    d_hidden = jnp.moveaxis(d_hidden, 0, 1).reshape(batch, -1, hidden.shape[-1])
    d_hidden = d_hidden[:, :tokens]
  return total, d_hidden, d_weight


def _forward(hidden, weight, targets, target_weights, chunk_tokens):
  total, d_hidden, d_weight = _over_chunks(
    hidden, weight, targets, target_weights, chunk_tokens, True
  )
  return total, (d_hidden, d_weight, weight)


def _backward(chunk_tokens, residuals, cotangent):
  del chunk_tokens
  d_hidden, d_weight, weight = residuals
  return (
    (d_hidden * cotangent).astype(d_hidden.dtype),
    (d_weight * cotangent).astype(weight.dtype),
    None,
    None,
  )


head_loss.defvjp(_forward, _backward)
