"""The pictures of 01_what_msa_selects.

The notebook computes what they show. Each function draws one picture, with
Matplotlib's pyplot, and shows it.
"""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap

from train.report.figures import COLORS, STYLE

BLUE, ORANGE, GREEN, *_ = COLORS
GREY = "#bbbbbb"
SMALL = dict(fontsize=9, color="#555555")


def setup() -> None:
  """Gives all pictures the style of the reports."""
  plt.rcParams.update(STYLE)


def training(loss, kl, warmup, chance) -> None:
  """The two losses by step; the warm-up has a grey ground."""
  steps = np.arange(1, len(loss) + 1)
  figure, panels = plt.subplots(1, 2, figsize=(11, 3.4), layout="constrained")
  for axes, values, title in (
    (panels[0], loss, "Loss of the answers (nats)"),
    (panels[1], kl, "KL loss of the Index Branch (nats)"),
  ):
    axes.axvspan(0, warmup, color="#eeeeee", lw=0)
    axes.plot(steps, values, color=BLUE, lw=1)
    axes.annotate(
      "warm-up: dense", (warmup / 2, 0.96), xycoords=("data", "axes fraction"),
      ha="center", va="top", fontsize=10, color="#555555",
    )
    axes.set(title=title, xlabel="training step", xlim=(0, len(loss)))
    axes.set_ylim(bottom=0)
  panels[0].axhline(chance, color="#555555", ls="--", lw=1)
  panels[0].annotate(
    f"chance: one of {np.exp(chance):.0f} values", (len(loss), chance), xytext=(0, -4),
    textcoords="offset points", ha="right", va="top", fontsize=10,
  )
  plt.show()


def answers(results, marks, chance) -> None:
  """Right answers by distance.

  Args:
    results: metrics of held-out batches by what was measured.
    marks: distances by name.
    chance: share of right answers of guessing.
  """
  figure, axes = plt.subplots(figsize=(8, 3.8), layout="constrained")
  for (label, result), color in zip(results.items(), (GREY, ORANGE)):
    bins = result["by_distance"]
    axes.plot(
      [np.sqrt(b["low"] * b["high"]) for b in bins],
      [100 * b["accuracy"] for b in bins],
      "o-", color=color, lw=2.2,
      label=f"{label}: {100 * result['accuracy']:.0f} % in all",
    )
  axes.axhline(100 * chance, color="#555555", ls="--", lw=1, label="chance")
  for name, x in marks.items():
    axes.axvline(x, color="#999999", lw=1, ls=":")
    axes.annotate(
      name, (x, 1.01), xycoords=("data", "axes fraction"), ha="center", **SMALL
    )
  axes.set_xscale("log", base=2)
  axes.set(
    xlabel="distance back to the fact (tokens)", ylabel="answers right (%)",
    ylim=(0, 103),
  )
  axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
  axes.legend(loc="lower left", bbox_to_anchor=(0, 0.15))
  plt.show()


def sequence(facts, asked, fact, query, block_size, num_blocks) -> None:
  """All tokens, one block on each line, with an arrow from a question to its
  fact."""
  kind = np.zeros(num_blocks * block_size, int)
  kind[facts], kind[asked] = 1, 2
  figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
  axes.pcolormesh(
    kind.reshape(num_blocks, block_size), edgecolors="white", lw=1.2,
    cmap=ListedColormap(["#eeeeee", BLUE, ORANGE]),
  )
  start, end = (
    (t % block_size + 0.5, t // block_size + 0.5) for t in (query, fact)
  )
  axes.annotate(
    "", end, start,
    arrowprops=dict(arrowstyle="->", lw=2, color="black", shrinkA=6, shrinkB=6),
  )
  axes.invert_yaxis()
  axes.grid(False)
  axes.set_yticks(np.arange(num_blocks) + 0.5, range(num_blocks))
  axes.set_xticks([])
  axes.tick_params(length=0)
  axes.set(
    xlabel="token of the block", ylabel="block",
    title="grey: filler, blue: facts, orange: questions;  arrow: the question"
    " that we follow",
  )
  plt.show()


def block_maps(asked, fact_blocks, mass, score, chosen, wanted, hidden) -> None:
  """Attention, index scores and choices; a row of panels for each group, with
  one line for each question and one column for each block.

  Both groups share the colours of a column.

  Args:
    asked: tokens of the questions.
    fact_blocks: block of each question's fact, which gets a ring.
    mass: dense attention, [group, question, block].
    score: index scores, of the same shape.
    chosen: whether a block was chosen, of the same shape.
    wanted: whether it is among those of most attention.
    hidden: blocks that a question does not see, [question, block].
  """
  num_groups, _, num_blocks = mass.shape
  lines = np.arange(len(asked)) + 0.5
  shades = plt.get_cmap("viridis").with_extremes(bad="white")
  kinds = ListedColormap(["#eeeeee", "#999999", ORANGE, GREEN])
  every = np.broadcast_to(hidden, mass.shape)
  columns = (
    ("dense attention by block", "attention weight", mass, (0, 0.5), shades),
    ("index score by block", "score of the block", score,
     (score[~every].min(), score[~every].max()), shades),
    ("wanted and chosen (green)", None, chosen + 2 * wanted, (0, 3), kinds),
  )  # fmt: skip
  figure, panels = plt.subplots(
    num_groups, 3, figsize=(12, 8), sharex=True, sharey=True,
    layout="constrained",
  )
  for column, (title, label, values, (low, high), cmap) in enumerate(columns):
    for g, axes in enumerate(panels[:, column]):
      image = axes.pcolormesh(
        np.ma.masked_array(values[g], hidden), cmap=cmap, vmin=low, vmax=high,
        edgecolors="white", lw=0.8,
      )
      axes.grid(False)
      axes.set_title(f"group {g}: {title}", fontsize=11)
      if column == 1:
        question, block = np.nonzero(chosen[g])
        axes.plot(
          block + 0.5, question + 0.5, "o", ms=5, color="white", mec="black"
        )
      else:
        axes.plot(
          fact_blocks + 0.5, lines, "o", ms=11, mfc="none", mew=1.8,
          mec="black" if column else "white",
        )
    if label:
      figure.colorbar(
        image, ax=panels[:, column], label=label, location="bottom",
        shrink=0.8, extend="neither" if column else "max",
      )
  for axes in panels[:, 0]:
    axes.set_ylabel("question at token")
    axes.set_yticks(lines, asked)
  for axes in panels[-1]:
    axes.set_xlabel("block of keys")
    axes.set_xticks(np.arange(0, num_blocks, 3) + 0.5, range(0, num_blocks, 3))
  panels[0, 0].invert_yaxis()
  plt.show()


def one_query(scores, block_max, picked, fact, dense, teacher, student, kl):
  """The four steps of one query, below each other.

  Args:
    scores: index scores of the visible tokens.
    block_max: of each of their blocks, the last of which is the query's own.
    picked: the chosen blocks.
    fact: the token asked for.
    dense: attention over all tokens.
    teacher: attention over the chosen blocks.
    student: softmax of the index scores over them.
    kl: of this query, in nats.
  """
  x, ids = np.arange(len(scores)), np.arange(len(block_max))
  size, own = -(-len(x) // len(ids)), ids[-1]
  figure, panels = plt.subplots(
    4, 1, figsize=(11, 10), sharex=True, layout="constrained"
  )
  for axes in panels:
    for block in picked:
      axes.axvspan(
        block * size - 0.5, (block + 1) * size - 0.5, color="#e8f1f8", lw=0,
        zorder=0,
      )
    axes.grid(False)
    axes.axvline(fact, color="black", ls=":", lw=1, zorder=1)
  panels[0].bar(x, scores, 1, color=ORANGE)
  panels[0].annotate(
    "the fact", (fact, 0.97), xycoords=("data", "axes fraction"), xytext=(5, 0),
    textcoords="offset points", va="top",
  )
  panels[1].bar(
    ids * size + size / 2 - 0.5, block_max, size - 1.5,
    color=[BLUE if i in picked else GREY for i in ids],
    hatch=["///" if i == own else "" for i in ids], edgecolor="white",
  )
  panels[2].bar(x, teacher, 1, color=BLUE, label="sparse")
  panels[2].step(x, dense, where="mid", color="black", lw=1, label="dense")
  panels[3].bar(x, teacher, 1, color=BLUE, label="teacher: attention")
  panels[3].step(
    x, student, where="mid", color=ORANGE, lw=1.5,
    label="student: softmax of index scores",
  )
  for axes in panels[2:]:
    axes.legend(loc="upper right")
  inside = dense[np.isin(x // size, picked)].sum()
  titles = (
    f"1. Index scores of the {len(x)} visible tokens",
    f"2. Block max, and the top {len(picked)}: blocks"
    f" {', '.join(map(str, picked))} (own: {own}, hatched)",
    "3. Attention weights (mean of the group's heads): dense puts"
    f" {100 * inside:.0f} % on the chosen blocks",
    f"4. KL of this query: {kl:.3f} nats",
  )
  labels = "score", "score", "weight", "probability"
  for axes, title, label in zip(panels, titles, labels):
    axes.set_title(title, loc="left")
    axes.set_ylabel(label)
  panels[3].set(xlabel="token (shaded: the chosen blocks)", xlim=(-1, len(x)))
  plt.show()
