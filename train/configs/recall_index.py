"""What lets the index find far facts: `demo`'s recall task, one change a side.

`msa` has index heads of D = 16 dims that rotate as the main heads do (half of
them). Of the other sides, `index_rope_*` rotates fewer dims of the index heads,
`index_dim_*` has larger index heads, and the rest changes the recipe. All sides
read as many keys and see the same facts, in fewer steps than `demo` takes, so
that there is something to tell apart. 27 runs take about an hour on two CPU
cores.
"""

import dataclasses
import functools

from msa_jax.model_config import IndexConfig
from train.config import ComparisonConfig, RecipeConfig, RunConfig
from train.configs import demo, parity

GQA = dataclasses.replace(parity.RECALL, keep_steps=())
INDEX = dataclasses.replace(demo.RECALL_INDEX, index_dim=16, rope_dim=None)
RECIPE = RecipeConfig(index_warmup_steps=100)
INDEX_RATE = 8.0


def changed(
  run: RunConfig, side: str, rate: float = INDEX_RATE, **changes
) -> RunConfig:
  """An MSA run as another side, with other fields of its index, its recipe or
  both, and the index's factor of the learning rate."""
  fields = {field.name for field in dataclasses.fields(IndexConfig)}
  index = {name: changes[name] for name in changes if name in fields}
  recipe = {name: changes[name] for name in changes if name not in fields}
  return dataclasses.replace(
    run,
    side=side,
    model=dataclasses.replace(
      run.model, index=dataclasses.replace(run.model.index, **index)
    ),
    recipe=dataclasses.replace(run.recipe, **recipe),
    optimizer=dataclasses.replace(
      run.optimizer, index_learning_rate_factor=rate
    ),
  )


_side = functools.partial(changed, demo.msa(GQA, INDEX, RECIPE))

COMPARISON = ComparisonConfig(
  name="recall_index",
  seeds=(0, 1, 2),
  runs=(
    GQA,
    _side("msa"),
    _side("index_rope_0", rope_dim=0),
    _side("index_rope_4", rope_dim=4),
    _side("index_dim_32", index_dim=32),
    _side("index_dim_32_rope_0", index_dim=32, rope_dim=0),
    _side("index_rate_2", rate=2.0),
    _side("warmup_200", index_warmup_steps=200),
    _side("kl_weight_4", kl_weight=4.0),
  ),
)
