"""What lets MSA CPT's index find far facts, one change a side, at 13M.

The runs are those of `lm13m_4k`: GQA, and `cpt`, which starts from GQA's
checkpoint at 85 % of the steps with index heads of D = 64 dims, half of them
rotated, that are copies of the main branch's projections. The other sides
change what their names say, start from the same checkpoint and read the same
batches (text is one stream, rows="stream"):

- `rope_0`: the index heads do not rotate. `rope_8`: 8 of their dims do.
  `dim_128`: they have twice D dims. `dim_128_rope_0`: twice D dims, and none of
  them rotates.
- `random`: the index starts from random values, as in the paper.
- `frozen`: the warm-up trains the index alone. `warmup_80`: it takes twice as
  many steps, of equally many in all. `rate_32`: the index learns at four times
  the rate. `kl_weight_4`: the KL counts four times.

The sides of a seed need GQA's run alone, so they can be trained by several
processes that share a GPU, GQA's first:

  python -m train compare lm13m_4k_index --sides gqa --no-report
  python -m train compare lm13m_4k_index --sides cpt rope_0 --no-report
  python -m train compare lm13m_4k_index --sides dim_128 frozen --no-report
  # and so on
  python -m train report runs/lm13m_4k_index
"""

import dataclasses
import functools

from train.config import ComparisonConfig
from train.configs import lm13m_4k, recall_index

GQA, _, CPT = lm13m_4k.sides(
  dataclasses.replace(lm13m_4k.GQA, eval_window=None, oracle_at_end=True),
  lm13m_4k.INDEX,
)
_side = functools.partial(recall_index.changed, CPT)

COMPARISON = ComparisonConfig(
  name="lm13m_4k_index",
  seeds=(0, 1, 2),
  runs=(
    GQA,
    _side("cpt"),
    _side("rope_0", rope_dim=0),
    _side("rope_8", rope_dim=8),
    _side("dim_128", index_dim=128),
    _side("dim_128_rope_0", index_dim=128, rope_dim=0),
    _side("random", index_init="random"),
    _side("frozen", freeze_backbone=True),
    _side("warmup_80", index_warmup_steps=80),
    _side("rate_32", rate=32.0),
    _side("kl_weight_4", kl_weight=4.0),
  ),
)
