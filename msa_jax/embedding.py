"""The embedding of tokens, whose gradient is summed in float32 without atomics.

The gradient of a lookup adds the cotangent of each token to the row that the
token read. As a scatter-add, which is what JAX makes of `jnp.take`, a GPU adds
with atomics, in the dtype of the activations: text repeats few tokens very
often, so that thousands of additions wait for one row and are rounded to
bfloat16 one by one, in an order that changes from run to run.

So accelerators compute it as the product one_hot(tokens)^T cotangent, which
their matrix units sum in float32 in an order that they fix. With N tokens, V
rows and E columns this takes 2 N V E operations, a third of the 6 N V E of the
output projection and its gradients. (A float32 model pays more on a GPU, as its
sums take no TF32 and its output projection does.) What else could do it is a
sum over runs of sorted tokens. Its cost does not grow with V, but a mesh axis
that splits the batch would gather all tokens' cotangents to sort them, where a
product sums on each device and then over the devices. CPUs add one token after
another, so there a scatter-add is exact to float32, repeats its bits and costs
N E.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from msa_jax.checks import check_integers, compute_dtype, reverse_mode
from msa_jax.layers import Sharding
from msa_jax.meshes import vary_together, varying_zeros

# What the one-hot rows of one product may take on each device, unless 128
# entries of the vocabulary take more: below that, matrix units would idle.
_ONE_HOT_BYTES = 128 * 2**20
_LEAST_ROWS = 128


class TokenEmbedding(nnx.Embed):
  """`flax.nnx.Embed` with a gradient summed in float32, see this module.

  x[..., :] = embedding[token], cast to dtype, and

    d embedding[v] = sum of dx over the tokens that are v,

  accumulated in float32 (float64 for float64) and rounded once to the
  parameter's dtype. Negative tokens count from the end. Other tokens outside of
  the vocabulary give NaN, and no gradient.

  Args:
    *args, **named: of `flax.nnx.Embed`.
    sharding: of the model: under a mesh whose axes split the batch, the product
      takes the memory of each device's own tokens into account.
  """

  def __init__(self, *args: Any, sharding: Sharding | None = None, **named):
    super().__init__(*args, **named)
    self.sharding = sharding

  def __call__(  # pyright: ignore
    self, inputs: Int[Array, "*S"], out_sharding: Any = None
  ) -> Float[Array, "*S E"]:
    """The embeddings of tokens.

    Args:
      inputs: token ids.
      out_sharding: of the result; with it, the gradient is `nnx.Embed`'s.

    Raises:
      NotImplementedError: forward mode; there is a gradient in reverse mode.
      ValueError: the tokens are no integers.
    """
    check_integers("inputs", inputs)
    if out_sharding is not None or self.num_embeddings == 1:
      return super().__call__(inputs, out_sharding)
    table, inputs = vary_together((self.embedding[...], inputs))
    plan = _Plan(
      size=self.num_embeddings,
      rows=_rows_at_once(
        self.num_embeddings, inputs.size // self._parts(inputs), self.dtype
      ),
      dtype=jnp.dtype(self.dtype),
      param_dtype=table.dtype,
    )
    return reverse_mode(
      lambda: _look_up(table, inputs, plan),
      "the embedding of DecoderLM supports reverse mode only (jax.grad,"
      " jax.vjp), not jax.jvp, jax.jacfwd or jax.hessian",
    )

  def _parts(self, inputs: Array) -> int:
    """How many devices share the tokens, as far as the model splits them.

    Inside of `jax.shard_map` the tokens are one device's already.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if self.sharding is None or mesh.empty or inputs.ndim == 0:
      return 1
    axes = self.sharding.batch_axes(mesh, inputs.shape[0])
    return math.prod(mesh.shape[a] for a in axes if a in mesh.auto_axes)


class _Plan(NamedTuple):
  """What `_look_up` is compiled for.

  Attributes:
    size: rows of the table, V.
    rows: of the table, whose gradient one product gives.
    dtype: of the embeddings.
    param_dtype: of the table and its gradient.
  """

  size: int
  rows: int
  dtype: Any
  param_dtype: Any


def _rows_at_once(size: int, tokens: int, dtype: Any) -> int:
  """V divided into equal parts that keep to _ONE_HOT_BYTES."""
  fit = _ONE_HOT_BYTES // (max(tokens, 1) * jnp.dtype(dtype).itemsize)
  parts = -(-size // max(fit, _LEAST_ROWS))
  if parts == 1:
    return size
  return -(-size // (parts * _LEAST_ROWS)) * _LEAST_ROWS


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _look_up(
  table: Float[Array, "V E"], tokens: Int[Array, "*S"], plan: _Plan
) -> Float[Array, "*S E"]:
  return jnp.take(table.astype(plan.dtype), tokens, axis=0)


def _forward(table, tokens, plan):
  return _look_up(table, tokens, plan), tokens


def _backward(plan, tokens, cotangent):
  rows, inside = _rows_read(tokens, plan.size)
  # A product would spread a NaN over all rows of the table.
  cotangent = jnp.where(inside[..., None], cotangent, 0)
  total = lax.platform_dependent(
    rows,
    cotangent,
    cpu=functools.partial(_sum_by_scatter, plan=plan),
    default=functools.partial(_sum_by_product, plan=plan),
  )
  return total.astype(plan.param_dtype), None


_look_up.defvjp(_forward, _backward)


def _rows_read(tokens: Array, size: int) -> tuple[Array, Array]:
  """The row of the table that each token reads, as `jnp.take` does, or `size`
  if it reads none; and whether it reads one."""
  tokens = jnp.where(tokens < 0, tokens + size, tokens)
  if tokens.dtype.itemsize < 4:
    tokens = tokens.astype(jnp.int32)  # which can hold any size
  inside = (tokens >= 0) & (tokens < size)
  return jnp.where(inside, tokens, size).astype(jnp.int32), inside


def _sum_by_scatter(rows: Array, cotangent: Array, plan: _Plan) -> Array:
  """The gradient of the table, float32, for processors without atomics."""
  dtype = compute_dtype(cotangent.dtype)
  shape = (plan.size, cotangent.shape[-1])
  return (
    varying_zeros(shape, dtype, cotangent)
    .at[rows]
    .add(cotangent.astype(dtype), mode="drop")
  )


def _sum_by_product(rows: Array, cotangent: Array, plan: _Plan) -> Array:
  """The same by products with one-hot rows, for `plan.rows` of it at a time.

  Parts of the vocabulary need no sum that is carried from one to the next, as
  parts of the tokens would.
  """
  width = cotangent.shape[-1]
  axes = tuple(range(rows.ndim))
  # Zeros and ones are exact in every dtype. Float32 cotangents are too with
  # this, where GPUs would round them to TF32 and TPUs to bfloat16.
  wide = cotangent.dtype.itemsize > 2
  precision = lax.Precision.HIGHEST if wide else None

  def part(start):
    here = start + jnp.arange(plan.rows, dtype=jnp.int32)
    one_hot = rows[..., None] == lax.expand_dims(here, axes)
    return lax.dot_general(
      one_hot.astype(cotangent.dtype),
      cotangent,
      ((axes, axes), ((), ())),
      precision=precision,
      preferred_element_type=compute_dtype(cotangent.dtype),
    )

  if plan.rows == plan.size:
    return part(jnp.int32(0))
  starts = jnp.arange(0, plan.size, plan.rows, dtype=jnp.int32)
  return lax.map(part, starts).reshape(-1, width)[: plan.size]
