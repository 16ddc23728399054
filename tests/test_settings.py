"""Users' JAX settings: strict promotions, debug_nans, 64-bit floats."""

import contextlib
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import Case
from test_train import tiny_run

import msa_jax
from msa_jax import generate, ops, selection_stats
from pallas_kernels import sparse_attention_fwd
from train import config as config_lib
from train import loop

CASE = Case(kv_len=26)
OPTIONS = dict(block_size=4, top_k=3)


@contextlib.contextmanager
def strict():
  with (
    jax.numpy_rank_promotion("raise"),
    jax.numpy_dtype_promotion("strict"),
    jax.debug_nans(True),
  ):
    yield


INPUTS = CASE.inputs(dtype=jnp.bfloat16)


def every_operation(implementation, phase, inputs=INPUTS):
  """Outputs and gradients of all operations, in bfloat16."""
  q, k, v, index_q, index_k = inputs
  lengths = jnp.asarray([25])
  with_lengths = dict(kv_lengths=lengths)
  named = dict(implementation=implementation)

  def loss(q, k, v, index_q, index_k):
    out, kl, _, lse = msa_jax.msa_attention(
      q, k, v, index_q, index_k, phase=phase, with_kl=True,
      query_mask=jnp.ones(q.shape[:2], bool), **OPTIONS, **with_lengths,
      **named,
    )  # fmt: skip
    seen = jnp.where(lse == -jnp.inf, 0, lse)
    return jnp.sum(out.astype(jnp.float32)) + kl + jnp.sum(seen)

  results = [jax.value_and_grad(loss, range(5))(*inputs)]
  packed = msa_jax.msa_attention(
    *(x[:, -24:] for x in inputs), phase=phase, with_kl=True,
    segment_ids=jnp.asarray([[1] * 7 + [2] * 11 + [0] * 6]), **OPTIONS, **named,
  )  # fmt: skip
  results.append(packed._replace(lse=None))
  if phase == "sparse":
    for precision in ("exact", "fp8"):
      blocks = msa_jax.select_blocks(
        index_q, index_k, score_precision=precision, **OPTIONS, **named
      )
      results.append(blocks)
    results.append(msa_jax.index_kl_loss(q, k, index_q, index_k, blocks,
                                         block_size=4, **named))  # fmt: skip
    codes, scale = ops.quantise_index_keys(index_k)
    few = (q[:, -2:], k, v, index_q[:, -2:])
    decode = functools.partial(
      msa_jax.decode_attention, **OPTIONS, **with_lengths, **named
    )
    results.append(decode(*few, index_k))
    results.append(decode(*few, codes, index_k_scale=scale))
    results.append(msa_jax.selection_recall(q, k, blocks, block_size=4))
    results.append(selection_stats.sharing(blocks, block_size=4))
    results.append(selection_stats.recall(blocks, blocks))
  return jax.tree.leaves(results)


@pytest.mark.parametrize(
  "phase, implementation",
  [
    ("sparse", "xla"),
    pytest.param("sparse", "reference", marks=pytest.mark.slow),
    ("warmup", "xla"),
    # Layers run it under strict settings, below.
    pytest.param("warmup", "reference", marks=pytest.mark.slow),
  ],
)
def test_operations_under_strict_settings(implementation, phase):
  with strict():
    got = every_operation(implementation, phase)
  for x in got[:6]:  # the loss and its gradients
    assert np.isfinite(np.asarray(x, np.float32)).all()
  if (phase, implementation) == ("sparse", "xla"):
    return  # To compile all this once more takes as long as the other cases.
  for a, b in zip(got, every_operation(implementation, phase), strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
  "phase", [pytest.param("sparse", marks=pytest.mark.slow), "warmup"]
)
def test_nothing_leaks_from_a_choice_of_implementation(phase):
  """JAX counts what is traced before a kernel refuses a call as leaked."""
  with jax.checking_leaks():
    jax.jit(functools.partial(every_operation, None, phase)).trace(INPUTS)


# Operations, above, trace under these settings too, without kernels.
@pytest.mark.slow
@pytest.mark.parametrize("group_size", [2, 16])
def test_kernels_lower_under_strict_settings(
  group_size, pretend_hopper, monkeypatch, pairs_of_few_blocks
):
  """Tracing is where promotions are found; it needs no GPU."""
  case = Case(
    q_len=192, kv_len=192, num_heads=group_size, num_kv_heads=1, head_dim=64,
    index_dim=64,
  )  # fmt: skip
  options = dict(block_size=64, top_k=2, implementation="mosaic_gpu")
  inputs = case.inputs(dtype=jnp.bfloat16)

  def loss(q, k, v, index_q, index_k, **changes):
    out, kl, _, lse = msa_jax.msa_attention(
      q, k, v, index_q, index_k, with_kl=True, **options, **changes
    )
    return jnp.sum(out.astype(jnp.float32)) + kl + jnp.sum(lse)

  def decode(q, k, v, index_q, index_k):
    return msa_jax.decode_attention(
      q[:, -2:], k, v, index_q[:, -2:], index_k, kv_lengths=jnp.asarray([180]),
      **options,
    )  # fmt: skip

  programs = [jax.grad(loss, range(5)), decode]
  if group_size == 2:
    programs.append(jax.grad(functools.partial(loss, phase="warmup"), range(5)))
    programs.append(
      functools.partial(
        loss, kv_lengths=jnp.asarray([180]), score_precision="fp8"
      )
    )
  with strict():
    for program in programs:
      traced = jax.jit(program).trace(*inputs)
      assert (
        "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()
      )
    # Few blocks have a plan of their own.
    monkeypatch.setattr(
      sparse_attention_fwd, "heuristic_config", pairs_of_few_blocks
    )
    jax.jit(lambda *x: loss(*x)).trace(*inputs)


CONFIG = msa_jax.ModelConfig(
  vocab_size=32,
  num_layers=3,
  embed_dim=16,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  mlp_dim=16,
  rope_dim=4,
  layer_kinds=("gqa", "msa"),
  mlp_kinds=("dense", "moe"),
  moe=msa_jax.MoEConfig(num_experts=4, top_k=2, expert_dim=8, shared_dim=8),
  index=msa_jax.IndexConfig(index_dim=8, block_size=8, top_k=2),
  implementation="xla",
)
TOKENS = jax.random.randint(jax.random.key(0), (2, 24), 0, 32)


def use_model(**changes):
  """Loss, gradients, what the layers chose, and new tokens of a model."""
  config = dataclasses.replace(CONFIG, **changes)
  model = msa_jax.DecoderLM(config, rngs=nnx.Rngs(0))
  weights = jnp.ones(TOKENS.shape, jnp.float32)

  @nnx.jit
  def step(model):
    def loss(model):
      out = model(TOKENS, with_kl=True, with_selection=True)
      lm = msa_jax.head_loss(out.hidden, model.head_weight(), TOKENS, weights)
      return lm + jnp.sum(out.kl), (out.selection, out.logits)

    return nnx.value_and_grad(loss, has_aux=True)(model)

  write = functools.partial(
    generate.generate, model, [[1, 2, 3], [4, 5]], max_new_tokens=4
  )
  sampling = generate.Sampling(temperature=0.5, top_k=9, top_p=0.9)
  tokens = [write(), write(sampling=sampling, key=jax.random.key(1))]
  return jax.tree.leaves((step(model), tokens))


@pytest.mark.parametrize(
  "changes",
  [
    {},
    # Strict promotion of bfloat16 is refused by Flax's norms and JAX's dense
    # attention, so (1 + w) norms and MSA.
    dict(
      layer_kinds=("msa",),
      zero_centered_norm=True,
      dtype="bfloat16",
      scan_layers=True,
      activation="swiglu_oai",
    ),
  ],
)
@pytest.mark.slow
def test_models_under_strict_settings(changes):
  with strict():
    found = use_model(**changes)
  assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in found)


@pytest.mark.slow
@pytest.mark.parametrize(
  "options",
  [
    dict(selection="window"),
    dict(force_first_block=True, top_k=3),
    dict(value_head=True, detach_teacher=False),
  ],
)
def test_ablations_and_layer_options_under_strict_settings(options):
  index = dataclasses.replace(CONFIG.index, **options)
  x = jax.random.normal(jax.random.key(0), (2, 24, 16))
  with strict():
    layer = msa_jax.MSAttention(
      4, 16, num_kv_heads=2, index=index, sinks=True, use_bias=True,
      implementation="reference", rngs=nnx.Rngs(0),
    )  # fmt: skip

    def loss(layer, phase):
      out = layer(x, phase=phase, with_kl=True, with_selection=True)
      return jnp.sum(out.out) + out.kl

    for phase in ("sparse", "warmup"):
      grads = nnx.grad(lambda layer, phase=phase: loss(layer, phase))(layer)
      assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


@pytest.mark.slow
def test_training_under_strict_settings(tmp_path):
  """Also statistics that are NaN: no query of so short a context chooses."""
  run = tiny_run(
    tmp_path, num_steps=1, eval_batches=1, recipe=config_lib.RecipeConfig()
  )
  with jax.numpy_rank_promotion("raise"), jax.debug_nans(True):
    assert loop.run(run)["step"] == 1
  saved = np.load(tmp_path / "run" / "selection.npz")
  assert np.isnan(saved["kept"]).all()


# --- float64 ------------------------------------------------------------------


def numpy_layer(params, x, index, theta, rope_dim):
  """`MSAttention` (with index) or `GQAttention` in NumPy, head by head."""
  _, length, _ = x.shape
  params = {
    "/".join(path): np.asarray(leaf[...])
    for path, leaf in nnx.to_flat_state(params)
  }

  def rms(y, name):
    scale = params[f"{name}/scale"]
    return y / np.sqrt(np.mean(y * y, -1, keepdims=True) + 1e-6) * scale

  def rope(y, dims):
    half = dims // 2
    y = y.copy()
    for i in range(half):
      angle = POSITIONS * theta ** (-i / half)
      angle = angle[None, :, None]
      a, b = y[..., i].copy(), y[..., i + half].copy()
      y[..., i] = a * np.cos(angle) - b * np.sin(angle)
      y[..., i + half] = b * np.cos(angle) + a * np.sin(angle)
    return y

  def heads(name, norm, dims):
    y = np.einsum("bte,ehd->bthd", x, params[f"{name}/kernel"])
    return rope(rms(y, norm), dims)

  q, k = (heads(n, f"{n}_norm", rope_dim) for n in ("query", "key"))
  v = np.einsum("bte,ehd->bthd", x, params["value/kernel"])
  out = np.zeros_like(q)
  group = q.shape[2] // k.shape[2]
  causal = np.tril(np.ones((length, length), bool))
  for b in range(len(x)):
    for h in range(q.shape[2]):
      visible = causal
      if index is not None:
        visible = causal & index(b, h // group, params, heads)
      s = q[b, :, h] @ k[b, :, h // group].T * q.shape[-1] ** -0.5
      p = np.where(visible, np.exp(s), 0)
      p /= p.sum(-1, keepdims=True)
      out[b, :, h] = p @ v[b, :, h // group]
  return np.einsum("bthd,hde->bte", out, params["out/kernel"])


POSITIONS = np.arange(24) + 131_048


def test_float64_parameters_want_a_float64_computation():
  text = "dtype must be float64, because param_dtype is float64, got 'float32'"
  options = dict(param_dtype=jnp.float64, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match=text):
    msa_jax.GQAttention(4, 16, 32, **options)
  with pytest.raises(ValueError, match=text):
    msa_jax.MSAttention(4, 16, 32, index=CONFIG.index, **options)
  with pytest.raises(ValueError, match=text):
    dataclasses.replace(CONFIG, param_dtype="float64")


@pytest.mark.parametrize("kind", ["GQAttention", "MSAttention"])
def test_float64_layers_are_float64_throughout(kind, x64):
  """With positions at which float32 angles are off by 5e-3."""
  options = {}
  if kind == "MSAttention":
    options = dict(index=CONFIG.index, implementation="xla")
  layer = getattr(msa_jax, kind)(
    4, 16, 32, num_kv_heads=2, rope_dim=4, normalize_qk=True,
    dtype=jnp.float64, param_dtype=jnp.float64, rngs=nnx.Rngs(0), **options,
  )  # fmt: skip
  x = jax.random.normal(jax.random.key(0), (2, 24, 16), jnp.float64)
  out = layer(x, positions=jnp.asarray(POSITIONS))
  chosen = None
  if kind == "MSAttention":
    # Which blocks: checked by the operations' tests. Here: their softmax.
    selected = layer(
      x, positions=jnp.asarray(POSITIONS), with_selection=True
    ).selection.block_indices

    def chosen(b, g, params, heads):
      blocks = np.asarray(selected)[b, g]
      return (blocks[..., None] == np.arange(24) // 8).any(1)

    out = out.out
  want = numpy_layer(nnx.state(layer), np.asarray(x), chosen, 10_000.0, 4)
  assert out.dtype == jnp.float64
  np.testing.assert_allclose(out, want, rtol=1e-12, atol=1e-12)


def test_float64_models_are_float64_throughout(x64):
  """Neither a forward pass nor its KL nor a cache rounds to float32."""
  config = dataclasses.replace(CONFIG, dtype="float64", param_dtype="float64")
  model = msa_jax.DecoderLM(config, rngs=nnx.Rngs(0))
  graphdef, params = nnx.split(model)

  @jax.jit
  def run(params):
    model = nnx.merge(graphdef, params)
    out = model(TOKENS, with_kl=True, with_selection=True)
    cached = model.extend(TOKENS, model.init_cache(2, 32))
    return out, cached.logits

  out, cached = run(params)
  for x in jax.tree.leaves((out, cached)):
    assert x.dtype in (jnp.float64, jnp.int32), x
  np.testing.assert_allclose(cached, out.logits, rtol=1e-11, atol=1e-12)
  # Only the experts' choice bias is float32, in every model.
  program = str(jax.make_jaxpr(run)(params))
  assert set(re.findall(r"f32\[[\d,]*\]", program)) <= {"f32[4]", "f32[]"}
