"""Keys, values and index keys of the tokens that a model has read.

A `Cache` is a pytree of static shapes. Every batch row has room for C tokens,
and batch row b holds lengths[b] of them in its first slots. Slot j holds the
token at position j, so blocks lie where they lie in a full pass, and the
lengths of batch rows are independent. The slots beyond a length are unused, and
nothing reads what they hold.

    cache, span = cache.reserve(T, counts)      # once for all layers
    layer = layer.write(span.slots, k, v, index_k)
    cache = cache.trim(lengths)                 # drops tokens at the end

New tokens come in one array [B, T], padded on the left: of batch row b, the
last counts[b] are real. Padding is never stored. In a jitted function that
donates the cache, writing happens in place.

Batch rows may be split over devices, and keys and values also by KV head
(`partition`). Index keys serve all heads, so heads do not split them. A mesh
axis for the tokens of a sequence splits the slots: each device holds C / n of
them, whole blocks, one device's after another's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Int32

from msa_jax import ops
from msa_jax.checks import (
  check_array,
  check_integer,
  check_integers,
  check_sizes,
  require,
  wrong,
)

FP8 = jnp.float8_e4m3fn


class LayerCache(NamedTuple):
  """One layer's keys, values and index keys.

  Attributes:
    k: keys, after norm and rotation.
    v: values.
    index_k: index keys, after norm and rotation, in the dtype of k or as e4m3
      codes; None in dense layers.
    index_k_scale: float32 scales of e4m3 codes: an index key is codes * scale,
      see `msa_jax.ops.quantise_index_keys`. None unless index_k holds codes.
  """

  k: Float[Array, "B C K D"]
  v: Float[Array, "B C K D"]
  index_k: Float[Array, "B C I"] | None = None
  index_k_scale: Float[Array, "B C"] | None = None

  def write(
    self,
    slots: Int32[Array, "B T"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    index_k: Float[Array, "B T I"] | None = None,
  ) -> LayerCache:
    """Puts tokens into slots; a slot at or beyond the capacity drops its token.

    Args:
      slots: where the tokens go, from `Cache.reserve`.
      k: keys.
      v: values.
      index_k: index keys before quantisation; None in dense layers.

    Raises:
      ValueError: an array has another shape or dtype than the cache.
    """
    if (index_k is None) != (self.index_k is None):
      got, want = (
        "None" if x is None else "an array" for x in (index_k, self.index_k)
      )
      raise wrong("index_k", f"{want} as in the cache", got)
    new: dict[str, Any] = dict(k=k, v=v)
    if index_k is not None:
      new["index_k"] = index_k
    for name, x in new.items():
      held = getattr(self, name)
      want = (*slots.shape, *held.shape[2:])
      # index_k comes in the dtype of k; it is quantised below.
      dtype = self.k.dtype if name == "index_k" else held.dtype
      if x.shape != want or x.dtype != dtype:
        raise wrong(
          name,
          f"{dtype} of shape {want} to go into the cache",
          f"{x.dtype} of shape {x.shape}",
        )
    if self.index_k_scale is not None:
      codes, scale = ops.quantise_index_keys(new["index_k"])
      new.update(index_k=codes, index_k_scale=scale)
    return self._replace(
      **{name: _put(getattr(self, name), slots, x) for name, x in new.items()}
    )

  def index_keys(self) -> Float[Array, "B C I"] | None:
    """The index keys in the dtype of k, decoded if the cache holds codes."""
    if self.index_k is None or self.index_k_scale is None:
      return self.index_k
    scale = self.index_k_scale[..., None]
    return (self.index_k.astype(jnp.float32) * scale).astype(self.k.dtype)


def _put(
  held: Float[Array, "B C *X"],
  slots: Int32[Array, "B T"],
  new: Float[Array, "B T *X"],
) -> Float[Array, "B C *X"]:
  def row(held, slots, new):
    return held.at[slots].set(new, mode="drop", unique_indices=True)

  return jax.vmap(row)(held, slots, new)


class Span(NamedTuple):
  """Where the next T tokens of each batch row go.

  Attributes:
    slots: the slot of each token; C or more for a token that is not stored.
    lengths: keys that exist in each batch row, the new tokens among them as the
      last T. 0 for a batch row that has overflowed, so that its
      queries see nothing.
  """

  slots: Int32[Array, "B T"]
  lengths: Int32[Array, "B"]

  @property
  def positions(self) -> Int32[Array, "B T"]:
    """Positions of the tokens; those of padding have no meaning."""
    q_len = self.slots.shape[1]
    token = jnp.arange(q_len, dtype=jnp.int32)[None]
    return self.lengths[:, None] - q_len + token


class Cache(NamedTuple):
  """The caches of all layers for B batch rows.

  Attributes:
    layers: one cache for each layer.
    lengths: tokens that each batch row holds.
    overflowed: batch rows that were given more tokens than they had room for.
      Such a row stored none of them and stores no others until it is trimmed,
      so a cache always holds the beginning of what it was given.
  """

  layers: tuple[LayerCache, ...]
  lengths: Int32[Array, "B"]
  overflowed: Bool[Array, "B"]

  @property
  def capacity(self) -> int:
    """Tokens that each batch row has room for, C."""
    return self.layers[0].k.shape[1]

  def reserve(
    self, num_tokens: int, counts: Int[Array, "B"] | None = None
  ) -> tuple[Cache, Span]:
    """Makes room at each batch row's end, for `LayerCache.write` to fill.

    Args:
      num_tokens: T.
      counts: real tokens of each batch row, the last counts[b] of T; None: all.

    Returns:
      The cache with its new lengths, and where the tokens go.

    Raises:
      ValueError: T exceeds the capacity, or counts has another shape or dtype.
    """
    capacity = self.capacity
    num_tokens = check_integer("num_tokens", num_tokens)
    require(
      num_tokens <= capacity,
      "num_tokens",
      f"from 1 to the cache's capacity = {capacity}",
      num_tokens,
    )
    if counts is None:
      counts = jnp.full_like(self.lengths, num_tokens)
    self._check_batch("counts", counts)
    counts = jnp.clip(counts.astype(jnp.int32), 0, num_tokens)
    fits = ~self.overflowed & (counts <= capacity - self.lengths)
    lengths = jnp.where(fits, self.lengths + counts, self.lengths)
    token = jnp.arange(num_tokens, dtype=jnp.int32)[None]
    real = fits[:, None] & (token >= num_tokens - counts[:, None])
    # All slots are distinct, also those beyond the capacity: `write` promises
    # unique indices to the scatter.
    slots = jnp.where(
      real, lengths[:, None] - num_tokens + token, capacity + token
    )
    overflowed = ~fits
    span = Span(slots, jnp.where(overflowed, 0, lengths))
    return self._replace(lengths=lengths, overflowed=overflowed), span

  def trim(self, lengths: Int[Array, "B"]) -> Cache:
    """Keeps the first lengths[b] tokens of each batch row and drops the rest.

    A batch row that holds fewer keeps all of them. One that has overflowed
    takes tokens again if it holds at least lengths[b] tokens.

    Raises:
      ValueError: lengths has another shape or dtype.
    """
    self._check_batch("lengths", lengths)
    lengths = jnp.maximum(lengths.astype(jnp.int32), 0)
    return self._replace(
      lengths=jnp.minimum(self.lengths, lengths),
      overflowed=self.overflowed & (lengths > self.lengths),
    )

  def _check_batch(self, name: str, x: Array) -> None:
    check_array(name, x, self.lengths.shape, "[B]")
    check_integers(name, x)


def empty_layer(
  batch: int,
  capacity: int,
  num_kv_heads: int,
  head_dim: int,
  *,
  dtype: Any,
  index_dim: int | None = None,
  index_dtype: Any = None,
) -> LayerCache:
  """A layer's cache that holds no tokens.

  Args:
    batch: batch rows, B.
    capacity: tokens that each batch row has room for, C.
    num_kv_heads: KV heads, K.
    head_dim: size of a head, D.
    dtype: dtype of keys and values.
    index_dim: size of an index key, I; None in a dense layer.
    index_dtype: dtype of the index keys: `dtype` or float8_e4m3fn; None means
      `dtype`. A dense layer ignores it.

  Raises:
    ValueError: a size is below 1, or index_dtype is neither.
  """
  batch, capacity = check_sizes(batch=batch, capacity=capacity)
  dtype = jnp.dtype(dtype)
  index_dtype = dtype if index_dtype is None else jnp.dtype(index_dtype)
  if index_dtype not in (dtype, FP8):
    raise wrong(
      "index_dtype",
      f"{dtype}, the cache's dtype, or float8_e4m3fn",
      str(index_dtype),
    )
  shape = (batch, capacity, num_kv_heads, head_dim)
  k, v = jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)
  if index_dim is None:
    return LayerCache(k, v)
  index_k = jnp.zeros((batch, capacity, index_dim), index_dtype)
  if index_dtype != FP8:
    return LayerCache(k, v, index_k)
  scale = jnp.ones((batch, capacity), jnp.float32)
  return LayerCache(k, v, index_k, scale)


def empty(layers: tuple[LayerCache, ...]) -> Cache:
  """A cache of layers that hold no tokens."""
  batch = layers[0].k.shape[0]
  return Cache(layers, jnp.zeros(batch, jnp.int32), jnp.zeros(batch, jnp.bool_))


def partition(
  cache: Cache,
  batch: tuple[str, ...],
  heads: str | None,
  context: str | None,
) -> Cache:
  """Mesh axes of each array of a cache, as a tree of `PartitionSpec`s.

  Args:
    cache: the cache, or its shapes.
    batch: mesh axes that split the batch rows.
    heads: mesh axis that splits the KV heads; None leaves them whole.
    context: mesh axis that splits the slots; None leaves them whole.
  """
  whole: Any = layer_partition(batch, heads, context)
  layers = tuple(
    whole._replace(**{n: None for n, x in layer._asdict().items() if x is None})
    for layer in cache.layers
  )
  rows: Any = PartitionSpec(batch)
  return Cache(layers, rows, rows)


def layer_partition(
  batch: tuple[str, ...], heads: str | None, context: str | None
) -> LayerCache:
  """Mesh axes of each array of a layer's cache."""
  tokens: Any = PartitionSpec(batch, context, heads, None)
  index: Any = PartitionSpec(batch, context, None)
  scale: Any = PartitionSpec(batch, context)
  return LayerCache(tokens, tokens, index, scale)
