"""Turns a trained GQA model into an MSA model (the paper's MSA-CPT)."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from msa_jax.checks import require
from msa_jax.layers import Sharding
from msa_jax.model import DecoderLM, abstract_model, group_sizes, is_index_param
from msa_jax.model_config import ModelConfig


class _Layers:
  """Parameters of each layer by path, whether layers are stacked or not."""

  def __init__(self, groups: Sequence[Any], config: ModelConfig):
    self.groups = []
    self.places = []
    self.stacked = config.scan_layers
    for group, count in zip(groups, group_sizes(config)):
      flat = {
        path: leaf.get_value()
        for path, leaf in nnx.to_flat_state(nnx.state(group, nnx.Param))
      }
      self.places.extend((len(self.groups), j) for j in range(count))
      self.groups.append((flat, count))

  def paths(self, layer: int) -> set[tuple]:
    return set(self.groups[self.places[layer][0]][0])

  def get(self, layer: int, path: tuple) -> Array:
    group, j = self.places[layer]
    value = self.groups[group][0][path]
    return value[j] if self.stacked else value

  def stack(self, first: int, count: int, path: tuple) -> Array | None:
    """A parameter of neighbouring layers, if they are of one stack here."""
    group, j = self.places[first]
    flat, size = self.groups[group]
    if not self.stacked or j + count > size:
      return None
    return flat[path] if count == size else flat[path][j : j + count]


def _index_from_main(
  name: tuple[str, str], source: _Layers, layer: int, config: ModelConfig
) -> Array | None:
  """An index projection or norm of a layer, from its main branch.

  Args:
    name: of the parameter in its attention.
    source: parameters of the model that is without.
    layer: number of the layer.
    config: of the model that the index parameter is for.

  Returns:
    Values of the index dims 0 to n - 1, which dims beyond D do not have; None
    if the main branch has no such parameter.
  """
  head_dim, index_dim = config.head_dim, config.index.index_dim
  rope_dim = head_dim if config.rope_dim is None else config.rope_dim
  half, index_half = rope_dim // 2, min(rope_dim, index_dim // 2 * 2) // 2
  # Pair i of the index heads turns by theta^(-i / index_half).
  pairs = [i * half // index_half for i in range(index_half)]
  plain = min(index_dim - 2 * index_half, head_dim - rope_dim)
  dims = np.array(
    [*pairs, *(half + i for i in pairs), *range(rope_dim, rope_dim + plain)]
  )

  def main(*name: str) -> Array:
    return source.get(layer, ("attention", *name))

  match name:
    case ("index_query", "kernel"):
      query = main("query", "kernel")
      shape = (len(query), config.num_kv_heads, -1, head_dim)
      value = jnp.mean(query.reshape(shape), axis=2)
    case ("index_key", "kernel"):
      value = jnp.mean(main("key", "kernel"), axis=1)
    case ("index_query_norm" | "index_key_norm" as norm, "scale"):
      value = main(norm.removeprefix("index_"), "scale")
    case _:
      return None
  return value[..., dims]


def to_msa(
  model: DecoderLM,
  config: ModelConfig,
  *,
  rngs: nnx.Rngs,
  sharding: Sharding | None = None,
  index_init: Literal["main", "random"] = "main",
) -> DecoderLM:
  """Adds an Index Branch to a trained GQA model (the paper's MSA-CPT).

  Every parameter of `model` is taken over, as the same array where both models
  hold it alike, and none but the index projections is made. Those of layers
  that had none start from those of the main branch: a group's index query from
  the mean of its query heads, the index key from the mean of the key heads,
  both with the norm weights that these have. Where I is less than D they take
  the rotary pairs whose frequencies are the index heads' and the first of the
  other dims; where it is more, the rest starts at random. With one head, I = D,
  the index ranks by the very attention scores.

  Before any training, recalls of a GQA model that had learnt associative recall
  (2 layers, 4/2 heads of 16, I 16, block 16, top 4 of 16; tests/test_m3.py,
  2026-11-23), means of the layers, from random projections and from these:
  block recall 0.555 and 0.666, score recall 0.562 and 0.604, KL 0.68 and 0.26
  nats.

  Args:
    model: a model whose layers are GQA where `config`'s are MSA.
    config: of the new model; must equal `model.config` in everything but
      `layer_kinds`, `index`, `implementation`, `gqa_implementation`,
      `scan_layers`, `remat` and `dtype`.
    rngs: for the index projections.
    sharding: of the new model.
    index_init: "main" as above; "random": the index projections start fresh.

  Raises:
    ValueError: the configs differ elsewhere, naming the field.
  """
  require(
    index_init in ("main", "random"),
    "index_init",
    "'main' or 'random'",
    index_init,
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
      raise ValueError(
        f"config.{field.name} must be {old!r} as in the model, got {new!r}"
      )

  def build(rngs: nnx.Rngs) -> DecoderLM:
    return DecoderLM(config, rngs=rngs, sharding=sharding)

  @nnx.jit
  def fresh_index(rngs: nnx.Rngs) -> dict[tuple, Array]:
    # What nobody asks for is not computed: the rest of the model.
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
    raise ValueError(
      "config must describe a model that has all of the model's parameters,"
      f" these have no place: {sorted(unknown, key=str)}"
    )
  fresh = fresh_index(rngs)

  def layer_value(layer: int, path: tuple, start: Array | None) -> Array:
    if path in source.paths(layer):
      return source.get(layer, path)
    value = None
    if index_init == "main" and path[0] == "attention":
      value = _index_from_main(path[1:], source, layer, config)
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

  # One by one, so that no more than one parameter is there a second time.
  items = []
  for path, leaf in shapes.items():
    value = find(path).astype(leaf.dtype)
    items.append(
      (path, value if sharding is None else _split(value, specs[path]))
    )
  target = nnx.merge(graphdef, nnx.from_flat_state(items))
  target.source = model.source
  return target
