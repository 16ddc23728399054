"""The warm-up phase on Hopper: dense attention and the KL over all tokens.

**attention**: cuDNN's, forward and backward, with the float32 log sum exp that
its forward keeps for its backward. Non-finite operands are zeroed before it and
the rows that see one are made NaN after it: cuDNN's masked zeros times NaN
would reach rows that see none. Its backward repeats its bits only if XLA is
told to want that (`--xla_gpu_exclude_nondeterministic_ops`).

**kl**: with p_j = mean over the group's heads of exp(scale q.k_j - lse) and
r_j = exp(index_scale index_q.index_k_j - index_lse), over visible tokens j:

  value = sum_j p_j (log p_j - log r_j)     g_j = r_j - p_j
  dindex_q = index_scale sum_j g_j index_k_j
  dindex_k_j = index_scale sum over queries and groups of g_j index_q

divided by the rows that count. Two kernels and two products, no gathers:

* **index_lse**: a CTA owns 128 queries of a group, 64 a warpgroup, and walks
  their visible index keys with an online maximum.
* **pairs**: a CTA owns 256 queries x 256 keys of a group, a warpgroup 128 of
  the keys, 64 queries at a time. A tile of scores is 64 queries of *one* head,
  and the heads take turns: so their mean is a sum in registers, in float32, of
  any number of heads, and falls into the layout of the index scores. K and
  index_k stay in SMEM; a third warpgroup copies q, one head at a time. g goes
  to memory, all groups of as many batch rows as a workspace of 2^29 elements
  has room for, or of a longer row a chunk of queries: dindex_q and dindex_k are
  products with it. Units that nobody sees are not visited: the workspace holds
  zeros there.

Nothing crosses CTAs but the sum of their values: all order is fixed.

Bound: the scores of all heads, half the products of a dense forward, and an
exponential each; one part in 16 more for the index scores. At H 64, D = I = 128
and 32K tokens 9.3 TFLOP, 12 ms at 800 TFLOP/s, and 10 ms of the exponential
units, which overlap as far as the two warpgroups take turns. q comes from L2,
256 FLOP a byte. g is written once and read twice, zeros included: 21 GB, 8 ms.
SMEM at D = I = 128: K and index_k 64 KB each, q 16 a stage, index_q 16, g 32.

NaN: one in a query or in the lse reaches g of what the query sees and nothing
else; index keys that are not finite are zeroed, and rows that see one are made
NaN through index_lse. Keys that a row does not see are masked after the sum.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import mosaic
from pallas_kernels.mosaic import FLOOR

ACC = plgpu.WGMMAAccumulatorRef
ROWS = 64  # queries of a score tile
KEYS = 128  # of a warpgroup
UNIT = 256  # queries and keys of a unit
# Of g in memory: float16 loses what is below 2^-24, and g is at most 1.
G_SCALE = 2.0**15


@dataclasses.dataclass(frozen=True)
class Config:
  """Tile and pipeline sizes; the result changes by rounding only.

  Attributes:
    stages: tiles of q in flight.
    workspace: most elements of g, if they are 256 queries' at least.
    num_ctas: CTAs of the persistent grids.
  """

  stages: int = 3
  workspace: int = 1 << 29
  num_ctas: int = mosaic.NUM_SMS


def heuristic_config() -> Config:
  """The config used without one."""
  return Config()


def candidate_configs() -> tuple[Config, ...]:
  """Configs that are worth timing; every one is tested."""
  return Config(), Config(stages=2), Config(workspace=1 << 27)


@dataclasses.dataclass(frozen=True)
class Shape:
  """Static sizes of one call, after padding."""

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


def _span(start, size: int):
  """A slice that starts at a multiple of its size, as TMA copies must know."""
  return pl.ds(pl.multiple_of(start, size), size)


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


def _key_of_column():
  return plgpu.broadcasted_iota(
    jnp.int32, (ROWS, KEYS), 1, layout=plgpu.Layout.WGMMA
  )


def _index_lse(out, spans, limits, iq, ik, *, shape: Shape):
  """log2 sum exp2 of every query's index scores; anything where it sees none.

  `spans`: each batch row's slots of the first query and after the last key.
  """
  s, config, stages = shape, shape.config, shape.config.stages
  batch, _, q_len = out.shape
  rows = batch * s.num_kv_heads
  tiles = q_len // (2 * ROWS)
  row_layout = plgpu.Layout.WGMMA.reduce(1)

  def body(
    spans_gmem, limits_gmem, iq_gmem, ik_gmem, out_gmem, iq_smem, ik_smem,
    iq_ready, iq_free, ik_ready, ik_free,
  ):  # fmt: skip
    cta, wg = lax.axis_index("cta"), lax.axis_index("wg")
    mine = (tiles * rows - cta + config.num_ctas - 1) // config.num_ctas

    def locate(i):
      """Batch row, group, first query and number of key blocks of a tile."""
      index = cta + i * config.num_ctas
      # The last queries see most and start first.
      first = (tiles - 1 - index // rows) * 2 * ROWS
      row = lax.rem(index, rows) // s.num_kv_heads
      seen = jnp.minimum(
        spans_gmem[row, 0] + first + 2 * ROWS, spans_gmem[row, 1]
      )
      blocks = jnp.maximum(seen + KEYS - 1, 0) // KEYS
      return row, lax.rem(index, s.num_kv_heads), first, blocks

    @pl.when(wg < 2)
    def _compute():
      def tile(i, step):
        row, group, first, blocks = locate(i)
        queries = _span(first + wg * ROWS, ROWS)
        limit = plgpu.load(
          limits_gmem.at[row, queries], layout=row_layout, optimized=False
        )
        plgpu.barrier_wait(iq_ready)

        def block(j, carry):
          m_i, l_i = carry
          slot = lax.rem(step + j, stages)
          plgpu.barrier_wait(ik_ready.at[slot])
          scores = _scores(iq_smem.at[wg], ik_smem.at[slot])
          plgpu.barrier_arrive(ik_free.at[slot])
          visible = _key_of_column() < _along_keys(limit - j * KEYS)
          scores = scores * (s.index_scale * mosaic.LOG2E)
          scores = jnp.where(visible, scores, FLOOR)
          m_new = jnp.maximum(m_i, scores.max(axis=1))
          p = jnp.exp2(scores - _along_keys(m_new))
          return m_new, l_i * jnp.exp2(m_i - m_new) + p.sum(axis=1)

        m_i, l_i = lax.fori_loop(
          0, blocks, block, (_row_vector(FLOOR), _row_vector(0.0))
        )
        plgpu.barrier_arrive(iq_free)
        out_gmem[row, group, queries] = m_i + jnp.log2(l_i)
        return step + blocks

      lax.fori_loop(0, mine, tile, jnp.int32(0))

    @pl.when(wg == 2)
    def _copy():
      def tile(i, step):
        row, group, first, blocks = locate(i)

        @pl.when(i > 0)
        def _():
          plgpu.barrier_wait(iq_free)

        for h in range(2):
          plgpu.copy_gmem_to_smem(
            iq_gmem.at[
              row,
              _span(first + h * ROWS, ROWS),
              _span(group * s.index_dim, s.index_dim),
            ],
            iq_smem.at[h],
            iq_ready,
          )

        def block(j, step):
          slot = lax.rem(step, stages)

          @pl.when(step >= stages)
          def _():
            plgpu.barrier_wait(ik_free.at[slot])

          plgpu.copy_gmem_to_smem(
            ik_gmem.at[row, _span(j * KEYS, KEYS)],
            ik_smem.at[slot],
            ik_ready.at[slot],
          )
          return step + 1

        return lax.fori_loop(0, blocks, block, step)

      step = lax.fori_loop(0, mine, tile, jnp.int32(0))
      mosaic.drain(ik_free, step)

      @pl.when(mine > 0)
      def _():
        plgpu.barrier_wait(iq_free)

  mosaic.launch(
    body, spans, limits, iq, ik, out,
    name="warmup_index_lse",
    num_ctas=config.num_ctas,
    num_warpgroups=3,
    interpret=s.interpret,
    scratch=[
      s.operand(2, ROWS, s.index_dim),
      s.operand(stages, KEYS, s.index_dim),
      plgpu.Barrier(num_arrivals=2),
      plgpu.Barrier(num_arrivals=2),
      plgpu.Barrier(num_barriers=stages),
      plgpu.Barrier(num_arrivals=2, num_barriers=stages),
    ],
  )  # fmt: skip


def _pairs(
  values, g, where, units, limits, index_lse, lse, iq, q, k, ik, *, shape: Shape
):
  """Values of a chunk's pairs, and g if gradients are wanted.

  `where`: first batch row, first query and number of units, of all rows, which
  each KV head repeats. `units`: batch row in the launch, and place of the
  queries in the chunk and of the keys, counted in units.
  """
  s, config, stages = shape, shape.config, shape.config.stages
  tiles = UNIT // ROWS
  row_layout = plgpu.Layout.WGMMA.reduce(1)

  def body(
    where_gmem, units_gmem, limits_gmem, ilse_gmem, lse_gmem, iq_gmem, q_gmem,
    k_gmem, ik_gmem, values_gmem, g_gmem,
    q_smem, lse_smem, k_smem, ik_smem, iq_smem, g_smem,
    q_ready, q_free, k_ready, k_free, ik_ready, ik_free, iq_ready, iq_free,
  ):  # fmt: skip
    cta, wg = lax.axis_index("cta"), lax.axis_index("wg")
    origin, per_head = where_gmem[1], where_gmem[2]
    total = per_head * s.num_kv_heads
    mine = (total - cta + config.num_ctas - 1) // config.num_ctas

    def locate(i):
      """Row in the launch, group, first query in the chunk and first key."""
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
        row = where_gmem[0] + launch_row
        my_key = first_key + wg * KEYS
        plgpu.barrier_wait(k_ready)

        def tile(j, carry):
          step, value = carry
          queries = _span(origin + first_query + j * ROWS, ROWS)
          # Used after the heads only: by then they have come.
          limit, ilse = (
            plgpu.load(x, layout=row_layout, optimized=False)
            for x in (
              limits_gmem.at[row, queries],
              ilse_gmem.at[row, group, queries],
            )
          )

          def head(h, mean):
            slot = lax.rem(step + h, stages)
            plgpu.barrier_wait(q_ready.at[slot])
            scores = _scores(q_smem.at[slot], k_smem.at[wg])
            lse_rows = plgpu.load(lse_smem.at[slot], layout=row_layout)
            plgpu.barrier_arrive(q_free.at[slot])
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
            plgpu.barrier_arrive(k_free)

          @pl.when(j == 0)
          def _():
            plgpu.barrier_wait(ik_ready)

          plgpu.barrier_wait(iq_ready)
          scores = _scores(iq_smem, ik_smem.at[wg])
          plgpu.barrier_arrive(iq_free)

          @pl.when(j == tiles - 1)
          def _():
            plgpu.barrier_arrive(ik_free)

          visible = _key_of_column() < _along_keys(limit - my_key)
          p = jnp.where(visible, mean * (1.0 / s.group_size), 0.0)
          log_r = scores * (s.index_scale * mosaic.LOG2E) - _along_keys(ilse)
          # 0 log 0 = 0; a NaN of p or r stays.
          log_p = jnp.log2(jnp.where(p > 0.0, p, 1.0))
          term = jnp.where(visible, p * (log_p - log_r), 0.0)
          value += term.sum(axis=1)
          if s.with_gradients:
            r = jnp.where(visible, jnp.exp2(log_r), 0.0)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            g_smem[wg] = ((r - p) * G_SCALE).astype(s.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(
              g_smem.at[wg],
              g_gmem.at[
                launch_row * s.num_kv_heads + group,
                _span(first_query + j * ROWS, ROWS),
                _span(my_key, KEYS),
              ],
            )
          return step + s.group_size, value

        return lax.fori_loop(0, tiles, tile, carry)

      _, value = lax.fori_loop(0, mine, unit, (jnp.int32(0), _row_vector(0.0)))
      values_gmem[cta, wg] = value
      plgpu.wait_smem_to_gmem(0)

    @pl.when(wg == 2)
    def _copy():
      plgpu.set_max_registers(40, action="decrease")

      def unit(i, carry):
        launch_row, group, first_query, first_key = locate(i)
        row = where_gmem[0] + launch_row
        keys = [_span(first_key + h * KEYS, KEYS) for h in range(2)]
        columns = _span(group * s.head_dim, s.head_dim)

        @pl.when(i > 0)
        def _():
          plgpu.barrier_wait(k_free)

        for h in range(2):
          plgpu.copy_gmem_to_smem(
            k_gmem.at[row, keys[h], columns], k_smem.at[h], k_ready
          )

        @pl.when(i > 0)
        def _():
          plgpu.barrier_wait(ik_free)

        for h in range(2):
          plgpu.copy_gmem_to_smem(
            ik_gmem.at[row, keys[h]], ik_smem.at[h], ik_ready
          )

        def tile(j, carry):
          step, tile_step = carry
          queries = _span(origin + first_query + j * ROWS, ROWS)

          def head(h, step):
            slot = lax.rem(step, stages)
            one = group * s.group_size + h

            @pl.when(step >= stages)
            def _():
              plgpu.barrier_wait(q_free.at[slot])

            plgpu.copy_gmem_to_smem(
              q_gmem.at[row, queries, _span(one * s.head_dim, s.head_dim)],
              q_smem.at[slot],
              q_ready.at[slot],
            )
            plgpu.copy_gmem_to_smem(
              lse_gmem.at[row, one, queries], lse_smem.at[slot],
              q_ready.at[slot],
            )  # fmt: skip
            return step + 1

          step = lax.fori_loop(0, s.group_size, head, step)

          @pl.when(tile_step > 0)
          def _():
            plgpu.barrier_wait(iq_free)

          columns = _span(group * s.index_dim, s.index_dim)
          plgpu.copy_gmem_to_smem(
            iq_gmem.at[row, queries, columns], iq_smem, iq_ready
          )
          return step, tile_step + 1

        return lax.fori_loop(0, tiles, tile, carry)

      step, _ = lax.fori_loop(0, mine, unit, (jnp.int32(0), jnp.int32(0)))
      mosaic.drain(q_free, step)

      @pl.when(mine > 0)
      def _():
        plgpu.barrier_wait(k_free)
        plgpu.barrier_wait(ik_free)
        plgpu.barrier_wait(iq_free)

  mosaic.launch(
    body, where, units, limits, index_lse, lse, iq, q, k, ik, values, g,
    name="warmup_pairs",
    num_ctas=config.num_ctas,
    num_warpgroups=3,
    interpret=s.interpret,
    scratch=[
      s.operand(stages, ROWS, s.head_dim),
      plgpu.SMEM((stages, ROWS), jnp.float32),
      s.operand(2, KEYS, s.head_dim),
      s.operand(2, KEYS, s.index_dim),
      s.operand(ROWS, s.index_dim),
      s.operand(2, ROWS, KEYS),
      plgpu.Barrier(num_arrivals=2, num_barriers=stages),
      plgpu.Barrier(num_arrivals=2, num_barriers=stages),
      plgpu.Barrier(num_arrivals=2),
      plgpu.Barrier(num_arrivals=2),
      plgpu.Barrier(num_arrivals=2),
      plgpu.Barrier(num_arrivals=2),
      plgpu.Barrier(),
      plgpu.Barrier(num_arrivals=2),
    ],
  )  # fmt: skip


def _visible_units(
  first: Int[Array, "rows"], end: Int[Array, "rows"], chunk: int, keys: int
) -> tuple[Int[Array, "units 3"], Int[Array, ""]]:
  """Units of a chunk that hold a visible pair, and their number.

  By row, then queries, then keys: the three places of a unit.

  Args:
    first: slot of the chunk's first query, in each row.
    end: keys that exist.
    chunk: queries, a multiple of UNIT.
    keys: the same for keys.
  """
  of_row = chunk // UNIT
  last = first[:, None] + UNIT * (1 + jnp.arange(of_row, dtype=jnp.int32))
  counts = jnp.maximum(jnp.minimum(last, end[:, None]) + UNIT - 1, 0) // UNIT
  counts = counts.reshape(-1)
  ends = jnp.cumsum(counts, dtype=jnp.int32)
  index = jnp.arange(counts.size * (keys // UNIT), dtype=jnp.int32)
  place = jnp.searchsorted(
    ends, index, side="right", method="scan_unrolled"
  ).astype(jnp.int32)
  place = jnp.minimum(place, counts.size - 1)
  key = index - (ends - counts)[place]
  return jnp.stack([place // of_row, place % of_row, key], axis=-1), ends[-1]


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
  query_mask: Bool[Array, "B T"],
  *,
  scale: float,
  index_scale: float,
  with_gradients: bool,
  config: Config,
  interpret: bool,
) -> tuple[Array, Array, Array]:
  """The loss, dindex_q and dindex_k (float32; empty without gradients)."""
  b, t, num_heads, d = q.shape
  s_len, num_kv_heads = k.shape[1:3]
  i_dim = index_q.shape[-1]
  counted = jnp.maximum(jnp.sum(query_mask), 1) * num_kv_heads

  def round_up(x):
    return -(-x // UNIT) * UNIT

  keys = round_up(s_len)
  most = max(config.workspace // (num_kv_heads * keys) // UNIT, 1) * UNIT
  num_chunks = -(-t // most)
  chunk = round_up(-(-t // num_chunks))
  queries = num_chunks * chunk
  # Batch rows of a launch.
  rows = 1
  if num_chunks == 1:
    fits = config.workspace // (num_kv_heads * chunk * keys)
    rows = mosaic.largest_divisor(b, fits)

  def pad(x, axis, size):
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths) if x.shape[axis] < size else x

  positions = (kv_lengths - t)[:, None] + jnp.arange(t, dtype=jnp.int32)
  limits = jnp.where(query_mask, jnp.maximum(positions + 1, 0), 0)
  index_q, bad_q = _zero_bad(index_q)
  index_k, bad_k = _zero_bad(index_k)
  slot = jnp.arange(s_len, dtype=jnp.int32)
  first_bad = jnp.min(jnp.where(bad_k, slot, mosaic.NEVER), axis=1)
  poisoned = bad_q | (limits > first_bad[:, None])[..., None]
  poisoned = pad(jnp.moveaxis(poisoned, 1, 2), 2, queries)

  limits = pad(limits, 1, queries)
  lse = pad(lse.astype(jnp.float32) * mosaic.LOG2E, 2, queries)
  q = pad(q, 1, queries).reshape(b, queries, -1)
  iq = pad(index_q, 1, queries).reshape(b, queries, -1)
  k = pad(k, 1, keys).reshape(b, keys, -1)
  ik = pad(index_k, 1, keys)
  shape = Shape(
    group_size=num_heads // num_kv_heads,
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
  spans = jnp.stack([kv_lengths - t, kv_lengths], axis=-1)
  _index_lse(index_lse, spans, limits, iq, ik, shape=shape)
  index_lse = jnp.where(poisoned, jnp.nan, jax.freeze(index_lse))

  def einsum(spec, x, y):
    return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32)

  def launch(index, carry):
    first_row = index * rows

    def of_rows(x):
      return lax.dynamic_slice_in_dim(x, first_row, rows)

    def step(i, carry):
      total, diq, dik, g = carry
      ends = of_rows(kv_lengths)
      units, num_units = _visible_units(ends - t + i * chunk, ends, chunk, keys)
      where = jnp.stack([first_row, i * chunk, num_units]).astype(jnp.int32)
      values = jax.new_ref(lax.empty((config.num_ctas, 2, ROWS), jnp.float32))
      g = jax.new_ref(g)
      _pairs(
        values, g, where, units, limits, index_lse, lse, iq, q, k, ik,
        shape=shape,
      )  # fmt: skip
      total += jnp.sum(jax.freeze(values))
      g = jax.freeze(g)
      if with_gradients:
        by_row = g.reshape(rows, num_kv_heads, chunk, keys)
        diq = lax.dynamic_update_slice(
          diq,
          einsum("bkts,bsi->btki", by_row, of_rows(ik)),
          (first_row, i * chunk, 0, 0),
        )
        of_chunk = lax.dynamic_slice_in_dim(of_rows(iq), i * chunk, chunk, 1)
        of_chunk = of_chunk.reshape(rows, chunk, num_kv_heads, i_dim)
        one = of_rows(dik) + einsum("bkts,btki->bsi", by_row, of_chunk)
        dik = lax.dynamic_update_slice_in_dim(dik, one, first_row, axis=0)
      return total, diq, dik, g

    # From chunk to chunk a place of g sees no less: what is not visited now
    # was not before, and holds zero.
    sizes = (1, ROWS, KEYS)
    if with_gradients:
      sizes = (rows * num_kv_heads, chunk, keys)
    carry = *carry, jnp.zeros(sizes, q.dtype)
    return lax.fori_loop(0, num_chunks, step, carry)[:3]

  sizes = (queries, keys) if with_gradients else (0, 0)
  total, diq, dik = lax.fori_loop(
    0,
    b // rows,
    launch,
    (
      jnp.float32(0),
      jnp.zeros((b, sizes[0], num_kv_heads, i_dim), jnp.float32),
      jnp.zeros((b, sizes[1], i_dim), jnp.float32),
    ),
  )
  factor = index_scale / G_SCALE / counted
  return (
    total * mosaic.LN2 / counted,
    diq[:, :t] * factor,
    dik[:, :s_len] * factor,
  )
