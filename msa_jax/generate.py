"""Tokens from a model: prefill in chunks, then one compiled step a token.

    for rows in stream(model, prompts, max_new_tokens=100):   # as they come
    rows = generate(model, prompts, max_new_tokens=100)       # all at once

Prompts of one batch may have different lengths. They are padded on the left:
all end in the last chunk, and padding never enters the cache, so that a row
gets what its prompt alone would get.

Steps are compiled several to a call, and the host reads a call's tokens while
the next call runs: no token waits for the host.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from msa_jax import cache as cache_lib
from msa_jax import model as model_lib
from msa_jax import ops

# Tokens that a prompt is read in at once.
PREFILL_TOKENS = 1024
# Steps of a compiled call: a token's share of its launch, against how long a
# row may run on after its stop token.
STEPS = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
  """How the next token is drawn from its logits.

  Attributes:
    temperature: divides the logits; 0 takes the likeliest token.
    top_k: draw from this many of the likeliest tokens; None: all.
    top_p: of those, draw from the fewest likeliest ones whose probabilities
      reach this sum; None: all.
  """

  temperature: float = 0.0
  top_k: int | None = None
  top_p: float | None = None

  def __post_init__(self):
    if not 0 <= self.temperature < math.inf:
      raise ValueError(
        f"temperature must be finite and at least 0, got {self.temperature!r}"
      )
    if self.top_k is not None and (
      not isinstance(self.top_k, int) or self.top_k < 1
    ):
      raise ValueError(
        f"top_k must be an integer of at least 1 or None, got {self.top_k!r}"
      )
    if self.top_p is not None and not 0 < self.top_p <= 1:
      raise ValueError(
        f"top_p must be above 0 and at most 1, or None, got {self.top_p!r}"
      )
    for name in ("top_k", "top_p"):
      if self.temperature == 0 and getattr(self, name) is not None:
        raise ValueError(
          f"{name} must be None with temperature=0, which takes the likeliest"
          f" token, got {getattr(self, name)!r}"
        )


GREEDY = Sampling()


def sample(
  logits: Float[Array, "B V"], keys: Array, sampling: Sampling
) -> Int32[Array, "B"]:
  """Draws a token of each row; -1 where a logit is NaN.

  Args:
    logits: of the next token.
    keys: a random key for each row.
    sampling: how to draw.
  """
  bad = jnp.any(jnp.isnan(logits), axis=-1)
  if sampling.temperature == 0:
    token = jnp.argmax(logits, axis=-1)
  else:
    logits = logits / sampling.temperature
    if sampling.top_k is None and sampling.top_p is None:
      token = jax.vmap(jax.random.categorical)(keys, logits)
    else:
      size = logits.shape[-1]
      count = size if sampling.top_k is None else min(sampling.top_k, size)
      logits, ids = lax.top_k(logits, count)
      if sampling.top_p is not None:
        probs = jax.nn.softmax(logits, axis=-1)
        before = jnp.cumsum(probs, axis=-1) - probs
        logits = jnp.where(before < sampling.top_p, logits, -jnp.inf)
      place = jax.vmap(jax.random.categorical)(keys, logits)
      token = jnp.take_along_axis(ids, place[:, None], axis=-1)[:, 0]
  return jnp.where(bad, -1, token.astype(jnp.int32))


class DecodeState(NamedTuple):
  """What goes from one step to the next.

  Attributes:
    cache: holds all tokens but the last one.
    token: the last token of each row.
    left: tokens that each row may still get; 0 once it has stopped.
    keys: a random key for each row; its tokens' keys follow from their
      positions.
  """

  cache: cache_lib.Cache
  token: Int32[Array, "B"]
  left: Int32[Array, "B"]
  keys: Array


class NewTokens(NamedTuple):
  """What a compiled call hands to the host.

  Attributes:
    tokens: of each row and step.
    real: whether the row was still running.
    left: as in `DecodeState`, after the call.
  """

  tokens: Int32[Array, "B N"]
  real: Bool[Array, "B N"]
  left: Int32[Array, "B"]


@functools.partial(
  jax.jit, static_argnames=("graphdef", "phase"), donate_argnames=("cache",)
)
def _prefill(graphdef, params, tokens, counts, cache, phase):
  """The logits after a chunk of prompts, and the cache with it."""
  out = nnx.merge(graphdef, params).extend(
    tokens, cache, counts=counts, phase=phase, last_only=True
  )
  return out.logits[:, 0], out.cache


@functools.partial(
  jax.jit, static_argnames=("sampling",), donate_argnames=("cache",)
)
def _start(logits, cache, key, max_new_tokens, sampling, stop_tokens):
  """The state after the first token."""
  rows = jnp.arange(logits.shape[0])
  keys = jax.vmap(jax.random.fold_in, (None, 0))(key, rows)
  left = jnp.full(rows.shape, max_new_tokens, jnp.int32)
  state = DecodeState(cache, jnp.zeros_like(left), left, keys)
  state, token, real = _next(state, logits, sampling, stop_tokens)
  return state, NewTokens(token[:, None], real[:, None], state.left)


def _next(
  state: DecodeState,
  logits: Float[Array, "B V"],
  sampling: Sampling,
  stop_tokens: Int32[Array, "X"],
) -> tuple[DecodeState, Int32[Array, "B"], Bool[Array, "B"]]:
  """Draws a token for the rows that are running."""
  running = state.left > 0
  keys = jax.vmap(jax.random.fold_in)(state.keys, state.cache.lengths)
  token = jnp.where(running, sample(logits, keys, sampling), 0)
  stopped = (token < 0) | jnp.isin(token, stop_tokens)
  left = jnp.where(stopped, 0, jnp.maximum(state.left - 1, 0))
  return state._replace(token=token, left=left), token, running


@functools.partial(
  jax.jit,
  static_argnames=("graphdef", "steps", "sampling", "phase"),
  donate_argnames=("state",),
)
def decode_steps(
  graphdef: nnx.GraphDef,
  params: Any,
  state: DecodeState,
  stop_tokens: Int32[Array, "X"],
  *,
  steps: int,
  sampling: Sampling = GREEDY,
  phase: ops.Phase = "sparse",
) -> tuple[DecodeState, NewTokens]:
  """Several steps as one program; the state is written in place.

  Args:
    graphdef, params: of `flax.nnx.split(model)`.
    state: of the steps before.
    stop_tokens: ids that end a row.
    steps: tokens to make.
    sampling: how to draw.
    phase: of the MSA layers.
  """
  model = nnx.merge(graphdef, params)

  def step(state: DecodeState, _):
    out = model.extend(
      state.token[:, None],
      state.cache,
      counts=(state.left > 0).astype(jnp.int32),
      phase=phase,
    )
    state = state._replace(cache=out.cache)
    state, *new = _next(state, out.logits[:, 0], sampling, stop_tokens)
    return state, new

  state, (tokens, real) = lax.scan(step, state, length=steps)
  return state, NewTokens(tokens.T, real.T, state.left)


def stream(
  model: model_lib.DecoderLM,
  prompts: Sequence[Sequence[int] | np.ndarray] | np.ndarray,
  *,
  max_new_tokens: int,
  sampling: Sampling = GREEDY,
  key: Array | None = None,
  stop_tokens: Sequence[int] = (),
  capacity: int | None = None,
  index_dtype: Any = None,
  phase: ops.Phase = "sparse",
  prefill_tokens: int = PREFILL_TOKENS,
  steps: int = STEPS,
) -> Iterator[list[Int32[np.ndarray, "N"]]]:
  """Continues prompts, and yields tokens as they come.

  The first token comes alone, the others up to `steps` at once.

  Args:
    model: the model. Under a mesh, call this inside `jax.set_mesh`.
    prompts: tokens of each row, of any lengths.
    max_new_tokens: tokens to make for each row, at most.
    sampling: how to draw.
    key: random key; needed unless sampling is greedy.
    stop_tokens: ids that end a row. The stop token is the row's last.
    capacity: tokens a row of the cache has room for; None: as many as are
      needed. Calls of the same capacity share a compiled step.
    index_dtype: of cached index keys, see `DecoderLM.init_cache`.
    phase: of the MSA layers: "sparse", or "warmup" for dense attention (not
      with implementation="mosaic_gpu", see `DecoderLM.extend`).
    prefill_tokens: tokens of the prompts read at once.
    steps: tokens made in one compiled call.

  Yields:
    The new tokens of each row, none for rows that have ended.

  Raises:
    ValueError: an argument is wrong.
    FloatingPointError: a row's logits are NaN.
  """
  rows = _check_prompts(prompts, model.config.vocab_size)
  longest = max(map(len, rows))
  for name, value in dict(
    max_new_tokens=max_new_tokens, prefill_tokens=prefill_tokens, steps=steps
  ).items():
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
      raise ValueError(
        f"{name} must be an integer of at least 1, got {value!r}"
      )
  if sampling.temperature > 0 and key is None:
    raise ValueError("key must be a random key with temperature > 0, got None")
  for token in stop_tokens:
    if not 0 <= token < model.config.vocab_size:
      raise ValueError(
        "stop_tokens must be ids below vocab_size ="
        f" {model.config.vocab_size}, got {token}"
      )
  # The last token of a row is not read back.
  needed = longest + max_new_tokens - 1
  if capacity is None:
    unit = max(128, model.config.index.block_size)
    capacity = -(-needed // unit) * unit
  elif capacity < needed:
    raise ValueError(
      f"capacity must be at least {needed}, the longest prompt's {longest}"
      f" tokens and {max_new_tokens} new ones but the last, got {capacity}"
    )
  return _stream(
    model,
    rows,
    max_new_tokens,
    sampling,
    jax.random.key(0) if key is None else key,
    np.asarray(stop_tokens, np.int32),
    model.init_cache(len(rows), capacity, index_dtype=index_dtype),
    phase,
    # Chunks of few sizes, so that few are compiled.
    min(prefill_tokens, -(-longest // 16) * 16, capacity),
    steps,
  )


def _stream(
  model,
  rows,
  max_new_tokens,
  sampling,
  key,
  stop_tokens,
  cache,
  phase,
  prefill_tokens,
  steps,
):
  """`stream`, whose checks come before the first token is asked for."""
  graphdef, params = nnx.split(model)
  logits = None
  for tokens, counts in prefill_chunks(rows, prefill_tokens):
    logits, cache = _prefill(graphdef, params, tokens, counts, cache, phase)
  state, ready = _start(
    logits, cache, key, max_new_tokens, sampling, stop_tokens
  )
  calls = -(-(max_new_tokens - 1) // steps)
  # Calls of one size, that leave few steps over.
  steps = -(-(max_new_tokens - 1) // max(calls, 1))
  for _ in range(calls):
    state, coming = decode_steps(
      graphdef,
      params,
      state,
      stop_tokens,
      steps=steps,
      sampling=sampling,
      phase=phase,
    )
    # The device works on these steps while the host reads the ones before.
    new, ended = _fetch(ready)
    yield new
    if ended:
      return
    ready = coming
  yield _fetch(ready)[0]


def _fetch(new: NewTokens) -> tuple[list[np.ndarray], bool]:
  """The tokens of each row on the host, and whether all rows have ended."""
  tokens, real, left = jax.device_get(new)
  bad = np.flatnonzero((tokens < 0).any(axis=1))
  if bad.size:
    raise FloatingPointError(f"the logits of rows {bad.tolist()} are NaN")
  return [row[mask] for row, mask in zip(tokens, real)], not left.any()


def generate(
  model: model_lib.DecoderLM,
  prompts: Sequence[Sequence[int] | np.ndarray] | np.ndarray,
  **options: Any,
) -> list[Int32[np.ndarray, "N"]]:
  """The new tokens of each row, see `stream` for the options."""
  parts = zip(*stream(model, prompts, **options))
  return [np.concatenate(row) for row in parts]


def prefill_chunks(
  rows: Sequence[Sequence[int] | np.ndarray], size: int
) -> Iterator[tuple[Int32[np.ndarray, "B T"], Int32[np.ndarray, "B"]]]:
  """Cuts prompts, padded on the left, into chunks for `DecoderLM.extend`.

  Yields:
    Tokens of a chunk, and how many of each row, at its end, are real.
  """
  lengths = np.array([len(row) for row in rows])
  total = -(-lengths.max() // size) * size
  padded = np.zeros((len(rows), total), np.int32)
  for row, tokens in zip(padded, rows):
    row[total - len(tokens) :] = tokens
  for first in range(0, total, size):
    counts = np.clip(lengths - (total - first - size), 0, size)
    yield padded[:, first : first + size], counts.astype(np.int32)


def _check_prompts(
  prompts: Sequence[Sequence[int] | np.ndarray] | np.ndarray, vocab_size: int
) -> list[np.ndarray]:
  rows = [np.asarray(row) for row in prompts]
  if not rows:
    raise ValueError("prompts must hold at least one prompt, got none")
  for i, row in enumerate(rows):
    if (
      row.ndim != 1 or not row.size or not np.issubdtype(row.dtype, np.integer)
    ):
      raise ValueError(
        f"prompts[{i}] must be one or more token ids, got {row.dtype} of shape"
        f" {row.shape}"
      )
    if row.min() < 0 or row.max() >= vocab_size:
      raise ValueError(
        f"prompts[{i}] must hold ids below vocab_size = {vocab_size}, got"
        f" {row.min()} to {row.max()}"
      )
  return rows
