"""Gradients of block-sparse attention on Hopper.

With p = exp(scale q.k - lse), dp = dout.v, delta = out.dout - dlse and
ds = p (dp - delta), over the visible tokens of the chosen blocks (Main Branch;
arXiv 2606.13392):

  dv = p^T dout    dk = scale ds^T q    dq = scale ds k

**kv_blocks**, the main kernel. A CTA owns a task of `kv_block_plan`: one KV
block of 128 keys and queries that chose it. K and V of the block stay in SMEM,
its dK and dV in registers. The queries are gathered into *row tiles* of 64 rows
(queries x the heads of their group), one TMA copy a pack (`mosaic.Packing`,
`gather` in `_copy`). Warpgroup roles:

* two compute warpgroups own 64 of the keys each. They compute the scores as
  k q^T, so that p and ds come out of the softmax in the register layout of the
  left operands of dV and dK. Only ds passes through SMEM, because dQ needs both
  halves of the keys. The scores of the next row tile are computed while dK is,
  and dV while ds is handed over.
* the third warpgroup gathers queries, multiplies dQ from both halves' ds and
  stores it, each of its warps for some of the queries: one partial dQ for each
  (pack, KV block) pair, in q's dtype. A query's partials are summed afterwards:
  by XLA if a pack is one query, which reads all P slots, and else by a
  kernel, **sum_pairs**, that reads the pairs alone. Because this warpgroup
  makes dQ, the two compute warpgroups never wait for each other.

Packed rows (`packed_rows`) differ in row tiles that need masks: these read how
far each query reaches in the block, and how many keys each half of it has. A
program for plain rows has no code for that.

There are no atomics: a block's first task writes the block's float32 sum of dK
and dV, or adds to it if queries come in several chunks. A block that many
queries chose has more tasks. They write sums of their own, which a second
kernel, **sum_extra**, adds in order. So all sums have a fixed order.

Registers are the scarce resource: dK and dV take 128 of the 216 of a thread.
Row tiles that need masks (with queries inside the KV block, the last tile of a
list, or any tile if blocks have 64 keys) have a loop of their own, so that the
loop over the full tiles spends no registers on masks.

With heads of more than 128 dims (*wide* ones), dK and dV of 64 keys would take
all registers of a thread. Then a KV block has 64 keys. Both compute warpgroups
compute scores, p, dP and ds of all of these, and each owns half of the columns
of dK and dV; the first one sends ds. A chosen block of 128 keys is two pairs.
The products are 7 instead of 5, in exchange for no barrier between the two.
There is no room in SMEM for a dQ of all columns, so that each 64 of them are
stored as soon as they are computed, and none in registers for the scores of the
next row tile.

Two blocks of 64 keys share a KV block of 128: a query that chose only one of
them is masked in the other half. The result is exact and costs up to twice the
products.

A launch takes all KV heads of several batch rows, so that many short rows fill
the GPU as one long one does: as many rows as divide the batch and as a
workspace of 2^31 elements (4 GB) has room for (`kv_block_plan.split_launches`
has two more limits). If one batch row exceeds the limit, a launch takes some of
its KV heads, or one KV head in chunks of queries.

Bound, for a pair with 16 heads at D 128: 2.6 MFLOP for 4 + 4 KB of q and dout
read, 4 KB of dQ written and 4 KB read again. Either memory binds (less than 160
FLOP a byte), or shared memory, which a row tile keeps as busy as the tensor
cores. benchmarks/results/LOG.md says what is reached.

SMEM at D 128: K and V 64 KB, q and dout 32 KB a stage, ds 32 KB, dQ 32 KB, and
2 KB of lse, delta and pairs. At D 256: K and V 64 KB, q and dout 128 KB in two
stages, ds 16 KB, dQ 16 KB. What a pair is (its pack and where its dQ goes) is
copied there one row tile ahead: with 8 rows a pack, waiting for these numbers
from memory took 40 % of the kernel's time.

Barriers of kv_blocks, between compute warpgroups 0 and 1 and the third one,
which copies and multiplies dQ (arrivals in brackets, one where no number
stands; sum_extra and sum_pairs have none):

  name        who arrives                            who waits
  pairs_ready copy of a row tile's pairs; 2 to be    third
              gathered, 2 whose dQ is stored
  q_ring      ready: copies of q and dout of each    0 and 1
              pack, of lse and of delta (10 with
              16 rows a pack, 18 with 8)
              free: 0 and 1, after dK (2)            third
  kv_ring     ready: both halves of K and V (4), or  0 and 1
              all of them if heads are wide (2)
              free: 0 and 1, after the task's last   third
              row tile (2)
  ds_ring     ready: 0 and 1, each its keys' ds (2), third
              or 0 alone if heads are wide (1)
              free: third, after dQ                  0 and 1, or 0
  clean       0 and 1: one has zeroed what is not    0 and 1
              finite in q, the other in dout (2)

The third warpgroup reads K too, and never waits for its copy: the ds that it
does wait for was computed from the same K. kv_ring needs no arrival of it,
since it does all of a task's products before it copies the next task's keys.

NaN: a query that sees a NaN has an lse or delta of NaN and passes it to its dq
and to dk and dv of the keys that it sees, as the formula does. Masked entries
are replaced after the exponential, and in row tiles that have masks q and dout
are zeroed where they are not finite, so that no NaN leaks through a product
with zero.

Not supported: what `mosaic.check_supported` refuses; gradients of gradients.
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
ROWS = 64  # MMA rows of a row tile
# Fields of a pair, see `_describe`: 16 bytes, the least that TMA copies.
PACK, SLOT, CHOSEN, REACH = range(4)
FIELDS = 4
GATHER, STORE = range(2)  # what a row tile's pairs are copied to SMEM for
KEYS = 64  # keys of a compute warpgroup
REGISTERS = (216, 72)  # of a thread: compute warpgroups, third warpgroup
MAX_WORKSPACE = 1 << 31  # elements of the dQ partials


@dataclasses.dataclass(frozen=True)
class Config:
  """Tile and pipeline sizes; the result changes by rounding only.

  Attributes:
    stages: row tiles of gathered queries in flight, two at most with wide
      heads.
    task: upper bound on the pairs of a task; 0 derives it from their number.
    chunk: upper bound on the queries of a chunk; 0 derives it from the
      workspace.
    pairs: upper bound on the pairs of a launch, which takes at least one
      query's; 0 derives it from the workspace.
    num_ctas: CTAs of the persistent grid.
  """

  stages: int = 3
  task: int = 0
  chunk: int = 0
  pairs: int = 0
  num_ctas: int = mosaic.NUM_SMS


@dataclasses.dataclass(frozen=True)
class KernelParams:
  """Static parameters of one call, after padding."""

  packing: mosaic.Packing
  head_dim: int
  block_size: int
  num_kv_heads: int
  num_groups: int  # groups (KV heads of batch rows) of a launch
  num_kv_blocks: int  # KV blocks of a group
  chunk: int  # packs of a chunk
  adds: bool  # to the sums of the chunks before
  dtype: jnp.dtype
  scale: float
  config: Config
  interpret: bool

  @property
  def half(self) -> int:
    """Packs in a row tile of 64 MMA rows."""
    return ROWS // self.packing.rows

  @property
  def wide(self) -> bool:
    """Whether the compute warpgroups share keys and split the columns."""
    return self.head_dim > mosaic.WIDE

  @property
  def columns(self) -> int:
    """Columns of dK and dV of a compute warpgroup."""
    return self.head_dim // 2 if self.wide else self.head_dim

  @property
  def key_parts(self) -> int:
    """Parts of `KEYS` keys of a KV block."""
    return kv_block_keys(self.head_dim) // KEYS

  @property
  def stages(self) -> int:
    """Row tiles in flight, of which two fit SMEM if heads are wide."""
    return min(self.config.stages, 2) if self.wide else self.config.stages


def kv_block_keys(head_dim: int) -> int:
  """Keys of a KV block, whose K and V stay in SMEM, and dK and dV in registers.

  Args:
    head_dim: D inside the kernel.
  """
  return KEYS if head_dim > mosaic.WIDE else kv_block_plan.KV_BLOCK


def _zeros(params):
  return plgpu.layout_cast(
    jnp.full(params, 0.0, jnp.float32), plgpu.Layout.WGMMA
  )


def _kv_blocks(
  partials,
  sums,
  chunk_desc,
  starts,
  plan,
  pairs,
  q,
  dout,
  k,
  v,
  lse,
  delta,
  keys,
  *,
  params,
):
  """Computes a chunk's dQ partials and sums of dK and dV.

  Args:
    partials: Ref of dQ partials, [packs, slots of a pack, MMA rows, D].
    sums: Ref, float32 [2, slots, KV_BLOCK, D]: sums of dK and of dV.
    chunk_desc: chunk descriptor, int32 [3]: first group (batch row * K + KV
      head), first pack, number of tasks.
    starts: position of the chunk's first query among the keys, for each group
      of the launch.
    plan: `kv_block_plan.KVBlockPlan`.
    pairs: of `_describe`.
    q, dout, k, v: operands as `backward` takes them.
    lse, delta: float32 as int32, one value for each MMA row in the order of the
      pairs.
    keys: int32 [B, halves]: keys of each half KV block of packed rows; None for
      plain rows.
    params: static parameters.
  """
  s, config = params, params.config
  half, d, stages = s.half, s.head_dim, s.stages
  kv_block = s.key_parts * KEYS
  rows, pack = s.packing.rows, s.packing.queries
  masks_choices = plan.chosen is not None
  row_layout = plgpu.Layout.WGMMA.reduce(0)
  # The small buffers share one of int32, because each buffer takes whole KB:
  # lse of all stages, delta of all stages, four slots of a row tile's pairs.
  tile_words = ROWS // 8 * FIELDS  # of the most pairs that a row tile can have
  delta_at, pairs_at = stages * ROWS, 2 * stages * ROWS

  def body(
    *, chunk_gmem, starts_gmem, tasks_gmem, longest_first_gmem, pairs_gmem,
    q_gmem, do_gmem, k_gmem, v_gmem, lse_gmem, delta_gmem, part_gmem, sums_gmem,
    q_smem, do_smem, k_smem, v_smem, ds_smem, dq_smem, small_smem, pairs_ready,
    q_ring, kv_ring, ds_ring, clean, p_smem=None, keys_gmem=None,
  ):  # fmt: skip
    cta, wg = lax.axis_index("cta"), lax.axis_index("wg")
    my_tasks = kv_block_plan.num_tasks_of_cta(
      cta, chunk_gmem[2], config.num_ctas
    )

    def read_task(i):
      """Group in the launch, its KV block, and the rest of the task's entry."""
      index = longest_first_gmem[
        kv_block_plan.nth_task(cta, i, config.num_ctas)
      ]
      kv_block, *rest = (tasks_gmem[index, j] for j in range(5))
      return (
        kv_block // s.num_kv_blocks,
        lax.rem(kv_block, s.num_kv_blocks),
        *rest,
      )

    def tile_order(count, inside):
      """Number of row tiles, number of masked ones, and the i-th tile to do.

      Queries inside the block come first in the list; the last tile may be
      filled up with repeats of a query. Both need masks, so they are done
      first, and the loop over the other tiles contains no code for masks.
      """
      num_tiles = (count + half - 1) // half
      full = count // half
      inside_tiles = (inside + half - 1) // half
      num_masked = num_tiles if s.block_size < kv_block else (
        jnp.minimum(inside_tiles, full) + num_tiles - full
      )  # fmt: skip

      def nth_tile(i):
        behind = (i >= inside_tiles) & (num_tiles > full)
        return jnp.where(behind, jnp.where(i == inside_tiles, full, i - 1), i)

      return num_tiles, num_masked, nth_tile

    def nth_pair(a, tile, count):
      """Index of a tile's a-th pair; the last pair fills up the last tile."""
      return jnp.minimum(tile * half + a, count - 1)

    @pl.when(wg < 2)
    def _compute():
      plgpu.set_max_registers(REGISTERS[0], action="increase")

      def task(i, done):
        group, block, start, count, inside, sum_slot = read_task(i)
        num_tiles, num_masked, nth_tile = tile_order(count, inside)
        # Added to a query in the launch, this gives its distance from the
        # block's first key.
        after_key = (
          starts_gmem[group] - group * s.chunk * pack - block * kv_block
        )
        if keys_gmem is not None:
          batch_row = (chunk_gmem[0] + group) // s.num_kv_heads
          if s.wide:
            last_key = keys_gmem[batch_row, block] - 1
          else:
            last_key = wg * KEYS + keys_gmem[batch_row, 2 * block + wg] - 1
        kv_ring.wait_ready(0)

        def over_keys(x):
          return lax.broadcast_in_dim(x, (KEYS, ROWS), [1])

        def key_major(x_smem, y_smem, stage, j, acc):
          """Starts the product of this warpgroup's keys and a row tile."""
          # The compiler would keep an address that does not change in registers
          # and spill it. This zero, which it cannot know, makes it compute the
          # address again.
          zero = jnp.minimum(j, 0)
          part = zero if s.wide else wg + zero
          plgpu.wgmma(acc, x_smem.at[part], y_smem.at[stage].transpose((1, 0)))

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
          first = nth_tile(j) * half
          key = plgpu.broadcasted_iota(
            jnp.int32, (KEYS, ROWS), 0, layout=plgpu.Layout.WGMMA
          )
          if not s.wide:
            key += wg * KEYS
          query_of_row = (
            plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=row_layout)
            // s.packing.heads
          )
          limit = jnp.full((ROWS,), -1, jnp.int32)
          limit = plgpu.layout_cast(limit, row_layout)
          for a in range(half):
            at = (start + nth_pair(a, nth_tile(j), count)) * FIELDS
            first_query = pairs_gmem[at + PACK] * pack
            chosen = pairs_gmem[at + CHOSEN]
            if keys_gmem is not None:
              reach = pairs_gmem[at + REACH]
            for b in range(pack):
              if keys_gmem is None:
                seen = jnp.minimum(after_key + first_query + b, kv_block - 1)
              else:
                seen = kv_block_plan.count_of(reach, b) - 1
                seen = jnp.minimum(seen, last_key)
              live = first + a < count
              if masks_choices:
                part = 0 if s.wide else wg
                live &= kv_block_plan.chose_half(chosen, b, part)
              seen = jnp.where(live, seen, -1)
              limit = jnp.where(query_of_row == a * pack + b, seen, limit)
          return jnp.where(key <= over_keys(limit), scores, -jnp.inf)

        def load_rows(at):
          x = plgpu.load(small_smem.at[pl.ds(at, ROWS)], layout=row_layout)
          return lax.bitcast_convert_type(x, jnp.float32)

        def probabilities(scores, stage):
          lse_rows = load_rows(stage * ROWS)
          return jnp.exp2(
            scores * (s.scale * mosaic.LOG2E) - over_keys(lse_rows)
          )

        def ds_of(p, dp, stage):
          delta_rows = load_rows(delta_at + stage * ROWS)
          return p * (dp - over_keys(delta_rows))

        def send_ds(ds, step):
          if s.wide:  # both warpgroups have the same ds
            pl.when(wg == 0)(lambda: send_part(ds, step, 0))
          else:
            send_part(ds, step, wg)

        def send_part(ds, step, part):
          slot = ds_ring.wait_free(step)
          ds_smem[slot, part] = ds
          plgpu.commit_smem()
          ds_ring.fill(slot)

        def my_columns(x_smem, stage):
          """A row tile's columns of which this warpgroup owns dK and dV."""
          if not s.wide:
            return x_smem.at[stage]
          return x_smem.at[stage, :, pl.ds(wg * s.columns, s.columns)]

        def stage_after(j):
          """Waits for the next row tile and returns its stage.

          Without a next tile this returns some stage and does not wait.
          """
          after = q_ring.slot(done + j + 1)
          pl.when(j + 1 < num_tiles)(lambda: q_ring.wait_ready(after))
          return after

        def add_products(dk, dv, p, ds, step, j=None):
          """Adds a row tile's terms to dk and dv, and sends ds to dQ.

          If j is given, this also computes and returns p of the tile after j.
          """
          stage = q_ring.slot(step)
          if p_smem is not None:

            def product(a, b):
              def run(acc):
                plgpu.wgmma(acc, a, b)
                return acc[...]

              return pl.run_scoped(run, ACC((KEYS, s.columns), jnp.float32))

            p_smem[wg] = p
            plgpu.commit_smem()
            dv = dv + product(p_smem.at[wg], my_columns(do_smem, stage))
            send_ds(ds, step)
            p_smem[wg] = ds
            plgpu.commit_smem()
            dk = dk + product(p_smem.at[wg], my_columns(q_smem, stage))
            if j is None:
              return dk, dv
            after = stage_after(j)
            scores = key_major_product(k_smem, q_smem, after, j)
            return dk, dv, probabilities(scores, after)

          def run(dk_acc, dv_acc, acc=None):
            dk_acc[...] = dk
            dv_acc[...] = dv
            plgpu.wgmma(dv_acc, p, my_columns(do_smem, stage))
            send_ds(ds, step)
            if j is not None:
              # Without this wait, the registers of the next scores would be
              # occupied from here on.
              plgpu.wgmma_wait(0)
              after = stage_after(j)
              key_major(k_smem, q_smem, after, j + 1, acc)
              # The address of this stage is computed again, for the reason in
              # key_major. The zeros come from j, j + 1 and j + 2, because the
              # compiler would merge equal ones and keep the result.
              stage_again = q_ring.slot(step + jnp.minimum(j + 2, 0))
            else:
              stage_again = stage
            plgpu.wgmma(dk_acc, ds, my_columns(q_smem, stage_again))
            if j is None:
              return dk_acc[...], dv_acc[...]
            scores = plgpu.wgmma_accumulator_load(acc, wait_n=1)
            p_next = probabilities(scores, after)
            return dk_acc[...], dv_acc[...], p_next

          scoped = [ACC((KEYS, s.columns), jnp.float32)] * 2
          if j is not None:
            scoped.append(ACC((KEYS, ROWS), jnp.float32))
          return pl.run_scoped(run, *scoped)

        def masked_tile(j, carry):
          dk, dv = carry
          step = done + j
          stage = q_ring.slot(step)
          q_ring.wait_ready(stage)
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
          q_ring.release(stage)
          return carry

        def full_tile(j, carry):
          dk, dv, p = carry
          step = done + j
          stage = q_ring.slot(step)
          dp = key_major_product(v_smem, do_smem, stage, j)
          ds = ds_of(p, dp, stage)
          carry = add_products(
            dk, dv, p.astype(s.dtype), ds.astype(s.dtype), step, j
          )
          q_ring.release(stage)
          return carry

        def wide_tile(j, carry):
          """A full tile, without the scores of the next one in registers."""
          dk, dv = carry
          step = done + j
          stage = q_ring.slot(step)
          q_ring.wait_ready(stage)
          scores = key_major_product(k_smem, q_smem, stage, j)
          p = probabilities(scores, stage)
          dp = key_major_product(v_smem, do_smem, stage, j)
          ds = ds_of(p, dp, stage)
          carry = add_products(
            dk, dv, p.astype(s.dtype), ds.astype(s.dtype), step
          )
          q_ring.release(stage)
          return carry

        zero = _zeros((KEYS, s.columns))
        dk, dv = lax.fori_loop(0, num_masked, masked_tile, (zero, zero))
        if s.wide:
          dk, dv = lax.fori_loop(num_masked, num_tiles, wide_tile, (dk, dv))
        elif s.block_size == kv_block:
          stage = q_ring.slot(done + num_masked)
          pl.when(num_masked < num_tiles)(lambda: q_ring.wait_ready(stage))
          # Without a full tile the stage holds old data, and these scores are
          # not used.
          scores = key_major_product(k_smem, q_smem, stage, num_masked)
          p = probabilities(scores, stage)
          dk, dv, _ = lax.fori_loop(
            num_masked, num_tiles, full_tile, (dk, dv, p)
          )

        kv_ring.release(0)
        is_first = sum_slot < s.num_groups * s.num_kv_blocks
        for kind, x in ((0, dk * s.scale), (1, dv)):
          if s.wide:
            mine = pl.ds(wg * s.columns, s.columns)
            at = sums_gmem.at[kind, sum_slot, :, mine]
          else:
            at = sums_gmem.at[kind, sum_slot, pl.ds(wg * KEYS, KEYS)]

          def add(at=at, x=x):
            so_far = plgpu.load(at, layout=plgpu.Layout.WGMMA, optimized=False)
            return so_far + x

          at[...] = lax.cond(is_first, add, lambda x=x: x) if s.adds else x
        return done + num_tiles

      done = lax.fori_loop(0, my_tasks, task, jnp.int32(0))
      if s.wide:
        pl.when(wg == 0)(lambda: mosaic.drain_rings(done, ds_ring))
      else:
        mosaic.drain_rings(done, ds_ring)

    @pl.when(wg == 2)
    def _copy():
      plgpu.set_max_registers(REGISTERS[1], action="decrease")

      def task(i, done):
        group, block, start, count, inside, _ = read_task(i)
        num_tiles, _, nth_tile = tile_order(count, inside)
        # These are read again for each task to save registers.
        batch_row = (chunk_gmem[0] + group) // s.num_kv_heads
        kv_head = lax.rem(chunk_gmem[0] + group, s.num_kv_heads)
        heads = pl.ds(kv_head * rows, rows)
        # Added to a pack in the launch, this gives the pack in its batch row.
        origin = chunk_gmem[1] - group * s.chunk

        pl.when(i > 0)(lambda: kv_ring.wait_released(0))
        for h in range(s.key_parts):
          tokens = pl.ds(block * kv_block + h * KEYS, KEYS)
          for x_gmem, x_smem in ((k_gmem, k_smem), (v_gmem, v_smem)):
            plgpu.copy_gmem_to_smem(
              x_gmem.at[batch_row, kv_head, tokens],
              x_smem.at[h],
              kv_ring.ready_at(0),
            )
        # No wait for kv_ring is needed here: that for ds_ring implies it.

        def pairs_slot(use, step):
          # Two `mosaic.Ring` would say the same, but ptxas 13.5 then spills two
          # registers more (224 bytes instead of 216 at the paper's heads).
          return 2 * use + lax.rem(step, 2)

        def copy_pairs(use, j):
          """Copies the j-th row tile's pairs, to GATHER or to STORE.

          All warps must have finished with the tile two before it.
          """
          slot = pairs_slot(use, done + j)
          first = (start + nth_tile(j) * half) * FIELDS

          @pl.when(j < num_tiles)
          def _():
            plgpu.copy_gmem_to_smem(
              pairs_gmem.at[pl.ds(pl.multiple_of(first, FIELDS), tile_words)],
              small_smem.at[pl.ds(pairs_at + slot * tile_words, tile_words)],
              pairs_ready.at[slot],
            )

        def pair_fields(use, j, field):
          """A field of all pairs of the j-th row tile."""
          tile = nth_tile(j)
          at = pairs_at + pairs_slot(use, done + j) * tile_words + field
          return [
            small_smem[at + (nth_pair(a, tile, count) - tile * half) * FIELDS]
            for a in range(half)
          ]

        def store_dq(j, step):
          slot = ds_ring.slot(step)
          first = nth_tile(j) * half

          def product_of(at):
            def product(acc):
              for h in range(s.key_parts):
                plgpu.wgmma(
                  acc,
                  ds_smem.at[slot, h].transpose((1, 0)),
                  k_smem.at[h].at[:, at],
                )
              return acc[...]

            dq = pl.run_scoped(product, ACC((ROWS, 64), jnp.float32))
            return (dq * s.scale).astype(s.dtype)

          def store(dq_slot, at=None):
            packs, slots = (pair_fields(STORE, j, x) for x in (PACK, SLOT))

            @plgpu.warp_map
            def _(warp):
              for a in range(half):

                @pl.when((warp == a % 4) & (first + a < count))
                def _(a=a):
                  part = part_gmem.at[packs[a], slots[a]]
                  plgpu.copy_smem_to_gmem(
                    dq_smem.at[dq_slot, pl.ds(a * rows, rows)],
                    part if at is None else part.at[:, at],
                    commit_group=False,
                  )

            plgpu.commit_smem_to_gmem_group()

          if s.wide:
            ds_ring.wait_ready(slot)
            plgpu.barrier_wait(pairs_ready.at[pairs_slot(STORE, step)])

            @pl.loop(0, d // 64)
            def _(i):
              at = mosaic.span(i * 64, 64)
              # No `mosaic.Ring`: not a barrier, but the wait below says that a
              # copy to memory has read its slot.
              dq_slot = lax.rem(i, 2)
              # The dQ of two columns tiles ago was stored from the same slot.
              plgpu.wait_smem_to_gmem(1, wait_read_only=True)
              dq_smem[dq_slot] = product_of(at)
              plgpu.commit_smem()
              store(dq_slot, at)

            ds_ring.release(slot)
            copy_pairs(STORE, j + 1)
            return
          # The dQ of two row tiles ago was stored from the same slot.
          plgpu.wait_smem_to_gmem(1, wait_read_only=True)
          ds_ring.wait_ready(slot)
          for column in range(0, d, 64):
            at = pl.ds(column, 64)
            dq_smem[slot, :, at] = product_of(at)
          ds_ring.release(slot)
          plgpu.barrier_wait(pairs_ready.at[pairs_slot(STORE, step)])
          plgpu.commit_smem()
          copy_pairs(STORE, j + 1)
          store(slot)

        def gather(j, step):
          stage = q_ring.slot(step)
          tile = nth_tile(j)
          plgpu.barrier_wait(pairs_ready.at[pairs_slot(GATHER, step)])
          packs = pair_fields(GATHER, j, PACK)
          q_ring.wait_free(step, stage)
          at = pl.ds((start + tile * half) * rows, ROWS)

          @plgpu.warp_map
          def _(warp):
            for a in range(half):

              @pl.when(warp == a % 4)
              def _(a=a):
                row = origin + packs[a]
                for x_gmem, x_smem in ((q_gmem, q_smem), (do_gmem, do_smem)):
                  plgpu.copy_gmem_to_smem(
                    x_gmem.at[batch_row, row, heads],
                    x_smem.at[stage, pl.ds(a * rows, rows)],
                    q_ring.ready_at(stage),
                  )

            for a, x_gmem in enumerate((lse_gmem, delta_gmem)):

              @pl.when(warp == a)
              def _(a=a, x_gmem=x_gmem):
                plgpu.copy_gmem_to_smem(
                  x_gmem.at[at],
                  small_smem.at[pl.ds(a * delta_at + stage * ROWS, ROWS)],
                  q_ring.ready_at(stage),
                )

        for use, j in ((GATHER, 0), (GATHER, 1), (STORE, 0)):
          copy_pairs(use, j)

        @pl.loop(0, num_tiles + stages)
        def _(j):
          pl.when(j < num_tiles)(lambda: gather(j, done + j))

          @pl.when(j >= stages)
          def _():
            store_dq(j - stages, done + j - stages)

          # All warps have gathered tile j: store_dq waits for them.
          pl.when(j < stages)(plgpu.commit_smem)
          copy_pairs(GATHER, j + 2)

        return done + num_tiles

      done = lax.fori_loop(0, my_tasks, task, jnp.int32(0))
      mosaic.drain_rings(done, q_ring)
      mosaic.drain_rings(my_tasks, kv_ring)
      plgpu.wait_smem_to_gmem(0)

  def operand(*leading):
    return plgpu.SMEM((*leading, d), s.dtype, transforms=mosaic.OPERAND)

  scratch = dict(
    q_smem=operand(stages, ROWS),
    do_smem=operand(stages, ROWS),
    k_smem=operand(s.key_parts, KEYS),
    v_smem=operand(s.key_parts, KEYS),
    ds_smem=plgpu.SMEM(
      (2, s.key_parts, KEYS, ROWS), s.dtype, transforms=mosaic.OPERAND
    ),
    dq_smem=plgpu.SMEM(
      (2, ROWS, 64 if s.wide else d), s.dtype, transforms=mosaic.OPERAND
    ),
    small_smem=plgpu.SMEM((pairs_at + 4 * tile_words,), jnp.int32),
    pairs_ready=plgpu.Barrier(num_barriers=4),
    q_ring=mosaic.ring(stages, fills=2 * half + 2, releases=2),
    kv_ring=mosaic.ring(fills=2 * s.key_parts, releases=2),
    ds_ring=mosaic.ring(2, fills=s.key_parts),
    clean=plgpu.Barrier(num_arrivals=2),
  )
  if s.interpret:  # interpreted wgmma takes no register operand
    scratch["p_smem"] = plgpu.SMEM(
      (2, KEYS, ROWS), s.dtype, transforms=mosaic.OPERAND
    )
  mosaic.launch(
    body,
    dict(
      chunk_gmem=chunk_desc,
      starts_gmem=starts,
      tasks_gmem=plan.tasks,
      longest_first_gmem=plan.longest_first,
      pairs_gmem=pairs,
      q_gmem=q,
      do_gmem=dout,
      k_gmem=k,
      v_gmem=v,
      lse_gmem=lse,
      delta_gmem=delta,
      part_gmem=partials,
      sums_gmem=sums,
      **({} if keys is None else dict(keys_gmem=keys)),
    ),
    name="sparse_kv_blocks",
    num_ctas=config.num_ctas,
    num_warpgroups=3,
    interpret=s.interpret,
    auto_barriers=False,
    reduction_scratch=0,  # nothing is reduced across warps
    scratch=scratch,
  )


def _describe(plan, slots: int) -> jax.Array:
  """int32 [pairs * FIELDS]: what the kernel reads of each pair.

  PACK: its pack, numbered over all groups of the launch. SLOT: its slot in the
  pack. CHOSEN, REACH: of the plan, 0 where it has none. The kernel copies these
  to SMEM ahead of use, because it would wait for each number that it reads from
  memory.

  Args:
    plan: `kv_block_plan.KVBlockPlan`.
    slots: choice slots of a pack.
  """
  zero = jnp.zeros_like(plan.order)
  chosen = zero if plan.chosen is None else plan.chosen
  reach = zero if plan.reach is None else plan.reach
  fields = [plan.order // slots, plan.order % slots, chosen, reach]
  # The last row tile may reach past the last pair.
  pairs = jnp.pad(jnp.stack(fields, axis=-1), ((0, ROWS // 8), (0, 0)))
  return pairs.reshape(-1)


def sum_extra(sums, extra, *, num_kv_blocks, interpret):
  """Adds the extra sums of hot KV blocks to the blocks' own sums, in order.

  A CTA owns 32 keys of one KV block (16 of wide heads), and each of its
  warpgroups one kind of sum (dK or dV; `index_kl` has dindex_k only).

  Args:
    sums: Ref, float32 [kinds, slots, keys of a KV block, D].
    extra: `KVBlockPlan.extra`.
    num_kv_blocks: KV blocks of all groups of the launch.
    interpret: run on the CPU.
  """
  kinds, _, kv_block, d = sums.shape
  # Of a CTA. A thread holds the total and four sums of these keys.
  tile_keys = 16 if d > mosaic.WIDE else 32
  tiles = kv_block // tile_keys
  layout = plgpu.Layout.WG_STRIDED((tile_keys, d), vec_size=4)

  def body(*, extra_gmem, sums_gmem):
    cta, wg = lax.axis_index("cta"), lax.axis_index("wg")
    block, tile = cta // tiles, lax.rem(cta, tiles)
    first, count = extra_gmem[block, 0], extra_gmem[block, 1]
    at = pl.ds(tile * tile_keys, tile_keys)

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
      fours = count // 4  # four sums are read at once to hide latency
      total = lax.fori_loop(
        0, fours, lambda i, x: add(i, x, each=4), read(block)
      )
      total = lax.fori_loop(
        fours * 4, count, lambda i, x: add(i, x, each=1), total
      )
      sums_gmem[wg, block, at] = total

  mosaic.launch(
    body,
    dict(extra_gmem=extra, sums_gmem=sums),
    name="sparse_sum_extra",
    num_ctas=num_kv_blocks * tiles,
    num_warpgroups=kinds,
    interpret=interpret,
    scratch={},
  )


def _sum_pairs(dq, partials, counts, *, params):
  """Sums the dQ partials of each pack's pairs, in order.

  A warpgroup computes one pack at a time, and reads four partials at once to
  hide latency. Slots after a pack's last pair are not read: neighbours that
  choose alike leave a third of them empty. The queries of a pack are summed
  apart from each other, because each has a place of its own in dq.

  Args:
    dq: Ref, [batch rows, queries, KV heads, heads, D], in the working dtype.
    partials: Ref of `_kv_blocks`.
    counts: int32 [packs]: the pairs of each pack, which hold its first slots.
    params: static parameters.
  """
  num_packs, _, _, d = partials.shape
  _, num_queries, kv_heads, heads, _ = dq.shape
  queries = params.packing.queries
  chunk = num_queries // queries  # packs of a group
  warpgroups = 4
  workers = 4 * params.config.num_ctas * warpgroups  # four CTAs fit on an SM
  vector = max(1, min(8, heads * d // 128))
  layout = plgpu.Layout.WG_STRIDED((heads, d), vec_size=vector)

  def body(*, counts_gmem, part_gmem, dq_gmem):
    worker = lax.axis_index("cta") * warpgroups + lax.axis_index("wg")

    def pack(i, carry):
      index = worker + i * workers
      count = counts_gmem[index]

      def add(j, totals, each):
        parts = [
          [
            plgpu.load(
              part_gmem.at[index, j * each + a, pl.ds(q * heads, heads)],
              layout=layout,
              optimized=False,
            )
            for q in range(queries)
          ]
          for a in range(each)
        ]
        for of_queries in parts:
          totals = tuple(
            total + x.astype(jnp.float32)
            for total, x in zip(totals, of_queries, strict=True)
          )
        return totals

      fours = count // 4
      zero = plgpu.layout_cast(jnp.full((heads, d), 0.0, jnp.float32), layout)
      totals = (zero,) * queries
      totals = lax.fori_loop(0, fours, lambda j, x: add(j, x, 4), totals)
      totals = lax.fori_loop(
        4 * fours, count, lambda j, x: add(j, x, 1), totals
      )
      group, first = index // chunk, lax.rem(index, chunk) * queries
      batch_row, kv_head = group // kv_heads, lax.rem(group, kv_heads)
      for q, total in enumerate(totals):
        dq_gmem[batch_row, first + q, kv_head] = total.astype(params.dtype)
      return carry

    lax.fori_loop(0, (num_packs - worker + workers - 1) // workers, pack, None)

  mosaic.launch(
    body,
    dict(counts_gmem=counts, part_gmem=partials, dq_gmem=dq),
    name="sparse_sum_pairs",
    num_ctas=workers // warpgroups,
    num_warpgroups=warpgroups,
    interpret=params.interpret,
    scratch={},
  )


def _smaller_blocks(block_indices, num_blocks: int):
  """The halves of chosen blocks, as ids of blocks of half the size."""
  known = (block_indices >= 0) & (block_indices < num_blocks)
  ids = 2 * jnp.where(known, block_indices, 0)
  ids = jnp.where(known[..., None], jnp.stack([ids, ids + 1], axis=-1), -1)
  return ids.reshape(*block_indices.shape[:-1], -1)


def backward(
  q, k, v, dout, lse, delta, block_indices, kv_lengths, packed=None, *, packing,
  block_size, scale, config, interpret,
):  # fmt: skip
  """dq, dk and dv of padded operands.

  Args:
    q, dout: [B, U, K * rows, D], queries in packs (`mosaic.Packing`); finite if
      a pack has several queries.
    k, v: [B, K, S', D], finite, S' a multiple of `kv_block_plan.KV_BLOCK`.
    lse: natural, float32 [B, U, K * rows], +inf for padding.
    delta: float32 [B, U, K * rows]: out.dout - dlse, 0 for padding.
    block_indices: [B, K, T, P].
    kv_lengths: [B], at most S.
    packed: `packed_rows.PackedRows`, which then say where the queries are, and
      ids are of blocks that the queries see; None for plain rows.
    packing: of the queries.
    block_size: tokens of a block.
    scale: of the scores.
    config: tile sizes.
    interpret: run on the CPU.

  Returns:
    dq as [B, T, K, heads of a group after padding, D], dk and dv like k and v.
  """
  b, num_packs, _, d = q.shape
  num_kv_heads, s_len = k.shape[1:3]
  rows, pack = packing.rows, packing.queries
  kv_block = kv_block_keys(d)
  if kv_block < block_size:
    block_indices = _smaller_blocks(block_indices, s_len // block_size)
    block_size = kv_block
  t, top_k = block_indices.shape[2:]
  slots = pack * top_k
  num_kv_blocks = s_len // kv_block

  max_pairs = MAX_WORKSPACE // (rows * d)
  split = kv_block_plan.split_launches(
    b,
    num_packs,
    num_kv_heads,
    num_kv_blocks,
    slots,
    max_pairs=min(config.pairs or max_pairs, max_pairs),
    chunk=-(-config.chunk // pack),
  )
  groups, chunk = split.groups, split.chunk
  num_pairs = groups * chunk * slots
  task = kv_block_plan.task_size(num_pairs, config.task)
  params = KernelParams(
    packing=packing,
    head_dim=d,
    block_size=block_size,
    num_kv_heads=num_kv_heads,
    num_groups=groups,
    num_kv_blocks=num_kv_blocks,
    chunk=chunk,
    adds=split.num_chunks > 1,
    dtype=jnp.dtype(q.dtype),
    scale=scale,
    config=config,
    interpret=interpret,
  )
  padded_packs = split.num_chunks * chunk
  block_indices = jnp.pad(
    block_indices,
    ((0, 0), (0, 0), (0, padded_packs * pack - t), (0, 0)),
    constant_values=-1,
  ).reshape(b, num_kv_heads, padded_packs, slots)

  def by_group(x):
    x = x.reshape(b, num_packs, num_kv_heads, rows).swapaxes(1, 2)
    pad = ((0, 0), (0, 0), (0, padded_packs - num_packs), (0, 0))
    return jnp.pad(x, pad)

  lse, delta = by_group(lse * mosaic.LOG2E), by_group(delta)
  starts = jnp.repeat(kv_lengths - t, num_kv_heads)
  keys = None
  if packed is not None:
    keys = packed.keys_of_halves(s_len // kv_block_plan.KV_BLOCK)
  num_slots = groups * num_kv_blocks
  max_tasks = kv_block_plan.max_tasks(num_slots, num_pairs, task)

  def launch(index, carry):
    dq, dk, dv = carry
    first = index * groups
    shape = (2, max_tasks, kv_block, d)
    sums = kv_block_plan.new_sums(shape, num_slots, params.adds)
    partials = lax.empty((groups * chunk, slots, rows, d), q.dtype)

    def step(i, carry):
      dq, sums, has_sum, partials = carry
      first_pack = i * chunk

      def cut(x):
        return split.cut(x, first, first_pack)

      first_positions = lax.dynamic_slice_in_dim(starts, first, groups)
      first_positions += first_pack * pack
      places = None
      if packed is not None:
        places = kv_block_plan.query_places(
          packed,
          (first + jnp.arange(groups, dtype=jnp.int32)) // num_kv_heads,
          first_pack * pack,
          chunk * pack,
          num_kv_blocks,
          kv_block,
        )
      plan = kv_block_plan.plan_kv_blocks(
        cut(block_indices),
        first_positions,
        block_size=block_size,
        num_blocks=-(-s_len // block_size),
        task=task,
        pack=pack,
        places=places,
        block_keys=kv_block,
      )

      def by_pair(x, other):
        """Row values in the order of the pairs.

        A query of a pack that did not choose the pair's block gets `other`. So
        it needs no mask in the kernel.
        """
        x = x.reshape(-1, rows)[plan.order // slots]
        if pack > 1:
          assert plan.chosen is not None
          query = jnp.arange(rows)[None] // packing.heads
          chose = kv_block_plan.chose_any(plan.chosen[:, None], query)
          x = jnp.where(chose, x, other)
        x = jnp.pad(x.reshape(-1), (0, ROWS))
        return lax.bitcast_convert_type(x, jnp.int32)

      chunk_desc = jnp.stack([first, first_pack, plan.num_tasks[0]])
      sums_ref, partials_ref = jax.new_ref(sums), jax.new_ref(partials)
      _kv_blocks(
        partials_ref, sums_ref, chunk_desc.astype(jnp.int32), first_positions,
        plan, _describe(plan, slots), q, dout, k, v, by_pair(cut(lse), jnp.inf),
        by_pair(cut(delta), 0), keys, params=params,
      )  # fmt: skip
      sum_extra(
        sums_ref, plan.extra, num_kv_blocks=num_slots, interpret=interpret
      )
      if plan.chosen is None:
        # Slots that hold no pair were not written, and may stand anywhere.
        partials = jax.freeze(partials_ref)
        one = partials.reshape(groups, chunk, slots, rows, d)
        one = split.token_major(one).astype(jnp.float32)
        is_pair = split.token_major(plan.is_pair)[..., None, None]
        one = jnp.sum(jnp.where(is_pair, one, 0), axis=3).astype(q.dtype)
      else:
        one = jax.new_ref(
          lax.empty(
            (
              split.batch_rows, chunk * pack, split.kv_heads, packing.heads, d,
            ),
            q.dtype,
          )
        )  # fmt: skip
        counts = jnp.sum(plan.is_pair, axis=-1, dtype=jnp.int32).reshape(-1)
        _sum_pairs(one, partials_ref, counts, params=params)
        partials = jax.freeze(partials_ref)
        one = mosaic.result(one)
      batch_row, kv_head = first // num_kv_heads, first % num_kv_heads
      at = (batch_row, first_pack * pack, kv_head, 0, 0)
      dq = lax.dynamic_update_slice(dq, one, at)
      return dq, jax.freeze(sums_ref), has_sum | plan.has_pairs, partials

    has_sum = jnp.zeros((num_slots,), bool)
    dq, sums, has_sum, _ = lax.fori_loop(
      0, split.num_chunks, step, (dq, sums, has_sum, partials)
    )
    sums = kv_block_plan.own_sums(sums, has_sum).astype(q.dtype)
    sums = sums.reshape(2, groups, s_len, d)
    dk = lax.dynamic_update_slice(dk, sums[0], (first, 0, 0))
    dv = lax.dynamic_update_slice(dv, sums[1], (first, 0, 0))
    return dq, dk, dv

  all_groups = b * num_kv_heads
  dk, dv = (lax.empty((all_groups, s_len, d), q.dtype) for _ in range(2))
  dq = lax.empty(
    (b, padded_packs * pack, num_kv_heads, packing.heads, d), q.dtype
  )
  dq, dk, dv = lax.fori_loop(0, all_groups // groups, launch, (dq, dk, dv))
  return (
    dq[:, :t],
    dk.reshape(k.shape),
    dv.reshape(v.shape),
  )
