"""The training loop on tiny models: gradients, phases, meshes, errors."""

import dataclasses
import functools
import json
import math
import pathlib
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import run_on_devices

from msa_jax import DecoderLM, checkpoints, to_msa
from msa_jax.model_config import IndexConfig, ModelConfig
from train import __main__ as cli
from train import (
  checkpoint,
  compare,
  configs,
  corpus,
  data,
  evaluate,
  loop,
  pretrained,
  sample,
)
from train import config as config_lib
from train import program as program_lib


def write_text(folder: pathlib.Path) -> pathlib.Path:
  """A few small files with something to learn."""
  rng = np.random.default_rng(0)
  words = ["alpha", "beta", "gamma", "delta", "def", "return", "x = y\n"]
  for i in range(40):
    text = " ".join(rng.choice(words, 300))
    (folder / f"{i}.txt").write_text(text)
  return folder


def tiny_run(folder: pathlib.Path, **changes) -> config_lib.RunConfig:
  """An MSA run of 4 steps, 2 of them warm-up."""
  text = folder / "text"
  if not text.exists():
    text.mkdir(parents=True)
    write_text(text)
  run = config_lib.RunConfig(
    task="text",
    side="msa",
    model=ModelConfig(
      vocab_size=256,
      num_layers=2,
      embed_dim=32,
      num_heads=4,
      num_kv_heads=2,
      head_dim=8,
      mlp_dim=48,
      layer_kinds=("gqa", "msa"),
      index=IndexConfig(index_dim=8, block_size=16, top_k=2),
      implementation="xla",
    ),
    data=data.TextConfig(
      path=str(text), cache_dir=str(folder / "cache"), rows="stream"
    ),
    optimizer=config_lib.OptimizerConfig(warmup_steps=1),
    recipe=config_lib.RecipeConfig(index_warmup_steps=2),
    num_steps=4,
    batch_size=4,
    context=64,
    log_every=1,
    eval_every=2,
    eval_batches=2,
    layers_every=2,
    checkpoint_every=2,
    folder=str(folder / "run"),
  )
  return dataclasses.replace(run, **changes)


def as_gqa(run: config_lib.RunConfig, **changes) -> config_lib.RunConfig:
  return dataclasses.replace(
    run,
    side="gqa",
    model=dataclasses.replace(
      run.model, layer_kinds=("gqa",), index=IndexConfig()
    ),
    recipe=config_lib.RecipeConfig(),
    **changes,
  )


def read_records(folder: pathlib.Path) -> list[dict]:
  lines = (folder / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """A folder, and programs that compile in half of the time; test_resume runs
  optimised code."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield tmp_path_factory.mktemp("train")
  jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def source(place) -> data.Source:
  return data.load(tiny_run(place).data)


def without_times(folder, after: int = 0) -> list[dict]:
  times = ("seconds", "tokens_per_second")
  return [
    {k: v for k, v in row.items() if k not in times}
    for row in read_records(pathlib.Path(folder))
    if row["step"] > after
  ]


def assert_same_run(run, folder, wanted_folder, steps):
  """Records but for times, checkpoints of the steps, and counts of choices."""
  folders = (folder, wanted_folder)
  assert without_times(folder) == without_times(wanted_folder)
  trained = [r for r in read_records(folder) if r["kind"] == "train"]
  assert [r["step"] for r in trained] == list(range(1, run.num_steps + 1))
  seconds = [r["seconds"] for r in trained]
  assert seconds == sorted(seconds)
  wanted = program_lib.flatten_state(program_of(run).abstract_state)
  readers = [checkpoint.Checkpoints(f, read_only=True) for f in folders]
  assert readers[0].latest() == run.num_steps
  for step in steps:
    mine, theirs = (r.restore(step, wanted)[0] for r in readers)
    for name in wanted:
      np.testing.assert_array_equal(mine[name], theirs[name], name)
  counts = [np.load(f / "selection.npz")["counts"] for f in folders]
  np.testing.assert_array_equal(*counts)


def parts_of(batch: data.Batch, count: int) -> tuple[np.ndarray, ...]:
  tokens = batch.tokens
  return tuple(
    a.reshape(count, -1, *a.shape[1:])
    for a in (tokens[:, :-1], tokens[:, 1:], batch.loss_mask)
  )


# --- Gradients ----------------------------------------------------------------


@pytest.fixture(scope="module")
def program(place) -> program_lib.Program:
  return program_of(tiny_run(place))


def program_of(run: config_lib.RunConfig) -> program_lib.Program:
  return program_lib.Program(program_lib.compile_key(run))


@pytest.fixture(scope="module")
def params(program) -> program_lib.Params:
  return program.init(0).params


@functools.cache
def loss_of(program: program_lib.Program, phase: str):
  return jax.jit(functools.partial(program.loss, phase=phase))


def gradients_by_weight(program, params, source, phase):
  """Gradients without and with the KL, from one compiled function."""
  batch = source.train_batch(0, 0, batch_size=4, context=64)
  return [
    loss_of(program, phase)(params, *parts_of(batch, 1), weight)[1]
    for weight in (0.0, 1.0)
  ]


@pytest.mark.parametrize("phase", ["warmup", "sparse"])
def test_kl_never_reaches_the_backbone(program, params, source, phase):
  without, with_kl = gradients_by_weight(program, params, source, phase)
  for name, group in program.groups.items():
    if group == "backbone":
      assert np.any(with_kl[name]), name
      np.testing.assert_array_equal(without[name], with_kl[name], name)
    else:
      assert not np.any(without[name]), name
      assert np.any(with_kl[name]), name


def test_kl_reaches_the_backbone_without_detach_input(place, params, source):
  """The control: the test above can fail."""
  run = tiny_run(place)
  index = dataclasses.replace(run.model.index, detach_input=False)
  run = dataclasses.replace(
    run, model=dataclasses.replace(run.model, index=index)
  )
  program = program_of(run)
  without, with_kl = gradients_by_weight(program, params, source, "sparse")
  changed = [n for n in program.groups if np.any(without[n] != with_kl[n])]
  assert any(program.groups[name] == "backbone" for name in changed)


def packed_run(place) -> config_lib.RunConfig:
  """A run on documents of 2 to 120 bytes, most of them short."""
  path = place / "short" / "lines.jsonl"
  if not path.exists():
    path.parent.mkdir()
    rng = np.random.default_rng(0)
    sizes = np.exp(rng.uniform(np.log(2), np.log(120), 1200)).astype(int)
    texts = ["".join(rng.choice(list("abc def"), size)) for size in sizes]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
  run = tiny_run(place)
  text = dataclasses.replace(run.data, path=str(path), rows="files")
  return dataclasses.replace(run, data=text)


@pytest.mark.slow
def test_parts_of_a_packed_batch_add_up(place, params):
  """Each part has another share of padding, so its mean KL counts less."""
  run = packed_run(place)
  batch = data.load(run.data).train_batch(0, 0, batch_size=4, context=64)
  ids = np.where(
    np.arange(65) < np.array([[5], [60], [9], [65]]), batch.segment_ids, 0
  )
  mask = (ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] > 0)
  batch = batch._replace(loss_mask=mask)
  loss = loss_of(program_of(run), "sparse")
  (whole, metrics), grads = loss(
    params, *parts_of(batch, 1), 1.0, ids[None, :, :-1]
  )
  (whole_4, metrics_4), grads_4 = loss(
    params, *parts_of(batch, 4), 1.0, ids[:, None, :-1]
  )
  assert metrics["kl"] > 0
  np.testing.assert_allclose(whole_4, whole, rtol=1e-5)
  np.testing.assert_allclose(metrics_4["kl"], metrics["kl"], rtol=1e-5)
  for name in grads:
    np.testing.assert_allclose(
      grads_4[name], grads[name], rtol=1e-4, atol=1e-6, err_msg=name
    )


def test_a_packed_run_trains_and_evaluates_each_document_alone(place):
  run = packed_run(place)
  # One layer and one phase to compile; test_segments has the warm-up's steps.
  model = dataclasses.replace(run.model, num_layers=1, layer_kinds=("msa",))
  run = dataclasses.replace(
    run,
    model=model,
    recipe=config_lib.RecipeConfig(),
    folder=str(place / "packed"),
  )
  opened = data.load(run.data)
  done = loop.run(run, opened)
  assert done is not None
  final = done["final"]
  # The held-out loss by the trained model, one document at a time.
  model, _ = sample.load_model(place / "packed")
  run_model = nnx.jit(lambda model, tokens: model(tokens).logits)
  total, count = np.zeros(64), np.zeros(64, int)
  for index in range(run.eval_batches):
    batch = opened.eval_batch(index, batch_size=4, context=64)
    assert batch.segment_ids is not None
    assert (batch.segment_ids.max(axis=1) > 1).any()
    for tokens, ids in zip(batch.tokens, batch.segment_ids, strict=True):
      for number in range(1, ids.max() + 1):
        document = tokens[ids == number]
        # Padding behind a document changes nothing of it.
        row = np.zeros((1, 64), np.int32)
        size = len(document) - 1
        row[0, :size] = document[:-1]
        logp = jax.nn.log_softmax(run_model(model, row)[0, :size])
        total[:size] -= np.asarray(logp)[np.arange(size), document[1:]]
        count[:size] += 1
  np.testing.assert_allclose(
    final["loss"], total.sum() / count.sum(), rtol=1e-5
  )
  by_position = {bin["low"]: bin for bin in final["loss_by_position"]}
  assert by_position[0]["count"] == count[:2].sum()
  np.testing.assert_allclose(
    by_position[0]["loss"], total[:2].sum() / count[:2].sum(), rtol=1e-5
  )
  records = read_records(place / "packed")
  assert all(np.isfinite(r["loss"]) for r in records if "loss" in r)


def test_parts_of_a_batch_add_up(program, params, source):
  batch = source.train_batch(0, 0, batch_size=4, context=64)
  # Parts with very different numbers of targets.
  mask = batch.loss_mask & (np.arange(64) < np.array([[3], [60], [9], [64]]))
  batch = batch._replace(loss_mask=mask)
  loss = loss_of(program, "sparse")
  (whole, metrics), grads = loss(params, *parts_of(batch, 1), 1.0)
  (whole_4, metrics_4), grads_4 = loss(params, *parts_of(batch, 4), 1.0)
  np.testing.assert_allclose(whole, whole_4, rtol=1e-6)
  for name in metrics:
    np.testing.assert_allclose(metrics[name], metrics_4[name], rtol=1e-6)
  for name in grads:
    scale = np.abs(grads[name]).max()
    np.testing.assert_allclose(
      grads[name] / scale, grads_4[name] / scale, atol=2e-6, err_msg=name
    )


def test_switch_to_sparse_keeps_the_moments(place, program, source):
  run = tiny_run(place)
  state = program.init(0)
  batches = [
    source.train_batch(0, i, batch_size=4, context=64) for i in range(3)
  ]
  for step in (1, 2):
    assert run.phase(step) == "warmup"
    state, _ = program_lib.train_step(
      program, run, state, batches[step - 1], step
    )
  before = jax.device_get(state)
  assert run.phase(3) == "sparse"
  loss = loss_of(program, "sparse")
  _, grads = loss(before.params, *parts_of(batches[2], 1), 1.0)
  after, _ = jax.device_get(
    program_lib.train_step(program, run, state, batches[2], 3)
  )
  for group in ("backbone", "index"):
    mine = program.group(grads, group)
    norm = np.sqrt(sum(float(np.sum(np.square(g))) for g in mine.values()))
    clip = min(1.0, 1.0 / norm)
    old, new = before.opt[group][1], after.opt[group][1]
    assert (old.count, new.count) == (2, 3)
    for name, grad in mine.items():
      wanted = 0.9 * old.mu[name] + 0.1 * clip * np.asarray(grad)
      np.testing.assert_allclose(new.mu[name], wanted, rtol=1e-4, atol=1e-7)


def test_weight_decay_leaves_norms_alone(program, params):
  zeros = jax.tree.map(np.zeros_like, params)
  for group, transform in program._transforms.items():
    mine = program.group(params, group)
    updates, _ = jax.jit(transform.update)(
      program.group(zeros, group), transform.init(mine), mine
    )
    for name, update in updates.items():
      assert np.any(update) == (not name.endswith("scale")), name


def own_optimizer(config, group):
  """Signs of gradients, twice as long for the index."""
  return optax.sign_sgd(2.0 if group == "index" else 1.0)


def test_an_optimizer_of_ones_own(place, params):
  run = tiny_run(place)
  run = with_field(
    run, "optimizer.algorithm", lambda _: f"{__name__}:own_optimizer"
  )
  program = program_of(run)
  for group, length in (("backbone", 1.0), ("index", 2.0)):
    mine = program.group(params, group)
    transform = program._transforms[group]
    updates, _ = transform.update(mine, transform.init(mine), mine)
    for name, update in updates.items():
      np.testing.assert_allclose(update, length * np.sign(mine[name]))


@pytest.mark.parametrize(
  "scan", [pytest.param(False, marks=pytest.mark.slow), True]
)
def test_muon_orthogonalises_whole_matrices_alone(place, scan):
  run = with_field(tiny_run(place), "optimizer.algorithm", lambda _: "muon")
  run = with_field(run, "optimizer.weight_decay", lambda _: 0.0)
  run = with_field(run, "model.scan_layers", lambda _: scan)
  program = program_of(run)
  params = program.init(0).params
  adam = program_of(with_field(run, "optimizer.algorithm", lambda _: "adamw"))
  for group in ("backbone", "index"):
    mine = program.group(params, group)
    found = {}
    for made in (program, adam):
      transform = made._transforms[group]
      update = jax.jit(transform.update)
      found[made], _ = update(mine, transform.init(mine), mine)
    for name, update in found[program].items():
      if not name.startswith("layers") or not name.endswith("kernel"):
        np.testing.assert_allclose(update, found[adam][name], rtol=1e-6)
        continue
      update = np.asarray(update).reshape(-1, *update.shape[scan:])[:1]
      update = update[0] if scan else np.asarray(found[program][name])
      shape = update.shape
      inputs = math.prod(shape[:-1]) if ".out." in name else shape[0]
      size = np.linalg.svd(update.reshape(inputs, -1), compute_uv=False)
      # Nearly all directions of a matrix get about the same length (of a random
      # one's, a tenth have less than a fifth of the longest), and the whole
      # about the root mean square of AdamW's updates.
      assert size.max() < 2.5 * np.quantile(size, 0.1), name
      assert np.sqrt((update**2).mean()) == pytest.approx(0.2, rel=0.25), name


# --- Sharing a program --------------------------------------------------------


def other_value(value):
  """A legal value of a config's field other than the given one."""
  if isinstance(value, bool):
    return not value
  if isinstance(value, ModelConfig):
    return dataclasses.replace(value, mlp_dim=2 * value.mlp_dim)
  if isinstance(value, config_lib.MeshConfig):
    return dataclasses.replace(value, data=-1)
  if isinstance(value, str):
    return {"stream": "files", "adamw": "muon"}[value]
  if value is None:
    return "muon"
  return value * 2 if isinstance(value, int) else value / 2


# Where a field of the program's config comes from in a run's.
RUN_FIELDS = {
  **{name: name for name in ("model", "mesh", "batch_size", "context")},
  "eval_window": "eval_window",
  "grad_accumulation": "grad_accumulation",
  "kl_weight": "recipe.kl_weight",
  "freeze_backbone": "recipe.freeze_backbone",
  "packed": "data.rows",
  **{
    name: f"optimizer.{name}"
    for name in (
      *(
        "algorithm",
        "index_algorithm",
        "beta1",
        "beta2",
        "eps",
        "weight_decay",
      ),
      *("clip_norm", "index_clip_norm", "router_bias_rate"),
    )
  },
}


def with_field(config, path: str, change):
  name, _, rest = path.partition(".")
  old = getattr(config, name)
  new = with_field(old, rest, change) if rest else change(old)
  return dataclasses.replace(config, **{name: new})


def test_every_field_that_compiles_changes_the_key(place):
  fields = dataclasses.fields(program_lib.ProgramConfig)
  assert {field.name for field in fields} == set(RUN_FIELDS)
  run = tiny_run(place, grad_accumulation=2, eval_window=16)
  key = program_lib.compile_key(run)
  for name, path in RUN_FIELDS.items():
    changed = with_field(run, path, other_value)
    other = program_lib.compile_key(changed)
    assert other != key, name
    assert {
      field.name
      for field in fields
      if getattr(other, field.name) != getattr(key, field.name)
    } == {name}


def test_what_does_not_compile_leaves_the_key_alone(place):
  run = tiny_run(place)
  optimizer = dataclasses.replace(
    run.optimizer, learning_rate=1.0, warmup_steps=0, min_lr_ratio=0.5,
    index_learning_rate_factor=3.0,
  )  # fmt: skip
  recipe = config_lib.RecipeConfig(
    index_warmup_steps=1, init_from="gqa", init_step=2, index_init="main"
  )
  other = dataclasses.replace(
    run, task="other", side="other", data=data.RecallConfig(), seed=7,
    optimizer=optimizer, recipe=recipe, num_steps=9, eval_every=1, folder="x",
  )  # fmt: skip
  assert program_lib.compile_key(run) == program_lib.compile_key(other)


@pytest.mark.slow  # test_report merges seeds that differ in them
def test_more_evaluations_at_the_end_change_nothing_else(place):
  """Seeds that differ in them were trained alike (`config.MORE_AT_END`)."""
  plain = dataclasses.replace(tiny_run(place), folder=str(place / "plain"))
  values = dict(oracle_at_end=True, samples=1)
  assert set(values) == set(config_lib.MORE_AT_END)
  more = dataclasses.replace(plain, folder=str(place / "more"), **values)
  program = program_of(plain)
  for run in (plain, more):
    loop.run(run, program=program)
  assert (pathlib.Path(more.folder) / "samples.json").exists()
  one, two = (without_times(run.folder) for run in (plain, more))
  assert [r["kind"] for r in two if r not in one] == ["oracle_eval"]
  assert [r for r in two if r in one] == one


def test_runs_that_share_a_program_give_what_each_alone_gives(
  place, program, source
):
  """They take steps in alternation, with other seeds, schedules and phases."""
  run = tiny_run(place)
  optimizer = dataclasses.replace(run.optimizer, learning_rate=1e-2)
  runs = [
    run,
    dataclasses.replace(
      run,
      seed=3,
      optimizer=optimizer,
      recipe=config_lib.RecipeConfig(index_warmup_steps=1),
      num_steps=8,
    ),
  ]
  states = [program.init(run.seed) for run in runs]
  shared = [[], []]
  for step in (1, 2):
    for i, run in enumerate(runs):
      batch = source.train_batch(run.seed, step - 1, batch_size=4, context=64)
      states[i], metrics = program_lib.train_step(
        program, run, states[i], batch, step
      )
      shared[i].append([float(metrics[n]) for n in ("loss", "kl", "grad_norm")])
  assert shared[0] != shared[1]
  for run, state, steps in zip(runs, states, shared):
    own, alone = first_steps(program_of(run), run, source, 2)
    assert alone == steps
    for name, value in own.params.items():
      np.testing.assert_array_equal(value, state.params[name], name)


def test_a_stopped_run_ends_with_the_same_bits(place, program, source):
  """Stopped after each step, before and after the switch to sparse. What a
  kill within a write leaves is put there: half a line and half a
  checkpoint."""
  whole, parts = (
    dataclasses.replace(tiny_run(place), folder=str(place / name))
    for name in ("whole", "parts")
  )
  assert loop.run(whole, source, program) is not None
  folder = pathlib.Path(parts.folder)
  for step in (1, 2, 3):
    assert loop.run(parts, source, program, stop_at=0.0) is None
    with open(folder / "metrics.jsonl", "a") as file:
      file.write('{"kind": "train", "st')
    half = folder / "checkpoints" / f"{step + 1}.orbax-checkpoint-tmp-1"
    half.mkdir()
    (half / "state").write_bytes(b"?")
  assert loop.run(parts, source, program) is not None
  assert_same_run(parts, folder, pathlib.Path(whole.folder), steps=(4,))
  environment = json.loads((folder / "environment.json").read_text())
  assert [x["step"] for x in environment["resumed"]] == [1, 2, 3]


def test_a_run_refuses_another_runs_program(place, program, source):
  run = tiny_run(place, recipe=config_lib.RecipeConfig(kl_weight=0.5))
  with pytest.raises(ValueError, match="it differs in kl_weight"):
    loop.run(run, source, program)
  assert not pathlib.Path(run.folder).exists()


# --- Devices ------------------------------------------------------------------

EIGHT_DEVICES = """
import dataclasses, json, pathlib, re, sys
import jax, numpy as np
from test_train import first_steps, tiny_run
from train import checkpoint, data
from train import program as program_lib
from train.config import MeshConfig
jax.config.update("jax_disable_most_optimizations", True)
run = tiny_run(pathlib.Path(sys.argv[1]))
mesh = MeshConfig(fsdp=2, tensor=2, context=2)
run = dataclasses.replace(run, mesh=mesh)
program = program_lib.Program(program_lib.compile_key(run))
state, steps = first_steps(program, run, data.load(run.data))
saved = checkpoint.Checkpoints(pathlib.Path(sys.argv[2]))
saved.save(4, program_lib.flatten_state(state), 1.0)
saved.close()
# Of what has batch rows and tokens, the keys alone are gathered, and nothing is
# moved to another place in the sequence: batches arrive cut.
text = program._compiled["step", "sparse"].as_text()
moved = {
  shape
  for line in text.splitlines()
  if re.search(" (all-gather|collective-permute)(-start)?\\(", line)
  for shape in re.findall(r"\\[([24],(?:32|64)[0-9,]*)\\]", line.split("(")[0])
}
assert moved == {"2,64,16", "2,64,8"}, moved  # keys and values as one
rows = np.arange(4 * 64).reshape(4, 64)
held = program.put(rows, parts=True, zigzag=True)
for shard in held.addressable_shards:
  early, late = np.split(np.asarray(shard.data)[0] % 64, 2, axis=1)
  first = early[0, 0]
  assert first in (0, 16) and (early == first + np.arange(16)).all()
  assert (late == 48 - first + np.arange(16)).all() and len(late) == 2
split = [a for a in state.params.values() if not a.is_fully_replicated]
result = {"devices": jax.device_count(), "split": len(split), "steps": steps}
np.savez(sys.argv[3], **program_lib.flatten_state(state))
print(json.dumps(result))
"""


def first_steps(
  program, run, source, count=4
) -> tuple[program_lib.TrainState, list]:
  """The state after the first steps of a run, and the metrics of each."""
  state, steps = program.init(run.seed), []
  for step in range(1, count + 1):
    batch = source.train_batch(run.seed, step - 1, batch_size=4, context=64)
    state, metrics = program_lib.train_step(program, run, state, batch, step)
    steps.append([float(metrics[n]) for n in ("loss", "kl", "grad_norm")])
  return state, steps


def test_eight_devices_give_the_losses_of_one(place, program, source):
  """Two for each of the fsdp, tensor and context axes."""
  folder, arrays = place / "many", place / "many.npz"
  printed = run_on_devices(8, EIGHT_DEVICES, place, folder, arrays)
  many = json.loads(printed.splitlines()[-1])
  assert many["devices"] == 8 and many["split"] > 0
  run = tiny_run(place)
  state, steps = first_steps(program, run, source)
  assert all(a.is_fully_replicated for a in state.params.values())
  np.testing.assert_allclose(many["steps"], steps, rtol=1e-5)
  # A checkpoint of many devices goes on on one.
  reader = checkpoint.Checkpoints(folder, read_only=True)
  wanted = program_lib.flatten_state(program.abstract_state)
  flat, _ = reader.restore(4, wanted)
  with np.load(arrays) as saved:
    assert set(saved) == set(flat)
    for name, value in flat.items():
      np.testing.assert_array_equal(value, saved[name], name)
  back = program_lib.unflatten_state(flat, program.abstract_state)
  batch = source.train_batch(0, 0, batch_size=4, context=64)
  _, metrics = program_lib.train_step(program, run, back, batch, 4)
  assert np.isfinite(metrics["loss"])


CONTEXT_RUNS = """
import dataclasses, pathlib, sys
import jax
from test_train import as_gqa, packed_run, read_records
from train import loop
from train.config import MeshConfig
place = pathlib.Path(sys.argv[1])
run = packed_run(place)
for name, run in dict(
  msa=dataclasses.replace(run, oracle_at_end=True),
  gqa=as_gqa(run, eval_window=24),
).items():
  runs = {
    devices: dataclasses.replace(
      run, folder=str(place / f"{name}{devices}"),
      mesh=MeshConfig(context=devices))
    for devices in (1, 2)}
  loop.run(runs[1])
  # Stopped on one device, and resumed on two.
  first = dataclasses.replace(runs[2], mesh=MeshConfig())
  assert loop.run(first, stop_at=0.0) is None
  assert loop.run(runs[2])
"""


@pytest.mark.slow
def test_a_packed_run_goes_on_over_two_devices_of_a_context_axis(place):
  run_on_devices(2, CONTEXT_RUNS, place)
  for name, last in dict(msa="oracle_eval", gqa="window_eval").items():
    one, two = (read_records(place / f"{name}{n}") for n in (1, 2))
    assert [r["kind"] for r in one] == [r["kind"] for r in two]
    assert last in [r["kind"] for r in two]
    # The first step ran on one device. Documents are not balanced.
    shares = [r.get("context_imbalance") for r in two if r["kind"] == "train"]
    assert shares[0] is None and all(1 < x < 2 for x in shares[1:])
    for a, b in zip(one, two, strict=True):
      if a["kind"] == "window_eval":
        # Pieces of 30 tokens are none that two devices can split.
        assert (a["window_most"], b["window_most"]) == (30, 32)
        continue
      for key in ("loss", "kl", "grad_norm", "bits_per_byte"):
        if a.get(key) is not None:
          assert b[key] == pytest.approx(a[key], rel=1e-5), (a, b, key)
      if a["kind"] == "layers":
        for x, y in zip(a["layers"], b["layers"], strict=True):
          x, y = ({k: v for k, v in z.items() if v is not None} for z in (x, y))
          assert y == pytest.approx(x, rel=1e-4)


MUON_ON_A_MESH = """
import dataclasses, pathlib, sys
import jax, numpy as np
from test_train import first_steps, tiny_run
from train import data
from train import program as program_lib
from train.config import MeshConfig, OptimizerConfig, RecipeConfig
jax.config.update("jax_disable_most_optimizations", True)
optimizer = OptimizerConfig(
  algorithm="muon", learning_rate=1.0, warmup_steps=0, weight_decay=0.0)
run = tiny_run(
  pathlib.Path(sys.argv[1]), optimizer=optimizer, recipe=RecipeConfig())
model = dataclasses.replace(run.model, num_layers=1, layer_kinds=("gqa",))
source = data.load(run.data)
found = []
for mesh in (MeshConfig(), MeshConfig(fsdp=2, tensor=2)):
  program = program_lib.Program(
    program_lib.compile_key(dataclasses.replace(run, model=model, mesh=mesh)))
  before = jax.device_get(program.init(0).params)
  state, _ = first_steps(program, run, source, 1)
  found.append({n: state.params[n] - before[n] for n in before})
one, many = found
split = [name for name, x in many.items() if not x.is_fully_replicated]
assert {"query", "down"} <= {name.split(".")[-2] for name in split}, split
for name, wanted in one.items():
  size = np.sqrt(np.mean(np.square(wanted)))
  assert size > 0.1
  # Muon enlarges rounding where a gradient is small.
  np.testing.assert_allclose(
    many[name], wanted, rtol=0, atol=1e-3 * size, err_msg=name)
"""


@pytest.mark.slow
def test_muon_on_a_mesh_takes_the_step_of_one_device(place):
  """It makes whole matrices orthogonal, not what a device has of them."""
  run_on_devices(4, MUON_ON_A_MESH, place)


# --- A comparison, end to end -------------------------------------------------


@pytest.fixture(scope="module")
def comparison(place) -> config_lib.ComparisonConfig:
  msa = tiny_run(place, keep_steps=(1,), eval_window=24)
  cpt = config_lib.RecipeConfig(
    index_warmup_steps=1, init_from="gqa", init_step=1
  )
  return config_lib.ComparisonConfig(
    name="tiny",
    runs=(
      dataclasses.replace(msa, side="msa_cpt", recipe=cpt),
      as_gqa(msa),
      msa,
    ),
  )


@pytest.fixture(scope="module")
def compared(place, comparison) -> pathlib.Path:
  file = place / "comparison.json"
  checkpoint.write_json(file, config_lib.to_dict(comparison))
  out = place / "compared"
  command = ["compare", "--config", str(file), "--folder", str(out)]
  assert cli.main(command) == 0
  return out


def test_compare_fills_the_run_folders(compared):
  assert (compared / "report" / "report.html").exists()
  for side in ("gqa", "msa", "msa_cpt"):
    folder = compared / "text" / side / "seed0"
    records = read_records(folder)
    trained = [r for r in records if r["kind"] == "train"]
    first = 2 if side == "msa_cpt" else 1
    assert [row["step"] for row in trained] == list(range(first, 5))
    phases = {
      "gqa": ["dense"] * 4,
      "msa": ["warmup", "warmup", "sparse", "sparse"],
      "msa_cpt": ["warmup", "sparse", "sparse"],
    }[side]
    assert [row["phase"] for row in trained] == phases
    assert [row["tokens"] for row in trained] == [
      256 * row["step"] for row in trained
    ]
    assert all((row["kl"] is None) == (side == "gqa") for row in trained)
    evals = [r for r in records if r["kind"] == "eval"]
    assert [row["step"] for row in evals] == [2, 4]
    assert json.loads((folder / "done.json").read_text()) == {
      "step": 4,
      "final": evals[-1],
    }
    # The loss is the mean over bytes, and bytes have 8 bits.
    for row in evals:
      assert row["loss"] == pytest.approx(np.mean(row["batch_loss"]))
      assert row["bits_per_byte"] == pytest.approx(
        row["loss"] / np.log(2), rel=0.02
      )
      places = row["loss_by_position"]
      assert [(p["low"], p["count"]) for p in places] == [
        (low, 8 * (high - low))  # two batches of four rows
        for low, high in zip((0, 2, 4, 8, 16, 32), (2, 4, 8, 16, 32, 64))
      ]
      assert row["loss"] == pytest.approx(
        np.average(
          [p["loss"] for p in places], weights=[p["count"] for p in places]
        )
      )
    dense = [r for r in records if r["kind"] == "dense_eval"]
    assert [row["step"] for row in dense] == [4] * (side != "gqa")
    for row in dense:
      # Two blocks of 16 tokens: what comes before their end is read anyway.
      pairs = zip(row["loss_by_position"], evals[-1]["loss_by_position"])
      found = [abs(a["loss"] - b["loss"]) for a, b in pairs]
      assert max(found[:-1]) < 1e-5 < found[-1]
    # Only sides with dense attention have a window, of 24 to 30 of 64 tokens.
    windows = [r for r in records if r["kind"] == "window_eval"]
    assert [row["step"] for row in windows] == [4] * (side == "gqa")
    for row in windows:
      pairs = zip(row["loss_by_position"], evals[-1]["loss_by_position"])
      *near, _, far = [abs(a["loss"] - b["loss"]) for a, b in pairs]
      assert max(near) < 1e-5 < far
      assert row["bits_per_byte"] == pytest.approx(
        row["loss"] / np.log(2), rel=0.02
      )
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["versions"]["jax"] == jax.__version__
    parameters = environment["parameters"]
    assert (parameters["index"] == 0) == (side == "gqa")
    assert (folder / "selection.npz").exists() == (side != "gqa")


def test_a_window_hides_the_tokens_far_back(place):
  run = as_gqa(tiny_run(place), eval_window=24)
  packed = dataclasses.replace(run.data, rows="files")
  run = dataclasses.replace(run, data=packed)
  source = data.load(run.data)
  program = program_of(run)
  # Attention that looks far back, as an untrained model's does not.
  params = {
    name: 8.0 * value if "attention" in name else value
    for name, value in program.init(0).params.items()
  }
  got = evaluate.window_metrics(program, params, source, batches=2)
  assert (got["window"], got["window_most"]) == (24, 30)
  # A trunk attends as GQA does.
  trunk = dataclasses.replace(
    tiny_run(place, data=packed, eval_window=24),
    recipe=config_lib.RecipeConfig(index_warmup_steps=4),
  )
  assert run.evaluates_window and trunk.evaluates_window
  assert not tiny_run(place, eval_window=24).evaluates_window
  beside = program_of(trunk)
  same = evaluate.window_metrics(
    beside, beside.init(0).params | params, source, batches=2
  )
  np.testing.assert_allclose(same["loss"], got["loss"], rtol=1e-5)
  model, losses, counts = program.merge(params), [], []
  logits_of = nnx.jit(lambda model, x, ids: model(x, segment_ids=ids).logits)
  for number in range(2):
    batch = source.eval_batch(number, **program.eval_shape)
    loss = np.zeros(batch.loss_mask.shape)
    firsts = (0, 6, 12, 18, 24, 30, 34)
    logits = {}
    for first in firsts:
      ids = batch.segment_ids[:, first : first + 30]
      tokens = batch.tokens[:, first : first + 30]
      logits[first] = logits_of(model, tokens, ids)
    for query in range(64):
      # The first piece that the query is in, which sees the most before it.
      first = next(x for x in firsts if query < x + 30)
      loss[:, query] = optax.softmax_cross_entropy_with_integer_labels(
        logits[first][:, query - first], batch.tokens[:, query + 1]
      )
    losses.append(
      evaluate.sum_by_position(np.where(batch.loss_mask, loss, 0), batch)
    )
    counts.append(evaluate.sum_by_position(batch.loss_mask, batch))
  want = evaluate.loss_by_position(sum(losses), sum(counts))
  for a, b in zip(got["loss_by_position"], want, strict=True):
    assert a == pytest.approx(b, rel=1e-5)
  total = sum(x.sum() for x in losses) / sum(x.sum() for x in counts)
  assert got["loss"] == pytest.approx(total, rel=1e-5)
  whole = evaluate.held_out_metrics(
    program, params, source, "dense", batches=2, probe_batches=0
  )
  *near, far = (
    abs(a["loss"] - b["loss"])
    for a, b in zip(got["loss_by_position"], whole["loss_by_position"])
  )
  assert max(near[:-1]) < 1e-5 < far


@pytest.fixture(scope="module")
def trained(place) -> tuple[DecoderLM, str]:
  """A GQA model, and its checkpoint folder with a tokenizer."""
  run = tiny_run(place)
  config = dataclasses.replace(
    run.model,
    layer_kinds=("gqa",),
    index=IndexConfig(),
    num_layers=1,
    qk_norm=False,
  )
  model = DecoderLM(config, rngs=nnx.Rngs(7))
  tokenizer = json.loads(corpus._ByteTokenizer().saved())
  folder = place / "trained"
  checkpoints.save(
    model,
    folder,
    fields=dict(bos_token_id=1, eos_token_id=2, max_position_embeddings=8192),
    documents={
      "tokenizer.json": tokenizer,
      "generation_config.json": dict(eos_token_id=[2, 9], do_sample=True),
      "tokenizer_config.json": dict(eos_token="x"),
      "chat_template.jinja": "{{ messages }}",
    },
  )
  return model, str(folder)


@pytest.fixture(scope="module")
def from_trained(place, trained) -> config_lib.ComparisonConfig:
  """One step that trains the Index Branch alone, and one with all."""
  model, folder = trained
  run = tiny_run(place)
  gqa = dataclasses.replace(
    run,
    side="gqa",
    model=model.config,
    data=dataclasses.replace(run.data, tokenizer="pretrained"),
    recipe=config_lib.RecipeConfig(pretrained=folder, init_step=1),
    num_steps=2,
    eval_every=1,
    checkpoint_every=1,
    oracle_at_end=True,
    samples=1,
  )
  recipe = config_lib.RecipeConfig(
    pretrained=folder,
    index_init="leading",
    index_warmup_steps=1,
    freeze_backbone=True,
  )
  msa = dataclasses.replace(
    gqa,
    side="msa",
    model=dataclasses.replace(
      gqa.model, layer_kinds=("msa",), index=run.model.index
    ),
    recipe=recipe,
  )
  return config_lib.ComparisonConfig(name="trained", runs=(gqa, msa))


@pytest.mark.slow
def test_a_trained_model_becomes_msa(place, trained, from_trained):
  model, _ = trained
  out = place / "from_trained"
  compare.compare(from_trained, out, with_report=False)
  gqa, msa = (out / "text" / side / "seed0" for side in ("gqa", "msa"))
  records = {folder: read_records(folder) for folder in (gqa, msa)}

  def losses(folder, kind):
    return {r["step"]: r["loss"] for r in records[folder] if r["kind"] == kind}

  run = sample.load_config(msa)
  assert run.data.tokenizer.endswith("trained/tokenizer.json")
  source = data.load(run.data)
  for step, folder in ((1, msa), (2, gqa)):
    # Until then both are the trained model.
    batch = source.train_batch(0, step - 1, batch_size=4, context=64)
    logits = model(batch.tokens[:, :-1]).logits
    want = optax.softmax_cross_entropy_with_integer_labels(
      logits, batch.tokens[:, 1:]
    )
    got = losses(folder, "train")
    assert min(got) == step
    np.testing.assert_allclose(got[step], want.mean(), rtol=1e-5)
  # The warm-up changes nothing but the Index Branch.
  program = program_of(run)
  kept = program_lib.read_state(program, msa, 1)[0]
  begun = program.start_from_pretrained(run.recipe, 0)
  converted = to_msa(
    model, run.model, rngs=nnx.Rngs(jax.random.key(0)), index_init="leading"
  )
  start = program_lib._flatten_model(converted)
  for name, group in program.groups.items():
    np.testing.assert_array_equal(begun.params[name], start[name], name)
    same = np.array_equal(kept.params[name], start[name])
    assert same == (group == "backbone"), name
  # Both sides' backbones have taken one step then, with the same rate.
  ends = [
    program_lib.read_state(program_of(sample.load_config(folder)), folder, 2)[0]
    for folder in (gqa, msa)
  ]
  counts = [
    [x for x in jax.tree.leaves(end.opt["backbone"]) if x.dtype == np.int32]
    for end in ends
  ]
  assert counts == [[1], [1]]
  rates = [sample.load_config(f).learning_rates(2) for f in (gqa, msa)]
  assert rates[0] == rates[1] and rates[0]["backbone"] > 0
  # Both continue the same text, each with its own final weights.
  held_out = source.eval_batch(0, batch_size=1, context=64).tokens[0]
  for folder, end in zip((gqa, msa), ends):
    (written,) = json.loads((folder / "samples.json").read_text())
    assert written["prompt"] == bytes(held_out[:32].tolist()).decode()
    assert written["text"] == bytes(held_out[32:].tolist()).decode()
    final = program_of(sample.load_config(folder)).merge(end.params)
    first = int(np.argmax(final(held_out[None, :32]).logits[0, -1]))
    assert written["sample"].startswith(bytes([first]).decode(errors="replace"))
  # What the trained model's folder says about generation is exported with it.
  assert not cli.main(["export", str(msa), str(place / "exported")])
  kept = json.loads((msa / pretrained.FILE).read_text())
  assert kept == pretrained.kept_of(run)
  written = json.loads((place / "exported/generation_config.json").read_text())
  assert written == dict(eos_token_id=[2, 9, 255], do_sample=True)
  # The best possible choice, beside the index's own: the blocks that both read
  # in any case come first.
  assert not losses(gqa, "oracle_eval")
  assert losses(msa, "oracle_eval").keys() == {2}
  oracle, own = (
    [r for r in records[msa] if r["kind"] == kind][-1]["loss_by_position"]
    for kind in ("oracle_eval", "eval")
  )
  found = [abs(a["loss"] - b["loss"]) for a, b in zip(oracle, own)]
  assert max(found[:-1]) < 1e-5 < found[-1]


def test_backbones_that_begin_later_have_a_warm_up_of_their_own(from_trained):
  optimizer = config_lib.OptimizerConfig(
    warmup_steps=4, schedule="constant", learning_rate=1.0
  )
  gqa, msa = (
    dataclasses.replace(
      run,
      optimizer=optimizer,
      num_steps=20,
      recipe=dataclasses.replace(
        run.recipe, **{"init_step" if run.side == "gqa" else length: 6}
      ),
    )
    for length in ("index_warmup_steps",)
    for run in from_trained.runs
  )
  rates = [msa.learning_rates(step) for step in (1, 6, 7, 8, 10, 20)]
  assert [r["backbone"] for r in rates] == [0, 0, 0.25, 0.5, 1, 1]
  assert [r["index"] for r in rates] == [0.25, 1, 1, 1, 1, 1]
  assert gqa.learning_rates(8)["backbone"] == 0.5


def test_what_a_run_starts_from_is_checked(place, trained, from_trained):
  _, folder = trained
  gqa, _ = from_trained.runs
  wide = dataclasses.replace(gqa.model, mlp_dim=99)
  wrong = dataclasses.replace(
    from_trained, runs=(dataclasses.replace(gqa, model=wide),)
  )
  with pytest.raises(
    ValueError, match=r"another model .*\n  mlp_dim: 48 there"
  ):
    compare.compare(wrong, place / "refused", with_report=False)
  with pytest.raises(ValueError, match="'no/model' is not there: wanted a ch"):
    pretrained.folder_of("no/model")
  with pytest.raises(ValueError, match="'json' is a package with 0 GGUF files"):
    pretrained.folder_of("json")
  with pytest.raises(ValueError, match="tokenizer='pretrained': wanted a run"):
    data.load(gqa.data)
  bare = place / "no_tokenizer"
  checkpoints.save(trained[0], bare)
  recipe = dataclasses.replace(gqa.recipe, pretrained=str(bare))
  with pytest.raises(ValueError, match=r"tokenizer.json is missing: wanted"):
    pretrained.resolve_run(dataclasses.replace(gqa, recipe=recipe))
  # A run keeps what the folder says about generation, if the tokens are its.
  run = pretrained.resolve_run(gqa)
  kept = pretrained.kept_of(run)
  assert kept["fields"] == dict(
    bos_token_id=1, eos_token_id=2, max_position_embeddings=8192
  )
  assert sorted(kept["documents"]) == [
    "chat_template.jinja",
    "generation_config.json",
    "tokenizer_config.json",
  ]
  other = dataclasses.replace(run.data, tokenizer="byte")
  assert pretrained.kept_of(dataclasses.replace(run, data=other)) is None
  with pytest.raises(ValueError, match="wanted one of them at most"):
    config_lib.RecipeConfig(pretrained="a", init_from="b", init_step=1)
  with pytest.raises(ValueError, match="freeze_backbone=True with index_warm"):
    config_lib.RecipeConfig(freeze_backbone=True)
  # The preset takes the sizes of another model, and keeps its own index.
  preset = configs.preset("smollm2_to_msa")
  dense, sparse = pretrained.with_pretrained(preset, folder).runs
  assert dense.model.mlp_dim == sparse.model.mlp_dim == 48
  assert dense.model.dtype == "bfloat16" and sparse.recipe.pretrained == folder
  assert sparse.model.index == preset.runs[1].model.index
  pretrained.check_model(folder, sparse.model)
  assert sparse.recipe.index_init == "leading"
  # Models with QK-norm, for which "leading" is refused, start in another way.
  normed = dataclasses.replace(gqa.model, qk_norm=True)
  checkpoints.save(DecoderLM(normed, rngs=nnx.Rngs(0)), place / "normed")
  _, begun = pretrained.with_pretrained(preset, str(place / "normed")).runs
  assert begun.model.qk_norm and begun.recipe.index_init == "main"
  with pytest.raises(ValueError, match=r"'leading' and model.qk_norm=True: wa"):
    dataclasses.replace(begun, recipe=sparse.recipe)
  with pytest.raises(ValueError, match="starts from no trained model; wanted"):
    pretrained.with_pretrained(configs.preset("smoke"), folder)


def test_sides_share_the_backbone_and_the_batches(compared):
  """The warm-up's main attention is dense, so its losses are GQA's."""
  losses = {
    side: [
      row["loss"]
      for row in read_records(compared / "text" / side / "seed0")
      if row["kind"] == "train"
    ]
    for side in ("gqa", "msa", "msa_cpt")
  }
  np.testing.assert_allclose(losses["msa"][:2], losses["gqa"][:2], rtol=1e-5)
  np.testing.assert_allclose(losses["msa_cpt"][0], losses["gqa"][1], rtol=1e-5)
  assert losses["msa"][3] != losses["gqa"][3]


# --- A trunk and its branches -------------------------------------------------


@pytest.fixture(scope="module")
def trunk(place, program, source) -> config_lib.RunConfig:
  """A dense run with an Index Branch that learns beside it."""
  recipe = config_lib.RecipeConfig(index_warmup_steps=4)
  run = tiny_run(place, side="gqa", recipe=recipe, keep_steps=(2,))
  folder = place / "trunk" / "gqa" / "seed0"
  run = dataclasses.replace(run, folder=str(folder))
  assert not run.goes_sparse and run.phases() == {"warmup": 4}
  loop.run(run, source, program)
  assert not (pathlib.Path(run.folder) / "selection.npz").exists()
  return run


def branch_of(trunk, name: str, steps: int = 0) -> config_lib.RunConfig:
  """A run from the trunk's step 2 that stays dense for some more steps."""
  recipe = config_lib.RecipeConfig(
    init_from=trunk.folder,
    init_step=2,
    index_init="trained",
    index_warmup_steps=steps,
  )
  folder = str(pathlib.Path(trunk.folder).parents[1] / name / "seed0")
  return dataclasses.replace(
    trunk, side=name, recipe=recipe, keep_steps=(), folder=folder
  )


def last_state(program, folder) -> dict:
  found = program_lib.read_state(program, pathlib.Path(folder))
  assert found is not None and found[1] == 4
  return program_lib.flatten_state(found[0])


def test_a_trunk_trains_the_backbone_of_gqa(trunk, program, source, compared):
  """Its index reaches neither weights nor moments: not through a gradient, nor
  through the norm by which gradients are clipped."""
  found = last_state(program, trunk.folder)
  plain = program_of(as_gqa(trunk))
  wanted = last_state(plain, compared / "text" / "gqa" / "seed0")
  assert len(wanted) > 30
  for name, value in wanted.items():
    # Another program, which rounds otherwise.
    size = np.abs(value).max()
    np.testing.assert_allclose(found[name], value, 0, 1e-5 * size, name)
  # In the same program another index leaves every bit.
  optimizer = dataclasses.replace(
    trunk.optimizer, index_learning_rate_factor=50.0
  )
  run = dataclasses.replace(
    trunk, optimizer=optimizer, folder=trunk.folder + "-another-index"
  )
  loop.run(run, source, program)
  other = last_state(program, run.folder)
  for name in wanted:
    np.testing.assert_array_equal(other[name], found[name], name)
  steps, others = (
    [row for row in read_records(pathlib.Path(r.folder)) if "grad_norm" in row]
    for r in (trunk, run)
  )
  clip = trunk.optimizer.clip_norm
  assert any(row["grad_norm"] > clip for row in steps)
  # The other index has other gradients.
  assert others[-1]["index_grad_norm"] < 0.5 * steps[-1]["index_grad_norm"]


def test_a_branch_that_stays_dense_is_the_trunk(trunk, program, source):
  run = branch_of(trunk, "dense", 2)
  loop.run(run, source, program)
  wanted = last_state(program, trunk.folder)
  for name, value in last_state(program, run.folder).items():
    np.testing.assert_array_equal(value, wanted[name], name)
  assert without_times(run.folder) == without_times(trunk.folder, after=2)


def test_a_branch_is_the_run_with_that_warmup(
  trunk, program, source, compared, monkeypatch
):
  """Also after a kill, before and after its first checkpoint."""
  run = branch_of(trunk, "msa")
  step = loop.train_step

  def killed(program, config, state, batch, number):
    if number == 4:
      raise KeyboardInterrupt
    return step(program, config, state, batch, number)

  with monkeypatch.context() as patch:
    patch.setattr(loop, "train_step", killed)
    with pytest.raises(KeyboardInterrupt):
      loop.run(run, source, program)
    assert loop.run(run, source, program, stop_at=0.0) is None
  loop.run(run, source, program)
  alone = compared / "text" / "msa" / "seed0"  # a warm-up of two steps
  assert without_times(run.folder) == without_times(alone, after=2)
  wanted = last_state(program, alone)
  for name, value in last_state(program, run.folder).items():
    np.testing.assert_array_equal(value, wanted[name], name)


def test_a_branch_refuses_what_it_cannot_continue(
  trunk, program, source, compared
):
  def refused(text, run, **changes):
    recipe = dataclasses.replace(run.recipe, **changes)
    run = dataclasses.replace(run, recipe=recipe, folder=run.folder + "-")
    with pytest.raises(ValueError, match=text):
      loop.run(run, source)

  branch = branch_of(trunk, "refused")
  refused("Wanted a run with an Index Branch", branch, index_init="main")
  gqa = str(compared / "text" / "gqa" / "seed0")
  refused(r"kinds \['gqa'\]. Wanted", branch, init_from=gqa, init_step=1)
  msa = str(compared / "text" / "msa" / "seed0")
  refused("is sparse from step 3 on", branch, init_from=msa, init_step=3)
  index = dataclasses.replace(trunk.model.index, rope_dim=0)
  model = dataclasses.replace(trunk.model, index=index)
  refused(
    r"another model:\n  index.rope_dim",
    dataclasses.replace(branch, model=model),
  )
  optimizer = dataclasses.replace(trunk.optimizer, index_algorithm="muon")
  refused(
    "optimizer.index_algorithm='adamw', whose state",
    dataclasses.replace(branch, optimizer=optimizer),
  )
  for index_init, layers, said in (
    ("main", "msa", "an"),
    ("trained", "gqa", "no"),
  ):
    recipe = dataclasses.replace(
      branch.recipe, init_from="gqa", index_init=index_init
    )
    start = trunk if layers == "msa" else as_gqa(trunk)
    with pytest.raises(ValueError, match=f"'gqa' has {said} Index Branch: wan"):
      config_lib.ComparisonConfig(
        name="x", runs=(start, dataclasses.replace(branch, recipe=recipe))
      )


def test_selection_counts_are_shares(compared):
  saved = np.load(compared / "text" / "msa" / "seed0" / "selection.npz")
  counts = saved["counts"]
  assert counts.shape == (1, 2, 4, 4) and counts.dtype == np.float32
  assert saved["layers"].tolist() == [1] and saved["block_size"] == 16
  own = np.diagonal(counts, axis1=2, axis2=3)
  np.testing.assert_array_equal(own, np.ones_like(own))
  assert not np.triu(counts, 1).any()
  # Block 0 has one block to choose from, the others have P = 2 or more.
  np.testing.assert_allclose(counts.sum(-1)[0], [[1, 2, 2, 2]] * 2)


def test_finished_runs_are_skipped(compared, capsys):
  folder = compared / "text" / "msa" / "seed0"
  before = (folder / "metrics.jsonl").read_bytes()
  assert cli.main(["train", "--config", str(folder / "config.json")]) == 0
  assert "finished at step 4 before" in capsys.readouterr().out
  assert (folder / "metrics.jsonl").read_bytes() == before


def test_cpt_takes_over_backbone_moments_and_step(compared):
  start = compared / "text" / "gqa" / "seed0"
  run = config_lib.load(
    config_lib.RunConfig,
    compared / "text" / "msa_cpt" / "seed0" / "config.json",
  )
  assert run.recipe.init_from == str(start)
  program = program_of(run)
  state = program.start_from_run(run.recipe, run.seed)
  fresh = program.init(run.seed)
  saved = program_of(as_gqa(run))
  reader = checkpoint.Checkpoints(start, read_only=True)
  wanted = program_lib.flatten_state(saved.abstract_state)
  flat, _ = reader.restore(1, wanted)
  old = program_lib.unflatten_state(flat, saved.abstract_state)
  for name, group in program.groups.items():
    if group == "backbone":
      np.testing.assert_array_equal(state.params[name], old.params[name])
      for moment in ("mu", "nu"):
        mine = getattr(state.opt[group][1], moment)[name]
        theirs = getattr(old.opt[group][1], moment)[name]
        assert np.any(theirs), name
        np.testing.assert_array_equal(mine, theirs)
    else:
      assert not np.any(state.opt[group][1].mu[name])
      np.testing.assert_array_equal(state.params[name], fresh.params[name])
  assert state.opt["backbone"][1].count == 1
  assert state.opt["index"][1].count == 0
  # The recipe is no part of the program: the same one serves another start.
  recipe = dataclasses.replace(run.recipe, index_init="main")
  other = program.start_from_run(recipe, run.seed)
  for name, value in other.params.items():
    changed = not np.array_equal(value, state.params[name])
    assert changed == ("index_" in name), name


def test_cpt_scans_layers_that_gqa_trained_unrolled(compared):
  run = config_lib.load(
    config_lib.RunConfig,
    compared / "text" / "msa_cpt" / "seed0" / "config.json",
  )
  assert not run.model.scan_layers
  scanned = dataclasses.replace(run.model, scan_layers=True)

  def values(model):
    program = program_of(dataclasses.replace(run, model=model))
    state = program.start_from_run(run.recipe, run.seed)
    adam = state.opt["backbone"][1]
    trees = (program.group(state.params, "backbone"), adam.mu, adam.nu)
    return [
      np.sort(np.concatenate([np.ravel(x) for x in tree.values()]))
      for tree in trees
    ]

  for got, want in zip(values(scanned), values(run.model), strict=True):
    np.testing.assert_array_equal(got, want)


def test_cpt_refuses_another_architecture(compared, place):
  run = config_lib.load(
    config_lib.RunConfig,
    compared / "text" / "msa_cpt" / "seed0" / "config.json",
  )
  model = dataclasses.replace(
    run.model, mlp_dim=40, qk_norm=False, tie_embeddings=False
  )
  other = dataclasses.replace(run, model=model, folder=str(place / "other"))
  with pytest.raises(ValueError) as error:
    loop.run(other)
  text = str(error.value)
  assert "holds another architecture" in text
  assert "missing: params.head.kernel" in text
  assert "unexpected: params.layers.1.attention.query_norm.scale" in text
  assert "params.layers.0.mlp.up.kernel is (32, 48), wanted" in text
  model = dataclasses.replace(run.model, rope_theta=5e6)
  other = dataclasses.replace(run, model=model, folder=str(place / "theta"))
  with pytest.raises(ValueError, match=r"another model:\n  rope_theta: 1"):
    loop.run(other)
  recipe = dataclasses.replace(run.recipe, init_step=3, index_warmup_steps=0)
  other = dataclasses.replace(run, recipe=recipe, folder=str(place / "step"))
  with pytest.raises(ValueError, match="no checkpoint of step 3; there are"):
    loop.run(other)


def test_load_model_gives_the_trained_model(compared, source):
  folder = compared / "text" / "msa" / "seed0"
  model, step = sample.load_model(folder)
  final = json.loads((folder / "done.json").read_text())["final"]
  batch = source.eval_batch(0, batch_size=4, context=64)
  run_model = nnx.jit(lambda model, tokens: model(tokens).logits)
  logits = run_model(model, batch.tokens[:, :-1])
  logp = jax.nn.log_softmax(logits)
  taken = np.take_along_axis(
    np.asarray(logp), batch.tokens[:, 1:, None], axis=-1
  )
  loss = -taken[..., 0][batch.loss_mask].mean()
  np.testing.assert_allclose(loss, final["batch_loss"][0], rtol=1e-5)
  assert step == final["step"]


# --- What stops a run ---------------------------------------------------------


def test_nan_stops_the_run_and_keeps_the_checkpoint(place, source, monkeypatch):
  run = as_gqa(tiny_run(place), folder=str(place / "nan"))
  program = program_of(run)
  train_step = program_lib.train_step

  def poison(program, run, state, batch, step):
    if step == 4:
      name = next(iter(state.params))
      params = state.params | {name: state.params[name] * np.nan}
      state = state._replace(params=params)
    return train_step(program, run, state, batch, step)

  monkeypatch.setattr(loop, "train_step", poison)
  with pytest.raises(loop.NonFiniteError) as error:
    loop.run(run, source, program)
  assert str(error.value).startswith("step 4:")
  assert "step 2" in str(error.value)
  folder = pathlib.Path(run.folder)
  assert not (folder / "done.json").exists()
  assert max(row["step"] for row in read_records(folder)) == 3
  assert json.loads((folder / "broken.json").read_text())["step"] == 4
  monkeypatch.undo()
  assert loop.run(run, source, program)["step"] == 4
  assert not (folder / "broken.json").exists()
  steps = [r["step"] for r in read_records(folder) if r["kind"] == "train"]
  assert steps == [1, 2, 3, 4]


def test_weights_that_fail_densely_finish(
  place, program, source, monkeypatch, capsys
):
  run = dataclasses.replace(tiny_run(place), folder=str(place / "dense_nan"))
  held_out_metrics = evaluate.held_out_metrics

  def fail_last(program, params, source, phase, **batches):
    result = held_out_metrics(program, params, source, phase, **batches)
    if phase == "warmup" and finished[-1:] == ["sparse"]:
      result["loss"] = np.nan
    finished.append(phase)
    return result

  finished: list[str] = []
  monkeypatch.setattr(evaluate, "held_out_metrics", fail_last)
  assert loop.run(run, source, program)["step"] == 4
  assert finished == ["warmup", "sparse", "warmup"]
  assert (
    "with dense attention the held-out loss is nan" in capsys.readouterr().out
  )
  kinds = {row["kind"] for row in read_records(pathlib.Path(run.folder))}
  assert "eval" in kinds and "dense_eval" not in kinds


def test_another_config_or_data_is_refused(compared, place, source):
  folder = compared / "text" / "gqa" / "seed0"
  run = config_lib.load(config_lib.RunConfig, folder / "config.json")
  other = dataclasses.replace(run, batch_size=8, seed=3)
  with pytest.raises(ValueError) as error:
    loop.run(other, source)
  assert "batch_size: 4 there, 8 asked for" in str(error.value)
  assert "seed: 0 there, 3 asked for" in str(error.value)
  (place / "text2").mkdir()
  text2 = write_text(place / "text2")
  (text2 / "0.txt").write_text("other words")
  changed = data.load(dataclasses.replace(run.data, path=str(text2)))
  with pytest.raises(ValueError, match="the data are not those"):
    loop.run(run, changed)


def test_a_thinned_run_is_not_continued(place, source):
  """Its folder would lose what it holds."""
  run = as_gqa(tiny_run(place), folder=str(place / "thinned"))
  metrics = place / "thinned" / "metrics.jsonl"
  metrics.parent.mkdir()
  line = '{"kind":"train","phase":"dense","columns":{"step":[1,2]}}\n'
  metrics.write_text(line)
  with pytest.raises(ValueError, match="thinned holds a thinned run, which"):
    loop.run(run, source)
  assert [path.name for path in metrics.parent.iterdir()] == [metrics.name]
  assert metrics.read_text() == line


def test_one_process_a_folder(place, source):
  run = as_gqa(tiny_run(place), folder=str(place / "locked"))
  open_folder = checkpoint.RunFolder(run, source.fingerprint)
  with pytest.raises(ValueError, match="another process is training"):
    loop.run(run, source)
  open_folder.close()


@pytest.mark.parametrize(
  "changes, text",
  [
    ({"num_steps": 0}, "num_steps=0: wanted an integer of at least 1"),
    ({"seed": True}, "seed=True: wanted an integer of at least 0"),
    ({"batch_size": 4.0}, r"batch_size=4\.0: wanted an integer of at least 1"),
    ({"keep_steps": (2.0,)}, r"keep_steps=\(2\.0,\): wanted steps of 1 to 4"),
    ({"task": "a/b"}, "task='a/b'"),
    ({"grad_accumulation": 3}, "batch_size=4 is no multiple"),
    ({"keep_steps": (9,)}, r"keep_steps=\(9,\): wanted steps of 1 to 4"),
    (
      {"recipe": config_lib.RecipeConfig(index_warmup_steps=5)},
      "index_warmup_steps=5: wanted at most num_steps=4 together",
    ),
    (
      {
        "recipe": config_lib.RecipeConfig(
          index_warmup_steps=4, freeze_backbone=True
        )
      },
      "leaves no sparse step of num_steps=4.*recipe.freeze_backbone=False, got",
    ),
    (
      {"data": data.RecallConfig(), "samples": 1},
      "samples=1: wanted 0 for data that are no text",
    ),
    (
      {"optimizer": config_lib.OptimizerConfig(warmup_steps=9)},
      "optimizer.warmup_steps=9 is more than",
    ),
  ],
)
def test_contradictions_are_named(place, changes, text):
  with pytest.raises(ValueError, match=text):
    tiny_run(place, **changes)


def test_more_contradictions(place):
  with pytest.raises(ValueError, match="has no warm-up"):
    dataclasses.replace(
      as_gqa(tiny_run(place)),
      recipe=config_lib.RecipeConfig(index_warmup_steps=1),
    )
  with pytest.raises(ValueError, match="wanted both or none"):
    config_lib.RecipeConfig(init_from="gqa")
  with pytest.raises(ValueError, match="index_init='main': wanted init_from"):
    config_lib.RecipeConfig(index_init="main")
  with pytest.raises(ValueError, match="index_init='trained': wanted init_fr"):
    config_lib.RecipeConfig(index_init="trained", pretrained="a")
  with pytest.raises(ValueError, match=r"beta2=1.0: wanted 0 <= beta2 < 1"):
    config_lib.OptimizerConfig(beta2=1.0)
  with pytest.raises(ValueError, match="weight_decay=True: wanted a number"):
    config_lib.OptimizerConfig(weight_decay=True)
  with pytest.raises(ValueError, match="learning_rate=True: wanted a number"):
    config_lib.OptimizerConfig(learning_rate=True)
  with pytest.raises(ValueError, match=r"index_warmup_steps=1\.0: wanted an"):
    config_lib.RecipeConfig(index_warmup_steps=1.0)  # pyright: ignore
  for wrong in (0, True, 2.0):
    with pytest.raises(ValueError, match=f"data={wrong}: wanted an integer"):
      config_lib.MeshConfig(data=wrong)  # pyright: ignore
  with pytest.raises(ValueError, match="wants 6 devices, 4 are here"):
    config_lib.MeshConfig(data=3, fsdp=2).shape(4)
  assert config_lib.MeshConfig(data=-1, tensor=2).shape(8) == (4, 1, 1, 2, 1)
  run = tiny_run(place)
  small = dataclasses.replace(run.model, vocab_size=100)
  with pytest.raises(ValueError, match=r"vocab_size=100: the data have 256"):
    loop.run(dataclasses.replace(run, model=small))
  with pytest.raises(ValueError, match=r"eval_batches=9999: the held-out"):
    loop.run(dataclasses.replace(run, eval_batches=9999))


def test_saved_configs_are_checked(place, comparison):
  run = tiny_run(place)
  saved = json.loads(json.dumps(config_lib.to_dict(run)))
  assert config_lib.from_dict(config_lib.RunConfig, saved) == run
  counted = dataclasses.replace(run, seed=np.int64(run.seed))
  assert json.loads(json.dumps(config_lib.to_dict(counted))) == saved
  load = functools.partial(config_lib.from_dict, config_lib.RunConfig)
  with pytest.raises(ValueError, match=r"unknown fields \['depth'\]"):
    load(saved | {"depth": 3})
  with pytest.raises(ValueError, match=r"config.model: unknown .*\['heads'\]"):
    load(saved | {"model": saved["model"] | {"heads": 3}})
  with pytest.raises(ValueError, match=r"wants the fields \['data'\]"):
    load({k: v for k, v in saved.items() if k != "data"})
  with pytest.raises(ValueError, match=r"config.seed='x': wanted int"):
    load(saved | {"seed": "x"})
  with pytest.raises(ValueError, match="'type' that is one of"):
    load(saved | {"data": {}})
  again = config_lib.from_dict(
    config_lib.ComparisonConfig,
    json.loads(json.dumps(config_lib.to_dict(comparison))),
  )
  assert again == comparison


def test_sides_that_differ_elsewhere_are_refused(place, capsys):
  msa = tiny_run(place)
  runs = (as_gqa(msa), dataclasses.replace(msa, batch_size=8))
  comparison = config_lib.ComparisonConfig(name="bad", runs=runs)
  out = place / "bad"
  with pytest.raises(ValueError, match="batch_size is 4 in text/gqa"):
    compare.compare(comparison, out)
  assert not out.exists()


def test_a_side_must_keep_what_another_starts_from(comparison):
  runs = tuple(dataclasses.replace(r, keep_steps=()) for r in comparison.runs)
  with pytest.raises(ValueError, match=r"init_step=1 of side 'gqa' is not"):
    dataclasses.replace(comparison, runs=runs)


def test_an_interval_to_aim_at_is_a_percentage(comparison):
  assert dataclasses.replace(comparison, aimed_interval=1).aimed_interval == 1
  for wrong in (0, -0.5, "1", True, float("inf"), float("nan")):
    text = f"aimed_interval={wrong!r}: wanted a percentage above 0, or None"
    with pytest.raises(ValueError, match=text):
      dataclasses.replace(comparison, aimed_interval=wrong)


def test_schedule():
  optimizer = config_lib.OptimizerConfig(
    learning_rate=2.0, warmup_steps=4, min_lr_ratio=0.1
  )
  rates = [optimizer.learning_rate_at(step, 10) for step in range(1, 11)]
  np.testing.assert_allclose(rates[:4], [0.5, 1.0, 1.5, 2.0])
  assert rates[6] == pytest.approx(2.0 * 0.55) and rates[-1] == pytest.approx(
    0.2
  )


def own_schedule(optimizer, num_steps):
  return lambda done: optimizer.learning_rate * done / num_steps


def test_other_schedules():
  make = functools.partial(
    config_lib.OptimizerConfig,
    learning_rate=2.0,
    warmup_steps=2,
    min_lr_ratio=0.5,
    decay_share=0.4,
  )

  def rates(schedule):
    made = make(schedule=schedule)
    return [made.learning_rate_at(step, 10) for step in range(1, 11)]

  assert rates("constant") == [1.0] + [2.0] * 9
  np.testing.assert_allclose(
    rates("wsd"), [1.0, *[2.0] * 5, 1.75, 1.5, 1.25, 1.0]
  )
  own = f"{__name__}:own_schedule"
  np.testing.assert_allclose(rates(own), 2 * np.arange(10) / 10)
  with pytest.raises(ValueError, match="schedule='linear': wanted one of"):
    make(schedule="linear")
  with pytest.raises(ValueError, match="cannot be imported"):
    rates("no_such_module:f")


# --- Command line -------------------------------------------------------------


@pytest.mark.parametrize("name", configs.names())
def test_presets_are_comparable(name):
  from train.report import runs

  comparison = configs.preset(name)
  assert comparison.name == name
  resolved = list(comparison.resolve("runs"))
  assert len(resolved) == len(comparison.runs) * len(comparison.seeds)
  for task in comparison.tasks():
    sides = [
      config_lib.to_dict(r)
      for r in resolved
      if r.task == task and r.seed == comparison.seeds[0]
    ]
    runs.check_comparable(sides)
  for run in comparison.runs:
    if isinstance(run.data, data.RecallConfig | data.ProbesConfig):
      source = data.load(run.data)
      assert source.vocab_size <= run.model.vocab_size
      # The tasks fit the context.
      source.train_batch(0, 0, batch_size=1, context=run.context)


def test_help(capsys):
  for command, words in {
    "--help": ("train", "compare", "report"),
    "compare --help": ("--seeds", "--folder", "smoke", "demo"),
    "train smoke --task text --side msa --help": (
      "--model.num-layers",
      "--optimizer.index-learning-rate-factor",
      "--recipe.kl-weight",
      "--data.tokenizer",
    ),
  }.items():
    with pytest.raises(SystemExit) as stop:
      cli.main(command.split())
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in words), shown
  assert cli.main(["train", "--help"]) == 0
  assert "--task" in capsys.readouterr().out


def test_command_line_errors(capsys):
  for command, words in {
    "train nothing": "preset 'nothing' is unknown: wanted one of",
    "train smoke --task text --side mla": "--task text --side msa",
    "train smoke": "train: wanted --task and --side: preset 'smoke' has",
    "compare": "wanted a preset",
    "compare --config /nowhere.json": "cannot be read",
  }.items():
    assert cli.main(command.split()) == 1
    assert words in capsys.readouterr().err


def test_import_is_light():
  code = (
    "import sys, train;"
    "assert not {'jax', 'orbax', 'tyro', 'matplotlib'} & set(sys.modules)"
  )
  subprocess.run([sys.executable, "-c", code], check=True)
