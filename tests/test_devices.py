"""The command that measures several devices, on devices made of one CPU."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from test_commands import TINY

from train import __main__ as cli
from train import configs, devices, speed
from train.config import MeshConfig
from train.configs import lm73m_16k


def run_script(script: str, count: int, *arguments: str) -> str:
  """What a script prints in a process of so many CPU devices."""
  env = os.environ | {
    "XLA_FLAGS": os.environ["XLA_FLAGS"]
    + f" --xla_force_host_platform_device_count={count}",
    "JAX_PLATFORMS": "cpu",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
  }
  done = subprocess.run(
    [sys.executable, "-c", script, *arguments],
    env=env,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return done.stdout


def test_meshes():
  found = devices.every_mesh(2, 2)
  assert found["tensor"] == MeshConfig(tensor=2)
  assert [mesh.shape(2) for mesh in found.values()] == [
    *((1, 1, 1, 1, 1), (2, 1, 1, 1, 1)),
    *((1, 2, 1, 1, 1), (1, 1, 1, 1, 2), (1, 1, 1, 2, 1)),
  ]
  assert devices.every_mesh(4, 6)["tensor"] == MeshConfig(data=3, tensor=2)
  assert list(devices.every_mesh(1, 2)) == ["one", "data", "fsdp", "context"]


def test_devices_compute_as_much_at_a_time_as_one():
  run, *_ = configs.preset("lm73m_16k").runs  # 2 rows
  for mesh, parts in {
    MeshConfig(): 4,
    MeshConfig(data=4): 1,
    MeshConfig(fsdp=4): 1,
    MeshConfig(data=2, tensor=2): 1,
    MeshConfig(data=2, context=2): 1,
    MeshConfig(data=2): 2,
  }.items():
    spread = devices._on(run, mesh, 4)
    assert (spread.batch_size, spread.grad_accumulation) == (8, parts)
    share = mesh.data * mesh.fsdp * mesh.tensor * mesh.context
    assert spread.batch_size // parts == 2 * share


def test_first_steps_have_every_phase():
  gqa, msa = speed.runs_with_own_steps(configs.preset("lm73m_16k").runs)
  for steps, warmup in {50: 5, 4: 1, 2: 1}.items():
    first = devices._first_steps(msa, steps)
    phases = [first.phase(step) for step in range(1, steps + 1)]
    assert phases == ["warmup"] * warmup + ["sparse"] * (steps - warmup)
  assert devices._first_steps(gqa, 1) == gqa
  most = msa.num_steps
  for steps, text in {
    1: "wanted at least 2",
    most + 1: f"wanted 1 to {most}, the steps",
  }.items():
    with pytest.raises(ValueError, match=text):
      devices._first_steps(msa, steps)


def test_one_device_is_refused(capsys):
  assert cli.main(["devices", "smoke"]) == 1
  assert "wanted at least 2 devices, 1 is here" in capsys.readouterr().err
  run = lm73m_16k.GQA
  with pytest.raises(ValueError, match=r"meshes=.*rings.*wanted one, data"):
    devices._side(run, 3, 2, ["rings"])


def test_sides_are_refused_in_the_words_of_compare(monkeypatch, capsys):
  """A side that starts from another one is left out, and the error says so."""
  monkeypatch.setattr(jax, "device_count", lambda: 2)
  for side in ("mla", "msa_cpt"):
    assert cli.main(["devices", "lm13m_4k", "--sides", "gqa", side]) == 1
    words = (
      f"sides=['{side}']: the comparison has gqa, msa. Sides without steps of"
      " their own are left out: msa_cpt, msa_cpt_index_128."
    )
    assert words in capsys.readouterr().err
  assert cli.main(["devices", "smoke", "--sides", "mla"]) == 1
  error = capsys.readouterr().err
  assert "the comparison has gqa, msa." in error and "left out" not in error


COMMAND = """
import sys
from train import __main__ as cli
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_the_command_on_two_devices(tmp_path):
  text = tmp_path / "text"
  text.mkdir()
  rng = np.random.default_rng(0)
  for i in range(40):
    words = rng.choice(["alpha", "beta", "def f(x):\n", "return x\n"], 200)
    (text / f"{i}.txt").write_text(" ".join(words))
  command = ["devices", "lm13m_4k", "--sides", "msa", "--steps", "3"]
  # Data differ from fsdp in where parameters lie only.
  command += ["--meshes", "fsdp", "context", "tensor"]
  command += ["--results", str(tmp_path), "--set", *TINY]
  command += ["model.implementation=reference", "recipe.index_warmup_steps=0"]
  command += [f"data.text.path={text}", f"data.text.cache_dir={tmp_path}"]
  shown = run_script(COMMAND, 2, *command)
  *_, path = shown.splitlines()
  assert pathlib.Path(path) == tmp_path / "lm13m_4k_msa_cpu_x2.json"
  found = json.loads(pathlib.Path(path).read_text())
  assert {"started", "commit", "command", "versions"} <= set(found)
  assert (found["device_count"], found["steps"]) == (2, 3)
  losses = {row["mesh"]: row for row in found["losses"]}
  assert list(losses) == [
    *("one", "one, rows in another order"),
    *("fsdp", "context", "tensor"),
  ]
  for row in losses.values():
    assert len(row["loss"]) == len(row["kl"]) == 3
    # Float32, whose sums are split in another way.
    np.testing.assert_allclose(row["loss"], losses["one"]["loss"], rtol=1e-5)
    np.testing.assert_allclose(row["kl"], losses["one"]["kl"], rtol=1e-4)
    wanted = np.divide(row["loss"], losses["one"]["loss"]) - 1
    assert row["loss_difference"] == pytest.approx(np.abs(wanted).max())
  assert len(set(losses["one"]["loss"])) == 3
  speed = {row["mesh"]: row for row in found["speed"]}
  sizes = {mesh: row["batch_size"] for mesh, row in speed.items()}
  assert sizes == {"one": 2, "fsdp": 4, "context": 4, "tensor": 4}
  for row in speed.values():
    assert (row["phase"], row["implementation"]) == ("sparse", "reference")
    rate = 1e3 * row["batch_size"] * 128 / row["step_ms"]
    assert row["tokens_per_second"] == pytest.approx(rate, rel=1e-3)
    # One device of the two gives half of what they could.
    ideal = speed["one"]["tokens_per_second"]
    ideal *= 1 if row["mesh"] == "one" else 2
    assert row["efficiency"] == pytest.approx(
      row["tokens_per_second"] / ideal, abs=1e-4
    )
  generation = {row["mesh"]: row for row in found["generation"]}
  assert list(generation) == ["one", "fsdp", "context", "tensor"]
  for row in generation.values():
    assert (row["rows"], row["prompt_tokens"]) == (4, 64)
    assert row["equal_tokens"] == 1
    assert row["logit_difference"] < 1e-4 * row["logit_deviation"]
  assert f"{'tensor':26} 100.0% of tokens equal" in shown


LOWERING = """
import json, sys
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from pallas_kernels import mosaic
from train import config, configs, devices, speed
from train.program import Program, compile_key
mosaic.require_hopper = lambda: None
cudnn.check_cudnn_version = lambda: 91000
cudnn.check_compute_capability = lambda _: True
comparison = configs.preset("lm73m_16k")
one_layer = config.with_fields(comparison, ["model.num_layers=1"])
gqa, msa = speed.runs_with_own_steps(one_layer.runs)
mesh = config.MeshConfig(**dict.fromkeys(sys.argv[1:], 2))
for run in (gqa, msa):
  program = Program(compile_key(devices._on(run, mesh, 8)))
  generation = devices.Generation(program)
  for phase in (*run.phases(), "generation"):
    with program.context():
      if phase == "generation":
        traced = generation.trace()
      else:
        traced = program.trace(phase)
      text = traced.lower(lowering_platforms=("cuda",)).as_text()
    print(json.dumps({
      "what": f"{run.side} {phase}",
      "mosaic": "mosaic_gpu" in text,
      "cudnn": "__cudnn$fmha" in text,
      "left to the partitioner": "CustomSPMDPartitioning" in text,
      **devices.launches(traced.jaxpr.jaxpr),
    }))
"""


@pytest.mark.slow  # test_layer_under_a_mesh_lowers is the quick one
@pytest.mark.parametrize("other", ["data", "context"])
def test_kernels_lower_for_several_gpus(other):
  """Each on its device's rows, KV heads and tokens: training and generation.

  Two devices for each of three axes.
  """
  printed = run_script(LOWERING, 8, "fsdp", "tensor", other)
  rows = map(json.loads, printed.splitlines())
  found = {row["what"]: row for row in rows}
  for what, row in found.items():
    assert row["mapped"] and not row["unmapped"], row
    assert row["mosaic"] == what.startswith("msa"), row
    assert row["cudnn"] == (what.startswith("gqa") or "warmup" in what), row
    assert not row["left to the partitioner"], row
  assert list(found) == [
    *("gqa dense", "gqa generation"),
    *("msa warmup", "msa sparse", "msa generation"),
  ]
