"""Llama 3.x and models of its architecture, such as SmolLM2; Mistral."""

from __future__ import annotations

from typing import Any, ClassVar

from msa_jax.checkpoints.families.base import (
  Family,
  attention_names,
  describe_sizes,
  gated_names,
  read_sizes,
  rope_factor,
)
from msa_jax.checkpoints.fields import Fields, describe_rope, read_rope
from msa_jax.model_config import ModelConfig


class Llama(Family):
  title = "Llama"
  model_types = ("llama",)
  architectures = ("LlamaForCausalLM",)
  layouts: ClassVar = {
    "transformers": {
      **attention_names(qk_norm=False),
      **gated_names("mlp", "mlp"),
    }
  }

  def read(self, fields: Fields) -> ModelConfig:
    fields.only("hidden_act", "silu")
    fields.only("attention_bias", False)
    fields.only("mlp_bias", False)
    fields.only("rope_interleaved", False)
    self._refuse_windows(fields)
    sizes = read_sizes(fields, kv_heads=False)
    head_dim = fields.size(
      "head_dim", default=sizes["embed_dim"] // sizes["num_heads"]
    )
    options = read_rope(
      fields, head_dim, default_theta=10_000.0, partial=False, scaling=True
    )
    mlp_dim = fields.size("intermediate_size")
    if fields.problems:
      raise ValueError("the fields describe no model")
    return ModelConfig(
      **sizes, **options, head_dim=head_dim, mlp_dim=mlp_dim, qk_norm=False
    )

  def _refuse_windows(self, fields: Fields) -> None:
    """Llama has no field of windows: any that is there is unknown."""

  def describe(self, config: ModelConfig) -> dict[str, Any]:
    return {
      **self.identity(),
      **describe_sizes(config),
      "hidden_act": "silu",
      "intermediate_size": config.mlp_dim,
      "rope_parameters": describe_rope(
        config.rope_theta, rope_factor(config), config.rope_scaling
      ),
    }


class Mistral(Llama):
  title = "Mistral"
  model_types = ("mistral",)
  architectures = ("MistralForCausalLM",)

  def _refuse_windows(self, fields: Fields) -> None:
    window = fields.get("sliding_window")
    if "sliding_window" not in fields.present:
      # A missing field stands for a window: that is the class's default.
      window = 4096
    if window is not None:
      fields.complain(
        f"sliding_window={window!r}: layers with a window are not supported:"
        " only null"
      )

  def describe(self, config: ModelConfig) -> dict[str, Any]:
    return {**super().describe(config), "sliding_window": None}
