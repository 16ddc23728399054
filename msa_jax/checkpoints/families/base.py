"""What a family of checkpoints is, and what the families share."""

from __future__ import annotations

import abc
import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np

from msa_jax.checkpoints.fields import Fields
from msa_jax.model import group_sizes
from msa_jax.model_config import IndexConfig, ModelConfig, MoEConfig

# Config fields that change how a model is computed, but not its results.
OPTIONS = ("implementation", "gqa_implementation", "remat", "scan_layers")


class Name(NamedTuple):
  """The tensor of a parameter.

  Attributes:
    template: its name; a {} stands for the layer, and another for the expert.
    kind: of `Layout`.
    half: 0 or 1, if the parameter is the first or the second half of a tensor's
      outputs, which another parameter shares; else None.
    stacked: whether one tensor holds all experts of a layer, in its first axis.
  """

  template: str
  kind: str
  half: int | None = None
  stacked: bool = False


Names = Mapping[str, Name]


def attention_names(
  index: tuple[str, str, str, str] | None = None, qk_norm: bool = True
) -> dict[str, Name]:
  """The tensors of a layer's norms and attention, which all families share.

  Args:
    index: names of the index projections and norms in self_attn, for q and k;
      None: there is no Index Branch.
    qk_norm: whether there are norms of q and k.
  """
  layer = "model.layers.{}."
  names = {
    "attention_norm.scale": Name(f"{layer}input_layernorm.weight", "same"),
    "attention.query.kernel": Name(f"{layer}self_attn.q_proj.weight", "into"),
    "attention.key.kernel": Name(f"{layer}self_attn.k_proj.weight", "into"),
    "attention.value.kernel": Name(f"{layer}self_attn.v_proj.weight", "into"),
    "attention.out.kernel": Name(f"{layer}self_attn.o_proj.weight", "out_of"),
    "mlp_norm.scale": Name(f"{layer}post_attention_layernorm.weight", "same"),
    "embed.embedding": Name("model.embed_tokens.weight", "same"),
    "norm.scale": Name("model.norm.weight", "same"),
    "head.kernel": Name("lm_head.weight", "into"),
  }
  if qk_norm:
    names |= {
      "attention.query_norm.scale": Name(
        f"{layer}self_attn.q_norm.weight", "same"
      ),
      "attention.key_norm.scale": Name(
        f"{layer}self_attn.k_norm.weight", "same"
      ),
    }
  if index is not None:
    parameters = (
      ("index_query.kernel", "into"),
      ("index_key.kernel", "into"),
      ("index_query_norm.scale", "same"),
      ("index_key_norm.scale", "same"),
    )
    for (parameter, kind), name in zip(parameters, index, strict=True):
      names[f"attention.{parameter}"] = Name(
        f"{layer}self_attn.{name}.weight", kind
      )
  return names


def gated_names(prefix: str, parameter: str) -> dict[str, Name]:
  """The three matrices of a gated MLP."""
  return {
    f"{parameter}.{ours}.kernel": Name(
      f"model.layers.{{}}.{prefix}.{ours}_proj.weight", "into"
    )
    for ours in ("gate", "up", "down")
  }


def expert_names(prefix: str, tensors: tuple[str, str, str]) -> dict[str, Name]:
  """The three matrices of each expert: gate, up and down."""
  return {
    f"mlp.{ours}": Name(
      f"model.layers.{{}}.{prefix}.experts.{{}}.{theirs}.weight", "into"
    )
    for ours, theirs in zip(("gate", "up", "down"), tensors, strict=True)
  }


def stacked_expert_names() -> dict[str, Name]:
  """A router, and the experts of a layer in two tensors, as in transformers'
  memory, and as some of its versions save them."""
  mlp = "model.layers.{}.mlp."
  both = f"{mlp}experts.gate_up_proj"
  return {
    "mlp.gate": Name(both, "into", half=0, stacked=True),
    "mlp.up": Name(both, "into", half=1, stacked=True),
    "mlp.down": Name(f"{mlp}experts.down_proj", "into", stacked=True),
    "mlp.router": Name(f"{mlp}gate.weight", "into"),
  }


@dataclasses.dataclass(frozen=True)
class Layout:
  """How a checkpoint's tensor becomes a parameter.

  The tensor reshaped to `split` and then transposed by `axes` is the parameter.
  Three kinds occur. A checkpoint's matrices are [outputs, inputs]; of kind
  "into" the parameter is [inputs, *outputs], of kind "out_of" it is
  [*inputs, outputs]. Of kind "same" the parameter is the tensor itself.

  Attributes:
    tensor: shape of the tensor, or of the part of it, in the checkpoint.
    split: shape that it is reshaped to.
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


class Slot(NamedTuple):
  """Where a checkpoint holds a parameter, or one layer or expert of it.

  Attributes:
    name: of the tensor.
    shape: of the tensor.
    part: what of the tensor it is; () for all.
  """

  name: str
  shape: tuple[int, ...]
  part: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Leaf:
  """A parameter, and the checkpoint's tensors that it is made of.

  Attributes:
    path: path of the parameter in the model.
    shape: shape of the parameter.
    slots: the tensor at each leading index of the parameter: (), or the indices
      of a stacked layer and of an expert.
    layout: how each of these tensors becomes its part of the parameter.
  """

  path: tuple
  shape: tuple[int, ...]
  slots: dict[tuple[int, ...], Slot]
  layout: Layout

  @property
  def rest(self) -> str:
    return rest_of(self.path)


def rest_of(path: tuple) -> str:
  """Dotted name of a parameter; inside its layer, if a layer holds it."""
  return ".".join(map(str, path[2:] if path[0] == "layers" else path))


# The parameters that have one matrix for each expert.
EXPERTS = ("mlp.gate", "mlp.up", "mlp.down")


def leaves_of(
  config: ModelConfig, shapes: Mapping[tuple, Any], names: Names
) -> list[Leaf]:
  """Every parameter of a model, with its tensors.

  Args:
    config: of the model.
    shapes: an array or its shape for each path of a parameter.
    names: of a family's layout.
  """
  sizes = group_sizes(config)
  firsts = [0, *itertools.accumulate(sizes)]
  leaves = []
  for path, leaf in shapes.items():
    rest, in_layer = rest_of(path), path[0] == "layers"
    name = names[rest]
    lead = ()
    if in_layer and config.scan_layers:
      lead = (sizes[path[1]],)
    if rest in EXPERTS:
      lead = (*lead, config.moe.num_experts)
    layout = Layout.make(name.kind, tuple(leaf.shape[len(lead) :]))
    slots = {}
    for at in np.ndindex(lead):
      layer, expert = firsts[path[1]] if in_layer else 0, at
      if in_layer and config.scan_layers:
        layer, expert = layer + at[0], at[1:]
      shape, part = layout.tensor, ()
      if name.half is not None:
        outputs = shape[0]
        shape = (2 * outputs, *shape[1:])
        part = (slice(name.half * outputs, (name.half + 1) * outputs),)
      if name.stacked:
        shape, part = (config.moe.num_experts, *shape), (expert[0], *part)
      tensor = name.template.format(layer, *expert)
      slots[at] = Slot(tensor, tuple(shape), part)
    leaves.append(Leaf(path, tuple(leaf.shape), slots, layout))
  return leaves


class Family(abc.ABC):
  """A family of checkpoints: its configs, and the names of its tensors.

  Attributes:
    title: as people call it.
    model_types: values of config.json's model_type; the first is written.
    architectures: values of its architectures; the first is written.
    layouts: the names of the tensors, by the layout's name. `save` writes the
      first, unless told otherwise.
    nested: values of model_type in `text_config`, where config.json may hold
      the text model; none: it may not.
  """

  title: ClassVar[str]
  model_types: ClassVar[tuple[str, ...]]
  architectures: ClassVar[tuple[str, ...]]
  layouts: ClassVar[Mapping[str, Names]]
  nested: ClassVar[tuple[str, ...]] = ()

  @abc.abstractmethod
  def read(self, fields: Fields) -> ModelConfig:
    """The model that the fields describe; lists what is wrong in them.

    The result has no meaning, and may raise ValueError, if there are problems.
    """

  @abc.abstractmethod
  def describe(self, config: ModelConfig) -> dict[str, Any]:
    """The fields that describe a model, as transformers writes them."""

  def layout_of(self, names: Iterable[str]) -> str:
    """The layout that a checkpoint's tensor names have."""
    stacked = any(name.endswith(".experts.gate_up_proj") for name in names)
    if stacked and "stacked" in self.layouts:
      return "stacked"
    return next(iter(self.layouts))

  def refusal(self, config: ModelConfig, layout: str) -> str | None:
    """Why this family cannot hold a model; None if it can.

    The model's config must come back when it is described and read again.
    """
    del layout
    fields = Fields(self.describe(config))
    try:
      back = self.read(fields)
      fields.finish(self.title)
    except ValueError as error:
      return f"{self.title}: {error}"
    if fields.problems:
      return f"{self.title}: {'; '.join(fields.problems)}"
    was, now = canonical(config), canonical(back)
    changed = [
      field.name
      for field in dataclasses.fields(ModelConfig)
      if getattr(was, field.name) != getattr(now, field.name)
    ]
    if not changed:
      return None
    values = ", ".join(f"{name}={getattr(was, name)!r}" for name in changed)
    return f"{self.title} has no model with {values}"

  def identity(self) -> dict[str, Any]:
    return {
      "architectures": [self.architectures[0]],
      "model_type": self.model_types[0],
    }


def canonical(config: ModelConfig) -> ModelConfig:
  """A config without what does not change the model's results.

  These are options of the computation and of training, dtypes, and sizes of
  parts that no layer has.
  """
  index, moe = config.index, config.moe
  if "msa" not in config.kinds:
    index = IndexConfig()
  else:
    index = dataclasses.replace(index, score_precision="exact")
    if index.selection == "index":
      index = dataclasses.replace(index, detach_input=True, detach_teacher=True)
  if "moe" not in config.mlps:
    moe = MoEConfig()
  oai = config.activation == "swiglu_oai"
  return dataclasses.replace(
    config,
    layer_kinds=config.kinds,
    mlp_kinds=config.mlps,
    index=index,
    moe=moe,
    mlp_dim=config.mlp_dim if "dense" in config.mlps else 1,
    rope_dim=config.head_dim if config.rope_dim is None else config.rope_dim,
    qk_norm_over=config.qk_norm_over if config.qk_norm else "head",
    swiglu_alpha=config.swiglu_alpha if oai else 1.0,
    swiglu_limit=config.swiglu_limit if oai else 1.0,
    remat=False,
    scan_layers=False,
    dtype="float32",
    param_dtype="float32",
    implementation=None,
    gqa_implementation="xla",
  )


def read_sizes(fields: Fields, *, kv_heads: bool = True) -> dict[str, Any]:
  """The sizes that all families name alike.

  Args:
    fields: of the model.
    kv_heads: whether num_key_value_heads must be there; else it is by default
      num_attention_heads.
  """
  for key in ("is_encoder_decoder", "add_cross_attention"):
    fields.only(key, False)
  fields.read |= {"is_decoder"}
  heads = fields.size("num_attention_heads")
  eps = fields.number("rms_norm_eps", default=1e-6)
  return {
    "vocab_size": fields.size("vocab_size"),
    "num_layers": fields.size("num_hidden_layers"),
    "embed_dim": fields.size("hidden_size"),
    "num_heads": heads,
    "num_kv_heads": fields.size(
      "num_key_value_heads", default=None if kv_heads else heads
    ),
    "norm_eps": eps,
    "tie_embeddings": fields.flag("tie_word_embeddings", False),
  }


def describe_sizes(config: ModelConfig) -> dict[str, Any]:
  """The fields that `read_sizes` reads, and head_dim."""
  return {
    "vocab_size": config.vocab_size,
    "hidden_size": config.embed_dim,
    "num_hidden_layers": config.num_layers,
    "num_attention_heads": config.num_heads,
    "num_key_value_heads": config.num_kv_heads,
    "head_dim": config.head_dim,
    "rms_norm_eps": config.norm_eps,
    "tie_word_embeddings": config.tie_embeddings,
  }


def rope_factor(config: ModelConfig) -> float:
  """The share of a head's dims that rotate, from which `read_rope` gets their
  number."""
  dims = config.head_dim if config.rope_dim is None else config.rope_dim
  factor = dims / config.head_dim
  # The quotient may be rounded down, and the product is cut to an integer.
  if int(config.head_dim * factor) < dims:
    factor = math.nextafter(factor, 2)
  return factor
