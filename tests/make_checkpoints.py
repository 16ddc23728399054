"""Makes tests/data/families: tiny folders of transformers' models, and logits.

pip install torch transformers
python tests/make_checkpoints.py

Each folder has the form that `save_pretrained` of the installed transformers
writes, with random weights, and golden.npz: the logits of `TOKENS` that the
same model computes in float32. m2_fp8 has the form of MiniMax-M2's released
folders instead; its logits are those of the weights that transformers
dequantises.
"""

import pathlib
import shutil

import numpy as np
import torch
import transformers
from test_checkpoints import (
  CONFIGS,
  FAMILIES_DATA,
  FP8,
  TOKENS,
  quantised_tensors,
  random_tensors,
  transformers_model,
  write_raw,
)


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


def main():
  shutil.rmtree(FAMILIES_DATA, ignore_errors=True)
  for name in CONFIGS:
    model = transformers_model(name)
    folder = pathlib.Path(FAMILIES_DATA, name)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    save_logits(folder, model)
  make_fp8(FAMILIES_DATA / "m2_fp8")
  for path in FAMILIES_DATA.glob("*/*"):
    path.chmod(0o644)


if __name__ == "__main__":
  main()
