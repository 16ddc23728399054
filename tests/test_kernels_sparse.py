"""Sparse attention kernels: planned, interpreted, lowered, run on Hopper."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import op_contract
import pytest
from flax import nnx
from helpers import (
  FORWARD_CONFIGS,
  HOPPER_CASES,
  Case,
  patterns,
  random_blocks,
)
from op_contract import (
  ATTENTION,
  AttentionContract,
  LseContract,
  check_attention,
)

import msa_jax
from pallas_kernels import mosaic, tile_plan
from pallas_kernels import sparse_attention as sparse
from pallas_kernels import sparse_attention_bwd as bwd
from pallas_kernels import sparse_attention_fwd as fwd

PAIRS = fwd.Config(shared_cost=1e9, slack=0.0)  # pairs but for own blocks
WALK = fwd.Config(shared_cost=0.0)  # shared blocks only
PATTERNS = list(patterns(Case()))


def interpreted(config):
  # On machines with few cores the CPU backend cannot run more than a few
  # warpgroups at once: one CTA, and two compute warpgroups.
  return dataclasses.replace(
    config, num_ctas=1, pair_warpgroups=2, query_stages=2
  )


def call(case, q, k, v, blocks, config=None, **options):
  return sparse.sparse_attention(
    q, k, v, blocks, block_size=case.block_size, kv_lengths=case.lengths,
    config=config, **options,
  )  # fmt: skip


# ---------------------------------------------------------------- the plan

plan_by_choice = jax.jit(tile_plan.plan_by_choice, static_argnums=3)
plan_by_block = jax.jit(tile_plan.plan_by_block, static_argnums=3)
find_pairs = jax.jit(tile_plan.find_pairs, static_argnums=1)


@functools.partial(jax.jit, static_argnums=3)
def plan_of(ids, positions, first_bad, geometry):
  """The tiles, which choices are pairs, their tasks and the merges."""
  plan, found = tile_plan.plan_by_choice(ids, positions, first_bad, geometry)
  chunk_tiles = geometry.chunk // geometry.tile
  sizes = (-1, chunk_tiles, geometry.tile * geometry.top_k)
  is_pair = tile_plan.find_pairs(found, geometry)
  pairs = tile_plan.plan_pairs(
    found.choices.reshape(sizes), is_pair.reshape(sizes), geometry
  )
  merges = tile_plan.plan_merges(found, is_pair, geometry)
  return plan, is_pair, pairs, merges


def queries_of(bits, geometry):
  """bool [..., tile] of query bits [..., 2]."""
  bits = np.asarray(bits)[..., None] >> np.arange(geometry.half) & 1
  return bits.reshape(*bits.shape[:-2], geometry.tile).astype(bool)


def decode_shared(plan, geometry):
  """{(tile, query in tile, block)} of the tiles' lists."""
  counts, shared = np.asarray(plan.counts), np.asarray(plan.shared)
  chosen = queries_of(np.moveaxis(plan.shared_by, 1, 2), geometry)
  found = []
  for tile, (_, count) in enumerate(counts):
    blocks = shared[tile, :count]
    assert np.all(np.diff(blocks) > 0)
    for block, by in zip(blocks, chosen[tile]):
      found += [(tile, query, block) for query in np.flatnonzero(by)]
  return found


def decode_pairs(pairs, geometry, merges):
  """{(tile, query in tile, block)} of the tasks, checked against the merges."""
  chunks, tasks, order = (np.asarray(x) for x in pairs)
  merged = queries_of(np.moveaxis(merges, 1, 2), geometry)
  chunk_tiles = geometry.chunk // geometry.tile
  found, done = [], np.zeros_like(merged)
  for chunk, (first, count) in enumerate(chunks):
    spans = []
    for block, start, length, _ in tasks[first : first + count]:
      assert 0 <= block < geometry.num_blocks
      assert 0 <= length <= geometry.task
      for slot in order[start : start + length]:
        pack, place = divmod(slot, geometry.pack_slots)
        tile = chunk * chunk_tiles + pack // geometry.tile_packs
        first_query = pack % geometry.tile_packs * geometry.pack
        queries = np.arange(first_query, first_query + geometry.pack)
        queries = queries[merged[tile, place, queries]]
        assert queries.size and not done[tile, place, queries].any()
        done[tile, place, queries] = True
        found += [(tile, query, block) for query in queries]
        spans.append(pack * geometry.pack // geometry.span)
    assert np.all(np.diff(spans) >= 0)
  np.testing.assert_array_equal(done, merged)
  return found


@pytest.mark.parametrize("kind", ["random", "share", "hot", "garbage", "empty"])
@pytest.mark.parametrize(
  "shared_cost",
  [0.0, pytest.param(1.5, marks=pytest.mark.slow), 2.2, 1e9],
)
@pytest.mark.parametrize("tile, pack", [(8, 1), (16, 1), (32, 2), (64, 4)])
def test_every_choice_is_done_once(kind, shared_cost, tile, pack):
  rng = np.random.default_rng(0)
  groups, queries, top_k, num_blocks, block_size = 2, 64, 4, 12, 64
  geometry = tile_plan.Geometry(
    num_blocks=num_blocks, block_size=block_size, top_k=top_k, pack=pack,
    chunk=max(32, tile), tile=tile, span=max(16, tile), task=16,
    shared_cost=shared_cost, slack=0.0,
  )  # fmt: skip
  # The first group's positions begin before the first key, the second's inside
  # a block.
  positions = np.stack([np.arange(-20, 44), np.arange(460, 524)])
  own = np.where(positions < 0, -1, positions // block_size)
  ids = np.argsort(rng.random((groups, queries, num_blocks)))[..., :top_k]
  if kind == "share":
    ids = np.repeat(ids[:, :: tile // 2], tile // 2, axis=1)
  elif kind == "hot":
    ids[..., 0] = np.where((ids[..., 1:] == 0).any(-1), -1, 0)
  elif kind == "garbage":
    ids[:, ::3] += 1 << 20
    ids[:, 1::3] -= 1 << 30
  elif kind == "empty":
    ids[:] = -1
  first_bad = np.full((groups, 2, num_blocks), mosaic.NEVER, np.int32)
  arguments = (
    jnp.asarray(ids, jnp.int32), jnp.asarray(positions, jnp.int32),
    jnp.asarray(first_bad), geometry,
  )  # fmt: skip
  plan, is_pair, pairs, merges = plan_of(*arguments)
  np.testing.assert_array_equal(plan.has_pairs, is_pair.any(axis=-1))
  shared = decode_shared(plan, geometry)
  alone = decode_pairs(pairs, geometry, np.asarray(merges))
  valid = (ids >= 0) & (ids <= own[..., None])
  wanted = sorted(
    (group * (queries // tile) + t // tile, t % tile, ids[group, t, p])
    for group, t, p in zip(*np.nonzero(valid))
  )
  assert sorted(shared + alone) == wanted
  # Only the tile kernel applies the causal mask.
  for index, query, block in alone:
    group, t = divmod(index * tile + query, queries)
    assert block < own[group, t]
  sees = queries_of(plan.queries[:, 2], geometry)
  np.testing.assert_array_equal(sees.reshape(groups, queries), valid.any(-1))
  if shared_cost == 0.0:
    assert not alone
  if kind == "random" and shared_cost == 1e9:
    assert alone


# Each shape is a program of its own, so that packed and plain rows share them
# out: every pack, and plans with and without pairs, have both.
@pytest.mark.parametrize(
  "tile, pack, num_blocks, top_k, shared_cost, slack, packed",
  [
    (8, 1, 40, 4, 2.2, 0.0, False), (8, 1, 40, 4, 2.2, 1.35, True),
    (16, 1, 70, 8, 2.2, 0.0, True), (18, 1, 33, 5, 0.0, 1.0, False),
    (32, 2, 64, 8, 4.4, 0.9, False), (32, 2, 64, 8, 4.4, 0.9, True),
    (64, 4, 100, 8, 1.5, 0.0, True), (64, 4, 31, 16, 1e9, 0.0, False),
  ],
)  # fmt: skip
def test_a_plan_by_block_is_that_by_choice(
  tile, pack, num_blocks, top_k, shared_cost, slack, packed
):
  rng = np.random.default_rng(tile + num_blocks)
  groups, queries, block_size = 2, 4 * tile, 64
  geometry = tile_plan.Geometry(
    num_blocks=num_blocks, block_size=block_size, top_k=top_k, pack=pack,
    chunk=queries, tile=tile, span=queries, task=16, shared_cost=shared_cost,
    slack=slack, masked=tile * top_k if packed else 2,
  )  # fmt: skip
  positions = np.sort(rng.integers(-9, num_blocks * 64, (groups, queries)))
  if not packed:  # the second group's first queries see nothing
    positions = np.arange(queries) + np.array([[num_blocks * 16], [-9]])
  # Neighbours choose from the same few blocks; some ids name no block.
  near = rng.integers(-1, num_blocks + 1, (groups, queries // 8 + 1, 2 * top_k))
  near = np.repeat(near, 8, axis=1)[:, :queries]
  ids = rng.permuted(near, axis=-1)[..., :top_k]
  ids[..., 0] = positions // block_size
  once = np.sort(ids, axis=-1)
  once[..., 1:][once[..., 1:] == once[..., :-1]] = -1
  first_bad = np.full((groups, 2, num_blocks), mosaic.NEVER)
  for kind in range(2):
    bad = rng.choice(num_blocks, 4, replace=False)
    first_bad[:, kind, bad] = bad * 64 + rng.integers(0, 64, 4)
  keys = None
  if packed:
    keys = rng.choice([64, 64, 20], (groups, num_blocks)).astype(np.int32)
  arguments = (
    once.astype(np.int32), positions.astype(np.int32),
    first_bad.astype(np.int32), geometry, keys,
  )  # fmt: skip
  want, _ = plan_by_choice(*arguments)
  got = plan_by_block(*arguments)
  assert want.has_pairs.any() == (shared_cost > 0 and slack < 1)
  assert np.any(want.queries[:, :2] != 0)
  for name in ("counts", "queries", "has_pairs"):
    np.testing.assert_array_equal(getattr(got, name), getattr(want, name), name)
  assert decode_shared(got, geometry) == decode_shared(want, geometry)


@pytest.mark.parametrize(
  "num_blocks, top_k, few", [(256, 16, True), (257, 16, False)]
)
def test_a_table_of_all_blocks_is_for_few(num_blocks, top_k, few):
  geometry = fwd.geometry(
    4096, num_blocks * 128, mosaic.Packing(16), 128, 128, top_k, fwd.Config()
  )
  assert geometry.few_blocks == few


@pytest.mark.parametrize(
  "group, tile",
  [
    *((1, 64), (3, 42), (7, 18), (16, 8)),
    *(
      pytest.param(*sizes, marks=pytest.mark.slow)
      for sizes in ((5, 24), (6, 20), (11, 10))
    ),
  ],
)
def test_tiles_that_are_walked_hold_as_many_queries_as_fit(group, tile):
  queries, top_k, num_blocks = 4 * tile, 3, 9
  geometry = fwd.geometry(
    queries, num_blocks * 64, mosaic.Packing(group), 64, 64, top_k,
    fwd.Config(shared_cost=0.0), walk=True,
  )  # fmt: skip
  assert geometry.tile == tile
  rng = np.random.default_rng(group)
  ids = np.argsort(rng.random((2, queries, num_blocks)))[..., :top_k]
  arguments = (
    jnp.asarray(ids, jnp.int32), jnp.full((2, queries), num_blocks * 64 - 1),
    jnp.full((2, 2, num_blocks), mosaic.NEVER, jnp.int32), geometry,
  )  # fmt: skip
  plan, _ = plan_by_choice(*arguments)
  assert not plan.has_pairs.any()
  wanted = [
    (row // tile, row % tile, block)
    for row, blocks in enumerate(ids.reshape(-1, top_k))
    for block in blocks
  ]
  assert sorted(decode_shared(plan, geometry)) == sorted(wanted)
  plan = plan_by_block(*arguments)
  assert sorted(decode_shared(plan, geometry)) == sorted(wanted)


@pytest.mark.parametrize(
  "num_blocks, top_k, walk",
  [(64, 16, True), (65, 64, False), (20, 5, True), (21, 5, False)],
)
def test_few_blocks_are_walked_without_pairs(
  num_blocks, top_k, walk, pairs_of_few_blocks
):
  config = pairs_of_few_blocks(num_blocks, top_k)
  assert config == (WALK if walk else fwd.Config())


@pytest.mark.parametrize(
  "groups, tiles, bundle", [(1, 7, 1), (8, 5, 8), (8, 6, 2), (6, 4, 3)]
)
def test_order_of_tiles(groups, tiles, bundle):
  """Every tile once, neighbours as long as each other, short ones last."""
  order = np.array([
    tile_plan.tile_of_rank(jnp.int32(i), groups, tiles, bundle)
    for i in range(groups * tiles)
  ])  # fmt: skip
  assert sorted(order) == list(range(groups * tiles))
  assert np.all(np.abs(np.diff(order % tiles)) <= 1)
  assert np.all(order[-bundle:] % tiles == 0)
  for i in range(0, order.size, bundle * tiles):
    assert np.ptp(order[i : i + bundle * tiles] // tiles) == bundle - 1


def test_walks_everything_only_while_the_list_holds_it():
  geometry = tile_plan.Geometry(
    num_blocks=64, block_size=16, top_k=4, pack=1, chunk=8, tile=8, span=8,
    task=16, shared_cost=4.0, slack=1e9,
  )  # fmt: skip
  ids = np.arange(32).reshape(1, 8, 4)  # 32 blocks, the list holds 10
  plan, is_pair, _, _ = plan_of(
    jnp.asarray(ids, jnp.int32), jnp.arange(1000, 1008)[None],
    jnp.full((1, 2, 64), mosaic.NEVER, jnp.int32), geometry,
  )  # fmt: skip
  assert geometry.max_shared == 10
  assert np.asarray(plan.counts)[0, 1] == 0
  assert np.asarray(is_pair).sum() == 32


@pytest.mark.parametrize(
  "num_blocks", [64, pytest.param(256, marks=pytest.mark.slow), 1024]
)
def test_random_choices_cost_no_more_than_pairs_alone(num_blocks):
  """The default plan against one in which only own blocks are shared.

  The cost counts what the kernels do: a shared block for half a tile is as dear
  as `shared_cost` pairs, which was fitted to measured times (`python -m
  benchmarks --ops sparse_forward` measures them).
  """
  rng = np.random.default_rng(0)
  queries, top_k = 256, 16
  positions = np.arange(num_blocks * 128 - queries, num_blocks * 128)
  own = positions[:, None] // 128
  ids = np.argsort(rng.random((queries, num_blocks - 2)))[:, : top_k - 1]
  ids = np.concatenate([ids, own], axis=1)

  def cost(config):
    kv_len = num_blocks * 128
    geometry = fwd.geometry(
      queries, kv_len, mosaic.Packing(16), 128, 128, top_k, config
    )
    plan, found = plan_by_choice(
      jnp.asarray(ids, jnp.int32)[None], jnp.asarray(positions)[None],
      jnp.full((1, 2, num_blocks), mosaic.NEVER, jnp.int32), geometry,
    )  # fmt: skip
    shared = decode_shared(plan, geometry)
    half = geometry.tile // 2
    walked = {(tile, query // half, block) for tile, query, block in shared}
    num_pairs = np.sum(find_pairs(found, geometry))
    return len(walked) * fwd.Config().shared_cost + num_pairs

  assert cost(fwd.Config()) <= cost(PAIRS)


# ------------------------------------------------------------ interpret mode


class TestInterpreted(AttentionContract):
  # Padded heads in tests/test_kernels_shapes.py have queries that see nothing,
  # and wide ones have pairs.
  scenarios = (
    pytest.param("empty_rows", marks=pytest.mark.slow), "poisoned",
  )  # fmt: skip
  repeats = False  # the interpreter takes ten seconds a call

  def run(self, name, case, q, k, v, blocks):
    config = {"empty_rows": PAIRS, "poisoned": WALK}[name]
    # One program: the plan has many small operations.
    attend = jax.jit(
      functools.partial(call, case, config=interpreted(config), interpret=True)
    )
    return attend(q, k, v, blocks)


@pytest.mark.slow  # the quicker test_gradients_through_lse covers the kernels
class TestInterpretedLse(LseContract):
  phases = ("sparse",)
  dtypes = ("bfloat16",)

  def attend(self, case, q, k, v, blocks):
    return call(
      case, q, k, v, blocks, interpreted(PAIRS), interpret=True,
      backward_config=bwd.Config(stages=2, num_ctas=1),
    )  # fmt: skip


# ------------------------------------------------------- lowering and limits


def lower(case, dtype="bfloat16", config=None, **options):
  spec = jax.ShapeDtypeStruct
  kv = (case.batch, case.kv_len, case.num_kv_heads, case.head_dim)
  q = (case.batch, case.q_len, case.num_heads, case.head_dim)
  blocks = (case.batch, case.num_kv_heads, case.q_len, case.top_k)

  def function(q, k, v, blocks, lengths):
    return sparse.sparse_attention(
      q, k, v, blocks, block_size=case.block_size, kv_lengths=lengths,
      config=config, **options,
    )  # fmt: skip

  args = (
    spec(q, dtype), spec(kv, dtype), spec(kv, dtype), spec(blocks, jnp.int32),
    spec((case.batch,), jnp.int32),
  )  # fmt: skip
  traced = jax.jit(function).trace(*args)
  out, lse = traced.out_info
  assert out.shape == q and out.dtype == dtype
  assert lse.shape == (case.batch, case.num_heads, case.q_len)
  return traced.lower(lowering_platforms=("cuda",)).as_text()


PAPER = Case(
  q_len=1 << 17, kv_len=1 << 17, num_heads=64, num_kv_heads=4, head_dim=128,
  block_size=128, top_k=16,
)  # fmt: skip


# The default is lowered by test_kernels_backward; the others that are slow give
# kernels that differ from it in numbers only.
LOWERED_CONFIGS = [
  pytest.param(
    config,
    marks=[pytest.mark.slow]
    * (config in (fwd.Config(), fwd.Config(task=128), PAIRS)),
  )
  for config in FORWARD_CONFIGS
]


@pytest.mark.parametrize("config", LOWERED_CONFIGS, ids=str)
def test_lowers_every_config_at_the_paper_shape(config):
  text = lower(PAPER, config=config)
  assert text.count("mosaic_gpu") >= 3


@pytest.mark.parametrize(
  "tokens, heads, groups, dim, block, top_k, batch, dtype",
  [
    # test_kernels_backward lowers forward and backward at the paper's shapes.
    (4097, 8, 8, 64, 64, 32, 3, "float16"),
    *(
      pytest.param(*sizes, marks=pytest.mark.slow)
      for sizes in (
        # As wide heads as test_kernels_shapes lowers, in blocks of 64, too.
        (777, 16, 2, 128, 64, 5, 2, "bfloat16"),
        (5000, 8, 2, 64, 128, 1, 1, "float16"),
      )
    ),
  ],
)
def test_lowers(tokens, heads, groups, dim, block, top_k, batch, dtype):
  case = Case(
    batch=batch, q_len=tokens, kv_len=tokens, num_heads=heads,
    num_kv_heads=groups, head_dim=dim, block_size=block, top_k=top_k,
  )  # fmt: skip
  lower(case, dtype)


def test_buffers_stay_below_2_31_elements():
  for tokens in (1 << 17, 1 << 20):
    g = fwd.geometry(
      tokens, tokens, mosaic.Packing(16), 128, 128, 16, fwd.Config()
    )
    assert g.chunk * g.top_k * 16 * 128 <= 1 << 30
    assert g.chunk % g.tile == 0


def test_workspace_does_not_change_the_number_of_tiles():
  config = fwd.Config(chunk=24)
  g = fwd.geometry(100, 100, mosaic.Packing(16), 64, 64, 2, config)
  assert g.chunk <= 24 and g.chunk % g.tile == 0


SMALL = Case(
  q_len=16, kv_len=64, num_heads=16, num_kv_heads=1, head_dim=64,
  block_size=64, top_k=1,
)  # fmt: skip


@pytest.mark.parametrize(
  "change, dtype, text",
  [
    ({"head_dim": 68}, "bfloat16", "head_dim of multiples of 8 up to 256, got"),
    ({"head_dim": 264}, "bfloat16", "multiples of 8 up to 256, got 264"),
    ({"block_size": 32}, "bfloat16", "block_size in (64, 128), got 32"),
    ({"num_heads": 17}, "bfloat16", "num_kv_heads) up to 16, got 17"),
    ({"top_k": 65}, "bfloat16", "top_k up to 64, got 65"),
    ({}, "float32", "dtype in (bfloat16, float16), got float32"),
    ({"kv_len": (1 << 21) + 64}, "bfloat16", "up to 32768 blocks"),
    (
      {"batch": 1 << 15, "q_len": 1 << 16, "kv_len": 1 << 16},
      "bfloat16",
      "up to 2147483647 choices (batch x KV heads x queries x top_k), got"
      " 2147483648",
    ),
  ],
)
def test_says_what_is_supported(change, dtype, text):
  with pytest.raises(NotImplementedError) as error:
    lower(dataclasses.replace(SMALL, **change), dtype)
  assert text in str(error.value)


def test_scale_must_be_positive():
  with pytest.raises(NotImplementedError, match=r"scale > 0, got -1.0"):
    lower(SMALL, scale=-1.0)


@pytest.mark.parametrize("change", [{"q_len": 0}, {"kv_len": 0}, {"top_k": 0}])
def test_nothing_to_see(change):
  case = dataclasses.replace(SMALL, **change)
  q, k, v, *_ = case.inputs(dtype=jnp.bfloat16)
  blocks = jnp.zeros((1, 1, case.q_len, case.top_k), jnp.int32)
  out, lse = call(case, q, k, v, blocks)
  assert out.shape == q.shape and not np.any(np.asarray(out, np.float32))
  assert lse.shape == (1, 16, case.q_len) and np.all(np.isneginf(lse))


def test_needs_a_hopper_gpu(no_gpu):
  with pytest.raises(
    NotImplementedError, match=r"capability 9\.0.*on the platform 'cpu'"
  ):
    mosaic.require_hopper()


@pytest.fixture
def fake_gpus(monkeypatch):
  """An H100 as the first device of this machine, and an older card."""
  gpus = [
    types.SimpleNamespace(
      platform="gpu", device_kind=kind, compute_capability=number, core_count=n
    )
    for kind, number, n in (("H100", "9.0", 114), ("A100", "8.0", 108))
  ]
  for name in ("devices", "local_devices"):
    monkeypatch.setattr(jax, name, lambda backend=None: gpus)


def test_asks_the_device_in_use(fake_gpus):
  mosaic.require_hopper()
  assert mosaic.num_sms() == 114


@pytest.mark.parametrize("inside_jit", [False, True])
def test_asks_the_default_device(inside_jit, request):
  cpu = jax.devices("cpu")[0]
  request.getfixturevalue("fake_gpus")

  def ask():
    with pytest.raises(NotImplementedError, match="run on the platform 'cpu'"):
      mosaic.require_hopper()
    assert mosaic.num_sms() == mosaic.NUM_SMS

  with jax.default_device(cpu):
    (jax.jit(ask) if inside_jit else ask)()


@pytest.mark.parametrize(
  "kind, cores",
  [("H100", 114), ("A100", 108), ("B200", 132), ("NVIDIA H200", 132)],
)
def test_asks_the_devices_of_the_mesh(kind, cores, request):
  cpu = jax.devices("cpu")[0]
  request.getfixturevalue("fake_gpus")
  device = jax.sharding.AbstractDevice(
    device_kind=kind, num_cores=None, platform="gpu"
  )
  mesh = jax.sharding.AbstractMesh((2,), ("data",), abstract_device=device)
  with jax.default_device(cpu), jax.sharding.use_abstract_mesh(mesh):
    assert mosaic.num_sms() == cores
    if kind in ("H100", "NVIDIA H200"):  # the second is not attached
      mosaic.require_hopper()
      return
    with pytest.raises(NotImplementedError, match=f"run on {kind}"):
      mosaic.require_hopper()


# Every operation that has kernels, of q, k, v, index_q and index_k.
OPERATIONS = {
  "select_blocks": lambda q, k, v, iq, ik, **named: msa_jax.select_blocks(
    iq, ik, block_size=64, top_k=2, **named
  ),
  "sparse_attention": lambda q, k, v, iq, ik, **named: msa_jax.sparse_attention(
    q, k, v, jnp.zeros((1, 1, 16, 1), jnp.int32), block_size=64, **named
  ),
  "index_kl_loss": lambda q, k, v, iq, ik, **named: msa_jax.index_kl_loss(
    q, k, iq, ik, None, lse=jnp.zeros((1, 16, 16)), **named
  )[None],
  "warm-up": lambda q, k, v, iq, ik, **named: msa_jax.msa_attention(
    q, k, v, iq, ik, block_size=64, top_k=1, phase="warmup", **named
  ).out,
  "decode_attention": lambda q, k, v, iq, ik, **named: msa_jax.decode_attention(
    q, k, v, iq, ik, kv_lengths=jnp.full((1,), 16), block_size=64, top_k=1,
    **named,
  ).out,
}  # fmt: skip


def operands():
  case = dataclasses.replace(SMALL, kv_len=16, index_dim=64)
  return case.inputs(dtype=jnp.bfloat16)


@pytest.mark.parametrize("name", OPERATIONS)
def test_64_bit_jax_lowers(name, pretend_hopper, x64):
  operation = functools.partial(OPERATIONS[name], implementation="mosaic_gpu")
  traced = jax.jit(operation).trace(*operands())
  text = traced.lower(lowering_platforms=("cuda",)).as_text()
  # The warm-up attends by cuDNN, and one block leaves nothing to choose.
  assert ("mosaic_gpu" in text) == (name not in ("warm-up", "select_blocks"))


@pytest.mark.parametrize("name", OPERATIONS)
def test_lowers_where_varying_axes_are_tracked(name, pretend_hopper):
  """Inside of jax.shard_map with its default check_vma=True."""
  mesh = jax.make_mesh(
    (1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
  )
  spec = jax.sharding.PartitionSpec("data")
  operation = functools.partial(OPERATIONS[name], implementation="mosaic_gpu")
  mapped = jax.shard_map(operation, mesh=mesh, in_specs=spec, out_specs=spec)
  text = jax.jit(mapped).trace(*operands()).lower(
    lowering_platforms=("cuda",)
  ).as_text()  # fmt: skip
  assert ("mosaic_gpu" in text) == (name not in ("warm-up", "select_blocks"))


def test_layer_under_a_mesh_lowers(pretend_hopper):
  mesh = jax.make_mesh(
    (1, 1), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2
  )
  with jax.set_mesh(mesh):
    layer = msa_jax.MSAttention(
      num_heads=8, in_features=64, qkv_features=512, num_kv_heads=1,
      index=msa_jax.IndexConfig(index_dim=64, block_size=64, top_k=2),
      dtype=jnp.bfloat16, implementation="mosaic_gpu",
      sharding=msa_jax.Sharding(embed=None), rngs=nnx.Rngs(0),
    )  # fmt: skip
    x = jnp.ones((1, 256, 64), jnp.bfloat16)
    traced = nnx.jit(lambda layer, x: layer(x, with_kl=True).out).trace(
      layer, x
    )
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
  assert text.count("mosaic_gpu") >= 3


# ------------------------------------------------------------------- Hopper


@functools.cache
def compiled(case, config):
  return jax.jit(functools.partial(call, case, config=config))


def run_twice(case, q, k, v, blocks, config=None):
  def check(*args):
    *operands, (out, lse) = args
    check_attention(case, *operands, out, lse)

  op_contract.run_twice(compiled(case, config), check, q, k, v, blocks)


GPU_CASES = HOPPER_CASES | {
  "group_2": (Case(
    q_len=300, kv_len=900, num_heads=4, num_kv_heads=2, head_dim=64,
    block_size=64, top_k=5,
  ), "bfloat16"),
  "group_1": (Case(
    q_len=300, kv_len=900, num_heads=3, num_kv_heads=3, head_dim=128,
    block_size=128, top_k=1,
  ), "float16"),
}  # fmt: skip


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
class TestGpuLse(LseContract):
  phases = ("sparse",)
  dtypes = ("float16",)
  sparse = dataclasses.replace(
    ATTENTION["block_64"], case=HOPPER_CASES["ragged_batch"][0]
  )

  def attend(self, case, *args):
    return compiled(case, None)(*args)


class TestGpuLsePaperHeads(TestGpuLse):
  dtypes = ("bfloat16",)
  sparse = dataclasses.replace(
    ATTENTION["block_64"], case=HOPPER_CASES["paper_heads"][0]
  )


@pytest.mark.gpu
@pytest.mark.parametrize("config", [None, WALK], ids=["default", "walk"])
@pytest.mark.parametrize("name", GPU_CASES)
def test_gpu_patterns(hopper, name, config):
  case, dtype = GPU_CASES[name]
  q, k, v, *_ = case.inputs(dtype=dtype)
  for blocks in patterns(case).values():
    run_twice(case, q, k, v, blocks, config)


@pytest.mark.gpu
@pytest.mark.parametrize(
  "config",
  # The others are those of test_gpu_patterns.
  [x for x in FORWARD_CONFIGS if x not in (fwd.Config(), WALK)],
  ids=str,
)
@pytest.mark.parametrize("name", ["paper_heads", "d256"])
def test_gpu_configs(hopper, name, config):
  case, dtype = GPU_CASES[name]
  q, k, v, *_ = case.inputs(dtype=dtype)
  for pattern in ("random", "sharing"):
    run_twice(case, q, k, v, patterns(case)[pattern], config)


@pytest.mark.gpu
@pytest.mark.parametrize("config", [PAIRS, WALK], ids=["pairs", "walk"])
@pytest.mark.parametrize("name", ["ragged_batch", "d256_group_16_block_64"])
def test_gpu_small_chunks_and_tasks(hopper, name, config):
  case, dtype = GPU_CASES[name]
  config = dataclasses.replace(config, chunk=64, span=32, task=16, num_ctas=7)
  q, k, v, *_ = case.inputs(dtype=dtype)
  run_twice(case, q, k, v, random_blocks(case), config)


@pytest.mark.gpu
@pytest.mark.parametrize("config", [PAIRS, WALK], ids=["pairs", "walk"])
def test_gpu_keeps_nan_where_it_is_seen(hopper, config):
  case = Case(
    q_len=200, kv_len=1024, num_heads=32, num_kv_heads=2, head_dim=128,
    block_size=128, top_k=3,
  )  # fmt: skip
  q, k, v, *_ = case.inputs(dtype=jnp.bfloat16)
  blocks = np.array(random_blocks(case))
  blocks[blocks == 4] = -1  # block 4 is chosen by none
  blocks = jnp.asarray(blocks)
  k = k.at[0, 512:640].set(jnp.nan).at[0, 130, 1].set(jnp.inf)
  v = v.at[0, 512:640].set(jnp.nan).at[0, 300, 0, 5].set(jnp.nan)
  v = v.at[0, 900, 1].set(-jnp.inf)  # inside the queries' own blocks
  q = q.at[0, 77, 3].set(jnp.nan).at[0, 90, 20, 5].set(-jnp.inf)
  run_twice(case, q, k, v, blocks, config)
  poisoned = np.isnan(np.asarray(call(case, q, k, v, blocks, config)[0]))
  assert 0 < poisoned.mean() < 1


@pytest.mark.gpu
def test_gpu_under_vmap(hopper):
  case, dtype = GPU_CASES["group_4"]
  q, k, v, *_ = case.inputs(dtype=dtype)
  blocks = random_blocks(case)
  two = [jnp.stack([x, x[:, ::-1]]) for x in (q, k, v)]
  out, lse = jax.jit(jax.vmap(functools.partial(call, case), (0, 0, 0, None)))(
    *two, blocks
  )
  for i in range(2):
    check_attention(case, *(x[i] for x in two), blocks, out[i], lse[i])


@pytest.mark.gpu
def test_gpu_operations_choose_the_kernels(hopper):
  case, dtype = GPU_CASES["paper_heads"]
  case = dataclasses.replace(case, index_dim=128)
  args = case.inputs(dtype=dtype)
  options = dict(block_size=case.block_size, top_k=case.top_k)
  attend = functools.partial(msa_jax.msa_attention, **options)
  named, chosen, xla = (
    jax.jit(functools.partial(attend, implementation=name))(*args)
    for name in ("mosaic_gpu", None, "xla")
  )
  jax.tree.map(np.testing.assert_array_equal, named, chosen)
  q, k, v, *_ = args
  check_attention(case, q, k, v, named.block_indices, named.out, named.lse)
  agree = np.mean(named.block_indices == xla.block_indices)
  assert agree > 0.999  # equal but for ties of float32 sums
  # float32 is legal, but no kernel takes it: only None moves on.
  wide = case.inputs(dtype=jnp.float32)
  attend(*wide)
  with pytest.raises(NotImplementedError, match="bfloat16, float16"):
    attend(*wide, implementation="mosaic_gpu")


@pytest.mark.gpu
def test_gpu_beside_a_default_cpu(hopper):
  cpu = jax.devices("cpu")[0]
  select = jax.jit(
    functools.partial(
      msa_jax.select_blocks, block_size=64, top_k=2, implementation=None
    )
  )
  with jax.default_device(cpu):
    case = dataclasses.replace(SMALL, kv_len=300, index_dim=64)
    *_, index_q, index_k = case.inputs(dtype=jnp.bfloat16)
    ids = select(index_q, index_k)
    assert ids.devices() == {cpu}
    with pytest.raises(NotImplementedError, match="run on the platform 'cpu'"):
      msa_jax.select_blocks(index_q, index_k, implementation="mosaic_gpu")
  mesh = jax.make_mesh(
    (1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
  )
  spread = jax.NamedSharding(mesh, jax.P())
  index = jax.device_put((index_q, index_k), spread)
  with jax.default_device(cpu), jax.set_mesh(mesh):
    again = select(*index)
    assert "mosaic_gpu" in select.lower(*index).as_text()
  np.testing.assert_array_equal(ids, again)
