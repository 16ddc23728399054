"""How long a comparison may be: as many steps as fit a budget of time.

`plan` times the steps, evaluations and checkpoints of a comparison on this
device and makes it as long as a number of minutes allows.
"""

import json
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from msa_jax.model_config import ModelConfig
from train import data as data_lib
from train import evaluate
from train.checkpoint import Checkpoints, provenance, write_json
from train.config import (
  ComparisonConfig,
  RunConfig,
  check_sides,
  to_dict,
  with_step_unit,
)
from train.program import (
  CompiledTask,
  Program,
  compile_key,
  compile_task,
  flatten_state,
  open_data,
)
from train.speed import time_steps

# A plan keeps this share of the budget for what it does not measure: the time
# to load programs and data, and the variation of step times.
SPARE = 0.08


def plan(
  comparison: ComparisonConfig,
  folder: pathlib.Path,
  minutes: float,
  sides: Sequence[str] | None = None,
) -> tuple[ComparisonConfig, dict[str, CompiledTask]]:
  """Makes a comparison as long as a budget allows, from measured times.

  Writes comparison.json, which `compare --config` trains, and plan.json with
  the measured times. Step counts keep their shares of a run. The time to
  tokenize text is not part of the budget: it is done here, if need be.

  Args:
    comparison: what to train.
    folder: where its runs will lie.
    minutes: the budget of all seeds together.
    sides: the only sides that the budget is for; None: all.

  Returns:
    The comparison, and its compiled tasks by name, for `compare`.

  Raises:
    ValueError: the folder has runs already, a side is unknown, data cannot be
      opened or used, or not one unit of steps fits.
  """
  check_sides(comparison.runs, sides)
  started = sorted(folder.glob("*/*/seed*/config.json"))
  if started:
    raise ValueError(f"{folder} has runs already, such as {started[0].parent}.")

  def chosen(comparison: ComparisonConfig) -> list[RunConfig]:
    return [r for r in comparison.runs if sides is None or r.side in sides]

  times: dict[tuple[str, ModelConfig], dict[str, Any]] = {}
  compiled: dict[str, CompiledTask] = {}
  opened = {}  # of all tasks, before the first one is compiled
  for task in comparison.tasks():
    members = [run for run in chosen(comparison) if run.task == task]
    if members:
      opened[task] = members, open_data(members)
  for task, (members, source) in opened.items():
    start = time.monotonic()
    made = compile_task(members, source)
    compiled[task] = made
    seconds = time.monotonic() - start
    print(f"{task}: programs after {seconds:.0f} s", flush=True)
    for model, runs in _by_model(members).items():
      program = made.programs[compile_key(runs[0])]
      found = _measure_runs(program, runs, made.source)
      times[task, model] = found
      print(json.dumps({"sides": [r.side for r in runs], **found}), flush=True)
  seeds = len(comparison.seeds)

  def run_seconds(run: RunConfig) -> float:
    return seeds * _run_seconds(run, times[run.task, run.model])

  def all_seconds(unit: int) -> float:
    return sum(map(run_seconds, chosen(with_step_unit(comparison, unit))))

  unit = 0
  while all_seconds(unit + 1) <= 60 * minutes * (1 - SPARE):
    unit += 1
  if not unit:
    raise ValueError(
      f"minutes={minutes}: the shortest this comparison can be takes"
      f" {all_seconds(1) / 60:.1f} minutes and {SPARE:.0%} to spare."
    )
  planned = with_step_unit(comparison, unit)
  records = [
    {
      "task": run.task,
      "side": run.side,
      "steps": run.num_steps,
      "tokens": run.num_steps * run.batch_size * run.context,
      "minutes": round(run_seconds(run) / 60, 2),
      "seconds": times[run.task, run.model],
    }
    for run in chosen(planned)
  ]
  for record in records:
    print(json.dumps(record), flush=True)
  found = round(all_seconds(unit) / 60, 2)
  print(f"{found} of {minutes} minutes, {seeds} seed(s)", flush=True)
  folder.mkdir(parents=True, exist_ok=True)
  write_json(folder / "comparison.json", to_dict(planned))
  write_json(
    folder / "plan.json",
    {**provenance(), "minutes": minutes, "planned": found, "runs": records},
  )
  return planned, compiled


def _by_model(runs: Sequence[RunConfig]) -> dict[ModelConfig, list[RunConfig]]:
  """The runs of a task that have the same model, and so the same times."""
  found: dict[ModelConfig, list[RunConfig]] = {}
  for run in runs:
    found.setdefault(run.model, []).append(run)
  return found


def _measure_runs(
  program: Program, runs: Sequence[RunConfig], source: data_lib.Source
) -> dict[str, Any]:
  """Seconds of a step, of a held-out batch and of the layer metrics in each
  phase that any of the runs has, and of a checkpoint.

  The runs have one model; the program is the first one's.
  """
  run = runs[0]
  # For each phase a run that has it.
  phases = {phase: r for r in reversed(runs) for phase in r.phases()}
  batch = source.train_batch(
    0, 0, batch_size=run.batch_size, context=run.context
  )
  params = program.init(run.seed).params
  times: dict[str, Any] = {"step": {}, "evaluate": {}, "measure": {}}
  times["step_bytes"] = {p: program.compile(p) for p in phases}
  for phase, one in phases.items():
    state = program.init(run.seed)
    times["step"][phase] = statistics.median(
      time_steps(program, one, phase, batch, state).steps
    )
  if any(r.dense_at_end for r in runs):
    phases.setdefault("warmup", run)
  for phase in phases:

    def held_out(phase=phase):
      return evaluate.held_out_metrics(
        program, params, source, phase, batches=1, probe_batches=1
      )

    def layers(phase=phase):
      return evaluate.layer_metrics(program, params, source, phase)

    forwards = 1 + len(source.probes)
    seconds = statistics.median(_seconds(held_out, 1.0, 3))
    times["evaluate"][phase] = seconds / forwards
    if program.msa_layers and phase in times["step"]:
      seconds = statistics.median(_seconds(layers, 1.0, 3))
      times["measure"][phase] = seconds
  times["probes"] = len(source.probes)
  times["checkpoint"] = _checkpoint_seconds(program, run.seed)
  return times


def _checkpoint_seconds(program: Program, seed: int) -> float:
  with tempfile.TemporaryDirectory(prefix="msa-plan-") as folder:
    checkpoints = Checkpoints(pathlib.Path(folder))
    start = time.perf_counter()
    checkpoints.save(1, flatten_state(program.init(seed)), 0.0)
    checkpoints.close()
    return time.perf_counter() - start


def _run_seconds(run: RunConfig, times: dict[str, Any]) -> float:
  """Seconds that a run takes, computed from measured times of its steps,
  evaluations and checkpoints (see `_measure_runs`)."""
  first = (run.recipe.init_step or 0) + 1
  total = 0.0
  for step in range(first, run.num_steps + 1):
    phase, last = run.phase(step), step == run.num_steps
    total += times["step"][phase]
    if last or step % run.eval_every == 0:
      probed = times["probes"] * run.probe_batches_at(step)
      seconds = times["evaluate"][phase]
      if last and run.dense_at_end:
        seconds += times["evaluate"]["warmup"]
      if last and run.evaluates_oracle:
        # Finding the blocks takes about as long as dense attention.
        seconds += 2 * times["evaluate"][phase]
      total += (run.eval_batches + probed) * seconds
      if last and run.evaluates_window:
        # Pieces that overlap have up to five times as many tokens as the rows.
        total += 5 * run.eval_batches * times["evaluate"][phase]
      if last and run.goes_sparse and data_lib.asks_for_facts(run.data):
        # The chosen blocks come from a second forward pass over the batches
        # that ask for facts, which takes about as long as the first.
        total += (probed or run.eval_batches) * times["evaluate"][phase]
    if times["measure"] and (last or step % run.layers_every == 0):
      total += times["measure"][phase]
    if last or step % run.checkpoint_every == 0 or step in run.keep_steps:
      total += times["checkpoint"]
  return total


def _seconds(call: Callable[[], Any], least: float, most: int) -> list[float]:
  """Seconds of each call after the first one.

  Calls are repeated until they have taken `least` seconds together, or were
  `most` in number.
  """
  jax.block_until_ready(call())
  times: list[float] = []
  while not times or (sum(times) < least and len(times) < most):
    start = time.perf_counter()
    jax.block_until_ready(call())
    times.append(time.perf_counter() - start)
  return times
