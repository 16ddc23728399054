"""The sides of `lm73m_16k` with 13M parameters, 4,096 tokens of context and
three seeds.

The seeds show how much of a gap is the luck of one run. An MSA query attends to
512 tokens in blocks of 64, the same eighth of the context as in `lm73m_16k`.
Data (text as one stream), recipe and kernels are the same too.
"""

import dataclasses

from msa_jax.model_config import IndexConfig
from train.config import ComparisonConfig
from train.configs import lm73m_16k

GQA = dataclasses.replace(
  lm73m_16k.GQA,
  model=dataclasses.replace(
    lm73m_16k.GQA.model,
    num_layers=6,
    embed_dim=384,
    num_heads=8,
    num_kv_heads=2,
    head_dim=64,
    mlp_dim=1024,
    rope_dim=32,
  ),
  optimizer=dataclasses.replace(
    lm73m_16k.GQA.optimizer, learning_rate=2e-3, warmup_steps=40
  ),
  num_steps=800,
  batch_size=8,
  context=1 << 12,
  eval_every=80,
  eval_batches=16,
  probe_batches=4,
  final_probe_batches=64,
  layers_every=80,
  checkpoint_every=400,
  keep_steps=(680,),
)
INDEX = IndexConfig(index_dim=64, block_size=64, top_k=8)

COMPARISON = ComparisonConfig(
  name="lm13m_4k", seeds=(0, 1, 2), runs=lm73m_16k.sides(GQA, INDEX)
)
