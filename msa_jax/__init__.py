"""MiniMax Sparse Attention (arXiv 2606.13392) in JAX and Flax."""

from msa_jax.attention import (
  GQAttention,
  MSALayerOutput,
  MSAttention,
  Selection,
  Sharding,
)
from msa_jax.cache import Cache, LayerCache
from msa_jax.model import (
  DecoderLM,
  ExtendOutput,
  IndexConfig,
  LMOutput,
  ModelConfig,
  MoEConfig,
  is_index_param,
  to_msa,
)
from msa_jax.ops import (
  DecodeOutput,
  MSAOutput,
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
