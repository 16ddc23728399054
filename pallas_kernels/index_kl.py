"""KL loss of the Index Branch on Hopper, with its gradients.

This is the sparse phase; `dense_index_kl` has the loss over all visible tokens,
and `index_kl_loss` calls it when no blocks are given.

Over the visible tokens J of a query's chosen blocks, with the teacher p_j =
mean over the heads of the group of exp(scale q.k_j - lse) and the student r_j =
exp(index_scale index_q.index_k_j - index_lse) (KL loss; arXiv 2606.13392):

  value = sum_j p_j (log p_j - log r_j)     g_j = r_j - p_j
  dindex_q = index_scale sum_j g_j index_k_j
  dindex_k_j = index_scale sum over queries and groups of g_j index_q

all divided by the number of queries that count, times the number of groups. If
queries have weights, value and g are multiplied by them, and the divisor is the
sum of the weights, times the number of groups.
Both log sum exps are needed before p, r and g; with them, one pass gives the
value and the gradients, so the gradients are computed with the loss.

Two kernels. A CTA owns a task of `kv_block_plan`: one KV block of 128 keys and
queries that chose it. The (query, KV block) pairs of a task are processed in
*pair tiles* of 64 pairs; a pair tile has several *row tiles* of 128 rows of q
(queries x the heads of their group).

* **index_lse**: one warpgroup computes the index scores of 64 pairs with the
  block and a log sum exp for each. XLA merges those of a query's choices.
* **kv_blocks**: two compute warpgroups own 64 keys each. A third one gathers q
  (`row_tile` in `_copy`), each of its warps some of the queries: one TMA copy a
  query, or with fewer than 8 heads one for each 64 columns of it
  (`mosaic.copy_rows`). For each row tile the compute warpgroups get p as keys x
  rows. The heads of a query lie in neighbouring columns, that is in the
  registers of four lanes (two lanes if there are four heads, one if there are
  two). Their mean is therefore a sum in float32 and an exchange that leaves
  each of the four lanes with the mean of one query of four. The pairs are
  gathered in the order that makes this the register layout of a product with 64
  pairs. Then come the index scores of the 64 pairs, r, g and the value. g times
  index_q adds to dindex_k in registers. g of both halves of the keys times
  index_k is a partial dindex_q, in the working dtype; XLA sums a query's
  partials. The sums of dindex_k work as those of dK in `sparse_attention_bwd`,
  for each group on its own. The two compute warpgroups alternate at the tensor
  cores. All sums have a fixed order.

A launch takes whole batch rows, as many as divide the batch and as
`Config.pairs` allows. If one batch row exceeds the limit, a launch takes some
of its KV heads, or one KV head in chunks of queries.

Bound, for a pair with 16 heads at D = I = 128, in cycles of an H100's SM: 350
to read 4 KB of q at the rate of the memory; 150 for 0.62
MFLOP (0.52 of scores, 0.1 of other products); 128 for 2,048 exponentials.
benchmarks/results/LOG.md says what is reached.

SMEM: q 32 KB a stage, K and index_k 32 KB each, index_q 32 KB, g 16 KB, log sum
exps 8 KB. At D 256, where K takes 64 KB, the ring of q holds two stages of half
the columns of a row tile: q is gathered in two *parts*, whose products are
added up in the same accumulator.

Barriers of index_lse, whose only warpgroup copies and computes:

  iq_ring     ready at the copy of the index queries of a pair tile
              free when the warpgroup has multiplied them
  ik_ring     ready at the copy of the index keys of a task
              free when the warpgroup is through with the task

Barriers of kv_blocks, between compute warpgroups 0 and 1 and the copy
warpgroup (arrivals in brackets):

  name        who arrives                            who waits
  q_ring      ready: the copies of each query (8 or  0 and 1
              16; with 4 or 2 heads 32 or 64 times
              the columns / 64)
              free: 0 and 1, after the scores, or    copy
              the part's product (2)
  lse_ring    ready: the copy of a pair tile's lse   0 and 1
              free: 0 and 1 (2)                      copy
  kv_ring     ready: both halves of K, index_k (4)   0 and 1
              free: 0 and 1, after the task (2)      copy
  iq_ring     ready: index_q, its lse, limits, and   0 and 1
              weights if there are any (3 or 4)
              free: 0 and 1 (2): when dindex_q,      copy
              which is written over index_q, is
              stored; without gradients after r
  g_ready     0 and 1: g is in SMEM (2)              0 and 1
  g_read      0 and 1: all products of g are         0 and 1
              done, index_q is not needed (2)
  diq_ready   0 and 1: dindex_q is in SMEM (2)       0, which stores it
  tensor_turn the other compute warpgroup: the       0 and 1, each its own
              tensor cores are free for this one

NaN: one in a query reaches its own row and the keys that it sees. Keys that are
not finite are zeroed, and a query that sees one is made NaN through index_lse.

Heads of other sizes than 64, 128 and 256, and index heads of others than 64 and
128, are padded with zeros to the next of these. The heads of a group are padded
to 2, 4, 8 or 16; padding heads have an lse of +inf, so that their p is 0, and
the mean divides by the number of real heads. The 128 rows of a row tile are
then those of 64, 32, 16 or 8 queries.

Not supported: what `mosaic.check_supported` refuses, and over all tokens what
`mosaic.check_dense_supported` does; gradients of gradients.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
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
  packed_rows,
  partition,
  sparse_attention,
)
from pallas_kernels.sparse_attention_bwd import KEYS, sum_extra

ACC = plgpu.WGMMAAccumulatorRef
ROWS = 128  # rows of q in a row tile
PAIRS = 64  # pairs in a pair tile


@dataclasses.dataclass(frozen=True)
class Config:
  """Tile and pipeline sizes; the result changes by rounding only.

  Attributes:
    stages: row tiles of gathered queries in flight.
    task: upper bound on the pairs of a task; 0 derives it from their number.
    chunk: upper bound on the queries of a chunk; 0 derives it from `pairs`.
    pairs: upper bound on the pairs of a launch, which takes at least one
      query's.
    num_ctas: CTAs of the persistent grid of kv_blocks; index_lse has three
      times as many.
  """

  stages: int = 3
  task: int = 0
  chunk: int = 0
  pairs: int = 1 << 21
  num_ctas: int = mosaic.NUM_SMS


@dataclasses.dataclass(frozen=True)
class KernelParams:
  """Static parameters of one call, after padding."""

  q_rows: int  # rows of a query in a row tile: its group's heads, padded
  head_dim: int
  index_dim: int
  num_kv_heads: int
  num_groups: int  # groups (KV heads of batch rows) of a launch
  num_kv_blocks: int  # KV blocks of a group
  adds: bool  # to the sums of the chunks before
  dtype: jnp.dtype
  scale: float
  index_scale: float
  with_gradients: bool
  config: Config
  interpret: bool

  @property
  def queries(self) -> int:
    """Queries in a row tile."""
    return ROWS // self.q_rows

  @property
  def q_columns(self) -> int:
    """Columns of a row tile's queries that are gathered at once."""
    return min(self.head_dim, mosaic.WIDE)

  @property
  def q_parts(self) -> int:
    """Parts of so many columns of a row tile."""
    return self.head_dim // self.q_columns

  @property
  def stages(self) -> int:
    """Parts of row tiles in flight, of which two fit SMEM if heads are wide."""
    return (
      min(self.config.stages, 2) if self.q_parts > 1 else self.config.stages
    )

  def locate(self, kv_block, first_group):
    """Batch row, KV head and block in the group of a launch's KV block."""
    group = first_group + kv_block // self.num_kv_blocks
    return (
      group // self.num_kv_heads,
      lax.rem(group, self.num_kv_heads),
      lax.rem(kv_block, self.num_kv_blocks),
    )


def _limits(reach, chosen, keys=None):
  """How many keys a pair sees in each half of its KV block, of 0 to KEYS.

  Args:
    reach: keys of the block that lie up to the query; also below 0 and above
      KV_BLOCK.
    chosen: which halves of the block the query chose, as in `KVBlockPlan`; None
      if both.
    keys: keys of each half of the pair's block, [.., 2]; KEYS if None.

  Returns:
    both numbers in one (`kv_block_plan.pack_counts`).
  """
  limits = []
  for half in range(2):
    most = KEYS if keys is None else keys[..., half]
    seen = jnp.clip(reach - half * KEYS, 0, most)
    if chosen is not None:
      seen = jnp.where(kv_block_plan.chose_half(chosen, 0, half), seen, 0)
    limits.append(seen)
  return kv_block_plan.pack_counts(limits)


def _index_lse(out, chunk_desc, plan, firsts, limits, iq, ik, *, params):
  """log2 sum exp2 of each pair's index scores with its KV block.

  Args:
    out: Ref, float32: a value for each pair, in the order of the pair tiles.
    chunk_desc: chunk descriptor, int32 [3]: first group (batch row * K + KV
      head), first query, number of tasks.
    plan: `kv_block_plan.KVBlockPlan`.
    firsts: each task's first pair tile.
    limits: for each pair, how many keys of its block it sees (`_limits`).
    iq: index queries, gathered in the order of the pair tiles.
    ik: index keys.
    params: static parameters.
  """
  s = params
  num_ctas = 3 * s.config.num_ctas  # three CTAs fit on an SM
  row_layout = plgpu.Layout.WGMMA.reduce(1)

  def body(
    *, chunk_gmem, tasks_gmem, longest_first_gmem, first_gmem, limit_gmem,
    iq_gmem, ik_gmem, out_gmem, iq_smem, ik_smem, iq_ring, ik_ring,
  ):  # fmt: skip
    cta = lax.axis_index("cta")
    my_tasks = kv_block_plan.num_tasks_of_cta(cta, chunk_gmem[2], num_ctas)

    def task(i, step):
      index = longest_first_gmem[kv_block_plan.nth_task(cta, i, num_ctas)]
      kv_block, _, count = (tasks_gmem[index, j] for j in range(3))
      batch_row, _, block = s.locate(kv_block, chunk_gmem[0])
      first = first_gmem[index]
      num_pair_tiles = (count + PAIRS - 1) // PAIRS

      def pairs_of(j):
        return pl.ds(pl.multiple_of((first + j) * PAIRS, PAIRS), PAIRS)

      def copy(j):
        slot = iq_ring.wait_free(step + j)
        plgpu.copy_gmem_to_smem(
          iq_gmem.at[pairs_of(j)], iq_smem.at[slot], iq_ring.ready_at(slot)
        )

      slot = ik_ring.wait_free(i)
      tokens = pl.ds(block * kv_block_plan.KV_BLOCK, kv_block_plan.KV_BLOCK)
      plgpu.copy_gmem_to_smem(
        ik_gmem.at[batch_row, tokens], ik_smem, ik_ring.ready_at(slot)
      )
      pl.when(num_pair_tiles > 0)(lambda: copy(0))
      ik_ring.wait_ready(slot)

      def pair_tile(j, carry):
        pl.when(j + 1 < num_pair_tiles)(lambda: copy(j + 1))
        slot = iq_ring.slot(step + j)
        limit = plgpu.load(
          limit_gmem.at[pairs_of(j)], layout=row_layout, optimized=False
        )
        iq_ring.wait_ready(slot)

        def product(acc):
          plgpu.wgmma(acc, iq_smem.at[slot], ik_smem.transpose((1, 0)))
          return acc[...]

        scores = pl.run_scoped(
          product, ACC((PAIRS, kv_block_plan.KV_BLOCK), jnp.float32)
        )
        iq_ring.release(slot)
        scores = scores * (s.index_scale * mosaic.LOG2E)
        key = plgpu.broadcasted_iota(
          jnp.int32, scores.shape, 1, layout=plgpu.Layout.WGMMA
        )

        def along(x):
          return lax.broadcast_in_dim(x, key.shape, [0])

        first, second = (
          along(kv_block_plan.count_of(limit, half)) for half in range(2)
        )
        visible = key < jnp.where(key < KEYS, first, second + KEYS)
        scores = jnp.where(visible, scores, mosaic.FLOOR)
        m = scores.max(axis=1)
        total = jnp.exp2(scores - lax.broadcast_in_dim(m, scores.shape, [0]))
        total = jnp.where(visible, total, 0.0).sum(axis=1)
        out_gmem[pairs_of(j)] = m + jnp.log2(total)
        return carry

      lax.fori_loop(0, num_pair_tiles, pair_tile, None)
      ik_ring.release(slot)
      return step + num_pair_tiles

    step = lax.fori_loop(0, my_tasks, task, jnp.int32(0))
    mosaic.drain_rings(step, iq_ring)
    mosaic.drain_rings(my_tasks, ik_ring)

  def operand(*leading):
    return plgpu.SMEM(
      (*leading, s.index_dim), s.dtype, transforms=mosaic.OPERAND
    )

  mosaic.launch(
    body,
    dict(
      chunk_gmem=chunk_desc,
      tasks_gmem=plan.tasks,
      longest_first_gmem=plan.longest_first,
      first_gmem=firsts,
      limit_gmem=limits,
      iq_gmem=iq,
      ik_gmem=ik,
      out_gmem=out,
    ),
    name="kl_index_lse",
    num_ctas=num_ctas,
    num_warpgroups=1,
    interpret=s.interpret,
    scratch=dict(
      iq_smem=operand(2, PAIRS),
      ik_smem=operand(kv_block_plan.KV_BLOCK),
      iq_ring=mosaic.ring(2),
      ik_ring=mosaic.ring(),
    ),
  )


def _gather_order(x, q_rows):
  """Reorders the pairs of each pair tile to the order that row tiles gather.

  Of every four pairs that are gathered, each of the four lanes that share an
  accumulator row gets the mean of one, and column 8 j + 2 l + {0, 1} of an
  accumulator lies in lane l. So the pair gathered as n = 8 j + 4 i + l belongs
  to column 8 j + 2 l + i. With 4 rows a query, where lanes 0 and 1 hold the
  columns of one query and lanes 2 and 3 those of the next, the four lanes get
  the pairs in the order 0, 2, 1, 3.

  Args:
    x: a value of each pair slot, a whole number of pair tiles.
    q_rows: rows of a query.
  """
  if q_rows == 4:
    return x.reshape(-1, 2, 2, 2).swapaxes(1, 3).reshape(x.shape)
  return x.reshape(-1, 4, 2).swapaxes(1, 2).reshape(x.shape)


def _sum_heads(p, sums, tile, *, q_rows, interpret):
  """Puts a row tile's sums over heads into the columns of its pairs.

  Args:
    p: float32 [KEYS, ROWS], `q_rows` heads of each query.
    sums: float32 [KEYS, PAIRS], in which the row tile's columns are replaced.
    tile: index of the row tile in its pair tile.
    q_rows: rows of a query.
    interpret: run on the CPU.
  """
  queries = ROWS // q_rows
  if interpret:
    x = p.reshape(KEYS, queries, q_rows).sum(-1)
    if q_rows == 4:
      x = x.reshape(KEYS, -1, 2, 2, 2).swapaxes(2, 4)
    else:
      x = x.reshape(KEYS, -1, 2, 4).swapaxes(2, 3)
    x = x.reshape(KEYS, queries)
    column = lax.broadcasted_iota(jnp.int32, sums.shape, 1)
    x = jnp.tile(x, (1, PAIRS // queries))
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
      """Half of the lanes keeps each value and adds the other half's part."""
      keep = arith.select(is_second, second, first)
      give = arith.select(is_second, first, second)
      return arith.addf(keep, mgpu_utils.shfl_bfly(give, distance))

    def element(x, i):
      at = ir.DenseI64ArrayAttr.get([i])
      return vector.extract(x, dynamic_position=[], static_position=at)

    # A register holds two columns of one row, which is among the first or the
    # second 8 of 16 rows. Four lanes hold the 8 columns of a part: of one query
    # or a half of it, or of two or four queries.
    parts = p.registers.reshape(ROWS // 8, 2)
    per_total = max(q_rows // 8, 1)
    lanes = min(q_rows, 8) // 2  # that share a query
    new = {}
    for half in range(2):
      totals = []
      for a in range(ROWS // 8 // per_total):
        x = parts[a * per_total, half]
        for i in range(1, per_total):
          x = arith.addf(x, parts[a * per_total + i, half])
        totals.append(arith.addf(element(x, 0), element(x, 1)))
      for j in range(queries // 8):
        columns = []
        for i in range(2):
          x = totals[lanes * (2 * j + i) : lanes * (2 * j + i + 1)]
          if lanes == 4:
            x = [exchange(high, x[b], x[b + 2], 2) for b in range(2)]
          columns.append(exchange(low, x[0], x[1], 1) if lanes > 1 else x[0])
        new[j, half] = vector.from_elements(pair, columns)
    registers_shape = sums.registers.shape
    old = sums.registers.reshape(PAIRS // 8, 2)
    out = old.copy()
    each = queries // 8
    for j in range(PAIRS // 8):
      here = arith.cmpi(
        arith.CmpIPredicate.eq, tile.registers.item(), constant(j // each)
      )
      for half in range(2):
        out[j, half] = arith.select(here, new[j % each, half], old[j, half])
    return mgpu.FragmentedArray(
      _registers=out.reshape(registers_shape),
      _layout=sums.layout,
      _is_signed=None,
    )

  return run(p, sums, tile)


def _kv_blocks(
  values, partials, sums, chunk_desc, plan, firsts, queries, limits, index_lse,
  weights, iq, lse, q, k, ik, *, params,
):  # fmt: skip
  """Computes values, dindex_q partials and sums of dindex_k of a chunk.

  Args:
    values: Ref, float32 [num_ctas, 2, KEYS]: parts of the sum of the values.
    partials: Ref, [pair tiles * PAIRS, I]: dindex_q partials.
    sums: Ref, float32 [1, slots, KV_BLOCK, I]: sums of dindex_k.
    chunk_desc, plan, firsts, limits, iq, ik, params: as for `_index_lse`.
    queries: each pair's query in the chunk, in the order that row tiles gather.
    index_lse: base-2 log sum exp of each pair's query over all its choices.
    weights: float32, of each pair's query; None if all are 1.
    lse: float32 [row tiles, ROWS]: base-2 log sum exp of the gathered rows,
      plus the log of the number of heads.
    q, k: operands, padded, k head-major.
  """
  s, config = params, params.config
  q_rows, d, i_dim = s.q_rows, s.head_dim, s.index_dim
  row_tiles = PAIRS // s.queries
  column_layout = plgpu.Layout.WGMMA.reduce(0)

  def body(
    *, chunk_gmem, tasks_gmem, longest_first_gmem, first_gmem, query_gmem,
    limit_gmem, ilse_gmem, iq_gmem, lse_gmem, q_gmem, k_gmem, ik_gmem,
    value_gmem, part_gmem, sums_gmem, q_smem, lse_smem, k_smem, ik_smem,
    iq_smem, ilse_smem, limit_smem, g_smem, q_ring, lse_ring, kv_ring, iq_ring,
    g_ready, g_read, diq_ready, tensor_turn, weight_gmem=None, weight_smem=None,
  ):  # fmt: skip
    q_smem, q_to = mosaic.whole_and_tiles(q_smem)
    cta, wg = lax.axis_index("cta"), lax.axis_index("wg")
    my_tasks = kv_block_plan.num_tasks_of_cta(
      cta, chunk_gmem[2], config.num_ctas
    )

    def read_task(i):
      """KV block, number of pairs, slot of the sum, first pair tile."""
      index = longest_first_gmem[
        kv_block_plan.nth_task(cta, i, config.num_ctas)
      ]
      kv_block, count, sum_slot = (tasks_gmem[index, j] for j in (0, 2, 4))
      return kv_block, count, sum_slot, first_gmem[index]

    @pl.when(wg < 2)
    def _compute():
      plgpu.set_max_registers(232, action="increase")
      zero = plgpu.layout_cast(
        jnp.full((KEYS, PAIRS), 0.0, jnp.float32), plgpu.Layout.WGMMA
      )
      key = plgpu.broadcasted_iota(
        jnp.int32, (KEYS, PAIRS), 0, layout=plgpu.Layout.WGMMA
      )

      def along(x, size=PAIRS):
        return lax.broadcast_in_dim(x, (KEYS, size), [1])

      def task(i, carry):
        row_step, pair_step, value = carry
        _, count, sum_slot, first = read_task(i)
        num_pair_tiles = (count + PAIRS - 1) // PAIRS
        kv_ring.wait_ready(0)

        def pair_tile(j, carry):
          row_step, pair_step, value, dik = carry
          num_pairs = jnp.minimum(count - j * PAIRS, PAIRS)
          num_row_tiles = (num_pairs + s.queries - 1) // s.queries
          stage = iq_ring.slot(pair_step)
          lse_ring.wait_ready(stage)

          def row_tile(t, mean):
            if s.q_parts == 1:
              q_stages = [q_ring.slot(row_step + t)]
            else:
              q_stages = [
                q_ring.slot(row_step + t * s.q_parts + i)
                for i in range(s.q_parts)
              ]
            for q_stage in q_stages:
              q_ring.wait_ready(q_stage)

            def product(acc):
              for i, q_stage in enumerate(q_stages):
                keys = k_smem.at[wg]
                if s.q_parts > 1:
                  at = pl.ds(i * s.q_columns, s.q_columns)
                  keys = k_smem.at[wg, :, at]
                plgpu.wgmma(acc, keys, q_smem.at[q_stage].transpose((1, 0)))
              for i, q_stage in enumerate(q_stages[:-1]):
                # The first part may be filled again while the next one is
                # multiplied.
                plgpu.wgmma_wait(s.q_parts - 1 - i)
                q_ring.release(q_stage)
              return acc[...]

            # The warpgroups alternate: one multiplies while the other takes
            # exponentials. Without this, both get a row tile at the same moment
            # and then compete for the same unit.
            plgpu.barrier_wait(tensor_turn.at[wg])
            scores = pl.run_scoped(product, ACC((KEYS, ROWS), jnp.float32))
            plgpu.barrier_arrive(tensor_turn.at[1 - wg])
            q_ring.release(q_stages[-1])
            lse_rows = plgpu.load(lse_smem.at[stage, t], layout=column_layout)
            p = jnp.exp2(
              scores * (s.scale * mosaic.LOG2E) - along(lse_rows, ROWS)
            )
            return _sum_heads(p, mean, t, q_rows=q_rows, interpret=s.interpret)

          mean = lax.fori_loop(0, num_row_tiles, row_tile, zero)
          lse_ring.release(stage)
          iq_ring.wait_ready(stage)

          def index_product(acc):
            plgpu.wgmma(
              acc, ik_smem.at[wg], iq_smem.at[stage].transpose((1, 0))
            )
            return acc[...]

          scores = pl.run_scoped(index_product, ACC((KEYS, PAIRS), jnp.float32))
          limit = plgpu.load(limit_smem.at[stage], layout=column_layout)
          ilse = plgpu.load(ilse_smem.at[stage], layout=column_layout)
          visible = key < along(kv_block_plan.count_of(limit, wg))
          log_r = scores * (s.index_scale * mosaic.LOG2E) - along(ilse)
          mean = jnp.where(visible, mean, 0.0)
          r = jnp.where(visible, jnp.exp2(log_r), 0.0)
          # 0 log 0 = 0; a NaN of r stays.
          log_p = jnp.log2(jnp.where(mean > 0.0, mean, 1.0))
          term = jnp.where(visible, mean * (log_p - log_r), 0.0)
          g = r - mean
          if weight_smem is not None:
            weight = along(
              plgpu.load(weight_smem.at[stage], layout=column_layout)
            )
            term, g = term * weight, g * weight
          value += term.sum(axis=1)
          if s.with_gradients:
            g = g.astype(s.dtype)
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

            diq = pl.run_scoped(diq_product, ACC((PAIRS, 64), jnp.float32))
            # The stage of the last partial is free again. Only the warpgroup
            # that issued the copy can wait for it.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            @pl.when(pair_step > 0)
            def _():
              iq_ring.release(1 - stage)

            plgpu.barrier_arrive(g_read)
            plgpu.barrier_wait(g_read)

            # Both warpgroups have finished with g and index_q of this tile.
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
              first_pair = pl.multiple_of((first + j) * PAIRS, PAIRS)
              plgpu.copy_smem_to_gmem(
                iq_smem.at[stage], part_gmem.at[pl.ds(first_pair, PAIRS)]
              )
          else:
            iq_ring.release(stage)
          row_step += (
            num_row_tiles if s.q_parts == 1 else (num_row_tiles * s.q_parts)
          )
          return row_step, pair_step + 1, value, dik

        dik = plgpu.layout_cast(
          jnp.full((KEYS, i_dim), 0.0, jnp.float32), plgpu.Layout.WGMMA
        )
        row_step, pair_step, value, dik = lax.fori_loop(
          0, num_pair_tiles, pair_tile, (row_step, pair_step, value, dik)
        )
        kv_ring.release(0)
        if s.with_gradients:
          at = sums_gmem.at[0, sum_slot, pl.ds(wg * KEYS, KEYS)]

          def add_so_far(x):
            so_far = plgpu.load(at, layout=plgpu.Layout.WGMMA, optimized=False)
            return so_far + x

          if s.adds:
            is_first = sum_slot < s.num_groups * s.num_kv_blocks
            dik = lax.cond(is_first, add_so_far, lambda x: x, dik)
          at[...] = dik
        return row_step, pair_step, value

      pl.when(wg == 1)(lambda: plgpu.barrier_arrive(tensor_turn.at[0]))
      nothing = plgpu.layout_cast(
        jnp.full((KEYS,), 0.0, jnp.float32), plgpu.Layout.WGMMA.reduce(1)
      )
      start = (jnp.int32(0), jnp.int32(0), nothing)
      _, pair_step, value = lax.fori_loop(0, my_tasks, task, start)
      pl.when(wg == 0)(lambda: plgpu.barrier_wait(tensor_turn.at[0]))
      value_gmem[cta, wg] = value
      if s.with_gradients:
        plgpu.wait_smem_to_gmem(0)

        @pl.when(pair_step > 0)
        def _():
          iq_ring.release(iq_ring.slot(pair_step + 1))

    @pl.when(wg == 2)
    def _copy():
      plgpu.set_max_registers(40, action="decrease")

      def task(i, steps):
        kv_block, count, _, first = read_task(i)
        # These are read again for each task to save registers.
        batch_row, kv_head, block = s.locate(kv_block, chunk_gmem[0])
        origin = chunk_gmem[1]
        num_row_tiles = (count + s.queries - 1) // s.queries

        def copy_keys():
          ready = kv_ring.ready_at(kv_ring.wait_free(i))
          for h in range(2):
            tokens = pl.ds(block * kv_block_plan.KV_BLOCK + h * KEYS, KEYS)
            plgpu.copy_gmem_to_smem(
              k_gmem.at[batch_row, kv_head, tokens], k_smem.at[h], ready
            )
            plgpu.copy_gmem_to_smem(
              ik_gmem.at[batch_row, tokens], ik_smem.at[h], ready
            )

        def copy_lse(j, pair_step):
          stage = lse_ring.wait_free(pair_step)
          plgpu.copy_gmem_to_smem(
            lse_gmem.at[pl.ds((first + j) * row_tiles, row_tiles)],
            lse_smem.at[stage],
            lse_ring.ready_at(stage),
          )

        def copy_index(j, pair_step):
          stage = iq_ring.wait_free(pair_step)
          first_pair = pl.multiple_of((first + j) * PAIRS, PAIRS)
          copies = [
            (iq_gmem, iq_smem),
            (ilse_gmem, ilse_smem),
            (limit_gmem, limit_smem),
          ]
          if weight_gmem is not None:
            copies.append((weight_gmem, weight_smem))
          for x_gmem, x_smem in copies:
            plgpu.copy_gmem_to_smem(
              x_gmem.at[pl.ds(first_pair, PAIRS)],
              x_smem.at[stage],
              iq_ring.ready_at(stage),
            )

        def gather(t, part, row_step, stage):
          """Gathers one part of the columns of a row tile."""

          @plgpu.warp_map
          def _(warp):
            each = s.queries // 4
            mine = [warp * each + a for a in range(each)]
            at = first * PAIRS + t * s.queries
            query = [query_gmem[at + a] for a in mine]
            q_ring.wait_free(row_step, stage)
            columns = pl.ds(part * s.q_columns, s.q_columns)
            for a, one in zip(mine, query, strict=True):
              q_of_query = q_gmem.at[
                batch_row, origin + one, pl.ds(kv_head * q_rows, q_rows)
              ]
              if s.q_parts > 1:
                q_of_query = q_of_query.at[:, columns]
              mosaic.copy_rows(
                q_of_query, q_to, stage, a * q_rows, q_ring.ready_at(stage)
              )

        def row_tile(t, steps):
          row_step, pair_step = steps
          steps = [row_step + i if i else row_step for i in range(s.q_parts)]
          stages = [q_ring.slot(step) for step in steps]
          # int32: the division of a loop's index has 64 bits in 64-bit JAX.
          j, nth = jnp.int32(t) // row_tiles, lax.rem(t, row_tiles)
          pl.when(nth == 0)(lambda: copy_lse(j, pair_step))
          for part, (step, stage) in enumerate(zip(steps, stages, strict=True)):
            gather(t, part, step, stage)

          # The keys and the index operands are copied last, because the task or
          # pair tile before may still be using their buffers.
          # Yet the second pair tile's index operands need the first one to be
          # done, and so the keys.
          most = min(q_ring.stages // s.q_parts, 2 * row_tiles)
          pl.when(t == jnp.minimum(most, num_row_tiles) - 1)(copy_keys)
          ends = (nth == row_tiles - 1) | (t == num_row_tiles - 1)
          pl.when(ends)(lambda: copy_index(j, pair_step))
          return row_step + s.q_parts, pair_step + ends.astype(jnp.int32)

        return lax.fori_loop(0, num_row_tiles, row_tile, steps)

      row_step, pair_step = lax.fori_loop(
        0, my_tasks, task, (jnp.int32(0), jnp.int32(0))
      )
      mosaic.drain_rings(row_step, q_ring)
      mosaic.drain_rings(pair_step, lse_ring)
      mosaic.drain_rings(pair_step, iq_ring)
      mosaic.drain_rings(my_tasks, kv_ring)

  def operand(*sizes):
    return plgpu.SMEM(sizes, s.dtype, transforms=mosaic.OPERAND)

  weight_smem = plgpu.SMEM((2, PAIRS), jnp.float32)
  mosaic.launch(
    body,
    dict(
      chunk_gmem=chunk_desc,
      tasks_gmem=plan.tasks,
      longest_first_gmem=plan.longest_first,
      first_gmem=firsts,
      query_gmem=queries,
      limit_gmem=limits,
      ilse_gmem=index_lse,
      iq_gmem=iq,
      lse_gmem=lse,
      q_gmem=q,
      k_gmem=k,
      ik_gmem=ik,
      value_gmem=values,
      part_gmem=partials,
      sums_gmem=sums,
      **({} if weights is None else dict(weight_gmem=weights)),
    ),
    name="kl_kv_blocks",
    num_ctas=config.num_ctas,
    num_warpgroups=3,
    interpret=s.interpret,
    auto_barriers=False,
    scratch=dict(
      q_smem=mosaic.gathered_operand(
        (s.stages, ROWS, s.q_columns), s.dtype, q_rows, s.interpret
      ),
      lse_smem=plgpu.SMEM((2, row_tiles, ROWS), jnp.float32),
      k_smem=operand(2, KEYS, d),
      ik_smem=operand(2, KEYS, i_dim),
      iq_smem=operand(2, PAIRS, i_dim),
      ilse_smem=plgpu.SMEM((2, PAIRS), jnp.float32),
      limit_smem=plgpu.SMEM((2, PAIRS), jnp.int32),
      g_smem=operand(2, KEYS, PAIRS),
      q_ring=mosaic.ring(
        s.stages,
        fills=s.queries * mosaic.copies_of_rows(q_rows, s.q_columns),
        releases=2,
      ),
      lse_ring=mosaic.ring(2, releases=2),
      kv_ring=mosaic.ring(fills=4, releases=2),
      iq_ring=mosaic.ring(2, fills=3 if weights is None else 4, releases=2),
      g_ready=plgpu.Barrier(num_arrivals=2),
      g_read=plgpu.Barrier(num_arrivals=2),
      diq_ready=plgpu.Barrier(num_arrivals=2),
      tensor_turn=plgpu.Barrier(num_barriers=2),
      **({} if weights is None else dict(weight_smem=weight_smem)),
    ),
  )


@functools.partial(
  jax.jit,
  static_argnames=(
    "block_size", "scale", "index_scale", "with_gradients", "config",
    "interpret",
  ),
)  # fmt: skip
def _loss(
  q, k, index_q, index_k, block_indices, lse, kv_lengths, query_mask, counted,
  rows=None, *, block_size, scale, index_scale, with_gradients, config,
  interpret,
):  # fmt: skip
  """The loss, dindex_q and dindex_k (float32; empty without gradients).

  They are means over `counted` queries and groups, which may be more than those
  of this call. `rows` are the `packed_rows.PackedRows`; None for plain rows.
  """
  b, t, num_heads, d = q.shape
  s_len, num_kv_heads = k.shape[1:3]
  i_dim = index_q.shape[-1]
  group_size = num_heads // num_kv_heads
  top_k = block_indices.shape[-1]
  places = s_len
  if rows is not None:
    places = rows.source.shape[1]
    block_indices = rows.seen_blocks(block_indices)
  num_kv_blocks = -(-places // kv_block_plan.KV_BLOCK)
  keys_of_halves = None
  if rows is not None:
    keys_of_halves = rows.keys_of_halves(num_kv_blocks)
    keys_of_halves = keys_of_halves.reshape(b, num_kv_blocks, 2)

  k, _ = sparse_attention.block_major(
    k, num_kv_blocks, kv_block_plan.KV_BLOCK, rows
  )
  ik, bad = sparse_attention.block_major(
    index_k[:, :, None], num_kv_blocks * kv_block_plan.KV_BLOCK // block_size,
    block_size, rows,
  )  # fmt: skip
  ik, bad = ik[:, 0], bad[:, 0]
  bad_q = ~jnp.all(jnp.isfinite(index_q), axis=-1)
  index_q = jnp.where(jnp.isfinite(index_q), index_q, 0)
  # XLA's gather moves one element a thread: 32-bit elements need half as many.
  index_words = lax.bitcast_convert_type(
    index_q.reshape(-1, i_dim // 2, 2), jnp.uint32
  )
  q = sparse_attention.pad_heads(q, num_kv_heads)
  q_rows = q.shape[2] // num_kv_heads
  lse = lse.reshape(b, num_kv_heads, group_size, t).astype(jnp.float32)
  bad_lse = jnp.any(jnp.isnan(lse), axis=2)
  # An lse of +inf makes p = 0 for empty and poisoned queries; the NaN of the
  # poisoned ones enters through index_lse.
  lse = jnp.where(jnp.isnan(lse) | (lse == -jnp.inf), jnp.inf, lse)
  # Adding log G to lse divides p by G, so a sum over heads gives the mean.
  lse = lse * mosaic.LOG2E + math.log2(group_size)
  pad = ((0, 0), (0, 0), (0, q_rows - group_size), (0, 0))
  lse = jnp.pad(lse, pad, constant_values=jnp.inf)

  split = kv_block_plan.split_launches(
    b,
    t,
    num_kv_heads,
    num_kv_blocks,
    top_k,
    max_pairs=config.pairs,
    chunk=config.chunk,
  )
  groups, chunk = split.groups, split.chunk
  pad = split.num_chunks * chunk - t
  weights = None
  if query_mask.dtype != jnp.bool_:
    weights = jnp.pad(query_mask.astype(jnp.float32), ((0, 0), (0, pad)))
    query_mask = query_mask != 0
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
  num_pairs = groups * chunk * top_k
  task = kv_block_plan.task_size(num_pairs, config.task)
  num_slots = groups * num_kv_blocks
  max_tasks = kv_block_plan.max_tasks(num_slots, num_pairs, task)
  max_pair_tiles = num_pairs // PAIRS + max_tasks + 1
  params = KernelParams(
    q_rows=q_rows,
    head_dim=d,
    index_dim=i_dim,
    num_kv_heads=num_kv_heads,
    num_groups=groups,
    num_kv_blocks=num_kv_blocks,
    adds=split.num_chunks > 1,
    dtype=jnp.dtype(q.dtype),
    scale=scale,
    index_scale=index_scale,
    with_gradients=with_gradients,
    config=config,
    interpret=interpret,
  )
  if with_gradients:
    slots, partial_rows = max_tasks, max_pair_tiles * PAIRS
  else:  # the kernel writes neither
    slots, partial_rows = 1, PAIRS
  keys = num_kv_blocks * kv_block_plan.KV_BLOCK

  def launch(index, carry):
    total, diq, dik = carry
    first = index * groups
    group = first + jnp.arange(groups, dtype=jnp.int32)
    batch_row, kv_head = group // num_kv_heads, group % num_kv_heads

    def step(i, carry):
      total, diq, sums, has_sum = carry
      first_query = i * chunk

      def cut(x):
        return split.cut(x, first, first_query)

      ids = cut(block_indices)
      first_positions = kv_lengths[batch_row] - t + first_query
      query_places = None
      if rows is not None:
        query_places = kv_block_plan.query_places(
          rows, batch_row, first_query, chunk, num_kv_blocks
        )
      plan = kv_block_plan.plan_kv_blocks(
        ids,
        first_positions,
        block_size=block_size,
        num_blocks=num_kv_blocks * kv_block_plan.KV_BLOCK // block_size,
        task=task,
        places=query_places,
      )
      # Each task has pair tiles of its own. A pair slot is a position in one of
      # them; the last tile of a task may leave some unused.
      kv_block, start, count = (plan.tasks[:, j] for j in range(3))
      firsts = start // PAIRS + jnp.arange(max_tasks, dtype=jnp.int32)
      pair_slot = jnp.arange(max_pair_tiles * PAIRS, dtype=jnp.int32)
      task_of = mosaic.counts_up_to(firsts, max_pair_tiles) - 1
      task_of = jnp.repeat(task_of, PAIRS)
      offset = pair_slot - firsts[task_of] * PAIRS
      used = (offset < count[task_of]) & (task_of < plan.num_tasks[0])
      pair = jnp.minimum(start[task_of] + offset, num_pairs - 1)
      choice_slot = jnp.where(used, plan.order[pair], 0)
      query = choice_slot // top_k  # numbered over all groups of the launch
      query_group, query_of_chunk = query // chunk, query % chunk
      # The pair slot of each choice; -1 for a choice that is no pair.
      pair_slot_of = jnp.full((num_pairs,), -1, jnp.int32)
      pair_slot_of = pair_slot_of.at[
        jnp.where(used, choice_slot, num_pairs)
      ].set(pair_slot, mode="drop", unique_indices=True)
      pair_slot_of = pair_slot_of.reshape(groups, chunk, top_k)
      # As `plan.is_pair`, whose layout in memory is that of the chosen blocks;
      # XLA would bring what is gathered into that layout, which is slow.
      is_pair = pair_slot_of >= 0
      pair_slot_of = jnp.maximum(pair_slot_of, 0)
      if plan.reach is None:
        first_reach = first_positions[kv_block // num_kv_blocks] + 1
        first_reach -= kv_block % num_kv_blocks * kv_block_plan.KV_BLOCK
        reach = first_reach[task_of] + query_of_chunk
        keys = None
      else:
        assert keys_of_halves is not None
        reach = kv_block_plan.count_of(plan.reach[pair], 0)
        row_of_task = batch_row[kv_block // num_kv_blocks]
        keys = keys_of_halves[row_of_task, kv_block % num_kv_blocks][task_of]
      chosen = None if plan.chosen is None else plan.chosen[pair]
      limits = _limits(reach, chosen, keys)
      limits = jnp.where(used, limits, 0)
      # Index into [B, T, K]: of the group's first query, then of each pair.
      index_in_iq = (batch_row * t + first_query) * num_kv_heads + kv_head
      index_in_iq = index_in_iq[query_group] + query_of_chunk * num_kv_heads
      iq = lax.bitcast_convert_type(index_words[index_in_iq], q.dtype)
      iq = iq.reshape(-1, i_dim)
      chunk_desc = jnp.stack([first, first_query, plan.num_tasks[0]])
      chunk_desc = chunk_desc.astype(jnp.int32)
      index_lse = jax.new_ref(lax.empty((max_pair_tiles * PAIRS,), jnp.float32))
      _index_lse(
        index_lse, chunk_desc, plan, firsts, limits, iq, ik, params=params
      )
      parts = jnp.where(is_pair, jax.freeze(index_lse)[pair_slot_of], -jnp.inf)
      m = jnp.max(parts, axis=-1, initial=mosaic.FLOOR)
      query_lse = m + jnp.log2(jnp.sum(jnp.exp2(parts - m[..., None]), axis=-1))
      known = jnp.clip(ids, 0, bad.shape[1] - 1)
      if query_places is None:
        offset = jnp.arange(chunk)[None, :, None]
        q_position = first_positions[:, None, None] + offset
      else:
        q_position = query_places.positions[..., None]
      seen = (ids >= 0) & (ids * block_size <= q_position)
      first_bad = bad[batch_row[:, None, None], known]
      poisoned = jnp.any(seen & (first_bad <= q_position), axis=-1)
      poisoned |= cut(bad_lse)[..., 0] | cut(bad_q)[..., 0]
      query_lse = jnp.where(poisoned, jnp.nan, query_lse)

      values = jax.new_ref(lax.empty((config.num_ctas, 2, KEYS), jnp.float32))
      partials = jax.new_ref(lax.empty((partial_rows, i_dim), q.dtype))
      sums = jax.new_ref(sums)
      gathered = _gather_order(query, q_rows)
      pair_weights = None
      if weights is not None:
        pair_weights = weights[
          batch_row[query_group], first_query + query_of_chunk
        ]
      _kv_blocks(
        values, partials, sums, chunk_desc, plan, firsts,
        gathered % chunk, limits, query_lse.reshape(-1)[query], pair_weights,
        iq, cut(lse).reshape(-1, q_rows)[gathered].reshape(-1, ROWS), q, k, ik,
        params=params,
      )  # fmt: skip
      total += jnp.sum(jax.freeze(values))
      if with_gradients:
        sum_extra(
          sums, plan.extra, num_kv_blocks=num_slots, interpret=interpret
        )
        x = jax.freeze(partials)[pair_slot_of].astype(jnp.float32)
        x = jnp.sum(jnp.where(is_pair[..., None], x, 0), axis=2)
        at = (batch_row[0], first_query, kv_head[0], 0)
        diq = lax.dynamic_update_slice(diq, split.token_major(x), at)
      return total, diq, jax.freeze(sums), has_sum | plan.has_pairs

    shape = (1, slots, kv_block_plan.KV_BLOCK, i_dim)
    sums = kv_block_plan.new_sums(shape, num_slots, params.adds)
    has_sum = jnp.zeros((num_slots,), bool)
    total, diq, sums, has_sum = lax.fori_loop(
      0, split.num_chunks, step, (total, diq, sums, has_sum)
    )
    if with_gradients:
      one = kv_block_plan.own_sums(sums, has_sum).reshape(
        split.batch_rows, split.kv_heads, keys, i_dim
      )
      one = jnp.sum(one, axis=1)
      at = (batch_row[0], 0, 0)
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
      # Each launch and chunk writes its own part.
      lax.empty((b, sizes[0], num_kv_heads, i_dim), jnp.float32),
      jnp.zeros((b, sizes[1], i_dim), jnp.float32),
    ),
  )
  counted = jnp.asarray(counted, jnp.float32)
  factor = index_scale / counted
  dik = dik[:, :places]
  if rows is not None and with_gradients:
    dik = rows.from_blocks(dik)
  return (
    total * mosaic.LN2 / counted,
    diq[:, :t] * factor,
    dik * factor,
  )


def _weights_up_to_1(weights: Float[Array, "B T"]) -> Float[Array, "B T"]:
  """The weights divided by a power of two, so that all are at most 1.

  The loss does not change, because it is divided by the sum of the weights.
  But the kernels round weight * (r - p) to the working dtype, and float16 has
  neither a weight of 1e5 nor most of what a weight of 1e-6 leaves.
  """
  most = jnp.max(jnp.abs(weights.astype(jnp.float32)))
  # From the bits of its exponent (biased by 127) those of the factor, which is
  # 2^-126 at least, because XLA takes smaller numbers for 0.
  exponent = lax.bitcast_convert_type(most, jnp.int32) >> 23
  bits = jnp.maximum(253 - exponent, 1) << 23
  return weights * lax.bitcast_convert_type(bits, jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(9, 10, 11, 12, 13))
def _kl(
  index_q, index_k, q, k, block_indices, lse, kv_lengths, query_mask, rows,
  block_size, scale, index_scale, config, interpret,
):  # fmt: skip
  return _run(
    index_q, index_k, q, k, block_indices, lse, kv_lengths, query_mask, rows,
    block_size, scale, index_scale, config, interpret, with_gradients=False,
  )[0]  # fmt: skip


def _run(
  index_q, index_k, q, k, block_indices, lse, kv_lengths, query_mask, rows,
  block_size, scale, index_scale, config, interpret, *, with_gradients,
):  # fmt: skip
  options = dict(
    scale=scale,
    index_scale=index_scale,
    with_gradients=with_gradients,
    config=config,
    interpret=interpret,
  )

  # Under vmap the kernels run once for each entry.
  @jax.custom_batching.sequential_vmap
  def run(*args):
    if block_indices is None:
      return dense_index_kl.kl(*args, **options)
    args, rows = args[:9], packed_rows.of_arrays(args[9:])
    return _loss(*args, rows, block_size=block_size, **options)

  operands = [q, k, index_q, index_k]
  letters = ["B T H D", "B S K D", "B T K I", "B S I"]
  if block_indices is not None:
    operands.append(block_indices)
    letters.append("B K T P")
  if block_indices is None:
    packed, packed_letters = ((), ()) if rows is None else ((rows,), ("B S",))
  else:
    packed, packed_letters = packed_rows.operands(rows)
  split = partition.by_rows_and_heads(
    partition.kernel(run, interpret),
    (*letters, "B H T", "B", "B T", "", *packed_letters),
    ("", "B T K I", "B S I"),
    interpret=interpret,
  )
  if query_mask.dtype != jnp.bool_:
    query_mask = _weights_up_to_1(query_mask)
  counted = jnp.sum(query_mask)
  if query_mask.dtype == jnp.bool_:
    counted = jnp.maximum(counted, 1)
  counted = jnp.where(counted == 0, 1, counted * k.shape[2])
  return split(*operands, lse, kv_lengths, query_mask, counted, *packed)


@mosaic.in_32_bits
def _kl_forward(*args):
  value, diq, dik = _run(*args, with_gradients=True)
  diq = checkpoint_name(diq, "index_kl_gradient")
  dik = checkpoint_name(dik, "index_kl_gradient")
  index_q, index_k = args[:2]
  # The gradients are kept in float32. A loss scale arrives with the cotangent
  # only, too late to save what float16 would have lost before.
  return value, (diq, dik, index_q, index_k)


@mosaic.in_32_bits
def _kl_backward(
  block_size, scale, index_scale, config, interpret, residuals, cotangent
):
  diq, dik, index_q, index_k = residuals
  return (
    (diq * cotangent).astype(index_q.dtype),
    (dik * cotangent).astype(index_k.dtype),
    *[None] * 7,
  )


_kl.defvjp(_kl_forward, _kl_backward)


@mosaic.in_32_bits
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
  query_mask: Bool[Array, "B T"] | Float[Array, "B T"] | None = None,
  layout: packed_rows.Layout | None = None,
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
    scale: of the scores; D^-0.5 if None.
    index_scale: of the index scores; I^-0.5 if None.
    kv_lengths: keys in slots from kv_lengths[b] on do not exist.
    query_mask: queries that count, or their weights w >= 0: the loss is then
      sum w KL_t / (K sum w), and a query of weight 0 does not count, whatever
      it holds. All if None.
    layout: blocks of packed rows, whose padding query_mask leaves out; None for
      plain rows. Ids of blocks that the query does not see contribute nothing.
    config: tile sizes of the phase; the defaults of its `Config` if None.
    interpret: run on the CPU in Pallas's GPU interpret mode.

  Raises:
    NotImplementedError: the call is legal but beyond `mosaic`'s limits.
  """
  b, t, num_heads, d = q.shape
  check = functools.partial(
    mosaic.check_supported,
    dtype=q.dtype,
    head_dim=d,
    index_dim=index_q.shape[-1],
  )
  if block_indices is None:
    check()
    mosaic.check_dense_supported(d)
    config = config or dense_index_kl.Config()
  else:
    check(
      block_size=block_size,
      top_k=block_indices.shape[-1],
      kv_len=k.shape[1],
      num_blocks=packed_rows.num_blocks(layout),
      group_size=num_heads // k.shape[2],
    )
    config = config or Config()
  if kv_lengths is None:
    kv_lengths = jnp.full((b,), k.shape[1], jnp.int32)
  if query_mask is None:
    query_mask = jnp.ones((b, t), bool)
  if block_indices is None:
    rows = None if layout is None else layout.visible_until
  else:
    rows = packed_rows.of_layout(layout, block_size, t, kv_lengths)
  index_dim = index_q.shape[-1]
  q, k, index_q, index_k = (
    mosaic.pad_head_dim(x)
    for x in (*lax.stop_gradient((q, k)), index_q, index_k)
  )
  return _kl(
    index_q, index_k, q, k, block_indices, lax.stop_gradient(lse),
    jnp.clip(kv_lengths.astype(jnp.int32), 0, k.shape[1]), query_mask,
    rows, block_size,
    float(d**-0.5 if scale is None else scale),
    float(index_dim**-0.5 if index_scale is None else index_scale),
    config,
    interpret,
  )  # fmt: skip
