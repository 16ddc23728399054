"""Wrong calls: each names the argument, what came and what is wanted."""

import dataclasses
import functools
import json
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import Case, random_blocks

import msa_jax

CASE = Case()
Q, K, V, INDEX_Q, INDEX_K = CASE.inputs()
BLOCKS = random_blocks(CASE)

select = functools.partial(msa_jax.select_blocks, block_size=4, top_k=3)
sparse = functools.partial(msa_jax.sparse_attention, block_size=4)
kl_loss = functools.partial(msa_jax.index_kl_loss, block_size=4)
msa = functools.partial(msa_jax.msa_attention, block_size=4, top_k=3)

INPUTS = (Q, K, V, INDEX_Q, INDEX_K)

# Two documents of 12 tokens, and a tree of the same spans.
IDS = jnp.repeat(jnp.int32([[1, 2]]), 12, axis=1)


def tree(spans, parents, **options):
  return msa_jax.tree_segments([spans], [parents], length=24, **options)


TREE = tree([(0, 12), (12, 24)], [-1, 0])


def half(x):
  return x.astype(jnp.bfloat16)


def head_loss(hidden=None, weight=None, targets=None, weights=None, **options):
  return msa_jax.head_loss(
    Q[:, :, 0] if hidden is None else hidden,
    jnp.ones((8, 5)) if weight is None else weight,
    jnp.zeros((1, 24), jnp.int32) if targets is None else targets,
    jnp.ones((1, 24)) if weights is None else weights,
    **options,
  )


WRONG = {
  "q must be an array of rank 4, [B, T, H, D], got shape (24, 4, 8)": lambda: (
    sparse(Q[0], K, V, BLOCKS)
  ),
  "index_k must be an array of rank 3": lambda: select(
    INDEX_Q, INDEX_K[:, :, None]
  ),
  "k must be an array with B = 1 (as q) in axis 0, got 2": lambda: sparse(
    Q, jnp.tile(K, (2, 1, 1, 1)), V, BLOCKS
  ),
  "hidden must be an array of rank 3, [B, T, E]": lambda: head_loss(Q[0, 0]),
  "weight must be an array of shape [E, V] = (8, any)": lambda: head_loss(
    weight=jnp.ones((7, 5))
  ),
  "targets must be an array of shape [B, T] = (1, 24)": lambda: head_loss(
    targets=jnp.zeros((2, 7), jnp.int32)
  ),
  "targets must be an array of integers, got float32": lambda: head_loss(
    targets=jnp.zeros((1, 24))
  ),
  "target_weights must be an array of shape [B, T]": lambda: head_loss(
    weights=jnp.ones((24,))
  ),
  "chunk_tokens must be an integer of at least 1, got 0": lambda: head_loss(
    chunk_tokens=0
  ),
  "v must be an array with S = 24": lambda: sparse(Q, K, V[:, :9], BLOCKS),
  "v must be an array with K = 2": lambda: sparse(Q, K, V[:, :, :1], BLOCKS),
  "k must be an array with D = 8": lambda: sparse(Q, K[..., :4], V, BLOCKS),
  "v must be an array with D = 8": lambda: sparse(Q, K, V[..., :4], BLOCKS),
  "a multiple of K = 2 heads (as k) in axis 2, got 3 in shape": lambda: sparse(
    Q[:, :, :3], K, V, BLOCKS
  ),
  "index_q must be an array with K = 2": lambda: msa(
    Q, K, V, INDEX_Q[:, :, :1], INDEX_K
  ),
  "index_q must be an array with T = 24": lambda: msa(
    Q, K, V, INDEX_Q[:, 1:], INDEX_K
  ),
  "index_k must be an array with I = 8": lambda: select(
    INDEX_Q, INDEX_K[..., :4]
  ),
  "index_k must be an array with S = 24": lambda: kl_loss(
    Q[:, 4:], K, INDEX_Q[:, 4:], INDEX_K[:, :22], None
  ),
  "k must be an array of float32, the dtype of q, got bfloat16": lambda: sparse(
    Q, half(K), V, BLOCKS
  ),
  "index_k must be an array of float32, the dtype of index_q": lambda: select(
    INDEX_Q, half(INDEX_K)
  ),
  "q must be an array of at most as many tokens as k": lambda: sparse(
    Q, K[:, :9], V[:, :9], BLOCKS
  ),
  # Heads before tokens: the text has both shapes and the order of their axes.
  "T = 4 in shape (1, 4, 24, 8), [B, T, H, D], and S = 2 in shape": lambda: (
    sparse(*(x.swapaxes(1, 2) for x in (Q, K, V)), BLOCKS)
  ),
  "index_q must be an array of at most as many tokens": lambda: select(
    INDEX_Q, INDEX_K[:, :9]
  ),
  "block_indices must be an array of shape [B, K, T, P] = (1, 2": lambda: (
    sparse(Q, K, V, BLOCKS[:, :1])
  ),
  "block_indices must be int32": lambda: sparse(
    Q, K, V, BLOCKS.astype(jnp.int16)
  ),
  "phase must be one of 'sparse', 'warmup', got 'dense'": lambda: msa(
    *INPUTS, phase="dense"
  ),
  "phase must be one of 'sparse', 'warmup', and a static argument of jax.jit": (
    lambda: jax.jit(lambda phase: msa(*INPUTS, phase=phase))(1)
  ),
  "score_precision must be one of": lambda: select(
    INDEX_Q, INDEX_K, score_precision="fp4"
  ),
  "implementation must be one of 'reference', .* got 'cuda'": (
    lambda: msa(*INPUTS, implementation="cuda")
  ),
  "top_k must be an integer of at least 1, got 0": lambda: select(
    INDEX_Q, INDEX_K, top_k=0
  ),
  "block_size must be an integer of at least 1, got 0": lambda: sparse(
    Q, K, V, BLOCKS, block_size=0
  ),
  "num_local_blocks must be an integer from 0 to top_k = 3, got 4": lambda: (
    select(INDEX_Q, INDEX_K, num_local_blocks=4)
  ),
  "kv_lengths must be an array of shape [B] = (1), got (2,)": lambda: select(
    INDEX_Q, INDEX_K, kv_lengths=jnp.zeros(2, jnp.int32)
  ),
  "query_pieces must be one or two pairs (start, length), got ((0, 24, 1),)": (
    lambda: select(INDEX_Q, INDEX_K, query_pieces=((0, 24, 1),))
  ),
  "query_pieces must be one or two pairs (start, length), got ()": (
    lambda: select(INDEX_Q, INDEX_K, query_pieces=())
  ),
  "query_pieces[0][1] must be an integer of at least 1, got 0": (
    lambda: msa(*INPUTS, query_pieces=((0, 0), (0, 24)))
  ),
  "query_pieces[1][0] must be an integer from 0 to S - length = 12, got 13": (
    lambda: msa(*INPUTS, query_pieces=((0, 12), (13, 12)))
  ),
  "query_pieces[0][0] must be an integer, or integers of shape () or [B] = (1,)"
  ", got shape (2,)": lambda: sparse(
    Q, K, V, BLOCKS, query_pieces=((jnp.zeros(2, jnp.int32), 24),)
  ),
  "query_pieces must be pairs whose lengths add up to T = 24, got 20": (
    lambda: sparse(Q, K, V, BLOCKS, query_pieces=((0, 20),))
  ),
  "kv_lengths must be None with query_pieces, got both": lambda: msa(
    *INPUTS, query_pieces=((0, 24),), kv_lengths=jnp.int32([24])
  ),
  "kv_lengths must be an array of integers, got float32": lambda: select(
    INDEX_Q, INDEX_K, kv_lengths=jnp.zeros(1)
  ),
  "q must be an array of bfloat16, float16, float32 or float64": lambda: sparse(
    Q.astype(jnp.int32), K, V, BLOCKS
  ),
  "q must be an array of shape": lambda: sparse([[1.0]], K, V, BLOCKS),
  "q must be an array without empty axes, got shape (1, 0, 4, 8)": lambda: (
    sparse(Q[:, :0], K, V, BLOCKS)
  ),
  "query_mask must be an array of shape": lambda: msa(
    *INPUTS, query_mask=jnp.ones((1, 3), bool)
  ),
  "query_mask must be an array of bool or float32, got int32": lambda: msa(
    *INPUTS, query_mask=jnp.ones((1, 24), jnp.int32)
  ),
  "segment_ids must be an array of shape [B, S] = (1, 24), got (24,)": lambda: (
    msa(*INPUTS, segment_ids=IDS[0])
  ),
  "segment_ids must be int32, got float32": lambda: select(
    INDEX_Q, INDEX_K, segment_ids=IDS.astype(jnp.float32)
  ),
  "segments must be None with segment_ids, got both": lambda: sparse(
    Q, K, V, BLOCKS, segment_ids=IDS, segments=TREE
  ),
  "segments must be None or a msa_jax.Segments .* got dict": lambda: kl_loss(
    Q, K, INDEX_Q, INDEX_K, None, segments={}
  ),
  "segments.span must be an array of shape [B, S] = (1, 9), got (1, 24)": (
    lambda: msa_jax.selection_recall(
      Q[:, :9], K[:, :9], BLOCKS[:, :, :9], segments=TREE
    )
  ),
  "max_segments must be None without segment_ids, got 3": lambda: msa(
    *INPUTS, max_segments=3
  ),
  "max_segments must be an integer of at least 1, got 0": lambda: msa(
    *INPUTS, segment_ids=IDS, max_segments=0
  ),
  "parents[0][2] must be -1 or one of [1], .* depth-first order, got 0": (
    lambda: tree([(0, 4), (4, 8), (8, 9)], [-1, -1, 0])
  ),
  "parents[0][0] must be -1 or one of [], .* got 0": lambda: tree(
    [(0, 4)], [0]
  ),
  "parents[0] must be one parent for each of the row's 2 spans, got 1": (
    lambda: tree([(0, 4), (4, 8)], [-1])
  ),
  "spans[0][1] must be integers .* with 4 <= start < end <= 24, got (3, 9)": (
    lambda: tree([(0, 4), (3, 9)], [-1, 0])
  ),
  "spans[0][0] must be integers .* with 0 <= start < end <= 24": lambda: tree(
    [(5, 5)], [-1]
  ),
  "spans[0][0] must be integers (start, end) .* got (0, 25)": (
    lambda: tree([(0, 25)], [-1])
  ),
  "max_segments must be at least 2, the spans of the fullest row, got 1": (
    lambda: tree([(0, 4), (4, 8)], [-1, -1], max_segments=1)
  ),
  "spans must be a sequence, got 4": lambda: msa_jax.tree_segments(
    4,
    [],
    length=24,
  ),
  "spans[0][0] must be a sequence, got 0": lambda: tree((0, 4), [-1, -1]),
  "spans[0][0] must be integers (start, end) .* got (0.0, 2.5)": (
    lambda: tree([(0.0, 2.5)], [-1])
  ),
  "spans[0][0] must be integers (start, end) .* got ('a', 'b')": (
    lambda: tree([("a", "b")], [-1])
  ),
  "spans[0][0] must be integers (start, end) .* got (0, 1, 2)": (
    lambda: tree([(0, 1, 2)], [-1])
  ),
  "parents[0] must be a sequence, got -1": lambda: tree([(0, 4)], -1),
  "parents[0][1] must be -1 or one of [0], .* got 0.0": lambda: tree(
    [(0, 2), (2, 4)], [-1, 0.0]
  ),
  "parents[0][1] must be -1 or one of [0], .* got False": lambda: tree(
    [(0, 2), (2, 4)], [-1, False]
  ),
  "sequences must be a sequence, got 3": lambda: msa_jax.merge_prefixes(3),
  "sequences[1] must be token ids of int32, -2147483648 to 2147483647, got": (
    lambda: msa_jax.merge_prefixes([[1], [2, 2**31]])
  ),
  "sequences[0] must be a sequence of at least one integer, .* of object": (
    lambda: msa_jax.merge_prefixes([[[1], [2, 3]]])
  ),
  "sequences must be at least one sequence, got 0": lambda: (
    msa_jax.merge_prefixes([])
  ),
  "sequences[1] must be a sequence of at least one integer": lambda: (
    msa_jax.merge_prefixes([[1], []])
  ),
  "sequences[0] must be at most length = 2 tokens, got 3": lambda: (
    msa_jax.merge_prefixes([[1, 2, 3]], length=2)
  ),
  "lse must be an array of shape": lambda: kl_loss(
    Q, K, INDEX_Q, INDEX_K, None, lse=jnp.zeros((1, 24, 4))
  ),
  "scale must be a Python number or None": lambda: sparse(
    Q, K, V, BLOCKS, scale="big"
  ),
  "index_scale must be finite": lambda: msa(*INPUTS, index_scale=np.inf),
  "lse must be an array of floating point, got int32": lambda: kl_loss(
    Q, K, INDEX_Q, INDEX_K, None, lse=jnp.zeros((1, 4, 24), jnp.int32)
  ),
  "lse must be None with detach_teacher=False": lambda: kl_loss(
    Q,
    K,
    INDEX_Q,
    INDEX_K,
    None,
    lse=jnp.zeros((1, 4, 24)),
    detach_teacher=False,
  ),
  "block_indices must be an array with P of at least 1": lambda: sparse(
    Q, K, V, BLOCKS[..., :0]
  ),
  "top_k must be an integer of at least 1, got True": lambda: select(
    INDEX_Q, INDEX_K, top_k=True
  ),
  "block_size must be an integer of at least 1, got 4.0": lambda: sparse(
    Q, K, V, BLOCKS, block_size=4.0
  ),
}


@pytest.mark.parametrize("text", WRONG)
def test_wrong_calls(text):
  before, _, after = text.partition(".*")
  with pytest.raises(ValueError) as error:
    WRONG[text]()
  assert before in str(error.value) and after in str(error.value)


@pytest.mark.parametrize(
  "row, text",
  [
    ([0, 3, -1], None),
    ([-1, -1, -1], None),
    (
      [0, 4, -1],
      r"block_indices\[1, 0, 2, 1\] must be -1 or a block id below 4",
    ),
    ([-2, -1, -1], r"\[1, 0, 2, 0\] must be -1 or a block id below 4, got -2"),
    ([1, -1, 2], r"\[1, 0, 2, 2\] must be -1 after a -1, got 2"),
    ([0, 2, 2], r"\[1, 0, 2, 2\] must be larger than the id before it, got 2"),
    (
      [2, 1, -1],
      r"\[1, 0, 2, 1\] must be larger .* in the choice \[2, 1, -1\]",
    ),
  ],
)
def test_check_block_indices_names_the_first_bad_entry(row, text):
  ids = np.tile(np.int32([0, 1, 3]), (2, 2, 3, 1))
  ids[1, 0, 2] = row
  check = functools.partial(
    msa_jax.check_block_indices, kv_len=13, block_size=4
  )
  if text is None:
    check(jnp.asarray(ids))
    return
  with pytest.raises(ValueError, match=text):
    check(jnp.asarray(ids))


class Index:
  """Takes part in `operator.index`, as integers of other libraries do."""

  def __init__(self, value):
    self.value = value

  def __index__(self):
    return self.value


@pytest.mark.parametrize("integer", [np.int64, np.uint8, jnp.int32, Index])
def test_what_operator_index_takes_is_an_integer(integer):
  """It means what the Python integer means, in operations, configs, layers and
  models, which keep Python integers."""
  options = dict(block_size=4, top_k=3, num_local_blocks=1)
  given = {name: integer(value) for name, value in options.items()}
  want = select(INDEX_Q, INDEX_K, **options)
  np.testing.assert_array_equal(select(INDEX_Q, INDEX_K, **given), want)
  index = msa_jax.IndexConfig(index_dim=integer(8), **given)
  assert index == msa_jax.IndexConfig(index_dim=8, **options)
  json.dumps(dataclasses.asdict(index))
  sizes = ("num_layers", "embed_dim", "num_heads", "num_kv_heads", "head_dim")
  changes = {name: integer(CONFIG[name]) for name in sizes}
  changes |= dict(rope_dim=integer(2), index=index)
  config = msa_jax.ModelConfig(**CONFIG | changes)
  assert config == msa_jax.ModelConfig(**CONFIG | dict(rope_dim=2, index=index))
  layer = msa_jax.MSAttention(
    integer(4), integer(8), integer(32), integer(8), integer(2), index=index,
    rope_dim=integer(4), rngs=nnx.Rngs(0),
  )  # fmt: skip
  assert layer(jnp.ones((1, 9, 8))).out.shape == (1, 9, 8)
  moe = msa_jax.mlp.MixtureOfExperts(
    integer(8), num_experts=integer(4), top_k=integer(2), expert_dim=integer(3),
    shared_dim=integer(2), rngs=nnx.Rngs(0),
  )  # fmt: skip
  assert moe(jnp.ones((1, 3, 8)))[0].shape == (1, 3, 8)


@pytest.mark.parametrize("value", [True, np.True_, 4.0, "4", None])
def test_what_is_no_integer(value):
  with pytest.raises(ValueError, match="block_size must be an integer"):
    select(INDEX_Q, INDEX_K, block_size=value)
  with pytest.raises(ValueError, match="num_heads must be an integer"):
    msa_jax.GQAttention(value, 8, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="in_features must be an integer"):
    msa_jax.GQAttention(4, value, qkv_features=8, rngs=nnx.Rngs(0))


def test_check_block_indices_of_packed_rows():
  """It names what jit cannot see, and counts the blocks of the row."""
  check = functools.partial(msa_jax.check_block_indices, BLOCKS, 24)
  last = jnp.where(BLOCKS < 0, BLOCKS, BLOCKS + 1)  # ids up to 6
  with pytest.raises(ValueError, match="a block id below 6"):
    msa_jax.check_block_indices(last, 24, block_size=4, segment_ids=IDS)
  ids = IDS.at[0, 5].set(2)  # 7 blocks, and both ids return
  with pytest.raises(
    ValueError, match=r"segment_ids\[0, 6\] must be an id that"
  ):
    check(block_size=4, segment_ids=ids)
  with pytest.raises(ValueError, match=r"max_segments must be at least 2,.* 1"):
    check(block_size=4, segment_ids=IDS, max_segments=1)
  check(block_size=4, segment_ids=IDS)
  check(block_size=4, segments=TREE)
  with pytest.raises(ValueError, match="segment_ids must be a concrete array"):
    jax.jit(lambda x: check(block_size=4, segment_ids=x))(IDS)


@pytest.mark.parametrize(
  "options", [dict(segment_ids=IDS), dict(segments=TREE)]
)
def test_what_packed_rows_do_not_go_with(options):
  name = next(iter(options))
  lengths = jnp.int32([20])
  with pytest.raises(
    NotImplementedError, match=f"{name} supports no kv_lengths"
  ):
    msa(*INPUTS, kv_lengths=lengths, **options)
  text = (
    f"{name} supports as many queries as keys, or query_pieces, got T = 20 and"
    " S = 24"
  )
  with pytest.raises(NotImplementedError, match=text):
    select(INDEX_Q[:, 4:], INDEX_K, **options)


@pytest.mark.parametrize(
  "options", [dict(segment_ids=IDS), dict(segments=TREE)]
)
def test_cudnn_means_the_kernel_in_packed_rows(no_gpu, options):
  x = jnp.ones((1, 24, 256))
  half, single = (
    msa_jax.GQAttention(
      4, 256, implementation="cudnn", dtype=dtype, rngs=nnx.Rngs(0)
    )
    for dtype in (jnp.bfloat16, jnp.float32)
  )
  (choice,) = msa_jax.explain(half, x, **options)
  assert str(choice) == "dense_attention takes mosaic_gpu"
  with pytest.raises(NotImplementedError, match="Hopper"):
    half(x, **options)
  (choice,) = msa_jax.explain(single, x, **options)
  assert choice.implementation is None and "float32" in str(choice)


def test_layers_take_one_form_of_packed_rows():
  layer = msa_jax.GQAttention(4, 8, rngs=nnx.Rngs(0))
  with pytest.raises(
    ValueError, match="segments must be None with segment_ids"
  ):
    layer(jnp.ones((1, 24, 8)), segments=TREE, segment_ids=IDS)


def test_check_block_indices_needs_values():
  ids = jnp.zeros((1, 1, 1, 1), jnp.int32)
  with pytest.raises(ValueError, match="outside jit"):
    jax.jit(lambda x: msa_jax.check_block_indices(x, 4))(ids)


def test_errors_come_before_tracing_anything():
  """A wrong call fails on shapes alone, also under jit."""
  with pytest.raises(ValueError, match="top_k"):
    jax.eval_shape(lambda *x: msa(*x, top_k=-1), *INPUTS)


@pytest.mark.parametrize("implementation", ["xla", "mosaic_gpu"])
@pytest.mark.parametrize("blocks", [None, BLOCKS], ids=["warmup", "sparse"])
def test_an_attached_teacher_needs_the_reference(blocks, implementation):
  args = (Q, K, INDEX_Q, INDEX_K, blocks)
  text = "detach_teacher=False needs implementation='reference' or None"
  with pytest.raises(NotImplementedError, match=text):
    kl_loss(*args, detach_teacher=False, implementation=implementation)

  def loss(q, k, **options):
    return kl_loss(q, k, *args[2:], **options)

  free = functools.partial(loss, detach_teacher=False)
  want = functools.partial(free, implementation="reference")
  gradients = jax.grad(free, (0, 1))(Q, K)
  chex.assert_trees_all_equal(gradients, jax.grad(want, (0, 1))(Q, K))
  assert all(np.any(gradient) for gradient in gradients)
  # Attached or not, the loss is the same; detached, q and k get no gradient.
  np.testing.assert_allclose(free(Q, K), loss(Q, K), rtol=1e-5)
  for gradient in jax.grad(loss, (0, 1))(Q, K):
    assert not np.any(gradient)


def test_the_choice_of_an_implementation_is_explained(no_gpu, caplog):
  """Nothing is run, and a named implementation says what it lacks."""
  shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in INPUTS]
  (choice,) = msa_jax.explain(msa_jax.msa_attention, *shapes, top_k=3)
  assert choice.operation == "msa_attention"
  assert choice.implementation == "xla" and list(choice.refused) == [
    "mosaic_gpu"
  ]
  assert "Hopper" in choice.refused["mosaic_gpu"]
  assert str(choice).startswith("msa_attention takes xla (mosaic_gpu: ")
  (named,) = msa_jax.explain(select, *shapes[3:], implementation="mosaic_gpu")
  assert named.implementation is None and "Hopper" in str(named)
  with pytest.raises(ValueError, match="top_k must be"):
    msa_jax.explain(select, *shapes[3:], top_k=0)
  # Also of what was traced before.
  layer = msa_jax.MSAttention(
    4, 8, num_kv_heads=2, index=msa_jax.IndexConfig(top_k=2), rngs=nnx.Rngs(0)
  )
  run = jax.jit(lambda x: layer(x, with_selection=True).out)
  x = jnp.ones((1, 9, 8))
  with caplog.at_level("INFO", logger="msa_jax"):
    msa_jax.ops._said.clear()
    run(x)
    for _ in range(2):
      assert [c.implementation for c in msa_jax.explain(run, x)] == ["xla"]
    run(jnp.ones((2, 9, 8)))
  (record,) = [r for r in caplog.records if r.name == "msa_jax"]
  assert record.levelname == "INFO"
  assert record.getMessage() == str(msa_jax.explain(run, x)[0])


def test_kernels_that_refuse_a_call_are_a_warning(pretend_hopper, caplog):
  msa_jax.ops._said.clear()
  select(INDEX_Q.astype(jnp.float32), INDEX_K)
  (record,) = [r for r in caplog.records if r.name == "msa_jax"]
  assert record.levelname == "WARNING"
  assert "select_blocks takes xla (mosaic_gpu: " in record.getMessage()


def test_a_named_implementation_never_falls_back(no_gpu):
  """On this machine the kernels cannot run, and say so."""
  calls = (
    lambda **o: select(INDEX_Q, INDEX_K, **o),
    lambda **o: sparse(Q, K, V, BLOCKS, **o),
    lambda **o: kl_loss(Q, K, INDEX_Q, INDEX_K, BLOCKS, **o),
    lambda **o: msa(*INPUTS, **o),
  )
  for call in calls:
    with pytest.raises(NotImplementedError):
      call(implementation="mosaic_gpu")
    chex.assert_trees_all_equal(call(), call(implementation="xla"))


CONFIG = dict(
  vocab_size=16,
  num_layers=2,
  embed_dim=16,
  num_heads=4,
  num_kv_heads=2,
  head_dim=4,
  mlp_dim=16,
)


@pytest.mark.parametrize(
  "change, text",
  [
    (dict(num_heads=3), "num_heads must be a multiple of num_kv_heads = 2"),
    (dict(layer_kinds=("mla",)), "layer_kinds must be 1 to num_layers = 2"),
    (dict(layer_kinds=("gqa",) * 3), "layer_kinds must be 1 to num_layers"),
    (dict(rope_dim=3), "rope_dim must be even"),
    (dict(num_layers=0), "num_layers must be an integer of at least 1, got 0"),
    (dict(dtype="int8"), "dtype must be one of"),
    (dict(implementation="cuda"), "implementation must be one of"),
    (dict(gqa_implementation="triton"), "gqa_implementation must be one of"),
    (dict(num_layers=True), "num_layers must be an integer .* got True"),
  ],
)
def test_wrong_model_configs(change, text):
  with pytest.raises(ValueError, match=text):
    msa_jax.ModelConfig(**CONFIG | change)


@pytest.mark.parametrize(
  "change, text",
  [
    (dict(top_k=0), "top_k must be an integer of at least 1, got 0"),
    (dict(index_dim=0), "index_dim must be an integer of at least 1, got 0"),
    (dict(block_size=2.5), "block_size must be an integer of at least 1"),
    (
      dict(num_local_blocks=9, top_k=4),
      "num_local_blocks must be an integer from 0 to top_k = 4, got 9",
    ),
    (
      dict(selection="all"),
      "selection must be one of 'index', 'window', 'oracle', got 'all'",
    ),
    (dict(selection="window", value_head=True), "value_head must be False"),
    (
      dict(selection="window", force_first_block=True),
      "force_first_block must be False",
    ),
    (dict(selection="window", detach_input=False), "detach_input must be True"),
    (
      dict(selection="window", detach_teacher=False),
      "detach_teacher must be True",
    ),
    (dict(force_first_block=True, top_k=1), "top_k must be greater than"),
    (dict(top_k=True), "top_k must be an integer of at least 1, got True"),
    (
      dict(num_local_blocks=True),
      "num_local_blocks must be an integer from 0 to top_k = 16, got True",
    ),
    (
      dict(score_precision="bf16"),
      "score_precision must be one of 'exact', 'fast', 'fp8', got 'bf16'",
    ),
  ],
)
def test_wrong_index_branches(change, text):
  with pytest.raises(ValueError, match=text):
    msa_jax.IndexConfig(**change)


def test_layers_take_index_options_from_the_config_alone():
  with pytest.raises(TypeError, match="block_size"):
    msa_jax.MSAttention(4, 32, block_size=8, rngs=nnx.Rngs(0))
  text = "index must be a msa_jax.IndexConfig, got {'block_size': 8}"
  with pytest.raises(ValueError, match=text):
    msa_jax.MSAttention(4, 32, index=dict(block_size=8), rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
  "change, text",
  [
    (dict(num_heads=0), "num_heads must be an integer of at least 1, got 0"),
    (dict(num_kv_heads=0), "num_kv_heads must be an integer of at least 1"),
    (dict(num_heads=3), "num_heads must be a multiple of num_kv_heads = 2"),
    (dict(rope_dim=3), "rope_dim must be even and from 0 to head_dim = 4"),
    (dict(rope_dim=6), "rope_dim must be even and from 0 to head_dim = 4"),
    (dict(rope_theta=0.0), "rope_theta must be above 0 and finite, got 0.0"),
    (dict(norm_eps=np.nan), "norm_eps must be above 0 and finite, got nan"),
  ],
)
def test_wrong_heads(change, text):
  """The config and the layer refuse the same."""
  with pytest.raises(ValueError, match=text):
    msa_jax.ModelConfig(**CONFIG | change)
  sizes = dict(num_heads=4, num_kv_heads=2, in_features=16) | change
  sizes["qkv_features"] = 4 * sizes["num_heads"] or 16
  with pytest.raises(ValueError, match=text):
    msa_jax.GQAttention(**sizes, rngs=nnx.Rngs(0))


def test_wrong_modules():
  rngs = nnx.Rngs(0)
  with pytest.raises(ValueError, match="implementation must be one of 'xla',"):
    msa_jax.GQAttention(4, 32, implementation="mosaic_gpu", rngs=rngs)
  layer = msa_jax.GQAttention(4, 32, rngs=rngs)
  for x, text in (
    (jnp.zeros((4, 32)), r"x must be an array of rank 3"),
    (jnp.zeros((2, 4, 31)), r"E = 32 \(in_features\) in axis 2, got 31"),
    (jnp.zeros((2, 4, 32), jnp.int32), r"x must be .* numbers, got int32"),
  ):
    with pytest.raises(ValueError, match=text):
      layer(x)
  with pytest.raises(ValueError, match=r"qkv_features must be .*in_features"):
    msa_jax.GQAttention(4, 30, num_kv_heads=2, rngs=rngs)
  for make in (
    functools.partial(msa_jax.MSAttention, 4, 32),
    functools.partial(msa_jax.DecoderLM, msa_jax.ModelConfig(**CONFIG)),
  ):
    with pytest.raises(ValueError, match=r"rngs must be .*Rngs\(0\), got int"):
      make(rngs=0)
  model = msa_jax.DecoderLM(msa_jax.ModelConfig(**CONFIG), rngs=rngs)
  with pytest.raises(ValueError, match="tokens must be an array of rank 2"):
    model(jnp.zeros((4,), jnp.int32))
  with pytest.raises(ValueError, match="tokens must be an array of integers"):
    model(jnp.zeros((1, 4)))
  other = msa_jax.ModelConfig(**CONFIG | dict(mlp_dim=8, layer_kinds=("msa",)))
  with pytest.raises(ValueError, match=r"config.mlp_dim must be 16"):
    msa_jax.to_msa(model, other, rngs=rngs)


@pytest.mark.parametrize(
  "what", ["partial_rope", "GQAttention", "MSAttention", "DecoderLM"]
)
@pytest.mark.parametrize(
  "positions, text",
  [
    (jnp.arange(8.0), r"an array of integers, got float32"),
    (np.arange(8.0), r"an array of integers, got float64"),
    (jnp.arange(8) > 3, r"an array of integers, got bool"),
    (list(range(8)), r"an array of shape \[T\] = \(8,\) or .*, got list"),
    (jnp.zeros((3, 8), jnp.int32), r"of shape .* \(2, 8\), got \(3, 8\)"),
  ],
  ids=["float32", "float64", "bool", "list", "shape"],
)
def test_wrong_positions(what, positions, text):
  x = jnp.zeros((2, 8, 16))
  sizes = dict(num_kv_heads=2, rngs=nnx.Rngs(0))
  calls = dict(
    partial_rope=lambda: msa_jax.partial_rope(
      x[:, :, None], positions, rope_dim=4, theta=100.0
    ),
    GQAttention=lambda: msa_jax.GQAttention(4, 16, **sizes)(
      x, positions=positions
    ),
    MSAttention=lambda: msa_jax.MSAttention(4, 16, **sizes)(
      x, positions=positions
    ),
    DecoderLM=lambda: msa_jax.DecoderLM(
      msa_jax.ModelConfig(**CONFIG), rngs=nnx.Rngs(0)
    )(x[..., 0].astype(jnp.int32), positions=positions),
  )
  with pytest.raises(ValueError, match=f"positions must be {text}"):
    calls[what]()


@pytest.mark.parametrize("selection", ["index", "window"])
@pytest.mark.parametrize(
  "query_mask, text",
  [
    (jnp.ones((2, 8), jnp.int32), "an array of bool or float32, got int32"),
    (
      jnp.ones((2, 7), bool),
      r"an array of shape \[B, T\] = \(2, 8\), got \(2, 7\)",
    ),
  ],
  ids=["dtype", "shape"],
)
def test_wrong_query_masks(selection, query_mask, text):
  """Also where no KL reads them."""
  x, rngs = jnp.zeros((2, 8, 16)), nnx.Rngs(0)
  index = msa_jax.IndexConfig(selection=selection)
  layer = msa_jax.MSAttention(4, 16, num_kv_heads=2, index=index, rngs=rngs)
  kind = "msa" if selection == "index" else "gqa"
  config = CONFIG | dict(layer_kinds=(kind,) * 2, index=index)
  model = msa_jax.DecoderLM(msa_jax.ModelConfig(**config), rngs=rngs)
  for call in (
    lambda: layer(x, query_mask=query_mask),
    lambda: model(x[..., 0].astype(jnp.int32), query_mask=query_mask),
  ):
    with pytest.raises(ValueError, match=f"query_mask must be {text}"):
      call()


def test_lengths_of_a_right_padded_batch_are_warned_of_once():
  call = functools.partial(msa, *INPUTS, implementation="reference")
  msa_jax.ops._said.clear()
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    call(kv_lengths=jnp.asarray([24]))
    jax.jit(lambda n: call(kv_lengths=n).out)(jnp.asarray([9]))
  right_padded = "right-padded training batch"
  with pytest.warns(UserWarning, match=right_padded) as caught:
    call(kv_lengths=jnp.asarray([9]))
  assert caught[0].filename == __file__  # the line of the call, and not ours
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    call(kv_lengths=jnp.asarray([9]))
