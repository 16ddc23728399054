"""Ops `train`, `sparse_backward`, `kl` and `warmup`, beside dense attention.

`train`: selection, attention and KL of all five inputs, and their gradients.
`sparse_backward`: dq, dk, dv for given ids. `kl`: the KL loss over given ids
and its gradients. `warmup`: a warm-up step, which computes dense attention, the
KL over all visible tokens, their gradients and the selection (for recall).

The dense peer is cuDNN's forward and backward. `warmup` does more work than
that, so its speed-up is below 1.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

import msa_jax
from benchmarks import cases, forward, measure
from benchmarks.cases import Case
from msa_jax import selection_stats
from msa_jax.ops import Implementation, Phase

OPS = ("train", "sparse_backward", "kl", "warmup")
CASES = cases.CASES | cases.BATCHES
RESTRICTED = ""
MAX_TOKENS = 1 << 19  # at 1M, q, out and their gradients fill the memory
WARMUP_TOKENS = 1 << 17  # its time grows with the square of the length


def layer(case: Case, phase: Phase, implementation: Implementation) -> Callable:
  """(q, k, v, index_q, index_k, dout) -> (kl, gradients)."""

  def run(q, k, v, index_q, index_k, dout):
    def loss(*inputs):
      out, kl, _, _ = msa_jax.msa_attention(
        *inputs,
        block_size=case.block_size,
        top_k=case.top_k,
        phase=phase,
        with_kl=True,
        implementation=implementation,
      )
      return out, kl

    (_, kl), pull = jax.vjp(loss, q, k, v, index_q, index_k)
    return kl, pull((dout, jnp.ones_like(kl)))

  return run


def attention_vjp(case: Case, implementation: Implementation) -> Callable:
  """(q, k, v, ids) -> (out, function of dout)."""

  def run(q, k, v, ids):
    attend = functools.partial(
      msa_jax.sparse_attention,
      block_indices=ids,
      block_size=case.block_size,
      implementation=implementation,
    )
    return jax.vjp(attend, q, k, v)

  return run


def kl_and_gradients(case: Case, implementation: Implementation) -> Callable:
  """(q, k, index_q, index_k, ids, lse) -> (kl, gradients)."""

  def run(q, k, index_q, index_k, ids, lse):
    def loss(index_q, index_k):
      return msa_jax.index_kl_loss(
        q,
        k,
        index_q,
        index_k,
        ids,
        block_size=case.block_size,
        lse=lse,
        implementation=implementation,
      )

    return jax.value_and_grad(loss, (0, 1))(index_q, index_k)

  return run


def dense_vjp(q, k, v, dout):
  out, pull = jax.vjp(forward.cudnn_attention, q, k, v)
  return out, pull(dout)


def ops_of(
  case: Case, ops: list[str], selections: list[str], precisions: list[str]
) -> list[str]:
  """The ops that are measured at this length."""
  del selections, precisions  # training has all selections, and exact scores
  if case.tokens > MAX_TOKENS:
    return []
  return [op for op in ops if op != "warmup" or case.tokens <= WARMUP_TOKENS]


def add_programs(
  programs: measure.Programs,
  case: Case,
  ops: list[str],
  selections: list[str],
  precisions: list[str],
  with_dense: bool,
  implementation: Implementation,
) -> None:
  ops = ops_of(case, ops, selections, precisions)
  if not ops:
    return
  of = measure.shapes(case, case.dtype)
  qkv = (of["q"], of["k"], of["v"])
  index = (of["index_q"], of["index_k"])
  for selection in selections:
    programs.add(
      f"index_inputs {selection}",
      functools.partial(cases.index_inputs, case=case, selection=selection),
      of["key"],
    )
  programs.add(
    "attention_inputs",
    functools.partial(cases.attention_inputs, case=case),
    of["key"],
  )
  programs.add(
    "dout",
    lambda key: cases.normal(key, of["q"].shape, case.dtype),
    of["key"],
  )
  programs.add(
    "select exact", forward.select(case, "exact", implementation), *index
  )
  programs.add("union8", selection_stats.union8, of["ids"])
  if with_dense and {"train", "warmup"} & set(ops):
    programs.add("dense vjp", dense_vjp, *qkv, of["q"])
  phases: dict[str, Phase] = {"train": "sparse", "warmup": "warmup"}
  for op, phase in phases.items():
    if op in ops:
      programs.add(
        op, layer(case, phase, implementation), *qkv, *index, of["q"]
      )
  if "sparse_backward" in ops:
    vjp = attention_vjp(case, implementation)
    programs.add("attention vjp", vjp, *qkv, of["ids"])
    _, pull = jax.eval_shape(vjp, *qkv, of["ids"])
    programs.add(
      "sparse_backward", lambda pull, dout: pull(dout), pull, of["q"]
    )
  if "kl" in ops:
    programs.add(
      "sparse", forward.sparse(case, implementation), *qkv, of["ids"]
    )
    programs.add(
      "kl",
      kl_and_gradients(case, implementation),
      of["q"],
      of["k"],
      *index,
      of["ids"],
      of["lse"],
    )


def records(
  case: Case,
  programs: measure.Programs,
  ops: list[str],
  selections: list[str],
  precisions: list[str],
  implementation: Implementation,
) -> tuple[list[dict], list[dict]]:
  """The records of one shape; no recalls."""
  ops = ops_of(case, ops, selections, precisions)
  if not ops:
    return [], []
  q, k, v = programs["attention_inputs"](jax.random.key(0))
  dout = programs["dout"](jax.random.key(2))
  dense = None
  if "dense vjp" in programs:
    once = 3.5 * measure.dense_flops(case) / 500e12 > measure.ONCE_SECONDS
    program = programs["dense vjp"]
    peer = functools.partial(program, q, k, v, dout)
    dense = measure.dense_seconds({"cudnn": peer}, once)
  found = []
  for selection in selections:
    inputs = programs[f"index_inputs {selection}"](jax.random.key(1))
    ids = programs["select exact"](*inputs)
    union8 = float(programs["union8"](ids))
    for op in ops:
      if op == "warmup" and selection != selections[0]:
        continue  # it attends to all tokens, whatever the selection
      if op in ("train", "warmup"):
        operands = (q, k, v, *inputs, dout)
      elif op == "sparse_backward":
        operands = (programs["attention vjp"](q, k, v, ids)[1], dout)
      else:
        _, lse = programs["sparse"](q, k, v, ids)
        operands = (q, k, *inputs, ids, lse)
      call = functools.partial(programs[op], *operands)
      record = measure.record(
        op,
        case,
        call,
        flops=measure.flops(op, case),
        peak_bytes=measure.program_bytes(programs[op]),
        selection=selection,
        union8=union8,
        implementation=implementation,
        dense=dense if op in ("train", "warmup") else None,
      )
      kernels = measure.kernel_fields(call)
      measure.log(f"    {kernels}")
      found.append(record | kernels)
  return found, []


# ---- Checks ----


def check_gradients(
  case: Case, phase: Phase, implementation: Implementation
) -> str | None:
  """Checks the KL and gradients of a layer: says what is wrong, or None.

  The reference runs in float32 and selects for itself, from the same inputs.
  That both select the same blocks is what the check of `select` is for.
  """
  qkv = cases.attention_inputs(jax.random.key(8), case)
  inputs = cases.index_inputs(jax.random.key(9), case, "random")
  dout = cases.normal(jax.random.key(10), qkv[0].shape, case.dtype)
  operands = (*qkv, *inputs, dout)
  kl, grads = jax.jit(layer(case, phase, implementation))(*operands)
  wide = tuple(x.astype(jnp.float32) for x in operands)
  want_kl, want = measure.truth(layer(case, phase, "reference"))(*wide)
  if not jnp.abs(kl - want_kl) <= 2e-3 * want_kl:
    return f"kl is {kl}, {want_kl} wanted"
  names = ("dq", "dk", "dv", "dindex_q", "dindex_k")
  for name, got, true in zip(names, grads, want, strict=True):
    if wrong := measure.check_rms(name, got, true):
      return wrong
  return None


def start_checks(
  pool: concurrent.futures.Executor,
  case: Case,
  ops: list[str],
  precisions: list[str],
  implementation: Implementation,
) -> dict[str, concurrent.futures.Future]:
  """Starts the checks of the ops on a small case, by name."""
  del precisions
  found = {}
  if {"train", "sparse_backward", "kl"} & set(ops):
    found["train"] = pool.submit(
      check_gradients, case, "sparse", implementation
    )
  if "warmup" in ops:
    # Warm-up needs as many queries as keys, and the reference holds arrays of
    # that size squared.
    tokens = 6 * case.block_size - 5
    case = dataclasses.replace(case, tokens=tokens, kv_tokens=tokens)
    found["warmup"] = pool.submit(
      check_gradients, case, "warmup", implementation
    )
  return found
