"""Op `decode`: one token for each batch row over a cache.

A program of several steps is timed. Each step depends on the one before, so
that launches and the gaps between them count as they do in a model. The steps
go round several caches that together do not fit the GPU's second-level cache,
so that keys come from memory. `index_tbs` is the rate, in TB/s, at which the
scan kernel alone reads index keys and their scales.

Dense decoding is timed beside it: cuDNN and XLA's own fusions, on the same
caches and in programs of the same kind. A record has the times of both, and its
speed-up is that over the faster one.
"""

from __future__ import annotations

import concurrent.futures
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

import msa_jax
from benchmarks import cases, measure
from benchmarks.cases import Case
from msa_jax import reference, selection_stats
from msa_jax.ops import Implementation

OPS = ("decode",)
CASES = cases.DECODE
PRECISIONS = ("exact", "fp8")
RESTRICTED = " with --selection random and --precision exact or fp8"
COLD_BYTES = 128 << 20  # more than twice the second-level cache
MAX_CACHES = 16
MIN_STEPS = 16
SCAN = "decode_scan"


def attention(case: Case, implementation: Implementation) -> Callable:
  """(q, k, v, index_q, index_k, scale, kv_lengths) -> (out, ids)."""

  def run(q, k, v, index_q, index_k, scale, kv_lengths):
    found = msa_jax.decode_attention(
      q,
      k,
      v,
      index_q,
      index_k,
      kv_lengths=kv_lengths,
      index_k_scale=scale,
      block_size=case.block_size,
      top_k=case.top_k,
      implementation=implementation,
    )
    return found.out, found.block_indices

  return run


def index_bytes(case: Case, precision: str) -> int:
  """Bytes of index keys and their scales that a step reads."""
  key = 2 * case.index_dim if precision == "exact" else case.index_dim + 4
  return case.batch * case.kv_tokens * key


def num_caches(case: Case) -> int:
  """The number of caches (at most MAX_CACHES) whose index keys together exceed
  the second-level cache."""
  return min(-(-COLD_BYTES // index_bytes(case, "fp8")), MAX_CACHES)


def num_steps(case: Case) -> int:
  """Steps of a program: each cache is read twice or more."""
  return max(MIN_STEPS, 2 * num_caches(case))


@functools.partial(jax.jit, static_argnames=("case", "precision"))
def cache(key: Array, case: Case, precision: str) -> tuple[Any, ...]:
  """k, v, index_k, and the scales of index_k in fp8 (else None)."""
  k_key, v_key, index_key = jax.random.split(key, 3)
  kv = (case.batch, case.kv_tokens, case.num_kv_heads, case.head_dim)
  index_k = cases.normal(index_key, (*kv[:2], case.index_dim), case.dtype)
  scale = None
  if precision == "fp8":
    index_k, scale = reference.fp8_codes(index_k)
  k, v = (cases.normal(x, kv, case.dtype) for x in (k_key, v_key))
  return k, v, index_k, scale


@functools.partial(jax.jit, static_argnames="case")
def queries(key: Array, case: Case) -> tuple[Array, Array]:
  """q and index_q."""
  q_key, index_key = jax.random.split(key)
  lead = (case.batch, case.tokens)
  return (
    cases.normal(q_key, (*lead, case.num_heads, case.head_dim), case.dtype),
    cases.normal(
      index_key, (*lead, case.num_kv_heads, case.index_dim), case.dtype
    ),
  )


def steps(case: Case, implementation: Implementation) -> Callable:
  """(q, index_q, caches) -> the last output and the ids of every step."""
  step = attention(case, implementation)

  def run(q, index_q, caches):
    lengths = jnp.full((case.batch,), case.kv_tokens, jnp.int32)
    chosen = []
    for i in range(num_steps(case)):
      q, ids = step(*arguments(q, index_q, caches[i % len(caches)], lengths))
      # This makes the next step's selection wait for this step's output too.
      q, index_q = lax.optimization_barrier((q, index_q))
      chosen.append(ids)
    return q, chosen

  return run


def arguments(q, index_q, cache, lengths):
  k, v, index_k, scale = cache
  return q, k, v, index_q, index_k, scale, lengths


def cudnn_decode(q: Array, k: Array, v: Array) -> Array:
  return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")


def xla_decode(q: Array, k: Array, v: Array) -> Array:
  return jax.nn.dot_product_attention(q, k, v, implementation="xla")


def dense_peers() -> dict[str, Callable]:
  return {"cudnn": cudnn_decode, "xla": xla_decode}


def dense_steps(case: Case, attend: Callable) -> Callable:
  """(q, caches) -> the last output, of as many steps as `steps` has."""

  def run(q, caches):
    for i in range(num_steps(case)):
      k, v, *_ = caches[i % len(caches)]
      q = attend(q, k, v).astype(q.dtype)
    return q

  return run


def ops_of(
  case: Case, ops: list[str], selections: list[str], precisions: list[str]
) -> list[str]:
  """The ops that are measured with these options."""
  del case
  possible = "random" in selections and set(precisions) & set(PRECISIONS)
  return ops if possible else []


def add_programs(
  programs: measure.Programs,
  case: Case,
  ops: list[str],
  selections: list[str],
  precisions: list[str],
  with_dense: bool,
  implementation: Implementation,
) -> None:
  if not ops_of(case, ops, selections, precisions):
    return
  key = jax.eval_shape(lambda: jax.random.key(0))
  q, index_q = jax.eval_shape(functools.partial(queries, case=case), key)
  for precision in precisions:
    if precision not in PRECISIONS:
      continue
    one = jax.eval_shape(
      functools.partial(cache, case=case, precision=precision), key
    )
    caches = [one] * num_caches(case)
    programs.add(
      f"steps {precision}", steps(case, implementation), q, index_q, caches
    )
    if with_dense and precision == "exact":
      for name, attend in dense_peers().items():
        programs.add(f"dense {name}", dense_steps(case, attend), q, caches)


def records(
  case: Case,
  programs: measure.Programs,
  ops: list[str],
  selections: list[str],
  precisions: list[str],
  implementation: Implementation,
) -> tuple[list[dict], list[dict]]:
  """The records of one shape; no recalls."""
  del ops, selections
  found = []
  dense = None
  q, index_q = queries(jax.random.key(0), case)
  # "exact" comes first, because dense attention is measured on its caches.
  for precision in PRECISIONS:
    if precision not in precisions or f"steps {precision}" not in programs:
      continue
    caches = [
      cache(jax.random.key(i + 1), case, precision)
      for i in range(num_caches(case))
    ]
    count = num_steps(case)
    program = programs[f"steps {precision}"]
    call = functools.partial(program, q, index_q, caches)
    if precision == "exact":
      peers = {}
      for name in dense_peers():
        if f"dense {name}" in programs:
          peers[name] = functools.partial(run_dense, programs, name, q, caches)
      if peers:
        whole = measure.dense_seconds(peers, once=False)
        dense = {name: seconds / count for name, seconds in whole.items()}
    record = measure.record(
      "decode",
      case,
      call,
      flops=measure.flops("decode", case),
      peak_bytes=step_bytes(program, q, index_q, caches[0]),
      selection="random",
      union8=case.top_k,
      implementation=implementation,
      score_precision=precision,
      dense=dense,
      steps=count,
    )
    kernels = measure.kernel_fields(call, steps=count)
    measure.log(f"    {kernels}")
    record |= kernels
    if implementation == "mosaic_gpu":
      scan = [ms for name, ms in kernels["kernels_ms"].items() if SCAN in name]
      if scan:  # beside a short cache it may be too short to be listed
        rate = index_bytes(case, precision) / sum(scan) / 1e9
        measure.log(f"    index keys {rate:.3f} TB/s")
        record |= dict(index_tbs=round(rate, 3))
    found.append(record)
  return found, []


def step_bytes(program, q, index_q, cache) -> int:
  """Bytes that one step reads and writes, and the program's workspace."""
  operands = sum(x.nbytes for x in jax.tree.leaves((q, index_q, cache)))
  workspace = program.memory_analysis().temp_size_in_bytes
  return int(operands + q.nbytes + workspace)


def run_dense(programs, name, q, caches):
  """Runs a dense program.

  If it could not be compiled, the error is raised here, inside `dense_seconds`,
  which handles it.
  """
  return programs[f"dense {name}"](q, caches)


# ---- Checks ----


def check_decode(
  case: Case, precision: str, implementation: Implementation
) -> str | None:
  """Checks a step over batch rows of unequal length.

  Says what is wrong, or None.
  """
  q, index_q = queries(jax.random.key(8), case)
  k, v, index_k, scale = cache(jax.random.key(9), case, precision)
  lengths = jnp.array(
    [case.kv_tokens - 37 * i for i in range(case.batch)], jnp.int32
  )
  out, ids = jax.jit(attention(case, implementation))(
    *arguments(q, index_q, (k, v, index_k, scale), lengths)
  )

  @measure.truth
  def choice(index_q, index_k, scale, lengths):
    if scale is not None:
      index_q, q_scale = reference.fp8_codes(index_q)
      index_q = index_q.astype(jnp.float32) * q_scale[..., None]
      index_k = index_k.astype(jnp.float32) * scale[..., None]
    return reference.select_blocks(
      index_q,
      index_k,
      block_size=case.block_size,
      top_k=case.top_k,
      num_local_blocks=1,
      kv_lengths=lengths,
      score_precision="exact",
    )

  recall = float(
    selection_stats.recall(ids, choice(index_q, index_k, scale, lengths))
  )
  # Blocks of nearly equal scores may be exchanged. For fp8 more of them are
  # nearly equal, because Hopper sums e4m3 products with about 14 bits.
  floor = dict(exact=0.99, fp8=0.95)[precision]
  if not recall >= floor:
    return f"recall {recall:.5f} against the reference, at least {floor} needed"

  @measure.truth
  def attended(q, k, v, ids, lengths):
    positions = reference.query_positions(
      case.tokens, case.kv_tokens, case.batch, lengths
    )
    visible = reference.chosen_tokens(
      ids, positions, case.kv_tokens, case.block_size
    )
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    return reference.attend(q, k, v, visible, case.head_dim**-0.5)[0]

  want = attended(q, k, v, ids, lengths)
  return measure.check_rms("out", out, want)


def start_checks(
  pool: concurrent.futures.Executor,
  case: Case,
  ops: list[str],
  precisions: list[str],
  implementation: Implementation,
) -> dict[str, concurrent.futures.Future]:
  """Starts the checks of the op on a small case, by name."""
  if "decode" not in ops:
    return {}
  return {
    f"decode {precision}": pool.submit(
      check_decode, case, precision, implementation
    )
    for precision in precisions
    if precision in PRECISIONS
  }
