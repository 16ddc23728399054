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
import pytest
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


def visible_tokens(case: Case, blocks, layout=None):
  """Which tokens each query and group sees; `blocks` None: all before it.

  `layout` is that of packed rows.
  """
  positions = reference.query_positions(
    case.q_len, case.kv_len, case.batch, case.lengths, layout
  )
  if blocks is None:
    return reference.visible_tokens(positions, case.kv_len, layout)
  return reference.chosen_tokens(
    blocks, positions, case.kv_len, case.block_size, layout
  )


def _rounding(dtype):
  if dtype is None:
    return lambda x: x
  return functools.partial(reference.round_to, dtype=dtype)


# ------------------------------------------------------------------ attention


def attention_inputs(case: Case, dtype, seed=0):
  """q, k, v and dout."""
  q, k, v, *_ = case.inputs(seed, dtype=dtype)
  return q, k, v, jax.random.normal(jax.random.key(9), q.shape, dtype)


@functools.partial(jax.jit, static_argnames=("case", "dtype"))
def attention_gradients(
  case, q, k, v, dout, blocks, dtype=None, dlse=None, layout=None
):
  """(dq, dk, dv) in float32, and which entries of them may differ from 0.

  `dlse` is the cotangent of lse; None for zeros. `dtype` rounds the operands of
  products (probabilities and ds) and out, from which delta comes.
  """
  rounded = _rounding(dtype)
  q, k, v, dout = (x.astype(jnp.float32) for x in (q, k, v, dout))
  visible = visible_tokens(case, blocks, layout)
  all_groups = (case.batch, case.num_kv_heads, case.q_len, case.kv_len)
  visible = jnp.broadcast_to(visible, all_groups)
  scale = case.head_dim**-0.5
  group = case.num_heads // case.num_kv_heads
  sizes = (case.batch, case.q_len, case.num_kv_heads, group, case.head_dim)
  p = reference.head_scores(q, k, visible, scale)
  lse = reference.masked_logsumexp(p)
  p = reference.softmax(p, lse)
  q, dout = q.reshape(sizes), dout.reshape(sizes)
  einsum = functools.partial(jnp.einsum, precision="highest")
  out = rounded(einsum("bkgts,bskd->btkgd", rounded(p), v))
  dp = einsum("btkgd,bskd->bkgts", dout, v)
  delta = jnp.moveaxis(jnp.sum(out * dout, axis=-1), 1, -1)
  if dlse is not None:
    delta -= jnp.where(lse == -jnp.inf, 0, dlse.reshape(lse.shape))
  ds = rounded(p * (dp - delta[..., None]))
  dq = scale * einsum("bkgts,bskd->btkgd", ds, k)
  dk = scale * einsum("bkgts,btkgd->bskd", ds, q)
  dv = einsum("bkgts,btkgd->bskd", rounded(p), dout)
  dq = dq.reshape(case.batch, case.q_len, case.num_heads, case.head_dim)
  # Queries that see anything, by head, and keys that anything sees.
  sees = jnp.repeat(jnp.moveaxis(visible.any(-1), 1, 2), group, axis=-1)
  seen = jnp.moveaxis(visible.any(-2), 1, 2)
  return (dq, dk, dv), (sees, seen, seen)


@functools.partial(jax.jit, static_argnames="case")
def attention(case, q, k, v, blocks, layout=None):
  """out and lse in float32, and out with rounded probabilities."""
  wide = (x.astype(jnp.float32) for x in (q, k, v))
  attend = functools.partial(
    reference.attend, *wide, visible_tokens(case, blocks, layout),
    case.head_dim**-0.5,
  )  # fmt: skip
  return *attend(), attend(probs_dtype=q.dtype)[0].astype(q.dtype)


def check_attention(case, q, k, v, blocks, out, lse, layout=None):
  """out and lse, NaN and rows that see nothing included."""
  dtype = q.dtype
  assert out.dtype == dtype and out.shape == q.shape
  assert lse.dtype == jnp.float32
  truth, true_lse, rounded, out, lse = (
    np.asarray(x, np.float32)
    for x in (*attention(case, q, k, v, blocks, layout), out, lse)
  )
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


def check_attention_gradients(
  case, q, k, v, dout, blocks, grads, dlse=None, layout=None
):
  dtype = q.dtype
  args = (case, q, k, v, dout, blocks)
  truth, used = attention_gradients(*args, dlse=dlse, layout=layout)
  near, _ = attention_gradients(*args, dtype, dlse, layout)
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


@functools.partial(jax.jit, static_argnames="case")
def lse_cotangent(case, blocks, layout=None):
  """Random; NaN where nothing is seen, as a merge of empty rows gives."""
  sees = visible_tokens(case, blocks, layout).any(-1)
  sees = jnp.repeat(sees, case.num_heads // sees.shape[1], axis=1)
  dlse = jax.random.normal(jax.random.key(10), sees.shape)
  return jnp.where(sees, dlse, jnp.nan)


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
    scenarios: names of `ATTENTION` without NaN, for a call with a cotangent of
      lse, maybe as `pytest.param`.
    without_dlse: those for a call without one.
    repeats: whether a second call must give equal bits.
  """

  scenarios: tuple[Any, ...] = ("block_64", "group_16", "rows")
  without_dlse: tuple[Any, ...] = scenarios
  repeats: bool = True

  def run(self, name, case, q, k, v, dout, blocks, dlse=None):
    """dq, dk and dv for the cotangents dout of out and dlse of lse."""
    raise NotImplementedError

  def pytest_generate_tests(self, metafunc):
    if "scenario" in metafunc.fixturenames:
      metafunc.parametrize("scenario", self.scenarios)
    if "plain_scenario" in metafunc.fixturenames:
      metafunc.parametrize("plain_scenario", self.without_dlse)

  def test_gradients(self, plain_scenario):
    scenario = plain_scenario
    args = (ATTENTION[scenario].case, *ATTENTION[scenario].build())
    grads = self.run(scenario, *args)
    check_attention_gradients(*args, grads)
    if self.repeats:
      assert_same_bits(grads, self.run(scenario, *args))

  def test_gradients_through_lse(self, scenario):
    args = (ATTENTION[scenario].case, *ATTENTION[scenario].build())
    dlse = lse_cotangent(args[0], args[-1])
    grads = self.run(scenario, *args, dlse)
    check_attention_gradients(*args, grads, dlse)
    if self.repeats:
      assert_same_bits(grads, self.run(scenario, *args, dlse))

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
def _attention_gradients(
  case, q, k, v, dout, blocks, dlse=None, *, implementation
):
  def attend(q, k, v):
    return _attention(case, q, k, v, blocks, implementation)

  return vjp(attend, q, k, v, dout=dout, dlse=dlse)


def vjp(attend, *operands, dout, dlse=None):
  """Gradients of (out, lse) = attend(*operands); dlse None: of out alone."""
  if dlse is None:
    return jax.vjp(lambda *x: attend(*x)[0], *operands)[1](dout)
  return jax.vjp(attend, *operands)[1]((dout, dlse))


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


# ---------------------------------------------------- what lse is needed for


def with_sink(out, lse, sink):
  """Attention with one more score for each head, whose value is zero."""
  weight = jax.nn.sigmoid(lse - sink[:, None])
  return (out * jnp.moveaxis(weight, 1, 2)[..., None]).astype(out.dtype)


def merge(parts):
  """Attention over several sets of tokens, from out and lse over each."""
  lse = functools.reduce(jnp.logaddexp, (lse for _, lse in parts))
  total = 0.0
  for out, part in parts:
    weight = jnp.where(part == -jnp.inf, 0, jnp.exp(part - lse))
    total += out * jnp.moveaxis(weight, 1, 2)[..., None]
  return total, lse


@functools.partial(jax.jit, static_argnames="case")
def dense_sink_gradients(case, q, k, v, sink, dout, blocks):
  """Gradients of a softmax with one more score, by autodiff, in float32."""
  q, k, v, sink, dout = (x.astype(jnp.float32) for x in (q, k, v, sink, dout))
  group = case.num_heads // case.num_kv_heads
  visible = visible_tokens(case, blocks)
  visible = jnp.repeat(visible, case.num_heads // visible.shape[1], axis=1)
  einsum = functools.partial(jnp.einsum, precision="highest")

  def run(q, k, v, sink):
    k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))
    s = case.head_dim**-0.5 * einsum("bthd,bshd->bhts", q, k)
    s = jnp.where(visible, s, -jnp.inf)
    last = jnp.broadcast_to(sink[:, None, None], (*s.shape[:3], 1))
    p = jax.nn.softmax(jnp.concatenate([s, last], axis=-1), axis=-1)
    return einsum("bhts,bshd->bthd", p[..., :-1], v)

  return jax.vjp(run, q, k, v, sink)[1](dout)


@functools.partial(jax.jit, static_argnames=("case", "dtype"))
def rounded_sink_gradients(case, q, k, v, sink, dout, blocks, dtype):
  """The same from out and lse, with the operands of products rounded."""
  rounded = _rounding(dtype)
  q, k, v, dout = (x.astype(jnp.float32) for x in (q, k, v, dout))
  out, lse = reference.attend(
    q, k, v, visible_tokens(case, blocks), case.head_dim**-0.5, dtype
  )
  weight = jax.nn.sigmoid(lse - sink[:, None])
  dweight = jnp.moveaxis(jnp.sum(rounded(out) * dout, axis=-1), 1, 2)
  dlse = dweight * weight * (1 - weight)
  dout = rounded(dout * jnp.moveaxis(weight, 1, 2)[..., None])
  grads, _ = attention_gradients(case, q, k, v, dout, blocks, dtype, dlse)
  return *grads, -jnp.sum(dlse, axis=(0, 2))


class LseContract:
  """Tests of what lse and its gradient are needed for: sinks and merging.

  Attributes:
    phases: "sparse" and "warmup", or one of them.
    dtypes: of the operands, maybe as `pytest.param`.
  """

  phases: tuple[str, ...] = ("sparse", "warmup")
  dtypes: tuple[Any, ...] = ("float32", "bfloat16")

  def attend(self, case, q, k, v, blocks):
    """out and lse, differentiable; `blocks` is None in the warm-up."""
    raise NotImplementedError

  def pytest_generate_tests(self, metafunc):
    for argument, values in (("phase", self.phases), ("dtype", self.dtypes)):
      if argument in metafunc.fixturenames:
        metafunc.parametrize(argument, values)

  # Rows that see nothing, two batch rows.
  sparse = ATTENTION["block_64"]
  dense = Case(
    batch=2, q_len=24, kv_len=24, num_heads=4, num_kv_heads=2, head_dim=64
  )

  def inputs(self, phase, dtype):
    """The case, q, k, v, dout and block_indices."""
    if phase == "warmup":
      return self.dense, *attention_inputs(self.dense, dtype), None
    scenario = dataclasses.replace(self.sparse, dtype=dtype)
    return scenario.case, *scenario.build()

  def test_sink_of_each_head(self, phase, dtype):
    case, q, k, v, dout, blocks = self.inputs(phase, dtype)
    sink = jnp.linspace(-2.0, 3.0, case.num_heads)

    def run(q, k, v, sink):
      return with_sink(*self.attend(case, q, k, v, blocks), sink)

    # One program, as in the next test: both have many small operations.
    grads = jax.jit(lambda *x: jax.vjp(run, *x)[1](dout))(q, k, v, sink)
    args = (case, q, k, v, sink, dout, blocks)
    truth = dense_sink_gradients(*args)
    near = rounded_sink_gradients(*args, dtype=dtype)
    for name, *rest in zip(("dq", "dk", "dv", "dsink"), grads, truth, near):
      self.check(name, *rest, dtype)

  def check(self, name, got, truth, near, dtype):
    assert np.isfinite(np.asarray(got, np.float32)).all(), name
    if dtype == "float32":  # sums in another order
      np.testing.assert_allclose(got, truth, rtol=1e-5, atol=2e-5, err_msg=name)
    else:
      assert_within_yardstick(name, got, truth, near, dtype)

  def test_two_halves_are_one_attention(self, phase, dtype):
    """By slots of the choices; by tokens, which only one half computes."""
    case, q, k, v, dout, blocks = self.inputs(phase, dtype)
    half = case.kv_len // 2
    if phase == "warmup":
      # Queries of the second half see all keys of the first.
      q, dout = q[:, half:], dout[:, half:]
      late = dataclasses.replace(case, q_len=half, kv_len=half)
      case = dataclasses.replace(case, q_len=half)

    def run(q, k, v):
      if phase == "sparse":
        return merge([
          self.attend(case, q, k, v, part)
          for part in (blocks[..., :2], blocks[..., 2:])
        ])  # fmt: skip
      all_visible = jnp.ones((case.batch, 1, half, half), bool)
      first, second = (
        tuple(x[:, at] for x in (k, v))
        for at in (slice(None, half), slice(half, None))
      )
      return merge([
        reference.attend(q, *first, all_visible, case.head_dim**-0.5),
        self.attend(late, q, *second, None),
      ])  # fmt: skip

    # Where nothing is seen, the merge itself gives its halves NaN.
    dlse = jnp.nan_to_num(lse_cotangent(case, blocks))

    @jax.jit
    def run_and_pull(q, k, v):
      results, pull = jax.vjp(run, q, k, v)
      return results, pull((dout.astype(jnp.float32), dlse))

    (out, lse), grads = run_and_pull(q, k, v)
    out = out.astype(dtype)
    if dtype != "float32":
      check_attention(case, q, k, v, blocks, out, lse)
    args = (case, q, k, v, dout, blocks)
    truth, _ = attention_gradients(*args, dlse=dlse)
    near, _ = attention_gradients(*args, dtype, dlse)
    for name, *rest in zip(("dq", "dk", "dv"), grads, truth, near):
      self.check(name, *rest, dtype)


class PortableLse(LseContract):
  """The contract for an implementation that `msa_jax` runs on any device."""

  implementation: Any

  def attend(self, case, q, k, v, blocks):
    if blocks is not None:
      return _attention(case, q, k, v, blocks, self.implementation)
    index = jnp.zeros((case.batch, case.kv_len, case.num_kv_heads, 8), q.dtype)
    result = msa_jax.msa_attention(
      q, k, v, index[:, case.kv_len - case.q_len :], index[:, :, 0],
      phase="warmup", implementation=self.implementation,
    )  # fmt: skip
    return result.out, result.lse

  def step(self, phase, *, use_lse=True, with_kl=True):
    """The gradients of a loss, and its arguments."""
    case, q, k, v, *_ = self.inputs(phase, "float32")
    *_, index_q, index_k = case.inputs()

    def loss(q, k, v, index_q, index_k):
      result = msa_jax.msa_attention(
        q, k, v, index_q, index_k, block_size=case.block_size,
        top_k=case.top_k, phase=phase, with_kl=True,
        implementation=self.implementation,
      )  # fmt: skip
      total = jnp.sum(jnp.sin(result.out)) + with_kl * result.kl
      return total + (jnp.sum(jnp.cos(result.lse)) if use_lse else 0)

    return jax.jit(jax.grad(loss, range(5))), (q, k, v, index_q, index_k)

  def test_kl_takes_an_lse_without_gradient(self, phase):
    run, args = self.step(phase)
    without, _ = self.step(phase, with_kl=False)
    alone, _ = self.step(phase, use_lse=False)
    grads = run(*args)
    # q, k and v get nothing of the KL, index_q and index_k all of their own.
    assert_same_bits(grads[:3], without(*args)[:3])
    assert_same_bits(grads[3:], alone(*args)[3:])
    assert np.abs(grads[3]).max() > 0

  def test_an_lse_that_is_not_used_costs_nothing(self, phase):
    texts = []
    for use_lse in (False, True):
      run, args = self.step(phase, use_lse=use_lse)
      texts.append(run.lower(*args).as_text())
    plain, used = (
      [x for x in text.splitlines() if " = stablehlo." in x] for text in texts
    )
    # There is no second pass, and one pass has less to do.
    assert len(plain) < len(used)
    products = [sum("dot_general" in x for x in ops) for ops in (plain, used)]
    assert products[0] == products[1] > 0


# ------------------------------------------------------------------------ KL


@functools.partial(jax.jit, static_argnames=("case", "dtype"))
def kl_formula(
  case, q, k, index_q, index_k, blocks, mask, dtype=None, layout=None
):
  """KL, its gradients, and the part of them that comes from r, in float32.

  `dtype` rounds what an implementation has to round: p of each head, and g =
  r - p. `mask` may be weights of the queries.
  """
  rounded = _rounding(dtype)
  q, k, index_q, index_k = (
    x.astype(jnp.float32) for x in (q, k, index_q, index_k)
  )
  visible = visible_tokens(case, blocks, layout)
  visible = visible & (mask != 0)[:, None, :, None]
  weight = mask.astype(jnp.float32)[:, None, :, None]
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
  counted = mask.sum()
  counted = jnp.where(counted == 0, 1, counted) * case.num_kv_heads
  value = jnp.sum(weight * p * (log_p - log_r)) / counted

  def gradients(g):
    g = g * weight * (case.index_dim**-0.5 / counted)
    einsum = functools.partial(jnp.einsum, precision="highest")
    return (
      einsum("bkts,bsi->btki", g, index_k),
      einsum("bkts,btki->bsi", g, index_q),
    )

  return value, gradients(rounded(r - p)), gradients(r)


def kl_and_gradients(
  case, q, k, index_q, index_k, blocks, mask=None, *, loss: Callable,
  layout=None,
):  # fmt: skip
  """Value and float32 gradients of `loss`, which gets the reference's lse.

  Args:
    case: sizes.
    q, k, index_q, index_k: operands.
    blocks: chosen blocks; None for all visible tokens.
    mask: queries that count, or their weights.
    loss: (q, k, index_q, index_k, blocks, **options) -> the KL.
    layout: of packed rows, which `loss` gets too.
  """
  attention = dict(
    scale=case.head_dim**-0.5, kv_lengths=case.lengths, layout=layout
  )
  packed = {} if layout is None else dict(layout=layout)
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
      kv_lengths=case.lengths, query_mask=mask, **packed,
    )  # fmt: skip
    return factor * value, value

  grads, value = jax.grad(scaled, (0, 1), has_aux=True)(index_q, index_k)
  assert all(x.dtype == q.dtype for x in grads)
  return value, [x.astype(jnp.float32) / factor for x in grads]


def check_kl(case, q, k, index_q, index_k, blocks, got, mask=None, layout=None):
  dtype = q.dtype
  if mask is None:
    mask = jnp.ones((case.batch, case.q_len), bool)
  args = (case, q, k, index_q, index_k, blocks, mask)
  true, grads, scales = kl_formula(*args, layout=layout)
  near, near_grads, _ = kl_formula(*args, dtype=dtype, layout=layout)
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
    slow, slow_dense: names of SPARSE_KL and DENSE_KL that are not part of CI.
  """

  repeats: bool = True
  nan_reaches_gradients: bool = True
  slow: tuple[str, ...] = ()
  slow_dense: tuple[str, ...] = ()

  def run(self, name, case, q, k, index_q, index_k, blocks, mask=None):
    """Value and gradients, as `kl_and_gradients` returns them."""
    raise NotImplementedError

  def check(self, name, case, *args, mask=None):
    got = self.run(name, case, *args, mask)
    check_kl(case, *args, got, mask)
    if self.repeats:
      assert_same_bits(got, self.run(name, case, *args, mask))

  def pytest_generate_tests(self, metafunc):
    for argument, every, slow in (
      ("sparse_name", SPARSE_KL, self.slow),
      ("dense_name", DENSE_KL, self.slow_dense),
    ):
      if argument in metafunc.fixturenames:
        names = [
          pytest.param(name, marks=[pytest.mark.slow] * (name in slow))
          for name in every
        ]
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
    """NaN in keys that nobody sees and in a query of weight 0.

    Then, with a mask, NaN where it counts: it reaches the queries that see it,
    and the keys that those see.
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
    # Weights far below 1, whose ratios alone matter.
    weights = 1e-6 * jnp.where(mask, 0.3 + jnp.arange(90.0)[None] % 4, 0.0)
    got = self.run(
      "nan", case, bad_q, bad_k, bad_index_q, bad_index_k, None, weights
    )
    check_kl(case, q, k, index_q, index_k, None, got, weights)
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
