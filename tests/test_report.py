"""The report: what it counts, what it refuses, what it says."""

import json
import math
import re
import shutil
import threading

import numpy as np
import pytest

from train import configs, progress, report
from train.report import figures, gaps, page, runs, tables

# These tests read what reports say; the module's first report draws most kinds
# of pictures, and test_words_of_pictures_are_not_cut looks at one.
pytestmark = pytest.mark.usefixtures("pictures_once")

_BITS = 1 / math.log(2)


def _config(task, side, seed):
  msa = side != "gqa"
  return {
    "task": task,
    "side": side,
    "seed": seed,
    "num_steps": 40,
    "batch_size": 2,
    "context": 64,
    "model": {
      "num_layers": 2,
      "layer_kinds": ["msa" if msa else "gqa"],
      "index": {"block_size": 8, "top_k": 2, "num_local_blocks": 1},
      "dtype": "float32",
    },
    "data": {"num_values": 4} if task == "recall" else {"tokenizer": "byte"},
    "optimizer": {"learning_rate": 1e-3, "index_clip_norm": 1.0 + msa},
    "recipe": {
      "index_warmup_steps": 20 * msa,
      "init_from": f"there/{task}/gqa/seed{seed}" if msa else None,
    },
    "folder": f"there/{task}/{side}/seed{seed}",
  }


def _records(task, side, final_loss):
  """Metrics that end at final_loss (nats); accuracy is 1 - loss."""
  records = []
  for step in range(10, 50, 10):
    phase = "dense"
    if side != "gqa":
      phase = "warmup" if step <= 20 else "sparse"
    clock = {"step": step, "phase": phase, "tokens": step * 128}
    clock["seconds"] = step / 10
    loss = final_loss + (40 - step) / 20
    bits = loss * _BITS if task == "text" else None
    first = step == 10 or (step == 30 and side != "gqa")  # of its phase
    speed = 1.0 if first else 1000.0 + step
    records.append(
      {
        "kind": "train",
        **clock,
        "loss": loss,
        "bits_per_byte": bits,
        "tokens_per_second": speed,
        "peak_bytes": None,
      }
    )
    if side != "gqa":
      layers = [
        {"layer": i, "kl": 0.1, "block_recall": 0.5, "score_recall": math.nan}
        for i in range(2)
      ]
      records.append(
        {"kind": "layers", "step": step, "phase": phase, "layers": layers}
      )
    record = {"kind": "eval", **clock, "loss": loss, "bits_per_byte": bits}
    record |= {"accuracy": None, "by_distance": None}
    record["batch_loss"] = [loss - 0.01, loss + 0.01]
    if task == "recall":
      record["accuracy"] = 1 - final_loss
      record["by_distance"] = [
        {"low": 2, "high": 7, "accuracy": 1.0, "count": 50},
        {"low": 8, "high": 63, "accuracy": 1 - final_loss, "count": 100},
      ]
    records.append(record)
  return records


def _make(folder, losses, index_params=24):
  """Run folders for losses[task][side] = final loss of each seed."""
  for task, sides in losses.items():
    for side, values in sides.items():
      for seed, loss in enumerate(values):
        run = folder / task / side / f"seed{seed}"
        run.mkdir(parents=True)
        (run / "config.json").write_text(json.dumps(_config(task, side, seed)))
        index = index_params * (side != "gqa")
        environment = {
          "device": "cpu",
          "commit": "abc123",
          "versions": {"jax": "0.11.2"},
          "command": "python -m train compare tiny",
          "data": {"name": task, "sha256": "00ff"},
          "parameters": {"total": 1000 + index, "index": index},
        }
        (run / "environment.json").write_text(json.dumps(environment))
        _write(run / "metrics.jsonl", _records(task, side, loss))
        (run / "done.json").write_text(json.dumps({"step": 40, "final": {}}))
        if side != "gqa":
          np.savez(
            run / "selection.npz",
            counts=np.tril(np.ones((2, 1, 8, 8), np.float32)),
            layers=np.arange(2),
            block_size=8,
          )
  return folder


def _read(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def _write(path, records):
  path.write_text("".join(json.dumps(x) + "\n" for x in records))


def _edit(path, **fields):
  path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def _page_text(page):
  return re.sub(r"<figure>.*?</figure>", "", page.read_text(), flags=re.S)


def _summary(folder):
  return json.loads((folder / "report" / "summary.json").read_text())


@pytest.fixture(scope="module")
def pair(pictures_once, tmp_path_factory):
  """A comparison of two tasks with three seeds, and its report's page."""
  folder = _make(
    tmp_path_factory.mktemp("pair"),
    {
      "text": {"gqa": [1.0, 1.1, 1.2], "msa": [1.02, 1.12, 1.23]},
      "recall": {"gqa": [0.1, 0.2, 0.3], "msa": [0.2, 0.1, 0.3]},
    },
  )
  (folder / "report").mkdir()
  (folder / "report" / "stale.png").write_text("left by an earlier report")
  return report.write(folder)


def test_report_is_one_file_with_every_picture(pair):
  page, folder = pair.read_text(), pair.parent
  pictures = sorted(path.name for path in folder.glob("*.png"))
  assert pictures == [
    "overview.png",
    "recall_accuracy_gap.png",
    "recall_accuracy_steps.png",
    "recall_accuracy_time.png",
    "recall_distance.png",
    "recall_loss_gap.png",
    "recall_loss_steps.png",
    "recall_loss_time.png",
    "recall_msa_blocks.png",
    "recall_msa_layers.png",
    "recall_train_loss.png",
    "text_bits_per_byte_gap.png",
    "text_bits_per_byte_steps.png",
    "text_bits_per_byte_time.png",
    "text_msa_blocks.png",
    "text_msa_layers.png",
    "text_train_loss.png",
  ]
  assert page.count('src="data:image/png;base64,') == len(pictures)
  assert not re.search(r'(src|href)="(?!data:)', page)
  assert "Thin lines are single seeds" in page and "The band is" in page
  assert "Sides have different seeds" not in page
  # The old report was replaced whole, and nothing is left beside it.
  others = {path.name for path in folder.parent.iterdir()}
  assert others == {"report", "text", "recall"}


def test_gap_is_paired_by_seed_with_its_t_interval(pair):
  (found,) = _summary(pair.parent.parent)["tasks"]["text"]["gaps"]["msa"]
  wanted = np.array([0.02, 0.02, 0.03]) * _BITS
  np.testing.assert_allclose(found["values"], wanted)
  # 4.302653 is the 97.5 % point of Student's t with 2 degrees of freedom.
  half = 4.302653 * wanted.std(ddof=1) / math.sqrt(3)
  np.testing.assert_allclose(
    found["interval"], [wanted.mean() - half, wanted.mean() + half], rtol=1e-6
  )
  percent = np.mean([2.0, 100 * 0.02 / 1.1, 100 * 0.03 / 1.2])
  np.testing.assert_allclose(found["percent"], percent)


def test_seeds_of_folders_with_other_sides_are_paired(tmp_path):
  """Commands that trained some sides of some seeds each, into two folders."""
  sides = {"gqa": [1.0, 1.1, 1.2, 1.0], "msa": [1.01, 1.122, 1.236, 1.05]}
  _make(tmp_path / "a", {"text": sides})
  _make(tmp_path / "b", {"text": sides})
  for side, seed, folder in (
    *((side, seed, "a") for side in sides for seed in (2, 3)),
    *((side, seed, "b") for side in sides for seed in (0, 1)),
    ("msa", 3, "b"),
  ):
    shutil.rmtree(tmp_path / folder / "text" / side / f"seed{seed}")
  plan = [{"task": "text", "side": side} for side in (*sides, "msa_cpt")]
  plan = {"runs": plan, "seeds": [0], "aimed_interval": 0.6}
  (tmp_path / "b" / "comparison.json").write_text(json.dumps(plan))
  report.write(tmp_path / "a", tmp_path / "b", out=tmp_path / "out")
  summary = _summary(tmp_path / "out")
  task = summary["tasks"]["text"]
  (found,) = task["gaps"]["msa"]
  assert found["seeds"] == [0, 1, 2]
  np.testing.assert_allclose(found["percents"], [1.0, 2.0, 3.0])
  # Student's t with 2 degrees of freedom, and chi squared: 7.3778 and 0.0506.
  # 2.1788 (12 degrees) / 13**0.5 = 0.6043, 2.1604 (13) / 14**0.5 = 0.5774.
  (row,) = task["differences_by_seed"]
  assert row == {
    "side": "MSA", "difference in": "held-out loss (%)", "seeds": "3",
    "mean": "+2.00 ± 2.48", "standard deviation": "1.00 (0.52 to 6.28)",
    "seeds for ± 0.6 %": "14", "by seed": "0: +1.00, 1: +2.00, 2: +3.00",
  }  # fmt: skip
  assert "1.00 %, it takes 14 seeds." in task["verdicts"][-1]
  page = (tmp_path / "out" / "report" / "report.html").read_text()
  assert "Sides have different seeds here" in page
  assert summary["warnings"] == [
    "text/msa lacks seed 3: a gap is of the seeds that both of its sides have.",
    "text/msa_cpt lacks seeds 0 to 3: a gap is of the seeds that both of its"
    " sides have.",
  ]


def test_words_follow_the_interval(pair):
  tasks = _summary(pair.parent.parent)["tasks"]
  (text,) = tasks["text"]["verdicts"]
  assert "excludes 0" in text and "MSA is worse" in text
  accuracy, loss, far = tasks["recall"]["verdicts"]
  assert "+0.00 percentage points" in accuracy and "contains 0" in accuracy
  assert "nats per answer" in loss
  # 0.8 of 300 on both sides: mean over seeds, beyond the block of 8 tokens.
  assert far.count("80.0 % of 300 (ahead of chance)") == 2
  assert "Chance is 25.0 %" in far


def test_report_names_what_differs_and_what_msa_adds(pair):
  text = _page_text(pair)
  differences = _summary(pair.parent.parent)["tasks"]["text"]["differences"]
  assert differences["msa"] == {
    "model.layer_kinds": [["gqa"], ["msa"]],
    "optimizer.index_clip_norm": [1.0, 2.0],
    "recipe.index_warmup_steps": [0, 20],
    "recipe.init_from": [None, "gqa"],
  }
  assert "MSA has 24 parameters more than GQA (+2.40 %)" in text
  for word in ("abc123", "jax 0.11.2", "python -m train compare tiny", "00ff"):
    assert word in text


def test_speed_leaves_compilation_out(pair):
  rows = _summary(pair.parent.parent)["tasks"]["text"]["table"]
  # The records at steps 10 and 30, first of their phases, say 1 token/s.
  assert rows[1]["tokens/s"] == (
    "warm-up 1,020 (1,020 to 1,020), sparse 1,040 (1,040 to 1,040)"
  )


def test_one_seed_gives_no_interval(tmp_path):
  _make(tmp_path, {"text": {"gqa": [1.0], "msa": [1.02]}})
  page = report.write(tmp_path)
  text = _page_text(page)
  (found,) = _summary(tmp_path)["tasks"]["text"]["gaps"]["msa"]
  assert found["interval"] is None
  assert "This is one seed, so there is no interval" in text
  assert "in 2 of 2 held-out batches" in text
  assert "the mean of" not in text  # an interval over batches, not seeds
  # Captions speak of what is drawn.
  captions = page.read_text()
  assert "One seed a side. GQA is wider" in captions
  assert "Thin lines" not in captions and "The band" not in captions


def test_unfinished_and_missing_runs_are_named_and_left_out(tmp_path):
  losses = {"gqa": [1.0, 9.0, 1.0], "msa": [1.02, 1.0, math.nan]}
  _make(tmp_path, {"text": losses})
  (tmp_path / "text" / "msa" / "seed2" / "done.json").unlink()
  run = tmp_path / "text" / "gqa" / "seed1"
  (run / "done.json").unlink()
  with (run / "metrics.jsonl").open("a") as file:
    file.write('{"kind": "tra')  # killed while it wrote
  plan = [{"task": "text", "side": side} for side in ("gqa", "msa")]
  (tmp_path / "comparison.json").write_text(
    json.dumps({"runs": plan, "seeds": [0, 1, 2, 3]})
  )
  (tmp_path / "text" / "msa" / "seed3").mkdir()  # has nothing yet
  report.write(tmp_path)
  summary = _summary(tmp_path)
  (found,) = summary["tasks"]["text"]["gaps"]["msa"]
  assert found["seeds"] == [0]
  warnings = "\n".join(summary["warnings"])
  assert "text/gqa/seed1 is not finished (at step 40)" in warnings
  assert "text/msa/seed2 is not finished (at step 40)" in warnings
  assert "text/gqa lacks seed 3: a gap is of the seeds" in warnings
  assert "text/msa lacks seed 3: a gap is of the seeds" in warnings


def test_report_of_runs_that_only_started(tmp_path):
  _make(tmp_path, {"text": {"gqa": [1.0], "msa": [1.02]}})
  for side in ("gqa", "msa"):
    run = tmp_path / "text" / side / "seed0"
    for name in ("done.json", "metrics.jsonl", "environment.json"):
      (run / name).unlink()
  text = _page_text(report.write(tmp_path))
  assert "no seed has finished on both sides" in text


def test_other_device_or_commit_is_warned_of(tmp_path):
  _make(tmp_path, {"text": {"gqa": [1.0], "msa": [1.02]}})
  path = tmp_path / "text" / "msa" / "seed0" / "environment.json"
  _edit(path, device="H100", commit="def456")
  folders = runs.read_runs(tmp_path)
  tasks = {"text": runs.group_by_side(folders)}
  warnings = "\n".join(page.find_warnings(tasks, tmp_path))
  assert "device differs" in warnings and "cannot be compared" in warnings
  assert "commit differs" in warnings


def test_no_runs(tmp_path):
  with pytest.raises(ValueError, match="holds no runs"):
    report.write(tmp_path)


@pytest.mark.parametrize(
  "line", ["{not json", '{"step": 1}', '{"kind": "other", "step": 1}', "3"]
)
def test_corrupt_metrics_line_is_named(tmp_path, line):
  _make(tmp_path, {"text": {"gqa": [1.0]}})
  path = tmp_path / "text" / "gqa" / "seed0" / "metrics.jsonl"
  lines = path.read_text().splitlines()
  path.write_text("\n".join([*lines[:2], line, *lines[2:]]) + "\n")
  with pytest.raises(ValueError, match=rf"{re.escape(str(path))}, line 3: not"):
    report.write(tmp_path)


def test_doubled_step_is_named(tmp_path):
  _make(tmp_path, {"text": {"gqa": [1.0]}})
  path = tmp_path / "text" / "gqa" / "seed0" / "metrics.jsonl"
  lines = path.read_text().splitlines(keepends=True)
  path.write_text("".join([*lines, lines[-1]]))
  with pytest.raises(ValueError, match=r"line 9: eval step 40 follows step 40"):
    report.write(tmp_path)


def test_check_comparable_gives_the_differences():
  first = _config("text", "gqa", 0)
  other = _config("text", "msa", 0)
  other["model"]["index"]["top_k"] = 4
  found = dict(
    (field, values)
    for field, *values in runs.check_comparable([first, first, other])
  )
  assert found["model.index.top_k"] == [2, 4]
  assert found["model.layer_kinds"] == [["gqa"], ["msa"]]
  assert runs.check_comparable([first]) == []


@pytest.mark.parametrize(
  "path, value",
  [
    (("seed",), 1),
    (("num_steps",), 41),
    (("batch_size",), 3),
    (("context",), 128),
    (("data", "tokenizer"), "bpe"),
    (("optimizer", "learning_rate"), 2e-3),
    (("model", "num_layers"), 3),
    (("model", "dtype"), "bfloat16"),
    (("model", "qk_norm"), True),  # absent in the first
  ],
)
def test_check_comparable_refuses_all_but_attention(path, value):
  first, other = _config("text", "gqa", 0), _config("text", "msa", 0)
  *outer, name = path
  place = other
  for key in outer:
    place = place[key]
  before = repr(place.get(name, "absent"))
  place[name] = value
  wanted = f"{'.'.join(path)} is {before} in config 0 and {value!r} in config 1"
  with pytest.raises(ValueError, match=re.escape(wanted)):
    runs.check_comparable([first, other])


def test_refusal_leaves_the_old_report(tmp_path):
  _make(tmp_path, {"text": {"gqa": [1.0], "msa": [1.02]}})
  (tmp_path / "report").mkdir()
  (tmp_path / "report" / "report.html").write_text("old")
  path = tmp_path / "text" / "msa" / "seed0" / "environment.json"
  _edit(path, data={"name": "text", "sha256": "beef"})
  with pytest.raises(ValueError, match=r"sha256 is '00ff' in .*'beef' in"):
    report.write(tmp_path)
  assert (tmp_path / "report" / "report.html").read_text() == "old"
  assert {p.name for p in tmp_path.iterdir()} == {"report", "text"}


def test_seeds_of_a_side_share_one_config(tmp_path):
  _make(tmp_path, {"text": {"gqa": [1.0, 1.0], "msa": [1.02, 1.02]}})
  path = tmp_path / "text" / "msa" / "seed1" / "config.json"
  _edit(path, recipe={"index_warmup_steps": 5, "init_from": None})
  with pytest.raises(ValueError, match="seeds of text/msa must share one"):
    report.write(tmp_path)


def split_by_seed(folder, target):
  """Copies a comparison's runs to a folder for each seed; returns those."""
  parts = []
  for seed in (0, 1):
    part = target / f"part{seed}"
    for path in folder.glob(f"*/*/seed{seed}"):
      shutil.copytree(path, part / path.relative_to(folder))
    runs = [{"task": "text", "side": side} for side in ("gqa", "msa")]
    plan = {"name": "x", "runs": runs, "seeds": [seed]}
    (part / "comparison.json").write_text(json.dumps(plan))
    parts.append(part)
  return parts


def test_folders_with_other_seeds_are_merged(tmp_path):
  losses = {"gqa": [1.0, 1.1], "msa": [1.02, 1.13]}
  whole = _make(tmp_path / "whole", {"text": losses})
  parts = split_by_seed(whole, tmp_path)
  other = parts[1] / "text" / "msa" / "seed1" / "config.json"
  config = json.loads(other.read_text())
  # Machines differ in these.
  _edit(other, mesh={"data": 2}, data=config["data"] | {"cache_dir": "there"})
  page = report.write(*parts, out=tmp_path / "merged")
  assert page == tmp_path / "merged" / "report" / "report.html"
  summary = _summary(tmp_path / "merged")
  (found,) = summary["tasks"]["text"]["gaps"]["msa"]
  assert found["seeds"] == [0, 1] and summary["warnings"] == []
  np.testing.assert_allclose(found["values"], [0.02 * _BITS, 0.03 * _BITS])
  assert not (parts[0] / "report").exists()
  with pytest.raises(ValueError, match=r"part0, .*part1: wanted --out, the"):
    report.write(*parts)
  out = tmp_path / "refused"
  with pytest.raises(ValueError, match="both the run text/gqa/seed0: wanted"):
    report.write(parts[0], parts[0], out=out)
  _edit(other, optimizer=config["optimizer"] | {"learning_rate": 0.5})
  with pytest.raises(ValueError, match=r"learning_rate is 0\.001 in text/gqa/"):
    report.write(*parts, out=out)
  recipe = config["recipe"] | {"index_warmup_steps": 5}
  _edit(other, optimizer=config["optimizer"], recipe=recipe)
  with pytest.raises(ValueError, match="seeds of text/msa must share one con"):
    report.write(*parts, out=out)
  assert not out.exists()


def test_a_trunk_is_the_baseline_of_its_branches(tmp_path):
  folder = _make(tmp_path, {"text": {"gqa": [1.0], "msa": [1.1]}})
  trunk, branch = (folder / "text" / s / "seed0" for s in ("gqa", "msa"))
  model = json.loads((branch / "config.json").read_text())["model"]
  recipe = {"index_warmup_steps": 40, "init_from": None}
  _edit(trunk / "config.json", model=model, recipe=recipe)
  _edit(trunk / "environment.json", parameters={"total": 1024, "index": 24})
  start = {"init_from": "there/text/gqa/seed0", "init_step": 10}
  recipe = start | {"index_warmup_steps": 0}
  _edit(branch / "config.json", recipe=recipe)
  sides = runs.group_by_side(runs.read_runs(folder))
  assert sides["gqa"][0].is_trunk and not sides["msa"][0].is_trunk
  beside, more, start = page._notes(sides)
  assert beside.startswith("GQA was trained with dense attention and an index")
  assert more.startswith("MSA has 24 parameters more than GQA (+2.40 %)")
  assert start.startswith("MSA continues from step 10 of gqa/seed0")
  assert not page.find_warnings({"text": sides}, folder)
  colors = dict.fromkeys(sides, "black")
  figure = figures.curves("text", sides, colors, runs.BITS, "step")
  marks = {str(x.get_label()): x.get_xdata() for x in figure.axes[0].lines}
  assert list(marks["MSA goes sparse"]) == [10, 10]
  assert "GQA goes sparse" not in marks


def test_pair_needs_the_same_held_out_batches(tmp_path):
  _make(tmp_path, {"text": {"gqa": [1.0], "msa": [1.02]}})
  path = tmp_path / "text" / "msa" / "seed0" / "metrics.jsonl"
  *earlier, last = _read(path)
  _write(path, [*earlier, last | {"batch_loss": [1.02]}])
  with pytest.raises(ValueError, match="with 2 and 1 held-out batches"):
    report.write(tmp_path)


def test_parameters_outside_the_index_branch_are_warned_of(tmp_path):
  _make(tmp_path, {"text": {"gqa": [1.0], "msa": [1.02]}})
  path = tmp_path / "text" / "msa" / "seed0" / "environment.json"
  _edit(path, parameters={"total": 1100, "index": 24})
  tasks = {"text": runs.group_by_side(runs.read_runs(tmp_path))}
  (warning,) = page.find_warnings(tasks, tmp_path)
  assert "outside the index branch: 1,000, 1,076" in warning


def test_reports_of_one_folder_wait_for_each_other(tmp_path):
  """Processes that train one comparison's seeds may all write its report."""
  folder = _make(tmp_path / "run", {"text": {"gqa": [1.0], "msa": [1.0]}})
  paths = []
  with page._alone(folder):
    unfinished = folder / ".report-another"
    unfinished.mkdir()
    second = threading.Thread(target=lambda: paths.append(report.write(folder)))
    second.start()
    second.join(0.5)
    assert second.is_alive() and unfinished.exists()
  second.join()
  assert paths == [folder / "report" / "report.html"]
  assert not list(folder.glob(".report-*"))


def test_every_ablation_of_a_preset_is_known():
  for name in ("ablations", "lm13m_4k_ablations"):
    for run in configs.preset(name).runs:
      expected = run.side not in (runs.BASELINE, tables.METHOD)
      assert (tables.ablation(run.side) is not None) == expected, run.side


def test_ablations_stand_beside_the_papers_findings(tmp_path):
  losses = {
    "gqa": [1.0, 1.1],
    "msa": [1.0, 1.2],
    "no_warmup": [1.1, 1.32],
    "input_not_detached": [1.5, 1.6],
  }
  folder = _make(tmp_path / "run", {"text": losses})
  broken = folder / "text" / "input_not_detached" / "seed1"
  (broken / "done.json").unlink()
  (broken / "broken.json").write_text('{"step": 30, "why": "loss nan"}')
  text = _page_text(report.write(folder))
  found = _summary(folder)["tasks"]["text"]["ablations"]
  assert [row["side"] for row in found] == ["input not detached", "no warmup"]
  for row, (paper, gap, seeds) in zip(
    found,
    [
      (
        "diverges or degrades",
        "+50.00 %",
        "1 of 2; seed 1 broke down at step 30",
      ),
      # Ten percent in both seeds.
      ("worse", "+10.00 % (+10.00 to +10.00)", "2 of 2"),
    ],
    strict=True,
  ):
    assert row["the paper"] == paper and row["seeds"] == seeds
    assert row["held-out loss − MSA"] == gap
  assert "broke down at step 30 (loss nan)" in text


def test_retrieval_is_compared_at_each_distance(tmp_path):
  folder = _make(tmp_path / "run", {"recall": {"gqa": [0.1], "msa": [0.4]}})
  report.write(folder)
  near, far = _summary(folder)["tasks"]["recall"]["by_distance"]["msa"]
  assert (near["low"], near["difference"], near["error"]) == (2, 0.0, 0.0)
  assert far["count"] == 100 and far["difference"] == pytest.approx(-0.3)
  # Of two shares of 100 answers each: 0.9 and 0.6.
  assert far["error"] == pytest.approx(((0.09 + 0.24) / 100) ** 0.5)


def test_probes_are_compared_by_number_and_with_the_oracle(tmp_path):
  folder = _make(tmp_path, {"probes": {"gqa": [1.0] * 2, "msa": [1.0] * 2}})

  def answers(near, far):
    return {
      "copy_accuracy": (near + far) / 2,
      "copy_by_distance": [
        {"low": 8, "high": 16, "accuracy": near, "count": 50},
        {"low": 16, "high": 32, "accuracy": far, "count": 50},
      ],
      # The count of words has no distance.
      "common_words_accuracy": near,
      "common_words_by_distance": None,
      "common_words_by_number": [
        {"number": number, "accuracy": near, "count": 50, "rows": 50}
        for number in (10, 25)
      ],
    }

  for path in folder.glob("probes/*/*/metrics.jsonl"):
    msa = path.parent.parent.name == "msa"
    shares = answers(0.9, 0.6 if msa else 0.8)
    rows = [r | shares if r["kind"] == "eval" else r for r in _read(path)]
    if msa:
      rows.append(rows[-1] | {"kind": "oracle_eval"} | answers(0.9, 0.7))
    _write(path, rows)
    file = path.parent / "environment.json"
    environment = json.loads(file.read_text())
    environment["data"]["chance"] = {"copy": 0.0625, "common_words": 0.25}
    file.write_text(json.dumps(environment))
  out = report.write(folder)
  task = _summary(folder)["tasks"]["probes"]
  near, far = (
    {side: bins[i] for side, bins in task["copy_by_distance"].items()}
    for i in range(2)
  )
  assert near["msa"]["difference"] == near["msa oracle"]["difference"] == 0
  assert far["msa"]["difference"] == pytest.approx(-0.2)
  assert far["msa oracle"]["difference"] == pytest.approx(-0.1)
  assert far["msa oracle"]["count"] == 100
  words = task["common_words_by_number"]["msa"]
  assert [row["number"] for row in words] == [10, 25]
  assert task["common_words_by_distance"] == {}
  sides, found = runs.group_by_side(runs.read_runs(folder)), {}
  colors = dict.fromkeys(sides, "C0")
  for probe in runs.probes_of([sides["msa"][0].final]):
    figure = figures.distance_figure("probes", sides, colors, probe)
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.lines}
    found[probe.name] = axes.get_xlabel()
    chance = 100 * environment["data"]["chance"][probe.name]
    assert list(lines["chance"].get_ydata()) == [chance] * 2
    shown = lines["MSA, oracle's blocks (2 seeds)"].get_ydata()
    wanted = [90, 70] if probe.name == "copy" else [90, 90]
    np.testing.assert_allclose(shown, wanted)
  assert found == {
    "copy": "Distance back to the fact (tokens)",
    "common_words": "Lead of the commonest word (%)",
  }
  text = out.read_text()
  assert "MSA with the oracle&#x27;s blocks − GQA, points" in text
  assert "<td>25.0</td>" in text and "<td>6.2</td>" in text


def test_seeds_may_differ_in_what_is_evaluated_more_at_the_end(tmp_path):
  """Each number is shown with the number of the seeds that have it."""
  folder = _make(tmp_path, {"text": {"gqa": [1.0] * 3, "msa": [1.0] * 3}})
  by_number = [{"number": 4, "accuracy": 0.5, "count": 8, "rows": 8}]
  for path in folder.glob("text/*/*/metrics.jsonl"):
    side, seed = path.parts[-3:-1]
    shares = {"copy_accuracy": 0.5, "copy_by_number": by_number}
    rows = [r | shares if r["kind"] == "eval" else r for r in _read(path)]
    if side == "msa":
      rows.append(rows[-1] | {"kind": "dense_eval"})
    if (side, seed) == ("msa", "seed2"):
      rows.append(rows[-1] | {"kind": "oracle_eval"})
    _write(path, rows)
  for side in ("gqa", "msa"):
    config = folder / "text" / side / "seed2" / "config.json"
    _edit(config, oracle_at_end=True, samples=2)
  text = report.write(folder).read_text()
  seeds = [
    (
      row["seeds"],
      *(row[f"held-out loss (bits per byte){way}"] for way in ways),
    )
    for row in _summary(folder)["tasks"]["text"]["dense"]
    for ways in [tables._WAYS]
  ]
  assert [
    (number, *(value != "–" for value in values)) for number, *values in seeds
  ] == [("3", True, False, True), ("1", True, True, True)]
  assert "oracle&#x27;s blocks − GQA, points (1 of 3 seeds)" in text
  sides = runs.group_by_side(runs.read_runs(folder))
  (probe,) = runs.probes_of([sides["msa"][0].final])
  colors = dict.fromkeys(sides, "C0")
  figure = figures.distance_figure("text", sides, colors, probe)
  labels = {line.get_label() for axes in figure.axes for line in axes.lines}
  assert {"MSA (3 seeds)", "MSA, oracle's blocks (1 seed)"} <= labels
  # A number that all seeds have must be the same number.
  _edit(config, eval_batches=3)
  with pytest.raises(ValueError, match="and 3 in text/msa/seed2"):
    report.write(folder)


def test_what_the_choice_costs_is_told_apart(tmp_path):
  # GQA's last seed was made before losses by position were recorded.
  losses = {"text": {"gqa": [1.0, 1.2, 5.0], "msa": [1.1, 1.4, 5.0]}}
  folder = _make(tmp_path / "run", losses)

  def bins(near, far):
    places = ((0, 2, near), (2, 4, far))
    return [
      {"low": low, "high": high, "loss": loss, "count": 8}
      for low, high, loss in places
    ]

  for side, seeds in losses["text"].items():
    for seed, loss in enumerate(seeds[: 2 if side == "gqa" else 3]):
      path = folder / "text" / side / f"seed{seed}" / "metrics.jsonl"
      *earlier, last = _read(path)
      last |= {"loss_by_position": bins(loss, loss + 0.2)}
      added = [last]
      if side == "msa":
        # With dense attention the loss of the first bin, all of whose tokens
        # a sparse query reads too, stays; that of the second is 0.1 lower.
        dense_bins = {"loss_by_position": bins(loss, loss + 0.1)}
        added.append(last | {"kind": "dense_eval", "loss": loss} | dense_bins)
        oracle = {"kind": "oracle_eval", "bits_per_byte": 0.5 + seed / 4}
        added.append(last | oracle)
      else:
        window = {"kind": "window_eval", "window": 2, "window_most": 3}
        seen = {"loss_by_position": bins(loss, 1.1 * (loss + 0.2))}
        added.append(last | window | seen | {"loss": 1.05 * loss})
      _write(path, [*earlier, *added])
  for side in ("gqa", "msa"):
    sample = {"prompt": "if <", "sample": f"{side} >", "text": "a:"}
    path = folder / "text" / side / "seed0" / "samples.json"
    path.write_text(json.dumps([sample]))
  report.write(folder)
  task = _summary(folder)["tasks"]["text"]
  near, far = task["loss_by_position"]["msa"]
  assert (near["low"], near["high"], near["count"]) == (0, 2, 16)
  assert near["by_seed"] == pytest.approx([0.1, 0.2])
  for row, base, gap, dense in (
    (near, 1.1, 0.15, 0.15),
    (far, 1.3, 0.15, 0.05),
  ):
    found = row["baseline"], row["difference"], row["dense_difference"]
    assert found == pytest.approx((base, gap, dense))
  assert (
    "2 to 3 tokens alone, GQA's held-out loss changes by +5.00 % (2"
    in (task["verdicts"][-1])
  )
  (row,) = task["dense"]
  assert (row["side"], row["seeds"]) == ("MSA", "3")
  metric = "held-out loss (bits per byte)"
  oracle = f"{metric}, with the oracle's blocks"
  assert list(row) == [
    *("side", "seeds", metric, oracle, f"{metric}, with dense attention")
  ]
  assert row[oracle].startswith("0.7500 ")
  # The mean over the two seeds with losses by position.
  assert task["window"] == [
    {
      "side": "GQA",
      "seeds": "2",
      "tokens seen": "the last 2 to 3",
      "all targets": "1.1000 → 1.1550 (+5.00%)",
      "after 2 to 3 tokens": "1.3000 → 1.4300 (+10.00%)",
    }
  ]
  assert (folder / "report" / "text_position.png").exists()
  page = (folder / "report" / "report.html").read_text()
  assert "What choosing blocks costs after training" in page
  (row,) = task["samples"]
  assert row == {
    "": "1", "prompt (its end)": "if <", "text": "a:", "GQA": "gqa >",
    "MSA": "msa >",
  }  # fmt: skip
  assert "if &lt;" in page and "msa &gt;" in page


def test_loss_by_place_is_paired_by_seed(tmp_path):
  """Each side's gap is of its own seeds, also where no seed is in all sides."""
  losses = {"gqa": [1.0, 3.0, 5.0], "msa": [1.5, 3.1], "msa_cpt": [0, 0, 5.2]}
  _make(tmp_path, {"text": losses | {"no_warmup": [1.0, 3.0]}})
  for side, seeds in losses.items():
    for seed, loss in enumerate(seeds):
      path = tmp_path / "text" / side / f"seed{seed}" / "metrics.jsonl"
      *earlier, last = _read(path)
      bins = [
        {"low": 2**i, "high": 2 ** (i + 1), "loss": loss, "count": 8}
        for i in range(2)
      ]
      if loss:  # else the seed was not measured
        _write(path, [*earlier, last | {"loss_by_position": bins}])
  sides = runs.group_by_side(runs.read_runs(tmp_path))
  found = gaps.gaps_by_position(gaps.paired_runs(sides))
  assert found.keys() == {"msa", "msa_cpt"}
  for side, by_seed, mean in (
    ("msa", [0.5, 0.1], 0.3),
    ("msa_cpt", [0.2], 0.2),
  ):
    for row in found[side]:
      assert row["baseline"] == 3.0  # of all three seeds
      assert row["by_seed"] == pytest.approx(by_seed)
      assert row["difference"] == pytest.approx(mean)
  colors = figures.side_colors(sides)
  figure = figures.position_figure("text", sides, colors, found)
  drawn = [line.get_ydata() for line in figure.axes[1].lines]
  for height in (0.3, 0.5, 0.1, 0.2):  # both means and the seeds of the first
    assert any(y == pytest.approx([height] * 2) for y in drawn if len(y) == 2)


def test_a_legend_of_many_sides_covers_no_panel(tmp_path):
  names = ["gqa", *(f"a_change_with_a_long_name_{i}" for i in range(8))]
  folder = _make(tmp_path, {"text": {name: [1.0] for name in names}})
  sides = runs.group_by_side(runs.read_runs(folder))
  bins = [
    {
      "low": 2**i,
      "high": 2 ** (i + 1),
      "count": 8,
      "baseline": 3.0,
      "difference": 0.1,
      "by_seed": [0.1],
      "dense_difference": 0.2,
    }
    for i in range(2)
  ]
  found = {side: bins for side in names[1:]}
  colors = figures.side_colors(sides)
  figure = figures.position_figure("text", sides, colors, found)
  figure.draw_without_rendering()
  (legend,) = figure.legends
  for axes in figure.axes:
    assert not legend.get_window_extent().overlaps(axes.get_window_extent())


def test_a_side_without_an_index_has_no_panel_of_kl(tmp_path):
  folder = _make(tmp_path, {"text": {"gqa": [1.0], "msa": [1.0]}})
  _measure_recalls(folder / "text/msa/seed0", [{"kl": None}] * 2)
  sides = runs.group_by_side(runs.read_runs(folder))
  figure = figures.layers_figure("text", "msa", sides["msa"])
  titles = [axes.get_title() for axes in figure.axes]
  assert titles[:2] == ["Block recall", "Score recall"]


def test_answers_are_told_by_what_was_chosen(tmp_path):
  folder = _make(tmp_path, {"mix": {"gqa": [1.0] * 3, "msa": [1.0] * 3}})
  counts = ("found", "found_right", "missed", "missed_right")
  layers = [
    {"layer": i, **dict(zip(counts, row))}
    for i, row in enumerate([(8, 8, 2, 1), (10, 9, 0, 0)])
  ]
  places = [{"low": 2, "high": 4, "accuracy": 0.5, "count": 8}]
  answers = {"needle_accuracy": 0.5, "needle_by_distance": places}
  for path in folder.glob("mix/*/*/metrics.jsonl"):
    rows = [r | answers if r["kind"] == "eval" else r for r in _read(path)]
    if path.parent.parent.name == "msa" and path.parent.name != "seed1":
      rows[-1]["needle_by_choice"] = layers
    _write(path, rows)
  report.write(folder)
  first, second = _summary(folder)["tasks"]["mix"]["by_choice"]
  assert first == {
    "side": "MSA",
    "seeds": "2",
    "facts": "needle",
    "layer": "0",
    "in chosen blocks": "80.0 % of 20",
    "of these right": "100.0 % of 16",
    "of the others right": "50.0 % of 4",
  }
  assert second["of the others right"] == "–"


@pytest.mark.parametrize("times", [1.2, 1.4])
def test_seeds_of_unlike_speed_are_warned_of(tmp_path, times):
  _make(tmp_path, {"text": {"gqa": [1.0, 1.1], "msa": [1.0, 1.1]}})
  path = tmp_path / "text" / "msa" / "seed1" / "metrics.jsonl"
  rows = _read(path)
  for row in rows:
    if row["kind"] == "train" and row["phase"] == "sparse":
      row["tokens_per_second"] *= times
  _write(path, rows)
  tasks = {"text": runs.group_by_side(runs.read_runs(tmp_path))}
  warnings = page.find_warnings(tasks, tmp_path)
  said = "text/msa: tokens/s of its seeds differ by up to 1.4x"
  assert [said in w for w in warnings] == [True] * (times > 1.3)


def _set_speeds(folder, side, speeds):
  """Gives the log intervals of seed 0, but for the first, these tokens/s."""
  path = folder / "text" / side / "seed0" / "metrics.jsonl"
  rows = _read(path)
  _, *train = [row for row in rows if row["kind"] == "train"]
  for row, speed in zip(train, speeds, strict=True):
    row["tokens_per_second"] = speed
  _write(path, rows)


@pytest.mark.parametrize("dense", [900.0, 250.0])
def test_sides_of_unlike_conditions_are_warned_of(tmp_path, dense):
  """A warm-up computes all that the baseline does, so it cannot be faster."""
  _make(tmp_path, {"text": {"gqa": [1.0], "msa": [1.0]}})
  _set_speeds(tmp_path, "gqa", [dense] * 3)
  report.write(tmp_path)
  said = "GQA ran at 250 tokens/s and the warm-up of MSA at 1,020"
  summary = _summary(tmp_path)
  assert [said in w for w in summary["warnings"]] == [True] * (dense < 900)
  # The table of the speeds says it too.
  text = _page_text(tmp_path / "report" / "report.html")
  assert text.count(said) == 2 * (dense < 900)
  # But where it leaves the backbone as it is.
  config = tmp_path / "text" / "msa" / "seed0" / "config.json"
  recipe = json.loads(config.read_text())["recipe"]
  _edit(config, recipe=recipe | {"freeze_backbone": True})
  tasks = {"text": runs.group_by_side(runs.read_runs(tmp_path))}
  assert not any(said in w for w in page.find_warnings(tasks, tmp_path))


def test_a_run_of_changing_speed_is_warned_of(tmp_path):
  _make(tmp_path, {"text": {"gqa": [1.0], "msa": [1.0]}})
  _set_speeds(tmp_path, "gqa", [1000.0, 1500.0, 2000.0])
  report.write(tmp_path)
  summary = _summary(tmp_path)
  (warning,) = summary["warnings"]
  assert "text: tokens/s changed during these runs" in warning
  assert "gqa/seed0 (dense) 1,250 to 1,750." in warning
  rows = summary["tasks"]["text"]["table"]
  assert rows[0]["tokens/s"] == "dense 1,500 (1,250 to 1,750)"


def test_a_side_without_an_index_shows_none_of_its_fields(pair):
  page, text = pair.read_text(), _page_text(pair)
  assert "<td>optimizer.index_clip_norm</td><td>–</td><td>2.0</td>" in page
  assert "<td>recipe.index_warmup_steps</td><td>–</td><td>20</td>" in page
  config = text.split("<summary>Config of GQA")[1].split("</details>")[0]
  assert "learning_rate" in config
  assert "index" not in config and "recipe" not in config
  (gqa, msa) = _summary(pair.parent.parent)["tasks"]["text"]["table"]
  assert gqa["of these, index branch"] == "–"
  assert msa["of these, index branch"].startswith("24 (")


def test_training_loss_is_drawn_and_steps_are_whole(tmp_path):
  _make(tmp_path, {"text": {"gqa": [1.0, 1.2], "msa": [1.1, 1.3]}})
  sides = runs.group_by_side(runs.read_runs(tmp_path))
  colors = figures.side_colors(sides)
  figure = figures.train_figure("text", sides, colors)
  assert figure is not None
  (axes,) = figure.axes
  lines = {line.get_label(): line for line in axes.lines}
  mean = np.asarray(lines["GQA (2 seeds)"].get_ydata())
  np.testing.assert_allclose(mean, [2.6, 2.1, 1.6, 1.1])
  for count in (1, 3, 5):  # a short run must not get ticks such as 0.5
    axes.set_xlim(0, count)
    ticks = axes.xaxis.get_major_locator()()
    assert all(float(tick).is_integer() for tick in ticks)


def test_words_of_pictures_are_not_cut(tmp_path):
  """Titles and legends that are wider than a figure widen its picture."""
  from matplotlib import image

  out = page._Page(tmp_path, {})
  figure = figures.Figure(figsize=(2, 2), dpi=100, layout="constrained")
  figure.suptitle("a title of many more words than two inches have room for")
  out.add_figure(figure, "narrow", "")
  picture = image.imread(tmp_path / "narrow.png")[..., :3]
  assert picture.shape[1] > 300
  # Nothing is drawn on the edges: no word goes on beyond them.
  assert (picture[:, [0, -1]] == 1).all() and (picture < 0.5).any()


def test_one_seed_has_an_interval_over_held_out_batches(tmp_path):
  folder = _make(tmp_path / "run", {"text": {"gqa": [1.0], "msa": [1.1]}})
  run = folder / "text" / "msa" / "seed0"
  rows = _read(run / "metrics.jsonl")
  rows[-1]["batch_loss"] = [1.0, 1.2]  # of gqa: 0.99, 1.01
  _write(run / "metrics.jsonl", rows)
  report.write(folder)
  (gap,) = _summary(folder)["tasks"]["text"]["gaps"]["msa"]
  # Differences 0.01 and 0.19: mean 0.1, standard error 0.09, t of one degree.
  low, high = gap["batch_percent_interval"]
  assert (low, high) == pytest.approx(
    (10 - 12.706 * 9, 10 + 12.706 * 9), rel=1e-3
  )
  assert gap["interval"] is None


def test_speed_is_drawn_where_it_was_measured(tmp_path):
  folder = _make(tmp_path / "run", {"text": {"gqa": [1.0], "msa": [1.1]}})
  shared = {"batch_size": 1, "trained_steps": 40, "tokens_per_second": 2.0}
  shared |= {"mfu": 0.25, "peak_bytes": 3 << 30}
  rows = [
    {"side": side, "phase": phase, "context": context, "step_ms": ms} | shared
    for side, phase, context, ms in (
      ("gqa", "dense", 4096, 10.0),
      ("gqa", "dense", 16384, 30.0),
      ("msa", "sparse", 4096, 12.0),
      ("msa", "sparse", 16384, 20.0),
    )
  ]
  about = {"device": "H", "started": "now", "command": "speed", "rows": rows}
  (folder / "speed.json").write_text(json.dumps(about))
  text = _page_text(report.write(folder))
  assert (folder / "report" / "speed.png").exists()
  for cell in ("0.83x", "1.50x", "25.0 %", "3.00 GiB"):
    assert f"<td>{cell}</td>" in text


def test_wall_time_of_a_late_start_holds_the_time_before_it(tmp_path):
  folder = _make(tmp_path, {"text": {"gqa": [1.0], "msa": [1.1]}})
  path = folder / "text" / "msa" / "seed0" / "config.json"
  recipe = {"index_warmup_steps": 5, "init_from": "there/text/gqa/seed0"}
  _edit(path, recipe=recipe | {"init_step": 25})
  sides = runs.group_by_side(runs.read_runs(folder))
  colors = dict.fromkeys(sides, "black")
  figure = figures.curves("text", sides, colors, runs.BITS, "seconds")
  lines = {str(x.get_label()): x.get_xdata() for x in figure.axes[0].lines}
  assert list(lines["GQA (1 seed)"]) == [1.0, 2.0, 3.0, 4.0]
  # GQA's last record up to step 25 says 2 seconds.
  assert list(lines["MSA (1 seed)"]) == [3.0, 4.0, 5.0, 6.0]


def _measure_recalls(run, recalls):
  """Sets fields of the two layers in all of a run's layer records."""
  rows = _read(run / "metrics.jsonl")
  for row in rows:
    for layer, fields in zip(row.get("layers", ()), recalls):
      layer |= fields
  _write(run / "metrics.jsonl", rows)


def _dotted(folder):
  """The dotted lines of the panel of score recall, and the legend's words."""
  sides = runs.group_by_side(runs.read_runs(folder))
  figure = figures.layers_figure("text", "msa", sides["msa"])
  (axes,) = (a for a in figure.axes if a.get_title() == "Score recall")
  lines = [x.get_ydata() for x in axes.lines if x.get_linestyle() == ":"]
  return lines, [x.get_text() for x in figure.legends[0].get_texts()]


def test_score_recall_stands_beside_the_best(tmp_path):
  losses = {"gqa": [1.0, 1.1], "msa": [1.0, 1.2], "no_warmup": [1.1, 1.32]}
  folder = _make(tmp_path / "run", {"text": losses})
  for seed, (score, best) in enumerate([(0.4, 0.5), (0.6, 0.7)]):
    fields = {"score_recall": score, "best_score_recall": best}
    unknown = {"score_recall": None, "best_score_recall": None}
    _measure_recalls(folder / f"text/msa/seed{seed}", [fields, unknown])
  # An older run, which did not measure the best.
  _measure_recalls(folder / "text/no_warmup/seed0", [{"score_recall": 0.3}] * 2)
  (folder / "text/no_warmup/seed1/done.json").unlink()
  page = report.write(folder)
  table = _summary(folder)["tasks"]["text"]["layers"]
  found = [tuple(row.values()) for row in table]
  assert list(table[0])[2:] == [
    "block recall",
    "score recall",
    "best score recall",
    "of the best",
  ]
  assert found == [
    ("MSA", "0", "0.500", "0.500", "0.600", "0.833"),
    ("MSA", "1", "0.500", "–", "–", "–"),
    ("MSA", "mean", "0.500", "–", "–", "–"),
    ("no warmup", "0", "0.500", "0.300", "–", "–"),
    ("no warmup", "1", "0.500", "0.300", "–", "–"),
    ("no warmup", "mean", "0.500", "0.300", "–", "–"),
  ]
  (ablation,) = _summary(folder)["tasks"]["text"]["ablations"]
  assert ablation["score recall"] == "0.300"
  assert "no choice holds more" in _page_text(page)
  lines, words = _dotted(folder)
  np.testing.assert_allclose(lines, [[0.6] * 4, [math.nan] * 4])
  assert "best possible" in words


def test_report_of_runs_that_did_not_measure_the_best(tmp_path):
  losses = {"gqa": [1.0], "msa": [1.0], "no_warmup": [1.1]}
  folder = _make(tmp_path / "run", {"text": losses})
  for side in ("msa", "no_warmup"):
    run = folder / "text" / side / "seed0"
    _measure_recalls(run, [{"score_recall": x} for x in (0.3, 0.5)])
  text = _page_text(report.write(folder))
  found = _summary(folder)["tasks"]["text"]
  assert found["layers"][2] == {
    "side": "MSA",
    "layer": "mean",
    "block recall": "0.500",
    "score recall": "0.400",
  }
  assert found["ablations"][0]["score recall"] == "0.400"
  # The best score recall was not measured, so the page does not mention it.
  for words in ("best score recall", "of the best", "no choice holds more"):
    assert words not in text.lower()
  lines, words = _dotted(folder)
  assert not lines and "best possible" not in words


def test_ablations_show_the_best_where_it_was_measured(tmp_path):
  losses = {"gqa": [1.0], "msa": [1.0], "no_warmup": [1.1]}
  losses["block_32"] = [1.2, 1.2]
  folder = _make(tmp_path / "run", {"text": losses})
  fields = [{"score_recall": 0.3, "best_score_recall": x} for x in (0.4, 0.5)]
  _measure_recalls(folder / "text/no_warmup/seed0", fields)
  # Only one of two seeds measured the best score recall. It is no bound for
  # the mean of both, so the table shows none.
  _measure_recalls(folder / "text/block_32/seed0", fields)
  _measure_recalls(folder / "text/block_32/seed1", [{"score_recall": 0.3}] * 2)
  report.write(folder)
  found = _summary(folder)["tasks"]["text"]["ablations"]
  best = {row["side"]: row["best score recall"] for row in found}
  assert best == {"block 32": "–", "no warmup": "0.450"}


def test_layer_numbers_on_one_line():
  layers = [
    {"kl": None, "block_recall": 0.5, "score_recall": x, "best_score_recall": y}
    for x, y in ((0.4, 0.5), (0.6, 0.7))
  ]
  assert progress._note({"kind": "layers", "layers": layers}) == (
    "layers: block_recall 0.500  score_recall 0.500  best_score_recall 0.600"
  )
