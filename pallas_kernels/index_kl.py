"""KL loss of the Index Branch on Hopper, with its gradients.

Over all visible tokens see `warmup`; here is the sparse phase.

Over the visible tokens J of a query's chosen blocks, with the mean over the
heads of its group p_j = mean exp(scale q.k_j - lse) and r_j = exp(index_scale
index_q.index_k_j - index_lse):

  value = sum_j p_j (log p_j - log r_j)     g_j = r_j - p_j
  dindex_q = index_scale sum_j g_j index_k_j
  dindex_k_j = index_scale sum over queries and groups of g_j index_q

divided by the rows that count. p, r and g of a pair need both log sum exps, so
value and gradients come from one pass: the gradient is ready when the loss is.

An owner (see `sparse_attention_bwd`) is a block of 128 keys with the queries
that chose it, its edges, 64 at a time:

* **index_lse**: scores of 64 edges with the block, a log sum exp each; merged
  over a query's choices afterwards.
* **owners**: two warpgroups of 64 keys each. Gathered q rows give p, keys x
  rows; a product with a constant matrix takes the mean over heads and puts it
  in the column of its edge, without leaving the accumulator layout. Then the
  index scores of the 64 edges, r, g, the value; g times index_q adds to
  dindex_k in registers, and g from both halves times index_k is a partial of
  dindex_q, in the working dtype, summed over choices afterwards. dindex_k sums
  up as dK does there. A third warpgroup copies. All orders are fixed.

Bound, for an edge of 16 heads at D = I = 128: 4 KB of q in; 0.52 MFLOP of
scores, 0.26 of means, 0.1 of the rest; 2,048 exponentials, 128 cycles of an SM.

NaN: one in a query reaches its own row and what it sees; keys that are not
finite are zeroed, and rows that see one are made NaN through index_lse.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import mosaic, schedule, sparse_attention, warmup
from pallas_kernels.sparse_attention_bwd import KEYS, ROWS, sum_extra

ACC = plgpu.WGMMAAccumulatorRef
EDGES = 64  # of a piece
MAX_EDGES = 1 << 20  # of a chunk


@dataclasses.dataclass(frozen=True)
class Config:
  """Tile and pipeline sizes; the result changes by rounding only.

  Attributes:
    stages: tiles of 64 gathered q rows in flight.
    task: most edges of a task.
    chunk: most queries of a chunk; 0 lets the number of edges decide.
    num_ctas: CTAs of the persistent grids.
  """

  stages: int = 4
  task: int = 512
  chunk: int = 0
  num_ctas: int = mosaic.NUM_SMS


def heuristic_config() -> Config:
  """The config used without one."""
  return Config()


def candidate_configs() -> tuple[Config, ...]:
  """Configs that are worth timing; every one is tested."""
  return Config(), Config(stages=3), Config(task=1024), Config(task=256)


@dataclasses.dataclass(frozen=True)
class Shape:
  """Static sizes of one call, after padding."""

  rows: int  # of one query in a tile: its heads, at least 8
  head_dim: int
  index_dim: int
  top_k: int
  num_owners: int
  dtype: jnp.dtype
  scale: float
  index_scale: float
  with_gradients: bool
  config: Config
  interpret: bool

  @property
  def half(self) -> int:
    """Queries in 64 rows."""
    return ROWS // self.rows


def _visible(limits, key, layout_axis):
  """Whether edges, along an axis, see the keys of their owner block."""

  def along(x):
    return lax.broadcast_in_dim(x, key.shape, [layout_axis])

  half = 1 << (8 + key // KEYS)
  return (key < along(limits & 255)) & ((along(limits) & half) != 0)


def _index_lse(out, num_tasks, plan, firsts, limits, iq, ik, row, *, shape):
  """log2 sum exp2 of each edge's index scores with its block, by piece."""
  s, config = shape, shape.config
  row_layout = plgpu.Layout.WGMMA.reduce(1)

  def body(
    where_gmem, tasks_gmem, first_gmem, limit_gmem, iq_gmem, ik_gmem, out_gmem,
    iq_smem, ik_smem, iq_ready, ik_ready,
  ):  # fmt: skip
    cta, wg = lax.axis_index("cta"), lax.axis_index("wg")
    my_tasks = (where_gmem[1] - cta + config.num_ctas - 1) // config.num_ctas

    def task(i, carry):
      index = cta + i * config.num_ctas
      block, _, count = (tasks_gmem[index, j] for j in range(3))
      first = first_gmem[index]
      pieces = (count + EDGES - 1) // EDGES
      mine = (pieces - wg + 1) // 2
      tokens = pl.ds(block * schedule.OWNER_BLOCK, schedule.OWNER_BLOCK)
      plgpu.copy_gmem_to_smem(
        ik_gmem.at[where_gmem[0], tokens], ik_smem.at[wg], ik_ready.at[wg]
      )
      plgpu.barrier_wait(ik_ready.at[wg])

      def piece(j, carry):
        at = pl.multiple_of((first + wg + 2 * j) * EDGES, EDGES)
        plgpu.copy_gmem_to_smem(
          iq_gmem.at[pl.ds(at, EDGES)], iq_smem.at[wg], iq_ready.at[wg]
        )
        limit = plgpu.load(
          limit_gmem.at[pl.ds(at, EDGES)], layout=row_layout, optimized=False
        )
        plgpu.barrier_wait(iq_ready.at[wg])

        def product(acc):
          plgpu.wgmma(acc, iq_smem.at[wg], ik_smem.at[wg].transpose((1, 0)))
          return acc[...]

        scores = pl.run_scoped(
          product, ACC((EDGES, schedule.OWNER_BLOCK), jnp.float32)
        )
        scores = scores * (s.index_scale * mosaic.LOG2E)
        key = plgpu.broadcasted_iota(
          jnp.int32, scores.shape, 1, layout=plgpu.Layout.WGMMA
        )
        visible = _visible(limit, key, 0)
        scores = jnp.where(visible, scores, sparse_attention.FLOOR)
        m = scores.max(axis=1)
        total = jnp.exp2(scores - lax.broadcast_in_dim(m, scores.shape, [0]))
        total = jnp.where(visible, total, 0.0).sum(axis=1)
        out_gmem[pl.ds(at, EDGES)] = m + jnp.log2(total)
        return carry

      return lax.fori_loop(0, mine, piece, carry)

    lax.fori_loop(0, my_tasks, task, None)

  def operand(*leading):
    return plgpu.SMEM(
      (*leading, s.index_dim), s.dtype, transforms=mosaic.OPERAND
    )

  where = jnp.stack([row, num_tasks]).astype(jnp.int32)
  mosaic.launch(
    body, where, plan.tasks, firsts, limits, iq, ik, out,
    name="kl_index_lse",
    num_ctas=config.num_ctas,
    num_warpgroups=2,
    interpret=s.interpret,
    scratch=[
      operand(2, EDGES),
      operand(2, schedule.OWNER_BLOCK),
      plgpu.Barrier(num_barriers=2),
      plgpu.Barrier(num_barriers=2),
    ],
  )  # fmt: skip


def _mean_matrix(rows: int, group_size: int) -> np.ndarray:
  """[ways, 120, 64]: rows 56 - 8 m on, of way b, are the transpose of the
  matrix that takes 64 rows, tile 2 m + b or m of a piece, to their edges.

  Slices of an operand start at multiples of 8.
  """
  half = ROWS // rows
  ways = 8 // half
  edge = np.arange(120)[None, :, None]
  wanted = 56 + half * np.arange(ways)[:, None, None] + np.arange(64) // rows
  return np.where(edge == wanted, 1.0 / group_size, 0.0)


def _owners(
  values, partials, sums, where, plan, firsts, limits, index_lse, iq, lse,
  q, k, ik, means, *, shape,
):  # fmt: skip
  """Values, dindex_q partials and dindex_k of a chunk.

  `where`: batch row, group, first query, number of tasks.
  """
  s, config = shape, shape.config
  half, rows, d, i_dim = s.half, s.rows, s.head_dim, s.index_dim
  stages = config.stages
  ways = means.shape[0]
  column_layout = plgpu.Layout.WGMMA.reduce(0)

  def body(
    where_gmem, tasks_gmem, order_gmem, first_gmem, limit_gmem, ilse_gmem,
    iq_gmem, lse_gmem, q_gmem, k_gmem, ik_gmem, means_gmem,
    value_gmem, part_gmem, sums_gmem,
    q_smem, lse_smem, k_smem, ik_smem, iq_smem, ilse_smem, limit_smem, g_smem,
    diq_smem, means_smem,
    q_ready, q_free, kv_ready, kv_free, iq_ready, iq_free, g_ready, g_free,
    diq_ready, means_ready, *probs,
  ):  # fmt: skip
    cta, wg = lax.axis_index("cta"), lax.axis_index("wg")
    my_tasks = (where_gmem[3] - cta + config.num_ctas - 1) // config.num_ctas

    def read_task(i):
      return (tasks_gmem[cta + i * config.num_ctas, j] for j in range(5))

    def tiles_of(count, j):
      return (jnp.minimum(count - j * EDGES, EDGES) + half - 1) // half

    @pl.when(wg < 2)
    def _compute():
      plgpu.set_max_registers(224, action="increase")
      zero = plgpu.layout_cast(
        jnp.full((KEYS, EDGES), 0.0, jnp.float32), plgpu.Layout.WGMMA
      )
      key = (
        plgpu.broadcasted_iota(
          jnp.int32, (KEYS, EDGES), 0, layout=plgpu.Layout.WGMMA
        )
        + wg * KEYS
      )
      plgpu.barrier_wait(means_ready)

      def along(x):
        return lax.broadcast_in_dim(x, (KEYS, EDGES), [1])

      def task(i, carry):
        tile_step, piece_step, value = carry
        _, _, count, _, slot = read_task(i)
        first = first_gmem[cta + i * config.num_ctas]
        pieces = (count + EDGES - 1) // EDGES
        plgpu.barrier_wait(kv_ready)

        def piece(j, carry):
          tile_step, piece_step, value, dik = carry
          num_tiles = tiles_of(count, j)

          def tile(t, mean):
            stage = lax.rem(tile_step + t, stages)
            plgpu.barrier_wait(q_ready.at[stage])

            def product(acc):
              plgpu.wgmma(
                acc, k_smem.at[wg], q_smem.at[stage].transpose((1, 0))
              )
              return acc[...]

            scores = pl.run_scoped(product, ACC((KEYS, ROWS), jnp.float32))
            lse_rows = plgpu.load(lse_smem.at[stage], layout=column_layout)
            plgpu.barrier_arrive(q_free.at[stage])
            p = jnp.exp2(scores * (s.scale * mosaic.LOG2E) - along(lse_rows))
            # A NaN of one query must not reach the others of this product.
            p = jnp.where(jnp.abs(scores) < jnp.inf, p, 0.0).astype(s.dtype)
            at = pl.multiple_of(56 - 8 * (t // ways), 8)
            matrix = means_smem.at[lax.rem(t, ways), pl.ds(at, EDGES)]

            def add(acc, a):
              plgpu.wgmma(acc, a, matrix.transpose((1, 0)))

            if s.interpret:
              probs[0][wg] = p
              plgpu.commit_smem()
              return mean + pl.run_scoped(
                lambda acc: (add(acc, probs[0].at[wg]), acc[...])[1],
                ACC((KEYS, EDGES), jnp.float32),
              )
            return pl.run_state(lambda acc: add(acc, p))(ACC.init(mean))

          mean = lax.fori_loop(0, num_tiles, tile, zero)
          stage = lax.rem(piece_step, 2)
          plgpu.barrier_wait(iq_ready.at[stage])

          def index_product(acc):
            plgpu.wgmma(
              acc, ik_smem.at[wg], iq_smem.at[stage].transpose((1, 0))
            )
            return acc[...]

          scores = pl.run_scoped(index_product, ACC((KEYS, EDGES), jnp.float32))
          limit = plgpu.load(limit_smem.at[stage], layout=column_layout)
          ilse = plgpu.load(ilse_smem.at[stage], layout=column_layout)
          visible = _visible(limit, key, 1)
          log_r = scores * (s.index_scale * mosaic.LOG2E) - along(ilse)
          mean = jnp.where(visible, mean, 0.0)
          r = jnp.where(visible, jnp.exp2(log_r), 0.0)
          # 0 log 0 = 0; a NaN of r stays.
          log_p = jnp.log2(jnp.where(mean > 0.0, mean, 1.0))
          term = mean * (log_p - log_r)
          value += jnp.where(visible, term, 0.0)
          if s.with_gradients:
            g = (r - mean).astype(s.dtype)

            @pl.when(piece_step > 0)
            def _():
              plgpu.barrier_wait(g_free)

            g_smem[wg] = g
            plgpu.commit_smem()
            plgpu.barrier_arrive(g_ready)

            def add(acc, a):
              plgpu.wgmma(acc, a, iq_smem.at[stage])

            if s.interpret:
              dik = dik + pl.run_scoped(
                lambda acc: (add(acc, g_smem.at[wg]), acc[...])[1],
                ACC((KEYS, i_dim), jnp.float32),
              )
            else:
              dik = pl.run_state(lambda acc: add(acc, g))(ACC.init(dik))
            plgpu.barrier_wait(g_ready)
            at = pl.ds(wg * 64 if i_dim == 128 else 0, 64)

            def diq_product(acc):
              for h in range(2):
                plgpu.wgmma(
                  acc,
                  g_smem.at[h].transpose((1, 0)),
                  ik_smem.at[h].at[:, at],
                )
              return acc[...]

            diq = pl.run_scoped(diq_product, ACC((EDGES, 64), jnp.float32))
            plgpu.barrier_arrive(g_free)
            # Its last store has left shared memory: only its issuer knows.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(diq_ready)
            plgpu.barrier_wait(diq_ready)

            def write():
              diq_smem.at[:, at][...] = diq.astype(s.dtype)

            if i_dim == 128:
              write()
            else:
              pl.when(wg == 0)(write)
            plgpu.commit_smem()
            plgpu.barrier_arrive(diq_ready)
            plgpu.barrier_wait(diq_ready)

            @pl.when(wg == 0)
            def _():
              plgpu.copy_smem_to_gmem(
                diq_smem,
                part_gmem.at[
                  pl.ds(pl.multiple_of((first + j) * EDGES, EDGES), EDGES)
                ],
              )

          plgpu.barrier_arrive(iq_free.at[stage])
          return tile_step + num_tiles, piece_step + 1, value, dik

        dik = plgpu.layout_cast(
          jnp.full((KEYS, i_dim), 0.0, jnp.float32), plgpu.Layout.WGMMA
        )
        tile_step, piece_step, value, dik = lax.fori_loop(
          0, pieces, piece, (tile_step, piece_step, value, dik)
        )
        plgpu.barrier_arrive(kv_free)
        if s.with_gradients:
          at = sums_gmem.at[0, slot, pl.ds(wg * KEYS, KEYS)]

          def add_so_far(x):
            so_far = plgpu.load(at, layout=plgpu.Layout.WGMMA, optimized=False)
            return so_far + x

          at[...] = lax.cond(slot < s.num_owners, add_so_far, lambda x: x, dik)
        return tile_step, piece_step, value

      start = (jnp.int32(0), jnp.int32(0), zero)
      _, piece_step, value = lax.fori_loop(0, my_tasks, task, start)
      value_gmem[cta, wg] = value
      if s.with_gradients:

        @pl.when(piece_step > 0)
        def _():
          plgpu.barrier_wait(g_free)

        plgpu.wait_smem_to_gmem(0)

    @pl.when(wg == 2)
    def _copy():
      plgpu.set_max_registers(40, action="decrease")
      row, group, origin = where_gmem[0], where_gmem[1], where_gmem[2]
      plgpu.copy_gmem_to_smem(means_gmem, means_smem, means_ready)

      def task(i, steps):
        block, start, count, _, _ = read_task(i)
        first = first_gmem[cta + i * config.num_ctas]

        @pl.when(i > 0)
        def _():
          plgpu.barrier_wait(kv_free)

        for h in range(2):
          tokens = pl.ds(block * schedule.OWNER_BLOCK + h * KEYS, KEYS)
          plgpu.copy_gmem_to_smem(
            k_gmem.at[row, group, tokens], k_smem.at[h], kv_ready
          )
          plgpu.copy_gmem_to_smem(
            ik_gmem.at[row, tokens], ik_smem.at[h], kv_ready
          )

        def piece(j, steps):
          tile_step, piece_step = steps
          stage = lax.rem(piece_step, 2)

          @pl.when(piece_step >= 2)
          def _():
            plgpu.barrier_wait(iq_free.at[stage])

          place = pl.multiple_of((first + j) * EDGES, EDGES)
          for x_gmem, x_smem in (
            (iq_gmem, iq_smem),
            (ilse_gmem, ilse_smem),
            (limit_gmem, limit_smem),
          ):
            plgpu.copy_gmem_to_smem(
              x_gmem.at[pl.ds(place, EDGES)],
              x_smem.at[stage],
              iq_ready.at[stage],
            )

          def tile(t, step):
            stage = lax.rem(step, stages)
            edge = j * EDGES + t * half
            query = [
              (order_gmem[start + jnp.minimum(edge + a, count - 1)] >> 2)
              // s.top_k
              for a in range(half)
            ]

            @pl.when(step >= stages)
            def _():
              plgpu.barrier_wait(q_free.at[stage])

            for a in range(half):
              plgpu.copy_gmem_to_smem(
                q_gmem.at[row, origin + query[a], pl.ds(group * rows, rows)],
                q_smem.at[stage, pl.ds(a * rows, rows)],
                q_ready.at[stage],
              )
            plgpu.copy_gmem_to_smem(
              lse_gmem.at[pl.ds((place + t * half) * rows, ROWS)],
              lse_smem.at[stage],
              q_ready.at[stage],
            )
            return step + 1

          tile_step = lax.fori_loop(0, tiles_of(count, j), tile, tile_step)
          return tile_step, piece_step + 1

        return lax.fori_loop(0, (count + EDGES - 1) // EDGES, piece, steps)

      tile_step, piece_step = lax.fori_loop(
        0, my_tasks, task, (jnp.int32(0), jnp.int32(0))
      )
      sparse_attention.drain(q_free, tile_step)
      sparse_attention.drain(iq_free, piece_step)

      @pl.when(my_tasks > 0)
      def _():
        plgpu.barrier_wait(kv_free)

  def operand(*sizes):
    return plgpu.SMEM(sizes, s.dtype, transforms=mosaic.OPERAND)

  probs = [operand(2, KEYS, ROWS)] * s.interpret
  mosaic.launch(
    body, where, plan.tasks, plan.order, firsts, limits, index_lse, iq, lse,
    q, k, ik, means, values, partials, sums,
    name="kl_owners",
    num_ctas=config.num_ctas,
    num_warpgroups=3,
    interpret=s.interpret,
    scratch=[
      operand(stages, ROWS, d),
      plgpu.SMEM((stages, ROWS), jnp.float32),
      operand(2, KEYS, d),
      operand(2, KEYS, i_dim),
      operand(2, EDGES, i_dim),
      plgpu.SMEM((2, EDGES), jnp.float32),
      plgpu.SMEM((2, EDGES), jnp.int32),
      operand(2, KEYS, EDGES),
      operand(EDGES, i_dim),
      operand(*means.shape),
      plgpu.Barrier(num_arrivals=half + 1, num_barriers=stages),
      plgpu.Barrier(num_arrivals=2, num_barriers=stages),
      plgpu.Barrier(num_arrivals=4),
      plgpu.Barrier(num_arrivals=2),
      plgpu.Barrier(num_arrivals=3, num_barriers=2),
      plgpu.Barrier(num_arrivals=2, num_barriers=2),
      plgpu.Barrier(num_arrivals=2),
      plgpu.Barrier(num_arrivals=2),
      plgpu.Barrier(num_arrivals=2),
      plgpu.Barrier(),
      *probs,
    ],
  )  # fmt: skip


@functools.partial(
  jax.jit,
  static_argnames=(
    "block_size", "scale", "index_scale", "with_gradients", "config",
    "interpret",
  ),
)  # fmt: skip
def _loss(
  q, k, index_q, index_k, block_indices, lse, kv_lengths, query_mask, *,
  block_size, scale, index_scale, with_gradients, config, interpret,
):  # fmt: skip
  """The loss, dindex_q and dindex_k (float32; None without gradients)."""
  b, t, num_heads, d = q.shape
  s_len, num_kv_heads = k.shape[1:3]
  i_dim = index_q.shape[-1]
  group_size = num_heads // num_kv_heads
  top_k = block_indices.shape[-1]
  num_owners = -(-s_len // schedule.OWNER_BLOCK)
  counted = jnp.maximum(jnp.sum(query_mask), 1) * num_kv_heads

  k, _ = sparse_attention.block_major(k, num_owners, schedule.OWNER_BLOCK)
  ik, bad = sparse_attention.block_major(
    index_k[:, :, None], num_owners * schedule.OWNER_BLOCK // block_size,
    block_size,
  )  # fmt: skip
  ik, bad = ik[:, 0], bad[:, 0]
  bad_q = ~jnp.all(jnp.isfinite(index_q), axis=-1)
  index_q = jnp.where(jnp.isfinite(index_q), index_q, 0)
  q = sparse_attention.pad_heads(q, num_kv_heads)
  rows = q.shape[2] // num_kv_heads
  lse = lse.reshape(b, num_kv_heads, group_size, t).astype(jnp.float32)
  bad_lse = jnp.any(jnp.isnan(lse), axis=2)
  # Rows that are empty or poisoned: p = 0, the latter's NaN is in index_lse.
  lse = jnp.where(jnp.isnan(lse) | (lse == -jnp.inf), jnp.inf, lse)
  pad = ((0, 0), (0, 0), (0, rows - group_size), (0, 0))
  lse = jnp.pad(lse * mosaic.LOG2E, pad, constant_values=jnp.inf)

  most = min(MAX_EDGES, 1 << (32 - num_owners.bit_length())) // top_k
  if config.chunk:
    most = min(most, config.chunk)
  num_chunks = -(-t // most)
  chunk = -(-t // num_chunks)
  pad = num_chunks * chunk - t
  block_indices = jnp.where(query_mask[:, None, :, None], block_indices, -1)
  if pad:
    last = ((0, 0), (0, 0), (0, pad))
    block_indices = jnp.pad(block_indices, (*last, (0, 0)), constant_values=-1)
    lse = jnp.pad(lse, ((0, 0), *last))
    bad_lse = jnp.pad(bad_lse, last)
    bad_q = jnp.pad(bad_q, ((0, 0), (0, pad), (0, 0)))
    index_q = jnp.pad(index_q, ((0, 0), (0, pad), (0, 0), (0, 0)))
  positions = (kv_lengths - t)[:, None] + jnp.arange(
    num_chunks * chunk, dtype=jnp.int32
  )
  shape = Shape(
    rows=rows,
    head_dim=d,
    index_dim=i_dim,
    top_k=top_k,
    num_owners=num_owners,
    dtype=jnp.dtype(q.dtype),
    scale=scale,
    index_scale=index_scale,
    with_gradients=with_gradients,
    config=config,
    interpret=interpret,
  )
  means = jnp.asarray(_mean_matrix(rows, group_size), q.dtype)
  edges = chunk * top_k
  max_tasks = schedule.max_owner_tasks(num_owners, edges, config.task)
  max_pieces = edges // EDGES + max_tasks + 1
  if with_gradients:
    slots = max_tasks
    partial_rows = max_pieces * EDGES
  else:  # the kernel writes neither
    slots, partial_rows = 1, EDGES

  def step(index, carry):
    total, diq, sums = carry
    row, rest = (
      index // (num_kv_heads * num_chunks),
      index % (num_kv_heads * num_chunks),
    )
    group, i = rest // num_chunks, rest % num_chunks

    def cut(x, axis=0):
      return lax.dynamic_slice_in_dim(x, i * chunk, chunk, axis)

    ids, where_q = cut(block_indices[row, group]), cut(positions[row])
    plan = schedule.plan_owners(
      ids[None],
      where_q,
      block_size=block_size,
      num_blocks=num_owners * schedule.OWNER_BLOCK // block_size,
      task=config.task,
    )
    # A task's pieces start at a place of its own, a multiple of 64: `slot`
    # counts places of edges in pieces, of which a task's last may lack some.
    block, start, count = (plan.tasks[:, j] for j in range(3))
    firsts = start // EDGES + jnp.arange(max_tasks, dtype=jnp.int32)
    slot = jnp.arange(max_pieces * EDGES, dtype=jnp.int32)
    task = jnp.searchsorted(
      firsts,
      jnp.arange(max_pieces, dtype=jnp.int32),
      side="right",
      method="scan_unrolled",
    )
    task = jnp.repeat(task.astype(jnp.int32) - 1, EDGES)
    offset = slot - firsts[task] * EDGES
    used = (offset < count[task]) & (task < plan.num_tasks[0])
    edge = jnp.minimum(start[task] + offset, edges - 1)
    packed = jnp.where(used, plan.order[edge], 0)
    place = packed >> 2
    query = place // top_k
    # Where the slot of each choice is; choices without an edge: anywhere.
    slot_of = jnp.zeros((edges,), jnp.int32)
    slot_of = slot_of.at[jnp.where(used, place, edges)].set(
      slot, mode="drop", unique_indices=True
    )
    slot_of = slot_of.reshape(chunk, top_k)
    # Of each edge: keys of its owner block up to it, and 2 bits of halves.
    limits = where_q[query] + 1 - block[task] * schedule.OWNER_BLOCK
    limits = jnp.clip(limits, 0, schedule.OWNER_BLOCK) | ((packed & 3) << 8)
    limits = jnp.where(used, limits, 0)
    iq = cut(index_q[row, :, group])[query]
    index_lse = jax.new_ref(lax.empty((max_pieces * EDGES,), jnp.float32))
    _index_lse(
      index_lse, plan.num_tasks[0], plan, firsts, limits, iq, ik, row,
      shape=shape,
    )  # fmt: skip
    parts = jnp.where(plan.is_edge[0], jax.freeze(index_lse)[slot_of], -jnp.inf)
    m = jnp.max(parts, axis=-1, initial=sparse_attention.FLOOR)
    one = m + jnp.log2(jnp.sum(jnp.exp2(parts - m[:, None]), axis=-1))
    known = jnp.clip(ids, 0, bad.shape[1] - 1)
    seen = (ids >= 0) & (ids * block_size <= where_q[:, None])
    poisoned = jnp.any(seen & (bad[row][known] <= where_q[:, None]), axis=-1)
    poisoned |= cut(bad_lse[row, group]) | cut(bad_q[row, :, group])
    one = jnp.where(poisoned, jnp.nan, one)

    values = jax.new_ref(
      lax.empty((config.num_ctas, 2, KEYS, EDGES), jnp.float32)
    )
    partials = jax.new_ref(lax.empty((partial_rows, i_dim), q.dtype))
    sums = jax.new_ref(sums)
    where = jnp.stack([row, group, i * chunk, plan.num_tasks[0]])
    _owners(
      values, partials, sums, where.astype(jnp.int32), plan, firsts, limits,
      one[query], iq, cut(lse[row, group], 1).T[query].reshape(-1), q, k, ik,
      means,
      shape=shape,
    )  # fmt: skip
    total += jnp.sum(jax.freeze(values))
    if with_gradients:
      sum_extra(sums, plan.extra, num_owners=num_owners, interpret=interpret)
      x = jax.freeze(partials)[slot_of].astype(jnp.float32)
      x = jnp.sum(jnp.where(plan.is_edge[0, ..., None], x, 0), axis=1)
      diq = lax.dynamic_update_slice(
        diq, x[None, :, None], (row, i * chunk, group, 0)
      )
    return total, diq, jax.freeze(sums)

  def batch_row(row, carry):
    total, diq, dik = carry
    sums = jnp.zeros((1, slots, schedule.OWNER_BLOCK, i_dim), jnp.float32)
    per_row = num_kv_heads * num_chunks
    total, diq, sums = lax.fori_loop(
      row * per_row, (row + 1) * per_row, step, (total, diq, sums)
    )
    if with_gradients:
      one = sums[:, :num_owners].reshape(1, -1, i_dim)
      dik = lax.dynamic_update_slice(dik, one, (row, 0, 0))
    return total, diq, dik

  keys = num_owners * schedule.OWNER_BLOCK
  sizes = (num_chunks * chunk, keys) if with_gradients else (0, 0)
  total, diq, dik = lax.fori_loop(
    0,
    b,
    batch_row,
    (
      jnp.float32(0),
      jnp.zeros((b, sizes[0], num_kv_heads, i_dim), jnp.float32),
      jnp.zeros((b, sizes[1], i_dim), jnp.float32),
    ),
  )
  factor = index_scale / counted
  return (
    total * mosaic.LN2 / counted,
    diq[:, :t] * factor,
    dik[:, :s_len] * factor,
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(8, 9, 10, 11, 12))
def _kl(
  index_q, index_k, q, k, block_indices, lse, kv_lengths, query_mask,
  block_size, scale, index_scale, config, interpret,
):  # fmt: skip
  return _run(
    index_q, index_k, q, k, block_indices, lse, kv_lengths, query_mask,
    block_size, scale, index_scale, config, interpret, with_gradients=False,
  )[0]  # fmt: skip


def _run(
  index_q, index_k, q, k, block_indices, lse, kv_lengths, query_mask,
  block_size, scale, index_scale, config, interpret, *, with_gradients,
):  # fmt: skip
  # Under vmap the kernels run once for each entry.
  @jax.custom_batching.sequential_vmap
  def run(q, k, index_q, index_k, block_indices, *rest):
    options = dict(
      scale=scale,
      index_scale=index_scale,
      with_gradients=with_gradients,
      config=config,
      interpret=interpret,
    )
    if block_indices is None:
      return warmup.kl(q, k, index_q, index_k, *rest, **options)
    return _loss(
      q, k, index_q, index_k, block_indices, *rest, block_size=block_size,
      **options,
    )  # fmt: skip

  return run(q, k, index_q, index_k, block_indices, lse, kv_lengths, query_mask)


def _kl_forward(*args):
  value, diq, dik = _run(*args, with_gradients=True)
  index_q, index_k = args[:2]
  # Kept in float32: a loss scale comes in with the cotangent, too late for
  # what float16 would have lost.
  return value, (diq, dik, index_q, index_k)


def _kl_backward(
  block_size, scale, index_scale, config, interpret, residuals, cotangent
):
  diq, dik, index_q, index_k = residuals
  return (
    (diq * cotangent).astype(index_q.dtype),
    (dik * cotangent).astype(index_k.dtype),
    *[None] * 6,
  )


_kl.defvjp(_kl_forward, _kl_backward)


def index_kl_loss(
  q: Float[Array, "B T H D"],
  k: Float[Array, "B S K D"],
  index_q: Float[Array, "B T K I"],
  index_k: Float[Array, "B S I"],
  block_indices: Int[Array, "B K T P"] | None,
  *,
  lse: Float[Array, "B H T"],
  block_size: int = 128,
  scale: float | None = None,
  index_scale: float | None = None,
  kv_lengths: Int[Array, "B"] | None = None,
  query_mask: Bool[Array, "B T"] | None = None,
  config: Config | warmup.Config | None = None,
  interpret: bool = False,
) -> Float[Array, ""]:
  """KL of the main branch's attention from the index branch's, in nats.

  Gradient reaches index_q and index_k only, and is computed in the same pass.

  Args:
    q: queries, the last T of S (or of kv_lengths[b]) tokens; bf16 or f16.
    k: keys.
    index_q: index queries, one head a group.
    index_k: index keys.
    block_indices: block ids without duplicates; -1 fills up. Ids that name no
      block, or one beyond the query's own, contribute nothing. None: all
      visible tokens.
    lse: natural log sum exp of the scaled scores over the same tokens, as
      `sparse_attention` and `warmup.attention` return it.
    block_size: tokens of a block.
    scale: of the scores; D^-0.5 without one.
    index_scale: of the index scores; I^-0.5 without one.
    kv_lengths: keys in slots from kv_lengths[b] on do not exist.
    query_mask: queries that count; all without one.
    config: tile sizes of the phase; a heuristic picks them without one.
    interpret: run on the CPU in Pallas's GPU interpret mode.

  Raises:
    NotImplementedError: the call is legal but beyond `mosaic`'s limits.
  """
  b, t, num_heads, d = q.shape
  check = functools.partial(
    mosaic.check_supported,
    q,
    k,
    index_q,
    index_k,
    block_indices,
    lse,
    kv_lengths,
    query_mask,
    dtype=q.dtype,
    head_dim=d,
    index_dim=index_q.shape[-1],
  )
  if block_indices is None:
    check()
    config = config or warmup.heuristic_config()
  else:
    check(
      block_size=block_size,
      top_k=block_indices.shape[-1],
      kv_len=k.shape[1],
      group_size=num_heads // k.shape[2],
    )
    config = config or heuristic_config()
  if kv_lengths is None:
    kv_lengths = jnp.full((b,), k.shape[1], jnp.int32)
  if query_mask is None:
    query_mask = jnp.ones((b, t), bool)
  return _kl(
    index_q, index_k, *lax.stop_gradient((q, k)), block_indices,
    lax.stop_gradient(lse),
    jnp.clip(kv_lengths.astype(jnp.int32), 0, k.shape[1]), query_mask,
    block_size,
    float(d**-0.5 if scale is None else scale),
    float(index_q.shape[-1] ** -0.5 if index_scale is None else index_scale),
    config,
    interpret,
  )  # fmt: skip
