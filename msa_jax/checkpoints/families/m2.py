"""The MiniMax-M2 series: M2, M2.1, M2.5 and M2.7.

Every layer has full attention and experts, without a shared one. The norms of q
and k go over the whole projection, also where only model_type says so.
"""

from __future__ import annotations

from typing import Any, ClassVar

from msa_jax.checkpoints.families.base import (
  Family,
  Name,
  attention_names,
  describe_sizes,
  expert_names,
  read_sizes,
  rope_factor,
  stacked_expert_names,
)
from msa_jax.checkpoints.fields import Fields, describe_rope, read_rope
from msa_jax.model_config import ModelConfig, MoEConfig

_MOE = "model.layers.{}.block_sparse_moe."


class M2(Family):
  title = "MiniMax-M2"
  model_types = ("minimax_m2",)
  architectures = ("MiniMaxM2ForCausalLM",)
  layouts: ClassVar = {
    "released": {
      **attention_names(),
      **expert_names("block_sparse_moe", ("w1", "w3", "w2")),
      "mlp.router": Name(f"{_MOE}gate.weight", "into"),
      "mlp.choice_bias": Name(f"{_MOE}e_score_correction_bias", "same"),
    },
    "stacked": {
      **attention_names(),
      **stacked_expert_names(),
      "mlp.choice_bias": Name(
        "model.layers.{}.mlp.e_score_correction_bias", "same"
      ),
    },
  }

  def read(self, fields: Fields) -> ModelConfig:
    for key, *allowed in (
      ("attention_bias", False),
      ("attn_window_size", 0),
      ("hidden_act", "silu"),
      ("layernorm_full_attention_beta", 1, 1.0),
      ("layernorm_linear_attention_beta", 1, 1.0),
      ("layernorm_mlp_beta", 1, 1.0),
      ("n_group", 1),
      ("n_shared_experts", 0),
      ("norm_topk_prob", True),
      ("qk_norm_type", "per_layer"),
      ("routed_scaling_factor", 1, 1.0),
      ("scoring_func", "sigmoid"),
      ("shared_intermediate_size", 0),
      ("sliding_window", 0),
      ("topk_group", 1),
      ("use_gemma_norm", False),
      ("use_qk_norm", True),
      ("use_routing_bias", True),
    ):
      fields.only(key, *allowed)
    # No layer has a dense MLP, and there is no shared expert to mix in.
    fields.read |= {"mlp_intermediate_size", "shared_moe_mode"}
    sizes = read_sizes(fields)
    layers = sizes["num_layers"]
    kinds = fields.flags("attn_type_list", layers)
    if kinds is not None and not all(kinds):
      fields.complain(
        "attn_type_list with 0 is not supported: only layers of full attention"
      )
    fields.kinds("layer_types", {"full_attention": "gqa"}, layers)
    head_dim = fields.size("head_dim")
    options = read_rope(
      fields, head_dim, default_theta=5e6, partial=True, scaling=False
    )
    expert_dim = fields.size("intermediate_size")
    try:
      options["moe"] = MoEConfig(
        num_experts=fields.size("num_local_experts", "num_experts"),
        top_k=fields.size("num_experts_per_tok"),
        expert_dim=expert_dim,
      )
    except ValueError as error:
      fields.complain(f"the experts' {error}")
    if fields.problems:
      raise ValueError("the fields describe no model")
    return ModelConfig(
      **sizes,
      **options,
      head_dim=head_dim,
      mlp_dim=expert_dim,
      mlp_kinds=("moe",),
      qk_norm_over="projection",
    )

  def describe(self, config: ModelConfig) -> dict[str, Any]:
    moe, factor = config.moe, rope_factor(config)
    return {
      **self.identity(),
      **describe_sizes(config),
      "hidden_act": "silu",
      "intermediate_size": moe.expert_dim,
      "num_local_experts": moe.num_experts,
      "num_experts_per_tok": moe.top_k,
      "qk_norm_type": "per_layer",
      "use_qk_norm": True,
      "scoring_func": "sigmoid",
      "use_routing_bias": True,
      "shared_intermediate_size": 0,
      "rotary_dim": round(factor * config.head_dim),
      "rope_parameters": {
        **describe_rope(config.rope_theta, factor, config.rope_scaling),
        "partial_rotary_factor": factor,
      },
    }
