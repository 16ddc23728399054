# %% [markdown]
# # What MSA selects
#
# In ordinary (*dense*) attention every token attends to all tokens before it.
# In MiniMax Sparse Attention (MSA) it attends to a few *blocks* of them. A
# small *Index Branch*, with queries and keys of its own, chooses the blocks:
#
# 1. **score** every earlier token: index query · index key;
# 2. **block max**: the score of a block is the largest score of its tokens;
# 3. **top-k**: the best blocks are kept, and the query's own block always is;
# 4. **attention** as usual, over the tokens of the chosen blocks.
#
# Top-k has no gradient, so the Index Branch has its own loss: the **KL
# divergence** between attention's distribution over tokens and the distribution
# that the index scores give.
#
# This notebook trains a model of one layer, which takes about a minute on two
# CPU cores, and looks at each of these steps: first in heat maps, then for a
# single query.

# %%
import dataclasses

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import msa_jax
from msa_jax.layers import partial_rope
from train import config, configs, data, evaluate, program
from train.report.figures import COLORS, STYLE

plt.rcParams.update(STYLE)
BLUE, ORANGE, GREEN, PINK, *_ = COLORS
GREY = "#bbbbbb"

# %%
STEPS = 240  # of training
WARMUP = 100  # the first steps, with dense attention
EVAL_BATCHES = 8  # held-out batches of 16 sequences

# %% [markdown]
# ## A model small enough to look into
#
# The task is *associative recall*. A sequence of 256 tokens consists of filler
# tokens and of facts such as "key 3 has value 5", each in one token. Later the
# sequence names each key once, and the model must answer with its value. A fact
# is from 1 to 254 tokens back, so far facts are answered only if attention
# reaches them.
#
# The sequence has 16 blocks of 16 tokens. A query reads 4 of them: its own and
# three that the Index Branch chooses. The four query heads form two *groups*,
# and each group chooses for itself.
#
# Training begins with a *warm-up*: attention is dense, and the Index Branch
# learns to follow it. Then attention becomes sparse.

# %%
preset = next(
  run
  for run in configs.preset("demo").runs
  if (run.task, run.side) == ("recall", "msa")
)
run = dataclasses.replace(
  preset,
  model=dataclasses.replace(preset.model, num_layers=1),
  data=data.RecallConfig(num_keys=16, num_facts=16),
  optimizer=dataclasses.replace(
    preset.optimizer,
    warmup_steps=min(20, STEPS),
    index_learning_rate_factor=4.0,
  ),
  recipe=config.RecipeConfig(index_warmup_steps=WARMUP),
  num_steps=STEPS,
)
source = data.load(run.data)
trainer = program.Program(program.compile_key(run))
state = trainer.init(run.seed)
index = run.model.index
block_size, top_k = index.block_size, index.top_k
num_blocks = run.context // block_size

measured, curves = {}, []
for step in range(1, STEPS + 1):
  if step in (1, WARMUP + 1):
    name = "untrained" if step == 1 else "after the warm-up"
    measured[name] = evaluate.layer_metrics(
      trainer, state.params, source, "sparse"
    )
  batch = source.train_batch(
    run.seed, step - 1, batch_size=run.batch_size, context=run.context
  )
  state, metrics = program.train_step(trainer, run, state, batch, step)
  curves.append([metrics["loss"], metrics["kl"]])
measured["after training"] = evaluate.layer_metrics(
  trainer, state.params, source, "sparse"
)
loss, kl = np.array(jax.device_get(curves)).T

# %%
figure, panels = plt.subplots(1, 2, figsize=(11, 3.4), layout="constrained")
for axes, values, title in (
  (panels[0], loss, "Loss of the answers (nats)"),
  (panels[1], kl, "KL loss of the Index Branch (nats)"),
):
  axes.axvspan(0, WARMUP, color="#eeeeee", lw=0)
  axes.plot(np.arange(1, STEPS + 1), values, color=BLUE, lw=1)
  axes.annotate(
    "warm-up: dense", (WARMUP / 2, 0.96), xycoords=("data", "axes fraction"),
    ha="center", va="top", fontsize=10, color="#555555",
  )
  axes.set(title=title, xlabel="training step", xlim=(0, STEPS))
  axes.set_ylim(bottom=0)
panels[0].axhline(np.log(8), color="#555555", ls="--", lw=1)
panels[0].annotate(
  "chance: one of 8 values", (STEPS, np.log(8)), xytext=(0, -4),
  textcoords="offset points", ha="right", va="top", fontsize=10,
)
plt.show()

# %% [markdown]
# ## Same weights, dense and sparse
#
# The trained model answers the same held-out questions twice: with sparse
# attention, as it was trained, and with dense attention. Where sparse attention
# answers fewer, the wrong blocks were chosen. A fact in the query's own block
# (left of the first mark) does not depend on the choice.

# %%
figure, axes = plt.subplots(figsize=(8, 3.8), layout="constrained")
for phase, label, colour in (
  ("warmup", "dense attention", GREY),
  ("sparse", "MSA: 4 of 16 blocks", ORANGE),
):
  result = evaluate.held_out_metrics(
    trainer, state.params, source, phase, batches=EVAL_BATCHES, probe_batches=0
  )
  bins = result["by_distance"]
  axes.plot(
    [np.sqrt(b["low"] * b["high"]) for b in bins],
    [100 * b["accuracy"] for b in bins],
    "o-", color=colour, lw=2.2,
    label=f"{label}: {100 * result['accuracy']:.0f} % in all",
  )
axes.axhline(100 / 8, color="#555555", ls="--", lw=1, label="chance")
for name, x in (("own block", block_size), ("tokens read", 4 * block_size)):
  axes.axvline(x, color="#999999", lw=1, ls=":")
  axes.annotate(
    name, (x, 1.01), xycoords=("data", "axes fraction"), ha="center",
    fontsize=9, color="#555555",
  )
axes.set_xscale("log", base=2)
axes.set(
  xlabel="distance back to the fact (tokens)", ylabel="answers right (%)",
  ylim=(0, 103),
)
axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
axes.legend(loc="lower left", bbox_to_anchor=(0, 0.15))
plt.show()

# %% [markdown]
# ## A sequence, and the query that we will follow
#
# This is a held-out sequence, drawn with one block on each line. The query that
# we follow names a key whose fact is far back, outside its own block.

# %%
model = trainer.merge(state.params)
batch = source.eval_batch(0, **trainer.eval_shape)
tokens, distance = batch.tokens[:1, :-1], batch.distance[0]
output = jax.jit(
  lambda model, tokens: model(tokens, with_kl=True, with_selection=True)
)(model, tokens)
answers = np.asarray(output.logits[0].argmax(-1))
asked = np.flatnonzero(distance >= 0)
facts = asked - distance[asked]
right = answers[asked] == batch.tokens[0, 1:][asked]

# The last question whose fact is far back, of those answered right if any is.
far = facts // block_size < asked // block_size - 2
t = int(asked[np.lexsort((asked, right, far))[-1]])
fact = int(t - distance[t])

grid = np.zeros(run.context, int)
grid[facts], grid[asked] = 1, 2
figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
axes.pcolormesh(
  grid.reshape(num_blocks, block_size), edgecolors="white", lw=1.2,
  cmap=plt.matplotlib.colors.ListedColormap(["#eeeeee", BLUE, ORANGE]),
)
center = {
  name: (token % block_size + 0.5, token // block_size + 0.5)
  for name, token in (("fact", fact), ("query", t))
}
axes.annotate(
  "", center["fact"], center["query"],
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
print(
  f"followed: the question at token {t} (block {t // block_size}); its fact is"
  f" {distance[t]} tokens back,\nat token {fact} (block {fact // block_size})."
  f" {right.sum()} of {right.size} questions of this sequence are answered"
  " right."
)

# %% [markdown]
# ## What dense attention reads, and what is selected
#
# First we compute the inputs of attention with the layer's own modules:
# queries, keys and values, and the Index Branch's queries (one for each group)
# and keys (one for all groups). `msa_jax.select_blocks` is the selection, steps
# 1 to 3 above. The last line checks that the model chose the same blocks.

# %%
layer = model.layers[0]
parts = layer.attention
h = layer.attention_norm(model.embed(tokens))
heads = [
  norm(linear(h) if linear is not parts.index_key else linear(h)[:, :, None])
  for linear, norm in (
    (parts.query, parts.query_norm),
    (parts.key, parts.key_norm),
    (parts.index_query, parts.index_query_norm),
    (parts.index_key, parts.index_key_norm),
  )
]
q, k, index_q, index_k = (
  partial_rope(
    x, jnp.arange(run.context), rope_dim=parts.rope_dim, theta=parts.rope_theta
  )
  for x in heads
)
v, index_k = parts.value(h), index_k[:, :, 0]

chosen = msa_jax.select_blocks(
  index_q, index_k, block_size=block_size, top_k=top_k
)
assert (chosen == output.selection.block_indices[0]).all()

# %% [markdown]
# Each line of a map is one question of the sequence, and each column is one of
# the 16 blocks. A ring marks the block of the question's fact.
#
# * **Left**: dense attention's weight on each block (mean of the group's
#   heads). The blocks with most weight are those that *should* be read.
# * **Middle**: the Index Branch's score of each block, which is the maximum
#   over the block's tokens. Dots mark the 4 chosen blocks.
# * **Right**: the 4 chosen blocks against the 4 blocks with most of dense
#   attention's weight ("wanted"). Green: wanted and chosen. Orange: wanted, not
#   chosen. Dark grey: chosen, though others have more weight (the own block is
#   always chosen).
#
# What matters is that each ring is green in one of the groups, because the
# groups look up different keys. The rest of a question's attention is spread
# over many blocks of little weight. Which of those are among the 4 "wanted"
# ones is nearly random, and most of the orange cells are such blocks.

# %%
num_groups = run.model.num_kv_heads
group_size = run.model.num_heads // num_groups
grouped = np.asarray(q)[0].reshape(run.context, num_groups, group_size, -1)
causal = np.tril(np.ones((run.context, run.context), bool))
scores = np.einsum("tghd,sgd->ghts", grouped, np.asarray(k)[0])
scores = np.where(causal, scores * run.model.head_dim**-0.5, -np.inf)
dense = np.asarray(jax.nn.softmax(scores)).mean(axis=1)  # group, query, key
by_block = (num_groups, run.context, num_blocks, block_size)
mass = dense.reshape(by_block).sum(-1)

index_scores = np.einsum("tgi,si->gts", index_q[0], index_k[0])
index_scores = np.where(causal, index_scores, -np.inf)
block_max = index_scores.reshape(by_block).max(-1)

visible = np.arange(num_blocks) <= np.arange(run.context)[:, None] // block_size
is_chosen = (np.asarray(chosen)[0, ..., None] == np.arange(num_blocks)).any(2)
order = np.argsort(-np.where(visible, mass, -1), axis=-1, kind="stable")
is_wanted = np.zeros_like(is_chosen)
np.put_along_axis(is_wanted, order[..., :top_k], True, axis=-1)
is_wanted &= visible

hidden = ~visible[asked]
lines = np.arange(len(asked)) + 0.5
dark = plt.get_cmap("viridis").with_extremes(bad="white")
agree = plt.matplotlib.colors.ListedColormap(
  ["#eeeeee", "#999999", ORANGE, GREEN]
)
figure, panels = plt.subplots(
  num_groups, 3, figsize=(12, 8.5), sharex=True, sharey=True,
  layout="constrained",
)
for g, (left, middle, end) in enumerate(panels):
  cells = dict(edgecolors="white", lw=0.8)
  image = left.pcolormesh(
    np.ma.masked_array(mass[g, asked], hidden), cmap=dark, vmin=0, vmax=0.5,
    **cells,
  )
  figure.colorbar(image, ax=left, extend="max", label="attention weight")
  image = middle.pcolormesh(
    np.ma.masked_array(block_max[g, asked], hidden), cmap=dark, **cells
  )
  figure.colorbar(image, ax=middle, label="score of the block")
  query, block = np.nonzero(is_chosen[g, asked])
  middle.plot(block + 0.5, query + 0.5, "o", ms=5, color="white", mec="black")
  end.pcolormesh(
    np.ma.masked_array((is_chosen[g] + 2 * is_wanted[g])[asked], hidden),
    cmap=agree, vmin=0, vmax=3, **cells,
  )
  for axes, colour in ((left, "white"), (end, "black")):
    axes.plot(
      facts // block_size + 0.5, lines, "o", ms=11, mfc="none", mec=colour,
      mew=1.8,
    )
  left.set_ylabel(f"group {g}: question at token")
  for axes in (left, middle, end):
    axes.grid(False)
    axes.set_xticks(np.arange(0, num_blocks, 3) + 0.5, range(0, num_blocks, 3))
    axes.set_yticks(lines, asked)
for axes, title in zip(
  panels[0],
  (
    "dense attention by block", "index score by block",
    "wanted and chosen (green)",
  ),
):
  axes.set_title(title)
for axes in panels[-1]:
  axes.set_xlabel("block of keys")
panels[0, 0].invert_yaxis()
plt.show()

# %% [markdown]
# ## One query, step by step
#
# Now only the question that we follow, in one group. All of it is computed here
# in NumPy for this one query, and compared with what the library gives.
#
# 1. **Index scores** of all tokens before the query. Facts have higher scores
#    than filler. The fact asked for need not have the highest score; it is
#    enough that its block is among the best.
# 2. **Block max**, drawn as bars. The three highest are kept, and the own block
#    (hatched) whatever its score is.
# 3. **Attention.** Sparse attention is the same softmax over fewer tokens:
#    weights outside the chosen blocks become 0, and those inside grow, in each
#    head by one common factor.
# 4. **KL.** The *teacher* is the attention of step 3. The *student* is the
#    softmax of the index scores over the same tokens. Where the teacher is high
#    and the student is low, training raises the score.

# %%
# The group with more attention on the fact.
g = int(dense[:, t, fact].argmax())
own = t // block_size
others = np.argsort(-block_max[g, t, :own], kind="stable")[: top_k - 1]
picked = np.sort(np.append(others, own))
inside = np.isin(np.arange(run.context) // block_size, picked) & causal[t]
sparse = np.where(inside, scores[g, :, t], -np.inf)  # of each head
sparse = np.asarray(jax.nn.softmax(sparse))
teacher = sparse.mean(axis=0)
student = np.where(inside, index_scores[g, t] * index.index_dim**-0.5, -np.inf)
student = np.asarray(jax.nn.softmax(student))
terms = np.where(
  teacher > 0,
  teacher * np.log(np.maximum(teacher, 1e-30) / student.clip(1e-30)),
  0,
)

assert picked.tolist() == [i for i in np.asarray(chosen)[0, g, t] if i >= 0]
attended = msa_jax.sparse_attention(q, k, v, chosen, block_size=block_size)
by_hand = sparse @ np.asarray(v)[0, :, g]
members = slice(g * group_size, (g + 1) * group_size)
np.testing.assert_allclose(attended[0, t, members], by_hand, atol=1e-5)
only = jnp.arange(run.context)[None] == t  # the KL of this query alone
library_kl = msa_jax.index_kl_loss(
  q[:, :, members], k[:, :, g : g + 1], index_q[:, :, g : g + 1], index_k,
  chosen[:, g : g + 1], block_size=block_size, query_mask=only,
)
np.testing.assert_allclose(library_kl, terms.sum(), atol=1e-5)

# %%
x = np.arange(t + 1)
block_of = x // block_size
figure, panels = plt.subplots(
  4, 1, figsize=(11, 10), sharex=True, layout="constrained"
)
for axes in panels:
  for block in picked:
    axes.axvspan(
      block * block_size - 0.5, (block + 1) * block_size - 0.5,
      color="#e8f1f8", lw=0, zorder=0,
    )
  axes.grid(False)
  axes.axvline(fact, color="black", ls=":", lw=1, zorder=1)
panels[0].bar(x, index_scores[g, t, x], 1, color=ORANGE)
panels[0].set_title(
  f"1. Index scores of the {t + 1} visible tokens", loc="left"
)
panels[0].annotate(
  "the fact", (fact, 0.97), xycoords=("data", "axes fraction"), xytext=(5, 0),
  textcoords="offset points", va="top",
)
ids = np.arange(own + 1)
panels[1].bar(
  ids * block_size + block_size / 2 - 0.5, block_max[g, t, ids],
  block_size - 1.5,
  color=[BLUE if i in picked else GREY for i in ids],
  hatch=["///" if i == own else "" for i in ids], edgecolor="white",
)
panels[1].set_title(
  f"2. Block max, and the top {top_k}: blocks {', '.join(map(str, picked))}"
  f" (own: {own}, hatched)", loc="left",
)
panels[2].bar(x, teacher[x], 1, color=BLUE, label="sparse")
panels[2].step(
  x, dense[g, t, x], where="mid", color="black", lw=1, label="dense"
)
panels[2].set_title(
  "3. Attention weights (mean of the group's heads): dense puts"
  f" {100 * mass[g, t, picked].sum():.0f} % on the chosen blocks", loc="left",
)
panels[2].legend(loc="upper right")
panels[3].bar(x, teacher[x], 1, color=BLUE, label="teacher: attention")
panels[3].step(
  x, student[x], where="mid", color=ORANGE, lw=1.5,
  label="student: softmax of index scores",
)
panels[3].set_title(
  f"4. KL of this query: {terms.sum():.3f} nats, of which the fact's token"
  f" {terms[fact]:+.3f}", loc="left",
)
panels[3].legend(loc="upper right")
panels[3].set(xlabel="token (shaded: the chosen blocks)", xlim=(-1, t + 1))
for axes, label in zip(panels, ("score", "score", "weight", "probability")):
  axes.set_ylabel(label)
plt.show()

# %% [markdown]
# ## Is this query typical?
#
# Four metrics say how well the Index Branch follows attention. They are means
# over a batch of held-out sequences, at three times of training:
#
# * **block recall**: of the 4 blocks with most of attention's weight, the share
#   that was chosen. Queries with nearly equal weights everywhere count as much
#   as the others.
# * **score recall**: the share of attention's weight on the chosen blocks.
# * **facts found**: of the facts outside the own block, the share whose block
#   was chosen by some group. Right answers depend on it.
# * **KL**: over the tokens of the chosen blocks.
#
# An Index Branch that chose at random would not have a recall of 0, because it
# chooses 4 of at most 16 blocks, and always the own block.

# %%
print(f"{'':20}{'block recall':>13}{'score recall':>13}{'facts found':>12}"
      f"{'KL, nats':>10}")  # fmt: skip
for name, (layer_kl, selection, found) in measured.items():
  print(
    f"{name:20}{selection.block_recall[0]:13.2f}"
    f"{selection.score_recall[0]:13.2f}{found[0]:12.2f}{layer_kl[0]:10.3f}"
  )

# %% [markdown]
# ## What to take away
#
# * The Index Branch need not reproduce attention. It must rank the block that
#   matters among the best few, and one token with a high score is enough for
#   that.
# * Its scores are dot products of one small head for each group, without
#   softmax and values. That makes scoring *all* tokens cheap, while the
#   expensive heads read a fixed number of tokens.
# * Its loss trains the index projections only, so that it does not change what
#   attention learns. But attention cannot read what the Index Branch misses,
#   which explains the gap between the two curves above.
#
# `02_the_kernels` shows how a GPU does this at a million tokens, and
# `03_gqa_against_msa` shows what it costs in quality and saves in time.
