"""Calls an implementation with random inputs and compares with the reference.

  python -m benchmarks.fuzz --calls 10000 --processes 14 --out fuzz.json
  python -m benchmarks.fuzz --each-kernel --processes 7 --sanitizer

A *signature* is an operation with its sizes and dtypes, which are compiled
once; a *call* is a signature with random values, lengths, choices of blocks and
NaN, all of them drawn on the device from the seed and the call's number. A
failure is printed with the command that repeats it alone (`--only N`). Instead
of random signatures, `--each-kernel` takes a short list whose calls together
launch every kernel, at small sizes; it is for tools that slow kernels down.

Most of the time is tracing and compilation, so `--processes` (about two fewer
than there are cores) share the signatures. With `--sanitizer` each signature
has a process of its own under compute-sanitizer, and so many run at a time. A
process that dies, or that `--time-limit` ends, is reported and the others go
on. `--out` is written after every signature: a run that is stopped has said
which it had finished, what had failed until then and which processes were lost.

What must hold (docs/design.md has the contract):

* Results are the reference's in float32. The largest error is at most twice
  that of the same formula with rounded operands, plus one unit in the last
  place. The RMS error is at most 0.5 % of the truth's, or twice that of the
  formula with rounded operands: a gradient that cancels has more than 0.5 % of
  rounding error in any implementation.

  So the bound counts each rounding once. The formula rounds the operands of
  products: probabilities, ds, and g = r - p of the KL. Twice its error, because
  a kernel may round another multiple of them, as g times a query's weight,
  which falls elsewhere between two numbers. The unit is half of one for the
  result, and half of one for its parts, which kernels round before they add
  them up: dq and dindex_q of a choice have a part for each block. It is a unit
  of the largest result, of dq's largest part, or of the largest sum of
  magnitudes of dindex_q's parts. Sums in float32 need nothing of their own.
  `reference.round_to` rounds here, because XLA on a GPU leaves out a cast to
  the working dtype and back. The bound would then be the unit alone.
* Results are NaN or infinite where the truth is, and nowhere else.
* What no query sees changes no bit.
* A second run gives equal bits.
* A choice holds what is forced, and its worst block is no worse than the best
  one that it left out.

Every operation is called through `msa_jax` with `--implementation`, or, if the
signature has a config for the kernels (`Signature.pairs`, `splits`), as
`msa_jax.mosaic_gpu` calls them. With `--interpret`, the kernels run in Pallas's
GPU interpret mode on a CPU, at tiny sizes. Set NPROC=16, so that its threads
suffice, and XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type=, without which
XLA's CPU backend (jax 0.11.2) loses NaN in row maxima.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import dataclasses
import faulthandler
import functools
import json
import math
import pathlib
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import msa_jax
from benchmarks import fuzz_processes
from msa_jax import reference
from msa_jax import segments as segments_lib

# They take turns in the list of signatures.
OPS = ("attention", "kl", "select", "decode", "warmup_kl", "dense")
GROUP_SIZES = tuple(range(1, 17))
# Among every 16 head sizes D, and index head sizes I, of an operation. The
# others are different multiples of 8 up to 128, and D also WIDE_DIMS.
USUAL_DIMS = (64, 64, 80, 96, 112, 128, 128, 128)
WIDE_DIMS = (136, 200, 256)
WIDE_OPS = ("attention", "kl", "decode")
# Decoding takes P above 32 for up to 128 query tokens x KV heads; here are 64.
TOP_KS = (1, 2, 3, 4, 6, 8, 16, 16, 24, 32, 40, 64)
CHOICES = ("random", "shared", "hot", "own", "empty", "garbage")
POISONS = ("none", "none", "query", "key", "unseen")
SCALES = (0.5, 1.0, 2.0, 0.0)  # of queries; 0 makes all scores equal
MAX_SPANS = 16  # of a packed row
MARGINS = {"exact": 2.0**-18, "fast": 2.0**-9}
highest = functools.partial(jnp.einsum, precision="highest")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Signature:
  """An operation with all that is compiled into it.

  Attributes:
    with_dlse: whether the loss uses attention's lse too; the backward pass of
      one that does not is another program.
    packed: whether rows hold "documents" or "trees"; "" for plain rows.
    weighted: whether the KL's query_mask is weights of the queries.
    pairs: which choices are (pack, block) pairs in the forward pass of sparse
      attention. "": as for users, whose config is `heuristic_config`, which
      has none in calls of few blocks. "counted": where they cost less, in any
      call. "all": all that may be.
    devices: devices over which the cache of decoding is split. One device
      computes their parts one after another, as entries of a mapped axis.
    splits: CTAs that share a query's blocks in decoding, `decode.Config`; 0
      leaves it to the kernels.
  """

  op: str
  batch: int
  q_len: int
  kv_len: int
  num_kv_heads: int
  group_size: int
  head_dim: int
  index_dim: int
  block_size: int
  top_k: int
  num_local_blocks: int
  dtype: str
  precision: str = "exact"
  with_dlse: bool = False
  packed: str = ""
  weighted: bool = False
  pairs: str = ""
  devices: int = 1
  splits: int = 0

  @property
  def num_heads(self) -> int:
    return self.group_size * self.num_kv_heads

  @property
  def num_blocks(self) -> int:
    spans = MAX_SPANS if self.packed else 0
    return -(-self.kv_len // self.block_size) + spans

  @property
  def scale(self) -> float:
    return self.head_dim**-0.5


def signatures(seed: int, count: int, tiny: bool = False) -> list[Signature]:
  """Random signatures; those of one seed are the same in every run.

  The first 16 signatures of an operation have every group size, and so have the
  next 16. If they are not tiny, they also have D and I of USUAL_DIMS. So 96
  signatures have all of these for each of the six operations.
  """
  of_op = [_signatures_of(op, seed, tiny) for op in OPS]
  return [next(of_op[i % len(OPS)]) for i in range(count)]


def _signatures_of(op: str, seed: int, tiny: bool) -> Iterator[Signature]:
  """Random signatures of an operation, without an end."""
  rng = np.random.default_rng([seed, OPS.index(op)])

  def pick(*values: Any) -> Any:
    return values[int(rng.integers(len(values)))]

  def up_to(most: int, least: int = 1) -> int:
    return int(rng.integers(least, most + 1))

  def without_replacement(*values: Any) -> Iterator[Any]:
    """The values in random order, and then again in another one."""
    while True:
      yield from (values[int(i)] for i in rng.permutation(len(values)))

  def head_dims(usual: tuple[int, ...]) -> Iterator[int]:
    dims = usual if not tiny else (64,) * 8
    while True:
      others = rng.permutation(range(1, 9 if tiny else 17))
      others = 8 * others[: len(GROUP_SIZES) - len(dims)]
      yield from map(int, rng.permutation([*dims, *others]))

  def flags() -> Iterator[bool]:
    return without_replacement(True, False)

  groups, top_ks = map(lambda x: without_replacement(*x), (GROUP_SIZES, TOP_KS))
  dims = head_dims(USUAL_DIMS + (WIDE_DIMS if op in WIDE_OPS else ()))
  index_dims = head_dims(USUAL_DIMS)
  packing = without_replacement("", "", "documents", "trees")
  with_dlse, weighted, square = flags(), flags(), flags()
  pairings = without_replacement("", "", "counted", "all")
  long = without_replacement(True, True, False, False, False)
  splitting = without_replacement(1, 1, 1, 2)
  precisions = dict(
    select=without_replacement("exact", "exact", "fast", "fp8"),
    decode=without_replacement("exact", "fp8"),
  )

  for group in groups:
    kv_heads = 1 if tiny else up_to(min(max(1, 24 // group), 4))
    dim, index_dim = next(dims), next(index_dims)
    block_size = 64 if tiny else pick(64, 128)
    top_k = pick(1, 2, 3) if tiny else next(top_ks)
    precision = next(precisions[op]) if op in precisions else "exact"
    pairs = next(pairings) if op == "attention" else ""
    # Rows of many blocks, which only a choice has use for: twice as many as it
    # keeps, or more. Pairs cost less where neighbours share few of them.
    many = op not in ("warmup_kl", "dense") and (
      top_k > 24 or pairs == "counted" or next(long)
    )
    plain = op == "decode" or pairs == "counted" or (many and top_k > 24)
    packed = "" if plain else next(packing)
    kv_len = up_to(200 if tiny else 2048)
    if many and not packed:
      least = 200 if tiny else max(2049, 2 * top_k * block_size)
      kv_len = up_to(640 if tiny else 16_384, least)
    devices = next(splitting) if op == "decode" else 1
    if devices > 1 or rng.random() < 0.3:
      whole = devices * block_size
      kv_len = -(-kv_len // whole) * whole
    # The reference holds B H T N D and B H T S float32 numbers, of which the
    # first are 0.8 GB at most.
    most = 12 if tiny else min(512, (1 << 27) // (kv_len * max(dim, 128)))
    q_len = up_to(min(kv_len, most))
    if op == "warmup_kl" and not tiny and next(square):
      kv_len = q_len
    if op == "decode":
      q_len = min(q_len, up_to(4 if tiny else 16))
    if packed:
      q_len = kv_len = min(kv_len, 80 if tiny else 700)
    if op == "decode" and precision == "fp8":
      index_dim = -(-index_dim // 16) * 16  # TMA reads 16 bytes of a row
    yield Signature(
      op=op,
      batch=up_to(2 if tiny else 4),
      q_len=q_len,
      kv_len=kv_len,
      num_kv_heads=kv_heads,
      group_size=group,
      head_dim=dim,
      index_dim=index_dim,
      block_size=block_size,
      top_k=top_k,
      num_local_blocks=min(top_k, pick(1, 1, 2, 0)),
      dtype=pick("bfloat16", "bfloat16", "float16"),
      precision=precision,
      with_dlse=op in ("attention", "dense") and next(with_dlse),
      packed=packed,
      weighted="kl" in op and next(weighted),
      pairs=pairs,
      devices=devices,
    )


_SMALL = functools.partial(
  Signature, batch=1, q_len=12, kv_len=300, num_kv_heads=2, head_dim=64,
  index_dim=64, block_size=64, top_k=3, num_local_blocks=1, dtype="bfloat16",
)  # fmt: skip

_PACKED = functools.partial(_SMALL, q_len=80, kv_len=80)

# Small signatures. The first ten launch every kernel on one GPU, in three calls
# of each, since one call may choose own blocks alone and so have no pairs.
CALLS_EACH = 3
EACH_KERNEL = (
  # Pairs, in packs of 4 queries, and the tiles that merge them; tiles alone.
  _SMALL(op="attention", group_size=2, pairs="all", with_dlse=True),
  _SMALL(op="attention", group_size=3, head_dim=80, q_len=40),
  _SMALL(op="kl", group_size=5, head_dim=96, index_dim=80, weighted=True),
  _SMALL(op="select", group_size=1, precision="exact", top_k=40, kv_len=3000),
  _PACKED(op="select", group_size=1, precision="fast", packed="trees"),
  _SMALL(op="select", group_size=1, precision="fp8", index_dim=112),
  # More splits than multiprocessors, which a launch of its own merges.
  _SMALL(
    op="decode", group_size=7, head_dim=256, q_len=6, kv_len=900, top_k=12,
    splits=12,
  ),
  # Devices choose their best blocks.
  _SMALL(op="decode", group_size=16, q_len=1, kv_len=384, devices=2),
  _SMALL(op="warmup_kl", group_size=3, head_dim=128, weighted=True),
  _PACKED(op="dense", group_size=3, head_dim=96, packed="documents"),
  # The same kernels with wide heads, where each query is a pack, and in packed
  # rows.
  _SMALL(op="attention", group_size=6, head_dim=256, pairs="all", q_len=20),
  _PACKED(
    op="attention", group_size=16, head_dim=200, block_size=128,
    packed="documents",
  ),
  _PACKED(
    op="kl", group_size=12, head_dim=256, block_size=128, packed="trees",
  ),
  # Splits that wait for each other in one launch; padded heads and index heads.
  _SMALL(
    op="decode", group_size=5, precision="fp8", head_dim=80, index_dim=96,
    q_len=2,
  ),
)  # fmt: skip


class Numbers:
  """Random numbers of a key, different ones in each request.

  They are a hash of the key, the number of the request and the place in the
  array: a dozen integer operations, where `jax.random` has over a hundred,
  which XLA compiles again for everything that reads them. So a signature's
  draws compile in a fifth of the time.
  """

  def __init__(self, key: jax.Array):
    self._words = jax.random.key_data(key)
    self._requests = 0

  def bits(self, shape: tuple[int, ...]) -> jax.Array:
    self._requests += 1
    request = jnp.uint32(self._requests * 0x9E3779B9 & 0xFFFFFFFF)
    place = jnp.arange(math.prod(shape), dtype=jnp.uint32)
    mixed = _mix(place ^ self._words[0]) + self._words[1] + request
    return _mix(mixed).reshape(shape)

  def unit(self, *shape: int) -> jax.Array:
    """Numbers in (0, 1), which 1 - x has too."""
    return ((self.bits(shape) >> 9).astype(jnp.float32) + 0.5) * 2.0**-23

  def normal(self, *shape: int) -> jax.Array:
    return math.sqrt(2) * lax.erf_inv(2 * self.unit(*shape) - 1)

  def integer(self, low: int, high: int, shape: tuple = ()) -> jax.Array:
    """Numbers from low to high - 1."""
    rest = self.bits(shape) % jnp.uint32(high - low)
    return low + rest.astype(jnp.int32)


def _mix(x: jax.Array) -> jax.Array:
  """A bijection of 32-bit words whose bits all depend on each other.

  The constants are those of Wellons's "lowbias32".
  """
  x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
  x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
  return x ^ (x >> 16)


def draw_segments(s: Signature, numbers: Numbers) -> dict[str, jax.Array]:
  """The spans of packed rows; nothing for plain rows.

  Half of a row's spans end about a whole number of blocks after a cut, and one
  in five is padding. In trees, each span is at most one level below the one
  before it, which makes any forest in depth-first order.
  """
  if not s.packed:
    return {}
  b, n, cuts = s.batch, s.kv_len, (MAX_SPANS - 2) // 2
  integer = numbers.integer
  cut = integer(0, n, (b, cuts))
  size = s.block_size * integer(0, 4, (b, cuts)) + integer(-1, 2, (b, cuts))
  slot = jnp.arange(n)
  starts = jnp.any(jnp.concatenate([cut, cut + size], 1)[..., None] == slot, 1)
  run = jnp.cumsum(starts, axis=1)  # 0 to MAX_SPANS - 2
  padding = integer(0, 5, (b, MAX_SPANS)) == 0
  real = ~jnp.take_along_axis(padding, run, axis=1)
  segments = segments_lib.document_segments(
    jnp.where(real, run + 1, 0).astype(jnp.int32), MAX_SPANS
  )
  until = segments.visible_until
  if s.packed == "trees":
    steps = integer(-2, 2, (b, MAX_SPANS))
    depths = [jnp.zeros((b,), jnp.int32)]
    for i in range(1, MAX_SPANS):
      depths.append(jnp.maximum(depths[-1] + steps[:, i], 0))
    depth = jnp.take_along_axis(
      jnp.stack(depths, axis=1), jnp.maximum(segments.span, 0), axis=1
    )
    # A span is seen until the next one that is not below it.
    opens = real & jnp.diff(segments.span, axis=1, prepend=-1).astype(bool)
    ends = opens[:, None] & (depth[:, None] <= depth[..., None])
    ends &= slot > slot[:, None]
    until = jnp.min(jnp.where(ends, slot, n), axis=-1)
    until = jnp.where(real, until, 0)
  return dict(span=segments.span, until=until.astype(jnp.int32))


def segments_of(s: Signature, x: dict) -> msa_jax.Segments | None:
  if not s.packed:
    return None
  return msa_jax.Segments(
    x["span"],
    x["until"],
    jnp.zeros_like(x["span"]),  # rotary positions, which no operation reads
    max_segments=MAX_SPANS,
  )


def layout_of(s: Signature, x: dict) -> segments_lib.BlockLayout | None:
  segments = segments_of(s, x)
  if segments is None:
    return None
  return segments_lib.block_layout(segments, s.block_size)


# ---- Inputs ----


def draw(s: Signature, key: jax.Array) -> dict[str, jax.Array]:
  """All operands of a call, and what was drawn for it."""
  numbers = Numbers(key)
  normal, integer = numbers.normal, numbers.integer
  b, t, n = s.batch, s.q_len, s.kv_len
  choice, poison = integer(0, len(CHOICES)), integer(0, len(POISONS))
  factor = jnp.asarray(SCALES)[integer(0, len(SCALES))]
  index_factor = jnp.asarray(SCALES)[integer(0, len(SCALES))]
  kv = (b, n, s.num_kv_heads, s.head_dim)
  x = dict(
    q=factor * normal(b, t, s.num_heads, s.head_dim),
    k=normal(*kv),
    v=normal(*kv),
    index_q=index_factor * normal(b, t, s.num_kv_heads, s.index_dim),
    index_k=normal(b, n, s.index_dim),
    dout=normal(b, t, s.num_heads, s.head_dim),
  )
  x = {name: value.astype(s.dtype) for name, value in x.items()}
  # Half of the rows are full; the others end anywhere.
  lengths = jnp.where(integer(0, 2, (b,)) == 0, n, integer(0, n + 1, (b,)))
  spans = draw_segments(s, numbers)
  layout = layout_of(s, spans)
  if layout is not None:
    lengths = jnp.full((b,), n)
  positions = reference.query_positions(t, n, b, lengths, layout)
  blocks = _choices(s, choice, positions, layout, numbers)
  mask = (integer(0, 5, (b, t)) > 0) | (integer(0, 2) == 0)
  if layout is not None:
    mask &= layout.own_block >= 0
  if s.op in ("attention", "kl"):
    visible = reference.chosen_tokens(
      blocks, positions, n, s.block_size, layout
    )
  else:
    visible = reference.visible_tokens(positions, n, layout)
  shape = (b, s.num_kv_heads, t, n)
  visible = jnp.broadcast_to(visible, shape)
  if s.op in ("kl", "warmup_kl"):
    visible &= mask[:, None, :, None]
  seen = visible.any(2)  # [B, K, S]
  unseen = jnp.moveaxis(~seen, 1, 2)[..., None]
  none_sees = ~seen.any(1)[..., None]

  kind = _kind(poison)
  one_b, one_t, one_s = integer(0, b), integer(0, t), integer(0, n)
  bad = jnp.asarray(jnp.nan, s.dtype)
  at_query = (
    (jnp.arange(b)[:, None] == one_b) & (jnp.arange(t) == one_t)
  )[..., None, None]  # fmt: skip
  at_key = (
    (jnp.arange(b)[:, None] == one_b) & (jnp.arange(n) == one_s)
  )[..., None, None]  # fmt: skip
  first_q = jnp.arange(s.head_dim) == 0
  first_i = jnp.arange(s.index_dim) == 0
  head = (jnp.arange(s.num_heads) == 0)[:, None]
  group = (jnp.arange(s.num_kv_heads) == 0)[:, None]
  query, key_, hidden = (kind == i for i in (1, 2, 3))
  # No gradient is asked of a call whose visible operands hold NaN.
  x["q"] = jnp.where(query & at_query & head & first_q, bad, x["q"])
  x["index_q"] = jnp.where(
    query & at_query & group & first_i, bad, x["index_q"]
  )
  x["v"] = jnp.where(key_ & at_key & group & first_q, bad, x["v"])
  x["index_k"] = jnp.where(key_ & at_key[..., 0] & first_i, bad, x["index_k"])
  clean = dict(x)
  for name, where in (("k", unseen), ("v", unseen), ("index_k", none_sees)):
    x[name] = jnp.where(hidden & where, bad, x[name])
    clean[name] = jnp.where(hidden & where, 0, clean[name])
  x = {name: value.astype(s.dtype) for name, value in x.items()}
  if s.weighted:
    mask = jnp.where(mask, _weights(s, numbers), 0.0)
  extra = dict(blocks=blocks, lengths=lengths, mask=mask) | spans
  if s.with_dlse:
    # The cotangent of a query's lse that sees nothing is dropped.
    sees = jnp.repeat(visible.any(-1), s.group_size, axis=1)
    dlse = normal(b, s.num_heads, t)
    extra["dlse"] = jnp.where(sees, dlse, jnp.nan)
  if s.op == "decode" and s.precision == "fp8":
    # A key that holds NaN has no scale: it is one of zeros.
    finite = jnp.nan_to_num(x["index_k"].astype(jnp.float32))
    codes, scales = reference.fp8_codes(finite)
    extra["index_k_scale"] = jnp.where(
      hidden & none_sees[..., 0], jnp.nan, scales
    )
    x["index_k"] = codes
    clean["index_k"] = codes
  return (
    x
    | extra
    | {f"clean_{name}": clean[name] for name in ("k", "v", "index_k")}
    | dict(visible=visible, kind=kind, choice=choice, factor=factor)
  )


def _weights(s: Signature, numbers: Numbers) -> jax.Array:
  """Weights of the queries: small counts, or of several orders of magnitude,
  times a factor of all, which makes no difference."""
  shape = (s.batch, s.q_len)
  counts = numbers.integer(1, 9, shape).astype(jnp.float32)
  spread = jnp.exp(2 * numbers.normal(*shape))
  weights = jnp.where(numbers.integer(0, 2) == 0, counts, spread)
  return weights * jnp.exp(40 * numbers.unit() - 20)


def _kind(poison: jax.Array) -> jax.Array:
  """0: none, 1: in a query, 2: in a key or value, 3: where nobody sees it."""
  kinds = [("none", "query", "key", "unseen").index(name) for name in POISONS]
  return jnp.asarray(kinds)[poison]


def _choices(
  s: Signature, choice: jax.Array, positions: jax.Array,
  layout: segments_lib.BlockLayout | None, numbers: Numbers,
) -> jax.Array:  # fmt: skip
  """Block ids: ascending, then -1."""
  b, t, n, p = s.batch, s.q_len, s.num_blocks, s.top_k
  visible, own = reference.visible_blocks(positions, n, s.block_size, 1, layout)
  scores = numbers.normal(b, s.num_kv_heads, t, n)
  alike = scores[:, :, jnp.arange(t) // 8 * 8]
  scores = jnp.where(choice == CHOICES.index("shared"), alike, scores)
  hot = (jnp.cumsum(visible, axis=-1) == 1) | own  # the first one that it sees
  scores += jnp.where((choice == CHOICES.index("hot")) & hot, 100, 0)
  scores = jnp.where((choice == CHOICES.index("own")) & ~own, -jnp.inf, scores)
  # In packed rows garbage is also a block that the query does not see.
  unseen = layout is not None and choice == CHOICES.index("garbage")
  scores = jnp.where(visible | unseen, scores, -jnp.inf)
  rows = numbers.integer(0, 3, (b, s.num_kv_heads, t, 1)) == 0
  rows &= choice == CHOICES.index("empty")
  scores = jnp.where(rows, -jnp.inf, scores)
  count = min(p, n)
  top, ids = lax.top_k(scores, count)
  ids = jnp.where(top == -jnp.inf, n, ids).astype(jnp.int32)
  ids = jnp.pad(ids, ((0, 0),) * 3 + ((0, p - count),), constant_values=n)
  ids = jnp.sort(ids, axis=-1)
  # Ids that name no block, or one beyond the query's own, contribute nothing.
  beyond = jnp.where(choice == CHOICES.index("garbage"), n + 3, -1)
  return jnp.where(ids == n, beyond, ids)


# ---- The implementation ----


def runner(s: Signature, implementation: str, interpret: bool) -> Callable:
  """What is tested: draw's dict -> results by name."""
  # The public operations take no Config.
  configured = bool(s.pairs or s.splits)
  direct = interpret or (implementation == "mosaic_gpu" and configured)
  f = _kernels(s, interpret) if direct else _public(implementation)
  blocks = dict(block_size=s.block_size)

  def keys_of(x):
    """Options that say which keys exist."""
    if not s.packed:
      return dict(kv_lengths=x["lengths"])
    if direct:
      return dict(layout=layout_of(s, x))
    return dict(segments=segments_of(s, x))

  def attention(x):
    def attend(q, k, v):
      if s.op == "dense":
        return f["dense"](q, k, v, **keys_of(x))
      return f["attention"](q, k, v, x["blocks"], **blocks, **keys_of(x))

    operands, dlse = (x["q"], x["k"], x["v"]), x.get("dlse")
    if dlse is None:
      out, pull, lse = jax.vjp(attend, *operands, has_aux=True)
      dq, dk, dv = pull(x["dout"])
    else:
      (out, lse), pull = jax.vjp(attend, *operands)
      dq, dk, dv = pull((x["dout"], dlse))
    return dict(out=out, lse=lse, dq=dq, dk=dk, dv=dv)

  def kl(x):
    lse = _teacher_lse(s, x)
    ids = None if s.op == "warmup_kl" else x["blocks"]
    # As with a loss scale: gradients of a mean are below float16's range.
    factor = 1024.0 if s.dtype == "float16" else 1.0

    def loss(index_q, index_k):
      value = f["kl"](
        x["q"], x["k"], index_q, index_k, ids, **blocks, lse=lse,
        query_mask=x["mask"], **keys_of(x),
      )  # fmt: skip
      return factor * value, value

    grads, value = jax.grad(loss, (0, 1), has_aux=True)(
      x["index_q"], x["index_k"]
    )
    diq, dik = (g.astype(jnp.float32) / factor for g in grads)
    return dict(kl=value, dindex_q=diq, dindex_k=dik)

  def select(x):
    ids = f["select"](
      x["index_q"], x["index_k"], **blocks, top_k=s.top_k,
      num_local_blocks=s.num_local_blocks, score_precision=s.precision,
      **keys_of(x),
    )  # fmt: skip
    return dict(ids=ids)

  def decode(x):
    call = functools.partial(
      f["decode"], **blocks, top_k=s.top_k, kv_lengths=x["lengths"],
      num_local_blocks=s.num_local_blocks,
    )  # fmt: skip
    q, index_q = x["q"], x["index_q"]
    cache = [x["k"], x["v"], x["index_k"], x.get("index_k_scale")]
    if s.devices == 1:
      k, v, index_k, scale = cache
      out, ids = call(q, k, v, index_q, index_k, index_k_scale=scale)
      return dict(out=out, ids=ids)

    def of_device(k, v, index_k, scale):
      return call(
        q, k, v, index_q, index_k, index_k_scale=scale, axis_name="context"
      )

    cache = jax.tree.map(
      lambda x: x.reshape(s.batch, s.devices, -1, *x.shape[2:]), cache
    )
    out, ids = jax.vmap(of_device, in_axes=1, axis_name="context")(*cache)
    same = [
      jnp.array_equal(y, jnp.broadcast_to(y[:1], y.shape), equal_nan=True)
      for y in (out, ids)
    ]
    # Where devices disagree, the choice is wrong.
    return dict(out=out[0], ids=jnp.where(same[0] & same[1], ids[0], -2))

  return dict(
    attention=attention,
    dense=attention,
    kl=kl,
    warmup_kl=kl,
    select=select,
    decode=decode,
  )[s.op]


def _public(implementation: Any) -> dict[str, Callable]:
  named = dict(implementation=implementation)
  return dict(
    attention=functools.partial(
      msa_jax.sparse_attention, return_lse=True, **named
    ),
    dense=functools.partial(msa_jax.ops.dense_attention, **named),
    kl=functools.partial(msa_jax.index_kl_loss, **named),
    select=functools.partial(msa_jax.select_blocks, **named),
    decode=functools.partial(msa_jax.decode_attention, **named),
  )


def _kernels(s: Signature, interpret: bool) -> dict[str, Callable]:
  """The kernels themselves, with the configs of the signature.

  In interpret mode, these have as few CTAs as a CPU can run.
  """
  from pallas_kernels import (
    decode,
    dense_index_kl,
    index_kl,
    masked_attention,
    select_blocks,
    sparse_attention,
    sparse_attention_bwd,
    sparse_attention_fwd,
  )

  forward = {
    "": sparse_attention_fwd.heuristic_config(s.num_blocks, s.top_k),
    "counted": sparse_attention_fwd.Config(),
    "all": sparse_attention_fwd.Config(shared_cost=1e9, slack=0.0),
  }[s.pairs]
  configs: dict[str, Any] = dict(
    attention=dict(config=forward), decode=dict(config=decode.Config())
  )
  if interpret:
    small = dict(num_ctas=1, stages=2)
    configs = dict(
      attention=dict(
        config=dataclasses.replace(
          forward, num_ctas=1, pair_warpgroups=2, query_stages=2
        ),
        backward_config=sparse_attention_bwd.Config(**small),
      ),
      dense=dict(config=masked_attention.Config(num_ctas=1)),
      kl=dict(config=index_kl.Config(**small, task=64)),
      warmup_kl=dict(config=dense_index_kl.Config(**small, workspace=1)),
      select=dict(config=select_blocks.Config(warpgroup_rows=64, stages=2)),
      decode=dict(config=decode.Config(num_ctas=3, stages=2, splits=2)),
    )
  if s.splits:
    config = dataclasses.replace(configs["decode"]["config"], splits=s.splits)
    configs["decode"] = dict(config=config)

  def dense(q, k, v, *, layout=None, **options):
    until = None if layout is None else layout.visible_until
    return masked_attention.attention(q, k, v, until=until, **options)

  options = dict(interpret=interpret, **configs.get(s.op, {}))
  return dict(
    attention=functools.partial(sparse_attention.sparse_attention, **options),
    dense=functools.partial(dense, **options),
    kl=functools.partial(index_kl.index_kl_loss, **options),
    select=functools.partial(select_blocks.select_blocks, **options),
    decode=functools.partial(decode.decode_attention, **options),
  )


# ---- The truth ----


def _teacher_lse(s: Signature, x: dict) -> jax.Array:
  q, k = (x[name].astype(jnp.float32) for name in ("q", "clean_k"))
  if s.op == "warmup_kl":
    layout = layout_of(s, x)
    positions = reference.query_positions(
      s.q_len, s.kv_len, s.batch, x["lengths"], layout
    )
    visible = jnp.broadcast_to(
      reference.visible_tokens(positions, s.kv_len, layout), x["visible"].shape
    )
  else:
    visible = x["visible"]
  lse = reference.masked_logsumexp(
    reference.head_scores(q, k, visible, s.scale)
  )
  return lse.reshape(s.batch, s.num_heads, s.q_len)


def _rounder(dtype: Any) -> Callable:
  if dtype is None:
    return lambda x: x
  return functools.partial(reference.round_to, dtype=dtype)


def _by_block(s: Signature, x: jax.Array, axis: int) -> jax.Array:
  """Splits an axis of key slots into blocks, N first."""
  pad = [(0, 0)] * x.ndim
  num_blocks = -(-s.kv_len // s.block_size)  # also of packed rows
  pad[axis] = (0, num_blocks * s.block_size - s.kv_len)
  x = jnp.pad(x, pad)
  x = x.reshape(*x.shape[:axis], num_blocks, s.block_size, *x.shape[axis + 1 :])
  return jnp.moveaxis(x, axis, 0)


def _attention(s: Signature, x: dict, dtype: Any) -> dict[str, Any]:
  """out, lse and gradients by the formula, and the size of dq's partials."""
  rounded = _rounder(dtype)
  q, k, v, dout = (
    x[name].astype(jnp.float32) for name in ("q", "clean_k", "clean_v", "dout")
  )
  visible = x["visible"]
  out, lse = reference.attend(
    q, k, v, visible, s.scale, probs_dtype=dtype and jnp.dtype(dtype)
  )
  sizes = (s.batch, s.q_len, s.num_kv_heads, s.group_size, s.head_dim)
  p = reference.head_scores(q, k, visible, s.scale)
  p = reference.softmax(p, reference.masked_logsumexp(p))
  q, dout, delta = (x.reshape(sizes) for x in (q, dout, rounded(out) * dout))
  dp = highest("btkgd,bskd->bkgts", dout, v)
  delta = jnp.moveaxis(jnp.sum(delta, axis=-1), 1, -1)
  if s.with_dlse:
    delta -= jnp.where(lse == -jnp.inf, 0, x["dlse"]).reshape(delta.shape)
  ds = rounded(p * (dp - delta[..., None]))
  dq = s.scale * highest("bkgts,bskd->btkgd", ds, k)
  parts = s.scale * highest(
    "nbkgtj,nbjkd->nbtkgd", _by_block(s, ds, 4), _by_block(s, k, 1)
  )
  return dict(
    out=rounded(out),
    lse=lse,
    dq=dq.reshape(out.shape),
    dk=s.scale * highest("bkgts,btkgd->bskd", ds, q),
    dv=highest("bkgts,btkgd->bskd", rounded(p), dout),
    dq_size=jnp.max(jnp.abs(parts), initial=0.0),
  )


def _kl(s: Signature, x: dict, dtype: Any) -> dict[str, Any]:
  """The KL and its gradients, and the sizes of what they are summed from."""
  rounded = _rounder(dtype)
  q, k, index_q, index_k = (
    x[name].astype(jnp.float32)
    for name in ("q", "clean_k", "index_q", "clean_index_k")
  )
  visible, i_scale = x["visible"], s.index_dim**-0.5
  scores = reference.head_scores(q, k, visible, s.scale)
  p = reference.softmax(scores, reference.masked_logsumexp(scores))
  p = jnp.mean(rounded(p), axis=2)
  u = jnp.where(
    visible, i_scale * reference.index_scores(index_q, index_k), -jnp.inf
  )
  lse = reference.masked_logsumexp(u)
  r = reference.softmax(u, lse)
  lse = jnp.where(lse == -jnp.inf, 0, lse)[..., None]
  log_r = jnp.where(visible, u - lse, 0)
  log_p = jnp.log(jnp.where(p > 0, p, 1))
  counted, weight = x["mask"].sum(), x["mask"].astype(jnp.float32)
  counted = jnp.where(counted == 0, 1, counted) * s.num_kv_heads
  weight = weight[:, None, :, None]

  def gradients(g):
    g = g * weight * (i_scale / counted)
    return (
      highest("bkts,bsi->btki", g, index_k),
      highest("bkts,btki->bsi", g, index_q),
    )

  g = rounded(r - p)
  diq, dik = gradients(g)
  diq_size, dik_size = (jnp.abs(x) for x in gradients(r))
  if s.op == "kl":
    # Each block's part of dindex_q is rounded before the blocks are summed.
    parts = highest(
      "nbktj,nbji->nbtki", _by_block(s, g, 3), _by_block(s, index_k, 1)
    )
    parts = jnp.sum(jnp.abs(parts), axis=0) * (i_scale / counted)
    parts *= x["mask"].astype(jnp.float32)[..., None, None]
    diq_size = jnp.maximum(diq_size, parts)
  return dict(
    kl=jnp.sum(weight * p * (log_p - log_r)) / counted,
    dindex_q=diq,
    dindex_k=dik,
    dindex_q_size=diq_size,
    dindex_k_size=dik_size,
  )


# ---- Comparison: everything on the device, numbers to the host ----


def _compare(got, truth, near, dtype, size=None) -> dict[str, jax.Array]:
  """Errors of a result and their bounds, where the truth is finite."""
  got, truth, near = (x.astype(jnp.float32) for x in (got, truth, near))
  finite = jnp.isfinite(truth)
  same = (jnp.isnan(got) == jnp.isnan(truth)) & (
    finite | jnp.isnan(truth) | (got == truth)
  )

  def errors(x):
    return jnp.where(finite, jnp.abs(x - truth), 0)

  def rms(x):
    return jnp.sqrt(jnp.mean(jnp.square(x)))

  scale = jnp.where(finite, jnp.abs(truth), 0)
  if size is not None and size.ndim:
    scale = jnp.maximum(scale, size)
  top = jnp.max(jnp.abs(scale))
  if size is not None:
    top = jnp.maximum(top, jnp.max(size))
  error, near = errors(got), errors(near)
  bound = 2 * jnp.max(near) + float(jnp.finfo(dtype).eps) * top
  # 1e-30: where everything is 0, so must the error be.
  most = jnp.maximum(0.005 * rms(scale), 2 * rms(near)) + 1e-30
  return dict(
    misplaced=jnp.sum(~same), error=jnp.max(error), bound=bound,
    rms=rms(error), rms_bound=most,
  )  # fmt: skip


def _same_bits(first: dict, second: dict) -> jax.Array:
  def same(a, b):
    if a.dtype == jnp.int32:
      return jnp.all(a == b)
    kind = jnp.uint16 if a.dtype.itemsize == 2 else jnp.uint32
    return jnp.all(
      lax.bitcast_convert_type(a, kind) == lax.bitcast_convert_type(b, kind)
    )

  return jnp.all(jnp.stack([same(first[name], second[name]) for name in first]))


def checker(s: Signature) -> Callable:
  """(draw's dict, results, results again) -> report of numbers."""

  def attention(x, got):
    truth, near = _attention(s, x, None), _attention(s, x, s.dtype)
    report = dict(out=_compare(got["out"], truth["out"], near["out"], s.dtype))
    lse = _compare(got["lse"], truth["lse"], truth["lse"], s.dtype)
    seen = jnp.isfinite(truth["lse"])
    # Sums in float32, and exp2 and log2 to 2 units in the last place.
    lse["bound"] = 2e-5 * (
      1 + jnp.max(jnp.where(seen, jnp.abs(truth["lse"]), 0))
    )
    report["lse"] = lse | dict(rms_bound=lse["bound"])
    for name in ("dq", "dk", "dv"):
      # Each block's part of a sparse dq is rounded before the sum.
      sums_parts = name == "dq" and s.op == "attention"
      size = truth["dq_size"] if sums_parts else None
      report[name] = _without_nan_calls(
        x, _compare(got[name], truth[name], near[name], s.dtype, size)
      )
    return report

  def kl(x, got):
    truth, near = _kl(s, x, None), _kl(s, x, s.dtype)
    value = _compare(got["kl"], truth["kl"], near["kl"], s.dtype)
    # Sums over all pairs in float32 of terms with p rounded.
    value["bound"] += 2e-4 * jnp.abs(jnp.nan_to_num(truth["kl"])) + 1e-6
    report = dict(kl=value | dict(rms_bound=value["bound"]))
    for name in ("dindex_q", "dindex_k"):
      report[name] = _without_nan_calls(
        x,
        _compare(
          got[name], truth[name], near[name], s.dtype, truth[f"{name}_size"]
        ),
      )
    return report

  def select(x, got):
    operands = [
      x[name].astype(jnp.float32) for name in ("index_q", "clean_index_k")
    ]
    if s.precision == "fp8":
      operands = [reference.quantise_fp8(y) for y in operands]
    scores = reference.index_scores(*operands)
    sizes = (jnp.abs(jnp.nan_to_num(y)) for y in operands)
    size = reference.index_scores(*sizes)
    return dict(ids=_choice(s, x, got["ids"], scores, size))

  def decode(x, got):
    ids, scale = got["ids"], x.get("index_k_scale")
    if scale is not None:
      scale = jnp.nan_to_num(scale)
    index_q, index_k = x["index_q"], x["clean_index_k"]
    scores = reference.decode_scores(index_q, index_k, scale)
    wide = index_k.astype(jnp.float32)
    if scale is not None:
      wide *= scale[..., None]
    size = reference.index_scores(
      *(jnp.abs(jnp.nan_to_num(y.astype(jnp.float32))) for y in (index_q, wide))
    )
    positions = reference.query_positions(
      s.q_len, s.kv_len, s.batch, x["lengths"]
    )
    visible = reference.chosen_tokens(ids, positions, s.kv_len, s.block_size)
    q, k, v = (
      x[name].astype(jnp.float32) for name in ("q", "clean_k", "clean_v")
    )
    attend = functools.partial(reference.attend, q, k, v, visible, s.scale)
    out = attend()[0]
    near = reference.round_to(attend(jnp.dtype(s.dtype))[0], s.dtype)
    return dict(
      ids=_choice(s, x, ids, scores, size),
      out=_compare(got["out"], out, near, s.dtype),
    )

  check = dict(
    attention=attention,
    dense=attention,
    kl=kl,
    warmup_kl=kl,
    select=select,
    decode=decode,
  )[s.op]

  def run(x, got, again):
    report = check(x, got)
    drawn = {name: x[name] for name in ("kind", "choice", "factor", "lengths")}
    return dict(results=report, same_bits=_same_bits(got, again), drawn=drawn)

  return run


def _without_nan_calls(x: dict, report: dict) -> dict:
  """Gradients are compared only if no visible operand holds NaN."""
  visible_nan = (x["kind"] == 1) | (x["kind"] == 2)
  return {
    name: jnp.where(visible_nan, jnp.zeros_like(value), value)
    for name, value in report.items()
  }


def _choice(s: Signature, x: dict, ids, scores, size) -> dict[str, jax.Array]:
  """What a choice must satisfy; `bound` is the margin of near ties."""
  layout = layout_of(s, x)
  n, positions = s.num_blocks, reference.query_positions(
    s.q_len, s.kv_len, s.batch, x["lengths"], layout
  )  # fmt: skip
  causal = reference.visible_tokens(positions, s.kv_len, layout)
  scores = jnp.where(causal, scores, -jnp.inf)
  best = reference.block_max(jnp.moveaxis(_pad_blocks(s, scores, layout), 3, 0))
  best = jnp.moveaxis(best, 0, 3)
  size = jnp.max(jnp.where(causal, size, 0), axis=-1)
  block = jnp.arange(n)
  visible, forced = reference.visible_blocks(
    positions, n, s.block_size, s.num_local_blocks, layout
  )
  competing = visible & ~forced & ~jnp.isnan(best)
  count = jnp.sum(ids >= 0, axis=-1)
  room = jnp.minimum(s.top_k, forced.sum(-1) + competing.sum(-1))
  slot = jnp.arange(s.top_k)
  filled = slot < count[..., None]
  chosen = jnp.any(ids[..., None] == block, axis=-2)
  ascending = (jnp.diff(ids, axis=-1) > 0) | ~filled[..., 1:]
  wrong = (
    jnp.sum(count != room)
    + jnp.sum(~filled & (ids != -1))
    + jnp.sum(~ascending)
    + jnp.sum(chosen & ~(forced | competing))
    + jnp.sum(forced & ~chosen)
  )
  worst = jnp.min(jnp.where(chosen & competing, best, jnp.inf), axis=-1)
  refused = jnp.max(jnp.where(competing & ~chosen, best, -jnp.inf), axis=-1)
  excess = jnp.where(
    (worst < refused), (refused - worst) / jnp.maximum(size, 1e-30), 0
  )
  # An infinity of both kinds is no near tie.
  error = jnp.max(jnp.nan_to_num(excess, nan=jnp.inf))
  zero = jnp.float32(0)
  if s.precision == "fp8":
    # Hopper keeps about 14 bits of each of the I products beside the largest
    # of them and the sum so far. (Where the keys of a block share a scale,
    # e4m3 codes of small numbers are off by 2^-17 of the block's largest one.)
    bound = jnp.float32(2.0**-13 * s.index_dim)
  else:
    bound = jnp.float32(MARGINS[s.precision])
  return dict(
    misplaced=wrong, error=error, bound=bound, rms=zero, rms_bound=zero
  )


def _pad_blocks(
  s: Signature, scores: jax.Array, layout: segments_lib.BlockLayout | None
) -> jax.Array:
  """[B, K, T, S] -> [B, K, T, N, block_size], -inf where no key is."""
  if layout is not None:
    slots, inside = (
      x.reshape(s.batch, 1, 1, -1)
      for x in reference.block_slots(layout, s.block_size)
    )
    scores = jnp.take_along_axis(scores, slots, axis=-1)
    scores = jnp.where(inside, scores, -jnp.inf)
    return scores.reshape(*scores.shape[:3], s.num_blocks, s.block_size)
  pad = s.num_blocks * s.block_size - s.kv_len
  scores = jnp.pad(scores, ((0, 0),) * 3 + ((0, pad),), constant_values=-np.inf)
  return scores.reshape(*scores.shape[:3], s.num_blocks, s.block_size)


# ---- Running ----


def faults(report: dict) -> list[str]:
  """What is wrong with a call, in words; nothing if it passed."""
  found = [] if report["same_bits"] else ["a second run gave other bits"]
  for name, x in report["results"].items():
    if x["misplaced"]:
      found.append(f"{name}: {int(x['misplaced'])} entries out of place")
    for error, bound in (("error", "bound"), ("rms", "rms_bound")):
      if not x[error] <= x[bound]:
        found.append(f"{name}: {error} {x[error]:.3g} > {x[bound]:.3g}")
  return found


class Programs:
  """The compiled programs of a signature."""

  def __init__(self, s: Signature, implementation: str, interpret: bool):
    # They run few times: to search for the fastest products takes longer.
    options = {"xla_gpu_autotune_level": 0} if _on_gpu() else None
    jit = functools.partial(jax.jit, compiler_options=options)
    key = jax.eval_shape(lambda: jax.random.key(0))
    draw_ = jit(functools.partial(draw, s)).trace(key)
    x = draw_.out_info
    run = jit(runner(s, implementation, interpret)).trace(x)
    out = run.out_info
    check = jit(checker(s)).trace(x, out, out)
    self._draw, self._run, self._check = (
      program.lower().compile() for program in (draw_, run, check)
    )

  def __call__(self, key: jax.Array) -> Any:
    """The report of a call, on the device."""
    x = self._draw(key)
    return self._check(x, self._run(x), self._run(x))


def _on_gpu() -> bool:
  return jax.default_backend() == "gpu"


def parse(argv: list[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    prog="python -m benchmarks.fuzz",
    description=(__doc__ or "").split("\n\n")[0],
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
  )
  parser.add_argument("--calls", type=int, default=10_000)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument(
    "--signatures", type=int, default=96, help="compiled signatures, up to 100"
  )
  parser.add_argument(
    "--each-kernel",
    action="store_true",
    help="instead, small calls that together launch every kernel",
  )
  parser.add_argument(
    "--only", type=int, nargs="+", metavar="N", help="run these calls alone"
  )
  parser.add_argument(
    "--processes", type=int, default=1, help="which share the signatures"
  )
  parser.add_argument(
    "--sanitizer",
    nargs="?",
    const=fuzz_processes.SANITIZER,
    metavar="COMMAND",
    help="run each signature in a process of its own under this command;"
    f" without one: {fuzz_processes.SANITIZER}",
  )
  parser.add_argument(
    "--time-limit",
    type=float,
    default=1800.0,
    help="seconds of one of several processes, which then ends",
  )
  # What a parent gives to its processes: indices of signatures.
  parser.add_argument("--share", type=int, nargs="+", help=argparse.SUPPRESS)
  parser.add_argument(
    "--implementation",
    default="mosaic_gpu",
    choices=("mosaic_gpu", "xla", "reference"),
  )
  parser.add_argument(
    "--interpret", action="store_true", help="kernels on a CPU, tiny sizes"
  )
  parser.add_argument("--tiny", action="store_true", help="tiny sizes")
  parser.add_argument("--out", type=pathlib.Path, help="JSON summary")
  args = parser.parse_args(argv)
  if not 1 <= args.signatures <= 100:
    parser.error(f"--signatures must be 1 to 100, got {args.signatures}")
  if args.processes < 1:
    parser.error(f"--processes must be 1 or more, got {args.processes}")
  return args


@dataclasses.dataclass(frozen=True)
class Plan:
  """The calls to make.

  Attributes:
    signatures: all that a call may have.
    calls: index of a signature -> its calls. They follow each other, so that
      its programs can go.
    repeat: the command that makes them, without the calls' numbers.
  """

  signatures: list[Signature]
  calls: dict[int, list[int]]
  repeat: str

  @classmethod
  def of(cls, args: argparse.Namespace) -> Plan:
    options = [f"--seed {args.seed} --implementation {args.implementation}"]
    options += ["--interpret"] * args.interpret
    if args.each_kernel:
      found = list(EACH_KERNEL)
      calls = range(CALLS_EACH * len(found))
      options += ["--each-kernel"]
    else:
      tiny = args.tiny or args.interpret
      found = signatures(args.seed, args.signatures, tiny)
      calls = range(args.calls)
      options += [f"--signatures {args.signatures}"] + ["--tiny"] * args.tiny
    by_signature = collections.defaultdict(list)
    for call in args.only or calls:
      by_signature[call % len(found)].append(call)
    if args.share is not None:
      by_signature = {index: by_signature[index] for index in args.share}
    repeat = f"python -m benchmarks.fuzz {' '.join(options)} --only"
    return cls(found, dict(by_signature), repeat)


class Tally:
  """What was done and what was wrong, and the file that says so."""

  def __init__(self, args: argparse.Namespace, plan: Plan):
    self._args, self._plan = args, plan
    self._start = time.perf_counter()
    self.summary: dict[str, Any] = dict(
      device=None,
      jax=jax.__version__,
      implementation=args.implementation,
      interpret=args.interpret,
      seed=args.seed,
      signatures=len(plan.calls),
      calls=0,
      calls_by_op={},
      failed=0,
      failures=[],
      unsupported={},
      finished=[],
      unfinished=list(plan.calls),
      lost=[],
      seconds=0.0,
    )

  def judge(self, call: int, s: Signature, report: Any) -> None:
    done = self.summary["calls_by_op"]
    done[s.op] = done.get(s.op, 0) + 1
    self.summary["calls"] += 1
    report = jax.tree.map(np.asarray, report)
    wrong = faults(report)
    if not wrong:
      return
    drawn = {name: x.tolist() for name, x in report["drawn"].items()}
    drawn["choice"] = CHOICES[drawn["choice"]]
    drawn["nan"] = ("none", "query", "key", "unseen")[drawn.pop("kind")]
    repeat = f"{self._plan.repeat} {call}"
    self.summary["failures"].append(
      dict(
        call=call, faults=wrong, signature=dataclasses.asdict(s), drawn=drawn,
        repeat=repeat,
      )
    )  # fmt: skip
    self.summary["failed"] += 1
    print(f"call {call} failed: {'; '.join(wrong)}\n  {s}\n  {drawn}")
    print(f"  {repeat}", flush=True)
    self.write()

  def skip(self, index: int, error: NotImplementedError) -> None:
    """Counts a signature that the implementation does not have."""
    self.summary["unsupported"][str(index)] = str(error)
    print(f"signature {index} is not supported: {error}", flush=True)
    self.finish(index)

  def finish(self, index: int) -> None:
    x = self.summary
    x["unfinished"].remove(index)
    x["finished"].append(index)
    self.write()
    print(
      f"[{x['seconds']:6.1f} s] {len(x['finished'])} of {x['signatures']}"
      f" signatures, {x['calls']} calls, {x['failed']} failed",
      flush=True,
    )

  def merge(self, parts: list[dict], lost: list[dict]) -> None:
    """Takes what processes did in the place of what was there.

    Args:
      parts: their summaries.
      lost: those of them that did not do all that they should.
    """
    whole = self.summary
    by_op: collections.Counter = collections.Counter()
    finished: set[int] = set()
    for part in parts:
      by_op.update(part["calls_by_op"])
      finished.update(part["finished"])
      whole["device"] = part["device"] or whole["device"]
      whole["unsupported"] |= part["unsupported"]
    failures = [x for part in parts for x in part["failures"]]
    whole["failures"] = sorted(failures, key=lambda x: x["call"])
    whole["failed"] = len(failures)
    whole["calls_by_op"], whole["calls"] = dict(by_op), by_op.total()
    whole["finished"] = sorted(finished)
    whole["unfinished"] = sorted(set(self._plan.calls) - finished)
    whole["lost"] = lost
    self.write()

  def write(self) -> None:
    """Writes the summary whole or not at all, also of a run that goes on."""
    seconds = time.perf_counter() - self._start
    self.summary["seconds"] = round(seconds, 1)
    path = self._args.out
    if path:
      partial = path.with_name(path.name + ".partial")
      partial.write_text(json.dumps(self.summary, indent=1) + "\n")
      partial.replace(path)

  def end(self) -> int:
    """Writes and prints how it ended; 1 if anything was wrong or left out."""
    self.write()
    x = self.summary
    print(
      f"{x['calls']} calls of {x['signatures']} signatures, {x['failed']}"
      f" failed, in {x['seconds']} s"
    )
    if x["lost"]:
      lost = sorted(index for of in x["lost"] for index in of["signatures"])
      print(f"{len(x['lost'])} processes lost, with signatures {lost}")
    if x["unsupported"]:
      print(f"signatures not supported: {', '.join(x['unsupported'])}")
    missing = not x["calls"] or x["lost"] or x["unfinished"]
    # The lists hold what the kernels take.
    kernels = self._args.implementation == "mosaic_gpu"
    missing = missing or (kernels and x["unsupported"])
    return 1 if x["failures"] or missing else 0


def run_here(args: argparse.Namespace, plan: Plan, tally: Tally) -> None:
  """Makes the calls in this process."""
  base = jax.random.key(args.seed)
  tally.summary["device"] = jax.devices()[0].device_kind
  tally.write()

  def build(index: int) -> Programs:
    s = plan.signatures[index]
    return Programs(s, args.implementation, args.interpret)

  # One thread compiles ahead of the calls. Most of that is Python, of which
  # more threads run no more at once.
  pool = concurrent.futures.ThreadPoolExecutor(1)
  try:
    futures = {index: pool.submit(build, index) for index in plan.calls}
    for index, calls in plan.calls.items():
      s, waiting = plan.signatures[index], collections.deque()
      try:
        programs = futures.pop(index).result()
      except NotImplementedError as error:
        tally.skip(index, error)
        continue
      for call in calls:
        waiting.append((call, programs(jax.random.fold_in(base, call))))
        if len(waiting) > 8:  # the host judges while the device works
          earlier, report = waiting.popleft()
          tally.judge(earlier, s, report)
      for call, report in waiting:
        tally.judge(call, s, report)
      tally.finish(index)
  finally:
    pool.shutdown(cancel_futures=True)


def run_in_processes(
  argv: list[str], args: argparse.Namespace, plan: Plan, tally: Tally
) -> None:
  """Deals the signatures to processes, which make the calls."""
  op_of = {index: plan.signatures[index].op for index in plan.calls}
  under = shlex.split(args.sanitizer or "")
  count = len(op_of) if under else args.processes

  def command(share: list[int], out: pathlib.Path) -> list[str]:
    mine = ["--share", *map(str, share), "--out", str(out)]
    return [*under, sys.executable, "-m", "benchmarks.fuzz", *argv, *mine]

  lost = fuzz_processes.run(
    fuzz_processes.deal(op_of, count),
    command,
    tally.merge,
    at_once=args.processes,
    time_limit=args.time_limit,
    sanitizer=bool(under),
  )
  fuzz_processes.report(lost)


def main(argv: list[str] | None = None) -> int:
  """Runs the calls; returns 1 if any failed or was left out."""
  argv = sys.argv[1:] if argv is None else argv
  args = parse(argv)
  plan = Plan.of(args)
  tally = Tally(args, plan)
  if args.share is not None:
    # Where Python stands when it dies, or does not end.
    faulthandler.enable()
    faulthandler.dump_traceback_later(args.time_limit, exit=True)
    run_here(args, plan, tally)
  elif args.processes > 1 or args.sanitizer:
    run_in_processes(argv, args, plan, tally)
  else:
    run_here(args, plan, tally)
  return tally.end()


if __name__ == "__main__":
  sys.exit(main())
