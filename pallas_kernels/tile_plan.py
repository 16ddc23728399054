"""block_indices -> what the attention kernels do, planned on the device.

Neighbouring queries of one batch row and group form a *tile*. A block chosen by
enough queries of a tile is **shared**: the tile walks it once for all of them.
Every other choice is an **edge** (query, block): edges are sorted by block, and
a block's queries are gathered beside it. The rule compares the two costs, so a
tile may have only shared blocks, only edges beside its own block, or both.
Edges are worked off a *chunk* of queries at a time, which bounds the memory
that their partial results take.

Everything here has static shapes and runs inside jit without a host sync.
Choices beyond the query's own block, and ids that name no block, are dropped
before anything is counted, so that no id reaches an address unchecked. A
query's own block is always shared: only tiles know causal limits, edges lie
wholly in the past. The order of ids within a row does not matter; duplicates
would count twice.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from pallas_kernels import mosaic

SHARED_ID_SHIFT = 16  # of a shared entry: block id above, query bits below
PLACE_BITS = 9  # of a choice: block id above, place in its tile below


@dataclasses.dataclass(frozen=True)
class Geometry:
  """Static sizes of a plan.

  Attributes:
    num_blocks: N.
    block_size: tokens of a block.
    top_k: P.
    chunk: queries of a chunk, a multiple of `tile`.
    tile: queries of a tile.
    span: queries whose edges are sorted together. Less than `chunk` keeps the
      gathered queries of a span in L2.
    task: most edges of a task; hot blocks are split into several tasks.
    shared_cost: cost of a shared block for half a tile, in edges.
    slack: a tile walks all its blocks if that costs at most this factor of the
      mixed way, which needs the sort and a second kernel.
  """

  num_blocks: int
  block_size: int
  top_k: int
  chunk: int
  tile: int
  span: int
  task: int
  shared_cost: float
  slack: float

  @property
  def max_shared(self) -> int:
    """Longest list of shared blocks: own blocks (2 at most) and the rest."""
    fewest = max(1, int(self.shared_cost))
    return min(self.tile * self.top_k // fewest + 2, self.tile * self.top_k)

  @property
  def num_spans(self) -> int:
    return -(-self.chunk // self.span)

  @property
  def max_tasks(self) -> int:
    segments = self.num_spans * self.num_blocks
    edges = self.chunk * self.top_k
    return min(edges, segments + edges // self.task)


class TilePlan(NamedTuple):
  """What each tile does; tiles of all rows (batch x groups) one after another.

  Attributes:
    info: int32 [tiles, 4]: shared blocks before every own block, shared blocks,
      query bits of rows poisoned by a key (low half) and by a value (high
      half), query bits of rows that see anything.
    shared: int32 [tiles, max_shared], ascending block id and query bits.
    choices: int32 [tiles, tile * P], ascending: block id and place in the tile
      (query * P + p) of every choice that counts, then `mosaic.NEVER`.
    is_edge: bool [tiles, tile * P], which of `choices` are edges.
  """

  info: Int[Array, "tiles 4"]
  shared: Int[Array, "tiles entries"]
  choices: Int[Array, "tiles places"]
  is_edge: Bool[Array, "tiles places"]


class EdgePlan(NamedTuple):
  """The edges of some chunks, by chunk, span and block.

  Attributes:
    chunks: int32 [chunks, 2]: first task and number of tasks.
    tasks: int32 [max_tasks, 4]: block, first edge, number of edges, 0.
    order: int32 [edges]: place in the chunk (query * P + p).
  """

  chunks: Int[Array, "chunks 2"]
  tasks: Int[Array, "tasks 4"]
  order: Int[Array, "edges"]


def _bits(flags: Bool[Array, "*A tile"]) -> Int[Array, "*A"]:
  shifts = jnp.arange(flags.shape[-1], dtype=jnp.int32)
  return jnp.sum(flags.astype(jnp.int32) << shifts, axis=-1, dtype=jnp.int32)


def plan_tiles(
  ids: Int[Array, "rows queries P"],
  positions: Int[Array, "rows queries"],
  first_bad: Int[Array, "rows 2 N"],
  geometry: Geometry,
) -> TilePlan:
  """Splits all choices into shared blocks and edges.

  Args:
    ids: chosen blocks, any order, anything outside 0 .. own block is dropped.
    positions: the queries' key slots; negative for queries that see nothing.
    first_bad: the first slot of each block whose key (0) or value (1) is not
      finite, `mosaic.NEVER` without one.
    geometry: static sizes; `queries` is a multiple of its tile.
  """
  g = geometry
  num_rows, num_queries, _ = ids.shape
  num_tiles = num_rows * num_queries // g.tile
  places = g.tile * g.top_k
  own = jnp.where(positions < 0, -1, positions // g.block_size)
  valid = (ids >= 0) & (ids <= own[..., None]) & (ids < g.num_blocks)
  row = jnp.arange(num_rows)[:, None, None]
  known = jnp.clip(ids, 0, g.num_blocks - 1)
  bad_key, bad_value = (
    jnp.any(
      valid & (first_bad[row, kind, known] <= positions[..., None]), axis=-1
    )
    for kind in range(2)
  )

  # Sorted, equal blocks of a tile's queries lie side by side.
  place = jnp.arange(places, dtype=jnp.int32)
  choices = jnp.where(
    valid.reshape(num_tiles, places),
    (known.reshape(num_tiles, places) << PLACE_BITS) | place,
    mosaic.NEVER,
  )
  choices = lax.sort(choices, dimension=1, is_stable=False)
  valid = choices != mosaic.NEVER
  block = choices >> PLACE_BITS
  bit = 1 << ((choices & ((1 << PLACE_BITS) - 1)) // g.top_k)
  bit = jnp.where(valid, bit, 0)
  reach = g.tile - 1
  pad = ((0, 0), (reach, reach))
  near_block = jnp.pad(block, pad, constant_values=-1)
  near_bit = jnp.pad(bit, pad)
  wanted = bit
  for shift in range(2 * g.tile - 1):
    window = slice(shift, shift + places)
    same = near_block[:, window] == block
    wanted |= jnp.where(same, near_bit[:, window], 0)
  first = valid & (near_block[:, reach - 1 : reach - 1 + places] != block)
  half = g.tile // 2
  halves = ((wanted & ((1 << half) - 1)) != 0).astype(jnp.int32)
  halves += (wanted >> half) != 0
  count = lax.population_count(wanted)

  oldest_own = own.reshape(num_tiles, g.tile)[:, :1]
  popular = (block >= oldest_own) | (count >= g.shared_cost * halves)
  # Costs in half-tile blocks, of walking all and of the mixed way.
  walk = jnp.where(first, halves, 0)
  walk_cost = jnp.sum(walk, axis=-1)
  mixed_cost = jnp.sum(jnp.where(popular, walk, 0), axis=-1) + jnp.sum(
    valid & ~popular, axis=-1
  ) / max(g.shared_cost, 1e-3)
  fits = jnp.sum(first, axis=-1) <= g.max_shared
  walk_tile = fits & (walk_cost <= g.slack * mixed_cost)
  walk_all = jnp.all(fits) & (
    jnp.sum(walk_cost.astype(jnp.float32)) <= g.slack * jnp.sum(mixed_cost)
  )
  shared = popular | (walk_tile | walk_all)[:, None]

  listed = first & shared
  entry = jnp.where(listed, (block << SHARED_ID_SHIFT) | wanted, mosaic.NEVER)
  entry = lax.sort(entry, dimension=1, is_stable=False)[:, : g.max_shared]

  def by_tile(x):
    return _bits(x.reshape(num_tiles, g.tile))

  info = jnp.stack(
    [
      jnp.sum(listed & (block < oldest_own), axis=-1, dtype=jnp.int32),
      jnp.sum(listed, axis=-1, dtype=jnp.int32),
      by_tile(bad_key) | (by_tile(bad_value) << 16),
      by_tile(jnp.any((ids >= 0) & (ids <= own[..., None]), axis=-1)),
    ],
    axis=-1,
  )
  return TilePlan(info, entry, choices, valid & ~shared)


def plan_merges(tiles: TilePlan, geometry: Geometry) -> Int[Array, "tiles P"]:
  """Query bits, for each p, of the queries whose p-th choice is an edge."""
  g = geometry
  place = tiles.choices & ((1 << PLACE_BITS) - 1)
  bit = jnp.where(tiles.is_edge, 1 << (place // g.top_k), 0)
  here = (place % g.top_k)[:, None, :] == jnp.arange(g.top_k)[:, None]
  return jnp.sum(jnp.where(here, bit[:, None], 0), axis=-1, dtype=jnp.int32)


def plan_edges(
  choices: Int[Array, "chunks tiles places"],
  is_edge: Bool[Array, "chunks tiles places"],
  geometry: Geometry,
) -> EdgePlan:
  """Sorts the edges of some chunks and cuts them into tasks."""
  g = geometry
  num_chunks, chunk_tiles, places = choices.shape
  num_segments = num_chunks * g.num_spans * g.num_blocks
  tile = jnp.arange(chunk_tiles, dtype=jnp.int32)[:, None]
  span = tile * g.tile // g.span
  span += jnp.arange(num_chunks, dtype=jnp.int32)[:, None, None] * g.num_spans
  segment = jnp.where(
    is_edge, span * g.num_blocks + (choices >> PLACE_BITS), num_segments
  )
  place = tile * places + (choices & ((1 << PLACE_BITS) - 1))
  segment, order = lax.sort(
    (
      segment.reshape(-1).astype(jnp.uint32),
      place.reshape(-1).astype(jnp.uint32),
    ),
    num_keys=1,
    is_stable=False,
  )
  # Unrolled: one fused launch instead of a loop of small ones.
  bounds = jnp.searchsorted(
    segment,
    jnp.arange(num_segments + 1, dtype=jnp.uint32),
    method="scan_unrolled",
  ).astype(jnp.int32)
  counts = bounds[1:] - bounds[:-1]
  pieces = -(-counts // g.task)
  ends = jnp.cumsum(pieces)
  # The last segment of each chunk closes its tasks.
  chunk_end = ends.reshape(num_chunks, -1)[:, -1]
  chunk_first = jnp.pad(chunk_end[:-1], (1, 0))
  task = jnp.arange(num_chunks * g.max_tasks, dtype=jnp.int32)
  owner = jnp.searchsorted(
    ends, task, side="right", method="scan_unrolled"
  ).astype(jnp.int32)
  owner = jnp.minimum(owner, num_segments - 1)
  # Pieces of one block are equal up to a tile's worth of edges.
  size = -(-counts // jnp.maximum(pieces, 1))
  size = (-(-size // g.tile) * g.tile)[owner]
  start = bounds[owner] + (task - (ends - pieces)[owner]) * size
  start = jnp.minimum(start, bounds[owner + 1])
  count = jnp.minimum(size, bounds[owner + 1] - start)
  return EdgePlan(
    chunks=jnp.stack([chunk_first, chunk_end - chunk_first], axis=-1),
    tasks=jnp.stack(
      [owner % g.num_blocks, start, count, jnp.zeros_like(count)], axis=-1
    ),
    order=order.astype(jnp.int32),
  )
