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
from msa_jax import ops
from msa_jax.checks import (
  check_choice,
  check_chosen_blocks,
  check_heads,
  check_rank,
  check_scale,
  check_sizes,
  compute_dtype,
  require,
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
  sharding: Sharding | None, rows: Any, selection: Selection
) -> Selection:
  """PartitionSpecs of a layer's selection, or of all layers' stacked."""
  heads = None if sharding is None else sharding.heads
  stacked = (None,) * (selection.block_indices.ndim - 4)
  whole = (PartitionSpec(),) * 3
  blocks: Any = PartitionSpec(*stacked, rows, heads)
  return Selection(blocks, *whole)  # pyright: ignore


def _layer_specs(out: MSALayerOutput, self, x: Array, **options):
  selection = out.selection
  if selection is not None:
    selection = selection_specs(self.sharding, spec(x)[0], selection)
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
      it can.
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

  def _rotate(self, x: Array, positions: Array | None) -> Array:
    if positions is None:
      positions = jnp.arange(x.shape[1])
    return partial_rope(
      x,
      positions,
      rope_dim=min(self.rope_dim, x.shape[-1] // 2 * 2),
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
  ) -> Float[Array, "B T E"]:
    """Attends causally.

    Packed rows never make a T x T array: implementation "xla" attends in chunks
    of queries, "cudnn" by cuDNN's packed layout, which takes documents and no
    trees, and None tries "cudnn" first.

    Args:
      x: input.
      positions: rotary positions; None: 0 to T - 1, from 0 in each document,
        and along the path in a tree. Positions alone separate nothing: tokens
        of other documents are hidden by segment_ids or segments.
      segment_ids: the document of each token of packed rows; 0 is padding. A
        token sees its own document alone.
      segments: the same for prefix trees, from `tree_segments`; not both.
      max_segments: the most documents of a row, see `msa_jax.ops`.

    Raises:
      ValueError: an argument is wrong, or the mesh does not divide KV heads.
      NotImplementedError: cuDNN was named and does not support the call.
    """
    _check_input(x)
    segments, positions = _packed(
      x, positions, segment_ids, segments, max_segments
    )
    attend = functools.partial(
      _attend_dense, scale=self.scale, implementation=self.implementation
    )
    axes = self.mesh_axes(x.shape[0])
    if axes is not None:
      # Inside shard_map, GSPMD need not know how to split a cuDNN call.
      tokens: Any = PartitionSpec(axes[0], None, axes[1], None)
      heads = PartitionSpec(axes[1])
      attend = jax.shard_map(
        attend,
        in_specs=(*(tokens,) * 3, heads, PartitionSpec(axes[0])),
        out_specs=tokens,
        check_vma=False,
      )
    q, k, v = self._qkv(x, positions)
    return self.out(attend(q, k, v, self._sinks(), segments))

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
  ) -> CachedOutput:
    """Caches the next T tokens of each batch row and attends from them.

    Args:
      x: input.
      cache: the layer's cache of the earlier tokens.
      span: where the tokens go, from `msa_jax.Cache.reserve`.

    Raises:
      ValueError: x has another rank, or the mesh does not divide KV heads.
      NotImplementedError: cuDNN was named and does not support the call.
    """
    _check_input(x)
    q, k, v = self._qkv(x, span.positions)
    extend = functools.partial(
      _extend_dense, scale=self.scale, implementation=self.implementation
    )
    extend = self._over_mesh_cached(extend, x.shape[0])
    result = extend(q, k, v, None, None, self._sinks(), cache, span)
    return result._replace(out=self.out(result.out))

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
    batch_axes = self.sharding.batch_axes(mesh, batch)
    heads = self.sharding.heads
    heads = heads if heads in mesh.axis_names else None
    split = 1 if heads is None else mesh.shape[heads]
    require(
      self.num_kv_heads % split == 0,
      "num_kv_heads",
      f"a multiple of mesh axis {heads!r} = {split}",
      self.num_kv_heads,
    )
    return batch_axes, heads

  def _over_mesh_cached(self, extend: Callable, batch_size: int) -> Callable:
    """Maps `extend` over each device's batch rows and KV heads.

    `extend(q, k, v, index_q, index_k, sinks, cache, span)` returns a
    `CachedOutput` of heads. Each device writes and reads its own part of the
    cache, so nothing moves between devices.
    """
    axes = self.mesh_axes(batch_size)
    if axes is None:
      return extend
    batch, heads = axes
    tokens: Any = PartitionSpec(batch, None, heads, None)
    shared = PartitionSpec(batch, None, None)
    cache = cache_lib.layer_partition(batch, heads)
    span: Any = (PartitionSpec(batch, None), PartitionSpec(batch))
    blocks: Any = PartitionSpec(batch, heads, None, None)
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
      rngs. The index heads rotate their first min(rope_dim, index_dim) dims,
      and are normalised one by one whatever qk_norm_over is; they have no bias,
      and their factor in the KL is I^-0.5. The KL's teacher is the softmax
      without the sinks.

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
    if self.index.selection == "window":
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
    if self.index.selection == "window":
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
    index_q = self._rotate(index_q, positions)
    index_k = self._rotate(index_k[:, :, None], positions)[:, :, 0]
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
  ) -> MSALayerOutput:
    """Attends causally to the chosen blocks, or to all tokens in the warm-up.

    Args:
      x: input.
      positions: rotary positions; None: 0 to T - 1, from 0 in each document,
        and along the path in a tree. Positions alone separate nothing: tokens
        of other documents are hidden by segment_ids or segments.
      phase: "sparse" or "warmup".
      with_kl: whether to compute the KL loss; it is 0 with selection="window",
        which has no Index Branch to train.
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

    Raises:
      ValueError: an argument is wrong, or the mesh does not divide KV heads.
      NotImplementedError: the named implementation does not support the call.
    """
    _check_input(x)
    segments, positions = _packed(
      x, positions, segment_ids, segments, max_segments
    )
    q, k, v = self._qkv(x, positions)
    index_q, index_k, index_v = self._project_index(
      x.astype(q.dtype), positions
    )
    attend = functools.partial(
      self._attend,
      phase=phase,
      with_kl=with_kl and self.index.selection == "index",
      with_selection=with_selection,
    )
    if block_indices is not None:
      # Inside shard_map the error would be one of a shape.
      check_chosen_blocks(block_indices, q, k)
    args = (
      *(q, k, v, index_q, index_k, index_v),
      *(query_mask, self._sinks(), segments, block_indices),
    )
    attend = self._over_mesh(attend, x.shape[0], with_selection)
    out, index_out, kl, selection = attend(*args)
    out = self.out(out)
    if index_out is not None:
      out = out + self.index_out(index_out)
    return MSALayerOutput(out, kl, selection)

  def _cached_index_dim(self) -> int | None:
    if (
      self.index.selection != "index"
      or self.index.force_first_block
      or self.index.value_head
    ):
      raise NotImplementedError(
        "a cache supports MSA with selection='index', force_first_block=False"
        f" and value_head=False, got {self.index.selection!r},"
        f" {self.index.force_first_block} and {self.index.value_head}"
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
  ) -> CachedOutput:
    """Caches the next T tokens of each batch row and attends from them.

    In the sparse phase, up to `msa_jax.ops.MAX_DECODE_TOKENS` tokens go through
    `decode_attention`. More tokens, the warm-up phase, and layers with sinks,
    which need the lse that decoding does not return, go through
    `msa_attention`.

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

    Raises:
      ValueError: an argument is wrong, or the mesh does not divide KV heads.
      NotImplementedError: the named implementation does not support the call,
        or the layer is an ablation without a cached form.
    """
    _check_input(x)
    self._cached_index_dim()
    if phase == "warmup" and self.implementation == "mosaic_gpu":
      raise NotImplementedError(
        "mosaic_gpu supports no cache in the warm-up phase: generating in it"
        " needs a model with implementation='xla', 'reference' or None"
      )
    q, k, v = self._qkv(x, span.positions)
    index_q, index_k, _ = self._project_index(x.astype(q.dtype), span.positions)
    extend = functools.partial(self._extend, phase=phase)
    result = self._over_mesh_cached(extend, x.shape[0])(
      q, k, v, index_q, index_k, self._sinks(), cache, span
    )
    return result._replace(out=self.out(result.out))

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
  ) -> CachedOutput:
    """`extend` for one device's batch rows and KV heads."""
    cache = cache.write(span.slots, k, v, index_k)
    cached_index_k: Any = cache.index_k
    options: dict[str, Any] = dict(
      kv_lengths=span.lengths,
      block_size=self.index.block_size,
      top_k=self.index.top_k,
      num_local_blocks=self.index.num_local_blocks,
      scale=self.scale,
      implementation=self.implementation,
    )
    few = q.shape[1] <= ops.MAX_DECODE_TOKENS
    if phase == "sparse" and few and sinks is None:
      result = ops.decode_attention(
        q,
        cache.k,
        cache.v,
        index_q,
        cached_index_k,
        index_k_scale=cache.index_k_scale,
        **options,
      )
    else:
      keys: Any = cache.index_keys()
      precision = self.index.score_precision
      if cache.index_k_scale is not None:
        precision = "fp8"
      elif precision == "fp8" or few:
        precision = "exact"
      result = ops.msa_attention(
        q,
        cache.k,
        cache.v,
        index_q,
        keys,
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
  ):
    """`__call__` for one device's batch rows and KV heads.

    Returns:
      (out, index_out, kl, selection), with out and index_out in heads.
    """
    options: dict[str, Any] = dict(
      block_size=self.index.block_size,
      implementation=self.implementation,
      segments=segments,
    )
    # The ablations choose blocks by themselves and pass them to the operations.
    plain = self.index.selection == "index" and not self.index.force_first_block
    fused_kl = plain and self.index.detach_teacher
    kl = jnp.zeros((), compute_dtype(q.dtype))
    if plain:
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
      if block_indices is None:
        block_indices = self._forced_blocks(index_q, index_k, segments)
      if phase == "warmup":
        out, lse = ops.dense_attention(
          q,
          k,
          v,
          scale=self.scale,
          segments=segments,
          block_size=self.index.block_size,
          implementation=self.implementation,
        )
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
      kl = ops.index_kl_loss(
        q,
        k,
        index_q,
        index_k,
        None if phase == "warmup" else block_indices,
        query_mask=query_mask,
        detach_teacher=self.index.detach_teacher,
        scale=self.scale,
        **options,
      )

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
    self, index_q: Array, index_k: Array, segments: Segments | None
  ) -> Int32[Array, "B K T P"]:
    """The blocks that the ablations choose.

    selection="window" takes block 0 and the last P - 1 blocks;
    force_first_block puts block 0 into the choice of the Index Branch. In a
    packed row, block 0 is the first block that the query sees.
    """
    b, t, num_kv_heads, _ = index_q.shape
    if segments is not None:
      return self._forced_blocks_packed(index_q, index_k, segments)
    if self.index.selection == "window":
      own = jnp.arange(t) // self.index.block_size
      ids = own[:, None] - jnp.arange(self.index.top_k - 1)[None]
      # t stands for "no block": it sorts behind all ids and becomes -1 below.
      ids = jnp.where(ids > 0, ids, t)
      ids = jnp.concatenate([jnp.zeros((t, 1), ids.dtype), ids], axis=-1)
      ids = jnp.sort(ids, axis=-1)
      ids = jnp.where(ids == t, -1, ids).astype(jnp.int32)
      return jnp.broadcast_to(ids, (b, num_kv_heads, t, self.index.top_k))
    select = functools.partial(
      ops.select_blocks,
      index_q,
      index_k,
      block_size=self.index.block_size,
      num_local_blocks=self.index.num_local_blocks,
      score_precision=self.index.score_precision,
      implementation=self.implementation,
    )
    chosen = select(top_k=self.index.top_k)
    # Where block 0 is not among the best P, it replaces the worst of them.
    rest = select(top_k=self.index.top_k - 1)
    rest = jnp.pad(rest, ((0, 0),) * 3 + ((1, 0),))
    return jnp.where(chosen[..., :1] == 0, chosen, rest)

  def _forced_blocks_packed(
    self, index_q: Array, index_k: Array, segments: Segments
  ) -> Int32[Array, "B K T P"]:
    """`_forced_blocks` for packed rows.

    With scores that are all equal, the lower block is chosen: the first one
    that the query sees, after the forced ones.
    """
    options: dict[str, Any] = dict(
      block_size=self.index.block_size,
      segments=segments,
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
    self, attend: Callable, batch_size: int, with_selection: bool
  ) -> Callable:
    """Maps `attend` over each device's batch rows and KV heads.

    GSPMD cannot split a Pallas call and splits a sort badly, hence shard_map.
    The KL is a mean, so the devices' means are weighed by the number of
    (query, group) pairs that each one counted.
    """
    mesh_axes = self.mesh_axes(batch_size)
    if mesh_axes is None:
      return attend
    batch, heads = mesh_axes
    axes = batch + (() if heads is None else (heads,))

    def local(*args):
      q, k, *_, query_mask, _, segments, _ = args
      out, index_out, kl, selection = attend(*args)

      def mean(x, count):
        count = count.astype(x.dtype)
        total = lax.psum(count, axes)
        return lax.psum(x * count, axes) / jnp.where(total == 0, 1, total)

      if axes:
        kl = mean(kl, ops.count_kl_queries(q, k, query_mask, segments))
        if selection is not None and segments is None:
          recalls = lax.pmean(selection[1:], axes)
          selection = Selection(selection.block_indices, *recalls)
        elif selection is not None:
          # Recalls are means over the queries that see anything, of which
          # devices have more or fewer.
          count = ops.count_kl_queries(q, k, None, segments)
          recalls = (mean(x, count) for x in selection[1:])
          selection = Selection(selection.block_indices, *recalls)
      return out, index_out, kl, selection

    tokens = PartitionSpec(batch, None, heads, None)
    shared = PartitionSpec(batch, None, None)
    scalar = PartitionSpec()
    blocks = PartitionSpec(batch, heads, None, None)
    specs: Any = (blocks, *(scalar,) * 3)
    selection = Selection(*specs) if with_selection else None
    return jax.shard_map(
      local,
      in_specs=(
        *(tokens,) * 4,
        shared,
        shared,
        PartitionSpec(batch, None),
        PartitionSpec(heads),
        PartitionSpec(batch),
        blocks,
      ),
      out_specs=(tokens, tokens, scalar, selection),
      check_vma=False,
    )


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
) -> tuple[Segments | None, Array | None]:
  """A layer's segments and rotary positions; both may be None."""
  segments = check_segments(segment_ids, segments, max_segments, *x.shape[:2])
  if segments is not None and positions is None:
    positions = segments.positions
  return segments, positions


def _attend_dense(
  q: Array,
  k: Array,
  v: Array,
  sinks: Array | None,
  segments: Segments | None,
  *,
  scale: float | None,
  implementation: Any,
) -> Array:
  """Causal dense attention, with sinks or without, in plain or packed rows.

  `jax.nn.dot_product_attention` has no form of packed rows that is free of a
  T x T mask.
  """
  if segments is None and not _needs_own_attention(q, sinks):
    return _dot_product_attention(
      q, k, v, is_causal=True, scale=scale, implementation=implementation
    )
  kernel = sinks is None and scale is None and implementation != "xla"
  if segments is not None and kernel:
    try:
      return ops.document_attention(q, k, v, segments)
    except NotImplementedError:
      if implementation is not None:
        raise
  out, lse = ops.dense_attention(
    q,
    k,
    v,
    scale=scale,
    segments=segments,
    implementation="mosaic_gpu"
    if implementation == "cudnn"
    else implementation,
  )
  return out if sinks is None else _with_sinks(out, lse, sinks)


# Keys that cuDNN reads at once: its last tile can reach past a batch row's end.
_CUDNN_TILE = 256


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
) -> CachedOutput:
  """`GQAttention.extend` for one device's batch rows and KV heads.

  Unused slots may hold NaN, and a weight of zero times NaN is NaN, so the
  values of unused slots must be zero. XLA gets a masked copy of the values.
  cuDNN reads each batch row up to the end of the tile that its length lies in;
  it gets the cache itself, with zeros written into the unused part of that
  tile, which costs next to nothing. So cuDNN reads the same bits whatever the
  unused slots held before.
  """
  cache = cache.write(span.slots, k, v)
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
    return CachedOutput(out, cache, None)
  q_len, capacity = q.shape[1], cache.k.shape[1]
  slot = jnp.arange(capacity)[None]
  if implementation == "cudnn":
    tail = span.lengths[:, None] + jnp.arange(_CUDNN_TILE)[None]
    # A length of 0 may mark a batch row that has overflowed: its cache still
    # holds tokens and must not be changed.
    unused = (tail < capacity) & (span.lengths[:, None] > 0)
    zeros = jnp.zeros((*tail.shape, *k.shape[2:]), k.dtype)
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
  return CachedOutput(out, cache, None)


def _dot_product_attention(q: Array, k: Array, v: Array, **options) -> Array:
  """`jax.nn.dot_product_attention`, with NotImplementedError without cuDNN."""
  try:
    return jax.nn.dot_product_attention(q, k, v, **options)
  except RuntimeError as error:
    raise NotImplementedError(
      f"implementation={options['implementation']!r} is not possible here:"
      f" {error}"
    ) from error


def _check_input(x: Array) -> None:
  check_rank("x", x, "B T E")
