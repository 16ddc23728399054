"""Forward pass of block-sparse attention on Hopper: two kernels.

For query t, group g and head h of g, over the visible tokens J of the chosen
blocks (Main Branch; arXiv 2606.13392):

  out = softmax_J(scale q.k) v      lse = log sum_J exp(scale q.k)

One wgmma tile has 64 MMA rows: some queries times all heads of their group, so
that a chosen block is read once for all of these heads. `tile_plan` decides on
the device which of the two kernels computes which choice:

* **pairs** (the key block stays, queries are gathered). A CTA owns a task: K
  and V of one block stay in SMEM, while the queries that chose the block are
  gathered, one TMA copy a pack of 8 or 16 rows (`mosaic.Packing`, `gather` in
  `_copy`). Each (pack, block) pair leaves a normalised partial output in q's
  dtype and a base-2 lse. Two or three warpgroups each compute row tiles of 64
  MMA rows, and one warpgroup copies.
  Bound: 4 + 4 KB moved for each pair (16 heads, D 128), and 4 more to merge it.
* **tiles** (the queries stay, key blocks stream by). A CTA owns a tile of
  neighbouring queries, and each of its two compute warpgroups owns 64 MMA rows
  of it. They walk the tile's shared blocks with an online softmax, each
  skipping the blocks that none of its own queries chose, then merge the partial
  outputs of the tile's pairs, and write out and lse. A third warpgroup copies
  keys, values and partial outputs. Queries are read and results written where
  they lie: all queries of half a tile at once, or one after another where they
  leave padding between their heads. If nothing is merged, the queries of the
  next tile are read while results of this one are written. Half a tile holds
  whole packs where it merges, and otherwise as many queries as fit 64 MMA rows.
  Bound: where neighbours agree, reading shared blocks from L2 (64 KB for 8
  queries) and wgmma; otherwise reading the partial outputs.

If no tile has a pair, one launch of the tile kernel computes everything.
Otherwise the chunks of one group's queries are processed one after another in a
workspace of at most 2^30 elements of partial outputs, and planned again if
their tiles then hold fewer queries. The branch between the two cases makes the
host wait for the plan. There is none if all blocks are shared, as few are.

SMEM at D 128 and block 128: pairs 96 KB of queries, 64 KB of K and V, 48 KB of
partial outputs; tiles 32 KB of queries, 128 KB of K and V, and 64 KB of partial
outputs or, when nothing is merged, 32 KB of results. At D 256 (*wide* heads):
pairs 128 KB of K and V and 96 KB of queries, through which the partial outputs
leave, so two warpgroups take turns at three buffers; tiles 64 KB of queries,
128 KB of K and V in two stages of 64 keys, 32 KB of partial outputs, of which
64 columns are merged at once.

Barriers of pairs, between the compute warpgroups and the copy warpgroup
(arrivals in brackets, one where no number stands):

  name        who arrives                            who waits
  q_ring      ready: a copy a pack (4 with 16 rows   compute, the one whose
              a pack, 8 with 8)                      row tile it is
              free: that one, after the scores, or   copy
              when its wide output has left
  k_ring      ready: the copy of a task's keys       compute, all
              free: compute, after the task (2 or    copy
              3: all)
  v_ring      as k_ring, of the values

Barriers of tiles, between compute warpgroups 0 and 1 and the copy warpgroup:

  name        who arrives                            who waits
  q_ready     one a compute warpgroup: its own       0 and 1, each its own
              copies of q, one for each 64 columns
              (and each query, if padding lies
              between them)
  k_ring      ready: the copy of a block's keys      0 and 1
              (of 64 of its keys if heads are wide)
              free: 0 and 1, after the scores or     copy
              when they skip the block (2)
  v_ring      ready: the copy of a block's values    0 and 1
              free: 0 and 1, after the product or    copy
              when they skip the block (2)
  o_ring      only if there are pairs                0 and 1
              ready: the copy of a choice's lse,
              and for each pack of the tile the
              copy of its partial output, or the
              copy warpgroup if there is none (9
              with 16 rows a pack, 17 with 8)
              (of wide heads: for each 64 columns)
              free: 0 and 1, which have read their   copy
              half (2)

Packed rows (`packed_rows`) differ in the tile kernel's blocks that need a mask:
it reads each query's position and each block's number of keys. A program for
plain rows has no code for that.

Not supported: what `mosaic.check_supported` refuses.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import mosaic, packed_rows, tile_plan
from pallas_kernels.mosaic import FLOOR

ACC = plgpu.WGMMAAccumulatorRef
ROWS = 64  # MMA rows of a wgmma tile
# Columns of the operands that hold a tile's queries. TMA copies whole tiles of
# 8 rows x 64 columns, unless an operand has 64 columns: its rows then lie one
# behind the other, and any number is copied.
TILE_COLUMNS = 64
MAX_WORKSPACE = 1 << 30  # elements of the partial outputs
MAX_PLANNED = 1 << 25  # choices whose pairs are sorted at once
BUNDLE_BYTES = 40 << 20  # of keys and values that stay in L2, which has 50 MB
FEW_BLOCKS = 64  # at most, for which all blocks are shared


@dataclasses.dataclass(frozen=True)
class Config:
  """Tile and pipeline sizes; the result changes by rounding only.

  With wide heads, warpgroups and stages are those that fit, whatever is given.

  Attributes:
    pair_warpgroups: compute warpgroups of the pair kernel, 2 or 3.
    query_stages: row tiles of gathered queries in flight for each of these
      warpgroups (pair kernel).
    kv_stages: key blocks in flight (tile kernel, when it merges pairs).
    walk_stages: upper bound on the key blocks in flight (tile kernel, when
      there are no pairs). With heads of 128 dims two fit.
    merge_stages: partial outputs in flight (tile kernel).
    task: upper bound on the pairs that share one load of a block.
    span: queries that are kept in L2 while their pairs are gathered; 0 derives
      it from the number of blocks.
    chunk: upper bound on the queries of a chunk; 0 derives it from the
      workspace.
    shared_cost: half a tile walks a block as a shared one if this many of its
      queries (of 16 heads) chose it. With 0, all blocks are shared, and the
      program has no kernels for pairs.
    slack: factor by which sharing all blocks may cost more than the mixture of
      shared blocks and pairs and still be preferred.
    num_ctas: CTAs of the persistent grids.
  """

  pair_warpgroups: int = 3
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


def rows_of_query(g: tile_plan.Geometry) -> int:
  """MMA rows of a query in a tile: its heads, and padding behind them."""
  return ROWS // g.half


@dataclasses.dataclass(frozen=True)
class KernelParams:
  """Static parameters of one call, after padding."""

  q_len: int  # T
  num_kv_heads: int
  packing: mosaic.Packing
  head_dim: int
  block_size: int
  dtype: jnp.dtype
  scale_log2: float
  geometry: tile_plan.Geometry
  config: Config
  interpret: bool

  @property
  def half(self) -> int:
    """Packs in 64 MMA rows, which is half a tile that merges partials."""
    return ROWS // self.packing.rows

  @property
  def one_copy(self) -> bool:
    """Whether one TMA copy moves 64 columns of all queries of half a tile.

    It does where no padding lies between the heads of two queries.
    """
    return rows_of_query(self.geometry) == self.packing.group_size

  @property
  def wide(self) -> bool:
    """Whether tiles have to be smaller to fit SMEM."""
    return self.head_dim > mosaic.WIDE

  @property
  def pair_warpgroups(self) -> int:
    """Compute warpgroups of the pair kernel."""
    return 2 if self.wide else self.config.pair_warpgroups

  @property
  def pair_buffers(self) -> int:
    """Row tiles of gathered queries in flight in the pair kernel."""
    if self.wide:
      return 3
    return self.config.query_stages * self.config.pair_warpgroups

  def pair_ring(self) -> mosaic.Ring:
    """The ring of these row tiles, at which the warpgroups take turns."""
    buffers = self.pair_buffers
    if buffers % self.pair_warpgroups == 0:
      return mosaic.ring(buffers, fills=self.half)
    stages = buffers * self.pair_warpgroups
    return mosaic.ring(stages, fills=self.half, buffers=buffers)

  def kv_stages(self, merging: bool) -> int:
    """Key blocks in flight in the tile kernel, with or without pairs."""
    if self.wide:
      return 2
    if merging:
      return self.config.kv_stages
    return min(self.config.walk_stages, 3 if self.head_dim < 128 else 2)

  @property
  def step_keys(self) -> int:
    """Keys of a block that the tile kernel loads at once."""
    return min(self.block_size, 64) if self.wide else self.block_size

  @property
  def merge_columns(self) -> int:
    """Columns of a partial output that the tile kernel merges at once."""
    return 64 if self.wide else self.head_dim

  def operand(self, *leading: int) -> plgpu.SMEM:
    return plgpu.SMEM(
      (*leading, self.head_dim), self.dtype, transforms=mosaic.OPERAND
    )

  def probs_scratch(
    self, warpgroups: int, num_keys: int
  ) -> dict[str, plgpu.SMEM]:
    """SMEM for probabilities: interpreted wgmma takes no register operand."""
    if not self.interpret:
      return {}
    sizes = (warpgroups, ROWS, num_keys)
    return dict(p_smem=plgpu.SMEM(sizes, self.dtype, transforms=mosaic.OPERAND))


def heuristic_config(num_blocks: int, top_k: int) -> Config:
  """The config used when none is given.

  Where a query chooses a quarter of the blocks or more, even random choices of
  a tile's queries cover nearly all of them, so that pairs save nothing. Without
  them the host waits for no decision.

  Args:
    num_blocks: N.
    top_k: P.
  """
  if num_blocks <= min(FEW_BLOCKS, 4 * top_k):
    return Config(shared_cost=0.0)
  return Config()


def _qk(q_parts, k_smem, num_keys: int) -> Any:
  """Scores of queries, whose columns stand in one operand or in several."""

  def product(acc):
    for i, q_smem in enumerate(q_parts):
      keys, columns = k_smem, q_smem.shape[-1]
      if len(q_parts) > 1:
        keys = k_smem.at[:, pl.ds(i * columns, columns)]
      plgpu.wgmma(acc, q_smem, keys.transpose((1, 0)))
    return acc[...]

  return pl.run_scoped(product, ACC((ROWS, num_keys), jnp.float32))


def _pv(p, v_smem, params: KernelParams, p_smem, acc=None) -> Any:
  """p v, added to `acc` if given."""
  p = p.astype(params.dtype)
  if params.interpret:
    p_smem[...] = p
    plgpu.commit_smem()
    p = p_smem

  def product(ref):
    plgpu.wgmma(ref, p, v_smem)

  if acc is not None and not params.interpret:
    return pl.run_state(product)(ACC.init(acc))

  def fresh(ref):
    product(ref)
    return ref[...]

  out = pl.run_scoped(fresh, ACC((ROWS, params.head_dim), jnp.float32))
  return out if acc is None else acc + out


def _plus(x, i: int):
  """x + i. The sum with 0, and those with a factor of 1, leave no code."""
  return x + i if i else x


def _times(x, n: int):
  return x * n if n > 1 else x


def _quotient(x, n: int):
  return lax.div(x, n) if n > 1 else x


def _over_columns(x, width: int):
  return lax.broadcast_in_dim(x, (ROWS, width), [0])


def _pairs(partials, chunk_desc, plan, q, k, v, *, params: KernelParams):
  """Computes the partial outputs of a chunk's (pack, block) pairs.

  Args:
    partials: Refs of the partial outputs and their lse.
    chunk_desc: chunk descriptor, int32 [6]: first tile, batch row, KV head,
      first pack, first task and number of tasks of the chunk.
    plan: `tile_plan.PairPlan`.
    q, k, v: operands as `forward` takes them.
    params: static parameters.
  """
  s, g, config = params, params.geometry, params.config
  half, rows, workers = s.half, s.packing.rows, s.pair_warpgroups
  registers, copy_registers = {2: (232, 40), 3: (160, 32)}[workers]

  def body(
    *, chunk_gmem, tasks_gmem, order_gmem, q_gmem, k_gmem, v_gmem, part_gmem,
    lse_gmem, q_smem, k_smem, v_smem, l_smem, q_ring, k_ring, v_ring,
    o_smem: Any = None, p_smem: Any = None,
  ):  # fmt: skip
    cta, wg = lax.axis_index("cta"), lax.axis_index("wg")
    my_tasks = (chunk_gmem[5] - cta + config.num_ctas - 1) // config.num_ctas

    def read_task(i):
      index = chunk_gmem[4] + cta + i * config.num_ctas
      return (tasks_gmem[index, j] for j in range(3))

    @pl.when(wg < workers)
    def _compute():
      plgpu.set_max_registers(registers, action="increase")

      def task(i, step):
        _, start, count = read_task(i)
        num_row_tiles = (count + half - 1) // half
        # A warpgroup takes every `workers`-th row tile, counted across tasks.
        mine = lax.rem(wg + workers - lax.rem(step, workers), workers)
        k_ring.wait_ready(0)
        v_ring.wait_ready(0)

        def attend_row_tile(j, carry):
          row_tile = mine + j * workers
          slot = q_ring.slot(step + row_tile)
          first = row_tile * half
          choice_slot = [
            order_gmem[start + jnp.minimum(first + a, count - 1)]
            for a in range(half)
          ]
          q_ring.wait_ready(slot)
          buffer = q_ring.buffer(slot)
          scores = _qk([q_smem.at[buffer]], k_smem, s.block_size)
          if not s.wide:
            q_ring.release(slot)
          m = scores.max(axis=1) * s.scale_log2
          p = jnp.exp2(scores * s.scale_log2 - _over_columns(m, s.block_size))
          l = p.sum(axis=1)
          o = _pv(p, v_smem, s, p_smem.at[wg] if s.interpret else None)
          o = o * _over_columns(1.0 / l, s.head_dim)
          plgpu.wait_smem_to_gmem(0, wait_read_only=True)
          out_smem, at_out = (q_smem, buffer) if s.wide else (o_smem, wg)
          out_smem[at_out] = o.astype(s.dtype)
          l_smem[wg] = m + jnp.log2(l)
          plgpu.commit_smem()
          for a in range(half):

            @pl.when(first + a < count)
            def _store(a=a):
              pack = choice_slot[a] // g.pack_slots
              choice = lax.rem(choice_slot[a], g.pack_slots)
              at = pl.ds(a * rows, rows)
              plgpu.copy_smem_to_gmem(
                out_smem.at[at_out, at],
                part_gmem.at[pack, choice],
                commit_group=False,
              )
              plgpu.copy_smem_to_gmem(
                l_smem.at[wg, at],
                lse_gmem.at[
                  pack // g.tile_packs,
                  choice,
                  pl.ds(lax.rem(pack, g.tile_packs) * rows, rows),
                ],
                commit_group=False,
              )

          plgpu.commit_smem_to_gmem_group()
          if s.wide:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            q_ring.release(slot)
          return carry

        lax.fori_loop(
          0,
          (num_row_tiles - mine + workers - 1) // workers,
          attend_row_tile,
          None,
        )
        k_ring.release(0)
        v_ring.release(0)
        return step + num_row_tiles

      lax.fori_loop(0, my_tasks, task, jnp.int32(0))
      plgpu.wait_smem_to_gmem(0)

    @pl.when(wg == workers)
    def _copy():
      plgpu.set_max_registers(copy_registers, action="decrease")
      batch_row, kv_head, origin = chunk_gmem[1], chunk_gmem[2], chunk_gmem[3]

      def task(i, step):
        block, start, count = read_task(i)
        tokens = pl.ds(block * s.block_size, s.block_size)

        pl.when(i > 0)(lambda: k_ring.wait_released(0))
        plgpu.copy_gmem_to_smem(
          k_gmem.at[batch_row, kv_head, tokens], k_smem, k_ring.ready_at(0)
        )

        pl.when(i > 0)(lambda: v_ring.wait_released(0))
        plgpu.copy_gmem_to_smem(
          v_gmem.at[batch_row, kv_head, tokens], v_smem, v_ring.ready_at(0)
        )

        def gather(j, step):
          slot = q_ring.slot(step)
          pack = [
            order_gmem[start + jnp.minimum(j * half + a, count - 1)]
            // g.pack_slots
            for a in range(half)
          ]
          q_ring.wait_free(step, slot)
          for a in range(half):
            plgpu.copy_gmem_to_smem(
              q_gmem.at[
                batch_row, origin + pack[a], pl.ds(kv_head * rows, rows)
              ],
              q_smem.at[q_ring.buffer(slot), pl.ds(a * rows, rows)],
              q_ring.ready_at(slot),
            )
          return step + 1

        return lax.fori_loop(0, (count + half - 1) // half, gather, step)

      step = lax.fori_loop(0, my_tasks, task, jnp.int32(0))
      mosaic.drain_rings(step, q_ring)
      mosaic.drain_rings(my_tasks, k_ring, v_ring)

  parts, part_lse = partials
  # Wide outputs leave through the buffer of their queries.
  o_smem = {} if s.wide else dict(o_smem=s.operand(workers, ROWS))
  mosaic.launch(
    body,
    dict(
      chunk_gmem=chunk_desc,
      tasks_gmem=plan.tasks,
      order_gmem=plan.order,
      q_gmem=q,
      k_gmem=k,
      v_gmem=v,
      part_gmem=parts,
      lse_gmem=part_lse,
    ),
    name="sparse_pairs",
    num_ctas=config.num_ctas,
    num_warpgroups=workers + 1,
    interpret=s.interpret,
    scratch=dict(
      q_smem=s.operand(s.pair_buffers, ROWS),
      k_smem=s.operand(s.block_size),
      v_smem=s.operand(s.block_size),
      **o_smem,
      l_smem=plgpu.SMEM((workers, ROWS), jnp.float32),
      q_ring=s.pair_ring(),
      k_ring=mosaic.ring(releases=workers),
      v_ring=mosaic.ring(releases=workers),
      **s.probs_scratch(workers, s.block_size),
    ),
  )


def _tiles(
  out, lse, partials, chunk_desc, positions, keys, plan, merges, q, k, v, *,
  num_tiles: int, params: KernelParams,
):  # fmt: skip
  """Walks the tiles' shared blocks, merges partials, writes out and lse.

  Args:
    out, lse: Refs of the results, [B,T,H,D] and [B, K, MMA rows of all tiles].
    partials: what `_pairs` computed; None if there are no pairs anywhere, and
      then SMEM has room for more blocks, and half a tile needs no whole packs.
    chunk_desc: chunk descriptor as in `_pairs`, of which this reads the first
      tile only.
    positions: int32 [B]: position of each batch row's first query among its
      keys; of packed rows [B, MMA rows of all tiles]: of each row's query.
    keys: int32 [B, N]: keys of each block of packed rows; None for plain rows.
    plan: `tile_plan.TilePlan`.
    merges: `tile_plan.plan_merges`; None like `partials`.
    q, k, v: operands as `forward` takes them; the queries are not packed.
    num_tiles: tiles of this launch.
    params: static parameters.
  """
  s, g, config = params, params.geometry, params.config
  half, rows, group_size = s.half, s.packing.rows, s.packing.group_size
  tiles_of_group = plan.counts.shape[0] // (q.shape[0] * s.num_kv_heads)
  num_parts = s.head_dim // TILE_COLUMNS  # operands of half a tile's queries
  merging = partials is not None
  # The next tile's queries are loaded while results of this one are written.
  ahead = not merging and not s.wide
  # Where tiles merge, a launch has those of one chunk of one group.
  num_groups = 1 if merging else num_tiles // tiles_of_group
  kv_bytes = 2 * k.shape[2] * k.shape[3] * s.dtype.itemsize
  bundle = mosaic.largest_divisor(num_groups, BUNDLE_BYTES // kv_bytes)
  kv_stages = s.kv_stages(merging)
  each = s.block_size // s.step_keys  # steps of a block
  merge_stages = config.merge_stages
  columns = s.merge_columns if merging else s.head_dim
  column_steps = range(s.head_dim // columns)
  row_layout = plgpu.Layout.WGMMA.reduce(1)

  def body(
    *, chunk_gmem, positions_gmem, counts_gmem, queries_gmem, shared_gmem,
    shared_by_gmem, q_gmem, k_gmem, v_gmem, out_gmem, lse_gmem, q_smem, k_smem,
    v_smem, q_ready, k_ring, v_ring, keys_gmem: Any = None,
    merge_gmem: Any = None, part_gmem: Any = None, part_lse_gmem: Any = None,
    o_smem: Any = None, l_smem: Any = None, o_ring: Any = None,
    p_smem: Any = None, out_smem: Any = None,
  ):  # fmt: skip
    cta, wg = lax.axis_index("cta"), lax.axis_index("wg")
    first_tile = chunk_gmem[0]
    # CTAs take turns forwards and backwards, so that none has the longer tile
    # of every turn.
    places = (cta, config.num_ctas - 1 - cta)
    turns, rest = divmod(num_tiles, config.num_ctas)
    my_tiles = turns + (places[turns % 2] < rest).astype(jnp.int32)

    def locate(i):
      place = jnp.where(lax.rem(i, 2) == 0, *places)
      rank = i * config.num_ctas + place
      index = first_tile + tile_plan.tile_of_rank(
        rank, num_groups, num_tiles // num_groups, bundle
      )
      group_index = index // tiles_of_group
      return (
        index,
        group_index // s.num_kv_heads,
        lax.rem(group_index, s.num_kv_heads),
        lax.rem(index, tiles_of_group),
      )

    @pl.when(wg < 2)
    def _compute():
      plgpu.set_max_registers(232, action="increase")
      # Query in this warpgroup's half of the tile. Rows behind the last one
      # have a greater number, whose bit nobody sets. Padding rows compute with
      # what SMEM held before; no other row sees it, and `forward` cuts off
      # their lse.
      query_of_row = plgpu.broadcasted_iota(
        jnp.int32, (ROWS,), 0, layout=row_layout
      ) // rows_of_query(g)
      q_whole, q_rows = mosaic.whole_and_tiles(q_smem)
      out_whole, out_rows = q_whole, q_rows
      if ahead:
        out_whole, out_rows = mosaic.whole_and_tiles(out_smem)

      def chosen_by(bits):
        return ((bits >> query_of_row) & 1) == 1

      def full(value, sizes, layout):
        return plgpu.layout_cast(jnp.full(sizes, value, jnp.float32), layout)

      first_part = wg * num_parts

      def each_copy(i, smem, copy):
        """Calls copy(batch row, queries, heads, columns, place in `smem`)."""
        _, batch_row, kv_head, nth = locate(i)
        first_query = nth * g.tile + wg * g.half
        first_head = kv_head * group_size
        heads = pl.ds(first_head, group_size)
        parts = [
          (smem.at[first_part + i], pl.ds(i * TILE_COLUMNS, TILE_COLUMNS))
          for i in range(num_parts)
        ]

        def all_queries(part):
          """(heads, their place in SMEM) of each copy of all queries."""
          if s.interpret:  # knows no reshaped Refs, but rows with a stride
            return [
              (first_head + i, part.at[pl.ds(i, g.half, group_size)])
              for i in range(group_size)
            ]
          rows = part.at[pl.ds(0, g.half * group_size)]
          return [(heads, rows.reshape(g.half, group_size, TILE_COLUMNS))]

        if s.one_copy:
          # Behind the last query, TMA reads zeros and writes nothing.
          for part, columns in parts:
            for some_heads, at in all_queries(part):
              queries = pl.ds(first_query, g.half)
              copy(batch_row, queries, some_heads, columns, at)
          return

        @plgpu.warp_map
        def _(warp):
          for a in range(g.half):

            @pl.when(warp == a % 4)
            def _(a=a):
              rows = pl.ds(a * rows_of_query(g), group_size)
              for part, columns in parts:
                copy(batch_row, first_query + a, heads, columns, part.at[rows])

      def load(batch_row, queries, heads, columns, at):
        if not s.one_copy:
          queries = jnp.minimum(queries, s.q_len - 1)
        plgpu.copy_gmem_to_smem(
          q_gmem.at[batch_row, queries, heads, columns], at, q_ready.at[wg]
        )

      def store(batch_row, queries, heads, columns, at):
        @pl.when(s.one_copy or queries < s.q_len)
        def _():
          plgpu.copy_smem_to_gmem(
            at,
            out_gmem.at[batch_row, queries, heads, columns],
            commit_group=False,
          )

      def tile(i, steps):
        kv_step, merge_step = steps
        index, batch_row, kv_head, nth = locate(i)
        first_query = nth * g.tile + wg * g.half
        first_row = (2 * nth + wg) * ROWS  # of `lse`, and of `positions`
        if not ahead:
          each_copy(i, q_rows, load)
        num_full, num_shared = (counts_gmem[index, j] for j in range(2))
        bad_keys, bad_values, seeing = (
          queries_gmem[index, j, wg] for j in range(3)
        )
        if keys is None:
          position = positions_gmem[batch_row] + first_query
        plgpu.barrier_wait(q_ready.at[wg])
        q_parts = [q_whole.at[first_part + i] for i in range(num_parts)]

        def block(j, carry, own: bool):
          *carry, mine = carry
          slot = k_ring.slot(kv_step + j)
          k_ring.wait_ready(slot)
          # Read one block ahead: a warpgroup would wait for it here.
          following = shared_by_gmem[
            index, wg, jnp.minimum(_quotient(j + 1, each), num_shared - 1)
          ]

          def walk(acc, m_i, l_i):
            scores = _qk(q_parts, k_smem.at[slot], s.step_keys)
            k_ring.release(slot)
            chosen = chosen_by(mine)
            if own:
              first_key = shared_gmem[index, _quotient(j, each)] * s.block_size
              key = first_key + plgpu.broadcasted_iota(
                jnp.int32, scores.shape, 1, layout=plgpu.Layout.WGMMA
              )
              if each > 1:
                key += lax.rem(j, each) * s.step_keys
              if keys is None:
                last = position + query_of_row
              else:
                last = plgpu.load(
                  positions_gmem.at[batch_row, pl.ds(first_row, ROWS)],
                  layout=row_layout,
                  optimized=False,
                )
                num_keys = keys_gmem[
                  batch_row, shared_gmem[index, _quotient(j, each)]
                ]
                last = jnp.minimum(last, first_key + num_keys - 1)
              scores = jnp.where(
                key <= _over_columns(last, s.step_keys), scores, -jnp.inf
              )
            m_block = jnp.where(
              chosen, scores.max(axis=1) * s.scale_log2, -jnp.inf
            )
            m_new = jnp.maximum(m_i, m_block)
            alpha = jnp.exp2(m_i - m_new)
            # exp2(x - inf) = 0 drops the block for queries that did not choose
            # it.
            shift = jnp.where(chosen, m_new, jnp.inf)
            p = jnp.exp2(
              scores * s.scale_log2 - _over_columns(shift, s.step_keys)
            )
            l_new = l_i * alpha + p.sum(axis=1)
            acc = acc * _over_columns(alpha, s.head_dim)
            v_ring.wait_ready(slot)
            acc = _pv(
              p, v_smem.at[slot], s, p_smem.at[wg] if s.interpret else None, acc
            )
            v_ring.release(slot)
            return acc, m_new, l_new

          def skip(acc, m_i, l_i):
            k_ring.release(slot)
            v_ring.wait_ready(slot)
            v_ring.release(slot)
            return acc, m_i, l_i

          return *lax.cond(mine != 0, walk, skip, *carry), following

        def merge(choice, carry):
          bits = [merge_gmem[index, h, choice] for h in range(2)]

          def add(accs, m_i, l_i, step):
            slots = [o_ring.slot(_plus(step, i)) for i in column_steps]
            chosen = chosen_by(jnp.where(wg == 0, bits[0], bits[1]))
            o_ring.wait_ready(slots[0])
            m_part = plgpu.load(
              l_smem.at[slots[0], pl.ds(wg * ROWS, ROWS)], layout=row_layout
            )
            m_part = jnp.where(chosen, m_part, -jnp.inf)
            m_new = jnp.maximum(m_i, m_part)
            alpha, weight = jnp.exp2(m_i - m_new), jnp.exp2(m_part - m_new)
            merged = []
            for i, (slot, acc) in enumerate(zip(slots, accs, strict=True)):
              if i:
                o_ring.wait_ready(slot)
              o = plgpu.load(
                o_smem.at[slot, wg], layout=plgpu.Layout.WGMMA
              ).astype(jnp.float32)
              o_ring.release(slot)
              # Queries without this pair find old SMEM contents, maybe NaN.
              o = jnp.where(
                _over_columns(chosen, columns),
                o * _over_columns(weight, columns),
                0.0,
              )
              merged.append(acc * _over_columns(alpha, columns) + o)
            l_new = l_i * alpha + weight
            return tuple(merged), m_new, l_new, step + len(column_steps)

          return lax.cond((bits[0] | bits[1]) != 0, add, lambda *c: c, *carry)

        carry = (
          full(0.0, (ROWS, s.head_dim), plgpu.Layout.WGMMA),
          full(FLOOR, (ROWS,), row_layout),
          full(0.0, (ROWS,), row_layout),
          shared_by_gmem[index, wg, 0],
        )
        first_own, num_steps = _times(num_full, each), _times(num_shared, each)
        carry = lax.fori_loop(
          0, first_own, functools.partial(block, own=False), carry
        )
        *carry, _ = lax.fori_loop(
          first_own, num_steps, functools.partial(block, own=True), carry
        )
        acc, m_i, l_i = carry
        if ahead:
          plgpu.commit_smem()  # all warps have read their queries

          @pl.when(i + 1 < my_tiles)
          def _():
            each_copy(i + 1, q_rows, load)

          plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        accs = (acc,)
        if len(column_steps) > 1:
          accs = tuple(
            acc[:, i * columns : (i + 1) * columns] for i in column_steps
          )
        if merging:
          accs, m_i, l_i, merge_step = lax.fori_loop(
            0, g.pack_slots, merge, (accs, m_i, l_i, merge_step)
          )

        sees = chosen_by(seeing)
        bad_key, bad_value = chosen_by(bad_keys), chosen_by(bad_values)
        factor = jnp.where(bad_key | bad_value, jnp.nan, 1.0 / l_i)
        accs = [x * _over_columns(factor, columns) for x in accs]
        accs = [jnp.where(_over_columns(sees, columns), x, 0.0) for x in accs]
        # Only infinite scores can leave a query that sees keys without weight.
        log_l = jnp.where(bad_key | (l_i == 0.0), jnp.nan, jnp.log2(l_i))
        lse_rows = jnp.where(sees, (m_i + log_l) * mosaic.LN2, -jnp.inf)
        lse_gmem[batch_row, kv_head, pl.ds(first_row, ROWS)] = lse_rows
        step = min(columns, TILE_COLUMNS)
        for column in range(0, s.head_dim, step):
          x = accs[column // columns]
          if step < columns:
            x = x[:, column % columns : column % columns + step]
          part = out_whole.at[first_part + column // TILE_COLUMNS]
          if step < TILE_COLUMNS:
            part = part.at[:, pl.ds(column % TILE_COLUMNS, step)]
          part[...] = x.astype(s.dtype)
        plgpu.commit_smem()

        each_copy(i, out_rows, store)
        plgpu.commit_smem_to_gmem_group()
        if not ahead:
          plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        return kv_step + _times(num_shared, each), merge_step

      if ahead:

        @pl.when(my_tiles > 0)
        def _():
          each_copy(0, q_rows, load)

      lax.fori_loop(0, my_tiles, tile, (jnp.int32(0), jnp.int32(0)))
      plgpu.wait_smem_to_gmem(0)

    @pl.when(wg == 2)
    def _copy():
      plgpu.set_max_registers(40, action="decrease")

      def tile(i, steps):
        kv_step, merge_step = steps
        index, batch_row, kv_head, _ = locate(i)
        num_shared = counts_gmem[index, 1]

        def block(j, carry):
          step = kv_step + j
          slot = k_ring.slot(step)
          first_key = shared_gmem[index, _quotient(j, each)] * s.block_size
          if each > 1:
            first_key += lax.rem(j, each) * s.step_keys
          tokens = pl.ds(first_key, s.step_keys)
          k_ring.wait_free(step, slot)
          plgpu.copy_gmem_to_smem(
            k_gmem.at[batch_row, kv_head, tokens],
            k_smem.at[slot],
            k_ring.ready_at(slot),
          )
          v_ring.wait_free(step, slot)
          plgpu.copy_gmem_to_smem(
            v_gmem.at[batch_row, kv_head, tokens],
            v_smem.at[slot],
            v_ring.ready_at(slot),
          )
          return carry

        lax.fori_loop(0, _times(num_shared, each), block, None)

        def merge(choice, step):
          bits = [merge_gmem[index, h, choice] for h in range(2)]
          wanted = (bits[0] | bits[1]) != 0

          def copy(step, at=None):
            slot = o_ring.wait_free(step)
            plgpu.copy_gmem_to_smem(
              part_lse_gmem.at[index - first_tile, choice], l_smem.at[slot],
              o_ring.ready_at(slot),
            )  # fmt: skip
            for a in range(g.tile_packs):
              of_pack = bits[a // half] >> (a % half * g.pack)
              of_pack &= (1 << g.pack) - 1

              @pl.when(of_pack != 0)
              def _load(a=a):
                part = part_gmem.at[
                  (index - first_tile) * g.tile_packs + a, choice
                ]
                plgpu.copy_gmem_to_smem(
                  part if at is None else part.at[:, at],
                  o_smem.at[slot, a // half, pl.ds((a % half) * rows, rows)],
                  o_ring.ready_at(slot),
                )

              @pl.when(of_pack == 0)
              def _():
                o_ring.fill(slot)

          @pl.when(wanted)
          def _():
            if len(column_steps) == 1:
              copy(step)
            else:
              pl.loop(0, len(column_steps))(
                lambda i: copy(step + i, mosaic.span(i * columns, columns))
              )

          return step + _times(wanted.astype(jnp.int32), len(column_steps))

        if merging:
          merge_step = lax.fori_loop(0, g.pack_slots, merge, merge_step)
        return kv_step + _times(num_shared, each), merge_step

      kv_step, merge_step = lax.fori_loop(
        0, my_tiles, tile, (jnp.int32(0), jnp.int32(0))
      )
      mosaic.drain_rings(kv_step, k_ring)
      mosaic.drain_rings(kv_step, v_ring)
      if merging:
        mosaic.drain_rings(merge_step, o_ring)

  copies = g.half  # of a part of the queries
  if s.one_copy:
    copies = group_size if s.interpret else 1
  operands = dict(
    chunk_gmem=chunk_desc,
    positions_gmem=positions,
    counts_gmem=plan.counts,
    queries_gmem=plan.queries,
    shared_gmem=plan.shared,
    shared_by_gmem=plan.shared_by,
    q_gmem=q,
    k_gmem=k,
    v_gmem=v,
  )
  scratch: dict[str, Any] = dict(
    q_smem=mosaic.operand_of_rows(2 * num_parts, s.dtype, s.interpret),
    k_smem=s.operand(kv_stages, s.step_keys),
    v_smem=s.operand(kv_stages, s.step_keys),
    q_ready=plgpu.Barrier(num_arrivals=copies * num_parts, num_barriers=2),
    k_ring=mosaic.ring(kv_stages, releases=2),
    v_ring=mosaic.ring(kv_stages, releases=2),
  )
  if ahead:
    scratch |= dict(
      out_smem=mosaic.operand_of_rows(2 * num_parts, s.dtype, s.interpret)
    )
  if keys is not None:
    operands |= dict(keys_gmem=keys)
  if merging:
    parts, part_lse = partials
    operands |= dict(merge_gmem=merges, part_gmem=parts, part_lse_gmem=part_lse)
    scratch |= dict(
      o_smem=plgpu.SMEM(
        (merge_stages, 2, ROWS, columns), s.dtype, transforms=mosaic.OPERAND
      ),
      l_smem=plgpu.SMEM((merge_stages, 2 * ROWS), jnp.float32),
      o_ring=mosaic.ring(merge_stages, fills=g.tile_packs + 1, releases=2),
    )
  mosaic.launch(
    body,
    operands | dict(out_gmem=out, lse_gmem=lse),
    name="sparse_tiles_merge" if merging else "sparse_tiles",
    num_ctas=config.num_ctas,
    num_warpgroups=3,
    interpret=s.interpret,
    scratch=scratch | s.probs_scratch(2, s.step_keys),
  )


def geometry(
  q_len: int, kv_len: int, packing: mosaic.Packing, head_dim: int,
  block_size: int, top_k: int, config: Config, *, packed: bool = False,
  walk: bool = False,
) -> tile_plan.Geometry:  # fmt: skip
  """Sizes of tiles, spans and chunks for one call.

  Tiles that merge partial outputs hold whole packs. Where all blocks are
  walked, as many queries as fit share one: 10 of 6 heads in 64 MMA rows, where
  packs of 8 rows would be 8. (At most 32, whose bits fit one int32.)

  Args:
    q_len: T.
    kv_len: S.
    packing: of the queries.
    head_dim: D.
    block_size: tokens of a block.
    top_k: P.
    config: tile sizes.
    packed: whether rows are packed.
    walk: whether tiles have no pairs.
  """
  pack, pack_rows = packing.queries, packing.rows
  tile = 2 * ROWS // pack_rows * pack
  if walk:
    tile = 2 * min(ROWS // packing.group_size, mosaic.WORD)

  def round_up(x):
    return -(-x // tile) * tile

  most = MAX_WORKSPACE // (top_k * pack_rows * head_dim)
  if config.chunk:
    most = min(most, config.chunk)
  most = max(most // tile * tile, tile)
  chunk = round_up(-(-q_len // (-(-q_len // most))))
  num_blocks = -(-kv_len // block_size)
  # A block should be chosen by about 64 queries of a span, and a span's queries
  # of one group (4 KB each at G 16, D 128) should fit L2 beside streamed data.
  span = config.span
  if not span:
    wanted = 64 * num_blocks // top_k
    fits = (32 << 20) // (pack_rows * head_dim * 2) * pack
    span = max(wanted, fits // 2) if wanted <= fits else chunk
  return tile_plan.Geometry(
    num_blocks=num_blocks,
    block_size=block_size,
    top_k=top_k,
    pack=pack,
    chunk=chunk,
    tile=tile,
    span=min(round_up(span), chunk),
    task=config.task,
    # A pair costs its bytes, a shared block its MMA rows.
    shared_cost=config.shared_cost * 16 / pack_rows,
    slack=config.slack,
    # In packed rows every block of a tile may be an own one, or end early.
    **(dict(masked=tile * top_k) if packed else {}),
  )


class _Plan(NamedTuple):
  """A plan of tiles, and where their queries are.

  Attributes:
    tiles: plan of the tiles of all groups.
    choices: that pairs are found in; None if the plan is one of blocks.
    positions: as `_tiles` takes them.
    num_chunks: chunks of a group's queries.
  """

  tiles: tile_plan.TilePlan
  choices: tile_plan.SortedChoices | None
  positions: Int[Array, "B ..."]
  num_chunks: int


def _plan(
  block_indices: Int[Array, "B K T P"],
  first_bad: Int[Array, "B K 2 N"],
  kv_lengths: Int[Array, "B"],
  packed: packed_rows.PackedRows | None,
  g: tile_plan.Geometry,
  by_block: bool,
) -> _Plan:
  """Plans the tiles of `forward`'s operands."""
  b, num_kv_heads, t, top_k = block_indices.shape
  num_chunks = -(-t // g.chunk)
  padded = num_chunks * g.chunk
  pad = padded - t
  if pad:
    block_indices = jnp.pad(
      block_indices, ((0, 0), (0, 0), (0, pad), (0, 0)), constant_values=-1
    )
  if packed is None:
    where, keys = kv_lengths - t, None
    positions = where[:, None] + jnp.arange(padded)[None]
  else:
    positions = jnp.pad(
      packed.positions, ((0, 0), (0, pad)), constant_values=-1
    )
    each = rows_of_query(g)
    where = jnp.repeat(positions.reshape(b, -1, g.half), each, axis=2)
    behind = ((0, 0), (0, 0), (0, ROWS - each * g.half))
    where = jnp.pad(where, behind, constant_values=-1).reshape(b, -1)
    keys = jnp.repeat(packed.keys, num_kv_heads, axis=0)
  arguments = (
    block_indices.reshape(-1, padded, top_k),
    jnp.repeat(positions, num_kv_heads, axis=0),
    first_bad.reshape(-1, 2, g.num_blocks),
    g,
    keys,
  )
  if by_block:
    return _Plan(tile_plan.plan_by_block(*arguments), None, where, num_chunks)
  return _Plan(*tile_plan.plan_by_choice(*arguments), where, num_chunks)


def forward(
  q: Float[Array, "B T H D"],
  k: Float[Array, "B K S D"],
  v: Float[Array, "B K S D"],
  first_bad: Int[Array, "B K 2 N"],
  block_indices: Int[Array, "B K T P"],
  kv_lengths: Int[Array, "B"],
  packed: packed_rows.PackedRows | None = None,
  *,
  block_size: int,
  scale: float,
  config: Config,
  interpret: bool,
) -> tuple[Float[Array, "B T H D"], Float[Array, "B H T"]]:
  """out and the natural lse.

  Args:
    q: queries.
    k: finite keys, head-major, whole blocks.
    v: the same of values.
    first_bad: position of the first non-finite key (0) and value (1) of each
      block, `mosaic.NEVER` if all are finite.
    block_indices: chosen blocks, in any order.
    kv_lengths: number of keys; the queries are the last of them.
    packed: places of packed rows, which then say where the queries are.
    block_size: tokens of a block.
    scale: of the scores.
    config: tile sizes.
    interpret: run on the CPU.
  """
  b, t, num_heads, d = q.shape
  num_kv_heads, s_len = k.shape[1:3]
  top_k = block_indices.shape[-1]
  packing = mosaic.Packing(num_heads // num_kv_heads)
  # If some tile has pairs, all tiles are planned again where the first plan's
  # tiles are no whole packs, or its choices are not sorted.
  walk, g = (
    geometry(
      t, s_len, packing, d, block_size, top_k, config,
      packed=packed is not None, walk=walk,
    )
    for walk in (True, False)
  )  # fmt: skip
  params = functools.partial(
    KernelParams,
    q_len=t,
    num_kv_heads=num_kv_heads,
    packing=packing,
    head_dim=d,
    block_size=block_size,
    dtype=jnp.dtype(q.dtype),
    scale_log2=scale * mosaic.LOG2E,
    config=config,
    interpret=interpret,
  )
  plan_of = functools.partial(
    _plan, block_indices, first_bad, kv_lengths, packed
  )
  first_plan = plan_of(walk, by_block=walk.few_blocks)
  keys = None if packed is None else packed.keys

  def new(sizes, dtype):
    return jax.new_ref(lax.empty(sizes, dtype))

  def results(plan, g):
    rows = plan.num_chunks * (g.chunk // g.half) * ROWS
    return (
      new(q.shape, q.dtype),
      new((b, num_kv_heads, rows), jnp.float32),
    )

  def read(out, lse, g):
    each = rows_of_query(g)
    lse = mosaic.result(lse).reshape(b, num_kv_heads, -1, ROWS)
    lse = lse[..., : each * g.half].reshape(b, num_kv_heads, -1, each)
    lse = lse[:, :, :t, : packing.group_size].swapaxes(2, 3)
    return mosaic.result(out), lse.reshape(b, num_heads, t)

  def walk_all():
    tiles = first_plan.tiles
    out, lse = results(first_plan, walk)
    _tiles(
      out, lse, None, jnp.zeros((1,), jnp.int32), first_plan.positions, keys,
      tiles, None, q, k, v, num_tiles=tiles.counts.shape[0],
      params=params(geometry=walk),
    )  # fmt: skip
    return read(out, lse, walk)

  def mixed():
    plan = first_plan
    if g != walk or plan.choices is None:
      plan = plan_of(g, by_block=False)
    tiles, choices, positions, num_chunks = plan
    assert choices is not None
    chunk_tiles, chunk_packs = g.chunk // g.tile, g.chunk // g.pack
    packed_q = packing.pack(q, num_kv_heads)
    out, lse = results(plan, g)
    partials = (
      new((chunk_packs, g.pack_slots, packing.rows, d), q.dtype),
      new((chunk_tiles, g.pack_slots, 2 * ROWS), jnp.float32),
    )
    is_pair = tile_plan.find_pairs(choices, g)
    merges = tile_plan.plan_merges(choices, is_pair, g)
    total = b * num_kv_heads * num_chunks
    # One sort plans as many chunks as its workspace allows.
    planned = mosaic.largest_divisor(total, MAX_PLANNED // (g.chunk * top_k))

    def some_chunks(i, carry):
      def cut(x):
        x = x.reshape(total, chunk_tiles, g.tile * top_k)
        return lax.dynamic_slice_in_dim(x, i * planned, planned)

      pairs = tile_plan.plan_pairs(cut(choices.choices), cut(is_pair), g)

      def chunk(j, carry):
        index = i * planned + j
        group_index = index // num_chunks
        chunk_desc = jnp.stack(
          [
            index * chunk_tiles,
            group_index // num_kv_heads,
            group_index % num_kv_heads,
            index % num_chunks * chunk_packs,
            pairs.chunks[j, 0],
            pairs.chunks[j, 1],
          ]
        ).astype(jnp.int32)
        _pairs(
          partials, chunk_desc, pairs, packed_q, k, v, params=params(geometry=g)
        )
        _tiles(
          out, lse, partials, chunk_desc, positions, keys, tiles, merges, q, k,
          v, num_tiles=chunk_tiles, params=params(geometry=g),
        )  # fmt: skip
        return carry

      return lax.fori_loop(0, planned, chunk, carry)

    lax.fori_loop(0, total // planned, some_chunks, None)
    return read(out, lse, g)

  if walk.shared_cost == 0:
    return walk_all()
  return lax.cond(jnp.any(first_plan.tiles.has_pairs), mixed, walk_all)
