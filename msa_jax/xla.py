"""MiniMax Sparse Attention for any backend: only chosen blocks are computed.

A row is a group of a batch row; rows are independent. For a chunk of a row's
queries (or for some whole rows, if they are short) `_plan` sorts all (query,
block) pairs by block and cuts each block's pairs into tiles of a fixed number
of queries. A tile gathers its queries and multiplies them with one block of
keys, so keys are not gathered for each query, and every shape is static. The
forward pass leaves one partial result for each pair, and each query gathers and
combines those of its P pairs. The backward pass sums dk and dv over a block's
tiles in a fixed order, so repeated runs give the same bits.

Selection multiplies chunks of queries with chunks of keys, up to the last key
that a query of the chunk sees, and keeps the maximum of each block only.

The dense warm-up phase and the recalls loop over chunks of queries with the
formulas of `reference`. `_chunk_elements` bounds all chunks, so memory grows
linearly with T and S.

In a packed row, `layout` says where the blocks lie. Keys are gathered into
blocks once, and from there on a block is a block: the last tokens of a short
one are masked. Dense attention and recalls still score all keys of a row.

Arguments are checked in `ops`, not here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool, Float, Int, Shaped

from msa_jax import meshes, reference
from msa_jax.reference import HIGHEST, QueryMask, clean, compute_dtype
from msa_jax.segments import BlockLayout
from pallas_kernels import partition

# A tile has at least this many matrix rows, its queries times the heads of a
# group, and at most this many queries.
_TILE_ROWS = 64
_TILE_QUERIES = 128

# The letters of a layout's arrays, which have batch rows and no heads.
_LAYOUT = BlockLayout("B N", "B N", "B N", "B N", "B S", "B S", "B")  # pyright: ignore


def _by_rows_and_heads(
  function: Callable, operands: Sequence[Any], results: Sequence[str]
) -> Callable:
  """`partition.by_rows_and_heads`, for operands that may be None or a layout.

  Args:
    function: as there.
    operands: the letters of each operand's axes; `_LAYOUT` for a layout.
    results: as there.
  """

  def run(*args):
    letters = []
    for names, x in zip(operands, args, strict=True):
      if x is not None:
        letters += names if isinstance(x, BlockLayout) else [names]
    # None has no leaves.
    arrays, tree = jax.tree.flatten(args)

    def local(*arrays):
      return function(*jax.tree.unflatten(tree, arrays))

    return partition.by_rows_and_heads(local, letters, results)(*arrays)

  return run


class _Bounds(NamedTuple):
  """Slots of each block: its first, one behind its last, and one behind the
  last query that sees it."""

  start: Int[Array, "B N"]
  end: Int[Array, "B N"]
  until: Int[Array, "B N"]


def _bounds(
  batch: int, kv_len: int, block_size: int, layout: BlockLayout | None
) -> _Bounds:
  if layout is not None:
    return _Bounds(layout.block_start, layout.block_end, layout.block_until)
  start = jnp.arange(0, kv_len, block_size, dtype=jnp.int32)
  start = jnp.broadcast_to(start, (batch, start.shape[0]))
  return _Bounds(start, start + block_size, jnp.full_like(start, kv_len))


class _Plan(NamedTuple):
  """The (query, block) pairs of one chunk, cut into M tiles of R queries.

  Each choice slot that holds a block which the query sees makes a pair. A row
  is a group of a batch row. Queries are numbered over the Z rows and C queries
  of a chunk, z C + c, and blocks likewise, z N + n.

  Attributes:
    block: block of each tile, numbered over the rows of all chunks, because the
      chunks share the arrays of keys and values. A block's tiles lie next to
      each other; a tile without queries may have any block.
    query: queries of each tile.
    limit: the last token of the tile's block that each query sees, counted from
      0; -1 where a tile has no query.
    position: position of each slot's pair among the M R queries of all tiles.
    used: whether the slot makes a pair; if not, its position means nothing.
    last: last tile of each block.
    picked: whether the block has tiles.
    same: whether a tile, of V windows of W tiles, has the block of the tile
      before it.
    through: whether a window has tiles of one block only, which the window
      before it ends with.
    carried: whether the window of the block's last tile starts with the block,
      and the window before it ends with it.
  """

  block: Int[Array, "M"]
  query: Int[Array, "M R"]
  limit: Int[Array, "M R"]
  position: Int[Array, "Z*C P"]
  used: Bool[Array, "Z*C P"]
  last: Int[Array, "Z*N"]
  picked: Bool[Array, "Z*N"]
  same: Bool[Array, "V W"]
  through: Bool[Array, "V"]
  carried: Bool[Array, "Z*N"]


def _count(size: int, ndim: int) -> Int[Array, "..."]:
  """0 .. size - 1 along the last of ndim axes."""
  return lax.expand_dims(jnp.arange(size, dtype=jnp.int32), range(ndim - 1))


# For indices that are right by construction and need no check.
_IN_BOUNDS: Any = {"mode": "promise_in_bounds", "wrap_negative_indices": False}


def _take(x: Array, at: Int[Array, "*A"]) -> Array:
  """x[at]."""
  return x.at[at].get(**_IN_BOUNDS)


@functools.partial(jax.jit, static_argnames="split")
def _plan(
  block_indices: Int[Array, "Z T P"],
  positions: Int[Array, "Z T"],
  bounds: _Bounds,
  split: _Split,
) -> _Plan:
  """Sorts each chunk's pairs by block and cuts them into tiles.

  The tables of all chunks are flat, one chunk's after another's, because XLA
  has to build an array of indices, and to compile a kernel for it, where a
  table has an axis for the chunks.

  Returns:
    A plan whose arrays have the chunks first.
  """
  rows, queries, tile_queries = split
  num_blocks = bounds.start.shape[1]
  p = block_indices.shape[-1]
  chunks, blocks = rows.count * queries.count, rows.size * num_blocks
  pairs = rows.size * queries.size * p
  # The number of a block's first tile is that of the whole tiles before its
  # first pair, plus one for each block before it, whose last tile may be
  # incomplete. Where that would be more tiles than pairs, each pair has room
  # for a tile.
  few = pairs <= pairs // tile_queries + blocks
  num_tiles = pairs if few else pairs // tile_queries + blocks
  # `_sum_tiles` wants whole windows of tiles.
  window = _window(num_tiles)
  num_tiles = -(-num_tiles // window) * window
  slots = num_tiles * tile_queries

  chunk = jnp.arange(chunks, dtype=jnp.int32)[:, None]
  first_row = _first_rows(split)[:, None]
  row = (first_row + _count(rows.size, 2))[..., None, None]
  position = _cut(positions, split)[..., None]
  block = _cut(block_indices, split, fill=-1)
  named = (block >= 0) & (block < num_blocks)
  block = row * num_blocks + jnp.where(named, block, 0)
  start, end, until = (_take(x.reshape(-1), block) for x in bounds)
  used = named & (start <= position) & (position < until)
  limit = jnp.minimum(position, end - 1) - start
  block, used = block.reshape(chunks, pairs), used.reshape(chunks, pairs)
  key = jnp.where(used, block - first_row * num_blocks, blocks)

  # The pairs in the order of their blocks, and their places in the tiles. Those
  # that are not used get places behind all tiles.
  pair = jnp.broadcast_to(_count(pairs, 2), key.shape)
  key, order = lax.sort((key, pair), dimension=1, num_keys=1, is_stable=True)
  entry = chunk * (blocks + 1) + key
  first = jnp.full((chunks * (blocks + 1),), pairs, jnp.int32)
  first = _take(first.at[entry].min(pair, **_IN_BOUNDS), entry)
  tile = first if few else lax.div(first, jnp.int32(tile_queries)) + key
  place = chunk * slots + tile * tile_queries + pair - first
  place = jnp.where(key < blocks, place, chunks * slots + pair)
  at = chunk * pairs + order
  position = jnp.zeros((chunks * pairs,), jnp.int32)
  position = position.at[at].set(
    place - chunk * slots, unique_indices=True, **_IN_BOUNDS
  )
  position = jnp.minimum(position, slots - 1)

  # The pair at each place.
  held = jnp.full((chunks * slots,), -1, jnp.int32)
  held = held.at[place].set(order, mode="drop", wrap_negative_indices=False)
  held = held.reshape(chunks, num_tiles, tile_queries)
  live, held = held >= 0, jnp.maximum(held, 0)
  at = chunk[..., None] * pairs + held
  limit = jnp.where(live, _take(limit.reshape(-1), at), -1)
  query = lax.div(held, jnp.int32(p))
  block = _take(block.reshape(-1), at[..., 0])

  own = first_row * num_blocks + _count(blocks, 2)
  tile = jnp.where(live[..., 0], _count(num_tiles, 2), -1)
  last = jnp.full((chunks * blocks,), -1, jnp.int32)
  at = chunk * blocks + block - first_row * num_blocks
  last = last.at[at].max(tile, **_IN_BOUNDS).reshape(chunks, blocks)
  picked, last = last >= 0, jnp.maximum(last, 0)

  def before(x):
    pads = [(0, 0)] * (x.ndim - 1) + [(1, 0)]
    return jnp.pad(x, pads, constant_values=-1)[..., :-1]

  tiles = block.reshape(chunks, -1, window)
  first, end = tiles[..., 0], tiles[..., -1]
  goes_on = first == before(end)
  at = chunk * (num_tiles // window) + lax.div(last, jnp.int32(window))
  carried = _take(jnp.where(goes_on, first, -1).reshape(-1), at) == own
  return _Plan(
    block,
    query,
    limit,
    position.reshape(chunks, -1, p),
    used.reshape(chunks, -1, p),
    last,
    picked,
    tiles == before(tiles),
    goes_on & (first == end),
    carried,
  )


def _blocks(
  x: Float[Array, "B S K D"], block_size: int, layout: BlockLayout | None
) -> Float[Array, "B*K N bs D"]:
  """Cuts each head's tokens into blocks.

  Incomplete blocks are padded: in a packed row by one of their own tokens,
  which changes no maximum, otherwise by zeros.
  """
  b, s, h, d = x.shape
  if layout is not None:
    start, end = (x[..., None] for x in (layout.block_start, layout.block_end))
    slots = jnp.minimum(start + _count(block_size, 3), end - 1)
    x = x[jnp.arange(b)[:, None, None], jnp.clip(slots, 0, s - 1)]
    return jnp.moveaxis(x, 3, 1).reshape(b * h, -1, block_size, d)
  n = -(-s // block_size)
  x = jnp.pad(x, ((0, 0), (0, n * block_size - s), (0, 0), (0, 0)))
  return jnp.moveaxis(x, 2, 1).reshape(b * h, n, block_size, d)


def _unblock(
  x: Float[Array, "B*K N bs D"],
  batch: int,
  kv_len: int,
  layout: BlockLayout | None,
) -> Float[Array, "B S K D"]:
  """Undoes `_blocks`; zeros for padding."""
  block_size, head_dim = x.shape[2:]
  x = x.reshape(batch, x.shape[0] // batch, -1, head_dim)
  if layout is None:
    return jnp.moveaxis(x[:, :, :kv_len], 1, 2)
  own = layout.own_block
  block = jnp.maximum(own, 0)
  start = jnp.take_along_axis(layout.block_start, block, axis=1)
  slot = jnp.arange(kv_len, dtype=jnp.int32)[None]
  place = block * block_size + slot - start
  place = jnp.where(own >= 0, place, 0)
  x = jnp.take_along_axis(x, place[:, None, :, None], axis=2)
  x = jnp.where((own >= 0)[:, None, :, None], x, 0)
  return jnp.moveaxis(x, 1, 2)


def _to_rows(
  x: Float[Array, "B T H *D"], num_kv_heads: int
) -> Float[Array, "B*K T G *D"]:
  b, t, h = x.shape[:3]
  x = x.reshape(b, t, num_kv_heads, h // num_kv_heads, *x.shape[3:])
  return jnp.moveaxis(x, 2, 1).reshape(b * num_kv_heads, t, *x.shape[3:])


def _from_rows(
  x: Float[Array, "B*K T G *D"], batch: int
) -> Float[Array, "B T H *D"]:
  """Undoes `_to_rows`."""
  rows, t, group_size = x.shape[:3]
  x = x.reshape(batch, rows // batch, t, *x.shape[2:])
  x = jnp.moveaxis(x, 1, 2)
  return x.reshape(batch, t, rows // batch * group_size, *x.shape[4:])


def _for_tiles(
  x: Float[Array, "Z*C G *D"], plan: _Plan
) -> Float[Array, "M R*G *D"]:
  """Gathers each tile's queries, with a query's heads next to each other."""
  m, r = plan.query.shape
  return _take(x, plan.query).reshape(m, r * x.shape[1], *x.shape[2:])


def _for_pairs(
  x: Float[Array, "M R*G *D"], plan: _Plan
) -> Float[Array, "Z*C P G *D"]:
  """Brings the tiles' values of each pair and head back to their queries."""
  m, r = plan.query.shape
  return _take(x.reshape(m * r, x.shape[1] // r, *x.shape[2:]), plan.position)


def _sum_pairs(
  x: Float[Array, "M R*G *D"], plan: _Plan, dtype: Any
) -> Float[Array, "Z*C G *D"]:
  """Sums the tiles' values of each query over its pairs."""
  x = _for_pairs(x, plan)
  used = plan.used.reshape(plan.used.shape + (1,) * (x.ndim - 2))
  return jnp.sum(jnp.where(used, x, 0), axis=1, dtype=dtype)


def _window(num_tiles: int) -> int:
  """Tiles of a window of `_sum_tiles`, of which there are about as many."""
  return max(math.isqrt(num_tiles), 1)


def _running_sums(xs: Any, same: Bool[Array, "V W"]) -> Any:
  """x[v, w] += x[v, w - 1] where `same`, one w after another."""
  at = functools.partial(
    lax.dynamic_index_in_dim,
    axis=1,
    keepdims=False,
    allow_negative_indices=False,
  )

  def add(w, carry):
    # The last sum is carried beside xs, so that a step reads of xs only what it
    # writes. XLA would copy all of xs in each step otherwise.
    last, xs = carry
    keep = at(same, w)[:, None, None]
    last = jax.tree.map(
      lambda last, x: at(x, w) + jnp.where(keep, last, 0), last, xs
    )
    put = functools.partial(
      lax.dynamic_update_index_in_dim, axis=1, allow_negative_indices=False
    )
    return last, jax.tree.map(lambda x, new: put(x, new, index=w), xs, last)

  last = jax.tree.map(lambda x: x[:, 0], xs)
  return lax.fori_loop(1, same.shape[1], add, (last, xs))[1]


def _sum_tiles(xs: Any, plan: _Plan) -> Any:
  """Sums each block's tiles in a fixed order; 0 for blocks without tiles.

  A scatter-add would be enough on a CPU, but on a GPU its order, and so the
  result's last bits, would vary. A block's tiles lie next to each other. V
  windows of W tiles are summed at once, tile after tile, and then the ends of
  the windows. Tiles without queries are zeros, whatever their block is.

  Args:
    xs: a tree of arrays [M, bs, D].
    plan: of the tiles.

  Returns:
    A tree of arrays [Z N, bs, D].
  """
  windows = plan.same.shape
  xs = jax.tree.map(lambda x: x.reshape(*windows, *x.shape[1:]), xs)
  xs = _running_sums(xs, plan.same)
  # What the windows before each one add to the block that it starts with.
  ends = jax.tree.map(lambda x: x[None, :, -1], xs)
  ends = _running_sums(ends, plan.through[None])
  before = jnp.maximum(lax.div(plan.last, jnp.int32(windows[1])) - 1, 0)

  def total(x, ends):
    x = _take(x.reshape(-1, *x.shape[2:]), plan.last)
    carried = _take(ends[0], before)
    x += jnp.where(plan.carried[:, None, None], carried, 0)
    return jnp.where(plan.picked[:, None, None], x, 0)

  return jax.tree.map(total, xs, ends)


def _product(
  spec: str, a: Float[Array, "..."], b: Float[Array, "..."]
) -> Float[Array, "..."]:
  """An einsum that sums in at least float32."""
  return jnp.einsum(
    spec, a, b, precision=HIGHEST, preferred_element_type=compute_dtype(a)
  )


def _seen(
  plan: _Plan, group_size: int, block_size: int
) -> Bool[Array, "M R*G bs"]:
  """Which of a tile's tokens each of its queries sees, for every head."""
  limit = jnp.repeat(plan.limit, group_size, axis=1)
  return _count(block_size, 3) <= limit[..., None]


def _mark(x: Float[Array, "*A"]) -> Float[Array, "*A"]:
  """Makes infinities NaN, so that a product with any number is NaN."""
  return jnp.where(jnp.isfinite(x), x, jnp.nan)


def _clean_blocks(
  x: Float[Array, "Z N bs D"],
) -> tuple[Float[Array, "Z N bs D"], Int[Array, "Z N"]]:
  """Zeroes non-finite entries.

  Returns:
    (x, the first token of each block that held one; bs if there is none).
  """
  finite = jnp.isfinite(x)
  token = _count(x.shape[2], 3)[..., None]
  first = jnp.min(jnp.where(finite, x.shape[2], token), axis=(2, 3))
  return jnp.where(finite, x, 0), first


def _sees(
  first_bad: Int[Array, "Z*N"], plan: _Plan, group_size: int
) -> Bool[Array, "M R*G"]:
  """Whether a query sees a bad token of its tile's block, for every head."""
  sees = plan.limit >= _take(first_bad, plan.block)[:, None]
  return jnp.repeat(sees, group_size, axis=1)


def _softmax_of_pairs(
  s: Float[Array, "M R*G bs"],
) -> tuple[
  Float[Array, "M R*G bs"], Float[Array, "M R*G"], Float[Array, "M R*G"]
]:
  """exp(s - max), max, and log sum exp, over each pair's tokens."""
  m = jnp.max(s, axis=-1)
  m = jnp.where(m == -jnp.inf, 0, m)
  p = jnp.exp(s - m[..., None])
  l = jnp.sum(p, axis=-1)
  lse = jnp.where(l == 0, -jnp.inf, m + jnp.log(jnp.where(l == 0, 1, l)))
  return p, m, lse


def _merge_pairs(
  lse: Float[Array, "M R*G"], plan: _Plan
) -> Float[Array, "Z*C G"]:
  """log sum exp of each query, from those of its pairs."""
  pairs = jnp.where(plan.used[..., None], _for_pairs(lse, plan), -jnp.inf)
  return reference.masked_logsumexp(pairs, axis=1)


def _pair_dtype(x: Array) -> jnp.dtype:
  """In which the results of pairs go through memory.

  bfloat16 halves their bytes, and a sum of them is rounded to it anyway.
  float16 lacks the range for a sum over a block.
  """
  return x.dtype if x.dtype == jnp.bfloat16 else compute_dtype(x)


def _finite_lse(lse: Float[Array, "*A"]) -> Float[Array, "*A"]:
  """Replaces -inf by 0, so that exp(-inf - lse) is 0 for empty queries."""
  return jnp.where(lse == -jnp.inf, 0, lse)


# --- sparse attention ------------------------------------------------------


def _chunk_elements() -> int:
  """Elements of a chunk's largest array.

  They are 4 MiB in float32 on a CPU, whose caches hold them and where memory
  that a step uses for the first time costs more than the work on it. On other
  devices each chunk costs the launch of its kernels, so there are 512 MiB.
  """
  return 1 << 20 if jax.default_backend() == "cpu" else 1 << 27


class _Chunk(NamedTuple):
  """Static sizes of one call's chunks of queries."""

  size: int  # queries of a chunk
  count: int
  pad: int  # queries added to fill the last chunk


def _chunks(
  q_len: int, elements_per_query: int, limit: int | None = None
) -> _Chunk:
  """The fewest chunks whose largest array has at most `limit` elements."""
  limit = limit or _chunk_elements()
  count = -(-q_len * elements_per_query // limit)
  size = -(-q_len // max(count, 1))
  count = -(-q_len // size)
  return _Chunk(size, count, count * size - q_len)


def _split(x: Array, chunk: _Chunk, axis: int, fill: float = 0) -> Array:
  """Cuts `axis` into chunks and puts them first."""
  pads = [(0, 0)] * x.ndim
  pads[axis] = (0, chunk.pad)
  x = jnp.pad(x, pads, constant_values=fill)
  shape = (*x.shape[:axis], chunk.count, chunk.size, *x.shape[axis + 1 :])
  return jnp.moveaxis(x.reshape(shape), axis, 0)


def _join(x: Array, axis: int, length: int) -> Array:
  """Undoes `_split`."""
  x = jnp.moveaxis(x, 0, axis)
  x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
  return lax.slice_in_dim(x, 0, length, axis=axis)


def _over_chunks(body: Callable, carry, xs, count: int) -> tuple[Any, Any]:
  """`lax.scan`, but without a loop if there is only one chunk."""
  if count == 1:
    carry, ys = body(carry, jax.tree.map(lambda x: x[0], xs))
    return carry, jax.tree.map(lambda y: y[None], ys)
  return lax.scan(body, carry, xs)


class _Split(NamedTuple):
  """How sparse attention cuts rows and queries into chunks."""

  rows: _Chunk
  queries: _Chunk
  tile_queries: int


def _sparse_split(
  block_indices: Int[Array, "Z T P"],
  k_blocks: Float[Array, "Z N bs D"],
  group_size: int,
) -> _Split:
  """A chunk is a part of one row's queries, or some rows with all queries."""
  rows, q_len, top_k = block_indices.shape
  _, num_blocks, block_size, head_dim = k_blocks.shape
  pair = group_size * max(head_dim, block_size)
  tile = max(_TILE_ROWS // group_size, 1)
  # One tile of each block is incomplete. There shall be four times as many
  # complete ones.
  limit = max(_chunk_elements(), 4 * num_blocks * tile * pair)
  queries = _chunks(q_len, top_k * pair, limit)
  count = 1
  if queries.count == 1:
    most = limit // (q_len * top_k * pair)
    count = max(x for x in range(1, rows + 1) if rows % x == 0 and x <= most)
  # Larger tiles read keys and values less often.
  pairs = queries.size * top_k
  while 2 * tile <= _TILE_QUERIES and 8 * num_blocks * tile <= pairs:
    tile *= 2
  return _Split(_Chunk(count, rows // count, 0), queries, tile)


def _first_rows(split: _Split) -> Int[Array, "chunks"]:
  """The first row of each chunk."""
  rows, queries, _ = split
  row = jnp.arange(rows.count, dtype=jnp.int32) * rows.size
  return jnp.repeat(row, queries.count)


def _cut(x: Array, split: _Split, fill: float = 0) -> Array:
  """[Z, T, ...] -> [chunks, rows, queries, ...].

  Chunks hold one row or all queries, so rows and queries stay in their order.
  """
  rows, queries, _ = split
  pads = [(0, 0)] * x.ndim
  pads[1] = (0, queries.pad)
  x = jnp.pad(x, pads, constant_values=fill)
  return x.reshape(-1, rows.size, queries.size, *x.shape[2:])


def _sum_over_chunks(
  body: Callable,
  of_rows: Any,
  of_queries: Sequence[Array],
  plans: _Plan,
  split: _Split,
  sums: Sequence[tuple[int, ...]] = (),
) -> tuple[Any, Any]:
  """Runs `body` on chunks of rows and queries, in one loop.

  Args:
    body: (of_rows, of_queries, plan) -> (sums, results), two tuples. It gets
      `of_rows` whole, and of the others those of a chunk. Sums have the chunk's
      rows first and are added up over the chunks of their queries.
    of_rows: arrays [Z N, ...].
    of_queries: arrays [Z, T, ...].
    plans: of each chunk, as `_cut` cuts them.
    split: sizes.
    sums: shape of each sum for one row.

  Returns:
    (sums [Z, ...], results [Z, T, ...]).
  """
  rows, queries, _ = split
  num_rows, q_len = of_queries[0].shape[:2]
  chunks = [_cut(x, split) for x in of_queries]
  total = tuple(
    meshes.varying_zeros(
      (num_rows, *shape),
      compute_dtype(of_queries[0]),
      (of_rows, chunks, plans),
    )
    for shape in sums
  )

  def step(total, x):
    row, *chunk = x
    sums, results = body(of_rows, *chunk)

    def add(total, x):
      x += lax.dynamic_slice_in_dim(total, row, rows.size)
      return lax.dynamic_update_slice_in_dim(total, x, row, 0)

    return jax.tree.map(add, total, sums), results

  xs = (_first_rows(split), chunks, plans)
  count = rows.count * queries.count
  total, results = _over_chunks(step, total, xs, count)
  return total, jax.tree.map(
    lambda x: x.reshape(num_rows, -1, *x.shape[3:])[:, :q_len], results
  )


@functools.partial(
  jax.jit,
  static_argnames=("block_size", "scale"),
)
def sparse_attention(
  q: Float[Array, "B T H D"],
  k: Float[Array, "B S K D"],
  v: Float[Array, "B S K D"],
  block_indices: Int[Array, "B K T P"],
  *,
  block_size: int,
  scale: float,
  kv_lengths: Int[Array, "B"] | None,
  layout: BlockLayout | None = None,
  query_slots: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T H D"], Float[Array, "B H T"]]:
  """Attention over chosen blocks, see `msa_jax.sparse_attention`."""
  positions = reference.query_positions(
    q.shape[1], k.shape[1], q.shape[0], kv_lengths, layout, query_slots
  )
  result: Any = _sparse(
    q, k, v, block_indices, positions, layout, block_size, scale
  )
  return result


_SPARSE_OPERANDS = (
  *("B T H D", "B S K D", "B S K D", "B K T P", "B T"),
  _LAYOUT,
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _sparse(*args):
  *operands, block_size, scale = args
  run = functools.partial(_sparse_run, block_size=block_size, scale=scale)
  return _by_rows_and_heads(run, _SPARSE_OPERANDS, ("B T H D", "B H T"))(
    *operands
  )


class _Rows(NamedTuple):
  """What all passes over the chosen blocks start from, of Z = B K rows."""

  k: Float[Array, "Z*N bs D"]
  first_bad_k: Int[Array, "Z*N"]
  plans: _Plan
  split: _Split


def _rows(q, k, block_indices, positions, layout, block_size) -> _Rows:
  b, kv_len, num_kv_heads, _ = k.shape
  bounds = _bounds(b, kv_len, block_size, layout)
  bounds, positions = jax.tree.map(
    lambda x: jnp.repeat(x, num_kv_heads, axis=0), (bounds, positions)
  )
  k, first_bad = _clean_blocks(_blocks(k, block_size, layout))
  block_indices = block_indices.reshape(-1, *block_indices.shape[2:])
  split = _sparse_split(block_indices, k, q.shape[2] // num_kv_heads)
  # All chunks are planned at once, outside of their loop, because there XLA
  # finds that the passes of one program have the same plans.
  plans = _plan(block_indices, positions, bounds, split=split)
  return _Rows(_flat(k), _flat(first_bad), plans, split)


def _flat(x: Shaped[Array, "Z C *D"]) -> Shaped[Array, "Z*C *D"]:
  return x.reshape(-1, *x.shape[2:])


@functools.partial(jax.jit, static_argnames=("block_size", "scale"))
def _sparse_run(
  q, k, v, block_indices, positions, layout, *, block_size, scale
):  # fmt: skip
  b, num_kv_heads = k.shape[0], k.shape[2]
  group_size = q.shape[2] // num_kv_heads
  rows = _rows(q, k, block_indices, positions, layout, block_size)
  v_blocks, bad_v = _clean_blocks(_blocks(v, block_size, layout))

  def body(of_rows, of_queries, plan):
    k, bad_k, v, bad_v = of_rows
    (q,) = of_queries
    shape = q.shape[:2]
    q_tile = _for_tiles(_mark(_flat(q)), plan)
    k_tile = _take(k, plan.block)
    s = scale * _product("mrd,mjd->mrj", q_tile, k_tile)
    s = jnp.where(_seen(plan, group_size, block_size), s, -jnp.inf)
    p, m, lse = _softmax_of_pairs(s)
    lse = jnp.where(_sees(bad_k, plan, group_size), jnp.nan, lse)
    lse = _merge_pairs(lse, plan)
    o = _product("mrj,mjd->mrd", p.astype(v.dtype), _take(v, plan.block))
    o = _for_pairs(o.astype(_pair_dtype(v)), plan)
    # The weight of each pair in the output is exp(its maximum - lse).
    m = jnp.where(_sees(bad_v, plan, group_size), jnp.nan, m)
    m = jnp.where(plan.used[..., None], _for_pairs(m, plan), -jnp.inf)
    weight = jnp.exp(m - _finite_lse(lse)[:, None])
    o = jnp.where(plan.used[..., None, None], o, 0).astype(weight.dtype)
    out = jnp.sum(weight[..., None] * o, axis=1).astype(v.dtype)
    return (), tuple(x.reshape(*shape, *x.shape[1:]) for x in (out, lse))

  _, (out, lse) = _sum_over_chunks(
    body,
    (rows.k, rows.first_bad_k, _flat(v_blocks), _flat(bad_v)),
    [_to_rows(q, num_kv_heads)],
    rows.plans,
    rows.split,
  )
  out = _from_rows(out, b).astype(q.dtype)
  return out, jnp.moveaxis(_from_rows(lse, b), 1, 2)


def _sparse_fwd(
  q, k, v, block_indices, positions, layout, block_size, scale
):  # fmt: skip
  operands = tuple(x.value for x in (q, k, v, block_indices, positions))
  if layout is not None:
    layout = BlockLayout(*(x.value for x in layout))
  result: Any = _sparse(*operands, layout, block_size, scale)
  out = checkpoint_name(result[0], "attention_out")
  lse = checkpoint_name(result[1], "attention_lse")
  return (out, lse), (*operands, layout, out, lse)


def _sparse_bwd(block_size, scale, residuals, cotangents):
  q, k, v, block_indices, positions, layout, out, lse = residuals
  d_out, d_lse = cotangents
  dtype = compute_dtype(q)
  if isinstance(d_out, SymbolicZero):
    d_out = jnp.zeros_like(out)
  delta = jnp.sum(out.astype(dtype) * d_out.astype(dtype), axis=-1)
  if not isinstance(d_lse, SymbolicZero):
    # d lse / d score = p, the factor of delta too. Empty rows have no gradient.
    d_lse = jnp.where(lse == -jnp.inf, 0, d_lse)
    delta -= jnp.moveaxis(d_lse, 1, 2)
  run = functools.partial(_sparse_gradients, block_size=block_size, scale=scale)
  run = _by_rows_and_heads(
    run,
    (*_SPARSE_OPERANDS, "B T H D", "B T H", "B H T"),
    ("B T H D", "B S K D", "B S K D"),
  )
  d_operands = run(q, k, v, block_indices, positions, layout, d_out, delta, lse)
  return *d_operands, None, None, None


def _sparse_gradients(
  q,
  k,
  v,
  block_indices,
  positions,
  layout,
  d_out,
  delta,
  lse,
  *,
  block_size,
  scale,
):
  b, kv_len, num_kv_heads, _ = k.shape
  group_size = q.shape[2] // num_kv_heads
  dtype = compute_dtype(q)
  rows = _rows(q, k, block_indices, positions, layout, block_size)
  # A NaN in v that a query sees is in its delta, and one in q or k in its lse.
  v_blocks, _ = clean(_blocks(v, block_size, layout))

  def body(of_rows, of_queries, plan):
    k, v = of_rows
    q, d_out, delta, lse = of_queries
    q, _ = clean(_flat(q))
    d_out, bad_d = clean(_flat(d_out))
    lse = jnp.where(bad_d, jnp.nan, _finite_lse(_flat(lse)))
    lse, delta = (_for_tiles(x, plan)[..., None] for x in (lse, _flat(delta)))
    q_tile, d_tile = _for_tiles(q, plan), _for_tiles(d_out, plan)
    k_tile, v_tile = _take(k, plan.block), _take(v, plan.block)
    seen = _seen(plan, group_size, block_size)
    s = scale * _product("mrd,mjd->mrj", q_tile, k_tile)
    p = jnp.where(seen, jnp.exp(s - lse), 0)
    dp = _product("mrd,mjd->mrj", d_tile, v_tile)
    ds = jnp.where(seen, p * (dp - delta) * scale, 0)
    ds, p = ds.astype(q.dtype), p.astype(q.dtype)
    dq = _product("mrj,mjd->mrd", ds, k_tile).astype(_pair_dtype(q))
    dq = _sum_pairs(dq, plan, dtype).astype(q.dtype)
    sums = _sum_tiles(
      (
        _product("mrj,mrd->mjd", ds, q_tile),
        _product("mrj,mrd->mjd", p, d_tile),
      ),
      plan,
    )
    sums = tuple(x.reshape(-1, *v_blocks.shape[1:]) for x in sums)
    return sums, (dq.reshape(of_queries[0].shape),)

  (dk, dv), (dq,) = _sum_over_chunks(
    body,
    (rows.k, _flat(v_blocks)),
    [
      _to_rows(x, num_kv_heads)
      for x in (q, d_out, delta, jnp.moveaxis(lse, 1, 2))
    ],
    rows.plans,
    rows.split,
    (v_blocks.shape[1:],) * 2,
  )
  dk = _unblock(dk, b, kv_len, layout).astype(k.dtype)
  dv = _unblock(dv, b, kv_len, layout).astype(v.dtype)
  return _from_rows(dq, b), dk, dv


# With symbolic zeros, the gradient of an lse that is not used costs nothing.
_sparse.defvjp(_sparse_fwd, _sparse_bwd, symbolic_zeros=True)


# --- KL loss ---------------------------------------------------------------


@functools.partial(
  jax.jit, static_argnames=("block_size", "scale", "index_scale")
)
def index_kl_loss(
  q: Float[Array, "B T H D"],
  k: Float[Array, "B S K D"],
  index_q: Float[Array, "B T K I"],
  index_k: Float[Array, "B S I"],
  block_indices: Int[Array, "B K T P"] | None,
  *,
  block_size: int,
  scale: float,
  index_scale: float,
  lse: Float[Array, "B H T"] | None,
  kv_lengths: Int[Array, "B"] | None,
  query_mask: QueryMask | None,
  layout: BlockLayout | None = None,
  query_slots: Int[Array, "B T"] | None = None,
) -> Float[Array, ""]:
  """Mean KL(main || index), see `msa_jax.index_kl_loss`."""
  if block_indices is None:
    _, _, kl = _dense(
      q,
      k,
      None,
      index_q,
      index_k,
      scale=scale,
      index_scale=index_scale,
      lse=lse,
      kv_lengths=kv_lengths,
      query_mask=query_mask,
      layout=layout,
      query_slots=query_slots,
    )
    return kl
  positions = reference.query_positions(
    q.shape[1], k.shape[1], q.shape[0], kv_lengths, layout, query_slots
  )
  weights = None
  if query_mask is not None:
    positions = jnp.where(reference.which_count(query_mask), positions, -1)
    if query_mask.dtype != jnp.bool_:
      weights = query_mask
  if lse is None:
    # Only lse is used; XLA removes the computation of the output.
    result: Any = _sparse(
      q, k, k, block_indices, positions, layout, block_size, scale
    )
    lse = result[1]
  shape = (q.shape[0], k.shape[2], q.shape[1])
  return _sparse_kl(
    *lax.stop_gradient((q, k, lse)),
    index_q,
    index_k,
    block_indices,
    positions,
    weights,
    reference.kl_divisor(shape, query_mask),
    layout,
    block_size,
    scale,
    index_scale,
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(10, 11, 12))
def _sparse_kl(*args):
  return _sparse_kl_fwd(*args)[0]


def _sparse_kl_fwd(*args):
  *operands, block_size, scale, index_scale = args
  run = functools.partial(
    _sparse_kl_run,
    block_size=block_size,
    scale=scale,
    index_scale=index_scale,
  )
  run = _by_rows_and_heads(
    run,
    (
      *("B T H D", "B S K D", "B H T", "B T K I", "B S I"),
      *("B K T P", "B T", "B T", "", _LAYOUT),
    ),
    ("", "B T K I", "B S I"),
  )
  kl, d_iq, d_ik = run(*operands)
  d_iq = checkpoint_name(d_iq, "index_kl_gradient")
  d_ik = checkpoint_name(d_ik, "index_kl_gradient")
  # Residuals must be arrays; empty ones hold the arguments' dtypes.
  dtypes = tuple(jnp.zeros((0,), x.dtype) for x in operands[3:5])
  return kl, (d_iq, d_ik, dtypes)


@functools.partial(
  jax.jit, static_argnames=("block_size", "scale", "index_scale")
)
def _sparse_kl_run(
  q,
  k,
  lse,
  index_q,
  index_k,
  block_indices,
  positions,
  weights,
  divisor,
  layout,
  *,
  block_size,
  scale,
  index_scale,
):
  """The KL and, from the same pass, its gradients for a cotangent of 1.

  Of some batch rows and groups it is their part: `divisor` counts all of them.
  """
  b, kv_len, num_kv_heads, _ = k.shape
  group_size = q.shape[2] // num_kv_heads
  dtype = compute_dtype(q)
  rows = _rows(q, k, block_indices, positions, layout, block_size)
  # All groups share one index key head.
  ik_blocks, bad_ik = (
    jnp.repeat(x, num_kv_heads, axis=0)
    for x in _clean_blocks(_blocks(index_k[:, :, None], block_size, layout))
  )
  of_queries = [
    _to_rows(x, num_kv_heads) for x in (q, index_q, jnp.moveaxis(lse, 1, 2))
  ]
  if weights is not None:
    weights = jnp.repeat(weights.astype(dtype), num_kv_heads, axis=0)
    of_queries.append(weights)

  def body(of_rows, of_queries, plan):
    k, bad_k, ik, bad_ik = of_rows
    q, index_q, lse, *weights = of_queries
    m, r = plan.query.shape
    seen = _seen(plan, 1, block_size)
    q_tile = _for_tiles(_mark(_flat(q)), plan)
    s = scale * _product("mrd,mjd->mrj", q_tile, _take(k, plan.block))
    lse = _for_tiles(_finite_lse(_flat(lse)), plan)
    lse = jnp.where(_sees(bad_k, plan, group_size), jnp.nan, lse)
    p = jnp.exp(s - lse[..., None])
    p = jnp.mean(p.reshape(m, r, group_size, -1), axis=2)
    p = jnp.where(seen, p, 0)

    index_q, bad_iq = clean(_flat(index_q))
    iq_tile, ik_tile = _for_tiles(index_q, plan), _take(ik, plan.block)
    u = index_scale * _product("mrd,mjd->mrj", iq_tile, ik_tile)
    u = jnp.where(seen, u, -jnp.inf)
    bad = _for_tiles(bad_iq, plan) | _sees(bad_ik, plan, 1)
    _, _, u_lse = _softmax_of_pairs(u)
    u_lse = _merge_pairs(jnp.where(bad, jnp.nan, u_lse), plan)
    log_r = u - _for_tiles(_finite_lse(u_lse), plan)[..., None]
    live = p != 0
    log_ratio = jnp.log(jnp.where(live, p, 1)) - jnp.where(live, log_r, 0)
    kl = jnp.sum(jnp.where(live, p * log_ratio, 0), axis=-1)
    kl = _sum_pairs(kl, plan, dtype).reshape(of_queries[0].shape[:2])

    weight = index_scale / divisor.astype(dtype)
    if weights:
      kl *= weights[0]
      weight *= _take(_flat(weights[0]), plan.query)[..., None]
    du = jnp.where(seen, (jnp.exp(log_r) - p) * weight, 0).astype(dtype)
    d_iq = _product("mrj,mjd->mrd", du, ik_tile.astype(dtype))
    d_iq = _sum_pairs(d_iq, plan, dtype).reshape(of_queries[1].shape)
    d_ik = _product("mrj,mrd->mjd", du, iq_tile.astype(dtype))
    d_ik = _sum_tiles(d_ik, plan).reshape(-1, *ik_blocks.shape[1:])
    return (jnp.sum(kl, axis=1), d_ik), (d_iq,)

  (kl, d_ik), (d_iq,) = _sum_over_chunks(
    body,
    (rows.k, rows.first_bad_k, _flat(ik_blocks), _flat(bad_ik)),
    of_queries,
    rows.plans,
    rows.split,
    ((), ik_blocks.shape[1:]),
  )
  d_ik = jnp.sum(_unblock(d_ik, b, kv_len, layout), axis=2)
  return jnp.sum(kl) / divisor.astype(dtype), _from_rows(d_iq, b), d_ik


def _sparse_kl_bwd(block_size, scale, index_scale, residuals, cotangent):
  d_iq, d_ik, (iq_like, ik_like) = residuals
  d_iq = (cotangent * d_iq).astype(iq_like.dtype)
  d_ik = (cotangent * d_ik).astype(ik_like.dtype)
  # index_kl_loss has stopped the gradient of q, k and lse.
  return (*(None,) * 3, d_iq, d_ik, *(None,) * 5)


_sparse_kl.defvjp(_sparse_kl_fwd, _sparse_kl_bwd)


# --- selection, warm-up, recalls: chunks of queries against all keys --------


@functools.partial(
  jax.jit,
  static_argnames=(
    "block_size",
    "top_k",
    "num_local_blocks",
    "score_precision",
  ),
)
def select_blocks(
  index_q: Float[Array, "B T K I"],
  index_k: Float[Array, "B S I"],
  *,
  block_size: int,
  top_k: int,
  num_local_blocks: int,
  kv_lengths: Int[Array, "B"] | None,
  score_precision: str,
  layout: BlockLayout | None = None,
  query_slots: Int[Array, "B T"] | None = None,
) -> Int[Array, "B K T P"]:
  """The P blocks of each query and group, see `msa_jax.select_blocks`."""
  b, t = index_q.shape[:2]
  positions = reference.query_positions(
    t, index_k.shape[1], b, kv_lengths, layout, query_slots
  )
  run = functools.partial(
    _select_run,
    block_size=block_size,
    top_k=top_k,
    num_local_blocks=num_local_blocks,
    score_precision=score_precision,
  )
  run = _by_rows_and_heads(
    run, ("B T K I", "B S I", "B T", _LAYOUT), ("B K T P",)
  )
  return run(index_q, index_k, positions, layout)[0]


def _select_run(
  index_q,
  index_k,
  positions,
  layout,
  *,
  block_size,
  top_k,
  num_local_blocks,
  score_precision,
):
  b, t, num_kv_heads, index_dim = index_q.shape
  if score_precision == "fp8":
    index_q = reference.quantise_fp8(index_q)
    index_k = reference.quantise_fp8(index_k)
  bounds = _bounds(b, index_k.shape[1], block_size, layout)
  num_blocks = bounds.start.shape[1]
  # Chunks of about as many queries as keys.
  limit = _chunk_elements() // (b * num_kv_heads)
  chunk = _chunks(t, max(math.isqrt(limit), block_size), limit)
  size = min(max(limit // (chunk.size * block_size), 1), num_blocks)
  count = -(-num_blocks // size)
  index_k, bad_k = _clean_blocks(
    _blocks(index_k[:, :, None], block_size, layout)
  )
  pad = (0, count * size - num_blocks)
  index_k = jnp.pad(index_k, ((0, 0), pad, (0, 0), (0, 0)))

  def body(carry, x):
    index_q, pos = x
    # A token that the query sees is before its own block's end, so of other
    # visible blocks than its own it sees all tokens.
    limit = pos[..., None] - bounds.start[:, None]
    limit = jnp.minimum(limit, (bounds.end - bounds.start - 1)[:, None])
    limit = jnp.pad(limit, ((0, 0), (0, 0), pad), constant_values=-1)
    index_q = _mark(index_q).reshape(b, -1, index_dim)

    def scores(i, score):
      keys = lax.dynamic_slice_in_dim(index_k, i * size, size, axis=1)
      last = None
      if num_local_blocks == 0:
        # Otherwise the query's own block is chosen whatever its score is.
        last = lax.dynamic_slice_in_dim(limit, i * size, size, axis=2)
        last = jnp.repeat(last, num_kv_heads, axis=1)
      return lax.dynamic_update_slice_in_dim(
        score, _best_scores(keys, index_q, last), i * size, axis=2
      )

    visible, forced = reference.visible_blocks(
      pos, num_blocks, block_size, num_local_blocks, layout
    )
    score = meshes.varying_zeros(
      (b, index_q.shape[1], count * size),
      compute_dtype(index_q),
      (index_q, index_k, pos),
    )
    if count == 1:
      score = scores(0, score)
    else:
      # No query of the chunk sees the blocks behind these.
      last = jnp.max(jnp.where(visible, _count(num_blocks, 4), -1))
      score = lax.fori_loop(0, last // size + 1, scores, score)
    score = score[..., :num_blocks].reshape(b, -1, num_kv_heads, num_blocks)
    score = jnp.moveaxis(score, 2, 1)
    nan = (limit[..., :num_blocks] >= bad_k[:, None])[:, None]
    score = jnp.where(nan, jnp.nan, score)
    return carry, _best_blocks(score, visible, forced, top_k)

  xs = (_split(index_q, chunk, 1), _split(positions, chunk, 1, fill=-1))
  _, chosen = _over_chunks(body, (), xs, chunk.count)
  return (_join(chosen, 2, t),)


def _best_scores(
  keys: Float[Array, "B N bs I"],
  index_q: Float[Array, "B R I"],
  last: Int[Array, "B R N"] | None,
) -> Float[Array, "B R N"]:
  """Each block's largest score; NaN if one of them is NaN.

  Args:
    keys: of the blocks.
    index_q: index queries.
    last: number of the last token that each query sees of each block; None: it
      sees all of them.
  """
  if jax.default_backend() == "cpu":
    s = _product("bnji,bri->bnjr", keys, index_q)
    if last is not None:
      token = lax.broadcasted_iota(jnp.int32, s.shape, 2)
      s = jnp.where(token <= jnp.moveaxis(last, 1, 2)[:, :, None], s, -jnp.inf)
    # By halves, because XLA's CPU backend (jax 0.11.2) computes `jnp.max` by a
    # library that drops NaN.
    while s.shape[2] > 1:
      half = -(-s.shape[2] // 2)
      # The halves of an odd number share a token.
      s = jnp.maximum(s[:, :, :half], s[:, :, -half:])
    return jnp.swapaxes(s[:, :, 0], 1, 2)
  # A GPU reads a block's scores fastest if they are neighbours in memory.
  s = _product("bri,bnji->brnj", index_q, keys)
  if last is not None:
    token = lax.broadcasted_iota(jnp.int32, s.shape, 3)
    s = jnp.where(token <= last[..., None], s, -jnp.inf)
  return jnp.max(s, axis=-1)


def _whole_blocks(
  x: Float[Array, "B S K D"], block_size: int, layout: BlockLayout | None
) -> Float[Array, "B N*bs K D"]:
  """The tokens, one block after another, padded as in `_blocks`."""
  b, s, h, d = x.shape
  if layout is None:
    return jnp.pad(x, ((0, 0), (0, -s % block_size), (0, 0), (0, 0)))
  x = _blocks(x, block_size, layout).reshape(b, h, -1, d)
  return jnp.moveaxis(x, 1, 2)


def _visible_in_blocks(
  positions: Int[Array, "B T"],
  num_blocks: int,
  block_size: int,
  layout: BlockLayout | None,
) -> Bool[Array, "B 1 T N*bs"]:
  """`reference.visible_tokens` for the tokens of `_whole_blocks`."""
  if layout is None:
    return reference.visible_tokens(positions, num_blocks * block_size)
  slots, inside = reference.block_slots(layout, block_size)
  position = positions[..., None, None]
  visible = inside[:, None] & (slots[:, None] <= position)
  visible &= position < layout.block_until[:, None, :, None]
  return visible.reshape(*positions.shape, -1)[:, None]


def _best_blocks(
  score: Float[Array, "B K T N"],
  visible: Bool[Array, "B 1 T N"],
  forced: Bool[Array, "B 1 T N"],
  top_k: int,
  axis_name: str | None = None,
) -> Int[Array, "B K T P"]:
  """The P blocks of each query and group, from every block's score.

  With `axis_name`, each device of this mesh axis has the scores of its own N
  blocks, which lie one device's after another's, and ids count all blocks.
  """
  num_blocks = score.shape[-1]
  # Finite scores leave +inf for forced blocks and -inf for excluded ones. -0
  # becomes 0, because the two are a tie.
  limits = jnp.finfo(score.dtype)
  key = jnp.clip(jnp.where(score == 0, 0, score), limits.min, limits.max)
  key = jnp.where(visible & ~jnp.isnan(score), key, -jnp.inf)
  key = jnp.where(forced, jnp.inf, key)
  # Ties go to the lower index, as `lax.top_k` promises.
  value, chosen = lax.top_k(key, min(top_k, num_blocks))
  if axis_name is not None:
    # Only a device's best P can be among the best P of all. Of candidates with
    # equal scores, those of a lower id come first.
    chosen += lax.axis_index(axis_name) * num_blocks
    num_blocks *= lax.axis_size(axis_name)
    value, chosen = (
      lax.all_gather(x, axis_name, axis=3, tiled=True) for x in (value, chosen)
    )
    value, at = lax.top_k(value, min(top_k, num_blocks))
    chosen = jnp.take_along_axis(chosen, at, axis=-1)
  chosen = jnp.where(value == -jnp.inf, num_blocks, chosen)
  chosen = jnp.sort(chosen, axis=-1)
  chosen = jnp.where(chosen == num_blocks, -1, chosen)
  pad = max(top_k - num_blocks, 0)
  return jnp.pad(chosen, ((0, 0),) * 3 + ((0, pad),), constant_values=-1)


def _merge_parts(
  out: Float[Array, "*A D"], lse: Float[Array, "*A"], axis_name: str
) -> tuple[Float[Array, "*A D"], Float[Array, "*A"]]:
  """Attention over all devices' keys, from that over each device's own.

  out = sum of exp(lse - max) out / sum of exp(lse - max).
  """
  top = lax.pmax(lse, axis_name)
  weight = jnp.exp(lse - _finite_lse(top))
  total = lax.psum(weight, axis_name)
  out = lax.psum(weight[..., None] * out, axis_name)
  out = out / jnp.where(total == 0, 1, total)[..., None]
  lse = jnp.log(jnp.where(total == 0, 1, total)) + _finite_lse(top)
  return out, jnp.where(total == 0, -jnp.inf, lse)


def _dense(
  q: Float[Array, "B T H D"],
  k: Float[Array, "B S K D"],
  v: Float[Array, "B S K D"] | None,
  index_q: Float[Array, "B T K I"] | None,
  index_k: Any,
  *,
  scale: float,
  index_scale: float,
  lse: Float[Array, "B H T"] | None,
  kv_lengths: Int[Array, "B"] | None,
  query_mask: QueryMask | None,
  layout: BlockLayout | None,
  query_slots: Int[Array, "B T"] | None,
) -> tuple[Any, Any, Any]:
  """Attention and KL over all visible tokens, each only if it is asked for.

  Attention needs v, and the KL needs index_q and index_k; None leaves it out.
  Each chunk is recomputed in the backward pass, so memory stays linear in T.

  Returns:
    (out, lse, kl); out is None without v, and kl without index_q.
  """
  b, t, h, _ = q.shape
  num_kv_heads = k.shape[2]
  positions = reference.query_positions(
    t, k.shape[1], b, kv_lengths, layout, query_slots
  )
  chunk = _chunks(t, b * h * k.shape[1])

  def body(carry, x):
    q, index_q, lse, mask, pos = x
    visible = reference.visible_tokens(pos, k.shape[1], layout)
    out, kl = None, None
    if v is not None:
      out, lse = reference.attend(
        q, k, v, visible, scale, v.dtype, mask_probs=layout is not None
      )
    if index_q is not None:
      if mask is not None:
        visible = visible & reference.which_count(mask)[:, None, :, None]
      rows = reference.kl_of_queries(
        *lax.stop_gradient((q, k)),
        index_q,
        index_k,
        visible,
        scale=scale,
        index_scale=index_scale,
        lse=lse,
      )
      kl = jnp.sum(reference.weighted(rows, mask))
    return carry, (out, lse, kl)

  xs = (
    _split(q, chunk, 1),
    None if index_q is None else _split(index_q, chunk, 1),
    None if lse is None else _split(lse, chunk, 2, fill=-jnp.inf),
    None if query_mask is None else _split(query_mask, chunk, 1),
    # The queries that pad the last chunk see nothing.
    _split(positions, chunk, 1, fill=-1),
  )
  _, (out, lse, kl) = _over_chunks(jax.checkpoint(body), (), xs, chunk.count)
  if out is not None:
    out, lse = _join(out, 1, t), _join(lse, 2, t)  # pyright: ignore
  if kl is not None:
    divisor = reference.kl_divisor((b, num_kv_heads, t), query_mask)
    kl = jnp.sum(kl) / divisor.astype(kl.dtype)
  return out, lse, kl


@functools.partial(
  jax.jit,
  static_argnames=("scale", "axis_name"),
)
def warmup_attention(
  q: Float[Array, "B T H D"],
  k: Float[Array, "B S K D"],
  v: Float[Array, "B S K D"],
  *,
  scale: float,
  kv_lengths: Int[Array, "B"] | None,
  layout: BlockLayout | None = None,
  query_slots: Int[Array, "B T"] | None = None,
  axis_name: str | None = None,
) -> tuple[Float[Array, "B T H D"], Float[Array, "B H T"]]:
  """Dense attention to all visible tokens, in memory linear in T.

  With `axis_name`, each device of this mesh axis holds S of the keys, one
  device's after another's.
  """
  if axis_name is not None:
    s = k.shape[1]
    query_slots = reference.query_positions(
      q.shape[1], s * lax.axis_size(axis_name), q.shape[0], kv_lengths
    )
    query_slots -= lax.axis_index(axis_name) * s
  out, lse, _ = _dense(
    q,
    k,
    v,
    None,
    None,
    scale=scale,
    index_scale=1.0,
    lse=None,
    kv_lengths=kv_lengths,
    query_mask=None,
    layout=layout,
    query_slots=query_slots,
  )
  if axis_name is None:
    return out, lse
  parts = _merge_parts(
    jnp.moveaxis(out, 1, 2).astype(lse.dtype), lse, axis_name
  )
  return jnp.moveaxis(parts[0], 1, 2).astype(q.dtype), parts[1]


@functools.partial(
  jax.jit,
  static_argnames=("block_size", "scale"),
)
def selection_recall(
  q: Float[Array, "B T H D"],
  k: Float[Array, "B S K D"],
  block_indices: Int[Array, "B K T P"],
  *,
  block_size: int,
  scale: float,
  kv_lengths: Int[Array, "B"] | None,
  layout: BlockLayout | None = None,
  query_slots: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
  """The fields of `msa_jax.SelectionRecall`, see `msa_jax.selection_recall`."""
  b, t = q.shape[:2]
  positions = reference.query_positions(
    t, k.shape[1], b, kv_lengths, layout, query_slots
  )
  run = functools.partial(_recall_sums, block_size=block_size, scale=scale)
  run = _by_rows_and_heads(
    run, ("B T H D", "B S K D", "B K T P", "B T", _LAYOUT), ("",) * 4
  )
  block, score, best_score, count = run(q, k, block_indices, positions, layout)
  count = jnp.maximum(count, 1).astype(score.dtype)
  return block.astype(score.dtype) / count, score / count, best_score / count


@functools.partial(jax.jit, static_argnames=("block_size", "top_k", "scale"))
def best_blocks(
  q: Float[Array, "B T H D"],
  k: Float[Array, "B S K D"],
  *,
  block_size: int,
  top_k: int,
  scale: float,
  kv_lengths: Int[Array, "B"] | None,
  layout: BlockLayout | None = None,
  query_slots: Int[Array, "B T"] | None = None,
) -> Int[Array, "B K T P"]:
  """The P blocks of largest attention mass, see `msa_jax.best_blocks`."""
  b, t = q.shape[:2]
  positions = reference.query_positions(
    t, k.shape[1], b, kv_lengths, layout, query_slots
  )
  run = functools.partial(
    _best_run, block_size=block_size, top_k=top_k, scale=scale
  )
  run = _by_rows_and_heads(
    run, ("B T H D", "B S K D", "B T", _LAYOUT), ("B K T P",)
  )
  return run(q, k, positions, layout)[0]


def largest_blocks(
  mass: Float[Array, "B K T N"],
  kv_len: int,
  *,
  block_size: int,
  top_k: int,
  kv_lengths: Int[Array, "B"] | None,
  layout: BlockLayout | None = None,
  query_slots: Int[Array, "B T"] | None = None,
) -> Int[Array, "B K T P"]:
  """`best_blocks` from the masses, which the kernels compute elsewhere."""
  b, _, t, num_blocks = mass.shape
  positions = reference.query_positions(
    t, kv_len, b, kv_lengths, layout, query_slots
  )
  seen, none = reference.visible_blocks(
    positions, num_blocks, block_size, 0, layout
  )
  return _best_blocks(mass, seen, none, top_k)


def _best_run(q, k, positions, layout, *, block_size, top_k, scale):
  b, t, h, _ = q.shape
  k = _whole_blocks(k, block_size, layout)
  num_blocks = k.shape[1] // block_size
  chunk = _chunks(t, b * h * num_blocks * block_size)

  def body(carry, x):
    q, pos = x
    mass, seen = _block_mass(q, k, pos, block_size, layout, scale)
    return carry, _best_blocks(mass, seen, jnp.zeros_like(seen), top_k)

  xs = (_split(q, chunk, 1), _split(positions, chunk, 1, fill=-1))
  _, chosen = _over_chunks(body, (), xs, chunk.count)
  return (_join(chosen, 2, t),)


def _block_mass(
  q: Float[Array, "B T H D"],
  k: Float[Array, "B N*bs K D"],
  positions: Int[Array, "B T"],
  block_size: int,
  layout: BlockLayout | None,
  scale: float,
) -> tuple[Float[Array, "B K T N"], Bool[Array, "B 1 T N"]]:
  """Attention mass of each block, and the blocks that each query sees.

  The mass is a mean over the heads of a group.
  """
  num_blocks = k.shape[1] // block_size
  visible = _visible_in_blocks(positions, num_blocks, block_size, layout)
  s = reference.head_scores(q, k, visible, scale)
  p = jnp.mean(reference.softmax(s, reference.masked_logsumexp(s)), axis=2)
  mass = jnp.sum(p.reshape(*p.shape[:-1], num_blocks, block_size), axis=-1)
  seen, _ = reference.visible_blocks(
    positions, num_blocks, block_size, 0, layout
  )
  return mass, seen


def _recall_sums(q, k, block_indices, positions, layout, *, block_size, scale):
  """The recalls' sums over queries and groups, and how many there are."""
  b, t, h, _ = q.shape
  top_k = block_indices.shape[-1]
  k = _whole_blocks(k, block_size, layout)
  num_blocks = k.shape[1] // block_size
  chunk = _chunks(t, b * h * num_blocks * block_size)
  ids = lax.expand_dims(jnp.arange(num_blocks), range(3))

  def body(carry, x):
    q, idx, pos = x
    mass, seen = _block_mass(q, k, pos, block_size, layout, scale)
    _, best = lax.top_k(jnp.where(seen, mass, -1), min(top_k, num_blocks))
    # Both choices become masks over all blocks, so that equal choices sum the
    # same numbers in the same order and give equal bits.
    picked, best = (
      jnp.any(x[..., None] == ids[..., None, :], axis=-2) & seen
      for x in (idx, best)
    )
    hits, counts = jnp.sum(picked & best, -1), jnp.sum(best, -1)
    recalls = (
      hits / jnp.maximum(counts, 1),
      *(jnp.sum(jnp.where(x, mass, 0), axis=-1) for x in (picked, best)),
    )
    counted = (pos >= 0)[:, None]
    sums = [jnp.sum(jnp.where(counted, x, 0)) for x in recalls]
    count = jnp.sum(jnp.broadcast_to(counted, hits.shape))
    return carry, (*sums, count)

  xs = (
    _split(q, chunk, 1),
    _split(block_indices, chunk, 2, fill=-1),
    _split(positions, chunk, 1, fill=-1),
  )
  _, sums = _over_chunks(body, (), xs, chunk.count)
  return tuple(map(jnp.sum, sums))


# --- decoding: few queries against a cache ----------------------------------


def _decode_block_scores(
  index_q: Float[Array, "B T K I"],
  index_k: Float[Array, "B C I"],
  index_k_scale: Float[Array, "B C"] | None,
  positions: Int[Array, "B T"],
  block_size: int,
) -> Float[Array, "B K T N"]:
  """Maximum of each block's index scores, over chunks of keys."""
  b, t, num_kv_heads, _ = index_q.shape
  capacity = index_k.shape[1]
  whole = capacity // block_size

  def score(first: Int[Array, ""] | int, num_blocks: int, size: int):
    def cut(x):
      return lax.dynamic_slice_in_dim(x, first, num_blocks * size, axis=1)

    scale = None if index_k_scale is None else cut(index_k_scale)
    s = reference.decode_scores(index_q, cut(index_k), scale)
    slot = lax.expand_dims(first + jnp.arange(num_blocks * size), range(3))
    s = jnp.where(slot <= positions[:, None, :, None], s, -jnp.inf)
    s = s.reshape(*s.shape[:-1], num_blocks, size)
    return reference.block_max(s)

  scores = []
  if whole:
    elements = b * num_kv_heads * t * whole * block_size
    size = -(-whole // -(-elements // _chunk_elements()))
    count = -(-whole // size)
    if count == 1:
      scores.append(score(0, whole, block_size))
    else:
      # All chunks have the same size and the last one ends with the last whole
      # block, so it may compute some blocks of the chunk before it again.
      def body(i, scores):
        first = jnp.minimum(i * size, whole - size)
        part = score(first * block_size, size, block_size)
        return lax.dynamic_update_slice_in_dim(scores, part, first, axis=3)

      shape = (b, num_kv_heads, t, whole)
      scores.append(
        lax.fori_loop(0, count, body, jnp.zeros(shape, compute_dtype(index_q)))
      )
  if capacity % block_size:
    scores.append(score(whole * block_size, 1, capacity % block_size))
  return jnp.concatenate(scores, axis=-1)


@functools.partial(
  jax.jit,
  static_argnames=(
    *("block_size", "top_k", "num_local_blocks", "scale", "axis_name"),
  ),
)
def decode_attention(
  q: Float[Array, "B T H D"],
  k: Float[Array, "B C K D"],
  v: Float[Array, "B C K D"],
  index_q: Float[Array, "B T K I"],
  index_k: Float[Array, "B C I"],
  *,
  kv_lengths: Int[Array, "B"],
  index_k_scale: Float[Array, "B C"] | None,
  block_size: int,
  top_k: int,
  num_local_blocks: int,
  scale: float,
  axis_name: str | None = None,
) -> tuple[Float[Array, "B T H D"], Int[Array, "B K T P"]]:
  """Selection and attention over a cache, see `msa_jax.decode_attention`.

  Each query gathers the keys and values of its chosen blocks and no others.
  """
  devices = 1 if axis_name is None else lax.axis_size(axis_name)
  positions = reference.query_positions(
    q.shape[1], k.shape[1] * devices, q.shape[0], kv_lengths
  )
  run = functools.partial(
    _decode_run,
    block_size=block_size,
    top_k=top_k,
    num_local_blocks=num_local_blocks,
    scale=scale,
    axis_name=axis_name,
  )
  letters = ("B T H D", "B C K D", "B C K D", "B T K I", "B C I", "B T", "B C")
  run = _by_rows_and_heads(run, letters, ("B T H D", "B K T P"))
  return run(q, k, v, index_q, index_k, positions, index_k_scale)


def _decode_run(
  q,
  k,
  v,
  index_q,
  index_k,
  positions,
  index_k_scale,
  *,
  block_size,
  top_k,
  num_local_blocks,
  scale,
  axis_name,
):
  b, t, h, d = q.shape
  num_kv_heads = k.shape[2]
  first = 0 if axis_name is None else lax.axis_index(axis_name) * k.shape[1]
  score = _decode_block_scores(
    index_q, index_k, index_k_scale, positions - first, block_size
  )
  ids = first // block_size + jnp.arange(score.shape[-1], dtype=jnp.int32)
  ids = lax.expand_dims(ids, range(3))
  own = jnp.where(positions < 0, -1, positions // block_size)
  own = own[:, None, :, None]
  visible, forced = ids <= own, (ids <= own) & (ids > own - num_local_blocks)
  block_indices = _best_blocks(score, visible, forced, top_k, axis_name)
  tokens = top_k * block_size
  offset = lax.expand_dims(jnp.arange(block_size), range(4))
  chunk = _chunks(t, b * num_kv_heads * tokens * d)
  batch_row = jnp.arange(b)[:, None, None, None]
  head = jnp.arange(num_kv_heads)[:, None, None]

  def body(carry, x):
    q, idx, pos = x
    slot = idx[..., None] * block_size + offset - first
    slot = slot.reshape(*idx.shape[:3], tokens)
    visible = jnp.repeat(idx >= 0, block_size, axis=-1)
    visible &= slot <= pos[:, None, :, None] - first
    visible &= (slot >= 0) & (slot < k.shape[1])
    slot = jnp.where(visible, slot, 0)
    # Like `reference.attend`, but each query has its own keys and values.
    q, bad_q = clean(q.reshape(b, -1, num_kv_heads, h // num_kv_heads, d))
    k_chosen, bad_k = clean(
      k.at[batch_row, slot, head].get(mode="promise_in_bounds")
    )
    v_chosen, bad_v = clean(
      v.at[batch_row, slot, head].get(mode="promise_in_bounds")
    )
    s = scale * jnp.einsum(
      "btkgd,bktjd->bktgj",
      q,
      k_chosen,
      precision=HIGHEST,
      preferred_element_type=compute_dtype(q),
    )
    bad_q = jnp.moveaxis(bad_q, 1, 2)[..., None]
    s = jnp.where(bad_q | bad_k[:, :, :, None], jnp.nan, s)
    s = jnp.where(visible[:, :, :, None], s, -jnp.inf)
    lse = reference.masked_logsumexp(s)
    p = reference.softmax(s, lse)
    out = jnp.einsum(
      "bktgj,bktjd->btkgd",
      p.astype(v.dtype),
      v_chosen,
      precision=HIGHEST,
      preferred_element_type=p.dtype,
    )
    poisoned = jnp.any(visible & bad_v, axis=-1)
    poisoned = jnp.moveaxis(poisoned, 1, 2)[..., None, None]
    out = jnp.where(poisoned, jnp.nan, out)
    if axis_name is not None:
      out, _ = _merge_parts(out, jnp.moveaxis(lse, 2, 1), axis_name)
    return carry, out.reshape(b, -1, h, d).astype(v.dtype)

  xs = (
    _split(q, chunk, 1),
    _split(block_indices, chunk, 2, fill=-1),
    _split(positions, chunk, 1, fill=-1),
  )
  _, out = _over_chunks(body, (), xs, chunk.count)
  return _join(out, 1, t), block_indices
