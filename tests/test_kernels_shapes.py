"""Kernels at every group size, head dim and top_k, and in 64-bit JAX.

The contract's cases have the sizes that kernels compute in. Here are those that
kernels pad inside: groups that are not 8 or 16 heads, heads that are not 64 or
128 wide.
"""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_kernels_decode
import test_kernels_kl
import test_kernels_select
from helpers import Case, random_blocks
from jax.experimental.mosaic.gpu import layout_inference
from op_contract import (
  assert_same_bits,
  attention_inputs,
  check_attention,
  check_attention_gradients,
  check_kl,
)

import msa_jax
from pallas_kernels import (
  decode,
  dense_attention,
  index_kl,
  masked_attention,
  mosaic,
  select_blocks,
  sparse_attention_bwd,
  sparse_attention_fwd,
)
from pallas_kernels import sparse_attention as sparse

# (G, K, D, I): every group size that is padded, with a head that is.
PADDED = [
  (3, 2, 24, 48),
  (5, 1, 64, 64),
  (6, 1, 112, 96),
  (7, 1, 80, 8),
  (12, 1, 96, 112),
]
SLOW = pytest.mark.slow
# One is for CI; the others differ in the sizes that they pad to.
SOME_PADDED = [
  pytest.param(sizes, marks=[SLOW] * (sizes[0] in (5, 6, 7, 12)))
  for sizes in PADDED
]
# On the CPU: one CTA, two compute warpgroups.
FORWARD = sparse_attention_fwd.Config(
  num_ctas=1, pair_warpgroups=2, query_stages=2
)
BACKWARD = sparse_attention_bwd.Config(num_ctas=1, stages=2)


def padded_case(group, kv_heads, head_dim, index_dim, **sizes):
  """Two batch rows, of which the second sees few keys."""
  sizes = dict(batch=2, q_len=9, kv_len=140, kv_lengths=(140, 5)) | sizes
  return Case(
    num_heads=group * kv_heads, num_kv_heads=kv_heads, head_dim=head_dim,
    index_dim=index_dim, block_size=64, top_k=2, **sizes,
  )  # fmt: skip


def attend(case, q, k, v, blocks, config=FORWARD):
  return sparse.sparse_attention(
    q, k, v, blocks, block_size=case.block_size, kv_lengths=case.lengths,
    config=config, backward_config=BACKWARD, interpret=True,
  )  # fmt: skip


attend_once = jax.jit(attend, static_argnums=(0, 5))


@functools.partial(jax.jit, static_argnames=("case", "config"))
def attend_and_pull(case, q, k, v, dout, blocks, config=FORWARD):
  """out, lse and the gradients of q, k and v for the cotangent dout."""

  def function(q, k, v):
    return attend(case, q, k, v, blocks, config)

  out, pull, lse = jax.vjp(function, q, k, v, has_aux=True)
  return out, lse, pull(dout)


@pytest.mark.parametrize(
  "sizes",
  [*SOME_PADDED, pytest.param((1, 2, 64, 64), marks=SLOW)],
  ids=str,
)
def test_padded_attention_and_gradients(sizes):
  case = padded_case(*sizes)
  q, k, v, dout = attention_inputs(case, jnp.bfloat16)
  blocks = random_blocks(case)
  out, lse, grads = attend_and_pull(case, q, k, v, dout, blocks)
  check_attention(case, q, k, v, blocks, out, lse)
  check_attention_gradients(case, q, k, v, dout, blocks, grads)


# All blocks but the own one are (pack, block) pairs.
PAIRS = dataclasses.replace(FORWARD, shared_cost=1e9, slack=0.0)


def pack_case(group):
  """Two or four queries share MMA rows; 37 queries leave a pack half empty."""
  return Case(
    batch=1, q_len=37, kv_len=5 * 128, num_heads=group, num_kv_heads=1,
    head_dim=64, block_size=128, top_k=2,
  )  # fmt: skip


# Padded groups of 3 heads, above, are packs of two queries, one of them half
# empty.
@SLOW
@pytest.mark.parametrize("group", [2, 1, 3])
@pytest.mark.parametrize("config", [FORWARD, PAIRS], ids=["tiles", "pairs"])
def test_queries_of_a_pack_choose_apart(group, config):
  case = pack_case(group)
  q, k, v, dout = attention_inputs(case, jnp.bfloat16)
  blocks = random_blocks(case, share=3)
  out, lse, grads = attend_and_pull(case, q, k, v, dout, blocks, config)
  check_attention(case, q, k, v, blocks, out, lse)
  check_attention_gradients(case, q, k, v, dout, blocks, grads)


# Padded groups of 3 heads, above, fill tiles in the same way.
@SLOW
@pytest.mark.parametrize("config", [FORWARD, PAIRS], ids=["tiles", "pairs"])
def test_more_queries_in_tiles_without_pairs(config):
  """Of 6 heads, a tile holds 20 queries; of packs of 8 rows, 16."""
  case = Case(
    batch=2, q_len=45, kv_len=5 * 64, num_heads=12, num_kv_heads=2,
    head_dim=128, block_size=64, top_k=3, kv_lengths=(320, 50),
  )  # fmt: skip
  q, k, v, _ = attention_inputs(case, jnp.bfloat16)
  blocks = random_blocks(case, share=3)
  out, lse = attend_once(case, q, k, v, blocks, config)
  check_attention(case, q, k, v, blocks, out, lse)


# The contract's tests of NaN have packs of four queries, forward and backward.
@SLOW
def test_nan_stays_in_its_query_of_a_pack():
  """Queries 4 to 7 are a pack; 5 and 6 are bad, each in its own way."""
  case = pack_case(2)
  blocks = np.tile(
    [[0, 4], [1, 4], [2, 4], [0, 4], [0, 4], [1, 4], [2, 4], [3, -1]], (5, 1)
  )
  blocks = jnp.asarray(blocks[: case.q_len], jnp.int32)[None, None]
  q, k, v, dout = attention_inputs(case, jnp.bfloat16)
  dout = dout.at[0, 6, 0, 3].set(jnp.inf)
  # The program of the test before, so with every argument given as there.
  _, _, (dq, dk, dv) = attend_and_pull(
    case, q.at[0, 5, 1].set(jnp.nan), k, v, dout, blocks, FORWARD
  )
  dq, dk, dv = (np.isnan(np.asarray(x, np.float32)) for x in (dq, dk, dv))
  heads = np.zeros((37, 2), bool)
  heads[5, 1] = heads[6, 0] = True
  np.testing.assert_array_equal(dq[0].all(-1), heads)
  np.testing.assert_array_equal(dq[0].any(-1), heads)
  keys = np.zeros(5 * 128, bool)
  keys[128 : 3 * 128] = True
  keys[4 * 128 : 5 * 128 - 37 + 7] = True  # up to query 6
  for x in (dk, dv):
    np.testing.assert_array_equal(x[0, :, 0].any(-1), keys)


# Cases of the contract have rows that share no block, and empty places.
@SLOW
def test_one_query_whose_only_block_is_a_pair():
  """Seed 3, call 6 of the fuzzer: no shared block, 7 places of a tile empty."""
  case = dataclasses.replace(
    padded_case(13, 1, 8, 16), batch=1, q_len=1, kv_len=160, top_k=1,
    kv_lengths=(132,),
  )  # fmt: skip
  q, k, v, _ = attention_inputs(case, jnp.bfloat16)
  blocks = jnp.ones((1, 1, 1, 1), jnp.int32)
  out, lse = attend_once(case, q, k, v, blocks, FORWARD)
  check_attention(case, q, k, v, blocks, out, lse)


@pytest.mark.parametrize(
  "sizes",
  [
    *SOME_PADDED,
    pytest.param((1, 2, 64, 64), marks=SLOW),
    pytest.param((2, 2, 64, 64), marks=SLOW),
    pytest.param((4, 2, 128, 128), marks=SLOW),
  ],
  ids=str,
)
def test_padded_heads_stay_out_of_the_kl(sizes):
  """Every real score is far below 0, the score that a padding head has.

  So a padding head with a finite log sum exp would rule the mean. NaN stands
  where no query sees it.
  """
  case = padded_case(*sizes)
  q, k, _, index_q, index_k = case.inputs(dtype=jnp.bfloat16)
  q = (jnp.abs(q) * 4).astype(q.dtype)
  k = (-jnp.abs(k) * 4).astype(k.dtype)
  k, index_k = (x.at[1, 5:].set(jnp.nan) for x in (k, index_k))
  blocks = random_blocks(case)
  args = (case, q, k, index_q, index_k, blocks)
  got = test_kernels_kl.run(
    *args, config=index_kl.Config(stages=2, task=64, num_ctas=1), interpret=True
  )
  k, index_k = (x.at[1, 5:].set(0) for x in (k, index_k))
  check_kl(case, q, k, index_q, index_k, blocks, got)


@pytest.mark.parametrize(
  # Padded groups of 3 heads, above, and TestInterpreted's tasks are for CI.
  "group, head_dim",
  [pytest.param(*x, marks=SLOW) for x in ((2, 128), (4, 256), (1, 64))],
)
def test_kl_of_small_groups_over_several_tasks(group, head_dim):
  """Tasks of up to three pair tiles, of two row tiles or of one.

  If it is one, all stages of q would be filled with several pair tiles of a
  task, whose index operands do not fit, before the keys are copied.
  """
  case = Case(
    q_len=150, kv_len=400, num_heads=group, num_kv_heads=1, head_dim=head_dim,
    index_dim=64, block_size=128, top_k=3,
  )  # fmt: skip
  q, k, _, index_q, index_k = case.inputs(dtype=jnp.bfloat16)
  args = (case, q, k, index_q, index_k, random_blocks(case))
  config = index_kl.Config(task=152, num_ctas=1)
  got = test_kernels_kl.run(*args, config=config, interpret=True)
  check_kl(*args, got)


@pytest.mark.parametrize("group", [4, pytest.param(2, marks=SLOW)])
def test_nan_stays_in_its_query_of_a_row_tile_of_the_kl(group):
  """Queries 4 to 7 share 16 rows or 8; 5 holds NaN."""
  case = Case(
    q_len=12, kv_len=300, num_heads=group, num_kv_heads=1, head_dim=128,
    index_dim=64, block_size=128, top_k=2,
  )  # fmt: skip
  q, k, _, index_q, index_k = case.inputs(dtype=jnp.bfloat16)
  blocks = np.array(random_blocks(case))
  blocks[0, 0, :, 0] = np.arange(12) % 2
  blocks[..., 1] = 2
  value, (diq, dik) = test_kernels_kl.run(
    case, q.at[0, 5, 1].set(jnp.nan), k, index_q, index_k, jnp.asarray(blocks),
    config=test_kernels_kl.INTERPRETED, interpret=True,
  )  # fmt: skip
  assert np.isnan(value)
  bad = np.isnan(np.asarray(diq, np.float32))[0, :, 0]
  np.testing.assert_array_equal(bad.all(-1), np.arange(12) == 5)
  np.testing.assert_array_equal(bad.any(-1), np.arange(12) == 5)
  position = 300 - 12 + 5
  key = np.arange(300)
  seen = np.isin(key // 128, blocks[0, 0, 5]) & (key <= position)
  np.testing.assert_array_equal(np.isnan(dik[0]).any(-1), seen)


@pytest.mark.parametrize(
  "sizes",
  [(5, 1, 80, 48), pytest.param((12, 1, 96, 112), marks=SLOW)],
  ids=str,
)
def test_padded_kl_over_all_tokens(sizes):
  case = padded_case(*sizes)
  q, k, _, index_q, index_k = case.inputs(dtype=jnp.bfloat16)
  args = (case, q, k, index_q, index_k, None)
  got = test_kernels_kl.run(
    *args, config=test_kernels_kl.INTERPRETED_DENSE, interpret=True
  )
  check_kl(*args, got)


@pytest.mark.parametrize(
  "precision, index_dim",
  [
    ("exact", 8),
    ("fp8", 80),
    *(
      pytest.param(*sizes, marks=SLOW)
      for sizes in (("exact", 80), ("exact", 112), ("fp8", 8), ("fp8", 112))
    ),
  ],
)
def test_padded_selection(index_dim, precision):
  index_q, index_k = test_kernels_select.make(0, 1, 40, 200, 2, index_dim)
  ids = test_kernels_select.run_and_check(
    index_q, index_k, precision=precision, top_k=2
  )
  if precision == "exact":
    want = msa_jax.select_blocks(
      index_q, index_k, block_size=64, top_k=2, implementation="reference"
    )
    np.testing.assert_array_equal(ids, want)


# Padded heads in tests/test_kernels_decode.py have a group of 3, too.
@SLOW
@pytest.mark.parametrize("group", [3, 7, 12])
def test_decoding_of_every_group_size(group):
  case = test_kernels_decode.Case(
    lengths=(140, 3), capacity=144, num_heads=2 * group, top_k=2
  )
  test_kernels_decode.run_and_check(case)


def test_decoding_of_more_heads_than_a_swizzle_tile_lowers():
  test_kernels_decode.lower(
    dataclasses.replace(
      test_kernels_decode.Case(), num_heads=15, num_kv_heads=1
    )
  )


def test_decoding_says_which_rows_it_cannot_read():
  case = dataclasses.replace(test_kernels_decode.Case(), index_dim=72, fp8=True)
  with pytest.raises(NotImplementedError) as error:
    test_kernels_decode.lower(case)
  assert str(error.value) == (
    "mosaic_gpu decode_attention supports index_dim of multiples of 16 with"
    " float8_e4m3fn index keys, because TMA reads rows of a multiple of 16"
    " bytes, got 72"
  )


# --------------------------------------------------- head dims of 136 to 256

# (G, K, D, I) and the block size.
WIDE = [
  pytest.param((16, 1, 200, 64), 128, PAIRS),
  pytest.param((3, 1, 256, 48), 64, FORWARD, marks=SLOW),
  pytest.param((8, 2, 256, 128), 64, PAIRS, marks=SLOW),
  pytest.param((2, 1, 160, 64), 128, FORWARD, marks=SLOW),
]


@pytest.mark.parametrize("sizes, block_size, config", WIDE)
def test_wide_attention_and_gradients(sizes, block_size, config):
  case = padded_case(*sizes, kv_len=300, kv_lengths=(300, 5))
  case = dataclasses.replace(case, block_size=block_size)
  q, k, v, dout = attention_inputs(case, jnp.bfloat16)
  blocks = random_blocks(case)
  out, lse, grads = attend_and_pull(case, q, k, v, dout, blocks, config)
  check_attention(case, q, k, v, blocks, out, lse)
  check_attention_gradients(case, q, k, v, dout, blocks, grads)


# Attention with wide heads is interpreted above, and every kernel lowered for
# them below.
@SLOW
@pytest.mark.parametrize("sizes, block_size, config", WIDE)
def test_wide_kl(sizes, block_size, config):
  del config
  case = padded_case(*sizes, kv_len=300, kv_lengths=(300, 5))
  case = dataclasses.replace(case, block_size=block_size)
  q, k, _, index_q, index_k = case.inputs(dtype=jnp.bfloat16)
  args = (case, q, k, index_q, index_k, random_blocks(case))
  config = index_kl.Config(task=64, num_ctas=1)
  check_kl(*args, test_kernels_kl.run(*args, config=config, interpret=True))


# As for the KL, every kernel is lowered for wide heads below.
@SLOW
@pytest.mark.parametrize(
  "sizes",
  [dict(num_heads=16, block_size=128), dict(num_heads=6)],
  ids=str,
)
def test_wide_decoding(sizes):
  case = test_kernels_decode.Case(
    lengths=(140, 3), capacity=144, head_dim=256, top_k=2, **sizes
  )
  test_kernels_decode.run_and_check(case)


def test_wide_heads_lower_for_cuda():
  """Lowering checks that a kernel fits SMEM."""
  case = dataclasses.replace(
    real_case(1 << 15, 16, 2, dim=256), index_dim=128
  )  # fmt: skip
  for text in kernels_of(case).values():
    assert "mosaic_gpu" in text


@SLOW
@pytest.mark.parametrize(
  "group, block_size", [(1, 128), (4, 64), (16, 64), (16, 128)]
)
def test_wide_heads_of_every_pack_lower_for_cuda(group, block_size):
  case = real_case(1 << 13, 2 * group, 2, dim=256, block_size=block_size)
  case = dataclasses.replace(case, index_dim=64)
  for text in kernels_of(case).values():
    assert "mosaic_gpu" in text


def test_dense_kernels_name_their_bound_on_heads():
  case = padded_case(2, 1, 136, 64)
  q, k, v, index_q, index_k = case.inputs(dtype=jnp.bfloat16)
  text = "supports head_dim up to 128 in the warm-up phase and in dense"
  lse = jnp.zeros((case.batch, case.num_heads, case.q_len), jnp.float32)
  for call in (
    lambda: index_kl.index_kl_loss(q, k, index_q, index_k, None, lse=lse),
    lambda: masked_attention.attention(q, k, v),
    lambda: dense_attention.attention(q, k, v),
  ):
    with pytest.raises(NotImplementedError, match=text):
      call()


@pytest.mark.parametrize("phase", ["sparse", "warmup"])
def test_none_moves_on_from_a_phase_without_kernels(pretend_hopper, phase):
  case = dataclasses.replace(real_case(256, 16, 2, dim=136), index_dim=64)
  (choice,) = msa_jax.explain(
    msa_jax.msa_attention, *shapes_of(case)[:5], phase=phase, with_kl=True
  )
  wanted = {"sparse": "mosaic_gpu", "warmup": "xla"}[phase]
  assert choice.implementation == wanted
  assert ("head_dim up to 128" in str(choice)) == (phase == "warmup")


# ------------------------------------------------------------- many choices


@pytest.mark.parametrize(
  "precision, top_k",
  [
    ("exact", 34),
    pytest.param("fast", 34, marks=SLOW),
    pytest.param("exact", 64, marks=SLOW),
  ],
)
def test_selection_of_many_blocks(precision, top_k):
  index_q, index_k = test_kernels_select.make(2, 1, 20, (top_k + 6) * 64, 1, 64)
  test_kernels_select.run_and_check(
    index_q, index_k, precision=precision, top_k=top_k
  )


@SLOW
def test_attention_and_gradients_of_many_blocks():
  case = Case(
    q_len=5, kv_len=70 * 64, num_heads=8, num_kv_heads=1, head_dim=64,
    index_dim=64, block_size=64, top_k=64,
  )  # fmt: skip
  q, k, v, dout = attention_inputs(case, jnp.bfloat16)
  blocks = random_blocks(case)
  out, lse, grads = attend_and_pull(case, q, k, v, dout, blocks)
  check_attention(case, q, k, v, blocks, out, lse)
  check_attention_gradients(case, q, k, v, dout, blocks, grads)
  _, _, _, index_q, index_k = case.inputs(dtype=jnp.bfloat16)
  args = (case, q, k, index_q, index_k, blocks)
  config = index_kl.Config(stages=2, num_ctas=1)
  check_kl(*args, test_kernels_kl.run(*args, config=config, interpret=True))


@SLOW
def test_decoding_of_many_blocks():
  case = test_kernels_decode.Case(
    lengths=(70 * 64, 300), capacity=70 * 64, num_heads=1, num_kv_heads=1,
    top_k=64,
  )  # fmt: skip
  config = decode.Config(num_ctas=3, stages=2, splits=1)
  test_kernels_decode.run_and_check(case, config=config)
  params = test_kernels_decode.params_of(case, decode.Config())
  # A thread of the warpgroup that merges holds one list.
  assert params.scan_ctas <= params.window(params.scan_ctas) == 128


def test_decoding_of_many_blocks_and_queries_is_refused():
  case = dataclasses.replace(
    test_kernels_decode.PAPER, lengths=(1,), capacity=1 << 17, top_k=33,
    tokens=16, num_heads=16, num_kv_heads=16,
  )  # fmt: skip
  with pytest.raises(NotImplementedError) as error:
    test_kernels_decode.lower(case)
  assert (
    "top_k above 32 for up to 128 query tokens x KV heads, because a thread's"
    " registers hold one list of 64 blocks, got top_k 33 and 256"
  ) in str(error.value)


# ------------------------------------------------------------------ lowering


def shapes_of(case):
  """Shapes of q, k, v, index_q, index_k, block_indices and lse."""
  spec = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
  b, t, s, kv = case.batch, case.q_len, case.kv_len, case.num_kv_heads
  cache = spec((b, s, kv, case.head_dim))
  return (
    spec((b, t, case.num_heads, case.head_dim)),
    cache,
    cache,
    spec((b, t, kv, case.index_dim)),
    spec((b, s, case.index_dim)),
    jax.ShapeDtypeStruct((b, kv, t, case.top_k), jnp.int32),
    jax.ShapeDtypeStruct((b, case.num_heads, t), jnp.float32),
  )


def kernels_of(case):
  """The lowered text of each operation with its gradients, by name."""
  options = dict(block_size=case.block_size)

  def attention(q, k, v, index_q, index_k, ids, lse):
    def total(*args):
      out, _ = sparse.sparse_attention(*args, ids, **options)
      return out.astype(jnp.float32).sum()

    return jax.grad(total, (0, 1, 2))(q, k, v)

  def kl(q, k, v, index_q, index_k, ids, lse):
    def loss(*args):
      return index_kl.index_kl_loss(q, k, *args, ids, lse=lse, **options)

    return jax.value_and_grad(loss, (0, 1))(index_q, index_k)

  def warm_up_kl(q, k, v, index_q, index_k, ids, lse):
    return kl(q, k, v, index_q, index_k, None, lse)

  def choice(q, k, v, index_q, index_k, ids, lse):
    return select_blocks.select_blocks(
      index_q, index_k, top_k=case.top_k, **options
    )

  def step(q, k, v, index_q, index_k, ids, lse):
    return decode.decode_attention(
      q[:, :4], k, v, index_q[:, :4], index_k, top_k=case.top_k,
      kv_lengths=jnp.full((case.batch,), case.kv_len), **options,
    )  # fmt: skip

  functions = [attention, kl, choice, step]
  if case.head_dim <= mosaic.MAX_DENSE_HEAD_DIM:
    functions.append(warm_up_kl)
  return {
    function.__name__: jax.jit(function)
    .trace(*shapes_of(case))
    .lower(lowering_platforms=("cuda",))
    .as_text()
    for function in functions
  }


def real_case(tokens, heads, kv_heads, dim=128, block_size=128, top_k=16):
  return Case(
    q_len=tokens, kv_len=tokens, num_heads=heads, num_kv_heads=kv_heads,
    head_dim=dim, index_dim=dim, block_size=block_size, top_k=top_k,
  )  # fmt: skip


@SLOW
@pytest.mark.parametrize(
  "case",
  [
    real_case(1 << 15, 48, 8),  # MiniMax-M2
    real_case(1 << 15, 40, 8),  # Qwen3-14B
    real_case(1 << 15, 32, 8),  # Llama 3 8B
    real_case(1 << 13, 9, 3, dim=64),  # SmolLM2-135M
    real_case(1 << 13, 32, 32, dim=80),
    real_case(1 << 13, 24, 2, dim=96, block_size=64),
  ],
  ids=str,
)
def test_lowers_for_cuda(case):
  for text in kernels_of(case).values():
    assert "mosaic_gpu" in text


@SLOW
def test_lowers_many_choices():
  texts = kernels_of(real_case(1 << 14, 64, 4, top_k=64))
  assert all("mosaic_gpu" in text for text in texts.values())


def test_a_choice_fits_31_bits():
  for group_size, walk in itertools.product(range(1, 17), (False, True)):
    g = sparse_attention_fwd.geometry(
      1 << 15, mosaic.MAX_BLOCKS * 64, mosaic.Packing(group_size),
      128, 64, mosaic.MAX_TOP_K,
      sparse_attention_fwd.Config(), walk=walk,
    )  # fmt: skip
    assert g.tile * g.top_k <= g.choice.pack(1, 0)
    last = g.choice.pack(g.num_blocks, 0) - 1
    assert last < mosaic.NEVER


# ---------------------------------------------------------------- 64-bit JAX


def kernel_texts(text):
  """The kernels of a lowered program as MLIR without source locations."""
  from jax._src.interpreters import mlir
  from jax._src.lib import mosaic_gpu_dialect
  from jaxlib.mlir import ir

  def unescaped(match):
    escape = match.group(1)
    return chr(int(escape, 16)) if len(escape) == 2 else escape

  context = mlir.make_ir_context()
  context.allow_unregistered_dialects = True
  mosaic_gpu_dialect.register_dialect(context)
  context.load_all_available_dialects()
  texts = []
  for raw in re.findall(r'module = "((?:[^"\\]|\\.)*)"', text):
    raw = re.sub(r'\\([0-9A-F]{2}|["\\])', unescaped, raw)
    with context, ir.Location.unknown():
      module = ir.Module.parse(raw.encode("latin-1"))
      plain = module.operation.get_asm(enable_debug_info=False)
    # A number that counts the kernels of this process.
    texts.append(re.sub(r'dump_basename = "[^"]*"', "", plain))
  return texts


@SLOW
def test_64_bit_jax_lowers_the_same_kernels():
  case = real_case(1 << 13, 64, 4)
  want = kernels_of(case)
  with jax.enable_x64(True):
    got = kernels_of(case)
  for name, text in want.items():
    kernels = kernel_texts(text)
    assert kernels
    assert kernel_texts(got[name]) == kernels, name


@SLOW
def test_quick_lowering_gives_the_same_text(monkeypatch):
  """conftest makes JAX 0.11.2 lower kernels in less time, on GPUs too."""
  site = layout_inference.ValueSite
  if not hasattr(site, "slow_str"):
    pytest.skip("conftest leaves this JAX as it is")
  case = real_case(1 << 13, 32, 8)
  quick = kernels_of(case)
  jax.clear_caches()
  monkeypatch.setattr(site, "__str__", site.slow_str)
  for name, text in kernels_of(case).items():
    kernels = kernel_texts(text)
    assert kernels
    assert kernel_texts(quick[name]) == kernels, name


@SLOW
def test_64_bit_jax_does_not_change_a_bit():
  """Traced in 64-bit JAX; the interpreter itself is lowered in 32 bits.

  JAX 0.11.2 lowers the interpreter's loops with indices of both widths.
  """
  case = padded_case(3, 1, 64, 64)
  q, k, v, dout = attention_inputs(case, jnp.bfloat16)
  *_, index_q, index_k = case.inputs(dtype=jnp.bfloat16)
  lse = jnp.zeros((case.batch, case.num_heads, case.q_len), jnp.float32)
  blocks = random_blocks(case)
  decoding = test_kernels_decode.Case(
    lengths=(140, 3), capacity=144, num_heads=2, top_k=2
  )
  *tokens, _ = decoding.inputs()
  interpreted = dict(interpret=True)

  def kl(config, blocks):
    def loss(index_q, index_k):
      return index_kl.index_kl_loss(
        q, k, index_q, index_k, blocks, lse=lse, block_size=64,
        kv_lengths=case.lengths, config=config, **interpreted,
      )  # fmt: skip

    return jax.value_and_grad(loss, (0, 1))

  def attention(q, k, v):
    (out, lse), pull = jax.vjp(functools.partial(attend_to, blocks), q, k, v)
    return out, lse, pull((dout, jnp.zeros_like(lse)))

  def attend_to(blocks, q, k, v):
    return attend(case, q, k, v, blocks)

  calls = [
    (attention, (q, k, v)),
    (kl(index_kl.Config(stages=2, task=64, num_ctas=1), blocks),
     (index_q, index_k)),
    (kl(test_kernels_kl.INTERPRETED_DENSE, None), (index_q, index_k)),
    (functools.partial(
      select_blocks.select_blocks, block_size=64, top_k=2,
      kv_lengths=case.lengths, config=test_kernels_select.SMALL, **interpreted,
    ), (index_q, index_k)),
    (functools.partial(
      decode.decode_attention, block_size=64, top_k=2,
      kv_lengths=jnp.array(decoding.lengths), config=test_kernels_decode.SMALL,
      **interpreted,
    ), tokens),
  ]  # fmt: skip
  for function, args in calls:
    want = jax.jit(function)(*args)
    with jax.enable_x64(True):
      traced = jax.jit(lambda *x, f=function: f(*x)).trace(*args)
    assert_same_bits(traced.lower().compile()(*args), want)
    assert all(
      a.dtype == b.dtype
      for a, b in zip(jax.tree.leaves(traced.out_info), jax.tree.leaves(want))
    )


@pytest.fixture(params=[True, False], ids=["all with all", "in steps"])
def compares_all(request, monkeypatch):
  """Short arrays are computed in another way than long ones."""
  if not request.param:
    monkeypatch.setattr(mosaic, "ALL_WITH_ALL", 0)


@pytest.mark.usefixtures("compares_all")
def test_counts_of_values_up_to_each_number():
  values = np.array([3, 0, 3, 7, 9, 40])
  found = mosaic.counts_up_to(jnp.asarray(values), 10)
  assert found.tolist() == [np.sum(values <= i) for i in range(10)]


@pytest.mark.usefixtures("compares_all")
def test_sums_of_values_up_to_each():
  values = np.array([[3, 0, 7, -2], [0, 1, 0, 5]])
  found = mosaic.sums_up_to(jnp.asarray(values))
  assert found.tolist() == np.cumsum(values, axis=1).tolist()


@pytest.mark.parametrize(
  "n, most", [(5, 5), (32, 40), (100, 64), (512, 300), (1100, 1200)]
)
def test_places_of_set_flags(n, most):
  rng = np.random.default_rng(n)
  flags = rng.random((3, 8, n)) < np.linspace(0, 1, 8)[None, :, None]
  wanted = np.sort(np.where(flags, np.arange(n), n), axis=-1)[..., :most]
  behind = ((0, 0), (0, 0), (0, max(most - n, 0)))
  wanted = np.pad(wanted, behind, constant_values=n)
  places = jax.jit(mosaic.places_of, static_argnums=1)(flags, most)
  np.testing.assert_array_equal(places, wanted)


@pytest.mark.usefixtures("compares_all")
@pytest.mark.parametrize("size", [1, 2, 37, 64])
def test_counts_of_values_below_bounds(size):
  rng = np.random.default_rng(size)
  last = 0xFFFFFFFF
  values = rng.integers(0, 20, size, np.uint32) << 27
  values[size // 2 :: 7] = last
  values = np.sort(values)
  bounds = np.array([0, 1, 5 << 27, 7 << 27, (7 << 27) + 1, last], np.uint32)
  found = mosaic.counts_below(jnp.asarray(values), jnp.asarray(bounds))
  assert found.tolist() == [np.sum(values < x) for x in bounds]
