"""A run that is killed at any moment ends as if nothing had happened."""

import dataclasses
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from test_train import (
  assert_same_run,
  read_records,
  tiny_run,
  without_times,
)

from train import checkpoint
from train import config as config_lib

# A dozen processes start here: each may wait long for a core.
pytestmark = pytest.mark.timeout(2400)
NUM_STEPS = 12


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> pathlib.Path:
  return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def run(place) -> config_lib.RunConfig:
  run = tiny_run(place)
  return dataclasses.replace(
    run,
    # One layer: every start traces it again.
    model=dataclasses.replace(run.model, num_layers=1, layer_kinds=("msa",)),
    recipe=config_lib.RecipeConfig(index_warmup_steps=5),
    num_steps=NUM_STEPS,
    eval_every=4,
    layers_every=3,
    checkpoint_every=2,
    keep_steps=(5,),
  )


@pytest.fixture(scope="module")
def reference(place, run) -> pathlib.Path:
  """The run that nobody stops."""
  run = dataclasses.replace(run, folder=str(place / "reference"))
  config = write_config(place / "reference.json", run)
  finish(start(config, place / "cache"))
  return pathlib.Path(run.folder)


def write_config(path: pathlib.Path, run: config_lib.RunConfig) -> pathlib.Path:
  checkpoint.write_json(path, config_lib.to_dict(run))
  return path


def start(
  config: pathlib.Path, cache: pathlib.Path, *options: str
) -> subprocess.Popen:
  # Each start finds what the first one compiled.
  env = os.environ | {
    "JAX_COMPILATION_CACHE_DIR": str(cache),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  }
  command = [sys.executable, "-m", "train", "train", "--config", str(config)]
  return subprocess.Popen(
    [*command, *options],
    env=env,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def finish(process: subprocess.Popen) -> None:
  output, _ = process.communicate()
  assert process.returncode == 0, output


def wait_for(process: subprocess.Popen, happened) -> None:
  limit = time.monotonic() + 1200
  while not happened():
    if process.poll() is not None:
      pytest.fail(f"the run ended by itself:\n{process.stdout.read()}")
    assert time.monotonic() < limit
    time.sleep(0.0005)


def kill(process: subprocess.Popen) -> None:
  os.kill(process.pid, signal.SIGKILL)
  assert process.wait() == -signal.SIGKILL
  process.stdout.close()


FULL_DISK = """
import resource, sys
from train import __main__, checkpoint

save = checkpoint.RunFolder.save

def save_to_a_full_disk(self, step, *rest):
  if step == 6:
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
  save(self, step, *rest)

checkpoint.RunFolder.save = save_to_a_full_disk
sys.exit(__main__.main(["train", "--config", sys.argv[1]]))
"""


@pytest.mark.slow
def test_a_full_disk_costs_one_line_and_the_steps_since(place, run, reference):
  """A limit on the size of files fails as a full disk does, where a test may
  set it."""
  folder = place / "full"
  run = dataclasses.replace(run, folder=str(folder))
  config = write_config(place / "full.json", run)
  command = [sys.executable, "-c", FULL_DISK, str(config)]
  # JAX would warn that the cache of programs is full too.
  env = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
  done = subprocess.run(command, env=env, capture_output=True, text=True)
  assert done.returncode == 1
  (said,) = done.stderr.strip().splitlines()
  assert said == (
    f"error: {folder}/checkpoints: the checkpoint of step 6 cannot be written"
    " (File too large). The last complete one is that of step 5; started again,"
    " the run continues from there."
  )
  finish(start(config, place / "cache"))
  assert without_times(folder) == without_times(reference)


# test_train stops a run after each step, in one process.
@pytest.mark.slow
@pytest.mark.parametrize("first", [2, 0])
def test_killed_run_ends_with_the_same_bits(place, run, reference, first):
  """Killed at each of the moments from the given one on."""
  folder = place / f"killed{first}"
  run = dataclasses.replace(run, folder=str(folder))
  config = write_config(place / f"run{first}.json", run)
  metrics = folder / "metrics.jsonl"
  rng = random.Random(0)

  def records() -> int:
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

  def writes(step: int):
    """Whether the checkpoint of a step is there, complete or not."""
    there = folder / "checkpoints"
    return lambda: (
      there.exists()
      and any(path.name.split(".")[0] == str(step) for path in there.iterdir())
    )

  moments = [
    lambda: records() >= 1,  # before any checkpoint
    lambda: records() >= 9,  # about the switch to sparse
    writes(10),  # while a checkpoint is written
  ]
  for i, moment in list(enumerate(moments))[first:]:
    process = start(config, place / "cache")
    wait_for(process, moment)
    time.sleep(rng.random() * 0.02 if i % 2 == 0 else 0)
    kill(process)
    assert not (folder / "done.json").exists()
    if i > 0:
      # What a kill within a write leaves.
      with open(metrics, "a") as file:
        file.write('{"kind": "train", "st')
  finish(start(config, place / "cache"))
  assert_same_run(run, folder, reference, steps=(5, 10, NUM_STEPS))
  environment = json.loads((folder / "environment.json").read_text())
  assert environment["resumed"][-1]["step"] >= 8


@pytest.mark.parametrize(
  "axis", ["data", pytest.param("context", marks=pytest.mark.slow)]
)
@pytest.mark.slow
def test_two_processes_go_on_as_one(place, run, reference, axis):
  """Two processes with a device each are killed; one device ends their run."""
  folder = place / f"two_{axis}"
  run = dataclasses.replace(
    run, folder=str(folder), mesh=config_lib.MeshConfig(**{axis: 2})
  )
  config = write_config(place / f"two_{axis}.json", run)
  with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
  processes = [
    start(config, place / "cache", "--distributed", address, "2", str(i))
    for i in range(2)
  ]
  try:
    wait_for(processes[0], (folder / "checkpoints" / "6").exists)
  finally:
    for process in processes:
      kill(process)
  before = read_records(folder)[-1]["step"]
  assert before >= 6 and not (folder / "done.json").exists()
  environment = json.loads((folder / "environment.json").read_text())
  assert environment["device_count"] == environment["process_count"] == 2

  write_config(config, dataclasses.replace(run, mesh=config_lib.MeshConfig()))
  finish(start(config, place / "cache"))
  environment = json.loads((folder / "environment.json").read_text())
  (resumed,) = environment["resumed"]
  assert resumed["step"] >= 6 and resumed["process_count"] == 1
  mine, theirs = (
    [(r["loss"], r["kl"]) for r in read_records(f) if r["kind"] == "train"]
    for f in (folder, reference)
  )
  assert len(mine) == NUM_STEPS
  # Sums over the batch are split in another way.
  np.testing.assert_allclose(mine, theirs, rtol=1e-5)


def test_half_written_checkpoint_does_not_count(place):
  """The latest complete one does; the half one is written again."""
  folder = place / "half"
  saved = checkpoint.Checkpoints(folder)
  state = {"x": np.arange(3.0)}
  saved.save(2, state, 1.0)
  saved.close()
  half = folder / "checkpoints" / "4.orbax-checkpoint-tmp-1"
  half.mkdir()
  (half / "state").write_bytes(b"?")
  again = checkpoint.Checkpoints(folder)
  assert again.latest() == 2
  again.save(4, state, 1.0)
  again.close()
  assert checkpoint.Checkpoints(folder, read_only=True).latest() == 4


def test_several_processes_write_one_file(tmp_path, monkeypatch):
  """Processes that train a comparison's seeds on one device all write its
  comparison.json."""
  path, replace = tmp_path / "comparison.json", os.replace

  def beside_another(part, whole):
    monkeypatch.setattr(os, "replace", replace)
    checkpoint.write_json(path, "the other's")
    replace(part, whole)

  monkeypatch.setattr(os, "replace", beside_another)
  checkpoint.write_json(path, "mine")
  assert json.loads(path.read_text()) == "mine"
  assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_written_leaves_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / "file.json"
  checkpoint.write_json(path, "old")

  def full(*_):
    raise OSError("no space left")

  monkeypatch.setattr(os, "fsync", full)
  with pytest.raises(OSError, match="no space left"):
    checkpoint.write_json(path, "new")
  assert json.loads(path.read_text()) == "old"
  assert list(tmp_path.iterdir()) == [path]
