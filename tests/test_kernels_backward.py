"""Gradients of sparse attention: planned, interpreted, lowered, on Hopper."""

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
from op_contract import (
  GradientContract,
  assert_same_bits,
  attention_inputs,
  check_attention_gradients,
)

from msa_jax import reference
from pallas_kernels import kv_block_plan
from pallas_kernels import sparse_attention as sparse
from pallas_kernels import sparse_attention_bwd as bwd

# On a GPU: every way to go through the work.
CONFIGS = (
  bwd.Config(),
  bwd.Config(stages=2),
  bwd.Config(task=128),
  bwd.Config(task=2048),
  bwd.Config(pairs=1 << 19),
)


def lengths(case):
  if case.lengths is None:
    return jnp.full((case.batch,), case.kv_len, jnp.int32)
  return case.lengths


# One program: the reference and the plan have many small operations.
@functools.partial(
  jax.jit, static_argnums=0, static_argnames=("chunk", "pairs", "task")
)
def interpreted(case, q, k, v, dout, blocks, dlse=None, **config):
  """The backward pass alone, after the reference's forward."""
  out, lse = reference.sparse_attention(
    q, k, v, blocks, block_size=case.block_size, scale=case.head_dim**-0.5,
    kv_lengths=case.lengths,
  )  # fmt: skip
  return sparse._backward(
    q, k, v, out, lse, dout, dlse, blocks, lengths(case),
    block_size=case.block_size,
    scale=case.head_dim**-0.5,
    config=bwd.Config(**dict(stages=2, num_ctas=1) | config),
    interpret=True,
  )  # fmt: skip


# ---------------------------------------------------------------- the plan

planned = jax.jit(
  kv_block_plan.plan_kv_blocks,
  static_argnames=("block_size", "num_blocks", "task", "pack"),
)


@pytest.mark.parametrize("kind", ["random", "hot", "garbage", "empty"])
@pytest.mark.parametrize(
  "starts, pack, block_size",
  # Every two of them meet.
  [
    ((300,), 1, 64), ((300,), 2, 128), ((300,), 4, 64),
    ((301, 303, 300), 1, 128), ((301, 303, 300), 2, 64),
    ((301, 303, 300), 4, 128),
    ((240, 240, -20, -21, -200, 0), 1, 64),
    ((240, 240, -20, -21, -200, 0), 2, 128),
    ((240, 240, -20, -21, -200, 0), 4, 64),
  ],
  ids=str,
)  # fmt: skip
def test_every_choice_is_in_one_pair(kind, block_size, pack, starts):
  rng = np.random.default_rng(0)
  queries, top_k, num_blocks, task = 160, 4, 7, 16
  groups = len(starts)
  positions = np.asarray(starts)[:, None] + np.arange(queries)
  own = np.where(positions < 0, -1, positions // block_size)
  ids = np.argsort(rng.random((groups, queries, num_blocks)))[..., :top_k]
  if kind == "hot":
    ids[..., 0] = np.where((ids[..., 1:] == 0).any(-1), -1, 0)
  elif kind == "garbage":
    ids[:, ::3] += 1 << 20
    ids[:, 1::3] -= 1 << 30
  elif kind == "empty":
    ids[:] = -1
  slots = pack * top_k
  plan = planned(
    jnp.asarray(ids, jnp.int32).reshape(groups, -1, slots),
    jnp.asarray(starts, jnp.int32), block_size=block_size,
    num_blocks=num_blocks, task=task, pack=pack,
  )  # fmt: skip
  assert (plan.chosen is None) == (block_size == 128 and pack == 1)
  tasks, (num_tasks,), longest_first, extra, order, chosen, is_pair, _, used = (
    np.full(groups * queries * top_k, 3) if x is None else np.asarray(x)
    for x in plan
  )
  num_kv_blocks = -(-num_blocks // (128 // block_size))
  found, sum_slots = [], {}
  for kv_block, start, count, inside, sum_slot in tasks[:num_tasks]:
    assert 0 <= count <= task and 0 <= kv_block < groups * num_kv_blocks
    sum_slots.setdefault(kv_block, []).append(sum_slot)
    group, block = divmod(kv_block, num_kv_blocks)
    mine = order[start : start + count]
    assert np.all(np.diff(mine) > 0)
    packs, places = np.divmod(mine - group * queries * top_k, slots)
    at = positions[group, packs * pack]
    assert inside == np.sum(at < (block + 1) * 128)
    for index, place, bits in zip(packs, places, chosen[start : start + count]):
      assert is_pair[group, index, place] and bits
      for query in range(index * pack, (index + 1) * pack):
        halves = bits >> 2 * (query - index * pack) & 3
        for half in range(2):
          if block_size == 64 and halves >> half & 1:
            found.append((group, query, block * 2 + half))
        assert block_size == 64 or halves in (0, 3)
        if block_size == 128 and halves:
          found.append((group, query, block))
  # The first task of a block has the block's slot, the rest those of `extra`.
  for kv_block, mine in sum_slots.items():
    first, more = extra[kv_block]
    assert mine == [kv_block, *range(first, first + more)]
  assert sorted(sum_slots) == list(np.flatnonzero(used))
  assert sum(extra[:, 1]) == num_tasks - len(sum_slots)
  wanted = [
    (group, t, i)
    for group in range(groups)
    for t in range(queries)
    for i in ids[group, t]
    if 0 <= i <= own[group, t] and i < num_blocks
  ]
  assert sorted(found) == sorted(wanted)
  assert is_pair.sum() == sum(task[2] for task in tasks[:num_tasks])
  # The order holds all tasks, the longest first.
  assert sorted(longest_first[:num_tasks]) == list(range(num_tasks))
  assert np.all(np.diff(tasks[longest_first][:, 2:4].sum(axis=1)) <= 0)


@pytest.mark.parametrize("block_size, pack", [(128, 1), (64, 2), (128, 4)])
def test_lists_by_table_are_those_by_sort(block_size, pack):
  rng = np.random.default_rng(pack)
  queries, top_k, num_blocks, each = 164, 5, 37, 128 // block_size
  starts = np.array([2000, -20, 37 * block_size - 164])[:, None]
  positions = starts + np.arange(queries)
  # Neighbours choose alike; some ids name no block.
  near = rng.integers(-2, num_blocks + 2, (3, queries // 4, 2 * top_k))
  ids = rng.permuted(np.repeat(near, 4, axis=1), axis=-1)[..., :top_k]
  ids = np.sort(ids, axis=-1)
  ids[..., 1:][ids[..., 1:] == ids[..., :-1]] = -1
  ids = rng.permuted(ids, axis=-1)
  after = np.arange(1, -(-num_blocks // each) + 1) * 128 - starts
  after = np.clip(-(-after // pack), 0, queries // pack)
  ids = jnp.asarray(ids.reshape(3, -1, pack * top_k), jnp.int32)
  positions = jnp.asarray(positions, jnp.int32)
  valid = kv_block_plan._valid(ids, positions, block_size, num_blocks)

  def lists(how):
    f = functools.partial(how, num_blocks=num_blocks, pack=pack, each=each)
    found = jax.jit(f)(ids, valid, jnp.asarray(after, jnp.int32))
    return jax.tree.map(np.asarray, found)

  got = lists(kv_block_plan._lists_by_table)
  want = lists(kv_block_plan._lists_by_sort)
  assert want.inside.any() and want.is_pair.any()
  for name in ("bounds", "inside", "is_pair"):
    np.testing.assert_array_equal(getattr(got, name), getattr(want, name), name)
  # What is behind the last pair means nothing.
  num_pairs, slots = want.bounds[-1], pack * top_k
  if pack == each == 1:
    assert got.chosen is want.chosen is None
    np.testing.assert_array_equal(got.order[:num_pairs], want.order[:num_pairs])
    return
  np.testing.assert_array_equal(got.chosen[:num_pairs], want.chosen[:num_pairs])
  # A pack's pairs have its first slots, in any order.
  np.testing.assert_array_equal(
    got.order[:num_pairs] // slots, want.order[:num_pairs] // slots
  )
  np.testing.assert_array_equal(
    np.sort(got.order[:num_pairs]), np.flatnonzero(got.is_pair)
  )


@pytest.mark.parametrize("table_blocks", [0, kv_block_plan.TABLE_BLOCKS])
def test_of_equal_choices_one_counts(table_blocks, monkeypatch):
  monkeypatch.setattr(kv_block_plan, "TABLE_BLOCKS", table_blocks)
  ids = np.array([[[5, 2, 5, 2], [1, 1, 1, 0]]], np.int32)
  # One program: the plan has many small operations.
  plan_of = jax.jit(
    functools.partial(
      kv_block_plan.plan_kv_blocks, block_size=128, num_blocks=6, task=8
    )
  )
  plan = plan_of(jnp.asarray(ids), jnp.array([700]))
  want = np.sort([0, 1, 4, 7])
  np.testing.assert_array_equal(np.flatnonzero(plan.is_pair), want)
  np.testing.assert_array_equal(np.sort(plan.order[:4]), want)
  assert plan.tasks[: int(plan.num_tasks[0]), 2].sum() == 4


def test_numbers_that_share_an_integer_are_read_as_written():
  counts = [128, 0, 77, 128]  # the last one reaches the sign
  packed = kv_block_plan.pack_counts([jnp.int32(x) for x in counts])
  assert packed.dtype == jnp.int32 and packed < 0
  assert [int(kv_block_plan.count_of(packed, i)) for i in range(4)] == counts

  halves = [1, 3, 0, 2]
  chosen = sum(kv_block_plan.pack_chosen(*x) for x in enumerate(halves))
  for query, bits in enumerate(halves):
    assert kv_block_plan.chose_any(chosen, query) == (bits > 0)
    for half in range(2):
      said = kv_block_plan.chose_half(chosen, query, half)
      assert said == bool(bits & 1 << half)

  key = kv_block_plan.sort_key(1000)
  high, low = (jnp.asarray(x, jnp.uint32) for x in ([7, 7, 8], [0, 999, 3]))
  keys = key.pack(high, low)
  assert np.all(np.diff(keys) > 0) and keys[0] == key.least(7)
  np.testing.assert_array_equal(key.high(keys), high)
  np.testing.assert_array_equal(key.low(keys), low)


@pytest.mark.parametrize("num_tasks", [0, 1, 4, 5, 11, 12, 13])
def test_every_task_goes_to_one_cta(num_tasks):
  taken = [
    int(kv_block_plan.nth_task(cta, i, 4))
    for cta in range(4)
    for i in range(kv_block_plan.num_tasks_of_cta(cta, jnp.int32(num_tasks), 4))
  ]
  assert sorted(taken) == list(range(num_tasks))


def test_a_chunk_too_long_for_the_sort_is_refused():
  with pytest.raises(ValueError, match="sort key of 32 bits"):
    jax.eval_shape(
      functools.partial(
        kv_block_plan.plan_kv_blocks,
        block_size=128,
        num_blocks=1 << 15,
        task=128,
      ),
      jax.ShapeDtypeStruct((1, 1 << 15, 16), jnp.int32),
      jax.ShapeDtypeStruct((1,), jnp.int32),
    )


@pytest.mark.parametrize(
  "sizes, split",
  [
    # 2^21 pairs fit: 65,536 tokens, however they divide into rows ...
    ((16, 4096, 2), (16, 2, 1, 4096)),
    ((4, 16384, 2), (4, 2, 1, 16384)),
    ((1, 65536, 2), (1, 2, 1, 65536)),
    # ... and else as many rows as do, some KV heads of one, one in chunks.
    ((8, 4096, 8), (4, 8, 1, 4096)),
    ((7, 16384, 2), (1, 2, 1, 16384)),
    ((3, 65536, 4), (1, 2, 1, 65536)),
    ((1, 131072, 4), (1, 1, 1, 131072)),
    ((2, 1 << 20, 4), (1, 1, 64, 1 << 14)),
  ],
)
def test_launches_take_rows_heads_or_chunks(sizes, split):
  batch, q_len, num_kv_heads = sizes
  got = kv_block_plan.split_launches(
    batch, q_len, num_kv_heads, q_len // 128, 16, max_pairs=1 << 21
  )
  assert got == split


def test_launches_cover_everything_and_fit():
  rng = np.random.default_rng(0)
  for _ in range(300):
    batch, heads, top_k = (int(x) for x in rng.integers(1, 17, 3))
    q_len = int(rng.integers(1, 5000))
    kv_blocks = int(rng.choice([q_len // 128 + 1, 300, 1 << 13, 1 << 15]))
    max_pairs = 1 << int(rng.integers(0, 20))
    most = int(rng.choice([0, 100]))
    split = kv_block_plan.split_launches(
      batch, q_len, heads, kv_blocks, top_k, max_pairs=max_pairs, chunk=most
    )
    # Launches are rectangles that cover all rows and heads once.
    assert batch % split.batch_rows == 0 and heads % split.kv_heads == 0
    assert split.batch_rows == 1 or split.kv_heads == heads
    assert q_len <= split.num_chunks * split.chunk
    assert 1 <= split.chunk <= (most or q_len)
    pairs = split.groups * split.chunk * top_k
    assert pairs <= max(max_pairs, top_k)
    assert split.groups * kv_blocks <= 1 << 15
    assert kv_block_plan.sort_key_fits(split.groups * kv_blocks, pairs)


# ------------------------------------------------------------ interpret mode

INTERPRETED_CONFIGS = {
  "block_64": dict(),
  "group_16": dict(task=8, chunk=12),  # hot blocks split, two chunks
  "rows": dict(pairs=72, chunk=5),  # two batch rows a launch, two chunks
  "nan": dict(),
}


class TestInterpreted(GradientContract):
  repeats = False  # the interpreter takes ten seconds a call
  # A cotangent of lse changes one sum; the tests of NaN are without, too.
  without_dlse = (pytest.param("block_64", marks=pytest.mark.slow),)
  # Documents in tests/test_kernels_packed.py have blocks of 64 tokens, too.
  # Padded heads in tests/test_kernels_shapes.py have rows of all lengths.
  scenarios = (
    *without_dlse, "group_16", pytest.param("rows", marks=pytest.mark.slow),
  )  # fmt: skip

  def run(self, name, case, *args):
    return interpreted(case, *args, **INTERPRETED_CONFIGS[name])


@pytest.mark.parametrize(
  "launches", [4, pytest.param(2, marks=pytest.mark.slow)]
)
@pytest.mark.slow
def test_interpreted_launches_do_not_change_a_bit(launches):
  # A batch row that sees all its queries and one that is shorter than T.
  scenario = op_contract.ATTENTION["rows"]
  case = dataclasses.replace(scenario.case, batch=2, kv_lengths=(140, 5))
  args = (case, *dataclasses.replace(scenario, case=case).build())
  choices = case.batch * case.num_kv_heads * case.q_len * case.top_k
  # Both batch rows at once, and one group or one row.
  want, got = (
    interpreted(*args, pairs=choices // n, task=16) for n in (1, launches)
  )
  check_attention_gradients(*args, want)
  assert_same_bits(got, want)


# ------------------------------------------------------------------ lowering


@pytest.mark.parametrize("name", LOWERED_NAMES)
def test_lowers_for_cuda(name):
  case = LOWERED[name]
  with_lse = name == "small_heads_32k"
  kv = (case.batch, case.kv_tokens, case.num_kv_heads, case.head_dim)
  shapes = [
    jax.ShapeDtypeStruct(shape, case.dtype)
    for shape in (
      (case.batch, case.tokens, case.num_heads, case.head_dim),
      kv,
      kv,
    )
  ]
  ids = (case.batch, case.num_kv_heads, case.tokens, case.top_k)

  def loss(q, k, v, ids):
    # Rematerialised, as a training step would have it.
    out, lse = jax.checkpoint(
      functools.partial(sparse.sparse_attention, block_size=case.block_size)
    )(q, k, v, ids)
    total = out.astype(jnp.float32).sum()
    return total + jnp.sin(lse).sum() if with_lse else total

  grad = jax.jit(jax.grad(loss, (0, 1, 2)))
  lowered = grad.trace(*shapes, jax.ShapeDtypeStruct(ids, jnp.int32)).lower(
    lowering_platforms=("cuda",)
  )
  text = lowered.as_text()
  assert "sparse_kv_blocks" in text and "sparse_sum_extra" in text
  kept = [
    x.shape
    for x in jax.tree.leaves(
      jax.eval_shape(
        lambda *x: jax.vjp(
          lambda q: sparse.sparse_attention(
            q, *x[1:], block_size=case.block_size
          )[0],
          x[0],
        )[1],
        *shapes,
        jax.ShapeDtypeStruct(ids, jnp.int32),
      )
    )
  ]
  # Residuals: no array of T x S.
  assert max(np.prod(shape) for shape in kept) == np.prod(shapes[0].shape)


# ------------------------------------------------------------------- Hopper


@functools.cache
def compiled(case, config=None):
  """Forward and backward pass in one program, as users run them."""

  def run(q, k, v, dout, blocks, dlse=None):
    def attend(q, k, v):
      return sparse.sparse_attention(
        q, k, v, blocks, block_size=case.block_size, kv_lengths=case.lengths,
        backward_config=config,
      )  # fmt: skip

    return op_contract.vjp(attend, q, k, v, dout=dout, dlse=dlse)

  return jax.jit(run)


@functools.partial(jax.jit, static_argnums=0)
def forward(case, q, k, v, blocks):
  return sparse.sparse_attention(
    q, k, v, blocks, block_size=case.block_size, kv_lengths=case.lengths
  )


def backward(case, config, results, q, k, v, dout, blocks):
  """The backward pass alone, after the results of `forward`.

  The forward pass, which takes longer to compile, is the same for all configs
  of the backward pass.
  """
  return sparse._backward(
    q, k, v, *results, dout, None, blocks, lengths(case),
    block_size=case.block_size, scale=case.head_dim**-0.5, config=config,
    interpret=False,
  )  # fmt: skip


def run_twice(case, q, k, v, dout, blocks, config):
  run = functools.partial(
    backward, case, config, forward(case, q, k, v, blocks)
  )
  check = functools.partial(check_attention_gradients, case)
  return op_contract.run_twice(run, check, q, k, v, dout, blocks)


@pytest.mark.gpu
@pytest.mark.parametrize("name", HOPPER_CASES)
def test_gpu_patterns(hopper, name):
  """With a cotangent of lse; the other tests are without."""
  case, dtype = HOPPER_CASES[name]
  args = attention_inputs(case, dtype)
  for blocks in patterns(case).values():
    dlse = op_contract.lse_cotangent(case, blocks)

    def check(*args):
      *operands, dlse, grads = args
      check_attention_gradients(case, *operands, grads, dlse)

    op_contract.run_twice(compiled(case), check, *args, blocks, dlse)


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("name", ["paper_heads", "d256"])
def test_gpu_configs(hopper, name, config):
  case, dtype = HOPPER_CASES[name]
  args = attention_inputs(case, dtype)
  for pattern in ("random", "sharing", "all_on_block_0"):
    run_twice(case, *args, patterns(case)[pattern], config)


@pytest.mark.gpu
def test_gpu_small_chunks_and_tasks(hopper):
  case, dtype = HOPPER_CASES["ragged_batch"]
  run = compiled(case, bwd.Config(chunk=64, task=16, num_ctas=7))
  check = functools.partial(check_attention_gradients, case)
  args = attention_inputs(case, dtype)
  op_contract.run_twice(run, check, *args, random_blocks(case))


@pytest.mark.gpu
def test_gpu_launches_of_rows_and_groups(hopper):
  case, dtype = HOPPER_CASES["ragged_rows"]
  args = (*attention_inputs(case, dtype), random_blocks(case))
  row = case.q_len * case.top_k * case.num_kv_heads
  # All rows at once, two, one, and one group.
  want, *others = (
    run_twice(case, *args, bwd.Config(pairs=pairs, task=128))
    for pairs in (0, 2 * row, row, row // 2)
  )
  # A block's sums do not depend on who else is in the launch.
  for got in others:
    for a, b in zip(got[1:], want[1:]):
      assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
  run_twice(case, *args, bwd.Config(pairs=2 * row, chunk=77, num_ctas=7))


@pytest.mark.gpu
@pytest.mark.gpu_memory
def test_gpu_rows_beside_each_other_are_rows_alone(hopper):
  # As many pairs as a launch takes.
  case = Case(
    batch=16, q_len=4096, kv_len=4096, num_heads=16, num_kv_heads=2,
    head_dim=128, block_size=128, top_k=16,
  )  # fmt: skip
  q, k, v, dout = attention_inputs(case, jnp.bfloat16)
  blocks = random_blocks(case)
  one = dataclasses.replace(case, batch=1)
  config = bwd.Config(task=2048)
  args = (forward(case, q, k, v, blocks), q, k, v, dout, blocks)
  want = backward(case, config, *args)
  for i in (0, 7, 15):
    at = slice(i, i + 1)
    got = backward(one, config, *jax.tree.map(lambda x, at=at: x[at], args))
    for a, b in zip(got[1:], want[1:]):
      assert np.asarray(a).tobytes() == np.asarray(b[at]).tobytes()
    # XLA sums the partials of dq in an order of its own.
    a, b = (np.asarray(x, np.float32) for x in (got[0], want[0][at]))
    assert np.abs(a - b).max() <= 2**-7 * np.abs(a).max()


@pytest.mark.gpu
def test_gpu_nan_reaches_only_what_sees_it(hopper):
  case = dataclasses.replace(HOPPER_CASES["paper_heads"][0], q_len=300)
  q, k, v, dout = attention_inputs(case, "bfloat16")
  run = compiled(case)
  # Of a block that nobody chose: nothing.
  blocks = np.array(random_blocks(case))
  blocks[blocks == 4] = -1
  blocks = jnp.asarray(blocks)
  want = run(q, k, v, dout, blocks)
  bad_k, bad_v = (x.at[:, 512:640].set(jnp.nan) for x in (k, v))
  got = run(q, bad_k, bad_v, dout, blocks)
  for a, b in zip(got, want):
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
  for x in got[1:]:
    np.testing.assert_array_equal(np.asarray(x)[:, 512:640], 0.0)
  # Of a query: its row and its blocks.
  blocks = random_blocks(case)
  dq, dk, dv = run(q.at[0, 77, 3].set(jnp.nan), k, v, dout, blocks)
  bad = np.isnan(np.asarray(dq, np.float32)).any((0, 3))
  np.testing.assert_array_equal(np.argwhere(bad), [[77, 3]])
  chosen = np.isin(np.arange(case.kv_len) // 128, np.asarray(blocks)[0, 0, 77])
  chosen &= np.arange(case.kv_len) <= case.positions()[0, 77]
  for x in (dk, dv):
    bad = np.isnan(np.asarray(x, np.float32))[0].any(-1)
    np.testing.assert_array_equal(bad[:, 0], chosen)
    assert not bad[:, 1:].any()


@pytest.mark.gpu
def test_gpu_under_vmap(hopper):
  case, dtype = HOPPER_CASES["group_4"]
  args = attention_inputs(case, dtype)
  blocks = random_blocks(case)
  two = [jnp.stack([x, x[:, ::-1]]) for x in args]
  grads = jax.vmap(compiled(case), (0, 0, 0, 0, None))(*two, blocks)
  for i in range(2):
    check_attention_gradients(
      case, *(x[i] for x in two), blocks, [x[i] for x in grads]
    )
