"""Ops `select`, `sparse_forward` and `prefill`, beside dense attention.

`select`: index_q, index_k -> block ids. `sparse_forward`: q, k, v and ids ->
out, lse. `prefill`: the two one after the other, on all five inputs.

The dense peers are cuDNN and, up to 128K tokens, JAX's own Mosaic GPU attention
(in f16, the only type that it supports). A record has the times of both, and
its speed-up is that over the faster one. On an H100 that was cuDNN at 128K
tokens, so only cuDNN is timed at longer ones.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

import msa_jax
from benchmarks import cases, measure
from benchmarks.cases import Case
from msa_jax import reference, selection_stats
from msa_jax.ops import Implementation, ScorePrecision

OPS = ("prefill", "select", "sparse_forward")
CASES = cases.CASES
RESTRICTED = ""  # for errors: the options that this group needs
MOSAIC_DENSE_TOKENS = 1 << 17
OUTLIER_TOKENS = 1 << 17


def select(
  case: Case, precision: ScorePrecision, implementation: Implementation
) -> Callable:
  """(index_q, index_k) -> ids."""
  return functools.partial(
    msa_jax.select_blocks,
    block_size=case.block_size,
    top_k=case.top_k,
    score_precision=precision,
    implementation=implementation,
  )


def sparse(case: Case, implementation: Implementation) -> Callable:
  """(q, k, v, ids) -> (out, lse)."""
  return functools.partial(
    msa_jax.sparse_attention,
    block_size=case.block_size,
    return_lse=True,
    implementation=implementation,
  )


def cudnn_attention(q: Array, k: Array, v: Array) -> Array:
  return jax.nn.dot_product_attention(
    q, k, v, is_causal=True, implementation="cudnn"
  )


def mosaic_attention(q: Array, k: Array, v: Array) -> Any:
  from jax.experimental.pallas.ops.gpu import attention_mgpu

  config = attention_mgpu.TuningConfig(
    block_q=64, block_kv=128, max_concurrent_steps=2, causal=True
  )
  attention: Callable = attention_mgpu.attention
  return attention(q, k, v, config)


def recall_of_last(ids: Array, truth: Array) -> Array:
  """Recall over the last queries only.

  The early ones choose every block that they see, so their recall is 1.
  """
  return selection_stats.recall(ids[:, :, -4096:], truth[:, :, -4096:])


def ops_of(
  case: Case, ops: list[str], selections: list[str], precisions: list[str]
) -> list[str]:
  """The ops that are measured at this shape: all of them."""
  del case, selections, precisions
  return ops


def add_programs(
  programs: measure.Programs,
  case: Case,
  ops: list[str],
  selections: list[str],
  precisions: list[ScorePrecision],
  with_dense: bool,
  implementation: Implementation,
) -> None:
  of = measure.shapes(case, case.dtype)
  f16 = measure.shapes(case, "float16")
  ids = of["ids"]
  attention = {"prefill", "sparse_forward"} & set(ops)
  if attention:
    programs.add(
      "attention_inputs",
      functools.partial(cases.attention_inputs, case=case),
      of["key"],
    )
    if with_dense:
      qkv = (of["q"], of["k"], of["v"])
      programs.add("dense cudnn", cudnn_attention, *qkv)
      if case.tokens <= MOSAIC_DENSE_TOKENS and case.head_dim in (64, 128):
        qkv = (f16["q"], f16["k"], f16["v"])
        programs.add("dense jax mosaic_gpu", mosaic_attention, *qkv)
  # Outliers show what low precision loses: their recall is measured.
  outliers = "select" in ops and case.tokens <= OUTLIER_TOKENS
  for selection in (*selections, *(["outliers"] if outliers else [])):
    programs.add(
      f"index_inputs {selection}",
      functools.partial(cases.index_inputs, case=case, selection=selection),
      of["key"],
    )
  for precision in dict.fromkeys(("exact", *precisions)):
    programs.add(
      f"select {precision}",
      select(case, precision, implementation),
      of["index_q"],
      of["index_k"],
    )
  if attention:
    programs.add(
      "sparse", sparse(case, implementation), of["q"], of["k"], of["v"], ids
    )
  programs.add("union8", selection_stats.union8, ids)
  programs.add("recall", recall_of_last, ids, ids)


def records(
  case: Case,
  programs: measure.Programs,
  ops: list[str],
  selections: list[str],
  precisions: list[ScorePrecision],
  implementation: Implementation,
) -> tuple[list[dict], list[dict]]:
  """The records and recalls of one shape."""
  dense = None
  qkv: tuple[Array, ...] = ()
  if "attention_inputs" in programs:
    qkv = programs["attention_inputs"](jax.random.key(0))
  if "dense cudnn" in programs:
    once = measure.dense_flops(case) / 500e12 > measure.ONCE_SECONDS
    peers = {}
    for name, dtype in dict(
      cudnn=case.dtype, **{"jax mosaic_gpu": "float16"}
    ).items():
      if f"dense {name}" in programs:
        operands = tuple(x.astype(dtype) for x in qkv)
        program = programs[f"dense {name}"]
        peers[name] = functools.partial(program, *operands)
    dense = measure.dense_seconds(peers, once)

  found, recalls = [], []
  for selection in (*cases.SELECTIONS, "fitted"):
    if f"index_inputs {selection}" not in programs:
      continue
    inputs = programs[f"index_inputs {selection}"](jax.random.key(1))
    exact = programs["select exact"](*inputs)
    union8 = float(programs["union8"](exact))
    for precision in precisions:
      choose = programs[f"select {precision}"]
      if precision != "exact" and "select" in ops:
        recall = float(programs["recall"](choose(*inputs), exact))
        measure.log(f"  recall {selection} {precision}: {recall:.5f}")
        recalls.append(
          dict(
            tokens=case.tokens,
            index_dim=case.index_dim,
            selection=selection,
            score_precision=precision,
            recall=round(recall, 5),
          )
        )
      if selection not in selections:
        continue
      about: dict[str, Any] = dict(selection=selection, union8=union8)
      if "prefill" in ops:
        attend = programs["sparse"]

        def prefill(choose=choose, attend=attend, inputs=inputs):
          return attend(*qkv, choose(*inputs))

        peak = max(
          measure.program_bytes(choose) + sum(x.nbytes for x in qkv),
          measure.program_bytes(attend) + sum(x.nbytes for x in inputs),
        )
        found.append(
          measure.record(
            "prefill",
            case,
            prefill,
            flops=measure.flops("prefill", case),
            peak_bytes=peak,
            implementation=implementation,
            score_precision=precision,
            dense=dense,
            **about,
          )
        )
      if "select" in ops:
        found.append(
          measure.record(
            "select",
            case,
            functools.partial(choose, *inputs),
            flops=measure.flops("select", case),
            peak_bytes=measure.program_bytes(choose),
            implementation=implementation,
            score_precision=precision,
            **about,
          )
        )
      if "sparse_forward" in ops and precision == precisions[0]:
        found.append(
          measure.record(
            "sparse_forward",
            case,
            functools.partial(programs["sparse"], *qkv, exact),
            flops=measure.flops("sparse_forward", case),
            peak_bytes=measure.program_bytes(programs["sparse"]),
            implementation=implementation,
            **about,
          )
        )
  return found, recalls


# ---- Checks ----


def check_select(
  case: Case, precision: ScorePrecision, implementation: Implementation
) -> str | None:
  """Checks the selection: says what is wrong, or None."""
  inputs = cases.index_inputs(jax.random.key(7), case, "random")
  got = jax.jit(select(case, precision, implementation))(*inputs)
  want = measure.truth(
    functools.partial(
      reference.select_blocks,
      block_size=case.block_size,
      top_k=case.top_k,
      num_local_blocks=1,
      kv_lengths=None,
      score_precision="exact",
    )
  )(*inputs)
  recall = float(selection_stats.recall(got, want))
  # Even "exact" sums float32 in another order than the reference, which may
  # swap a few of 1e5 picks.
  floor = dict(exact=0.9999, fast=0.999, fp8=0.9)[precision]
  if not recall >= floor:
    return f"recall {recall:.5f} against the reference, at least {floor} needed"
  return None


def sparse_cases(case: Case) -> list[Case]:
  """The cases on which `check_sparse` runs: one whose choices are shared
  blocks, one whose choices are mostly pairs.

  Neighbouring queries that choose top_k of a few dozen blocks at random share
  so many that a row tile walks all of them. If they choose a quarter of that,
  they share few, and most choices are handled as (query, block) pairs.
  """
  quarter = max(1, case.top_k // 4)
  return [case, dataclasses.replace(case, top_k=quarter)]


def random_blocks(case: Case, implementation: Implementation) -> Array:
  """The exact selection of random index inputs."""
  inputs = cases.index_inputs(jax.random.key(9), case, "random")
  return jax.jit(select(case, "exact", implementation))(*inputs)


def check_sparse(case: Case, implementation: Implementation) -> str | None:
  """Checks the attention over given ids: says what is wrong, or None.

  The bound is twice the error of the reference with probabilities rounded to
  the working type before their product with v, plus the rounding of the output.
  """
  q, k, v = cases.attention_inputs(jax.random.key(8), case)
  ids = random_blocks(case, implementation)
  out, lse = jax.jit(sparse(case, implementation))(q, k, v, ids)

  @measure.truth
  def truth_and_yardstick(q, k, v, ids):
    positions = reference.query_positions(
      case.tokens, case.kv_tokens, case.batch, None
    )
    visible = reference.chosen_tokens(
      ids, positions, case.kv_tokens, case.block_size
    )
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    scale = case.head_dim**-0.5
    want, want_lse = reference.attend(q, k, v, visible, scale)
    dtype = jnp.dtype(case.dtype)
    rounded, _ = reference.attend(q, k, v, visible, scale, dtype)
    return want, want_lse, jnp.max(jnp.abs(rounded - want))

  want, want_lse, yardstick = truth_and_yardstick(q, k, v, ids)
  error = jnp.abs(out.astype(jnp.float32) - want)
  # The floor is the rounding of the output itself.
  allowed = 2 * yardstick + 2.0**-8 * jnp.max(jnp.abs(want))
  if not jnp.max(error) <= allowed:
    return f"out is off by {jnp.max(error)}, at most {allowed} allowed"
  if wrong := measure.check_rms("out", out, want):
    return wrong
  lse_error = jnp.max(jnp.abs(lse - want_lse))
  if not lse_error < 1e-3:
    return f"lse is off by {lse_error}, less than 1e-3 needed"
  return None


def start_checks(
  pool: concurrent.futures.Executor,
  case: Case,
  ops: list[str],
  precisions: list[ScorePrecision],
  implementation: Implementation,
) -> dict[str, concurrent.futures.Future]:
  """Starts the checks of the ops on a small case, by name."""
  found = {}
  if {"prefill", "select"} & set(ops):
    for precision in precisions:
      name = f"select {precision}"
      found[name] = pool.submit(check_select, case, precision, implementation)
  if {"prefill", "sparse_forward"} & set(ops):
    for of in sparse_cases(case):
      name = f"sparse_forward of {of.top_k} blocks"
      found[name] = pool.submit(check_sparse, of, implementation)
  return found
