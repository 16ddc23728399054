"""`implementation="mosaic_gpu"`: the Pallas kernels, on a Hopper GPU.

The functions of `msa_jax.xla`, by `pallas_kernels`. Each raises
NotImplementedError where the default device is not a Hopper GPU, and where the
call is beyond the limits listed in `pallas_kernels.mosaic`. Pallas is imported
at the first call, which keeps `import msa_jax` light.
"""

from __future__ import annotations


def _require_hopper() -> None:
  from pallas_kernels import mosaic

  mosaic.require_hopper()


def select_blocks(index_q, index_k, **options):
  _require_hopper()
  from pallas_kernels import select_blocks as kernels

  return kernels.select_blocks(index_q, index_k, **options)


def sparse_attention(q, k, v, block_indices, **options):
  _require_hopper()
  from pallas_kernels import sparse_attention as kernels

  return kernels.sparse_attention(q, k, v, block_indices, **options)


def warmup_attention(q, k, v, **options):
  _require_hopper()
  raise NotImplementedError(
    "mosaic_gpu supports phase 'sparse' only; use implementation='xla'"
  )


def index_kl_loss(q, k, index_q, index_k, block_indices, **options):
  _require_hopper()
  raise NotImplementedError(
    "mosaic_gpu does not support the KL loss; use implementation='xla'"
  )


def decode_attention(q, k, v, index_q, index_k, **options):
  _require_hopper()
  from pallas_kernels import decode as kernels

  return kernels.decode_attention(q, k, v, index_q, index_k, **options)
