"""Compares several devices of one host with one device.

`devices` takes one run of each side of a preset and compares, between one
device and meshes of all devices:

- losses: those of the first steps, from one seed and the same batches. Beside
  them stand the losses of one device with the batch rows in another order,
  which differ by rounding alone.
- speed: a step of each phase. The yardstick is one device that does its share
  of the batch rows alone.
- generation: tokens of greedy decoding from one set of trained parameters, and
  the logits of given tokens. Where two logits are nearly equal, rounding
  decides which token is chosen, and the text that follows is another one:
  tokens can differ although logits hardly do.

Each device computes as much at a time as batch_size / grad_accumulation batch
rows are, so the batch is that times the number of devices. One device takes it
in parts; devices that share batch rows ("tensor", "context") take all of it,
because each has but its share of the heads or tokens.
The results file also counts the kernels in the program: in a mesh they must lie
inside `jax.shard_map` ("mapped"), each on its device's batch rows and KV heads.

On the GPUs of one host, with sizes that fill them. The learning rate is lower
than the preset's, at which rounding differences would grow within the steps:

  python -m train devices lm73m_16k --set optimizer.learning_rate=1e-4 \\
    data.text.max_bytes=40000000

Anywhere, on two devices that JAX makes of one CPU (losses must agree, speed
means nothing; compiling takes minutes):

  XLA_FLAGS=--xla_force_host_platform_device_count=2 JAX_PLATFORMS=cpu \\
    python -m train devices smoke --sides gqa --steps 20 --results runs/devices
"""

import concurrent.futures
import dataclasses
import json
import math
import pathlib
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from msa_jax import generate, ops
from train import data as data_lib
from train.checkpoint import provenance, write_json
from train.config import (
  ComparisonConfig,
  MeshConfig,
  RunConfig,
  check_sides,
  only_task,
)
from train.program import (
  Params,
  Program,
  TrainState,
  compile_all,
  compile_key,
  lower,
  train_step,
)
from train.speed import runs_with_own_steps, time_steps

RESULTS = pathlib.Path(__file__).parent / "results" / "devices"
# Kernels of a step that are listed.
_LONGEST = 12
# Tokens generated after each prompt.
NEW_TOKENS = 64


def every_mesh(model_heads: int, count: int) -> dict[str, MeshConfig]:
  """One device, and meshes of all devices.

  "context" splits the tokens of each sequence.

  The "tensor" mesh splits the KV heads over as many devices as divide both
  their number and `count`, and the batch rows over the rest. If only 1 divides
  both, there is no such mesh.
  """
  found = {
    "one": MeshConfig(),
    "data": MeshConfig(data=count),
    "fsdp": MeshConfig(fsdp=count),
    "context": MeshConfig(context=count),
  }
  split = math.gcd(model_heads, count)
  if split > 1:
    found["tensor"] = MeshConfig(data=count // split, tensor=split)
  return found


def _first_steps(run: RunConfig, steps: int) -> RunConfig:
  """The run with a shorter warm-up, which has the same share of the first
  `steps` as the run's own has of all steps.

  Learning rates stay those of the whole run.
  """
  if not 1 <= steps <= run.num_steps:
    raise ValueError(
      f"steps={steps}: wanted 1 to {run.num_steps}, the steps of"
      f" {run.task}/{run.side}."
    )
  warmup = run.recipe.index_warmup_steps
  if warmup and steps < 2:
    raise ValueError(
      f"steps={steps}: wanted at least 2, one of the warm-up and one sparse, of"
      f" {run.task}/{run.side}."
    )
  warmup = min(-(-warmup * steps // run.num_steps), steps - 1)
  recipe = dataclasses.replace(run.recipe, index_warmup_steps=warmup)
  return dataclasses.replace(run, recipe=recipe)


def _on(run: RunConfig, mesh: MeshConfig, count: int) -> RunConfig:
  """The run on a mesh, with a batch for `count` devices, each of which
  computes as much at a time as one device alone."""
  rows = run.batch_size // run.grad_accumulation
  parts = count // (mesh.data * mesh.fsdp * mesh.tensor * mesh.context)
  return dataclasses.replace(
    run, mesh=mesh, batch_size=count * rows, grad_accumulation=parts
  )


# ----------------------------------------------------------------- kernels


def launches(jaxpr: Any, mapped: bool = False) -> dict[str, int]:
  """Number of kernels and cuDNN calls in a program.

  Returns:
    "mapped": those inside of `jax.shard_map`; "unmapped": the others.
  """
  found = {"mapped": 0, "unmapped": 0}
  for eqn in jaxpr.eqns:
    name = eqn.primitive.name
    if name in ("mpmd_map", "pallas_call") or name.startswith(
      "dot_product_attention_"
    ):
      found["mapped" if mapped else "unmapped"] += 1
      continue
    inside = mapped or name == "shard_map"
    for inner in jax.extend.core.jaxprs_in_params(eqn.params):
      for key, number in launches(inner, inside).items():
        found[key] += number
  return found


# -------------------------------------------------------------- generation


class Generation:
  """Greedy continuation of a batch of prompts on a mesh, as one program.

  Prompts are half a context long. The program also returns the logits of given
  tokens after the prompts: as many as one call of `msa_jax.decode_attention`
  takes.
  """

  def __init__(self, program: Program):
    run = program.config
    self.program = program
    chunk = min(generate.PREFILL_TOKENS, run.context // 2)
    self.shape = (run.batch_size, run.context // 2 // chunk, chunk)
    self.given = (run.batch_size, min(ops.MAX_DECODE_TOKENS, NEW_TOKENS))
    self._compiled: Any = None

  def _run(self, params: Params, prompts: jax.Array, given: jax.Array):
    graphdef, flat = nnx.split(self.program.merge(params))
    model = nnx.merge(graphdef, flat)
    rows, chunks, size = self.shape
    unit = max(128, model.config.index.block_size)
    unit = math.lcm(unit, model.cache_unit(rows))
    needed = chunks * size + NEW_TOKENS
    cache = model.init_cache(rows, -(-needed // unit) * unit)

    def read(cache, tokens):
      out = model.extend(tokens, cache, last_only=True)
      return out.cache, out.logits[:, 0]

    cache, logits = lax.scan(read, cache, jnp.moveaxis(prompts, 1, 0))
    first = jnp.argmax(logits[-1], axis=-1).astype(jnp.int32)
    state = generate.DecodeState(
      cache,
      first,
      jnp.full(rows, NEW_TOKENS - 1, jnp.int32),
      jax.random.split(jax.random.key(0), rows),
    )
    _, new = generate.decode_steps(
      graphdef, flat, state, jnp.zeros(0, jnp.int32), steps=NEW_TOKENS - 1
    )
    tokens = jnp.concatenate([first[:, None], new.tokens], axis=1)
    return tokens, model.extend(given, cache).logits

  def trace(self) -> jax.stages.Traced:
    """The program before it is lowered."""
    program = self.program
    with program.context():
      return jax.jit(self._run, out_shardings=program.replicated).trace(
        program.abstract_state.params,
        program.put(np.zeros(self.shape, np.int32)),
        program.put(np.zeros(self.given, np.int32)),
      )

  def compile(self) -> dict[str, int]:
    """Compiles the program; returns its `launches`."""
    with self.program.context():
      traced, lowered, _ = lower(self.trace)
    self._compiled = lowered.compile(self.program.compiler_options)
    return launches(traced.jaxpr.jaxpr)

  def __call__(
    self, params: Params, prompts: np.ndarray, given: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray]:
    """New tokens after prompts, and the logits after each given token.

    Args:
      params: on any devices.
      prompts: int32 [B, at least half a context].
      given: int32 [B, at least as many as `self.given` says].
    """
    program = self.program
    prompts = prompts[:, : math.prod(self.shape[1:])].reshape(self.shape)
    with program.context():
      return jax.device_get(
        self._compiled(
          jax.device_put(params, program.state_shardings.params),
          program.put(prompts),
          program.put(given[:, : self.given[1]]),
        )
      )


# --------------------------------------------------------------- measuring


class _Placed(NamedTuple):
  """A run on a mesh, and the program that trains it."""

  run: RunConfig
  program: Program


@dataclasses.dataclass
class _Side:
  """The programs of a side.

  Attributes:
    placed: by the name of their mesh.
    alone: one device with its share of the batch rows.
    generations: by the name of their mesh.
  """

  placed: dict[str, _Placed]
  alone: _Placed
  generations: dict[str, Generation]


def _side(
  run: RunConfig, steps: int, count: int, chosen: Sequence[str] | None
) -> _Side:
  run = _first_steps(run, steps)

  def place(mesh: MeshConfig, count: int) -> _Placed:
    placed = _on(run, mesh, count)
    return _Placed(placed, Program(compile_key(placed)))

  every = every_mesh(run.model.num_kv_heads, count)
  unknown = set(chosen or ()) - set(every)
  if unknown:
    raise ValueError(f"meshes={sorted(unknown)}: wanted {', '.join(every)}.")
  every = {
    name: mesh
    for name, mesh in every.items()
    if name == "one" or name in (chosen or every)
  }
  placed = {name: place(mesh, count) for name, mesh in every.items()}
  generations = {name: Generation(x.program) for name, x in placed.items()}
  return _Side(placed, place(MeshConfig(), 1), generations)


def _train(
  placed: _Placed, batches: Sequence[data_lib.Batch]
) -> tuple[TrainState, dict[str, list[float]]]:
  """The state after one step for each batch, and the losses of the steps."""
  run, program = placed
  state, steps = program.init(run.seed), []
  for step, batch in enumerate(batches, 1):
    state, metrics = train_step(program, run, state, batch, step)
    steps.append(metrics)
  steps = jax.device_get(steps)
  if not all(metrics["finite"] for metrics in steps):
    raise FloatingPointError(f"{run.side}: a loss is not finite.")
  names = ("loss", "kl") if program.has_index else ("loss",)
  return state, {n: [float(metrics[n]) for metrics in steps] for n in names}


def _difference(found: Sequence[float], wanted: Sequence[float]) -> float:
  """The largest relative difference."""
  a, b = np.asarray(found), np.asarray(wanted)
  return float(np.max(np.abs(a - b) / np.abs(b)))


def _compared(
  found: dict[str, list[float]], wanted: dict[str, list[float]]
) -> dict[str, Any]:
  return {
    f"{name}_difference": _difference(found[name], wanted[name])
    for name in wanted
  } | found


def _speed_records(
  placed: _Placed, state: TrainState, batch: data_lib.Batch
) -> Iterator[dict[str, Any]]:
  run, program = placed
  for phase in run.phases():
    # Timed steps reuse the buffers of their state, so they get a copy.
    copied = jax.tree.map(jnp.copy, state)
    times, kernels = time_steps(program, run, phase, batch, copied)
    median = statistics.median(times)
    longest = list((kernels or {}).items())[:_LONGEST]
    yield {
      "phase": phase,
      "batch_size": run.batch_size,
      "step_ms": round(1e3 * median, 3),
      "spread_ms": round(1e3 * (max(times) - min(times)), 3),
      "tokens_per_second": round(run.batch_size * run.context / median, 1),
      "peak_bytes": program.compile(phase),
      "kernels": launches(program.trace(phase).jaxpr.jaxpr),
      # Of the first device: what a mesh adds to a step.
      "kernels_ms": {
        name.split("<")[0]: round(1e3 * seconds, 3) for name, seconds in longest
      },
      "all_kernels_ms": round(1e3 * sum((kernels or {}).values()), 3),
    }


def _measure(
  side: _Side,
  source: data_lib.Source,
  steps: int,
  generation_kernels: dict[str, dict[str, int]],
) -> dict[str, list[dict[str, Any]]]:
  """The records of a side: losses, speed and generation."""
  one = side.placed["one"]
  run = one.run
  attention = run.model.gqa_implementation
  if run.uses_msa:
    attention = run.model.implementation
  about = {"side": run.side, "implementation": attention}
  shape = {"batch_size": run.batch_size, "context": run.context}
  batches = [source.train_batch(run.seed, i, **shape) for i in range(steps)]
  turned = [
    jax.tree.map(lambda rows: np.roll(rows, 1, axis=0), batch)
    for batch in batches
  ]
  result: dict[str, list[dict[str, Any]]] = {
    "losses": [],
    "speed": [],
    "generation": [],
  }

  def add(kind: str, mesh: str, record: dict[str, Any]) -> None:
    record = {**about, "mesh": mesh, **record}
    result[kind].append(record)
    shown = {k: v for k, v in record.items() if not isinstance(v, list)}
    print(json.dumps(shown), flush=True)

  state, wanted = _train(one, batches)
  params = jax.device_get(state.params)
  add("losses", "one", _compared(wanted, wanted))
  own = source.train_batch(
    run.seed, 0, batch_size=side.alone.run.batch_size, context=run.context
  )
  base = {}
  for record in _speed_records(side.alone, state, own):
    base[record["phase"]] = record["tokens_per_second"]
    add("speed", "one", {**record, "efficiency": 1.0})
  del state
  state, found = _train(one, turned)
  del state
  add("losses", "one, rows in another order", _compared(found, wanted))
  for name, placed in side.placed.items():
    if name == "one":
      continue
    state, found = _train(placed, batches)
    add("losses", name, _compared(found, wanted))
    for record in _speed_records(placed, state, batches[0]):
      ideal = placed.program.mesh.size * base[record["phase"]]
      efficiency = round(record["tokens_per_second"] / ideal, 4)
      add("speed", name, {**record, "efficiency": efficiency})
    del state

  prompts = source.train_batch(run.seed, steps, **shape).tokens
  generation = side.generations["one"]
  tokens, _ = generation(params, prompts, prompts)
  _, logits = generation(params, prompts, tokens)
  for name, generation in side.generations.items():
    found, other = generation(params, prompts, tokens)
    record = {
      "rows": len(prompts),
      "prompt_tokens": math.prod(generation.shape[1:]),
      "new_tokens": NEW_TOKENS,
      "equal_tokens": float(np.mean(found == tokens)),
      "logit_difference": float(np.max(np.abs(other - logits))),
      "logit_deviation": float(np.std(logits)),
      "kernels": generation_kernels[name],
    }
    add("generation", name, record)
  return result


def devices(
  comparison: ComparisonConfig,
  steps: int,
  *,
  sides: Sequence[str] | None = None,
  meshes: Sequence[str] | None = None,
  results: pathlib.Path = RESULTS,
) -> pathlib.Path:
  """Measures the sides of the first task with seed 0, and prints a table.

  Args:
    comparison: its sides that start from another side are left out.
    steps: training steps whose losses are compared.
    sides: the only sides to measure; None: all.
    meshes: the only meshes to compare with one device; None: all.
    results: folder of the results file.

  Returns:
    The path of the results file.

  Raises:
    ValueError: there is only one device, a side or mesh is unknown, the data
      cannot be opened, or a run does not fit them or the meshes.
  """
  count = jax.device_count()
  if count < 2:
    raise ValueError(
      "devices: wanted at least 2 devices, 1 is here (on a CPU:"
      " XLA_FLAGS=--xla_force_host_platform_device_count=2)."
    )
  members = only_task(comparison, comparison.tasks()[0]).runs
  runs = {run.side: run for run in runs_with_own_steps(members)}
  check_sides(list(runs.values()), sides, members)
  runs = {name: run for name, run in runs.items() if name in (sides or runs)}
  source = data_lib.load(next(iter(runs.values())).data)
  for run in runs.values():  # before programs are compiled for minutes
    rows = _on(run, MeshConfig(), count).batch_size
    batch = source.train_batch(
      run.seed, 0, batch_size=rows, context=run.context
    )
    batch.check_ids(run.model.vocab_size)
  start = time.monotonic()
  made = {name: _side(run, steps, count, meshes) for name, run in runs.items()}
  calls = [
    (placed.program, phase, "step")
    for side in made.values()
    for placed in (*side.placed.values(), side.alone)
    for phase in placed.run.phases()
  ]
  kernels: dict[str, dict[str, Any]] = {name: {} for name in made}
  with concurrent.futures.ThreadPoolExecutor() as pool:
    for name, side in made.items():
      for mesh, generation in side.generations.items():
        kernels[name][mesh] = pool.submit(generation.compile)
    compile_all(calls)
  print(f"programs after {time.monotonic() - start:.0f} s", flush=True)
  result: dict[str, Any] = {
    **provenance(),
    "preset": comparison.name,
    "steps": steps,
    "context": next(iter(runs.values())).context,
    "losses": [],
    "speed": [],
    "generation": [],
  }
  for name, side in made.items():
    counts = {mesh: task.result() for mesh, task in kernels[name].items()}
    for kind, records in _measure(side, source, steps, counts).items():
      result[kind] += records
  print(_table(result), flush=True)
  kind = "_".join(result["device"].lower().split())
  results.mkdir(parents=True, exist_ok=True)
  path = results / f"{'_'.join([comparison.name, *made, kind])}_x{count}.json"
  write_json(path, result)
  return path


def _table(result: dict[str, Any]) -> str:
  lines = [f"{result['device_count']} x {result['device']}"]
  for record in result["losses"]:
    kl = record.get("kl_difference")
    lines.append(
      f"losses     {record['side']:8} {record['mesh']:26}"
      f" {record['loss_difference']:.1e}" + (f", KL {kl:.1e}" if kl else "")
    )
  for record in result["speed"]:
    lines.append(
      f"speed      {record['side']:8} {record['mesh']:26} {record['phase']:7}"
      f" {record['tokens_per_second']:10.0f} tokens/s"
      f" {record['efficiency']:.1%}"
    )
  for record in result["generation"]:
    lines.append(
      f"generation {record['side']:8} {record['mesh']:26}"
      f" {record['equal_tokens']:.1%} of tokens equal, logits differ by"
      f" {record['logit_difference']:.1e} of {record['logit_deviation']:.1e}"
    )
  return "\n".join(lines)
