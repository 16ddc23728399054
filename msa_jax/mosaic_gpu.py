"""`implementation="mosaic_gpu"`: the Pallas kernels, on a Hopper GPU.

It has the functions of `msa_jax.xla`, computed by `pallas_kernels`. Each raises
NotImplementedError if the call is beyond the limits in `pallas_kernels.mosaic`
or in the kernel's own module. `layout` is that of packed rows, which the sparse
phase takes. `msa_jax.ops` asks `refusal` first whether there
is a GPU for them. The dense attention of the warm-up phase is cuDNN's, which
needs as many keys as queries and no `kv_lengths`. Pallas is imported at the
first call, which keeps `import msa_jax` light.
"""

from __future__ import annotations

from typing import NamedTuple


class Refusal(NamedTuple):
  """Why the kernels cannot run where this call runs.

  Attributes:
    reason: the device that is here, and the one that is wanted.
    ahead: whether the kernels can be lowered here for another machine: no GPU
      is here that could be the one that is meant.
  """

  reason: str
  ahead: bool


def refusal() -> Refusal | None:
  """Why the kernels cannot run on the current device; None if they can."""
  from pallas_kernels import mosaic

  try:
    mosaic.require_hopper()
  except NotImplementedError as error:
    return Refusal(str(error), mosaic.current_device().platform != "gpu")
  return None


def select_blocks(index_q, index_k, **options):
  from pallas_kernels import select_blocks as kernels

  return kernels.select_blocks(index_q, index_k, **options)


def sparse_attention(q, k, v, block_indices, **options):
  from pallas_kernels import sparse_attention as kernels

  return kernels.sparse_attention(q, k, v, block_indices, **options)


def warmup_attention(q, k, v, *, scale, kv_lengths):
  from pallas_kernels import mosaic

  mosaic.require_hopper()  # JAX asks the cuDNN that is here
  if kv_lengths is not None:
    raise NotImplementedError(
      "mosaic_gpu attention of the warm-up phase supports no kv_lengths"
    )
  from pallas_kernels import dense_attention as kernels

  return kernels.attention(q, k, v, scale=scale)


def document_attention(q, k, v, document, starts, ends):
  from pallas_kernels import dense_attention as kernels

  return kernels.document_attention(q, k, v, document, starts, ends)


def index_kl_loss(
  q, k, index_q, index_k, block_indices, *, block_size, scale, lse, kv_lengths,
  query_mask, **options,
):  # fmt: skip
  from pallas_kernels import index_kl as kernels

  if lse is None and block_indices is None:
    _, lse = warmup_attention(q, k, k, scale=scale, kv_lengths=kv_lengths)
  elif lse is None:
    _, lse = sparse_attention(
      q,
      k,
      k,
      block_indices,
      block_size=block_size,
      scale=scale,
      kv_lengths=kv_lengths,
      layout=options.get("layout"),
    )
  return kernels.index_kl_loss(
    q,
    k,
    index_q,
    index_k,
    block_indices,
    block_size=block_size,
    scale=scale,
    lse=lse,
    kv_lengths=kv_lengths,
    query_mask=query_mask,
    **options,
  )


def decode_attention(q, k, v, index_q, index_k, **options):
  from pallas_kernels import decode as kernels

  return kernels.decode_attention(q, k, v, index_q, index_k, **options)
