"""Kernels on parts of arrays, and in loops that stack their results.

XLA on a GPU passes a kernel the address of the part, without a copy, where it
can: where a part's bytes follow each other and are a multiple of 256. See
`mosaic.kept_apart`.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Case

import msa_jax
from msa_jax import ops

# Nothing of it is padded, so kernels take and give arrays as they are.
CASE = Case(
  q_len=2048, kv_len=2048, num_heads=16, num_kv_heads=1, head_dim=128,
  index_dim=128, block_size=128, top_k=8,
)  # fmt: skip
TIMES = 3


def forward(q, k, v, index_q, index_k):
  ids = msa_jax.select_blocks(
    index_q, index_k, block_size=128, top_k=8, implementation="mosaic_gpu"
  )
  out, lse = msa_jax.sparse_attention(
    q, k, v, ids, block_size=128, return_lse=True, implementation="mosaic_gpu"
  )
  return ids, out, lse


def training(*inputs):
  def loss(*inputs):
    result = msa_jax.msa_attention(
      *inputs, block_size=128, top_k=8, with_kl=True,
      implementation="mosaic_gpu",
    )  # fmt: skip
    return jnp.sum(jnp.sin(result.out.astype(jnp.float32))) + result.kl

  return jax.grad(loss, range(5))(*inputs)


def masked(q, k, v, index_q, index_k):
  del index_q, index_k
  lengths = jnp.full((1,), 2000, jnp.int32)

  def loss(q, k, v):
    out, lse = ops.dense_attention(
      q, k, v, kv_lengths=lengths, implementation="mosaic_gpu"
    )
    return jnp.sum(jnp.sin(out.astype(jnp.float32))), (out, lse)

  # Without the value, whose order of summation is XLA's to choose.
  return jax.grad(loss, range(3), has_aux=True)(q, k, v)


def decoding(q, k, v, index_q, index_k):
  return msa_jax.decode_attention(
    q[:, -1:], k, v, index_q[:, -1:], index_k,
    kv_lengths=jnp.full((1,), 2048, jnp.int32), block_size=128, top_k=8,
    implementation="mosaic_gpu",
  )  # fmt: skip


OPS = (forward, training, masked, decoding)


def stacked(op, inputs):
  return jax.lax.map(lambda x: op(*x), inputs)


def parts(op, inputs):
  """Of arrays that hold all inputs one after another in their tokens."""
  return [
    op(*(x[:, i * 2048 : (i + 1) * 2048] for x in inputs)) for i in range(TIMES)
  ]


def make_inputs():
  """[TIMES, 1, 2048, ...] each."""
  each = [CASE.inputs(seed, dtype=jnp.bfloat16) for seed in range(TIMES)]
  return tuple(jnp.stack(x) for x in zip(*each))


@pytest.mark.parametrize("op", [forward, decoding])
def test_operands_and_results_are_kept_apart(pretend_hopper, op):
  """Each kernel's arrays come from a barrier."""
  inputs = jax.eval_shape(make_inputs)
  traced = jax.jit(functools.partial(stacked, op)).trace(inputs)
  text = traced.lower(lowering_platforms=("cuda",)).as_text()
  # A Ref comes from what allocates its memory, from an earlier kernel, or from
  # a loop that carries it.
  apart = {"optimization_barrier", "custom_call", None}
  made, count = {}, 0
  for line in text.splitlines():
    if found := re.match(r'\s*(%\w+)(?::\d+)? = "?(?:stablehlo\.)?(\w+)', line):
      made[found[1]] = found[2]
    if call := re.search(r"@mosaic_gpu_v2\(([^)]*)\)", line):
      names = [name.split("#")[0] for name in call[1].split(", ")]
      loops = [name for name in names if name.startswith("%iterArg")]
      made |= dict.fromkeys(loops)
      assert {made[name] for name in names} <= apart
      count += 1
  assert count >= 2


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
def test_gpu_loops_and_parts(hopper, op):
  """The bits of calls on arrays of their own."""
  inputs = make_inputs()
  one = jax.jit(op)
  want = [one(*(x[i] for x in inputs)) for i in range(TIMES)]
  want = jax.tree.map(lambda *x: np.stack(x), *map(jax.device_get, want))
  got = jax.device_get(jax.jit(functools.partial(stacked, op))(inputs))
  jax.tree.map(np.testing.assert_array_equal, got, want)
  long = tuple(x.reshape(1, -1, *x.shape[3:]) for x in inputs)
  got = jax.device_get(jax.jit(functools.partial(parts, op))(long))
  got = jax.tree.map(lambda *x: np.stack(x), *got)
  jax.tree.map(np.testing.assert_array_equal, got, want)
