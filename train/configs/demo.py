"""GQA against MSA in minutes on two CPU cores.

There are two tasks. `text` is a byte-level model of Python source with a
context of 1,024 bytes, of which an MSA query attends to 256. `recall` asks for
facts up to the whole context of 256 tokens away, of which an MSA query attends
to 64; most facts lie outside its own block of 16.

A row of text is a window of all files one after another (rows="stream"), so
that attention can use its whole context.

With one seed the comparison shows that MSA trains and how close it comes, not
which side is better. `parity` is for that.
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

TEXT = RunConfig(
  task="text",
  side="gqa",
  model=ModelConfig(
    vocab_size=256,
    num_layers=2,
    embed_dim=128,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    mlp_dim=384,
    rope_dim=16,
    implementation="xla",
  ),
  data=TextConfig(rows="stream"),
  optimizer=OptimizerConfig(
    learning_rate=4e-3, warmup_steps=20, index_learning_rate_factor=2.0
  ),
  num_steps=120,
  batch_size=4,
  context=1024,
  log_every=10,
  eval_every=40,
  eval_batches=8,
  layers_every=40,
  checkpoint_every=60,
)
TEXT_INDEX = IndexConfig(index_dim=32, block_size=64, top_k=4)

RECALL = dataclasses.replace(
  TEXT,
  task="recall",
  model=ModelConfig(
    vocab_size=298,
    num_layers=2,
    embed_dim=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    mlp_dim=128,
    rope_dim=8,
    implementation="xla",
  ),
  data=RecallConfig(),
  optimizer=OptimizerConfig(
    learning_rate=5e-3,
    warmup_steps=20,
    beta2=0.98,
    index_learning_rate_factor=8.0,
  ),
  num_steps=400,
  batch_size=16,
  context=256,
  eval_every=100,
  layers_every=100,
  checkpoint_every=100,
)
# `recall_index` shows what these choices do: an index head of twice D that does
# not rotate can tell apart what is far away, and learns fast enough.
RECALL_INDEX = IndexConfig(index_dim=32, rope_dim=0, block_size=16, top_k=4)


def msa(
  gqa: RunConfig, index: IndexConfig, recipe: RecipeConfig, side: str = "msa"
) -> RunConfig:
  """The MSA side of a GQA run, which differs in attention and recipe only."""
  model = dataclasses.replace(gqa.model, layer_kinds=("msa",), index=index)
  return dataclasses.replace(gqa, side=side, model=model, recipe=recipe)


COMPARISON = ComparisonConfig(
  name="demo",
  runs=(
    TEXT,
    msa(TEXT, TEXT_INDEX, RecipeConfig(index_warmup_steps=40)),
    RECALL,
    msa(RECALL, RECALL_INDEX, RecipeConfig(index_warmup_steps=100)),
  ),
)
