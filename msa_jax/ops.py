"""The public operations: checks, defaults and the choice of implementation.

Every function takes `implementation`:

- `"reference"`: the specification, O(T S) memory, any backend.
- `"xla"`: computes only the chosen blocks, memory linear in T, any backend.
- `"mosaic_gpu"`: Pallas kernels for Hopper GPUs.
- `None`: the first of mosaic_gpu, xla, reference that supports the call.

A named implementation never falls back: a legal call that it does not support
raises NotImplementedError. A wrong call raises ValueError, and its text names
the argument, what came and what is wanted. Letters in shapes are those of
`msa_jax.reference`.
"""

from __future__ import annotations

import functools
import math
import typing
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int32, Integer

from msa_jax import mosaic_gpu, reference, xla

Implementation = Literal["reference", "xla", "mosaic_gpu"]
Phase = Literal["sparse", "warmup"]
ScorePrecision = Literal["exact", "fast", "fp8"]

# Query tokens a row that `decode_attention` takes.
MAX_DECODE_TOKENS = 16


class MSAOutput(NamedTuple):
  """What `msa_attention` returns; a pytree.

  Attributes:
    out: attention output, in q's dtype.
    kl: KL loss in nats; 0 without `with_kl`.
    block_indices: the blocks that the Index Branch chose.
    lse: log sum exp of the scaled scores over the attended tokens, natural
      log; -inf for empty rows. Carries no gradient.
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


def select_blocks(
  index_q: Float[Array, "B T K I"],
  index_k: Float[Array, "B S I"],
  *,
  block_size: int = 128,
  top_k: int = 16,
  num_local_blocks: int = 1,
  kv_lengths: Integer[Array, "B"] | None = None,
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
    kv_lengths: keys that exist in each row; the queries are the last T of them.
      None: all S.
    score_precision: "exact" ranks float32 scores. "fast" may rank by fewer
      mantissa bits (at least 10). "fp8" also rounds the operands to e4m3 with
      a scale each. Only "exact" is the same for every implementation.
    implementation: see the module's text.

  Returns:
    Ascending block ids without duplicates, then -1.

  Raises:
    ValueError: an argument is wrong.
    NotImplementedError: the named implementation does not support the call.
  """
  _check_floats(index_q=(index_q, "B T K I"), index_k=(index_k, "B S I"))
  _check_index(index_q, index_k)
  _check_blocks(block_size, top_k, num_local_blocks)
  _check_kv_lengths(kv_lengths, index_q.shape[0])
  _check_choice("score_precision", score_precision, ScorePrecision)
  index_q, index_k = jax.lax.stop_gradient((index_q, index_k))
  options = dict(
    block_size=block_size,
    top_k=top_k,
    num_local_blocks=num_local_blocks,
    kv_lengths=kv_lengths,
    score_precision=score_precision,
  )
  return _dispatch(
    implementation,
    reference=lambda: reference.select_blocks(index_q, index_k, **options),
    xla=lambda: xla.select_blocks(index_q, index_k, **options),
    mosaic_gpu=lambda: mosaic_gpu.select_blocks(index_q, index_k, **options),
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
      block may be missing, blocks after it contribute nothing, and a row of -1
      is an empty row. Entries are not checked (`check_block_indices` does).
    block_size: tokens a block.
    scale: factor of the scores; None: D^-0.5.
    kv_lengths: keys that exist in each row; the queries are the last T of them.
      None: all S.
    return_lse: also return the log sum exp (natural log) of the scaled scores.
      It carries no gradient.
    implementation: see the module's text.

  Returns:
    out in q's dtype, or (out, lse).

  Raises:
    ValueError: an argument is wrong.
    NotImplementedError: the named implementation does not support the call.
  """
  _check_floats(q=(q, "B T H D"), k=(k, "B S K D"), v=(v, "B S K D"))
  _check_attention(q, k, v)
  _check_positive("block_size", block_size)
  _check_block_indices(block_indices, q, k)
  _check_kv_lengths(kv_lengths, q.shape[0])
  options = dict(
    block_size=block_size,
    scale=_scale("scale", scale, q),
    kv_lengths=kv_lengths,
  )
  args = (q, k, v, block_indices)
  out, lse = _dispatch(
    implementation,
    reference=lambda: reference.sparse_attention(*args, **options),
    xla=lambda: xla.sparse_attention(*args, **options),
    mosaic_gpu=lambda: mosaic_gpu.sparse_attention(*args, **options),
  )
  return (out, lse) if return_lse else out


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
  query_mask: Bool[Array, "B T"] | None = None,
  implementation: Implementation | None = None,
) -> Float[Array, ""]:
  """KL divergence that teaches the Index Branch the Main Branch's attention.

  With J the visible tokens of a query's chosen blocks,
  p = mean over the group's heads of softmax_J(scale q . k) and
  r = softmax_J(index_scale index_q . index_k), the loss is the mean over batch,
  queries and groups of sum_J p (log p - log r), in nats (paper, section 2).
  Gradient reaches index_q and index_k only: dL / d(index_scale s_j) =
  (r_j - p_j) / (rows counted K). Rows with nothing visible add 0.

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
    kv_lengths: keys that exist in each row; None: all S.
    query_mask: queries that count; None: all.
    implementation: see the module's text.

  Raises:
    ValueError: an argument is wrong.
    NotImplementedError: the named implementation does not support the call.
  """
  _check_floats(
    q=(q, "B T H D"),
    k=(k, "B S K D"),
    index_q=(index_q, "B T K I"),
    index_k=(index_k, "B S I"),
  )
  _check_attention(q, k, k)
  _check_index(index_q, index_k, q, k)
  _check_positive("block_size", block_size)
  if block_indices is not None:
    _check_block_indices(block_indices, q, k)
  _check_kv_lengths(kv_lengths, q.shape[0])
  _check_query_mask(query_mask, q)
  if lse is not None:
    _check_array("lse", lse, (q.shape[0], q.shape[2], q.shape[1]), "[B, H, T]")
    if not jnp.issubdtype(lse.dtype, jnp.floating):
      raise ValueError(f"lse must be floating point, got {lse.dtype}")
    lse = jax.lax.stop_gradient(lse)
  options = dict(
    block_size=block_size,
    scale=_scale("scale", scale, q),
    index_scale=_scale("index_scale", index_scale, index_q),
    lse=lse,
    kv_lengths=kv_lengths,
    query_mask=query_mask,
  )
  args = (q, k, index_q, index_k, block_indices)
  return _dispatch(
    implementation,
    reference=lambda: reference.index_kl_loss(*args, **options),
    xla=lambda: xla.index_kl_loss(*args, **options),
    mosaic_gpu=lambda: mosaic_gpu.index_kl_loss(*args, **options),
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
  query_mask: Bool[Array, "B T"] | None = None,
  score_precision: ScorePrecision = "exact",
  implementation: Implementation | None = None,
) -> MSAOutput:
  """MiniMax Sparse Attention: selection, attention and KL loss in one call.

  phase "sparse" attends to the chosen blocks and takes the KL over them; phase
  "warmup" attends to all visible tokens and takes the KL over all of them, and
  `block_indices` holds what the Index Branch would choose (paper, section 3).
  out's gradient reaches q, k and v; kl's reaches index_q and index_k only.

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
    kv_lengths: keys that exist in each row; the queries are the last T of them.
      None: all S.
    query_mask: queries that count in the KL; None: all.
    score_precision: see `select_blocks`.
    implementation: see the module's text.

  Raises:
    ValueError: an argument is wrong.
    NotImplementedError: the named implementation does not support the call.
  """
  _check_floats(
    q=(q, "B T H D"),
    k=(k, "B S K D"),
    v=(v, "B S K D"),
    index_q=(index_q, "B T K I"),
    index_k=(index_k, "B S I"),
  )
  _check_attention(q, k, v)
  _check_index(index_q, index_k, q, k)
  _check_blocks(block_size, top_k, num_local_blocks)
  _check_kv_lengths(kv_lengths, q.shape[0])
  _check_query_mask(query_mask, q)
  _check_choice("phase", phase, Phase)
  _check_choice("score_precision", score_precision, ScorePrecision)
  scale = _scale("scale", scale, q)
  index_scale = _scale("index_scale", index_scale, index_q)

  def run(module) -> MSAOutput:
    block_indices = module.select_blocks(
      *jax.lax.stop_gradient((index_q, index_k)),
      block_size=block_size,
      top_k=top_k,
      num_local_blocks=num_local_blocks,
      kv_lengths=kv_lengths,
      score_precision=score_precision,
    )
    if phase == "warmup":
      attended = None
      out, lse = module.warmup_attention(
        q, k, v, scale=scale, kv_lengths=kv_lengths
      )
    else:
      attended = block_indices
      out, lse = module.sparse_attention(
        q,
        k,
        v,
        block_indices,
        block_size=block_size,
        scale=scale,
        kv_lengths=kv_lengths,
      )
    if with_kl:
      kl = module.index_kl_loss(
        *jax.lax.stop_gradient((q, k)),
        index_q,
        index_k,
        attended,
        block_size=block_size,
        scale=scale,
        index_scale=index_scale,
        lse=lse,
        kv_lengths=kv_lengths,
        query_mask=query_mask,
      )
    else:
      kl = jnp.zeros((), reference.compute_dtype(q))
    return MSAOutput(out, kl, block_indices, lse)

  return _dispatch(
    implementation,
    reference=lambda: run(reference),
    xla=lambda: run(xla),
    mosaic_gpu=lambda: run(mosaic_gpu),
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
  implementation: Implementation | None = None,
) -> DecodeOutput:
  """Sparse attention of a row's last 1 to 16 tokens to the tokens of a cache.

  The same as `msa_attention` in the sparse phase, for arrays that have room
  for C tokens a row. Slots from kv_lengths[b] on are unused: whatever they
  hold, NaN included, changes nothing.

  Index keys may be e4m3 codes with a float32 scale a token, as `msa_jax.Cache`
  keeps them. The score of key j is then
  index_k_scale[b, j] (e4m3(index_q / r) . index_k[b, j]) r,
  r = max |index_q| / 448 of each query and group: `score_precision="fp8"`.

  Nothing is to be trained through a cache: there is no gradient.

  Args:
    q: queries, the last T of the row's kv_lengths[b] tokens.
    k: keys.
    v: values.
    index_q: index queries, one head a group.
    index_k: index keys, one head; in q's dtype or float8_e4m3fn.
    kv_lengths: tokens that each row holds, the queries' own among them. Rows
      that hold fewer than T have empty rows first.
    index_k_scale: with e4m3 index keys, and only then.
    block_size: tokens a block.
    top_k: blocks kept, P.
    num_local_blocks: blocks forced, counted back from the query's own.
    scale: factor of the main scores; None: D^-0.5.
    implementation: see the module's text.

  Raises:
    ValueError: an argument is wrong.
    NotImplementedError: the named implementation does not support the call, or
      it is differentiated.
  """
  _check_floats(
    q=(q, "B T H D"),
    k=(k, "B C K D"),
    v=(v, "B C K D"),
    index_q=(index_q, "B T K I"),
  )
  _check_attention(q, k, v)
  _check_decode_index(index_q, index_k, index_k_scale, q, k)
  if q.shape[1] > MAX_DECODE_TOKENS:
    raise ValueError(
      f"q must have 1 to {MAX_DECODE_TOKENS} tokens, got T = {q.shape[1]};"
      " msa_attention with kv_lengths takes more"
    )
  _check_blocks(block_size, top_k, num_local_blocks)
  if kv_lengths is None:
    raise ValueError("kv_lengths must be an array of shape [B], got None")
  _check_kv_lengths(kv_lengths, q.shape[0])
  options = dict(
    block_size=block_size,
    top_k=top_k,
    num_local_blocks=num_local_blocks,
    scale=_scale("scale", scale, q),
  )

  args = _without_gradient((q, k, v, index_q, index_k))
  cached = dict(kv_lengths=kv_lengths, index_k_scale=index_k_scale)
  return DecodeOutput(
    *_dispatch(
      implementation,
      reference=lambda: reference.decode_attention(*args, **cached, **options),
      xla=lambda: xla.decode_attention(*args, **cached, **options),
      mosaic_gpu=lambda: mosaic_gpu.decode_attention(
        *args, **cached, **options
      ),
    )
  )


# Around the operands and not around the operation: JAX cannot lower a kernel
# that writes to refs inside a custom_jvp.
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
) -> None:
  """Checks the values of a choice of blocks, for debugging.

  The operations assume, and do not check, that each row of block_indices holds
  ascending block ids without duplicates, each in 0 .. ceil(kv_len / block_size)
  - 1, and then only -1. This function looks: it copies the array to the host,
  so it is no part of a jitted program.

  Raises:
    ValueError: names the first bad entry, [b, k, t, p], and what is wrong. Also
      under jit, where there are no values to look at.
  """
  if isinstance(block_indices, Tracer):
    raise ValueError(
      "block_indices must be a concrete array to be checked, got a traced one:"
      " call check_block_indices outside jit"
    )
  _check_positive("kv_len", kv_len)
  _check_positive("block_size", block_size)
  _check_array("block_indices", block_indices, (None,) * 4, "[B, K, T, P]")
  ids = np.asarray(block_indices)
  num_blocks = -(-kv_len // block_size)
  before = np.concatenate([np.full_like(ids[..., :1], -2), ids[..., :-1]], -1)
  faults = {
    f"must be -1 or a block id below {num_blocks}": (ids < -1)
    | (ids >= num_blocks),
    "must not follow a -1": (before == -1) & (ids != -1),
    "must be larger than the id before it": (ids >= 0) & (ids <= before),
  }
  bad = functools.reduce(np.logical_or, faults.values())
  if not bad.any():
    return
  at = tuple(int(i) for i in np.argwhere(bad)[0])
  what = next(text for text, where in faults.items() if where[at])
  raise ValueError(
    f"block_indices[{', '.join(map(str, at))}] {what}, got {int(ids[at])} in"
    f" the row {ids[at[:3]].tolist()}"
  )


def selection_recall(
  q: Float[Array, "B T H D"],
  k: Float[Array, "B S K D"],
  block_indices: Int32[Array, "B K T P"],
  *,
  block_size: int = 128,
  scale: float | None = None,
  kv_lengths: Integer[Array, "B"] | None = None,
) -> SelectionRecall:
  """How much of the Main Branch's dense attention a selection covers.

  With the dense attention mass of a block = mean over the group's heads of
  softmax(scale q k^T) summed over the block, and the best blocks of a query =
  the min(P, visible) of largest mass:

    block recall = |picked and best| / |best|
    score recall = sum of the mass of the picked blocks
    best score recall = sum of the mass of the best blocks

  all means over queries that see anything, and groups (the first two: paper,
  section 4). Score recall is never above best score recall, but for rounding.
  A low score recall near the best one tells of attention that is diffuse, or
  whose heads want different blocks in one group; far below it, of a poor
  choice. One that must hold the query's own block can fall slightly short of
  the best however it is made. O(T S) time, memory linear in T. No gradient is
  meant to be taken.

  Returns:
    The recalls.

  Raises:
    ValueError: an argument is wrong.
  """
  _check_floats(q=(q, "B T H D"), k=(k, "B S K D"))
  _check_attention(q, k, k)
  _check_positive("block_size", block_size)
  _check_block_indices(block_indices, q, k)
  _check_kv_lengths(kv_lengths, q.shape[0])
  recalls = xla.selection_recall(
    q,
    k,
    block_indices,
    block_size=block_size,
    scale=_scale("scale", scale, q),
    kv_lengths=kv_lengths,
  )
  return SelectionRecall(*recalls)


# --- choice of implementation ----------------------------------------------


def _dispatch(
  implementation: Implementation | None, **implementations: Callable
):
  if implementation is not None:
    _check_choice("implementation", implementation, Implementation)
    return implementations[implementation]()
  reasons = []
  for name in ("mosaic_gpu", "xla", "reference"):
    try:
      return implementations[name]()
    except NotImplementedError as e:
      reasons.append(f"{name}: {e}")
  raise NotImplementedError("; ".join(reasons))


# --- checks ----------------------------------------------------------------


def _check_choice(name: str, value, choices) -> None:
  allowed = typing.get_args(choices)
  if value not in allowed:
    raise ValueError(
      f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}"
    )


def _check_floats(**arrays: tuple[Array, str]) -> None:
  """Ranks, sizes and dtypes of the floating-point arguments of one call."""
  first_name, first = "", None
  for name, (x, letters) in arrays.items():
    want = f"[{', '.join(letters.split())}]"
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
      raise ValueError(
        f"{name} must be an array of shape {want}, got {type(x).__name__}"
      )
    if len(x.shape) != len(letters.split()):
      raise ValueError(
        f"{name} must have rank {len(letters.split())}, {want}, got shape"
        f" {tuple(x.shape)}"
      )
    if 0 in x.shape:
      raise ValueError(
        f"{name} must have no empty axis, got shape {tuple(x.shape)}"
      )
    if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64):
      raise ValueError(
        f"{name} must be bfloat16, float16, float32 or float64, got {x.dtype}"
      )
    if first is None:
      first_name, first = name, x.dtype
    elif x.dtype != first:
      raise ValueError(
        f"{name} must have the dtype of {first_name}, {first}, got {x.dtype}"
      )


def _check_axis(
  name: str, x: Array, axis: int, want: int, letter: str, other: str
) -> None:
  if x.shape[axis] != want:
    raise ValueError(
      f"{name} must have {letter} = {want} (as {other}) in axis {axis}, got"
      f" {x.shape[axis]} in shape {tuple(x.shape)}"
    )


def _check_attention(q: Array, k: Array, v: Array) -> None:
  b, t, h, d = q.shape
  _, s, num_kv_heads, _ = k.shape
  _check_axis("k", k, 0, b, "B", "q")
  _check_axis("v", v, 0, b, "B", "q")
  _check_axis("v", v, 1, s, "S", "k")
  _check_axis("v", v, 2, num_kv_heads, "K", "k")
  _check_axis("k", k, 3, d, "D", "q")
  _check_axis("v", v, 3, d, "D", "q")
  if t > s:
    raise ValueError(
      f"q must have at most as many tokens as k (the queries are the last T of"
      f" S), got T = {t} and S = {s}"
    )
  if h % num_kv_heads:
    raise ValueError(
      f"q must have a multiple of k's {num_kv_heads} heads, got H = {h}"
    )


def _check_index(
  index_q: Array,
  index_k: Array,
  q: Array | None = None,
  k: Array | None = None,
) -> None:
  b, t, _, i = index_q.shape
  if q is not None and k is not None:
    _check_axis("index_q", index_q, 0, q.shape[0], "B", "q")
    _check_axis("index_q", index_q, 1, q.shape[1], "T", "q")
    _check_axis("index_q", index_q, 2, k.shape[2], "K", "k")
    _check_axis("index_k", index_k, 1, k.shape[1], "S", "k")
  _check_axis("index_k", index_k, 0, b, "B", "index_q")
  _check_axis("index_k", index_k, 2, i, "I", "index_q")
  if t > index_k.shape[1]:
    raise ValueError(
      f"index_q must have at most as many tokens as index_k (the queries are"
      f" the last T of S), got T = {t} and S = {index_k.shape[1]}"
    )


def _check_decode_index(
  index_q: Array,
  index_k: Array,
  index_k_scale: Array | None,
  q: Array,
  k: Array,
) -> None:
  """The index operands of decoding, whose keys may be e4m3 codes."""
  _check_array("index_k", index_k, (None,) * 3, "[B, C, I]")
  codes = index_k.dtype == jnp.float8_e4m3fn
  if not codes and index_k.dtype != index_q.dtype:
    raise ValueError(
      f"index_k must have the dtype of index_q, {index_q.dtype}, or"
      f" float8_e4m3fn, got {index_k.dtype}"
    )
  _check_index(index_q, index_k, q, k)
  if not codes:
    if index_k_scale is not None:
      raise ValueError(
        "index_k_scale must be None unless index_k is float8_e4m3fn, got an"
        f" index_k of {index_k.dtype}"
      )
    return
  if index_k_scale is None:
    raise ValueError(
      "index_k_scale must be given with an index_k of float8_e4m3fn, got None"
    )
  _check_array("index_k_scale", index_k_scale, index_k.shape[:2], "[B, C]")
  if index_k_scale.dtype != jnp.float32:
    raise ValueError(
      f"index_k_scale must be float32, got {index_k_scale.dtype}"
    )


def _is_int(x) -> bool:
  return isinstance(x, int) and not isinstance(x, bool)


def _check_positive(name: str, value: int) -> None:
  if not _is_int(value) or value < 1:
    raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")


def _check_blocks(block_size: int, top_k: int, num_local_blocks: int) -> None:
  _check_positive("block_size", block_size)
  _check_positive("top_k", top_k)
  if not _is_int(num_local_blocks) or not 0 <= num_local_blocks <= top_k:
    raise ValueError(
      f"num_local_blocks must be an integer from 0 to top_k = {top_k}, got"
      f" {num_local_blocks!r}"
    )


def _check_array(
  name: str, x: Array, shape: Sequence[int | None], letters: str
) -> None:
  """The shape of an argument; None leaves a size free."""
  if not hasattr(x, "shape") or not hasattr(x, "dtype"):
    raise ValueError(
      f"{name} must be an array of shape {letters}, got {type(x).__name__}"
    )
  if len(x.shape) != len(shape) or any(
    want is not None and size != want for size, want in zip(x.shape, shape)
  ):
    want = ", ".join("any" if size is None else str(size) for size in shape)
    raise ValueError(
      f"{name} must have shape {letters} = ({want}), got {tuple(x.shape)}"
    )


def _check_block_indices(block_indices: Array, q: Array, k: Array) -> None:
  shape = (q.shape[0], k.shape[2], q.shape[1], None)
  _check_array("block_indices", block_indices, shape, "[B, K, T, P]")
  if block_indices.dtype != jnp.int32:
    raise ValueError(f"block_indices must be int32, got {block_indices.dtype}")
  if block_indices.shape[-1] < 1:
    raise ValueError("block_indices must have P of at least 1, got 0")


def _check_kv_lengths(kv_lengths: Array | None, batch: int) -> None:
  if kv_lengths is None:
    return
  _check_array("kv_lengths", kv_lengths, (batch,), "[B]")
  if not jnp.issubdtype(kv_lengths.dtype, jnp.integer):
    raise ValueError(f"kv_lengths must be integers, got {kv_lengths.dtype}")


def _check_query_mask(query_mask: Array | None, q: Array) -> None:
  if query_mask is None:
    return
  _check_array("query_mask", query_mask, q.shape[:2], "[B, T]")
  if query_mask.dtype != jnp.bool_:
    raise ValueError(f"query_mask must be bool, got {query_mask.dtype}")


def _scale(name: str, value: float | None, x: Array) -> float:
  if value is None:
    return x.shape[-1] ** -0.5
  try:
    value = float(value)
  except (TypeError, ValueError, jax.errors.ConcretizationTypeError):
    raise ValueError(
      f"{name} must be a Python number or None, got {value!r}"
    ) from None
  if not math.isfinite(value):
    raise ValueError(f"{name} must be finite, got {value!r}")
  return value
