"""What a training step saves and what it computes twice: the head's loss and
rematerialised layers."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from msa_jax import DecoderLM, IndexConfig, ModelConfig, head_loss
from train import config as config_lib
from train import program as program_lib


def head_inputs(dtype, tokens=37):
  keys = jax.random.split(jax.random.key(0), 4)
  return (
    jax.random.normal(keys[0], (2, tokens, 16), dtype),
    jax.random.normal(keys[1], (16, 50), dtype),
    jax.random.randint(keys[2], (2, tokens), 0, 50),
    jax.random.uniform(keys[3], (2, tokens)),
  )


def plain_loss(hidden, weight, targets, target_weights):
  logits = jnp.einsum(
    "bte,ev->btv", hidden, weight, preferred_element_type=jnp.float32
  )
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
  return jnp.sum(losses * target_weights)


@pytest.mark.parametrize("chunk_tokens", [1, 16, 26, 10_000])
def test_head_loss_is_the_cross_entropy(chunk_tokens):
  hidden, weight, *rest = head_inputs(jnp.float32)
  wanted = jax.value_and_grad(plain_loss, (0, 1))(hidden, weight, *rest)
  found = jax.value_and_grad(
    lambda *args: head_loss(*args, *rest, chunk_tokens), (0, 1)
  )(hidden, weight)
  chex.assert_trees_all_close(found, wanted, rtol=1e-5, atol=1e-5)
  value = head_loss(hidden, weight, *rest, chunk_tokens)
  np.testing.assert_allclose(value, found[0], rtol=1e-6)


def test_head_loss_rounds_gradients_to_the_working_dtype():
  hidden, weight, *rest = head_inputs(jnp.bfloat16)
  wide = [x.astype(jnp.float32) for x in (hidden, weight)]
  wanted = jax.grad(plain_loss, (0, 1))(*wide, *rest)
  found = jax.grad(lambda *args: head_loss(*args, *rest, 16), (0, 1))(
    hidden, weight
  )
  for got, want in zip(found, wanted):
    assert got.dtype == jnp.bfloat16
    error = jnp.abs(got.astype(jnp.float32) - want)
    assert float(jnp.sqrt(jnp.mean(error**2) / jnp.mean(want**2))) < 0.005


def test_head_loss_scales_with_its_cotangent_and_skips_weights_of_zero():
  hidden, weight, targets, weights = head_inputs(jnp.float32)
  weights = weights.at[:, 20:].set(0)
  hidden = hidden.at[:, 20:].set(100.0)
  grad = jax.grad(lambda x: 3 * head_loss(x, weight, targets, weights, 16))
  wanted = jax.grad(lambda x: 3 * plain_loss(x, weight, targets, weights))
  found = grad(hidden)
  chex.assert_trees_all_close(found, wanted(hidden), rtol=1e-5, atol=1e-5)
  assert not found[:, 20:].any()


MODEL = ModelConfig(
  vocab_size=64,
  num_layers=1,
  embed_dim=64,
  num_heads=4,
  num_kv_heads=2,
  head_dim=16,
  mlp_dim=96,
  layer_kinds=("msa",),
  index=IndexConfig(index_dim=16, block_size=16, top_k=2),
  implementation="xla",
)


def model_grad(config, tokens, phase="sparse"):
  """The traced gradient of a model's loss, and its parameters' shapes."""
  model = nnx.eval_shape(lambda: DecoderLM(config, rngs=nnx.Rngs(0)))
  graphdef, params = nnx.split(model, nnx.Param)

  def loss(params, tokens):
    model = nnx.merge(graphdef, params)
    out = model(tokens, phase=phase, with_kl=True, with_logits=False)
    weights = jnp.ones(tokens.shape)
    lm = head_loss(out.hidden, model.head_weight(), tokens, weights)
    return lm + jnp.sum(out.kl)

  shape = jax.ShapeDtypeStruct(tokens, jnp.int32)
  return jax.jit(jax.grad(loss)).trace(params, shape)


GPU = dict(
  num_heads=16,
  num_kv_heads=2,
  head_dim=128,
  dtype="bfloat16",
  index=IndexConfig(index_dim=128, block_size=128, top_k=4),
  implementation="mosaic_gpu",
  gqa_implementation="cudnn",
)


# With remat there is more to compute twice.
@pytest.mark.parametrize(
  "remat", [pytest.param(False, marks=pytest.mark.slow), True]
)
@pytest.mark.parametrize("kind", ["gqa", "msa"])
def test_attention_and_choice_are_computed_once(pretend_hopper, kind, remat):
  """In the lowered step, with remat too: no kernel is there twice."""
  config = dataclasses.replace(
    MODEL, layer_kinds=(kind,), num_layers=2, remat=remat, **GPU
  )
  lowered = model_grad(config, (1, 1024)).lower(lowering_platforms=("cuda",))
  text = lowered.as_text()
  if kind == "gqa":
    # Two layers share one lowered function.
    assert text.count("@__cudnn$fmhaSoftmax(") == 1
    assert text.count("@__cudnn$fmhaSoftmaxBackward(") == 1
    return
  # Selection, attention over tiles alone or with pairs (3), its backward (2),
  # the KL (3).
  assert text.count("@mosaic_gpu_v2") == 9


# test_ops has the operations' gradients, and test_modules a scan of layers.
@pytest.mark.slow
@pytest.mark.parametrize("phase", ["sparse", "warmup"])
def test_remat_changes_no_gradient(phase):
  tokens = jax.random.randint(jax.random.key(1), (2, 96), 0, 64)
  grads = []
  for remat in (False, True):
    config = dataclasses.replace(MODEL, remat=remat)
    model = DecoderLM(config, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model, nnx.Param)

    def loss(params, graphdef=graphdef):
      model = nnx.merge(graphdef, params)
      out = model(tokens, phase=phase, with_kl=True)
      return jnp.mean(out.logits**2) + jnp.sum(out.kl)

    grads.append(jax.jit(jax.grad(loss))(params))
  chex.assert_trees_all_close(*grads, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_remat_trains_twice_the_depth_in_the_memory_of_one():
  def workspace(layers, remat):
    config = dataclasses.replace(MODEL, num_layers=layers, remat=remat)
    compiled = model_grad(config, (2, 512)).lower().compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert workspace(8, True) <= workspace(4, False)


def test_a_step_asks_the_compiler_for_its_memory_once(monkeypatch):
  """Asking takes 20 to 100 ms of the host, which the device would wait for."""
  asked = []
  monkeypatch.setattr(program_lib, "_bytes_needed", lambda _: asked.append(1))
  config = program_lib.ProgramConfig(
    model=MODEL,
    mesh=config_lib.MeshConfig(),
    batch_size=1,
    grad_accumulation=1,
    context=32,
    kl_weight=1.0,
    beta1=0.9,
    beta2=0.95,
    eps=1e-8,
    weight_decay=0.1,
    clip_norm=1.0,
    index_clip_norm=1.0,
    router_bias_rate=0.0,
    algorithm="adamw",
    index_algorithm=None,
  )
  program = program_lib.Program(config)
  for _ in range(3):
    program.compile("sparse")
  assert len(asked) == 1


def test_compiler_options_have_names_that_the_compiler_knows():
  """A name that XLA does not know is an error, on any platform."""
  lowered = jax.jit(jnp.dot).lower(jnp.ones((2, 2)), jnp.ones((2, 2)))
  for options in program_lib.COMPILER_OPTIONS.values():
    lowered.compile(options)
  with pytest.raises(Exception, match="No such compile option"):
    lowered.compile({"xla_gpu_no_such_option": False})
