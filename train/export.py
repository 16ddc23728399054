"""Exports a run folder's model as a checkpoint that other programs read.

python -m train export runs/demo/text/msa/seed0 exported
"""

import json
import pathlib
from typing import Any

from msa_jax import checkpoints
from msa_jax.checkpoints import generation
from msa_jax.checkpoints.fields import read_json
from train import pretrained
from train.sample import load_config, load_model, load_tokenizer


def export(
  folder: pathlib.Path, out: pathlib.Path, step: int | None = None
) -> int:
  """Writes a run's model, tokenizer and generation config into a folder.

  `msa_jax.checkpoints.save` says which family the model becomes one of. A run
  that starts from a trained model (`recipe.pretrained`) with that model's
  tokenizer keeps its generation config, chat template and special tokens; the
  token that ended each document of the training ends a text too.

  Args:
    folder: the run's folder.
    out: folder to write, empty or missing.
    step: of the checkpoint; None: the latest.

  Returns:
    The checkpoint's step.

  Raises:
    ValueError: there is no such run or checkpoint, `out` is not empty, or the
      run's tokenizer.json is missing.
  """
  config = load_config(folder)
  tokenizer = load_tokenizer(folder, config)
  kept = folder / pretrained.FILE
  origin = read_json(kept) if kept.exists() else {"fields": {}, "documents": {}}
  model, found = load_model(folder, step)
  fields: dict[str, Any] = origin["fields"]
  documents: dict[str, Any] = origin["documents"]
  context = max(config.context, fields.get("max_position_embeddings") or 0)
  fields["max_position_embeddings"] = context
  if tokenizer is not None:
    end = int(tokenizer.end_of_text)
    written = documents.setdefault(generation.FILE, {})
    stop = written.get("eos_token_id", fields.get("eos_token_id"))
    written["eos_token_id"] = fields["eos_token_id"] = _with_end(stop, end)
    documents["tokenizer.json"] = json.loads(tokenizer.saved())
    documents.setdefault(
      "tokenizer_config.json",
      {
        "clean_up_tokenization_spaces": False,
        "eos_token": tokenizer.end_name,
        "model_max_length": context,
        "tokenizer_class": "PreTrainedTokenizerFast",
      },
    )
  checkpoints.save(model, out, fields=fields, documents=documents)
  return found


def _with_end(stop: Any, end: int) -> Any:
  """eos_token_id with the token that ended each document of the training."""
  tokens = [] if stop is None else stop if isinstance(stop, list) else [stop]
  if end in tokens:
    return stop
  return [*tokens, end] if tokens else end
