"""Context parallelism: one sequence over many devices."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import op_contract
import pytest
from flax import nnx
from helpers import Case, run_on_devices
from test_kernels_packed import interpret_kernels

import msa_jax
from msa_jax import context, mosaic_gpu, reference, xla

OPTIONS = dict(block_size=8, top_k=2)
T = 40
# An early and a late piece of the queries, neither of them whole blocks.
PIECES = ((3, 10), (24, 15))
SLOTS = np.concatenate([np.arange(s, s + n) for s, n in PIECES])


def operands(dtype=jnp.float32):
  return Case(batch=2, q_len=T, kv_len=T, block_size=8).inputs(dtype=dtype)


def documents():
  ids = np.zeros((2, T), np.int32)
  ids[0, 2:9], ids[0, 9:33], ids[0, 35:] = 1, 2, 3
  ids[1] = 4
  return jnp.asarray(ids)


def with_gradients(args, slots=None, **options):
  """What the queries at `slots` get, and the gradients of all operands.

  With query_pieces among the options, only these queries are in the call;
  without, all are, and the others have no part in the loss.
  """

  def loss(q, k, v, index_q, index_k):
    if slots is not None and "query_pieces" in options:
      q, index_q = q[:, slots], index_q[:, slots]
    out = msa_jax.msa_attention(
      q, k, v, index_q, index_k, with_kl=True, **OPTIONS, **options
    )
    o, lse, blocks = out.out, out.lse, out.block_indices
    if slots is not None and "query_pieces" not in options:
      o, lse, blocks = o[:, slots], lse[:, :, slots], blocks[:, :, slots]
    finite = jnp.where(lse == -jnp.inf, 0, lse)
    total = jnp.sum(jnp.sin(o)) + jnp.sum(jnp.cos(finite)) + 10 * out.kl
    return total, (o, lse, blocks, out.kl)

  return jax.jit(jax.value_and_grad(loss, range(5), has_aux=True))(*args)


def close(got, want, tolerance=1e-5):
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
  ("phase", "packed", "implementation"),
  [
    ("sparse", True, "xla"),
    ("warmup", False, "xla"),
    *(
      pytest.param(*case, marks=pytest.mark.slow)
      for case in (
        ("sparse", True, "reference"),
        ("sparse", False, "xla"),
        ("sparse", False, "reference"),
        ("warmup", False, "reference"),
        ("warmup", True, "xla"),
        ("warmup", True, "reference"),
      )
    ),
  ],
)
def test_pieces_get_what_the_whole_row_gets(implementation, phase, packed):
  """Values, choices, KL and every gradient; traced starts, one for each row."""
  args = operands()
  options = dict(phase=phase, implementation=implementation)
  mask = jnp.zeros((2, T), bool).at[:, SLOTS].set(True).at[1, 5].set(False)
  if packed:
    options["segment_ids"] = documents()
    mask = jnp.where(mask, 0.5 + jnp.arange(T) % 3, 0.0)
  want = with_gradients(args, SLOTS, query_mask=mask, **options)

  @jax.jit
  def pieces(starts, *args):
    pieces = tuple(zip(starts, (n for _, n in PIECES)))
    return with_gradients(
      args, SLOTS, query_pieces=pieces, query_mask=mask[:, SLOTS], **options
    )

  close(pieces((jnp.full((2,), 3), jnp.int32(24)), *args), want)


def test_recalls_of_pieces():
  q, k, _, index_q, index_k = operands()
  recall = functools.partial(msa_jax.selection_recall, block_size=8)
  for options in ({}, dict(segment_ids=documents())):
    pieces = options | dict(query_pieces=PIECES)
    blocks = msa_jax.select_blocks(
      index_q[:, SLOTS], index_k, **OPTIONS, **pieces
    )
    got = recall(q[:, SLOTS], k, blocks, **pieces)
    # The same queries among the whole row; the others read nothing.
    parts = []
    for start, n in PIECES:
      at = slice(start, start + n)
      part = options | dict(query_pieces=((jnp.int32(start), n),))
      chosen = msa_jax.select_blocks(index_q[:, at], index_k, **OPTIONS, **part)
      ids = options.get("segment_ids")
      count = 2 * n if ids is None else int((ids[:, at] != 0).sum())
      parts.append((recall(q[:, at], k, chosen, **part), count))
    total = sum(count for _, count in parts)
    want = sum(np.array(x) * count for x, count in parts) / total
    np.testing.assert_allclose(np.array(got), want, rtol=1e-6)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_a_piece_beyond_the_keys_sees_nothing(implementation):
  q, k, v, index_q, index_k = operands()

  @jax.jit
  def run(start):
    return msa_jax.msa_attention(
      q[:, :5], k, v, index_q[:, :5], index_k, **OPTIONS,
      query_pieces=((start, 5),), implementation=implementation,
    )  # fmt: skip

  assert (np.asarray(run(T - 5).lse) > -np.inf).all()
  for start, blind in ((T - 4, 5), (-2, 2)):
    out = run(start)
    assert (np.asarray(out.lse[..., :blind]) == -np.inf).all()
    assert (np.asarray(out.out[:, :blind]) == 0).all()
    assert (np.asarray(out.block_indices[:, :, :blind]) == -1).all()


def test_kernels_get_a_call_for_each_piece(monkeypatch):
  """`mosaic_gpu`'s division into calls, with xla in the kernels' place."""
  from pallas_kernels import (
    index_kl,
    masked_attention,
    select_blocks,
    sparse_attention,
  )

  calls = []

  def instead(module, name):
    def call(*args, **options):
      calls.append((name, options["kv_lengths"]))
      options.pop("num_warpgroups", None)
      return getattr(xla, name)(*args, **options)

    monkeypatch.setattr(module, name, call)

  instead(select_blocks, "select_blocks")
  instead(sparse_attention, "sparse_attention")
  instead(index_kl, "index_kl_loss")
  monkeypatch.setattr(mosaic_gpu, "refusal", lambda: None)
  args = operands()
  mask = jnp.ones((2, len(SLOTS)), bool).at[1, 3].set(False)
  options = dict(query_pieces=PIECES, query_mask=mask)
  want = with_gradients(args, SLOTS, implementation="xla", **options)
  got = with_gradients(args, SLOTS, implementation="mosaic_gpu", **options)
  close(got, want)
  assert [name for name, _ in calls] == [
    *("select_blocks",) * 2, *("sparse_attention",) * 2,
    *("index_kl_loss",) * 2,
  ]  # fmt: skip
  calls.clear()

  def masked(q, k, v, *, until, **options):
    assert until is None
    calls.append(("masked_attention", options["kv_lengths"]))
    return xla.warmup_attention(q, k, v, **options)

  monkeypatch.setattr(masked_attention, "attention", masked)
  got, want = (
    msa_jax.ops.dense_attention(
      args[0][:, SLOTS],
      *args[1:3],
      query_pieces=PIECES,
      implementation=implementation,
    )
    for implementation in ("mosaic_gpu", "xla")
  )
  close(got, want)
  assert [name for name, _ in calls] == ["masked_attention"] * 2


def test_zigzag_balances_a_plain_row_alone():
  assert context.imbalance(np.arange(64), 8) == 1
  # The last document of four is long, and device 0 has most of it.
  rows = np.concatenate([np.arange(n) for n in (8, 8, 16, 32)])
  owner = np.zeros(64, int)
  for device, (early, late) in enumerate(((0, 7), (1, 6), (2, 5), (3, 4))):
    for piece in (early, late):
      owner[8 * piece : 8 * piece + 8] = device
  work = np.bincount(owner, weights=rows + 1)
  assert context.imbalance(rows, 4) == work.max() / work.mean() > 1.2


# --- layers and models under a mesh -------------------------------------------

LAYERS = """
import functools, sys
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from jax.sharding import AxisType
import msa_jax
from msa_jax import context, Sharding
from test_context import close

jax.config.update("jax_disable_most_optimizations", True)
n, T = jax.device_count(), 48
x = jax.random.normal(jax.random.key(0), (2, T, 16))
mask = jax.random.bernoulli(jax.random.key(1), 0.6, (2, T))
ids = np.zeros((2, T), np.int32)
ids[0, 2:9], ids[0, 9:33], ids[0, 35:] = 1, 2, 3
ids[1] = 4
PACKED = dict(segment_ids=jnp.asarray(ids))
# Trees, with weights of the queries.
nodes = [(1, 12), (12, 27), (27, 30), (31, 46)]
tree = msa_jax.tree_segments(
  [nodes, [(0, T)]], [[-1, 0, 1, 0], [-1]], length=T)
TREES = dict(segments=jax.tree.map(jnp.asarray, tree))
weights = jnp.where(mask, 0.5 + jnp.arange(T) % 3, 0.0)
index = msa_jax.IndexConfig(index_dim=8, block_size=8, top_k=2)


@functools.partial(nnx.jit, static_argnames=("phase", "zigzag"))
def run(layer, x, phase, zigzag=False, **options):
  def loss(layer, x):
    kl = 0.0
    if phase == "dense":
      everything = out = layer(x, zigzag=zigzag, **options)
    else:
      everything = layer(
        x, phase=phase, with_kl=True, with_selection=True, zigzag=zigzag,
        query_mask=weights if "segments" in options else mask, **options)
      out, kl = everything.out, everything.kl
    return jnp.sum(jnp.sin(x + out)) + 10 * kl, everything
  return nnx.value_and_grad(loss, argnums=(0, 1), has_aux=True)(layer, x)


def make(kind, sharding, heads, kv_heads, **options):
  if kind == "MSAttention":
    options["index"] = index
  return getattr(msa_jax, kind)(
    heads, 16, 8 * heads, 16, kv_heads, sharding=sharding, rngs=nnx.Rngs(0),
    **options)


# Two devices and 2 KV heads: one each; 3: no share; 1: a share of both.
LAYERS = [
  ("MSAttention", "sparse", 4, 2, {}, TREES),
  ("MSAttention", "warmup", 4, 2, {}, TREES),
  ("GQAttention", "dense", 4, 1, dict(sinks=True), {}),
  ("MSAttention", "warmup", 4, 1, dict(sinks=True), PACKED),
  ("MSAttention", "warmup", 6, 3, {}, {}),
  ("MSAttention", "sparse", 6, 3, dict(sinks=True), {}),
  ("GQAttention", "dense", 4, 2, {}, {}),
  ("GQAttention", "dense", 6, 3, {}, PACKED),
]
MESHES = {
  2: [(AxisType.Auto, dict(context=2), LAYERS[:3])],
  4: [(AxisType.Explicit, dict(data=2, context=2), LAYERS)],
  8: [(AxisType.Auto, dict(context=8), [
         ("MSAttention", "sparse", 4, 2, {}, PACKED),
         ("MSAttention", "warmup", 16, 8, {}, {}),
         ("GQAttention", "dense", 8, 2, {}, {})]),
      (AxisType.Explicit, dict(data=2, context=2, tensor=2), [
         ("MSAttention", "sparse", 4, 2, {}, PACKED),
         ("MSAttention", "warmup", 8, 4, dict(sinks=True), PACKED),
         ("GQAttention", "dense", 8, 4, {}, {})])],
}
if n == 4:
  context.PART_BYTES = 0  # keys come one KV head at a time
for axis_type, sizes, layers in MESHES[n]:
  mesh = jax.make_mesh(
    (*sizes.values(),), (*sizes,), axis_types=(axis_type,) * len(sizes))
  for kind, phase, heads, kv_heads, extra, options in layers:
    want = run(make(kind, None, heads, kv_heads, **extra), x, phase, **options)
    with jax.set_mesh(mesh):
      spec = jax.P("data" if "data" in sizes else None, "context")
      layer = make(kind, Sharding(), heads, kv_heads, **extra)
      got = run(layer, jax.device_put(x, spec), phase, **options)
      close(got, want)
      out = got[0][1] if phase == "dense" else got[0][1].out
      if axis_type == AxisType.Explicit:
        assert jax.typeof(out).sharding.spec == jax.P(*spec, None)

# An operation of one's own inside of jax.shard_map, with check_vma=True.
KEYS = jax.random.split(jax.random.key(2), 5)
SHAPES = ((4, 8), (2, 8), (2, 8), (2, 8), (8,))
args = [jax.random.normal(key, (2, T, *a)) for key, a in zip(KEYS, SHAPES)]
attention = functools.partial(
  msa_jax.msa_attention, block_size=8, top_k=2, with_kl=True,
  implementation="xla")


def attend(q, k, v, index_q, index_k):
  k, v, index_k = (
    context.gather_keys(x, "context") for x in (k, v, index_k))
  out = attention(q, k, v, index_q, index_k, query_pieces=context.query_pieces(
    "context", q.shape[1]))
  return out.out, jax.lax.pmean(out.kl, "context")


def gradients(function, *args):
  def loss(*args):
    out, kl = function(*args)[:2]
    return jnp.sum(jnp.sin(out)) + 10 * kl
  return jax.jit(jax.value_and_grad(loss, range(5)))(*args)


if n == 4:
  value, want = gradients(attention, *args)
  order = context.zigzag_order(T, n)
  for axis_type in (AxisType.Auto, AxisType.Explicit):
    mesh = jax.make_mesh((n,), ("context",), axis_types=(axis_type,))
    tokens = jax.P(None, "context")
    mapped = jax.shard_map(
      attend, mesh=mesh, in_specs=tokens, out_specs=(tokens, jax.P()))
    place = jax.NamedSharding(mesh, tokens)
    got = gradients(mapped, *(jax.device_put(x[:, order], place) for x in args))
    close(got, (value, [x[:, order] for x in want]))

# Tokens that stand in zigzag order already.
if n == 2:
  order = context.zigzag_order(T, n)
  mesh = jax.make_mesh((2,), ("context",), axis_types=(AxisType.Auto,))
  want = make("GQAttention", None, 4, 2)(x)
  with jax.set_mesh(mesh):
    layer = make("GQAttention", Sharding(), 4, 2)
    held = jax.device_put(x[:, order], jax.P(None, "context"))
    got = layer(held, zigzag=True)
  close(got, want[:, order])
"""


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 4, 8])
def test_layers_give_the_numbers_of_one_device(devices):
  """Outputs, KL, choices, recalls and all gradients, in both phases."""
  run_on_devices(devices, LAYERS)


MODEL = """
import dataclasses, re
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from jax.sharding import AxisType
import msa_jax
from msa_jax import DecoderLM, Sharding
from test_context import close

jax.config.update("jax_disable_most_optimizations", True)
n = jax.device_count()
index = msa_jax.IndexConfig(index_dim=8, block_size=8, top_k=2)
config = msa_jax.ModelConfig(
  vocab_size=64, num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2,
  head_dim=8, mlp_dim=48, layer_kinds=("gqa", "msa"),
  mlp_kinds=("dense", "moe"), index=index,
  moe=msa_jax.MoEConfig(num_experts=4, top_k=2, expert_dim=16))
tokens = jax.random.randint(jax.random.key(0), (2, 48), 0, 64)
mask = jax.random.bernoulli(jax.random.key(1), 0.6, (2, 48))


def train(model, tokens, mask, sharding):
  def loss(model):
    out = model(
      tokens, with_kl=True, query_mask=mask, with_selection=True, zigzag=zigzag)
    lm = msa_jax.head_loss(
      out.hidden, model.head_weight(), tokens, mask.astype(jnp.float32), 16,
      sharding=sharding)
    return lm + out.kl.sum(), out
  return nnx.value_and_grad(loss, has_aux=True)(model)


def run(sharding, *arrays):
  model = DecoderLM(config, rngs=nnx.Rngs(0), sharding=sharding)
  graphdef, state = nnx.split(model)
  compiled = jax.jit(
    lambda state, *arrays: train(nnx.merge(graphdef, state), *arrays, sharding)
  ).lower(state, *arrays).compile()
  return compiled(state, *arrays), compiled.as_text()


# On 2 and 4 devices tokens arrive in zigzag order, on 8 in that of the rows.
zigzag = n != 8
want, _ = run(None, tokens, mask)
if zigzag:
  order = msa_jax.context.zigzag_order(48, 2)
  ((loss, out), grads), tokens, mask = want, tokens[:, order], mask[:, order]
  selection = out.selection._replace(
    block_indices=out.selection.block_indices[..., order, :])
  want = ((loss, out._replace(
    logits=out.logits[:, order], hidden=out.hidden[:, order],
    selection=selection, experts=out.experts[:, :, order])), grads)
sizes = dict(context=2) if n == 2 else dict(fsdp=2, context=2, expert=n // 4)
axis_type = AxisType.Explicit if n == 4 else AxisType.Auto
mesh = jax.make_mesh(
  (*sizes.values(),), (*sizes,), axis_types=(axis_type,) * len(sizes))
with jax.set_mesh(mesh):
  arrays = jax.device_put((tokens, mask), jax.P(None, "context"))
  got, text = run(Sharding(), *arrays)
  close(got, want)
  if n == 2:
    # Nothing but keys is gathered, and no activations: index_k, and k and v
    # together, which the backward pass gathers again. Dense attention exchanges
    # heads; nothing moves tokens besides.
    assert "collective-permute" not in text
    shapes = re.findall(r"= \\w+\\[([0-9,]*)\\]\\S* all-gather", text)
    assert sorted(shapes) == ["2,48,32", "2,48,32", "2,48,8"], shapes
    # No gradient of all tokens' index keys waits for the backward pass.
    model = DecoderLM(config, rngs=nnx.Rngs(0), sharding=Sharding())
    graphdef, state = nnx.split(model)
    kept = jax.eval_shape(lambda state: jax.vjp(
      lambda state: nnx.merge(graphdef, state)(
        arrays[0], with_kl=True, zigzag=True).kl, state)[1], state)
    kept = [x.shape for x in jax.tree.leaves(kept)]
    assert (n * 2, 24, 8) in kept and (n * 2, 48, 8) not in kept, kept
  hidden = got[0][1].hidden
  assert hidden.sharding.shard_shape(hidden.shape)[1] == 24, hidden.sharding
"""


# A run over eight devices, in test_train, has the losses of one and gathers
# keys alone, too.
@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 4, 8])
def test_model_gives_the_numbers_of_one_device(devices):
  """Loss, KL, choices, experts and gradients of a model of both attentions."""
  run_on_devices(devices, MODEL)


PARTS = """
import functools
import jax, jax.numpy as jnp
from jax.sharding import AxisType
from benchmarks.context_parallel import sent_bytes
from msa_jax import attention
from test_context import close

n, T, K, D = jax.device_count(), 2048, 8, 8
mesh = jax.make_mesh((n,), ("context",), axis_types=(AxisType.Auto,))
keys = jax.random.split(jax.random.key(0), 5)
args = [jax.random.normal(key, (1, T, *shape)) / 16
        for key, shape in zip(keys, ((K, D), (K, D), (K, D), (K, D), (D,)))]


def attend(q, k, v, index_q, index_k, *rest, query_pieces):
  # It reads all keys and needs next to no memory of its own.
  every = jnp.einsum("bskd,bskd->bkd", k, v) + jnp.sum(index_k, 1)[:, None]
  return (q + index_q) * every[:, None], None, jnp.sum(every), None


def layer(heads, *args):
  out, _, kl, _ = attention._attend_in_parts(
    attend, "context", heads, *args, *(None,) * 5, query_pieces=None)
  return jnp.sum(jnp.sin(out)) + kl * (K // heads)  # kl: the mean of parts


def program(heads):
  loss = lambda *args: jax.lax.psum(layer(heads, *args), "context")
  mapped = jax.shard_map(
    jax.value_and_grad(loss, range(5)), mesh=mesh, check_vma=False,
    in_specs=jax.P(None, "context"),
    out_specs=(jax.P(), (jax.P(None, "context"),) * 5))
  placed = jax.device_put(args, jax.NamedSharding(mesh, jax.P(None, "context")))
  compiled = jax.jit(mapped).lower(*placed).compile()
  return compiled, compiled(*placed)


once, want = program(K)
parts, got = program(1)
close(got, want)
for each in (once, parts):
  # Other devices' keys, k and v twice, and the float32 gradients of all.
  sent, others = sent_bytes(each.as_text(), n), T * (n - 1) // n
  assert sent["all-gather"] == (4 * K * D + D) * 4 * others, sent
  assert sent["reduce-scatter"] == (2 * K * D + D) * 4 * others, sent
bytes_once, bytes_in_parts = (
  each.memory_analysis().temp_size_in_bytes for each in (once, parts))
assert bytes_once > 2 * 2 * K * D * 4 * T
assert bytes_in_parts < 0.5 * bytes_once, (bytes_in_parts, bytes_once)
"""


def test_keys_are_gathered_in_parts_of_few_heads():
  """The same numbers and bytes sent, in less memory."""
  run_on_devices(8, PARTS)


# --- a cache that is split ---------------------------------------------------

CACHE = """
import dataclasses, sys
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from jax.sharding import AxisType
import msa_jax
from msa_jax import DecoderLM, Sharding, generate
from test_context import close

jax.config.update("jax_disable_most_optimizations", True)
n = jax.device_count()
index = msa_jax.IndexConfig(index_dim=8, block_size=8, top_k=2)
config = msa_jax.ModelConfig(
  vocab_size=64, num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2,
  head_dim=8, mlp_dim=48, layer_kinds=("gqa", "msa"), index=index)
# 4 blocks on each device. The first chunk is shared by the devices, the second
# is not, since 2 n does not divide it; then come decoding steps.
CAPACITY = 32 * n
tokens = jax.random.randint(jax.random.key(0), (2, 56), 0, 64)
STEPS = [(32, (32, 21)), (18, (18, 18)), (1, (1, 1)), (1, (0, 1))]
names = sys.argv[1:]
if "gathered" in names:
  STEPS.insert(2, (3, (3, 2)))


def run(config, sharding, index_dtype=None):
  model = DecoderLM(config, rngs=nnx.Rngs(0), sharding=sharding)
  extend = nnx.jit(lambda model, tokens, cache, counts: model.extend(
    tokens, cache, counts=counts, with_selection=True))
  cache = model.init_cache(2, CAPACITY, index_dtype=index_dtype)
  found, first = [], 0
  for count, counts in STEPS:
    out = extend(model, tokens[:, first:first + count], cache,
                 jnp.asarray(counts))
    real = np.arange(count) >= count - np.asarray(counts)[:, None]
    found.append((np.where(real[..., None], out.logits, 0),
                  np.where(real[:, None, :, None], out.block_indices, -1)))
    cache, first = out.cache, first + count
  return found, cache.lengths


fp8 = jnp.float8_e4m3fn
CASES = {  # what takes each way through a layer
  "own blocks": (dict(), None),
  "gathered": (dict(implementation="reference"), fp8),
  "fp8": (dict(), fp8),
}
sizes = dict(context=2) if n == 2 else dict(data=2, context=2)
axis_type = AxisType.Auto if n == 2 else AxisType.Explicit
mesh = jax.make_mesh(
  (*sizes.values(),), (*sizes,), axis_types=(axis_type,) * len(sizes))
for name in names:
  changes, index_dtype = CASES[name]
  changed = dataclasses.replace(config, **changes)
  want = run(changed, None, index_dtype)
  with jax.set_mesh(mesh):
    close(run(changed, Sharding(), index_dtype), want)

with jax.set_mesh(mesh):
  model = DecoderLM(config, rngs=nnx.Rngs(0), sharding=Sharding())
  cache = model.init_cache(2, CAPACITY)
  held = cache.layers[1].index_k
  assert held.sharding.shard_shape(held.shape)[1] == CAPACITY // 2
  try:
    model.init_cache(2, 40)
  except ValueError as error:
    assert "capacity must be a multiple of 16" in str(error), error
if "gathered" in names:
  prompts = [[1, 2, 3], [4] * 40]
  make = lambda model: generate.generate(
    model, prompts, max_new_tokens=6, steps=3)
  want = make(DecoderLM(config, rngs=nnx.Rngs(0)))
  with jax.set_mesh(mesh):
    got = make(model)
  for a, b in zip(got, want):
    np.testing.assert_array_equal(a, b)
"""


def test_cache_over_two_devices():
  """Prefill and decoding steps give logits and choices of one device."""
  run_on_devices(2, CACHE, "own blocks")


@pytest.mark.slow
def test_cache_over_two_of_four_devices():
  """Also with e4m3 index keys, a gathered cache, and generation."""
  run_on_devices(4, CACHE, "own blocks", "gathered", "fp8")


# --- kernels under a mesh -----------------------------------------------------

KERNELS = """
import jax
from benchmarks import context_parallel as benchmark
from benchmarks.cases import Case

mesh = benchmark.mesh_of(2)
case = Case(tokens=512, num_heads=8, num_kv_heads=2, head_dim=64, index_dim=64,
            block_size=64, top_k=2)
of = [jax.ShapeDtypeStruct(x.shape, x.dtype)
      for x in benchmark.operands(case, mesh, "random")]
# Both pieces call the same kernels, but for the choice of blocks. Of few blocks
# all are shared: no kernel computes pairs or merges them.
for op, kernels in (
    ("context_prefill", 3), ("context_train", 9), ("context_decode", 3)):
  run = benchmark.program(case, mesh, op, "mosaic_gpu")
  text = jax.jit(run).trace(*of).lower(lowering_platforms=("cuda",)).as_text()
  assert text.count("@mosaic_gpu") == kernels, (op, text.count("@mosaic_gpu"))
  assert "CustomSPMDPartitioning" not in text
"""


@pytest.mark.slow
def test_kernels_lower_under_a_mesh():
  run_on_devices(2, KERNELS)


def test_decoding_kernels_get_a_layers_own_slots(pretend_hopper):
  """A step sends candidates and partial results, and no keys."""
  mesh = jax.sharding.AbstractMesh(
    (2,), ("context",), axis_types=(jax.sharding.AxisType.Auto,)
  )
  B, C, K, G, D, P = 2, 1024, 2, 4, 64, 4

  def of(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)

  def step(state, x, cache, span):
    return nnx.merge(graphdef, state).extend(x, cache, span)

  with jax.sharding.use_abstract_mesh(mesh):
    layer = nnx.eval_shape(
      lambda: msa_jax.MSAttention(
        K * G, 32, K * G * D, 32, K, dtype=jnp.bfloat16, rngs=nnx.Rngs(0),
        index=msa_jax.IndexConfig(index_dim=64, block_size=64, top_k=P),
        implementation="mosaic_gpu", sharding=msa_jax.Sharding(),
      )
    )  # fmt: skip
    graphdef, state = nnx.split(layer)
    kv, index_k = of(B, C, K, D), of(B, C, 64)
    cache = msa_jax.cache.LayerCache(kv, kv, index_k)
    span = msa_jax.cache.Span(of(B, 1, dtype=jnp.int32), of(B, dtype=jnp.int32))
    text = str(jax.make_jaxpr(step)(state, of(B, 1, 32), cache, span))
  sent = re.findall(r":(\w+\[[0-9,]*\])[^:]* = all_gather\[", text)
  assert sent == [
    f"i32[2,{B},{K},{P - 1},2]", f"f32[2,{B * K},{G},{D + 2}]"
  ], sent  # fmt: skip
  for name in ("scan", "choose", "attend"):
    assert f"decode_{name}" in text


# Every kernel of the phase: several blocks, the last of them short, and pairs
# as well as shared blocks.
INTERPRETED = Case(
  q_len=160, kv_len=160, num_heads=2, num_kv_heads=1, head_dim=64, index_dim=64,
  block_size=64, top_k=2,
)  # fmt: skip


def interpreted_operands(case):
  """Whole rows of q, k, v, index_q, index_k, dout, dlse and query_mask."""
  inputs = case.inputs(dtype=jnp.bfloat16)
  dout = jax.random.normal(jax.random.key(9), inputs[0].shape, jnp.bfloat16)
  dlse = jax.random.normal(
    jax.random.key(10), (case.batch, case.num_heads, case.q_len)
  )
  mask = (jnp.arange(case.q_len) % 7 != 3)[None]
  return *inputs, dout, dlse, mask


def attend_from_pieces(
  case, phase, pieces, q, k, v, index_q, index_k, dout, dlse, mask, dkl
):
  """What the kernels give the queries of the pieces, and all gradients.

  Queries, cotangents and mask are those of the pieces; dkl is the KL's.
  """

  def attend(q, k, v, index_q, index_k):
    out = msa_jax.msa_attention(
      q, k, v, index_q, index_k, block_size=case.block_size, top_k=case.top_k,
      phase=phase, with_kl=True, query_mask=mask, query_pieces=pieces,
      implementation="mosaic_gpu",
    )  # fmt: skip
    return (out.out, out.lse, out.kl), out.block_indices

  args = q, k, v, index_q, index_k
  results, pull, blocks = jax.vjp(attend, *args, has_aux=True)
  return results, blocks, pull((dout, dlse, dkl))


def check_pieces(case, phase, slots, operands, got):
  """Results of the queries at `slots` against the reference of whole rows, in
  which the other queries choose no block and so see nothing.

  The gradients of keys are those of these queries.
  """
  q, k, v, index_q, index_k, dout, dlse, mask = operands
  (out, lse, kl), blocks, (dq, dk, dv, d_index_q, d_index_k) = got

  def whole(x, axis, fill=0):
    shape = list(x.shape)
    shape[axis] = case.q_len
    at = (slice(None),) * axis + (slots,)
    return jnp.full(shape, fill, x.dtype).at[at].set(x)

  want = reference.select_blocks(
    index_q, index_k, score_precision="exact", **case.select_options()
  )
  np.testing.assert_array_equal(blocks, want[:, :, slots])
  if phase == "warmup":
    shape = (*want.shape[:2], len(slots), case.num_blocks)
    blocks = jnp.broadcast_to(jnp.arange(case.num_blocks), shape)
  blocks = whole(blocks, 2, -1)
  counted = mask & whole(jnp.ones((1, len(slots)), bool), 1)
  op_contract.check_attention(
    case, q, k, v, blocks, whole(out, 1), whole(lse, 2, -jnp.inf)
  )
  op_contract.check_attention_gradients(
    case, q, k, v, dout, blocks, (whole(dq, 1), dk, dv), dlse
  )
  op_contract.check_kl(
    case, q, k, index_q, index_k, blocks,
    (kl, [whole(d_index_q, 1), d_index_k]), counted,
  )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["sparse", "warmup"])
def test_interpreted_kernels_take_pieces(monkeypatch, pretend_hopper, phase):
  """Values and gradients of an early and a late piece with traced starts, which
  are no whole blocks and do not reach the last key."""
  case, pieces = INTERPRETED, ((5, 30), (110, 30))
  if phase == "warmup":  # tiles of keys that one piece sees and one does not
    case, pieces = dataclasses.replace(case, q_len=300, kv_len=300), (
      (5, 30), (250, 30),
    )  # fmt: skip
  interpret_kernels(monkeypatch, phase)
  slots = np.concatenate([np.arange(s, s + n) for s, n in pieces])
  operands = interpreted_operands(case)

  @jax.jit
  def run(starts, q, k, v, index_q, index_k, dout, dlse, mask):
    return attend_from_pieces(
      case, phase, [(start, n) for start, (_, n) in zip(starts, pieces)],
      q[:, slots], k, v, index_q[:, slots], index_k, dout[:, slots],
      dlse[:, :, slots], mask[:, slots], jnp.float32(1),
    )  # fmt: skip

  got = run(jnp.int32([start for start, _ in pieces]), *operands)
  check_pieces(case, phase, slots, operands, got)


INTERPRETED_MESH = """
import sys, threading
import jax, jax.numpy as jnp, numpy as np, pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, jaxpr_interpret
from jax.sharding import AxisType
from msa_jax import context
from pallas_kernels import mosaic
from test_context import (
  INTERPRETED, attend_from_pieces, check_pieces, interpreted_operands)
from test_kernels_packed import interpret_kernels

# JAX's interpreter has one memory for all devices, and wants them to run the
# same kernels at the same time, but ours branch on what each device's queries
# chose. So a device waits for its turn to interpret a kernel, alone. Sending is
# in programs of its own: a device that waits for another would keep its turn.
turn = threading.Semaphore()
begin = gpu_callbacks._initialize_shared_memory
end = gpu_callbacks._clean_up_shared_memory


def begin_alone(**options):
  assert turn.acquire(timeout=300)
  return begin(**options)


def end_alone(token):
  token = end(token)
  turn.release()
  return token


def no_axes(info):
  for name in ("axis_sizes", "axis_indices"):
    object.__setattr__(info, name, {})


gpu_callbacks._initialize_shared_memory = begin_alone
gpu_callbacks._clean_up_shared_memory = end_alone
jaxpr_interpret.DeviceInfo.__init__ = no_axes

phase, case, n = sys.argv[1], INTERPRETED, jax.device_count()
mosaic.require_hopper = lambda: None
interpret_kernels(pytest.MonkeyPatch(), phase)
mesh = jax.make_mesh((n,), ("context",), axis_types=(AxisType.Auto,))
order = context.zigzag_order(case.q_len, n)
# What a device has of the tokens, and what it has of its own.
tokens, own = jax.P(None, "context"), jax.P("context")
heads_first = jax.P(None, None, "context")


def over_devices(function, in_specs, out_specs):
  return jax.jit(jax.shard_map(
    function, mesh=mesh, in_specs=in_specs, out_specs=out_specs,
    check_vma=False))


def attend(q, k, v, index_q, index_k, dout, dlse, mask, share):
  pieces = context.query_pieces("context", q.shape[1])
  (out, lse, kl), blocks, gradients = attend_from_pieces(
    case, phase, pieces, q, k, v, index_q, index_k, dout, dlse, mask, share[0])
  return (out, lse, kl * share), blocks, gradients


operands = interpreted_operands(case)
*operands_of_tokens, dlse, mask = operands
q, k, v, index_q, index_k, dout, mask = (
  x[:, order] for x in (*operands_of_tokens, mask))
dlse = dlse[:, :, order]
share = mask.reshape(n, -1).sum(1) / mask.sum()
gather = over_devices(
  lambda *keys: [context.gather_keys(x, "context") for x in keys],
  (tokens,) * 3, own)
k, v, index_k = gather(k, v, index_k)
results, blocks, (dq, dk, dv, d_index_q, d_index_k) = over_devices(
  attend, (tokens, own, own, tokens, own, tokens, heads_first, tokens, own),
  ((tokens, heads_first, own), heads_first, (tokens, own, own, tokens, own)),
)(q, k, v, index_q, index_k, dout, dlse, mask, share)
add_up = over_devices(
  lambda *keys: [context.sum_gradients(x, "context") for x in keys],
  (own,) * 3, tokens)
dk, dv, d_index_k = add_up(dk, dv, d_index_k)
(out, lse, kl), back = results, np.argsort(order)
dk, dv, d_index_k = (x[:, back] for x in (dk, dv, d_index_k))
got = (out, lse, kl.sum()), blocks, (dq, dk, dv, d_index_q, d_index_k)
check_pieces(
  case, phase, order, operands,
  jax.tree.map(jnp.asarray, jax.device_get(got)))
"""


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["sparse", "warmup"])
def test_interpreted_kernels_under_a_mesh(phase):
  """Two devices, each with its own two pieces, against the whole row."""
  run_on_devices(2, INTERPRETED_MESH, phase)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(64, 4), (32, 8)])
def test_two_gpus_give_the_numbers_of_one(heads, two_gpus):
  """Choices bit for bit; KL, gradients and decoding within rounding."""
  from benchmarks import cases, context_parallel

  case = cases.Case(tokens=1, num_heads=heads[0], num_kv_heads=heads[1])
  context_parallel.check(case, 2, "mosaic_gpu")


# --- errors -------------------------------------------------------------------

ERRORS = r"""
import pathlib, sys
import jax, jax.numpy as jnp, pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec as P
import msa_jax
from msa_jax import DecoderLM, Sharding
from train import config, program
from test_train import tiny_run

mesh = jax.make_mesh((2,), ("context",), axis_types=(AxisType.Auto,),
                     devices=jax.devices()[:2])
with jax.set_mesh(mesh):
  for kind in (msa_jax.MSAttention, msa_jax.GQAttention):
    layer = kind(4, 16, 32, 16, 2, sharding=Sharding(), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="x must be a number of tokens that is"
                       " a multiple of 4, two pieces for each of the 2 dev"):
      layer(jnp.ones((1, 46, 16)))
  layer = msa_jax.GQAttention(
    6, 16, 48, 16, 3, implementation="cudnn", sharding=Sharding(),
    rngs=nnx.Rngs(0))
  with pytest.raises(NotImplementedError, match="mosaic_gpu supports dtype in"):
    layer(jnp.ones((1, 48, 16)))
  model = DecoderLM(
    msa_jax.ModelConfig(vocab_size=8, num_layers=1, embed_dim=16, num_heads=2,
                        num_kv_heads=1, head_dim=8, mlp_dim=16),
    rngs=nnx.Rngs(0), sharding=Sharding())
  with pytest.raises(ValueError, match="tokens must be a number of tokens"):
    model(jnp.ones((1, 6), jnp.int32))
# A cache that was made without the mesh, and its capacity does not fit.
cache = model.init_cache(1, 7)
with jax.set_mesh(mesh):
  with pytest.raises(ValueError, match="capacity must be a multiple of 2: whole"
                     " blocks on each device that shares a sequence, got 7"):
    model.extend(jnp.ones((1, 1), jnp.int32), cache)
for kind in (AxisType.Auto, AxisType.Explicit):
  tensor = jax.make_mesh((2,), ("tensor",), axis_types=(kind,),
                         devices=jax.devices()[:2])
  with jax.set_mesh(tensor), pytest.raises(
    ValueError, match="num_kv_heads must be a multiple of mesh axis 'tensor' ="
    r" 2, which splits them \(take a smaller axis\), got 1"):
    msa_jax.MSAttention(4, 16, 32, 16, 1, sharding=Sharding(),
                        rngs=nnx.Rngs(0))
# A cache that a mesh of other devices holds.
for kind in (AxisType.Auto, AxisType.Explicit):
  small, large = (
    jax.make_mesh((n,), ("context",), axis_types=(kind,),
                  devices=jax.devices()[:n]) for n in (2, 4))
  with jax.set_mesh(large):
    cache = model.init_cache(1, 8)
  with jax.set_mesh(small), pytest.raises(
    ValueError, match="cache must be arrays on the 2 devices of the mesh in"
    " context.*jax.device_put.*, got one on 4 devices"):
    model.extend(jnp.ones((1, 1), jnp.int32), cache)
# A device's tokens of a row are two pieces.
with jax.set_mesh(mesh):
  for function in (
    msa_jax.context.gather_keys, msa_jax.context.to_zigzag,
    msa_jax.context.from_zigzag, msa_jax.context.to_heads,
    lambda x, axis: msa_jax.context.query_pieces(axis, x.shape[1])):
    with pytest.raises(ValueError, match="of all devices must be a number of"
                       " tokens that is a multiple of 4, .*, got 30"):
      jax.eval_shape(jax.shard_map(
        lambda x: function(x, "context"), in_specs=P(None, "context"),
        out_specs=P(), check_vma=False), jnp.ones((1, 30, 2, 8)))
with pytest.raises(ValueError, match="must be .* multiple of 6, two pieces"):
  msa_jax.context.zigzag_order(8, 3)
with pytest.raises(ValueError, match=r"context=0: wanted an integer"):
  config.MeshConfig(context=0)
run = config.with_fields(
  tiny_run(pathlib.Path(sys.argv[1])), ["mesh.context=2", "context=62"])
with pytest.raises(ValueError, match="context=62 tokens cannot be split over"
                   " mesh.context=2: wanted a multiple of 4"):
  program.Program(program.compile_key(run))
"""


def test_the_reference_takes_no_split_cache():
  q, k, v, index_q, index_k = operands()
  decode = functools.partial(
    msa_jax.decode_attention, kv_lengths=jnp.full((2,), 40), **OPTIONS,
    axis_name="context", implementation="reference",
  )  # fmt: skip
  with pytest.raises(NotImplementedError, match="'mosaic_gpu', 'xla' or None"):
    decode(q[:, :1], k, v, index_q[:, :1], index_k)


def test_what_cannot_be_split_is_said(tmp_path):
  run_on_devices(4, ERRORS, tmp_path)


# --- the benchmark ------------------------------------------------------------

BENCHMARK = """
import json, pathlib, sys
import jax
from benchmarks import context_parallel as benchmark
from benchmarks.cases import Case
jax.config.update("jax_disable_most_optimizations", True)
# XLA on a CPU sends bfloat16 as float32.
benchmark.CASES["64k"] = Case(
  tokens=96, num_heads=4, num_kv_heads=2, head_dim=8, index_dim=8,
  block_size=8, top_k=2, dtype="float32")
path = pathlib.Path(sys.argv[1])
assert benchmark.main(
  ["--tokens", "64k", "--implementation", "xla", "--results", str(path)]) == 0
assert benchmark.main(
  ["--tokens", "64k", "--implementation", "xla", "--results", str(path),
   "--ops", "context_train", "context_decode", "--documents", "5"]) == 0
print(json.dumps(json.loads(path.read_text())["rows"]))
"""


@pytest.mark.slow
def test_benchmark_counts_what_the_formula_says(tmp_path):
  """Two devices: checked, timed, and the bytes of the compiled program."""
  printed = run_on_devices(2, BENCHMARK, tmp_path / "found.json")
  *rows, packed = json.loads(printed.splitlines()[-1])
  rows = {row["op"]: row for row in rows}
  decode = rows.pop("context_decode")
  assert list(rows) == ["context_prefill", "context_train", "context_gather"]
  # 2 K D + I = 40 numbers of 4 bytes for each of the other device's 48 tokens.
  keys = 40 * 4 * 48
  assert rows["context_gather"]["collectives"] == {"all-gather": keys}
  assert rows["context_prefill"]["collectives"] == {"all-gather": keys}
  assert rows["context_train"]["collectives"] == {
    "all-gather": keys, "reduce-scatter": keys,
  }  # fmt: skip
  for row in rows.values():
    assert row["sent_bytes"] == row["formula_bytes"]
    assert row["devices"] == 2 and row["ms"] > 0
  assert rows["context_train"]["efficiency"] > 0
  # Candidates, partial results and their maxima and sums, but no keys.
  assert 0 < decode["sent_bytes"] < keys / 4
  assert packed["op"] == "context_train" and packed["documents"] == 5
  assert packed["sent_bytes"] == packed["formula_bytes"]
  assert packed["imbalance"] == 1.021


def test_bytes_are_counted_in_the_words_of_a_gpu_program():
  from benchmarks.context_parallel import sent_bytes

  text = """
    %a = (bf16[1,64,4]{2,1,0}, bf16[1,128,4]{2,1,0}) all-gather-start(%x)
    %b = bf16[1,128,4]{2,1,0} all-gather-done(%a)
    %c = f32[1,64,4]{2,1,0} reduce-scatter(%y), dimensions={1}
    %d = (s8[8]{0}, f8e4m3fn[16]{0}) all-to-all(%z, %w)
    %e = f32[]{} all-reduce-start(%k)
    %f = (f32[1,64], f32[1,64], u32[], u32[]) collective-permute-start(%l)
    %g = ((f32[2]{0}), f32[2]{0}) all-reduce-start(%m)
  """
  assert sent_bytes(text, 2) == {
    "all-gather": 128 * 4 * 2 // 2,
    "reduce-scatter": 64 * 4 * 4,
    "all-to-all": 12,
    "all-reduce": 4 + 8,
    "collective-permute": 64 * 4,
  }


def test_a_schedule_says_what_hides_a_collective():
  from benchmarks.context_parallel import Sent, schedule

  kernel = 'custom-call(%x), custom_call_target="mosaic_gpu_v2", metadata={{op_name="jit(f)/{}/mpmd_map"}}'  # noqa: E501
  text = f"""
%branch (x: bf16[64]) -> bf16[64] {{
  %inside = bf16[64] {kernel.format("sparse_pairs")}
}}

%other_branch (x: bf16[64]) -> bf16[64] {{
  ROOT %walk = bf16[64] {kernel.format("sparse_tiles")}
}}

ENTRY %main (p: bf16[64]) -> bf16[64] {{
  %keys = bf16[128]{{0}} all-gather(%p), dimensions={{0}}
  %start = ((bf16[64]{{0}}), bf16[128]{{0}}) all-gather-start(%q)
  %select = s32[64] {kernel.format("msa_select_exact")}
  %part = s32[64] get-tuple-element(%select), index=0
  %sort.1 = s32[64] sort(%part), dimensions={{0}}
  %done = bf16[128]{{0}} all-gather-done(%start)
  %last = ((f32[128]{{0}}), f32[64]{{0}}) reduce-scatter-start(%done)
  %both = bf16[64] conditional(%a, %b, %c), true_computation=%branch, false_computation=%other_branch
  ROOT %sum = f32[64]{{0}} reduce-scatter-done(%last)
}}
"""  # noqa: E501
  assert schedule(text, 2) == [
    Sent("all-gather", 128, None),
    Sent("all-gather", 128, {"msa_select_exact": 1, "other": 1}),
    Sent("reduce-scatter", 256, {"sparse_pairs": 1, "sparse_tiles": 1}),
  ]


@pytest.mark.gpu
def test_keys_are_on_the_way_while_blocks_are_chosen():
  """Compiled for two GPUs, which need not be here."""
  from benchmarks import context_parallel

  try:
    mesh = context_parallel.described_mesh(2)
  except RuntimeError as error:
    pytest.skip(f"needs JAX's CUDA plugin: {error}")
  # Of fewer tokens, XLA gathers all keys at once.
  case = context_parallel.CASES["64k"]
  compiled = context_parallel._Compiled(
    case, mesh, "context_train", "mosaic_gpu", 1
  )
  sent = context_parallel.schedule(compiled.text, 2)
  # The other device's keys: index_k, then k and v in one.
  others = 2 * case.tokens // 2
  index_k, keys, *gradients = sent
  assert (index_k.name, index_k.received) == ("all-gather", others * 128)
  assert (keys.name, keys.received) == ("all-gather", others * 2 * 4 * 128)
  assert keys.meanwhile is not None and keys.meanwhile["msa_select_exact"] == 2
  assert {each.name for each in gradients} == {"reduce-scatter"}
  formula = context_parallel.formula_bytes(case, 2, "context_train")
  assert sum(each.received for each in sent) == formula
