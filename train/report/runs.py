"""Reads run folders back and checks that they may be compared.

The side named ``gqa`` is the baseline of a comparison. Runs that differ in more
than attention are refused. `gaps` computes what they differ by.

A record is one line of a run's metrics.jsonl. A thinned run has several in a
line, and `read_records` gives them one by one.
"""

import dataclasses
import json
import math
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from train import config as config_lib

BASELINE = "gqa"
# The fields in which two sides may differ: attention, its recipe, and whether
# layers are scanned, which changes how they are compiled.
_ATTENTION = re.compile(
  r"model\.(layer_kinds|implementation|gqa_implementation|scan_layers"
  r"|index(\..+)?)"
  r"|recipe(\..+)?|optimizer\.index_.+"
)
# Fields that name a run, its folder and the checkpoints it keeps.
_PLACE = re.compile(r"side|folder|keep_steps")
# Those of the machine, in which the seeds of a side may differ too. A run may
# be continued with others.
_MACHINE = re.compile(r"mesh\..+|data\.(text\.)?cache_dir")


@dataclasses.dataclass(frozen=True)
class Metric:
  """A number of an "eval" record, and how to show it (value times scale)."""

  key: str
  title: str
  unit: str
  scale: float = 1.0
  higher_is_better: bool = False

  @property
  def digits(self) -> int:
    return 2 if self.unit == "%" else 4

  @property
  def gap_unit(self) -> str:
    return "percentage points" if self.unit == "%" else self.unit


BITS = Metric("bits_per_byte", "Held-out loss", "bits per byte")
NATS = Metric("loss", "Held-out loss", "nats per token")


@dataclasses.dataclass(frozen=True)
class Probe:
  """A kind of retrieval. The names of its fields in an "eval" record begin with
  its prefix."""

  prefix: str

  @property
  def name(self) -> str:
    return self.prefix.rstrip("_")

  @property
  def words(self) -> str:
    """The name as text shows it."""
    return self.name.replace("_", " ")

  @property
  def by_distance(self) -> str:
    return f"{self.prefix}by_distance"

  @property
  def by_number(self) -> str:
    return f"{self.prefix}by_number"

  @property
  def by_choice(self) -> str:
    return f"{self.prefix}by_choice"

  @property
  def accuracy(self) -> Metric:
    title = f"{self.words or 'held-out'} answers right".capitalize()
    return Metric(f"{self.prefix}accuracy", title, "%", 100.0, True)


@dataclasses.dataclass
class Run:
  """The content of one run folder.

  Attributes:
    records: of metrics.jsonl by kind; `_NEEDED` lists the kinds. "done" is left
      out.
    samples: of samples.json (see `train.sample.continuations`).
    finished: whether the run has finished.
    broken: the step at which a number became NaN or infinite, and why; empty
      if none did.
  """

  folder: Path
  task: str
  side: str
  seed: int
  config: dict
  environment: dict
  records: dict[str, list[dict]]
  finished: bool
  broken: dict
  samples: list[dict[str, str]]

  @property
  def label(self) -> str:
    return f"{self.task}/{self.side}/seed{self.seed}"

  @property
  def final(self) -> dict:
    """The last "eval" record; empty if there is none."""
    return self.records["eval"][-1] if self.records["eval"] else {}

  @property
  def final_dense(self) -> dict:
    """The final weights evaluated with dense attention: the last "dense_eval"
    record; empty if there is none."""
    return self.records["dense_eval"][-1] if self.records["dense_eval"] else {}

  @property
  def final_oracle(self) -> dict:
    """The final weights evaluated with the best possible choice of blocks: the
    last "oracle_eval" record; empty if there is none."""
    return (
      self.records["oracle_eval"][-1] if self.records["oracle_eval"] else {}
    )

  @property
  def final_window(self) -> dict:
    """The final weights evaluated without tokens far back: the last
    "window_eval" record; empty if there is none."""
    return (
      self.records["window_eval"][-1] if self.records["window_eval"] else {}
    )

  def get(self, path: str, default: Any = None) -> Any:
    """A config value by its dotted path."""
    return flatten(self.config).get(path, default)

  def interval_speeds(self) -> dict[str, list[float]]:
    """Tokens per second of each log interval, by phase.

    The first record of a phase is left out because its time includes what
    compiling and warming up cost.
    """
    phases: dict[str, list[float]] = {}
    for record in self.records["train"]:
      speed = record["tokens_per_second"]
      if speed is not None:
        phases.setdefault(record["phase"], []).append(speed)
    return {phase: v[1:] for phase, v in phases.items() if v[1:]}

  def speed(self) -> dict[str, float]:
    """Median tokens per second of each phase (see `interval_speeds`)."""
    return {k: statistics.median(v) for k, v in self.interval_speeds().items()}

  @property
  def uses_msa(self) -> bool:
    """Whether any layer of the model has an Index Branch."""
    return "msa" in (self.get("model.layer_kinds") or ())

  def warmup(self) -> tuple[int, int] | None:
    """The numbers of steps done before the warm-up and at its end; None for a
    run without one."""
    length = self.get("recipe.index_warmup_steps")
    start = self.get("recipe.init_step") or 0
    return (start, start + length) if length else None

  @property
  def is_trunk(self) -> bool:
    """Whether the run's attention is dense in all steps, although the model has
    an Index Branch, which learns beside it."""
    warmup = self.warmup()
    return self.uses_msa and bool(warmup) and warmup[1] >= self.get("num_steps")

  def switch(self) -> int | None:
    """The number of steps with dense attention, its own and those of the run
    from which it started, before attention became sparse; None if it never did
    or always was."""
    length = self.get("recipe.index_warmup_steps") or 0
    steps = (self.get("recipe.init_step") or 0) + length
    return steps if steps and self.uses_msa and not self.is_trunk else None


def flatten(config: dict, prefix: str = "") -> dict[str, Any]:
  """Nested dicts as one dict with dotted keys."""
  flat = {}
  for key, value in config.items():
    if isinstance(value, dict) and value:
      flat |= flatten(value, f"{prefix}{key}.")
    else:
      flat[prefix + key] = value
  return flat


def check_comparable(
  configs: Sequence[dict], names: Sequence[str] | None = None
) -> list[tuple[str, Any, Any]]:
  """Compares resolved run configs with the first of them.

  Args:
    configs: nested dicts, as in a run's config.json.
    names: the configs' names in the error's text.

  Returns:
    (field, value of the first, value of the other) for every difference. A
    field that one side lacks has the value "absent".

  Raises:
    ValueError: the configs differ in anything but attention; the text names
      each such field and both values.
  """
  names = names or [f"config {i}" for i in range(len(configs))]
  differences: list[tuple[str, Any, Any]] = []
  flats = [
    {k: list(v) if isinstance(v, tuple) else v for k, v in flatten(c).items()}
    for c in configs
  ]
  for name, flat in zip(names[1:], flats[1:], strict=True):
    refused = []
    for field in sorted(flats[0].keys() | flat.keys()):
      a, b = flats[0].get(field, "absent"), flat.get(field, "absent")
      if a == b:
        continue
      if not (_ATTENTION.fullmatch(field) or _PLACE.fullmatch(field)):
        refused.append(f"{field} is {a!r} in {names[0]} and {b!r} in {name}")
      elif (field, a, b) not in differences:
        differences.append((field, a, b))
    if refused:
      raise ValueError(
        "runs to compare may differ in attention only (model.layer_kinds, "
        "model.index, model.implementation, model.gqa_implementation, "
        "model.scan_layers, recipe, optimizer.index_*), but "
        + "; ".join(refused)
      )
  return differences


_NEEDED = {
  "train": ("step", "phase", "seconds", "loss", "tokens_per_second"),
  "eval": ("step", "phase", "tokens", "seconds", "loss", "batch_loss"),
  "dense_eval": ("step", "loss"),
  "oracle_eval": ("step", "loss"),
  "window_eval": ("step", "loss", "loss_by_position", "window", "window_most"),
  "layers": ("step", "phase", "layers"),
  "done": ("step",),
}


def _expand(line: dict) -> list[dict]:
  """The records of one line of metrics.jsonl: those in its columns, each with
  the line's other fields, or else the line itself."""
  if "columns" not in line:
    return [line]
  columns = line["columns"]
  shared = {key: value for key, value in line.items() if key != "columns"}
  if not isinstance(columns, dict) or not all(
    isinstance(column, list) for column in columns.values()
  ):
    raise ValueError("columns: wanted a list for each field")
  lengths = {field: len(column) for field, column in columns.items()}
  if len(set(lengths.values())) != 1 or 0 in lengths.values():
    raise ValueError(f"columns: wanted one length above 0, got {lengths}")
  rows = zip(*columns.values(), strict=True)
  return [shared | dict(zip(columns, row, strict=True)) for row in rows]


def read_records(run: Path) -> list[dict]:
  """The records of a run folder, in the order of its metrics.jsonl.

  A thinned run (see `thin`) has its training records in columns, and a last
  record of kind "done" in the place of done.json. A folder as it was trained
  gives the same kinds: what its done.json says becomes that record.

  Raises:
    ValueError: a file is broken; the text names it.
  """
  path, done = run / "metrics.jsonl", run / "done.json"
  records: list[dict] = []
  steps: dict[str, float] = {}  # of the last record of each kind
  lines = path.read_text().splitlines(keepends=True) if path.exists() else []
  for number, line in enumerate(lines, start=1):
    # The last line of a run in progress, or killed, may be incomplete.
    if not done.exists() and number == len(lines) and not line.endswith("\n"):
      break
    try:
      found = _expand(json.loads(line))
      kind = found[0]["kind"]
      # The records of a line have the same fields.
      missing = [key for key in _NEEDED[kind] if key not in found[0]]
    except (ValueError, KeyError, TypeError) as error:
      raise ValueError(
        f"{path}, line {number}: not a metrics record ({error!r}):"
        f" {line[:80]!r}"
      ) from error
    if missing:
      raise ValueError(f"{path}, line {number}: {kind} record lacks {missing}")
    for record in found:
      before = steps.get(kind, -math.inf)
      if record["step"] <= before:
        raise ValueError(
          f"{path}, line {number}: {kind} step {record['step']} follows step "
          f"{before}; steps must grow"
        )
      steps[kind] = record["step"]
    records += found
  if done.exists() and "done" not in steps:
    # "final" is the last "eval" record.
    said = {k: v for k, v in _read_json(done).items() if k != "final"}
    records.append({"kind": "done"} | said)
  return records


def _read_json(path: Path) -> Any:
  try:
    return json.loads(path.read_text()) if path.exists() else {}
  except ValueError as error:
    raise ValueError(f"{path}: not JSON ({error})") from error


def read_runs(*folders: Path) -> list[Run]:
  """Reads every run of a comparison.

  The baseline's runs come first; the others are in the order of the comparison.

  Args:
    folders: of the comparison. Each of them holds other seeds or sides.

  Raises:
    ValueError: a folder holds no runs, two hold the same one, or a file is
      broken.
  """
  runs = [run for folder in folders for run in _read_folder(folder)]
  known: dict[str, Run] = {}
  for run in runs:
    if known.setdefault(run.label, run) is not run:
      raise ValueError(
        f"{known[run.label].folder} and {run.folder} are both the run"
        f" {run.label}: wanted folders with different seeds."
      )
  order = list(dict.fromkeys(plan[:2] for plan in planned_runs(folders, runs)))
  return sorted(
    runs,
    key=lambda r: (r.side != BASELINE, order.index((r.task, r.side)), r.seed),
  )


def _completed(config: dict) -> dict:
  """A run's saved config with the fields that were added since it was made,
  which have the default values that runs had before. A config that is none any
  more stays as it is."""
  try:
    run = config_lib.from_dict(config_lib.RunConfig, config)
  except ValueError:
    return config
  return json.loads(json.dumps(config_lib.to_dict(run)))


def read_environment(path: Path) -> dict:
  """The environment of the run in the folder `path`.

  In a thinned result it lies in the task's folder (see `thin`): what all of the
  task's runs share, and below "runs" what each of them has besides. What is in
  the run's own folder goes before both.
  """
  shared = _read_json(path.parents[1] / "environment.json")
  besides = shared.pop("runs", {}).get(f"{path.parent.name}/{path.name}", {})
  return shared | besides | _read_json(path / "environment.json")


def _read_folder(folder: Path) -> list[Run]:
  """The runs of one folder."""
  runs = []
  for path in sorted(folder.glob("*/*/seed*")):
    seed = path.name.removeprefix("seed")
    config = _read_json(path / "config.json")
    if not seed.isdigit() or not config:
      continue
    records: dict[str, list[dict]] = {kind: [] for kind in _NEEDED}
    for record in read_records(path):
      records[record["kind"]].append(record)
    task, side = path.parts[-3:-1]
    key, fields = (task, side, int(seed)), ("task", "side", "seed")
    if tuple(config.get(name) for name in fields) != key:
      raise ValueError(
        f"{path} must hold the run that its name says, its config.json is of "
        f"{[config.get(name) for name in fields]}"
      )
    finished = bool(records.pop("done")) and bool(records["eval"])
    broken = _read_json(path / "broken.json")
    config, environment = _completed(config), read_environment(path)
    about = (task, side, int(seed), config, environment)
    samples = _read_json(path / "samples.json") or []
    runs.append(Run(path, *about, records, finished, broken, samples))
  if not runs:
    raise ValueError(
      f"comparison_folder {folder} holds no runs; wanted "
      "<task>/<side>/seed<k>/config.json below it"
    )
  return sorted(runs, key=lambda r: (r.task, r.side, r.seed))


def group_by_side(runs: Iterable[Run]) -> dict[str, list[Run]]:
  """The runs by side, in the order in which sides occur."""
  sides: dict[str, list[Run]] = {}
  for run in runs:
    sides.setdefault(run.side, []).append(run)
  return sides


def planned_runs(
  folders: Iterable[Path], runs: Iterable[Run]
) -> list[tuple[str, str, int]]:
  """(task, side, seed) of every run that a comparison's folders plan together,
  or have: each side that any of them names, for each seed that any of them
  names or has."""
  runs = list(runs)
  sides: dict[tuple[str, str], None] = {}
  seeds = {run.seed for run in runs}
  for folder in folders:
    saved = _read_json(folder / "comparison.json")
    sides |= {(r["task"], r["side"]): None for r in saved.get("runs", [])}
    sides |= {
      (r.task, r.side): None for r in runs if r.folder.parents[2] == folder
    }
    seeds |= set(saved.get("seeds", ()))
  return [(*side, seed) for side in sides for seed in sorted(seeds)]


def aimed_interval(folders: Iterable[Path]) -> float | None:
  """The `aimed_interval` of the first folder's comparison that has one."""
  saved = (_read_json(folder / "comparison.json") for folder in folders)
  found = (plan.get("aimed_interval") for plan in saved)
  return next((aim for aim in found if aim is not None), None)


def _without_seed(run: Run) -> dict:
  """The run's config without the fields in which the seeds of a side may
  differ."""
  config = {
    field: value
    for field, value in flatten(run.config).items()
    if not _MACHINE.fullmatch(field) and field not in config_lib.MORE_AT_END
  }
  config["seed"] = "any"
  start = Path(config.get("recipe.init_from") or "")
  if start.name == f"seed{run.seed}":
    config["recipe.init_from"] = start.parent.name
  return config


def check_runs(runs: list[Run]) -> dict[str, dict[str, tuple[Any, Any]]]:
  """Checks that the runs of one task may be compared.

  Returns:
    For each side the fields in which it differs from the first side, with
    (the first side's value, its own value).

  Raises:
    ValueError: the configs differ in more than attention, the seeds of a side
      differ in their config, or the data differ.
  """
  first = runs[0]
  different: dict[str, dict[str, tuple[Any, Any]]] = {}
  for run in runs:
    # Seeds may differ here, because sides are paired by seed later.
    pair = [_without_seed(first), _without_seed(run)]
    fields = {
      field: (a, b)
      for field, a, b in check_comparable(pair, [first.label, run.label])
      if not _PLACE.fullmatch(field)
    }
    if fields != different.setdefault(run.side, fields):
      raise ValueError(
        f"the seeds of {run.task}/{run.side} must share one config; against "
        f"{first.label} one sets {different[run.side]}, {run.label} {fields}"
      )
    a, b = (flatten(r.environment.get("data") or {}) for r in (first, run))
    other = [k for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)]
    if a and b and other:
      raise ValueError(
        "runs to compare must read the same data, but "
        + "; ".join(
          f"data fingerprint {k} is {a.get(k)!r:.90} in {first.label} and "
          f"{b.get(k)!r:.90} in {run.label}"
          for k in other
        )
      )
  return different


def speeds(runs: list[Run]) -> dict[str, list[float]]:
  """`Run.speed` of each run, by phase."""
  phases: dict[str, list[float]] = {}
  for run in runs:
    for phase, speed in run.speed().items():
      phases.setdefault(phase, []).append(speed)
  return phases


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
  """The first quartile, the median and the third quartile."""
  if len(values) == 1:
    return values[0], values[0], values[0]
  low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
  return low, middle, high


def recall_beyond(
  runs: list[Run], local: int, probe: Probe
) -> tuple[float, int] | None:
  """Share of right answers at distances of `local` and more, and the number of
  answers; None if there are none."""
  bins = [
    (found["accuracy"], found["count"])
    for run in runs
    if run.finished
    for found in run.final.get(probe.by_distance) or []
    if found["low"] >= local and found["count"]
  ]
  count = sum(n for _, n in bins)
  return (sum(a * n for a, n in bins) / count, count) if count else None


def chance_of(run: Run, probe: str = "") -> float | None:
  """Accuracy of guessing the answers of a probe, or those of data without
  probes; None for text."""
  data = run.environment.get("data") or {}
  chance = data.get("chance")
  if isinstance(chance, dict):
    return chance.get(probe)
  if chance is not None:
    return chance
  values = run.get("data.num_values")
  return 1 / values if values else None


def token_budget(sides: dict[str, list[Run]]) -> tuple[int, int] | None:
  """(tokens of the local blocks, tokens that a query attends to) of the first
  sparse side; None without one."""
  for side, runs in sides.items():
    index = [
      runs[0].get(f"model.index.{k}")
      for k in ("block_size", "num_local_blocks", "top_k")
    ]
    if side != BASELINE and None not in index:
      return index[0] * index[1], index[0] * index[2]
  return None


def probes_of(finals: Iterable[dict]) -> list[Probe]:
  """The kinds of retrieval that "eval" records report."""
  names = {
    key.removesuffix(end): None
    for final in finals
    for key, value in final.items()
    for end in ("by_distance", "by_number")
    if key.endswith(end) and value
  }
  return [Probe(name) for name in names]


def metrics_of(finals: list[dict]) -> list[Metric]:
  """The metrics by which a task is judged, the most important first."""
  answers = [probe.accuracy for probe in probes_of(finals)]
  if any(f.get("bits_per_byte") is not None for f in finals):
    return [BITS, *answers]
  if answers:
    return [*answers, dataclasses.replace(NATS, unit="nats per answer")]
  return [NATS]
