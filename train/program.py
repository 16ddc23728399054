"""The compiled functions of a run: initial state, training step, evaluation.

Parameters are a flat dict from dotted names to arrays, split in two groups:
the Index Branch, which only the KL loss trains, and the backbone. Each group
has its own clipping, Adam moments and learning rate.
"""

import concurrent.futures
import contextlib
import copy
import dataclasses
import functools
import math
import pathlib
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as Pspec

from msa_jax import mlp
from msa_jax import model as model_lib
from msa_jax.model_config import IndexConfig, ModelConfig
from train import config as config_lib
from train import data as data_lib
from train import evaluate
from train.checkpoint import Checkpoints, read_config

_AXES = ("data", "fsdp", "expert", "tensor")
_GROUPS = ("backbone", "index")
_LOWERING = threading.Lock()
Params = dict[str, jax.Array]


class TrainState(NamedTuple):
  """What a checkpoint holds; opt has one entry for each parameter group."""

  params: Params
  opt: dict[str, Any]


class Program:
  """The functions of a run on a mesh of devices."""

  def __init__(self, config: config_lib.RunConfig, model=None):
    self.config = config
    self.model_config = config.model if model is None else model
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
    # In the order of the layers.
    biases = [path for path in self._paths.values() if "choice_bias" in path]
    self._choice_biases = [_name(path) for path in sorted(biases)]
    self._transforms = self._make_transforms()
    with self.context():
      state = jax.eval_shape(lambda: self._fresh_state(0))
    self.state_shardings = jax.tree_util.tree_map_with_path(
      lambda path, _: self._param_shardings.get(
        str(getattr(path[-1], "key", "")), self.replicated
      ),
      state,
    )
    self.abstract_state = jax.tree.map(
      lambda leaf, place: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=place
      ),
      state,
      self.state_shardings,
    )
    self._compiled: dict[tuple[str, str], Any] = {}
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
    self._jit_measure = jax.jit(
      self._measure,
      static_argnames="phase",
      out_shardings=self.replicated,
    )
    self._jit_choose = jax.jit(
      self._choose,
      static_argnames="phase",
      out_shardings=self.replicated,
    )

  def for_run(self, config: config_lib.RunConfig) -> "Program":
    """The same compiled functions, for another run whose `decides` are equal,
    such as another seed's, or one that starts from another side."""
    if decides(config) != decides(self.config):
      raise ValueError(
        "config: wanted a run of the same model, mesh, batch shape, kl_weight"
        " and Adam."
      )
    program = copy.copy(self)
    program.config = config
    return program

  def _check_mesh(self, shape: tuple[int, int, int, int]) -> None:
    data, fsdp, expert, tensor = shape
    model = self.model_config
    moe = model.moe if "moe" in model.mlps else None
    if jax.process_count() > 1 and math.prod(shape) != jax.device_count():
      raise ValueError(
        f"mesh (data={data}, fsdp={fsdp}, expert={expert}, tensor={tensor})"
        f" uses {math.prod(shape)} devices: {jax.process_count()} processes"
        f" need all {jax.device_count()} (mesh.data=-1 takes what is left)."
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
        f"batch_size / grad_accumulation = {rows} rows cannot be split over"
        f" mesh.data * mesh.fsdp * mesh.expert = {data * fsdp * expert}."
      )
    if self.model_config.num_kv_heads % tensor:
      raise ValueError(
        f"model.num_kv_heads={self.model_config.num_kv_heads} cannot be split"
        f" over mesh.tensor={tensor}."
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

  def group(self, tree: dict[str, Any], name: str) -> dict[str, Any]:
    """The entries of one parameter group."""
    return {k: v for k, v in tree.items() if self.groups[k] == name}

  def _make_transforms(self) -> dict[str, optax.GradientTransformation]:
    optimizer = self.config.optimizer

    def decayed(tree: Any) -> dict[str, bool]:
      return {name: _decays(name) for name in tree}

    def adam(clip_norm: float) -> optax.GradientTransformation:
      return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.scale_by_adam(optimizer.beta1, optimizer.beta2, optimizer.eps),
        optax.add_decayed_weights(optimizer.weight_decay, mask=decayed),
      )

    return {
      "backbone": adam(optimizer.clip_norm),
      "index": adam(optimizer.index_clip_norm),
    }

  def _state(self, params: Params) -> TrainState:
    opt = {g: self._transforms[g].init(self.group(params, g)) for g in _GROUPS}
    return TrainState(params, opt)

  def _fresh_state(self, seed: int | jax.Array) -> TrainState:
    return self._state(_flatten_model(self._make_model(seed)))

  def init(self) -> TrainState:
    """The state that the seed gives."""
    with self.context():
      return self._jit_init(np.uint32(self.config.seed))

  def start_from_dense(self) -> TrainState:
    """The state that a GQA run's checkpoint gives, with a fresh index branch.

    The backbone keeps its Adam moments and their step.
    """
    recipe = self.config.recipe
    assert recipe.init_from is not None and recipe.init_step is not None
    dense = Program(self.config, dense_twin(self.model_config))
    folder = pathlib.Path(recipe.init_from)
    source = read_config(folder)
    if source is None:
      raise ValueError(
        f"recipe.init_from={recipe.init_from!r}: no run folder (it has no"
        " config.json)."
      )
    found = read_state(dense, folder, recipe.init_step)
    assert found is not None
    state, _ = found
    # What the parameters' shapes do not show.
    changed = config_lib.differences(
      source["model"],
      config_lib.to_dict(dense.model_config),
      (
        "index",
        "implementation",
        "gqa_implementation",
        "remat",
        "dtype",
      ),
    )
    if changed:
      raise ValueError(
        f"recipe.init_from={recipe.init_from!r} is of another model:\n  "
        + "\n  ".join(changed)
      )

    def graft(state: TrainState) -> TrainState:
      def convert(
        tree: Params, index_init: Literal["main", "random"] = "random"
      ) -> Params:
        model = convert.to_msa(
          dense.merge(tree),
          self.model_config,
          rngs=nnx.Rngs(jax.random.key(self.config.seed)),
          sharding=self.sharding,
          index_init=index_init,
        )
        return _flatten_model(model)

      fresh = self._state(convert(state.params, recipe.index_init))
      clip, adam, decay = state.opt["backbone"]
      adam = adam._replace(
        mu=self.group(convert(adam.mu), "backbone"),
        nu=self.group(convert(adam.nu), "backbone"),
      )
      return TrainState(
        fresh.params, fresh.opt | {"backbone": (clip, adam, decay)}
      )

    with self.context():
      return jax.jit(graft, out_shardings=self.state_shardings)(state)

  # --- What is computed -----------------------------------------------------

  def loss(
    self,
    params: Params,
    tokens: jax.Array,
    weights: jax.Array,
    kl_weight: float | jax.Array,
    *,
    phase: str,
  ):
    """LM loss + kl_weight * the sum of the layers' KL, of a batch in parts.

    Args:
      params: parameters by name.
      tokens: int32 [part, row, context + 1].
      weights: float32 [part, row, context], what each target counts; the LM
        loss is the weighted mean.
      kl_weight: lambda.
      phase: "dense", "warmup" or "sparse".

    Returns:
      ((loss, {"loss": LM loss, "kl": sum of KL}), gradients), the same for
      any number of parts; with MoE layers also "load", [L, X] choices of each
      expert in each of them.
    """
    count = jnp.maximum(jnp.sum(weights), 1)
    parts = tokens.shape[0]

    def part_loss(params, tokens, weights):
      out = self._apply(params, tokens, phase=phase, with_kl=self.has_index)
      lm = jnp.sum(_cross_entropy(out.logits, tokens) * weights) / count
      kl = jnp.sum(out.kl) / parts
      metrics = {"loss": lm, "kl": kl}
      if out.experts is not None:
        metrics["load"] = mlp.expert_load(
          out.experts[np.asarray(self.moe_layers)],
          self.model_config.moe.num_experts,
        )
      return lm + kl_weight * kl, metrics

    grad = jax.value_and_grad(part_loss, has_aux=True)
    if parts == 1:
      return grad(params, tokens[0], weights[0])

    def add(total, part):
      return jax.tree.map(jnp.add, total, grad(params, *part)), None

    first = jax.eval_shape(grad, params, tokens[0], weights[0])
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)
    return jax.lax.scan(add, zeros, (tokens, weights))[0]

  def _apply(self, params: Params, tokens: jax.Array, *, phase: str, **kwargs):
    return self.merge(params)(
      tokens[:, :-1],
      phase="warmup" if phase == "warmup" else "sparse",
      **kwargs,
    )

  def _step(
    self,
    state: TrainState,
    tokens,
    weights,
    rates: dict[str, jax.Array],
    *,
    phase: str,
  ):
    (_, metrics), grads = self.loss(
      state.params,
      tokens,
      weights,
      self.config.recipe.kl_weight,
      phase=phase,
    )
    params, opt = dict(state.params), {}
    for group in _GROUPS:
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
    if load is not None:
      self._balance(params, load)
    state = TrainState(params, opt)
    norm = optax.tree.norm
    metrics |= {
      "grad_norm": norm(self.group(grads, "backbone")),
      "index_grad_norm": norm(self.group(grads, "index")),
    }
    # The state as well: a checkpoint must never hold what is not finite.
    watched = [*metrics.values(), norm(params), norm(opt)]
    metrics["finite"] = jnp.all(jnp.isfinite(jnp.stack(watched)))
    if load is not None:
      metrics["load"] = load
    return state, metrics

  def _balance(self, params: Params, load: jax.Array) -> None:
    """Moves the routers' choice biases towards equal load."""
    rate = self.config.optimizer.router_bias_rate
    first = 0
    for name in self._choice_biases:
      bias = params[name]
      count = math.prod(bias.shape[:-1])
      part = load[first : first + count].reshape(bias.shape)
      params[name] = mlp.balance(bias, part, rate)
      first += count

  def _evaluate(self, params, tokens, loss_mask, *, phase: str):
    """Loss of each position, summed over rows; which targets are right."""
    out = self._apply(params, tokens, phase=phase)
    losses = _cross_entropy(out.logits, tokens) * loss_mask
    right = jnp.argmax(out.logits, axis=-1) == tokens[:, 1:]
    return jnp.sum(losses, axis=0), right

  def _measure(self, params, tokens, *, phase: str):
    out = self._apply(
      params, tokens, phase=phase, with_kl=self.has_index, with_selection=True
    )
    return out.kl, out.selection

  def _choose(self, params, tokens, *, phase: str):
    # The recalls that this leaves out cost more than all the rest.
    _, selection = self._measure(params, tokens, phase=phase)
    assert selection is not None
    return selection.block_indices

  # --- Calls from the host --------------------------------------------------

  def put(self, array: np.ndarray, *, parts: bool = False) -> jax.Array:
    """Places a batch (in parts, if asked) with its rows over the mesh; each
    process gives its own rows only."""
    spec = Pspec(("data", "fsdp", "expert"))
    if parts:
      count = self.config.grad_accumulation
      array = array.reshape(count, -1, *array.shape[1:])
      spec = Pspec(None, *spec)
    return jax.make_array_from_callback(
      array.shape, NamedSharding(self.mesh, spec), lambda index: array[index]
    )

  def compile(self, phase: str, function: str = "step") -> int | None:
    """Compiles "step", "evaluate", "measure" or "choose" for a phase; returns
    the bytes it needs on one device, where the compiler says so."""
    key = function, phase
    if key not in self._compiled:
      with self.context():
        _, lowered = lower(lambda: self.trace(phase, function))
      self._compiled[key] = lowered.compile()
    memory = self._compiled[key].memory_analysis()
    if memory is None:
      return None
    return int(
      memory.argument_size_in_bytes
      + memory.output_size_in_bytes
      - memory.alias_size_in_bytes
      + memory.temp_size_in_bytes
    )

  def trace(self, phase: str, function: str = "step") -> jax.stages.Traced:
    """A function as `compile` has it, before it is lowered."""
    config, params = self.config, self.abstract_state.params
    with self.context():
      if function == "step":
        rows = np.zeros((config.batch_size, config.context + 1), np.int32)
        return self._jit_step.trace(
          self.abstract_state,
          self.put(rows, parts=True),
          self.put(rows[:, 1:].astype(np.float32), parts=True),
          dict.fromkeys(_GROUPS, np.float32(0)),
          phase=phase,
        )
      rows = np.zeros(
        (self.eval_shape["batch_size"], config.context + 1), np.int32
      )
      tokens = self.put(rows)
      if function == "evaluate":
        mask = self.put(rows[:, 1:] == 0)
        return self._jit_eval.trace(params, tokens, mask, phase=phase)
      jitted = {"measure": self._jit_measure, "choose": self._jit_choose}
      return jitted[function].trace(params, tokens, phase=phase)

  def _call(self, function: str, phase: str, *operands):
    self.compile(phase, function)
    with self.context():
      return self._compiled[function, phase](*operands)

  def step(self, state: TrainState, batch: data_lib.Batch, step: int):
    """One optimiser step (counted from 1); does not wait for its end."""
    config = self.config
    optimizer = config.optimizer
    rate = optimizer.schedule(step, config.num_steps)
    index_rate = rate * optimizer.index_learning_rate_factor
    return self._call(
      "step",
      config.phase(step),
      state,
      self.put(batch.tokens, parts=True),
      self.put(data_lib.loss_weights(config.data, batch), parts=True),
      {"backbone": np.float32(rate), "index": np.float32(index_rate)},
    )

  @property
  def eval_shape(self) -> dict[str, int]:
    """Size of a held-out batch: that of one part of a training batch."""
    rows = self.config.batch_size // self.config.grad_accumulation
    return {"batch_size": rows, "context": self.config.context}

  def evaluate(
    self,
    params: Params,
    source: data_lib.Source,
    phase: str,
    *,
    batches: int,
    probe_batches: int,
    by_choice: bool = False,
  ) -> dict:
    """Loss, also by position, and answers on the held-out batches, and answers
    to the probes; by_choice: those that `data.asks_for_facts` is about also by
    what each msa layer chose."""
    by_choice = by_choice and "choose" in self.functions
    run = functools.partial(self._evaluate_batches, params, source, phase)
    get = functools.partial(source.eval_batch, **self.eval_shape)
    losses, counts, sizes, answers = run(
      batches, get, by_choice=by_choice and not source.probes
    )
    batch_losses, targets = losses.sum(1), counts.sum(1)
    total = float(batch_losses.sum())
    result = {
      "loss": total / int(targets.sum()),
      "bits_per_byte": evaluate.bits_per_byte(total, sizes),
      **answers,
      "batch_loss": (batch_losses / np.maximum(targets, 1)).tolist(),
      "loss_by_position": evaluate.loss_by_position(
        losses.sum(0), counts.sum(0)
      ),
    }
    for name in source.probes:
      get = functools.partial(source.probe_batch, name, **self.eval_shape)
      *_, answers = run(probe_batches, get, by_choice=by_choice)
      result |= {f"{name}_{key}": value for key, value in answers.items()}
    return result

  def _evaluate_batches(
    self, params, source, phase: str, number: int, get, by_choice: bool = False
  ):
    """Loss and targets [batch, position], bytes of each batch, and the answers
    of all."""
    losses, counts, sizes, right, distances = [], [], [], [], []
    far, found = [], []

    def read(batch: data_lib.Batch, loss, correct, chosen=None) -> None:
      asked = batch.distance >= 0
      losses.append(np.asarray(loss, np.float64))
      counts.append(batch.loss_mask.sum(0))
      sizes.append(evaluate.count_bytes(source, batch))
      right.append(np.asarray(correct)[asked])
      distances.append(batch.distance[asked])
      if chosen is not None:
        beyond, held = evaluate.facts_found(
          np.asarray(chosen), batch.distance, self.model_config.index
        )
        far.append(beyond)
        found.append(held)

    before = None
    for index in range(number):
      batch = get(index)
      tokens, mask = self.put(batch.tokens), self.put(batch.loss_mask)
      result = self._call("evaluate", phase, params, tokens, mask)
      if by_choice:
        result = (*result, self._call("choose", phase, params, tokens))
      # A batch's answers are read while the next one is computed.
      if before is not None:
        read(*before)
      before = batch, *result
    if before is not None:
      read(*before)
    answers: dict[str, Any] = {"accuracy": None, "by_distance": None}
    hits, apart = np.concatenate(right), np.concatenate(distances)
    if hits.size:
      answers = {
        "accuracy": float(hits.mean()),
        "by_distance": evaluate.answers_by_distance(hits, apart),
      }
    if found:
      rows = evaluate.answers_by_choice(
        hits[np.concatenate(far)], np.concatenate(found)
      )
      answers["by_choice"] = [
        {"layer": layer, **rows[layer]} for layer in self.msa_layers
      ]
    return np.stack(losses), np.stack(counts), sizes, answers

  def measure(self, params: Params, source: data_lib.Source, phase: str):
    """What the msa layers do on held-out batches, as NumPy.

    Returns:
      (KL by layer and selection of the first batch, the share of
      `evaluate.facts_found` by layer of the first batch that asks for facts;
      None if the data ask for none).
    """

    def run(function: str, batch: data_lib.Batch):
      tokens = self.put(batch.tokens)
      return jax.device_get(self._call(function, phase, params, tokens))

    batch = source.eval_batch(0, **self.eval_shape)
    kl, selection = run("measure", batch)
    asked = selection.block_indices
    if source.probes:
      batch = source.probe_batch(source.probes[0], 0, **self.eval_shape)
      asked = run("choose", batch)
    _, found = evaluate.facts_found(
      asked, batch.distance, self.model_config.index
    )
    return kl, selection, found.mean(0) if found.size else None

  @property
  def functions(self) -> tuple[str, ...]:
    """Names of the functions that a run calls."""
    names = ("step", "evaluate")
    if self.msa_layers:
      names += ("measure",)
    if self.msa_layers and data_lib.asks_for_facts(self.config.data):
      names += ("choose",)
    return names

  @property
  def msa_layers(self) -> list[int]:
    kinds = enumerate(self.model_config.kinds)
    return [layer for layer, kind in kinds if kind == "msa"]

  @property
  def moe_layers(self) -> list[int]:
    kinds = enumerate(self.model_config.mlps)
    return [layer for layer, kind in kinds if kind == "moe"]

  def router_rows(self, load: np.ndarray) -> list[dict]:
    """Largest and smallest load of an expert, as multiples of the mean."""
    shares = load / load.mean(axis=-1, keepdims=True)
    return [
      {
        "layer": layer,
        "max_load": float(share.max()),
        "min_load": float(share.min()),
      }
      for layer, share in zip(self.moe_layers, shares, strict=True)
    ]

  def layer_rows(self, kl, selection, found) -> list[dict]:
    """KL and recalls of the msa layers; None for what is not defined."""

    def number(value) -> float | None:
      return float(value) if math.isfinite(value) else None

    return [
      {
        "layer": layer,
        "kl": number(kl[layer]) if self.has_index else None,
        "block_recall": number(selection.block_recall[layer]),
        "score_recall": number(selection.score_recall[layer]),
        "best_score_recall": number(selection.best_score_recall[layer]),
        "facts_found": None if found is None else number(found[layer]),
      }
      for layer in self.msa_layers
    ]

  def count_parameters(self) -> dict[str, int]:
    """How many parameters: all, token embedding and output, Index Branch."""
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


def decides(config: config_lib.RunConfig) -> tuple:
  """What the compiled functions of a run depend on. Learning rates are
  operands, the schedule is the host's."""
  adam = config.optimizer
  return (
    config.model,
    config.mesh,
    config.batch_size,
    config.grad_accumulation,
    config.context,
    config.recipe.kl_weight,
    (adam.beta1, adam.beta2, adam.eps, adam.weight_decay),
    (adam.clip_norm, adam.index_clip_norm, adam.router_bias_rate),
  )


class Ready(NamedTuple):
  """What the runs of a task need: opened data, and programs by `decides`."""

  source: data_lib.Source
  programs: dict[tuple, Program]


def lower(
  trace: Callable[[], jax.stages.Traced],
) -> tuple[jax.stages.Traced, jax.stages.Lowered]:
  """Traces and lowers, one program at a time.

  Both are Python's work, which threads only slow down. In turn, the first
  programs already compile, in threads of XLA's, while the others are lowered.
  """
  with _LOWERING:
    traced = trace()
    return traced, traced.lower()


def make_ready(runs: Sequence[config_lib.RunConfig]) -> Ready:
  """Opens the data of a task's runs and compiles all that they call."""
  programs: dict[tuple, Program] = {}
  calls = []
  for run in runs:
    key = decides(run)
    programs[key] = programs.get(key) or Program(run)
    calls += [(programs[key], phase) for phase in run.phases()]
  return Ready(prepare(runs[0].data, calls), programs)


def prepare(
  data: data_lib.DataConfig,
  calls: Iterable[tuple["Program", str]],
  functions: tuple[str, ...] | None = None,
) -> data_lib.Source:
  """Opens data, and meanwhile compiles programs for phases, side by side.

  Both take tens of seconds that need no GPU, of a GPU's time.

  Args:
    data: what to open.
    calls: (program, phase) pairs; runs of several sides may share a program.
    functions: which to compile; None: all that a run calls.

  Returns:
    The data.
  """
  # Several processes must compile in one order.
  workers = 12 if jax.process_count() == 1 else 1
  with concurrent.futures.ThreadPoolExecutor(workers) as pool:
    source = pool.submit(data_lib.load, data)
    tasks = [
      pool.submit(program.compile, phase, function)
      for program, phase in dict.fromkeys(calls)
      for function in functions or program.functions
    ]
    for task in tasks:
      task.result()
    return source.result()


def _name(path: tuple) -> str:
  return ".".join(map(str, path))


def _flatten_model(model: model_lib.DecoderLM) -> Params:
  state = nnx.to_flat_state(nnx.state(model, nnx.Param))
  return {_name(path): leaf.get_value() for path, leaf in state}


def _decays(name: str) -> bool:
  return not name.endswith(("scale", "bias"))


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
