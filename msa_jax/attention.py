"""Attention layers in flax.nnx: dense GQA, and MSA with its Index Branch.

Argument names follow `flax.nnx.MultiHeadAttention`. Both layers share every
projection, norm and rotation of the main branch; `MSAttention` adds the index
projections (paper arXiv 2606.13392, section 2).

The KL loss trains the index projections alone. `MSAttention` stops its gradient
at their input; `msa_jax.ops` stops it at q, k and lse.
"""

from __future__ import annotations

import functools
import typing
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from msa_jax import cache as cache_lib
from msa_jax import context as context_lib
from msa_jax import ops
from msa_jax.checks import (
  check_choice,
  check_chosen_blocks,
  check_heads,
  check_positions,
  check_precision,
  check_query_mask,
  check_rank,
  check_rngs,
  check_scale,
  check_sizes,
  compute_dtype,
  require,
  wrong,
)
from msa_jax.layers import (
  RopeScaling,
  Sharding,
  head_norm,
  partial_rope,
  project,
)
from msa_jax.meshes import any_mesh_method, spec
from msa_jax.model_config import IndexConfig, QKNormOver
from msa_jax.segments import (
  Segments,
  check_segments,
)

# What attention gives `jax.ad_checkpoint.checkpoint_name` to: its results, and
# those of the choice of blocks and of the KL, none of which the backward pass
# should compute again.
ATTENTION_NAMES = (
  "attention_out", "attention_lse", "block_indices", "index_kl_gradient"
)  # fmt: skip
save_attention = jax.checkpoint_policies.save_only_these_names(*ATTENTION_NAMES)

_KERNEL_INIT = nnx.initializers.lecun_normal()
_INDEX = IndexConfig()


class Selection(NamedTuple):
  """The blocks that an MSA layer chose, and their recalls.

  `msa_jax.selection_recall` defines the recalls.
  """

  block_indices: Int32[Array, "*L B K T P"]
  block_recall: Float[Array, "*L"]
  score_recall: Float[Array, "*L"]
  best_score_recall: Float[Array, "*L"]


class MSALayerOutput(NamedTuple):
  """Result of `MSAttention`.

  Attributes:
    out: the layer's output.
    kl: KL loss in nats; 0 unless `with_kl`.
    selection: chosen blocks and recalls; None unless `with_selection`.
  """

  out: Float[Array, "B T E"]
  kl: Float[Array, ""]
  selection: Selection | None


class CachedOutput(NamedTuple):
  """Result of a layer's `extend`.

  Attributes:
    out: the layer's output.
    cache: the layer's cache with the tokens in it.
    block_indices: blocks that an MSA layer chose; None for dense attention.
  """

  out: Float[Array, "B T E"]
  cache: cache_lib.LayerCache
  block_indices: Int32[Array, "B K T P"] | None


def selection_specs(
  sharding: Sharding | None, tokens: PartitionSpec, selection: Selection
) -> Selection:
  """PartitionSpecs of a layer's selection, or of all layers' stacked.

  `tokens` are those of the batch rows and the tokens.
  """
  heads = None if sharding is None else sharding.heads
  stacked = (None,) * (selection.block_indices.ndim - 4)
  whole = (PartitionSpec(),) * 3
  blocks: Any = PartitionSpec(*stacked, tokens[0], heads, tokens[1])
  return Selection(blocks, *whole)  # pyright: ignore


def _layer_specs(out: MSALayerOutput, self, x: Array, **options):
  selection = out.selection
  if selection is not None:
    selection = selection_specs(self.sharding, spec(x), selection)
  return MSALayerOutput(spec(x), PartitionSpec(), selection)  # pyright: ignore


def _cached_specs(
  out: CachedOutput, self, x: Array, cache: cache_lib.LayerCache, *args, **named
):
  blocks = out.block_indices
  if blocks is not None:
    heads = None if self.sharding is None else self.sharding.heads
    blocks = PartitionSpec(spec(x)[0], heads)
  return CachedOutput(spec(x), jax.tree.map(spec, cache), blocks)  # pyright: ignore


class GQAttention(nnx.Module):
  """Causal grouped-query attention, dense.

  Args:
    num_heads: query heads, H.
    in_features: size of the input's last axis.
    qkv_features: H D; None: in_features.
    out_features: size of the output's last axis; None: in_features.
    num_kv_heads: KV heads, K; None: num_heads.
    rope_dim: dims of each head that rotate; None: all.
    rope_theta: base of the rotary frequencies.
    rope_scaling: slower rotary frequencies for long contexts; None: theta's.
    normalize_qk: RMSNorm on queries and keys, before the rotation.
    qk_norm_over: "head" normalises each head alone, with one scale [D] for all
      of them; "projection" normalises all query heads together, with a scale
      [H D], and all key heads, with a scale [K D], as MiniMax-M2 does.
    norm_eps: epsilon of those norms.
    zero_centered_norm: those norms scale by 1 + w, see `rms_norm`.
    sinks: a learnable score for each head, parameter `sinks` [H], that joins
      the softmax without a value: out * sigmoid(lse - sink), as in gpt-oss. It
      starts at 0.
    use_bias: add a bias to the queries, keys and values, before their norm.
    scale: factor of the attention scores; None: D^-0.5.
    dtype: dtype of the computation.
    param_dtype: dtype of the parameters.
    kernel_init: initialiser of the projections.
    implementation: of `jax.nn.dot_product_attention`: "xla", "cudnn" or None,
      which leaves the choice to JAX. Layers with sinks or with dtype float64
      take the dense attention of `msa_jax.msa_attention` instead, because JAX's
      has no lse with a gradient and computes its softmax in float32. There
      "cudnn" is cuDNN too, but not with float64 or a cache; None takes it where
      it can. Packed rows take it as well, where "cudnn" and None mean its
      kernel for Hopper GPUs, "mosaic_gpu".
    sharding: mesh axes of parameters and activations; None adds no annotations.
    rngs: a stream named "params".

  Raises:
    ValueError: an argument is wrong, or does not fit another.
  """

  implementations: tuple = ("xla", "cudnn", None)

  def __init__(
    self,
    num_heads: int,
    in_features: int,
    qkv_features: int | None = None,
    out_features: int | None = None,
    num_kv_heads: int | None = None,
    *,
    rope_dim: int | None = None,
    rope_theta: float = 10_000.0,
    rope_scaling: RopeScaling | None = None,
    normalize_qk: bool = False,
    qk_norm_over: QKNormOver = "head",
    norm_eps: float = 1e-6,
    zero_centered_norm: bool = False,
    sinks: bool = False,
    use_bias: bool = False,
    scale: float | None = None,
    dtype=jnp.float32,
    param_dtype=jnp.float32,
    kernel_init: Callable = _KERNEL_INIT,
    implementation: Any = "xla",
    sharding: Sharding | None = None,
    rngs: nnx.Rngs,
  ):
    check_rngs(rngs)
    sharding = sharding and sharding.present()
    in_features, out_features = check_sizes(
      in_features=in_features,
      out_features=in_features if out_features is None else out_features,
    )
    num_heads, num_kv_heads, head_dim, rope_dim = check_heads(
      num_heads=num_heads,
      num_kv_heads=num_heads if num_kv_heads is None else num_kv_heads,
      qkv_features=in_features if qkv_features is None else qkv_features,
      rope_dim=rope_dim,
      rope_theta=rope_theta,
      norm_eps=norm_eps,
    )
    self.in_features = in_features
    self.num_heads = num_heads
    self.num_kv_heads = num_kv_heads
    self.head_dim = head_dim
    self.rope_dim = rope_dim
    self.rope_theta = rope_theta
    self.rope_scaling = rope_scaling
    self.qk_norm_over: QKNormOver = qk_norm_over
    # None is passed on as it is: each implementation has its own D^-0.5.
    self.scale = scale if scale is None else check_scale("scale", scale, 1)
    self.implementation = implementation
    self.sharding = sharding
    check_choice("implementation", implementation, self.implementations)
    check_choice("qk_norm_over", qk_norm_over, QKNormOver)
    check_precision(dtype, param_dtype)
    self._heads_axis()

    linear = functools.partial(
      project, dtype, param_dtype, kernel_init, sharding, rngs
    )
    norm = functools.partial(
      head_norm,
      normalize_qk,
      norm_eps,
      zero_centered_norm,
      dtype,
      param_dtype,
      sharding,
      rngs,
    )
    heads = (num_heads, head_dim)
    kv_heads = (num_kv_heads, head_dim)
    self.query = linear(in_features, heads, use_bias=use_bias)
    self.key = linear(in_features, kv_heads, use_bias=use_bias)
    self.value = linear(in_features, kv_heads, use_bias=use_bias)
    self.out = linear(heads, out_features)
    whole = qk_norm_over == "projection"
    self.query_norm = norm(head_dim * num_heads if whole else head_dim)
    self.key_norm = norm(head_dim * num_kv_heads if whole else head_dim)
    sinks_init = nnx.initializers.zeros_init()
    if sharding is not None:
      sinks_init = nnx.with_partitioning(sinks_init, (sharding.heads,))
    self.sinks = (
      nnx.Param(sinks_init(jax.random.key(0), (num_heads,), param_dtype))
      if sinks
      else None
    )
    self._build(linear, norm, in_features, out_features)

  def _build(
    self, linear: Callable, norm: Callable, in_features: int, out_features: int
  ) -> None:
    """Makes the parameters that a subclass adds to the main branch."""

  def _rotate(
    self, x: Array, positions: Array | None, rope_dim: int | None = None
  ) -> Array:
    """Rotates the first rope_dim dims; None: as many as of a main head."""
    if positions is None:
      positions = jnp.arange(x.shape[1])
    return partial_rope(
      x,
      positions,
      rope_dim=self.rope_dim if rope_dim is None else rope_dim,
      theta=self.rope_theta,
      scaling=self.rope_scaling,
    )

  def _qkv(self, x: Array, positions: Array | None) -> tuple[Array, ...]:
    q, k = self.query(x), self.key(x)
    if self.query_norm is not None and self.key_norm is not None:
      q, k = (
        norm(heads)
        if self.qk_norm_over == "head"
        else norm(heads.reshape(*heads.shape[:2], -1)).reshape(heads.shape)
        for norm, heads in ((self.query_norm, q), (self.key_norm, k))
      )
    q = checkpoint_name(self._rotate(q, positions), "rotated")
    k = checkpoint_name(self._rotate(k, positions), "rotated")
    return q, k, self.value(x)

  @any_mesh_method(lambda out, self, x, **options: spec(x))
  def __call__(
    self,
    x: Float[Array, "B T E"],
    *,
    positions: Int[Array, "*B T"] | None = None,
    segment_ids: Int32[Array, "B T"] | None = None,
    segments: Segments | None = None,
    max_segments: int | None = None,
    zigzag: bool = False,
  ) -> Float[Array, "B T E"]:
    """Attends causally.

    Packed rows never make a T x T array: implementation "xla" attends in chunks
    of queries. "cudnn" takes `msa_jax`'s own kernel for them, because cuDNN's
    memory grows with documents times tokens. None takes the kernel where it
    can, and else "xla".

    Args:
      x: input.
      positions: rotary positions; None: 0 to T - 1, from 0 in each document,
        and along the path in a tree. Positions alone separate nothing: tokens
        of other documents are hidden by segment_ids or segments.
      segment_ids: the document of each token of packed rows; 0 is padding. A
        token sees its own document alone.
      segments: the same for prefix trees, from `tree_segments`; not both.
      max_segments: the most documents of a row, see `msa_jax.ops`.
      zigzag: where a mesh axis splits the tokens, x and positions are in zigzag
        order, and so is the result, see `msa_jax.context`. False: they are in
        the order of the sequence, and the layer moves them there and back.
        Segments are always in the order of the sequence.

    Raises:
      ValueError: an argument is wrong, or the mesh does not divide KV heads or
        tokens.
      NotImplementedError: "cudnn" was named, and cuDNN or, for packed rows, the
        kernel does not support the call.
    """
    _check_input(x, self.in_features)
    split = self.context_split("x", *x.shape[:2])
    segments, positions = _packed(
      x, positions, segment_ids, segments, max_segments, split, zigzag
    )
    attend = functools.partial(
      _attend_dense, scale=self.scale, implementation=self.implementation
    )
    axes = self.mesh_axes(x.shape[0])
    if split is not None:
      attend = functools.partial(_attend_dense_split, attend, split)
      x = x if zigzag else split.zigzag(x)
    if axes is not None:
      # Inside shard_map, GSPMD need not know how to split a cuDNN call.
      context = None if split is None else split.axis
      tokens: Any = PartitionSpec(axes[0], context, axes[1], None)
      heads = PartitionSpec(axes[1])
      attend = jax.shard_map(
        attend,
        in_specs=(*(tokens,) * 3, heads, PartitionSpec(axes[0])),
        out_specs=tokens,
        check_vma=False,
      )
    q, k, v = self._qkv(x, positions)
    out = self.out(attend(q, k, v, self._sinks(), segments))
    return out if split is None or zigzag else split.natural(out)

  def _sinks(self) -> Array | None:
    return None if self.sinks is None else self.sinks[...]

  def init_cache(
    self, batch: int, capacity: int, *, index_dtype: Any = None
  ) -> cache_lib.LayerCache:
    """An empty cache, see `msa_jax.cache.empty_layer`."""
    return cache_lib.empty_layer(
      batch,
      capacity,
      self.num_kv_heads,
      self.head_dim,
      dtype=self.value.dtype or jnp.float32,
      index_dim=self._cached_index_dim(),
      index_dtype=index_dtype,
    )

  def _cached_index_dim(self) -> int | None:
    """Size of a cached index key; None for a layer without index keys."""
    return None

  @any_mesh_method(_cached_specs)
  def extend(
    self,
    x: Float[Array, "B T E"],
    cache: cache_lib.LayerCache,
    span: cache_lib.Span,
    *,
    zigzag: bool = False,
  ) -> CachedOutput:
    """Caches the next T tokens of each batch row and attends from them.

    Where a mesh axis splits the slots of the cache, each device attends to its
    own ones with implementation "xla" or None, and they merge what they get;
    "cudnn", and many tokens, gather the cache's keys and values first.

    Args:
      x: input.
      cache: the layer's cache of the earlier tokens.
      span: where the tokens go, from `msa_jax.Cache.reserve`.
      zigzag: x is in zigzag order, and so is the result, if the devices share
        T tokens (`spreads`).

    Raises:
      ValueError: x has another rank, or the mesh does not divide KV heads or
        the cache.
      NotImplementedError: cuDNN was named and does not support the call.
    """
    _check_input(x, self.in_features)
    split = self._check_cache_split(x, cache)
    spread = spreads(split, x.shape[1])
    x, positions = _spread(x, span, spread, zigzag)
    q, k, v = self._qkv(x, positions)
    extend = functools.partial(
      _extend_dense,
      scale=self.scale,
      implementation=self.implementation,
      split=split,
      spread=spread is not None,
    )
    extend = self._over_mesh_cached(extend, x.shape[0], split, spread)
    result = extend(q, k, v, None, None, self._sinks(), cache, span)
    out = self.out(result.out)
    if spread is not None and not zigzag:
      out = spread.natural(out)
    return result._replace(out=out)

  def _check_cache_split(
    self, x: Array, cache: cache_lib.LayerCache
  ) -> context_lib.Split | None:
    split = self.cache_split(x.shape[0])
    if split is not None:
      unit = split.devices * self.cache_unit()
      require(
        cache.k.shape[1] % unit == 0,
        "cache",
        f"one whose capacity is a multiple of {unit}, whole blocks on each of"
        f" the {split.devices} devices that share a sequence",
        cache.k.shape[1],
      )
    return split

  def cache_unit(self) -> int:
    """The slots that may not lie on different devices."""
    return 1

  def mesh_axes(self, batch: int) -> tuple[tuple[str, ...], str | None] | None:
    """The mesh axes that split a batch of this size, and the KV heads.

    Returns:
      (axes of the batch, axis of the KV heads or None); None without a mesh.

    Raises:
      ValueError: the mesh does not divide the KV heads.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if self.sharding is None or mesh.empty:
      return None
    return self.sharding.batch_axes(mesh, batch), self._heads_axis()

  def _heads_axis(self) -> str | None:
    """The mesh axis that splits the KV heads; None without one.

    Raises:
      ValueError: it does not divide them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    heads = self.sharding and self.sharding.heads
    if not heads or heads not in mesh.axis_names:
      return None
    require(
      self.num_kv_heads % mesh.shape[heads] == 0,
      "num_kv_heads",
      f"a multiple of mesh axis {heads!r} = {mesh.shape[heads]}, which splits"
      " them (take a smaller axis)",
      self.num_kv_heads,
    )
    return heads

  def context_split(
    self, name: str, batch: int, length: int
  ) -> context_lib.Split | None:
    """How a mesh axis splits the tokens of sequences; None if none does.

    Raises:
      ValueError: the axis does not divide the tokens; `name` is theirs.
    """
    split = self.cache_split(batch)
    if split is not None:
      context_lib.check_length(name, length, split.devices)
    return split

  def cache_split(self, batch: int) -> context_lib.Split | None:
    """How a mesh axis splits the slots of a cache; None if none does."""
    axes = self.mesh_axes(batch)
    if axes is None or self.sharding is None:
      return None
    mesh = jax.sharding.get_abstract_mesh()
    axis = self.sharding.context_axis(mesh)
    if axis is None:
      return None
    return context_lib.Split(axis, mesh.shape[axis], axes[0])

  def _over_mesh_cached(
    self,
    extend: Callable,
    batch_size: int,
    split: context_lib.Split | None,
    spread: context_lib.Split | None,
  ) -> Callable:
    """Maps `extend` over each device's batch rows and KV heads.

    `extend(q, k, v, index_q, index_k, sinks, cache, span)` returns a
    `CachedOutput` of heads. Each device writes its own part of the cache. Only
    where a mesh axis splits its slots, something moves between devices.
    """
    axes = self.mesh_axes(batch_size)
    if axes is None:
      return extend
    batch, heads = axes
    slots = None if split is None else split.axis
    shares = None if spread is None else spread.axis
    tokens: Any = PartitionSpec(batch, shares, heads, None)
    shared = PartitionSpec(batch, shares, None)
    cache = cache_lib.layer_partition(batch, heads, slots)
    span: Any = (PartitionSpec(batch, None), PartitionSpec(batch))
    blocks: Any = PartitionSpec(batch, heads, shares, None)
    return jax.shard_map(
      extend,
      in_specs=(
        *(tokens,) * 4,
        shared,
        PartitionSpec(heads),
        cache,
        cache_lib.Span(*span),
      ),
      out_specs=CachedOutput(tokens, cache, blocks),
      check_vma=False,
    )


class MSAttention(GQAttention):
  """MiniMax Sparse Attention: GQA over blocks that an Index Branch chooses.

  index_q = x Wq_idx (one head for each group) and index_k = x Wk_idx (one head)
  take the norm and rotation of q and k; `msa_jax.msa_attention` does the rest.
  The KL loss trains the index projections and nothing else, and no other loss
  trains them, unless `index` switches on one of the paper's ablations.

  Args:
    num_heads: query heads, H.
    in_features: size of the input's last axis.
    qkv_features: H D; None: in_features.
    out_features: size of the output's last axis; None: in_features.
    num_kv_heads: KV heads, K; None: num_heads.
    index: options of the Index Branch.
    implementation: of the MSA operation: "reference", "xla", "mosaic_gpu" or
      None, see `msa_jax.ops`.
    **gqa_options: the other options of `GQAttention`: rope_dim, rope_theta,
      rope_scaling, normalize_qk, qk_norm_over, norm_eps, zero_centered_norm,
      sinks, use_bias, scale, dtype, param_dtype, kernel_init, sharding and
      rngs. The index heads rotate their first min(rope_dim, index_dim) dims
      unless `index.rope_dim` says otherwise, and are normalised one by one
      whatever qk_norm_over is; they have no bias, and their factor in the KL is
      I^-0.5. The KL's teacher is the softmax without the sinks.

  Raises:
    ValueError: an argument is wrong, or does not fit another.
  """

  implementations: tuple = (*typing.get_args(ops.Implementation), None)

  def __init__(
    self,
    num_heads: int,
    in_features: int,
    qkv_features: int | None = None,
    out_features: int | None = None,
    num_kv_heads: int | None = None,
    *,
    index: IndexConfig = _INDEX,
    implementation: ops.Implementation | None = None,
    **gqa_options,
  ):
    require(
      isinstance(index, IndexConfig), "index", "a msa_jax.IndexConfig", index
    )
    self.index = index
    super().__init__(
      num_heads,
      in_features,
      qkv_features,
      out_features,
      num_kv_heads,
      implementation=implementation,
      **gqa_options,
    )

  def _build(
    self, linear: Callable, norm: Callable, in_features: int, out_features: int
  ) -> None:
    if self.index.selection != "index":
      return
    heads = (self.num_kv_heads, self.index.index_dim)
    self.index_query = linear(in_features, heads)
    self.index_key = linear(in_features, (self.index.index_dim,))
    self.index_query_norm = norm(self.index.index_dim)
    self.index_key_norm = norm(self.index.index_dim)
    if self.index.value_head:
      self.index_value = linear(in_features, (self.index.index_dim,))
      self.index_out = linear(heads, out_features)

  def _project_index(
    self, x: Array, positions: Array | None
  ) -> tuple[Array, Array, Array | None]:
    """The index projections of x: index_q, index_k and index_v.

    index_q is [B, T, K, I], index_k [B, S, I]; index_v, of the value head, is
    [B, S, I] or None.
    """
    if self.index.selection != "index":
      b, t = x.shape[:2]
      shape = (b, t, self.num_kv_heads, self.index.index_dim)
      # Nothing reads these zeros, but the operations' checks want the shapes.
      unused = jnp.zeros(shape, x.dtype)
      return unused, unused[:, :, 0], None
    if self.index.detach_input:
      # The KL gradient stops here: it does not reach the layers below.
      x = lax.stop_gradient(x)
    index_q, index_k = self.index_query(x), self.index_key(x)
    if self.index_query_norm is not None and self.index_key_norm is not None:
      index_q = self.index_query_norm(index_q)
      index_k = self.index_key_norm(index_k)
    rope_dim = self.index.rotated(self.rope_dim)
    index_q = self._rotate(index_q, positions, rope_dim)
    index_k = self._rotate(index_k[:, :, None], positions, rope_dim)[:, :, 0]
    index_v = self.index_value(x) if self.index.value_head else None
    return index_q, index_k, index_v

  @any_mesh_method(_layer_specs)
  def __call__(
    self,
    x: Float[Array, "B T E"],
    *,
    positions: Int[Array, "*B T"] | None = None,
    phase: ops.Phase = "sparse",
    with_kl: bool = False,
    with_selection: bool = False,
    query_mask: Bool[Array, "B T"] | Float32[Array, "B T"] | None = None,
    segment_ids: Int32[Array, "B T"] | None = None,
    segments: Segments | None = None,
    max_segments: int | None = None,
    block_indices: Int32[Array, "B K T P"] | None = None,
    zigzag: bool = False,
  ) -> MSALayerOutput:
    """Attends causally to the chosen blocks, or to all tokens in the warm-up.

    Args:
      x: input.
      positions: rotary positions; None: 0 to T - 1, from 0 in each document,
        and along the path in a tree. Positions alone separate nothing: tokens
        of other documents are hidden by segment_ids or segments.
      phase: "sparse" or "warmup".
      with_kl: whether to compute the KL loss; it is 0 with selection="window"
        and "oracle", which have no Index Branch to train.
      with_selection: whether to return the chosen blocks and their recalls,
        which takes the time of dense attention scores.
      query_mask: queries that count in the KL, or float32 weights of them, see
        `msa_jax.index_kl_loss`; None: all.
      segment_ids: the document of each token of packed rows; 0 is padding. A
        token sees its own document alone.
      segments: the same for prefix trees, from `tree_segments`; not both.
      max_segments: the most documents of a row, see `msa_jax.ops`.
      block_indices: given choices, see `msa_jax.msa_attention`; None: the Index
        Branch chooses. The warm-up does not attend to them.
      zigzag: where a mesh axis splits the tokens, x, positions, query_mask and
        block_indices are in zigzag order, and so are the results, see
        `msa_jax.context`. False: they are in the order of the sequence, and the
        layer moves them there and back. Segments are always in the order of the
        sequence.

    Raises:
      ValueError: an argument is wrong, or the mesh does not divide KV heads or
        tokens.
      NotImplementedError: the named implementation does not support the call.
    """
    _check_input(x, self.in_features)
    check_query_mask(query_mask, x)
    split = self.context_split("x", *x.shape[:2])
    segments, positions = _packed(
      x, positions, segment_ids, segments, max_segments, split, zigzag
    )
    blocks_spec = self._blocks_spec(x.shape[0], split)
    moved = None if zigzag else split
    if moved is not None:
      x = moved.zigzag(x)
      if query_mask is not None:
        query_mask = moved.zigzag(query_mask)
      if block_indices is not None:
        block_indices = moved.zigzag(block_indices, blocks_spec)
    q, k, v = self._qkv(x, positions)
    index_q, index_k, index_v = self._project_index(
      x.astype(q.dtype), positions
    )
    with_kl = with_kl and self.index.selection == "index"
    attend = functools.partial(
      self._attend,
      phase=phase,
      with_kl=with_kl,
      with_selection=with_selection,
      kl_gradients=with_kl and split is not None and self.index.detach_teacher,
    )
    if block_indices is not None:
      # Inside shard_map the error would be one of a shape.
      check_chosen_blocks(block_indices, q, k)
    args = (
      *(q, k, v, index_q, index_k, index_v),
      *(query_mask, self._sinks(), segments, block_indices),
    )
    attend = self._over_mesh(
      attend, x.shape[0], with_selection, split, blocks_spec, phase
    )
    out, index_out, kl, selection = attend(*args)
    out = self.out(out)
    if index_out is not None:
      out = out + self.index_out(index_out)
    if moved is not None:
      out = moved.natural(out)
      if selection is not None:
        blocks = moved.natural(selection.block_indices, blocks_spec)
        selection = selection._replace(block_indices=blocks)
    return MSALayerOutput(out, kl, selection)

  def _blocks_spec(
    self, batch: int, split: context_lib.Split | None
  ) -> PartitionSpec:
    """How block_indices [B, K, T, P] are split over the mesh."""
    rows, heads = self.mesh_axes(batch) or (None, None)
    tokens = None if split is None else split.axis
    return PartitionSpec(rows, heads, tokens, None)

  def _cached_index_dim(self) -> int | None:
    if self.index.selection != "index" or self.index.value_head:
      raise NotImplementedError(
        "a cache supports MSA with selection='index' and value_head=False, got"
        f" {self.index.selection!r} and {self.index.value_head}"
      )
    return self.index.index_dim

  @any_mesh_method(_cached_specs)
  def extend(
    self,
    x: Float[Array, "B T E"],
    cache: cache_lib.LayerCache,
    span: cache_lib.Span,
    *,
    phase: ops.Phase = "sparse",
    zigzag: bool = False,
  ) -> CachedOutput:
    """Caches the next T tokens of each batch row and attends from them.

    In the sparse phase, up to `msa_jax.ops.MAX_DECODE_TOKENS` tokens go through
    `decode_attention`. More tokens, the warm-up phase, layers with sinks,
    which need the lse that decoding does not return, and those with
    `force_first_block` go through `msa_attention`.

    Where a mesh axis splits the slots of the cache, few tokens go through
    `decode_attention` with axis_name, which sends next to nothing, with any
    implementation but "reference". All other calls gather the cache first, and
    more tokens are shared by the devices, if 2 n divides them.

    Args:
      x: input.
      cache: the layer's cache of the earlier tokens. If it holds e4m3 index
        keys, blocks are scored as with score_precision="fp8". Otherwise they
        are scored exactly, except that `msa_attention` ranks as "fast" does in
        a layer with score_precision="fast".
      span: where the tokens go, from `msa_jax.Cache.reserve`.
      phase: "sparse", or "warmup" for dense attention. mosaic_gpu has no kernel
        for dense attention over a cache, so "warmup" needs
        implementation="xla", "reference" or None.
      zigzag: x is in zigzag order, and so is the result, if the devices share
        T tokens (`spreads`).

    Raises:
      ValueError: an argument is wrong, or the mesh does not divide KV heads or
        the cache.
      NotImplementedError: the named implementation does not support the call,
        or the layer is an ablation without a cached form.
    """
    _check_input(x, self.in_features)
    self._cached_index_dim()
    if phase == "warmup" and self.implementation == "mosaic_gpu":
      raise NotImplementedError(
        "mosaic_gpu supports no cache in the warm-up phase: generating in it"
        " needs a model with implementation='xla', 'reference' or None"
      )
    split = self._check_cache_split(x, cache)
    spread = spreads(split, x.shape[1])
    x, positions = _spread(x, span, spread, zigzag)
    q, k, v = self._qkv(x, positions)
    index_q, index_k, _ = self._project_index(x.astype(q.dtype), positions)
    extend = functools.partial(
      self._extend, phase=phase, split=split, spread=spread is not None
    )
    result = self._over_mesh_cached(extend, x.shape[0], split, spread)(
      q, k, v, index_q, index_k, self._sinks(), cache, span
    )
    out, blocks = self.out(result.out), result.block_indices
    if spread is not None and not zigzag:
      out = spread.natural(out)
      blocks = spread.natural(blocks, self._blocks_spec(x.shape[0], spread))
    return CachedOutput(out, result.cache, blocks)

  def cache_unit(self) -> int:
    return self.index.block_size

  def _extend(
    self,
    q: Array,
    k: Array,
    v: Array,
    index_q: Array,
    index_k: Array,
    sinks: Array | None,
    cache: cache_lib.LayerCache,
    span: cache_lib.Span,
    *,
    phase: ops.Phase,
    split: context_lib.Split | None,
    spread: bool,
  ) -> CachedOutput:
    """`extend` for one device's batch rows, KV heads, slots and queries."""
    num_tokens = span.slots.shape[1]
    few = num_tokens <= ops.MAX_DECODE_TOKENS
    first = self.index.force_first_block
    decode = phase == "sparse" and few and sinks is None and not first
    cache = held = _write(cache, span, k, v, index_k, split, spread)
    own_blocks = decode and self.implementation != "reference"
    if split is not None and not own_blocks:
      held = context_lib.gather_slots(cache, split.axis)
    options: dict[str, Any] = dict(
      block_size=self.index.block_size,
      top_k=self.index.top_k,
      num_local_blocks=self.index.num_local_blocks,
      scale=self.scale,
      implementation=self.implementation,
    )
    if decode:
      cached_index_k: Any = held.index_k
      result = ops.decode_attention(
        q,
        held.k,
        held.v,
        index_q,
        cached_index_k,
        index_k_scale=held.index_k_scale,
        kv_lengths=span.lengths,
        axis_name=split.axis if split is not None and own_blocks else None,
        **options,
      )
    else:
      keys: Any = held.index_keys()
      precision = self.index.score_precision
      if held.index_k_scale is not None:
        precision = "fp8"
      elif precision == "fp8" or few:
        precision = "exact"
      where = _where(span, split if spread else None)
      given = None
      if first:
        given = self._forced_blocks(
          index_q, keys, None, score_precision=precision, **where
        )
      result = ops.msa_attention(
        q,
        held.k,
        held.v,
        index_q,
        keys,
        **where,
        block_indices=given,
        phase=phase,
        score_precision=precision,
        **options,
      )
      if sinks is not None:
        result = result._replace(out=_with_sinks(*result[::3], sinks))
    return CachedOutput(result.out, cache, result.block_indices)

  def _attend(
    self,
    q: Array,
    k: Array,
    v: Array,
    index_q: Array,
    index_k: Array,
    index_v: Array | None,
    query_mask: Array | None,
    sinks: Array | None,
    segments: Segments | None,
    given: Array | None,
    *,
    phase: ops.Phase,
    with_kl: bool,
    with_selection: bool,
    query_pieces: ops.QueryPieces | None = None,
    heads_over: str | None = None,
    kl_gradients: bool = False,
  ):
    """`__call__` for one device's batch rows, KV heads and queries.

    In the warm-up, `heads_over` is the mesh axis of the tokens, over whose
    devices dense attention splits the query heads.

    Returns:
      (out, index_out, kl, selection), with out and index_out in heads. With
      `kl_gradients`, kl is a `_KL`.
    """
    options: dict[str, Any] = dict(
      block_size=self.index.block_size,
      implementation=self.implementation,
      segments=segments,
      query_pieces=query_pieces,
    )
    # The ablations choose blocks by themselves and pass them to the operations.
    plain = self.index.selection == "index" and not self.index.force_first_block
    fused = plain and heads_over is None
    fused_kl = fused and self.index.detach_teacher and not kl_gradients
    kl = jnp.zeros((), compute_dtype(q.dtype))
    if fused:
      result = ops.msa_attention(
        q,
        k,
        v,
        index_q,
        index_k,
        top_k=self.index.top_k,
        num_local_blocks=self.index.num_local_blocks,
        phase=phase,
        with_kl=with_kl and fused_kl,
        query_mask=query_mask,
        block_indices=given,
        scale=self.scale,
        score_precision=self.index.score_precision,
        **options,
      )
      out, kl, block_indices, lse = result
    else:
      block_indices = given
      if block_indices is None and plain:
        block_indices = ops.select_blocks(
          index_q,
          index_k,
          top_k=self.index.top_k,
          num_local_blocks=self.index.num_local_blocks,
          score_precision=self.index.score_precision,
          **options,
        )
        block_indices = checkpoint_name(block_indices, "block_indices")
      elif block_indices is None and self.index.selection == "oracle":
        block_indices = ops.best_blocks(
          q,
          k,
          top_k=self.index.top_k,
          scale=self.scale,
          **options,
        )
      elif block_indices is None:
        block_indices = self._forced_blocks(
          index_q,
          index_k,
          segments,
          query_pieces=query_pieces,
          score_precision=self.index.score_precision,
        )
      if heads_over is not None:
        out, lse = _dense_by_heads(
          q, k, v, heads_over, scale=self.scale, **options
        )
      elif phase == "warmup":
        out, lse = ops.dense_attention(q, k, v, scale=self.scale, **options)
      else:
        out, lse = ops.sparse_attention(
          q,
          k,
          v,
          block_indices,
          scale=self.scale,
          return_lse=True,
          **options,
        )
    if sinks is not None:
      out = _with_sinks(out, lse, sinks)
    if with_kl and not fused_kl:

      def loss(index_q, index_k):
        return ops.index_kl_loss(
          q,
          k,
          index_q,
          index_k,
          None if phase == "warmup" else block_indices,
          lse=lse if self.index.detach_teacher else None,
          query_mask=query_mask,
          detach_teacher=self.index.detach_teacher,
          scale=self.scale,
          **options,
        )

      if kl_gradients:
        fixed = lax.stop_gradient((index_q, index_k))
        kl, pull = jax.vjp(loss, *fixed)
        kl = _KL(kl, *pull(jnp.ones_like(kl)))
      else:
        kl = loss(index_q, index_k)

    index_out = None
    if index_v is not None:
      index_out = self._index_output(
        index_q, index_k, index_v, block_indices, phase, options
      )
    selection = None
    if with_selection:
      recalls = ops.selection_recall(
        q,
        k,
        block_indices,
        block_size=self.index.block_size,
        scale=self.scale,
        segments=segments,
        query_pieces=query_pieces,
      )
      selection = Selection(block_indices, *recalls)
    return out, index_out, kl, selection

  def _index_output(
    self,
    index_q: Array,
    index_k: Array,
    index_v: Array,
    block_indices: Array,
    phase: ops.Phase,
    options: dict[str, Any],
  ) -> Any:
    """The value head's output: attention with index_q, index_k and index_v."""
    shape = (*index_k.shape[:2], index_q.shape[2], index_k.shape[-1])
    k = jnp.broadcast_to(index_k[:, :, None], shape)
    v = jnp.broadcast_to(index_v[:, :, None], shape)
    if phase == "warmup":
      return ops.dense_attention(
        index_q,
        k,
        v,
        **options,
      )[0]
    return ops.sparse_attention(index_q, k, v, block_indices, **options)

  def _forced_blocks(
    self,
    index_q: Array,
    index_k: Array,
    segments: Segments | None,
    *,
    query_pieces: ops.QueryPieces | None = None,
    kv_lengths: Array | None = None,
    score_precision: ops.ScorePrecision,
  ) -> Int32[Array, "B K T P"]:
    """The blocks that the ablations choose.

    selection="window" takes block 0 and the last P - 1 blocks;
    force_first_block puts block 0 into the choice of the Index Branch. In a
    packed row, block 0 is the first block that the query sees.
    """
    b, t, num_kv_heads, _ = index_q.shape
    if segments is not None:
      return self._forced_blocks_packed(
        index_q, index_k, segments, query_pieces
      )
    if self.index.selection == "window":
      pieces = ((0, t),) if query_pieces is None else query_pieces
      slots = [start + jnp.arange(length) for start, length in pieces]
      own = jnp.concatenate(slots) // self.index.block_size
      ids = own[:, None] - jnp.arange(self.index.top_k - 1)[None]
      # It stands for "no block", sorts behind all ids and becomes -1 below.
      none = index_k.shape[1]
      ids = jnp.where(ids > 0, ids, none)
      ids = jnp.concatenate([jnp.zeros((t, 1), ids.dtype), ids], axis=-1)
      ids = jnp.sort(ids, axis=-1)
      ids = jnp.where(ids == none, -1, ids).astype(jnp.int32)
      return jnp.broadcast_to(ids, (b, num_kv_heads, t, self.index.top_k))
    select = functools.partial(
      ops.select_blocks,
      index_q,
      index_k,
      block_size=self.index.block_size,
      num_local_blocks=self.index.num_local_blocks,
      score_precision=score_precision,
      kv_lengths=kv_lengths,
      query_pieces=query_pieces,
      implementation=self.implementation,
    )
    chosen = select(top_k=self.index.top_k)
    # Where block 0 is not among the best P, it replaces the worst of them.
    rest = select(top_k=self.index.top_k - 1)
    rest = jnp.pad(rest, ((0, 0),) * 3 + ((1, 0),))
    return jnp.where(chosen[..., :1] == 0, chosen, rest)

  def _forced_blocks_packed(
    self,
    index_q: Array,
    index_k: Array,
    segments: Segments,
    query_pieces: ops.QueryPieces | None,
  ) -> Int32[Array, "B K T P"]:
    """`_forced_blocks` for packed rows.

    With scores that are all equal, the lower block is chosen: the first one
    that the query sees, after the forced ones.
    """
    options: dict[str, Any] = dict(
      block_size=self.index.block_size,
      segments=segments,
      query_pieces=query_pieces,
      implementation=self.implementation,
    )
    top_k = self.index.top_k
    equal = jax.tree.map(jnp.zeros_like, (index_q, index_k))
    if self.index.selection == "window":
      return ops.select_blocks(
        *equal, top_k=top_k, num_local_blocks=top_k - 1, **options
      )
    first = ops.select_blocks(*equal, top_k=1, num_local_blocks=0, **options)
    select = functools.partial(
      ops.select_blocks,
      index_q,
      index_k,
      num_local_blocks=self.index.num_local_blocks,
      score_precision=self.index.score_precision,
      **options,
    )
    chosen = select(top_k=top_k)
    rest = jnp.concatenate([first, select(top_k=top_k - 1)], axis=-1)
    return jnp.where(chosen[..., :1] == first, chosen, rest)

  def _over_mesh(
    self,
    attend: Callable,
    batch_size: int,
    with_selection: bool,
    split: context_lib.Split | None,
    blocks: PartitionSpec,
    phase: ops.Phase,
  ) -> Callable:
    """Maps `attend` over each device's batch rows, KV heads and tokens.

    GSPMD cannot split a Pallas call and splits a sort badly, hence shard_map.
    The KL is a mean, so the devices' means are weighed by the number of
    (query, group) pairs that each one counted.
    """
    mesh_axes = self.mesh_axes(batch_size)
    if mesh_axes is None:
      return attend
    batch, heads = mesh_axes
    axes = batch + (() if heads is None else (heads,))
    if split is not None:
      axes += (split.axis,)

    def local(*args):
      restore, pieces, heads_over = _identity, None, None
      run, own_index_k = attend, args[4]
      if split is not None:
        # Whole sequences are plain to cuDNN's dense attention. The KL needs all
        # query heads of a group together, so groups cannot be shared.
        dense = phase == "warmup"
        num_heads, num_kv_heads = (x.shape[2] for x in args[:2])
        heads = context_lib.heads_at_once(args[1], split.devices)
        if dense and num_kv_heads % split.devices == 0:
          args, restore = _whole_sequences(args, split.axis)
        elif dense or heads == num_kv_heads:
          args, pieces = _all_keys(args, split.axis)
          if dense and _heads_for_all(num_heads, num_kv_heads, split.devices):
            heads_over = split.axis
        else:
          pieces = context_lib.query_pieces(split.axis, args[0].shape[1])
          run = functools.partial(_attend_in_parts, attend, split.axis, heads)
      q, k, _, index_q, *_, query_mask, _, segments, _ = args
      all_keys: Any = k
      if run is not attend:
        # `k` is what the device holds; counting needs the shape of all keys.
        assert split is not None
        shape = (k.shape[0], k.shape[1] * split.devices, *k.shape[2:])
        all_keys = jax.ShapeDtypeStruct(shape, k.dtype)
      out, index_out, kl, selection = run(
        *args, query_pieces=pieces, heads_over=heads_over
      )

      def share(count):
        total = lax.psum(count, axes)
        return count / jnp.where(total == 0, 1, total)

      count = functools.partial(
        ops.count_kl_queries,
        q,
        all_keys,
        segments=segments,
        query_pieces=pieces,
      )
      if isinstance(kl, _KL):
        assert split is not None
        part = share(count(query_mask).astype(kl.value.dtype))
        kl = _sum_kl_gradients(kl, part, index_q, own_index_k, split.axis)
        # Nothing but the loss waits for the KL. XLA would compute that of all
        # layers at the end, and keep the gathered keys of each until then.
        out, kl = lax.optimization_barrier((out, kl))
        kl = lax.psum(kl, axes)
      elif axes:
        kl = lax.psum(kl * share(count(query_mask).astype(kl.dtype)), axes)
      if selection is not None:
        chosen = jnp.moveaxis(selection.block_indices, 1, 2)
        chosen = jnp.moveaxis(restore(chosen), 1, 2)
        recalls = selection[1:]
        if axes and segments is None:
          recalls = lax.pmean(recalls, axes)
        elif axes:
          # Recalls are means over the queries that see anything, of which
          # devices have more or fewer.
          part = share(count(None).astype(recalls[0].dtype))
          recalls = (lax.psum(x * part, axes) for x in recalls)
        selection = Selection(chosen, *recalls)
      index_out = None if index_out is None else restore(index_out)
      return restore(out), index_out, kl, selection

    context = None if split is None else split.axis
    tokens = PartitionSpec(batch, context, heads, None)
    shared = PartitionSpec(batch, context, None)
    scalar = PartitionSpec()
    specs: Any = (blocks, *(scalar,) * 3)
    selection = Selection(*specs) if with_selection else None
    return jax.shard_map(
      local,
      in_specs=(
        *(tokens,) * 4,
        shared,
        shared,
        PartitionSpec(batch, context),
        PartitionSpec(heads),
        PartitionSpec(batch),
        blocks,
      ),
      out_specs=(tokens, tokens, scalar, selection),
      check_vma=False,
    )


class _KL(NamedTuple):
  """A device's KL and its gradients."""

  value: Float[Array, ""]
  d_index_q: Float[Array, "B T K I"]
  d_index_k: Float[Array, "B S I"]


def _sum_kl_gradients(
  kl: _KL, share: Array, index_q: Array, index_k: Array, axis: str
) -> Array:
  """The device's share of the KL, with gradients that are summed at once.

  The KL computes its gradients together with its value, and they stay in memory
  until the backward pass of the layer. So only the sum's part of the device's
  own index keys stays, and not the gradient of all keys.

  Args:
    kl: with gradients of index_q, and of all devices' index keys.
    share: the factor of the device's KL in the mean.
    index_q: index queries.
    index_k: the device's index keys, in zigzag order.
    axis: the mesh axis of the tokens.
  """

  def scaled(x):
    return x.astype(share.dtype) * share

  d_index_k = context_lib.sum_gradients(scaled(kl.d_index_k), axis)
  operands = index_q, index_k
  gradients = scaled(kl.d_index_q), d_index_k
  gradients = tuple(d.astype(x.dtype) for d, x in zip(gradients, operands))
  return _with_gradients(scaled(kl.value), operands, gradients)


@jax.custom_vjp
def _with_gradients(value: Array, operands: tuple, gradients: tuple) -> Any:
  """`value`, as a function of `operands` that has these gradients."""
  del operands, gradients
  return value


def _with_gradients_fwd(value, operands, gradients):
  del operands
  return value, checkpoint_name(gradients, "index_kl_gradient")


def _with_gradients_bwd(gradients, cotangent):
  scaled = jax.tree.map(
    lambda x: (x.astype(cotangent.dtype) * cotangent).astype(x.dtype), gradients
  )
  return None, scaled, None


_with_gradients.defvjp(_with_gradients_fwd, _with_gradients_bwd)


def _identity(x: Array) -> Array:
  return x


def _all_keys(args: tuple, axis: str) -> tuple[tuple, ops.QueryPieces]:
  """`MSAttention._attend`'s operands with the keys of all devices, and where
  the device's queries stand."""
  q, k, v, index_q, index_k, index_v, *rest = args
  # The choice of blocks waits for index_k alone, and hides the others' way.
  index_k, index_v = (
    None if x is None else context_lib.gather_keys(x, axis)
    for x in (index_k, index_v)
  )
  k, v = context_lib.gather_keys((k, v), axis)
  pieces = context_lib.query_pieces(axis, q.shape[1])
  return (q, k, v, index_q, index_k, index_v, *rest), pieces


def _attend_in_parts(
  attend: Callable,
  axis: str,
  heads: int,
  q: Array,
  k: Array,
  v: Array,
  index_q: Array,
  index_k: Array,
  index_v: Array | None,
  query_mask: Array | None,
  sinks: Array | None,
  segments: Segments | None,
  given: Array | None,
  **options: Any,
) -> tuple[Any, Any, Any, Selection | None]:
  """`MSAttention._attend` of a device's queries, `heads` KV heads at a time.

  KV heads do not depend on each other, so the keys and values of a part are
  gathered when it is about to come. While one part attends, those of the next
  one may be on the way, but not those of the one after: at most two parts are
  held. The backward pass takes the parts in the reverse order, gathers the keys
  of each again, and sums their gradients over the devices before it goes on.

  Args:
    attend: `MSAttention._attend`.
    axis: the mesh axis of the tokens.
    heads: a divisor of K.
    q, k, v, index_q, index_k, index_v: what the device holds, in zigzag order.
    query_mask, sinks, segments, given: as `attend` has them.
    **options: of `attend`.
  """
  num_kv_heads, group_size = k.shape[2], q.shape[2] // k.shape[2]
  count = num_kv_heads // heads
  # The choice of blocks needs nothing else of other devices.
  index_keys: Any = tuple(
    (None,) * count
    if x is None
    else context_lib.for_each(context_lib.gather_keys(x, axis), count)
    for x in (index_k, index_v)
  )

  @functools.partial(jax.checkpoint, policy=save_attention)
  def part(q, k, v, *rest):
    k, v = context_lib.gather_keys((k, v), axis)
    return attend(q, k, v, *rest, **options)

  outs: list[Any] = []
  kls: list[Any] = []
  others: list[Any] = []
  for i in range(count):
    kv = slice(i * heads, (i + 1) * heads)
    of_kv = slice(kv.start * group_size, kv.stop * group_size)
    own_k, own_v = k[:, :, kv], v[:, :, kv]
    if i >= 2:
      # The results of `optimization_barrier` exist once all operands do, and in
      # the backward pass, their gradients once all gradients do.
      own_k, own_v, outs[i - 2], kls[i - 2] = lax.optimization_barrier(
        (own_k, own_v, outs[i - 2], kls[i - 2])
      )
    out, index_out, kl, selection = part(
      q[:, :, of_kv],
      own_k,
      own_v,
      index_q[:, :, kv],
      index_keys[0][i],
      index_keys[1][i],
      query_mask,
      None if sinks is None else sinks[of_kv],
      segments,
      None if given is None else given[:, kv],
    )
    kl, *gradients = kl if isinstance(kl, _KL) else (kl,)
    outs.append(out)
    kls.append(kl)
    others.append((index_out, selection, gradients))
  index_outs, selections, gradients = zip(*others)
  index_out = selection = None
  if index_outs[0] is not None:
    index_out = jnp.concatenate(index_outs, axis=2)
  # Means over queries and groups; each part has as many of both.
  if selections[0] is not None:
    blocks, *recalls = zip(*selections)
    recalls: Any = (sum(x) / count for x in recalls)
    selection = Selection(jnp.concatenate(blocks, axis=1), *recalls)
  kl: Any = sum(kls) / count
  if gradients[0]:
    d_index_q, d_index_k = zip(*gradients)
    d_index_q = jnp.concatenate(d_index_q, axis=2) / count
    d_index_k: Any = sum(x.astype(kl.dtype) for x in d_index_k)
    kl = _KL(kl, d_index_q, d_index_k / count)
  return jnp.concatenate(outs, axis=2), index_out, kl, selection


def _whole_sequences(args: tuple, axis: str) -> tuple[tuple, Callable]:
  """`MSAttention._attend`'s operands with all tokens of the device's share of
  the heads, and a function that undoes that to an array [B, T, H, *A]."""
  q, k, v, index_q, index_k, index_v, mask, sinks, segments, given = args
  q, k, v, index_q = (context_lib.to_heads(x, axis) for x in (q, k, v, index_q))
  index_k, index_v = (
    None if x is None else context_lib.gather_keys(x, axis)
    for x in (index_k, index_v)
  )
  if mask is not None:
    mask = context_lib.gather_tokens(mask, axis)
  if sinks is not None:
    sinks = context_lib.share_of_heads(sinks, axis, 0)
  if given is not None:
    given = context_lib.to_heads(jnp.moveaxis(given, 1, 2), axis)
    given = jnp.moveaxis(given, 2, 1)
  restore = functools.partial(context_lib.from_heads, axis_name=axis)
  args = (q, k, v, index_q, index_k, index_v, mask, sinks, segments, given)
  return args, restore


def _with_sinks(
  out: Float[Array, "B T H D"],
  lse: Float[Array, "B H T"],
  sinks: Float[Array, "H"],
) -> Float[Array, "B T H D"]:
  """out of a softmax that has one more score for each head."""
  weight = jax.nn.sigmoid(lse - sinks.astype(lse.dtype)[None, :, None])
  weight = jnp.moveaxis(weight, 1, 2)[..., None]
  return (out.astype(lse.dtype) * weight).astype(out.dtype)


def _needs_own_attention(q: Array, sinks: Array | None) -> bool:
  """Whether `jax.nn.dot_product_attention` cannot do a layer's attention: it
  returns no lse with a gradient, and computes its softmax in float32."""
  return sinks is not None or q.dtype == jnp.float64


def _packed(
  x: Array,
  positions: Array | None,
  segment_ids: Array | None,
  segments: Segments | None,
  max_segments: int | None,
  split: context_lib.Split | None,
  zigzag: bool,
) -> tuple[Segments | None, Array | None]:
  """A layer's segments and rotary positions; both may be None.

  Where a mesh axis splits the tokens, positions are in zigzag order.

  Raises:
    ValueError: an argument is wrong.
  """
  if positions is not None:
    check_positions(positions, *x.shape[:2])
  segments = check_segments(segment_ids, segments, max_segments, *x.shape[:2])
  if split is not None:
    return segments, split.positions(positions, zigzag, segments, x.shape[1])
  if segments is not None and positions is None:
    positions = segments.positions
  return segments, positions


def _dense_by_heads(
  q: Array,
  k: Array,
  v: Array,
  axis: str,
  *,
  query_pieces: ops.QueryPieces | None,
  **options: Any,
) -> tuple[Array, Array]:
  """(out, lse) of a device's queries, by dense attention of its share of heads.

  Args:
    q: the device's queries, in zigzag order.
    k: all keys, in the order of the sequence.
    v: all values.
    axis: the mesh axis of the tokens.
    query_pieces: not needed, because the exchange brings all queries.
    **options: of `msa_jax.ops.dense_attention`.
  """
  del query_pieces
  share = functools.partial(context_lib.share_of_heads, axis_name=axis, axis=2)
  out, lse = ops.dense_attention(
    context_lib.to_heads(q, axis), share(k), share(v), **options
  )
  lse = context_lib.from_heads(jnp.moveaxis(lse, 1, 2), axis)
  return context_lib.from_heads(out, axis), jnp.moveaxis(lse, 2, 1)


def _heads_for_all(num_heads: int, num_kv_heads: int, devices: int) -> bool:
  """Whether each device can take an equal share of the query heads, and the KV
  heads that these read."""
  whole = num_kv_heads % devices == 0 or devices % num_kv_heads == 0
  return num_heads % devices == 0 and whole


def _attend_dense_split(
  attend: Callable,
  split: context_lib.Split,
  q: Array,
  k: Array,
  v: Array,
  sinks: Array | None,
  segments: Segments | None,
) -> Array:
  """`_attend_dense` where a mesh axis splits the tokens."""
  num_heads, num_kv_heads = q.shape[2], k.shape[2]
  if not _heads_for_all(num_heads, num_kv_heads, split.devices):
    k, v = context_lib.gather_keys((k, v), split.axis)
    pieces = context_lib.query_pieces(split.axis, q.shape[1])
    return attend(q, k, v, sinks, segments, query_pieces=pieces)
  q = context_lib.to_heads(q, split.axis)
  if num_kv_heads % split.devices == 0:
    k, v = (context_lib.to_heads(x, split.axis) for x in (k, v))
  else:
    k, v = (
      context_lib.share_of_heads(x, split.axis, 2)
      for x in context_lib.gather_keys((k, v), split.axis)
    )
  if sinks is not None:
    sinks = context_lib.share_of_heads(sinks, split.axis, 0)
  return context_lib.from_heads(attend(q, k, v, sinks, segments), split.axis)


def _attend_dense(
  q: Array,
  k: Array,
  v: Array,
  sinks: Array | None,
  segments: Segments | None,
  *,
  scale: float | None,
  implementation: Any,
  query_pieces: ops.QueryPieces | None = None,
) -> Array:
  """Causal dense attention, with sinks or without, in plain or packed rows.

  `jax.nn.dot_product_attention` has no form of packed rows that is free of a
  T x T mask and of memory that grows with documents times tokens.
  """
  plain = segments is None and query_pieces is None
  if plain and not _needs_own_attention(q, sinks):
    return _dot_product_attention(
      q, k, v, is_causal=True, scale=scale, implementation=implementation
    )
  out, lse = ops.dense_attention(
    q,
    k,
    v,
    scale=scale,
    segments=segments,
    query_pieces=query_pieces,
    implementation="mosaic_gpu"
    if implementation == "cudnn"
    else implementation,
  )
  return out if sinks is None else _with_sinks(out, lse, sinks)


# Keys that cuDNN reads at once: its last tile can reach past a batch row's end.
_CUDNN_TILE = 256


def spreads(
  split: context_lib.Split | None, length: int
) -> context_lib.Split | None:
  """`split` if the devices share the T tokens that go into a cache; each has
  all of few tokens, and of numbers that it does not divide."""
  if split is None or length <= ops.MAX_DECODE_TOKENS:
    return None
  return None if length % (2 * split.devices) else split


def _spread(
  x: Array,
  span: cache_lib.Span,
  spread: context_lib.Split | None,
  zigzag: bool,
) -> tuple[Array, Array]:
  """x and its rotary positions, in zigzag order if the devices share them."""
  if spread is None:
    return x, span.positions
  return x if zigzag else spread.zigzag(x), spread.own(span.positions)


def _write(
  cache: cache_lib.LayerCache,
  span: cache_lib.Span,
  k: Array,
  v: Array,
  index_k: Array | None,
  split: context_lib.Split | None,
  spread: bool,
) -> cache_lib.LayerCache:
  """The cache with the tokens in it, or a device's part of both."""
  if split is None:
    return cache.write(span.slots, k, v, index_k)
  new: Any = (k, v) if index_k is None else (k, v, index_k)
  if spread:
    new = context_lib.gather_keys(new, split.axis)
  slots = context_lib.own_slots(span.slots, cache.k.shape[1], split.axis)
  return cache.write(slots, *new)


def _where(
  span: cache_lib.Span, spread: context_lib.Split | None
) -> dict[str, Any]:
  """Where the queries stand, as the operations take it."""
  if spread is None:
    return dict(kv_lengths=span.lengths)
  num_tokens = span.slots.shape[1]
  first = span.lengths - num_tokens
  pieces = context_lib.query_pieces(spread.axis, num_tokens // spread.devices)
  return dict(query_pieces=tuple((first + start, n) for start, n in pieces))


def _extend_dense(
  q: Array,
  k: Array,
  v: Array,
  index_q: None,
  index_k: None,
  sinks: Array | None,
  cache: cache_lib.LayerCache,
  span: cache_lib.Span,
  *,
  scale: float | None,
  implementation: Any,
  split: context_lib.Split | None,
  spread: bool,
) -> CachedOutput:
  """`GQAttention.extend` for one device's batch rows, KV heads and slots."""
  del index_q, index_k
  cache = _write(cache, span, k, v, None, split, spread)
  over_cache = functools.partial(
    _attend_over_cache, scale=scale, implementation=implementation
  )
  if split is None:
    out, cache = over_cache(q, cache, sinks, span)
    return CachedOutput(out, cache, None)
  if not spread and implementation != "cudnn":
    out, lse = ops.dense_attention(
      q,
      cache.k,
      cache.v,
      scale=scale,
      kv_lengths=span.lengths,
      axis_name=split.axis,
    )
    out = out if sinks is None else _with_sinks(out, lse, sinks)
    return CachedOutput(out, cache, None)
  whole = context_lib.gather_slots(cache, split.axis)
  if not spread:
    return CachedOutput(over_cache(q, whole, sinks, span)[0], cache, None)
  if not _heads_for_all(q.shape[2], k.shape[2], split.devices):
    out, lse = ops.dense_attention(
      q,
      whole.k,
      whole.v,
      scale=scale,
      implementation="mosaic_gpu"
      if implementation == "cudnn"
      else implementation,
      **_where(span, split),
    )
    out = out if sinks is None else _with_sinks(out, lse, sinks)
    return CachedOutput(out, cache, None)
  share = functools.partial(context_lib.share_of_heads, axis_name=split.axis)
  whole = cache_lib.LayerCache(share(whole.k, axis=2), share(whole.v, axis=2))
  sinks = None if sinks is None else share(sinks, axis=0)
  q = context_lib.to_heads(q, split.axis)
  out, _ = over_cache(q, whole, sinks, span)
  return CachedOutput(context_lib.from_heads(out, split.axis), cache, None)


def _attend_over_cache(
  q: Array,
  cache: cache_lib.LayerCache,
  sinks: Array | None,
  span: cache_lib.Span,
  *,
  scale: float | None,
  implementation: Any,
) -> tuple[Array, cache_lib.LayerCache]:
  """Dense attention from the last tokens to a cache that holds them.

  Unused slots may hold NaN, and a weight of zero times NaN is NaN, so the
  values of unused slots must be zero. XLA gets a masked copy of the values.
  cuDNN reads each batch row up to the end of the tile that its length lies in;
  it gets the cache itself, with zeros written into the unused part of that
  tile, which costs next to nothing. So cuDNN reads the same bits whatever the
  unused slots held before.
  """
  if _needs_own_attention(q, sinks):
    if implementation == "cudnn":
      raise NotImplementedError(
        "implementation='cudnn' supports a cache with sinks=False and a dtype"
        f" other than float64, got sinks={sinks is not None} and {q.dtype}:"
        " take 'xla' or None"
      )
    out, lse = ops.dense_attention(
      q,
      cache.k,
      cache.v,
      scale=scale,
      kv_lengths=span.lengths,
      implementation=implementation,
    )
    if sinks is not None:
      out = _with_sinks(out, lse, sinks)
    return out, cache
  q_len, capacity = q.shape[1], cache.k.shape[1]
  slot = jnp.arange(capacity)[None]
  if implementation == "cudnn":
    tail = span.lengths[:, None] + jnp.arange(_CUDNN_TILE)[None]
    # A length of 0 may mark a batch row that has overflowed: its cache still
    # holds tokens and must not be changed.
    unused = (tail < capacity) & (span.lengths[:, None] > 0)
    zeros = jnp.zeros((*tail.shape, *cache.k.shape[2:]), cache.k.dtype)
    cache = cache.write(jnp.where(unused, tail, capacity + tail), zeros, zeros)
    values = cache.v
  else:
    used = (slot < span.lengths[:, None])[..., None, None]
    values = jnp.where(used, cache.v, 0)
  # A single query sees all keys of its batch row, so it needs no mask.
  visible = (slot[None] <= span.positions[..., None])[:, None]
  out = _dot_product_attention(
    q,
    cache.k,
    values,
    mask=None if q_len == 1 else visible,
    key_value_seq_lengths=jnp.maximum(span.lengths, 1),
    scale=scale,
    implementation=implementation,
  )
  # Padding, and the tokens of batch rows that have overflowed, get zeros.
  out = jnp.where((span.positions >= 0)[..., None, None], out, 0)
  return out, cache


def _dot_product_attention(q: Array, k: Array, v: Array, **options) -> Array:
  """`jax.nn.dot_product_attention`, with NotImplementedError without cuDNN."""
  try:
    return jax.nn.dot_product_attention(q, k, v, **options)
  except RuntimeError as error:
    raise NotImplementedError(
      f"implementation={options['implementation']!r} is not possible here:"
      f" {error}"
    ) from error


def _check_input(x: Array, in_features: int) -> None:
  check_rank("x", x, "B T E")
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise wrong("x", "an array of floating-point numbers", str(x.dtype))
  if x.shape[-1] != in_features:
    raise wrong(
      "x",
      f"an array with E = {in_features} (in_features) in axis 2",
      f"{x.shape[-1]} in shape {tuple(x.shape)}",
    )
