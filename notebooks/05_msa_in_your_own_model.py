# %% [markdown]
# # MSA in your own model
#
# A model of your own, trained with optax on packed rows: a warm-up with dense
# attention, then sparse attention. It trains on a mesh of as many devices as
# there are. The page [MSA in your own model](../docs/own_loop.md) explains each
# line, and has the same for pure functions, Linen and sequences that are split
# over devices.

# %%
import functools
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib import pyplot as plt

sys.path[:0] = [".", ".."]  # the repository, seen from itself or from notebooks
import msa_jax

# %%
STEPS = 400
WARMUP = 160  # steps with dense attention
LOG_EVERY = 10
CONTEXT = 256
BATCH = 8
# Devices of the two axes of the mesh. "fsdp" splits the batch and the stored
# parameters, "tensor" the KV heads: (4, 2) would take eight devices.
MESH = (jax.device_count(), 1)

# %% [markdown]
# **Data.** The source of Python's `json` package and its neighbours, as bytes.
# A row holds two pieces of different files, which see nothing of each other:
# `ids` gives each token its document.

# %%
folder = pathlib.Path(json.__file__).parent.parent
files = [path.read_bytes() for path in sorted(folder.glob("*.py"))]
files = [np.frombuffer(f, np.uint8) for f in files if len(f) > CONTEXT]


def batch(step):
  """tokens and ids [BATCH, CONTEXT + 1]; the same for the same step."""
  rng = np.random.default_rng(step)
  tokens, ids = [], []
  for _ in range(BATCH):
    first = int(rng.integers(CONTEXT // 4, 3 * CONTEXT // 4))
    sizes = first, CONTEXT + 1 - first
    row = []
    for size in sizes:
      file = files[rng.integers(len(files))]
      start = rng.integers(len(file) - size + 1)
      row.append(file[start : start + size])
    tokens.append(np.concatenate(row))
    ids.append(np.repeat([1, 2], sizes))
  return np.array(tokens, np.int32), np.array(ids, np.int32)


# %% [markdown]
# **Model.** `MSAttention` takes the place of the attention of each layer. The
# model adds up the KL losses that the layers return. `sharding` tells a layer
# which axes of the mesh split what; without a mesh, leave it out.


# %%
class Block(nnx.Module):
  def __init__(self, width, rngs):
    self.norms = nnx.List([nnx.RMSNorm(width, rngs=rngs) for _ in range(2)])
    self.attention = msa_jax.MSAttention(
      num_heads=4,
      num_kv_heads=2,
      in_features=width,
      normalize_qk=True,
      index=msa_jax.IndexConfig(index_dim=16, block_size=16, top_k=4),
      sharding=msa_jax.Sharding(),
      rngs=rngs,
    )
    self.up = nnx.Linear(width, 4 * width, rngs=rngs)
    self.down = nnx.Linear(4 * width, width, rngs=rngs)

  def __call__(self, x, **options):
    out, kl, selection = self.attention(
      self.norms[0](x), with_kl=True, **options
    )
    x = x + out
    return x + self.down(nnx.gelu(self.up(self.norms[1](x)))), kl, selection


class Model(nnx.Module):
  def __init__(self, vocab, width, layers, rngs):
    self.embed = nnx.Embed(vocab, width, rngs=rngs)
    self.blocks = nnx.List([Block(width, rngs) for _ in range(layers)])

  def __call__(self, tokens, **options):
    x, kl, selection = self.embed(tokens), 0.0, None
    for block in self.blocks:
      x, layer_kl, selection = block(x, **options)
      kl += layer_kl
    return self.embed.attend(x), kl, selection  # of the last layer


# %% [markdown]
# **Loss and optimizer.** The loss is the language-model loss plus the KL. The
# Index Branch has a clip and a learning rate of its own, because its gradient
# comes from the KL alone. Model and optimizer are made with the mesh in context.


# %%
def loss(model, tokens, ids, phase):
  logits, kl, _ = model(
    tokens[:, :-1], phase=phase, segment_ids=ids[:, :-1], max_segments=4
  )
  # A document's first token is no target of the document before it.
  counts = ids[:, 1:] == ids[:, :-1]
  lm = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
  lm = jnp.sum(lm * counts) / jnp.sum(counts)
  return lm + kl, (lm, kl)


def adam(rate):
  return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate))


mesh = jax.make_mesh(
  MESH, ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2
)
with jax.set_mesh(mesh):
  model = Model(256, 64, 2, nnx.Rngs(0))
  optimizer = nnx.Optimizer(
    model,
    optax.multi_transform(
      {"rest": adam(3e-3), "index": adam(6e-3)}, msa_jax.param_groups
    ),
    wrt=nnx.Param,
  )


@functools.partial(nnx.jit, static_argnames="phase")
def step(model, optimizer, tokens, ids, phase):
  grad = nnx.value_and_grad(loss, has_aux=True)
  (_, logged), gradients = grad(model, tokens, ids, phase)
  optimizer.update(model, gradients)
  return logged


@nnx.jit
def recalls(model, tokens, ids):
  """Shares of dense attention on the chosen, and on the best, blocks."""
  *_, selection = model(
    tokens[:, :-1],
    segment_ids=ids[:, :-1],
    max_segments=4,
    with_selection=True,
  )
  return selection.score_recall, selection.best_score_recall


# %% [markdown]
# **Training.** The phase is static, so the step compiles once for each.

# %%
log = []
with jax.set_mesh(mesh):
  for i in range(STEPS):
    phase = "warmup" if i < WARMUP else "sparse"
    data = jax.device_put(batch(i), jax.P("fsdp"))
    lm, kl = step(model, optimizer, *data, phase)
    if i % LOG_EVERY == 0 or i == STEPS - 1:
      score, best = recalls(model, *batch(10**6))
      log.append([i + 1, *(float(jnp.mean(x)) for x in (lm, kl, score, best))])
steps, lm, kl, score, best = np.array(log).T
print(f"loss {lm[-1]:.2f}, of which KL {kl[-1] / (lm[-1] + kl[-1]):.1%}")
print(f"recall {score[-1]:.3f} of at most {best[-1]:.3f}")

# %% [markdown]
# **What to look at.** The language-model loss shows no jump where attention
# goes sparse (dotted line). The KL is over all visible tokens before it and
# over the chosen blocks after it, so that its two parts are different
# quantities. The recall belongs below the best possible one, and close to it:
# a warm-up may end when the gap no longer shrinks. Each point is one batch, so
# the losses go up and down.

# %%
figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
panels = [
  ("language-model loss (nats a token)", [(lm, "loss")]),
  ("KL, summed over layers (nats)", [(kl, "KL")]),
  (
    "share of dense attention",
    [(score, "chosen blocks"), (best, "best blocks")],
  ),
]
for axis, (title, lines) in zip(axes, panels):
  for values, label in lines:
    axis.plot(steps, values, label=label)
  axis.axvline(WARMUP, color="grey", linestyle=":")
  axis.set(title=title, xlabel="step")
axes[1].set_yscale("log")
axes[2].legend()
plt.show()
