"""Named shapes and inputs for tests, benchmarks and notebooks.

There are four kinds of index queries and keys. Each is made on the device for
any length, without an array of T x S:

  random        independent normal entries: neighbouring queries choose almost
                no blocks in common.
  trained_like  neighbouring queries share blocks: a query chooses its own
                block, block 0 and blocks that drift along the sequence. The
                union of the choices of 8 neighbouring queries holds 24 to 26
                blocks when each chooses 16 (`union8` measures it).
  fitted        the same generator, with knobs (`Sharing`) that give the
                statistics of choices recorded from a trained model. The knobs
                are in results/fitted_selection.json, which
                `python -m benchmarks.fit` makes.
  outliers      random, but a few entries and a few keys are many times as
                large, which is hard for low precision.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, PRNGKeyArray

from pallas_kernels import mosaic

SELECTIONS = ("random", "trained_like", "outliers")
FITTED = pathlib.Path(__file__).parent / "results" / "fitted_selection.json"

# The noise between neighbouring queries that gives a union8 of 24 to 26, by
# number of blocks: with more blocks the top scores lie closer together, so less
# noise changes the choice.
_NOISE = {
  64: 0.40, 128: 0.23, 256: 0.165, 1024: 0.117, 4096: 0.10, 8192: 0.097
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sharing:
  """Knobs of index inputs whose neighbouring queries share their choices.

  The direction of the queries changes slowly from one random direction to the
  next while keys are random, so the blocks with the highest scores drift along
  the sequence.
  """

  noise: float
  """Size of each query's own noise. More of it widens neighbours' union."""

  drift: int = 1024
  """Tokens from one random direction to the next."""

  sink: float = 0.5
  """How strongly queries are drawn to block 0."""

  near: float = 0.0
  """How strongly queries are drawn to keys up to about a block back."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """One attention shape. The defaults are the paper's heads."""

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


def heads(num_heads: int, num_kv_heads: int, head_dim: int) -> dict[str, Any]:
  """The fields of a case with these heads. I is D, up to what kernels take."""
  return dict(
    num_heads=num_heads,
    num_kv_heads=num_kv_heads,
    head_dim=head_dim,
    index_dim=min(head_dim, mosaic.MAX_INDEX_DIM),
  )


PAPER = {
  name: Case(tokens=tokens)
  for name, tokens in {
    "256": 1 << 8,
    "1k": 1 << 10,
    "4k": 1 << 12,
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
BATCHES = {  # batch x tokens, for training
  "8x4k": Case(tokens=1 << 12, batch=8),
  "16x4k_16_heads": Case(
    tokens=1 << 12, batch=16, num_heads=16, num_kv_heads=2
  ),
  "4x16k_16_heads": Case(tokens=1 << 14, batch=4, num_heads=16, num_kv_heads=2),
}
DECODE = {  # batch x cached tokens, for decode
  f"{batch}x{name}": Case(
    tokens=1, kv_tokens=PAPER[name].tokens, batch=batch
  )
  for batch, name in (
    (1, "256"), (1, "1k"), (1, "4k"), (1, "8k"), (1, "32k"), (1, "128k"),
    (1, "1m"), (8, "128k"), (32, "32k"),
  )
}  # fmt: skip


def normal(
  key: PRNGKeyArray, shape: tuple[int, ...], dtype: str = "bfloat16"
) -> Float[Array, "..."]:
  """Normal entries, made in chunks of axis 1 so that little memory is used."""
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
  """index_q and index_k of a case: one of SELECTIONS, or "fitted"."""
  if selection not in (*SELECTIONS, "fitted"):
    raise ValueError(
      f"selection must be one of {', '.join(SELECTIONS)}, fitted; got"
      f" {selection!r}"
    )
  if selection == "fitted":
    knobs = fitted_sharing(case.kv_tokens)
  elif selection == "trained_like":
    level = np.interp(
      np.log2(case.kv_tokens / case.block_size),
      np.log2(list(_NOISE)),
      list(_NOISE.values()),
    )
    knobs = Sharing(noise=float(level))
  else:
    knobs = None
  if knobs is not None:
    return sharing_inputs(key, case, knobs)
  q_key, k_key, extra = jax.random.split(key, 3)
  q_shape = (case.batch, case.tokens, case.num_kv_heads, case.index_dim)
  k_shape = (case.batch, case.kv_tokens, case.index_dim)
  index_k = normal(k_key, k_shape, case.dtype)
  index_q = normal(q_key, q_shape, case.dtype)
  if selection == "outliers":
    index_q, index_k = _outliers(extra, index_q, index_k)
  return index_q, index_k


def fitted_sharing(kv_tokens: int) -> Sharing:
  """The knobs of results/fitted_selection.json, interpolated in log length.

  Raises:
    ValueError: there is no such file, or the length is outside the fitted ones.
  """
  if not FITTED.exists():
    raise ValueError(
      f"selection 'fitted' needs {FITTED.name} in {FITTED.parent.name}/, which"
      " python -m benchmarks.fit makes from the choices of a trained model"
    )
  fitted = json.loads(FITTED.read_text())["knobs"]
  known = [entry["kv_tokens"] for entry in fitted]
  if not min(known) <= kv_tokens <= max(known):
    raise ValueError(
      f"selection 'fitted' wants kv_tokens from {min(known)} to {max(known)},"
      f" the lengths in {FITTED.name}, got {kv_tokens}; python -m"
      " benchmarks.fit fits others"
    )
  lengths = np.log2(known)

  def at(name: str) -> float:
    values = [entry[name] for entry in fitted]
    return float(np.interp(np.log2(kv_tokens), lengths, values))

  return Sharing(
    noise=at("noise"),
    drift=round(at("drift")),
    sink=at("sink"),
    near=at("near"),
  )


def sharing_inputs(
  key: PRNGKeyArray, case: Case, knobs: Sharing
) -> tuple[Float[Array, "B T K I"], Float[Array, "B S I"]]:
  """Index inputs whose neighbouring queries share choices, as `knobs` say.

  The queries stand at the last positions of the keys, so that a few of them can
  represent a long sequence. All knobs except `drift` may be traced numbers. If
  `near` is traced, the entries that it scales are written even if it is 0.
  """
  _, k_key, extra = jax.random.split(key, 3)
  batch, q_len, kv_len = case.batch, case.tokens, case.kv_tokens
  num_groups, index_dim, dtype = case.num_kv_heads, case.index_dim, case.dtype
  anchor_key, sink_key, noise_key = jax.random.split(extra, 3)
  index_k = normal(k_key, (batch, kv_len, index_dim), dtype)
  # The first key is the sink: every query has a part along its direction.
  sink = jnp.sign(jax.random.normal(sink_key, (index_dim,)))
  index_k = index_k.at[:, 0].set((2 * sink).astype(dtype))

  anchors = jax.random.normal(
    anchor_key, (batch, q_len // knobs.drift + 2, num_groups, index_dim)
  )
  t = jnp.arange(q_len)
  w = (t % knobs.drift / knobs.drift)[:, None, None]
  here = anchors[:, t // knobs.drift].astype(dtype)
  there = anchors[:, t // knobs.drift + 1].astype(dtype)
  walk = ((1 - w) * here + w * there) / jnp.sqrt((1 - w) ** 2 + w**2)
  noise = normal(noise_key, (batch, q_len, num_groups, index_dim), dtype)
  noise = jnp.float32(knobs.noise) * noise
  index_q = (walk + noise + knobs.sink * sink).astype(dtype)
  if isinstance(knobs.near, jax.Array) or knobs.near:
    waves = _waves(kv_len, case.block_size)
    width = waves.shape[-1]
    pull = knobs.near * waves[kv_len - q_len :, None]
    pull = jnp.broadcast_to(pull, (*index_q.shape[:-1], width))
    index_q = index_q.at[..., :width].set(pull.astype(dtype))
    index_k = index_k.at[..., :width].set(waves.astype(dtype))
  return index_q, index_k


def _waves(tokens: int, block_size: int) -> Float[Array, "T 16"]:
  """Eight waves of the position; their inner product is largest at t = j.

  a(t) . a(j) = sum_i cos(2 pi (t - j) / period_i). The shortest period is three
  blocks, so the peak is about a block wide. The periods have no small common
  multiple, so that there is no second peak.
  """
  periods = block_size * jnp.array([3, 5, 9, 17, 33, 65, 129, 257], jnp.float32)
  # Whole turns are left out before the division, so that the angle stays exact
  # at 1M tokens.
  turns = (jnp.arange(tokens)[:, None] % periods) / periods
  angle = 2 * jnp.pi * turns
  return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def _outliers(key, index_q, index_k):
  """Makes two channels 20 times, one key in 1000 up to 100 times as large."""
  index_dim, kv_len = index_k.shape[-1], index_k.shape[1]
  channel = jnp.where(jnp.arange(index_dim) < 2, 20.0, 1.0)
  pick, size = jax.random.split(key)
  rare = jax.random.bernoulli(pick, 1e-3, (kv_len, 1))
  factor = jax.random.uniform(size, (kv_len, 1), minval=1.0, maxval=100.0)
  index_k = index_k * (channel * jnp.where(rare, factor, 1.0))
  return index_q, index_k.astype(index_q.dtype)
