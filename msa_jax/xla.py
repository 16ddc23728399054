"""MiniMax Sparse Attention for any backend: only chosen blocks are computed.

The sparse path inverts the choice. It sorts all (query, block) pairs by block
and cuts each block's pairs into tiles of a fixed number of queries. A tile
gathers its queries (`_gather_queries`) and multiplies them with one block of
keys, so keys are not gathered for each query, and every shape is static. The
forward pass leaves one partial result for each pair, and each query combines
those of its P pairs. The backward pass sums dk and dv over a block's tiles in a
fixed order, so repeated runs give the same bits. The queries are processed in
chunks, so that the workspace, and with it memory, grows linearly with T and S.

Selection, the dense warm-up phase and the recalls loop over chunks of queries
with the formulas of `reference`.

In a packed row, `layout` says where the blocks lie. Keys are gathered into
blocks once, and from there on a block is a block: the last tokens of a short
one are masked. Selection, dense attention and recalls still score all keys of
a row, in memory linear in S.

Arguments are checked in `ops`, not here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool, Float, Int

from msa_jax import reference
from msa_jax.reference import HIGHEST, QueryMask, clean, compute_dtype
from msa_jax.segments import BlockLayout
from pallas_kernels import partition

# Elements of one chunk's largest intermediate array: 64 MiB in float32.
_CHUNK_ELEMENTS = 1 << 24
# Matrix rows of a tile: its queries times the heads of a group. 64 are enough
# for an efficient matmul, and the last tile of each block wastes few of them.
_TILE_ROWS = 64

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


class _Plan(NamedTuple):
  """The (query, block) pairs of one chunk, cut into M tiles of R queries.

  Each choice slot that holds a block before or at the query's own makes a pair.
  Queries are numbered over all batch rows and groups, (b K + k) C + c, with C
  queries in the chunk; so are blocks, (b K + k) N + n.

  Attributes:
    block: block of each tile; tiles are sorted by it.
    query: queries of each tile.
    visible: causal mask of each tile; all False where a tile has no query.
    position: position of each slot's pair among the M R queries of all tiles.
    used: whether the slot makes a pair; if not, its position means nothing.
    last: last tile of each block.
    picked: whether the block has tiles.
  """

  block: Int[Array, "M"]
  query: Int[Array, "M R"]
  visible: Bool[Array, "M R bs"]
  position: Int[Array, "B*K*C P"]
  used: Bool[Array, "B*K*C P"]
  last: Int[Array, "B*K*N"]
  picked: Bool[Array, "B*K*N"]


def _plan(
  block_indices: Int[Array, "B K C P"],
  positions: Int[Array, "B C"],
  k_blocks: Float[Array, "B*K*N bs D"],
  group_size: int,
  layout: BlockLayout | None,
) -> _Plan:
  """Sorts a chunk's pairs by block and cuts them into tiles."""
  b, num_kv_heads, c, p = block_indices.shape
  total_blocks, block_size, _ = k_blocks.shape
  num_blocks = total_blocks // (b * num_kv_heads)
  tile_queries = max(_TILE_ROWS // group_size, 1)
  pairs = b * num_kv_heads * c * p

  used = _is_visible(block_indices, positions, block_size, layout)
  group = jnp.arange(b * num_kv_heads, dtype=jnp.int32)
  group = group.reshape(b, num_kv_heads, 1, 1)
  key = jnp.where(used, group * num_blocks + block_indices, total_blocks)
  key, used = key.reshape(-1), used.reshape(-1, p)

  order = jnp.argsort(key, stable=True).astype(jnp.int32)
  rank = (
    jnp.zeros_like(order)
    .at[order]
    .set(jnp.arange(pairs, dtype=jnp.int32), unique_indices=True)
  )
  # Sums of scattered ones, because `jnp.searchsorted` fails inside of a
  # `jax.shard_map` over some of the mesh's axes with check_vma=True (jax 0.11).
  count = jnp.zeros((total_blocks + 1,), jnp.int32).at[key].add(1)
  start = jnp.cumsum(count, dtype=jnp.int32) - count
  count = count[:-1]
  tiles = -(-count // tile_queries)
  tile_end = jnp.cumsum(tiles).astype(jnp.int32)
  tile_start = tile_end - tiles

  # Only the last tile of a block can be incomplete, which bounds the number.
  num_tiles = pairs // tile_queries + min(total_blocks, pairs)
  tile = jnp.arange(num_tiles, dtype=jnp.int32)
  ends = jnp.zeros((num_tiles,), jnp.int32).at[tile_end].add(1, mode="drop")
  block = jnp.cumsum(ends, dtype=jnp.int32)
  real = block < total_blocks
  block = jnp.minimum(block, total_blocks - 1)
  at = start[block] + (tile - tile_start[block]) * tile_queries
  at = at[:, None] + jnp.arange(tile_queries, dtype=jnp.int32)[None]
  live = real[:, None] & (at < start[block + 1][:, None])
  query = order[jnp.clip(at, 0, pairs - 1)] // p

  query_slot = positions[query // (num_kv_heads * c), query % c]
  if layout is None:
    first_token = (block % num_blocks * block_size)[:, None]
    token = first_token + jnp.arange(block_size)[None]
  else:
    slots, inside = reference.block_slots(layout, block_size)
    row = block // (num_kv_heads * num_blocks)
    # No query stands behind a slot of kv_len, so it is visible to none.
    token = jnp.where(inside, slots, layout.own_block.shape[1])
    token = token[row, block % num_blocks]
  visible = live[..., None] & (token[:, None] <= query_slot[..., None])

  pair_block = jnp.minimum(key, total_blocks - 1)
  offset = rank - start[pair_block]
  position = tile_start[pair_block] * tile_queries + offset
  position = jnp.clip(position, 0, num_tiles * tile_queries - 1).reshape(-1, p)
  last = jnp.maximum(tile_end - 1, 0)
  return _Plan(block, query, visible, position, used, last, count > 0)


def _is_visible(
  block_indices: Int[Array, "B K C P"],
  positions: Int[Array, "B C"],
  block_size: int,
  layout: BlockLayout | None,
) -> Bool[Array, "B K C P"]:
  """Which choice slots hold a block that the query sees."""
  if layout is None:
    own = jnp.where(positions < 0, -1, positions // block_size)
    own = own[:, None, :, None]
    return (block_indices >= 0) & (block_indices <= own)
  num_blocks = layout.block_start.shape[1]
  named = (block_indices >= 0) & (block_indices < num_blocks)
  ids = jnp.where(named, block_indices, 0)
  row = jnp.arange(ids.shape[0])[:, None, None, None]
  position = positions[:, None, :, None]
  return (
    named
    & (layout.block_start[row, ids] <= position)
    & (position < layout.block_until[row, ids])
  )


def _blocks(
  x: Float[Array, "B S K D"], block_size: int, layout: BlockLayout | None
) -> Float[Array, "B*K*N bs D"]:
  """Cuts each head's tokens into blocks; zeros pad incomplete blocks."""
  b, s, h, d = x.shape
  if layout is not None:
    slots, inside = reference.block_slots(layout, block_size)
    x = x[jnp.arange(b)[:, None, None], slots]
    x = jnp.where(inside[..., None, None], x, 0)
    return jnp.moveaxis(x, 3, 1).reshape(-1, block_size, d)
  n = -(-s // block_size)
  x = jnp.pad(x, ((0, 0), (0, n * block_size - s), (0, 0), (0, 0)))
  return jnp.moveaxis(x, 2, 1).reshape(b * h * n, block_size, d)


def _unblock(
  x: Float[Array, "B*K*N bs D"],
  batch: int,
  num_heads: int,
  kv_len: int,
  layout: BlockLayout | None,
) -> Float[Array, "B S K D"]:
  """Undoes `_blocks`; zeros for padding."""
  block_size = x.shape[1]
  x = x.reshape(batch, num_heads, -1, x.shape[-1])
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


def _by_query(
  x: Float[Array, "B C H *D"], num_kv_heads: int
) -> Float[Array, "B*K*C G *D"]:
  """One entry for each (batch row, group, query), which holds G heads."""
  b, c, h = x.shape[:3]
  x = x.reshape(b, c, num_kv_heads, h // num_kv_heads, *x.shape[3:])
  x = jnp.moveaxis(x, 2, 1)
  return x.reshape(b * num_kv_heads * c, h // num_kv_heads, *x.shape[4:])


def _from_queries(
  x: Float[Array, "B*K*C G *D"], batch: int, q_len: int
) -> Float[Array, "B C H *D"]:
  x = x.reshape(batch, -1, q_len, *x.shape[1:])
  x = jnp.moveaxis(x, 1, 2)
  return x.reshape(batch, q_len, x.shape[2] * x.shape[3], *x.shape[4:])


def _scores(
  q: Float[Array, "M R*G D"],
  bad_q: Bool[Array, "M R*G"],
  k: Float[Array, "M bs D"],
  bad_k: Bool[Array, "M bs"],
  visible: Bool[Array, "M R*G bs"],
  scale: float,
) -> Float[Array, "M R*G bs"]:
  s = scale * jnp.einsum(
    "mrd,mjd->mrj",
    q,
    k,
    precision=HIGHEST,
    preferred_element_type=compute_dtype(q),
  )
  s = jnp.where(bad_q[..., None] | bad_k[:, None], jnp.nan, s)
  return jnp.where(visible, s, -jnp.inf)


def _gather_queries(
  x: Float[Array, "B*K*C G *D"], query: Int[Array, "M R"]
) -> Float[Array, "M R*G *D"]:
  """Gathers each tile's queries, with a query's heads next to each other."""
  m, r = query.shape
  return x[query].reshape(m, r * x.shape[1], *x.shape[2:])


def _head_mask(
  visible: Bool[Array, "M R bs"], group_size: int
) -> Bool[Array, "M R*G bs"]:
  return jnp.repeat(visible, group_size, axis=1)


def _pairs_of_queries(
  x: Float[Array, "M R*G *D"], plan: _Plan, group_size: int
) -> Float[Array, "B*K*C P G *D"]:
  """Brings the tiles' values of each pair and head back to their queries."""
  m, r = plan.query.shape
  x = x.reshape(m * r, group_size, *x.shape[2:])
  return x[plan.position]


def _sum_pairs(
  x: Float[Array, "M R*G *D"], plan: _Plan, group_size: int
) -> Float[Array, "B*K*C G *D"]:
  """Sums the tiles' values of each query over its pairs."""
  x = _pairs_of_queries(x, plan, group_size)
  used = plan.used.reshape(plan.used.shape + (1,) * (x.ndim - 2))
  return jnp.sum(jnp.where(used, x, 0), axis=1)


def _sum_tiles(
  x: Float[Array, "M bs D"], plan: _Plan
) -> Float[Array, "B*K*N bs D"]:
  """Sums each block's tiles in a fixed order; 0 for blocks without tiles.

  A scatter-add would be enough on a CPU, but on a GPU its order, and so the
  result's last bits, would vary. Tiles are sorted by block, so a segmented scan
  can add them.
  """

  def add(left, right):
    left_block, left_x = left
    right_block, right_x = right
    same = (left_block == right_block)[:, None, None]
    return right_block, right_x + jnp.where(same, left_x, 0)

  _, total = lax.associative_scan(add, (plan.block, x))
  return jnp.where(plan.picked[:, None, None], total[plan.last], 0)


def _log_sum_exp(
  m: Float[Array, "M R*G"],
  l: Float[Array, "M R*G"],
  plan: _Plan,
  group_size: int,
) -> Float[Array, "B*K*C G"]:
  """Combines the pairs' maxima and sums into each query's log sum exp."""
  used = plan.used[..., None]
  m = jnp.where(used, _pairs_of_queries(m, plan, group_size), -jnp.inf)
  l = jnp.where(used, _pairs_of_queries(l, plan, group_size), 0)
  top = jnp.max(m, axis=1)
  top = jnp.where(top == -jnp.inf, 0, top)
  total = jnp.sum(jnp.exp(m - top[:, None]) * l, axis=1)
  return jnp.where(
    total == 0, -jnp.inf, top + jnp.log(jnp.where(total == 0, 1, total))
  )


def _softmax_stats(
  s: Float[Array, "M R*G bs"],
) -> tuple[Float[Array, "M R*G"], Float[Array, "M R*G"]]:
  """Maximum of each pair's scores, and sum of their exponentials."""
  m = jnp.max(s, axis=-1)
  safe = jnp.where(m == -jnp.inf, 0, m)
  return m, jnp.sum(jnp.exp(s - safe[..., None]), axis=-1)


def _finite_lse(lse: Float[Array, "*A"]) -> Float[Array, "*A"]:
  """Replaces -inf by 0, so that exp(-inf - lse) is 0 for empty queries."""
  return jnp.where(lse == -jnp.inf, 0, lse)


# --- sparse attention ------------------------------------------------------


class _Chunk(NamedTuple):
  """Static sizes of one call's chunks of queries."""

  size: int  # queries of a chunk
  count: int
  pad: int  # queries added to fill the last chunk


def _chunks(q_len: int, elements_per_query: int) -> _Chunk:
  """The fewest chunks whose largest array stays within _CHUNK_ELEMENTS."""
  count = -(-q_len * elements_per_query // _CHUNK_ELEMENTS)
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


def _over_chunks(body: Callable, carry, xs, chunk: _Chunk) -> tuple[Any, Any]:
  """`lax.scan`, but without a loop if there is only one chunk."""
  if chunk.count == 1:
    carry, ys = body(carry, jax.tree.map(lambda x: x[0], xs))
    return carry, jax.tree.map(lambda y: y[None], ys)
  return lax.scan(body, carry, xs)


def _sparse_chunks(q, block_indices, block_size) -> _Chunk:
  b, t, h, d = q.shape
  return _chunks(t, b * h * block_indices.shape[-1] * max(d, block_size))


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


def _tile_scores(plan, queries, bad_q, k_blocks, bad_k, scale):
  """Main-branch scores of every tile."""
  group_size = queries.shape[1]
  return _scores(
    _gather_queries(queries, plan.query),
    _gather_queries(bad_q, plan.query),
    k_blocks[plan.block],
    bad_k[plan.block],
    _head_mask(plan.visible, group_size),
    scale,
  )


def _sparse_run(
  q, k, v, block_indices, positions, layout, *, block_size, scale
):  # fmt: skip
  b, t, h, _ = q.shape
  num_kv_heads = k.shape[2]
  group_size = h // num_kv_heads
  chunk = _sparse_chunks(q, block_indices, block_size)
  k_blocks, bad_k = clean(_blocks(k, block_size, layout))
  v_blocks, bad_v = clean(_blocks(v, block_size, layout))

  def body(carry, x):
    q, idx, pos = x
    plan = _plan(idx, pos, k_blocks, group_size, layout)
    queries, bad_q = clean(_by_query(q, num_kv_heads))
    s = _tile_scores(plan, queries, bad_q, k_blocks, bad_k, scale)
    m, l = _softmax_stats(s)
    p = jnp.exp(s - _finite_lse(m)[..., None])
    o = jnp.einsum(
      "mrj,mjd->mrd",
      p.astype(v.dtype),
      v_blocks[plan.block],
      precision=HIGHEST,
      preferred_element_type=p.dtype,
    )
    poisoned = jnp.any(plan.visible & bad_v[plan.block][:, None], axis=-1)
    poisoned = jnp.repeat(poisoned, group_size, axis=1)
    o = jnp.where(poisoned[..., None], jnp.nan, o)
    lse = _log_sum_exp(m, l, plan, group_size)
    # The weight of each pair in the output is exp(m of the pair - lse).
    m = _pairs_of_queries(m, plan, group_size)
    m = jnp.where(plan.used[..., None], m, -jnp.inf)
    weight = jnp.exp(m - _finite_lse(lse)[:, None])
    o = _pairs_of_queries(o, plan, group_size)
    o = jnp.where(plan.used[..., None, None], o, 0)
    out = jnp.sum(weight[..., None] * o, axis=1)
    out = _from_queries(out, b, q.shape[1]).astype(q.dtype)
    return carry, (out, _from_queries(lse, b, q.shape[1]))

  xs = (
    _split(q, chunk, 1),
    _split(block_indices, chunk, 2, fill=-1),
    _split(positions, chunk, 1),
  )
  _, (out, lse) = _over_chunks(body, (), xs, chunk)
  return _join(out, 1, t), jnp.moveaxis(_join(lse, 1, t), 1, 2)


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
  b, t, h, _ = q.shape
  kv_len, num_kv_heads = k.shape[1], k.shape[2]
  group_size = h // num_kv_heads
  dtype = compute_dtype(q)
  chunk = _sparse_chunks(q, block_indices, block_size)
  k_blocks, bad_k = clean(_blocks(k, block_size, layout))
  v_blocks, bad_v = clean(_blocks(v, block_size, layout))

  def einsum(spec, a, b):
    return jnp.einsum(
      spec, a, b, precision=HIGHEST, preferred_element_type=dtype
    )

  def body(carry, x):
    dk, dv = carry
    q, d_out, delta, lse, idx, pos = x
    plan = _plan(idx, pos, k_blocks, group_size, layout)
    visible = _head_mask(plan.visible, group_size)
    queries, bad_q = clean(_by_query(q, num_kv_heads))
    d_queries, bad_d = clean(_by_query(d_out, num_kv_heads))
    s = _tile_scores(plan, queries, bad_q | bad_d, k_blocks, bad_k, scale)
    lse = _gather_queries(_finite_lse(_by_query(lse, num_kv_heads)), plan.query)
    p = jnp.exp(s - lse[..., None])
    p = jnp.where(visible, p, 0)
    q_tile = _gather_queries(queries, plan.query)
    d_tile = _gather_queries(d_queries, plan.query)
    v_tile, k_tile = v_blocks[plan.block], k_blocks[plan.block]
    dp = einsum("mrd,mjd->mrj", d_tile, v_tile)
    dp = jnp.where(bad_v[plan.block][:, None], jnp.nan, dp)
    delta = _gather_queries(_by_query(delta, num_kv_heads), plan.query)
    ds = jnp.where(visible, p * (dp - delta[..., None]) * scale, 0)
    ds, p = ds.astype(q.dtype), p.astype(q.dtype)
    dq = _sum_pairs(einsum("mrj,mjd->mrd", ds, k_tile), plan, group_size)
    dk += _sum_tiles(einsum("mrj,mrd->mjd", ds, q_tile), plan)
    dv += _sum_tiles(einsum("mrj,mrd->mjd", p, d_tile), plan)
    return (dk, dv), _from_queries(dq, b, q.shape[1]).astype(q.dtype)

  xs = (
    _split(q, chunk, 1),
    _split(d_out, chunk, 1),
    _split(delta, chunk, 1),
    _split(jnp.moveaxis(lse, 1, 2), chunk, 1, fill=-jnp.inf),
    _split(block_indices, chunk, 2, fill=-1),
    _split(positions, chunk, 1),
  )
  zeros = jnp.zeros(k_blocks.shape, dtype)
  (dk, dv), dq = _over_chunks(body, (zeros, zeros), xs, chunk)
  dk = _unblock(dk, b, num_kv_heads, kv_len, layout).astype(k.dtype)
  dv = _unblock(dv, b, num_kv_heads, kv_len, layout).astype(v.dtype)
  return _join(dq, 1, t), dk, dv


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
  b, t, h, _ = q.shape
  kv_len, num_kv_heads = k.shape[1], k.shape[2]
  group_size = h // num_kv_heads
  dtype = compute_dtype(q)
  chunk = _sparse_chunks(q, block_indices, block_size)
  k_blocks, bad_k = clean(_blocks(k, block_size, layout))
  num_blocks = k_blocks.shape[0] // (b * num_kv_heads)
  ik_blocks, bad_ik = clean(_blocks(index_k[:, :, None], block_size, layout))

  def body(carry, x):
    total, d_ik = carry
    q, index_q, lse, idx, pos, weights = x
    plan = _plan(idx, pos, k_blocks, group_size, layout)
    m, r = plan.query.shape
    queries, bad_q = clean(_by_query(q, num_kv_heads))
    s = _tile_scores(plan, queries, bad_q, k_blocks, bad_k, scale)
    lse = _gather_queries(_finite_lse(_by_query(lse, num_kv_heads)), plan.query)
    p = jnp.exp(s - lse[..., None])
    p = jnp.mean(p.reshape(m, r, group_size, -1), axis=2)
    p = jnp.where(plan.visible, p, 0)

    iq_queries, bad_iq = clean(_by_query(index_q, num_kv_heads))
    # All groups share one index key head: (b K + k) N + n -> b N + n.
    shared = (
      plan.block // (num_kv_heads * num_blocks) * num_blocks
      + plan.block % num_blocks
    )
    iq_tile, ik_tile = (
      _gather_queries(iq_queries, plan.query),
      ik_blocks[shared],
    )
    u = _scores(
      iq_tile,
      _gather_queries(bad_iq, plan.query),
      ik_tile,
      bad_ik[shared],
      plan.visible,
      index_scale,
    )
    u_lse = _finite_lse(_log_sum_exp(*_softmax_stats(u), plan, 1))
    log_r = u - _gather_queries(u_lse, plan.query)[..., None]
    live = p != 0
    log_ratio = jnp.log(jnp.where(live, p, 1)) - jnp.where(live, log_r, 0)
    row_kl = jnp.sum(jnp.where(live, p * log_ratio, 0), axis=-1)
    weight = None
    if weights is not None:
      weight = jnp.repeat(weights[..., None], num_kv_heads, axis=2)
      weight = _gather_queries(_by_query(weight, num_kv_heads), plan.query)
      row_kl *= weight
    total += jnp.sum(_sum_pairs(row_kl, plan, 1))

    du = jnp.where(plan.visible, jnp.exp(log_r) - p, 0) * index_scale / divisor
    du = (du if weight is None else du * weight[..., None]).astype(dtype)
    d_iq = jnp.einsum(
      "mrj,mji->mri", du, ik_tile.astype(dtype), precision=HIGHEST
    )
    d_tile = jnp.einsum(
      "mrj,mri->mji", du, iq_tile.astype(dtype), precision=HIGHEST
    )
    d_iq = _from_queries(_sum_pairs(d_iq, plan, 1), b, q.shape[1])
    return (total, d_ik + _sum_tiles(d_tile, plan)), d_iq

  xs = (
    _split(q, chunk, 1),
    _split(index_q, chunk, 1),
    _split(jnp.moveaxis(lse, 1, 2), chunk, 1, fill=-jnp.inf),
    _split(block_indices, chunk, 2, fill=-1),
    _split(positions, chunk, 1),
    None if weights is None else _split(weights.astype(dtype), chunk, 1),
  )
  carry = (
    jnp.zeros((), dtype),
    jnp.zeros((k_blocks.shape[0], block_size, index_k.shape[-1]), dtype),
  )
  (total, d_ik), d_iq = _over_chunks(body, carry, xs, chunk)
  d_ik = jnp.sum(_unblock(d_ik, b, num_kv_heads, kv_len, layout), axis=2)
  return total / divisor.astype(dtype), _join(d_iq, 1, t), d_ik


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
  b, t, num_kv_heads, _ = index_q.shape
  if score_precision == "fp8":
    index_q = reference.quantise_fp8(index_q)
    index_k = reference.quantise_fp8(index_k)
  index_k = _whole_blocks(index_k[:, :, None], block_size, layout)[:, :, 0]
  num_blocks = index_k.shape[1] // block_size
  chunk = _chunks(t, b * num_kv_heads * num_blocks * block_size)

  def body(carry, x):
    index_q, pos = x
    s = reference.index_scores(index_q, index_k)
    visible = _visible_in_blocks(pos, num_blocks, block_size, layout)
    s = jnp.where(visible, s, -jnp.inf)
    s = s.reshape(*s.shape[:-1], num_blocks, block_size)
    score = reference.block_max(s)
    visible, forced = reference.visible_blocks(
      pos, num_blocks, block_size, num_local_blocks, layout
    )
    return carry, _best_blocks(score, visible, forced, top_k)

  xs = (_split(index_q, chunk, 1), _split(positions, chunk, 1, fill=-1))
  _, chosen = _over_chunks(body, (), xs, chunk)
  return (_join(chosen, 2, t),)


def _whole_blocks(
  x: Float[Array, "B S K D"], block_size: int, layout: BlockLayout | None
) -> Float[Array, "B N*bs K D"]:
  """The tokens, one block after another; zeros pad incomplete blocks."""
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
  _, (out, lse, kl) = _over_chunks(jax.checkpoint(body), (), xs, chunk)
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
  _, chosen = _over_chunks(body, (), xs, chunk)
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
  _, sums = _over_chunks(body, (), xs, chunk)
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
    size = -(-whole // -(-elements // _CHUNK_ELEMENTS))
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
  _, out = _over_chunks(body, (), xs, chunk)
  return _join(out, 1, t), block_indices
