"""The results file and its plot."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import subprocess
import tempfile
from collections.abc import Iterator

import jax

from benchmarks import measure
from benchmarks.cases import Case

FOLDER = pathlib.Path(__file__).parents[1] / "results"
KEY = [
  "op",
  *(field.name for field in dataclasses.fields(Case)),
  "selection",
  "score_precision",
]
# Rates of the bounds in the plot: the best matrix rates seen on an H100.
BOUND_TFLOPS = dict(exact=800.0, fp8=1300.0)
PAPER_SPEEDUP = (1 << 20, 14.2)


def commit_name() -> str:
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
  """Old rows, those of the same key replaced, then new ones."""

  def name(row):
    return tuple(row.get(field) for field in key)

  table = {name(row): row for row in old} | {name(row): row for row in new}
  return list(table.values())


@contextlib.contextmanager
def whole_file(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """A file to write, which takes the place of `path` unless writing fails."""
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
  """Writes the whole file or none of it."""
  with whole_file(path) as file:
    file.write_text(json.dumps(content, indent=1) + "\n")


def read_json(path: pathlib.Path) -> dict:
  return json.loads(path.read_text()) if path.exists() else {}


def read_own(path: pathlib.Path) -> dict:
  """What a file holds of this device; {} without the file.

  Raises:
    ValueError: the file is another device's.
  """
  old, here = read_json(path), jax.devices()[0].device_kind
  if old and old.get("device") != here:
    raise ValueError(
      f"{path} holds what was measured on {old.get('device')}, calls here run"
      f" on {here}: wanted another file"
    )
  return old


def store(path: pathlib.Path, rows: list[dict], recalls: list[dict]) -> dict:
  """Merges what this run measured into a file, and returns its content.

  Each row names the JAX that it was measured under; the content's own `jax`
  lists them all. Older files have that one only, which holds for their rows.

  Raises:
    ValueError: the file is another device's.
  """
  old = read_own(path)
  keys = dict(
    rows=KEY, recall=["tokens", "index_dim", "selection", "score_precision"]
  )
  merged = {}
  for table, new in dict(rows=rows, recall=recalls).items():
    before = [
      row | dict(jax=row.get("jax", old["jax"])) for row in old.get(table, [])
    ]
    now = [row | dict(jax=jax.__version__) for row in new]
    merged[table] = merge(before, now, keys[table])
  versions = {row["jax"] for table in merged.values() for row in table}
  content = dict(
    device=jax.devices()[0].device_kind,
    jax=", ".join(sorted(versions)),
    **merged,
  )
  write_json(path, content)
  return content


STYLES = {  # of choices: what the legend calls them, and their lines
  "random": ("random", "--"),
  "trained_like": ("trained-like", "-"),
  "fitted": ("fitted to a trained model's", "-."),
}
COLOURS = dict(exact="tab:blue", fast="tab:green", fp8="tab:red")


def bound_seconds(op: str, case: Case, precision: str) -> float:
  """What the matrix units need at least."""
  index = measure.index_flops(case) / BOUND_TFLOPS[precision]
  factor = dict(prefill=1.0, train=4.0)[op]  # train: 3.5, and q k for the KL
  main = factor * measure.main_flops(case) / BOUND_TFLOPS["exact"]
  return (index + main) / 1e12


def plot_op(axes, op: str, rows: list[dict]) -> None:
  """Speed-up of one op against length, with its bounds."""
  for selection, (name, style) in STYLES.items():
    for precision, colour in COLOURS.items():
      points = sorted(
        (row["tokens"], row["speedup"])
        for row in rows
        if (row["selection"], row["score_precision"]) == (selection, precision)
      )
      if points:
        axes.plot(
          *zip(*points, strict=True), style, color=colour, marker="o", ms=4,
          label=f"{name}, {precision}",
        )  # fmt: skip
  dense = {row["tokens"]: row["dense_ms"] for row in rows}
  ranked = {row["score_precision"] for row in rows}
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
  axes.set_xscale("log", base=2)
  axes.set_yscale("log", base=2)
  names = [
    f"{t >> 10}K" if t < 1 << 20 else f"{t >> 20}M" for t in sorted(ticks)
  ]
  axes.set_xticks(sorted(ticks), names)
  axes.yaxis.set_major_formatter("{x:g}x")
  axes.set_xlabel("tokens")
  axes.grid(alpha=0.3)
  axes.legend(fontsize=8)


def plot(content: dict, path: pathlib.Path) -> None:
  """Speed-ups of prefill and training against length, at the paper's heads.

  Writes the whole file or none of it.
  """
  from matplotlib.figure import Figure  # without pyplot nothing stays open

  paper = dataclasses.asdict(Case(tokens=0, kv_tokens=-1))
  fixed = [f for f in paper if f not in ("tokens", "kv_tokens")]
  titles = dict(
    prefill="Prefill: selection + attention",
    train="Training: forward + backward with KL",
  )
  rows = {
    op: [
      row
      for row in content["rows"]
      if row["op"] == op
      and row["speedup"]
      and row["tokens"] == row["kv_tokens"]
      and all(row[f] == paper[f] for f in fixed)
    ]
    for op in titles
  }
  drawn = [op for op in titles if rows[op]] or ["prefill"]
  figure = Figure(figsize=(2 + 5 * len(drawn), 4.5), layout="constrained")
  panels = figure.subplots(1, len(drawn), squeeze=False)
  for axes, op in zip(panels[0], drawn, strict=True):
    plot_op(axes, op, rows[op])
    axes.set_title(titles[op])
  panels[0, 0].set_ylabel("speed-up over dense attention")
  figure.suptitle(content["device"])
  with whole_file(path) as file:
    figure.savefig(file, dpi=150, format=path.suffix[1:])


def device_slug() -> str:
  return "_".join(str(jax.devices()[0].device_kind).lower().split())
