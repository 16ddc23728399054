"""config.json of MiniMax-M3 text models, under its newer and its older keys."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from msa_jax.checkpoints.tensor_files import DTYPES
from msa_jax.checks import is_integer
from msa_jax.model_config import IndexConfig, ModelConfig, MoEConfig


def read_config(folder: str | os.PathLike) -> ModelConfig:
  """The model that a folder's config.json describes.

  Raises:
    ValueError: the file is missing, contradicts itself or describes a model
      that is not supported; the text names each field.
  """
  path, whole = _read(folder)
  reader = _Fields(whole)
  try:
    config = reader.model()
  except (ValueError, TypeError, KeyError) as error:
    # The problems listed so far explain the error better than its own text.
    if not reader.problems:
      raise ValueError(f"{path}: {error}") from None
    config = None
  if reader.problems or config is None:
    raise ValueError(f"{path}:\n  " + "\n  ".join(reader.problems))
  return config


def read_text_fields(folder: str | os.PathLike) -> dict[str, Any]:
  """The text model's fields of a folder's config.json, in one flat object.

  The fields of the vision part and of multi-token prediction are left out, and
  so is auto_map, which names files of code.

  Raises:
    ValueError: the file is missing or holds no JSON object.
  """
  _, whole = _read(folder)
  inner = whole.get("text_config")
  fields = dict(whole)
  if isinstance(inner, Mapping):
    ids = {key: whole[key] for key in _TOKENS if whole.get(key) is not None}
    outer = {key: whole[key] for key in _OUTER if key in whole}
    fields = {**outer, **inner, **ids}
    # Dropped: these fields name the series, and other series share this text
    # model.
    fields = {key: v for key, v in fields.items() if key not in _IDENTITY}
  return {
    key: value
    for key, value in fields.items()
    if key != "auto_map" and "mtp" not in key
  }


def _read(folder: str | os.PathLike) -> tuple[pathlib.Path, dict[str, Any]]:
  path = pathlib.Path(folder) / "config.json"
  try:
    whole = json.loads(path.read_text())
  except (OSError, ValueError) as error:
    raise ValueError(f"{path} cannot be read: {error}") from None
  if not isinstance(whole, dict):
    raise ValueError(f"{path}: wanted a JSON object, got {whole!r}")
  return path, whole


_IDENTITY = ("architectures", "model_type")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_OUTER = ("max_position_embeddings", "tie_word_embeddings")
_DTYPES = ("dtype", "torch_dtype")
# Keys that `_Fields` reads, but that `config_json` writes under another name.
_OTHER_KEYS = (
  "mlp_intermediate_size",
  "moe_layer_freq",
  "num_experts",
  "partial_rotary_factor",
  "rope_theta",
  "sparse_attention_config",
  "torch_dtype",
)
# Keys that `config_json` writes for some models only.
_SOMETIMES = (
  "swiglu_alpha",
  "swiglu_limit",
  "num_local_experts",
  "num_experts_per_tok",
  "shared_intermediate_size",
  "n_shared_experts",
  "routed_scaling_factor",
  "index_n_heads",
  "index_head_dim",
  "index_block_size",
  "index_topk_blocks",
  "index_local_blocks",
)


class _Fields:
  """Reads a config's fields under any of their keys, and lists all problems."""

  def __init__(self, whole: Mapping[str, Any]):
    self.problems: list[str] = []
    self.fields = whole
    self.fields = {**whole, **self.part("text_config")}
    self.sparse = self.part("sparse_attention_config")
    self.rope = self.part("rope_parameters")

  def part(self, key: str) -> Mapping[str, Any]:
    """The fields of an object inside the config; empty if it is missing."""
    value = self.fields.get(key)
    if value is None or isinstance(value, Mapping):
      return value or {}
    self.problems.append(f"{key} must be an object, got {value!r}")
    return {}

  def one(self, values: Mapping[str, Any], default: Any = None) -> Any:
    """The one value that several keys hold; a problem if they disagree."""
    there = {key: v for key, v in values.items() if v is not None}
    first = next(iter(there.values()), default)
    if any(value != first for value in there.values()):
      text = ", ".join(f"{key}={value!r}" for key, value in there.items())
      self.problems.append(f"fields disagree: {text}")
    return first

  def get(self, *keys: str, default: Any = None) -> Any:
    return self.one({key: self.fields.get(key) for key in keys}, default)

  def need(self, *keys: str) -> Any:
    value = self.get(*keys)
    if value is None:
      self.problems.append(f"field missing: {' or '.join(keys)}")
    return value

  def size(self, *keys: str, default: Any = None) -> Any:
    """The value of a field that must be an integer of at least 1."""
    name = " or ".join(keys)
    value = self.need(*keys) if default is None else self.get(*keys)
    if value is None:
      return default
    if not is_integer(value) or value < 1:
      self.problems.append(
        f"{name} must be an integer of at least 1, got {value!r}"
      )
    return value

  def indexed(self, new: str, old: str, default: Any = None) -> Any:
    """A field of the Index Branch, under its newer or its older key."""
    name = f"sparse_attention_config.{old}"
    return self.one(
      {new: self.fields.get(new), name: self.sparse.get(old)}, default
    )

  def refuse(self, where: str, value: Any, *allowed: Any) -> None:
    if value not in (None, *allowed):
      wanted = " or ".join(map(repr, allowed))
      self.problems.append(f"{where}={value!r} is not supported: only {wanted}")

  def kinds(
    self, key: str, names: Mapping[str, str], old: str, flags: Any, default: str
  ) -> tuple[Any, ...]:
    """The kind of each layer, from newer keys' names or older keys' flags."""
    count = self.fields.get("num_hidden_layers") or 1
    given = self.fields.get(key)
    values = {}
    if given is not None:
      unknown = sorted({str(name) for name in given} - set(names))
      if unknown:
        self.problems.append(
          f"{key}: unknown {unknown}, wanted {sorted(names)}"
        )
      values[key] = [names.get(name) for name in given]
    if flags is not None:
      kinds = list(names.values())
      values[old] = [kinds[bool(flag)] for flag in flags]
    for name, value in values.items():
      if len(value) != count:
        self.problems.append(
          f"{name} has {len(value)} entries, num_hidden_layers={count}"
        )
    return tuple(self.one(values, [default] * count))

  def rope_dim(self, head_dim: int) -> int:
    """Rotary dims, from partial_rotary_factor or rotary_dim.

    transformers reads the factor, other libraries rotary_dim; both may be
    there, and must then agree.
    """
    rotary = self.get("rotary_dim")
    factor = self.one(
      {
        "partial_rotary_factor": self.get("partial_rotary_factor"),
        "rope_parameters.partial_rotary_factor": self.rope.get(
          "partial_rotary_factor"
        ),
      }
    )
    if factor is not None and not isinstance(factor, (int, float)):
      self.problems.append(
        f"partial_rotary_factor must be a number, got {factor!r}"
      )
    if self.problems:
      return 0
    by_factor = None if factor is None else round(head_dim * factor)
    if None not in (rotary, by_factor) and rotary != by_factor:
      self.problems.append(
        f"fields disagree: rotary_dim={rotary}, but partial_rotary_factor="
        f"{factor} of head_dim={head_dim} is {by_factor}"
      )
    return next((x for x in (rotary, by_factor) if x is not None), head_dim)

  def model(self) -> ModelConfig:
    self.refuse_others()
    sizes: dict[str, Any] = {
      "vocab_size": self.size("vocab_size"),
      "num_layers": self.size("num_hidden_layers"),
      "embed_dim": self.size("hidden_size"),
      "num_heads": self.size("num_attention_heads"),
      "num_kv_heads": self.size("num_key_value_heads"),
    }
    experts = self.get("num_local_experts", "num_experts", default=0)
    expert_dim = self.size("intermediate_size")
    if self.problems:
      raise ValueError("incomplete")
    head_dim = self.size(
      "head_dim", default=sizes["embed_dim"] // sizes["num_heads"]
    )
    rope_dim = self.rope_dim(head_dim)
    if self.problems:
      raise ValueError("incomplete")
    oai: dict[str, Any] = {
      name: float(self.get(name))
      for name in ("swiglu_alpha", "swiglu_limit")
      if self.get(name) is not None
    }
    # transformers writes hidden_act "silu" beside these fields, so the fields
    # decide the activation.
    is_oai = bool(oai) or self.get("hidden_act") == "swigluoai"
    options: dict[str, Any] = {}
    layer_kinds = self.kinds(
      "layer_types",
      {"full_attention": "gqa", "minimax_m3_sparse": "msa"},
      "sparse_attention_config.sparse_attention_freq",
      self.sparse_flags(),
      "gqa",
    )
    if "msa" in layer_kinds:
      options["index"] = self.index(sizes["num_kv_heads"])
    mlp_kinds = self.kinds(
      "mlp_layer_types",
      {"dense": "dense", "sparse": "moe"},
      "moe_layer_freq",
      self.fields.get("moe_layer_freq"),
      "moe" if experts else "dense",
    )
    if "moe" in mlp_kinds:
      shared = self.get("shared_intermediate_size", default=0)
      options["moe"] = MoEConfig(
        num_experts=experts,
        top_k=self.need("num_experts_per_tok"),
        expert_dim=expert_dim,
        shared_dim=0 if self.get("n_shared_experts") == 0 else shared,
        routed_scale=float(self.get("routed_scaling_factor", default=1.0)),
      )
    rope_theta = self.one(
      {
        "rope_theta": self.fields.get("rope_theta"),
        "rope_parameters.rope_theta": self.rope.get("rope_theta"),
      },
      10_000.0,
    )
    return ModelConfig(
      **sizes,
      **options,
      **oai,
      head_dim=head_dim,
      mlp_dim=self.get(
        "dense_intermediate_size", "mlp_intermediate_size", default=expert_dim
      ),
      layer_kinds=layer_kinds,
      mlp_kinds=mlp_kinds,
      activation="swiglu_oai" if is_oai else "swiglu",
      rope_dim=rope_dim,
      rope_theta=float(rope_theta),
      qk_norm=self.get("use_qk_norm", default=True),
      norm_eps=self.get("rms_norm_eps", default=1e-6),
      # Only the M3 series has zero-centred norms. Its newer configs have no
      # field for them, but it is also the only one with this activation.
      zero_centered_norm=self.get("use_gemma_norm", default=is_oai),
      tie_embeddings=self.get("tie_word_embeddings", default=False),
    )

  def sparse_flags(self) -> Any:
    if not self.sparse.get("use_sparse_attention", True):
      return [0] * self.fields["num_hidden_layers"]
    return self.sparse.get("sparse_attention_freq")

  def index(self, num_kv_heads: int) -> IndexConfig:
    heads = self.indexed("index_n_heads", "sparse_num_index_heads")
    if heads not in (None, num_kv_heads):
      self.problems.append(
        f"index heads must be num_key_value_heads={num_kv_heads}, got {heads}"
      )
    return IndexConfig(
      index_dim=self.indexed("index_head_dim", "sparse_index_dim", 128),
      block_size=self.indexed("index_block_size", "sparse_block_size", 128),
      top_k=self.indexed("index_topk_blocks", "sparse_topk_blocks", 16),
      num_local_blocks=self.indexed(
        "index_local_blocks", "sparse_local_block", 1
      ),
    )

  def refuse_others(self) -> None:
    """Lists the fields whose values describe a model that is not supported."""
    quantised = self.get("quantization_config")
    if quantised is not None:
      method = quantised
      if isinstance(quantised, Mapping):
        method = quantised.get("quant_method", quantised)
      self.problems.append(
        f"quantization_config ({method}): quantised weights are not supported,"
        f" only {sorted(dtype.name for dtype in DTYPES.values())}"
      )
    for key, *allowed in (
      ("hidden_act", "silu", "swigluoai"),
      ("scoring_func", "sigmoid"),
      ("use_routing_bias", True),
      ("qk_norm_type", "per_head"),
      ("attention_bias", False),
      ("n_shared_experts", 0, 1),
      ("sliding_window", 0),
    ):
      self.refuse(key, self.fields.get(key), *allowed)
    self.refuse(
      "rope_parameters.rope_type", self.rope.get("rope_type"), "default"
    )
    scaling = self.part("rope_scaling")
    self.refuse(
      "rope_scaling.rope_type",
      scaling.get("rope_type", scaling.get("type")),
      "default",
    )
    for key, allowed in (
      ("sparse_score_type", "max"),
      ("sparse_init_block", 0),
    ):
      name = f"sparse_attention_config.{key}"
      self.refuse(name, self.sparse.get(key), allowed)


def config_json(
  config: ModelConfig, origin: Mapping[str, Any] | None = None
) -> dict[str, Any]:
  """The fields that `read_config` reads as this model.

  Args:
    config: config of the model.
    origin: `read_text_fields` of the checkpoint that the model comes from. If
      it still describes the model, it is returned as it is, but for the dtype.
      If the model has changed, all fields that describe it are written anew
      under transformers' keys, and the other fields are kept.
  """
  own = _described(config)
  if not origin:
    return own
  before = dataclasses.replace(
    _Fields(origin).model(), param_dtype=config.param_dtype
  )
  if own != _described(before):
    drop = {*own, *_OTHER_KEYS, *_SOMETIMES}
    return own | {k: v for k, v in origin.items() if k not in drop}
  dtypes = {
    key: config.param_dtype for key in _DTYPES if origin.get(key) is not None
  }
  identity = {key: own[key] for key in _IDENTITY}
  return {**identity, **origin, **dtypes}


def _described(config: ModelConfig) -> dict[str, Any]:
  """All fields that describe a model, under transformers' keys."""
  index, moe = config.index, config.moe
  rope_dim = config.head_dim if config.rope_dim is None else config.rope_dim
  fields: dict[str, Any] = {
    "architectures": ["MiniMaxM3VLForCausalLM"],
    "model_type": "minimax_m3_vl_text",
    "dtype": config.param_dtype,
    "vocab_size": config.vocab_size,
    "hidden_size": config.embed_dim,
    "num_hidden_layers": config.num_layers,
    "num_attention_heads": config.num_heads,
    "num_key_value_heads": config.num_kv_heads,
    "head_dim": config.head_dim,
    "rms_norm_eps": config.norm_eps,
    "use_gemma_norm": config.zero_centered_norm,
    "use_qk_norm": config.qk_norm,
    "tie_word_embeddings": config.tie_embeddings,
    "hidden_act": "silu",
    "rotary_dim": rope_dim,
    "rope_parameters": {
      "rope_type": "default",
      "rope_theta": config.rope_theta,
      "partial_rotary_factor": rope_dim / config.head_dim,
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
  if config.activation == "swiglu_oai":
    fields |= {
      "swiglu_alpha": config.swiglu_alpha,
      "swiglu_limit": config.swiglu_limit,
    }
  if "moe" in config.mlps:
    fields |= {
      "intermediate_size": moe.expert_dim,
      "num_local_experts": moe.num_experts,
      "num_experts_per_tok": moe.top_k,
      "shared_intermediate_size": moe.shared_dim,
      "n_shared_experts": 1 if moe.shared_dim else 0,
      "routed_scaling_factor": moe.routed_scale,
    }
  if "msa" in config.kinds:
    fields |= {
      "index_n_heads": config.num_kv_heads,
      "index_head_dim": index.index_dim,
      "index_block_size": index.block_size,
      "index_topk_blocks": index.top_k,
      "index_local_blocks": index.num_local_blocks,
    }
  return fields
