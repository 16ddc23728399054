"""Gradients of block-sparse attention on Hopper.

With p = exp(scale q.k - lse), dp = dout.v, delta = out.dout and
ds = p (dp - delta), over the visible tokens of the chosen blocks:

  dv = p^T dout    dk = scale ds^T q    dq = scale ds k

**owners** (KV-outer). A CTA owns a task: K and V of one owner block of 128 keys
stay in SMEM and its dK and dV in registers, 64 keys a warpgroup, while the
queries that chose the block are gathered beside it, 64 rows (queries x the
group's heads) at a time, one TMA copy a query. Scores are computed as k q^T, so
that p and ds leave the softmax as the register operands of dV and dK; only ds
passes through SMEM, for dQ, which needs both halves of the keys. A third
warpgroup makes dQ from both halves' ds, gathers queries and stores dQ, each of
its warps some of them: one partial an edge, in q's dtype, summed afterwards. So
those with keys never wait for each other. The next piece's scores are computed
beside dK, and dV while ds is handed over. No atomics: a block's first task adds
to the block's float32 sum, the others of a hot block write sums of their own,
which **sum_extra** adds in order. All order is fixed.

Registers are what is short: dK and dV take 128 of a thread's 216. Pieces with
masks (a query's own block, a list's last piece, blocks of 64) have a loop of
their own, so that the other one knows nothing of masks.

Blocks of 64 keys share an owner block in pairs: a query that chose one of them
is masked in the other, which is right, and costs up to twice the products.

A launch takes all KV heads of as many batch rows as divide the batch and as
a workspace of 2^31 elements (4 GB) has room for (`kv_block_plan.split_owners`
has two more limits), so that many short rows fill the GPU as one long one does; of
a longer row, some KV heads, or one whose chunks of queries take turns.

Bound, for an edge of 16 heads at D 128: 2.6 MFLOP, and 4 + 4 KB of q and dout
in, 4 KB of dQ out and 4 KB in again: memory, at less than 160 FLOP a byte; or
shared memory, which a piece keeps as busy as the tensor cores. What is reached
is in results/LOG.md. SMEM at D 128: K and V 64 KB, q and dout 32 KB a stage,
ds 32, dQ 32.

NaN: a query that sees a NaN has an lse or delta of NaN and hands it to its dq
and to dk and dv of the keys that it sees, as the formula does. Masked pairs are
replaced after the exponential, and in pieces that have some, q and dout are
zeroed where not finite, so that no NaN passes through them.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import kv_block_plan, mosaic

ACC = plgpu.WGMMAAccumulatorRef
ROWS = 64  # of a piece
KEYS = 64  # of a warpgroup
REGISTERS = (216, 72)  # a thread: of those with keys, of the third
MAX_WORKSPACE = 1 << 31  # elements of the dQ partials


@dataclasses.dataclass(frozen=True)
class Config:
  """Tile and pipeline sizes; the result changes by rounding only.

  Attributes:
    stages: gathered pieces in flight.
    task: most edges of a task; 0 lets the number of edges decide.
    chunk: most queries of a chunk; 0 lets the workspace decide.
    edges: most edges of a launch, which takes one query's at least; 0 lets the
      workspace decide.
    num_ctas: CTAs of the persistent grid.
  """

  stages: int = 3
  task: int = 0
  chunk: int = 0
  edges: int = 0
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
    Config(task=2048),
    Config(edges=1 << 19),
  )


@dataclasses.dataclass(frozen=True)
class Shape:
  """Static sizes of one call, after padding."""

  rows: int  # of one query in a piece: its heads, at least 8
  head_dim: int
  block_size: int
  top_k: int
  num_kv_heads: int
  num_groups: int  # that a launch works on
  num_owners: int  # of a group
  chunk: int
  dtype: jnp.dtype
  scale: float
  config: Config
  interpret: bool

  @property
  def half(self) -> int:
    """Queries in 64 rows."""
    return ROWS // self.rows


def _zeros(shape):
  return plgpu.layout_cast(
    jnp.full(shape, 0.0, jnp.float32), plgpu.Layout.WGMMA
  )


def _owners(
  partials, sums, where, starts, plan, q, dout, k, v, lse, delta, *, shape
):
  """Fills the dQ partials of a chunk and adds its dK and dV.

  `where`: first group (batch row * K + KV head), first query, number of tasks.
  `starts`: key slot of that query, for each group of the launch.
  """
  s, config = shape, shape.config
  half, rows, d, stages = s.half, s.rows, s.head_dim, config.stages
  row_layout = plgpu.Layout.WGMMA.reduce(0)

  def body(
    where_gmem, starts_gmem, tasks_gmem, turns_gmem, order_gmem, q_gmem,
    do_gmem, k_gmem, v_gmem, lse_gmem, delta_gmem, part_gmem, sums_gmem,
    q_smem, do_smem, k_smem, v_smem, lse_smem, delta_smem, ds_smem, dq_smem,
    q_ready, q_free, kv_ready, kv_free, ds_ready, ds_free, clean, *probs,
  ):  # fmt: skip
    cta, wg = lax.axis_index("cta"), lax.axis_index("wg")
    my_tasks = kv_block_plan.num_turns(cta, where_gmem[2], config.num_ctas)

    def read_task(i):
      """Group in the launch, its block, and the rest of the task's row."""
      index = turns_gmem[kv_block_plan.turn(cta, i, config.num_ctas)]
      owner, *rest = (tasks_gmem[index, j] for j in range(5))
      return owner // s.num_owners, lax.rem(owner, s.num_owners), *rest

    def query_of(edge):
      """Query in the launch: those of a group after those of the one before."""
      return (edge >> 2) // s.top_k

    def order_of(count, inside):
      """How many pieces are masked, and the place of the i-th piece worked on.

      Queries inside the block come first, a last one may hold repeats. Masked
      pieces lead, so that the loop over the others knows nothing of masks.
      """
      pieces = (count + half - 1) // half
      full = count // half
      led = (inside + half - 1) // half
      masked = pieces if s.block_size < kv_block_plan.OWNER_BLOCK else (
        jnp.minimum(led, full) + pieces - full
      )  # fmt: skip

      def place(i):
        behind = (i >= led) & (pieces > full)
        return jnp.where(behind, jnp.where(i == led, full, i - 1), i)

      return pieces, masked, place

    def read_edges(start, count, piece):
      return tuple(
        order_gmem[start + jnp.minimum(piece * half + a, count - 1)]
        for a in range(half)
      )

    @pl.when(wg < 2)
    def _compute():
      plgpu.set_max_registers(REGISTERS[0], action="increase")

      def task(i, done):
        group, block, start, count, inside, slot = read_task(i)
        pieces, masked, place_of = order_of(count, inside)
        # From a query in the launch to its place after the block's first key.
        after_key = (
          starts_gmem[group]
          - group * s.chunk
          - block * kv_block_plan.OWNER_BLOCK
        )
        plgpu.barrier_wait(kv_ready)

        def along(x):
          return lax.broadcast_in_dim(x, (KEYS, ROWS), [1])

        def key_major(x_smem, y_smem, stage, j, acc):
          """Starts the product of this warpgroup's keys and a piece's rows."""
          # An address that does not change would be kept, and spilled.
          zero = jnp.minimum(j, 0)
          plgpu.wgmma(
            acc, x_smem.at[wg + zero], y_smem.at[stage].transpose((1, 0))
          )

        def key_major_product(x_smem, y_smem, stage, j):
          def run(acc):
            key_major(x_smem, y_smem, stage, j, acc)
            return acc[...]

          return pl.run_scoped(run, ACC((KEYS, ROWS), jnp.float32))

        def scrub(x_smem, stage):
          """Zeroes what is not finite: zero times NaN is NaN."""
          for column in range(0, d, 64):
            at = x_smem.at[stage, :, pl.ds(column, 64)]
            x = plgpu.load(at, layout=plgpu.Layout.WGMMA).astype(jnp.float32)
            x = jnp.where(jnp.abs(x) < jnp.inf, x, 0.0)
            at[...] = x.astype(s.dtype)

        def mask(scores, j):
          first = place_of(j) * half
          edges = read_edges(start, count, place_of(j))
          key = (
            plgpu.broadcasted_iota(
              jnp.int32, (KEYS, ROWS), 0, layout=plgpu.Layout.WGMMA
            )
            + wg * KEYS
          )
          query_of_row = (
            plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=row_layout)
            // rows
          )
          limit = jnp.full((ROWS,), -1, jnp.int32)
          limit = plgpu.layout_cast(limit, row_layout)
          for a in range(half):
            seen = jnp.minimum(
              after_key + query_of(edges[a]), kv_block_plan.OWNER_BLOCK - 1
            )
            live = (first + a < count) & (((edges[a] >> wg) & 1) == 1)
            seen = jnp.where(live, seen, -1)
            limit = jnp.where(query_of_row == a, seen, limit)
          return jnp.where(key <= along(limit), scores, -jnp.inf)

        def probabilities(scores, stage):
          lse_rows = plgpu.load(lse_smem.at[stage], layout=row_layout)
          return jnp.exp2(scores * (s.scale * mosaic.LOG2E) - along(lse_rows))

        def ds_of(p, dp, stage):
          delta_rows = plgpu.load(delta_smem.at[stage], layout=row_layout)
          return p * (dp - along(delta_rows))

        def give_ds(ds, step):
          slot = lax.rem(step, 2)

          @pl.when(step >= 2)
          def _():
            plgpu.barrier_wait(ds_free.at[slot])

          ds_smem[slot, wg] = ds
          plgpu.commit_smem()
          plgpu.barrier_arrive(ds_ready.at[slot])

        def stage_after(j):
          """Where the next piece is, when it is there; if none is, anything."""
          after = lax.rem(done + j + 1, stages)

          @pl.when(j + 1 < pieces)
          def _():
            plgpu.barrier_wait(q_ready.at[after])

          return after

        def add_products(dk, dv, p, ds, step, j=None):
          """dk and dv with a piece's terms, and ds to the third warpgroup.

          With j, p of the piece after j too.
          """
          stage = lax.rem(step, stages)
          if s.interpret:

            def product(a, b):
              def run(acc):
                plgpu.wgmma(acc, a, b)
                return acc[...]

              return pl.run_scoped(run, ACC((KEYS, d), jnp.float32))

            probs[0][wg] = p
            plgpu.commit_smem()
            dv = dv + product(probs[0].at[wg], do_smem.at[stage])
            give_ds(ds, step)
            ds_at = ds_smem.at[lax.rem(step, 2), wg]
            dk = dk + product(ds_at, q_smem.at[stage])
            if j is None:
              return dk, dv
            after = stage_after(j)
            scores = key_major_product(k_smem, q_smem, after, j)
            return dk, dv, probabilities(scores, after)

          def run(dk_acc, dv_acc, acc=None):
            dk_acc[...] = dk
            dv_acc[...] = dv
            plgpu.wgmma(dv_acc, p, do_smem.at[stage])
            give_ds(ds, step)
            if j is not None:
              # Else these scores' registers would be needed from here on.
              plgpu.wgmma_wait(0)
              after = stage_after(j)
              key_major(k_smem, q_smem, after, j + 1, acc)
              # This stage, computed again for the reason in key_major; from
              # j, j + 1 and j + 2, as equal zeros would be one, and kept.
              stage_again = lax.rem(step + jnp.minimum(j + 2, 0), stages)
            else:
              stage_again = stage
            plgpu.wgmma(dk_acc, ds, q_smem.at[stage_again])
            if j is None:
              return dk_acc[...], dv_acc[...]
            scores = plgpu.wgmma_accumulator_load(acc, wait_n=1)
            p_next = probabilities(scores, after)
            return dk_acc[...], dv_acc[...], p_next

          scoped = [ACC((KEYS, d), jnp.float32)] * 2
          if j is not None:
            scoped.append(ACC((KEYS, ROWS), jnp.float32))
          return pl.run_scoped(run, *scoped)

        def masked_piece(j, carry):
          dk, dv = carry
          step = done + j
          stage = lax.rem(step, stages)
          plgpu.barrier_wait(q_ready.at[stage])
          pl.when(wg == 0)(lambda: scrub(q_smem, stage))
          pl.when(wg == 1)(lambda: scrub(do_smem, stage))
          plgpu.commit_smem()
          plgpu.barrier_arrive(clean)
          plgpu.barrier_wait(clean)
          scores = mask(key_major_product(k_smem, q_smem, stage, j), j)
          p = probabilities(scores, stage)
          p = jnp.where(scores == -jnp.inf, 0.0, p)  # lse may be NaN
          dp = key_major_product(v_smem, do_smem, stage, j)
          ds = jnp.where(p == 0.0, 0.0, ds_of(p, dp, stage))
          carry = add_products(
            dk, dv, p.astype(s.dtype), ds.astype(s.dtype), step
          )
          plgpu.barrier_arrive(q_free.at[stage])
          return carry

        def whole_piece(j, carry):
          dk, dv, p = carry
          step = done + j
          stage = lax.rem(step, stages)
          dp = key_major_product(v_smem, do_smem, stage, j)
          ds = ds_of(p, dp, stage)
          carry = add_products(
            dk, dv, p.astype(s.dtype), ds.astype(s.dtype), step, j
          )
          plgpu.barrier_arrive(q_free.at[stage])
          return carry

        zero = _zeros((KEYS, d))
        dk, dv = lax.fori_loop(0, masked, masked_piece, (zero, zero))
        if s.block_size == kv_block_plan.OWNER_BLOCK:
          stage = lax.rem(done + masked, stages)

          @pl.when(masked < pieces)
          def _():
            plgpu.barrier_wait(q_ready.at[stage])

          # Without such a piece these scores are of anything, and not used.
          scores = key_major_product(k_smem, q_smem, stage, masked)
          p = probabilities(scores, stage)
          dk, dv, _ = lax.fori_loop(masked, pieces, whole_piece, (dk, dv, p))

        plgpu.barrier_arrive(kv_free)
        is_first = slot < s.num_groups * s.num_owners
        for kind, x in ((0, dk * s.scale), (1, dv)):
          at = sums_gmem.at[kind, slot, pl.ds(wg * KEYS, KEYS)]

          def add(at=at, x=x):
            so_far = plgpu.load(at, layout=plgpu.Layout.WGMMA, optimized=False)
            return so_far + x

          at[...] = lax.cond(is_first, add, lambda x=x: x)
        return done + pieces

      done = lax.fori_loop(0, my_tasks, task, jnp.int32(0))
      mosaic.drain(ds_free, done)

    @pl.when(wg == 2)
    def _copy():
      plgpu.set_max_registers(REGISTERS[1], action="decrease")

      def task(i, done):
        group, block, start, count, inside, _ = read_task(i)
        pieces, _, place_of = order_of(count, inside)
        # Read again for each task: kept, it would take registers.
        row = (where_gmem[0] + group) // s.num_kv_heads
        kv_head = lax.rem(where_gmem[0] + group, s.num_kv_heads)
        heads = pl.ds(kv_head * rows, rows)
        # From a query in the launch to the query in its row.
        origin = where_gmem[1] - group * s.chunk

        @pl.when(i > 0)
        def _():
          plgpu.barrier_wait(kv_free)

        for h in range(2):
          tokens = pl.ds(block * kv_block_plan.OWNER_BLOCK + h * KEYS, KEYS)
          for x_gmem, x_smem in ((k_gmem, k_smem), (v_gmem, v_smem)):
            plgpu.copy_gmem_to_smem(
              x_gmem.at[row, kv_head, tokens], x_smem.at[h], kv_ready
            )
        # kv_ready is waited for through ds_ready.

        def give_dq(j, step):
          slot = lax.rem(step, 2)
          first = place_of(j) * half
          edges = read_edges(start, count, place_of(j))
          # Two pieces ago dQ left from here.
          plgpu.wait_smem_to_gmem(1, wait_read_only=True)
          plgpu.barrier_wait(ds_ready.at[slot])
          for column in range(0, d, 64):
            at = pl.ds(column, 64)

            def product(acc, at=at):
              for h in range(2):
                plgpu.wgmma(
                  acc,
                  ds_smem.at[slot, h].transpose((1, 0)),
                  k_smem.at[h].at[:, at],
                )
              return acc[...]

            dq = pl.run_scoped(product, ACC((ROWS, 64), jnp.float32))
            dq_smem[slot, :, at] = (dq * s.scale).astype(s.dtype)
          plgpu.barrier_arrive(ds_free.at[slot])
          plgpu.commit_smem()

          @plgpu.warp_map
          def _(warp):
            for a in range(half):

              @pl.when((warp == a % 4) & (first + a < count))
              def _(a=a):
                place = edges[a] >> 2
                plgpu.copy_smem_to_gmem(
                  dq_smem.at[slot, pl.ds(a * rows, rows)],
                  part_gmem.at[place // s.top_k, lax.rem(place, s.top_k)],
                  commit_group=False,
                )

          plgpu.commit_smem_to_gmem_group()

        def gather(j, step):
          stage = lax.rem(step, stages)
          place = place_of(j)
          edges = read_edges(start, count, place)

          @pl.when(step >= stages)
          def _():
            plgpu.barrier_wait(q_free.at[stage])

          at = pl.ds((start + place * half) * rows, ROWS)

          @plgpu.warp_map
          def _(warp):
            for a in range(half):

              @pl.when(warp == a % 4)
              def _(a=a):
                query = origin + query_of(edges[a])
                for x_gmem, x_smem in ((q_gmem, q_smem), (do_gmem, do_smem)):
                  plgpu.copy_gmem_to_smem(
                    x_gmem.at[row, query, heads],
                    x_smem.at[stage, pl.ds(a * rows, rows)],
                    q_ready.at[stage],
                  )

            for a, (x_gmem, x_smem) in enumerate(
              ((lse_gmem, lse_smem), (delta_gmem, delta_smem))
            ):

              @pl.when(warp == a)
              def _(x_gmem=x_gmem, x_smem=x_smem):
                plgpu.copy_gmem_to_smem(
                  x_gmem.at[at], x_smem.at[stage], q_ready.at[stage]
                )

        @pl.loop(0, pieces + stages)
        def _(j):
          pl.when(j < pieces)(lambda: gather(j, done + j))

          @pl.when(j >= stages)
          def _():
            give_dq(j - stages, done + j - stages)

        return done + pieces

      done = lax.fori_loop(0, my_tasks, task, jnp.int32(0))
      mosaic.drain(q_free, done)

      @pl.when(my_tasks > 0)
      def _():
        plgpu.barrier_wait(kv_free)

      plgpu.wait_smem_to_gmem(0)

  def operand(*leading):
    return plgpu.SMEM((*leading, d), s.dtype, transforms=mosaic.OPERAND)

  probs = [
    plgpu.SMEM((2, KEYS, ROWS), s.dtype, transforms=mosaic.OPERAND)
  ] * s.interpret
  mosaic.launch(
    body, where, starts, plan.tasks, plan.turns, plan.order, q, dout, k, v, lse,
    delta, partials, sums,
    name="sparse_owners",
    num_ctas=config.num_ctas,
    num_warpgroups=3,
    interpret=s.interpret,
    auto_barriers=False,
    scratch=[
      operand(stages, ROWS),
      operand(stages, ROWS),
      operand(2, KEYS),
      operand(2, KEYS),
      plgpu.SMEM((stages, ROWS), jnp.float32),
      plgpu.SMEM((stages, ROWS), jnp.float32),
      plgpu.SMEM((2, 2, KEYS, ROWS), s.dtype, transforms=mosaic.OPERAND),
      operand(2, ROWS),
      plgpu.Barrier(num_arrivals=2 * half + 2, num_barriers=stages),
      plgpu.Barrier(num_arrivals=2, num_barriers=stages),
      plgpu.Barrier(num_arrivals=4),
      plgpu.Barrier(num_arrivals=2),
      plgpu.Barrier(num_arrivals=2, num_barriers=2),
      plgpu.Barrier(num_barriers=2),
      plgpu.Barrier(num_arrivals=2),
      *probs,
    ],
  )  # fmt: skip


def sum_extra(sums, extra, *, num_owners, interpret):
  """Adds the extra sums of hot blocks to the blocks' own, in order.

  Args:
    sums: Ref, float32 [kinds, slots, OWNER_BLOCK, D].
    extra: `OwnerPlan.extra`.
  """
  kinds, _, _, d = sums.shape
  piece = 32  # keys of a CTA's tile
  tiles = kv_block_plan.OWNER_BLOCK // piece
  layout = plgpu.Layout.WG_STRIDED((piece, d), vec_size=4)

  def body(extra_gmem, sums_gmem):
    cta, wg = lax.axis_index("cta"), lax.axis_index("wg")
    block, tile = cta // tiles, lax.rem(cta, tiles)
    first, count = extra_gmem[block, 0], extra_gmem[block, 1]
    at = pl.ds(tile * piece, piece)

    def read(slot):
      return plgpu.load(
        sums_gmem.at[wg, slot, at], layout=layout, optimized=False
      )

    def add(i, total, each):
      for x in [read(first + i * each + a) for a in range(each)]:
        total = total + x
      return total

    @pl.when(count > 0)
    def _():
      fours = count // 4  # read at once
      total = lax.fori_loop(
        0, fours, lambda i, x: add(i, x, each=4), read(block)
      )
      total = lax.fori_loop(
        fours * 4, count, lambda i, x: add(i, x, each=1), total
      )
      sums_gmem[wg, block, at] = total

  mosaic.launch(
    body, extra, sums,
    name="sparse_sum_extra",
    num_ctas=num_owners * tiles,
    num_warpgroups=kinds,
    interpret=interpret,
    scratch=[],
  )  # fmt: skip


def backward(
  q, k, v, out, lse, dout, block_indices, kv_lengths, *, block_size, scale,
  config, interpret,
):  # fmt: skip
  """dq, dk, dv; k and v head-major, finite and padded to owner blocks.

  Args:
    q, out, dout: [B, T, K * rows, D], a group's heads padded to `rows`.
    k, v: [B, K, S', D], S' a multiple of `kv_block_plan.OWNER_BLOCK`.
    lse: float32 [B, K * rows, T], +inf for padding heads.
    block_indices: [B, K, T, P].
    kv_lengths: [B], at most S.

  Returns:
    dq like q, dk and dv like k and v.
  """
  b, t, all_rows, d = q.shape
  num_kv_heads, s_len = k.shape[1:3]
  rows = all_rows // num_kv_heads
  top_k = block_indices.shape[-1]
  num_owners = s_len // kv_block_plan.OWNER_BLOCK

  max_edges = MAX_WORKSPACE // (rows * d)
  split = kv_block_plan.split_owners(
    b,
    t,
    num_kv_heads,
    num_owners,
    top_k,
    max_edges=min(config.edges or max_edges, max_edges),
    chunk=config.chunk,
  )
  groups, chunk = split.groups, split.chunk
  edges = groups * chunk * top_k
  task = kv_block_plan.owner_task(edges, config.task)
  shape = Shape(
    rows=rows,
    head_dim=d,
    block_size=block_size,
    top_k=top_k,
    num_kv_heads=num_kv_heads,
    num_groups=groups,
    num_owners=num_owners,
    chunk=chunk,
    dtype=jnp.dtype(q.dtype),
    scale=scale,
    config=config,
    interpret=interpret,
  )
  pad = split.num_chunks * chunk - t
  delta = jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), axis=-1)
  delta = delta.reshape(b, t, num_kv_heads, rows).swapaxes(1, 2)
  lse = lse.reshape(b, num_kv_heads, rows, t).swapaxes(2, 3) * mosaic.LOG2E
  if pad:
    block_indices, delta, lse = (
      jnp.pad(x, ((0, 0), (0, 0), (0, pad), (0, 0)), constant_values=value)
      for x, value in ((block_indices, -1), (delta, 0), (lse, 0))
    )
  starts = jnp.repeat(kv_lengths - t, num_kv_heads)
  num_slots = groups * num_owners
  max_tasks = kv_block_plan.max_owner_tasks(num_slots, edges, task)

  def launch(index, carry):
    dq, dk, dv = carry
    first = index * groups
    sums = lax.empty((2, max_tasks, kv_block_plan.OWNER_BLOCK, d), jnp.float32)
    own = jnp.zeros((2, num_slots, kv_block_plan.OWNER_BLOCK, d), jnp.float32)
    sums = lax.dynamic_update_slice(sums, own, (0, 0, 0, 0))
    partials = lax.empty((groups * chunk, top_k, rows, d), q.dtype)

    def step(i, carry):
      dq, sums, partials = carry
      first_query = i * chunk

      def cut(x):
        return split.cut(x, first, first_query)

      first_slots = lax.dynamic_slice_in_dim(starts, first, groups)
      first_slots += first_query
      plan = kv_block_plan.plan_owners(
        cut(block_indices),
        first_slots,
        block_size=block_size,
        num_blocks=-(-s_len // block_size),
        task=task,
      )
      query = (plan.order >> 2) // top_k

      def by_edge(x):
        x = x.reshape(-1, rows)[query].reshape(-1)
        return jnp.pad(x, (0, ROWS))

      where = jnp.stack([first, first_query, plan.num_tasks[0]])
      one_delta = cut(delta)
      # Through lse, a dout that is not finite reaches dv of what it sees only.
      one_lse = jnp.where(jnp.isfinite(one_delta), cut(lse), jnp.nan)
      sums_ref, partials_ref = jax.new_ref(sums), jax.new_ref(partials)
      _owners(
        partials_ref, sums_ref, where.astype(jnp.int32), first_slots, plan, q,
        dout, k, v, by_edge(one_lse), by_edge(one_delta),
        shape=shape,
      )  # fmt: skip
      sum_extra(sums_ref, plan.extra, num_owners=num_slots, interpret=interpret)
      partials = jax.freeze(partials_ref)
      # Places without an edge hold anything.
      one = partials.reshape(groups, chunk, top_k, rows, d)
      one = split.token_major(one).astype(jnp.float32)
      is_edge = split.token_major(plan.is_edge)[..., None, None]
      one = jnp.sum(jnp.where(is_edge, one, 0), axis=3).astype(q.dtype)
      row, kv_head = first // num_kv_heads, first % num_kv_heads
      at = (row, first_query, kv_head, 0, 0)
      dq = lax.dynamic_update_slice(dq, one, at)
      return dq, jax.freeze(sums_ref), partials

    dq, sums, _ = lax.fori_loop(0, split.num_chunks, step, (dq, sums, partials))
    sums = sums[:, :num_slots].astype(q.dtype)
    sums = sums.reshape(2, groups, s_len, d)
    dk = lax.dynamic_update_slice(dk, sums[0], (first, 0, 0))
    dv = lax.dynamic_update_slice(dv, sums[1], (first, 0, 0))
    return dq, dk, dv

  all_groups = b * num_kv_heads
  dk, dv = (lax.empty((all_groups, s_len, d), q.dtype) for _ in range(2))
  dq = lax.empty((b, t + pad, num_kv_heads, rows, d), q.dtype)
  dq, dk, dv = lax.fori_loop(0, all_groups // groups, launch, (dq, dk, dv))
  return dq[:, :t].reshape(q.shape), dk.reshape(k.shape), dv.reshape(v.shape)
