"""Generation: prompts of different lengths, sampling, stopping, streaming."""

import dataclasses
import functools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_modules import INDEX, build
from test_train import tiny_run

from msa_jax import checkpoints
from msa_jax import generate as generate_lib
from msa_jax.checkpoints import commands, generation
from msa_jax.generate import Sampling, generate, sample, stream
from train import checkpoint, corpus, data, pretrained
from train import program as program_lib
from train import sample as sample_lib
from train.__main__ import main as cli

PROMPTS = [
  np.asarray(jax.random.randint(jax.random.key(i), (n,), 0, 64))
  for i, n in enumerate((19, 3, 40, 8))
]


@functools.cache
def model(kinds=("gqa", "msa"), **index):
  return build(
    num_layers=2,
    layer_kinds=kinds,
    index=dataclasses.replace(INDEX, **index),
    tie_embeddings=False,
  )


@functools.partial(jax.jit, static_argnums=0)
def next_logits(graphdef, params, tokens):
  return nnx.merge(graphdef, params)(tokens).logits


def greedy_loop(model, prompt, count):
  """One full pass a token. Tokens after the last one change nothing."""
  tokens = np.zeros((1, 64), np.int32)
  tokens[0, : len(prompt)] = prompt
  for n in range(len(prompt), len(prompt) + count):
    logits = next_logits(*nnx.split(model), tokens)
    tokens[0, n] = np.argmax(logits[0, n - 1])
  return tokens[0, len(prompt) : len(prompt) + count]


# Of one size, so that most tests share what is compiled.
SIZES = dict(max_new_tokens=12, prefill_tokens=17, steps=4)


def test_each_row_is_continued_as_if_alone():
  got = generate(model(), PROMPTS, **SIZES)
  for prompt, row in zip(PROMPTS, got):
    np.testing.assert_array_equal(row, greedy_loop(model(), prompt, 12))
  # The sizes of chunks and calls change nothing, nor does spare room.
  again = generate(model(), PROMPTS, max_new_tokens=12, capacity=70, steps=100)
  np.testing.assert_array_equal(again, got)


def test_prompts_are_padded_on_the_left():
  chunks = list(generate_lib.prefill_chunks([[1, 2, 3, 4, 5], [6], [7, 8]], 3))
  tokens = np.concatenate([tokens for tokens, _ in chunks], axis=1)
  np.testing.assert_array_equal(
    tokens, [[0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 0, 6], [0, 0, 0, 0, 7, 8]]
  )
  np.testing.assert_array_equal(
    [counts for _, counts in chunks], [[2, 0, 0], [3, 1, 2]]
  )


def test_fp8_index_keys():
  """The same tokens as the full passes of a model that scores in fp8."""
  fp8 = model(("msa",), score_precision="fp8")
  got = generate(
    model(("msa",)),
    PROMPTS[:2],
    max_new_tokens=6,
    prefill_tokens=17,
    index_dtype=jnp.float8_e4m3fn,
  )
  for prompt, row in zip(PROMPTS, got):
    np.testing.assert_array_equal(row, greedy_loop(fp8, prompt, 6))


def test_rows_end_with_their_stop_token():
  whole = generate(model(), PROMPTS, **SIZES)
  # Ids that end rows 0 and 2 inside a call, at different steps.
  stops = [int(whole[0][2]), int(whole[2][5])]
  got = generate(model(), PROMPTS, **SIZES, stop_tokens=stops)
  lengths = []
  for full, row in zip(whole, got):
    ends = np.flatnonzero(np.isin(full, stops))
    lengths.append(ends[0] + 1 if ends.size else 12)
    np.testing.assert_array_equal(row, full[: lengths[-1]])
  assert lengths[0] <= 3 and lengths[2] <= 6
  # Once all rows have ended, no more is handed out.
  first = [int(row[0]) for row in whole]
  parts = list(stream(model(), PROMPTS, **SIZES, stop_tokens=first))
  assert len(parts) == 1 and np.concatenate(parts[0]).tolist() == first


def test_streaming_hands_out_calls_of_one_size():
  whole = generate(model(), PROMPTS, **SIZES)
  parts = list(stream(model(), PROMPTS, **SIZES | dict(steps=5)))
  # One token from the prompt, then 11 in 3 calls.
  assert [len(part[0]) for part in parts] == [1, 4, 4, 3]
  for i, row in enumerate(whole):
    np.testing.assert_array_equal(np.concatenate([p[i] for p in parts]), row)


def test_steps_are_compiled_once_and_run_ahead(monkeypatch):
  """No call waits for the host, and none is compiled again."""
  generate(model(), PROMPTS, **SIZES)
  compiled = (generate_lib.decode_steps, generate_lib._prefill)
  sizes = [f._cache_size() for f in compiled]
  events = []
  fetch = generate_lib._fetch

  def watched_steps(*args, **kwargs):
    events.append("call")
    return compiled[0](*args, **kwargs)

  def watched_fetch(new):
    events.append("fetch")
    return fetch(new)

  monkeypatch.setattr(generate_lib, "decode_steps", watched_steps)
  monkeypatch.setattr(generate_lib, "_fetch", watched_fetch)
  # Other prompts of the same sizes.
  generate(model(), [p[::-1] for p in PROMPTS], **SIZES)
  assert events == ["call", "fetch"] * 3 + ["fetch"]
  assert sizes == [f._cache_size() for f in compiled]


def test_decoding_makes_no_second_cache():
  """Steps write the donated cache, also inside the compiled loop."""
  graphdef, params = nnx.split(model(("msa",)))
  cache = model(("msa",)).init_cache(2, 4096)
  held = sum(x.nbytes for x in jax.tree.leaves(cache))
  state = generate_lib.DecodeState(
    cache,
    jnp.zeros(2, jnp.int32),
    jnp.full(2, 9, jnp.int32),
    jax.random.split(jax.random.key(0), 2),
  )
  memory = (
    generate_lib.decode_steps.lower(
      graphdef, params, state, jnp.zeros(0, jnp.int32), steps=4
    )
    .compile()
    .memory_analysis()
  )
  assert memory.alias_size_in_bytes >= held
  assert memory.temp_size_in_bytes < held / 3


# --- sampling -----------------------------------------------------------------


def draws(logits, count=4000, seed=0, **options):
  """Shares of each token among many draws."""
  logits = jnp.broadcast_to(jnp.asarray(logits), (count, len(logits)))
  keys = jax.random.split(jax.random.key(seed), count)
  tokens = jax.jit(sample, static_argnums=2)(logits, keys, Sampling(**options))
  return np.bincount(tokens, minlength=logits.shape[1]) / count


PROBS = np.array([0.1, 0.4, 0.05, 0.25, 0.2])
LOGITS = np.log(PROBS).astype(np.float32)
# Four standard deviations of a share of 4,000 draws.
SPREAD = 4 * np.sqrt(0.25 / 4000)


@pytest.mark.parametrize(
  "options, kept",
  [
    (dict(temperature=1.0), [0, 1, 2, 3, 4]),
    (dict(temperature=1.0, top_k=3), [1, 3, 4]),
    (dict(temperature=1.0, top_k=9), [0, 1, 2, 3, 4]),
    # 0.4 + 0.25 < 0.7: the token that passes the sum is in.
    (dict(temperature=1.0, top_p=0.7), [1, 3, 4]),
    (dict(temperature=1.0, top_p=0.3), [1]),
    # Of the two that stay, the first has 0.4 / 0.65.
    (dict(temperature=1.0, top_k=2, top_p=0.6), [1]),
    (dict(temperature=1.0, top_k=2, top_p=0.62), [1, 3]),
  ],
)
def test_shares_of_the_tokens_drawn(options, kept):
  want = np.where(np.isin(np.arange(5), kept), PROBS, 0)
  got = draws(LOGITS, **options)
  np.testing.assert_allclose(got, want / want.sum(), atol=SPREAD)
  assert not got[np.setdiff1d(np.arange(5), kept)].any()


def test_temperature_divides_the_logits():
  want = PROBS**0.5 / np.sum(PROBS**0.5)
  np.testing.assert_allclose(draws(LOGITS, temperature=2.0), want, atol=SPREAD)
  assert draws(LOGITS)[1] == 1  # greedy


def test_a_row_draws_by_its_key_and_position():
  draw = functools.partial(
    generate, model(), **SIZES, sampling=Sampling(temperature=5.0)
  )
  twice = [PROMPTS[0]] * 4
  rows = draw(twice, key=jax.random.key(1))
  assert len({tuple(row.tolist()) for row in rows}) == 4
  # Neither the calls' size nor other rows change it.
  others = [PROMPTS[0], PROMPTS[2], PROMPTS[1], PROMPTS[0]]
  again = draw(others, key=jax.random.key(1), steps=11)
  np.testing.assert_array_equal(again[0], rows[0])
  np.testing.assert_array_equal(again[3], rows[3])
  assert draw(twice, key=jax.random.key(2))[0].tolist() != rows[0].tolist()


TINY = jnp.asarray([[0.0, 1e-30, -1.0, -jnp.inf]], jnp.float32)


@pytest.mark.parametrize(
  "temperature", [1e-300, 1e-45, 1e-38, 1e-30, 1.0, 1e30, 1e38, 1e39, 1e300]
)
@pytest.mark.parametrize("top", [{}, dict(top_p=0.999)])
def test_every_temperature_gives_its_distribution(temperature, top):
  """Also where it, or a logit over it, is beyond float32's range."""
  logits = np.asarray(TINY[0], np.float64)
  exponents = (logits - logits.max()) / temperature
  want = np.exp(exponents)
  want /= want.sum()
  got = draws(TINY[0], temperature=temperature, **top)
  np.testing.assert_allclose(got, want, atol=SPREAD)
  assert got[3] == 0


@pytest.mark.parametrize("temperature", [0.5, 1e39])
def test_infinite_and_huge_logits(temperature):
  got = draws([jnp.inf, 3.0, jnp.inf], temperature=temperature)
  np.testing.assert_allclose(got, [0.5, 0, 0.5], atol=SPREAD)
  got = draws([3e38, -3e38], temperature=3e38)
  np.testing.assert_allclose(got[1], 1 / (1 + np.exp(2)), atol=SPREAD)


@pytest.mark.parametrize(
  "top_p, kept",
  # In float32, 1 - 2^-25 is 1.
  [(1e-300, 1), (0.5, 1), (1 - 1.5 * 2**-24, 3), (1 - 2**-26, 5), (1.0, 5)],
)
def test_top_p_close_to_0_and_1(top_p, kept):
  probs = [0.9, 0.1 - 2.0**-23, 2.0**-24, 2.0**-25, 2.0**-25]
  logits = jnp.asarray(np.log(probs), jnp.float32)
  masked = generate_lib._nucleus(logits[None], top_p)
  assert int(jnp.sum(masked > -jnp.inf)) == kept


# Two tests above have rows that are continued as if alone, and draws by a row's
# key and position.
@pytest.mark.slow
def test_a_prompt_with_a_key_of_its_own_gets_what_it_gets_alone():
  draw = functools.partial(
    generate, model(), **SIZES, sampling=Sampling(temperature=2.0)
  )
  keys = jax.random.split(jax.random.key(3), len(PROMPTS))
  together = draw(PROMPTS, key=keys)
  for i in (1, 2):
    (alone,) = draw(PROMPTS[i : i + 1], key=keys[i : i + 1])
    np.testing.assert_array_equal(alone, together[i])
  # A single key is that of the only row, and the older form of keys is taken.
  (alone,) = draw(PROMPTS[:1], key=jax.random.key_data(keys[0]))
  np.testing.assert_array_equal(alone, together[0])
  order = np.array([2, 0, 3, 1])
  moved = draw([PROMPTS[i] for i in order], key=keys[order])
  for i, row in zip(order, moved):
    np.testing.assert_array_equal(row, together[i])


def test_nan_is_reported():
  broken = build(num_layers=1, layer_kinds=("gqa",))
  broken.norm.scale[...] = broken.norm.scale[...].at[0].set(jnp.nan)
  with pytest.raises(FloatingPointError, match=r"logits of rows \[0, 1\]"):
    generate(broken, PROMPTS[:2], max_new_tokens=2)


WRONG = {
  "temperature must be a number that is finite and at least 0, got -1": (
    lambda: Sampling(temperature=-1)
  ),
  "temperature must be a number that is finite and at least 0, got '0.7'": (
    lambda: Sampling(temperature="0.7")
  ),
  "temperature must be a number that is finite and at least 0, got 1": (
    lambda: Sampling(temperature=10**400)
  ),
  "top_p must be above 0 and at most 1, or None, got '1'": lambda: Sampling(
    temperature=1.0, top_p="1"
  ),
  "sampling must be a msa_jax.generate.Sampling, got 0.7": lambda: stream(
    model(), [[1]], max_new_tokens=1, sampling=0.7
  ),
  "stop_tokens must be a sequence of token ids, got 3": lambda: stream(
    model(), [[1]], max_new_tokens=1, stop_tokens=3
  ),
  "stop_tokens must be a sequence of token ids, got 'x'": lambda: stream(
    model(), [[1]], max_new_tokens=1, stop_tokens="x"
  ),
  "prompts must be a sequence of prompts, got 'import'": lambda: stream(
    model(), "import", max_new_tokens=1
  ),
  "phase must be one of 'sparse', 'warmup', got 'dense'": lambda: stream(
    model(), [[1]], max_new_tokens=1, phase="dense"
  ),
  "or an array of 1 keys, one for each prompt, got 7": lambda: stream(
    model(), [[1]], max_new_tokens=1, key=7
  ),
  "one for each prompt, got keys of shape (2,)": lambda: stream(
    model(), [[1]], max_new_tokens=1, key=jax.random.split(jax.random.key(0))
  ),
  "one for each prompt, got float32 of shape (2,)": lambda: stream(
    model(), [[1]], max_new_tokens=1, key=jnp.zeros(2)
  ),
  "top_k must be an integer of at least 1": lambda: Sampling(
    temperature=1.0, top_k=0
  ),
  "top_p must be above 0 and at most 1": lambda: Sampling(
    temperature=1.0, top_p=0.0
  ),
  "top_p must be None with temperature=0": lambda: Sampling(top_p=0.5),
  "prompts must be at least one prompt, got none": lambda: stream(
    model(), [], max_new_tokens=1
  ),
  "prompts[1] must be a sequence of one or more token ids, got none": lambda: (
    stream(model(), [[1], []], max_new_tokens=1)
  ),
  "prompts[0] must be a sequence of one or more token ids, got 'hi'": lambda: (
    stream(model(), ["hi"], max_new_tokens=1)
  ),
  "prompts[0] must be ids below vocab_size = 64, got 3 to 64": lambda: stream(
    model(), [[64, 3]], max_new_tokens=1
  ),
  "max_new_tokens must be an integer of at least 1, got 0": lambda: stream(
    model(), [[1]], max_new_tokens=0
  ),
  "steps must be an integer of at least 1": lambda: stream(
    model(), [[1]], max_new_tokens=1, steps=0
  ),
  "key must be a random key": lambda: stream(
    model(), [[1]], max_new_tokens=1, sampling=Sampling(temperature=1.0)
  ),
  "stop_tokens must be ids below vocab_size = 64, got 99": lambda: stream(
    model(), [[1]], max_new_tokens=1, stop_tokens=(99,)
  ),
  "stop_tokens must be ids below vocab_size = 64, got 1.5": lambda: stream(
    model(), [[1]], max_new_tokens=1, stop_tokens=(1.5,)
  ),
  "capacity must be an integer of at least 1, got 64.0": lambda: stream(
    model(), [[1]], max_new_tokens=1, capacity=64.0
  ),
  "capacity must be at least 48, the longest prompt's 40 tokens and 9": (
    lambda: stream(model(), PROMPTS, max_new_tokens=9, capacity=47)
  ),
}


@pytest.mark.parametrize("text", WRONG)
def test_wrong_calls_fail_before_anything_runs(text):
  with pytest.raises(ValueError) as error:
    WRONG[text]()
  assert text in str(error.value)


# --- sampling from run folders ------------------------------------------------


def save(run, state, steps=(4,)):
  """A run folder with checkpoints of a state."""
  source = data.load(run.data)
  folder = checkpoint.RunFolder(run, source.fingerprint)
  folder.write_environment(
    source.fingerprint, {}, {"tokenizer.json": source.tokenizer}
  )
  for step in steps:
    folder.save(step, state, 0.0)
  folder.close()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  return tmp_path_factory.mktemp("sample")


@pytest.fixture(scope="module")
def trained(place):
  """A run whose step 2 ends its warm-up, its untrained model and state."""
  run = tiny_run(place, keep_checkpoints=2)
  program = program_lib.Program(program_lib.compile_key(run))
  state = program.init(run.seed)
  flat = program_lib.flatten_state(state)
  save(run, flat, steps=(2, 4))
  return run, program.merge(state.params), flat


def test_sampling_from_a_run_folder(trained, capsys):
  run, model, _ = trained
  prompts = ["def f(x):", "import os"]
  options = dict(max_new_tokens=20, key=jax.random.key(7))
  sampling = Sampling(temperature=0.5, top_k=200)
  ids = [list(prompt.encode()) for prompt in prompts]
  rows = generate(model, ids, stop_tokens=(255,), sampling=sampling, **options)
  arguments = ["--max_new_tokens=20", "--seed=7", "--top_k=200"]
  assert not cli(
    [
      "sample",
      run.folder,
      "--prompt",
      *prompts,
      "--temperature=0.5",
      *arguments,
    ]
  )
  want = "".join(
    f"--- {prompt!r}\n{prompt}"
    + bytes(row[row != 255].tolist()).decode(errors="replace")
    + "\n"
    for prompt, row in zip(prompts, rows)
  )
  assert capsys.readouterr().out == want


def test_a_run_is_exported(trained, tmp_path, capsys):
  """Model, tokenizer and generation config, as one folder."""
  run, model, _ = trained
  assert not cli(["export", run.folder, str(tmp_path / "out")])
  assert capsys.readouterr().out.startswith(f"{tmp_path / 'out'}: step 4 of")
  again = checkpoints.load(tmp_path / "out", implementation="xla")
  for (path, a), (_, b) in zip(
    nnx.to_flat_state(nnx.state(again, nnx.Param)),
    nnx.to_flat_state(nnx.state(model, nnx.Param)),
    strict=True,
  ):
    np.testing.assert_array_equal(a[...], b[...], err_msg=str(path))
  saved = json.loads((tmp_path / "out" / "config.json").read_text())
  assert saved["model_type"] == "msa_jax" and saved["eos_token_id"] == 255
  assert saved["max_position_embeddings"] == run.context
  words = ["sample", str(tmp_path / "out"), "--text", "def f(x):"]
  assert not commands.main([*words, "--max-new-tokens", "5"])
  text = capsys.readouterr().out.removesuffix("\n")
  options = dict(max_new_tokens=5, stop_tokens=(255,))
  (new,) = generate(model, [list(b"def f(x):")], **options)
  assert text == "def f(x):" + bytes(new[new != 255].tolist()).decode(
    errors="replace"
  )
  # A run that starts from a trained model has more to say.
  kept = dict(
    fields=dict(bos_token_id=1, eos_token_id=2, max_position_embeddings=8192),
    documents={
      "generation_config.json": dict(eos_token_id=[2, 9], temperature=0.6),
      "tokenizer_config.json": dict(bos_token="b"),
      "chat_template.jinja": "{{ messages[0].content }}",
    },
  )
  copy = tmp_path / "run"
  shutil.copytree(run.folder, copy)
  (copy / pretrained.FILE).write_text(json.dumps(kept))
  assert not cli(["export", str(copy), str(tmp_path / "kept")])
  config, *files = (
    json.loads((tmp_path / "kept" / name).read_text())
    for name in (
      "config.json",
      "generation_config.json",
      "tokenizer_config.json",
    )
  )
  fields = kept["fields"] | dict(eos_token_id=[2, 9, 255])
  assert {name: config[name] for name in fields} == fields
  assert files == [
    dict(eos_token_id=[2, 9, 255], temperature=0.6),
    dict(bos_token="b"),
  ]
  assert generation.chat_prompt(tmp_path / "kept", "hello") == "hello"
  capsys.readouterr()
  assert cli(["export", run.folder, str(tmp_path / "out")]) == 1
  assert "folder must be empty or missing" in capsys.readouterr().err


def test_a_run_from_before_a_field_was_there_goes_on(trained, tmp_path):
  """Its config.json lacks the field, which has its default."""
  run, _, flat = trained
  run = dataclasses.replace(run, folder=str(tmp_path / "run"))
  save(run, flat, steps=(2,))
  path = tmp_path / "run" / "config.json"
  saved = json.loads(path.read_text())
  del saved["model"]["qk_norm_over"], saved["model"]["rope_scaling"]
  path.write_text(json.dumps(saved))
  fingerprint = data.load(run.data).fingerprint
  checkpoint.RunFolder(run, fingerprint).close()
  saved["model"]["rope_theta"] = 5.0
  path.write_text(json.dumps(saved))
  with pytest.raises(ValueError, match=r"model\.rope_theta: 5\.0 there"):
    checkpoint.RunFolder(run, fingerprint)


def test_exported_tokenizers_have_the_runs_ids():
  """Byte and BPE, with the end of a text."""
  import tokenizers

  texts = ["def f(x):\n  return x\u00e9\u20ac\n", "\t\0 import os  \n"]
  for ours in (
    corpus._ByteTokenizer(),
    corpus._BPETokenizer.train(texts * 9, 280),
    corpus._BPETokenizer.train(["ab"], 300),
  ):
    theirs = tokenizers.Tokenizer.from_str(ours.saved())
    for text, ids in zip(texts, ours.encode(texts)):
      assert theirs.encode(text).ids == ids.tolist()
      assert theirs.decode(ids.tolist()) == text
    end = theirs.encode(f"a{corpus.END_OF_TEXT}").ids[-1]
    assert end == ours.end_of_text


def test_text_comes_in_whole_characters(trained, monkeypatch):
  """No part ends inside a character, and the parts make up the text."""
  run, _, _ = trained
  text = "aß€😀b\ufffd"
  ids = np.frombuffer(text.encode()[:-1], np.uint8).astype(np.int32)

  def parts(*args, **kwargs):
    assert kwargs["stop_tokens"] == (255,) and args[1][0].tolist() == [255]
    yield from ([part] for part in np.split(ids, [1, 2, 5, 7, 10]))

  monkeypatch.setattr(generate_lib, "stream", parts)
  got = [row for (row,) in sample_lib.run(pathlib.Path(run.folder))]
  assert got == ["a", "", "ß", "€", "😀", "b", "\ufffd"]


def test_a_checkpoint_is_sampled_in_its_phase(trained, monkeypatch):
  run, _, _ = trained
  phases = []
  monkeypatch.setattr(
    generate_lib,
    "stream",
    lambda *args, phase, **kwargs: phases.append(phase) or iter([]),
  )
  for step in (2, 4, None):
    list(sample_lib.run(pathlib.Path(run.folder), prompts=["a"], step=step))
  assert phases == ["warmup", "sparse", "sparse"]


def test_a_run_of_a_gpu_is_sampled_here(trained, place, no_gpu, capsys):
  """Its config names implementations that run on a GPU only.

  Its data mixes text with recall, and sampling takes the tokenizer of the text.
  """
  run, _, state = trained
  model = dataclasses.replace(
    run.model, implementation="mosaic_gpu", gqa_implementation="cudnn"
  )
  mix = data.MixConfig(text=run.data, recall=data.RecallConfig())
  other = dataclasses.replace(
    run, model=model, data=mix, folder=str(place / "gpu")
  )
  save(other, state)
  words = ["--prompt=def f(x):", "--temperature=0", "--max_new_tokens=20"]
  assert not cli(["sample", run.folder, *words])
  want = capsys.readouterr().out
  assert not cli(["sample", other.folder, *words, "--implementation=auto"])
  assert capsys.readouterr().out == want
  assert cli(["sample", other.folder, *words]) == 1
  assert "--implementation=auto" in capsys.readouterr().err


@pytest.fixture
def no_text_left(trained, tmp_path):
  """Makes the run folder of a tokenizer, and removes what it was made from."""
  run, _, state = trained

  def made(**changes):
    paths = {"cache_dir": tmp_path / "cache", "path": tmp_path / "text"}
    shutil.copytree(run.data.path, paths["path"])
    config = dataclasses.replace(
      run.data, **changes, **{name: str(path) for name, path in paths.items()}
    )
    own = dataclasses.replace(run, data=config, folder=str(tmp_path / "run"))
    save(own, state)
    for path in paths.values():
      shutil.rmtree(path)
    return own

  return made


def test_a_bpe_tokenizer_comes_back(no_text_left):
  run = no_text_left(tokenizer="bpe", vocab_size=300)
  folder = pathlib.Path(run.folder)
  tokenizer = sample_lib.load_tokenizer(folder, run)
  text = "def naïve(x): return '😀' * x"
  (ids,) = tokenizer.encode([text])
  assert tokenizer.decode(ids) == text and max(ids) > 255
  with_end = np.append(ids, tokenizer.end_of_text)
  assert tokenizer.decode(with_end) == text + "\ufffd"
  (folder / "tokenizer.json").unlink()
  with pytest.raises(ValueError, match=r"tokenizer.json is missing: wanted"):
    sample_lib.load_tokenizer(folder, run)


def test_a_run_keeps_its_own_tokenizer(no_text_left, tmp_path, capsys, caplog):
  """It samples and is exported without the user's file, and without warnings
  of orbax."""
  import tokenizers

  made = tokenizers.Tokenizer(tokenizers.models.BPE())
  made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
  made.decoder = tokenizers.decoders.ByteLevel()
  names = ["def", "ab", " x", "\n"]
  trainer = tokenizers.trainers.BpeTrainer(vocab_size=120, show_progress=False)
  made.train_from_iterator([*names, *map(chr, range(32, 127))], trainer)
  made.add_special_tokens(["<bos>", "[END]"])
  # Untrained weights choose any of the model's 256 ids.
  made.add_tokens([f"t{i}" for i in range(256 - made.get_vocab_size())])
  made.post_processor = tokenizers.processors.TemplateProcessing(
    single="<bos> $A", special_tokens=[("<bos>", made.token_to_id("<bos>"))]
  )
  path = tmp_path / "tokenizer.json"
  made.save(str(path))
  run = no_text_left(tokenizer=str(path), end_of_text="[END]")
  path.unlink()
  words = ["--prompt=def", "--temperature=0", "--max_new_tokens=5"]
  assert not cli(["sample", run.folder, *words])
  sampled = capsys.readouterr().out
  assert sampled.startswith("def")
  assert not cli(["export", run.folder, str(tmp_path / "out")])
  capsys.readouterr()
  assert "read" not in caplog.text
  folder = pathlib.Path(run.folder)
  (ids,) = sample_lib.load_tokenizer(folder, run).encode(["def ab"])
  theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "out/tokenizer.json"))
  assert theirs.encode("def ab").ids == ids.tolist()
  end = made.token_to_id("[END]")
  for name, key, value in (
    ("generation_config.json", "eos_token_id", end),
    ("tokenizer_config.json", "eos_token", "[END]"),
    ("tokenizer.json", "post_processor", None),
  ):
    assert json.loads((tmp_path / "out" / name).read_text())[key] == value


def test_wrong_samples(trained, place, capsys):
  run, _, state = trained
  recall = dataclasses.replace(
    run, data=data.RecallConfig(), folder=str(place / "recall")
  )
  save(recall, state)
  # A GQA checkpoint whose config asks for MSA.
  dense = dataclasses.replace(run, folder=str(place / "dense"))
  save(dense, {name: x for name, x in state.items() if "index" not in name})
  (place / "empty").mkdir()
  inner = place / "comparison" / "text" / "msa" / "seed0"
  inner.mkdir(parents=True)
  (inner / "config.json").write_text("{}")
  for text, arguments in {
    f"comparison: no run folder (it has no config.json); wanted one of"
    f" {inner}": [str(place / "comparison")],
    "no run folder": [str(place / "nothing")],
    "it has no config.json": [str(place / "empty")],
    "no checkpoint of step 3; there are [2, 4]": [run.folder, "--step=3"],
    "missing: params.layers.1.attention.index_key.kernel": [dense.folder],
    "the longest prompt has 60 tokens, which with 9 new ones are more than the"
    " run's context=64": [
      run.folder,
      "--prompt",
      "x" * 60,
      "--max_new_tokens=9",
    ],
    "the run's data are no text: wanted --tokens": [
      recall.folder,
      "--prompt=a",
    ],
    "prompts[0] must be ids below vocab_size = 256": [
      recall.folder,
      "--tokens=300",
    ],
    "--prompt and --tokens: wanted one of them": [
      run.folder,
      "--prompt=a",
      "--tokens=1",
    ],
    "top_p must be above 0": [run.folder, "--top_p=2"],
  }.items():
    assert cli(["sample", *arguments]) == 1
    shown = capsys.readouterr()
    assert text in shown.err and not shown.out
  assert not cli(
    ["sample", recall.folder, "--tokens", "1", "2", "--max_new_tokens=3"]
  )
  assert len(capsys.readouterr().out.split()) == 3
