"""A run's folder: config, metrics and checkpoints that survive a kill.

A run that is killed at any moment and started again ends with the same bits.
Three rules ensure it: every file is replaced as a whole, a checkpoint counts
only once it is complete, and a resumed run drops the records of metrics.jsonl
that are newer than its checkpoint.
"""

import contextlib
import datetime
import errno
import fcntl
import functools
import importlib.metadata
import json
import logging
import os
import pathlib
import platform
import re
import shlex
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from train import config as config_lib

State = dict[str, jax.Array]
# Written when a number of the run becomes NaN or infinite.
BROKEN = "broken.json"


class CheckpointError(OSError):
  """A checkpoint could not be written; the earlier ones are complete."""


@contextlib.contextmanager
def _naming(path: pathlib.Path) -> Iterator[None]:
  """Puts the file into errors that lack it, such as that of a full disk."""
  try:
    yield
  except OSError as error:
    if error.filename is not None or error.errno is None:
      raise
    raise OSError(error.errno, error.strerror, str(path)) from error


def write_json(path: pathlib.Path, value: Any) -> None:
  """Replaces a JSON file as a whole."""
  text = json.dumps(value, indent=2, allow_nan=False) + "\n"
  replace_file(path, text.encode())


def replace_file(path: pathlib.Path, content: bytes) -> None:
  """Writes a file so that a kill leaves either the old or the new content.

  If several processes write it at once, the last one's content stays.
  """
  part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
  try:
    with _naming(path), open(part, "wb") as file:
      file.write(content)
      file.flush()
      os.fsync(file.fileno())
    os.replace(part, path)
  finally:
    part.unlink(missing_ok=True)


def check_tree(
  found: Mapping[str, Any], wanted: Mapping[str, Any], where: str
) -> None:
  """Compares names and shapes of a checkpoint with those of a model.

  Raises:
    ValueError: lists the parameters that are missing, unexpected or of
      another shape.
  """
  # Adam's moments have the names and shapes of their parameters, so comparing
  # the parameters is enough.
  known = {name for name in {**found, **wanted} if name.startswith("params.")}
  names = sorted(known or {**found, **wanted})
  complaints = [f"missing: {name}" for name in names if name not in found]
  complaints += [f"unexpected: {name}" for name in names if name not in wanted]
  complaints += [
    f"shape: {name} is {tuple(found[name].shape)}, wanted"
    f" {tuple(wanted[name].shape)}"
    for name in names
    if name in found
    and name in wanted
    and tuple(found[name].shape) != tuple(wanted[name].shape)
  ]
  if complaints:
    shown = "\n  ".join(complaints[:20])
    more = len(complaints) - 20
    raise ValueError(
      f"{where} holds another architecture than the config's model:\n  {shown}"
      + (f"\n  and {more} more" if more > 0 else "")
    )


def _is_for_users(record: logging.LogRecord) -> bool:
  message = record.getMessage()
  if "orbax" not in record.pathname + message:
    return True
  return record.exc_info is None and not re.search("read[_ ]only=", message)


@functools.cache
def _quieten_orbax() -> None:
  """Drops what orbax's threads and tasks print of an error in the background,
  hundreds of lines (`Checkpoints._writing` raises it in one), and its warnings
  that a checkpoint is opened for reading alone."""
  for name in ("absl", "asyncio"):
    logging.getLogger(name).addFilter(_is_for_users)
  hook = sys.unraisablehook

  def unraisable(what):
    # Writes that are still going on report to an event loop that has ended.
    if str(what.exc_value) != "Event loop is closed":
      hook(what)

  sys.unraisablehook = unraisable


def _reason(error: BaseException) -> str:
  """What the operating system said, if the error's text holds it."""
  text = str(error)
  codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)
  said = (os.strerror(code) for code in (*codes, errno.EIO))
  first = text.partition("\n")[0][:300] or type(error).__name__
  return next((reason for reason in said if reason in text), first)


class Checkpoints:
  """Checkpoints of a run: a flat dict of arrays and the seconds trained."""

  def __init__(
    self,
    folder: pathlib.Path,
    *,
    keep: int = 1,
    keep_steps: tuple[int, ...] = (),
    read_only: bool = False,
  ):
    # Importing orbax takes a second, which other commands should not wait for.
    import orbax.checkpoint as ocp

    _quieten_orbax()
    self._ocp = ocp
    self._step: int | None = None
    self.folder = folder / "checkpoints"
    policies = ocp.checkpoint_managers
    options = ocp.CheckpointManagerOptions(
      create=not read_only,
      read_only=read_only,
      cleanup_tmp_directories=not read_only,
      preservation_policy=policies.AnyPreservationPolicy(
        [policies.LatestN(keep), policies.CustomSteps(list(keep_steps))]
      ),
    )
    self._manager = ocp.CheckpointManager(
      self.folder.absolute(),
      options=options,
      item_handlers={
        "state": ocp.StandardCheckpointHandler(),
        "clock": ocp.JsonCheckpointHandler(),
      },
    )

  def latest(self) -> int | None:
    return self._manager.latest_step()

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    """Names the checkpoint that cannot be written, here or in the background.

    Raises:
      CheckpointError: orbax reports an error.
    """
    try:
      yield
    except Exception as error:
      if self._step is None:
        raise
      step, self._step = self._step, None
      complete = [s for s in self._manager.all_steps() if s != step]
      left = f"that of step {max(complete)}" if complete else "none"
      raise CheckpointError(
        f"{self.folder}: the checkpoint of step {step} cannot be written"
        f" ({_reason(error)}). The last complete one is {left}; started again,"
        " the run continues from there."
      ) from error

  def save(self, step: int, state: State, seconds: float) -> None:
    """Copies the state, and writes it in the background.

    Raises:
      CheckpointError: this or the last checkpoint cannot be written.
    """
    args = self._ocp.args
    self.wait()
    self._step = step
    with self._writing():
      self._manager.save(
        step,
        args=args.Composite(
          state=args.StandardSave(state),
          clock=args.JsonSave({"seconds": seconds}),
        ),
        force=True,
      )

  def shapes(self, step: int) -> dict[str, Any]:
    """Shape and dtype of each array of a checkpoint."""
    if step not in self._manager.all_steps():
      raise ValueError(
        f"{self.folder}: no checkpoint of step {step}; there are"
        f" {sorted(self._manager.all_steps())}."
      )
    return dict(self._manager.item_metadata(step)["state"])

  def restore(
    self, step: int, wanted: Mapping[str, jax.ShapeDtypeStruct]
  ) -> tuple[State, float]:
    """Reads arrays of the given shapes, placed by their shardings.

    Returns:
      The arrays and the seconds trained.
    """
    check_tree(self.shapes(step), wanted, f"{self.folder}/{step}")
    args = self._ocp.args
    saved = self._manager.restore(
      step,
      args=args.Composite(
        state=args.StandardRestore(dict(wanted)), clock=args.JsonRestore()
      ),
    )
    return saved["state"], saved["clock"]["seconds"]

  def wait(self) -> None:
    """Waits for the last checkpoint to be complete.

    Raises:
      CheckpointError: it cannot be written.
    """
    with self._writing():
      self._manager.wait_until_finished()
    self._step = None

  def close(self) -> None:
    try:
      self.wait()
    finally:
      # After an error, orbax may report it again.
      with contextlib.suppress(Exception):
        self._manager.close()


class RunFolder:
  """The folder of a run. Only the first process writes metrics.

  Raises:
    ValueError: the folder belongs to another config, to other data, or to a
      process that is still running.
  """

  def __init__(self, config: config_lib.RunConfig, data: dict):
    self.path = pathlib.Path(config.folder)
    self._config = config
    self._last_eval: dict | None = None
    self._writes = jax.process_index() == 0
    self.path.mkdir(parents=True, exist_ok=True)
    self._lock = os.open(self.path, os.O_RDONLY)
    if self._writes:
      try:
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except OSError:
        os.close(self._lock)
        raise ValueError(
          f"{self.path}: another process is training here."
        ) from None
    try:
      self._check(data)
      self.checkpoints = Checkpoints(
        self.path, keep=config.keep_checkpoints, keep_steps=config.keep_steps
      )
      self.start = self.checkpoints.latest() or 0
      self._metrics = self._open_metrics() if self._writes else None
    except BaseException:
      os.close(self._lock)
      raise

  @property
  def done(self) -> pathlib.Path:
    return self.path / "done.json"

  def _check(self, data: dict) -> None:
    saved = read_config(self.path)
    wanted = config_lib.to_dict(self._config)
    checkpoints = self.path / "checkpoints"
    began = self.done.exists() or (
      checkpoints.is_dir() and any(checkpoints.iterdir())
    )
    metrics = self.path / "metrics.jsonl"
    if not began and metrics.exists() and '"columns":' in metrics.read_text():
      # It would be taken for an earlier attempt, and its metrics dropped.
      raise ValueError(
        f"{self.path} holds a thinned run, which has no checkpoint to continue"
        " from; choose another folder."
      )
    if saved is not None and not began:
      # An earlier attempt left no checkpoint from which to continue.
      saved = None
      if self._writes:
        (self.path / "environment.json").unlink(missing_ok=True)
    if saved is not None:
      # Only paths and devices may change.
      ignored = ["folder", "mesh", "data.cache_dir", "data.text.cache_dir"]
      starts = [c["recipe"].get("init_from") for c in (saved, wanted)]
      if all(starts) and len({pathlib.Path(p).parts[-2:] for p in starts}) == 1:
        ignored.append("recipe.init_from")
      changed = config_lib.differences(saved, wanted, tuple(ignored))
      if changed:
        raise ValueError(
          f"{self.path} belongs to a run with another config; continue with"
          " that one or choose another folder:\n  " + "\n  ".join(changed)
        )
    environment = self.path / "environment.json"
    if saved is not None and environment.exists():
      before = json.loads(environment.read_text())["data"]
      changed = config_lib.differences(before, json.loads(json.dumps(data)))
      if changed:
        raise ValueError(
          f"{self.path}: the data are not those the run began with:\n  "
          + "\n  ".join(changed[:20])
        )
    if saved is None and self._writes:
      write_json(self.path / "config.json", wanted)

  def _open_metrics(self):
    """Opens metrics.jsonl without the records that will be written again,
    those after the checkpoint's step, and without an incomplete last line."""
    path = self.path / "metrics.jsonl"
    kept = []
    if path.exists():
      for line in path.read_text().splitlines():
        try:
          record = json.loads(line)
        except json.JSONDecodeError:
          break
        if record["step"] > self.start:
          break
        kept.append(line + "\n")
    replace_file(path, "".join(kept).encode())
    return open(path, "a")

  def write_environment(
    self, data: dict, parameters: dict, files: Mapping[str, str | None]
  ) -> None:
    """Writes environment.json: device, versions, data and parameters of the
    run. A resumed run adds its own start to the list "resumed".

    Args:
      data: fingerprint of the run's data.
      parameters: their numbers.
      files: content of further files, by name, which are kept beside it if they
        are not None.
    """
    if not self._writes:
      return
    for name, content in files.items():
      if content is not None:
        replace_file(self.path / name, content.encode())
    path = self.path / "environment.json"
    now = provenance()
    if path.exists():
      saved = json.loads(path.read_text())
      resumed = [*saved["resumed"], {"step": self.start, **now}]
      write_json(path, saved | {"resumed": resumed})
      return
    write_json(
      path, {**now, "resumed": [], "data": data, "parameters": parameters}
    )

  def log(self, record: dict) -> None:
    """Adds a record to metrics.jsonl, which holds one a line."""
    if record["kind"] == "eval":
      self._last_eval = record
    if self._metrics is not None:
      with _naming(self.path / "metrics.jsonl"):
        self._metrics.write(json.dumps(record, allow_nan=False) + "\n")
        self._metrics.flush()

  def save(self, step: int, state: State, seconds: float) -> None:
    """Makes a checkpoint, after the records up to it are on disk."""
    if self._metrics is not None:
      with _naming(self.path / "metrics.jsonl"):
        os.fsync(self._metrics.fileno())
    self.checkpoints.save(step, state, seconds)

  def last_eval(self) -> dict:
    """The last "eval" record. It is read from metrics.jsonl if this process
    has logged none."""
    if self._last_eval is not None:
      return self._last_eval
    lines = (self.path / "metrics.jsonl").read_text().splitlines()
    records = (json.loads(line) for line in reversed(lines))
    return next(record for record in records if record["kind"] == "eval")

  def read_done(self) -> dict | None:
    """The content of done.json; None if the run is not finished."""
    return json.loads(self.done.read_text()) if self.done.exists() else None

  def finish(self, value: dict) -> None:
    """Waits for the last checkpoint, then marks the run as finished."""
    self.checkpoints.wait()
    if self._writes:
      (self.path / BROKEN).unlink(missing_ok=True)
      write_json(self.done, value)

  def mark_broken(self, step: int, why: str) -> None:
    """Writes broken.json for the report. Another attempt may still succeed,
    and then removes the file."""
    if self._writes:
      write_json(self.path / BROKEN, {"step": step, "why": why})

  def close(self) -> None:
    with contextlib.ExitStack() as stack:
      stack.callback(os.close, self._lock)
      stack.callback(self.checkpoints.close)
      if self._metrics is not None:
        self._metrics.close()


def provenance() -> dict[str, Any]:
  """Date, command, device and code of this process, to record beside the
  numbers that it produces."""
  device = jax.devices()[0]
  return {
    "started": datetime.datetime.now(datetime.UTC).isoformat("T", "seconds"),
    "command": _command(),
    "versions": versions(),
    "device": device.device_kind,
    "platform": device.platform,
    "device_count": jax.device_count(),
    "process_count": jax.process_count(),
    **_REVISION,
  }


def _command() -> str:
  program = pathlib.Path(sys.argv[0])
  words = [program.name]
  if program.name == "__main__.py":
    words = ["python", "-m", program.parent.name]
  return shlex.join([*words, *sys.argv[1:]])


def read_config(folder: pathlib.Path) -> dict | None:
  """The saved config of a run folder; None if it has none.

  Fields that configs have gained since the run began have their defaults, with
  which the run was trained.
  """
  path = folder / "config.json"
  if not path.exists():
    return None
  saved = json.loads(path.read_text())
  try:
    run = config_lib.from_dict(config_lib.RunConfig, saved)
  except ValueError:
    return saved  # The comparison with the wanted config says what is wrong.
  return config_lib.to_dict(run)


def versions() -> dict[str, str]:
  """Versions of Python and of the packages that a run's numbers depend on."""
  names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
  found = {"python": platform.python_version()}
  for name in ("msa-jax", *names):
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found


def _revision() -> dict[str, Any]:
  """The commit of this code, and whether files were changed since.

  Both are None outside of a checkout. A `git archive` knows its commit only.
  """
  root = pathlib.Path(__file__).parent.parent

  def git(*words: str) -> str | None:
    try:
      result = subprocess.run(
        ["git", *words],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=10,
      )
    except (OSError, subprocess.TimeoutExpired):
      return None
    return result.stdout.strip() if result.returncode == 0 else None

  archived = root / ".git_archival.txt"
  if archived.exists() and "$" not in (name := archived.read_text().strip()):
    return {"commit": name, "dirty": None}
  commit = git("rev-parse", "HEAD")
  packages = ("msa_jax", "pallas_kernels", "train")
  changes = git(
    "status", "--porcelain", "--untracked-files=no", "--", *packages
  )
  return {
    "commit": commit,
    "dirty": None if changes is None else bool(changes),
  }


# Read at import, because the checkout may change while this process runs.
_REVISION = _revision()
