# %% [markdown]
# # Is a model with MSA as good as one with dense attention, and what does it save?
#
# *GQA* is the usual dense attention (grouped queries: several query heads share
# a key/value head). *MSA* reads only a few blocks of earlier tokens, which a
# small *Index Branch* chooses for each query.
#
# **The answer, from what is committed here** (the numbers are printed below):
#
# * **Loss:** with 13M parameters and 4,096 tokens of context, MSA ends 0.8 %
#   below GQA (16 seeds), and MSA that starts from a GQA model less than 0.1 %
#   above it. With 73M and 16,384 tokens MSA is 1.1 ± 0.4 % below (seven seeds),
#   and MSA that starts from GQA late in its training 0.13 ± 0.08 % above (six).
# * **Facts far back:** at 4,096 tokens MSA finds as many as GQA. At 16,384 one of
#   seven seeds of GQA learns late to find them, and MSA is far ahead there; in
#   the others MSA finds 1.9 ± 1.7 points fewer of the farthest. MSA that starts
#   from a GQA model late in training finds fewer at both lengths: at 16,384
#   tokens 1 to 9 points fewer in each of six seeds. Where it was tried (four
#   seeds of MSA, three of MSA that starts from GQA), the same weights miss next to
#   no fact if they read the best blocks instead of those that the index chooses.
# * **Several facts, and counting:** of small models trained for such tasks, MSA
#   answers as well as GQA where single or linked facts are asked for. Where a
#   count over the whole context is, GQA answers everything right, MSA 94 to 98 %
#   and MSA that starts from GQA 77 to 90 % (three seeds). Blocks with
#   more attention do not help MSA there, while dense attention brings back most
#   of what it misses: it reads too few.
# * **Time:** below about 8,000 tokens there is little to save. From there on the
#   speed-up grows with the length, to tens of times at a million tokens.
#
# Five pictures carry this answer. The notebook trains and measures nothing: it
# reads the runs in `train/results/` and the times in `benchmarks/results/`.

# %%
import dataclasses
import json
import pathlib
import sys

import matplotlib.pyplot as plt
import numpy as np

sys.path[:0] = [".", ".."]  # the repository, seen from itself or from notebooks
import train
from benchmarks import cases, records
from train import probes
from train.config import RunConfig, from_dict
from train.report import figures, gaps, runs

# Load the backend now: display() shows a figure as a picture only after that.
plt.switch_backend(plt.get_backend())
plt.rcParams.update(figures.STYLE)

# %%
COMPARISONS = pathlib.Path(train.__file__).parent / "results"
TIMES = records.FOLDER / "nvidia_h100_80gb_hbm3.json"
# Each row of the answer: a comparison, its task of language and its task, or
# the probe of its task, that asks for facts.
ROWS = {
  "lm73m_16k": ("mix", ("mix", "needle_")),
  "lm13m_4k": ("mix", ("mix", "needle_")),
  "parity": ("text", ("recall", "")),
}

# %% [markdown]
# ## The numbers
#
# The sides of a comparison see the same batches, and with the same seed they
# start from the same weights. **MSA** attends densely at first, while the Index
# Branch learns to follow attention (the *warm-up*), and sparsely afterwards.
# **MSA CPT** starts from a late checkpoint of the GQA run. With 13M parameters
# and less it then has a warm-up of its own, and *index 128* has index heads of
# 128 dimensions instead of the 64 of attention's heads. With 73M an Index Branch
# learns beside GQA without changing it, so both MSA and MSA CPT start from GQA's
# run, and are sparse at once. *MSA middle* is a third side that does so, after
# half of the steps, in two seeds, which say little about the spread.
#
# "far facts" are facts in the farther half of the context. Each fact is stated
# once and asked for later, and the answer is counted right or wrong.

# %%
def read(name, task):
  """The runs of a task of a committed comparison, by side."""
  members = [run for run in runs.read_runs(COMPARISONS / name)
             if run.task == task]  # fmt: skip
  runs.check_runs(members)
  return runs.group_by_side(members)


def far_facts(run, probe):
  """Percent of the facts right that lie in the farther half of the context."""
  half = run.get("context") / 2
  bins = [b for b in run.final[f"{probe}by_distance"] if b["low"] >= half]
  count = sum(b["count"] for b in bins)
  return 100 * sum(b["count"] * b["accuracy"] for b in bins) / count


# (comparison, side, seeds' loss gaps in percent, and far facts in points)
answer = []
for name, (text, (asks, probe)) in ROWS.items():
  loss, facts = (gaps.paired_runs(read(name, task)) for task in (text, asks))
  for side in loss:
    metric = runs.metrics_of([a.final for a, _ in loss[side]])[0].key
    answer.append(
      (name, side,
       [100 * (b.final[metric] / a.final[metric] - 1) for a, b in loss[side]],
       [far_facts(b, probe) - far_facts(a, probe) for a, b in facts[side]])
    )  # fmt: skip

print("against GQA, mean of the seeds (and each of them)")
for name, side, loss, facts in answer:
  print(f"  {name:10} {figures.side_name(side):17}", end="")
  for title, unit, values in (("loss", "%", loss), ("far facts", "points", facts)):
    each = ", ".join(f"{value:+.1f}" for value in values)
    mean = sum(values) / len(values)
    print(f"  {title} {mean:+6.1f} {unit} ({each})", end="")
  print()

# %% [markdown]
# ## 1. The largest comparison: a lower loss with MSA, and fewer far facts
#
# 73M parameters, 16,384 tokens of context, of which a sparse query reads 2,048;
# 121M training tokens. Thin lines are seeds, thick lines the mean of a side's own
# seeds, of which sides have different ones: GQA and MSA 0 to 6, MSA CPT all but
# 3, MSA middle 3 and 6. All sparse models start from one dense training, which
# is GQA: MSA after a tenth of the steps, MSA middle after half of them, MSA CPT
# after 85 %.
#
# *Left:* the loss on held-out text; lower is better, and the axis is cut. With
# the last 2,048 to 2,560 tokens alone GQA's would be 3.1 % higher.
#
# *Right:* facts planted in text (needles) and asked for later, by the distance
# back to the fact; *chance* is what guessing gives. Left of *local block* every
# side sees the fact; beyond it, a sparse model can answer only if its Index
# Branch chooses the block of the fact. One seed of GQA began to find facts only
# at the end of its training, and answers 82 % of them, which lowers GQA's mean.
# MSA CPT started from that seed before it had learnt this, and finds the fewest
# of the farthest. Dashed lines are the same weights with the *oracle's blocks*,
# those with the most dense attention, as many as the index chooses. They were
# evaluated in seeds 3 to 6 alone, and lie on 100 %: the index misses facts, and
# 16 blocks are not too few.

# %%
found = read("lm73m_16k", "mix")
colors = figures.side_colors([*found, "msa_cpt_index_128", "fixed_window"])
display(figures.overview_figure({"16,384 tokens": found}, colors))

# %% [markdown]
# ## 2. How sure is this?
#
# Each dot is one seed of a side minus the same seed of GQA, a diamond is their
# mean, and a bar its 95 % interval. The axes are logarithmic beyond 0.1, so that
# small gaps can be seen beside large ones. On the green ground the side is better
# than GQA. A bar that crosses 0 shows no difference, which does not prove that
# there is none.
#
# The loss varies by chance. MSA's is lower at 4K (16 seeds) and at 16K, where
# seven seeds give a wider bar. That comes from training and not from reading
# less: at 4K the gap opens when MSA becomes sparse and is widest near the start
# of the context, where both read everything ([Results](../docs/results.md#loss)).
# Of far facts, MSA CPT finds fewer than GQA at both lengths: its bars end below 0.
# At 4K, wider index heads bring back most of what it misses. For MSA at 16K the
# seed in which GQA learns late makes the bar too wide to say anything. Without
# that seed MSA's bar would end just below 0. MSA middle has two seeds, too few
# for its bar to say anything. Each ends above MSA of its seed in loss, and finds
# fewer of the far facts.

# %%
def draw_gaps(axes, column, better_below):
  """Draws the gaps of all rows of `answer` in one panel."""
  for y, row in enumerate(answer):
    color, values = colors[row[1]], row[column]
    axes.plot(values, [y] * len(values), "o", color=color, alpha=0.5, ms=6)
    axes.plot(sum(values) / len(values), y, "D", color=color, ms=8)
    if interval := gaps.t_interval(values):  # of two seeds or more
      axes.plot(interval, [y, y], color=color, lw=2.5)
  axes.axvline(0, color="black", lw=1.2)
  # Equal steps up to 0.1, and steps of ten times beyond.
  axes.set_xscale("symlog", linthresh=0.1)
  ticks = [-10, -1, -0.1, 0.1, 1, 10]
  axes.set_xticks([*ticks, 0], [*(f"{x:+g}" for x in ticks), "0"])
  low, high = axes.get_xlim()
  better = (low, 0) if better_below else (0, max(high, 0))
  axes.axvspan(*better, color="#e3f4ea", zorder=0)
  axes.set_xlim(low, high)
  names = [f"{name}\n{figures.side_name(side)}" for name, side, *_ in answer]
  axes.set_yticks(range(len(answer)), names)
  axes.set_ylim(len(answer) - 0.5, -0.5)


figure, panels = plt.subplots(
  1, 2, figsize=(10, 4.6), sharey=True, layout="constrained"
)
draw_gaps(panels[0], 2, better_below=True)
panels[0].set(title="Loss on held-out text", xlabel="% above GQA's")
draw_gaps(panels[1], 3, better_below=False)
panels[1].set(title="Far facts answered", xlabel="points above GQA's")
plt.show()

# %% [markdown]
# `parity` is tiny (0.4M parameters on text, 0.1M on facts, trained in minutes
# on a CPU). In training so short, MSA learns to find nearly all far facts. MSA
# CPT, which is sparse for fewer steps, misses more of them.

# %% [markdown]
# ## 3. What the choice is for
#
# A sparse model without an Index Branch, which always reads the first block and
# a window of the nearest tokens, has the same budget of tokens. Its loss on text
# is no worse than MSA's, because most of that loss depends on near tokens. It is
# even 1.1 ± 0.3 % lower (five seeds), of which the cause is not known. But it
# cannot find facts beyond its window, except in the first block, and answers by
# guessing. So the loss alone does not show whether a choice is good: look at
# facts.
#
# Here are 13M parameters and 4,096 tokens of context, of which both sparse models
# read 512. GQA's line lies under MSA's.

# %%
members = read("lm13m_4k_ablations", "mix")
shown = {side: members[side] for side in ("gqa", "msa", "fixed_window")}
(probe,) = (p for p in runs.probes_of([members["msa"][0].final])
            if p.name == "needle")  # fmt: skip
display(figures.distance_figure("4,096 tokens", shown, colors, probe))

# %% [markdown]
# ## 4. Where an answer needs more than one fact
#
# These models were trained on five tasks alone, three seeds of each side. They
# are those of `lm13m_4k` with a smaller vocabulary, and a sparse query again reads
# 512 of 4,096 tokens. The tasks are made after those of RULER
# ([how](../docs/training.md#probes)):
#
# * *multi query*: the values of up to eight keys, one after the other;
# * *variable tracking*: the value of a variable, stated or by a link to another;
# * *multi value*: the sum, modulo 3, of up to three values of one key;
# * *common words*: which of three words is the commonest, where these words fill
#   half of the context;
# * *copy*: a span of up to eight symbols. No side has learned it beside the
#   others, so that other models were trained on it alone, six seeds of each side
#   (*copy alone*). These learn it, but for one seed of GQA, the same of MSA CPT
#   and two of MSA, which end with 94 to 95 % of the symbols right.
#
# Filled markers are a side's answers, and open ones those of the same weights with
# the oracle's blocks. Where only the filled one is behind GQA, the index is at
# fault. Where both are, what is left is not the index's: so few blocks may not
# suffice, or the weights themselves may be worse.
#
# *Left:* means of the seeds, each of 192 held-out rows a task. All sides follow
# single facts and links equally well.
#
# *Right:* common words, by how many percent the commonest word leads; thin lines
# are seeds. GQA makes no mistake, and MSA only where the lead is smallest. The
# dotted line is no model: it is how often the commonest word of eight random
# blocks, as many as a query reads, is that of the whole row. MSA is better than
# that, as it can be, since its layers, heads and tokens choose different blocks.
# MSA CPT, which is sparse in the last tenth of the steps only, is no better. With the
# oracle's blocks MSA does slightly worse: those with the most attention need not
# be the best ones for a count.

# %%
asked, copied = read("probes_4k", "probes"), read("copy_4k", "probes")
config = from_dict(RunConfig, asked["msa"][0].config)
tasks = ["multi_query", "variable_tracking", "multi_value", "common_words", "copy"]
leads = config.data.leads


def percents(record):
  """Answers right: of each task, and of common words with each lead."""
  by_lead = [100 * x["accuracy"] for x in record["common_words_by_number"]]
  return [100 * record[f"{task}_accuracy"] for task in tasks], by_lead


def count_random_blocks(lead):
  """How often the commonest word of as many random blocks as a query reads is
  that of the row, in percent. Words lie anywhere, so that the tokens of random
  blocks are a random sample of all. If words tie, one of them is guessed."""
  data = dataclasses.replace(config.data, leads=(lead,))
  rng, index = np.random.default_rng(0), config.model.index
  row = probes.make_row(data, "common_words", rng, config.context)
  words = probes.Ids(data).value + np.arange(data.num_values)
  counts = [np.sum(row.tokens[:-1] == word) for word in words]
  samples = rng.multivariate_hypergeometric(
    [*counts, config.context - sum(counts)], index.top_k * index.block_size, 100_000
  )[:, :-1]
  commonest = samples == samples.max(1, keepdims=True)
  return 100 * np.mean(commonest[:, np.argmax(counts)] / commonest.sum(1))


lines = [("gqa", "final", "o", -0.3), ("msa", "final", "s", -0.15),
         ("msa", "final_oracle", "s", 0), ("msa_cpt", "final", "D", 0.15),
         ("msa_cpt", "final_oracle", "D", 0.3)]  # fmt: skip
figure, (left, right) = plt.subplots(
  1, 2, figsize=(10, 5), width_ratios=(1.2, 1), layout="constrained"
)
print("percent right of", *tasks, "and copy alone")
for side, name, marker, offset in lines:
  label, color = figures.side_name(side), colors[side]
  style = dict(color=color, marker=marker, ms=7)
  if name == "final_oracle":
    label += ", oracle's blocks"
    style |= dict(mfc="white", ls="--")
  seeds = [percents(getattr(run, name)) for run in asked[side]]
  of_tasks, of_leads = (np.mean(values, 0) for values in zip(*seeds))
  alone = [100 * getattr(run, name)["copy_accuracy"] for run in copied[side]]
  of_tasks = [*of_tasks, np.mean(alone)]
  print(f"  {label:25}", *(f"{value:6.1f}" for value in of_tasks))
  left.plot(of_tasks, np.arange(len(of_tasks)) + offset, **style | dict(ls="none"))
  right.plot(leads, of_leads, **style, lw=2, label=label)
  if name == "final":
    right.plot(leads, np.transpose([y for _, y in seeds]), color=color, lw=0.8)
counted = [count_random_blocks(lead) for lead in leads]
print("commonest word of 8 random blocks, by lead:",
      ", ".join(f"{value:.1f}" for value in counted))  # fmt: skip
right.plot(leads, counted, "k:", lw=2, label="commonest of 8 random blocks")
names = [*tasks, "copy_alone"]
chances = [100 * config.data.chances[task] for task in [*tasks, "copy"]]
left.plot(chances, range(len(names)), "k|", ms=26, mew=1.2)
right.axhline(chances[tasks.index("common_words")], color="k", lw=1.2, label="chance")
left.set(title="All tasks", xlabel="answers right (%), and chance", xlim=(0, 103))
left.set_yticks(range(len(names)), [name.replace("_", "\n") for name in names])
left.invert_yaxis()
left.grid(axis="y", visible=False)
right.set(title="Common words", xlabel="lead of the commonest word (%)", xticks=leads,
          ylabel="answers right (%)", ylim=(0, 103))  # fmt: skip
figure.legend(loc="outside lower center", ncols=3)
plt.show()

# %% [markdown]
# ## 5. What it saves
#
# One attention layer of the paper's sizes (64 query heads on 4 key/value heads
# of 128, 16 blocks of 128) on one GPU, against the fastest dense attention that
# JAX offers, measured in the same run. Both axes are logarithmic. Dense
# attention reads all tokens and MSA 2,048 at any length, so the speed-up grows
# with the length. It grows more slowly where the choice itself, which looks at
# every token with one small head, takes most of the time.
#
# *Trained-like* choices agree between neighbouring queries, as those of trained
# models do; *random* ones do not, and cost more. *exact* and *fp8* say whether
# blocks are ranked by exact scores or by those of 8-bit operands. Dotted lines
# are what the chip's tensor cores would allow. The star is the number that the
# paper reports, for another GPU.

# %%
content = json.loads(TIMES.read_text())
paper = cases.Case(tokens=1)
shape = ("batch", "num_heads", "num_kv_heads", "head_dim", "index_dim",
         "block_size", "top_k", "dtype")  # fmt: skip
times = [
  record
  for record in content["rows"]
  if record["speedup"]
  and record["tokens"] == record["kv_tokens"]
  and record["score_precision"] != "fast"  # its times are those of exact
  and record["selection"] != "fitted"
  and all(record[key] == getattr(paper, key) for key in shape)
]
titles = {"prefill": "Reading a prompt", "train": "Training step of the layer"}
figure, panels = plt.subplots(
  1, 2, figsize=(10, 4.6), sharey=True, layout="constrained"
)
for axes, (op, title) in zip(panels, titles.items()):
  records.plot_op(axes, op, [x for x in times if x["op"] == op])
  axes.set_title(title)
panels[0].set_ylabel("times as fast as dense attention")
figure.suptitle(content["device"])
plt.show()

# %%
print("speed-up with exact scores and trained-like choices")
for op, title in titles.items():
  found_times = {
    x["tokens"]: f"{x['tokens'] >> 10}K {x['speedup']:.1f}x" for x in times
    if (x["op"], x["selection"], x["score_precision"])
    == (op, "trained_like", "exact")
  }  # fmt: skip
  print(f"  {title:28}", ", ".join(map(found_times.get, sorted(found_times))))

# %% [markdown]
# ## How far this carries
#
# * Quality and speed are measured at different sizes: the trained models are
#   small and were trained for minutes, and the timed layer is that of a large
#   model. Nothing here shows that a large MSA model is as good as a large GQA
#   model. The paper's claim rests on 3 trillion tokens.
# * Attention is a part of a training step. A whole step of the 73M model gains
#   less than the layer ([Speed](../docs/speed.md)).
# * All other figures of a comparison, the ablations and the layers' recalls are
#   in its report: `python -m train report train/results/lm73m_16k` draws it.
#
# `01_what_msa_selects` looks inside one small model, and `02_the_kernels` shows
# where the time goes.
