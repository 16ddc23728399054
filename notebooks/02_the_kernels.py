# %% [markdown]
# # The kernels: what bounds them, and what each design gains
#
# In MiniMax Sparse Attention (MSA) a query reads not all earlier keys but 16
# blocks of 128 of them. Two steps replace dense attention:
#
# 1. **Selection.** A small *index* head scores every earlier key; a block's
#    score is the largest of its keys; the best 16 blocks are kept. This is still
#    quadratic in the length, but with 4 index heads and no softmax.
# 2. **Attention.** Exact softmax attention over the chosen blocks only. The 16
#    query heads of a *group* share one key/value head, and one choice.
#
# Both are Pallas kernels for NVIDIA Hopper GPUs, in `pallas_kernels/`. This
# notebook draws the times that `python -m benchmarks` measured, beside
# the limits of the chip, shows the ideas that the kernels are built on, and at
# its end runs two of them. It needs no GPU.

# %%
import os

# Kernels that are interpreted on a CPU block one thread for each of theirs.
os.environ.setdefault("NPROC", "16")

import dataclasses
import json
import pathlib
import textwrap
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import msa_jax
import benchmarks.cases
from msa_jax import selection_stats
from benchmarks import cases
from pallas_kernels import (kv_block_plan, mosaic, select_blocks, tile_plan)
from pallas_kernels import (sparse_attention, sparse_attention_fwd)
from benchmarks import measure
from benchmarks.results import BOUND_TFLOPS
from train.report.figures import COLORS, STYLE

plt.rcParams.update(STYLE)
BLUE, ORANGE, GREEN, PINK, *_ = COLORS
FOLDER = pathlib.Path(benchmarks.cases.__file__).parent / "results"

# %%
RESULTS = "nvidia_h100_80gb_hbm3.json"  # the measurements to draw
KEY_TOKENS = 1 << 15  # keys that the drawn choices are made among
RUN_TOKENS = 512  # queries of the kernels that run in this notebook

# %%
results = json.loads((FOLDER / RESULTS).read_text())
fields = {field.name for field in dataclasses.fields(cases.Case)}
rows = [
  row
  for row in results["rows"]
  # The paper's heads: 64 query heads, 4 key/value heads, of 128.
  if cases.Case(**{k: row[k] for k in fields}) in cases.PAPER.values()
]


def find(op, selection, precision="exact"):
  """Rows of an operation by number of tokens."""
  wanted = (op, selection, precision)
  found = [
    row
    for row in rows
    if (row["op"], row["selection"], row["score_precision"]) == wanted
  ]
  return {row["tokens"]: row for row in sorted(found, key=lambda r: r["tokens"])}


def length(tokens):
  return f"{tokens >> 10}K" if tokens < 1 << 20 else f"{tokens >> 20}M"


matmul = np.mean([row["matmul_tflops"] for row in rows])
copy = np.mean([row["copy_tbs"] for row in rows])
print(f"{results['device']}, jax {results['jax']}")
print(f"measured in the same runs: a matrix product of 8192 {matmul:.0f} TFLOP/s,")
print(f"a copy {copy:.2f} TB/s (read and written)")

# %% [markdown]
# ## Where the time goes
#
# Bars: time for each token of a prompt (milliseconds for 1,000 tokens). Dense
# attention grows with the length. MSA's attention step does not: each query
# reads the same 2,048 keys. Selection grows, with a 32nd of dense's operations.
# *Random* choices are the worst case, where neighbouring queries share next to
# nothing; *trained-like* ones share as those of trained models do: own block,
# first block, and blocks that drift slowly.

# %%
figure, panels = plt.subplots(
  1, 2, figsize=(11, 4.2), sharey=True, layout="constrained"
)
for axes, selection in zip(panels, ("random", "trained_like")):
  select, attend = find("select", selection), find("sparse_forward", selection)
  whole = find("prefill", selection)
  place = np.arange(len(attend))
  scale = [1024 / tokens for tokens in attend]
  dense = [whole[t]["dense_ms"] * s for t, s in zip(attend, scale)]
  first = [select[t]["ms"] * s for t, s in zip(attend, scale)]
  second = [attend[t]["ms"] * s for t, s in zip(attend, scale)]
  axes.bar(place - 0.2, dense, 0.38, color="#999999", label="dense attention")
  axes.bar(place + 0.2, second, 0.38, color=BLUE, label="MSA: attention")
  axes.bar(
    place + 0.2, first, 0.38, second, color=ORANGE, label="MSA: selection"
  )
  for x, tokens in zip(place, attend):
    axes.annotate(
      f"{whole[tokens]['speedup']:.1f}x", (x + 0.2, first[x] + second[x]),
      ha="center", va="bottom", fontsize=10,
    )
  axes.set_xticks(place, [length(tokens) for tokens in attend])
  axes.set_xlabel("prompt (tokens)")
  axes.set_title(f"{selection.replace('_', '-')} choices")
  axes.set_ylim(0, 4.5)
  for x, value in zip(place, dense):
    if value > 4.5:
      axes.annotate(
        f"{value:.0f} ↑", (x - 0.2, 4.45), ha="center", va="top", fontsize=9
      )
panels[0].set_ylabel("milliseconds for 1,024 tokens (cut at 4.5)")
panels[0].legend(loc="upper left")
figure.suptitle(
  f"Prefill, {results['device']}, bfloat16; above the bars: whole MSA against"
  " dense"
)
plt.show()

# %% [markdown]
# ## The roofline
#
# A kernel can be bound by the matrix units (flat roof) or by memory (slope):
# what it may reach depends on how many operations it does for each byte that it
# moves. Points are measured.
#
# * **Selection** loads a key once for 256 queries: it sits under the flat roof,
#   and only a cheaper operand (fp8, with a roof of its own) raises it.
# * **Attention has two designs.** *Edges* moves a query's 16 heads in (4 KB),
#   its partial result out (4 KB) and back in for the final sum (4 KB), for each
#   of its 16 blocks, 1 million operations a time: about 85 operations a byte,
#   under the slope of the card's memory. *Tiles* loads a block (64 KB of keys
#   and values) once for 8 neighbouring queries: no partial results. It moves as
#   many bytes, but they come from the L2 cache, so its point may lie above the
#   slope of the main memory.

# %%
# Bytes that each design asks of memory for every operation it does.
paper = cases.Case(tokens=1 << 17)
group = paper.num_heads // paper.num_kv_heads
row_bytes = group * paper.head_dim * 2  # a query's heads of one group
edge_flops = 4 * group * paper.block_size * paper.head_dim
edge_intensity = edge_flops / (3 * row_bytes)
block_bytes = 2 * paper.block_size * paper.head_dim * 2  # keys and values

figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
x = np.geomspace(20, 4000, 200)
axes.plot(x, np.minimum(copy * x, matmul), color="black", lw=2)
axes.annotate(f"memory: {copy:.2f} TB/s", (40, 106))
axes.annotate(f"bf16 matrix product: {matmul:.0f} TFLOP/s", (700, 615))
fp8 = BOUND_TFLOPS["fp8"]
axes.plot(x, np.where(copy * x > matmul, np.minimum(copy * x, fp8), np.nan),
          color=PINK, lw=1.5, ls="--")
axes.annotate(f"best fp8 rate seen: {fp8:.0f} TFLOP/s", (700, 1350), color=PINK)
for precision, colour, bytes_per_entry in (("exact", ORANGE, 2), ("fp8", PINK, 1)):
  row = find("select", "trained_like", precision)[1 << 17]
  # One key tile against 256 queries: 2 operations for each entry and query.
  axes.plot(
    2 * 256 / bytes_per_entry, row["tflops"], "s", ms=10, color=colour,
    label=f"selection, {'bf16' if precision == 'exact' else 'fp8'}",
  )
for selection, colour, name in (
  ("random", BLUE, "random choices (edges)"),
  ("trained_like", GREEN, "trained-like choices (tiles)"),
):
  row = find("sparse_forward", selection)[1 << 17]
  if selection == "random":
    intensity = edge_intensity
  else:
    chosen = 8 * paper.top_k * edge_flops
    intensity = chosen / (row["union8"] * block_bytes)
  axes.plot(
    intensity, row["tflops"], "o", ms=10, color=colour,
    label=f"attention, {name}",
  )
dense = find("prefill", "random")[1 << 17]
dense_tflops = measure.dense_flops(paper) / dense["dense_ms"] / 1e9
axes.axhline(dense_tflops, color="#999999", ls="--", lw=1.2)
axes.annotate(
  f"dense attention ({dense['dense']}): {dense_tflops:.0f}",
  (22, dense_tflops * 1.04), color="#555555", fontsize=10,
)
axes.set(
  xscale="log", yscale="log", ylim=(100, 1600),
  xlabel="operations that the chosen keys need, for each byte moved",
  ylabel="TFLOP/s", xlim=(20, 4000),
  title=f"Roofline at 128K tokens, {results['device']}",
)
axes.set_xticks([30, 100, 300, 1000, 3000], [30, 100, 300, 1000, 3000])
axes.set_yticks([100, 200, 400, 800, 1600], [100, 200, 400, 800, 1600])
axes.minorticks_off()
axes.legend(loc="lower right")
plt.show()

# %% [markdown]
# ## Selection: hide the sorting under the matrix units
#
# Nothing of size tokens x tokens is ever written: scores die in registers after
# their block's maximum is taken. The running list of the 16 best blocks is what
# costs. Kept where the scores arise, it makes the matrix units wait. Given to a
# *warpgroup* (128 threads) of its own, which works while the others multiply, it
# costs next to nothing. The table is read from the tuning log.

# %%
log = (FOLDER / "LOG.md").read_text()
section = log.split("## Block selection")[1].split("\n## ")[0]
table = [
  [cell.strip() for cell in line.strip("|").split("|")]
  for line in section.splitlines()
  if line.startswith("|")
][2:]
figure, axes = plt.subplots(figsize=(10, 4.6), layout="constrained")
for i, (name, figures, _) in enumerate(table):
  milliseconds = float(figures.split()[0])
  kept = name.startswith("a warpgroup of its own")
  axes.barh(
    i, milliseconds,
    color=GREEN if kept else "#bbbbbb" if i == 0 else BLUE,
  )
  axes.annotate(
    f" {milliseconds:.1f} ms", (milliseconds, i), va="center", fontsize=10
  )
axes.axvline(float(table[0][1].split()[0]), color="#555555", ls=":", lw=1.5)
axes.set_yticks(
  range(len(table)), [textwrap.fill(row[0], 52) for row in table], fontsize=9
)
axes.invert_yaxis()
axes.grid(False)
axes.set_xlabel("milliseconds at 128K tokens")
axes.set_title(
  "Selection: grey computes scores only (the floor), green is what is used"
)
plt.show()

# %% [markdown]
# ## Attention: how much do neighbours share?
#
# Below are real choices of 8 neighbouring queries among 256 blocks (one group,
# 16 blocks each), made as in the benchmark. Columns are the blocks that at least
# one of the 8 chose. Above, nearly every choice is alone. Below, the 8 queries
# want the same few blocks, so one load of a block serves several of them.

# %%
case = cases.Case(tokens=64, kv_tokens=KEY_TOKENS, dtype="float32")
figure, panels = plt.subplots(2, 1, figsize=(11, 4.6), layout="constrained")
for axes, selection in zip(panels, ("random", "trained_like")):
  ids = msa_jax.select_blocks(
    *cases.index_inputs(jax.random.key(0), case, selection),
    block_size=case.block_size, top_k=case.top_k,
  )
  eight = np.asarray(ids)[0, 0, -8:]
  union = np.unique(eight[eight >= 0])
  chosen = (eight[:, :, None] == union).any(axis=1)
  colours = np.where(chosen, np.where(chosen.sum(0) > 1, 2, 1), 0)
  axes.pcolormesh(
    colours, edgecolors="white", lw=0.8, vmin=0, vmax=2,
    cmap=plt.matplotlib.colors.ListedColormap(["#f2f2f2", ORANGE, BLUE]),
  )
  axes.invert_yaxis()
  axes.grid(False)
  axes.set_xticks([])
  axes.set_yticks(np.arange(8) + 0.5, range(1, 9))
  axes.tick_params(length=0)
  axes.set_ylabel("query of the tile")
  axes.set_title(
    f"{selection.replace('_', '-')}: {chosen.sum()} choices name {len(union)}"
    f" different blocks (mean of all tiles {float(selection_stats.union8(ids)):.0f})"
  )
panels[1].set_xlabel(
  "blocks that one of the 8 chose;  blue: wanted by several,  orange: by one"
)
plt.show()

# %% [markdown]
# ## Two kernels, and the choice between them
#
# `kv_block_plan.py` looks at every tile of 8 queries, on the GPU, before attention
# starts:
#
# * **tiles** (the query stays, blocks pass by): cost = blocks in the union. A
#   block is multiplied with queries that did not choose it, too.
# * **edges** (the block stays, queries are gathered): cost = choices, always
#   8 x 16 = 128, whatever they share.
#
# A block that enough of the 8 want is walked by the tile, the rest become edges,
# unless walking everything costs about the same. Each point is one measured
# length. Trained-like choices stay near a union of 25 at every length, and run
# faster. Random ones drift right with the length, and stay on the edges' bound:
# 12 KB for a choice through the memory.

# %%
figure, axes = plt.subplots(figsize=(9, 4.8), layout="constrained")
for selection, colour, marker in (
  ("random", BLUE, "o"), ("trained_like", GREEN, "D"),
):
  found = find("sparse_forward", selection)
  axes.plot(
    [row["union8"] for row in found.values()],
    [row["tflops"] for row in found.values()],
    marker, ms=9, color=colour,
    label=f"measured, {selection.replace('_', '-')}",
  )
  if selection == "random":
    for tokens, row in found.items():
      above = tokens == max(found)
      axes.annotate(
        length(tokens), (row["union8"], row["tflops"]),
        xytext=(0, 9 if above else -18), textcoords="offset points",
        ha="center", fontsize=10,
      )
axes.annotate(
  f"{length(min(found))} to {length(max(found))}\n(trained-like)", (15, 270),
  fontsize=10,
)
union = np.linspace(16, 128, 100)
axes.plot(
  union, matmul * paper.top_k / union, color="#555555", ls="-", lw=1.3,
  label="tiles: matrix rate, all 8 queries x the union",
)
axes.axhline(
  copy * edge_intensity, color="#555555", ls="--", lw=1.3,
  label=f"edges: {3 * row_bytes >> 10} KB a choice at the copy rate",
)
axes.set(
  ylim=(0, 500), xlim=(14, 130),
  xlabel="different blocks that 8 neighbouring queries choose (16 each)",
  ylabel="useful TFLOP/s",
  title="Attention over chosen blocks: measured, and what bounds each design",
)
axes.legend(loc="upper right")
plt.show()

# %% [markdown]
# ## The work list
#
# Edges need the choices the other way round: not *query → blocks* but *block →
# queries*. A sort does it. Each block's queries are then cut into *tasks* of
# limited size for the GPU's 132 processors, so that a block which everybody
# wants is not one processor's work while the others wait. The plan below is what `kv_block_plan.py` makes of
# random choices, with block 2 made popular, and tasks of at most 32 queries
# (256 in practice). A query's own block is always done by its tile, which alone
# knows that later keys must stay hidden.

# %%
rng = np.random.default_rng(0)
num_queries, num_blocks, top_k = 128, 16, 4
positions = num_blocks * 128 - num_queries + np.arange(num_queries)
ids = np.stack([
  np.sort(np.append(rng.choice(num_blocks - 1, top_k - 1, replace=False), 15))
  for _ in range(num_queries)
])  # fmt: skip
popular = rng.random(num_queries) < 0.7
ids[popular & ~(ids == 2).any(1), 0] = 2
ids = np.sort(ids, axis=1)
geometry = tile_plan.Geometry(
  num_blocks=num_blocks, block_size=128, top_k=top_k, chunk=num_queries,
  tile=8, span=num_queries, task=32, shared_cost=1e9, slack=0.0,
)
tiles = tile_plan.plan_tiles(
  jnp.asarray(ids)[None], jnp.asarray(positions)[None],
  jnp.full((1, 2, num_blocks), mosaic.NEVER), geometry,
)
edges = tile_plan.plan_edges(tiles.choices[None], tiles.is_edge[None], geometry)
tasks = np.asarray(edges.tasks)[: int(edges.chunks[0, 1])]
order = np.asarray(edges.order)

figure, panels = plt.subplots(
  1, 2, figsize=(11, 4.6), layout="constrained", width_ratios=(1, 1.5)
)
colours = plt.get_cmap("turbo", num_blocks)  # no grey, which is the own block's
for query, chosen in enumerate(ids):
  panels[0].scatter(
    [query] * top_k, chosen, s=9, marker="s",
    c=["#bbbbbb" if block == 15 else colours(block) for block in chosen],
  )
panels[0].set(
  xlabel="query", ylabel="block that it chose",
  title="Choices (grey: own block, done by tiles)",
)
panels[0].invert_yaxis()
for task, (block, first, count, _) in enumerate(tasks):
  queries = order[first : first + count] // top_k
  panels[1].scatter(
    [task] * count, queries, s=14, marker="_", color=colours(block)
  )
  panels[1].annotate(
    str(block), (task, num_queries + 3), ha="center", fontsize=8
  )
panels[1].set_xticks(range(len(tasks)))
panels[1].grid(axis="x", lw=0.4)
panels[1].set(
  xlabel="task, in the order of work (above: its block)",
  ylabel="queries gathered by the task", ylim=(-3, num_queries + 12),
  title=f"The list: {len(tasks)} tasks; popular block 2 gets several",
)
plt.show()
for block in (2, 3):
  sizes = [int(task[2]) for task in tasks if task[0] == block]
  print(f"block {block}: {sum(sizes)} queries, in tasks of {sizes}")

# %% [markdown]
# ## Run them yourself
#
# The same kernels run on a CPU in Pallas's interpret mode, which imitates the
# GPU's threads, barriers and asynchronous copies: slow (the time below says
# nothing about speed), but the same program. On a Hopper GPU this cell runs them
# for real. Beside them stands the *reference*: plain JAX with dense masks.

# %%
try:
  mosaic.require_hopper()
  interpret, config = False, None
except NotImplementedError as error:
  print(f"interpreted: {error}\n")
  interpret = True
  # One program at a time and fewer threads suit the interpreter.
  config = dataclasses.replace(
    sparse_attention_fwd.heuristic_config(),
    num_ctas=1, edge_warpgroups=2, query_stages=2,
  )

case = cases.Case(
  tokens=RUN_TOKENS, num_heads=16, num_kv_heads=1, head_dim=64, index_dim=64,
  block_size=64, top_k=3,
)
sizes = dict(block_size=case.block_size)
index_q, index_k = cases.index_inputs(jax.random.key(1), case, "random")
q, k, v = cases.attention_inputs(jax.random.key(2), case)

start = time.perf_counter()
chosen = select_blocks.select_blocks(
  index_q, index_k, top_k=case.top_k, num_local_blocks=1, interpret=interpret,
  score_precision="exact", kv_lengths=None, **sizes,
)
wanted = msa_jax.select_blocks(
  index_q, index_k, top_k=case.top_k, implementation="reference", **sizes
)
same = np.mean(np.all(np.asarray(chosen == wanted), axis=-1))
print(f"selection: {100 * same:.1f} % of the rows equal the reference's")

out, lse = sparse_attention.sparse_attention(
  q, k, v, chosen, scale=case.head_dim**-0.5, kv_lengths=None, config=config,
  interpret=interpret, **sizes,
)
truth, true_lse = msa_jax.sparse_attention(
  *(x.astype("float32") for x in (q, k, v)), chosen, return_lse=True,
  implementation="reference", **sizes,
)
error = np.abs(np.asarray(out, np.float32) - np.asarray(truth))
lse_error = float(np.abs(np.asarray(lse) - np.asarray(true_lse)).max())
print(
  f"attention: largest error {error.max():.4f} of values up to"
  f" {np.abs(np.asarray(truth)).max():.2f}; log sum exp {lse_error:.1e}"
)
print(f"{time.perf_counter() - start:.0f} s")

# %% [markdown]
# The error must look like rounding to bfloat16 and nothing more. Left, outputs
# lie on the diagonal. Right, the dashed line is what rounding the output alone
# may add. Large entries stay near it; small ones are sums of larger terms that
# cancel, and keep the rounding error of those (probabilities are rounded before
# their product with the values, as in any fast attention).

# %%
figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
size = np.abs(np.asarray(truth)).reshape(-1)
pick = np.random.default_rng(0).choice(size.size, min(6000, size.size), False)
panels[0].plot(
  np.asarray(truth).reshape(-1)[pick],
  np.asarray(out, np.float32).reshape(-1)[pick],
  ".", ms=2, color=BLUE, rasterized=True,
)
panels[0].set(
  xlabel="reference (float32)", ylabel="kernel (bfloat16)",
  title="Entries of the output",
)
panels[1].loglog(
  size[pick], error.reshape(-1)[pick] + 1e-8, ".", ms=2, color=BLUE,
  rasterized=True,
)
line = np.geomspace(1e-3, size.max(), 50)
panels[1].loglog(
  line, line * float(jnp.finfo("bfloat16").eps) / 2, "--", color=ORANGE, lw=2,
  label="rounding of the output",
)
panels[1].set(
  xlim=(1e-3, None), ylim=(1e-6, None), xlabel="size of the entry",
  ylabel="absolute error", title="Its error",
)
panels[1].legend()
plt.show()

# %% [markdown]
# ## Where to go on
#
# * `benchmarks/results/LOG.md`: every version that was tried, and what it
#   gave, for the backward, KL and warm-up kernels too.
# * `python -m benchmarks` on a Hopper GPU measures again; this notebook
#   then draws your numbers (set `RESULTS`).
# * `03_gqa_against_msa` puts speed beside quality.
