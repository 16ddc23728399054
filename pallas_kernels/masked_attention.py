"""Dense attention under a column mask on Hopper, with gradients.

Query t of a row stands at slot first_slot + t, and sees the key at slot j iff
j <= slot < until[j], unless it is padding: a query sees its own key or nothing.
For a plain row `until` is the number of keys, for packed documents the end of
j's document, for prefix trees the end of the subtree of j's node
(`msa_jax.segments`). For query t and head h, over the visible keys J:

  out = softmax_J(scale q.k) v      lse = log sum_J exp(scale q.k)

The warm-up phase attends with it wherever cuDNN's causal attention
(`dense_attention`) does not fit: in packed rows, in rows with kv_lengths, and
where there are fewer queries than keys. `GQAttention` takes it for packed rows.

A *tile* is 128 neighbouring queries or keys. `plan_tiles` lists for each tile
of queries the tiles of keys of which any is seen, first those that need no
mask. Other tiles are neither read nor multiplied. The list holds (T / 128)
(S / 128) int32. Three kernels, with persistent CTAs, longest work first:

* **forward**: a CTA owns a tile of queries of one head, 64 queries for each of
  two compute warpgroups, which walk the key tiles with an online softmax. A
  third warpgroup copies. The heads of a group follow one another, so that they
  read the same keys from L2.
* **dq**: likewise, with p = exp(scale q.k - lse) and ds = p (dout.v - delta),
  where delta = out.dout - dlse: dq = scale sum_j ds_j k_j.
* **dk and dv**: a CTA owns a tile of keys of one KV head, 64 for each of two
  compute warpgroups. They walk the queries that see the tile, 64 at a time and
  one head after another, with keys as MMA rows: dv = sum p dout and
  dk = scale sum ds q stay in registers over all heads of the group.

So each sum has one owner and a fixed order. Bound: 4 D FLOP a visible (query,
key) pair and head in the forward pass and 14 D in the backward pass, which
computes scores and dout.v twice; the convention counts 10 D. At 600 TFLOP/s of
products that is 430 in the backward pass.

SMEM at D 128: forward 32 KB of queries, 128 of K and V, 32 of out; dq 64 KB of
q and dout, 128 of K and V, and dq is written through q's buffer; dk and dv 64
KB of K and V, 96 of q and dout, 32 of results.

Barriers, between compute warpgroups 0 and 1 and the copy warpgroup. Copies make
each ring ready, and 0 and 1 wait for it; both of these release it, and the copy
warpgroup waits before it fills a slot again.

  forward, dq  filled with                         released
  q_ring       queries (and dout) of 0 and of 1    after their last key tile
  k_ring       a tile of keys                      after its last product
  v_ring       a tile of values                    after its product

  dk and dv    filled with                         released
  kv_ring      keys and values of 0 and of 1       after their last queries
  q_ring       64 queries of a head, dout, lse     after their last product
               and delta

NaN: non-finite operands are zeroed before the kernels, and what depends on one
is set to NaN after them.

Not supported: what `mosaic.check_supported` and `mosaic.check_dense_supported`
refuse; gradients of gradients.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import mosaic, packed_rows, partition
from pallas_kernels.mosaic import FLOOR

ACC = plgpu.WGMMAAccumulatorRef
ROWS = 64  # MMA rows of a compute warpgroup
TILE = 128  # queries or keys of a tile


@dataclasses.dataclass(frozen=True)
class Config:
  """Pipeline sizes; the result changes by rounding only.

  Attributes:
    stages: key tiles in flight (forward and dq).
    columns: keys whose scores are computed at once (dq), 64 or 128.
    query_stages: tiles of 64 queries in flight (dk and dv).
    num_ctas: CTAs of the persistent grids.
  """

  stages: int = 2
  columns: int = 64
  query_stages: int = 3
  num_ctas: int = mosaic.NUM_SMS


@dataclasses.dataclass(frozen=True)
class KernelParams:
  """Static parameters of one call, after padding."""

  num_heads: int
  num_kv_heads: int
  query_tiles: int
  key_tiles: int
  head_dim: int
  dtype: jnp.dtype
  scale: float
  config: Config
  interpret: bool

  @property
  def group_size(self) -> int:
    return self.num_heads // self.num_kv_heads

  @property
  def scale_log2(self) -> float:
    return self.scale * mosaic.LOG2E

  def operand(self, *sizes: int) -> plgpu.SMEM:
    return plgpu.SMEM(sizes, self.dtype, transforms=mosaic.OPERAND)

  def register_operands(self, columns: int) -> dict[str, plgpu.SMEM]:
    """SMEM for them: interpreted wgmma takes no register operand."""
    return dict(p_smem=self.operand(2, ROWS, columns)) if self.interpret else {}


class Plan(NamedTuple):
  """Which tiles of the other side each tile of queries, or of keys, meets.

  Attributes:
    order: int32 [B * tiles]: tiles of all batch rows, those of most work first.
    counts: int32 [B * tiles, 2]: the number of tiles that need no mask, and of
      all.
    tiles: int32 [B * tiles, other tiles]: first those without a mask.
  """

  order: Int[Array, "A"]
  counts: Int[Array, "A 2"]
  tiles: Int[Array, "A C"]


def plan_tiles(
  until: Int[Array, "B S"], first_slot: Int[Array, "B"], q_len: int
) -> tuple[Plan, Plan]:
  """The plan of tiles of queries, and that of tiles of keys.

  Args:
    until: the slot from which on each key is not seen any more, S a multiple
      of `TILE`; 0 for padding.
    first_slot: slot of the first query; negative if the first ones see nothing.
    q_len: queries; those of a last tile that are no queries see nothing.
  """
  b, keys = until.shape
  slot = jnp.arange(keys, dtype=jnp.int32)
  seen_until = jnp.where(until > slot, until, 0).reshape(b, -1, TILE)
  last_until = seen_until.max(axis=-1)[:, None]  # [B, 1, key tiles]
  first_until = seen_until.min(axis=-1)[:, None]
  first_key = slot[::TILE]
  tile = jnp.arange(-(-q_len // TILE), dtype=jnp.int32) * TILE
  first = first_slot[:, None, None] + tile[None, :, None]  # [B, query tiles, 1]
  last = jnp.minimum(first + TILE, first_slot[:, None, None] + q_len) - 1
  some = (first_key <= last) & (last_until > jnp.maximum(first, first_key))
  every = some & (first_key + TILE - 1 <= first) & (first_until > last)

  def lists(some, every) -> Plan:
    others = some.shape[-1]
    kind = 2 - some.astype(jnp.int32) - every.astype(jnp.int32)
    code = lax.sort(kind * others + jnp.arange(others, dtype=jnp.int32))
    counts = jnp.stack([every.sum(-1), some.sum(-1)], axis=-1)
    counts = counts.astype(jnp.int32).reshape(-1, 2)
    order = jnp.argsort(-counts[:, 1], stable=True).astype(jnp.int32)
    return Plan(order, counts, (code % others).reshape(-1, others))

  return lists(some, every), lists(some.swapaxes(1, 2), every.swapaxes(1, 2))


def _vector(value: float):
  layout = plgpu.Layout.WGMMA.reduce(1)
  return plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), layout)


def _zeros(columns: int):
  x = jnp.full((ROWS, columns), 0.0, jnp.float32)
  return plgpu.layout_cast(x, plgpu.Layout.WGMMA)


def _over_columns(x, columns: int):
  return lax.broadcast_in_dim(x, (ROWS, columns), [0])


def _over_rows(x):
  return lax.broadcast_in_dim(x, (ROWS, x.shape[0]), [1])


def _iota(columns: int, axis: int):
  return plgpu.broadcasted_iota(
    jnp.int32, (ROWS, columns), axis, layout=plgpu.Layout.WGMMA
  )


def _product(a_smem, b_smem, columns: int):
  """a b^T of operands in SMEM, [64, columns]."""

  def product(acc):
    plgpu.wgmma(acc, a_smem, b_smem.transpose((1, 0)))
    return acc[...]

  return pl.run_scoped(product, ACC((ROWS, columns), jnp.float32))


def _add_product(acc, a, b_smem, params: KernelParams, p_smem):
  """acc + a b, with a in registers."""
  a = a.astype(params.dtype)
  if not params.interpret:
    return pl.run_state(lambda ref: plgpu.wgmma(ref, a, b_smem))(ACC.init(acc))
  p_smem[...] = a
  plgpu.commit_smem()

  def product(ref):
    plgpu.wgmma(ref, p_smem, b_smem)
    return ref[...]

  return acc + pl.run_scoped(product, ACC(acc.shape, jnp.float32))


def _my_items(total: int, cta, params: KernelParams):
  num_ctas = params.config.num_ctas
  return (total - cta + num_ctas - 1) // num_ctas


def _query_item(i, cta, params: KernelParams, order_gmem):
  """The tile, batch row, head and first query of a CTA's i-th item."""
  index = cta + i * params.config.num_ctas
  tile = order_gmem[index // params.num_heads]
  batch_row = tile // params.query_tiles
  first = lax.rem(tile, params.query_tiles) * TILE
  return tile, batch_row, lax.rem(index, params.num_heads), first


def _visible(until_gmem, batch_row, first_key, first_slot, columns: int):
  """The mask of 64 queries from first_slot on, and keys from first_key on."""
  until = plgpu.load(
    until_gmem.at[batch_row, mosaic.span(first_key, columns)],
    layout=plgpu.Layout.WGMMA.reduce(0),
    optimized=False,
  )
  slot = first_slot + _iota(columns, 0)
  return (first_key + _iota(columns, 1) <= slot) & (slot < _over_rows(until))


def _copy_walk(
  cta, params: KernelParams, gmem, smem, q_ring, k_ring, v_ring
) -> None:
  """The copy warpgroup of the forward and the dq kernel.

  Args:
    cta: number of the CTA.
    params: static parameters.
    gmem: order, counts, tiles, k, v, and the operands of the queries.
    smem: k, v, and where the operands of the queries go.
    q_ring, k_ring, v_ring: see the table of barriers.
  """
  order_gmem, counts_gmem, tiles_gmem, k_gmem, v_gmem, *query_gmem = gmem
  k_smem, v_smem, *query_smem = smem
  total = counts_gmem.shape[0] * params.num_heads
  d = params.head_dim

  def item(i, step):
    tile, batch_row, head, first = _query_item(i, cta, params, order_gmem)
    ready = q_ring.ready_at(q_ring.wait_free(i))
    columns = mosaic.span(head * d, d)
    for h in range(2):
      rows = mosaic.span(first + h * ROWS, ROWS)
      for source, target in zip(query_gmem, query_smem):
        plgpu.copy_gmem_to_smem(
          source.at[batch_row, rows, columns], target.at[h], ready
        )
    kv_columns = mosaic.span((head // params.group_size) * d, d)

    def walk(j, step):
      rows = mosaic.span(tiles_gmem[tile, j] * TILE, TILE)
      for source, target, ring in (
        (k_gmem, k_smem, k_ring),
        (v_gmem, v_smem, v_ring),
      ):
        slot = ring.wait_free(step)
        plgpu.copy_gmem_to_smem(
          source.at[batch_row, rows, kv_columns],
          target.at[slot],
          ring.ready_at(slot),
        )
      return step + 1

    return lax.fori_loop(0, counts_gmem[tile, 1], walk, step)

  my_items = _my_items(total, cta, params)
  step = lax.fori_loop(0, my_items, item, jnp.int32(0))
  mosaic.drain_rings(step, k_ring, v_ring)
  mosaic.drain_rings(my_items, q_ring)


def _forward_kernel(
  out, lse, plan: Plan, first_slot, until, q, k, v, *, params: KernelParams
):
  """Fills out [B, T', H D] and lse, base 2, [B, H, T'].

  lse is -inf where a query sees nothing.
  """
  s, config, d = params, params.config, params.head_dim

  def body(
    *, order_gmem, counts_gmem, tiles_gmem, first_gmem, until_gmem, q_gmem,
    k_gmem, v_gmem, out_gmem, lse_gmem, q_smem, k_smem, v_smem, out_smem,
    q_ring, k_ring, v_ring, p_smem: Any = None,
  ):  # fmt: skip
    cta, wg = lax.axis_index("cta"), lax.axis_index("wg")

    @pl.when(wg < 2)
    def _compute():
      plgpu.set_max_registers(232, action="increase")
      p_mine = p_smem.at[wg] if s.interpret else None

      def item(i, step):
        tile, batch_row, head, first = _query_item(i, cta, s, order_gmem)
        mine = first + wg * ROWS
        my_slot = first_gmem[batch_row] + mine
        num_plain, count = counts_gmem[tile, 0], counts_gmem[tile, 1]
        q_ring.wait_ready(0)

        def attend(j, carry, masked: bool):
          acc, m_i, l_i = carry
          slot = k_ring.slot(step + j)
          k_ring.wait_ready(slot)
          scores = _product(q_smem.at[wg], k_smem.at[slot], TILE)
          k_ring.release(slot)
          scores = scores * s.scale_log2
          if masked:
            first_key = tiles_gmem[tile, j] * TILE
            seen = _visible(until_gmem, batch_row, first_key, my_slot, TILE)
            scores = jnp.where(seen, scores, FLOOR)
          m_new = jnp.maximum(m_i, scores.max(axis=1))
          alpha = jnp.exp2(m_i - m_new)
          p = jnp.exp2(scores - _over_columns(m_new, TILE))
          l_i = l_i * alpha + p.sum(axis=1)
          acc = acc * _over_columns(alpha, d)
          v_ring.wait_ready(slot)
          acc = _add_product(acc, p, v_smem.at[slot], s, p_mine)
          v_ring.release(slot)
          return acc, m_new, l_i

        carry = _zeros(d), _vector(FLOOR), _vector(0.0)
        carry = lax.fori_loop(
          0, num_plain, functools.partial(attend, masked=False), carry
        )
        acc, m_i, l_i = lax.fori_loop(
          num_plain, count, functools.partial(attend, masked=True), carry
        )
        q_ring.release(0)
        # A row of FLOOR alone has counted what it does not see.
        sees = m_i > FLOOR / 2
        share = jnp.where(sees, 1.0 / l_i, 0.0)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        out_smem[wg] = (acc * _over_columns(share, d)).astype(s.dtype)
        plgpu.commit_smem()
        rows = mosaic.span(mine, ROWS)
        plgpu.copy_smem_to_gmem(
          out_smem.at[wg],
          out_gmem.at[batch_row, rows, mosaic.span(head * d, d)],
        )
        lse_gmem[batch_row, head, rows] = jnp.where(
          sees, m_i + jnp.log2(l_i), -jnp.inf
        )
        return step + count

      total = counts_gmem.shape[0] * s.num_heads
      lax.fori_loop(0, _my_items(total, cta, s), item, jnp.int32(0))
      plgpu.wait_smem_to_gmem(0)

    @pl.when(wg == 2)
    def _copy():
      plgpu.set_max_registers(40, action="decrease")
      gmem = order_gmem, counts_gmem, tiles_gmem, k_gmem, v_gmem, q_gmem
      _copy_walk(cta, s, gmem, (k_smem, v_smem, q_smem), q_ring, k_ring, v_ring)

  mosaic.launch(
    body,
    dict(
      order_gmem=plan.order, counts_gmem=plan.counts, tiles_gmem=plan.tiles,
      first_gmem=first_slot, until_gmem=until, q_gmem=q, k_gmem=k, v_gmem=v,
      out_gmem=out, lse_gmem=lse,
    ),
    name="masked_attention",
    num_ctas=config.num_ctas,
    num_warpgroups=3,
    interpret=s.interpret,
    scratch=dict(
      q_smem=s.operand(2, ROWS, d),
      k_smem=s.operand(config.stages, TILE, d),
      v_smem=s.operand(config.stages, TILE, d),
      out_smem=s.operand(2, ROWS, d),
      q_ring=mosaic.ring(fills=2, releases=2),
      k_ring=mosaic.ring(config.stages, releases=2),
      v_ring=mosaic.ring(config.stages, releases=2),
      **s.register_operands(TILE),
    ),
  )  # fmt: skip


def _dq_kernel(
  dq, plan: Plan, first_slot, until, q, k, v, dout, lse, delta, *,
  params: KernelParams,
):  # fmt: skip
  """Fills dq [B, T', H D].

  lse is base 2 and +inf where a query sees nothing; delta is out.dout - dlse.
  """
  s, config, d = params, params.config, params.head_dim
  columns = config.columns

  def body(
    *, order_gmem, counts_gmem, tiles_gmem, first_gmem, until_gmem, q_gmem,
    k_gmem, v_gmem, do_gmem, lse_gmem, delta_gmem, dq_gmem, q_smem, do_smem,
    k_smem, v_smem, q_ring, k_ring, v_ring, p_smem: Any = None,
  ):  # fmt: skip
    cta, wg = lax.axis_index("cta"), lax.axis_index("wg")

    @pl.when(wg < 2)
    def _compute():
      plgpu.set_max_registers(232, action="increase")
      p_mine = p_smem.at[wg] if s.interpret else None

      def item(i, step):
        tile, batch_row, head, first = _query_item(i, cta, s, order_gmem)
        mine = first + wg * ROWS
        my_slot = first_gmem[batch_row] + mine
        rows = mosaic.span(mine, ROWS)
        num_plain, count = counts_gmem[tile, 0], counts_gmem[tile, 1]
        lse_rows, delta_rows = (
          plgpu.load(
            x.at[batch_row, head, rows],
            layout=plgpu.Layout.WGMMA.reduce(1),
            optimized=False,
          )
          for x in (lse_gmem, delta_gmem)
        )
        q_ring.wait_ready(0)

        def add(j, acc, masked: bool):
          slot = k_ring.slot(step + j)
          k_ring.wait_ready(slot)
          v_ring.wait_ready(slot)
          for first_column in range(0, TILE, columns):
            keys = pl.ds(first_column, columns)
            scores = _product(q_smem.at[wg], k_smem.at[slot, keys], columns)
            p = jnp.exp2(
              scores * s.scale_log2 - _over_columns(lse_rows, columns)
            )
            if masked:
              first_key = tiles_gmem[tile, j] * TILE + first_column
              seen = _visible(
                until_gmem, batch_row, first_key, my_slot, columns
              )
              p = jnp.where(seen, p, 0.0)
            dp = _product(do_smem.at[wg], v_smem.at[slot, keys], columns)
            ds = p * (dp - _over_columns(delta_rows, columns))
            acc = _add_product(acc, ds, k_smem.at[slot, keys], s, p_mine)
          k_ring.release(slot)
          v_ring.release(slot)
          return acc

        acc = lax.fori_loop(
          0, num_plain, functools.partial(add, masked=False), _zeros(d)
        )
        acc = lax.fori_loop(
          num_plain, count, functools.partial(add, masked=True), acc
        )
        # Nobody reads these queries any more, until the ring is released.
        q_smem[wg] = (acc * s.scale).astype(s.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(
          q_smem.at[wg], dq_gmem.at[batch_row, rows, mosaic.span(head * d, d)]
        )
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        q_ring.release(0)
        return step + count

      total = counts_gmem.shape[0] * s.num_heads
      lax.fori_loop(0, _my_items(total, cta, s), item, jnp.int32(0))
      plgpu.wait_smem_to_gmem(0)

    @pl.when(wg == 2)
    def _copy():
      plgpu.set_max_registers(40, action="decrease")
      gmem = order_gmem, counts_gmem, tiles_gmem, k_gmem, v_gmem
      smem = k_smem, v_smem, q_smem, do_smem
      _copy_walk(cta, s, (*gmem, q_gmem, do_gmem), smem, q_ring, k_ring, v_ring)

  mosaic.launch(
    body,
    dict(
      order_gmem=plan.order, counts_gmem=plan.counts, tiles_gmem=plan.tiles,
      first_gmem=first_slot, until_gmem=until, q_gmem=q, k_gmem=k, v_gmem=v,
      do_gmem=dout, lse_gmem=lse, delta_gmem=delta, dq_gmem=dq,
    ),
    name="masked_attention_dq",
    num_ctas=config.num_ctas,
    num_warpgroups=3,
    interpret=s.interpret,
    scratch=dict(
      q_smem=s.operand(2, ROWS, d),
      do_smem=s.operand(2, ROWS, d),
      k_smem=s.operand(config.stages, TILE, d),
      v_smem=s.operand(config.stages, TILE, d),
      q_ring=mosaic.ring(fills=4, releases=2),
      k_ring=mosaic.ring(config.stages, releases=2),
      v_ring=mosaic.ring(config.stages, releases=2),
      **s.register_operands(columns),
    ),
  )  # fmt: skip


def _dkv_kernel(
  dk, dv, plan: Plan, first_slot, until, q, k, v, dout, lse, delta, *,
  params: KernelParams,
):  # fmt: skip
  """Fills dk and dv [B, S', K D]; lse and delta as `_dq_kernel` takes them."""
  s, config, d = params, params.config, params.head_dim
  stages, group = config.query_stages, params.group_size

  def body(
    *, order_gmem, counts_gmem, tiles_gmem, first_gmem, until_gmem, q_gmem,
    k_gmem, v_gmem, do_gmem, lse_gmem, delta_gmem, dk_gmem, dv_gmem, q_smem,
    do_smem, lse_smem, delta_smem, k_smem, v_smem, out_smem, q_ring, kv_ring,
    p_smem: Any = None,
  ):  # fmt: skip
    cta, wg = lax.axis_index("cta"), lax.axis_index("wg")
    my_items = _my_items(counts_gmem.shape[0] * s.num_kv_heads, cta, s)

    def locate(i):
      """Tile, batch row, KV head and first key of an item."""
      index = cta + i * config.num_ctas
      tile = order_gmem[index // s.num_kv_heads]
      batch_row = tile // s.key_tiles
      first = lax.rem(tile, s.key_tiles) * TILE
      return tile, batch_row, lax.rem(index, s.num_kv_heads), first

    def queries_of(tile, step_in_item):
      """Head in the group and first query of a step of an item."""
      each = 2 * group  # steps of a tile of queries
      j = step_in_item // each
      head = lax.rem(step_in_item, each) // 2
      half = lax.rem(step_in_item, 2)
      return head, tiles_gmem[tile, j] * TILE + half * ROWS

    @pl.when(wg < 2)
    def _compute():
      plgpu.set_max_registers(232, action="increase")
      p_mine = p_smem.at[wg] if s.interpret else None

      def item(i, step):
        tile, batch_row, kv_head, first = locate(i)
        mine = first + wg * ROWS
        num_plain, count = (
          counts_gmem[tile, n] * (2 * group) for n in range(2)
        )
        until_rows = plgpu.load(
          until_gmem.at[batch_row, mosaic.span(mine, ROWS)],
          layout=plgpu.Layout.WGMMA.reduce(1),
          optimized=False,
        )
        kv_ring.wait_ready(0)

        def add(j, carry, masked: bool):
          dk, dv = carry
          slot = q_ring.slot(step + j)
          q_ring.wait_ready(slot)
          lse_columns, delta_columns = (
            plgpu.load(x.at[slot], layout=plgpu.Layout.WGMMA.reduce(0))
            for x in (lse_smem, delta_smem)
          )
          scores = _product(k_smem.at[wg], q_smem.at[slot], ROWS)
          p = jnp.exp2(scores * s.scale_log2 - _over_rows(lse_columns))
          if masked:
            _, first_query = queries_of(tile, j)
            slots = first_gmem[batch_row] + first_query + _iota(ROWS, 1)
            seen = mine + _iota(ROWS, 0) <= slots
            seen &= slots < _over_columns(until_rows, ROWS)
            p = jnp.where(seen, p, 0.0)
          dv = _add_product(dv, p, do_smem.at[slot], s, p_mine)
          dp = _product(v_smem.at[wg], do_smem.at[slot], ROWS)
          ds = p * (dp - _over_rows(delta_columns))
          dk = _add_product(dk, ds, q_smem.at[slot], s, p_mine)
          q_ring.release(slot)
          return dk, dv

        carry = lax.fori_loop(
          0, num_plain, functools.partial(add, masked=False),
          (_zeros(d), _zeros(d)),
        )  # fmt: skip
        dk, dv = lax.fori_loop(
          num_plain, count, functools.partial(add, masked=True), carry
        )
        kv_ring.release(0)
        at = batch_row, mosaic.span(mine, ROWS), mosaic.span(kv_head * d, d)
        for x, target in ((dk * s.scale, dk_gmem), (dv, dv_gmem)):
          plgpu.wait_smem_to_gmem(0, wait_read_only=True)
          out_smem[wg] = x.astype(s.dtype)
          plgpu.commit_smem()
          plgpu.copy_smem_to_gmem(out_smem.at[wg], target.at[at])
        return step + count

      lax.fori_loop(0, my_items, item, jnp.int32(0))
      plgpu.wait_smem_to_gmem(0)

    @pl.when(wg == 2)
    def _copy():
      plgpu.set_max_registers(40, action="decrease")

      def item(i, step):
        tile, batch_row, kv_head, first = locate(i)
        ready = kv_ring.ready_at(kv_ring.wait_free(i))
        for h in range(2):
          at = (
            batch_row,
            mosaic.span(first + h * ROWS, ROWS),
            mosaic.span(kv_head * d, d),
          )
          plgpu.copy_gmem_to_smem(k_gmem.at[at], k_smem.at[h], ready)
          plgpu.copy_gmem_to_smem(v_gmem.at[at], v_smem.at[h], ready)

        def walk(j, step):
          head, first_query = queries_of(tile, j)
          head = kv_head * group + head
          rows = mosaic.span(first_query, ROWS)
          slot = q_ring.wait_free(step)
          ready = q_ring.ready_at(slot)
          for source, target in ((q_gmem, q_smem), (do_gmem, do_smem)):
            plgpu.copy_gmem_to_smem(
              source.at[batch_row, rows, mosaic.span(head * d, d)],
              target.at[slot],
              ready,
            )
          for source, target in (
            (lse_gmem, lse_smem),
            (delta_gmem, delta_smem),
          ):
            plgpu.copy_gmem_to_smem(
              source.at[batch_row, head, rows], target.at[slot], ready
            )
          return step + 1

        return lax.fori_loop(0, counts_gmem[tile, 1] * (2 * group), walk, step)

      step = lax.fori_loop(0, my_items, item, jnp.int32(0))
      mosaic.drain_rings(step, q_ring)
      mosaic.drain_rings(my_items, kv_ring)

  mosaic.launch(
    body,
    dict(
      order_gmem=plan.order, counts_gmem=plan.counts, tiles_gmem=plan.tiles,
      first_gmem=first_slot, until_gmem=until, q_gmem=q, k_gmem=k, v_gmem=v,
      do_gmem=dout, lse_gmem=lse, delta_gmem=delta, dk_gmem=dk, dv_gmem=dv,
    ),
    name="masked_attention_dkv",
    num_ctas=config.num_ctas,
    num_warpgroups=3,
    interpret=s.interpret,
    scratch=dict(
      q_smem=s.operand(stages, ROWS, d),
      do_smem=s.operand(stages, ROWS, d),
      lse_smem=plgpu.SMEM((stages, ROWS), jnp.float32),
      delta_smem=plgpu.SMEM((stages, ROWS), jnp.float32),
      k_smem=s.operand(2, ROWS, d),
      v_smem=s.operand(2, ROWS, d),
      out_smem=s.operand(2, ROWS, d),
      q_ring=mosaic.ring(stages, fills=4, releases=2),
      kv_ring=mosaic.ring(fills=4, releases=2),
      **s.register_operands(ROWS),
    ),
  )  # fmt: skip


# ---- The operation ----


def _pad_tokens(x: Array, axis: int, fill: float = 0) -> Array:
  pad = [(0, 0)] * x.ndim
  pad[axis] = (0, -x.shape[axis] % TILE)
  return jnp.pad(x, pad, constant_values=fill)


def _flat(x: Array) -> Array:
  """[B, T, H, D] as the kernels take it: [B, T', H D]."""
  x = _pad_tokens(x, 1)
  return x.reshape(*x.shape[:2], -1)


def _params(q, k, scale, config, interpret) -> KernelParams:
  return KernelParams(
    num_heads=q.shape[2],
    num_kv_heads=k.shape[2],
    query_tiles=-(-q.shape[1] // TILE),
    key_tiles=-(-k.shape[1] // TILE),
    head_dim=q.shape[3],
    dtype=jnp.dtype(q.dtype),
    scale=scale,
    config=config,
    interpret=interpret,
  )


@functools.partial(jax.jit, static_argnames=("scale", "config", "interpret"))
def _forward(q, k, v, until, first_slot, *, scale, config, interpret):
  b, t, num_heads, d = q.shape
  until = _pad_tokens(until, 1)
  plan, _ = plan_tiles(until, first_slot, t)
  params = _params(q, k, scale, config, interpret)
  tokens = params.query_tiles * TILE
  out = jax.new_ref(lax.empty((b, tokens, num_heads * d), q.dtype))
  lse = jax.new_ref(lax.empty((b, num_heads, tokens), jnp.float32))
  _forward_kernel(
    out, lse, plan, first_slot, until, _flat(q), _flat(k), _flat(v),
    params=params,
  )  # fmt: skip
  out = mosaic.result(out)[:, :t].reshape(q.shape)
  return out, mosaic.result(lse)[..., :t] * mosaic.LN2


@functools.partial(jax.jit, static_argnames=("scale", "config", "interpret"))
def _backward(
  q, k, v, until, first_slot, lse, dout, delta, *, scale, config, interpret
):
  """dq, dk and dv of finite operands."""
  t, s_len = q.shape[1], k.shape[1]
  until = _pad_tokens(until, 1)
  plan, key_plan = plan_tiles(until, first_slot, t)
  params = _params(q, k, scale, config, interpret)
  # An lse of +inf makes p zero.
  lse = jnp.where(lse == -jnp.inf, jnp.inf, lse * mosaic.LOG2E)
  lse, delta = _pad_tokens(lse, 2, jnp.inf), _pad_tokens(delta, 2)
  flat = [_flat(x) for x in (q, k, v, dout)]
  dq, dk, dv = (jax.new_ref(lax.empty(x.shape, x.dtype)) for x in flat[:3])
  operands: Any = (first_slot, until, *flat, lse, delta)
  _dq_kernel(dq, plan, *operands, params=params)
  _dkv_kernel(dk, dv, key_plan, *operands, params=params)
  return (
    mosaic.result(dq)[:, :t].reshape(q.shape),
    mosaic.result(dk)[:, :s_len].reshape(k.shape),
    mosaic.result(dv)[:, :s_len].reshape(v.shape),
  )


def _count_before(bad: Bool[Array, "B S X"]) -> Int[Array, "B S+1 X"]:
  """How many slots before each one are bad."""
  count = jnp.cumsum(bad, axis=1, dtype=jnp.int32)
  return jnp.pad(count, ((0, 0), (1, 0), (0, 0)))


def _seeing(
  bad: Bool[Array, "B S K"], until, first_slot, q_len: int, num_heads: int
) -> Bool[Array, "B T H"]:
  """Which queries see a bad key."""
  b, s_len, num_kv_heads = bad.shape
  slot = jnp.arange(s_len, dtype=jnp.int32)
  row = jnp.arange(b)[:, None]
  bad = bad & (until > slot)[..., None]
  # The number of bad keys that begin and have not ended at each slot.
  ends = jnp.zeros((b, s_len + 1, num_kv_heads), jnp.int32)
  ends = ends.at[row, until].add(bad.astype(jnp.int32))
  begins = jnp.pad(bad.astype(jnp.int32), ((0, 0), (0, 1), (0, 0)))
  seen = jnp.cumsum(begins - ends, axis=1) > 0
  at = first_slot[:, None] + jnp.arange(q_len, dtype=jnp.int32)
  seen = seen[row, jnp.maximum(at, 0)] & (at >= 0)[..., None]
  return jnp.repeat(seen, num_heads // num_kv_heads, axis=-1)


def _seen(
  bad: Bool[Array, "B T H"], until, first_slot, num_kv_heads: int
) -> Bool[Array, "B S K"]:
  """Which keys a bad query sees."""
  b, t, _ = bad.shape
  bad = jnp.any(bad.reshape(b, t, num_kv_heads, -1), axis=-1)
  count = _count_before(bad)
  row = jnp.arange(b)[:, None]
  slot = jnp.arange(until.shape[1], dtype=jnp.int32)
  before = count[row, jnp.clip(slot - first_slot[:, None], 0, t)]
  until = jnp.maximum(until, slot)
  return count[row, jnp.clip(until - first_slot[:, None], 0, t)] > before


def _poison(x, bad):
  return jnp.where(bad[..., None], jnp.nan, x)


_Q_K_V = ("B T H D", "B S K D", "B S K D")


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _attention(q, k, v, until, first_slot, scale, config, interpret) -> Any:
  # Under vmap the kernels run once for each entry of the mapped axis.
  @jax.custom_batching.sequential_vmap
  def run(q, k, v, until, first_slot):
    t, num_heads = q.shape[1:3]
    (q, bad_q), (k, bad_k), (v, bad_v) = (
      mosaic.zero_non_finite(x) for x in (q, k, v)
    )
    out, lse = _forward(
      q, k, v, until, first_slot, scale=scale, config=config,
      interpret=interpret,
    )  # fmt: skip
    seeing = functools.partial(
      _seeing, until=until, first_slot=first_slot, q_len=t, num_heads=num_heads
    )
    # Padding inside of a tree stands where others see keys. With fewer keys
    # than queries, the first queries stand before slot 0.
    slot = first_slot[:, None] + jnp.arange(t, dtype=jnp.int32)
    real = packed_rows.at_slots(until, first_slot[:, None], t, 0) > slot
    real &= slot >= 0
    out = jnp.where(real[..., None, None], out, 0)
    lse = jnp.where(real[:, None], lse, -jnp.inf)
    bad_scores = real[..., None] & (bad_q | seeing(bad_k))
    bad_out = bad_scores | (real[..., None] & seeing(bad_v))
    lse = jnp.where(jnp.moveaxis(bad_scores, 1, 2), jnp.nan, lse)
    return _poison(out, bad_out), lse

  split = partition.by_rows_and_heads(
    partition.kernel(run, interpret),
    (*_Q_K_V, "B S", "B"),
    ("B T H D", "B H T"),
    interpret=interpret,
  )
  return split(q, k, v, until, first_slot)


@mosaic.in_32_bits
def _vjp_forward(q, k, v, until, first_slot, *options):
  operands = tuple(x.value for x in (q, k, v, until, first_slot))
  both: Any = _attention(*operands, *options)
  out = checkpoint_name(both[0], "attention_out")
  lse = checkpoint_name(both[1], "attention_lse")
  return (out, lse), (*operands, out, lse)


@mosaic.in_32_bits
def _vjp_backward(scale, config, interpret, residuals, cotangents):
  out = residuals[-2]
  dout, dlse = cotangents
  if isinstance(dout, SymbolicZero):
    dout = jnp.zeros_like(out)

  @jax.custom_batching.sequential_vmap
  def run(q, k, v, until, first_slot, out, lse, dout, *dlse):
    num_kv_heads = k.shape[2]
    q, k, v = (mosaic.zero_non_finite(x)[0] for x in (q, k, v))
    sees = jnp.moveaxis(lse != -jnp.inf, 1, 2)
    bad_scores = jnp.moveaxis(jnp.isnan(lse), 1, 2)
    out, bad_out = mosaic.zero_non_finite(out)
    dout, bad_dout = mosaic.zero_non_finite(dout)
    bad_dout &= sees
    delta = jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), -1)
    delta = jnp.moveaxis(delta, 2, 1)
    bad_ds = bad_out | bad_dout
    for x in dlse:
      x = jnp.where(lse == -jnp.inf, 0, x)
      bad_ds |= jnp.moveaxis(~jnp.isfinite(x), 1, 2)
      delta -= jnp.where(jnp.isfinite(x), x, 0)
    bad_p = bad_scores | bad_dout
    lse = jnp.where(jnp.isnan(lse), -jnp.inf, lse)
    dq, dk, dv = _backward(
      q, k, v, until, first_slot, lse, dout, delta, scale=scale, config=config,
      interpret=interpret,
    )  # fmt: skip
    seen = functools.partial(
      _seen, until=until, first_slot=first_slot, num_kv_heads=num_kv_heads
    )
    return (
      _poison(dq, bad_ds), _poison(dk, seen(bad_ds)), _poison(dv, seen(bad_p))
    )  # fmt: skip

  operands = [*residuals, dout]
  letters = [*_Q_K_V, "B S", "B", "B T H D", "B H T", "B T H D"]
  if not isinstance(dlse, SymbolicZero):
    operands.append(dlse)
    letters.append("B H T")
  split = partition.by_rows_and_heads(
    partition.kernel(run, interpret), letters, _Q_K_V, interpret=interpret
  )
  return *split(*operands), None, None


# With symbolic zeros, the gradient of an lse that is not used costs nothing.
_attention.defvjp(_vjp_forward, _vjp_backward, symbolic_zeros=True)


@mosaic.in_32_bits
def attention(
  q: Float[Array, "B T H D"],
  k: Float[Array, "B S K D"],
  v: Float[Array, "B S K D"],
  *,
  scale: float | None = None,
  kv_lengths: Int[Array, "B"] | None = None,
  until: Int[Array, "B S"] | None = None,
  config: Config | None = None,
  interpret: bool = False,
) -> tuple[Float[Array, "B T H D"], Float[Array, "B H T"]]:
  """Dense causal attention of plain rows, packed documents and trees.

  Args:
    q: queries, the last T of S (or of kv_lengths[b]) tokens; bf16 or f16.
    k: keys.
    v: values.
    scale: of the scores, a positive number; D^-0.5 if None.
    kv_lengths: keys in slots from kv_lengths[b] on do not exist.
    until: the slot from which on each key is not seen any more, at most S, 0
      for padding; None: every query behind a key sees it.
    config: pipeline sizes; the default if None.
    interpret: run on the CPU in Pallas's GPU interpret mode.

  Returns:
    out in q's dtype and lse (natural log, float32); both have gradients. A
    query that sees nothing gets 0, -inf and gradients of 0.

  Raises:
    NotImplementedError: the call is legal but beyond `mosaic`'s limits.
  """
  (b, t, num_heads, d), s_len = q.shape, k.shape[1]
  scale = float(d**-0.5 if scale is None else scale)
  mosaic.check_supported(dtype=q.dtype, head_dim=d, scale=scale)
  mosaic.check_dense_supported(d)
  if not q.size or not k.size:
    return jnp.zeros_like(q), jnp.full((b, num_heads, t), -jnp.inf, jnp.float32)
  if kv_lengths is None:
    kv_lengths = jnp.full((b,), s_len, jnp.int32)
  kv_lengths = jnp.clip(kv_lengths.astype(jnp.int32), 0, s_len)
  if until is None:
    until = jnp.full((b, s_len), s_len, jnp.int32)
  exists = jnp.arange(s_len, dtype=jnp.int32) < kv_lengths[:, None]
  until = jnp.where(exists, until, 0)
  q, k, v = (mosaic.pad_head_dim(x) for x in (q, k, v))
  both: Any = _attention(
    q, k, v, until, kv_lengths - t, scale, config or Config(), interpret
  )
  out, lse = both
  return out[..., :d], lse
