"""The tables of a report.

A table is a list of table rows, each a dict from column names to text. `sides`
maps a side's name to its runs of one task.
"""

import math
import re
import statistics
from collections.abc import Callable, Sequence

import numpy as np

from train.report.figures import side_name
from train.report.gaps import (
  deviation_interval,
  paired_gap,
  pairs_needed,
  t_interval,
)
from train.report.runs import BASELINE, BITS, Metric, Probe, Run, quartiles

Rows = list[dict[str, str]]


def bytes_text(value: float | None) -> str:
  if not value:
    return "not measured"
  return (
    f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"
  )


def spread(values: Sequence[float], digits: int) -> str:
  """Mean ± standard deviation."""
  if not values:
    return "–"
  text = f"{statistics.fmean(values):.{digits}f}"
  if len(values) > 1:
    text += f" ± {statistics.stdev(values):.{digits}f}"
  return text


def _column(metric: Metric) -> str:
  return f"{metric.title.lower()} ({metric.unit})"


def _spread_of(finals: Sequence[dict], metric: Metric) -> str:
  """`spread` of a metric over "eval" records."""
  values = [final[metric.key] * metric.scale for final in finals]
  return spread(values, metric.digits)


def performance_rows(
  sides: dict[str, list[Run]], metrics: list[Metric]
) -> Rows:
  """Results, speed, memory and size: one table row for each side."""
  rows = []
  for side, runs in sides.items():
    done = [r for r in runs if r.finished]
    peaks = [
      record["peak_bytes"]
      for r in runs
      for record in r.records["train"]
      if record.get("peak_bytes")
    ]
    size = runs[0].environment.get("parameters") or {}
    index = size.get("index", 0)
    rows.append(
      {
        "side": side_name(side),
        "finished runs": f"{len(done)} of {len(runs)}",
        **{_column(m): _spread_of([r.final for r in done], m) for m in metrics},
        "tokens/s": _speed_text(runs),
        "training time": spread([r.final["seconds"] / 60 for r in done], 1)
        + " min",
        "peak memory": bytes_text(max(peaks, default=None)),
        "parameters": f"{size['total']:,}" if size else "–",
        "of these, index branch": (
          f"{index:,} ({100 * index / size['total']:.2f} %)" if index else "–"
        ),
      }
    )
  return rows


def _speed_text(runs: list[Run]) -> str:
  """Tokens/s of each phase: the median, and the quartiles over the log
  intervals of all runs."""
  phases: dict[str, list[float]] = {}
  for run in runs:
    for phase, values in run.interval_speeds().items():
      phases.setdefault(phase, []).extend(values)
  texts = []
  for phase, values in phases.items():
    low, middle, high = quartiles(values)
    text = f"{phase.replace('warmup', 'warm-up')} {middle:,.0f}"
    if len(values) > 1:
      text += f" ({low:,.0f} to {high:,.0f})"
    texts.append(text)
  return ", ".join(texts) or "–"


def dense_rows(sides: dict[str, list[Run]], metrics: list[Metric]) -> Rows:
  """Metrics of each side's final weights: with sparse attention, with the best
  possible choice of blocks, and with dense attention.

  The numbers of a row are means over the same seeds. Where only some seeds of a
  side were evaluated in all ways, these have a row of their own, after that of
  all seeds with the ways that all have.
  """
  found = {
    side: [_ways(run) for run in runs if run.finished]
    for side, runs in sides.items()
  }
  columns = [
    way
    for way in _WAYS
    if any(way in seed for seeds in found.values() for seed in seeds)
  ]
  rows = []
  for side, seeds in found.items():
    there = [way for way in columns if any(way in seed for seed in seeds)]
    shared = [way for way in there if all(way in seed for seed in seeds)]
    for ways in dict.fromkeys((tuple(shared), tuple(there))):
      whole = [seed for seed in seeds if all(way in seed for way in ways)]
      if len(ways) < 2 or not whole:
        continue
      row = {"side": side_name(side), "seeds": str(len(whole))}
      for metric in metrics:
        for way in columns:
          row[f"{_column(metric)}{way}"] = (
            _spread_of([seed[way] for seed in whole], metric)
            if way in ways
            else "–"
          )
      rows.append(row)
  return rows


_WAYS = ("", ", with the oracle's blocks", ", with dense attention")


def _ways(run: Run) -> dict[str, dict]:
  """The records of the ways in which a run's final weights were evaluated."""
  records = run.final, run.final_oracle, run.final_dense
  return {way: record for way, record in zip(_WAYS, records) if record}


def gap_rows(
  gaps: dict[str, list[dict]], metrics: Sequence[Metric], aim: float | None
) -> Rows:
  """Each side's differences from the baseline: by seed, their mean with its
  95 % t-interval, and how many seeds make the interval of the loss as narrow as
  the comparison aims at.

  Args:
    gaps: for each side what `gaps.paired_gap` returns for each metric.
    metrics: in the same order.
    aim: half the width of the interval, in percent; None: nothing is aimed at.
  """
  rows = []
  for side, found in gaps.items():
    for metric, gap in zip(metrics, found):
      if metric == BITS:  # the only one whose differences are relative
        values, unit, digits = gap["percents"], "%", 2
      else:
        values = [value * metric.scale for value in gap["values"]]
        unit = "points" if metric.unit == "%" else metric.unit
        digits = metric.digits

      def shown(value: float, sign: str = "", digits=digits) -> str:
        return f"{value:{sign}.{digits}f}"

      mean = deviation = needed = "–"
      if values:
        mean = shown(statistics.fmean(values), "+")
      if interval := t_interval(values):
        mean += f" ± {shown((interval[1] - interval[0]) / 2)}"
      if spread := deviation_interval(values):
        deviation = shown(statistics.stdev(values))
        deviation += " ({} to {})".format(*map(shown, spread))
        if aim is not None and metric == BITS:
          needed = f"{pairs_needed(statistics.stdev(values), aim):,}"
      rows.append(
        {
          "side": side_name(side),
          "difference in": f"{metric.title.lower()} ({unit})",
          "seeds": str(len(values)),
          "mean": mean,
          "standard deviation": deviation,
          **({} if aim is None else {f"seeds for ± {aim:g} %": needed}),
          "by seed": ", ".join(
            f"{seed}: {shown(value, '+')}"
            for seed, value in zip(gap["seeds"], values)
          ),
        }
      )
  return rows


def window_rows(sides: dict[str, list[Run]]) -> Rows:
  """Loss after training with all tokens of the context and with the last ones
  alone, by the number of tokens before the query; means over the seeds."""
  rows = []
  for side, runs in sides.items():
    done = (run for run in runs if run.finished and run.final_window)
    found = [(run.final, run.final_window) for run in done]
    if not found:
      continue
    window, most = (found[0][1][key] for key in ("window", "window_most"))
    row = {
      "side": side_name(side),
      "seeds": str(len(found)),
      "tokens seen": f"the last {window:,} to {most:,}",
      "all targets": _change(*_means(found, lambda x: x["loss"])),
    }
    for i, place in enumerate(found[0][1]["loss_by_position"]):
      if place["low"] < window:
        continue
      row[f"after {place['low']:,} to {place['high'] - 1:,} tokens"] = _change(
        *_means(found, lambda x, i=i: x["loss_by_position"][i]["loss"])
      )
    rows.append(row)
  return rows


def _means(
  found: list[tuple[dict, dict]], value: Callable[[dict], float]
) -> tuple[float, float]:
  """Means over the seeds of a number of both records of a seed."""
  before, after = (statistics.fmean(map(value, x)) for x in zip(*found))
  return before, after


def _change(before: float, after: float) -> str:
  return f"{before:.4f} → {after:.4f} ({after / before - 1:+.2%})"


def sample_rows(sides: dict[str, list[Run]]) -> Rows:
  """What the first seed of each side writes after the same held-out prompts."""
  written = {side: runs[0].samples for side, runs in sides.items()}
  written = {side: samples for side, samples in written.items() if samples}
  return [
    {
      "": str(number),
      "prompt (its end)": texts[0]["prompt"],
      "text": texts[0]["text"],
      **{side_name(side): x["sample"] for side, x in zip(written, texts)},
    }
    for number, texts in enumerate(zip(*written.values()), 1)
  ]


def choice_rows(sides: dict[str, list[Run]], probes: Sequence[Probe]) -> Rows:
  """Right answers by whether a layer chose the block of the fact, summed over
  the finished runs that counted them."""
  rows = []
  for side, runs in sides.items():
    for probe in probes:
      counted = [
        r.final[probe.by_choice]
        for r in runs
        if r.finished and r.final.get(probe.by_choice)
      ]
      for layers in zip(*counted, strict=True):
        found, found_right, missed, missed_right = (
          sum(row[key] for row in layers)
          for key in ("found", "found_right", "missed", "missed_right")
        )
        rows.append(
          {
            "side": side_name(side),
            "seeds": str(len(layers)),
            **({"facts": probe.words} if probe.name else {}),
            "layer": str(layers[0]["layer"]),
            "in chosen blocks": _share(found, found + missed),
            "of these right": _share(found_right, found),
            "of the others right": _share(missed_right, missed),
          }
        )
  return rows


def _share(part: int, whole: int) -> str:
  return f"{100 * part / whole:.1f} % of {whole:,}" if whole else "–"


def _short(value: float | None) -> str:
  return "–" if value is None else f"{value:,.1f}"


def speed_rows(records: list[dict]) -> Rows:
  """The records of speed.json, with the speed-up over the baseline.

  Args:
    records: as under "rows" in speed.json.
  """
  base = {r["context"]: r["step_ms"] for r in records if r["side"] == BASELINE}
  shown = []
  for record in sorted(records, key=lambda record: record["context"]):
    dense = base.get(record["context"])
    shown.append(
      {
        "context": f"{record['context']:,}",
        "rows": str(record["batch_size"]),
        "trained steps": f"{record['trained_steps']:,}",
        "side": side_name(record["side"]),
        "phase": record["phase"].replace("warmup", "warm-up"),
        "step, ms": f"{record['step_ms']:,.1f}",
        "its kernels, ms": _short(record.get("kernels_ms")),
        "against " + side_name(BASELINE): (
          f"{dense / record['step_ms']:.2f}x" if dense else "–"
        ),
        "tokens/s": f"{record['tokens_per_second']:,.0f}",
        "MFU": "–" if record["mfu"] is None else f"{100 * record['mfu']:.1f} %",
        "peak memory": bytes_text(record["peak_bytes"]),
      }
    )
  return shown


def answer_rows(
  found: dict[str, list[dict]], chance: float | None, number: str = "number"
) -> Rows:
  """Right answers of the baseline by octave of distance or by number, and each
  side's difference from them, with the number of its seeds if others have more.

  Args:
    found: for each side the bins of `gaps.answer_gaps`; that of a name which
      ends with " oracle" are those with the oracle's blocks.
    chance: accuracy of guessing.
    number: what the number is.
  """
  found = {side: bins for side, bins in found.items() if bins}
  seeds = {side: max(b["seeds"] for b in bins) for side, bins in found.items()}
  most = max(seeds.values(), default=0)
  shown = []
  for bins in zip(*found.values(), strict=True):
    first = bins[0]
    if "number" in first:
      row = {number: str(first["number"]), "answers": f"{first['count']:,}"}
    else:
      row = {
        "distance": f"{first['low']:,}–{first['high'] - 1:,}",
        "facts": f"{first['count']:,}",
      }
    if chance:
      row["chance, %"] = f"{100 * chance:.1f}"
    row[f"{side_name(BASELINE)}, %"] = f"{100 * first['baseline']:.1f}"
    for side, gap in zip(found, bins):
      name = side_name(side.removesuffix(" oracle"))
      if side.endswith(" oracle"):
        name += " with the oracle's blocks"
      name += f" − {side_name(BASELINE)}, points"
      if seeds[side] < most:
        name += f" ({seeds[side]} of {most} seeds)"
      row[name] = f"{100 * gap['difference']:+.1f} ± {100 * gap['error']:.1f}"
    shown.append(row)
  return shown


# What each ablation changes, and what the paper reports of it. For most the
# paper gives no number.
_ABLATIONS = {
  "no_warmup": ("sparse from the first step", "worse"),
  "input_not_detached": (
    "the KL's gradient reaches the backbone through the index projections",
    "diverges or degrades",
  ),
  "teacher_not_detached": (
    "the KL's gradient reaches the main branch",
    "diverges or degrades",
  ),
  "own_block_not_forced": (
    "a query's own block competes like the others",
    "forces it, to keep local coherence",
  ),
  "first_block_forced": ("block 0 is always chosen", "no gain"),
  "fixed_window": ("block 0 and the last blocks, no index", "worse"),
  "index_value_head": (
    "the index's own attention is added to the output",
    "not reported; without the KL it retrieves badly",
  ),
  "index_rate_1": ("the index learns at the backbone's rate", "not reported"),
  "lm_trained_index": (
    "the LM loss alone trains the index, through its value head",
    "retrieves badly",
  ),
}
METHOD = "msa"


def ablation(side: str) -> tuple[str, str] | None:
  """What an ablation changes, and what the paper reports of it; None for a side
  that is no ablation."""
  if size := re.fullmatch(r"block_(\d+)", side):
    return f"blocks of {size[1]}, as many keys", "equal"
  return _ABLATIONS.get(side)


def ablation_rows(sides: dict[str, list[Run]], metrics: list[Metric]) -> Rows:
  """Each ablation's gap to the method, beside the paper's finding."""
  method = {METHOD: sides.get(METHOD, [])}
  rows = []
  for side, runs in sides.items():
    known = ablation(side)
    if known is None or not method[METHOD]:
      continue
    change, paper = known
    done = {r.seed: r for r in method[METHOD] if r.finished}
    pairs = [(done[r.seed], r) for r in runs if r.finished and r.seed in done]
    row = {"side": side_name(side), "changes": change, "the paper": paper}
    for metric in metrics:
      found = paired_gap(pairs, metric)
      name = f"{metric.title.lower()} − {side_name(METHOD)}"
      row[name] = _short_gap(found, metric)
    shares, best = (
      [
        statistics.fmean(found)
        for r in runs
        if r.finished and r.records["layers"] and (found := _last(r, key))
      ]
      for key in ("score_recall", "best_score_recall")
    )
    row["score recall"] = spread(shares, 3)
    # The two means can be compared only if they are over the same seeds.
    same = len(best) == len(shares)
    row["best score recall"] = spread(best if same else [], 3)
    broken = [r for r in runs if r.broken and not r.finished]
    row["seeds"] = f"{len(pairs)} of {len(runs)}" + "".join(
      f"; seed {r.seed} broke down at step {r.broken['step']}" for r in broken
    )
    rows.append(row)
  return _without_empty(rows, ["best score recall"])


def _last(run: Run, key: str) -> list[float]:
  """A number of each layer after training, without layers that lack it."""
  values = (x.get(key) for x in run.records["layers"][-1]["layers"])
  return [x for x in values if x is not None and math.isfinite(x)]


def _short_gap(found: dict, metric: Metric) -> str:
  if found["mean"] is None:
    return "–"
  percent = found["percent"] is not None
  key = "percent" if percent else "mean"
  unit = "points" if metric.unit == "%" else metric.unit
  scale, unit = (1.0, "%") if percent else (metric.scale, unit)
  text = f"{found[key] * scale:+.2f} {unit}"
  interval = found["percent_interval"] if percent else found["interval"]
  if interval:
    low, high = (x * scale for x in interval)
    text += f" ({low:+.2f} to {high:+.2f})"
  return text


def layer_rows(sides: dict[str, list[Run]]) -> Rows:
  """Recalls of each MSA layer after training, mean over finished runs.

  Beside the score recall stands the highest one that a choice of as many blocks
  could have, for runs that measured it.
  """
  rows = []
  for side, runs in sides.items():
    last = [
      r.records["layers"][-1]["layers"]
      for r in runs
      if r.finished and r.records["layers"]
    ]
    if not last:
      continue

    def means(key: str, last=last) -> np.ndarray:
      """The mean of each layer, then of all layers; NaN if a run lacks it."""
      values = [[x.get(key) for x in layers] for layers in last]
      layers = np.array(values, float).mean(0)
      return np.array([*layers, layers.mean()])

    score, best = means("score_recall"), means("best_score_recall")
    columns = {
      "block recall": means("block_recall"),
      "score recall": score,
      "best score recall": best,
      "of the best": score / best,
    }
    for i, layer in enumerate([*(x["layer"] for x in last[0]), "mean"]):
      row = {"side": side_name(side), "layer": str(layer)}
      for name, values in columns.items():
        row[name] = f"{values[i]:.3f}" if np.isfinite(values[i]) else "–"
      rows.append(row)
  return _without_empty(rows, ("best score recall", "of the best"))


def _without_empty(rows: Rows, names: Sequence[str]) -> Rows:
  """The table rows without those of the named columns that are empty."""
  empty = {n for n in names if all(row[n] == "–" for row in rows)}
  return [{k: v for k, v in row.items() if k not in empty} for row in rows]


_SHARING = ("union8", "first_block", "previous_block", "kept")


def sharing_rows(sides: dict[str, list[Run]]) -> Rows:
  """How much the choices of neighbouring queries have in common, for each layer
  of a side's first run that saved its choices."""
  rows = []
  for side, runs in sides.items():
    saved = (r for r in runs if (r.folder / "selection.npz").exists())
    run = next(saved, None)
    if run is None:
      continue
    with np.load(run.folder / "selection.npz") as file:
      if "union8" not in file:
        continue
      columns = {name: file[name].mean(1) for name in _SHARING}
      layers = file["layers"]
    if not all(np.isfinite(values).all() for values in columns.values()):
      continue
    for i, layer in enumerate([*layers, "mean"]):
      row = {"side": side_name(side), "seed": str(run.seed)}
      row["layer"] = str(layer)
      for name, values in columns.items():
        value = values.mean() if i == len(layers) else values[i]
        row[name.replace("_", " ")] = f"{value:.3f}"
      rows.append(row)
  return rows
