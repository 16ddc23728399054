"""Times of packed rows: documents and prefix trees, beside other ways.

  python -m benchmarks.packed
  python -m benchmarks.packed --rows 8x16k tree_8x4k_on_32k --ops train

Each row is checked against `msa_jax`'s portable path on a short row of the same
kind first. A record has the time of a packed row (`ms`) and, from the same run,
that of its documents or sequences in rows of their own (`alone_ms`): a batch of
equal documents, one long row for `plain`, and for a tree one of its sequences
times their number.

Ops: `select`; `prefill`, selection and attention; `train`, selection, attention
and KL with all gradients; `dense` and `dense_train`, dense attention under the
row's mask, which has `tflops` too: 4 D FLOP a visible (query, key) pair and
head, 14 D with gradients. In rows of their own, which are plain, `dense` is
cuDNN's. Choices are trained_like. Records replace those of the same row and op
in results/<device>_packed.json.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import datetime
import functools
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

import msa_jax
from benchmarks import cases, measure, records
from benchmarks.cases import Case
from msa_jax import ops as ops_lib
from msa_jax.ops import Implementation

OPS = ("select", "prefill", "train", "dense", "dense_train")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """A packed row.

  Attributes:
    lengths: tokens of each span.
    prefix: the first span is the parent of the others.
    alone: tokens, batch rows and number of calls of what it is compared with;
      None: nothing.
  """

  lengths: tuple[int, ...]
  prefix: bool = False
  alone: tuple[int, int, int] | None = None

  @property
  def tokens(self) -> int:
    return sum(self.lengths)

  def segments(self) -> msa_jax.Segments:
    ends = np.cumsum(self.lengths)
    starts = ends - self.lengths
    spans = list(zip(starts.tolist(), ends.tolist(), strict=True))
    parents = [-1] + [0 if self.prefix else -1] * (len(spans) - 1)
    return msa_jax.tree_segments([spans], [parents], length=self.tokens)


def long_tailed(tokens: int, median: int) -> tuple[int, ...]:
  """Lengths of documents that fill a row, log-normal with a sigma of 1.5."""
  rng = np.random.default_rng(0)
  lengths, left = [], tokens
  while left:
    size = int(np.ceil(rng.lognormal(np.log(median), 1.5)))
    lengths.append(min(size, left))
    left -= lengths[-1]
  return tuple(lengths)


K = 1024
ROWS = {
  "plain": Row(lengths=(128 * K,), alone=(128 * K, 1, 1)),
  "8x16k": Row(lengths=(16 * K,) * 8, alone=(16 * K, 8, 1)),
  "64x2k": Row(lengths=(2 * K,) * 64, alone=(2 * K, 64, 1)),
  "long_tailed_128k": Row(lengths=long_tailed(128 * K, 2 * K)),
  "tree_8x4k_on_32k": Row(
    lengths=(32 * K, *(4 * K,) * 8), prefix=True, alone=(36 * K, 1, 8)
  ),
  "tree_16x2k_on_32k": Row(
    lengths=(32 * K, *(2 * K,) * 16), prefix=True, alone=(34 * K, 1, 16)
  ),
}
# Short rows of each kind, on which every op is checked.
CHECKED = {
  "documents": Row(lengths=(1, 127, 128, 129, 900, 515)),
  "tree": Row(lengths=(640, 300, 1, 259), prefix=True),
}


def case_of(tokens: int, batch: int = 1) -> Case:
  return Case(tokens=tokens, batch=batch)


def program(
  op: str, case: Case, implementation: Implementation | None
) -> Callable:
  """(q, k, v, index_q, index_k, dout, segments) -> results."""

  def run(q, k, v, index_q, index_k, dout, segments):
    options: dict[str, Any] = dict(
      block_size=case.block_size,
      segments=segments,
      implementation=implementation,
    )
    select = functools.partial(
      msa_jax.select_blocks, index_q, index_k, top_k=case.top_k
    )
    if op == "select":
      return select(**options)
    if op.startswith("dense"):
      # Without segments the block size says nothing.
      attend = functools.partial(ops_lib.dense_attention, **options)
      if op == "dense":
        return attend(q, k, v)
      _, pull = jax.vjp(lambda *x: attend(*x)[0], q, k, v)
      return pull(dout)
    if op == "prefill":
      return msa_jax.sparse_attention(q, k, v, select(**options), **options)

    def loss(*inputs):
      result = msa_jax.msa_attention(
        *inputs, top_k=case.top_k, with_kl=True, **options
      )
      return result.out, result.kl

    (_, kl), pull = jax.vjp(loss, q, k, v, index_q, index_k)
    return kl, pull((dout, jnp.ones_like(kl)))

  return run


def operands(case: Case) -> tuple[jax.Array, ...]:
  """q, k, v, index_q, index_k and dout."""
  qkv = cases.attention_inputs(jax.random.key(0), case)
  selection = "trained_like" if case.tokens >= 8 * K else "random"
  index = cases.index_inputs(jax.random.key(1), case, selection)
  return *qkv, *index, cases.normal(jax.random.key(2), qkv[0].shape, case.dtype)


def compiled(function: Callable, *arguments: Any) -> Callable:
  return jax.jit(function).lower(*arguments).compile()


def check(op: str, row: Row, implementation: Implementation) -> str | None:
  """Compares a short row with the portable path: what is wrong, or None.

  A choice must have 99.9 % of the other's blocks: of scores that are nearly
  equal, different sums choose different ones.
  """
  case = case_of(row.tokens)
  case = dataclasses.replace(case, top_k=4)
  inputs, segments = operands(case), row.segments()
  got, want = (
    jax.jit(program(op, case, each))(*inputs, segments)
    for each in (implementation, "xla")
  )
  if op == "select":
    shared = jnp.mean((got == want).astype(jnp.float32))
    return None if shared >= 0.999 else f"{shared:.5f} of the ids are the same"
  for i, (x, y) in enumerate(zip(*map(jax.tree.leaves, (got, want)))):
    x, y = (jnp.where(jnp.isfinite(z), z, 0) for z in (x, y))
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    error = jnp.linalg.norm(x - y) / jnp.maximum(jnp.linalg.norm(y), 1e-30)
    # Both are rounded to 8 bits, and differ in a few choices.
    if not error < 0.02:
      return f"result {i} is off by {error:.4f} of its norm"
  return None


class Programs:
  """The compiled programs of a row's ops, made in threads of a pool.

  All of a command are compiled before the first is measured: compiling takes
  the device's time, too.
  """

  def __init__(
    self,
    row: Row,
    ops: Sequence[str],
    implementation: Implementation,
    pool: concurrent.futures.Executor,
  ):
    case, segments = case_of(row.tokens), row.segments()
    inputs = shapes(case)
    self.packed = {
      op: pool.submit(
        compiled, program(op, case, implementation), *inputs, segments
      )
      for op in ops
    }
    self.alone = {}
    if row.alone:
      other = case_of(*row.alone[:2])
      self.alone = {
        op: pool.submit(
          compiled, program(op, other, implementation), *shapes(other), None
        )
        for op in ops
      }

  def wait(self) -> None:
    concurrent.futures.wait([*self.packed.values(), *self.alone.values()])


def shapes(case: Case) -> tuple[jax.ShapeDtypeStruct, ...]:
  """Those of `operands`."""
  of = measure.shapes(case, case.dtype)
  return tuple(of[x] for x in ("q", "k", "v", "index_q", "index_k", "q"))


def measure_row(
  name: str, row: Row, implementation: Implementation, programs: Programs
) -> list[dict[str, Any]]:
  """The records of a row."""
  case, segments = case_of(row.tokens), row.segments()
  inputs = operands(case)
  found = []
  for op, future in programs.packed.items():
    run = future.result()
    seconds, spread = measure.measure(functools.partial(run, *inputs, segments))
    record: dict[str, Any] = dict(
      row=name,
      op=op,
      tokens=row.tokens,
      spans=len(row.lengths),
      implementation=implementation,
      ms=round(seconds * 1e3, 3),
      spread_ms=round((spread or 0) * 1e3, 3),
    )
    if op.startswith("dense"):
      pairs = int(np.sum(np.asarray(segments.positions, np.int64) + 1))
      each = 14 if op == "dense_train" else 4
      flops = each * pairs * case.num_heads * case.head_dim
      record["tflops"] = round(flops / seconds / 1e12, 1)
    if row.alone:
      tokens, batch, count = row.alone
      others = operands(case_of(tokens, batch))
      run = programs.alone[op].result()
      alone, _ = measure.measure(functools.partial(run, *others, None))
      record["alone_ms"] = round(count * alone * 1e3, 3)
      del others
    measure.log(f"  {record}")
    found.append(record)
  return found


NAMES = {
  "plain": "1 document\nof 128K",
  "8x16k": "8 documents\nof 16K",
  "64x2k": "64 documents\nof 2K",
  "long_tailed_128k": "40 documents,\nlong-tailed",
  "tree_8x4k_on_32k": "8 branches of\n4K on 32K",
  "tree_16x2k_on_32k": "16 branches of\n2K on 32K",
}
PANELS = {
  "Forward": ("prefill", "dense"),
  "Training (forward, backward, KL)": ("train", "dense_train"),
}


def plot(content: dict, path: pathlib.Path) -> None:
  """Plots the times of a results file, of packed rows and of the same apart.

  The file is written whole or not at all.
  """
  from matplotlib.figure import Figure

  found = {
    (record["row"], record["op"]): record
    for record in content["rows"]
    if record["implementation"] == "mosaic_gpu"
  }
  figure = Figure(figsize=(13, 5), layout="constrained")
  panels = figure.subplots(1, len(PANELS))
  labels = [], []
  for axes, (title, (sparse, dense)) in zip(panels, PANELS.items()):
    bars = {
      "MSA, packed": (sparse, "ms", "tab:blue"),
      "MSA, each sequence apart": (sparse, "alone_ms", "lightsteelblue"),
      "dense, packed": (dense, "ms", "tab:orange"),
      "dense (cuDNN), each sequence apart": (dense, "alone_ms", "peachpuff"),
    }
    rows = [row for row, op in found if op == sparse]
    for i, (name, (op, field, colour)) in enumerate(bars.items()):
      points = [
        (at + (i - 1.5) * 0.2, found[row, op][field])
        for at, row in enumerate(rows)
        if field in found.get((row, op), {})
      ]
      if points:
        drawn = axes.bar(
          *zip(*points, strict=True), 0.2, color=colour, label=name
        )
        axes.bar_label(drawn, fmt="{:.0f}", fontsize=6.5)
    axes.set_xticks(
      range(len(rows)), [NAMES.get(row, row) for row in rows], fontsize=7
    )
    axes.set_yscale("log")
    axes.set_title(title)
    axes.set_ylabel("milliseconds")
    labels = axes.get_legend_handles_labels()
  figure.legend(*labels, loc="outside lower center", ncols=4, fontsize=9)
  figure.suptitle(f"Rows of many sequences, {content['device']}")
  with records.whole_file(path) as file:
    figure.savefig(file, dpi=150, format=path.suffix[1:])


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    prog="python -m benchmarks.packed",
    description=(__doc__ or "").split("\n\n")[0],
  )
  parser.add_argument("--rows", nargs="+", choices=list(ROWS))
  parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS))
  parser.add_argument(
    "--implementation",
    choices=get_args(Implementation),
    default="mosaic_gpu",
    help="which one to measure (default: mosaic_gpu)",
  )
  parser.add_argument(
    "--results",
    type=pathlib.Path,
    help="JSON file (default: results/<device>_packed.json)",
  )
  parser.add_argument(
    "--lock", type=pathlib.Path, metavar="FILE",
    help="as that of python -m benchmarks; each command has its own --results",
  )  # fmt: skip
  parser.add_argument("--commit", help="commit to record (default: HEAD)")
  parser.add_argument(
    "--plot-only", type=pathlib.Path, metavar="JSON",
    help="draw the plot of a results file and stop",
  )  # fmt: skip
  return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
  args = parse(argv)
  if args.plot_only:
    content = records.read_json(args.plot_only)
    plot(content, args.plot_only.with_suffix(".png"))
    return 0
  records.require_plots()
  if args.implementation == "mosaic_gpu":
    records.require_hopper()
  name = f"{records.device_slug()}_packed.json"
  path = args.results or records.FOLDER / name
  old = records.read_own(path)
  chosen = {name: ROWS[name] for name in args.rows or ROWS}
  with (
    measure.turns(args.lock) as wait_for_turn,
    concurrent.futures.ThreadPoolExecutor(6) as pool,
  ):
    measure.log(f"checking {', '.join(args.ops)}")
    programs = {
      name: Programs(row, args.ops, args.implementation, pool)
      for name, row in chosen.items()
    }
    failed = [
      f"{kind} {op}: {wrong}"
      for kind, row in CHECKED.items()
      for op in args.ops
      if (wrong := check(op, row, args.implementation))
    ]
    if failed:
      pool.shutdown(cancel_futures=True)
      print("\n".join(["check failed, nothing measured:", *failed]))
      return 1
    for each in programs.values():
      each.wait()
    wait_for_turn()
    note = dict(
      date=datetime.datetime.now(datetime.UTC).date().isoformat(),
      commit=args.commit or records.commit_name(),
      jax=jax.__version__,
    )
    rows = old.get("rows", [])
    for name, row in chosen.items():
      measure.log(f"{name}:")
      found = measure_row(name, row, args.implementation, programs[name])
      found = [record | note for record in found]
      rows = records.merge(rows, found, ["row", "op", "implementation"])
      content = dict(device=jax.devices()[0].device_kind, rows=rows)
      records.write_json(path, content)
      plot(content, path.with_suffix(".png"))
  measure.log(f"wrote {path}")
  return 0


if __name__ == "__main__":
  sys.exit(main())
