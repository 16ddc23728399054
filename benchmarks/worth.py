"""Says from which length MSA pays for public models, and writes it to a page.

  python -m benchmarks.worth
  python -m benchmarks.worth --results FILE --page PAGE

The numbers are the records of a results file at the heads of each model. Tables
of speed-ups by model, of times by heads, of bounds and of implementations
replace what stands between two marks of the page each.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Mapping, Sequence

from benchmarks import cases, measure, records

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = records.FOLDER / "nvidia_h200.json"
PAGE = ROOT / "docs" / "worth.md"
MARKS = {
  name: (f"<!-- {name} of benchmarks.worth -->", "<!-- end of the table -->")
  for name in ("models", "times", "bounds", "implementations")
}


@dataclasses.dataclass(frozen=True)
class Model:
  """A public model's name and the attention heads of its config file."""

  name: str
  num_heads: int
  num_kv_heads: int
  head_dim: int


MODELS = (
  Model("SmolLM2-135M", 9, 3, 64),
  Model("Llama-3.2-1B", 32, 8, 64),
  Model("Qwen3-0.6B", 16, 8, 128),
  Model("Llama-3.2-3B", 24, 8, 128),
  Model("Phi-3-mini", 32, 32, 96),
  Model("Qwen2.5-7B", 28, 4, 128),
  Model("Llama-3.1-8B, Qwen3-8B", 32, 8, 128),
  Model("Qwen3-14B", 40, 8, 128),
  Model("Qwen3-30B-A3B", 32, 4, 128),
  Model("Qwen3-Next-80B-A3B", 16, 2, 256),
  Model("Gemma-3-12B", 16, 8, 256),
  Model("MiniMax-M2", 48, 8, 128),
  Model("Llama-3.1-70B, Qwen3-32B", 64, 8, 128),
  Model("Qwen3-235B-A22B", 64, 4, 128),
)
# Title of a column -> op and selection of its records. Decoding is measured
# with random choices only, which cost it the same.
COLUMNS = {
  "prefill": ("prefill", "trained_like"),
  "training step": ("train", "trained_like"),
  "decoding": ("decode", "random"),
}


# H, K, D of the table of bounds.
BOUNDED = (
  (64, 4, 128), (64, 8, 128), (48, 8, 128), (32, 8, 128), (16, 8, 128),
  (32, 8, 64),
)  # fmt: skip


def records_of(
  rows: Sequence[Mapping], model: Model, op: str, selection: str
) -> dict[int, Mapping]:
  """Records with a dense peer by length from 4K on, of one row of the batch.

  Args:
    rows: records of a results file.
    model: the heads.
    op: an op of the records.
    selection: the kind of choices.
  """
  wanted = dataclasses.asdict(
    cases.Case(
      tokens=0,
      **cases.heads(model.num_heads, model.num_kv_heads, model.head_dim),
    )
  )
  wanted |= dict(
    op=op,
    selection=selection,
    score_precision="exact",
    implementation="mosaic_gpu",
  )
  found = {}
  for row in rows:
    fits = all(
      row[name] == value
      for name, value in wanted.items()
      if name not in ("tokens", "kv_tokens")
    )
    whole = row["tokens"] == (1 if op == "decode" else row["kv_tokens"])
    if (
      fits and whole and row["speedup"] and row["kv_tokens"] >= records.SHORTEST
    ):
      found[row["kv_tokens"]] = row
  return dict(sorted(found.items()))


def speedup(row: Mapping) -> float:
  """From the times: the record's own is rounded, and would be again."""
  return row["dense_ms"] / row["ms"]


def cudnn_ms(row: Mapping) -> float | None:
  """cuDNN's time in the same run; None if the record does not have it.

  Records from before 2026-11-30 have the fastest dense time only.
  """
  fastest = {row["dense"]: row["dense_ms"]}
  return row.get("dense_ms_by", fastest).get("cudnn")


def speedups(
  rows: Sequence[Mapping], model: Model, op: str, selection: str
) -> dict[int, float]:
  """Speed-up over dense attention by length. Arguments as in `records_of`."""
  found = records_of(rows, model, op, selection)
  return {tokens: speedup(row) for tokens, row in found.items()}


def pays_from(found: Mapping[int, float]) -> int | None:
  """The least measured length from which on no speed-up is below 1."""
  start = None
  for tokens in sorted(found, reverse=True):
    if found[tokens] < 1:
      break
    start = tokens
  return start


def cell(found: Mapping[int, float]) -> str:
  """From which length it pays, and the speed-ups that were measured."""
  if not found:
    return "not measured"
  measured = ", ".join(
    f"{records.name_of(t)} {x:.1f}x" for t, x in found.items()
  )
  start = pays_from(found)
  said = "not yet" if start is None else f"from {records.name_of(start)}"
  return f"{said} ({measured})"


def table(rows: Sequence[Mapping]) -> str:
  """The Markdown table of all models."""
  lines = [
    f"| model | H, K, D | {' | '.join(COLUMNS)} |",
    "|---|---|" + "---|" * len(COLUMNS),
  ]
  for model in MODELS:
    heads = f"{model.num_heads}, {model.num_kv_heads}, {model.head_dim}"
    cells = [
      cell(speedups(rows, model, op, selection))
      for op, selection in COLUMNS.values()
    ]
    lines.append(f"| {model.name} | {heads} | {' | '.join(cells)} |")
  return "\n".join(lines)


def milliseconds(ms: float) -> str:
  """Three digits, but no fraction of what has more."""
  return f"{ms:,.0f}" if ms >= 100 else f"{ms:#.3g}"


def times(rows: Sequence[Mapping]) -> str:
  """The Markdown table of prefill and training of all heads and lengths."""
  names = ("num_heads", "num_kv_heads", "head_dim")
  found = {
    tuple(row[name] for name in names)
    for row in rows
    if row["op"] in ("prefill", "train")
  }
  lines = [
    "| H, K, D | tokens | dense, ms | cuDNN, ms | prefill, ms | commit"
    " | cuDNN with gradients, ms | training, ms | commit |",
    "|---|---:|---:|---:|---:|---|---:|---:|---|",
  ]
  for heads in sorted(found, reverse=True):
    model = Model("", *heads)
    both = [
      records_of(rows, model, op, "trained_like") for op in ("prefill", "train")
    ]
    for tokens in sorted(set().union(*both)):
      cells = [", ".join(map(str, heads)), records.name_of(tokens)]
      for op, by_length in zip(("prefill", "train"), both, strict=True):
        row = by_length.get(tokens)
        if row is None:
          cells += [""] * (4 if op == "prefill" else 3)
          continue
        cells.append(milliseconds(row["dense_ms"]))
        if op == "prefill":  # in training cuDNN is the only one
          of_cudnn = cudnn_ms(row)
          cells.append("" if of_cudnn is None else (
            f"{milliseconds(of_cudnn)} ({of_cudnn / row['ms']:.2f}x)"
          ))  # fmt: skip
        cells += [
          f"{milliseconds(row['ms'])} ({speedup(row):.2f}x)",
          row["commit"],
        ]
      lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines)


def bounds(rows: Sequence[Mapping]) -> str:
  """The Markdown table of the bounds (`measure.bound`) of some heads."""
  lines = [
    "| H, K, D | tokens | op | TFLOP | GB | bound, ms | dense / bound"
    " | measured, ms | share reached |",
    "|---|---:|---|---:|---:|---:|---:|---:|---:|",
  ]
  names = [field.name for field in dataclasses.fields(cases.Case)]
  for heads in BOUNDED:
    for op in ("prefill", "train"):
      found = records_of(rows, Model("", *heads), op, "trained_like")
      for tokens, row in found.items():
        case = cases.Case(**{name: row[name] for name in names})
        bound = measure.bound(op, case, row["matmul_tflops"], row["copy_tbs"])
        least = bound.seconds * 1e3
        cells = [
          ", ".join(map(str, heads)), records.name_of(tokens), op,
          f"{bound.flops / 1e12:#.3g}", f"{bound.bytes / 1e9:#.3g}",
          milliseconds(least) + (" (memory)" if bound.of_memory else ""),
          f"{row['dense_ms'] / least:.1f}x", milliseconds(row["ms"]),
          f"{100 * least / row['ms']:.0f} %",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines)


def both_implementations(
  rows: Sequence[Mapping],
) -> list[tuple[Mapping, Mapping]]:
  """Records of the kernels and of the portable path at the same shape.

  Of prefill, training and decoding, with the choices of `COLUMNS`.
  """
  fields = [name for name in records.KEY if name != "implementation"]
  found: dict[tuple, dict[str, Mapping]] = {}
  for row in rows:
    if (row["op"], row["selection"]) in COLUMNS.values() and (
      row["score_precision"] == "exact"
    ):
      at = tuple(row.get(name) for name in fields)
      found.setdefault(at, {})[row["implementation"]] = row
  return [
    (of["mosaic_gpu"], of["xla"])
    for of in found.values()
    if {"mosaic_gpu", "xla"} <= of.keys()
  ]


def implementations(rows: Sequence[Mapping]) -> str:
  """The Markdown table of the portable path's time over that of the kernels."""
  heads = ("num_heads", "num_kv_heads", "head_dim")
  found: dict[tuple, dict[tuple, float]] = {}
  for ours, xla in both_implementations(rows):
    line = (*(ours[name] for name in heads), ours["op"])
    ratios = found.setdefault(line, {})
    at = ours["batch"], ours["kv_tokens"]
    if at in ratios:
      raise ValueError(f"two records of {line}, batch and tokens {at}")
    ratios[at] = xla["ms"] / ours["ms"]
  lengths = sorted({at for ratios in found.values() for at in ratios})
  names = [
    (f"{batch} x " if batch > 1 else "") + records.name_of(tokens)
    for batch, tokens in lengths
  ]
  lines = [
    f"| H, K, D | op | {' | '.join(names)} |",
    "|---|---|" + "---:|" * len(names),
  ]
  for (*shape, op), ratios in sorted(found.items(), reverse=True):
    cells = [", ".join(map(str, shape)), op]
    cells += [f"{ratios[at]:.1f}x" if at in ratios else "" for at in lengths]
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines)


def with_tables(page: str, content: Mapping) -> str:
  """A page's text with the tables of a results file between their marks.

  Raises:
    ValueError: the page lacks the marks.
  """
  makers = dict(
    models=table, times=times, bounds=bounds, implementations=implementations
  )
  for name, make in makers.items():
    start, end = MARKS[name]
    before, mark, rest = page.partition(start)
    _, closing, after = rest.partition(end)
    if not mark or not closing:
      raise ValueError(f"wanted a page with the lines {start} and {end}")
    page = f"{before}{start}\n\n{make(content['rows'])}\n\n{end}{after}"
  return page


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    prog="python -m benchmarks.worth",
    description=(__doc__ or "").split("\n\n")[0],
  )
  parser.add_argument(
    "--results",
    type=pathlib.Path,
    default=RESULTS,
    help="JSON file of `python -m benchmarks` (default: the H200's)",
  )
  parser.add_argument(
    "--page",
    type=pathlib.Path,
    default=PAGE,
    help="the page to write (default: docs/worth.md)",
  )
  args = parser.parse_args(argv)
  content = records.read_json(args.results)
  if not content:
    parser.error(f"no results in {args.results}")
  text = with_tables(args.page.read_text(), content)
  with records.whole_file(args.page) as file:
    file.write_text(text)
  print(table(content["rows"]))
  return 0


if __name__ == "__main__":
  sys.exit(main())
