"""Mixture of experts: the layer, its gradients, meshes, load balance."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import run_on_devices

from msa_jax import ModelConfig, MoEConfig
from msa_jax.mlp import MixtureOfExperts, balance, expert_load, gated
from train import config as config_lib
from train import data, evaluate, loop
from train import program as program_lib

SKEW = [0.4, 0.0, 0.0, -0.4]
SIZES = dict(num_experts=4, top_k=2, expert_dim=12, shared_dim=6)


def build(**changes):
  """A layer whose choice bias matters."""
  options = dict(SIZES, routed_scale=2.0, activation="swiglu_oai") | changes
  layer = MixtureOfExperts(16, **options, rngs=nnx.Rngs(0))
  if layer.choice_bias is not None:
    bias = layer.choice_bias
    noise = jax.random.normal(jax.random.key(7), bias.shape, bias.dtype)
    layer.choice_bias[...] = 0.2 * noise
  # Wide, so that the clamps at 7 act.
  for weight in (layer.gate, layer.up):
    weight[...] = 6 * weight[...]
  return layer


X = jax.random.normal(jax.random.key(1), (2, 9, 16))


def loop_moe(layer, x):
  """The layer, one token and expert at a time, in float64."""

  def number(a):
    return np.asarray(a[...], np.float64)

  def act(g, u):
    if layer.activation == "swiglu":
      return g / (1 + np.exp(-g)) * u
    g, u = np.minimum(g, layer.limit), np.clip(u, -layer.limit, layer.limit)
    return (u + 1) * g / (1 + np.exp(-layer.alpha * g))

  router = number(layer.router)
  bias = 0 if layer.choice_bias is None else number(layer.choice_bias)
  gate, up, down = map(number, (layer.gate, layer.up, layer.down))
  x = np.asarray(x, np.float64)
  out, experts = np.zeros_like(x), np.zeros((*x.shape[:2], layer.top_k), int)
  for at in np.ndindex(x.shape[:2]):
    scores = 1 / (1 + np.exp(-x[at] @ router))
    if layer.router_kind == "softmax":
      scores = np.exp(x[at] @ router)
      scores /= scores.sum()
    chosen = np.argsort(-(scores + bias), kind="stable")[: layer.top_k]
    experts[at] = chosen
    for e in chosen:
      part = act(x[at] @ gate[e], x[at] @ up[e]) @ down[e]
      total = scores[chosen].sum() if layer.normalize_weights else 1
      out[at] += layer.routed_scale * scores[e] / total * part
    if layer.shared is not None:
      kernels = (layer.shared.gate, layer.shared.up, layer.shared.down)
      g, u, d = (number(linear.kernel) for linear in kernels)
      out[at] += act(x[at] @ g, x[at] @ u) @ d
  return out, experts


@pytest.mark.parametrize(
  "changes",
  [
    {},
    dict(activation="swiglu", shared_dim=0, routed_scale=1.0),
    dict(num_experts=7, top_k=1),
    dict(num_experts=3, top_k=3),
    dict(router="softmax"),
    dict(router="softmax", normalize_weights=False, shared_dim=0),
  ],
)
def test_layer_equals_loops(changes):
  layer = build(**changes)
  out, experts = nnx.jit(type(layer).__call__)(layer, X)
  want, chosen = loop_moe(layer, X)
  np.testing.assert_array_equal(experts, chosen)
  np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)


def test_clamps_act():
  """The inputs above reach them, so the test above sees them."""
  layer = build()
  inner = jnp.einsum("bte,xef->btxf", X, layer.gate[...])
  assert inner.max() > 7
  np.testing.assert_allclose(
    gated(jnp.array([9.0]), jnp.array([-8.0]), "swiglu_oai", 1.702, 7.0),
    gated(jnp.array([7.0]), jnp.array([-7.0]), "swiglu_oai", 1.702, 7.0),
  )


def test_gradients_equal_those_of_dense_experts(x64):
  """Every expert on every token, weighed by what the router chose.

  In float64: the router's gradients are sums that nearly cancel, whose float32
  rounding differs from one processor to another by more than 1e-5.
  """
  layer = build(dtype=jnp.float64, param_dtype=jnp.float64)
  x = X.astype(jnp.float64)
  graphdef, state = nnx.split(layer, nnx.Param)

  def sparse(state, x):
    return jnp.sum(jnp.sin(nnx.merge(graphdef, state)(x)[0]))

  def dense(state, x):
    layer = nnx.merge(graphdef, state)
    weights, experts = layer.route(x)
    share = jnp.sum(
      jax.nn.one_hot(experts, layer.num_experts) * weights[..., None], axis=-2
    )
    inner = gated(
      jnp.einsum("bte,xef->btxf", x, layer.gate[...]),
      jnp.einsum("bte,xef->btxf", x, layer.up[...]),
      layer.activation,
      layer.alpha,
      layer.limit,
    )
    out = jnp.einsum("btxf,xfe,btx->bte", inner, layer.down[...], share)
    return jnp.sum(jnp.sin(layer.routed_scale * out + layer.shared(x)))

  got = jax.jit(jax.grad(sparse, (0, 1)))(state, x)
  want = jax.jit(jax.grad(dense, (0, 1)))(state, x)
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want)
  ):
    scale = np.abs(b).max()
    np.testing.assert_allclose(a, b, atol=1e-13 * scale + 1e-15, err_msg=path)
  assert not np.any(got[0].choice_bias[...])
  assert np.all(np.abs(got[0].router[...]).sum(axis=0) > 0)


def test_nan_stays_in_its_token():
  layer = build()
  out, _ = layer(X.at[0, 3].set(jnp.nan))
  bad = np.isnan(out).any(-1)
  assert bad[0, 3] and bad.sum() == 1
  np.testing.assert_array_equal(out[1], layer(X)[0][1])


def test_bfloat16_routes_in_float32():
  """Rounded inputs, but scores and sums as in float32."""
  layer = build()
  low = build(dtype=jnp.bfloat16)
  x = X.astype(jnp.bfloat16)
  out, experts = low(x)
  want, chosen = layer(x.astype(jnp.float32))
  assert out.dtype == jnp.bfloat16
  np.testing.assert_array_equal(experts, chosen)
  # Hidden units and the shared expert's sums are rounded to 8 bits.
  np.testing.assert_allclose(out, want, atol=2**-6 * np.abs(want).max())


def test_wrong_calls():
  with pytest.raises(ValueError, match="top_k must be at most num_experts = 4"):
    build(top_k=5)
  with pytest.raises(ValueError, match=r"top_k must be an integer .* got 0"):
    build(top_k=0)
  with pytest.raises(ValueError, match="shared_dim must be an integer of at"):
    build(shared_dim=-1)
  with pytest.raises(ValueError, match="must be at most num_experts = 4"):
    MoEConfig(num_experts=4, top_k=5)
  small = tiny_run().model
  with pytest.raises(ValueError, match="mlp_kinds must be 1 to num_layers = 1"):
    dataclasses.replace(small, mlp_kinds=("sparse",))
  with pytest.raises(ValueError, match="activation must be one of"):
    dataclasses.replace(small, activation="gelu")


# --- Training -----------------------------------------------------------------


def tiny_run(**optimizer):
  """Recall by a model of one MoE layer."""
  model = ModelConfig(
    vocab_size=298,
    num_layers=1,
    embed_dim=16,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=32,
    mlp_kinds=("moe",),
    moe=MoEConfig(**SIZES),
  )
  return config_lib.RunConfig(
    task="recall",
    side="gqa",
    model=model,
    data=data.RecallConfig(),
    optimizer=config_lib.OptimizerConfig(warmup_steps=1, **optimizer),
    num_steps=40,
    batch_size=8,
    context=64,
    log_every=1,
    eval_every=40,
    eval_batches=1,
    checkpoint_every=40,
  )


def skewed(program, seed=0):
  """A fresh state whose router sends every token to the first expert."""
  state = program_lib.Program.init(program, seed)
  (name,) = program._choice_biases
  state.params[name] = jnp.asarray(SKEW, jnp.float32)
  return state


def program_of(run):
  return program_lib.Program(program_lib.compile_key(run))


def steps(run, program, count, init=program_lib.Program.init):
  """Parameters after one step, and each step's metrics."""
  source = data.load(run.data)
  state = init(program, run.seed)
  params, metrics = None, []
  for step in range(1, count + 1):
    batch = source.train_batch(0, step - 1, batch_size=8, context=64)
    state, row = program_lib.train_step(program, run, state, batch, step)
    params = jax.device_get(state.params) if params is None else params
    metrics.append(jax.device_get(row))
  return params, metrics


def trained(mesh):
  """Numbers of two steps in two parts each, on a mesh."""
  run = dataclasses.replace(
    tiny_run(), mesh=config_lib.MeshConfig(**mesh), grad_accumulation=2
  )
  _, metrics = steps(run, program_of(run), 2)
  rows = [[m["loss"], m["grad_norm"], *m["load"].ravel()] for m in metrics]
  return np.asarray(rows)


def test_balance_moves_by_load():
  load = expert_load(jnp.array([[[0, 1], [0, 2]]]), 4)
  np.testing.assert_array_equal(load, [2, 1, 1, 0])
  bias = balance(jnp.zeros(4), load, 0.5)
  np.testing.assert_array_equal(bias, [-0.5, 0, 0, 0.5])


@pytest.mark.slow
def test_training_balances_the_load_and_nothing_else(tmp_path):
  run = tiny_run(router_bias_rate=0.0)
  unmoved = program_of(run)
  still, rows = steps(run, unmoved, 40, skewed)
  (bias,) = unmoved._choice_biases
  np.testing.assert_array_equal(still[bias], np.float32(SKEW))
  assert rows[0]["load"].shape == (1, 4)
  assert all(row["load"].sum() == 8 * 64 * 2 for row in rows)
  # Each token goes to the first expert (twice the mean), none to the last.
  (row,) = evaluate.router_records(
    unmoved, sum(row["load"] for row in rows[24:])
  )
  assert row["layer"] == 0 and row["max_load"] > 1.9 and row["min_load"] < 0.1

  run = tiny_run(router_bias_rate=0.02)
  program = program_of(run)
  moved, first = steps(run, program, 1, skewed)
  # The first step has the same loss, gradients and updates with and without.
  np.testing.assert_equal(first[0], rows[0])
  # Of a rate of 0 the compiler makes another program, with other last bits.
  hardly = tiny_run(router_bias_rate=1e-30)
  hardly, _ = steps(hardly, program_of(hardly), 1, skewed)
  for name, value in hardly.items():
    assert np.array_equal(value, moved[name]) == (name != bias), name
    np.testing.assert_allclose(value, still[name], atol=1e-6, err_msg=name)

  # And the loop logs how the loads become equal.
  program.init = lambda seed: skewed(program, seed)
  loop.run(dataclasses.replace(run, folder=str(tmp_path)), program=program)
  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  logged = [json.loads(line) for line in lines]
  logged = [row["router"][0] for row in logged if row["kind"] == "train"]
  assert len(logged) == 40
  assert logged[0] == evaluate.router_records(unmoved, rows[0]["load"])[0]
  assert np.mean([row["max_load"] for row in logged[24:]]) < 1.5
  assert np.mean([row["min_load"] for row in logged[24:]]) > 0.5


# --- Over devices -------------------------------------------------------------


@nnx.jit
def run(layer, x):
  def loss(layer, x):
    out, experts = layer(x)
    return jnp.sum(jnp.sin(0.01 * out)), (out, experts)

  return nnx.value_and_grad(loss, argnums=(0, 1), has_aux=True)(layer, x)


MESH = """
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from test_moe import X, build, run, trained
from msa_jax import Sharding

x = jnp.tile(X, (2, 1, 1))
rows = [trained(dict())]
want = jax.tree.leaves(run(build(), x))
mesh = jax.make_mesh((2, 2), ("expert", "tensor"),
                     axis_types=(jax.sharding.AxisType.Auto,) * 2)
with jax.set_mesh(mesh):
  layer = build(sharding=Sharding(embed=None))
  spec = nnx.get_partition_spec(nnx.state(layer)).gate.get_value()
  assert spec == jax.P("expert", None, "tensor"), spec
  got = run(layer, x)
# Sums that are split in another way.
for a, b in zip(want, jax.tree.leaves(got), strict=True):
  np.testing.assert_allclose(b, a, atol=1e-5 * np.abs(a).max())
rows.append(trained(dict(expert=2)))
np.testing.assert_allclose(*rows, rtol=1e-5)
assert np.all(rows[0][:, 2:].sum(-1) == 8 * 64 * 2)
"""


@pytest.mark.slow
def test_mesh_gives_the_same_numbers():
  """Experts over forced CPU devices: the layer, and training."""
  run_on_devices(4, MESH)
