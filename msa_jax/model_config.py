"""Configs of layers and models: sizes and options, checked when they are made.

`IndexConfig` holds the options of `MSAttention`, `MoEConfig` those of
`MixtureOfExperts`, and `ModelConfig` those of `DecoderLM`.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from msa_jax import ops
from msa_jax.checks import (
  check_blocks,
  check_choice,
  check_heads,
  check_positive,
  check_precision,
  check_rope_dim,
  check_sizes,
  keep,
  require,
)
from msa_jax.layers import RopeScaling
from msa_jax.mlp import Activation, Router

LayerKind = Literal["gqa", "msa"]
MLPKind = Literal["dense", "moe"]
SelectionRule = Literal["index", "window", "oracle"]
GQAKernel = Literal["xla", "cudnn"]
QKNormOver = Literal["head", "projection"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class IndexConfig:
  """Options of the Index Branch of `MSAttention`.

  The first six fields are the method, the others the paper's ablations of it
  (paper arXiv 2606.13392).

  Attributes:
    index_dim: size of an index head, I.
    rope_dim: dims of an index head that rotate, the first ones, at most I;
      None: as many as of a main head, at most I.
    block_size: tokens of a block of keys.
    top_k: blocks that each query and group keeps, P.
    num_local_blocks: blocks that are always kept, counted back from the query's
      own block and inside `top_k`; 0 forces none.
    score_precision: see `msa_jax.select_blocks`.
    selection: "index" lets the Index Branch choose. "window" keeps block 0 and
      the last P - 1 blocks. "oracle" keeps the P blocks with the most dense
      attention of the main branch (`msa_jax.best_blocks`), at dense attention's
      cost: it shows what the best choice of blocks would give. With both, the
      layer has no Index Branch.
    force_first_block: always keep block 0, inside `top_k`.
    detach_input: stop the KL's gradient at the input of the index projections,
      so that it does not reach the layers below.
    detach_teacher: stop the KL's gradient at the main branch's probabilities.
      False computes the KL densely, in O(T^2) memory, and needs a layer with
      implementation "reference" or None.
    value_head: add the Index Branch's own attention output (one value head,
      over the chosen tokens) to the layer's output, so that the LM loss reaches
      the index projections.

  Raises:
    ValueError: a field is wrong, or does not fit another.
  """

  index_dim: int = 128
  rope_dim: int | None = None
  block_size: int = 128
  top_k: int = 16
  num_local_blocks: int = 1
  score_precision: ops.ScorePrecision = "exact"
  selection: SelectionRule = "index"
  force_first_block: bool = False
  detach_input: bool = True
  detach_teacher: bool = True
  value_head: bool = False

  def __post_init__(self):
    (index_dim,) = check_sizes(index_dim=self.index_dim)
    rope_dim = self.rope_dim
    if rope_dim is not None:
      rope_dim = check_rope_dim(rope_dim, index_dim, "index_dim")
    block_size, top_k, num_local_blocks = check_blocks(
      self.block_size, self.top_k, self.num_local_blocks
    )
    keep(
      self,
      index_dim=index_dim,
      rope_dim=rope_dim,
      block_size=block_size,
      top_k=top_k,
      num_local_blocks=num_local_blocks,
    )
    check_choice("score_precision", self.score_precision, ops.ScorePrecision)
    check_choice("selection", self.selection, SelectionRule)
    require(
      not self.force_first_block or self.top_k > max(self.num_local_blocks, 1),
      "top_k",
      "greater than num_local_blocks, and than 1, with force_first_block",
      self.top_k,
    )
    for name, plain in (
      ("rope_dim", None),
      ("force_first_block", False),
      ("detach_input", True),
      ("detach_teacher", True),
      ("value_head", False),
    ):
      value = getattr(self, name)
      require(
        self.selection == "index" or value == plain,
        name,
        f"{plain} with selection={self.selection!r}, which has no Index Branch",
        value,
      )

  def rotated(self, rope_dim: int) -> int:
    """Dims of an index head that rotate where rope_dim of a main head do."""
    if self.rope_dim is not None:
      return self.rope_dim
    return min(rope_dim, self.index_dim // 2 * 2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
  """Options of `MixtureOfExperts`, which describes each field."""

  num_experts: int = 64
  top_k: int = 4
  expert_dim: int = 1536
  shared_dim: int = 0
  routed_scale: float = 1.0
  router: Router = "sigmoid"
  normalize_weights: bool = True

  def __post_init__(self):
    num_experts, top_k, expert_dim = check_sizes(
      num_experts=self.num_experts,
      top_k=self.top_k,
      expert_dim=self.expert_dim,
    )
    (shared_dim,) = check_sizes(0, shared_dim=self.shared_dim)
    keep(
      self,
      num_experts=num_experts,
      top_k=top_k,
      expert_dim=expert_dim,
      shared_dim=shared_dim,
    )
    require(
      self.top_k <= self.num_experts,
      "top_k",
      f"at most num_experts = {self.num_experts}",
      self.top_k,
    )
    check_positive(routed_scale=self.routed_scale)
    check_choice("router", self.router, Router)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """Sizes and options of `DecoderLM`.

  Attributes:
    vocab_size: tokens.
    num_layers: decoder layers, L.
    embed_dim: width of the residual stream, E.
    num_heads: query heads, H.
    num_kv_heads: KV heads, K.
    head_dim: size of a head, D.
    mlp_dim: hidden units of a dense layer's SwiGLU MLP.
    layer_kinds: attention of each layer; the last entry repeats, so
      ("gqa", "gqa", "gqa", "msa") keeps the first three layers dense.
    index: the Index Branch of MSA layers.
    mlp_kinds: MLP of each layer, "dense" or "moe"; the last entry repeats.
    moe: the mixture of experts of MoE layers.
    activation: of every MLP and expert, see `msa_jax.mlp.gated`.
    swiglu_alpha, swiglu_limit: of activation "swiglu_oai".
    rope_dim: dims of each head that rotate; None: all.
    rope_theta: base of the rotary frequencies.
    rope_scaling: slower rotary frequencies for long contexts; None: theta's.
    qk_norm: RMSNorm on queries and keys (and on each index head).
    qk_norm_over: "head" or "projection", see `GQAttention`.
    norm_eps: epsilon of every RMSNorm.
    zero_centered_norm: every RMSNorm scales by 1 + w, with w around 0.
    tie_embeddings: use the embedding as output projection.
    remat: keep only the inputs and the attention results of each layer (out,
      lse, chosen blocks, gradients of the KL), and compute the rest again in
      the backward pass. Without it, matrix products are kept too, and norms,
      rotations and gates are computed again.
    scan_layers: stack neighbouring layers of one kind and scan over them, which
      compiles faster.
    dtype: dtype of the computation.
    param_dtype: dtype of the parameters.
    implementation: of the MSA operation, see `msa_jax.ops`.
    gqa_implementation: of dense layers, see `msa_jax.GQAttention`.
  """

  vocab_size: int
  num_layers: int
  embed_dim: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  mlp_dim: int
  layer_kinds: tuple[LayerKind, ...] = ("gqa",)
  index: IndexConfig = IndexConfig()
  mlp_kinds: tuple[MLPKind, ...] = ("dense",)
  moe: MoEConfig = MoEConfig()
  activation: Activation = "swiglu"
  swiglu_alpha: float = 1.702
  swiglu_limit: float = 7.0
  rope_dim: int | None = None
  rope_theta: float = 10_000.0
  rope_scaling: RopeScaling | None = None
  qk_norm: bool = True
  qk_norm_over: QKNormOver = "head"
  norm_eps: float = 1e-6
  zero_centered_norm: bool = False
  tie_embeddings: bool = True
  remat: bool = False
  scan_layers: bool = False
  dtype: str = "float32"
  param_dtype: str = "float32"
  implementation: ops.Implementation | None = None
  gqa_implementation: GQAKernel = "xla"

  def __post_init__(self):
    names = ("vocab_size", "num_layers", "embed_dim", "num_heads", "head_dim")
    names = (*names, "mlp_dim")
    sizes = check_sizes(**{name: getattr(self, name) for name in names})
    keep(self, **dict(zip(names, sizes)))
    _, num_kv_heads, _, rope_dim = check_heads(
      num_heads=self.num_heads,
      num_kv_heads=self.num_kv_heads,
      qkv_features=self.num_heads * self.head_dim,
      rope_dim=self.rope_dim,
      rope_theta=self.rope_theta,
      norm_eps=self.norm_eps,
    )
    keep(self, num_kv_heads=num_kv_heads)
    if self.rope_dim is not None:
      keep(self, rope_dim=rope_dim)
    for name, kinds in (("layer_kinds", LayerKind), ("mlp_kinds", MLPKind)):
      given, allowed = getattr(self, name), get_args(kinds)
      require(
        1 <= len(given) <= self.num_layers
        and all(kind in allowed for kind in given),
        name,
        f"1 to num_layers = {self.num_layers} entries of"
        f" {' or '.join(map(repr, allowed))}",
        given,
      )
    check_choice("activation", self.activation, Activation)
    check_choice("qk_norm_over", self.qk_norm_over, QKNormOver)
    check_positive(
      swiglu_alpha=self.swiglu_alpha, swiglu_limit=self.swiglu_limit
    )
    for name in ("dtype", "param_dtype"):
      allowed = ("float32", "bfloat16", "float16", "float64")
      check_choice(name, getattr(self, name), allowed)
    check_precision(self.dtype, self.param_dtype)
    allowed = (*get_args(ops.Implementation), None)
    check_choice("implementation", self.implementation, allowed)
    check_choice("gqa_implementation", self.gqa_implementation, GQAKernel)

  @property
  def kinds(self) -> tuple[LayerKind, ...]:
    """The attention of every layer."""
    missing = self.num_layers - len(self.layer_kinds)
    return self.layer_kinds + self.layer_kinds[-1:] * missing

  @property
  def mlps(self) -> tuple[MLPKind, ...]:
    """The MLP of every layer."""
    missing = self.num_layers - len(self.mlp_kinds)
    return self.mlp_kinds + self.mlp_kinds[-1:] * missing
