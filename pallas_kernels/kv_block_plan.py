"""block_indices -> what the backward and the KL kernels do, planned on the
device."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int, Shaped

from pallas_kernels import mosaic


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

  candidates = [(1, heads) for heads in mosaic.divisors(num_kv_heads)]
  candidates += [(rows, num_kv_heads) for rows in mosaic.divisors(batch)]
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
