"""Writes the report of a comparison: one HTML file, its PNGs, a summary.json.

Everything is read from the run folders, so a report can be written at any time,
also while runs are in progress. Each section of the page is a function `_add_*`
below, in the order of the page.
"""

import base64
import contextlib
import dataclasses
import datetime
import fcntl
import html
import json
import math
import os
import shutil
import statistics
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from train.report import tables
from train.report.figures import (
  NUMBERS,
  STYLE,
  curves,
  distance_figure,
  gap_figure,
  layers_figure,
  overview_figure,
  position_figure,
  selection_figure,
  side_colors,
  side_name,
  speed_figure,
  train_figure,
)
from train.report.gaps import (
  answer_gaps,
  gaps_by_position,
  paired_gap,
  paired_runs,
  pairs_needed,
)
from train.report.runs import (
  BASELINE,
  Metric,
  Probe,
  Run,
  aimed_interval,
  chance_of,
  check_runs,
  flatten,
  group_by_side,
  metrics_of,
  planned_runs,
  probes_of,
  quartiles,
  read_runs,
  recall_beyond,
  speeds,
  token_budget,
)


def verdict(
  name: str, base: str, metric: Metric, found: dict, short: bool = False
) -> str:
  """A sentence that says what a gap shows and what it does not show.

  Args:
    name: of the side.
    base: name of the baseline.
    metric: of the gap.
    found: the gap, as `paired_gap` returns it.
    short: gives the size of the gap only.
  """
  number, mean = len(found["seeds"]), found["mean"]
  what = f"{metric.title}, {name} − {base}: "
  if not number:
    return what + "no seed has finished on both sides, so there is no gap."

  def shown(x: float) -> str:
    return f"{x * metric.scale:+.{metric.digits}f}"

  text = f"{what}{shown(mean)} {metric.gap_unit}"
  if found["percent"] is not None:
    text += f" ({found['percent']:+.2f} %)"
  better = (mean > 0) == metric.higher_is_better
  word = "the same" if mean == 0 else "better" if better else "worse"
  if number == 1 and short:
    return text + ", from one seed."
  if number == 1:
    text += (
      f"; {name} ends {word}. This is one seed, so there is no interval: it "
      "cannot tell this gap from the luck of one initialisation and one order "
      f"of batches. ({name} has the higher loss in "
      f"{found['batches_with_higher_loss'][0]} of {found['batches'][0]} "
      "held-out batches"
    )
    if found["batch_percent_interval"]:
      low, high = found["batch_percent_interval"]
      text += ", and over them the gap has a 95 % interval from "
      text += f"{low:+.2f} % to {high:+.2f} %"
    return text + (
      "; that tells how the gap varies over the data, not over runs.)"
    )
  text += f", the mean of {number} seeds, with a 95 % interval from "
  text += " to ".join(map(shown, found["interval"]))
  if found["percent_interval"]:
    text += " ({:+.2f} % to {:+.2f} %)".format(*found["percent_interval"])
  if short:
    return text + "."
  low, high = found["interval"]
  if low <= 0 <= high:
    return text + (
      ". The interval contains 0, so these runs show neither a loss nor a "
      "gain. They do not show that the two are equal either: any gap inside "
      "the interval fits them."
    )
  return text + (
    f". The interval excludes 0: {name} is {word} in this setting. That says "
    "nothing about other sizes, data, contexts or lengths of training."
  )


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 17px/1.5 system-ui, sans-serif; color: #1c1c1c; background: #fff;
  max-width: 62rem; margin: 2rem auto; padding: 0 1rem }}
h1 {{ font-size: 1.9rem }} h2 {{ margin-top: 3rem; border-top: 2px solid #ddd;
  padding-top: 1rem }}
h3 {{ margin-top: 2rem }} figure {{ margin: 1rem 0 2rem }}
img {{ max-width: 100% }}
figcaption, .small {{ color: #444; font-size: .92rem }}
table {{ border-collapse: collapse; font-size: .95rem }}
.wide {{ overflow-x: auto }}
th, td {{ border-bottom: 1px solid #ddd; padding: .35rem .9rem .35rem 0;
  text-align: left; vertical-align: top }}
td {{ white-space: pre-wrap }}
td:first-child {{ white-space: nowrap }}
.env td {{ overflow-wrap: anywhere; white-space: pre-line }}
th {{ font-weight: 600 }}
.warn {{ background: #fff6e0; border-left: 5px solid #e69f00;
  padding: .5rem 1rem }}
.say {{ background: #eef5fb; border-left: 5px solid #0072b2;
  padding: .5rem 1rem }}
pre {{ font-size: .88rem; overflow-wrap: anywhere; white-space: pre-wrap }}
</style></head><body>{body}</body></html>
"""

_WORDS = """<h2>Words used here</h2><dl class="small">
<dt><b>GQA</b></dt><dd>Grouped-query attention: every query reads all earlier
tokens. The baseline.</dd>
<dt><b>MSA</b></dt><dd>MiniMax Sparse Attention: a small index branch picks a
few blocks of earlier tokens for each query and group of heads; attention reads
those only.</dd>
<dt><b>Warm-up</b></dt><dd>The first part of an MSA run: attention is still
dense and the index branch learns to follow it. Then the run goes sparse.</dd>
<dt><b>Bits per byte</b></dt><dd>Loss on held-out text divided by its length in
bytes, in bits. Lower is better; it does not depend on the tokenizer.</dd>
<dt><b>KL loss</b></dt><dd>How far the index branch's distribution over tokens
is from the attention's own. In warm-up it is taken over all visible tokens,
later over the chosen blocks only: the two parts of a curve are not the same
quantity.</dd>
<dt><b>Block recall</b></dt><dd>Share of the blocks with the most attention
that the index picked.</dd>
<dt><b>Score recall</b></dt><dd>Share of the attention's mass that lies on the
picked blocks.</dd>
<dt><b>Chance</b></dt><dd>Accuracy of a guess that knows the task but not the
fact.</dd></dl>
"""


def _aim_words(gaps: dict[str, list[dict]], aim: float | None) -> Iterable[str]:
  """Says which sides' differences in loss are as certain as is aimed at."""
  for side, found in gaps.items():
    percents, interval = found[0]["percents"], found[0]["percent_interval"]
    if aim is None or not interval:
      continue
    half = (interval[1] - interval[0]) / 2
    deviation = statistics.stdev(percents)
    needed = pairs_needed(deviation, aim)
    yield (
      f"The interval of {side_name(side)} − {side_name(BASELINE)} in loss is"
      f" ± {half:.2f} %, and ± {aim:g} % was aimed at: "
      + (
        "reached."
        if half <= aim
        else f"not reached. By the standard deviation of these {len(percents)}"
        f" differences, {deviation:.2f} %, it takes {needed:,} seeds."
      )
    )


def _window_words(sides: dict[str, list[Run]]) -> Iterable[str]:
  """Says how much of a side's loss depends on tokens far back."""
  for side, runs in sides.items():
    found = [r for r in runs if r.finished and r.final_window]
    if not found:
      continue
    more = [100 * (r.final_window["loss"] / r.final["loss"] - 1) for r in found]
    window, most = (
      found[0].final_window[key] for key in ("window", "window_most")
    )
    yield (
      f"Tokens far back: with the last {window:,} to {most:,} tokens alone,"
      f" {side_name(side)}'s held-out loss changes by"
      f" {statistics.fmean(more):+.2f} % ({len(found)}"
      f" seed{'s' * (len(found) > 1)}). That is about all that reading none of"
      " the farther tokens can cost. Where it is small, the loss hardly tells"
      " how well blocks are chosen, and a larger gap has another reason."
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
  """HTML of a table."""

  def line(cells, tag):
    inner = (f"<{tag}>{html.escape(str(c))}</{tag}>" for c in cells)
    return "<tr>" + "".join(inner) + "</tr>"

  body = "".join(line(row, "td") for row in rows)
  return f'<div class="wide"><table>{line(header, "th")}{body}</table></div>'


def _rows(rows: tables.Rows) -> str:
  """HTML of the rows of a table, with their column names as header."""
  return _table(list(rows[0]), [list(row.values()) for row in rows])


def _recall_words(sides: dict[str, list[Run]], probe: Probe) -> Iterable[str]:
  """Says whether each side answers better than chance where the fact lies
  beyond the blocks that are always read."""
  reach, parts = token_budget(sides), []
  chance = chance_of(next(iter(sides.values()))[0], probe.name)
  name = probe.words.capitalize()
  for side, runs in sides.items():
    found = recall_beyond(runs, reach[0], probe) if reach and chance else None
    if found and chance:
      accuracy, count = found
      ahead = accuracy > chance + 3 * math.sqrt(chance * (1 - chance) / count)
      parts.append(
        f"{side_name(side)} answers {100 * accuracy:.1f} % of {count:,} "
        + ("(ahead of chance)" if ahead else "(no better than chance)")
      )
  if parts and reach and chance:
    yield (
      (f"{name}: facts" if name else "Facts")
      + f" {reach[0]} or more tokens back, beyond the local block: "
      f"{', '.join(parts)}. Chance is {100 * chance:.1f} %; ahead means by "
      "more than three standard errors."
    )


def _setting(runs: list[Run]) -> str:
  """The size of the model and of the training, which all sides share."""
  index = {
    tuple(run.get(f"model.index.{k}") for k in ("top_k", "block_size"))
    for run in runs
    if run.side != BASELINE
  }
  text = "{} layers of width {}, {} query heads on {} KV heads, {}; ".format(
    *(
      runs[0].get(f"model.{k}", "?")
      for k in ("num_layers", "embed_dim", "num_heads", "num_kv_heads", "dtype")
    )
  )
  text += "{} steps of {} x {} tokens.".format(
    *(runs[0].get(k, "?") for k in ("num_steps", "batch_size", "context"))
  )
  if len(index) == 1:
    text += " A sparse query reads {} blocks of {} tokens.".format(*index.pop())
  return text


def _notes(sides: dict[str, list[Run]]) -> Iterable[str]:
  """Sentences about what differs between the sides by design."""
  size = {
    side: runs[0].environment.get("parameters") for side, runs in sides.items()
  }
  base = size.get(BASELINE)
  for side, runs in sides.items():
    name, own = side_name(side), size[side]
    if runs[0].is_trunk:
      yield (
        f"{name} was trained with dense attention and an index branch beside "
        "it, which learns and changes neither the output nor other parameters. "
        "Its training time and tokens/s contain the index branch's."
      )
    if base and own and side != BASELINE:
      # The index branch of a trunk is no part of its model.
      plain = base["total"] - base.get("index", 0)
      extra = own["total"] - plain
      yield (
        f"{name} has {extra:,} parameters more than {side_name(BASELINE)} "
        f"({100 * extra / plain:+.2f} %): the projections of "
        "its index branch."
        if extra
        else f"{name} has as many parameters as {side_name(BASELINE)}."
      )
    if start := runs[0].get("recipe.init_from"):
      origin = Path(start)
      yield (
        f"{name} continues from step {runs[0].get('recipe.init_step')} of "
        f"{origin.parent.name}/{origin.name}, each seed from its own; its wall "
        "time counts its own steps only."
      )


# Speeds that should be equal and differ by more than this factor were not
# measured under the same conditions: one run shared the device, say. That all
# runs shared it all the time cannot be seen from their speeds.
_ALIKE = 1.3


def _unlike_speeds(task: str, sides: dict[str, list[Run]]) -> Iterable[str]:
  """Says which speeds of a task cannot be compared, and how that is known."""
  no_measure = "wall times and tokens/s are no measure of speed."
  changed = []
  for side, runs in sides.items():
    unlike = max((max(v) / min(v) for v in speeds(runs).values()), default=1)
    if unlike > _ALIKE:
      yield (
        f"{task}/{side}: tokens/s of its seeds differ by up to"
        f" {unlike:.1f}x, so they shared a device or ran on different ones."
        f" Their {no_measure}"
      )
    for run in runs:
      for phase, values in run.interval_speeds().items():
        low, _, high = quartiles(values)
        if high > _ALIKE * low:
          changed.append(
            f"{run.side}/seed{run.seed} ({phase.replace('warmup', 'warm-up')})"
            f" {low:,.0f} to {high:,.0f}"
          )
  if changed:
    yield (
      f"{task}: tokens/s changed during these runs, which probably shared the"
      " device with other work (quartiles of the log intervals): "
      f"{', '.join(changed)}. Their {no_measure}"
    )
  # A warm-up step does all that a step of the baseline does, and more, unless
  # it leaves the backbone as it is.
  dense = speeds(sides.get(BASELINE, [])).get("dense")
  for side, runs in sides.items():
    warmup = speeds(runs).get("warmup")
    frozen = runs[0].get("recipe.freeze_backbone")
    if not dense or not warmup or frozen:
      continue
    slow, fast = statistics.median(dense), statistics.median(warmup)
    if fast > _ALIKE * slow:
      yield (
        f"{task}: {side_name(BASELINE)} ran at {slow:,.0f} tokens/s and the"
        f" warm-up of {side_name(side)} at {fast:,.0f}, although a warm-up step"
        " does the same work and more. The sides did not run under like"
        f" conditions: their {no_measure}"
      )


def _in_words(numbers: Sequence[int]) -> str:
  """Numbers that grow, with runs of them shortened: "0, 2 to 13"."""
  spans: list[list[int]] = []
  for number in numbers:
    if spans and number == spans[-1][-1] + 1:
      spans[-1].append(number)
    else:
      spans.append([number])
  return ", ".join(
    f"{span[0]} to {span[-1]}" if len(span) > 2 else ", ".join(map(str, span))
    for span in spans
  )


def find_warnings(
  tasks: dict[str, dict[str, list[Run]]], *folders: Path
) -> list:
  """What a reader must know before trusting the numbers of the page."""
  words = []
  every = [r for sides in tasks.values() for rs in sides.values() for r in rs]
  missing: dict[tuple[str, str], list[int]] = {}
  for task, side, seed in planned_runs(folders, every):
    if seed not in [r.seed for r in tasks.get(task, {}).get(side, [])]:
      missing.setdefault((task, side), []).append(seed)
  for (task, side), seeds in missing.items():
    word = "seeds" if len(seeds) > 1 else "seed"
    words.append(
      f"{task}/{side} lacks {word} {_in_words(seeds)}: a gap is of the seeds"
      " that both of its sides have."
    )
  for task, sides in tasks.items():
    if BASELINE not in sides:
      words.append(f"{task}: no side is named {BASELINE}, so there is no gap.")
    base = sides.get(BASELINE)
    size = [(r[0].environment.get("parameters") or {}) for r in sides.values()]
    rest = {s["total"] - s.get("index", 0) for s in size if s}
    if base and len(rest) > 1:
      words.append(
        f"{task}: the sides differ in parameters outside the index branch: "
        + ", ".join(f"{n:,}" for n in sorted(rest))
      )
    words += _unlike_speeds(task, sides)
  for run in every:
    if run.broken and not run.finished:
      words.append(
        f"{run.label} broke down at step {run.broken['step']}"
        f" ({run.broken['why']}): it is in no mean and no gap."
      )
    elif not run.finished:
      at = run.records["train"][-1]["step"] if run.records["train"] else 0
      words.append(
        f"{run.label} is not finished (at step {at}): its curve is dotted, "
        "and it is in no mean and no gap."
      )
  for key, text in {
    "device": "wall time, tokens/s and memory cannot be compared",
    "device_count": "wall time, tokens/s and memory cannot be compared",
    "commit": "the runs were made by different code",
    "versions": "the runs were made with different packages",
  }.items():
    starts = [
      start
      for r in every
      if r.environment
      for start in (r.environment, *r.environment.get("resumed", ()))
    ]
    values = {json.dumps(start.get(key)) for start in starts}
    if len(values) > 1:
      words.append(f"{key} differs, {text}: {', '.join(sorted(values))}")
  if any(r.environment.get("dirty") for r in every):
    words.append("The code had changes that were not committed.")
  return words


def _environment(runs: list[Run]) -> Iterable[tuple[str, str]]:
  """Names and values of where and how the runs were made, each value once."""
  for key in (
    "device",
    "device_count",
    "process_count",
    "commit",
    "versions",
    "command",
    "started",
  ):
    values = []
    for run in runs:
      value = run.environment.get(key)
      if isinstance(value, dict):
        value = ", ".join(f"{k} {v}" for k, v in value.items())
      if value is not None and str(value) not in values:
        values.append(str(value))
    if key == "started" and values:
      values = [f"{min(values)} (first run)"]
    yield key.replace("_", " "), "\n".join(values) or "not recorded"
  for task in dict.fromkeys(r.task for r in runs):
    found = (r.environment.get("data") for r in runs if r.task == task)
    data = next(filter(None, found), {"data": "not recorded"})
    yield (
      f"data of {task}",
      "\n".join(
        f"{k}: {f'{len(v)} entries' if isinstance(v, list) else v}"
        for k, v in flatten(data).items()
      ),
    )


def write(*folders: Path, out: Path | None = None) -> Path:
  """Writes report/report.html, its PNGs and summary.json.

  The report is written to a temporary folder, which then replaces the old one.
  The page names missing and unfinished runs, and leaves them out of means and
  gaps.

  Args:
    folders: of the comparison, with <task>/<side>/seed<k>/ run folders. Several
      are merged: they hold different seeds, and their runs differ in nothing
      else but the machine.
    out: where the folder report/ is written; None: in the one folder.

  Returns:
    The path of report.html.

  Raises:
    ValueError: no runs, runs that may not be compared, a broken file, or
      several folders without `out`.
  """
  folders = tuple(map(Path, folders))
  if out is None and len(folders) != 1:
    raise ValueError(
      f"report of {', '.join(map(str, folders))}: wanted --out, the folder in"
      " which to write it."
    )
  folder = folders[0] if out is None else Path(out)
  tasks: dict[str, dict[str, list[Run]]] = {}
  different = {}
  runs = read_runs(*folders)
  for task in dict.fromkeys(r.task for r in runs):
    members = [r for r in runs if r.task == task]
    different[task] = check_runs(members)
    tasks[task] = group_by_side(members)
  names = dict.fromkeys(r.side for r in runs)
  colors = side_colors(names)

  folder.mkdir(parents=True, exist_ok=True)
  final = folder / "report"
  with _alone(folder):
    for stale in folder.glob(".report-*"):  # left by a killed process
      shutil.rmtree(stale, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=".report-", dir=folder))
    try:
      temporary.chmod(0o755)
      with matplotlib.rc_context(STYLE):
        title = f"{folder.resolve().name}: MSA against GQA"
        page, summary = _compose(
          title, folders, tasks, different, colors, temporary
        )
      (temporary / "report.html").write_text(page)
      (temporary / "summary.json").write_text(
        json.dumps(_finite(summary), allow_nan=False) + "\n"
      )
      old = temporary.with_name(temporary.name + "-old")
      if final.exists():
        final.rename(old)
      temporary.rename(final)
      shutil.rmtree(old, ignore_errors=True)
    except BaseException:
      shutil.rmtree(temporary, ignore_errors=True)
      raise
  return final / "report.html"


@contextlib.contextmanager
def _alone(folder: Path):
  """Waits until no other process writes this folder's report."""
  handle = os.open(folder, os.O_RDONLY)
  try:
    fcntl.flock(handle, fcntl.LOCK_EX)
    yield
  finally:
    os.close(handle)


def _finite(value: Any) -> Any:
  """The value with None for NaN and infinity, which JSON cannot hold."""
  if isinstance(value, dict):
    return {k: _finite(v) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return [_finite(v) for v in value]
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


def _line_widths(tasks: Sequence[dict[str, list[Run]]]) -> str:
  """Says what thin and thick lines mean in figures of these tasks."""
  sides = [runs for members in tasks for runs in members.values()]
  if any(len(runs) > 1 for runs in sides):
    text = "Thin lines are single seeds, thick lines the mean."
    if any(
      len({frozenset(run.seed for run in runs) for runs in members.values()})
      > 1
      for members in tasks
    ):
      text += (
        " Sides have different seeds here: a mean is over the seeds of its own"
        " side, so the means of two sides differ by their seeds too."
      )
    return text
  # `figures` draws the baseline wider.
  wider = f" {side_name(BASELINE)} is wider, to show below the others."
  return "One seed a side." + wider * any(BASELINE in m for m in tasks)


@dataclasses.dataclass
class _Page:
  """A page in the making.

  Attributes:
    out: folder that the pictures are saved in.
    colors: of the sides.
    body: parts of the HTML.
    summary: content of summary.json.
  """

  out: Path
  colors: dict[str, str]
  body: list[str] = dataclasses.field(default_factory=list)
  summary: dict[str, Any] = dataclasses.field(
    default_factory=lambda: {"tasks": {}}
  )

  def add(self, *parts: str) -> None:
    """Adds HTML."""
    self.body.extend(parts)

  def add_box(self, paragraphs: Iterable[str], kind: str) -> None:
    """Adds paragraphs of text in a coloured box: "warn" or "say"."""
    inner = "".join(f"<p>{html.escape(text)}</p>" for text in paragraphs)
    if inner:
      self.add(f'<div class="{kind}">{inner}</div>')

  def add_small(self, text: str) -> None:
    """Adds a paragraph of HTML in small type."""
    self.add(f'<p class="small">{text}</p>')

  def add_figure(self, figure: Figure | None, name: str, caption: str) -> None:
    """Saves a figure as name.png and adds it, if there is one."""
    if figure is None:
      return
    path = self.out / f"{name}.png"
    # The layout leaves no room for titles and legends that are wider than the
    # figure, so the picture is cut around all that is drawn.
    figure.draw_without_rendering()
    box = figure.get_tightbbox().padded(0.1)
    figure.savefig(path, bbox_inches=box)
    data = base64.b64encode(path.read_bytes()).decode()
    caption = html.escape(caption)
    # Pixels by inches give text the same size in all figures.
    width = round(96 * box.width)
    self.add(
      f'<figure><img width="{width}" alt="{caption}" '
      f'src="data:image/png;base64,{data}">'
      f"<figcaption>{caption}</figcaption></figure>"
    )


@dataclasses.dataclass
class _Task:
  """What the sections of a task show.

  Attributes:
    name: of the task.
    sides: runs by side.
    different: config fields in which each side differs from the first one.
    has_results: whether any run was evaluated.
    metrics: by which the task is judged.
    probes: kinds of retrieval that were evaluated.
    pairs: (baseline, side) runs of each side other than the baseline.
    aim: the comparison's `aimed_interval`.
    summary: the task's part of summary.json.
  """

  name: str
  sides: dict[str, list[Run]]
  different: dict[str, dict[str, tuple[Any, Any]]]
  aim: float | None
  summary: dict[str, Any]

  def __post_init__(self):
    finals = [r.final for runs in self.sides.values() for r in runs if r.final]
    self.has_results = bool(finals)
    self.metrics = metrics_of(finals)
    self.probes = probes_of(finals)
    self.pairs = paired_runs(self.sides)


def _compose(
  title: str, folders, tasks, different, colors, out: Path
) -> tuple[str, dict]:
  """The page and the summary; saves the figures in `out`."""
  page = _Page(out, colors)
  _add_head(page, title, folders, tasks)
  aim = aimed_interval(folders)
  for name, sides in tasks.items():
    summary = page.summary["tasks"][name] = {}
    task = _Task(name, sides, different[name], aim, summary)
    for section in (
      _add_gaps,
      _add_results,
      _add_choice_tables,
      _add_curves,
      _add_positions,
      _add_distances,
      _add_layer_figures,
      _add_layer_tables,
      _add_samples,
      _add_differences,
    ):
      section(page, task)
  _add_speed(page, folders)
  _add_environment(page, tasks)
  page.add(_WORDS)
  made = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
  page.add_small(f"Report written {made}.")
  body = "".join(page.body)
  return _PAGE.format(title=html.escape(title), body=body), page.summary


def _add_head(page: _Page, title: str, folders, tasks) -> None:
  """Title, warnings and overview."""
  page.add(
    f"<h1>{html.escape(title)}</h1>",
    "<p>Language models (the sides) that differ in their attention only, "
    "trained on the same batches from the same seeds.</p>",
  )
  page.summary["warnings"] = find_warnings(tasks, *folders)
  page.add_box(page.summary["warnings"], "warn")
  page.add_figure(
    overview_figure(tasks, page.colors),
    "overview",
    f"Overview. {_line_widths([*tasks.values()])}",
  )


def _add_gaps(page: _Page, task: _Task) -> None:
  """The setting, and in words what each side's gap shows."""
  page.add(f"<h2>Task: {html.escape(task.name)}</h2>")
  setting = _setting([r for runs in task.sides.values() for r in runs])
  page.add(f"<p>{html.escape(setting)}</p>")
  gaps: dict[str, list[dict]] = {}
  words = []
  for side, pairs in task.pairs.items():
    gaps[side] = [paired_gap(pairs, metric) for metric in task.metrics]
    words += [
      verdict(side_name(side), side_name(BASELINE), metric, found, i > 0)
      for i, (metric, found) in enumerate(zip(task.metrics, gaps[side]))
    ]
  words += _aim_words(gaps, task.aim)
  words += _window_words(task.sides)
  for probe in task.probes:
    words += _recall_words(task.sides, probe)
  page.add_box(words, "say")
  task.summary |= {"verdicts": words, "gaps": gaps}
  text = (
    "Side minus baseline after training, paired by seed: the mean with its 95 %"
    " t-interval, the standard deviation of the seeds' differences with its own"
    " 95 % interval, and the difference of each seed."
  )
  if task.aim is not None:
    text += (
      " The number of seeds is that with which an interval of the aimed width"
      " is reached, if the standard deviation is the one shown. From few seeds"
      " that is a rough guess, as its interval says."
    )
  _add_table(
    page,
    task,
    "differences_by_seed",
    "Differences by seed",
    tables.gap_rows(gaps, task.metrics, task.aim),
    text,
  )


def _add_results(page: _Page, task: _Task) -> None:
  """Results, speed and size of each side."""
  table = tables.performance_rows(task.sides, task.metrics)
  page.add("<h3>Results, speed and size</h3>", _rows(table))
  page.add_small(
    "± is the standard deviation over seeds. Tokens/s is the median over log "
    "intervals of each phase, without the first, which holds the compilation; "
    "in brackets the quartiles. "
    + html.escape(
      " ".join([*_unlike_speeds(task.name, task.sides), *_notes(task.sides)])
    )
  )
  task.summary |= {
    "table": table,
    "differences": {
      side: {field: list(values) for field, values in fields.items()}
      for side, fields in task.different.items()
    },
    "final": {
      side: {run.seed: run.final for run in runs if run.finished}
      for side, runs in task.sides.items()
    },
  }


def _add_table(
  page: _Page,
  task: _Task,
  key: str,
  title: str,
  rows: tables.Rows,
  text: str,
) -> None:
  """A table with a title and a small text, which the summary holds too."""
  if rows:
    page.add(f"<h3>{title}</h3>", _rows(rows))
    page.add_small(text)
    task.summary[key] = rows


def _add_choice_tables(page: _Page, task: _Task) -> None:
  """What choosing blocks costs, and the ablations."""
  dense = tables.dense_rows(task.sides, task.metrics)
  oracle = (
    " With the oracle's blocks, each query reads the blocks with the most dense"
    " attention, as many as the index chooses: what is lost then is lost"
    " because there are so few blocks, and the rest because the index chooses"
    " other ones."
  )
  if not any("oracle" in column for row in dense for column in row):
    oracle = ""
  names = [row["side"] for row in dense]
  if len(set(names)) < len(names):
    oracle += (
      " Where a side has two rows, the second is of those of its seeds that"
      " were evaluated in every way."
    )
  _add_table(
    page,
    task,
    "dense",
    "What choosing blocks costs after training",
    dense,
    "The final weights with sparse attention, as they were trained, and with "
    "dense attention, for which they were not trained. Where only the first is "
    "worse than GQA, the choice of blocks may be the reason; where both are "
    "worse, it is not." + oracle,
  )
  _add_table(
    page,
    task,
    "window",
    "What tokens far back give",
    tables.window_rows(task.sides),
    "Held-out loss (nats for each token) of the final weights with the whole "
    "context → with its last tokens alone, by how many tokens come before. The "
    "difference is what the model takes from tokens farther back.",
  )
  _add_table(
    page,
    task,
    "by_choice",
    "Answers by what each layer chose",
    tables.choice_rows(task.sides, task.probes),
    "Facts beyond the local block, after training: how many lie in a block "
    "that some group of the layer chose for the asking token, and how many of "
    "those and of the others are answered right. If the others are answered "
    "worse, the model may look facts up in this layer. Another reason may be "
    "that they are farther away.",
  )
  _add_table(
    page,
    task,
    "ablations",
    "Ablations",
    tables.ablation_rows(task.sides, task.metrics),
    "Gaps are paired by seed, with a 95 % t-interval if there is more than "
    "one. The paper's findings are from much larger models.",
  )


def _add_curves(page: _Page, task: _Task) -> None:
  """Each metric during training, and its gap."""
  page.add("<h3>Figures</h3>")
  spread, band = _line_widths([task.sides]), ""
  if any(len(pairs) > 1 for pairs in task.pairs.values()):
    band = " The band is the Student-t 95 % interval of the mean at each step."
  about = task.name, task.sides, page.colors
  page.add_figure(
    train_figure(*about),
    f"{task.name}_train_loss",
    "Loss on the training batch of each logged step, without the KL."
    f" {spread} The vertical axis shows the values after the first quarter.",
  )
  for metric in task.metrics if task.has_results else ():
    name = f"{task.name}_{metric.key}"
    cut = " The vertical axis shows the values after the first quarter."
    more = spread if metric.higher_is_better else spread + cut
    page.add_figure(
      curves(*about, metric, "step"),
      f"{name}_steps",
      f"{metric.title} on the same held-out tokens. {more}",
    )
    page.add_figure(
      curves(*about, metric, "seconds"),
      f"{name}_time",
      "The same against wall time on this device, including that of the run "
      f"from which a side started. {more}",
    )
    page.add_figure(
      gap_figure(*about, metric),
      f"{name}_gap",
      "Side minus baseline, paired by seed on the same held-out tokens." + band,
    )


def _add_positions(page: _Page, task: _Task) -> None:
  """Loss by the number of tokens before the query."""
  bins = gaps_by_position(task.pairs)
  page.add_figure(
    position_figure(task.name, task.sides, page.colors, bins),
    f"{task.name}_position",
    "Loss on held-out text by how many tokens of the context come before. "
    "Differences are paired by seed, and their mean is over the seeds of the "
    "side; thin lines are single seeds. Left, each side is drawn at "
    f"{side_name(BASELINE)}'s mean plus its own mean difference. "
    "A query with fewer tokens before it than “tokens read” reads them all, so "
    "a gap there does not come from the choice of blocks. Dashed: the same "
    "weights with dense attention. Bins with less than 1 % of the targets are "
    "left out.",
  )
  if bins:
    task.summary["loss_by_position"] = bins


def _add_distances(page: _Page, task: _Task) -> None:
  """Right answers of each probe by distance and by number."""
  for probe in task.probes:
    chance = chance_of(next(iter(task.sides.values()))[0], probe.name)
    page.add_figure(
      distance_figure(task.name, task.sides, page.colors, probe),
      f"{task.name}_{probe.prefix}distance",
      "Distance is the number of tokens from the question back to the fact. "
      "Beyond the mark “local block” a fact is never in the blocks that are "
      "always read; “tokens read” is how many a query reads in a sparse layer. "
      "Dashed: the same weights with the oracle's blocks. Bins with less than "
      "1 % of the answers are left out.",
    )
    for key in (probe.by_distance, probe.by_number):
      found = {
        f"{side}{' oracle' * oracle}": answer_gaps(pairs, key, oracle)
        for side, pairs in task.pairs.items()
        for oracle in (False, True)
      }
      found = {side: bins for side, bins in found.items() if bins}
      what = NUMBERS.get(probe.name, "number")
      if rows := tables.answer_rows(found, chance, what):
        page.add(_rows(rows))
        page.add_small(
          "± is the standard error of a difference between answers to "
          "different facts. The sides are asked for the same facts, so the "
          "true error is smaller."
        )
      if found or key == probe.by_distance:
        task.summary[key] = found


def _add_layer_figures(page: _Page, task: _Task) -> None:
  """Recalls of each layer, and the blocks that it chooses."""
  for side, runs in task.sides.items():
    page.add_figure(
      layers_figure(task.name, side, runs),
      f"{task.name}_{side}_layers",
      "Index branch of each layer during training, mean over seeds. In the "
      "warm-up (grey) the KL is over all visible tokens, later over the chosen "
      "blocks, so the two parts of its curve are different quantities.",
    )
    page.add_figure(
      selection_figure(task.name, side, runs),
      f"{task.name}_{side}_blocks",
      "Colour: the share of a query block's queries that chose a key block, "
      "on a held-out batch after training. Grey: blocks in the future.",
    )


def _add_layer_tables(page: _Page, task: _Task) -> None:
  """Recalls of each layer after training, and how much neighbours share."""
  found = tables.layer_rows(task.sides)
  text = "On a held-out batch after training, mean over finished seeds."
  if found and "best score recall" in found[0]:
    text += (
      " The best score recall is that of the blocks with the most attention, "
      "as many as the index chooses; no choice holds more. If it is far below "
      "1, attention is too spread out for so few blocks, or the heads of a "
      "group, which share a choice, attend to different blocks. An index that "
      "must choose a query's own block can fall slightly short of the best."
    )
  _add_table(
    page,
    task,
    "layers",
    "How much of attention the chosen blocks hold",
    found,
    text,
  )
  _add_table(
    page,
    task,
    "sharing",
    "How much neighbouring queries share",
    tables.sharing_rows(task.sides),
    "On held-out text after training, over queries that see more than twice "
    "as many blocks as they choose. union8: distinct blocks that 8 neighbours "
    "choose. first block, previous block: share of the queries that choose "
    "block 0, and the block before their own. kept: share of a query's blocks "
    "that the query four blocks later chooses too.",
  )


def _add_samples(page: _Page, task: _Task) -> None:
  """What the models write."""
  _add_table(
    page,
    task,
    "samples",
    "Samples",
    tables.sample_rows(task.sides),
    "Held-out texts, the first half of which is the prompt: what follows it in "
    "the text, and what the final weights of each side's first seed write, "
    "always taking the likeliest token.",
  )


def _of_index(field: str) -> bool:
  """Whether a config's field is about the Index Branch alone."""
  return field.startswith(("model.index", "optimizer.index_", "recipe"))


def _without_index(config: dict, prefix: str = "") -> dict:
  """A run's config without the fields of the Index Branch."""
  return {
    name: _without_index(value, f"{prefix}{name}.")
    if isinstance(value, dict)
    else value
    for name, value in config.items()
    if not _of_index(prefix + name)
  }


def _add_differences(page: _Page, task: _Task) -> None:
  """The config fields in which the sides differ, and the whole first config."""
  different = task.different

  def value(field: str, side: str) -> str:
    if _of_index(field) and not task.sides[side][0].uses_msa:
      return "–"
    if field in different[side]:
      return json.dumps(different[side][field][1])
    # A side that does not differ in a field has the first side's value.
    found = (d[field][0] for d in different.values() if field in d)
    return json.dumps(next(found))

  fields = sorted({field for own in different.values() for field in own})
  page.add(
    "<h3>What the sides' configs differ in</h3>",
    _table(
      ["field", *map(side_name, task.sides)],
      [
        [field, *(value(field, side) for side in task.sides)]
        for field in fields
      ],
    ),
  )
  page.add_small(
    "All other fields are equal; runs that differ in anything but attention "
    "are refused."
  )
  first = next(iter(task.sides))
  run = task.sides[first][0]
  shown = run.config if run.uses_msa else _without_index(run.config)
  config = json.dumps(shown, indent=2)
  page.add(
    f"<details><summary>Config of {html.escape(side_name(first))}"
    f"</summary><pre>{html.escape(config)}</pre></details>"
  )


def _add_speed(page: _Page, folders: Sequence[Path]) -> None:
  """Step times by context, from the first folder with a speed.json."""
  paths = [folder / "speed.json" for folder in folders]
  path = next((path for path in paths if path.exists()), None)
  if path is None:
    return
  speed = page.summary["speed"] = json.loads(path.read_text())
  page.add(
    "<h2>Speed of a training step</h2>",
    _rows(tables.speed_rows(speed["rows"])),
  )
  page.add_figure(
    speed_figure(speed["rows"], page.colors),
    "speed",
    "All steps have equally many tokens. Weights are trained ones where the "
    "table gives trained steps; MSA's times depend on how much the choices of "
    "neighbouring queries have in common. MFU counts the operations that each "
    "side needs at least, which are fewer for MSA. Memory is what the compiler "
    "plans. "
    "{device}, {started}, {command}".format(**speed),
  )


def _add_environment(page: _Page, tasks: dict[str, dict[str, list[Run]]]):
  """Devices, versions, commands and data of the runs."""
  runs = [r for sides in tasks.values() for rs in sides.values() for r in rs]
  environment = page.summary["environment"] = dict(_environment(runs))
  table = _table(["what", "value"], environment.items())
  page.add("<h2>How it was run</h2>", f'<div class="env">{table}</div>')
