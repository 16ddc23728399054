"""What the Mosaic GPU kernels support, and the launch they share.

The limits of devices, dtypes and sizes stand here, and `check_supported` raises
an error that names them. Limits of a single operation stand in its own module:
in `dense_attention` and `msa_jax.mosaic_gpu` (as many keys as queries, no
kv_lengths) and in `decode` (dtype of index keys, and how many index queries fit
in shared memory). The kernels need Hopper (compute capability 9.0) because they
use wgmma, TMA and setmaxnreg.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Int, UInt32

DTYPES = ("bfloat16", "float16")
HEAD_DIMS = (64, 128, 256)  # D (and I) in a kernel: whole 128-byte swizzles
MAX_HEAD_DIM = 256  # D, a multiple of 8
MAX_INDEX_DIM = 128  # I, likewise
MAX_DENSE_HEAD_DIM = 128  # D of the warm-up's kernels
# Heads of more dims are *wide*: their tiles do not fit SMEM or registers as
# those of other heads do, so kernels take smaller ones or fewer of them.
WIDE = 128
BLOCK_SIZES = (64, 128)
MAX_GROUP_SIZE = 16  # G
MAX_TOP_K = 64  # P
# With lists of more entries, a thread keeps the list of one MMA row (selection)
# or one query (decoding), and not of two: 64 scores and 64 ids are 128 of its
# 168 registers.
LONG_LIST = 32
MAX_BLOCKS = 1 << 15  # N: a block id and a choice slot share an int32
MAX_CHOICES = (1 << 31) - 1  # B x K x T x P: offsets of ids are 32 bits
MAX_DECODE_TOKENS = 16  # T of decoding
MAX_DECODE_ROWS = 256  # T x K of decoding: MMA rows of one wgmma step
MAX_TMA_ROWS = 1 << 31  # B x C x K of a cache: TMA coordinates are 32 bits

LOG2E = math.log2(math.e)
LN2 = math.log(2.0)
FLOOR = -1e30  # below any score; avoids (-inf) - (-inf) in the softmax
NEVER = jnp.iinfo(jnp.int32).max  # a position that no query reaches
NUM_SMS = 132
SMEM_LIMIT = 232_448  # bytes a CTA may use on Hopper


def divisors(x: int) -> list[int]:
  return [n for n in range(1, x + 1) if x % n == 0]


def largest_divisor(x: int, most: int) -> int:
  """The largest divisor of x that is at most `most`; 1 if `most` is less."""
  return max([n for n in divisors(x) if n <= most], default=1)


def in_32_bits[**A, R](function: Callable[A, R]) -> Callable[A, R]:
  """Makes a function trace as it does without jax_enable_x64.

  With jax_enable_x64, a Python integer, `jnp.arange` and a sum of int32 have 64
  bits, and so would the plans, and the indices and loops inside kernels: slower
  at best, and not lowered at worst. Every public function of a kernel file is
  wrapped, and so is every backward rule, since JAX traces it later.
  """

  @functools.wraps(function)
  def run(*args: A.args, **kwargs: A.kwargs) -> R:
    with jax.enable_x64(False):
      return function(*args, **kwargs)

  return run


def bit_not(x: Any) -> Any:
  """~x of int32 in a kernel, in 32 bits also if it is lowered in 64-bit JAX."""
  return jnp.bitwise_xor(x, jnp.int32(-1))


class SortKey(NamedTuple):
  """An integer that sorts by one number, `high`, and then by another, `low`.

  Bits: `low` in the lowest `low_bits`, `high` above them.
  """

  low_bits: int

  def pack(self, high: Any, low: Any) -> Any:
    return (high << self.low_bits) | low

  def least(self, high: Any) -> Any:
    """The key of `high` with a low number of 0."""
    return high << self.low_bits

  def high(self, key: Any) -> Any:
    return key >> self.low_bits

  def low(self, key: Any) -> Any:
    return key & ((1 << self.low_bits) - 1)


# Up to so many comparisons, one launch that compares all with all takes less
# time than the launches that fewer operations would be spread over.
ALL_WITH_ALL = 1 << 24
MAX_SLOTS_COMPARED = 1024  # flags of a row, in `places_of`


def counts_up_to(values: Int[Array, "n"], size: int) -> Int[Array, "size"]:
  """How many of the values are at most i, for i = 0 .. size - 1.

  Values are not negative; those of `size` or more count nowhere. For ascending
  values it is `searchsorted(values, arange(size), side="right")`, whose search
  of some 15 steps takes longer to compile than all else in a plan.
  """
  if values.size * size <= ALL_WITH_ALL:
    index = jnp.arange(size, dtype=values.dtype)[:, None]
    return jnp.sum(values[None] <= index, axis=1, dtype=jnp.int32)
  marks = jnp.zeros((size,), jnp.int32).at[values].add(1, mode="drop")
  return jnp.cumsum(marks, dtype=jnp.int32)


def sums_up_to(values: Int[Array, "*A n"]) -> Int[Array, "*A n"]:
  """The cumulative sum along the last axis, in one launch if it is short."""
  n = values.shape[-1]
  if values.size * n > ALL_WITH_ALL:
    return jnp.cumsum(values, axis=-1, dtype=jnp.int32)
  index = jnp.arange(n)
  before = index[None] <= index[:, None]
  before = lined_up(before, values.ndim + 1)
  so_far = jnp.where(before, values[..., None, :], 0)
  return jnp.sum(so_far, axis=-1, dtype=jnp.int32)


def counts_below(
  values: UInt32[Array, "n"], bounds: UInt32[Array, "m"]
) -> Int[Array, "m"]:
  """How many of the ascending values are below each of the bounds.

  It is `searchsorted(values, bounds)`, of which XLA makes a launch for every
  four steps. This takes two: one finds the row of about sqrt(n) values in which
  the answer lies, and one counts in it.
  """
  n = values.size
  width = 1 << -(-n.bit_length() // 2)
  if bounds.size * width > ALL_WITH_ALL:
    found = jnp.searchsorted(values, bounds, method="scan_unrolled")
    return found.astype(jnp.int32)
  last = jnp.uint32(0xFFFFFFFF)  # below no bound
  rows = jnp.pad(values, (0, -n % width), constant_values=last)
  rows = rows.reshape(-1, width)
  bounds = bounds[:, None]
  row = jnp.sum(rows[None, :, 0] < bounds, axis=1, dtype=jnp.int32) - 1
  row = jnp.maximum(row, 0)
  inside = jnp.sum(rows[row] < bounds, axis=1, dtype=jnp.int32)
  return row * width + inside


def lined_up(x: Array, ndim: int) -> Array:
  """x with leading axes of one, as `jax_numpy_rank_promotion` wants."""
  return lax.expand_dims(x, range(ndim - x.ndim))


WORD = 32  # flags in an int32


def bit_mask(flags: Bool[Array, "*A n"]) -> Int[Array, "*A"]:
  """Up to 32 flags as bits of an int32, the first one lowest."""
  shifts = lined_up(jnp.arange(flags.shape[-1], dtype=jnp.int32), flags.ndim)
  return jnp.sum(flags.astype(jnp.int32) << shifts, axis=-1, dtype=jnp.int32)


def bit_words(flags: Bool[Array, "*A n"]) -> Int[Array, "*A words"]:
  """Any number of flags as bits of int32 words, 32 in each."""
  pad = ((0, 0),) * (flags.ndim - 1) + ((0, -flags.shape[-1] % WORD),)
  return bit_mask(jnp.pad(flags, pad).reshape(*flags.shape[:-1], -1, WORD))


def block_bits(
  blocks: Int[Array, "*A"], num_blocks: int
) -> Int[Array, "*A words"]:
  """One block as a bit of int32 words, 32 blocks in each; -1 is no block."""
  first = WORD * jnp.arange(-(-num_blocks // WORD), dtype=jnp.int32)
  # XLA keeps what depends on block and word inside one launch. It would write
  # what depends on the block alone, its word and its bit, to memory.
  bit = blocks[..., None] - lined_up(first, blocks.ndim + 1)
  inside = (bit >= 0) & (bit < WORD)
  return jnp.where(inside, jnp.int32(1) << (bit & (WORD - 1)), 0)


def choice_bits(
  choices: Int[Array, "*A P"], num_blocks: int
) -> Int[Array, "*A words"]:
  """The blocks of each query as bits of int32 words; -1 is no block."""
  *shape, top_k = choices.shape
  bits = jnp.zeros((*shape, -(-num_blocks // WORD)), jnp.int32)
  for p in range(top_k):  # few: XLA takes longer for a reduction
    bits |= block_bits(choices[..., p], num_blocks)
  return bits


def query_bits(
  choices: Int[Array, "*A queries words"], num_blocks: int
) -> Int[Array, "*A N"]:
  """Which queries chose each block, as bits of an int32.

  Args:
    choices: `choice_bits` of up to 32 queries.
    num_blocks: N.
  """
  *shape, queries, words = choices.shape
  place = lined_up(jnp.arange(WORD, dtype=jnp.int32), len(shape) + 2)
  bits = jnp.zeros((*shape, words, WORD), jnp.int32)
  for query in range(queries):
    bits |= (choices[..., query, :, None] >> place & 1) << query
  return bits.reshape(*shape, -1)[..., :num_blocks]


def first_of_packs(bits: Int[Array, "*A"], pack: int) -> Int[Array, "*A"]:
  """Of query bits: the bit of the first query of each pack that has any bit."""
  any_of_pack = bits
  for shift in range(1, pack):
    any_of_pack |= lax.shift_right_logical(bits, jnp.int32(shift))
  first = jnp.uint32(sum(1 << i for i in range(0, WORD, pack)))
  return any_of_pack & first.astype(jnp.int32)


def counts_before(flags: Bool[Array, "*A n"]) -> Int[Array, "*A n"]:
  """How many flags are set before each place."""
  n = flags.shape[-1]
  words = bit_words(flags)
  counts = lax.population_count(words)
  begins = sums_up_to(counts) - counts
  place = jnp.arange(n, dtype=jnp.int32)
  before = lined_up((jnp.int32(1) << (place & (WORD - 1))) - 1, flags.ndim)
  words, begins = (
    jnp.repeat(x, WORD, axis=-1)[..., :n] for x in (words, begins)
  )
  return begins + lax.population_count(words & before)


def places_of(flags: Bool[Array, "*A n"], most: int) -> Int[Array, "*A most"]:
  """Where the first `most` set flags are, ascending; then n.

  That is a sort of the places, but short rows need no sort: the flags are bits
  of words, and the i-th place is found as the word that holds the i-th set bit,
  by comparing i with all words, and then, by halving, as the bit of the word.
  """
  n = flags.shape[-1]
  if n > MAX_SLOTS_COMPARED:
    places = lined_up(jnp.arange(n, dtype=jnp.int32), flags.ndim)
    places = jnp.where(flags, places, n)
    places = lax.sort(places, is_stable=False)[..., :most]
    behind = ((0, 0),) * (flags.ndim - 1) + ((0, max(most - n, 0)),)
    return jnp.pad(places, behind, constant_values=n)
  words = bit_words(flags).astype(jnp.uint32)  # shifted right without the sign
  ends = sums_up_to(lax.population_count(words).astype(jnp.int32))
  i = lined_up(jnp.arange(most, dtype=jnp.int32), words.ndim)
  which = jnp.sum(ends[..., None, :] <= i[..., None], axis=-1, dtype=jnp.int32)

  def of_word(x):
    return jnp.take_along_axis(x, which, axis=-1, mode="fill", fill_value=0)

  word = of_word(words)
  rest = i - (of_word(ends) - lax.population_count(word).astype(jnp.int32))
  place = which * WORD
  for half in (16, 8, 4, 2, 1):
    low = word & jnp.uint32((1 << half) - 1)
    count = lax.population_count(low).astype(jnp.int32)
    behind = rest >= count
    rest = jnp.where(behind, rest - count, rest)
    word = jnp.where(behind, word >> jnp.uint32(half), word)
    place = jnp.where(behind, place + half, place)
  return jnp.where(which < words.shape[-1], place, n)


def starts_run(key: Array) -> Array:
  """Whether key, at least 0, differs from the one before on the last axis."""
  ahead = ((0, 0),) * (key.ndim - 1) + ((1, 0),)
  return jnp.pad(key[..., :-1], ahead, constant_values=-1) != key


def or_of_rest_of_run(
  bits: Array, key: Array, longest: int, *, backwards: bool = False
) -> Array:
  """The bitwise or of `bits` from each place to the end of its run.

  A run is a stretch of equal keys along the last axis.

  Args:
    bits: int32.
    key: ascending, at least -1.
    longest: upper bound on the length of a run.
    backwards: from each place to the start of its run instead.
  """

  def shifted(x, by, fill):
    pad = ((0, 0),) * (x.ndim - 1) + ((by, 0) if backwards else (0, by),)
    x = jnp.pad(x, pad, constant_values=fill)
    return x[..., :-by] if backwards else x[..., by:]

  reach = 1  # `bits` holds the or of so many entries
  while reach < longest:
    same = shifted(key, reach, -2) == key
    bits |= jnp.where(same, shifted(bits, reach, 0), 0)
    reach *= 2
  return bits


def padded_heads(group_size: int) -> int:
  """Heads that a group of `group_size` heads takes in a kernel.

  A query's heads are copied as whole tiles of 8 rows, and a whole number of
  queries fills the 64 rows of an MMA tile.
  """
  return 8 if group_size <= 8 else 16


@dataclasses.dataclass(frozen=True)
class Packing:
  """How the heads of a group and neighbouring queries fill MMA rows.

  A *pack* is what one TMA copy moves: 8 or 16 rows. With 8 or more heads a
  group it is one query. With fewer it is several neighbouring queries, so that
  rows are not wasted on padding: 4 heads make packs of 2 queries, 2 heads packs
  of 4. A pack's rows are query * heads + head.

  Attributes:
    group_size: G.
  """

  group_size: int

  @property
  def heads(self) -> int:
    """Heads of a group after padding."""
    return next(n for n in (2, 4, 8, 16) if n >= self.group_size)

  @property
  def queries(self) -> int:
    """Queries of a pack."""
    return max(8 // self.heads, 1)

  @property
  def rows(self) -> int:
    """MMA rows of a pack."""
    return self.heads * self.queries

  def pack(self, x: Array, num_kv_heads: int, fill: float = 0) -> Array:
    """[B,T,H,...] as [B,U,K*rows,...], padded with `fill`."""
    b, t, _, *rest = x.shape
    x = x.reshape(b, t, num_kv_heads, self.group_size, *rest)
    u = -(-t // self.queries)
    pad = [(0, 0)] * x.ndim
    pad[1] = (0, u * self.queries - t)
    pad[3] = (0, self.heads - self.group_size)
    if any(sum(p) for p in pad):
      x = jnp.pad(x, pad, constant_values=fill)
    shape = (b, u, self.queries, num_kv_heads, self.heads, *rest)
    x = x.reshape(shape).swapaxes(2, 3)
    return x.reshape(b, u, num_kv_heads * self.rows, *rest)


def padded_head_dim(dim: int) -> int:
  """The size of `HEAD_DIMS` in which D or I is computed."""
  return min(n for n in HEAD_DIMS if n >= dim)


def pad_head_dim(x: Array) -> Array:
  """Pads the last axis (D or I) with zeros to a size of `HEAD_DIMS`.

  Zeros add nothing to a score. What they become in outputs and gradients is cut
  off by the caller, or by the gradient of this function.
  """
  dim = x.shape[-1]
  size = padded_head_dim(dim)
  if size == dim:
    return x
  return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, size - dim),))


def check_supported(
  *,
  dtype: Any,
  block_size: int | None = None,
  top_k: int = 0,
  kv_len: int = 0,
  num_blocks: int = 0,
  head_dim: int | None = None,
  index_dim: int | None = None,
  group_size: int | None = None,
  num_choices: int = 0,
  scale: float = 1.0,
) -> None:
  """Raises NotImplementedError for a legal call that no kernel here takes.

  A kernel passes only the arguments that matter to it.

  Args:
    dtype: of the floating-point operands.
    block_size: tokens of a block.
    top_k: P.
    kv_len: S.
    num_blocks: N of packed rows; 0 for plain rows.
    head_dim: D.
    index_dim: I.
    group_size: G.
    num_choices: B x K x T x P.
    scale: of the main scores.
  """

  def check(name: str, value: Any, supported: tuple) -> None:
    if value is not None and value not in supported:
      wanted = ", ".join(map(str, supported))
      raise NotImplementedError(
        f"mosaic_gpu supports {name} in ({wanted}), got {value}"
      )

  check("dtype", jnp.dtype(dtype).name, DTYPES)
  for name, dim, most in (
    ("head_dim", head_dim, MAX_HEAD_DIM),
    ("index_dim", index_dim, MAX_INDEX_DIM),
  ):
    if dim is not None and (dim % 8 or not 0 < dim <= most):
      raise NotImplementedError(
        f"mosaic_gpu supports {name} of multiples of 8 up to {most}, got {dim}"
      )
  check("block_size", block_size, BLOCK_SIZES)
  if group_size is not None and group_size > MAX_GROUP_SIZE:
    raise NotImplementedError(
      "mosaic_gpu supports group_size (num_heads / num_kv_heads) up to"
      f" {MAX_GROUP_SIZE}, got {group_size}"
    )
  if top_k > MAX_TOP_K:
    raise NotImplementedError(
      f"mosaic_gpu supports top_k up to {MAX_TOP_K}, got {top_k}"
    )
  if num_blocks > MAX_BLOCKS:
    raise NotImplementedError(
      f"mosaic_gpu supports up to {MAX_BLOCKS} blocks of keys, got {num_blocks}"
      f" of packed rows: ceil(S / block_size) + max_segments, with kv_len"
      f" {kv_len} in blocks of {block_size}"
    )
  if block_size and -(-kv_len // block_size) > MAX_BLOCKS:
    raise NotImplementedError(
      f"mosaic_gpu supports up to {MAX_BLOCKS} blocks of keys, got kv_len"
      f" {kv_len} in blocks of {block_size}"
    )
  if num_choices > MAX_CHOICES:
    raise NotImplementedError(
      f"mosaic_gpu supports up to {MAX_CHOICES} choices (batch x KV heads x"
      f" queries x top_k), got {num_choices}"
    )
  if scale <= 0:
    raise NotImplementedError(f"mosaic_gpu supports scale > 0, got {scale}")


def check_dense_supported(head_dim: int) -> None:
  """Raises NotImplementedError beyond the limits of dense kernels alone.

  These are the warm-up's attention and KL over all tokens.

  Args:
    head_dim: D.
  """
  if head_dim > MAX_DENSE_HEAD_DIM:
    raise NotImplementedError(
      f"mosaic_gpu supports head_dim up to {MAX_DENSE_HEAD_DIM} in the warm-up"
      " phase and in dense attention, whose tiles of more dims do not fit"
      f" shared memory, got {head_dim}"
    )


def check_decode_supported(
  *,
  tokens: int,
  num_kv_heads: int,
  cache_rows: int,
  index_dim: int,
  top_k: int,
  fp8: bool = False,
) -> None:
  """Raises NotImplementedError beyond the limits of decoding alone.

  Args:
    tokens: T.
    num_kv_heads: K.
    cache_rows: B x C x K.
    index_dim: I.
    top_k: P.
    fp8: whether index keys have one byte.
  """
  rows = tokens * num_kv_heads
  if top_k > LONG_LIST and rows > MAX_DECODE_ROWS // 2:
    raise NotImplementedError(
      f"mosaic_gpu decode_attention supports top_k above {LONG_LIST} for up to"
      f" {MAX_DECODE_ROWS // 2} query tokens x KV heads, because a thread's"
      f" registers hold one list of {MAX_TOP_K} blocks, got top_k {top_k} and"
      f" {rows}"
    )
  if fp8 and index_dim % 16:
    raise NotImplementedError(
      "mosaic_gpu decode_attention supports index_dim of multiples of 16 with"
      " float8_e4m3fn index keys, because TMA reads rows of a multiple of 16"
      f" bytes, got {index_dim}"
    )
  for name, value, most in (
    ("query tokens", tokens, MAX_DECODE_TOKENS),
    ("query tokens x KV heads", rows, MAX_DECODE_ROWS),
    ("batch x capacity x KV heads", cache_rows, MAX_TMA_ROWS - 1),
  ):
    if value > most:
      raise NotImplementedError(
        f"mosaic_gpu decode_attention supports {name} up to {most}, got {value}"
      )


def current_device() -> Any:
  """The device that a call made here runs on.

  One of the mesh in context (`jax.set_mesh`, `jax.shard_map`), else the default
  device. A mesh of devices that are not attached gives its
  `jax.sharding.AbstractDevice`.
  """
  wanted = jax.sharding.get_abstract_mesh().abstract_device
  if wanted is not None:
    with contextlib.suppress(RuntimeError):  # no such backend
      for device in jax.devices(wanted.platform):
        if device.device_kind == wanted.device_kind:
          return device
    return wanted
  default = jax.config.jax_default_device
  if default is None or isinstance(default, str):
    return jax.local_devices(backend=default)[0]
  return default


def num_sms() -> int:
  """Number of SMs of the current device; of an H100 if it is not a GPU."""
  return getattr(current_device(), "core_count", None) or NUM_SMS


def require_hopper() -> None:
  """Raises NotImplementedError unless the current device is a Hopper GPU.

  Of GPUs that are not attached, for which `jax.experimental.topologies`
  compiles programs, JAX tells the name alone.
  """
  device = current_device()
  capability = getattr(device, "compute_capability", None)
  if isinstance(device, jax.sharding.AbstractDevice) and re.search(
    r"\bG?H(100|200|800|20)\b", device.device_kind
  ):
    capability = "9.0"
  if device.platform != "gpu" or capability != "9.0":
    where = f"the platform {device.platform!r}"
    if device.platform == "gpu":
      where = f"{device.device_kind} (compute capability {capability})"
    raise NotImplementedError(
      "mosaic_gpu supports Hopper GPUs (compute capability 9.0), and calls here"
      f" run on {where}"
    )


# SMEM layout of a 16-bit wgmma operand: 64 columns are one 128-byte swizzle.
OPERAND = (
  plgpu.TilingTransform((8, 64)),  # pyright: ignore[reportAbstractUsage]
  plgpu.SwizzleTransform(128),  # pyright: ignore[reportAbstractUsage]
)


def gathered_operand(
  sizes: tuple[int, ...], dtype: Any, rows: int, interpret: bool
) -> Any:
  """SMEM of `OPERAND`, for `scratch`, into which `copy_rows` copies.

  Args:
    sizes: operands, rows and columns of each.
    dtype: of the entries.
    rows: of one copy: 2, 4 or a multiple of 8.
    interpret: run on the CPU, where every buffer has the shape of its array.
  """
  whole = plgpu.SMEM(sizes, dtype, transforms=OPERAND)
  if rows % 8 == 0 or interpret:
    return whole
  count, all_rows, columns = sizes
  # The same bytes as tiles, whose rows can be sliced. Pallas warns of reading
  # through one member what another one has written, because members may be
  # padded; but these both start where the union does.
  tiles = plgpu.SMEM(
    (count, all_rows // 8, columns // 64, 8, 64), dtype, transforms=OPERAND[1:]
  )
  return plgpu.RefUnion(whole, tiles)


def operand_of_rows(
  count: int, dtype: Any, interpret: bool, *, rows: int = 64, columns: int = 64
) -> Any:
  """SMEM of wgmma operands, for `scratch`, whose rows can be copied one by one.

  The columns of an operand are one swizzle tile: tiles of 8 rows follow one
  another, and any number of rows from any row on are one TMA copy (see
  `copy_rows` on how they are swizzled). Such a copy may reach beyond the last
  column in memory too, where it reads zeros.

  Args:
    count: operands.
    dtype: of the entries.
    interpret: run on the CPU.
    rows: of an operand.
    columns: of an operand: 128 bytes, or 64.
  """
  transforms = (
    plgpu.TilingTransform((8, columns)),  # pyright: ignore
    plgpu.SwizzleTransform(columns * jnp.dtype(dtype).itemsize),  # pyright: ignore
  )
  shape = (count, rows, columns)
  whole = plgpu.SMEM(shape, dtype, transforms=transforms)
  if interpret:
    return whole
  return plgpu.RefUnion(
    whole, plgpu.SMEM(shape, dtype, transforms=transforms[1:])
  )


def whole_and_tiles(smem: Any) -> tuple[Any, Any]:
  """In a kernel: operands of such a union, and the SMEM to copy to."""
  # A union of two is a row of bytes.
  return tuple(smem) if smem.ndim == 1 else (smem, smem)


def copies_of_rows(rows: int, columns: int) -> int:
  """How many TMA copies `copy_rows` starts, each of which arrives."""
  return columns // 64 if rows % 8 else 1


def copy_rows(src: Any, dst: Any, slot: Any, first: Any, ready: Any) -> None:
  """Copies a few rows from GMEM into one of the operands of a buffer in SMEM.

  A copy moves whole tiles of 8 rows x 64 columns. If there are fewer rows, each
  64 columns take a copy of their own, whose rows lie side by side in a tile.
  They are swizzled as in a copy of the whole tile, because TMA swizzles by the
  address in SMEM (CUDA Programming Guide, swizzle pattern pointer offset).

  Args:
    src: the rows.
    dst: the SMEM to copy to, of `gathered_operand` for so many rows.
    slot: the operand.
    first: its row that the first one goes to, a multiple of their number.
    ready: barrier at which the copies arrive, `copies_of_rows` of them.
  """
  rows, columns = src.shape
  if rows % 8 == 0:
    plgpu.copy_gmem_to_smem(src, dst.at[slot, pl.ds(first, rows)], ready)
    return
  for i in range(columns // 64):
    part = pl.ds(i * 64, 64)
    if dst.ndim == 3:  # interpreted
      at = dst.at[slot, pl.ds(first, rows), part]
    else:
      at = dst.at[slot, first >> 3, i, pl.ds(first & 7, rows)]
    plgpu.copy_gmem_to_smem(src.at[:, part], at, ready)


def span(start: Any, size: int) -> Any:
  """A slice that starts at a multiple of its size, which TMA has to be told."""
  return pl.ds(pl.multiple_of(start, size), size)


def store(ref: Any, value: jax.Array) -> None:
  """ref[...] = value for a few values in any register layout."""
  # From jax 0.12 on, a plain store must fill whole sectors of 32 bytes.
  any_store = getattr(plgpu, "store", None)
  if any_store is None:
    ref[...] = value
  else:
    any_store(ref, value, optimized=False)


def zero_non_finite(x: Array) -> tuple[Array, Array]:
  """Zeroes what is not finite and says which vectors held such an entry.

  Returns:
    x with zeros, and bool of x's shape without its last axis.
  """
  finite = jnp.isfinite(x)
  return jnp.where(finite, x, 0), ~jnp.all(finite, axis=-1)


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=("ready", "free"),
  meta_fields=("buffers",),
)
@dataclasses.dataclass(frozen=True)
class Ring:
  """The barriers of a ring of buffers in SMEM, which are filled in turn.

  Step i of the producer fills slot i % stages, and step i of the consumers
  reads it. Step i + stages may fill it again when all consumers have released
  it. Both sides count the steps themselves, and on all of their loops together:

    producer                            consumer
      slot = ring.wait_free(step)         slot = ring.slot(step)
      copy(..., ring.ready_at(slot))      ring.wait_ready(slot)
                                          ...
                                          ring.release(slot)

  A ring of one stage is a buffer that is filled again and again.

  Consumers that take turns, each waiting for its own steps alone, must meet the
  same barriers in every round: a barrier tells two states apart, so whoever
  waits for it may miss none. Then the number of slots is a multiple of the
  consumers'. If SMEM holds fewer buffers, slot i is buffer i % buffers, and
  step i fills it when step i - buffers has been released.

  In the `scratch` of `launch` it holds two `plgpu.Barrier`, see `ring`; in the
  kernel body, what they have become.

  Attributes:
    ready: one barrier a stage, at which copies (or producers) arrive.
    free: one barrier a stage, at which consumers arrive.
    buffers: if there are fewer than stages; 0 if not.
  """

  ready: Any
  free: Any
  buffers: int = 0

  @property
  def stages(self) -> int:
    return self.free.shape[0]

  def _at(self, barriers: Any, slot: Any) -> Any:
    return barriers if self.stages == 1 else barriers.at[slot]

  def slot(self, step: Any) -> Any:
    """The slot that a step fills and reads."""
    return 0 if self.stages == 1 else lax.rem(step, self.stages)

  def buffer(self, slot: Any) -> Any:
    """The buffer of a slot."""
    return lax.rem(slot, self.buffers) if self.buffers else slot

  def wait_free(self, step: Any, slot: Any = None) -> Any:
    """Waits until a step may fill its slot, which is returned.

    Give `slot` if it was computed outside of a `plgpu.warp_map`.
    """
    slot = self.slot(step) if slot is None else slot

    @pl.when(step >= (self.buffers or self.stages))
    def _():
      before = self.slot(step - self.buffers) if self.buffers else slot
      self.wait_released(before)

    return slot

  def wait_released(self, slot: Any) -> None:
    """Waits for the consumers of a slot that was filled before."""
    plgpu.barrier_wait(self._at(self.free, slot))

  def ready_at(self, slot: Any) -> Any:
    """The barrier at which the copies into a slot arrive."""
    return self._at(self.ready, slot)

  def fill(self, slot: Any) -> None:
    """A producer that writes SMEM itself has filled a slot."""
    plgpu.barrier_arrive(self._at(self.ready, slot))

  def wait_ready(self, slot: Any) -> None:
    """Waits until a slot is filled."""
    plgpu.barrier_wait(self._at(self.ready, slot))

  def release(self, slot: Any) -> None:
    """A consumer has read a slot."""
    plgpu.barrier_arrive(self._at(self.free, slot))


def ring(
  stages: int = 1, *, fills: int = 1, releases: int = 1, buffers: int = 0
) -> Ring:
  """A `Ring` for the `scratch` of `launch`.

  Args:
    stages: buffers.
    fills: arrivals that make a slot ready: its copies, or its producers.
    releases: arrivals that make a slot free: its consumers.
    buffers: see `Ring`.
  """
  return Ring(
    ready=plgpu.Barrier(num_arrivals=fills, num_barriers=stages),
    free=plgpu.Barrier(num_arrivals=releases, num_barriers=stages),
    buffers=buffers,
  )


def drain_rings(steps: Any, *rings: Ring) -> None:
  """Waits until the consumers of rings have released all slots.

  Producers call this at their end, so that no arrival is left without a wait.

  Args:
    steps: how many times buffers of each ring were filled in all; for rings of
      one stage, a number that is positive if they were filled.
    *rings: with the same number of stages and of buffers.
  """
  first = rings[0]
  for i in range(first.buffers or first.stages):

    @pl.when(steps > i)
    def _(i=i):
      slot = first.slot(steps - 1 - i) if first.buffers else i
      for each in rings:
        each.wait_released(slot)


def kept_apart(x: Any) -> Any:
  """The same array, which XLA does not see as a part of another one.

  On a GPU, XLA puts a kernel into one fusion with the slice that an operand is,
  or with the update of a slice that a result goes to, as in a loop that stacks
  its results (xla_gpu_enable_dynamic_slice_fusion, on since the middle of
  2026). By its source, such a fusion does not keep that a kernel's Ref is both
  an operand and a result, so the result is memory that the kernel did not
  write: a loop that stacks results of the decoding kernel gave zeros on an
  H200 without this barrier, and the right numbers with it.
  """
  return lax.optimization_barrier(x)


def result(ref: Any) -> Any:
  """What kernels have written to a Ref, see `launch`, as an array."""
  return kept_apart(jax.freeze(ref))


def launch(
  body: Callable[..., None],
  operands: Mapping[str, Any],
  *,
  name: str,
  num_ctas: int,
  num_warpgroups: int,
  scratch: Mapping[str, Any],
  interpret: bool = False,
  auto_barriers: bool = True,
  reduction_scratch: int = 512,
) -> None:
  """Runs `body(**operand_refs, **scratch_refs)` on `num_ctas` CTAs.

  The axes are called "cta" and "wg" (warpgroup).

  Args:
    body: the kernel. Its parameters have the names of operands and scratch.
    operands: a mapping from names (`q_gmem`) to arrays and Refs
      (`jax.new_ref`). Refs are written in place, so that a kernel in a loop
      fills a part of a large output without a copy. `result` reads a Ref after
      the last kernel.
    name: of the launch, as profilers show it.
    num_ctas: CTAs of the grid.
    num_warpgroups: warpgroups of a CTA.
    scratch: a mapping from names to SMEM (`q_smem`), barriers (`x_ready`) and
      rings (`q_ring`, see `ring`), in the order of their allocation.
    interpret: run on the CPU in Pallas's GPU interpret mode.
    auto_barriers: False removes the warpgroup barriers that Pallas puts around
      every SMEM store and copy. Then the body must order what one warpgroup
      writes to and reads from SMEM, by `commit_smem` and its own barriers.
    reduction_scratch: bytes of SMEM for reductions across warps.
  """
  mesh = plgpu.Mesh(
    grid=(num_ctas,),
    grid_names=("cta",),
    num_threads=num_warpgroups,
    thread_name="wg",
  )

  def scoped(*refs):
    def run(*allocated):
      body(
        **dict(zip(operands, refs, strict=True)),
        **dict(zip(scratch, allocated, strict=True)),
      )

    # Not by keyword, because that would sort what has to be allocated.
    pl.run_scoped(run, *scratch.values(), collective_axes="wg")

  pl.kernel(
    scoped,
    out_type=(),
    mesh=mesh,
    name=name,
    interpret=plgpu.InterpretGPUParams() if interpret else False,
    compiler_params=plgpu.CompilerParams(
      approx_math=True,
      reduction_scratch_bytes=reduction_scratch,
      unsafe_no_auto_barriers=not auto_barriers,
    ),
  )(
    *(
      # The type of a Ref has that of its array.
      x if hasattr(jax.typeof(x), "inner_aval") else kept_apart(x)
      for x in operands.values()
    )
  )
