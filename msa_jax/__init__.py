"""MiniMax Sparse Attention (arXiv 2606.13392) in JAX and Flax."""

from msa_jax.ops import (
  MSAOutput,
  index_kl_loss,
  msa_attention,
  select_blocks,
  selection_recall,
  sparse_attention,
)

__all__ = [
  "MSAOutput",
  "index_kl_loss",
  "msa_attention",
  "select_blocks",
  "selection_recall",
  "sparse_attention",
]
