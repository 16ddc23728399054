"""Configs of a decoder model: sizes and options, checked when they are made."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from msa_jax import ops
from msa_jax.checks import (
  check_heads,
  check_index_branch,
  check_sizes,
  require,
)
from msa_jax.mlp import Activation

LayerKind = Literal["gqa", "msa"]
MLPKind = Literal["dense", "moe"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class IndexConfig:
  """The Index Branch of MSA layers; see `MSAttention` for each field.

  The first line is the method, the rest are the paper's ablations.
  """

  index_dim: int = 128
  block_size: int = 128
  top_k: int = 16
  num_local_blocks: int = 1
  score_precision: ops.ScorePrecision = "exact"
  selection: Literal["index", "window"] = "index"
  force_first_block: bool = False
  detach_input: bool = True
  detach_teacher: bool = True
  value_head: bool = False

  def __post_init__(self):
    check_index_branch(**dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
  """The mixture of experts of MoE layers; see `MixtureOfExperts`."""

  num_experts: int = 64
  top_k: int = 4
  expert_dim: int = 1536
  shared_dim: int = 0
  routed_scale: float = 1.0

  def __post_init__(self):
    check_sizes(
      num_experts=self.num_experts,
      top_k=self.top_k,
      expert_dim=self.expert_dim,
    )
    check_sizes(0, shared_dim=self.shared_dim)
    require(
      self.top_k <= self.num_experts,
      "top_k",
      f"at most num_experts = {self.num_experts}",
      self.top_k,
    )
    require(
      0 < self.routed_scale < float("inf"),
      "routed_scale",
      "above 0 and finite",
      self.routed_scale,
    )


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
    qk_norm: RMSNorm on each query and key head (and index head).
    norm_eps: epsilon of every RMSNorm.
    zero_centered_norm: every RMSNorm scales by 1 + w, with w around 0.
    tie_embeddings: use the embedding as output projection.
    remat: recompute each layer in the backward pass.
    scan_layers: stack equal neighbouring layers and scan over them; compiles
      faster.
    dtype: dtype of the computation.
    param_dtype: dtype of the parameters.
    implementation: of the MSA operation, see `msa_jax.ops`.
    gqa_implementation: of `jax.nn.dot_product_attention`.
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
  qk_norm: bool = True
  norm_eps: float = 1e-6
  zero_centered_norm: bool = False
  tie_embeddings: bool = True
  remat: bool = False
  scan_layers: bool = False
  dtype: str = "float32"
  param_dtype: str = "float32"
  implementation: ops.Implementation | None = None
  gqa_implementation: Literal["xla", "cudnn"] = "xla"

  def __post_init__(self):
    check_sizes(
      vocab_size=self.vocab_size,
      num_layers=self.num_layers,
      embed_dim=self.embed_dim,
      num_heads=self.num_heads,
      head_dim=self.head_dim,
      mlp_dim=self.mlp_dim,
    )
    check_heads(
      num_heads=self.num_heads,
      num_kv_heads=self.num_kv_heads,
      qkv_features=self.num_heads * self.head_dim,
      rope_dim=self.rope_dim,
      rope_theta=self.rope_theta,
      norm_eps=self.norm_eps,
    )
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
    require(
      self.activation in get_args(Activation),
      "activation",
      f"one of {get_args(Activation)}",
      self.activation,
    )
    for name in ("swiglu_alpha", "swiglu_limit"):
      value = getattr(self, name)
      require(0 < value < float("inf"), name, "above 0 and finite", value)
    for name in ("dtype", "param_dtype"):
      allowed = ("float32", "bfloat16", "float16", "float64")
      require(
        getattr(self, name) in allowed,
        name,
        f"one of {allowed}",
        getattr(self, name),
      )
    require(
      self.implementation in (None, *get_args(ops.Implementation)),
      "implementation",
      f"one of {get_args(ops.Implementation)} or None",
      self.implementation,
    )
    require(
      self.gqa_implementation in ("xla", "cudnn"),
      "gqa_implementation",
      "'xla' or 'cudnn'",
      self.gqa_implementation,
    )

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
