"""Copies a comparison without what its report does not read.

  python -m train.report.thin runs/NAME train/results/NAME
  python -m train report train/results/NAME

Several folders, each with other seeds, become one.

A committed result should be small, and its report must show the numbers that
the full run folders gave. For each run this keeps:

* `config.json`, `broken.json` and `samples.json` as they are.
* What `environment.json` says, in one file of the task, since a file takes 4 KB
  of a disk however little it holds: `<task>/environment.json` has the entries
  that all runs of the task share, and below "runs" what each has besides.
* `metrics.jsonl` with all of its records, but fewer fields. A training record
  keeps its step, phase, seconds, loss and speed, and the peak memory where that
  is highest. As the names of fields would be most of their bytes, training
  records lie in columns: those that follow each other in one phase are one
  line, with what they share and below "columns" a list for each other field.
  The record with the peak memory is a line of its own.
  The last record of every other kind is what tables and gaps are made of, and
  stays whole. Earlier records serve only curves: they keep single numbers and
  lose lists (losses of each batch, answers by distance).
  A finished run ends with a record of kind "done", which has what `done.json`
  says but for "final", the last "eval" record: a file of 14 bytes would take 4
  KB too. `runs.read_records` gives the records one by one.
* `selection.npz` without the chosen blocks of single queries. The first seed of
  a side, which the report draws, keeps `counts`, rounded to 1/8: the colours of
  the figure hardly show more. The statistics of shared choices stay in all. The
  file is packed by LZMA, which takes a quarter less than the deflation of
  `np.savez_compressed`; `np.load` reads both.

Checkpoints, event files and the report are left behind.
"""

import argparse
import io
import itertools
import json
import math
import pathlib
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from train.report.runs import (
  check_runs,
  read_environment,
  read_records,
  read_runs,
)

_TRAIN_FIELDS = (
  "kind",
  "step",
  "phase",
  "seconds",
  "loss",
  "tokens_per_second",
)
# What the training records of one line share.
_SHARED = ("kind", "phase", "peak_bytes")
_COPIED = ("config.json", "broken.json", "samples.json")
_DIGITS = 7  # of numbers that only curves and medians show
_LAYER_DIGITS = 4
_COUNT_STEPS = 8


def _rounded(value: Any, digits: int = _DIGITS) -> Any:
  """The value with its floats rounded to significant digits."""
  if isinstance(value, dict):
    return {key: _rounded(item, digits) for key, item in value.items()}
  if isinstance(value, list):
    return [_rounded(item, digits) for item in value]
  if isinstance(value, float) and math.isfinite(value):
    return float(f"{value:.{digits}g}")
  return value


def _in_columns(records: list[dict]) -> list[dict]:
  """Training records as lines in columns (see the module)."""
  lines = []
  for _, group in itertools.groupby(
    records, key=lambda record: [record.get(field) for field in _SHARED]
  ):
    first, *_ = members = list(group)
    line = {field: first[field] for field in _SHARED if field in first}
    line["columns"] = {
      field: [record[field] for record in members]
      for field in first
      if field not in _SHARED
    }
    lines.append(line)
  return lines


def thin_metrics(records: list[dict]) -> list[dict]:
  """The lines of a thinned metrics.jsonl: what the report reads of each record,
  the training records first."""
  last = {record["kind"]: i for i, record in enumerate(records)}
  peaks = [record.get("peak_bytes") or 0 for record in records]
  highest = max(peaks, default=0)
  trained, others = [], []
  for i, record in enumerate(records):
    if record["kind"] == "train":
      kept = _rounded({field: record[field] for field in _TRAIN_FIELDS})
      if highest and i == peaks.index(highest):
        kept["peak_bytes"] = highest
      trained.append(kept)
      continue
    if i == last[record["kind"]]:
      kept = record
    elif record["kind"] == "layers":
      kept = _rounded(record, _LAYER_DIGITS)
    else:
      kept = {
        key: value
        for key, value in _rounded(record).items()
        if not isinstance(value, list)
      }
      if "batch_loss" in record:
        kept["batch_loss"] = []  # an eval record must have the field
    others.append(kept)
  return [*_in_columns(trained), *others]


def thin_selection(content: bytes, with_counts: bool) -> bytes:
  """A selection.npz without single queries and, if so wanted, `counts`."""
  with np.load(io.BytesIO(content)) as file:
    arrays = {name: file[name] for name in file if name != "block_indices"}
  counts = arrays.pop("counts", None)
  if with_counts and counts is not None:
    steps = np.rint(counts.astype(np.float32) * _COUNT_STEPS)
    # Multiples of 1/8 up to 1 are exact in float16.
    arrays["counts"] = (steps / _COUNT_STEPS).astype(np.float16)
  packed = io.BytesIO()
  with zipfile.ZipFile(packed, "w", zipfile.ZIP_LZMA) as archive:
    for name, array in arrays.items():
      with archive.open(f"{name}.npy", "w") as member:
        np.lib.format.write_array(member, array, allow_pickle=False)
  return packed.getvalue()


def shared_entries(environments: list[dict]) -> dict:
  """The entries that are the same in all of a task's environments."""
  if not environments:
    return {}
  first, *others = environments
  return {
    key: value
    for key, value in first.items()
    if all(key in other and other[key] == value for other in others)
  }


def _json(value: dict) -> str:
  """A line of JSON without spaces."""
  return json.dumps(value, separators=(",", ":")) + "\n"


def _seed(run: pathlib.Path) -> int:
  return int(run.name.removeprefix("seed"))


def _thin_task(tasks: list[pathlib.Path], target: pathlib.Path) -> None:
  """Copies the runs of one task, `<side>/seed<k>` below each of its folders."""
  runs = sorted(
    (
      path.parent for task in tasks for path in task.glob("*/seed*/config.json")
    ),
    key=lambda run: (run.parent.name, _seed(run)),
  )
  environments = {
    f"{run.parent.name}/{run.name}": read_environment(run) for run in runs
  }
  shared = shared_entries([*environments.values()])
  besides = {
    name: {k: v for k, v in found.items() if k not in shared}
    for name, found in environments.items()
  }
  target.mkdir()
  (target / "environment.json").write_text(_json(shared | {"runs": besides}))
  drawn = set()  # the sides whose first saved choices have been met
  for run in runs:
    run_target = target / run.parent.name / run.name
    run_target.mkdir(parents=True)
    for name in _COPIED:
      if (run / name).exists():
        shutil.copyfile(run / name, run_target / name)
    if lines := thin_metrics(read_records(run)):
      (run_target / "metrics.jsonl").write_text("".join(map(_json, lines)))
    selection = run / "selection.npz"
    if selection.exists():
      first = run.parent.name not in drawn
      drawn.add(run.parent.name)
      (run_target / "selection.npz").write_bytes(
        thin_selection(selection.read_bytes(), with_counts=first)
      )


def _write_head(sources: Sequence[pathlib.Path], target: pathlib.Path) -> None:
  """Copies the files beside the tasks, each from the first folder that has it.
  The comparison gets the sides and seeds of all, and the seeds of all runs: a
  folder's own names those of the last command that wrote to it."""
  paths = [path for source in sources for path in sorted(source.glob("*.json"))]
  for path in reversed(paths):
    shutil.copyfile(path, target / path.name)
  plans = [
    json.loads(path.read_text())
    for path in paths
    if path.name == "comparison.json"
  ]
  if not plans:
    return
  seeds = {seed for plan in plans for seed in plan["seeds"]}
  seeds |= {
    _seed(path.parent)
    for source in sources
    for path in source.glob("*/*/seed*/config.json")
  }
  sides: dict[tuple[str, str], dict] = {}
  for plan in plans:
    for run in plan["runs"]:
      sides.setdefault((run["task"], run["side"]), run)
  found = {"seeds": sorted(seeds), "runs": [*sides.values()]}
  if any(plans[0][key] != value for key, value in found.items()):
    (target / "comparison.json").write_text(_json(plans[0] | found))


def thin(sources: Sequence[pathlib.Path], target: pathlib.Path) -> None:
  """Copies a comparison's folders to `target`, thinned as the module says.

  The copy is written to a temporary folder, which is then renamed to `target`,
  so that no half of it can be left there. Thinning a thin folder changes
  nothing.

  Args:
    sources: folders with `<task>/<side>/seed<k>` run folders below them, as
      `runs.read_runs` takes them.
    target: the folder to make.

  Raises:
    ValueError: the target exists, a source holds no run, or several may not be
      merged.
  """
  tasks: dict[str, list[pathlib.Path]] = {}
  for source in sources:
    found = {path.parents[2] for path in source.glob("*/*/seed*/config.json")}
    if not found:
      raise ValueError(
        f"{source} holds no runs; wanted <task>/<side>/seed<k>/config.json"
        " below it"
      )
    for task in sorted(found):
      tasks.setdefault(task.name, []).append(task)
  if len(sources) > 1:
    members = read_runs(*sources)
    for task in tasks:
      check_runs([run for run in members if run.task == task])
  if target.exists():
    raise ValueError(f"{target} exists; wanted the name of a new folder")
  target.parent.mkdir(parents=True, exist_ok=True)
  temporary = pathlib.Path(tempfile.mkdtemp(prefix=".thin-", dir=target.parent))
  try:
    temporary.chmod(0o755)
    _write_head(sources, temporary)
    for name, folders in tasks.items():
      _thin_task(folders, temporary / name)
    temporary.rename(target)
  except BaseException:
    shutil.rmtree(temporary, ignore_errors=True)
    raise


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    prog="python -m train.report.thin",
    description=(__doc__ or "").split("\n\n")[0],
  )
  parser.add_argument(
    "source",
    type=pathlib.Path,
    nargs="+",
    help="folder of a comparison; several hold different seeds",
  )
  parser.add_argument("target", type=pathlib.Path, help="folder to make")
  args = parser.parse_args(argv)
  try:
    thin(args.source, args.target)
  except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  print(args.target)
  return 0


if __name__ == "__main__":
  sys.exit(main())
