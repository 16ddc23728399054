"""Checkpoints of MiniMax-M3, MiniMax-M2, Qwen3, Llama and Mistral.

python -m msa_jax.checkpoints show FOLDER
python -m msa_jax.checkpoints sample FOLDER --text "The weather"
"""

from msa_jax.checkpoints.folders import (
  ParameterCounts,
  count_parameters,
  load,
  read_config,
  save,
)
from msa_jax.checkpoints.gguf_files import from_gguf

__all__ = [
  "ParameterCounts",
  "count_parameters",
  "from_gguf",
  "load",
  "read_config",
  "save",
]
