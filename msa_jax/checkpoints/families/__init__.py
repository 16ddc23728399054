"""The families of checkpoints that can be read and written, one a file."""

from __future__ import annotations

from msa_jax.checkpoints.families.base import Family
from msa_jax.checkpoints.families.llama import Llama, Mistral
from msa_jax.checkpoints.families.m2 import M2
from msa_jax.checkpoints.families.m3 import M3
from msa_jax.checkpoints.families.own import Own
from msa_jax.checkpoints.families.qwen3 import Qwen3, Qwen3MoE

OWN = Own()
# In the order in which `save` tries them for a model that comes from no
# checkpoint. Mistral's are Llama's.
FAMILIES: tuple[Family, ...] = (
  M3(),
  M2(),
  Qwen3(),
  Qwen3MoE(),
  Llama(),
  Mistral(),
  OWN,
)
