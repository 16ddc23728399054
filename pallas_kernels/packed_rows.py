"""Packed rows as the kernels take them: every block starts at a whole block.

In a packed row (`msa_jax.segments`) blocks start anew with each document or
tree node, at any slot. The kernels find block n at n * block_size. So keys are
copied once: block n of the row goes to the *places* n * block_size onwards, and
a block that is shorter than block_size has zeros behind it. There are
N * block_size places. Queries are not copied; they are those of T slots one
after another, all S or some of them (`query_pieces`). A query's position is the
place of its own key, so its own block is position // block_size, and the causal
mask in its own block is a comparison of places, as in plain rows.

What differs from a plain row is then

* which blocks a query may choose: `seen_blocks` removes the others;
* that positions of neighbouring queries are not neighbours: the kernels read
  them instead of counting;
* that a block may end early: no query sees the places behind its last key.
  Only a tree whose inner nodes are no whole blocks has short blocks that
  queries of other blocks see.

The copy of K, V and the index keys is linear in S, and small beside attention.
Gradients of keys go back by the inverse gather.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, Shaped

from pallas_kernels.mosaic import NEVER

HALF = 64  # keys of half a KV block (`kv_block_plan.KV_BLOCK`)


class Layout(Protocol):
  """What the kernels read of `msa_jax.segments.BlockLayout`, which see."""

  @property
  def block_start(self) -> Int[Array, "B N"]: ...
  @property
  def block_end(self) -> Int[Array, "B N"]: ...
  @property
  def block_until(self) -> Int[Array, "B N"]: ...
  @property
  def block_depth(self) -> Int[Array, "B N"]: ...
  @property
  def visible_until(self) -> Int[Array, "B S"]: ...
  @property
  def own_block(self) -> Int[Array, "B S"]: ...


class PackedRows(NamedTuple):
  """Places of a layout's tokens; a pytree.

  Attributes:
    positions: place of each query's token; -1 for padding.
    places: place of each slot's token; -1 for padding.
    source: the slot that each place copies. Behind the last key of a block that
      is the slot of this key, so that every entry is inside the row.
    keys: tokens of each block; 0 for an unused id.
    end: number of the query whose slot is after each block's last one; like
      `until` it may be negative, or more than T.
    until: queries from this number on do not see the block.
    depth: blocks before each block on its path.
  """

  positions: Int[Array, "B T"]
  places: Int[Array, "B S"]
  source: Int[Array, "B places"]
  keys: Int[Array, "B N"]
  end: Int[Array, "B N"]
  until: Int[Array, "B N"]
  depth: Int[Array, "B N"]

  @property
  def num_blocks(self) -> int:
    return self.keys.shape[1]

  @property
  def block_size(self) -> int:
    return self.source.shape[1] // self.num_blocks

  def to_blocks(
    self, x: Shaped[Array, "B S *X"], *, repeat: bool = False
  ) -> Shaped[Array, "B places *X"]:
    """Copies tokens to their places.

    Args:
      x: a value of each slot.
      repeat: behind the last key of a short block come copies of it, and not
        zeros. They change no maximum over the block.
    """
    words = x.reshape(*x.shape[:2], -1)
    # XLA's gather moves one element a thread: 32-bit elements need half as
    # many.
    wide = x.dtype.itemsize == 2 and words.shape[-1] % 2 == 0
    if wide:
      words = words.reshape(*words.shape[:2], -1, 2)
      words = lax.bitcast_convert_type(words, jnp.uint32)
    row = jnp.arange(x.shape[0], dtype=jnp.int32)[:, None]
    words = words.at[row, self.source].get(mode="promise_in_bounds")
    if wide:
      words = lax.bitcast_convert_type(words, x.dtype)
    words = words.reshape(*words.shape[:2], *x.shape[2:])
    if repeat:
      return words
    place = jnp.arange(self.block_size, dtype=jnp.int32)
    real = (place < self.keys[..., None]).reshape(self.source.shape)
    return jnp.where(lax.expand_dims(real, range(2, x.ndim)), words, 0)

  def from_blocks(
    self, x: Shaped[Array, "B places *X"]
  ) -> Shaped[Array, "B S *X"]:
    """The value of each slot; 0 for padding."""
    row = jnp.arange(x.shape[0], dtype=jnp.int32)[:, None]
    at = jnp.maximum(self.places, 0)
    out = x.at[row, at].get(mode="promise_in_bounds")
    real = lax.expand_dims(self.places >= 0, range(2, x.ndim))
    return jnp.where(real, out, 0)

  def seen_blocks(
    self, block_indices: Int[Array, "B K T P"]
  ) -> Int[Array, "B K T P"]:
    """Replaces ids of blocks that the query does not see by -1."""
    ids = block_indices
    query = jnp.arange(ids.shape[2], dtype=jnp.int32)[None, None, :, None]
    own = self.own_block[:, None, :, None]
    row = jnp.arange(ids.shape[0], dtype=jnp.int32)[:, None, None, None]
    known = jnp.clip(ids, 0, self.num_blocks - 1)
    until = self.until.at[row, known].get(mode="promise_in_bounds")
    return jnp.where((ids >= 0) & (ids <= own) & (query < until), ids, -1)

  @property
  def own_block(self) -> Int[Array, "B T"]:
    """The block of each query; -1 for padding."""
    positions = self.positions
    return jnp.where(positions < 0, -1, positions // self.block_size)

  def before_on_path(self) -> Int[Array, "B N"]:
    """The block before each block on its path; -1 for a path's first block.

    It is the last one, among those with lower ids, that has one block less
    before it.
    """
    count = self.num_blocks
    ids = jnp.arange(count, dtype=jnp.int32)[None]
    used = self.keys > 0
    by_depth = jnp.where(used, self.depth * count + ids, NEVER)
    by_depth = lax.sort(by_depth, dimension=1, is_stable=False)
    at = jax.vmap(functools.partial(jnp.searchsorted, method="scan_unrolled"))(
      by_depth, (self.depth - 1) * count + ids
    ).astype(jnp.int32)
    before = jnp.take_along_axis(by_depth, jnp.maximum(at - 1, 0), axis=1)
    return jnp.where(used & (self.depth > 0), before % count, -1)

  def newest_blocks(self, count: int) -> Int[Array, "B count T"]:
    """The own block of each query and those before it on its path, then -1."""
    before = self.before_on_path()
    blocks = [self.own_block]
    for _ in range(1, count):
      known = jnp.maximum(blocks[-1], 0)
      last = jnp.take_along_axis(before, known, axis=1)
      blocks.append(jnp.where(blocks[-1] < 0, -1, last))
    return jnp.stack(blocks, axis=1)

  def path_ranges(
    self, last: Int[Array, "B tiles"], stop: Int[Array, "B tiles"], most: int
  ) -> list[tuple[Int[Array, "B tiles"], Int[Array, "B tiles"]]]:
    """Ranges of ids that hold all blocks which some queries may see.

    Args:
      last: the own block of the first of the queries that is no padding; -1 if
        there is none.
      stop: an id behind the last block that any of them may choose.
      most: number of ranges. Where a path has more, the lowest range also holds
        blocks that are on no path.

    Returns:
      (first, stop) of each range, from the highest to the lowest, disjoint;
      stop <= first for an empty one.
    """
    before = self.before_on_path()
    ids = jnp.arange(self.num_blocks, dtype=jnp.int32)[None]
    starts_run = jnp.where(before != ids - 1, ids, 0)
    run = lax.cummax(starts_run, axis=1)  # where the path gets to ids - 1
    root = lax.cummax(jnp.where(before < 0, ids, 0), axis=1)

    def take(x, at):
      return jnp.take_along_axis(x, jnp.maximum(at, 0), axis=1)

    root = take(root, last)
    ranges = []
    for i in range(most):
      first = root if i == most - 1 else take(run, last)
      first = jnp.where(last < 0, 0, first)
      end = stop if i == 0 else jnp.minimum(last + 1, stop)
      ranges.append((first, jnp.where(last < 0, 0, end)))
      last = jnp.where(last < 0, -1, take(before, first))
    return ranges

  def keys_of_halves(self, num_kv_blocks: int) -> Int[Array, "B halves"]:
    """Keys of each half KV block: 64 places."""
    if self.block_size == HALF:
      keys = self.keys
    else:
      first = jnp.minimum(self.keys, HALF)
      keys = jnp.stack([first, self.keys - first], axis=-1)
      keys = keys.reshape(len(keys), -1)
    return jnp.pad(keys, ((0, 0), (0, 2 * num_kv_blocks - keys.shape[1])))

  def unmasked_from(
    self, num_kv_blocks: int, block_keys: int
  ) -> Int[Array, "B kv_blocks"]:
    """The number of the query from which on none needs a mask in a KV block.

    Its slot is the one behind the block; T if the block is a short one.

    Args:
      num_kv_blocks: KV blocks of a row.
      block_keys: places of a KV block: whole blocks, or half of one.
    """
    never = self.positions.shape[1]
    query = jnp.where(self.keys < self.block_size, never, self.end)
    if block_keys < self.block_size:
      query = jnp.repeat(query, self.block_size // block_keys, axis=1)
      return query[:, :num_kv_blocks]
    each = block_keys // self.block_size
    pad = num_kv_blocks * each - self.num_blocks
    query = jnp.pad(query, ((0, 0), (0, pad)), constant_values=never)
    return query.reshape(len(query), num_kv_blocks, each).max(axis=-1)


# Letters of the arrays, for `partition.by_rows_and_heads`.
_LETTERS = ("B T", "B S", "B M", "B N", "B N", "B N", "B N")


def operands(
  rows: PackedRows | None,
) -> tuple[tuple[Array, ...], tuple[str, ...]]:
  """The arrays of packed rows and their axes' letters; none of plain rows."""
  return ((), ()) if rows is None else (tuple(rows), _LETTERS)


def of_arrays(arrays: Sequence[Array]) -> PackedRows | None:
  """The inverse of `operands`."""
  return PackedRows(*arrays) if arrays else None


def num_blocks(layout: Layout | None) -> int:
  """N of packed rows; 0 for plain rows, whose S says it."""
  return 0 if layout is None else layout.block_start.shape[1]


def of_layout(
  layout: Layout | None,
  block_size: int,
  q_len: int,
  kv_lengths: Int[Array, "B"],
) -> PackedRows | None:
  """The places of a layout's tokens; None for plain rows.

  Args:
    layout: blocks of packed rows.
    block_size: tokens of a block.
    q_len: queries, T.
    kv_lengths: the slot after that of the last query, in each batch row.
  """
  if layout is None:
    return None
  start, end, own = layout.block_start, layout.block_end, layout.own_block
  length, num_blocks = own.shape[1], start.shape[1]
  # A row with too many spans has ids that the arrays do not hold.
  real = (own >= 0) & (own < num_blocks)
  slot = jnp.arange(length, dtype=jnp.int32)[None]
  first = jnp.take_along_axis(start, jnp.where(real, own, 0), axis=1)
  place = jnp.clip(slot - first, 0, block_size - 1)
  offset = jnp.arange(block_size, dtype=jnp.int32)
  source = jnp.minimum(start[..., None] + offset, end[..., None] - 1)
  source = jnp.clip(source, 0, length - 1)
  places = jnp.where(real, own * block_size + place, -1)
  first_slot = kv_lengths[:, None].astype(jnp.int32) - q_len
  return PackedRows(
    positions=at_slots(places, first_slot, q_len, -1),
    places=places,
    source=source.reshape(len(source), -1),
    keys=jnp.clip(end - start, 0, block_size),
    end=end - first_slot,
    until=layout.block_until - first_slot,
    depth=layout.block_depth,
  )


def at_slots(
  x: Shaped[Array, "B S"], first_slot: Int[Array, "B 1"], q_len: int, fill: Any
) -> Shaped[Array, "B T"]:
  """The values of T slots from first_slot on; `fill` where there is no slot."""
  slot = first_slot + jnp.arange(q_len, dtype=jnp.int32)
  row = jnp.arange(len(x), dtype=jnp.int32)[:, None]
  # A negative index would count from the end.
  slot = jnp.where(slot < 0, x.shape[1], slot)
  return x.at[row, slot].get(mode="fill", fill_value=fill)
