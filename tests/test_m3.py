"""Checkpoints of MiniMax-M3: numbers of another implementation, files, errors.

tests/data/m3_tiny holds a tiny model and what Hugging Face transformers says
about it; see its README.
"""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import run_in_a_new_process, run_on_devices

import msa_jax
from msa_jax import (
  DecoderLM,
  IndexConfig,
  ModelConfig,
  MoEConfig,
  m3,
)
from msa_jax.checkpoints import commands as m3_commands
from msa_jax.checkpoints import folders
from msa_jax.checkpoints.families import FAMILIES
from msa_jax.checkpoints.families.base import leaves_of
from msa_jax.checkpoints.tensor_files import read_headers, write
from msa_jax.mlp import balance
from msa_jax.model import abstract_model
from train import data

TINY = pathlib.Path("tests/data/m3_tiny")
GOLDEN = dict(np.load(TINY / "golden.npz"))
TOKENS = jnp.asarray(GOLDEN["input_ids"])
LAYER = "language_model.model.layers."


# The text part of a released config.json, with the sizes of the tiny model.
OLDER = dict(
  architectures=["MiniMaxM3SparseForCausalLM"],
  model_type="minimax_m2",
  attention_dropout=0.0,
  attention_output_gate=False,
  vocab_size=128,
  hidden_size=64,
  intermediate_size=48,
  dense_intermediate_size=96,
  shared_intermediate_size=40,
  n_shared_experts=1,
  num_hidden_layers=4,
  num_attention_heads=8,
  num_key_value_heads=2,
  head_dim=32,
  hidden_act="swigluoai",
  max_position_embeddings=512,
  swiglu_alpha=1.702,
  swiglu_beta=1.0,
  swiglu_limit=7.0,
  use_gemma_norm=True,
  use_qk_norm=True,
  qk_norm_type="per_head",
  rms_norm_eps=1e-6,
  scoring_func="sigmoid",
  use_routing_bias=True,
  num_experts_per_tok=2,
  num_local_experts=4,
  num_mtp_modules=7,
  routed_scaling_factor=2.0,
  rotary_dim=16,
  partial_rotary_factor=0.5,
  rope_theta=5000000,
  tie_word_embeddings=False,
  moe_layer_freq=[0, 1, 1, 1],
  sparse_attention_config=dict(
    use_sparse_attention=True,
    sparse_num_index_heads=2,
    sparse_index_dim=32,
    sparse_block_size=16,
    sparse_topk_blocks=3,
    sparse_local_block=1,
    sparse_init_block=0,
    sparse_score_type="max",
    sparse_attention_freq=[0, 1, 1, 1],
    sparse_disable_index_value=[0, 1, 1, 1],
  ),
)


@nnx.jit(static_argnames="phase")
def run(model, tokens=TOKENS, phase="sparse"):
  return model(tokens, phase=phase, with_selection=True)


def tensors_of(folder):
  """Every tensor of a folder by name."""
  headers, _ = read_headers(pathlib.Path(folder))
  return {name: np.array(tensor.open()) for name, tensor in headers.items()}


def same_bits(a, b):
  assert sorted(a) == sorted(b)
  for name, value in a.items():
    other = b[name]
    assert (value.dtype, value.shape) == (other.dtype, other.shape), name
    assert value.tobytes() == other.tobytes(), name


def make(folder, tensors=None, config=None, drop=(), **options):
  """A copy of the tiny checkpoint with changes."""
  fields = json.loads((TINY / "config.json").read_text()) | (config or {})
  fields = {name: value for name, value in fields.items() if name not in drop}
  tensors = tensors_of(TINY) if tensors is None else tensors
  write(
    folder,
    {name: (value.dtype, value.shape) for name, value in tensors.items()},
    tensors.__getitem__,
    documents={"config.json": fields},
    max_file_bytes=options.get("max_file_bytes", 400_000),
  )
  return folder


# --- Against transformers -----------------------------------------------------


def check_golden(out, rows=slice(None)):
  np.testing.assert_allclose(
    out.logits[rows], GOLDEN["logits"][rows], atol=1e-4
  )
  for layer in (1, 2, 3):
    blocks = np.sort(out.selection.block_indices[layer], axis=-1)
    want = np.sort(GOLDEN[f"block_indices_{layer}"], axis=-1)
    np.testing.assert_array_equal(blocks[rows], want[rows])
    experts = np.asarray(out.experts[layer]).reshape(-1, 200, 2)
    want = GOLDEN[f"router_experts_{layer}"].reshape(2, 200, 2)
    np.testing.assert_array_equal(experts[rows], want[rows])


@pytest.mark.parametrize(
  ("implementation", "scan_layers"),
  [
    # test_ops compares the reference, and a test below layers without a scan.
    pytest.param("reference", False, marks=pytest.mark.slow),
    ("xla", True),
  ],
)
def test_model_equals_transformers(implementation, scan_layers):
  """Logits, blocks and experts; layers stacked or not."""
  options = dict(implementation=implementation, scan_layers=scan_layers)
  model = m3.load(TINY, **options)
  assert len(model.layers) == (2 if scan_layers else 4)
  check_golden(run(model))


@pytest.mark.parametrize(
  "implementation", [pytest.param("reference", marks=pytest.mark.slow), "xla"]
)
def test_prefill_and_cached_decoding_equal_transformers(implementation):
  """190 tokens at once, then ten one by one."""
  graphdef, params = nnx.split(m3.load(TINY, implementation=implementation))

  @jax.jit
  def extend(params, tokens, cache):
    model = nnx.merge(graphdef, params)
    return model.extend(tokens, cache, with_selection=True)

  def check(out, kind, rows):
    logits = GOLDEN[f"{kind}_logits"][:, rows]
    np.testing.assert_allclose(out.logits, logits, atol=1e-4)
    for layer in (1, 2, 3):
      want = GOLDEN[f"{kind}_block_indices_{layer}"]
      want = want if kind == "prefill" else want[:, rows].swapaxes(1, 2)
      got = np.sort(out.block_indices[layer], axis=-1)
      np.testing.assert_array_equal(got, np.sort(want, axis=-1))

  cache = nnx.merge(graphdef, params).init_cache(2, 208)
  out = extend(params, TOKENS[:, :190], cache)
  check(out, "prefill", slice(None))
  for i in range(10):
    out = extend(params, TOKENS[:, 190 + i : 191 + i], out.cache)
    check(out, "decode", slice(i, i + 1))
  np.testing.assert_array_equal(out.cache.lengths, 200)


def test_mlps_equal_transformers():
  """Each MLP alone, on its recorded input, with the routers' weights."""
  model = m3.load(TINY)
  dense, moe = (model.layers[i].mlp for i in (0, 1))
  want = [GOLDEN[f"mlp_out_{i}"] for i in (0, 1)]
  x = [jnp.asarray(GOLDEN[f"mlp_in_{i}"]) for i in (0, 1)]
  np.testing.assert_allclose(dense(x[0]), want[0], atol=1e-4)
  np.testing.assert_allclose(moe(x[1])[0], want[1], atol=1e-4)
  weights, experts = moe.route(x[1].reshape(400, 64))
  np.testing.assert_array_equal(experts, GOLDEN["router_experts_1"])
  np.testing.assert_allclose(weights, GOLDEN["router_weights_1"], atol=1e-5)


def test_attention_layer_and_its_gradients_equal_transformers():
  there = np.load(TINY.parent / "m3_tiny_attention.npz")
  layer = m3.load(TINY, implementation="xla").layers[2].attention
  heads = {"query": (8, 32), "key": (2, 32), "value": (2, 32)}

  def ours(prefix=""):
    """transformers' arrays under our names and layouts."""
    arrays = {}
    for name, size in heads.items():
      array = there[f"{prefix}{name[0]}_proj.weight"]
      arrays[name, "kernel"] = array.T.reshape(64, *size)
    out = there[f"{prefix}o_proj.weight"]
    arrays["out", "kernel"] = out.T.reshape(8, 32, 64)
    for name in ("query", "key"):
      arrays[f"{name}_norm", "scale"] = there[f"{prefix}{name[0]}_norm.weight"]
    return arrays

  index = {
    ("index_query", "kernel"): there["indexer.q_proj.weight"].T.reshape(
      64, 2, 32
    ),
    ("index_key", "kernel"): there["indexer.k_proj.weight"].T,
    ("index_query_norm", "scale"): there["indexer.q_norm.weight"],
    ("index_key_norm", "scale"): there["indexer.k_norm.weight"],
  }
  graphdef, state = nnx.split(layer, nnx.Param)
  # The checkpoint's third layer is the recorded one.
  flat = {path: leaf[...] for path, leaf in nnx.to_flat_state(state)}
  for path, value in (ours() | index).items():
    np.testing.assert_array_equal(flat[path], value, err_msg=str(path))

  @jax.jit
  def loss(state, x):
    out = nnx.merge(graphdef, state)(x).out
    return jnp.sum(out * there["cotangent"]), out

  x = jnp.asarray(there["hidden_states"])
  grad = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
  (grads, dx), out = grad(state, x)
  np.testing.assert_allclose(out, there["output"], atol=1e-5)
  got = {path: leaf[...] for path, leaf in nnx.to_flat_state(grads)}
  want = ours("grad.") | {("x",): there["grad_hidden_states"]}
  for path, value in want.items():
    ours_ = dx if path == ("x",) else got[path]
    scale = np.abs(value).max()
    np.testing.assert_allclose(
      ours_, value, atol=2e-5 * scale, err_msg=str(path)
    )
  for path in index:
    assert not np.any(got[path]), path


@pytest.mark.gpu
def test_kernels_equal_the_reference(hopper, tmp_path):
  """bfloat16 at a shape that the kernels take: a pass over everything, and
  prefill with cached decoding."""
  del hopper
  config = ModelConfig(
    vocab_size=512,
    num_layers=2,
    embed_dim=256,
    num_heads=8,
    num_kv_heads=2,
    head_dim=128,
    mlp_dim=512,
    rope_dim=64,
    rope_theta=5e6,
    layer_kinds=("gqa", "msa"),
    index=IndexConfig(index_dim=128, block_size=128, top_k=4),
    mlp_kinds=("dense", "moe"),
    moe=MoEConfig(num_experts=8, top_k=2, expert_dim=256, shared_dim=256),
    activation="swiglu_oai",
    zero_centered_norm=True,
    tie_embeddings=False,
    dtype="bfloat16",
    param_dtype="bfloat16",
  )
  m3.save(DecoderLM(config, rngs=nnx.Rngs(0)), tmp_path / "model")
  tokens = jax.random.randint(jax.random.key(1), (2, 1304), 0, 512)

  def outputs(implementation, dtype=None):
    model = m3.load(
      tmp_path / "model", implementation=implementation, dtype=dtype
    )
    out = run(model, tokens)
    read = nnx.jit(lambda model, *args: model.extend(*args))
    logits, cache = [], model.init_cache(2, 1408)
    for part in jnp.split(tokens, [1300, 1301, 1302, 1303], axis=1):
      step = read(model, part, cache)
      logits.append(step.logits)
      cache = step.cache
    choices = (out.selection.block_indices[1], out.experts[1])
    return out.logits, jnp.concatenate(logits, axis=1), choices

  with jax.default_matmul_precision("highest"):
    truth, _, true_choices = outputs("reference", "float32")
  want, want_read, want_choices = outputs("reference")
  got, got_read, choices = outputs("mosaic_gpu")

  def error(logits, rows=slice(None)):
    """The median token's: one that a near tie sends to another expert is ten
    times as far off."""
    each = jnp.sqrt(jnp.mean((logits - truth) ** 2, axis=-1))
    return float(jnp.median(each[:, rows]))

  # bfloat16 moves near ties; the kernels move no more than twice as many.
  for mine, theirs, true in zip(choices, want_choices, true_choices):
    moved = [np.mean(np.asarray(x != true)) for x in (mine, theirs)]
    assert moved[0] <= 2 * moved[1] < 0.1
  assert error(got) < 2 * error(want)
  last = slice(1300, None)
  assert error(got_read) < 2 * error(want_read)
  assert error(got_read, last) < 2 * error(want_read, last)


MESH = """
import sys
import jax, numpy as np
from test_m3 import TINY, TOKENS, check_golden, m3, run, same_bits, tensors_of

# Explicit axes, which is JAX's default.
mesh = jax.make_mesh((2, 2), ("expert", "tensor"))
model = m3.load(TINY, mesh=mesh, implementation="xla")
layer = model.layers[1]
specs = (
  (layer.mlp.gate, ("expert", None, "tensor")),
  (layer.mlp.down, ("expert", "tensor", None)),
  (layer.attention.query.kernel, (None, "tensor", None)),
)
for param, spec in specs:
  assert param[...].sharding.spec == jax.P(*spec), param
with jax.set_mesh(mesh):
  # One row is not split over the experts' axis: whole tokens, summed.
  check_golden(run(model, TOKENS[:1]), slice(1))
  m3.save(model, sys.argv[1], layout="released")
same_bits(tensors_of(TINY), tensors_of(sys.argv[1]))
Auto = jax.sharding.AxisType.Auto
fsdp = jax.make_mesh((4,), ("fsdp",), axis_types=(Auto,))
model = m3.load(TINY, mesh=fsdp, scan_layers=True)
assert model.layers[1].mlp.gate[...].sharding.spec[2] == "fsdp"
m3.save(model, sys.argv[2], layout="released")
same_bits(tensors_of(TINY), tensors_of(sys.argv[2]))
try:
  m3.load(TINY, mesh=jax.make_mesh((3,), ("expert",), axis_types=(Auto,)))
except ValueError as error:
  assert "cannot split parameter layers.1.mlp.down [4, 48, 64]" in str(error)
else:
  raise AssertionError("3 devices cannot share 4 experts")
"""


@pytest.mark.slow
def test_mesh_gives_the_same_numbers_and_bits(tmp_path):
  run_on_devices(4, MESH, tmp_path / "a", tmp_path / "b")


# --- Files --------------------------------------------------------------------


@pytest.mark.parametrize("scan_layers", [False, True])
def test_round_trip(tmp_path, scan_layers):
  """The same names and bits, whatever the dtypes, in one file or many."""
  tensors = {
    name: value if "moe.e_score" in name else value.astype(ml_dtypes.bfloat16)
    for name, value in tensors_of(TINY).items()
  }
  source = make(tmp_path / "bf16", tensors)
  model = m3.load(source, scan_layers=scan_layers)
  assert model.config.dtype == "bfloat16"
  assert model.layers[1].mlp.choice_bias[...].dtype == jnp.float32
  many = 100_000 if scan_layers else 10**9
  save = dict(layout="released", max_file_bytes=many)
  m3.save(model, tmp_path / "out", **save)
  same_bits(tensors, tensors_of(tmp_path / "out"))
  _, files = read_headers(tmp_path / "out")
  assert len(files) == (8 if scan_layers else 1)
  configs = [m3.read_config(tmp_path / name) for name in ("bf16", "out")]
  assert configs[0] == configs[1]
  # Another program's idea of the format.
  from safetensors.numpy import load_file

  read = {}
  for file in files:
    assert file.stat().st_size < 150_000 or not scan_layers
    read |= load_file(file)
  same_bits(tensors, read)


def test_choice_biases_are_float32_and_go_back_as_they_came(tmp_path):
  """Of a bfloat16 file too: a balancing step would be lost in 8 bits."""
  name = f"{LAYER}2.block_sparse_moe.e_score_correction_bias"
  tensors = {
    key: value.astype(ml_dtypes.bfloat16)
    for key, value in tensors_of(TINY).items()
  }
  # One layer's is of another dtype.
  other = f"{LAYER}1.block_sparse_moe.e_score_correction_bias"
  tensors[other] = tensors_of(TINY)[other]
  tensors[name] = np.asarray([2, 0.5, -1, 0], ml_dtypes.bfloat16)
  model = m3.load(make(tmp_path / "bf16", tensors))
  bias = model.layers[2].mlp.choice_bias
  assert bias[...].dtype == jnp.float32
  m3.save(model, tmp_path / "same", layout="released")
  same_bits(tensors, tensors_of(tmp_path / "same"))
  # Half of 2's last bit in bfloat16 is 2^-7.
  moved = balance(bias[...], jnp.asarray([0, 4, 4, 0]), 1e-3)
  assert np.all(np.abs(moved - bias[...]) > 9e-4)
  bias[...] = moved
  for folder in ("moved", "again"):
    m3.save(model, tmp_path / folder, layout="released")
    got = tensors_of(tmp_path / folder)
    np.testing.assert_array_equal(got[name], moved)
    same_bits(
      {k: v for k, v in got.items() if "e_score" not in k},
      {k: v for k, v in tensors.items() if "e_score" not in k},
    )
    assert {v.dtype for k, v in got.items() if "e_score" in k} == {
      np.dtype(np.float32)
    }
    model = m3.load(tmp_path / folder, scan_layers=folder == "moved")


IDENTITY = {
  "architectures": ["MiniMaxM3VLForCausalLM"],
  "model_type": "minimax_m3_vl_text",
}


def saved_config(folder, out, layout=None, **options):
  """What `save` makes of a folder's config.json."""
  model = m3.load(folder, **options)
  m3.save(model, out, layout=layout)
  again = m3.load(out, **options)
  assert again.config == model.config
  for (path, a), (_, b) in zip(
    nnx.to_flat_state(nnx.state(model)), nnx.to_flat_state(nnx.state(again))
  ):
    np.testing.assert_array_equal(a[...], b[...], err_msg=str(path))
  return json.loads((out / "config.json").read_text())


# The released form, below, has all of its fields back, or the same gone.
@pytest.mark.slow
def test_save_keeps_what_the_config_held(tmp_path):
  """Every field of the loaded config.json that is still true."""
  whole = json.loads((TINY / "config.json").read_text())
  more = dict(eos_token_id=[7, 9], bos_token_id=5, max_position_embeddings=999)

  def saved(name, config, **options):
    folder = make(tmp_path / name)
    (folder / "config.json").write_text(json.dumps(config))
    return saved_config(folder, tmp_path / f"{name}_out", **options)

  flat = whole | more | dict(initializer_range=0.3, scoring_func="sigmoid")
  flat |= IDENTITY | dict(dtype="float32")
  assert saved("flat", flat, scan_layers=True) == flat
  # The parameters' dtype changes, and so does what says it.
  got = saved("half", flat, dtype="bfloat16")
  assert got == flat | dict(dtype="bfloat16")
  # Code and multi-token prediction do not come along.
  gone = dict(auto_map={"AutoModel": "x.Y"}, use_mtp=True, num_mtp_modules=3)
  assert saved("gone", flat | gone) == flat
  # A model of no checkpoint has no such fields.
  fresh = m3.load(TINY)
  fresh.source = None
  m3.save(fresh, tmp_path / "fresh")
  fields = json.loads((tmp_path / "fresh" / "config.json").read_text())
  assert fields == FAMILIES[0].describe(fresh.config) | dict(dtype="float32")
  assert not set(fields) & set(more)


VISION = {
  "vision_tower.blocks.0.w": np.arange(3, dtype=np.float32),
  "multi_modal_projector.w": np.ones(3, np.float16),
  "patch_merge_mlp.w": np.zeros((2, 3), np.float32),
}


@pytest.fixture(scope="module")
def released_folder(tmp_path_factory):
  """The tiny model in the released form, with older keys and a vision model."""
  extra = VISION | {"language_model.model.mtp.layers.0.w": np.zeros(3, "f4")}
  folder = make(
    tmp_path_factory.mktemp("released") / "vl", tensors_of(TINY) | extra
  )
  released = dict(
    architectures=["MiniMaxM3SparseForConditionalGeneration"],
    model_type="minimax_m3_vl",
    text_config=OLDER,
    vision_config=dict(hidden_size=32, model_type="clip_vision_model"),
    img_token_compression_config=dict(spatial_merge_size=2),
    image_token_index=8,
    merged_hidden_size=256,
    projector_hidden_size=64,
    eos_token_id=3,
    tie_word_embeddings=False,
    torch_dtype="float32",
    auto_map={"AutoConfig": "x.Y"},
  )
  (folder / "config.json").write_text(json.dumps(released))
  return folder


def test_released_form_goes_back(released_folder, tmp_path, caplog):
  """config.json with its vision part and keys, and the vision tensors."""
  model = m3.load(released_folder)
  for part in ("vision_tower", "multi_modal_proj", "patch_merge", "mtp.* (1"):
    assert part in caplog.text
  check_golden(run(model))
  m3.save(model, tmp_path / "out")
  same_bits(tensors_of(TINY) | VISION, tensors_of(tmp_path / "out"))
  was = json.loads((released_folder / "config.json").read_text())
  want = {key: value for key, value in was.items() if key != "auto_map"}
  text = {k: v for k, v in OLDER.items() if k != "num_mtp_modules"}
  got = json.loads((tmp_path / "out" / "config.json").read_text())
  assert got == want | dict(text_config=text)
  # Half the bits, and what says so; still with the vision model's own bits.
  half = m3.load(released_folder, dtype="bfloat16")
  m3.save(half, tmp_path / "half")
  got = json.loads((tmp_path / "half" / "config.json").read_text())
  assert got["torch_dtype"] == "bfloat16"
  tensors = tensors_of(tmp_path / "half")
  same_bits(VISION, {name: tensors[name] for name in VISION})
  # transformers' text model alone has a flat config.
  got = saved_config(released_folder, tmp_path / "t", layout="transformers")
  assert "vision_config" not in got and got["hidden_size"] == 64
  assert got | IDENTITY == got and got["eos_token_id"] == 3
  assert not any(
    "vision" in n or "mtp" in n for n in tensors_of(tmp_path / "t")
  )
  # Vision tensors that are gone are not left out in silence.
  shutil.copytree(released_folder, tmp_path / "moved")
  model = m3.load(tmp_path / "moved")
  shutil.rmtree(tmp_path / "moved")
  text = "layout must be 'transformers'.*multi_modal_projector.w is gone"
  with pytest.raises(ValueError, match=text):
    m3.save(model, tmp_path / "no")


def fused(tensors):
  """The released tensors as transformers' text model names and joins them."""
  joined = {}
  for name, value in tensors.items():
    name = name.removeprefix("language_model.")
    name = name.replace(
      "block_sparse_moe.e_score", "block_sparse_moe.gate.e_score"
    )
    name = name.replace(".block_sparse_moe.", ".mlp.")
    joined[name.replace(".self_attn.index_", ".self_attn.indexer.")] = value
  for name in list(joined):
    if name.endswith("gate_proj.weight"):
      up = joined.pop(name.replace("gate_proj", "up_proj"))
      value = np.concatenate([joined.pop(name), up])
      joined[name.replace("gate_proj", "gate_up_proj")] = value
    elif name.endswith("experts.0.w1.weight"):
      base = name.removesuffix("0.w1.weight")

      def take(matrix, base=base):
        return [joined.pop(f"{base}{e}.{matrix}.weight") for e in range(4)]

      gate, up, down = (np.stack(take(f"w{i}")) for i in (1, 3, 2))
      joined[f"{base}gate_up_proj"] = np.concatenate([gate, up], axis=1)
      joined[f"{base}down_proj"] = down
  return joined


@pytest.mark.parametrize("scan_layers", [False, True])
def test_transformers_own_names(tmp_path, scan_layers):
  """Fused matrices and stacked experts load, and are what `save` writes."""
  want = fused(tensors_of(TINY))
  model = m3.load(make(tmp_path / "in", want), scan_layers=scan_layers)
  if not scan_layers:
    check_golden(run(model))
  m3.save(model, tmp_path / "a")
  m3.save(m3.load(TINY, scan_layers=scan_layers), tmp_path / "b")
  for folder in ("a", "b"):
    same_bits(want, tensors_of(tmp_path / folder))
  m3.save(model, tmp_path / "released", layout="released")
  same_bits(tensors_of(TINY), tensors_of(tmp_path / "released"))


def test_a_changed_model_keeps_the_fields_that_do_not_describe_it(
  m2_folder, tmp_path
):
  config = json.loads((m2_folder / "config.json").read_text())
  config |= dict(
    eos_token_id=9, initializer_range=0.5, num_experts=4, dtype="float32"
  )
  config["moe_layer_freq"] = [0, 1, 1, 1]
  shutil.copytree(m2_folder, tmp_path / "m2")
  (tmp_path / "m2" / "config.json").write_text(json.dumps(config))
  same = saved_config(tmp_path / "m2", tmp_path / "same")
  assert same == config | IDENTITY
  model = m3.load(tmp_path / "m2")
  model = to_msa(model, IndexConfig(index_dim=16, block_size=16, top_k=3))
  m3.save(model, tmp_path / "msa")
  fields = json.loads((tmp_path / "msa" / "config.json").read_text())
  assert fields | FAMILIES[0].describe(model.config) == fields
  assert fields["eos_token_id"] == 9 and fields["initializer_range"] == 0.5
  assert fields["max_position_embeddings"] == 512
  assert not {"num_experts", "moe_layer_freq"} & set(fields)
  read = m3.read_config(tmp_path / "msa")
  assert (read.kinds, read.index) == (("msa",) * 4, model.config.index)


def test_dtype_is_cast_but_for_the_routers():
  model = m3.load(TINY, dtype="bfloat16")
  moe = model.layers[1].mlp
  for param in (moe.router, moe.choice_bias):
    assert param[...].dtype == jnp.float32
  for param in (moe.gate, moe.shared.up.kernel, model.embed.embedding):
    assert param[...].dtype == jnp.bfloat16
  assert model.config.dtype == model.config.param_dtype == "bfloat16"
  with pytest.raises(ValueError, match="dtype must be one of"):
    m3.load(TINY, dtype="int8")


MEMORY = """
import dataclasses, resource, sys
import jax
from flax import nnx
from msa_jax import IndexConfig, Sharding, m3, to_msa

mesh, sharding = None, None
if len(jax.devices()) == 4:
  mesh = jax.make_mesh((2, 2), ("expert", "tensor"),
                       axis_types=(jax.sharding.AxisType.Auto,) * 2)
  sharding = Sharding()

def load(folder):
  return m3.load(folder, mesh=mesh)

def convert(model):
  index = IndexConfig(index_dim=32, block_size=16, top_k=3)
  config = dataclasses.replace(model.config, layer_kinds=("msa",), index=index)
  with jax.set_mesh(mesh):
    return to_msa(model, config, rngs=nnx.Rngs(0), sharding=sharding)

def buffers(*models):
  # Size by address: arrays that two models share count once.
  return {shard.data.unsafe_buffer_pointer(): shard.data.nbytes
          for model in models for x in jax.tree.leaves(nnx.state(model))
          for shard in x.addressable_shards}

def peak():
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

convert(load("tests/data/m3_tiny"))
before = peak()
model = load(sys.argv[1])
size = sum(buffers(model).values())
loaded = peak()
both = sum(buffers(model, convert(model)).values())
print(size, loaded - before - size, both - size, peak() - loaded)
"""


@pytest.mark.parametrize(
  "devices", [1, pytest.param(4, marks=pytest.mark.slow)]
)
def test_memory_of_a_load_is_that_of_single_tensors(
  tmp_path, devices, monkeypatch
):
  """The host holds no second copy of the model, nor of a parameter: experts
  come one by one. Nor does `to_msa` make one."""
  config = ModelConfig(
    vocab_size=64,
    num_layers=1,
    embed_dim=512,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    mlp_dim=64,
    mlp_kinds=("moe",),
    moe=MoEConfig(num_experts=80, top_k=2, expert_dim=512),
  )
  family = FAMILIES[-1]
  rng = np.random.default_rng(0)
  noise = rng.standard_normal(512 * 512, np.float32)
  tensors = {
    slot.name: slot.shape
    for leaf in leaves_of(
      config, abstract_model(config, None)[1], family.layouts["msa_jax"]
    )
    for slot in leaf.slots.values()
  }
  write(
    tmp_path / "big",
    {name: (np.dtype("f4"), shape) for name, shape in tensors.items()},
    lambda name: np.resize(noise, tensors[name]),
    documents={"config.json": family.describe(config)},
    max_file_bytes=10**9,
  )
  # The older emitters write a whole parameter for each of its tensors.
  flags = os.environ["XLA_FLAGS"].split()
  newer = [flag for flag in flags if "disable_new_fusion_emitters" not in flag]
  assert len(newer) < len(flags)
  monkeypatch.setenv("XLA_FLAGS", " ".join(newer))
  printed = run_in_a_new_process(devices, MEMORY, tmp_path / "big")
  size, more, index, more_converted = map(int, printed.split())
  assert size > 250e6
  # A parameter of experts has 84 MB, a tensor 1 MB.
  assert more < 40e6
  assert index < 2e6 and more_converted < 40e6


# --- Bad input ----------------------------------------------------------------


def test_wrong_tensors_are_listed(tmp_path):
  tensors = tensors_of(TINY)
  moe = f"{LAYER}1.block_sparse_moe."
  del tensors[f"{moe}experts.3.w2.weight"]
  tensors["language_model.model.layers.9.extra"] = np.zeros(2, np.float32)
  tensors[f"{moe}gate.weight"] = np.zeros((5, 64), np.float32)
  with pytest.raises(ValueError) as error:
    m3.load(make(tmp_path / "bad", tensors))
  for text in (
    "missing: model.layers.1.block_sparse_moe.experts.3.w2.weight",
    "unexpected: model.layers.9.extra",
    "misshapen: model.layers.1.block_sparse_moe.gate.weight [5, 64], wanted"
    " [4, 64]",
  ):
    assert text in str(error.value)


def edit_header(path, change):
  """Rewrites a safetensors file's header."""
  raw = path.read_bytes()
  size = int.from_bytes(raw[:8], "little")
  header = json.loads(raw[8 : 8 + size])
  change(header)
  text = json.dumps(header).encode()
  path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])


def test_damaged_files(tmp_path):
  def copy():
    folder = tmp_path / "copy"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
      shutil.copyfile(TINY / name, folder / name)
    return folder, folder / "model.safetensors"

  folder, file = copy()
  file.write_bytes(file.read_bytes()[:-100])
  with pytest.raises(
    ValueError, match="is truncated: its tensors want 1422920"
  ):
    m3.load(folder)
  file.write_bytes(file.read_bytes()[:500])
  with pytest.raises(ValueError, match="is truncated: its header wants 12824"):
    m3.load(folder)
  file.write_bytes(b"\0" * 500)
  with pytest.raises(ValueError, match="is no safetensors file"):
    m3.load(folder)
  file.unlink()
  with pytest.raises(
    ValueError, match=r"has neither model\.safetensors\.index"
  ):
    m3.load(folder)

  folder, file = copy()
  name = f"{LAYER}0.mlp.up_proj.weight"

  def quantise(header):
    header[name]["dtype"] = "F8_E5M2"

  edit_header(file, quantise)
  with pytest.raises(ValueError, match=r"quantised.*up_proj.weight F8_E5M2"):
    m3.load(folder)

  folder, file = copy()
  edit_header(file, lambda header: header[name].update(shape=[96, 65]))
  with pytest.raises(ValueError, match=r"F32 \[96, 65\] takes 24960 bytes"):
    m3.load(folder)

  folder, file = copy()
  edit_header(
    file,
    lambda header: header[name].update(
      data_offsets=[at + 4 for at in header[name]["data_offsets"]]
    ),
  )
  with pytest.raises(
    ValueError, match=r"up_proj.weight lies at bytes .* begin"
  ):
    m3.load(folder)

  folder = make(tmp_path / "odd")
  index = folder / "model.safetensors.index.json"
  index.write_text(json.dumps(dict(weight_map={name: 3})))
  with pytest.raises(ValueError, match=r"index.json cannot be read: TypeError"):
    m3.load(folder)

  folder = make(tmp_path / "many")
  (folder / "model-00002-of-00004.safetensors").unlink()
  with pytest.raises(ValueError, match=r"model-00002-of-00004.*cannot be read"):
    m3.load(folder)


@pytest.mark.parametrize(
  ("config", "text"),
  [
    (dict(rotary_dim=24), "rotary_dim=24, but partial_rotary_factor=0.5"),
    (dict(rope_theta=1e4), "fields disagree: rope_theta=10000.0, rope_param"),
    (
      dict(sparse_attention_config=dict(sparse_block_size=32)),
      "index_block_size=16, sparse_attention_config.sparse_block_size=32",
    ),
    (dict(layer_types=["full_attention"] * 3), "layer_types has 3 entries"),
    (
      dict(layer_types=["full_attention"] * 3 + ["linear"]),
      r"layer_types: unknown \['linear'\]",
    ),
    (dict(moe_layer_freq=[1, 1, 1, 1]), "mlp_layer_types=.*moe_layer_freq="),
    (dict(quantization_config=dict(quant_method="awq")), "method='awq' is not"),
    (
      dict(quantization_config=dict(quant_method="fp8")),
      "weight_block_size must be two integers",
    ),
    (dict(scoring_func="softmax"), "scoring_func='softmax' is not supported"),
    (dict(qk_norm_type="per_layer"), "qk_norm_type='per_layer' is not supp"),
    (dict(index_n_heads=4), "index heads must be num_key_value_heads=2, got 4"),
    (dict(hidden_size=None), "field missing: hidden_size"),
    (dict(num_attention_heads=0), "num_attention_heads must be .* got 0"),
    (dict(head_dim=32.0), "head_dim must be an integer .* got 32.0"),
    (dict(text_config=[]), r"text_config must be an object, got \[\]"),
    (dict(rope_parameters="x"), "rope_parameters must be an object, got 'x'"),
    (dict(partial_rotary_factor="x"), "partial_rotary_factor must be a number"),
    (dict(quantization_config="fp8"), "quantization_config must be an object"),
    (dict(rope_parameters=dict(rope_type="yarn")), "rope_type='yarn' is not"),
  ],
)
def test_wrong_configs(tmp_path, config, text):
  """Told before any tensor is looked at."""
  fields = json.loads((TINY / "config.json").read_text()) | config
  (tmp_path / "config.json").write_text(json.dumps(fields))
  with pytest.raises(ValueError, match=text):
    m3.load(tmp_path)


def test_wrong_calls(tmp_path):
  with pytest.raises(ValueError, match=r"config.json cannot be read"):
    m3.load(tmp_path)
  with pytest.raises(ValueError, match=r"folder must be .*, got 'MiniMax-M3'"):
    m3.load("MiniMax-M3")
  with pytest.raises(ValueError, match=r"options must be among .*'top_k'"):
    m3.load(TINY, top_k=3)
  model = m3.load(TINY)
  (tmp_path / "something").write_text("")
  with pytest.raises(ValueError, match="folder must be empty or missing"):
    m3.save(model, tmp_path)
  scale = model.norm.scale
  model.norm.scale = nnx.Param(jnp.ones(64, jnp.int8))
  text = r"model's norm.scale must be of a dtype among .*'float32'\].* got int8"
  with pytest.raises(ValueError, match=text):
    m3.save(model, tmp_path / "new")
  model.norm.scale = scale
  qwen = dataclasses.replace(
    model.config,
    activation="swiglu",
    zero_centered_norm=False,
    layer_kinds=("gqa",),
    mlp_kinds=("dense",),
    rope_dim=32,
  )
  dense = DecoderLM(qwen, rngs=nnx.Rngs(0))
  text = "layout must be one that .* 'released':.*\n.*Qwen3 has one layout"
  with pytest.raises(ValueError, match=f"(?s){text}"):
    m3.save(dense, tmp_path / "new", layout="released")


def test_a_save_that_fails_leaves_nothing(tmp_path, monkeypatch):
  model = m3.load(TINY)
  fetched = []

  def fail(array):
    fetched.append(array)
    if len(fetched) == 30:
      raise OSError("No space left on device")
    return np.array(array)

  monkeypatch.setattr(np, "ascontiguousarray", fail)
  with pytest.raises(OSError, match="No space left"):
    m3.save(model, tmp_path / "out", max_file_bytes=100_000)
  assert len(fetched) == 30 and not list(tmp_path.iterdir())


KILLED = """
import os, pathlib, signal, sys
import numpy as np
from msa_jax.checkpoints.tensor_files import write

def fetch(name):
  if name == "b":
    os.kill(os.getpid(), signal.SIGKILL)
  return np.zeros(3, np.float32)

write(pathlib.Path(sys.argv[1]), {n: (np.dtype("f4"), (3,)) for n in "ab"},
      fetch, documents={}, max_file_bytes=12)
"""


def write_one(folder, fetch=lambda name: np.ones(3, np.float32)):
  tensors = {"a": (np.dtype("f4"), (3,))}
  write(folder, tensors, fetch, documents={}, max_file_bytes=10**9)


def test_the_next_save_removes_what_a_killed_one_left(tmp_path):
  target = tmp_path / "out"
  for folder in (target, tmp_path / "out.b"):
    result = subprocess.run([sys.executable, "-c", KILLED, str(folder)])
    assert result.returncode == -signal.SIGKILL
  left, other = sorted(tmp_path.iterdir(), key=lambda path: len(path.name))
  # Ours by name are those of this target alone.
  own = tmp_path / ".out.backup"
  own.mkdir()
  write_one(target)
  assert sorted(tmp_path.iterdir()) == sorted([target, other, own])
  assert left.name.startswith(".out.") and other.name.startswith(".out.b.")
  np.testing.assert_array_equal(tensors_of(target)["a"], np.ones(3))


def test_a_save_leaves_another_that_is_under_way(tmp_path):
  """Two at once into one folder: one of them wins, the other fails."""
  target, seen = tmp_path / "out", []

  def fetch(name):
    write_one(target)
    seen.extend(tmp_path.iterdir())
    return np.zeros(3, np.float32)

  with pytest.raises(OSError, match="not empty"):
    write_one(target, fetch)
  assert len(seen) == 2  # the finished one, and this one's hidden folder
  assert list(tmp_path.iterdir()) == [target]
  np.testing.assert_array_equal(tensors_of(target)["a"], np.ones(3))


def test_a_save_is_on_the_disk_before_it_appears(tmp_path, monkeypatch):
  synced = []

  def fsync(handle):
    path = pathlib.Path(os.readlink(f"/proc/self/fd/{handle}"))
    synced.append((path, (tmp_path / "out").exists()))

  monkeypatch.setattr(os, "fsync", fsync)
  m3.save(m3.load(TINY), tmp_path / "out", max_file_bytes=600_000)
  *before, last = synced
  assert last == (tmp_path, True) and not any(there for _, there in before)
  names = [path.name for path in (tmp_path / "out").iterdir()]
  assert len(names) > 4
  assert sorted(path.name for path, _ in before[:-1]) == sorted(names)
  assert before[-1][0].parent == tmp_path


# --- Configs ------------------------------------------------------------------


def test_older_config_keys_say_the_same(tmp_path):
  """The released config's keys, and transformers' own."""
  whole = dict(model_type="minimax_m3_vl", text_config=OLDER)
  (tmp_path / "config.json").write_text(json.dumps(whole))
  assert m3.read_config(tmp_path) == m3.read_config(TINY)


def test_swiglu_fields_decide_the_activation(tmp_path):
  """transformers writes hidden_act "silu" beside them."""
  fields = json.loads((TINY / "config.json").read_text())
  assert fields["hidden_act"] == "silu"

  def read(**changes):
    changed = {**fields, **changes}
    (tmp_path / "config.json").write_text(json.dumps(changed))
    return m3.read_config(tmp_path)

  assert read().activation == "swiglu_oai"
  none = dict(swiglu_alpha=None, swiglu_limit=None)
  assert read(**none, hidden_act="swigluoai").activation == "swiglu_oai"
  # Only files of version 0.1 have neither, and they name the norms.
  old = read(**none, use_gemma_norm=False)
  assert (old.activation, old.zero_centered_norm) == ("swiglu", False)
  with pytest.raises(ValueError, match="missing: swiglu_alpha and swiglu_lim"):
    read(**none)
  limit = read(swiglu_alpha=None, swiglu_limit=5.0)
  assert (limit.swiglu_alpha, limit.swiglu_limit) == (1.702, 5.0)


def test_counts_of_the_presets():
  """What the paper and the release say, from shapes alone."""
  paper = m3.count_parameters(m3.PAPER_10B)
  # The paper counts without the Index Branch, as for its GQA model.
  assert abs(paper.total - paper.index - 10.53e9) < 0.001 * 10.53e9
  assert abs(paper.active - 1.47e9) < 0.002 * 1.47e9
  released = m3.count_parameters(m3.M3)
  assert abs(released.total - 428e9) < 0.02 * 428e9
  assert abs(released.active - released.embedding - 23e9) < 0.02 * 23e9
  tiny = m3.count_parameters(m3.read_config(TINY))
  assert tiny.total == sum(v.size for v in tensors_of(TINY).values())


# --- M2-style, and from GQA to MSA --------------------------------------------


@pytest.fixture(scope="module")
def m2_folder(tmp_path_factory):
  """The tiny model without index tensors and prefix."""
  tensors = {
    name.removeprefix("language_model."): value
    for name, value in tensors_of(TINY).items()
    if ".index_" not in name
  }
  drop = [
    name
    for name in json.loads((TINY / "config.json").read_text())
    if name.startswith("index_") or name == "layer_types"
  ]
  return make(tmp_path_factory.mktemp("m2") / "model", tensors, drop=drop)


def test_a_model_without_index_tensors_loads(m2_folder, tmp_path):
  """Full attention everywhere: what the M3 model's warm-up computes."""
  model = m3.load(m2_folder)
  assert set(model.config.kinds) == {"gqa"}
  dense = run(m3.load(TINY, implementation="xla"), phase="warmup").logits
  np.testing.assert_allclose(run(model).logits, dense, atol=1e-4)
  assert np.abs(dense - GOLDEN["logits"]).max() > 0.1
  m3.save(model, tmp_path / "out")
  same_bits(fused(tensors_of(m2_folder)), tensors_of(tmp_path / "out"))


def to_msa(model, index, seed=0, **options):
  config = dataclasses.replace(
    model.config, layer_kinds=("msa",), index=index, implementation="xla"
  )
  return msa_jax.to_msa(model, config, rngs=nnx.Rngs(seed), **options)


def test_index_of_one_head_ranks_as_the_head_does():
  """H = 1, D = I, blocks of one token: exactly the main branch's choice."""
  config = ModelConfig(
    vocab_size=64,
    num_layers=2,
    embed_dim=16,
    num_heads=1,
    num_kv_heads=1,
    head_dim=8,
    mlp_dim=16,
    rope_dim=4,
  )
  tokens = jax.random.randint(jax.random.key(0), (2, 40), 0, 64)
  index = IndexConfig(index_dim=8, block_size=1, top_k=5, num_local_blocks=0)
  gqa = DecoderLM(config, rngs=nnx.Rngs(0))
  for layer in gqa.layers:
    for norm in (layer.attention.query_norm, layer.attention.key_norm):
      norm.scale[...] = jax.random.uniform(jax.random.key(1), (8,)) + 0.5
  out = run(to_msa(gqa, index), tokens, "warmup")
  np.testing.assert_array_equal(out.selection.block_recall, 1.0)
  out = run(to_msa(gqa, index, index_init="random"), tokens, "warmup")
  assert np.all(out.selection.block_recall < 0.7)
  with pytest.raises(
    ValueError, match="index_init must be one of 'main', 'lea"
  ):
    to_msa(gqa, index, index_init="mean")
  with pytest.raises(ValueError, match="'random' for a model with qk_norm"):
    to_msa(gqa, index, index_init="leading")
  # Without being told, the better way of the two that the model can have.
  plain = DecoderLM(
    dataclasses.replace(config, qk_norm=False), rngs=nnx.Rngs(0)
  )
  for model, best in ((gqa, "main"), (plain, "leading")):
    made, want = (
      nnx.state(to_msa(model, index, **how))
      for how in ({}, dict(index_init=best))
    )
    jax.tree.map(np.testing.assert_array_equal, made, want)


@nnx.jit
def measure(model, tokens):
  """Logits; block recall, score recall and KL before any training."""
  out = model(tokens, phase="warmup", with_selection=True, with_kl=True)
  recalls = out.selection.block_recall, out.selection.score_recall
  return out.logits, jnp.stack([*recalls, out.kl])


# The test before says it exactly, of one head.
@pytest.mark.slow
@pytest.mark.parametrize("index_dim", [8, 16])
def test_to_msa_starts_from_the_main_attention(index_dim):
  """Recalls of a trained model against fresh projections; the numbers of
  index_dim 16 are those in to_msa's docstring."""
  gqa = m3.load("tests/data/recall_gqa")
  batch = data.load(data.RecallConfig()).eval_batch(
    0, batch_size=8, context=256
  )
  tokens = jnp.asarray(batch.tokens[:, :-1])
  index = IndexConfig(index_dim=index_dim, block_size=16, top_k=4)
  dense = run(gqa, tokens).logits
  right = np.argmax(dense, -1) == batch.tokens[:, 1:]
  assert right[batch.distance >= 0].mean() > 0.9  # It has learnt its task.
  logits, got = measure(to_msa(gqa, index), tokens)
  np.testing.assert_allclose(logits, dense, atol=1e-4)
  fresh = [
    measure(to_msa(gqa, index, seed, index_init="random"), tokens)[1]
    for seed in range(3)
  ]
  fresh = np.mean(fresh, axis=0)
  # In each layer.
  assert np.all(got[0] > fresh[0] + 0.05)
  assert np.all(got[1] > fresh[1] + 0.01)
  assert np.all(got[2] < 0.6 * fresh[2])
  if index_dim == 16:
    means = np.stack([fresh.mean(-1), got.mean(-1)], axis=-1)
    want = [(0.555, 0.666), (0.562, 0.604), (0.68, 0.26)]
    np.testing.assert_allclose(means, want, atol=0.01)


def test_index_dims_beyond_the_heads_start_at_random():
  gqa = m3.load("tests/data/recall_gqa")
  index = IndexConfig(index_dim=20, block_size=16, top_k=4)
  main, fresh = (
    to_msa(gqa, index, index_init=kind).layers[0].attention
    for kind in ("main", "random")
  )
  mean = jnp.mean(gqa.layers[0].attention.key.kernel[...], axis=1)
  got = main.index_key.kernel[...]
  np.testing.assert_array_equal(got[:, :16], mean)
  np.testing.assert_array_equal(got[:, 16:], fresh.index_key.kernel[:, 16:])


# test_train has runs that start from a checkpoint folder.
@pytest.mark.slow
def test_a_loaded_model_can_be_fine_tuned(m2_folder, tmp_path):
  """MSA-CPT of two layers of an M2-style model: LM loss and KL fall, both."""
  tensors = {
    name: value
    for name, value in tensors_of(m2_folder).items()
    if ".layers.2." not in name and ".layers.3." not in name
  }
  two = dict(num_hidden_layers=2, mlp_layer_types=["dense", "sparse"])
  folder = make(
    tmp_path / "two", tensors, two, drop=("layer_types", "index_n_heads")
  )
  index = IndexConfig(index_dim=16, block_size=16, top_k=3)
  model = to_msa(m3.load(folder), index)
  for layer in model.layers:
    layer.attention.implementation = "reference"  # The faster to compile.
  graphdef, state = nnx.split(model, nnx.Param)
  tokens = TOKENS[:, :65]

  @jax.jit
  def step(state):
    def loss(state):
      out = nnx.merge(graphdef, state)(tokens[:, :-1], with_kl=True)
      lm = optax.softmax_cross_entropy_with_integer_labels(
        out.logits, tokens[:, 1:]
      ).mean()
      return lm + out.kl.sum(), (lm, out.kl)

    grads, aux = jax.grad(loss, has_aux=True)(state)
    descend = lambda p, g: p - 2e-3 * jnp.sign(g)  # noqa: E731
    return jax.tree.map(descend, state, grads), aux

  losses = []
  for _ in range(8):
    state, aux = step(state)
    losses.append(aux)
  lm, kl = (np.stack([loss[i] for loss in losses]) for i in (0, 1))
  assert lm[-1] < lm[0] - 0.5
  assert np.all(kl[-1] < kl[0])


# --- Commands -----------------------------------------------------------------


# test_sampling_from_a_run_folder samples by a command too.
@pytest.mark.slow
def test_sample(capsys, tmp_path, monkeypatch):
  """Greedy tokens are those of whole passes; text goes through the folder's
  tokenizer, up to the end-of-text token of its config."""
  ids = GOLDEN["input_ids"][0, :5].tolist()
  words = ["sample", str(TINY), "--prompt-ids", *map(str, ids)]
  assert m3_commands.main([*words, "--max-new-tokens", "4"]) == 0
  tokens = [int(word) for word in capsys.readouterr().out.split()]
  assert tokens[:5] == ids and len(tokens) == 9
  logits = run(m3.load(TINY), jnp.asarray([tokens])).logits
  np.testing.assert_array_equal(np.argmax(logits[0], -1)[4:8], tokens[5:])

  import tokenizers

  names = {f"w{i}": i for i in range(128)}
  model = tokenizers.models.WordLevel(names, unk_token="w0")
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  folder = make(tmp_path / "text", config=dict(eos_token_id=tokens[7]))
  tokenizer.save(str(folder / "tokenizer.json"))
  words = ["sample", str(folder), "--max-new-tokens", "4", "--text"]
  assert m3_commands.main([*words, " ".join(f"w{i}" for i in ids)]) == 0
  out = capsys.readouterr().out.split("w")[1:]
  stop = tokens.index(tokens[7], 5)
  assert [int(word) for word in out] == tokens[:stop]

  # Wrong arguments are refused before any weights are read.
  monkeypatch.setattr(folders, "_read", None)
  for words, text in (
    (["--text", "x"], "tokenizer.json, which is missing"),
    ([], "one of text, chat and prompt_ids must be given, got none"),
    (["--text", "x", "--prompt-ids", "1"], "given, got text and prompt_ids"),
    (["--prompt-ids", "1", "999"], "ids below vocab_size = 128, got [999]"),
    (
      ["--prompt-ids", "1", "--max-new-tokens", "512"],
      "1 tokens and 512 new ones must be at most max_position_embeddings = 512",
    ),
    (
      ["--prompt-ids", "1", "--mesh", "fsdp=2"],
      "must be of axes among ('expert",
    ),
    (["--prompt-ids", "1", "--mesh", "expert"], "AXIS=SIZE words, such as exp"),
    (["--prompt-ids", "1", "--mesh", "expert=64"], "which needs 64 devices"),
    (["--prompt-ids", "1", "--dtype", "int9"], "dtype must be one of"),
  ):
    assert m3_commands.main(["sample", str(TINY), *words]) == 1
    assert text in capsys.readouterr().err


def test_show(capsys, tmp_path):
  assert m3_commands.main(["show", str(TINY)]) == 0
  out = capsys.readouterr().out
  for text in (
    "4 layers, width 64, vocabulary 128, untied output",
    "8/2 heads of 32, rotary 16, theta 5e+06, QK-norm, norms scale by 1 + w",
    "blocks of 16, top 3 with 1 local, index 2 heads of 32, rotary 16",
    "4 experts of 48, top 2, scale 2, shared 40, swiglu_oai",
    "0        gqa dense  59,584 parameters each",
    "1-3      msa moe    92,164 parameters each",
    "352,524: 278,604 active with 16,384 of the embeddings, 18,624 of the",
    "F32 (101 tensors)",
  ):
    assert text in out
  assert m3_commands.main(["show", str(tmp_path)]) == 1
  assert "config.json cannot be read" in capsys.readouterr().err
