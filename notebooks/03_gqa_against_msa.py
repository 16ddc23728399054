# %% [markdown]
# # GQA against MSA: quality and speed
#
# *GQA* is the usual dense attention (grouped queries: several query heads share
# a key/value head). *MSA* reads only a few blocks of earlier tokens, which a
# small *Index Branch* chooses for each query. Two questions decide whether MSA
# is worth it: is a model that was trained with it as good, and how much time
# does it save?
#
# This notebook trains and measures nothing. It draws every comparison that is
# committed in `train/results/` and every measurement in `benchmarks/results/`.
# Run it again when there are more of them.

# %%
import json
import pathlib

import matplotlib.pyplot as plt

import train
from benchmarks import cases, records
from train.report import figures, gaps, runs, tables
from train.report.page import verdict

# Load the backend now: display() shows a figure as a picture only after that.
plt.switch_backend(plt.get_backend())
plt.rcParams.update(figures.STYLE)

# %%
COMPARISONS = pathlib.Path(train.__file__).parent / "results"
MEASUREMENTS = records.FOLDER

# %% [markdown]
# ## What was trained
#
# A comparison has one or more tasks, and each task has several *sides*, such as
# GQA and MSA. All sides of a task see the same batches, and with the same seed
# they start from the same weights. They may differ in attention and its recipe
# only; the first lines below refuse runs that differ in anything else. Sides
# are named:
#
# * **MSA**: trained from scratch. At first it attends densely (*warm-up*) while
#   the Index Branch learns to follow attention; then it attends sparsely.
# * **MSA CPT**: starts from a checkpoint of the GQA run and then does the same.
#   The checkpoint is from half of the steps in `parity` and from 85 % of them
#   in `lm73m_16k` and `lm13m_4k`.
# * Other names belong to **ablations**: MSA with one thing changed.

# %%
comparisons = {}
for folder in sorted(COMPARISONS.iterdir()):
  if not (folder / "comparison.json").exists():
    continue
  members = runs.read_runs(folder)
  tasks = {
    task: [run for run in members if run.task == task]
    for task in dict.fromkeys(run.task for run in members)
  }
  for task in tasks.values():
    runs.check_runs(task)
  comparisons[folder.name] = {
    task: runs.group_by_side(found) for task, found in tasks.items()
  }

sides = dict.fromkeys(
  side
  for tasks in comparisons.values()
  for found in tasks.values()
  for side in found
)
# The comparisons that have a baseline; one folder holds MSA's runs alone.
paired = {
  name: tasks
  for name, tasks in comparisons.items()
  if all(runs.BASELINE in found for found in tasks.values())
}
# The comparisons of MSA as it is; ablations have their own table below.
methods = {
  name: tasks
  for name, tasks in paired.items()
  if not any(
    tables.ablation(side) for found in tasks.values() for side in found
  )
}
# A side has the same colour everywhere. MSA and MSA CPT get the clearest ones.
colors = figures.side_colors(
  sorted(sides, key=lambda side: tables.ablation(side) is not None)
)

for name, tasks in comparisons.items():
  print(name)
  for task, found in tasks.items():
    run = next(iter(found.values()))[0]
    size = run.environment["parameters"]["total"]
    print(
      f"  {task}: {', '.join(map(figures.side_name, found))};"
      f" {size / 1e6:.2f}M parameters, {run.final['tokens'] / 1e6:.1f}M tokens"
      f" in contexts of {run.get('context'):,}, on {run.environment['device']}"
    )
    if budget := runs.token_budget(found):
      print(
        f"    a sparse query reads {budget[1]:,} of those tokens, the nearest"
        f" {budget[0]} of them always"
      )

# %% [markdown]
# ## Quality at a glance
#
# Thin lines are single seeds and thick lines their mean. The loss is that of
# held-out text; lower is better, and the axis is cut to the later part of
# training. If a task asks for facts that were stated earlier, the share of
# right answers is drawn against the distance back to the fact. Beyond the mark
# *local block*, a sparse model can answer only if its Index Branch chose the
# block of the fact.

# %%
for name, tasks in paired.items():
  figure = figures.overview_figure(tasks, colors)
  figure.suptitle(f"comparison “{name}”")
  display(figure)

# %% [markdown]
# ## The gap, with its uncertainty
#
# Each line is one side against GQA. A dot is a seed (the same seed on both
# sides), a diamond is their mean, and the bar is the 95 % interval of the mean.
# **On the green ground the side is better than GQA.** If a bar crosses 0, these
# runs show no difference, which does not prove that there is none. A single
# seed has no bar. Ablations have a table further below.

# %%
# (title, unit) -> (label, side, metric, gap, whether in short)
by_metric = {}
for name, tasks in methods.items():
  for task, found in tasks.items():
    finals = [r.final for members in found.values() for r in members if r.final]
    for index, metric in enumerate(runs.metrics_of(finals)):
      for side, pairs in gaps.paired_runs(found).items():
        if pairs:
          gap = gaps.paired_gap(pairs, metric)
          label = f"{name}, {task}:\n{figures.side_name(side)}"
          found_gaps = by_metric.setdefault((metric.title, metric.gap_unit), [])
          found_gaps.append((label, side, metric, gap, index > 0))

for (title, unit), found_gaps in by_metric.items():
  figure, axes = plt.subplots(
    figsize=(8, 1.3 + 0.62 * len(found_gaps)), layout="constrained"
  )
  for y, (_, side, metric, gap, _) in enumerate(found_gaps):
    color = colors[side]
    values = [metric.scale * value for value in gap["values"]]
    axes.plot(values, [y] * len(values), "o", color=color, alpha=0.5, ms=6)
    axes.plot(metric.scale * gap["mean"], y, "D", color=color, ms=9)
    if gap["interval"]:
      axes.plot(
        [metric.scale * x for x in gap["interval"]], [y, y], color=color, lw=2.5
      )
  axes.axvline(0, color="black", lw=1.2)
  low, high = axes.get_xlim()
  better = (0, max(high, 0)) if metric.higher_is_better else (min(low, 0), 0)
  axes.axvspan(*better, color="#e3f4ea", zorder=0)
  axes.set_xlim(low, high)
  axes.set_yticks(range(len(found_gaps)), [label for label, *_ in found_gaps])
  axes.set_ylim(len(found_gaps) - 0.5, -0.5)
  axes.set_xlabel(f"side − GQA ({unit})")
  axes.set_title(f"{title}: gap to GQA after training")
  plt.show()

# %% [markdown]
# The same in the words of the report:

# %%
for found_gaps in by_metric.values():
  for label, side, metric, gap, short in found_gaps:
    base = figures.side_name(runs.BASELINE)
    sentence = verdict(figures.side_name(side), base, metric, gap, short)
    print(label.split(":")[0] + ":", sentence, "\n")

# %% [markdown]
# ## How the gap came about
#
# The same gap during training. In its warm-up MSA attends densely. Its Index
# Branch learns but does not change the model's output, so the gap is 0, except
# that in bfloat16 small differences of rounding grow. The gap opens when the
# side goes sparse.

# %%
for name, tasks in methods.items():
  for task, found in tasks.items():
    finals = [r.final for members in found.values() for r in members if r.final]
    metric = runs.metrics_of(finals)[0]
    figure = figures.gap_figure(f"{name}, {task}", found, colors, metric)
    if figure is not None:
      display(figure)

# %% [markdown]
# ## Where in the context the gap lies
#
# Loss by the number of tokens before the predicted one. Left of the mark
# *tokens read*, a sparse query reads all of them: a gap there comes from
# training, not from tokens that are not read. Dashed lines are the same weights
# with dense attention, for which they were not trained.

# %%
for name, tasks in methods.items():
  for task, found in tasks.items():
    places = gaps.gaps_by_position(gaps.paired_runs(found))
    figure = figures.position_figure(f"{name}, {task}", found, colors, places)
    if figure is not None:
      display(figure)

# %% [markdown]
# ## Where far facts are lost
#
# Of the facts beyond the local block: how many lie in a block that the layer
# chose for the asking token, and how many are answered right if it did and if
# it did not. If answers are lost when a layer misses the block, the model may
# look facts up in that layer.

# %%
for name, tasks in comparisons.items():
  for task, found in tasks.items():
    finals = [r.final for members in found.values() for r in members if r.final]
    for entry in tables.choice_rows(found, runs.probes_of(finals)):
      print(
        f"{name}, {entry['side']}, {entry.get('facts', task):6}"
        f" layer {entry['layer']} ({entry['seeds']} seed(s)):"
        f" in chosen blocks {entry['in chosen blocks']:16}"
        f" of these right {entry['of these right']:16}"
        f" of the others {entry['of the others right']}"
      )

# %% [markdown]
# ## What each part is for
#
# Ablations: each entry is MSA with one thing changed, against MSA. Both read
# the same number of keys. "seeds" is the number of seeds, finished of planned.

# %%
for name, tasks in comparisons.items():
  for task, found in tasks.items():
    finals = [r.final for members in found.values() for r in members if r.final]
    entries = tables.ablation_rows(found, runs.metrics_of(finals))
    if entries:
      print(f"{name}, {task}")
    for entry in entries:
      change = f"{entry['changes']} (the paper: {entry['the paper']})"
      print(f"  {entry['side']}: {change}")
      shown = (
        f"{key} {value}"
        for key, value in entry.items()
        if key not in ("side", "changes", "the paper")
      )
      print("   ", "; ".join(shown))

# %% [markdown]
# ## Does the Index Branch follow attention?
#
# Three metrics of each layer of a sparse side:
#
# * **KL loss**: how far the distribution of the index over tokens is from that
#   of attention. In the warm-up it is over all tokens and later over the chosen
#   blocks, so the two parts of a curve are different quantities.
# * **Block recall**: of the blocks with the most attention, the share that the
#   index chose. The paper reports 0.70 to 0.75 for large models.
# * **Score recall**: the share of attention's mass on the chosen blocks. The
#   paper reports 0.90 to 0.94.
#
# The first sparse side of each task is drawn.

# %%
for name, tasks in methods.items():
  for task, found in tasks.items():
    for side in found:
      if side != runs.BASELINE:
        figure = figures.layers_figure(f"{name}, {task}", side, found[side])
        if figure is not None:
          display(figure)
          break

# %% [markdown]
# ## What it saves
#
# Speed at the paper's sizes (64 query heads on 4 key/value heads of 128, 16
# blocks of 128) on one GPU, against the fastest dense attention that JAX
# offers, measured in the same run. Both axes are logarithmic. The speed-up
# grows about in proportion to the length, because dense attention reads all
# tokens, while MSA's attention step reads 2,048 tokens at any length. Dotted
# lines are what the chip's matrix units would allow; the star is the number
# that the paper reports.
#
# *exact* and *fp8* say how selection ranks blocks: by exact scores, or by
# scores of 8-bit operands. A third way, *fast*, may exchange blocks of nearly
# equal scores; it is not drawn, because its times are close to those of
# *exact*.

# %%
paper = cases.Case(tokens=1)
shape = ("batch", "num_heads", "num_kv_heads", "head_dim", "index_dim",
         "block_size", "top_k", "dtype")  # fmt: skip
titles = {
  "prefill": "Reading a prompt: selection + attention",
  "train": "A training step of the layer: forward + backward + KL",
}
measured = {}
for path in sorted(MEASUREMENTS.glob("*.json")):
  content = json.loads(path.read_text())
  if "device" not in content:  # the file of fitted choices: no measurements
    continue
  measured[content["device"]] = [
    record
    for record in content["rows"]
    if record["speedup"] and all(record[k] == getattr(paper, k) for k in shape)
  ]

for device, found in measured.items():
  for op, title in titles.items():
    drawn = [
      record
      for record in found
      if record["op"] == op
      and record["tokens"] == record["kv_tokens"]
      and record["score_precision"] != "fast"
    ]
    if drawn:
      figure, axes = plt.subplots(figsize=(8, 4.8), layout="constrained")
      records.plot_op(axes, op, drawn)
      axes.set_ylabel("times as fast as dense attention")
      axes.set_title(f"{title}\n{device}")
      plt.show()

# %% [markdown]
# The same in milliseconds, with exact selection. *union8* says how much
# neighbours share: it is the number of different blocks that 8 neighbouring
# queries choose, when each chooses 16.

# %%
for device, found in measured.items():
  print(device)
  print(f"{'':10}{'tokens':>9}  {'choices':14}{'union8':>6}"
        f"{'dense, ms':>12}{'MSA, ms':>12}{'speed-up':>10}")  # fmt: skip
  for record in sorted(
    found, key=lambda x: (x["op"], x["kv_tokens"], x["selection"])
  ):
    if record["score_precision"] == "exact":
      print(
        f"{record['op']:10}{record['kv_tokens']:9,}  {record['selection']:14}"
        f"{record['union8'] or 0:6.0f}{record['dense_ms']:12,.2f}"
        f"{record['ms']:12,.2f}{record['speedup']:9.1f}x"
      )

# %% [markdown]
# ## How to read the two together
#
# * Quality and speed are measured at different sizes. The trained models are
#   small and were trained for minutes, most sides with one to three seeds; the
#   timed layer is that of a large model. Nothing here shows that a large MSA
#   model is as good as a large GQA model. The paper's claim is about 3 trillion
#   tokens.
# * `lm73m_16k` has three seeds of 68M tokens. The gap of MSA from scratch
#   ranges from −3.9 to +5.6 % over them, and one seed trained again ends with a
#   loss that differs by 2.8 % (`lm73m_16k_repeat`). So what a single run shows
#   of the gap is mostly chance.
# * Far facts: in each of these runs MSA misses some that GQA finds. How many
#   also depends on chance: of the farthest needles, 6.5 % in one seed and 1.4 %
#   when the same seed was trained again.
# * The loss of a fixed window is no worse than MSA's. What the selection is
#   good for shows in the facts that lie far back.
# * So look at facts far back in the quality figures. On ordinary text, most of
#   the loss depends on near tokens, and sparse attention always reads those.
# * Below about 8,000 tokens there is little time to save.
#
# `python -m train report FOLDER` writes a page with all figures of a
# comparison. `01_what_msa_selects` looks inside one small model, and
# `02_the_kernels` shows where the time goes.
