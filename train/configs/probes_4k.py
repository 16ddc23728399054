"""The tasks of `train.probes` with the models of `lm13m_4k`, on a Hopper GPU.

The sides of `lm13m_4k` (GQA, MSA, and MSA CPT with the wider index heads; an
MSA query attends to 512 of 4,096 tokens) read nothing but these tasks. They
train models of their own, because those of `lm13m_4k` have never seen the
tasks' tokens, and so could but guess; its mix of text and retrieval stays what
it was. Final weights are evaluated with the oracle's blocks as well.

Seeds 0 to 2 have run to their end (2026-11-30, commit ffbf282;
docs/results.md, "Harder probes"). All sides learned everything but copying,
which they do learn if they are trained on it alone (`--folder runs/copy_4k
--set 'data.tasks=["copy"]'`; seeds 0 to 5, six minutes for three that shared an
H200).
Training rows hold tasks of 128 to 4,096 tokens, because from one task a row no
side learned anything (docs/training.md, "Tasks of several lengths").

Spans are short because those of 16 are hard for another reason than their
distance: of 32 symbols, the one that was copied last stands in 63 % of such
rows a second time, so it does not tell what comes next; with spans of 8 in
38 %. Copied right by a tiny GQA model after 900 steps, with spans of 4, 8 and
16: 13 %, and of 2, 4 and 8: 84 % (docs/training.md has the command).

Seeds can share a GPU. By these commands the three took eight minutes together,
on an H200 that ran other programs too:

  export JAX_COMPILATION_CACHE_DIR=runs/.compiled
  for seed in 0 1 2; do
    python -m train compare probes_4k --seeds $seed --no-report &
  done; wait
  python -m train report runs/probes_4k
"""

import dataclasses

from train.config import ComparisonConfig
from train.configs import lm13m_4k
from train.probes import ProbesConfig

# A symbol is rarely twice in a row's spans: the last one tells what comes next.
DATA = ProbesConfig(
  num_values=3,
  num_symbols=32,
  spans=(2, 4, 8),
  lengths=(128, 256, 512, 1024, 2048, 4096),
  hops=(0, 1),
  asks=6,
)

GQA = dataclasses.replace(
  lm13m_4k.GQA,
  task="probes",
  model=dataclasses.replace(lm13m_4k.GQA.model, vocab_size=384),
  data=DATA,
  num_steps=2000,
  eval_every=500,
  eval_batches=2,
  probe_batches=4,
  final_probe_batches=24,
  eval_window=None,
  layers_every=500,
  checkpoint_every=1000,
  keep_steps=(1700,),
  oracle_at_end=True,
)

COMPARISON = ComparisonConfig(
  name="probes_4k",
  seeds=(0, 1, 2),
  runs=lm13m_4k.sides(GQA, lm13m_4k.INDEX, lm13m_4k.CPT_INDEX),
)
