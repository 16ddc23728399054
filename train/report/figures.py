"""The figures of a report, which notebooks draw too.

`sides` maps a side's name to its runs of one task, and `colors` maps it to its
colour.
"""

import itertools
import math
import pathlib
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import (
  EngFormatter,
  FuncFormatter,
  MaxNLocator,
  NullLocator,
)

from train.report.gaps import paired_runs, t_interval
from train.report.runs import (
  BASELINE,
  BITS,
  Metric,
  Probe,
  Run,
  chance_of,
  metrics_of,
  probes_of,
  token_budget,
)

# Okabe and Ito's palette, whose colours colour-blind readers can tell apart,
# without its yellow, which is too faint on white. More colours follow it.
COLORS = [
  "#0072B2",
  "#D55E00",
  "#009E73",
  "#CC79A7",
  "#E69F00",
  "#56B4E9",
  "#333333",
  "#8C564B",
  "#7F3C8D",
  "#A6D854",
  "#B00020",
  "#999999",
  "#17BECF",
]
STYLE: dict[Any, Any] = {
  "figure.dpi": 100,
  "savefig.dpi": 150,
  "figure.facecolor": "white",
  "font.size": 11,
  "axes.titlesize": 12,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.grid": True,
  "grid.color": "#e4e4e4",
  "axes.axisbelow": True,
  "legend.frameon": False,
}


def side_colors(sides: Iterable[str]) -> dict[str, str]:
  """A colour for each side. The baseline has the first."""
  others = itertools.cycle(COLORS[1:])
  return {
    side: COLORS[0] if side == BASELINE else next(others) for side in sides
  }


def side_name(side: str) -> str:
  """The side in words: msa_cpt is "MSA CPT", msa_window "MSA window"."""
  upper = {"gqa", "msa", "cpt", "pt", "kl"}
  return " ".join(
    word.upper() if word in upper else word for word in side.split("_")
  )


def _figure(width=9.0, height=4.4, columns=1, rows=1, **kwargs):
  figure = Figure(figsize=(width, height), layout="constrained")
  axes = figure.subplots(rows, columns, squeeze=False, **kwargs)
  return figure, axes


def _legend(figure: Figure, *panels) -> None:
  """Adds one legend below the axes, with each label once."""
  found = {}
  for axes in panels:
    for handle, label in zip(*axes.get_legend_handles_labels()):
      found.setdefault(label, handle)
  number = len(found)
  # A letter is about 0.085 inches wide, and a line's sample and margins 0.6.
  width = 0.6 + 0.085 * max(map(len, found), default=0)
  fitting = max(1, int(figure.get_figwidth() / width))
  wanted = number if number <= 4 else min(math.ceil(number / 2), 6)
  columns = max(1, min(wanted, fitting))
  # The legend takes its room from the axes: give rows beyond two their own.
  more_rows = max(0, math.ceil(number / columns) - 2)
  figure.set_figheight(figure.get_figheight() + 0.25 * more_rows)
  figure.legend(
    found.values(),
    found.keys(),
    loc="outside lower center",
    ncols=columns,
  )


def _seeds(number: int) -> str:
  return f"{number} seed{'s' * (number > 1)}"


def _label(name: str, finished: list) -> str:
  number = len(finished)
  seeds = _seeds(number) if number else "unfinished"
  return f"{name} ({seeds})"


def _width(side: str) -> float:
  # The baseline is drawn first, and wider, so that it stays visible where
  # other lines lie on it.
  return 3.4 if side == BASELINE else 1.8


def _mean_curve(runs: list[Run], get: Callable[[dict], Any], kind="eval"):
  """Records of a kind averaged over runs, at the steps that all runs have."""
  by_step: dict[int, list] = {}
  for run in runs:
    for record in run.records[kind]:
      by_step.setdefault(record["step"], []).append(get(record))
  steps = [s for s, values in by_step.items() if len(values) == len(runs)]
  return steps, np.array([np.mean(by_step[s], axis=0) for s in steps])


def _step_axis(axes) -> None:
  """Labels the x axis as training steps, with ticks at whole numbers."""
  axes.set_xlabel("Training steps")
  ticks = MaxNLocator("auto", steps=(1, 2, 2.5, 5, 10), integer=True)
  axes.xaxis.set_major_locator(ticks)


def _late_limits(axes, curves: Iterable[tuple[Sequence, Sequence]]) -> None:
  """Limits the y axis to the values after the first quarter of training."""
  late = []
  for x, y in curves:
    x, y = np.asarray(x), np.asarray(y, float)
    late += list(y[(x >= 0.25 * x.max()) & np.isfinite(y)]) if x.size else []
  if late and max(late) > min(late):
    pad = 0.06 * (max(late) - min(late))
    axes.set_ylim(min(late) - pad, max(late) + pad)


def _draw_chance(axes, sides, probe: str) -> None:
  if chance := chance_of(next(iter(sides.values()))[0], probe):
    axes.axhline(100 * chance, color="#555555", ls="--", lw=1.2, label="chance")


def _seconds_before(run: Run, sides: dict[str, list[Run]]) -> float:
  """Seconds of training before the run's own: those of the run from whose
  checkpoint it started, up to that checkpoint."""
  start, step = run.get("recipe.init_from"), run.get("recipe.init_step")
  if not start or step is None:
    return 0.0
  names = pathlib.PurePath(start).parts[-2:]
  for other in sides.get(names[0], ()) if len(names) == 2 else ():
    if f"seed{other.seed}" == names[1]:
      times = sorted(
        (record["step"], record["seconds"])
        for kind in ("train", "eval")
        for record in other.records[kind]
      )
      return max((s for at, s in times if at <= step), default=0.0)
  return 0.0


def _draw_curves(axes, sides, colors, metric: Metric, clock: str, unit=1.0):
  """Draws a metric against "step" or "seconds". Thin lines are single seeds,
  thick lines the mean."""
  drawn = []
  for side, runs in sides.items():
    runs = [r for r in runs if r.records["eval"]]
    done = [r for r in runs if r.finished]
    all_x: dict[int, list[float]] = {}
    for run in runs:
      before = _seconds_before(run, sides) if clock == "seconds" else 0.0
      evals = run.records["eval"]
      x = [(record[clock] + before) / unit for record in evals]
      y = [record[metric.key] * metric.scale for record in evals]
      drawn.append((x, y))
      all_x[run.seed] = x
      axes.plot(
        x,
        y,
        color=colors[side],
        linewidth=0.8,
        alpha=0.55,
        linestyle="-" if run.finished else ":",
      )
    label = _label(side_name(side), done)
    if done:
      _, mean = _mean_curve(done, lambda r: r[metric.key] * metric.scale)
      shared = min(len(all_x[r.seed]) for r in done)
      x = np.mean([all_x[r.seed][:shared] for r in done], axis=0)
      axes.plot(
        x,
        mean[:shared],
        color=colors[side],
        lw=_width(side),
        marker="o" if shared < 3 else None,  # so short a line hardly shows
        ms=5,
        label=label,
      )
    elif runs:
      axes.plot([], [], color=colors[side], ls=":", label=label)
  if metric.higher_is_better:
    axes.set_ylim(0, 102)
    _draw_chance(axes, sides, Probe(metric.key.removesuffix("accuracy")).name)
  else:
    _late_limits(axes, drawn)
  axes.set_ylabel(f"{metric.title} ({metric.unit})")


def _mark_switch(axes, sides, colors) -> None:
  for side, runs in sides.items():
    switch = runs[0].switch()
    if switch and any(r.final.get("step", 0) > switch for r in runs):
      axes.axvline(
        switch,
        color=colors[side],
        lw=1.2,
        ls=(0, (2, 3)),
        label=f"{side_name(side)} goes sparse",
      )


def curves(task, sides, colors, metric: Metric, clock: str) -> Figure:
  """A metric against "step" (with tokens on top) or against "seconds"."""
  figure, ((axes,),) = _figure()
  finals = [r.final for runs in sides.values() for r in runs if r.final]
  if clock == "step":
    _draw_curves(axes, sides, colors, metric, clock)
    _mark_switch(axes, sides, colors)
    _step_axis(axes)
    # Batch and context are equal, so tokens are steps times a constant.
    ratio = max(final["tokens"] / final["step"] for final in finals)
    top = axes.secondary_xaxis(
      "top", functions=(lambda x: x * ratio, lambda x: x / ratio)
    )
    top.set_xlabel("Training tokens")
    top.xaxis.set_major_formatter(EngFormatter(sep=" "))
    against = "steps and tokens"
  else:
    longest = max(
      run.final["seconds"] + _seconds_before(run, sides)
      for runs in sides.values()
      for run in runs
      if run.final
    )
    units = {"hours": 3600, "minutes": 60, "seconds": 1}
    word = next(w for w, u in units.items() if longest > 2 * u or u == 1)
    _draw_curves(axes, sides, colors, metric, clock, units[word])
    axes.set_xlabel(f"Training wall time without evaluation ({word})")
    against = "wall time"
  axes.set_xlim(left=0)
  axes.set_title(f"{task}: {metric.title.lower()} against {against}")
  _legend(figure, axes)
  return figure


def train_figure(task, sides, colors) -> Figure | None:
  """The loss on the training batches. Thin lines are single seeds, thick lines
  the mean; a run that has not finished is dotted."""
  figure, ((axes,),) = _figure()
  drawn = []
  for side, runs in sides.items():
    runs = [run for run in runs if run.records["train"]]
    done = [run for run in runs if run.finished]
    for run in runs:
      x = [record["step"] for record in run.records["train"]]
      y = [_number(record["loss"]) for record in run.records["train"]]
      drawn.append((x, y))
      style = "-" if run.finished else ":"
      axes.plot(x, y, color=colors[side], lw=0.8, alpha=0.55, ls=style)
    label = _label(side_name(side), done)
    if done:
      steps, mean = _mean_curve(done, lambda r: _number(r["loss"]), "train")
      axes.plot(steps, mean, color=colors[side], lw=_width(side), label=label)
    elif runs:
      axes.plot([], [], color=colors[side], ls=":", label=label)
  if not any(len(x) > 1 for x, _ in drawn):
    return None
  _late_limits(axes, drawn)
  _mark_switch(axes, sides, colors)
  _step_axis(axes)
  axes.set_xlim(left=0)
  axes.set_ylabel("Training loss (nats per target)")
  axes.set_title(f"{task}: loss on the training batches")
  _legend(figure, axes)
  return figure


def gap_figure(task, sides, colors, metric: Metric) -> Figure | None:
  """The paired gap during training with its t-interval."""
  figure, ((axes,),) = _figure()
  drawn, bands = [], []
  for side, pairs in paired_runs(sides).items():
    curves: dict[int, list[float]] = {}
    for a, b in pairs:
      base = {r["step"]: r[metric.key] for r in a.records["eval"]}
      points = [
        (r["step"], (r[metric.key] - base[r["step"]]) * metric.scale)
        for r in b.records["eval"]
        if r["step"] in base
      ]
      if not points:
        continue
      drawn.append(tuple(zip(*points)))
      if len(pairs) > 1:
        axes.plot(*drawn[-1], color=colors[side], lw=0.8, alpha=0.55)
      for step, value in points:
        curves.setdefault(step, []).append(value)
    steps = [s for s, v in curves.items() if len(v) == len(pairs)]
    if not steps:
      continue
    name = f"{side_name(side)} − {side_name(BASELINE)}"
    mean = [statistics.fmean(curves[s]) for s in steps]
    axes.plot(
      steps, mean, color=colors[side], lw=2.2, label=_label(name, pairs)
    )
    if len(pairs) > 1:
      band = list(zip(*(t_interval(curves[s]) or () for s in steps)))
      axes.fill_between(steps, *band, color=colors[side], alpha=0.13, lw=0)
      bands += [(steps, edge) for edge in band]
  if not drawn:
    return None
  _late_limits(axes, [*drawn, *bands, ([0, 1], [0, 0])])
  axes.axhline(0, color="black", lw=1)
  good = "above" if metric.higher_is_better else "below"
  axes.set_ylabel(f"Gap ({metric.gap_unit})")
  _step_axis(axes)
  axes.set_title(
    f"{task}: gap in {metric.title.lower()} "
    f"({good} 0: better than {side_name(BASELINE)})"
  )
  _legend(figure, axes)
  return figure


def _number(value: float | None) -> float:
  return math.nan if value is None else value


def layers_figure(task: str, side: str, runs: list[Run]) -> Figure | None:
  """KL and recalls of every MSA layer during training, mean over runs.

  Dotted lines are the best possible score recall, if the runs measured it.
  """
  runs = [r for r in runs if r.finished] or runs[:1]
  runs = [r for r in runs if r.records["layers"]]
  if not runs:
    return None
  first = runs[0].records["layers"][0]["layers"][0]
  titles = {"block_recall": "Block recall", "score_recall": "Score recall"}
  if first.get("kl") is not None:  # A choice without an index has no KL.
    titles = {"kl": "KL loss (nats)"} | titles
  if first.get("facts_found") is not None:
    titles["facts_found"] = "Asked facts in chosen blocks"
  # The last key is drawn in the panel of the score recall. Older runs lack it.
  keys = [*titles, "best_score_recall"]
  steps, values = _mean_curve(
    runs,
    lambda r: [[_number(x.get(k)) for k in keys] for x in r["layers"]],
    "layers",
  )
  ids = [x["layer"] for x in runs[0].records["layers"][0]["layers"]]
  figure, axes = _figure(11 + 3 * (len(titles) - 3), 4.2, columns=len(titles))
  shades = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(ids)))
  for column, (key, title) in enumerate(titles.items()):
    axis = axes[0, column]
    for i, layer in enumerate(ids):
      axis.plot(
        steps,
        values[:, i, column],
        color=shades[i],
        lw=1.8,
        marker=".",
        label=f"layer {layer}",
      )
    if warmup := runs[0].warmup():
      axis.axvspan(*warmup, color="#eeeeee", zorder=0, lw=0, label="warm-up")
    axis.set_title(title)
    _step_axis(axis)
    axis.set_xlim(left=0)
    axis.set_ylim(*((0, None) if key == "kl" else (0, 1.02)))
  if np.isfinite(values[..., -1]).any():
    axis = axes[0, keys.index("score_recall")]
    for i in range(len(ids)):
      axis.plot(
        steps,
        values[:, i, -1],
        color=shades[i],
        lw=1.4,
        ls=":",
        marker="_",  # a line with a single point does not show
        ms=5,
      )
    # The legend has one entry for the dotted lines of all layers.
    axes[0, 0].plot(
      [], [], color="#555555", ls=":", marker="_", label="best possible"
    )
  figure.suptitle(
    f"{task}, {side_name(side)}: how well the index follows attention"
  )
  _legend(figure, axes[0, 0])
  return figure


def selection_figure(task: str, side: str, runs: list[Run]) -> Figure | None:
  """The share of the queries of a block that chose each key block, in a side's
  first run that saved its choices."""
  saved = (r for r in runs if (r.folder / "selection.npz").exists())
  run = next(saved, None)
  if run is None:
    return None
  with np.load(run.folder / "selection.npz") as file:
    counts, layers = file["counts"], file["layers"]
    block_size = int(file["block_size"])
  num_layers, num_groups, num_query_blocks, num_key_blocks = counts.shape
  figure, axes = _figure(
    1.6 + 2.6 * num_groups,
    1.4 + 2.6 * num_layers,
    num_groups,
    num_layers,
    sharex=True,
    sharey=True,
  )
  offset = num_key_blocks - num_query_blocks
  future = np.triu(np.ones(counts.shape[2:], bool), 1 + offset)
  colors = matplotlib.colormaps["viridis"].with_extremes(bad="#dddddd")
  images = []
  for (i, j), axis in np.ndenumerate(axes):
    image = axis.imshow(
      np.ma.masked_array(counts[i, j], future),
      vmin=0,
      vmax=1,
      cmap=colors,
      interpolation="nearest",
    )
    images.append(image)
    axis.set_title(f"layer {layers[i]}, group {j}")
    axis.grid(False)
  bar = figure.colorbar(
    images[-1], ax=axes, shrink=0.8 if num_layers < 3 else 0.4
  )
  bar.set_label("Share of the block's queries")
  figure.supxlabel(f"Key block ({block_size} tokens each)")
  figure.supylabel("Query block")
  figure.suptitle(
    f"{task}, {side_name(side)}: blocks the queries choose (seed {run.seed})"
  )
  return figure


_MOST_WITH_ORACLE = 4


def _draw_answers(axes, sides, colors, key: str, x_of: Callable) -> None:
  """Draws right answers after training against x_of(bin), for the bins under a
  key of the records; dashed with the oracle's blocks, where the sides are few
  enough for their lines to be told apart."""
  kinds = (False, True) if len(sides) <= _MOST_WITH_ORACLE else (False,)
  for marker, (side, runs) in zip(itertools.cycle("osD^v"), sides.items()):
    done = [r for r in runs if r.finished and r.final.get(key)]
    for oracle in kinds:
      finals = [r.final_oracle if oracle else r.final for r in done]
      curves = []
      for final in (final for final in finals if final.get(key)):
        # An answer or two say nothing.
        least = 0.01 * sum(b["count"] for b in final[key])
        bins = [b for b in final[key] if b["count"] >= max(least, 1)]
        x = [x_of(b) for b in bins]
        curves.append([100 * b["accuracy"] for b in bins])
        if len(done) > 1 and not oracle:
          axes.plot(x, curves[-1], color=colors[side], lw=0.8, alpha=0.55)
      if curves:
        name = side_name(side) + ", oracle's blocks" * oracle
        axes.plot(
          x,
          np.mean(curves, axis=0),
          color=colors[side],
          lw=_width(side) / 2 + 1,
          ls="--" if oracle else "-",
          marker=marker,
          mfc="white" if oracle else None,
          label=f"{name} ({_seeds(len(curves))})",
        )
  axes.set_ylim(0, 102)
  axes.set_ylabel("Answers right (%)")


def _draw_distance(axes, sides, colors, probe: Probe) -> None:
  _draw_answers(axes, sides, colors, probe.by_distance, _middle)
  _draw_chance(axes, sides, probe.name)
  _token_axis(axes, sides)
  axes.set_xlabel("Distance back to the fact (tokens)")


NUMBERS = {
  "multi_query": "keys asked for in a row",
  "multi_value": "values that the answer needs",
  "common_words": "lead of the commonest word (%)",
  "copy": "tokens in the copied span",
  "variable_tracking": "hops from the variable to its value",
}
"""What the number of a probe of `train.probes` is."""


def _draw_number(axes, sides, colors, probe: Probe) -> None:
  # The numbers that occur stand at equal distances.
  numbers = sorted(
    {
      bin_["number"]
      for runs in sides.values()
      for run in runs
      for bin_ in run.final.get(probe.by_number) or ()
    }
  )
  _draw_answers(
    axes, sides, colors, probe.by_number, lambda b: numbers.index(b["number"])
  )
  _draw_chance(axes, sides, probe.name)
  axes.set_xticks(range(len(numbers)), [str(number) for number in numbers])
  axes.set_xlim(-0.4, len(numbers) - 0.6)
  axes.set_xlabel(NUMBERS.get(probe.name, "number").capitalize())


def _token_axis(axes, sides) -> None:
  """Makes the x axis a log axis of tokens, and marks on it the tokens of the
  local blocks, those that a sparse query attends to, and the context."""
  axes.set_xscale("log", base=2)
  axes.xaxis.set_major_formatter(FuncFormatter(_short_tokens))
  axes.xaxis.set_minor_locator(NullLocator())
  marks = (
    *(token_budget(sides) or (None, None)),
    next(iter(sides.values()))[0].get("context"),
  )
  places = ["center"] * 3
  low, high = axes.get_xlim()
  if marks[0] and marks[1] and marks[1] / marks[0] < (high / low) ** 0.2:
    places[:2] = "right", "left"  # else their words would overlap
  words = ("local block", "tokens read", "context")
  for word, place, x in zip(words, places, marks):
    if not x:
      continue
    axes.axvline(x, color="#999999", lw=1, ls=":")
    axes.annotate(
      word,
      (x, 1),
      xycoords=("data", "axes fraction"),
      xytext=(0, 2),
      textcoords="offset points",
      ha=place,
      fontsize=8,
      color="#555555",
    )


def _middle(bin_: dict) -> float:
  """The middle of a bin of tokens on a log axis."""
  return math.sqrt(max(bin_["low"], 1) * max(bin_["high"], 1))


def _short_tokens(count: float, _: object = None) -> str:
  return f"{count / 1024:g}K" if count >= 1024 else f"{count:g}"


def distance_figure(task, sides, colors, probe: Probe) -> Figure:
  """Right answers after training, by distance and, where there is one, by the
  probe's number."""
  finals = [r.final for runs in sides.values() for r in runs if r.finished]
  kinds = {
    probe.by_distance: ("distance", _draw_distance),
    probe.by_number: ("number", _draw_number),
  }
  there = [kinds[key] for key in kinds if any(f.get(key) for f in finals)]
  there = there or [kinds[probe.by_distance]]
  figure, axes = _figure(9 if len(there) < 2 else 12, columns=len(there))
  name = f"{probe.words}, " if probe.name else ""
  for axis, (word, draw) in zip(axes[0], there):
    draw(axis, sides, colors, probe)
    axis.set_title(
      f"{task}: {name}answers right after training, by {word}"
      if len(there) < 2
      else f"{task}: {name}by {word}",
      pad=18,
    )
  _legend(figure, *axes[0])
  return figure


def position_figure(
  task, sides, colors, gaps: dict[str, list[dict]]
) -> Figure | None:
  """Held-out loss by the number of tokens before, and each side's gap. Thin
  lines are single seeds, thick lines the mean.

  Args:
    task: its name.
    sides: runs by side.
    colors: colour by side.
    gaps: bins of each side, as `gaps.gaps_by_position` returns them.
  """
  if not gaps:
    return None
  figure, axes = _figure(10, 4.2, columns=2)
  for number, (side, bins) in enumerate(gaps.items()):
    # The first bins hold too few targets for their gap to mean anything.
    least = 0.01 * sum(bin_["count"] for bin_ in bins)
    bins = [bin_ for bin_ in bins if bin_["count"] >= least]
    x = [_middle(bin_) for bin_ in bins]
    style = {"color": colors[side], "marker": "o", "ms": 4}
    if not number:
      axes[0, 0].plot(
        x,
        [bin_["baseline"] for bin_ in bins],
        color=colors[BASELINE],
        lw=_width(BASELINE),
        label=side_name(BASELINE),
      )
    losses = [bin_["baseline"] + bin_["difference"] for bin_ in bins]
    seeds = [bin_["by_seed"] for bin_ in bins]
    label = f"{side_name(side)} ({_seeds(len(seeds[0]))})"
    axes[0, 0].plot(x, losses, label=label, **style)
    axes[0, 1].plot(x, [bin_["difference"] for bin_ in bins], **style)
    if len(seeds[0]) > 1:
      axes[0, 1].plot(x, seeds, color=colors[side], lw=0.9, alpha=0.6)
    dense = [bin_["dense_difference"] for bin_ in bins]
    if None not in dense:
      # The legend has one entry for the dashed lines of all sides.
      label = "the same weights with dense attention"
      axes[0, 0].plot(
        [], [], **style | {"color": "#555555"}, ls="--", label=label
      )
      axes[0, 1].plot(x, dense, ls="--", **style)
  axes[0, 1].axhline(0, color=colors[BASELINE], lw=_width(BASELINE))
  titles = "held-out loss by position", f"the same minus {side_name(BASELINE)}"
  for axis, title in zip(axes[0], titles):
    _token_axis(axis, sides)
    axis.set_title(f"{task}: {title}", pad=18)
    axis.set_xlabel("Tokens before (in the context)")
    axis.set_ylabel("Nats per token")
  _legend(figure, axes[0, 0])
  return figure


def speed_figure(records: list[dict], colors) -> Figure:
  """Step time, MFU and memory against context, a line for each side and phase.

  Args:
    records: as under "rows" in speed.json.
    colors: colour by side.
  """
  lines: dict[tuple[str, str], list[dict]] = {}
  for record in records:
    lines.setdefault((record["side"], record["phase"]), []).append(record)
  panels = (
    ("step_ms", 1.0, "Step (ms)"),
    ("mfu", 100.0, "MFU (%)"),
    ("peak_bytes", 2.0**-30, "Peak memory (GiB)"),
  )
  panels = [p for p in panels if any(r[p[0]] is not None for r in records)]
  figure, axes = _figure(1 + 3.4 * len(panels), 4.4, columns=len(panels))
  for (side, phase), members in lines.items():
    members = sorted(members, key=lambda record: record["context"])
    for (key, scale, title), axis in zip(panels, axes[0]):
      points = [(r["context"], r[key]) for r in members if r[key] is not None]
      if points:
        x, y = zip(*points)
        axis.plot(
          x,
          [scale * v for v in y],
          color=colors.get(side, "#333333"),
          ls="--" if phase == "warmup" else "-",
          marker="o",
          ms=4,
          label=f"{side_name(side)}, {phase.replace('warmup', 'warm-up')}",
        )
      axis.set_title(title)
  for axis in axes[0]:
    axis.set_xscale("log", base=2)
    ticks = sorted({record["context"] for record in records})
    axis.set_xticks(ticks, [_short_tokens(t) for t in ticks])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlabel("Context (tokens)")
    axis.set_ylim(bottom=0)
  _legend(figure, axes[0, 0])
  return figure


def overview_figure(
  tasks: dict[str, dict[str, list[Run]]], colors
) -> Figure | None:
  """Two panels for a README: the loss of the first task that has one, and right
  answers by distance of the first task that has any."""
  panels = []
  for task, sides in tasks.items():
    finals = [r.final for rs in sides.values() for r in rs if r.final]
    probes = probes_of(finals)
    metrics = [m for m in metrics_of(finals) if not m.higher_is_better]
    if (finals and not probes) or metrics[:1] == [BITS]:
      panels.append((task, sides, metrics[0], None))
    if probes:
      panels.append((task, sides, None, probes[0]))
  # The first curve, then the first retrieval.
  panels = [
    next((panel for panel in panels if (panel[3] is None) == curve), None)
    for curve in (True, False)
  ]
  panels = [panel for panel in panels if panel]
  if not panels:
    return None
  figure, axes = _figure(8, 3.7, columns=len(panels))
  for axis, (task, sides, metric, probe) in zip(axes[0], panels):
    if probe:
      _draw_distance(axis, sides, colors, probe)
      title = f"{task}: {probe.words or 'accuracy'} by distance"
    else:
      _draw_curves(axis, sides, colors, metric, "step")
      _step_axis(axis)
      title = f"{task}: {metric.title.lower()}"
    axis.set_title(title, pad=18)
    if len({task for task, *_ in panels}) > 1:
      # The labels drop their numbers of seeds, which may differ by task.
      for line in axis.lines:
        line.set_label(line.get_label().split(" (")[0])
  _legend(figure, *reversed(axes[0]))
  return figure
