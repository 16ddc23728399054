"""One step of decoding on a Hopper GPU: choose blocks of a cache, then attend.

For each batch row b, the T queries are its newest tokens, at positions
kv_lengths[b] - T + t. For query t and group g (arXiv 2606.13392, Index Branch
and Main Branch):

  s(j) = index_q[t, g] . index_k[j]       float32, visible keys j only
  block score = max of s over the block's visible keys
  choice = the num_local_blocks newest blocks up to the query's own (forced),
           then the blocks of highest score; ties go to the lower id
  out = softmax(scale q.k) v over the visible tokens of the chosen blocks

With fp8 index keys, which have one float32 scale a key, the kernel rounds
index_q to e4m3: s(j) = index_k_scale[j] (e4m3(index_q / qs) . index_k[j]) qs,
where qs is a power of two, that of `select_blocks.power_of_two_scale` for the
query and group. Divisions by it are exact, so the codes are those of any other
implementation.

Two launches, or three if devices share the cache. Below, a *query* is one
(token, group) of a batch row: it has one index query and G heads.

* **scan** reads the index keys once for all T x K queries of a batch row. The
  tiles of 128 keys are numbered through all batch rows, and each CTA owns an
  equal, contiguous share of them, so batches of unequal lengths balance.
  Warpgroup roles:
    copy    fills a ring of key tiles by TMA; the ring takes all SMEM.
    score   (two) wgmma of the index queries, padded to 64 MMA rows, with a
            tile of keys. The queries are the M side, because then the maximum
            over a block's keys stays inside a warp. The tensor cores have time
            to spare for the padding.
    choose  keeps each query's best blocks in registers, one query a thread, and
            writes them as one sorted list for each share and batch row.
* **attend** has a CTA for each query and *split*: the splits of a query take
  turns at its chosen blocks. Each CTA merges the same lists (32 lanes hold up
  to five lists each, or one each if there are no more; the best first entry is
  popped until P blocks are found) and attends to its own blocks. One warpgroup
  merges lists and copies K and V, the other one computes. The splits of a query
  wait for each other's partial results, and then each warpgroup merges some of
  the heads, in a fixed order.

Waiting inside attend requires that all splits of a query run at the same time.
They do: a query is split only while there are no more CTAs than SMs. If
`Config.splits` asks for more, a third launch (**merge**) merges instead.

With `axis_name`, each device of this mesh axis holds whole blocks of the cache,
one device's C slots after another's, and the lengths that the kernels get count
from the device's first slot: negative ones end before it, and those above C
behind it.

* **scan** is the same, on the device's own index keys.
* **choose** has a CTA for each query, which merges its lists into one, as
  attend does. The devices gather these lists: P scores and ids of each query.
* **attend** merges the devices' lists instead of the shares', which gives the
  choice of a single device, and attends to those of its blocks that are here.
  Every split leaves its partial result, and nobody waits. XLA merges a device's
  splits, gathers what the devices have (D + 2 float32 numbers of each query
  and head), and merges it in the order of the devices.

Bound: reading the index keys (256 bytes a token in bf16, 132 in fp8), then
2 P block_size D elements of K and V for each query, both from memory.

SMEM at I = D = 128: scan 32 KiB of queries (48 with fp8 keys) and tiles in all
the rest; attend 16 KiB of queries, K and V blocks of 64 KiB, 16 or 32 KiB of
results. At D 256 attend has 32 KiB of queries, two stages of 64 keys and values
(128 KiB), and the same room for results, which leave 128 columns at a time (64
if the cache's heads are shorter, see below).

Barriers of scan (one arrival each where no number stands; where the cache's
heads are shorter than the kernel's, a copy of keys or values is several, one
for each operand):

  name        who arrives                            who waits
  q_ready     one a score warpgroup: the copy of     score, itself
              its queries
  tile_ring   ready: copy of a key tile (and one     score, the one whose
              of its scales)                         turn it is
              free: choose, which has read the       copy
              maxima that score left
  max_ready   score: the maxima of a tile            choose

Barriers of attend:

  name        who arrives                            who waits
  q_ready     the copy of the query's heads          compute
  ids_ready   choose and copy: the ids are known     compute
  k_ring      ready: the copy of a step's keys       compute
              free: compute, after the scores        choose and copy
  v_ring      ready: the copy of a step's values     compute
              free: compute, after the product       choose and copy

Slots of the cache from kv_lengths[b] on do not exist: whatever they hold, NaN
included, changes nothing. A visible NaN or infinity in q, k or v makes the
output of its query NaN. A block whose index scores hold NaN is not chosen
unless it is forced.

Heads of other sizes than 64, 128 and 256, and index heads of others than 64 and
128, are computed in the next of these, and the cache is read as it is: TMA
fills the columns behind the last one with zeros. For that, keys and values lie
in SMEM as operands of 64 columns (index keys in fp8: of all columns), one copy
each. The SMEM is that of the padded size, and memory is read for the real one.
Queries and results are padded. Where sizes need no padding, a capacity that is
no multiple of 8 is padded by a copy in every call.

Not supported: gradients; what `mosaic.check_supported` and
`mosaic.check_decode_supported` refuse; so many index queries that scan does not
fit SMEM; a cache over more than MAX_DEVICES devices.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import mosaic, partition
from pallas_kernels.select_blocks import power_of_two_scale, sort_network

ACC = plgpu.WGMMAAccumulatorRef
ROWS = 64  # MMA rows of a wgmma tile
FLOOR = -1e30  # below any score; avoids (-inf) - (-inf) in the softmax
LOWEST = float(jnp.finfo(jnp.float32).min)
NO_KEY = -(1 << 31)
NO_BLOCK = (1 << 31) - 1
FP8 = jnp.float8_e4m3fn
MERGE_SLOTS = 16  # longest lists of which a lane can hold five in registers
STEP_KEYS = 128  # index keys of a tile
SCORERS = 2  # score warpgroups, which alternate between tiles
LANES = 32  # of a warp
LENGTHS_AT_ONCE = 32  # batch rows whose lengths are read at once
# Blocks to find before the lists in registers are shortened. Each shortening is
# a loop of its own, and a program of long lists with many loops takes minutes
# to lower.
MERGE_ROUNDS, LONG_MERGE_ROUNDS = 5, 21
MAX_DEVICES = 128  # that share a cache: one list each, merged at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Tile sizes and shares; the result changes by rounding only.

  Attributes:
    stages: key tiles in flight, an even number; 0 takes as many as SMEM holds.
    step_keys: tokens of an attention step, 64 or block_size; 0 derives it from
      the number of queries. At D 256 it is always 64.
    splits: upper bound on the CTAs that share a query's blocks; 0 fills the
      GPU.
    num_ctas: CTAs of scan; 0 takes the number of SMs.
  """

  stages: int = 0
  step_keys: int = 0
  splits: int = 0
  num_ctas: int = 0

  def __post_init__(self):
    if self.stages % SCORERS:
      raise ValueError(f"stages must be even, got {self.stages}")


@dataclasses.dataclass(frozen=True)
class KernelParams:
  """Static parameters of one call."""

  batch: int
  tokens: int
  num_kv_heads: int
  group_size: int
  head_dim: int  # D inside the kernel: q and results are padded to it
  index_dim: int  # I, likewise
  capacity: int  # of this device
  block_size: int
  top_k: int
  local_blocks: int  # forced blocks, at most what P and the capacity allow
  scale_log2: float
  dtype: jnp.dtype
  index_dtype: jnp.dtype  # of index_q
  key_dtype: jnp.dtype  # of index_k
  config: Config
  interpret: bool
  devices: int = 1  # whose capacities together hold the cache
  padded: bool = False  # whether the cache's heads have fewer dims
  index_padded: bool = False  # likewise of its index keys

  @property
  def num_blocks(self) -> int:
    """Blocks that this device holds."""
    return pl.cdiv(self.capacity, self.block_size)

  @property
  def slots(self) -> int:
    """Choice slots that are filled by score: length of a list."""
    return min(self.top_k, self.num_blocks * self.devices) - self.local_blocks

  @property
  def queries(self) -> int:
    """Queries of a batch row: T x K."""
    return self.tokens * self.num_kv_heads

  @property
  def list_queries(self) -> int:
    """`queries`, rounded up to a size that the choose registers can have."""
    return max(8, 1 << (self.queries - 1).bit_length())

  @property
  def padded_queries(self) -> int:
    """`queries`, padded to MMA rows."""
    return max(ROWS, self.list_queries)

  @property
  def fp8(self) -> bool:
    return self.key_dtype == FP8

  @property
  def scan_ctas(self) -> int:
    if self.config.num_ctas:
      return self.config.num_ctas
    sms = mosaic.num_sms()
    # Merging long lists needs one thread of a warpgroup for each list.
    return min(sms, 128) if self.slots > mosaic.LONG_LIST else sms

  def window(self, lists: int) -> int:
    """Lists that are merged at once where a batch row has up to `lists`."""
    width = LANES if self.slots <= MERGE_SLOTS or lists <= LANES else 128
    return pl.cdiv(lists, width) * width

  @property
  def num_lists(self) -> int:
    """Lists of all shares, plus one window, which reads may reach beyond."""
    return self.scan_ctas + self.batch - 1 + self.window(self.scan_ctas)

  @property
  def heads(self) -> int:
    """Heads of q and out that are copied at once: a swizzle tile has 8 rows."""
    return mosaic.padded_heads(self.group_size)

  @property
  def all_queries(self) -> int:
    return self.batch * self.queries

  @property
  def step_keys(self) -> int:
    """Tokens of an attention step."""
    if self.head_dim > mosaic.WIDE:  # a whole block does not fit SMEM
      return 64
    if self.config.step_keys:
      return min(self.config.step_keys, self.block_size)
    # Half blocks if there are too few whole ones for all SMs.
    few = 2 * self.all_queries * self.top_k <= mosaic.num_sms()
    return 64 if few else self.block_size

  @property
  def kv_columns(self) -> int:
    """Columns of keys and values that one copy moves.

    Tiles of 64 columns would go on in the next row where a row ends inside one,
    so rows of other sizes are copied as operands of 64 columns, without tiles:
    then TMA knows where a row ends, and fills the columns behind with zeros.
    """
    return 64 if self.padded else self.head_dim

  @property
  def kv_parts(self) -> int:
    """Operands that the keys, or values, of a step take."""
    return self.head_dim // self.kv_columns

  @property
  def index_columns(self) -> int:
    """Columns of index keys that one copy moves, see `kv_columns`."""
    if not self.index_padded:
      return self.index_dim
    return min(self.index_dim, 128 // jnp.dtype(self.key_dtype).itemsize)

  @property
  def index_parts(self) -> int:
    """Operands that a tile of index keys takes."""
    return self.index_dim // self.index_columns

  @property
  def out_columns(self) -> int:
    """Columns of a result that leave through SMEM at once."""
    return min(self.kv_columns, mosaic.WIDE)

  @property
  def steps(self) -> int:
    """Attention steps of a query."""
    return self.top_k * (self.block_size // self.step_keys)

  @property
  def split_steps(self) -> int:
    """Attention steps of a split, at most."""
    most = self.config.splits or mosaic.num_sms() // self.all_queries
    return pl.cdiv(self.steps, min(max(most, 1), self.steps))

  @property
  def splits(self) -> int:
    return pl.cdiv(self.steps, self.split_steps)

  @property
  def partial(self) -> bool:
    """Whether CTAs leave partial results, which are merged."""
    return self.splits > 1 or self.devices > 1

  @property
  def separate_merge(self) -> bool:
    """Whether a kernel of its own merges the splits of the only device."""
    fits = self.all_queries * self.splits <= mosaic.num_sms()
    alone = self.partial and self.devices == 1
    return alone and (self.interpret or not fits)

  @property
  def merge_inside(self) -> bool:
    """Whether the splits of a query wait for each other in attend."""
    return self.partial and self.devices == 1 and not self.separate_merge


# ---- Register layouts of vectors ----


def _lanes(width: int) -> Any:
  """Register layout of vectors of a multiple of `width` elements.

  Up to a width of 32, each warp holds the whole vector, one element a lane.
  From 64 on, two or four warps hold one element a thread.
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


# ---- Operands in parts ----


def _parts(count: int, columns: int, zero: Any) -> list[tuple[int, Any, Any]]:
  """Number, columns of an operand, and columns of memory, of each part.

  Only a start that is not static may reach beyond the end: `zero` is one.
  """
  if count == 1:
    whole = slice(None)
    return [(0, whole, pl.ds(zero, columns))]
  return [
    (i, pl.ds(i * columns, columns), pl.ds(zero + i * columns, columns))
    for i in range(count)
  ]


def _at(slot: Any, parts: int, i: int) -> Any:
  """Where part i of a stage lies among the operands of a ring."""
  return slot if parts == 1 else slot * parts + i


# ---- Which CTA scans which tiles ----


def _length(lengths_gmem, b, s: KernelParams):
  """Tokens of a batch row, from this device's first slot on.

  Of several devices, those behind the batch row's end get a negative number,
  and those before it more than their capacity.
  """
  length = lengths_gmem[b]
  return jnp.clip(length, 0, s.capacity) if s.devices == 1 else length


def _first_block(lengths_gmem, s: KernelParams):
  """The id of the first block that this device holds."""
  return 0 if s.devices == 1 else lengths_gmem[s.batch]


def _tiles_of(length, s: KernelParams):
  """Number of tiles with blocks that a query of the batch row may choose."""
  # The last query's own block; negative where no key of it is here.
  own = lax.div(length + s.block_size - 1, s.block_size) - 1
  limit = jnp.clip(own + 1 - s.local_blocks, 0, s.num_blocks)
  return lax.div(limit * s.block_size + STEP_KEYS - 1, STEP_KEYS)


def _fold_rows(
  lengths_gmem, s: KernelParams, update: Callable, carry: Any
) -> Any:
  """Folds update(b, tiles of b, carry) over the batch rows b."""
  chunk = min(s.batch, LENGTHS_AT_ONCE)

  def run(i, carry):
    batch_rows = [i * chunk + j for j in range(chunk)]
    tiles = [
      _tiles_of(_length(lengths_gmem, jnp.minimum(b, s.batch - 1), s), s)
      for b in batch_rows
    ]
    for b, count in zip(batch_rows, tiles, strict=True):
      carry = update(b, jnp.where(b < s.batch, count, 0), carry)
    return carry

  chunks = pl.cdiv(s.batch, chunk)
  if chunks == 1:
    return run(0, carry)
  return lax.fori_loop(0, chunks, run, carry)


def _total_tiles(lengths_gmem, s: KernelParams):
  return _fold_rows(
    lengths_gmem, s, lambda _, tiles, total: total + tiles, jnp.int32(0)
  )


def _each_segment(lengths_gmem, cta, s: KernelParams, body: Callable) -> Any:
  """Runs body for each batch row that a CTA's share of the tiles touches.

  All warpgroup roles call this and so agree on the numbering of steps.

  Args:
    lengths_gmem: kv_lengths.
    cta: index of the CTA.
    s: static parameters.
    body: called with the batch row, the first tile of it in the share, the
      number of tiles, and the number of steps (tiles) before it.

  Returns:
    The number of steps of the share.
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
    tiles = _tiles_of(_length(lengths_gmem, b, s), s)
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


def _lists_of(lengths_gmem, b, s: KernelParams):
  """First list and number of lists that hold a batch row's best blocks.

  CTA c writes its list of batch row b to index c + b. These indices differ,
  because from one list to the next either c or b grows.
  """
  total = _total_tiles(lengths_gmem, s)
  share, extra = lax.div(total, s.scan_ctas), lax.rem(total, s.scan_ctas)

  def find(one, tiles, carry):
    before, mine = carry
    return (
      before + jnp.where(one < b, tiles, 0),
      jnp.where(one == b, tiles, mine),
    )

  before, tiles = _fold_rows(
    lengths_gmem, s, find, (jnp.int32(0), jnp.int32(0))
  )

  def cta_of(tile):
    large = extra * (share + 1)
    return jnp.where(
      tile < large,
      lax.div(tile, share + 1),
      extra + lax.div(tile - large, jnp.maximum(share, 1)),
    )

  first = cta_of(before)
  count = cta_of(before + tiles - 1) - first + 1
  return first + b, jnp.where(tiles > 0, count, 0)


# ---- Scores and lists ----


def _scan_scratch(s: KernelParams) -> dict[str, Any]:
  """Shared memory and barriers of scan."""
  size = jnp.dtype(s.key_dtype).itemsize
  swizzle = min(s.index_dim * size, 128)
  transforms = (
    plgpu.TilingTransform((8, swizzle // size)),  # pyright: ignore
    plgpu.SwizzleTransform(swizzle),  # pyright: ignore
  )
  blocks = STEP_KEYS // s.block_size
  q_shape = (SCORERS, s.padded_queries, s.index_dim)
  stage_bytes = STEP_KEYS * s.index_dim * size
  stage_bytes += blocks * s.padded_queries * 4
  # The last term is for barriers and the alignment of buffers to 1 KiB.
  fixed = math.prod(q_shape) * jnp.dtype(s.index_dtype).itemsize + 1536
  if s.fp8:
    stage_bytes += STEP_KEYS * 4
    fixed += math.prod(q_shape) + 1024
  stages = (mosaic.SMEM_LIMIT - fixed) // stage_bytes
  stages = min(stages, s.config.stages or 16) // SCORERS * SCORERS
  if stages < SCORERS:
    raise NotImplementedError(
      "mosaic_gpu decode_attention does not fit shared memory with"
      f" {s.queries} index queries a batch row"
    )
  if s.index_padded:
    k_smem = mosaic.operand_of_rows(
      stages * s.index_parts, s.key_dtype, s.interpret,
      rows=STEP_KEYS, columns=s.index_columns,
    )  # fmt: skip
  else:
    k_smem = plgpu.SMEM(
      (stages, STEP_KEYS, s.index_dim), s.key_dtype, transforms=transforms
    )
  scratch = dict(
    q_smem=plgpu.SMEM(q_shape, s.index_dtype, transforms=mosaic.OPERAND),
    k_smem=k_smem,
    max_smem=plgpu.SMEM((stages, blocks, s.padded_queries), jnp.float32),
    q_ready=plgpu.Barrier(num_barriers=SCORERS),
    tile_ring=mosaic.ring(stages, fills=s.index_parts + s.fp8),
    max_ready=plgpu.Barrier(num_barriers=stages),
  )
  if s.fp8:
    scratch |= dict(
      q8_smem=plgpu.SMEM(q_shape, s.key_dtype, transforms=transforms),
      scale_smem=plgpu.SMEM((stages, STEP_KEYS), jnp.float32),
    )
  return scratch


def _scan(
  index_q, index_k, index_k_scale, lengths, outputs, s: KernelParams
) -> None:
  """Writes the lists: score codes and block ids, [queries, slots, lists] each.

  Args:
    index_q, index_k, index_k_scale: index queries, keys and scales.
    lengths: kv_lengths.
    outputs: Refs of the codes, of the ids, and of the counters that the splits
      of attend wait on, which are set to 0.
    s: static parameters.
  """
  bs, blocks = s.block_size, STEP_KEYS // s.block_size
  layout = plgpu.Layout.WGMMA
  codes, ids, counters = outputs
  operands = dict(
    q_gmem=index_q,
    k_gmem=index_k,
    lengths_gmem=lengths,
    codes_gmem=codes,
    ids_gmem=ids,
    counters_gmem=counters,
  )
  if s.fp8:
    operands["scale_gmem"] = index_k_scale

  def body(
    *, q_gmem, k_gmem, lengths_gmem, codes_gmem, ids_gmem, counters_gmem,
    q_smem, k_smem, max_smem, q_ready, tile_ring, max_ready,
    scale_gmem: Any = None, q8_smem: Any = None, scale_smem: Any = None,
  ):  # fmt: skip
    cta, wg = lax.axis_index("cta"), lax.axis_index("wg")
    each_segment = functools.partial(_each_segment, lengths_gmem, cta, s)
    k_operands, k_to = mosaic.whole_and_tiles(k_smem)

    def first_position(b):
      return _length(lengths_gmem, b, s) - s.tokens

    @pl.when(wg < SCORERS)
    def _score():
      plgpu.set_max_registers(152, action="increase")

      def load_queries(b):
        """Index queries as a wgmma operand, and each one's fp8 scale."""
        # This also waits until all warps of this warpgroup have read the
        # queries of the batch row before.
        plgpu.commit_smem()
        # TMA fills rows beyond the last with zeros, but Pallas allows such a
        # copy only from a start that is not static.
        start = cta * 0
        plgpu.copy_gmem_to_smem(
          q_gmem.at[b, pl.ds(start, s.padded_queries)],
          q_smem.at[wg],
          q_ready.at[wg],
        )
        plgpu.barrier_wait(q_ready.at[wg])
        if not s.fp8:
          return q_smem, []
        scales = []
        for m in range(s.padded_queries // ROWS):
          rows = pl.ds(m * ROWS, ROWS)
          x = plgpu.load(q_smem.at[wg, rows], layout=layout)
          x = x.astype(jnp.float32)
          factor, scale = power_of_two_scale(jnp.abs(x).max(axis=1))
          # The cast on a GPU turns an infinity into 448.
          x = jnp.where(jnp.abs(x) < jnp.inf, x, jnp.nan)
          x = x * _over_columns(factor, s.index_dim)
          q8_smem[wg, rows] = x.astype(s.key_dtype)
          scales.append(scale)
        plgpu.commit_smem()
        return q8_smem, scales

      def segment(b, first_tile, count, steps):
        operand, scales = load_queries(b)
        position = first_position(b)

        # The score warpgroups alternate between tiles, across batch rows.
        mine = lax.rem(wg + SCORERS - lax.rem(steps, SCORERS), SCORERS)

        def tile(j, carry):
          i = mine + j * SCORERS
          slot = tile_ring.slot(steps + i)
          tile_ring.wait_ready(slot)
          for m in range(s.padded_queries // ROWS):
            rows = pl.ds(m * ROWS, ROWS)

            def product(acc, rows=rows):
              for part, columns, _ in _parts(s.index_parts, s.index_columns, 0):
                at = (wg, rows) if s.index_parts == 1 else (wg, rows, columns)
                keys = k_operands.at[_at(slot, s.index_parts, part)]
                plgpu.wgmma(acc, operand.at[at], keys.transpose((1, 0)))
              return acc[...]

            x = pl.run_scoped(product, ACC((ROWS, STEP_KEYS), jnp.float32))
            if s.fp8:
              key_scale = plgpu.load(
                scale_smem.at[slot], layout=layout.reduce(0)
              )
              x = x * lax.broadcast_in_dim(key_scale, x.shape, [1])
            if s.local_blocks == 0:
              # Without forced blocks, partly visible blocks compete and need
              # the causal mask.
              key = (
                plgpu.broadcasted_iota(jnp.int32, x.shape, 1, layout=layout)
                + (first_tile + i) * STEP_KEYS
              )
              query = (
                plgpu.broadcasted_iota(jnp.int32, x.shape, 0, layout=layout)
                + m * ROWS
              )
              last = position + lax.div(query, s.num_kv_heads)
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
      # All that the other warpgroups leave, if the lists are long.
      long = s.slots > mosaic.LONG_LIST
      plgpu.set_max_registers(168 if long else 136, action="increase")
      lanes = _lanes(s.list_queries)
      shape = (s.list_queries,)

      @pl.when(cta == 0)
      def _():
        for i in range(counters_gmem.shape[0] // 128):
          counters_gmem[pl.ds(i * 128, 128)] = jnp.zeros((128,), jnp.int32)

      def segment(b, first_tile, count, steps):
        query = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=lanes)
        position = first_position(b) + lax.div(query, s.num_kv_heads)
        own = jnp.where(position < 0, -1, lax.div(position, bs))
        # A tile may hold a block that is the next device's.
        limit = jnp.minimum(own + 1 - s.local_blocks, s.num_blocks)

        def tile(i, best):
          slot = tile_ring.slot(steps + i)
          plgpu.barrier_wait(max_ready.at[slot])
          maxima = [
            plgpu.load(
              max_smem.at[slot, n, pl.ds(0, s.list_queries)], layout=lanes
            )
            for n in range(blocks)
          ]
          tile_ring.release(slot)
          for n, m in enumerate(maxima):
            block = (first_tile + i) * blocks + n
            # A visible block that scores -inf must rank before no block, and
            # -0 must equal 0. NaN compares false and is never inserted.
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
          slot = tile_ring.slot(step)
          keys = pl.ds((first_tile + i) * STEP_KEYS, STEP_KEYS)
          tile_ring.wait_free(step, slot)
          ready = tile_ring.ready_at(slot)
          if not s.index_padded:
            plgpu.copy_gmem_to_smem(k_gmem.at[b, keys], k_to.at[slot], ready)
          else:
            for part, _, columns in _parts(
              s.index_parts, s.index_columns, cta * 0
            ):
              plgpu.copy_gmem_to_smem(
                k_gmem.at[b, keys, columns],
                k_to.at[_at(slot, s.index_parts, part)],
                ready,
              )
          if s.fp8:
            plgpu.copy_gmem_to_smem(
              scale_gmem.at[b, keys], scale_smem.at[slot], ready
            )
          return carry

        lax.fori_loop(0, count, tile, None)

      steps = each_segment(segment)
      mosaic.drain_rings(steps, tile_ring)

  mosaic.launch(
    body,
    operands,
    name="decode_scan",
    num_ctas=s.scan_ctas,
    num_warpgroups=SCORERS + 2,
    scratch=_scan_scratch(s),
    interpret=s.interpret,
    auto_barriers=False,
    reduction_scratch=0,
  )


def _insert(best, value, block):
  """Inserts a candidate into lists that are sorted by descending value.

  It goes behind equal values, which came earlier and so have lower ids.
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


def _merge_lists(codes: list, ids: list, write: Callable) -> None:
  """Merges sorted lists: writes the best entries, then (NO_KEY, NO_BLOCK).

  codes[j] and ids[j] hold the j-th entry of every list. In each round, the list
  with the best first entry (the lowest id among equal ones) loses it.

  Args:
    codes: score codes, one vector over the lists for each entry.
    ids: block ids, likewise.
    write: called with the place, the code and the id of an entry.
  """
  taken, slots = 0, len(codes)
  most = LONG_MERGE_ROUNDS if slots > mosaic.LONG_LIST else MERGE_ROUNDS
  while taken < slots:
    # Entries too far down to be chosen are dropped every few rounds, which
    # leaves less to move.
    rounds = min(most, slots - taken)

    def pop(i, heads, taken=taken):
      codes, ids = heads
      top = codes[0].max()
      # The lowest id is the highest complement.
      complement = jnp.where(codes[0] == top, mosaic.bit_not(ids[0]), NO_KEY)
      head = mosaic.bit_not(complement.max())
      write(taken + i, top, jnp.where(top == NO_KEY, NO_BLOCK, head))
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


def _best_of_lists(
  codes_gmem, ids_gmem, r, lists: tuple[Any, Any], window: int,
  write: Callable, s: KernelParams,
) -> None:  # fmt: skip
  """Merges lists of query r in memory, see `_merge_lists`.

  Args:
    codes_gmem, ids_gmem: score codes and ids, [queries, slots, lists].
    r: token * K + group of the query.
    lists: the first of its lists, and how many there are.
    window: `KernelParams.window` of the most that there may be.
    write: see `_merge_lists`.
    s: static parameters.
  """
  first, count = lists

  def merge(width):
    lanes = _lanes(LANES if s.slots <= MERGE_SLOTS else min(width, 128))
    index = plgpu.broadcasted_iota(jnp.int32, (width,), 0, layout=lanes)

    def entries(gmem, absent):
      return [
        jnp.where(
          index < count,
          plgpu.load(
            gmem.at[r, j, pl.ds(first, width)], layout=lanes, optimized=False
          ),
          absent,
        )
        for j in range(s.slots)
      ]

    _merge_lists(
      entries(codes_gmem, NO_KEY), entries(ids_gmem, NO_BLOCK), write
    )

  if window == LANES:
    merge(LANES)
  else:
    pl.when(count <= LANES)(lambda: merge(LANES))
    pl.when(count > LANES)(lambda: merge(window))


class _Location(NamedTuple):
  """Batch row, token and group of a query, and the token's position.

  The position counts from the device's first slot.
  """

  b: Any
  token: Any
  group: Any
  position: Any


def _locate(query, lengths_gmem, s: KernelParams) -> _Location:
  b, r = lax.div(query, s.queries), lax.rem(query, s.queries)
  token = lax.div(r, s.num_kv_heads)
  position = _length(lengths_gmem, b, s) - s.tokens + token
  return _Location(b, token, lax.rem(r, s.num_kv_heads), position)


def _attend_scratch(s: KernelParams) -> dict[str, Any]:
  """Shared memory and barriers of attend."""
  d, size = s.head_dim, jnp.dtype(s.dtype).itemsize
  out_transforms: Sequence[Any] = mosaic.OPERAND
  if s.partial:
    out_transforms = (
      plgpu.TilingTransform((8, 32)),  # pyright: ignore
      plgpu.SwizzleTransform(128),  # pyright: ignore
    )
  out_dtype = jnp.dtype(jnp.float32 if s.partial else s.dtype)
  fixed = ROWS * (d * size + s.out_columns * out_dtype.itemsize) + 4096
  stages = (mosaic.SMEM_LIMIT - fixed) // (2 * s.step_keys * d * size)
  stages = min(stages, s.split_steps)

  def ring_of_operands():
    if not s.padded:
      return plgpu.SMEM(
        (stages, s.step_keys, d), s.dtype, transforms=mosaic.OPERAND
      )
    return mosaic.operand_of_rows(
      stages * s.kv_parts, s.dtype, s.interpret, rows=s.step_keys
    )

  scratch = dict(
    q_smem=plgpu.SMEM((ROWS, d), s.dtype, transforms=mosaic.OPERAND),
    k_smem=ring_of_operands(),
    v_smem=ring_of_operands(),
    o_smem=plgpu.SMEM(
      (ROWS, s.out_columns), out_dtype, transforms=out_transforms
    ),
    # The ids, how many there are, and where those of this device start.
    ids_smem=plgpu.SMEM((s.top_k + 2,), jnp.int32),
    q_ready=plgpu.Barrier(),
    ids_ready=plgpu.Barrier(),
    k_ring=mosaic.ring(stages, fills=s.kv_parts),
    v_ring=mosaic.ring(stages, fills=s.kv_parts),
  )
  if s.interpret:  # takes no wgmma operand from registers
    scratch["p_smem"] = plgpu.SMEM(
      (ROWS, s.step_keys), s.dtype, transforms=mosaic.OPERAND
    )
  return scratch


def _merge_splits(
  query, first, step, lengths_gmem, refs, s: KernelParams
) -> None:
  """Merges heads `first`, `first + step`, ... of a query from its splits."""
  part_gmem, stats_gmem, out_gmem = refs
  loc = _locate(query, lengths_gmem, s)
  lanes = _lanes(LANES)

  def read(h):
    """m, l and partial results of a head's splits."""
    return (
      [stats_gmem[query, n, 0, h] for n in range(s.splits)],
      [stats_gmem[query, n, 1, h] for n in range(s.splits)],
      [
        plgpu.load(part_gmem.at[query, n, h], layout=lanes, optimized=False)
        for n in range(s.splits)
      ],
    )

  def write(h, m, l, parts):
    top = functools.reduce(jnp.maximum, m)
    weights = [jnp.exp2(x - top) for x in m]
    total = sum(a * b for a, b in zip(weights, l, strict=True))
    out = sum(a * b for a, b in zip(weights, parts, strict=True))
    mosaic.store(
      out_gmem.at[loc.b, loc.token, loc.group, h], _finish(out, total, s)
    )

  # The heads that every caller has are read at once, to hide latency.
  heads = [first + i * step for i in range(s.group_size // step)]
  for h, values in [(h, read(h)) for h in heads]:
    write(h, *values)
  if s.group_size % step:
    last = first + len(heads) * step

    @pl.when(last < s.group_size)
    def _():
      write(last, *read(last))


def _count(conditions):
  return sum(x.astype(jnp.int32) for x in conditions)


def _finish(acc, total, s: KernelParams):
  """The output of heads whose weights sum to `total` (0: no visible key)."""
  return _finish_parts([acc], total, s)[0]


def _finish_parts(parts, total, s: KernelParams):
  """`_finish` of heads that come as parts of their columns."""
  factor = jnp.where(total == 0, 0.0, 1.0 / total)

  def over(x, part):
    return _over_columns(x, part.shape[-1]) if part.ndim == 2 else x

  outs = [x * over(factor, x) for x in parts]
  # A non-finite value shows in its own column only; spread it over the head.
  bad = functools.reduce(operator.add, [(x * 0.0).sum(axis=-1) for x in outs])
  return [(x + over(bad, x)).astype(s.dtype) for x in outs]


def _signal(counter) -> None:
  """Adds 1 to a counter after all earlier writes of this warpgroup."""

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


def _attend(q, k, v, lengths, lists, outputs, s: KernelParams) -> None:
  """Chooses from the lists, attends, and merges the splits.

  Args:
    q, k, v: operands of attention.
    lengths: kv_lengths; of several devices, see `_own_lengths`.
    lists: codes and ids that `_scan` wrote, or one list of each device, as
      `_gather_lists` gives them; () if every block is forced.
    outputs: Refs by name: chosen (block_indices), out on one device alone, part
      and stats (partial results and their m and l) and counters as
      `KernelParams.partial` and `merge_inside` ask for.
    s: static parameters.
  """
  d, step_keys, splits = s.head_dim, s.step_keys, s.splits
  layout = plgpu.Layout.WGMMA
  row_layout = layout.reduce(1)
  per_block = s.block_size // step_keys
  operands = dict(q_gmem=q, k_gmem=k, v_gmem=v, lengths_gmem=lengths)
  operands |= dict(zip(("codes_gmem", "ids_gmem"), lists))
  operands |= {f"{name}_gmem": x for name, x in outputs.items()}

  def body(
    *, q_gmem, k_gmem, v_gmem, lengths_gmem, chosen_gmem, q_smem, k_smem,
    v_smem, o_smem, ids_smem, q_ready, ids_ready, k_ring, v_ring,
    codes_gmem: Any = None, ids_gmem: Any = None, out_gmem: Any = None,
    counters_gmem: Any = None, part_gmem: Any = None, stats_gmem: Any = None,
    p_smem: Any = None,
  ):  # fmt: skip
    cta, wg = lax.axis_index("cta"), lax.axis_index("wg")
    query, split = lax.div(cta, splits), lax.rem(cta, splits)
    loc = _locate(query, lengths_gmem, s)
    first_block = _first_block(lengths_gmem, s)
    zero = cta * 0  # only a start that is not static may reach beyond the end
    heads = pl.ds(zero, s.heads)
    k_operands, k_to = mosaic.whole_and_tiles(k_smem)
    v_operands, v_to = mosaic.whole_and_tiles(v_smem)
    parts = _parts(s.kv_parts, s.kv_columns, zero)

    def my_steps():
      """How many attention steps this split has."""
      known = ids_smem[s.top_k] * per_block
      return lax.div(known + (splits - 1) - split, splits)

    def step_start(i):
      """First slot of the split's i-th attention step, of the device's."""
      index = split + i * splits
      before = 0 if s.devices == 1 else ids_smem[s.top_k + 1]
      block = ids_smem[before + lax.div(index, per_block)] - first_block
      offset = lax.rem(index, per_block) * step_keys
      return block * s.block_size + offset

    @pl.when(wg == 0)
    def _compute():
      plgpu.barrier_wait(q_ready)
      plgpu.barrier_wait(ids_ready)

      def step(i, carry):
        accs, m_i, l_i = carry
        slot = k_ring.slot(i)
        start = step_start(i)
        k_ring.wait_ready(slot)

        def scores(ref):
          for part, columns, _ in parts:
            queries = q_smem if s.kv_parts == 1 else q_smem.at[:, columns]
            keys = k_operands.at[_at(slot, s.kv_parts, part)]
            plgpu.wgmma(ref, queries, keys.transpose((1, 0)))
          return ref[...]

        x = pl.run_scoped(scores, ACC((ROWS, step_keys), jnp.float32))
        k_ring.release(slot)
        key = start + plgpu.broadcasted_iota(
          jnp.int32, x.shape, 1, layout=layout
        )
        # An infinite score becomes NaN, which the mask may still remove.
        x = jnp.where(key <= loc.position, x + x * 0.0, -jnp.inf)
        m_new = jnp.maximum(m_i, x.max(axis=1) * s.scale_log2)
        alpha = jnp.exp2(m_i - m_new)
        p = jnp.exp2(x * s.scale_log2 - _over_columns(m_new, step_keys))
        l_new = l_i * alpha + p.sum(axis=1)
        accs = [x * _over_columns(alpha, s.kv_columns) for x in accs]
        p = p.astype(s.dtype)
        v_ring.wait_ready(slot)

        @pl.when(start + step_keys - 1 > loc.position)
        def _():
          # An unused slot may hold NaN, and zero times NaN is NaN.
          for n, part in itertools.product(
            range(step_keys // ROWS), range(s.kv_parts)
          ):
            at = (_at(slot, s.kv_parts, part), pl.ds(n * ROWS, ROWS))
            value = plgpu.load(v_operands.at[at], layout=layout)
            token = (
              start
              + n * ROWS
              + plgpu.broadcasted_iota(jnp.int32, value.shape, 0, layout=layout)
            )
            v_operands[at] = jnp.where(
              token <= loc.position, value, jnp.zeros_like(value)
            )
          plgpu.commit_smem()

        def values(ref, part, p=p):
          plgpu.wgmma(ref, p, v_operands.at[_at(slot, s.kv_parts, part)])

        if s.interpret:
          p_smem[...] = p
          plgpu.commit_smem()

        sums = []
        for part, acc in enumerate(accs):
          product = functools.partial(values, part=part)
          if s.interpret:

            def fresh(ref, product=product):
              product(ref, p=p_smem)
              return ref[...]

            sums.append(
              acc + pl.run_scoped(fresh, ACC((ROWS, s.kv_columns), jnp.float32))
            )
          else:
            sums.append(pl.run_state(product)(ACC.init(acc)))
        v_ring.release(slot)
        return tuple(sums), m_new, l_new

      accs, m_i, l_i = lax.fori_loop(
        0,
        my_steps(),
        step,
        (
          tuple(
            _full(0.0, (ROWS, s.kv_columns), jnp.float32, layout) for _ in parts
          ),
          _full(FLOOR, (ROWS,), jnp.float32, row_layout),
          _full(0.0, (ROWS,), jnp.float32, row_layout),
        ),
      )

      def send(accs, x_gmem):
        """Copies the rows of the heads to memory, some columns at a time."""
        width = s.out_columns
        if width == d:
          pieces = [(accs[0], x_gmem)]
        else:
          pieces = [
            x if x.shape[1] == width else x[:, i : i + width]
            for x in accs
            for i in range(0, s.kv_columns, width)
          ]
          pieces = [
            (x, x_gmem.at[:, pl.ds(i * width, width)])
            for i, x in enumerate(pieces)
          ]
        for i, (piece, piece_gmem) in enumerate(pieces):
          if i:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
          o_smem[...] = piece
          plgpu.commit_smem()
          plgpu.copy_smem_to_gmem(o_smem.at[pl.ds(0, s.heads)], piece_gmem)

      if not s.partial:
        out = out_gmem.at[loc.b, loc.token, loc.group, heads]
        send(_finish_parts(accs, l_i, s), out)
        plgpu.wait_smem_to_gmem(0)
        return
      send(accs, part_gmem.at[query, split])
      stats_gmem[query, split, 0] = m_i
      stats_gmem[query, split, 1] = l_i
      plgpu.wait_smem_to_gmem(0)
      if s.merge_inside:
        _signal(counters_gmem.at[query])

    @pl.when(wg == 1)
    def _choose_and_copy():
      plgpu.copy_gmem_to_smem(
        q_gmem.at[loc.b, loc.token, loc.group, heads],
        q_smem.at[pl.ds(0, s.heads)],
        q_ready,
      )
      position = loc.position + first_block * s.block_size  # in the row
      own = jnp.where(position < 0, -1, lax.div(position, s.block_size))
      for j in range(s.local_blocks):
        ids_smem[j] = jnp.where(own >= j, own - j, NO_BLOCK)
      if s.slots:
        if s.devices == 1:
          window = s.window(s.scan_ctas)
          lists = _lists_of(lengths_gmem, loc.b, s)
        else:
          window = s.window(s.devices)
          lists = (loc.b * window, s.devices)

        def write(i, code, block):
          del code
          ids_smem[s.local_blocks + i] = block

        r = loc.token * s.num_kv_heads + loc.group
        _best_of_lists(codes_gmem, ids_gmem, r, lists, window, write, s)
      # No barrier is needed: every thread reads what it wrote itself.
      chosen = [ids_smem[j] for j in range(s.local_blocks + s.slots)]
      for i, j in sort_network(len(chosen)):
        low, high = chosen[i], chosen[j]
        chosen[i], chosen[j] = jnp.minimum(low, high), jnp.maximum(low, high)
      known = _count(x != NO_BLOCK for x in chosen)
      if s.devices > 1:
        # The device's own blocks are neighbours among ascending ids.
        before = _count(x < first_block for x in chosen)
        known = _count(x < first_block + s.num_blocks for x in chosen) - before
        ids_smem[s.top_k + 1] = before
      for j, block in enumerate(chosen):
        ids_smem[j] = block
      ids_smem[s.top_k] = known
      plgpu.barrier_arrive(ids_ready)

      def load(i, carry):
        slot = k_ring.slot(i)
        tokens = pl.ds(step_start(i), step_keys)
        for x_gmem, x_to, ring in (
          (k_gmem, k_to, k_ring),
          (v_gmem, v_to, v_ring),
        ):
          ring.wait_free(i, slot)
          for part, _, columns in parts:
            at = (loc.b, tokens, loc.group)
            plgpu.copy_gmem_to_smem(
              x_gmem.at[(*at, columns) if s.padded else at],
              x_to.at[_at(slot, s.kv_parts, part)],
              ring.ready_at(slot),
            )
        return carry

      steps = my_steps()
      lax.fori_loop(0, steps, load, None)

      @pl.when(split == 0)
      def _():
        for j in range(s.top_k):
          block = chosen[j] if j < len(chosen) else NO_BLOCK
          chosen_gmem[loc.b, loc.group, loc.token, j] = jnp.where(
            block == NO_BLOCK, -1, block
          )

      mosaic.drain_rings(steps, k_ring, v_ring)

    if s.merge_inside:
      first, step = split * 2 + wg, splits * 2

      @pl.when(first < s.group_size)
      def _():
        _wait_for(counters_gmem.at[query], splits)
        _merge_splits(
          query, first, step, lengths_gmem,
          (part_gmem, stats_gmem, out_gmem), s,
        )  # fmt: skip

  mosaic.launch(
    body,
    operands,
    name="decode_attend",
    num_ctas=s.all_queries * splits,
    num_warpgroups=2,
    scratch=_attend_scratch(s),
    interpret=s.interpret,
    auto_barriers=False,
  )


def _merge(lengths, part, stats, out, s: KernelParams) -> None:
  """Merges the splits of every query and head, in a kernel of its own."""

  def body(*, lengths_gmem, part_gmem, stats_gmem, out_gmem):
    cta = lax.axis_index("cta")
    query, head = lax.div(cta, s.group_size), lax.rem(cta, s.group_size)
    _merge_splits(
      query, head, s.group_size, lengths_gmem,
      (part_gmem, stats_gmem, out_gmem), s,
    )  # fmt: skip

  mosaic.launch(
    body,
    dict(lengths_gmem=lengths, part_gmem=part, stats_gmem=stats, out_gmem=out),
    name="decode_merge",
    num_ctas=s.all_queries * s.group_size,
    num_warpgroups=1,
    scratch={},
    interpret=s.interpret,
    auto_barriers=False,
  )


def _choose(lengths, lists, best, s: KernelParams) -> None:
  """Merges the lists of this device's shares to one list for each query.

  Args:
    lengths: see `_own_lengths`.
    lists: codes and ids that `_scan` wrote.
    best: Ref of the codes and ids, [2, B x queries, slots]. The ids count the
      blocks of all devices.
    s: static parameters.
  """

  def body(*, lengths_gmem, codes_gmem, ids_gmem, best_gmem):
    query = lax.axis_index("cta")
    b, r = lax.div(query, s.queries), lax.rem(query, s.queries)
    first_block = _first_block(lengths_gmem, s)

    def write(i, code, block):
      block = jnp.where(block == NO_BLOCK, NO_BLOCK, block + first_block)
      best_gmem[0, query, i], best_gmem[1, query, i] = code, block

    _best_of_lists(
      codes_gmem, ids_gmem, r, _lists_of(lengths_gmem, b, s),
      s.window(s.scan_ctas), write, s,
    )  # fmt: skip

  mosaic.launch(
    body,
    dict(
      lengths_gmem=lengths,
      codes_gmem=lists[0],
      ids_gmem=lists[1],
      best_gmem=best,
    ),
    name="decode_choose",
    num_ctas=s.all_queries,
    num_warpgroups=1,
    scratch={},
    interpret=s.interpret,
    auto_barriers=False,
  )


# ---- The operation ----


def _new(shape: tuple[int, ...], dtype: Any) -> Any:
  return jax.new_ref(lax.empty(shape, dtype))


def _pad_capacity(x: Array, s: KernelParams) -> Array:
  """Keys, values or scales of a multiple of 8 slots."""
  pad = -s.capacity % 8
  if not pad:
    return x
  return jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))


def _scanned(index_q, index_k, index_k_scale, lengths, s: KernelParams):
  """The lists that `_scan` writes, () without any, and attend's counters."""
  counters = _new((pl.cdiv(s.all_queries, 128) * 128,), jnp.int32)
  if not s.slots:
    if s.merge_inside:
      counters[...] = jnp.zeros(counters.shape, jnp.int32)
    return (), counters
  index_q = index_q.reshape(s.batch, s.queries, s.index_dim)
  if s.queries > 8 and s.queries % 8:  # a swizzle tile has 8 MMA rows
    index_q = jnp.pad(index_q, ((0, 0), (0, -s.queries % 8), (0, 0)))
  if not s.index_padded:
    index_k = _pad_capacity(index_k, s)
  if s.fp8:
    index_k_scale = _pad_capacity(index_k_scale, s)
  shape = (s.list_queries, s.slots, s.num_lists)
  lists = _new(shape, jnp.int32), _new(shape, jnp.int32)
  _scan(index_q, index_k, index_k_scale, lengths, (*lists, counters), s)
  return lists, counters


def _attended(q, k, v, lengths, lists, counters, s: KernelParams):
  """Attention to the best blocks of the lists: `_attend`'s outputs."""
  b, t, kv, g = s.batch, s.tokens, s.num_kv_heads, s.group_size
  # TMA copies up to 8 heads, or whole swizzle tiles of 8.
  heads = g if g <= 8 else s.heads
  q = q.reshape(b, t, kv, g, s.head_dim)
  q = jnp.pad(q, ((0, 0),) * 3 + ((0, heads - g), (0, 0)))
  outputs = dict(chosen=_new((b, kv, t, s.top_k), jnp.int32))
  if s.devices == 1:
    outputs["out"] = _new(q.shape, s.dtype)
  if s.partial:
    part = (s.all_queries, s.splits, s.heads, s.head_dim)
    outputs["part"] = _new(part, jnp.float32)
    outputs["stats"] = _new((*part[:2], 2, ROWS), jnp.float32)
  if s.merge_inside:
    outputs["counters"] = counters
  if not s.padded:
    k, v = (_pad_capacity(x, s) for x in (k, v))
  _attend(q, k, v, lengths, lists, outputs, s)
  if s.separate_merge:
    _merge(lengths, outputs["part"], outputs["stats"], outputs["out"], s)
  return outputs


@functools.partial(jax.jit, static_argnames=("s",))
def _decode(q, k, v, index_q, index_k, index_k_scale, lengths, s: KernelParams):
  head_dim = q.shape[-1]
  q, index_q = mosaic.pad_head_dim(q), mosaic.pad_head_dim(index_q)
  lists, counters = _scanned(index_q, index_k, index_k_scale, lengths, s)
  outputs = _attended(q, k, v, lengths, lists, counters, s)
  out = mosaic.result(outputs["out"])[..., : s.group_size, :]
  out = out.reshape(s.batch, s.tokens, -1, s.head_dim)[..., :head_dim]
  return out, mosaic.result(outputs["chosen"])


# ---- A cache that is split over devices ----


def _own_lengths(kv_lengths, axis_name: str, s: KernelParams):
  """Tokens of each batch row from this device's first slot on, and the id of
  its first block."""
  device = lax.axis_index(axis_name)
  lengths = jnp.clip(kv_lengths, 0, s.capacity * s.devices)
  return jnp.append(lengths - device * s.capacity, device * s.num_blocks)


@functools.partial(jax.jit, static_argnames=("s",))
def _own_best(index_q, index_k, index_k_scale, lengths, s: KernelParams):
  """This device's best blocks of each query: codes, ids [2, B, queries, P]."""
  lists, _ = _scanned(index_q, index_k, index_k_scale, lengths, s)
  best = _new((2, s.all_queries, s.slots), jnp.int32)
  _choose(lengths, lists, best, s)
  return (mosaic.result(best).reshape(2, s.batch, s.queries, s.slots),)


def _gather_lists(best, axis_name: str, s: KernelParams):
  """The devices' best blocks, as lists that attend merges.

  Returns:
    Codes and ids, [queries, slots, B x window] each: of a batch row, one list
    of each device, and then nothing up to the window.
  """
  best = lax.all_gather(best, axis_name, axis=4)
  window = s.window(s.devices)
  best = jnp.pad(best, ((0, 0),) * 4 + ((0, window - s.devices),))
  codes, ids = best.transpose(0, 2, 3, 1, 4)
  shape = (s.queries, s.slots, s.batch * window)
  return codes.reshape(shape), ids.reshape(shape)


@functools.partial(jax.jit, static_argnames=("s",))
def _attend_own(q, k, v, lengths, *lists, s: KernelParams):
  """Attention to those of the best blocks that this device holds.

  Returns:
    block_indices, and for each head [B x queries, G] the sum of values, m and
    l, as `_combine` has them, in one array [B x queries, G, D + 2].
  """
  outputs = _attended(q, k, v, lengths, lists, None, s)
  part, stats = (mosaic.result(outputs[x]) for x in ("part", "stats"))
  part = part[:, :, : s.group_size, : k.shape[-1]]
  m, l = (stats[:, :, i, : s.group_size, None] for i in (0, 1))
  part = _combine(jnp.concatenate([part, m, l], axis=-1), axis=1)
  return mosaic.result(outputs["chosen"]), part


def _combine(part: Array, axis: int) -> Array:
  """Adds up partial results along an axis, in its order.

  The last axis holds the sum of values of weights exp2(x - m), m, and l, the
  sum of the weights.
  """
  m = part[..., -2:-1]
  top = m.max(axis=axis, keepdims=True)
  total = jnp.sum(part * jnp.exp2(m - top), axis=axis)
  return jnp.concatenate(
    [total[..., :-2], jnp.squeeze(top, axis), total[..., -1:]], axis=-1
  )


def _decode_split(
  q, k, v, index_q, index_k, index_k_scale, kv_lengths, axis_name: str,
  s: KernelParams,
):  # fmt: skip
  """`_decode` over the devices of a mesh axis, which exchange their best blocks
  and then partial results."""

  def run(function):
    # Under vmap the kernels run once for each entry of the mapped axis.
    each = jax.custom_batching.sequential_vmap(functools.partial(function, s=s))
    return partition.kernel(each, s.interpret)

  shape = q.shape
  q, index_q = mosaic.pad_head_dim(q), mosaic.pad_head_dim(index_q)
  lengths = _own_lengths(kv_lengths, axis_name, s)
  lists = ()
  if s.slots:
    (best,) = run(_own_best)(index_q, index_k, index_k_scale, lengths)
    lists = _gather_lists(best, axis_name, s)
  chosen, part = run(_attend_own)(q, k, v, lengths, *lists)
  # With check_vma=True, out is then known to be the same on all devices.
  tracked = axis_name in jax.typeof(part).manual_axis_type.varying
  to = "invarying" if tracked else "varying"
  part = lax.all_gather(part, axis_name, to=to)
  part = _combine(part, axis=0)
  finish = jax.vmap(functools.partial(_finish, s=s))
  return finish(part[..., :-2], part[..., -1]).reshape(shape), chosen


@mosaic.in_32_bits
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
  axis_name: str | None = None,
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
    index_k_scale: float32 scale of each index key; given exactly if they are
      fp8.
    block_size: tokens of a block.
    top_k: P, blocks kept for each query and group.
    num_local_blocks: newest blocks, own one included, that are always kept.
    scale: of the scores, a positive number; D^-0.5 if None.
    axis_name: inside `jax.shard_map`, the mesh axis over whose devices the
      cache's slots are split: C are those of one device, whole blocks. The
      queries, kv_lengths and the results are the same on all.
    config: tile sizes; the defaults of `Config` if None.
    interpret: run on the CPU in Pallas's GPU interpret mode.

  Returns:
    out in q's dtype, 0 for a query that stands before the first token of its
    batch row, and block_indices: ascending block ids, then -1.

  Raises:
    NotImplementedError: the call is legal but beyond `mosaic`'s limits, the
      index keys have another dtype, so many index queries do not fit shared
      memory, or so many devices share a cache.
  """
  b, t, h, d = q.shape
  capacity, num_kv_heads = k.shape[1:3]
  index_dim = index_q.shape[-1]
  scale = float(d**-0.5 if scale is None else scale)
  mosaic.check_supported(
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
    index_dim=index_dim,
    fp8=index_k.dtype == FP8,
    top_k=top_k,
  )
  if index_k.dtype != (index_q.dtype if index_k_scale is None else FP8):
    raise NotImplementedError(
      "mosaic_gpu decode_attention supports index keys in index_q's dtype"
      f" ({index_q.dtype}) or float8_e4m3fn with a scale each, got"
      f" {index_k.dtype} {'without' if index_k_scale is None else 'with'}"
      " scales"
    )
  devices = 1 if axis_name is None else lax.axis_size(axis_name)
  if devices > MAX_DEVICES:
    raise NotImplementedError(
      "mosaic_gpu decode_attention supports a cache that is split over up to"
      f" {MAX_DEVICES} devices, got {devices}"
    )
  if not q.size or not k.size:
    ids = jnp.full((b, num_kv_heads, t, top_k), -1, jnp.int32)
    return jnp.zeros_like(q), ids

  def params_of(q, k, index_q, index_k):
    num_blocks = devices * pl.cdiv(capacity, block_size)
    return KernelParams(
      batch=q.shape[0],
      tokens=t,
      num_kv_heads=k.shape[2],
      group_size=h // num_kv_heads,
      head_dim=mosaic.padded_head_dim(d),
      index_dim=mosaic.padded_head_dim(index_dim),
      padded=mosaic.padded_head_dim(d) != d,
      index_padded=mosaic.padded_head_dim(index_dim) != index_dim,
      capacity=capacity,
      block_size=block_size,
      top_k=top_k,
      local_blocks=min(num_local_blocks, top_k, num_blocks),
      scale_log2=scale * mosaic.LOG2E,
      dtype=jnp.dtype(q.dtype),
      index_dtype=jnp.dtype(index_q.dtype),
      key_dtype=jnp.dtype(index_k.dtype),
      config=config or Config(),
      interpret=interpret,
      devices=devices,
    )

  kv_lengths = kv_lengths.astype(jnp.int32)
  scale_letters = "B C"
  if index_k_scale is None:
    index_k_scale, scale_letters = jnp.zeros((), jnp.float32), ""
  operands = (q, k, v, index_q, index_k, index_k_scale, kv_lengths)
  if axis_name is not None and devices > 1:
    params = params_of(q, k, index_q, index_k)
    return _decode_split(*operands, axis_name=axis_name, s=params)

  # Under vmap the kernels run once for each entry of the mapped axis.
  @jax.custom_batching.sequential_vmap
  def run(q, k, v, index_q, index_k, *rest):
    params = params_of(q, k, index_q, index_k)
    return _decode(q, k, v, index_q, index_k, *rest, s=params)

  split = partition.by_rows_and_heads(
    partition.kernel(run, interpret),
    (
      *("B T H D", "B C K D", "B C K D", "B T K I", "B C I"),
      *(scale_letters, "B"),
    ),
    ("B T H D", "B K T P"),
    interpret=interpret,
  )
  return split(*operands)
