"""The tasks of `train.probes` with the models of `lm13m_4k`, on a Hopper GPU.

The sides of `lm13m_4k` (GQA, MSA, and MSA CPT with the wider index heads; an
MSA query attends to 512 of 4,096 tokens) read nothing but these tasks. They
train models of their own, because those of `lm13m_4k` have never seen the
tasks' tokens, and so could but guess; its mix of text and retrieval stays what
it was. Final weights are evaluated with the oracle's blocks as well.

The number of steps is a guess from tiny models: the preset has not been run on
a GPU. These (`probes`, 57,600 rows in 3,600 steps, GQA) learned facts, sums and
counts (99 % right and more), and not to follow a link (34 % of one hop right,
chance 33 %), also not with links alone and 28,800 rows. Of spans of up to 8 of
16 symbols they copied 32 %; with copying alone and 32 symbols 91 % after 28,800
rows.

Seeds can share a GPU, after those of `lm13m_4k` or beside them. One that ends
with no time left is continued by the same command:

  export JAX_COMPILATION_CACHE_DIR=runs/.compiled
  for seed in 0 1 2; do
    python -m train compare probes_4k --seeds $seed --minutes 9 --no-report &
  done; wait
  python -m train report runs/probes_4k
"""

import dataclasses

from train.config import ComparisonConfig
from train.configs import lm13m_4k
from train.probes import ProbesConfig

# A symbol is about once in a row's spans: the last one tells what comes next.
DATA = ProbesConfig(num_symbols=32)

GQA = dataclasses.replace(
  lm13m_4k.GQA,
  task="probes",
  model=dataclasses.replace(lm13m_4k.GQA.model, vocab_size=384),
  data=DATA,
  num_steps=4000,
  eval_every=400,
  eval_batches=2,
  probe_batches=4,
  final_probe_batches=32,
  eval_window=None,
  layers_every=400,
  checkpoint_every=2000,
  keep_steps=(3400,),
  oracle_at_end=True,
)

COMPARISON = ComparisonConfig(
  name="probes_4k",
  seeds=(0, 1, 2),
  runs=lm13m_4k.sides(GQA, lm13m_4k.INDEX, lm13m_4k.CPT_INDEX),
)
