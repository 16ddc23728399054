"""Step times on the device at hand: the cost of each side, and what fits a
budget.

`speed` times each side's step at several lengths of context, beside its peak
memory and the share of the device's matrix rate that it makes use of (MFU).
`plan` times the steps, evaluations and checkpoints of a comparison and makes it
as long as a number of minutes allows.
"""

import dataclasses
import json
import math
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from msa_jax.model_config import ModelConfig
from train import data as data_lib
from train.checkpoint import Checkpoints, provenance, write_json
from train.config import ComparisonConfig, RunConfig, to_dict, with_step_unit
from train.program import (
  Program,
  Ready,
  TrainState,
  decides,
  flatten_state,
  make_ready,
  prepare,
  read_state,
)

# Dense bf16 rate of the matrix units by the vendor's data sheet, FLOP/s.
PEAK_FLOPS = {"H100": 989.4e12, "H200": 989.4e12}
# A plan keeps this share of the budget for what it does not measure: loading
# programs and data, and how step times vary.
SPARE = 0.08


def flops_per_step(
  model: ModelConfig, phase: str, batch_size: int, context: int
) -> float:
  """Floating-point operations that a training step cannot do without.

  Products of activations with weights and of activations with each other, a
  backward pass counted twice its forward: what is recomputed does not count,
  nor do norms, rotations and softmax. In a MoE layer a token passes the router,
  its own experts and the shared one. Attention counts the visible tokens that
  the phase attends to; an msa layer adds the index scores of all visible tokens
  and the KL's gradients over the attended ones.

  Raises:
    NotImplementedError: the index value head, an ablation, is not counted.
  """
  index = model.index
  if "msa" in model.kinds and index.value_head:
    raise NotImplementedError("flops_per_step: model.index.value_head=True")
  width, heads = model.embed_dim, model.num_heads * model.head_dim
  kv_heads = model.num_kv_heads * model.head_dim
  positions = np.arange(context, dtype=np.float64)
  dense = (positions + 1).sum()
  chosen = (index.top_k - 1) * index.block_size + positions % index.block_size
  sparse = np.minimum(positions, chosen).sum() + context
  per_token = 6.0 * width * model.vocab_size
  pairs = 0.0
  moe = model.moe
  hidden = {
    "dense": 3 * model.mlp_dim,
    "moe": 3 * (moe.top_k * moe.expert_dim + moe.shared_dim) + moe.num_experts,
  }
  for kind, mlp in zip(model.kinds, model.mlps, strict=True):
    per_token += 6.0 * width * (2 * heads + 2 * kv_heads + hidden[mlp])
    attended = sparse if kind == "msa" and phase == "sparse" else dense
    pairs += 12.0 * heads * attended
    if kind == "msa" and index.selection == "index":
      index_heads = model.num_kv_heads * index.index_dim
      # With a detached input nothing flows back through the projections.
      passes = 4.0 if index.detach_input else 6.0
      per_token += passes * width * (index_heads + index.index_dim)
      pairs += 2.0 * index_heads * dense + 4.0 * index_heads * attended
  return batch_size * (context * per_token + pairs)


def peak_flops() -> float | None:
  """The device's matrix rate; None where it is not known."""
  kind = jax.devices()[0].device_kind
  found = [rate for name, rate in PEAK_FLOPS.items() if name in kind]
  return found[0] if found else None


def _seconds(call: Callable[[], Any], least: float, most: int) -> list[float]:
  """Times of calls after the first, until they take `least` seconds."""
  jax.block_until_ready(call())
  times: list[float] = []
  while not times or (sum(times) < least and len(times) < most):
    start = time.perf_counter()
    jax.block_until_ready(call())
    times.append(time.perf_counter() - start)
  return times


def time_steps(
  program: Program,
  phase: str,
  batch: data_lib.Batch,
  state: TrainState,
) -> list[float]:
  """Seconds of single training steps of a phase; uses up the state."""
  run = program.config
  first = (run.recipe.init_step or 0) + 1
  steps = range(first, run.num_steps + 1)
  step = next(s for s in steps if run.phase(s) == phase)

  def call():
    nonlocal state
    state, metrics = program.step(state, batch, step)
    return metrics

  return _seconds(call, 1.0, 20)


def _trained_state(program: Program) -> tuple[TrainState, int]:
  """The state of the run's last checkpoint and its step, or a fresh one."""
  found = read_state(program, pathlib.Path(program.config.folder))
  return (program.init(), 0) if found is None else found


def _at_length(run: RunConfig, context: int, tokens: int) -> RunConfig:
  rows = max(1, tokens // context)
  parts = math.gcd(run.grad_accumulation, rows)
  return dataclasses.replace(
    run, context=context, batch_size=rows, grad_accumulation=parts
  )


def speed(
  comparison: ComparisonConfig,
  folder: pathlib.Path,
  lengths: Sequence[int],
) -> pathlib.Path:
  """Times a step of each side and phase at each length.

  Every step has as many tokens, those of a training batch or of the longest
  context. Sides that start from another side have its phases and are left out.
  Parameters are those of the folder's runs of the first task and seed, where
  they left a checkpoint: what an untrained index chooses is shared less by
  neighbours, and slower.

  Returns:
    The path of speed.json.
  """
  task, seed = comparison.tasks()[0], comparison.seeds[0]
  sides = [
    run
    for run in comparison.resolve(folder)
    if run.recipe.init_from is None and (run.task, run.seed) == (task, seed)
  ]
  tokens = max(*lengths, *(run.batch_size * run.context for run in sides))
  programs = {
    (run.side, length): Program(_at_length(run, length, tokens))
    for run in sides
    for length in lengths
  }
  source = prepare(
    sides[0].data,
    (
      (program, phase)
      for program in programs.values()
      for phase in program.config.phases()
    ),
    ("step",),
  )
  rows = []
  rate = peak_flops()
  for (side, length), program in programs.items():
    run = program.config
    shape = (run.batch_size, length)
    batch = source.train_batch(0, 0, batch_size=shape[0], context=length)
    for phase in run.phases():
      state, trained = _trained_state(program)
      times = time_steps(program, phase, batch, state)
      median = statistics.median(times)
      flops = flops_per_step(run.model, phase, *shape)
      row = {
        "side": side,
        "phase": phase,
        "context": length,
        "batch_size": run.batch_size,
        "trained_steps": trained,
        "step_ms": round(1e3 * median, 3),
        "spread_ms": round(1e3 * (max(times) - min(times)), 3),
        "tokens_per_second": round(shape[0] * length / median, 1),
        "tflop_per_step": flops / 1e12,
        "mfu": rate and round(flops / median / rate / program.mesh.size, 4),
        "peak_bytes": program.compile(phase),
      }
      rows.append(row)
      print(json.dumps(row), flush=True)
  folder.mkdir(parents=True, exist_ok=True)
  write_json(
    folder / "speed.json",
    {**provenance(), "peak_tflops": rate and rate / 1e12, "rows": rows},
  )
  return folder / "speed.json"


def plan(
  comparison: ComparisonConfig, folder: pathlib.Path, minutes: float
) -> tuple[ComparisonConfig, dict[str, Ready]]:
  """Makes a comparison as long as a budget allows, from measured times.

  Writes comparison.json, which `compare --config` trains, and plan.json with
  what was measured. Step counts keep their shares of a run. Text is tokenized
  here if it was not yet, outside the budget.

  Returns:
    The comparison, and what its tasks' runs need, for `compare`.

  Raises:
    ValueError: the folder has runs already, or not one unit of steps fits.
  """
  started = sorted(folder.glob("*/*/seed*/config.json"))
  if started:
    raise ValueError(f"{folder} has runs already, such as {started[0].parent}.")
  times: dict[tuple[str, ModelConfig], dict[str, Any]] = {}
  ready: dict[str, Ready] = {}
  for task in comparison.tasks():
    start = time.monotonic()
    ready[task] = make_ready([r for r in comparison.runs if r.task == task])
    seconds = time.monotonic() - start
    print(f"{task}: data and programs after {seconds:.0f} s", flush=True)
    for model, run in _longest_runs(comparison, task).items():
      program = ready[task].programs[decides(run)].for_run(run)
      found = _measure_program(program, ready[task].source)
      times[task, model] = found
      print(json.dumps({"side": run.side, **found}), flush=True)
  seeds = len(comparison.seeds)

  def run_seconds(run: RunConfig) -> float:
    return seeds * _run_seconds(run, times[run.task, run.model])

  def all_seconds(unit: int) -> float:
    return sum(map(run_seconds, with_step_unit(comparison, unit).runs))

  unit = 0
  while all_seconds(unit + 1) <= 60 * minutes * (1 - SPARE):
    unit += 1
  if not unit:
    raise ValueError(
      f"minutes={minutes}: the shortest this comparison can be takes"
      f" {all_seconds(1) / 60:.1f} minutes and {SPARE:.0%} to spare."
    )
  planned = with_step_unit(comparison, unit)
  rows = [
    {
      "task": run.task,
      "side": run.side,
      "steps": run.num_steps,
      "tokens": run.num_steps * run.batch_size * run.context,
      "minutes": round(run_seconds(run) / 60, 2),
      "seconds": times[run.task, run.model],
    }
    for run in planned.runs
  ]
  for row in rows:
    print(json.dumps(row), flush=True)
  found = round(all_seconds(unit) / 60, 2)
  print(f"{found} of {minutes} minutes, {seeds} seed(s)", flush=True)
  folder.mkdir(parents=True, exist_ok=True)
  write_json(folder / "comparison.json", to_dict(planned))
  write_json(
    folder / "plan.json",
    {**provenance(), "minutes": minutes, "planned": found, "runs": rows},
  )
  return planned, ready


def _longest_runs(
  comparison: ComparisonConfig, task: str
) -> dict[ModelConfig, RunConfig]:
  """Of each model of a task the run that has the most phases: one that starts
  from another side has no more than the one that does not."""
  runs = [run for run in comparison.runs if run.task == task]
  return {
    run.model: run for run in sorted(runs, key=lambda run: len(run.phases()))
  }


def _measure_program(
  program: Program, source: data_lib.Source
) -> dict[str, Any]:
  """Seconds of a step, a held-out batch and a measure of the layers in each
  phase, and of a checkpoint."""
  run = program.config
  batch = source.train_batch(
    0, 0, batch_size=run.batch_size, context=run.context
  )
  params = program.init().params
  times: dict[str, Any] = {"step": {}, "evaluate": {}, "measure": {}}
  times["step_bytes"] = {p: program.compile(p) for p in run.phases()}
  for phase in run.phases():
    times["step"][phase] = statistics.median(
      time_steps(program, phase, batch, program.init())
    )

    def evaluate(phase=phase):
      return program.evaluate(params, source, phase, batches=1, probe_batches=1)

    def measure(phase=phase):
      return program.measure(params, source, phase)

    forwards = 1 + len(source.probes)
    seconds = statistics.median(_seconds(evaluate, 1.0, 3))
    times["evaluate"][phase] = seconds / forwards
    if program.msa_layers:
      seconds = statistics.median(_seconds(measure, 1.0, 3))
      times["measure"][phase] = seconds
  times["probes"] = len(source.probes)
  times["checkpoint"] = _checkpoint_seconds(program)
  return times


def _checkpoint_seconds(program: Program) -> float:
  with tempfile.TemporaryDirectory(prefix="msa-plan-") as folder:
    checkpoints = Checkpoints(pathlib.Path(folder))
    start = time.perf_counter()
    checkpoints.save(1, flatten_state(program.init()), 0.0)
    checkpoints.close()
    return time.perf_counter() - start


def _run_seconds(run: RunConfig, times: dict[str, Any]) -> float:
  """What a run takes, given the seconds of each thing that it does."""
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
      total += (run.eval_batches + probed) * seconds
      if last and times["measure"] and data_lib.asks_for_facts(run.data):
        # What was chosen comes from another forward pass, of about that time.
        total += (probed or run.eval_batches) * times["evaluate"][phase]
    if times["measure"] and (last or step % run.layers_every == 0):
      total += times["measure"][phase]
    if last or step % run.checkpoint_every == 0 or step in run.keep_steps:
      total += times["checkpoint"]
  return total
