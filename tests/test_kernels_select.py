"""Selection kernel: interpreted at small shapes, lowered at the paper's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from op_contract import EXACT, FAST, FP8, check_choice

from benchmarks import cases
from msa_jax import reference, selection_stats
from pallas_kernels import select_blocks as sb

SMALL = sb.Config(warpgroup_rows=64, stages=2)
# Lowered, and run on a GPU.
CONFIGS = (
  sb.Config(),
  sb.Config(stages=3),
  sb.Config(warpgroup_rows=64),
  sb.Config(warpgroup_rows=64, step_keys=256, stages=2),
)


def make(seed, b, t, s, k, i, dtype="bfloat16"):
  q_key, k_key = jax.random.split(jax.random.key(seed))
  return (
    jax.random.normal(q_key, (b, t, k, i), dtype),
    jax.random.normal(k_key, (b, s, i), dtype),
  )


# One for all tests: what differs in numbers only is compiled once.
select = jax.jit(
  sb.select_blocks,
  static_argnames=(
    *("block_size", "top_k", "num_local_blocks", "score_precision"),
    *("config", "interpret"),
  ),
)

quantise_keys = jax.jit(sb.quantise_keys, static_argnums=1)
quantise_queries = jax.jit(sb.quantise_queries)


def run_and_check(
  index_q,
  index_k,
  *,
  block_size=64,
  top_k=3,
  num_local=1,
  kv_lengths=None,
  precision="exact",
  config=SMALL,
  interpret=True,
):
  lengths = None if kv_lengths is None else jnp.array(kv_lengths, jnp.int32)
  call = functools.partial(
    select,
    index_q,
    index_k,
    block_size=block_size,
    top_k=top_k,
    num_local_blocks=num_local,
    kv_lengths=lengths,
    score_precision=precision,
    config=config,
    interpret=interpret,
  )
  ids = np.array(call())
  np.testing.assert_array_equal(ids, call())
  # An infinite entry counts as NaN.
  index_q, index_k = (
    jnp.where(jnp.isfinite(x), x, jnp.nan) for x in (index_q, index_k)
  )
  if precision == "fp8":
    pad = -index_k.shape[1] % block_size
    padded = jnp.pad(index_k, ((0, 0), (0, pad), (0, 0)))
    if lengths is None:
      lengths = jnp.full((index_k.shape[0],), index_k.shape[1], jnp.int32)
    index_k, scale = quantise_keys(padded, block_size, lengths)
    index_k = (
      index_k.astype(jnp.float32) * jnp.repeat(scale, block_size, 1)[..., None]
    )
    index_k = index_k[:, : index_k.shape[1] - pad]
    index_q = quantise_queries(index_q)
  check_choice(
    index_q,
    index_k,
    ids,
    block_size=block_size,
    top_k=top_k,
    num_local=num_local,
    kv_lengths=kv_lengths,
    margin=dict(exact=EXACT, fast=FAST, fp8=FP8)[precision],
  )
  return ids


@pytest.mark.parametrize("precision", ["exact", "fast", "fp8"])
def test_ragged_and_grouped(precision):
  index_q, index_k = make(0, 1, 60, 520, 3, 64)
  ids = run_and_check(index_q, index_k, precision=precision)
  if precision == "exact":
    want = reference.select_blocks(
      index_q,
      index_k,
      block_size=64,
      top_k=3,
      num_local_blocks=1,
      kv_lengths=None,
      score_precision="exact",
    )
    np.testing.assert_array_equal(ids, want)


@pytest.mark.parametrize(
  "num_local, block_size, precision",
  [(0, 64, "exact"), (2, 128, "exact"), (0, 128, "fp8"), (2, 64, "fast")],
)
def test_batch_lengths_and_empty_rows(num_local, block_size, precision):
  # 30 keys for 60 queries: the first 30 rows of entry 1 see nothing. What lies
  # beyond the lengths must not matter.
  index_q, index_k = make(1, 2, 60, 400, 2, 64)
  index_k = index_k.at[0, 250:].set(jnp.nan).at[1, 30:].set(1e30)
  ids = run_and_check(
    index_q,
    index_k,
    block_size=block_size,
    num_local=num_local,
    kv_lengths=[250, 30],
    precision=precision,
  )
  assert (ids[1, :, :30] == -1).all()
  assert (ids[1, :, 30:, 0] == 0).all()


@pytest.mark.parametrize("precision", ["exact", "fast", "fp8"])
def test_ties_go_to_the_lower_id(precision):
  index_q, index_k = make(2, 1, 8, 448, 1, 64)
  index_k = jnp.zeros_like(index_k)
  ids = run_and_check(index_q, index_k, precision=precision)
  np.testing.assert_array_equal(ids[0, 0], np.tile([0, 1, 6], (8, 1)))
  # The best blocks come last and are all equal: earlier ones must give way in
  # order, later equals must not.
  index_q = jnp.ones_like(index_q)
  level = jnp.array([1, 2, 2, 3, 2, 3, 0])
  index_k = jnp.repeat(level, 64)[None, :, None] * jnp.ones_like(index_k)
  ids = run_and_check(index_q, index_k, top_k=4, precision=precision)
  np.testing.assert_array_equal(ids[0, 0], np.tile([1, 3, 5, 6], (8, 1)))


@pytest.mark.parametrize("precision", ["exact", "fast", "fp8"])
def test_nan_stays_where_it_is(precision):
  index_q, index_k = make(3, 1, 8, 448, 2, 64)
  clean = run_and_check(index_q, index_k, precision=precision)
  index_k = index_k.at[0, 70, 3].set(jnp.nan)
  index_q = index_q.at[0, 5, 1, 0].set(jnp.nan)
  ids = run_and_check(index_q, index_k, precision=precision)
  assert (ids != 1).all()
  np.testing.assert_array_equal(ids[0, 1, 5], [6, -1, -1])
  untouched = (clean != 1).all(-1)
  untouched[0, 1, 5] = False
  assert untouched.any()
  np.testing.assert_array_equal(ids[untouched], clean[untouched])


@pytest.mark.parametrize("precision", ["exact", "fast", "fp8"])
def test_an_infinity_counts_as_nan(precision):
  index_q, index_k = make(3, 1, 8, 448, 2, 64)
  # Of either sign: the score of a key that points away would be -inf, and lose
  # against the rest of its block.
  index_k = index_k.at[0, 70, 3].set(jnp.inf).at[0, 130, 4].set(-jnp.inf)
  index_q = index_q.at[0, 5, 1, 0].set(jnp.inf).at[0, 2, 0, 9].set(-jnp.inf)
  ids = run_and_check(index_q, index_k, precision=precision)
  assert not np.isin(ids, [1, 2]).any()
  np.testing.assert_array_equal(ids[0, 1, 5], [6, -1, -1])
  np.testing.assert_array_equal(ids[0, 0, 2], [6, -1, -1])
  assert (ids >= 0).sum() == 3 * 16 - 4
  if precision == "exact":
    want = reference.select_blocks(
      index_q, index_k, block_size=64, top_k=3, num_local_blocks=1,
      kv_lengths=None, score_precision="exact",
    )  # fmt: skip
    np.testing.assert_array_equal(ids, want)


def test_forced_block_is_kept_when_nan():
  index_q, index_k = make(4, 1, 8, 448, 1, 64)
  index_k = index_k.at[0, 400:].set(jnp.nan)
  ids = run_and_check(index_q, index_k, num_local=2)
  assert (ids[0, 0, :, 1:] == np.array([5, 6])).all()


def test_tiles_larger_than_the_default():
  index_q, index_k = make(5, 1, 300, 300, 1, 64)
  run_and_check(index_q, index_k, config=sb.Config(stages=3))
  wide = sb.Config(warpgroup_rows=64, step_keys=256, stages=2)
  run_and_check(index_q, index_k, config=wide, num_local=0)


@pytest.mark.parametrize("kv_lengths", [None, [200, 20]])
def test_all_forced_needs_no_kernel(kv_lengths):
  index_q, index_k = make(6, 2, 40, 300, 2, 64)
  run_and_check(
    index_q,
    index_k,
    top_k=3,
    num_local=3,
    kv_lengths=kv_lengths,
    interpret=False,
  )


def test_fewer_blocks_than_top_k():
  index_q, index_k = make(7, 1, 150, 150, 1, 64)
  run_and_check(index_q, index_k, top_k=16)


def test_no_gradient():
  index_q, index_k = make(8, 1, 8, 200, 1, 64, "float32")

  def loss(q, k):
    ids = sb.select_blocks(
      q.astype("bfloat16"),
      k.astype("bfloat16"),
      block_size=64,
      top_k=2,
      config=SMALL,
      interpret=True,
    )
    return jnp.sum(q) * jnp.sum(ids)

  dq, dk = jax.grad(loss, argnums=(0, 1))(index_q, index_k)
  assert (dq == dq[0, 0, 0, 0]).all() and (dk == 0).all()


@pytest.mark.parametrize("length", [1, 2, 5, 16, 23, 32])
def test_sort_network(length):
  rng = np.random.default_rng(length)
  x = rng.integers(0, 2, (length, 4096))
  for a, b in sb.sort_network(length):
    x[a], x[b] = np.minimum(x[a], x[b]), np.maximum(x[a], x[b])
  assert (np.diff(x, axis=0) >= 0).all()


def test_fp8_scales():
  key = jax.random.key(9)
  index_k = jax.random.normal(key, (1, 256, 64)) * 2.0 ** jnp.arange(
    -20, 236
  ).reshape(1, 256, 1).clip(-20, 20)
  lengths = jnp.array([200], jnp.int32)
  index_k = index_k.at[0, 230].set(jnp.nan).at[0, 10, 1].set(jnp.nan)
  quantised, scale = quantise_keys(index_k, 64, lengths)
  back = quantised.astype(jnp.float32) * jnp.repeat(scale, 64, 1)[..., None]
  back, want = np.asarray(back[0]), np.asarray(index_k[0])
  # e4m3 keeps 3 mantissa bits of what is within 2^-14 of the block's largest.
  largest = np.repeat(
    np.abs(np.where(np.isfinite(want), want, 0)).reshape(4, -1).max(1), 64
  )[:, None]
  normal = np.isfinite(want) & (np.abs(want) > largest * 2.0**-13)
  normal[192:] = False
  assert normal.sum() > 5000
  error = np.abs(back - want)[normal]
  assert (error <= np.abs(want)[normal] * 2.0**-4).all()
  # A NaN does not spoil its block.
  assert np.isnan(back[:64]).sum() == 1 and np.isnan(back[10, 1])
  # A slot beyond the length has no part in the scale of its block.
  again = quantise_keys(index_k.at[0, 200:].set(1e30), 64, lengths)
  np.testing.assert_array_equal(scale, again[1])

  q = jax.random.normal(key, (1, 4, 2, 64)).at[0, 1, 0, 0].set(jnp.nan)
  q = q.at[0, 2].set(0)
  q8 = np.asarray(quantise_queries(q).astype(jnp.float32))
  assert np.isnan(q8).sum() == 1 and (q8[0, 2] == 0).all()


@pytest.mark.parametrize(
  "change, text",
  [
    (dict(dtype="float32"), "dtype in (bfloat16, float16), got float32"),
    (dict(i=12), "index_dim of multiples of 8 up to 128, got 12"),
    (dict(i=136), "index_dim of multiples of 8 up to 128, got 136"),
    (dict(block_size=32), "block_size in (64, 128), got 32"),
    (dict(top_k=65), "top_k up to 64, got 65"),
  ],
)
def test_not_supported(change, text):
  shape = dict(i=64, dtype="bfloat16", block_size=64, top_k=2) | change
  index_q, index_k = make(0, 1, 8, 256, 1, shape["i"], shape["dtype"])
  with pytest.raises(NotImplementedError) as error:
    sb.select_blocks(
      index_q,
      index_k,
      block_size=shape["block_size"],
      top_k=shape["top_k"],
    )
  assert text in str(error.value)


def test_not_so_many_choices():
  shapes = ((2, 1 << 20, 32, 64), (2, 1 << 20, 64))
  with pytest.raises(NotImplementedError, match="got 2147483648"):
    jax.eval_shape(
      functools.partial(sb.select_blocks, top_k=32),
      *(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes),
    )


def lower(case, kv_lengths=False, **kwargs):
  q = jax.ShapeDtypeStruct(
    (case.batch, case.tokens, case.num_kv_heads, case.index_dim), case.dtype
  )
  k = jax.ShapeDtypeStruct(
    (case.batch, case.kv_tokens, case.index_dim), case.dtype
  )
  lengths = jax.ShapeDtypeStruct((case.batch,), jnp.int32)

  def select(q, k, lengths):
    return sb.select_blocks(
      q,
      k,
      block_size=case.block_size,
      top_k=case.top_k,
      kv_lengths=lengths if kv_lengths else None,
      **kwargs,
    )

  lowered = (
    jax.jit(select).trace(q, k, lengths).lower(lowering_platforms=("cuda",))
  )
  assert "mosaic_gpu" in lowered.as_text()


@pytest.mark.parametrize(
  "name",
  [
    # Kernels of other lengths differ in numbers only.
    pytest.param(
      name,
      marks=[pytest.mark.slow] * (name not in ("8k", "1m", "small_heads_32k")),
    )
    for name in cases.CASES
  ],
)
def test_lowers_for_cuda(name):
  lower(cases.CASES[name])


@pytest.mark.parametrize("precision", ["fast", "fp8"])
def test_lowers_other_precisions(precision):
  lower(cases.PAPER["1m"], score_precision=precision)
  # More blocks than a packed key can name: ranked exactly.
  many = cases.Case(tokens=1 << 20, block_size=64, index_dim=64)
  lower(many, score_precision=precision)


def test_lowers_ragged_batches():
  case = cases.Case(
    tokens=1000, kv_tokens=5001, batch=3, num_kv_heads=3, top_k=32
  )
  lower(case, kv_lengths=True, num_local_blocks=0)
  lower(
    cases.Case(tokens=77, kv_tokens=9999, dtype="float16", block_size=64),
    num_local_blocks=5,
  )


def test_configs_hold_the_defaults():
  assert {sb.heuristic_config(1), sb.heuristic_config(1 << 20)} <= set(CONFIGS)


# The defaults are lowered above, and other tiles interpreted.
@pytest.mark.slow
def test_configs_lower():
  case = cases.PAPER["128k"]
  for config in CONFIGS:
    lower(case, config=config)
  # The one with the largest tiles of keys.
  lower(case, score_precision="fp8", config=CONFIGS[-1])


def test_generators():
  case = cases.Case(tokens=2048, num_kv_heads=1)
  union = {}
  for selection in cases.SELECTIONS:
    index_q, index_k = cases.index_inputs(jax.random.key(0), case, selection)
    assert index_q.shape == (1, 2048, 1, 128) and index_q.dtype == jnp.bfloat16
    assert jnp.isfinite(index_q).all() and jnp.isfinite(index_k).all()
    ids = reference.select_blocks(
      index_q[:, -512:],
      index_k,
      block_size=128,
      top_k=6,
      num_local_blocks=1,
      kv_lengths=None,
      score_precision="exact",
    )
    union[selection] = selection_stats.union8(ids)
    if selection == "trained_like":
      assert (ids[..., 0] == 0).all()
  assert union["trained_like"] < 0.9 * union["random"]
  with pytest.raises(ValueError, match="selection must be one of"):
    cases.index_inputs(jax.random.key(0), case, "nothing")


def test_union8_and_recall():
  ids = jnp.tile(jnp.array([[0, 2, -1], [0, 3, 5]]), (1, 1, 4, 1))
  assert selection_stats.union8(ids) == 4
  got = jnp.array([0, 2, 7, -1])
  want = jnp.array([0, 7, 9, -1])
  assert selection_stats.recall(got, want) == pytest.approx(2 / 3)


GPU_SHAPES = [
  # b, t, s, k, top_k, num_local, kv_lengths
  (1, 2048, 2048, 4, 16, 1, None),
  (2, 500, 3001, 3, 32, 0, (2900, 300)),
  (3, 257, 1500, 1, 7, 3, None),
]


@pytest.mark.gpu
@pytest.mark.parametrize("precision, top_k, index_dim", [
  ("exact", 64, 128), ("exact", 40, 80), ("fast", 64, 64), ("fp8", 33, 112),
])  # fmt: skip
def test_gpu_long_lists_and_padded_heads(hopper, precision, top_k, index_dim):
  index_q, index_k = make(13, 1, 300, 6000, 2, index_dim)
  run_and_check(
    index_q, index_k, top_k=top_k, precision=precision, config=None,
    interpret=False,
  )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("index_dim", [64, 128])
@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("precision", ["exact", "fast", "fp8"])
def test_gpu_matrix(hopper, index_dim, block_size, dtype, precision):
  # Every setting with one of the shapes, in turn.
  turn = (index_dim // 128) + 2 * (block_size // 128) + (dtype == "float16")
  b, t, s, k, top_k, num_local, kv_lengths = GPU_SHAPES[turn % 3]
  index_q, index_k = make(10, b, t, s, k, index_dim, dtype)
  run_and_check(
    index_q,
    index_k,
    block_size=block_size,
    top_k=top_k,
    num_local=num_local,
    kv_lengths=kv_lengths,
    precision=precision,
    config=None,
    interpret=False,
  )


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["exact", "fp8"])
def test_gpu_configs(hopper, precision):
  index_q, index_k = make(11, 1, 700, 3000, 4, 128)
  for config in CONFIGS:
    run_and_check(
      index_q,
      index_k,
      top_k=16,
      config=config,
      precision=precision,
      interpret=False,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["exact", "fast", "fp8"])
def test_gpu_ties_and_nan(hopper, precision):
  run = functools.partial(
    run_and_check, config=None, interpret=False, precision=precision, top_k=16
  )
  index_q, index_k = make(12, 1, 512, 4000, 4, 128)
  ids = run(index_q, jnp.zeros_like(index_k))
  assert (ids[..., :15] == np.arange(15)).all()
  index_k = index_k.at[0, 70, 3].set(jnp.nan)
  index_q = index_q.at[0, 5, 1, 0].set(jnp.nan)
  ids = run(index_q, index_k)
  assert (ids != 1).all()
  assert (ids[0, 1, 5, 1:] == -1).all()
  index_k = index_k.at[0, 70, 3].set(jnp.inf).at[0, 130, 4].set(-jnp.inf)
  index_q = index_q.at[0, 5, 1, 0].set(-jnp.inf)
  ids = run(index_q, index_k)
  assert not np.isin(ids, [1, 2]).any()
  assert (ids[0, 1, 5, 1:] == -1).all()


@pytest.mark.gpu
@pytest.mark.gpu_memory
@pytest.mark.parametrize("name", ["32k", "small_heads_32k"])
@pytest.mark.parametrize("selection", cases.SELECTIONS)
def test_gpu_recall_and_union(hopper, selection, name):
  case = cases.CASES[name]
  index_q, index_k = cases.index_inputs(jax.random.key(1), case, selection)
  select = functools.partial(
    sb.select_blocks, index_q, index_k, block_size=case.block_size
  )
  exact = select()
  if selection == "trained_like":
    assert 24 <= selection_stats.union8(exact) <= 26
  # The last queries: the early ones choose every block they see.
  exact = exact[:, :, -4096:]
  for precision, floor in (("fast", 0.999), ("fp8", 0.9)):
    ids = select(score_precision=precision)
    assert selection_stats.recall(ids[:, :, -4096:], exact) >= floor
