"""Context parallelism: the tokens of a sequence split over a mesh axis.

Over n devices, the T tokens of a row are cut into 2 n pieces of equal length.
Device c holds pieces c and 2 n - 1 - c, so that causal work is the same for
each device: a query at slot t sees t + 1 keys, and the two pieces' means add up
to T. In *zigzag order* the tokens stand as the devices hold them: pieces 0,
2 n - 1, 1, 2 n - 2, and so on.

Everything that acts on one token at a time stays where its token is. Attention
takes one of two ways, each inside `jax.shard_map`:

- Keys to the queries. `gather_keys` gives each device the keys of all tokens,
  and `query_pieces` says where its own queries stand. A token's keys, values
  and index key are few bytes (2,304 in the paper's shape) beside its queries
  and activations, and with MSA each query reads P blocks of them. The gradients
  of the keys are summed over the devices in float32.
- Tokens to the heads. `to_heads` gives each device all tokens of H / n heads,
  and `from_heads` undoes it. Dense attention takes this way where n divides the
  KV heads, because it is plain attention to the kernels.

`to_zigzag` and `from_zigzag` move tokens between the order of the sequence and
zigzag order; each device sends and receives two pieces. `zigzag_order` is the
same as a permutation.

These functions are called inside `jax.shard_map`, with the axis's name, on what
a device holds. `zigzag_order` can be called anywhere, and the methods of
`Split` are for whole arrays under a mesh.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from msa_jax.checks import check_integer, compute_dtype, require
from msa_jax.segments import Segments


def check_length(name: str, length: int, devices: int) -> None:
  """Raises ValueError unless a row of `length` tokens can be split."""
  require(
    length % (2 * devices) == 0,
    name,
    f"a number of tokens that is a multiple of {2 * devices}, two pieces for"
    f" each of the {devices} devices that share a sequence (pad it on the right"
    " and leave the padding out of the loss and of query_mask)",
    length,
  )


def _check_own(name: str, length: int, axis_name: str) -> None:
  """`check_length` of the `length` tokens of a row that one device holds."""
  devices = lax.axis_size(axis_name)
  check_length(f"{name} of all devices", length * devices, devices)


def zigzag_order(length: int, devices: int) -> Int[np.ndarray, "T"]:
  """The token at each place of the zigzag order.

  x[:, zigzag_order(T, n)] has the tokens as n devices hold them, and
  numpy.argsort of it undoes that.

  Raises:
    ValueError: 2 n does not divide T.
  """
  length = check_integer("length", length)
  devices = check_integer("devices", devices)
  check_length("length", length, devices)
  slots = np.arange(length).reshape(2 * devices, -1)
  return np.stack([slots[:devices], slots[devices:][::-1]], 1).reshape(-1)


def imbalance(positions: Int[np.ndarray, "*B T"], devices: int) -> float:
  """The most index scores of a device over the mean of all, 1 if balanced.

  A query scores the keys that it sees: as many as its position in its document,
  or along its tree's path, and one.

  Args:
    positions: rotary positions, such as `Segments.positions`, on the host, in
      the order of the sequence.
    devices: that share the sequences.
  """
  seen = np.atleast_2d(np.asarray(positions)) + 1.0
  order = zigzag_order(seen.shape[1], devices)
  work = seen[:, order].reshape(len(seen), devices, -1).sum((0, 2))
  return float(work.max() / work.mean())


def _whole_to_natural(x: Array, devices: int, axis: int = 1) -> Array:
  """Whole rows in zigzag order, in the order of the sequence."""
  shape = x.shape
  x = x.reshape(*shape[:axis], devices, 2, -1, *shape[axis + 1 :])
  early, late = (lax.index_in_dim(x, i, axis + 1, False) for i in (0, 1))
  return lax.concatenate([early, lax.rev(late, (axis,))], axis).reshape(shape)


def _whole_to_zigzag(x: Array, devices: int, axis: int = 1) -> Array:
  """Undoes `_whole_to_natural`."""
  shape = x.shape
  x = x.reshape(*shape[:axis], 2, devices, -1, *shape[axis + 1 :])
  early, late = (lax.index_in_dim(x, i, axis, False) for i in (0, 1))
  x = jnp.stack([early, lax.rev(late, (axis,))], axis + 1)
  return x.reshape(shape)


def query_pieces(axis_name: str, length: int) -> tuple[tuple[Any, int], ...]:
  """Where a device's `length` tokens stand, as the operations take it.

  Raises:
    ValueError: they are no two pieces of equal length.
  """
  _check_own("length", length, axis_name)
  device, devices = lax.axis_index(axis_name), lax.axis_size(axis_name)
  size = length // 2
  return (device * size, size), ((2 * devices - 1 - device) * size, size)


def _two_pieces(
  first: Array, second: Array, axis: int, axis_name: str
) -> Array:
  """One after the other on devices of even number, the reverse on odd ones."""
  odd = lax.axis_index(axis_name) % 2 == 1
  early = jnp.where(odd, second, first)
  late = jnp.where(odd, first, second)
  return lax.concatenate([early, late], axis)


def _zigzag_owners(devices: int) -> tuple[list[tuple[int, int]], ...]:
  """Who sends the first and the second half of what it holds to whom.

  Device c holds pieces 2 c and 2 c + 1 of the sequence. The pieces of even
  number go to the devices of even number below n and to those of odd number,
  counted from the end, so each device receives one piece of each half.
  """

  def owner(piece):
    return piece if piece < devices else 2 * devices - 1 - piece

  return tuple(
    [(c, owner(2 * c + half)) for c in range(devices)] for half in (0, 1)
  )


def to_zigzag(x: Array, axis_name: str, axis: int = 1) -> Array:
  """The part of a row that a device holds in zigzag order.

  Args:
    x: the device's part in the order of the sequence.
    axis_name: of the mesh axis.
    axis: of the tokens in x.

  Raises:
    ValueError: they are no two pieces of equal length.
  """
  _check_own("x", x.shape[axis], axis_name)
  firsts, seconds = _zigzag_owners(lax.axis_size(axis_name))
  size = x.shape[axis] // 2
  first = lax.slice_in_dim(x, 0, size, axis=axis)
  second = lax.slice_in_dim(x, size, None, axis=axis)
  return _two_pieces(
    lax.ppermute(first, axis_name, firsts),
    lax.ppermute(second, axis_name, seconds),
    axis,
    axis_name,
  )


def from_zigzag(x: Array, axis_name: str, axis: int = 1) -> Array:
  """Undoes `to_zigzag`."""
  _check_own("x", x.shape[axis], axis_name)
  firsts, seconds = _zigzag_owners(lax.axis_size(axis_name))
  size = x.shape[axis] // 2
  early = lax.slice_in_dim(x, 0, size, axis=axis)
  late = lax.slice_in_dim(x, size, None, axis=axis)
  odd = lax.axis_index(axis_name) % 2 == 1
  first, second = jnp.where(odd, late, early), jnp.where(odd, early, late)
  back = [[(b, a) for a, b in pairs] for pairs in (firsts, seconds)]
  first = lax.ppermute(first, axis_name, back[0])
  second = lax.ppermute(second, axis_name, back[1])
  return lax.concatenate([first, second], axis)


class Split(NamedTuple):
  """How arrays [B, T, *A] are split over the mesh in context.

  Attributes:
    axis: the mesh axis that splits the tokens.
    devices: its size, n.
    rows: the mesh axes that split the batch rows.
  """

  axis: str
  devices: int
  rows: tuple[str, ...]

  def zigzag(self, x: Array, spec: PartitionSpec | None = None) -> Array:
    """The array in zigzag order.

    Args:
      x: the array.
      spec: the mesh axes that split it; None: rows and tokens come first. A
        single row stands for all of them and is not split.
    """
    return self._move(to_zigzag, x, spec)

  def natural(self, x: Array, spec: PartitionSpec | None = None) -> Array:
    """Undoes `zigzag`."""
    return self._move(from_zigzag, x, spec)

  def _move(self, function, x, spec):
    if spec is None:
      spec = PartitionSpec(self.rows if x.shape[0] > 1 else None, self.axis)
    axis = list(spec).index(self.axis)
    return jax.shard_map(
      functools.partial(function, axis_name=self.axis, axis=axis),
      in_specs=spec,
      out_specs=spec,
      check_vma=False,
    )(x)

  def own(self, x: Array) -> Array:
    """`zigzag` of rows [1 or B, T, *A] that every device holds whole.

    Each device takes its own pieces, so nothing is sent.
    """
    rows = self.rows if x.shape[0] > 1 else None

    def pieces(x):
      parts = [
        lax.dynamic_slice_in_dim(x, start, size, 1)
        for start, size in query_pieces(self.axis, x.shape[1] // self.devices)
      ]
      return lax.concatenate(parts, 1)

    return jax.shard_map(
      pieces,
      in_specs=PartitionSpec(rows),
      out_specs=PartitionSpec(rows, self.axis),
      check_vma=False,
    )(x)

  def positions(
    self,
    given: Array | None,
    zigzag: bool,
    segments: Segments | None,
    length: int,
  ) -> Array:
    """Rotary positions [1 or B, T] in zigzag order.

    Args:
      given: a caller's, [T] or [B, T]; None: those of the segments, or 0 to
        T - 1.
      zigzag: whether the caller's are in zigzag order.
      segments: of packed rows.
      length: T.
    """
    if given is not None:
      given = jnp.atleast_2d(given)
      return given if zigzag else self.zigzag(given)
    if segments is not None:
      return self.own(segments.positions)
    return self.own(jnp.arange(length, dtype=jnp.int32)[None])


def gather_keys(x: Any, axis_name: str) -> Any:
  """All tokens of the rows, in the order of the sequence.

  `sum_gradients` sums the devices' gradients.

  Arrays of a tuple with one dtype are sent together. XLA (jax 0.11.2) has one
  collective under way at a time, so of keys and values that are sent one after
  the other, only the first are on the way while blocks are chosen.

  Args:
    x: [B, T, *A], what the device holds of the rows, in zigzag order, or a
      tuple of such arrays.
    axis_name: of the mesh axis.

  Returns:
    [B, S, *A], or a tuple of such arrays.

  Raises:
    ValueError: its tokens are no two pieces of equal length.
  """
  return _gather_keys(x, axis_name)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather_keys(x: Any, axis_name: str) -> Any:
  if not isinstance(x, tuple):
    return gather_tokens(x, axis_name)
  if len({each.dtype for each in x}) > 1:
    return tuple(gather_tokens(each, axis_name) for each in x)
  flat = [each.reshape(*each.shape[:2], -1) for each in x]
  ends = np.cumsum([each.shape[2] for each in flat])
  whole = gather_tokens(jnp.concatenate(flat, axis=2), axis_name)
  parts = jnp.split(whole, ends[:-1], axis=2)
  return tuple(
    part.reshape(*part.shape[:2], *each.shape[2:])
    for part, each in zip(parts, x)
  )


def _gather_keys_fwd(x, axis_name):
  return _gather_keys(x, axis_name), None


def sum_gradients(gradient: Float[Array, "B S *A"], axis_name: str) -> Array:
  """A device's part of the sum of all devices' gradients of gathered keys.

  The sum is one of float32 numbers (float64 for float64), in the order of the
  collective, and rounded to the gradient's dtype once.

  Args:
    gradient: of the keys of all tokens, in the order of the sequence.
    axis_name: of the mesh axis.

  Returns:
    [B, S / n, *A] in zigzag order.
  """
  total = gradient.astype(compute_dtype(gradient.dtype))
  total = _whole_to_zigzag(total, lax.axis_size(axis_name))
  total = lax.psum_scatter(total, axis_name, scatter_dimension=1, tiled=True)
  return total.astype(gradient.dtype)


def _gather_keys_bwd(axis_name, residuals, cotangent):
  del residuals
  add_up = functools.partial(sum_gradients, axis_name=axis_name)
  return (jax.tree.map(add_up, cotangent),)


_gather_keys.defvjp(_gather_keys_fwd, _gather_keys_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def for_each(x: Array, count: int) -> Any:
  """An operand that several calls read; its gradients add up in float32."""
  return (x,) * count


def _for_each_fwd(x, count):
  return (x,) * count, None


def _for_each_bwd(count, residuals, cotangents):
  del count, residuals
  dtype = compute_dtype(cotangents[0].dtype)
  total = functools.reduce(jnp.add, (x.astype(dtype) for x in cotangents))
  return (total.astype(cotangents[0].dtype),)


for_each.defvjp(_for_each_fwd, _for_each_bwd)


# Keys and values that a device gathers at once, in bytes. Below it all heads
# come together, because kernels of fewer heads fill a GPU less well.
PART_BYTES = 1 << 30


def heads_at_once(k: Float[Array, "B T K D"], devices: int) -> int:
  """KV heads whose keys and values a device gathers at once, a divisor of K.

  Args:
    k: the keys that a device holds of the rows.
    devices: that share the rows.
  """
  heads = k.shape[2]
  one = 2 * (k.size // heads) * k.dtype.itemsize * devices
  most = max(PART_BYTES // max(one, 1), 1)
  return max(n for n in range(1, heads + 1) if heads % n == 0 and n <= most)


def gather_tokens(x: Array, axis_name: str) -> Array:
  """`gather_keys` of an array [B, T, *A] without a gradient, such as a mask."""
  _check_own("x", x.shape[1], axis_name)
  whole = lax.all_gather(x, axis_name, axis=1, tiled=True)
  return _whole_to_natural(whole, lax.axis_size(axis_name))


def to_heads(x: Array, axis_name: str) -> Array:
  """All tokens of a device's share of the heads.

  Args:
    x: [B, T / n, H, *A] in zigzag order. n must divide H.
    axis_name: of the mesh axis.

  Returns:
    [B, T, H / n, *A] in the order of the sequence.

  Raises:
    ValueError: its tokens are no two pieces of equal length, or n does not
      divide H.
  """
  _check_own("x", x.shape[1], axis_name)
  devices = lax.axis_size(axis_name)
  require(
    x.shape[2] % devices == 0,
    "x",
    f"a number of heads that is a multiple of {devices}, the devices that share"
    " a sequence",
    x.shape[2],
  )
  x = lax.all_to_all(x, axis_name, split_axis=2, concat_axis=1, tiled=True)
  return _whole_to_natural(x, lax.axis_size(axis_name))


def from_heads(x: Array, axis_name: str) -> Array:
  """Undoes `to_heads`."""
  x = _whole_to_zigzag(x, lax.axis_size(axis_name))
  return lax.all_to_all(x, axis_name, split_axis=1, concat_axis=2, tiled=True)


def gather_slots(tree: Any, axis_name: str) -> Any:
  """Arrays [B, C, *A] of a cache whose slots are split over the devices, one
  device's C after another's."""
  return jax.tree.map(
    lambda x: lax.all_gather(x, axis_name, axis=1, tiled=True), tree
  )


def own_slots(
  slots: Int[Array, "B T"], capacity: int, axis_name: str
) -> Int[Array, "B T"]:
  """Slots among the `capacity` ones that a device has of a cache that is split.

  Slots of other devices become distinct ones at or behind `capacity`, which
  writing drops.
  """
  own = slots - lax.axis_index(axis_name) * capacity
  token = jnp.arange(slots.shape[1], dtype=slots.dtype)[None]
  return jnp.where((own >= 0) & (own < capacity), own, capacity + token)


def share_of_heads(x: Array, axis_name: str, axis: int) -> Array:
  """A device's share of an axis of heads that every device holds whole.

  Where there are fewer heads than devices, neighbouring devices share one.
  """
  heads, devices = x.shape[axis], lax.axis_size(axis_name)
  size = max(heads // devices, 1)
  first = lax.axis_index(axis_name) * heads // devices
  return lax.dynamic_slice_in_dim(x, first, size, axis)
