"""The KL kernels: interpreted, lowered, run on Hopper."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import op_contract
import pytest
from helpers import (
  HOPPER_CASES,
  LOWERED,
  LOWERED_NAMES,
  Case,
  patterns,
  random_blocks,
)
from op_contract import SPARSE_KL, KLContract, check_kl, kl_and_gradients

from benchmarks import cases
from pallas_kernels import dense_index_kl, index_kl, mosaic

# On the CPU: one CTA, small tasks; chunks of one unit's queries.
INTERPRETED = index_kl.Config(stages=2, task=64, num_ctas=1)
INTERPRETED_DENSE = dense_index_kl.Config(stages=2, workspace=1, num_ctas=1)
# On a GPU: every way to go through the work, beside the default one.
CONFIGS = (
  index_kl.Config(stages=2),
  index_kl.Config(task=128),
  index_kl.Config(task=1024),
  index_kl.Config(pairs=1 << 19),
)
DENSE_CONFIGS = (
  dense_index_kl.Config(stages=2),
  dense_index_kl.Config(workspace=1 << 27),
)


# One program: the reference and the plan have many small operations.
@functools.partial(
  jax.jit, static_argnums=0, static_argnames=("config", "interpret")
)
def run(case, *args, mask=None, config=None, interpret=False):
  """Value and gradients, with the reference's lse."""
  loss = functools.partial(
    index_kl.index_kl_loss, config=config, interpret=interpret
  )
  return kl_and_gradients(case, *args, mask, loss=loss)


# ------------------------------------------------------------ interpret mode


class TestInterpreted(KLContract):
  repeats = False  # the interpreter takes ten seconds a call
  # The launches of rows, below, are of this case.
  # Rows of 16 heads and heads of 128 columns: test_all_tokens.
  # Queries that do not count, and NaN, have blocks in several tasks; packed
  # documents have blocks of 64 tokens.
  slow = tuple(SPARSE_KL)
  slow_dense = ("batch",)  # rows of all lengths are a batch, too

  def run(self, name, case, q, k, index_q, index_k, blocks, mask=None):
    config = INTERPRETED if blocks is not None else INTERPRETED_DENSE
    if blocks is not None and name == "nan":
      # Two chunks, and block 0 split over tasks.
      config = dataclasses.replace(config, task=24, chunk=40)
    if blocks is None and name == "rows":  # two batch rows a launch
      config = dataclasses.replace(config, workspace=2 * 2 * 256 * 256)
    return run(
      case, q, k, index_q, index_k, blocks, mask=mask, config=config,
      interpret=True,
    )  # fmt: skip


@pytest.mark.parametrize(
  "share", [4, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 1))]
)
def test_interpreted_launches_of_rows_and_groups(share):
  case = SPARSE_KL["rows"]
  q, k, _, index_q, index_k = case.inputs(dtype=jnp.bfloat16)
  blocks = random_blocks(case)
  mask = jnp.arange(case.batch * case.q_len).reshape(case.batch, -1) % 5 != 3
  # Two rows a launch, in chunks; one row; one group.
  config = dataclasses.replace(
    INTERPRETED, pairs=case.q_len * case.top_k * share, chunk=5 * (share == 4)
  )
  args = (case, q, k, index_q, index_k, blocks)
  got = run(*args, mask=mask, config=config, interpret=True)
  check_kl(*args, got, mask)


@pytest.mark.parametrize(
  "first, end",
  [
    ((-300,), (500,)),
    ((7, 512), (1031, 1200)),
    ((-2000, 512, -1024, 0), (0, 1536, 0, 1024)),
  ],
)
def test_units_are_those_with_a_visible_pair(first, end):
  first, end = np.int32(first), np.int32(end)
  units, count = dense_index_kl._visible_units(first, end, 1024, 1536)
  query = first[:, None, None] + np.arange(1024)[:, None]
  key = np.arange(1536)
  visible = (key <= query) & (key < end[:, None, None])
  visible = visible.reshape(-1, 4, 256, 6, 256).any((2, 4))
  np.testing.assert_array_equal(units[:count], np.argwhere(visible))


# ------------------------------------------------------------------ lowering


@pytest.mark.parametrize("name", LOWERED_NAMES)
def test_lowers_for_cuda(name):
  texts = lowered(LOWERED[name], dense=False)
  assert all("kl_kv_blocks" in x and "kl_index_lse" in x for x in texts)


@pytest.mark.parametrize(
  "name, weighted",
  [
    ("128k", True),
    ("small_heads_32k", False),
    *(
      pytest.param(name, weighted, marks=pytest.mark.slow)
      for name, weighted in (
        *(("8k", False), ("32k", False), ("16x4k_16_heads", True)),
      )
    ),
  ],
)
def test_lowers_for_cuda_over_all_tokens(name, weighted):
  texts = lowered((cases.CASES | LOWERED)[name], dense=True, weighted=weighted)
  assert all("dense_kl_units" in x and "dense_kl_index_lse" in x for x in texts)


def lowered(case, dense, weighted=False):
  """The KL loss and its gradients of a case, lowered.

  `weighted` gives the queries weights.
  """
  q_lead, kv_lead = (case.batch, case.tokens), (case.batch, case.kv_tokens)
  shape = functools.partial(jax.ShapeDtypeStruct, dtype=case.dtype)
  ids = (case.batch, case.num_kv_heads, case.tokens, case.top_k)
  shapes = (
    shape((*q_lead, case.num_kv_heads, case.index_dim)),
    shape((*kv_lead, case.index_dim)),
    shape((*q_lead, case.num_heads, case.head_dim)),
    shape((*kv_lead, case.num_kv_heads, case.head_dim)),
    jax.ShapeDtypeStruct(ids, jnp.int32),
    jax.ShapeDtypeStruct(
      (case.batch, case.num_heads, case.tokens), jnp.float32
    ),
    jax.ShapeDtypeStruct(q_lead, jnp.float32) if weighted else None,
  )

  def loss(index_q, index_k, q, k, ids, lse, weights):
    return index_kl.index_kl_loss(
      q,
      k,
      index_q,
      index_k,
      None if dense else ids,
      lse=lse,
      block_size=case.block_size,
      query_mask=weights,
    )

  return [
    jax.jit(function)
    .trace(*shapes)
    .lower(lowering_platforms=("cuda",))
    .as_text()
    for function in (loss, jax.value_and_grad(loss, (0, 1)))
  ]


@pytest.mark.parametrize("largest", [3e-30, 0.7, 1.0, 5.0, 5e37])
def test_weights_are_divided_by_a_power_of_two(largest):
  weights = np.float32([[0.0, 1e-3 * largest, largest]])
  got = np.asarray(index_kl._weights_up_to_1(jnp.asarray(weights)))
  assert 0.5 <= got.max() < 1 and got[0, 0] == 0
  _, exponent = np.frexp(weights.max())
  np.testing.assert_array_equal(got, np.ldexp(weights, -exponent))


def test_weights_without_a_largest_one():
  for value in (np.inf, np.nan):  # so the loss is NaN
    weights = index_kl._weights_up_to_1(jnp.array([[1.0, value]]))
    assert not np.isfinite(np.sum(weights))
  assert 0 < index_kl._weights_up_to_1(jnp.full((1, 1), 3e38))[0, 0] < 4
  assert not np.any(index_kl._weights_up_to_1(jnp.zeros((1, 2))))


def test_only_the_index_branch_gets_a_gradient():
  case = SPARSE_KL["group_16"]
  q, k, _, index_q, index_k = case.inputs(dtype=jnp.bfloat16)
  lse = jnp.zeros((1, 32, 6), jnp.float32)

  def loss(q, k, lse):
    return index_kl.index_kl_loss(
      q, k, index_q, index_k, random_blocks(case), lse=lse
    )

  jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(q, k, lse)
  # Nothing to compute: the zeros are constants.
  assert "kl_kv_blocks" not in str(jaxpr.eqns[-1])


# ------------------------------------------------------------------- Hopper


@functools.cache
def compiled(case, config, with_mask=False):
  if with_mask:
    return jax.jit(lambda *x: run(case, *x[:-1], mask=x[-1], config=config))
  return jax.jit(functools.partial(run, case, config=config))


def run_twice(case, args, config=None):
  check = functools.partial(check_kl, case)
  return op_contract.run_twice(compiled(case, config), check, *args)


@pytest.mark.gpu
@pytest.mark.parametrize("name", HOPPER_CASES)
def test_gpu_patterns(hopper, name):
  case, dtype = HOPPER_CASES[name]
  q, k, _, index_q, index_k = case.inputs(dtype=dtype)
  for blocks in patterns(case).values():
    run_twice(case, (q, k, index_q, index_k, blocks))


@pytest.mark.gpu
@pytest.mark.parametrize(
  "name",
  [
    name
    for name, (case, _) in HOPPER_CASES.items()
    if case.head_dim <= mosaic.MAX_DENSE_HEAD_DIM
  ],
)
def test_gpu_over_all_tokens(hopper, name):
  case, dtype = HOPPER_CASES[name]
  q, k, _, index_q, index_k = case.inputs(dtype=dtype)
  run_twice(case, (q, k, index_q, index_k, None))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["paper_heads", "ragged_batch"])
def test_gpu_configs_over_all_tokens(hopper, name):
  case, dtype = HOPPER_CASES[name]
  q, k, _, index_q, index_k = case.inputs(dtype=dtype)
  for config in DENSE_CONFIGS:
    run_twice(case, (q, k, index_q, index_k, None), config)


@pytest.mark.gpu
def test_gpu_launches_of_rows_over_all_tokens(hopper):
  case, dtype = HOPPER_CASES["ragged_rows"]
  q, k, _, index_q, index_k = case.inputs(dtype=dtype)
  row = case.num_kv_heads * 512 * 1280  # in units of 256
  for workspace in (4 * row, 2 * row, row, row // 2):
    config = dense_index_kl.Config(workspace=workspace)
    run_twice(case, (q, k, index_q, index_k, None), config)


@pytest.mark.gpu
def test_gpu_small_chunks_over_all_tokens(hopper):
  case, dtype = HOPPER_CASES["ragged_batch"]
  q, k, _, index_q, index_k = case.inputs(dtype=dtype)
  config = dense_index_kl.Config(workspace=1, num_ctas=7)
  run_twice(case, (q, k, index_q, index_k, None), config)


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("name", ["paper_heads"])
def test_gpu_configs(hopper, name, config):
  case, dtype = HOPPER_CASES[name]
  q, k, _, index_q, index_k = case.inputs(dtype=dtype)
  for pattern in ("random", "sharing", "all_on_block_0"):
    run_twice(case, (q, k, index_q, index_k, patterns(case)[pattern]), config)


@pytest.mark.gpu
def test_gpu_small_chunks_and_tasks(hopper):
  case, dtype = HOPPER_CASES["ragged_batch"]
  q, k, _, index_q, index_k = case.inputs(dtype=dtype)
  config = index_kl.Config(task=72, chunk=100, num_ctas=7)
  run_twice(case, (q, k, index_q, index_k, random_blocks(case)), config)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("group", [1, 2, 3, 4])
def test_gpu_small_groups(hopper, group, head_dim):
  """Row tiles of 32 or 64 queries; several tasks of pair tiles for each CTA.

  Two of four configs: each meets every group size and every head dim.
  """
  case = Case(
    batch=2, q_len=700, kv_len=1408, num_heads=2 * group, num_kv_heads=2,
    head_dim=head_dim, index_dim=min(head_dim, 128), block_size=128, top_k=8,
    kv_lengths=(1408, 301),
  )  # fmt: skip
  q, k, _, index_q, index_k = case.inputs(dtype="bfloat16")
  choices = patterns(case)
  ways = (
    ("random", index_kl.Config()),
    ("all_on_block_0", index_kl.Config(task=72, num_ctas=7)),
    ("sharing", index_kl.Config(task=200, num_ctas=3)),
    ("some_rows_empty", index_kl.Config(stages=2, chunk=100, num_ctas=7)),
  )
  first = (group + head_dim // 64) % 2
  for name, config in ways[first::2]:
    run_twice(case, (q, k, index_q, index_k, choices[name]), config)


@pytest.mark.gpu
@pytest.mark.parametrize("group", [2, 4])
def test_gpu_nan_of_one_query_of_a_small_group(hopper, group):
  case = Case(
    q_len=300, kv_len=900, num_heads=2 * group, num_kv_heads=2, head_dim=128,
    index_dim=128, block_size=128, top_k=4,
  )  # fmt: skip
  q, k, _, index_q, index_k = case.inputs(dtype="bfloat16")
  _, (diq, dik) = compiled(case, None)(
    q.at[0, 77, 1].set(jnp.nan), k, index_q, index_k, random_blocks(case)
  )
  where = np.zeros((300, 2), bool)
  where[77, 0] = True
  np.testing.assert_array_equal(np.isnan(diq).any((0, 3)), where)
  chosen = np.asarray(random_blocks(case))[0, 0, 77]
  seen = np.isin(np.arange(900) // 128, chosen)
  seen &= np.arange(900) <= case.positions()[0, 77]
  np.testing.assert_array_equal(np.isnan(dik[0]).any(-1), seen)


@pytest.mark.gpu
def test_gpu_launches_of_rows_and_groups(hopper):
  case, dtype = HOPPER_CASES["ragged_rows"]
  q, k, _, index_q, index_k = case.inputs(dtype=dtype)
  args = (q, k, index_q, index_k, random_blocks(case))
  row = case.q_len * case.top_k * case.num_kv_heads
  # All rows at once, two, one, and one group.
  want, *others = (
    run_twice(case, args, index_kl.Config(pairs=pairs, task=128))
    for pairs in (1 << 21, 2 * row, row, row // 2)
  )
  # A block's sums do not depend on who else is in the launch.
  for _, (_, dik) in others:
    assert np.asarray(dik).tobytes() == np.asarray(want[1][1]).tobytes()
  config = index_kl.Config(pairs=2 * row, chunk=77, task=72, num_ctas=7)
  run_twice(case, args, config)


@pytest.mark.gpu
@pytest.mark.gpu_memory
def test_gpu_rows_beside_each_other_are_rows_alone(hopper):
  # As many pairs as a launch takes.
  case = Case(
    batch=16, q_len=4096, kv_len=4096, num_heads=16, num_kv_heads=2,
    head_dim=128, index_dim=128, block_size=128, top_k=16,
  )  # fmt: skip
  q, k, _, index_q, index_k = case.inputs(dtype=jnp.bfloat16)
  blocks = random_blocks(case)
  lse = jax.random.normal(jax.random.key(5), (16, 16, 4096)) + 8

  @functools.partial(jax.jit, static_argnames="batch")
  def loss_and_grads(*args, batch):
    q, k, index_q, index_k, blocks, lse = args

    def loss(index_q, index_k):
      # The sum over rows, instead of the mean.
      return batch * index_kl.index_kl_loss(
        q, k, index_q, index_k, blocks, lse=lse,
        config=index_kl.Config(task=2048),
      )  # fmt: skip

    return jax.value_and_grad(loss, (0, 1))(index_q, index_k)

  args = (q, k, index_q, index_k, blocks, lse)
  value, grads = loss_and_grads(*args, batch=16)
  alone = [
    loss_and_grads(*(x[i : i + 1] for x in args), batch=1) for i in range(16)
  ]
  total = sum(float(x) for x, _ in alone)
  # Sums over all pairs in float32, in another order.
  np.testing.assert_allclose(value, total, rtol=1e-4)
  for i, (_, each) in enumerate(alone):
    for a, b in zip(each, grads):
      a, b = (np.asarray(x, np.float32)[0] for x in (a, b[i : i + 1]))
      assert np.abs(a - b).max() <= 2**-7 * np.abs(a).max()


@pytest.mark.gpu
@pytest.mark.parametrize("dense", [False, True])
def test_gpu_tiny_probabilities(hopper, dense):
  """The sum over heads is a normal number, but its mean would not be.

  The GPU's approximate log2 takes such numbers for 0 and gives -inf. Random
  queries do not get there; a trained model's did. (XLA on a CPU flushes such
  numbers everywhere, so interpret mode cannot show it.)
  """
  case = Case(
    q_len=8, kv_len=128, num_heads=3, num_kv_heads=1, head_dim=64, index_dim=64,
    block_size=128, top_k=1,
  )  # fmt: skip
  q, k, _, index_q, index_k = map(
    jnp.zeros_like, case.inputs(dtype=jnp.bfloat16)
  )
  # Scores: 0 of the first key; -87 and, in the other heads, -200 of all others.
  k = k.at[:, 1:, :, 0].set(-1.0)
  q = q.at[..., 0].set(jnp.array([696, 1600, 1600], jnp.bfloat16))
  blocks = None if dense else random_blocks(case)
  run_twice(case, (q, k, index_q, index_k, blocks))


@pytest.mark.gpu
def test_gpu_mask_and_nan(hopper):
  case = dataclasses.replace(HOPPER_CASES["paper_heads"][0], q_len=300)
  q, k, _, index_q, index_k = case.inputs(dtype="bfloat16")
  blocks = np.array(random_blocks(case))
  blocks[blocks == 4] = -1
  blocks = jnp.asarray(blocks)
  mask = jnp.arange(300)[None] % 7 != 3
  bad = [x.at[:, 512:640].set(jnp.nan) for x in (k, index_k)]
  q_bad, index_q_bad = (
    jnp.where(mask.reshape(1, 300, 1, 1), x, jnp.nan) for x in (q, index_q)
  )
  got = compiled(case, None, True)(
    q_bad, bad[0], index_q_bad, bad[1], blocks, mask
  )
  check_kl(case, q, k.at[:, 512:640].set(0), index_q,
        index_k.at[:, 512:640].set(0), blocks, got, mask)  # fmt: skip
  # A counted query that holds NaN: its row, its keys and the value.
  value, (diq, dik) = compiled(case, None)(
    q.at[0, 77, 3].set(jnp.nan), k, index_q, index_k, blocks
  )
  assert np.isnan(value)
  diq, dik = (np.isnan(np.asarray(x, np.float32)) for x in (diq, dik))
  np.testing.assert_array_equal(np.argwhere(diq.any((0, 3))), [[77, 0]])
  chosen = np.isin(np.arange(case.kv_len) // 128, np.asarray(blocks)[0, 0, 77])
  chosen &= np.arange(case.kv_len) <= case.positions()[0, 77]
  np.testing.assert_array_equal(dik[0].any(-1), chosen)


@pytest.mark.gpu
def test_gpu_mask_and_nan_over_all_tokens(hopper):
  case = dataclasses.replace(
    HOPPER_CASES["paper_heads"][0], q_len=600, kv_lengths=(1300,)
  )
  q, k, _, index_q, index_k = case.inputs(dtype="bfloat16")
  mask = jnp.arange(600)[None] % 7 != 3
  bad_k, bad_index_k = (x.at[:, 1300:].set(jnp.nan) for x in (k, index_k))
  bad_q, bad_index_q = (
    jnp.where(mask.reshape(1, 600, 1, 1), x, jnp.nan) for x in (q, index_q)
  )
  got = compiled(case, None, True)(
    bad_q, bad_k, bad_index_q, bad_index_k, None, mask
  )
  check_kl(case, q, k, index_q, index_k, None, got, mask)
  # A counted query that holds NaN, and an index key that the last ones see.
  value, (diq, dik) = compiled(case, None)(
    q.at[0, 77, 3].set(jnp.nan), k, index_q, index_k.at[0, 1290].set(jnp.inf),
    None,
  )  # fmt: skip
  assert np.isnan(value)
  where = np.zeros((600, 4), bool)
  where[77, 0] = where[590:] = True
  np.testing.assert_array_equal(np.isnan(diq).any((0, 3)), where)
  np.testing.assert_array_equal(
    np.isnan(dik[0]).any(-1), np.arange(case.kv_len) < 1300
  )


@pytest.mark.gpu
@pytest.mark.parametrize("dense", [False, True])
def test_gpu_under_vmap(hopper, dense):
  case, dtype = HOPPER_CASES["group_4"]
  q, k, _, index_q, index_k = case.inputs(dtype=dtype)
  blocks = None if dense else random_blocks(case)
  two = [jnp.stack([x, x[:, ::-1]]) for x in (q, k, index_q, index_k)]
  got = jax.vmap(compiled(case, None), (0, 0, 0, 0, None))(*two, blocks)
  for i in range(2):
    one = jax.tree.map(lambda x, i=i: x[i], got)
    check_kl(case, *(x[i] for x in two), blocks, one)
