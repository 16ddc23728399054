"""Turns a trained GQA model into an MSA model (the paper's MSA-CPT)."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from msa_jax.checks import (
  check_choice,
  check_rope_dim,
  check_sizes,
  require,
  wrong,
)
from msa_jax.layers import Sharding
from msa_jax.model import DecoderLM, abstract_model, group_sizes, is_index_param
from msa_jax.model_config import IndexConfig, ModelConfig

IndexInit = Literal["main", "leading", "random"]


class _Layers:
  """The parameters of each layer by path, from single or stacked layers.

  `groups` holds the parameters of each entry of `DecoderLM.layers` and the
  number of layers in it; `positions` says in which group each layer is, and
  where in it.
  """

  def __init__(self, groups: Sequence[Any], config: ModelConfig):
    self.groups = []
    self.positions = []
    self.stacked = config.scan_layers
    for group, count in zip(groups, group_sizes(config)):
      flat = {
        path: leaf.get_value()
        for path, leaf in nnx.to_flat_state(nnx.state(group, nnx.Param))
      }
      self.positions.extend((len(self.groups), j) for j in range(count))
      self.groups.append((flat, count))

  def paths(self, layer: int) -> set[tuple]:
    return set(self.groups[self.positions[layer][0]][0])

  def get(self, layer: int, path: tuple) -> Array:
    group, j = self.positions[layer]
    value = self.groups[group][0][path]
    return value[j] if self.stacked else value

  def stack(self, first: int, count: int, path: tuple) -> Array | None:
    """A parameter of neighbouring layers; None if no one stack holds them."""
    group, j = self.positions[first]
    flat, size = self.groups[group]
    if not self.stacked or j + count > size:
      return None
    return flat[path] if count == size else flat[path][j : j + count]


def index_kernels_from_main(
  query: Float[Array, "*L E H D"],
  key: Float[Array, "*L E K D"],
  *,
  index_dim: int,
  rope_dim: int | None = None,
  index_rope_dim: int | None = None,
  shared_key: Literal["mean", "leading"] = "mean",
) -> tuple[Float[Array, "*L E K J"], Float[Array, "*L E J"]]:
  """Index projections made from a layer's query and key projections.

  Each group's index query is the mean of its query heads, q_g. Of a head's D
  dims the index heads take those that `index_dims` names. All groups share one
  index key:

    "mean": the mean of the key heads.
    "leading": for each rotary pair, the key heads k_g are vectors of complex
      numbers, since a rotation multiplies the pair by a number of modulus 1.
      With v the leading left singular vector of the matrix of columns |q_g|
      k_g, and c_g = <v, k_g>, the index key is v sqrt|c| and group g's index
      query q_g conj(c_g) / sqrt|c|, whose scores are those of q_g and c_g v,
      the part of k_g along v. Dims that do not rotate do the same in real
      numbers. With one key head, or with key heads that are multiples of each
      other, the scores are those of q_g and k_g.

  Args:
    query: kernel of the query projection.
    key: kernel of the key projection.
    index_dim: size of an index head, I.
    rope_dim: dims of a main head that rotate, as in `GQAttention`; None: all.
    index_rope_dim: dims of an index head that rotate, see `IndexConfig`.
    shared_key: how the groups' keys become one, see above.

  Returns:
    Kernels of the index query and the index key. They have J = min(I, dims with
    a counterpart) dims, the first of the I; where J < I the rest starts anew.

  Raises:
    ValueError: an argument is wrong.
  """
  for name, kernel in (("query", query), ("key", key)):
    if not hasattr(kernel, "shape") or len(kernel.shape) < 3:
      got = getattr(kernel, "shape", type(kernel).__name__)
      raise wrong(name, "a kernel of rank 3 or more, [..., E, H, D]", str(got))
  *lead, num_heads, head_dim = query.shape
  *key_lead, num_kv_heads, key_dim = key.shape
  if lead != key_lead or head_dim != key_dim or num_heads % num_kv_heads:
    want = f"a kernel like query's {tuple(query.shape)}, with heads that divide"
    raise wrong("key", f"{want} its {num_heads}", str(tuple(key.shape)))
  check_choice("shared_key", shared_key, Literal["mean", "leading"])
  dims = index_dims(head_dim, index_dim, rope_dim, index_rope_dim)
  groups = query.reshape(*lead, num_kv_heads, -1, head_dim)
  index_query = jnp.mean(groups, axis=-2)[..., dims]
  if shared_key == "mean":
    return index_query, jnp.mean(key, axis=-2)[..., dims]
  rope_dim = check_rope_dim(rope_dim, head_dim)
  index = IndexConfig(index_dim=index_dim, rope_dim=index_rope_dim)
  rotary = index.rotated(rope_dim)
  half = rotary // 2

  def pairs(x: Array) -> Array:
    return lax.complex(x[..., :half], x[..., half:rotary])

  def flat(x: Array, plain: Array) -> Array:
    return jnp.concatenate([x.real, x.imag, plain], -1).astype(query.dtype)

  wide_query = index_query.astype(jnp.promote_types(query.dtype, jnp.float32))
  wide_key = key[..., dims].astype(wide_query.dtype)
  turning = _leading_key(pairs(wide_query), pairs(wide_key))
  still = _leading_key(wide_query[..., rotary:], wide_key[..., rotary:])
  return flat(turning[0], still[0]), flat(turning[1], still[1])


def _leading_key(query: Array, key: Array) -> tuple[Array, Array]:
  """One key for all groups, for each dim alone; `index_kernels_from_main`.

  Args:
    query: real or complex [..., E, K, J].
    key: like query.

  Returns:
    Queries [..., E, K, J] and the key [..., E, J].
  """

  def norm(x: Array, axis: int) -> Array:
    return jnp.linalg.norm(x, axis=axis, keepdims=True)

  def divide(x: Array, by: Array) -> Array:
    return x / jnp.where(by == 0, 1, by)

  weighted = key * norm(query, -3)
  gram = jnp.einsum("...egj,...ehj->...jgh", weighted.conj(), weighted)
  mix = jnp.linalg.eigh(gram)[1][..., -1]  # of the largest eigenvalue, [J, K]
  along = jnp.einsum("...egj,...jg->...ej", weighted, mix)
  along = divide(along, norm(along, -2))
  parts = jnp.einsum("...ej,...egj->...gj", along.conj(), key)
  root = jnp.sqrt(norm(parts, -2))  # [..., 1, J]
  return query * divide(parts.conj(), root)[..., None, :, :], along * root


def index_dims(
  head_dim: int,
  index_dim: int,
  rope_dim: int | None = None,
  index_rope_dim: int | None = None,
) -> np.ndarray:
  """The dim of a main head that each dim of an index head is made from.

  The index heads take the rotary pairs of matching frequency and the first of
  the dims that do not rotate. Where they have more dims than that, the last
  have no counterpart, and the result is shorter than I. Norms of index heads
  are made from those of main heads by the same dims.

  Args:
    head_dim: size of a main head, D.
    index_dim: size of an index head, I.
    rope_dim: dims of a main head that rotate; None: all.
    index_rope_dim: dims of an index head that rotate, see `IndexConfig`.

  Raises:
    ValueError: an argument is wrong.
  """
  head_dim, index_dim = check_sizes(head_dim=head_dim, index_dim=index_dim)
  rope_dim = check_rope_dim(rope_dim, head_dim)
  index = IndexConfig(index_dim=index_dim, rope_dim=index_rope_dim)
  half, index_half = rope_dim // 2, index.rotated(rope_dim) // 2
  require(
    half > 0 or index_half == 0,
    "index_rope_dim",
    "0 or None where no dim of a main head rotates",
    index_rope_dim,
  )
  # Pair i of the index heads has the rotary frequency theta^(-i / index_half).
  pairs = [i * half // index_half for i in range(index_half)]
  plain = min(index_dim - 2 * index_half, head_dim - rope_dim)
  return np.array(
    [*pairs, *(half + i for i in pairs), *range(rope_dim, rope_dim + plain)],
    np.int32,
  )


def _index_from_main(
  name: tuple[str, str],
  source: _Layers,
  layer: int,
  config: ModelConfig,
  shared_key: Literal["mean", "leading"],
) -> Array | None:
  """Makes an index projection or norm of a layer from its main branch.

  Args:
    name: name of the index parameter inside the layer's attention.
    source: parameters of the model that has no Index Branch.
    layer: number of the layer.
    config: config of the model that gets the index parameter.
    shared_key: see `index_kernels_from_main`.

  Returns:
    Values of the first index dims, see `index_dims`. None if the main branch
    has no such parameter.
  """

  whole = config.qk_norm and config.qk_norm_over == "projection"

  def main(*name: str) -> Array:
    return source.get(layer, ("attention", *name))

  def scales(name: str) -> tuple[Array, Array]:
    """Scales of a whole-projection norm [heads, D], and their RMS [D].

    Index heads share one scale. They take the RMS over the heads, and what a
    head's scale is beside it goes into the head's kernel.
    """
    scale = main(f"{name}_norm", "scale") + config.zero_centered_norm
    scale = scale.reshape(-1, config.head_dim)
    return scale, jnp.sqrt(jnp.mean(scale * scale, axis=0))

  def heads(name: str) -> Array:
    """The kernel of the query or key heads, [E, heads, D]."""
    kernel = main(name, "kernel")
    if not whole:
      return kernel
    scale, shared = scales(name)
    return kernel * (scale / jnp.where(shared == 0, 1, shared))

  sizes: dict[str, Any] = dict(
    index_dim=config.index.index_dim,
    rope_dim=config.rope_dim,
    index_rope_dim=config.index.rope_dim,
  )
  match name:
    case ("index_query" | "index_key", "kernel"):
      kernels = index_kernels_from_main(
        heads("query"),
        heads("key"),
        shared_key=shared_key,
        **sizes,
      )
      return kernels[name[0] == "index_key"]
    case ("index_query_norm" | "index_key_norm" as norm, "scale"):
      if whole:
        branch = norm.removeprefix("index_").removesuffix("_norm")
        value = scales(branch)[1] - config.zero_centered_norm
      else:
        value = main(norm.removeprefix("index_"), "scale")
      return value[..., index_dims(config.head_dim, **sizes)]
    case _:
      return None


def best_index_init(config: ModelConfig) -> Literal["main", "leading"]:
  """The best of `to_msa`'s ways to make index projections of a model."""
  return "main" if config.qk_norm else "leading"


def to_msa(
  model: DecoderLM,
  config: ModelConfig,
  *,
  rngs: nnx.Rngs,
  sharding: Sharding | None = None,
  index_init: IndexInit | None = None,
) -> DecoderLM:
  """Adds an Index Branch to a trained GQA model (the paper's MSA-CPT).

  The new model takes every parameter of `model`; where both hold it in the same
  form it is the same array, not a copy. Only index projections (and their
  norms) that `model` lacks are made.

  By default they start in the better of two ways: "leading" where the model
  has no QK-norm, and "main" where it has.

  With index_init="main" they start from the layer's main branch, see
  `index_kernels_from_main`, and the norms from the query's and the key's norm.
  Where those norms go over the whole projection, the index norms take the RMS
  of their scales over the heads, and the rest of a head's scale goes into its
  kernel before the mean. If I > D, the remaining index dims start at random.
  With one query head and I = D, the index scores are then the attention scores.

  Measured before any training, on a GQA model that had learnt associative
  recall (2 layers, 4/2 heads of 16, I = 16, block 16, top 4 of 16;
  tests/test_m3.py, 2026-11-23), means over the layers:

    index_init  block recall  score recall  KL (nats)
    "random"    0.555         0.562         0.68
    "main"      0.666         0.604         0.26

  index_init="leading" makes one key for all groups in a better way, see
  `index_kernels_from_main`; docs/checkpoints.md compares the three on
  SmolLM2-135M. It is not for models with QK-norm: a norm undoes its scales.

  Args:
    model: a model whose layers are GQA where `config`'s are MSA.
    config: config of the new model; must equal `model.config` in everything but
      `layer_kinds`, `index`, `implementation`, `gqa_implementation`,
      `scan_layers`, `remat` and `dtype`.
    rngs: random streams for the index projections.
    sharding: mesh axes of the new model's parameters.
    index_init: "main" or "leading", see above, or "random" for freshly
      initialised index projections; None: `best_index_init`'s.

  Raises:
    ValueError: the configs differ in another field, which the text names; or
      index_init="leading" and the model has QK-norm.
  """
  if index_init is None:
    index_init = best_index_init(model.config)
  check_choice("index_init", index_init, IndexInit)
  if index_init == "leading" and config.qk_norm:
    raise wrong(
      "index_init", "'main' or 'random' for a model with qk_norm", "'leading'"
    )
  free = {
    "layer_kinds",
    "index",
    "implementation",
    "gqa_implementation",
    "scan_layers",
    "remat",
    "dtype",
  }
  for field in dataclasses.fields(ModelConfig):
    old, new = getattr(model.config, field.name), getattr(config, field.name)
    if field.name not in free and old != new:
      raise wrong(f"config.{field.name}", f"{old!r} as in the model", repr(new))

  def build(rngs: nnx.Rngs) -> DecoderLM:
    return DecoderLM(config, rngs=rngs, sharding=sharding)

  @nnx.jit
  def fresh_index(rngs: nnx.Rngs) -> dict[tuple, Array]:
    # The whole model is built, but XLA removes all that is not returned here.
    flat = nnx.to_flat_state(nnx.state(build(rngs), nnx.Param))
    return {
      path: leaf.get_value() for path, leaf in flat if is_index_param(path)
    }

  graphdef, shapes, specs = abstract_model(config, sharding)
  source = _Layers(model.layers, model.config)
  params = {
    path: leaf.get_value()
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))
    if path[0] != "layers"
  }
  sizes = group_sizes(config)
  firsts = [0, *itertools.accumulate(sizes)]
  unknown = set(params) - set(shapes)
  for group, (first, count) in enumerate(zip(firsts, sizes)):
    here = {path[2:] for path in shapes if path[:2] == ("layers", group)}
    for layer in range(first, first + count):
      unknown |= {("layers", group, *p) for p in source.paths(layer) - here}
  if unknown:
    raise wrong(
      "config",
      "the config of a model that has all of `model`'s parameters",
      f"one without {sorted(unknown, key=str)}",
    )
  fresh = fresh_index(rngs)

  def layer_value(layer: int, path: tuple, start: Array | None) -> Array:
    if path in source.paths(layer):
      return source.get(layer, path)
    value = None
    if index_init != "random" and path[0] == "attention":
      shared_key = "leading" if index_init == "leading" else "mean"
      value = _index_from_main(path[1:], source, layer, config, shared_key)
    assert start is not None, path
    if value is None:
      return start
    return start.at[..., : value.shape[-1]].set(value)

  def find(path: tuple) -> Array:
    if path in params:
      return params[path]
    _, group, *rest = path
    rest = tuple(rest)
    first, count = firsts[group], sizes[group]
    layers = range(first, first + count)
    if not config.scan_layers:
      return layer_value(first, rest, fresh.get(path))
    if all(rest in source.paths(layer) for layer in layers):
      stack = source.stack(first, count, rest)
      if stack is not None:
        return stack
    start = fresh.get(path)
    return jnp.stack(
      [
        layer_value(layer, rest, None if start is None else start[j])
        for j, layer in enumerate(layers)
      ]
    )

  # One at a time, so that memory never holds two copies of more than one
  # parameter.
  items = []
  for path, leaf in shapes.items():
    value = find(path).astype(leaf.dtype)
    items.append(
      (path, value if sharding is None else _place(value, specs[path]))
    )
  target = nnx.merge(graphdef, nnx.from_flat_state(items))
  target.source = model.source
  return target


def _place(x: Array, spec: PartitionSpec) -> Array:
  """Splits an array over the mesh in context; a no-op if it is already so."""
  if isinstance(x, Tracer):
    return lax.with_sharding_constraint(x, spec)
  return jax.device_put(x, NamedSharding(jax.sharding.get_mesh(), spec))
