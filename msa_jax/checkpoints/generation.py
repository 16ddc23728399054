"""What a folder says about generation: when it ends, how to draw, and how a
conversation becomes a prompt.

transformers writes generation_config.json, older programs put the same fields
into config.json. A field of the first file goes before one of the second.
"""

from __future__ import annotations

import datetime
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from msa_jax.checkpoints.fields import Fields, read_json, read_text
from msa_jax.checkpoints.folders import read_config, text_fields
from msa_jax.checks import is_integer
from msa_jax.generate import GREEDY, Sampling

FILE = "generation_config.json"
_NONE: tuple[Any, ...] = ()
_ONE, _ZERO = (1, 1.0), (0, 0.0)
# What may end a text, beside eos_token_id, and the values that change nothing.
_ENDS: Mapping[str, tuple[Any, ...]] = {
  "exponential_decay_length_penalty": _NONE,
  "forced_eos_token_id": _NONE,
  "max_time": _NONE,
  "min_length": (0,),
  "min_new_tokens": (0,),
  "stop_strings": ([], ""),
}
# What may change the draws, beside do_sample, temperature, top_k and top_p.
_DRAWS: Mapping[str, tuple[Any, ...]] = {
  "bad_words_ids": ([],),
  "begin_suppress_tokens": ([],),
  "constraints": ([],),
  "dola_layers": _NONE,
  "encoder_no_repeat_ngram_size": (0,),
  "encoder_repetition_penalty": _ONE,
  "epsilon_cutoff": _ZERO,
  "eta_cutoff": _ZERO,
  "force_words_ids": ([],),
  "forced_bos_token_id": _NONE,
  "frequency_penalty": _ZERO,
  "guidance_scale": _ONE,
  "min_p": _ZERO,
  "no_repeat_ngram_size": (0,),
  "num_beam_groups": (1,),
  "num_beams": (1,),
  "penalty_alpha": _ZERO,
  "presence_penalty": _ZERO,
  "repetition_penalty": _ONE,
  "sequence_bias": ({}, []),
  "suppress_tokens": ([],),
  "token_healing": (False,),
  "top_h": _ZERO,
  "typical_p": _ONE,
  "watermarking_config": _NONE,
}
_USED = ("do_sample", "eos_token_id", "temperature", "top_k", "top_p")
FIELDS = frozenset((*_USED, *_ENDS, *_DRAWS))
"""The fields that change which tokens come out."""
# How many tokens and texts to make is said by the caller. The others choose
# how to compute the same, belong to beam search, or name tokens of the prompt.
_OTHERS = """
assistant_confidence_threshold assistant_early_exit assistant_ensemble_weight
assistant_lookbehind bos_token_id cache_config cache_implementation
compile_config continuous_batching_config decoder_start_token_id
disable_compile diversity_penalty early_stopping is_assistant length_penalty
low_memory max_cache_len max_length max_matching_ngram_size max_new_tokens
num_assistant_tokens num_assistant_tokens_schedule num_return_sequences
output_attentions output_hidden_states output_logits output_scores pad_token_id
prefill_chunk_size prompt_lookup_num_tokens remove_invalid_values
renormalize_logits return_dict_in_generate speculation_type target_lookbehind
transformers_version use_cache use_mtp
"""
_HARMLESS = frozenset(_OTHERS.split())


class Generation(NamedTuple):
  """When and how a folder says to generate.

  Attributes:
    stop_tokens: tokens that end a text.
    sampling: how to draw.
  """

  stop_tokens: tuple[int, ...]
  sampling: Sampling


def read_generation(
  folder: str | os.PathLike, sampling: Sampling | None = None
) -> Generation:
  """Reads how a folder says to generate; without such fields, greedily.

  Args:
    folder: a checkpoint's.
    sampling: how the caller draws; the folder's fields of that are not read
      then. None: as the folder says.

  Raises:
    ValueError: a field is not known, has a wrong value or asks for what is not
      supported; the text names each.
  """
  folder = pathlib.Path(folder)
  path = folder / "config.json"
  vocab_size = read_config(folder).vocab_size
  older = text_fields(read_json(path))
  values = {key: older[key] for key in FIELDS if key in older}
  if (folder / FILE).exists():
    path = folder / FILE
    newer = read_json(path)
    values |= {k: v for k, v in newer.items() if v is not None}
  fields = Fields(values)
  fields.read |= _HARMLESS | {key for key in values if key.startswith("_")}
  stop = _stop_tokens(fields, vocab_size)
  for key, neutral in _ENDS.items():
    fields.only(key, *neutral)
  ends = len(fields.problems)
  if sampling is None:
    sampling = _sampling(fields)
    for key in sorted(set(fields.values) - fields.read):
      fields.complain(
        f"{key}={fields.values[key]!r} is not known, and it may change what is"
        " drawn"
      )
  if fields.problems:
    advice = ""
    if len(fields.problems) > ends:
      advice = "\nor give temperature, top_k or top_p of your own"
    raise ValueError(f"{path}:\n  " + "\n  ".join(fields.problems) + advice)
  return Generation(stop, sampling)


def _stop_tokens(fields: Fields, vocab_size: int) -> tuple[int, ...]:
  value = fields.get("eos_token_id", default=[])
  ids = value if isinstance(value, list) else [value]
  if not all(is_integer(i) and 0 <= i < vocab_size for i in ids):
    fields.complain(
      f"eos_token_id must be one or more ids below vocab_size={vocab_size}, got"
      f" {value!r}"
    )
    return ()
  return tuple(ids)


def _sampling(fields: Fields) -> Sampling:
  for key, neutral in _DRAWS.items():
    fields.only(key, *neutral)
  if not fields.flag("do_sample", False):
    fields.read |= {"temperature", "top_k", "top_p"}
    return GREEDY
  temperature = fields.number("temperature", default=1.0)
  top_p = fields.get("top_p")
  top_k = fields.get("top_k")
  try:
    return Sampling(
      temperature=temperature,
      # 0 takes all tokens.
      top_k=None if is_integer(top_k) and top_k == 0 else top_k,
      top_p=None if top_p == 1 else top_p,
    )
  except ValueError as error:
    fields.complain(str(error))
    return GREEDY


def read_tokenizer(folder: pathlib.Path) -> Any:
  """The folder's tokenizer.json as a `tokenizers` object.

  Raises:
    ValueError: it is missing or something else, or the package is missing.
  """
  path = folder / "tokenizer.json"
  if not path.exists():
    raise ValueError(
      f"text needs {path}, which is missing; give prompt_ids instead"
    )
  content = read_text(path)
  try:
    import tokenizers
  except ModuleNotFoundError as error:
    raise ValueError(
      f"text: {error}. It needs, in a clone: pip install '.[train]'"
    ) from None
  try:
    return tokenizers.Tokenizer.from_str(content)
  except Exception as error:  # `tokenizers` raises no narrower class.
    raise ValueError(f"{path} cannot be read: {error}") from None


def chat_prompt(folder: str | os.PathLike, message: str) -> str:
  """The prompt that a folder's chat template makes of a user's message.

  Raises:
    ValueError: the folder has no template, or the template fails.
  """
  path = pathlib.Path(folder)
  config = {}
  if (path / "tokenizer_config.json").exists():
    config = read_json(path / "tokenizer_config.json")
  template = config.get("chat_template")
  if (path / "chat_template.jinja").exists():
    template = read_text(path / "chat_template.jinja")
  if isinstance(template, list):  # several templates, by name
    named = {entry.get("name"): entry.get("template") for entry in template}
    template = named.get("default")
  if not isinstance(template, str):
    raise ValueError(
      f"chat needs a chat template in {path}: chat_template.jinja, or the field"
      " chat_template of tokenizer_config.json; give text instead"
    )
  try:
    import jinja2
    from jinja2 import ext, sandbox
  except ModuleNotFoundError as error:
    raise ValueError(
      f"chat: {error}. It needs, in a clone: pip install '.[train]'"
    ) from None

  def refuse(text: str) -> None:
    raise jinja2.TemplateError(text)

  def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
  ) -> str:
    return json.dumps(
      value,
      ensure_ascii=ensure_ascii,
      indent=indent,
      separators=separators,
      sort_keys=sort_keys,
    )

  class Marked(ext.Extension):
    """A tag around the model's own text, which the prompt does not show."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
      next(parser.stream)
      return parser.parse_statements(("name:endgeneration",), drop_needle=True)

  # As in transformers, whose templates these are.
  environment = sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=["jinja2.ext.loopcontrols", Marked],
  )
  environment.filters["tojson"] = to_json
  environment.globals |= {
    "raise_exception": refuse,
    "strftime_now": lambda form: datetime.datetime.now().strftime(form),
  }
  tokens = {
    name: token["content"] if isinstance(token, dict) else token
    for name, token in config.items()
    if name.endswith("_token") and isinstance(token, str | dict)
  }
  try:
    return environment.from_string(template).render(
      messages=[{"role": "user", "content": message}],
      add_generation_prompt=True,
      **tokens,
    )
  except Exception as error:  # A template is a program: it may raise anything.
    kind = type(error).__name__
    raise ValueError(f"the chat template of {path}: {kind}: {error}") from None
