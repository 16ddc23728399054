"""What every implementation of an operation must satisfy.

An implementation is tested by a class that derives from `AttentionContract`,
`GradientContract` or `KLContract` and says in `run` how to call it; the tests,
their inputs and their tolerances are the same for all. `test_contract.py`
derives from them for `reference` and `xla`, the kernels' test files for
interpreted kernels. The tests on a GPU use the same checks on larger cases
(`run_twice`).

Truth is the formula in float32 on inputs that were rounded to the working
dtype before. The yardstick is the same formula with the operands of its
products (probabilities, ds, r - p) rounded to the working dtype. An
implementation passes if its largest error is at most twice the yardstick's plus
one unit in the last place (see `assert_within_yardstick`), and its RMS error
below 0.5 % of the truth's RMS.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from helpers import Case, random_blocks

import msa_jax
from msa_jax import reference


def assert_within_yardstick(name, got, truth, yardstick, dtype, scale=None):
  """Compares a result with its truth.

  Args:
    name: of the result, for messages.
    got: the result, in the working dtype or float32.
    truth: the formula in float32.
    yardstick: the formula with rounded operands.
    dtype: the working dtype.
    scale: what errors are measured against; the truth if None. Gradients of the
      KL are differences r - p, whose parts are larger than they are: their
      scale is the part that comes from r.
  """
  got, truth, yardstick, scale = (
    np.asarray(x, np.float32)
    for x in (got, truth, yardstick, truth if scale is None else scale)
  )
  assert got.shape == truth.shape, name
  error = np.abs(got - truth)
  # Partial results are rounded once and their sum once, half a unit each.
  floor = float(jnp.finfo(dtype).eps) * np.abs(scale).max(initial=0.0)
  most = np.abs(yardstick - truth).max(initial=0.0)
  assert error.max(initial=0.0) <= 2 * most + floor, name
  assert np.linalg.norm(error) <= 0.005 * np.linalg.norm(scale), name


def assert_same_bits(first, second):
  for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def assert_nan(x, where, exactly: bool = True):
  """Whole vectors of x are NaN where `where` says so, and nothing else is.

  Args:
    x: [..., D].
    where: bool [...].
    exactly: False also accepts fewer NaN.
  """
  found = np.isnan(np.asarray(x, np.float32))
  assert not found[~where].any()
  if exactly:
    assert found[where].all()


def run_twice(function: Callable, check: Callable, *args) -> Any:
  """Checks the result of a call, and that a second call gives equal bits."""
  first = function(*args)
  assert_same_bits(first, function(*args))
  check(*args, first)
  return first


def visible_tokens(case: Case, blocks):
  """Which tokens each query and group sees; `blocks` None: all before it."""
  positions = reference.query_positions(
    case.q_len, case.kv_len, case.batch, case.lengths
  )
  if blocks is None:
    return reference.causal_tokens(positions, case.kv_len)
  return reference.chosen_tokens(
    blocks, positions, case.kv_len, case.block_size
  )


def _rounding(dtype):
  if dtype is None:
    return lambda x: x
  return lambda x: x.astype(dtype).astype(x.dtype)


# ------------------------------------------------------------------ attention


def attention_inputs(case: Case, dtype, seed=0):
  """q, k, v and dout."""
  q, k, v, *_ = case.inputs(seed, dtype=dtype)
  return q, k, v, jax.random.normal(jax.random.key(9), q.shape, dtype)


@functools.partial(jax.jit, static_argnames=("case", "dtype"))
def attention_gradients(case, q, k, v, dout, blocks, dtype=None):
  """(dq, dk, dv) in float32, and which entries of them may differ from 0.

  `dtype` rounds the operands of products (probabilities and ds) and out, from
  which delta comes.
  """
  rounded = _rounding(dtype)
  q, k, v, dout = (x.astype(jnp.float32) for x in (q, k, v, dout))
  visible = visible_tokens(case, blocks)
  scale = case.head_dim**-0.5
  group = case.num_heads // case.num_kv_heads
  sizes = (case.batch, case.q_len, case.num_kv_heads, group, case.head_dim)
  p = reference.head_scores(q, k, visible, scale)
  p = reference.softmax(p, reference.masked_logsumexp(p))
  q, dout = q.reshape(sizes), dout.reshape(sizes)
  einsum = functools.partial(jnp.einsum, precision="highest")
  out = rounded(einsum("bkgts,bskd->btkgd", rounded(p), v))
  dp = einsum("btkgd,bskd->bkgts", dout, v)
  delta = jnp.moveaxis(jnp.sum(out * dout, axis=-1), 1, -1)
  ds = rounded(p * (dp - delta[..., None]))
  dq = scale * einsum("bkgts,bskd->btkgd", ds, k)
  dk = scale * einsum("bkgts,btkgd->bskd", ds, q)
  dv = einsum("bkgts,btkgd->bskd", rounded(p), dout)
  dq = dq.reshape(case.batch, case.q_len, case.num_heads, case.head_dim)
  # Queries that see anything, by head, and keys that anything sees.
  sees = jnp.repeat(jnp.moveaxis(visible.any(-1), 1, 2), group, axis=-1)
  seen = jnp.moveaxis(visible.any(-2), 1, 2)
  return (dq, dk, dv), (sees, seen, seen)


def check_attention(case, q, k, v, blocks, out, lse):
  """out and lse, NaN and rows that see nothing included."""
  dtype = q.dtype
  assert out.dtype == dtype and out.shape == q.shape
  assert lse.dtype == jnp.float32
  q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
  attend = functools.partial(
    reference.attend, q, k, v, visible_tokens(case, blocks),
    case.head_dim**-0.5,
  )  # fmt: skip
  truth, true_lse = (np.asarray(x) for x in attend())
  rounded = np.asarray(attend(probs_dtype=dtype)[0].astype(dtype), np.float32)
  out, lse = np.asarray(out, np.float32), np.asarray(lse)
  np.testing.assert_array_equal(np.isnan(out), np.isnan(truth))
  np.testing.assert_array_equal(np.isnan(lse), np.isnan(true_lse))
  np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(true_lse))
  seen = np.isfinite(true_lse)
  # Sums in float32 and exp2, log2 to 2 ulp, of scores that reach the lse.
  np.testing.assert_allclose(lse[seen], true_lse[seen], rtol=1e-5, atol=1e-5)
  clean = ~np.isnan(truth)
  if not np.any(truth[clean]):
    np.testing.assert_array_equal(out[clean], 0.0)
    return
  assert_within_yardstick(
    "out", out[clean], truth[clean], rounded[clean], dtype
  )


def check_attention_gradients(case, q, k, v, dout, blocks, grads):
  dtype = q.dtype
  truth, used = attention_gradients(case, q, k, v, dout, blocks)
  near, _ = attention_gradients(case, q, k, v, dout, blocks, dtype)
  names = ("dq", "dk", "dv")
  for name, got, *rest, use in zip(
    names, grads, truth, near, used, strict=True
  ):
    assert got.dtype == dtype, name
    got = np.asarray(got, np.float32)
    assert np.all(np.isfinite(got)), name
    # Nothing flows where nothing was chosen.
    np.testing.assert_array_equal(got[~np.asarray(use)], 0.0, err_msg=name)
    assert_within_yardstick(name, got, *rest, dtype)


@dataclasses.dataclass(frozen=True)
class Scenario:
  """One call.

  Attributes:
    case: its sizes.
    dtype: of the operands.
    edit: changes choices and operands: (blocks, q, k, v) -> the same.
  """

  case: Case
  dtype: str = "bfloat16"
  edit: Callable | None = None

  def build(self):
    """q, k, v, dout and block_indices."""
    q, k, v, dout = attention_inputs(self.case, self.dtype)
    blocks = np.array(random_blocks(self.case))
    if self.edit:
      blocks, q, k, v = self.edit(blocks, q, k, v)
    return q, k, v, dout, jnp.asarray(blocks)


def _some_rows_empty(blocks, q, k, v):
  blocks[1, :, :6] = [-1, 0, 2]
  blocks[1, :, 6:] = -1
  return blocks, q, k, v


def _poisoned(blocks, q, k, v):
  blocks[0, :, :, 0] = np.where(blocks[0, :, :, 0] == 0, -1, blocks[0, :, :, 0])
  blocks[0, 1, 5] = [0, 2, 99]
  # Seen by one query only, by none, and only beyond kv_lengths.
  k = k.at[0, 3, 1].set(jnp.nan)
  v = v.at[0, 3, 0, 2].set(jnp.inf).at[1, 13:].set(jnp.nan)
  q = q.at[0, 2, 1].set(jnp.nan).at[0, 7, 2, 5].set(-jnp.inf)
  return blocks, q, k, v


ATTENTION = {
  # A ragged batch; rows that choose two blocks or none.
  "empty_rows": Scenario(Case(
    batch=2, q_len=11, kv_len=250, num_heads=16, num_kv_heads=1, head_dim=64,
    block_size=64, top_k=3,
  ), edit=_some_rows_empty),
  # NaN and infinities, some where nothing sees them; a row shorter than T.
  "poisoned": Scenario(Case(
    batch=2, q_len=19, kv_len=200, num_heads=4, num_kv_heads=2, head_dim=64,
    block_size=64, top_k=3, kv_lengths=(200, 13),
  ), "float16", _poisoned),
  # A ragged batch, T < S, a row shorter than T, blocks of 64 keys, G 8.
  "block_64": Scenario(Case(
    batch=2, q_len=11, kv_len=250, num_heads=8, num_kv_heads=1, head_dim=64,
    block_size=64, top_k=3, kv_lengths=(250, 7),
  )),
  # Two groups of 16 heads.
  "group_16": Scenario(Case(
    q_len=20, kv_len=270, num_heads=32, num_kv_heads=2, head_dim=128,
    block_size=128, top_k=2,
  )),
  # Rows of all lengths.
  "rows": Scenario(Case(
    batch=4, q_len=9, kv_len=140, num_heads=16, num_kv_heads=2, head_dim=64,
    block_size=128, top_k=2, kv_lengths=(140, 5, 0, 133),
  )),
}  # fmt: skip


class AttentionContract:
  """Tests of out and lse of `sparse_attention`.

  Attributes:
    scenarios: names of `ATTENTION`.
    repeats: whether a second call must give equal bits.
  """

  scenarios: tuple[str, ...] = tuple(ATTENTION)
  repeats: bool = True

  def run(self, name, case, q, k, v, blocks):
    """out and lse. `name` is the scenario's, which may have a config."""
    raise NotImplementedError

  def pytest_generate_tests(self, metafunc):
    if "scenario" in metafunc.fixturenames:
      metafunc.parametrize("scenario", self.scenarios)

  def test_out_and_lse(self, scenario):
    case = ATTENTION[scenario].case
    q, k, v, _, blocks = ATTENTION[scenario].build()
    args = (case, q, k, v, blocks)
    out, lse = self.run(scenario, *args)
    check_attention(*args, out, lse)
    if self.repeats:
      assert_same_bits((out, lse), self.run(scenario, *args))


class GradientContract:
  """Tests of the gradients of `sparse_attention`.

  Attributes:
    scenarios: names of `ATTENTION` without NaN.
    repeats: whether a second call must give equal bits.
  """

  scenarios: tuple[str, ...] = ("block_64", "group_16", "rows")
  repeats: bool = True

  def run(self, name, case, q, k, v, dout, blocks):
    """dq, dk and dv for the cotangent dout of out."""
    raise NotImplementedError

  def pytest_generate_tests(self, metafunc):
    if "scenario" in metafunc.fixturenames:
      metafunc.parametrize("scenario", self.scenarios)

  def test_gradients(self, scenario):
    args = (ATTENTION[scenario].case, *ATTENTION[scenario].build())
    grads = self.run(scenario, *args)
    check_attention_gradients(*args, grads)
    if self.repeats:
      assert_same_bits(grads, self.run(scenario, *args))

  # A group of two heads, which kernels pad. Only queries 0 to 3 choose block 0,
  # and none chooses block 1.
  nan_case = Case(
    q_len=9, kv_len=384, num_heads=2, num_kv_heads=1, head_dim=64,
    block_size=128, top_k=2,
  )  # fmt: skip

  def nan_inputs(self):
    """q, k, v, dout and block_indices, with NaN in block 1."""
    q, k, v, dout = attention_inputs(self.nan_case, jnp.float16)
    k, v = (x.at[:, 128:256].set(jnp.nan) for x in (k, v))
    blocks = np.tile(np.int32([0, 2]), (1, 1, 9, 1))
    blocks[:, :, 4:, 0] = -1
    return q, k, v, dout, jnp.asarray(np.sort(blocks))

  def test_nan_of_an_unchosen_block_reaches_no_gradient(self):
    q, k, v, dout, blocks = self.nan_inputs()
    grads = self.run("nan", self.nan_case, q, k, v, dout, blocks)
    k, v = (x.at[:, 128:256].set(0) for x in (k, v))
    check_attention_gradients(self.nan_case, q, k, v, dout, blocks, grads)

  def test_nan_of_a_query_reaches_its_gradient_and_the_keys_it_sees(self):
    q, *rest = self.nan_inputs()
    q = q.at[0, 2, 1].set(jnp.nan)
    dq, dk, dv = self.run("nan", self.nan_case, q, *rest)
    where = np.zeros((9, 2), bool)
    where[2, 1] = True
    assert_nan(dq[0], where)
    seen = np.zeros(384, bool)
    seen[:128] = seen[256 : 375 + 2 + 1] = True  # query 2 stands at 377
    for x in (dk, dv):
      assert_nan(x[0, :, 0], seen)
      np.testing.assert_array_equal(np.asarray(x)[0, 128:256], 0.0)


@functools.partial(jax.jit, static_argnames=("case", "implementation"))
def _attention(case, q, k, v, blocks, implementation):
  return msa_jax.sparse_attention(
    q, k, v, blocks, block_size=case.block_size, kv_lengths=case.lengths,
    return_lse=True, implementation=implementation,
  )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("case", "implementation"))
def _attention_gradients(case, q, k, v, dout, blocks, implementation):
  def attend(q, k, v):
    return _attention(case, q, k, v, blocks, implementation)[0]

  return jax.vjp(attend, q, k, v)[1](dout)


class PortableAttention(AttentionContract):
  """The contract for an implementation that `msa_jax` runs on any device."""

  implementation: Any

  def run(self, name, case, *args):
    return _attention(case, *args, implementation=self.implementation)


class PortableGradients(GradientContract):
  """The contract for an implementation that `msa_jax` runs on any device."""

  implementation: Any

  def run(self, name, case, *args):
    return _attention_gradients(case, *args, implementation=self.implementation)


# ------------------------------------------------------------------------ KL


@functools.partial(jax.jit, static_argnames=("case", "dtype"))
def kl_formula(case, q, k, index_q, index_k, blocks, mask, dtype=None):
  """KL, its gradients, and the part of them that comes from r, in float32.

  `dtype` rounds what an implementation has to round: p of each head, and g =
  r - p.
  """
  rounded = _rounding(dtype)
  q, k, index_q, index_k = (
    x.astype(jnp.float32) for x in (q, k, index_q, index_k)
  )
  visible = visible_tokens(case, blocks) & mask[:, None, :, None]
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


def kl_and_gradients(
  case, q, k, index_q, index_k, blocks, mask=None, *, loss: Callable
):
  """Value and float32 gradients of `loss`, which gets the reference's lse.

  Args:
    case: sizes.
    q, k, index_q, index_k: operands.
    blocks: chosen blocks; None for all visible tokens.
    mask: queries that count.
    loss: (q, k, index_q, index_k, blocks, **options) -> the KL.
  """
  attention = dict(scale=case.head_dim**-0.5, kv_lengths=case.lengths)
  if blocks is None:
    _, lse = reference.warmup_attention(q, k, k, **attention)
  else:
    _, lse = reference.sparse_attention(
      q, k, k, blocks, block_size=case.block_size, **attention
    )
  # As with a loss scale: the gradients of a mean are below float16's range.
  factor = 1024.0 if q.dtype == jnp.float16 else 1.0

  def scaled(index_q, index_k):
    value = loss(
      q, k, index_q, index_k, blocks, lse=lse, block_size=case.block_size,
      kv_lengths=case.lengths, query_mask=mask,
    )  # fmt: skip
    return factor * value, value

  grads, value = jax.grad(scaled, (0, 1), has_aux=True)(index_q, index_k)
  assert all(x.dtype == q.dtype for x in grads)
  return value, [x.astype(jnp.float32) / factor for x in grads]


def check_kl(case, q, k, index_q, index_k, blocks, got, mask=None):
  dtype = q.dtype
  if mask is None:
    mask = jnp.ones((case.batch, case.q_len), bool)
  args = (case, q, k, index_q, index_k, blocks, mask)
  true, grads, scales = kl_formula(*args)
  near, near_grads, _ = kl_formula(*args, dtype=dtype)
  value, got_grads = got
  assert value.dtype == jnp.float32 and value.shape == ()
  # A sum over all pairs in float32, of terms with p rounded.
  assert abs(value - true) <= 2 * abs(near - true) + 2e-4 * abs(true)
  for name, x, want, close, scale in zip(
    ("dindex_q", "dindex_k"), got_grads, grads, near_grads, scales, strict=True
  ):
    x = np.asarray(x, np.float32)
    assert np.all(np.isfinite(x)), name
    np.testing.assert_array_equal(x[np.asarray(scale) == 0], 0.0, err_msg=name)
    assert_within_yardstick(name, x, want, close, dtype, scale)


SPARSE_KL = {
  # A ragged batch, T < S, a row shorter than T, blocks of 64 keys, G 8.
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

DENSE_KL = {
  # A ragged batch, T < S, a row shorter than T, G 16.
  "batch": (Case(
    batch=2, q_len=70, kv_len=250, num_heads=16, num_kv_heads=1, head_dim=64,
    index_dim=128, kv_lengths=(250, 5),
  ), "bfloat16"),
  # Rows of all lengths.
  "rows": (Case(
    batch=4, q_len=70, kv_len=250, num_heads=2, num_kv_heads=2, head_dim=64,
    index_dim=64, kv_lengths=(250, 5, 0, 100),
  ), "bfloat16"),
  # Two groups of one head, queries that do not count.
  "mask": (Case(
    q_len=300, kv_len=300, num_heads=2, num_kv_heads=2, head_dim=128,
    index_dim=64,
  ), "float16"),
}  # fmt: skip


class KLContract:
  """Tests of `index_kl_loss`: chosen blocks, and all visible tokens.

  Attributes:
    repeats: whether a second call must give equal bits.
    nan_reaches_gradients: whether the gradients of all that sees a NaN must be
      NaN. Otherwise they may be; no implementation may have NaN elsewhere.
  """

  repeats: bool = True
  nan_reaches_gradients: bool = True

  def run(self, name, case, q, k, index_q, index_k, blocks, mask=None):
    """Value and gradients, as `kl_and_gradients` returns them."""
    raise NotImplementedError

  def check(self, name, case, *args, mask=None):
    got = self.run(name, case, *args, mask)
    check_kl(case, *args, got, mask)
    if self.repeats:
      assert_same_bits(got, self.run(name, case, *args, mask))

  def pytest_generate_tests(self, metafunc):
    for argument, names in (
      ("sparse_name", SPARSE_KL), ("dense_name", DENSE_KL),
    ):  # fmt: skip
      if argument in metafunc.fixturenames:
        metafunc.parametrize(argument, names)

  def test_chosen_blocks(self, sparse_name):
    case = SPARSE_KL[sparse_name]
    q, k, _, index_q, index_k = case.inputs(dtype=jnp.bfloat16)
    self.check(sparse_name, case, q, k, index_q, index_k, random_blocks(case))

  def test_chosen_blocks_mask_and_nan(self):
    """NaN in an unchosen block and in a query that does not count."""
    case = Case(
      q_len=70, kv_len=384, num_heads=1, num_kv_heads=1, head_dim=64,
      index_dim=64, block_size=128, top_k=2,
    )  # fmt: skip
    q, k, _, index_q, index_k = case.inputs(dtype=jnp.float16)
    blocks = np.tile(np.int32([0, 2]), (1, 1, 70, 1))
    blocks[:, :, 5] = -1
    blocks = jnp.asarray(blocks)
    mask = jnp.arange(70)[None] != 3
    # Nobody chose block 1, and query 3 does not count.
    k, index_k = (x.at[:, 128:256].set(jnp.nan) for x in (k, index_k))
    q, index_q = q.at[0, 3].set(jnp.nan), index_q.at[0, 3].set(jnp.nan)
    got = self.run("nan", case, q, k, index_q, index_k, blocks, mask)
    k, index_k = (x.at[:, 128:256].set(0) for x in (k, index_k))
    q, index_q = q.at[0, 3].set(0), index_q.at[0, 3].set(0)
    check_kl(case, q, k, index_q, index_k, blocks, got, mask)

  def test_all_tokens(self, dense_name):
    case, dtype = DENSE_KL[dense_name]
    q, k, _, index_q, index_k = case.inputs(dtype=dtype)
    mask = None
    if dense_name == "mask":
      mask = jnp.arange(case.q_len)[None] % 5 != 2
    args = (q, k, index_q, index_k, None)
    self.check(dense_name, case, *args, mask=mask)

  def test_all_tokens_nan(self):
    """NaN in keys that nobody sees and in a query that does not count.

    Then NaN where it counts: it reaches the queries that see it, and the keys
    that those see.
    """
    case = Case(
      q_len=90, kv_len=140, num_heads=8, num_kv_heads=2, head_dim=64,
      index_dim=64, kv_lengths=(100,),
    )  # fmt: skip
    q, k, _, index_q, index_k = case.inputs(dtype=jnp.bfloat16)
    mask = jnp.arange(90)[None] != 3
    # Nobody sees these keys, and query 3 does not count.
    bad_k, bad_index_k = (x.at[:, 100:].set(jnp.nan) for x in (k, index_k))
    bad_q, bad_index_q = (x.at[:, 3].set(jnp.nan) for x in (q, index_q))
    got = self.run(
      "nan", case, bad_q, bad_k, bad_index_q, bad_index_k, None, mask
    )
    check_kl(case, q, k, index_q, index_k, None, got, mask)
    # Query 60 stands at slot 70, key 97 is seen by queries 87 to 89.
    bad_index_q = bad_index_q.at[0, 60, 1, 0].set(jnp.inf)
    bad_index_k = bad_index_k.at[0, 97].set(jnp.nan)
    value, (diq, dik) = self.run(
      "nan", case, bad_q, bad_k, bad_index_q, bad_index_k, None, mask
    )
    assert np.isnan(value)
    where = np.zeros((90, 2), bool)
    where[60, 1] = where[87:] = True
    exactly = self.nan_reaches_gradients
    assert_nan(diq[0], where, exactly)
    assert_nan(dik[0], np.arange(140) < 100, exactly)
    assert np.all(np.asarray(dik[0, 100:]) == 0)


@functools.partial(jax.jit, static_argnames=("case", "implementation"))
def _kl_and_gradients(case, *args, implementation):
  loss = functools.partial(msa_jax.index_kl_loss, implementation=implementation)
  return kl_and_gradients(case, *args, loss=loss)


class PortableKL(KLContract):
  """The contract for an implementation that `msa_jax` runs on any device."""

  implementation: Any

  def run(self, name, case, *args):
    return _kl_and_gradients(case, *args, implementation=self.implementation)


# ----------------------------------------------------------------- selection

# Margins of `check_choice`. float32 sums of 128 products in another order.
EXACT = 2.0**-20
# 10 mantissa bits: two keys truncated by up to 2^-10 each.
FAST = 2.0**-9
# Hopper sums e4m3 products with about 14 bits; then ranked like fast.
FP8 = 2.0**-9 + 2.0**-11


def check_choice(
  index_q, index_k, ids, *, block_size, top_k, num_local, kv_lengths, margin
):
  """What a choice must satisfy, with scores in float64.

  Every visible block that is forced is in; the rest are the best ones, except
  that blocks whose scores are closer than `margin` times the sum of the
  products' magnitudes may stand for each other.
  """
  q, k = (np.asarray(x, np.float64) for x in (index_q, index_k))
  ids = np.asarray(ids)
  b, t, _, _ = q.shape
  s_len = k.shape[1]
  n = -(-s_len // block_size)
  ends = np.full((b,), s_len) if kv_lengths is None else np.asarray(kv_lengths)
  position = ends[:, None] - t + np.arange(t)
  own = np.where(position < 0, -1, position // block_size)[:, None, :, None]

  def block_max(q, k):
    s = np.einsum("btki,bsi->bkts", q, k, optimize=True)
    seen = np.arange(s_len) <= position[:, None, :, None]
    s = np.where(seen, s, -np.inf)
    pad = ((0, 0),) * 3 + ((0, n * block_size - s_len),)
    s = np.pad(s, pad, constant_values=-np.inf)
    return s.reshape(*s.shape[:3], n, block_size).max(-1)

  score = block_max(q, k)
  size = np.nanmax(block_max(abs(np.nan_to_num(q)), abs(np.nan_to_num(k))), -1)
  block = np.arange(n)
  visible = block <= own
  forced = visible & (block > own - num_local)
  competing = visible & ~forced & ~np.isnan(score)

  assert ids.dtype == np.int32 and ids.shape == (*score.shape[:3], top_k)
  count = (ids >= 0).sum(-1)
  room = np.minimum(top_k, forced.sum(-1) + competing.sum(-1))
  np.testing.assert_array_equal(count, room)
  filled = np.arange(top_k) < count[..., None]
  assert (ids[~filled] == -1).all()
  assert ((np.diff(ids, axis=-1) > 0) | ~filled[..., 1:]).all()
  chosen = (ids[..., None] == block).any(-2)
  assert (chosen <= (forced | competing)).all()
  assert (forced <= chosen).all()
  with np.errstate(invalid="ignore"):
    worst = np.where(chosen & competing, score, np.inf).min(-1)
    refused = np.where(competing & ~chosen, score, -np.inf).max(-1)
    assert (worst >= refused - margin * np.maximum(size, 0)).all()
