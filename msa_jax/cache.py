"""Keys, values and index keys of the tokens that a model has read.

A `Cache` is a pytree of static shapes. Every row has room for C tokens and
holds its first lengths[b] of them from slot 0 on: slot j is position j, so
blocks lie where they lie in a full pass, and a row's length does not depend on
its neighbours'. Slots beyond the length are unused; nothing reads what they
hold.

    cache, span = cache.reserve(T, counts)      # once for all layers
    layer = layer.write(span.slots, k, v, index_k)
    cache = cache.trim(lengths)                 # drops tokens at the end

Tokens of several rows come in one array [B, T], padded on the left: of row b,
the last counts[b] are real. Padding is never stored. In a jitted function that
donates the cache, writing happens in place.

Rows may be split over devices by batch, keys and values also by KV head
(`partition`); a row's index keys serve all heads and stay whole.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Int32

from msa_jax import reference

FP8 = jnp.float8_e4m3fn


class LayerCache(NamedTuple):
  """What one layer keeps of each token.

  Attributes:
    k: keys, after norm and rotation.
    v: values.
    index_k: index keys, after norm and rotation, in the dtype of k or as e4m3
      codes; None in dense layers.
    index_k_scale: float32, with codes: an index key is codes * scale, with
      scale = max |index_k| / 448 (1 for a key of zeros).
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
    """Puts tokens into slots; those beyond the capacity are left out.

    Args:
      slots: of `Cache.reserve`.
      k: keys.
      v: values.
      index_k: index keys, not quantised; exactly if the layer has some.

    Raises:
      ValueError: an array has another shape or dtype than the cache.
    """
    if (index_k is None) != (self.index_k is None):
      here, there = (
        "None" if x is None else "an array" for x in (index_k, self.index_k)
      )
      raise ValueError(f"index_k must be {there} as in the cache, got {here}")
    new: dict[str, Any] = dict(k=k, v=v)
    if index_k is not None:
      new["index_k"] = index_k
    for name, x in new.items():
      held = getattr(self, name)
      want = (*slots.shape, *held.shape[2:])
      # Codes are made here, of keys in the dtype of k.
      dtype = self.k.dtype if name == "index_k" else held.dtype
      if x.shape != want or x.dtype != dtype:
        raise ValueError(
          f"{name} must be {dtype} of shape {want} to go into the cache, got"
          f" {x.dtype} of shape {x.shape}"
        )
    if self.index_k_scale is not None:
      codes, scale = reference.fp8_codes(new["index_k"])
      new.update(index_k=codes, index_k_scale=scale)
    return self._replace(
      **{name: _put(getattr(self, name), slots, x) for name, x in new.items()}
    )

  def index_keys(self) -> Float[Array, "B C I"] | None:
    """The index keys in the dtype of k, whether they are kept as codes."""
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
  """Where the next T tokens of each row go.

  Attributes:
    slots: a token's slot; C or more for one that is not stored.
    lengths: keys that the tokens may see; the tokens are the last T of them. 0
      for rows that have overflowed: they see nothing.
  """

  slots: Int32[Array, "B T"]
  lengths: Int32[Array, "B"]

  @property
  def positions(self) -> Int32[Array, "B T"]:
    """Positions of the tokens; of padding, any."""
    q_len = self.slots.shape[1]
    return self.lengths[:, None] - q_len + jnp.arange(q_len, dtype=jnp.int32)


class Cache(NamedTuple):
  """What a model keeps of B rows of tokens.

  Attributes:
    layers: one entry a layer.
    lengths: tokens that each row holds.
    overflowed: rows that were given more tokens than they had room for. Such a
      row took none of them, and takes no more until it is trimmed: what it
      holds is always the beginning of what it was given.
  """

  layers: tuple[LayerCache, ...]
  lengths: Int32[Array, "B"]
  overflowed: Bool[Array, "B"]

  @property
  def capacity(self) -> int:
    """Tokens that a row has room for, C."""
    return self.layers[0].k.shape[1]

  def reserve(
    self, num_tokens: int, counts: Int[Array, "B"] | None = None
  ) -> tuple[Cache, Span]:
    """Makes room at each row's end, to be filled by `LayerCache.write`.

    Args:
      num_tokens: T.
      counts: real tokens of each row, the last counts[b] of T; None: all T.

    Returns:
      The cache with its new lengths, and where the tokens go.

    Raises:
      ValueError: T exceeds the capacity, or counts has another shape or dtype.
    """
    capacity = self.capacity
    if not 1 <= num_tokens <= capacity:
      raise ValueError(
        f"num_tokens must be from 1 to the cache's capacity = {capacity}, got"
        f" {num_tokens}"
      )
    if counts is None:
      counts = jnp.full_like(self.lengths, num_tokens)
    self._check_rows("counts", counts)
    counts = jnp.clip(counts.astype(jnp.int32), 0, num_tokens)
    fits = ~self.overflowed & (counts <= capacity - self.lengths)
    lengths = jnp.where(fits, self.lengths + counts, self.lengths)
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    real = fits[:, None] & (token >= num_tokens - counts[:, None])
    # Slots are distinct, also those that do not exist.
    slots = jnp.where(
      real, lengths[:, None] - num_tokens + token, capacity + token
    )
    overflowed = ~fits
    span = Span(slots, jnp.where(overflowed, 0, lengths))
    return self._replace(lengths=lengths, overflowed=overflowed), span

  def trim(self, lengths: Int[Array, "B"]) -> Cache:
    """Keeps the first lengths[b] tokens of each row and drops the rest.

    A row that holds fewer keeps what it has. A row that has overflowed takes
    tokens again if it holds all that it is trimmed to.

    Raises:
      ValueError: lengths has another shape or dtype.
    """
    self._check_rows("lengths", lengths)
    lengths = jnp.maximum(lengths.astype(jnp.int32), 0)
    return self._replace(
      lengths=jnp.minimum(self.lengths, lengths),
      overflowed=self.overflowed & (lengths > self.lengths),
    )

  def _check_rows(self, name: str, x: Array) -> None:
    want = self.lengths.shape
    if x.shape != want or not jnp.issubdtype(x.dtype, jnp.integer):
      raise ValueError(
        f"{name} must be integers of shape [B] = {want}, got {x.dtype} of shape"
        f" {x.shape}"
      )


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
  """A layer's cache that holds nothing.

  Args:
    batch: rows, B.
    capacity: tokens a row has room for, C.
    num_kv_heads: KV heads, K.
    head_dim: size of a head, D.
    dtype: of keys and values.
    index_dim: size of an index key, I; None in a dense layer.
    index_dtype: of the index keys: dtype, which None means too, or
      float8_e4m3fn. A dense layer has no use for it.

  Raises:
    ValueError: a size is below 1, or index_dtype is neither.
  """
  for name, size in dict(batch=batch, capacity=capacity).items():
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
      raise ValueError(f"{name} must be an integer of at least 1, got {size!r}")
  dtype = jnp.dtype(dtype)
  index_dtype = dtype if index_dtype is None else jnp.dtype(index_dtype)
  if index_dtype not in (dtype, FP8):
    raise ValueError(
      f"index_dtype must be {dtype}, the cache's dtype, or float8_e4m3fn, got"
      f" {index_dtype}"
    )
  shape = (batch, capacity, num_kv_heads, head_dim)
  k, v = jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)
  if index_dim is None:
    return LayerCache(k, v)
  index_k = jnp.zeros((batch, capacity, index_dim), index_dtype)
  scale = jnp.ones((batch, capacity), jnp.float32)
  return LayerCache(k, v, index_k, scale if index_dtype == FP8 else None)


def empty(layers: tuple[LayerCache, ...]) -> Cache:
  """A cache of empty layers."""
  batch = layers[0].k.shape[0]
  return Cache(layers, jnp.zeros(batch, jnp.int32), jnp.zeros(batch, jnp.bool_))


def partition(cache: Cache, batch: tuple[str, ...], heads: str | None) -> Cache:
  """Mesh axes of each array of a cache, as a tree of `PartitionSpec`s.

  Args:
    cache: the cache, or its shapes.
    batch: axes of the rows.
    heads: axis of the KV heads; None: whole.
  """
  whole: Any = layer_partition(batch, heads)
  layers = tuple(
    whole._replace(**{n: None for n, x in layer._asdict().items() if x is None})
    for layer in cache.layers
  )
  rows: Any = PartitionSpec(batch)
  return Cache(layers, rows, rows)


def layer_partition(batch: tuple[str, ...], heads: str | None) -> LayerCache:
  """Mesh axes of each array of a layer's cache."""
  tokens: Any = PartitionSpec(batch, None, heads, None)
  index: Any = PartitionSpec(batch, None, None)
  scale: Any = PartitionSpec(batch, None)
  return LayerCache(tokens, tokens, index, scale)
