"""The warm-up's attention around cuDNN, and training through the operations."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import op_contract
import pytest
from helpers import Case, launches
from op_contract import LseContract

import msa_jax
from benchmarks import cases
from msa_jax import mosaic_gpu, reference, xla
from msa_jax import segments as segments_lib
from pallas_kernels import dense_attention

NAMES = ("dq", "dk", "dv", "dindex_q", "dindex_k")


def leaky_attention(q, k, v, scale):
  """As cuDNN: what is masked has weight 0, and 0 times NaN is NaN."""
  group = q.shape[2] // k.shape[2]
  k, v = (jnp.repeat(x, group, axis=2).astype(jnp.float32) for x in (k, v))
  s = scale * jnp.einsum("bthd,bshd->bhts", q.astype(jnp.float32), k)
  s = jnp.where(jnp.tri(q.shape[1], dtype=bool), s, -jnp.inf)
  lse = jax.nn.logsumexp(s, axis=-1)
  p = jnp.exp(s - lse[..., None])
  return jnp.einsum("bhts,bshd->bthd", p, v).astype(q.dtype), lse


@pytest.fixture
def on_cpu(monkeypatch):
  monkeypatch.setattr(dense_attention, "_cudnn_attention", leaky_attention)


def attend(q, k, v, dout, dlse=None):
  """out, lse and the three gradients; dlse None: those of out alone."""

  def run(q, k, v):
    return dense_attention.attention(q, k, v, scale=q.shape[-1] ** -0.5)

  out, lse = run(q, k, v)
  return out, lse, *op_contract.vjp(run, q, k, v, dout=dout, dlse=dlse)


def attention_inputs(dtype=jnp.bfloat16):
  case = Case(
    batch=2, q_len=12, kv_len=12, num_heads=4, num_kv_heads=2, head_dim=64
  )
  q, k, v, *_ = case.inputs(dtype=dtype)
  return q, k, v, jax.random.normal(jax.random.key(9), q.shape, dtype)


def test_attention_of_finite_operands_is_passed_on(on_cpu):
  q, k, v, dout = attention_inputs()
  scale = q.shape[-1] ** -0.5
  (out, lse), pull = jax.vjp(
    functools.partial(leaky_attention, scale=scale), q, k, v
  )
  want = out, lse, *pull((dout, jnp.zeros_like(lse)))
  for a, b in zip(attend(q, k, v, dout), want):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a, b)
  truth, true_lse = reference.warmup_attention(
    q, k, v, scale=scale, kv_lengths=None
  )
  np.testing.assert_allclose(
    out.astype(jnp.float32), truth.astype(jnp.float32), atol=0.02
  )
  np.testing.assert_allclose(lse, true_lse, atol=1e-4)


def test_attention_keeps_nan_in_the_rows_that_see_it(on_cpu):
  q, k, v, dout = attention_inputs()
  clean = attend(q, k, v, dout)
  bad = attend(
    q.at[0, 3, 1, 0].set(jnp.nan),  # group 0
    k.at[0, 8, 1, 2].set(jnp.inf),
    v.at[1, 10, 0, 0].set(-jnp.inf),
    dout.at[1, 5, 2].set(jnp.nan),  # group 1
  )
  # Batch row, token and head.
  scores = np.zeros((2, 12, 4), bool)
  scores[0, 3, 1] = scores[0, 8:, 2:] = True
  out = scores.copy()
  out[1, 10:, :2] = True
  dq = out.copy()
  dq[1, 5, 2] = True
  dv = np.zeros((2, 12, 2), bool)
  dv[0, :4, 0] = dv[0, :, 1] = dv[1, :6, 1] = True
  dk = dv.copy()
  dk[1, :, 0] = True
  for got, want, where in zip(
    bad, clean, (out, scores.swapaxes(1, 2), dq, dk, dv)
  ):
    got, want = (np.asarray(x, np.float32) for x in (got, want))
    assert np.isnan(got[where]).all()
    np.testing.assert_array_equal(got[~where], want[~where])


@pytest.mark.usefixtures("on_cpu")
class TestLse(LseContract):
  phases = ("warmup",)
  dtypes = ("bfloat16", "float16")

  def attend(self, case, q, k, v, blocks):
    return dense_attention.attention(q, k, v)


def test_lse_cotangent_keeps_nan_in_the_rows_that_see_it(on_cpu):
  q, k, v, dout = attention_inputs()
  dlse = jnp.ones((2, 4, 12))
  clean = attend(q, k, v, dout, dlse)
  bad = attend(q, k, v, dout, dlse.at[0, 1, 5].set(jnp.nan))
  queries = np.zeros((2, 12, 4), bool)
  queries[0, 5, 1] = True
  keys = np.zeros((2, 12, 2), bool)
  keys[0, :6, 0] = True
  nothing = np.zeros((2, 12, 2), bool)  # no value
  for got, want, where in zip(bad[2:], clean[2:], (queries, keys, nothing)):
    got, want = (np.asarray(x, np.float32) for x in (got, want))
    assert np.isnan(got[where]).all()
    np.testing.assert_array_equal(got[~where], want[~where])


def test_attention_names_what_it_does_not_support():
  q, k, v, _ = attention_inputs()
  with pytest.raises(NotImplementedError, match="12 keys and 5 queries"):
    dense_attention.attention(q[:, :5], k, v)
  with pytest.raises(NotImplementedError, match=r"dtype in .* got float32"):
    dense_attention.attention(*(x.astype(jnp.float32) for x in (q, k, v)))
  with pytest.raises(NotImplementedError, match=r"head_dim of .* got 12"):
    dense_attention.attention(*(x[..., :12] for x in (q, k, v)))


# ------------------------------------------------ through the operations, CPU


def layer(
  phase, implementation="mosaic_gpu", with_lse=True, sink=None, **options
):
  """(q, k, v, index_q, index_k, dout) -> (kl, gradients).

  A number as the sink is every head's.

  The KL has a weight of 1,024: the gradients of a mean are below float16's
  range.
  """

  def run(*inputs):
    *inputs, dout = inputs

    def loss(*inputs):
      out, kl, ids, lse = msa_jax.msa_attention(
        *inputs, phase=phase, with_kl=with_lse, implementation=implementation,
        **options,
      )  # fmt: skip
      if not with_lse:  # msa_attention's is not used
        q, k, _, *index = inputs
        ids = ids if phase == "sparse" else None
        kl = msa_jax.index_kl_loss(
          q, k, *index, ids, implementation=implementation
        )
      if sink is not None:
        out = op_contract.with_sink(out, lse, jnp.full(lse.shape[1], sink))
      return jnp.sum((out * dout).astype(jnp.float32)) + 1024 * kl, kl

    grad = jax.grad(loss, range(5), has_aux=True)
    grads, kl = grad(*inputs)
    return kl, grads

  return run


def shapes(case):
  q = (case.batch, case.tokens, case.num_heads, case.head_dim)
  kv = (case.batch, case.kv_tokens, case.num_kv_heads, case.head_dim)
  index_q = (case.batch, case.tokens, case.num_kv_heads, case.index_dim)
  index_k = (case.batch, case.kv_tokens, case.index_dim)
  return [
    jax.ShapeDtypeStruct(size, case.dtype)
    for size in (q, kv, kv, index_q, index_k, q)
  ]


WARMUP = {
  "msa_select_exact": 1,
  "dot_product_attention_fwd_wrapper": 1,
  "dot_product_attention_bwd_wrapper": 1,
  "dense_kl_index_lse": 1,
  "dense_kl_units": 1,
}
SPARSE = {
  "msa_select_exact": 1,
  "sparse_pairs": 1,
  "sparse_tiles": 1,
  "sparse_tiles_merge": 1,
  "sparse_kv_blocks": 1,
  "sparse_sum_extra": 2,  # of dk and dv, of dindex_k
  "kl_index_lse": 1,
  "kl_kv_blocks": 1,
}


@pytest.mark.parametrize(
  "phase, want", [("warmup", WARMUP), ("sparse", SPARSE)]
)
def test_a_step_computes_nothing_twice(pretend_hopper, phase, want):
  traced = jax.jit(layer(phase)).trace(*shapes(cases.PAPER["8k"]))
  assert launches(traced.jaxpr.jaxpr) == want
  kl, _ = traced.out_info
  assert kl.dtype == jnp.float32
  if phase == "warmup":
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaSoftmaxBackward" in text


@pytest.mark.parametrize(
  "phase, lowers",
  [
    ("warmup", True),
    ("sparse", False),
    # test_kernels_backward lowers the one kernel that gets this gradient.
    pytest.param("sparse", True, marks=pytest.mark.slow),
  ],
)
def test_gradient_of_lse_lowers_and_has_its_price(
  pretend_hopper, phase, lowers
):
  """None in the sparse phase, and two more calls of cuDNN in the warm-up."""
  traced = jax.jit(layer(phase, sink=0.5)).trace(*shapes(cases.PAPER["8k"]))
  want = SPARSE if phase == "sparse" else WARMUP | {
    "dot_product_attention_fwd_wrapper": 2,
    "dot_product_attention_bwd_wrapper": 2,
  }  # fmt: skip
  assert launches(traced.jaxpr.jaxpr) == want
  if lowers:
    traced.lower(lowering_platforms=("cuda",))


def test_warm_up_over_an_odd_number_of_tokens_has_gradients(pretend_hopper):
  # cuDNN's own call refuses them.
  case = cases.Case(tokens=777, num_heads=4, num_kv_heads=2)
  for sink in (None, 0.5):
    _, grads = jax.eval_shape(layer("warmup", sink=sink), *shapes(case))
    assert [x.shape for x in grads] == [x.shape for x in shapes(case)[:5]]


def test_kl_without_lse_computes_it(pretend_hopper):
  for phase, names in (
    ("warmup", {"dot_product_attention_fwd_wrapper": 2}),
    ("sparse", {"sparse_tiles": 2}),
  ):
    run = jax.jit(layer(phase, with_lse=False))
    found = launches(run.trace(*shapes(cases.PAPER["8k"])).jaxpr.jaxpr)
    assert {name: found[name] for name in names} == names


def test_a_warm_up_that_cudnn_does_not_take_has_a_kernel(pretend_hopper):
  q, k, v, index_q, index_k, _ = shapes(cases.PAPER["8k"])
  run = functools.partial(
    msa_jax.msa_attention,
    phase="warmup",
    with_kl=True,
    implementation="mosaic_gpu",
  )
  short = [
    jax.ShapeDtypeStruct((1, 5, *x.shape[2:]), x.dtype) for x in (q, index_q)
  ]
  ids = jnp.ones((1, 8192), jnp.int32)
  for call, inputs in (
    (
      functools.partial(run, kv_lengths=jnp.full(1, 8192)),
      (q, k, v, index_q, index_k),
    ),
    (run, (short[0], k, v, short[1], index_k)),
    (functools.partial(run, segment_ids=ids), (q, k, v, index_q, index_k)),
  ):
    found = launches(jax.jit(call).trace(*inputs).jaxpr.jaxpr)
    assert found["masked_attention"] == 1
    assert not any("dot_product" in name for name in found)


def kernels(*inputs, with_kl=True, **options):
  return msa_jax.msa_attention(
    *inputs, with_kl=with_kl, implementation="mosaic_gpu", **options
  )


@pytest.mark.parametrize(
  "sink", [pytest.param(None, marks=pytest.mark.slow), 0.5]
)
@pytest.mark.parametrize("phase", ["warmup", "sparse"])
def test_layers_under_remat_scan_and_vmap_lower(pretend_hopper, phase, sink):
  """Two rematerialised layers in a scan, their KLs logged, under vmap."""

  def loss(*inputs):
    @jax.checkpoint
    def one(q):
      out, kl, _, lse = kernels(q, *inputs[1:], phase=phase)
      if sink is not None:
        out = op_contract.with_sink(out, lse, jnp.full(lse.shape[1], sink))
      return q + out, kl

    q, kl = jax.lax.scan(lambda q, _: one(q), inputs[0], length=2)
    return jnp.sum(q.astype(jnp.float32)) + kl.sum(), kl

  grad = jax.vmap(jax.grad(loss, range(5), has_aux=True))
  inputs = [
    jax.ShapeDtypeStruct((2, *x.shape), x.dtype)
    for x in shapes(cases.PAPER["8k"])[:-1]
  ]
  traced = jax.jit(grad).trace(*inputs)
  grads, kl = traced.out_info
  assert [g.shape for g in grads] == [x.shape for x in inputs]
  assert kl.shape == (2, 2)
  # The KL's pass is part of the forward: once there, once recomputed.
  want = WARMUP if phase == "warmup" else SPARSE
  found = launches(traced.jaxpr.jaxpr)
  # Nothing here reads the choice of the warm-up.
  unread = {"msa_select_exact"} if phase == "warmup" else set()
  assert set(found) == set(want) - unread
  name = "dense_kl_units" if phase == "warmup" else "kl_kv_blocks"
  assert found[name] <= 2
  if phase == "sparse" and sink is not None:
    return  # The kernels that are traced here, other tests lower.
  text = traced.lower(lowering_platforms=("cuda",)).as_text()
  assert name in text


UNSUPPORTED = {
  "dtype": dict(dtype="float32"),
  "head_dim": dict(head_dim=12),
  "index_dim": dict(index_dim=12),
  "group_size": dict(num_heads=34, num_kv_heads=2),
  "block_size": dict(block_size=32),
  "top_k": dict(top_k=65),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_no_gradient_outside_what_is_supported(pretend_hopper, name):
  """It says so; without a name, another implementation gives the gradient."""
  case = dataclasses.replace(
    cases.Case(
      tokens=96, num_heads=4, num_kv_heads=2, head_dim=64, index_dim=64,
      block_size=64, top_k=2,
    ),
    **UNSUPPORTED[name],
  )  # fmt: skip
  inputs = shapes(case)[:-1]

  def grads(implementation):
    def loss(*inputs):
      out, kl, *_ = msa_jax.msa_attention(
        *inputs,
        block_size=case.block_size,
        top_k=case.top_k,
        with_kl=True,
        implementation=implementation,
      )
      return jnp.sum(jnp.sin(out.astype(jnp.float32))) + kl

    return jax.jit(jax.grad(loss, range(5)))

  with pytest.raises(NotImplementedError, match=f"supports {name}"):
    grads("mosaic_gpu").trace(*inputs)
  # The whole of it, gradient included, is the other implementation's.
  texts = [grads(name).lower(*inputs).as_text() for name in (None, "xla")]
  assert texts[0] == texts[1]


@pytest.mark.parametrize("phase", ["warmup", "sparse"])
@pytest.mark.parametrize("kl", [False, True])
def test_no_gradient_of_gradients(pretend_hopper, phase, kl):
  """The kernels have none, which is said and not taken for zero."""

  def loss(*inputs):
    result = kernels(*inputs, with_kl=kl, phase=phase)
    return result.kl if kl else jnp.sum(result.out.astype(jnp.float32))

  which = (3, 4) if kl else (0, 1, 2)
  first = jax.grad(loss, which)

  def norm(*inputs):
    return sum(jnp.sum(g.astype(jnp.float32) ** 2) for g in first(*inputs))

  inputs = shapes(cases.PAPER["8k"])[:-1]
  assert len(jax.eval_shape(first, *inputs)) == len(which)
  # Attention of the warm-up is cuDNN's, whose refusal is JAX's own.
  wanted = "reverse mode of first order only|Differentiation rule"
  with pytest.raises(NotImplementedError, match=wanted):
    jax.eval_shape(jax.grad(norm, which), *inputs)


# -------------------------------------------------------------------- Hopper


@pytest.mark.gpu
@pytest.mark.gpu_memory  # all scores of 64 heads, several times
@pytest.mark.usefixtures("hopper")
class TestGpuLse(LseContract):
  phases = ("warmup",)
  dtypes = ("bfloat16",)
  dense = Case(
    batch=2, q_len=2048, kv_len=2048, num_heads=64, num_kv_heads=4, head_dim=128
  )

  def attend(self, case, q, k, v, blocks):
    return jax.jit(dense_attention.attention)(q, k, v)


@pytest.mark.gpu
@pytest.mark.parametrize("phase", ["warmup", "sparse"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("tokens, heads, dim", [(1024, 16, 128), (777, 2, 64)])
def test_gpu_training_matches_the_reference(
  hopper, phase, dtype, tokens, heads, dim
):
  # Half of the calls have sinks: any two of the other values meet both.
  odd = (phase == "sparse") + (dtype == "float16") + (dim == 64)
  sink = 0.5 if odd % 2 else None
  case = cases.Case(
    tokens=tokens, batch=2, num_heads=2 * heads, num_kv_heads=2, head_dim=dim,
    index_dim=dim, top_k=3, dtype=dtype,
  )  # fmt: skip
  qkv = cases.attention_inputs(jax.random.key(0), case)
  index = cases.index_inputs(jax.random.key(1), case, "random")
  dout = cases.normal(jax.random.key(2), qkv[0].shape, dtype)
  mask = jnp.arange(tokens)[None] % 5 != jnp.arange(2)[:, None]
  options = dict(top_k=3, query_mask=mask, sink=sink)
  inputs = (*qkv, *index, dout)
  run = jax.jit(layer(phase, **options))
  kl, grads = run(*inputs)
  truth = jax.jit(layer(phase, "reference", **options))
  true_kl, true_grads = truth(*(x.astype(jnp.float32) for x in inputs))
  assert abs(kl - true_kl) <= 2e-3 * abs(true_kl)
  for name, got, true in zip(NAMES, grads, true_grads):
    got, true = (np.asarray(x, np.float32) for x in (got, true))
    assert np.linalg.norm(got - true) <= 0.005 * np.linalg.norm(true), name
  # cuDNN fixes the order of its sums only if XLA is told to.
  again_kl, again = run(*inputs)
  ours = slice(3, 5) if phase == "warmup" else slice(5)
  for a, b in zip((kl, *grads[ours]), (again_kl, *again[ours])):
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.gpu
def test_gpu_attention_lse_and_nan(hopper):
  case = Case(
    batch=2, q_len=600, kv_len=600, num_heads=32, num_kv_heads=2, head_dim=128
  )
  q, k, v, *_ = case.inputs(dtype=jnp.bfloat16)
  dout = jax.random.normal(jax.random.key(9), q.shape, q.dtype)
  clean = jax.jit(attend)(q, k, v, dout)
  _, lse = reference.warmup_attention(q, k, v, scale=128**-0.5, kv_lengths=None)
  np.testing.assert_allclose(clean[1], lse, atol=1e-5, rtol=1e-6)
  bad = jax.jit(attend)(
    q.at[0, 300, 1, 0].set(jnp.nan), k, v.at[1, 590, 1].set(jnp.inf), dout
  )
  where = np.zeros((2, 600, 32), bool)
  where[0, 300, 1] = where[1, 590:, 16:] = True
  np.testing.assert_array_equal(np.isnan(bad[0]).any(-1), where)
  np.testing.assert_array_equal(np.isnan(bad[2]).any(-1), where)
  keys = np.zeros((2, 600, 2), bool)
  keys[0, :301, 0] = keys[1, :, 1] = True
  np.testing.assert_array_equal(np.isnan(bad[3]).any(-1), keys)
  np.testing.assert_array_equal(bad[0][~where], clean[0][~where])


def block_recalls(q, k, chosen, segment_ids=None):
  """`selection_recall`, relative to the recall of the best blocks."""
  recall = msa_jax.selection_recall(
    q, k, chosen, block_size=BLOCKS["block_size"], segment_ids=segment_ids
  )
  return recall.score_recall / recall.best_score_recall


BLOCKS = dict(block_size=16, top_k=3)


def oracle_inputs(dtype=jnp.bfloat16):
  """Queries and keys with peaked attention, over more blocks than D."""
  case = Case(
    batch=2, q_len=272, kv_len=272, num_heads=4, num_kv_heads=2, head_dim=16
  )
  q, k, *_ = case.inputs(dtype=dtype)
  return 3 * q, k


def documents():
  ids = np.repeat([[1, 2, 3, 0], [4, 4, 4, 5]], [100, 61, 100, 11], axis=1)
  return jnp.asarray(ids, jnp.int32)


@pytest.mark.parametrize("where", ["plain", "documents", "lengths", "pieces"])
def test_blocks_of_one_hot_values_are_the_best(monkeypatch, where):
  """With float32 attention the choice is that of "xla", for more blocks than a
  value has dimensions too."""
  monkeypatch.setattr(mosaic_gpu, "warmup_attention", attention_of_xla)
  q, k = oracle_inputs(jnp.float32)
  options, kernels, portable = dict(BLOCKS), {}, {}
  layout = lengths = None
  if where == "documents":
    ids = documents()
    options["segment_ids"] = ids
    segments = segments_lib.document_segments(ids)
    segments = segments_lib.with_max_segments(segments, BLOCKS["block_size"])
    layout = segments_lib.block_layout(segments, BLOCKS["block_size"])
  elif where == "lengths":
    q, lengths = q[:, :40], jnp.array([272, 20])
    options["kv_lengths"] = lengths
  elif where == "pieces":
    slots = np.r_[5:30, 200:250]
    q = q[:, slots]
    pieces = [(jnp.array([s, s]), n) for s, n in ((5, 25), (200, 50))]
    options["query_pieces"] = pieces
    kernels["query_pieces"] = pieces
    portable["query_slots"] = jnp.asarray([slots, slots])
  want = msa_jax.best_blocks(q, k, implementation="xla", **options)
  mass = mosaic_gpu.block_masses(
    q, k, block_size=BLOCKS["block_size"], layout=layout, scale=0.25,
    kv_lengths=lengths, **kernels,
  )  # fmt: skip
  got = xla.largest_blocks(
    mass, k.shape[1], layout=layout, kv_lengths=lengths, **BLOCKS, **portable
  )
  assert mass.shape[-1] > q.shape[-1]
  assert (np.asarray(got) >= 0).any()
  np.testing.assert_array_equal(got, want)


def attention_of_xla(q, k, v, *, kv_lengths, query_pieces=None, **options):
  slots = None
  if query_pieces is not None:
    slots = [start[:, None] + jnp.arange(n) for start, n in query_pieces]
    slots = jnp.concatenate(slots, axis=1)
  return xla.warmup_attention(
    q, k, v, kv_lengths=kv_lengths, query_slots=slots, **options
  )


def test_blocks_of_rounded_masses_are_nearly_the_best(on_cpu, pretend_hopper):
  """bfloat16 has 8 bits: where masses are that close, either block is good."""
  q, k = oracle_inputs()
  mass = mosaic_gpu.block_masses(
    q, k, block_size=BLOCKS["block_size"], layout=None, scale=0.25,
    kv_lengths=None,
  )  # fmt: skip
  total = jnp.sum(mass, axis=-1)
  np.testing.assert_allclose(total, 1, atol=2**-8)
  got = xla.largest_blocks(mass, k.shape[1], kv_lengths=None, **BLOCKS)
  assert 0.999 < block_recalls(q, k, got) <= 1 + 1e-6
  # A choice that is not made by attention is far from it.
  others = msa_jax.best_blocks(q[:, ::-1], k, implementation="xla", **BLOCKS)
  assert block_recalls(q, k, others) < 0.9


@pytest.mark.parametrize("packed", [False, True])
def test_the_oracle_of_a_layer_is_lowered_as_dense_attention(
  pretend_hopper, packed
):
  shape = cases.PAPER["8k"]
  q, k, *_ = shapes(shape)
  ids = jax.ShapeDtypeStruct(q.shape[:2], jnp.int32) if packed else None

  def choose(q, k, ids):
    return msa_jax.best_blocks(
      q, k, segment_ids=ids, implementation="mosaic_gpu"
    )

  (choice,) = msa_jax.explain(choose, q, k, ids)
  assert str(choice) == "best_blocks takes mosaic_gpu"
  text = jax.jit(choose).trace(q, k, ids).lower(lowering_platforms=("cuda",))
  name = "masked" if packed else "__cudnn"
  assert name in text.as_text()


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
def test_gpu_blocks_with_the_most_attention(hopper, packed):
  case = Case(
    batch=2, q_len=2080, kv_len=2080, num_heads=8, num_kv_heads=2, head_dim=64
  )
  q, k, *_ = case.inputs(dtype=jnp.bfloat16)
  ids = None
  if packed:
    ids = jnp.repeat(jnp.array([[1, 2, 3]] * 2), jnp.array([700, 900, 480]), 1)
  found = {
    name: jax.jit(
      functools.partial(
        msa_jax.best_blocks, segment_ids=ids, implementation=name, **BLOCKS
      )
    )(3 * q, k)
    for name in ("xla", "mosaic_gpu")
  }
  same = np.asarray(found["xla"] == found["mosaic_gpu"]).all(-1).mean()
  assert same > 0.9
  assert block_recalls(3 * q, k, found["mosaic_gpu"], ids) > 0.999
