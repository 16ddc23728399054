"""The KL kernels: interpreted, lowered, run on Hopper."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import HOPPER_CASES, LOWERED, Case, patterns, random_blocks

from benchmarks import cases
from msa_jax import reference
from pallas_kernels import dense_index_kl, index_kl

# On the CPU: one CTA, small tasks; chunks of one unit's queries.
INTERPRETED = index_kl.Config(stages=2, task=64, num_ctas=1)
INTERPRETED_DENSE = dense_index_kl.Config(stages=2, workspace=1, num_ctas=1)


@functools.partial(jax.jit, static_argnames=("case", "dtype"))
def formula(case, q, k, index_q, index_k, blocks, mask, dtype=None):
  """KL, its gradients, and the part of them that comes from r, in float32.

  `dtype` rounds what a kernel has to round: p of each head, and g = r - p.
  """
  rounded = (
    (lambda x: x.astype(dtype).astype(x.dtype)) if dtype else lambda x: x
  )
  q, k, index_q, index_k = (
    x.astype(jnp.float32) for x in (q, k, index_q, index_k)
  )
  positions = reference.query_positions(
    case.q_len, case.kv_len, case.batch, case.lengths
  )
  if blocks is None:
    visible = reference.causal_tokens(positions, case.kv_len)
  else:
    visible = reference.chosen_tokens(
      blocks, positions, case.kv_len, case.block_size
    )
  visible &= mask[:, None, :, None]
  s = reference.head_scores(q, k, visible, case.head_dim**-0.5)
  p = reference.softmax(s, reference.masked_logsumexp(s))
  p = jnp.mean(rounded(p), axis=2)
  u = case.index_dim**-0.5 * reference.index_scores(index_q, index_k)
  u = jnp.where(visible, u, -jnp.inf)
  lse = reference.masked_logsumexp(u)
  r = reference.softmax(u, lse)
  log_r = jnp.where(
    visible, u - jnp.where(lse == -jnp.inf, 0, lse)[..., None], 0
  )
  log_p = jnp.log(jnp.where(p > 0, p, 1))
  counted = jnp.maximum(mask.sum(), 1) * case.num_kv_heads
  value = jnp.sum(p * (log_p - log_r)) / counted

  def gradients(g):
    g = g * (case.index_dim**-0.5 / counted)
    einsum = functools.partial(jnp.einsum, precision="highest")
    return (
      einsum("bkts,bsi->btki", g, index_k),
      einsum("bkts,btki->bsi", g, index_q),
    )

  return value, gradients(rounded(r - p)), gradients(r)


def inputs(case, dtype, seed=0):
  q, k, v, index_q, index_k = case.inputs(seed, dtype=dtype)
  return q, k, v, index_q, index_k


def run(
  case, q, k, index_q, index_k, blocks, mask=None, config=None, **options
):
  """Value and gradients, with the reference's lse."""
  options |= dict(kv_lengths=case.lengths)
  attention = dict(scale=case.head_dim**-0.5, kv_lengths=case.lengths)
  if blocks is None:
    _, lse = reference.warmup_attention(q, k, k, **attention)
  else:
    _, lse = reference.sparse_attention(
      q, k, k, blocks, block_size=case.block_size, **attention
    )

  # As with a loss scale: the gradients of a mean are below float16's range.
  factor = 1024.0 if q.dtype == jnp.float16 else 1.0

  def loss(index_q, index_k):
    value = index_kl.index_kl_loss(
      q, k, index_q, index_k, blocks, lse=lse, block_size=case.block_size,
      query_mask=mask, config=config, **options,
    )  # fmt: skip
    return factor * value, value

  grad = jax.grad(loss, (0, 1), has_aux=True)
  grads, value = grad(index_q, index_k)
  assert all(x.dtype == q.dtype for x in grads)
  return value, [x.astype(jnp.float32) / factor for x in grads]


def check(case, q, k, index_q, index_k, blocks, got, mask=None):
  dtype = q.dtype
  if mask is None:
    mask = jnp.ones((case.batch, case.q_len), bool)
  args = (case, q, k, index_q, index_k, blocks, mask)
  true, grads, scales = formula(*args)
  near, near_grads, _ = formula(*args, dtype=dtype)
  value, got_grads = got
  assert value.dtype == jnp.float32 and value.shape == ()
  # A sum over all pairs in float32, of terms with p rounded.
  assert abs(value - true) <= 2 * abs(near - true) + 2e-4 * abs(true)
  eps = float(jnp.finfo(dtype).eps)
  for name, x, want, close, scale in zip(
    ("dindex_q", "dindex_k"), got_grads, grads, near_grads, scales
  ):
    x, want, close, scale = (
      np.asarray(y, np.float32) for y in (x, want, close, scale)
    )
    assert np.all(np.isfinite(x)), name
    np.testing.assert_array_equal(x[scale == 0], 0.0, err_msg=name)
    error = np.abs(x - want)
    # The floor is one ulp of the r part: gradients are differences r - p, whose
    # partials are rounded once and their sum once.
    floor = eps * np.abs(scale).max()
    assert error.max() <= 2 * np.abs(close - want).max() + floor, name
    assert np.linalg.norm(error) <= 0.005 * np.linalg.norm(scale), name


# ------------------------------------------------------------ interpret mode

CASES = {
  # A ragged batch, T < S, a row shorter than T, pairs of blocks of 64, G 8.
  "block_64": Case(
    batch=2, q_len=7, kv_len=250, num_heads=8, num_kv_heads=1, head_dim=64,
    index_dim=64, block_size=64, top_k=3, kv_lengths=(250, 5),
  ),
  # Two groups of 16 heads.
  "group_16": Case(
    q_len=6, kv_len=270, num_heads=32, num_kv_heads=2, head_dim=128,
    index_dim=128, block_size=128, top_k=2,
  ),
  # Rows of all lengths.
  "rows": Case(
    batch=4, q_len=9, kv_len=140, num_heads=16, num_kv_heads=2, head_dim=64,
    index_dim=64, block_size=128, top_k=2, kv_lengths=(140, 5, 0, 133),
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_interpreted(name):
  case = CASES[name]
  q, k, _, index_q, index_k = inputs(case, jnp.bfloat16)
  blocks = random_blocks(case)
  got = run(
    case, q, k, index_q, index_k, blocks, config=INTERPRETED, interpret=True
  )
  check(case, q, k, index_q, index_k, blocks, got)


@pytest.mark.parametrize("share", [4, 2, 1])
def test_interpreted_launches_of_rows_and_groups(share):
  case = CASES["rows"]
  q, k, _, index_q, index_k = inputs(case, jnp.bfloat16)
  blocks = random_blocks(case)
  mask = jnp.arange(case.batch * case.q_len).reshape(case.batch, -1) % 5 != 3
  # Two rows a launch, in chunks; one row; one group.
  config = dataclasses.replace(
    INTERPRETED, pairs=case.q_len * case.top_k * share, chunk=5 * (share == 4)
  )
  args = (case, q, k, index_q, index_k, blocks)
  got = run(*args, mask, config=config, interpret=True)
  check(*args, got, mask)


def test_interpreted_masks_splits_and_keeps_nan_out():
  case = Case(
    q_len=70, kv_len=384, num_heads=1, num_kv_heads=1, head_dim=64,
    index_dim=64, block_size=128, top_k=2,
  )  # fmt: skip
  q, k, _, index_q, index_k = inputs(case, jnp.float16)
  blocks = np.tile(np.int32([0, 2]), (1, 1, 70, 1))
  blocks[:, :, 5] = -1
  blocks = jnp.asarray(blocks)
  mask = jnp.arange(70)[None] != 3
  # Nobody chose block 1, and query 3 does not count.
  k, index_k = (x.at[:, 128:256].set(jnp.nan) for x in (k, index_k))
  q, index_q = q.at[0, 3].set(jnp.nan), index_q.at[0, 3].set(jnp.nan)
  # Two chunks, and block 0 split over tasks.
  config = dataclasses.replace(INTERPRETED, task=24, chunk=40)
  got = run(
    case, q, k, index_q, index_k, blocks, mask, config=config, interpret=True
  )
  k, index_k = (x.at[:, 128:256].set(0) for x in (k, index_k))
  q, index_q = q.at[0, 3].set(0), index_q.at[0, 3].set(0)
  check(case, q, k, index_q, index_k, blocks, got, mask)


DENSE_CASES = {
  # Ragged, T < S, a row shorter than T, G 16.
  "batch": (Case(
    batch=2, q_len=70, kv_len=250, num_heads=16, num_kv_heads=1, head_dim=64,
    index_dim=128, kv_lengths=(250, 5),
  ), "bfloat16"),
  # Rows of all lengths, two a launch.
  "rows": (Case(
    batch=4, q_len=70, kv_len=250, num_heads=2, num_kv_heads=2, head_dim=64,
    index_dim=64, kv_lengths=(250, 5, 0, 100),
  ), "bfloat16"),
  # Two chunks, two groups of one head, queries that do not count.
  "chunks": (Case(
    q_len=300, kv_len=300, num_heads=2, num_kv_heads=2, head_dim=128,
    index_dim=64,
  ), "float16"),
}  # fmt: skip


@pytest.mark.parametrize("name", DENSE_CASES)
def test_interpreted_over_all_tokens(name):
  case, dtype = DENSE_CASES[name]
  q, k, _, index_q, index_k = inputs(case, dtype)
  mask = None
  if name == "chunks":
    mask = jnp.arange(case.q_len)[None] % 5 != 2
  config = INTERPRETED_DENSE
  if name == "rows":
    config = dataclasses.replace(config, workspace=2 * 2 * 256 * 256)
  args = (q, k, index_q, index_k, None)
  got = run(case, *args, mask, config, interpret=True)
  check(case, *args, got, mask)


@pytest.mark.parametrize("poisoned", [False, True])
def test_interpreted_over_all_tokens_keeps_nan_out(poisoned):
  case = Case(
    q_len=90, kv_len=140, num_heads=8, num_kv_heads=2, head_dim=64,
    index_dim=64, kv_lengths=(100,),
  )  # fmt: skip
  q, k, _, index_q, index_k = inputs(case, jnp.bfloat16)
  mask = jnp.arange(90)[None] != 3
  # Nobody sees these keys, and query 3 does not count.
  bad_k, bad_index_k = (x.at[:, 100:].set(jnp.nan) for x in (k, index_k))
  bad_q, bad_index_q = (x.at[:, 3].set(jnp.nan) for x in (q, index_q))
  if poisoned:
    # Query 60 stands at slot 70, key 97 is seen by queries 87 to 89.
    bad_index_q = bad_index_q.at[0, 60, 1, 0].set(jnp.inf)
    bad_index_k = bad_index_k.at[0, 97].set(jnp.nan)
  got = run(
    case, bad_q, bad_k, bad_index_q, bad_index_k, None, mask,
    INTERPRETED_DENSE, interpret=True,
  )  # fmt: skip
  if not poisoned:
    check(case, q, k, index_q, index_k, None, got, mask)
    return
  value, (diq, dik) = got
  assert np.isnan(value)
  where = np.zeros((90, 2), bool)
  where[60, 1] = where[87:] = True
  np.testing.assert_array_equal(np.isnan(diq).any((0, 3)), where)
  np.testing.assert_array_equal(np.isnan(diq).all((0, 3)), where)
  np.testing.assert_array_equal(np.isnan(dik[0]).all(-1), np.arange(140) < 100)
  assert np.all(np.asarray(dik[0, 100:]) == 0)


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


@pytest.mark.parametrize("name", LOWERED)
def test_lowers_for_cuda(name):
  texts = lowered(LOWERED[name], dense=False)
  assert all("kl_kv_blocks" in x and "kl_index_lse" in x for x in texts)


@pytest.mark.parametrize(
  "name", ["8k", "32k", "128k", "small_heads_32k", "16x4k_16_heads"]
)
def test_lowers_for_cuda_over_all_tokens(name):
  texts = lowered((cases.CASES | LOWERED)[name], dense=True)
  assert all("dense_kl_units" in x and "dense_kl_index_lse" in x for x in texts)


def lowered(case, dense):
  """The KL loss and its gradients of a case, lowered."""
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
  )

  def loss(index_q, index_k, q, k, ids, lse):
    return index_kl.index_kl_loss(
      q,
      k,
      index_q,
      index_k,
      None if dense else ids,
      lse=lse,
      block_size=case.block_size,
    )

  return [
    jax.jit(function)
    .trace(*shapes)
    .lower(lowering_platforms=("cuda",))
    .as_text()
    for function in (loss, jax.value_and_grad(loss, (0, 1)))
  ]


def test_only_the_index_branch_gets_a_gradient():
  case = CASES["group_16"]
  q, k, _, index_q, index_k = inputs(case, jnp.bfloat16)
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
  function = compiled(case, config)
  first, second = function(*args), function(*args)
  for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second)):
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
  check(case, *args, first)
  return first


@pytest.mark.gpu
@pytest.mark.parametrize("name", HOPPER_CASES)
def test_gpu_patterns(hopper, name):
  case, dtype = HOPPER_CASES[name]
  q, k, _, index_q, index_k = inputs(case, dtype)
  for blocks in patterns(case).values():
    run_twice(case, (q, k, index_q, index_k, blocks))


@pytest.mark.gpu
@pytest.mark.parametrize("name", HOPPER_CASES)
def test_gpu_over_all_tokens(hopper, name):
  case, dtype = HOPPER_CASES[name]
  q, k, _, index_q, index_k = inputs(case, dtype)
  run_twice(case, (q, k, index_q, index_k, None))


@pytest.mark.gpu
@pytest.mark.parametrize("config", dense_index_kl.candidate_configs(), ids=str)
def test_gpu_configs_over_all_tokens(hopper, config):
  for name in ("paper_heads", "ragged_batch"):
    case, dtype = HOPPER_CASES[name]
    q, k, _, index_q, index_k = inputs(case, dtype)
    run_twice(case, (q, k, index_q, index_k, None), config)


@pytest.mark.gpu
def test_gpu_launches_of_rows_over_all_tokens(hopper):
  case, dtype = HOPPER_CASES["ragged_rows"]
  q, k, _, index_q, index_k = inputs(case, dtype)
  row = case.num_kv_heads * 512 * 1280  # in units of 256
  for workspace in (4 * row, 2 * row, row, row // 2):
    config = dense_index_kl.Config(workspace=workspace)
    run_twice(case, (q, k, index_q, index_k, None), config)


@pytest.mark.gpu
def test_gpu_small_chunks_over_all_tokens(hopper):
  case, dtype = HOPPER_CASES["ragged_batch"]
  q, k, _, index_q, index_k = inputs(case, dtype)
  config = dense_index_kl.Config(workspace=1, num_ctas=7)
  run_twice(case, (q, k, index_q, index_k, None), config)


@pytest.mark.gpu
@pytest.mark.parametrize("config", index_kl.candidate_configs(), ids=str)
def test_gpu_configs(hopper, config):
  case, dtype = HOPPER_CASES["paper_heads"]
  q, k, _, index_q, index_k = inputs(case, dtype)
  for name in ("random", "sharing", "all_on_block_0"):
    run_twice(case, (q, k, index_q, index_k, patterns(case)[name]), config)


@pytest.mark.gpu
def test_gpu_small_chunks_and_tasks(hopper):
  case, dtype = HOPPER_CASES["ragged_batch"]
  q, k, _, index_q, index_k = inputs(case, dtype)
  config = index_kl.Config(task=72, chunk=100, num_ctas=7)
  run_twice(case, (q, k, index_q, index_k, random_blocks(case)), config)


@pytest.mark.gpu
def test_gpu_launches_of_rows_and_groups(hopper):
  case, dtype = HOPPER_CASES["ragged_rows"]
  q, k, _, index_q, index_k = inputs(case, dtype)
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
def test_gpu_rows_beside_each_other_are_rows_alone(hopper):
  # As many pairs as a launch takes.
  case = Case(
    batch=16, q_len=4096, kv_len=4096, num_heads=16, num_kv_heads=2,
    head_dim=128, index_dim=128, block_size=128, top_k=16,
  )  # fmt: skip
  q, k, _, index_q, index_k = inputs(case, jnp.bfloat16)
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
def test_gpu_mask_and_nan(hopper):
  case = dataclasses.replace(HOPPER_CASES["paper_heads"][0], q_len=300)
  q, k, _, index_q, index_k = inputs(case, "bfloat16")
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
  check(case, q, k.at[:, 512:640].set(0), index_q,
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
    HOPPER_CASES["paper_heads"][0], q_len=600, kv_lengths=(2000,)
  )
  q, k, _, index_q, index_k = inputs(case, "bfloat16")
  mask = jnp.arange(600)[None] % 7 != 3
  bad_k, bad_index_k = (x.at[:, 2000:].set(jnp.nan) for x in (k, index_k))
  bad_q, bad_index_q = (
    jnp.where(mask.reshape(1, 600, 1, 1), x, jnp.nan) for x in (q, index_q)
  )
  got = compiled(case, None, True)(
    bad_q, bad_k, bad_index_q, bad_index_k, None, mask
  )
  check(case, q, k, index_q, index_k, None, got, mask)
  # A counted query that holds NaN, and an index key that the last ones see.
  value, (diq, dik) = compiled(case, None)(
    q.at[0, 77, 3].set(jnp.nan), k, index_q, index_k.at[0, 1990].set(jnp.inf),
    None,
  )  # fmt: skip
  assert np.isnan(value)
  where = np.zeros((600, 4), bool)
  where[77, 0] = where[590:] = True
  np.testing.assert_array_equal(np.isnan(diq).any((0, 3)), where)
  np.testing.assert_array_equal(
    np.isnan(dik[0]).any(-1), np.arange(2304) < 2000
  )


@pytest.mark.gpu
@pytest.mark.parametrize("dense", [False, True])
def test_gpu_under_vmap(hopper, dense):
  case, dtype = HOPPER_CASES["group_4"]
  q, k, _, index_q, index_k = inputs(case, dtype)
  blocks = None if dense else random_blocks(case)
  two = [jnp.stack([x, x[:, ::-1]]) for x in (q, k, index_q, index_k)]
  got = jax.vmap(compiled(case, None), (0, 0, 0, 0, None))(*two, blocks)
  for i in range(2):
    one = jax.tree.map(lambda x, i=i: x[i], got)
    check(case, *(x[i] for x in two), blocks, one)
