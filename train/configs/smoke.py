"""The smallest comparison. It shows that everything runs, and nothing else.

Rows of text hold whole files, packed (rows="files").
"""

import dataclasses

from msa_jax.model_config import IndexConfig, ModelConfig
from train.config import (
  ComparisonConfig,
  OptimizerConfig,
  RecipeConfig,
  RunConfig,
)
from train.data import RecallConfig, TextConfig

_RECALL = RecallConfig(num_keys=8, num_values=4, num_fillers=4, num_facts=8)
_GQA = RunConfig(
  task="text",
  side="gqa",
  model=ModelConfig(
    vocab_size=256,
    num_layers=2,
    embed_dim=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=64,
    implementation="xla",
  ),
  data=TextConfig(max_bytes=200_000, rows="files"),
  optimizer=OptimizerConfig(warmup_steps=5),
  num_steps=20,
  batch_size=4,
  context=128,
  log_every=5,
  eval_every=10,
  eval_batches=2,
  layers_every=10,
  checkpoint_every=10,
)
_MSA_MODEL = dataclasses.replace(
  _GQA.model,
  layer_kinds=("msa",),
  index=IndexConfig(index_dim=8, block_size=16, top_k=2),
)
_MSA = dataclasses.replace(
  _GQA,
  side="msa",
  model=_MSA_MODEL,
  recipe=RecipeConfig(index_warmup_steps=10),
)

COMPARISON = ComparisonConfig(
  name="smoke",
  runs=(
    _GQA,
    _MSA,
    *(
      dataclasses.replace(run, task="recall", data=_RECALL)
      for run in (_GQA, _MSA)
    ),
  ),
)
