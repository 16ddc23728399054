"""Block selection of MiniMax Sparse Attention, fused: scores, max, top-k.

For every query t and group g (arXiv 2606.13392, Index Branch):

  s(t, j) = index_q[t, g] . index_k[j]           float32, visible keys only
  block score = max of s over the block's visible keys
  choice = the num_local_blocks newest blocks up to the query's own (forced),
           then the blocks of highest score; ties go to the lower id

Nothing of size T x S or T x N is written: block maxima pass from the tensor
cores' registers through shared memory into a running top-k in registers.

All groups share one index_k, so each (query, group) is one MMA row, in memory
order of index_q. One CTA owns a tile of MMA rows and walks the key blocks that
may still be chosen for any of them. The tiles with the most blocks start first.
Warpgroup roles:

  score warpgroups   make infinite queries NaN, in shared memory and once; then
                     wgmma of their MMA rows with 128 keys a step, max over each
                     block, maxima to shared memory. Forced blocks need no
                     score, so these warpgroups meet no partly visible block
                     unless num_local_blocks = 0.
  choice warpgroup   loads key tiles by TMA and keeps the best blocks of the
                     whole tile, one MMA row a thread and register. Four lanes
                     of a wgmma accumulator hold the same row's maximum, so
                     keeping the list there would take four times the
                     instructions. At the end it adds the forced blocks and
                     sorts the ids.

Score precisions:
  exact  (float32 score, id) pairs. The products of bf16 and f16 are exact in
         float32; only the order of summation is the tensor core's.
  fast   one int32 key a block: the score in an order-preserving code whose low
         bits hold the id. 23 - ceil(log2 N) mantissa bits stay, at least 10;
         more than 8192 blocks are ranked exactly.
  fp8    as fast, on e4m3 operands. Each row of index_q has one scale, which
         cannot change the ranking of the row and is dropped. Each block of
         index_k has one, which multiplies the block's maximum. Scales are
         powers of two, so a key's rounding does not depend on its neighbours.

A block whose visible scores hold NaN is not chosen unless it is forced. An
infinite entry of an operand counts as NaN, as in the reference, whatever its
sign. Finite operands whose products overflow score an infinity.

Barriers:

  name        who arrives                            who waits
  q_ready     one a score warpgroup: the copy of     score, itself
              its MMA rows
  k_ready     one a stage: the copy of a key tile    score
  max_ring    ready: each score warpgroup, when      choice
              its maxima of a key tile are in SMEM
              free: choice, which has read them      score

Key tiles have no barrier of their own that frees them: when max_ring is ready,
all score warpgroups have multiplied the tile, and the choice warpgroup itself
loads the next one in its place.

SMEM (bf16, I = 128): queries 64 KiB, four key tiles 128 KiB, maxima 4 KiB.

Index heads of other sizes than 64 and 128 are padded with zeros to the next of
these, which changes no score.

Packed rows (`packed_rows`): a CTA gets its tile from a list, the one with most
key tiles first, and with it up to four ranges of key tiles, which hold all
blocks that a query of the tile may see. Other documents are not among them, and
other branches of a tree only where a path has more than four runs of blocks.
The blocks of a row that compete, and its forced blocks, come from a table. A
block that is shorter than the others repeats its last key, which changes no
maximum. A program for plain rows has no code for that.

Not supported: what `mosaic.check_supported` refuses. Choosing has no gradient:
index_q and index_k are taken under stop_gradient.
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

from pallas_kernels import mosaic, packed_rows, partition

_WARPGROUP = 128
_MAX_PACKED_BLOCKS = 1 << 13
_LOWEST = float(jnp.finfo(jnp.float32).min)
_NO_KEY = -(1 << 31)
_NO_BLOCK = (1 << 31) - 1
_FP8 = jnp.float8_e4m3fn
_RANGES = 4  # ranges of key tiles that a tile of packed rows may have


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Tile sizes; they never change the answer.

  Attributes:
    warpgroup_rows: MMA rows that a score warpgroup multiplies with a key tile.
    score_warpgroups: score warpgroups of a CTA.
    step_keys: keys of a key tile.
    stages: key tiles in flight.
  """

  warpgroup_rows: int = 128
  score_warpgroups: int = 2
  step_keys: int = 128
  stages: int = 4

  def __post_init__(self):
    if self.warpgroup_rows % 64 or self.tile_rows % _WARPGROUP:
      raise ValueError(
        "warpgroup_rows must be a multiple of 64 and make a tile of a multiple"
        f" of {_WARPGROUP} rows, got {self}"
      )
    if self.step_keys % 128:
      raise ValueError(f"step_keys must be a multiple of 128, got {self}")

  @property
  def tile_rows(self) -> int:
    return self.warpgroup_rows * self.score_warpgroups


def _scratch(
  config: Config, index_dim: int, block_size: int, dtype: jnp.dtype
) -> dict:
  """Shared memory and barriers of one CTA."""
  row_bytes = index_dim * jnp.dtype(dtype).itemsize
  swizzle = min(row_bytes, 128)
  columns = swizzle // jnp.dtype(dtype).itemsize
  transforms = (
    plgpu.TilingTransform((8, columns)),  # pyright: ignore
    plgpu.SwizzleTransform(swizzle),  # pyright: ignore
  )
  blocks = config.step_keys // block_size
  wgs, stages = config.score_warpgroups, config.stages
  return dict(
    q_smem=plgpu.SMEM(
      (wgs, config.warpgroup_rows, index_dim), dtype, transforms=transforms
    ),
    k_smem=plgpu.SMEM(
      (stages, config.step_keys, index_dim), dtype, transforms=transforms
    ),
    max_smem=plgpu.SMEM((stages, blocks, config.tile_rows), jnp.float32),
    q_ready=plgpu.Barrier(num_barriers=wgs),
    k_ready=plgpu.Barrier(num_barriers=stages),
    max_ring=mosaic.ring(stages, fills=wgs),
  )


def heuristic_config(num_rows: int, list_values: int = 0) -> Config:
  """The config used when none is given.

  Args:
    num_rows: MMA rows: batch x queries x groups.
    list_values: 32-bit values of a row's list: two a choice slot, or one if
      score and id are packed.
  """
  config = Config()
  # With 128 rows a warpgroup, each thread of the choice warpgroup keeps the
  # lists of two rows, which must fit its 168 registers.
  if list_values > 2 * mosaic.LONG_LIST:
    return dataclasses.replace(config, warpgroup_rows=64)
  # With at most two waves of tiles, the longest tile decides the time, so
  # smaller tiles are faster.
  if num_rows <= 2 * mosaic.NUM_SMS * config.tile_rows:
    config = dataclasses.replace(config, warpgroup_rows=64)
  return config


def sort_network(length: int) -> list[tuple[int, int]]:
  """Comparators of Batcher's odd-even merge sort of `length` values."""
  comparators = []
  p = 1
  while p < length:
    k = p
    while k >= 1:
      for j in range(k % p, length - k, 2 * k):
        for i in range(min(k, length - j - k)):
          if (i + j) // (2 * p) == (i + j + k) // (2 * p):
            comparators.append((i + j, i + j + k))
      k //= 2
    p *= 2
  return comparators


class _PackedOperands(NamedTuple):
  """Operands of packed rows.

  Attributes:
    tiles: int32 [B * tiles, 2 + 2 * _RANGES], in the order of the CTAs: batch
      row, tile in it, number of key tiles, what to add to a key tile's
      number among these to get the key tile, and then for each further range
      the number from which on it holds, and what to add there.
    table: int32 [B, 1 + forced, MMA rows]: the block below which blocks compete
      for the MMA row, and its forced blocks, `_NO_BLOCK` if there are fewer;
      without forced blocks the position of its query.
    until: int32 [B, blocks]: queries from this number on do not see a block.
  """

  tiles: Any
  table: Any
  until: Any


def _select_kernel(
  q_gmem,
  k_gmem,
  k_scale_gmem,
  kv_lengths_gmem,
  packed_gmem: _PackedOperands | None,
  out_gmem,
  *,
  q_smem,
  k_smem,
  max_smem,
  q_ready,
  k_ready,
  max_ring: mosaic.Ring,
  config: Config,
  q_len: int,
  num_groups: int,
  block_size: int,
  num_blocks: int,
  slots: int,  # choice slots that are filled by score
  num_local_blocks: int,
  packed: bool,
):
  rows, wgs, stages = (
    config.warpgroup_rows,
    config.score_warpgroups,
    config.stages,
  )
  tile_rows = config.tile_rows
  step_keys = config.step_keys
  step_blocks = step_keys // block_size
  batch_size = q_gmem.shape[0]
  num_tiles = q_gmem.shape[1] // tile_rows

  cta = lax.axis_index("tile")
  if packed_gmem is None:
    # Later queries see more blocks; their tiles start first.
    batch = lax.rem(cta, batch_size)
    base = (num_tiles - 1 - lax.div(cta, batch_size)) * tile_rows
    first_position = kv_lengths_gmem[batch] - q_len
  else:
    batch, tile, num_steps, shift, *ranges = (
      packed_gmem.tiles[cta, i] for i in range(2 + 2 * _RANGES)
    )
    base = tile * tile_rows

  def key_tile(i):
    """The i-th key tile that this CTA walks."""
    if packed_gmem is None:
      return i
    by = shift
    for first, more in zip(ranges[::2], ranges[1::2], strict=True):
      by = jnp.where(i >= first, more, by)
    return i + by

  def own_block(row):
    position = first_position + lax.div(row, num_groups)
    return jnp.where(position < 0, -1, lax.div(position, block_size))

  # Blocks below own_block(r) + unforced compete for the choice of MMA row r.
  unforced = 1 - num_local_blocks
  if packed_gmem is None:
    last_row = jnp.minimum(base + tile_rows, q_len * num_groups) - 1
    limit = jnp.clip(own_block(last_row) + unforced, 0, num_blocks)
    num_steps = lax.div(limit + step_blocks - 1, step_blocks)
  wg = lax.axis_index("wg")

  @pl.when(wg < wgs)
  def score_warpgroup():
    row = base + wg * rows
    plgpu.copy_gmem_to_smem(
      q_gmem.at[batch, pl.ds(row, rows)], q_smem.at[wg], q_ready.at[wg]
    )
    plgpu.barrier_wait(q_ready.at[wg])
    layout = plgpu.Layout.WGMMA
    if q_gmem.dtype != _FP8:
      # An infinity counts as NaN. XLA would have to copy all queries for this.
      x = q_smem[wg]
      x = jnp.where(jnp.abs(x.astype(jnp.float32)) < jnp.inf, x, jnp.nan)
      q_smem[wg] = x
      plgpu.commit_smem()

    def step(i, masked):
      slot = max_ring.slot(i)
      plgpu.barrier_wait(k_ready.at[slot])

      def matmul(acc):
        plgpu.wgmma(acc, q_smem.at[wg], k_smem.at[slot].transpose((1, 0)))
        return acc[...]

      accumulator = plgpu.ACC((rows, step_keys), jnp.float32)  # pyright: ignore
      s = pl.run_scoped(matmul, accumulator)
      if masked:
        r = plgpu.broadcasted_iota(jnp.int32, s.shape, 0, layout=layout)
        c = plgpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=layout)
        if packed_gmem is None:
          position = first_position + lax.div(row + r, num_groups)
        else:
          position = plgpu.load(
            packed_gmem.table.at[batch, 1, pl.ds(row, rows)],
            layout=layout.reduce(1),
            optimized=False,
          )
          position = lax.broadcast_in_dim(position, s.shape, [0])
        key = key_tile(i) * step_keys + c
        s = jnp.where(key <= position, s, -jnp.inf)
      maxima = [
        s[:, b * block_size : (b + 1) * block_size].max(axis=1)
        for b in range(step_blocks)
      ]
      max_ring.wait_free(i, slot)
      for b, m in enumerate(maxima):
        max_smem[slot, b, pl.ds(wg * rows, rows)] = m
      max_ring.fill(slot)

    # If the own block is forced, every block that competes is fully visible.
    masked_from = num_steps
    if num_local_blocks == 0 and packed_gmem is not None:
      masked_from = 0
    elif num_local_blocks == 0:
      masked_from = lax.div(jnp.maximum(own_block(base), 0), step_blocks)
      masked_from = jnp.minimum(masked_from, num_steps)

    @pl.loop(0, masked_from)
    def _(i):
      step(i, masked=False)

    if num_local_blocks == 0:

      @pl.loop(masked_from, num_steps)
      def _(i):
        step(i, masked=True)

  @pl.when(wg == wgs)
  def choice_warpgroup():
    layout = plgpu.Layout.WG_STRIDED(
      (tile_rows,), vec_size=tile_rows // _WARPGROUP
    )

    def full(value, dtype):
      return plgpu.layout_cast(jnp.full((tile_rows,), value, dtype), layout)

    def load_keys(i, slot):
      plgpu.copy_gmem_to_smem(
        k_gmem.at[batch, pl.ds(key_tile(i) * step_keys, step_keys)],
        k_smem.at[slot],
        k_ready.at[slot],
      )

    row = base + plgpu.broadcasted_iota(
      jnp.int32, (tile_rows,), 0, layout=layout
    )
    if packed_gmem is None:
      own = own_block(row)
      row_limit = own + unforced
    else:
      table_gmem = packed_gmem.table

      def of_table(i):
        return plgpu.load(
          table_gmem.at[batch, i, pl.ds(base, tile_rows)],
          layout=layout,
          optimized=False,
        )

      row_limit = of_table(0)
      row_slot = lax.div(row, num_groups)

    def insert_pair(best, m, block):
      # The list is sorted by descending score. A candidate goes behind equal
      # scores, which came earlier and so have lower ids. NaN compares false and
      # is never inserted.
      values, ids = best
      block = full(block, jnp.int32)
      above = [m > v for v in values]
      new_values, new_ids = [], []
      for j in range(slots):
        value = lax.select(above[j], m, values[j])
        index = lax.select(above[j], block, ids[j])
        if j:
          value = lax.select(above[j - 1], values[j - 1], value)
          index = lax.select(above[j - 1], ids[j - 1], index)
        new_values.append(value)
        new_ids.append(index)
      return tuple(new_values), tuple(new_ids)

    id_mask = (1 << max(num_blocks - 1, 1).bit_length()) - 1

    def insert_packed(keys, m, block):
      bits = lax.bitcast_convert_type(m, jnp.int32)
      bits = jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
      key = (bits & ~id_mask) | (id_mask - block)
      key = jnp.where(m == m, key, _NO_KEY)
      return tuple(
        lax.max(keys[j], lax.min(keys[j - 1], key) if j else key)
        for j in range(slots)
      )

    insert = insert_packed if packed else insert_pair

    def step(i, best):
      slot = max_ring.slot(i)
      first_block = key_tile(i) * step_blocks
      scales = []
      if k_scale_gmem is not None:
        # These loads come before the wait, which hides their latency.
        scales = [
          k_scale_gmem[batch, first_block + b] for b in range(step_blocks)
        ]
      if packed_gmem is not None:
        untils = [
          packed_gmem.until[batch, first_block + b] for b in range(step_blocks)
        ]
      max_ring.wait_ready(slot)
      maxima = [
        plgpu.load(max_smem.at[slot, b], layout=layout)
        for b in range(step_blocks)
      ]

      # All score warpgroups have given their maxima, so none reads the key tile
      # any more.
      @pl.when(i + stages < num_steps)
      def _():
        max_ring.release(slot)
        load_keys(i + stages, slot)

      for b in range(step_blocks):
        m, block = maxima[b], first_block + b
        if scales:
          m = m * scales[b]
        # NaN is never inserted. A visible block that scores -inf must rank
        # before no block.
        m = jnp.maximum(m, _LOWEST)
        competes = block < row_limit
        if packed_gmem is not None:
          competes &= row_slot < untils[b]
        m = jnp.where(competes, m, jnp.nan)
        best = insert(best, m, block)
      return best

    @pl.loop(0, jnp.minimum(stages, num_steps))
    def _(i):
      load_keys(i, i)

    if packed:
      best = tuple(full(_NO_KEY, jnp.int32) for _ in range(slots))
    else:
      best = (
        tuple(full(-jnp.inf, jnp.float32) for _ in range(slots)),
        tuple(full(_NO_BLOCK, jnp.int32) for _ in range(slots)),
      )
    best = lax.fori_loop(0, num_steps, step, best)

    if packed:
      ids = [
        jnp.where(key == _NO_KEY, _NO_BLOCK, id_mask - (key & id_mask))
        for key in best
      ]
    else:
      ids = list(best[1])
    for j in range(num_local_blocks):
      if packed_gmem is None:
        ids.append(jnp.where(own >= j, own - j, _NO_BLOCK))
      else:
        ids.append(of_table(1 + j))
    for a, b in sort_network(len(ids)):
      ids[a], ids[b] = lax.min(ids[a], ids[b]), lax.max(ids[a], ids[b])
    for j, value in enumerate(ids):
      value = jnp.where(value == _NO_BLOCK, -1, value)
      out_gmem[batch, j, pl.ds(base, tile_rows)] = value


def power_of_two_scale(
  amax: Float[Array, "*A"],
) -> tuple[Float[Array, "*A"], Float[Array, "*A"]]:
  """2^e with 128 <= amax 2^e < 256, and 2^-e: e4m3 holds up to 448."""
  bits = lax.bitcast_convert_type(amax.astype(jnp.float32), jnp.int32)
  exponent = jnp.minimum(jnp.maximum(bits >> 23, 8), 253)
  return (
    lax.bitcast_convert_type((261 - exponent) << 23, jnp.float32),
    lax.bitcast_convert_type((exponent - 7) << 23, jnp.float32),
  )


def _finite_max(x: Float[Array, "*A"], axes: tuple[int, ...]):
  x = jnp.abs(x.astype(jnp.float32))
  return jnp.max(jnp.where(jnp.isfinite(x), x, 0), axis=axes, keepdims=True)


def quantise_queries(index_q: Float[Array, "*A I"]) -> Float[Array, "*A I"]:
  """index_q in e4m3; each row has its own scale, which is not returned."""
  factor, _ = power_of_two_scale(_finite_max(index_q, (-1,)))
  return _to_fp8(index_q.astype(jnp.float32) * factor)


def quantise_keys(
  index_k: Float[Array, "B S I"],
  block_size: int,
  kv_lengths: Int[Array, "B"],
) -> tuple[Float[Array, "B S I"], Float[Array, "B N"]]:
  """index_k in e4m3, and the factor that undoes each block's scale.

  S must be a multiple of block_size. Slots from kv_lengths on hold no key and
  do not influence a block's scale.
  """
  batch, kv_len, index_dim = index_k.shape
  blocks = index_k.reshape(batch, -1, block_size, index_dim)
  slot = jnp.arange(kv_len, dtype=jnp.int32).reshape(1, -1, block_size, 1)
  live = jnp.where(slot < kv_lengths[:, None, None, None], blocks, 0)
  factor, scale = power_of_two_scale(_finite_max(live, (2, 3)))
  quantised = _to_fp8(blocks.astype(jnp.float32) * factor)
  return quantised.reshape(index_k.shape), scale[:, :, 0, 0]


def _to_fp8(x: Float[Array, "*A"]) -> Float[Array, "*A"]:
  # The cast turns what is above 448 into NaN; clip keeps NaN as it is.
  return jnp.clip(x, -448, 448).astype(_FP8)


@mosaic.in_32_bits
def select_blocks(
  index_q: Float[Array, "B T K I"],
  index_k: Float[Array, "B S I"],
  *,
  block_size: int = 128,
  top_k: int = 16,
  num_local_blocks: int = 1,
  kv_lengths: Int[Array, "B"] | None = None,
  layout: packed_rows.Layout | None = None,
  score_precision: str = "exact",
  config: Config | None = None,
  interpret: bool = False,
) -> Int[Array, "B K T P"]:
  """Chooses the KV blocks of each query and group on a Hopper GPU.

  Args:
    index_q: one index query a group; the T queries are the last of S, or of
      kv_lengths.
    index_k: index keys, shared by all groups.
    block_size: keys in a block.
    top_k: P, blocks kept for each query and group.
    num_local_blocks: newest blocks, own one included, that are always kept.
    kv_lengths: number of keys of each batch row; S if None.
    layout: blocks of packed rows; None for plain rows.
    score_precision: "exact", "fast" or "fp8", see the module's docstring.
    config: tile sizes; `heuristic_config` if None.
    interpret: run on the CPU in Pallas's GPU interpret mode.

  Returns:
    Ascending block ids, then -1.

  Raises:
    NotImplementedError: the call is legal but beyond `mosaic`'s limits.
  """
  batch, q_len, num_groups, index_dim = index_q.shape
  kv_len = index_k.shape[1]
  mosaic.check_supported(
    dtype=index_q.dtype,
    block_size=block_size,
    top_k=top_k,
    kv_len=kv_len,
    num_blocks=packed_rows.num_blocks(layout),
    index_dim=index_dim,
    num_choices=batch * num_groups * q_len * top_k,
  )
  index_q, index_k = lax.stop_gradient((index_q, index_k))
  if kv_lengths is None:
    kv_lengths = jnp.full((batch,), kv_len, jnp.int32)
  else:
    kv_lengths = jnp.clip(kv_lengths.astype(jnp.int32), 0, kv_len)
  run = functools.partial(
    _select,
    block_size=block_size,
    top_k=top_k,
    num_local_blocks=num_local_blocks,
    score_precision=score_precision,
    config=config,
    interpret=interpret,
  )
  rows, letters = packed_rows.operands(
    packed_rows.of_layout(layout, block_size, q_len, kv_lengths)
  )
  run = partition.by_rows_and_heads(
    partition.kernel(run, interpret),
    ("B T K I", "B S I", "B", *letters),
    ("B K T P",),
    interpret=interpret,
  )
  return run(index_q, index_k, kv_lengths, *rows)[0]


def _select(
  index_q: Float[Array, "B T K I"],
  index_k: Float[Array, "B S I"],
  kv_lengths: Int[Array, "B"],
  *rows: Array,
  block_size: int,
  top_k: int,
  num_local_blocks: int,
  score_precision: str,
  config: Config | None,
  interpret: bool,
) -> tuple[Int[Array, "B K T P"]]:
  """`select_blocks` of checked arguments."""
  batch, q_len, num_groups, index_dim = index_q.shape
  kv_len = index_k.shape[1]
  num_blocks = pl.cdiv(kv_len, block_size)
  packed_row = packed_rows.of_arrays(rows)
  if packed_row is not None:
    num_blocks = packed_row.num_blocks
    kv_len = num_blocks * block_size

  # Forced blocks come first. If they fill all choice slots, there is nothing to
  # rank.
  num_local_blocks = min(num_local_blocks, top_k, num_blocks)
  slots = min(top_k, num_blocks) - num_local_blocks
  if slots == 0:
    if packed_row is None:
      ids = _forced_blocks(kv_lengths, q_len, block_size, num_local_blocks)
    else:
      ids = packed_row.newest_blocks(num_local_blocks).swapaxes(1, 2)
      ids = lax.sort(jnp.where(ids < 0, _NO_BLOCK, ids), is_stable=False)
      ids = jnp.where(ids == _NO_BLOCK, -1, ids)
    ids = jnp.broadcast_to(
      ids[:, None], (batch, num_groups, q_len, num_local_blocks)
    )
    return (_pad_axis(ids, 3, top_k, -1),)

  # An infinity becomes NaN: in index_k here, which costs a copy, and in index_q
  # inside the kernel, unless XLA quantises it anyway.
  index_k = jnp.where(jnp.isfinite(index_k), index_k, jnp.nan)
  if score_precision == "fp8":
    index_q = jnp.where(jnp.isfinite(index_q), index_q, jnp.nan)
  index_q, index_k = map(mosaic.pad_head_dim, (index_q, index_k))
  if packed_row is not None:
    index_k = packed_row.to_blocks(index_k, repeat=True)
    kv_lengths = jnp.full_like(kv_lengths, kv_len)
  index_dim = index_q.shape[-1]
  num_rows = q_len * num_groups
  packed = score_precision != "exact" and num_blocks <= _MAX_PACKED_BLOCKS
  config = config or heuristic_config(
    batch * num_rows, slots if packed else 2 * slots
  )
  step_keys = config.step_keys
  index_k = _pad_axis(index_k, 1, pl.cdiv(kv_len, step_keys) * step_keys)
  k_scale = None
  if score_precision == "fp8":
    index_q = quantise_queries(index_q)
    index_k, k_scale = quantise_keys(index_k, block_size, kv_lengths)

  num_tiles = pl.cdiv(num_rows, config.tile_rows)
  padded_rows = num_tiles * config.tile_rows
  index_q = index_q.reshape(batch, num_rows, index_dim)
  index_q = _pad_axis(index_q, 1, padded_rows)

  inputs = [index_q, index_k, kv_lengths]
  if k_scale is not None:
    inputs.insert(2, k_scale)
  if packed_row is not None:
    inputs += _packed_operands(
      packed_row,
      num_groups=num_groups,
      num_local_blocks=num_local_blocks,
      padded_rows=padded_rows,
      config=config,
    )

  def kernel(*refs, **scratch):
    q_gmem, k_gmem, *rest, out_gmem = refs
    k_scale_gmem = rest.pop(0) if k_scale is not None else None
    kv_lengths_gmem, *rest = rest
    _select_kernel(
      q_gmem,
      k_gmem,
      k_scale_gmem,
      kv_lengths_gmem,
      _PackedOperands(*rest) if rest else None,
      out_gmem,
      **scratch,
      config=config,
      q_len=q_len,
      num_groups=num_groups,
      block_size=block_size,
      num_blocks=num_blocks,
      slots=slots,
      num_local_blocks=num_local_blocks,
      packed=packed,
    )

  ids = plgpu.kernel(
    kernel,
    out_type=jax.ShapeDtypeStruct(
      (batch, slots + num_local_blocks, padded_rows), jnp.int32
    ),
    scratch_types=_scratch(config, index_dim, block_size, index_q.dtype),
    grid=(num_tiles * batch,),
    grid_names=("tile",),
    num_threads=config.score_warpgroups + 1,
    thread_name="wg",
    # A score warpgroup writes its queries once, and waits for that itself. No
    # other warpgroup reads what this one wrote but at a barrier.
    compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    interpret=plgpu.InterpretGPUParams() if interpret else False,
    kernel_name=f"msa_select_{score_precision}",
  )(*map(mosaic.kept_apart, inputs))
  ids = mosaic.kept_apart(ids)[:, :, :num_rows].reshape(
    batch, -1, q_len, num_groups
  )
  ids = _pad_axis(ids.transpose(0, 3, 2, 1), 3, top_k, -1)
  # In one axis they have this order in memory too. Else XLA keeps the kernel's
  # for what is made of them, and writes much of that once more in the other.
  return (mosaic.kept_apart(ids.reshape(-1)).reshape(ids.shape),)


def _packed_operands(
  rows: packed_rows.PackedRows,
  *,
  num_groups: int,
  num_local_blocks: int,
  padded_rows: int,
  config: Config,
) -> _PackedOperands:
  """What the kernel reads of packed rows."""
  own = rows.own_block
  if num_local_blocks:
    newest = rows.newest_blocks(num_local_blocks)
    forced = jnp.where(newest < 0, _NO_BLOCK, newest)
    # What is older than the oldest forced block competes.
    limit = jnp.maximum(newest[:, -1:], 0)
  else:
    limit, forced = own[:, None] + 1, rows.positions[:, None]
  table = jnp.concatenate([limit, forced], axis=1)
  table = jnp.repeat(table, num_groups, axis=2)
  own = jnp.repeat(own, num_groups, axis=1)
  pad = padded_rows - own.shape[1]
  # MMA rows behind the last one choose nothing.
  fill = -1 if num_local_blocks == 0 else _NO_BLOCK
  table = jnp.pad(table, ((0, 0), (0, 0), (0, pad)), constant_values=fill)
  table = table.at[:, 0, own.shape[1] :].set(0)
  own = jnp.pad(own, ((0, 0), (0, pad)), constant_values=-1)

  batch = len(own)
  own, limit = (
    x.reshape(batch, -1, config.tile_rows) for x in (own, table[:, 0])
  )
  oldest = jnp.min(jnp.where(own < 0, _NO_BLOCK, own), axis=-1)
  oldest = jnp.where(oldest == _NO_BLOCK, -1, oldest)
  block_size = rows.block_size
  each = config.step_keys // block_size  # blocks of a key tile
  above = None
  key_tiles = []  # from the highest range to the lowest
  for first, stop in rows.path_ranges(oldest, limit.max(axis=-1), _RANGES):
    stop = -(-stop // each)
    if above is not None:  # a key tile may hold blocks of two ranges
      stop = jnp.minimum(stop, above)
    first = above = jnp.minimum(first // each, stop)
    key_tiles.append((first, stop))
  total = jnp.zeros_like(oldest)
  fields = []
  for first, stop in key_tiles[::-1]:
    fields += [total, first - total]
    total = total + stop - first
  row = jnp.arange(batch, dtype=jnp.int32)[:, None]
  tile = jnp.arange(oldest.shape[1], dtype=jnp.int32)[None]
  fields = [row, tile, total, *fields[1:]]
  tiles = jnp.stack([jnp.broadcast_to(x, total.shape) for x in fields], axis=-1)
  order = jnp.argsort(-total.reshape(-1))
  tiles = tiles.reshape(-1, tiles.shape[-1])[order]
  until = _pad_axis(rows.until, 1, pl.cdiv(rows.num_blocks, each) * each)
  return _PackedOperands(tiles.astype(jnp.int32), table, until)


def _forced_blocks(
  kv_lengths: Int[Array, "B"],
  q_len: int,
  block_size: int,
  num_local_blocks: int,
) -> Int[Array, "B T L"]:
  """The num_local_blocks newest blocks of each query, ascending, then -1."""
  position = kv_lengths[:, None] - q_len + jnp.arange(q_len, dtype=jnp.int32)
  own = jnp.where(position < 0, -1, position // block_size)[..., None]
  first = jnp.maximum(own - num_local_blocks + 1, 0)
  ids = first + jnp.arange(num_local_blocks, dtype=jnp.int32)
  return jnp.where(ids <= own, ids, -1)


def _pad_axis(x: Array, axis: int, size: int, value: int = 0) -> Array:
  if x.shape[axis] == size:
    return x
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, size - x.shape[axis])
  return jnp.pad(x, widths, constant_values=value)
