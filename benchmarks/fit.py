"""Fits the knobs of `cases.Sharing` to choices captured from a trained model.

  python -m benchmarks.fit train/results/lm73m_16k/mix/msa/seed0

The run folder's selection.npz holds, for each layer and group, the statistics
of `selection_stats.sharing`. Their means are the targets. Each knob moves one
statistic more than the others and is bisected for it, one knob after the other
and several rounds: sink for first_block, near for previous_block, noise for
union8. The drift of the walk is the power of four that comes closest to the
target of `kept`.

The knobs are fitted at other lengths too, to the same targets. The model was
measured at one length, so that neighbours share as much at longer ones is an
assumption. The command writes results/fitted_selection.json, which
`python -m benchmarks --selection fitted` reads. It takes seconds for each
length on a GPU, and many minutes on a CPU for 32K tokens or more.

The committed file was fitted to an earlier run than those in train/results. Its
"target" holds all statistics that were read from that run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import shlex
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import msa_jax
from benchmarks import cases, measure, records
from benchmarks.cases import Case, Sharing
from msa_jax import selection_stats

# (knob, the statistic that grows with it, least and largest value tried)
KNOBS = (
  ("sink", "first_block", 0.01, 1.0),
  ("near", "previous_block", 0.1, 32.0),
  ("noise", "union8", 0.02, 2.0),
)
DRIFTS = tuple(1 << n for n in range(6, 20, 2))
LENGTHS = tuple(1 << n for n in (13, 15, 17, 19, 20))
# Bisections of the first round, over the log of a knob's whole range.
HALVINGS = 6
# Bisections of each later round, which searches within a factor of the value
# found before.
AGAIN, FACTOR = (5, 5), 1.6


def target_of(folder: pathlib.Path) -> tuple[dict, Case]:
  """The statistics of a run's choices, and the case to fit inputs for.

  Raises:
    ValueError: the folder holds no statistics.
  """
  path = folder / "selection.npz"
  if not path.exists():
    raise ValueError(f"{folder}: no selection.npz; wanted the folder of a run")
  with np.load(path) as file:
    missing = [name for name in selection_stats.SHARING if name not in file]
    if missing:
      raise ValueError(f"{path} lacks {', '.join(missing)}")
    about = json.loads(str(file["about"]))
    found = {name: np.asarray(file[name]) for name in selection_stats.SHARING}
    block_size = int(file["block_size"])
  if not all(np.isfinite(values).all() for values in found.values()):
    raise ValueError(
      f"{path}: context {about['context']} leaves no choice to its queries, so"
      " there is nothing to fit"
    )
  target = {
    name: {
      "mean": float(values.mean()),
      "of_layers": [round(float(x), 4) for x in values.mean(1)],
    }
    for name, values in found.items()
  }
  # A few queries at the end of the keys are taken to represent all of them.
  case = Case(
    tokens=min(6 * block_size, about["context"]),
    kv_tokens=about["context"],
    num_kv_heads=4,
    block_size=block_size,
    top_k=about["top_k"],
  )
  return target, case


def statistics_of(case: Case, drift: int) -> Callable[[dict], dict]:
  """(knob values) -> statistics of what exact selection chooses."""

  @jax.jit
  def run(knobs):
    index = cases.sharing_inputs(
      jax.random.key(0), case, Sharing(drift=drift, **knobs)
    )
    ids = msa_jax.select_blocks(
      *index, block_size=case.block_size, top_k=case.top_k
    )
    found = selection_stats.sharing(
      ids, block_size=case.block_size, kv_len=case.kv_tokens
    )
    return {name: value.mean() for name, value in found.items()}

  def call(knobs: dict[str, float]) -> dict[str, float]:
    traced = {name: jax.numpy.float32(x) for name, x in knobs.items()}
    return {name: float(x) for name, x in run(traced).items()}

  return call


def fit(
  target: dict[str, float], case: Case, drift: int
) -> tuple[dict[str, float], dict[str, float]]:
  """The knobs for one drift of the walk, and the statistics they reach."""
  found_by = statistics_of(case, drift)
  knobs = {"sink": 0.1, "near": 1.0, "noise": 0.2}
  for halvings in (HALVINGS, *AGAIN):
    for knob, statistic, low, high in KNOBS:
      if halvings != HALVINGS:
        low, high = knobs[knob] / FACTOR, knobs[knob] * FACTOR
      for _ in range(halvings):
        knobs[knob] = (low * high) ** 0.5
        if found_by(knobs)[statistic] < target[statistic]:
          low = knobs[knob]
        else:
          high = knobs[knob]
  return knobs, found_by(knobs)


def fit_drift(
  target: dict[str, float], case: Case
) -> tuple[int, dict[str, float], dict[str, float]]:
  """The drift that reaches `kept` best, its knobs and their statistics.

  `kept` grows with the drift, so the drifts are searched by bisection.
  """
  fits = {}
  low, high = 0, len(DRIFTS) - 1
  while low <= high:
    middle = (low + high) // 2
    fits[DRIFTS[middle]] = fit(target, case, DRIFTS[middle])
    if fits[DRIFTS[middle]][1]["kept"] < target["kept"]:
      low = middle + 1
    else:
      high = middle - 1
  best = min(fits, key=lambda d: abs(fits[d][1]["kept"] - target["kept"]))
  return best, *fits[best]


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    prog="python -m benchmarks.fit",
    description=(__doc__ or "").split("\n\n")[0],
  )
  parser.add_argument("folder", type=pathlib.Path, help="folder of an MSA run")
  parser.add_argument(
    "--lengths", type=int, nargs="*", default=LENGTHS,
    help="key lengths to fit beside the run's own (default: %(default)s)",
  )  # fmt: skip
  parser.add_argument("--out", type=pathlib.Path, default=cases.FITTED)
  args = parser.parse_args(argv)
  try:
    target, case = target_of(args.folder)
  except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  means = {name: values["mean"] for name, values in target.items()}
  measure.log(f"wanted {means}")
  knobs_by_length = []
  for kv_tokens in sorted({case.kv_tokens, *args.lengths}):
    drift, knobs, reached = fit_drift(
      means, dataclasses.replace(case, kv_tokens=kv_tokens)
    )
    entry: dict[str, Any] = {"kv_tokens": kv_tokens, "drift": drift}
    entry |= {name: round(x, 4) for name, x in knobs.items()}
    entry["reached"] = {name: round(x, 3) for name, x in reached.items()}
    measure.log(json.dumps(entry))
    knobs_by_length.append(entry)
  words = ["python", "-m", "benchmarks.fit", *(argv or sys.argv[1:])]
  records.write_json(
    args.out,
    dict(
      command=shlex.join(words),
      commit=records.commit_name(),
      captured_at=case.kv_tokens,
      target=target,
      knobs=knobs_by_length,
    ),
  )
  measure.log(f"wrote {args.out}")
  return 0


if __name__ == "__main__":
  sys.exit(main())
