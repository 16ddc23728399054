"""The tasks of `train.probes` with the models of `lm13m_4k`, on a Hopper GPU.

The sides of `lm13m_4k` (GQA, MSA, MSA CPT; an MSA query attends to 512 of 4,096
tokens) read nothing but these tasks. They are apart from `lm13m_4k`, whose mix
of text and retrieval stays what it was. Final weights are evaluated with the
oracle's blocks as well.

The number of steps is a first guess: the preset has not been run on a GPU.
`--plan MINUTES` fits it to a budget.
"""

import dataclasses

from train.config import ComparisonConfig
from train.configs import lm13m_4k
from train.probes import ProbesConfig

DATA = ProbesConfig()

GQA = dataclasses.replace(
  lm13m_4k.GQA,
  task="probes",
  model=dataclasses.replace(lm13m_4k.GQA.model, vocab_size=384),
  data=DATA,
  num_steps=2000,
  eval_every=200,
  eval_batches=2,
  probe_batches=4,
  final_probe_batches=32,
  layers_every=200,
  checkpoint_every=1000,
  keep_steps=(1700,),
  oracle_at_end=True,
)

COMPARISON = ComparisonConfig(
  name="probes_4k", runs=lm13m_4k.sides(GQA, lm13m_4k.INDEX)
)
