"""Shared by attention, MLP and model: sharding, rotary embedding, projections
and norms."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from msa_jax.checks import (
  check_positions,
  check_positive,
  check_rank,
  check_rope_dim,
  check_sizes,
  compute_dtype,
  require,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sharding:
  """Mesh axes that split a layer's arrays; None leaves a dimension whole.

  A module that gets one annotates its parameters, and runs attention inside
  `jax.shard_map` over batch and KV heads. It needs a mesh in context
  (`jax.set_mesh`) when it is created. Axes that this mesh lacks are ignored, so
  the defaults serve every mesh that has some of them.

  Attributes:
    batch: axes that split the batch.
    heads: axis that splits the KV heads, and the MLP's hidden units; between
      them, also batch rows or tokens, see `between_layers`.
    embed: axis that splits the embedding dimension of stored parameters.
    expert: axis that splits the experts. It also splits a batch whose size it
      divides.
    context: axis that splits the tokens of each sequence, see
      `msa_jax.context`.
  """

  batch: tuple[str, ...] = ("data", "fsdp")
  heads: str | None = "tensor"
  embed: str | None = "fsdp"
  expert: str | None = "expert"
  context: str | None = "context"

  def present(self) -> Sharding:
    """These axes without those that the mesh in context lacks."""
    names = jax.sharding.get_abstract_mesh().axis_names
    if not names:
      return self

    def held(axis: str | None) -> str | None:
      return axis if axis in names else None

    return Sharding(
      batch=tuple(axis for axis in self.batch if axis in names),
      heads=held(self.heads),
      embed=held(self.embed),
      expert=held(self.expert),
      context=held(self.context),
    )

  def batch_axes(self, mesh: Any, batch_size: int) -> tuple[str, ...]:
    """The axes of the mesh that split a batch of this size."""
    axes = tuple(axis for axis in self.batch if axis in mesh.axis_names)
    expert = self.expert
    if expert is None or expert not in mesh.axis_names or expert in axes:
      return axes
    split = (*axes, expert)
    parts = math.prod(mesh.shape[axis] for axis in split)
    return split if batch_size % parts == 0 else axes

  def context_axis(self, mesh: Any, length: int | None = None) -> str | None:
    """The axis of the mesh that splits the tokens of a sequence, or None.

    Also None if it does not divide `length`, as with the tokens of decoding.
    """
    axis = self.context
    if axis not in mesh.axis_names or mesh.shape[axis] == 1:
      return None
    if length is not None and length % mesh.shape[axis]:
      return None
    return axis

  def between_layers(
    self, mesh: Any, batch_size: int, length: int
  ) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The axes that split batch rows and tokens outside of attention and MLPs.

    Norms, sums of residuals and the loss treat each token by itself. So devices
    that share heads inside of attention and MLPs share batch rows outside of
    them; or tokens, if their axis does not divide the rows; or nothing, if it
    divides neither. What sums an MLP's output over these devices is then a
    reduce-scatter, and what is gathered before the next product makes up for
    the rest of an all-reduce. Rows come first because tokens of several rows
    would have to be transposed to be sent. Where `embed` splits parameters,
    nothing changes: XLA would gather activations in the place of parameters.
    """
    rows = self.batch_axes(mesh, batch_size)
    context = self.context_axis(mesh, length)
    tokens = () if context is None else (context,)
    heads, sizes = self.heads, dict(mesh.shape)
    if heads is None or sizes.get(heads, 1) == 1:
      return rows, tokens
    if self.embed is not None and sizes.get(self.embed, 1) > 1:
      return rows, tokens
    for split in (((*rows, heads), tokens), (rows, (*tokens, heads))):
      parts = (math.prod(mesh.shape[a] for a in axes) for axes in split)
      if not any(map(operator.mod, (batch_size, length), parts)):
        return split
    return rows, tokens


def split_beyond_batch(
  sharding: Sharding | None, batch_size: int, length: int
) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
  """What `Sharding.between_layers` gives for the mesh in use, or None if that
  is the split of the batch alone (`Sharding.batch_axes`), or there is no mesh.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if sharding is None or mesh.empty:
    return None
  split = sharding.between_layers(mesh, batch_size, length)
  return None if split == (sharding.batch_axes(mesh, batch_size), ()) else split


def gather_tokens(
  x: Float[Array, "B T E"], sharding: Sharding | None
) -> Float[Array, "B T E"]:
  """Gives devices that share heads the tokens of each other.

  See `Sharding.between_layers`. Its gradient is `split_tokens`, and vice versa.
  """
  split, whole = _token_specs(x, sharding)
  if split == whole:
    return x
  return checkpoint_name(_place(x, whole, split), "gathered_tokens")


def split_tokens(
  x: Float[Array, "B T E"], sharding: Sharding | None
) -> Float[Array, "B T E"]:
  """Undoes `gather_tokens`. Of a sum over the devices that share heads, each
  gets that of its own tokens alone."""
  split, whole = _token_specs(x, sharding)
  return x if split == whole else _place(x, split, whole)


def _token_specs(
  x: Array, sharding: Sharding | None
) -> tuple[PartitionSpec, PartitionSpec]:
  """How activations are split between layers, and inside of them."""
  mesh = jax.sharding.get_abstract_mesh()
  if sharding is None or mesh.empty:
    return PartitionSpec(), PartitionSpec()
  split = sharding.between_layers(mesh, *x.shape[:2])
  whole = (tuple(a for a in axes if a != sharding.heads) for axes in split)
  return PartitionSpec(*split), PartitionSpec(*whole)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _place(x: Array, spec: PartitionSpec, back: PartitionSpec) -> Array:
  """x split as `spec` says, and its gradient as `back` does.

  The gradient of a constraint alone is split as its result is, and from there
  XLA would go on to split the layer's products otherwise than forward.
  """
  return lax.with_sharding_constraint(x, spec)


_place.defvjp(
  lambda x, spec, back: (_place(x, spec, back), None),
  lambda spec, back, _, dx: (lax.with_sharding_constraint(dx, back),),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
  """Slower rotary frequencies for long contexts, as in Llama 3.1.

  With w = 2 pi / frequency, the tokens of a full turn, and C = `context`: a
  pair with w < C / `high_frequency_factor` keeps its frequency f, one with
  w > C / `low_frequency_factor` gets f / `factor`, and between them the
  frequency is s f + (1 - s) f / `factor` with

    s = (C / w - low_frequency_factor)
        / (high_frequency_factor - low_frequency_factor).

  Attributes:
    factor: by which the slow pairs turn slower.
    low_frequency_factor, high_frequency_factor: see above.
    context: tokens of the context before it was extended, C.

  Raises:
    ValueError: a field is not above 0, or the factors are not in order.
  """

  factor: float
  low_frequency_factor: float
  high_frequency_factor: float
  context: int

  def __post_init__(self):
    check_positive(
      factor=self.factor,
      low_frequency_factor=self.low_frequency_factor,
      high_frequency_factor=self.high_frequency_factor,
    )
    check_sizes(context=self.context)
    require(
      self.high_frequency_factor > self.low_frequency_factor,
      "high_frequency_factor",
      f"above low_frequency_factor = {self.low_frequency_factor}",
      self.high_frequency_factor,
    )

  def scale(self, frequency: Float[Array, "*N"]) -> Float[Array, "*N"]:
    """The slower frequencies, in radians a token."""
    turns = self.context * frequency / (2 * math.pi)
    low, high = self.low_frequency_factor, self.high_frequency_factor
    kept = jnp.clip((turns - low) / (high - low), 0, 1)
    return frequency * (kept + (1 - kept) / self.factor)


def partial_rope(
  x: Float[Array, "B T H D"],
  positions: Int[Array, "*B T"],
  *,
  rope_dim: int,
  theta: float,
  scaling: RopeScaling | None = None,
) -> Float[Array, "B T H D"]:
  """Rotary embedding of the first `rope_dim` dims; the others stay as they are.

  This is the rotation of `GQAttention` and `MSAttention`: of their queries and
  keys after the norm, and of the index queries and keys with the rope_dim of
  `IndexConfig.rotated`.

  Dims i and i + rope_dim / 2 form a pair, which is rotated by the angle
  position * theta^(-2 i / rope_dim), or by position times what `scaling` makes
  of that frequency. Computed in float32, or in float64 if x is float64.

  Args:
    x: heads.
    positions: integers, of the tokens or of each batch row's tokens.
    rope_dim: dims that rotate, the first ones; even.
    theta: base of the frequencies.
    scaling: how the slower frequencies are extended; None: not at all.

  Raises:
    ValueError: an argument is wrong.
  """
  check_rank("x", x, "B T H D")
  rope_dim = check_rope_dim(rope_dim, x.shape[-1])
  check_positive(theta=theta)
  check_positions(positions, *x.shape[:2])
  half = rope_dim // 2
  dtype = compute_dtype(x.dtype)
  frequency = theta ** (-jnp.arange(half, dtype=dtype) / half)
  if scaling is not None:
    frequency = scaling.scale(frequency)
  # [T] or [B, T], as [1 or B, T, 1, 1].
  positions = positions.astype(dtype).reshape(-1, x.shape[1], 1, 1)
  angle = positions * lax.expand_dims(frequency, range(3))
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  rotated = x[..., :rope_dim].astype(dtype)
  a, b = rotated[..., :half], rotated[..., half:]
  rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
  return jnp.concatenate([rotated.astype(x.dtype), x[..., rope_dim:]], axis=-1)


def project(
  dtype,
  param_dtype,
  kernel_init: Callable,
  sharding: Sharding | None,
  rngs: nnx.Rngs,
  in_features: int | tuple[int, ...],
  out_features: int | tuple[int, ...],
  use_bias: bool = False,
) -> nnx.LinearGeneral:
  """A projection into heads or out of heads.

  Args:
    dtype, param_dtype, kernel_init, sharding, rngs: as in `GQAttention`.
    in_features: input features; (heads, head_dim) for one out of heads.
    out_features: output features; (heads, head_dim) for one into heads, or
      (features,) for one into a single head.
    use_bias: whether to add a bias, which starts at 0.
  """
  bias_init = nnx.initializers.zeros_init()
  inward = isinstance(in_features, int)
  if sharding is not None:
    heads = out_features if inward else in_features
    assert isinstance(heads, tuple)
    split = (sharding.heads, None) if len(heads) == 2 else (None,)
    names = (sharding.embed, *split) if inward else (*split, sharding.embed)
    kernel_init = nnx.with_partitioning(kernel_init, names)
    bias_init = nnx.with_partitioning(bias_init, split if inward else (None,))
  return nnx.LinearGeneral(
    in_features,
    out_features,
    axis=-1 if inward else (-2, -1),
    use_bias=use_bias,
    dtype=dtype,
    param_dtype=param_dtype,
    kernel_init=kernel_init,
    bias_init=bias_init,
    rngs=rngs,
  )


def head_norm(
  normalize: bool,
  epsilon: float,
  zero_centered: bool,
  dtype,
  param_dtype,
  sharding: Sharding | None,
  rngs: nnx.Rngs,
  size: int,
) -> nnx.RMSNorm | None:
  """The RMSNorm of a head, see `rms_norm`; None unless `normalize`."""
  return (
    rms_norm(size, epsilon, zero_centered, dtype, param_dtype, sharding, rngs)
    if normalize
    else None
  )


class _ZeroCenteredRMSNorm(nnx.RMSNorm):
  """RMSNorm that scales by 1 + scale and rounds from float32 only once."""

  def __call__(self, x: Array) -> Array:  # pyright: ignore
    y = x.astype(compute_dtype(x.dtype))
    mean = jnp.mean(y * y, axis=-1, keepdims=True)
    y = y * lax.rsqrt(mean + self.epsilon)
    assert self.scale is not None
    scale = lax.expand_dims(self.scale[...].astype(y.dtype), range(y.ndim - 1))
    return (y * (1 + scale)).astype(self.dtype)


def rms_norm(
  size: int,
  epsilon: float,
  zero_centered: bool,
  dtype,
  param_dtype,
  sharding: Sharding | None,
  rngs: nnx.Rngs,
) -> nnx.RMSNorm:
  """RMSNorm whose parameter every device of a mesh holds whole.

  It multiplies by its parameter, which starts at 1. With zero_centered, it
  multiplies by 1 + its parameter, which starts at 0.
  """
  initializers = nnx.initializers
  scale_init = (
    initializers.zeros_init() if zero_centered else initializers.ones_init()
  )
  if sharding is not None:
    scale_init = nnx.with_partitioning(scale_init, (None,))
  return (_ZeroCenteredRMSNorm if zero_centered else nnx.RMSNorm)(
    size,
    epsilon=epsilon,
    dtype=dtype,
    param_dtype=param_dtype,
    scale_init=scale_init,
    rngs=rngs,
  )
