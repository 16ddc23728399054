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
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int, Shaped

from pallas_kernels import mosaic

SHARED_ID_SHIFT = 16  # of a shared entry: block id above, query bits below
PLACE_BITS = 9  # of a choice: block id above, place in its tile below
NEVER = jnp.iinfo(jnp.int32).max


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
      (query * P + p) of every choice that counts, then `NEVER`.
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
      finite, `NEVER` without one.
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
    NEVER,
  )
  choices = lax.sort(choices, dimension=1, is_stable=False)
  valid = choices != NEVER
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
  entry = jnp.where(listed, (block << SHARED_ID_SHIFT) | wanted, NEVER)
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


class OwnerPlan(NamedTuple):
  """Who computes the gradients of which keys, for one chunk of queries.

  Keys come in owner blocks of `OWNER_BLOCK` tokens, a group's after those of
  the group before it; groups are KV heads of one batch row or of several.
  Several chosen blocks of one query inside an owner block are one edge.

  Attributes:
    tasks: int32 [max_tasks, 5]: owner block, first edge, number of edges, how
      many of them (the first ones) are of queries inside the block, and the
      slot that takes the sum: the block's own for its first task, one after the
      blocks' slots for the others.
    num_tasks: int32 [1].
    turns: int32 [max_tasks]: the tasks, from the longest to the shortest.
    extra: int32 [blocks, 2]: first extra slot of a block and their number.
    order: int32 [edges]: place in the chunk ((group * queries + query) * P + p)
      above 2 bits, which say what halves of the owner block were chosen. By
      block, then query.
    is_edge: bool [groups, queries, P]: whether this choice is its edge's place.
  """

  tasks: Int[Array, "tasks 5"]
  num_tasks: Int[Array, "1"]
  turns: Int[Array, "tasks"]
  extra: Int[Array, "blocks 2"]
  order: Int[Array, "edges"]
  is_edge: Bool[Array, "groups queries P"]


OWNER_BLOCK = 128


def owners_fit(num_owners: int, num_edges: int) -> bool:
  """Whether `plan_owners` can sort so many edges of so many blocks.

  A sort key of 32 bits holds both; of `OwnerPlan.order`, two bits and the sign
  are taken.
  """
  place_bits = (num_edges - 1).bit_length()
  return place_bits <= 29 and num_owners.bit_length() + place_bits <= 32


class OwnerSplit(NamedTuple):
  """How groups and their queries divide into launches over owner blocks.

  A group is a KV head of a batch row: row * K + head. A launch takes whole rows
  or KV heads of one row. So it is a rectangle of every array, and the sum over
  a row's KV heads is of one launch, or of launches that hold nothing else.

  Attributes:
    rows: batch rows of a launch.
    heads: KV heads of each; all of them if there are several rows.
    num_chunks: chunks of a launch's queries, each with a plan of its own.
    chunk: queries of a chunk.
  """

  rows: int
  heads: int
  num_chunks: int
  chunk: int

  @property
  def groups(self) -> int:
    return self.rows * self.heads

  def cut(
    self, x: Shaped[Array, "B K T X"], first_group: Any, first_query: Any
  ) -> Shaped[Array, "groups chunk X"]:
    """The part of a launch and chunk that start there."""
    x = x.reshape(-1, *x.shape[2:])
    sizes = (self.groups, self.chunk, x.shape[-1])
    return lax.dynamic_slice(x, (first_group, first_query, 0), sizes)

  def token_major(
    self, x: Shaped[Array, "groups chunk *X"]
  ) -> Shaped[Array, "rows chunk heads *X"]:
    """What a chunk gave, as arrays of all rows and queries have it."""
    return x.reshape(self.rows, self.heads, *x.shape[1:]).swapaxes(1, 2)


def divisors(x: int) -> list[int]:
  return [n for n in range(1, x + 1) if x % n == 0]


def largest_divisor(x: int, most: int) -> int:
  """Of x, at most `most`; 1 if that is less."""
  return max([n for n in divisors(x) if n <= most], default=1)


def split_owners(
  batch: int, q_len: int, num_kv_heads: int, num_owners: int, top_k: int, *,
  max_edges: int, chunk: int = 0,
) -> OwnerSplit:  # fmt: skip
  """As many groups a launch as fit with all their queries, else one in chunks.

  Launches are equal: of rows as many as divide the batch, so one of 17.

  Args:
    batch: B.
    q_len: T.
    num_kv_heads: K.
    num_owners: owner blocks of a group.
    top_k: P.
    max_edges: most edges of a launch, which takes one query's at least.
    chunk: most queries of a chunk; 0 lets the edges decide.
  """
  most = max(max_edges, top_k)

  def fits(groups: int, queries: int) -> bool:
    edges, owners = groups * queries * top_k, groups * num_owners
    # Every block has a sum, however few the edges: so no more blocks together
    # than one group may have alone.
    few = owners <= mosaic.MAX_BLOCKS
    return edges <= most and few and owners_fit(owners, edges)

  candidates = [(1, heads) for heads in divisors(num_kv_heads)]
  candidates += [(rows, num_kv_heads) for rows in divisors(batch)]
  rows, heads = max(
    (x for x in candidates if fits(x[0] * x[1], q_len)), default=(1, 1)
  )
  num_chunks = -(-q_len // chunk) if chunk else 1
  while not fits(rows * heads, -(-q_len // num_chunks)):
    num_chunks += 1
  return OwnerSplit(rows, heads, num_chunks, -(-q_len // num_chunks))


def owner_task(num_edges: int, task: int) -> int:
  """Most edges of a task, from a config's `task`: 0 lets the edges decide."""
  if not task:
    # About four tasks a CTA, and some short ones to even out the ends.
    task = min(max(num_edges // (4 * mosaic.NUM_SMS), 128), 2048)
  return -(-task // 8) * 8


def num_turns(cta, num_tasks, num_ctas: int):
  """How many tasks a CTA of a persistent grid works on."""
  rounds = lax.div(num_tasks, num_ctas)
  return rounds + (turn(cta, rounds, num_ctas) < num_tasks).astype(jnp.int32)


def turn(cta, i, num_ctas: int):
  """Place in `OwnerPlan.turns` of a CTA's i-th task.

  Rounds go back and forth: who gets the longest task of one gets the shortest
  of the next.
  """
  back = lax.rem(i, 2) == 1
  return i * num_ctas + jnp.where(back, num_ctas - 1 - cta, cta)


def max_owner_tasks(num_owners: int, num_edges: int, task: int) -> int:
  return num_owners + num_edges // task


def plan_owners(
  ids: Int[Array, "groups queries P"],
  starts: Int[Array, "groups"],
  *,
  block_size: int,
  num_blocks: int,
  task: int,
) -> OwnerPlan:
  """Sorts the choices of a chunk by owner block and cuts them into tasks.

  Args:
    ids: blocks that each group chose, any order, anything outside 0 .. own
      block is dropped.
    starts: key slot of each group's first query, the others follow one after
      the other; queries in negative slots see nothing.
    block_size: tokens of a block, OWNER_BLOCK or half of it.
    num_blocks: N.
    task: most edges of a task, a multiple of 8.
  """
  num_groups, num_queries, top_k = ids.shape
  num_edges = ids.size
  each = OWNER_BLOCK // block_size
  group_owners = -(-num_blocks // each)
  num_owners = num_groups * group_owners
  place_bits = (num_edges - 1).bit_length()
  if not owners_fit(num_owners, num_edges):
    raise ValueError(
      f"{num_groups * num_queries} queries of {top_k} choices among"
      f" {num_owners} owner blocks do not fit a sort key of 32 bits"
    )
  positions = starts[:, None] + jnp.arange(num_queries, dtype=jnp.int32)
  own = jnp.where(positions < 0, -1, positions // block_size)[..., None]
  is_edge = (ids >= 0) & (ids <= own) & (ids < num_blocks)
  owner = jnp.clip(ids, 0, num_blocks - 1) // each
  group = jnp.arange(num_groups)[:, None]
  halves = jnp.full_like(ids, 3)
  if each == 2:
    same = owner[..., :, None] == owner[..., None, :]
    same &= is_edge[..., None, :]
    halves = jnp.stack(
      [
        jnp.any(same & ((ids & 1) == half)[..., None, :], axis=-1)
        for half in range(2)
      ],
      axis=-1,
    )
    halves = halves[..., 0] + 2 * halves[..., 1].astype(jnp.int32)
    earlier = jnp.tril(jnp.ones((top_k, top_k), bool), -1)
    is_edge &= ~jnp.any(same & earlier, axis=-1)
  owner += group[..., None] * group_owners
  place = jnp.arange(num_edges, dtype=jnp.uint32).reshape(ids.shape)
  unused = jnp.uint32(0xFFFFFFFF)
  key = jnp.where(
    is_edge, (owner.astype(jnp.uint32) << place_bits) | place, unused
  )
  key = lax.sort(key.reshape(-1), is_stable=False)
  lists = jnp.arange(num_owners + 1, dtype=jnp.uint32) << place_bits
  # The first place of a block's list whose query stands after the block.
  after = (jnp.arange(group_owners) + 1) * OWNER_BLOCK - starts[:, None]
  after = group * num_queries + jnp.clip(after, 0, num_queries)
  after = after.reshape(-1).astype(jnp.uint32) * top_k
  bounds, inside = jnp.split(
    jnp.searchsorted(
      key,
      jnp.concatenate([lists, lists[:-1] + after]),
      method="scan_unrolled",
    ).astype(jnp.int32),
    [num_owners + 1],
  )
  place = (key & ((1 << place_bits) - 1)).astype(jnp.int32)
  order = (place << 2) | halves.reshape(-1)[place]

  counts = bounds[1:] - bounds[:-1]
  pieces = -(-counts // task)
  ends = jnp.cumsum(pieces)
  index = jnp.arange(max_owner_tasks(num_owners, num_edges, task))
  block = jnp.searchsorted(ends, index, side="right", method="scan_unrolled")
  block = jnp.minimum(block.astype(jnp.int32), num_owners - 1)
  piece = index - (ends - pieces)[block]
  # As long as may be, and a block's rest: `turns` levels what CTAs get with
  # tasks of many lengths better than with equal ones.
  start = jnp.minimum(bounds[block] + piece * task, bounds[block + 1])
  count = jnp.clip(bounds[block + 1] - start, 0, task)
  inside = jnp.clip(inside[block] - start, 0, count)
  # Those inside need masks, which takes about as long again.
  turns = jnp.argsort(-(count + inside))
  more = jnp.maximum(pieces - 1, 0)
  first_extra = num_owners + jnp.cumsum(more) - more
  slot = jnp.where(piece == 0, block, first_extra[block] + piece - 1)
  return OwnerPlan(
    tasks=jnp.stack([block, start, count, inside, slot], axis=-1).astype(
      jnp.int32
    ),
    num_tasks=ends[-1:].astype(jnp.int32),
    turns=turns.astype(jnp.int32),
    extra=jnp.stack([first_extra, more], axis=-1).astype(jnp.int32),
    order=order,
    is_edge=is_edge,
  )
