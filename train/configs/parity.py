"""The models and data of `demo`, with three seeds, longer runs and three sides.

`msa` is MSA-PT, which trains from scratch and begins with a warm-up. `msa_cpt`
is MSA-CPT, which starts from the GQA run's checkpoint at half of the steps. It
takes minutes on a GPU, and half an hour or more on two CPU cores.
Text is `demo`'s stream (rows="stream"), which keeps dependence over the whole
context.
"""

import dataclasses

from msa_jax.model_config import IndexConfig
from train.config import ComparisonConfig, RecipeConfig, RunConfig
from train.configs import demo

SEEDS = (0, 1, 2)


def _longer(run: RunConfig, num_steps: int) -> RunConfig:
  return dataclasses.replace(
    run,
    num_steps=num_steps,
    eval_batches=12,
    eval_every=num_steps // 5,
    layers_every=num_steps // 5,
    checkpoint_every=num_steps // 2,
    keep_steps=(num_steps // 2,),
  )


TEXT = _longer(demo.TEXT, 200)
RECALL = _longer(demo.RECALL, 300)


def _sides(gqa: RunConfig, index: IndexConfig) -> tuple[RunConfig, ...]:
  warmup = gqa.num_steps // 5
  return (
    gqa,
    demo.msa(gqa, index, RecipeConfig(index_warmup_steps=warmup)),
    demo.msa(
      gqa,
      index,
      RecipeConfig(
        index_warmup_steps=warmup,
        init_from="gqa",
        init_step=gqa.num_steps // 2,
      ),
      side="msa_cpt",
    ),
  )


COMPARISON = ComparisonConfig(
  name="parity",
  seeds=SEEDS,
  runs=(
    *_sides(TEXT, demo.TEXT_INDEX),
    *_sides(RECALL, demo.RECALL_INDEX),
  ),
)
