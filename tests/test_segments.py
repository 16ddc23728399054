"""Packed rows: documents and prefix trees, against loops and against each
document alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Case, loop_msa, loop_select, packed_rows
from hypothesis import given, settings
from hypothesis import strategies as st

import msa_jax
from msa_jax import segments as segments_lib
from msa_jax import xla

IMPLEMENTATIONS = ("reference", "xla")

# Rows of 40 slots: documents of 1 token, of a block - 1, of a block, of a block
# + 1; padding in front, between and behind; a row that is one document.
DOCUMENTS = [
  [(2, 3), (3, 6), (6, 10), (12, 17), (17, 36)],
  [(0, 40)],
]
# Two trees, of depths 4 and 2, with padding between and inside, and a document.
# Inner nodes are no whole blocks.
TREES = (
  [
    [
      (1, 8), (8, 13), (13, 14), (15, 20), (20, 26), (28, 33), (33, 35),
      (35, 40),
    ],
    [(0, 4), (4, 12), (12, 20), (20, 39)],
  ],
  [[-1, 0, 1, 2, 0, -1, 5, -1], [-1, 0, 1, 0]],
)  # fmt: skip


def case_of(**options):
  options = dict(batch=2, q_len=40, kv_len=40, num_local_blocks=2) | options
  return Case(**options)


def ids_of(documents, length):
  """segment_ids of rows of (start, end)."""
  ids = np.zeros((len(documents), length), np.int32)
  for b, row in enumerate(documents):
    for i, (start, end) in enumerate(row):
      ids[b, start:end] = 7 * i + 1
  return ids


def roots(documents):
  return [[-1] * len(row) for row in documents]


def packings():
  """name -> (options of the operations, rows of the oracle)."""
  spans, parents = TREES
  return {
    "documents": (
      dict(segment_ids=jnp.asarray(ids_of(DOCUMENTS, 40)), max_segments=5),
      packed_rows(DOCUMENTS, roots(DOCUMENTS), 40, 4),
    ),
    "trees": (
      dict(
        segments=msa_jax.tree_segments(
          spans, parents, length=40, max_segments=8
        )
      ),
      packed_rows(spans, parents, 40, 4),
    ),
  }


def assert_close(got, want, tolerance):
  np.testing.assert_array_equal(np.isneginf(got), np.isneginf(want))
  np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


def rule_by_loops(segments):
  """Which slot sees which, from the rule of visible_until alone."""
  span, until = np.asarray(segments.span), np.asarray(segments.visible_until)
  batch, length = span.shape
  sees = np.zeros((batch, length, length), bool)
  for b, t, j in np.ndindex(sees.shape):
    sees[b, t, j] = j <= t < until[b, j] and span[b, t] >= 0
  return sees


def assert_segments(segments, rows, block_size):
  """Segments and their blocks say what the oracle's rows say."""
  layout = segments_lib.block_layout(segments, block_size)
  sees = rule_by_loops(segments)
  used = 0
  for b, row in enumerate(rows):
    for t, seen in enumerate(row.seen):
      assert np.flatnonzero(sees[b, t]).tolist() == seen
      position = len(seen) - 1 if seen else 0
      assert segments.positions[b, t] == position
      assert layout.own_block[b, t] == row.block[t]
      # The blocks that a query sees, in order, have the depths 0, 1, ...
      blocks = list(dict.fromkeys(row.block[j] for j in seen))
      visible = (layout.block_start[b] <= t) & (t < layout.block_until[b])
      if seen:
        assert np.flatnonzero(visible).tolist() == blocks
        depths = np.asarray(layout.block_depth)[b, blocks]
        assert depths.tolist() == list(range(len(blocks)))
    for n in range(max(row.block) + 1):
      slots = [j for j, block in enumerate(row.block) if block == n]
      assert layout.block_start[b, n] == slots[0]
      assert layout.block_end[b, n] == slots[-1] + 1
    used = max(used, max(row.block) + 1)
    assert np.all(np.asarray(layout.block_until)[b, max(row.block) + 1 :] == 0)
  assert segments_lib.check_segment_values(segments, block_size) == used


@st.composite
def forests(draw):
  """(spans, parents, length) of one row."""
  spans, parents, path, at = [], [], [], draw(st.integers(0, 2))
  for i in range(draw(st.integers(1, 7))):
    end = at + draw(st.integers(1, 9))
    spans.append((at, end))
    parents.append(draw(st.sampled_from([-1, *path])))
    path = path[: path.index(parents[-1]) + 1] if parents[-1] >= 0 else []
    path.append(i)
    at = end + draw(st.sampled_from([0, 0, 1, 3]))
  return spans, parents, at + draw(st.integers(0, 2))


@settings(max_examples=25, deadline=None)
@given(forests())
def test_any_forest_has_the_segments_and_blocks_of_the_rule(forest):
  spans, parents, length = forest
  # One size for all, so that what is compiled is shared.
  segments = msa_jax.tree_segments([spans], [parents], length=90)
  assert length <= 90
  assert_segments(segments, packed_rows([spans], [parents], 90, 4), 4)


@settings(max_examples=25, deadline=None)
@given(forests())
def test_documents_are_trees_of_one_node(forest):
  spans, _, _ = forest
  ids = jnp.asarray(ids_of([spans], 90))
  found = segments_lib.document_segments(ids)
  want = msa_jax.tree_segments([spans], roots([spans]), length=90)
  for name in ("visible_until", "positions", "span"):
    got = getattr(found, name)
    np.testing.assert_array_equal(got, getattr(want, name), err_msg=name)


def test_a_run_is_a_document_also_if_its_id_returns():
  ids = jnp.asarray([[3, 3, 0, 3, 3, -1, -1, 3]], jnp.int32)
  segments = segments_lib.document_segments(ids)
  np.testing.assert_array_equal(segments.span, [[0, 0, -1, 1, 1, 2, 2, 3]])
  np.testing.assert_array_equal(
    segments.visible_until, [[2, 2, 0, 5, 5, 7, 7, 8]]
  )
  np.testing.assert_array_equal(segments.positions, [[0, 1, 0, 0, 1, 0, 1, 0]])


@pytest.mark.parametrize("phase", ["sparse", "warmup"])
@pytest.mark.parametrize("name", ["documents", "trees"])
def test_outputs_and_gradients_equal_loops(name, phase, x64):
  """Both implementations in float64: choices, out, lse, KL, every gradient.

  The KL has weights, which are 0 for some queries. Weights of eighths have
  exact sums.
  """
  case = case_of()
  packed, rows = packings()[name]
  inputs = case.inputs(dtype=jnp.float64)
  d_out = jax.random.normal(jax.random.key(7), inputs[0].shape, jnp.float64)
  weights = jax.random.randint(jax.random.key(8), (2, 40), 0, 12)
  weights = weights.astype(jnp.float32) / 8
  for implementation in IMPLEMENTATIONS:

    @jax.jit
    def run(inputs, implementation=implementation):
      def loss(inputs):
        result = msa_jax.msa_attention(
          *inputs,
          block_size=4,
          top_k=3,
          num_local_blocks=2,
          phase=phase,
          with_kl=True,
          query_mask=weights,
          implementation=implementation,
          **packed,
        )
        return jnp.sum(result.out * d_out) + result.kl, result

      return jax.grad(loss, has_aux=True)(inputs)

    grads, result = run(inputs)
    np.testing.assert_array_equal(
      result.block_indices, loop_select(case, *inputs[3:], rows)
    )
    blocks = None if phase == "warmup" else result.block_indices
    out, lse, kl, main, index = loop_msa(
      case, *inputs, blocks, d_out, weights, rows
    )
    assert_close(result.out, out, 1e-11)
    assert_close(result.lse, lse, 1e-11)
    assert_close(result.kl, kl, 1e-11)
    for got, want in zip(grads, (*main, *index)):
      assert_close(got, want, 1e-10)
    msa_jax.check_block_indices(
      result.block_indices, 40, block_size=4, **packed
    )


@functools.partial(jax.jit, static_argnames=("implementation", "phase"))
def _run(inputs, cotangent, mask, ids, *, implementation, phase):
  """Values and gradients of a packed call, or of a plain one with ids None."""

  def loss(inputs):
    q, k, *_ = inputs
    result = msa_jax.msa_attention(
      *inputs,
      block_size=4,
      top_k=3,
      phase=phase,
      with_kl=True,
      query_mask=mask,
      segment_ids=ids,
      implementation=implementation,
    )
    recall = msa_jax.selection_recall(
      q, k, result.block_indices, block_size=4, segment_ids=ids
    )
    # The sum over queries and groups, so that sums over documents compare.
    count = mask.sum() * k.shape[2]
    loss = jnp.sum(result.out * cotangent) + result.kl * count
    return loss, (result._replace(kl=result.kl * count), recall)

  return jax.grad(loss, has_aux=True)(inputs)


@functools.lru_cache
def _random_packing(seed):
  """A row of 40 slots cut into documents and padding at random."""
  rng = np.random.default_rng(seed)
  documents, at = [], int(rng.integers(3))
  while at < 40:
    size = int(rng.choice([1, 3, 4, 5, rng.integers(1, 30)]))
    documents.append((at, min(at + size, 40)))
    at += size + int(rng.choice([0, 0, 0, 2]))
  return documents


def _alone(array, documents):
  """Each document in a row of its own, from slot 0 on, zeros behind."""
  rows = []
  for b, row in enumerate(documents):
    for start, end in row:
      part = np.asarray(array)[b, start:end]
      pad = ((0, 40 - end + start),) + ((0, 0),) * (array.ndim - 2)
      rows.append(np.pad(part, pad))
  rows += [np.zeros_like(rows[0])] * (20 - len(rows))
  return jnp.asarray(np.stack(rows))


@pytest.mark.parametrize("phase", ["sparse", "warmup"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_packed_documents_equal_each_document_alone(implementation, phase):
  run = functools.partial(_run, implementation=implementation, phase=phase)
  for documents in (
    DOCUMENTS, [_random_packing(1), _random_packing(2)],
  ):  # fmt: skip
    assert sum(map(len, documents)) <= 20
    inputs = case_of().inputs(seed=3)
    cotangent = jax.random.normal(jax.random.key(7), inputs[0].shape)
    ids = jnp.asarray(ids_of(documents, 40))
    mask = jnp.ones((2, 40), bool)
    grads, (packed, recall) = run(inputs, cotangent, ids != 0, ids)
    layout = segments_lib.block_layout(segments_lib.document_segments(ids), 4)
    want_grads, (alone, _) = run(
      tuple(_alone(x, documents) for x in inputs),
      _alone(cotangent, documents),
      _alone(mask, documents),
      None,
    )
    np.testing.assert_allclose(packed.kl, alone.kl, rtol=1e-5)
    n = 0
    for b, row in enumerate(documents):
      for start, end in row:
        size, first = end - start, int(layout.own_block[b, start])
        chosen = alone.block_indices[n, :, :size]
        np.testing.assert_array_equal(
          packed.block_indices[b, :, start:end],
          jnp.where(chosen < 0, -1, chosen + first),
        )
        for got, want in (
          (packed.out[b, start:end], alone.out[n, :size]),
          (packed.lse[b, :, start:end], alone.lse[n, :, :size]),
          *((x[b, start:end], y[n, :size]) for x, y in zip(grads, want_grads)),
        ):
          np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)
        n += 1
    padding = np.asarray(ids == 0)
    assert not np.any(packed.out[padding])
    assert np.all(np.moveaxis(packed.lse, 1, 2)[padding] == -np.inf)
    assert np.all(np.moveaxis(packed.block_indices, 1, 2)[padding] == -1)
    assert not any(np.any(x[padding]) for x in grads)
    if phase == "warmup":
      continue
    # Recalls are means over the queries, so those of the documents add up.
    sizes = np.array([end - start for row in documents for start, end in row])
    total = np.zeros(3)
    for size, row in zip(sizes, range(n)):
      found = _recall(
        *(_alone(x, documents)[row : row + 1] for x in inputs[:2]),
        alone.block_indices[row : row + 1],
        jnp.where(jnp.arange(40) < size, 1, 0)[None],
      )
      total += size * np.array(found)
    np.testing.assert_allclose(recall, total / sizes.sum(), rtol=1e-5)


@jax.jit
def _recall(q, k, blocks, ids):
  return msa_jax.selection_recall(q, k, blocks, block_size=4, segment_ids=ids)


@pytest.mark.parametrize("phase", ["sparse", "warmup"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_document_sees_nothing_of_the_others(implementation, phase):
  """Others change, or are NaN: no bit of a document and its gradients moves."""
  run = functools.partial(_run, implementation=implementation, phase=phase)
  inputs = case_of().inputs(seed=3)
  cotangent = jax.random.normal(jax.random.key(7), inputs[0].shape)
  ids = jnp.asarray(ids_of(DOCUMENTS, 40))
  other = np.zeros((2, 40), bool)
  other[0, 12:17] = True
  # The KL is a mean over all documents; without the changed one, each of them
  # still sees its keys, if it sees any.
  mask = jnp.asarray(~other & (np.asarray(ids) != 0))
  grads, (before, _) = run(inputs, cotangent, mask, ids)
  assert np.isfinite(before.kl)
  for change in (jnp.nan, 5.0, -3.0):
    changed = tuple(
      jnp.where(other.reshape(2, 40, *[1] * (x.ndim - 2)), change, x)
      for x in inputs
    )
    new_grads, (after, _) = run(changed, cotangent, mask, ids)
    assert after.kl == before.kl
    for got, want in (
      (after.out, before.out),
      (np.moveaxis(after.lse, 1, 2), np.moveaxis(before.lse, 1, 2)),
      *(
        (np.moveaxis(x.block_indices, 1, 2), np.moveaxis(y.block_indices, 1, 2))
        for x, y in [(after, before)]
      ),
      *zip(new_grads, grads),
    ):
      np.testing.assert_array_equal(
        np.asarray(got)[~other], np.asarray(want)[~other]
      )
    if np.isnan(change):
      assert np.isnan(after.out[other]).all()


def test_chunks_change_nothing(monkeypatch):
  inputs = case_of().inputs(seed=3)
  cotangent = jax.random.normal(jax.random.key(7), inputs[0].shape)
  ids = jnp.asarray(ids_of(DOCUMENTS, 40))

  def run(phase):
    return _run(
      inputs, cotangent, ids != 0, ids, implementation="xla", phase=phase
    )

  whole = {phase: run(phase) for phase in ("sparse", "warmup")}
  monkeypatch.setattr(xla, "_CHUNK_ELEMENTS", 3000)
  jax.clear_caches()
  for phase, want in whole.items():
    for x, y in zip(
      jax.tree.leaves(run(phase)), jax.tree.leaves(want), strict=True
    ):
      np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
  monkeypatch.undo()
  jax.clear_caches()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_more_documents_than_fit_give_nan(implementation):
  case = case_of(q_len=12, kv_len=12)
  inputs = case.inputs()
  ids = jnp.asarray([[1] * 6 + [2] * 6, [1, 2, 3, 4] + [5] * 8], jnp.int32)

  def loss(inputs):
    result = msa_jax.msa_attention(
      *inputs, block_size=4, top_k=2, with_kl=True, segment_ids=ids,
      max_segments=3, implementation=implementation,
    )  # fmt: skip
    return jnp.sum(result.out) + jnp.sum(result.lse), result

  grads, result = jax.jit(jax.grad(loss, has_aux=True))(inputs)
  for x in (result.out, result.lse, *grads[:3]):
    assert np.isfinite(x[0]).all() and np.isnan(x[1]).all()
  assert np.isnan(result.kl)
  assert np.all(result.block_indices[1] == -1)
  recall = msa_jax.selection_recall(
    *inputs[:2], result.block_indices, block_size=4, segment_ids=ids,
    max_segments=3,
  )  # fmt: skip
  assert np.isnan(recall).all()


def test_padding_alone_is_an_empty_row():
  case = case_of(q_len=12, kv_len=12)
  ids = jnp.zeros((2, 12), jnp.int32)
  for implementation in IMPLEMENTATIONS:
    result = msa_jax.msa_attention(
      *case.inputs(), block_size=4, with_kl=True, segment_ids=ids,
      implementation=implementation,
    )  # fmt: skip
    assert not np.any(result.out) and np.all(result.lse == -np.inf)
    assert result.kl == 0 and np.all(result.block_indices == -1)


def test_memory_of_packed_rows_grows_linearly():
  """Forward and backward of both phases at 16,384 tokens stay under 2 GB."""
  case = Case(
    q_len=16384, kv_len=16384, num_heads=8, num_kv_heads=2, head_dim=64,
    index_dim=64, block_size=64, top_k=8,
  )  # fmt: skip
  ids = jax.ShapeDtypeStruct((1, 16384), jnp.int32)
  for phase in ("sparse", "warmup"):

    def loss(inputs, ids, phase=phase):
      result = msa_jax.msa_attention(
        *inputs, block_size=64, top_k=8, phase=phase, with_kl=True,
        segment_ids=ids, implementation="xla",
      )  # fmt: skip
      return jnp.sum(result.out) + result.kl

    shapes = jax.eval_shape(case.inputs)
    compiled = jax.jit(jax.grad(loss)).lower(shapes, ids).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2e9
