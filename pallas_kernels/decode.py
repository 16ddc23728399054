"""One step of decoding on a Hopper GPU: choose blocks of a cache, then attend.

For each batch row b, the T queries are its newest tokens, at positions
kv_lengths[b] - T + t. For query t and group g (arXiv 2606.13392):

  s(j) = index_q[t, g] . index_k[j]       float32, visible keys j only
  block score = max of s over the block's visible keys
  choice = the num_local_blocks newest blocks up to the query's own (forced),
           then the blocks of highest score; ties go to the lower id
  out = softmax(scale q.k) v over the visible tokens of the chosen blocks

With fp8 index keys, one float32 scale a key, index_q is rounded to e4m3 in the
kernel: s(j) = index_k_scale[j] (e4m3(index_q / qs) . index_k[j]) qs, where
qs = max |index_q| / 448 of that query and group.

Two launches:

* **scan** reads the index keys once for all T x K rows. Their tiles are
  numbered row after row of the batch, and each CTA gets an equal, contiguous
  share of them, so ragged batches balance. Warpgroup roles:
    copy    fills a ring of key tiles by TMA; all shared memory is in flight.
    score   (two) wgmma of the index queries, padded to 64 rows, with a tile.
            Queries are the M side: the maximum over a block's keys is then
            taken inside a warp. The tensor cores have time for the padding.
    choose  keeps each row's best blocks in registers, one row a thread, and
            leaves them as a sorted list for every share.
* **attend** has a CTA for each (batch row, token, group) and split. All splits
  merge the same lists (32 lanes hold up to five lists each, one each if a row
  has no more; the best head is popped until P blocks are found), then each
  attends to its part of the blocks: one warpgroup merges lists and copies, the
  other one computes. The splits of a row wait for each other's partial results,
  and each warpgroup merges some of the heads, in a fixed order.

The wait inside attend needs the splits of a row on the GPU at the same time.
They are there, as anything split has no more CTAs than multiprocessors; where
`Config.splits` asks for more, a third launch merges instead.

Bound: reading the index keys (256 bytes a token in bf16, 132 in fp8), then
2 P block_size D elements of K and V a group, both from memory. Shared memory at
I = D = 128: scan 32 KiB of queries (48 with fp8 keys) and the rest tiles,
attend 16 KiB of queries, K and V blocks of 64 KiB, 16 or 32 KiB of results.

Slots from kv_lengths[b] on do not exist: what they hold, NaN included, changes
nothing. A visible NaN or infinity in q, k or v makes its query's rows NaN; a
block whose index scores hold NaN is not chosen unless forced. Capacities that
are no multiple of 8 are padded by a copy on every call. There is no gradient.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import mosaic
from pallas_kernels.select_blocks import sort_network

ACC = plgpu.WGMMAAccumulatorRef
ROWS = 64  # of a wgmma tile
FLOOR = -1e30  # below any score; keeps (-inf) - (-inf) out of the softmax
LOWEST = float(jnp.finfo(jnp.float32).min)
NO_KEY = -(1 << 31)
NO_BLOCK = (1 << 31) - 1
FP8 = jnp.float8_e4m3fn
FP8_MAX = 448.0
MERGE_SLOTS = 16  # longest list of which a lane holds five in registers
STEP_KEYS = 128  # index keys of a tile
SCORERS = 2  # warpgroups that score, which take turns
LANES = 32  # of a warp
LENGTHS_AT_ONCE = 32  # of batch rows, read side by side
MERGE_ROUNDS = 5  # blocks found before the lists in registers are cut shorter


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Tile sizes and shares; the result changes by rounding only.

  Attributes:
    stages: tiles in flight, an even number; 0 takes what shared memory holds.
    unit: tokens of an attention step, 64 or block_size; 0 lets the number of
      rows decide.
    splits: most CTAs that share a row's blocks; 0 fills the GPU.
    num_ctas: of scan; 0 takes the number of multiprocessors.
  """

  stages: int = 0
  unit: int = 0
  splits: int = 0
  num_ctas: int = 0

  def __post_init__(self):
    if self.stages % SCORERS:
      raise ValueError(f"stages must be even, got {self.stages}")


def heuristic_config() -> Config:
  """The configuration used when none is given."""
  return Config()


def candidate_configs() -> tuple[Config, ...]:
  """Configurations worth timing, for tests and tuning."""
  return (
    Config(),
    Config(stages=4),
    Config(unit=128),
    Config(unit=64, splits=32),
  )


@dataclasses.dataclass(frozen=True)
class Shape:
  """Static sizes of one call."""

  batch: int
  tokens: int
  num_kv_heads: int
  group_size: int
  head_dim: int
  index_dim: int
  capacity: int
  block_size: int
  top_k: int
  local_blocks: int  # forced ones, at most what P and the capacity allow
  scale_log2: float
  dtype: jnp.dtype
  index_dtype: jnp.dtype  # of index_q
  key_dtype: jnp.dtype  # of index_k
  config: Config
  interpret: bool

  @property
  def num_blocks(self) -> int:
    return pl.cdiv(self.capacity, self.block_size)

  @property
  def slots(self) -> int:
    """Blocks that are chosen by score."""
    return min(self.top_k, self.num_blocks) - self.local_blocks

  @property
  def rows(self) -> int:
    """Index queries of a batch row."""
    return self.tokens * self.num_kv_heads

  @property
  def list_rows(self) -> int:
    """`rows`, rounded up to what the choosing registers are laid out for."""
    return max(8, 1 << (self.rows - 1).bit_length())

  @property
  def tile_rows(self) -> int:
    """`rows`, padded for wgmma."""
    return max(ROWS, self.list_rows)

  @property
  def fp8(self) -> bool:
    return self.key_dtype == FP8

  @property
  def scan_ctas(self) -> int:
    return self.config.num_ctas or mosaic.num_sms()

  @property
  def window(self) -> int:
    """Lists that are merged at once: as many as one batch row can have."""
    width = LANES if self.slots <= MERGE_SLOTS else 128
    return pl.cdiv(self.scan_ctas, width) * width

  @property
  def num_lists(self) -> int:
    """Lists of all shares, and a window's worth of space behind them."""
    return self.scan_ctas + self.batch - 1 + self.window

  @property
  def heads(self) -> int:
    """Rows of q and out that are copied at once: a swizzle tile has 8."""
    return max(8, self.group_size)

  @property
  def attend_rows(self) -> int:
    return self.batch * self.rows

  @property
  def unit(self) -> int:
    """Tokens of an attention step."""
    if self.config.unit:
      return min(self.config.unit, self.block_size)
    # Half blocks where there are too few blocks for the multiprocessors.
    few = 2 * self.attend_rows * self.top_k <= mosaic.num_sms()
    return 64 if few else self.block_size

  @property
  def units(self) -> int:
    """Attention steps of a row."""
    return self.top_k * (self.block_size // self.unit)

  @property
  def share(self) -> int:
    """Attention steps of a split."""
    most = self.config.splits or mosaic.num_sms() // self.attend_rows
    return pl.cdiv(self.units, min(max(most, 1), self.units))

  @property
  def splits(self) -> int:
    return pl.cdiv(self.units, self.share)

  @property
  def separate_merge(self) -> bool:
    """Whether a kernel of its own merges the splits."""
    fits = self.attend_rows * self.splits <= mosaic.num_sms()
    return self.splits > 1 and (self.interpret or not fits)


# ---- Register layouts of vectors ----


def _lanes(width: int) -> Any:
  """A layout of vectors of any multiple of `width` elements.

  Up to 32: each warp holds the whole vector, one element a lane. 64 and more:
  one element a thread of two or four warps.
  """
  warps = max(1, min(width, 128) // 32)
  lanes = min(width, 32)
  tiles = [(min(width, 128),), (32,), (1,)] if warps > 1 else [(lanes,), (1,)]
  warp_dims: tuple = (-3,) if warps > 1 else ()
  if warps < 4:
    warp_dims = (plgpu.Replicated(4 // warps), *warp_dims)
  lane_dims: tuple = (-2,)
  if lanes < 32:
    lane_dims = (plgpu.Replicated(32 // lanes), -2)
  return plgpu.Layout.TILED(
    plgpu.Tiling(tuple(tiles)),
    warp_dims=warp_dims,
    lane_dims=lane_dims,
    vector_dim=-1,
  )


def _full(value: float, shape: tuple[int, ...], dtype: Any, layout: Any) -> Any:
  return plgpu.layout_cast(jnp.full(shape, value, dtype), layout)


def _over_columns(x, width: int):
  return lax.broadcast_in_dim(x, (x.shape[0], width), [0])


# ---- Which CTA scans what ----


def _tiles_of(length, s: Shape):
  """Tiles that hold a block which some query of the batch row may choose."""
  length = jnp.clip(length, 0, s.capacity)
  # Of the last query; the own block of an empty row is -1.
  own = lax.div(length + s.block_size - 1, s.block_size) - 1
  limit = jnp.clip(own + 1 - s.local_blocks, 0, s.num_blocks)
  return lax.div(limit * s.block_size + STEP_KEYS - 1, STEP_KEYS)


def _fold_rows(lengths_gmem, s: Shape, update: Callable, carry: Any) -> Any:
  """update(b, tiles of b, carry) over the batch."""
  chunk = min(s.batch, LENGTHS_AT_ONCE)

  def run(i, carry):
    rows = [i * chunk + j for j in range(chunk)]
    tiles = [
      _tiles_of(lengths_gmem[jnp.minimum(b, s.batch - 1)], s) for b in rows
    ]
    for b, count in zip(rows, tiles, strict=True):
      carry = update(b, jnp.where(b < s.batch, count, 0), carry)
    return carry

  chunks = pl.cdiv(s.batch, chunk)
  if chunks == 1:
    return run(0, carry)
  return lax.fori_loop(0, chunks, run, carry)


def _total_tiles(lengths_gmem, s: Shape):
  return _fold_rows(
    lengths_gmem, s, lambda _, tiles, total: total + tiles, jnp.int32(0)
  )


def _each_segment(lengths_gmem, cta, s: Shape, body: Callable) -> Any:
  """Runs body(b, first tile of b, tiles, steps before) over a CTA's share.

  Returns the number of all steps. Roles that call this agree on the steps.
  """
  total = _total_tiles(lengths_gmem, s)
  share, extra = lax.div(total, s.scan_ctas), lax.rem(total, s.scan_ctas)
  low = cta * share + jnp.minimum(cta, extra)
  high = low + share + (cta < extra).astype(jnp.int32)

  def find(b, tiles, carry):
    first, before = carry
    passed = (first == b) & (before + tiles <= low)
    return (
      jnp.where(passed, b + 1, first),
      jnp.where(passed, before + tiles, before),
    )

  start = (jnp.int32(0), jnp.int32(0))
  b, before = _fold_rows(lengths_gmem, s, find, start)

  def segment(state):
    b, before, steps = state
    tiles = _tiles_of(lengths_gmem[b], s)
    first = jnp.maximum(low, before)
    count = jnp.minimum(high, before + tiles) - first
    body(b, first - before, count, steps)
    return b + 1, before + tiles, steps + count

  _, _, steps = lax.while_loop(
    lambda state: (low < high) & (state[1] < high),
    segment,
    (b, before, jnp.int32(0)),
  )
  return steps


def _lists_of(lengths_gmem, b, s: Shape):
  """First list and number of lists that hold a batch row's best blocks.

  CTA c leaves batch row b's list at c + b: going through the shares, every next
  list has a higher c or a higher b.
  """
  total = _total_tiles(lengths_gmem, s)
  share, extra = lax.div(total, s.scan_ctas), lax.rem(total, s.scan_ctas)

  def find(row, tiles, carry):
    before, mine = carry
    return (
      before + jnp.where(row < b, tiles, 0),
      jnp.where(row == b, tiles, mine),
    )

  before, tiles = _fold_rows(
    lengths_gmem, s, find, (jnp.int32(0), jnp.int32(0))
  )

  def owner(tile):
    large = extra * (share + 1)
    return jnp.where(
      tile < large,
      lax.div(tile, share + 1),
      extra + lax.div(tile - large, jnp.maximum(share, 1)),
    )

  first = owner(before)
  count = owner(before + tiles - 1) - first + 1
  return first + b, jnp.where(tiles > 0, count, 0)


# ---- Scores and lists ----


def _scan_scratch(s: Shape) -> dict[str, Any]:
  """Shared memory and barriers of scan."""
  size = jnp.dtype(s.key_dtype).itemsize
  swizzle = min(s.index_dim * size, 128)
  transforms = (
    plgpu.TilingTransform((8, swizzle // size)),  # pyright: ignore
    plgpu.SwizzleTransform(swizzle),  # pyright: ignore
  )
  blocks = STEP_KEYS // s.block_size
  q_shape = (SCORERS, s.tile_rows, s.index_dim)
  stage_bytes = STEP_KEYS * s.index_dim * size
  stage_bytes += blocks * s.tile_rows * 4
  # Barriers, and the alignment of all buffers to 1 KiB.
  fixed = math.prod(q_shape) * jnp.dtype(s.index_dtype).itemsize + 1536
  if s.fp8:
    stage_bytes += STEP_KEYS * 4
    fixed += math.prod(q_shape) + 1024
  stages = (mosaic.SMEM_LIMIT - fixed) // stage_bytes
  stages = min(stages, s.config.stages or 16) // SCORERS * SCORERS
  if stages < SCORERS:
    raise NotImplementedError(
      "mosaic_gpu decode_attention does not fit shared memory with"
      f" {s.rows} index queries a row"
    )
  scratch = dict(
    q_smem=plgpu.SMEM(q_shape, s.index_dtype, transforms=mosaic.OPERAND),
    k_smem=plgpu.SMEM(
      (stages, STEP_KEYS, s.index_dim),
      s.key_dtype,
      transforms=transforms,
    ),
    max_smem=plgpu.SMEM((stages, blocks, s.tile_rows), jnp.float32),
    q_ready=plgpu.Barrier(num_barriers=SCORERS),
    k_ready=plgpu.Barrier(num_arrivals=1 + s.fp8, num_barriers=stages),
    max_ready=plgpu.Barrier(num_barriers=stages),
    free=plgpu.Barrier(num_barriers=stages),
  )
  if s.fp8:
    scratch |= dict(
      q8_smem=plgpu.SMEM(q_shape, s.key_dtype, transforms=transforms),
      scale_smem=plgpu.SMEM((stages, STEP_KEYS), jnp.float32),
    )
  return scratch


def _scan(index_q, index_k, index_k_scale, lengths, outputs, s: Shape) -> None:
  """Fills the lists: score codes and block ids, [rows, slots, lists] each.

  `outputs`: Refs of the codes, the ids and the counters that attend's splits
  wait on, which are set to 0.
  """
  bs, blocks = s.block_size, STEP_KEYS // s.block_size
  layout = plgpu.Layout.WGMMA
  scratch = _scan_scratch(s)
  stages = scratch["k_smem"].shape[0]

  def body(*refs, **smem):
    q_gmem, k_gmem, *refs = refs
    scale_gmem = None
    if s.fp8:
      scale_gmem, *refs = refs
    lengths_gmem, codes_gmem, ids_gmem, counters_gmem = refs
    q_smem, k_smem, max_smem = smem["q_smem"], smem["k_smem"], smem["max_smem"]
    q_ready, k_ready = smem["q_ready"], smem["k_ready"]
    max_ready, free = smem["max_ready"], smem["free"]
    cta, wg = lax.axis_index("cta"), lax.axis_index("wg")
    each_segment = functools.partial(_each_segment, lengths_gmem, cta, s)

    def first_position(b):
      return jnp.clip(lengths_gmem[b], 0, s.capacity) - s.tokens

    @pl.when(wg < SCORERS)
    def _score():
      plgpu.set_max_registers(152, action="increase")

      def load_queries(b):
        """Index queries as a wgmma operand, and each row's fp8 scale."""
        # No warp of this group reads the queries of the batch row before.
        plgpu.commit_smem()
        start = cta * 0  # rows beyond the last one are filled with zeros
        plgpu.copy_gmem_to_smem(
          q_gmem.at[b, pl.ds(start, s.tile_rows)],
          q_smem.at[wg],
          q_ready.at[wg],
        )
        plgpu.barrier_wait(q_ready.at[wg])
        if not s.fp8:
          return q_smem, []
        scales = []
        for m in range(s.tile_rows // ROWS):
          rows = pl.ds(m * ROWS, ROWS)
          x = plgpu.load(q_smem.at[wg, rows], layout=layout)
          x = x.astype(jnp.float32)
          scale = jnp.abs(x).max(axis=1) / FP8_MAX
          scale = jnp.where(scale > 0, scale, 1.0)
          x = x / _over_columns(scale, s.index_dim)
          smem["q8_smem"][wg, rows] = x.astype(s.key_dtype)
          scales.append(scale)
        plgpu.commit_smem()
        return smem["q8_smem"], scales

      def segment(b, first_tile, count, steps):
        operand, scales = load_queries(b)
        position = first_position(b)

        # The groups take turns, across batch rows.
        mine = lax.rem(wg + SCORERS - lax.rem(steps, SCORERS), SCORERS)

        def tile(j, carry):
          i = mine + j * SCORERS
          slot = lax.rem(steps + i, stages)
          plgpu.barrier_wait(k_ready.at[slot])
          for m in range(s.tile_rows // ROWS):
            rows = pl.ds(m * ROWS, ROWS)

            def product(acc, rows=rows):
              plgpu.wgmma(
                acc, operand.at[wg, rows], k_smem.at[slot].transpose((1, 0))
              )
              return acc[...]

            x = pl.run_scoped(product, ACC((ROWS, STEP_KEYS), jnp.float32))
            if s.fp8:
              key_scale = plgpu.load(
                smem["scale_smem"].at[slot], layout=layout.reduce(0)
              )
              x = x * lax.broadcast_in_dim(key_scale, x.shape, [1])
            if s.local_blocks == 0:
              # Blocks that are not wholly visible compete.
              key = (
                plgpu.broadcasted_iota(jnp.int32, x.shape, 1, layout=layout)
                + (first_tile + i) * STEP_KEYS
              )
              row = (
                plgpu.broadcasted_iota(jnp.int32, x.shape, 0, layout=layout)
                + m * ROWS
              )
              last = position + lax.div(row, s.num_kv_heads)
              x = jnp.where(key <= last, x, -jnp.inf)
            for n in range(blocks):
              best = x[:, n * bs : (n + 1) * bs].max(axis=1)
              if scales:
                best = best * scales[m]
              max_smem[slot, n, rows] = best
          plgpu.barrier_arrive(max_ready.at[slot])
          return carry

        tiles = lax.div(count - mine + SCORERS - 1, SCORERS)
        lax.fori_loop(0, tiles, tile, None)

      each_segment(segment)

    @pl.when(wg == SCORERS)
    def _choose():
      plgpu.set_max_registers(136, action="increase")
      lanes = _lanes(s.list_rows)
      shape = (s.list_rows,)

      @pl.when(cta == 0)
      def _():
        for i in range(counters_gmem.shape[0] // 128):
          counters_gmem[pl.ds(i * 128, 128)] = jnp.zeros((128,), jnp.int32)

      def segment(b, first_tile, count, steps):
        row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=lanes)
        position = first_position(b) + lax.div(row, s.num_kv_heads)
        own = jnp.where(position < 0, -1, lax.div(position, bs))
        limit = own + 1 - s.local_blocks

        def tile(i, best):
          slot = lax.rem(steps + i, stages)
          plgpu.barrier_wait(max_ready.at[slot])
          maxima = [
            plgpu.load(
              max_smem.at[slot, n, pl.ds(0, s.list_rows)], layout=lanes
            )
            for n in range(blocks)
          ]
          plgpu.barrier_arrive(free.at[slot])
          for n, m in enumerate(maxima):
            block = (first_tile + i) * blocks + n
            # A visible block that scores -inf goes before no block, and -0
            # equals 0. NaN compares false everywhere and is not inserted.
            m = jnp.where(m == 0.0, 0.0, jnp.maximum(m, LOWEST))
            m = jnp.where(block < limit, m, jnp.nan)
            best = _insert(best, m, block)
          return best

        best = (
          tuple(
            _full(-jnp.inf, shape, jnp.float32, lanes) for _ in range(s.slots)
          ),
          tuple(
            _full(NO_BLOCK, shape, jnp.int32, lanes) for _ in range(s.slots)
          ),
        )
        values, ids = lax.fori_loop(0, count, tile, best)
        for j in range(s.slots):
          bits = lax.bitcast_convert_type(values[j], jnp.int32)
          code = jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
          code = jnp.where(ids[j] == NO_BLOCK, NO_KEY, code)
          mosaic.store(codes_gmem.at[:, j, cta + b], code)
          mosaic.store(ids_gmem.at[:, j, cta + b], ids[j])

      each_segment(segment)

    @pl.when(wg == SCORERS + 1)
    def _copy():
      plgpu.set_max_registers(40, action="decrease")

      def segment(b, first_tile, count, steps):
        def tile(i, carry):
          step = steps + i
          slot = lax.rem(step, stages)
          keys = pl.ds((first_tile + i) * STEP_KEYS, STEP_KEYS)

          @pl.when(step >= stages)
          def _():
            plgpu.barrier_wait(free.at[slot])

          plgpu.copy_gmem_to_smem(
            k_gmem.at[b, keys], k_smem.at[slot], k_ready.at[slot]
          )
          if scale_gmem is not None:
            plgpu.copy_gmem_to_smem(
              scale_gmem.at[b, keys], smem["scale_smem"].at[slot],
              k_ready.at[slot],
            )  # fmt: skip
          return carry

        lax.fori_loop(0, count, tile, None)

      steps = each_segment(segment)
      mosaic.drain(free, steps)

  mosaic.launch(
    body,
    index_q,
    index_k,
    *([index_k_scale] if s.fp8 else []),
    lengths,
    *outputs,
    name="decode_scan",
    num_ctas=s.scan_ctas,
    num_warpgroups=SCORERS + 2,
    scratch=scratch,
    interpret=s.interpret,
    auto_barriers=False,
    reduction_scratch=0,
  )


def _insert(best, value, block):
  """Puts a candidate into lists sorted by falling value.

  It goes behind its equals, which came earlier and so have lower ids.
  """
  values, ids = best
  above = [value > v for v in values]
  block = jnp.broadcast_to(block, value.shape)
  new_values, new_ids = [], []
  for j in range(len(values)):
    new_value = jnp.where(above[j], value, values[j])
    new_id = jnp.where(above[j], block, ids[j])
    if j:
      new_value = jnp.where(above[j - 1], values[j - 1], new_value)
      new_id = jnp.where(above[j - 1], ids[j - 1], new_id)
    new_values.append(new_value)
    new_ids.append(new_id)
  return tuple(new_values), tuple(new_ids)


# ---- Choice and attention ----


def _merge_lists(codes: list, ids: list, chosen_smem, offset: int) -> None:
  """Writes the ids of the best blocks of many sorted lists, then NO_BLOCK.

  codes[j] and ids[j] hold the j-th best of every list. The list whose head is
  best (and of equal ones, has the lowest id) gives it up and moves up.
  """
  taken, slots = 0, len(codes)
  while taken < slots:
    # What cannot be chosen any more is not moved: parts of a few rounds.
    rounds = min(MERGE_ROUNDS, slots - taken)

    def pop(i, heads, taken=taken):
      codes, ids = heads
      top = codes[0].max()
      # The lowest id is the highest complement.
      head = ~jnp.where(codes[0] == top, ~ids[0], NO_KEY).max()
      chosen_smem[offset + taken + i] = jnp.where(top == NO_KEY, NO_BLOCK, head)
      won = ids[0] == head
      return tuple(
        (*(jnp.where(won, *pair) for pair in zip(x[1:], x)), x[-1])
        for x in heads
      )

    codes, ids = lax.fori_loop(
      0,
      rounds,
      pop,
      (tuple(codes[: slots - taken]), tuple(ids[: slots - taken])),
    )
    taken += rounds


class _Row(NamedTuple):
  """A query and group: batch row, token, group, and the token's position."""

  b: Any
  token: Any
  group: Any
  position: Any


def _locate(row, lengths_gmem, s: Shape) -> _Row:
  b, r = lax.div(row, s.rows), lax.rem(row, s.rows)
  token = lax.div(r, s.num_kv_heads)
  length = jnp.clip(lengths_gmem[b], 0, s.capacity)
  return _Row(b, token, lax.rem(r, s.num_kv_heads), length - s.tokens + token)


def _attend_scratch(s: Shape) -> dict[str, Any]:
  """Shared memory and barriers of attend."""
  d, size = s.head_dim, jnp.dtype(s.dtype).itemsize
  split = s.splits > 1
  out_transforms: Sequence[Any] = mosaic.OPERAND
  if split:
    out_transforms = (
      plgpu.TilingTransform((8, 32)),  # pyright: ignore
      plgpu.SwizzleTransform(128),  # pyright: ignore
    )
  fixed = ROWS * d * (size + (4 if split else size)) + 4096
  stages = (mosaic.SMEM_LIMIT - fixed) // (2 * s.unit * d * size)
  stages = min(stages, s.share)
  kv = (stages, s.unit, d)
  scratch = dict(
    q_smem=plgpu.SMEM((ROWS, d), s.dtype, transforms=mosaic.OPERAND),
    k_smem=plgpu.SMEM(kv, s.dtype, transforms=mosaic.OPERAND),
    v_smem=plgpu.SMEM(kv, s.dtype, transforms=mosaic.OPERAND),
    o_smem=plgpu.SMEM(
      (ROWS, d), jnp.float32 if split else s.dtype, transforms=out_transforms
    ),
    ids_smem=plgpu.SMEM((s.top_k + 1,), jnp.int32),
    q_ready=plgpu.Barrier(),
    ids_ready=plgpu.Barrier(),
    k_ready=plgpu.Barrier(num_barriers=stages),
    v_ready=plgpu.Barrier(num_barriers=stages),
    k_free=plgpu.Barrier(num_barriers=stages),
    v_free=plgpu.Barrier(num_barriers=stages),
  )
  if s.interpret:  # takes no wgmma operand from registers
    scratch["p_smem"] = plgpu.SMEM(
      (ROWS, s.unit), s.dtype, transforms=mosaic.OPERAND
    )
  return scratch


def _merge_splits(row, first, step, lengths_gmem, refs, s: Shape) -> None:
  """Merges heads `first`, `first + step`, ... of a row from its splits."""
  part_gmem, stats_gmem, out_gmem = refs
  where = _locate(row, lengths_gmem, s)
  lanes = _lanes(LANES)

  def read(h):
    """m, l and partial results of a head's splits."""
    return (
      [stats_gmem[row, n, 0, h] for n in range(s.splits)],
      [stats_gmem[row, n, 1, h] for n in range(s.splits)],
      [
        plgpu.load(part_gmem.at[row, n, h], layout=lanes, optimized=False)
        for n in range(s.splits)
      ],
    )

  def write(h, m, l, parts):
    top = functools.reduce(jnp.maximum, m)
    weights = [jnp.exp2(x - top) for x in m]
    total = sum(a * b for a, b in zip(weights, l, strict=True))
    out = sum(a * b for a, b in zip(weights, parts, strict=True))
    mosaic.store(
      out_gmem.at[where.b, where.token, where.group, h], _finish(out, total, s)
    )

  # What every caller has to do is read at once.
  heads = [first + i * step for i in range(s.group_size // step)]
  for h, values in [(h, read(h)) for h in heads]:
    write(h, *values)
  if s.group_size % step:
    last = first + len(heads) * step

    @pl.when(last < s.group_size)
    def _():
      write(last, *read(last))


def _finish(acc, total, s: Shape):
  """The output of rows whose weights sum to `total` (0: nothing was seen)."""
  factor = jnp.where(total == 0, 0.0, 1.0 / total)
  out = acc * (_over_columns(factor, s.head_dim) if acc.ndim == 2 else factor)
  # A value that is not finite shows in its column only; it is the row's.
  bad = (out * 0.0).sum(axis=-1)
  out += _over_columns(bad, s.head_dim) if acc.ndim == 2 else bad
  return out.astype(s.dtype)


def _signal(counter) -> None:
  """Adds 1 to a counter, after all that this warpgroup wrote."""

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
  def signal(*args):
    mgpu_utils.warpgroup_barrier()
    pointer = mgpu_utils.memref_ptr(args[-1])
    mgpu_utils.SemaphoreRef(pointer).signal(1, memory_scope="gpu")

  signal(counter)


def _wait_for(counter, value: int) -> None:
  """Waits until a counter holds `value`."""

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
  def wait(*args):
    pointer = mgpu_utils.memref_ptr(args[-1])
    mgpu_utils.SemaphoreRef(pointer).wait(
      value, decrement=False, memory_scope="gpu"
    )

  wait(counter)


def _attend(q, k, v, lengths, codes, ids, outputs, s: Shape) -> None:
  """Chooses from the lists, attends, and merges the splits.

  `outputs`: Refs of out, block_indices, counters, partial results and their
  (m, l).
  """
  d, unit, splits = s.head_dim, s.unit, s.splits
  layout = plgpu.Layout.WGMMA
  row_layout = layout.reduce(1)
  per_block = s.block_size // unit
  scratch = _attend_scratch(s)
  stages = scratch["k_smem"].shape[0]

  def body(*refs, **smem):
    q_gmem, k_gmem, v_gmem, lengths_gmem, *refs = refs
    if s.slots:
      codes_gmem, ids_gmem, *refs = refs
    out_gmem, chosen_gmem, *refs = refs
    q_smem, k_smem, v_smem = smem["q_smem"], smem["k_smem"], smem["v_smem"]
    o_smem, ids_smem = smem["o_smem"], smem["ids_smem"]
    k_ready, v_ready = smem["k_ready"], smem["v_ready"]
    k_free, v_free = smem["k_free"], smem["v_free"]
    cta, wg = lax.axis_index("cta"), lax.axis_index("wg")
    row, split = lax.div(cta, splits), lax.rem(cta, splits)
    where = _locate(row, lengths_gmem, s)
    zero = cta * 0  # a start that is not static may reach beyond the end
    heads = pl.ds(zero, s.heads)

    def my_units():
      """How many of the row's units are this split's."""
      known = ids_smem[s.top_k] * per_block
      return jnp.clip(known - split * s.share, 0, s.share)

    def unit_start(i):
      """First token and block of the split's i-th unit."""
      index = split * s.share + i
      block = ids_smem[lax.div(index, per_block)]
      offset = lax.rem(index, per_block) * unit
      return block * s.block_size + offset

    @pl.when(wg == 0)
    def _compute():
      plgpu.barrier_wait(smem["q_ready"])
      plgpu.barrier_wait(smem["ids_ready"])

      def step(i, carry):
        acc, m_i, l_i = carry
        slot = lax.rem(i, stages)
        start = unit_start(i)
        plgpu.barrier_wait(k_ready.at[slot])

        def scores(ref):
          plgpu.wgmma(ref, q_smem, k_smem.at[slot].transpose((1, 0)))
          return ref[...]

        x = pl.run_scoped(scores, ACC((ROWS, unit), jnp.float32))
        plgpu.barrier_arrive(k_free.at[slot])
        key = start + plgpu.broadcasted_iota(
          jnp.int32, x.shape, 1, layout=layout
        )
        # An infinite score becomes NaN, which the mask may still hide.
        x = jnp.where(key <= where.position, x + x * 0.0, -jnp.inf)
        m_new = jnp.maximum(m_i, x.max(axis=1) * s.scale_log2)
        alpha = jnp.exp2(m_i - m_new)
        p = jnp.exp2(x * s.scale_log2 - _over_columns(m_new, unit))
        l_new = l_i * alpha + p.sum(axis=1)
        acc = acc * _over_columns(alpha, d)
        p = p.astype(s.dtype)
        plgpu.barrier_wait(v_ready.at[slot])

        @pl.when(start + unit - 1 > where.position)
        def _():
          # Zero times what an unused slot holds need not be zero.
          for n in range(unit // ROWS):
            at = pl.ds(n * ROWS, ROWS)
            value = plgpu.load(v_smem.at[slot, at], layout=layout)
            token = (
              start
              + n * ROWS
              + plgpu.broadcasted_iota(jnp.int32, value.shape, 0, layout=layout)
            )
            v_smem[slot, at] = jnp.where(
              token <= where.position, value, jnp.zeros_like(value)
            )
          plgpu.commit_smem()

        def values(ref, p=p):
          plgpu.wgmma(ref, p, v_smem.at[slot])

        if s.interpret:
          smem["p_smem"][...] = p
          plgpu.commit_smem()

          def fresh(ref):
            values(ref, smem["p_smem"])
            return ref[...]

          acc += pl.run_scoped(fresh, ACC((ROWS, d), jnp.float32))
        else:
          acc = pl.run_state(values)(ACC.init(acc))
        plgpu.barrier_arrive(v_free.at[slot])
        return acc, m_new, l_new

      acc, m_i, l_i = lax.fori_loop(
        0,
        my_units(),
        step,
        (
          _full(0.0, (ROWS, d), jnp.float32, layout),
          _full(FLOOR, (ROWS,), jnp.float32, row_layout),
          _full(0.0, (ROWS,), jnp.float32, row_layout),
        ),
      )
      if splits == 1:
        o_smem[...] = _finish(acc, l_i, s)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(
          o_smem.at[pl.ds(0, s.heads)],
          out_gmem.at[where.b, where.token, where.group, heads],
        )
        plgpu.wait_smem_to_gmem(0)
        return
      counters_gmem, part_gmem, stats_gmem = refs
      o_smem[...] = acc
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(
        o_smem.at[pl.ds(0, s.heads)], part_gmem.at[row, split]
      )
      stats_gmem[row, split, 0] = m_i
      stats_gmem[row, split, 1] = l_i
      plgpu.wait_smem_to_gmem(0)
      if not s.separate_merge:
        _signal(counters_gmem.at[row])

    @pl.when(wg == 1)
    def _choose_and_copy():
      plgpu.copy_gmem_to_smem(
        q_gmem.at[where.b, where.token, where.group, heads],
        q_smem.at[pl.ds(0, s.heads)],
        smem["q_ready"],
      )
      own = jnp.where(
        where.position < 0, -1, lax.div(where.position, s.block_size)
      )
      for j in range(s.local_blocks):
        ids_smem[j] = jnp.where(own >= j, own - j, NO_BLOCK)
      if s.slots:
        first, count = _lists_of(lengths_gmem, where.b, s)
        r = where.token * s.num_kv_heads + where.group

        def merge(width):
          lanes = _lanes(LANES if s.slots <= MERGE_SLOTS else min(width, 128))
          index = plgpu.broadcasted_iota(jnp.int32, (width,), 0, layout=lanes)
          lists = pl.ds(first, width)

          def heads_of(gmem, absent):
            return [
              jnp.where(
                index < count,
                plgpu.load(gmem.at[r, j, lists], layout=lanes, optimized=False),
                absent,
              )
              for j in range(s.slots)
            ]

          _merge_lists(
            heads_of(codes_gmem, NO_KEY), heads_of(ids_gmem, NO_BLOCK),
            ids_smem, s.local_blocks,
          )  # fmt: skip

        if s.window == LANES:
          merge(LANES)
        else:
          pl.when(count <= LANES)(lambda: merge(LANES))
          pl.when(count > LANES)(lambda: merge(s.window))
      # Every thread reads what it wrote itself.
      chosen = [ids_smem[j] for j in range(s.local_blocks + s.slots)]
      for i, j in sort_network(len(chosen)):
        low, high = chosen[i], chosen[j]
        chosen[i], chosen[j] = jnp.minimum(low, high), jnp.maximum(low, high)
      known = sum((x != NO_BLOCK).astype(jnp.int32) for x in chosen)
      for j, block in enumerate(chosen):
        ids_smem[j] = block
      ids_smem[s.top_k] = known
      plgpu.barrier_arrive(smem["ids_ready"])

      def load(i, carry):
        slot = lax.rem(i, stages)
        tokens = pl.ds(unit_start(i), unit)
        for gmem, to, ready, free in (
          (k_gmem, k_smem, k_ready, k_free),
          (v_gmem, v_smem, v_ready, v_free),
        ):

          @pl.when(i >= stages)
          def _(free=free):
            plgpu.barrier_wait(free.at[slot])

          plgpu.copy_gmem_to_smem(
            gmem.at[where.b, tokens, where.group], to.at[slot], ready.at[slot]
          )
        return carry

      units = my_units()
      lax.fori_loop(0, units, load, None)

      @pl.when(split == 0)
      def _():
        for j in range(s.top_k):
          block = chosen[j] if j < len(chosen) else NO_BLOCK
          chosen_gmem[where.b, where.group, where.token, j] = jnp.where(
            block == NO_BLOCK, -1, block
          )

      for slot in range(stages):

        @pl.when(units > slot)
        def _(slot=slot):
          plgpu.barrier_wait(k_free.at[slot])
          plgpu.barrier_wait(v_free.at[slot])

    if splits > 1 and not s.separate_merge:
      counters_gmem, part_gmem, stats_gmem = refs
      first, step = split * 2 + wg, splits * 2

      @pl.when(first < s.group_size)
      def _():
        _wait_for(counters_gmem.at[row], splits)
        _merge_splits(
          row, first, step, lengths_gmem,
          (part_gmem, stats_gmem, out_gmem), s,
        )  # fmt: skip

  mosaic.launch(
    body, q, k, v, lengths, *((codes, ids) if s.slots else ()), *outputs,
    name="decode_attend",
    num_ctas=s.attend_rows * splits,
    num_warpgroups=2,
    scratch=scratch,
    interpret=s.interpret,
    auto_barriers=False,
  )  # fmt: skip


def _merge(lengths, part, stats, out, s: Shape) -> None:
  """Merges the splits of every row and head, in a kernel of its own."""

  def body(lengths_gmem, part_gmem, stats_gmem, out_gmem):
    cta = lax.axis_index("cta")
    row, head = lax.div(cta, s.group_size), lax.rem(cta, s.group_size)
    _merge_splits(
      row, head, s.group_size, lengths_gmem,
      (part_gmem, stats_gmem, out_gmem), s,
    )  # fmt: skip

  mosaic.launch(
    body, lengths, part, stats, out,
    name="decode_merge",
    num_ctas=s.attend_rows * s.group_size,
    num_warpgroups=1,
    scratch=(),
    interpret=s.interpret,
    auto_barriers=False,
  )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("s",))
def _decode(q, k, v, index_q, index_k, index_k_scale, lengths, s: Shape):
  b, t, kv, g = s.batch, s.tokens, s.num_kv_heads, s.group_size
  pad = -s.capacity % 8
  if pad:
    k, v, index_k = (
      jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
      for x in (k, v, index_k)
    )
    if s.fp8:
      index_k_scale = jnp.pad(index_k_scale, ((0, 0), (0, pad)))
  index_q = index_q.reshape(b, s.rows, s.index_dim)
  if s.rows > 8 and s.rows % 8:  # a swizzle tile has 8 rows
    index_q = jnp.pad(index_q, ((0, 0), (0, -s.rows % 8), (0, 0)))

  def new(shape, dtype):
    return jax.new_ref(lax.empty(shape, dtype))

  counters = new((pl.cdiv(s.attend_rows, 128) * 128,), jnp.int32)
  codes = ids = None
  if s.slots:
    lists = (s.list_rows, s.slots, s.num_lists)
    codes, ids = new(lists, jnp.int32), new(lists, jnp.int32)
    _scan(index_q, index_k, index_k_scale, lengths, (codes, ids, counters), s)
  elif s.splits > 1:
    counters[...] = jnp.zeros(counters.shape, jnp.int32)
  out = new((b, t, kv, g, s.head_dim), s.dtype)
  chosen = new((b, kv, t, s.top_k), jnp.int32)
  outputs = [out, chosen]
  if s.splits > 1:
    part = new((s.attend_rows, s.splits, s.heads, s.head_dim), jnp.float32)
    stats = new((s.attend_rows, s.splits, 2, ROWS), jnp.float32)
    outputs += [counters, part, stats]
  _attend(
    q.reshape(b, t, kv, g, s.head_dim), k, v, lengths, codes, ids, outputs, s
  )
  if s.separate_merge:
    _merge(lengths, part, stats, out, s)
  return jax.freeze(out).reshape(q.shape), jax.freeze(chosen)


def decode_attention(
  q: Float[Array, "B T H D"],
  k: Float[Array, "B C K D"],
  v: Float[Array, "B C K D"],
  index_q: Float[Array, "B T K I"],
  index_k: Float[Array, "B C I"],
  *,
  kv_lengths: Int[Array, "B"],
  index_k_scale: Float[Array, "B C"] | None = None,
  block_size: int = 128,
  top_k: int = 16,
  num_local_blocks: int = 1,
  scale: float | None = None,
  config: Config | None = None,
  interpret: bool = False,
) -> tuple[Float[Array, "B T H D"], Int[Array, "B K T P"]]:
  """Chooses blocks of a cache for its newest tokens and attends to them.

  Args:
    q: queries, the last T of kv_lengths[b] tokens; bf16 or f16.
    k: cached keys of C slots.
    v: cached values.
    index_q: one index query a group; bf16 or f16.
    index_k: cached index keys in index_q's dtype or float8_e4m3fn.
    kv_lengths: tokens in each batch row; slots from there on do not exist.
    index_k_scale: float32 scale of each index key, exactly when they are fp8.
    block_size: tokens of a block.
    top_k: P, blocks kept for each query and group.
    num_local_blocks: newest blocks, own one included, that are always kept.
    scale: of the scores; D^-0.5 without one. A positive number.
    config: tile sizes; `heuristic_config` without one.
    interpret: run on the CPU in Pallas's GPU interpret mode.

  Returns:
    out in q's dtype, 0 for a query that stands before its row's first token,
    and block_indices: ascending block ids, then -1.

  Raises:
    NotImplementedError: the call is legal but beyond `mosaic`'s limits, the
      index keys have another dtype, or so many index queries do not fit shared
      memory.
  """
  b, t, h, d = q.shape
  capacity, num_kv_heads = k.shape[1:3]
  index_dim = index_q.shape[-1]
  scale = float(d**-0.5 if scale is None else scale)
  mosaic.check_supported(
    q,
    k,
    v,
    index_q,
    index_k,
    kv_lengths,
    index_k_scale,
    dtype=q.dtype,
    block_size=block_size,
    top_k=top_k,
    kv_len=capacity,
    head_dim=d,
    index_dim=index_dim,
    group_size=h // num_kv_heads,
    scale=scale,
  )
  mosaic.check_supported(dtype=index_q.dtype)
  mosaic.check_decode_supported(
    tokens=t,
    num_kv_heads=num_kv_heads,
    cache_rows=b * capacity * num_kv_heads,
  )
  if index_k.dtype != (index_q.dtype if index_k_scale is None else FP8):
    raise NotImplementedError(
      "mosaic_gpu decode_attention supports index keys in index_q's dtype"
      f" ({index_q.dtype}) or float8_e4m3fn with a scale each, got"
      f" {index_k.dtype} {'without' if index_k_scale is None else 'with'}"
      " scales"
    )
  if not q.size or not k.size:
    ids = jnp.full((b, num_kv_heads, t, top_k), -1, jnp.int32)
    return jnp.zeros_like(q), ids
  shape = Shape(
    batch=b,
    tokens=t,
    num_kv_heads=num_kv_heads,
    group_size=h // num_kv_heads,
    head_dim=d,
    index_dim=index_dim,
    capacity=capacity,
    block_size=block_size,
    top_k=top_k,
    local_blocks=min(num_local_blocks, top_k, pl.cdiv(capacity, block_size)),
    scale_log2=scale * mosaic.LOG2E,
    dtype=jnp.dtype(q.dtype),
    index_dtype=jnp.dtype(index_q.dtype),
    key_dtype=jnp.dtype(index_k.dtype),
    config=config or heuristic_config(),
    interpret=interpret,
  )

  # Under vmap the kernels run once for each entry.
  @jax.custom_batching.sequential_vmap
  def run(*args):
    return _decode(*args, s=shape)

  if index_k_scale is None:
    index_k_scale = jnp.zeros((), jnp.float32)
  return run(
    q, k, v, index_q, index_k, index_k_scale, kv_lengths.astype(jnp.int32)
  )
