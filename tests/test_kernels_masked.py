"""Dense attention under a column mask: planned, interpreted, lowered, run."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import op_contract
import pytest
from flax import nnx
from helpers import Case
from op_contract import (
  check_attention,
  check_attention_gradients,
  lse_cotangent,
)
from test_kernels_packed import (
  GPU_CASES,
  GPU_LAYOUTS,
  assert_rows_agree,
  layout_of,
  poisoned,
  random_spans,
  segments_of,
  small,
)

import msa_jax
from msa_jax import ops
from msa_jax import segments as segments_lib
from pallas_kernels import masked_attention as masked
from pallas_kernels import mosaic


@pytest.mark.parametrize("q_len, first", [(900, 0), (300, 600), (300, -100)])
def test_a_plan_lists_what_is_seen_and_nothing_twice(q_len, first):
  for seed in range(4):
    spans, parents = random_spans(seed, 900, 64)
    until = segments_of([spans], [parents], 900, 64).visible_until
    until = np.pad(np.asarray(until), ((0, 0), (0, 124)))
    slots = first + np.arange(q_len)[:, None]
    key = np.arange(until.shape[1])
    seen = (key <= slots) & (slots < until[0])

    def tiles(fill, seen=seen):
      pad = ((0, -q_len % masked.TILE), (0, 0))
      seen = np.pad(seen, pad, constant_values=fill)
      return seen.reshape(-1, masked.TILE, 8, masked.TILE).swapaxes(1, 2)

    # What is behind the last query is cut off, so it needs no mask.
    some = tiles(False).any((-1, -2))
    every = some & tiles(True).all((-1, -2))
    plans = jax.jit(masked.plan_tiles, static_argnums=2)(
      jnp.asarray(until), jnp.array([first], jnp.int32), q_len
    )
    for plan, seen, whole in zip(plans, (some, some.T), (every, every.T)):
      assert sorted(plan.order.tolist()) == list(range(len(seen)))
      work = plan.counts[plan.order, 1]
      assert (np.diff(work) <= 0).all()
      for i, (plain, count) in enumerate(plan.counts.tolist()):
        listed = plan.tiles[i, :count].tolist()
        assert len(set(listed)) == count
        assert set(listed) >= set(np.flatnonzero(seen[i]).tolist())
        assert whole[i, listed[:plain]].all()
      # No more than the tiles whose rectangle of slots the mask meets, and of
      # a plain causal row exactly those that are seen.
      assert plan.counts[:, 1].sum() <= 2 * seen.sum() + len(seen)
  plan, _ = masked.plan_tiles(
    jnp.full((1, 1024), 1024), jnp.array([1024 - q_len], jnp.int32), q_len
  )
  want = (1024 - q_len + np.arange(0, q_len, 128) + 127) // 128 + 1
  np.testing.assert_array_equal(plan.counts[:, 1], np.minimum(want, 8))


FEW_QUERIES = Case(
  batch=2, q_len=70, kv_len=150, num_heads=2, num_kv_heads=1, head_dim=64,
  kv_lengths=(150, 40),
)  # fmt: skip


@pytest.mark.parametrize(
  "kind",
  [
    "trees",
    *(
      pytest.param(x, marks=pytest.mark.slow)
      for x in ("documents", "long", "few_queries")
    ),
  ],
)
def test_interpreted_attention_and_gradients(kind):
  """A document of NaN, trees with padding inside, of one tile and of several,
  and rows with kv_lengths, of which one has fewer keys than queries."""
  if kind == "few_queries":
    case, layout, poison = FEW_QUERIES, None, np.zeros((2, 150), bool)
    q, k, v, dout = op_contract.attention_inputs(case, "bfloat16")
  else:
    case, layout, poison = small(kind)
    inputs = op_contract.attention_inputs(case, "bfloat16")
    q, k, v, dout = (poisoned(x, poison) for x in inputs)
  dlse = lse_cotangent(case, None, layout)
  if layout is not None:
    dlse = jnp.broadcast_to(dlse[:1], dlse.shape)

  @jax.jit  # One program: the plans have many small operations.
  def run(q, k, v, dout, dlse, until):
    results, pull = jax.vjp(
      lambda *x: masked.attention(
        *x,
        kv_lengths=case.lengths,
        until=until,
        config=masked.Config(num_ctas=2),
        interpret=True,
      ),
      *(q, k, v),
    )
    return *results, pull((dout, dlse))

  until = None if layout is None else layout.visible_until
  given = q, k, v, dout
  if kind == "few_queries":
    # NaN in queries that see nothing, which reaches nothing.
    q, dout = (x.at[1, i].set(jnp.nan) for i, x in enumerate((q, dout)))
  out, lse, grads = run(q, k, v, dout, dlse, until)
  q, k, v, dout = given
  if layout is not None and case.batch > 1:
    assert_rows_agree((out, *grads), poison)
    assert np.isnan(np.asarray(grads[0], np.float32)[1][poison[1]]).all()
    case = dataclasses.replace(case, batch=1)
    layout, out, lse, q, k, v, dout, dlse, *grads = (
      jax.tree.map(lambda x: x[:1], x)
      for x in (layout, out, lse, q, k, v, dout, dlse, *grads)
    )
  check_attention(case, q, k, v, None, out, lse, layout)
  check_attention_gradients(case, q, k, v, dout, None, grads, dlse, layout)


# With sinks, gradients of lse come on top of the others.
@pytest.mark.parametrize(
  "sinks", [pytest.param(False, marks=pytest.mark.slow), True]
)
def test_a_packed_layer_lowers_for_cuda_at_128k(pretend_hopper, sinks):
  """With gradients, of lse too if there are sinks: the kernel attends, and no
  mask of T x T exists."""
  layer = nnx.eval_shape(
    lambda: msa_jax.GQAttention(
      64, 256, 64 * 128, num_kv_heads=4, implementation="cudnn",
      dtype=jnp.bfloat16, sinks=sinks, rngs=nnx.Rngs(0),
    )
  )  # fmt: skip
  graphdef, params = nnx.split(layer)

  def loss(params, x, ids):
    out = nnx.merge(graphdef, params)(x, segment_ids=ids, max_segments=2000)
    return jnp.sum(out.astype(jnp.float32))

  x = jax.ShapeDtypeStruct((1, 1 << 17, 256), jnp.bfloat16)
  ids = jax.ShapeDtypeStruct((1, 1 << 17), jnp.int32)
  traced = jax.jit(jax.grad(loss, (0, 1))).trace(params, x, ids)
  text = traced.lower(lowering_platforms=("cuda",)).as_text()
  for name in ("masked_attention", "_dq", "_dkv"):
    assert name in text
  assert "131072x131072" not in text and "__cudnn" not in text
  (choice,) = msa_jax.explain(loss, params, x, ids)
  assert str(choice) == "dense_attention takes mosaic_gpu"


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
  "name",
  [
    name
    for name, (case, _) in GPU_CASES.items()
    if case.head_dim <= mosaic.MAX_DENSE_HEAD_DIM
  ],
)
def test_gpu_attention(hopper, name, packed):
  case, dtype = GPU_CASES[name]
  if not packed:
    lengths = (case.kv_len, case.kv_len // 3)[: case.batch]
    case = dataclasses.replace(
      case, q_len=case.kv_len - 333, kv_lengths=lengths
    )
  q, k, v, dout = op_contract.attention_inputs(case, dtype)

  @jax.jit
  def run(q, k, v, dout, layout, dlse):
    until = None if layout is None else layout.visible_until
    both, pull = jax.vjp(
      lambda *x: masked.attention(*x, kv_lengths=case.lengths, until=until),
      *(q, k, v),
    )
    return both, pull((dout, dlse))

  def check(q, k, v, dout, layout, dlse, got):
    (out, lse), grads = got
    check_attention(case, q, k, v, None, out, lse, layout)
    check_attention_gradients(case, q, k, v, dout, None, grads, dlse, layout)

  for kind, seed in GPU_LAYOUTS if packed else [(None, 0)]:
    layout = layout_of(case, kind, 10 * seed) if packed else None
    dlse = lse_cotangent(case, None, layout)
    op_contract.run_twice(run, check, q, k, v, dout, layout, dlse)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [600, 601])
def test_gpu_documents_of_the_operation(hopper, tokens):
  """Documents of 1, 128 and all tokens, padding, NaN in one of them, and a row
  with more documents than fit."""
  case = Case(
    batch=2, q_len=tokens, kv_len=tokens, num_heads=16, num_kv_heads=2,
    head_dim=128,
  )  # fmt: skip
  q, k, v, dout = op_contract.attention_inputs(case, "bfloat16")
  ids = np.zeros((2, tokens), np.int32)
  for i, (start, end) in enumerate([(3, 4), (4, 132), (140, 400), (400, 599)]):
    ids[0, start:end] = i + 1
  ids[1] = 1

  @functools.partial(jax.jit, static_argnames=("implementation", "most"))
  def run(q, k, v, dout, ids, implementation="mosaic_gpu", most=4):
    segments = segments_lib.document_segments(ids, most)
    (out, lse), pull = jax.vjp(
      lambda *x: ops.dense_attention(
        *x, segments=segments, implementation=implementation
      ),
      *(q, k, v),
    )
    return out, *pull((dout, jnp.zeros_like(lse)))

  clean = run(q, k, v, dout, ids)
  exact = (x.astype(jnp.float32) for x in (q, k, v, dout))
  for got, true in zip(clean, run(*exact, ids, implementation="reference")):
    got, true = (np.asarray(x, np.float32) for x in (got, true))
    assert not got[ids == 0].any()
    assert np.linalg.norm(got - true) <= 0.005 * np.linalg.norm(true)
  other = (ids == 3)[..., None, None]
  bad = run(*(jnp.where(other, jnp.nan, x) for x in (q, k, v, dout)), ids)
  full = run(q, k, v, dout, ids, most=3)
  for got, many, want in zip(bad, full, clean):
    got, many, want = (np.asarray(x, np.float32) for x in (got, many, want))
    assert np.isnan(got[ids == 3]).all()
    np.testing.assert_array_equal(got[ids != 3], want[ids != 3])
    assert np.isnan(many[0]).any((-1, -2))[ids[0] != 0].all()
    np.testing.assert_array_equal(many[1], want[1])
