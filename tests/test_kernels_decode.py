"""Decoding: interpreted at small shapes, lowered at the paper's, on Hopper."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from op_contract import EXACT, check_choice

from msa_jax import reference
from pallas_kernels import decode, mosaic

FP8 = jnp.float8_e4m3fn
SMALL = decode.Config(num_ctas=3, stages=2, splits=2)
# On a GPU: few key tiles in flight, whole blocks, more splits than fit.
CONFIGS = (
  decode.Config(),
  decode.Config(stages=4),
  decode.Config(step_keys=128),
  decode.Config(step_keys=64, splits=32),
)
# Hopper sums e4m3 products with about 14 bits.
FP8_GPU = 2.0**-10


@dataclasses.dataclass(frozen=True)
class Case:
  """One call; slots beyond the lengths hold NaN."""

  lengths: tuple[int, ...] = (300, 325)
  capacity: int = 328
  tokens: int = 1
  num_heads: int = 4
  num_kv_heads: int = 2
  head_dim: int = 64
  index_dim: int = 64
  block_size: int = 64
  top_k: int = 3
  num_local: int = 1
  dtype: str = "bfloat16"
  fp8: bool = False

  @property
  def batch(self):
    return len(self.lengths)

  @functools.partial(jax.jit, static_argnums=0)
  def inputs(self, seed=0):
    """q, k, v, index_q, index_k and the scales of index_k or None."""
    keys = jax.random.split(jax.random.key(seed), 5)
    kv = (self.batch, self.capacity, self.num_kv_heads, self.head_dim)
    heads = (self.batch, self.tokens)
    shapes = (
      (*heads, self.num_heads, self.head_dim),
      kv,
      kv,
      (*heads, self.num_kv_heads, self.index_dim),
      (self.batch, self.capacity, self.index_dim),
    )
    q, k, v, index_q, index_k = (
      jax.random.normal(key, shape, self.dtype)
      for key, shape in zip(keys, shapes)
    )
    scale = None
    if self.fp8:
      index_k, scale = reference.fp8_codes(index_k)
      scale = jnp.where(self.unused(), jnp.nan, scale)
    k, v, index_k = (
      jnp.where(
        self.unused().reshape(*self.unused().shape, *(1,) * (x.ndim - 2)),
        jnp.asarray(jnp.nan, x.dtype),
        x,
      )
      for x in (k, v, index_k)
    )
    return q, k, v, index_q, index_k, scale

  def unused(self):
    return jnp.arange(self.capacity) >= jnp.array(self.lengths)[:, None]


@functools.cache
def compiled(block_size, top_k, num_local, config, interpret):
  return jax.jit(
    functools.partial(
      decode.decode_attention,
      block_size=block_size,
      top_k=top_k,
      num_local_blocks=num_local,
      config=config,
      interpret=interpret,
    )
  )


def run(case, inputs, config: Any = SMALL, interpret=True):
  """out in float32, and ids; on a GPU of two runs with the same bits."""
  *inputs, scale = inputs
  call = functools.partial(
    compiled(case.block_size, case.top_k, case.num_local, config, interpret),
    *inputs,
    kv_lengths=jnp.array(case.lengths, jnp.int32),
    index_k_scale=scale,
  )
  out, ids = call()
  assert out.dtype == inputs[0].dtype and out.shape == inputs[0].shape
  out, ids = np.asarray(out.astype(jnp.float32)), np.array(ids)
  if not interpret:
    again = call()
    np.testing.assert_array_equal(out, again[0].astype(jnp.float32))
    np.testing.assert_array_equal(ids, again[1])
  return out, ids


def check(case, inputs, out, ids, margin):
  """Ids against the scores in float64, out against attention of those ids."""
  *_, index_q, index_k, scale = inputs
  if scale is not None:
    index_q, q_scale = reference.fp8_codes(index_q)
    index_q = index_q.astype(jnp.float32) * q_scale[..., None]
    index_k = index_k.astype(jnp.float32) * scale[..., None]
  check_choice(
    index_q,
    index_k,
    ids,
    block_size=case.block_size,
    top_k=case.top_k,
    num_local=case.num_local,
    kv_lengths=case.lengths,
    margin=margin,
  )
  check_out(case, inputs, out, ids)


@functools.partial(jax.jit, static_argnums=0)
def attention(case, q, k, v, ids):
  """The queries' slots, and out with exact and with rounded probabilities."""
  lengths = jnp.array(case.lengths, jnp.int32)
  positions = reference.query_positions(
    case.tokens, case.capacity, case.batch, lengths
  )
  visible = reference.chosen_tokens(
    ids, positions, case.capacity, case.block_size
  )
  wide = (x.astype(jnp.float32) for x in (q, k, v))
  attend = functools.partial(
    reference.attend, *wide, visible, case.head_dim**-0.5
  )
  return positions, attend()[0], attend(jnp.dtype(case.dtype))[0]


def check_out(case, inputs, out, ids):
  """out against attention to the blocks of ids."""
  positions, want, near = (
    np.asarray(x) for x in attention(case, *inputs[:3], ids)
  )
  assert np.isfinite(out).all()
  error = np.abs(out - want)
  floor = float(jnp.finfo(case.dtype).eps) * np.abs(want).max()
  assert error.max() <= 2 * np.abs(near - want).max() + floor
  assert np.linalg.norm(error) <= 0.005 * np.linalg.norm(want)
  assert (out[positions < 0] == 0).all()


def run_and_check(case, inputs=None, config: Any = SMALL, interpret=True):
  inputs = inputs or case.inputs()
  out, ids = run(case, inputs, config, interpret)
  margin = EXACT if interpret or not case.fp8 else FP8_GPU
  check(case, inputs, out, ids, margin)
  return out, ids


@pytest.mark.parametrize("lengths, fp8", [((256, 20), False), ((300, 0), True)])
def test_ragged_rows_and_unused_slots(lengths, fp8):
  """Rows end inside a block, at its end, and before the first query."""
  case = Case(lengths=lengths, fp8=fp8)
  out, ids = run_and_check(case)
  if fp8:
    assert (ids[1] == -1).all() and (out[1] == 0).all()
    return
  _, _, _, index_q, index_k, _ = case.inputs()
  want = reference.select_blocks(
    index_q,
    index_k,
    block_size=64,
    top_k=3,
    num_local_blocks=1,
    kv_lengths=jnp.array(lengths),
    score_precision="exact",
  )
  np.testing.assert_array_equal(ids, want)


@pytest.mark.parametrize(
  "case",
  [
    # Queries that span two blocks.
    Case(
      lengths=(137,), capacity=200, tokens=16, num_heads=2, num_kv_heads=1,
      top_k=2,
    ),
    # Rows of index queries that fill no swizzle tile; a capacity of no
    # multiple of 8; attention in half blocks; heads of their own.
    Case(
      lengths=(389,), capacity=389, tokens=3, num_heads=3, num_kv_heads=3,
      head_dim=128, index_dim=128, block_size=128, top_k=2, dtype="float16",
    ),
    # Own blocks compete, partly visible; more blocks wanted than there are;
    # fewer keys than queries.
    Case(lengths=(200, 1), tokens=2, num_local=0, top_k=5, fp8=True),
    # Two forced blocks: test_all_forced_needs_no_scan.
    pytest.param(
      Case(lengths=(60, 300), num_local=2, num_heads=16, num_kv_heads=1),
      marks=pytest.mark.slow,
    ),
  ],
)  # fmt: skip
def test_tokens_groups_and_forced_blocks(case):
  config = dataclasses.replace(SMALL, step_keys=64)
  run_and_check(case, config=config)


# Heads that the cache holds shorter than the kernel computes in.
PADDED = [
  # Phi-2's heads, in fp8; partly visible blocks compete.
  Case(lengths=(140, 131), capacity=144, head_dim=80, index_dim=80, tokens=2,
       num_heads=3, num_kv_heads=1, num_local=0, fp8=True, top_k=2),
  *(
    pytest.param(case, marks=pytest.mark.slow)
    for case in (
      # One operand each, of fewer than 64 columns.
      Case(lengths=(140,), capacity=143, head_dim=40, index_dim=48,
           num_heads=4, num_kv_heads=1, top_k=1, num_local=0),
      # Two operands each; an empty batch row; Phi-3-mini's heads.
      Case(lengths=(140, 0), capacity=141, head_dim=96, index_dim=96,
           num_heads=1, num_kv_heads=1, top_k=2),
      Case(head_dim=112, index_dim=72, num_heads=6, dtype="float16"),
      Case(head_dim=72, index_dim=128, tokens=3),
      Case(head_dim=128, index_dim=32, fp8=True),
      Case(head_dim=200, index_dim=112, num_heads=2, fp8=True),
      # The last operand lies behind the last column; rows of 16 bytes.
      Case(head_dim=136, index_dim=8, capacity=331),
      Case(head_dim=8, index_dim=16, fp8=True, num_local=0),
    )
  ),
]  # fmt: skip


@pytest.mark.parametrize("case", PADDED)
def test_heads_are_padded_without_the_cache(case):
  run_and_check(case)


def test_all_forced_needs_no_scan():
  case = Case(lengths=(300, 40), top_k=2, num_local=2)
  _, ids = run_and_check(case)
  np.testing.assert_array_equal(ids[:, 0, 0], [[3, 4], [0, -1]])


def test_several_rows_in_the_share_of_a_cta(monkeypatch):
  """More rows than lengths are read at once; nothing split."""
  monkeypatch.setattr(decode, "LENGTHS_AT_ONCE", 2)
  case = Case(
    lengths=(130, 0, 328, 64, 300, 129, 1), num_heads=1, num_kv_heads=1,
    top_k=2,
  )  # fmt: skip
  config = decode.Config(num_ctas=3, splits=1)
  run_and_check(case, config=config)


@pytest.mark.slow
def test_a_list_of_40_blocks():
  case = Case(
    lengths=(4000, 300), capacity=4000, num_heads=4, num_kv_heads=2, top_k=40,
    dtype="float16",
  )  # fmt: skip
  run_and_check(case, config=None)


@pytest.mark.slow
def test_more_lists_than_lanes():
  case = Case(lengths=(4480, 300), capacity=4480, num_heads=1, num_kv_heads=1)
  params = params_of(case, decode.Config(num_ctas=36))
  _, count = decode._lists_of(jnp.array(case.lengths), 0, params)
  assert count > decode.LANES
  run_and_check(case, config=decode.Config(num_ctas=36, splits=1))


def test_ties_go_to_the_lower_id():
  case = Case(lengths=(325, 320))
  q, k, v, index_q, index_k, _ = case.inputs()
  index_q = jnp.ones_like(index_q)

  def ids_of(keys):
    keys = (keys[..., None] * jnp.ones_like(index_k)).astype(index_k.dtype)
    _, ids = run_and_check(case, (q, k, v, index_q, keys, None))
    assert (ids[:, 0] == ids[:, 1]).all()
    return ids[:, 0, 0]

  # -0 equals 0, whatever CTA saw it.
  zeros = jnp.where(jnp.arange(328) < 128, -0.0, 0.0)
  np.testing.assert_array_equal(ids_of(zeros), [[0, 1, 5], [0, 1, 4]])
  level = jnp.array([[1, 2, 2, 3, 2, 9], [1, 3, 3, 3, 0, 9]])
  level = jnp.repeat(level, 64, axis=1)[:, :328]
  np.testing.assert_array_equal(ids_of(level), [[1, 3, 5], [1, 2, 4]])


def test_nan_stays_where_it_can_be_seen():
  case = Case()
  inputs = case.inputs()
  q, k, v, index_q, index_k, scale = inputs
  out, ids = run(case, inputs)
  assert (ids[1, :, 0, 2] == 5).all()

  # A NaN score keeps a block out, unless it is forced.
  bad_k = index_k.at[0, 70, 3].set(jnp.nan).at[1, 323, 0].set(jnp.nan)
  bad_q = index_q.at[1, 0, 1, 0].set(jnp.nan)
  _, got = run(case, (q, k, v, bad_q, bad_k, scale))
  assert (got[0] != 1).all()
  np.testing.assert_array_equal(got[1, 1, 0], [5, -1, -1])
  untouched = (ids != 1).all(-1)
  untouched[1] = [[True], [False]]
  np.testing.assert_array_equal(got[untouched], ids[untouched])

  # Keys and values poison the rows that attend to them, wholly, and no other.
  chosen = int(ids[0, 0, 0, 1]) * 64 + 5
  bad_k = k.at[0, chosen, 0, 2].set(-jnp.inf)
  bad_v = v.at[1, 324, 1, 0].set(jnp.inf)
  got, _ = run(case, (q, bad_k, bad_v, index_q, index_k, scale))
  hit = np.zeros((2, 1, 4), bool)
  hit[0, 0, :2] = hit[1, 0, 2:] = True
  assert np.isnan(got[hit]).all()
  np.testing.assert_array_equal(got[~hit], out[~hit])


@pytest.mark.parametrize("lengths", [(5, 0, 900), (0, 0), (130,), (64,) * 40])
@pytest.mark.parametrize("num_ctas", [1, 3, 132])
def test_lists_of_a_row_are_where_the_shares_leave_them(lengths, num_ctas):
  blocks = [max(-(-n // 64) - 1, 0) for n in lengths]
  tiles = [-(-n // 2) for n in blocks]
  share, extra = divmod(sum(tiles), num_ctas)
  bounds = np.cumsum([0, *(share + (np.arange(num_ctas) < extra))])
  before = np.cumsum([0, *tiles])
  case = Case(lengths=lengths, capacity=1024)
  params = params_of(case, decode.Config(num_ctas=num_ctas))
  firsts, counts = jax.jit(
    jax.vmap(lambda b: decode._lists_of(jnp.array(lengths), b, params))
  )(jnp.arange(len(lengths)))
  for b, (first, count) in enumerate(zip(firsts, counts)):
    ctas = [
      c
      for c in range(num_ctas)
      if max(bounds[c], before[b]) < min(bounds[c + 1], before[b + 1])
    ]
    assert count == len(ctas)
    if ctas:
      assert first == ctas[0] + b
      assert first + params.window(num_ctas) <= params.num_lists


# ---- A cache that is split over devices ----


def split_call(case, config=None, interpret=False):
  """One device's part of a call, of (q, k, v, index_q, index_k, scale)."""

  def call(q, k, v, index_q, index_k, scale):
    return decode.decode_attention(
      q, k, v, index_q, index_k,
      kv_lengths=jnp.array(case.lengths, jnp.int32),
      index_k_scale=scale,
      block_size=case.block_size,
      top_k=case.top_k,
      num_local_blocks=case.num_local,
      axis_name="context",
      config=config,
      interpret=interpret,
    )  # fmt: skip

  return call


def run_split(case, inputs, devices, config: Any = SMALL, interpret=True):
  """out in float32, and ids, the same on all devices.

  The devices are entries of a mapped axis and run one after another, because
  the interpreter has one memory for all devices of a process.
  """

  def cut(x):
    return x.reshape(x.shape[0], devices, -1, *x.shape[2:])

  q, k, v, index_q, index_k, scale = inputs
  k, v, index_k, scale = jax.tree.map(cut, (k, v, index_k, scale))
  call = jax.vmap(
    split_call(case, config, interpret),
    in_axes=(None, 1, 1, None, 1, 1),
    axis_name="context",
    axis_size=devices,
  )
  out, ids = jax.jit(call)(q, k, v, index_q, index_k, scale)
  assert out.dtype == q.dtype and out.shape[1:] == q.shape
  out, ids = np.asarray(out.astype(jnp.float32)), np.array(ids)
  for got in (out, ids):
    np.testing.assert_array_equal(got, np.broadcast_to(got[:1], got.shape))
  return out[0], ids[0]


def whole_ids(case, inputs):
  """The reference's choice of the whole cache."""
  _, ids = reference.decode_attention(
    *inputs[:5],
    kv_lengths=jnp.array(case.lengths, jnp.int32),
    index_k_scale=inputs[5],
    block_size=case.block_size,
    top_k=case.top_k,
    num_local_blocks=case.num_local,
    scale=1.0,
  )
  return ids


def negative_scores(inputs):
  """Inputs in which a block that does not exist would score highest."""
  q, k, v, index_q, index_k, scale = inputs
  return q, k, v, abs(index_q), -abs(index_k), scale


@pytest.mark.parametrize("devices, case", [
  # Three blocks on each device, which are no whole tiles. A row on both
  # devices, one that just fills the first, and an empty one.
  (2, Case(lengths=(300, 192, 0), capacity=384)),
  # Tokens on both sides of a border of devices.
  pytest.param(3, Case(lengths=(193, 577), capacity=576, tokens=3, fp8=True),
               marks=pytest.mark.slow),
  # No forced blocks; heads of their own.
  pytest.param(2, Case(lengths=(250, 384), capacity=384, tokens=2, num_local=0,
                       num_kv_heads=4, top_k=5, dtype="float16"),
               marks=pytest.mark.slow),
  # More blocks wanted than a device has, some of them forced, and than exist.
  pytest.param(3, Case(lengths=(200, 70), capacity=192, num_local=2, top_k=5),
               marks=pytest.mark.slow),
  # Nothing to choose by score, so nothing to exchange.
  pytest.param(2, Case(lengths=(210, 20), capacity=384, top_k=2, num_local=2),
               marks=pytest.mark.slow),
  # More lists than lanes.
  pytest.param(33, Case(lengths=(2000,), capacity=33 * 64),
               marks=pytest.mark.slow),
  # Heads that are padded inside.
  pytest.param(2, Case(lengths=(300, 192), capacity=384, head_dim=96,
                       index_dim=80),
               marks=pytest.mark.slow),
  # Long lists.
  pytest.param(2, Case(lengths=(1500,), capacity=1536, top_k=18,
                       num_heads=2, num_kv_heads=1),
               marks=pytest.mark.slow),
])  # fmt: skip
def test_a_split_cache_gives_what_it_gives_whole(devices, case):
  inputs = negative_scores(case.inputs())
  out, ids = run_split(case, inputs, devices)
  np.testing.assert_array_equal(ids, whole_ids(case, inputs))
  check_out(case, inputs, out, ids)


@pytest.mark.slow
def test_nan_of_one_device_stays_where_it_can_be_seen():
  case = Case(lengths=(300, 325), capacity=384)
  inputs = case.inputs()
  q, k, v, index_q, index_k, scale = inputs
  out, ids = run_split(case, inputs, 2)
  chosen = int(ids[0, 0, 0, 0]) * 64 + 5
  bad_k = k.at[0, chosen, 0, 2].set(jnp.nan)
  bad_v = v.at[1, 324, 1, 0].set(jnp.inf)
  got, same = run_split(case, (q, bad_k, bad_v, index_q, index_k, scale), 2)
  np.testing.assert_array_equal(same, ids)
  hit = np.zeros((2, 1, 4), bool)
  hit[0, 0, :2] = hit[1, 0, 2:] = True
  assert np.isnan(got[hit]).all()
  np.testing.assert_array_equal(got[~hit], out[~hit])


def test_so_many_devices_are_not_supported():
  case = Case(lengths=(300,), capacity=129 * 64)
  with pytest.raises(NotImplementedError, match="up to 128 devices, got 129"):
    run_split(case, case.inputs(), 129)


def params_of(case, config):
  return decode.KernelParams(
    batch=case.batch,
    tokens=case.tokens,
    num_kv_heads=case.num_kv_heads,
    group_size=case.num_heads // case.num_kv_heads,
    head_dim=case.head_dim,
    index_dim=case.index_dim,
    capacity=case.capacity,
    block_size=case.block_size,
    top_k=case.top_k,
    local_blocks=case.num_local,
    scale_log2=1.0,
    dtype=jnp.dtype(case.dtype),
    index_dtype=jnp.dtype(case.dtype),
    key_dtype=jnp.dtype(FP8 if case.fp8 else case.dtype),
    config=config,
    interpret=False,
  )


def test_nothing_to_attend_to():
  case = Case(lengths=(0,), capacity=0)
  q, k, v, index_q, index_k, _ = case.inputs()
  out, ids = decode.decode_attention(
    q, k, v, index_q, index_k, kv_lengths=jnp.zeros((1,), jnp.int32), top_k=3
  )
  assert (out == 0).all() and (ids == -1).all() and ids.shape == (1, 2, 1, 3)


@pytest.mark.parametrize(
  "change, text",
  [
    (dict(tokens=17), "query tokens up to 16, got 17"),
    (dict(num_heads=34), "up to 16, got 17"),
    (dict(block_size=32), "block_size in (64, 128), got 32"),
    (dict(top_k=65), "top_k up to 64, got 65"),
    (dict(dtype="float32"), "in (bfloat16, float16), got float32"),
    (
      dict(tokens=16, num_heads=32, num_kv_heads=32),
      "query tokens x KV heads up to 256, got 512",
    ),
  ],
)
def test_not_supported(change, text):
  case = dataclasses.replace(Case(), **change)
  inputs = case.inputs()
  with pytest.raises(NotImplementedError) as error:
    run(case, inputs, None)
  assert text in str(error.value)


def test_other_calls_that_are_not_supported():
  case = Case()
  q, k, v, index_q, index_k, _ = case.inputs()
  call = functools.partial(
    decode.decode_attention, q, k, v, index_q,
    kv_lengths=jnp.array(case.lengths), interpret=True, block_size=64,
  )  # fmt: skip
  with pytest.raises(NotImplementedError, match="with a scale each"):
    call(index_k.astype(FP8))
  with pytest.raises(NotImplementedError, match="with scales"):
    call(index_k, index_k_scale=jnp.ones((2, 328)))
  with pytest.raises(NotImplementedError, match="scale > 0, got -1"):
    call(index_k, scale=-1.0)
  with pytest.raises(NotImplementedError, match="capacity x KV heads"):
    mosaic.check_decode_supported(
      tokens=1, num_kv_heads=4, cache_rows=1 << 31, index_dim=64,
      top_k=16,
    )  # fmt: skip
  with pytest.raises(ValueError, match="stages must be even, got 3"):
    decode.Config(stages=3)


# ---- Lowering ----

PAPER = Case(
  num_heads=64, num_kv_heads=4, head_dim=128, index_dim=128, block_size=128,
  top_k=16,
)  # fmt: skip


def structs(case):
  """Shapes of q, k, v, index_q, index_k and the scales or None."""

  def struct(*shape, dtype=case.dtype):
    return jax.ShapeDtypeStruct(shape, dtype)

  b, c, t, kv = case.batch, case.capacity, case.tokens, case.num_kv_heads
  cache = struct(b, c, kv, case.head_dim)
  return (
    struct(b, t, case.num_heads, case.head_dim),
    cache,
    cache,
    struct(b, t, kv, case.index_dim),
    struct(b, c, case.index_dim, dtype=FP8 if case.fp8 else case.dtype),
    struct(b, c, dtype=jnp.float32) if case.fp8 else None,
  )


def lower(case, config=None):
  def call(q, k, v, index_q, index_k, scale, lengths):
    return decode.decode_attention(
      q, k, v, index_q, index_k,
      kv_lengths=lengths,
      index_k_scale=scale,
      block_size=case.block_size,
      top_k=case.top_k,
      num_local_blocks=case.num_local,
      config=config,
    )  # fmt: skip

  lowered = (
    jax.jit(call)
    .trace(*structs(case), jax.ShapeDtypeStruct((case.batch,), jnp.int32))
    .lower(lowering_platforms=("cuda",))
  )
  return lowered.as_text().count("mosaic_gpu_v2")


@pytest.mark.parametrize("batch, capacity, fp8", [
  # A split cache, below, is as long, and odd shapes have e4m3 keys.
  pytest.param(1, 1 << 20, False, marks=pytest.mark.slow),
  pytest.param(8, 1 << 17, True, marks=pytest.mark.slow),
  pytest.param(32, 1 << 15, False, marks=pytest.mark.slow),
])  # fmt: skip
def test_lowers_for_cuda(batch, capacity, fp8):
  case = dataclasses.replace(
    PAPER, lengths=(1,) * batch, capacity=capacity, fp8=fp8
  )
  assert lower(case) == 2


def test_lowers_odd_shapes():
  case = Case(
    lengths=(1,) * 40, capacity=1001, tokens=16, num_heads=16,
    num_kv_heads=16, top_k=4, num_local=0, fp8=True, dtype="float16",
  )  # fmt: skip
  assert lower(case) == 2
  # More splits than multiprocessors, merged by a launch of its own; nothing to
  # choose by score.
  case = dataclasses.replace(
    PAPER, lengths=(1,) * 3, capacity=4096, num_local=16
  )
  assert lower(case, decode.Config(step_keys=64, splits=32)) == 2


AUTO = (jax.sharding.AxisType.Auto,)
SLOTS = jax.P(None, "context")
SPLIT_SPECS = (jax.P(), SLOTS, SLOTS, jax.P(), SLOTS, SLOTS)


@pytest.mark.parametrize("heads, fp8, num_local, kernels", [
  ((64, 4), False, 1, 3),
  pytest.param((32, 8), True, 0, 3, marks=pytest.mark.slow),
  # Every block is forced.
  pytest.param((32, 8), False, 16, 1, marks=pytest.mark.slow),
])  # fmt: skip
def test_lowers_a_split_cache_for_cuda(heads, fp8, num_local, kernels):
  case = dataclasses.replace(
    PAPER, lengths=(1 << 20, 5), capacity=1 << 20, fp8=fp8,
    num_heads=heads[0], num_kv_heads=heads[1], num_local=num_local,
  )  # fmt: skip
  # The devices' results need no check_vma=False: out is the same on all.
  mapped = jax.shard_map(
    lambda *args: split_call(case)(*args)[0],
    mesh=jax.sharding.AbstractMesh((2,), ("context",), axis_types=AUTO),
    in_specs=SPLIT_SPECS,
    out_specs=jax.P(),
  )
  lowered = jax.jit(mapped).trace(*structs(case))
  text = lowered.lower(lowering_platforms=("cuda",)).as_text()
  assert text.count("mosaic_gpu_v2") == kernels
  # Candidates and partial results.
  assert text.count("stablehlo.all_gather") == (1 if kernels == 1 else 2)


# ---- On the GPU ----

LONG = dict(capacity=40_000, num_heads=64, num_kv_heads=4, top_k=16)
GPU_SHAPES = [
  dict(lengths=(40_000,), **LONG),
  dict(lengths=(39_999, 1, 0, 20_000, 77), tokens=5, **LONG),
  dict(lengths=(3_001, 2_000), capacity=3_001, tokens=16, num_heads=32,
       num_kv_heads=8, top_k=32),
  dict(lengths=(700,) * 70, capacity=1_024, num_heads=8, num_kv_heads=8,
       top_k=4, num_local=0),
  dict(lengths=(20_000, 300), capacity=20_000, num_heads=14, num_kv_heads=2,
       top_k=64),
]  # fmt: skip


def gpu_cases(seconds, long):
  """(shape, block size, second) of all; but only `long` (block size, second)
  with a list of 64 blocks, whose program takes two minutes to compile."""
  short = range(len(GPU_SHAPES) - 1)
  cases = list(itertools.product(short, (64, 128), seconds))
  return [*cases, (len(short), *long)]


def half_of_gpu_cases(seconds, long):
  """Those in which every two values of different arguments meet."""
  *cases, last = gpu_cases(range(2), long)
  cases = [x for x in cases if (x[0] + x[1] // 64 + x[2]) % 2]
  return [*((*x, seconds[i]) for *x, i in cases), last]


@pytest.mark.gpu
@pytest.mark.parametrize(
  "shape, block_size, fp8", gpu_cases((False, True), long=(64, False))
)
def test_gpu_matrix(hopper, shape, block_size, fp8):
  # Every shape and block size meets both dims, each with both kinds of keys.
  dim = 64 if (shape + (block_size == 64) + fp8) % 2 else 128
  case = Case(
    head_dim=dim, index_dim=192 - dim if fp8 else dim, fp8=fp8,
    block_size=block_size, dtype="float16" if dim == 64 else "bfloat16",
    **GPU_SHAPES[shape],
  )  # fmt: skip
  run_and_check(case, config=None, interpret=False)


@pytest.mark.gpu
@pytest.mark.parametrize(
  "shape, block_size, splits", half_of_gpu_cases((3, 0), long=(128, 3))
)
def test_gpu_d256(hopper, shape, block_size, splits):
  case = Case(
    head_dim=256, index_dim=128, fp8=shape % 2 == 1, block_size=block_size,
    dtype="bfloat16" if shape % 3 else "float16", **GPU_SHAPES[shape],
  )  # fmt: skip
  config = decode.Config(step_keys=128, splits=splits) if splits else None
  run_and_check(case, config=config, interpret=False)


@pytest.mark.gpu
@pytest.mark.parametrize(
  "shape, block_size, fp8", half_of_gpu_cases((False, True), long=(128, True))
)
def test_gpu_padded_heads(hopper, shape, block_size, fp8):
  dims = ((96, 96), (80, 80), (40, 48), (136, 112), (8, 16))
  head_dim, index_dim = dims[shape]
  case = Case(
    head_dim=head_dim, index_dim=index_dim, fp8=fp8, block_size=block_size,
    dtype="bfloat16" if shape % 2 else "float16", **GPU_SHAPES[shape],
  )  # fmt: skip
  run_and_check(case, config=None, interpret=False)


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", [False, True])
def test_gpu_configs(hopper, fp8):
  case = dataclasses.replace(
    PAPER, lengths=(40_000, 17_003), capacity=40_000, fp8=fp8
  )
  for config in CONFIGS:
    run_and_check(case, config=config, interpret=False)


SPLIT_SHAPES = [
  dict(lengths=(81_920, 20_000, 40_961, 0), num_heads=64, num_kv_heads=4),
  dict(lengths=(40_961, 300), num_heads=32, num_kv_heads=8, tokens=5),
  # Half a tile of two devices' index keys does not exist.
  dict(lengths=(63_000,), capacity=64_640, block_size=64, num_heads=8,
       num_kv_heads=2, tokens=16, top_k=40),
  dict(lengths=(9_000,) * 40, capacity=10_240, num_heads=16, num_kv_heads=2),
]  # fmt: skip


def split_case(shape, fp8):
  """The case, its inputs, and the choice of one GPU that holds the cache."""
  case = Case(
    **dict(capacity=81_920, head_dim=128, index_dim=128, block_size=128,
           top_k=16, fp8=fp8) | SPLIT_SHAPES[shape]
  )  # fmt: skip
  inputs = negative_scores(case.inputs())
  return case, inputs, run(case, inputs, config=None, interpret=False)[1]


@pytest.mark.gpu
@pytest.mark.parametrize(
  "shape, fp8",
  # A list of 40 blocks takes two minutes to compile.
  [x for x in itertools.product(range(4), (False, True)) if x != (2, True)],
)
def test_gpu_runs_the_parts_of_a_split_cache(hopper, shape, fp8):
  """The parts of two devices, or of five, on one GPU."""
  case, inputs, whole = split_case(shape, fp8)
  devices = (2, 5)[(shape + fp8) % 2]
  out, ids = run_split(case, inputs, devices, config=None, interpret=False)
  np.testing.assert_array_equal(ids, whole)
  check_out(case, inputs, out, ids)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [0, 1])
@pytest.mark.parametrize("fp8", [False, True])
def test_two_gpus_share_a_cache(two_gpus, shape, fp8):
  """The ids of one GPU; two runs with the same bits."""
  case, inputs, whole = split_case(shape, fp8)
  mesh = jax.make_mesh((2,), ("context",), axis_types=AUTO, devices=two_gpus)
  call = jax.jit(
    jax.shard_map(
      split_call(case), mesh=mesh, in_specs=SPLIT_SPECS, out_specs=jax.P(),
      check_vma=False,
    )
  )  # fmt: skip
  held = [
    x if x is None else jax.device_put(x, jax.NamedSharding(mesh, spec))
    for x, spec in zip(inputs, SPLIT_SPECS)
  ]
  first, second = call(*held), call(*held)
  for a, b in zip(first, second):
    parts = [np.asarray(x.data) for y in (a, b) for x in y.addressable_shards]
    for part in parts:
      assert part.tobytes() == parts[0].tobytes()
  out, ids = first
  np.testing.assert_array_equal(ids, whole)
  check_out(case, inputs, np.asarray(out.astype(jnp.float32)), np.array(ids))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gpu_reference_scores_are_those_of_the_codes(hopper, dtype):
  """XLA may leave out a cast to e4m3 and back, but not the rounding."""
  case = dataclasses.replace(
    PAPER, lengths=(1280, 900), capacity=1280, fp8=True, dtype=dtype, tokens=10
  )
  *_, index_q, index_k, scale = case.inputs()
  got = jax.jit(reference.decode_scores)(index_q, index_k, scale)
  codes, q_scale = reference.fp8_codes(index_q)
  q, k = (
    np.float64(x.astype(jnp.float32)) * np.float64(y)[..., None]
    for x, y in ((codes, q_scale), (index_k, scale))
  )
  want = np.einsum("btki,bsi->bkts", q, k)
  # Unused slots hold NaN.
  np.testing.assert_allclose(got, want, atol=1e-5 * np.nanmax(np.abs(want)))
