"""Step times on this device: what the training step of each side costs.

`speed` times each side's training step at several context lengths, and gives
its peak memory and its model FLOPs utilisation (MFU: the share of the device's
matrix rate that it uses).
"""

import collections
import dataclasses
import json
import math
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from msa_jax.model_config import ModelConfig
from train import data as data_lib
from train.checkpoint import provenance, read_config, write_json
from train.config import (
  ComparisonConfig,
  RecipeConfig,
  RunConfig,
  only_task,
)
from train.program import (
  Program,
  TrainState,
  compile_all,
  compile_key,
  dense_twin,
  read_state,
  train_step,
)

# Dense bf16 rate of the matrix units in FLOP/s, from the vendor's data sheet.
PEAK_FLOPS = {"H100": 989.4e12, "H200": 989.4e12}


def flops_per_step(
  model: ModelConfig, phase: str, batch_size: int, context: int
) -> float:
  """Floating-point operations that a training step needs at least.

  Counted are products of activations with weights and with each other, the
  backward pass as twice the forward pass. Recomputation, norms, rotations and
  softmax are not counted. In a MoE layer a token passes the router, its chosen
  experts and the shared one. Attention counts the visible tokens that the phase
  attends to; an msa layer adds the index scores of all visible tokens and the
  KL's gradients over the attended ones.

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
  """The device's matrix rate in FLOP/s; None if it is not known."""
  kind = jax.devices()[0].device_kind
  found = [rate for name, rate in PEAK_FLOPS.items() if name in kind]
  return found[0] if found else None


class StepTimes(NamedTuple):
  """What `time_steps` measures.

  Attributes:
    steps: seconds of each training step.
    kernels: seconds of each kernel in a step, see `kernel_times`.
  """

  steps: list[float]
  kernels: dict[str, float] | None


def time_steps(
  program: Program,
  run: RunConfig,
  phase: str,
  batch: data_lib.Batch,
  state: TrainState,
) -> StepTimes:
  """Times several training steps of a phase, and the kernels in them.

  The state is donated to the steps and cannot be read afterwards.
  """
  first = (run.recipe.init_step or 0) + 1
  steps = range(first, run.num_steps + 1)
  step = next(s for s in steps if run.phase(s) == phase)

  def call():
    nonlocal state
    state, metrics = train_step(program, run, state, batch, step)
    return metrics

  # As in the training loop, a step's metrics are read while the next step runs.
  # So the host's share of a step counts only if the device has to wait for it.
  jax.block_until_ready(call())
  previous = call()
  times: list[float] = []
  start = time.perf_counter()
  while not times or (sum(times) < 1.0 and len(times) < 20):
    current = call()
    jax.block_until_ready(previous)
    end = time.perf_counter()
    times.append(end - start)
    start, previous = end, current
  kernels = kernel_times(lambda: jax.block_until_ready(call()), 3)
  return StepTimes(times, kernels)


def kernel_times(
  call: Callable[[], Any], calls: int
) -> dict[str, float] | None:
  """Seconds of each kernel and copy in one call, by name, longest first.

  Args:
    call: what to profile; returns when the device is done.
    calls: number of calls that are profiled; the result is their mean.

  Returns:
    None on a device whose kernels JAX's profiler does not record: a CPU.
  """
  if jax.default_backend() != "gpu":
    return None
  with tempfile.TemporaryDirectory(prefix="msa-profile-") as folder:
    with jax.profiler.trace(folder):
      for _ in range(calls):
        call()
    (file,) = pathlib.Path(folder).rglob("*.xplane.pb")
    profile = jax.profiler.ProfileData.from_file(str(file))
  nanoseconds: collections.Counter[str] = collections.Counter()
  for plane in profile.planes:
    if not plane.name.startswith("/device:GPU:0"):
      continue
    for line in plane.lines:
      if line.name.startswith("Stream"):
        for event in line.events:
          nanoseconds[event.name] += event.duration_ns
  return {n: t / calls / 1e9 for n, t in nanoseconds.most_common()}


def runs_with_own_steps(runs: Sequence[RunConfig]) -> list[RunConfig]:
  """The runs of a comparison whose steps differ from those of the runs before
  them, each as a run that starts from scratch.

  Runs that start from another side are left out, because they have no phase of
  their own. Where that is a trunk, the trunk becomes the GQA run for which it
  stands, and the first run that starts from it becomes a run from scratch with
  a warm-up, which has the trunk's steps too.
  """
  found: list[RunConfig] = []
  for run in runs:
    own, recipe = run, run.recipe
    if run.uses_msa and not run.goes_sparse:
      own = dataclasses.replace(
        run,
        model=dense_twin(run.model),
        recipe=RecipeConfig(),
        keep_steps=(),
      )
    elif recipe.index_init == "trained":
      recipe = dataclasses.replace(
        recipe,
        init_from=None,
        init_step=None,
        index_init="random",
        index_warmup_steps=recipe.first_sparse_step - 1,
      )
      own = dataclasses.replace(run, recipe=recipe)
    elif recipe.init_from is not None:
      continue
    known = map(compile_key, found)
    if own is run or compile_key(own) not in known:
      found.append(own)
  return found


def _trained_state(program: Program, run: RunConfig) -> tuple[TrainState, int]:
  """The state of the run's last checkpoint and its step. A run without a
  checkpoint of its own model gives its initial state and 0."""
  folder = pathlib.Path(run.folder)
  saved = read_config(folder)
  own = saved and tuple(saved["model"]["layer_kinds"]) == run.model.layer_kinds
  found = read_state(program, folder) if own else None
  return (program.init(run.seed), 0) if found is None else found


def _at_length(run: RunConfig, context: int, tokens: int) -> RunConfig:
  """The run with another context, and as many batch rows as hold `tokens`."""
  rows = max(1, tokens // context)
  parts = math.gcd(run.grad_accumulation, rows)
  return dataclasses.replace(
    run, context=context, batch_size=rows, grad_accumulation=parts
  )


def _batch(run: RunConfig, source: data_lib.Source | None) -> data_lib.Batch:
  """A batch of a run's data, or of random tokens without them."""
  if source is not None:
    batch = source.train_batch(
      0, 0, batch_size=run.batch_size, context=run.context
    )
    batch.check_ids(run.model.vocab_size)
    return batch
  shape = (run.batch_size, run.context)
  tokens = np.random.default_rng(0).integers(
    0, run.model.vocab_size, (shape[0], shape[1] + 1), np.int32
  )
  counted = np.ones(shape, bool)
  # Of packed data, each row is one document.
  ids = np.ones_like(tokens) if data_lib.is_packed(run.data) else None
  return data_lib.Batch(tokens, counted, np.full(shape, -1, np.int32), ids)


def speed(
  comparison: ComparisonConfig,
  folder: pathlib.Path,
  lengths: Sequence[int],
  *,
  random_tokens: bool = False,
) -> pathlib.Path:
  """Times a step of each side and phase at each length.

  `lower_s` and `compile_s` are the seconds to trace and lower a step and to
  compile it, while other steps compile beside it.

  All steps have equally many tokens: those of a training batch, or of the
  longest context if that is more. `runs_with_own_steps` says which sides are
  timed.

  Parameters come from the last checkpoints of the folder's runs, first task and
  first seed, where there are any. This matters for MSA: neighbouring queries
  share fewer blocks under an untrained index, which makes its steps slower.

  Args:
    comparison: its runs are timed.
    folder: of the comparison; speed.json is written there.
    lengths: tokens of context.
    random_tokens: time on random tokens, and do not open the run's data.

  Returns:
    The path of speed.json.

  Raises:
    ValueError: the data cannot be opened, or do not fit a length or the model.
  """
  task, seed = comparison.tasks()[0], comparison.seeds[0]
  comparison = only_task(comparison, task)
  comparison = dataclasses.replace(
    comparison,
    seeds=(seed,),
    runs=tuple(runs_with_own_steps(comparison.runs)),
  )
  sides = list(comparison.resolve(folder))
  tokens = max(*lengths, *(run.batch_size * run.context for run in sides))
  timed = [
    _at_length(run, length, tokens) for run in sides for length in lengths
  ]
  # Before programs are compiled, which takes minutes.
  source = None if random_tokens else data_lib.load(sides[0].data)
  batches = [_batch(run, source) for run in timed]
  programs = [Program(compile_key(run)) for run in timed]
  compile_all(
    (program, phase, "step")
    for run, program in zip(timed, programs)
    for phase in run.phases()
  )
  records = []
  rate = peak_flops()
  for run, program, batch in zip(timed, programs, batches):
    length = run.context
    shape = (run.batch_size, length)
    for phase in run.phases():
      state, trained = _trained_state(program, run)
      times, kernels = time_steps(program, run, phase, batch, state)
      median = statistics.median(times)
      flops = flops_per_step(run.model, phase, *shape)
      record = {
        "side": run.side,
        "phase": phase,
        "context": length,
        "batch_size": run.batch_size,
        "trained_steps": trained,
        "step_ms": round(1e3 * median, 3),
        "spread_ms": round(1e3 * (max(times) - min(times)), 3),
        "kernels_ms": kernels and round(1e3 * sum(kernels.values()), 3),
        "longest_kernels_ms": kernels
        and {n: round(1e3 * t, 3) for n, t in list(kernels.items())[:8]},
        "tokens_per_second": round(shape[0] * length / median, 1),
        "tflop_per_step": flops / 1e12,
        "mfu": rate and round(flops / median / rate / program.mesh.size, 4),
        "peak_bytes": program.compile(phase),
        "lower_s": round(program.compile_seconds["step", phase][0], 2),
        "compile_s": round(program.compile_seconds["step", phase][1], 2),
      }
      records.append(record)
      print(json.dumps(record), flush=True)
  folder.mkdir(parents=True, exist_ok=True)
  write_json(
    folder / "speed.json",
    {**provenance(), "peak_tflops": rate and rate / 1e12, "rows": records},
  )
  return folder / "speed.json"
