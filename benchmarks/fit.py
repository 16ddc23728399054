"""Fits the knobs of `cases.Sharing` to choices captured from a trained model.

  python -m benchmarks.fit train/results/evidence/mix/msa/seed0

The folder's selection.npz holds, for each layer and group, the statistics of
`selection_stats.sharing`; their means are the targets. Each knob moves one
statistic most and is bisected for it, in turns: sink for first_block, near for
previous_block, noise for union8. The walk's drift is the power of four that comes closest to
`kept`. All is fitted again at other lengths, to the same targets: the model was
seen at one length, and that longer ones share as much is an assumption. Writes
results/fitted_selection.json, which `--selection fitted` of the benchmark
reads. Seconds a length on a GPU; on a CPU from 32K on many minutes.
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
from benchmarks import cases, measure, results
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
# Halvings of the log of a knob's range, in the first round and in the others,
# which look within a factor of 1.6 of the last round's value.
HALVINGS, AGAIN, FACTOR = 6, (5, 5), 1.6


def target_of(folder: pathlib.Path) -> tuple[dict, Case]:
  """The statistics of a run's choices, and their shape.

  Raises:
    ValueError: there are no statistics.
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
  # Few queries at the end of the keys stand for all.
  case = Case(
    tokens=min(6 * block_size, about["context"]),
    kv_tokens=about["context"],
    num_kv_heads=4,
    block_size=block_size,
    top_k=about["top_k"],
  )
  return target, case


def statistics_of(case: Case, drift: int) -> Callable[[dict], dict]:
  """Knob values -> the statistics of what `exact` selection chooses."""

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
  """Knobs for one walk, and what they reach."""
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
  """The walk that keeps blocks as long as wanted: `kept` grows with drift."""
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
    help="keys, beside the captured length (default: %(default)s)",
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
  rows = []
  for kv_tokens in sorted({case.kv_tokens, *args.lengths}):
    drift, knobs, reached = fit_drift(
      means, dataclasses.replace(case, kv_tokens=kv_tokens)
    )
    row: dict[str, Any] = {"kv_tokens": kv_tokens, "drift": drift}
    row |= {name: round(x, 4) for name, x in knobs.items()}
    row["reached"] = {name: round(x, 3) for name, x in reached.items()}
    measure.log(json.dumps(row))
    rows.append(row)
  words = ["python", "-m", "benchmarks.fit", *(argv or sys.argv[1:])]
  results.write_json(
    args.out,
    dict(
      command=shlex.join(words),
      commit=results.commit_name(),
      captured_at=case.kv_tokens,
      target=target,
      knobs=rows,
    ),
  )
  measure.log(f"wrote {args.out}")
  return 0


if __name__ == "__main__":
  sys.exit(main())
