"""Measures the kernels on a Hopper GPU and writes results/<device>.json.

  python -m pallas_kernels.bench --tokens 32k 128k --ops prefill select

Three ops: `select` (index_q, index_k -> block ids), `sparse_forward` (q, k, v
and ids -> out, lse) and `prefill`, the two in a row on all five inputs. Before
anything is timed, each op is checked against `msa_jax.reference`; on a failed
check no number is printed. Times are device times: several calls are queued
and awaited together, and the median over rounds is kept with its spread
(largest minus smallest). The one exception are calls of many seconds, which
run once.

Dense attention of the same shape is timed in the same run: cuDNN, and up to
128K tokens JAX's own Mosaic GPU attention (in f16, the only type it takes);
the faster is named. cuDNN is the faster one at 128K tokens, so it stands alone
beyond. Shapes run from the longest to the shortest: programs of the shorter
ones compile while dense attention keeps the GPU busy, and every shape is
stored when it is done.

`tflops` counts what the op must compute: index scores of visible keys, and
products with visible tokens of the chosen blocks.

A row replaces the one of the same op, shape, selection and score precision;
all other rows stay. The plot shows speed-up against length.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import datetime
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from msa_jax import reference
from pallas_kernels import cases, mosaic
from pallas_kernels.cases import Case
from pallas_kernels.select_blocks import select_blocks
from pallas_kernels.sparse_attention import sparse_attention

RESULTS = pathlib.Path(__file__).parent / "results"
OPS = ("prefill", "select", "sparse_forward")
PRECISIONS = ("exact", "fast", "fp8")
KEY = [
  "op",
  *(field.name for field in dataclasses.fields(Case)),
  "selection",
  "score_precision",
]
# Rates of the bounds in the plot: the best matrix rates seen on an H100.
BOUND_TFLOPS = dict(exact=800.0, fp8=1300.0)
PAPER_SPEEDUP = (1 << 20, 14.2)
ONCE_SECONDS = 5.0
MOSAIC_DENSE_TOKENS = 1 << 17


def log(text: str) -> None:
  print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


# ---- What an op must compute ----


def visible_tokens(case: Case) -> np.ndarray:
  return case.kv_tokens - case.tokens + 1.0 + np.arange(case.tokens)


def index_flops(case: Case) -> float:
  rows = case.batch * case.num_kv_heads
  return 2.0 * case.index_dim * rows * visible_tokens(case).sum()


def main_flops(case: Case) -> float:
  seen = visible_tokens(case)
  own = (seen - 1) % case.block_size + 1
  attended = np.minimum(seen, (case.top_k - 1) * case.block_size + own)
  return 4.0 * case.head_dim * case.batch * case.num_heads * attended.sum()


def dense_flops(case: Case) -> float:
  heads = case.batch * case.num_heads
  return 4.0 * case.head_dim * heads * visible_tokens(case).sum()


def op_flops(op: str, case: Case) -> float:
  flops = dict(select=index_flops(case), sparse_forward=main_flops(case))
  return flops.get(op) or sum(flops.values())


# ---- Timing ----


def measure(
  call: Callable[[], Any], once: bool = False
) -> tuple[float, float | None]:
  """Median seconds of a call and the spread between rounds."""

  def seconds(count: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(count):
      out = call()
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / count

  first = seconds()
  if once:
    return first, None
  estimate = seconds()
  if estimate > 0.6:
    # The first call may load code; the median of three leaves it out.
    times = [first, estimate, seconds()]
  elif estimate > 0.1:
    times = [estimate, seconds(), seconds()]
  else:
    count = max(1, min(50, int(0.04 / estimate)))
    times = [seconds(count) for _ in range(7)]
  return float(np.median(times)), max(times) - min(times)


def ceilings() -> dict[str, float]:
  """Rates of a large matmul and a large copy, measured now."""
  n = 8192
  a, b = (
    cases.normal(jax.random.key(i), (1, n, n)).reshape(n, n) for i in (0, 1)
  )
  matmul = jax.jit(jnp.matmul)
  matmul_seconds, _ = measure(lambda: matmul(a, b))
  x = jnp.arange(1 << 29, dtype=jnp.float32)
  copy = jax.jit(lambda x: x + 1)
  copy_seconds, _ = measure(lambda: copy(x))
  return dict(
    matmul_tflops=round(2 * n**3 / matmul_seconds / 1e12, 1),
    copy_tbs=round(2 * x.nbytes / copy_seconds / 1e12, 3),
  )


# ---- Programs ----


def select(case: Case, precision: str) -> Callable:
  return functools.partial(
    select_blocks,
    block_size=case.block_size,
    top_k=case.top_k,
    score_precision=precision,
  )


def sparse(case: Case) -> Callable:
  return functools.partial(sparse_attention, block_size=case.block_size)


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


def shapes(case: Case, dtype: str) -> dict[str, jax.ShapeDtypeStruct]:
  q_lead = (case.batch, case.tokens)
  kv_lead = (case.batch, case.kv_tokens)
  kv = (*kv_lead, case.num_kv_heads, case.head_dim)
  sizes = dict(
    q=(*q_lead, case.num_heads, case.head_dim),
    k=kv,
    v=kv,
    index_q=(*q_lead, case.num_kv_heads, case.index_dim),
    index_k=(*kv_lead, case.index_dim),
  )
  out = {
    name: jax.ShapeDtypeStruct(size, dtype) for name, size in sizes.items()
  }
  ids = (case.batch, case.num_kv_heads, case.tokens, case.top_k)
  return out | dict(ids=jax.ShapeDtypeStruct(ids, jnp.int32))


class Programs:
  """Compiled programs of one case, made side by side in the background."""

  def __init__(
    self,
    pool: concurrent.futures.Executor,
    case: Case,
    ops: list[str],
    selections: list[str],
    precisions: list[str],
    with_dense: bool,
  ):
    of = shapes(case, case.dtype)
    f16 = shapes(case, "float16")
    ids = of["ids"]
    key = jax.eval_shape(lambda: jax.random.key(0))
    self._futures = {}

    def add(name, function, *arguments):
      def build():
        return jax.jit(function).lower(*arguments).compile()

      self._futures[name] = pool.submit(build)

    attention = {"prefill", "sparse_forward"} & set(ops)
    if attention:
      add(
        "attention_inputs",
        functools.partial(cases.attention_inputs, case=case),
        key,
      )
      if with_dense:
        qkv = (of["q"], of["k"], of["v"])
        add("dense cudnn", cudnn_attention, *qkv)
        if case.tokens <= MOSAIC_DENSE_TOKENS:
          qkv = (f16["q"], f16["k"], f16["v"])
          add("dense jax mosaic_gpu", mosaic_attention, *qkv)
    for selection in selections:
      add(
        f"index_inputs {selection}",
        functools.partial(cases.index_inputs, case=case, selection=selection),
        key,
      )
    for precision in dict.fromkeys(("exact", *precisions)):
      add(
        f"select {precision}",
        select(case, precision),
        of["index_q"],
        of["index_k"],
      )
    if attention:
      add("sparse", sparse(case), of["q"], of["k"], of["v"], ids)
    add("union8", cases.union8, ids)
    add("recall", recall_of_last, ids, ids)

  def __contains__(self, name: str) -> bool:
    return name in self._futures

  def __getitem__(self, name: str) -> Any:
    return self._futures[name].result()


def recall_of_last(ids: Array, truth: Array) -> Array:
  """Recall over the last queries: early ones choose every block they see."""
  return cases.recall(ids[:, :, -4096:], truth[:, :, -4096:])


def program_bytes(compiled) -> int:
  """Arguments, results and workspace of a compiled program."""
  memory = compiled.memory_analysis()
  return int(
    memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    + memory.temp_size_in_bytes
    - memory.alias_size_in_bytes
  )


# ---- Checks ----


def check_select(case: Case, precision: str) -> str | None:
  """What is wrong with the choice, or None."""
  inputs = cases.index_inputs(jax.random.key(7), case, "random")
  got = jax.jit(select(case, precision))(*inputs)
  want = jax.jit(
    functools.partial(
      reference.select_blocks,
      block_size=case.block_size,
      top_k=case.top_k,
      num_local_blocks=1,
      kv_lengths=None,
      score_precision="exact",
    )
  )(*inputs)
  recall = float(cases.recall(got, want))
  # Exact: float32 sums in another order may swap a few of 1e5 picks.
  floor = dict(exact=0.9999, fast=0.999, fp8=0.9)[precision]
  if not recall >= floor:
    return f"recall {recall:.5f} against the reference, at least {floor} needed"
  return None


def check_sparse(case: Case) -> str | None:
  """What is wrong with the attention of given ids, or None.

  Errors are held against the same attention with probabilities rounded to the
  working type before their product with v.
  """
  q, k, v = cases.attention_inputs(jax.random.key(8), case)
  inputs = cases.index_inputs(jax.random.key(9), case, "random")
  ids = jax.jit(select(case, "exact"))(*inputs)
  out, lse = jax.jit(sparse(case))(q, k, v, ids)

  @jax.jit
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
  rms = jnp.sqrt(jnp.mean(error**2) / jnp.mean(want**2))
  if not jnp.max(error) <= allowed:
    return f"out is off by {jnp.max(error)}, at most {allowed} allowed"
  if not rms < 0.005:
    return f"out's RMS error is {rms}, less than 0.005 needed"
  lse_error = jnp.max(jnp.abs(lse - want_lse))
  if not lse_error < 1e-3:
    return f"lse is off by {lse_error}, less than 1e-3 needed"
  return None


def start_checks(
  pool: concurrent.futures.Executor,
  ops: list[str],
  case: Case,
  precisions: list[str],
) -> dict[str, concurrent.futures.Future]:
  """Checks of the ops at this case's heads, running."""
  # More blocks than top_k, ragged, small enough for the dense reference.
  small = dataclasses.replace(
    case,
    tokens=min(256, case.tokens),
    kv_tokens=33 * case.block_size - 5,
    batch=2,
  )
  found = {}
  if {"prefill", "select"} & set(ops):
    for precision in precisions:
      name = f"select {precision}"
      found[name] = pool.submit(check_select, small, precision)
  if {"prefill", "sparse_forward"} & set(ops):
    found["sparse_forward"] = pool.submit(check_sparse, small)
  return found


# ---- One case ----


def measure_dense(
  case: Case, programs: Programs, qkv: tuple[Array, ...]
) -> tuple[str, float]:
  """Name and seconds of the faster dense attention."""
  once = dense_flops(case) / 500e12 > ONCE_SECONDS
  dtypes = {"cudnn": case.dtype, "jax mosaic_gpu": "float16"}
  seconds = {}
  for name, dtype in dtypes.items():
    if f"dense {name}" not in programs:
      continue
    try:
      program = programs[f"dense {name}"]
      operands = tuple(x.astype(dtype) for x in qkv)
      jax.block_until_ready(operands)
      seconds[name], _ = measure(functools.partial(program, *operands), once)
    except Exception as error:  # a peer may not take a shape: say so, go on
      log(f"  dense {name} does not run here: {str(error)[:200]}")
    else:
      log(f"  dense {name}: {seconds[name] * 1e3:.3f} ms")
  if not seconds:
    raise RuntimeError("no dense attention runs at this shape")
  best = min(seconds, key=lambda name: seconds[name])
  return best, seconds[best]


def run_case(
  case: Case,
  programs: Programs,
  ops: list[str],
  selections: list[str],
  precisions: list[str],
) -> tuple[list[dict], list[dict]]:
  """Rows and recalls of one shape."""
  dense_name, dense_seconds = None, 0.0
  qkv: tuple[Array, ...] = ()
  if "attention_inputs" in programs:
    qkv = programs["attention_inputs"](jax.random.key(0))
  if "dense cudnn" in programs:
    dense_name, dense_seconds = measure_dense(case, programs, qkv)

  rows, recalls = [], []
  for selection in cases.SELECTIONS:
    if f"index_inputs {selection}" not in programs:
      continue
    make_inputs = programs[f"index_inputs {selection}"]
    index_q, index_k = make_inputs(jax.random.key(1))
    exact = programs["select exact"](index_q, index_k)
    union8 = float(programs["union8"](exact))
    for precision in precisions:
      choose = programs[f"select {precision}"]
      if precision != "exact" and "select" in ops:
        recall = programs["recall"](choose(index_q, index_k), exact)
        recalls.append(
          dict(
            tokens=case.tokens,
            index_dim=case.index_dim,
            selection=selection,
            score_precision=precision,
            recall=round(float(recall), 5),
          )
        )
        log(f"  recall {selection} {precision}: {recalls[-1]['recall']}")
      if selection not in selections:
        continue
      for op in ops:
        if op == "sparse_forward":
          if precision != precisions[0]:
            continue
          call = functools.partial(programs["sparse"], *qkv, exact)
          peak = program_bytes(programs["sparse"])
        elif op == "select":
          call = functools.partial(choose, index_q, index_k)
          peak = program_bytes(choose)
        else:
          attend = programs["sparse"]

          def call(choose=choose, attend=attend, inputs=(index_q, index_k)):
            return attend(*qkv, choose(*inputs))

          peak = max(
            program_bytes(choose) + sum(x.nbytes for x in qkv),
            program_bytes(attend) + index_q.nbytes + index_k.nbytes,
          )
        seconds, spread = measure(call)
        is_prefill = op == "prefill" and dense_name is not None
        row = dict(
          op=op,
          **dataclasses.asdict(case),
          selection=selection,
          union8=round(union8, 2),
          score_precision="exact" if op == "sparse_forward" else precision,
          ms=round(seconds * 1e3, 4),
          spread_ms=None if spread is None else round(spread * 1e3, 4),
          dense_ms=round(dense_seconds * 1e3, 4) if is_prefill else None,
          dense=dense_name if is_prefill else None,
          speedup=round(dense_seconds / seconds, 2) if is_prefill else None,
          tflops=round(op_flops(op, case) / seconds / 1e12, 1),
          peak_bytes=peak,
        )
        rows.append(row)
        beside = f", {row['speedup']}x over {dense_name}" if is_prefill else ""
        log(
          f"  {op} {selection} {row['score_precision']}: {row['ms']:.3f} ms,"
          f" {row['tflops']:.0f} TFLOP/s{beside}"
        )
  return rows, recalls


# ---- Results ----


def commit_name() -> str:
  try:
    run = subprocess.run(
      ["git", "rev-parse", "--short", "HEAD"],
      cwd=pathlib.Path(__file__).parent,
      capture_output=True,
      text=True,
      check=True,
    )
    return run.stdout.strip()
  except (OSError, subprocess.CalledProcessError):
    return "unknown"


def merge(old: list[dict], new: list[dict], key: list[str]) -> list[dict]:
  """Old rows, those of the same key replaced, then new ones."""

  def name(row):
    return tuple(row.get(field) for field in key)

  table = {name(row): row for row in old} | {name(row): row for row in new}
  return list(table.values())


def write_json(path: pathlib.Path, content: dict) -> None:
  """Writes the whole file or none of it."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.NamedTemporaryFile(
    "w", dir=path.parent, suffix=".tmp", delete=False
  ) as file:
    json.dump(content, file, indent=1)
    file.write("\n")
  os.chmod(file.name, 0o644)
  os.replace(file.name, path)


def read_json(path: pathlib.Path) -> dict:
  return json.loads(path.read_text()) if path.exists() else {}


def store(path: pathlib.Path, rows: list[dict], recalls: list[dict]) -> dict:
  old = read_json(path)
  content = dict(
    device=jax.devices()[0].device_kind,
    jax=jax.__version__,
    rows=merge(old.get("rows", []), rows, KEY),
    recall=merge(
      old.get("recall", []),
      recalls,
      ["tokens", "index_dim", "selection", "score_precision"],
    ),
  )
  write_json(path, content)
  return content


def plot(content: dict, path: pathlib.Path) -> None:
  """Speed-up of prefill against length, at the paper's heads."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  paper = dataclasses.asdict(Case(tokens=0, kv_tokens=-1))
  fixed = [f for f in paper if f not in ("tokens", "kv_tokens")]
  rows = [
    row
    for row in content["rows"]
    if row["op"] == "prefill"
    and row["speedup"]
    and row["tokens"] == row["kv_tokens"]
    and all(row[f] == paper[f] for f in fixed)
  ]
  figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
  styles = {"random": "--", "trained_like": "-"}
  colours = dict(exact="tab:blue", fast="tab:green", fp8="tab:red")
  for selection, style in styles.items():
    for precision, colour in colours.items():
      points = sorted(
        (row["tokens"], row["speedup"])
        for row in rows
        if (row["selection"], row["score_precision"]) == (selection, precision)
      )
      if points:
        label = f"{selection.replace('_', '-')}, {precision}"
        axes.plot(
          *zip(*points, strict=True), style, color=colour, marker="o",
          ms=4, label=label,
        )  # fmt: skip
  dense = {row["tokens"]: row["dense_ms"] for row in rows}
  for precision, rate in BOUND_TFLOPS.items():
    bound = []
    for tokens, ms in sorted(dense.items()):
      case = Case(tokens=tokens)
      seconds = index_flops(case) / rate / 1e12
      seconds += main_flops(case) / BOUND_TFLOPS["exact"] / 1e12
      bound.append((tokens, ms / 1e3 / seconds))
    if bound:
      operand = "bf16" if precision == "exact" else "fp8"
      axes.plot(
        *zip(*bound, strict=True), ":", color=colours[precision], alpha=0.6,
        label=f"matrix bound, {operand} index",
      )  # fmt: skip
  axes.plot(*PAPER_SPEEDUP, "k*", ms=10, label="paper (H800)")
  axes.set_xscale("log", base=2)
  axes.set_yscale("log", base=2)
  ticks = sorted({*dense, PAPER_SPEEDUP[0]})
  names = [f"{t >> 10}K" if t < 1 << 20 else f"{t >> 20}M" for t in ticks]
  axes.set_xticks(ticks, names)
  axes.yaxis.set_major_formatter("{x:g}x")
  axes.set_xlabel("tokens")
  axes.set_ylabel("speed-up over dense attention")
  axes.set_title(f"Prefill, {content['device']}")
  axes.grid(alpha=0.3)
  axes.legend(fontsize=8)
  figure.savefig(path, dpi=150)
  plt.close(figure)


def device_slug() -> str:
  return "_".join(str(jax.devices()[0].device_kind).lower().split())


def parse(argv: list[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    prog="python -m pallas_kernels.bench",
    description=(__doc__ or "").split("\n\n")[0],
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
  )
  parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS))
  parser.add_argument(
    "--tokens",
    nargs="+",
    choices=list(cases.CASES),
    default=list(cases.CASES),
    help="named shapes, see pallas_kernels/cases.py",
  )
  parser.add_argument(
    "--selection",
    nargs="+",
    choices=("random", "trained_like"),
    default=["random", "trained_like"],
  )
  parser.add_argument(
    "--precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS)
  )
  parser.add_argument(
    "--no-dense", action="store_true", help="leave dense attention out"
  )
  parser.add_argument(
    "--results", type=pathlib.Path, help="JSON file; results/<device>.json"
  )
  parser.add_argument("--commit", help="commit to note; asked from git")
  parser.add_argument(
    "--plot-only", type=pathlib.Path, metavar="JSON",
    help="draw the plot of a results file and stop",
  )  # fmt: skip
  return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
  args = parse(argv)
  if args.plot_only:
    plot(read_json(args.plot_only), args.plot_only.with_suffix(".png"))
    return 0
  mosaic.require_hopper()
  path = args.results or RESULTS / f"{device_slug()}.json"
  chosen = {name: cases.CASES[name] for name in args.tokens}
  # One check for each head shape.
  checked = {
    dataclasses.replace(case, tokens=1, kv_tokens=1): case
    for case in chosen.values()
  }
  with concurrent.futures.ThreadPoolExecutor(12) as pool:
    log(f"checking {', '.join(args.ops)}")
    checks = [
      start_checks(pool, args.ops, case, args.precision)
      for case in checked.values()
    ]
    ordered = sorted(chosen.items(), key=lambda item: -item[1].tokens)
    programs = {}
    for name, case in ordered:
      selections = list(args.selection)
      # How low precision copes with outliers; one length is enough.
      if "select" in args.ops and case.tokens <= MOSAIC_DENSE_TOKENS:
        selections.append("outliers")
      programs[name] = Programs(
        pool, case, args.ops, selections, args.precision, not args.no_dense
      )
    failed = [
      f"{name}: {check.result()}"
      for of_heads in checks
      for name, check in of_heads.items()
      if check.result()
    ]
    if failed:
      pool.shutdown(cancel_futures=True)
      print("\n".join(["check failed, nothing measured:", *failed]))
      return 1
    rates = ceilings()
    log(f"ceilings {rates}")
    note = dict(
      date=datetime.datetime.now(datetime.UTC).date().isoformat(),
      commit=args.commit or commit_name(),
    )
    content = read_json(path)
    for name, case in ordered:
      log(name)
      rows, recalls = run_case(
        case, programs[name], args.ops, args.selection, args.precision
      )
      content = store(path, [row | rates | note for row in rows], recalls)
  plot(content, path.with_suffix(".png"))
  log(f"wrote {path}")
  return 0


if __name__ == "__main__":
  sys.exit(main())
