"""Packed rows: documents and prefix trees, against loops and against each
document alone."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
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


@settings(max_examples=25, deadline=None, derandomize=True)
@given(forests())
def test_any_forest_has_the_segments_and_blocks_of_the_rule(forest):
  spans, parents, length = forest
  # One size for all, so that what is compiled is shared.
  segments = msa_jax.tree_segments([spans], [parents], length=90)
  assert length <= 90
  assert_segments(segments, packed_rows([spans], [parents], 90, 4), 4)


@settings(max_examples=25, deadline=None, derandomize=True)
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


# Documents are trees of one node, above, and equal rows of their own, below.
@pytest.mark.parametrize("phase", ["sparse", "warmup"])
@pytest.mark.parametrize(
  "name", [pytest.param("documents", marks=pytest.mark.slow), "trees"]
)
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


# Both equal loops over packed rows, above; this compares recalls, too.
@pytest.mark.parametrize(
  "phase", ["sparse", pytest.param("warmup", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
  "implementation", [pytest.param("reference", marks=pytest.mark.slow), "xla"]
)
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
    grads, (packed, recall) = jax.device_get(
      run(inputs, cotangent, ids != 0, ids)
    )
    layout = segments_lib.block_layout(segments_lib.document_segments(ids), 4)
    own_block = np.asarray(layout.own_block)
    want_grads, (alone, _) = jax.device_get(
      run(
        tuple(_alone(x, documents) for x in inputs),
        _alone(cotangent, documents),
        _alone(mask, documents),
        None,
      )
    )
    np.testing.assert_allclose(packed.kl, alone.kl, rtol=1e-5)
    n = 0
    for b, row in enumerate(documents):
      for start, end in row:
        size, first = end - start, int(own_block[b, start])
        chosen = alone.block_indices[n, :, :size]
        np.testing.assert_array_equal(
          packed.block_indices[b, :, start:end],
          np.where(chosen < 0, -1, chosen + first),
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


@pytest.mark.parametrize(
  "implementation, phase",
  [
    *(("xla", phase) for phase in ("sparse", "warmup")),
    ("reference", "sparse"),
    pytest.param("reference", "warmup", marks=pytest.mark.slow),
  ],
)
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


@pytest.mark.slow
def test_chunks_change_nothing(patched_programs):
  inputs = case_of().inputs(seed=3)
  cotangent = jax.random.normal(jax.random.key(7), inputs[0].shape)
  ids = jnp.asarray(ids_of(DOCUMENTS, 40))

  def run(phase):
    return _run(
      inputs, cotangent, ids != 0, ids, implementation="xla", phase=phase
    )

  whole = {phase: run(phase) for phase in ("sparse", "warmup")}
  patched_programs.setattr(xla, "_chunk_elements", lambda: 1000)
  patched_programs.setattr(xla, "_TILE_ROWS", 2)
  jax.clear_caches()
  for phase, want in whole.items():
    for x, y in zip(
      jax.tree.leaves(run(phase)), jax.tree.leaves(want), strict=True
    ):
      np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


# The layout marks such rows, whichever implementation reads it.
@pytest.mark.parametrize(
  "implementation", [pytest.param("reference", marks=pytest.mark.slow), "xla"]
)
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
  segments = segments_lib.document_segments(ids, 3)
  dense, pull = jax.vjp(
    lambda *x: msa_jax.ops.dense_attention(
      *x, segments=segments, implementation=implementation
    ),
    *inputs[:3],
  )
  for x in (*dense, *pull(jax.tree.map(jnp.ones_like, dense))):
    assert np.isfinite(x[0]).all() and np.isnan(x[1]).all()


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


# ------------------------------------------------------------ layers and models

# The slow ones compile their choice of blocks twice, or a second attention.
LAYERS = {
  "gqa": dict(kind="gqa"),
  "gqa_sinks": dict(kind="gqa", sinks=True),
  "msa": dict(index={}),
  "first_block": dict(index=dict(force_first_block=True)),
  "window": dict(index=dict(selection="window", top_k=3)),
  "value_head": dict(index=dict(value_head=True)),
}


def _layer(kind="msa", index=None, **options):
  base: dict[str, Any] = dict(rngs=nnx.Rngs(0), implementation="xla")
  options = base | dict(num_kv_heads=2) | options
  if kind == "gqa":
    return msa_jax.GQAttention(4, 32, **options)
  sizes: dict[str, Any] = dict(index_dim=8, block_size=4, top_k=2)
  config = msa_jax.IndexConfig(**sizes | (index or {}))
  return msa_jax.MSAttention(4, 32, index=config, **options)


@functools.partial(nnx.jit, static_argnames="phase")
def _apply(layer, x, ids, phase=None):
  if phase is None:
    return layer(x, segment_ids=ids), jnp.zeros(())
  mask = None if ids is None else ids != 0
  out = layer(x, segment_ids=ids, phase=phase, with_kl=True, query_mask=mask)
  return out.out, out.kl


@pytest.mark.parametrize(
  "name",
  [
    pytest.param(name, marks=pytest.mark.slow if slow else ())
    for name, slow in zip(LAYERS, (False, False, False, True, False, True))
  ],
)
def test_layers_of_packed_rows_equal_each_document_alone(name):
  """Positions restart with each document, ablations stay inside it."""
  layer = _layer(**LAYERS[name])
  if layer.sinks is not None:
    layer.sinks[...] = jnp.linspace(-1.0, 1.0, 4)
  x = jax.random.normal(jax.random.key(1), (2, 40, 32))
  ids = jnp.asarray(ids_of(DOCUMENTS, 40))
  phases = (None,) if "gqa" in name else ("sparse", "warmup")
  if name in ("msa", "window"):
    phases = ("sparse",)
  for phase in phases:
    packed, kl = _apply(layer, x, ids, phase)
    alone, _ = _apply(layer, _alone(x, DOCUMENTS), None, phase)
    n = 0
    for b, row in enumerate(DOCUMENTS):
      for start, end in row:
        np.testing.assert_allclose(
          packed[b, start:end], alone[n, : end - start], rtol=2e-5, atol=2e-5
        )
        n += 1
    assert np.isfinite(kl)
    plain, _ = _apply(layer, x, None, phase)
    assert np.abs(packed - plain)[0].max() > 1e-3


def test_positions_of_packed_rows_may_be_given():
  layer = _layer("gqa")
  x = jax.random.normal(jax.random.key(1), (2, 40, 32))
  ids = jnp.asarray(ids_of(DOCUMENTS, 40))
  segments = segments_lib.document_segments(ids)
  run = nnx.jit(
    lambda layer, *args: layer(x, positions=args[0], segment_ids=ids)
  )
  want, _ = _apply(layer, x, ids)
  np.testing.assert_array_equal(run(layer, segments.positions), want)
  # Rotary scores depend on differences alone.
  moved = run(layer, jnp.broadcast_to(jnp.arange(40), (2, 40)))
  np.testing.assert_allclose(moved, want, rtol=1e-4, atol=1e-5)
  bent = run(layer, segments.positions**2)
  assert np.abs(bent - want).max() > 1e-3


# -------------------------------------------------------------- merged prefixes


def brute_force_merge(sequences, block_size):
  """Tokens that must be in the rows: one for each distinct prefix of blocks."""
  held: dict[tuple[int, ...], int] = {}
  for sequence in sequences:
    for end in range(len(sequence)):
      # A token is known by all tokens up to the end of its block.
      until = min((end // block_size + 1) * block_size, len(sequence))
      key = (end, *sequence[:until])
      held[key] = held.get(key, 0) + 1
  return held


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
  st.lists(
    st.lists(st.integers(1, 2), min_size=1, max_size=17), min_size=1, max_size=9
  ),
  st.sampled_from([None, 17, 30]),
)
def test_merged_rows_hold_every_sequence_once(sequences, length):
  """Each path of each row is a sequence, with the number of its copies."""
  merged = msa_jax.merge_prefixes(sequences, block_size=4, length=length)
  sees = rule_by_loops(merged.segments)
  real = np.asarray(merged.segments.span) >= 0
  np.testing.assert_array_equal(real, merged.weights > 0)
  assert merged.weights.sum() == sum(map(len, sequences))
  np.testing.assert_array_equal(merged.positions, merged.segments.positions)
  ends: dict[tuple[int, ...], float] = {}
  for b, t in np.argwhere(real):
    path = np.flatnonzero(sees[b, t])
    previous = merged.previous[b, t]
    assert previous == (path[-2] if len(path) > 1 else -1)
    assert merged.positions[b, t] == len(path) - 1
    # What holds this token but none of those that it predicts ends here.
    after = merged.weights[b, merged.previous[b] == t].sum()
    count = merged.weights[b, t] - after
    assert count >= 0
    if count:
      key = tuple(merged.tokens[b, path].tolist())
      ends[key] = ends.get(key, 0) + count
  want: dict[tuple[int, ...], float] = {}
  for sequence in sequences:
    want[tuple(sequence)] = want.get(tuple(sequence), 0) + 1
  assert ends == want
  if length is None:
    held = brute_force_merge(sequences, 4)
    assert merged.tokens.shape == (1, len(held))


SEQUENCES = [
  [*range(1, 13), 20, 21, 22],
  [*range(1, 13), 20, 21, 22, 23, 24],
  [*range(1, 13), 30, 31, 32, 33, 40],
  [*range(1, 13), 30, 31, 32, 33, 41, 42],
  [*range(1, 9)],
  [*range(1, 9), 50, 51, 52],
  [*range(1, 9), 50, 51, 52],
  [60, 61, 62, 63, 64],
]


# Loops say what trees with weights give, and the test before that merged rows
# are the sequences' trees.
@pytest.mark.slow
@pytest.mark.parametrize("phase", ["sparse", "warmup"])
def test_merged_prefixes_train_like_the_sequences(phase, x64):
  """Loss, KL and all gradients in float64, and the choices of both."""
  config = msa_jax.ModelConfig(
    vocab_size=70, num_layers=2, embed_dim=16, num_heads=4, num_kv_heads=2,
    head_dim=4, mlp_dim=16, layer_kinds=("msa", "gqa"),
    index=msa_jax.IndexConfig(index_dim=4, block_size=4, top_k=2),
    implementation="xla", dtype="float64", param_dtype="float64",
  )  # fmt: skip
  model = msa_jax.DecoderLM(config, rngs=nnx.Rngs(0))
  merged = msa_jax.merge_prefixes(SEQUENCES, block_size=4)
  # Depth 4: 8 tokens, then 4, then 4, then 1 or 2.
  assert merged.tokens.shape == (1, 12 + 3 + 5 + 4 + 1 + 2 + 3 + 5)
  longest = max(map(len, SEQUENCES))
  rows = np.zeros((len(SEQUENCES), longest), np.int32)
  weights = np.zeros(rows.shape, np.float32)
  for b, sequence in enumerate(SEQUENCES):
    rows[b, : len(sequence)] = sequence
    weights[b, : len(sequence)] = 1
  previous = np.where(weights > 0, np.arange(longest) - 1, -1)

  @nnx.jit
  def run(model, tokens, segments, previous, weights):
    def loss(model):
      out = model(
        tokens, phase=phase, with_kl=True, with_selection=True,
        query_mask=weights, segments=segments, with_logits=False,
      )  # fmt: skip
      at = jnp.arange(len(tokens))[:, None], jnp.maximum(previous, 0)
      logp = jax.nn.log_softmax(out.hidden[at] @ model.head_weight())
      ce = -jnp.take_along_axis(logp, tokens[..., None], axis=-1)[..., 0]
      lm = jnp.sum(jnp.where(previous >= 0, weights * ce, 0))
      return lm + 10 * out.kl.sum(), (lm, out)

    return nnx.grad(loss, has_aux=True)(model)

  grads, (lm, out) = run(
    model, merged.tokens, merged.segments, merged.previous, merged.weights
  )
  # Each sequence is one document. Attention of plain rows, which is JAX's own
  # in GQA layers, would compute its softmax in float32.
  plain = segments_lib.document_segments(jnp.asarray(weights, jnp.int32))
  want_grads, (want_lm, want) = run(model, rows, plain, previous, weights)
  ids, want_ids = (np.asarray(x.selection.block_indices) for x in (out, want))
  np.testing.assert_allclose(lm, want_lm, rtol=1e-12)
  # The model returns the KL in float32; its gradient is float64's.
  np.testing.assert_allclose(out.kl, want.kl, rtol=1e-6)
  assert np.all(want.kl[::2] > 0)
  for got, expected in zip(
    jax.tree.leaves(grads), jax.tree.leaves(want_grads), strict=True
  ):
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-11)
  # Every token of every sequence chooses the blocks of the same tokens.
  sees = rule_by_loops(merged.segments)[0]
  own = np.asarray(segments_lib.block_layout(merged.segments, 4).own_block[0])
  slots = {
    tuple(merged.tokens[0, sees[t]].tolist()): t for t in range(len(own))
  }
  for b, sequence in enumerate(SEQUENCES):
    for t in range(len(sequence)):
      slot = slots[tuple(sequence[: t + 1])]
      path = np.flatnonzero(sees[slot])
      found, alone = ids[::2, 0, :, slot], want_ids[::2, b, :, t]
      mapped = np.where(alone < 0, -1, own[path[np.clip(alone * 4, 0, t)]])
      np.testing.assert_array_equal(found, mapped)
