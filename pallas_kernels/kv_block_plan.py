"""Plans the kernels that own keys: sparse attention's backward and the KL.

Those kernels go over the chosen blocks the other way round. A CTA owns one *KV
block* of 128 keys: it keeps the keys' gradients in registers and gathers the
queries that chose the block. The forward records for each query which blocks it
chose; a plan here records for each KV block which queries chose it. It lists
the **(query, KV block) pairs** by block and cuts each block's list into
*tasks*, the work of one CTA between two loads of keys. The lists come from a
table of all blocks where they are few, which takes less time, and else from a
sort. They differ only in the slots that the pairs of a pack have.

`sparse_attention_bwd` and `index_kl` use it as follows:

* `split_launches` chooses, from sizes alone, how many groups (KV heads of batch
  rows) and queries one launch takes, so that its pairs fit the workspace;
* `plan_kv_blocks` makes a launch's plan from its chosen blocks, on the device;
* in the kernel, a CTA goes through its tasks with `num_tasks_of_cta` and
  `nth_task`, longest tasks first.

The first task of a block writes the block's own sum of gradients, or adds to it
if queries come in several chunks. If a block has more tasks, each of them
writes a sum of its own, and a second kernel adds these in a fixed order: no
atomics, so repeated runs give equal bits.

All shapes are static (`max_tasks` bounds the number of tasks) and everything
runs inside jit without a host sync. Ids that name no block, or a block beyond
the query's own, are dropped before anything is counted.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

from pallas_kernels import mosaic, packed_rows

KV_BLOCK = 128  # keys of a KV block

# A plan makes a table of all blocks if they are at most so many times as many
# as the choices of a query: then it has no more words than there are choices.
TABLE_BLOCKS = mosaic.WORD


class KVBlockPlan(NamedTuple):
  """The pairs of one launch and chunk of queries, by KV block.

  KV blocks of `KV_BLOCK` keys are numbered over all groups of the launch, those
  of one group after those of the group before it. All choices that the queries
  of a pack made inside one KV block are one pair.

  Attributes:
    tasks: int32 [max_tasks, 5]: KV block, first pair, number of pairs, how many
      of them (they come first) have their query inside the block and need the
      causal mask, and the slot of the sum that the task adds to or writes. A
      block's first task has the block's number as its slot; the other tasks
      have slots after those of all blocks.
    num_tasks: int32 [1].
    longest_first: int32 [max_tasks]: the tasks, from the longest to the
      shortest.
    extra: int32 [blocks, 2]: each block's first slot of the tasks after its
      first one, and their number.
    order: int32 [pairs]: each pair's slot in the chunk: (group * packs + pack)
      * slots + slot of the pack. Sorted by block, then pack.
    chosen: int32 [pairs], or None if every pair is one query that chose the
      whole KV block: which halves of the KV block each query of the pack chose
      (`pack_chosen`).
    is_pair: bool [groups, packs, slots]: which slots of a pack hold a pair; the
      pairs of a pack come first, unless `chosen` is None.
    reach: int32 [pairs], of packed rows only: how many keys of the KV block lie
      up to each query of the pack (`pack_counts`).
    has_pairs: bool [blocks]: which blocks have any, and so a sum.
  """

  tasks: Int[Array, "tasks 5"]
  num_tasks: Int[Array, "1"]
  longest_first: Int[Array, "tasks"]
  extra: Int[Array, "blocks 2"]
  order: Int[Array, "pairs"]
  chosen: Int[Array, "pairs"] | None
  is_pair: Bool[Array, "groups packs slots"]
  reach: Int[Array, "pairs"] | None
  has_pairs: Bool[Array, "blocks"]


class QueryPlaces(NamedTuple):
  """Where the queries of a chunk stand in packed rows.

  Attributes:
    positions: of each query of each group among the keys; -1 for a query that
      sees nothing.
    unmasked_from: the first query of the chunk from which on no query needs a
      mask in a KV block.
  """

  positions: Int[Array, "groups queries"]
  unmasked_from: Int[Array, "groups kv_blocks"]


def query_places(
  packed: packed_rows.PackedRows,
  batch_row: Int[Array, "groups"],
  first_query: Any,
  queries: int,
  num_kv_blocks: int,
  block_keys: int = KV_BLOCK,
) -> QueryPlaces:
  """The places of a chunk's queries.

  Args:
    packed: places of all batch rows.
    batch_row: of each group of the launch.
    first_query: of the chunk.
    queries: of the chunk; those behind the row see nothing.
    num_kv_blocks: KV blocks of a group.
    block_keys: keys of a KV block.
  """
  slot = first_query + jnp.arange(queries, dtype=jnp.int32)
  positions = packed.positions.at[batch_row[:, None], slot[None]].get(
    mode="fill", fill_value=-1
  )
  unmasked_from = packed.unmasked_from(num_kv_blocks, block_keys)
  return QueryPlaces(positions, unmasked_from[batch_row] - first_query)


# ---- Numbers that share an integer, each with its writer and its readers ----


def sort_key(num_pairs: int) -> mosaic.SortKey:
  """The key of so many pairs, unsigned: KV block, then the pair's slot."""
  return mosaic.SortKey((num_pairs - 1).bit_length())


def sort_key_fits(num_kv_blocks: int, num_pairs: int) -> bool:
  """Whether `plan_kv_blocks` can sort so many pairs of so many KV blocks.

  A sort key has 32 bits.
  """
  slot_bits = sort_key(num_pairs).low_bits
  return slot_bits <= 31 and num_kv_blocks.bit_length() + slot_bits <= 32


def pack_chosen(query: Any, halves: Any) -> Any:
  """What a query of a pack chose of a KV block, as a part of `chosen`.

  Bits: 2 * query for the first half of the KV block, 2 * query + 1 for the
  second one. The or of all queries' parts is what the pack chose. A KV block
  that is one block has both bits or none.

  Args:
    query: of the pack.
    halves: 2 bits, the lower one of the first half.
  """
  return halves << (2 * query)


def chose_half(chosen: Any, query: Any, half: Any) -> Any:
  """Whether a query of the pack chose this half of the KV block."""
  return ((chosen >> (2 * query + half)) & 1) == 1


def chose_any(chosen: Any, query: Any) -> Any:
  """Whether a query of the pack chose any half of the KV block."""
  return ((chosen >> (2 * query)) & 3) != 0


def pack_counts(counts: Sequence[Any]) -> Any:
  """Up to four numbers of keys, each 0 to KV_BLOCK, in one int32.

  Bits: 8 for each number, the first one lowest. `KVBlockPlan.reach` has a
  number for each query of a pack, and the KL one for each half of a KV block.
  """
  packed = 0
  for i, count in enumerate(counts):
    packed |= count << (8 * i)
  return packed


def count_of(packed: Any, i: Any) -> Any:
  """The i-th number of `pack_counts`."""
  return (packed >> (8 * i)) & 255


# ---- Launches and tasks ----


class LaunchSplit(NamedTuple):
  """How groups and their queries are divided into launches and chunks.

  A group is a KV head of a batch row: batch row * K + KV head. A launch takes
  either whole batch rows or some KV heads of one batch row, so it is a
  rectangle of every array. A gradient that is summed over the KV heads of a
  batch row (dindex_k) therefore comes from one launch, or from launches that
  belong to that batch row alone.

  Attributes:
    batch_rows: batch rows of a launch.
    kv_heads: KV heads of each; all of them if there are several batch rows.
    num_chunks: chunks of a launch's queries, each with a plan of its own.
    chunk: queries of a chunk.
  """

  batch_rows: int
  kv_heads: int
  num_chunks: int
  chunk: int

  @property
  def groups(self) -> int:
    return self.batch_rows * self.kv_heads

  def cut(
    self, x: Shaped[Array, "B K T X"], first_group: Any, first_query: Any
  ) -> Shaped[Array, "groups chunk X"]:
    """The part of x that belongs to the launch and chunk that start there."""
    x = x.reshape(-1, *x.shape[2:])
    sizes = (self.groups, self.chunk, x.shape[-1])
    return lax.dynamic_slice(x, (first_group, first_query, 0), sizes)

  def token_major(
    self, x: Shaped[Array, "groups chunk *X"]
  ) -> Shaped[Array, "batch_rows chunk kv_heads *X"]:
    """A chunk's results in the axis order of the arrays that hold all."""
    x = x.reshape(self.batch_rows, self.kv_heads, *x.shape[1:])
    return x.swapaxes(1, 2)


def split_launches(
  batch: int, q_len: int, num_kv_heads: int, num_kv_blocks: int, top_k: int, *,
  max_pairs: int, chunk: int = 0,
) -> LaunchSplit:  # fmt: skip
  """The largest launches that fit `max_pairs`.

  A launch takes as many groups as fit with all their queries. If not even one
  group fits, it takes one group in several chunks of queries. All launches have
  the same size: the number of batch rows divides the batch, so of 17 batch rows
  each launch takes one (or all).

  Args:
    batch: B.
    q_len: T.
    num_kv_heads: K.
    num_kv_blocks: KV blocks of a group.
    top_k: P.
    max_pairs: upper bound on the pairs of a launch; it takes at least one
      query's.
    chunk: upper bound on the queries of a chunk; 0 leaves it to `max_pairs`.
  """
  most = max(max_pairs, top_k)

  def fits(groups: int, queries: int) -> bool:
    pairs, kv_blocks = groups * queries * top_k, groups * num_kv_blocks
    # Each KV block has a sum in memory, however few pairs it has. So a launch
    # may not have more blocks than a single group may.
    few = kv_blocks <= max(mosaic.MAX_BLOCKS, num_kv_blocks)
    return pairs <= most and few and sort_key_fits(kv_blocks, pairs)

  candidates = [(1, heads) for heads in mosaic.divisors(num_kv_heads)]
  candidates += [(rows, num_kv_heads) for rows in mosaic.divisors(batch)]
  batch_rows, kv_heads = max(
    (x for x in candidates if fits(x[0] * x[1], q_len)), default=(1, 1)
  )
  num_chunks = -(-q_len // chunk) if chunk else 1
  while not fits(batch_rows * kv_heads, -(-q_len // num_chunks)):
    num_chunks += 1
  return LaunchSplit(batch_rows, kv_heads, num_chunks, -(-q_len // num_chunks))


def task_size(num_pairs: int, task: int) -> int:
  """Upper bound on a task's pairs, from a config's `task`.

  A `task` of 0 derives it from the number of pairs.
  """
  if not task:
    # About four tasks for each CTA, some of them short to even out the load.
    task = min(max(num_pairs // (4 * mosaic.NUM_SMS), 128), 2048)
  return -(-task // 8) * 8


def num_tasks_of_cta(cta, num_tasks, num_ctas: int):
  """How many tasks a CTA of a persistent grid computes."""
  rounds = lax.div(num_tasks, num_ctas)
  one_more = nth_task(cta, rounds, num_ctas) < num_tasks
  return rounds + one_more.astype(jnp.int32)


def nth_task(cta, i, num_ctas: int):
  """Index into `KVBlockPlan.longest_first` of the i-th task of a CTA.

  The direction alternates from round to round: the CTA that gets the longest
  task of one round gets the shortest of the next, which balances their sums.
  """
  back = lax.rem(i, 2) == 1
  return i * num_ctas + jnp.where(back, num_ctas - 1 - cta, cta)


def max_tasks(num_kv_blocks: int, num_pairs: int, task: int) -> int:
  """Upper bound on the tasks of a plan."""
  return num_kv_blocks + num_pairs // task


def plan_kv_blocks(
  ids: Int[Array, "groups packs slots"],
  starts: Int[Array, "groups"],
  *,
  block_size: int,
  num_blocks: int,
  task: int,
  pack: int = 1,
  places: QueryPlaces | None = None,
  block_keys: int = KV_BLOCK,
) -> KVBlockPlan:
  """Lists the choices of a chunk by KV block and cuts the lists into tasks.

  Args:
    ids: the blocks that the queries of each pack of each group chose, in any
      order, the P of a query after those of the query before it, each once; ids
      outside 0 .. own block are dropped.
    starts: position of each group's first query among the keys; the other
      queries follow. A query at a negative position sees nothing. Not used
      with `places`.
    block_size: tokens of a chosen block, `block_keys` or half of it.
    num_blocks: N.
    task: upper bound on the pairs of a task, a multiple of 8.
    pack: queries of a pack.
    places: of the queries of packed rows. The ids must be of blocks that the
      queries see.
    block_keys: keys of a KV block.
  """
  num_groups, num_packs, slots = ids.shape
  num_pairs = ids.size
  group_kv_blocks = -(-num_blocks * block_size // block_keys)
  num_kv_blocks = num_groups * group_kv_blocks
  if not sort_key_fits(num_kv_blocks, num_pairs):
    raise ValueError(
      f"{num_groups * num_packs} packs of {slots} choices among"
      f" {num_kv_blocks} KV blocks do not fit a sort key of 32 bits"
    )
  if places is None:
    query = jnp.arange(num_packs * pack, dtype=jnp.int32)[None]
    positions = query + starts[:, None]
  else:
    positions = places.positions
  # The first pack whose queries all stand behind a block's last key: they need
  # no causal mask.
  if places is None:
    after = (jnp.arange(group_kv_blocks) + 1)[None] * block_keys
    after -= starts[:, None]
  else:
    after = places.unmasked_from
  after = jnp.clip(-(-after // pack), 0, num_packs).astype(jnp.int32)
  by_table = num_blocks <= TABLE_BLOCKS * (slots // pack)
  lists = (_lists_by_table if by_table else _lists_by_sort)(
    ids,
    _valid(ids, positions, block_size, num_blocks),
    after,
    num_blocks=num_blocks,
    pack=pack,
    each=block_keys // block_size,
  )
  order, bounds, inside = lists.order, lists.bounds, lists.inside
  reach = None
  if places is not None:
    block = mosaic.counts_up_to(bounds[1:], num_pairs) % group_kv_blocks
    queries = positions.reshape(-1, pack)[order // slots]
    reach = queries + 1 - block[:, None] * block_keys
    reach = jnp.clip(reach, 0, block_keys)
    reach = pack_counts([reach[:, i] for i in range(pack)])

  counts = bounds[1:] - bounds[:-1]
  task_counts = -(-counts // task)
  more = jnp.maximum(task_counts - 1, 0)
  ends, more_ends = mosaic.sums_up_to(jnp.stack([task_counts, more]))
  index = jnp.arange(max_tasks(num_kv_blocks, num_pairs, task))
  block = mosaic.counts_up_to(ends, index.size)
  block = jnp.minimum(block, num_kv_blocks - 1)
  nth = index - (ends - task_counts)[block]
  # Tasks have full length except each block's last one. `longest_first` then
  # balances CTAs better than it could with tasks of equal lengths.
  start = jnp.minimum(bounds[block] + nth * task, bounds[block + 1])
  count = jnp.clip(bounds[block + 1] - start, 0, task)
  inside = jnp.clip(inside[block] - start, 0, count)
  # A pair inside the block needs a mask and takes about twice as long.
  longest_first = jnp.argsort(-(count + inside))
  first_extra = num_kv_blocks + more_ends - more
  sum_slot = jnp.where(nth == 0, block, first_extra[block] + nth - 1)
  return KVBlockPlan(
    tasks=jnp.stack([block, start, count, inside, sum_slot], axis=-1).astype(
      jnp.int32
    ),
    num_tasks=ends[-1:].astype(jnp.int32),
    longest_first=longest_first.astype(jnp.int32),
    extra=jnp.stack([first_extra, more], axis=-1).astype(jnp.int32),
    order=order,
    chosen=lists.chosen,
    is_pair=lists.is_pair,
    reach=reach,
    has_pairs=counts > 0,
  )


def new_sums(
  shape: tuple[int, int, int, int], num_own: int, adds: bool
) -> Float[Array, "kinds slots keys D"]:
  """Memory of a launch's sums of gradients.

  Args:
    shape: kinds of sums, sum slots, keys of a KV block, D.
    num_own: the first slots, which are the KV blocks' own.
    adds: whether a block's first task adds to what its own slot holds, in each
      chunk of queries, instead of writing it.
  """
  sums = lax.empty(shape, jnp.float32)
  return sums.at[:, :num_own].set(0.0) if adds else sums


def own_sums(
  sums: Float[Array, "kinds slots keys D"], has_sum: Bool[Array, "blocks"]
) -> Float[Array, "kinds blocks keys D"]:
  """The sums of the KV blocks, zero where no query chose the block.

  The sum of such a block may never have been written.

  Args:
    sums: of `new_sums`, after all chunks.
    has_sum: `KVBlockPlan.has_pairs` of any chunk.
  """
  own = sums[:, : has_sum.size]
  return jnp.where(has_sum[:, None, None], own, 0)


# ---- The list of each KV block ----


class _Lists(NamedTuple):
  """The pairs of every KV block, one block's after those of the block before.

  Attributes:
    order, chosen, is_pair: as in `KVBlockPlan`.
    bounds: int32 [blocks + 1]: where the list of each block begins.
    inside: int32 [blocks]: the pair from which on those of the block need no
      mask.
  """

  order: Int[Array, "pairs"]
  chosen: Int[Array, "pairs"] | None
  is_pair: Bool[Array, "groups packs slots"]
  bounds: Int[Array, "bounds"]
  inside: Int[Array, "blocks"]


def _valid(
  ids: Int[Array, "groups packs slots"],
  positions: Int[Array, "groups queries"],
  block_size: int,
  num_blocks: int,
) -> Bool[Array, "groups packs slots"]:
  """Which choices name a block up to the query's own, and the first time.

  Callers give each block once. If they do not, one of equal choices counts: in
  a table they have one bit, and two could not both be the pair that it counts.
  """
  of_query = ids.reshape(*positions.shape, -1)
  own = jnp.where(positions < 0, -1, positions // block_size)[..., None]
  known = (of_query >= 0) & (of_query <= own) & (of_query < num_blocks)
  return (known & ~_repeats(of_query)).reshape(ids.shape)


def _repeats(ids: Int[Array, "groups queries P"]):
  """Which choices of a query name the same block as one before."""
  found = jnp.zeros(ids.shape, bool)
  for i in range(1, ids.shape[-1]):
    ahead = ((0, 0), (0, 0), (i, 0))
    found |= jnp.pad(ids[..., :-i], ahead, constant_values=-1) == ids
  return found


def _lists_by_table(
  ids: Int[Array, "groups packs slots"],
  valid: Bool[Array, "groups packs slots"],
  after: Int[Array, "groups kv_blocks"],
  *,
  num_blocks: int,
  pack: int,
  each: int,
) -> _Lists:
  """The lists from a table of all blocks, without a sort.

  The table says for each block, as bits of words, which queries chose it. A
  pair's place in its block's list is the number of bits before its own: those
  of the words before, which are summed up once, and those of its word.

  Args:
    ids, num_blocks, pack: as in `plan_kv_blocks`.
    valid: which of the ids count, `_valid`.
    after: the first pack that needs no mask in each KV block.
    each: blocks of a KV block.
  """
  num_groups, num_packs, slots = ids.shape
  num_pairs, num_queries = ids.size, num_packs * pack
  shape = (num_groups, num_queries, slots // pack)
  ids, valid = ids.reshape(shape), valid.reshape(shape)
  group_kv_blocks = -(-num_blocks // each)
  table = _table(jnp.where(valid, ids, -1), each * group_kv_blocks)
  words = table.shape[1]
  halves = [table[..., half::each] for half in range(each)]
  paired = mosaic.first_of_packs(functools.reduce(jnp.bitwise_or, halves), pack)

  # Where the pairs of each word begin.
  counts = lax.population_count(paired)
  ends = jnp.cumsum(
    jnp.sum(counts, axis=1, dtype=jnp.int32).reshape(-1), dtype=jnp.int32
  )
  bounds = jnp.pad(ends, (1, 0))
  begins = jnp.cumsum(counts, axis=1, dtype=jnp.int32) - counts
  begins += bounds[:-1].reshape(num_groups, 1, -1)

  def place_in_list(group, word, kv_block, place):
    """Where a pair stands, or would, whose bit has this place in its word."""
    at = (group * words + word) * group_kv_blocks + kv_block
    below = jnp.where(place == mosaic.WORD, -1, (jnp.int32(1) << place) - 1)
    below &= paired.reshape(-1)[at]
    return at, begins.reshape(-1)[at] + lax.population_count(below)

  groups = jnp.arange(num_groups, dtype=jnp.int32)
  first = after * pack
  word = jnp.minimum(first // mosaic.WORD, words - 1)
  _, inside = place_in_list(
    groups[:, None],
    word,
    jnp.arange(group_kv_blocks, dtype=jnp.int32)[None],
    first - word * mosaic.WORD,
  )

  query = jnp.arange(num_queries, dtype=jnp.int32)[None, :, None]
  known = jnp.clip(ids, 0, num_blocks - 1)
  of_pack = query % mosaic.WORD // pack * pack  # the bit of its first query
  at, target = place_in_list(
    groups[:, None, None], query // mosaic.WORD, known // each, of_pack
  )
  chosen, stands, is_pair = None, valid, valid
  slot = jnp.arange(num_pairs, dtype=jnp.int32).reshape(shape)
  if not pack == each == 1:
    # The choices of a pack inside a KV block are one pair. It stands where the
    # first of them would, and the pairs of a pack come first.
    chosen = _chosen_by_pack([x.reshape(-1)[at] for x in halves], of_pack, pack)
    mine = 2 * (query % pack) + known % each
    stands = valid & (chosen & ((jnp.int32(1) << mine) - 1) == 0)
    of_slot = stands.reshape(num_groups, num_packs, slots)
    nth = mosaic.counts_before(of_slot).reshape(shape)
    slot = slot // slots * slots + nth
    count = jnp.sum(of_slot, axis=-1, dtype=jnp.int32, keepdims=True)
    is_pair = mosaic.lined_up(jnp.arange(slots), 3) < count
  target = jnp.where(stands, target, num_pairs).reshape(-1)

  def listed(x):
    x = x.reshape(-1)
    # Zeros, as x is not negative, but not those of another list: of these XLA
    # would make a copy.
    zeros = jnp.minimum(x, 0)
    return zeros.at[target].set(x, mode="drop", unique_indices=True)

  return _Lists(
    order=listed(slot),
    chosen=None if chosen is None else listed(chosen),
    is_pair=is_pair.reshape(num_groups, num_packs, slots),
    bounds=bounds,
    inside=inside.reshape(-1),
  )


def _table(
  ids: Int[Array, "groups queries P"], num_blocks: int
) -> Int[Array, "groups words N"]:
  """For each block, which queries chose it: bit query % 32 of query // 32.

  Args:
    ids: -1 is no block.
    num_blocks: N.
  """
  behind = -ids.shape[1] % mosaic.WORD
  if behind:
    ids = jnp.pad(ids, ((0, 0), (0, behind), (0, 0)), constant_values=-1)
  bits = mosaic.choice_bits(ids, num_blocks)
  bits = bits.reshape(len(ids), -1, mosaic.WORD, bits.shape[-1])
  return mosaic.query_bits(bits, num_blocks)


def _chosen_by_pack(
  halves: Sequence[Int[Array, "*A"]], first: Array, pack: int
) -> Int[Array, "*A"]:
  """`KVBlockPlan.chosen` of packs.

  Args:
    halves: for each block of a KV block, one or two, the word of query bits.
    first: the bit of the pack's first query.
    pack: queries of a pack.
  """
  chosen = jnp.zeros_like(halves[0])
  for query in range(pack):
    of_query = [bits >> (first + query) & 1 for bits in halves]
    both = of_query[0] | of_query[-1] << 1
    chosen |= pack_chosen(query, both)
  return chosen


def _lists_by_sort(
  ids: Int[Array, "groups packs slots"],
  valid: Bool[Array, "groups packs slots"],
  after: Int[Array, "groups kv_blocks"],
  *,
  num_blocks: int,
  pack: int,
  each: int,
) -> _Lists:
  """The lists of `_lists_by_table` by sorting all pairs.

  Args:
    ids, valid, after, num_blocks, pack, each: as there.
  """
  num_groups, num_packs, slots = ids.shape
  num_pairs = ids.size
  kv_block, is_pair, chosen = _pairs_of_packs(
    ids, valid, num_blocks=num_blocks, pack=pack, each=each
  )
  group_kv_blocks = -(-num_blocks // each)
  num_kv_blocks = num_groups * group_kv_blocks
  group = jnp.arange(num_groups)[:, None]
  kv_block += group[..., None] * group_kv_blocks
  slot = jnp.arange(num_pairs, dtype=jnp.uint32).reshape(ids.shape)
  unused = jnp.uint32(0xFFFFFFFF)
  of_pair = sort_key(num_pairs)
  key = jnp.where(
    is_pair, of_pair.pack(kv_block.astype(jnp.uint32), slot), unused
  )
  key = lax.sort(key.reshape(-1), is_stable=False)
  lists = of_pair.least(jnp.arange(num_kv_blocks + 1, dtype=jnp.uint32))
  # The first slot of each block's list whose pack needs no mask.
  after = (group * num_packs + after).reshape(-1).astype(jnp.uint32) * slots
  bounds, inside = jnp.split(
    mosaic.counts_below(key, jnp.concatenate([lists, lists[:-1] + after])),
    [num_kv_blocks + 1],
  )
  order = of_pair.low(key).astype(jnp.int32)
  if chosen is not None:
    chosen = chosen.reshape(-1)[order]
  return _Lists(order, chosen, is_pair, bounds, inside)


def _pairs_of_packs(
  ids: Int[Array, "groups packs slots"],
  valid: Bool[Array, "groups packs slots"],
  *,
  num_blocks: int,
  pack: int,
  each: int,
) -> tuple[
  Int[Array, "groups packs slots"],
  Bool[Array, "groups packs slots"],
  Int[Array, "groups packs slots"] | None,
]:
  """Each pack's pairs: KV block in the group, whether the slot holds one, bits.

  The bits are those of `KVBlockPlan.chosen`; `each` are the blocks of a KV
  block.
  """
  slots = ids.shape[-1]
  query = jnp.arange(slots, dtype=jnp.int32)[None, None] // (slots // pack)
  known = jnp.clip(ids, 0, num_blocks - 1)
  if pack == each == 1:
    return known, valid, None
  # Sorted by block, the choices inside a KV block stand side by side.
  of_choice = mosaic.SortKey((pack - 1).bit_length())  # block, then query
  key = of_choice.pack(known, query)
  key = lax.sort(jnp.where(valid, key, mosaic.NEVER), is_stable=False)
  valid = key != mosaic.NEVER
  known, query = of_choice.high(key), of_choice.low(key)
  kv_block = jnp.where(valid, known // each, -1)
  halves = 3 if each == 1 else jnp.int32(1) << (known & 1)
  chosen = jnp.where(valid, pack_chosen(query, halves), 0)
  chosen = mosaic.or_of_rest_of_run(chosen, kv_block, pack * each)
  first = valid & mosaic.starts_run(kv_block)
  # The first choice of each KV block stands for the pair; these move to the
  # front.
  place = mosaic.places_of(first, slots)
  kv_block, chosen = (
    jnp.take_along_axis(x, place, axis=-1, mode="fill", fill_value=0)
    for x in (kv_block, chosen)
  )
  return kv_block, place < slots, chosen
