"""Block-sparse attention on Hopper (MSA's Main Branch), with gradients.

For query t, group g and head h of g, over the visible tokens J of the chosen
blocks: out = softmax_J(scale q.k) v and lse = log sum_J exp(scale q.k)
(arXiv 2606.13392). This module prepares the operands of the kernels in
`sparse_attention_fwd` and `sparse_attention_bwd`, which say what a CTA owns and
where queries are gathered, and gives them a custom gradient.

K and V are copied once: head-major, padded to whole blocks, and with non-finite
entries zeroed, because a zero probability times NaN is NaN. A query that sees
such an entry is set to NaN at the end, and no other query is touched. In packed
rows the copy moves every block to a whole multiple of the block size
(`packed_rows`), and the kernels read positions that they count in plain rows.

A TMA copy moves tiles of 8 rows. So queries that are gathered (in the backward,
and for the forward's pairs) are laid out in packs of 8 or 16 rows
(`mosaic.Packing`): one query where a group has more than 4 heads, with its
heads padded to 8 or 16; two neighbouring queries with heads padded to 4, or
four with heads padded to 2. The result is exact, but each padding head costs as
much as a real one. The forward's tile kernel, whose queries stand side by side,
copies real heads alone, in and out.

Heads of other sizes than 64, 128 and 256 are padded with zeros to the next of
these. A padded head costs as much as a whole one; the copies that pad q, k and
v are linear in T.

Not supported: what `mosaic.check_supported` refuses; gradients of gradients.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int

from pallas_kernels import (
  kv_block_plan,
  mosaic,
  packed_rows,
  partition,
  sparse_attention_bwd,
  sparse_attention_fwd,
)


def pad_heads(x: Array, num_kv_heads: int) -> Array:
  """Pads [B,T,H,D] with zero heads to `mosaic.Packing.heads` a group."""
  b, t, num_heads, d = x.shape
  group_size = num_heads // num_kv_heads
  rows = mosaic.Packing(group_size).heads
  if rows == group_size:
    return x
  x = x.reshape(b, t, num_kv_heads, group_size, d)
  pad = ((0, 0), (0, 0), (0, 0), (0, rows - group_size), (0, 0))
  return jnp.pad(x, pad).reshape(b, t, num_kv_heads * rows, d)


def block_major(
  x: Array,
  num_blocks: int,
  block_size: int,
  rows: packed_rows.PackedRows | None = None,
):
  """Head-major copy of keys or values in whole blocks, and where NaN was.

  Packed rows are copied to their places, which positions then mean.

  Returns:
    x as [B,K,N*block_size,D], zeroed where it is not finite, and int32 [B,K,N]:
    the position of each block's first non-finite token, or `mosaic.NEVER`.
  """
  if rows is not None:
    x = rows.to_blocks(x)
  b, s_len, num_kv_heads, _ = x.shape
  pad = num_blocks * block_size - s_len
  x = jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))).transpose(0, 2, 1, 3)
  finite = jnp.isfinite(x)
  slot = jnp.arange(s_len + pad, dtype=jnp.int32)
  bad = jnp.where(jnp.all(finite, axis=-1), mosaic.NEVER, slot)
  bad = bad.reshape(b, num_kv_heads, num_blocks, block_size).min(axis=-1)
  return jnp.where(finite, x, 0), bad


@functools.partial(
  jax.jit, static_argnames=("block_size", "scale", "config", "interpret")
)
def _forward(
  q, k, v, block_indices, kv_lengths, rows=None, *, block_size, scale, config,
  interpret,
):  # fmt: skip
  s_len = k.shape[1]
  num_blocks = -(-s_len // block_size)
  if rows is not None:
    num_blocks = rows.num_blocks
    block_indices = rows.seen_blocks(block_indices)
  k, bad_k = block_major(k, num_blocks, block_size, rows)
  v, bad_v = block_major(v, num_blocks, block_size, rows)
  return sparse_attention_fwd.forward(
    q, k, v, jnp.stack([bad_k, bad_v], axis=2), block_indices,
    jnp.clip(kv_lengths.astype(jnp.int32), 0, s_len), rows,
    block_size=block_size,
    scale=scale,
    config=config,
    interpret=interpret,
  )  # fmt: skip


@functools.partial(
  jax.jit, static_argnames=("block_size", "scale", "config", "interpret")
)
def _backward(
  q, k, v, out, lse, dout, dlse, block_indices, kv_lengths, rows=None, *,
  block_size, scale, config, interpret,
):  # fmt: skip
  q_shape = q.shape
  s_len, num_kv_heads = k.shape[1:3]
  group_size = q.shape[2] // num_kv_heads
  places = s_len
  if rows is not None:
    places = rows.source.shape[1]
    block_indices = rows.seen_blocks(block_indices)
  num_kv_blocks = -(-places // kv_block_plan.KV_BLOCK)
  k, v = (
    block_major(x, num_kv_blocks, kv_block_plan.KV_BLOCK, rows)[0]
    for x in (k, v)
  )
  packing = mosaic.Packing(group_size)
  # An lse of +inf makes p of the padding zero.
  rows_lse = packing.pack(lse.swapaxes(1, 2), num_kv_heads, fill=jnp.inf)
  # All are packed first, so that XLA reads each of them once for everything.
  q, out, dout = (packing.pack(x, num_kv_heads) for x in (q, out, dout))
  delta = jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), axis=-1)
  # A dout that is not finite goes into lse and so reaches dv of exactly the
  # keys that its query sees. A dlse that is not finite must not reach dv, so it
  # is subtracted afterwards.
  rows_lse = jnp.where(jnp.isfinite(delta), rows_lse, jnp.nan)
  if dlse is not None:
    # The lse of a query that sees nothing is the constant -inf.
    dlse = jnp.where(lse == -jnp.inf, 0, dlse).swapaxes(1, 2)
    delta -= packing.pack(dlse, num_kv_heads)
  if packing.queries > 1:
    # A query must not reach the other queries of its pack through a product of
    # NaN with zero, so what is not finite travels in lse and delta alone.
    rows_lse = jnp.where(jnp.all(jnp.isfinite(q), axis=-1), rows_lse, jnp.nan)
    q, dout = (jnp.where(jnp.isfinite(x), x, 0) for x in (q, dout))
  dq, dk, dv = sparse_attention_bwd.backward(
    q, k, v, dout, rows_lse, delta, block_indices,
    jnp.clip(kv_lengths.astype(jnp.int32), 0, s_len), rows,
    packing=packing,
    block_size=block_size,
    scale=scale,
    config=config or sparse_attention_bwd.Config(),
    interpret=interpret,
  )  # fmt: skip
  dk, dv = (x[:, :, :places].swapaxes(1, 2) for x in (dk, dv))
  if rows is not None:
    dk, dv = (rows.from_blocks(x) for x in (dk, dv))
  return dq[:, :, :, :group_size].reshape(*q_shape), dk, dv


_Q_K_V = ("B T H D", "B S K D", "B S K D")


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8, 9, 10))
def _sparse_attention(
  q, k, v, block_indices, kv_lengths, rows, block_size, scale, config,
  backward_config, interpret,
):  # fmt: skip
  # Under vmap the kernels run once for each entry of the mapped axis.
  @jax.custom_batching.sequential_vmap
  def run(q, k, v, block_indices, kv_lengths, *rows):
    return _forward(
      q, k, v, block_indices, kv_lengths, packed_rows.of_arrays(rows),
      block_size=block_size, scale=scale, config=config, interpret=interpret,
    )  # fmt: skip

  packed, letters = packed_rows.operands(rows)
  split = partition.by_rows_and_heads(
    partition.kernel(run, interpret),
    (*_Q_K_V, "B K T P", "B", *letters),
    ("B T H D", "B H T"),
    interpret=interpret,
  )
  return split(q, k, v, block_indices, kv_lengths, *packed)


@mosaic.in_32_bits
def _vjp_forward(q, k, v, block_indices, kv_lengths, rows, *options):
  q, k, v, block_indices, kv_lengths = (
    x.value for x in (q, k, v, block_indices, kv_lengths)
  )
  if rows is not None:
    rows = packed_rows.PackedRows(*(x.value for x in rows))
  both: Any = _sparse_attention(
    q, k, v, block_indices, kv_lengths, rows, *options
  )
  out = checkpoint_name(both[0], "attention_out")
  lse = checkpoint_name(both[1], "attention_lse")
  return (out, lse), (q, k, v, out, lse, block_indices, kv_lengths, rows)


@mosaic.in_32_bits
def _vjp_backward(
  block_size, scale, config, backward_config, interpret, residuals, cotangents
):
  q, k, v, out, lse, block_indices, kv_lengths, rows = residuals
  packed, packed_letters = packed_rows.operands(rows)

  @jax.custom_batching.sequential_vmap
  def run(q, k, v, block_indices, kv_lengths, out, lse, dout, *rest):
    rows = packed_rows.of_arrays(rest[: len(packed)])
    dlse = rest[-1] if len(rest) > len(packed) else None
    return _backward(
      q, k, v, out, lse, dout, dlse, block_indices, kv_lengths, rows,
      block_size=block_size, scale=scale, config=backward_config,
      interpret=interpret,
    )  # fmt: skip

  dout, dlse = cotangents
  if isinstance(dout, SymbolicZero):
    dout = jnp.zeros_like(out)
  operands = [q, k, v, block_indices, kv_lengths, out, lse, dout, *packed]
  letters = [*_Q_K_V, "B K T P", "B", "B T H D", "B H T", "B T H D"]
  letters += packed_letters
  if not isinstance(dlse, SymbolicZero):
    operands.append(dlse)
    letters.append("B H T")
  split = partition.by_rows_and_heads(
    partition.kernel(run, interpret), letters, _Q_K_V, interpret=interpret
  )
  return *split(*operands), None, None, None


# With symbolic zeros, the gradient of an lse that is not used costs nothing.
_sparse_attention.defvjp(_vjp_forward, _vjp_backward, symbolic_zeros=True)


@mosaic.in_32_bits
def sparse_attention(
  q: Float[Array, "B T H D"],
  k: Float[Array, "B S K D"],
  v: Float[Array, "B S K D"],
  block_indices: Int[Array, "B K T P"],
  *,
  block_size: int = 128,
  scale: float | None = None,
  kv_lengths: Int[Array, "B"] | None = None,
  layout: packed_rows.Layout | None = None,
  config: sparse_attention_fwd.Config | None = None,
  backward_config: sparse_attention_bwd.Config | None = None,
  interpret: bool = False,
) -> tuple[Float[Array, "B T H D"], Float[Array, "B H T"]]:
  """Attention of each query over the tokens of its group's chosen blocks.

  Args:
    q: queries, the last T of S (or of kv_lengths[b]) tokens; bf16 or f16.
    k: keys.
    v: values.
    block_indices: block ids without duplicates; -1 fills up. Ids that name no
      block, or one beyond the query's own, contribute nothing.
    block_size: tokens of a block.
    scale: of the scores, a positive number; D^-0.5 if None.
    kv_lengths: keys in slots from kv_lengths[b] on do not exist.
    layout: blocks of packed rows; None for plain rows. Ids of blocks that the
      query does not see contribute nothing.
    config: tile sizes; `heuristic_config` if None.
    backward_config: tile sizes of the backward kernels; the defaults of
      `sparse_attention_bwd.Config` if None.
    interpret: run on the CPU in Pallas's GPU interpret mode.

  Returns:
    out in q's dtype and lse (natural log, float32); both have gradients. A
    query that sees nothing gets 0, -inf and gradients of 0.

  Raises:
    NotImplementedError: the call is legal but beyond `mosaic`'s limits.
  """
  group_size = q.shape[2] // k.shape[2]
  scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
  mosaic.check_supported(
    dtype=q.dtype,
    block_size=block_size,
    top_k=block_indices.shape[-1],
    kv_len=k.shape[1],
    num_blocks=packed_rows.num_blocks(layout),
    head_dim=q.shape[-1],
    group_size=group_size,
    num_choices=block_indices.size,
    scale=scale,
  )
  if not block_indices.size or not k.size:
    b, t, num_heads, _ = q.shape
    return jnp.zeros_like(q), jnp.full((b, num_heads, t), -jnp.inf, jnp.float32)
  if kv_lengths is None:
    kv_lengths = jnp.full((k.shape[0],), k.shape[1], jnp.int32)
  num_blocks = packed_rows.num_blocks(layout) or -(-k.shape[1] // block_size)
  config = config or sparse_attention_fwd.heuristic_config(
    num_blocks, block_indices.shape[-1]
  )
  head_dim = q.shape[-1]
  q, k, v = (mosaic.pad_head_dim(x) for x in (q, k, v))
  both: Any = _sparse_attention(
    q, k, v, block_indices, kv_lengths,
    packed_rows.of_layout(layout, block_size, q.shape[1], kv_lengths),
    block_size, scale, config, backward_config, interpret,
  )  # fmt: skip
  out, lse = both
  return out[..., :head_dim], lse
