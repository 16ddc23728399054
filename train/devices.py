"""Several devices of one host: the losses of one, speed, generation.

`devices` takes one run of each side of a preset through three questions, on one
device and in meshes of all devices:

- losses: the first steps from one seed and the same batches, against the losses
  of one device. Beside them, what one device gives with the rows of each batch
  in another order: a difference that rounding alone makes.
- speed: a step of each phase, against one device that steps its share of the
  rows alone.
- generation: tokens by greedy choice from one set of trained parameters, and
  the logits of tokens that are given. Near ties may go either way, and what
  follows one is another text: tokens differ where logits hardly do.

Every device computes as many rows at a time as a part of the preset's batch
has, so the batch is that times the number of devices; it is taken in parts
where devices share a row ("tensor") and on one device. Kernels are counted in
the program: in a mesh they lie inside `jax.shard_map` ("mapped"), each on its
device's rows and KV heads.

On the GPUs of one host, with sizes that fill them and a learning rate at which
rounding does not grow within the steps, as at the preset's own it does:

  python -m train devices evidence --set optimizer.learning_rate=1e-4 \\
    data.text.max_bytes=40000000

Anywhere, on two devices that JAX makes of one CPU, where compiling takes
minutes (losses must agree, speed means nothing):

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
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from msa_jax import generate, ops
from train import data as data_lib
from train.checkpoint import provenance, write_json
from train.config import ComparisonConfig, MeshConfig, RunConfig
from train.program import Params, Program, TrainState, lower, prepare
from train.speed import time_steps

RESULTS = pathlib.Path(__file__).parent / "results" / "devices"
# Tokens made after each prompt.
NEW_TOKENS = 64


def meshes(model_heads: int, count: int) -> dict[str, MeshConfig]:
  """One device, and meshes of all of them.

  Without a common divisor of `count` devices and the KV heads no mesh splits
  heads; devices beyond it hold other rows.
  """
  found = {
    "one": MeshConfig(),
    "data": MeshConfig(data=count),
    "fsdp": MeshConfig(fsdp=count),
  }
  split = math.gcd(model_heads, count)
  if split > 1:
    found["tensor"] = MeshConfig(data=count // split, tensor=split)
  return found


def _first_steps(run: RunConfig, steps: int) -> RunConfig:
  """The run, with the warm-up's share of its steps in its first ones.

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
      f"steps={steps}: wanted at least 2, a warm-up's and a sparse one, of"
      f" {run.task}/{run.side}."
    )
  warmup = min(-(-warmup * steps // run.num_steps), steps - 1)
  recipe = dataclasses.replace(run.recipe, index_warmup_steps=warmup)
  return dataclasses.replace(run, recipe=recipe)


def _on(run: RunConfig, mesh: MeshConfig, count: int) -> RunConfig:
  """The run on a mesh, with the rows of `count` devices, each its own."""
  rows = run.batch_size // run.grad_accumulation
  parts = count // (mesh.data * mesh.fsdp)
  return dataclasses.replace(
    run, mesh=mesh, batch_size=count * rows, grad_accumulation=parts
  )


# ----------------------------------------------------------------- kernels


def launches(jaxpr: Any, mapped: bool = False) -> dict[str, int]:
  """How many kernels and cuDNN calls stand in a program: "mapped" inside
  `jax.shard_map`, "unmapped" outside of it."""
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
  """Greedy continuation of a batch of prompts in a mesh, as one program.

  Prompts are half a context long. Logits are of tokens that follow them: as
  many as one call of `msa_jax.decode_attention` takes.
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
    """Compiles it; returns its `launches`."""
    with self.program.context():
      traced, lowered = lower(self.trace)
    self._compiled = lowered.compile()
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


@dataclasses.dataclass
class _Side:
  """What is compiled for a side: the meshes' programs, and one device's of its
  share of the rows."""

  programs: dict[str, Program]
  alone: Program
  generations: dict[str, Generation]


def _side(run: RunConfig, steps: int, count: int) -> _Side:
  run = _first_steps(run, steps)
  programs = {
    name: Program(_on(run, mesh, count))
    for name, mesh in meshes(run.model.num_kv_heads, count).items()
  }
  alone = Program(_on(run, MeshConfig(), 1))
  generations = {name: Generation(made) for name, made in programs.items()}
  return _Side(programs, alone, generations)


def _train(
  program: Program, batches: Sequence[data_lib.Batch]
) -> tuple[TrainState, dict[str, list[float]]]:
  """The state after a step for each batch, and the losses of the steps."""
  state, rows = program.init(), []
  for step, batch in enumerate(batches, 1):
    state, metrics = program.step(state, batch, step)
    rows.append(metrics)
  rows = jax.device_get(rows)
  if not all(row["finite"] for row in rows):
    raise FloatingPointError(f"{program.config.side}: a loss is not finite.")
  names = ("loss", "kl") if program.has_index else ("loss",)
  return state, {name: [float(row[name]) for row in rows] for name in names}


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


def _speed_rows(
  program: Program, state: TrainState, batch: data_lib.Batch
) -> Iterator[dict[str, Any]]:
  run = program.config
  for phase in run.phases():
    # Timing uses up what it is given.
    times = time_steps(program, phase, batch, jax.tree.map(jnp.copy, state))
    median = statistics.median(times)
    yield {
      "phase": phase,
      "batch_size": run.batch_size,
      "step_ms": round(1e3 * median, 3),
      "spread_ms": round(1e3 * (max(times) - min(times)), 3),
      "tokens_per_second": round(run.batch_size * run.context / median, 1),
      "peak_bytes": program.compile(phase),
      "kernels": launches(program.trace(phase).jaxpr.jaxpr),
    }


def _measure(
  side: _Side,
  source: data_lib.Source,
  steps: int,
  generation_kernels: dict[str, dict[str, int]],
) -> dict[str, list[dict[str, Any]]]:
  """The rows of a side: losses, speed and generation."""
  one = side.programs["one"]
  run = one.config
  attention = run.model.gqa_implementation
  if run.uses_msa:
    attention = run.model.implementation
  about = {"side": run.side, "implementation": attention}
  shape = {"batch_size": run.batch_size, "context": run.context}
  batches = [source.train_batch(run.seed, i, **shape) for i in range(steps)]
  turned = [
    data_lib.Batch(*(np.roll(rows, 1, axis=0) for rows in batch))
    for batch in batches
  ]
  result: dict[str, list[dict[str, Any]]] = {
    "losses": [],
    "speed": [],
    "generation": [],
  }

  def add(kind: str, mesh: str, row: dict[str, Any]) -> None:
    row = {**about, "mesh": mesh, **row}
    result[kind].append(row)
    shown = {k: v for k, v in row.items() if not isinstance(v, list)}
    print(json.dumps(shown), flush=True)

  state, wanted = _train(one, batches)
  params = jax.device_get(state.params)
  add("losses", "one", _compared(wanted, wanted))
  own = source.train_batch(
    run.seed, 0, batch_size=side.alone.config.batch_size, context=run.context
  )
  base = {}
  for row in _speed_rows(side.alone, state, own):
    base[row["phase"]] = row["tokens_per_second"]
    add("speed", "one", {**row, "efficiency": 1.0})
  del state
  state, found = _train(one, turned)
  del state
  add("losses", "one, rows in another order", _compared(found, wanted))
  for name, program in side.programs.items():
    if name == "one":
      continue
    state, found = _train(program, batches)
    add("losses", name, _compared(found, wanted))
    for row in _speed_rows(program, state, batches[0]):
      ideal = program.mesh.size * base[row["phase"]]
      efficiency = round(row["tokens_per_second"] / ideal, 4)
      add("speed", name, {**row, "efficiency": efficiency})
    del state

  prompts = source.train_batch(run.seed, steps, **shape).tokens
  generation = side.generations["one"]
  tokens, _ = generation(params, prompts, prompts)
  _, logits = generation(params, prompts, tokens)
  for name, generation in side.generations.items():
    found, other = generation(params, prompts, tokens)
    row = {
      "rows": len(prompts),
      "prompt_tokens": math.prod(generation.shape[1:]),
      "new_tokens": NEW_TOKENS,
      "equal_tokens": float(np.mean(found == tokens)),
      "logit_difference": float(np.max(np.abs(other - logits))),
      "logit_deviation": float(np.std(logits)),
      "kernels": generation_kernels[name],
    }
    add("generation", name, row)
  return result


def devices(
  comparison: ComparisonConfig,
  steps: int,
  *,
  sides: Sequence[str] | None = None,
  results: pathlib.Path = RESULTS,
) -> pathlib.Path:
  """Measures the sides of the first task, seed 0, and prints a table.

  Args:
    comparison: sides that start from another side are left out.
    steps: training steps whose losses are compared.
    sides: the only ones to measure; None: all.
    results: folder of the results file.

  Returns:
    The path of the results file.

  Raises:
    ValueError: there is one device only, a side is unknown, or a run does not
      fit the meshes.
  """
  count = jax.device_count()
  if count < 2:
    raise ValueError(
      "devices: wanted at least 2 devices, 1 is here (on a CPU:"
      " XLA_FLAGS=--xla_force_host_platform_device_count=2)."
    )
  task = comparison.tasks()[0]
  runs = {
    run.side: run
    for run in comparison.runs
    if run.task == task and run.recipe.init_from is None
  }
  unknown = set(sides or ()) - set(runs)
  if unknown:
    raise ValueError(f"sides={sorted(unknown)}: wanted {', '.join(runs)}.")
  runs = {name: run for name, run in runs.items() if name in (sides or runs)}
  start = time.monotonic()
  made = {name: _side(run, steps, count) for name, run in runs.items()}
  calls = [
    (program, phase)
    for side in made.values()
    for program in (*side.programs.values(), side.alone)
    for phase in program.config.phases()
  ]
  kernels: dict[str, dict[str, Any]] = {name: {} for name in made}
  with concurrent.futures.ThreadPoolExecutor() as pool:
    for name, side in made.items():
      for mesh, generation in side.generations.items():
        kernels[name][mesh] = pool.submit(generation.compile)
    source = prepare(next(iter(runs.values())).data, calls, ("step",))
  print(f"data and programs after {time.monotonic() - start:.0f} s", flush=True)
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
    for kind, rows in _measure(side, source, steps, counts).items():
      result[kind] += rows
  print(_table(result), flush=True)
  kind = "_".join(result["device"].lower().split())
  results.mkdir(parents=True, exist_ok=True)
  path = results / f"{'_'.join([comparison.name, *made, kind])}_x{count}.json"
  write_json(path, result)
  return path


def _table(result: dict[str, Any]) -> str:
  lines = [f"{result['device_count']} x {result['device']}"]
  for row in result["losses"]:
    kl = row.get("kl_difference")
    lines.append(
      f"losses     {row['side']:8} {row['mesh']:26}"
      f" {row['loss_difference']:.1e}" + (f", KL {kl:.1e}" if kl else "")
    )
  for row in result["speed"]:
    lines.append(
      f"speed      {row['side']:8} {row['mesh']:26} {row['phase']:7}"
      f" {row['tokens_per_second']:10.0f} tokens/s {row['efficiency']:.1%}"
    )
  for row in result["generation"]:
    lines.append(
      f"generation {row['side']:8} {row['mesh']:26}"
      f" {row['equal_tokens']:.1%} of tokens equal, logits differ by"
      f" {row['logit_difference']:.1e} of {row['logit_deviation']:.1e}"
    )
  return "\n".join(lines)
