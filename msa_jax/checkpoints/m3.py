"""MiniMax-M3 under its older name: `m3.load` and `m3.save` are those of
`msa_jax.checkpoints`, which know all families.

`M3` is the config of the release and `PAPER_10B` that of the paper's model;
`count_parameters` counts the parameters of such a config.
"""

from __future__ import annotations

from msa_jax.checkpoints.folders import (
  ParameterCounts,
  count_parameters,
  load,
  read_config,
  save,
)
from msa_jax.model_config import ModelConfig, MoEConfig

__all__ = [
  "M3",
  "PAPER_10B",
  "ParameterCounts",
  "count_parameters",
  "load",
  "read_config",
  "save",
]

PAPER_10B = ModelConfig(
  vocab_size=200_000,
  num_layers=16,
  embed_dim=2048,
  num_heads=32,
  num_kv_heads=4,
  head_dim=128,
  mlp_dim=1536,
  layer_kinds=("msa",),
  mlp_kinds=("moe",),
  moe=MoEConfig(num_experts=64, top_k=4, expert_dim=1536, shared_dim=1536),
  rope_dim=64,
  scan_layers=True,
  dtype="bfloat16",
  param_dtype="bfloat16",
)
"""The paper's model (arXiv 2606.13392): 10.53B parameters, 1.47B active."""

M3 = ModelConfig(
  vocab_size=200_064,
  num_layers=60,
  embed_dim=6144,
  num_heads=64,
  num_kv_heads=4,
  head_dim=128,
  mlp_dim=12_288,
  layer_kinds=("gqa",) * 3 + ("msa",),
  mlp_kinds=("dense",) * 3 + ("moe",),
  moe=MoEConfig(
    num_experts=128,
    top_k=4,
    expert_dim=3072,
    shared_dim=3072,
    routed_scale=2.0,
  ),
  activation="swiglu_oai",
  rope_dim=64,
  rope_theta=5e6,
  zero_centered_norm=True,
  tie_embeddings=False,
  scan_layers=True,
  dtype="bfloat16",
  param_dtype="bfloat16",
)
"""The released MiniMax-M3: 428B parameters, 23B active."""
