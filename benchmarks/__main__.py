"""Measures the kernels on a Hopper GPU and writes results/<device>.json.

  python -m benchmarks --tokens 32k 128k --ops prefill select

Each op is first checked against `msa_jax.reference`; on a failed check no
number is printed. Shapes run from the longest to the shortest: programs of the
shorter ones compile while dense attention keeps the GPU busy, and every shape
is stored when it is done. A row replaces the one of the same op, shape,
selection and score precision; all other rows stay, with the JAX that they were
measured under. The plot shows speed-up over dense attention, measured in the
same run, against length.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import datetime
import pathlib
import sys
from typing import Any

import jax

from benchmarks import cases, decode, forward, measure, results, training
from pallas_kernels import mosaic

GROUPS = (forward, training, decode)
OPS = tuple(op for group in GROUPS for op in group.OPS)
CASES = cases.CASES | cases.BATCHES | cases.DECODE
SELECTIONS = ("random", "trained_like", "fitted")
PRECISIONS = ("exact", "fast", "fp8")


def parse(argv: list[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    prog="python -m benchmarks",
    description=(__doc__ or "").split("\n\n")[0],
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
  )
  parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS))
  parser.add_argument(
    "--tokens",
    nargs="+",
    choices=list(CASES),
    default=list(CASES),
    help="named shapes, see benchmarks/cases.py; of those with a batch"
    " some are of training, some of decode",
  )
  parser.add_argument(
    "--selection",
    nargs="+",
    choices=SELECTIONS,
    default=["random", "trained_like"],
    help="fitted wants results/fitted_selection.json, which knows the lengths"
    " that were fitted; decode knows random only",
  )
  parser.add_argument(
    "--precision",
    nargs="+",
    choices=PRECISIONS,
    default=list(PRECISIONS),
    help="of the index scores; training ops know exact only, decode no fast",
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


def check_case(case: cases.Case) -> cases.Case:
  """What a shape's ops are checked on, the same for all of its head shape.

  More blocks than top_k, ragged, and small enough for the dense reference.
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
  """The shapes that were asked for, by name, of each group that has any.

  Args:
    args: the command's.
    ops: each group's of `args.ops`.

  Raises:
    ValueError: that is nothing, or `fitted` does not know one of the lengths.
  """
  chosen = {}
  for group in GROUPS:
    # Read now: a test puts smaller ones in their places.
    named = {
      name: case
      for name in args.tokens
      if (case := group.CASES.get(name))
      and group.ops_of(case, ops[group], args.selection, args.precision)
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
  return [
    name
    for name, case in group.CASES.items()
    if group.ops_of(case, [op], list(SELECTIONS), list(PRECISIONS))
  ]


def main(argv: list[str] | None = None) -> int:
  args = parse(argv)
  if args.plot_only:
    content = results.read_json(args.plot_only)
    results.plot(content, args.plot_only.with_suffix(".png"))
    return 0
  mosaic.require_hopper()
  # What is refused is refused now, not after minutes.
  ops = {group: [op for op in group.OPS if op in args.ops] for group in GROUPS}
  chosen = choose(args, ops)
  path = args.results or results.FOLDER / f"{results.device_slug()}.json"
  results.read_own(path)
  checked = {
    (group, check_case(case))
    for group, named in chosen.items()
    for case in named.values()
  }
  # Lowering holds Python's lock: more threads would only delay the checks.
  with concurrent.futures.ThreadPoolExecutor(6) as pool:
    measure.log(f"checking {', '.join(args.ops)}")
    checks = [
      group.start_checks(pool, case, ops[group], args.precision)
      for group, case in checked
    ]
    ordered = sorted(
      (
        (name, case, group)
        for group, named in chosen.items()
        for name, case in named.items()
      ),
      key=lambda item: -item[1].tokens,
    )
    programs = {}
    for name, case, group in ordered:
      programs[name, group] = measure.Programs(pool)
      group.add_programs(
        programs[name, group],
        case,
        ops[group],
        args.selection,
        args.precision,
        not args.no_dense,
      )
    failed = [
      f"{name}: {check.exception() or check.result()}"
      for of_group in checks
      for name, check in of_group.items()
      if check.exception() or check.result()
    ]
    if failed:
      pool.shutdown(cancel_futures=True)
      print("\n".join(["check failed, nothing measured:", *failed]))
      return 1
    rates = measure.ceilings()
    measure.log(f"ceilings {rates}")
    note = dict(
      date=datetime.datetime.now(datetime.UTC).date().isoformat(),
      commit=args.commit or results.commit_name(),
    )
    content = {}
    for name, case, group in ordered:
      measure.log(f"{name}: {', '.join(ops[group])}")
      rows, recalls = group.rows(
        case,
        programs[name, group],
        ops[group],
        args.selection,
        args.precision,
      )
      rows = [row | rates | note for row in rows]
      for row in rows:
        if "index_tbs" in row:
          row["copy_fraction"] = round(row["index_tbs"] / row["copy_tbs"], 3)
      content = results.store(path, rows, recalls)
  results.plot(content, path.with_suffix(".png"))
  measure.log(f"wrote {path} on {jax.devices()[0].device_kind}")
  return 0


if __name__ == "__main__":
  sys.exit(main())
