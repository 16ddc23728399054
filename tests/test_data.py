"""Corpora, tokenizers, batches and the recall task."""

import bz2
import dataclasses
import gzip
import json
import lzma
import multiprocessing
import os
import pathlib
import sys
import time
import warnings

import numpy as np
import pytest

from train import corpus, data, evaluate, near_duplicates, probes

TEXTS = [
  f"def f_{i}(x):\n  return x + {i}  # naïve – ünïcode 猫🐈 {'ab' * (i % 7)}\n"
  * 4
  for i in range(40)
]


@pytest.fixture
def folder(tmp_path):
  for i, text in enumerate(TEXTS):
    path = tmp_path / "text" / f"part{i % 3}" / f"{i}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
  return tmp_path / "text"


def config_of(folder, **changes):
  cache = folder.parent / "cache"
  changes = {"held_out": 0.2, "vocab_size": 400, "rows": "stream", **changes}
  return data.TextConfig(path=str(folder), cache_dir=str(cache), **changes)


def batches_equal(a, b):
  return all(np.array_equal(x, y) for x, y in zip(a, b))


def decode(config, ids):
  """The bytes of a token stream, end-of-text left out."""
  source = data.load(config)
  ids = np.asarray(ids)[source.token_bytes[ids] > 0]
  if config.tokenizer == "byte":
    return bytes(ids.tolist())
  import tokenizers

  (path,) = pathlib.Path(config.cache_dir).glob("bpe-*/tokenizer.json")
  return tokenizers.Tokenizer.from_file(str(path)).decode(ids).encode()


# --- Text --------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
def test_token_bytes_count_every_byte_and_tokens_give_the_text_back(
  folder, tokenizer
):
  config = config_of(folder, tokenizer=tokenizer)
  opened = corpus.open_corpus(config)
  count = 0
  found = set()
  end_of_text = 255 if tokenizer == "byte" else 399
  assert opened.token_bytes.shape == (end_of_text + 1,)
  for stream in (opened.train, opened.held_out):
    ends = np.flatnonzero(stream == end_of_text)
    assert ends[-1] == stream.size - 1
    for document in np.split(stream, ends + 1)[:-1]:
      text = decode(config, document)
      assert opened.token_bytes[document].sum() == len(text)
      found.add(text.decode())
      count += 1
  assert count == len(TEXTS) and found == set(TEXTS)


def test_bpe_tokens_are_fewer_than_bytes_and_a_text_cannot_spell_the_end(
  folder,
):
  (folder / "tricky.txt").write_text("<|endoftext|> [UNK] <unk> </s>" * 3)
  config = config_of(folder, tokenizer="bpe")
  fingerprint = data.load(config).fingerprint
  opened = corpus.open_corpus(config)
  for split in ("train", "held_out"):
    sizes = fingerprint[split]
    assert sizes["tokens"] < 0.7 * sizes["bytes"]
    ends = int((getattr(opened, split) == 399).sum())
    assert ends == sizes["documents"]


def test_training_a_bpe_tokenizer_twice_gives_the_same_tokens(folder):
  first = config_of(folder, tokenizer="bpe")
  second = data.TextConfig(
    path=str(folder),
    cache_dir=str(folder.parent / "other"),
    tokenizer="bpe",
    held_out=0.2,
    vocab_size=400,
  )
  a, b = corpus.open_corpus(first), corpus.open_corpus(second)
  np.testing.assert_array_equal(a.train, b.train)
  np.testing.assert_array_equal(a.held_out, b.held_out)
  assert a.fingerprint == b.fingerprint


def test_train_batches_depend_on_seed_and_step_alone(folder):
  source, again = data.load(config_of(folder)), data.load(config_of(folder))
  shape = {"batch_size": 5, "context": 64}
  for step in (7, 0, 3):  # in any order
    batch = source.train_batch(1, step, **shape)
    assert batches_equal(batch, again.train_batch(1, step, **shape))
  tokens = [
    source.train_batch(seed, step, **shape).tokens
    for seed, step in ((0, 1), (1, 0), (1, 1))
  ]
  assert not np.array_equal(tokens[0], tokens[1])
  assert not np.array_equal(tokens[1], tokens[2])
  assert batch.tokens.shape == (5, 65) and batch.tokens.dtype == np.int32
  assert batch.loss_mask.shape == (5, 64) and batch.loss_mask.all()
  assert batch.distance.shape == (5, 64) and (batch.distance == -1).all()
  stream = data.load(config_of(folder))._corpus.train.tobytes()
  for row in batch.tokens:
    assert row.astype(np.uint16).tobytes() in stream


def test_eval_windows_meet_every_held_out_token_once_and_spread(tmp_path):
  (tmp_path / "numbers").mkdir()
  for i in range(10):
    text = " ".join(str(n) for n in range(1000 * i, 1000 * i + 200))
    (tmp_path / "numbers" / f"{i}.txt").write_text(text)
  source = data.load(config_of(tmp_path / "numbers", held_out=0.5))
  shape = {"batch_size": 3, "context": 32}
  stream = np.asarray(source._corpus.held_out)
  number = source.num_eval_batches(**shape)
  assert number > 10
  rows = np.concatenate(
    [source.eval_batch(i, **shape).tokens for i in range(number)]
  )
  windows = [stream[s : s + 33] for s in range(0, stream.size - 32, 32)]
  place = {window.tobytes(): i for i, window in enumerate(windows)}
  assert len(place) == len(windows)
  order = [place[row.astype(np.uint16).tobytes()] for row in rows]
  assert len(set(order)) == len(order) > len(windows) - 3
  # Even the first few reach all parts of the held-out split.
  reached = np.sort(order[:9]) / len(windows)
  assert np.diff(reached, prepend=0.0, append=1.0).max() < 0.3
  with pytest.raises(ValueError, match=rf"index={number}.*{number} batches"):
    source.eval_batch(number, **shape)


def test_the_split_is_by_document_and_duplicates_are_dropped(folder):
  for i in range(20):
    (folder / f"copy{i}.txt").write_text(TEXTS[0])
  (folder / "empty.txt").write_text("")
  opened = corpus.open_corpus(config_of(folder))
  meta = opened.fingerprint
  assert meta["left_out"] == {"not_utf8": 0, "empty": 1, "duplicate": 20}
  assert meta["files"] == 61
  assert meta["held_out"]["documents"] == 8 and meta["train"]["documents"] == 32
  texts = [
    set(bytes(part.tolist()) for part in np.split(s, np.nonzero(s == 255)[0]))
    for s in (opened.train, opened.held_out)
  ]
  assert not {t.strip(b"\xff") for t in texts[0]} & {
    t.strip(b"\xff") for t in texts[1]
  } - {b""}


def alike_texts(rng, number):
  """Texts of random words that share parts of each other."""
  texts = []
  for i in range(number):
    words = [f"w{n}" for n in rng.integers(10**6, size=rng.integers(60, 120))]
    if i % 2:
      source = texts[rng.integers(len(texts))].split()
      first = rng.integers(len(source))
      changed = rng.integers(1, 50)
      words = source[:first] + words[:changed] + source[first + changed :]
    texts.append(" ".join(words))
  return texts


def runs_of_five(text):
  words = text.split()
  return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}


@pytest.mark.parametrize("threshold", [0.3, 0.7])
def test_copies_are_the_documents_whose_runs_of_words_are_alike(threshold):
  texts = alike_texts(np.random.default_rng(0), 300)
  near = near_duplicates.NearDuplicates(threshold)
  kept, wanted = [], []
  for text in texts:
    own = runs_of_five(text)
    if all(len(own & other) < threshold * len(own | other) for other in wanted):
      wanted.append(own)
    if near.keep(text):
      kept.append(own)
  assert kept == wanted and 150 < len(kept) < 290
  # Short texts are one run, and texts without words are never alike.
  assert near.keep("one two") and not near.keep("one, two")
  assert near.keep("+") and near.keep("- +")


def test_near_duplicates_are_dropped_before_the_split(folder, capsys):
  texts = alike_texts(np.random.default_rng(1), 30)
  for i, text in enumerate(texts):
    (folder / f"alike{i}.txt").write_text(text)
  config = config_of(folder, near_duplicates=0.3)
  meta = data.load(config).fingerprint
  assert meta["settings"]["near_duplicates"] == 0.3
  number, size = (
    meta["left_out"]["near_duplicate"],
    meta["near_duplicate_bytes"],
  )
  everything = data.load(config_of(folder)).fingerprint
  assert "near_duplicate" not in everything["left_out"]
  assert "near_duplicates" not in everything["settings"]
  for key, gone in (("documents", number), ("bytes", size)):
    before, after = (
      sum(found[split][key] for split in ("train", "held_out"))
      for found in (everything, meta)
    )
    assert after + gone == before
  out = capsys.readouterr().out
  assert out.count("near_duplicates=0.3") == 1
  assert f"{number:,} with {size:,} bytes are nearly copies of them" in out
  files = corpus._find_files(config)
  splits, _ = corpus._split(files, config)
  assert corpus._split(files[::-1], config)[0] == splits
  train, held_out = (
    [runs_of_five(text) for name, text in splits[split] if "alike" in name]
    for split in ("train", "held_out")
  )
  assert train and held_out
  for own in held_out:
    assert all(len(own & other) < 0.3 * len(own | other) for other in train)
  # The next run has the tokens already, and a limit counts what is kept.
  capsys.readouterr()
  data.load(config)
  assert not capsys.readouterr().out
  limit = config_of(folder, near_duplicates=0.3, max_bytes=2000)
  found = data.load(limit).fingerprint
  total = found["train"]["bytes"] + found["held_out"]["bytes"]
  assert 1996 < total <= 2000


def test_a_missing_minhash_library_is_named_with_its_extra(folder, monkeypatch):
  monkeypatch.setitem(sys.modules, "datasketch", None)
  with pytest.raises(
    ModuleNotFoundError, match=r"near_duplicates: datasketch.*extra train"
  ):
    data.load(config_of(folder, near_duplicates=0.8))
  data.load(config_of(folder))


def test_one_document_holds_out_its_last_part(tmp_path):
  path = tmp_path / "one.txt"
  text = "".join(chr(0x3B1 + i % 24) for i in range(1000))
  path.write_text(text, encoding="utf-8")
  opened = corpus.open_corpus(config_of(path))
  train, held_out = (
    bytes(np.asarray(s)[:-1].tolist()).decode()
    for s in (opened.train, opened.held_out)
  )
  assert train + held_out == text and len(held_out) == 200


def test_max_bytes_keeps_the_first_of_a_fixed_order(folder):
  metas = [
    corpus.open_corpus(config_of(folder, max_bytes=limit)).fingerprint
    for limit in (1000, 2001)
  ]
  for meta, limit in zip(metas, (1000, 2001)):
    size = meta["train"]["bytes"] + meta["held_out"]["bytes"]
    assert limit - 4 < size <= limit


def write_jsonl(path, texts, field="text"):
  path.parent.mkdir(parents=True, exist_ok=True)
  lines = [json.dumps({"id": i, field: t}) for i, t in enumerate(texts)]
  path.write_text("\n".join(lines) + "\n\n")


def write_parquet(path, texts, field="text"):
  pa = pytest.importorskip("pyarrow")
  import pyarrow.parquet as pq

  path.parent.mkdir(parents=True, exist_ok=True)
  pq.write_table(pa.table({field: texts, "id": range(len(texts))}), path)


@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
@pytest.mark.parametrize("as_folder", [True, False])
def test_jsonl_and_parquet_rows_are_documents(tmp_path, write, as_folder):
  name = "a.jsonl" if write is write_jsonl else "a.parquet"
  path = tmp_path / "rows" / name
  write(path, TEXTS, field="content")
  root = path.parent if as_folder else path
  config = config_of(root, text_field="content")
  opened = corpus.open_corpus(config)
  found = b"".join(
    bytes(np.asarray(s).tolist()) for s in (opened.train, opened.held_out)
  )
  assert sorted(found.split(b"\xff")[:-1]) == sorted(t.encode() for t in TEXTS)
  assert opened.fingerprint["held_out"]["documents"] == 8
  with pytest.raises(ValueError, match=r"text_field='text'.*a\..*'content'"):
    data.load(config_of(root))


def test_the_default_is_the_standard_library_source():
  files = corpus._find_files(data.TextConfig())
  names = [name for name, _ in files]
  assert names == sorted(names) and "argparse.py" in names
  assert all(name.endswith(".py") for name in names)
  assert not any("site-packages" in name for name in names)


def test_files_that_are_not_text_are_left_out_with_a_warning(folder):
  (folder / "latin.txt").write_bytes("é".encode("latin-1"))
  (folder / "image.bin").write_bytes(b"\0\1\2\3")
  (folder / ".hidden").write_bytes(b"no")
  (folder / "nowhere").symlink_to(folder / "gone")
  os.mkfifo(folder / "pipe")
  deep = json.dumps({"text": "fine"}) + "\n" + "[" * 200_000 + "]" * 200_000
  (folder / "deep.jsonl").write_text(deep)
  (folder / "numbers.json").write_text("[1, 2]")
  with pytest.warns(UserWarning) as caught:
    source = data.load(config_of(folder))
  said = " ".join(str(warning.message) for warning in caught)
  for text in (
    "latin.txt (not UTF-8 text)",
    "image.bin (not UTF-8 text)",
    "nowhere (a link to nowhere)",
    "pipe (no regular file)",
    "deep.jsonl:2 (JSON nested too deep to be read)",
    "numbers.json (a JSON array with entries that have no text in 'text')",
  ):
    assert text in said
  assert ".hidden" not in said
  assert source.fingerprint["left_out"] == {
    "not_utf8": 2,
    "empty": 0,
    "duplicate": 0,
    "too_deep": 1,
    "json_array": 1,
  }


def _documents(config):
  opened = corpus.open_corpus(config)
  return {
    document[:-1].tobytes().decode()
    for stream in (opened.train, opened.held_out)
    for document in np.split(
      stream.astype(np.uint8), np.flatnonzero(stream == 255) + 1
    )[:-1]
  }


def test_linked_folders_compressed_files_and_json_arrays_are_read(tmp_path):
  folder, elsewhere = tmp_path / "text", tmp_path / "elsewhere"
  (folder / "a").mkdir(parents=True)
  elsewhere.mkdir()
  lines = [json.dumps({"text": f"line {i}"}) for i in range(4)]
  (folder / os.fsdecode(b"caf\xe9.txt")).write_text("no UTF-8 in its name")
  (folder / "a" / "plain.txt").write_text("plain")
  (folder / "l.jsonl.gz").write_bytes(gzip.compress(lines[0].encode()))
  (folder / "t.txt.xz").write_bytes(lzma.compress(b"in xz"))
  (folder / "t.txt.bz2").write_bytes(bz2.compress(b"in bz2"))
  (folder / "array.json").write_text(f'[{lines[1]}, "bare"]')
  (folder / "lines.json").write_text("\n".join(lines[2:]))
  (folder / "object.json").write_text('{"a": 1}')
  (folder / "one.json").write_text('{"text": "one object"}')
  (elsewhere / "linked.txt").write_text("linked")
  (folder / "link").symlink_to(elsewhere)
  (elsewhere / "circle").symlink_to(folder)
  (folder / "0").symlink_to(folder / "a")
  config = config_of(folder)
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    found = _documents(config)
  assert found == {
    *(f"line {i}" for i in range(4)),
    *("no UTF-8 in its name", "plain", "in xz", "in bz2", "bare"),
    *('{"a": 1}', "one object", "linked"),
  }
  names = [name for name, _ in corpus._find_files(config)]
  assert "caf\\xe9.txt" in names and "link/linked.txt" in names
  # A folder that a link leads to as well keeps its own name.
  assert [name for name in names if "plain" in name] == ["a/plain.txt"]


@pytest.mark.parametrize(
  "content, why",
  [
    (
      '{"content": "a"}\n{"content": "b"}',
      "JSON lines without a text in 'text'",
    ),
    ('[{"text": "a"}, {"text":', "no JSON: "),
    (f'[{{"text": "a", "n": {"9" * 5000}}}]', "no JSON: "),
  ],
)
def test_a_damaged_json_file_is_left_out_with_the_reason(
  tmp_path, content, why
):
  (tmp_path / "bad.json").write_text(content)
  for i in range(3):
    (tmp_path / f"{i}.txt").write_text(f"text {i}")
  with pytest.warns(UserWarning, match=f"bad.json.*{why}"):
    assert _documents(config_of(tmp_path)) == {f"text {i}" for i in range(3)}


@pytest.mark.parametrize("suffix", ["gz", "bz2", "xz"])
def test_a_damaged_compressed_file_is_named(tmp_path, suffix):
  (tmp_path / f"a.txt.{suffix}").write_bytes(b"not compressed")
  with pytest.raises(ValueError, match=rf"a.txt.{suffix} cannot be decompress"):
    data.load(config_of(tmp_path))


def test_bpe_takes_time_in_proportion_to_text_without_spaces():
  """Words are cut, so that neither training nor encoding is quadratic."""
  rng = np.random.default_rng(0)
  letters = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", np.uint8)
  text = rng.choice(letters, 160_000).tobytes().decode()

  def seconds(text):
    start = time.process_time()
    tokenizer = corpus._BPETokenizer.train([text], 4096)
    (ids,) = tokenizer.encode([text])
    assert tokenizer.decode(ids) == text
    return time.process_time() - start

  small, large = seconds(text[:20_000]), seconds(text)
  # Without cutting, eight times the text takes more than 60 times as long.
  assert large < 20 * small + 0.5


def test_words_of_usual_length_are_not_cut():
  words = [f"{'ab' * n} {n}\n" for n in range(1, 120)]
  (model, cut) = (corpus._BPETokenizer.train(words, 300) for _ in range(2))
  import tokenizers

  cut.model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False
  )
  for a, b in zip(model.encode(words), cut.encode(words)):
    np.testing.assert_array_equal(a, b)


def test_installed_packages_are_a_corpus(tmp_path, monkeypatch):
  package = tmp_path / "site" / "thing"
  about = tmp_path / "site" / "thing-1.2.dist-info"
  package.mkdir(parents=True)
  about.mkdir()
  (about / "METADATA").write_text(
    "Metadata-Version: 2.1\nName: thing\nVersion: 1.2\n"
  )
  (package / "notes.txt").write_text("no Python")
  for i in range(4):
    (package / f"m{i}.py").write_text(f"x = {i}\n" * 50)
  paths = {"purelib": str(tmp_path / "site"), "stdlib": "/nowhere"}
  monkeypatch.setattr(corpus.sysconfig, "get_paths", lambda: paths)
  config = data.TextConfig(installed=True, cache_dir=str(tmp_path / "cache"))
  found = data.load(config).fingerprint
  assert found["name"] == "installed packages"
  assert found["packages"] == ["thing==1.2"]
  assert found["files"] == 4
  with pytest.raises(ValueError, match="installed=True with path='x'"):
    data.TextConfig(installed=True, path="x")


# --- A tokenizer of one's own ------------------------------------------------


def save_tokenizer(path, **changes):
  """Byte-level BPE with a special end-of-text, and a token before each text."""
  import tokenizers

  alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
  model = tokenizers.Tokenizer(tokenizers.models.BPE())
  model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False
  )
  model.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=300, initial_alphabet=sorted(alphabet), show_progress=False
  )
  model.train_from_iterator(TEXTS, trainer=trainer)
  model.add_special_tokens(["<bos>", "<|endoftext|>"])
  model.add_tokens(["猫"])
  model.post_processor = tokenizers.processors.TemplateProcessing(
    single="<bos> $A", special_tokens=[("<bos>", model.token_to_id("<bos>"))]
  )
  model.enable_truncation(4)
  path.write_text(json.dumps(json.loads(model.to_str()) | changes))
  return tokenizers.Tokenizer.from_str(path.read_text())


def test_an_own_tokenizer_gives_its_tokens_and_every_byte(folder):
  path = folder.parent / "tokenizer.json"
  theirs = save_tokenizer(path)
  theirs.no_truncation()
  tricky = "<|endoftext|> <bos> 猫" * 3
  (folder / "tricky.txt").write_text(tricky)
  config = config_of(folder, tokenizer=str(path), rows="files")
  opened = corpus.open_corpus(config)
  end = theirs.token_to_id("<|endoftext|>")
  texts = set()
  for stream, ends in (
    (opened.train, opened.train_ends),
    (opened.held_out, opened.held_out_ends),
  ):
    for document in np.split(stream, ends)[:-1]:
      ids, last = document[:-1].tolist(), document[-1]
      text = theirs.decode(ids)
      texts.add(text)
      assert last == end and opened.token_bytes[end] == 0
      assert opened.token_bytes[document].sum() == len(text.encode())
      if text != tricky:
        assert ids == theirs.encode(text, add_special_tokens=False).ids
  assert texts == {*TEXTS, tricky}
  assert data.load(config).vocab_size == theirs.get_vocab_size() == 303
  # What the run needs later does not need the file.
  path.rename(folder.parent / "moved.json")
  saved = corpus.read_tokenizer(config, opened.tokenizer)
  (ids,) = saved.encode([tricky])
  assert saved.decode(np.append(ids, 999)) == tricky + "\ufffd"


def test_an_own_tokenizer_is_known_by_its_content(folder):
  path = folder.parent / "tokenizer.json"
  save_tokenizer(path)
  config = config_of(folder, tokenizer=str(path))
  first = data.load(config).fingerprint
  moved = path.rename(folder.parent / "moved.json")
  config = dataclasses.replace(config, tokenizer=str(moved))
  assert data.load(config).fingerprint == first
  lower = {"normalizer": {"type": "Replace", "pattern": {"String": "def"},
                          "content": ""}}  # fmt: skip
  save_tokenizer(moved, **lower)
  with pytest.warns(UserWarning, match="do not add up .* for each token"):
    changed = data.load(config)
  assert changed.token_bytes is None
  assert changed.fingerprint["settings"] != first["settings"]


def test_bytes_of_tokens_with_byte_fallback(tmp_path):
  """As SentencePiece writes them: a space as U+2581, other bytes by number."""
  vocab = {"</s>": 0, "a": 1, "\u2581a": 2, "\u2581": 3}
  vocab |= {f"<0x{i:02X}>": 4 + i for i in range(256)}
  document = {
    "version": "1.0",
    "added_tokens": [
      {"id": 0, "content": "</s>", "special": True, "single_word": False,
       "lstrip": False, "rstrip": False, "normalized": False},
    ],
    "normalizer": {"type": "Replace", "pattern": {"String": " "},
                   "content": "\u2581"},
    "pre_tokenizer": None,
    "post_processor": None,
    "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}]},
    "model": {"type": "BPE", "vocab": vocab, "merges": [["\u2581", "a"]],
              "byte_fallback": True},
  }  # fmt: skip
  path = tmp_path / "tokenizer.json"
  path.write_text(json.dumps(document))
  (tmp_path / "text").mkdir()
  for i in range(9):
    (tmp_path / "text" / f"{i}.txt").write_text(" aé" * (i + 1))
  opened = corpus.open_corpus(config_of(tmp_path / "text", tokenizer=str(path)))
  assert opened.token_bytes[:5].tolist() == [0, 1, 2, 1, 1]
  total = opened.token_bytes[opened.train].sum()
  assert total == opened.fingerprint["train"]["bytes"]


@pytest.mark.parametrize(
  ("name", "changes", "text"),
  [
    ("none.json", {}, r"tokenizer='.*none.json' cannot be read"),
    ("text.json", {}, r"text.json' cannot be read.*wanted a tokenizer.json"),
    ("own.json", {"end_of_text": "</s>"}, r"end_of_text='</s>'.*the name of"),
    ("two.json", {}, r"end_of_text=None.*it has \['<\|endof.*', '</s>'\]"),
    (
      "own.json",
      {"end_of_text": "x"},
      r"end_of_text='x': .* spells this token",
    ),
  ],
)
def test_a_wrong_tokenizer_is_refused(folder, name, changes, text):
  place = folder.parent
  (place / "text.json").write_text('{"a": 1}')
  own = save_tokenizer(place / "own.json")
  own.add_special_tokens(["</s>"])
  own.save(str(place / "two.json"))
  config = config_of(folder, tokenizer=str(place / name), **changes)
  with pytest.raises(ValueError, match=text):
    data.load(config)


# --- The cache ---------------------------------------------------------------


def test_the_cache_is_used_again_and_never_when_text_or_setting_changed(
  folder, monkeypatch
):
  calls = []
  write = corpus._write_cache
  monkeypatch.setattr(
    corpus, "_write_cache", lambda *a: (calls.append(1), write(*a))
  )
  first = data.load(config_of(folder))
  assert data.load(config_of(folder)).fingerprint == first.fingerprint
  assert len(calls) == 1
  # A setting that the byte tokenizer does not read changes nothing.
  data.load(config_of(folder, vocab_size=300))
  assert len(calls) == 1
  data.load(config_of(folder, held_out=0.4))
  data.load(config_of(folder, tokenizer="bpe"))
  data.load(config_of(folder, tokenizer="bpe", vocab_size=300))
  data.load(config_of(folder, max_bytes=2000))
  assert len(calls) == 5
  # Same length, same time, other content; then the same content, renamed.
  path = folder / "part0" / "0.txt"
  stat = path.stat()
  path.write_bytes(path.read_bytes().replace(b"def", b"fed"))
  os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
  changed = data.load(config_of(folder))
  assert len(calls) == 6
  assert changed.fingerprint["sha256"] != first.fingerprint["sha256"]
  path.rename(folder / "part0" / "renamed.txt")
  data.load(config_of(folder))
  assert len(calls) == 7


def _load_when_told(config, barrier, queue):
  barrier.wait()
  source = data.load(config)
  batch = source.train_batch(0, 0, batch_size=4, context=64)
  queue.put((source.fingerprint["train"]["tokens"], batch.tokens.tolist()))


def test_two_processes_at_once_leave_one_whole_cache(folder):
  spawn = multiprocessing.get_context("spawn")
  barrier, queue = spawn.Barrier(2), spawn.Queue()
  config = config_of(folder, tokenizer="bpe")
  processes = [
    spawn.Process(target=_load_when_told, args=(config, barrier, queue))
    for _ in range(2)
  ]
  for process in processes:
    process.start()
  results = [queue.get(timeout=60) for _ in processes]
  for process in processes:
    process.join()
    assert process.exitcode == 0
  assert results[0] == results[1]
  (entry,) = pathlib.Path(config.cache_dir).iterdir()
  assert entry.name.startswith("bpe-")


def test_losing_the_race_keeps_the_winners_files(folder, monkeypatch):
  config = config_of(folder)
  data.load(config)
  (entry,) = pathlib.Path(config.cache_dir).iterdir()
  before = (entry / "train.bin").stat().st_ino
  corpus._write_cache(entry, corpus._find_files(config), config)
  assert (entry / "train.bin").stat().st_ino == before
  assert list(entry.parent.iterdir()) == [entry]


def test_a_write_that_fails_leaves_nothing(folder, monkeypatch):
  def fail(*_):
    raise RuntimeError("killed")

  monkeypatch.setattr(np, "save", fail)
  config = config_of(folder)
  with pytest.raises(RuntimeError, match="killed"):
    data.load(config)
  assert list(pathlib.Path(config.cache_dir).iterdir()) == []
  monkeypatch.undo()
  data.load(config)


def test_a_damaged_cache_is_refused(folder):
  config = config_of(folder)
  data.load(config)
  (path,) = pathlib.Path(config.cache_dir).glob("*/train.bin")
  path.write_bytes(path.read_bytes()[:-2])
  with pytest.raises(ValueError, match=r"cache_dir=.*bytes, wanted .*Delete"):
    data.load(config)


# --- Bad input ---------------------------------------------------------------


@pytest.mark.parametrize(
  ("changes", "text"),
  [
    (
      {"tokenizer": "word"},
      r"tokenizer='word'.*'byte', 'bpe', 'pretr.* or the path",
    ),
    ({"end_of_text": "</s>"}, r"end_of_text='</s>': wanted None with"),
    ({"tokenizer": "bpe", "vocab_size": 257}, r"vocab_size=257.*at least 258"),
    ({"held_out": 0.0}, r"held_out=0.0.*0 < held_out < 1"),
    ({"held_out": 1.0}, r"held_out=1.0.*0 < held_out < 1"),
    ({"held_out": float("nan")}, r"held_out=nan"),
    ({"max_bytes": 0}, r"max_bytes=0.*at least 1"),
    ({"near_duplicates": 0.0}, r"near_duplicates=0.0: wanted .* 0.1 to 1"),
    ({"near_duplicates": 1.1}, r"near_duplicates=1.1: wanted .* 0.1 to 1"),
    ({"text_field": ""}, r"text_field is empty"),
    ({"path": ""}, r"path='' is empty"),
  ],
)
def test_text_config_refuses(changes, text):
  with pytest.raises(ValueError, match=text):
    data.TextConfig(**changes)


def test_a_path_without_text_is_refused(tmp_path):
  with pytest.raises(ValueError, match=r"path='.*nowhere' does not exist"):
    data.load(config_of(tmp_path / "nowhere"))
  (tmp_path / "none").mkdir()
  with pytest.raises(ValueError, match=r"path='.*none' holds no files"):
    data.load(config_of(tmp_path / "none"))
  (tmp_path / "none" / "a.bin").write_bytes(b"\xff\xfe\0")
  with (
    warnings.catch_warnings(),
    pytest.raises(ValueError, match=r"holds no text.*'not_utf8': 1"),
  ):
    warnings.simplefilter("ignore")
    data.load(config_of(tmp_path / "none"))
  assert not (tmp_path / "cache").exists()


def test_an_unreadable_file_or_folder_is_refused(folder, monkeypatch):
  def deny(*_):
    raise PermissionError(13, "Permission denied")

  with monkeypatch.context() as patch:
    patch.setattr(pathlib.Path, "read_bytes", deny)
    with pytest.raises(ValueError, match=r"path: file .*Permission denied"):
      data.load(config_of(folder))
  monkeypatch.setattr(os, "scandir", deny)
  with pytest.raises(ValueError, match=r"folder .*cannot be read.*denied"):
    data.load(config_of(folder))


def test_a_cache_dir_that_is_a_file_is_refused(folder):
  (folder.parent / "cache").write_text("")
  with pytest.raises(ValueError, match=r"cache_dir=.*cannot be written"):
    data.load(config_of(folder))


@pytest.mark.parametrize(
  ("line", "text"),
  [
    ("{", r"line 2 of a.jsonl is not JSON"),
    ("[1]", r"line 2 of a.jsonl is a list: wanted a JSON object"),
    ('{"text": 3}', r"text_field='text': line 2 .* Wanted a string"),
    ('{"body": "x"}', r"text_field='text': line 2 .*\['body'\]"),
    ('{"text": "\\ud800"}', r"text_field='text': line 2 .*surrogate"),
  ],
)
def test_bad_jsonl_lines_are_named(tmp_path, line, text):
  (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
  with pytest.raises(ValueError, match=text):
    data.load(config_of(tmp_path / "a.jsonl"))


def test_bad_parquet_is_refused(tmp_path):
  pytest.importorskip("pyarrow")
  (tmp_path / "a.parquet").write_bytes(b"not parquet at all")
  with pytest.raises(ValueError, match=r"a.parquet cannot be read as parquet"):
    data.load(config_of(tmp_path / "a.parquet"))
  write_parquet(tmp_path / "b.parquet", ["x", None])
  with pytest.raises(
    ValueError, match=r"text_field='text': row 2 of b.parquet"
  ):
    data.load(config_of(tmp_path / "b.parquet"))


def test_a_context_longer_than_the_data_is_refused(folder):
  source = data.load(config_of(folder))
  with pytest.raises(ValueError, match=r"context=99999 takes 100000 tokens"):
    source.train_batch(0, 0, batch_size=1, context=99_999)
  with pytest.raises(ValueError, match=r"context=99999, which make 0 batches"):
    source.eval_batch(0, batch_size=1, context=99_999)
  size = source._corpus.train.size
  assert source.train_batch(0, 0, batch_size=1, context=size - 1).tokens.size
  with pytest.raises(ValueError, match="wanted a shorter context"):
    source.train_batch(0, 0, batch_size=1, context=size)


@pytest.mark.parametrize("config", ["text", "recall"])
def test_batch_arguments_are_checked(folder, config):
  source = data.load(
    config_of(folder) if config == "text" else data.RecallConfig()
  )
  with pytest.raises(ValueError, match="batch_size=0"):
    source.train_batch(0, 0, batch_size=0, context=8)
  with pytest.raises(ValueError, match="context=0"):
    source.eval_batch(0, batch_size=1, context=0)
  with pytest.raises(ValueError, match="step=-1"):
    source.train_batch(0, -1, batch_size=1, context=8)
  with pytest.raises(ValueError, match="index=-1"):
    source.eval_batch(-1, batch_size=1, context=8)


def test_load_refuses_another_config():
  with pytest.raises(ValueError, match="config is a dict"):
    data.load({})


# --- Packed documents --------------------------------------------------------


def documents_of(stream, end_of_text):
  """The documents of a stream, with the end-of-text after each."""
  ends = np.flatnonzero(stream == end_of_text) + 1
  return [part.astype(np.int32) for part in np.split(stream, ends)[:-1]]


def pieces_of(batch):
  """(tokens, targets that count) of each document of a packed batch."""
  for tokens, ids, mask in zip(
    batch.tokens, batch.segment_ids, batch.loss_mask, strict=True
  ):
    count = ids.max()
    # Documents are runs of 1, 2, .. and the padding lies behind them.
    want = np.repeat(
      [*range(1, count + 1), 0], np.bincount(ids)[[*range(1, count + 1), 0]]
    )
    np.testing.assert_array_equal(ids, want)
    for number in range(1, count + 1):
      here = ids == number
      yield tokens[here], tokens[1:][mask & here[1:] & here[:-1]]
    assert not mask[(ids[1:] != ids[:-1]) | (ids[1:] == 0)].any()


@pytest.mark.parametrize("rows", ["files", "folders"])
@pytest.mark.parametrize("context", [16, 1000])
def test_packed_rows_hold_every_document_once(folder, rows, context):
  """An epoch has every token that follows another one of its document as a
  target, once, however documents are cut and packed."""
  config = config_of(folder, rows=rows)
  source, opened = data.load(config), corpus.open_corpus(config)
  documents = documents_of(opened.train, 255)
  if rows == "folders":
    joined: dict[int, list] = {}
    for number, document in zip(opened.train_folders, documents, strict=True):
      joined.setdefault(number, []).append(document)
    assert 1 < len(joined) < len(documents)
    documents = [np.concatenate(parts) for _, parts in sorted(joined.items())]
  count = len(source._rows("train", context))
  batch = source.train_batch(1, 0, batch_size=count, context=context)
  assert batch.tokens.shape == (count, context + 1)
  pieces = list(pieces_of(batch))
  # A document's pieces, put together again: they share one token each.
  found = sorted(tuple(tokens.tolist()) for tokens, _ in pieces)
  want = sorted(
    tuple(document[i : i + context + 1].tolist())
    for document in documents
    for i in range(0, len(document) - 1, context)
  )
  assert found == want
  for tokens, targets in pieces:
    np.testing.assert_array_equal(targets, tokens[1:])
  # Few rows are empty at their end.
  assert count <= 1.3 * sum(map(len, want)) / (context + 1) + 1


def test_packed_batches_depend_on_seed_and_step_alone(folder):
  config = config_of(folder, rows="files")
  source, again = data.load(config), data.load(config)
  shape = {"batch_size": 3, "context": 64}
  count = len(source._rows("train", 64))
  for step in (7, 0, 3):  # in any order
    batch = source.train_batch(1, step, **shape)
    assert batches_equal(batch, again.train_batch(1, step, **shape))
  # Two epochs, each with every row once, in another order.
  rows = [
    row.tobytes()
    for step in range(2 * count)
    for row in source.train_batch(1, step, batch_size=1, context=64).tokens
  ]
  # Some rows hold equal text.
  assert sorted(rows[:count]) == sorted(rows[count:])
  assert rows[:count] != rows[count:] and len(set(rows[:count])) > count / 2
  held_out = source.num_eval_batches(batch_size=1, context=64)
  seen = source._held_out_rows(0, held_out, 64, held_out, "")
  assert sorted(seen.tolist()) == list(range(held_out))
  with pytest.raises(ValueError, match="packed rows of context=64"):
    source.eval_batch(held_out, batch_size=1, context=64)
  assert source.fingerprint["rows"] == "files"
  assert "rows" not in data.load(config_of(folder)).fingerprint


def test_a_row_holds_no_more_documents_than_a_model_has_room_for(tmp_path):
  (tmp_path / "many").mkdir()
  for i in range(400):
    (tmp_path / "many" / f"{i}.txt").write_text(str(i))
  source = data.load(config_of(tmp_path / "many", rows="files"))
  batch = source.train_batch(0, 0, batch_size=2, context=1000)
  assert batch.segment_ids.max() == data.max_documents(1000) == 64


def test_positions_of_a_packed_batch():
  ids = np.array([[1, 1, 1, 2, 2, 0, 0]])
  mask = np.ones((1, 6), bool)
  batch = data.Batch(ids, mask, ids[:, 1:], ids)
  np.testing.assert_array_equal(batch.positions()[0, :5], [0, 1, 2, 0, 1])
  plain = batch._replace(segment_ids=None)
  np.testing.assert_array_equal(plain.positions(), [np.arange(6)])


# --- Recall ------------------------------------------------------------------


@pytest.mark.parametrize("tokens_per_fact", [1, 2])
@pytest.mark.parametrize("context", [31, 256])
def test_every_answer_is_its_facts_value_at_the_distance_told(
  tokens_per_fact, context
):
  config = data.RecallConfig(num_fillers=3, tokens_per_fact=tokens_per_fact)
  source = data.load(config)
  batch = source.train_batch(3, 5, batch_size=8, context=context)
  assert batch.tokens.shape == (8, context + 1)
  assert batch.tokens.min() == 0 and batch.tokens.max() < source.vocab_size
  key_0 = 1 + config.num_fillers
  value_0 = key_0 + config.num_keys
  fact_0 = value_0 + config.num_values
  assert batch.loss_mask.sum() >= 8
  np.testing.assert_array_equal(batch.loss_mask, batch.distance > 0)
  for row, mask, distance in zip(*batch[:3]):
    asked = []
    for t in np.flatnonzero(mask):
      key, answer = row[t] - key_0, row[t + 1] - value_0
      assert 0 <= key < config.num_keys and 0 <= answer < config.num_values
      fact = t - distance[t]
      assert 1 <= fact < t
      if tokens_per_fact == 1:
        told = row[fact] - fact_0
        assert told == key * config.num_values + answer
      else:
        assert (row[fact - 1], row[fact]) == (row[t], row[t + 1])
      asked.append(key)
    assert len(set(asked)) == len(asked)
    # Nothing but facts, queries, answers, fillers and the start.
    used = 1 + len(asked) * (2 + tokens_per_fact)
    assert (row < key_0).sum() == context + 1 - used + 1
    assert row[0] == 0 and (row[1:] > 0).all()


def test_distances_spread_over_every_octave_and_end_at_max_distance():
  source = data.load(data.RecallConfig())
  distance = np.concatenate(
    [
      source.train_batch(0, step, batch_size=64, context=512).distance
      for step in range(4)
    ]
  )
  distance = distance[distance > 0]
  share, _ = np.histogram(distance, [1, 4, 8, 16, 32, 64, 128, 256, 513])
  assert (share / distance.size > 0.05).all()
  assert distance.max() > 480
  near = data.load(data.RecallConfig(max_distance=40))
  distance = near.eval_batch(0, batch_size=64, context=512).distance
  assert 30 < distance.max() <= 40


def test_values_say_nothing_without_the_fact():
  source = data.load(data.RecallConfig(num_values=4))
  assert source.chance == 0.25 and source.token_bytes is None
  batch = source.train_batch(0, 0, batch_size=256, context=128)
  answers = batch.tokens[:, 1:][batch.loss_mask]
  share = np.unique(answers, return_counts=True)[1] / answers.size
  # Five standard deviations of a count of about 4,000.
  np.testing.assert_allclose(share, 0.25, atol=5 * (0.19 / 3500) ** 0.5)


def test_recall_batches_are_fixed_and_held_out():
  source, again = data.load(data.RecallConfig()), data.load(data.RecallConfig())
  shape = {"batch_size": 4, "context": 64}
  a = source.train_batch(2, 9, **shape)
  assert batches_equal(a, again.train_batch(2, 9, **shape))
  assert batches_equal(
    source.eval_batch(1, **shape), again.eval_batch(1, **shape)
  )
  others = [
    source.train_batch(2, 8, **shape),
    source.train_batch(1, 9, **shape),
    source.eval_batch(9, **shape),
  ]
  assert not any(np.array_equal(a.tokens, b.tokens) for b in others)
  assert source.num_eval_batches(**shape) is None
  assert json.loads(json.dumps(source.fingerprint)) == source.fingerprint
  changed = data.load(data.RecallConfig(num_fillers=2))
  assert changed.fingerprint != source.fingerprint


@pytest.mark.parametrize(
  ("changes", "text"),
  [
    ({"num_facts": 33}, r"num_facts=33 is more than num_keys=32"),
    ({"num_values": 1}, r"num_values=1: wanted at least 2"),
    ({"num_keys": 0}, r"num_keys=0: wanted at least 1"),
    ({"tokens_per_fact": 3}, r"tokens_per_fact=3: wanted 1 or 2"),
    ({"max_distance": 1}, r"max_distance=1: wanted at least 2"),
  ],
)
def test_recall_config_refuses(changes, text):
  with pytest.raises(ValueError, match=text):
    data.RecallConfig(**changes)


def test_recall_wants_room_for_one_fact():
  source = data.load(data.RecallConfig())
  source.train_batch(0, 0, batch_size=1, context=4)
  with pytest.raises(ValueError, match="context=3 has no room"):
    source.train_batch(0, 0, batch_size=1, context=3)


# --- Probes ------------------------------------------------------------------


def answers_of(config, task, row):
  """The answers of a row of `train.probes`, found from its tokens alone, as
  (query, answer, position of the fact or None, number)."""
  ids, k, v = probes.Ids(config), config.num_keys, config.num_values
  key, ask, value = ids.key, ids.ask, ids.value
  facts, links, words = [], {}, {}
  for t, token in enumerate(row):
    if ids.link(0, 0) <= token:
      links[(token - ids.link(0, 0)) // k] = (token - ids.link(0, 0)) % k, t
    elif ids.fact(0, 0) <= token:
      facts.append((*divmod(token - ids.fact(0, 0), v), t))
    elif value <= token < value + v:
      words[token] = words.get(token, 0) + 1
  first = {i: (x, t) for i, x, t in facts}
  if task == "common_words":
    words[row[-1]] -= 1  # the answer itself
    word, second = sorted(words, key=lambda word: -words[word])[:2]
    lead = 100 * (words[word] / words[second] - 1)
    # The lead is rounded to whole words.
    number = min(config.leads, key=lambda wanted: abs(wanted - lead))
    assert len(set(words.values())) == 2
    return [(len(row) - 2, word, None, number)]
  keys = [t for t, x in enumerate(row) if key <= x < key + k]
  if task == "copy":
    found, half = [], config.num_spans
    for t in keys[half:]:
      (start,) = (s for s in keys[:half] if row[s] == row[t])
      n = sum(ids.symbol <= x < ids.fact(0, 0) for x in row) // (2 * half)
      found += [(t + i, row[start + 1 + i], start + 1 + i, n) for i in range(n)]
    return found
  found = []
  for t in keys:
    i = row[t] - key
    if task == "multi_query":
      found.append((t, value + first[i][0], first[i][1], len(keys)))
    elif task == "multi_value":
      own = [(x, at) for j, x, at in facts if j == i]
      total, at = sum(x for x, _ in own) % v, min(at for _, at in own)
      assert row[t - 1] == ask + len(own)
      found.append((t, value + total, at, len(own)))
    else:
      at, hops = (first if i in first else links)[i][1], 0
      while i in links:
        i, hops = links[i][0], hops + 1
      found.append((t, value + first[i][0], at, hops))
  return found


PROBES = data.ProbesConfig(num_fillers=3)


@pytest.mark.parametrize("task", PROBES.tasks)
def test_every_answer_of_a_probe_follows_from_its_row(task):
  source = data.load(PROBES)
  assert source.probes == PROBES.tasks == tuple(PROBES.chances)
  numbers = set()
  for context in (PROBES.least_context, 200):
    batch = source.probe_batch(task, 0, batch_size=24, context=context)
    assert batch.tokens.shape == (24, context + 1)
    assert batch.tokens.min() == 0 and batch.tokens.max() < source.vocab_size
    np.testing.assert_array_equal(batch.loss_mask, batch.answers)
    assert batch.loss_mask[:, -1].all()
    for row, distance, number in zip(
      batch.tokens, batch.distance, batch.number
    ):
      # A query and its answer are the last tokens. Facts are all before them.
      found = [
        (t, row[t + 1], None if distance[t] < 0 else t - distance[t], number[t])
        for t in np.flatnonzero(number >= 0)
      ]
      assert found == answers_of(PROBES, task, row.tolist())
      numbers |= {number for *_, number in found}
  wanted = {
    "multi_query": PROBES.num_queries,
    "multi_value": PROBES.num_stated,
    "common_words": PROBES.leads,
    "copy": PROBES.spans,
    "variable_tracking": PROBES.hops,
  }
  assert numbers == set(wanted[task])


PACKED = dataclasses.replace(PROBES, lengths=(110, 130, 260), asks=5)


def tasks_of(config, batch):
  """(batch row, first token, end, task) of each document of training rows."""
  for i, ids in enumerate(batch.segment_ids):
    for document in range(1, ids.max() + 1):
      start, *_, last = np.flatnonzero(ids == document).tolist()
      row = batch.tokens[i, start : last + 1].tolist()
      yield i, start, last + 1, task_of(config, row)


def task_of(config, row):
  """The task of a row, by its tokens of each kind."""
  ids = probes.Ids(config)
  if max(row) >= ids.link(0, 0):
    return "variable_tracking"
  if max(row) < ids.symbol:
    return "common_words"
  if max(row) < ids.fact(0, 0):
    return "copy"
  asks = any(ids.ask <= x < ids.key for x in row)
  return "multi_value" if asks else "multi_query"


def test_tasks_of_packed_rows_are_documents_of_each_length():
  context = 570  # no multiple of any length
  source = data.load(PACKED)
  batch = source.train_batch(3, 5, batch_size=150, context=context)
  assert batch.tokens.shape == batch.segment_ids.shape == (150, context + 1)
  assert batch.tokens.max() < source.vocab_size
  # Each row is full of tasks of one length; the last has what is left.
  sizes = {}
  for ids in batch.segment_ids:
    count = np.bincount(ids)[1:].tolist()
    np.testing.assert_array_equal(
      ids, np.repeat(range(1, len(count) + 1), count)
    )
    (length,) = (x for x in PACKED.lengths if context // x == len(count))
    last = context + 1 - length * (len(count) - 1)
    assert count == [length] * (len(count) - 1) + [last]
    sizes[length] = sizes.get(length, 0) + 1
  # An equal share of the rows, and so of the tokens: 50 +- 5 standard
  # deviations.
  assert sorted(sizes) == [110, 130, 260]
  assert all(abs(n - 50) < 5 * (150 * 2 / 9) ** 0.5 for n in sizes.values())
  # Each task begins with the start token, and only there positions start again.
  starts = np.diff(batch.segment_ids, axis=1, prepend=0) > 0
  np.testing.assert_array_equal(batch.tokens == 0, starts)
  np.testing.assert_array_equal(batch.positions() == 0, starts[:, :-1])
  # Its answers follow from its own tokens, and nothing else is a target.
  np.testing.assert_array_equal(batch.loss_mask, batch.answers)
  weights = data.loss_weights(PACKED, batch)
  answers, tasks = 0, []
  for i, start, end, task in tasks_of(PACKED, batch):
    row = batch.tokens[i, start:end].tolist()
    here = slice(start, end - 1)
    distance, number = batch.distance[i, here], batch.number[i, here]
    found = [
      (t, row[t + 1], None if distance[t] < 0 else t - distance[t], number[t])
      for t in np.flatnonzero(number >= 0)
    ]
    assert found == answers_of(PACKED, task, row)
    assert task != "variable_tracking" or len({row[t] for t, *_ in found}) == 5
    assert weights[i, here].sum() == pytest.approx(1)
    answers += len(found)
    tasks.append(task)
  assert batch.loss_mask.sum() == answers
  assert (weights > 0).sum() == answers
  _, counts = np.unique(tasks, return_counts=True)
  share = counts / len(tasks)
  np.testing.assert_allclose(share, 0.2, atol=5 * (0.16 / len(tasks)) ** 0.5)


def test_packed_rows_of_tasks_are_fixed_and_held_out_rows_single():
  source, again = data.load(PACKED), data.load(PACKED)
  plain = data.load(PROBES)
  shape = {"batch_size": 5, "context": 260}
  assert data.is_packed(PACKED) and not data.is_packed(PROBES)
  for step in (4, 0):  # in any order
    a = source.train_batch(2, step, **shape)
    assert batches_equal(a, again.train_batch(2, step, **shape))
    # A row does not depend on the others of its batch.
    fewer = source.train_batch(2, step, **(shape | {"batch_size": 2}))
    for x, y in zip(a, fewer):
      np.testing.assert_array_equal(x[:2], y)
  others = source.train_batch(1, 0, **shape), source.train_batch(2, 1, **shape)
  assert not any(np.array_equal(a.tokens, b.tokens) for b in others)
  for task in (None, *source.probes):
    pair = [
      s.probe_batch(task, 1, **shape) if task else s.eval_batch(1, **shape)
      for s in (source, plain)
    ]
    assert (pair[0].segment_ids == 1).all() and pair[1].segment_ids is None
    assert batches_equal(pair[0]._replace(segment_ids=None), pair[1])
  assert json.loads(json.dumps(source.fingerprint)) == source.fingerprint
  prints = [source.fingerprint, plain.fingerprint]
  for name, value in {"lengths": (110, 130), "asks": 4}.items():
    changed = dataclasses.replace(PACKED, **{name: value})
    prints.append(data.load(changed).fingerprint)
  assert len({json.dumps(x) for x in prints}) == 4
  # Data without the new fields are what they were.
  assert not {"lengths", "asks"} & set(plain.fingerprint)


@pytest.mark.parametrize(
  ("lengths", "context", "keep", "text"),
  [
    (
      (110, 520),
      512,
      0,
      r"lengths=\(110, 520\) with context=512: wanted none ab",
    ),
    (
      (110, 512),
      16384,
      1,
      r"context=16384: a row would hold 148 tasks, .* at most 128\. Wanted none"
      " below 128",
    ),
  ],
)
def test_packed_rows_of_tasks_want_room(lengths, context, keep, text):
  source = data.load(dataclasses.replace(PROBES, lengths=lengths))
  with pytest.raises(ValueError, match=text):
    source.train_batch(0, 0, batch_size=1, context=context)
  # The same lengths without the one that does not fit.
  fits = dataclasses.replace(PROBES, lengths=lengths[keep:][:1])
  data.load(fits).train_batch(0, 0, batch_size=1, context=context)


@pytest.mark.parametrize("task", PROBES.tasks)
def test_the_format_of_a_probe_does_not_tell_its_answers(task):
  source = data.load(PROBES)
  shape = {"batch_size": 400, "context": PROBES.least_context}
  batch = source.probe_batch(task, 1, **shape)
  chance = PROBES.chances[task]
  # The last answer of a row, whose others are known by then: neither the value
  # nor its difference from the answer before is more frequent than others.
  last = batch.tokens[:, -1]
  again = np.zeros(last.size, int)
  for i, row in enumerate(batch.answers):
    queries = np.flatnonzero(row)
    again[i] = batch.tokens[i, queries[-2] + 1] if queries.size > 1 else 0
  for answers in (last, (last - again) % round(1 / chance)):
    share = np.unique(answers, return_counts=True)[1] / answers.size
    bound = 5 * (chance * (1 - chance) / answers.size) ** 0.5
    assert share.size == round(1 / chance)
    np.testing.assert_allclose(share, chance, atol=bound)


def test_probes_are_fixed_and_held_out():
  source, again = data.load(PROBES), data.load(PROBES)
  shape = {"batch_size": 6, "context": PROBES.least_context}
  a = source.train_batch(2, 9, **shape)
  assert batches_equal(a, again.train_batch(2, 9, **shape))
  # A row does not depend on the others of its batch.
  fewer = source.train_batch(2, 9, **(shape | {"batch_size": 4}))
  np.testing.assert_array_equal(fewer.tokens, a.tokens[:4])
  batches = [
    a,
    source.train_batch(2, 8, **shape),
    source.train_batch(1, 9, **shape),
    source.eval_batch(0, **shape),
    source.eval_batch(9, **shape),
    *(source.probe_batch(task, 0, **shape) for task in source.probes),
    source.probe_batch("copy", 1, **shape),
  ]
  rows = [row.tobytes() for batch in batches for row in batch.tokens]
  assert len(set(rows)) == len(rows)
  assert json.loads(json.dumps(source.fingerprint)) == source.fingerprint
  other = data.load(data.ProbesConfig(num_fillers=2))
  assert other.fingerprint != source.fingerprint
  # Each row has the weight of one answer.
  weights = data.loss_weights(PROBES, a)
  np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-6)
  assert ((weights > 0) == a.loss_mask).all()
  with pytest.raises(ValueError, match="name='recall': wanted one of"):
    source.probe_batch("recall", 0, **shape)


@pytest.mark.parametrize(
  ("changes", "text"),
  [
    ({"tasks": ("copy", "sort")}, r"tasks=\('copy', 'sort'\): wanted one or"),
    ({"tasks": ()}, r"tasks=\(\): wanted one or more"),
    ({"num_symbols": 1}, r"num_symbols=1: wanted an integer of at least 2"),
    ({"leads": (0, 5)}, r"leads=\(0, 5\): wanted one or more integers"),
    ({"spans": ()}, r"spans=\(\): wanted one or more integers"),
    ({"num_keys": 7}, r"num_keys=7: task 'multi_query' wants at least 8"),
    (
      {"num_keys": 15},
      r"num_keys=15: task 'variable_tracking' wants at least 16, for num_value",
    ),
    ({"asks": 0}, r"asks=0: wanted an integer of at least 1"),
    ({"asks": 17}, r"asks=17: wanted at most 16, the variables of 4 chains"),
    (
      {"lengths": (256, PROBES.least_context)},
      r"lengths=\(256, 102\): wanted integers of at least 103, in which the p",
    ),
    ({"lengths": (128, 128)}, r"lengths=\(128, 128\): .* each once"),
    ({"lengths": (128.5,)}, r"lengths=\(128\.5,\): wanted integers"),
  ],
)
def test_probes_config_refuses(changes, text):
  with pytest.raises(ValueError, match=text):
    data.ProbesConfig(**changes)


def test_probes_want_room():
  least = PROBES.least_context
  text = f"context={least - 1} has no room .* {least}"
  with pytest.raises(ValueError, match=text):
    data.load(PROBES).eval_batch(0, batch_size=1, context=least - 1)


# --- Mix ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def mix(tmp_path_factory) -> data.MixConfig:
  place = tmp_path_factory.mktemp("mix")
  text = place / "text"
  text.mkdir()
  rng = np.random.default_rng(0)
  words = ["alpha", "beta", "gamma", "def f(x):\n", "return x\n"]
  for i in range(40):
    (text / f"{i}.txt").write_text(" ".join(rng.choice(words, 200)))
  return data.MixConfig(
    text=data.TextConfig(
      path=str(text),
      cache_dir=str(place / "cache"),
      tokenizer="bpe",
      vocab_size=320,
      rows="stream",
    ),
    recall=data.RecallConfig(num_keys=8, num_values=4, num_facts=8),
    num_needles=6,
    asks=4,
    answer_share=0.4,
  )


def test_needles_of_packed_rows_lie_in_the_document_that_asks(mix):
  mix = dataclasses.replace(
    mix, text=dataclasses.replace(mix.text, rows="files"), num_needles=8
  )
  source = data.load(mix)
  counts = {"train": 0, "needle": 0}
  for step in range(12):
    for kind in counts:
      shape = dict(batch_size=2, context=400)
      batch = (
        source.train_batch(1, step, **shape)
        if kind == "train"
        else source.probe_batch(kind, step, **shape)
      )
      check_answers(mix, batch)
      row, t = np.nonzero(batch.distance >= 0)
      fact = t - batch.distance[row, t]
      ids = batch.segment_ids
      assert (ids[row, fact] > 0).all()
      np.testing.assert_array_equal(ids[row, fact], ids[row, t])
      np.testing.assert_array_equal(ids[row, fact], ids[row, t + 1])
      assert batch.loss_mask[row, t].all()
      counts[kind] += len(t)
  assert min(counts.values()) > 20
  # Programs of packed rows want ids in every batch.
  recall = source.probe_batch("recall", 0, batch_size=2, context=400)
  assert (recall.segment_ids == 1).all()


def check_answers(config: data.MixConfig, batch: data.Batch) -> np.ndarray:
  """Every answer is its fact's value; returns where facts and queries lie."""
  recall, first = config.recall, config.text.vocab_size
  keys = first + 1 + recall.num_fillers
  values, facts = keys + recall.num_keys, keys + recall.num_keys
  facts += recall.num_values
  planted = np.zeros(batch.tokens.shape, bool)
  for i, t in np.argwhere(batch.distance >= 0):
    row = batch.tokens[i]
    fact = t - batch.distance[i, t]
    key, value = row[t] - keys, row[t + 1] - values
    assert 0 <= key < recall.num_keys and 0 <= value < recall.num_values
    assert row[fact] - facts == key * recall.num_values + value
    planted[i, [fact, t, t + 1]] = True
  return planted


def test_needles_lie_in_the_text_and_only_answers_are_asked(mix):
  source = data.load(mix)
  shape = dict(batch_size=4, context=128)
  text = data.load(mix.text)
  seen = {True: 0, False: 0}
  for step in range(6):
    batch = source.train_batch(1, step, **shape)
    planted = check_answers(mix, batch)
    words = text.train_batch(1, step, **shape).tokens
    for i in range(4):
      alone = batch.tokens[i, 0] >= mix.text.vocab_size
      seen[alone] += 1
      row, mask = batch.tokens[i], batch.loss_mask[i]
      answers = batch.distance[i] >= 0
      assert answers.sum() >= (3 if alone else 2)
      if alone:  # fillers are no text
        assert (row >= mix.text.vocab_size).all()
        np.testing.assert_array_equal(mask, answers)
      else:
        np.testing.assert_array_equal(row[~planted[i]], words[i][~planted[i]])
        # Neither the fact nor the query can be foretold.
        np.testing.assert_array_equal(mask, ~planted[i, 1:] | answers)
  assert min(seen.values()) >= 2
  again = data.load(mix).train_batch(1, 5, **shape)
  assert all(np.array_equal(a, b) for a, b in zip(batch, again))


def test_facts_can_be_words_that_the_tokenizer_has(mix, tmp_path):
  """Batches are those of facts with ids of their own, with words instead."""
  import tokenizers

  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  words = [f"\u0120{a}{b}word" for a in "abcdefg" for b in "abcdefg"]
  vocab = {name: i for i, name in enumerate([*alphabet, *words])}
  model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
  model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(False)
  model.decoder = tokenizers.decoders.ByteLevel()
  model.add_special_tokens(["<|endoftext|>"])
  path = tmp_path / "tokenizer.json"
  model.save(str(path))
  recall = data.RecallConfig(
    num_keys=8, num_values=4, num_fillers=20, num_facts=8, tokens_per_fact=2
  )
  text = dataclasses.replace(mix.text, tokenizer=str(path))
  own = dataclasses.replace(mix, text=text, recall=recall, num_needles=4)
  new, known = (
    data.load(dataclasses.replace(own, facts=facts))
    for facts in ("tokens", "words")
  )
  assert known.vocab_size == model.get_vocab_size() == 256 + 49 + 1
  ids = np.array(known.fingerprint["words"])
  names = [model.id_to_token(int(i)) for i in ids]
  assert names[0] == "<|endoftext|>" and len(set(names)) == 1 + 20 + 8 + 4
  assert set(names[1:]) <= set(words)
  shape = dict(batch_size=4, context=128)
  for a, b in (
    (new.train_batch(1, 3, **shape), known.train_batch(1, 3, **shape)),
    (
      new.probe_batch("needle", 0, **shape),
      known.probe_batch("needle", 0, **shape),
    ),
    (
      new.probe_batch("recall", 1, **shape),
      known.probe_batch("recall", 1, **shape),
    ),
  ):
    facts = a.tokens - known.vocab_size
    assert (facts >= 0).any()
    want = np.where(facts >= 0, ids[np.maximum(facts, 0)], a.tokens)
    np.testing.assert_array_equal(b.tokens, want)
    np.testing.assert_array_equal(b.loss_mask, a.loss_mask)
    np.testing.assert_array_equal(b.distance, a.distance)
  with pytest.raises(ValueError, match=r"49 words .* wanted 50 for recall's"):
    data.single_token_words(path.read_text(), 50)
  for wrong in (dict(text=mix.text), dict(recall=mix.recall)):
    with pytest.raises(ValueError, match="facts='words' with tokenizer="):
      dataclasses.replace(own, facts="words", **wrong)


def test_held_out_text_is_clean_and_probes_ask_for_facts(mix):
  source = data.load(mix)
  shape = dict(batch_size=2, context=128)
  held_out = source.eval_batch(1, **shape)
  assert (held_out.tokens < mix.text.vocab_size).all()
  assert (held_out.distance == -1).all()
  assert source.token_bytes is not None
  assert evaluate.count_bytes(source, held_out) > 0
  windows = source.num_eval_batches(**shape)
  for name in source.probes:
    # The needles' text comes round again, with other needles.
    first, later = (source.probe_batch(name, i, **shape) for i in (0, windows))
    check_answers(mix, first)
    np.testing.assert_array_equal(first.loss_mask, first.distance >= 0)
    assert not np.array_equal(first.distance, later.distance)
    assert evaluate.count_bytes(source, first) is None
  with pytest.raises(ValueError, match="name='copy': wanted one of"):
    source.probe_batch("copy", 0, **shape)
  assert json.loads(json.dumps(source.fingerprint)) == source.fingerprint


def test_facts_are_asked_more_than_once_in_training_alone(mix):
  shape = dict(batch_size=8, context=256)

  def batches(asks):
    source = data.load(dataclasses.replace(mix, asks=asks))
    train = source.train_batch(0, 0, **shape)
    check_answers(mix, train)
    return train, source.probe_batch("recall", 0, **shape)

  (once, probe), (often, same) = batches(1), batches(4)
  assert batches_equal(probe, same)
  asked, more = ((b.distance >= 0).sum(1) for b in (once, often))
  assert (more > 2 * asked).all() and (more <= 4 * 8).all()
  for row, distance in zip(often.tokens, often.distance):
    (queries,) = np.nonzero(distance >= 0)
    facts = queries - distance[queries]
    # One fact a key, wherever it is asked for from.
    assert len(set(zip(row[queries], facts))) == len(set(row[queries]))


def test_a_mix_can_have_probes(mix):
  tasks = data.ProbesConfig(
    tasks=("copy", "common_words"), leads=(100,), spans=(2, 4)
  )
  config = dataclasses.replace(mix, probes=tasks, probes_share=0.25)
  source, plain = data.load(config), data.load(mix)
  assert source.probes == ("needle", "recall", "copy", "common_words")
  assert source.chance == dict.fromkeys(("needle", "recall"), plain.chance) | {
    "copy": 1 / 16,
    "common_words": 1 / 4,
  }
  first = plain.vocab_size
  assert source.vocab_size == first + probes.Ids(tasks).vocab_size
  shape = {"batch_size": 64, "context": 128}
  old, new = (s.train_batch(0, 3, **shape) for s in (plain, source))
  own = (new.number >= 0).any(1)
  # The other rows stay what they are without probes.
  assert 6 <= own.sum() <= 26
  for x, y in zip(old[:3], new[:3]):
    np.testing.assert_array_equal(x[~own], y[~own])
  assert (new.tokens[own] >= first).all() and not (old.tokens >= first).any()
  for task in tasks.tasks:
    batch = source.probe_batch(task, 0, **shape)
    alone = data.load(tasks).probe_batch(task, 0, **shape)
    np.testing.assert_array_equal(batch.tokens - first, alone.tokens)
    np.testing.assert_array_equal(batch.number, alone.number)
  weights = data.loss_weights(config, new)
  answers = weights[new.answers].sum() / weights.sum()
  assert answers == pytest.approx(config.answer_share)
  assert "probes" not in plain.fingerprint and "probes" in source.fingerprint
  # Of packed tasks, which make rows of all kinds documents.
  packed = dataclasses.replace(tasks, lengths=(32, 64))
  config = dataclasses.replace(config, probes=packed)
  source = data.load(config)
  assert data.is_packed(config) and not data.is_packed(mix)
  batch = source.train_batch(0, 3, **shape)
  assert (batch.segment_ids[~own] == 1).all()
  np.testing.assert_array_equal(batch.tokens[~own], new.tokens[~own])
  alone = data.load(packed).train_batch(0, 3, **shape)
  np.testing.assert_array_equal(batch.tokens[own] - first, alone.tokens[own])
  np.testing.assert_array_equal(batch.segment_ids[own], alone.segment_ids[own])
  shape["batch_size"] = 4
  held_out = [source.probe_batch(name, 0, **shape) for name in source.probes]
  for batch in (*held_out, source.eval_batch(0, **shape)):
    assert (batch.segment_ids == 1).all()
  with pytest.raises(ValueError, match=r"probes_share=0\.0 with probes=Pr"):
    dataclasses.replace(config, probes_share=0.0)
  with pytest.raises(ValueError, match=r"probes_share=0\.8: wanted at least"):
    dataclasses.replace(config, probes_share=0.8)


def test_answers_weigh_their_share_of_the_loss(mix):
  batch = data.load(mix).train_batch(1, 3, batch_size=4, context=128)
  weights = data.loss_weights(mix, batch)
  answers = batch.distance >= 0
  share = weights[answers].sum() / weights.sum()
  assert share == pytest.approx(mix.answer_share)
  assert set(weights[~answers].tolist()) == {0.0, 1.0}
  assert (weights[~batch.loss_mask] == 0).all()
  alone = batch._replace(loss_mask=answers)
  np.testing.assert_array_equal(data.loss_weights(mix, alone), answers)
  plain = data.loss_weights(mix.text, batch)
  np.testing.assert_array_equal(plain, batch.loss_mask)


@pytest.mark.parametrize(
  ("changes", "text"),
  [
    ({"recall_share": 0.0}, "recall_share=0.0"),
    ({"answer_share": 1.0}, "answer_share=1.0"),
    ({"num_needles": 9}, "num_needles=9: wanted 1 to recall.num_keys = 8"),
  ],
)
def test_mix_config_refuses(mix, changes, text):
  with pytest.raises(ValueError, match=text):
    dataclasses.replace(mix, **changes)


# --- Tokens and sources of one's own -----------------------------------------


def own_documents(count):
  rng = np.random.default_rng(count)
  sizes = rng.integers(3, 40, count)
  return [rng.integers(70_000, size=size) for size in sizes]


def test_own_tokens_are_packed_by_their_documents(tmp_path):
  train, held_out = own_documents(30), own_documents(7)
  corpus.write_tokens(
    tmp_path,
    train=train,
    held_out=held_out,
    vocab_size=70_000,
    token_bytes=np.arange(70_000),
  )
  source = data.load(data.TokensConfig(path=str(tmp_path)))
  assert source.vocab_size == 70_000
  np.testing.assert_array_equal(source.token_bytes, np.arange(70_000))
  found = []
  rows = source.num_eval_batches(batch_size=1, context=63)
  for i in range(rows):
    batch = source.eval_batch(i, batch_size=1, context=63)
    ids = batch.segment_ids[0]
    found += [
      batch.tokens[0, ids == j].tolist() for j in range(1, ids.max() + 1)
    ]
  assert sorted(found) == sorted(x.tolist() for x in held_out)
  stream = data.load(data.TokensConfig(path=str(tmp_path), rows="stream"))
  batch = stream.eval_batch(0, batch_size=1, context=63)
  np.testing.assert_array_equal(batch.tokens[0], np.concatenate(held_out)[:64])


def test_a_header_of_ones_own_names_the_end_of_text(tmp_path):
  tokens = np.array([5, 6, 9, 7, 9, 8, 8], np.uint16)
  for name in ("a.bin", "b.bin"):
    tokens.tofile(tmp_path / name)
  header = {
    "vocab_size": 10, "dtype": "uint16", "train": "a.bin",
    "held_out": "b.bin", "end_of_text": 9,
  }  # fmt: skip
  path = tmp_path / "tokens.json"
  path.write_text(json.dumps(header))
  config = data.TokensConfig(path=str(tmp_path))
  opened = corpus.open_corpus(config)
  assert opened.train_ends.tolist() == [3, 5, 7]
  assert data.load(config).token_bytes is None
  for change, text in (
    ({"vocab_size": 9}, "has the id 9: wanted ids below vocab_size = 9"),
    ({"dtype": "int16"}, "dtype 'int16': wanted 'uint16'"),
    ({"dtype": "uint32"}, "has 14 bytes: wanted a file of uint32"),
    ({"train": "c.bin"}, "c.bin has 0 bytes"),
    ({"vocab": 3}, r"unknown fields \['vocab'\]"),
    ({"document_ends": {}}, "either end_of_text or document_ends"),
  ):
    path.write_text(json.dumps(header | change))
    with pytest.raises(ValueError, match=text):
      corpus.open_corpus(config)
  with pytest.raises(ValueError, match="document 0 has ids from 5 to 9"):
    corpus.write_tokens(
      tmp_path / "w", train=[tokens], held_out=[tokens], vocab_size=9
    )


class OwnSource(data.Source):
  vocab_size = 50

  def __init__(self, argument):
    self.fingerprint = {"name": argument}

  def _batch(self, key, batch_size, context):
    rng = np.random.default_rng(key)
    return data.Batch.of(rng.integers(50, size=(batch_size, context + 1)))

  def train_batch(self, seed, step, *, batch_size, context):
    return self._batch((0, seed, step), batch_size, context)

  def eval_batch(self, index, *, batch_size, context):
    return self._batch((1, index), batch_size, context)


def test_a_source_of_ones_own():
  name = f"{__name__}:OwnSource"
  config = data.FactoryConfig(factory=name, argument="mine")
  source = data.load(config)
  assert source.fingerprint == {"name": "mine"} and source.chance is None
  assert source.num_eval_batches(batch_size=1, context=8) is None
  batch = source.train_batch(0, 1, batch_size=2, context=8)
  assert batch.loss_mask.all() and batch.tokens.dtype == np.int32
  assert not data.is_packed(config) and not data.asks_for_facts(config)
  with pytest.raises(ValueError, match="wanted 0 to 9"):
    batch.check_ids(10)
  for wrong, text in (
    ("no_module_here:f", "cannot be imported"),
    (f"{__name__}:own_documents", "gave a list: wanted a train.data.Source"),
  ):
    with pytest.raises(ValueError, match=text):
      data.load(data.FactoryConfig(factory=wrong, argument=4))
