"""Measures one layer's attention over several devices, and over one of them.

  python -m benchmarks.context_parallel --tokens 64k 256k 1m
  python -m benchmarks.context_parallel --tokens 256k --heads 32x8x128
  python -m benchmarks.context_parallel --documents 8 --ops context_train

The tokens of one sequence are split over all devices of the host, as
`msa_jax.context` has it. Op `context_prefill` is selection and attention, op
`context_train` those with the KL and the gradients of all five inputs. Both
hold what the devices send each other: the keys of all tokens, and in training
the gradients of the keys. `context_gather` is the first alone, so it says what
sending costs if nothing hides it. `context_decode` is a decoding step of one
token against a cache of that many tokens, whose slots are split over the
devices.

With `--documents` the row is packed, of that many equal documents; decoding has
none. "imbalance" is then the most index scores of a device over the mean.

Each op is first checked against `msa_jax.reference` on a short sequence, and
its choices against those of one device, bit for bit. If a check fails, no
number is printed. "efficiency" is one device's time over n times that of n
devices; it is null where one device has no memory for the program.
"sent_bytes" are those that a device receives, and so sends, in a step, counted
in the compiled program; "formula_bytes" are those of the keys of the other
devices' tokens, 2,304 S (n - 1) / n in the paper's heads for the forward pass.

Records go to results/<device>_x<n>.json, as those of `python -m benchmarks`;
`--plot-only FILE` draws the efficiencies of such a file.

  JAX_PLATFORMS=cpu python -m benchmarks.context_parallel --compile-for 8

compiles each op for 8 H100 and runs nothing. No GPU need be here, but the extra
`cuda` must be installed. It prints what the devices send each other, and what
they compute meanwhile in XLA's schedule.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import dataclasses
import datetime
import math
import pathlib
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import msa_jax
from benchmarks import cases, measure, records
from benchmarks.__main__ import heads, with_heads
from benchmarks.cases import Case
from msa_jax import context
from msa_jax.ops import Implementation

AXIS = "context"
OPS = (
  "context_prefill", "context_train", "context_gather", "context_decode"
)  # fmt: skip
PACKED_OPS = ("context_prefill", "context_train")
# Decoding steps of a call, one after another.
_STEPS = 16
CASES = {
  f"{n}k" if n % 1024 else f"{n >> 10}m": Case(tokens=n << 10)
  for n in (64, 128, 256, 512, 1024, 1536, 2048, 3072, 4096)
}
TOKENS = PartitionSpec(None, AXIS)
# What a device may take of its memory; the rest is XLA's and other programs'.
_SHARE = 0.92


# ---- The layer ----


def layer(
  case: Case,
  devices: int,
  op: str,
  implementation: Implementation,
  steps: int = _STEPS,
  documents: int = 1,
) -> Callable:
  """(q, k, v, index_q, index_k, dout) -> what the op gives, of one device.

  Decoding takes `steps` steps, one after another. With more than one device it
  is called inside `jax.shard_map`.
  """

  def keys(x) -> Any:
    return context.gather_keys(x, AXIS) if devices > 1 else x

  def forward(q, k, v, index_q, index_k, **options):
    if documents > 1:
      # Every device holds the ids of the whole row.
      ids = jnp.asarray(segment_ids(case.kv_tokens, documents))
      # In training, ids are an input. As constants, XLA would compute all that
      # follows from them while it compiles, which takes a minute.
      ids = jax.lax.optimization_barrier(ids)
      options["segment_ids"] = jnp.tile(ids, (case.batch, 1))
      options["max_segments"] = documents
    if devices > 1:
      options["query_pieces"] = context.query_pieces(AXIS, q.shape[1])
    index_k = keys(index_k)
    k, v = keys((k, v))
    return msa_jax.msa_attention(
      q,
      k,
      v,
      index_q,
      index_k,
      block_size=case.block_size,
      top_k=case.top_k,
      implementation=implementation,
      **options,
    )

  def prefill(*operands):
    out = forward(*operands[:5])
    return out.out, out.block_indices

  def train(*operands):
    *inputs, dout = operands

    def loss(*inputs):
      out = forward(*inputs, with_kl=True)
      return out.out, out.kl

    (_, kl), pull = jax.vjp(loss, *inputs)
    # The mean over all queries is the mean of the devices' means.
    gradients = pull((dout, jnp.full_like(kl, 1 / devices)))
    return jnp.broadcast_to(kl, (1,)), gradients

  def gather(q, k, v, index_q, index_k, dout):
    del q, index_q, dout
    # A few numbers of each, so that nothing but sending takes time.
    return tuple(
      x[:, :: case.block_size] for x in (*keys((k, v)), keys(index_k))
    )

  def decode(q, k, v, index_q, index_k, dout):
    del dout
    # The queries are those of one token, the same on all devices.
    q, index_q = q[:, :1], index_q[:, :1]
    if devices > 1:
      first = jax.lax.axis_index(AXIS) == 0
      q, index_q = (
        jax.lax.psum(jnp.where(first, x, 0), AXIS) for x in (q, index_q)
      )

    def step(_, q):
      return msa_jax.decode_attention(
        q,
        k,
        v,
        index_q,
        index_k,
        kv_lengths=jnp.full((case.batch,), case.kv_tokens, jnp.int32),
        block_size=case.block_size,
        top_k=case.top_k,
        axis_name=AXIS if devices > 1 else None,
        implementation=implementation,
      ).out

    return jax.lax.fori_loop(0, steps, step, q)

  return dict(
    context_prefill=prefill,
    context_train=train,
    context_gather=gather,
    context_decode=decode,
  )[op]


def segment_ids(tokens: int, documents: int) -> np.ndarray:
  """Ids of documents of equal length, but for a token, [T]."""
  ids = 1 + np.arange(tokens, dtype=np.int64) * documents // tokens
  return ids.astype(np.int32)


def imbalance(tokens: int, documents: int, devices: int) -> float:
  """Of the index scores of a packed row, see `msa_jax.context.imbalance`."""
  ids = segment_ids(tokens, documents)
  first = np.searchsorted(ids, ids)
  return context.imbalance(np.arange(tokens) - first, devices)


def program(
  case: Case,
  mesh: Mesh,
  op: str,
  implementation: Implementation,
  steps: int = _STEPS,
  documents: int = 1,
) -> Callable:
  """The layer over the devices of a mesh, on whole arrays in zigzag order."""
  run = layer(case, mesh.size, op, implementation, steps, documents)
  if mesh.size == 1:
    return run
  blocks = PartitionSpec(None, None, AXIS)
  results = dict(
    context_prefill=(TOKENS, blocks),
    context_train=(PartitionSpec(AXIS), (TOKENS,) * 5),
    context_gather=(PartitionSpec(AXIS),) * 3,
    context_decode=PartitionSpec(),
  )
  return jax.shard_map(
    run,
    mesh=mesh,
    in_specs=(TOKENS,) * 6,
    out_specs=results[op],
    check_vma=False,
  )


def mesh_of(count: int) -> Mesh:
  return jax.make_mesh(
    (count,),
    (AXIS,),
    axis_types=(AxisType.Auto,),
    devices=jax.devices()[:count],
  )


def operands(case: Case, mesh: Mesh, selection: str) -> tuple[Any, ...]:
  """q, k, v, index_q, index_k and dout, in zigzag order.

  Each device makes its own part, but for the index inputs, whose choices are
  about the whole sequence.
  """
  local = dataclasses.replace(
    case,
    tokens=case.tokens // mesh.size,
    kv_tokens=case.kv_tokens // mesh.size,
  )

  def own():
    device = jax.lax.axis_index(AXIS)
    key, other = jax.random.split(jax.random.fold_in(jax.random.key(0), device))
    qkv = cases.attention_inputs(key, local)
    return *qkv, cases.normal(other, qkv[0].shape, case.dtype)

  make = jax.shard_map(
    own, mesh=mesh, in_specs=(), out_specs=(TOKENS,) * 4, check_vma=False
  )
  q, k, v, dout = jax.jit(make)()
  order = context.zigzag_order(case.tokens, mesh.size)
  index = cases.index_inputs(jax.random.key(1), case, selection)
  place = NamedSharding(mesh, TOKENS)
  index_q, index_k = (jax.device_put(x[:, order], place) for x in index)
  return q, k, v, index_q, index_k, dout


# What XLA has to know of an H100 to compile for it: a `GpuTargetConfigProto`.
_H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 13 }
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  l2_cache_size: 52428800
  memory_bandwidth: 3352320000000
  device_memory_size: 84929347584
}
"""


def described_mesh(count: int) -> Mesh:
  """A mesh of H100 GPUs of one host that need not be here, to compile for.

  Raises:
    RuntimeError: JAX's CUDA plugin is not installed.
  """
  topology = topologies.get_topology_desc(
    platform="cuda", target_config=_H100, topology=f"1x1x{count}"
  )
  devices = np.array(topology.devices)
  return Mesh(devices, (AXIS,), axis_types=(AxisType.Auto,))


# ---- What the devices send ----

_COLLECTIVE = re.compile(
  r"= (?P<shape>.*?) (?P<name>all-gather|all-reduce|reduce-scatter|all-to-all"
  r"|collective-permute)(?P<start>-start)?\("
)
_ARRAY = re.compile(r"(?P<dtype>[a-z]+[0-9]+)[a-z0-9]*\[(?P<sizes>[0-9,]*)\]")


def sent_bytes(text: str, devices: int) -> dict[str, int]:
  """Bytes that a device receives in each kind of collective of a program.

  A collective of n devices moves to each (n - 1) / n of what it gathers, of
  what it scatters or of what it exchanges, and twice that for a sum that all of
  them get.

  Args:
    text: of a compiled program, in XLA's words.
    devices: that take part in each collective.
  """
  found: dict[str, int] = {}
  for match in _COLLECTIVE.finditer(text):
    name = match["name"]
    found[name] = found.get(name, 0) + _received(match, devices)
  return found


def _received(match: re.Match, devices: int) -> int:
  """Bytes of one collective, see `sent_bytes`."""
  arrays = [
    int(re.sub("[a-z]", "", array["dtype"]))
    // 8
    * math.prod(int(n) for n in array["sizes"].split(",") if n)
    for array in _ARRAY.finditer(match["shape"])
  ]
  name, started = match["name"], match["start"]
  if started and name == "collective-permute":
    arrays = arrays[:2]  # what follows are contexts
  # What starts lists what it reads before what it gives; a sum need not.
  if started and (name != "all-reduce" or match["shape"].startswith("((")):
    arrays = arrays[len(arrays) // 2 :]
  size = sum(arrays)
  if name == "reduce-scatter":
    size *= devices
  share = (devices - 1) / devices
  factor = {"all-reduce": 2 * share, "collective-permute": 1.0}
  return round(size * factor.get(name, share))


class Sent(NamedTuple):
  """A collective of a compiled program.

  Attributes:
    name: its kind, such as "all-gather".
    received: bytes that a device receives.
    meanwhile: what runs while it is under way, by name: our kernels, and
      "other" for fusions, products and sorts. None if everything waits for it.
  """

  name: str
  received: int
  meanwhile: dict[str, int] | None


_COMPUTATION = re.compile(r"^(ENTRY )?%?(?P<name>[\w.-]+) .*->.*\{$")
_DONE = re.compile(
  r" (?:all-|reduce-|collective-)\w+(?:-\w+)?-done\(%?([\w.-]+)"
)
_CALLED = re.compile(
  r"(?:body|true_computation|false_computation|to_apply)=%?([\w.-]+)"
  r"|branch_computations=\{([^}]*)\}"
)
_KERNEL = re.compile(r'custom_call_target="mosaic_gpu.*?op_name="([^"]*)"')
_WORK = re.compile(r" (?:fusion|sort|custom-call|dot|copy|scatter|gather)\(")
_CALLS = re.compile(r" (?:while|conditional|call)\(")


def schedule(text: str, devices: int) -> list[Sent]:
  """The collectives of a compiled program, as XLA has scheduled them.

  Args:
    text: of a compiled program for GPUs, in XLA's words; its operations are in
      the order in which they start.
    devices: that take part in each collective.
  """
  computations: dict[str, list[str]] = {}
  lines, entry = [], []
  for line in text.splitlines():
    if header := _COMPUTATION.match(line):
      lines = computations[header["name"]] = []
      if header[1]:
        entry = lines
    else:
      lines.append(line)
  found: list[Sent] = []
  under_way: dict[str, collections.Counter] = {}

  def visit(lines):
    for line in lines:
      if match := _COLLECTIVE.search(line):
        meanwhile = collections.Counter() if match["start"] else None
        received = _received(match, devices)
        found.append(Sent(match["name"], received, meanwhile))
        if meanwhile is not None:
          name = line.split("=")[0].replace("ROOT", "").strip(" %")
          under_way[name] = meanwhile
      elif match := _DONE.search(line):
        under_way.pop(match[1], None)
      elif _CALLS.search(line):
        for one, several in _CALLED.findall(line):
          for name in (one or several).split(","):
            visit(computations.get(name.strip(" %"), []))
      elif _WORK.search(line):
        kernel = _KERNEL.search(line)
        # The last name is that of the primitive that calls the kernel.
        name = kernel[1].split("/")[-2] if kernel else "other"
        for meanwhile in under_way.values():
          meanwhile[name] += 1

  visit(entry)
  return found


def formula_bytes(case: Case, devices: int, op: str) -> int | None:
  """Bytes of the keys of other devices' tokens; and their float32 gradients.

  None for decoding, which sends candidates and partial results.
  """
  if op == "context_decode":
    return None
  numbers = 2 * case.num_kv_heads * case.head_dim + case.index_dim
  size = jnp.dtype(case.dtype).itemsize
  if op == "context_train":
    size += 4
  tokens = case.batch * case.kv_tokens
  return numbers * size * tokens * (devices - 1) // devices


# ---- Checks and measuring ----


def check(
  case: Case, devices: int, implementation: Implementation, documents: int = 1
) -> None:
  """Raises AssertionError unless n devices give what one gives."""
  one, many = mesh_of(1), mesh_of(devices)

  def run(op, case, mesh, arrays):
    arrays = [jax.device_put(x, NamedSharding(mesh, TOKENS)) for x in arrays]
    return jax.device_get(
      jax.jit(
        program(case, mesh, op, implementation, steps=1, documents=documents)
      )(*arrays)
    )

  # The last block is not full.
  unit = 2 * devices
  tokens = (case.top_k + 2) * case.block_size // unit * unit - unit
  short = dataclasses.replace(case, tokens=tokens, kv_tokens=tokens)
  order = context.zigzag_order(tokens, devices)
  whole = operands(short, one, "random")
  zigzag = [np.asarray(x)[:, order] for x in whole]
  _, want = run("context_prefill", short, one, whole)
  _, got = run("context_prefill", short, many, zigzag)
  np.testing.assert_array_equal(got, want[:, :, order])
  kl, gradients = run("context_train", short, many, zigzag)
  reference = layer(short, 1, "context_train", "reference", 1, documents)
  truth = measure.truth(reference)
  true_kl, wanted = truth(*(x.astype(jnp.float32) for x in whole))
  (true_kl,) = true_kl
  assert abs(kl.mean() - true_kl) <= 2e-3 * true_kl, (kl.mean(), true_kl)
  names = ("dq", "dk", "dv", "dindex_q", "dindex_k")
  for name, got, want in zip(names, gradients, wanted, strict=True):
    want = jnp.asarray(np.asarray(want)[:, order])
    wrong = measure.check_rms(name, jnp.asarray(got), want)
    assert wrong is None, wrong
  # A cache holds whole blocks on each device, in the order of the sequence.
  tokens = -(-tokens // (devices * case.block_size)) * devices * case.block_size
  short = dataclasses.replace(case, tokens=tokens, kv_tokens=tokens)
  cache = operands(short, one, "random")
  got, want = (
    run("context_decode", short, mesh, cache) for mesh in (many, one)
  )
  wrong = measure.check_rms(
    "decode", jnp.asarray(got), jnp.asarray(want, jnp.float32)
  )
  assert wrong is None, wrong


def flops(case: Case, op: str) -> float:
  if op == "context_gather":
    return 0.0
  if op == "context_decode":
    case = dataclasses.replace(case, tokens=1)
  if op == "context_train":
    return measure.flops("train", case)
  return measure.main_flops(case) + measure.index_flops(case)


class _Compiled:
  """An op's program on a mesh, and how much memory and sending it takes."""

  def __init__(self, case, mesh, op, implementation, documents):
    of = measure.shapes(case, case.dtype)
    place = NamedSharding(mesh, TOKENS)
    arrays = (
      jax.ShapeDtypeStruct(of[name].shape, of[name].dtype, sharding=place)
      for name in ("q", "k", "v", "index_q", "index_k", "q")
    )
    whole = program(case, mesh, op, implementation, documents=documents)
    run = jax.jit(whole)
    # There is no matrix product of XLA's to tune. What XLA would time otherwise
    # needs memory for its operands, tens of GiB at 1M tokens, while other
    # commands hold theirs.
    self.run = run.lower(*arrays).compile({"xla_gpu_autotune_level": 0})
    self.peak_bytes = measure.program_bytes(self.run)
    self.text = self.run.as_text() or ""
    self.sent = sent_bytes(self.text, mesh.size)

  def fits(self) -> bool:
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    return limit is None or self.peak_bytes <= _SHARE * limit


@contextlib.contextmanager
def _memory_may_end() -> Iterator[None]:
  """Leaves the block, and raises nothing, where memory ends."""
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise


def reserve() -> None:
  """Takes nearly all free memory of each device as one piece.

  Unless XLA takes its memory at the start (XLA_PYTHON_CLIENT_PREALLOCATE), it
  asks for more whenever it needs some, and an array must fit into one of these
  pieces. A program of several devices for which one finds no room never ends,
  because the others wait for it.

  For a new array XLA asks the driver for the next power of two, or for all that
  its limit leaves if that is less. If other programs hold some of it, XLA asks
  for a tenth less, again and again, until the array would no longer fit. That
  takes no time, but an array that finds no room waits 10 s for memory that is
  given back. So the array is the smallest one for which all of the room is
  asked, and the second one, for the next power of two is kept, much smaller.
  """
  for device in jax.devices():
    stats = device.memory_stats()
    if stats is None:
      return
    # What XLA has from the driver, whether arrays use it or not.
    held = stats.get("pool_bytes", stats["bytes_in_use"])
    room = stats["bytes_limit"] - held
    if room < 2:
      continue
    power = 1 << ((room - 1).bit_length() - 1)  # the one below the room
    for size in (power + 1, max(power // 4, 1)):
      if _has_room(device, size):
        break


def _has_room(device: jax.Device, size: int) -> bool:
  """Whether an array of so many bytes fits; it is gone afterwards."""
  with _memory_may_end(), jax.default_device(device):
    jax.block_until_ready(jnp.zeros(size, jnp.uint8)).delete()
    return True
  return False


def measured(
  compiled: _Compiled, arrays: tuple[jax.Array, ...]
) -> tuple[float, float | None] | None:
  """Seconds and spread; None if the memory is not there."""
  with _memory_may_end():
    return measure.measure(lambda: compiled.run(*arrays))
  return None


def record(
  case: Case,
  op: str,
  selection: str,
  programs: dict[int, Any],
  implementation: Implementation,
  documents: int,
) -> dict[str, Any] | None:
  """Times one op on one device and on all; None if those lack the memory."""
  seconds: dict[int, tuple[float, float | None] | None] = {}
  count = max(programs)
  for devices, future in programs.items():
    compiled = None
    with _memory_may_end():  # where XLA finds no schedule that fits
      compiled = future.result()
    if compiled is None or not compiled.fits():
      seconds[devices] = None
      continue
    arrays = operands(case, mesh_of(devices), selection)
    seconds[devices] = measured(compiled, arrays)
    del arrays
  if seconds[count] is None:
    measure.log(f"  {op} {selection}: no memory on {count} devices")
    return None
  compiled = programs[count].result()
  if op == "context_decode":
    seconds = {
      n: found and (found[0] / _STEPS, found[1] and found[1] / _STEPS)
      for n, found in seconds.items()
    }
  one, many = seconds.get(1), seconds[count]
  assert many is not None
  efficiency = None if one is None else one[0] / count / many[0]
  if op == "context_gather":
    efficiency = None
  formula = formula_bytes(case, count, op)
  sent = sum(compiled.sent.values())
  measure.log(
    f"  {op} {selection}: {many[0] * 1e3:.2f} ms on {count},"
    f" {'no memory' if one is None else f'{one[0] * 1e3:.2f} ms'} on one,"
    f" efficiency {efficiency and round(efficiency, 3)}, sent {sent / 1e6:.1f}"
    f" MB, formula {formula and round(formula / 1e6, 1)} MB"
  )
  packed: dict[str, Any]
  if documents > 1:
    balance = imbalance(case.tokens, documents, count)
    packed = dict(documents=documents, imbalance=round(balance, 3))
  else:
    rate = flops(case, op) / count / many[0]
    packed = dict(tflops=round(rate / 1e12, 1))
  return dict(
    op=op,
    **dataclasses.asdict(case),
    selection=selection,
    score_precision="exact",
    implementation=implementation,
    devices=count,
    ms=round(many[0] * 1e3, 4),
    spread_ms=None if many[1] is None else round(many[1] * 1e3, 4),
    one_ms=None if one is None else round(one[0] * 1e3, 4),
    efficiency=efficiency and round(efficiency, 4),
    **packed,
    peak_bytes=compiled.peak_bytes,
    sent_bytes=sent,
    formula_bytes=formula,
    collectives=compiled.sent,
  )


def report_schedule(
  name: str, case: Case, op: str, compiled: _Compiled, devices: int
) -> None:
  """Prints what a compiled program sends, and what hides it."""
  sent = sum(compiled.sent.values())
  formula = formula_bytes(case, devices, op)
  print(
    f"{name} {op} for {devices} devices: received {sent / 1e6:.1f} MB,"
    f" formula {formula and round(formula / 1e6, 1)} MB, memory"
    f" {compiled.peak_bytes / 1e9:.1f} GB"
  )
  for each in schedule(compiled.text, devices):
    if each.meanwhile is None:
      meanwhile = "waited for"
    else:
      counts = sorted(each.meanwhile.items(), key=lambda item: item[0])
      counted = ", ".join(f"{count} {what}" for what, count in counts)
      meanwhile = f"while {counted or 'nothing'}"
    print(f"  {each.name:16} {each.received / 1e6:9.1f} MB {meanwhile}")


def plot(content: dict, path: pathlib.Path) -> None:
  """Plots the efficiencies of a results file by length.

  The file is written whole or not at all.
  """
  from matplotlib.figure import Figure

  figure = Figure(figsize=(7, 4.5), layout="constrained")
  axes = figure.subplots()
  names = dict(context_prefill="forward", context_train="training")
  lines: dict[tuple, list[tuple[int, float]]] = {}
  for record in content["rows"]:
    if record["op"] in names and record["efficiency"] is not None:
      heads = (record["num_heads"], record["num_kv_heads"])
      line = (heads, record["op"], record.get("documents", 1))
      point = record["tokens"] >> 10, 100 * record["efficiency"]
      lines.setdefault(line, []).append(point)
  colours: dict[tuple, str] = {}
  for (heads, op, documents), points in sorted(lines.items(), reverse=True):
    colour = colours.setdefault(heads, f"C{len(colours)}")
    packed = f", {documents} documents" if documents > 1 else ""
    axes.plot(
      *zip(*sorted(points), strict=True),
      color=colour,
      linestyle="-" if op == "context_prefill" else "--",
      marker="o" if op == "context_prefill" else "^",
      markerfacecolor=colour if documents == 1 else "none",
      label=f"{heads[0]} heads, {heads[1]} KV heads, {names[op]}{packed}",
    )
  ticks = sorted({x for points in lines.values() for x, _ in points})
  axes.set_xscale("log", base=2)
  axes.set_xticks(
    ticks, [f"{x}K" if x < 1024 else f"{x >> 10}M" for x in ticks]
  )
  axes.set_ylim(top=101)
  axes.axhline(100, color="grey", linewidth=0.8)
  axes.set_xlabel("tokens of the sequence")
  (count,) = {record["devices"] for record in content["rows"]}
  axes.set_ylabel(f"speed over {count} times one GPU's, %")
  axes.legend(fontsize=8)
  axes.set_title(f"One layer's MSA on {count} {content['device']}")
  with records.whole_file(path) as file:
    figure.savefig(file, dpi=150, format=path.suffix[1:])


def parse(argv: list[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    prog="python -m benchmarks.context_parallel",
    description=(__doc__ or "").split("\n\n")[0],
  )
  parser.add_argument(
    "--ops", nargs="+", choices=OPS, default=list(OPS), help="default: all"
  )
  parser.add_argument(
    "--tokens", nargs="+", choices=list(CASES), default=["64k", "256k", "1m"],
    help="lengths (default: 64k 256k 1m)",
  )  # fmt: skip
  parser.add_argument(
    "--heads", nargs="+", type=heads, metavar="HxKxD",
    help="heads instead of the paper's, such as 32x8x128",
  )  # fmt: skip
  parser.add_argument(
    "--documents", type=int, default=1, metavar="N",
    help="equal documents in the row (default: 1, a plain row)",
  )  # fmt: skip
  parser.add_argument(
    "--selection", nargs="+", choices=("random", "trained_like"),
    default=["trained_like"],
    help="kind of index queries and keys (default: trained_like)",
  )  # fmt: skip
  parser.add_argument(
    "--implementation", choices=get_args(Implementation), default="mosaic_gpu"
  )
  parser.add_argument(
    "--no-one", action="store_true", help="do not time one device"
  )
  parser.add_argument(
    "--compile-for", type=int, metavar="N",
    help="compile for N H100 and print what is sent when, and run nothing",
  )  # fmt: skip
  parser.add_argument("--results", type=pathlib.Path, help="JSON file")
  parser.add_argument(
    "--lock", type=pathlib.Path, metavar="FILE",
    help="as that of python -m benchmarks",
  )  # fmt: skip
  parser.add_argument("--commit", help="commit to record (default: HEAD)")
  parser.add_argument(
    "--plot-only", type=pathlib.Path, metavar="JSON",
    help="draw the efficiencies of a results file and stop",
  )  # fmt: skip
  return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
  args = parse(argv)
  if args.plot_only:
    content = records.read_json(args.plot_only)
    plot(content, args.plot_only.with_suffix(".png"))
    return 0
  count = args.compile_for or jax.device_count()
  if args.compile_for is not None and count < 2:
    print(
      f"context_parallel: --compile-for {count}: wanted 2 or more.",
      file=sys.stderr,
    )
    return 2
  if count < 2:
    print(
      "context_parallel: wanted at least 2 devices, 1 is here (on a CPU:"
      " XLA_FLAGS=--xla_force_host_platform_device_count=2).",
      file=sys.stderr,
    )
    return 1
  chosen = {
    each: case
    for name in args.tokens
    for each, case in with_heads(name, CASES[name], args.heads).items()
  }
  for case in chosen.values():
    context.check_length("--tokens", case.tokens, count)
  ops = [op for op in args.ops if args.documents == 1 or op in PACKED_OPS]
  if args.documents < 1 or not ops:
    print(
      f"context_parallel: --documents {args.documents} with --ops"
      f" {' '.join(args.ops)}: wanted 1 or more, and an op of"
      f" {', '.join(PACKED_OPS)}.",
      file=sys.stderr,
    )
    return 2
  if args.compile_for is not None:
    try:
      mesh = described_mesh(count)
    except RuntimeError as error:
      print(
        "context_parallel: --compile-for needs JAX's CUDA plugin (the extra"
        f" cuda of this package): {error}",
        file=sys.stderr,
      )
      return 1
    for name, case in chosen.items():
      for op in ops:
        compiled = _Compiled(
          case, mesh, op, args.implementation, args.documents
        )
        report_schedule(name, case, op, compiled, count)
    return 0
  path = args.results or (
    records.FOLDER / f"{records.device_slug()}_x{count}.json"
  )
  records.read_own(path)
  note = dict(
    date=datetime.datetime.now(datetime.UTC).date().isoformat(),
    commit=args.commit or records.commit_name(),
  )
  with (
    measure.turns(args.lock) as wait_for_turn,
    concurrent.futures.ThreadPoolExecutor(6) as pool,
  ):
    checked = {
      dataclasses.replace(case, tokens=1, kv_tokens=1)
      for case in chosen.values()
    }
    # One after another: programs of several GPUs that start in another order on
    # each of them wait for each other for ever.
    checks = pool.submit(
      lambda: [
        check(case, count, args.implementation, args.documents)
        for case in checked
      ]
    )
    meshes = {n: mesh_of(n) for n in ([count] if args.no_one else [1, count])}
    ordered = sorted(chosen.items(), key=lambda item: -item[1].tokens)
    programs = {
      (name, op): {
        n: pool.submit(
          _Compiled, case, mesh, op, args.implementation, args.documents
        )
        for n, mesh in meshes.items()
        if n > 1 or op != "context_gather"
      }
      for name, case in ordered
      for op in ops
    }
    try:
      checks.result()
    except AssertionError as error:
      pool.shutdown(cancel_futures=True)
      print(f"check failed, nothing measured:\n{error}")
      return 1
    # Compiling takes the processors that the other programs' calls need.
    concurrent.futures.wait(
      [future for each in programs.values() for future in each.values()]
    )
    wait_for_turn()
    reserve()
    for name, case in ordered:
      measure.log(name)
      for selection in args.selection:
        found = [
          record(
            case,
            op,
            selection,
            programs[name, op],
            args.implementation,
            args.documents,
          )
          for op in ops
        ]
        records.store(path, [each | note for each in found if each], [])
  measure.log(f"wrote {path}")
  return 0


if __name__ == "__main__":
  sys.exit(main())
