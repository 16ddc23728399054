"""The paper's ablations at the size of `lm13m_4k`, with the kernels.

Each side differs from `msa` in what its name says, and attends to as many keys.
Text is the stream of `lm13m_4k` (rows="stream"). Four sides of `ablations` are
left out: `teacher_not_detached`, which computes the KL densely, in more memory
than one GPU has; `block_32`, which the kernels do not take; and
`first_block_forced` and `lm_trained_index`, to save time. `index_rate_1` is
here alone: its index learns at the backbone's rate, and `msa`'s at four times
that. What else of the recipe counts (the index's start, a frozen backbone,
longer warm-ups) `lm13m_4k_index` shows, for MSA CPT.

Three processes share a GPU. Each trains all seeds of some sides, so that every
program is compiled once:

  export JAX_COMPILATION_CACHE_DIR=runs/.compiled
  export XLA_PYTHON_CLIENT_MEM_FRACTION=0.28
  train="python -m train compare lm13m_4k_ablations --no-report --sides"
  $train gqa msa index_rate_1 &
  $train no_warmup input_not_detached own_block_not_forced &
  $train fixed_window index_value_head block_128 &
  wait
  python -m train report runs/lm13m_4k_ablations

On one H200 two seeds of six sides, four runs a process, took 6.4 minutes
(2026-11-30, 48b0e26), with the text ready and all programs compiled. So these
45 runs take some 25 minutes (computed).

`gqa` and `msa` are the runs of `lm13m_4k`. Where they are there and have read
the same text (`sha256` and what was left out, in environment.json: packages of
other versions are other text, and `report` refuses to mix them), they need not
be trained again. A folder with the seeds that are wanted of them is merged:

  from=train/results/lm13m_4k/mix to=runs/lm13m_4k_base/mix
  mkdir -p $to/gqa $to/msa
  cp $from/environment.json $to
  for side in gqa msa; do cp -r $from/$side/seed[0-4] $to/$side; done
  python -m train report runs/lm13m_4k_ablations runs/lm13m_4k_base \
    --out runs/lm13m_4k_ablations

The difference between two trainings of one seed had a standard deviation of
0.55 % in `lm13m_4k`, with which the 95 % interval of five seeds is ± 0.7 %:
effects on the loss that are smaller do not show here. The report shows each
result beside the paper's.
"""

import dataclasses

from train.config import ComparisonConfig
from train.configs import ablations, recall_index
from train.configs.lm13m_4k import GQA, INDEX

LEFT_OUT = (
  "teacher_not_detached",
  "block_32",
  "first_block_forced",
  "lm_trained_index",
)

_SIDES = ablations.sides(dataclasses.replace(GQA, keep_steps=()), INDEX)
_RUNS = (GQA, *(run for run in _SIDES[1:] if run.side not in LEFT_OUT))
(_MSA,) = (run for run in _RUNS if run.side == "msa")

COMPARISON = ComparisonConfig(
  name="lm13m_4k_ablations",
  seeds=(0, 1, 2, 3, 4),
  runs=(*_RUNS, recall_index.changed(_MSA, "index_rate_1", rate=1.0)),
)
