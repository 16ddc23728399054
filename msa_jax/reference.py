"""MiniMax Sparse Attention as dense masked attention: the specification.

Every operation builds O(T S) arrays and follows the formulas of
arXiv 2606.13392 line by line, in float32 (float64 for float64 inputs) at the
highest matmul precision. It is the oracle that `xla` and the kernels are
tested against; use it for small sizes and for reading. It imports the form of
packed rows (`segments`) and nothing else of the package, and `xla` shares its
helpers.

Letters: B batch; T, S query and key tokens (queries are the last T of S);
H, K, G query heads, KV heads and H // K; D, I head dim and index dim; N blocks
of `block_size` key slots anchored at slot 0; P blocks kept (`top_k`). `layout`
says which tokens of a packed row see which, and where its blocks lie; None
stands for plain rows.

A non-finite input affects only the queries that can see it: a NaN or infinity
in a query, in a visible key or in a visible value makes that query's output
NaN, and one in a key or value that the query does not attend to changes
nothing.

Arguments are checked in `ops`, not here.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from msa_jax.segments import BlockLayout

HIGHEST = lax.Precision.HIGHEST
# Which queries count in the KL, or how much each counts.
QueryMask = Bool[Array, "B T"] | Float[Array, "B T"]


def compute_dtype(x: Array) -> jnp.dtype:
  """float32, or the input's dtype if that is wider."""
  # Under strict dtype promotion, jnp.promote_types refuses bfloat16.
  return jnp.dtype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)


def query_positions(
  q_len: int,
  kv_len: int,
  batch: int,
  kv_lengths: Int[Array, "B"] | None,
  layout: BlockLayout | None = None,
  query_slots: Int[Array, "B T"] | None = None,
) -> Int[Array, "B T"]:
  """Slots of the queries; by default the last `q_len` keys of each batch row.

  They are negative where a batch row holds fewer than `q_len` keys, and for the
  padding of packed rows. `query_slots` are those of queries that stand
  elsewhere.
  """
  if query_slots is not None:
    slots = query_slots
  else:
    if kv_lengths is None:
      ends = jnp.full((batch,), kv_len, jnp.int32)
    else:
      ends = jnp.clip(kv_lengths.astype(jnp.int32), 0, kv_len)
    slots = ends[:, None] - q_len + jnp.arange(q_len, dtype=jnp.int32)[None]
  if layout is None:
    return slots
  return jnp.where(own_blocks(layout, slots) >= 0, slots, -1)


def own_blocks(
  layout: BlockLayout, slots: Int[Array, "B T"]
) -> Int[Array, "B T"]:
  """The block in which each query's slot lies; -1 for padding."""
  at = jnp.clip(slots, 0, layout.own_block.shape[1] - 1)
  own = jnp.take_along_axis(layout.own_block, at, axis=1)
  return jnp.where(slots >= 0, own, -1)


def clean(
  x: Float[Array, "*A D"],
) -> tuple[Float[Array, "*A D"], Bool[Array, "*A"]]:
  """Zeroes non-finite entries and marks the vectors that held one.

  A weight of zero times NaN is NaN, so masking a matmul's weights does not keep
  the NaN of unattended tokens out of a sum.
  """
  finite = jnp.isfinite(x)
  return jnp.where(finite, x, 0), ~jnp.all(finite, axis=-1)


def chosen_tokens(
  block_indices: Int[Array, "B K T P"],
  positions: Int[Array, "B T"],
  kv_len: int,
  block_size: int,
  layout: BlockLayout | None = None,
) -> Bool[Array, "B K T S"]:
  """Tokens that each query and group may see: visible and in a chosen block."""
  if layout is None:
    block = lax.expand_dims(jnp.arange(kv_len) // block_size, range(4))
  else:
    block = layout.own_block[:, None, None, None]
  chosen = jnp.any(block_indices[..., None] == block, axis=-2)
  return chosen & visible_tokens(positions, kv_len, layout)


def visible_tokens(
  positions: Int[Array, "B T"], kv_len: int, layout: BlockLayout | None = None
) -> Bool[Array, "B 1 T S"]:
  """Tokens that each query sees, for every group.

  Without a layout those at or before the query; in a packed row those of them
  that are visible until behind it.
  """
  visible = causal_tokens(positions, kv_len)
  if layout is not None:
    visible &= positions[:, None, :, None] < layout.visible_until[:, None, None]
  return visible


def causal_tokens(
  positions: Int[Array, "B T"], kv_len: int
) -> Bool[Array, "B 1 T S"]:
  """Tokens at or before each query, for every group."""
  token = jnp.arange(kv_len)[None, None]
  return (token <= positions[..., None])[:, None]


def visible_blocks(
  positions: Int[Array, "B T"],
  num_blocks: int,
  block_size: int,
  num_local_blocks: int,
  layout: BlockLayout | None = None,
) -> tuple[Bool[Array, "B 1 T N"], Bool[Array, "B 1 T N"]]:
  """Blocks that each query sees, and those of them that are forced.

  Forced are the query's own block and the num_local_blocks - 1 before it among
  the blocks that it sees.
  """
  if layout is None:
    ids = lax.expand_dims(jnp.arange(num_blocks, dtype=jnp.int32), range(3))
    own = jnp.where(positions < 0, -1, positions // block_size)[
      :, None, :, None
    ]
    visible = ids <= own
    return visible, visible & (ids > own - num_local_blocks)
  position = positions[:, None, :, None]
  start, until, depth = (
    x[:, None, None]
    for x in (layout.block_start, layout.block_until, layout.block_depth)
  )
  visible = (start <= position) & (position < until)
  # The blocks that a query sees have the depths 0 .. that of its own.
  own_depth = jnp.sum(visible, axis=-1, keepdims=True) - 1
  return visible, visible & (depth > own_depth - num_local_blocks)


def block_slots(
  layout: BlockLayout, block_size: int
) -> tuple[Int[Array, "B N bs"], Bool[Array, "B N bs"]]:
  """Slots of each block's tokens, and which of them lie in the block."""
  slots = jnp.arange(block_size, dtype=jnp.int32)[None, None]
  slots = layout.block_start[..., None] + slots
  inside = slots < layout.block_end[..., None]
  return jnp.where(inside, slots, 0), inside


def head_scores(
  q: Float[Array, "B T H D"],
  k: Float[Array, "B S K D"],
  visible: Bool[Array, "B #K T S"],
  scale: float,
) -> Float[Array, "B K G T S"]:
  """Scaled scores; -inf where not visible, NaN for non-finite operands."""
  b, t, h, d = q.shape
  num_kv_heads = k.shape[2]
  q, bad_q = clean(q.reshape(b, t, num_kv_heads, h // num_kv_heads, d))
  k, bad_k = clean(k)
  s = scale * jnp.einsum(
    "btkgd,bskd->bkgts",
    q,
    k,
    precision=HIGHEST,
    preferred_element_type=compute_dtype(q),
  )
  bad = (
    jnp.moveaxis(bad_q, 1, 3)[..., None]
    | jnp.moveaxis(bad_k, 1, 2)[:, :, None, None]
  )
  s = jnp.where(bad, jnp.nan, s)
  return jnp.where(visible[:, :, None], s, -jnp.inf)


def masked_logsumexp(
  s: Float[Array, "*A"], axis: int = -1
) -> Float[Array, "*B"]:
  """log sum exp over an axis; -inf, with zero gradient, for no entry."""
  m = lax.stop_gradient(jnp.max(s, axis=axis))
  m = jnp.where(m == -jnp.inf, 0, m)
  l = jnp.sum(jnp.exp(s - jnp.expand_dims(m, axis)), axis=axis)
  # The inner `where` keeps log's gradient finite where nothing is visible.
  return jnp.where(l == 0, -jnp.inf, m + jnp.log(jnp.where(l == 0, 1, l)))


def softmax(
  s: Float[Array, "*A S"], lse: Float[Array, "*A"]
) -> Float[Array, "*A S"]:
  """exp(s - lse); zero for queries that see nothing."""
  lse = jnp.where(lse == -jnp.inf, 0, lse)
  return jnp.exp(s - lse[..., None])


def attend(
  q: Float[Array, "B T H D"],
  k: Float[Array, "B S K D"],
  v: Float[Array, "B S K D"],
  visible: Bool[Array, "B #K T S"],
  scale: float,
  probs_dtype: jnp.dtype | None = None,
  mask_probs: bool = False,
) -> tuple[Float[Array, "B T H D"], Float[Array, "B H T"]]:
  """softmax(q k^T scale) v over the visible tokens, and its log sum exp.

  `probs_dtype` rounds the probabilities before their product with v, as fast
  implementations do; None keeps them in the compute dtype. A query that is NaN
  has probabilities of NaN for all keys, and so have the gradients of all
  values; `mask_probs` keeps them to the keys that the query sees.
  """
  b, t, h, d = q.shape
  s = head_scores(q, k, visible, scale)
  lse = masked_logsumexp(s)
  p = softmax(s, lse)
  if mask_probs:
    p = jnp.where(visible[:, :, None], p, 0)
  v, bad_v = clean(v)
  if probs_dtype is None:
    probs_dtype = p.dtype
  else:
    p = round_to(p, probs_dtype)
  out = jnp.einsum(
    "bkgts,bskd->btkgd",
    p.astype(probs_dtype),
    v.astype(probs_dtype),
    precision=HIGHEST,
    preferred_element_type=p.dtype,
  )
  poisoned = jnp.any(visible & jnp.moveaxis(bad_v, 1, 2)[:, :, None], axis=-1)
  poisoned = jnp.moveaxis(poisoned, 1, 2)[..., None, None]
  out = jnp.where(poisoned, jnp.nan, out).reshape(b, t, h, d)
  return out.astype(q.dtype), lse.reshape(b, h, t)


def index_scores(
  index_q: Float[Array, "B T K I"],
  index_k: Float[Array, "B S I"],
) -> Float[Array, "B K T S"]:
  """Unscaled scores of the Index Branch; NaN where an operand is not finite."""
  index_q, bad_q = clean(index_q)
  index_k, bad_k = clean(index_k)
  s = jnp.einsum(
    "btki,bsi->bkts",
    index_q,
    index_k,
    precision=HIGHEST,
    preferred_element_type=compute_dtype(index_q),
  )
  bad = jnp.moveaxis(bad_q, 1, 2)[..., None] | bad_k[:, None, None]
  return jnp.where(bad, jnp.nan, s)


def block_max(s: Float[Array, "*A bs"]) -> Float[Array, "*A"]:
  """Maximum of each block's scores; NaN if one of them is NaN.

  NaN needs a test of its own, because XLA's CPU backend (jax 0.11.2) computes
  maxima over 8 or more columns by a library that drops NaN.
  """
  nan = jnp.isnan(s)
  score = jnp.max(jnp.where(nan, -jnp.inf, s), axis=-1)
  return jnp.where(jnp.any(nan, axis=-1), jnp.nan, score)


def kl_of_queries(
  q: Float[Array, "B T H D"],
  k: Float[Array, "B S K D"],
  index_q: Float[Array, "B T K I"],
  index_k: Float[Array, "B S I"],
  visible: Bool[Array, "B #K T S"],
  *,
  scale: float,
  index_scale: float,
  lse: Float[Array, "B H T"] | None,
  detach_teacher: bool = True,
) -> Float[Array, "B K T"]:
  """KL(p || r) of each query and group over its visible tokens.

  p is the mean over the group's heads of the main branch's probabilities, r the
  softmax of the index scores. `detach_teacher=False` is the paper's ablation
  that lets the KL's gradient reach q and k.
  """
  s = head_scores(q, k, visible, scale)
  if lse is None:
    lse = masked_logsumexp(s)
  else:
    lse = lse.reshape(s.shape[:-1])
  p = jnp.mean(softmax(s, lse), axis=2)
  if detach_teacher:
    # The KL gradient stops here: it trains the Index Branch alone.
    p = lax.stop_gradient(p)
  u = index_scale * index_scores(index_q, index_k)
  u = jnp.where(visible, u, -jnp.inf)
  u_lse = masked_logsumexp(u)
  # Entries with p = 0 add 0. They are replaced before the logarithms, so that
  # inf - inf and 0 log 0 are never computed. A NaN in p or u passes through.
  live = (p != 0) & visible
  log_p = jnp.log(jnp.where(live, p, 1))
  log_r = jnp.where(live, u - jnp.where(live, u_lse[..., None], 0), 0)
  return jnp.sum(jnp.where(live, p * (log_p - log_r), 0), axis=-1)


def counted_queries(
  shape: tuple[int, ...], query_mask: QueryMask | None
) -> Float[Array, ""]:
  """The number of (query, group) pairs that the KL averages over.

  Args:
    shape: B, K and T.
    query_mask: queries that count, or how much each counts; None: all, once.
  """
  b, k, t = shape
  counted = b * t if query_mask is None else jnp.sum(query_mask)
  return jnp.asarray(counted, jnp.float32) * k


def kl_divisor(
  shape: tuple[int, ...], query_mask: QueryMask | None
) -> Float[Array, ""]:
  """What the sum of the KL is divided by: `counted_queries`.

  If no query counts, it is 1, so that the loss is 0 and not 0 / 0.
  """
  counted = counted_queries(shape, query_mask)
  if query_mask is None or query_mask.dtype == jnp.bool_:
    return jnp.maximum(counted, 1)
  return jnp.where(counted == 0, 1, counted)


def which_count(query_mask: QueryMask) -> Bool[Array, "B T"]:
  """The queries whose weight in the KL is not 0."""
  return query_mask if query_mask.dtype == jnp.bool_ else query_mask != 0


def weighted(
  rows: Float[Array, "B K T"], query_mask: QueryMask | None
) -> Float[Array, "B K T"]:
  """The KL of each query times its weight; a mask has weights of 0 and 1."""
  if query_mask is None or query_mask.dtype == jnp.bool_:
    return rows
  return rows * query_mask[:, None].astype(rows.dtype)


def fp8_codes(
  x: Float[Array, "*A I"],
) -> tuple[Float[Array, "*A I"], Float[Array, "*A"]]:
  """Quantises each vector to e4m3 codes: x is about codes * scale.

  The float32 scale is a power of two, so that to divide by it is exact and all
  implementations have the same codes. It maps the vector's largest magnitude to
  128 or more, and less than 256; e4m3 holds up to 448. Below 2^-119 it is
  2^-126. Infinities become NaN, as e4m3 has none.

  The numbers are rounded before the cast, which then is exact. Without that,
  XLA leaves out a cast to e4m3 and back where both are in one program on a GPU
  (xla_allow_excess_precision), and nothing is rounded.

  Returns:
    (codes, scale).
  """
  x = x.astype(jnp.float32)
  bits = lax.bitcast_convert_type(jnp.max(jnp.abs(x), axis=-1), jnp.int32)
  exponent = jnp.clip(bits >> 23, 8, 253)
  factor, scale = (
    lax.bitcast_convert_type(e << 23, jnp.float32)
    for e in (261 - exponent, exponent - 7)
  )
  x = jnp.where(jnp.isfinite(x), x * factor[..., None], jnp.nan)
  return _round_to_e4m3(x).astype(jnp.float8_e4m3fn), scale


def round_to(
  x: Float[Array, "*A"], dtype: jnp.dtype | str
) -> Float[Array, "*A"]:
  """The nearest bfloat16 or float16 numbers, ties to even, in x's dtype.

  XLA may leave out `x.astype(dtype).astype(x.dtype)`
  (xla_allow_excess_precision), as it does on a GPU, and nothing is rounded.
  `lax.reduce_precision` stays. This is for comparisons and not for gradients:
  where float16 has no normal numbers, the derivative is 0.
  """
  info = jnp.finfo(dtype)
  normal = lax.reduce_precision(x, info.nexp, info.nmant)
  if info.minexp == jnp.finfo(x.dtype).minexp:
    return normal
  # It takes numbers below float16's normal ones for 0. There, float16 has the
  # multiples of 2^-24, which is a power of two: to divide by it is exact.
  step = float(info.smallest_subnormal)
  below = jnp.abs(x) < float(info.smallest_normal)
  return jnp.where(below, jnp.round(x / step) * step, normal)


def _round_to_e4m3(x: Float[Array, "*A"]) -> Float[Array, "*A"]:
  """The nearest e4m3 numbers of float32 ones up to 448, ties to even."""
  bits = lax.bitcast_convert_type(x, jnp.int32)
  # e4m3 has 3 bits of a mantissa, float32 23. A carry goes to the exponent.
  bits += (1 << 19) - 1 + ((bits >> 20) & 1)
  normal = lax.bitcast_convert_type(bits & -(1 << 20), jnp.float32)
  # Numbers below 2^-6 are multiples of 2^-9.
  rounded = jnp.where(jnp.abs(x) < 2.0**-6, jnp.round(x * 512) / 512, normal)
  return jnp.where(jnp.isnan(x), x, rounded)


def quantise_fp8(x: Float[Array, "*A I"]) -> Float[Array, "*A I"]:
  """Rounds each vector to e4m3 with a scale of its own, in float32."""
  codes, scale = fp8_codes(x)
  return codes.astype(jnp.float32) * scale[..., None]


def decode_scores(
  index_q: Float[Array, "B T K I"],
  index_k: Float[Array, "B S I"],
  index_k_scale: Float[Array, "B S"] | None,
) -> Float[Array, "B K T S"]:
  """`index_scores` of cached index keys, which may be e4m3 codes with scales.

  With scales, the query is quantised too, and s = index_k_scale (codes of
  index_q . index_k) index_q's scale. Products of e4m3 codes are exact in
  float32.
  """
  if index_k_scale is None:
    return index_scores(index_q, index_k)
  index_q, q_scale = fp8_codes(index_q)
  s = index_scores(index_q.astype(jnp.float32), index_k.astype(jnp.float32))
  s = s * index_k_scale[:, None, None]
  return s * jnp.moveaxis(q_scale, 1, 2)[..., None]


@functools.partial(
  jax.jit,
  static_argnames=(
    "block_size",
    "top_k",
    "num_local_blocks",
    "score_precision",
  ),
)
def select_blocks(
  index_q: Float[Array, "B T K I"],
  index_k: Float[Array, "B S I"],
  *,
  block_size: int,
  top_k: int,
  num_local_blocks: int,
  kv_lengths: Int[Array, "B"] | None,
  score_precision: str,
  layout: BlockLayout | None = None,
  query_slots: Int[Array, "B T"] | None = None,
) -> Int[Array, "B K T P"]:
  """The P blocks of each query and group, see `msa_jax.select_blocks`."""
  positions = query_positions(
    index_q.shape[1],
    index_k.shape[1],
    index_q.shape[0],
    kv_lengths,
    layout,
    query_slots,
  )
  if score_precision == "fp8":
    index_q, index_k = quantise_fp8(index_q), quantise_fp8(index_k)
  return choose_blocks(
    index_scores(index_q, index_k),
    positions,
    block_size=block_size,
    top_k=top_k,
    num_local_blocks=num_local_blocks,
    layout=layout,
  )


def choose_blocks(
  s: Float[Array, "B K T S"],
  positions: Int[Array, "B T"],
  *,
  block_size: int,
  top_k: int,
  num_local_blocks: int,
  layout: BlockLayout | None = None,
) -> Int[Array, "B K T P"]:
  """The P blocks of each query and group, from every token's score."""
  b, num_kv_heads, t, s_len = s.shape
  s = jnp.where(visible_tokens(positions, s_len, layout), s, -jnp.inf)
  if layout is None:
    num_blocks = -(-s_len // block_size)
    pad = num_blocks * block_size - s_len
    s = jnp.pad(s, ((0, 0),) * 3 + ((0, pad),), constant_values=-jnp.inf)
  else:
    slots, inside = block_slots(layout, block_size)
    num_blocks = slots.shape[1]
    slots, inside = (x.reshape(b, 1, 1, -1) for x in (slots, inside))
    s = jnp.where(inside, jnp.take_along_axis(s, slots, axis=-1), -jnp.inf)
  score = block_max(s.reshape(b, num_kv_heads, t, num_blocks, block_size))

  ids = lax.expand_dims(jnp.arange(num_blocks, dtype=jnp.int32), range(3))
  visible, forced = visible_blocks(
    positions, num_blocks, block_size, num_local_blocks, layout
  )
  # 2: forced; 1: chosen by score; 0: never chosen, as a NaN score is.
  rank = jnp.where(forced, 2, jnp.where(visible & ~jnp.isnan(score), 1, 0))
  key = jnp.where(rank == 1, -score, 0)
  # Sort by rank, then score. Ties go to the lower id, because the sort is
  # stable and ids ascend.
  ids = jnp.broadcast_to(ids, score.shape)
  rank, _, ids = lax.sort((-rank, key, ids), num_keys=2, is_stable=True)
  ids = jnp.where(rank == 0, num_blocks, ids)[..., :top_k]
  ids = jnp.sort(ids, axis=-1)
  ids = jnp.where(ids == num_blocks, -1, ids)
  pad = top_k - ids.shape[-1]
  return jnp.pad(ids, ((0, 0),) * 3 + ((0, max(pad, 0)),), constant_values=-1)


@functools.partial(
  jax.jit,
  static_argnames=("block_size", "scale"),
)
def sparse_attention(
  q: Float[Array, "B T H D"],
  k: Float[Array, "B S K D"],
  v: Float[Array, "B S K D"],
  block_indices: Int[Array, "B K T P"],
  *,
  block_size: int,
  scale: float,
  kv_lengths: Int[Array, "B"] | None,
  layout: BlockLayout | None = None,
  query_slots: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T H D"], Float[Array, "B H T"]]:
  """Attention over chosen blocks, see `msa_jax.sparse_attention`."""
  positions = query_positions(
    q.shape[1], k.shape[1], q.shape[0], kv_lengths, layout, query_slots
  )
  visible = chosen_tokens(
    block_indices, positions, k.shape[1], block_size, layout
  )
  return attend(q, k, v, visible, scale, mask_probs=layout is not None)


@functools.partial(
  jax.jit,
  static_argnames=("block_size", "scale", "index_scale", "detach_teacher"),
)
def index_kl_loss(
  q: Float[Array, "B T H D"],
  k: Float[Array, "B S K D"],
  index_q: Float[Array, "B T K I"],
  index_k: Float[Array, "B S I"],
  block_indices: Int[Array, "B K T P"] | None,
  *,
  block_size: int,
  scale: float,
  index_scale: float,
  lse: Float[Array, "B H T"] | None,
  kv_lengths: Int[Array, "B"] | None,
  query_mask: QueryMask | None,
  detach_teacher: bool = True,
  layout: BlockLayout | None = None,
  query_slots: Int[Array, "B T"] | None = None,
) -> Float[Array, ""]:
  """Mean KL(main || index), see `msa_jax.index_kl_loss`."""
  positions = query_positions(
    q.shape[1], k.shape[1], q.shape[0], kv_lengths, layout, query_slots
  )
  if block_indices is None:
    visible = visible_tokens(positions, k.shape[1], layout)
  else:
    visible = chosen_tokens(
      block_indices, positions, k.shape[1], block_size, layout
    )
  if query_mask is not None:
    visible = visible & which_count(query_mask)[:, None, :, None]
  visible = jnp.broadcast_to(
    visible, (q.shape[0], k.shape[2], q.shape[1], k.shape[1])
  )
  rows = kl_of_queries(
    q,
    k,
    index_q,
    index_k,
    visible,
    scale=scale,
    index_scale=index_scale,
    lse=lse,
    detach_teacher=detach_teacher,
  )
  rows = weighted(rows, query_mask)
  return jnp.sum(rows) / kl_divisor(rows.shape, query_mask).astype(rows.dtype)


@functools.partial(
  jax.jit,
  static_argnames=("scale",),
)
def warmup_attention(
  q: Float[Array, "B T H D"],
  k: Float[Array, "B S K D"],
  v: Float[Array, "B S K D"],
  *,
  scale: float,
  kv_lengths: Int[Array, "B"] | None,
  layout: BlockLayout | None = None,
  query_slots: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T H D"], Float[Array, "B H T"]]:
  """Dense attention to all visible tokens, as the warm-up phase has it."""
  positions = query_positions(
    q.shape[1], k.shape[1], q.shape[0], kv_lengths, layout, query_slots
  )
  visible = visible_tokens(positions, k.shape[1], layout)
  return attend(q, k, v, visible, scale, mask_probs=layout is not None)


@functools.partial(
  jax.jit,
  static_argnames=("block_size", "top_k", "num_local_blocks", "scale"),
)
def decode_attention(
  q: Float[Array, "B T H D"],
  k: Float[Array, "B C K D"],
  v: Float[Array, "B C K D"],
  index_q: Float[Array, "B T K I"],
  index_k: Float[Array, "B C I"],
  *,
  kv_lengths: Int[Array, "B"],
  index_k_scale: Float[Array, "B C"] | None,
  block_size: int,
  top_k: int,
  num_local_blocks: int,
  scale: float,
) -> tuple[Float[Array, "B T H D"], Int[Array, "B K T P"]]:
  """Selection and attention over a cache, see `msa_jax.decode_attention`."""
  positions = query_positions(q.shape[1], k.shape[1], q.shape[0], kv_lengths)
  block_indices = choose_blocks(
    decode_scores(index_q, index_k, index_k_scale),
    positions,
    block_size=block_size,
    top_k=top_k,
    num_local_blocks=num_local_blocks,
  )
  visible = chosen_tokens(block_indices, positions, k.shape[1], block_size)
  out, _ = attend(q, k, v, visible, scale)
  return out, block_indices
