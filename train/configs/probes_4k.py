"""The tasks of `train.probes` with the models of `lm13m_4k`, on a Hopper GPU.

The sides of `lm13m_4k` (GQA, MSA, and MSA CPT with the wider index heads; an
MSA query attends to 512 of 4,096 tokens) read nothing but these tasks. They
train models of their own, because those of `lm13m_4k` have never seen the
tasks' tokens, and so could but guess; its mix of text and retrieval stays what
it was. Final weights are evaluated with the oracle's blocks as well.

In this form the preset has not run on a GPU. With one task a training row,
16 keys and up to 3 hops it ran on an H200 (2026-11-30, commit acbb426, seeds
0-2), and all three sides did little but guess: 26-27 % of multi_query were
right, 25-29 % of multi_value, 26-41 % of common_words, 5-7 % of copy and
22-25 % of variable_tracking (chance 25 %, copy 3 %), and held-out loss fell
from 3.0 to 2.88. A step's 32,768 tokens had 44 answers, at distances of up to
thousands of tokens. GQA alone took 0.024 s a step, and one seed of all sides
540 s with three seeds on the GPU; packed rows take other kernels, which were
not timed.

Training rows now hold tasks of 128 to 4,096 tokens, about ten a row, which make
550 answers a step. Tiny GQA models learned so on a CPU what they did not from
one task a row. They followed one link between 6 variables, as here, but in as
many steps not between 8 or more, nor two (numbers and commands:
docs/training.md, "Tasks of several lengths"). Copying was slow there: alone,
91 % of spans of up to 8 of 32 symbols were right after 28,800 rows of 128
tokens, and this preset has some 67,000 copying tasks.

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
DATA = ProbesConfig(
  num_values=3,
  num_symbols=32,
  lengths=(128, 256, 512, 1024, 2048, 4096),
  hops=(0, 1),
  asks=6,
)

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
