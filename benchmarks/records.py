"""The file of measurements of a device, `results/<device>.json`, and its plot.

The file holds a list of records under "rows": one for each op, shape,
selection, score precision and implementation. Another list, "recall", holds the
recalls of the selections that rank by rounded scores.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import itertools
import json
import os
import pathlib
import subprocess
import tempfile
from collections.abc import Iterator

import jax

from benchmarks import measure
from benchmarks.cases import Case
from pallas_kernels import mosaic

FOLDER = pathlib.Path(__file__).parent / "results"
KEY = [
  "op",
  *(field.name for field in dataclasses.fields(Case)),
  "selection",
  "score_precision",
  "implementation",
  "documents",
]
# Rates of the bounds in the plot: the best matrix rates seen on an H100.
BOUND_TFLOPS = dict(exact=800.0, fp8=1300.0)
PAPER_SPEEDUP = (1 << 20, 14.2)
# Of the lengths beside dense attention. A query reads up to 2,048 tokens, which
# is all of a shorter row, or most of it.
SHORTEST = 4096


def commit_name() -> str:
  """The short name of the checked-out commit, or "unknown"."""
  try:
    run = subprocess.run(
      ["git", "rev-parse", "--short", "HEAD"],
      cwd=pathlib.Path(__file__).parent,
      capture_output=True,
      text=True,
      check=True,
    )
    return run.stdout.strip()
  except (OSError, subprocess.CalledProcessError):
    return "unknown"


def merge(old: list[dict], new: list[dict], key: list[str]) -> list[dict]:
  """The old records, those with a new record's key replaced, then the rest.

  Args:
    old: the records of the file, in its order, which stays.
    new: the records to add.
    key: the fields that name a record.
  """

  def name(record):
    return tuple(record.get(field) for field in key)

  return list({name(record): record for record in [*old, *new]}.values())


@contextlib.contextmanager
def whole_file(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields a file to write, which replaces `path` unless writing fails."""
  path.parent.mkdir(parents=True, exist_ok=True)
  handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
  os.close(handle)
  try:
    yield pathlib.Path(name)
    os.chmod(name, 0o644)
    os.replace(name, path)
  finally:
    pathlib.Path(name).unlink(missing_ok=True)


def write_json(path: pathlib.Path, content: dict) -> None:
  """Writes a JSON file, whole or not at all."""
  with whole_file(path) as file:
    file.write_text(json.dumps(content, indent=1) + "\n")


def read_json(path: pathlib.Path) -> dict:
  """The content of a JSON file; {} if there is no such file."""
  return json.loads(path.read_text()) if path.exists() else {}


def read_own(path: pathlib.Path) -> dict:
  """The measurements of this device in a file; {} if there is no such file.

  Raises:
    ValueError: the file holds the measurements of another device.
  """
  old, here = read_json(path), jax.devices()[0].device_kind
  if old and old.get("device") != here:
    raise ValueError(
      f"{path} holds what was measured on {old.get('device')}, calls here run"
      f" on {here}: wanted another file"
    )
  return old


def store(path: pathlib.Path, found: list[dict], recalls: list[dict]) -> dict:
  """Merges what this run measured into a file, and returns its content.

  Each record names the JAX version that it was measured under, and the file's
  own `jax` lists all of them. A file from before there was one for each record
  has only its own, which then holds for all of its records.

  Args:
    path: the file.
    found: records, as `measure.record` makes them.
    recalls: the recalls of selections that rank by rounded scores.

  Raises:
    ValueError: the file holds the measurements of another device.
  """
  old = read_own(path)
  keys = dict(
    rows=KEY, recall=["tokens", "index_dim", "selection", "score_precision"]
  )
  merged = {}
  for table, new in dict(rows=found, recall=recalls).items():
    before = [
      record | dict(jax=record.get("jax", old["jax"]))
      for record in old.get(table, [])
    ]
    now = [record | dict(jax=jax.__version__) for record in new]
    merged[table] = merge(before, now, keys[table])
  versions = {record["jax"] for table in merged.values() for record in table}
  content = dict(
    device=jax.devices()[0].device_kind,
    jax=", ".join(sorted(versions)),
    **merged,
  )
  write_json(path, content)
  return content


def require_plots() -> None:
  """Ends the program before it measures for minutes what it cannot draw."""
  if importlib.util.find_spec("matplotlib") is None:
    raise SystemExit(
      "benchmarks: matplotlib, which draws the plots, is not installed; it"
      " comes with pip install -e '.[train]'"
    )


def require_hopper() -> None:
  """Ends the program with one line where the kernels do not run."""
  try:
    mosaic.require_hopper()
  except NotImplementedError as error:
    raise SystemExit(
      f"benchmarks: {error}; python -m benchmarks.portable measures on any"
      " device"
    ) from None


STYLES = {  # selection -> (its name in the legend, line style)
  "random": ("random", "--"),
  "trained_like": ("trained-like", "-"),
  "fitted": ("fitted to a trained model's", "-."),
}
COLOURS = dict(exact="tab:blue", fast="tab:green", fp8="tab:red")
# implementation -> its colour; None: that of the precision
IMPLEMENTATIONS = dict(mosaic_gpu=None, xla="tab:gray", reference="tab:brown")


def bound_seconds(op: str, case: Case, precision: str) -> float:
  """The least time that the matrix units need for an op of this shape."""
  index = measure.index_flops(case) / BOUND_TFLOPS[precision]
  factor = dict(prefill=1.0, train=4.0)[op]  # train: 3.5, and q k for the KL
  main = factor * measure.main_flops(case) / BOUND_TFLOPS["exact"]
  return (index + main) / 1e12


PLOT_TITLES = dict(
  prefill="Prefill: selection + attention",
  train="Training: forward + backward with KL",
)


def plot_op(axes, op: str, found: list[dict]) -> None:
  """Draws the speed-up of one op against length, with its bounds."""
  lines: dict[tuple[str, str, str], list[tuple[int, float]]] = {}
  for record in found:
    line = (
      record["implementation"],
      record["selection"],
      record["score_precision"],
    )
    lines.setdefault(line, []).append((record["tokens"], record["speedup"]))
  for line in itertools.product(IMPLEMENTATIONS, STYLES, COLOURS):
    if line in lines:
      implementation, selection, precision = line
      name, style = STYLES[selection]
      axes.plot(
        *zip(*sorted(lines[line]), strict=True), style, marker="o", ms=4,
        color=IMPLEMENTATIONS[implementation] or COLOURS[precision],
        label=f"{name}, {precision}"
        + (f", {implementation}" if implementation != "mosaic_gpu" else ""),
      )  # fmt: skip
  dense = {record["tokens"]: record["dense_ms"] for record in found}
  ranked = {record["score_precision"] for record in found}
  for precision in BOUND_TFLOPS:
    if precision in ranked:
      bound = [
        (tokens, ms / 1e3 / bound_seconds(op, Case(tokens=tokens), precision))
        for tokens, ms in sorted(dense.items())
      ]
      operand = "bf16" if precision == "exact" else "fp8"
      axes.plot(
        *zip(*bound, strict=True), ":", color=COLOURS[precision], alpha=0.6,
        label=f"matrix bound, {operand} index",
      )  # fmt: skip
  ticks = set(dense)
  if op == "prefill":
    axes.plot(*PAPER_SPEEDUP, "k*", ms=10, label="paper (H800)")
    ticks.add(PAPER_SPEEDUP[0])
  length_axis(axes, sorted(ticks))
  axes.legend(fontsize=8)


def name_of(tokens: int) -> str:
  """A length as in tables and on axes: 256, 8K, 1M."""
  if tokens < 1 << 10:
    return str(tokens)
  return f"{tokens >> 10}K" if tokens < 1 << 20 else f"{tokens >> 20}M"


def length_axis(axes, ticks: list[int]) -> None:
  """Logarithmic axes of speed-ups against tokens, with these lengths."""
  axes.set_xscale("log", base=2)
  axes.set_yscale("log", base=2)
  axes.set_xticks(ticks, [name_of(t) for t in ticks])
  axes.yaxis.set_major_formatter("{x:g}x")
  axes.set_xlabel("tokens")
  axes.grid(alpha=0.3)


def plot_heads(content: dict, path: pathlib.Path) -> None:
  """Plots speed-ups of prefill and training against length, for all heads.

  Choices are trained-like, blocks of 128 keys, 16 a query, one batch row. The
  file is written whole or not at all.
  """
  import matplotlib
  from matplotlib.figure import Figure

  figure = Figure(figsize=(12, 4.8), layout="constrained")
  panels = figure.subplots(1, 2)
  fixed = dict(
    batch=1, block_size=128, top_k=16, selection="trained_like",
    score_precision="exact", implementation="mosaic_gpu",
  )  # fmt: skip
  lines: dict[str, dict[tuple, dict[int, float]]] = dict(prefill={}, train={})
  for record in content["rows"]:
    if all(record.get(name) == value for name, value in fixed.items()) and (
      record["op"] in lines
      and record["speedup"]
      and record["tokens"] >= SHORTEST
      and record["tokens"] == record["kv_tokens"]
    ):
      heads = record["num_heads"], record["num_kv_heads"], record["head_dim"]
      of_op = lines[record["op"]]
      of_op.setdefault(heads, {})[record["tokens"]] = record["speedup"]
  # In the legend as the lines stand: the most heads on a KV head are on top.
  shapes = sorted(
    {heads for of_op in lines.values() for heads in of_op},
    key=lambda heads: (heads[0] / heads[1], heads),
    reverse=True,
  )
  names = {heads: ", ".join(map(str, heads)) for heads in shapes}
  colours = matplotlib.colormaps["turbo"].resampled(len(shapes) + 2)
  for axes, (op, of_op) in zip(panels, lines.items(), strict=True):
    for i, heads in enumerate(shapes):
      if points := of_op.get(heads):
        axes.plot(
          *zip(*sorted(points.items()), strict=True), marker="osD^v"[i % 5],
          ms=5, color=colours(i + 1), label=names[heads],
        )  # fmt: skip
    axes.axhline(1.0, color="black", lw=0.8)
    length_axis(
      axes, sorted({tokens for points in of_op.values() for tokens in points})
    )
    axes.set_title(PLOT_TITLES[op])
  found = {
    label: handle
    for axes in panels
    for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
  }
  figure.legend(
    [found[name] for name in names.values()], list(names.values()),
    title="H, K, D", fontsize=9, loc="outside right center",
  )  # fmt: skip
  panels[0].set_ylabel("speed-up over dense attention")
  figure.suptitle(f"{content['device']}, trained-like choices")
  with whole_file(path) as file:
    figure.savefig(file, dpi=150, format=path.suffix[1:])


def plot(content: dict, path: pathlib.Path) -> None:
  """Plots speed-ups of prefill and training against length, paper's heads.

  The file is written whole or not at all.
  """
  from matplotlib.figure import Figure  # a figure outside of pyplot is freed

  paper = dataclasses.asdict(Case(tokens=0, kv_tokens=-1))
  fixed = [f for f in paper if f not in ("tokens", "kv_tokens")]
  found = {
    op: [
      record
      for record in content["rows"]
      if record["op"] == op
      and record["speedup"]
      and record["tokens"] >= SHORTEST
      and record["tokens"] == record["kv_tokens"]
      and all(record[f] == paper[f] for f in fixed)
    ]
    for op in PLOT_TITLES
  }
  drawn = [op for op in PLOT_TITLES if found[op]] or ["prefill"]
  figure = Figure(figsize=(2 + 5 * len(drawn), 4.5), layout="constrained")
  panels = figure.subplots(1, len(drawn), squeeze=False)
  for axes, op in zip(panels[0], drawn, strict=True):
    plot_op(axes, op, found[op])
    axes.set_title(PLOT_TITLES[op])
  panels[0, 0].set_ylabel("speed-up over dense attention")
  figure.suptitle(content["device"])
  with whole_file(path) as file:
    figure.savefig(file, dpi=150, format=path.suffix[1:])


def device_slug() -> str:
  """The device's name as a part of a file name."""
  return "_".join(str(jax.devices()[0].device_kind).lower().split())
