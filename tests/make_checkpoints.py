"""Makes tests/data/families: tiny folders of transformers' models, and logits.

pip install torch transformers
python tests/make_checkpoints.py

Each folder has the form that `save_pretrained` of the installed transformers
writes, with random weights, and golden.npz: the logits of `TOKENS` that the
same model computes in float32. m2_fp8 has the form of MiniMax-M2's released
folders instead; its logits are those of the weights that transformers
dequantises. m3_mxfp8 has the form of MiniMax-M3-MXFP8, which transformers does
not dequantise; torch does, and transformers computes the logits.
"""

import pathlib
import shutil
import tempfile

import numpy as np
import torch
import transformers
from test_checkpoints import (
  CONFIGS,
  FAMILIES_DATA,
  FP8,
  MXFP8,
  OLDER,
  TINY,
  TOKENS,
  make,
  quantised_tensors,
  random_tensors,
  tensors_of,
  transformers_model,
  write_raw,
)

from msa_jax import checkpoints


def save_logits(folder: pathlib.Path, model: torch.nn.Module):
  with torch.no_grad():
    logits = model(torch.as_tensor(TOKENS)).logits.numpy()
  np.savez_compressed(
    folder / "golden.npz",
    logits=logits.astype(np.float32),
    transformers=transformers.__version__,
  )


def make_fp8(folder: pathlib.Path):
  block = (8, 8)
  quantization = FP8 | {"weight_block_size": list(block)}
  config = CONFIGS["m2"] | {
    "partial_rotary_factor": 0.5,
    "quantization_config": quantization,
  }
  raw, _ = quantised_tensors(random_tensors(config), block, powers=False)
  write_raw(folder, raw, config)
  model = transformers.AutoModelForCausalLM.from_pretrained(
    folder,
    dtype=torch.float32,
    attn_implementation="eager",
    quantization_config=transformers.FineGrainedFP8Config(
      dequantize=True, weight_block_size=block
    ),
  )
  save_logits(folder, model.eval())


def make_mxfp8(folder: pathlib.Path):
  skip = ("moe.gate.weight", "layers.2.self_attn.index_q_proj.weight")
  tensors = tensors_of(TINY)
  raw, _ = quantised_tensors(tensors, (1, 32), powers=True, skip=skip)
  config = dict(
    model_type="minimax_m3_vl",
    text_config=dict(OLDER),
    quantization_config=MXFP8,
  )
  write_raw(folder, raw, config)
  values = {}
  for name in tensors:
    value = torch.as_tensor(np.ascontiguousarray(raw[name]).view(np.uint8))
    scales = raw.get(f"{name}_scale_inv")
    if scales is None:
      values[name] = raw[name]
      continue
    # A byte of the scales is a float with 8 bits of exponent and no others.
    factors = torch.as_tensor(scales).view(torch.float8_e8m0fnu).float()
    factors = factors.repeat_interleave(32, -1)[:, : value.shape[1]]
    value = value.view(torch.float8_e4m3fn).float() * factors
    values[name] = value.numpy()
  with tempfile.TemporaryDirectory() as place:
    # The names of transformers' text model, which `checkpoints.save` writes.
    plain = pathlib.Path(place, "plain")
    checkpoints.save(
      checkpoints.load(make(pathlib.Path(place, "names"), values)), plain
    )
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
      plain,
      dtype=torch.float32,
      attn_implementation="eager",
      output_loading_info=True,
    )
  for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
    assert not info[kind], (kind, info[kind])
  save_logits(folder, model.eval())


def main():
  shutil.rmtree(FAMILIES_DATA, ignore_errors=True)
  for name in CONFIGS:
    model = transformers_model(name)
    folder = pathlib.Path(FAMILIES_DATA, name)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    save_logits(folder, model)
  make_fp8(FAMILIES_DATA / "m2_fp8")
  make_mxfp8(FAMILIES_DATA / "m3_mxfp8")
  for path in FAMILIES_DATA.glob("*/*"):
    path.chmod(0o644)


if __name__ == "__main__":
  main()
