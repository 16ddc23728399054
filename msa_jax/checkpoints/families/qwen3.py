"""Qwen3 and Qwen3-MoE."""

from __future__ import annotations

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
from msa_jax.model_config import ModelConfig, MoEConfig


class Qwen3(Family):
  title = "Qwen3"
  model_types = ("qwen3",)
  architectures = ("Qwen3ForCausalLM",)
  layouts: ClassVar = {
    "transformers": {**attention_names(), **gated_names("mlp", "mlp")}
  }

  def read(self, fields: Fields) -> ModelConfig:
    fields.only("hidden_act", "silu")
    fields.only("attention_bias", False)
    fields.only("use_sliding_window", False)
    # transformers knows neither; Qwen3-Coder's folders have both.
    fields.only("qkv_bias", False)
    fields.only("use_qk_norm", True)
    # Without use_sliding_window, transformers ignores these.
    fields.read |= {"sliding_window", "max_window_layers"}
    sizes = read_sizes(fields)
    head_dim = fields.size("head_dim")
    options = read_rope(
      fields, head_dim, default_theta=None, partial=False, scaling=True
    )
    fields.kinds("layer_types", {"full_attention": "gqa"}, sizes["num_layers"])
    options |= self._mlp(fields, sizes["num_layers"])
    if fields.problems:
      raise ValueError("the fields describe no model")
    return ModelConfig(**sizes, **options, head_dim=head_dim, qk_norm=True)

  def _mlp(self, fields: Fields, layers: int) -> dict[str, Any]:
    del layers
    return {"mlp_dim": fields.size("intermediate_size")}

  def describe(self, config: ModelConfig) -> dict[str, Any]:
    return {
      **self.identity(),
      **describe_sizes(config),
      "hidden_act": "silu",
      "attention_bias": False,
      "use_sliding_window": False,
      "sliding_window": None,
      "intermediate_size": config.mlp_dim,
      "rope_parameters": describe_rope(
        config.rope_theta, rope_factor(config), config.rope_scaling
      ),
    }


class Qwen3MoE(Qwen3):
  title = "Qwen3-MoE"
  model_types = ("qwen3_moe",)
  architectures = ("Qwen3MoeForCausalLM",)
  layouts: ClassVar = {
    "transformers": {
      **attention_names(),
      **gated_names("mlp", "mlp"),
      **expert_names("mlp", ("gate_proj", "up_proj", "down_proj")),
      "mlp.router": Name("model.layers.{}.mlp.gate.weight", "into"),
    },
    "stacked": {
      **attention_names(),
      **gated_names("mlp", "mlp"),
      **stacked_expert_names(),
    },
  }

  def _mlp(self, fields: Fields, layers: int) -> dict[str, Any]:
    fields.only("shared_expert_intermediate_size", 0)
    dense = fields.get("mlp_only_layers", default=[])
    every = fields.size("decoder_sparse_step", default=1)
    if not isinstance(dense, list) or not all(map(is_integer, dense)):
      fields.complain(
        f"mlp_only_layers must be a list of integers, got {dense!r}"
      )
      dense = []
    try:
      moe = MoEConfig(
        num_experts=fields.size("num_experts", "num_local_experts"),
        top_k=fields.size("num_experts_per_tok"),
        expert_dim=fields.size("moe_intermediate_size"),
        router="softmax",
        normalize_weights=fields.flag("norm_topk_prob", False),
      )
    except ValueError as error:
      fields.complain(f"the experts' {error}")
      moe = MoEConfig()
    return {
      "mlp_dim": fields.size("intermediate_size"),
      "mlp_kinds": tuple(
        "dense" if layer in dense or (layer + 1) % every else "moe"
        for layer in range(layers)
      ),
      "moe": moe,
    }

  def describe(self, config: ModelConfig) -> dict[str, Any]:
    moe = config.moe
    return {
      **super().describe(config),
      "num_experts": moe.num_experts,
      "num_experts_per_tok": moe.top_k,
      "moe_intermediate_size": moe.expert_dim,
      "norm_topk_prob": moe.normalize_weights,
      "decoder_sparse_step": 1,
      "mlp_only_layers": [
        layer for layer, kind in enumerate(config.mlps) if kind == "dense"
      ],
    }
