"""Command line: train one run, compare sides, write a report, sample.

python -m train compare demo
python -m train train demo --task text --side msa --seed 0
python -m train report runs/demo
python -m train sample runs/demo/text/msa/seed0 --prompt "import "
python -m train compare evidence --plan 13 --minutes 8
python -m train speed evidence
python -m train devices evidence

All but `train` run without tyro.
"""

import argparse
import dataclasses
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from msa_jax import ops
from train import checkpoint
from train import config as config_lib

# Exit status of a command that --minutes stopped.
STOPPED = 3


def _parser() -> argparse.ArgumentParser:
  names = ", ".join(config_lib.presets())
  parser = argparse.ArgumentParser(
    prog="python -m train",
    description="Train GQA and MSA language models and compare them.",
  )
  commands = parser.add_subparsers(dest="command", required=True)

  def command(name: str, text: str, **kwargs) -> argparse.ArgumentParser:
    return commands.add_parser(name, help=text, description=text, **kwargs)

  train = command(
    "train",
    "Train one run; a run that was stopped goes on where it was.",
    add_help=False,
    epilog="Every field of the run is an option too: name a run and add"
    " --help to see them all, with the run's values.",
  )
  compare = command(
    "compare",
    "Train every side of a comparison, then write its report. Finished runs"
    " are kept, stopped ones go on.",
  )
  plan = command(
    "plan",
    "Time the steps of a comparison here, and write the comparison.json that"
    " fits a number of minutes: for compare --config.",
  )
  speed = command(
    "speed",
    "Time a training step of each side at several lengths: speed.json, which"
    " the report draws.",
  )
  devices = command(
    "devices",
    "Compare losses, speed and generation of each side on one device and on"
    " all that are here, by data, fsdp and tensor axes.",
  )
  for sub in (train, compare, plan, speed, devices):
    sub.add_argument(
      "preset", nargs="?", help=f"a file of train/configs: {names}"
    )
    sub.add_argument(
      "--config",
      type=pathlib.Path,
      help="instead of a preset: a saved config.json (train) or"
      " comparison.json (compare)",
    )
  for sub in (train, compare):
    sub.add_argument(
      "--distributed",
      nargs="*",
      metavar=("ADDRESS:PORT COUNT", "ID"),
      help="several processes: without values as the cluster says (Slurm, Open"
      " MPI, TPU), else the coordinator's address, the number of processes and"
      " this one's number",
    )
  train.add_argument("--task", help="of a preset: which task, such as text")
  train.add_argument("--side", help="of a preset: which side, such as msa")
  train.add_argument("--seed", type=int, help="seed of the run")
  train.add_argument("--help", "-h", action="store_true", help="this text")
  for sub in (compare, plan, speed):
    sub.add_argument(
      "--out",
      type=pathlib.Path,
      help="folder of the comparison (default: runs/NAME)",
    )
  for sub in (compare, plan, speed, devices):
    sub.add_argument(
      "--set",
      nargs="+",
      default=[],
      metavar="FIELD=VALUE",
      help="fields of every run, such as model.implementation=xla; the runs'"
      " config.json holds them",
    )
  compare.add_argument(
    "--unit",
    type=int,
    help="steps of the smallest part of a run: makes all longer or shorter,"
    " every step count in proportion",
  )
  for sub in (compare, devices):
    sub.add_argument("--sides", nargs="+", help="only these (default: all)")
  compare.add_argument(
    "--minutes",
    type=float,
    help="stop after this time with a checkpoint, to be called again",
  )
  compare.add_argument(
    "--plan",
    type=float,
    metavar="MINUTES",
    help="first do what plan does, and go on with what it compiled",
  )
  compare.add_argument(
    "--no-report",
    action="store_true",
    help="train only; the report needs matplotlib",
  )
  plan.add_argument(
    "--minutes", type=float, required=True, help="of all runs and seeds"
  )
  speed.add_argument(
    "--lengths",
    type=int,
    nargs="+",
    default=(1 << 12, 1 << 14, 1 << 16),
    help="contexts (default: 4096 16384 65536)",
  )
  devices.add_argument(
    "--steps",
    type=int,
    default=50,
    help="training steps whose losses are compared (default: 50)",
  )
  devices.add_argument(
    "--results",
    type=pathlib.Path,
    help="folder of the results file (default: train/results/devices)",
  )
  compare.add_argument(
    "--mesh",
    type=int,
    nargs=3,
    metavar=("DATA", "FSDP", "TENSOR"),
    help="devices of every run (default: the preset's; DATA -1: all)",
  )
  compare.add_argument(
    "--seeds", type=int, nargs="+", help="seeds (default: the preset's)"
  )
  report = command("report", "Write the report of a comparison's folder.")
  report.add_argument("folder", type=pathlib.Path)
  sample = command(
    "sample", "Continue prompts with the model of a run folder's checkpoint."
  )
  add = sample.add_argument
  add("folder", type=pathlib.Path, help="the run's folder")
  add("--prompt", nargs="+", default=[], help="texts, each a row")
  add("--tokens", nargs="+", type=int, default=[], help="ids of one row")
  add("--step", type=int, help="of the checkpoint (default: the latest)")
  add(
    "--implementation",
    choices=("auto", *get_args(ops.Implementation)),
    help="of attention (default: the run's own, which may want its device;"
    " auto: any device)",
  )
  add("--max_new_tokens", type=int, help="default: 256, or up to the context")
  add("--temperature", type=float, default=0.8, help="0: greedy (default 0.8)")
  add("--top_k", type=int, help="draw from so many of the likeliest tokens")
  add("--top_p", type=float, help="draw from so much of the probability")
  add("--seed", type=int, default=0, help="of the draws")
  parser.set_defaults(train_parser=train)
  return parser


def _need_one_source(args: argparse.Namespace) -> None:
  if (args.preset is None) == (args.config is None):
    raise ValueError(
      f"{args.command}: wanted a preset ({', '.join(config_lib.presets())}) or"
      " --config FILE."
    )


def _pick_run(args: argparse.Namespace) -> config_lib.RunConfig:
  """The run that the arguments name."""
  _need_one_source(args)
  if args.config is not None:
    run = config_lib.load(config_lib.RunConfig, args.config)
    if args.task not in (None, run.task) or args.side not in (None, run.side):
      raise ValueError(
        f"--task and --side pick a run of a preset; {args.config} is"
        f" {run.task}/{run.side}."
      )
    if args.seed is not None:
      run = dataclasses.replace(run, seed=args.seed)
    return run
  comparison = config_lib.preset(args.preset)
  if args.seed is not None:
    comparison = dataclasses.replace(comparison, seeds=(args.seed,))
  for run in comparison.resolve(_default_folder(comparison)):
    if run.task == args.task and run.side == args.side:
      return run
  there = [f"--task {r.task} --side {r.side}" for r in comparison.runs]
  raise ValueError(
    f"--task {args.task} --side {args.side}: preset {args.preset!r} has\n  "
    + "\n  ".join(there)
  )


def _default_folder(comparison: config_lib.ComparisonConfig) -> pathlib.Path:
  return pathlib.Path("runs") / comparison.name


def _train(args: argparse.Namespace, overrides: Sequence[str]) -> None:
  import tyro

  run = tyro.cli(
    config_lib.RunConfig,
    default=_pick_run(args),
    args=list(overrides) + (["--help"] if args.help else []),
    prog="python -m train train",
    description="Train one run. The options change its fields.",
    config=(tyro.conf.AvoidSubcommands,),
  )
  _start_devices(args)
  from train import loop

  loop.run(run)


def _sample(args: argparse.Namespace) -> None:
  try:
    _print_sample(args)
  except NotImplementedError as error:
    if args.implementation is not None:
      raise
    raise NotImplementedError(
      f"{error}; {args.folder} names its implementations, --implementation=auto"
      " takes what runs here"
    ) from error


def _print_sample(args: argparse.Namespace) -> None:
  from msa_jax import generate
  from train import sample

  parts = sample.run(
    args.folder,
    prompts=args.prompt,
    tokens=args.tokens,
    step=args.step,
    implementation=args.implementation,
    max_new_tokens=args.max_new_tokens,
    sampling=generate.Sampling(
      temperature=args.temperature, top_k=args.top_k, top_p=args.top_p
    ),
    seed=args.seed,
  )
  if len(args.prompt) > 1:
    # Rows grow together: each is printed when all have ended.
    for prompt, row in zip(args.prompt, zip(*parts)):
      print(f"--- {prompt!r}\n{prompt}{''.join(row)}")
    return
  print("".join(args.prompt), end="", flush=True)
  for (text,) in parts:
    print(text, end="", flush=True)
  print()


def _start_devices(args: argparse.Namespace) -> None:
  if args.distributed is None:
    return
  import jax

  values = args.distributed
  if len(values) not in (0, 3):
    raise ValueError(
      f"--distributed {' '.join(values)}: wanted no values, or three:"
      " ADDRESS:PORT COUNT ID."
    )
  if values:
    jax.distributed.initialize(values[0], int(values[1]), int(values[2]))
  else:
    jax.distributed.initialize()


def _comparison(args: argparse.Namespace) -> config_lib.ComparisonConfig:
  """The comparison that the arguments name, with --set."""
  _need_one_source(args)
  if args.config is None:
    comparison = config_lib.preset(args.preset)
  else:
    comparison = config_lib.load(config_lib.ComparisonConfig, args.config)
  return config_lib.with_fields(comparison, args.set)


def _compare(args: argparse.Namespace) -> int:
  stop_at = None
  for name in ("minutes", "plan"):
    if getattr(args, name) is not None and args.distributed is not None:
      raise ValueError(f"--{name}: wanted one process, not --distributed.")
  if args.minutes is not None:
    stop_at = time.monotonic() + 60 * args.minutes
  comparison = _comparison(args)
  if args.unit is not None:
    comparison = config_lib.with_step_unit(comparison, args.unit)
  if args.seeds is not None:
    comparison = dataclasses.replace(comparison, seeds=tuple(args.seeds))
  if args.mesh is not None:
    mesh = config_lib.MeshConfig(
      **dict(zip(("data", "fsdp", "tensor"), args.mesh, strict=True))
    )
    sides = tuple(dataclasses.replace(r, mesh=mesh) for r in comparison.runs)
    comparison = dataclasses.replace(comparison, runs=sides)
  _start_devices(args)
  folder = args.out or _default_folder(comparison)
  ready = None
  if args.plan is not None:
    from train import speed

    comparison, ready = speed.plan(comparison, folder, args.plan)
  path = compare(
    comparison,
    folder,
    sides=args.sides,
    stop_at=stop_at,
    with_report=not args.no_report,
    ready=ready,
  )
  if path is None:
    how = "the same command goes on"
    if args.plan is not None:
      how = (
        f"it goes on with --config {folder / 'comparison.json'} in the place of"
        " the preset and --plan"
      )
    print(f"{folder}: not finished yet; {how}.")
    return STOPPED
  print(path)
  return 0


def compare(
  comparison: config_lib.ComparisonConfig,
  folder: pathlib.Path,
  *,
  sides: Sequence[str] | None = None,
  stop_at: float | None = None,
  with_report: bool = True,
  ready: Mapping[str, Any] | None = None,
) -> pathlib.Path | None:
  """Trains every run of a comparison and writes its report.

  Args:
    comparison: the plan, all of it.
    folder: where everything is written.
    sides: the only ones to train now; None: all.
    stop_at: as in `loop.run`.
    with_report: False: train only.
    ready: what `speed.plan` made ready.

  Returns:
    The path of the report (or of the folder); None if stop_at came first.

  Raises:
    ValueError: sides of a task differ in more than attention, or a run cannot
      start; nothing is trained then.
  """
  import jax

  from train import data, loop, program
  from train.report import runs

  resolved = list(comparison.resolve(folder))
  unknown = set(sides or ()) - {run.side for run in resolved}
  if unknown:
    there = dict.fromkeys(run.side for run in resolved)
    raise ValueError(
      f"sides={sorted(unknown)}: the comparison has {', '.join(there)}."
    )
  for task in comparison.tasks():
    members = [r for r in resolved if r.task == task]
    runs.check_comparable(
      [
        config_lib.to_dict(dataclasses.replace(r, seed=0, folder=""))
        for r in members
      ],
      [f"{r.task}/{r.side}" for r in members],
    )

  def finished(run: config_lib.RunConfig) -> bool:
    return (pathlib.Path(run.folder) / "done.json").exists()

  def late() -> bool:
    return stop_at is not None and time.monotonic() > stop_at

  planned = {run.folder for run in resolved}
  for run in resolved:
    start = run.recipe.init_from
    if (
      start
      and start not in planned
      and not checkpoint.read_config(pathlib.Path(start))
    ):
      raise ValueError(
        f"{run.task}/{run.side}: recipe.init_from={start!r} is neither a side"
        " of the task nor a run folder."
      )
  folder.mkdir(parents=True, exist_ok=True)
  if jax.process_index() == 0:
    checkpoint.write_json(
      folder / "comparison.json", config_lib.to_dict(comparison)
    )
  failed, advanced = [], False
  for task in comparison.tasks():
    wanted = [run for run in resolved if sides is None or run.side in sides]
    wanted = [run for run in wanted if run.task == task]
    # A call does something, however late it is, and then nothing more.
    if not wanted:
      continue
    if advanced and late():
      return None
    waiting = [run for run in wanted if not finished(run)]
    if ready and task in ready:
      source, programs = ready[task]
    elif waiting:
      source, programs = program.make_ready(waiting)
    else:
      source, programs = data.load(wanted[0].data), {}
    for run in wanted:
      if advanced and late():
        return None
      advanced |= not finished(run)
      made = programs.get(program.decides(run))
      try:
        if loop.run(run, source, made, stop_at) is None:
          return None
      except loop.NonFiniteError as error:
        # The other sides go on: a side that breaks down is a result too.
        print(f"error: {run.folder}: {error}", file=sys.stderr)
        failed.append(f"{run.folder}: {error}")
    del programs
    jax.clear_caches()
  path = folder
  if with_report and jax.process_index() == 0:
    from train.report import page as report

    path = report.write(folder)
  if failed:
    raise FloatingPointError(f"{path} lacks\n" + "\n".join(failed))
  return path


def main(arguments: Sequence[str] | None = None) -> int:
  parser = _parser()
  args, rest = parser.parse_known_args(arguments)
  if rest and args.command != "train":
    parser.error(f"unknown arguments: {' '.join(rest)}")
  try:
    if args.command == "train":
      if args.help and args.preset is None and args.config is None:
        args.train_parser.print_help()
        return 0
      _train(args, rest)
    elif args.command == "compare":
      return _compare(args)
    elif args.command == "sample":
      _sample(args)
    elif args.command == "devices":
      from train import devices

      path = devices.devices(
        _comparison(args),
        args.steps,
        sides=args.sides,
        results=args.results or devices.RESULTS,
      )
      print(path)
    elif args.command in ("plan", "speed"):
      from train import speed

      comparison = _comparison(args)
      folder = args.out or _default_folder(comparison)
      if args.command == "plan":
        speed.plan(comparison, folder, args.minutes)
        print(folder / "comparison.json")
      else:
        print(speed.speed(comparison, folder, args.lengths))
    else:
      from train.report import page as report

      print(report.write(args.folder))
  except (
    ValueError,
    NotImplementedError,
    FloatingPointError,
    OSError,
  ) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  except ModuleNotFoundError as error:
    print(
      f"error: {error}. Training needs: pip install 'msa-jax[train]'",
      file=sys.stderr,
    )
    return 1
  return 0


if __name__ == "__main__":
  sys.exit(main())
