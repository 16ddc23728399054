"""A decoder language model whose layers are each dense GQA or MSA."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from msa_jax import cache as cache_lib
from msa_jax import ops
from msa_jax.attention import (
  ATTENTION_NAMES,
  CachedOutput,
  GQAttention,
  MSAttention,
  Selection,
  save_attention,
  selection_specs,
  spreads,
)
from msa_jax.checks import (
  check_integers,
  check_positions,
  check_query_mask,
  check_rank,
  check_rngs,
  compute_dtype,
  require,
  wrong,
)
from msa_jax.embedding import TokenEmbedding
from msa_jax.layers import (
  Sharding,
  gather_tokens,
  rms_norm,
  split_beyond_batch,
  split_tokens,
)
from msa_jax.meshes import any_mesh_method, spec
from msa_jax.mlp import MixtureOfExperts, SwiGLU
from msa_jax.model_config import LayerKind, MLPKind, ModelConfig
from msa_jax.segments import Segments, check_segments, with_max_segments


class LMOutput(NamedTuple):
  """Result of `DecoderLM`.

  Attributes:
    logits: next-token logits, float32 (float64 in a float64 model); None with
      `with_logits=False`.
    kl: KL loss of each layer in nats; 0 for dense layers, and unless `with_kl`.
    selection: chosen blocks and recalls of each layer, -1 for dense layers;
      None unless `with_selection`.
    experts: the experts that each token went to, -1 in layers with a dense MLP;
      None if the model has no MoE layers.
    hidden: the normalised output of the last layer; `head_weight` turns it into
      logits.
  """

  logits: Float[Array, "B T V"] | None
  kl: Float[Array, "L"]
  selection: Selection | None
  experts: Int32[Array, "L B T A"] | None
  hidden: Float[Array, "B T E"]


class _LayerOutput(NamedTuple):
  out: Array
  kl: Array
  selection: Selection | None
  experts: Array | None


class ExtendOutput(NamedTuple):
  """Result of `DecoderLM.extend`.

  Attributes:
    logits: next-token logits, float32; with `last_only`, T is 1.
    cache: the cache with the tokens in it.
    block_indices: chosen blocks of each layer, -1 for dense layers; None unless
      `with_selection`.
  """

  logits: Float[Array, "B T V"]
  cache: cache_lib.Cache
  block_indices: Int[Array, "L B K T P"] | None


class DecoderLayer(nnx.Module):
  """x + attention(norm(x)), then x + mlp(norm(x))."""

  def __init__(
    self,
    config: ModelConfig,
    kind: LayerKind,
    mlp_kind: MLPKind,
    *,
    rngs: nnx.Rngs,
    sharding: Sharding | None = None,
  ):
    dtype = jnp.dtype(config.dtype)
    param_dtype = jnp.dtype(config.param_dtype)
    self.sharding = sharding = sharding and sharding.present()
    options: dict[str, Any] = dict(
      num_heads=config.num_heads,
      in_features=config.embed_dim,
      qkv_features=config.num_heads * config.head_dim,
      num_kv_heads=config.num_kv_heads,
      rope_dim=config.rope_dim,
      rope_theta=config.rope_theta,
      rope_scaling=config.rope_scaling,
      normalize_qk=config.qk_norm,
      qk_norm_over=config.qk_norm_over,
      norm_eps=config.norm_eps,
      zero_centered_norm=config.zero_centered_norm,
      dtype=dtype,
      param_dtype=param_dtype,
      sharding=sharding,
      rngs=rngs,
    )
    norm = (
      config.embed_dim,
      config.norm_eps,
      config.zero_centered_norm,
      dtype,
      param_dtype,
      sharding,
    )
    self.attention_norm = rms_norm(*norm, rngs)
    # The MLP is made before the attention, so that a GQA and an MSA model of
    # one seed draw the same random weights for all that both have.
    self.mlp_norm = rms_norm(*norm, rngs)
    mlp_options: dict[str, Any] = dict(
      activation=config.activation,
      alpha=config.swiglu_alpha,
      limit=config.swiglu_limit,
      dtype=dtype,
      param_dtype=param_dtype,
      sharding=sharding,
      rngs=rngs,
    )
    if mlp_kind == "dense":
      self.mlp = SwiGLU(config.embed_dim, config.mlp_dim, **mlp_options)
    else:
      moe: dict[str, Any] = dataclasses.asdict(config.moe)
      self.mlp = MixtureOfExperts(config.embed_dim, **moe, **mlp_options)
    if kind == "gqa":
      self.attention = GQAttention(
        implementation=config.gqa_implementation, **options
      )
    else:
      self.attention = MSAttention(
        index=config.index, implementation=config.implementation, **options
      )

  def __call__(
    self,
    x: Float[Array, "B T E"],
    *,
    phase: ops.Phase,
    with_kl: bool,
    with_selection: bool,
    query_mask: Array | None,
    positions: Array | None,
    segments: Segments | None,
  ) -> _LayerOutput:
    h = gather_tokens(self.attention_norm(x), self.sharding)
    # The model has put the tokens in zigzag order, if a mesh axis splits them.
    rows: dict[str, Any] = dict(
      positions=positions, segments=segments, zigzag=True
    )
    if isinstance(self.attention, MSAttention):
      out, kl, selection = self.attention(
        h,
        phase=phase,
        with_kl=with_kl,
        with_selection=with_selection,
        query_mask=query_mask,
        **rows,
      )
    else:
      out, selection = self.attention(h, **rows), None
      kl = jnp.zeros((), compute_dtype(out.dtype))
    x, experts = self._add_mlp(
      x + split_tokens(out, self.sharding), self.sharding
    )
    return _LayerOutput(x, kl, selection, experts)

  def extend(
    self,
    x: Float[Array, "B T E"],
    cache: cache_lib.LayerCache,
    span: cache_lib.Span,
    *,
    phase: ops.Phase,
  ) -> CachedOutput:
    """Runs the next T tokens of each batch row and puts them into the cache."""
    h = self.attention_norm(x)
    if isinstance(self.attention, MSAttention):
      result = self.attention.extend(h, cache, span, phase=phase, zigzag=True)
    else:
      result = self.attention.extend(h, cache, span, zigzag=True)
    x, _ = self._add_mlp(x + result.out)
    return result._replace(out=x)

  def _add_mlp(
    self, x: Array, sharding: Sharding | None = None
  ) -> tuple[Array, Array | None]:
    """x + mlp(norm(x)), and the experts that each token went to.

    With sharding, x is split as its `between_layers` says.
    """
    h = gather_tokens(self.mlp_norm(x), sharding)
    if isinstance(self.mlp, MixtureOfExperts):
      out, experts = self.mlp(h)
      return x + split_tokens(out, sharding), experts
    return x + split_tokens(self.mlp(h), sharding), None


def _output_specs(out: LMOutput, self, tokens: Array, **options):
  split = spec(tokens)
  selection, experts = out.selection, out.experts
  if selection is not None:
    selection = selection_specs(self.sharding, split, selection)
  if experts is not None:
    experts = PartitionSpec(None, *split)
  logits = None if out.logits is None else split
  return LMOutput(logits, PartitionSpec(), selection, experts, split)  # pyright: ignore


def _extend_specs(
  out: ExtendOutput, self, tokens: Array, cache: cache_lib.Cache, **options
):
  rows = spec(tokens)[0]
  blocks = out.block_indices
  if blocks is not None:
    heads = None if self.sharding is None else self.sharding.heads
    blocks = PartitionSpec(None, rows, heads)
  return ExtendOutput(PartitionSpec(rows), jax.tree.map(spec, cache), blocks)  # pyright: ignore


class DecoderLM(nnx.Module):
  """Decoder-only language model: embedding, L layers, RMSNorm, logits.

  Args:
    config: sizes and options.
    rngs: a stream named "params". Models of one seed that differ in
      `layer_kinds` alone share the values of all parameters that both have.
    sharding: mesh axes of parameters and activations, which needs a mesh in
      context. None adds no annotations.

  Attributes:
    source: what else `msa_jax.checkpoints.load` read, for
      `msa_jax.checkpoints.save`; None if the parameters come from no
      checkpoint.
  """

  def __init__(
    self,
    config: ModelConfig,
    *,
    rngs: nnx.Rngs,
    sharding: Sharding | None = None,
  ):
    check_rngs(rngs)
    self.config = config
    self.source: Hashable = None
    self.sharding = sharding = sharding and sharding.present()
    dtype = jnp.dtype(config.dtype)
    param_dtype = jnp.dtype(config.param_dtype)
    init = nnx.initializers.variance_scaling(
      1.0, "fan_in", "normal", out_axis=0
    )
    head_init = nnx.initializers.lecun_normal()
    if sharding is not None:
      init = nnx.with_partitioning(init, (None, sharding.embed))
      head_init = nnx.with_partitioning(head_init, (sharding.embed, None))
    self.embed = TokenEmbedding(
      config.vocab_size,
      config.embed_dim,
      dtype=dtype,
      param_dtype=param_dtype,
      embedding_init=init,
      sharding=sharding,
      rngs=rngs,
    )
    self.norm = rms_norm(
      config.embed_dim,
      config.norm_eps,
      config.zero_centered_norm,
      dtype,
      param_dtype,
      sharding,
      rngs,
    )
    if not config.tie_embeddings:
      self.head = nnx.Linear(
        config.embed_dim,
        config.vocab_size,
        use_bias=False,
        dtype=dtype,
        param_dtype=param_dtype,
        kernel_init=head_init,
        rngs=rngs,
      )
    keys = jax.random.split(rngs.params(), config.num_layers)
    groups, first = [], 0
    for kinds, count in _runs(config):
      build = functools.partial(_build_layer, config, *kinds, sharding)

      if config.scan_layers:
        stack = nnx.vmap(build, transform_metadata={nnx.PARTITION_NAME: None})(
          keys[first : first + count]
        )
        groups.append(stack)
      else:
        groups.extend(build(key) for key in keys[first : first + count])
      first += count
    # One entry for each layer; with scan_layers, one stack for each run of
    # neighbouring layers of the same kind of attention and MLP.
    self.layers = nnx.List(groups)

  @any_mesh_method(_output_specs)
  def __call__(
    self,
    tokens: Int[Array, "B T"],
    *,
    phase: ops.Phase = "sparse",
    with_kl: bool = False,
    with_selection: bool = False,
    query_mask: Bool[Array, "B T"] | Float32[Array, "B T"] | None = None,
    with_logits: bool = True,
    positions: Int[Array, "*B T"] | None = None,
    segment_ids: Int32[Array, "B T"] | None = None,
    segments: Segments | None = None,
    max_segments: int | None = None,
    zigzag: bool = False,
  ) -> LMOutput:
    """Next-token logits.

    Args:
      tokens: token ids. Values are not checked here, because they are known on
        the device alone: negative ids count from the end, and those of
        `vocab_size` or more give NaN.
      phase: phase of the MSA layers, "sparse" or "warmup".
      with_kl: whether to compute the KL losses.
      with_selection: whether to return chosen blocks and recalls.
      query_mask: tokens that count in the KL, or float32 weights of them, see
        `msa_jax.index_kl_loss`; None: all.
      with_logits: whether to return logits. `msa_jax.head_loss` computes the
        training loss from `hidden` without holding all logits in memory.
      positions: rotary positions; None: 0 to T - 1, from 0 in each document,
        and along the path in a tree. Positions alone separate nothing: tokens
        of other documents are hidden by segment_ids or segments.
      segment_ids: the document of each token of packed rows; 0 is padding. A
        token sees its own document alone. A loss must leave out the target of
        each document's last token, which is of another document.
      segments: the same for prefix trees, from `tree_segments`; not both.
      max_segments: the most documents of a row, see `msa_jax.ops`.
      zigzag: where a mesh axis splits the tokens, tokens, positions and
        query_mask are in zigzag order, and so are the results, so that no
        token moves between devices, see `msa_jax.context`. False: they are in
        the order of the sequence, and the model moves them there and back.
        Segments are always in the order of the sequence.

    Raises:
      ValueError: an argument is wrong, or the mesh in context does not divide
        the KV heads or the experts.
      NotImplementedError: a named implementation does not support the call.
    """
    _check_tokens(tokens)
    if positions is not None:
      check_positions(positions, *tokens.shape)
    check_query_mask(query_mask, tokens)
    segments = check_segments(
      segment_ids, segments, max_segments, *tokens.shape
    )
    if segments is not None:
      # All layers take the same number, whatever their attention.
      segments = with_max_segments(segments, self.config.index.block_size)
    split = next(self._each_layer()).attention.context_split(
      "tokens", *tokens.shape
    )
    if split is not None:
      positions = split.positions(positions, zigzag, segments, tokens.shape[1])
    elif segments is not None and positions is None:
      positions = segments.positions
    moved = None if zigzag else split
    if moved is not None:
      tokens = moved.zigzag(tokens)
      if query_mask is not None:
        query_mask = moved.zigzag(query_mask)
    x = self._embed(tokens)
    kls, selections, experts = [], [], []
    for group in self.layers:
      graphdef, params = nnx.split(group)

      def apply(x, params, graphdef=graphdef):
        return _apply_layer(
          graphdef,
          phase,
          with_kl,
          with_selection,
          self.config.remat,
          x,
          params,
          query_mask,
          positions,
          segments,
        )

      if self.config.scan_layers:
        x, layers = lax.scan(apply, x, params)
      else:
        x, layer = apply(x, params)
        layers = jax.tree.map(lambda a: a[None], layer)
      kl, selection, chosen = layers
      kls.append(kl)
      selections.append(selection)
      experts.append(chosen)
    x = self.norm(x)
    kl = jnp.concatenate(kls)
    selection = None
    if with_selection:
      selection = self._stack_selections(selections, tokens.shape)
    chosen = self._stack_experts(experts, tokens.shape)
    if moved is not None:
      x = moved.natural(x)
      if selection is not None:
        heads = None if self.sharding is None else self.sharding.heads
        blocks = moved.natural(
          selection.block_indices,
          PartitionSpec(None, moved.rows, heads, moved.axis),
        )
        selection = selection._replace(block_indices=blocks)
      if chosen is not None:
        chosen = moved.natural(
          chosen, PartitionSpec(None, moved.rows, moved.axis)
        )
    logits = self._logits(x) if with_logits else None
    return LMOutput(logits, kl, selection, chosen, x)

  def init_cache(
    self, batch: int, capacity: int, *, index_dtype: Any = None
  ) -> cache_lib.Cache:
    """An empty cache, split over the mesh in context.

    Args:
      batch: batch rows, B.
      capacity: tokens that each batch row has room for, C.
      index_dtype: dtype of the index keys. float8_e4m3fn halves the bytes that
        decoding reads to choose blocks, and scores blocks as
        score_precision="fp8" does; the other choice is the model's dtype. None
        takes float8_e4m3fn if the config has score_precision="fp8", else the
        model's dtype. It must be None for a model without MSA layers.

    Raises:
      ValueError: an argument is wrong.
      NotImplementedError: an ablation of the config has no cached form.
    """
    if "msa" not in self.config.kinds:
      require(
        index_dtype is None,
        "index_dtype",
        "None for a model without MSA layers, which caches no index keys",
        index_dtype,
      )
    elif index_dtype is None and self.config.index.score_precision == "fp8":
      index_dtype = cache_lib.FP8

    def build():
      return cache_lib.empty(
        tuple(
          layer.attention.init_cache(batch, capacity, index_dtype=index_dtype)
          for layer in self._each_layer()
        )
      )

    axes = next(self._each_layer()).attention.mesh_axes(batch)
    if axes is None:
      return build()
    split = math.prod(
      jax.sharding.get_abstract_mesh().shape[axis] for axis in axes[0]
    )
    require(
      batch % split == 0,
      "batch",
      f"a multiple of mesh axes {axes[0]} = {split}",
      batch,
    )
    unit = self.cache_unit(batch)
    require(
      capacity % unit == 0,
      "capacity",
      f"a multiple of {unit}: whole blocks on each device that shares a"
      " sequence",
      capacity,
    )
    context = self.sharding and self.sharding.context_axis(
      jax.sharding.get_abstract_mesh()
    )
    places = cache_lib.partition(jax.eval_shape(build), *axes, context)
    return jax.jit(build, out_shardings=places)()

  def cache_unit(self, batch: int) -> int:
    """What the capacity of a cache must be a multiple of.

    1, unless the mesh in context has an axis that splits sequences.
    """
    layers = [layer.attention for layer in self._each_layer()]
    split = layers[0].cache_split(batch)
    if split is None:
      return 1
    return split.devices * max(layer.cache_unit() for layer in layers)

  @any_mesh_method(_extend_specs)
  def extend(
    self,
    tokens: Int[Array, "B T"],
    cache: cache_lib.Cache,
    *,
    counts: Int[Array, "B"] | None = None,
    phase: ops.Phase = "sparse",
    last_only: bool = False,
    with_selection: bool = False,
  ) -> ExtendOutput:
    """Reads the next T tokens of each batch row and puts them into the cache.

    The logits equal those of one pass over all of a batch row's tokens. The
    cache marks batch rows that overflow, see `msa_jax.Cache`; their logits have
    no meaning, and neither have those of padding. With `scan_layers` each call
    copies the stacked weights; `to_msa` unstacks them once.

    Args:
      tokens: token ids.
      cache: of `init_cache` or an earlier call; donate it to write in place.
      counts: real tokens of each batch row, the last counts[b] of T, with
        padding on the left. None: all.
      phase: phase of the MSA layers, "sparse" or "warmup". "warmup" needs
        implementation="xla", "reference" or None, because mosaic_gpu has no
        dense attention over a cache.
      last_only: whether to return the last token's logits alone.
      with_selection: whether to return chosen blocks.

    Raises:
      ValueError: the tokens or the cache do not fit the model or each other.
      NotImplementedError: a named implementation does not support the call, or
        an ablation of the config has no cached form.
    """
    _check_tokens(tokens)
    self._check_cache(cache, tokens.shape)
    cache, span = cache.reserve(tokens.shape[1], counts)
    first = next(self._each_layer()).attention
    spread = spreads(first.cache_split(tokens.shape[0]), tokens.shape[1])
    ordered = tokens if spread is None else spread.zigzag(tokens)
    x = self.embed(ordered)
    x = self._split_batch(x, spread is not None)
    layers, choices = [], []
    for layer, held in zip(self._each_layer(), cache.layers):
      x, held, blocks = layer.extend(x, held, span, phase=phase)
      layers.append(held)
      choices.append(blocks)
    x = x if spread is None else spread.natural(x)
    logits = self._logits(self.norm(x[:, -1:] if last_only else x))
    block_indices = None
    if with_selection:
      config = self.config
      b, t = tokens.shape
      shape = (b, config.num_kv_heads, t, config.index.top_k)
      none = jnp.full(shape, -1, jnp.int32)
      block_indices = jnp.stack([none if c is None else c for c in choices])
      if spread is not None:
        heads = None if self.sharding is None else self.sharding.heads
        block_indices = spread.natural(
          block_indices, PartitionSpec(None, spread.rows, heads, spread.axis)
        )
    cache = cache._replace(layers=tuple(layers))
    return ExtendOutput(logits, cache, block_indices)

  def _each_layer(self) -> Iterator[DecoderLayer]:
    """The layers one by one, unstacked if they are stacked."""
    if not self.config.scan_layers:
      yield from self.layers
      return
    for stack, (_, count) in zip(self.layers, _runs(self.config)):
      graphdef, params = nnx.split(stack)
      for i in range(count):
        yield nnx.merge(graphdef, jax.tree.map(lambda p, i=i: p[i], params))

  def _check_cache(
    self, cache: cache_lib.Cache, tokens_shape: tuple[int, ...]
  ) -> None:
    """Raises ValueError unless `init_cache` could have made the cache."""
    if not isinstance(cache, cache_lib.Cache):
      raise wrong("cache", "a msa_jax.Cache", type(cache).__name__)
    batch, q_len = tokens_shape
    index_dtypes = [
      layer.index_k.dtype for layer in cache.layers if layer.index_k is not None
    ]
    index_dtype = None
    if "msa" in self.config.kinds:
      codes = any(dtype == cache_lib.FP8 for dtype in index_dtypes)
      index_dtype = cache_lib.FP8 if codes else self.config.dtype
    build = functools.partial(
      self.init_cache, batch, cache.capacity, index_dtype=index_dtype
    )
    found, wanted = _describe(cache), _describe(jax.eval_shape(build))
    for name in sorted({*found, *wanted}):
      got, want = found.get(name, "None"), wanted.get(name, "None")
      if got != want:
        raise wrong(
          f"cache{name}", f"{want} for {batch} batch rows of this model", got
        )
    require(
      q_len <= cache.capacity,
      "tokens",
      f"at most the cache's capacity = {cache.capacity} in each batch row",
      q_len,
    )

  def _embed(self, tokens: Array) -> Array:
    """The embeddings of tokens, split as `Sharding.between_layers` says."""
    split = split_beyond_batch(self.sharding, *tokens.shape)
    if split is None:
      return self._split_batch(self.embed(tokens))
    # To read from a table that is split over "fsdp", XLA would send all devices
    # the embeddings of all tokens. A copy of the table is smaller.
    graphdef, params = nnx.split(self.embed)
    place = PartitionSpec(*split)
    return jax.shard_map(
      lambda params, tokens: nnx.merge(graphdef, params)(tokens),
      in_specs=(PartitionSpec(), place),
      out_specs=place,
      check_vma=False,
    )(params, tokens)

  def head_weight(self) -> Float[Array, "E V"]:
    """The matrix that turns `LMOutput.hidden` into logits: the kernel of the
    head, or the transposed embedding if they are tied."""
    if self.config.tie_embeddings:
      return self.embed.embedding[...].T
    return self.head.kernel[...]

  def _logits(self, hidden: Float[Array, "B T E"]) -> Float[Array, "B T V"]:
    return jnp.einsum(
      "bte,ev->btv",
      hidden,
      self.head_weight().astype(hidden.dtype),
      preferred_element_type=compute_dtype(hidden.dtype),
    )

  def _split_batch(self, x: Array, tokens: bool = True) -> Array:
    """Splits the batch rows, and the tokens where a mesh axis does."""
    mesh = jax.sharding.get_abstract_mesh()
    if self.sharding is None or mesh.empty:
      return x
    batch = self.sharding.batch_axes(mesh, x.shape[0])
    context = self.sharding.context_axis(mesh) if tokens else None
    return lax.with_sharding_constraint(x, PartitionSpec(batch, context, None))

  def _stack_selections(
    self, selections: Sequence[Selection | None], shape: tuple[int, ...]
  ) -> Selection:
    config = self.config
    dtype = compute_dtype(config.dtype)
    filled = []
    for selection, count in zip(selections, group_sizes(config)):
      if selection is None:
        blocks = (count, shape[0], config.num_kv_heads, shape[1])
        selection = Selection(
          jnp.full((*blocks, config.index.top_k), -1, jnp.int32),
          *(jnp.full((count,), -1, dtype),) * 3,
        )
      filled.append(selection)
    return jax.tree.map(lambda *a: jnp.concatenate(a), *filled)

  def _stack_experts(
    self, experts: Sequence[Array | None], shape: tuple[int, ...]
  ) -> Array | None:
    if all(chosen is None for chosen in experts):
      return None
    return jnp.concatenate(
      [
        jnp.full((count, *shape, self.config.moe.top_k), -1, jnp.int32)
        if chosen is None
        else chosen
        for chosen, count in zip(experts, group_sizes(self.config))
      ]
    )


# Jitted by itself, so that layers with equal graph definitions are traced,
# differentiated and lowered once. Otherwise each layer would bring its own copy
# of every kernel to the compiler.
@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _apply_layer(
  graphdef: Any,
  phase: ops.Phase,
  with_kl: bool,
  with_selection: bool,
  remat: bool,
  x: Array,
  params: Any,
  query_mask: Array | None,
  positions: Array | None,
  segments: Segments | None,
) -> tuple[Array, list]:
  """A layer's output, and its KL, selection and experts."""

  def apply(x, params):
    out, *rest = nnx.merge(graphdef, params)(
      x,
      phase=phase,
      with_kl=with_kl,
      with_selection=with_selection,
      query_mask=query_mask,
      positions=positions,
      segments=segments,
    )
    return out, rest

  policy = functools.partial(_is_saved, remat=remat)
  return jax.checkpoint(apply, policy=policy)(x, params)


# What layers give `jax.ad_checkpoint.checkpoint_name` to besides.
_LAYER_NAMES = ("rotated", "mlp_hidden", "gathered_tokens")
_save_layer = jax.checkpoint_policies.save_only_these_names(
  *ATTENTION_NAMES, *_LAYER_NAMES
)


def _is_saved(
  primitive: Any, *operands: Any, remat: bool, **params: Any
) -> bool:
  """The policy of `jax.checkpoint`: whether the backward pass of a layer finds
  a value in memory, or computes it again.

  The results of attention, of the choice of blocks and of the KL loss are
  always saved, so that none of them is computed twice. Without `remat` the
  matrix products are saved too. The backward pass then repeats only norms,
  casts and gates, because reading their inputs again costs less memory traffic
  than writing and reading their float32 intermediates.
  """
  if primitive.name.startswith("dot_product_attention_fwd"):
    return True  # the output and log sum exp of cuDNN's attention
  if remat:
    return bool(save_attention(primitive, *operands, **params))
  products = ("dot_general", "ragged_dot_general")
  return primitive.name in products or bool(
    _save_layer(primitive, *operands, **params)
  )


def _check_tokens(tokens: Array) -> None:
  check_rank("tokens", tokens, "B T")
  check_integers("tokens", tokens)


def _describe(tree: Any) -> dict[str, str]:
  """Dtype and shape of each array of a tree, by its key path."""
  return {
    jax.tree_util.keystr(path): f"{x.dtype} of shape {tuple(x.shape)}"
    for path, x in jax.tree_util.tree_leaves_with_path(tree)
  }


def _build_layer(
  config: ModelConfig,
  kind: LayerKind,
  mlp_kind: MLPKind,
  sharding: Sharding | None,
  key: Array,
) -> DecoderLayer:
  return DecoderLayer(
    config, kind, mlp_kind, rngs=nnx.Rngs(params=key), sharding=sharding
  )


def _runs(config: ModelConfig) -> list[tuple[tuple[LayerKind, MLPKind], int]]:
  """Runs of neighbouring layers of one kind: (attention, MLP) and length."""
  kinds = zip(config.kinds, config.mlps)
  return [(kind, len(list(run))) for kind, run in itertools.groupby(kinds)]


def group_sizes(config: ModelConfig) -> list[int]:
  """How many layers each entry of `DecoderLM.layers` holds."""
  if config.scan_layers:
    return [count for _, count in _runs(config)]
  return [1] * config.num_layers


def is_index_param(path: Sequence[Any]) -> bool:
  """Whether a parameter path belongs to the Index Branch.

  Args:
    path: keys from the model's root, as `nnx.to_flat_state` or
      `jax.tree_util.tree_flatten_with_path` give them.
  """
  names = (getattr(key, "key", getattr(key, "name", key)) for key in path)
  return any(str(name).startswith("index_") for name in names)


def param_groups(params: Any) -> Any:
  """The group of each parameter, as `optax.multi_transform` wants labels.

  The KL loss alone trains the Index Branch, so it wants a gradient clip and a
  learning rate of its own:

    optax.multi_transform({"rest": a, "index": b}, msa_jax.param_groups)

  Args:
    params: a pytree of parameters, such as `nnx.state(model, nnx.Param)`.

  Returns:
    The tree with "index" for parameters of the Index Branch (`is_index_param`)
    and "rest" for all others.
  """
  return jax.tree_util.tree_map_with_path(
    lambda path, _: "index" if is_index_param(path) else "rest", params
  )


def abstract_model(
  config: ModelConfig, sharding: Sharding | None
) -> tuple[Any, dict[tuple, Any], dict[tuple, PartitionSpec]]:
  """Graph definition, shapes by path and partition specs of a model."""
  model = nnx.eval_shape(
    lambda: DecoderLM(config, rngs=nnx.Rngs(0), sharding=sharding)
  )
  graphdef, state = nnx.split(model, nnx.Param)
  specs = nnx.to_flat_state(nnx.get_partition_spec(state))
  return (
    graphdef,
    {path: leaf for path, leaf in nnx.to_flat_state(state)},
    {path: leaf.get_value() for path, leaf in specs},
  )
