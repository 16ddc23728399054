"""Named shapes and inputs for tests, benchmarks and notebooks.

Three kinds of index queries and keys, each made for any length on the device
without an array of T x S:

  random        independent normal entries: neighbouring queries share next to
                nothing.
  trained_like  neighbouring queries share: choices are the own block, block 0
                and blocks that drift along the sequence. The union of 8
                neighbouring queries' choices holds 24 to 26 blocks when each
                chooses 16 (`union8` measures it).
  outliers      random, with a few entries and a few keys of many times the
                usual size, which is what low precision finds hard.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int, PRNGKeyArray

SELECTIONS = ("random", "trained_like", "outliers")

# How far, in tokens, an index query keeps its direction in trained_like.
_DRIFT = 1024
# Noise of one query against its neighbours that makes union8 24-26, by the
# number of 128-key blocks: the more blocks, the denser the top scores.
_NOISE = {64: 0.40, 256: 0.165, 1024: 0.117, 4096: 0.10, 8192: 0.097}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """One attention shape; the paper's heads unless said otherwise."""

  tokens: int
  kv_tokens: int = 0
  batch: int = 1
  num_heads: int = 64
  num_kv_heads: int = 4
  head_dim: int = 128
  index_dim: int = 128
  block_size: int = 128
  top_k: int = 16
  dtype: str = "bfloat16"

  def __post_init__(self):
    if not self.kv_tokens:
      object.__setattr__(self, "kv_tokens", self.tokens)


PAPER = {
  name: Case(tokens=tokens)
  for name, tokens in {
    "8k": 1 << 13,
    "32k": 1 << 15,
    "128k": 1 << 17,
    "512k": 1 << 19,
    "1m": 1 << 20,
  }.items()
}
SMALL_HEADS = Case(
  tokens=1 << 15,
  num_heads=16,
  num_kv_heads=2,
  head_dim=64,
  index_dim=64,
  block_size=64,
)
CASES = PAPER | {"small_heads_32k": SMALL_HEADS}
DECODE = {  # batch x cached tokens
  f"{batch}x{name}": Case(
    tokens=1, kv_tokens=PAPER[name].tokens, batch=batch
  )
  for batch, name in (
    (1, "32k"), (1, "128k"), (1, "1m"), (8, "128k"), (32, "32k")
  )
}  # fmt: skip


def normal(
  key: PRNGKeyArray, shape: tuple[int, ...], dtype: str = "bfloat16"
) -> Float[Array, "..."]:
  """Normal entries, made in chunks of axis 1 to keep the workspace small."""
  batch, tokens, *rest = shape
  chunk = 1 << 14
  if tokens <= chunk:
    return jax.random.normal(key, shape, jnp.float32).astype(dtype)
  chunks = pl.cdiv(tokens, chunk)

  def one(key):
    x = jax.random.normal(key, (batch, chunk, *rest), jnp.float32)
    return x.astype(dtype)

  x = jnp.moveaxis(lax.map(one, jax.random.split(key, chunks)), 0, 1)
  return x.reshape(batch, chunks * chunk, *rest)[:, :tokens]


@functools.partial(jax.jit, static_argnames="case")
def attention_inputs(
  key: PRNGKeyArray, case: Case
) -> tuple[
  Float[Array, "B T H D"], Float[Array, "B S K D"], Float[Array, "B S K D"]
]:
  """Random q, k and v of a case."""
  q_key, k_key, v_key = jax.random.split(key, 3)
  q_shape = (case.batch, case.tokens, case.num_heads, case.head_dim)
  kv_shape = (case.batch, case.kv_tokens, case.num_kv_heads, case.head_dim)
  return (
    normal(q_key, q_shape, case.dtype),
    normal(k_key, kv_shape, case.dtype),
    normal(v_key, kv_shape, case.dtype),
  )


@functools.partial(jax.jit, static_argnames=("case", "selection"))
def index_inputs(
  key: PRNGKeyArray, case: Case, selection: str
) -> tuple[Float[Array, "B T K I"], Float[Array, "B S I"]]:
  """index_q and index_k of a case, one of SELECTIONS."""
  if selection not in SELECTIONS:
    raise ValueError(
      f"selection must be one of {', '.join(SELECTIONS)}, got {selection!r}"
    )
  q_key, k_key, extra = jax.random.split(key, 3)
  q_shape = (case.batch, case.tokens, case.num_kv_heads, case.index_dim)
  k_shape = (case.batch, case.kv_tokens, case.index_dim)
  index_k = normal(k_key, k_shape, case.dtype)
  if selection == "trained_like":
    return _trained_like(q_key, extra, q_shape, index_k)
  index_q = normal(q_key, q_shape, case.dtype)
  if selection == "outliers":
    index_q, index_k = _outliers(extra, index_q, index_k)
  return index_q, index_k


def _trained_like(q_key, extra, q_shape, index_k):
  """index_q that walks slowly from one direction to the next, and a sink."""
  batch, q_len, num_groups, index_dim = q_shape
  dtype, kv_len = index_k.dtype, index_k.shape[1]
  anchor_key, sink_key, noise_key = jax.random.split(extra, 3)
  del q_key
  blocks = np.array(list(_NOISE), np.float64)
  level = np.interp(
    np.log2(kv_len / 128), np.log2(blocks), list(_NOISE.values())
  )
  # Block 0 holds the sink: a direction that every query looks at.
  sink = jnp.sign(jax.random.normal(sink_key, (index_dim,)))
  index_k = index_k.at[:, 0].set((2 * sink).astype(dtype))

  anchors = jax.random.normal(
    anchor_key, (batch, q_len // _DRIFT + 2, num_groups, index_dim)
  )
  t = jnp.arange(q_len)
  w = (t % _DRIFT / _DRIFT)[:, None, None]
  here = anchors[:, t // _DRIFT].astype(dtype)
  there = anchors[:, t // _DRIFT + 1].astype(dtype)
  walk = ((1 - w) * here + w * there) / jnp.sqrt((1 - w) ** 2 + w**2)
  noise = normal(noise_key, q_shape, dtype)
  return (walk + level * noise + 0.5 * sink).astype(dtype), index_k


def _outliers(key, index_q, index_k):
  """Two channels 20 times, and one key in 1000 up to 100 times as large."""
  index_dim, kv_len = index_k.shape[-1], index_k.shape[1]
  channel = jnp.where(jnp.arange(index_dim) < 2, 20.0, 1.0)
  pick, size = jax.random.split(key)
  rare = jax.random.bernoulli(pick, 1e-3, (kv_len, 1))
  factor = jax.random.uniform(size, (kv_len, 1), minval=1.0, maxval=100.0)
  index_k = index_k * (channel * jnp.where(rare, factor, 1.0))
  return index_q, index_k.astype(index_q.dtype)


@jax.jit
def union8(block_indices: Int[Array, "B K T P"]) -> Float[Array, ""]:
  """Mean number of distinct blocks that 8 neighbouring queries choose.

  Of more than 64K queries, every n-th eight is counted.
  """
  *lead, q_len, top_k = block_indices.shape
  eights = block_indices[..., : q_len // 8 * 8, :]
  eights = eights.reshape(*lead, q_len // 8, 8 * top_k)
  eights = eights[..., :: max(1, q_len >> 16), :]
  ids = jnp.sort(eights, axis=-1)
  new = (ids[..., 1:] != ids[..., :-1]) & (ids[..., 1:] >= 0)
  counts = jnp.sum(new, axis=-1) + (ids[..., 0] >= 0)
  return jnp.mean(counts.astype(jnp.float32))


def recall(
  block_indices: Int[Array, "B K T P"], truth: Int[Array, "B K T P"]
) -> Float[Array, ""]:
  """Share of the blocks in `truth` that `block_indices` holds too."""
  same = block_indices[..., None] == truth[..., None, :]
  found = jnp.sum(jnp.any(same, axis=-2) & (truth >= 0))
  return found / jnp.sum(truth >= 0)
