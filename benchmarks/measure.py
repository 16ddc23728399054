"""Timing, the rates of this device, and the operations that an op needs.

Times are device times: several calls are queued and awaited together, and the
median over rounds is kept with its spread (largest minus smallest). Calls of
many seconds are the exception: they run once.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import cases
from benchmarks.cases import Case
from msa_jax.ops import Implementation

ONCE_SECONDS = 5.0  # dense attention that takes longer is timed once


def log(text: str) -> None:
  print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


@contextlib.contextmanager
def turns(path: pathlib.Path | None) -> Iterator[Callable[[], None]]:
  """Lets several commands share a device: one measures, while none compiles.

  Yields a function to call before the first measurement. It returns once every
  other command with the same file has compiled and checked its programs, or has
  measured and ended. Python lowers one kernel at a time, so that many shapes
  take less device time if several commands share them.

  Args:
    path: a file, made if need be; None: the command is alone.
  """
  if path is None:
    yield lambda: None
    return
  with path.open("a") as file:
    fcntl.flock(file, fcntl.LOCK_SH)
    yield lambda: fcntl.flock(file, fcntl.LOCK_EX)


def measure(
  call: Callable[[], Any], once: bool = False
) -> tuple[float, float | None]:
  """Median seconds of a call and the spread between rounds.

  Args:
    call: what to time; returns arrays.
    once: time a single call; the spread is then None.
  """

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
  if estimate > 0.1:  # the first call may load code, and is left out
    times = [estimate, seconds(), seconds()]
  else:
    count = max(1, min(50, int(0.1 / estimate)))
    times = [seconds(count) for _ in range(7)]
  return float(np.median(times)), max(times) - min(times)


class KernelTime(NamedTuple):
  """A kernel that ran on the device, in seconds of the device's clock."""

  name: str
  start: float
  duration: float


def kernels_of(call: Callable[[], Any]) -> list[KernelTime]:
  """The kernels of a call, as the device saw them."""
  jax.block_until_ready(call())
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      jax.block_until_ready(call())
    [path] = pathlib.Path(folder).rglob("*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(path)).planes
    return [
      KernelTime(event.name, event.start_ns / 1e9, event.duration_ns / 1e9)
      for plane in planes
      if plane.name.startswith("/device:GPU")
      for line in plane.lines
      if line.name.startswith("Stream")
      for event in line.events
    ]


def kernel_fields(
  call: Callable[[], Any], steps: int = 1, least: float = 0.01
) -> dict[str, Any]:
  """The fields of a record that say which kernels ran in a step.

  kernels_ms: milliseconds by kernel name. Kernels with less than a share
  `least` of the sum are counted together as "other".
  idle_ms: milliseconds between the start of the first kernel and the end of the
  last one in which no kernel ran.

  These are the profiler's times, which may differ from those of `measure`.

  Args:
    call: runs `steps` equal steps.
    steps: number of equal steps in a call; the values are per step.
    least: see kernels_ms.
  """
  kernels = kernels_of(call)
  by_name: dict[str, float] = {}
  for kernel in kernels:
    name = kernel.name.split("<")[0]  # template arguments fill pages
    by_name[name] = by_name.get(name, 0.0) + kernel.duration
  busy = sum(by_name.values())
  fields: dict[str, float] = {}
  for name, seconds in sorted(by_name.items(), key=lambda item: -item[1]):
    name = name if seconds >= least * busy else "other"
    fields[name] = fields.get(name, 0.0) + seconds
  end = max(kernel.start + kernel.duration for kernel in kernels)
  idle = end - min(kernel.start for kernel in kernels) - busy

  def milliseconds(seconds: float) -> float:
    return round(seconds / steps * 1e3, 4)

  return dict(
    kernels_ms={name: milliseconds(x) for name, x in fields.items()},
    idle_ms=milliseconds(idle),
  )


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


def truth(function: Callable[..., Any]) -> Callable[..., Any]:
  """Compiles a function that gives the values to check against.

  It runs once, so XLA need not search for the fastest matrix products.
  """
  return jax.jit(function, compiler_options={"xla_gpu_autotune_level": 0})


# ---- What an op needs: floating-point operations and bytes ----


def visible_tokens(case: Case) -> np.ndarray:
  """The number of keys that each query sees, float64 [T]."""
  return case.kv_tokens - case.tokens + 1.0 + np.arange(case.tokens)


def index_flops(case: Case) -> float:
  """The index scores of all visible keys."""
  groups = case.batch * case.num_kv_heads
  return 2.0 * case.index_dim * groups * visible_tokens(case).sum()


def attended_pairs(case: Case) -> float:
  """Number of (query, visible token of its chosen blocks), for one KV head."""
  seen = visible_tokens(case)
  own = (seen - 1) % case.block_size + 1
  attended = np.minimum(seen, (case.top_k - 1) * case.block_size + own)
  return case.batch * attended.sum()


def main_flops(case: Case) -> float:
  """The products q k and p v over the tokens of the chosen blocks."""
  return 4.0 * case.head_dim * case.num_heads * attended_pairs(case)


def dense_flops(case: Case) -> float:
  """The products q k and p v over all visible tokens."""
  heads = case.batch * case.num_heads
  return 4.0 * case.head_dim * heads * visible_tokens(case).sum()


def flops(op: str, case: Case) -> float:
  """Floating-point operations of an op.

  For each query, head and key of the query's own chosen blocks: 4 D in the
  forward (q k and p v), 10 D in the backward (five products), 2 D in the KL,
  which computes q k once more. The index has one head for each group of query
  heads: 2 I for each query, group and visible key in the choice, and 6 I for
  each one of the chosen blocks in the KL (scores and their two gradients).
  """
  main, index, dense = main_flops(case), index_flops(case), dense_flops(case)
  pairs = case.num_kv_heads * attended_pairs(case)
  kl = main / 2 + 6.0 * case.index_dim * pairs
  return dict(
    select=index,
    sparse_forward=main,
    prefill=index + main,
    decode=index + main,
    sparse_backward=2.5 * main,
    kl=kl,
    train=index + 3.5 * main + kl,
    warmup=3.5 * dense + dense / 2 + 4 * index,
  )[op]


def moved_bytes(op: str, case: Case) -> float:
  """Bytes of memory that `prefill` or `train` reads and writes at least.

  Each part of the op moves each of its arrays once, at its size without
  padding:

    choice     reads index_q and index_k, writes the choices
    forward    reads q, k, v and the choices, writes out and lse
    backward   reads q, k, v, out, dout, lse and the choices, writes dq, dk, dv
    KL         reads q, k, index_q, index_k, lse and the choices, writes the
               gradients of index_q and index_k
  """
  arrays = shapes(case, case.dtype)
  q, k, index_q, index_k, ids, lse = (
    float(arrays[name].size * arrays[name].dtype.itemsize)
    for name in ("q", "k", "index_q", "index_k", "ids", "lse")
  )
  index = index_q + index_k
  choice = index + ids
  forward = q + 2 * k + ids + q + lse
  backward = (q + 2 * k + 2 * q + lse + ids) + (q + 2 * k)
  kl = (q + k + index + lse + ids) + index
  training = backward + kl if op == "train" else 0.0
  return choice + forward + training


class Bound(NamedTuple):
  """What an op needs at least, and the time that this takes.

  The time is the larger one of operations / rate of the tensor cores and of
  bytes / rate of the memory: both overlap at best.

  Attributes:
    flops: floating-point operations of `flops`.
    bytes: of `moved_bytes`.
    seconds: the larger one of both times.
    of_memory: whether that is the memory's.
  """

  flops: float
  bytes: float
  seconds: float
  of_memory: bool


def bound(op: str, case: Case, tflops: float, tbs: float) -> Bound:
  """The bound of `prefill` or `train` at rates of a device.

  Args:
    op: one of the two.
    case: its shape.
    tflops: TFLOP/s of a large product of matrices (`ceilings`).
    tbs: TB/s of a large copy, read and written.
  """
  needed, moved = flops(op, case), moved_bytes(op, case)
  of_cores, of_memory = needed / (tflops * 1e12), moved / (tbs * 1e12)
  return Bound(needed, moved, max(of_cores, of_memory), of_memory > of_cores)


# ---- Programs ----


class Programs:
  """The programs of one case, which threads of a pool compile."""

  def __init__(self, pool: concurrent.futures.Executor):
    self._pool = pool
    self._futures: dict[str, concurrent.futures.Future] = {}

  def add(self, name: str, function: Callable, *arguments: Any) -> None:
    def build():
      return jax.jit(function).lower(*arguments).compile()

    self._futures[name] = self._pool.submit(build)

  def __contains__(self, name: str) -> bool:
    return name in self._futures

  def __getitem__(self, name: str) -> Any:
    return self._futures[name].result()

  def wait(self) -> None:
    """Returns when every program is compiled or has failed to."""
    concurrent.futures.wait(self._futures.values())


def shapes(case: Case, dtype: str) -> dict[str, jax.ShapeDtypeStruct]:
  """The arrays of a case, by name."""
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
  lse = (case.batch, case.num_heads, case.tokens)
  return out | dict(
    ids=jax.ShapeDtypeStruct(ids, jnp.int32),
    lse=jax.ShapeDtypeStruct(lse, jnp.float32),
    key=jax.eval_shape(lambda: jax.random.key(0)),
  )


def program_bytes(compiled: Any) -> int:
  """Arguments, results and workspace of a compiled program."""
  memory = compiled.memory_analysis()
  return int(
    memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    + memory.temp_size_in_bytes
    - memory.alias_size_in_bytes
  )


def check_rms(name: str, got: jax.Array, want: jax.Array) -> str | None:
  """The words for a failed check if the RMS error is 0.5 % or more, or None."""
  error = got.astype(jnp.float32) - want
  rms = jnp.sqrt(jnp.mean(error**2) / jnp.mean(want**2))
  if not rms < 0.005:
    return f"{name}'s RMS error is {rms}, less than 0.005 needed"
  return None


def dense_seconds(
  peers: dict[str, Callable[[], Any]], once: bool
) -> dict[str, float]:
  """Seconds of each of some dense programs that runs here, by name."""
  seconds = {}
  for name, call in peers.items():
    try:
      seconds[name], _ = measure(call, once)
    except Exception as error:  # a peer may not support the shape
      log(f"  dense {name} does not run here: {str(error)[:200]}")
    else:
      log(f"  dense {name}: {seconds[name] * 1e3:.3f} ms")
  if not seconds:
    raise RuntimeError("no dense attention runs at this shape")
  return seconds


def record(
  op: str,
  case: Case,
  call: Callable[[], Any],
  *,
  flops: float,
  peak_bytes: int,
  selection: str,
  union8: float,
  implementation: Implementation,
  score_precision: str = "exact",
  dense: dict[str, float] | None = None,
  steps: int = 1,
) -> dict[str, Any]:
  """Times an op and returns its record for results/<device>.json.

  Args:
    op: name of the op.
    case: its shape.
    call: runs `steps` equal steps of the op.
    flops: floating-point operations of one step.
    peak_bytes: memory of one step.
    selection: kind of the index inputs.
    union8: distinct blocks that 8 neighbouring queries choose, mean.
    implementation: the one that was called by its name.
    score_precision: how the index scores are ranked.
    dense: seconds of a step of each dense peer by name, if there are any. The
      speed-up is that over the fastest one.
    steps: number of equal steps in a call; the values are per step.
  """

  def milliseconds(seconds: float) -> float:
    return round(seconds * 1e3, 4)

  seconds, spread = measure(call)
  seconds, spread = seconds / steps, spread and spread / steps
  peers = dense or {}
  name = min(peers, key=lambda peer: peers[peer], default=None)
  fastest = None if name is None else peers[name]
  speedup = None if fastest is None else fastest / seconds
  versus = "" if speedup is None else f", {speedup:.2f}x over {name}"
  tflops = flops / seconds / 1e12
  log(
    f"  {op} {selection} {score_precision}: {seconds * 1e3:.3f} ms,"
    f" {tflops:.0f} TFLOP/s{versus}"
  )
  return dict(
    op=op,
    **dataclasses.asdict(case),
    selection=selection,
    union8=round(union8, 2),
    score_precision=score_precision,
    implementation=implementation,
    ms=milliseconds(seconds),
    spread_ms=None if spread is None else milliseconds(spread),
    dense_ms=None if fastest is None else milliseconds(fastest),
    dense=name,
    dense_ms_by={peer: milliseconds(x) for peer, x in peers.items()},
    speedup=None if speedup is None else round(speedup, 2),
    tflops=round(tflops, 1),
    peak_bytes=peak_bytes,
  )
