"""`implementation="mosaic_gpu"`: the Pallas kernels, on a Hopper GPU.

It has the functions of `msa_jax.xla`, computed by `pallas_kernels`. Each raises
NotImplementedError if the call is beyond the limits in `pallas_kernels.mosaic`
or in the kernel's own module. `layout` is that of packed rows. `msa_jax.ops`
asks `refusal` first whether there is a GPU for them. The dense attention of the
warm-up phase is cuDNN's for plain rows with as many keys as queries and no
`kv_lengths`, and a kernel of our own for all others. With `query_pieces` a
kernel is called for each piece, with the kv_lengths whose last keys the piece's
queries are. Pallas is imported at the first call, which keeps `import msa_jax`
light.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from msa_jax.context import for_each


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


def _pieces(
  query_pieces: Sequence[tuple[Array, int]],
) -> Iterator[tuple[slice, Array]]:
  """For each piece its queries, and the kv_lengths whose last keys they are."""
  first = 0
  for start, length in query_pieces:
    yield slice(first, first + length), start + length
    first += length


def select_blocks(
  index_q, index_k, *, kv_lengths, query_pieces=None, **options
):
  from pallas_kernels import select_blocks as kernels

  if query_pieces is None:
    return kernels.select_blocks(
      index_q, index_k, kv_lengths=kv_lengths, **options
    )
  parts = [
    kernels.select_blocks(index_q[:, at], index_k, kv_lengths=ends, **options)
    for at, ends in _pieces(query_pieces)
  ]
  return jnp.concatenate(parts, axis=2)


def sparse_attention(
  q, k, v, block_indices, *, kv_lengths, query_pieces=None, **options
):
  from pallas_kernels import sparse_attention as kernels

  run = functools.partial(kernels.sparse_attention, **options)
  if query_pieces is None:
    return run(q, k, v, block_indices, kv_lengths=kv_lengths)
  ks: Any = for_each(k, len(query_pieces))
  vs: Any = for_each(v, len(query_pieces))
  parts = [
    run(q[:, at], k, v, block_indices[:, :, at], kv_lengths=ends)
    for (at, ends), k, v in zip(_pieces(query_pieces), ks, vs)
  ]
  out, lse = zip(*parts)
  return jnp.concatenate(out, axis=1), jnp.concatenate(lse, axis=2)


def warmup_attention(
  q, k, v, *, scale, kv_lengths, query_pieces=None, layout=None
):
  from pallas_kernels import dense_attention, masked_attention, mosaic

  plain = layout is None and kv_lengths is None and query_pieces is None
  if plain and q.shape[1] == k.shape[1]:
    mosaic.require_hopper()  # JAX asks the cuDNN that is here
    return dense_attention.attention(q, k, v, scale=scale)
  run = functools.partial(
    masked_attention.attention,
    scale=scale,
    until=None if layout is None else layout.visible_until,
  )
  if query_pieces is None:
    return run(q, k, v, kv_lengths=kv_lengths)
  ks: Any = for_each(k, len(query_pieces))
  vs: Any = for_each(v, len(query_pieces))
  parts = [
    run(q[:, at], k, v, kv_lengths=ends)
    for (at, ends), k, v in zip(_pieces(query_pieces), ks, vs)
  ]
  out, lse = zip(*parts)
  return jnp.concatenate(out, axis=1), jnp.concatenate(lse, axis=2)


def block_masses(q, k, *, block_size, layout, query_pieces=None, **options):
  """The mean attention mass of each block over a group's heads, [B, K, T, N].

  Each head's is the output of dense attention whose value of a token is 1 in
  the dimension of its block and 0 elsewhere. Blocks in excess of the D
  dimensions of a value take another call.
  """
  b, s, num_kv_heads, d = k.shape
  if layout is None:
    own, num_blocks = jnp.arange(s)[None] // block_size, -(-s // block_size)
  else:
    own, num_blocks = layout.own_block, layout.block_start.shape[1]
  parts = []
  for first in range(0, num_blocks, d):
    values = own[:, :, None, None] == first + jnp.arange(d)
    values = jnp.broadcast_to(values, k.shape).astype(k.dtype)
    out, _ = warmup_attention(
      q, k, values, layout=layout, query_pieces=query_pieces, **options
    )
    heads = out.reshape(b, q.shape[1], num_kv_heads, -1, d)
    parts.append(jnp.mean(heads, axis=3, dtype=jnp.float32))
  mass = jnp.concatenate(parts, axis=-1)[..., :num_blocks]
  return jnp.moveaxis(mass, 1, 2)


def index_kl_loss(
  q, k, index_q, index_k, block_indices, *, block_size, scale, lse, kv_lengths,
  query_mask, query_pieces=None, **options,
):  # fmt: skip
  from pallas_kernels import index_kl as kernels

  if query_pieces is not None:
    total = count = jnp.zeros((), jnp.float32)
    index_ks: Any = for_each(index_k, len(query_pieces))
    for (at, ends), index_k in zip(_pieces(query_pieces), index_ks):
      mask = None if query_mask is None else query_mask[:, at]
      kl = index_kl_loss(
        q[:, at],
        k,
        index_q[:, at],
        index_k,
        None if block_indices is None else block_indices[:, :, at],
        block_size=block_size,
        scale=scale,
        lse=None if lse is None else lse[:, :, at],
        kv_lengths=ends,
        query_mask=mask,
        **options,
      )
      counted = at.stop - at.start if mask is None else jnp.sum(mask)
      total, count = total + kl * counted, count + counted
    return total / jnp.where(count == 0, 1, count)
  if lse is None and block_indices is None:
    _, lse = warmup_attention(
      *(q, k, k),
      scale=scale,
      kv_lengths=kv_lengths,
      layout=options.get("layout"),
    )
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
