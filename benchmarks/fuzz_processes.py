"""The fuzzer's signatures in several processes; see `benchmarks/fuzz.py`.

To trace a signature takes a processor seconds in which Python does nothing
else, so one process is slow however many threads it has. A sanitizer may end
or wait for ever, which should cost one signature and not all. Here a *share* is
the signatures of one process, by their index; the process writes what it did to
a file, as often as it likes, and all that it prints is passed on.

Nothing here may start JAX: the parent would take memory of the GPU.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

# XLA may start ptxas, which the sanitizer need not see.
SANITIZER = (
  "compute-sanitizer --tool memcheck --target-processes application-only"
  " --error-exitcode 9"
)
# What a sanitizer prints at the end if it was there and saw nothing.
CLEAN = re.compile(r"SUMMARY: 0 (errors|hazards)")
# Under a sanitizer XLA compiles in one thread, since compute-sanitizer once
# ended with a segmentation fault while twelve compiled.
SANITIZER_FLAGS = (
  "--xla_gpu_enable_command_buffer= --xla_gpu_autotune_level=0"
  " --xla_gpu_force_compilation_parallelism=1"
)
# Seconds in which a process that has reached its limit must have ended.
GRACE = 30.0
TURN = 0.2  # seconds between looks at the processes
OUTPUT_LINES = 40  # of a lost process, which are kept


def environment(sanitizer: bool) -> dict[str, str]:
  """Of a child. What the caller has set stays."""
  env = dict(os.environ)
  env.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  # To write where in Python an operation comes from takes a fifth of tracing.
  env.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "1")
  if sanitizer:
    # Only then does each array have bounds that the sanitizer knows.
    env.setdefault("XLA_PYTHON_CLIENT_ALLOCATOR", "platform")
    env["XLA_FLAGS"] = f"{SANITIZER_FLAGS} {env.get('XLA_FLAGS', '')}".strip()
  return env


def deal(op_of: dict[int, str], count: int) -> list[list[int]]:
  """Shares of the signatures in `op_of`, each with as many of every operation.

  Signatures of one operation cost about the same, and those of another much
  more or less.
  """
  order = sorted(op_of, key=lambda index: (op_of[index], index))
  return [order[i::count] for i in range(min(count, len(order)))]


@dataclasses.dataclass
class Child:
  """A process and its share.

  Attributes:
    summary_path: where it writes what it did.
    output_path: all that it prints. A file and not a pipe, since what is left
      of a process that died could keep a pipe open.
    deadline: when it is ended, in `time.monotonic`'s seconds.
  """

  name: str
  share: list[int]
  process: subprocess.Popen
  summary_path: pathlib.Path
  output_path: pathlib.Path
  deadline: float
  _shown: int = 0

  def summary(self) -> dict[str, Any] | None:
    """What it did until now; None if it wrote nothing."""
    if not self.summary_path.exists():
      return None
    return json.loads(self.summary_path.read_text())

  def output(self) -> str:
    return self.output_path.read_bytes().decode(errors="replace")

  def show(self, ended: bool = False) -> None:
    """Passes on the lines that it printed since the last time."""
    new = self.output_path.read_bytes()[self._shown :]
    if not ended:
      new = new[: new.rfind(b"\n") + 1]
    self._shown += len(new)
    for line in new.decode(errors="replace").splitlines():
      print(f"{self.name}| {line}", flush=True)

  def kill(self) -> None:
    """Ends it and all that it started, which may have outlived it."""
    with contextlib.suppress(ProcessLookupError):
      os.killpg(self.process.pid, signal.SIGKILL)
    self.process.wait()

  def fault(self, late: bool, sanitizer: bool) -> str:
    """What went wrong with the process itself; "" if it did all its calls."""
    code, summary = self.process.returncode, self.summary()
    if late:
      return "it did not end in time"
    # Of 1, the summary must say the cause.
    if code not in (0, 1):
      return f"signal {-code}" if code < 0 else f"exit code {code}"
    if summary is None:
      return f"exit code {code}, and it wrote no summary"
    if summary["unfinished"]:
      return f"exit code {code} before its end"
    if code == 1 and not summary["failures"] and not summary["unsupported"]:
      return "exit code 1"
    if sanitizer and not CLEAN.search(self.output()):
      return "the sanitizer did not say that there were no errors"
    return ""

  def lost(self, fault: str) -> dict[str, Any]:
    """What the summary says of a process with a fault."""
    summary = self.summary() or dict(unfinished=self.share)
    return dict(
      process=self.name,
      signatures=self.share,
      unfinished=summary["unfinished"],
      fault=fault,
      output=self.output().splitlines()[-OUTPUT_LINES:],
    )


def run(
  shares: list[list[int]],
  command: Callable[[list[int], pathlib.Path], list[str]],
  changed: Callable[[list[dict], list[dict]], None],
  *,
  at_once: int,
  time_limit: float,
  sanitizer: bool,
) -> list[dict[str, Any]]:
  """Runs each share in a process of its own.

  No process that it started is left when it returns or raises, also by
  SIGTERM, SIGHUP or Ctrl-C.

  Args:
    command: (share, where to write the summary) -> a process's command.
    changed: called with the summaries of all processes and with those that are
      lost, after either changed.
    time_limit: seconds of one process, which also gets to know it.

  Returns:
    The lost processes: those that died, or did not end, or left calls out.
  """
  waiting = collections.deque(enumerate(shares))
  children: list[Child] = []
  running: list[Child] = []
  lost: list[dict[str, Any]] = []
  before: Any = None
  env = environment(sanitizer)
  with (
    tempfile.TemporaryDirectory(prefix="fuzz_") as folder, _ends_when_told()
  ):  # fmt: skip
    try:
      while waiting or running:
        # One in a turn, so that sanitizers do not all start at one moment.
        if waiting and len(running) < at_once:
          child = _start(*waiting.popleft(), command, folder, env, time_limit)
          children.append(child)
          running.append(child)
        time.sleep(TURN)
        for child in list(running):
          child.show()
          late = time.monotonic() > child.deadline
          if child.process.poll() is None and not late:
            continue
          child.kill()
          child.show(ended=True)
          running.remove(child)
          if fault := child.fault(late, sanitizer):
            lost.append(child.lost(fault))
        now = [x for child in children if (x := child.summary())], list(lost)
        if now != before:
          changed(*now)
          before = now
    finally:
      for child in running:
        child.kill()
  return lost


def _start(
  nth: int,
  share: list[int],
  command: Callable[[list[int], pathlib.Path], list[str]],
  folder: str,
  env: dict[str, str],
  time_limit: float,
) -> Child:
  summary, output = (
    pathlib.Path(folder) / f"{nth}.{kind}" for kind in ("json", "txt")
  )
  with output.open("wb") as file:
    process = subprocess.Popen(
      command(share, summary),
      env=env,
      stdin=subprocess.DEVNULL,
      stdout=file,
      stderr=subprocess.STDOUT,
      start_new_session=True,  # so that `Child.kill` finds what it started
    )
  deadline = time.monotonic() + time_limit + GRACE
  return Child(f"{nth:2}", share, process, summary, output, deadline)


@contextlib.contextmanager
def _ends_when_told() -> Iterator[None]:
  """SIGTERM, as `timeout` sends it, and SIGHUP raise SystemExit here."""
  told = (signal.SIGTERM, signal.SIGHUP)
  before = [signal.signal(x, lambda n, _: sys.exit(128 + n)) for x in told]
  try:
    yield
  finally:
    for x, handler in zip(told, before, strict=True):
      signal.signal(x, handler)


def report(lost: list[dict[str, Any]]) -> None:
  """Prints what became of lost processes."""
  for x in lost:
    print(
      f"process {x['process'].strip()} is lost: {x['fault']}; its signatures"
      f" {x['signatures']}, not finished {x['unfinished']}. It ended with"
    )
    for line in x["output"]:
      print(f"  {line}")
    sys.stdout.flush()
