"""The paper's ablations at the size of `evidence_seeds`, with the kernels.

Each side differs from `msa` in what its name says, at an equal number of keys.
The kernels take blocks of 64 and 128: `block_32` names "xla" and is the only
side that does, so its speed says nothing. `teacher_not_detached` is left out:
it computes the KL densely, in more memory than one GPU has. The report sets
what the paper saw beside what came out.
"""

import dataclasses

from train.config import ComparisonConfig
from train.configs import ablations
from train.configs.evidence_seeds import GQA, INDEX

_SIDES = tuple(
  run
  if run.side != "block_32"
  else dataclasses.replace(
    run, model=dataclasses.replace(run.model, implementation="xla")
  )
  for run in ablations.sides(dataclasses.replace(GQA, keep_steps=()), INDEX)
  if run.side != "teacher_not_detached"
)

COMPARISON = ComparisonConfig(
  name="evidence_ablations", seeds=(0, 1), runs=_SIDES
)
