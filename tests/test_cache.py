"""The cache, attention over it, and models that read through it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import Case, loop_select, run_on_devices
from test_modules import CONFIG, INDEX, build

import msa_jax
from msa_jax import attention, generate, reference, xla
from msa_jax import cache as cache_lib

IMPLEMENTATIONS = ("reference", "xla")


# --- decode_attention ---------------------------------------------------------

# q_len 1 to 16; rows that are full, end inside a block, hold fewer tokens than
# there are queries, or nothing; capacities that are no multiple of a block.
CASES = {
  "one": Case(batch=3, q_len=1, kv_len=32, kv_lengths=(32, 17, 16)),
  "several": Case(batch=4, q_len=5, kv_len=37, kv_lengths=(37, 12, 3, 0)),
  "sixteen": Case(
    batch=2,
    q_len=16,
    kv_len=51,
    num_heads=6,
    num_kv_heads=3,
    block_size=8,
    num_local_blocks=2,
    kv_lengths=(50, 23),
  ),
  "few_blocks": Case(
    q_len=3, kv_len=10, top_k=9, num_local_blocks=0, kv_lengths=(9,)
  ),
  "less_than_a_block": Case(q_len=2, kv_len=6, block_size=8, kv_lengths=(5,)),
}


def operands(case, fp8, seed=0, dtype=jnp.float32):
  q, k, v, index_q, index_k = case.inputs(seed, dtype)
  codes, scale = reference.fp8_codes(index_k) if fp8 else (index_k, None)
  return (q, k, v, index_q, codes), scale, index_k


def decode(case, args, scale, implementation):
  return msa_jax.decode_attention(
    *args,
    index_k_scale=scale,
    **case.select_options(),
    implementation=implementation,
  )


@pytest.mark.parametrize(
  "name, fp8",
  [*((name, False) for name in CASES), ("several", True), ("sixteen", True)],
)
def test_decode_is_msa_attention_with_room(name, fp8):
  case = CASES[name]
  args, scale, index_k = operands(case, fp8)
  want = msa_jax.msa_attention(
    *args[:4],
    index_k,
    **case.select_options(),
    score_precision="fp8" if fp8 else "exact",
    implementation="reference",
  )
  if not fp8:
    loops = loop_select(case, *args[3:])
    np.testing.assert_array_equal(want.block_indices, loops)
  for implementation in IMPLEMENTATIONS:
    got = decode(case, args, scale, implementation)
    np.testing.assert_array_equal(got.block_indices, want.block_indices)
    np.testing.assert_allclose(got.out, want.out, atol=2e-6)
    assert np.all(np.asarray(got.out)[case.positions() < 0] == 0)


def unused(case):
  return np.arange(case.kv_len) >= np.asarray(case.kv_lengths)[:, None]


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_unused_slots_hold_changes_nothing(implementation, fp8):
  case = CASES["several"]
  (q, k, v, index_q, index_k), scale, _ = operands(case, fp8)
  slots = unused(case)

  def poison(x):
    mask = slots.reshape(*slots.shape, *(1,) * (x.ndim - 2))
    return jnp.where(mask, jnp.asarray(jnp.nan, x.dtype), x)

  dirty = (q, poison(k), poison(v), index_q, poison(index_k))
  assert np.isnan(np.asarray(dirty[4], np.float32)).any()
  dirty_scale = poison(scale) if fp8 else None
  want = decode(case, (q, k, v, index_q, index_k), scale, implementation)
  got = decode(case, dirty, dirty_scale, implementation)
  for a, b in zip(want, got):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nan_reaches_the_rows_that_see_it_and_no_others(implementation):
  case = dataclasses.replace(CASES["several"], kv_lengths=(37, 12, 30, 20))
  args, _, _ = operands(case, False)
  want = decode(case, args, None, implementation)
  for place in ("k", "v"):
    q, k, v, index_q, index_k = args
    # Token 34 of row 0 is that of query 2, in the own block of query 3.
    dirty = dict(k=k, v=v)
    dirty[place] = dirty[place].at[0, 34, 1].set(jnp.nan)
    got = decode(
      case, (q, *dirty.values(), index_q, index_k), None, implementation
    )
    np.testing.assert_array_equal(got.block_indices, want.block_indices)
    bad = np.isnan(np.asarray(got.out))
    sees = np.zeros_like(bad)
    sees[0, 2:4, 2:] = True
    sees[0, 4, 2:] = 8 in want.block_indices[0, 1, 4]
    np.testing.assert_array_equal(bad, sees)
    np.testing.assert_array_equal(
      np.asarray(got.out)[~bad], np.asarray(want.out)[~bad]
    )
  # A block whose score is NaN is out, unless it is forced.
  index_k = args[4].at[0, 5].set(jnp.nan)
  got = decode(case, (*args[:4], index_k), None, implementation)
  assert not np.any(np.asarray(got.block_indices)[0] == 1)
  assert not np.isnan(np.asarray(got.out)).any()


@pytest.mark.parametrize("fp8", [False, True])
def test_equal_scores_go_to_the_lower_block(fp8):
  case = CASES["one"]
  (q, k, v, index_q, index_k), scale, _ = operands(case, fp8)
  zeros = jnp.zeros_like(index_k)
  for implementation in IMPLEMENTATIONS:
    got = decode(case, (q, k, v, index_q, zeros), scale, implementation)
    np.testing.assert_array_equal(
      got.block_indices[:, 0, 0], [[0, 1, 7], [0, 1, 4], [0, 1, 3]]
    )


@pytest.mark.parametrize(
  "capacity", [37, *(pytest.param(n, marks=pytest.mark.slow) for n in (39, 40))]
)
def test_index_keys_are_read_in_chunks(capacity, monkeypatch):
  """Several chunks of keys, the last one overlapping, and one of queries."""
  case = Case(batch=2, q_len=3, kv_len=capacity, kv_lengths=(capacity, 18))
  args, scale, _ = operands(case, True)
  want = decode(case, args, scale, "reference")
  monkeypatch.setattr(xla, "_chunk_elements", lambda: 2 * 2 * 3 * 16)
  options = dict(case.select_options(), scale=case.head_dim**-0.5)
  out, blocks = jax.jit(
    functools.partial(
      xla.decode_attention.__wrapped__,  # so that the limit is read again
      index_k_scale=scale,
      **options,
    )
  )(*args)
  np.testing.assert_array_equal(blocks, want.block_indices)
  np.testing.assert_allclose(out, want.out, atol=2e-6)


def test_xla_decodes_in_little_memory():
  """It gathers chosen blocks: nothing of the keys' size is made."""
  case = Case(batch=2, q_len=4, kv_len=1 << 14, head_dim=64, kv_lengths=(9, 9))
  shapes = [
    jax.ShapeDtypeStruct(x.shape, jnp.bfloat16)
    for x in jax.eval_shape(case.inputs)
  ]
  step = jax.jit(
    functools.partial(
      msa_jax.decode_attention, **case.select_options(), implementation="xla"
    )
  )
  memory = step.lower(*shapes).compile().memory_analysis()
  assert memory.temp_size_in_bytes < shapes[1].size * 2 / 3


def test_decode_has_no_gradient():
  case = CASES["one"]
  args, _, _ = operands(case, False)

  def loss(q):
    out = decode(case, (q, *args[1:]), None, None).out
    return jnp.sum(out)

  for function in (loss, jax.jit(loss)):
    with pytest.raises(NotImplementedError, match="has no gradient"):
      jax.grad(function)(args[0])


def test_decode_takes_half_precision():
  """Rounding the operands is all that bfloat16 changes."""
  case = CASES["several"]
  args, scale, _ = operands(case, True, dtype=jnp.bfloat16)
  want = decode(
    case,
    (*(x.astype(jnp.float32) for x in args[:4]), args[4]),
    scale,
    "reference",
  )
  got = decode(case, args, scale, "xla")
  assert got.out.dtype == jnp.bfloat16
  np.testing.assert_array_equal(got.block_indices, want.block_indices)
  # Probabilities and outputs of size 1, rounded to 8 bits each.
  np.testing.assert_allclose(
    np.asarray(got.out, np.float32), want.out, atol=2e-2
  )


def wrong_decodes():
  case = CASES["several"]
  (q, k, v, index_q, index_k), _, _ = operands(case, False)
  codes, scale = reference.fp8_codes(index_k)
  lengths = case.lengths

  def call(q=q, k=k, index_q=index_q, index_k=index_k, **options):
    options = dict(block_size=4, kv_lengths=lengths) | options
    return msa_jax.decode_attention(q, k, v, index_q, index_k, **options)

  long = jnp.zeros((4, 17, 4, 8)), jnp.zeros((4, 17, 2, 8))
  return {
    "tokens (msa_attention with kv_lengths takes more), got T = 17": lambda: (
      call(long[0], index_q=long[1])
    ),
    "q must be an array of at most as many tokens as k": lambda: (
      msa_jax.decode_attention(
        q, k[:, :3], v[:, :3], index_q, index_k[:, :3], kv_lengths=lengths
      )
    ),
    "index_k_scale must be an array with an index_k of float8": lambda: call(
      index_k=codes
    ),
    "index_k_scale must be None unless": lambda: call(index_k_scale=scale),
    "index_k_scale must be an array of shape [B, C] = (4, 37), got (4, 36)": (
      lambda: call(index_k=codes, index_k_scale=scale[:, 1:])
    ),
    "index_k_scale must be float32, got bfloat16": lambda: call(
      index_k=codes, index_k_scale=scale.astype(jnp.bfloat16)
    ),
    "index_k must be an array of float32, the dtype of index_q, or of float8": (
      lambda: call(index_k=index_k.astype(jnp.bfloat16))
    ),
    "index_k must be an array with S = 37": lambda: call(
      index_k=index_k[:, 1:]
    ),
    "index_q must be an array with K = 2": lambda: call(
      index_q=index_q[:, :, :1]
    ),
    "index_q must be an array of float32, the dtype of q": lambda: call(
      index_q=index_q.astype(jnp.bfloat16)
    ),
    "kv_lengths must be an array of shape [B], got None": lambda: call(
      kv_lengths=None
    ),
    "kv_lengths must be an array of shape [B] = (4), got (3,)": lambda: call(
      kv_lengths=lengths[1:]
    ),
    "top_k must be an integer of at least 1": lambda: call(top_k=0),
    "implementation must be one of": lambda: call(implementation="triton"),
  }


@pytest.mark.parametrize("text", wrong_decodes())
def test_wrong_decodes(text):
  with pytest.raises(ValueError) as error:
    wrong_decodes()[text]()
  assert text in str(error.value)


def test_kernels_say_so_where_they_cannot_run(no_gpu):
  case = CASES["one"]
  args, _, _ = operands(case, False)
  with pytest.raises(NotImplementedError, match="Hopper"):
    decode(case, args, None, "mosaic_gpu")
  for a, b in zip(
    decode(case, args, None, None), decode(case, args, None, "xla")
  ):
    np.testing.assert_array_equal(a, b)


# --- the cache ----------------------------------------------------------------


def fresh(batch=3, capacity=11, index_dtype=None):
  layer = cache_lib.empty_layer(
    batch,
    capacity,
    2,
    4,
    dtype=jnp.float32,
    index_dim=3,
    index_dtype=index_dtype,
  )
  return cache_lib.empty((layer,))


@functools.partial(jax.jit, donate_argnums=0)
def append(cache, k, v, index_k, counts):
  cache, span = cache.reserve(k.shape[1], counts)
  layer = cache.layers[0].write(span.slots, k, v, index_k)
  return cache._replace(layers=(layer,)), span


@jax.jit
def quantise(x):
  return reference.quantise_fp8(x)


@pytest.mark.parametrize("fp8", [False, True])
def test_rows_are_the_beginning_of_what_they_were_given(fp8):
  """Random appends, overflows and trims beside lists of tokens."""
  rng = np.random.default_rng(int(fp8))
  cache = fresh(index_dtype=cache_lib.FP8 if fp8 else None)
  rows, overflowed = [[] for _ in range(3)], [False] * 3
  seen = 0
  for _ in range(80):
    if rng.random() < 0.25:
      lengths = rng.integers(-1, 13, 3)
      cache = cache.trim(jnp.asarray(lengths))
      for b, length in enumerate(lengths):
        overflowed[b] &= max(length, 0) > len(rows[b])
        del rows[b][max(length, 0) :]
    else:
      num_tokens = int(rng.choice([1, 4]))
      counts = rng.integers(0, num_tokens + 1, 3)
      new = [
        rng.normal(size=(3, num_tokens, *shape)).astype(np.float32)
        for shape in ((2, 4), (2, 4), (3,))
      ]
      # What stands in the padding is garbage.
      for b in range(3):
        for x in new:
          x[b, : num_tokens - counts[b]] = np.nan
      cache, span = append(cache, *new, counts)
      for b in range(3):
        overflowed[b] |= len(rows[b]) + counts[b] > 11
        first = num_tokens - counts[b]
        if not overflowed[b]:
          kept = (*new[:2], quantise(new[2]) if fp8 else new[2])
          rows[b] += [[x[b, t] for x in kept] for t in range(first, num_tokens)]
          positions = np.asarray(span.positions)[b, first:]
          start = len(rows[b]) - counts[b]
          assert positions.tolist() == list(range(start, len(rows[b])))
        assert span.lengths[b] == (0 if overflowed[b] else len(rows[b]))
    seen += sum(overflowed)
    np.testing.assert_array_equal(cache.lengths, [len(row) for row in rows])
    np.testing.assert_array_equal(cache.overflowed, overflowed)
    layer = cache.layers[0]
    held = [np.asarray(x) for x in (layer.k, layer.v, layer.index_keys())]
    for b, row in enumerate(rows):
      for t, token in enumerate(row):
        for x, want in zip(held, token):
          np.testing.assert_array_equal(x[b, t], want)
  assert not np.isnan(held[0]).any() and seen > 10


def test_quantised_index_keys():
  x = jnp.asarray([[[448.0, -3.0, 0.2], [0.0, 0.0, 0.0], [1e-3, 2e-3, -7e-3]]])
  codes, scale = reference.fp8_codes(x)
  assert codes.dtype == jnp.float8_e4m3fn and scale.dtype == jnp.float32
  np.testing.assert_array_equal(scale, [[2.0, 2.0**-126, 2.0**-15]])
  # e4m3 has 3 bits of mantissa: within half of 2^-3 of each value.
  np.testing.assert_allclose(reference.quantise_fp8(x), x, rtol=2**-4)
  codes, _ = reference.fp8_codes(jnp.float32([jnp.inf, 1.0, -jnp.inf]))
  assert np.isnan(np.float32(codes)).tolist() == [True, False, True]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_scales_and_codes_are_exact(dtype):
  """Any program has the same codes: of x / scale, to the nearest, ties to
  even."""
  x = jax.random.normal(jax.random.key(0), (400, 64))
  x = (
    x * 2.0 ** jax.random.randint(jax.random.key(1), (400, 1), -9, 9)
  ).astype(dtype)
  codes, scale = jax.jit(reference.fp8_codes)(x)
  x = np.float64(x.astype(jnp.float32))
  largest = np.abs(x).max(-1) / scale
  assert (largest >= 128).all() and (largest < 256).all()
  want = (x / np.float64(scale)[:, None]).astype(jnp.float8_e4m3fn)
  np.testing.assert_array_equal(np.float32(codes), np.float32(want))


def test_numbers_are_rounded_before_the_cast():
  """All e4m3 numbers, the middles between them, what is next to these, and
  random ones: the cast then changes nothing."""
  every = np.arange(256, dtype=np.uint8).view(jnp.float8_e4m3fn)
  every = np.sort(np.float32(every)[np.isfinite(np.float32(every))])
  middle = (every[1:] + every[:-1]) / 2
  next_to = [np.nextafter(middle, np.float32(x)) for x in (-1e9, 1e9)]
  size = 2.0 ** np.random.default_rng(0).uniform(-30, 8.7, 10_000)
  x = np.float32([*every, *middle, *np.ravel(next_to), *size, *-size])
  got = reference._round_to_e4m3(jnp.asarray(x))
  np.testing.assert_array_equal(got, np.float32(x.astype(jnp.float8_e4m3fn)))


def test_a_donated_cache_is_written_in_place():
  """The program makes no second cache, and the buffers stay where they are."""
  model = build(num_layers=2, layer_kinds=("gqa", "msa"))
  graphdef, params = nnx.split(model)
  cache = nnx.merge(graphdef, params).init_cache(2, 512)
  tokens = jnp.zeros((2, 1), jnp.int32)
  step = jax.jit(
    lambda params, tokens, cache: nnx.merge(graphdef, params).extend(
      tokens, cache
    ),
    donate_argnums=2,
  )
  compiled = step.lower(params, tokens, cache).compile()
  memory = compiled.memory_analysis()
  held = sum(x.nbytes for x in jax.tree.leaves(cache))
  assert memory.alias_size_in_bytes == held
  assert memory.output_size_in_bytes - held < 4096

  def pointers(cache):
    return [x.unsafe_buffer_pointer() for x in jax.tree.leaves(cache.layers)]

  before = pointers(cache)
  assert pointers(compiled(params, tokens, cache).cache) == before


def test_wrong_writes():
  cache = fresh()
  layer = cache.layers[0]
  _, span = cache.reserve(2)
  k, index_k = jnp.zeros((3, 2, 2, 4)), jnp.zeros((3, 2, 3))
  for text, call in {
    "k must be float32 of shape (3, 2, 2, 4) to go into the cache, got bfloat16"
    " of shape (3, 2, 2, 4)": lambda: layer.write(
      span.slots, k.astype(jnp.bfloat16), k, index_k
    ),
    "v must be float32 of shape (3, 2, 2, 4)": lambda: layer.write(
      span.slots, k, k[:, :1], index_k
    ),
    "index_k must be float32 of shape (3, 2, 3)": lambda: layer.write(
      span.slots, k, k, index_k.astype(jnp.float16)
    ),
    "index_k must be an array as in the cache, got None": lambda: layer.write(
      span.slots, k, k
    ),
    "index_k must be None as in the cache": lambda: layer._replace(
      index_k=None
    ).write(span.slots, k, k, index_k),
    "num_tokens must be from 1 to the cache's capacity = 11, got 12": lambda: (
      cache.reserve(12)
    ),
    "counts must be an array of shape [B] = (3), got (2,)": lambda: (
      cache.reserve(2, jnp.zeros(2, jnp.int32))
    ),
    "lengths must be an array of integers, got float32": lambda: cache.trim(
      jnp.zeros(3)
    ),
    "index_dtype must be float32, the cache's dtype, or float8": lambda: fresh(
      index_dtype=jnp.float16
    ),
    "capacity must be an integer of at least 1, got 0": lambda: fresh(
      capacity=0
    ),
    "num_tokens must be an integer of at least 1, got True": lambda: (
      cache.reserve(True)
    ),
  }.items():
    with pytest.raises(ValueError) as error:
      call()
    assert text in str(error.value)


# --- models -------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0, static_argnames="phase")
def full_pass(graphdef, params, tokens, phase="sparse"):
  model = nnx.merge(graphdef, params)
  return model(tokens, phase=phase, with_selection=True)


@functools.partial(
  jax.jit, static_argnums=0, static_argnames=("phase",), donate_argnums=3
)
def extend(graphdef, params, tokens, cache, counts, phase="sparse"):
  model = nnx.merge(graphdef, params)
  return model.extend(
    tokens, cache, counts=counts, phase=phase, with_selection=True
  )


def sets(blocks):
  """Chosen blocks as sets: one bit a block; L first, K and P gone."""
  blocks = np.asarray(blocks)
  return (np.where(blocks < 0, 0, 2 ** np.maximum(blocks, 0))).sum(-1)


def check_calls(model, tokens, calls, cache, starts=None, phase="sparse"):
  """Reads rows of tokens in calls [(T, counts)] and compares with one pass.

  Returns the cache and what each row holds.
  """
  graphdef, params = nnx.split(model)
  full = full_pass(graphdef, params, tokens, phase=phase)
  want_blocks = sets(full.selection.block_indices)
  at = np.zeros(len(tokens), int) if starts is None else np.array(starts)
  for num_tokens, counts in calls:
    chunk = np.zeros((len(tokens), num_tokens), np.int32)
    for b, count in enumerate(counts):
      chunk[b, num_tokens - count :] = tokens[b, at[b] : at[b] + count]
    out = extend(
      graphdef, params, chunk, cache, np.asarray(counts, np.int32), phase=phase
    )
    cache = out.cache
    for b, count in enumerate(counts):
      if not count:
        continue
      here = slice(at[b], at[b] + count)
      np.testing.assert_allclose(
        out.logits[b, -count:], full.logits[b, here], atol=1e-5
      )
      if phase == "sparse":
        np.testing.assert_array_equal(
          sets(out.block_indices)[:, b, :, -count:],
          want_blocks[:, b, :, here],
        )
    at += counts
    np.testing.assert_array_equal(cache.lengths, at)
    assert not np.any(cache.overflowed)
  return cache, at


TOKENS = np.asarray(jax.random.randint(jax.random.key(5), (3, 72), 0, 64))
# Blocks of 8: chunks that end inside, at and across their boundaries, rows that
# start late and wait, and one that fills its room to the last slot.
CALLS = [
  (20, (20, 7, 0)),
  (20, (20, 20, 1)),
  (1, (1, 1, 1)),
  (1, (0, 1, 1)),
  (5, (5, 2, 5)),
  (20, (17, 20, 16)),
  (1, (1, 0, 1)),
]


def poisoned(cache):
  """Unused memory may hold anything."""
  layers = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), cache.layers)
  return cache._replace(layers=layers)


def check_overflow(model, cache, at):
  """One more token a batch row: the full row refuses it and is marked."""
  graphdef, params = nnx.split(model)
  full = full_pass(graphdef, params, TOKENS)
  chunk = np.stack([TOKENS[b, n : n + 1] for b, n in enumerate(at)])
  before = jax.tree.map(np.array, cache)
  out = extend(graphdef, params, chunk, cache, np.ones(3, np.int32))
  np.testing.assert_array_equal(out.cache.lengths, np.add(at, [0, 1, 1]))
  np.testing.assert_array_equal(out.cache.overflowed, [True, False, False])
  assert np.all(np.isfinite(out.logits))
  for b in (1, 2):
    np.testing.assert_allclose(
      out.logits[b, 0], full.logits[b, at[b]], atol=1e-5
    )
  for old, new in zip(before.layers, out.cache.layers):
    for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new)):
      np.testing.assert_array_equal(a[0], b[0])
  return out.cache


@pytest.mark.parametrize(
  "kinds, precision, scan_layers",
  [
    pytest.param(("gqa",), "exact", False, marks=pytest.mark.slow),
    pytest.param(("msa",), "fp8", False, marks=pytest.mark.slow),
    # Layers without a scan: test_each_row_is_continued_as_if_alone.
    (("gqa", "msa"), "exact", True),
  ],
)
def test_reading_in_parts_equals_one_pass(kinds, precision, scan_layers):
  index = dataclasses.replace(INDEX, top_k=3, score_precision=precision)
  model = build(
    index=index,
    layer_kinds=kinds,
    scan_layers=scan_layers,
    num_layers=3 if scan_layers else 2,
  )
  cache = model.init_cache(3, 64)
  dtypes = {
    layer.index_k.dtype for layer in cache.layers if layer.index_k is not None
  }
  fp8 = precision == "fp8"
  assert dtypes <= {jnp.dtype(jnp.float8_e4m3fn if fp8 else jnp.float32)}
  # All slots hold NaN before they are used.
  cache, at = check_calls(model, TOKENS, CALLS, poisoned(cache))
  assert at[0] == 64
  cache = check_overflow(model, cache, at)
  # Tokens at the end are dropped, and others take their place.
  kept = np.array([41, 8, 0])
  others = np.array(TOKENS)
  for b, n in enumerate(kept):
    others[b, n:] = TOKENS[b, n:][::-1]
  cache = cache.trim(jnp.asarray(kept))
  calls = [(1, (1, 1, 0)), (20, (20, 20, 20)), (1, (1, 1, 1))]
  check_calls(model, others, calls, cache, kept)


@pytest.mark.slow
def test_a_cache_with_the_first_block_always_read():
  """Block 0 is in the choice of every token, one by one or together."""
  index = dataclasses.replace(INDEX, top_k=2, force_first_block=True)
  model = build(index=index, layer_kinds=("msa",), num_layers=1)
  cache = poisoned(model.init_cache(3, 64))
  calls = [(20, (20, 7, 0)), (20, (20, 20, 1)), (1, (1, 1, 1))]
  check_calls(model, TOKENS, calls, cache)
  blocks = full_pass(*nnx.split(model), TOKENS).selection.block_indices
  assert np.all(np.asarray(blocks)[..., 0] == 0)


def poison_unused(cache):
  """The cache with NaN in every slot beyond its batch row's length."""
  unused = jnp.arange(cache.capacity) >= cache.lengths[:, None]

  def poison(x):
    mask = unused.reshape(*unused.shape, *(1,) * (x.ndim - 2))
    return jnp.where(mask, jnp.asarray(jnp.nan, x.dtype), x)

  return cache._replace(layers=jax.tree.map(poison, cache.layers))


def tiles_attention(seen, q, k, v, *, mask, key_value_seq_lengths, **options):
  """Attention that reads what cuDNN reads: whole tiles of each batch row.

  The last tile is read past the row's length; the tiles after it are not read.
  """
  assert options == dict(implementation="cudnn", scale=None)
  tile = attention._CUDNN_TILE
  slot, lengths = np.arange(k.shape[1]), key_value_seq_lengths[:, None]
  read = (slot < -(-lengths // tile) * tile)[..., None, None]
  k, v = (jnp.where(read, x, 0) for x in (k, v))
  seen.append((k, v))
  used = (slot < lengths)[:, None]
  used = used if mask is None else used & mask[:, 0]
  heads = (*q.shape[:2], k.shape[2], -1, q.shape[-1])
  scores = jnp.einsum("btkgd,bskd->bkgts", q.reshape(heads), k)
  scores = jnp.where(used[:, None, None], scores * q.shape[-1] ** -0.5, -1e30)
  weights = jax.nn.softmax(scores, axis=-1)
  return jnp.einsum("bkgts,bskd->btkgd", weights, v).reshape(q.shape)


@pytest.mark.parametrize(
  "num_tokens",
  [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (12, 128))],
)
def test_cudnn_is_given_the_same_bits_whatever_unused_slots_hold(
  num_tokens, monkeypatch
):
  """The batch rows end inside a tile, at a tile's end and at the cache's end.

  One is empty. The cache also has tiles that are not read.
  """
  seen = []
  attend = functools.partial(tiles_attention, seen)
  monkeypatch.setattr(attention, "_dot_product_attention", attend)
  layer = msa_jax.GQAttention(
    4, 32, num_kv_heads=2, implementation="cudnn", rngs=nnx.Rngs(0)
  )
  capacity = 900
  lengths = jnp.asarray([0, 1, 300, 512 - num_tokens, capacity - num_tokens])
  cache = cache_lib.empty((layer.init_cache(5, capacity),))
  filled = jax.tree.map(
    lambda x: jax.random.normal(jax.random.key(1), x.shape), cache.layers
  )
  cache = cache._replace(layers=filled, lengths=lengths)
  x = jax.random.normal(jax.random.key(0), (5, num_tokens, 32))
  # The empty batch row gets no token, so it has nothing to see.
  counts = jnp.asarray([0, 1, *(num_tokens,) * 3])

  def read(cache):
    cache, span = cache.reserve(num_tokens, counts)
    return layer.extend(x, cache.layers[0], span)

  clean, dirty = read(cache), read(poison_unused(cache))
  assert np.isnan(dirty.cache.v).any()
  np.testing.assert_array_equal(clean.out, dirty.out)
  assert np.all(np.isfinite(clean.out)) and not np.any(clean.out[0])
  for a, b in zip(*seen):
    used = np.arange(capacity) < (lengths + counts)[:, None]
    np.testing.assert_array_equal(a[used], b[used])
    # The unused slots that are read hold zeros. Batch row 0 sees nothing: its
    # output is dropped, so what it reads does not matter.
    np.testing.assert_array_equal(np.asarray(b)[1:][~used[1:]], 0)
  # The same layer by xla, which masks scores in float32.
  layer.implementation = "xla"
  monkeypatch.undo()
  np.testing.assert_allclose(read(cache).out, clean.out, atol=1e-5)


def test_a_model_in_its_warm_up_extends_with_dense_attention():
  model = build(num_layers=1, layer_kinds=("msa",))
  calls = [(20, (20, 7, 20)), (2, (2, 1, 2))]
  check_calls(
    model, TOKENS, calls, poisoned(model.init_cache(3, 32)), phase="warmup"
  )


def test_warmed_up_kernels_say_what_reads_densely(pretend_hopper):
  model = build(
    num_layers=2, layer_kinds=("gqa", "msa"), implementation="mosaic_gpu"
  )
  text = "the warm-up phase.* needs .* implementation='xla', 'reference' or"
  cache = model.init_cache(3, 16)
  for tokens in (2, 16):
    with pytest.raises(NotImplementedError, match=text):
      model.extend(TOKENS[:, :tokens], cache, phase="warmup")


def test_a_cache_that_does_not_fit():
  model = build()
  tokens = TOKENS[:, :4]
  cache = model.init_cache(3, 16)

  def edit(name, change):
    layer = cache.layers[1]
    layer = layer._replace(**{name: change(getattr(layer, name))})
    return cache._replace(layers=(cache.layers[0], layer, cache.layers[2]))

  half = lambda x: x.astype(jnp.bfloat16)  # noqa: E731
  for text, call in {
    "cache.layers[1].k must be float32 of shape (3, 16, 2, 8) for 3 batch"
    " rows of this model, got bfloat16": lambda: model.extend(
      tokens, edit("k", half)
    ),
    "cache.layers[1].v must be float32 of shape (3, 16, 2, 8)": lambda: (
      model.extend(tokens, edit("v", lambda x: x[:, :9]))
    ),
    "cache.layers[1].index_k must be float32": lambda: model.extend(
      tokens, edit("index_k", half)
    ),
    "cache.layers[1].index_k must be float32 of shape (3, 16, 8) for 3 batch"
    " rows of this model, got None": lambda: model.extend(
      tokens, edit("index_k", lambda x: None)
    ),
    "cache.layers[0].k must be float32 of shape (2, 16, 2, 8) for 2": lambda: (
      model.extend(tokens[:2], cache)
    ),
    "cache.layers[2].index_k must be None": lambda: build(
      layer_kinds=("gqa", "msa", "gqa")
    ).extend(tokens, cache),
    "tokens must be at most the cache's capacity = 16 in each": lambda: (
      model.extend(TOKENS[:, :17], cache)
    ),
    "cache must be a msa_jax.Cache, got NoneType": lambda: model.extend(
      tokens, None
    ),
    "tokens must be an array of rank 2": lambda: model.extend(tokens[0], cache),
    "index_dtype must be float32": lambda: model.init_cache(
      3, 16, index_dtype="bfloat16"
    ),
    "index_dtype must be None for a model without MSA layers, which caches no"
    " index keys, got 'float8_e4m3fn'": lambda: build(
      layer_kinds=("gqa",)
    ).init_cache(3, 16, index_dtype="float8_e4m3fn"),
  }.items():
    with pytest.raises(ValueError) as error:
      call()
    assert text in str(error.value), error.value


@pytest.mark.parametrize(
  "change",
  [
    dict(selection="window"),
    dict(value_head=True),
  ],
)
def test_ablations_have_no_cached_form(change):
  model = build(index=dataclasses.replace(INDEX, **change))
  with pytest.raises(NotImplementedError, match="a cache supports MSA with"):
    model.init_cache(1, 8)


MESH = """
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from test_cache import FP8_CONFIG
from msa_jax import DecoderLM, Sharding, generate

tokens = jax.random.randint(jax.random.key(0), (2, 4, 9), 0, 64)


def run(sharding):
  model = DecoderLM(FP8_CONFIG, rngs=nnx.Rngs(0), sharding=sharding)
  graphdef, params = nnx.split(model)
  read = jax.jit(lambda params, tokens, cache, counts: nnx.merge(
    graphdef, params).extend(tokens, cache, counts=counts, with_selection=True))
  cache = model.init_cache(4, 24)
  first = read(params, tokens[0], cache, jnp.asarray([9, 3, 0, 8]))
  last = read(params, tokens[1], first.cache, jnp.asarray([9, 9, 9, 9]))
  return (first.logits, first.block_indices, last), cache, model


def make(model):
  # New tokens, and the shards of the keys that the last step left.
  shards = []

  def steps(*args, **options):
    state, new = decode_steps(*args, **options)
    k = state.cache.layers[1].k
    shards.append((k.shape, k.addressable_shards[0].data.shape))
    return state, new

  decode_steps, generate.decode_steps = generate.decode_steps, steps
  rows = generate.generate(
    model, [[1, 2, 3], [4] * 20, [5], [6] * 9], max_new_tokens=7, steps=3,
    key=jax.random.key(0), sampling=generate.Sampling(temperature=2.0, top_k=9),
  )
  generate.decode_steps = decode_steps
  return np.stack(rows), shards[-1]


want, _, model = run(None)
tokens_alone, _ = make(model)
mesh = jax.make_mesh((2, 1, 2), ("data", "fsdp", "tensor"),
                     axis_types=(jax.sharding.AxisType.Auto,) * 3)
with jax.set_mesh(mesh):
  got, cache, model = run(Sharding())
  for layer in (cache.layers[1], got[2].cache.layers[1]):
    for x in (layer.k, layer.v):
      assert x.addressable_shards[0].data.shape == (2, 24, 1, 8)
    assert layer.index_k.addressable_shards[0].data.shape == (2, 24, 8)
  try:
    model.init_cache(3, 8)
  except ValueError as error:
    assert "batch must be a multiple of mesh axes" in str(error), error
  else:
    raise AssertionError("three rows over two devices")
  # Every step of a generation leaves the cache where it was.
  tokens_split, (whole, shard) = make(model)
np.testing.assert_array_equal(tokens_split, tokens_alone)
assert (whole[0], whole[2]) == (2 * shard[0], 2 * shard[2]), (whole, shard)
for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(want),
                        jax.tree.leaves(got)):
  np.testing.assert_allclose(np.asarray(a, np.float32),
                             np.asarray(b, np.float32), atol=1e-5,
                             err_msg=str(path))

# Where nothing but rows are split, nothing of the cache moves.
with jax.set_mesh(jax.make_mesh((4,), ("data",),
                  axis_types=(jax.sharding.AxisType.Auto,))):
  model = DecoderLM(FP8_CONFIG, rngs=nnx.Rngs(0),
                    sharding=Sharding(heads=None, embed=None))
  graphdef, params = nnx.split(model)
  one = tokens[0, :, :1]
  step = jax.jit(lambda p, c: nnx.merge(graphdef, p).extend(one, c))
  text = step.lower(params, model.init_cache(4, 24)).compile().as_text()
  for collective in ("all-gather", "all-to-all", "collective-permute"):
    assert collective not in text, collective
"""
FP8_CONFIG = dataclasses.replace(
  CONFIG, num_layers=2, index=dataclasses.replace(INDEX, score_precision="fp8")
)


@pytest.mark.slow
def test_a_cache_split_over_devices():
  """Four forced CPU devices: rows and KV heads, and no collective of rows."""
  run_on_devices(4, MESH)


# --- on a GPU -----------------------------------------------------------------


def kernel_model(kinds, top_k, dtype="bfloat16", implementation="mosaic_gpu"):
  """Sizes that the kernels take; parameters that bfloat16 holds."""
  config = dataclasses.replace(
    CONFIG,
    num_layers=2,
    embed_dim=256,
    num_heads=4,
    num_kv_heads=1,
    head_dim=64,
    rope_dim=32,
    mlp_dim=256,
    layer_kinds=kinds,
    index=msa_jax.IndexConfig(index_dim=64, block_size=64, top_k=top_k),
    implementation=implementation,
    gqa_implementation="cudnn" if dtype == "bfloat16" else "xla",
    dtype=dtype,
    param_dtype="bfloat16",
  )
  return nnx.split(msa_jax.DecoderLM(config, rngs=nnx.Rngs(0)))


def read_in_parts(graphdef, params, tokens, cache, counts):
  """Logits and choices of all tokens, in calls of these sizes."""
  logits, blocks, at = [], [], 0
  for count in counts:
    out = extend(graphdef, params, tokens[:, at : at + count], cache, None)
    cache, at = out.cache, at + count
    logits.append(np.asarray(out.logits))
    blocks.append(np.asarray(out.block_indices))
  return np.concatenate(logits, axis=1), np.concatenate(blocks, axis=3)


LONG = jax.random.randint(jax.random.key(6), (2, 300), 0, 64)
# A prompt in two chunks, 12 tokens at once, then one by one over a boundary. A
# program for each length.
PARTS = (114, 114, 12, *(1,) * 60)


@pytest.mark.slow
def test_steps_of_the_kernels_lower(pretend_hopper):
  """Prefill under nnx.jit, and decoding inside generation's loop."""
  graphdef, params = kernel_model(("msa",), top_k=8)
  model = nnx.merge(graphdef, params)
  cache = model.init_cache(2, 384, index_dtype=jnp.float8_e4m3fn)
  read = nnx.jit(lambda model, tokens, cache: model.extend(tokens, cache))
  state = generate.DecodeState(
    cache, jnp.zeros(2, jnp.int32), jnp.full(2, 9, jnp.int32),
    jax.random.split(jax.random.key(0), 2),
  )  # fmt: skip
  steps = generate.decode_steps.trace(
    graphdef, params, state, jnp.zeros(0, jnp.int32), steps=4
  )
  for traced in (
    read.trace(model, LONG[:, :128], cache),
    read.trace(model, LONG[:, :3], cache),
    steps,
  ):
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text


@pytest.mark.gpu
@pytest.mark.parametrize("kinds", [("gqa",), ("gqa", "msa")])
def test_kernels_read_in_parts(hopper, kinds):
  """All blocks fit into P, so that no near tie can change the answer."""
  graphdef, params = kernel_model(kinds, top_k=8)
  full = full_pass(graphdef, params, LONG)
  truth = full_pass(
    kernel_model(kinds, 8, "float32", "reference")[0], params, LONG
  )
  # Capacity that cuDNN does not read to the end.
  cache = nnx.merge(graphdef, params).init_cache(2, 640)
  clean, blocks = read_in_parts(graphdef, params, LONG, cache, PARTS)
  np.testing.assert_array_equal(
    sets(blocks), sets(full.selection.block_indices)
  )
  # The cached way may be as wrong as twice the full pass in bfloat16 is.
  error = np.abs(np.asarray(full.logits) - truth.logits).max()
  assert np.abs(clean - truth.logits).max() <= 2 * error


@pytest.mark.gpu
@pytest.mark.parametrize("kinds", [("gqa",), ("msa",)])
def test_unused_slots_reach_nothing_on_a_gpu(hopper, kinds):
  """Every call again from the same cache, clean and with NaN in all unused
  slots.

  Where the program is repeatable this is equality of bits. That of dense layers
  is not always: two runs whose every operand had the same bits (see
  test_cudnn_is_given_the_same_bits_whatever_unused_slots_hold) have parted at
  one call of 63 (H100, 2026-11-24). Such a call fails nothing, as one of the
  repeats still agrees, while NaN that got in would part all of them.
  """
  graphdef, params = kernel_model(kinds, top_k=8)
  cache = nnx.merge(graphdef, params).init_cache(2, 640)
  at, unlike = 0, []
  for count in PARTS:
    chunk, results = LONG[:, at : at + count], []
    at += count
    for change in (jnp.copy, poison_unused):
      outcomes = set()
      for _ in range(2):
        held = jax.tree.map(jnp.copy, cache)
        held = held if change is jnp.copy else change(held)
        out = extend(graphdef, params, chunk, held, None)
        assert np.all(np.isfinite(out.logits)), (change, at)
        used = [
          np.asarray(x[:, :at].astype(jnp.float32)).tobytes()
          for x in jax.tree.leaves(out.cache.layers)
        ]
        outcomes.add((np.asarray(out.logits).tobytes(), *used))
        if change is jnp.copy:
          after = out.cache
      results.append(outcomes)
    clean, dirty = results
    if not clean & dirty:
      unlike.append((at, len(clean), len(dirty)))
    cache = after
  # (tokens read, different results of a clean cache, and of a poisoned one)
  assert not unlike


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", [False, True])
def test_kernels_choose_alike(hopper, fp8):
  """Rounding moves near ties: the kernels move no more than twice as many as
  the reference does in the same dtypes, both against float32.

  Over 9,600 queries: of 600 the reference moves one in bfloat16, too few to
  compare with.
  """
  tokens = jax.random.randint(jax.random.key(6), (32, 300), 0, 64)
  _, params = kernel_model(("msa",), top_k=2)

  def graphdef(*options):
    return kernel_model(("msa",), 2, *options)[0]

  with jax.default_matmul_precision("highest"):
    truth = full_pass(graphdef("float32", "reference"), params, tokens)
  index_dtype = jnp.float8_e4m3fn if fp8 else None

  def moved(implementation):
    graph = graphdef("bfloat16", implementation)
    cache = nnx.merge(graph, params).init_cache(
      32, 384, index_dtype=index_dtype
    )
    _, blocks = read_in_parts(graph, params, tokens, cache, PARTS)
    # The first layer's, whose input is the same.
    return np.mean(sets(blocks)[0] != sets(truth.selection.block_indices)[0])

  assert moved("mosaic_gpu") <= 2 * moved("reference")
