"""The paper's ablations at the size of `evidence_seeds`, with the kernels.

Each side differs from `msa` in what its name says, at an equal number of keys.
`gqa` and `msa` are runs of `evidence_seeds`: copied from there, they are not
trained again.

  mkdir -p runs/evidence_ablations/mix
  cp -r runs/evidence_seeds/mix/gqa runs/evidence_seeds/mix/msa \
    runs/evidence_ablations/mix
  rm -r runs/evidence_ablations/mix/*/seed2
  python -m train compare evidence_ablations

The kernels take blocks of 64 and 128: `block_32` names "xla" and is the only
side that does, so its speed says nothing. `teacher_not_detached` is left out:
it computes the KL densely, in more memory than one GPU has. So are
`first_block_forced` and `lm_trained_index`, to save time: `ablations` has them.
The report sets what the paper saw beside what came out.
"""

import dataclasses

from train.config import ComparisonConfig, RunConfig
from train.configs import ablations
from train.configs.evidence_seeds import GQA, INDEX

LEFT_OUT = ("teacher_not_detached", "first_block_forced", "lm_trained_index")


def _side(run: RunConfig) -> RunConfig:
  if run.side == "gqa":
    return GQA
  if run.side == "block_32":
    model = dataclasses.replace(run.model, implementation="xla")
    return dataclasses.replace(run, model=model)
  return run


COMPARISON = ComparisonConfig(
  name="evidence_ablations",
  seeds=(0, 1),
  runs=tuple(
    _side(run)
    for run in ablations.sides(dataclasses.replace(GQA, keep_steps=()), INDEX)
    if run.side not in LEFT_OUT
  ),
)
