"""MSA against GQA with 73M parameters and 16,384 tokens of context, on one
Hopper GPU with the kernels.

Its sides have 73M parameters (with the Index Branch: 75M) and read the same
batches. One dense training is the trunk, from which the others start:

- `gqa` is the trunk: dense attention in all steps. An Index Branch learns
  beside it from the KL loss and changes nothing: neither the output nor the
  gradients of the other parameters, which are clipped apart. So its loss is
  GQA's. Its step also computes the KL; `speed` times GQA's own step.
- `msa`, `msa_cpt` and `msa_middle` start from the trunk's checkpoints at 10, 85
  and 50 % of the steps, with its index and its optimizer's state, and are
  sparse at once: each query attends to 16 blocks of 128 tokens, 2,048 of
  16,384. Each is what a run of its own with as long a warm-up would be. The
  first is MSA-PT, and the second stands for MSA-CPT, which makes a trained GQA
  model sparse; here its index has learned from the beginning. Seeds 0 to 2, 4
  and 5 were trained without `msa_middle`, and seed 3 without `msa_cpt`.

MSA names the kernels (`implementation="mosaic_gpu"`), so the runs fail where
the kernels cannot run.

Text is the Python source of the installed packages (hundreds of MB beside
PyTorch and JAX), as BPE tokens. Files that are nearly copies of others are left
out, so that hardly any held-out file is one of training text. A row is a window
of all files one after another (rows="stream"), because most files are far
shorter than the context, and facts are planted across the whole of it. A model
of this size and training does not learn from text alone to retrieve over 16K
tokens, and its loss on text would hardly show it. Retrieval is therefore part
of the mix: facts are planted in the text, and some batch rows are associative
recall alone (see `train.data.MixConfig`). Held-out text has no facts in it, and
both kinds of retrieval are evaluated apart, at distances up to the whole
context.

A run reads 121M tokens, three quarters of them text, which is some 305 MB: each
of 240 MB 1.3 times. More text takes longer to prepare than it is worth: that of
120 MB took 32 s, and all 358 MB took 257 s (16 cores, 2026-11-29).

One command trains a seed, its trunk first. A kill loses the steps since the
last checkpoint (at most 920), and the same command goes on. Compiled programs
are kept for the next command:

  export JAX_COMPILATION_CACHE_DIR=runs/.compiled
  export XLA_PYTHON_CLIENT_MEM_FRACTION=0.92
  python -m train compare lm73m_16k --seeds 0 --no-report
  python -m train compare lm73m_16k --seeds 1 --sides gqa msa msa_cpt \
    --no-report
  # and so on; then, of one folder or of several,
  python -m train report runs/lm73m_16k
  python -m train.report.thin runs/lm73m_16k kept/lm73m_16k

On one H200 with nothing beside it, seed 6 with all four sides took 27.4 minutes
(2026-12-01):

| seconds | training steps | evaluation, checkpoints | all |
|---|---|---|---|
| text, and compiling for all sides beside it | | | 114 |
| start | | | 34 |
| trunk: 3,680 steps of 203 ms | 747 | 42 | 789 |
| `msa`: 3,312 steps of 100 ms | 330 | 52 | 382 |
| `msa_cpt`: 552 steps | 54 | 40 | 94 |
| `msa_middle`: 1,840 steps | 182 | 46 | 228 |

Most of what is evaluated is so after the last step: 32 batches of text and 96
of each kind of retrieval, with the model's own blocks, with the oracle's, and
with dense attention. Seeds 0 to 2 were trained before the oracle's blocks were
evaluated. Seeds may differ in that.

The text has to be prepared once on a machine, in 60 to 83 seconds. This run on
little text has the same model and batches, so it can compile the programs
meanwhile:

  python -m train compare lm73m_16k --seeds 6 --folder runs/compiled_first \
    --minutes 0.01 --no-report --set data.text.max_bytes=4000000 eval_batches=1

The first command below tries everything at full size in 20 steps. `--plan` fits
the number of steps to another budget, with step times measured on the device.
`--minutes` stops a command after this time, and the same command continues it:

  python -m train compare lm73m_16k --folder runs/try --unit 1 --seeds 0 --set \
    log_every=1 eval_every=20 layers_every=20 eval_batches=2 \
    final_probe_batches=4
  python -m train compare lm73m_16k --seeds 0 --plan 20 --minutes 8.9 \
    --no-report
  # until it says no more that it is not finished:
  python -m train compare --config runs/lm73m_16k/comparison.json --minutes 8.9
  python -m train speed lm73m_16k

`lm13m_4k` and `lm13m_4k_ablations` are run the same way. Their seeds may share
a GPU, in one process for each seed (`--seeds`), if the runs' own times are not
used; `speed` measures times.

Each run's selection.npz holds the blocks that the model chose. The benchmarks
can be run with choices of the same statistics:

  python -m benchmarks.fit runs/lm73m_16k/mix/msa/seed0
  python -m benchmarks --selection trained_like fitted

A tiny and short version runs in minutes on a CPU. It must ask for the portable
implementation:

  python -m train compare lm73m_16k --folder runs/try --unit 1 --seeds 0 --set \
    model.implementation=xla model.gqa_implementation=xla model.dtype=float32 \
    model.num_layers=2 model.embed_dim=64 model.num_heads=4 model.head_dim=16 \
    model.rope_dim=16 model.index.index_dim=16 model.index.block_size=16 \
    context=1024 eval_batches=4 probe_batches=2 \
    final_probe_batches=8 data.text.max_bytes=4000000
"""

import dataclasses

from msa_jax.model_config import IndexConfig, ModelConfig
from train.config import (
  ComparisonConfig,
  OptimizerConfig,
  RecipeConfig,
  RunConfig,
)
from train.configs import demo
from train.data import MixConfig, RecallConfig, TextConfig

# There are 32 keys and 4 values, and each pair of them is one token, so that
# one layer of attention can answer. A fact of two tokens takes an induction
# circuit. A run this short may or may not learn one, and the gap between the
# sides would depend on when it does.
#
# Recall is learnt sooner the more often a batch row states each pair. A tiny
# GQA model (2 layers of width 64, recall alone) answered 75 % after 1,800 batch
# rows of 512 tokens with 64 keys and 8 values, after 1,000 with 64 and 4, and
# after 800 with 16 and 8. Fewer facts than keys made it slower. In the mix
# (width 96, 400 steps of 4 batch rows, chance 25 %) it ended with 28 % of
# needles and of recall right for asks=4 and answer_share=0.2, with 30 and 32 %
# for asks=1 and answer_share=0.4, and with 52 and 55 % for 4 and 0.4. Measured
# on two CPU cores, 2026-11-24, with one seed. This comparison has 7,360 batch
# rows.
#
# Of the packages of a CPU's environment (120 MB), files of whose runs of five
# words more than 80 % also occur in training text were 5.9 % of the held-out
# text. They were 2.1 % without near-duplicates from 0.8 on (1.6 % of the bytes
# go), and 0.18 % from 0.5 on (3.5 %) and from 0.4 on (4.2 %). Measured on two
# CPU cores, 2026-11-29.
DATA = MixConfig(
  text=TextConfig(
    installed=True,
    near_duplicates=0.5,
    max_bytes=240_000_000,
    tokenizer="bpe",
    vocab_size=8192,
    rows="stream",
  ),
  recall=RecallConfig(num_keys=32, num_values=4, num_facts=32),
  num_needles=32,
  asks=4,
  answer_share=0.4,
)

GQA = RunConfig(
  task="mix",
  side="gqa",
  model=ModelConfig(
    vocab_size=8448,  # 8,192 + 166 for retrieval, rounded up to tiles
    num_layers=8,
    embed_dim=768,
    num_heads=16,
    num_kv_heads=2,
    head_dim=128,
    mlp_dim=2048,
    rope_dim=64,
    rope_theta=100_000.0,
    dtype="bfloat16",
    implementation="mosaic_gpu",
    gqa_implementation="cudnn",
  ),
  data=DATA,
  # The index factor was chosen with tiny runs of recall alone (as in
  # `lm13m_4k.sides`, learning rate 5e-3, 8 blocks): `msa` answered 90, 96, 96,
  # 99 and 97 % right with factors of 1, 2, 4, 8 and 16 (seed 0; over seeds 0 to
  # 2 97.6 % with 2 and 98.8 % with 8). A width 12 times as large needs an index
  # rate below the best one there, 4e-2. Warm-ups of 10 and 30 % were no better.
  # Measured on two CPU cores, 2026-11-24. At full size, one run each with
  # factors of 2 and 4 showed no difference beyond that of GQA's own two runs,
  # which found 100 and 95 % of the needles.
  optimizer=OptimizerConfig(
    learning_rate=1e-3, warmup_steps=184, index_learning_rate_factor=4.0
  ),
  num_steps=3680,
  batch_size=2,
  context=1 << 14,
  log_every=10,
  eval_every=368,
  eval_batches=32,
  probe_batches=4,
  final_probe_batches=96,
  eval_window=2048,  # as many tokens as a sparse query reads
  oracle_at_end=True,
  layers_every=368,
  checkpoint_every=920,
  keep_checkpoints=1,
)
INDEX = IndexConfig(index_dim=128, block_size=128, top_k=16)


# The trunk. Its steps are GQA's, and its index learns beside them.
TRUNK = dataclasses.replace(
  demo.msa(
    GQA, INDEX, RecipeConfig(index_warmup_steps=GQA.num_steps), side="gqa"
  ),
  # 10, 50 and 85 % of the steps.
  keep_steps=(368, 1840, 3128),
)


def _branch(side: str, start: int) -> RunConfig:
  """A side that starts from the trunk's step `start`, and is sparse at once."""
  recipe = RecipeConfig(
    init_from=TRUNK.side, init_step=start, index_init="trained"
  )
  return dataclasses.replace(TRUNK, side=side, recipe=recipe, keep_steps=())


EARLY, MIDDLE, LATE = TRUNK.keep_steps
COMPARISON = ComparisonConfig(
  name="lm73m_16k",
  seeds=(0, 1, 2, 3, 4, 5, 6),
  runs=(
    TRUNK,
    _branch("msa", EARLY),
    _branch("msa_cpt", LATE),
    _branch("msa_middle", MIDDLE),
  ),
  aimed_interval=0.5,
)
