"""The public operations: checks, defaults and the choice of implementation.

Every operation takes `implementation`:

- `"reference"`: the specification, O(T S) memory, any backend.
- `"xla"`: computes only the chosen blocks, memory linear in T, any backend.
- `"mosaic_gpu"`: Pallas kernels for Hopper GPUs.
- `None`: the first of mosaic_gpu, xla, reference that supports the call. The
  logger "msa_jax" says once for each reason which one that is: as a warning
  where the device has kernels that do not support the call, else as info.
  `explain` tells it for a call without running it.

A named implementation never falls back: a legal call that it does not support
raises NotImplementedError. A wrong call raises ValueError, and its text names
the argument, what came and what is wanted (`msa_jax.checks`). Letters in shapes
are those of `msa_jax.reference`.

Rows may be packed with documents (`segment_ids`) or prefix trees (`segments`,
see `msa_jax.tree_segments`): `msa_jax.segments` has the rule of what sees what.
A packed row's blocks start anew with each document or tree node, and
block_indices name them in slot order, from 0 along the row; padding has none.
Packed rows have no kv_lengths, and as many queries as keys unless query_pieces
say where the queries stand. They may have `max_segments` documents; results of
a row with more are NaN (its choices -1).

The queries are the last T of the S tokens. `query_pieces` says otherwise, for a
sequence that is split over devices (`msa_jax.context`): at most two pairs
(start, length), in the order in which the T queries come. The queries of a
piece stand at slots start .. start + length - 1 and see no later key. A start
is an integer, or an array of integers, () or [B], which may be traced; a length
is static. A piece that ends behind the S keys sees nothing, and neither does a
slot before 0. There are no kv_lengths with query_pieces.

The KL loss trains index_q and index_k alone. Its gradient is stopped at q, k
and lse in `index_kl_loss` and `msa_attention` (look for "KL gradient stops
here"), and at the input of the index projections in `msa_jax.attention`.
"""

from __future__ import annotations

import functools
import logging
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.core import Tracer
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Bool, Float, Float32, Int32, Integer

from msa_jax import mosaic_gpu, reference, xla
from msa_jax import segments as segments_lib
from msa_jax.checks import (
  check_array,
  check_attention,
  check_blocks,
  check_choice,
  check_chosen_blocks,
  check_decode_index,
  check_floats,
  check_index,
  check_integer,
  check_kv_lengths,
  check_lse,
  check_query_mask,
  check_query_pieces,
  check_scale,
  require,
  reverse_mode,
  wrong,
)
from msa_jax.meshes import any_mesh
from msa_jax.segments import BlockLayout, Segments

Implementation = Literal["reference", "xla", "mosaic_gpu"]
Phase = Literal["sparse", "warmup"]
ScorePrecision = Literal["exact", "fast", "fp8"]

# (start, length) of each piece of the queries, see the module's text.
QueryPieces = Sequence[tuple[int | Integer[Array, "..."], int]]

# The most query tokens of a batch row that `decode_attention` takes.
MAX_DECODE_TOKENS = 16


class MSAOutput(NamedTuple):
  """What `msa_attention` returns; a pytree.

  Attributes:
    out: attention output, in q's dtype.
    kl: KL loss in nats; 0 unless `with_kl`.
    block_indices: the blocks that the Index Branch chose, or the given ones.
    lse: log sum exp of the scaled scores over the attended tokens, natural
      log; -inf for queries that see nothing. Its gradient reaches q and k.
  """

  out: Float[Array, "B T H D"]
  kl: Float[Array, ""]
  block_indices: Int32[Array, "B K T P"]
  lse: Float[Array, "B H T"]


class DecodeOutput(NamedTuple):
  """What `decode_attention` returns; a pytree.

  Attributes:
    out: attention output, in q's dtype.
    block_indices: the blocks that the Index Branch chose.
  """

  out: Float[Array, "B T H D"]
  block_indices: Int32[Array, "B K T P"]


class SelectionRecall(NamedTuple):
  """What `selection_recall` returns, each in [0, 1]; a pytree.

  Attributes:
    block_recall: share of the blocks of largest mass that were picked.
    score_recall: mass on the picked blocks.
    best_score_recall: mass on the blocks of largest mass: no choice of as many
      blocks holds more.
  """

  block_recall: Float[Array, ""]
  score_recall: Float[Array, ""]
  best_score_recall: Float[Array, ""]


@any_mesh(
  results="B K T P",
  index_q="B T K I",
  index_k="B S I",
  kv_lengths="B",
  segment_ids="B S",
  segments="B S",
  query_pieces="B",
)
def select_blocks(
  index_q: Float[Array, "B T K I"],
  index_k: Float[Array, "B S I"],
  *,
  block_size: int = 128,
  top_k: int = 16,
  num_local_blocks: int = 1,
  kv_lengths: Integer[Array, "B"] | None = None,
  segment_ids: Int32[Array, "B S"] | None = None,
  segments: Segments | None = None,
  max_segments: int | None = None,
  query_pieces: QueryPieces | None = None,
  score_precision: ScorePrecision = "exact",
  implementation: Implementation | None = None,
) -> Int32[Array, "B K T P"]:
  """Chooses the key blocks that each query and group attends to.

  The score of block n for query t and group g is the maximum over the block's
  visible tokens j of index_q[t, g] . index_k[j] (paper, section 2). The query's
  own block and the `num_local_blocks - 1` before it are always chosen and count
  inside `top_k`; the rest are the highest scores, ties to the lower block. A
  block whose score is NaN is chosen only if forced. No gradient.

  Args:
    index_q: index queries, one head a group.
    index_k: index keys, one head for all groups.
    block_size: tokens a block; blocks are anchored at key slot 0.
    top_k: blocks kept, P.
    num_local_blocks: blocks forced, counted back from the query's own; 0 forces
      none.
    kv_lengths: keys that exist in each batch row; the queries are the last T of
      them. None: all S. It is for caches: a right-padded training batch needs
      none, because causality hides its padding (query_mask keeps that out of
      the KL), and with kv_lengths its queries stand at wrong positions.
    segment_ids: the document of each token of packed rows; 0 is padding, and
      each run of equal ids a document. None: one document a row.
    segments: the same for prefix trees, from `tree_segments`; not both.
    max_segments: the most documents of a row, static. None: 64, or as many as
      there are blocks in a row, if that is more.
    query_pieces: where the queries stand if they are not the last T of S, see
      the module's text.
    score_precision: "exact" ranks float32 scores. "fast" may rank by fewer
      mantissa bits (at least 10). "fp8" also rounds the operands to e4m3 with
      a scale each. Only "exact" is the same for every implementation.
    implementation: see the module's text.

  Returns:
    Ascending block ids without duplicates, then -1.

  Raises:
    ValueError: an argument is wrong.
    NotImplementedError: the named implementation does not support the call, or
      packed rows came with kv_lengths or with fewer queries than keys.
  """
  check_floats(index_q=(index_q, "B T K I"), index_k=(index_k, "B S I"))
  check_index(index_q, index_k)
  block_size, top_k, num_local_blocks = check_blocks(
    block_size, top_k, num_local_blocks
  )
  check_kv_lengths(kv_lengths, index_q.shape[0])
  _warn_of_padding(kv_lengths, index_q.shape[1], index_k.shape[1])
  check_choice("score_precision", score_precision, ScorePrecision)
  queries = _queries(index_q, index_k, kv_lengths, query_pieces)
  layout = _block_layout(
    segment_ids, segments, max_segments, block_size, queries, index_q, index_k
  )
  index_q, index_k = jax.lax.stop_gradient((index_q, index_k))
  options = dict(
    block_size=block_size,
    top_k=top_k,
    num_local_blocks=num_local_blocks,
    score_precision=score_precision,
  )
  chosen = _dispatch(
    "select_blocks",
    implementation,
    reference=lambda: reference.select_blocks(
      index_q, index_k, **options, **queries.portable, layout=layout
    ),
    xla=lambda: xla.select_blocks(
      index_q, index_k, **options, **queries.portable, layout=layout
    ),
    mosaic_gpu=lambda: mosaic_gpu.select_blocks(
      index_q, index_k, **options, **queries.kernels, layout=layout
    ),
  )
  return _none_of_overflow(chosen, layout)


@any_mesh(
  results=("B T H D", "B H T"),
  q="B T H D",
  k="B S K D",
  v="B S K D",
  block_indices="B K T P",
  kv_lengths="B",
  segment_ids="B S",
  segments="B S",
  query_pieces="B",
)
def sparse_attention(
  q: Float[Array, "B T H D"],
  k: Float[Array, "B S K D"],
  v: Float[Array, "B S K D"],
  block_indices: Int32[Array, "B K T P"],
  *,
  block_size: int = 128,
  scale: float | None = None,
  kv_lengths: Integer[Array, "B"] | None = None,
  segment_ids: Int32[Array, "B S"] | None = None,
  segments: Segments | None = None,
  max_segments: int | None = None,
  query_pieces: QueryPieces | None = None,
  return_lse: bool = False,
  implementation: Implementation | None = None,
) -> (
  Float[Array, "B T H D"]
  | tuple[Float[Array, "B T H D"], Float[Array, "B H T"]]
):
  """Exact softmax attention over each query's chosen blocks.

  out = softmax(scale q k^T) v over the tokens that are causal and lie in a
  chosen block; head h reads KV head h // G and its group's blocks (paper,
  section 2). A query with no such token returns 0 and an lse of -inf.

  Args:
    q: queries, the last T of the S tokens.
    k: keys.
    v: values.
    block_indices: ascending block ids without duplicates, then -1, as
      `select_blocks` returns them. Caller-made choices are welcome: the own
      block may be missing, blocks after it contribute nothing, and a query
      whose slots are all -1 attends to nothing. Entries are not checked here;
      `check_block_indices` checks them.
    block_size: tokens a block.
    scale: factor of the scores; None: D^-0.5.
    kv_lengths: keys that exist in each batch row; the queries are the last T of
      them. None: all S. It is for caches: a right-padded training batch needs
      none, because causality hides its padding (query_mask keeps that out of
      the KL), and with kv_lengths its queries stand at wrong positions.
    segment_ids: the document of each token of packed rows; 0 is padding, and
      each run of equal ids a document. None: one document a row.
    segments: the same for prefix trees, from `tree_segments`; not both.
    max_segments: the most documents of a row, static. None: 64, or as many as
      there are blocks in a row, if that is more.
    query_pieces: where the queries stand if they are not the last T of S, see
      the module's text.
    return_lse: also return the log sum exp (natural log) of the scaled scores,
      with its gradient: d lse / d q = scale sum_j p_j k_j. With it, attention
      can be merged with attention over other tokens, or get a sink:
      out * sigmoid(lse - sink). Where lse is -inf its cotangent is dropped.
    implementation: see the module's text.

  Returns:
    out in q's dtype, or (out, lse).

  Raises:
    ValueError: an argument is wrong.
    NotImplementedError: the named implementation does not support the call, or
      packed rows came with kv_lengths or with fewer queries than keys.
  """
  check_floats(q=(q, "B T H D"), k=(k, "B S K D"), v=(v, "B S K D"))
  check_attention(q, k, v)
  block_size = check_integer("block_size", block_size)
  check_chosen_blocks(block_indices, q, k)
  check_kv_lengths(kv_lengths, q.shape[0])
  _warn_of_padding(kv_lengths, q.shape[1], k.shape[1])
  queries = _queries(q, k, kv_lengths, query_pieces)
  layout = _block_layout(
    segment_ids, segments, max_segments, block_size, queries, q, k
  )
  options = dict(
    block_size=block_size,
    scale=check_scale("scale", scale, q.shape[-1]),
  )
  args = (q, k, v, block_indices)
  portable = options | queries.portable | dict(layout=layout)
  out, lse = _dispatch(
    "sparse_attention",
    implementation,
    reference=lambda: reference.sparse_attention(*args, **portable),
    xla=lambda: xla.sparse_attention(*args, **portable),
    mosaic_gpu=lambda: mosaic_gpu.sparse_attention(
      *args, **options, **queries.kernels, layout=layout
    ),
  )
  out, lse = _nan_of_overflow((out, lse), layout)
  return (out, lse) if return_lse else out


@any_mesh(
  results="",
  q="B T H D",
  k="B S K D",
  index_q="B T K I",
  index_k="B S I",
  block_indices="B K T P",
  lse="B H T",
  kv_lengths="B",
  query_mask="B T",
  segment_ids="B S",
  segments="B S",
  query_pieces="B",
)
def index_kl_loss(
  q: Float[Array, "B T H D"],
  k: Float[Array, "B S K D"],
  index_q: Float[Array, "B T K I"],
  index_k: Float[Array, "B S I"],
  block_indices: Int32[Array, "B K T P"] | None,
  *,
  block_size: int = 128,
  scale: float | None = None,
  index_scale: float | None = None,
  lse: Float[Array, "B H T"] | None = None,
  kv_lengths: Integer[Array, "B"] | None = None,
  query_mask: Bool[Array, "B T"] | Float32[Array, "B T"] | None = None,
  segment_ids: Int32[Array, "B S"] | None = None,
  segments: Segments | None = None,
  max_segments: int | None = None,
  query_pieces: QueryPieces | None = None,
  detach_teacher: bool = True,
  implementation: Implementation | None = None,
) -> Float[Array, ""]:
  """KL divergence that teaches the Index Branch the Main Branch's attention.

  With J the visible tokens of a query's chosen blocks,
  p = mean over the group's heads of softmax_J(scale q . k) and
  r = softmax_J(index_scale index_q . index_k), the loss is the mean over batch,
  queries and groups of sum_J p (log p - log r), in nats (paper, section 2).
  The gradient reaches index_q and index_k only: dL / d(index_scale s_j) =
  (r_j - p_j) / (K x counted queries). Queries that see nothing add 0 and count.

  Args:
    q: queries of the main branch.
    k: keys of the main branch.
    index_q: index queries, one head a group.
    index_k: index keys, one head.
    block_indices: the chosen blocks, or None for all visible tokens (warm-up).
    block_size: tokens a block.
    scale: factor of the main scores; None: D^-0.5.
    index_scale: factor of the index scores; None: I^-0.5.
    lse: log sum exp of the main branch over the same tokens, if known.
    kv_lengths: keys that exist in each batch row; the queries are the last T of
      them. None: all S. It is for caches: a right-padded training batch needs
      none, because causality hides its padding (query_mask keeps that out of
      the KL), and with kv_lengths its queries stand at wrong positions.
    query_mask: queries that count, or float32 weights w >= 0 of them. The loss
      is then sum w KL_t / (K sum w). None: all, except the padding of packed
      rows, which never counts.
    segment_ids: the document of each token of packed rows; 0 is padding, and
      each run of equal ids a document. None: one document a row.
    segments: the same for prefix trees, from `tree_segments`; not both.
    max_segments: the most documents of a row, static. None: 64, or as many as
      there are blocks in a row, if that is more.
    query_pieces: where the queries stand if they are not the last T of S, see
      the module's text.
    detach_teacher: stop the gradient at q, k and lse. False lets it reach q and
      k (an ablation of the paper); only "reference" supports this, and lse
      must be None.
    implementation: see the module's text.

  Raises:
    ValueError: an argument is wrong.
    NotImplementedError: the named implementation does not support the call, or
      packed rows came with kv_lengths or with fewer queries than keys.
  """
  check_floats(
    q=(q, "B T H D"),
    k=(k, "B S K D"),
    index_q=(index_q, "B T K I"),
    index_k=(index_k, "B S I"),
  )
  check_attention(q, k, k)
  check_index(index_q, index_k, q, k)
  block_size = check_integer("block_size", block_size)
  if block_indices is not None:
    check_chosen_blocks(block_indices, q, k)
  check_kv_lengths(kv_lengths, q.shape[0])
  _warn_of_padding(kv_lengths, q.shape[1], k.shape[1])
  check_query_mask(query_mask, q)
  if lse is not None:
    check_lse(lse, q)
    if not detach_teacher:
      raise wrong(
        "lse",
        "None with detach_teacher=False, which differentiates it",
        "an array",
      )
  queries = _queries(q, k, kv_lengths, query_pieces)
  layout = _block_layout(
    segment_ids, segments, max_segments, block_size, queries, q, k
  )
  query_mask = _without_padding(query_mask, layout, queries)
  if detach_teacher:
    # The KL gradient stops here: it trains the Index Branch alone.
    q, k, lse = jax.lax.stop_gradient((q, k, lse))
  options = dict(
    block_size=block_size,
    scale=check_scale("scale", scale, q.shape[-1]),
    index_scale=check_scale("index_scale", index_scale, index_q.shape[-1]),
    lse=lse,
    query_mask=query_mask,
  )
  args = (q, k, index_q, index_k, block_indices)
  portable = options | queries.portable | dict(layout=layout)
  if not detach_teacher:
    missing = _only_reference("detach_teacher=False")
    loss = _dispatch(
      "index_kl_loss",
      implementation,
      reference=lambda: reference.index_kl_loss(
        *args, **portable, detach_teacher=False
      ),
      xla=missing,
      mosaic_gpu=missing,
    )
    return _nan_of_any_overflow(loss, layout)
  loss = _dispatch(
    "index_kl_loss",
    implementation,
    reference=lambda: reference.index_kl_loss(*args, **portable),
    xla=lambda: xla.index_kl_loss(*args, **portable),
    mosaic_gpu=lambda: mosaic_gpu.index_kl_loss(
      *args, **options, **queries.kernels, layout=layout
    ),
  )
  return _nan_of_any_overflow(loss, layout)


@any_mesh(
  results=MSAOutput("B T H D", "", "B K T P", "B H T"),  # pyright: ignore
  q="B T H D",
  k="B S K D",
  v="B S K D",
  index_q="B T K I",
  index_k="B S I",
  block_indices="B K T P",
  kv_lengths="B",
  query_mask="B T",
  segment_ids="B S",
  segments="B S",
  query_pieces="B",
)
def msa_attention(
  q: Float[Array, "B T H D"],
  k: Float[Array, "B S K D"],
  v: Float[Array, "B S K D"],
  index_q: Float[Array, "B T K I"],
  index_k: Float[Array, "B S I"],
  *,
  block_size: int = 128,
  top_k: int = 16,
  num_local_blocks: int = 1,
  scale: float | None = None,
  index_scale: float | None = None,
  phase: Phase = "sparse",
  with_kl: bool = False,
  kv_lengths: Integer[Array, "B"] | None = None,
  query_mask: Bool[Array, "B T"] | Float32[Array, "B T"] | None = None,
  segment_ids: Int32[Array, "B S"] | None = None,
  segments: Segments | None = None,
  max_segments: int | None = None,
  query_pieces: QueryPieces | None = None,
  block_indices: Int32[Array, "B K T P"] | None = None,
  score_precision: ScorePrecision = "exact",
  implementation: Implementation | None = None,
) -> MSAOutput:
  """MiniMax Sparse Attention: selection, attention and KL loss in one call.

  phase "sparse" attends to the chosen blocks and takes the KL over them; phase
  "warmup" attends to all visible tokens and takes the KL over all of them, and
  `block_indices` holds what the Index Branch would choose (paper, section 3).
  out's gradient reaches q, k and v; lse's reaches q and k; kl's reaches index_q
  and index_k only, because the lse that it takes is stopped.

  Args:
    q: queries, the last T of the S tokens.
    k: keys.
    v: values.
    index_q: index queries, one head a group.
    index_k: index keys, one head.
    block_size: tokens a block.
    top_k: blocks kept, P.
    num_local_blocks: blocks forced, counted back from the query's own.
    scale: factor of the main scores; None: D^-0.5.
    index_scale: factor of the index scores in the KL; None: I^-0.5.
    phase: "sparse" or "warmup".
    with_kl: whether to compute the KL loss.
    kv_lengths: keys that exist in each batch row; the queries are the last T of
      them. None: all S. It is for caches: a right-padded training batch needs
      none, because causality hides its padding (query_mask keeps that out of
      the KL), and with kv_lengths its queries stand at wrong positions.
    query_mask: queries that count in the KL, or float32 weights of them, see
      `index_kl_loss`; None: all.
    segment_ids: the document of each token of packed rows; 0 is padding, and
      each run of equal ids a document. None: one document a row.
    segments: the same for prefix trees, from `tree_segments`; not both.
    max_segments: the most documents of a row, static. None: 64, or as many as
      there are blocks in a row, if that is more.
    query_pieces: where the queries stand if they are not the last T of S, see
      the module's text.
    block_indices: given choices, of any P, as `sparse_attention` takes them;
      None: the Index Branch chooses. With given choices, top_k,
      num_local_blocks and score_precision are not used, and attention and KL
      are over the given blocks. They replay the choices of an earlier pass,
      share those of another layer, or stand for an oracle. The warm-up does
      not attend to them.
    score_precision: see `select_blocks`.
    implementation: see the module's text.

  Raises:
    ValueError: an argument is wrong.
    NotImplementedError: the named implementation does not support the call, or
      packed rows came with kv_lengths or with fewer queries than keys.
  """
  check_floats(
    q=(q, "B T H D"),
    k=(k, "B S K D"),
    v=(v, "B S K D"),
    index_q=(index_q, "B T K I"),
    index_k=(index_k, "B S I"),
  )
  check_attention(q, k, v)
  check_index(index_q, index_k, q, k)
  block_size, top_k, num_local_blocks = check_blocks(
    block_size, top_k, num_local_blocks
  )
  check_kv_lengths(kv_lengths, q.shape[0])
  _warn_of_padding(kv_lengths, q.shape[1], k.shape[1])
  check_query_mask(query_mask, q)
  if block_indices is not None:
    check_chosen_blocks(block_indices, q, k)
  check_choice("phase", phase, Phase)
  check_choice("score_precision", score_precision, ScorePrecision)
  scale = check_scale("scale", scale, q.shape[-1])
  index_scale = check_scale("index_scale", index_scale, index_q.shape[-1])

  queries = _queries(q, k, kv_lengths, query_pieces)
  layout = _block_layout(
    segment_ids, segments, max_segments, block_size, queries, q, k
  )
  query_mask = _without_padding(query_mask, layout, queries)
  packed = {} if layout is None else dict(layout=layout)

  # Outside of `run`, so that kernels refuse a call before any operation on its
  # arrays. JAX would count them as leaked.
  selectors = jax.lax.stop_gradient((index_q, index_k))

  def run(module, where: dict[str, Any]) -> MSAOutput:
    where = where | packed
    chosen = block_indices
    if chosen is None:
      chosen = module.select_blocks(
        *selectors,
        block_size=block_size,
        top_k=top_k,
        num_local_blocks=num_local_blocks,
        score_precision=score_precision,
        **where,
      )
      chosen = checkpoint_name(chosen, "block_indices")
    if phase == "warmup":
      attended = None
      out, lse = module.warmup_attention(q, k, v, scale=scale, **where)
    else:
      attended = chosen
      out, lse = module.sparse_attention(
        q,
        k,
        v,
        chosen,
        block_size=block_size,
        scale=scale,
        **where,
      )
    if with_kl:
      # The KL gradient stops here: it trains the Index Branch alone.
      teacher_q, teacher_k = jax.lax.stop_gradient((q, k))
      kl = module.index_kl_loss(
        teacher_q,
        teacher_k,
        index_q,
        index_k,
        attended,
        block_size=block_size,
        scale=scale,
        index_scale=index_scale,
        lse=jax.lax.stop_gradient(lse),
        query_mask=query_mask,
        **where,
      )
    else:
      kl = jnp.zeros((), reference.compute_dtype(q))
    out, lse = _nan_of_overflow((out, lse), layout)
    return MSAOutput(
      out,
      _nan_of_any_overflow(kl, layout),
      _none_of_overflow(chosen, layout),
      lse,
    )

  return _dispatch(
    "msa_attention",
    implementation,
    reference=lambda: run(reference, queries.portable),
    xla=lambda: run(xla, queries.portable),
    mosaic_gpu=lambda: run(mosaic_gpu, queries.kernels),
  )


@any_mesh(
  results=DecodeOutput("B T H D", "B K T P"),  # pyright: ignore
  q="B T H D",
  k="B C K D",
  v="B C K D",
  index_q="B T K I",
  index_k="B C I",
  kv_lengths="B",
  index_k_scale="B C",
)
def decode_attention(
  q: Float[Array, "B T H D"],
  k: Float[Array, "B C K D"],
  v: Float[Array, "B C K D"],
  index_q: Float[Array, "B T K I"],
  index_k: Float[Array, "B C I"],
  *,
  kv_lengths: Integer[Array, "B"],
  index_k_scale: Float[Array, "B C"] | None = None,
  block_size: int = 128,
  top_k: int = 16,
  num_local_blocks: int = 1,
  scale: float | None = None,
  axis_name: str | None = None,
  implementation: Implementation | None = None,
) -> DecodeOutput:
  """Sparse attention from each batch row's last 1 to 16 tokens to a cache.

  Computes what `msa_attention` computes in the sparse phase, for arrays that
  have room for C tokens in each batch row. The slots from kv_lengths[b] on are
  unused: whatever they hold, NaN included, changes nothing.

  Index keys may be e4m3 codes with a float32 scale for each token, as
  `msa_jax.Cache` keeps them. The score of key j is then that of
  `score_precision="fp8"`, index_k_scale[b, j] (e4m3(index_q / r) .
  index_k[b, j]) r, with r as `quantise_index_keys` has it, of each query and
  group.

  There is no gradient, because a cache is for inference.

  Args:
    q: queries, the last T of the row's kv_lengths[b] tokens.
    k: keys.
    v: values.
    index_q: index queries, one head a group.
    index_k: index keys, one head; in q's dtype or float8_e4m3fn.
    kv_lengths: tokens that each batch row holds, including the queries' own.
      Where a batch row holds fewer than T, its first queries see nothing.
    index_k_scale: scales of e4m3 index keys; None for other index keys.
    block_size: tokens a block.
    top_k: blocks kept, P.
    num_local_blocks: blocks forced, counted back from the query's own.
    scale: factor of the main scores; None: D^-0.5.
    axis_name: inside `jax.shard_map`, the mesh axis over whose devices the
      slots of the cache are split: each holds C of them, whole blocks, one
      device's after another's. The queries, kv_lengths and the results are the
      same on all. Each device scores its own blocks, and attends to those of
      them that are among the best of all; it sends P candidates and a partial
      result for each query. "reference" does not support it.
    implementation: see the module's text.

  Raises:
    ValueError: an argument is wrong.
    NotImplementedError: the named implementation does not support the call, or
      the call is differentiated.
  """
  check_floats(
    q=(q, "B T H D"),
    k=(k, "B C K D"),
    v=(v, "B C K D"),
    index_q=(index_q, "B T K I"),
  )
  check_attention(q, k, v)
  check_decode_index(index_q, index_k, index_k_scale, q, k)
  if q.shape[1] > MAX_DECODE_TOKENS:
    raise wrong(
      "q",
      f"an array of 1 to {MAX_DECODE_TOKENS} tokens (msa_attention with"
      " kv_lengths takes more)",
      f"T = {q.shape[1]}",
    )
  block_size, top_k, num_local_blocks = check_blocks(
    block_size, top_k, num_local_blocks
  )
  if kv_lengths is None:
    raise wrong("kv_lengths", "an array of shape [B]", "None")
  check_kv_lengths(kv_lengths, q.shape[0])
  options: dict[str, Any] = dict(
    block_size=block_size,
    top_k=top_k,
    num_local_blocks=num_local_blocks,
    scale=check_scale("scale", scale, q.shape[-1]),
  )

  if axis_name is not None:
    require(
      k.shape[1] % block_size == 0,
      "k",
      f"whole blocks of {block_size} slots on each device of {axis_name!r}",
      k.shape[1],
    )
  args = _without_gradient((q, k, v, index_q, index_k))
  cached = dict(kv_lengths=kv_lengths, index_k_scale=index_k_scale)
  options |= cached
  calls: dict[str, Callable] = dict(
    reference=lambda: reference.decode_attention(*args, **options),
    xla=lambda: xla.decode_attention(*args, **options, axis_name=axis_name),
    mosaic_gpu=lambda: mosaic_gpu.decode_attention(
      *args, **options, axis_name=axis_name
    ),
  )
  if axis_name is not None:
    calls["reference"] = _Unsupported(
      "a cache that is split over devices (axis_name) needs"
      " implementation='mosaic_gpu', 'xla' or None"
    )
  return DecodeOutput(*_dispatch("decode_attention", implementation, **calls))


# The custom_jvp wraps the operands and not the operation, because JAX cannot
# lower a kernel that writes to refs inside a custom_jvp.
@jax.custom_jvp
def _without_gradient(operands: tuple[Array, ...]) -> tuple[Array, ...]:
  return operands


@_without_gradient.defjvp
def _(primals, tangents):
  raise NotImplementedError(
    "decode_attention has no gradient; msa_attention has one"
  )


def check_block_indices(
  block_indices: Int32[Array, "B K T P"],
  kv_len: int,
  *,
  block_size: int = 128,
  segment_ids: Int32[Array, "B S"] | None = None,
  segments: Segments | None = None,
  max_segments: int | None = None,
) -> None:
  """Checks the values of a choice of blocks, for debugging.

  The operations assume, and do not check, that block_indices[b, k, t] holds
  ascending block ids without duplicates, each in 0 .. ceil(kv_len / block_size)
  - 1 (in packed rows, below the number of blocks that the fullest row has), and
  then only -1. Of packed rows they assume that no id of segment_ids comes again
  after another one, and that no row has more than max_segments spans. This
  function copies the arrays to the host to check that, so it cannot be part of
  a jitted program.

  Args:
    block_indices: the choice.
    kv_len: key tokens, S.
    block_size: tokens a block.
    segment_ids: as in the operations.
    segments: as in the operations.
    max_segments: as in the operations.

  Raises:
    ValueError: an entry is wrong; the text names the first one, [b, k, t, p].
      Also raised under jit, where the entries have no values yet.
  """
  for name, x in (
    ("block_indices", block_indices),
    ("segment_ids", segment_ids),
    ("segments", None if segments is None else segments.span),
  ):
    if isinstance(x, Tracer):
      raise wrong(
        name,
        "a concrete array (call check_block_indices outside jit)",
        "a traced one",
      )
  kv_len = check_integer("kv_len", kv_len)
  block_size = check_integer("block_size", block_size)
  check_array("block_indices", block_indices, (None,) * 4, "[B, K, T, P]")
  ids = np.asarray(block_indices)
  num_blocks = -(-kv_len // block_size)
  packed = segments_lib.check_segments(
    segment_ids, segments, max_segments, ids.shape[0], kv_len
  )
  if packed is not None:
    if segment_ids is not None:
      segments_lib.check_ids_return(segment_ids)
    num_blocks = segments_lib.check_segment_values(packed, block_size)
  before = np.concatenate([np.full_like(ids[..., :1], -2), ids[..., :-1]], -1)
  faults = {
    f"-1 or a block id below {num_blocks}": (ids < -1) | (ids >= num_blocks),
    "-1 after a -1": (before == -1) & (ids != -1),
    "larger than the id before it": (ids >= 0) & (ids <= before),
  }
  bad = functools.reduce(np.logical_or, faults.values())
  if not bad.any():
    return
  at = tuple(int(i) for i in np.argwhere(bad)[0])
  want = next(text for text, fault in faults.items() if fault[at])
  raise wrong(
    f"block_indices[{', '.join(map(str, at))}]",
    want,
    f"{int(ids[at])} in the choice {ids[at[:3]].tolist()}",
  )


@any_mesh(
  results=SelectionRecall("", "", ""),  # pyright: ignore
  q="B T H D",
  k="B S K D",
  block_indices="B K T P",
  kv_lengths="B",
  segment_ids="B S",
  segments="B S",
  query_pieces="B",
)
def selection_recall(
  q: Float[Array, "B T H D"],
  k: Float[Array, "B S K D"],
  block_indices: Int32[Array, "B K T P"],
  *,
  block_size: int = 128,
  scale: float | None = None,
  kv_lengths: Integer[Array, "B"] | None = None,
  segment_ids: Int32[Array, "B S"] | None = None,
  segments: Segments | None = None,
  max_segments: int | None = None,
  query_pieces: QueryPieces | None = None,
) -> SelectionRecall:
  """How much of the Main Branch's dense attention a selection covers.

  With the dense attention mass of a block = mean over the group's heads of
  softmax(scale q k^T) summed over the block, and the best blocks of a query =
  the min(P, visible) of largest mass:

    block recall = |picked and best| / |best|
    score recall = sum of the mass of the picked blocks
    best score recall = sum of the mass of the best blocks

  Each recall is a mean over the groups and over the queries that see anything.
  The first two are the paper's (section 4). But for rounding, score recall is
  never above best score recall.

  A low score recall has two possible causes. If the best score recall is low
  too, then no choice of P blocks covers the attention: it is spread over many
  blocks, or the heads of a group attend to different ones. If the best score
  recall is high, then the choice is poor. A choice that must hold the query's
  own block can stay slightly below the best one.

  Takes O(T S) time and memory linear in T. It is a diagnostic: its gradient is
  zero, and XLA computes it on every backend.

  Args:
    q: queries, the last T of the S tokens.
    k: keys.
    block_indices: the choice.
    block_size: tokens a block.
    scale: factor of the scores; None: D^-0.5.
    kv_lengths: keys that exist in each batch row; the queries are the last T of
      them. None: all S. It is for caches: a right-padded training batch needs
      none, because causality hides its padding (query_mask keeps that out of
      the KL), and with kv_lengths its queries stand at wrong positions.
    segment_ids: the document of each token of packed rows; 0 is padding, and
      each run of equal ids a document. None: one document a row.
    segments: the same for prefix trees, from `tree_segments`; not both.
    max_segments: the most documents of a row, static. None: 64, or as many as
      there are blocks in a row, if that is more.
    query_pieces: where the queries stand if they are not the last T of S, see
      the module's text.

  Returns:
    The recalls.

  Raises:
    ValueError: an argument is wrong.
  """
  check_floats(q=(q, "B T H D"), k=(k, "B S K D"))
  check_attention(q, k, k)
  block_size = check_integer("block_size", block_size)
  check_chosen_blocks(block_indices, q, k)
  check_kv_lengths(kv_lengths, q.shape[0])
  _warn_of_padding(kv_lengths, q.shape[1], k.shape[1])
  queries = _queries(q, k, kv_lengths, query_pieces)
  layout = _block_layout(
    segment_ids, segments, max_segments, block_size, queries, q, k
  )
  recalls = xla.selection_recall(
    *jax.lax.stop_gradient((q, k)),
    block_indices,
    block_size=block_size,
    scale=check_scale("scale", scale, q.shape[-1]),
    **queries.portable,
    layout=layout,
  )
  return SelectionRecall(*(_nan_of_any_overflow(x, layout) for x in recalls))


@any_mesh(
  results="B K T P",
  q="B T H D",
  k="B S K D",
  kv_lengths="B",
  segment_ids="B S",
  segments="B S",
  query_pieces="B",
)
def best_blocks(
  q: Float[Array, "B T H D"],
  k: Float[Array, "B S K D"],
  *,
  block_size: int = 128,
  top_k: int = 16,
  scale: float | None = None,
  kv_lengths: Integer[Array, "B"] | None = None,
  segment_ids: Int32[Array, "B S"] | None = None,
  segments: Segments | None = None,
  max_segments: int | None = None,
  query_pieces: QueryPieces | None = None,
  implementation: Implementation | None = None,
) -> Int32[Array, "B K T P"]:
  """The blocks with the most dense attention: the oracle of a selection.

  These are the best blocks of `selection_recall`: the P blocks of largest
  mass = mean over the group's heads of softmax(scale q k^T) summed over the
  block, ties to the lower block. No choice of P blocks has a higher score
  recall. No block is forced.

  Takes O(T S) time and memory linear in T. It is for evaluation: it has no
  gradient. "xla" and "reference" compute masses in float32. "mosaic_gpu" takes
  each head's from dense attention to values that say in which block a token
  lies, which is much faster and rounds it to q's dtype: where masses are that
  close, another block may be chosen.

  Args:
    q: queries, the last T of the S tokens.
    k: keys.
    block_size: tokens a block.
    top_k: blocks kept, P.
    scale: factor of the scores; None: D^-0.5.
    kv_lengths: as in `selection_recall`.
    segment_ids: as in `selection_recall`.
    segments: as in `selection_recall`.
    max_segments: as in `selection_recall`.
    query_pieces: where the queries stand if they are not the last T of S, see
      the module's text.
    implementation: see the module's text.

  Returns:
    Ascending block ids without duplicates, then -1.

  Raises:
    ValueError: an argument is wrong.
    NotImplementedError: the implementation does not support the call.
  """
  check_floats(q=(q, "B T H D"), k=(k, "B S K D"))
  check_attention(q, k, k)
  block_size, top_k, _ = check_blocks(block_size, top_k, 0)
  check_kv_lengths(kv_lengths, q.shape[0])
  _warn_of_padding(kv_lengths, q.shape[1], k.shape[1])
  queries = _queries(q, k, kv_lengths, query_pieces)
  layout = _block_layout(
    segment_ids, segments, max_segments, block_size, queries, q, k
  )
  q, k = jax.lax.stop_gradient((q, k))
  options = dict(block_size=block_size, layout=layout)
  scale = check_scale("scale", scale, q.shape[-1])

  def exact():
    return xla.best_blocks(
      q, k, top_k=top_k, scale=scale, **options, **queries.portable
    )

  def rounded():
    mass = mosaic_gpu.block_masses(
      q, k, scale=scale, **options, **queries.kernels
    )
    return xla.largest_blocks(
      mass, k.shape[1], top_k=top_k, **options, **queries.portable
    )

  chosen = _dispatch(
    "best_blocks",
    implementation,
    reference=exact,
    xla=exact,
    mosaic_gpu=rounded,
  )
  return _none_of_overflow(chosen, layout)


_PADDING = (
  "kv_lengths has a length below S although T = S. The first queries of that"
  " row see nothing, and the others stand at earlier slots than their own. If"
  " this is a right-padded training batch, leave kv_lengths out: causality"
  " hides its padding, and query_mask keeps it out of the KL."
)


def _warn_of_padding(kv_lengths: Array | None, q_len: int, kv_len: int) -> None:
  """Warns once of lengths that look like those of a right-padded batch."""
  if kv_lengths is None or q_len != kv_len or _PADDING in _said:
    return
  if isinstance(kv_lengths, Tracer):
    return  # its values are not known yet
  lengths = np.asarray(kv_lengths)
  if ((lengths > 0) & (lengths < kv_len)).any():
    _said.add(_PADDING)
    # The line of the warning is that of the caller of this package.
    here = os.path.dirname(__file__)
    warnings.warn(_PADDING, skip_file_prefixes=(here,))


# --- choice of implementation ----------------------------------------------


_log = logging.getLogger("msa_jax")
_said: set[str] = set()


class Choice(NamedTuple):
  """Which implementation an operation takes, see `explain`.

  Attributes:
    operation: such as "msa_attention".
    implementation: what it takes; None if no implementation supports the call.
    refused: why each implementation that was tried before does not.
  """

  operation: str
  implementation: Implementation | None
  refused: dict[str, str]

  def __str__(self) -> str:
    text = f"{self.operation} takes {self.implementation or 'nothing'}"
    reasons = "; ".join(f"{k}: {v}" for k, v in self.refused.items())
    return f"{text} ({reasons})" if reasons else text


# What `explain` collects. A new value of the context makes JAX trace functions
# again that it has traced before.
_choices = jax.make_user_context(default_value=None)


class _Collected(list):
  """A list that is equal to itself alone, as keys of JAX's caches must be."""

  def __eq__(self, other: object) -> bool:
    return self is other

  def __hash__(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
    return id(self)


def explain(function: Callable, *args: Any, **kwargs: Any) -> list[Choice]:
  """Which implementations a call would take, and why not faster ones.

  The function is traced for the arguments' shapes; nothing is compiled or run:

      for choice in msa_jax.explain(msa_jax.msa_attention, *arrays, top_k=8):
        print(choice)

  Args:
    function: an operation, a layer, a model, or any function that calls them.
    *args: its arguments; arrays may be `jax.ShapeDtypeStruct`s.
    **kwargs: its arguments by name; those that are arrays are traced too.

  Returns:
    One entry for each different choice, in the order of the calls. Functions
    of JAX are not among them, such as the one that `GQAttention` without sinks
    calls in plain rows.

  Raises:
    ValueError: the call is wrong.
  """
  found = _Collected()
  arrays = {
    name: value
    for name, value in kwargs.items()
    if hasattr(value, "shape") and hasattr(value, "dtype")
  }
  rest = {n: value for n, value in kwargs.items() if n not in arrays}

  def call(args, arrays):
    return jax.tree.leaves(function(*args, **arrays, **rest))

  with _choices(found):
    try:
      jax.eval_shape(call, args, arrays)
    except NotImplementedError:
      # No implementation takes the call; the reason is in `found`.
      if not found or found[-1].implementation is not None:
        raise
  return list({str(choice): choice for choice in found}.values())


class _Unsupported(NamedTuple):
  """What takes the place of an implementation that takes no such call."""

  reason: str

  def __call__(self) -> NoReturn:
    raise NotImplementedError(self.reason)


def _only_reference(what: str) -> _Unsupported:
  return _Unsupported(
    f"{what} needs implementation='reference' or None: xla and mosaic_gpu do"
    " not support it"
  )


def _dispatch(
  operation: str,
  implementation: Implementation | None,
  **implementations: Callable,
) -> Any:
  """Calls the named implementation, or the first that supports the call."""
  if implementation is not None:
    check_choice("implementation", implementation, Implementation)
  kernels = implementations["mosaic_gpu"]
  refused: dict[str, str] = {}
  taken: list[Implementation] = []

  def first_of(*names: Implementation) -> Any:
    for name in names:
      try:
        result = _reverse_mode(implementations[name])
      except NotImplementedError as error:
        refused[name] = str(error)
      else:
        taken.append(name)
        return result
    raise NotImplementedError(
      "; ".join(f"{k}: {v}" for k, v in refused.items())
    )

  portable = functools.partial(first_of, "xla", "reference")
  if implementation is not None:
    try:
      if implementation == "mosaic_gpu":
        # What no device supports is said before devices are looked at.
        if isinstance(kernels, _Unsupported):
          kernels()
        result = _on_gpu(kernels, portable, named=True)
      else:
        result = _reverse_mode(implementations[implementation])
    except NotImplementedError as error:
      reason = str(error)
      device = mosaic_gpu.refusal() if implementation == "mosaic_gpu" else None
      if device and not isinstance(kernels, _Unsupported):
        reason = f"{device.reason}; {reason}"
      refused = {implementation: reason}
      _note(Choice(operation, None, refused), implementation)
      raise
    _note(Choice(operation, implementation, {}), implementation)
    return result

  refusal = mosaic_gpu.refusal()
  try:
    if isinstance(kernels, _Unsupported):
      kernels()
    result = _on_gpu(kernels, portable, named=False)
    kernels_refused = refusal.reason if refusal else None
  except NotImplementedError as error:
    taken.clear()
    refused.clear()
    kernels_refused = str(error)
    if refusal and not isinstance(kernels, _Unsupported):
      kernels_refused = refusal.reason
    try:
      result = portable()
    except NotImplementedError as error:
      refused = {"mosaic_gpu": kernels_refused, **refused}
      _note(Choice(operation, None, refused), implementation)
      reasons = "; ".join(f"{k}: {v}" for k, v in refused.items())
      raise NotImplementedError(reasons) from error
  # Where the program may also be lowered for a GPU, the choice that is told is
  # the one for the device that is here.
  choice = Choice(operation, "mosaic_gpu", {})
  if kernels_refused is not None:
    refused = {"mosaic_gpu": kernels_refused, **refused}
    choice = Choice(operation, taken[-1], refused)
  _note(choice, implementation)
  return result


def _note(choice: Choice, implementation: Implementation | None) -> None:
  """Tells `explain`, and the log if the choice was ours, once for each text."""
  found = _choices.value
  if found is not None:
    found.append(choice)
  elif implementation is None and str(choice) not in _said:
    _said.add(str(choice))
    # Where the device has kernels and the call does not fit them, the user may
    # want to change the call.
    slow = "mosaic_gpu" in choice.refused and mosaic_gpu.refusal() is None
    _log.log(logging.WARNING if slow else logging.INFO, "%s", choice)


def _reverse_mode(function: Callable) -> Any:
  return reverse_mode(
    function,
    "xla and mosaic_gpu support reverse mode only (jax.grad, jax.vjp), not"
    " jax.jvp, jax.jacfwd or jax.hessian; implementation='reference' has both",
  )


def _on_gpu(kernels: Callable, portable: Callable, named: bool) -> Any:
  """The kernels, also in a program that is lowered for a GPU elsewhere.

  Without a GPU here, each platform that the program is lowered for takes what
  is right for it: CUDA the kernels, and the others `portable`, or an error if
  the kernels were named. JAX chooses when it lowers the program; in an eager
  call it chooses at once.
  """
  refusal = mosaic_gpu.refusal()
  if refusal is None:
    return _reverse_mode(kernels)
  if not refusal.ahead:
    raise NotImplementedError(refusal.reason)

  def refuse():
    # All results and gradients pass through the error, so that no program that
    # uses one of them can do without it.
    refused = functools.partial(_refused.bind, reason=refusal.reason)
    return jax.tree.map(refused, portable())

  return jax.lax.platform_dependent(
    cuda=functools.partial(_reverse_mode, kernels),
    default=refuse if named else portable,
  )


# The identity of an array that no platform can compute: it raises an error when
# it is run or lowered.
_refused = Primitive("msa_jax_refused")
_refused.def_abstract_eval(lambda x, *, reason: x)


@_refused.def_impl
def _(x, *, reason):
  raise NotImplementedError(reason)


def _lower_refused(context, x, *, reason):
  raise NotImplementedError(reason)


mlir.register_lowering(_refused, _lower_refused)
ad.deflinear(
  _refused,
  lambda cotangent, *, reason: [_refused.bind(cotangent, reason=reason)],
)
batching.defvectorized(_refused)


# --- where the queries stand, and packed rows ---------------------------------


class _Queries(NamedTuple):
  """Where the queries stand, as the implementations take it.

  Attributes:
    portable: arguments of the functions of `reference` and `xla`.
    kernels: those of `mosaic_gpu`.
    slots: of the queries, with query_pieces; else None.
  """

  portable: dict[str, Any]
  kernels: dict[str, Any]
  slots: Int32[Array, "B T"] | None


def _queries(
  q: Array,
  k: Array,
  kv_lengths: Array | None,
  query_pieces: QueryPieces | None,
) -> _Queries:
  lengths: dict[str, Any] = dict(kv_lengths=kv_lengths)
  if query_pieces is None:
    return _Queries(lengths, lengths, None)
  if kv_lengths is not None:
    raise wrong("kv_lengths", "None with query_pieces", "both")
  b, t, s = *q.shape[:2], k.shape[1]
  pieces, slots = [], []
  for start, length in check_query_pieces(query_pieces, b, t, s):
    start = jnp.broadcast_to(jnp.asarray(start, jnp.int32), (b,))
    # A piece that ends behind the keys sees nothing.
    start = jnp.where(start <= s - length, start, -length)
    pieces.append((start, length))
    slots.append(start[:, None] + jnp.arange(length, dtype=jnp.int32)[None])
  at = jnp.concatenate(slots, axis=1)
  return _Queries(
    lengths | dict(query_slots=at), lengths | dict(query_pieces=pieces), at
  )


def _block_layout(
  segment_ids: Array | None,
  segments: Segments | None,
  max_segments: int | None,
  block_size: int,
  queries: _Queries,
  q: Array,
  k: Array,
) -> BlockLayout | None:
  """The layout of packed rows; None for plain ones."""
  packed = segments_lib.check_segments(
    segment_ids, segments, max_segments, k.shape[0], k.shape[1]
  )
  if packed is None:
    return None
  name = "segments" if segment_ids is None else "segment_ids"
  if queries.portable["kv_lengths"] is not None:
    raise NotImplementedError(
      f"{name} supports no kv_lengths and no cache, got both"
    )
  if q.shape[1] != k.shape[1] and queries.slots is None:
    raise NotImplementedError(
      f"{name} supports as many queries as keys, or query_pieces, got T ="
      f" {q.shape[1]} and S = {k.shape[1]}"
    )
  return segments_lib.block_layout(packed, block_size)


def _without_padding(
  query_mask: Array | None, layout: BlockLayout | None, queries: _Queries
) -> Array | None:
  """The query mask of the KL without the padding of packed rows."""
  if layout is None:
    return query_mask
  own = layout.own_block
  if queries.slots is not None:
    own = reference.own_blocks(layout, queries.slots)
  real = own >= 0
  if query_mask is None:
    return real
  return jnp.where(real, query_mask, jnp.zeros((), query_mask.dtype))


def _nan_of_overflow(
  results: tuple[Array, Array], layout: BlockLayout | None
) -> tuple[Array, Array]:
  """out and lse, NaN in the rows with more than max_segments spans.

  A product makes their gradients NaN too, which `where` would not.
  """
  if layout is None:
    return results
  out, lse = results
  factor = jnp.where(layout.overflow, jnp.nan, 1)
  return (
    out * factor[:, None, None, None].astype(out.dtype),
    lse * factor[:, None, None].astype(lse.dtype),
  )


def _nan_of_any_overflow(x: Array, layout: BlockLayout | None) -> Array:
  """A mean over all rows, NaN if one has more than max_segments spans."""
  if layout is None:
    return x
  factor = jnp.where(jnp.any(layout.overflow), jnp.nan, 1)
  return x * factor.astype(x.dtype)


def _none_of_overflow(chosen: Array, layout: BlockLayout | None) -> Array:
  if layout is None:
    return chosen
  return jnp.where(layout.overflow[:, None, None, None], -1, chosen)


# --- shared with layers and caches --------------------------------------------


def dense_attention(
  q: Float[Array, "B T H D"],
  k: Float[Array, "B S K D"],
  v: Float[Array, "B S K D"],
  *,
  scale: float | None = None,
  kv_lengths: Integer[Array, "B"] | None = None,
  segments: Segments | None = None,
  query_pieces: QueryPieces | None = None,
  block_size: int = 128,
  axis_name: str | None = None,
  implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T H D"], Float[Array, "B H T"]]:
  """The warm-up phase's attention by itself: causal and dense.

  Unlike `jax.nn.dot_product_attention` it returns lse with its gradient, and
  float64 stays float64. `axis_name` is as in `decode_attention`.

  Returns:
    (out, lse), as `msa_attention` has them.
  """
  scale = check_scale("scale", scale, q.shape[-1])
  queries = _queries(q, k, kv_lengths, query_pieces)
  # The block size matters only for how many segments a row may have.
  layout = _block_layout(None, segments, None, block_size, queries, q, k)
  portable = dict(scale=scale, layout=layout) | queries.portable
  if axis_name is not None:
    return xla.warmup_attention(q, k, v, **portable, axis_name=axis_name)
  results = _dispatch(
    "dense_attention",
    implementation,
    reference=lambda: reference.warmup_attention(q, k, v, **portable),
    xla=lambda: xla.warmup_attention(q, k, v, **portable),
    mosaic_gpu=lambda: mosaic_gpu.warmup_attention(
      q, k, v, scale=scale, layout=layout, **queries.kernels
    ),
  )
  return _nan_of_overflow(results, layout)


def count_kl_queries(
  q: Float[Array, "B T H D"],
  k: Float[Array, "B S K D"],
  query_mask: Bool[Array, "B T"] | Float32[Array, "B T"] | None,
  segments: Segments | None = None,
  query_pieces: QueryPieces | None = None,
) -> Float[Array, ""]:
  """The number of (query, group) pairs that `index_kl_loss` averages over.

  Devices that each hold some batch rows and KV heads weigh their means by it.
  """
  shape = (q.shape[0], k.shape[2], q.shape[1])
  if segments is not None:
    layout = segments_lib.block_layout(segments, 1)
    queries = _queries(q, k, None, query_pieces)
    query_mask = _without_padding(query_mask, layout, queries)
  return reference.counted_queries(shape, query_mask)


def quantise_index_keys(
  index_k: Float[Array, "*A I"],
) -> tuple[Float[Array, "*A I"], Float[Array, "*A"]]:
  """e4m3 codes and float32 scales, as `decode_attention` takes index keys.

  A key is about codes * scale. The scale is a power of two, so that to divide
  by it is exact; it maps the key's largest magnitude to 128 or more, and less
  than 256, of which e4m3 holds 448.
  """
  return reference.fp8_codes(index_k)
