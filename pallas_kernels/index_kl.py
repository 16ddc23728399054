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
that chose it, its edges, 64 at a time. A launch takes whole batch rows, as many
as divide the batch and a bound on its edges lets in; of a longer row some
groups, or one whose chunks of queries take turns:

* **index_lse**: scores of 64 edges with the block, a log sum exp each; merged
  over a query's choices afterwards.
* **owners**: two warpgroups of 64 keys each. Gathered q, 128 rows at a time,
  gives p, keys x rows. A query's heads are neighbouring columns, registers of
  four lanes: their mean is a sum in float32 and an exchange that leaves each of
  the four with the mean of one query of four. Edges are gathered in the order
  that makes this the layout of a product with 64 edges. Then the index scores
  of the 64 edges, r, g, the value; g times index_q adds to dindex_k in
  registers, and g from both halves times index_k is a partial of dindex_q, in
  the working dtype, summed over choices afterwards. dindex_k sums up as dK does
  there, a group at a time. The two take turns at the tensor cores. A third
  warpgroup copies: each of its warps gathers some of a tile's queries, and what
  a piece needs last is copied last. All orders are fixed.

Bound, for an edge of 16 heads at D = I = 128, cycles of an H100's SM: 4 KB of q
in, 350 at the rate of its memory; 0.52 MFLOP of scores and 0.1 of the rest,
150; 2,048 exponentials, 128. What is reached is in results/LOG.md. SMEM: q
32 KB a stage, K and index_k 32 each, index_q 32, g 16, log sum exps 8.

NaN: one in a query reaches its own row and what it sees; keys that are not
finite are zeroed, and rows that see one are made NaN through index_lse.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import (
  dense_index_kl,
  kv_block_plan,
  mosaic,
  sparse_attention,
)
from pallas_kernels.sparse_attention_bwd import KEYS, sum_extra

ACC = plgpu.WGMMAAccumulatorRef
ROWS = 128  # of a tile
EDGES = 64  # of a piece


@dataclasses.dataclass(frozen=True)
class Config:
  """Tile and pipeline sizes; the result changes by rounding only.

  Attributes:
    stages: tiles of 128 gathered q rows in flight.
    task: most edges of a task; 0 lets the number of edges decide.
    chunk: most queries of a chunk; 0 lets the number of edges decide.
    edges: most edges of a launch, which takes one query's at least.
    num_ctas: CTAs of the owners' persistent grid; index_lse has three times
      as many.
  """

  stages: int = 3
  task: int = 0
  chunk: int = 0
  edges: int = 1 << 21
  num_ctas: int = mosaic.NUM_SMS


def heuristic_config() -> Config:
  """The config used without one."""
  return Config()


def candidate_configs() -> tuple[Config, ...]:
  """Configs that are worth timing; every one is tested."""
  return (
    Config(),
    Config(stages=2),
    Config(task=128),
    Config(task=1024),
    Config(edges=1 << 19),
  )


@dataclasses.dataclass(frozen=True)
class Shape:
  """Static sizes of one call, after padding."""

  rows: int  # of one query in a tile: its heads, at least 8
  head_dim: int
  index_dim: int
  num_kv_heads: int
  num_groups: int  # that a launch works on
  num_owners: int  # of a group
  dtype: jnp.dtype
  scale: float
  index_scale: float
  with_gradients: bool
  config: Config
  interpret: bool

  @property
  def queries(self) -> int:
    """Queries in a tile."""
    return ROWS // self.rows

  def locate(self, owner, first_group):
    """Batch row, KV head and block of an owner in a launch."""
    group = first_group + owner // self.num_owners
    return (
      group // self.num_kv_heads,
      lax.rem(group, self.num_kv_heads),
      lax.rem(owner, self.num_owners),
    )


def _visible(limits, key, layout_axis):
  """Whether edges, along an axis, see the keys of their owner block."""

  def along(x):
    return lax.broadcast_in_dim(x, key.shape, [layout_axis])

  half = 1 << (8 + key // KEYS)
  return (key < along(limits & 255)) & ((along(limits) & half) != 0)


def _index_lse(out, where, plan, firsts, limits, iq, ik, *, shape):
  """log2 sum exp2 of each edge's index scores with its block, by piece.

  `where`: first group (batch row * K + KV head), first query, number of tasks.
  """
  s = shape
  num_ctas = 3 * s.config.num_ctas  # three fit on an SM
  row_layout = plgpu.Layout.WGMMA.reduce(1)

  def body(
    where_gmem, tasks_gmem, turns_gmem, first_gmem, limit_gmem, iq_gmem,
    ik_gmem, out_gmem,
    iq_smem, ik_smem, iq_ready, iq_free, ik_ready, ik_free,
  ):  # fmt: skip
    cta = lax.axis_index("cta")
    my_tasks = kv_block_plan.num_turns(cta, where_gmem[2], num_ctas)

    def task(i, step):
      index = turns_gmem[kv_block_plan.turn(cta, i, num_ctas)]
      owner, _, count = (tasks_gmem[index, j] for j in range(3))
      row, _, block = s.locate(owner, where_gmem[0])
      first = first_gmem[index]
      pieces = (count + EDGES - 1) // EDGES

      def place(j):
        return pl.ds(pl.multiple_of((first + j) * EDGES, EDGES), EDGES)

      def copy(j):
        slot = lax.rem(step + j, 2)

        @pl.when(step + j >= 2)
        def _():
          plgpu.barrier_wait(iq_free.at[slot])

        plgpu.copy_gmem_to_smem(
          iq_gmem.at[place(j)], iq_smem.at[slot], iq_ready.at[slot]
        )

      @pl.when(i > 0)
      def _():
        plgpu.barrier_wait(ik_free)

      tokens = pl.ds(
        block * kv_block_plan.OWNER_BLOCK, kv_block_plan.OWNER_BLOCK
      )
      plgpu.copy_gmem_to_smem(ik_gmem.at[row, tokens], ik_smem, ik_ready)
      pl.when(pieces > 0)(lambda: copy(0))
      plgpu.barrier_wait(ik_ready)

      def piece(j, carry):
        pl.when(j + 1 < pieces)(lambda: copy(j + 1))
        slot = lax.rem(step + j, 2)
        limit = plgpu.load(
          limit_gmem.at[place(j)], layout=row_layout, optimized=False
        )
        plgpu.barrier_wait(iq_ready.at[slot])

        def product(acc):
          plgpu.wgmma(acc, iq_smem.at[slot], ik_smem.transpose((1, 0)))
          return acc[...]

        scores = pl.run_scoped(
          product, ACC((EDGES, kv_block_plan.OWNER_BLOCK), jnp.float32)
        )
        plgpu.barrier_arrive(iq_free.at[slot])
        scores = scores * (s.index_scale * mosaic.LOG2E)
        key = plgpu.broadcasted_iota(
          jnp.int32, scores.shape, 1, layout=plgpu.Layout.WGMMA
        )
        visible = _visible(limit, key, 0)
        scores = jnp.where(visible, scores, mosaic.FLOOR)
        m = scores.max(axis=1)
        total = jnp.exp2(scores - lax.broadcast_in_dim(m, scores.shape, [0]))
        total = jnp.where(visible, total, 0.0).sum(axis=1)
        out_gmem[place(j)] = m + jnp.log2(total)
        return carry

      lax.fori_loop(0, pieces, piece, None)
      plgpu.barrier_arrive(ik_free)
      return step + pieces

    step = lax.fori_loop(0, my_tasks, task, jnp.int32(0))
    mosaic.drain(iq_free, step)

    @pl.when(my_tasks > 0)
    def _():
      plgpu.barrier_wait(ik_free)

  def operand(*leading):
    return plgpu.SMEM(
      (*leading, s.index_dim), s.dtype, transforms=mosaic.OPERAND
    )

  mosaic.launch(
    body, where, plan.tasks, plan.turns, firsts, limits, iq, ik, out,
    name="kl_index_lse",
    num_ctas=num_ctas,
    num_warpgroups=1,
    interpret=s.interpret,
    scratch=[
      operand(2, EDGES),
      operand(kv_block_plan.OWNER_BLOCK),
      plgpu.Barrier(num_barriers=2),
      plgpu.Barrier(num_barriers=2),
      plgpu.Barrier(),
      plgpu.Barrier(),
    ],
  )  # fmt: skip


def _in_tile_order(x):
  """By piece: element n of 64 is the n-th edge that tiles gather.

  Of every four edges that tiles gather, each of the four lanes that share an
  accumulator row gets the mean of one, and an accumulator's column 8 j + 2 l +
  {0, 1} lies in lane l. So n = 8 j + 4 i + l stands for edge 8 j + 2 l + i.
  """
  return x.reshape(-1, 4, 2).swapaxes(1, 2).reshape(x.shape)


def _sum_heads(p, sums, tile, *, rows, interpret):
  """Puts the sums over heads of a tile into the columns of its edges.

  Args:
    p: float32 [KEYS, ROWS], `rows` heads of each query.
    sums: float32 [KEYS, EDGES], of which the tile's columns are replaced.
    tile: which tile of the piece this is.
  """
  queries = ROWS // rows
  if interpret:
    x = p.reshape(KEYS, queries // 8, 2, 4, rows).sum(-1)
    x = x.swapaxes(2, 3).reshape(KEYS, queries)
    column = lax.broadcasted_iota(jnp.int32, sums.shape, 1)
    x = jnp.tile(x, (1, EDGES // queries))
    return jnp.where(column // queries == tile, x, sums)

  layout = plgpu.Layout.WGMMA

  @plgpu.inline_mgpu(
    arg_types=(layout, layout, plgpu.Layout.WG_SPLAT(())),
    return_type=plgpu.ShapeDtypeStruct(sums.shape, jnp.float32, layout),
  )
  def run(*args):
    p, sums, tile = args[1:]
    i32 = ir.IntegerType.get_signless(32)
    pair = ir.VectorType.get((2,), ir.F32Type.get())

    def constant(x):
      return arith.constant(i32, x)

    thread = mgpu_utils.thread_idx()

    def bit_of_lane(bit):
      set_ = arith.andi(thread, constant(bit))
      return arith.cmpi(arith.CmpIPredicate.ne, set_, constant(0))

    high, low = bit_of_lane(2), bit_of_lane(1)

    def exchange(is_second, first, second, distance):
      """Each half of the lanes keeps one and adds what the other has of it."""
      keep = arith.select(is_second, second, first)
      give = arith.select(is_second, first, second)
      return arith.addf(keep, mgpu_utils.shfl_bfly(give, distance))

    def element(x, i):
      at = ir.DenseI64ArrayAttr.get([i])
      return vector.extract(x, dynamic_position=[], static_position=at)

    # A register is two columns, of a row in the first or second eight of 16.
    parts = p.registers.reshape(ROWS // 8, 2)
    per_query = rows // 8
    new = {}
    for half in range(2):
      totals = []
      for a in range(queries):
        x = parts[a * per_query, half]
        for i in range(1, per_query):
          x = arith.addf(x, parts[a * per_query + i, half])
        totals.append(arith.addf(element(x, 0), element(x, 1)))
      for j in range(queries // 8):
        columns = []
        for i in range(2):
          a, b, c, d = totals[8 * j + 4 * i : 8 * j + 4 * i + 4]
          columns.append(
            exchange(low, exchange(high, a, c, 2), exchange(high, b, d, 2), 1)
          )
        new[j, half] = vector.from_elements(pair, columns)
    shape = sums.registers.shape
    old = sums.registers.reshape(EDGES // 8, 2)
    out = old.copy()
    each = queries // 8
    for j in range(EDGES // 8):
      here = arith.cmpi(
        arith.CmpIPredicate.eq, tile.registers.item(), constant(j // each)
      )
      for half in range(2):
        out[j, half] = arith.select(here, new[j % each, half], old[j, half])
    return mgpu.FragmentedArray(
      _registers=out.reshape(shape), _layout=sums.layout, _is_signed=None
    )

  return run(p, sums, tile)


def _owners(
  values, partials, sums, where, plan, firsts, queries, limits, index_lse, iq,
  lse, q, k, ik, *, shape,
):  # fmt: skip
  """Values, dindex_q partials and dindex_k of a chunk.

  `where`: as for `_index_lse`. `queries`: of the chunk, in the order of tiles,
  as is `lse` [.., ROWS].
  """
  s, config = shape, shape.config
  rows, d, i_dim = s.rows, s.head_dim, s.index_dim
  stages = config.stages
  piece_tiles = EDGES // s.queries
  column_layout = plgpu.Layout.WGMMA.reduce(0)

  def body(
    where_gmem, tasks_gmem, turns_gmem, first_gmem, query_gmem, limit_gmem,
    ilse_gmem, iq_gmem, lse_gmem, q_gmem, k_gmem, ik_gmem, value_gmem,
    part_gmem, sums_gmem,
    q_smem, lse_smem, k_smem, ik_smem, iq_smem, ilse_smem, limit_smem, g_smem,
    q_ready, q_free, lse_ready, lse_free, kv_ready, kv_free, iq_ready, iq_free,
    g_ready, g_free, diq_ready, turn,
  ):  # fmt: skip
    cta, wg = lax.axis_index("cta"), lax.axis_index("wg")
    my_tasks = kv_block_plan.num_turns(cta, where_gmem[2], config.num_ctas)

    def read_task(i):
      """Owner, its number of edges, slot of the sum, first piece."""
      index = turns_gmem[kv_block_plan.turn(cta, i, config.num_ctas)]
      owner, count, slot = (tasks_gmem[index, j] for j in (0, 2, 4))
      return owner, count, slot, first_gmem[index]

    @pl.when(wg < 2)
    def _compute():
      plgpu.set_max_registers(232, action="increase")
      zero = plgpu.layout_cast(
        jnp.full((KEYS, EDGES), 0.0, jnp.float32), plgpu.Layout.WGMMA
      )
      key = (
        plgpu.broadcasted_iota(
          jnp.int32, (KEYS, EDGES), 0, layout=plgpu.Layout.WGMMA
        )
        + wg * KEYS
      )

      def along(x, size=EDGES):
        return lax.broadcast_in_dim(x, (KEYS, size), [1])

      def task(i, carry):
        tile_step, piece_step, value = carry
        _, count, slot, first = read_task(i)
        pieces = (count + EDGES - 1) // EDGES
        plgpu.barrier_wait(kv_ready)

        def piece(j, carry):
          tile_step, piece_step, value, dik = carry
          edges = jnp.minimum(count - j * EDGES, EDGES)
          num_tiles = (edges + s.queries - 1) // s.queries
          stage = lax.rem(piece_step, 2)
          plgpu.barrier_wait(lse_ready.at[stage])

          def tile(t, mean):
            q_stage = lax.rem(tile_step + t, stages)
            plgpu.barrier_wait(q_ready.at[q_stage])

            def product(acc):
              plgpu.wgmma(
                acc, k_smem.at[wg], q_smem.at[q_stage].transpose((1, 0))
              )
              return acc[...]

            # One multiplies while the other takes exponentials: left alone,
            # both get a tile at the same moment and do the same.
            plgpu.barrier_wait(turn.at[wg])
            scores = pl.run_scoped(product, ACC((KEYS, ROWS), jnp.float32))
            plgpu.barrier_arrive(turn.at[1 - wg])
            plgpu.barrier_arrive(q_free.at[q_stage])
            lse_rows = plgpu.load(lse_smem.at[stage, t], layout=column_layout)
            p = jnp.exp2(
              scores * (s.scale * mosaic.LOG2E) - along(lse_rows, ROWS)
            )
            return _sum_heads(p, mean, t, rows=rows, interpret=s.interpret)

          mean = lax.fori_loop(0, num_tiles, tile, zero)
          plgpu.barrier_arrive(lse_free.at[stage])
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
          term = jnp.where(visible, mean * (log_p - log_r), 0.0)
          value += term.sum(axis=1)
          if s.with_gradients:
            g = (r - mean).astype(s.dtype)
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
            # The last partial has left its stage: only its issuer knows.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            @pl.when(piece_step > 0)
            def _():
              plgpu.barrier_arrive(iq_free.at[1 - stage])

            plgpu.barrier_arrive(g_free)
            plgpu.barrier_wait(g_free)

            # Nobody reads g nor index_q of this piece any more.
            def write():
              iq_smem.at[stage, :, at][...] = diq.astype(s.dtype)

            if i_dim == 128:
              write()
            else:
              pl.when(wg == 0)(write)
            plgpu.commit_smem()
            plgpu.barrier_arrive(diq_ready)

            @pl.when(wg == 0)
            def _():
              plgpu.barrier_wait(diq_ready)
              place = pl.multiple_of((first + j) * EDGES, EDGES)
              plgpu.copy_smem_to_gmem(
                iq_smem.at[stage], part_gmem.at[pl.ds(place, EDGES)]
              )
          else:
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

          is_first = slot < s.num_groups * s.num_owners
          at[...] = lax.cond(is_first, add_so_far, lambda x: x, dik)
        return tile_step, piece_step, value

      pl.when(wg == 1)(lambda: plgpu.barrier_arrive(turn.at[0]))
      nothing = plgpu.layout_cast(
        jnp.full((KEYS,), 0.0, jnp.float32), plgpu.Layout.WGMMA.reduce(1)
      )
      start = (jnp.int32(0), jnp.int32(0), nothing)
      _, piece_step, value = lax.fori_loop(0, my_tasks, task, start)
      pl.when(wg == 0)(lambda: plgpu.barrier_wait(turn.at[0]))
      value_gmem[cta, wg] = value
      if s.with_gradients:
        plgpu.wait_smem_to_gmem(0)

        @pl.when(piece_step > 0)
        def _():
          plgpu.barrier_arrive(iq_free.at[lax.rem(piece_step + 1, 2)])

    @pl.when(wg == 2)
    def _copy():
      plgpu.set_max_registers(40, action="decrease")

      def task(i, steps):
        owner, count, _, first = read_task(i)
        # Read again for each task: kept, it would take registers.
        row, kv_head, block = s.locate(owner, where_gmem[0])
        origin = where_gmem[1]
        num_tiles = (count + s.queries - 1) // s.queries

        def copy_keys():
          @pl.when(i > 0)
          def _():
            plgpu.barrier_wait(kv_free)

          for h in range(2):
            tokens = pl.ds(block * kv_block_plan.OWNER_BLOCK + h * KEYS, KEYS)
            plgpu.copy_gmem_to_smem(
              k_gmem.at[row, kv_head, tokens], k_smem.at[h], kv_ready
            )
            plgpu.copy_gmem_to_smem(
              ik_gmem.at[row, tokens], ik_smem.at[h], kv_ready
            )

        def copy_lse(j, piece_step):
          stage = lax.rem(piece_step, 2)

          @pl.when(piece_step >= 2)
          def _():
            plgpu.barrier_wait(lse_free.at[stage])

          plgpu.copy_gmem_to_smem(
            lse_gmem.at[pl.ds((first + j) * piece_tiles, piece_tiles)],
            lse_smem.at[stage],
            lse_ready.at[stage],
          )

        def copy_index(j, piece_step):
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

        def tile(t, steps):
          tile_step, piece_step = steps
          stage = lax.rem(tile_step, stages)
          j, place = t // piece_tiles, lax.rem(t, piece_tiles)
          pl.when(place == 0)(lambda: copy_lse(j, piece_step))

          @plgpu.warp_map
          def _(warp):
            each = s.queries // 4
            mine = [warp * each + a for a in range(each)]
            at = first * EDGES + t * s.queries
            query = [query_gmem[at + a] for a in mine]

            @pl.when(tile_step >= stages)
            def _():
              plgpu.barrier_wait(q_free.at[stage])

            for a, one in zip(mine, query, strict=True):
              plgpu.copy_gmem_to_smem(
                q_gmem.at[row, origin + one, pl.ds(kv_head * rows, rows)],
                q_smem.at[stage, pl.ds(a * rows, rows)],
                q_ready.at[stage],
              )

          # Late: the task or the piece before may still be at work.
          pl.when(t == jnp.minimum(stages, num_tiles) - 1)(copy_keys)
          ends = (place == piece_tiles - 1) | (t == num_tiles - 1)
          pl.when(ends)(lambda: copy_index(j, piece_step))
          return tile_step + 1, piece_step + ends.astype(jnp.int32)

        return lax.fori_loop(0, num_tiles, tile, steps)

      tile_step, piece_step = lax.fori_loop(
        0, my_tasks, task, (jnp.int32(0), jnp.int32(0))
      )
      mosaic.drain(q_free, tile_step)
      mosaic.drain(lse_free, piece_step)
      mosaic.drain(iq_free, piece_step)

      @pl.when(my_tasks > 0)
      def _():
        plgpu.barrier_wait(kv_free)

  def operand(*sizes):
    return plgpu.SMEM(sizes, s.dtype, transforms=mosaic.OPERAND)

  mosaic.launch(
    body, where, plan.tasks, plan.turns, firsts, queries, limits, index_lse,
    iq, lse, q, k, ik, values, partials, sums,
    name="kl_owners",
    num_ctas=config.num_ctas,
    num_warpgroups=3,
    interpret=s.interpret,
    auto_barriers=False,
    scratch=[
      operand(stages, ROWS, d),
      plgpu.SMEM((2, piece_tiles, ROWS), jnp.float32),
      operand(2, KEYS, d),
      operand(2, KEYS, i_dim),
      operand(2, EDGES, i_dim),
      plgpu.SMEM((2, EDGES), jnp.float32),
      plgpu.SMEM((2, EDGES), jnp.int32),
      operand(2, KEYS, EDGES),
      plgpu.Barrier(num_arrivals=s.queries, num_barriers=stages),
      plgpu.Barrier(num_arrivals=2, num_barriers=stages),
      plgpu.Barrier(num_barriers=2),
      plgpu.Barrier(num_arrivals=2, num_barriers=2),
      plgpu.Barrier(num_arrivals=4),
      plgpu.Barrier(num_arrivals=2),
      plgpu.Barrier(num_arrivals=3, num_barriers=2),
      plgpu.Barrier(num_arrivals=2, num_barriers=2),
      plgpu.Barrier(num_arrivals=2),
      plgpu.Barrier(num_arrivals=2),
      plgpu.Barrier(num_arrivals=2),
      plgpu.Barrier(num_barriers=2),
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
  num_owners = -(-s_len // kv_block_plan.OWNER_BLOCK)
  counted = jnp.maximum(jnp.sum(query_mask), 1) * num_kv_heads

  k, _ = sparse_attention.block_major(k, num_owners, kv_block_plan.OWNER_BLOCK)
  ik, bad = sparse_attention.block_major(
    index_k[:, :, None], num_owners * kv_block_plan.OWNER_BLOCK // block_size,
    block_size,
  )  # fmt: skip
  ik, bad = ik[:, 0], bad[:, 0]
  bad_q = ~jnp.all(jnp.isfinite(index_q), axis=-1)
  index_q = jnp.where(jnp.isfinite(index_q), index_q, 0)
  # Gathered by an element a thread: 32 bits take half as many.
  index_pairs = lax.bitcast_convert_type(
    index_q.reshape(-1, i_dim // 2, 2), jnp.uint32
  )
  q = sparse_attention.pad_heads(q, num_kv_heads)
  rows = q.shape[2] // num_kv_heads
  lse = lse.reshape(b, num_kv_heads, group_size, t).astype(jnp.float32)
  bad_lse = jnp.any(jnp.isnan(lse), axis=2)
  # Rows that are empty or poisoned: p = 0, the latter's NaN is in index_lse.
  lse = jnp.where(jnp.isnan(lse) | (lse == -jnp.inf), jnp.inf, lse)
  # The mean over heads is a sum of p / G.
  lse = lse * mosaic.LOG2E + math.log2(group_size)
  pad = ((0, 0), (0, 0), (0, rows - group_size), (0, 0))
  lse = jnp.pad(lse, pad, constant_values=jnp.inf)

  split = kv_block_plan.split_owners(
    b,
    t,
    num_kv_heads,
    num_owners,
    top_k,
    max_edges=config.edges,
    chunk=config.chunk,
  )
  groups, chunk = split.groups, split.chunk
  pad = split.num_chunks * chunk - t
  block_indices = jnp.where(query_mask[:, None, :, None], block_indices, -1)
  lse, bad_lse = lse.swapaxes(2, 3), bad_lse[..., None]
  bad_q = bad_q.swapaxes(1, 2)[..., None]
  if pad:
    block_indices, lse, bad_lse, bad_q = (
      jnp.pad(x, ((0, 0), (0, 0), (0, pad), (0, 0)), constant_values=value)
      for x, value in (
        (block_indices, -1), (lse, 0), (bad_lse, False), (bad_q, False),
      )
    )  # fmt: skip
  edges = groups * chunk * top_k
  task = kv_block_plan.owner_task(edges, config.task)
  num_slots = groups * num_owners
  max_tasks = kv_block_plan.max_owner_tasks(num_slots, edges, task)
  max_pieces = edges // EDGES + max_tasks + 1
  shape = Shape(
    rows=rows,
    head_dim=d,
    index_dim=i_dim,
    num_kv_heads=num_kv_heads,
    num_groups=groups,
    num_owners=num_owners,
    dtype=jnp.dtype(q.dtype),
    scale=scale,
    index_scale=index_scale,
    with_gradients=with_gradients,
    config=config,
    interpret=interpret,
  )
  if with_gradients:
    slots, partial_rows = max_tasks, max_pieces * EDGES
  else:  # the kernel writes neither
    slots, partial_rows = 1, EDGES
  keys = num_owners * kv_block_plan.OWNER_BLOCK

  def launch(index, carry):
    total, diq, dik = carry
    first = index * groups
    group = first + jnp.arange(groups, dtype=jnp.int32)
    row, kv_head = group // num_kv_heads, group % num_kv_heads

    def step(i, carry):
      total, diq, sums = carry
      first_query = i * chunk

      def cut(x):
        return split.cut(x, first, first_query)

      ids = cut(block_indices)
      first_slots = kv_lengths[row] - t + first_query
      plan = kv_block_plan.plan_owners(
        ids,
        first_slots,
        block_size=block_size,
        num_blocks=num_owners * kv_block_plan.OWNER_BLOCK // block_size,
        task=task,
      )
      # A task's pieces start at a place of its own, a multiple of 64: `slot`
      # counts places of edges in pieces, of which a task's last may lack some.
      owner, start, count = (plan.tasks[:, j] for j in range(3))
      firsts = start // EDGES + jnp.arange(max_tasks, dtype=jnp.int32)
      slot = jnp.arange(max_pieces * EDGES, dtype=jnp.int32)
      task_of = jnp.searchsorted(
        firsts,
        jnp.arange(max_pieces, dtype=jnp.int32),
        side="right",
        method="scan_unrolled",
      )
      task_of = jnp.repeat(task_of.astype(jnp.int32) - 1, EDGES)
      offset = slot - firsts[task_of] * EDGES
      used = (offset < count[task_of]) & (task_of < plan.num_tasks[0])
      edge = jnp.minimum(start[task_of] + offset, edges - 1)
      packed = jnp.where(used, plan.order[edge], 0)
      place = packed >> 2
      query = place // top_k  # of all groups
      query_group, query_of_chunk = query // chunk, query % chunk
      # Where the slot of each choice is; choices without an edge: anywhere.
      slot_of = jnp.zeros((edges,), jnp.int32)
      slot_of = slot_of.at[jnp.where(used, place, edges)].set(
        slot, mode="drop", unique_indices=True
      )
      slot_of = slot_of.reshape(groups, chunk, top_k)
      # Of each edge: keys of its owner block up to it, and 2 bits of halves.
      first_limit = first_slots[owner // num_owners] + 1
      first_limit -= owner % num_owners * kv_block_plan.OWNER_BLOCK
      limits = first_limit[task_of] + query_of_chunk
      limits = jnp.clip(limits, 0, kv_block_plan.OWNER_BLOCK) | (
        (packed & 3) << 8
      )
      limits = jnp.where(used, limits, 0)
      # Of [B, T, K], from that of the group's first query.
      place_in_iq = (row * t + first_query) * num_kv_heads + kv_head
      place_in_iq = place_in_iq[query_group] + query_of_chunk * num_kv_heads
      iq = lax.bitcast_convert_type(index_pairs[place_in_iq], q.dtype)
      iq = iq.reshape(-1, i_dim)
      where = jnp.stack([first, first_query, plan.num_tasks[0]])
      where = where.astype(jnp.int32)
      index_lse = jax.new_ref(lax.empty((max_pieces * EDGES,), jnp.float32))
      _index_lse(index_lse, where, plan, firsts, limits, iq, ik, shape=shape)
      parts = jnp.where(plan.is_edge, jax.freeze(index_lse)[slot_of], -jnp.inf)
      m = jnp.max(parts, axis=-1, initial=mosaic.FLOOR)
      one = m + jnp.log2(jnp.sum(jnp.exp2(parts - m[..., None]), axis=-1))
      known = jnp.clip(ids, 0, bad.shape[1] - 1)
      where_q = first_slots[:, None, None] + jnp.arange(chunk)[:, None]
      seen = (ids >= 0) & (ids * block_size <= where_q)
      first_bad = bad[row[:, None, None], known]
      poisoned = jnp.any(seen & (first_bad <= where_q), axis=-1)
      poisoned |= cut(bad_lse)[..., 0] | cut(bad_q)[..., 0]
      one = jnp.where(poisoned, jnp.nan, one)

      values = jax.new_ref(lax.empty((config.num_ctas, 2, KEYS), jnp.float32))
      partials = jax.new_ref(lax.empty((partial_rows, i_dim), q.dtype))
      sums = jax.new_ref(sums)
      in_tile_order = _in_tile_order(query)
      _owners(
        values, partials, sums, where, plan, firsts,
        in_tile_order % chunk, limits, one.reshape(-1)[query], iq,
        cut(lse).reshape(-1, rows)[in_tile_order].reshape(-1, ROWS), q, k, ik,
        shape=shape,
      )  # fmt: skip
      total += jnp.sum(jax.freeze(values))
      if with_gradients:
        sum_extra(sums, plan.extra, num_owners=num_slots, interpret=interpret)
        x = jax.freeze(partials)[slot_of].astype(jnp.float32)
        x = jnp.sum(jnp.where(plan.is_edge[..., None], x, 0), axis=2)
        at = (row[0], first_query, kv_head[0], 0)
        diq = lax.dynamic_update_slice(diq, split.token_major(x), at)
      return total, diq, jax.freeze(sums)

    sums = lax.empty((1, slots, kv_block_plan.OWNER_BLOCK, i_dim), jnp.float32)
    sums = sums.at[:, :num_slots].set(0.0)
    total, diq, sums = lax.fori_loop(
      0, split.num_chunks, step, (total, diq, sums)
    )
    if with_gradients:
      one = sums[0, :num_slots].reshape(split.rows, split.heads, keys, i_dim)
      one = jnp.sum(one, axis=1)
      at = (row[0], 0, 0)
      so_far = lax.dynamic_slice(dik, at, one.shape)
      dik = lax.dynamic_update_slice(dik, so_far + one, at)
    return total, diq, dik

  sizes = (split.num_chunks * chunk, keys) if with_gradients else (0, 0)
  total, diq, dik = lax.fori_loop(
    0,
    b * num_kv_heads // groups,
    launch,
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
      return dense_index_kl.kl(q, k, index_q, index_k, *rest, **options)
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
  config: Config | dense_index_kl.Config | None = None,
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
      `sparse_attention` and `dense_attention.attention` return it.
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
    config = config or dense_index_kl.heuristic_config()
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
