"""The presets with the kernels, and the commands that run them, on the CPU.

The runs are tiny, and ask for the portable implementation with --set as the
presets' docstring says.
"""

import dataclasses
import fractions
import importlib
import json
import pathlib
import re
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import launches

from msa_jax import selection_stats
from msa_jax.model_config import IndexConfig, MoEConfig
from train import __main__ as cli
from train import compare, configs, data, evaluate, plan, program, speed
from train import config as config_lib
from train.configs import lm73m_16k

PRESETS = ("lm73m_16k", "lm13m_4k", "lm13m_4k_ablations")
TINY = (
  *("model.implementation=xla", "model.gqa_implementation=xla"),
  *("model.dtype=float32", "model.vocab_size=384", "model.num_layers=1"),
  *("model.embed_dim=32", "model.num_heads=4", "model.head_dim=8"),
  *("model.mlp_dim=32", "model.rope_dim=8", "model.index.index_dim=8"),
  *("model.index.block_size=8", "model.index.top_k=4"),
  *("context=128", "batch_size=2", "eval_batches=2"),
  "probe_batches=2",
  "final_probe_batches=3",
  *("log_every=1", "data.text.vocab_size=320", "data.text.installed=false"),
  *("data.recall.num_keys=8", "data.recall.num_values=4"),
  *("data.recall.num_facts=8", "data.num_needles=6"),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> pathlib.Path:
  place = tmp_path_factory.mktemp("commands")
  text = place / "text"
  text.mkdir()
  rng = np.random.default_rng(0)
  words = ["alpha", "beta", "gamma", "def f(x):\n", "return x\n"]
  for i in range(40):
    (text / f"{i}.txt").write_text(" ".join(rng.choice(words, 200)))
  return place


@pytest.fixture(scope="module")
def tiny(place) -> list[str]:
  paths = {"path": place / "text", "cache_dir": place / "cache"}
  return [*TINY, *(f"data.text.{n}={path}" for n, path in paths.items())]


def program_of(run: config_lib.RunConfig) -> program.Program:
  return program.Program(program.compile_key(run))


def without_extras(patch: pytest.MonkeyPatch) -> None:
  """Leaves only the packages that training on a GPU machine must find."""
  for name in ("tyro", "tensorboardX", "rich", "pyarrow", "safetensors"):
    for known in [m for m in sys.modules if m.split(".")[0] == name]:
      patch.delitem(sys.modules, known)
    patch.setitem(sys.modules, name, None)


# ---------------------------------------------------------------- config


def test_fields_are_set_with_their_types():
  comparison = configs.preset("lm73m_16k")
  fields = ["context=256", "model.dtype=float32", "data.text.path=there"]
  fields.append("data.text.installed=false")
  for run in config_lib.with_fields(comparison, fields).runs:
    assert (run.context, run.model.dtype) == (256, "float32")
    assert run.data.text.path == "there"
  for wrong, text in {
    "context": "wanted FIELD=VALUE",
    "model.depth=3": "'model.depth' is no field of a RunConfig",
    "learning_rate=1": "did you mean optimizer.learning_rate?",
    "model.implementaton=xla": "did you mean model.implementation",
    "recipe.depth=3": "; recipe has kl_weight, index_warmup_steps",
    "context=long": "context='long': wanted int",
    "context=0": "context=0",
    "data=text": "wanted fields with a 'type' that is one of ['Factory",
    "model.layer_kinds=msa": "wanted a list ['gqa', 'msa', ...]",
    "model.implementation=cuda": "wanted 'reference' or 'xla' or 'mosaic_gpu'"
    " or null",
  }.items():
    with pytest.raises(ValueError) as error:
      config_lib.with_fields(comparison, [wrong])
    assert text in str(error.value)


def test_an_interrupted_command_says_how_to_go_on(monkeypatch, capsys):
  def interrupted(*arguments, **options):
    raise KeyboardInterrupt

  monkeypatch.setattr("train.compare.compare", interrupted)
  assert cli.main(["compare", "smoke"]) == 130
  text = "interrupted; the same command goes on from the last checkpoint."
  assert text in capsys.readouterr().err


@pytest.mark.parametrize("name", PRESETS)
def test_a_longer_comparison_keeps_its_shares(name):
  comparison = configs.preset(name)
  longer = config_lib.with_step_unit(comparison, 7)
  for old, new in zip(comparison.runs, longer.runs):
    ratio = fractions.Fraction(new.num_steps, old.num_steps)
    assert new.eval_every == ratio * old.eval_every
    assert new.keep_steps == tuple(ratio * step for step in old.keep_steps)
    assert new.optimizer.warmup_steps == ratio * old.optimizer.warmup_steps
    first = ratio * (old.recipe.first_sparse_step - 1)
    assert new.recipe.first_sparse_step - 1 == first
    assert new.log_every == old.log_every
  unit = config_lib.step_unit(comparison)
  assert config_lib.with_step_unit(longer, unit) == comparison


@pytest.mark.parametrize("name", configs.names())
def test_a_preset_says_what_a_row_of_text_is(name):
  of_runs = [run.data for run in configs.preset(name).runs]
  texts = [getattr(x, "text", x) for x in of_runs]
  rows = {x.rows for x in texts if isinstance(x, data.TextConfig)}
  text = importlib.import_module(f"train.configs.{name}").__doc__
  assert set(re.findall(r'rows="(\w+)"', text)) == rows


def test_the_presets_are_what_they_say():
  large = configs.preset("lm73m_16k")
  gqa, msa, cpt, _ = large.runs
  for run in large.runs:
    model = run.model
    assert model.implementation == "mosaic_gpu" and run.context >= 1 << 14
    assert model.num_kv_heads >= 2 and model.head_dim == 128
  assert gqa.model.gqa_implementation == "cudnn"
  assert msa.model.index.block_size * msa.model.index.top_k == 2048
  starts = [run.recipe.init_step or 0 for run in large.runs]
  assert [step / gqa.num_steps for step in starts] == [0, 0.1, 0.85, 0.5]
  assert [run.goes_sparse for run in large.runs] == [False, True, True, True]
  # They share a program, and so its compilation.
  assert len({program.compile_key(run) for run in large.runs}) == 1
  dense, timed = speed.runs_with_own_steps(large.runs)
  assert dense == lm73m_16k.GQA
  recipe = config_lib.RecipeConfig(index_warmup_steps=cpt.num_steps // 10)
  assert timed == dataclasses.replace(msa, recipe=recipe)
  sizes = program_of(
    dataclasses.replace(
      dense, model=dataclasses.replace(dense.model, gqa_implementation="xla")
    )
  ).count_parameters()
  assert sizes["total"] >= 60e6
  # Ids of the mix, without tokenizing anything.
  recall = data.load(gqa.data.recall)
  text_ids = gqa.data.text.vocab_size
  assert text_ids + recall.vocab_size <= gqa.model.vocab_size
  ablations = {r.side: r for r in configs.preset("lm13m_4k_ablations").runs}
  for side, run in ablations.items():
    index = run.model.index
    assert side == "gqa" or index.block_size * index.top_k == 512
    assert run.model.implementation == "mosaic_gpu", side
  # Runs of the one can be copied to the other.
  seeds = {r.side: r for r in configs.preset("lm13m_4k").runs}
  assert [ablations[side] for side in ("gqa", "msa")] == [
    seeds[side] for side in ("gqa", "msa")
  ]


@pytest.mark.parametrize(
  ("preset", "side", "phase"),
  [
    ("lm13m_4k", "gqa", "dense"),
    ("lm73m_16k", "msa", "warmup"),
    # Traced below, and its kernels are lowered in their own files.
    pytest.param("lm73m_16k", "msa", "sparse", marks=pytest.mark.slow),
    ("lm13m_4k_ablations", "fixed_window", "warmup"),
    # Its kernels are lowered in tests/test_kernels_masked.py.
    pytest.param("probes_4k", "gqa", "dense", marks=pytest.mark.slow),
    pytest.param("probes_4k", "msa", "warmup", marks=pytest.mark.slow),
    # Its kernels are lowered in tests/test_kernels_packed.py.
    pytest.param("probes_4k", "msa_cpt", "sparse", marks=pytest.mark.slow),
  ],
)
def test_training_steps_lower_for_the_gpu(pretend_hopper, preset, side, phase):
  traced, packed = traced_step(preset, side, phase)
  text = traced.lower(lowering_platforms=("cuda",)).as_text()
  # cuDNN attends to plain rows alone.
  assert ("mosaic_gpu" in text) == (side.startswith("msa") or packed)
  assert ("__cudnn$fmha" in text) == (phase != "sparse" and not packed)


def test_a_sparse_training_step_has_the_kernels(pretend_hopper):
  traced, _ = traced_step("lm73m_16k", "msa", "sparse")
  found = launches(traced.jaxpr.jaxpr)
  wanted = {"msa_select_exact", "sparse_tiles", "sparse_kv_blocks"}
  assert wanted | {"kl_kv_blocks"} <= set(found), found


def traced_step(preset, side, phase):
  """A preset's training step with two layers, and whether rows are packed."""
  [run] = (run for run in configs.preset(preset).runs if run.side == side)
  # All layers are alike.
  model = dataclasses.replace(run.model, num_layers=2)
  made = program_of(dataclasses.replace(run, model=model))
  batch = (1, run.batch_size, run.context)
  state = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), made.abstract_state
  )
  operands = (
    state,
    *(jax.ShapeDtypeStruct(batch, jnp.int32),) * 2,
    jax.ShapeDtypeStruct(batch, jnp.float32),
    dict.fromkeys(("backbone", "index"), jax.ShapeDtypeStruct((), jnp.float32)),
  )
  packed = made.config.packed
  if packed:
    operands += (jax.ShapeDtypeStruct(batch, jnp.int32),)
  step = jax.jit(made._step, static_argnames="phase")
  return step.trace(*operands, phase=phase), packed


def test_own_text_replaces_that_of_the_text_tasks():
  own = config_lib.with_text(configs.preset("demo"), "texts")
  paths = [getattr(run.data, "path", None) for run in own.runs]
  assert paths == ["texts", "texts", None, None]
  assert all(getattr(run.data, "max_bytes", None) is None for run in own.runs)
  smoke = config_lib.with_text(configs.preset("smoke"), "texts")
  assert all(getattr(run.data, "max_bytes", None) is None for run in smoke.runs)
  text = config_lib.only_task(own, "text")
  assert [run.side for run in text.runs] == ["gqa", "msa"]
  for run in config_lib.with_text(configs.preset("lm73m_16k"), "t").runs:
    assert isinstance(run.data, data.MixConfig)
    assert run.data.text.path == "t" and not run.data.text.installed


def test_an_own_tokenizer_sets_the_vocabulary_of_the_text_tasks(tmp_path):
  import tokenizers

  path = str(tmp_path / "tokenizer.json")
  model = tokenizers.models.WordLevel({"a": 0, "END": 3, "b": 1}, "a")
  tokenizers.Tokenizer(model).save(path)
  demo = config_lib.with_tokenizer(configs.preset("demo"), path, "END")
  assert [run.model.vocab_size for run in demo.runs] == [4, 4, 298, 298]
  for run in demo.runs[:2]:
    assert (run.data.tokenizer, run.data.end_of_text) == (path, "END")
  before = configs.preset("lm73m_16k")
  facts = data.load(before.runs[0].data.recall).vocab_size
  for run in config_lib.with_tokenizer(before, path, "END").runs:
    assert run.model.vocab_size == 4 + facts
    assert run.data.text.tokenizer == path
  with pytest.raises(ValueError, match=r"tasks \(recall\) tokenizes text"):
    config_lib.with_tokenizer(config_lib.only_task(demo, "recall"), path, "END")
  with pytest.raises(ValueError, match=r"end_of_text=None.*it has none"):
    config_lib.with_tokenizer(demo, path)


# -------------------------------------------------------------- commands


@pytest.fixture(scope="module")
def compared(place, tiny) -> pathlib.Path:
  """Two sides of the preset by its commands: planned, stopped and resumed."""
  out = place / "runs"
  file = str(out / "comparison.json")
  with pytest.MonkeyPatch.context() as patch:
    without_extras(patch)
    patch.setattr(plan, "_measure_runs", measured)
    options = ["--folder", str(out), "--no-report", "--sides", "gqa", "msa_cpt"]
    command = ["compare", "lm73m_16k", "--plan", "1.4", "--minutes", "1e-6"]
    command += ["--seeds", "0"]
    assert cli.main([*command, *options, "--set", *tiny]) == cli.STOPPED
    assert cli.main(["compare", "--config", file, *options]) == 0
  return out


def measured(made: program.Program, runs, source: data.Source) -> dict:
  """Seconds of each thing that a run does, instead of those that `plan`
  measures."""
  phases = dict.fromkeys(("dense", "warmup", "sparse"), 1.0)
  return {
    "step": phases,
    "evaluate": {phase: 0.1 for phase in phases},
    "measure": {phase: 0.5 for phase in phases if made.msa_layers},
    "checkpoint": 2.0,
    "probes": len(source.probes),
  }


def records_of(folder: pathlib.Path, kind: str) -> list[dict]:
  lines = (folder / "metrics.jsonl").read_text().splitlines()
  records = map(json.loads, lines)
  return [record for record in records if record["kind"] == kind]


@pytest.mark.parametrize(
  "kind",
  [
    *(pytest.param(x, marks=pytest.mark.slow) for x in ("mix", "recall")),
    "probes",
  ],
)
def test_answers_by_choice_against_a_loop(tiny, kind):
  """A mix and probes count the answers of their probes, recall alone those of
  its held-out batches."""
  comparison = config_lib.with_fields(configs.preset("lm73m_16k"), tiny)
  (run,) = (run for run in comparison.runs if run.side == "msa")
  kinds = ("gqa", "msa", "msa")
  model = dataclasses.replace(run.model, num_layers=3, layer_kinds=kinds)
  asked = {
    "mix": run.data,
    "recall": run.data.recall,
    "probes": data.ProbesConfig(
      tasks=("common_words", "multi_query"), num_keys=8, leads=(100,)
    ),
  }[kind]
  run = dataclasses.replace(run, model=model, data=asked)
  made = program_of(run)
  source = data.load(run.data)
  params = made.init(run.seed).params
  result = evaluate.held_out_metrics(
    made, params, source, "sparse", batches=2, probe_batches=2, by_choice=True
  )
  assert ("by_choice" in result) == (kind == "recall")
  assert (result["accuracy"] is None) == (kind != "recall")
  asking = [p for p in source.probes if p != "common_words"]
  for probe in asking or ("",):
    counts = np.zeros((3, 2, 2), int)  # layer, found, right
    for number in range(2):
      batch = (
        source.probe_batch(probe, number, **made.eval_shape)
        if probe
        else source.eval_batch(number, **made.eval_shape)
      )
      tokens, mask = made.put(batch.tokens), made.put(batch.loss_mask)
      _, right = made.call("evaluate", "sparse", params, tokens, mask)
      ids = np.asarray(made.call("choose", "sparse", params, tokens))
      for row, query in zip(*np.nonzero(batch.distance >= 0)):
        block = (query - batch.distance[row, query]) // 8
        if block < query // 8:
          for layer in (1, 2):
            found = int(block in ids[layer, row, :, query])
            counts[layer, found, int(right[row, query])] += 1
    assert counts[1:, 1].any() and counts[1:, 0].any()
    assert result[f"{probe}_by_choice" if probe else "by_choice"] == [
      {
        "layer": layer,
        "found": counts[layer, 1].sum(),
        "found_right": counts[layer, 1, 1],
        "missed": counts[layer, 0].sum(),
        "missed_right": counts[layer, 0, 1],
      }
      for layer in (1, 2)
    ]
  if kind == "probes":
    # No single fact answers for the commonest word.
    assert result["common_words_by_distance"] is None
    assert "common_words_by_choice" not in result
    (words,) = result["common_words_by_number"]
    assert words["number"] == 100 and words["count"] == words["rows"]
    assert words["accuracy"] == result["common_words_accuracy"]


def test_plan_makes_the_longest_comparison_that_fits(compared):
  report = json.loads((compared / "plan.json").read_text())
  planned = config_lib.load(
    config_lib.ComparisonConfig, compared / "comparison.json"
  )
  sides = {row["side"]: row for row in report["runs"]}
  assert sides["gqa"]["steps"] == planned.runs[0].num_steps == 40
  # GQA: 40 steps, 10 evaluations of 2 batches and 2 probes (the last of
  # 3 batches), layer metrics 10 times, 4 checkpoints and three to start from,
  # one of which is one of the 4.
  seconds = 40 + 0.1 * (10 * 2 * 3 + 2 * 1) + 10 * 0.5 + 6 * 2.0
  assert sides["gqa"]["minutes"] == pytest.approx(seconds / 60, abs=0.01)
  # MSA-CPT: 6 steps, 2 evaluations and one more, dense, one with the oracle's
  # blocks that takes as long as two, the choices of the last probes, layer
  # metrics twice, a checkpoint.
  evaluations = 2 * 3 + (2 + 2) * (2 + 2 * 3) + 2 * 3
  seconds = 6 + 0.1 * evaluations + 2 * 0.5 + 2.0
  assert sides["msa_cpt"]["minutes"] == pytest.approx(seconds / 60, abs=0.006)
  assert list(sides) == ["gqa", "msa_cpt"]  # the budget is for these
  assert report["planned"] <= 1.4
  total = sum(row["minutes"] for row in report["runs"])
  assert report["planned"] == pytest.approx(total, abs=0.02)
  longer = config_lib.with_step_unit(planned, 3)
  more = sum(
    plan._run_seconds(run, sides[run.side]["seconds"])
    for run in longer.runs
    if run.side in sides
  )
  assert more > 60 * 1.4 * (1 - plan.SPARE)


def test_a_stopped_comparison_goes_on(compared):
  assert not (compared / "mix" / "msa").exists()
  for side, first in {"gqa": 1, "msa_cpt": 35}.items():
    folder = compared / "mix" / side / "seed0"
    steps = [row["step"] for row in records_of(folder, "train")]
    assert steps == list(range(first, 41))
    assert (folder / "done.json").exists()
    resumed = json.loads((folder / "environment.json").read_text())["resumed"]
    assert [start["step"] for start in resumed] == [1] * (side == "gqa")


def test_runs_hold_what_the_report_needs(compared):
  for side in ("gqa", "msa_cpt"):
    folder = compared / "mix" / side / "seed0"
    first, *_, final = records_of(folder, "eval")
    # The points of a curve are of the same text.
    assert len(first["batch_loss"]) == len(final["batch_loss"]) == 2
    assert final["bits_per_byte"] > 0 and final["accuracy"] is None
    for probe in ("needle", "recall"):
      asked = sum(row["count"] for row in final[f"{probe}_by_distance"])
      earlier = first[f"{probe}_by_distance"]
      # Three batches instead of two, of as many facts each but for chance.
      assert asked > 1.2 * sum(row["count"] for row in earlier)
      assert 0 <= final[f"{probe}_accuracy"] <= 1
    # The loss of a mix is no loss of text.
    assert records_of(folder, "train")[-1]["bits_per_byte"] is None
    dense = records_of(folder, "dense_eval")
    assert len(dense) == (side != "gqa")
    for row in dense:
      assert row["needle_by_distance"] and row["recall_by_distance"]
      assert "needle_by_choice" not in row
    # What each layer chose is read with the last answers only.
    assert "needle_by_choice" not in first
    assert ("needle_by_choice" in final) == (side != "gqa")
    if side != "gqa":
      config = json.loads((folder / "config.json").read_text())
      block_size = config["model"]["index"]["block_size"]
      for probe in ("needle", "recall"):
        # Every distance of two blocks or more is beyond the own block.
        far = [
          row["count"]
          for row in final[f"{probe}_by_distance"]
          if row["low"] >= 2 * block_size
        ]
        (row,) = final[f"{probe}_by_choice"]
        assert row["found"] + row["missed"] >= sum(far) > 0
      for layer in records_of(folder, "layers")[-1]["layers"]:
        assert 0 <= layer["facts_found"] <= 1
        # But for rounding.
        best = layer["best_score_recall"] * (1 + 1e-6)
        assert 0 < layer["score_recall"] <= best
      with np.load(folder / "selection.npz") as saved:
        assert set(selection_stats.SHARING) <= set(saved)
        assert saved["block_indices"].shape == (1, 2, 128, 4)
        assert saved["union8"].shape == (1, 2)
        assert (saved["union8"] >= 4).all() and (saved["union8"] <= 16).all()
        assert json.loads(str(saved["about"]))["context"] == 128


def test_speed_times_sides_at_each_length(compared, tmp_path):
  file, folder = str(compared / "comparison.json"), tmp_path / "timed"
  # The first side that starts from the trunk stands for them all.
  shutil.copytree(compared / "mix" / "msa_cpt", folder / "mix" / "msa")
  shutil.copytree(compared / "mix" / "gqa", folder / "mix" / "gqa")
  command = ["speed", "--config", file, "--folder", str(folder)]
  assert cli.main([*command, "--lengths", "128"]) == 0
  shutil.copy(folder / "speed.json", compared)
  found = json.loads((compared / "speed.json").read_text())
  assert {"device", "commit", "command", "versions"} <= set(found)
  places = [(row["side"], row["phase"]) for row in found["rows"]]
  assert places == [("gqa", "dense"), ("msa", "warmup"), ("msa", "sparse")]
  for row in found["rows"]:
    # As many tokens as a batch of the training.
    assert (row["batch_size"], row["context"]) == (2, 128)
    # The trunk's checkpoint is of another model than GQA's own step.
    assert row["trained_steps"] == (0 if row["side"] == "gqa" else 40)
    assert row["step_ms"] > 0 and row["mfu"] is None  # no rate of a CPU
    assert row["lower_s"] > 0 and row["compile_s"] > 0


@pytest.mark.usefixtures("blank_pictures")  # test_train draws its report's
def test_report_of_it_all(compared):
  pytest.importorskip("matplotlib")
  assert cli.main(["report", str(compared)]) == 0
  page = (compared / "report" / "report.html").read_text()
  for words in (
    "mix/msa lacks seed 0: a gap is of the seeds",
    "GQA was trained with dense attention and an index branch beside it",
    "Needle answers right, MSA CPT − GQA",
    "Recall answers right, MSA CPT − GQA",
    "over them the gap has a 95 % interval",
    "How much of attention the chosen blocks hold",
    "How much neighbouring queries share",
    "Speed of a training step",
  ):
    assert words in page, words
  pictures = {path.stem for path in (compared / "report").glob("*.png")}
  assert {"mix_needle_distance", "mix_recall_distance", "speed"} <= pictures
  summary = json.loads((compared / "report" / "summary.json").read_text())
  gaps = summary["tasks"]["mix"]["needle_by_distance"]["msa_cpt"]
  assert [row["low"] for row in gaps] == [1, 2, 4, 8, 16, 32, 64]


COMMANDS = {
  "compare": ["compare", "--folder", "mine"],
  "compare --plan": ["compare", "--plan", "1", "--folder", "mine"],
  "plan": ["plan", "--minutes", "1", "--folder", "mine"],
  "speed": ["speed", "--lengths", "64", "--folder", "mine"],
  "devices": ["devices", "--results", "mine"],
}


@pytest.mark.parametrize("name", [*COMMANDS, "train"])
def test_wrong_data_are_an_error_before_anything_compiles(
  name, place, tmp_path, monkeypatch, capsys
):
  def compiled(*_):
    raise AssertionError("compiled")

  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(program.Program, "compile", compiled)
  monkeypatch.setattr(program.Program, "init", compiled)
  monkeypatch.setattr(jax, "device_count", lambda: 2)
  folders = {name: tmp_path / name for name in ("empty", "tokens", "short")}
  for folder in folders.values():
    folder.mkdir()
  (tmp_path / "tokens" / "tokens.json").write_text('{"vocab_size": 9}')
  (tmp_path / "short" / "a.txt").write_text("too short" * 9)
  (tmp_path / "tokenizer.json").write_text("{}")
  text = str(place / "text")
  cases = {
    "there": "does not exist",
    "empty": "holds no files",
    "tokens": "lacks ['dtype', 'train', 'held_out']",
    "short": "takes 1025 tokens, but the training split has only",
    "tokenizer": "cannot be read",
  }
  if name == "train":
    del cases["tokens"]
  for case, words in cases.items():
    path = text if case == "tokenizer" else case
    if name == "train":
      command = ["train", "demo", "--task", "text", "--side", "msa"]
      command += ["--folder", "mine", "--data.path", path]
      tokenizer = ["--data.tokenizer", "tokenizer.json"]
    else:
      first, *rest = COMMANDS[name]
      command = [first, "demo", "--task", "text", *rest, "--text", path]
      tokenizer = ["--tokenizer", "tokenizer.json"]
    if case == "short" and name == "speed":
      command += ["--lengths", "1024"]
    command += tokenizer * (case == "tokenizer")
    assert cli.main(command) == 1
    assert words in capsys.readouterr().err, case
    assert not (tmp_path / "mine").exists()


def test_the_data_of_every_task_are_opened_before_the_first_is_trained(
  place, tmp_path, monkeypatch
):
  monkeypatch.setattr(program.Program, "compile", None)
  monkeypatch.chdir(tmp_path)
  demo = configs.preset("demo")
  own = config_lib.with_text(demo, str(place / "text"))
  text = [dataclasses.replace(run, eval_batches=2) for run in own.runs[:2]]
  # The text comes last, with too few ids for its tokenizer's.
  text = [
    dataclasses.replace(r, model=dataclasses.replace(r.model, vocab_size=255))
    for r in text
  ]
  both = dataclasses.replace(demo, runs=(*demo.runs[2:], *text))
  for call in (compare.compare, lambda *args: plan.plan(*args, minutes=1)):
    with pytest.raises(ValueError, match=r"vocab_size=255: .*--set model.voc"):
      call(both, tmp_path / "runs")


def test_commands_refuse(compared, capsys):
  file = str(compared / "comparison.json")
  for command, words in {
    f"plan --config {file} --folder {compared} --minutes 1": "has runs already",
    "compare lm73m_16k --sides mla": "sides=['mla']: the comparison has gqa",
    "compare lm73m_16k --minutes 1 --distributed": "--minutes: wanted one",
    "compare lm73m_16k --plan 1 --distributed": "--plan: wanted one",
    "compare lm73m_16k --minutes 0": "--minutes: wanted a number above 0",
    "compare lm73m_16k --plan -1": "--plan: wanted a number above 0, got -1",
    "plan lm73m_16k --minutes nan": "wanted a number above 0, got nan",
    "speed lm73m_16k --set context": "wanted FIELD=VALUE",
    "compare demo --task texts": "task='texts': wanted one of text, recall",
    "compare demo --task recall --text t": "text='t': wanted a comparison",
  }.items():
    assert cli.main(command.split()) == 1
    assert words in capsys.readouterr().err


# ---------------------------------------------------------------- numbers


def test_flops_of_a_step():
  """Against sums over positions."""
  _, msa, *_ = configs.preset("lm13m_4k").runs
  context, model = 600, msa.model
  index = dataclasses.replace(model.index, block_size=16, top_k=3)
  model = dataclasses.replace(model, index=index, num_layers=1)
  dense = sum(t + 1 for t in range(context))
  sparse = sum(min(t + 1, 2 * 16 + t % 16 + 1) for t in range(context))
  heads, kv, width = 8 * 64, 2 * 64, model.embed_dim
  weights = width * (2 * heads + 2 * kv + 3 * model.mlp_dim + model.vocab_size)
  projections = width * (2 * 64 + 64)
  base = 6 * context * weights
  wanted = {
    "dense": base + 12 * heads * dense,
    "sparse": base + 4 * context * projections + 12 * heads * sparse
    + 2 * 2 * 64 * dense + 4 * 2 * 64 * sparse,
    "warmup": base + 4 * context * projections + 12 * heads * dense
    + 6 * 2 * 64 * dense,
  }  # fmt: skip
  for phase, flops in wanted.items():
    kinds = ("gqa",) if phase == "dense" else ("msa",)
    side = dataclasses.replace(model, layer_kinds=kinds)
    found = speed.flops_per_step(side, phase, 3, context)
    assert found == pytest.approx(3 * flops)
  experts = MoEConfig(num_experts=7, top_k=2, expert_dim=40, shared_dim=30)
  side = dataclasses.replace(
    model, layer_kinds=("gqa",), mlp_kinds=("moe",), moe=experts
  )
  hidden = 3 * (2 * 40 + 30) + 7 - 3 * model.mlp_dim
  wanted["dense"] += 6 * context * width * hidden
  found = speed.flops_per_step(side, "dense", 3, context)
  assert found == pytest.approx(3 * wanted["dense"])


def test_loss_by_position_counts_targets_only():
  near, far = evaluate.loss_by_position(
    np.array([2.0, 0.0, 0.0, 0.0, 2.0]), np.array([1, 0, 0, 0, 4])
  )
  assert near == {"low": 0, "high": 2, "loss": 2.0, "count": 1}
  assert far == {"low": 4, "high": 8, "loss": 0.5, "count": 4}


def test_facts_found_counts_far_facts_in_chosen_blocks():
  blocks = np.full((2, 2, 2, 16, 2), -1)  # layers, rows, groups, tokens
  blocks[0, 0, :, 9] = [[0, 2], [1, 2]]  # groups choose blocks 0 and 1
  blocks[0, 0, :, 15] = [[1, 3], [1, 3]]
  blocks[1, 0, :, 15] = [[2, 3], [0, 3]]
  blocks[1, 1, :, 12] = [[1, 3], [1, 3]]
  distance = np.full((2, 16), -1)
  distance[0, 9] = 9 - 5  # in block 1, the one before: layer 0 has it
  distance[0, 15] = 15 - 2  # in block 0: layer 1 has it
  distance[0, 11] = 2  # in the own block: does not count
  distance[1, 12] = 12 - 5  # in block 1, two before: layer 1 has it
  index = IndexConfig(block_size=4, top_k=2)
  far, found = evaluate.facts_found(blocks, distance, index)
  # In the order of rows, then asking tokens: 9, 11, 15 and 12.
  assert far.tolist() == [True, False, True, True]
  assert found.tolist() == [[True, False], [False, True], [False, True]]
  first, second = evaluate.answers_by_choice(
    np.array([False, True, True]), found
  )
  names = ("found", "found_right", "missed", "missed_right")
  assert [first[n] for n in names] == [1, 0, 2, 2]
  assert [second[n] for n in names] == [2, 2, 1, 0]
  for local, beyond in ((0, [1, 0, 1, 1]), (2, [0, 0, 1, 1])):
    index = IndexConfig(block_size=4, top_k=2, num_local_blocks=local)
    far, found = evaluate.facts_found(blocks, distance, index)
    assert far.tolist() == [bool(x) for x in beyond]
    assert len(found) == sum(beyond)
  distance[distance > 2] = -1
  far, found = evaluate.facts_found(blocks, distance, index)
  assert not far.any() and found.shape == (0, 2)


def test_answers_by_number():
  numbers = np.full((3, 5), -1)
  numbers[0, [1, 3]] = 2
  numbers[1, [0, 4]] = 2
  numbers[2, [2, 3, 4]] = [7, 7, 2]
  right = np.array([True, True, False, True, True, False, True])
  two, seven = evaluate.answers_by_number(right, numbers)
  assert two == {
    "number": 2,
    "accuracy": 4 / 5,
    "count": 5,
    "all_right": 2 / 3,
    "rows": 3,
  }
  assert (seven["number"], seven["accuracy"]) == (7, 0.5)
  assert (seven["all_right"], seven["rows"]) == (0.0, 1)


def test_a_missing_package_of_the_report_is_said_before_training(
  place, monkeypatch, capsys
):
  monkeypatch.setitem(sys.modules, "matplotlib", None)
  for name in [name for name in sys.modules if name.startswith("train.report")]:
    monkeypatch.delitem(sys.modules, name)
  out = place / "never"
  assert cli.main(["compare", "smoke", "--folder", str(out)]) == 1
  said = capsys.readouterr().err
  assert "the report needs the package 'matplotlib'" in said
  assert "--no-report" in said and not out.exists()
