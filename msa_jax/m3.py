"""Checkpoints of the MiniMax-M3 text model, and of its M2-style relatives.

A checkpoint is a folder with config.json and safetensors files (8 bytes of
header length, a JSON header, raw tensors), with an index file where they are
several. `load` gives a `DecoderLM`, `save` writes one back under the same
names. Vision and multi-token-prediction tensors are named and skipped.

python -m msa_jax.m3 show FOLDER
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import functools
import itertools
import json
import logging
import math
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from msa_jax.attention import Sharding
from msa_jax.model import (
  DecoderLM,
  IndexConfig,
  ModelConfig,
  MoEConfig,
  group_sizes,
  is_index_param,
)

PAPER_10B = ModelConfig(
  vocab_size=200_000,
  num_layers=16,
  embed_dim=2048,
  num_heads=32,
  num_kv_heads=4,
  head_dim=128,
  mlp_dim=1536,
  layer_kinds=("msa",),
  mlp_kinds=("moe",),
  moe=MoEConfig(num_experts=64, top_k=4, expert_dim=1536, shared_dim=1536),
  rope_dim=64,
  scan_layers=True,
  dtype="bfloat16",
  param_dtype="bfloat16",
)
"""The paper's model (arXiv 2606.13392): 10.53B parameters, 1.47B active."""

M3 = ModelConfig(
  vocab_size=200_064,
  num_layers=60,
  embed_dim=6144,
  num_heads=64,
  num_kv_heads=4,
  head_dim=128,
  mlp_dim=12_288,
  layer_kinds=("gqa",) * 3 + ("msa",),
  mlp_kinds=("dense",) * 3 + ("moe",),
  moe=MoEConfig(
    num_experts=128,
    top_k=4,
    expert_dim=3072,
    shared_dim=3072,
    routed_scale=2.0,
  ),
  activation="swiglu_oai",
  rope_dim=64,
  rope_theta=5e6,
  zero_centered_norm=True,
  tie_embeddings=False,
  scan_layers=True,
  dtype="bfloat16",
  param_dtype="bfloat16",
)
"""The released MiniMax-M3: 428B parameters, 23B active."""

_INDEX_FILE = "model.safetensors.index.json"
_SINGLE_FILE = "model.safetensors"
_PREFIX = "language_model."
_SKIPPED = ("vision_tower", "multi_modal_projector", "patch_merge_mlp", "mtp")
_DTYPES = {
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
}
# What changes how a model is computed, not what.
_OPTIONS = ("implementation", "gqa_implementation", "remat", "scan_layers")


# ---------------------------------------------------------------- counts


class ParameterCounts(NamedTuple):
  """How many parameters a model has.

  Attributes:
    total: all of them.
    active: those that a token goes through, without the Index Branch (the
      paper's way to count): all but the experts that it is not sent to.
    embedding: token embedding and output projection, part of both.
    index: the Index Branch, part of total.
  """

  total: int
  active: int
  embedding: int
  index: int


def count_parameters(config: ModelConfig) -> ParameterCounts:
  """Counts from shapes alone; nothing is allocated."""
  total = routed = embedding = index = 0
  for path, leaf in _abstract(config, None)[1].items():
    size = math.prod(leaf.shape)
    total += size
    index += size * is_index_param(path)
    embedding += size * (path[0] in ("embed", "head"))
    routed += size * (_rest(path) in _EXPERTS)
  idle = routed * (config.moe.num_experts - config.moe.top_k)
  active = total - index - idle // config.moe.num_experts
  return ParameterCounts(total, active, embedding, index)


# --------------------------------------------------- names and layouts

# Parameter of a layer, name in the checkpoint, layout (see _Layout).
_ATTENTION = {
  "attention_norm.scale": ("input_layernorm.weight", "same"),
  "attention.query.kernel": ("self_attn.q_proj.weight", "into"),
  "attention.key.kernel": ("self_attn.k_proj.weight", "into"),
  "attention.value.kernel": ("self_attn.v_proj.weight", "into"),
  "attention.out.kernel": ("self_attn.o_proj.weight", "out_of"),
  "attention.query_norm.scale": ("self_attn.q_norm.weight", "same"),
  "attention.key_norm.scale": ("self_attn.k_norm.weight", "same"),
  "attention.index_query.kernel": ("self_attn.index_q_proj.weight", "into"),
  "attention.index_key.kernel": ("self_attn.index_k_proj.weight", "into"),
  "attention.index_query_norm.scale": ("self_attn.index_q_norm.weight", "same"),
  "attention.index_key_norm.scale": ("self_attn.index_k_norm.weight", "same"),
  "mlp_norm.scale": ("post_attention_layernorm.weight", "same"),
}
_EXPERTS = {
  "mlp.gate": ("block_sparse_moe.experts.{}.w1.weight", "into"),
  "mlp.up": ("block_sparse_moe.experts.{}.w3.weight", "into"),
  "mlp.down": ("block_sparse_moe.experts.{}.w2.weight", "into"),
}
_SHARED = "block_sparse_moe.shared_experts."
_LAYER = {
  **_ATTENTION,
  **_EXPERTS,
  "mlp.gate.kernel": ("mlp.gate_proj.weight", "into"),
  "mlp.up.kernel": ("mlp.up_proj.weight", "into"),
  "mlp.down.kernel": ("mlp.down_proj.weight", "into"),
  "mlp.router": ("block_sparse_moe.gate.weight", "into"),
  "mlp.choice_bias": ("block_sparse_moe.e_score_correction_bias", "same"),
  "mlp.shared.gate.kernel": (f"{_SHARED}gate_proj.weight", "into"),
  "mlp.shared.up.kernel": (f"{_SHARED}up_proj.weight", "into"),
  "mlp.shared.down.kernel": (f"{_SHARED}down_proj.weight", "into"),
}
_ENDS = {
  "embed.embedding": ("model.embed_tokens.weight", "same"),
  "norm.scale": ("model.norm.weight", "same"),
  "head.kernel": ("lm_head.weight", "into"),
}
# Rounding these changes which experts are chosen: `dtype` leaves them alone.
_ROUTERS = ("mlp.router", "mlp.choice_bias")


@dataclasses.dataclass(frozen=True)
class _Layout:
  """How one tensor of a checkpoint lies in a parameter.

  A checkpoint's matrices are [outputs, inputs]. "same": no change. "into": the
  parameter is [inputs, *outputs]; "out_of": [*inputs, outputs]. The tensor
  reshaped to `split` and then transposed by `axes` is the parameter.
  """

  tensor: tuple[int, ...]
  split: tuple[int, ...]
  axes: tuple[int, ...]

  @classmethod
  def make(cls, kind: str, shape: tuple[int, ...]) -> _Layout:
    if kind == "same":
      return cls(shape, shape, tuple(range(len(shape))))
    last = len(shape) - 1
    if kind == "into":
      rest, one = shape[1:], shape[0]
      return cls((math.prod(rest), one), (*rest, one), (last, *range(last)))
    rest, one = shape[:-1], shape[-1]
    return cls((one, math.prod(rest)), (one, *rest), (*range(1, last + 1), 0))

  def source(self, index: Sequence[slice]) -> tuple[slice, ...]:
    """Where a slice of the parameter lies in the tensor reshaped to split."""
    place: list[Any] = [slice(None)] * len(self.axes)
    for axis, part in zip(self.axes, index):
      place[axis] = part
    return tuple(place)


@dataclasses.dataclass(frozen=True)
class _Leaf:
  """A parameter, and the tensors that lie at its leading indices."""

  path: tuple
  shape: tuple[int, ...]
  names: dict[tuple[int, ...], str]
  layout: _Layout

  @property
  def keeps_dtype(self) -> bool:
    return _rest(self.path) in _ROUTERS


def _rest(path: tuple) -> str:
  """Dotted name of a parameter, inside its layer if it is of one."""
  return ".".join(map(str, path[2:] if path[0] == "layers" else path))


def _abstract(config: ModelConfig, sharding: Sharding | None):
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


def _leaves(config: ModelConfig, shapes: Mapping[tuple, Any]) -> list[_Leaf]:
  """Every parameter of a model, with the names of its tensors."""
  sizes = group_sizes(config)
  firsts = [0, *itertools.accumulate(sizes)]
  leaves = []
  for path, leaf in shapes.items():
    rest, lead, first = _rest(path), (), 0
    if path[0] != "layers":
      name, kind = _ENDS[rest]
    else:
      name, kind = _LAYER[rest]
      name = f"model.layers.{{}}.{name}"
      first = firsts[path[1]]
      if config.scan_layers:
        lead = (sizes[path[1]],)
    if rest in _EXPERTS:
      lead = (*lead, config.moe.num_experts)
    names = {}
    for at in np.ndindex(lead):
      layer, expert = first, at
      if path[0] == "layers" and config.scan_layers:
        layer, expert = first + at[0], at[1:]
      names[at] = name.format(layer, *expert)
    layout = _Layout.make(kind, tuple(leaf.shape[len(lead) :]))
    leaves.append(_Leaf(path, tuple(leaf.shape), names, layout))
  return leaves


# ---------------------------------------------------------------- config


def read_config(folder: str | os.PathLike) -> ModelConfig:
  """The model that a folder's config.json describes.

  Raises:
    ValueError: the file is missing, contradicts itself or describes a model
      that is none of ours; the text names each field.
  """
  path = pathlib.Path(folder) / "config.json"
  try:
    whole = json.loads(path.read_text())
  except (OSError, ValueError) as error:
    raise ValueError(f"{path} cannot be read: {error}") from None
  if not isinstance(whole, dict):
    raise ValueError(f"{path}: wanted a JSON object, got {whole!r}")
  text = whole.get("text_config")
  fields = whole if text is None else {**whole, **text}
  reader = _Fields(fields)
  try:
    config = reader.model()
  except (ValueError, TypeError, KeyError) as error:
    # Problems found before say more.
    if not reader.problems:
      raise ValueError(f"{path}: {error}") from None
    config = None
  if reader.problems or config is None:
    raise ValueError(f"{path}:\n  " + "\n  ".join(reader.problems))
  return config


class _Fields:
  """Reads a config's fields, whatever key they are under; lists problems."""

  def __init__(self, fields: Mapping[str, Any]):
    self.fields = fields
    self.sparse = fields.get("sparse_attention_config") or {}
    self.rope = fields.get("rope_parameters") or {}
    self.problems: list[str] = []

  def one(self, values: Mapping[str, Any], default: Any = None) -> Any:
    """The value that all keys which have one agree on."""
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

  def indexed(self, new: str, old: str, default: Any = None) -> Any:
    """A setting of the Index Branch, under its new or its older key."""
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
    """A kind for each layer, from names or the older 0s and 1s."""
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
    """Rotary dims: transformers reads the factor, others rotary_dim."""
    rotary = self.get("rotary_dim")
    factor = self.one(
      {
        "partial_rotary_factor": self.get("partial_rotary_factor"),
        "rope_parameters.partial_rotary_factor": self.rope.get(
          "partial_rotary_factor"
        ),
      }
    )
    by_factor = None if factor is None else round(head_dim * factor)
    if None not in (rotary, by_factor) and rotary != by_factor:
      self.problems.append(
        f"fields disagree: rotary_dim={rotary}, but partial_rotary_factor="
        f"{factor} of head_dim={head_dim} is {by_factor}"
      )
    return next((x for x in (rotary, by_factor) if x is not None), head_dim)

  def model(self) -> ModelConfig:
    self.refuse_others()
    sizes = {
      "vocab_size": self.need("vocab_size"),
      "num_layers": self.need("num_hidden_layers"),
      "embed_dim": self.need("hidden_size"),
      "num_heads": self.need("num_attention_heads"),
      "num_kv_heads": self.need("num_key_value_heads"),
    }
    experts = self.get("num_local_experts", "num_experts", default=0)
    expert_dim = self.need("intermediate_size")
    if self.problems:
      raise ValueError("incomplete")
    head_dim = self.get(
      "head_dim", default=sizes["embed_dim"] // sizes["num_heads"]
    )
    oai = {
      name: self.get(name)
      for name in ("swiglu_alpha", "swiglu_limit")
      if self.get(name) is not None
    }
    # transformers writes "silu" beside these fields: they decide.
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
      **{name: float(value) for name, value in oai.items()},
      head_dim=head_dim,
      mlp_dim=self.get(
        "dense_intermediate_size", "mlp_intermediate_size", default=expert_dim
      ),
      layer_kinds=layer_kinds,
      mlp_kinds=mlp_kinds,
      activation="swiglu_oai" if is_oai else "swiglu",
      rope_dim=self.rope_dim(head_dim),
      rope_theta=float(rope_theta),
      qk_norm=self.get("use_qk_norm", default=True),
      norm_eps=self.get("rms_norm_eps", default=1e-6),
      # The M3 series alone has both; no field of its newer configs says so.
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
    """Lists what changes the model and is not supported."""
    quantised = self.get("quantization_config")
    if quantised is not None:
      method = quantised.get("quant_method", quantised)
      self.problems.append(
        f"quantization_config ({method}): quantised weights are not supported,"
        f" only {sorted(map(str, _DTYPES.values()))}"
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
    scaling = self.fields.get("rope_scaling") or {}
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


def _config_json(config: ModelConfig, dtype: str) -> dict[str, Any]:
  """What `read_config` reads as this model, under transformers' keys."""
  index, moe = config.index, config.moe
  rope_dim = config.head_dim if config.rope_dim is None else config.rope_dim
  fields: dict[str, Any] = {
    "architectures": ["MiniMaxM3VLForCausalLM"],
    "model_type": "minimax_m3_vl_text",
    "dtype": dtype,
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


# ----------------------------------------------------------------- files


class _Tensor(NamedTuple):
  """Where a tensor lies."""

  file: pathlib.Path
  dtype: str
  shape: tuple[int, ...]
  offset: int

  def open(self) -> np.ndarray:
    """The tensor, mapped: its pages are read when they are looked at."""
    # Mapped as bits: not every NumPy can map bfloat16.
    dtype = _DTYPES[self.dtype]
    bits = np.memmap(
      self.file,
      dtype=f"u{dtype.itemsize}",
      mode="r",
      offset=self.offset,
      shape=self.shape,
    )
    return bits.view(np.ndarray).view(dtype)


def _read_header(path: pathlib.Path) -> dict[str, _Tensor]:
  """The tensors of a safetensors file; raises ValueError if it is damaged."""
  try:
    size = path.stat().st_size
    with path.open("rb") as file:
      length = int.from_bytes(file.read(8), "little")
      if size < 8 + length:
        raise ValueError(
          f"{path} is truncated: its header wants {8 + length} bytes, it has"
          f" {size}"
        )
      header = json.loads(file.read(length))
    tensors, end = {}, 0
    for name, entry in header.items():
      if name == "__metadata__":
        continue
      first, last = entry["data_offsets"]
      shape, dtype = tuple(entry["shape"]), entry["dtype"]
      want = (
        math.prod(shape) * _DTYPES[dtype].itemsize if dtype in _DTYPES else None
      )
      if want not in (None, last - first):
        raise ValueError(
          f"{path} is damaged: {name} {dtype} {list(shape)} takes {want} bytes,"
          f" the header gives it {last - first}"
        )
      tensors[name] = _Tensor(path, dtype, shape, 8 + length + first)
      end = max(end, 8 + length + last)
  except OSError as error:
    raise ValueError(f"{path} cannot be read: {error}") from None
  except (KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
    raise ValueError(f"{path} is no safetensors file: {error!r}") from None
  except json.JSONDecodeError as error:
    raise ValueError(f"{path} is no safetensors file: {error}") from None
  if size != end:
    state = "truncated" if size < end else "damaged"
    raise ValueError(
      f"{path} is {state}: its tensors want {end} bytes, it has {size}"
    )
  return tensors


@dataclasses.dataclass(frozen=True)
class _Checkpoint:
  """What the headers of a folder's files say.

  Attributes:
    tensors: of the text model, by name without its prefix.
    prefix: what the names start with.
    skipped: names of vision and multi-token-prediction tensors.
    files: the safetensors files.
  """

  tensors: dict[str, _Tensor]
  prefix: str
  skipped: list[str]
  files: list[pathlib.Path]

  @classmethod
  def read(cls, folder: pathlib.Path) -> _Checkpoint:
    index, single = folder / _INDEX_FILE, folder / _SINGLE_FILE
    if index.exists():
      try:
        places = dict(json.loads(index.read_text())["weight_map"])
      except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index} cannot be read: {error!r}") from None
      files = sorted({folder / name for name in places.values()})
    elif single.exists():
      places, files = {}, [single]
    else:
      raise ValueError(f"{folder} has neither {_INDEX_FILE} nor {_SINGLE_FILE}")
    problems, named = [], {}
    for file in files:
      try:
        header = _read_header(file)
      except ValueError as error:
        problems.append(str(error))
        continue
      twice = sorted(set(header) & set(named))
      if twice:
        problems.append(f"in two files: {_some(twice)}")
      absent = [
        name
        for name, place in places.items()
        if folder / place == file and name not in header
      ]
      if absent:
        problems.append(f"{file} lacks what the index says: {_some(absent)}")
      named |= header
    if problems:
      raise ValueError(f"{folder}:\n  " + "\n  ".join(problems))
    inner = any(name.startswith(_PREFIX) for name in named)
    prefix = _PREFIX if inner else ""
    skipped = sorted(name for name in named if _part(name) in _SKIPPED)
    tensors = {
      name.removeprefix(prefix): tensor
      for name, tensor in named.items()
      if _part(name) not in _SKIPPED
    }
    return cls(tensors, prefix, skipped, files)

  def dtype_of(self, leaf: _Leaf) -> np.dtype:
    """The dtype of a parameter's tensors."""
    (name,) = {self.tensors[name].dtype for name in leaf.names.values()}
    return _DTYPES[name]

  def check(self, folder: pathlib.Path, leaves: Sequence[_Leaf]) -> None:
    """Raises ValueError unless each leaf's tensors, and no others, are here."""
    wanted = {
      name: leaf.layout.tensor
      for leaf in leaves
      for name in leaf.names.values()
    }
    here = self.tensors
    shared = [name for name in wanted if name in here]
    mixed = [
      ", ".join(sorted(dtypes))
      + f" in {leaf.names[next(iter(leaf.names))]} ..."
      for leaf in leaves
      if len(
        dtypes := {here[n].dtype for n in leaf.names.values() if n in here}
      )
      > 1
    ]
    problems = {
      "missing": sorted(set(wanted) - set(here)),
      "unexpected": sorted(set(here) - set(wanted)),
      "misshapen": [
        f"{name} {list(here[name].shape)}, wanted {list(wanted[name])}"
        for name in shared
        if here[name].shape != wanted[name]
      ],
      "of a dtype that is not supported (quantised?), wanted"
      f" {' or '.join(_DTYPES)}": [
        f"{name} {here[name].dtype}"
        for name in shared
        if here[name].dtype not in _DTYPES
      ],
      "of several dtypes in one parameter": mixed,
    }
    lines = [
      f"{len(found)} tensors {what}: {_some(found)}"
      for what, found in problems.items()
      if found
    ]
    if lines:
      raise ValueError(
        f"{folder} does not fit its config.json:\n  " + "\n  ".join(lines)
      )


def _part(name: str) -> str:
  """The model's part that a tensor belongs to: its first telling word."""
  words = name.split(".")
  telling = (w for w in words if w not in ("model", "language_model"))
  return next(telling, name)


def _some(names: Sequence[str], most: int = 20) -> str:
  more = f", and {len(names) - most} more" if len(names) > most else ""
  return ", ".join(names[:most]) + more


# ------------------------------------------------------------------ load


def load(
  folder: str | os.PathLike,
  *,
  dtype: Any = None,
  mesh: Mesh | None = None,
  **options: Any,
) -> DecoderLM:
  """Reads a checkpoint.

  Everything is checked before the first tensor is read. Tensors are then
  mapped, and copied one by one, or a device's part of one, to where they
  belong: the host never holds more than two.

  Args:
    folder: holds config.json and the safetensors files.
    dtype: of the parameters and of the computation; None: each parameter keeps
      the checkpoint's dtype, and the most frequent of them computes. The
      routers' weights and choice biases keep theirs in any case.
    mesh: devices to split the parameters over, by the axes of
      `msa_jax.Sharding` that it has ("fsdp", "expert", "tensor", ...). Call the
      model under `jax.set_mesh(mesh)`. None: one device.
    **options: `implementation`, `gqa_implementation`, `remat` and `scan_layers`
      of `msa_jax.ModelConfig`.

  Raises:
    ValueError: the config is not understood, or the files do not hold the model
      that it describes; the text lists the tensors.
  """
  folder = pathlib.Path(folder)
  unknown = sorted(set(options) - set(_OPTIONS))
  if unknown:
    raise ValueError(f"options must be among {_OPTIONS}, got {unknown}")
  if dtype is not None and np.dtype(dtype) not in _DTYPES.values():
    raise ValueError(
      f"dtype must be one of {sorted(map(str, _DTYPES.values()))} or None, got"
      f" {np.dtype(dtype)}"
    )
  config, checkpoint = _open(folder, **options)
  if checkpoint.skipped:
    logging.getLogger(__name__).warning(
      "%s: skipped %s", folder, _describe_skipped(checkpoint)
    )
  if dtype is None:
    sizes = collections.Counter()
    for tensor in checkpoint.tensors.values():
      sizes[tensor.dtype] += math.prod(tensor.shape)
    compute = _DTYPES[sizes.most_common(1)[0][0]]
  else:
    compute = np.dtype(dtype)
  config = dataclasses.replace(
    config, dtype=compute.name, param_dtype=compute.name
  )
  sharding = None if mesh is None else _sharding(mesh)
  with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
    graphdef, shapes, specs = _abstract(config, sharding)
    leaves = _leaves(config, shapes)
    places = {}
    for leaf in leaves:
      if mesh is None:
        places[leaf.path] = jnp.zeros(()).sharding
      else:
        places[leaf.path] = NamedSharding(mesh, specs[leaf.path])
        _check_split(leaf, places[leaf.path])
    items = []
    for leaf in leaves:
      kept = dtype is None or leaf.keeps_dtype
      array = _read(
        leaf,
        places[leaf.path],
        checkpoint.dtype_of(leaf) if kept else compute,
        lambda name: checkpoint.tensors[name].open(),
      )
      items.append((leaf.path, array))
    return nnx.merge(graphdef, nnx.from_flat_state(items))


def _open(
  folder: pathlib.Path, **options: Any
) -> tuple[ModelConfig, _Checkpoint]:
  """Config and headers of a checkpoint that is whole."""
  config = dataclasses.replace(read_config(folder), **options)
  checkpoint = _Checkpoint.read(folder)
  checkpoint.check(folder, _leaves(config, _abstract(config, None)[1]))
  return config, checkpoint


def _describe_skipped(checkpoint: _Checkpoint) -> str:
  parts = collections.Counter(map(_part, checkpoint.skipped))
  return ", ".join(f"{part}.* ({n} tensors)" for part, n in parts.items())


def _sharding(mesh: Mesh) -> Sharding:
  """The default axes, those that the mesh has."""
  full = Sharding()

  def there(axis: str | None) -> str | None:
    return axis if axis in mesh.axis_names else None

  return Sharding(
    batch=tuple(axis for axis in full.batch if there(axis)),
    heads=there(full.heads),
    embed=there(full.embed),
    expert=there(full.expert),
  )


def _check_split(leaf: _Leaf, place: NamedSharding) -> None:
  try:
    place.shard_shape(leaf.shape)
  except ValueError:
    raise ValueError(
      f"mesh {dict(place.mesh.shape)} cannot split parameter"
      f" {'.'.join(map(str, leaf.path))} {list(leaf.shape)} by {place.spec}"
    ) from None


def _read(
  leaf: _Leaf,
  place: jax.sharding.Sharding,
  dtype: np.dtype,
  open_tensor: Callable[[str], np.ndarray],
) -> jax.Array:
  """A parameter on its devices, made of its tensors one at a time."""
  parts = []
  depth = len(next(iter(leaf.names)))
  for device, index in place.addressable_devices_indices_map(
    leaf.shape
  ).items():
    bounds = [part.indices(size) for part, size in zip(index, leaf.shape)]
    buffer = None
    if depth:
      shape = tuple(last - first for first, last, _ in bounds)
      buffer = jnp.zeros(shape, dtype, device=device)
    for at in itertools.product(*(range(*bound) for bound in bounds[:depth])):
      tensor = open_tensor(leaf.names[at]).reshape(leaf.layout.split)
      # A copy: a device's array must not lie on the file.
      piece = np.array(tensor[leaf.layout.source(index[depth:])])
      piece = jax.device_put(piece, device)
      if buffer is None:
        buffer = _transposed(piece, leaf.layout.axes, dtype)
      else:
        start = [i - first for i, (first, _, _) in zip(at, bounds)]
        buffer = _placed(buffer, piece, start, leaf.layout.axes)
      # Or the host would run ahead and hold many.
      buffer.block_until_ready()
    parts.append(buffer)
  return jax.make_array_from_single_device_arrays(leaf.shape, place, parts)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _transposed(piece: jax.Array, axes: tuple[int, ...], dtype) -> jax.Array:
  return jnp.transpose(piece, axes).astype(dtype)


@functools.partial(jax.jit, static_argnums=3, donate_argnums=0)
def _placed(
  buffer: jax.Array, piece: jax.Array, start: list, axes: tuple[int, ...]
) -> jax.Array:
  piece = _transposed(piece, axes, buffer.dtype)
  start = [*start, *[0] * piece.ndim]
  piece = piece[(None,) * (buffer.ndim - piece.ndim)]
  return jax.lax.dynamic_update_slice(buffer, piece, start)


# ------------------------------------------------------------------ save


def save(
  model: DecoderLM,
  folder: str | os.PathLike,
  *,
  prefix: str = _PREFIX,
  max_file_bytes: int = 5 * 10**9,
) -> None:
  """Writes a checkpoint that `load` reads back with the same bits.

  config.json, safetensors files and their index, under the released names and
  in the parameters' dtypes; no tokenizer. The host never holds more than one
  tensor. All is written to a folder of another name first: `folder` appears
  whole or not at all.

  Args:
    model: any `DecoderLM` whose parameters have released names.
    folder: must be empty or missing.
    prefix: of every name; "" for names as a text-only model has them.
    max_file_bytes: where the next file begins.

  Raises:
    ValueError: the folder holds something, or the model has options that a
      checkpoint cannot say.
    NotImplementedError: the parameters lie on devices of other processes.
  """
  folder = pathlib.Path(folder)
  config = model.config
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise ValueError(f"folder must be empty or missing, got {folder}")
  for name, want in (
    ("selection", "index"),
    ("value_head", False),
    ("force_first_block", False),
  ):
    if "msa" in config.kinds and getattr(config.index, name) != want:
      raise ValueError(
        f"model.config.index.{name} must be {want!r} in a checkpoint, got"
        f" {getattr(config.index, name)!r}"
      )
  params = {
    path: leaf.get_value()
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))
  }
  codes = {dtype: code for code, dtype in _DTYPES.items()}
  tensors: dict[str, tuple[_Leaf, tuple[int, ...]]] = {}
  for leaf in _leaves(config, params):
    array, dotted = params[leaf.path], ".".join(map(str, leaf.path))
    if np.dtype(array.dtype) not in codes:
      raise ValueError(
        f"model: {dotted} is {array.dtype}, a checkpoint holds"
        f" {sorted(map(str, codes))}"
      )
    if not array.is_fully_addressable:
      raise NotImplementedError(
        f"model: {dotted} lies on devices of other processes"
      )
    for at, name in leaf.names.items():
      tensors[prefix + name] = (leaf, at)

  def entry(name: str) -> tuple[np.dtype, tuple[int, ...], int]:
    leaf, _ = tensors[name]
    dtype, shape = np.dtype(params[leaf.path].dtype), leaf.layout.tensor
    return dtype, shape, math.prod(shape) * dtype.itemsize

  files = _pack({name: entry(name)[2] for name in tensors}, max_file_bytes)
  folder.parent.mkdir(parents=True, exist_ok=True)
  work = pathlib.Path(
    tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent)
  )
  try:
    places, total = {}, 0
    for number, names in enumerate(files, 1):
      file = f"model-{number:05}-of-{len(files):05}.safetensors"
      header, end = {"__metadata__": {"format": "pt"}}, 0
      for name in names:
        dtype, shape, size = entry(name)
        header[name] = {
          "dtype": codes[dtype],
          "shape": list(shape),
          "data_offsets": [end, end + size],
        }
        places[name], end = file, end + size
      total += end
      with (work / file).open("wb") as out:
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        out.write(len(text).to_bytes(8, "little") + text)
        for name in names:
          leaf, at = tensors[name]
          array = np.asarray(_taken(params[leaf.path], at, leaf.layout))
          out.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    dtype = config.param_dtype
    _write_json(work / "config.json", _config_json(config, dtype))
    index = {"metadata": {"total_size": total}, "weight_map": places}
    _write_json(work / _INDEX_FILE, index)
    os.chmod(work, 0o777 & ~_umask())
    os.replace(work, folder)
  except BaseException:
    shutil.rmtree(work, ignore_errors=True)
    raise


def _taken(array: jax.Array, at: tuple[int, ...], layout: _Layout) -> jax.Array:
  """The tensor that lies at an index of a parameter."""
  back = np.argsort(layout.axes)
  return jnp.transpose(array[at], back).reshape(layout.tensor)


def _pack(sizes: Mapping[str, int], most: int) -> list[list[str]]:
  """Names in order, split where a file would get too large."""
  files: list[list[str]] = []
  left = 0
  for name, size in sorted(sizes.items()):
    if not files or size > left:
      files.append([])
      left = most
    files[-1].append(name)
    left -= size
  return files


def _write_json(path: pathlib.Path, value: Any) -> None:
  path.write_text(json.dumps(value, indent=2) + "\n")


def _umask() -> int:
  mask = os.umask(0)
  os.umask(mask)
  return mask


# -------------------------------------------------------------- commands


def describe(folder: str | os.PathLike) -> Iterator[str]:
  """Lines that say what a checkpoint holds; reads headers only.

  Raises:
    ValueError: as `load`.
  """
  folder = pathlib.Path(folder)
  config, checkpoint = _open(folder)
  index, moe = config.index, config.moe
  counts = count_parameters(config)
  sizes = collections.Counter()
  for name, tensor in checkpoint.tensors.items():
    words = name.split(".")
    layer = int(words[2]) if name.startswith("model.layers.") else None
    sizes[layer] += math.prod(tensor.shape)
  dtypes = collections.Counter(t.dtype for t in checkpoint.tensors.values())
  size = sum(file.stat().st_size for file in checkpoint.files)
  yield (
    f"model      {config.num_layers} layers, width {config.embed_dim},"
    f" vocabulary {config.vocab_size},"
    f" {'tied' if config.tie_embeddings else 'untied'} output"
  )
  yield (
    f"attention  {config.num_heads}/{config.num_kv_heads} heads of"
    f" {config.head_dim}, rotary {config.rope_dim}, theta"
    f" {config.rope_theta:g}, {'' if config.qk_norm else 'no '}QK-norm, norms"
    f" scale by {'1 + w' if config.zero_centered_norm else 'w'}"
  )
  if "msa" in config.kinds:
    yield (
      f"sparse     blocks of {index.block_size}, top {index.top_k} with"
      f" {index.num_local_blocks} local, index {config.num_kv_heads} heads of"
      f" {index.index_dim}"
    )
  else:
    yield "sparse     none: every layer is full attention"
  if "dense" in config.mlps:
    yield f"MLP        dense of {config.mlp_dim}, {config.activation}"
  if "moe" in config.mlps:
    shared = f", shared {moe.shared_dim}" if moe.shared_dim else ""
    yield (
      f"MLP        {moe.num_experts} experts of {moe.expert_dim}, top"
      f" {moe.top_k}, scale {moe.routed_scale:g}{shared}, {config.activation}"
    )
  kinds = list(zip(config.kinds, config.mlps))
  first = 0
  for (attention, mlp), run in itertools.groupby(kinds):
    count = len(list(run))
    last = first + count - 1
    name = f"{first}" if count == 1 else f"{first}-{last}"
    each = sizes[first]
    yield f"layers     {name:8} {attention} {mlp:6} {each:,} parameters each"
    first += count
  yield (
    f"parameters {counts.total:,}: {counts.active:,} active with"
    f" {counts.embedding:,} of the embeddings, {counts.index:,} of the Index"
    " Branch"
  )
  yield "dtype      " + ", ".join(
    f"{code} ({count} tensors)" for code, count in dtypes.most_common()
  )
  yield f"files      {len(checkpoint.files)}, {size:,} bytes"
  if checkpoint.skipped:
    yield f"skipped    {_describe_skipped(checkpoint)}"


def main(arguments: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    prog="python -m msa_jax.m3", description="Look into M3 checkpoints."
  )
  commands = parser.add_subparsers(dest="command", required=True)
  text = "Print what a checkpoint folder holds; reads no weights."
  show = commands.add_parser("show", help=text, description=text)
  show.add_argument("folder", type=pathlib.Path)
  args = parser.parse_args(arguments)
  try:
    for line in describe(args.folder):
      print(line)
  except (ValueError, NotImplementedError, OSError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  return 0


if __name__ == "__main__":
  sys.exit(main())
