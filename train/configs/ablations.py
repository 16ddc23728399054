"""The paper's ablations: each side changes one thing about the method.

`msa` is the method, and the other sides change what their name says. All sides
attend to the same number of keys (block_size * top_k). Text is `demo`'s stream
(rows="stream").
"""

import dataclasses

from msa_jax.model_config import IndexConfig
from train.config import ComparisonConfig, RecipeConfig, RunConfig
from train.configs import demo, parity


def sides(gqa: RunConfig, index: IndexConfig) -> tuple[RunConfig, ...]:
  """GQA, the method as `msa`, and every ablation of it."""
  recipe = RecipeConfig(index_warmup_steps=gqa.num_steps // 5)
  keys = index.block_size * index.top_k

  def blocks(size: int) -> IndexConfig:
    return dataclasses.replace(index, block_size=size, top_k=keys // size)

  value_head = dataclasses.replace(index, value_head=True)
  changes = {
    "input_not_detached": dict(detach_input=False),
    "teacher_not_detached": dict(detach_teacher=False),
    "own_block_not_forced": dict(num_local_blocks=0),
    "first_block_forced": dict(force_first_block=True),
    "fixed_window": dict(selection="window", rope_dim=None),
  }
  changed = {
    "msa": (index, recipe),
    "no_warmup": (index, RecipeConfig()),
    **{
      name: (dataclasses.replace(index, **change), recipe)
      for name, change in changes.items()
    },
    f"block_{index.block_size // 2}": (blocks(index.block_size // 2), recipe),
    f"block_{index.block_size * 2}": (blocks(index.block_size * 2), recipe),
    "index_value_head": (value_head, recipe),
    # Without the KL loss the index learns from the LM loss alone, which reaches
    # it through its value head.
    "lm_trained_index": (
      value_head,
      dataclasses.replace(recipe, kl_weight=0.0),
    ),
  }
  return (
    gqa,
    *(
      _side(gqa, index, recipe, name)
      for name, (index, recipe) in changed.items()
    ),
  )


def _side(
  gqa: RunConfig, index: IndexConfig, recipe: RecipeConfig, name: str
) -> RunConfig:
  run = demo.msa(gqa, index, recipe, side=name)
  if index.detach_teacher:
    return run
  # Only the reference lets the KL's gradient reach the teacher.
  model = dataclasses.replace(run.model, implementation="reference")
  return dataclasses.replace(run, model=model)


COMPARISON = ComparisonConfig(
  name="ablations",
  runs=(
    *sides(parity.TEXT, demo.TEXT_INDEX),
    *sides(parity.RECALL, demo.RECALL_INDEX),
  ),
)
