"""Thinning a comparison for the repository, and the results committed there."""

import io
import json
import pathlib
import shutil

import numpy as np
import pytest
from test_report import _edit, _make, _read, _summary, split_by_seed

from train import config as config_lib
from train import configs
from train.report import page, runs, thin

RESULTS = pathlib.Path(__file__).parents[1] / "train" / "results"
SIDES = {"gqa": [1.0, 1.1], "msa": [1.05, 1.2]}
# Those of a training record that a report reads, beside its kind and phase.
FIELDS = ("step", "seconds", "loss", "tokens_per_second")
ANSWERS = {"gqa": [0.1, 0.15], "msa": [0.2, 0.3]}  # shares answered wrong


def files_of(folder):
  return {
    path.relative_to(folder): path.read_bytes()
    for path in folder.rglob("*")
    if path.is_file()
  }


@pytest.fixture
def full(tmp_path):
  """Two tasks of two sides and seeds, with all that a run may write."""
  folder = _make(tmp_path / "full", {"text": SIDES, "recall": ANSWERS})
  (folder / "speed.json").write_text("{}")
  for number, path in enumerate(sorted(folder.glob("*/*/seed*"))):
    (path / "checkpoints").mkdir()
    (path / "checkpoints" / "weights").write_text("large")
    _edit(path / "environment.json", command=f"run {number}")
    records = [
      record | {"grad_norm": 1.5, "kl": 1 / 3}
      for record in _read(path / "metrics.jsonl")
    ]
    for record in records:
      if record["kind"] == "train" and record["step"] == 20:
        record["peak_bytes"] = 1000 + number
      if record["kind"] == "train" and record["step"] == 30:
        record["tokens_per_second"] = None
    text = "".join(json.dumps(record) + "\n" for record in records)
    (path / "metrics.jsonl").write_text(text)
    _edit(path / "done.json", final=records[-1])
    if path.parent.name == "msa":
      with np.load(path / "selection.npz") as file:
        arrays = dict(file)
      arrays["block_indices"] = np.zeros((2, 1, 64, 4), np.int16)
      for name in ("union8", "first_block", "previous_block", "kept"):
        arrays[name] = np.full((2, 1), 0.5, np.float32)
      np.savez_compressed(path / "selection.npz", **arrays)
  return folder


@pytest.mark.slow
def test_the_report_of_a_thinned_comparison_shows_the_same_numbers(
  full, tmp_path
):
  pytest.importorskip("matplotlib")
  (full / "speed.json").unlink()
  thin.thin([full], tmp_path / "small")
  page.write(full)
  page.write(tmp_path / "small")
  assert _summary(tmp_path / "small") == _summary(full)
  pictures = [
    sorted(path.name for path in (folder / "report").glob("*.png"))
    for folder in (full, tmp_path / "small")
  ]
  assert pictures[0] == pictures[1]


def test_what_a_thinned_run_keeps(full, tmp_path):
  small = tmp_path / "small"
  assert thin.main([str(full), str(small)]) == 0
  assert (small / "speed.json").exists()
  assert not list(small.rglob("checkpoints"))
  # What the runs share lies in the task's folder, and is read from there.
  shared = json.loads((small / "text" / "environment.json").read_text())
  assert shared["data"] == {"name": "text", "sha256": "00ff"}
  assert shared["runs"]["msa/seed1"].keys() == {"command", "parameters"}
  assert not list(small.glob("*/*/*/environment.json"))
  before, after = (
    {run.label: run for run in runs.read_runs(folder)}
    for folder in (full, small)
  )
  assert before.keys() == after.keys() and len(before) == 8
  for number, (label, run) in enumerate(sorted(after.items())):
    assert run.environment == before[label].environment
    assert run.final == before[label].final
    assert run.finished
    expected = [
      {field: record[field] for field in ("kind", "phase", *FIELDS)}
      for record in before[label].records["train"]
    ]
    assert [record["step"] for record in expected] == [10, 20, 30, 40]
    for record in expected:
      record["loss"] = pytest.approx(record["loss"], rel=1e-6)
    expected[1]["peak_bytes"] = 1000 + number
    assert expected[2]["tokens_per_second"] is None
    assert run.records["train"] == expected
    assert all(x["batch_loss"] == [] for x in run.records["eval"][:-1])
  for seed in (0, 1):
    with np.load(small / "text/msa" / f"seed{seed}" / "selection.npz") as file:
      assert "union8" in file and "block_indices" not in file
      assert ("counts" in file) == (seed == 0)
  # A phase is a line, without the record that has the peak memory.
  run = small / "text/msa/seed0"
  lines = _read(run / "metrics.jsonl")
  assert [x["columns"]["step"] for x in lines if "columns" in x] == [
    [10],
    [20],
    [30, 40],
  ]
  assert lines[-1] == {"kind": "done", "step": 40}
  assert not (run / "done.json").exists()


def test_counts_keep_eighths():
  """As float16 from 0 to 1, which the report's figure draws as it is."""
  packed, shares = io.BytesIO(), np.linspace(0, 1, 4096, dtype=np.float32)
  np.savez_compressed(packed, counts=shares, layers=np.arange(2))
  small = thin.thin_selection(packed.getvalue(), with_counts=True)
  with np.load(io.BytesIO(small)) as file:
    counts, layers = file["counts"], file["layers"]
  assert counts.dtype == np.float16 and layers.tolist() == [0, 1]
  np.testing.assert_array_equal(8 * counts % 1, 0)
  np.testing.assert_allclose(counts, shares, atol=1 / 16)


def test_thinning_again_changes_nothing(full, tmp_path):
  thin.thin([full], tmp_path / "once")
  thin.thin([tmp_path / "once"], tmp_path / "twice")
  assert files_of(tmp_path / "once") == files_of(tmp_path / "twice")
  # Thin folders used to have a record a line and done.json.
  shutil.copytree(tmp_path / "once", tmp_path / "old")
  for path in (tmp_path / "old").glob("*/*/seed*/metrics.jsonl"):
    *records, done = runs.read_records(path.parent)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert done.pop("kind") == "done"
    (path.parent / "done.json").write_text(json.dumps(done))
  thin.thin([tmp_path / "old"], tmp_path / "again")
  assert files_of(tmp_path / "once") == files_of(tmp_path / "again")


def test_a_run_that_was_not_finished_stays_so(full, tmp_path):
  run = full / "text" / "msa" / "seed1"
  (run / "done.json").unlink()
  with (run / "metrics.jsonl").open("a") as file:
    file.write('{"kind": "tra')  # killed while it wrote
  thin.thin([full], tmp_path / "small")
  for folder in (full, tmp_path / "small"):
    unfinished = [r.label for r in runs.read_runs(folder) if not r.finished]
    assert unfinished == ["text/msa/seed1"]


@pytest.mark.parametrize(
  ("columns", "message"),
  [
    ({"step": [1, 2], "loss": [1.0]}, "one length above 0, got .*'loss': 1"),
    ({"step": []}, "one length above 0"),
    ({}, "one length above 0"),
    ({"step": "12"}, "a list for each field"),
    ([1, 2], "a list for each field"),
    ({"step": [1, 2]}, "train record lacks .*'loss'"),
    ({field: [2, 1] for field in FIELDS}, "train step 1 follows step 2"),
  ],
)
def test_broken_columns_are_named(tmp_path, columns, message):
  path = tmp_path / "metrics.jsonl"
  line = {"kind": "train", "phase": "dense", "columns": columns}
  path.write_text(json.dumps(line) + "\n")
  with pytest.raises(ValueError, match=f"{path}, line 1: .*{message}"):
    runs.read_records(tmp_path)


def test_folders_with_other_seeds_are_thinned_to_one(full, tmp_path):
  thin.thin([full], tmp_path / "small")
  parts = split_by_seed(full, tmp_path)
  (parts[1] / "speed.json").write_text("{}")
  assert thin.main([*map(str, parts), str(tmp_path / "merged")]) == 0
  merged = files_of(tmp_path / "merged")
  plan = json.loads(merged.pop(pathlib.Path("comparison.json")))
  assert plan["seeds"] == [0, 1]
  assert merged == files_of(tmp_path / "small")
  # The last command of a folder may have trained one seed of several.
  _edit(tmp_path / "merged" / "comparison.json", seeds=[1])
  thin.thin([tmp_path / "merged"], tmp_path / "again")
  plan = json.loads((tmp_path / "again" / "comparison.json").read_text())
  assert plan["seeds"] == [0, 1]
  # Folders may have been trained for other sides.
  gqa, msa = plan["runs"]
  _edit(parts[0] / "comparison.json", runs=[gqa])
  _edit(parts[1] / "comparison.json", runs=[msa, gqa | {"context": 65}])
  thin.thin(parts, tmp_path / "sides")
  plan = json.loads((tmp_path / "sides" / "comparison.json").read_text())
  assert plan["runs"] == [gqa, msa]
  _edit(parts[1] / "text" / "msa" / "seed1" / "config.json", context=65)
  with pytest.raises(ValueError, match="context is 64 in text/gqa/seed0 and"):
    thin.thin(parts, tmp_path / "refused")
  assert not (tmp_path / "refused").exists()


def test_seeds_that_were_trained_before_a_field_was_added_are_merged(tmp_path):
  """Seeds of the preset come from several days, and the code goes on."""
  (old,) = (RESULTS / "lm13m_4k" / "mix" / "gqa").glob("seed0")
  path = tmp_path / "old" / "mix" / "gqa" / "seed0"
  shutil.copytree(old, path)
  shutil.copy(old.parents[1] / "environment.json", path.parents[1])
  config = json.loads((path / "config.json").read_text())
  del config["eval_window"], config["model"]["index"]["rope_dim"]
  (path / "config.json").write_text(json.dumps(config))
  new = runs.read_runs(RESULTS / "lm13m_4k")
  (before,) = runs.read_runs(tmp_path / "old")
  with pytest.raises(ValueError, match="eval_window is None in mix/gqa/seed0"):
    runs.check_runs([before, *new[1:]])
  config["eval_window"] = 512
  (path / "config.json").write_text(json.dumps(config))
  (before,) = runs.read_runs(tmp_path / "old")
  runs.check_runs([before, *new[1:]])
  # The preset makes runs that can be merged with these.
  preset = configs.preset("lm13m_4k").resolve(pathlib.Path("runs/lm13m_4k"))
  planned = {f"{r.task}/{r.side}/seed{r.seed}": r for r in preset}
  for run in new:
    saved = config_lib.to_dict(planned[run.label]) | {"folder": ""}
    other = run.config | {"folder": ""}
    assert config_lib.differences(other, json.loads(json.dumps(saved))) == []


def test_a_runs_own_environment_wins(full, tmp_path):
  small = tmp_path / "small"
  thin.thin([full], small)
  (small / "text" / "msa" / "seed1" / "environment.json").write_text(
    '{"device": "another"}'
  )
  found = {run.label: run.environment for run in runs.read_runs(small)}
  assert found["text/msa/seed1"]["device"] == "another"
  assert found["text/msa/seed1"]["commit"] == "abc123"
  assert found["text/msa/seed0"]["device"] == "cpu"


def test_thinning_refuses_what_it_would_spoil(full, tmp_path, capsys):
  before = files_of(full)
  assert thin.main([str(full), str(full)]) == 1
  assert "exists; wanted the name of a new folder" in capsys.readouterr().err
  assert thin.main([str(tmp_path / "none"), str(tmp_path / "small")]) == 1
  assert "none holds no runs; wanted" in capsys.readouterr().err
  broken = full / "text" / "msa" / "seed1" / "metrics.jsonl"
  broken.write_text("{")
  with pytest.raises(ValueError):
    thin.thin([full], tmp_path / "small")
  broken.write_bytes(before[broken.relative_to(full)])
  assert files_of(full) == before
  assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_committed_results_are_thin():
  """Small as a whole and each run, and read without a complaint."""
  sizes = {}
  for path in RESULTS.glob("*/*/*/seed*/config.json"):
    run = path.parent
    sizes[run] = sum(file.stat().st_size for file in run.iterdir())
  assert len(sizes) > 50
  files = (path for path in RESULTS.rglob("*") if path.is_file())
  # A report that was drawn here is large, and git ignores most of it.
  files = (path for path in files if path.parent.name != "report")
  assert sum(path.stat().st_size for path in files) < 5_000_000
  assert max(sizes.values()) <= 100_000
  for folder in {run.parents[2] for run in sizes}:
    plan = json.loads((folder / "comparison.json").read_text())
    planned = {(run["task"], run["side"]) for run in plan["runs"]}
    found = {run.parts[-3:-1] for run in sizes if run.parents[2] == folder}
    assert found <= planned, folder
  unfinished = {
    str(run.folder.relative_to(RESULTS))
    for folder in {run.parents[2] for run in sizes}
    for run in runs.read_runs(folder)
    if not run.finished
  }
  assert unfinished == set()
