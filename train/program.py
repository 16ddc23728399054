"""The compiled functions of a run: initial state, training step, evaluation.

A `Program` is built from a `ProgramConfig`, which holds exactly what the
compiled functions depend on. Everything else about a run (seed, learning
rates, phases, data) is passed in with each call, so runs with equal
`compile_key`s can share a program.

Parameters are a flat dict from dotted names to arrays, split into two groups:
the Index Branch, which only the KL loss trains, and the backbone. Each group
has its own gradient clipping, Adam moments and learning rate.
"""

import concurrent.futures
import contextlib
import dataclasses
import math
import pathlib
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as Pspec

from msa_jax import checkpoints, convert, mlp
from msa_jax import model as model_lib
from msa_jax.context import zigzag_order
from msa_jax.losses import head_loss
from msa_jax.model_config import IndexConfig, ModelConfig
from train import config as config_lib
from train import data as data_lib
from train import pretrained
from train.checkpoint import Checkpoints, read_config

_AXES = ("data", "fsdp", "expert", "tensor", "context")
_GROUPS = ("backbone", "index")
# Muon's updates of a matrix get this root mean square, about that of AdamW's,
# so that both take the same learning rate.
_ADAM_RMS = 0.2
_LOWERING = threading.Lock()
# Compiler options by platform. On a GPU, XLA would also compile and time Triton
# kernels for every matrix product, and then mostly choose cuBLAS's. Without
# them a GQA step of lm73m_16k compiles in 6 instead of 16 s and an MSA step in
# 38 instead of 48 s, and steps take as long (one H200, jax 0.11.2).
COMPILER_OPTIONS: dict[str, dict[str, Any]] = {
  "gpu": {"xla_gpu_enable_triton_gemm": False}
}
Params = dict[str, jax.Array]


class TrainState(NamedTuple):
  """The state that a checkpoint holds.

  Attributes:
    params: parameters by dotted name.
    opt: the optimiser state of each parameter group.
  """

  params: Params
  opt: dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramConfig:
  """Everything that the compiled functions of a run depend on.

  A program sees nothing of a run but this. Two runs whose program configs are
  equal therefore compile to the same functions: equality is the compile key.
  Learning rates are not here because they are operands of the training step.
  """

  model: ModelConfig
  mesh: config_lib.MeshConfig

  batch_size: int
  grad_accumulation: int
  context: int

  kl_weight: float
  """lambda: the loss is LM + lambda * the sum of the layers' KL."""

  # As in `OptimizerConfig`.
  algorithm: str
  index_algorithm: str | None
  beta1: float
  beta2: float
  eps: float
  weight_decay: float
  clip_norm: float
  index_clip_norm: float

  router_bias_rate: float
  """Step of the MoE routers' choice biases, as in `OptimizerConfig`."""

  freeze_backbone: bool = False
  """Whether the warm-up trains the Index Branch alone."""

  packed: bool = False
  """Whether batch rows hold several documents (see `data.is_packed`)."""

  eval_window: int | None = None
  """As in `RunConfig`."""


def compile_key(run: config_lib.RunConfig) -> ProgramConfig:
  """The part of a run's config that its compiled functions depend on."""
  optimizer = run.optimizer
  return ProgramConfig(
    model=run.model,
    mesh=run.mesh,
    batch_size=run.batch_size,
    grad_accumulation=run.grad_accumulation,
    context=run.context,
    kl_weight=run.recipe.kl_weight,
    freeze_backbone=run.recipe.freeze_backbone,
    algorithm=optimizer.algorithm,
    index_algorithm=optimizer.index_algorithm,
    beta1=optimizer.beta1,
    beta2=optimizer.beta2,
    eps=optimizer.eps,
    weight_decay=optimizer.weight_decay,
    clip_norm=optimizer.clip_norm,
    index_clip_norm=optimizer.index_clip_norm,
    router_bias_rate=optimizer.router_bias_rate,
    packed=data_lib.is_packed(run.data),
    eval_window=run.eval_window,
  )


class Program:
  """The compiled functions of a `ProgramConfig` on a mesh of devices."""

  def __init__(self, config: ProgramConfig):
    self.config = config
    self.model_config = config.model
    shape = config.mesh.shape(jax.device_count())
    self._check_mesh(shape)
    devices = jax.devices()[: math.prod(shape)]
    self.mesh = jax.make_mesh(
      shape,
      _AXES,
      devices=devices,
      axis_types=(jax.sharding.AxisType.Auto,) * len(_AXES),
    )
    self.sharding = model_lib.Sharding() if self.mesh.size > 1 else None
    self.replicated = NamedSharding(self.mesh, Pspec())
    with self.context():
      model = nnx.eval_shape(lambda: self._make_model(0))
      self._graphdef, variables = nnx.split(model, nnx.Param)
      specs = nnx.to_flat_state(nnx.get_partition_spec(variables))
    flat = list(nnx.to_flat_state(variables))
    self._paths = {_name(path): path for path, _ in flat}
    self.shapes = {
      _name(path): jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
      for path, leaf in flat
    }
    self._param_shardings = {
      _name(path): NamedSharding(self.mesh, leaf.get_value())
      for path, leaf in specs
    }
    self.groups = {
      name: _GROUPS[model_lib.is_index_param(path)]
      for name, path in self._paths.items()
    }
    self.has_index = "index" in self.groups.values()
    self._oracle: tuple[Any, dict[str, tuple]] | None = None
    # Sorted by path, which is the order of the layers.
    biases = [path for path in self._paths.values() if "choice_bias" in path]
    self._choice_biases = [_name(path) for path in sorted(biases)]
    self._transforms = self._make_transforms()
    with self.context():
      state = jax.eval_shape(lambda: self._fresh_state(0))

    def sharding(path: tuple, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
      # Of an optimizer's state, what has a parameter's name and shape.
      name = str(getattr(path[-1], "key", ""))
      if name in self.shapes and leaf.shape == self.shapes[name].shape:
        return self._param_shardings[name]
      return self.replicated

    self.state_shardings = jax.tree_util.tree_map_with_path(sharding, state)
    self.abstract_state = jax.tree.map(
      lambda leaf, sharding: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=sharding
      ),
      state,
      self.state_shardings,
    )
    self._compiled: dict[tuple[str, str], Any] = {}
    self._memory: dict[tuple[str, str], int | None] = {}
    # Of each function and phase: to trace and lower it, and to compile it.
    self.compile_seconds: dict[tuple[str, str], tuple[float, float]] = {}
    self._jit_init = jax.jit(
      self._fresh_state, out_shardings=self.state_shardings
    )
    self._jit_step = jax.jit(
      self._step,
      static_argnames="phase",
      donate_argnums=0,
      out_shardings=(self.state_shardings, self.replicated),
    )
    self._jit_eval = jax.jit(
      self._evaluate,
      static_argnames="phase",
      out_shardings=self.replicated,
    )
    self._jit_layer_metrics = jax.jit(
      self._layer_metrics,
      static_argnames="phase",
      out_shardings=self.replicated,
    )
    self._jit_choose = jax.jit(
      self._choose,
      static_argnames="phase",
      out_shardings=self.replicated,
    )

  def _check_mesh(self, shape: tuple[int, int, int, int, int]) -> None:
    data, fsdp, expert, tensor, context = shape
    model = self.model_config
    moe = model.moe if "moe" in model.mlps else None
    if jax.process_count() > 1 and math.prod(shape) != jax.device_count():
      raise ValueError(
        f"mesh (data={data}, fsdp={fsdp}, expert={expert}, tensor={tensor},"
        f" context={context}) uses {math.prod(shape)} devices:"
        f" {jax.process_count()} processes need all {jax.device_count()}"
        " (mesh.data=-1 takes what is left)."
      )
    wide = jnp.dtype("float64").name in (model.dtype, model.param_dtype)
    if wide and not jax.config.jax_enable_x64:
      raise ValueError(
        "model.dtype or model.param_dtype is 'float64': wanted JAX_ENABLE_X64=1"
        " in the environment."
      )
    for name, size, axis, parts in (
      ("embed_dim", model.embed_dim, "fsdp", fsdp),
      ("mlp_dim", model.mlp_dim, "tensor", tensor),
      ("moe.num_experts", moe and moe.num_experts, "expert", expert),
      ("moe.expert_dim", moe and moe.expert_dim, "tensor", tensor),
      ("moe.shared_dim", moe and moe.shared_dim, "tensor", tensor),
    ):
      if (size or 0) % parts:
        raise ValueError(
          f"model.{name}={size} cannot be split over mesh.{axis}={parts}."
        )
    rows = self.config.batch_size // self.config.grad_accumulation
    if moe is None and expert > 1:
      raise ValueError(
        f"mesh.expert={expert}: wanted 1 for a model without MoE layers"
        f" (model.mlp_kinds={model.mlp_kinds})."
      )
    if rows % (data * fsdp * expert):
      raise ValueError(
        f"batch_size / grad_accumulation = {rows} batch rows cannot be split"
        f" over mesh.data * mesh.fsdp * mesh.expert = {data * fsdp * expert}."
      )
    if self.model_config.num_kv_heads % tensor:
      raise ValueError(
        f"model.num_kv_heads={self.model_config.num_kv_heads} cannot be split"
        f" over mesh.tensor={tensor}."
      )
    if context > 1 and self.config.context % (2 * context):
      raise ValueError(
        f"context={self.config.context} tokens cannot be split over"
        f" mesh.context={context}: wanted a multiple of {2 * context}, two"
        " pieces for each of its devices."
      )

  def context(self):
    """The mesh that the model's operations see; none on one device."""
    if self.mesh.size == 1:
      return contextlib.nullcontext()
    return jax.set_mesh(self.mesh)

  # --- Parameters and optimiser ---------------------------------------------

  def _make_model(self, seed: int | jax.Array) -> model_lib.DecoderLM:
    # Sides of one seed start from the same backbone: see DecoderLM.
    return model_lib.DecoderLM(
      self.model_config,
      rngs=nnx.Rngs(jax.random.key(seed)),
      sharding=self.sharding,
    )

  def merge(self, params: Params) -> model_lib.DecoderLM:
    """The model with these parameters."""
    items = [(path, params[name]) for name, path in self._paths.items()]
    return nnx.merge(self._graphdef, nnx.from_flat_state(items))

  def merge_oracle(self, params: Params) -> model_lib.DecoderLM:
    """The model with these parameters, whose layers choose the blocks with the
    most dense attention. It has no Index Branch."""
    if self._oracle is None:
      index = IndexConfig(
        block_size=self.model_config.index.block_size,
        top_k=self.model_config.index.top_k,
        selection="oracle",
      )
      config = dataclasses.replace(self.model_config, index=index)
      graphdef, shapes, _ = model_lib.abstract_model(config, self.sharding)
      self._oracle = graphdef, {_name(path): path for path in shapes}
    graphdef, paths = self._oracle
    items = [(path, params[name]) for name, path in paths.items()]
    return nnx.merge(graphdef, nnx.from_flat_state(items))

  def group(self, tree: dict[str, Any], name: str) -> dict[str, Any]:
    """The entries of one parameter group."""
    return {k: v for k, v in tree.items() if self.groups[k] == name}

  def _make_transforms(self) -> dict[str, optax.GradientTransformation]:
    config = self.config
    return {
      "backbone": self._transform(
        "backbone", config.algorithm, config.clip_norm
      ),
      "index": self._transform(
        "index",
        config.index_algorithm or config.algorithm,
        config.index_clip_norm,
      ),
    }

  def _transform(
    self, group: str, algorithm: str, clip_norm: float
  ) -> optax.GradientTransformation:
    """Gradients to directions, which `_step` scales by the learning rate and
    subtracts."""
    config = self.config

    def decayed(tree: Any) -> dict[str, bool]:
      return {name: _decays(name) for name in tree}

    def axes(tree: Any) -> dict[str, Any]:
      return {name: self._matrix(name) for name in tree}

    def labels(tree: Any) -> dict[str, str]:
      return {n: "matrix" if self._matrix(n) else "rest" for n in tree}

    clip = optax.clip_by_global_norm(clip_norm)
    if ":" in algorithm:
      made = config_lib.import_function("optimizer.algorithm", algorithm)
      own = made(self._optimizer_config(), group)
      if not isinstance(own, optax.GradientTransformation):
        raise ValueError(
          f"optimizer.algorithm={algorithm!r} gave a {type(own).__name__}:"
          " wanted an optax.GradientTransformation."
        )
      return optax.chain(clip, own, optax.scale(-1.0))
    scale = optax.scale_by_adam(config.beta1, config.beta2, config.eps)
    if algorithm == "muon":
      # optax's Muon would give the other parameters Nesterov's momentum.
      muon = optax.contrib.muon(
        learning_rate=1.0,
        muon_weight_dimension_numbers=axes,
        consistent_rms=_ADAM_RMS,
      )
      scale = optax.partition(
        {"matrix": optax.chain(muon, optax.scale(-1.0)), "rest": scale},
        labels,
      )
    decay = optax.add_decayed_weights(config.weight_decay, mask=decayed)
    return optax.chain(clip, scale, decay)

  def _optimizer_config(self) -> config_lib.OptimizerConfig:
    """The fields that the program sees, for an optimizer of a user's own."""
    fields = dataclasses.fields(config_lib.OptimizerConfig)
    names = {field.name for field in fields}
    seen = dataclasses.asdict(self.config)
    return config_lib.OptimizerConfig(
      **{name: value for name, value in seen.items() if name in names}
    )

  def _matrix(self, name: str) -> Any:
    """The input and output axes of a matrix that Muon trains; None for other
    parameters."""
    rank = len(self.shapes[name].shape)
    if not name.startswith("layers.") or not name.endswith("kernel"):
      return None
    stacked = int(self.model_config.scan_layers)
    if "attention" not in name:
      # The last two axes; experts and stacked layers are separate matrices.
      reduction, output = [rank - 2], [rank - 1]
    elif ".out." in name:
      reduction, output = list(range(stacked, rank - 1)), [rank - 1]
    else:
      reduction, output = [stacked], list(range(stacked + 1, rank))
    return optax.contrib.MuonDimensionNumbers(reduction, output)

  def _state(self, params: Params) -> TrainState:
    opt = {g: self._transforms[g].init(self.group(params, g)) for g in _GROUPS}
    return TrainState(params, opt)

  def _fresh_state(self, seed: int | jax.Array) -> TrainState:
    return self._state(_flatten_model(self._make_model(seed)))

  def init(self, seed: int) -> TrainState:
    """The initial state that a seed gives."""
    with self.context():
      return self._jit_init(np.uint32(seed))

  def start_from_run(
    self, recipe: config_lib.RecipeConfig, seed: int
  ) -> TrainState:
    """The state of MSA-CPT's first step, made from another run's checkpoint.

    The backbone keeps its parameters, its Adam moments and their step count.
    After a GQA run the index branch is new, and so are its moments; after a
    trunk (index_init="trained") they go on too.

    Args:
      recipe: says which run folder and step to read (init_from, init_step)
        and how the index projections start (index_init).
      seed: of the index projections that start fresh.

    Raises:
      ValueError: there is no such run or checkpoint, or it belongs to another
        model.
    """
    assert recipe.init_from is not None and recipe.init_step is not None
    folder = pathlib.Path(recipe.init_from)
    source = read_config(folder)
    if source is None:
      raise ValueError(
        f"recipe.init_from={recipe.init_from!r}: no run folder (it has no"
        " config.json)."
      )
    trained = recipe.index_init == "trained"
    theirs = source["optimizer"].get("algorithm", "adamw")
    algorithms = [("algorithm", theirs, self.config.algorithm)]
    if trained:
      theirs = source["optimizer"].get("index_algorithm") or theirs
      mine = self.config.index_algorithm or self.config.algorithm
      algorithms.append(("index_algorithm", theirs, mine))
    for name, theirs, mine in algorithms:
      if theirs != mine:
        raise ValueError(
          f"recipe.init_from={recipe.init_from!r} has optimizer.{name}="
          f"{theirs!r}, whose state optimizer.{name}={mine!r} cannot continue:"
          " wanted the same."
        )
    if trained != ("msa" in source["model"]["layer_kinds"]):
      raise ValueError(
        f"recipe.index_init={recipe.index_init!r}: recipe.init_from="
        f"{recipe.init_from!r} has layers of the kinds"
        f" {source['model']['layer_kinds']}. Wanted a run with an Index Branch"
        " for 'trained', and one without for the other values."
      )
    if trained:
      theirs = config_lib.from_dict(config_lib.RecipeConfig, source["recipe"])
      if theirs.first_sparse_step <= recipe.init_step:
        raise ValueError(
          f"recipe.init_step={recipe.init_step}: recipe.init_from="
          f"{recipe.init_from!r} is sparse from step"
          f" {theirs.first_sparse_step} on. Wanted a step before."
        )
    reader = self
    if not trained:
      # Scanned layers are stored as stacks; the conversion takes either form.
      twin = dataclasses.replace(
        dense_twin(self.model_config),
        scan_layers=source["model"].get("scan_layers", False),
      )
      reader = Program(dataclasses.replace(self.config, model=twin))
    found = read_state(reader, folder, recipe.init_step)
    assert found is not None
    state, _ = found
    # Reading the state has compared the parameters' shapes. Fields such as
    # rope_theta change the model without changing any shape.
    ignored = ("implementation", "gqa_implementation", "remat", "dtype")
    changed = config_lib.differences(
      source["model"],
      config_lib.to_dict(reader.model_config),
      ignored if trained else ("index", *ignored),
    )
    if changed:
      raise ValueError(
        f"recipe.init_from={recipe.init_from!r} is of another model:\n  "
        + "\n  ".join(changed)
      )
    return state if trained else self._with_index(state, reader, recipe, seed)

  def _with_index(
    self,
    state: TrainState,
    dense: "Program",
    recipe: config_lib.RecipeConfig,
    seed: int,
  ) -> TrainState:
    """A GQA run's state with a new index branch."""

    def graft(state: TrainState) -> TrainState:
      def to_msa(
        tree: Params, index_init: convert.IndexInit = "random"
      ) -> Params:
        model = convert.to_msa(
          dense.merge(tree),
          self.model_config,
          rngs=nnx.Rngs(jax.random.key(seed)),
          sharding=self.sharding,
          index_init=index_init,
        )
        return _flatten_model(model)

      assert recipe.index_init != "trained"
      fresh = self._state(to_msa(state.params, recipe.index_init))

      def moved(new: Any, old: Any) -> Any:
        """A leaf of the optimizer's state, or its dict by parameter name."""
        if not isinstance(new, dict):
          return old
        # The conversion wants all parameters; some have no such state.
        full = {
          name: old[name] if isinstance(old.get(name), jax.Array) else value
          for name, value in state.params.items()
        }
        own = to_msa(full)
        return {
          name: own[name] if isinstance(leaf, jax.Array) else leaf
          for name, leaf in new.items()
        }

      # Moments have the parameters' names and shapes, so the same conversion
      # puts them in place; only the backbone's are kept.
      backbone = jax.tree.map(
        moved,
        fresh.opt["backbone"],
        state.opt["backbone"],
        is_leaf=lambda x: isinstance(x, dict),
      )
      return TrainState(fresh.params, fresh.opt | {"backbone": backbone})

    with self.context():
      return jax.jit(graft, out_shardings=self.state_shardings)(state)

  def start_from_pretrained(
    self, recipe: config_lib.RecipeConfig, seed: int
  ) -> TrainState:
    """The state of the first step of a run that starts from a trained model.

    Args:
      recipe: says which (pretrained), and how the index projections start
        (index_init).
      seed: of the index projections that start from random values.

    Raises:
      ValueError: it cannot be read, or is another model than the run's.
    """
    assert recipe.pretrained is not None and recipe.index_init != "trained"
    config = self.model_config
    folder = pretrained.check_model(recipe.pretrained, config)
    model = checkpoints.load(
      folder,
      dtype=config.param_dtype,
      mesh=self.mesh if self.mesh.size > 1 else None,
      scan_layers=config.scan_layers,
    )
    with self.context():
      if "msa" in config.kinds:
        model = convert.to_msa(
          model,
          # None means as many as a loaded model names.
          dataclasses.replace(config, rope_dim=model.config.rope_dim),
          rngs=nnx.Rngs(jax.random.key(seed)),
          sharding=self.sharding,
          index_init=recipe.index_init,
        )

      def state(params: Params) -> TrainState:
        # Routers keep the checkpoint's dtype when it is loaded.
        dtypes = self.abstract_state.params
        return self._state(
          {name: x.astype(dtypes[name].dtype) for name, x in params.items()}
        )

      return jax.jit(state, out_shardings=self.state_shardings)(
        _flatten_model(model)
      )

  # --- What is computed -----------------------------------------------------

  def loss(
    self,
    params: Params,
    tokens: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    kl_weight: float | jax.Array,
    segment_ids: jax.Array | None = None,
    *,
    phase: str,
    groups: Sequence[str] = _GROUPS,
  ):
    """LM loss + kl_weight * the sum of the layers' KL, of a batch in parts.

    Args:
      params: parameters by name.
      tokens: int32 [part, batch row, context]. As the targets and weights, in
        zigzag order where mesh.context splits them, see `msa_jax.context`.
      targets: the next token of each, int32 [part, batch row, context].
      weights: float32 [part, batch row, context], how much each target
        counts; the LM loss is the weighted mean.
      kl_weight: lambda.
      segment_ids: int32 [part, batch row, context], documents of packed rows,
        always in the order of the sequence; None for plain ones.
      phase: "dense", "warmup" or "sparse".
      groups: the parameter groups to differentiate.

    Returns:
      ((loss, {"loss": LM loss, "kl": sum of KL}), gradients). They do not
      depend on the number of parts. With MoE layers the dict also has "load",
      [MoE layer, X]: how many tokens chose each expert.
    """
    count = jnp.maximum(jnp.sum(weights), 1)
    parts = tokens.shape[0]
    inputs = jnp.ones(())
    if segment_ids is not None:
      inputs = jnp.maximum(jnp.sum(segment_ids > 0), 1)

    trained = {n: x for n, x in params.items() if self.groups[n] in groups}

    def part_loss(trained, tokens, targets, weights, segment_ids):
      model = self.merge({**params, **trained})
      out = self._apply(
        model,
        tokens,
        segment_ids,
        phase=phase,
        with_kl=self.has_index,
        with_logits=False,
        zigzag=True,
      )
      lm = head_loss(
        out.hidden,
        model.head_weight(),
        targets,
        weights,
        sharding=self.sharding,
      )
      lm = lm / count
      kl = jnp.sum(out.kl)
      if segment_ids is None:
        kl = kl / parts
      else:
        # A mean over the part's tokens that are no padding.
        kl = kl * (jnp.sum(segment_ids > 0) / inputs)
      metrics = {"loss": lm, "kl": kl}
      if out.experts is not None:
        metrics["load"] = mlp.expert_load(
          out.experts[np.asarray(self.moe_layers)],
          self.model_config.moe.num_experts,
        )
      return lm + kl_weight * kl, metrics

    grad = jax.value_and_grad(part_loss, has_aux=True)
    xs = (tokens, targets, weights, segment_ids)
    first = jax.tree.map(lambda x: x[0], xs)
    if parts == 1:
      return grad(trained, *first)

    def add(total, part):
      return jax.tree.map(jnp.add, total, grad(trained, *part)), None

    shapes = jax.eval_shape(grad, trained, *first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(add, zeros, xs)[0]

  def _apply(
    self,
    model,
    tokens: jax.Array,
    segment_ids: jax.Array | None,
    *,
    phase: str,
    **kwargs,
  ):
    if segment_ids is not None:
      kwargs["segment_ids"] = segment_ids
      kwargs["max_segments"] = data_lib.max_documents(self.config.context)
    return model(
      tokens,
      phase="warmup" if phase in ("warmup", "window") else "sparse",
      **kwargs,
    )

  def _step(
    self,
    state: TrainState,
    tokens,
    targets,
    weights,
    rates: dict[str, jax.Array],
    segment_ids=None,
    *,
    phase: str,
  ):
    frozen = self.config.freeze_backbone and phase == "warmup"
    groups = ("index",) if frozen else _GROUPS
    (_, metrics), grads = self.loss(
      state.params,
      tokens,
      targets,
      weights,
      self.config.kl_weight,
      segment_ids,
      phase=phase,
      groups=groups,
    )
    params, opt = dict(state.params), dict(state.opt)
    for group in groups:
      updates: Any
      updates, opt[group] = self._transforms[group].update(
        self.group(grads, group),
        state.opt[group],
        self.group(state.params, group),
      )
      for name, update in updates.items():
        step = (rates[group] * update).astype(params[name].dtype)
        params[name] = params[name] - step
    load = metrics.pop("load", None)
    if load is not None and not frozen:
      self._balance(params, load)
    state = TrainState(params, opt)
    norm = optax.tree.norm
    metrics |= {
      "grad_norm": norm(self.group(grads, "backbone")),
      "index_grad_norm": norm(self.group(grads, "index")),
    }
    # The state is checked too, so that a checkpoint never holds NaN or inf.
    watched = [*metrics.values(), norm(params), norm(opt)]
    metrics["finite"] = jnp.all(jnp.isfinite(jnp.stack(watched)))
    if load is not None:
      metrics["load"] = load
    return state, metrics

  def _balance(self, params: Params, load: jax.Array) -> None:
    """Moves the routers' choice biases towards equal load."""
    rate = self.config.router_bias_rate
    first = 0
    for name in self._choice_biases:
      bias = params[name]
      count = math.prod(bias.shape[:-1])
      part = load[first : first + count].reshape(bias.shape)
      params[name] = mlp.balance(bias, part, rate)
      first += count

  def _evaluate(
    self, params, tokens, loss_mask, segment_ids=None, *, phase: str
  ):
    """Loss of each target, and which targets the model predicts right.

    The phase "oracle" is "sparse" with the best possible choice of blocks, and
    "window" is dense attention to pieces of rows (see
    `evaluate.window_metrics`).
    Here, and in the functions below, tokens and segment_ids are [batch row,
    context + 1], in the order of the sequence.
    """
    merge = self.merge_oracle if phase == "oracle" else self.merge
    out = self._apply(merge(params), *_inputs(tokens, segment_ids), phase=phase)
    assert out.logits is not None
    losses = _cross_entropy(out.logits, tokens) * loss_mask
    right = jnp.argmax(out.logits, axis=-1) == tokens[:, 1:]
    return losses, right

  def _layer_metrics(self, params, tokens, segment_ids=None, *, phase: str):
    """KL of each layer, and its chosen blocks and recalls."""
    out = self._apply(
      self.merge(params),
      *_inputs(tokens, segment_ids),
      phase=phase,
      with_kl=self.has_index,
      with_selection=True,
    )
    return out.kl, out.selection

  def _choose(self, params, tokens, segment_ids=None, *, phase: str):
    """The blocks that each layer chooses. Recalls are not returned, so XLA
    drops them; they cost more than the rest of the forward pass."""
    _, selection = self._layer_metrics(params, tokens, segment_ids, phase=phase)
    assert selection is not None
    return selection.block_indices

  # --- Calls from the host --------------------------------------------------

  def put(
    self, array: np.ndarray, *, parts: bool = False, zigzag: bool = False
  ) -> jax.Array:
    """Places an array of batch rows on the mesh, split over its devices.

    Args:
      array: [batch row, ...], the same on every process; a process copies
        only what its own devices hold.
      parts: cuts the batch rows into the parts of gradient accumulation first.
      zigzag: the array is [batch row, context]. Where mesh.context splits the
        tokens, it becomes one in zigzag order, and a device gets its own pieces
        alone. Else every device has whole rows.
    """
    rows = ("data", "fsdp", "expert")
    order = None
    if zigzag and self.mesh.shape["context"] > 1:
      order = zigzag_order(array.shape[1], self.mesh.shape["context"])
    spec = Pspec(rows) if order is None else Pspec(rows, "context")
    if parts:
      count = self.config.grad_accumulation
      array = array.reshape(count, -1, *array.shape[1:])
      spec = Pspec(None, *spec)

    def held(index: Any) -> np.ndarray:
      if order is None:
        return array[index]
      *whole, tokens = index
      return array[*whole][..., order[tokens]]

    return jax.make_array_from_callback(
      array.shape, NamedSharding(self.mesh, spec), held
    )

  @property
  def compiler_options(self) -> dict[str, Any] | None:
    """Those of `COMPILER_OPTIONS` for this program's devices."""
    return COMPILER_OPTIONS.get(self.mesh.devices.flat[0].platform)

  def compile(self, phase: str, function: str = "step") -> int | None:
    """Compiles a function for a phase, unless that was done before.

    Args:
      phase: "dense", "warmup" or "sparse"; "oracle" or "window" for "evaluate".
      function: "step", "evaluate", "layer_metrics" or "choose".

    Returns:
      The bytes it needs on one device; None if the compiler does not say.
    """
    key = function, phase
    if key not in self._compiled:
      with self.context():
        _, lowered, lowering = lower(lambda: self.trace(phase, function))
      start = time.perf_counter()
      self._compiled[key] = lowered.compile(self.compiler_options)
      self.compile_seconds[key] = lowering, time.perf_counter() - start
      # Kept: asking takes tens of milliseconds of the host.
      self._memory[key] = _bytes_needed(self._compiled[key])
    return self._memory[key]

  def trace(self, phase: str, function: str = "step") -> jax.stages.Traced:
    """A function as `compile` has it, before it is lowered."""
    config, params = self.config, self.abstract_state.params
    with self.context():
      if function == "step":
        rows = np.zeros((config.batch_size, config.context + 1), np.int32)
        weights = rows[:, 1:].astype(np.float32)
        rates: dict[str, float] = dict.fromkeys(_GROUPS, 0.0)
        return self._jit_step.trace(
          self.abstract_state,
          *self._step_operands(
            rows, weights, rates, rows if config.packed else None
          ),
          phase=phase,
        )
      length = self.window_piece if phase == "window" else config.context
      rows = np.zeros((self.eval_shape["batch_size"], length + 1), np.int32)
      tokens = self.put(rows)
      ids = [tokens] if config.packed else []
      if function == "evaluate":
        mask = self.put(rows[:, 1:] == 0)
        return self._jit_eval.trace(params, tokens, mask, *ids, phase=phase)
      jitted = {
        "layer_metrics": self._jit_layer_metrics,
        "choose": self._jit_choose,
      }
      return jitted[function].trace(params, tokens, *ids, phase=phase)

  def call(self, function: str, phase: str, *operands):
    """Calls a function of `compile`, compiling it first if need be."""
    self.compile(phase, function)
    with self.context():
      return self._compiled[function, phase](*operands)

  def step(
    self,
    state: TrainState,
    tokens: np.ndarray,
    weights: np.ndarray,
    rates: Mapping[str, float],
    segment_ids: np.ndarray | None = None,
    *,
    phase: str,
  ) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimiser step; returns before the device has finished it.

    Args:
      state: its buffers are reused, so it cannot be read afterwards.
      tokens: int32 [batch row, context + 1].
      weights: float32 [batch row, context], how much each target counts.
      rates: learning rate of each parameter group.
      segment_ids: int32 [batch row, context + 1], for a packed program.
      phase: "dense", "warmup" or "sparse".

    Returns:
      The new state, and the step's metrics as scalars on the device.
    """
    return self.call(
      "step",
      phase,
      state,
      *self._step_operands(tokens, weights, rates, segment_ids),
    )

  def _step_operands(
    self,
    tokens: np.ndarray,
    weights: np.ndarray,
    rates: Mapping[str, float],
    segment_ids: np.ndarray | None,
  ) -> tuple:
    """A batch on the mesh as `_step` takes it: each device holds its tokens,
    their targets and weights, and nothing of them moves in the step."""
    ids = None if segment_ids is None else segment_ids[:, :-1]
    return (
      *(
        self.put(array, parts=True, zigzag=True)
        for array in (tokens[:, :-1], tokens[:, 1:], weights)
      ),
      {group: np.float32(rates[group]) for group in _GROUPS},
      *self.put_segments(ids, parts=True),
    )

  def put_segments(
    self, segment_ids: np.ndarray | None, *, parts: bool = False
  ) -> tuple[jax.Array, ...]:
    """The last operand of a packed program's functions; none of a plain one's.

    Every device has the ids of whole rows, because a query's segment decides
    which keys of other devices it sees.

    Raises:
      ValueError: the batch is packed and the program not, or the reverse.
    """
    if self.config.packed != (segment_ids is not None):
      raise ValueError(
        f"segment_ids: wanted {'an array' if self.config.packed else 'None'}"
        f" for a program with packed={self.config.packed}."
      )
    return () if segment_ids is None else (self.put(segment_ids, parts=parts),)

  @property
  def eval_shape(self) -> dict[str, int]:
    """Size of a held-out batch, which is that of one part of a training
    batch."""
    rows = self.config.batch_size // self.config.grad_accumulation
    return {"batch_size": rows, "context": self.config.context}

  @property
  def window_piece(self) -> int:
    """Tokens of a piece of a row in the evaluation with `eval_window`: the
    window and at least a quarter more, which the mesh can split, at most the
    context."""
    window = self.config.eval_window
    assert window is not None
    split = self.mesh.shape["context"]
    unit = 2 * split if split > 1 else 1
    piece = -(-(window + max(window // 4, 1)) // unit) * unit
    return min(piece, self.config.context)

  @property
  def msa_layers(self) -> list[int]:
    """Numbers of the layers with sparse attention."""
    kinds = enumerate(self.model_config.kinds)
    return [layer for layer, kind in kinds if kind == "msa"]

  @property
  def moe_layers(self) -> list[int]:
    """Numbers of the layers with a mixture of experts."""
    kinds = enumerate(self.model_config.mlps)
    return [layer for layer, kind in kinds if kind == "moe"]

  def count_parameters(self) -> dict[str, int]:
    """Numbers of parameters: "total", "embedding" (token embedding and output
    projection) and "index" (the Index Branch)."""
    sizes = {n: math.prod(shape.shape) for n, shape in self.shapes.items()}
    return {
      "total": sum(sizes.values()),
      "embedding": sum(
        size
        for name, size in sizes.items()
        if name.startswith(("embed.", "head."))
      ),
      "index": sum(self.group(sizes, "index").values()),
    }


def train_step(
  program: Program,
  run: config_lib.RunConfig,
  state: TrainState,
  batch: data_lib.Batch,
  step: int,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """`Program.step` with the loss weights, learning rates and phase that a run
  has in a step (counted from 1)."""
  batch.check_ids(program.model_config.vocab_size)
  return program.step(
    state,
    batch.tokens,
    data_lib.loss_weights(run.data, batch),
    run.learning_rates(step),
    batch.segment_ids,
    phase=run.phase(step),
  )


class CompiledTask(NamedTuple):
  """What the runs of a task share.

  Attributes:
    source: the opened data.
    programs: compiled programs by compile key.
  """

  source: data_lib.Source
  programs: dict[ProgramConfig, Program]


def lower(
  trace: Callable[[], jax.stages.Traced],
) -> tuple[jax.stages.Traced, jax.stages.Lowered, float]:
  """Traces and lowers, one program at a time; and the seconds that it took.

  Tracing and lowering run Python code, which several threads only slow down.
  With one thread in here at a time, the first programs already compile in
  XLA's own threads while the others are still being lowered.
  """
  with _LOWERING:
    start = time.perf_counter()
    traced = trace()
    lowered = traced.lower()
    return traced, lowered, time.perf_counter() - start


def functions_called(run: config_lib.RunConfig) -> tuple[str, ...]:
  """Names of the program's functions that a run calls."""
  names = ("step", "evaluate")
  if run.uses_msa:
    names += ("layer_metrics",)
  if run.goes_sparse and data_lib.asks_for_facts(run.data):
    names += ("choose",)
  return names


def check_data(config: config_lib.RunConfig, source: data_lib.Source) -> None:
  """Refuses data that a run cannot be trained on.

  Raises:
    ValueError: ids are beyond the model's vocabulary, batches have another form
      than the run's, or there is too little text.
  """
  if source.vocab_size > config.model.vocab_size:
    raise ValueError(
      f"model.vocab_size={config.model.vocab_size}: the data have"
      f" {source.vocab_size} different tokens. Wanted at least as many (--set"
      f" model.vocab_size={source.vocab_size})."
    )
  # Raises if the training data cannot fill the context.
  batch = source.train_batch(
    config.seed, 0, batch_size=1, context=config.context
  )
  packed = data_lib.is_packed(config.data)
  shape = (1, config.context + 1)
  if batch.tokens.shape != shape or packed != (batch.segment_ids is not None):
    raise ValueError(
      f"data: a batch has tokens {batch.tokens.shape} and segment_ids"
      f" {'None' if batch.segment_ids is None else batch.segment_ids.shape}:"
      f" wanted tokens {shape} (batch_size, context + 1), and"
      f" {'segment_ids' if packed else 'no segment_ids'}."
    )
  rows = config.batch_size // config.grad_accumulation
  there = source.num_eval_batches(batch_size=rows, context=config.context)
  if there is not None and there < config.eval_batches:
    fewer = f"--set eval_batches={there} or " if there else ""
    raise ValueError(
      f"eval_batches={config.eval_batches}: the held-out data give {there}"
      f" batches of {rows} batch rows with context={config.context}. Wanted"
      f" {fewer}more held-out data (of text, --set data.held_out=...) or a"
      " shorter context."
    )


def open_data(runs: Sequence[config_lib.RunConfig]) -> data_lib.Source:
  """Opens the data of a task's runs, and checks that each can use them.

  It comes before programs are compiled, which may take minutes.

  Raises:
    ValueError: the data cannot be opened or do not fit a run.
  """
  source = data_lib.load(runs[0].data)
  for run in runs:
    check_data(run, source)
  return source


def compile_task(
  runs: Sequence[config_lib.RunConfig], source: data_lib.Source
) -> CompiledTask:
  """Compiles all functions that the runs of a task call."""
  programs: dict[ProgramConfig, Program] = {}
  calls = []
  for run in runs:
    key = compile_key(run)
    if key not in programs:
      programs[key] = Program(key)
    calls += [
      (programs[key], phase, function)
      for phase in run.phases()
      for function in functions_called(run)
    ]
    if run.dense_at_end:
      calls.append((programs[key], "warmup", "evaluate"))
    if run.evaluates_oracle:
      calls.append((programs[key], "oracle", "evaluate"))
    if run.evaluates_window:
      calls.append((programs[key], "window", "evaluate"))
  compile_all(calls)
  return CompiledTask(source, programs)


def compile_all(calls: Iterable[tuple[Program, str, str]]) -> None:
  """Compiles functions of programs at the same time.

  Args:
    calls: (program, phase, function) triples; those that occur twice are
      compiled once.
  """
  # All processes of a run must compile in the same order, hence one thread.
  workers = 12 if jax.process_count() == 1 else 1
  with concurrent.futures.ThreadPoolExecutor(workers) as pool:
    tasks = [
      pool.submit(program.compile, phase, function)
      for program, phase, function in dict.fromkeys(calls)
    ]
    for task in tasks:
      task.result()


def _bytes_needed(compiled: jax.stages.Compiled) -> int | None:
  """Bytes on one device, where the compiler says so."""
  memory = compiled.memory_analysis()
  if memory is None:
    return None
  return int(
    memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
    + memory.temp_size_in_bytes
  )


def _name(path: tuple) -> str:
  return ".".join(map(str, path))


def _flatten_model(model: model_lib.DecoderLM) -> Params:
  state = nnx.to_flat_state(nnx.state(model, nnx.Param))
  return {_name(path): leaf.get_value() for path, leaf in state}


def _decays(name: str) -> bool:
  return not name.endswith(("scale", "bias"))


def _inputs(
  tokens: jax.Array, segment_ids: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
  """What the model reads of rows that have one token more."""
  ids = None if segment_ids is None else segment_ids[:, :-1]
  return tokens[:, :-1], ids


def _cross_entropy(logits: jax.Array, tokens: jax.Array) -> jax.Array:
  return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])


def dense_twin(model: ModelConfig) -> ModelConfig:
  """The same model with dense attention in every layer."""
  return dataclasses.replace(model, layer_kinds=("gqa",), index=IndexConfig())


def read_state(
  program: Program, folder: pathlib.Path, step: int | None = None
) -> tuple[TrainState, int] | None:
  """The state of a run's checkpoint, laid out as the program's, and its step.

  Args:
    program: of the same model.
    folder: the run's folder.
    step: of the checkpoint; None: the latest, and None if there is none.

  Raises:
    ValueError: there is no checkpoint of that step, or it is of another model.
  """
  if step is None and not (folder / "checkpoints").is_dir():
    return None
  checkpoints = Checkpoints(folder, read_only=True)
  try:
    found = checkpoints.latest() if step is None else step
    if found is None:
      return None
    flat, _ = checkpoints.restore(found, flatten_state(program.abstract_state))
  finally:
    checkpoints.close()
  return unflatten_state(flat, program.abstract_state), found


def flatten_state(state: TrainState) -> dict[str, Any]:
  """The leaves of a state by dotted names, as checkpoints hold them."""
  leaves = jax.tree_util.tree_leaves_with_path(state)
  return {
    jax.tree_util.keystr(path, simple=True, separator="."): leaf
    for path, leaf in leaves
  }


def unflatten_state(flat: dict[str, Any], like: TrainState) -> TrainState:
  """The state whose leaves have these names."""
  treedef = jax.tree.structure(like)
  return jax.tree.unflatten(treedef, [flat[n] for n in flatten_state(like)])
