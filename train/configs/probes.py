"""Tasks that need several facts or the whole context, on two CPU cores.

The tasks are those of `train.probes`. In 1,200 steps these models learn some of
them (docs/training.md has the answers of one run). An MSA query attends to 32
of 128 tokens. Both sides see nothing but these tasks.
"""

import dataclasses

from train.config import ComparisonConfig, RecipeConfig
from train.configs import demo
from train.probes import Ids, ProbesConfig

DATA = ProbesConfig(
  num_keys=9, num_values=3, leads=(25, 50, 100), spans=(2, 4, 8), hops=(0, 1, 2)
)

GQA = dataclasses.replace(
  demo.RECALL,
  task="probes",
  model=dataclasses.replace(
    demo.RECALL.model,
    vocab_size=Ids(DATA).vocab_size,
    num_layers=3,
  ),
  data=DATA,
  num_steps=1200,
  batch_size=16,
  context=128,
  log_every=20,
  eval_every=300,
  eval_batches=2,
  probe_batches=2,
  final_probe_batches=12,
  layers_every=300,
  checkpoint_every=300,
  oracle_at_end=True,
)

INDEX = dataclasses.replace(demo.RECALL_INDEX, block_size=8)

COMPARISON = ComparisonConfig(
  name="probes",
  runs=(
    GQA,
    demo.msa(GQA, INDEX, RecipeConfig(index_warmup_steps=300)),
  ),
)
