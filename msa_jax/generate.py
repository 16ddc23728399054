"""Generates tokens: prefill in chunks, then one compiled step for each token.

    for rows in stream(model, prompts, max_new_tokens=100):   # as they come
    rows = generate(model, prompts, max_new_tokens=100)       # all at once

Prompts of one batch may have different lengths. They are padded on the left, so
that all end in the last chunk. Padding never enters the cache, so each prompt
is continued as it would be alone.

Several steps are compiled into one call, and the host reads a call's tokens
while the next call runs, so the device does not wait for the host.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int32

from msa_jax import cache as cache_lib
from msa_jax import model as model_lib
from msa_jax import ops
from msa_jax.checks import (
  as_integer,
  check_choice,
  check_integer,
  check_sizes,
  compute_dtype,
  is_number,
  keep,
  require,
  wrong,
)
from msa_jax.meshes import any_mesh_function, spec

# Tokens of the prompts that one prefill call reads.
PREFILL_TOKENS = 1024
# Steps of one compiled call. More steps share one launch; fewer steps waste
# less work on batch rows that have already reached their stop token.
STEPS = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
  """How the next token is drawn from its logits.

  Attributes:
    temperature: divides the logits; 0 takes the most likely token.
    top_k: draw from this many of the most likely tokens; None: from all.
    top_p: draw from the smallest set of the most likely of those tokens whose
      probabilities sum to at least this; None: from all of them.
  """

  temperature: float = 0.0
  top_k: int | None = None
  top_p: float | None = None

  def __post_init__(self):
    require(
      is_number(self.temperature)
      and 0 <= self.temperature <= sys.float_info.max,
      "temperature",
      "a number that is finite and at least 0",
      self.temperature,
    )
    if self.top_k is not None:
      top_k = as_integer(self.top_k)
      if top_k is None or top_k < 1:
        want = "an integer of at least 1 or None"
        raise wrong("top_k", want, repr(self.top_k))
      keep(self, top_k=top_k)
    require(
      self.top_p is None or (is_number(self.top_p) and 0 < self.top_p <= 1),
      "top_p",
      "above 0 and at most 1, or None",
      self.top_p,
    )
    for name in ("top_k", "top_p"):
      value = getattr(self, name)
      require(
        self.temperature > 0 or value is None,
        name,
        "None with temperature=0, which takes the most likely token",
        value,
      )


GREEDY = Sampling()


def sample(
  logits: Float[Array, "B V"], keys: Array, sampling: Sampling
) -> Int32[Array, "B"]:
  """Draws a token for each batch row; -1 where a logit is NaN.

  Args:
    logits: logits of the next token.
    keys: a random key for each batch row.
    sampling: how to draw.
  """
  bad = jnp.any(jnp.isnan(logits), axis=-1)
  if sampling.temperature == 0:
    token = jnp.argmax(logits, axis=-1)
  else:
    logits = _divided(logits, sampling.temperature)
    if sampling.top_k is None and sampling.top_p is None:
      token = jax.vmap(jax.random.categorical)(keys, logits)
    else:
      size = logits.shape[-1]
      count = size if sampling.top_k is None else min(sampling.top_k, size)
      logits, ids = lax.top_k(logits, count)
      if sampling.top_p is not None:
        logits = _nucleus(logits, sampling.top_p)
      rank = jax.vmap(jax.random.categorical)(keys, logits)
      token = jnp.take_along_axis(ids, rank[:, None], axis=-1)[:, 0]
  return jnp.where(bad, -1, token.astype(jnp.int32))


def _nucleus(logits: Float[Array, "B N"], top_p: float) -> Float[Array, "B N"]:
  """Descending logits, with -inf for those that top_p leaves out.

  A token stays if those before it sum to less than top_p, so if it and those
  behind it sum to more than 1 - top_p. The second form keeps the tail exact
  where top_p is close to 1, because it sums from the small end.
  """
  probs = jax.nn.softmax(logits, axis=-1)
  rest = lax.cumsum(probs, axis=1, reverse=True)
  kept = rest > (1.0 - float(top_p)) * rest[:, :1]
  # The most likely token stays, however small top_p is.
  kept = kept | (jnp.arange(logits.shape[1])[None] == 0)
  return jnp.where(kept, logits, -jnp.inf)


def _divided(
  logits: Float[Array, "B V"], temperature: float
) -> Float[Array, "B V"]:
  """(logits - their maximum) / temperature, for every temperature above 0.

  The maximum goes first, so that a small temperature cannot give inf - inf. The
  temperature is m 2^e with m from 0.5 to 1. Multiplying by 2^-e in two exact
  steps works where the temperature itself is below or above float32's range.
  """
  logits = logits.astype(compute_dtype(logits.dtype))
  top = jnp.max(logits, axis=-1, keepdims=True)
  # A difference of infinities of one sign is NaN, but such logits are equal.
  # Halves, because the difference of finite logits can be beyond the range.
  halves = jnp.where(logits == top, 0, logits * 0.5 - top * 0.5)
  mantissa, exponent = math.frexp(temperature)
  # Beyond 2^252 every difference is already 0 or beyond what exp can tell.
  exponent = min(max(exponent, -252), 252)
  half = exponent // 2
  lowest = jnp.finfo(halves.dtype).min
  scaled = halves
  for factor in (2.0 ** (1 - half), 2.0 ** (half - exponent), 1 / mantissa):
    # Without the maximum XLA would multiply the factors first, to 0 or inf.
    scaled = jnp.maximum(scaled * factor, lowest)
  return jnp.where(halves == -jnp.inf, -jnp.inf, scaled)


class DecodeState(NamedTuple):
  """The state that one decoding step hands to the next.

  Attributes:
    cache: the cache of all tokens but the last one.
    token: the last token of each batch row.
    left: tokens that each batch row may still get; 0 once it has stopped.
    keys: a random key for each batch row; each token's key is derived from it
      and the token's position.
  """

  cache: cache_lib.Cache
  token: Int32[Array, "B"]
  left: Int32[Array, "B"]
  keys: Array


def _state_specs(cache: cache_lib.Cache) -> DecodeState:
  """The PartitionSpecs of a `DecodeState`: the cache stays where it is."""
  whole: Any = PartitionSpec()
  return DecodeState(jax.tree.map(spec, cache), whole, whole, whole)


def _rows(new: NewTokens) -> NewTokens:
  """The PartitionSpecs of new tokens, which the host reads: all whole."""
  return jax.tree.map(lambda _: PartitionSpec(), new)


class NewTokens(NamedTuple):
  """The tokens that a compiled call returns to the host.

  Attributes:
    tokens: the token of each batch row and step.
    real: whether the batch row was still running at that step.
    left: `DecodeState.left` after the call.
  """

  tokens: Int32[Array, "B N"]
  real: Bool[Array, "B N"]
  left: Int32[Array, "B"]


@functools.partial(
  jax.jit, static_argnames=("graphdef", "phase"), donate_argnames=("cache",)
)
def _prefill(graphdef, params, tokens, counts, cache, phase):
  """Reads a chunk of the prompts: the next token's logits, and the cache."""
  out = nnx.merge(graphdef, params).extend(
    tokens, cache, counts=counts, phase=phase, last_only=True
  )
  return out.logits[:, 0], out.cache


@functools.partial(
  jax.jit, static_argnames=("sampling",), donate_argnames=("cache",)
)
@any_mesh_function(
  lambda out, logits, cache, *rest: (_state_specs(cache), _rows(out[1]))
)
def _start(logits, cache, key, max_new_tokens, sampling, stop_tokens):
  """Draws the first token, and makes the state after it."""
  left = jnp.full(logits.shape[:1], max_new_tokens, jnp.int32)
  rows = jnp.arange(logits.shape[0])
  if key.ndim:
    # A row with a key of its own draws as the only row of that key does.
    keys = jax.vmap(jax.random.fold_in, (0, None))(key, 0)
  else:
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, rows)
  state = DecodeState(cache, jnp.zeros_like(left), left, keys)
  state, token, real = _next(state, logits, sampling, stop_tokens)
  return state, NewTokens(token[:, None], real[:, None], state.left)


def _next(
  state: DecodeState,
  logits: Float[Array, "B V"],
  sampling: Sampling,
  stop_tokens: Int32[Array, "X"],
) -> tuple[DecodeState, Int32[Array, "B"], Bool[Array, "B"]]:
  """Draws a token for the batch rows that are still running.

  Returns:
    The new state, the token of each batch row, and which were running.
  """
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
@any_mesh_function(
  lambda out, graphdef, params, state, *rest, **options: (
    _state_specs(state.cache),
    _rows(out[1]),
  )
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
  """Runs several decoding steps as one program.

  The state is donated, so that its cache is written in place.

  Args:
    graphdef: the first part of `flax.nnx.split(model)`.
    params: the second part.
    state: the state after the earlier steps.
    stop_tokens: ids that end a batch row.
    steps: steps to run; each makes one token.
    sampling: how to draw.
    phase: phase of the MSA layers.
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

  The first token comes alone, the others in groups of up to `steps`.

  Args:
    model: the model. Under a mesh, call this inside `jax.set_mesh`.
    prompts: the tokens of each prompt, of any lengths.
    max_new_tokens: the most tokens to make for each prompt.
    sampling: how to draw.
    key: a random key, or one for each prompt; needed unless sampling is
      greedy. With a key for each prompt, a prompt gets the tokens that it gets
      alone with its key. From a single key each batch row derives its own.
    stop_tokens: ids that end a batch row. The stop token is its last token.
    capacity: tokens that each batch row of the cache has room for; None makes
      room for as many as are needed. Calls of one capacity share a compiled
      step.
    index_dtype: dtype of cached index keys, see `DecoderLM.init_cache`.
    phase: phase of the MSA layers: "sparse", or "warmup" for dense attention
      (not with implementation="mosaic_gpu", see `DecoderLM.extend`).
    prefill_tokens: tokens of the prompts that one compiled call reads.
    steps: tokens that one compiled call makes.

  Yields:
    The new tokens of each batch row; none for one that has ended.

  Raises:
    ValueError: an argument is wrong.
    NotImplementedError: a named implementation does not support the call, or an
      ablation of the config has no cached form.
    FloatingPointError: the logits of a batch row are NaN.
  """
  rows = _check_prompts(prompts, model.config.vocab_size)
  longest = max(map(len, rows))
  check_sizes(
    max_new_tokens=max_new_tokens, prefill_tokens=prefill_tokens, steps=steps
  )
  require(
    isinstance(sampling, Sampling),
    "sampling",
    "a msa_jax.generate.Sampling",
    sampling,
  )
  require(
    sampling.temperature == 0 or key is not None,
    "key",
    "a random key with temperature > 0",
    key,
  )
  check_choice("phase", phase, ops.Phase)
  stops = _check_ids("stop_tokens", stop_tokens, model.config.vocab_size)
  # The last token is returned and never read, so it needs no slot.
  needed = longest + max_new_tokens - 1
  if capacity is None:
    unit = max(128, model.config.index.block_size)
    unit = math.lcm(unit, model.cache_unit(len(rows)))
    capacity = -(-needed // unit) * unit
  else:
    capacity = check_integer("capacity", capacity)
    require(
      capacity >= needed,
      "capacity",
      f"at least {needed}, the longest prompt's {longest} tokens and"
      f" {max_new_tokens} new ones but the last",
      capacity,
    )
  return _stream(
    model,
    rows,
    max_new_tokens,
    sampling,
    jax.random.key(0) if key is None else _check_key(key, len(rows)),
    np.asarray(stops, np.int32),
    model.init_cache(len(rows), capacity, index_dtype=index_dtype),
    phase,
    # A multiple of 16, so that prompts of similar lengths share a compilation.
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
  """The generator of `stream`, which checks the arguments when it is called."""
  graphdef, params = nnx.split(model)
  logits = None
  for tokens, counts in prefill_chunks(rows, prefill_tokens):
    logits, cache = _prefill(graphdef, params, tokens, counts, cache, phase)
  state, ready = _start(
    logits, cache, key, max_new_tokens, sampling, stop_tokens
  )
  calls = -(-(max_new_tokens - 1) // steps)
  # All calls run the same number of steps, so that one program serves them
  # all, and the last call runs few steps too many.
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
    # The device works on this call while the host reads the previous one.
    new, ended = _fetch(ready)
    yield new
    if ended:
      return
    ready = coming
  yield _fetch(ready)[0]


def _fetch(new: NewTokens) -> tuple[list[np.ndarray], bool]:
  """Each batch row's new tokens on the host, and whether all have ended."""
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
  """The new tokens of each prompt; `stream` describes the options."""
  parts = zip(*stream(model, prompts, **options))
  return [np.concatenate(row) for row in parts]


def prefill_chunks(
  rows: Sequence[Sequence[int] | np.ndarray], size: int
) -> Iterator[tuple[Int32[np.ndarray, "B T"], Int32[np.ndarray, "B"]]]:
  """Cuts prompts, padded on the left, into chunks for `DecoderLM.extend`.

  Yields:
    The tokens of a chunk, and how many of each batch row are real; the real
    ones are its last.
  """
  lengths = np.array([len(row) for row in rows])
  total = -(-lengths.max() // size) * size
  padded = np.zeros((len(rows), total), np.int32)
  for row, tokens in zip(padded, rows):
    row[total - len(tokens) :] = tokens
  for first in range(0, total, size):
    counts = np.clip(lengths - (total - first - size), 0, size)
    yield padded[:, first : first + size], counts.astype(np.int32)


def _check_ids(name: str, ids: Any, vocab_size: int) -> list[int]:
  """Token ids as Python ints.

  Raises:
    ValueError: it is no sequence, such as a number or a text, or holds an entry
      that is no id.
  """
  want = "a sequence of token ids"
  if isinstance(ids, str | bytes):
    raise wrong(name, want, repr(ids))
  try:
    entries = list(ids)
  except TypeError:
    raise wrong(name, want, repr(ids)) from None
  numbers = []
  for entry in entries:
    number = as_integer(entry)
    if number is None or not 0 <= number < vocab_size:
      raise wrong(name, f"ids below vocab_size = {vocab_size}", repr(entry))
    numbers.append(number)
  return numbers


def _check_key(key: Any, batch: int) -> Array:
  """The key as a typed one, or as `batch` typed ones."""
  want = f"a random key, or an array of {batch} keys, one for each prompt"
  if not hasattr(key, "dtype") or not hasattr(key, "shape"):
    raise wrong("key", want, repr(key))
  if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
    try:
      key = jax.random.wrap_key_data(key)
    except (TypeError, ValueError):
      got = f"{key.dtype} of shape {key.shape}"
      raise wrong("key", want, got) from None
  if key.shape not in ((), (batch,)):
    raise wrong("key", want, f"keys of shape {key.shape}")
  return key


def _check_prompts(
  prompts: Sequence[Sequence[int] | np.ndarray] | np.ndarray, vocab_size: int
) -> list[np.ndarray]:
  if isinstance(prompts, str | bytes) or not hasattr(prompts, "__iter__"):
    raise wrong("prompts", "a sequence of prompts", repr(prompts))
  prompts = list(prompts)
  rows = [np.asarray(row) for row in prompts]
  if not rows:
    raise wrong("prompts", "at least one prompt", "none")
  for i, row in enumerate(rows):
    if (
      row.ndim != 1 or not row.size or not np.issubdtype(row.dtype, np.integer)
    ):
      got = f"{row.dtype} of shape {row.shape}"
      if not row.size:
        got = "none"
      elif isinstance(prompts[i], str | bytes) or row.ndim == 0:
        got = repr(prompts[i])
      raise wrong(f"prompts[{i}]", "a sequence of one or more token ids", got)
    if row.min() < 0 or row.max() >= vocab_size:
      raise wrong(
        f"prompts[{i}]",
        f"ids below vocab_size = {vocab_size}",
        f"{row.min()} to {row.max()}",
      )
  return rows
