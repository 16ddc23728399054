"""Samples from a run folder's checkpoint.

python -m train sample runs/demo/text/msa/seed0 --prompt "import "
"""

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from msa_jax import generate, ops
from msa_jax.model import DecoderLM
from train import config as config_lib
from train import corpus
from train.data import MixConfig, Source, TextConfig
from train.program import Program, compile_key, read_state

# How many new tokens there are by default, if the context has room for them.
_NEW_TOKENS = 256


def load_config(
  folder: pathlib.Path, implementation: str | None = None
) -> config_lib.RunConfig:
  """The config of a run, for one device.

  Args:
    folder: the run's folder.
    implementation: of attention; None: those that the run names; "auto": the
      first that works on this device.

  Raises:
    ValueError: there is no such run or implementation.
  """
  if not (folder / "config.json").exists():
    text = f"{folder}: no run folder (it has no config.json)"
    runs = sorted(path.parent for path in folder.glob("*/*/seed*/config.json"))
    if runs:
      text += f"; wanted one of {', '.join(map(str, runs))}"
    raise ValueError(f"{text}.")
  config = config_lib.load(config_lib.RunConfig, folder / "config.json")
  if implementation is not None:
    named: Any = None if implementation == "auto" else implementation
    model = dataclasses.replace(
      config.model, implementation=named, gqa_implementation="xla"
    )
    config = dataclasses.replace(config, model=model)
  return dataclasses.replace(config, mesh=config_lib.MeshConfig())


def load_model(
  folder: pathlib.Path,
  step: int | None = None,
  implementation: str | None = None,
) -> tuple[DecoderLM, int]:
  """The model of a run's checkpoint, on one device.

  Args:
    folder: the run's folder.
    step: of the checkpoint; None: the latest.
    implementation: as for `load_config`.

  Returns:
    The model, and the checkpoint's step.

  Raises:
    ValueError: there is no such run or checkpoint, or the checkpoint belongs to
      another model than the config's.
  """
  program = Program(compile_key(load_config(folder, implementation)))
  found = read_state(program, folder, step)
  if found is None:
    raise ValueError(f"{folder}: the run has no checkpoint.")
  state, step = found
  return program.merge(state.params), step


def load_tokenizer(
  folder: pathlib.Path, config: config_lib.RunConfig
) -> Any | None:
  """The tokenizer of a run's text; None if its data are no text.

  Args:
    folder: the run's folder.
    config: the run's config.

  Raises:
    ValueError: the run's tokenizer.json is missing.
  """
  data = config.data.text if isinstance(config.data, MixConfig) else config.data
  if not isinstance(data, TextConfig):
    return None
  path = folder / "tokenizer.json"
  saved = path.read_text() if path.exists() else None
  if saved is None and data.tokenizer != "byte":
    raise ValueError(
      f"{path} is missing: wanted the tokenizer of the run's data, which is in"
      f" a folder of data.cache_dir={data.cache_dir!r} too."
    )
  return corpus.read_tokenizer(data, saved)


# Tokens that `continuations` makes of each prompt, and letters of the prompt
# that it returns.
_SAMPLE_TOKENS = 64
_PROMPT_LETTERS = 300


def continuations(
  model: DecoderLM,
  config: config_lib.RunConfig,
  source: Source,
  phase: ops.Phase,
) -> list[dict[str, str]]:
  """Greedy continuations of `config.samples` held-out texts.

  Each text is the first document of a held-out batch row. The prompt is its
  first half.

  Args:
    model: of the run.
    config: the run's.
    source: its data.
    phase: of the model's msa layers.

  Returns:
    The end of each prompt, the model's text, and the text that was there.
  """
  data = config.data.text if isinstance(config.data, MixConfig) else config.data
  assert isinstance(data, TextConfig)
  tokenizer = corpus.read_tokenizer(data, source.tokenizer)
  prompts, rests = [], []
  for index in range(config.samples):
    batch = source.eval_batch(index, batch_size=1, context=config.context)
    tokens = batch.tokens[0]
    if batch.segment_ids is not None:
      tokens = tokens[batch.segment_ids[0] == 1]
    half = max(len(tokens) // 2, 1)
    prompts.append(tokens[:half])
    rests.append(tokens[half:][:_SAMPLE_TOKENS])
  end = int(tokenizer.end_of_text)
  new = generate.generate(
    model,
    prompts,
    max_new_tokens=min(_SAMPLE_TOKENS, config.context // 2),
    stop_tokens=(end,),
    phase=phase,
  )

  def text(ids: np.ndarray) -> str:
    return tokenizer.decode(ids[ids != end])

  return [
    {
      "prompt": text(prompt)[-_PROMPT_LETTERS:],
      "sample": text(sample),
      "text": text(rest),
    }
    for prompt, sample, rest in zip(prompts, new, rests, strict=True)
  ]


class _Plain:
  """Stands in for a tokenizer where token ids do not stand for text."""

  end_of_text = None

  def decode(self, ids: np.ndarray) -> str:
    return "".join(f"{i} " for i in ids.tolist())


def run(
  folder: pathlib.Path,
  *,
  prompts: Sequence[str] = (),
  tokens: Sequence[int] = (),
  step: int | None = None,
  implementation: str | None = None,
  max_new_tokens: int | None = None,
  sampling: generate.Sampling = generate.GREEDY,
  seed: int = 0,
) -> Iterator[list[str]]:
  """Continues prompts with a run's model, up to its context.

  Args:
    folder: the run's folder.
    prompts: texts, each in a batch row of its own. Without prompts and tokens,
      one batch row begins a new document.
    tokens: instead of texts, the token ids of one batch row.
    step: of the checkpoint; None: the latest.
    implementation: as for `load_config`.
    max_new_tokens: for each batch row; None: 256, or fewer where the context
      ends.
    sampling: how to sample.
    seed: of the samples.

  Yields:
    The new text of each batch row, as it is generated. A batch row ends with
    the end of its document.

  Raises:
    ValueError: an argument is wrong or does not fit the run.
  """
  config = load_config(folder, implementation)
  found_tokenizer = load_tokenizer(folder, config)
  tokenizer: Any = found_tokenizer or _Plain()
  if found_tokenizer is None and (prompts or not tokens):
    raise ValueError(
      f"{folder}: the run's data are no text: wanted --tokens with ids below"
      f" {config.model.vocab_size}."
    )
  if prompts and tokens:
    raise ValueError("--prompt and --tokens: wanted one of them.")
  rows = [np.asarray(tokens)] if tokens else list(tokenizer.encode(prompts))
  if not rows:
    rows = [np.asarray([tokenizer.end_of_text])]
  longest = max(len(row) for row in rows)
  room = config.context - longest
  if max_new_tokens is None:
    max_new_tokens = max(min(_NEW_TOKENS, room), 1)
  if max_new_tokens > room:
    raise ValueError(
      f"{folder}: the longest prompt has {longest} tokens, which with"
      f" {max_new_tokens} new ones are more than the run's"
      f" context={config.context}: wanted a shorter prompt or fewer"
      " max_new_tokens."
    )
  model, found = load_model(folder, step, implementation)
  phase: ops.Phase = "sparse"
  if config.phase(found) == "warmup":
    phase = "warmup"
  stop = tokenizer.end_of_text
  parts = generate.stream(
    model,
    rows,
    max_new_tokens=max_new_tokens,
    sampling=sampling,
    key=jax.random.key(seed),
    stop_tokens=() if stop is None else (stop,),
    phase=phase,
  )
  done = [np.zeros(0, np.int32)] * len(rows)
  shown = [0] * len(rows)
  for part in parts:
    texts = []
    for i, new in enumerate(part):
      done[i] = np.concatenate([done[i], new[new != stop]])
      text = tokenizer.decode(done[i])
      # The last bytes may be the beginning of a character.
      ready = len(text.rstrip("\ufffd"))
      texts.append(text[shown[i] : ready])
      shown[i] = max(ready, shown[i])
    yield texts
  yield [tokenizer.decode(row)[n:] for row, n in zip(done, shown)]
