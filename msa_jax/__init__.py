"""MiniMax Sparse Attention (arXiv 2606.13392) in JAX and Flax."""

import importlib
from typing import Any

from msa_jax.attention import (
  GQAttention,
  MSALayerOutput,
  MSAttention,
  Selection,
)
from msa_jax.cache import Cache, LayerCache
from msa_jax.convert import to_msa
from msa_jax.layers import Sharding
from msa_jax.model import (
  DecoderLM,
  ExtendOutput,
  LMOutput,
  is_index_param,
)
from msa_jax.model_config import IndexConfig, ModelConfig, MoEConfig
from msa_jax.ops import (
  DecodeOutput,
  MSAOutput,
  SelectionRecall,
  check_block_indices,
  decode_attention,
  index_kl_loss,
  msa_attention,
  select_blocks,
  selection_recall,
  sparse_attention,
)

__all__ = [
  "Cache",
  "DecodeOutput",
  "DecoderLM",
  "ExtendOutput",
  "GQAttention",
  "IndexConfig",
  "LMOutput",
  "LayerCache",
  "MSALayerOutput",
  "MSAOutput",
  "MSAttention",
  "MoEConfig",
  "ModelConfig",
  "Selection",
  "SelectionRecall",
  "Sharding",
  "check_block_indices",
  "decode_attention",
  "index_kl_loss",
  "is_index_param",
  "msa_attention",
  "select_blocks",
  "selection_recall",
  "sparse_attention",
  "to_msa",
]


def __getattr__(name: str) -> Any:
  # Imported when asked for, which keeps `import msa_jax` light.
  if name == "m3":
    return importlib.import_module("msa_jax.checkpoints.m3")
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
