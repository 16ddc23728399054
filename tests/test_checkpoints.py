"""Families of checkpoints: what they compute, what is saved, what is refused.

The truth is `oracle`, a few lines of NumPy in float64 that read a folder's
tensors by their names. tests/test_m3.py has MiniMax-M3 against transformers,
and the file format. The tests marked slow compare every family with
transformers itself, if that is installed.
"""

import dataclasses
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from helpers import run_on_devices
from test_m3 import (
  GOLDEN,
  OLDER,
  TINY,
  make,
  same_bits,
  tensors_of,
)

import msa_jax
from msa_jax import DecoderLM, IndexConfig, ModelConfig, checkpoints
from msa_jax.checkpoints import commands, generation
from msa_jax.checkpoints.families import FAMILIES
from msa_jax.checkpoints.families.base import rope_factor
from msa_jax.checkpoints.tensor_files import write
from msa_jax.generate import GREEDY, Sampling

TINY_CONFIG = (TINY / "config.json").read_text()
FAMILIES_DATA = pathlib.Path(__file__).parent / "data" / "families"
SWIGLU = ("gate", "up", "down")
TOKENS = np.random.default_rng(0).integers(0, 40, (2, 24))
SIZES = dict(
  vocab_size=40,
  hidden_size=32,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  head_dim=16,
  hidden_act="silu",
  rms_norm_eps=1e-5,
  max_position_embeddings=512,
  tie_word_embeddings=False,
  eos_token_id=[3, 4],
  torch_dtype="float32",
)
LLAMA3 = dict(
  factor=8.0,
  low_freq_factor=1.0,
  high_freq_factor=4.0,
  original_max_position_embeddings=16,
  rope_type="llama3",
)
CONFIGS = {
  "m2": dict(
    SIZES,
    architectures=["MiniMaxM2ForCausalLM"],
    model_type="minimax_m2",
    attn_type_list=[1, 1],
    intermediate_size=24,
    layernorm_mlp_beta=1.0,
    mlp_intermediate_size=8192,
    mtp_transformer_layers=1,
    num_experts_per_tok=2,
    num_local_experts=4,
    qk_norm_type="per_layer",
    rope_theta=5000000,
    rotary_dim=8,
    scoring_func="sigmoid",
    shared_intermediate_size=0,
    use_qk_norm=True,
    use_routing_bias=True,
  ),
  "qwen3": dict(
    SIZES,
    architectures=["Qwen3ForCausalLM"],
    model_type="qwen3",
    attention_bias=False,
    intermediate_size=48,
    max_window_layers=28,
    rope_scaling=None,
    rope_theta=1000000,
    sliding_window=4096,
    use_sliding_window=False,
  ),
  "qwen3_moe": dict(
    SIZES,
    architectures=["Qwen3MoeForCausalLM"],
    model_type="qwen3_moe",
    num_hidden_layers=3,
    attention_bias=False,
    decoder_sparse_step=1,
    intermediate_size=48,
    mlp_only_layers=[1],
    moe_intermediate_size=24,
    norm_topk_prob=True,
    num_experts=4,
    num_experts_per_tok=2,
    rope_parameters=dict(rope_type="default", rope_theta=1e6),
  ),
  "llama": dict(
    {k: v for k, v in SIZES.items() if k != "head_dim"},
    architectures=["LlamaForCausalLM"],
    model_type="llama",
    hidden_size=64,
    attention_bias=False,
    intermediate_size=48,
    is_llama_config=True,
    mlp_bias=False,
    pretraining_tp=1,
    rope_interleaved=False,
    rope_scaling=LLAMA3,
    rope_theta=500000.0,
    tie_word_embeddings=True,
  ),
  "mistral": dict(
    SIZES,
    architectures=["MistralForCausalLM"],
    model_type="mistral",
    intermediate_size=48,
    rope_theta=10000.0,
    sliding_window=None,
  ),
}


def shapes_of(config):
  """The tensors that a released folder of this config has."""
  c = {"head_dim": 16, **config}
  e, d = c["hidden_size"], c["head_dim"]
  h, k = c["num_attention_heads"], c["num_key_value_heads"]
  shapes = {"model.embed_tokens.weight": (40, e), "model.norm.weight": (e,)}
  if not c["tie_word_embeddings"]:
    shapes["lm_head.weight"] = (40, e)
  for layer in range(c["num_hidden_layers"]):
    own = {
      "input_layernorm.weight": (e,),
      "post_attention_layernorm.weight": (e,),
      "self_attn.q_proj.weight": (h * d, e),
      "self_attn.k_proj.weight": (k * d, e),
      "self_attn.v_proj.weight": (k * d, e),
      "self_attn.o_proj.weight": (e, h * d),
    }
    if c["model_type"].startswith(("qwen3", "minimax")):
      whole = c["model_type"] == "minimax_m2"
      own["self_attn.q_norm.weight"] = (h * d if whole else d,)
      own["self_attn.k_norm.weight"] = (k * d if whole else d,)
    if c["model_type"] == "minimax_m2":
      moe, f = "block_sparse_moe.", c["intermediate_size"]
      own |= {
        f"{moe}gate.weight": (4, e),
        f"{moe}e_score_correction_bias": (4,),
      }
      matrices = {"w1": (f, e), "w3": (f, e), "w2": (e, f)}
    else:
      moe, f = "mlp.", c.get("moe_intermediate_size")
      matrices = {"gate_proj": (f, e), "up_proj": (f, e), "down_proj": (e, f)}
    if f is not None and layer not in c.get("mlp_only_layers", []):
      own[f"{moe}gate.weight"] = (4, e)
      own |= {
        f"{moe}experts.{x}.{name}.weight": shape
        for x in range(4)
        for name, shape in matrices.items()
      }
    else:
      f = c["intermediate_size"]
      own |= {
        "mlp.gate_proj.weight": (f, e),
        "mlp.up_proj.weight": (f, e),
        "mlp.down_proj.weight": (e, f),
      }
    shapes |= {f"model.layers.{layer}.{n}": s for n, s in own.items()}
  return shapes


def random_tensors(config, seed=0):
  rng = np.random.default_rng(seed)
  tensors = {}
  for name, shape in shapes_of(config).items():
    value = rng.standard_normal(shape).astype(np.float32)
    if "norm" in name:
      value = 1 + 0.3 * value
    elif "e_score" in name:
      value = 0.2 * value
    elif "embed" not in name:
      value = value / np.sqrt(shape[-1])
    tensors[name] = np.asarray(value, np.float32)
  return tensors


def folder_of(folder, tensors, config, **documents):
  write(
    folder,
    {name: (value.dtype, value.shape) for name, value in tensors.items()},
    tensors.__getitem__,
    documents={"config.json": config, **documents},
    max_file_bytes=10**9,
  )
  return folder


def oracle(tensors, config, tokens=TOKENS):
  """Logits of a folder, in float64."""
  c = {"head_dim": 16, **config}
  m3 = "sparse_attention_config" in c
  w = {
    name.removeprefix("language_model."): value.astype(np.float64)
    for name, value in tensors.items()
  }
  d, h, k = (
    c[n] for n in ("head_dim", "num_attention_heads", "num_key_value_heads")
  )
  batch, length = tokens.shape
  rotary = c.get("rotary_dim", d)
  theta = c.get("rope_theta") or c["rope_parameters"]["rope_theta"]
  frequency = float(theta) ** (-np.arange(0, rotary, 2) / rotary)
  scaling = c.get("rope_scaling")
  if scaling:
    context, low, high = (
      scaling[n]
      for n in (
        "original_max_position_embeddings",
        "low_freq_factor",
        "high_freq_factor",
      )
    )
    turn = 2 * np.pi / frequency
    slow = frequency / scaling["factor"]
    part = (context / turn - low) / (high - low)
    mixed = (1 - part) * slow + part * frequency
    frequency = np.where(
      turn > context / low,
      slow,
      np.where(turn < context / high, frequency, mixed),
    )
  angle = np.arange(length)[:, None] * frequency

  def rotate(x):  # [B, T, heads, D]
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    a, b = np.split(x[..., :rotary], 2, axis=-1)
    turned = [a * cos - b * sin, b * cos + a * sin, x[..., rotary:]]
    return np.concatenate(turned, axis=-1)

  def norm(x, name):
    rms = np.sqrt((x**2).mean(-1, keepdims=True) + c["rms_norm_eps"])
    return x / rms * (w[name] + m3)

  def mlp(x, gate, up, down):
    g, u = x @ w[gate].T, x @ w[up].T
    if not m3:
      return (g / (1 + np.exp(-g)) * u) @ w[down].T
    limit, alpha = c["swiglu_limit"], c["swiglu_alpha"]
    g, u = np.minimum(g, limit), np.clip(u, -limit, limit)
    return (g / (1 + np.exp(-alpha * g)) * (u + 1)) @ w[down].T

  def reads(y, own):
    """Whether a query [B, K, T, S] of a sparse layer reads a token."""
    sparse = c["sparse_attention_config"]
    size = sparse["sparse_block_size"]
    queries, shared = (
      (y @ w[f"{own}self_attn.index_{n}_proj.weight"].T).reshape(
        batch, length, -1, sparse["sparse_index_dim"]
      )
      for n in "qk"
    )
    queries = rotate(norm(queries, f"{own}self_attn.index_q_norm.weight"))
    shared = rotate(norm(shared, f"{own}self_attn.index_k_norm.weight"))
    scores = np.einsum("btki,bsi->bkts", queries, shared[:, :, 0])
    scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
    starts = np.arange(0, length, size)
    best = np.maximum.reduceat(scores, starts, axis=-1)
    block = np.arange(len(starts))
    at = np.arange(length)[:, None] // size
    forced = (block <= at) & (block > at - sparse["sparse_local_block"])
    forced |= block < sparse["sparse_init_block"]
    best = np.where(forced, np.inf, best)
    order = np.argsort(-best, axis=-1, kind="stable")
    rank = np.argsort(order, axis=-1, kind="stable")
    return np.repeat(rank < sparse["sparse_topk_blocks"], size, -1)[
      ..., :length
    ]

  x = w["model.embed_tokens.weight"][tokens]
  for layer in range(c["num_hidden_layers"]):
    own = f"model.layers.{layer}."
    y = norm(x, f"{own}input_layernorm.weight")
    q, keys, values = (
      y @ w[f"{own}self_attn.{n}_proj.weight"].T for n in "qkv"
    )
    if c["model_type"] == "minimax_m2" and not m3:
      q = norm(q, f"{own}self_attn.q_norm.weight")
      keys = norm(keys, f"{own}self_attn.k_norm.weight")
    q, keys, values = (
      a.reshape(batch, length, -1, d) for a in (q, keys, values)
    )
    if c["model_type"].startswith("qwen3") or m3:
      q = norm(q, f"{own}self_attn.q_norm.weight")
      keys = norm(keys, f"{own}self_attn.k_norm.weight")
    q, keys = rotate(q), rotate(keys)
    keys, values = (np.repeat(a, h // k, axis=2) for a in (keys, values))
    scores = np.einsum("bthd,bshd->bhts", q, keys) / np.sqrt(d)
    seen = np.tri(length, dtype=bool)
    if m3:
      seen = seen & np.repeat(reads(y, own), h // k, axis=1)
    scores = np.where(seen, scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    out = np.einsum("bhts,bshd->bthd", p, values).reshape(batch, length, -1)
    x = x + out @ w[f"{own}self_attn.o_proj.weight"].T
    y = norm(x, f"{own}post_attention_layernorm.weight")
    m2 = c["model_type"] == "minimax_m2"
    moe = f"{own}{'block_sparse_moe' if m2 else 'mlp'}."
    if f"{moe}gate.weight" not in w:
      names = (f"{own}mlp.{n}_proj.weight" for n in SWIGLU)
      x = x + mlp(y, *names)
      continue
    logits = y @ w[f"{moe}gate.weight"].T
    if m2:
      s = 1 / (1 + np.exp(-logits))
      choice = s + w[f"{moe}e_score_correction_bias"]
    else:
      s = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
      choice = s
    top = np.argsort(-choice, axis=-1)[..., : c["num_experts_per_tok"]]
    weight = np.take_along_axis(s, top, axis=-1)
    if c.get("norm_topk_prob", True):
      weight = weight / weight.sum(-1, keepdims=True)
    matrices = ("w1", "w3", "w2")
    if not m2:
      matrices = ("gate_proj", "up_proj", "down_proj")
    weight = weight * c.get("routed_scaling_factor", 1.0)
    if m3:
      shared = (f"{moe}shared_experts.{n}_proj.weight" for n in SWIGLU)
      x = x + mlp(y, *shared)
    for e in range(4):
      each = mlp(y, *(f"{moe}experts.{e}.{m}.weight" for m in matrices))
      x = x + each * np.sum(weight * (top == e), -1, keepdims=True)
  x = norm(x, "model.norm.weight")
  tied = c["tie_word_embeddings"]
  head = "model.embed_tokens.weight" if tied else "lm_head.weight"
  return x @ w[head].T


@nnx.jit
def logits_of(model, tokens):
  return model(tokens).logits


def check(folder, want, **options):
  model = checkpoints.load(folder, **options)
  got = logits_of(model, jnp.asarray(TOKENS))
  np.testing.assert_allclose(got, want, atol=2e-5)
  return model


# --- What each family computes, and what is saved -----------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_family_equals_the_oracle_and_goes_back(name, tmp_path):
  config, tensors = CONFIGS[name], random_tensors(CONFIGS[name])
  want = oracle(tensors, config)
  folder = folder_of(tmp_path / "in", tensors, config)
  model = check(folder, want, scan_layers=name == "qwen3_moe")
  checkpoints.save(model, tmp_path / "out")
  same_bits(tensors, tensors_of(tmp_path / "out"))
  saved = json.loads((tmp_path / "out" / "config.json").read_text())
  want = {k: v for k, v in config.items() if k != "mtp_transformer_layers"}
  if name == "m2":  # which some versions of transformers need
    want["partial_rotary_factor"] = 0.5
  assert saved == want
  # A model of the same config that comes from no checkpoint has the same
  # identity, but that Mistral's models are Llama's.
  model.source = None
  checkpoints.save(model, tmp_path / "fresh")
  saved = json.loads((tmp_path / "fresh" / "config.json").read_text())
  family = config["model_type"].replace("mistral", "llama")
  assert saved["model_type"] == family
  same_bits(tensors, tensors_of(tmp_path / "fresh"))
  assert checkpoints.read_config(tmp_path / "fresh") == dataclasses.replace(
    model.config, scan_layers=False
  )


def test_whole_projection_norms_are_known_by_the_model_type(tmp_path):
  """Also of M2's first release, whose model_type is that of older models."""
  config = dict(CONFIGS["m2"], model_type="minimax")
  del config["qk_norm_type"]
  (tmp_path / "config.json").write_text(json.dumps(config))
  read = checkpoints.read_config(tmp_path)
  assert read.qk_norm_over == "projection" and set(read.mlps) == {"moe"}


MESH = """
import pathlib, sys
import jax, numpy as np
from msa_jax import checkpoints
from test_checkpoints import CONFIGS, TOKENS, folder_of, logits_of
from test_checkpoints import oracle, random_tensors, same_bits, tensors_of

config = CONFIGS["m2"]
tensors = random_tensors(config)
folder = folder_of(pathlib.Path(sys.argv[1]), tensors, config)
mesh = jax.make_mesh(
  (2, 2), ("expert", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2
)
model = checkpoints.load(folder, mesh=mesh)
kernel = model.layers[0].attention.query.kernel[...]
assert kernel.sharding.spec == jax.P(None, "tensor", None)
with jax.set_mesh(mesh):
  got = logits_of(model, jax.numpy.asarray(TOKENS))
np.testing.assert_allclose(got, oracle(tensors, config), atol=2e-5)
checkpoints.save(model, sys.argv[2])
same_bits(tensors, tensors_of(sys.argv[2]))
"""


def test_norms_over_heads_that_a_mesh_splits(tmp_path):
  run_on_devices(4, MESH, tmp_path / "in", tmp_path / "out")


def test_router_without_normalised_weights(tmp_path):
  config = dict(CONFIGS["qwen3_moe"], norm_topk_prob=False)
  tensors = random_tensors(config)
  check(folder_of(tmp_path / "x", tensors, config), oracle(tensors, config))


@pytest.mark.parametrize("name", ["m2", "qwen3_moe"])
def test_stacked_experts_load_and_are_saved_one_by_one(name, tmp_path):
  """As some versions of transformers save them."""
  config, tensors = CONFIGS[name], random_tensors(CONFIGS[name])
  stacked = {n.replace("block_sparse_moe", "mlp"): tensors[n] for n in tensors}
  gate, up, down = ("w1", "w3", "w2")
  if name == "qwen3_moe":
    gate, up, down = ("gate_proj", "up_proj", "down_proj")
  for first in [n for n in stacked if n.endswith(f"experts.0.{gate}.weight")]:
    base = first.removesuffix(f"0.{gate}.weight")
    both, last = [], []
    for e in range(4):
      parts = [stacked.pop(f"{base}{e}.{n}.weight") for n in (gate, up, down)]
      both.append(np.concatenate(parts[:2]))
      last.append(parts[2])
    stacked[f"{base}gate_up_proj"] = np.stack(both)
    stacked[f"{base}down_proj"] = np.stack(last)
  model = checkpoints.load(folder_of(tmp_path / "in", stacked, config))
  checkpoints.save(model, tmp_path / "out")
  same_bits(tensors, tensors_of(tmp_path / "out"))


def test_a_tied_head_must_be_the_embedding(tmp_path):
  config, tensors = CONFIGS["llama"], random_tensors(CONFIGS["llama"])
  copy = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}
  model = check(
    folder_of(tmp_path / "same", copy, config), oracle(tensors, config)
  )
  checkpoints.save(model, tmp_path / "out")
  same_bits(tensors, tensors_of(tmp_path / "out"))
  # The same values in another dtype are the same.
  half = {name: value.astype(np.float16) for name, value in copy.items()}
  half["lm_head.weight"] = half["lm_head.weight"].astype(np.float32)
  checkpoints.load(folder_of(tmp_path / "half", half, config))
  other = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}
  with pytest.raises(ValueError, match=r"lm_head.weight differs from model.em"):
    checkpoints.load(folder_of(tmp_path / "other", other, config))


# --- Quantised weights --------------------------------------------------------


def write_raw(folder, tensors, config):
  """A folder of any dtypes, in one file, by another program."""
  from safetensors import TensorSpec, serialize_file

  codes = {"float8_e4m3fn": "float8_e4m3fn", "uint8": "uint8"}
  folder.mkdir()
  specs = {
    name: TensorSpec(
      dtype=codes.get(value.dtype.name, value.dtype.name),
      shape=list(value.shape),
      data_ptr=value.ctypes.data,
      data_len=value.nbytes,
    )
    for name, value in tensors.items()
  }
  serialize_file(specs, str(folder / "model.safetensors"))
  (folder / "config.json").write_text(json.dumps(config))
  return folder


FP8 = dict(
  quant_method="fp8",
  fmt="float8_e4m3fn",
  activation_scheme="dynamic",
  weight_block_size=[16, 16],
  modules_to_not_convert=["gate", "e_score_correction_bias", "lm_head"],
)
MXFP8 = dict(
  quant_method="mxfp8",
  activation_scheme="dynamic",
  weight_block_size=[1, 32],
  ignored_layers=["lm_head"],
)


def quantise(value, block, powers):
  """e4m3 codes, scales, and what they stand for in float64."""
  rows, columns = block
  spread = [-(-size // n) for size, n in zip(value.shape, block)]
  rng = np.random.default_rng(value.size)
  if powers:
    scales = rng.integers(118, 124, spread).astype(np.uint8)
    factors = 2.0 ** (scales.astype(np.float64) - 127)
  else:
    scales = rng.uniform(0.005, 0.02, spread).astype(np.float32)
    factors = scales.astype(np.float64)
  factors = np.repeat(np.repeat(factors, rows, 0), columns, 1)
  factors = factors[: value.shape[0], : value.shape[1]]
  # e4m3 ends at 448.
  codes = np.clip(value / factors, -448, 448).astype(ml_dtypes.float8_e4m3fn)
  return codes, scales, codes.astype(np.float64) * factors


def quantised_tensors(tensors, block, powers, skip=("gate.weight",)):
  """Codes and scales of all projections, and the values that they stand for."""
  raw, values = {}, dict(tensors)
  for name, value in tensors.items():
    last = name.split(".")[-2] if name.count(".") > 1 else name
    inner = ".layers." in name and value.ndim == 2
    if not inner or "norm" in last or name.endswith(skip):
      raw[name] = value
      continue
    codes, scales, values[name] = quantise(value, block, powers)
    raw |= {name: codes, f"{name}_scale_inv": scales}
  return raw, values


def test_fp8_folder_equals_its_dequantised_one(tmp_path):
  """MiniMax-M2's: float32 scales of blocks, the last of which are cut."""
  config = dict(CONFIGS["m2"], quantization_config=FP8)
  tensors = random_tensors(config)
  # 24 inputs and outputs make one block and a half.
  raw, values = quantised_tensors(tensors, (16, 16), powers=False)
  assert sum(name.endswith("_scale_inv") for name in raw) == 2 * (4 + 12)
  folder = write_raw(tmp_path / "fp8", raw, config)
  model = check(folder, oracle(values, config), dtype="float32")
  kernel = np.asarray(model.layers[0].attention.query.kernel[...])
  want = values["model.layers.0.self_attn.q_proj.weight"]
  np.testing.assert_allclose(kernel.reshape(32, 64), want.T, rtol=2e-7)
  # What was quantised is saved as it was dequantised.
  checkpoints.save(model, tmp_path / "out")
  saved = json.loads((tmp_path / "out" / "config.json").read_text())
  assert "quantization_config" not in saved
  assert set(tensors_of(tmp_path / "out")) == set(tensors)
  # Without a dtype: config.json's, and each value is rounded once.
  folder = write_raw(
    tmp_path / "bf16", raw, dict(config, torch_dtype="bfloat16")
  )
  half = checkpoints.load(folder).layers[0].attention.query.kernel[...]
  assert half.dtype == jnp.bfloat16
  np.testing.assert_array_equal(
    np.asarray(half).reshape(32, 64),
    want.T.astype(np.float32).astype(ml_dtypes.bfloat16),
  )


def test_mxfp8_folder_is_exact_in_bfloat16(tmp_path):
  """MiniMax-M3-MXFP8's: bytes that are powers of two, a tensor at a time."""
  text = dict(OLDER)
  config = dict(
    model_type="minimax_m3_vl", text_config=text, quantization_config=MXFP8
  )
  # Some index projections are quantised and some are not: sources differ.
  skip = ("moe.gate.weight", "layers.2.self_attn.index_q_proj.weight")
  tensors = tensors_of(TINY)
  raw, values = quantised_tensors(tensors, (1, 32), powers=True, skip=skip)
  plain = {name: value.astype(np.float32) for name, value in values.items()}
  coded = [n for n in raw if f"{n}_scale_inv" in raw]
  assert len(coded) > 60
  for name in coded:  # bfloat16 holds exactly what the codes stand for
    value = values[name].astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(value.astype(np.float64), values[name])
  # 48 and 40 inputs are one block of 32 and a part of one.
  folder = write_raw(tmp_path / "mx", raw, config)
  want = checkpoints.load(make(tmp_path / "plain", plain))
  for dtype in ("float32", "bfloat16"):
    got = checkpoints.load(folder, dtype=dtype)
    for (path, a), (_, b) in zip(
      nnx.to_flat_state(nnx.state(got)), nnx.to_flat_state(nnx.state(want))
    ):
      a, b = np.asarray(a[...]), np.asarray(b[...])
      np.testing.assert_array_equal(a, b.astype(a.dtype), err_msg=str(path))


def test_show_names_the_quantisation(tmp_path, capsys):
  config = dict(CONFIGS["m2"], quantization_config=FP8)
  raw, _ = quantised_tensors(random_tensors(config), (16, 16), powers=False)
  folder = write_raw(tmp_path / "fp8", raw, config)
  assert commands.main(["show", str(folder)]) == 0
  out = capsys.readouterr().out
  assert "family     MiniMax-M2" in out
  assert "theta 5e+06, QK-norm over the projection, norms scale by w" in out
  assert "F8_E4M3 with F32 scales (32 tensors)" in out


@pytest.mark.parametrize(
  ("change", "text"),
  [
    ("no scales", r"q_proj.weight F8_E4M3"),
    ("no codes", r"unexpected: .*q_proj.weight_scale_inv"),
    ("misshapen", r"q_proj.weight scales \[4, 1\], wanted \[4, 2\]"),
    ("no config", r"or F8_E4M3 with scales in NAME_scale_inv and a quantiza"),
  ],
)
def test_wrong_scales(tmp_path, change, text):
  config = dict(CONFIGS["m2"], quantization_config=FP8)
  tensors = random_tensors(config)
  raw, _ = quantised_tensors(tensors, (16, 16), powers=False)
  name = "model.layers.0.self_attn.q_proj.weight"
  scales = f"{name}_scale_inv"
  if change == "no scales":
    del raw[scales]
  elif change == "no codes":
    raw[name] = tensors[name]
  elif change == "misshapen":
    raw[scales] = np.ascontiguousarray(raw[scales][:, :1])
  else:
    del config["quantization_config"]
  with pytest.raises(ValueError, match=text):
    checkpoints.load(write_raw(tmp_path / "x", raw, config))


def test_some_experts_that_are_not_quantised(tmp_path):
  """An asked dtype is given; else the one that holds all of them exactly."""
  config = dict(CONFIGS["m2"], quantization_config=FP8, torch_dtype="bfloat16")
  tensors = random_tensors(config)
  plain = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
  skip = ("gate.weight", plain)
  raw, values = quantised_tensors(tensors, (16, 16), powers=False, skip=skip)
  folder = write_raw(tmp_path / "fp8", raw, config)
  for options, kept in (
    (dict(dtype="float32", scan_layers=True), np.float32),
    (dict(dtype="bfloat16"), ml_dtypes.bfloat16),
    ({}, np.float32),
  ):
    model = checkpoints.load(folder, **options)
    gates = np.asarray(model.layers[-1].mlp.gate[...])
    assert gates.dtype == kept
    gates = gates[-1] if options.get("scan_layers") else gates
    want = values[plain].T.astype(kept)
    np.testing.assert_array_equal(gates[2], want)
    want = values[plain.replace(".2.w1", ".1.w1")].T.astype(np.float32)
    if options.get("dtype") != "float32":  # rounded once, to config.json's
      want = want.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(gates[1], want.astype(kept))


def test_layers_of_multi_token_prediction_are_skipped(tmp_path, caplog):
  """MiniMax-M2's follow its own layers, as many as config.json says."""
  config = dict(CONFIGS["m2"], num_mtp_modules=1, use_mtp=True)
  tensors = random_tensors(config)
  more = {
    name.replace("layers.1.", "layers.2."): value
    for name, value in tensors.items()
    if "layers.1." in name
  }
  more["model.layers.2.eh_proj.weight"] = np.zeros(3, np.float32)
  folder = folder_of(tmp_path / "x", tensors | more, config)
  model = checkpoints.load(folder)
  assert f"skipped mtp.* ({len(more)} tensors)" in caplog.text
  checkpoints.save(model, tmp_path / "out")
  same_bits(tensors, tensors_of(tmp_path / "out"))
  config["num_mtp_modules"] = 0
  folder = folder_of(tmp_path / "y", tensors | more, config)
  with pytest.raises(ValueError, match=r"unexpected: model.layers.2.block"):
    checkpoints.load(folder)


def test_names_with_and_without_the_prefix(tmp_path):
  tensors = random_tensors(CONFIGS["llama"])
  both = {f"language_model.{name}": value for name, value in tensors.items()}
  both["model.norm.weight"] = 3 * tensors["model.norm.weight"]
  folder = folder_of(tmp_path / "x", both, CONFIGS["llama"])
  with pytest.raises(ValueError, match=r"prefix 'language_model.': model"):
    checkpoints.load(folder)


# --- MiniMax-M3.1 and models of our own ---------------------------------------


def m31(**sparse):
  text = dict(OLDER, **sparse)
  text["sparse_attention_config"] = dict(
    OLDER["sparse_attention_config"],
    sparse_attention_freq=[1] * 4,
    sparse_disable_index_value=[1] * 4,
    sparse_init_block=1,
  )
  return dict(model_type="minimax_m3_vl", text_config=text)


def test_m31_keeps_the_first_block(tmp_path):
  """All layers sparse, and block 0 forced."""
  tensors = tensors_of(TINY)
  for name, value in list(tensors.items()):
    if "layers.1.self_attn.index_" in name:
      tensors[name.replace("layers.1", "layers.0")] = value
  folder = folder_of(tmp_path / "m31", tensors, m31())
  model = checkpoints.load(folder)
  assert model.config.kinds == ("msa",) * 4
  assert model.config.index.force_first_block
  tokens = jnp.asarray(GOLDEN["input_ids"][:1])
  out = model(tokens, with_selection=True)
  blocks = np.asarray(out.selection.block_indices)
  assert np.all(blocks[..., 0] == 0)
  want = oracle(tensors, m31()["text_config"], np.asarray(tokens))
  np.testing.assert_allclose(out.logits, want, atol=2e-5)
  # It matters: without it, the index would leave block 0 out.
  free = json.loads(json.dumps(m31()["text_config"]))
  free["sparse_attention_config"]["sparse_init_block"] = 0
  other = oracle(tensors, free, np.asarray(tokens))
  assert np.abs(want - other).max() > 0.01
  checkpoints.save(model, tmp_path / "out")
  same_bits(tensors, tensors_of(tmp_path / "out"))
  saved = json.loads((tmp_path / "out" / "config.json").read_text())
  assert saved["text_config"] == {
    k: v for k, v in m31()["text_config"].items() if k != "num_mtp_modules"
  }
  # transformers' model has no such block, so the model is none of its.
  model.source = None
  checkpoints.save(model, tmp_path / "own")
  saved = json.loads((tmp_path / "own" / "config.json").read_text())
  assert saved["model_type"] == "msa_jax"
  assert checkpoints.read_config(tmp_path / "own") == model.config


def test_nvfp4_is_refused(tmp_path):
  config = m31()
  config["quantization_config"] = dict(
    quant_method="mxfp8",
    moe_quant_algo="NVFP4",
    moe_quant_format="nvfp4-pack-quantized",
  )
  (tmp_path / "config.json").write_text(json.dumps(config))
  with pytest.raises(
    ValueError, match=r"moe_quant_algo='NVFP4'.*NVFP4 are not"
  ):
    checkpoints.load(tmp_path)
  tensors = tensors_of(TINY)
  name = "language_model.model.layers.1.block_sparse_moe.experts.0.w1.weight"
  tensors[f"{name}_packed"] = tensors.pop(name)
  with pytest.raises(ValueError, match="packed weights of 4 bits are not supp"):
    checkpoints.load(make(tmp_path / "packed", tensors))


def to_msa(model, **options):
  index = IndexConfig(index_dim=8, block_size=4, top_k=2, **options)
  config = dataclasses.replace(
    model.config, layer_kinds=("msa",), index=index, implementation="xla"
  )
  return msa_jax.to_msa(model, config, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
  "name",
  [
    "m2",
    *(pytest.param(x, marks=pytest.mark.slow) for x in ("qwen3", "llama")),
  ],
)
def test_an_msa_model_of_another_family_is_our_own(name, tmp_path):
  """Its warm-up is what the model was; it goes into a folder and back."""
  config, tensors = CONFIGS[name], random_tensors(CONFIGS[name])
  folder = folder_of(tmp_path / "in", tensors, config)
  model = to_msa(checkpoints.load(folder))
  out = model(jnp.asarray(TOKENS), phase="warmup", with_selection=True)
  np.testing.assert_allclose(out.logits, oracle(tensors, config), atol=2e-5)
  checkpoints.save(model, tmp_path / "out")
  saved = json.loads((tmp_path / "out" / "config.json").read_text())
  assert saved["model_type"] == "msa_jax" and saved["eos_token_id"] == [3, 4]
  assert saved["architectures"] == ["MSAJaxDecoderLM"]
  again = checkpoints.load(tmp_path / "out", implementation="xla")
  assert again.config == model.config
  for (path, a), (_, b) in zip(
    nnx.to_flat_state(nnx.state(model)), nnx.to_flat_state(nnx.state(again))
  ):
    np.testing.assert_array_equal(a[...], b[...], err_msg=str(path))
  checkpoints.save(again, tmp_path / "twice")
  assert json.loads((tmp_path / "twice" / "config.json").read_text()) == saved


def test_whole_projection_norms_go_into_the_index():
  """With one KV head of one query head, D = I and blocks of one token, the
  index ranks as the head does, whatever the norms' scales are."""
  config = ModelConfig(
    vocab_size=40,
    num_layers=1,
    embed_dim=16,
    num_heads=1,
    num_kv_heads=1,
    head_dim=8,
    mlp_dim=16,
    rope_dim=4,
    qk_norm_over="projection",
  )
  gqa = DecoderLM(config, rngs=nnx.Rngs(0))
  attention = gqa.layers[0].attention
  for i, norm in enumerate((attention.query_norm, attention.key_norm)):
    norm.scale[...] = jax.random.uniform(jax.random.key(i), (8,)) + 0.5
  index = IndexConfig(index_dim=8, block_size=1, top_k=5, num_local_blocks=0)
  config = dataclasses.replace(
    config, layer_kinds=("msa",), index=index, implementation="xla"
  )
  msa = msa_jax.to_msa(gqa, config, rngs=nnx.Rngs(1))
  out = msa(jnp.asarray(TOKENS), phase="warmup", with_selection=True)
  np.testing.assert_array_equal(out.selection.block_recall, 1.0)
  # Heads of different scales: the index's kernel and norm together are the mean
  # of the scaled heads.
  wide = dataclasses.replace(config, num_heads=4, num_kv_heads=2, head_dim=8)
  gqa = DecoderLM(
    dataclasses.replace(wide, layer_kinds=("gqa",)), rngs=nnx.Rngs(0)
  )
  attention = gqa.layers[0].attention
  for name, heads in (("query", 4), ("key", 2)):
    scale = jnp.arange(1.0, 1 + 8 * heads).at[3].set(-2.0)
    getattr(attention, f"{name}_norm").scale[...] = scale
  layer = msa_jax.to_msa(gqa, wide, rngs=nnx.Rngs(1)).layers[0].attention
  q, k = (
    getattr(attention, name).kernel[...]
    * getattr(attention, f"{name}_norm").scale[...].reshape(-1, 8)
    for name in ("query", "key")
  )
  for name, want in (
    ("query", q.reshape(16, 2, 2, 8).mean(2)),
    ("key", k.mean(1)),
  ):
    kernel = getattr(layer, f"index_{name}").kernel[...]
    scale = getattr(layer, f"index_{name}_norm").scale[...]
    np.testing.assert_allclose(kernel * scale, want, rtol=2e-5, atol=1e-6)


# --- Refusals -----------------------------------------------------------------


@pytest.mark.parametrize(
  ("name", "changes", "text"),
  [
    # How the rotary embedding is written.
    ("qwen3", dict(rope_scaling=dict(type="yarn")), "rope_type='yarn' is not"),
    ("m2", dict(rope_parameters=dict(type="linear", factor=2)), "='linear' is"),
    ("m2", dict(rope_scaling=dict(rope_type="llama3")), "'llama3' is not supp"),
    (
      "qwen3",
      dict(rope_scaling=dict(factor=4.0)),
      "rope_scaling.factor=4.0: Q",
    ),
    (
      "qwen3",
      dict(rope_parameters=dict(full_attention=dict(rope_theta=1e6))),
      r"rope_parameters is nested by layer type \(\['full_attention'\]\)",
    ),
    ("qwen3", dict(rope_theta=None), "field missing: rope_theta"),
    ("m2", dict(rotary_dim=None), "missing: rotary_dim or partial_rotary_fact"),
    ("llama", dict(rope_theta="5e6"), "rope_theta must be a number.*'5e6'"),
    ("qwen3", dict(partial_rotary_factor=0.5), "8 of head_dim=16 dims rotate"),
    (
      "llama",
      dict(rope_scaling=dict(rope_type="llama3", factor=8)),
      "field missing: low_freq_factor of rope_type 'llama3'",
    ),
    (
      "llama",
      dict(rope_scaling=LLAMA3 | dict(high_freq_factor=0.5)),
      "high_frequency_factor must be above low_frequency_factor",
    ),
    # What changes the attention.
    (
      "m3",
      dict(attention_output_gate=True),
      "attention_output_gate=True is no",
    ),
    ("m3", dict(qk_norm_type="per_layer"), "qk_norm_type='per_layer' is not"),
    ("m2", dict(qk_norm_type="per_head"), "qk_norm_type='per_head' is not"),
    ("m2", dict(attn_type_list=[1, 0]), "attn_type_list with 0 is not support"),
    (
      "m2",
      dict(attn_type_list=[1]),
      "attn_type_list has 1 entries, num_hidden",
    ),
    ("llama", dict(attention_bias=True), "attention_bias=True is not support"),
    ("llama", dict(mlp_bias=True), "mlp_bias=True is not supported"),
    ("llama", dict(sliding_window=99), "sliding_window=99: Llama has no such"),
    ("llama", dict(attn_logit_softcapping=50.0), "attn_logit_softcapping=50.0"),
    ("qwen3", dict(final_logit_softcapping=3.0), "final_logit_softcapping=3.0"),
    ("qwen3", dict(use_sliding_window=True), "use_sliding_window=True is not"),
    (
      "qwen3",
      dict(layer_types=["full_attention", "sliding_attention"]),
      r"layer_types: unknown \['sliding_attention'\]",
    ),
    (
      "mistral",
      dict(sliding_window=4096),
      "sliding_window=4096: layers with a",
    ),
    ("mistral", dict(sliding_window=0), "sliding_window=0: layers with a"),
    ("mistral", dict(head_dim="16"), "head_dim must be an integer"),
    # What changes the experts.
    ("m3", dict(norm_topk_prob=False), "norm_topk_prob=False is not supported"),
    ("m3", dict(n_group=4), "n_group=4 is not supported: only 1"),
    (
      "m2",
      dict(shared_intermediate_size=8),
      "shared_intermediate_size=8 is no",
    ),
    ("m2", dict(num_experts_per_tok=5), "the experts' top_k must be at most"),
    (
      "qwen3_moe",
      dict(mlp_only_layers=["1"]),
      r"mlp_only_layers must be a list of integers, got \['1'\]",
    ),
    ("qwen3_moe", dict(norm_topk_prob=1), "norm_topk_prob must be true or fal"),
    (
      "qwen3_moe",
      dict(shared_expert_intermediate_size=8),
      "shared_expert_intermediate_size=8 is not supported: only 0",
    ),
    (
      "m3",
      dict(first_k_dense_replace="1"),
      "first_k_dense_replace must be an integer, got '1'",
    ),
    # What changes the Index Branch.
    ("m3", dict(use_index_cache=True), "use_index_cache=True is not supported"),
    ("m3", dict(index_topk_freq=4), "index_topk_freq=4 is not supported"),
    (
      "m3",
      dict(sparse_attention_config=dict(sparse_init_tokens=128)),
      "sparse_attention_config.sparse_init_tokens=128 is not supported",
    ),
    (
      "m3",
      dict(sparse_attention_config=dict(sparse_local_tokens=128)),
      "sparse_attention_config.sparse_local_tokens=128: MiniMax-M3 has no such",
    ),
    (
      "m3",
      dict(sparse_attention_config=dict(sparse_disable_index_value=[0] * 4)),
      "sparse_disable_index_value=0 in a sparse layer is not supported",
    ),
    # Anything else, and other families.
    ("qwen3", dict(some_new_switch=True), "some_new_switch=True: Qwen3 has no"),
    ("llama", dict(text_config=dict(a=1)), "text_config in a config of Llama"),
    (
      "llama",
      dict(model_type="gemma3", architectures=["Gemma3ForCausalLM"]),
      r"'gemma3' with architectures=\['Gemma3ForCausalLM'\] is not among the",
    ),
    (
      "llama",
      dict(architectures=["GemmaForCausalLM"]),
      r"'llama' contradicts architectures=\['GemmaForCausalLM'\]: Llama has",
    ),
    (
      "llama",
      dict(dtype="bfloat16"),
      "fields disagree: dtype='bfloat16', torch_dtype='float32'",
    ),
    (
      "llama",
      dict(model_type=None, architectures=None),
      "model_type=None with",
    ),
    ("own", dict(num_layers=0), "model: num_layers must be an integer of at"),
    (
      "own",
      dict(new_option=1),
      "model.new_option=1: msa_jax has no such field",
    ),
    ("own", dict(index=dict(depth=1)), "unexpected keyword argument 'depth'"),
  ],
)
def test_refusals(name, changes, text, tmp_path):
  """Each before any tensor is looked at, and by the field's name."""
  if name == "m3":
    config = json.loads((TINY / "config.json").read_text())
  elif name == "own":
    described = FAMILIES[-1].describe(
      ModelConfig(
        vocab_size=8,
        num_layers=1,
        embed_dim=8,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        mlp_dim=8,
      )
    )
    changes = dict(model=described["model"] | changes)
    config = described
  else:
    config = CONFIGS[name]
  (tmp_path / "config.json").write_text(json.dumps(config | changes))
  with pytest.raises(ValueError, match=text) as error:
    checkpoints.load(tmp_path)
  # No other field is said to be unknown.
  for line in str(error.value).splitlines():
    assert "no such field" not in line or any(key in line for key in changes)


@pytest.mark.parametrize(
  ("name", "gone", "changes", "theta", "dims"),
  [
    ("m3", ["rope_parameters"], dict(rotary_dim=16), 5e6, 16),
    ("m2", ["rope_theta"], {}, 5e6, 8),
    ("llama", ["rope_theta", "rope_scaling"], {}, 1e4, 16),
    # transformers cuts the number of dims to an integer, here 8.8 to 8.
    ("m2", ["rotary_dim"], dict(partial_rotary_factor=0.55), 5e6, 8),
  ],
)
def test_what_missing_rope_fields_stand_for(
  name, gone, changes, theta, dims, tmp_path
):
  """transformers' own defaults."""
  config = dict(CONFIGS.get(name) or json.loads(TINY_CONFIG))
  config = {k: v for k, v in config.items() if k not in gone} | changes
  (tmp_path / "config.json").write_text(json.dumps(config))
  read = checkpoints.read_config(tmp_path)
  assert (read.rope_theta, read.rope_dim, read.rope_scaling) == (
    theta,
    dims,
    None,
  )


def test_rotary_dims_come_back_from_the_factor_that_is_written():
  """Also where the factor is rounded and the product cut to an integer."""
  for head_dim in range(2, 260, 2):
    for dims in range(2, head_dim + 1, 2):
      config = ModelConfig(
        **dict(vocab_size=8, num_layers=1, embed_dim=8, num_heads=1),
        **dict(num_kv_heads=1, mlp_dim=8, head_dim=head_dim, rope_dim=dims),
      )
      assert int(head_dim * rope_factor(config)) == dims


def test_fields_of_qwen3_coder_are_harmless(tmp_path):
  more = dict(
    qkv_bias=False, shared_expert_intermediate_size=0, use_qk_norm=True
  )
  config = CONFIGS["qwen3_moe"]
  (tmp_path / "config.json").write_text(json.dumps(config))
  want = checkpoints.read_config(tmp_path)
  (tmp_path / "config.json").write_text(json.dumps(config | more))
  assert checkpoints.read_config(tmp_path) == want


@pytest.mark.parametrize(
  ("outer", "inner", "text"),
  [
    (dict(tie_word_embeddings=True), {}, "tie_word_embeddings=True, text_conf"),
    (
      dict(torch_dtype="bfloat16"),
      dict(torch_dtype="float32"),
      "disagree: torch_dtype='bfloat16', text_config.torch_dtype='float32'",
    ),
    (
      dict(quantization_config=MXFP8),
      dict(quantization_config=FP8),
      "fields disagree: quantization_config=",
    ),
    ({}, dict(model_type="qwen3"), "text_config.model_type='qwen3' is of anot"),
    (
      {},
      dict(architectures=["Qwen3ForCausalLM"]),
      r"text_config.architectures=\['Qwen3ForCausalLM'\] is of another family",
    ),
  ],
)
def test_a_config_that_contradicts_its_text_config(
  outer, inner, text, tmp_path
):
  config = m31() | outer
  config["text_config"] = config["text_config"] | inner
  (tmp_path / "config.json").write_text(json.dumps(config))
  with pytest.raises(ValueError, match=text):
    checkpoints.read_config(tmp_path)


def test_a_mistral_without_the_field_has_a_window(tmp_path):
  config = {
    k: v for k, v in CONFIGS["mistral"].items() if k != "sliding_window"
  }
  (tmp_path / "config.json").write_text(json.dumps(config))
  with pytest.raises(
    ValueError, match="sliding_window=4096: layers with a win"
  ):
    checkpoints.read_config(tmp_path)


def test_unknown_fields_beside_the_text_model(tmp_path):
  config = dict(m31(), vision_config={}, image_token_index=3, other_switch=2)
  (tmp_path / "config.json").write_text(json.dumps(config))
  with pytest.raises(
    ValueError, match="other_switch=2: MiniMax-M3 has no"
  ) as e:
    checkpoints.read_config(tmp_path)
  assert "image_token_index" not in str(e.value)


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
PAGE = "\n<!DOCTYPE html><html>"


@pytest.mark.parametrize(
  "file", ["config.json", "model.safetensors", "model.safetensors.index.json"]
)
@pytest.mark.parametrize(
  ("content", "text"),
  [
    (LFS, "is a pointer of Git LFS and not the file itself"),
    (PAGE, "is an HTML page and not the file itself"),
    ("<head><title>x</title>", "is an HTML page"),
    ("\ufeff<!-- saved --><html>", "is an HTML page"),
    ("<?xml version='1.0'?><Error/>", "is an HTML page"),
    ("Access to this is restricted", "no safetensors file: it.*Access|be read"),
    ('{"error": "Unauthorized"}', "no safetensors file|weight_map|type=None"),
  ],
)
def test_files_that_are_something_else(tmp_path, file, content, text):
  for name in ("config.json", "model.safetensors"):
    (tmp_path / name).write_bytes((TINY / name).read_bytes())
  (tmp_path / file).write_text(content)
  with pytest.raises(ValueError, match=f"{file}.*({text})") as error:
    checkpoints.load(tmp_path)
  assert "truncated" not in str(error.value)


@pytest.mark.parametrize("place", ["../model.safetensors", "/etc/passwd"])
def test_an_index_outside_of_its_folder(tmp_path, place):
  folder = make(tmp_path / "x")
  index = folder / "model.safetensors.index.json"
  index.write_text(json.dumps(dict(weight_map={"a": place})))
  with pytest.raises(ValueError, match=f"outside of its folder: {place}"):
    checkpoints.load(folder)


# --- Generation ---------------------------------------------------------------


def test_generation_config_decides(tmp_path):
  """Stop tokens and how to draw, each field before config.json's."""
  path = tmp_path / "config.json"
  path.write_text(json.dumps(CONFIGS["qwen3"]))
  assert generation.read_generation(tmp_path) == ((3, 4), GREEDY)
  # As older programs wrote it.
  older = dict(CONFIGS["qwen3"], do_sample=True, temperature=0.7, top_k=9)
  path.write_text(json.dumps(older))
  stop, sampling = generation.read_generation(tmp_path)
  assert (stop, sampling) == ((3, 4), Sampling(temperature=0.7, top_k=9))

  def read(**fields):
    (tmp_path / generation.FILE).write_text(json.dumps(fields))
    return generation.read_generation(tmp_path)

  new = dict(temperature=0.6, top_k=20, top_p=0.95)
  assert read(eos_token_id=7, **new) == ((7,), Sampling(**new))
  assert read(eos_token_id=None, temperature=0.6) == (
    (3, 4),
    Sampling(temperature=0.6, top_k=9),
  )
  assert read(do_sample=False, temperature=0.6)[1] == GREEDY
  harmless = dict(
    max_new_tokens=5, pad_token_id=0, transformers_version="5", _from="x"
  )
  neutral = dict(top_k=0, top_p=1.0, repetition_penalty=1.0, stop_strings=[])
  assert read(**harmless, **neutral)[1] == Sampling(temperature=0.7)


@pytest.mark.parametrize(
  ("fields", "text"),
  [
    (
      dict(do_sample=True, min_p=0.1, repetition_penalty=1.2),
      r"min_p=0\.1 is not supported.*\n.*repetition_penalty=1\.2 is not",
    ),
    (
      dict(forced_bos_token_id=3),
      "forced_bos_token_id=3 is not supported: only null",
    ),
    (dict(presence_penalty=1.0), "presence_penalty=1.0 is not supported"),
    (dict(top_h=0.4), "top_h=0.4 is not supported"),
    (dict(some_new_switch=1), "some_new_switch=1 is not known.*\nor give temp"),
    (dict(do_sample="false"), "do_sample must be true or false, got 'false'"),
    (
      dict(do_sample=True, temperature=0.0),
      r"generation_config.json:\n  temperature must be a number above 0, got 0",
    ),
    (dict(do_sample=True, temperature="0.5"), "temperature must be a number"),
    (dict(do_sample=True, top_k=-1), "top_k must be an integer of at least 1"),
    (dict(do_sample=True, top_p=1.5), "top_p must be above 0 and at most 1"),
  ],
)
def test_ways_to_draw_that_are_refused(fields, text, tmp_path):
  """Unless the caller gives another."""
  (tmp_path / "config.json").write_text(json.dumps(CONFIGS["qwen3"]))
  (tmp_path / generation.FILE).write_text(json.dumps(fields))
  with pytest.raises(ValueError, match=text):
    generation.read_generation(tmp_path)
  assert generation.read_generation(tmp_path, GREEDY) == ((3, 4), GREEDY)


@pytest.mark.parametrize(
  "fields",
  [
    dict(stop_strings=["</s>"]),
    dict(forced_eos_token_id=3),
    dict(exponential_decay_length_penalty=[1, 2.0]),
    *(
      dict(eos_token_id=value)
      for value in ("7", ["7"], [[1]], {"a": 1}, -1, 40, 7.0, True)
    ),
  ],
)
def test_ends_of_a_text_that_are_refused(fields, tmp_path):
  """In any case, and by the field's name."""
  ((name, value),) = fields.items()
  (tmp_path / "config.json").write_text(json.dumps(CONFIGS["qwen3"]))
  (tmp_path / generation.FILE).write_text(json.dumps(fields))
  for sampling in (None, GREEDY):
    with pytest.raises(ValueError, match=f"{generation.FILE}:\n  {name}") as e:
      generation.read_generation(tmp_path, sampling)
    assert repr(value) in str(e.value)


CHAT = (
  "{% for m in messages %}{{ bos_token }}{{ m['role'] }}: {{ m['content'] }}\n"
  "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def test_chat(tmp_path, capsys):
  """The folder's template makes the prompt, and its tokens are not doubled."""
  import tokenizers

  config, tensors = CONFIGS["qwen3"], random_tensors(CONFIGS["qwen3"])
  words = ["<s>", "user", ":", "hello", "assistant", "<unk>"]
  words += [f"w{i}" for i in range(len(words), 40)]
  model = tokenizers.models.WordLevel(
    {word: i for i, word in enumerate(words)}, unk_token="<unk>"
  )
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  tokenizer.add_special_tokens(["<s>"])
  tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
    single="<s> $A", special_tokens=[("<s>", 0)]
  )
  folder = folder_of(tmp_path / "x", tensors, config)
  tokenizer.save(str(folder / "tokenizer.json"))
  told = dict(bos_token=dict(content="<s>"), chat_template=CHAT)
  (folder / "tokenizer_config.json").write_text(json.dumps(told))
  want = "<s>user: hello\nassistant:"
  assert generation.chat_prompt(folder, "hello") == want
  ids = tokenizer.encode(want, add_special_tokens=False).ids
  outs = []
  for prompt in (["--chat", "hello"], ["--prompt-ids", *map(str, ids)]):
    words = ["sample", str(folder), "--max-new-tokens", "3", *prompt]
    assert commands.main(words) == 0
    outs.append(capsys.readouterr().out.removeprefix(want).split())
  new = [int(i) for i in outs[1]][len(ids) :]
  assert outs[0] == tokenizer.decode(new).split() and ids.count(0) == 1

  def error(**files):
    for name, content in files.items():
      (folder / name.replace("_json", ".json")).write_text(json.dumps(content))
    with pytest.raises(ValueError) as raised:
      generation.chat_prompt(folder, "hello")
    return str(raised.value)

  assert "chat needs a chat template" in error(tokenizer_config_json={})
  for template, text in (
    ("{{ raise_exception('no system role') }}", "no system role"),
    ("{{ 1 / 0 }}", "the chat template of .*: ZeroDivisionError"),
    ("{{ messages|tojson(wrong=1) }}", "TypeError: .*wrong"),
    ("{% nothing %}", "unknown tag 'nothing'"),
  ):
    told = dict(chat_template=template)
    assert re.search(text, error(tokenizer_config_json=told))
  written = "{{ messages|tojson(separators=(',', ':'), sort_keys=True) }}"
  marked = "{% generation %}" + written + "{% endgeneration %}"
  told = json.dumps(dict(chat_template=marked))
  (folder / "tokenizer_config.json").write_text(told)
  assert generation.chat_prompt(folder, "é<") == (
    '[{"content":"é<","role":"user"}]'
  )
  named = dict(
    chat_template=[dict(name="default", template="T {{ messages }}")]
  )
  (folder / "tokenizer_config.json").write_text(json.dumps(named))
  assert generation.chat_prompt(folder, "hello").startswith("T [")
  (folder / "chat_template.jinja").write_text("J")
  assert generation.chat_prompt(folder, "hello") == "J"
  # A page or a pointer in the place of any of these files is no template.
  for name in (
    "chat_template.jinja",
    "tokenizer_config.json",
    "tokenizer.json",
    "generation_config.json",
  ):
    was = (folder / name).read_text() if (folder / name).exists() else "{}"
    for content, kind in ((LFS, "pointer of Git LFS"), (PAGE, "HTML page")):
      (folder / name).write_text(content)
      assert commands.main(["sample", str(folder), "--chat", "hello"]) == 1
      assert re.search(f"{name} cannot be.*{kind}", capsys.readouterr().err)
    (folder / name).write_text(was)
  (folder / "tokenizer.json").write_text("{}")
  assert commands.main(["sample", str(folder), "--text", "hello"]) == 1
  assert "tokenizer.json cannot be read: " in capsys.readouterr().err


# --- GGUF ---------------------------------------------------------------------


def gguf_file(path, tensors, config, changes=()):
  """A file of a Llama model, with Q8_0 projections and pairs of rotary dims."""
  gguf = pytest.importorskip("gguf")
  writer = gguf.GGUFWriter(path, "llama")
  heads = {"q_proj": config["num_attention_heads"]}
  heads["k_proj"] = config["num_key_value_heads"]
  fields = {
    "llama.block_count": config["num_hidden_layers"],
    "llama.context_length": 512,
    "llama.embedding_length": config["hidden_size"],
    "llama.feed_forward_length": config["intermediate_size"],
    "llama.attention.head_count": config["num_attention_heads"],
    "llama.attention.head_count_kv": config["num_key_value_heads"],
    "llama.vocab_size": config["vocab_size"],
    "tokenizer.ggml.eos_token_id": 1,
    **dict(changes),
  }
  for name, value in fields.items():
    writer.add_uint32(name, value)
  writer.add_float32("llama.rope.freq_base", config["rope_theta"])
  writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
  words = ["<s>", "<e>", *map(chr, range(ord("a"), ord("z") + 1)), "ab", "abc"]
  words += [str(digit) for digit in range(10)]
  writer.add_tokenizer_model("gpt2")
  writer.add_tokenizer_pre("smollm")
  writer.add_token_list(words)
  writer.add_token_types([3, 3, *[1] * (len(words) - 2)])
  writer.add_token_merges(["a b", "ab c"])
  inner = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "o_proj": "attn_output",
  }
  inner |= {f"{n}_proj": f"attn_{n}" for n in "qkv"}
  inner |= {f"{n}_proj": f"ffn_{n}" for n in ("gate", "up", "down")}
  outer = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
  }
  q8 = gguf.GGMLQuantizationType.Q8_0
  values = {}
  for name, value in tensors.items():
    parts = name.split(".")
    theirs = outer.get(name) or f"blk.{parts[2]}.{inner[parts[-2]]}.weight"
    count = heads.get(parts[-2])
    if count:
      halves = value.reshape(count, 2, -1, value.shape[1])
      value = halves.swapaxes(1, 2).reshape(value.shape)
    if parts[-2].endswith("_proj") and value.shape[1] % 32 == 0:
      codes = gguf.quantize(value, q8)
      writer.add_tensor(theirs, codes, raw_dtype=q8)
      value = gguf.dequantize(codes, q8)
    else:
      writer.add_tensor(theirs, value)
    if count:
      pairs = value.reshape(count, -1, 2, value.shape[1])
      value = pairs.swapaxes(1, 2).reshape(value.shape)
    values[name] = value
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return values


def test_gguf_file_becomes_a_folder(tmp_path, capsys):
  config = CONFIGS["llama"] | dict(rope_scaling=None, intermediate_size=64)
  tensors = random_tensors(config)
  file = tmp_path / "model.gguf"
  values = gguf_file(file, tensors, config)
  words = ["from-gguf", str(file), str(tmp_path / "out")]
  assert commands.main(words) == 0
  same_bits(values, tensors_of(tmp_path / "out"))
  check(tmp_path / "out", oracle(values, config))
  import tokenizers

  saved = str(tmp_path / "out" / "tokenizer.json")
  tokenizer = tokenizers.Tokenizer.from_file(saved)
  ids = tokenizer.encode("abc12<e>ba").ids
  assert ids == [29, 31, 32, 1, 3, 2]
  assert tokenizer.decode(ids, skip_special_tokens=False) == "abc12<e>ba"
  # What is not known is refused by its name, and nothing is written.
  gguf_file(file, tensors, config, {"llama.expert_count": 4})
  words = ["from-gguf", str(file), str(tmp_path / "refused")]
  assert commands.main(words) == 1
  assert "llama.expert_count=4: not known" in capsys.readouterr().err
  assert not (tmp_path / "refused").exists()
  file.write_bytes(b"no such file format")
  assert commands.main(words) == 1
  assert "is no GGUF file" in capsys.readouterr().err


# --- Against transformers -----------------------------------------------------


def transformers_model(name):
  """A tiny model of transformers with random weights, and its tokens."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  torch.manual_seed(0)
  if name == "m3":
    from transformers.models.minimax_m3_vl import MiniMaxM3VLTextConfig

    fields = json.loads((TINY / "config.json").read_text())
    config = MiniMaxM3VLTextConfig(
      **{k: v for k, v in fields.items() if k != "model_type"}
    )
  else:
    fields = {
      k: v for k, v in CONFIGS[name].items() if k not in ("architectures",)
    }
    if name == "m2":
      fields["partial_rotary_factor"] = 0.5
    config = transformers.AutoConfig.for_model(**fields)
  config._attn_implementation = "eager"
  model = transformers.AutoModelForCausalLM.from_config(config).eval().float()
  with torch.no_grad():
    # Norms and choice biases, which start at 1 and 0.
    named = [*model.named_parameters(), *model.named_buffers()]
    for key, value in named:
      if "norm" in key or "e_score" in key:
        value.add_(0.2 * torch.randn_like(value))
  return model


@pytest.mark.parametrize("name", [*CONFIGS, "m2_fp8", "m3_mxfp8"])
def test_folders_of_transformers_have_its_logits(name):
  """`make_checkpoints.py` made the folders; tests/test_m3.py has MiniMax-M3."""
  folder = FAMILIES_DATA / name
  with np.load(folder / "golden.npz") as golden:
    want = golden["logits"]
  # Without a dtype, what is quantised becomes bfloat16 where config.json names
  # no dtype.
  model = checkpoints.load(folder, dtype="float32")
  got = logits_of(model, jnp.asarray(TOKENS))
  np.testing.assert_allclose(got, want, atol=1e-4)
  # The logits are those of this folder, not of any.
  assert np.std(want) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["m3", *CONFIGS])
def test_transformers_agrees(name, tmp_path):
  """Its folders load with its logits, and it loads ours with nothing missing
  and nothing unexpected."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  model = transformers_model(name)
  model.save_pretrained(tmp_path / "theirs")
  with torch.no_grad():
    want = model(torch.as_tensor(TOKENS)).logits.numpy()
  ours = checkpoints.load(tmp_path / "theirs")
  got = logits_of(ours, jnp.asarray(TOKENS))
  np.testing.assert_allclose(got, want, atol=1e-4)
  for source in (ours.source, None):
    ours.source = source
    folder = tmp_path / ("kept" if source else "fresh")
    checkpoints.save(ours, folder)
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
      folder, output_loading_info=True, attn_implementation="eager"
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
      assert not info[kind], (kind, info[kind])
    with torch.no_grad():
      logits = again.float().eval()(torch.as_tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(logits, want, atol=1e-4)


@pytest.mark.slow
def test_transformers_agrees_about_a_folder_with_a_vision_model(tmp_path):
  """Its whole MiniMax-M3, with a vision model: logits of text, and both
  layouts that are saved of it."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  from transformers.models.minimax_m3_vl import MiniMaxM3VLConfig

  torch.manual_seed(0)
  text = json.loads(TINY_CONFIG)
  vision = dict(
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=32,
  )
  config = MiniMaxM3VLConfig(
    text_config={k: v for k, v in text.items() if k != "architectures"},
    vision_config=vision,
    image_token_id=100,
    video_token_id=101,
  )
  auto = transformers.AutoModelForImageTextToText
  theirs = auto.from_config(config).float().eval()
  with torch.no_grad():
    for name, value in [*theirs.named_parameters(), *theirs.named_buffers()]:
      if "norm" in name or "e_score" in name:
        value.add_(0.2 * torch.randn_like(value))
    want = theirs(torch.as_tensor(TOKENS)).logits.numpy()
  theirs.save_pretrained(tmp_path / "theirs")
  ours = checkpoints.load(tmp_path / "theirs")
  got = logits_of(ours, jnp.asarray(TOKENS))
  np.testing.assert_allclose(got, want, atol=1e-4)
  for layout, kind in (
    ("released", auto),
    ("transformers", transformers.AutoModelForCausalLM),
  ):
    checkpoints.save(ours, tmp_path / layout, layout=layout)
    again, info = kind.from_pretrained(
      tmp_path / layout, output_loading_info=True, dtype=torch.float32
    )
    for keys in ("missing_keys", "unexpected_keys", "mismatched_keys"):
      assert not info[keys], (layout, keys, info[keys])
    with torch.no_grad():
      logits = again.eval()(torch.as_tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(logits, want, atol=1e-4)
