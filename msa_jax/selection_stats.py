"""Statistics of chosen blocks: overlap between neighbouring queries, and
agreement of two selections.

A mean over nothing is NaN on purpose, so JAX_DEBUG_NANS is off inside.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def _may_be_nan(function: Callable) -> Callable:
  @functools.wraps(function)
  def wrapped(*args, **kwargs):
    with jax.debug_nans(False):
      return function(*args, **kwargs)

  return wrapped


@_may_be_nan
@jax.jit
def union8(block_indices: Int[Array, "B K T P"]) -> Float[Array, ""]:
  """Mean number of distinct blocks that 8 neighbouring queries choose.

  Of more than 64K queries, only every n-th group of eight is counted.
  """
  q_len = block_indices.shape[-2]
  return jnp.mean(_unions(block_indices, max(1, q_len >> 16)))


def _unions(block_indices, every: int = 1) -> Array:
  """Distinct blocks of every n-th group of 8 queries: [..., groups]."""
  *lead, q_len, top_k = block_indices.shape
  eights = block_indices[..., : q_len // 8 * 8, :]
  eights = eights.reshape(*lead, q_len // 8, 8 * top_k)
  eights = eights[..., ::every, :]
  ids = jnp.sort(eights, axis=-1)
  new = (ids[..., 1:] != ids[..., :-1]) & (ids[..., 1:] >= 0)
  counts = jnp.sum(new, axis=-1) + (ids[..., 0] >= 0).astype(jnp.int32)
  return counts.astype(jnp.float32)


SHARING = ("union8", "first_block", "previous_block", "kept")


@_may_be_nan
@functools.partial(jax.jit, static_argnames=("block_size", "kv_len"))
def sharing(
  block_indices: Int[Array, "B K T P"],
  *,
  block_size: int = 128,
  kv_len: int | None = None,
) -> dict[str, Float[Array, "K"]]:
  """How much the choices of neighbouring queries overlap, for each group.

  Each value is a mean over the queries that see more than twice P blocks,
  because the others have little to choose from (NaN if there are none):

    union8          distinct blocks that 8 neighbouring queries choose
    first_block     share of the queries that choose block 0
    previous_block  share that choose the block before their own
    kept            share of a query's blocks that the query four blocks later
                    chooses too

  Args:
    block_indices: the choices.
    block_size: tokens of a block.
    kv_len: number of keys, whose last tokens are the queries; None: as many as
      queries.
  """
  _, _, q_len, top_k = block_indices.shape
  kv_len = q_len if kv_len is None else kv_len
  own = (jnp.arange(q_len) + kv_len - q_len) // block_size
  chooses = own >= 2 * top_k

  def mean(values: Array, counts: Array) -> Array:
    counts = jnp.broadcast_to(counts[None, None], values.shape)
    values = jnp.where(counts, values.astype(jnp.float32), 0)
    count = jnp.sum(counts, axis=(0, 2)).astype(jnp.float32)
    return jnp.sum(values, axis=(0, 2)) / count

  eights = chooses[: q_len // 8 * 8].reshape(-1, 8).all(-1)
  lag = 4 * block_size
  later = jnp.roll(block_indices, -lag, axis=2)
  both = (block_indices[..., None] == later[..., None, :]).any(-1)
  kept = jnp.sum(both & (block_indices >= 0), axis=-1) / top_k
  return {
    "union8": mean(_unions(block_indices), eights),
    "first_block": mean((block_indices == 0).any(-1), chooses),
    "previous_block": mean(
      (block_indices == own[None, None, :, None] - 1).any(-1), chooses
    ),
    "kept": mean(kept, chooses & (jnp.arange(q_len) < q_len - lag)),
  }


@_may_be_nan
def recall(
  block_indices: Int[Array, "B K T P"], truth: Int[Array, "B K T P"]
) -> Float[Array, ""]:
  """Share of the blocks in `truth` that `block_indices` chooses too."""
  same = block_indices[..., None] == truth[..., None, :]
  found = jnp.sum(jnp.any(same, axis=-2) & (truth >= 0))
  return found / jnp.sum(truth >= 0)
