"""Reads config.json so that no field is silently ignored.

Every family reads its fields through `Fields`. A field that nobody has read and
that is not listed in `HARMLESS` is an error, because it may change what the
model computes.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from msa_jax.checkpoints.tensor_files import foreign_content
from msa_jax.checks import is_integer
from msa_jax.layers import RopeScaling

# Fields that do not change the logits of a text model: names, token ids,
# options of training and of transformers' generation and bookkeeping.
_HARMLESS = """
architectures attention_dropout auto_map bad_words_ids begin_suppress_tokens
bos_token_id chunk_size_feed_forward cross_attention_hidden_size
decoder_start_token_id diversity_penalty do_sample dtype early_stopping
encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty
finetuning_task forced_bos_token_id forced_eos_token_id id2label
initializer_range is_llama_config label2id length_penalty max_length
max_model_len max_position_embeddings min_length model_type
mtp_transformer_layers no_repeat_ngram_size num_beam_groups num_beams num_labels
num_mtp_modules num_nextn_predict_layers num_return_sequences output_attentions
output_hidden_states output_router_logits output_scores pad_token_id prefix
pretraining_tp problem_type pruned_heads remove_invalid_values
repetition_penalty return_dict return_dict_in_generate router_aux_loss_coef
router_jitter_noise sep_token_id suppress_tokens task_specific_params
temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p
torch_dtype torchscript transformers.js_config transformers_version typical_p
unsloth_fixed unsloth_version use_bfloat16 use_cache use_mtp
"""
HARMLESS = frozenset(_HARMLESS.split())
UNKNOWN = (
  "{} has no such field that is known here, and it may change what the model"
  " computes"
)


def read_text(path: pathlib.Path) -> str:
  """The text of a file of a checkpoint folder.

  Raises:
    ValueError: the file is missing or is no text, or an HTML page or a pointer
      of Git LFS stands in its place.
  """
  try:
    raw = path.read_bytes()
    foreign = foreign_content(raw)
    if foreign:
      raise ValueError(foreign)
    return raw.decode("utf-8-sig")
  except (OSError, ValueError) as error:
    raise ValueError(f"{path} cannot be read: {error}") from None


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """The object of a JSON file.

  Raises:
    ValueError: the file is missing or holds no JSON object.
  """
  try:
    whole = json.loads(read_text(path))
  except json.JSONDecodeError as error:
    raise ValueError(f"{path} cannot be read: {error}") from None
  if not isinstance(whole, dict):
    raise ValueError(f"{path}: wanted a JSON object, got {whole!r}")
  return whole


class Fields:
  """The fields of a config, or of an object inside it.

  Attributes:
    present: the names of all fields.
    values: those fields that are not null; null counts as missing.
    problems: what is wrong with them, as text; shared with the objects inside.
    read: the names of the fields that were asked for.
  """

  def __init__(
    self,
    values: Mapping[str, Any],
    where: str = "",
    problems: list[str] | None = None,
  ):
    self.present = frozenset(values)
    self.values = {k: v for k, v in values.items() if v is not None}
    self.problems: list[str] = [] if problems is None else problems
    self.read: set[str] = set()
    self._where = where
    self._parts: dict[str, Fields] = {}

  def name(self, key: str) -> str:
    return f"{self._where}{key}"

  def complain(self, text: str) -> None:
    self.problems.append(text)

  def part(self, key: str) -> Fields:
    """The fields of an object inside the config; empty if it is missing."""
    if key not in self._parts:
      value = self.get(key)
      if value is not None and not isinstance(value, Mapping):
        self.complain(f"{self.name(key)} must be an object, got {value!r}")
        value = None
      name = f"{self.name(key)}."
      self._parts[key] = Fields(value or {}, name, self.problems)
    return self._parts[key]

  def one(self, values: Mapping[str, Any], default: Any = None) -> Any:
    """The one value that several fields hold; a problem if they disagree."""
    there = {key: v for key, v in values.items() if v is not None}
    first = next(iter(there.values()), default)
    if any(value != first for value in there.values()):
      text = ", ".join(f"{key}={value!r}" for key, value in there.items())
      self.complain(f"fields disagree: {text}")
    return first

  def get(self, *keys: str, default: Any = None) -> Any:
    """The value of a field that may have several names."""
    self.read |= set(keys)
    return self.one({self.name(k): self.values.get(k) for k in keys}, default)

  def size(self, *keys: str, default: int | None = None) -> int:
    """A field that must be an integer of at least 1; 1 if it is wrong."""
    value = self.get(*keys, default=default)
    name = " or ".join(map(self.name, keys))
    if value is None:
      self.complain(f"field missing: {name}")
      return 1
    if not is_integer(value) or value < 1:
      self.complain(f"{name} must be an integer of at least 1, got {value!r}")
      return 1
    return value

  def number(self, *keys: str, default: float | None = None) -> float:
    """A field that must be a number above 0; 1 if it is wrong."""
    value = self.get(*keys, default=default)
    name = " or ".join(map(self.name, keys))
    if value is None:
      self.complain(f"field missing: {name}")
      return 1.0
    if not _is_number(value) or not value > 0:
      self.complain(f"{name} must be a number above 0, got {value!r}")
      return 1.0
    return float(value)

  def flag(self, key: str, default: bool) -> bool:
    value = self.get(key, default=default)
    if not isinstance(value, bool):
      self.complain(f"{self.name(key)} must be true or false, got {value!r}")
      return default
    return value

  def only(self, key: str, *allowed: Any) -> None:
    """A field that may be missing, and whose other values are refused."""
    value = self.get(key)
    same = (type(value) is type(a) and value == a for a in allowed)
    if value is not None and not any(same):
      wanted = " or ".join(map(repr, allowed)) or "null"
      self.complain(
        f"{self.name(key)}={value!r} is not supported: only {wanted}"
      )

  def flags(self, key: str, count: int) -> list[bool] | None:
    """A field that holds 0 or 1 for each layer; None if it is missing."""
    value = self.get(key)
    if value is None:
      return None
    good = isinstance(value, Sequence) and all(v in (0, 1) for v in value)
    if not good or isinstance(value, str):
      self.complain(f"{self.name(key)} must be a list of 0 and 1, got {value}")
      return None
    if len(value) != count:
      self.complain(
        f"{self.name(key)} has {len(value)} entries, num_hidden_layers={count}"
      )
      return None
    return [bool(v) for v in value]

  def kinds(
    self, key: str, names: Mapping[str, str], count: int
  ) -> list[str] | None:
    """A field that names the kind of each layer; None if it is missing."""
    value = self.get(key)
    if value is None:
      return None
    if not isinstance(value, Sequence) or isinstance(value, str):
      self.complain(f"{self.name(key)} must be a list, got {value!r}")
      return None
    unknown = sorted({str(name) for name in value} - set(names))
    if unknown:
      wanted = sorted(names)
      self.complain(f"{self.name(key)}: unknown {unknown}, wanted {wanted}")
      return None
    if len(value) != count:
      self.complain(
        f"{self.name(key)} has {len(value)} entries, num_hidden_layers={count}"
      )
      return None
    return [names[name] for name in value]

  def finish(self, title: str) -> None:
    """Lists every field that nobody has read and that may matter."""
    for fields in (self, *self._parts.values()):
      for key in sorted(set(fields.values) - fields.read):
        nested = fields is not self
        if not nested and (key in HARMLESS or key.startswith("_")):
          continue
        value = _short(fields.values[key])
        self.complain(f"{fields.name(key)}={value}: {UNKNOWN.format(title)}")


def _is_number(value: Any) -> bool:
  return is_integer(value) or isinstance(value, float)


def _short(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 60 else f"{text[:57]}..."


def read_rope(
  fields: Fields,
  head_dim: int,
  *,
  default_theta: float | None,
  partial: bool,
  scaling: bool,
) -> dict[str, Any]:
  """The fields of `ModelConfig` that describe the rotary embedding.

  transformers writes rope_parameters, older programs rope_theta and
  rope_scaling; all that are there must agree.

  Args:
    fields: of the model.
    head_dim: size of a head.
    default_theta: rope_theta if no field says it; None: it must be there.
    partial: whether some dims of a head may stay as they are. One of
      rotary_dim and partial_rotary_factor must then say how many.
    scaling: whether rope_type "llama3" is supported.
  """
  parts = [fields.part("rope_parameters"), fields.part("rope_scaling")]
  for part in parts:
    nested = [k for k, v in part.values.items() if isinstance(v, Mapping)]
    if nested:
      fields.complain(
        f"{part.name('')[:-1]} is nested by layer type ({nested}): only one"
        " rotary embedding for all layers is supported"
      )
      part.read |= set(part.values)
      fields.read |= {"rope_theta", "partial_rotary_factor", "rotary_dim"}
      return {}

  def everywhere(*keys: str, top: bool) -> Any:
    owners = [fields, *parts] if top else parts
    there = {}
    for owner in owners:
      for key in keys:
        owner.read.add(key)
        there[owner.name(key)] = owner.values.get(key)
    return fields.one(there)

  def number(value: Any, name: str) -> float | None:
    if value is None:
      return None
    if not _is_number(value) or not value > 0:
      fields.complain(f"{name} must be a number above 0, got {value!r}")
      return None
    return float(value)

  theta = everywhere("rope_theta", top=True)
  if theta is None and default_theta is None:
    fields.complain("field missing: rope_theta")
  theta = number(theta, "rope_theta") or default_theta or 1.0
  factor = everywhere("partial_rotary_factor", top=True)
  factor = number(factor, "partial_rotary_factor")
  rotary = fields.get("rotary_dim")
  # As transformers does it.
  by_factor = None if factor is None else int(head_dim * factor)
  if rotary is not None and not is_integer(rotary):
    fields.complain(f"rotary_dim must be an integer, got {rotary!r}")
    rotary = None
  if None not in (rotary, by_factor) and rotary != by_factor:
    fields.complain(
      f"fields disagree: rotary_dim={rotary}, but partial_rotary_factor="
      f"{factor} of head_dim={head_dim} is {by_factor}"
    )
  rope_dim = next((x for x in (rotary, by_factor) if x is not None), None)
  if rope_dim is None:
    if partial:
      fields.complain("field missing: rotary_dim or partial_rotary_factor")
    rope_dim = head_dim
  if not partial and rope_dim != head_dim:
    fields.complain(
      f"{rope_dim} of head_dim={head_dim} dims rotate, which is not supported"
      " for this family: only all of them"
    )
  kind = everywhere("rope_type", "type", top=False) or "default"
  known = ("default", "llama3") if scaling else ("default",)
  if kind not in known:
    wanted = " or ".join(map(repr, known))
    fields.complain(f"rope_type={kind!r} is not supported: only {wanted}")
    for part in parts:
      part.read |= set(part.values)
  options: dict[str, Any] = {"rope_theta": theta, "rope_dim": rope_dim}
  if kind == "llama3" and scaling:
    names = {
      "factor": "factor",
      "low_freq_factor": "low_frequency_factor",
      "high_freq_factor": "high_frequency_factor",
      "original_max_position_embeddings": "context",
    }
    found = {}
    for key, name in names.items():
      value = everywhere(key, top=False)
      if value is None:
        fields.complain(f"field missing: {key} of rope_type 'llama3'")
      elif number(value, key) is not None:
        found[name] = value
    if len(found) == len(names):
      try:
        options["rope_scaling"] = RopeScaling(**found)
      except ValueError as error:
        fields.complain(f"rope_type 'llama3': {error}")
  return options


def describe_rope(
  theta: float, factor: float, scaling: RopeScaling | None
) -> dict[str, Any]:
  """transformers' rope_parameters of a rotary embedding."""
  described: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
  if factor != 1:
    described["partial_rotary_factor"] = factor
  if scaling is not None:
    described |= {
      "rope_type": "llama3",
      "factor": scaling.factor,
      "low_freq_factor": scaling.low_frequency_factor,
      "high_freq_factor": scaling.high_frequency_factor,
      "original_max_position_embeddings": scaling.context,
    }
  return described
