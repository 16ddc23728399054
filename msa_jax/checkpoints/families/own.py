"""Models that no other family has, such as Qwen3 with an Index Branch.

The fields are those of `msa_jax.ModelConfig`, and the model_type is this
package's own, so that no other program takes the model for something else.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from msa_jax.checkpoints.families.base import (
  OPTIONS,
  Family,
  Name,
  attention_names,
  expert_names,
  gated_names,
)
from msa_jax.checkpoints.fields import Fields
from msa_jax.layers import RopeScaling
from msa_jax.model_config import IndexConfig, ModelConfig, MoEConfig

# `load` and `save` handle these themselves.
_LEFT_OUT = {*OPTIONS, "dtype", "param_dtype"}
_PARTS = {"index": IndexConfig, "moe": MoEConfig, "rope_scaling": RopeScaling}
_LAYER = "model.layers.{}."


class Own(Family):
  title = "msa_jax"
  model_types = ("msa_jax",)
  architectures = ("MSAJaxDecoderLM",)
  layouts: ClassVar = {
    "msa_jax": {
      **attention_names(
        ("index_q_proj", "index_k_proj", "index_q_norm", "index_k_norm")
      ),
      "attention.index_value.kernel": Name(
        f"{_LAYER}self_attn.index_v_proj.weight", "into"
      ),
      "attention.index_out.kernel": Name(
        f"{_LAYER}self_attn.index_o_proj.weight", "out_of"
      ),
      **gated_names("mlp", "mlp"),
      **gated_names("mlp.shared_experts", "mlp.shared"),
      **expert_names("mlp", ("gate_proj", "up_proj", "down_proj")),
      "mlp.router": Name(f"{_LAYER}mlp.gate.weight", "into"),
      "mlp.choice_bias": Name(f"{_LAYER}mlp.e_score_correction_bias", "same"),
    }
  }

  def read(self, fields: Fields) -> ModelConfig:
    model = fields.part("model")
    # An earlier folder's field, which the parameters' shapes repeat.
    known = {field.name for field in dataclasses.fields(ModelConfig)}
    model.read |= known - _LEFT_OUT
    values: dict[str, Any] = {
      name: tuple(value) if isinstance(value, list) else value
      for name, value in model.values.items()
      if name in model.read
    }
    try:
      for name, part in _PARTS.items():
        if name in values:
          values[name] = part(**values[name])
      return ModelConfig(**values)
    except (TypeError, ValueError) as error:
      fields.complain(f"model: {error}")
      raise ValueError("the fields describe no model") from None

  def describe(self, config: ModelConfig) -> dict[str, Any]:
    model = dataclasses.asdict(config)
    return {
      **self.identity(),
      "model": {k: v for k, v in model.items() if k not in _LEFT_OUT},
    }
