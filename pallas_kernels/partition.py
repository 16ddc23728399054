"""Operations that split themselves by batch rows and KV heads.

An operation on some batch rows and KV heads needs nothing of the others. XLA
cannot know that of a kernel, and does not see it in a sort over the pairs of
all of them: it would gather the operands on every device. `by_rows_and_heads`
tells it, by a rule of the Shardy partitioner, for meshes whose axes have type
Auto. The kernels and `msa_jax.xla` use it, each inside the forward and the
backward pass of its own gradient.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax._src import config
from jax.experimental import custom_partitioning as partitioning
from jax.extend import core as jax_core
from jax.interpreters import mlir
from jax.sharding import (
  AxisType,
  Mesh,
  NamedSharding,
  PartitionSpec,
)

Axes = tuple[str, ...]


def spec_of(letters: str, rows: Axes, heads: Axes) -> PartitionSpec:
  """The spec of an array, by its letters: B is split as the batch rows are, H
  and K as the KV heads are, and nothing else is split."""
  axes = {"B": rows or None, "H": heads or None, "K": heads or None}
  return PartitionSpec(*(axes.get(letter) for letter in letters.split()))


def _size(letter: str, letters: Sequence[str], arrays: Sequence[Any]) -> int:
  """The size of the first axis with this letter; 0 without one."""
  for names, x in zip(letters, arrays):
    if letter in names.split():
      return x.shape[names.split().index(letter)]
  return 0


def _axes_along(choice: str, letters: str, mesh: Mesh, array: Any) -> Axes:
  """The axes of the mesh that split an array along one of these letters.

  () if there are no such axes, as where a part of an axis splits it.
  """
  dim = next(i for i, x in enumerate(letters.split()) if x in choice.split())
  size = array.shape[dim]
  parts = size // array.sharding.shard_shape(array.shape)[dim]

  def slices(sharding):
    places = sharding.devices_indices_map(array.shape)
    return {
      device: index[dim].indices(size) for device, index in places.items()
    }

  names = [axis for axis in mesh.axis_names if mesh.shape[axis] > 1]
  for count in range(1, len(names) + 1):
    for axes in itertools.permutations(names, count):
      if math.prod(mesh.shape[axis] for axis in axes) == parts:
        spec = PartitionSpec(*(None,) * dim, axes)
        if slices(NamedSharding(mesh, spec)) == slices(array.sharding):
          return axes
  return ()


def sum_shared(letters: str, x: Any, rows: Axes, heads: Axes) -> Any:
  """Adds up the devices' parts of a result without the letter B, or H and K."""
  names = letters.split()
  axes = () if "B" in names else rows
  axes += () if {"H", "K"} & {*names} else heads
  return lax.psum(x, axes) if axes else x


def _rule(
  operands: Sequence[str], results: Sequence[str], group_size: int
) -> partitioning.SdyShardingRule:
  """Shardy's rule: B and K go through, everything else stays whole."""
  count = itertools.count()
  whole = []

  def mapping(letters: str) -> partitioning.ArrayMapping:
    dims = []
    for letter in letters.split():
      if letter == "H" and group_size > 1:
        dims.append(partitioning.CompoundFactor("k", "g"))
        if "g" not in whole:
          whole.append("g")  # in the order in which factors come
      elif letter in ("H", "K"):
        dims.append("k")
      elif letter == "B":
        dims.append("b")
      else:
        dims.append(f"w{next(count)}")
        whole.append(dims[-1])
    return partitioning.ArrayMapping(*dims)

  inputs = tuple(map(mapping, operands))
  outputs = tuple(map(mapping, results))
  sizes: dict[str, Any] = {"g": group_size} if "g" in whole else {}
  return partitioning.SdyShardingRule(
    inputs, outputs, need_replication_factors=tuple(whole), **sizes
  )


# The custom_jvp wraps the operands and not the operation, because JAX cannot
# lower a kernel that writes to refs inside a custom_jvp.
@jax.custom_jvp
def _once_differentiable(operands: tuple[Any, ...]) -> tuple[Any, ...]:
  return operands


@_once_differentiable.defjvp
def _(primals, tangents):
  raise NotImplementedError(
    "mosaic_gpu supports reverse mode of first order only: a kernel has no jvp,"
    " and its gradient has no gradient"
  )


# Kernels in a program that may be lowered for several platforms at once, which
# Pallas refuses. They are lowered for CUDA alone, so the program must choose by
# `jax.lax.platform_dependent` where it runs them.
_for_cuda = jax_core.Primitive("msa_jax_for_cuda")
_for_cuda.multiple_results = True
_for_cuda.def_abstract_eval(lambda *args, jaxpr: jaxpr.out_avals)


def _lower_for_cuda(context, *args, jaxpr):
  if "cuda" in context.module_context.platforms:
    context = context.replace(platforms=("cuda",))
  function = jax_core.jaxpr_as_fun(jaxpr)
  return mlir.lower_fun(function, multiple_results=True)(context, *args)


mlir.register_lowering(_for_cuda, _lower_for_cuda)


def _ahead_of_time(function: Callable) -> Callable:
  @jax.custom_batching.sequential_vmap
  def run(*args):
    jaxpr = jax.make_jaxpr(function)(*args)
    return tuple(_for_cuda.bind(*args, jaxpr=jaxpr))

  return run


def kernel(function: Callable, interpret: bool) -> Callable:
  """`function`, which runs kernels, as part of programs that are transformed.

  A `jax.shard_map` with check_vma=True tracks over which mesh axes a value
  varies. Inside a kernel JAX cannot, because what is read from memory varies,
  the counter of a loop does not, and a loop wants both to be the same. So the
  operands lose what is tracked, by a reshape that costs nothing, and the
  results vary over all of the operands' axes.
  """

  from pallas_kernels import mosaic  # not above: it imports Pallas

  if not interpret and mosaic.current_device().platform != "gpu":
    function = _ahead_of_time(function)

  def run(*args):
    args = _once_differentiable(args)
    varying = [jax.typeof(x).manual_axis_type.varying for x in args]
    axes = tuple(frozenset().union(*varying))
    if not axes:
      return function(*args)

    @jax.jit
    def inside(*args):
      with config._check_vma(False):
        return function(*(lax.squeeze(x[None], (0,)) for x in args))

    return tuple(lax.pcast(x, axes, to="varying") for x in inside(*args))

  return run


def by_rows_and_heads(
  function: Callable,
  operands: Sequence[str],
  results: Sequence[str],
  *,
  interpret: bool | None = None,
) -> Callable:
  """`function`, which XLA may run on each device's batch rows and KV heads.

  Args:
    function: takes arrays, of any number of batch rows and KV heads, and
      returns a tuple of arrays.
    operands: the letters of each operand's axes, such as "B T H D". B, H and K
      may be split. The first operand has B, and H or K.
    results: likewise. A result without B, or without H and K, is a sum over
      them, so the devices' parts are added.
    interpret: of a `kernel`, whether it is interpreted, and so calls Python in
      an order that the partitioner does not keep. None if `function` is none,
      and has gradients.

  Returns:
    A function of the same operands. It is `function` if there is one device
    only, inside `jax.shard_map`, and for an interpreted kernel.
  """
  x64 = jax.config.jax_enable_x64

  def partition(mesh, arg_shapes, result_shapes):
    del result_shapes
    kv_heads = _size("K", operands, arg_shapes)
    rows = _axes_along("B", operands[0], mesh, arg_shapes[0])
    heads = _axes_along("H K", operands[0], mesh, arg_shapes[0])
    # KV heads that the axes of the query heads do not divide stay whole.
    if kv_heads % math.prod(mesh.shape[axis] for axis in heads):
      heads = ()

    def places(letters):
      return tuple(
        NamedSharding(mesh, spec_of(names, rows, heads)) for names in letters
      )

    def local(*args):
      # Traced later, while XLA compiles, and as inside of `jax.shard_map`.
      inside = mesh.abstract_mesh.update_axis_types(
        dict.fromkeys(mesh.axis_names, AxisType.Manual)
      )
      with jax.enable_x64(x64), jax.sharding.use_abstract_mesh(inside):
        # Wrapped once more, because here JAX can lower the references that a
        # kernel makes in a wrapped function only.
        outs = wrap(None)(*args)
        return tuple(
          sum_shared(names, x, rows, heads) for names, x in zip(results, outs)
        )

    return mesh, local, places(results), places(operands)

  def wrap(rule):
    # A function of positional arguments without defaults, as JAX wants it.
    split = partitioning.custom_partitioning(lambda *args: function(*args))
    split.def_partition(
      partition=partition,
      sharding_rule=rule,
      # Decoding fails where a part of an axis splits an array.
      decode_shardings=False,
    )
    return split

  @jax.custom_batching.custom_vmap
  def mapped(*args):
    num_heads = _size("H", operands, args) or _size("K", operands, args)
    group_size = num_heads // _size("K", operands, args)
    return tuple(wrap(_rule(operands, results, group_size))(*args))

  @mapped.def_vmap
  def _(axis_size, batched, *args):
    del axis_size
    axes = [0 if x else None for x in batched]
    outs = tuple(jax.vmap(function, axes)(*args))
    return outs, (True,) * len(outs)

  # Not for kernels, see above: under vmap `mapped` hides no refs.
  @jax.custom_jvp
  def run(*args):
    return mapped(*args)

  # A gradient of a gradient is left to XLA's partitioner.
  @run.defjvp
  def _(primals, tangents):
    return jax.jvp(lambda *args: tuple(function(*args)), primals, tangents)

  def run_kernel(*args):
    return mapped(*_once_differentiable(args))

  mesh = jax.sharding.get_abstract_mesh()
  manual = AxisType.Manual in mesh.axis_types
  if jax.device_count() == 1 or manual or interpret:
    return function
  return run if interpret is None else run_kernel
