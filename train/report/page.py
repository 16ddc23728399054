"""Report of a comparison: one HTML file, its PNGs and a summary.json.

Everything is read from the run folders, so a report can be written again at
any time, also while runs are going on.
"""

import base64
import contextlib
import datetime
import fcntl
import html
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from train.report import tables
from train.report.figures import (
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
)
from train.report.runs import (
  BASELINE,
  Metric,
  Probe,
  Run,
  chance_of,
  check_comparable,
  check_runs,
  flatten,
  gaps_by_distance,
  gaps_by_position,
  group_by_side,
  metrics_of,
  paired_gap,
  paired_runs,
  planned_runs,
  probes_of,
  read_runs,
  recall_beyond,
  speeds,
  token_budget,
)

__all__ = ["check_comparable", "write"]


def verdict(
  name: str, base: str, metric: Metric, found: dict, short: bool = False
) -> str:
  """What a gap shows and what it does not, in words; short: its size only."""
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


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
  def line(cells, tag):
    inner = (f"<{tag}>{html.escape(str(c))}</{tag}>" for c in cells)
    return "<tr>" + "".join(inner) + "</tr>"

  body = "".join(line(row, "td") for row in rows)
  return f'<div class="wide"><table>{line(header, "th")}{body}</table></div>'


def _rows(rows: tables.Rows) -> str:
  return _table(list(rows[0]), [list(row.values()) for row in rows])


def _recall_words(sides: dict[str, list[Run]], probe: Probe) -> Iterable[str]:
  """Is each side ahead of chance where the local block cannot help."""
  reach, parts = token_budget(sides), []
  chance = chance_of(next(iter(sides.values()))[0])
  for side, runs in sides.items():
    found = recall_beyond(runs, reach[0], probe) if reach and chance else None
    if found and chance:
      accuracy, count = found
      ahead = accuracy > chance + 3 * math.sqrt(chance * (1 - chance) / count)
      parts.append(
        f"{side_name(side)} answers {100 * accuracy:.1f} % of {count:,} "
        + ("(ahead of chance)" if ahead else "(not told from chance)")
      )
  if parts and reach and chance:
    yield (
      (f"{probe.name.capitalize()}: facts" if probe.name else "Facts")
      + f" {reach[0]} or more tokens back, beyond the local block: "
      f"{', '.join(parts)}. Chance is {100 * chance:.1f} %; ahead means by "
      "more than three standard errors."
    )


def _setting(runs: list[Run]) -> str:
  """Size of the model and of the training, the same for every side."""
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
  """What is not equal between the sides by design."""
  size = {
    side: runs[0].environment.get("parameters") for side, runs in sides.items()
  }
  base = size.get(BASELINE)
  for side, runs in sides.items():
    name, own = side_name(side), size[side]
    if base and own and side != BASELINE:
      extra = own["total"] - base["total"]
      yield (
        f"{name} has {extra:,} parameters more than {side_name(BASELINE)} "
        f"({100 * extra / base['total']:+.2f} %): the projections of "
        "its index branch."
        if extra
        else f"{name} has as many parameters as {side_name(BASELINE)}."
      )
    if start := runs[0].get("recipe.init_from"):
      place = Path(start)
      yield (
        f"{name} goes on from step {runs[0].get('recipe.init_step')} of "
        f"{place.parent.name}/{place.name}, each seed from its own; its wall "
        "time counts its own steps only."
      )


# Seeds timed alike differ by less; one that had the device alone and one that
# shared it by more. Seeds that all shared it are not found out.
_ALIKE = 1.3


def find_warnings(tasks: dict[str, dict[str, list[Run]]], folder: Path) -> list:
  """What a reader must know before trusting the page."""
  words = []
  every = [r for sides in tasks.values() for rs in sides.values() for r in rs]
  for task, side, seed in planned_runs(folder, every):
    if seed not in [r.seed for r in tasks.get(task, {}).get(side, [])]:
      words.append(f"{task}/{side}/seed{seed} is missing: it is not counted.")
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
    for side, runs in sides.items():
      unlike = max((max(v) / min(v) for v in speeds(runs).values()), default=1)
      if unlike > _ALIKE:
        words.append(
          f"{task}/{side}: tokens/s of its seeds differ by up to"
          f" {unlike:.1f}x: the device was not theirs alone, or not the same."
          " Their wall times and tokens/s are no measure of speed."
        )
  for run in every:
    if run.broken and not run.finished:
      words.append(
        f"{run.label} broke down at step {run.broken['step']}"
        f" ({run.broken['why']}): it is in no mean and no gap."
      )
    elif not run.finished:
      at = run.rows["train"][-1]["step"] if run.rows["train"] else 0
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
  """Where and how the runs were made; a value is given once."""
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


def write(comparison_folder: Path) -> Path:
  """Writes report/report.html, its PNGs and summary.json.

  The folder is made aside and moved into place whole. Missing and unfinished
  runs are named in the page and left out of means and gaps.

  Args:
    comparison_folder: holds <task>/<side>/seed<k>/ run folders.

  Returns:
    The path of report.html.

  Raises:
    ValueError: no runs, runs that may not be compared, or a broken file.
  """
  folder = Path(comparison_folder)
  tasks: dict[str, dict[str, list[Run]]] = {}
  different = {}
  runs = read_runs(folder)
  for task in dict.fromkeys(r.task for r in runs):
    members = [r for r in runs if r.task == task]
    different[task] = check_runs(members)
    tasks[task] = group_by_side(members)
  names = dict.fromkeys(r.side for r in runs)
  colors = side_colors(names)

  final = folder / "report"
  with _alone(folder):
    for stale in folder.glob(".report-*"):  # of a killed process
      shutil.rmtree(stale, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=".report-", dir=folder))
    try:
      temporary.chmod(0o755)
      with matplotlib.rc_context(STYLE):
        page, summary = _compose(folder, tasks, different, colors, temporary)
      (temporary / "report.html").write_text(page)
      (temporary / "summary.json").write_text(
        json.dumps(_finite(summary), indent=2, allow_nan=False) + "\n"
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
  """JSON has no NaN: null instead."""
  if isinstance(value, dict):
    return {k: _finite(v) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return [_finite(v) for v in value]
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


def _line_widths(tasks: Sequence[dict[str, list[Run]]]) -> str:
  """What thin and thick lines are in figures of these tasks' sides."""
  sides = [runs for members in tasks for runs in members.values()]
  if any(len(runs) > 1 for runs in sides):
    return "Thin lines are single seeds, thick lines the mean."
  # `figures` draws the baseline so.
  wider = f" {side_name(BASELINE)} is wider, to show below the others."
  return "One seed a side." + wider * any(BASELINE in m for m in tasks)


def _compose(folder, tasks, different, colors, out: Path) -> tuple[str, dict]:
  """The page and the summary; saves the figures in `out`."""
  body: list[str] = []
  summary: dict[str, Any] = {"tasks": {}}

  def paragraphs(words: Iterable[str], kind: str) -> None:
    words = list(words)
    if words:
      inner = "".join(f"<p>{html.escape(w)}</p>" for w in words)
      body.append(f'<div class="{kind}">{inner}</div>')

  def add(figure: Figure | None, name: str, caption: str) -> None:
    if figure is None:
      return
    figure.savefig(out / f"{name}.png")
    data = base64.b64encode((out / f"{name}.png").read_bytes()).decode()
    caption = html.escape(caption)
    width = round(96 * figure.get_figwidth())  # the same type size in all
    body.append(
      f'<figure><img width="{width}" alt="{caption}" '
      f'src="data:image/png;base64,{data}">'
      f"<figcaption>{caption}</figcaption></figure>"
    )

  def section(task: str, key: str, title: str, rows: tables.Rows, text: str):
    """A table with a title and a small text, kept in the summary too."""
    if rows:
      body.append(f"<h3>{title}</h3>")
      body.append(_rows(rows))
      body.append(f'<p class="small">{text}</p>')
      summary["tasks"][task][key] = rows

  title = f"{folder.resolve().name}: MSA against GQA"
  body.append(f"<h1>{html.escape(title)}</h1>")
  body.append(
    "<p>Language models that differ in their attention only, trained on the "
    "same batches from the same seeds.</p>"
  )
  summary["warnings"] = find_warnings(tasks, folder)
  paragraphs(summary["warnings"], "warn")
  add(
    overview_figure(tasks, colors),
    "overview",
    f"Overview. {_line_widths([*tasks.values()])}",
  )
  for task, sides in tasks.items():
    finals = [r.final for rs in sides.values() for r in rs if r.final]
    body.append(f"<h2>Task: {html.escape(task)}</h2>")
    setting = _setting([r for members in sides.values() for r in members])
    body.append(f"<p>{html.escape(setting)}</p>")
    metrics = metrics_of(finals)
    against = paired_runs(sides)
    gaps: dict[str, list[dict]] = {}
    words = []
    for side, pairs in against.items():
      gaps[side] = [paired_gap(pairs, m) for m in metrics]
      words += [
        verdict(side_name(side), side_name(BASELINE), m, found, i > 0)
        for i, (m, found) in enumerate(zip(metrics, gaps[side]))
      ]
    probes = probes_of(finals)
    for probe in probes:
      words += _recall_words(sides, probe)
    paragraphs(words, "say")
    table = tables.performance_rows(sides, metrics)
    body.append("<h3>Results, speed and size</h3>")
    body.append(_rows(table))
    body.append(
      '<p class="small">± is the standard deviation over seeds. Tokens/s is '
      "the median over log intervals of each phase, without the first, which "
      "holds the compilation. " + html.escape(" ".join(_notes(sides))) + "</p>"
    )
    summary["tasks"][task] = {
      "verdicts": words,
      "gaps": gaps,
      "table": table,
      "differences": {
        s: {f: list(v) for f, v in d.items()}
        for s, d in different[task].items()
      },
      "final": {
        s: {r.seed: r.final for r in rs if r.finished}
        for s, rs in sides.items()
      },
    }
    section(
      task,
      "dense",
      "What choosing blocks costs after training",
      tables.dense_rows(sides, metrics),
      "The last weights as they were trained, and with dense attention, for "
      "which they were not trained. What the first lacks alone, the choice may "
      "miss; what both lack is not of the choice.",
    )
    section(
      task,
      "by_choice",
      "Answers by what each layer chose",
      tables.choice_rows(sides, probes),
      "Of facts beyond the local block, after training: how many lie in a "
      "block that some group of the layer chose for the asking token, and how "
      "many are answered where it did and where it did not. Where a layer's "
      "misses cost answers, facts may be looked up there; those it misses may "
      "also be the farther ones.",
    )
    section(
      task,
      "ablations",
      "Ablations",
      tables.ablation_rows(sides, metrics),
      "Gaps are paired by seed, with a 95 % t-interval where there is more "
      "than one; the paper's are at another scale.",
    )
    spread, band = _line_widths([sides]), ""
    if any(len(pairs) > 1 for pairs in against.values()):
      band = (
        " The band is the Student-t 95 % interval of the mean at each step."
      )
    body.append("<h3>Figures</h3>")
    for metric in metrics if finals else []:
      name = f"{task}_{metric.key}"
      cut = " The vertical axis is cut to what comes after the first quarter."
      more = spread if metric.higher_is_better else spread + cut
      add(
        curves(task, sides, colors, metric, "step"),
        f"{name}_steps",
        f"{metric.title} on the same held-out tokens. {more}",
      )
      add(
        curves(task, sides, colors, metric, "seconds"),
        f"{name}_time",
        "The same against wall time on this device, that of the run a side "
        f"started from included. {more}",
      )
      add(
        gap_figure(task, sides, colors, metric),
        f"{name}_gap",
        "Side minus baseline, paired by seed on the same held-out tokens."
        + band,
      )
    places = gaps_by_position(against)
    add(
      position_figure(task, sides, colors, places),
      f"{task}_position",
      "Loss on held-out text by how many tokens of the context come before, "
      "mean over the seeds that all sides measured, thin lines single ones. "
      "A query with fewer before it than “tokens read” reads them all: a gap "
      "there is not of the choice. Dashed: the same weights with dense "
      "attention. Places with less than 1 % of the targets are left out.",
    )
    if places:
      summary["tasks"][task]["loss_by_position"] = places
    for probe in probes:
      add(
        distance_figure(task, sides, colors, probe),
        f"{task}_{probe.prefix}distance",
        "Distance is how many tokens the fact lies before its question. Beyond "
        "the mark “local block” a fact is never in the blocks that are always "
        "read; “tokens read” is how many one query reads in a sparse layer.",
      )
      distances = {
        side: gaps_by_distance(pairs, probe) for side, pairs in against.items()
      }
      if rows := tables.distance_rows(distances):
        body.append(_rows(rows))
        body.append(
          '<p class="small">± is the standard error of a difference between '
          "two sets of answers; the sides are asked for the same facts, so the "
          "true one is smaller.</p>"
        )
      summary["tasks"][task][f"{probe.prefix}by_distance"] = distances
    for side, runs in sides.items():
      add(
        layers_figure(task, side, runs),
        f"{task}_{side}_layers",
        "Index branch of each layer during training, mean over seeds. Grey: "
        "warm-up, where the KL is over all visible tokens; after it, over "
        "the chosen blocks, so the KL's two parts are different quantities.",
      )
      add(
        selection_figure(task, side, runs),
        f"{task}_{side}_blocks",
        "Colour: the share of a query block's queries that chose a key block, "
        "on a held-out batch after training. Grey: blocks in the future.",
      )
    found = tables.layer_rows(sides)
    text = "On a held-out batch after training, mean over finished seeds."
    if found and "best score recall" in found[0]:
      text += (
        " Best: what the blocks with the most attention hold, as many as the "
        "index picks; no choice holds more. Far below 1 it tells of "
        "attention too spread out for so few blocks, or of heads that want "
        "different ones and share a choice. An index that must pick a "
        "query's own block can fall slightly short of it."
      )
    section(
      task,
      "layers",
      "How much of attention the chosen blocks hold",
      found,
      text,
    )
    section(
      task,
      "sharing",
      "How much neighbouring queries share",
      tables.sharing_rows(sides),
      "Of held-out text after training, queries that see more than twice the "
      "blocks they choose. union8: distinct blocks that 8 neighbours choose; "
      "first, previous: share of the queries that choose block 0, the block "
      "before their own; kept: share of a query's blocks that the query four "
      "blocks later chooses.",
    )
    fields = sorted({f for d in different[task].values() for f in d})
    body.append("<h3>What the sides' configs differ in</h3>")
    body.append(
      _table(
        ["field", *map(side_name, sides)],
        [
          [
            f,
            *(
              json.dumps(
                different[task][s][f][1]
                if f in different[task][s]
                else next(d[f][0] for d in different[task].values() if f in d)
              )
              for s in sides
            ),
          ]
          for f in fields
        ],
      )
      + '<p class="small">All other fields are equal; runs that differ in '
      "anything but attention are refused.</p>"
    )
    config = json.dumps(next(iter(sides.values()))[0].config, indent=2)
    body.append(
      f"<details><summary>Config of {html.escape(side_name(next(iter(sides))))}"
      f"</summary><pre>{html.escape(config)}</pre></details>"
    )
  speed = folder / "speed.json"
  if speed.exists():
    summary["speed"] = json.loads(speed.read_text())
    body.append("<h2>Speed of a training step</h2>")
    body.append(_rows(tables.speed_rows(summary["speed"]["rows"])))
    add(
      speed_figure(summary["speed"]["rows"], colors),
      "speed",
      "Steps of equally many tokens at each context, of the models after "
      "training where trained steps are given: how much neighbours share their "
      "choices moves MSA's times. MFU counts what each side cannot do without, "
      "so MSA's is of fewer operations. Memory is what the compiler plans. "
      "{device}, {started}, {command}".format(**summary["speed"]),
    )
  body.append("<h2>How it was run</h2>")
  runs = [r for sides in tasks.values() for rs in sides.values() for r in rs]
  summary["environment"] = dict(_environment(runs))
  table = _table(["what", "value"], summary["environment"].items())
  body.append(f'<div class="env">{table}</div>')
  body.append(_WORDS)
  made = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
  body.append(f'<p class="small">Report written {made}.</p>')
  return _PAGE.format(title=html.escape(title), body="".join(body)), summary
