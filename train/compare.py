"""Trains every run of a comparison and writes its report."""

import dataclasses
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence

import jax

from train import checkpoint, data, loop, pretrained, report
from train import config as config_lib
from train.program import CompiledTask, compile_key, compile_task, open_data
from train.report import runs


def compare(
  comparison: config_lib.ComparisonConfig,
  folder: pathlib.Path,
  *,
  sides: Sequence[str] | None = None,
  stop_at: float | None = None,
  with_report: bool = True,
  compiled: Mapping[str, CompiledTask] | None = None,
) -> pathlib.Path | None:
  """Trains every run of a comparison and writes its report.

  Args:
    comparison: all runs, including those that are not trained now.
    folder: where everything is written.
    sides: the only sides to train now; None: all.
    stop_at: as in `loop.run`.
    with_report: False: train only.
    compiled: tasks that `plan.plan` has compiled already.

  Returns:
    The path of the report, or of the folder without one; None if stop_at came
    before the last run was finished.

  Raises:
    ValueError: the sides of a task differ in more than attention, data cannot
      be opened or used, or a run cannot start. Nothing is trained then.
    ModuleNotFoundError: a package that the report needs is missing. Nothing is
      trained then.
    FloatingPointError: a run broke down. The other runs are trained, and the
      report is written.
  """
  if with_report:
    report.check_packages()
  comparison = pretrained.resolve(comparison)
  resolved = list(comparison.resolve(folder))
  config_lib.check_sides(resolved, sides)
  _check_comparable(comparison, resolved)
  _check_starts(resolved)
  wanted = {
    task: runs
    for task in comparison.tasks()
    if (
      runs := [
        run
        for run in resolved
        if run.task == task and (sides is None or run.side in sides)
      ]
    )
  }
  # Of all tasks, before the first one is compiled and trained.
  made = dict(compiled or {})
  sources = {
    task: made[task].source if task in made else open_data(runs)
    for task, runs in wanted.items()
  }
  folder.mkdir(parents=True, exist_ok=True)
  if jax.process_index() == 0:
    checkpoint.write_json(
      folder / "comparison.json", config_lib.to_dict(comparison)
    )
  training = _Training(stop_at)
  for task, members in wanted.items():
    if not training.train(members, sources.pop(task), made.get(task)):
      return None
  path = folder
  if with_report and jax.process_index() == 0:
    path = report.write(folder)
  if training.failed:
    raise FloatingPointError(f"{path} lacks\n" + "\n".join(training.failed))
  return path


def _check_comparable(
  comparison: config_lib.ComparisonConfig,
  resolved: Sequence[config_lib.RunConfig],
) -> None:
  for task in comparison.tasks():
    members = [run for run in resolved if run.task == task]
    runs.check_comparable(
      [
        config_lib.to_dict(dataclasses.replace(run, seed=0, folder=""))
        for run in members
      ],
      [f"{run.task}/{run.side}" for run in members],
    )


def _check_starts(resolved: Sequence[config_lib.RunConfig]) -> None:
  """Refuses runs that start from a folder which is neither a run of this
  comparison nor there already, or from a trained model other than theirs."""
  planned = {run.folder for run in resolved}
  for run in resolved:
    if run.recipe.pretrained is not None:
      pretrained.check_model(run.recipe.pretrained, run.model)
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


def _is_finished(run: config_lib.RunConfig) -> bool:
  return (pathlib.Path(run.folder) / "done.json").exists()


class _Training:
  """Trains one task after the other until it is time to stop.

  Attributes:
    failed: a line for each run that broke down.
  """

  def __init__(self, stop_at: float | None):
    self._stop_at = stop_at
    self._advanced = False
    self.failed: list[str] = []

  def _must_stop(self) -> bool:
    """Whether to stop: time is up and this call has advanced a run. Each call
    advances at least one."""
    late = self._stop_at is not None and time.monotonic() > self._stop_at
    return late and self._advanced

  def train(
    self,
    wanted: Sequence[config_lib.RunConfig],
    source: data.Source,
    compiled: CompiledTask | None,
  ) -> bool:
    """Trains the runs of a task; returns whether all of them have ended."""
    if self._must_stop():
      return False
    waiting = [run for run in wanted if not _is_finished(run)]
    if compiled is None and waiting:
      compiled = compile_task(waiting, source)
    programs = {} if compiled is None else compiled.programs
    for run in wanted:
      if self._must_stop():
        return False
      self._advanced |= not _is_finished(run)
      program = programs.get(compile_key(run))
      try:
        if loop.run(run, source, program, self._stop_at) is None:
          return False
      except loop.NonFiniteError as error:
        # A run that breaks down is a result; train the others.
        print(f"error: {run.folder}: {error}", file=sys.stderr)
        self.failed.append(f"{run.folder}: {error}")
    jax.clear_caches()
    return True
