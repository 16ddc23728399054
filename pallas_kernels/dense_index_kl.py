"""KL loss of the Index Branch over all tokens, on Hopper (warm-up phase).

With the teacher p_j = mean over the group's heads of exp(scale q.k_j - lse) and
the student r_j = exp(index_scale index_q.index_k_j - index_lse), over visible
tokens j (KL loss; arXiv 2606.13392):

  value = sum_j p_j (log p_j - log r_j)     g_j = r_j - p_j
  dindex_q = index_scale sum_j g_j index_k_j
  dindex_k_j = index_scale sum over queries and groups of g_j index_q

all divided by the number of queries that count, times the number of groups. If
queries have weights, value and g are multiplied by them, and the divisor is the
sum of the weights, times the number of groups. Two kernels, which gather
nothing, and two matrix products by XLA:

* **index_lse**: a CTA owns 128 queries of a group, 64 for each of two compute
  warpgroups. These walk the visible index keys with an online maximum; a third
  warpgroup copies.
* **units**: a CTA owns a *unit* of 256 queries x 256 keys of a group. Two
  compute warpgroups own 128 of the keys each and go through the unit in *tiles*
  of 64 queries. A tile of scores belongs to one head; the heads follow one
  after another, so their mean is a float32 sum in registers for any number of
  heads, in the register layout of the index scores. K and index_k stay in SMEM,
  while a third warpgroup copies q, one head at a time. g is written to memory:
  that of all groups of several batch rows, as many as a workspace of 2^29
  elements has room for, or of a chunk of the queries of a longer row. dindex_q
  and dindex_k are products with it. Units in which no query sees a key are
  skipped, and the workspace holds zeros there.

Only the sum of the values crosses CTAs, so all sums have a fixed order.

Bound: the scores of all heads, which are half the products of a dense forward,
with an exponential each, and one part in 16 more for the index scores. At H 64,
D = I = 128 and 32K tokens this is 9.3 TFLOP, 12 ms at 800 TFLOP/s, and 10 ms of
the exponential units; both overlap as far as the two compute warpgroups
alternate. q comes from L2, with 256 FLOP a byte. g is written once and read
twice, zeros included: 21 GB, 8 ms.

SMEM at D = I = 128: K and index_k 64 KB each, q 16 KB a stage, index_q 16 KB, g
32 KB.

Barriers, between compute warpgroups 0 and 1 and the copy warpgroup. Copies make
each ring ready, and 0 and 1 wait for it; both of these release it, and the copy
warpgroup waits before it fills a slot again.

  index_lse   filled with                          released
  iq_ring     index queries of 0 and of 1          after their last key tile
  ik_ring     a tile of 128 index keys             after its scores

  units       filled with                          released
  k_ring      keys of 0 and of 1                   after the unit's last heads
  ik_ring     index keys of 0 and of 1             after the unit's last tile
  q_ring      a head of a tile of queries, and     after its scores and its lse
              its lse
  iq_ring     index queries of a tile              after its index scores

NaN: one in a query or in the lse reaches g of the keys that the query sees and
nothing else. Index keys that are not finite are zeroed, and queries that see
one are made NaN through index_lse. Keys that a query does not see are masked
after the sum over heads.

Packed rows (`msa_jax.segments`): the query at slot t sees key j iff j <= t <
until[j]. Both kernels compare with `until` too, which they count in queries:
less the slot of the first one. index_lse starts at the first key that a tile's
queries may see, and the units of other documents, or of branches of a tree that
ended before, are skipped. Keys stay where they are.

Not supported: what `mosaic.check_supported` and `mosaic.check_dense_supported`
refuse; gradients of gradients.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import mosaic, packed_rows
from pallas_kernels.mosaic import FLOOR

ACC = plgpu.WGMMAAccumulatorRef
ROWS = 64  # queries of a tile of scores: its MMA rows
KEYS = 128  # keys of a compute warpgroup
UNIT = 256  # queries and keys of a unit
# Factor of g in memory: g is at most 1, as are the weights of queries, and
# float16 loses what is below 2^-24.
G_SCALE = 2.0**15


@dataclasses.dataclass(frozen=True)
class Config:
  """Tile and pipeline sizes; the result changes by rounding only.

  Attributes:
    stages: tiles of q in flight.
    workspace: upper bound on the elements of g, which holds at least those of
      256 queries.
    num_ctas: CTAs of the persistent grids.
  """

  stages: int = 3
  workspace: int = 1 << 29
  num_ctas: int = mosaic.NUM_SMS


@dataclasses.dataclass(frozen=True)
class KernelParams:
  """Static parameters of one call, after padding."""

  group_size: int
  num_kv_heads: int
  head_dim: int
  index_dim: int
  dtype: jnp.dtype
  scale: float
  index_scale: float
  with_gradients: bool
  config: Config
  interpret: bool

  def operand(self, *sizes: int) -> plgpu.SMEM:
    return plgpu.SMEM(sizes, self.dtype, transforms=mosaic.OPERAND)


def _row_vector(value: float):
  layout = plgpu.Layout.WGMMA.reduce(1)
  return plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), layout)


def _along_keys(x):
  return lax.broadcast_in_dim(x, (ROWS, KEYS), [0])


def _scores(q_smem, k_smem):
  def product(acc):
    plgpu.wgmma(acc, q_smem, k_smem.transpose((1, 0)))
    return acc[...]

  return pl.run_scoped(product, ACC((ROWS, KEYS), jnp.float32))


def _along_queries(x):
  return lax.broadcast_in_dim(x, (ROWS, KEYS), [1])


def _seen_later(until_gmem, batch_row, first_query, first_key):
  """Whether keys of packed rows are still seen at the queries' slots."""
  until = plgpu.load(
    until_gmem.at[batch_row, mosaic.span(first_key, KEYS)],
    layout=plgpu.Layout.WGMMA.reduce(0),
    optimized=False,
  )
  row = plgpu.broadcasted_iota(
    jnp.int32, (ROWS, KEYS), 0, layout=plgpu.Layout.WGMMA
  )
  return first_query + row < _along_queries(until)


def _key_of_column():
  return plgpu.broadcasted_iota(
    jnp.int32, (ROWS, KEYS), 1, layout=plgpu.Layout.WGMMA
  )


def _index_lse(
  out, extents, limits, packed, iq, ik, *, params: KernelParams
):  # fmt: skip
  """log2 sum exp2 of every query's index scores; undefined if it sees none.

  Args:
    out: Ref, float32 [B, K, queries].
    extents: int32 [B, 2]: position of each batch row's first query, and number
      of its keys.
    limits: int32 [B, queries]: how many keys each query sees.
    packed: of packed rows: `until`, int32 [B, keys], and the first key tile of
      each query tile, int32 [B, query tiles]; None for plain rows.
    iq, ik: index queries and keys, padded.
    params: static parameters.
  """
  s, config = params, params.config
  batch, _, q_len = out.shape
  groups = batch * s.num_kv_heads
  tiles = q_len // (2 * ROWS)
  row_layout = plgpu.Layout.WGMMA.reduce(1)

  def body(
    *, extents_gmem, limits_gmem, iq_gmem, ik_gmem, out_gmem, iq_smem, ik_smem,
    iq_ring, ik_ring, until_gmem=None, first_tile_gmem=None,
  ):  # fmt: skip
    cta, wg = lax.axis_index("cta"), lax.axis_index("wg")
    my_items = (tiles * groups - cta + config.num_ctas - 1) // config.num_ctas

    def locate(i):
      """Batch row, group, first query, first and number of key tiles."""
      index = cta + i * config.num_ctas
      # The last queries see most keys; their tiles start first.
      first = (tiles - 1 - index // groups) * 2 * ROWS
      batch_row = lax.rem(index, groups) // s.num_kv_heads
      seen = jnp.minimum(
        extents_gmem[batch_row, 0] + first + 2 * ROWS,
        extents_gmem[batch_row, 1],
      )
      key_tiles = jnp.maximum(seen + KEYS - 1, 0) // KEYS
      first_tile = 0
      if first_tile_gmem is not None:
        first_tile = first_tile_gmem[batch_row, tiles - 1 - index // groups]
        first_tile = jnp.minimum(first_tile, key_tiles)
      group = lax.rem(index, s.num_kv_heads)
      return batch_row, group, first, first_tile, key_tiles - first_tile

    @pl.when(wg < 2)
    def _compute():
      def tile(i, step):
        batch_row, group, first, first_tile, key_tiles = locate(i)
        queries = mosaic.span(first + wg * ROWS, ROWS)
        limit = plgpu.load(
          limits_gmem.at[batch_row, queries], layout=row_layout, optimized=False
        )
        iq_ring.wait_ready(0)

        def block(j, carry):
          m_i, l_i = carry
          slot = ik_ring.slot(step + j)
          ik_ring.wait_ready(slot)
          scores = _scores(iq_smem.at[wg], ik_smem.at[slot])
          ik_ring.release(slot)
          first_key = (first_tile + j) * KEYS
          visible = _key_of_column() < _along_keys(limit - first_key)
          if until_gmem is not None:
            visible &= _seen_later(
              until_gmem, batch_row, first + wg * ROWS, first_key
            )
          scores = scores * (s.index_scale * mosaic.LOG2E)
          scores = jnp.where(visible, scores, FLOOR)
          m_new = jnp.maximum(m_i, scores.max(axis=1))
          p = jnp.exp2(scores - _along_keys(m_new))
          return m_new, l_i * jnp.exp2(m_i - m_new) + p.sum(axis=1)

        m_i, l_i = lax.fori_loop(
          0, key_tiles, block, (_row_vector(FLOOR), _row_vector(0.0))
        )
        iq_ring.release(0)
        out_gmem[batch_row, group, queries] = m_i + jnp.log2(l_i)
        return step + key_tiles

      lax.fori_loop(0, my_items, tile, jnp.int32(0))

    @pl.when(wg == 2)
    def _copy():
      def tile(i, step):
        batch_row, group, first, first_tile, key_tiles = locate(i)
        ready = iq_ring.ready_at(iq_ring.wait_free(i))
        for h in range(2):
          plgpu.copy_gmem_to_smem(
            iq_gmem.at[
              batch_row,
              mosaic.span(first + h * ROWS, ROWS),
              mosaic.span(group * s.index_dim, s.index_dim),
            ],
            iq_smem.at[h],
            ready,
          )

        def block(j, step):
          slot = ik_ring.wait_free(step)
          plgpu.copy_gmem_to_smem(
            ik_gmem.at[batch_row, mosaic.span((first_tile + j) * KEYS, KEYS)],
            ik_smem.at[slot],
            ik_ring.ready_at(slot),
          )
          return step + 1

        return lax.fori_loop(0, key_tiles, block, step)

      step = lax.fori_loop(0, my_items, tile, jnp.int32(0))
      mosaic.drain_rings(step, ik_ring)
      mosaic.drain_rings(my_items, iq_ring)

  mosaic.launch(
    body,
    dict(
      extents_gmem=extents,
      limits_gmem=limits,
      iq_gmem=iq,
      ik_gmem=ik,
      out_gmem=out,
      **(
        {}
        if packed is None
        else dict(until_gmem=packed[0], first_tile_gmem=packed[1])
      ),
    ),
    name="dense_kl_index_lse",
    num_ctas=config.num_ctas,
    num_warpgroups=3,
    interpret=s.interpret,
    scratch=dict(
      iq_smem=s.operand(2, ROWS, s.index_dim),
      ik_smem=s.operand(config.stages, KEYS, s.index_dim),
      iq_ring=mosaic.ring(fills=2, releases=2),
      ik_ring=mosaic.ring(config.stages, releases=2),
    ),
  )


def _units(
  values,
  g,
  chunk_desc,
  units,
  limits,
  weights,
  until,
  index_lse,
  lse,
  iq,
  q,
  k,
  ik,
  *,
  params: KernelParams,
):
  """Computes the values of a chunk's units, and g if gradients are wanted.

  Args:
    values: Ref, float32 [num_ctas, 2, ROWS]: parts of the sum of the values.
    g: Ref, [batch rows * K, chunk, keys]: (r - p) * G_SCALE, times the query's
      weight.
    chunk_desc: chunk descriptor, int32 [3]: first batch row, first query, and
      number of units of all batch rows, which is the same for each KV head.
    units: int32 [units, 3]: batch row in the launch, and the unit's indices
      along the chunk's queries and along the keys.
    limits: int32 [B, queries]: how many keys each query sees.
    weights: float32 [B, queries]; None if all are 1.
    until: int32 [B, keys], of packed rows; None for plain rows.
    index_lse: base-2 log sum exp of the index scores.
    lse: base-2 log sum exp of the scores, plus log2 of the group's heads.
    iq, q, k, ik: operands, padded, with heads and channels on one axis.
    params: static parameters.
  """
  s, config = params, params.config
  tiles = UNIT // ROWS
  row_layout = plgpu.Layout.WGMMA.reduce(1)

  def body(
    *, chunk_gmem, units_gmem, limits_gmem, ilse_gmem, lse_gmem, iq_gmem,
    q_gmem, k_gmem, ik_gmem, values_gmem, g_gmem, q_smem, lse_smem, k_smem,
    ik_smem, iq_smem, g_smem, q_ring, k_ring, ik_ring, iq_ring, until_gmem=None,
    weights_gmem=None,
  ):  # fmt: skip
    cta, wg = lax.axis_index("cta"), lax.axis_index("wg")
    origin, per_head = chunk_gmem[1], chunk_gmem[2]
    total = per_head * s.num_kv_heads
    my_items = (total - cta + config.num_ctas - 1) // config.num_ctas

    def locate(i):
      """Batch row in the launch, group, first query in the chunk, first key."""
      index = cta + i * config.num_ctas
      unit = lax.rem(index, per_head)
      return (
        units_gmem[unit, 0],
        index // per_head,
        units_gmem[unit, 1] * UNIT,
        units_gmem[unit, 2] * UNIT,
      )

    @pl.when(wg < 2)
    def _compute():
      plgpu.set_max_registers(232, action="increase")

      def unit(i, carry):
        launch_row, group, first_query, first_key = locate(i)
        batch_row = chunk_gmem[0] + launch_row
        my_key = first_key + wg * KEYS
        k_ring.wait_ready(0)

        def tile(j, carry):
          step, value = carry
          queries = mosaic.span(origin + first_query + j * ROWS, ROWS)
          # These loads are used only after the loop over heads, which hides
          # their latency.
          limit, ilse = (
            plgpu.load(x, layout=row_layout, optimized=False)
            for x in (
              limits_gmem.at[batch_row, queries],
              ilse_gmem.at[batch_row, group, queries],
            )
          )
          weight = None
          if weights_gmem is not None:
            weight = plgpu.load(
              weights_gmem.at[batch_row, queries],
              layout=row_layout,
              optimized=False,
            )

          def head(h, mean):
            slot = q_ring.slot(step + h)
            q_ring.wait_ready(slot)
            scores = _scores(q_smem.at[slot], k_smem.at[wg])
            lse_rows = plgpu.load(lse_smem.at[slot], layout=row_layout)
            q_ring.release(slot)
            scores = scores * (s.scale * mosaic.LOG2E)
            return mean + jnp.exp2(scores - _along_keys(lse_rows))

          mean = lax.fori_loop(
            0,
            s.group_size,
            head,
            plgpu.layout_cast(
              jnp.full((ROWS, KEYS), 0.0, jnp.float32), plgpu.Layout.WGMMA
            ),
          )

          @pl.when(j == tiles - 1)
          def _():
            k_ring.release(0)

          @pl.when(j == 0)
          def _():
            ik_ring.wait_ready(0)

          iq_ring.wait_ready(0)
          scores = _scores(iq_smem, ik_smem.at[wg])
          iq_ring.release(0)

          @pl.when(j == tiles - 1)
          def _():
            ik_ring.release(0)

          visible = _key_of_column() < _along_keys(limit - my_key)
          if until_gmem is not None:
            visible &= _seen_later(
              until_gmem, batch_row, origin + first_query + j * ROWS, my_key
            )
          p = jnp.where(visible, mean, 0.0)
          log_r = scores * (s.index_scale * mosaic.LOG2E) - _along_keys(ilse)
          # 0 log 0 = 0, while a NaN of p or r is kept.
          log_p = jnp.log2(jnp.where(p > 0.0, p, 1.0))
          term = jnp.where(visible, p * (log_p - log_r), 0.0).sum(axis=1)
          value += term if weight is None else term * weight
          if s.with_gradients:
            r = jnp.where(visible, jnp.exp2(log_r), 0.0)
            factor = G_SCALE
            if weight is not None:
              factor = _along_keys(weight * G_SCALE)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            g_smem[wg] = ((r - p) * factor).astype(s.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(
              g_smem.at[wg],
              g_gmem.at[
                launch_row * s.num_kv_heads + group,
                mosaic.span(first_query + j * ROWS, ROWS),
                mosaic.span(my_key, KEYS),
              ],
            )
          return step + s.group_size, value

        return lax.fori_loop(0, tiles, tile, carry)

      _, value = lax.fori_loop(
        0, my_items, unit, (jnp.int32(0), _row_vector(0.0))
      )
      values_gmem[cta, wg] = value
      plgpu.wait_smem_to_gmem(0)

    @pl.when(wg == 2)
    def _copy():
      plgpu.set_max_registers(40, action="decrease")

      def unit(i, carry):
        launch_row, group, first_query, first_key = locate(i)
        batch_row = chunk_gmem[0] + launch_row
        keys = [mosaic.span(first_key + h * KEYS, KEYS) for h in range(2)]
        columns = mosaic.span(group * s.head_dim, s.head_dim)

        ready = k_ring.ready_at(k_ring.wait_free(i))
        for h in range(2):
          plgpu.copy_gmem_to_smem(
            k_gmem.at[batch_row, keys[h], columns], k_smem.at[h], ready
          )
        ready = ik_ring.ready_at(ik_ring.wait_free(i))
        for h in range(2):
          plgpu.copy_gmem_to_smem(
            ik_gmem.at[batch_row, keys[h]], ik_smem.at[h], ready
          )

        def tile(j, carry):
          step, tile_step = carry
          queries = mosaic.span(origin + first_query + j * ROWS, ROWS)

          def head(h, step):
            slot = q_ring.slot(step)
            one = group * s.group_size + h
            q_ring.wait_free(step, slot)
            plgpu.copy_gmem_to_smem(
              q_gmem.at[
                batch_row, queries, mosaic.span(one * s.head_dim, s.head_dim)
              ],
              q_smem.at[slot],
              q_ring.ready_at(slot),
            )
            plgpu.copy_gmem_to_smem(
              lse_gmem.at[batch_row, one, queries], lse_smem.at[slot],
              q_ring.ready_at(slot),
            )  # fmt: skip
            return step + 1

          step = lax.fori_loop(0, s.group_size, head, step)
          slot = iq_ring.wait_free(tile_step)
          columns = mosaic.span(group * s.index_dim, s.index_dim)
          plgpu.copy_gmem_to_smem(
            iq_gmem.at[batch_row, queries, columns], iq_smem,
            iq_ring.ready_at(slot),
          )  # fmt: skip
          return step, tile_step + 1

        return lax.fori_loop(0, tiles, tile, carry)

      step, _ = lax.fori_loop(0, my_items, unit, (jnp.int32(0), jnp.int32(0)))
      mosaic.drain_rings(step, q_ring)
      mosaic.drain_rings(my_items, k_ring, ik_ring, iq_ring)

  mosaic.launch(
    body,
    dict(
      chunk_gmem=chunk_desc,
      units_gmem=units,
      limits_gmem=limits,
      ilse_gmem=index_lse,
      lse_gmem=lse,
      iq_gmem=iq,
      q_gmem=q,
      k_gmem=k,
      ik_gmem=ik,
      values_gmem=values,
      g_gmem=g,
      **({} if until is None else dict(until_gmem=until)),
      **({} if weights is None else dict(weights_gmem=weights)),
    ),
    name="dense_kl_units",
    num_ctas=config.num_ctas,
    num_warpgroups=3,
    interpret=s.interpret,
    scratch=dict(
      q_smem=s.operand(config.stages, ROWS, s.head_dim),
      lse_smem=plgpu.SMEM((config.stages, ROWS), jnp.float32),
      k_smem=s.operand(2, KEYS, s.head_dim),
      ik_smem=s.operand(2, KEYS, s.index_dim),
      iq_smem=s.operand(ROWS, s.index_dim),
      g_smem=s.operand(2, ROWS, KEYS),
      q_ring=mosaic.ring(config.stages, fills=2, releases=2),
      k_ring=mosaic.ring(fills=2, releases=2),
      ik_ring=mosaic.ring(fills=2, releases=2),
      iq_ring=mosaic.ring(releases=2),
    ),
  )


def _visible_units(
  first: Int[Array, "batch"], end: Int[Array, "batch"], chunk: int, keys: int
) -> tuple[Int[Array, "units 3"], Int[Array, ""]]:
  """Units of a chunk in which some query sees some key, and their number.

  A unit is given by batch row, index along the queries and index along the
  keys; units are sorted in this order.

  Args:
    first: position of the chunk's first query, in each batch row.
    end: number of keys of each batch row.
    chunk: queries of the chunk, a multiple of UNIT.
    keys: keys after padding, a multiple of UNIT.
  """
  row_units = chunk // UNIT
  unit = jnp.arange(row_units, dtype=jnp.int32)[None]
  last = first[:, None] + UNIT * (1 + unit)
  counts = jnp.maximum(jnp.minimum(last, end[:, None]) + UNIT - 1, 0) // UNIT
  counts = counts.reshape(-1)
  ends = jnp.cumsum(counts, dtype=jnp.int32)
  index = jnp.arange(counts.size * (keys // UNIT), dtype=jnp.int32)
  of_query = mosaic.counts_up_to(ends, index.size)
  of_query = jnp.minimum(of_query, counts.size - 1)
  key = index - (ends - counts)[of_query]
  units = jnp.stack([of_query // row_units, of_query % row_units, key], axis=-1)
  return units, ends[-1]


def _packed_units(
  limits: Int[Array, "batch queries"], until: Int[Array, "batch keys"],
  first_query: Any,
) -> tuple[Int[Array, "units 3"], Int[Array, ""]]:  # fmt: skip
  """`_visible_units` of packed rows, and some in which no query sees a key.

  Args:
    limits: of a chunk's queries.
    until: of all keys, counted in queries.
    first_query: number of the chunk's first query.
  """
  batch, chunk = limits.shape
  query = first_query + jnp.arange(chunk, dtype=jnp.int32)
  limits = limits.reshape(batch, -1, UNIT)
  query = jnp.where(limits > 0, query.reshape(-1, UNIT), mosaic.NEVER)
  first, limit = jnp.min(query, axis=-1), jnp.max(limits, axis=-1)
  until = until.reshape(batch, 1, -1, UNIT).max(axis=-1)
  key = jnp.arange(until.shape[-1], dtype=jnp.int32) * UNIT
  flags = (first[..., None] < until) & (key < limit[..., None])
  units = jnp.argwhere(flags, size=flags.size, fill_value=0)
  return units.astype(jnp.int32), jnp.sum(flags, dtype=jnp.int32)


def _first_seen(until: Int[Array, "B S"]) -> Int[Array, "B S"]:
  """Where the document or tree of each slot starts."""
  slot = jnp.arange(until.shape[1], dtype=jnp.int32)[None]
  seen = lax.cummax(until, axis=1)
  seen = jnp.pad(seen, ((0, 0), (1, 0)))[:, :-1]
  starts = (until > 0) & (seen <= slot)
  return lax.cummax(jnp.where(starts, slot, 0), axis=1)


@functools.partial(
  jax.jit,
  static_argnames=(
    "scale", "index_scale", "with_gradients", "config", "interpret",
  ),
)  # fmt: skip
def kl(
  q: Float[Array, "B T H D"],
  k: Float[Array, "B S K D"],
  index_q: Float[Array, "B T K I"],
  index_k: Float[Array, "B S I"],
  lse: Float[Array, "B H T"],
  kv_lengths: Int[Array, "B"],
  query_mask: Bool[Array, "B T"] | Float[Array, "B T"],
  counted: Int[Array, ""] | Float[Array, ""],
  until: Int[Array, "B S"] | None = None,
  *,
  scale: float,
  index_scale: float,
  with_gradients: bool,
  config: Config,
  interpret: bool,
) -> tuple[Array, Array, Array]:
  """The loss, and dindex_q and dindex_k in float32 (else empty arrays).

  They are means over `counted` queries and groups, which may be more than those
  of this call. A query_mask of float32 holds weights from 0 to 1. Of packed
  rows, `until` is the slot from which on each key is not seen any more, 0 for
  padding; None for plain rows.
  """
  b, t, num_heads, d = q.shape
  s_len, num_kv_heads = k.shape[1:3]
  i_dim = index_q.shape[-1]

  def round_up(x):
    return -(-x // UNIT) * UNIT

  keys = round_up(s_len)
  most = max(config.workspace // (num_kv_heads * keys) // UNIT, 1) * UNIT
  num_chunks = -(-t // most)
  chunk = round_up(-(-t // num_chunks))
  queries = num_chunks * chunk
  batch_rows = 1  # batch rows of a launch
  if num_chunks == 1:
    fits = config.workspace // (num_kv_heads * chunk * keys)
    batch_rows = mosaic.largest_divisor(b, fits)

  def pad(x, axis, size):
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths) if x.shape[axis] < size else x

  first_slot = (kv_lengths - t)[:, None]
  positions = first_slot + jnp.arange(t, dtype=jnp.int32)[None]

  def of_queries(x, fill):
    return packed_rows.at_slots(x, first_slot, t, fill)

  weights = None
  if query_mask.dtype != jnp.bool_:
    weights = pad(query_mask.astype(jnp.float32), 1, queries)
    query_mask = query_mask != 0
  if until is not None:  # a query of packed rows sees its own key
    query_mask &= of_queries(until, 0) > positions
  limits = jnp.where(query_mask, jnp.maximum(positions + 1, 0), 0)
  index_q, bad_q = mosaic.zero_non_finite(index_q)
  index_k, bad_k = mosaic.zero_non_finite(index_k)
  slot = jnp.arange(s_len, dtype=jnp.int32)
  if until is None:
    first_bad = jnp.min(jnp.where(bad_k, slot, mosaic.NEVER), axis=1)
    sees_bad = limits > first_bad[:, None]
  else:
    last_bad = lax.cummax(jnp.where(bad_k, until, 0), axis=1)
    sees_bad = (of_queries(last_bad, 0) > positions) & (limits > 0)
  poisoned = bad_q | sees_bad[..., None]
  poisoned = pad(jnp.moveaxis(poisoned, 1, 2), 2, queries)

  limits = pad(limits, 1, queries)
  # Adding log G to lse divides p by G, so a sum over heads gives the mean. A
  # division of the sum could give less than the smallest normal number, whose
  # approximate logarithm is -inf.
  group_size = num_heads // num_kv_heads
  lse = lse.astype(jnp.float32) * mosaic.LOG2E + math.log2(group_size)
  lse = pad(lse, 2, queries)
  q = pad(q, 1, queries).reshape(b, queries, -1)
  iq = pad(index_q, 1, queries).reshape(b, queries, -1)
  k = pad(k, 1, keys).reshape(b, keys, -1)
  ik = pad(index_k, 1, keys)
  params = KernelParams(
    group_size=group_size,
    num_kv_heads=num_kv_heads,
    head_dim=d,
    index_dim=i_dim,
    dtype=jnp.dtype(q.dtype),
    scale=scale,
    index_scale=index_scale,
    with_gradients=with_gradients,
    config=config,
    interpret=interpret,
  )
  index_lse = jax.new_ref(lax.empty((b, num_kv_heads, queries), jnp.float32))
  extents = jnp.stack([kv_lengths - t, kv_lengths], axis=-1)
  packed = None
  if until is not None:
    first = of_queries(_first_seen(until), 0)
    first = jnp.where(query_mask, first, mosaic.NEVER)
    first = jnp.pad(
      first, ((0, 0), (0, queries - t)), constant_values=mosaic.NEVER
    ).reshape(b, -1, 2 * ROWS)
    until = pad(until - first_slot, 1, keys)
    packed = until, first.min(axis=-1) // KEYS
  _index_lse(index_lse, extents, limits, packed, iq, ik, params=params)
  index_lse = jnp.where(poisoned, jnp.nan, jax.freeze(index_lse))

  def einsum(spec, x, y):
    return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32)

  def launch(index, carry):
    first_row = index * batch_rows

    def launch_part(x):
      return lax.dynamic_slice_in_dim(x, first_row, batch_rows)

    def step(i, carry):
      total, diq, dik, g = carry
      if until is None:
        ends = launch_part(kv_lengths)
        units, num_units = _visible_units(
          ends - t + i * chunk, ends, chunk, keys
        )
      else:
        of_chunk = lax.dynamic_slice_in_dim(
          launch_part(limits), i * chunk, chunk, 1
        )
        units, num_units = _packed_units(
          of_chunk, launch_part(until), i * chunk
        )
        g = jnp.zeros_like(g)
      chunk_desc = jnp.stack([first_row, i * chunk, num_units]).astype(
        jnp.int32
      )
      values = jax.new_ref(lax.empty((config.num_ctas, 2, ROWS), jnp.float32))
      g = jax.new_ref(g)
      _units(
        values, g, chunk_desc, units, limits, weights, until, index_lse, lse,
        iq, q, k, ik, params=params,
      )  # fmt: skip
      total += jnp.sum(jax.freeze(values))
      g = jax.freeze(g)
      if with_gradients:
        by_batch_row = g.reshape(batch_rows, num_kv_heads, chunk, keys)
        diq = lax.dynamic_update_slice(
          diq,
          einsum("bkts,bsi->btki", by_batch_row, launch_part(ik)),
          (first_row, i * chunk, 0, 0),
        )
        of_chunk = lax.dynamic_slice_in_dim(
          launch_part(iq), i * chunk, chunk, 1
        )
        of_chunk = of_chunk.reshape(batch_rows, chunk, num_kv_heads, i_dim)
        one = launch_part(dik) + einsum(
          "bkts,btki->bsi", by_batch_row, of_chunk
        )
        dik = lax.dynamic_update_slice_in_dim(dik, one, first_row, axis=0)
      return total, diq, dik, g

    # A unit that is skipped in one chunk was skipped in all chunks before it,
    # because later queries see more keys. So g still holds its zeros there. In
    # packed rows it is zeroed in each chunk.
    sizes = (1, ROWS, KEYS)
    if with_gradients:
      sizes = (batch_rows * num_kv_heads, chunk, keys)
    carry = *carry, jnp.zeros(sizes, q.dtype)
    return lax.fori_loop(0, num_chunks, step, carry)[:3]

  sizes = (queries, keys) if with_gradients else (0, 0)
  total, diq, dik = lax.fori_loop(
    0,
    b // batch_rows,
    launch,
    (
      jnp.float32(0),
      jnp.zeros((b, sizes[0], num_kv_heads, i_dim), jnp.float32),
      jnp.zeros((b, sizes[1], i_dim), jnp.float32),
    ),
  )
  counted = jnp.asarray(counted, jnp.float32)
  factor = index_scale / G_SCALE / counted
  return (
    total * mosaic.LN2 / counted,
    diq[:, :t] * factor,
    dik[:, :s_len] * factor,
  )
