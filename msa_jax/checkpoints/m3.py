"""Checkpoints of the MiniMax-M3 text model, and of its M2-style relatives.

A checkpoint is a folder with config.json and safetensors files
(`msa_jax.checkpoints.tensor_files`). `load` makes a `DecoderLM` of it, and
`save` writes a `DecoderLM` under the same names. Weights have 16 or 32 bits.
`load` skips vision and multi-token-prediction tensors, and logs their names.
`M3` is the config of the release and `PAPER_10B` that of the paper's model;
`count_parameters` counts the parameters of such a config.

python -m msa_jax.checkpoints show FOLDER
python -m msa_jax.checkpoints sample FOLDER --text "The weather"
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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import (
  AxisType,
  Mesh,
  NamedSharding,
  PartitionSpec,
  SingleDeviceSharding,
)

from msa_jax.checkpoints import tensor_files
from msa_jax.checkpoints.m3_config import (
  config_json,
  read_config,
  read_text_fields,
)
from msa_jax.checkpoints.tensor_files import DTYPES
from msa_jax.checks import wrong
from msa_jax.layers import Sharding
from msa_jax.model import (
  DecoderLM,
  abstract_model,
  group_sizes,
  is_index_param,
)
from msa_jax.model_config import ModelConfig, MoEConfig

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

_PREFIX = "language_model."
_SKIPPED = ("vision_tower", "multi_modal_projector", "patch_merge_mlp", "mtp")
# Config fields that change how a model is computed, but not its results.
_OPTIONS = ("implementation", "gqa_implementation", "remat", "scan_layers")


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
    routed += size * (_rest(path) in _EXPERTS)
  idle = routed * (config.moe.num_experts - config.moe.top_k)
  active = total - index - idle // config.moe.num_experts
  return ParameterCounts(total, active, embedding, index)


# --------------------------------------------------- names and layouts

# Name of a parameter in its layer: (name in the checkpoint, kind of Layout).
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
# Rounding these two would change which experts are chosen, so `load` does not
# convert the router to `dtype`, and keeps the choice bias in float32: a step of
# `msa_jax.mlp.balance` is too small for 16 bits.
_BIAS = "mlp.choice_bias"
_ROUTER = "mlp.router"


@dataclasses.dataclass(frozen=True)
class Layout:
  """How a checkpoint's tensor becomes a parameter.

  The tensor reshaped to `split` and then transposed by `axes` is the parameter.
  Three kinds occur. A checkpoint's matrices are [outputs, inputs]; of kind
  "into" the parameter is [inputs, *outputs], of kind "out_of" it is
  [*inputs, outputs]. Of kind "same" the parameter is the tensor itself.

  Attributes:
    tensor: shape of the tensor in the checkpoint.
    split: shape that the tensor is reshaped to.
    axes: permutation of the reshaped tensor's axes.
  """

  tensor: tuple[int, ...]
  split: tuple[int, ...]
  axes: tuple[int, ...]

  @classmethod
  def make(cls, kind: str, shape: tuple[int, ...]) -> Layout:
    if kind == "same":
      return cls(shape, shape, tuple(range(len(shape))))
    last = len(shape) - 1
    if kind == "into":
      rest, one = shape[1:], shape[0]
      return cls((math.prod(rest), one), (*rest, one), (last, *range(last)))
    rest, one = shape[:-1], shape[-1]
    return cls((one, math.prod(rest)), (one, *rest), (*range(1, last + 1), 0))

  def source(self, index: Sequence[slice]) -> tuple[slice, ...]:
    """The part of the reshaped tensor that becomes a part of the parameter."""
    slices: list[Any] = [slice(None)] * len(self.axes)
    for axis, part in zip(self.axes, index):
      slices[axis] = part
    return tuple(slices)


@dataclasses.dataclass(frozen=True)
class Leaf:
  """A parameter, and the checkpoint's tensors that it is made of.

  Attributes:
    path: path of the parameter in the model.
    shape: shape of the parameter.
    names: name of the tensor at each leading index of the parameter: (), or the
      indices of a stacked layer and of an expert.
    layout: how each of these tensors becomes its part of the parameter.
  """

  path: tuple
  shape: tuple[int, ...]
  names: dict[tuple[int, ...], str]
  layout: Layout


def _rest(path: tuple) -> str:
  """Dotted name of a parameter; inside its layer, if a layer holds it."""
  return ".".join(map(str, path[2:] if path[0] == "layers" else path))


def _leaves(config: ModelConfig, shapes: Mapping[tuple, Any]) -> list[Leaf]:
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
    layout = Layout.make(kind, tuple(leaf.shape[len(lead) :]))
    leaves.append(Leaf(path, tuple(leaf.shape), names, layout))
  return leaves


# ----------------------------------------------------------------- files


@dataclasses.dataclass(frozen=True)
class Source:
  """What `load` read beside the parameters, so that `save` can write it back.

  Attributes:
    fields: the text model's fields of config.json, as JSON.
    prefix: the prefix of all tensor names.
    bias_dtypes: name without the prefix, and dtype, of each choice bias.
  """

  fields: str
  prefix: str
  bias_dtypes: tuple[tuple[str, str], ...]

  @property
  def origin(self) -> dict[str, Any]:
    return json.loads(self.fields)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """The headers of a checkpoint folder's files.

  Attributes:
    tensors: the text model's tensors, by name without the prefix.
    prefix: the prefix of all tensor names.
    skipped: names of vision and multi-token-prediction tensors.
    files: the safetensors files.
  """

  tensors: dict[str, tensor_files.Tensor]
  prefix: str
  skipped: list[str]
  files: list[pathlib.Path]

  @classmethod
  def read(cls, folder: pathlib.Path) -> Checkpoint:
    named, files = tensor_files.read_headers(folder)
    inner = any(name.startswith(_PREFIX) for name in named)
    prefix = _PREFIX if inner else ""
    skipped = sorted(name for name in named if _part(name) in _SKIPPED)
    tensors = {
      name.removeprefix(prefix): tensor
      for name, tensor in named.items()
      if _part(name) not in _SKIPPED
    }
    return cls(tensors, prefix, skipped, files)

  def dtypes_of_biases(self) -> tuple[tuple[str, str], ...]:
    """Names and dtypes of the tensors that are choice biases."""
    suffix = _LAYER[_BIAS][0]
    return tuple(
      (name, DTYPES[tensor.dtype].name)
      for name, tensor in sorted(self.tensors.items())
      if name.endswith(suffix)
    )

  def describe_skipped(self) -> str:
    parts = collections.Counter(map(_part, self.skipped))
    return ", ".join(f"{part}.* ({n} tensors)" for part, n in parts.items())

  def dtype_of(self, leaf: Leaf) -> np.dtype:
    """The dtype of a parameter's tensors."""
    (name,) = {self.tensors[name].dtype for name in leaf.names.values()}
    return DTYPES[name]

  def check(self, folder: pathlib.Path, leaves: Sequence[Leaf]) -> None:
    """Raises ValueError unless the folder holds exactly the leaves' tensors."""
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
      f" {' or '.join(DTYPES)}": [
        f"{name} {here[name].dtype}"
        for name in shared
        if here[name].dtype not in DTYPES
      ],
      "of several dtypes in one parameter": mixed,
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


def _names(dtypes: Mapping[str, np.dtype]) -> list[str]:
  return sorted(dtype.name for dtype in dtypes.values())


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
  """Reads a checkpoint.

  All checks come before the first tensor is read. Tensors are then mapped into
  memory and copied to their devices one by one, so that the host never holds
  more than two of them.

  Args:
    folder: folder with config.json and the safetensors files.
    dtype: dtype of the parameters and of the computation. With None each
      parameter keeps the checkpoint's dtype, and the dtype that most parameters
      have is the computation's. In both cases the routers' weights keep the
      checkpoint's dtype, and choice biases are float32.
    mesh: devices to split the parameters over, by the axes of
      `msa_jax.Sharding` that it has ("fsdp", "expert", "tensor", ...). Every
      axis must have type Auto. Call the model under `jax.set_mesh(mesh)`. None
      loads onto one device.
    **options: `implementation`, `gqa_implementation`, `remat` and `scan_layers`
      of `msa_jax.ModelConfig`.

  Raises:
    ValueError: config.json describes a model that is not supported, or the
      files do not hold exactly that model's tensors; the text lists them.
  """
  folder = pathlib.Path(folder)
  unknown = sorted(set(options) - set(_OPTIONS))
  if unknown:
    raise wrong("options", f"among {_OPTIONS}", str(unknown))
  if dtype is not None:
    dtype = _as_dtype(dtype)
  if mesh is not None and set(mesh.axis_types) != {AxisType.Auto}:
    raise wrong(
      "mesh",
      "a mesh whose axes have type Auto (make_mesh takes axis_types)",
      str(mesh.axis_types),
    )
  config, checkpoint = open_checkpoint(folder, **options)
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
    config, dtype=compute.name, param_dtype=compute.name
  )
  sharding = None if mesh is None else _sharding(mesh)
  with jax.set_mesh(mesh):
    graphdef, shapes, specs = abstract_model(config, sharding)
  leaves = _leaves(config, shapes)
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
      if _rest(leaf.path) == _BIAS:
        target = np.dtype(np.float32)
      elif dtype is None or _rest(leaf.path) == _ROUTER:
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
    json.dumps(read_text_fields(folder)),
    checkpoint.prefix,
    checkpoint.dtypes_of_biases(),
  )
  return model


def open_checkpoint(
  folder: pathlib.Path, **options: Any
) -> tuple[ModelConfig, Checkpoint]:
  """Reads a checkpoint's config and headers, and checks that they fit.

  Raises:
    ValueError: as `load`.
  """
  config = dataclasses.replace(read_config(folder), **options)
  checkpoint = Checkpoint.read(folder)
  checkpoint.check(folder, _leaves(config, abstract_model(config, None)[1]))
  return config, checkpoint


def _as_dtype(dtype: Any) -> np.dtype:
  known = {known.name: known for known in DTYPES.values()}
  name = getattr(dtype, "name", getattr(dtype, "__name__", dtype))
  if name not in known:
    raise wrong("dtype", f"one of {sorted(known)} or None", repr(dtype))
  return known[name]


def _sharding(mesh: Mesh) -> Sharding:
  """`Sharding()` without the axes that the mesh lacks."""
  full = Sharding()

  def there(axis: str | None) -> str | None:
    return axis if axis in mesh.axis_names else None

  return Sharding(
    batch=tuple(axis for axis in full.batch if there(axis)),
    heads=there(full.heads),
    embed=there(full.embed),
    expert=there(full.expert),
  )


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
  depth = len(next(iter(leaf.names)))
  places = place.addressable_devices_indices_map(leaf.shape)
  for device, index in places.items():
    bounds = [part.indices(size) for part, size in zip(index or (), leaf.shape)]
    firsts = [first for first, _, _ in bounds[:depth]]
    within = tuple(slice(*bound) for bound in bounds[depth:])
    buffer = None
    for at in itertools.product(*(range(*bound) for bound in bounds[:depth])):
      tensor = open_tensor(leaf.names[at]).reshape(leaf.layout.split)
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
  prefix: str | None = None,
  max_file_bytes: int = 5 * 10**9,
) -> None:
  """Writes a checkpoint that `load` reads back with the same bits.

  The folder gets config.json, safetensors files and their index. Tensors have
  the released names and the parameters' dtypes. Choice biases are written in
  the dtype of the checkpoint that they were loaded from; if that would round
  one of them, because training has moved it, all are written as float32.
  config.json keeps the loaded checkpoint's fields of the text model that still
  hold, such as eos_token_id and max_position_embeddings. A tokenizer and other
  files are not copied.

  The host holds one tensor at a time. The folder appears whole or not at all. A
  killed call leaves a folder .NAME.XXXXXXXX.unfinished beside it, which the
  next call for the same folder removes.

  Args:
    model: any `DecoderLM` whose parameters have released names.
    folder: folder to write, empty or missing.
    prefix: prefix of every tensor name; "" gives the names of a text-only
      model. None takes the prefix of the checkpoint that the model was loaded
      from, or else the release's.
    max_file_bytes: size beyond which a new file begins.

  Raises:
    ValueError: the folder is not empty, or the model has options that a
      checkpoint cannot hold.
    NotImplementedError: parameters lie on devices of other processes.
  """
  folder = pathlib.Path(folder)
  tensor_files.check_free(folder)
  config = model.config
  for name, want in (
    ("selection", "index"),
    ("value_head", False),
    ("force_first_block", False),
  ):
    if "msa" in config.kinds and getattr(config.index, name) != want:
      raise wrong(
        f"model.config.index.{name}",
        f"{want!r} in a checkpoint",
        repr(getattr(config.index, name)),
      )
  params = {
    path: leaf.get_value()
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))
  }
  source = model.source if isinstance(model.source, Source) else None
  if prefix is None:
    prefix = _PREFIX if source is None else source.prefix
  tensors, places = {}, {}
  for leaf in _leaves(config, params):
    array, dotted = params[leaf.path], ".".join(map(str, leaf.path))
    dtype = np.dtype(array.dtype)
    if dtype not in DTYPES.values():
      raise wrong(
        f"model's {dotted}",
        f"of a dtype among {_names(DTYPES)} in a checkpoint",
        str(dtype),
      )
    if not array.is_fully_addressable:
      raise NotImplementedError(
        f"model's {dotted} lies on devices of other processes: save supports"
        " parameters on this process's devices only"
      )
    for at, name in leaf.names.items():
      tensors[prefix + name] = (dtype, leaf.layout.tensor)
      places[prefix + name] = (array, at, leaf.layout)

  def fetch(name: str) -> np.ndarray:
    array, at, layout = places[name]
    back = tuple(int(axis) for axis in np.argsort(layout.axes))
    value = np.asarray(jnp.transpose(array[at], back).reshape(layout.tensor))
    return value.astype(tensors[name][0], copy=False)

  if source is not None:
    biases = {prefix + n: np.dtype(d) for n, d in source.bias_dtypes}
    values = {name: fetch(name) for name in biases}
    if all(_survives(values[name], dtype) for name, dtype in biases.items()):
      for name, dtype in biases.items():
        tensors[name] = (dtype, tensors[name][1])

  tensor_files.write(
    folder,
    tensors,
    fetch,
    documents={"config.json": config_json(config, source and source.origin)},
    max_file_bytes=max_file_bytes,
  )


def _survives(value: np.ndarray, dtype: np.dtype) -> bool:
  """Whether converting an array to a dtype and back keeps its values."""
  back = value.astype(dtype).astype(value.dtype)
  return np.array_equal(back, value, equal_nan=True)
