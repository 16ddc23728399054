"""Block-sparse attention on Hopper, forward: two kernels and who does what.

For query t, group g and head h of g, over the visible tokens J of the chosen
blocks: out = softmax_J(scale q.k) v and lse = log sum_J exp(scale q.k). One
wgmma tile packs 64 rows = queries x the group's heads, so that a chosen block
is read once for all of them. `schedule` decides on the device which of two
kernels does a choice:

* **edges** (KV-outer). A CTA owns a task: K and V of one block stay in SMEM,
  and the queries that chose it are gathered beside it, one TMA copy a query.
  Each query leaves a normalised partial output, in q's dtype, and a base-2 lse.
  Three warpgroups compute, 64 rows at a time, and one copies.
  Bound: 4 + 4 KB moved for an edge (16 heads, D 128), and 4 more to merge it.
* **tiles** (Q-outer). A CTA owns a tile of neighbouring queries, 64 rows for
  each of two warpgroups: they walk the tile's shared blocks with an online
  softmax, each skipping those that its half did not choose, then merge the
  partials of the tile's edges, and write out and lse. A third one copies.
  Bound: reading shared blocks from L2 (64 KB for 8 queries) and wgmma where
  neighbours agree, else reading the partials.

Where no tile has an edge, one launch of the second kernel is everything.
Otherwise chunks of one group's queries take turns in a workspace of partials
of at most 2^30 elements. XLA has the host read which of the two it is, and
waits for that. SMEM at D 128 and block 128: edges 96 KB of queries,
64 KB of K and V, 48 KB of partials; tiles 32 KB of queries, 128 KB of K and V,
64 KB of partials (or 192 KB of K and V when nothing is merged).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import mosaic, tile_plan
from pallas_kernels.mosaic import FLOOR

ACC = plgpu.WGMMAAccumulatorRef
ROWS = 64  # of a wgmma tile
MAX_WORKSPACE = 1 << 30  # elements of the partial outputs
MAX_PLANNED = 1 << 25  # choices whose edges are sorted at once


@dataclasses.dataclass(frozen=True)
class Config:
  """Tile and pipeline sizes; the result changes by rounding only.

  Attributes:
    edge_warpgroups: warpgroups that compute (edges), 2 or 3.
    query_stages: gathered 64-row query tiles in flight for each (edges).
    kv_stages: blocks in flight (tiles that merge).
    walk_stages: blocks in flight (tiles when there is no edge at all).
    merge_stages: partials in flight (tiles).
    task: most edges that share one load of a block.
    span: queries that are kept in L2 while their edges are gathered; 0 lets
      the number of blocks decide.
    chunk: most queries of a chunk; 0 lets the workspace decide.
    shared_cost: a block is walked by a half tile if this many of its queries
      (of 16 heads) chose it. 0 walks everything.
    slack: how much dearer walking everything may be than the mixed way.
    num_ctas: CTAs of the persistent grids.
  """

  edge_warpgroups: int = 3
  query_stages: int = 2
  kv_stages: int = 2
  walk_stages: int = 3
  merge_stages: int = 2
  task: int = 256
  span: int = 0
  chunk: int = 0
  shared_cost: float = 2.2
  slack: float = 1.35
  num_ctas: int = mosaic.NUM_SMS


@dataclasses.dataclass(frozen=True)
class Shape:
  """Static sizes of one call, after padding."""

  q_len: int
  num_kv_heads: int
  rows: int  # of one query in a tile: its heads, at least 8
  head_dim: int
  block_size: int
  dtype: jnp.dtype
  scale_log2: float
  geometry: tile_plan.Geometry
  config: Config
  interpret: bool

  @property
  def half(self) -> int:
    """Queries in 64 rows."""
    return ROWS // self.rows

  def operand(self, *leading: int) -> plgpu.SMEM:
    return plgpu.SMEM(
      (*leading, self.head_dim), self.dtype, transforms=mosaic.OPERAND
    )

  def probs_scratch(self, warpgroups: int) -> list:
    """Interpret mode takes no wgmma operand from registers."""
    if not self.interpret:
      return []
    return [
      plgpu.SMEM(
        (warpgroups, ROWS, self.block_size),
        self.dtype,
        transforms=mosaic.OPERAND,
      )
    ]


def heuristic_config() -> Config:
  """The config used without one."""
  return Config()


def candidate_configs() -> tuple[Config, ...]:
  """Configs that are worth timing; every one is tested."""
  return (
    Config(),
    Config(task=128),
    Config(edge_warpgroups=2, query_stages=3),
    Config(shared_cost=0.0),
    Config(shared_cost=1e9, slack=0.0),
  )


def _qk(q_smem, k_smem, block_size: int) -> Any:
  def product(acc):
    plgpu.wgmma(acc, q_smem, k_smem.transpose((1, 0)))
    return acc[...]

  return pl.run_scoped(product, ACC((ROWS, block_size), jnp.float32))


def _pv(p, v_smem, shape: Shape, p_smem, acc=None) -> Any:
  """p v, added to `acc` if given."""
  p = p.astype(shape.dtype)
  if shape.interpret:
    p_smem[...] = p
    plgpu.commit_smem()
    p = p_smem

  def product(ref):
    plgpu.wgmma(ref, p, v_smem)

  if acc is not None and not shape.interpret:
    return pl.run_state(product)(ACC.init(acc))

  def fresh(ref):
    product(ref)
    return ref[...]

  out = pl.run_scoped(fresh, ACC((ROWS, shape.head_dim), jnp.float32))
  return out if acc is None else acc + out


def _over_columns(x, width: int):
  return lax.broadcast_in_dim(x, (ROWS, width), [0])


def _edges(partials, where, plan, q, k, v, *, shape: Shape):
  """Fills the partials of a chunk's edges.

  `where`: first tile, batch row, group, first query, first task and number of
  tasks of the chunk.
  """
  s, g, config = shape, shape.geometry, shape.config
  half, rows, workers = s.half, s.rows, config.edge_warpgroups
  stages = config.query_stages * workers
  registers, copy_registers = {2: (232, 40), 3: (160, 32)}[workers]

  def body(
    where_gmem, tasks_gmem, order_gmem, q_gmem, k_gmem, v_gmem,
    part_gmem, lse_gmem,
    q_smem, k_smem, v_smem, o_smem, l_smem,
    q_ready, q_free, k_ready, v_ready, k_free, v_free, *probs,
  ):  # fmt: skip
    cta, wg = lax.axis_index("cta"), lax.axis_index("wg")
    my_tasks = (where_gmem[5] - cta + config.num_ctas - 1) // config.num_ctas

    def read_task(i):
      index = where_gmem[4] + cta + i * config.num_ctas
      return (tasks_gmem[index, j] for j in range(3))

    @pl.when(wg < workers)
    def _compute():
      plgpu.set_max_registers(registers, action="increase")

      def task(i, step):
        _, start, count = read_task(i)
        pieces = (count + half - 1) // half
        # The warpgroups take every `workers`-th piece, across tasks.
        mine = lax.rem(wg + workers - lax.rem(step, workers), workers)
        plgpu.barrier_wait(k_ready)
        plgpu.barrier_wait(v_ready)

        def gather(j, carry):
          piece = mine + j * workers
          slot = lax.rem(step + piece, stages)
          first = piece * half
          edge = [
            order_gmem[start + jnp.minimum(first + a, count - 1)]
            for a in range(half)
          ]
          plgpu.barrier_wait(q_ready.at[slot])
          scores = _qk(q_smem.at[slot], k_smem, s.block_size)
          plgpu.barrier_arrive(q_free.at[slot])
          m = scores.max(axis=1) * s.scale_log2
          p = jnp.exp2(scores * s.scale_log2 - _over_columns(m, s.block_size))
          l = p.sum(axis=1)
          o = _pv(p, v_smem, s, probs[0].at[wg] if probs else None)
          o = o * _over_columns(1.0 / l, s.head_dim)
          plgpu.wait_smem_to_gmem(0, wait_read_only=True)
          o_smem[wg] = o.astype(s.dtype)
          l_smem[wg] = m + jnp.log2(l)
          plgpu.commit_smem()
          for a in range(half):

            @pl.when(first + a < count)
            def _store(a=a):
              query, choice = edge[a] // g.top_k, lax.rem(edge[a], g.top_k)
              at = pl.ds(a * rows, rows)
              plgpu.copy_smem_to_gmem(
                o_smem.at[wg, at],
                part_gmem.at[query, choice],
                commit_group=False,
              )
              plgpu.copy_smem_to_gmem(
                l_smem.at[wg, at],
                lse_gmem.at[
                  query // g.tile,
                  choice,
                  pl.ds(lax.rem(query, g.tile) * rows, rows),
                ],
                commit_group=False,
              )

          plgpu.commit_smem_to_gmem_group()
          return carry

        lax.fori_loop(0, (pieces - mine + workers - 1) // workers, gather, None)
        plgpu.barrier_arrive(k_free)
        plgpu.barrier_arrive(v_free)
        return step + pieces

      lax.fori_loop(0, my_tasks, task, jnp.int32(0))
      plgpu.wait_smem_to_gmem(0)

    @pl.when(wg == workers)
    def _copy():
      plgpu.set_max_registers(copy_registers, action="decrease")
      row, group, origin = where_gmem[1], where_gmem[2], where_gmem[3]

      def task(i, step):
        block, start, count = read_task(i)
        tokens = pl.ds(block * s.block_size, s.block_size)

        @pl.when(i > 0)
        def _():
          plgpu.barrier_wait(k_free)

        plgpu.copy_gmem_to_smem(k_gmem.at[row, group, tokens], k_smem, k_ready)

        @pl.when(i > 0)
        def _():
          plgpu.barrier_wait(v_free)

        plgpu.copy_gmem_to_smem(v_gmem.at[row, group, tokens], v_smem, v_ready)

        def gather(j, step):
          slot = lax.rem(step, stages)
          query = [
            order_gmem[start + jnp.minimum(j * half + a, count - 1)] // g.top_k
            for a in range(half)
          ]

          @pl.when(step >= stages)
          def _():
            plgpu.barrier_wait(q_free.at[slot])

          for a in range(half):
            plgpu.copy_gmem_to_smem(
              q_gmem.at[row, origin + query[a], pl.ds(group * rows, rows)],
              q_smem.at[slot, pl.ds(a * rows, rows)],
              q_ready.at[slot],
            )
          return step + 1

        return lax.fori_loop(0, (count + half - 1) // half, gather, step)

      step = lax.fori_loop(0, my_tasks, task, jnp.int32(0))
      mosaic.drain(q_free, step)

      @pl.when(my_tasks > 0)
      def _():
        plgpu.barrier_wait(k_free)
        plgpu.barrier_wait(v_free)

  mosaic.launch(
    body, where, plan.tasks, plan.order, q, k, v, *partials,
    name="sparse_edges",
    num_ctas=config.num_ctas,
    num_warpgroups=workers + 1,
    interpret=s.interpret,
    scratch=[
      s.operand(stages, ROWS),
      s.operand(s.block_size),
      s.operand(s.block_size),
      s.operand(workers, ROWS),
      plgpu.SMEM((workers, ROWS), jnp.float32),
      plgpu.Barrier(num_arrivals=half, num_barriers=stages),
      plgpu.Barrier(num_barriers=stages),
      plgpu.Barrier(),
      plgpu.Barrier(),
      plgpu.Barrier(num_arrivals=workers),
      plgpu.Barrier(num_arrivals=workers),
      *s.probs_scratch(workers),
    ],
  )  # fmt: skip


def _tiles(
  out, lse, partials, where, starts, plan, merges, q, k, v, *,
  num_tiles: int, shape: Shape,
):  # fmt: skip
  """Walks the tiles' shared blocks, merges partials, writes out and lse.

  Without partials and merges (`None`: no edge anywhere) SMEM holds more blocks.
  """
  s, g, config = shape, shape.geometry, shape.config
  half, rows = s.half, s.rows
  tiles_of_row = plan.info.shape[0] // (q.shape[0] * s.num_kv_heads)
  merging = partials is not None
  kv_stages = config.kv_stages if merging else config.walk_stages
  merge_stages = config.merge_stages
  row_layout = plgpu.Layout.WGMMA.reduce(1)

  def body(
    where_gmem, starts_gmem, info_gmem, shared_gmem, q_gmem, k_gmem, v_gmem,
    *rest,
  ):  # fmt: skip
    if merging:
      merge_gmem, part_gmem, part_lse_gmem, *rest = rest
    out_gmem, lse_gmem, q_smem, k_smem, v_smem, *rest = rest
    q_ready, k_ready, v_ready, k_free, v_free, *rest = rest
    if merging:
      o_smem, l_smem, o_ready, o_free, *rest = rest
    probs = rest
    cta, wg = lax.axis_index("cta"), lax.axis_index("wg")
    my_tiles = (num_tiles - cta + config.num_ctas - 1) // config.num_ctas
    first_tile = where_gmem[0]

    def locate(i):
      index = first_tile + cta + i * config.num_ctas
      row_group = index // tiles_of_row
      return (
        index,
        row_group // s.num_kv_heads,
        lax.rem(row_group, s.num_kv_heads),
        lax.rem(index, tiles_of_row) * g.tile,
      )

    @pl.when(wg < 2)
    def _compute():
      plgpu.set_max_registers(232, action="increase")
      query_of_row = (
        plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=row_layout) // rows
        + wg * half
      )

      def chosen_by(bits):
        return ((bits >> query_of_row) & 1) == 1

      def full(value, shape, layout):
        return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

      def tile(i, steps):
        kv_step, merge_step = steps
        index, row, group, tile_query = locate(i)
        heads = pl.ds(group * rows, rows)
        first_query = tile_query + wg * half
        for a in range(half):
          plgpu.copy_gmem_to_smem(
            q_gmem.at[row, jnp.minimum(first_query + a, s.q_len - 1), heads],
            q_smem.at[wg, pl.ds(a * rows, rows)],
            q_ready.at[wg],
          )
        num_full, num_shared = info_gmem[index, 0], info_gmem[index, 1]
        poisoned, seeing = info_gmem[index, 2], info_gmem[index, 3]
        position = starts_gmem[row] + tile_query
        plgpu.barrier_wait(q_ready.at[wg])

        def block(j, carry, own: bool):
          slot = lax.rem(kv_step + j, kv_stages)
          entry = shared_gmem[index, j]
          mine = (entry >> (wg * half)) & ((1 << half) - 1)
          plgpu.barrier_wait(k_ready.at[slot])

          def walk(acc, m_i, l_i):
            scores = _qk(q_smem.at[wg], k_smem.at[slot], s.block_size)
            plgpu.barrier_arrive(k_free.at[slot])
            chosen = chosen_by(entry)
            if own:
              first_key = (entry >> tile_plan.SHARED_ID_SHIFT) * s.block_size
              key = first_key + plgpu.broadcasted_iota(
                jnp.int32, scores.shape, 1, layout=plgpu.Layout.WGMMA
              )
              last = position + query_of_row
              scores = jnp.where(
                key <= _over_columns(last, s.block_size), scores, -jnp.inf
              )
            m_block = jnp.where(
              chosen, scores.max(axis=1) * s.scale_log2, -jnp.inf
            )
            m_new = jnp.maximum(m_i, m_block)
            alpha = jnp.exp2(m_i - m_new)
            # exp2(x - inf) = 0 drops the block for rows that did not choose it.
            shift = jnp.where(chosen, m_new, jnp.inf)
            p = jnp.exp2(
              scores * s.scale_log2 - _over_columns(shift, s.block_size)
            )
            l_new = l_i * alpha + p.sum(axis=1)
            acc = acc * _over_columns(alpha, s.head_dim)
            plgpu.barrier_wait(v_ready.at[slot])
            acc = _pv(
              p, v_smem.at[slot], s, probs[0].at[wg] if probs else None, acc
            )
            plgpu.barrier_arrive(v_free.at[slot])
            return acc, m_new, l_new

          def skip(acc, m_i, l_i):
            plgpu.barrier_arrive(k_free.at[slot])
            plgpu.barrier_wait(v_ready.at[slot])
            plgpu.barrier_arrive(v_free.at[slot])
            return acc, m_i, l_i

          return lax.cond(mine != 0, walk, skip, *carry)

        def merge(choice, carry):
          bits = merge_gmem[index, choice]

          def add(acc, m_i, l_i, step):
            slot = lax.rem(step, merge_stages)
            chosen = chosen_by(bits)
            plgpu.barrier_wait(o_ready.at[slot])
            m_part = plgpu.load(
              l_smem.at[slot, pl.ds(wg * ROWS, ROWS)], layout=row_layout
            )
            m_part = jnp.where(chosen, m_part, -jnp.inf)
            m_new = jnp.maximum(m_i, m_part)
            alpha, weight = jnp.exp2(m_i - m_new), jnp.exp2(m_part - m_new)
            o = plgpu.load(
              o_smem.at[slot, wg], layout=plgpu.Layout.WGMMA
            ).astype(jnp.float32)
            plgpu.barrier_arrive(o_free.at[slot])
            # Rows without this edge hold what was in SMEM before, maybe NaN.
            o = jnp.where(
              _over_columns(chosen, s.head_dim),
              o * _over_columns(weight, s.head_dim),
              0.0,
            )
            acc = acc * _over_columns(alpha, s.head_dim) + o
            return acc, m_new, l_i * alpha + weight, step + 1

          return lax.cond(bits != 0, add, lambda *c: c, *carry)

        carry = (
          full(0.0, (ROWS, s.head_dim), plgpu.Layout.WGMMA),
          full(FLOOR, (ROWS,), row_layout),
          full(0.0, (ROWS,), row_layout),
        )
        carry = lax.fori_loop(
          0, num_full, functools.partial(block, own=False), carry
        )
        carry = lax.fori_loop(
          num_full, num_shared, functools.partial(block, own=True), carry
        )
        if merging:
          *carry, merge_step = lax.fori_loop(
            0, g.top_k, merge, (*carry, merge_step)
          )
        acc, m_i, l_i = carry

        sees = chosen_by(seeing)
        bad_key = chosen_by(poisoned)
        bad_value = chosen_by(poisoned >> 16)
        factor = jnp.where(bad_key | bad_value, jnp.nan, 1.0 / l_i)
        acc = acc * _over_columns(factor, s.head_dim)
        acc = jnp.where(_over_columns(sees, s.head_dim), acc, 0.0)
        # Only infinite scores can leave a seeing row without any weight.
        log_l = jnp.where(bad_key | (l_i == 0.0), jnp.nan, jnp.log2(l_i))
        lse_rows = jnp.where(sees, (m_i + log_l) * mosaic.LN2, -jnp.inf)
        lse_gmem[row, group, pl.ds(first_query * rows, ROWS)] = lse_rows
        q_smem[wg] = acc.astype(s.dtype)
        plgpu.commit_smem()
        for a in range(half):

          @pl.when(first_query + a < s.q_len)
          def _store(a=a):
            plgpu.copy_smem_to_gmem(
              q_smem.at[wg, pl.ds(a * rows, rows)],
              out_gmem.at[row, first_query + a, heads],
              commit_group=False,
            )

        plgpu.commit_smem_to_gmem_group()
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        return kv_step + num_shared, merge_step

      lax.fori_loop(0, my_tiles, tile, (jnp.int32(0), jnp.int32(0)))
      plgpu.wait_smem_to_gmem(0)

    @pl.when(wg == 2)
    def _copy():
      plgpu.set_max_registers(40, action="decrease")

      def tile(i, steps):
        kv_step, merge_step = steps
        index, row, group, _ = locate(i)
        num_shared = info_gmem[index, 1]

        def block(j, carry):
          step = kv_step + j
          slot = lax.rem(step, kv_stages)
          tokens = pl.ds(
            (shared_gmem[index, j] >> tile_plan.SHARED_ID_SHIFT) * s.block_size,
            s.block_size,
          )

          @pl.when(step >= kv_stages)
          def _():
            plgpu.barrier_wait(k_free.at[slot])

          plgpu.copy_gmem_to_smem(
            k_gmem.at[row, group, tokens], k_smem.at[slot], k_ready.at[slot]
          )

          @pl.when(step >= kv_stages)
          def _():
            plgpu.barrier_wait(v_free.at[slot])

          plgpu.copy_gmem_to_smem(
            v_gmem.at[row, group, tokens], v_smem.at[slot], v_ready.at[slot]
          )
          return carry

        lax.fori_loop(0, num_shared, block, None)

        def merge(choice, step):
          bits = merge_gmem[index, choice]

          @pl.when(bits != 0)
          def _():
            slot = lax.rem(step, merge_stages)

            @pl.when(step >= merge_stages)
            def _():
              plgpu.barrier_wait(o_free.at[slot])

            plgpu.copy_gmem_to_smem(
              part_lse_gmem.at[index - first_tile, choice], l_smem.at[slot],
              o_ready.at[slot],
            )  # fmt: skip
            for a in range(g.tile):
              here = ((bits >> a) & 1) == 1

              @pl.when(here)
              def _load(a=a):
                plgpu.copy_gmem_to_smem(
                  part_gmem.at[(index - first_tile) * g.tile + a, choice],
                  o_smem.at[slot, a // half, pl.ds((a % half) * rows, rows)],
                  o_ready.at[slot],
                )

              @pl.when(jnp.logical_not(here))
              def _():
                plgpu.barrier_arrive(o_ready.at[slot])

          return step + (bits != 0).astype(jnp.int32)

        if merging:
          merge_step = lax.fori_loop(0, g.top_k, merge, merge_step)
        return kv_step + num_shared, merge_step

      kv_step, merge_step = lax.fori_loop(
        0, my_tiles, tile, (jnp.int32(0), jnp.int32(0))
      )
      mosaic.drain(k_free, kv_step)
      mosaic.drain(v_free, kv_step)
      if merging:
        mosaic.drain(o_free, merge_step)

  merge_scratch = [
    s.operand(merge_stages, 2, ROWS),
    plgpu.SMEM((merge_stages, 2 * ROWS), jnp.float32),
    plgpu.Barrier(num_arrivals=g.tile + 1, num_barriers=merge_stages),
    plgpu.Barrier(num_arrivals=2, num_barriers=merge_stages),
  ]
  mosaic.launch(
    body, where, starts, plan.info, plan.shared, q, k, v,
    *((merges, *partials) if merging else ()), out, lse,
    name="sparse_tiles_merge" if merging else "sparse_tiles",
    num_ctas=config.num_ctas,
    num_warpgroups=3,
    interpret=s.interpret,
    scratch=[
      s.operand(2, ROWS),
      s.operand(kv_stages, s.block_size),
      s.operand(kv_stages, s.block_size),
      plgpu.Barrier(num_arrivals=half, num_barriers=2),
      plgpu.Barrier(num_barriers=kv_stages),
      plgpu.Barrier(num_barriers=kv_stages),
      plgpu.Barrier(num_arrivals=2, num_barriers=kv_stages),
      plgpu.Barrier(num_arrivals=2, num_barriers=kv_stages),
      *(merge_scratch if merging else ()),
      *s.probs_scratch(2),
    ],
  )  # fmt: skip


def geometry(
  q_len: int, kv_len: int, rows: int, head_dim: int, block_size: int,
  top_k: int, config: Config,
) -> tile_plan.Geometry:  # fmt: skip
  tile = 2 * ROWS // rows

  def round_up(x):
    return -(-x // tile) * tile

  most = MAX_WORKSPACE // (top_k * rows * head_dim)
  if config.chunk:
    most = min(most, config.chunk)
  most = max(most // tile * tile, tile)
  chunk = round_up(-(-q_len // (-(-q_len // most))))
  num_blocks = -(-kv_len // block_size)
  # A block should meet 64 queries of a span, and a span's queries of one group
  # (4 KB each at G 16, D 128) should fit the L2 beside what streams through.
  span = config.span
  if not span:
    wanted = 64 * num_blocks // top_k
    fits = (32 << 20) // (rows * head_dim * 2)
    span = max(wanted, fits // 2) if wanted <= fits else chunk
  return tile_plan.Geometry(
    num_blocks=num_blocks,
    block_size=block_size,
    top_k=top_k,
    chunk=chunk,
    tile=tile,
    span=min(round_up(span), chunk),
    task=config.task,
    # The cost of an edge is its bytes, that of a block its wgmma rows.
    shared_cost=config.shared_cost * 16 / rows,
    slack=config.slack,
  )


def forward(
  q: Float[Array, "B T K*R D"],
  k: Float[Array, "B K S D"],
  v: Float[Array, "B K S D"],
  first_bad: Int[Array, "B K 2 N"],
  block_indices: Int[Array, "B K T P"],
  kv_lengths: Int[Array, "B"],
  *,
  block_size: int,
  scale: float,
  config: Config,
  interpret: bool,
) -> tuple[Float[Array, "B T K*R D"], Float[Array, "B K T R"]]:
  """out and the natural lse, of padded operands.

  Args:
    q: queries with R heads a group, 8 or more.
    k: finite keys, head-major, whole blocks.
    v: the same of values.
    first_bad: the first slot of each block whose key (0) or value (1) is not
      finite, `mosaic.NEVER` without one.
    block_indices: chosen blocks, in any order.
    kv_lengths: keys there are, of which the queries are the last.
    block_size: tokens of a block.
    scale: of the scores.
    config: tile sizes.
    interpret: run on the CPU.
  """
  b, t, num_rows, d = q.shape
  num_kv_heads, s_len = k.shape[1:3]
  top_k = block_indices.shape[-1]
  rows = num_rows // num_kv_heads
  g = geometry(t, s_len, rows, d, block_size, top_k, config)
  num_chunks = -(-t // g.chunk)
  shape = Shape(
    q_len=t,
    num_kv_heads=num_kv_heads,
    rows=rows,
    head_dim=d,
    block_size=block_size,
    dtype=jnp.dtype(q.dtype),
    scale_log2=scale * mosaic.LOG2E,
    geometry=g,
    config=config,
    interpret=interpret,
  )
  pad = num_chunks * g.chunk - t
  if pad:
    block_indices = jnp.pad(
      block_indices, ((0, 0), (0, 0), (0, pad), (0, 0)), constant_values=-1
    )
  starts = kv_lengths - t
  positions = starts[:, None] + jnp.arange(num_chunks * g.chunk)
  tiles = tile_plan.plan_tiles(
    block_indices.reshape(-1, num_chunks * g.chunk, top_k),
    jnp.repeat(positions, num_kv_heads, axis=0),
    first_bad.reshape(-1, 2, g.num_blocks),
    g,
  )

  def new(sizes, dtype):
    return jax.new_ref(lax.empty(sizes, dtype))

  num_tiles = tiles.info.shape[0]
  chunk_tiles = g.chunk // g.tile

  def results():
    return (
      new((b, t, num_kv_heads * rows, d), q.dtype),
      new((b, num_kv_heads, num_chunks * g.chunk * rows), jnp.float32),
    )

  def walk_all():
    out, lse = results()
    _tiles(
      out, lse, None, jnp.zeros((1,), jnp.int32), starts, tiles, None, q, k, v,
      num_tiles=num_tiles, shape=shape,
    )  # fmt: skip
    return jax.freeze(out), jax.freeze(lse)

  def mixed():
    out, lse = results()
    partials = (
      new((g.chunk, top_k, rows, d), q.dtype),
      new((chunk_tiles, top_k, 2 * ROWS), jnp.float32),
    )
    merges = tile_plan.plan_merges(tiles, g)
    total = num_tiles // chunk_tiles
    # As many chunks as the sort's workspace allows are planned at once.
    planned = mosaic.largest_divisor(total, MAX_PLANNED // (g.chunk * top_k))

    def plan(i, carry):
      def cut(x):
        x = x.reshape(total, chunk_tiles, g.tile * top_k)
        return lax.dynamic_slice_in_dim(x, i * planned, planned)

      edges = tile_plan.plan_edges(cut(tiles.choices), cut(tiles.is_edge), g)

      def chunk(j, carry):
        index = i * planned + j
        row_group = index // num_chunks
        where = jnp.stack(
          [
            index * chunk_tiles,
            row_group // num_kv_heads,
            row_group % num_kv_heads,
            index % num_chunks * g.chunk,
            edges.chunks[j, 0],
            edges.chunks[j, 1],
          ]
        ).astype(jnp.int32)
        _edges(partials, where, edges, q, k, v, shape=shape)
        _tiles(
          out, lse, partials, where, starts, tiles, merges, q, k, v,
          num_tiles=chunk_tiles, shape=shape,
        )  # fmt: skip
        return carry

      return lax.fori_loop(0, planned, chunk, carry)

    lax.fori_loop(0, total // planned, plan, None)
    return jax.freeze(out), jax.freeze(lse)

  out, lse = lax.cond(jnp.any(tiles.is_edge), mixed, walk_all)
  return out, lse.reshape(b, num_kv_heads, -1, rows)[:, :, :t]
