"""Command line: train one run, compare sides, write a report, sample.

python -m train compare demo
python -m train compare demo --task text --text MY_TEXTS --folder runs/mine
python -m train train demo --task text --side msa --seed 0
python -m train report runs/demo
python -m train sample runs/demo/text/msa/seed0 --prompt "import "
python -m train export runs/demo/text/msa/seed0 exported
python -m train compare lm73m_16k --plan 13 --minutes 8
python -m train speed lm73m_16k
python -m train devices lm73m_16k

All commands but `train` run without tyro.
"""

import argparse
import dataclasses
import itertools
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, get_args

from msa_jax import ops
from train import config as config_lib
from train import configs

# Exit status of a command that --minutes stopped.
STOPPED = 3
# Exit status of a command that Ctrl-C stopped, as shells have it.
INTERRUPTED = 130


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m train",
    description="Train GQA and MSA language models and compare them.",
  )
  commands = parser.add_subparsers(dest="command", required=True)

  def add(
    name: str, run: Callable[..., int | None], text: str, **kwargs: Any
  ) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text, **kwargs)
    command.set_defaults(run=run)
    return command

  train = add(
    "train",
    _train,
    "Train one run. A run that was stopped continues from its last checkpoint.",
    add_help=False,
    epilog="Every field of the run is an option too: name a run and add"
    " --help to see all of them with the run's values.",
  )
  train.set_defaults(print_help=train.print_help)
  _add_train_options(train)
  _add_compare_options(
    add(
      "compare",
      _compare,
      "Train every side of a comparison, then write its report. Finished runs"
      " are kept, and stopped ones continue.",
    )
  )
  _add_plan_options(
    add(
      "plan",
      _plan,
      "Time the steps of a comparison on this device, and write a"
      " comparison.json that fits a number of minutes, for compare --config.",
    )
  )
  _add_speed_options(
    add(
      "speed",
      _speed,
      "Time a training step of each side at several context lengths, and write"
      " speed.json, which the report draws.",
    )
  )
  _add_devices_options(
    add(
      "devices",
      _devices,
      "Compare losses, speed and generation of each side on one device and on"
      " all devices of this host, split by data, fsdp and tensor axes.",
    )
  )
  report = add(
    "report",
    _report,
    "Write the report of a comparison's folder, or of several that hold"
    " different seeds of it.",
  )
  report.add_argument("folder", type=pathlib.Path, nargs="+")
  report.add_argument(
    "--out",
    type=pathlib.Path,
    help="folder to write report/ to (default: the one folder)",
  )
  _add_sample_options(
    add(
      "sample",
      _sample,
      "Continue prompts with the model of a run folder's checkpoint.",
    )
  )
  export = add(
    "export",
    _export,
    "Write the model of a run folder's checkpoint, with its tokenizer, as a"
    " folder that msa_jax.checkpoints loads, and transformers where it has such"
    " a model.",
  )
  export.add_argument("folder", type=pathlib.Path, help="the run's folder")
  export.add_argument("out", type=pathlib.Path, help="folder to write")
  export.add_argument(
    "--step", type=int, help="step of the checkpoint (default: the latest)"
  )
  return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    "preset",
    nargs="?",
    help=f"a file of train/configs: {', '.join(configs.names())}",
  )
  parser.add_argument(
    "--config",
    type=pathlib.Path,
    help="instead of a preset: a saved config.json (train) or comparison.json"
    " (other commands)",
  )


def _add_set(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    "--set",
    nargs="+",
    default=[],
    metavar="FIELD=VALUE",
    help="set fields of every run, such as model.implementation=xla",
  )


def _add_comparison(parser: argparse.ArgumentParser) -> None:
  """What to compare: a preset or a file, and what is changed in it."""
  _add_config(parser)
  _add_set(parser)
  parser.add_argument("--task", help="only this task, such as text")
  parser.add_argument(
    "--text",
    metavar="PATH",
    help="your own text, for the tasks that read text: a text, json, jsonl or"
    " parquet file, or a folder of them",
  )
  parser.add_argument(
    "--tokenizer",
    metavar="PATH",
    help="your own tokenizer.json, for the tasks that read text",
  )
  parser.add_argument(
    "--pretrained",
    metavar="FOLDER",
    help="for comparisons that start from a trained model: another checkpoint"
    " folder, GGUF file or package that holds one",
  )
  parser.add_argument(
    "--end-of-text",
    metavar="TOKEN",
    help="the token of --tokenizer that ends each document, if it has none of"
    " the usual names",
  )


def _add_folder(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    "--folder",
    type=pathlib.Path,
    help="folder of the comparison (default: runs/NAME)",
  )


def _add_sides(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    "--sides", nargs="+", help="only these sides (default: all)"
  )


def _add_distributed(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    "--distributed",
    nargs="*",
    metavar=("ADDRESS:PORT COUNT", "ID"),
    help="run as one of several processes: without values, the others are"
    " found from the cluster (Slurm, Open MPI, TPU); else give the"
    " coordinator's address, the number of processes and this process's id",
  )


def _add_train_options(parser: argparse.ArgumentParser) -> None:
  _add_config(parser)
  _add_distributed(parser)
  add = parser.add_argument
  add("--task", help="which task of the preset, such as text")
  add("--side", help="which side of the preset, such as msa")
  add("--seed", type=int, help="seed of the run")
  add("--help", "-h", action="store_true", help="show this text")


def _add_compare_options(parser: argparse.ArgumentParser) -> None:
  _add_comparison(parser)
  _add_distributed(parser)
  _add_folder(parser)
  _add_sides(parser)
  add = parser.add_argument
  add(
    "--unit",
    type=int,
    help="scales every step count of every run so that their greatest common"
    " divisor is this",
  )
  add(
    "--minutes",
    type=float,
    help="stop with a checkpoint after this time, and one step or more; call"
    " again to continue",
  )
  add(
    "--plan",
    type=float,
    metavar="MINUTES",
    help="first do what the command plan does, then train with the programs it"
    " compiled",
  )
  add(
    "--no-report",
    action="store_true",
    help="train only; the report needs matplotlib",
  )
  add(
    "--mesh",
    type=int,
    nargs=3,
    metavar=("DATA", "FSDP", "TENSOR"),
    help="devices of every run (default: the preset's; DATA -1: all)",
  )
  add("--seeds", type=int, nargs="+", help="seeds (default: the preset's)")


def _add_plan_options(parser: argparse.ArgumentParser) -> None:
  _add_comparison(parser)
  _add_folder(parser)
  parser.add_argument(
    "--minutes",
    type=float,
    required=True,
    help="time for all runs and seeds together",
  )


def _add_speed_options(parser: argparse.ArgumentParser) -> None:
  _add_comparison(parser)
  _add_folder(parser)
  parser.add_argument(
    "--lengths",
    type=int,
    nargs="+",
    default=(1 << 12, 1 << 14, 1 << 16),
    help="context lengths (default: 4096 16384 65536)",
  )
  parser.add_argument(
    "--random-tokens",
    action="store_true",
    help="time on random tokens: the run's text is neither read nor tokenized",
  )


def _add_devices_options(parser: argparse.ArgumentParser) -> None:
  _add_comparison(parser)
  _add_sides(parser)
  parser.add_argument(
    "--meshes",
    nargs="+",
    help="compare only these with one device (default: data, fsdp, context and"
    " tensor)",
  )
  parser.add_argument(
    "--steps",
    type=int,
    default=50,
    help="training steps whose losses are compared (default: 50)",
  )
  parser.add_argument(
    "--results",
    type=pathlib.Path,
    help="folder of the results file (default: train/results/devices)",
  )


def _add_sample_options(parser: argparse.ArgumentParser) -> None:
  add = parser.add_argument
  add("folder", type=pathlib.Path, help="the run's folder")
  add("--prompt", nargs="+", default=[], help="texts to continue side by side")
  add(
    "--tokens",
    nargs="+",
    type=int,
    default=[],
    help="instead of texts: the token ids of one prompt",
  )
  add("--step", type=int, help="step of the checkpoint (default: the latest)")
  add(
    "--implementation",
    choices=("auto", *get_args(ops.Implementation)),
    help="of attention (default: the run's own, which may need another device;"
    " auto: one that works on this device)",
  )
  add(
    "--max_new_tokens",
    type=int,
    help="default: 256, or fewer where the context ends",
  )
  add("--temperature", type=float, default=0.8, help="0: greedy (default 0.8)")
  add("--top_k", type=int, help="sample among this many likeliest tokens")
  add("--top_p", type=float, help="sample within this share of probability")
  add("--seed", type=int, default=0, help="seed of the samples")


# ---------------------------------------------------------- what to work on


def _need_one_source(args: argparse.Namespace) -> None:
  if (args.preset is None) == (args.config is None):
    raise ValueError(
      f"{args.command}: wanted a preset ({', '.join(configs.names())}) or"
      " --config FILE."
    )


def _pick_run(args: argparse.Namespace) -> config_lib.RunConfig:
  """The run that the arguments of `train` name."""
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
  comparison = _resolved(configs.preset(args.preset))
  if args.seed is not None:
    comparison = dataclasses.replace(comparison, seeds=(args.seed,))
  for run in comparison.resolve(_default_folder(comparison)):
    if run.task == args.task and run.side == args.side:
      return run
  there = [f"--task {r.task} --side {r.side}" for r in comparison.runs]
  got = f"--task {args.task} --side {args.side}"
  if args.task is None or args.side is None:
    got = "train: wanted --task and --side"
  raise ValueError(
    f"{got}: preset {args.preset!r} has\n  " + "\n  ".join(there)
  )


def _default_folder(comparison: config_lib.ComparisonConfig) -> pathlib.Path:
  return pathlib.Path("runs") / comparison.name


def _comparison(args: argparse.Namespace) -> config_lib.ComparisonConfig:
  """The comparison that the arguments name, with --task, --text,
  --tokenizer, --pretrained and --set."""
  _need_one_source(args)
  if args.config is None:
    comparison = configs.preset(args.preset)
  else:
    comparison = config_lib.load(config_lib.ComparisonConfig, args.config)
  if args.task is not None:
    comparison = config_lib.only_task(comparison, args.task)
  if args.text is not None:
    comparison = config_lib.with_text(comparison, args.text)
  if args.end_of_text is not None and args.tokenizer is None:
    raise ValueError("--end-of-text: wanted --tokenizer with it.")
  if args.tokenizer is not None:
    comparison = config_lib.with_tokenizer(
      comparison, args.tokenizer, args.end_of_text
    )
  if args.pretrained is not None:
    from train import pretrained

    comparison = pretrained.with_pretrained(comparison, args.pretrained)
  return _resolved(config_lib.with_fields(comparison, args.set))


def _resolved(
  comparison: config_lib.ComparisonConfig,
) -> config_lib.ComparisonConfig:
  """The comparison with the folders of trained models that runs start from."""
  if all(run.recipe.pretrained is None for run in comparison.runs):
    return comparison
  from train import pretrained  # imports JAX, for which --help should not wait

  return pretrained.resolve(comparison)


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


# ---------------------------------------------------------------- commands


def _train(args: argparse.Namespace, overrides: Sequence[str]) -> None:
  if args.help and args.preset is None and args.config is None:
    args.print_help()
    return
  import tyro

  run = tyro.cli(
    config_lib.RunConfig,
    default=_pick_run(args),
    args=list(overrides) + (["--help"] if args.help else []),
    prog="python -m train train",
    description="Train one run. The options set its fields.",
    config=(tyro.conf.AvoidSubcommands,),
  )
  _start_devices(args)
  from train import loop

  loop.run(run)


def _with_options(
  comparison: config_lib.ComparisonConfig, args: argparse.Namespace
) -> config_lib.ComparisonConfig:
  """The comparison with --unit, --seeds and --mesh."""
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
  return comparison


def _compare(args: argparse.Namespace) -> int:
  stop_at = None
  for name in ("minutes", "plan"):
    minutes = getattr(args, name)
    if minutes is None:
      continue
    _check_minutes(name, minutes)
    if args.distributed is not None:
      raise ValueError(f"--{name}: wanted one process, not --distributed.")
  if args.minutes is not None:
    stop_at = time.monotonic() + 60 * args.minutes
  comparison = _with_options(_comparison(args), args)
  _start_devices(args)
  from train import report
  from train.compare import compare

  if not args.no_report:
    # Before --plan, which takes minutes.
    report.check_packages()
  folder = args.folder or _default_folder(comparison)
  compiled = None
  if args.plan is not None:
    from train import plan

    comparison, compiled = plan.plan(comparison, folder, args.plan, args.sides)
  path = compare(
    comparison,
    folder,
    sides=args.sides,
    stop_at=stop_at,
    with_report=not args.no_report,
    compiled=compiled,
  )
  if path is not None:
    print(f"finished, {'report' if not args.no_report else 'folder'}: {path}")
    return 0
  how = "the same command continues it"
  if args.plan is not None:
    how = (
      f"continue with --config {folder / 'comparison.json'} instead of the"
      " preset and --plan"
    )
  print(f"{folder}: not finished yet; {how}.")
  return STOPPED


def _check_minutes(name: str, minutes: float) -> None:
  """Refuses a time in which nothing can be done, before anything is."""
  if not minutes > 0:  # nor NaN
    raise ValueError(f"--{name}: wanted a number above 0, got {minutes:g}.")


def _plan(args: argparse.Namespace) -> None:
  from train import plan

  _check_minutes("minutes", args.minutes)
  comparison = _comparison(args)
  folder = args.folder or _default_folder(comparison)
  plan.plan(comparison, folder, args.minutes)
  print(folder / "comparison.json")


def _speed(args: argparse.Namespace) -> None:
  from train import speed

  comparison = _comparison(args)
  folder = args.folder or _default_folder(comparison)
  path = speed.speed(
    comparison, folder, args.lengths, random_tokens=args.random_tokens
  )
  print(path)


def _devices(args: argparse.Namespace) -> None:
  from train import devices

  path = devices.devices(
    _comparison(args),
    args.steps,
    sides=args.sides,
    meshes=args.meshes,
    results=args.results or devices.RESULTS,
  )
  print(path)


def _report(args: argparse.Namespace) -> None:
  from train import report

  print(f"report: {report.write(*args.folder, out=args.out)}")


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
    # All texts grow at the same time, so they are printed once all have ended.
    for prompt, new in zip(args.prompt, zip(*parts)):
      print(f"--- {prompt!r}\n{prompt}{''.join(new)}")
    return
  first = next(parts)  # a wrong argument is an error before the prompt is shown
  print("".join(args.prompt), end="", flush=True)
  for (text,) in itertools.chain([first], parts):
    print(text, end="", flush=True)
  print()


def _export(args: argparse.Namespace) -> None:
  from train.export import export

  step = export(args.folder, args.out, args.step)
  print(f"{args.out}: step {step} of {args.folder}")


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs a command; returns its exit status."""
  parser = _parser()
  args, rest = parser.parse_known_args(arguments)
  if rest and args.command != "train":
    parser.error(
      f"unknown arguments: {' '.join(rest)} (python -m train {args.command}"
      " --help lists all)"
    )
  # The rest of train's arguments are fields of the run.
  more = (rest,) if args.command == "train" else ()
  try:
    return args.run(args, *more) or 0
  except (
    ValueError,
    NotImplementedError,
    FloatingPointError,
    OSError,
  ) as error:
    print(f"error: {error}", file=sys.stderr)
  except ModuleNotFoundError as error:
    print(
      f"error: {error}. Training needs more packages: run"
      " `pip install -e '.[train]'` in the clone",
      file=sys.stderr,
    )
  except KeyboardInterrupt:
    text = "interrupted"
    if args.command in ("train", "compare"):
      text += "; the same command goes on from the last checkpoint"
    print(f"\n{text}.", file=sys.stderr)
    return INTERRUPTED
  return 1


if __name__ == "__main__":
  sys.exit(main())
