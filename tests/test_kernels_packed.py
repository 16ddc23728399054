"""Kernels on packed rows: planned, interpreted, lowered, run on Hopper."""

import dataclasses
import functools
import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import op_contract
import pytest
from helpers import FORWARD_CONFIGS, Case, packed_rows
from jax import lax
from op_contract import (
  check_attention,
  check_attention_gradients,
  check_kl,
  kl_and_gradients,
  lse_cotangent,
)

import msa_jax
from benchmarks import cases
from msa_jax import mosaic_gpu, reference, xla
from msa_jax import segments as segments_lib
from pallas_kernels import dense_index_kl, index_kl, kv_block_plan, mosaic
from pallas_kernels import masked_attention as masked
from pallas_kernels import packed_rows as packed_lib
from pallas_kernels import select_blocks as sb
from pallas_kernels import sparse_attention as sparse
from pallas_kernels import sparse_attention_bwd as bwd
from pallas_kernels import sparse_attention_fwd as fwd

# Documents of 1 token, of a block - 1 and of a block + 1 (of 64), with padding
# in front, between and behind. A tree of depth 4 whose inner nodes are no whole
# blocks, with padding inside, and a document.
DOCUMENTS = [(1, 2), (2, 65), (66, 131)]
TREE = [(1, 12), (12, 80), (80, 83), (83, 86), (88, 100), (100, 108)]
PARENTS = [-1, 0, 1, 2, 0, -1]
PAIRS = fwd.Config(shared_cost=1e9, slack=0.0)  # pairs where no mask is needed
WALK = fwd.Config(shared_cost=0.0)  # no pairs at all


# One program in the place of many small operations.
block_layout = jax.jit(segments_lib.block_layout, static_argnums=1)


def segments_of(spans, parents, length, most=8):
  return msa_jax.tree_segments(spans, parents, length=length, max_segments=most)


def roots(spans):
  return [[-1] * len(row) for row in spans]


def random_spans(seed, length, block_size):
  """Documents of all kinds of lengths, and trees of them with any parents."""
  rng = np.random.default_rng(seed)
  spans, parents, path, at = [], [], [], int(rng.integers(5))
  while at < length:
    b = block_size
    size = int(rng.choice([1, b - 1, b, b + 1, 3 * b, rng.integers(1, 5 * b)]))
    spans.append((at, min(at + size, length)))
    parents.append(int(rng.choice([-1, *path])))
    path = path[: path.index(parents[-1]) + 1] if parents[-1] >= 0 else []
    path.append(len(spans) - 1)
    at += size + int(rng.choice([0, 0, 0, 7]))
  return spans, parents


def random_choices(case, layout, seed=0, garbage=True):
  """Random ids of the row; also of blocks that the query does not see."""
  rng = np.random.default_rng(seed)
  start, until, own = (
    np.asarray(x)
    for x in (layout.block_start, layout.block_until, layout.own_block)
  )
  shape = (case.batch, case.num_kv_heads, case.q_len, case.top_k)
  rows = np.full(shape, -1, np.int32)
  for b, g, t in np.ndindex(*shape[:3]):
    sees = (start[b] <= t) & (t < until[b]) & (own[b, t] >= 0)
    seen = rng.permutation(np.flatnonzero(sees))
    if garbage and rng.random() < 0.3:  # one or two among the others
      seen = np.append(seen[: case.top_k - 1], rng.permutation(len(start[b])))
    ids = np.unique(seen[: case.top_k])
    rows[b, g, t, : len(ids)] = ids
  return jnp.asarray(rows)


def layout_of(case, kind, seed=0):
  """A layout for a case's rows."""
  rows = [
    random_spans(seed + b, case.kv_len, case.block_size)
    for b in range(case.batch)
  ]
  spans = [row for row, _ in rows]
  parents = roots(spans) if kind == "documents" else [x for _, x in rows]
  segments = segments_of(spans, parents, case.kv_len, 64)
  return block_layout(segments, case.block_size)


def odd_segments(kind, case, most=8, seed=0):
  """Row 0 is documents. The last row has more spans than fit, or holds numbers
  that are no segments at all."""
  length = case.kv_len
  spans, _ = random_spans(seed, length, case.block_size)
  # The last of as many spans as fit takes what is left.
  spans = [*spans[: most - 1], (spans[most - 1][0], length)] if (
    len(spans) > most) else spans  # fmt: skip
  documents = segments_of([spans], roots([spans]), length, most)
  rng = np.random.default_rng(seed)
  if kind == "overflow":
    ids = np.arange(length)[None] // 3 + 1
    odd = segments_lib.document_segments(jnp.asarray(ids, jnp.int32), most)
  else:
    span = np.repeat(rng.integers(-3, 9, most), -(-length // most))[:length]
    until = rng.integers(-(2**31), 2**31, (1, length))
    positions = rng.integers(-9, 9, (1, length))
    odd = msa_jax.Segments(
      *(jnp.asarray(x, jnp.int32) for x in (span[None], until, positions)),
      max_segments=most,
    )
  return jax.tree.map(
    lambda x, y: jnp.concatenate([jnp.asarray(x), y]), documents, odd
  )


def attend(case, q, k, v, blocks, layout, *, config, backward=None, **options):
  return sparse.sparse_attention(
    q, k, v, blocks, block_size=case.block_size, layout=layout, config=config,
    backward_config=backward, **options,
  )  # fmt: skip


# ---------------------------------------------------------------- the places


@pytest.mark.parametrize(
  "block_size", [64, pytest.param(128, marks=pytest.mark.slow)]
)
def test_every_block_has_its_places(block_size):
  for seed in range(3):
    spans, parents = random_spans(seed, 900, block_size)
    layout = block_layout(segments_of([spans], [parents], 900, 64), block_size)
    row = packed_rows([spans], [parents], 900, block_size)[0]
    rows = packed_lib.of_layout(layout, block_size, 900, jnp.array([900]))
    assert rows is not None
    slots = jnp.arange(1, 901)[None]
    placed, repeated = rows.to_blocks(slots), rows.to_blocks(slots, repeat=True)
    back = rows.from_blocks(placed)[0]
    block = np.array(row.block)
    np.testing.assert_array_equal(back, np.where(block < 0, 0, slots[0]))
    placed, repeated, keys, before, newest = (
      np.asarray(x)
      for x in (
        placed, repeated, rows.keys, rows.before_on_path(),
        rows.newest_blocks(3),
      )
    )  # fmt: skip
    before, newest, used = before[0], newest[0], max(block) + 1
    for n, place in enumerate(placed.reshape(-1, block_size)):
      mine = np.flatnonzero(block == n)
      assert keys[0, n] == len(mine)
      np.testing.assert_array_equal(place[: len(mine)], mine + 1)
      assert not place[len(mine) :].any()
      if n < used:
        again = repeated[0, n * block_size : (n + 1) * block_size]
        assert set(again.tolist()) == set((mine + 1).tolist())
    oldest, ranges = np.full(900, -1), {}
    for t, seen in enumerate(row.seen):
      path = list(dict.fromkeys(block[j] for j in seen))
      want = [*path[::-1], -1, -1, -1][:3]
      np.testing.assert_array_equal(newest[:, t], want)
      if seen:
        assert before[path[-1]] == (path[-2] if len(path) > 1 else -1)
        oldest[t], ranges[t] = path[-1], path
    # The ranges of the tile of one query, few enough or not.
    for most in (2, 8):
      found = rows.path_ranges(
        jnp.asarray(oldest)[None], jnp.asarray(oldest)[None] + 1, most
      )
      found = [(np.asarray(a), np.asarray(b)) for a, b in found]
      for t, path in ranges.items():
        held = [n for a, b in found[::-1] for n in range(a[0, t], b[0, t])]
        assert held == sorted(set(held)) and set(path) <= set(held)
        if most == 8:
          assert held == path


def test_ids_of_blocks_that_a_query_does_not_see_are_dropped():
  case = Case(q_len=900, kv_len=900, block_size=64, num_kv_heads=1, top_k=4)
  layout = layout_of(case, "trees")
  rows = packed_lib.of_layout(layout, 64, 900, jnp.array([900]))
  assert rows is not None
  ids = np.array(random_choices(case, layout))
  ids[0, 0, ::5, 0], ids[0, 0, ::7, 1] = -7, 1 << 29
  positions = reference.query_positions(900, 900, 1, None, layout)
  visible, _ = reference.visible_blocks(
    positions, rows.num_blocks, 64, 1, layout
  )
  visible = np.asarray(visible)[0, 0]
  known = np.clip(ids, 0, rows.num_blocks - 1)
  seen = (ids == known) & np.take_along_axis(visible[None, None], known, -1)
  np.testing.assert_array_equal(rows.seen_blocks(ids), np.where(seen, ids, -1))


@pytest.mark.parametrize("kind", ["overflow", "garbage"])
def test_no_address_leaves_the_arrays_whatever_the_segments(kind):
  case = Case(
    batch=2, q_len=300, kv_len=300, block_size=64, num_kv_heads=1, top_k=4
  )
  config = sb.Config(warpgroup_rows=64)

  @jax.jit
  def plans(segments, ids):
    layout = segments_lib.block_layout(segments, 64)
    rows = packed_lib.of_layout(layout, 64, 300, jnp.array([300] * 2))
    assert rows is not None
    tiles = -(-300 // config.tile_rows)
    of_select = sb._packed_operands(
      rows, num_groups=1, num_local_blocks=2,
      padded_rows=tiles * config.tile_rows, config=config,
    )  # fmt: skip
    num_kv_blocks = -(-rows.num_blocks * 64 // 128)
    seen = rows.seen_blocks(ids)
    of_pairs = kv_block_plan.plan_kv_blocks(
      seen[:, 0], jnp.zeros((2,), jnp.int32), block_size=64,
      num_blocks=rows.num_blocks, task=16,
      places=kv_block_plan.query_places(
        rows, jnp.arange(2), 0, 300, num_kv_blocks
      ),
    )  # fmt: skip
    until = jnp.pad(layout.visible_until, ((0, 0), (0, 84)))
    dense = masked.plan_tiles(until, jnp.zeros((2,), jnp.int32), 300)
    limits = jnp.pad(jnp.where(rows.positions < 0, 0, 300), ((0, 0), (0, 212)))
    until = jnp.pad(layout.visible_until, ((0, 0), (0, 212)))
    units = dense_index_kl._packed_units(limits, until, jnp.int32(0))
    first = dense_index_kl._first_seen(layout.visible_until)
    return layout, rows, of_select, seen, of_pairs, dense, units, first

  for seed in range(3):
    ids = np.random.default_rng(seed).integers(-9, 40, (2, 1, 300, 4))
    layout, rows, of_select, seen, of_pairs, dense, units, first = jax.tree.map(
      np.asarray, plans(odd_segments(kind, case, seed=seed), jnp.int32(ids))
    )
    assert layout.overflow.tolist() == [False, kind == "overflow"]
    blocks = layout.block_start.shape[1]

    def inside(x, low, high):
      assert np.all((low <= x) & (x < high))

    inside(rows.source, 0, 300)
    inside(rows.positions, -1, blocks * 64)
    inside(rows.keys, 0, 65)
    inside(seen, -1, blocks)
    inside(first, 0, 300)
    # Key tiles that a CTA of the choice walks.
    key_tiles = -(-blocks * 64 // config.step_keys)
    for row, tile, count, shift, *ranges in of_select.tiles.tolist():
      assert 0 <= row < 2 and 0 <= tile < -(-300 // config.tile_rows)
      walked = np.arange(count) + shift
      for start, more in zip(ranges[::2], ranges[1::2], strict=True):
        walked = np.where(np.arange(count) >= start, np.arange(count) + more,
                          walked)  # fmt: skip
      inside(walked, 0, key_tiles)
      assert len(set(walked.tolist())) == count
    forced = of_select.table[:, 1:]
    assert np.all(
      (forced == sb._NO_BLOCK) | ((forced >= 0) & (forced < blocks))
    )
    tasks = of_pairs.tasks[: of_pairs.num_tasks[0]]
    inside(tasks[:, 0], 0, 2 * -(-blocks * 64 // 128))
    assert np.all(tasks[:, 1] + tasks[:, 2] <= seen.size)
    for plan in dense:
      inside(plan.counts, 0, 4)
      inside(plan.tiles, 0, 3)
    inside(units[0], 0, 2)


@pytest.mark.parametrize(
  "block_size, pack, by_sort",
  [(64, 1, False), (128, 1, False), (64, 4, False), (64, 4, True)],
)
@pytest.mark.parametrize("kind", ["documents", "trees"])
def test_pairs_without_a_mask_see_a_whole_kv_block(
  kind, block_size, pack, by_sort, monkeypatch
):
  if by_sort:
    monkeypatch.setattr(kv_block_plan, "TABLE_BLOCKS", 0)
  case = Case(
    q_len=900, kv_len=900, block_size=block_size, num_kv_heads=1, top_k=4
  )
  layout = layout_of(case, kind, seed=3)
  first, queries = 64, 400  # a chunk

  @jax.jit
  def planned(layout, ids):
    rows = packed_lib.of_layout(layout, block_size, 900, jnp.array([900]))
    assert rows is not None
    num_kv_blocks = -(-rows.num_blocks * block_size // 128)
    places = kv_block_plan.query_places(
      rows, jnp.zeros((1,), jnp.int32), first, queries, num_kv_blocks
    )
    ids = rows.seen_blocks(ids)
    ids = ids[0, :, first : first + queries].reshape(1, -1, 4 * pack)
    plan = kv_block_plan.plan_kv_blocks(
      ids, jnp.zeros((1,), jnp.int32), block_size=block_size,
      num_blocks=rows.num_blocks, task=16, pack=pack, places=places,
    )  # fmt: skip
    return rows, rows.keys_of_halves(num_kv_blocks), plan

  rows, halves, plan = planned(layout, random_choices(case, layout))
  reach, order = np.asarray(plan.reach), np.asarray(plan.order)
  position = np.asarray(rows.positions)[0]
  halves = np.asarray(halves)[0].reshape(-1, 2)
  count, tasks = 0, np.asarray(plan.tasks)[: int(plan.num_tasks[0])]
  for kv_block, start, size, inside, _ in tasks:
    count += size
    for i in range(start, start + size):
      t = first + order[i] // (4 * pack) * pack
      for query in range(pack):
        want = np.clip(position[t + query] + 1 - kv_block * 128, 0, 128)
        assert reach[i] >> 8 * query & 255 == want
        if i >= start + inside and position[t + query] >= 0:
          assert want == 128 and halves[kv_block].sum() == 128
  assert count == plan.is_pair.sum()


# ------------------------------------------------------------ interpret mode

KINDS = {
  # Packs of two queries, in pairs; row 1 is row 0 with NaN in a document.
  "documents": (
    Case(
      batch=2,
      q_len=132,
      kv_len=132,
      num_heads=4,
      num_kv_heads=1,
      head_dim=64,
      index_dim=64,
      block_size=64,
      top_k=2,
    ),
    [DOCUMENTS] * 2,
    roots([DOCUMENTS] * 2),
  ),
  # Tiles of 20 queries, which are no whole packs.
  "trees": (
    Case(
      q_len=110,
      kv_len=110,
      num_heads=6,
      num_kv_heads=1,
      head_dim=64,
      index_dim=64,
      block_size=128,
      top_k=3,
    ),
    [TREE],
    [PARENTS],
  ),
}
# Several units and key tiles of the dense KL: a tree with a branch that ended
# before the last key tile, and a document.
LONG = (
  Case(
    q_len=600, kv_len=600, num_heads=2, num_kv_heads=1, head_dim=64,
    index_dim=64, block_size=64,
  ),
  [[(3, 200), (200, 300), (300, 415), (420, 600)]],
  [[-1, 0, 0, -1]],
)  # fmt: skip
POISONED = (66, 131)


def small(kind):
  """Case, layout, and which slots are poisoned."""
  case, spans, parents = (KINDS | {"long": LONG})[kind]
  layout = block_layout(
    segments_of(spans, parents, case.kv_len), case.block_size
  )
  poison = np.zeros((case.batch, case.kv_len), bool)
  if case.batch > 1:
    poison[1, slice(*POISONED)] = True
  return case, layout, poison


def poisoned(x, poison):
  """Row 1 is row 0, with NaN in a document."""
  if len(x) == 1:
    return x
  x = jnp.stack([x[0], x[0]])
  return jnp.where(
    poison.reshape(*poison.shape, *[1] * (x.ndim - 2)), jnp.nan, x
  )


def assert_rows_agree(results, poison):
  """Nothing outside of the poisoned document moved by a bit."""
  for x in results:
    first, second = np.asarray(x, np.float32)
    np.testing.assert_array_equal(first[~poison[1]], second[~poison[1]])


@pytest.mark.parametrize(
  "kind, head_dim, config",
  [
    pytest.param("documents", None, PAIRS, marks=pytest.mark.slow),
    ("trees", None, WALK),
    pytest.param("trees", None, fwd.Config(), marks=pytest.mark.slow),
    pytest.param("documents", 256, PAIRS, marks=pytest.mark.slow),
    pytest.param("trees", 136, fwd.Config(), marks=pytest.mark.slow),
  ],
)
def test_interpreted_attention_and_gradients(kind, head_dim, config):
  case, layout, poison = small(kind)
  if head_dim:
    case = dataclasses.replace(case, head_dim=head_dim)
  blocks = random_choices(case, layout)[:1]
  blocks = jnp.concatenate([blocks] * case.batch)
  inputs = op_contract.attention_inputs(case, "bfloat16")
  q, k, v, dout = (poisoned(x, poison) for x in inputs)
  dlse = lse_cotangent(case, blocks, layout)
  dlse = jnp.broadcast_to(dlse[:1], dlse.shape)
  config = dataclasses.replace(
    config, num_ctas=1, pair_warpgroups=2, query_stages=2
  )

  @jax.jit  # One program: the plans have many small operations.
  def run(q, k, v, dout, dlse, blocks, layout):
    results, pull = jax.vjp(
      lambda *x: attend(
        case, *x, blocks, layout, config=config,
        backward=bwd.Config(stages=2, num_ctas=1), interpret=True,
      ),
      q, k, v,
    )  # fmt: skip
    return *results, pull((dout, dlse))

  out, lse, grads = run(q, k, v, dout, dlse, blocks, layout)
  one = dataclasses.replace(case, batch=1)
  layout, blocks, out, lse, q, k, v, dout, dlse, *first = (
    jax.tree.map(lambda x: x[:1], x)
    for x in (layout, blocks, out, lse, q, k, v, dout, dlse, *grads)
  )
  check_attention(one, q, k, v, blocks, out, lse, layout)
  check_attention_gradients(one, q, k, v, dout, blocks, first, dlse, layout)
  if case.batch > 1:
    assert_rows_agree(grads, poison)
    assert np.isnan(np.asarray(grads[0], np.float32)[1][poison[1]]).all()


@pytest.mark.parametrize(
  "kind, dense",
  [
    ("documents", False),
    pytest.param("trees", False, marks=pytest.mark.slow),
    ("long", True),
    pytest.param("documents", True, marks=pytest.mark.slow),
  ],
)
def test_interpreted_kl(kind, dense):
  case, layout, poison = small(kind)
  blocks = None
  if not dense:
    blocks = random_choices(case, layout)[:1]
    blocks = jnp.concatenate([blocks] * case.batch)
  q, k, _, index_q, index_k = (
    poisoned(x, poison) for x in case.inputs(dtype=jnp.bfloat16)
  )
  mask = layout.own_block >= 0
  mask &= ~poison.any(0) & (jnp.arange(case.q_len) % 9 != 4)
  if kind in ("trees", "long"):  # how many sequences hold a token
    mask = jnp.where(mask, 1.0 + jnp.arange(case.q_len) % 4, 0.0)
  config: Any = index_kl.Config(stages=2, task=24, num_ctas=1)
  if dense:
    config = dense_index_kl.Config(stages=2, workspace=1, num_ctas=1)
  loss = functools.partial(
    index_kl.index_kl_loss, config=config, interpret=True
  )
  run = jax.jit(functools.partial(kl_and_gradients, case, loss=loss))
  value, grads = run(q, k, index_q, index_k, blocks, mask, layout=layout)
  if case.batch > 1:
    assert_rows_agree(grads, poison)
  # The mean over one row of two that agree is the mean over both.
  one = dataclasses.replace(case, batch=1)
  layout, blocks, q, k, index_q, index_k, mask = (
    jax.tree.map(lambda x: x[:1], x)
    for x in (layout, blocks, q, k, index_q, index_k, mask)
  )
  grads = [x[:1] * case.batch for x in grads]
  got = value, grads
  check_kl(one, q, k, index_q, index_k, blocks, got, mask, layout)


DEEP = [(20 * i, 20 * i + 15) for i in range(12)]
DEEP_PARENTS = [-1, 0, 1, 1, 3, 3, 5, 5, 7, 7, 9, 1]


@pytest.mark.parametrize(
  "kind, num_local, precision",
  [
    pytest.param("documents", 1, "exact", marks=pytest.mark.slow),
    pytest.param("trees", 2, "exact", marks=pytest.mark.slow),
    # A path of more runs of blocks than a tile has ranges.
    ("deep", 1, "exact"),
    pytest.param("deep", 2, "fast", marks=pytest.mark.slow),
    pytest.param("trees", 0, "exact", marks=pytest.mark.slow),
    pytest.param("documents", 0, "fp8", marks=pytest.mark.slow),
    pytest.param("row", 1, "exact", marks=pytest.mark.slow),
  ],
)
def test_interpreted_choice(kind, num_local, precision):
  spans, parents, block_size = {
    "documents": ([DOCUMENTS], roots([DOCUMENTS]), 64),
    "trees": ([TREE], [PARENTS], 64),
    "deep": ([DEEP], [DEEP_PARENTS], 64),
    "row": ([[(0, 300)]], [[-1]], 128),
  }[kind]
  length = {"row": 300, "deep": 240, "documents": 132}.get(kind, 110)
  check_select(
    spans, parents, length, block_size, num_local, precision,
    config=sb.Config(warpgroup_rows=64, stages=2), interpret=True,
  )  # fmt: skip


SELECT_OPTIONS = (
  *("block_size", "top_k", "num_local_blocks", "score_precision"),
  *("config", "interpret"),
)
# Programs of their own: the layout's blocks and ranges are many small
# operations.
select_in_one_program = jax.jit(
  sb.select_blocks, static_argnames=SELECT_OPTIONS
)
wanted_in_one_program = jax.jit(
  reference.select_blocks, static_argnames=SELECT_OPTIONS[:4]
)


def check_select(
  spans, parents, length, block_size, num_local, precision, groups=2, top_k=3,
  repeats=False, **options,
):  # fmt: skip
  """The choice of a kernel is the reference's; with `repeats`, twice.

  In fp8 the scales of blocks differ from the reference's scales of keys; powers
  of two of both make no difference.
  """
  layout = block_layout(segments_of(spans, parents, length, 64), block_size)
  case = Case(
    batch=len(spans), q_len=length, kv_len=length, num_kv_heads=groups,
    index_dim=64,
  )  # fmt: skip
  *_, index_q, index_k = case.inputs(dtype=jnp.bfloat16)
  index_k = index_k.at[0, 15].set(jnp.nan)
  if precision == "fp8":  # what e4m3 holds
    index_q, index_k = (jnp.round(2 * x) / 2 for x in (index_q, index_k))
  sizes = dict(block_size=block_size, top_k=top_k, num_local_blocks=num_local)
  select = functools.partial(
    select_in_one_program, score_precision=precision, **sizes, **options
  )
  got = select(index_q, index_k, layout=layout)
  if repeats:
    again = select(index_q, index_k, layout=layout)
    op_contract.assert_same_bits(got, again)
  want = wanted_in_one_program(
    index_q, index_k, layout=layout, kv_lengths=None, score_precision="exact",
    **sizes,
  )  # fmt: skip
  if precision == "exact":
    np.testing.assert_array_equal(got, want)
    return
  # Scores that are nearly or, in e4m3, exactly equal may stand for each other.
  np.testing.assert_array_equal(np.sum(got >= 0, -1), np.sum(want >= 0, -1))
  assert np.mean(np.asarray(got) != np.asarray(want)) < 0.02


@pytest.mark.parametrize("kind", ["documents", "trees"])
def test_units_hold_every_visible_pair(kind):
  case = Case(batch=2, q_len=1500, kv_len=1500, block_size=64)
  layout = layout_of(case, kind, seed=7)
  positions = reference.query_positions(1500, 1500, 2, None, layout)
  visible = np.asarray(reference.visible_tokens(positions, 1500, layout))[:, 0]
  limits = np.pad(np.asarray(positions) + 1, ((0, 0), (0, 36)))[:, 512:1024]
  until = np.pad(np.asarray(layout.visible_until), ((0, 0), (0, 36)))
  units, count = dense_index_kl._packed_units(
    jnp.asarray(limits), jnp.asarray(until), jnp.int32(512)
  )
  pairs = np.pad(visible, ((0, 0), (0, 36), (0, 36)))[:, 512:1024]
  pairs = pairs.reshape(2, 2, 256, 6, 256).any((2, 4))
  found = {tuple(unit) for unit in np.asarray(units)[:count].tolist()}
  assert len(found) == count
  wanted = {tuple(unit) for unit in np.argwhere(pairs).tolist()}
  assert wanted <= found
  if kind == "documents":
    assert len(found) < 2 * 2 * 4  # of all before the chunk's last query
  first = np.where(visible.any(-1), visible.argmax(-1), 0)
  got = np.asarray(dense_index_kl._first_seen(layout.visible_until))
  real = np.asarray(layout.own_block) >= 0
  np.testing.assert_array_equal(got[real], first[real])


# ------------------------------------------ segments that are wrong or too many


def interpret_kernels(monkeypatch, phase):
  """Lets `mosaic_gpu` interpret the kernels of a phase."""
  small_grid = dict(num_ctas=1)
  for module, name, options in (
    (sb, "select_blocks", {}),
    (sparse, "sparse_attention", dict(
      config=fwd.Config(pair_warpgroups=2, query_stages=2, **small_grid),
      backward_config=bwd.Config(stages=2, **small_grid),
    )),
    (masked, "attention", dict(config=masked.Config(**small_grid))),
    (index_kl, "index_kl_loss", dict(
      config=index_kl.Config(stages=2, task=24, **small_grid)
      if phase == "sparse"
      else dense_index_kl.Config(stages=2, **small_grid),
    )),
  ):  # fmt: skip
    call = functools.partial(getattr(module, name), interpret=True, **options)
    monkeypatch.setattr(module, name, call)


def check_odd_segments(case, dtype, phase, repeats=True):
  """A row with too many spans is NaN and has no blocks. It changes nothing of
  the row beside it, and no more do numbers that are no segments."""
  inputs = case.inputs(dtype=dtype)

  @functools.partial(jax.jit, static_argnames="implementation")
  def run(inputs, segments, blocks=None, implementation="mosaic_gpu"):
    def loss(inputs):
      result = msa_jax.msa_attention(
        *inputs, block_size=case.block_size, top_k=case.top_k, phase=phase,
        with_kl=True, segments=segments, block_indices=blocks,
        implementation=implementation,
      )  # fmt: skip
      # As with a loss scale: gradients of a mean are below float16's range.
      total = jnp.sum(jnp.sin(result.out.astype(jnp.float32)))
      return total + 1024 * result.kl, result

    return jax.grad(loss, has_aux=True)(inputs)

  for kind in ("overflow", "garbage"):
    segments = odd_segments(kind, case)
    got = run(inputs, segments)
    if repeats:
      op_contract.assert_same_bits(got, run(inputs, segments))
    grads, result = got
    blocks = np.asarray(result.block_indices)
    most = -(-case.kv_len // case.block_size) + segments.max_segments
    assert blocks.min() >= -1 and blocks.max() < most
    overflows = kind == "overflow"
    assert np.isnan(result.kl) == overflows
    if overflows:
      assert (blocks[1] == -1).all()
      for x in (result.out, result.lse):
        assert np.isnan(np.asarray(x, np.float32)[1]).all()
      # Tokens behind the last block that fits have no place in the kernels.
      for x in grads[:3]:
        assert np.isnan(np.asarray(x, np.float32)[1]).any()
    first = (
      jax.tree.map(lambda x: x[:1], x) for x in (inputs, segments, blocks)
    )
    want_grads, want = run(*first, "xla")
    results = [*zip((result.out, result.lse), (want.out, want.lse))]
    results += zip(grads[:3], want_grads)
    if not overflows:  # the KL is a mean over the tokens of both rows
      real = np.asarray(segments.span) >= 0
      results.append((grads[3] * (real.sum() / real[0].sum()), want_grads[3]))
    for x, y in results:
      x, y = (np.asarray(a, np.float32)[0] for a in (x, y))
      finite = np.isfinite(y)
      np.testing.assert_array_equal(np.isfinite(x), finite)
      error = np.linalg.norm(x[finite] - y[finite])
      assert error <= 0.02 * np.linalg.norm(y[finite])


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["sparse", "warmup"])
def test_interpreted_odd_segments(monkeypatch, pretend_hopper, phase):
  case = Case(
    batch=2, q_len=100, kv_len=100, num_heads=4, num_kv_heads=1, head_dim=64,
    index_dim=64, block_size=64, top_k=2,
  )  # fmt: skip
  interpret_kernels(monkeypatch, phase)
  check_odd_segments(case, "bfloat16", phase, repeats=False)


# -------------------------------------------------------- pieces of the queries


@pytest.mark.parametrize(
  "kind, phase",
  [
    ("documents", "sparse"),
    ("trees", "sparse"),
    ("trees", "warmup"),
    ("documents", "warmup"),
  ],
)
@pytest.mark.slow
def test_interpreted_pieces_of_a_packed_row(monkeypatch, kind, phase):
  """An early and a late piece of the queries, as context parallelism has them.

  The operation of the kernels against that of xla, with the same choices.
  """
  case, layout, _ = small(kind)
  case = dataclasses.replace(case, batch=1)
  layout = jax.tree.map(lambda x: x[:1], layout)
  pieces = ((5, 30), (70, 37))
  slots = np.concatenate([np.arange(s, s + n) for s, n in pieces])
  q, k, v, index_q, index_k = case.inputs(dtype=jnp.bfloat16)
  q, index_q = q[:, slots], index_q[:, slots]
  interpret_kernels(monkeypatch, phase)
  size = dict(block_size=case.block_size)
  select = dict(top_k=case.top_k, num_local_blocks=1, score_precision="exact")
  scale = dict(scale=case.head_dim**-0.5)
  weights = jnp.where(layout.own_block[:, slots] >= 0, 1.0, 0.0)
  mask = weights != 0

  def run(module, blocks=None, **where):
    where = dict(layout=layout, kv_lengths=None, **where)
    if blocks is None:
      blocks = module.select_blocks(index_q, index_k, **size, **select, **where)

    def loss(q, k, v, index_q, index_k):
      if phase == "warmup":
        attended = None
        out, lse = module.warmup_attention(q, k, v, **scale, **where)
      else:
        attended = blocks
        out, lse = module.sparse_attention(
          q, k, v, blocks, **size, **scale, **where
        )
      kl = module.index_kl_loss(
        *lax.stop_gradient((q, k)), index_q, index_k, attended, **size,
        **scale, index_scale=case.index_dim**-0.5,
        lse=lax.stop_gradient(lse), query_mask=mask, **where,
      )  # fmt: skip
      total = jnp.sum(jnp.sin(out.astype(jnp.float32))) + 10 * kl
      total += jnp.sum(jnp.cos(jnp.where(lse == -jnp.inf, 0, lse)))
      return total, (out, lse, kl)

    args = q, k, v, index_q, index_k
    grads, results = jax.grad(loss, range(5), has_aux=True)(*args)
    return blocks, (*results, *grads)

  blocks, got = run(
    mosaic_gpu,
    query_pieces=[(jnp.int32([start]), n) for start, n in pieces],
  )
  want_blocks, want = run(xla, query_slots=jnp.asarray(slots)[None])
  np.testing.assert_array_equal(blocks, want_blocks)
  names = ("out", "lse", "kl", "dq", "dk", "dv", "dindex_q", "dindex_k")
  for name, x, y in zip(names, got, want, strict=True):
    x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
    np.testing.assert_array_equal(np.isneginf(x), np.isneginf(y), name)
    seen = np.isfinite(y)
    error = np.linalg.norm(x[seen] - y[seen])
    assert error <= 0.01 * np.linalg.norm(y[seen]), name


# ------------------------------------------------------------------ lowering


@pytest.mark.parametrize(
  "max_segments, num_local",
  [
    (2000, 1),
    *(pytest.param(n, 2, marks=pytest.mark.slow) for n in (1, 8, 64)),
  ],
)
def test_lowers_for_cuda_at_128k(max_segments, num_local):
  case = cases.CASES["128k"]
  lead = (case.batch, case.tokens)
  shape = functools.partial(jax.ShapeDtypeStruct, dtype=case.dtype)
  kv = shape((*lead, case.num_kv_heads, case.head_dim))
  q = shape((*lead, case.num_heads, case.head_dim))
  index_q = shape((*lead, case.num_kv_heads, case.index_dim))
  index_k = shape((*lead, case.index_dim))

  def loss(q, k, v, index_q, index_k, ids):
    layout = block_layout(
      segments_lib.document_segments(ids, max_segments), case.block_size
    )
    options = dict(block_size=case.block_size, layout=layout)
    blocks = sb.select_blocks(
      index_q, index_k, num_local_blocks=num_local, **options
    )
    out, lse = sparse.sparse_attention(q, k, v, blocks, **options)
    kl = index_kl.index_kl_loss(
      q, k, index_q, index_k, blocks, lse=lse, query_mask=ids != 0, **options
    )
    return out.astype(jnp.float32).sum() + kl

  text = (
    jax.jit(jax.grad(loss, tuple(range(5))))
    .trace(q, kv, kv, index_q, index_k, jax.ShapeDtypeStruct(lead, jnp.int32))
    .lower(lowering_platforms=("cuda",))
    .as_text()
  )
  for name in (
    *("msa_select", "sparse_tiles_merge", "sparse_pairs", "sparse_kv_blocks"),
    *("kl_index_lse", "kl_kv_blocks"),
  ):
    assert name in text


@pytest.mark.slow
@pytest.mark.parametrize("max_segments", [1, 8, 64, 2000])
def test_the_warm_up_lowers_for_cuda_at_128k(pretend_hopper, max_segments):
  """Dense attention, KL with weights and the choice, forward and backward,
  without an array of all pairs of tokens."""
  case = cases.CASES["128k"]
  lead = (case.batch, case.tokens)
  shape = functools.partial(jax.ShapeDtypeStruct, dtype=case.dtype)
  kv = shape((*lead, case.num_kv_heads, case.head_dim))

  def loss(operands, ids, weights):
    result = msa_jax.msa_attention(
      *operands, block_size=case.block_size, phase="warmup", with_kl=True,
      query_mask=weights, segment_ids=ids, max_segments=max_segments,
      implementation="mosaic_gpu",
    )  # fmt: skip
    out = jnp.sum(result.out.astype(jnp.float32))
    total = out + jnp.sum(result.lse) + result.kl
    return total, result.block_indices

  operands = (
    shape((*lead, case.num_heads, case.head_dim)),
    *(kv, kv),
    shape((*lead, case.num_kv_heads, case.index_dim)),
    shape((*lead, case.index_dim)),
  )
  text = (
    jax.jit(jax.grad(loss, has_aux=True))
    .trace(
      operands,
      jax.ShapeDtypeStruct(lead, jnp.int32),
      jax.ShapeDtypeStruct(lead, jnp.float32),
    )
    .lower(lowering_platforms=("cuda",))
    .as_text()
  )
  for name in (
    *("masked_attention", "masked_attention_dq", "masked_attention_dkv"),
    *("dense_kl_units", "dense_kl_index_lse", "msa_select"),
  ):
    assert name in text
  sizes = re.findall(r"tensor<((?:\d+x)+)", text)
  most = max(np.prod([int(n) for n in x.split("x")[:-1]]) for x in sizes)
  # The largest is q's; all pairs of one head would be 16 times that.
  assert most == case.tokens * case.num_heads * case.head_dim


def test_the_kernels_take_the_warm_up_of_merged_prefixes(pretend_hopper):
  """With the weights, as `merge_prefixes` says."""
  merged = msa_jax.merge_prefixes([range(300), [*range(256), 7, 7]])
  tokens = merged.tokens.shape[1]
  shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
  kv = shape((1, tokens, 2, 64))

  def attend(q, k, v, index_q, index_k, weights):
    return msa_jax.msa_attention(
      q, k, v, index_q, index_k, phase="warmup", with_kl=True,
      query_mask=weights, segments=merged.segments,
    )  # fmt: skip

  (choice,) = msa_jax.explain(
    attend, shape((1, tokens, 8, 64)), kv, kv, kv, shape((1, tokens, 64)),
    jax.ShapeDtypeStruct((1, tokens), jnp.float32),
  )  # fmt: skip
  assert str(choice) == "msa_attention takes mosaic_gpu"


def test_more_blocks_than_fit_are_refused():
  case = Case(q_len=256, kv_len=256, num_heads=2, num_kv_heads=1, head_dim=64)
  q, k, v, index_q, index_k = case.inputs(dtype=jnp.bfloat16)
  ids = jnp.ones((1, 256), jnp.int32)
  layout = block_layout(segments_lib.document_segments(ids, 1 << 15), 128)
  blocks = jnp.zeros((1, 1, 256, 2), jnp.int32)
  text = "up to 32768 blocks of keys, got 32770 of packed rows"
  index_q, index_k = (jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, 56),))
                      for x in (index_q, index_k))  # fmt: skip
  for call in (
    lambda: sparse.sparse_attention(q, k, v, blocks, layout=layout),
    lambda: sb.select_blocks(index_q, index_k, layout=layout),
    lambda: index_kl.index_kl_loss(
      q, k, index_q, index_k, blocks, lse=jnp.zeros((1, 2, 256)), layout=layout
    ),
  ):
    with pytest.raises(NotImplementedError, match=text):
      jax.eval_shape(call)


# ------------------------------------------------------------------- Hopper

GPU_CASES = {
  "paper_heads": (Case(
    q_len=1100, kv_len=1100, num_heads=64, num_kv_heads=4, head_dim=128,
    index_dim=128, block_size=128, top_k=5,
  ), "bfloat16"),
  "block_64": (Case(
    batch=2, q_len=1500, kv_len=1500, num_heads=16, num_kv_heads=2, head_dim=64,
    index_dim=128, block_size=64, top_k=6,
  ), "float16"),
  "group_4": (Case(
    batch=2, q_len=1300, kv_len=1300, num_heads=8, num_kv_heads=2, head_dim=128,
    index_dim=64, block_size=128, top_k=4,
  ), "bfloat16"),
  "group_2_block_64": (Case(
    q_len=1301, kv_len=1301, num_heads=4, num_kv_heads=2, head_dim=64,
    index_dim=64, block_size=64, top_k=9,
  ), "bfloat16"),
  "group_6_d96": (Case(
    q_len=900, kv_len=900, num_heads=12, num_kv_heads=2, head_dim=96,
    index_dim=80, block_size=128, top_k=3,
  ), "bfloat16"),
  "d256": (Case(
    batch=2, q_len=1300, kv_len=1300, num_heads=16, num_kv_heads=2,
    head_dim=256, index_dim=128, block_size=128, top_k=5,
  ), "bfloat16"),
  "d256_group_4_block_64": (Case(
    q_len=900, kv_len=900, num_heads=8, num_kv_heads=2, head_dim=256,
    index_dim=64, block_size=64, top_k=6,
  ), "float16"),
}  # fmt: skip
# One program computes both: tests that run both compile it once.
GPU_LAYOUTS = list(itertools.product(("documents", "trees"), range(2)))


@pytest.mark.gpu
@pytest.mark.parametrize("name", GPU_CASES)
def test_gpu_attention(hopper, name):
  case, dtype = GPU_CASES[name]
  args = op_contract.attention_inputs(case, dtype)

  @jax.jit
  def run(q, k, v, dout, blocks, layout, dlse):
    both, pull = jax.vjp(
      lambda *x: attend(case, *x, blocks, layout, config=None), q, k, v
    )
    return both, pull((dout, dlse))

  def check(q, k, v, dout, blocks, layout, dlse, got):
    (out, lse), grads = got
    check_attention(case, q, k, v, blocks, out, lse, layout)
    check_attention_gradients(case, q, k, v, dout, blocks, grads, dlse, layout)

  for kind, seed in GPU_LAYOUTS:
    layout = layout_of(case, kind, 10 * seed)
    blocks = random_choices(case, layout, seed)
    dlse = lse_cotangent(case, blocks, layout)
    op_contract.run_twice(run, check, *args, blocks, layout, dlse)


@pytest.mark.gpu
@pytest.mark.parametrize("config", FORWARD_CONFIGS[1:], ids=str)
@pytest.mark.parametrize("name", ["block_64", "group_4"])
def test_gpu_forward_configs(hopper, name, config):
  """The backward pass does not know the forward's config."""
  case, dtype = GPU_CASES[name]
  q, k, v, *_ = case.inputs(dtype=dtype)
  run = jax.jit(functools.partial(attend, case, config=config))

  def check(q, k, v, blocks, layout, got):
    check_attention(case, q, k, v, blocks, *got, layout)

  for kind, seed in GPU_LAYOUTS:
    layout = layout_of(case, kind, 10 * seed)
    blocks = random_choices(case, layout, seed)
    op_contract.run_twice(run, check, q, k, v, blocks, layout)


@pytest.mark.gpu
@pytest.mark.parametrize("name", GPU_CASES)
def test_gpu_kl(hopper, name):
  case, dtype = GPU_CASES[name]
  # Queries have weights or only count: a program each. Most count in the tests
  # of plain rows.
  weighted = name not in ("block_64", "d256")
  q, k, _, index_q, index_k = case.inputs(dtype=dtype)

  @jax.jit
  def run(q, k, index_q, index_k, blocks, mask, layout):
    return kl_and_gradients(
      case, q, k, index_q, index_k, blocks, mask,
      loss=index_kl.index_kl_loss, layout=layout,
    )  # fmt: skip

  def check(q, k, index_q, index_k, blocks, mask, layout, got):
    check_kl(case, q, k, index_q, index_k, blocks, got, mask, layout)

  for kind, seed in GPU_LAYOUTS:
    layout = layout_of(case, kind, 10 * seed)
    blocks = random_choices(case, layout, seed)
    mask = layout.own_block >= 0
    mask &= jnp.arange(case.q_len) % 9 != 4
    if weighted:  # counts, or shares of a small whole
      factor = (1.0, 1e-7)[seed]
      mask = jnp.where(mask, 1.0 + jnp.arange(case.q_len) % 4, 0.0) * factor
    dense = case.head_dim <= mosaic.MAX_DENSE_HEAD_DIM
    for ids in (blocks, None) if dense else (blocks,):
      op_contract.run_twice(
        run, check, q, k, index_q, index_k, ids, mask, layout
      )


@pytest.mark.gpu
@pytest.mark.parametrize(
  "block_size, num_local, precision",
  [  # every two values meet; each test takes a minute to compile
    ((64, 128)[(num_local + place) % 2], num_local, precision)
    for num_local in range(3)
    for place, precision in enumerate(("exact", "fast", "fp8"))
  ],
)
def test_gpu_choice(hopper, block_size, num_local, precision):
  for seed in range(3):
    rows = [random_spans(10 * seed + b, 1500, block_size) for b in range(2)]
    spans = [row for row, _ in rows]
    for parents in (roots(spans), [x for _, x in rows]):
      for config in (None, sb.Config(warpgroup_rows=64, stages=3)):
        check_select(
          spans, parents, 1500, block_size, num_local, precision, groups=3,
          top_k=4, repeats=True, config=config,
        )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("phase", ["sparse", "warmup"])
@pytest.mark.parametrize("name", ["group_4", "block_64"])
def test_gpu_odd_segments(hopper, name, phase):
  case, dtype = GPU_CASES[name]
  check_odd_segments(case, dtype, phase)


@pytest.mark.gpu
def test_gpu_operation_equals_the_portable_one(hopper):
  """`None` takes the kernels; a poisoned document stays alone."""
  case, dtype = GPU_CASES["group_4"]
  inputs = case.inputs(dtype=dtype)

  @functools.partial(jax.jit, static_argnames="implementation")
  def run(inputs, segments, blocks, mask, implementation=None):
    def loss(inputs):
      result = msa_jax.msa_attention(
        *inputs, top_k=4, with_kl=True, segments=segments, query_mask=mask,
        block_indices=blocks, implementation=implementation,
      )  # fmt: skip
      return jnp.sum(
        jnp.sin(result.out.astype(jnp.float32))
      ) + result.kl, result

    return jax.grad(loss, has_aux=True)(inputs)

  spans, tree = random_spans(5, case.kv_len, 128)
  for parents in (roots([spans])[0], tree):
    segments = segments_of([spans] * 2, [parents] * 2, case.kv_len, 64)
    (choice,) = msa_jax.explain(
      msa_jax.msa_attention, *inputs, with_kl=True, segments=segments
    )
    assert choice.implementation == "mosaic_gpu"
    mask = jnp.ones(inputs[0].shape[:2], bool)
    grads, result = run(inputs, segments, None, mask)
    want_grads, want = run(inputs, segments, result.block_indices, mask, "xla")
    for got, expected in zip(
      (*grads, *result), (*want_grads, *want), strict=True
    ):
      got, expected = (np.asarray(x, np.float32) for x in (got, expected))
      finite = np.isfinite(expected)
      np.testing.assert_array_equal(np.isfinite(got), finite)
      error = np.linalg.norm(got[finite] - expected[finite])
      assert error <= 0.02 * np.linalg.norm(expected[finite])
    root = parents.index(-1)
    stop = next((i for i in range(root + 1, len(spans)) if parents[i] < 0),
                len(spans))  # fmt: skip
    poison = np.zeros(mask.shape, bool)
    poison[1, spans[root][0] : spans[stop - 1][1]] = True
    mask = jnp.asarray(~poison)
    grads, result = run(inputs, segments, None, mask)
    bad = tuple(
      jnp.where(poison.reshape(*poison.shape, *[1] * (x.ndim - 2)), jnp.nan, x)
      for x in inputs
    )
    bad_grads, bad_result = run(bad, segments, None, mask)
    # Which blocks are shared by a tile depends on all choices, so the order of
    # sums may change.
    np.testing.assert_allclose(bad_result.kl, result.kl, rtol=1e-3)
    for got, expected in zip(
      (*bad_grads, bad_result.out), (*grads, result.out), strict=True
    ):
      got, expected = (
        np.asarray(x, np.float32)[~poison] for x in (got, expected)
      )
      error = np.linalg.norm(got - expected)
      assert error <= 0.005 * np.linalg.norm(expected)
