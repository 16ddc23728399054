"""MiniMax Sparse Attention (arXiv 2606.13392) in JAX and Flax."""

import importlib
import importlib.metadata
from typing import Any

from msa_jax.attention import (
  GQAttention,
  MSALayerOutput,
  MSAttention,
  Selection,
)
from msa_jax.cache import Cache, LayerCache
from msa_jax.convert import index_dims, index_kernels_from_main, to_msa
from msa_jax.layers import RopeScaling, Sharding, partial_rope
from msa_jax.losses import head_loss
from msa_jax.model import (
  DecoderLM,
  ExtendOutput,
  LMOutput,
  is_index_param,
  param_groups,
)
from msa_jax.model_config import IndexConfig, ModelConfig, MoEConfig
from msa_jax.ops import (
  Choice,
  DecodeOutput,
  MSAOutput,
  SelectionRecall,
  best_blocks,
  check_block_indices,
  decode_attention,
  explain,
  index_kl_loss,
  msa_attention,
  select_blocks,
  selection_recall,
  sparse_attention,
)
from msa_jax.segments import (
  MergedPrefixes,
  Segments,
  merge_prefixes,
  tree_segments,
)

try:
  __version__ = importlib.metadata.version("msa-jax")
except importlib.metadata.PackageNotFoundError:
  # The package is imported from a source tree that is not installed.
  __version__ = "0+unknown"

__all__ = [
  "Cache",
  "Choice",
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
  "MergedPrefixes",
  "MoEConfig",
  "ModelConfig",
  "RopeScaling",
  "Segments",
  "Selection",
  "SelectionRecall",
  "Sharding",
  "__version__",
  "best_blocks",
  "check_block_indices",
  "decode_attention",
  "explain",
  "head_loss",
  "index_dims",
  "index_kernels_from_main",
  "index_kl_loss",
  "is_index_param",
  "merge_prefixes",
  "msa_attention",
  "param_groups",
  "partial_rope",
  "select_blocks",
  "selection_recall",
  "sparse_attention",
  "to_msa",
  "tree_segments",
]


def __getattr__(name: str) -> Any:
  # Imported at their first use, which keeps `import msa_jax` light.
  modules = {
    "checkpoints": "msa_jax.checkpoints",
    "generate": "msa_jax.generate",
    "m3": "msa_jax.checkpoints.m3",
  }
  if name in modules:
    return importlib.import_module(modules[name])
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
