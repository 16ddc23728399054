"""MiniMax-M3 text models, as released and as transformers saves them alone.

The released folders hold a vision model too: config.json has the text model in
`text_config`, its tensors begin with `language_model.`, and experts lie one by
one. transformers' text model (MiniMaxM3VLForCausalLM) has its fields at the
top, no prefix, and one tensor for all experts of a layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from msa_jax.checkpoints.families.base import (
  Family,
  Name,
  attention_names,
  describe_sizes,
  expert_names,
  gated_names,
  read_sizes,
  rope_factor,
  stacked_expert_names,
)
from msa_jax.checkpoints.fields import Fields, describe_rope, read_rope
from msa_jax.checks import is_integer
from msa_jax.model_config import IndexConfig, ModelConfig, MoEConfig

_MOE = "model.layers.{}.block_sparse_moe."
_RELEASED = {
  **attention_names(
    ("index_q_proj", "index_k_proj", "index_q_norm", "index_k_norm")
  ),
  **expert_names("block_sparse_moe", ("w1", "w3", "w2")),
  **gated_names("mlp", "mlp"),
  **gated_names("block_sparse_moe.shared_experts", "mlp.shared"),
  "mlp.router": Name(f"{_MOE}gate.weight", "into"),
  "mlp.choice_bias": Name(f"{_MOE}e_score_correction_bias", "same"),
}
_MLP = "model.layers.{}.mlp."


def _fused(prefix: str, parameter: str) -> dict[str, Name]:
  tensor = f"{_MLP}{prefix}gate_up_proj.weight"
  return {
    f"{parameter}.gate.kernel": Name(tensor, "into", half=0),
    f"{parameter}.up.kernel": Name(tensor, "into", half=1),
    f"{parameter}.down.kernel": Name(f"{_MLP}{prefix}down_proj.weight", "into"),
  }


_TRANSFORMERS = {
  **attention_names(
    ("indexer.q_proj", "indexer.k_proj", "indexer.q_norm", "indexer.k_norm")
  ),
  **_fused("", "mlp"),
  **_fused("shared_experts.", "mlp.shared"),
  **stacked_expert_names(),
  "mlp.choice_bias": Name(f"{_MLP}gate.e_score_correction_bias", "same"),
}


# Options of the Index Branch, by transformers' field and the released one.
_INDEX = {
  "index_dim": ("index_head_dim", "sparse_index_dim"),
  "block_size": ("index_block_size", "sparse_block_size"),
  "top_k": ("index_topk_blocks", "sparse_topk_blocks"),
  "num_local_blocks": ("index_local_blocks", "sparse_local_block"),
}


class M3(Family):
  title = "MiniMax-M3"
  model_types = ("minimax_m3_vl_text", "minimax_m3_vl", "minimax_m3")
  architectures = (
    "MiniMaxM3VLForCausalLM",
    "MiniMaxM3SparseForConditionalGeneration",
    "MiniMaxM3SparseForCausalLM",
  )
  layouts: ClassVar = {"transformers": _TRANSFORMERS, "released": _RELEASED}
  # The release's text part has the series before it as its model_type.
  nested = (*model_types, "minimax_m2")

  def layout_of(self, names: Iterable[str]) -> str:
    marks = (".gate_up_proj", ".indexer.", ".mlp.gate.")
    fused = any(mark in name for name in names for mark in marks)
    return "transformers" if fused else "released"

  def refusal(self, config: ModelConfig, layout: str) -> str | None:
    if "msa" in config.kinds and config.index.rope_dim is not None:
      return "MiniMax-M3 has no index.rope_dim of its own"
    if layout == "transformers":
      if "msa" in config.kinds and config.index.force_first_block:
        return (
          "transformers' MiniMax-M3 has no index.force_first_block=True (the"
          " released sparse_init_block)"
        )
      if "moe" in config.mlps and not config.moe.shared_dim:
        return "transformers' MiniMax-M3 has no moe.shared_dim=0"
    return super().refusal(config, layout)

  def read(self, fields: Fields) -> ModelConfig:
    for key, *allowed in (
      ("attention_bias", False),
      ("attention_output_gate", False),
      ("index_topk_freq", 1),
      ("n_group", 1),
      ("norm_topk_prob", True),
      ("qk_norm_type", "per_head"),
      ("scoring_func", "sigmoid"),
      ("sliding_window", 0),
      ("swiglu_beta", 1, 1.0),
      ("topk_group", 1),
      ("use_index_cache", False),
      ("use_routing_bias", True),
    ):
      fields.only(key, *allowed)
    sizes = read_sizes(fields)
    layers = sizes["num_layers"]
    head_dim = fields.size(
      "head_dim", default=sizes["embed_dim"] // sizes["num_heads"]
    )
    options: dict[str, Any] = read_rope(
      fields, head_dim, default_theta=5e6, partial=True, scaling=False
    )
    expert_dim = fields.size("intermediate_size")
    options["mlp_dim"] = fields.size(
      "dense_intermediate_size", "mlp_intermediate_size", default=expert_dim
    )
    options |= self._activation(fields)
    kinds = self._attention_kinds(fields, layers)
    options["layer_kinds"] = tuple(kinds)
    if "msa" in kinds:
      options["index"] = self._index(fields, sizes["num_kv_heads"])
    else:
      # transformers writes these for models without sparse layers, too.
      fields.read |= {new for new, _ in _INDEX.values()} | {"index_n_heads"}
      sparse = fields.part("sparse_attention_config")
      sparse.read |= {old for _, old in _INDEX.values()}
      sparse.read |= {
        "sparse_init_block",
        "sparse_num_index_heads",
        "sparse_score_type",
      }
    experts = fields.get("num_local_experts", "num_experts")
    mlps = self._mlp_kinds(fields, layers, bool(experts))
    options["mlp_kinds"] = tuple(mlps)
    if "moe" in mlps:
      options["moe"] = self._moe(fields, expert_dim)
    else:
      # transformers writes these for models without experts, too.
      fields.read |= {
        "n_shared_experts",
        "num_experts_per_tok",
        "routed_scaling_factor",
        "shared_intermediate_size",
      }
    options["qk_norm"] = fields.flag("use_qk_norm", True)
    if fields.problems:
      raise ValueError("the fields describe no model")
    return ModelConfig(**sizes, **options, head_dim=head_dim)

  def _activation(self, fields: Fields) -> dict[str, Any]:
    """The activation and the kind of the norms.

    transformers writes hidden_act "silu" beside swiglu_alpha and swiglu_limit,
    so these fields decide. Files of msa_jax 0.1 have models with SwiGLU, which
    no other program calls a MiniMax-M3; they always say use_gemma_norm.
    """
    fields.only("hidden_act", "silu", "swigluoai")
    oai: dict[str, Any] = {
      name: fields.number(name)
      for name in ("swiglu_alpha", "swiglu_limit")
      if fields.get(name) is not None
    }
    is_oai = bool(oai) or fields.get("hidden_act") == "swigluoai"
    if not is_oai and fields.get("use_gemma_norm") is None:
      fields.complain("field missing: swiglu_alpha and swiglu_limit")
    return {
      **oai,
      "activation": "swiglu_oai" if is_oai else "swiglu",
      "zero_centered_norm": fields.flag("use_gemma_norm", True),
    }

  def _attention_kinds(self, fields: Fields, layers: int) -> list[str]:
    sparse = fields.part("sparse_attention_config")
    names = {"full_attention": "gqa", "minimax_m3_sparse": "msa"}
    given = fields.kinds("layer_types", names, layers)
    flags = sparse.flags("sparse_attention_freq", layers)
    if not sparse.flag("use_sparse_attention", True):
      flags = [False] * layers
    if sparse.values and flags is None and given is None:
      fields.complain(
        "field missing: sparse_attention_config.sparse_attention_freq or"
        " layer_types"
      )
    by_flags = None
    if flags is not None:
      by_flags = ["msa" if flag else "gqa" for flag in flags]
    kinds = fields.one(
      {
        "layer_types": given,
        "sparse_attention_config.sparse_attention_freq": by_flags,
      },
      ["gqa"] * layers,
    )
    disabled = sparse.flags("sparse_disable_index_value", layers)
    if disabled is not None and any(
      kind == "msa" and not flag for kind, flag in zip(kinds, disabled)
    ):
      fields.complain(
        "sparse_attention_config.sparse_disable_index_value=0 in a sparse layer"
        " is not supported: no released model has the index-value path"
      )
    return kinds

  def _index(self, fields: Fields, num_kv_heads: int) -> IndexConfig:
    sparse = fields.part("sparse_attention_config")
    sparse.only("sparse_score_type", "max")
    sparse.only("sparse_init_block", 0, 1)
    sparse.only("sparse_init_tokens", 0)

    def indexed(new: str, old: str, default: int) -> Any:
      return fields.one(
        {new: fields.get(new), sparse.name(old): sparse.get(old)}, default
      )

    heads = indexed("index_n_heads", "sparse_num_index_heads", num_kv_heads)
    default = IndexConfig()
    if heads != num_kv_heads:
      fields.complain(
        f"index heads must be num_key_value_heads={num_kv_heads}, got {heads}"
      )
    try:
      return IndexConfig(
        **{
          name: indexed(*keys, getattr(default, name))
          for name, keys in _INDEX.items()
        },
        force_first_block=sparse.get("sparse_init_block") == 1,
      )
    except ValueError as error:
      fields.complain(f"the Index Branch's {error}")
      return IndexConfig()

  def _mlp_kinds(self, fields: Fields, layers: int, experts: bool) -> list[str]:
    names = {"dense": "dense", "sparse": "moe"}
    flags = fields.flags("moe_layer_freq", layers)
    kinds = fields.one(
      {
        "mlp_layer_types": fields.kinds("mlp_layer_types", names, layers),
        "moe_layer_freq": flags
        and ["moe" if flag else "dense" for flag in flags],
      },
      ["moe" if experts else "dense"] * layers,
    )
    first = fields.get("first_k_dense_replace")
    if first is not None and not is_integer(first):
      fields.complain(
        f"first_k_dense_replace must be an integer, got {first!r}"
      )
    elif first is not None and kinds != ["dense"] * first + ["moe"] * (
      layers - first
    ):
      fields.complain(
        f"fields disagree: first_k_dense_replace={first}, but the layers' MLPs"
        f" are {kinds}"
      )
    return kinds

  def _moe(self, fields: Fields, expert_dim: int) -> MoEConfig:
    fields.only("n_shared_experts", 0, 1)
    shared = fields.get("shared_intermediate_size", default=0)
    try:
      return MoEConfig(
        num_experts=fields.size("num_local_experts", "num_experts"),
        top_k=fields.size("num_experts_per_tok"),
        expert_dim=expert_dim,
        shared_dim=0 if fields.get("n_shared_experts") == 0 else shared,
        routed_scale=fields.number("routed_scaling_factor"),
      )
    except ValueError as error:
      fields.complain(f"the experts' {error}")
      return MoEConfig()

  def describe(self, config: ModelConfig) -> dict[str, Any]:
    index, moe = config.index, config.moe
    factor = rope_factor(config)
    described = {
      **self.identity(),
      **describe_sizes(config),
      "hidden_act": "silu",
      "swiglu_alpha": config.swiglu_alpha,
      "swiglu_limit": config.swiglu_limit,
      "rotary_dim": round(factor * config.head_dim),
      "rope_parameters": {
        **describe_rope(config.rope_theta, factor, config.rope_scaling),
        "partial_rotary_factor": factor,
      },
      "intermediate_size": config.mlp_dim,
      "dense_intermediate_size": config.mlp_dim,
      "layer_types": [
        "full_attention" if kind == "gqa" else "minimax_m3_sparse"
        for kind in config.kinds
      ],
      "mlp_layer_types": [
        "dense" if kind == "dense" else "sparse" for kind in config.mlps
      ],
    }
    if "moe" in config.mlps:
      described |= {
        "intermediate_size": moe.expert_dim,
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "shared_intermediate_size": moe.shared_dim,
        "n_shared_experts": 1 if moe.shared_dim else 0,
        "routed_scaling_factor": moe.routed_scale,
      }
    if "msa" in config.kinds:
      described["index_n_heads"] = config.num_kv_heads
      described |= {
        new: getattr(index, name) for name, (new, _) in _INDEX.items()
      }
      if index.force_first_block:
        described["sparse_attention_config"] = {"sparse_init_block": 1}
    return described
