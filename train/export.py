"""Exports a run folder's model as a checkpoint that other programs read.

python -m train export runs/demo/text/msa/seed0 exported
"""

import json
import pathlib
from typing import Any

from msa_jax import checkpoints
from train.sample import load_config, load_model, load_tokenizer


def export(
  folder: pathlib.Path, out: pathlib.Path, step: int | None = None
) -> int:
  """Writes a run's model, tokenizer and generation config into a folder.

  `msa_jax.checkpoints.save` says which family the model becomes one of.

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
  model, found = load_model(folder, step)
  fields: dict[str, Any] = {"max_position_embeddings": config.context}
  documents: dict[str, Any] = {}
  if tokenizer is not None:
    end = int(tokenizer.end_of_text)
    fields["eos_token_id"] = end
    documents = {
      "generation_config.json": {"eos_token_id": end},
      "tokenizer.json": json.loads(tokenizer.saved()),
      "tokenizer_config.json": {
        "clean_up_tokenization_spaces": False,
        "eos_token": tokenizer.end_name,
        "model_max_length": config.context,
        "tokenizer_class": "PreTrainedTokenizerFast",
      },
    }
  checkpoints.save(model, out, fields=fields, documents=documents)
  return found
