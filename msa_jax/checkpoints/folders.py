"""Loads and saves folders of checkpoints: config.json and safetensors files.

`load` makes a `DecoderLM` of a folder as it comes from a hub, and `save` writes
one. `msa_jax.checkpoints.families` says which families there are; each is a
file with its config's fields and the names of its tensors.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import json
import logging
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import (
  Mesh,
  NamedSharding,
  PartitionSpec,
  SingleDeviceSharding,
)

from msa_jax.checkpoints import quantised, tensor_files
from msa_jax.checkpoints.families import FAMILIES, OWN, Family
from msa_jax.checkpoints.families.base import (
  EXPERTS,
  OPTIONS,
  Leaf,
  canonical,
  leaves_of,
  rest_of,
  rope_factor,
)
from msa_jax.checkpoints.fields import HARMLESS, UNKNOWN, Fields, read_json
from msa_jax.checkpoints.quantised import Quantised
from msa_jax.checkpoints.tensor_files import DTYPES, Tensor
from msa_jax.checks import is_integer, wrong
from msa_jax.layers import Sharding
from msa_jax.model import DecoderLM, abstract_model, is_index_param
from msa_jax.model_config import ModelConfig

LayoutName = Literal["transformers", "released"]

_PREFIX = "language_model."
_VISION = ("vision_tower", "multi_modal_projector", "patch_merge_mlp")
_SKIPPED = (*_VISION, "mtp")
_DTYPE_KEYS = ("dtype", "torch_dtype")
_MTP_KEYS = ("num_mtp_modules", "num_nextn_predict_layers")
# Rounding these two would change which experts are chosen, so `load` does not
# convert the router to `dtype`, and keeps the choice bias in float32: a step of
# `msa_jax.mlp.balance` is too small for 16 bits.
_BIAS = "mlp.choice_bias"
_ROUTER = "mlp.router"


# ---------------------------------------------------------------- counts


class ParameterCounts(NamedTuple):
  """How many parameters a model has.

  Attributes:
    total: all parameters.
    active: the parameters that one token uses: all but the experts that it does
      not go to. The Index Branch is not counted, as in the paper.
    embedding: token embedding and output projection; part of total and active.
    index: the Index Branch; part of total.
  """

  total: int
  active: int
  embedding: int
  index: int


def count_parameters(config: ModelConfig) -> ParameterCounts:
  """Counts a model's parameters from their shapes; allocates nothing."""
  total = routed = embedding = index = 0
  for path, leaf in abstract_model(config, None)[1].items():
    size = math.prod(leaf.shape)
    total += size
    index += size * is_index_param(path)
    embedding += size * (path[0] in ("embed", "head"))
    routed += size * (rest_of(path) in EXPERTS)
  idle = routed * (config.moe.num_experts - config.moe.top_k)
  active = total - index - idle // config.moe.num_experts
  return ParameterCounts(total, active, embedding, index)


# ---------------------------------------------------------------- config


@dataclasses.dataclass(frozen=True)
class Description:
  """What a folder's config.json says.

  Attributes:
    family: of the model.
    config: of the model, with the dtype float32.
    block: block size of quantised weights; None without them.
    dtype: what the file calls the parameters' dtype; None if it does not say.
    whole: the file's fields.
  """

  family: Family
  config: ModelConfig
  block: tuple[int, int] | None
  dtype: str | None
  whole: dict[str, Any]


def read_config(folder: str | os.PathLike) -> ModelConfig:
  """The model that a folder's config.json describes.

  Raises:
    ValueError: the file is missing, contradicts itself, has a field that is not
      known, or describes a model that is not supported; the text names each
      field.
  """
  return describe_folder(pathlib.Path(folder)).config


def describe_folder(folder: pathlib.Path) -> Description:
  """Reads a folder's config.json.

  Raises:
    ValueError: as `read_config`.
  """
  if not folder.is_dir():
    raise wrong(
      "folder",
      "a folder on this machine with config.json and safetensors files (nothing"
      " is downloaded)",
      repr(str(folder)),
    )
  path = folder / "config.json"
  whole = read_json(path)
  family = find_family(whole, path)
  problems: list[str] = []
  config = block = None
  if "text_config" in whole and not isinstance(whole["text_config"], Mapping):
    got = whole["text_config"]
    problems.append(f"text_config must be an object, got {got!r}")
  else:
    fields = Fields(text_fields(whole), problems=problems)
    block = quantised.read_block(fields)
    try:
      config = family.read(fields)
    except (ValueError, TypeError, ZeroDivisionError) as error:
      # The problems listed so far explain the error better than its own text.
      # Without any, it may have come before all fields were read, of which
      # `finish` would say that they are not known.
      if problems:
        fields.finish(family.title)
      else:
        problems.append(str(error))
    else:
      fields.finish(family.title)
    problems += _unknown_outer(whole, family)
    problems += _contradictions(whole, family)
  if problems or config is None:
    raise ValueError(f"{path}:\n  " + "\n  ".join(problems))
  texts = text_fields(whole)
  named = (texts.get(key) for key in _DTYPE_KEYS)
  dtype = next((name for name in named if isinstance(name, str)), None)
  return Description(family, config, block, dtype, whole)


def find_family(whole: Mapping[str, Any], path: pathlib.Path) -> Family:
  """The family that a config's model_type or architectures name.

  Raises:
    ValueError: there is no such family; the text says which the config names.
  """
  model_type = whole.get("model_type")
  architectures = _architectures(whole)
  for family in FAMILIES:
    if model_type in family.model_types:
      if architectures and not _has_one(family, architectures):
        raise ValueError(
          f"{path}: model_type={model_type!r} contradicts architectures="
          f"{architectures}: {family.title} has {family.architectures}"
        )
      if "text_config" in whole and not family.nested:
        raise ValueError(
          f"{path}: text_config in a config of {family.title} is not supported"
        )
      return family
  # MiniMax-M2's first release calls itself "minimax", as older models do.
  if model_type in (None, "minimax"):
    for family in FAMILIES:
      if _has_one(family, architectures):
        return family
  known = ", ".join(f"{f.title} ({f.model_types[0]})" for f in FAMILIES)
  raise ValueError(
    f"{path}: model_type={model_type!r} with architectures={architectures} is"
    f" not among the known families: {known}"
  )


def _architectures(fields: Mapping[str, Any]) -> list[Any]:
  names = fields.get("architectures")
  return names if isinstance(names, list) else []


def _has_one(family: Family, architectures: Sequence[Any]) -> bool:
  """Whether a family has one of the architectures. Old files of Llama write it
  in other capital letters."""
  known = {name.lower() for name in family.architectures}
  return any(str(name).lower() in known for name in architectures)


_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_SHARED_KEYS = (
  *_DTYPE_KEYS,
  "max_position_embeddings",
  "quantization_config",
  "tie_word_embeddings",
  "transformers_version",
)
_IDENTITY = ("architectures", "model_type")
# Fields beside `text_config` that do not belong to the text model. The last is
# the width of what the vision model's projector reads.
_BESIDE = ("text_config", "num_reward_heads", "merged_hidden_size")
# Others, which belong to the vision model, begin with these.
_OUTSIDE = (
  *("image_", "img_", "multimodal_", "process_image_", "projector_"),
  *("spatial_merge_", "temporal_patch_", "video_", "vision_"),
)


def text_fields(whole: Mapping[str, Any]) -> dict[str, Any]:
  """The text model's fields of a config, in one flat object.

  The fields of the vision part are left out.
  """
  inner = whole.get("text_config")
  if not isinstance(inner, Mapping):
    return dict(whole)
  outer = {key: whole[key] for key in _SHARED_KEYS if key in whole}
  ids = {key: whole[key] for key in _TOKENS if whole.get(key) is not None}
  given = {k: v for k, v in inner.items() if v is not None or k not in outer}
  fields = {**outer, **given, **ids}
  # The text part may name another series that has the same text model.
  return {key: value for key, value in fields.items() if key not in _IDENTITY}


def _unknown_outer(whole: Mapping[str, Any], family: Family) -> list[str]:
  """Fields beside `text_config` that are not known."""
  if "text_config" not in whole:
    return []
  known = {*HARMLESS, *_SHARED_KEYS, *_BESIDE}
  return [
    f"{key}={value!r}: {UNKNOWN.format(family.title)}"
    for key, value in whole.items()
    if value is not None
    and key not in known
    and not key.startswith(("_", *_OUTSIDE))
  ]


def _contradictions(whole: Mapping[str, Any], family: Family) -> list[str]:
  """Fields that say the same thing in two ways, one of which must be wrong."""
  inner = whole.get("text_config", {})
  problems: list[str] = []
  for keys in (("tie_word_embeddings",), ("quantization_config",), _DTYPE_KEYS):
    there = {
      f"{place}{key}": fields[key]
      for place, fields in (("", whole), ("text_config.", inner))
      for key in keys
      if fields.get(key) is not None
    }
    values = list(there.values())
    if keys == _DTYPE_KEYS:
      values = [str(value).removeprefix("torch.") for value in values]
    if any(value != values[0] for value in values):
      text = ", ".join(f"{name}={value!r}" for name, value in there.items())
      problems.append(f"fields disagree: {text}")
  other = {}
  if inner.get("model_type") not in (None, *family.nested):
    other["model_type"] = inner["model_type"]
  if _architectures(inner) and not _has_one(family, _architectures(inner)):
    other["architectures"] = inner["architectures"]
  problems += [
    f"text_config.{key}={value!r} is of another family than {family.title}"
    for key, value in other.items()
  ]
  return problems


# ----------------------------------------------------------------- files


@dataclasses.dataclass(frozen=True)
class Source:
  """What `load` read beside the parameters, so that `save` can write it back.

  Attributes:
    family: the family's first model_type.
    fields: config.json.
    layout: of the tensors' names.
    prefix: of all tensors' names.
    bias_dtypes: name without the prefix, and dtype, of each choice bias.
    vision: name and place of each tensor of the vision model.
  """

  family: str
  fields: str
  layout: str
  prefix: str
  bias_dtypes: tuple[tuple[str, str], ...]
  vision: tuple[tuple[str, Tensor], ...]

  @property
  def whole(self) -> dict[str, Any]:
    return json.loads(self.fields)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """The headers of a checkpoint folder's files.

  Attributes:
    tensors: the text model's tensors, by name without the prefix.
    prefix: the prefix of all tensor names.
    skipped: vision and multi-token-prediction tensors by name.
    files: the safetensors files.
    tied_head: the output projection of a model that ties it to the embedding,
      if it is there.
  """

  tensors: dict[str, Tensor | Quantised]
  prefix: str
  skipped: dict[str, Tensor]
  files: list[pathlib.Path]
  tied_head: Tensor | Quantised | None = None

  @classmethod
  def read(cls, folder: pathlib.Path, about: Description, target: str):
    named, files = tensor_files.read_headers(folder)
    inner = any(name.startswith(_PREFIX) for name in named)
    prefix = _PREFIX if inner else ""
    twice = sorted(name for name in named if prefix and prefix + name in named)
    if twice:
      raise ValueError(
        f"{folder} has tensors both with and without the prefix {prefix!r}:"
        f" {tensor_files.some(twice)}"
      )
    more = _num_mtp_layers(about.whole)
    layers = range(about.config.num_layers, about.config.num_layers + more)
    mtp = tuple(f"{prefix}model.layers.{layer}." for layer in layers)
    skipped = {
      name: tensor
      for name, tensor in named.items()
      if _part(name) in _SKIPPED or name.startswith(mtp)
    }
    tensors = quantised.pair(
      {
        name.removeprefix(prefix): tensor
        for name, tensor in named.items()
        if name not in skipped
      },
      about.block,
      target,
    )
    head = None
    if about.config.tie_embeddings:
      head = tensors.pop("lm_head.weight", None)
    return cls(tensors, prefix, skipped, files, head)

  def describe_skipped(self) -> str:
    parts = collections.Counter(
      "mtp" if _part(name) == "layers" else _part(name) for name in self.skipped
    )
    return ", ".join(f"{part}.* ({n} tensors)" for part, n in parts.items())

  def dtype_of(self, leaf: Leaf) -> np.dtype:
    """The dtype that holds a parameter's tensors exactly, which may have
    several where some are quantised and others are not."""
    names = {self.tensors[slot.name].dtype for slot in leaf.slots.values()}
    dtypes = [DTYPES[name] for name in sorted(names)]
    return np.dtype(functools.reduce(jnp.promote_types, dtypes))

  def check(self, folder: pathlib.Path, leaves: Sequence[Leaf]) -> None:
    """Raises ValueError unless the folder holds exactly the leaves' tensors."""
    wanted = {
      slot.name: slot.shape for leaf in leaves for slot in leaf.slots.values()
    }
    here = self.tensors
    shared = [name for name in wanted if name in here]
    problems = {
      "missing": sorted(set(wanted) - set(here)),
      "unexpected": sorted(set(here) - set(wanted)),
      "misshapen": [
        f"{name} {list(here[name].shape)}, wanted {list(wanted[name])}"
        for name in shared
        if here[name].shape != wanted[name]
      ],
      "of a dtype that is not supported (quantised?), wanted"
      f" {' or '.join(DTYPES)}, or F8_E4M3 with scales in NAME{quantised.SCALE}"
      " and a quantization_config": [
        f"{name} {here[name].dtype}"
        for name in shared
        if here[name].dtype not in DTYPES
      ],
      "quantised in a way that is not supported": [
        f"{name} {problem}"
        for name in shared
        if isinstance(tensor := here[name], Quantised)
        and (problem := tensor.problem())
      ],
    }
    lines = [
      f"{len(found)} tensors {what}: {tensor_files.some(found)}"
      for what, found in problems.items()
      if found
    ]
    if lines:
      raise ValueError(
        f"{folder} does not fit its config.json:\n  " + "\n  ".join(lines)
      )

  def check_tied(self, folder: pathlib.Path) -> None:
    """Raises ValueError unless a tied output projection is the embedding.

    It then is a copy that some programs write, and `load` leaves it out.
    """
    if self.tied_head is None:
      return
    head, embedding = self.tied_head, self.tensors["model.embed_tokens.weight"]
    same = head.shape == embedding.shape and {head.dtype} <= set(DTYPES)
    if same:
      a, b = (tensor.open() for tensor in (head, embedding))
      # In parts, so that little of the two is in memory at a time. float32
      # holds the values of all dtypes.
      same = all(
        np.array_equal(
          a[first : first + 4096].astype(np.float32),
          b[first : first + 4096].astype(np.float32),
          equal_nan=True,
        )
        for first in range(0, len(a), 4096)
      )
    if not same:
      raise ValueError(
        f"{folder}: lm_head.weight differs from model.embed_tokens.weight, but"
        " config.json has tie_word_embeddings=true, which says that they are"
        " one"
      )


def _num_mtp_layers(whole: Mapping[str, Any]) -> int:
  """How many layers of multi-token prediction may follow the model's own ones,
  as in MiniMax-M2's folders."""
  fields = text_fields(whole)
  counts = (fields.get(key) for key in _MTP_KEYS)
  return max((n for n in counts if n is not None and is_integer(n)), default=0)


def _part(name: str) -> str:
  """The part of the whole model that a tensor belongs to, by its name."""
  words = name.split(".")
  parts = (w for w in words if w not in ("model", "language_model"))
  return next(parts, name)


# ------------------------------------------------------------------ load


def load(
  folder: str | os.PathLike,
  *,
  dtype: Any = None,
  mesh: Mesh | None = None,
  **options: Any,
) -> DecoderLM:
  """Reads a checkpoint of any known family.

  All checks of config and headers come before the first tensor is read. Tensors
  are then mapped into memory and copied to their devices one by one, so that
  the host never holds more than two of them. Vision and multi-token-prediction
  tensors are skipped, and their names logged.

  Args:
    folder: folder with config.json and the safetensors files.
    dtype: dtype of the parameters and of the computation. With None each
      parameter keeps the checkpoint's dtype, and the dtype that most parameters
      have is the computation's. In both cases the routers' weights keep the
      checkpoint's dtype, and choice biases are float32. Quantised matrices are
      rounded once from code times scale to `dtype`, or with None to what
      config.json calls the dtype, or else to bfloat16. bfloat16 holds every
      product of an e4m3 code and a power of two (MXFP8) exactly; with float32
      scales (FP8), float32 rounds less.
    mesh: devices to split the parameters over, by the axes of
      `msa_jax.Sharding` that it has ("fsdp", "expert", "tensor", ...). Call the
      model under `jax.set_mesh(mesh)`. None loads onto one device.
    **options: `implementation`, `gqa_implementation`, `remat` and `scan_layers`
      of `msa_jax.ModelConfig`.

  Raises:
    ValueError: config.json names no known family or describes a model that is
      not supported, or the files do not hold exactly that model's tensors; the
      text lists them.
  """
  folder = pathlib.Path(folder)
  unknown = sorted(set(options) - set(OPTIONS))
  if unknown:
    raise wrong("options", f"among {OPTIONS}", str(unknown))
  if dtype is not None:
    dtype = _as_dtype(dtype)
  about, checkpoint, layout = open_checkpoint(folder, dtype=dtype, **options)
  checkpoint.check_tied(folder)
  if checkpoint.skipped:
    logging.getLogger(__name__).warning(
      "%s: skipped %s", folder, checkpoint.describe_skipped()
    )
  if dtype is None:
    sizes = collections.Counter()
    for tensor in checkpoint.tensors.values():
      sizes[tensor.dtype] += math.prod(tensor.shape)
    compute = DTYPES[sizes.most_common(1)[0][0]]
  else:
    compute = dtype
  config = dataclasses.replace(
    about.config, dtype=compute.name, param_dtype=compute.name
  )
  sharding = None if mesh is None else Sharding()
  with jax.set_mesh(mesh):
    graphdef, shapes, specs = abstract_model(config, sharding)
  leaves = leaves_of(config, shapes, about.family.layouts[layout])
  # Each part of a parameter goes to one device, whatever mesh the caller set.
  with jax.set_mesh(None):
    places: dict[tuple, jax.sharding.Sharding] = {}
    for leaf in leaves:
      if mesh is None:
        places[leaf.path] = jnp.zeros(()).sharding
      else:
        places[leaf.path] = _place(leaf, mesh, specs[leaf.path])
    items = []
    for leaf in leaves:
      target = compute
      if leaf.rest == _BIAS:
        target = np.dtype(np.float32)
      elif dtype is None or leaf.rest == _ROUTER:
        target = checkpoint.dtype_of(leaf)
      array = _read(
        leaf,
        places[leaf.path],
        target,
        lambda name: checkpoint.tensors[name].open(),
      )
      items.append((leaf.path, array))
  model = nnx.merge(graphdef, nnx.from_flat_state(items))
  model.source = Source(
    about.family.model_types[0],
    json.dumps(about.whole),
    layout,
    checkpoint.prefix,
    tuple(
      (slot.name, DTYPES[checkpoint.tensors[slot.name].dtype].name)
      for leaf in leaves
      if leaf.rest == _BIAS
      for slot in leaf.slots.values()
    ),
    tuple(
      (name, tensor)
      for name, tensor in sorted(checkpoint.skipped.items())
      if _part(name) in _VISION
    ),
  )
  return model


def open_checkpoint(
  folder: pathlib.Path, *, dtype: np.dtype | None = None, **options: Any
) -> tuple[Description, Checkpoint, str]:
  """Reads a checkpoint's config and headers, and checks that they fit.

  Args:
    folder: the checkpoint's.
    dtype: of dequantised matrices; None: what config.json says, or bfloat16.
    **options: as of `load`.

  Returns:
    Description of the config with the options, headers, and name of the layout.

  Raises:
    ValueError: as `load`.
  """
  about = describe_folder(folder)
  config = dataclasses.replace(about.config, **options)
  about = dataclasses.replace(about, config=config)
  codes = {known.name: code for code, known in DTYPES.items()}
  name = about.dtype if dtype is None else dtype.name
  target = codes.get(name or "", "BF16")
  checkpoint = Checkpoint.read(folder, about, target)
  packed = [n for n in checkpoint.tensors if n.endswith(".weight_packed")]
  if packed:
    raise ValueError(
      f"{folder}: packed weights of 4 bits are not supported:"
      f" {tensor_files.some(packed)}"
    )
  layout = about.family.layout_of(checkpoint.tensors)
  names = about.family.layouts[layout]
  shapes = abstract_model(config, None)[1]
  checkpoint.check(folder, leaves_of(config, shapes, names))
  return about, checkpoint, layout


def _as_dtype(dtype: Any) -> np.dtype:
  known = {known.name: known for known in DTYPES.values()}
  name = getattr(dtype, "name", getattr(dtype, "__name__", dtype))
  if name not in known:
    raise wrong("dtype", f"one of {sorted(known)} or None", repr(dtype))
  return known[name]


def _place(leaf: Leaf, mesh: Mesh, spec: PartitionSpec) -> NamedSharding:
  place = NamedSharding(mesh, spec)
  try:
    place.shard_shape(leaf.shape)
  except ValueError:
    raise ValueError(
      f"mesh {dict(mesh.shape)} cannot split parameter"
      f" {'.'.join(map(str, leaf.path))} {list(leaf.shape)} by {spec}"
    ) from None
  return place


def _read(
  leaf: Leaf,
  place: jax.sharding.Sharding,
  dtype: np.dtype,
  open_tensor: Callable[[str], np.ndarray],
) -> jax.Array:
  """Makes a parameter on its devices, from one tensor at a time."""
  parts = []
  depth = len(next(iter(leaf.slots)))
  places = place.addressable_devices_indices_map(leaf.shape)
  for device, index in places.items():
    bounds = [part.indices(size) for part, size in zip(index or (), leaf.shape)]
    firsts = [first for first, _, _ in bounds[:depth]]
    within = tuple(slice(*bound) for bound in bounds[depth:])
    buffer = None
    for at in itertools.product(*(range(*bound) for bound in bounds[:depth])):
      slot = leaf.slots[at]
      tensor = open_tensor(slot.name)[slot.part].reshape(leaf.layout.split)
      # A copy, because on a CPU device_put may keep using the mapped file.
      part = np.array(tensor[leaf.layout.source(within)])
      part = _transposed(jax.device_put(part, device), leaf.layout.axes, dtype)
      if not depth:
        buffer = part
      else:
        if buffer is None:
          shape = tuple(last - first for first, last, _ in bounds)
          buffer = _zeros(shape, dtype, device)()
        start = [i - first for i, first in zip(at, firsts)]
        buffer = _placed(buffer, part, start)
      # Without waiting, the host would run ahead and hold many tensors.
      buffer.block_until_ready()
    parts.append(buffer)
  return jax.make_array_from_single_device_arrays(leaf.shape, place, parts)


@functools.cache
def _zeros(
  shape: tuple[int, ...], dtype: np.dtype, device: jax.Device
) -> Callable[[], jax.Array]:
  # jnp.zeros would make them on the default device and then copy them.
  place = SingleDeviceSharding(device)
  return jax.jit(
    functools.partial(jnp.zeros, shape, dtype), out_shardings=place
  )


@functools.partial(jax.jit, static_argnums=(1, 2))
def _transposed(part: jax.Array, axes: tuple[int, ...], dtype) -> jax.Array:
  return jnp.transpose(part, axes).astype(dtype)


@functools.partial(jax.jit, donate_argnums=0)
def _placed(buffer: jax.Array, part: jax.Array, start: list) -> jax.Array:
  start = [*start, *[0] * part.ndim]
  part = part[(None,) * (buffer.ndim - part.ndim)]
  return jax.lax.dynamic_update_slice(buffer, part, start)


# ------------------------------------------------------------------ save


def save(
  model: DecoderLM,
  folder: str | os.PathLike,
  *,
  layout: LayoutName | None = None,
  max_file_bytes: int = 5 * 10**9,
  fields: Mapping[str, Any] | None = None,
  documents: Mapping[str, Any] | None = None,
) -> None:
  """Writes a checkpoint that `load` reads back with the same bits.

  The model is written as one of the family that it was loaded from, if that
  family has such a model. A model of no checkpoint becomes the first family's
  that has it: MiniMax-M3, MiniMax-M2, Qwen3, Qwen3-MoE or Llama. These load in
  transformers too. What no family has, such as Qwen3 with an Index Branch, gets
  the model_type "msa_jax", which `load` reads and transformers refuses.

  The folder gets config.json, safetensors files and their index. Tensors have
  the parameters' dtypes; what was quantised is written as it was dequantised.
  Choice biases are written in the dtype of the checkpoint that they were loaded
  from; if that would round one of them, because training has moved it, all are
  written as float32. config.json keeps the loaded checkpoint's fields that
  still hold, such as eos_token_id and max_position_embeddings. A tokenizer and
  other files are not copied.

  The host holds one tensor at a time. The folder appears whole or not at all. A
  killed call leaves a folder .NAME.XXXXXXXX.unfinished beside it, which the
  next call for the same folder removes.

  Args:
    model: any `DecoderLM`.
    folder: folder to write, empty or missing.
    layout: of MiniMax-M3 alone: "transformers" writes the text model as
      transformers saves it; "released" writes the released form with
      `text_config`, and copies the vision tensors of the folder that the model
      was loaded from. None takes the released form if the model was loaded from
      one with `text_config`, and else transformers'.
    max_file_bytes: size beyond which a new file begins.
    fields: further fields of config.json that do not describe the model, such
      as eos_token_id.
    documents: content of further files, by file name: a text as it is,
      anything else as JSON.

  Raises:
    ValueError: the folder is not empty, a parameter has another dtype, `layout`
      does not fit the model, a field describes the model, or the vision tensors
      are gone.
    NotImplementedError: parameters lie on devices of other processes.
  """
  folder = pathlib.Path(folder)
  tensor_files.check_free(folder)
  describing = sorted(set(fields or {}) - HARMLESS)
  if describing:
    raise wrong("fields", "fields that describe no model", str(describing))
  config = model.config
  params = {
    path: _with_auto_axes(leaf.get_value())
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))
  }
  source = model.source if isinstance(model.source, Source) else None
  family, written = choose_family(config, source, layout)
  released = written == "released" and bool(family.nested)
  prefix = _PREFIX if released else ""
  tensors, places = {}, collections.defaultdict(list)
  for leaf in leaves_of(config, params, family.layouts[written]):
    array, dotted = params[leaf.path], ".".join(map(str, leaf.path))
    dtype = np.dtype(array.dtype)
    if dtype not in DTYPES.values():
      raise wrong(
        f"model's {dotted}",
        f"of a dtype among {sorted(d.name for d in DTYPES.values())} in a"
        " checkpoint",
        str(dtype),
      )
    if not array.is_fully_addressable:
      raise NotImplementedError(
        f"model's {dotted} lies on devices of other processes: save supports"
        " parameters on this process's devices only"
      )
    for at, slot in leaf.slots.items():
      tensors[prefix + slot.name] = (dtype, slot.shape)
      places[prefix + slot.name].append((array, at, leaf.layout, slot.part))
  copied = _vision(source) if released else {}
  for name, tensor in copied.items():
    tensors[name] = (DTYPES[tensor.dtype], tensor.shape)

  def fetch(name: str) -> np.ndarray:
    if name in copied:
      return copied[name].open()
    dtype, shape = tensors[name]
    parts = []
    for array, at, layout, part in places[name]:
      back = tuple(int(axis) for axis in np.argsort(layout.axes))
      with jax.set_mesh(None):  # the parameters' mesh may be another one
        value = jnp.transpose(array[at], back).reshape(layout.tensor)
      value = np.asarray(value).astype(dtype, copy=False)
      if part == ():
        return value
      parts.append((part, value))
    whole = np.empty(shape, dtype)
    for part, value in parts:
      whole[part] = value
    return whole

  if source is not None and source.family == family.model_types[0]:
    _restore_biases(source, prefix, tensors, fetch)
  described = config_json(family, config, source, released=released)
  described |= fields or {}
  tensor_files.write(
    folder,
    tensors,
    fetch,
    documents={"config.json": described, **(documents or {})},
    max_file_bytes=max_file_bytes,
  )


def choose_family(
  config: ModelConfig, source: Source | None, layout: LayoutName | None
) -> tuple[Family, str]:
  """The family and layout that a model is saved as, see `save`.

  Raises:
    ValueError: the model cannot be saved in the layout that is asked for.
  """
  tried = FAMILIES
  if source is not None:
    tried = [f for f in FAMILIES if source.family in f.model_types] + [OWN]
  refusals = []
  for family in tried:
    known = list(family.layouts)
    written = known[0]
    if family.nested:
      nested = source is not None and "text_config" in source.whole
      written = layout or ("released" if nested else known[0])
    refusal = family.refusal(config, written)
    if refusal is None and layout is not None and not family.nested:
      refusal = f"{family.title} has one layout only"
    if refusal is None:
      return family, written
    refusals.append(refusal)
  raise wrong(
    "layout",
    "one that the model can be saved in",
    f"{layout!r}:\n  " + "\n  ".join(refusals),
  )


def _with_auto_axes(array: jax.Array) -> jax.Array:
  """The same buffers, of a mesh whose axes have type Auto: JAX reshapes no
  array whose axes are split over Explicit ones."""
  place = array.sharding
  if not isinstance(place, NamedSharding):
    return array
  mesh: Any = place.mesh
  mesh = Mesh(mesh.devices, mesh.axis_names)
  place = NamedSharding(mesh, place.spec, memory_kind=place.memory_kind)
  return jax.device_put(array, place)


def _vision(source: Source | None) -> dict[str, Tensor]:
  """The vision tensors of the folder that a model was loaded from."""
  tensors = {} if source is None else dict(source.vision)
  for name, tensor in tensors.items():
    problem = None
    if tensor.dtype not in DTYPES:
      problem = f"has the dtype {tensor.dtype}, which is not supported"
    elif not tensor.file.exists():
      problem = f"is gone: {tensor.file}"
    if problem is not None:
      raise wrong(
        "layout",
        "'transformers', which has no vision model,",
        f"'released', but the vision tensor {name} {problem}",
      )
  return tensors


def _restore_biases(
  source: Source,
  prefix: str,
  tensors: dict[str, tuple[np.dtype, tuple[int, ...]]],
  fetch: Callable[[str], np.ndarray],
) -> None:
  """Gives choice biases the dtypes that they were loaded from, if they fit."""
  biases = {prefix + name: np.dtype(d) for name, d in source.bias_dtypes}
  if not set(biases) <= set(tensors):
    return  # The layout is another one, with other names.
  values = {name: fetch(name) for name in biases}
  if all(_survives(values[name], dtype) for name, dtype in biases.items()):
    for name, dtype in biases.items():
      tensors[name] = (dtype, tensors[name][1])


def _survives(value: np.ndarray, dtype: np.dtype) -> bool:
  """Whether converting an array to a dtype and back keeps its values."""
  back = value.astype(dtype).astype(value.dtype)
  return np.array_equal(back, value, equal_nan=True)


def config_json(
  family: Family,
  config: ModelConfig,
  source: Source | None = None,
  *,
  released: bool = False,
) -> dict[str, Any]:
  """The config.json of a model.

  Args:
    family: that the model is saved as.
    config: config of the model.
    source: what `load` read. If its fields still describe the model, they are
      kept as they are, but for the dtype. If the model has changed, the fields
      that describe it are written anew, and of the others those are kept that
      are known not to change a model.
    released: whether the text model's fields go into `text_config`.
  """
  own = family.describe(config)
  whole = {} if source is None else source.whole
  texts = text_fields(whole)
  known = source is not None and source.family == family.model_types[0]
  if known:
    # The fields were read without a problem when the model was loaded.
    before = family.read(Fields(texts))
    if canonical(before) == canonical(config):
      own = {**texts, **family.identity()}
  kept = {k: v for k, v in texts.items() if k in HARMLESS}
  fields = _without_gone({**kept, **own})
  for key in _DTYPE_KEYS:
    if texts.get(key) is not None or (key == "dtype" and not texts):
      fields[key] = config.param_dtype
  if not any(fields.get(key) for key in _DTYPE_KEYS):
    fields["dtype"] = config.param_dtype
  rope = fields.get("rope_parameters") or {}
  if "rotary_dim" in fields and "partial_rotary_factor" not in fields | rope:
    # Some versions of transformers ignore rotary_dim and would rotate all dims.
    fields["partial_rotary_factor"] = rope_factor(config)
  if not released:
    return fields
  architecture = "MiniMaxM3SparseForConditionalGeneration"
  outer: dict[str, Any] = {
    "architectures": [architecture],
    "model_type": "minimax_m3_vl",
  }
  if isinstance(whole.get("text_config"), Mapping):
    outer = _without_gone(whole)
    inner = whole["text_config"]
    for key in _DTYPE_KEYS:
      if outer.get(key) is not None:
        outer[key] = config.param_dtype
    # What the text part did not say itself, it goes on not to say.
    fields = {
      key: value
      for key, value in fields.items()
      if key in inner or key not in (*_SHARED_KEYS, *_TOKENS)
    }
    fields = {k: v for k, v in fields.items() if k not in _IDENTITY}
    fields |= {key: inner[key] for key in _IDENTITY if key in inner}
    fields |= {key: inner[key] for key in _TOKENS if key in inner}
    if "tie_word_embeddings" in outer:
      outer["tie_word_embeddings"] = config.tie_embeddings
  return {**outer, "text_config": fields}


def _without_gone(fields: Mapping[str, Any]) -> dict[str, Any]:
  """Fields without those that name files of code, quantised weights or
  multi-token prediction, none of which `save` writes."""
  gone = ("auto_map", "quantization_config", "num_nextn_predict_layers")
  return {
    key: value
    for key, value in fields.items()
    if key not in gone and "mtp" not in key
  }
