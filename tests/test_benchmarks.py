"""The benchmark on the CPU, with the reference in the kernels' places."""

import ast
import concurrent.futures
import dataclasses
import functools
import importlib.util
import json
import os
import pathlib
import re
import shlex
import signal
import sys
import time

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import launches

import msa_jax
from benchmarks import __main__ as bench
from benchmarks import (
  cases,
  decode,
  forward,
  fuzz,
  fuzz_processes,
  measure,
  packed,
  records,
  starts,
  training,
  worth,
)
from msa_jax import reference
from pallas_kernels import mosaic, sparse_attention_fwd, tile_plan
from train import corpus

FIELDS = {
  *cases.Case.__dataclass_fields__,
  *(
    "op",
    "selection",
    "union8",
    "score_precision",
    "implementation",
    "ms",
    "spread_ms",
    "dense_ms",
    "dense_ms_by",
    "dense",
    "speedup",
    "tflops",
    "peak_bytes",
    "matmul_tflops",
    "copy_tbs",
    "date",
    "commit",
    "jax",
  ),
}


@pytest.fixture
def arguments(monkeypatch, tmp_path, pretend_hopper):
  """Arguments of a run over one tiny case, and the file that it writes."""
  sizes = dict(num_heads=4, num_kv_heads=2, head_dim=64, index_dim=64)
  case = cases.Case(tokens=64, block_size=4, top_k=4, **sizes)
  monkeypatch.setattr(forward, "cudnn_attention", lambda q, k, v: q)
  monkeypatch.setattr(forward, "mosaic_attention", lambda q, k, v: q)
  monkeypatch.setattr(
    measure, "ceilings", lambda: dict(matmul_tflops=1.0, copy_tbs=1.0)
  )
  scans = [
    measure.KernelTime("decode_scan_kernel", 3e-6 * i, 1e-6) for i in range(4)
  ]
  monkeypatch.setattr(measure, "kernels_of", lambda call: scans)
  for group in (forward, training):
    monkeypatch.setitem(group.CASES, "8k", case)
  path = tmp_path / "device.json"
  options = ["--results", str(path), "--commit", "abc"]
  return ["--tokens", "8k", "--implementation", "reference", *options], path


def test_forward_ops_write_records(arguments):
  pytest.importorskip("matplotlib")
  arguments, path = arguments
  ops = ["--ops", *forward.OPS]
  assert bench.main([*arguments, *ops, "--precision", "exact", "fp8"]) == 0
  content = json.loads(path.read_text())
  assert set(content) == {"device", "jax", "rows", "recall"}
  rows = content["rows"]
  # prefill and select: 2 selections x 2 precisions; sparse_forward: exact only.
  assert len(rows) == 10
  assert all(set(row) == FIELDS for row in rows)
  assert all(row["ms"] > 0 and row["kv_tokens"] == 64 for row in rows)
  for row in rows:
    times = row["dense_ms_by"]
    if row["op"] != "prefill":
      assert row["speedup"] is None and times == {}
      continue
    assert set(times) == {"cudnn", "jax mosaic_gpu"}
    assert row["dense_ms"] == times[row["dense"]] == min(times.values())
  assert path.with_suffix(".png").stat().st_size > 0
  recalls = {(r["selection"], r["score_precision"]) for r in content["recall"]}
  assert recalls == {(s, "fp8") for s in cases.SELECTIONS}


@pytest.mark.parametrize("command", [bench.main, packed.main])
def test_without_a_hopper_gpu_nothing_is_measured(no_gpu, command):
  pytest.importorskip("matplotlib")
  with pytest.raises(SystemExit, match=r"benchmarks\.portable measures on any"):
    command([])


def test_a_second_run_replaces_the_records_that_it_measured(arguments):
  """And no others: theirs stay in their places, untouched."""
  pytest.importorskip("matplotlib")
  arguments, path = arguments
  command = [*arguments, "--precision", "exact", "--selection", "random"]
  first = ["--ops", "select", "sparse_forward", "--commit", "first"]
  assert bench.main([*command, *first]) == 0
  before = json.loads(path.read_text())["rows"]
  assert [record["op"] for record in before] == ["select", "sparse_forward"]
  assert {record["commit"] for record in before} == {"first"}

  second = ["--ops", "select", "--commit", "second"]
  assert bench.main([*command, *second]) == 0
  replaced, kept = json.loads(path.read_text())["rows"]
  assert kept == before[1]
  assert replaced["commit"] == "second"
  same = {
    "op",
    "selection",
    "score_precision",
    *cases.Case.__dataclass_fields__,
  }
  assert all(replaced[field] == before[0][field] for field in same)

  # Another selection is another record, which comes after the others.
  third = [
    "--ops",
    "select",
    "--selection",
    "trained_like",
    "--commit",
    "third",
  ]
  assert bench.main([*command, *third]) == 0
  *old, new = json.loads(path.read_text())["rows"]
  assert old == [replaced, kept]
  assert (new["op"], new["selection"]) == ("select", "trained_like")
  assert new["commit"] == "third"


@pytest.mark.slow  # turns are tested by the next test
def test_other_heads_in_commands_that_take_turns(arguments, tmp_path):
  pytest.importorskip("matplotlib")
  arguments, path = arguments
  options = ["--heads", "2x2x64", "6x2x64", "--ops", "sparse_forward"]
  lock = ["--lock", str(tmp_path / "lock"), "--selection", "random"]
  assert bench.main([*arguments, *options, *lock, "--precision", "exact"]) == 0
  rows = json.loads(path.read_text())["rows"]
  assert [row["num_heads"] for row in rows] == [2, 6]
  assert {row["implementation"] for row in rows} == {"reference"}
  assert path.with_name("device_heads.png").stat().st_size > 0


def test_a_turn_comes_when_no_other_command_compiles_or_measures(tmp_path):
  lock, order = tmp_path / "lock", []

  def other():
    with measure.turns(lock) as wait:
      order.append("compiles")
      wait()
      order.append("measures")

  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    with measure.turns(lock):
      waiting = pool.submit(other)
      while not order:
        time.sleep(0.01)
      time.sleep(0.1)
      assert order == ["compiles"]
    waiting.result()
  assert order == ["compiles", "measures"]


@pytest.mark.slow
def test_training_ops_write_records(arguments):
  pytest.importorskip("matplotlib")
  arguments, path = arguments
  assert bench.main([*arguments, "--ops", *training.OPS]) == 0
  rows = json.loads(path.read_text())["rows"]
  extra = {"kernels_ms", "idle_ms"}
  assert all(set(row) == FIELDS | extra for row in rows)
  assert sorted(row["op"] for row in rows) == sorted(
    [*training.OPS[:3] * 2, "warmup"]
  )
  for row in rows:
    alone = row["op"] in ("sparse_backward", "kl")
    assert (row["speedup"] is None) == alone
    assert set(row["dense_ms_by"]) == (set() if alone else {"cudnn"})
  assert path.with_suffix(".png").stat().st_size > 0


def test_kernels_of_a_step(monkeypatch):
  seen = [("b", 0, 2), ("a", 3, 4), ("b", 7, 2), ("tiny", 9, 0.5)]
  kernels = [measure.KernelTime(n, 1 + t / 1e3, d / 1e3) for n, t, d in seen]
  monkeypatch.setattr(measure, "kernels_of", lambda call: kernels)
  fields = measure.kernel_fields(lambda: None, steps=2, least=0.1)
  assert fields["kernels_ms"] == {"b": 2.0, "a": 2.0, "other": 0.25}
  assert fields["idle_ms"] == 0.5


def reference_decode(case, implementation):
  """What the kernels compute, by the reference."""

  def run(q, k, v, index_q, index_k, scale, kv_lengths):
    if scale is not None:
      index_q, q_scale = reference.fp8_codes(index_q)
      index_q = index_q.astype(jnp.float32) * q_scale[..., None]
      index_k = index_k.astype(jnp.float32) * scale[..., None]
    options = dict(block_size=case.block_size, kv_lengths=kv_lengths)
    ids = msa_jax.select_blocks(
      index_q, index_k, top_k=case.top_k, implementation="reference", **options
    )
    out, _ = reference.sparse_attention(
      q, k, v, ids, scale=case.head_dim**-0.5, **options
    )
    return out, ids

  return run


DECODE_ATTENTION = decode.attention


@pytest.fixture
def decode_arguments(arguments, monkeypatch):
  case = cases.Case(
    tokens=1, kv_tokens=64, batch=2, block_size=4, top_k=4, num_heads=4,
    num_kv_heads=2, head_dim=64, index_dim=64,
  )  # fmt: skip
  monkeypatch.setitem(cases.DECODE, "1x32k", case)
  monkeypatch.setattr(decode, "attention", reference_decode)
  monkeypatch.setattr(decode, "COLD_BYTES", 1 << 14)
  monkeypatch.setattr(decode, "MIN_STEPS", 4)
  monkeypatch.setattr(decode, "cudnn_decode", lambda q, k, v: q)
  arguments, path = arguments
  options = ["--tokens", "1x32k", "--implementation", "mosaic_gpu"]
  return ["--ops", "decode", *arguments, *options], path


# Other operations write theirs above, and a wrong decoding is found below.
@pytest.mark.slow
def test_decode_writes_records(decode_arguments):
  pytest.importorskip("matplotlib")
  arguments, path = decode_arguments
  assert bench.main(arguments) == 0
  rows = json.loads(path.read_text())["rows"]
  assert [row["score_precision"] for row in rows] == ["exact", "fp8"]
  extra = {"kernels_ms", "idle_ms", "index_tbs", "copy_fraction"}
  for row in rows:
    assert set(row) == FIELDS | extra
    assert row["batch"] == 2 and row["kv_tokens"] == 64
    assert row["ms"] > 0 and row["dense"] == "cudnn"
    assert set(row["dense_ms_by"]) == {"cudnn", "xla"}
    assert row["dense_ms"] == row["dense_ms_by"]["cudnn"]
    assert row["kernels_ms"] == {"decode_scan_kernel": 1e-3}
    assert row["idle_ms"] == 1.5e-3
  assert rows[0]["index_tbs"] == round(2 * 64 * 128 / 1e6, 3)


@pytest.mark.slow  # one implementation is measured by the tests above
def test_implementations_are_measured_beside_each_other(
  decode_arguments, monkeypatch
):
  pytest.importorskip("matplotlib")
  arguments, path = decode_arguments
  monkeypatch.setattr(decode, "attention", DECODE_ATTENTION)
  options = ["--ops", "decode", "prefill", "--tokens", "1x32k", "8k"]
  options += ["--precision", "exact", "--selection", "random"]
  implementations = ["xla", "reference"]
  command = [*arguments, *options, "--implementation", *implementations]
  assert bench.main(command) == 0
  rows = json.loads(path.read_text())["rows"]
  found = [(row["op"], row["implementation"]) for row in rows]
  assert sorted(found) == [
    (op, name) for op in ("decode", "prefill") for name in ("reference", "xla")
  ]
  assert not any("index_tbs" in row for row in rows)  # the kernels' alone


def test_no_number_on_a_wrong_decode(decode_arguments, monkeypatch, capsys):
  arguments, path = decode_arguments
  right = reference_decode

  def off(case, implementation):
    def run(*inputs):
      out, ids = right(case, implementation)(*inputs)
      return jnp.multiply(out, 1.02), ids

    return run

  monkeypatch.setattr(decode, "attention", off)
  assert bench.main(arguments) == 1
  out = capsys.readouterr().out
  assert "decode exact: out's RMS error" in out and " ms" not in out
  assert not path.exists()


def test_no_number_on_a_wrong_choice(arguments, monkeypatch, capsys):
  arguments, path = arguments
  ids = jnp.zeros((2, 2, 64, 4), jnp.int32)
  monkeypatch.setattr(forward, "select", lambda *_: lambda q, k: ids)
  assert bench.main([*arguments, "--ops", "select"]) == 1
  out = capsys.readouterr().out
  assert "select exact: recall" in out and " ms" not in out
  assert not path.exists()


@pytest.mark.parametrize("top_k", [4, 1])
def test_no_number_on_a_wrong_attention(arguments, monkeypatch, capsys, top_k):
  arguments, path = arguments
  right = forward.sparse

  def off(case, implementation):
    def run(*inputs):
      out, lse = right(case, implementation)(*inputs)
      return (1.02 if case.top_k == top_k else 1.0) * out, lse

    return run

  monkeypatch.setattr(forward, "sparse", off)
  assert bench.main([*arguments, "--ops", "sparse_forward"]) == 1
  out = capsys.readouterr().out
  [said] = [line for line in out.splitlines() if " blocks: " in line]
  assert said.startswith(f"sparse_forward of {top_k} blocks: out")
  assert not path.exists()


# One program: the plan has many small operations.
@functools.partial(jax.jit, static_argnums=3)
def find_pairs(ids, positions, until, geometry):
  _, choices = tile_plan.plan_by_choice(ids, positions, until, geometry)
  return tile_plan.find_pairs(choices, geometry)


@pytest.mark.parametrize(
  "name", [pytest.param("8k", marks=pytest.mark.slow), "small_heads_32k"]
)
def test_checks_reach_both_ways_of_the_kernels(name):
  """One check's choices are all walked by row tiles, another's mostly pairs."""
  case = bench.check_case(cases.CASES[name])
  shares = []
  for of in forward.sparse_cases(case):
    ids = forward.random_blocks(of, "xla")
    geometry = sparse_attention_fwd.geometry(
      of.tokens, of.kv_tokens,
      mosaic.Packing(of.num_heads // of.num_kv_heads),
      of.head_dim, of.block_size, of.top_k,
      sparse_attention_fwd.Config(),
    )  # fmt: skip
    start = of.kv_tokens - of.tokens
    groups = of.batch * of.num_kv_heads
    is_pair = find_pairs(
      ids.reshape(-1, of.tokens, of.top_k),
      jnp.tile(start + jnp.arange(of.tokens), (groups, 1)),
      jnp.full((groups, 2, geometry.num_blocks), mosaic.NEVER),
      geometry,
    )
    shares.append(float(is_pair.sum() / (ids >= 0).sum()))
  assert shares[0] == 0 and shares[1] > 0.3


@pytest.mark.parametrize(
  "wrong", ["kl", pytest.param("dk", marks=pytest.mark.slow)]
)
def test_no_number_on_a_wrong_gradient(arguments, monkeypatch, capsys, wrong):
  arguments, path = arguments
  layer = training.layer

  def off(case, phase, implementation):
    run = layer(case, phase, implementation)
    if implementation != "xla":
      return run

    def worse(*inputs):
      kl, (dq, dk, *rest) = run(*inputs)
      return (2 * kl, (dq, dk, *rest)) if wrong == "kl" else (
        kl, (dq, 1.01 * dk, *rest)
      )  # fmt: skip

    return worse

  monkeypatch.setattr(training, "layer", off)
  command = [*arguments, "--implementation", "xla", "--ops", "train"]
  assert bench.main(command) == 1
  out = capsys.readouterr().out
  assert f"train: {wrong}" in out and " ms" not in out
  assert not path.exists()


def test_fitted_choices_want_their_knobs(arguments, monkeypatch, tmp_path):
  pytest.importorskip("matplotlib")
  arguments, path = arguments
  command = [*arguments, "--ops", "select", "--precision", "exact"]
  monkeypatch.setattr(cases, "FITTED", tmp_path / "fitted.json")
  with pytest.raises(ValueError, match=r"fitted\.json.*benchmarks\.fit"):
    bench.main([*command, "--selection", "fitted"])
  knobs = dict(noise=0.1, drift=16, sink=0.1, near=1.0)
  rows = [knobs | {"kv_tokens": 64}, knobs | {"kv_tokens": 256, "noise": 0.3}]
  cases.FITTED.write_text(json.dumps({"knobs": rows}))
  assert cases.fitted_sharing(128).noise == pytest.approx(0.2)
  for tokens in (63, 257):
    with pytest.raises(ValueError, match=f"from 64 to 256, .* got {tokens}"):
      cases.fitted_sharing(tokens)
  assert bench.main([*command, "--selection", "fitted", "random"]) == 0
  rows = json.loads(path.read_text())["rows"]
  union = {row["selection"]: row["union8"] for row in rows}
  # Of 16 blocks, 4 a query.
  assert 4 <= union["fitted"] < union["random"] <= 16


def test_lengths_that_were_not_fitted_are_refused_at_once(
  arguments, monkeypatch
):
  arguments, path = arguments
  monkeypatch.setattr(measure, "Programs", None)  # nothing is compiled
  wanted = "kv_tokens from 8192 to 131072.* got 1048576"
  with pytest.raises(ValueError, match=wanted):
    bench.main(
      [*arguments, "--tokens", "32k", "1m", "--selection", "random", "fitted"]
    )
  assert not path.exists()


@pytest.mark.parametrize(
  "options, text",
  [
    (
      "--ops decode --tokens 32k",
      "--ops decode --tokens 32k .*: decode has --tokens 1x256 .*"
      " --selection random",
    ),
    (
      "--ops train warmup --tokens 1m",
      "--tokens 1m .*: train has --tokens 256 1k 4k 8k 32k 128k 512k .*; warmup"
      " has --tokens 256 1k 4k 8k 32k 128k small_heads_32k 8x4k .*_16_heads$",
    ),
    *(
      (
        f"--ops decode --tokens 1x32k {wrong}",
        "with --selection random and --precision exact or fp8",
      )
      for wrong in ("--precision fast", "--selection fitted")
    ),
  ],
)
def test_nothing_to_measure(arguments, options, text):
  arguments, path = arguments
  with pytest.raises(ValueError, match="nothing to measure for .*" + text):
    bench.main([*arguments, *options.split()])
  assert not path.exists()


def test_records_keep_the_jax_they_were_measured_under(tmp_path):
  """Also those of older files, which have one version for all records."""
  path = tmp_path / "device.json"

  def record(op, **more):
    return dict(op=op, tokens=1, selection="random", **more)

  device = jax.devices()[0].device_kind
  rows = [record("a"), record("b", jax="0.2"), record("c")]
  old = dict(device=device, jax="0.1", rows=rows, recall=[record("a")])
  records.write_json(path, old)
  content = records.store(path, [record("a"), record("d")], [])
  here = jax.__version__
  found = {row["op"]: row["jax"] for row in content["rows"]}
  assert found == {"a": here, "b": "0.2", "c": "0.1", "d": here}
  assert content["recall"] == [record("a", jax="0.1")]
  assert set(content["jax"].split(", ")) == {"0.1", "0.2", here}
  assert records.read_json(path) == content


def test_another_devices_file_is_refused(arguments, monkeypatch):
  arguments, path = arguments
  monkeypatch.setattr(measure, "Programs", None)  # nothing is compiled
  for content in (dict(device="an A100", jax="0.1", rows=[]), dict(knobs=[])):
    path.write_text(json.dumps(content))
    for call in (
      lambda: bench.main([*arguments, "--ops", "select"]),
      lambda: records.store(path, [], []),
    ):
      with pytest.raises(ValueError, match=f"{path} .*measured on .*wanted"):
        call()
    assert json.loads(path.read_text()) == content


def test_results_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
  figure = pytest.importorskip("matplotlib.figure")
  path = tmp_path / "device.json"
  records.write_json(path, dict(rows=[1]))
  with pytest.raises(TypeError):
    records.write_json(path, dict(rows=[2], bad=object()))
  with pytest.raises(OSError), records.whole_file(path) as file:
    file.write_text("half")
    raise OSError
  assert records.read_json(path) == dict(rows=[1])

  plot = path.with_suffix(".png")
  plot.write_text("before")
  save = figure.Figure.savefig

  def fail(self, file, **options):
    save(self, file, **options)
    raise OSError

  monkeypatch.setattr(figure.Figure, "savefig", fail)
  row = dict.fromkeys(records.KEY) | dict(speedup=None)
  with pytest.raises(OSError):
    records.plot(dict(device="a", rows=[row]), plot)
  assert plot.read_text() == "before"
  assert sorted(tmp_path.iterdir()) == [path, plot]


def test_a_plot_has_a_line_for_each_implementation():
  figure = pytest.importorskip("matplotlib.figure").Figure()
  axes = figure.subplots()
  rows = [
    dict(tokens=tokens, speedup=speedup, implementation=implementation)
    | dict(selection="random", score_precision="exact", dense_ms=1.0)
    for implementation, speedup in (("mosaic_gpu", 4.0), ("xla", 0.5))
    for tokens in (32768, 8192)
  ]
  records.plot_op(axes, "train", rows)
  lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
  assert lines["random, exact"] == [[8192, 4], [32768, 4]]
  assert lines["random, exact, xla"] == [[8192, 0.5], [32768, 0.5]]


# ------------------------------------------------------------------ the fuzzer


FUZZ = ["--signatures", "6", "--tiny", "--implementation", "xla"]


@pytest.mark.slow
def test_fuzz_of_a_right_implementation(tmp_path):
  path = tmp_path / "fuzz.json"
  assert fuzz.main([*FUZZ, "--calls", "12", "--out", str(path)]) == 0
  summary = json.loads(path.read_text())
  assert summary["calls"] == 12 and summary["signatures"] == 6
  assert set(summary["calls_by_op"]) == set(fuzz.OPS)
  assert not summary["failures"] and not summary["unsupported"]


def test_fuzz_finds_a_wrong_implementation(tmp_path, monkeypatch, capsys):
  """Of one query's output, one entry is off by 5 %."""
  right = fuzz.runner

  def wrong(*args):
    run = right(*args)

    def off(x):
      results = run(x)
      if "lse" in results:
        out = results["out"]
        index = jnp.argmax(jnp.abs(jnp.nan_to_num(out.ravel())))
        out = out.ravel().at[index].multiply(1.05).reshape(out.shape)
        results |= dict(out=out)
      return results

    return off

  monkeypatch.setattr(fuzz, "runner", wrong)
  path = tmp_path / "fuzz.json"
  assert fuzz.main([*FUZZ, "--only", "12", "--out", str(path)]) == 1
  [failure] = json.loads(path.read_text())["failures"]
  assert failure["call"] == 12 and "out: error" in failure["faults"][0]
  assert failure["repeat"].endswith("--tiny --only 12")
  assert failure["repeat"] in capsys.readouterr().out


def casts_there_and_back(jaxpr):
  """How many casts of float32 to a narrower dtype are cast back."""
  narrowed, count = set(), 0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "convert_element_type":
      (x,), (y,) = eqn.invars, eqn.outvars
      dtypes = x.aval.dtype, y.aval.dtype
      count += id(x) in narrowed and dtypes[1] == jnp.float32
      if dtypes[0] == jnp.float32 and dtypes[1] in (jnp.bfloat16, jnp.float16):
        narrowed.add(id(y))
    for inner in jax.extend.core.jaxprs_in_params(eqn.params):
      count += casts_there_and_back(inner)
  return count


@pytest.mark.parametrize("op", [op for op in fuzz.OPS if op != "select"])
def test_fuzz_rounds_without_casts_that_xla_leaves_out(op):
  """On a GPU the formula with rounded operands would otherwise be the truth."""

  @jax.jit
  def twice_cast(x):
    return x.astype(jnp.bfloat16).astype(jnp.float32)

  assert casts_there_and_back(jax.make_jaxpr(twice_cast)(1.0).jaxpr)
  s = next(s for s in fuzz.signatures(0, 6, tiny=True) if s.op == op)
  x = jax.eval_shape(functools.partial(fuzz.draw, s), jax.random.key(0))
  got = jax.eval_shape(fuzz.runner(s, "reference", False), x)
  check = jax.make_jaxpr(fuzz.checker(s))(x, got, got)
  assert not casts_there_and_back(check.jaxpr)


# The one call of 10,000 of seed 0 that failed.
CALL_2353 = ["--seed", "0", "--signatures", "96", "--only", "2353"]


def signature_and_operands(argv):
  """Those of the only call."""
  args = fuzz.parse(argv)
  plan = fuzz.Plan.of(args)
  [(index, [call])] = plan.calls.items()
  s, key = plan.signatures[index], jax.random.key(args.seed)
  draw = jax.jit(functools.partial(fuzz.draw, s))
  return s, draw(jax.random.fold_in(key, call))


# The test before finds where a bound leaves out a rounding that kernels have.
@pytest.mark.slow
def test_fuzz_bound_counts_the_rounding_of_the_kl_gradient():
  """Seed 0, call 2353 of the fuzzer: three roundings that add up.

  One query has 9 % of all weight. It sees the 35 keys from key 282 on, which
  are one block. Of the error of its dindex_q, 1.5e-5 is of g, 1.3e-5 of the
  block's part and 1.1e-5 of the result: 3.99e-5, also on an H200. There, the
  bound was 3.44e-5, which is one unit for the last two alone, because XLA left
  out the casts that round g in the fuzzer's formula.

  Here are that query and its keys, and one that chose nothing, which has the
  other queries' weight: all numbers are those of the whole call.
  """
  whole, x = signature_and_operands(CALL_2353)
  first, end = 282, 317
  queries, keys = slice(end - 2, end), slice(first, end)
  s = dataclasses.replace(
    whole, batch=1, q_len=2, kv_len=end - first, packed=""
  )
  weight, total = x["mask"][1, end - 1], x["mask"].sum()
  assert 0.08 < weight / total < 0.09
  visible = x["visible"][1:, :, queries, keys].at[:, :, 0].set(False)
  assert visible[:, :, 1].all() and x["visible"][1, 0, end - 1].sum() == 35
  x |= {name: x[name][1:, queries] for name in ("q", "index_q")}
  names = ("k", "index_k", "clean_k", "clean_index_k")
  x |= {name: x[name][1:, keys] for name in names}
  x |= dict(
    mask=jnp.stack([total - weight, weight])[None],
    blocks=jnp.full((1, s.num_kv_heads, 2, s.top_k), -1).at[:, :, 1, 0].set(0),
    lengths=jnp.array([s.kv_len], jnp.int32),
    visible=visible,
  )
  got = jax.jit(fuzz.runner(s, "mosaic_gpu", interpret=True))(x)
  check = jax.jit(fuzz.checker(s))
  report = jax.tree.map(np.asarray, check(x, got, got))
  assert not fuzz.faults(report)
  error = report["results"]["dindex_q"]["error"]
  truth = jax.jit(lambda x: fuzz._kl(s, x, None)["dindex_q"])
  largest = np.abs(truth(x)).max()
  np.testing.assert_allclose(error, 3.985e-5, rtol=0.01)
  assert error > 2.0**-7 * largest  # the unit alone

  # The check still fails if any one key of 35 is left out of the sum, but for
  # two that add no more than about the bound, a sixth of what the median adds.
  # As index_q is 0, an index key has no other effect.
  assert not x["index_q"].any()

  @jax.jit
  @jax.vmap
  def without(key):
    index_k = x["clean_index_k"].at[:, key].set(0)
    less = truth(x | dict(clean_index_k=index_k)) - truth(x)
    wrong = got | dict(dindex_q=got["dindex_q"] + less)
    return fuzz.checker(s)(x, wrong, wrong)["results"]["dindex_q"]

  wrong = without(jnp.arange(s.kv_len))
  assert np.sum(wrong["error"] > wrong["bound"]) >= s.kv_len - 2


@pytest.mark.gpu
def test_gpu_fuzz_call_that_failed(hopper, capsys):
  """The whole call: on a GPU, XLA leaves out casts that a CPU does not."""
  assert fuzz.main(CALL_2353) == 0, capsys.readouterr().out
  s, x = signature_and_operands(CALL_2353)

  @jax.jit
  def error(x):
    truth, near = (fuzz._kl(s, x, dtype) for dtype in (None, s.dtype))
    return jnp.abs(near["dindex_q"] - truth["dindex_q"]).max()

  # 1.06e-5 in float64, and nothing if g is not rounded.
  assert 0.5e-5 < error(x) < 2e-5


def test_fuzz_repeats_a_call_and_its_signatures():
  found = fuzz.signatures(5, 100)
  assert found == fuzz.signatures(5, 100) and len(set(found)) > 90
  for op in ("attention", "dense"):
    assert {s.with_dlse for s in found if s.op == op} == {False, True}
  for op in ("kl", "warmup_kl"):
    assert {s.weighted for s in found if s.op == op} == {False, True}
  fp8 = [s for s in found if s.op == "decode" and s.precision == "fp8"]
  assert fp8 and not any(s.index_dim % 16 for s in fp8)
  assert all(s.q_len <= s.kv_len <= 16_384 for s in found)
  # The reference's largest arrays take up to 1 GiB.
  for s in found:
    blocks = -(-s.kv_len // s.block_size)
    size = s.batch * s.num_heads * s.q_len
    assert 4 * size * max(blocks * s.head_dim, s.kv_len) <= 1 << 30
  s, key = fuzz.signatures(5, 6, tiny=True)[0], jax.random.key(1)
  for a, b in zip(
    jax.tree.leaves(fuzz.draw(s, key)), jax.tree.leaves(fuzz.draw(s, key))
  ):
    assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("op", fuzz.OPS)
def test_fuzz_draws_every_size_of_an_operation(op):
  """In as many signatures as `--signatures` has by default."""
  found = fuzz.signatures(0, fuzz.parse([]).signatures)
  found = [s for s in found if s.op == op]
  dims, index_dims = (
    {getattr(s, name) for s in found} for name in ("head_dim", "index_dim")
  )
  assert {s.group_size for s in found} == set(range(1, 17))
  assert dims >= {64, 80, 96, 112, 128} and index_dims >= {64, 80, 96, 112, 128}
  assert max(index_dims) <= mosaic.MAX_INDEX_DIM
  if op in ("attention", "kl", "decode"):
    assert dims >= {136, 200, 256}
  else:
    assert max(dims) <= mosaic.MAX_DENSE_HEAD_DIM
  if op in ("warmup_kl", "dense"):
    return
  assert {s.top_k for s in found} == {1, 2, 3, 4, 6, 8, 16, 24, 32, 40, 64}
  many = [s for s in found if s.top_k > mosaic.LONG_LIST]
  assert all(s.num_blocks >= 2 * s.top_k for s in many)
  if op == "attention":
    assert sum(s.pairs != "" for s in found) == len(found) // 2
    few = [s.num_blocks <= min(64, 4 * s.top_k) for s in found]
    assert {(s.pairs, x) for s, x in zip(found, few)} >= {
      ("all", True), ("counted", False), ("", True), ("", False),
    }  # fmt: skip


def test_fuzz_numbers_are_random():
  numbers = fuzz.Numbers(jax.random.key(3))
  x, again = np.asarray(numbers.normal(400, 250)), numbers.normal(400, 250)
  n = x.size
  assert abs(x.mean()) < 4 / n**0.5 and abs(x.std() - 1) < 4 / n**0.5
  # Neighbours, other requests and other keys' numbers do not depend on them.
  other = fuzz.Numbers(jax.random.key(4)).normal(400, 250)
  for y in (np.roll(x, 1), np.roll(x, 1, axis=0), again, other):
    assert abs(np.mean(x * y)) < 4 / n**0.5
  _, counts = np.unique(numbers.integer(-2, 5, (n,)), return_counts=True)
  assert len(counts) == 7 and np.abs(counts - n / 7).max() < 5 * (n / 7) ** 0.5
  assert np.min(numbers.unit(n)) > 0 and np.max(numbers.unit(n)) < 1


@pytest.mark.parametrize("count", [1, 5, 14, 100])
def test_fuzz_processes_share_each_call_once(count):
  argv = ["--calls", "1000", "--seed", "2"]
  plan = fuzz.Plan.of(fuzz.parse(argv))
  op_of = {index: plan.signatures[index].op for index in plan.calls}
  shares = fuzz_processes.deal(op_of, count)
  assert len(shares) == min(count, 96)
  calls = []
  for share in shares:
    mine = fuzz.parse([*argv, "--share", *map(str, share)])
    calls += [x for own in fuzz.Plan.of(mine).calls.values() for x in own]
    each = [sum(op_of[i] == op for i in share) for op in fuzz.OPS]
    assert max(each) - min(each) <= 1
  assert sorted(calls) == list(range(1000))
  some = fuzz.Plan.of(fuzz.parse(["--only", "3", "97", "99"]))
  assert some.calls == {3: [3, 99], 1: [97]}


# In the fuzzer's place: does nothing, and ends in a way of its own.
STAND_IN = """
import json, os, signal, sys, time

share = int(sys.argv[sys.argv.index("--share") + 1])
x = dict(
  device="none", pid=os.getpid(), calls_by_op=dict(kl=3), failures=[],
  unsupported={}, finished=[share], unfinished=[],
)
if share == 1:
  x["failures"] = [dict(call=share)]
if share in (2, 3):
  x |= dict(finished=[], unfinished=[share], calls_by_op=dict(kl=1))
if share != 4:
  with open("partial" + str(share), "w") as file:
    json.dump(x, file)
  os.replace("partial" + str(share), sys.argv[-1])
print("signature", share)
if share == 2:
  os.kill(os.getpid(), signal.SIGSEGV)
if share == 3:
  time.sleep(100)
print("ERROR SUMMARY:", 7 if share == 5 else 0, "errors")
sys.exit(share == 1)
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
  """A command that takes the fuzzer's own as its arguments."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(fuzz_processes, "GRACE", 0.0)
  monkeypatch.setattr(fuzz_processes, "TURN", 0.02)
  (tmp_path / "stand_in.py").write_text(STAND_IN)
  return [sys.executable, "-S", str(tmp_path / "stand_in.py")]


def test_fuzz_reports_each_process_that_dies(stand_in, tmp_path, capsys):
  """By a signal, by the time limit, without a summary, with errors."""
  path = tmp_path / "fuzz.json"
  argv = ["--each-kernel", "--processes", "3", "--out", str(path)]
  argv += ["--sanitizer", shlex.join(stand_in), "--time-limit", "4"]
  assert fuzz.main([*argv, "--only", *map(str, range(7))]) == 1
  summary = json.loads(path.read_text())
  assert summary["calls"] == 4 * 3 + 2 and summary["device"] == "none"
  assert [x["call"] for x in summary["failures"]] == [1]
  assert summary["unfinished"] == [2, 3, 4]
  lost = {x["signatures"][0]: x["fault"] for x in summary["lost"]}
  assert lost == {
    2: "signal 11",
    3: "it did not end in time",
    4: "exit code 0, and it wrote no summary",
    5: "the sanitizer did not say that there were no errors",
  }
  printed = capsys.readouterr().out
  assert "| signature 6" in printed and "4 processes lost" in printed
  assert any("ERROR SUMMARY: 7 errors" in x["output"] for x in summary["lost"])
  # Without any of these, all is well.
  assert fuzz.main([*argv, "--only", "0", "6"]) == 0
  assert json.loads(path.read_text())["calls"] == 6


def test_fuzz_leaves_no_process_behind(stand_in):
  seen = []

  def stop(parts, lost):
    seen[:] = [x["pid"] for x in parts]
    if len(seen) == 2:
      os.kill(os.getpid(), signal.SIGTERM)

  with pytest.raises(SystemExit):
    fuzz_processes.run(
      [[3], [3]],
      lambda share, out: [*stand_in, "--share", str(share[0]), str(out)],
      stop,
      at_once=2,
      time_limit=60.0,
      sanitizer=False,
    )
  for pid in seen:
    with pytest.raises(ProcessLookupError):
      os.kill(pid, 0)


def test_fuzz_environment_of_a_sanitizer(monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", "--xla_mine=1")
  monkeypatch.delenv("XLA_PYTHON_CLIENT_ALLOCATOR", raising=False)
  assert fuzz_processes.environment(False)["XLA_FLAGS"] == "--xla_mine=1"
  env = fuzz_processes.environment(True)
  assert env["XLA_PYTHON_CLIENT_ALLOCATOR"] == "platform"
  assert env["XLA_FLAGS"].startswith("--xla_gpu_enable_command_buffer= ")
  assert env["XLA_FLAGS"].endswith(" --xla_mine=1")


@pytest.mark.slow
def test_fuzz_in_processes(tmp_path):
  path = tmp_path / "fuzz.json"
  argv = [*FUZZ, "--calls", "7", "--processes", "2", "--time-limit", "300"]
  assert fuzz.main([*argv, "--out", str(path)]) == 0
  summary = json.loads(path.read_text())
  assert summary["calls"] == 7 and summary["finished"] == list(range(6))


def kernel_names():
  """What `pallas_kernels` calls its kernels, as patterns."""

  def names(node):
    if isinstance(node, ast.Constant):
      yield node.value
    elif isinstance(node, ast.IfExp):
      yield from (*names(node.body), *names(node.orelse))
    elif isinstance(node, ast.JoinedStr):
      parts = (next(names(x), ".+") for x in node.values)
      yield "".join(parts)

  for path in pathlib.Path(mosaic.__file__).parent.glob("*.py"):
    for call in ast.walk(ast.parse(path.read_text())):
      if isinstance(call, ast.Call):
        function = ast.unparse(call.func).rpartition(".")[-1]
        for x in call.keywords if function in ("launch", "kernel") else ():
          if x.arg in ("name", "kernel_name"):
            yield from names(x.value)


# `--each-kernel`, which this tests, is for machines with a GPU.
@pytest.mark.slow
def test_fuzz_can_launch_each_kernel(pretend_hopper):
  wanted, found = set(kernel_names()), set()
  assert {"sparse_tiles", "sparse_tiles_merge", "msa_select_.+"} < wanted
  for s in fuzz.EACH_KERNEL[:10]:
    x = jax.eval_shape(functools.partial(fuzz.draw, s), jax.random.key(0))
    run = jax.jit(fuzz.runner(s, "mosaic_gpu", interpret=False))
    found |= set(launches(run.trace(x).jaxpr.jaxpr))
  for name in wanted:
    assert any(re.fullmatch(name, x) for x in found), name
  assert {f"msa_select_{x}" for x in ("exact", "fast", "fp8")} < found


# Both are drawn in one way.
@pytest.mark.parametrize(
  "index",
  [
    pytest.param(i, marks=[pytest.mark.slow] * (i == 0))
    for i, s in enumerate(fuzz.EACH_KERNEL)
    if s.pairs
  ],
)
def test_fuzz_with_pairs_has_some(index):
  """All blocks before the one of a tile's first query are in pairs."""
  s, key = fuzz.EACH_KERNEL[index], jax.random.key(fuzz.parse([]).seed)
  assert s.pairs == "all" and not s.packed
  calls = index + len(fuzz.EACH_KERNEL) * jnp.arange(fuzz.CALLS_EACH)
  keys = jax.vmap(functools.partial(jax.random.fold_in, key))(calls)
  x = jax.jit(jax.vmap(functools.partial(fuzz.draw, s)))(keys)
  first = (x["lengths"] - s.q_len) // s.block_size
  before = (x["blocks"] >= 0) & (x["blocks"] < first[..., None, None, None])
  assert before.any()


# --- Packed rows --------------------------------------------------------------


@pytest.mark.parametrize("command", [bench.main, packed.main])
def test_a_missing_plot_library_is_said_at_once(monkeypatch, command):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(SystemExit, match="matplotlib, which draws the plots"):
    command([])


@pytest.mark.slow  # test_kernels_packed has what is checked
def test_packed_rows_are_checked_and_measured(tmp_path, monkeypatch, capsys):
  def small(tokens, batch=1):
    return cases.Case(
      tokens=tokens, batch=batch, num_heads=4, num_kv_heads=2, head_dim=8,
      index_dim=8, block_size=16, top_k=2, dtype="float32",
    )  # fmt: skip

  monkeypatch.setattr(packed, "case_of", small)
  rows = {
    "tree": packed.Row(lengths=(32, 9, 20), prefix=True, alone=(50, 1, 2))
  }
  monkeypatch.setattr(packed, "ROWS", rows)
  monkeypatch.setattr(
    packed, "CHECKED", {"documents": packed.Row(lengths=(1, 15, 17))}
  )
  path = tmp_path / "packed.json"
  command = ["--implementation", "reference", "--results", path]
  command = [*map(str, command), "--ops", "dense", "prefill"]
  assert packed.main(command) == 0
  found = json.loads(path.read_text())["rows"]
  assert [(x["row"], x["op"], x["spans"]) for x in found] == [
    ("tree", "dense", 3),
    ("tree", "prefill", 3),
  ]
  assert ["tflops" in x for x in found] == [True, False]
  assert all(x["ms"] > 0 and x["alone_ms"] > 0 for x in found)
  right = packed.program

  def wrong(op, case, implementation):
    run = right(op, case, implementation)
    factor = 1.1 if implementation == "reference" else 1.0
    return lambda *x: jax.tree.map(lambda y: y * factor, run(*x))

  monkeypatch.setattr(packed, "program", wrong)
  assert packed.main([*command[:-2], "prefill"]) == 1
  assert "documents prefill: result 0 is off" in capsys.readouterr().out
  for row in packed.ROWS.values():
    assert row.tokens == row.segments().span.shape[1]


def test_long_tailed_documents_fill_their_row():
  lengths = packed.long_tailed(1 << 17, 2048)
  assert sum(lengths) == 1 << 17 and min(lengths) > 0
  assert max(lengths) > 8 * np.median(lengths)


# --- Is it worth it? ----------------------------------------------------------


def worth_row(op, tokens, speedup, **fields):
  case = dataclasses.asdict(cases.Case(tokens=tokens))
  row = dict(
    op=op,
    selection="trained_like",
    score_precision="exact",
    implementation="mosaic_gpu",
  )
  times = dict(speedup=speedup, ms=1.0, dense_ms=speedup, dense="cudnn")
  return case | row | times | fields


def test_worth_takes_the_records_of_a_models_heads():
  model = worth.Model("paper", 64, 4, 128)
  rows = [
    worth_row("prefill", 1 << 15, 4.0),
    worth_row("prefill", 1 << 13, 0.9),
    worth_row("prefill", 1 << 17, 14.0),
    # Of another selection, batch, heads or precision; without a dense time.
    worth_row("prefill", 1 << 14, 9.0, selection="random"),
    worth_row("prefill", 1 << 14, 9.0, batch=2),
    worth_row("prefill", 1 << 14, 9.0, num_heads=32),
    worth_row("prefill", 1 << 14, 9.0, score_precision="fp8"),
    worth_row("prefill", 1 << 14, None),
    worth_row("train", 1 << 14, 9.0),
    # Fewer queries than keys.
    worth_row("prefill", 1 << 10, 9.0, kv_tokens=1 << 14),
    worth_row("decode", 1, 2.0, kv_tokens=1 << 20, selection="random"),
  ]
  found = worth.speedups(rows, model, "prefill", "trained_like")
  assert found == {1 << 13: 0.9, 1 << 15: 4.0, 1 << 17: 14.0}
  assert list(found) == sorted(found)
  assert worth.pays_from(found) == 1 << 15
  assert worth.cell(found) == "from 32K (8K 0.9x, 32K 4.0x, 128K 14.0x)"
  decoding = worth.speedups(rows, model, "decode", "random")
  assert worth.cell(decoding) == "from 1M (1M 2.0x)"
  # A length from which on it pays does not skip one at which it does not.
  assert worth.pays_from({1: 2.0, 2: 0.99, 4: 1.0}) == 4
  assert worth.cell({1 << 13: 1.2, 1 << 15: 0.8}) == (
    "not yet (8K 1.2x, 32K 0.8x)"
  )
  assert worth.cell({}) == "not measured"
  # The record's own speed-up is rounded to 0.75, and would become 0.8.
  rounded = worth_row("train", 1 << 13, 0.75, ms=5.36, dense_ms=4.009)
  found = worth.speedups([rounded], model, "train", "trained_like")
  assert worth.cell(found) == "not yet (8K 0.7x)"


def test_worth_writes_its_page(tmp_path):
  """And the page in docs/ is what the committed records give."""
  assert len(worth.MODELS) == 14
  here = worth.PAGE.read_text()
  assert worth.with_tables(here, records.read_json(worth.RESULTS)) == here
  page = tmp_path / "page.md"
  between = "\n".join("\nold\n".join(marks) for marks in worth.MARKS.values())
  page.write_text(f"before\n{between}\nafter\n")
  assert worth.main(["--page", str(page)]) == 0
  text = page.read_text()
  assert text.startswith("before\n") and text.endswith("\nafter\n")
  assert "old" not in text and "| MiniMax-M2 | 48, 8, 128 |" in text
  assert "\n| 48, 8, 128 | 32K | " in text
  with pytest.raises(ValueError, match="wanted a page with the lines"):
    worth.with_tables("nothing", dict(rows=[]))


def test_worth_shows_the_times_behind_it():
  rows = [
    worth_row("prefill", 1 << 15, 4.0, ms=7.0, dense_ms=28.25, commit="a"),
    worth_row("train", 1 << 17, 4.0, ms=1234.5, dense_ms=5000.4, commit="b"),
    worth_row("prefill", 1 << 14, 9.0, selection="random"),
    # An old record without cuDNN's time, and a new one with it.
    worth_row("prefill", 1 << 18, 8.0, dense="jax mosaic_gpu", commit="c"),
    worth_row(
      "prefill", 1 << 19, 8.0, dense="jax mosaic_gpu", commit="d",
      dense_ms_by={"cudnn": 10.0, "jax mosaic_gpu": 8.0},
    ),
  ]  # fmt: skip
  assert worth.times(rows).splitlines()[2:] == [
    "| 64, 4, 128 | 32K | 28.2 | 28.2 (4.04x) | 7.00 (4.04x) | a |  |  |  |",
    "| 64, 4, 128 | 128K |  |  |  |  | 5,000 | 1,234 (4.05x) | b |",
    "| 64, 4, 128 | 256K | 8.00 |  | 1.00 (8.00x) | c |  |  |  |",
    "| 64, 4, 128 | 512K | 8.00 | 10.0 (10.00x) | 1.00 (8.00x) | d |  |  |  |",
  ]


def test_what_an_op_needs_at_least():
  """By hand, of four queries that see 1, 2, 3 and 4 keys.

  They attend to their own block alone: 1, 2, 1 and 2 keys.
  """
  case = cases.Case(
    tokens=4, num_heads=4, num_kv_heads=2, head_dim=8, index_dim=4,
    block_size=2, top_k=1,
  )  # fmt: skip
  index, main = 2 * 4 * 2 * 10, 4 * 8 * 4 * 6
  kl = main / 2 + 6 * 4 * 2 * 6
  assert (index, main, kl) == (160, 768, 672)
  assert measure.flops("prefill", case) == 928
  assert measure.flops("train", case) == 160 + 3.5 * 768 + 672
  # Bytes of q (as of out), k (as of v), index_q, index_k, choices and lse.
  q, k, index_q, index_k, ids, lse = 256, 128, 64, 32, 32, 64
  prefill = (index_q + index_k + ids) + (2 * q + 2 * k + ids + lse)
  backward = (3 * q + 2 * k + lse + ids) + (q + 2 * k)
  of_kl = (q + k + index_q + index_k + lse + ids) + (index_q + index_k)
  assert measure.moved_bytes("prefill", case) == prefill == 992
  assert measure.moved_bytes("train", case) == prefill + backward + of_kl
  # At 928 operations a second, and at 496 bytes or much more.
  slow = measure.bound("prefill", case, 928e-12, 496e-12)
  assert slow == (928, 992, pytest.approx(2.0), True)
  assert measure.bound("prefill", case, 928e-12, 1.0).seconds == 1.0
  assert not measure.bound("prefill", case, 928e-12, 1.0).of_memory


def test_worth_shows_the_bounds():
  rates = dict(matmul_tflops=500.0, copy_tbs=4.0)
  rows = [
    worth_row("prefill", 1 << 13, 2.0, ms=2.0, dense_ms=4.0, **rates),
    # Of a shape that is not in the table.
    worth_row("prefill", 1 << 13, 2.0, num_heads=2, **rates),
  ]
  # 0.503 TFLOP at 500 TFLOP/s; 0.302 GB at 4 TB/s take less.
  assert worth.bounds(rows).splitlines()[2:] == [
    "| 64, 4, 128 | 8K | prefill | 0.503 | 0.302 | 1.01 | 4.0x | 2.00 | 50 % |"
  ]
  rows[0]["copy_tbs"] = 0.1
  assert " | 3.02 (memory) | 1.3x | 2.00 | " in worth.bounds(rows)


def test_none_picks_no_slower_implementation():
  """None takes the kernels, and may lose a quarter of the time by that."""
  both = worth.both_implementations(records.read_json(worth.RESULTS)["rows"])
  assert len(both) >= 8
  for ours, xla in both:
    assert ours["ms"] <= 1.25 * xla["ms"], (ours, xla)
  least = min(xla["ms"] / ours["ms"] for ours, xla in both)
  said = re.search(r"at least ([\d.]+) times as fast", worth.PAGE.read_text())
  assert said and said[1] == f"{least:.1f}"


def test_worth_shows_implementations_beside_each_other():
  rows = [
    worth_row("train", 1 << 12, 1.0, ms=2.0),
    worth_row("train", 1 << 12, 1.0, ms=5.0, implementation="xla"),
    worth_row("decode", 1, 1.0, kv_tokens=256, selection="random", batch=8),
    worth_row(
      "decode", 1, 1.0, kv_tokens=256, selection="random", batch=8, ms=0.5,
      implementation="xla",
    ),
    # One alone, and other choices.
    worth_row("train", 1 << 13, 1.0),
    worth_row("train", 1 << 14, 1.0, selection="random"),
    worth_row(
      "train", 1 << 14, 1.0, selection="random", implementation="xla"
    ),
  ]  # fmt: skip
  head, _, *lines = worth.implementations(rows).splitlines()
  assert head == "| H, K, D | op | 4K | 8 x 256 |"
  assert lines == [
    "| 64, 4, 128 | train | 2.5x |  |",
    "| 64, 4, 128 | decode |  | 0.5x |",
  ]


@pytest.mark.slow  # of a benchmark that is seldom run
def test_starts_of_an_index_are_compared(tmp_path, capsys):
  """The oracle chooses the best blocks, and no start has better ones."""
  sizes = dict(num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=32)
  config = msa_jax.ModelConfig(
    vocab_size=256, num_layers=1, embed_dim=32, qk_norm=False, **sizes
  )
  model = msa_jax.DecoderLM(config, rngs=nnx.Rngs(0))
  tokenizer = corpus.read_tokenizer(corpus.TextConfig(), None).saved()
  msa_jax.checkpoints.save(
    model, tmp_path / "a", documents={"tokenizer.json": json.loads(tokenizer)}
  )
  words = ["--tokens", "64", "--block-size", "8", "--top-k", "2"]
  starts.main([str(tmp_path / "a"), *words])
  rows = [
    dict(zip(starts.COLUMNS, line.strip("| ").split(" | ")))
    for line in capsys.readouterr().out.splitlines()
  ]
  dense, oracle, *others = rows[2:]
  tokens = starts.first_tokens(tmp_path / "a", 64)
  logits = model(tokens[:, :-1]).logits
  loss = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
  assert dense["loss"] == f"{float(loss.mean()):.4f}"
  assert oracle["block recall"] == "1.000"
  assert oracle["score recall"] == oracle["best possible score recall"]
  names = [row["index_init"] for row in others]
  assert names == ["leading", "main", "random"]
  # With one layer the best possible share is the same for all.
  for row in others:
    assert row["score recall"] < oracle["score recall"]
    assert row["best possible score recall"] == oracle["score recall"]
  with pytest.raises(ValueError, match="wanted fewer"):
    starts.first_tokens(tmp_path / "a", 10**9)


def test_plot_of_several_devices(tmp_path):
  """Rows without one device's time have no efficiency, and are left out."""
  pytest.importorskip("matplotlib")
  from benchmarks import context_parallel

  common = dict(num_heads=64, num_kv_heads=4, devices=2)
  rows = [
    common | dict(op=op, tokens=tokens, efficiency=efficiency)
    for op in ("context_prefill", "context_train", "context_decode")
    for tokens, efficiency in ((1 << 16, 0.7), (1 << 21, None))
  ]
  rows.append(rows[0] | dict(documents=8))
  path = tmp_path / "found.json"
  path.write_text(json.dumps(dict(device="a GPU", jax="1", rows=rows)))
  assert context_parallel.main(["--plot-only", str(path)]) == 0
  assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


class Allocator:
  """A device whose memory XLA's best-fit allocator takes piece by piece.

  Attributes:
    limit: bytes that XLA may take.
    free: bytes that the driver has left.
    pieces: bytes that XLA has taken.
    refused: arrays that found no room.
  """

  def __init__(self, limit, free, pieces=()):
    self.limit, self.free, self.pieces = limit, free, list(pieces)
    self.refused, self.region = 0, 2 << 20

  def memory_stats(self):
    held = sum(self.pieces)
    return dict(bytes_limit=self.limit, bytes_in_use=0, pool_bytes=held)

  def has_room(self, size):
    """Its function `Extend`, of openxla/xla, bfc_allocator.cc."""
    size = -(-size // 256) * 256
    left = (self.limit - sum(self.pieces)) // 256 * 256
    if size <= left:
      while size > self.region:
        self.region *= 2
      piece = min(self.region, left)
      while piece > self.free and piece >= size:
        piece = -(-int(0.9 * piece) // 256) * 256
      if size <= piece <= self.free:
        self.pieces.append(piece)
        self.free -= piece
        return True
    self.refused += 1
    return False


@pytest.mark.parametrize("gb", [40, 59, 68, 69, 105, 127, 137, 138])
@pytest.mark.parametrize("held", [0, 3 << 30])
def test_memory_is_reserved_in_one_piece_without_waiting(monkeypatch, gb, held):
  """Beside programs that hold half of it too; 10 s are lost if it is more."""
  from benchmarks import context_parallel

  limit = gb * 10**9
  room = limit - held
  devices = [
    Allocator(limit, int(share * room), [held])
    for share in (1.3, 1.0, 0.9, 0.75, 0.6, 0.5, 0.3)
  ]
  frees = [device.free for device in devices]
  monkeypatch.setattr(jax, "devices", lambda: devices)
  monkeypatch.setattr(context_parallel, "_has_room", Allocator.has_room)
  context_parallel.reserve()
  for device, free in zip(devices, frees, strict=True):
    _, piece = device.pieces
    assert piece >= 0.89 * min(room, free)
    assert device.refused <= 1
    # The first array is a power of two, half of the room or more.
    least = 1 << ((room - 1).bit_length() - 1)
    assert device.refused == 0 or 0.9 * free <= least + 256


def test_memory_that_xla_has_already_is_not_reserved(monkeypatch):
  from benchmarks import context_parallel

  device = Allocator(59 << 30, 1 << 30, [59 << 30])
  monkeypatch.setattr(jax, "devices", lambda: [device])
  monkeypatch.setattr(context_parallel, "_has_room", Allocator.has_room)
  context_parallel.reserve()
  assert device.refused == 0 and len(device.pieces) == 1
