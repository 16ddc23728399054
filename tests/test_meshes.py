"""Operations, layers, models and generation under meshes of every kind.

The scripts run in processes of four CPU devices.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Case, random_blocks, run_on_devices
from jax import export

import msa_jax
from pallas_kernels import sparse_attention as sparse
from pallas_kernels import sparse_attention_bwd as bwd
from pallas_kernels import sparse_attention_fwd as fwd

# --- operations ---------------------------------------------------------------

OPERATIONS = """
import functools, re, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType
import msa_jax

b, t, h, k, d = 4, 24, 4, 2, 8
keys = jax.random.split(jax.random.key(0), 5)
shapes = ((b, t, h, d), (b, t, k, d), (b, t, k, d), (b, t, k, d), (b, t, d))
args = [jax.random.normal(key, x) for key, x in zip(keys, shapes)]
mask = jax.random.bernoulli(keys[0], 0.6, (b, t)).at[3].set(False)
specs = (jax.P("data", None, "tensor"),) * 4 + (jax.P("data"),) * 2
options = dict(block_size=8, top_k=2)
# Packed rows: documents with padding, and trees.
ids = jnp.repeat(
  jnp.array([[1, 1, 2], [3, 3, 3], [0, 0, 0], [1, 4, 0]], jnp.int32), 8, axis=1)
nodes = [(0, 8), (8, 14), (14, 21)]
tree = msa_jax.tree_segments(
  [nodes, nodes, [(0, 24)], nodes],
  [[-1, 0, 0], [-1, 0, 1], [-1], [-1, -1, 1]], length=t, max_segments=4)
documents = dict(segment_ids=ids, max_segments=4)
trees = dict(segments=jax.tree.map(jnp.asarray, tree))


def both(q, k, v, iq, ik, mask, phase, implementation, **packed):
  if "segments" in packed:  # weights of the queries, as `merge_prefixes` gives
    mask = jnp.where(mask, 0.5 + jnp.arange(t) % 3, 0.0)
  def loss(*args):
    out = msa_jax.msa_attention(
      *args, query_mask=mask, with_kl=True, phase=phase,
      implementation=implementation, **packed, **options)
    weight = jnp.where(out.lse == -jnp.inf, 0, out.lse)
    total = jnp.sum(jnp.sin(out.out)) + jnp.sum(jnp.cos(weight))
    return total + 10 * out.kl, out
  return jax.value_and_grad(loss, range(5), has_aux=True)(q, k, v, iq, ik)


def decode(q, k, v, iq, ik, mask, implementation):
  return msa_jax.decode_attention(
    q[:, :3], k, v, iq[:, :3], ik, kv_lengths=jnp.array([5, 9, 20, 24]),
    implementation=implementation, **options)


def recall(q, k, v, iq, ik, mask, implementation):
  blocks = msa_jax.select_blocks(
    iq, ik, implementation=implementation, **documents, **options)
  return msa_jax.selection_recall(q, k, blocks, block_size=8, **documents)


# The most all-reduces: those of the loss, the KL, dindex_k, which all groups
# share, the count of queries and whether any row has too many spans; and those
# of the recalls.
CASES = {
  ("sparse", "xla"): (functools.partial(both, phase="sparse"), 4),
  ("packed", "xla"): (functools.partial(both, phase="sparse", **trees), 5),
  ("warmup", "xla"): (functools.partial(both, phase="warmup", **documents), 5),
  ("decode", "xla"): (decode, 0),
  ("recall", "xla"): (recall, 4),
  ("sparse", "reference"): (functools.partial(both, phase="sparse"), 4),
}


def close(got, want):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


# The others repeat them in more shapes and with the other kind of axes.
FEW = {AxisType.Auto: ("packed", "decode"), AxisType.Explicit: ("sparse",)}
every = sys.argv[1:] == ["every"]
if not every:
  jax.config.update("jax_disable_most_optimizations", True)
  CASES = {key: value for key, value in CASES.items() if key[1] == "xla" and
           key[0] in sum(FEW.values(), ())}
wanted = {}
for (name, kind), (function, _) in CASES.items():
  function = functools.partial(function, implementation=kind)
  wanted[name, kind] = jax.jit(function)(*args, mask)
for axis_type in (AxisType.Auto, AxisType.Explicit):
  mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(axis_type,) * 2)
  placed = [jax.device_put(x, jax.NamedSharding(mesh, spec))
            for x, spec in zip((*args, mask), specs)]
  for (name, kind), (function, most) in CASES.items():
    if (kind, axis_type) == ("reference", AxisType.Auto):
      continue  # XLA's partitioner alone
    if not every and name not in FEW[axis_type]:
      continue
    function = functools.partial(function, implementation=kind)
    compiled = jax.jit(function).lower(*placed).compile()
    text = compiled.as_text()
    for collective in ("all-gather", "all-to-all", "collective-permute"):
      assert f" {collective}" not in text, (axis_type, name, collective)
    count = len(re.findall(r" all-reduce(?:-start)?\\(", text))
    assert count <= most, (axis_type, name, count)
    got = compiled(*placed)
    close(got, wanted[name, kind])
    if axis_type == AxisType.Explicit and name == "sparse":
      out = got[0][1]
      for x, spec in ((out.out, ("data", None, "tensor", None)),
                      (out.lse, ("data", "tensor", None))):
        assert jax.typeof(x).sharding.spec == jax.P(*spec)
      for x, dx in zip(placed, got[1]):
        assert jax.typeof(x).sharding == jax.typeof(dx).sharding

# Without jit: a result that is a constant, the KL, joins the others.
mesh = jax.make_mesh((2, 2), ("data", "tensor"))
placed = [jax.device_put(x, jax.NamedSharding(mesh, spec))
          for x, spec in zip(args, specs)]
out, alone = (msa_jax.msa_attention(*x, implementation="xla", **options)
              for x in (placed, args))
close((out.out, out.kl), (alone.out, alone.kl))
assert jax.typeof(out.out).sharding.spec == jax.P("data", None, "tensor", None)

# The loss of the head inside of a jax.shard_map with check_vma=True.
head = (args[4], jnp.sin(jnp.arange(d * 16.0)).reshape(d, 16),
        jnp.zeros((b, t), jnp.int32), mask.astype(jnp.float32))
over = (jax.P("data"), jax.P(), jax.P("data"), jax.P("data"))
def summed(*args):
  return jax.lax.psum(msa_jax.head_loss(*args), "data")
local = jax.shard_map(summed, mesh=mesh, in_specs=over, out_specs=jax.P())
placed = [jax.device_put(x, jax.NamedSharding(mesh, spec))
          for x, spec in zip(head, over)]
close(*(jax.jit(jax.value_and_grad(function, (0, 1)))(*operands)
        for function, operands in
        ((local, placed), (msa_jax.head_loss, head))))

if not every:
  sys.exit()

# More devices than KV heads: slower, and right.
mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
function = functools.partial(both, phase="sparse", implementation="xla")
q = jax.device_put(args[0], jax.NamedSharding(mesh, jax.P(None, None, "x")))
rest = jax.device_put((*args[1:], mask), jax.NamedSharding(mesh, jax.P()))
close(jax.jit(function)(q, *rest), wanted["sparse", "xla"])

# A gradient of a gradient.
def second(q, k, v, iq, ik):
  blocks = msa_jax.select_blocks(iq, ik, implementation="xla", **options)
  def first(q):
    return jnp.sum(jnp.sin(msa_jax.sparse_attention(
      q, k, v, blocks, block_size=8, implementation="xla")))
  return jax.grad(lambda q: jnp.sum(jnp.cos(jax.grad(first)(q))))(q)
mesh = jax.make_mesh(
  (2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
placed = [jax.device_put(x, jax.NamedSharding(mesh, spec))
          for x, spec in zip(args, specs)]
close(jax.jit(second)(*placed), jax.jit(second)(*args))

# jax.shard_map with check_vma=True: each device's KL is of its own rows and
# groups, which have the same number of queries here.
def mapped(*args):
  def local(*args):
    out = msa_jax.msa_attention(
      *args, with_kl=True, implementation="xla", **options)
    kl = jax.lax.pmean(out.kl, ("data", "tensor"))
    return out.out, out.lse, kl
  return jax.shard_map(
    local, mesh=mesh, in_specs=specs[:5],
    out_specs=(specs[0], jax.P("data", "tensor"), jax.P()))(*args)


def whole(*args):
  out = msa_jax.msa_attention(
    *args, with_kl=True, implementation="xla", **options)
  return out.out, out.lse, out.kl


def gradients(function):
  def loss(*args):
    out, lse, kl = function(*args)
    return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(lse)) + 10 * kl
  return jax.jit(jax.value_and_grad(loss, range(5)))


want = gradients(whole)(*args)
for axis_type in (AxisType.Auto, AxisType.Explicit):
  mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(axis_type,) * 2)
  placed = [jax.device_put(x, jax.NamedSharding(mesh, spec))
            for x, spec in zip(args, specs)]
  close(gradients(mapped)(*placed), want)

# Over one of a mesh's axes, with the other left to XLA.
mesh = jax.make_mesh(
  (2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
placed = [jax.device_put(x, jax.NamedSharding(mesh, spec))
          for x, spec in zip(args, specs)]
part = jax.shard_map(
  lambda *args: whole(*args)[:2], mesh=mesh, axis_names={"data"},
  in_specs=jax.P("data"), out_specs=jax.P("data"))
def of_q(function, q, *rest):
  return jnp.sum(jnp.sin(function(q, *rest)[0]))
close(*(jax.jit(jax.grad(functools.partial(of_q, function)))(*operands)
        for function, operands in ((part, placed), (whole, args))))
"""


@pytest.mark.parametrize(
  "cases", ["few", pytest.param("every", marks=pytest.mark.slow)]
)
def test_operations_split_themselves(cases):
  """Batch rows and heads split: the same numbers, and nothing is gathered."""
  run_on_devices(4, OPERATIONS, cases)


# --- layers, models, generation -----------------------------------------------

MODELS = """
import jax, jax.numpy as jnp, numpy as np, optax
from flax import nnx
from jax.sharding import AxisType
import msa_jax
from msa_jax import DecoderLM, Sharding, generate

index = msa_jax.IndexConfig(index_dim=8, block_size=8, top_k=2)
ids = jnp.repeat(
  jnp.array([[1, 1, 2], [3, 3, 3], [0, 0, 0], [1, 4, 0]], jnp.int32), 8, axis=1)
config = msa_jax.ModelConfig(
  vocab_size=64, num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2,
  head_dim=8, mlp_dim=48, layer_kinds=("gqa", "msa"), index=index)
tokens = jax.random.randint(jax.random.key(0), (4, 24), 0, 64)
mask = jax.random.bernoulli(jax.random.key(1), 0.6, (4, 24)).at[3].set(False)
x = jax.random.normal(jax.random.key(2), (4, 24, 16))


@nnx.jit
def train(model, optimizer, tokens, mask, ids):
  def loss(model):
    out = model(tokens, with_kl=True, query_mask=mask, with_selection=True,
                segment_ids=ids, max_segments=4)
    weight = mask.astype(jnp.float32)
    total = msa_jax.head_loss(
      out.hidden, model.head_weight(), tokens, weight) / 96
    return total + out.kl.sum(), out
  (value, out), grads = nnx.value_and_grad(loss, has_aux=True)(model)
  optimizer.update(model, grads)
  return value, out


def run_model(sharding, place):
  model = DecoderLM(config, rngs=nnx.Rngs(0), sharding=sharding)
  optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
  steps = [train(model, optimizer, place(tokens), place(mask), place(ids))
           for _ in range(2)]
  rows = generate.generate(
    model, [[1, 2, 3], [4] * 20, [5], [6] * 9], max_new_tokens=4, steps=3,
    sampling=generate.Sampling(temperature=0.5), key=jax.random.key(3))
  return steps, nnx.to_pure_dict(nnx.state(model, nnx.Param)), rows


@nnx.jit
def residual(layer, x):
  def loss(layer, x):
    out = layer(x)
    return jnp.sum(jnp.sin(x + getattr(out, "out", out)))
  return nnx.value_and_grad(loss, argnums=(0, 1))(layer, x)


def run_layer(kind, sharding, place):
  layer = getattr(msa_jax, kind)(
    4, 16, 32, 16, 2, sharding=sharding, rngs=nnx.Rngs(0))
  return residual(layer, place(x))


def close(got, want):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)


KINDS = ("GQAttention", "MSAttention")
want = run_model(None, lambda x: x)
wanted = {kind: run_layer(kind, None, lambda x: x) for kind in KINDS}
MESHES = (
  (AxisType.Explicit, dict(data=2, fsdp=1, tensor=2), Sharding()),
  (AxisType.Explicit, dict(data=4), None),
  (AxisType.Auto, dict(tensor=2, other=2), Sharding()),
)
for axis_type, sizes, sharding in MESHES:
  mesh = jax.make_mesh(
    (*sizes.values(),), (*sizes,), axis_types=(axis_type,) * len(sizes))
  rows = "data" if "data" in sizes else None
  with jax.set_mesh(mesh):
    place = lambda x: jax.device_put(x, jax.P(rows))
    if rows:
      got = run_model(sharding, place)
      assert jax.typeof(got[0][0][1].hidden).sharding.spec[0] == rows
      close(got, want)
    if sharding:
      for kind in KINDS:
        close(run_layer(kind, sharding, place), wanted[kind])
"""


@pytest.mark.slow
def test_models_under_meshes_of_every_kind():
  """Training, generation and layers give the numbers of one device."""
  run_on_devices(4, MODELS)


# --- what lies between layers -------------------------------------------------

BETWEEN_LAYERS = """
import math, re, sys
import jax, jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType
import msa_jax
from msa_jax import DecoderLM, Sharding
from test_context import close

every = sys.argv[1] == "every"
kinds = ("gqa", "msa") if every else ("msa",)
config = msa_jax.ModelConfig(
  vocab_size=80, num_layers=len(kinds), embed_dim=32, num_heads=4,
  num_kv_heads=2, head_dim=8, mlp_dim=48, layer_kinds=kinds, qk_norm=False,
  index=msa_jax.IndexConfig(index_dim=8, block_size=8, top_k=2))


def run(sharding, tokens):
  graphdef, state = nnx.split(
    DecoderLM(config, rngs=nnx.Rngs(0), sharding=sharding))

  def loss(state, tokens):
    model = nnx.merge(graphdef, state)
    out = model(tokens, with_kl=True, with_logits=False)
    mean = jnp.full(tokens.shape, 1 / tokens.size)
    return out.kl.sum() + msa_jax.head_loss(
      out.hidden, model.head_weight(), tokens, mean, sharding=sharding)

  compiled = jax.jit(jax.value_and_grad(loss)).lower(state, tokens).compile()
  return compiled(state, tokens), compiled.as_text()


def entries(text, operation, last=""):
  # Of the largest arrays that an operation computes on one device.
  shapes = re.findall(rf"= f32\\[([0-9,]*{last})\\]\\S* {operation}\\(", text)
  return max(math.prod(map(int, shape.split(","))) for shape in shapes)


Auto, Explicit = AxisType.Auto, AxisType.Explicit
CASES = (
  # Batch rows, tokens of each, devices that share them between layers, and the
  # kind of axes of the few.
  (dict(tensor=2), 2, 24, 2, ()),
  (dict(tensor=2), 1, 24, 2, ()),
  (dict(tensor=2), 3, 23, 1, ()),
  (dict(data=2, tensor=2), 4, 24, 4, ()),
  (dict(fsdp=2, tensor=2), 4, 24, 2, (Explicit,)),
  (dict(context=2, tensor=2), 1, 24, 4, (Auto,)),
)
wanted = {}
for sizes, rows, length, parts, kinds in CASES:
  if every:
    kinds = Auto, Explicit
  tokens = jax.random.randint(jax.random.key(0), (rows, length), 0, 80)
  if kinds and (rows, length) not in wanted:
    wanted[rows, length], _ = run(None, tokens)
  devices = jax.devices()[: math.prod(sizes.values())]
  for kind in kinds:
    mesh = jax.make_mesh(
      (*sizes.values(),), (*sizes,), axis_types=(kind,) * len(sizes),
      devices=devices)
    with jax.set_mesh(mesh):
      spec = jax.P(next(iter(sizes)) if rows == 4 else None)
      got, text = run(Sharding(), jax.device_put(tokens, spec))
      close(got, wanted[rows, length])
      # Norms, and the softmax over the vocabulary.
      own = rows * length // parts
      found = entries(text, "rsqrt"), entries(text, "exponential", ",80")
      assert found == (own, own * 80), (sizes, rows, length, found)
"""


# Runs over a mesh, in test_train, have the numbers of one device, too.
@pytest.mark.slow
@pytest.mark.parametrize("cases", ["few", "every"])
def test_devices_that_share_heads_share_tokens_between_layers(cases):
  """Each computes norms and losses of its own tokens, and all get the numbers
  of one device, also where the axis divides neither batch rows nor tokens.
  Where parameters are split over "fsdp", they repeat each other's work."""
  run_on_devices(4, BETWEEN_LAYERS, cases)


# --- kernels, for machines that are not here ----------------------------------

OPTIONS: dict[str, Any] = dict(block_size=64, top_k=2)


def operands():
  case = Case(
    batch=2, q_len=128, kv_len=128, head_dim=64, index_dim=64, block_size=64
  )
  return case.inputs(dtype=jnp.bfloat16)


def sparse_training(*args, implementation: Any = "mosaic_gpu"):
  def loss(*args):
    out = msa_jax.msa_attention(
      *args, with_kl=True, implementation=implementation, **OPTIONS
    )
    return jnp.sum(out.out.astype(jnp.float32)) + jnp.sum(out.lse) + out.kl

  return jax.grad(loss, range(5))(*args)


def weighted_warmup(*args, implementation: Any = "mosaic_gpu"):
  """The warm-up of documents; the weights of the batch rows differ."""
  weights = (jnp.arange(2 * 128.0) % 129).reshape(2, 128)
  ids = jnp.repeat(jnp.array([[1, 1, 2, 0], [1, 2, 2, 3]], jnp.int32), 32, 1)

  def loss(*args):
    out = msa_jax.msa_attention(
      *args, with_kl=True, phase="warmup", query_mask=weights,
      segment_ids=ids, implementation=implementation, **OPTIONS
    )  # fmt: skip
    return jnp.sum(out.out.astype(jnp.float32)) + out.kl

  return jax.grad(loss, range(5))(*args)


def decoding(q, k, v, iq, ik, implementation: Any = "mosaic_gpu"):
  return msa_jax.decode_attention(
    q[:, :3], k, v, iq[:, :3], ik, kv_lengths=jnp.array([70, 20]),
    implementation=implementation, **OPTIONS,
  )  # fmt: skip


# With the number of kernels that each launches.
PROGRAMS = {"sparse": (sparse_training, 10), "decode": (decoding, 2)}


@pytest.mark.parametrize(
  "name", [pytest.param("sparse", marks=pytest.mark.slow), "decode"]
)
def test_export_without_a_gpu(name, no_gpu):
  """For CUDA alone, and for two platforms that each take what is right."""
  program, kernels = PROGRAMS[name]
  args = operands()
  program = jax.jit(program, static_argnames="implementation")
  one = export.export(program, platforms=("cuda",))(*args)
  assert one.mlir_module().count("@mosaic_gpu") == kernels
  chosen = functools.partial(program, implementation=None)
  both = export.export(jax.jit(chosen), platforms=("cpu", "cuda"))(*args)
  assert "@mosaic_gpu" in both.mlir_module()
  got, want = both.call(*args), program(*args, implementation="xla")
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_array_equal(x, y)
  with pytest.raises(
    NotImplementedError, match=r"Hopper GPUs.*run on the platform 'cpu'"
  ):
    program(*args)


def test_warmup_needs_its_gpu(no_gpu):
  run = functools.partial(
    msa_jax.msa_attention, phase="warmup", implementation="mosaic_gpu"
  )
  with pytest.raises(
    NotImplementedError, match=r"Hopper GPUs.*run on the platform 'cpu'"
  ):
    jax.jit(functools.partial(run, **OPTIONS)).trace(*operands())


LOWERING = """
import jax
from jax.sharding import AxisType
from test_meshes import (
  PROGRAMS, decoding, operands, sparse_training, weighted_warmup)
specs = (jax.P("data", None, "tensor"),) * 4 + (jax.P("data"),)


def placed(axis_type):
  mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(axis_type,) * 2)
  return mesh, [jax.device_put(x, jax.NamedSharding(mesh, spec))
                for x, spec in zip(operands(), specs)]


def lower(program, args):
  traced = jax.jit(program).trace(*args)
  return traced.lower(lowering_platforms=("cuda",)).as_text()


# Kernels are made when XLA asks for one device's part.
for axis_type, program, calls in ((AxisType.Auto, sparse_training, 4),
                                  (AxisType.Auto, weighted_warmup, 3),
                                  (AxisType.Explicit, decoding, 1)):
  text = lower(program, placed(axis_type)[1])
  assert text.count("@CustomSPMDPartitioning") == calls, text
mesh, args = placed(AxisType.Explicit)
mapped = jax.shard_map(
  sparse_training, mesh=mesh, in_specs=specs, out_specs=specs)
# Of few blocks all are shared, which takes two kernels less (see conftest.py).
found = lower(mapped, args).count("@mosaic_gpu")
assert found == PROGRAMS["sparse"][1] - 2, found
"""


@pytest.mark.slow
def test_kernels_under_meshes_lower():
  """Split by themselves, and inside of jax.shard_map with check_vma=True."""
  run_on_devices(4, LOWERING)


VMAPPED = """
import sys, types
import jax, jax.numpy as jnp
import test_meshes
from pallas_kernels import mosaic
# A machine of two GPUs, on which kernels are no programs for CUDA alone.
mosaic.current_device = lambda: types.SimpleNamespace(
  platform="gpu", compute_capability="9.0", core_count=132)
args = [jnp.stack([x, x[:, ::-1]]) for x in test_meshes.operands()]
for name in sys.argv[1:]:
  traced = jax.jit(jax.vmap(getattr(test_meshes, name))).trace(*args)
  text = traced.lower(lowering_platforms=("cuda",)).as_text()
  assert "@mosaic_gpu" in text
"""


@pytest.mark.parametrize(
  "names",
  [
    ["decoding"],
    pytest.param(
      ["sparse_training", "weighted_warmup"], marks=pytest.mark.slow
    ),
  ],
)
def test_kernels_under_vmap_lower_beside_another_gpu(names):
  run_on_devices(2, VMAPPED, *names)


def test_forward_mode_says_so(pretend_hopper):
  q, *rest = operands()

  def out(implementation, q):
    return msa_jax.msa_attention(
      q, *rest, implementation=implementation, **OPTIONS
    ).out.astype(jnp.float32)

  with pytest.raises(NotImplementedError, match="support reverse mode only"):
    jax.jvp(functools.partial(out, "xla"), (q,), (q,))
  with pytest.raises(NotImplementedError, match="reverse mode of first order"):
    gradient = jax.grad(lambda q: jnp.sum(out("mosaic_gpu", q)))
    jax.eval_shape(jax.grad(lambda q: jnp.sum(gradient(q))), q)
  hidden, head = jnp.ones((1, 4, 8)), jnp.ones((8, 5))
  targets = jnp.zeros((1, 4), jnp.int32)
  with pytest.raises(NotImplementedError, match="reverse mode only"):
    jax.jvp(
      lambda x: msa_jax.head_loss(x, head, targets, jnp.ones((1, 4))),
      (hidden,), (hidden,),
    )  # fmt: skip


@pytest.mark.parametrize(
  "gradient", [False, pytest.param(True, marks=pytest.mark.slow)]
)
def test_varying_axes_change_no_number(gradient):
  """Interpreted kernels inside of jax.shard_map, with and without check_vma."""
  case = Case(
    q_len=16, kv_len=64, num_heads=2, num_kv_heads=1, head_dim=64,
    block_size=64, top_k=1,
  )  # fmt: skip
  q, k, v, *_ = case.inputs(dtype=jnp.bfloat16)
  blocks = random_blocks(case)
  mesh = jax.make_mesh(
    (1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
  )

  def attend(q, k, v, blocks):
    return sparse.sparse_attention(
      q, k, v, blocks, block_size=64, interpret=True,
      config=fwd.Config(num_ctas=1, pair_warpgroups=2, query_stages=2),
      backward_config=bwd.Config(num_ctas=1, stages=2),
    )  # fmt: skip

  def run(check_vma):
    mapped = jax.shard_map(
      attend, mesh=mesh, in_specs=jax.P("data"), out_specs=jax.P("data"),
      check_vma=check_vma,
    )  # fmt: skip

    def loss(*args):
      out, lse = mapped(*args)
      weight = jnp.where(lse == -jnp.inf, 0, jnp.cos(lse))
      return jnp.sum(jnp.sin(out.astype(jnp.float32))) + jnp.sum(weight)

    run = jax.value_and_grad(loss, range(3)) if gradient else mapped
    return jax.jit(run)(q, k, v, blocks)

  got, want = run(True), run(False)
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert jnp.any(x)
    np.testing.assert_array_equal(x, y)


@pytest.mark.gpu
@pytest.mark.parametrize("axis_type", ["Auto", "Explicit"])
def test_kernels_split_themselves_on_gpus(axis_type, two_gpus):
  """Two GPUs give the numbers of one, and nothing is gathered."""
  kind = getattr(jax.sharding.AxisType, axis_type)
  args = operands()
  for shape in ((2, 1), (1, 2)):
    mesh = jax.make_mesh(
      shape, ("data", "tensor"), axis_types=(kind,) * 2,
      devices=two_gpus,
    )  # fmt: skip
    specs = (jax.P("data", None, "tensor"),) * 4 + (jax.P("data"),)
    placed = [
      jax.device_put(x, jax.NamedSharding(mesh, spec))
      for x, spec in zip(args, specs)
    ]
    for program in (sparse_training, weighted_warmup, decoding):
      compiled = jax.jit(program).lower(*placed).compile()
      text = compiled.as_text()
      assert text and "all-gather" not in text
      got, want = compiled(*placed), jax.jit(program)(*args)
      for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        x, y = (np.asarray(a, np.float32) for a in (x, y))
        # bf16, whose sums over devices are split in another way.
        np.testing.assert_allclose(x, y, rtol=2e-2, atol=2e-2 * np.abs(y).max())


# --- what the documentation shows ---------------------------------------------

EXAMPLES = """
import pathlib, sys
import jax
from jax.sharding import AxisType
from test_docs import PAGES, blocks, run_examples

mesh = jax.make_mesh(
  (jax.device_count(),), ("data",), axis_types=(AxisType[sys.argv[1]],))
for page in filter(blocks, PAGES):
  with jax.set_mesh(mesh):
    run_examples(page, pathlib.Path(sys.argv[2], page.stem))
"""


@pytest.mark.slow
@pytest.mark.parametrize("devices", [4, 1])
@pytest.mark.parametrize("axis_type", ["Explicit", "Auto"])
def test_examples_run_under_meshes(devices, axis_type, tmp_path):
  """As printed, inside of jax.set_mesh, with the output that is printed."""
  run_on_devices(devices, EXAMPLES, axis_type, tmp_path)
