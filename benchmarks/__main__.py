"""Measures the kernels on a Hopper GPU and writes results/<device>.json.

  python -m benchmarks --tokens 32k 128k --ops prefill select
  python -m benchmarks --heads 32x8x128 16x8x128 --tokens 8k --ops train
  python -m benchmarks --implementation mosaic_gpu xla --tokens 4k 1x4k

Each op is first checked against `msa_jax.reference`; if a check fails, no
number is printed. Shapes run from the longest to the shortest, because the
programs of the shorter ones compile while dense attention keeps the GPU busy.
The file is written after each shape. A new record replaces the one of the same
op, shape, selection, score precision and implementation; all other records
stay, with the JAX version that they were measured under. Two plots show the
speed-up over dense attention, measured in the same run, against length: one of
the paper's heads, and `<device>_heads.png` of all heads.

The other commands of this package are listed in `benchmarks/__init__.py`.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import datetime
import pathlib
import sys
from typing import Any, get_args

import jax

from benchmarks import cases, decode, forward, measure, records, training
from msa_jax.ops import Implementation

GROUPS = (forward, training, decode)
OPS = tuple(op for group in GROUPS for op in group.OPS)
CASES = cases.CASES | cases.BATCHES | cases.DECODE
SELECTIONS = ("random", "trained_like", "fitted")
PRECISIONS = ("exact", "fast", "fp8")


def parse(argv: list[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    prog="python -m benchmarks",
    description=(__doc__ or "").split("\n\n")[0],
  )
  parser.add_argument(
    "--ops",
    nargs="+",
    choices=OPS,
    default=list(OPS),
    help="operations to measure (default: all)",
  )
  parser.add_argument(
    "--tokens",
    nargs="+",
    choices=list(CASES),
    default=list(CASES),
    help="named shapes, see benchmarks/cases.py; of those with a batch"
    " some are for training and some for decode (default: all)",
  )
  parser.add_argument(
    "--heads",
    nargs="+",
    type=heads,
    metavar="HxKxD",
    help="heads to take instead of those of the shapes, such as 32x8x128 for"
    " H = 32, K = 8, D = I = 128; I is 128 at most",
  )
  parser.add_argument(
    "--selection",
    nargs="+",
    choices=SELECTIONS,
    default=["random", "trained_like"],
    help="kind of index queries and keys; fitted reads"
    " results/fitted_selection.json and has only the lengths given there;"
    " decode has random only (default: random trained_like)",
  )
  parser.add_argument(
    "--precision",
    nargs="+",
    choices=PRECISIONS,
    default=list(PRECISIONS),
    help="how index scores are ranked; training ops have exact only, decode has"
    " no fast (default: all)",
  )
  parser.add_argument(
    "--implementation",
    nargs="+",
    choices=get_args(Implementation),
    default=["mosaic_gpu"],
    help="which ones to measure (default: mosaic_gpu)",
  )
  parser.add_argument(
    "--no-dense", action="store_true", help="do not time dense attention"
  )
  parser.add_argument(
    "--results",
    type=pathlib.Path,
    help="JSON file (default: results/<device>.json)",
  )
  parser.add_argument(
    "--lock",
    type=pathlib.Path,
    metavar="FILE",
    help="commands with the same file, started together, compile at the same"
    " time and measure one after another",
  )
  parser.add_argument("--commit", help="commit to record (default: HEAD)")
  parser.add_argument(
    "--plot-only", type=pathlib.Path, metavar="JSON",
    help="draw the plot of a results file and stop",
  )  # fmt: skip
  return parser.parse_args(argv)


def heads(text: str) -> dict[str, int]:
  """The fields of a case that HxKxD names."""
  try:
    num_heads, num_kv_heads, head_dim = map(int, text.split("x"))
  except ValueError:
    raise argparse.ArgumentTypeError(
      f"wanted HxKxD, such as 32x8x128, got {text!r}"
    ) from None
  return cases.heads(num_heads, num_kv_heads, head_dim)


def with_heads(
  name: str, case: cases.Case, chosen: list[dict[str, int]] | None
) -> dict[str, cases.Case]:
  """The case with each of the chosen heads, by name."""
  if not chosen:
    return {name: case}
  return {
    f"{name} {x['num_heads']}x{x['num_kv_heads']}x{x['head_dim']}": (
      dataclasses.replace(case, **x)
    )
    for x in chosen
  }


def check_case(case: cases.Case) -> cases.Case:
  """The case on which the ops of a shape are checked.

  It has more blocks than top_k and a last block that is not full, and is small
  enough for the dense reference. All shapes of the same heads share it.
  """
  return dataclasses.replace(
    case,
    tokens=min(256, case.tokens),
    kv_tokens=33 * case.block_size - 5,
    batch=2,
  )


def choose(
  args: argparse.Namespace, ops: dict[Any, list[str]]
) -> dict[Any, dict[str, cases.Case]]:
  """The shapes to measure, by name, for each group that has any.

  Args:
    args: the arguments of the command.
    ops: for each group, those of `args.ops` that belong to it.

  Raises:
    ValueError: there is nothing to measure, or a length is outside those that
      were fitted for `--selection fitted`.
  """
  chosen = {}
  for group in GROUPS:
    # Looked up in each call, because tests replace the shapes by small ones.
    named = {
      each: case
      for name in args.tokens
      if name in group.CASES
      for each, case in with_heads(name, group.CASES[name], args.heads).items()
      if group.ops_of(case, ops[group], args.selection, args.precision)
    }
    if named:
      chosen[group] = named
  if not chosen:
    asked = {
      name: " ".join(getattr(args, name))
      for name in ("ops", "tokens", "selection", "precision")
    }
    known = [
      f"{op} has --tokens {' '.join(lengths_of(group, op))}{group.RESTRICTED}"
      for group in GROUPS
      for op in ops[group]
    ]
    raise ValueError(
      "nothing to measure for"
      f" {' '.join(f'--{name} {value}' for name, value in asked.items())}:"
      f" {'; '.join(known)}"
    )
  if "fitted" in args.selection:
    for group in (forward, training):
      for case in chosen.get(group, {}).values():
        cases.fitted_sharing(case.kv_tokens)
  return chosen


def lengths_of(group: Any, op: str) -> list[str]:
  """The names of all shapes that a group measures an op on."""
  return [
    name
    for name, case in group.CASES.items()
    if group.ops_of(case, [op], list(SELECTIONS), list(PRECISIONS))
  ]


def draw(content: dict, path: pathlib.Path) -> None:
  """Draws the plots of a results file beside it."""
  records.plot(content, path.with_suffix(".png"))
  records.plot_heads(content, path.with_name(f"{path.stem}_heads.png"))


def main(argv: list[str] | None = None) -> int:
  args = parse(argv)
  if args.plot_only:
    content = records.read_json(args.plot_only)
    draw(content, args.plot_only)
    return 0
  records.require_plots()
  records.require_hopper()
  # Wrong arguments must fail now, not after minutes of measuring.
  ops = {group: [op for op in group.OPS if op in args.ops] for group in GROUPS}
  chosen = choose(args, ops)
  path = args.results or records.FOLDER / f"{records.device_slug()}.json"
  records.read_own(path)
  checked = {
    (group, check_case(case))
    for group, named in chosen.items()
    for case in named.values()
  }
  # Lowering holds the interpreter's lock, so that more threads would only delay
  # the checks.
  with (
    measure.turns(args.lock) as wait_for_turn,
    concurrent.futures.ThreadPoolExecutor(6) as pool,
  ):
    measure.log(f"checking {', '.join(args.ops)}")
    checks = [
      (
        implementation,
        group.start_checks(
          pool, case, ops[group], args.precision, implementation
        ),
      )
      for group, case in checked
      for implementation in args.implementation
    ]
    ordered = sorted(
      (
        (name, case, group, implementation)
        for group, named in chosen.items()
        for name, case in named.items()
        for implementation in args.implementation
      ),
      key=lambda item: -item[1].tokens,
    )
    programs = []
    for _, case, group, implementation in ordered:
      programs.append(measure.Programs(pool))
      group.add_programs(
        programs[-1],
        case,
        ops[group],
        args.selection,
        args.precision,
        not args.no_dense,
        implementation,
      )
    failed = [
      f"{name}: {check.exception() or check.result()} ({implementation})"
      for implementation, of_group in checks
      for name, check in of_group.items()
      if check.exception() or check.result()
    ]
    if failed:
      pool.shutdown(cancel_futures=True)
      print("\n".join(["check failed, nothing measured:", *failed]))
      return 1
    if args.lock:
      for compiling in programs:
        compiling.wait()
    wait_for_turn()
    rates = measure.ceilings()
    measure.log(f"ceilings {rates}")
    note = dict(
      date=datetime.datetime.now(datetime.UTC).date().isoformat(),
      commit=args.commit or records.commit_name(),
    )
    content = {}
    for (name, case, group, implementation), compiled in zip(
      ordered, programs, strict=True
    ):
      measure.log(f"{name}, {implementation}: {', '.join(ops[group])}")
      found, recalls = group.records(
        case,
        compiled,
        ops[group],
        args.selection,
        args.precision,
        implementation,
      )
      found = [record | rates | note for record in found]
      for record in found:
        if "index_tbs" in record:
          record["copy_fraction"] = round(
            record["index_tbs"] / record["copy_tbs"], 3
          )
      content = records.store(path, found, recalls)
  draw(content, path)
  measure.log(f"wrote {path} on {jax.devices()[0].device_kind}")
  return 0


if __name__ == "__main__":
  sys.exit(main())
