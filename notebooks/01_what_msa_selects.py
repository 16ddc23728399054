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
# single query. `notebooks/pictures.py` draws the pictures; the cells compute what
# they show.

# %%
import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np

sys.path[:0] = [".", ".."]  # the repository, seen from itself or from notebooks
import msa_jax
from msa_jax.layers import partial_rope
from notebooks import pictures
from train import config, configs, data, evaluate, program

pictures.setup()

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
pictures.training(loss, kl, WARMUP, chance=np.log(run.data.num_values))

# %% [markdown]
# ## Same weights, dense and sparse
#
# The trained model answers the same held-out questions twice: with sparse
# attention, as it was trained, and with dense attention. Where sparse attention
# answers fewer, the wrong blocks were chosen. A fact in the query's own block
# (left of the first mark) does not depend on the choice.

# %%
results = {
  label: evaluate.held_out_metrics(
    trainer, state.params, source, phase, batches=EVAL_BATCHES, probe_batches=0
  )
  for phase, label in (
    ("warmup", "dense attention"), ("sparse", "MSA: 4 of 16 blocks")
  )
}
marks = {"own block": block_size, "tokens read": top_k * block_size}
pictures.answers(results, marks, chance=source.chance)

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

pictures.sequence(facts, asked, fact, t, block_size, num_blocks)
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
# Of an index head, other dims may rotate, here none.
index_rope_dim = parts.index.rotated(parts.rope_dim)
rope_dims = parts.rope_dim, parts.rope_dim, index_rope_dim, index_rope_dim
q, k, index_q, index_k = (
  partial_rope(
    x, jnp.arange(run.context), rope_dim=rope_dim, theta=parts.rope_theta
  )
  for x, rope_dim in zip(heads, rope_dims)
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
# The two groups share the colours of a map, so that they can be compared.
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

pictures.block_maps(
  asked, facts // block_size, mass[:, asked], block_max[:, asked],
  is_chosen[:, asked], is_wanted[:, asked], hidden=~visible[asked],
)

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
seen = slice(t + 1)
pictures.one_query(
  index_scores[g, t, seen], block_max[g, t, : own + 1], picked, fact,
  dense[g, t, seen], teacher[seen], student[seen], terms.sum(),
)
print(
  f"KL of this query: {terms.sum():.3f} nats, of which the fact's token"
  f" {terms[fact]:+.3f}"
)

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
#   attention learns. But attention cannot read what the Index Branch misses.
#   Here it misses few facts, so the two curves of answers above nearly agree.
#
# `02_the_kernels` shows how a GPU does this at a million tokens, and
# `03_gqa_against_msa` shows what it costs in quality and saves in time.
