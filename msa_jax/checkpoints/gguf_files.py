"""Turns a GGUF file of a Llama model into a checkpoint folder.

The tensors are dequantised by the package gguf. GGUF files hold the rows of the
query and key projections in another order: the two dims that a rotation turns
are neighbours in them, and half a head apart in the folder.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from msa_jax.checkpoints import tensor_files
from msa_jax.checkpoints.families.llama import Llama
from msa_jax.checkpoints.tensor_files import some
from msa_jax.model_config import ModelConfig

_NAMES = {
  "attn_norm": "input_layernorm",
  "attn_q": "self_attn.q_proj",
  "attn_k": "self_attn.k_proj",
  "attn_v": "self_attn.v_proj",
  "attn_output": "self_attn.o_proj",
  "ffn_norm": "post_attention_layernorm",
  "ffn_gate": "mlp.gate_proj",
  "ffn_up": "mlp.up_proj",
  "ffn_down": "mlp.down_proj",
}
_OUTER = {
  "token_embd.weight": "model.embed_tokens.weight",
  "output_norm.weight": "model.norm.weight",
  "output.weight": "lm_head.weight",
}
# Values of tokenizer.ggml.pre whose splitting into words `_tokenizer` repeats.
_PRE = ("smollm",)
# The type of control tokens in tokenizer.ggml.token_type.
_CONTROL = 3


def from_gguf(path: str | os.PathLike, folder: str | os.PathLike) -> None:
  """Writes a GGUF file's model as a folder that `load` reads.

  The weights are dequantised to float32. The folder gets the tokenizer, the
  chat template and the end tokens too. Needs the packages gguf and tokenizers
  (in a clone: `pip install '.[pretrained]'`).

  Args:
    path: file of a Llama model without rope scaling, with a tokenizer of
      SmolLM's kind.
    folder: folder to write, empty or missing.

  Raises:
    ValueError: the file is something else, the folder is not empty, or a
      package is missing.
  """
  try:
    import gguf  # pyright: ignore[reportMissingImports]
    import tokenizers  # noqa: F401  (before anything is written)
  except ModuleNotFoundError as error:
    raise ValueError(
      f"GGUF: {error}. It needs, in a clone: pip install '.[pretrained]'"
    ) from None
  path, folder = pathlib.Path(path), pathlib.Path(folder)
  tensor_files.check_free(folder)
  try:
    reader = gguf.GGUFReader(path)
  except (OSError, ValueError, IndexError) as error:
    raise ValueError(f"{path} is no GGUF file: {error}") from None
  fields: dict[str, Any] = {
    name: field.contents() for name, field in reader.fields.items()
  }
  tensors = {tensor.name: tensor for tensor in reader.tensors}
  names, problems = _names(tensors), []
  config = _config(fields, "output.weight" not in tensors, problems)
  unknown = sorted(set(tensors) - set(names))
  if unknown:
    problems.append(f"tensors that are not known: {some(unknown)}")
  if fields.get("tokenizer.ggml.model") != "gpt2" or (
    fields.get("tokenizer.ggml.pre") not in _PRE
  ):
    problems.append(
      f"tokenizer.ggml.model={fields.get('tokenizer.ggml.model')!r} with"
      f" tokenizer.ggml.pre={fields.get('tokenizer.ggml.pre')!r}: wanted 'gpt2'"
      f" with one of {_PRE}"
    )
  if problems or config is None:
    raise ValueError(f"{path}:\n  " + "\n  ".join(problems))
  heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}
  sources = {theirs: ours for ours, theirs in names.items()}

  def fetch(name: str) -> np.ndarray:
    tensor = tensors[sources[name]]
    value = gguf.dequantize(tensor.data, tensor.tensor_type)
    value = np.asarray(value, np.float32)
    count = heads.get(sources[name].split(".")[-2])
    return value if count is None else _halves(value, count)

  # GGUF gives the axes of a tensor in the reverse order.
  shapes = {
    name: (np.dtype(np.float32), tuple(map(int, tensors[ours].shape[::-1])))
    for name, ours in sources.items()
  }
  tensor_files.write(
    folder,
    shapes,
    fetch,
    documents=_documents(config, fields),
    max_file_bytes=5 * 10**9,
  )


def _names(tensors: Mapping[str, Any]) -> dict[str, str]:
  """The names that the folder gives to the tensors of the file."""
  names = {}
  for name in tensors:
    if name in _OUTER:
      names[name] = _OUTER[name]
    match name.split("."):
      case ["blk", layer, part, "weight"] if part in _NAMES:
        names[name] = f"model.layers.{layer}.{_NAMES[part]}.weight"
  return names


def _halves(rows: np.ndarray, heads: int) -> np.ndarray:
  """Rows of a projection, in the order of halves instead of pairs."""
  pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
  return pairs.swapaxes(1, 2).reshape(rows.shape)


def _config(
  fields: Mapping[str, Any], tied: bool, problems: list[str]
) -> ModelConfig | None:
  """The model that the file's metadata describe; lists what is wrong."""
  kind = fields.get("general.architecture")
  if kind != "llama":
    problems.append(f"general.architecture={kind!r}: wanted 'llama'")
    return None
  own = {
    name.removeprefix("llama."): value
    for name, value in fields.items()
    if name.startswith("llama.")
  }
  try:
    heads, width = own.pop("attention.head_count"), own.pop("embedding_length")
    head_dim = own.pop("attention.key_length", width // heads)
    if own.pop("attention.value_length", head_dim) != head_dim:
      problems.append("llama.attention.value_length: wanted that of keys")
    if own.pop("rope.dimension_count", head_dim) != head_dim:
      problems.append(f"llama.rope.dimension_count: wanted {head_dim}")
    own.pop("context_length")
    config = ModelConfig(
      vocab_size=own.pop("vocab_size"),
      num_layers=own.pop("block_count"),
      embed_dim=width,
      num_heads=heads,
      num_kv_heads=own.pop("attention.head_count_kv", heads),
      head_dim=head_dim,
      mlp_dim=own.pop("feed_forward_length"),
      rope_theta=float(own.pop("rope.freq_base", 10_000.0)),
      qk_norm=False,
      # Stored as float32: 1e-5 comes back as 9.99999975e-06.
      norm_eps=float(
        np.format_float_positional(
          np.float32(own.pop("attention.layer_norm_rms_epsilon")), unique=True
        )
      ),
      tie_embeddings=tied,
    )
  except (KeyError, ValueError, TypeError, ZeroDivisionError) as error:
    problems.append(f"the metadata describe no Llama model: {error}")
    return None
  problems += [
    f"llama.{name}={value!r}: not known" for name, value in own.items()
  ]
  return config


def _documents(
  config: ModelConfig, fields: Mapping[str, Any]
) -> dict[str, Any]:
  """The folder's JSON files."""
  end = fields.get("tokenizer.ggml.eos_token_id")
  start = fields.get("tokenizer.ggml.bos_token_id")
  pad = fields.get("tokenizer.ggml.padding_token_id")
  names = fields["tokenizer.ggml.tokens"]
  context = fields["llama.context_length"]
  ids = {"bos_token_id": start, "eos_token_id": end, "pad_token_id": pad}
  tokenizer = {
    "add_prefix_space": False,
    "chat_template": fields.get("tokenizer.chat_template"),
    "clean_up_tokenization_spaces": False,
    "model_max_length": context,
    "tokenizer_class": "PreTrainedTokenizerFast",
    **{
      name.removesuffix("_id"): None if i is None else names[i]
      for name, i in ids.items()
    },
  }
  present = {name: i for name, i in ids.items() if i is not None}
  return {
    "config.json": {
      **Llama().describe(config),
      **present,
      "max_position_embeddings": context,
      "torch_dtype": "float32",
    },
    "generation_config.json": present,
    "tokenizer.json": json.loads(_tokenizer(fields)),
    "tokenizer_config.json": {
      name: value for name, value in tokenizer.items() if value is not None
    },
  }


def _tokenizer(fields: Mapping[str, Any]) -> str:
  """The JSON text of a `tokenizers` object with the file's ids.

  A digit is a word of its own; the rest is byte-level BPE of words as GPT-2's.
  """
  import tokenizers
  from tokenizers import decoders, models, pre_tokenizers

  names = fields["tokenizer.ggml.tokens"]
  merges = [
    (left, right)
    for left, right in (m.split(" ") for m in fields["tokenizer.ggml.merges"])
  ]
  tokenizer = tokenizers.Tokenizer(
    models.BPE({name: i for i, name in enumerate(names)}, merges)
  )
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Digits(individual_digits=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
  )
  tokenizer.decoder = decoders.ByteLevel()
  types = fields["tokenizer.ggml.token_type"]
  tokenizer.add_special_tokens(
    [
      tokenizers.AddedToken(name, special=True, normalized=False)
      for name, kind in zip(names, types, strict=True)
      if kind == _CONTROL
    ]
  )
  return tokenizer.to_str()
