"""Calls under meshes with Explicit axes, and inside of `jax.shard_map`.

Axes of type Explicit are part of an array's type, and most operations of JAX
want to be told how they act on them. `auto` runs a function as under a mesh
whose axes are all Auto, where XLA's partitioner decides that, and gives the
results the types that they should have. `any_mesh` does so for a public
operation, whose operands' letters say how its results are split.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from msa_jax.checks import wrong
from pallas_kernels.partition import Axes, spec_of


def explicit_mesh(*trees: Any) -> AbstractMesh | None:
  """The mesh with Explicit axes that arrays are split over, or that is in
  context; None without one."""
  meshes = [
    jax.typeof(x).sharding.mesh
    for x in jax.tree.leaves(trees)
    if isinstance(x, jax.Array)
  ]
  for mesh in (*meshes, jax.sharding.get_abstract_mesh()):
    if mesh.explicit_axes:
      return mesh
  return None


def _check_devices(arguments: Mapping[str, Any]) -> None:
  """Raises ValueError if an array has other devices than the mesh in context.

  Inside of `jax.jit` arrays do not tell theirs, and pass, as those on one
  device do.
  """
  mesh = jax.sharding.get_abstract_mesh()
  for name, tree in () if mesh.empty else arguments.items():
    for x in jax.tree.leaves(tree):
      if not isinstance(x, jax.Array) or isinstance(x, Tracer):
        continue
      count = len(x.sharding.device_set)
      if count not in (1, mesh.size):
        raise wrong(
          name,
          f"arrays on the {mesh.size} devices of the mesh in context,"
          f" {dict(mesh.shape)} (make them under it, or move them with"
          " jax.device_put)",
          f"one on {count} devices",
        )


def auto(
  function: Callable, mesh: AbstractMesh, specs: Callable[[Any], Any]
) -> Callable:
  """`function` as under `mesh` with all Explicit axes made Auto.

  Args:
    function: of pytrees of arrays.
    mesh: of `explicit_mesh`.
    specs: from the results, a pytree like them of the PartitionSpec that each
      array gets. An axis that is not Explicit in `mesh` is left out.

  Returns:
    A function of the same arguments, which has a gradient.
  """
  types = {axis: AxisType.Auto for axis in mesh.explicit_axes}
  inside = mesh.update_axis_types(types)

  def cast(x):
    if not isinstance(x, jax.Array):
      return x
    return jax.sharding.reshard(x, NamedSharding(inside, PartitionSpec()))

  def run(*args):
    held = [
      NamedSharding(x.sharding.mesh, PartitionSpec())
      for x in jax.tree.leaves(args)
      if isinstance(x, jax.Array)
      and not isinstance(x, Tracer)
      and isinstance(x.sharding, NamedSharding)
    ]
    with jax.sharding.use_abstract_mesh(inside):
      out = function(*jax.tree.map(cast, args))
      wanted = specs(out)

    def place(x, spec):
      # Without jit, a constant is on one device alone.
      if (
        held
        and not isinstance(x, Tracer)
        and x.sharding.device_set != held[0].device_set
      ):
        x = jax.device_put(x, held[0])
      names = (_explicit(mesh, axes) for axes in spec)
      return jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec(*names)))

    return jax.tree.map(place, out, wanted)

  return run


def _axes_of(letters: Mapping[str, str], arrays: Any) -> tuple[Axes, Axes]:
  """The Explicit axes that split the arrays' batch rows, and their KV heads."""
  found: dict[str, Axes] = {"B": (), "K": ()}
  named = [
    (letters[name].split(), leaf)
    for name, x in arrays.items()
    for leaf in jax.tree.leaves(x)
    if isinstance(leaf, jax.Array)
  ]
  for names, x in named:
    for letter, axes in zip(names, jax.typeof(x).sharding.spec):
      letter = "K" if letter == "H" else letter
      axes = (axes,) if isinstance(axes, str) else tuple(axes or ())
      if axes and not found.get(letter, axes):
        found[letter] = axes
  return found["B"], tuple(a for a in found["K"] if a not in found["B"])


def _explicit(mesh: AbstractMesh, axes: Any) -> Axes | None:
  axes = (axes,) if isinstance(axes, str) else tuple(axes or ())
  return tuple(axis for axis in axes if axis in mesh.explicit_axes) or None


def any_mesh(results: Any, **operands: str) -> Callable:
  """A decorator that makes an operation work under every mesh.

  Args:
    results: a pytree like the result, of the letters of each array's axes.
    **operands: the letters of each operand's axes, such as "B T H D"; those of
      each of its arrays for an operand that is a pytree. The results' batch
      rows are split as the operands' are, and their heads too; other axes are
      not split.
  """

  def decorate(function: Callable) -> Callable:
    signature = inspect.signature(function)

    @functools.wraps(function)
    def run(*args, **kwargs):
      call = signature.bind(*args, **kwargs).arguments
      arrays = {
        name: x
        for name, x in call.items()
        if name in operands and _has_arrays(x)
      }
      arrays = vary_together(arrays)
      call.update(arrays)
      mesh = explicit_mesh(arrays)
      if mesh is None:
        return function(**call)

      def inner(arrays):
        return function(**call | arrays)

      rows, heads = _axes_of(operands, arrays)

      def specs(out):
        letters = results
        if isinstance(results, tuple) and not isinstance(out, tuple):
          letters = results[0]
        spec = functools.partial(spec_of, rows=rows, heads=heads)
        return jax.tree.map(lambda _, names: spec(names), out, letters)

      return auto(inner, mesh, specs)(arrays)

    return run

  return decorate


def _has_arrays(tree: Any) -> bool:
  """Whether an operand holds arrays, as query_pieces do beside integers."""
  return any(isinstance(x, jax.Array) for x in jax.tree.leaves(tree))


def vary_together(arrays: Any) -> Any:
  """Lets all arrays vary over the same axes of a `jax.shard_map`.

  Loops and custom gradients want that of what they carry and return.
  """
  every = frozenset().union(
    *(
      jax.typeof(x).manual_axis_type.varying
      for x in jax.tree.leaves(arrays)
      if isinstance(x, jax.Array)
    )
  )

  def vary(x):
    if not isinstance(x, jax.Array):
      return x
    missing = every - jax.typeof(x).manual_axis_type.varying
    return lax.pcast(x, tuple(missing), to="varying") if missing else x

  return jax.tree.map(vary, arrays)


def varying_zeros(shape: tuple[int, ...], dtype: Any, like: Any) -> Array:
  """Zeros for a loop, which wants what it sums up to vary over the same axes
  of a mesh as the arrays `like`."""
  varying = [
    jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(like)
  ]
  axes = tuple(frozenset().union(*varying))
  x = jnp.zeros(shape, dtype)
  return lax.pcast(x, axes, to="varying") if axes else x


def any_mesh_function(specs: Callable[..., Any]) -> Callable:
  """A decorator that makes a function of arrays work under every mesh.

  Args:
    specs: from the result and the function's arguments, a pytree like the
      result of the PartitionSpec that each array gets.
  """

  def decorate(function: Callable) -> Callable:
    @functools.wraps(function)
    def run(*args, **kwargs):
      args, kwargs = vary_together(dict(args=args, kwargs=kwargs)).values()
      mesh = explicit_mesh(args, kwargs)
      if mesh is None:
        return function(*args, **kwargs)

      def inner(args, kwargs):
        return function(*args, **kwargs)

      def places(out):
        return specs(out, *args, **kwargs)

      return auto(inner, mesh, places)(args, kwargs)

    return run

  return decorate


def any_mesh_method(specs: Callable[..., Any]) -> Callable:
  """`any_mesh_function` for methods of a `flax.nnx.Module`, which must not
  change the module. `specs` takes the module after the result."""

  def decorate(method: Callable) -> Callable:
    _, *names = inspect.signature(method).parameters

    @functools.wraps(method)
    def run(self, *args, **kwargs):
      _check_devices(dict(zip(names, args)) | kwargs)
      if explicit_mesh(args, kwargs) is None:
        return method(self, *args, **kwargs)
      graphdef, state = nnx.split(self)

      def places(out, state, *args, **kwargs):
        del state
        return specs(out, self, *args, **kwargs)

      @any_mesh_function(places)
      def inner(state, *args, **kwargs):
        return method(nnx.merge(graphdef, state), *args, **kwargs)

      return inner(state, *args, **kwargs)

    return run

  return decorate


def spec(x: Any) -> PartitionSpec:
  """The Explicit axes that split an array."""
  if not isinstance(x, jax.Array):
    return PartitionSpec()
  return jax.typeof(x).sharding.spec
