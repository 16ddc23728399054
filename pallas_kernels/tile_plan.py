"""Plans the forward kernels of sparse attention from the chosen blocks.

A *group* here is one KV head of one batch row (batch x KV heads of them, one
after another), and a *tile* is a run of neighbouring queries of a group, the
unit that one CTA of the tile kernel computes. Every chosen block of a tile is
handled in one of two ways:

* **shared**: enough queries of the tile chose the block, so the tile kernel
  loads it once and multiplies it with all of them;
* **(pack, block) pairs**: few queries chose it. The pairs of all tiles are
  sorted by block, so that the pair kernel loads a block once and gathers the
  queries that chose it.

A *pack* is the unit that is gathered: neighbouring queries whose heads fill at
least 8 MMA rows, because a TMA copy moves tiles of 8 rows. With 8 or more heads
a group it is one query, with 4 heads two queries, with 2 heads four. A pair
computes all queries of its pack; only those that chose the block merge it.

The costs of the two ways are compared. A tile may end up with shared blocks
only, or with pairs for everything but its own blocks, or with both. Pairs are
processed one *chunk* of queries at a time, which bounds the memory for their
partial outputs.

Which queries of a tile chose a block is found in two ways, with the same
result. `plan_by_choice` sorts the tile's choices, which also serves to list its
pairs. `plan_by_block` makes a table of all blocks, which takes less time where
they are few (`Geometry.few_blocks`). It tells whether there are pairs, not
which.

A query's own block is always shared, because only the tile kernel applies the
causal mask: a pair's block lies wholly before its query. So is every block of a
packed row that ends early, because only the tile kernel knows where it ends.

All shapes are static and everything runs inside jit on the device.
Choices beyond the query's own block and ids that name no block are dropped
before anything is counted, so an invalid id never becomes an address. The order
of the ids of a query does not matter; a duplicate would be counted twice.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from pallas_kernels import mosaic


@dataclasses.dataclass(frozen=True)
class Geometry:
  """Static sizes of a plan.

  Attributes:
    num_blocks: N.
    block_size: tokens of a block.
    top_k: P.
    pack: queries of a pack: neighbours that are copied together, so that one
      pair holds all queries of a pack that chose its block.
    chunk: queries of a chunk, a multiple of `tile`.
    tile: queries of a tile, at most 64; where tiles have pairs, a multiple of
      `2 * pack`.
    span: queries whose pairs are sorted together. A span shorter than `chunk`
      keeps the queries that it gathers in L2.
    task: upper bound on the pairs of a task. A block that many queries chose is
      split into several tasks.
    shared_cost: cost of a shared block for half a tile, measured in pairs.
    masked: upper bound on the blocks of a tile that must be shared because they
      need a mask: 2 own ones of neighbouring positions.
    slack: all blocks of a tile become shared if that costs at most `slack`
      times the mixture of shared blocks and pairs, because pairs also need the
      sort and a second kernel.
  """

  num_blocks: int
  block_size: int
  top_k: int
  pack: int
  chunk: int
  tile: int
  span: int
  task: int
  shared_cost: float
  slack: float
  masked: int = 2

  @property
  def half(self) -> int:
    """Queries of half a tile; their bits fit one int32."""
    return self.tile // 2

  @property
  def tile_packs(self) -> int:
    return self.tile // self.pack

  @property
  def pack_slots(self) -> int:
    """Choice slots of a pack, and so the most pairs that it can have."""
    return self.pack * self.top_k

  @property
  def few_blocks(self) -> bool:
    """Whether `plan_by_block` takes less time than `plan_by_choice`."""
    slots = self.tile * self.top_k
    return self.num_blocks <= min(2 * slots, mosaic.MAX_SLOTS_COMPARED)

  @property
  def max_shared(self) -> int:
    """The most shared blocks of a tile that has pairs as well."""
    fewest = max(1, int(self.shared_cost))
    slots = self.tile * self.top_k
    return min(slots // fewest + self.masked, slots)

  @property
  def choice(self) -> mosaic.SortKey:
    """A choice of a tile as one integer: block id, then slot in the tile.

    A slot has at most 12 bits, of 64 queries with 64 choices each, so that 15
    bits of a block id fit beside them and `mosaic.NEVER` stays greater than
    every choice.
    """
    return mosaic.SortKey((self.tile * self.top_k - 1).bit_length())

  @property
  def num_spans(self) -> int:
    return -(-self.chunk // self.span)

  @property
  def max_tasks(self) -> int:
    segments = self.num_spans * self.num_blocks
    pairs = self.chunk * self.top_k
    return min(pairs, segments + pairs // self.task)


class TilePlan(NamedTuple):
  """What the CTA of each tile does; the tiles of all groups in one list.

  "Query bits" are a bit mask over the queries of half a tile, one int32 for
  each of the two halves.

  Attributes:
    counts: int32 [tiles, 2]: the number of shared blocks before the first one
      that needs a mask, and the number of all shared blocks.
    queries: int32 [tiles, 3, 2]: query bits of the queries that see a
      non-finite key, of those that see a non-finite value, and of those that
      see anything.
    shared: int32 [tiles, entries]: the shared blocks, ascending. There are
      `max_shared` entries, or N if that is less.
    shared_by: int32 [tiles, 2, entries]: query bits of those that chose each of
      them.
    has_pairs: bool [tiles]: whether any choice is none of a shared block.
  """

  counts: Int[Array, "tiles 2"]
  queries: Int[Array, "tiles 3 2"]
  shared: Int[Array, "tiles entries"]
  shared_by: Int[Array, "tiles 2 entries"]
  has_pairs: Bool[Array, "tiles"]


class SortedChoices(NamedTuple):
  """The sorted choices of each tile, and which of them are no pairs.

  Attributes:
    choices: int32 [tiles, tile * P], ascending: block id and choice slot
      (query * P + p) of every valid choice (`Geometry.choice`), then
      `mosaic.NEVER`.
    chosen_by: int32 [tiles, 2, tile * P]: query bits of this choice's query and
      of those behind it that chose the same block.
    is_shared: bool [tiles, tile * P]: the first choices of shared blocks.
  """

  choices: Int[Array, "tiles slots"]
  chosen_by: Int[Array, "tiles 2 slots"]
  is_shared: Bool[Array, "tiles slots"]


class PairPlan(NamedTuple):
  """The (pack, block) pairs of some chunks, sorted by chunk, span and block.

  A task is a run of pairs that share their block: the work of one CTA of the
  pair kernel between two loads of K and V.

  Attributes:
    chunks: int32 [chunks, 2]: first task and number of tasks of each chunk.
    tasks: int32 [max_tasks, 4]: block, first pair, number of pairs, 0.
    order: int32 [pairs]: choice slot in the chunk (query * P + p) of each pair,
      which is also pack * pack_slots + choice slot in the pack.
  """

  chunks: Int[Array, "chunks 2"]
  tasks: Int[Array, "tasks 4"]
  order: Int[Array, "pairs"]


def plan_by_block(
  ids: Int[Array, "groups queries P"],
  positions: Int[Array, "groups queries"],
  first_bad: Int[Array, "groups 2 N"],
  geometry: Geometry,
  keys: Int[Array, "groups N"] | None = None,
) -> TilePlan:
  """The plan of `plan_by_choice`, without a sort.

  The blocks of each query become bits of words, and those of a tile's queries a
  table: for each block, the queries that chose it as bits.

  Args:
    ids, positions, first_bad, geometry, keys: as in `plan_by_choice`.
  """
  g = geometry
  num_groups, num_queries, _ = ids.shape
  num_tiles = num_groups * num_queries // g.tile
  own = _own_blocks(positions, g)
  block = jnp.arange(g.num_blocks, dtype=jnp.int32)
  valid = _is_valid(ids, own[..., None], g)
  chosen = mosaic.choice_bits(jnp.where(valid, ids, -1), g.num_blocks)
  bits = mosaic.query_bits(
    chosen.reshape(num_tiles, 2, g.half, -1), g.num_blocks
  )
  # Several launches read the table, so it is kept in no more bytes than needed.
  narrow = next(x for x in (8, 16, 32) if g.half <= x)
  bits = bits.astype(f"uint{narrow}").astype(jnp.int32)
  is_chosen = (bits[:, 0] | bits[:, 1]) != 0

  # A query sees all of the blocks before its own, but only a part of that.
  is_own = mosaic.block_bits(own, g.num_blocks)
  flags = [chosen != 0]
  for kind in range(2):
    bad = first_bad[:, kind]
    bad_words = mosaic.bit_words(bad < mosaic.NEVER)[:, None]
    own_is_bad = jnp.take_along_axis(bad, jnp.maximum(own, 0), axis=1)
    own_is_bad = (own_is_bad <= positions)[..., None]
    bad_words = (bad_words & mosaic.bit_not(is_own)) | jnp.where(
      own_is_bad, is_own, 0
    )
    flags.append((chosen & bad_words) != 0)
  sees, bad_key, bad_value = (jnp.any(x, axis=-1) for x in flags)

  first_masked = _first_own(own, keys, g)
  if keys is not None:
    short = (keys < g.block_size)[:, None]
    short &= is_chosen.reshape(num_groups, -1, g.num_blocks)
    short = jnp.where(short, mosaic.lined_up(block, 3), mosaic.NEVER)
    first_masked = jnp.minimum(
      first_masked, short.min(axis=-1).reshape(num_tiles, 1)
    )
  listed, place = _shared(
    block[None], is_chosen, [bits[:, 0], bits[:, 1]], first_masked, g
  )
  shared_by = jnp.take_along_axis(
    bits, place[:, None], axis=2, mode="fill", fill_value=0
  )
  return TilePlan(
    counts=_counts(listed, block[None], first_masked),
    queries=_query_bits(bad_key, bad_value, sees, g),
    shared=jnp.where(place < g.num_blocks, place, 0),
    shared_by=shared_by,
    has_pairs=jnp.any(is_chosen & ~listed, axis=-1),
  )


def _own_blocks(positions: Int[Array, "groups queries"], geometry: Geometry):
  """The block of each position, -1 of a query that sees nothing."""
  return jnp.where(positions < 0, -1, positions // geometry.block_size)


def _is_valid(ids, own, geometry: Geometry):
  """Whether a choice names a block up to the query's own."""
  return (ids >= 0) & (ids <= own) & (ids < geometry.num_blocks)


def _first_own(own, keys, geometry: Geometry) -> Int[Array, "tiles 1"]:
  """The first own block of each tile's queries, which needs a mask."""
  own = own.reshape(-1, geometry.tile)
  if keys is None:
    return own[:, :1]
  return jnp.where(own < 0, mosaic.NEVER, own).min(axis=1, keepdims=True)


def _query_bits(
  bad_key: Bool[Array, "groups queries"],
  bad_value: Bool[Array, "groups queries"],
  sees: Bool[Array, "groups queries"],
  geometry: Geometry,
) -> Int[Array, "tiles 3 2"]:
  """`TilePlan.queries`."""
  halves = (-1, 2, geometry.half)
  return jnp.stack(
    [mosaic.bit_mask(x.reshape(halves)) for x in (bad_key, bad_value, sees)],
    axis=1,
  )


def _counts(listed, block, first_masked) -> Int[Array, "tiles 2"]:
  """`TilePlan.counts` of the blocks that are listed."""
  return jnp.stack(
    [
      jnp.sum(x, axis=-1, dtype=jnp.int32)
      for x in (listed & (block < first_masked), listed)
    ],
    axis=-1,
  )


def _shared(
  block: Int[Array, "_ n"],
  is_chosen: Bool[Array, "tiles n"],
  chosen_by: list[Int[Array, "tiles n"]],
  first_masked: Int[Array, "tiles 1"],
  geometry: Geometry,
) -> tuple[Bool[Array, "tiles n"], Int[Array, "tiles entries"]]:
  """Which entries are shared blocks, and where the shared blocks stand.

  Args:
    block: ascending blocks of each tile, or of all tiles.
    is_chosen: entries that stand for a block that queries of the tile chose,
      one for each such block.
    chosen_by: query bits of each half of a tile, of those entries.
    first_masked: a tile's first block that needs a mask.
    geometry: static sizes.
  """
  g = geometry
  entries = min(g.max_shared, g.num_blocks)
  if g.shared_cost == 0:
    return is_chosen, mosaic.places_of(is_chosen, entries)
  low, high = chosen_by
  halves = (low != 0).astype(jnp.int32) + (high != 0).astype(jnp.int32)
  packs = _count_packs(low, g) + _count_packs(high, g)

  popular = packs.astype(jnp.float32) >= g.shared_cost * halves.astype(
    jnp.float32
  )
  popular |= block >= first_masked
  # Costs of sharing all blocks and of the mixture with pairs, in units of one
  # block shared by half a tile.
  walk = jnp.where(is_chosen, halves, 0).astype(jnp.float32)
  walk_cost = jnp.sum(walk, axis=-1)
  num_pairs = jnp.sum(jnp.where(is_chosen & ~popular, packs, 0), axis=-1)
  num_pairs = num_pairs.astype(jnp.float32)
  mixed_cost = jnp.sum(jnp.where(popular, walk, 0), axis=-1)
  mixed_cost += num_pairs / g.shared_cost
  fits = jnp.sum(is_chosen, axis=-1) <= g.max_shared
  walk_tile = fits & (walk_cost <= g.slack * mixed_cost)
  walk_all = jnp.all(fits) & (
    jnp.sum(walk_cost) <= g.slack * jnp.sum(mixed_cost)
  )
  listed = is_chosen & (popular | (walk_tile | walk_all)[:, None])
  return listed, mosaic.places_of(listed, entries)


def plan_by_choice(
  ids: Int[Array, "groups queries P"],
  positions: Int[Array, "groups queries"],
  first_bad: Int[Array, "groups 2 N"],
  geometry: Geometry,
  keys: Int[Array, "groups N"] | None = None,
) -> tuple[TilePlan, SortedChoices]:
  """Splits all choices into shared blocks of tiles and (pack, block) pairs.

  Args:
    ids: chosen blocks in any order; ids outside 0 .. own block are dropped.
    positions: position of each query among the keys; negative for a query that
      sees nothing.
    first_bad: position of the first non-finite key (0) and value (1) of each
      block, `mosaic.NEVER` if all are finite.
    geometry: static sizes; `queries` is a multiple of `geometry.tile`.
    keys: tokens of each block of packed rows, where positions of neighbouring
      queries need not be neighbours, but ascend.
  """
  g = geometry
  num_groups, num_queries, _ = ids.shape
  num_tiles = num_groups * num_queries // g.tile
  slots = g.tile * g.top_k
  own = _own_blocks(positions, g)
  valid = _is_valid(ids, own[..., None], g)
  group = jnp.arange(num_groups)[:, None, None]
  known = jnp.clip(ids, 0, g.num_blocks - 1)
  bad_key, bad_value = (
    jnp.any(
      valid & (first_bad[group, kind, known] <= positions[..., None]), axis=-1
    )
    for kind in range(2)
  )
  queries = _query_bits(bad_key, bad_value, jnp.any(valid, axis=-1), g)
  first_masked = _first_own(own, keys, g)
  if keys is not None:
    short = valid & (keys[group, known] < g.block_size)
    short = jnp.where(short, known, mosaic.NEVER).reshape(num_tiles, -1)
    first_masked = jnp.minimum(first_masked, short.min(axis=1, keepdims=True))

  # Sorting puts choices of the same block by different queries side by side.
  slot = jnp.arange(slots, dtype=jnp.int32)[None]
  choices = jnp.where(
    valid.reshape(num_tiles, slots),
    g.choice.pack(known.reshape(num_tiles, slots), slot),
    mosaic.NEVER,
  )
  choices = lax.sort(choices, dimension=1, is_stable=False)
  valid = choices != mosaic.NEVER
  block, query = g.choice.high(choices), g.choice.low(choices) // g.top_k
  chosen_by = _chosen_by(block, query, valid, g)
  # The first choice of each block knows of all.
  first = valid & mosaic.starts_run(block)
  listed, place = _shared(block, first, chosen_by, first_masked, g)

  def pick(x):
    return jnp.take_along_axis(x, place, axis=1, mode="fill", fill_value=0)

  plan = TilePlan(
    counts=_counts(listed, block, first_masked),
    queries=queries,
    shared=pick(block),
    shared_by=jnp.stack([pick(x) for x in chosen_by], axis=1),
    has_pairs=jnp.any(first & ~listed, axis=-1),
  )
  return plan, SortedChoices(
    choices=choices,
    chosen_by=jnp.stack(chosen_by, axis=1),
    is_shared=listed,
  )


def _chosen_by(
  block: Int[Array, "tiles slots"],
  query: Int[Array, "tiles slots"],
  valid: Bool[Array, "tiles slots"],
  geometry: Geometry,
) -> list[Int[Array, "tiles slots"]]:
  """`SortedChoices.chosen_by` for each half of a tile."""
  g = geometry
  over_runs = functools.partial(
    mosaic.or_of_rest_of_run, key=block, longest=g.tile
  )
  if g.tile <= mosaic.WORD:  # both halves in one word
    bits = jnp.where(valid, jnp.int32(1) << query, 0)
    both = over_runs(bits)
    mask = (1 << g.half) - 1
    high = lax.shift_right_logical(both, jnp.int32(g.half))
    return [both & mask, high & mask]
  return [
    over_runs(
      jnp.where(
        valid & (query // g.half == half), jnp.int32(1) << query % g.half, 0
      )
    )
    for half in range(2)
  ]


def _count_packs(
  bits: Int[Array, "tiles slots"], geometry: Geometry
) -> Int[Array, "tiles slots"]:
  """How many packs have a query among query bits."""
  return lax.population_count(mosaic.first_of_packs(bits, geometry.pack))


def tile_of_rank(
  rank: Int[Array, ""], num_groups: int, tiles_of_group: int, bundle: int
) -> Int[Array, ""]:
  """The tile that is computed as the rank-th.

  Later queries see more blocks, so tiles in the order of queries give some CTAs
  more than others (the busiest a quarter more than the mean at 8,192 tokens, 32
  query heads and 8 KV heads). Neighbours in this order have about equally many,
  and the last tiles are short: tiles of the groups of a bundle alternate, every
  second bundle goes backwards, and the last one does.

  Args:
    rank: place in the order of computation.
    num_groups: groups of the launch.
    tiles_of_group: tiles of each group, one group after another.
    bundle: groups whose tiles alternate; a divisor of `num_groups`.
  """
  if num_groups == 1:  # registers are few where tiles merge
    return tiles_of_group - 1 - rank
  size = bundle * tiles_of_group
  nth, place = lax.div(rank, size), lax.rem(rank, size)
  group, place = lax.rem(place, bundle), lax.div(place, bundle)
  behind = num_groups // bundle - 1 - nth
  place = jnp.where(lax.rem(behind, 2) == 0, tiles_of_group - 1 - place, place)
  return nth * size + group * tiles_of_group + place


def find_pairs(
  tiles: SortedChoices, geometry: Geometry
) -> Bool[Array, "tiles slots"]:
  """Which of the tiles' choices are pairs.

  The first choice of a block by a query of a pack stands for the whole pack.
  """
  g = geometry
  block = g.choice.high(tiles.choices)
  query = g.choice.low(tiles.choices) // g.top_k
  first_of_pack = mosaic.starts_run(block) | mosaic.starts_run(query // g.pack)
  shared = mosaic.or_of_rest_of_run(
    tiles.is_shared.astype(jnp.int32), block, g.tile, backwards=True
  )
  return (tiles.choices != mosaic.NEVER) & first_of_pack & (shared == 0)


def plan_merges(
  tiles: SortedChoices, is_pair: Bool[Array, "tiles slots"], geometry: Geometry
) -> Int[Array, "tiles 2 pack_slots"]:
  """Query bits of the queries that a pair is for, by choice slot in the pack.

  The tile kernel merges the partial outputs of these pairs.

  Args:
    tiles: choices of `plan_by_choice`.
    is_pair: of `find_pairs`.
    geometry: static sizes.
  """
  g = geometry
  slot = g.choice.low(tiles.choices)
  pack, slot = slot // g.pack_slots, slot % g.pack_slots
  here = slot[:, None] == jnp.arange(g.pack_slots)[None, :, None]
  merges = []
  for half in range(2):
    place = pack * g.pack - half * g.half  # of the pack's first bit in the half
    mask = jnp.int32((1 << g.pack) - 1) << jnp.clip(place, 0, mosaic.WORD - 1)
    bits = tiles.chosen_by[:, half] & mask
    bits = jnp.where(is_pair & (place >= 0) & (place < g.half), bits, 0)
    merges.append(
      jnp.sum(jnp.where(here, bits[:, None], 0), axis=-1, dtype=jnp.int32)
    )
  return jnp.stack(merges, axis=1)


def plan_pairs(
  choices: Int[Array, "chunks tiles slots"],
  is_pair: Bool[Array, "chunks tiles slots"],
  geometry: Geometry,
) -> PairPlan:
  """Sorts the pairs of some chunks by block and cuts them into tasks.

  Args:
    choices: `SortedChoices.choices` of the chunks' tiles.
    is_pair: of `find_pairs`, of the same tiles.
    geometry: static sizes.
  """
  g = geometry
  num_chunks, chunk_tiles, slots = choices.shape
  num_segments = num_chunks * g.num_spans * g.num_blocks
  tile = jnp.arange(chunk_tiles, dtype=jnp.int32)[None, :, None]
  span = tile * g.tile // g.span
  chunk = jnp.arange(num_chunks, dtype=jnp.int32)[:, None, None]
  span = span + chunk * g.num_spans
  segment = jnp.where(
    is_pair, span * g.num_blocks + g.choice.high(choices), num_segments
  )
  slot = tile * slots + g.choice.low(choices)
  segment, order = lax.sort(
    (
      segment.reshape(-1).astype(jnp.uint32),
      slot.reshape(-1).astype(jnp.uint32),
    ),
    num_keys=1,
    is_stable=False,
  )
  bounds = mosaic.counts_below(
    segment, jnp.arange(num_segments + 1, dtype=jnp.uint32)
  )
  counts = bounds[1:] - bounds[:-1]
  task_counts = -(-counts // g.task)
  ends = mosaic.sums_up_to(task_counts)
  # A chunk's tasks end with those of its last segment.
  chunk_end = ends.reshape(num_chunks, -1)[:, -1]
  chunk_first = jnp.pad(chunk_end[:-1], (1, 0))
  task = jnp.arange(num_chunks * g.max_tasks, dtype=jnp.int32)
  segment_of = mosaic.counts_up_to(ends, task.size)
  segment_of = jnp.minimum(segment_of, num_segments - 1)
  # The tasks of one block have equal sizes, up to a tile's number of pairs.
  size = -(-counts // jnp.maximum(task_counts, 1))
  size = (-(-size // g.tile_packs) * g.tile_packs)[segment_of]
  start = bounds[segment_of]
  start += (task - (ends - task_counts)[segment_of]) * size
  start = jnp.minimum(start, bounds[segment_of + 1])
  count = jnp.minimum(size, bounds[segment_of + 1] - start)
  return PairPlan(
    chunks=jnp.stack([chunk_first, chunk_end - chunk_first], axis=-1),
    tasks=jnp.stack(
      [segment_of % g.num_blocks, start, count, jnp.zeros_like(count)], axis=-1
    ),
    order=order.astype(jnp.int32),
  )
