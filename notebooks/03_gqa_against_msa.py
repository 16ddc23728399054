# %% [markdown]
# # GQA against MSA: quality and speed
#
# *GQA* is the usual dense attention (grouped queries: several query heads share
# a key/value head). *MSA* reads only a few blocks of earlier tokens, which a
# small *Index Branch* chooses for each query. Two questions decide whether that
# is a good bargain: does a model trained with it end as good, and how much time
# does it save?
#
# This notebook computes nothing new. It draws every comparison whose run folders
# are committed in `train/results/`, and every measurement in
# `benchmarks/results/`; run it again when there are more.

# %%
import json
import pathlib

import matplotlib.pyplot as plt

import benchmarks.results
import train.runs
from benchmarks import cases
from benchmarks.results import plot_op
from train.report import figures, runs, tables
from train.report.page import verdict

plt.switch_backend(plt.get_backend())  # now, for figures shown by display()
plt.rcParams.update(figures.STYLE)
ROOT = pathlib.Path(train.runs.__file__).parents[1]

# %%
COMPARISONS = ROOT / "train" / "results"
MEASUREMENTS = benchmarks.results.FOLDER

# %% [markdown]
# ## What was trained
#
# In a comparison all sides of a task see the same batches, and sides of one seed
# start from the same weights. They differ in attention and its recipe only:
# runs that differ elsewhere are refused, by the first lines below. Common names:
#
# * **MSA**: from scratch. It attends densely at first (*warm-up*), while the
#   Index Branch learns to follow attention, then sparsely.
# * **MSA CPT**: starts from a checkpoint of the GQA run (half-way in `parity`,
#   after 85 % of the steps in `evidence` and `evidence_seeds`), then the same.
# * Other names, in comparisons of **ablations**: MSA with one thing changed.

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
# Those with both; one folder holds MSA's runs alone.
paired = {
  name: tasks
  for name, tasks in comparisons.items()
  if all(runs.BASELINE in found for found in tasks.values())
}
# What is asked of MSA as it is; ablations have a table of their own.
methods = {
  name: tasks
  for name, tasks in paired.items()
  if not any(tables.ablation(side) for found in tasks.values() for side in found)
}
# The same color for a side everywhere; the clearest ones for the methods.
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
# Thin lines are single seeds, thick lines their mean. Loss is on held-out text,
# lower is better (the axis is cut to the later part of training). Where a task
# asks for facts that were stated earlier, the share of right answers is drawn
# against the distance back to the fact: beyond the mark *local block* a sparse
# model answers only if its Index Branch found the fact's block.

# %%
for name, tasks in paired.items():
  figure = figures.overview_figure(tasks, colors)
  figure.suptitle(f"comparison “{name}”")
  display(figure)

# %% [markdown]
# ## The gap, with its uncertainty
#
# Each row is one side against GQA: dots are seeds (the same seed on both sides),
# the bar is the 95 % interval of their mean. **Green ground is where the side is
# better than GQA.** A bar that crosses 0 tells no difference; that does not
# prove that there is none. One seed has no bar. Ablations have a table below.

# %%
gaps = {}  # (metric, unit) -> (label, side, metric, gap, if beside the first)
for name, tasks in methods.items():
  for task, found in tasks.items():
    finals = [r.final for members in found.values() for r in members if r.final]
    for index, metric in enumerate(runs.metrics_of(finals)):
      for side, pairs in runs.paired_runs(found).items():
        if pairs:
          gap = runs.paired_gap(pairs, metric)
          label = f"{name}, {task}:\n{figures.side_name(side)}"
          rows = gaps.setdefault((metric.title, metric.gap_unit), [])
          rows.append((label, side, metric, gap, index > 0))

for (title, unit), rows in gaps.items():
  figure, axes = plt.subplots(
    figsize=(9, 1.3 + 0.62 * len(rows)), layout="constrained"
  )
  for y, (_, side, metric, gap, _) in enumerate(rows):
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
  axes.set_yticks(range(len(rows)), [row[0] for row in rows])
  axes.set_ylim(len(rows) - 0.5, -0.5)
  axes.set_xlabel(f"side − GQA ({unit})")
  axes.set_title(f"{title}: gap to GQA after training")
  plt.show()

# %% [markdown]
# In words (the report's own sentences):

# %%
for rows in gaps.values():
  for label, side, metric, gap, short in rows:
    base = figures.side_name(runs.BASELINE)
    sentence = verdict(figures.side_name(side), base, metric, gap, short)
    print(label.split(":")[0] + ":", sentence, "\n")

# %% [markdown]
# ## How the gap came about
#
# The same gap during training. In its warm-up MSA attends densely and differs
# from GQA by an Index Branch that learns beside it and changes nothing, so the
# gap is 0 (in bfloat16 what rounding grows to); it opens when the side goes
# sparse.

# %%
for name, tasks in methods.items():
  for task, found in tasks.items():
    finals = [r.final for members in found.values() for r in members if r.final]
    metric = runs.metrics_of(finals)[0]
    figure = figures.gap_figure(f"{name}, {task}", found, colors, metric)
    if figure is not None:
      display(figure)

# %% [markdown]
# ## Where in the context it lies
#
# Loss by how many tokens come before. Where these are fewer than *tokens read*, a
# sparse query reads all of them: a gap there came with training, not with what the
# choice leaves out. Dashed: the same weights with dense attention, for which they
# were not trained.

# %%
for name, tasks in methods.items():
  for task, found in tasks.items():
    places = runs.gaps_by_position(runs.paired_runs(found))
    figure = figures.position_figure(f"{name}, {task}", found, colors, places)
    if figure is not None:
      display(figure)

# %% [markdown]
# ## Where far facts are lost
#
# Of the facts beyond the local block: how many lie in a block that a layer chose
# for the asking token, and how many are answered where it did and where it did
# not. Where a layer's misses cost answers, facts may be looked up there.

# %%
for name, tasks in comparisons.items():
  for task, found in tasks.items():
    finals = [r.final for members in found.values() for r in members if r.final]
    for row in tables.choice_rows(found, runs.probes_of(finals)):
      print(
        f"{name}, {row['side']}, {row.get('facts', task):6}"
        f" layer {row['layer']} ({row['seeds']} seed(s)):"
        f" in chosen blocks {row['in chosen blocks']:16}"
        f" of these right {row['of these right']:16}"
        f" of the others {row['of the others right']}"
      )

# %% [markdown]
# ## What each part is for
#
# Ablations: each row is MSA with one thing changed, at an equal number of keys
# read, against MSA. "seeds" says how many, finished of planned.

# %%
for name, tasks in comparisons.items():
  for task, found in tasks.items():
    finals = [r.final for members in found.values() for r in members if r.final]
    rows = tables.ablation_rows(found, runs.metrics_of(finals))
    for row in rows:
      if row is rows[0]:
        print(f"{name}, {task}")
      print(f"  {row['side']}: {row['changes']} (the paper: {row['the paper']})")
      shown = (
        f"{key} {value}"
        for key, value in row.items()
        if key not in ("side", "changes", "the paper")
      )
      print("   ", "; ".join(shown))

# %% [markdown]
# ## Does the Index Branch follow attention?
#
# Three measures for each layer of a sparse side: the **KL loss** (how far the
# index's distribution is from attention's own; over all tokens in the warm-up,
# over chosen blocks later, so the two parts of a curve are different
# quantities); **block recall** (the share of the blocks with the most attention
# that the index picked); **score recall** (the share of attention's mass on the
# picked blocks). 1 is perfect for the recalls. The paper reports 0.70 to 0.75
# and 0.90 to 0.94 for large models. Drawn for the first sparse side of each task.

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
# blocks of 128), one GPU, against the fastest dense attention that JAX offers in
# the same run. Both axes are logarithmic: MSA's advantage doubles about as often
# as the length does, because dense attention reads everything and MSA's
# attention step reads 2,048 tokens whatever the length. Dotted lines are what
# the chip's matrix units would allow; the star is the paper's own figure.
#
# *exact* and *fp8* are how selection ranks blocks: by exact scores, or with
# 8-bit operands. (A third way, *fast*, confuses near-equal scores; its times are
# close to exact's, and not drawn.)

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
  if "device" not in content:  # what choices were fitted, no measurement
    continue
  measured[content["device"]] = [
    row
    for row in content["rows"]
    if row["speedup"] and all(row[k] == getattr(paper, k) for k in shape)
  ]

for device, rows in measured.items():
  for op, title in titles.items():
    found = [
      row
      for row in rows
      if row["op"] == op
      and row["tokens"] == row["kv_tokens"]
      and row["score_precision"] != "fast"
    ]
    if found:
      figure, axes = plt.subplots(figsize=(8, 4.8), layout="constrained")
      plot_op(axes, op, found)
      axes.set_ylabel("times as fast as dense attention")
      axes.set_title(f"{title}\n{device}")
      plt.show()

# %% [markdown]
# The same in time, with exact selection. *union8* says how much neighbours
# share: how many different blocks 8 neighbouring queries choose, 16 each.

# %%
for device, rows in measured.items():
  print(device)
  print(f"{'':10}{'tokens':>9}  {'choices':14}{'union8':>6}"
        f"{'dense, ms':>12}{'MSA, ms':>12}{'speed-up':>10}")  # fmt: skip
  for row in sorted(
    rows, key=lambda row: (row["op"], row["kv_tokens"], row["selection"])
  ):
    if row["score_precision"] == "exact":
      print(
        f"{row['op']:10}{row['kv_tokens']:9,}  {row['selection']:14}"
        f"{row['union8'] or 0:6.0f}{row['dense_ms']:12,.2f}{row['ms']:12,.2f}"
        f"{row['speedup']:9.1f}x"
      )

# %% [markdown]
# ## How to read the two together
#
# * Quality and speed are measured at different sizes: small models trained for
#   minutes, most of them one to three times, and a layer of a large model.
#   Nothing here shows that a large MSA model is as good as a large GQA model; the
#   paper's claim is about 3 trillion tokens.
# * `evidence_first` and `evidence_second` end after 31M tokens, one seed each,
#   `evidence` after 68M, three seeds. There the gap of MSA from scratch ranges from
#   −3.9 to +5.6 %, and a repetition of one seed moves its loss by 2.8 %
#   (`evidence_again`): what a single long run shows of it is mostly chance.
# * Far facts: in each of these runs MSA misses some that GQA finds. How many is
#   chance too: of the farthest needles 6.5 % in one seed, 1.4 % in its repetition.
# * The fixed window's loss is no worse than MSA's. What choosing is for shows in
#   the facts that lie far back.
# * What to look at in the quality figures is where attention must reach *far*:
#   on ordinary text near tokens carry most of the loss, and sparse attention
#   always reads those.
# * Below some 8,000 tokens there is little to save.
#
# `python -m train report FOLDER` writes a page with all figures of a comparison;
# `01_what_msa_selects` looks inside one small model, `02_the_kernels` at where
# the time goes.
