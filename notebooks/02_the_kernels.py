# %% [markdown]
# # The kernels: what bounds them, and what each design gains
#
# In MiniMax Sparse Attention (MSA) a query does not read all earlier keys, but
# 16 blocks of 128 keys. Two steps replace dense attention:
#
# 1. **Selection.** A small *index* head scores every earlier key. The score of
#    a block is the largest score of its keys, and the best 16 blocks are kept.
#    The time is still quadratic in the length, but with 4 index heads and no
#    softmax.
# 2. **Attention.** Exact softmax attention over the chosen blocks only. The 16
#    query heads of a *group* share one key/value head and one choice of blocks.
#
# Both are Pallas kernels for NVIDIA Hopper GPUs, in `pallas_kernels/`. This
# notebook draws the times that `python -m benchmarks` measured beside the
# limits of the chip, explains the ideas of the kernels, and runs two of them at
# its end. It needs no GPU.

# %%
import os

# Interpret mode blocks one CPU thread for each warpgroup of a kernel, so that it
# needs more threads than there are cores.
os.environ.setdefault("NPROC", "16")

import dataclasses
import json
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

sys.path[:0] = [".", ".."]  # the repository, seen from itself or from notebooks
import msa_jax
from benchmarks import cases, measure, records
from msa_jax import selection_stats
from pallas_kernels import (
  mosaic,
  select_blocks,
  sparse_attention,
  sparse_attention_fwd,
  tile_plan,
)
from train.report.figures import COLORS, STYLE

plt.rcParams.update(STYLE)
BLUE, ORANGE, GREEN, PINK, *_ = COLORS

# %%
RESULTS = "nvidia_h100_80gb_hbm3.json"  # the measurements to draw
KEY_TOKENS = 1 << 15  # keys among which the drawn choices are made
RUN_TOKENS = 512  # queries of the kernels that run in this notebook

# %%
results = json.loads((records.FOLDER / RESULTS).read_text())
fields = {field.name for field in dataclasses.fields(cases.Case)}
measured = [
  record
  for record in results["rows"]
  # The paper's heads: 64 query heads and 4 key/value heads of 128.
  if cases.Case(**{k: record[k] for k in fields}) in cases.PAPER.values()
]


def find(op, selection, precision="exact"):
  """The records of an op by number of tokens."""
  wanted = (op, selection, precision)
  found = [
    record
    for record in measured
    if (record["op"], record["selection"], record["score_precision"]) == wanted
  ]
  return {
    record["tokens"]: record
    for record in sorted(found, key=lambda record: record["tokens"])
  }


def length(tokens):
  return f"{tokens >> 10}K" if tokens < 1 << 20 else f"{tokens >> 20}M"


matmul = np.mean([record["matmul_tflops"] for record in measured])
copy = np.mean([record["copy_tbs"] for record in measured])
print(f"{results['device']}, jax {results['jax']}")
print("measured in the same runs:")
print(f"a matrix product of 8192 {matmul:.0f} TFLOP/s,", end=" ")
print(f"a copy {copy:.2f} TB/s (read and written)")

# %% [markdown]
# ## Where the time goes
#
# The bars are the time for 1,024 tokens of a prompt. For dense attention it
# grows with the length. For MSA's attention step it does not, because each
# query reads 2,048 keys at any length. For selection it grows, but selection
# has a 32nd of the operations of dense attention. *Random* choices are the
# worst case: neighbouring queries choose almost no blocks in common.
# *Trained-like* choices share blocks as those of trained models do: the own
# block, the first block, and blocks that change slowly from query to query.

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
# A kernel is bound by the tensor cores (the flat roof) or by memory (the
# slope). Which one depends on the number of operations for each byte that it
# moves. The points are measured.
#
# * **Selection** loads a key once for 256 queries, so the tensor cores bound
#   it. Only smaller operands (fp8, which has its own roof) make it faster.
# * **Attention has two kernels.** The *pair* kernel works on (query, block)
#   pairs. For each pair it reads the query's 16 heads (4 KB), writes their
#   partial result (4 KB), and the final sum reads that again (4 KB). With 1
#   million operations for each pair, this is about 85 operations a byte, so the
#   memory bounds it. The *tile* kernel loads a block (64 KB of keys and values)
#   once for 8 neighbouring queries and has no partial results. It moves as many
#   bytes, but they come from the L2 cache, so its point may lie above the slope
#   of the main memory.

# %%
# Operations for each byte that the two kernels move.
paper = cases.Case(tokens=1 << 17)
group = paper.num_heads // paper.num_kv_heads
query_bytes = group * paper.head_dim * 2  # a query's heads of one group
pair_flops = 4 * group * paper.block_size * paper.head_dim
pair_intensity = pair_flops / (3 * query_bytes)
block_bytes = 2 * paper.block_size * paper.head_dim * 2  # keys and values

figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
x = np.geomspace(20, 4000, 200)
axes.plot(x, np.minimum(copy * x, matmul), color="black", lw=2)
axes.annotate(f"memory: {copy:.2f} TB/s", (40, 106))
axes.annotate(f"bf16 matrix product: {matmul:.0f} TFLOP/s", (700, 615))
fp8 = records.BOUND_TFLOPS["fp8"]
axes.plot(x, np.where(copy * x > matmul, np.minimum(copy * x, fp8), np.nan),
          color=PINK, lw=1.5, ls="--")
axes.annotate(f"best fp8 rate seen: {fp8:.0f} TFLOP/s", (700, 1350), color=PINK)
for precision, colour, bytes_per_entry in (
  ("exact", ORANGE, 2),
  ("fp8", PINK, 1),
):
  record = find("select", "trained_like", precision)[1 << 17]
  # One key tile against 256 queries: 2 operations for each entry and query.
  axes.plot(
    2 * 256 / bytes_per_entry, record["tflops"], "s", ms=10, color=colour,
    label=f"selection, {'bf16' if precision == 'exact' else 'fp8'}",
  )
for selection, colour, name in (
  ("random", BLUE, "random choices (pairs)"),
  ("trained_like", GREEN, "trained-like choices (tiles)"),
):
  record = find("sparse_forward", selection)[1 << 17]
  if selection == "random":
    intensity = pair_intensity
  else:
    chosen = 8 * paper.top_k * pair_flops
    intensity = chosen / (record["union8"] * block_bytes)
  axes.plot(
    intensity, record["tflops"], "o", ms=10, color=colour,
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
# ## Selection: sort while the tensor cores work
#
# No array of size tokens x tokens is ever written: a score stays in registers
# until the maximum of its block is taken. The costly part is the running list
# of the 16 best blocks. If the threads that compute the scores also keep this
# list, the tensor cores wait for them. If another *warpgroup* (128 threads)
# keeps it while they multiply, it costs almost no time. The times are read from
# the tuning log.

# %%
log = (records.FOLDER / "LOG.md").read_text()
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
  range(len(table)), [textwrap.fill(line[0], 52) for line in table], fontsize=9
)
axes.invert_yaxis()
axes.grid(False)
axes.set_xlabel("milliseconds at 128K tokens")
axes.set_title(
  "Selection: grey computes scores only (lower bound), green is in use"
)
plt.show()

# %% [markdown]
# ## Attention: how much do neighbours share?
#
# These are choices of 8 neighbouring queries among 256 blocks (one group, 16
# blocks each), made as in the benchmark. A column is a block that at least one
# of the 8 queries chose. In the upper picture nearly every block was chosen by
# one query only. In the lower one the 8 queries chose the same few blocks, so
# that loading a block once serves several queries.

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
    f" different blocks (mean of all tiles"
    f" {float(selection_stats.union8(ids)):.0f})"
  )
panels[1].set_xlabel(
  "blocks that one of the 8 chose;  blue: chosen by several,  orange: by one"
)
plt.show()

# %% [markdown]
# ## Two kernels, and the choice between them
#
# Before attention starts, `tile_plan.py` decides on the GPU, for every tile of
# 8 queries, which kernel handles which of its choices:
#
# * **Tile kernel**: one CTA (a thread block of CUDA) keeps the 8 queries and
#   loads blocks one after the other. Its cost is the number of different blocks
#   that the 8 queries chose, their *union*. Each block is multiplied with all 8
#   queries, also with those that did not choose it.
# * **Pair kernel**: one CTA keeps a block and gathers the queries that chose
#   it. Its cost is the number of choices, which is always 8 x 16 = 128, however
#   many blocks are shared.
#
# A block that enough of the 8 queries chose goes to the tile kernel. The other
# choices become pairs, unless the tile kernel could handle all of them at about
# the same cost. Each point is one measured length. Trained-like choices have a
# union of about 25 at every length and are faster. The union of random ones
# grows with the length, and their speed stays at the bound of the pair kernel:
# 12 KB of memory traffic for each choice.

# %%
figure, axes = plt.subplots(figsize=(9, 4.8), layout="constrained")
for selection, colour, marker in (
  ("random", BLUE, "o"), ("trained_like", GREEN, "D"),
):
  found = find("sparse_forward", selection)
  axes.plot(
    [record["union8"] for record in found.values()],
    [record["tflops"] for record in found.values()],
    marker, ms=9, color=colour,
    label=f"measured, {selection.replace('_', '-')}",
  )
  if selection == "random":
    for tokens, record in found.items():
      above = tokens == max(found)
      axes.annotate(
        length(tokens), (record["union8"], record["tflops"]),
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
  label="tile kernel: tensor-core rate, all 8 queries x the union",
)
axes.axhline(
  copy * pair_intensity, color="#555555", ls="--", lw=1.3,
  label=f"pair kernel: {3 * query_bytes >> 10} KB a choice at the copy rate",
)
axes.set(
  ylim=(0, 500), xlim=(14, 130),
  xlabel="different blocks that 8 neighbouring queries choose (16 each)",
  ylabel="useful TFLOP/s",
  title="Attention over chosen blocks: measured, and the bound of each kernel",
)
axes.legend(loc="upper right")
plt.show()

# %% [markdown]
# ## The tasks of the pair kernel
#
# The pair kernel needs the choices in the other direction: not *query → blocks*
# but *block → queries*. A sort gives that. The queries of each block are then
# cut into *tasks* of limited size for the GPU's 132 streaming multiprocessors
# (SMs), so that a block which many queries chose is not left to one SM while the
# others wait.
# Below is the plan that `tile_plan.py` makes of random choices, in which block
# 2 was made popular, with tasks of at most 32 queries (256 in practice). A
# query's own block always goes to the tile kernel, because only that one masks
# keys after the query.

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
  num_blocks=num_blocks, block_size=128, top_k=top_k, pack=1,
  chunk=num_queries, tile=8, span=num_queries, task=32, shared_cost=1e9,
  slack=0.0,
)
_, choices = tile_plan.plan_by_choice(
  jnp.asarray(ids)[None], jnp.asarray(positions)[None],
  jnp.full((1, 2, num_blocks), mosaic.NEVER), geometry,
)
is_pair = tile_plan.find_pairs(choices, geometry)
pairs = tile_plan.plan_pairs(choices.choices[None], is_pair[None], geometry)
tasks = np.asarray(pairs.tasks)[: int(pairs.chunks[0, 1])]
order = np.asarray(pairs.order)

figure, panels = plt.subplots(
  1, 2, figsize=(11, 4.6), layout="constrained", width_ratios=(1, 1.5)
)
# A colour map without grey, which marks the own block.
colours = plt.get_cmap("turbo", num_blocks)
for query, chosen in enumerate(ids):
  panels[0].scatter(
    [query] * top_k, chosen, s=9, marker="s",
    c=["#bbbbbb" if block == 15 else colours(block) for block in chosen],
  )
panels[0].set(
  xlabel="query", ylabel="block that it chose",
  title="Choices (grey: own block, for the tile kernel)",
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
  title=f"The plan: {len(tasks)} tasks; popular block 2 gets several",
)
plt.show()
for block in (2, 3):
  sizes = [int(task[2]) for task in tasks if task[0] == block]
  print(f"block {block}: {sum(sizes)} queries, in tasks of {sizes}")

# %% [markdown]
# ## Run them yourself
#
# On a CPU the same kernels run in Pallas's interpret mode, which imitates the
# GPU's threads, barriers and asynchronous copies. That is slow, so the time
# below is no measure of speed. On a Hopper GPU this cell runs the compiled
# kernels. Their results are compared with the *reference*, which is plain JAX
# with dense masks.

# %%
try:
  mosaic.require_hopper()
  interpret, config = False, None
except NotImplementedError as error:
  print(f"interpreted: {error}\n")
  interpret = True
  # The interpreter is faster with one CTA at a time and fewer threads.
  config = dataclasses.replace(
    sparse_attention_fwd.Config(),
    num_ctas=1, pair_warpgroups=2, query_stages=2,
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
print(f"selection: {100 * same:.1f} % of the choices equal the reference's")

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
# The error should be that of rounding to bfloat16 and nothing more. On the
# left, outputs lie on the diagonal. On the right, the dashed line is the error
# that rounding the output may add. Large entries stay near it. Small entries
# are sums of larger terms that cancel, and have the rounding error of those
# terms: probabilities are rounded before their product with the values, as in
# other fast attention kernels.

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
# * `benchmarks/results/LOG.md` lists every version that was tried and its
#   times, also for the backward, KL and warm-up kernels.
# * `python -m benchmarks` on a Hopper GPU measures again. To draw your numbers,
#   set `RESULTS` to your file.
# * `03_gqa_against_msa` shows speed beside quality.
