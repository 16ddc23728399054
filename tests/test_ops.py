"""The operations against loops, finite differences and another program."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import CASES, Case, loop_msa, loop_select, patterns, random_blocks
from jax.test_util import check_grads

import msa_jax
from msa_jax import reference, xla

DENSE_AND_SPARSE = ("reference", "xla")
SLOW = pytest.mark.slow


def msa(case, implementation, **options):
  return functools.partial(
    msa_jax.msa_attention,
    **case.select_options(),
    implementation=implementation,
    **options,
  )


def assert_close(got, want, tolerance):
  np.testing.assert_array_equal(np.isneginf(got), np.isneginf(want))
  np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("implementation", DENSE_AND_SPARSE)
@pytest.mark.parametrize("name", CASES)
def test_selection_equals_loops(name, implementation):
  case = CASES[name]
  index_q, index_k = case.inputs()[3:]
  got = msa_jax.select_blocks(
    index_q, index_k, **case.select_options(), implementation=implementation
  )
  np.testing.assert_array_equal(got, loop_select(case, index_q, index_k))


@pytest.mark.parametrize(
  "name, phase",
  [
    # Ragged rows and those of lengths have the sizes of even ones, and others.
    *(
      pytest.param("even", phase, marks=SLOW) for phase in ("sparse", "warmup")
    ),
    *((name, "sparse") for name in ("ragged", "one_block", "unforced")),
    *(("lengths", phase) for phase in ("sparse", "warmup")),
    # One block is fewer than P, too, and rows of lengths have T < S.
    pytest.param("few_blocks", "sparse", marks=SLOW),
    pytest.param("cached", "sparse", marks=SLOW),
    pytest.param("cached", "warmup", marks=SLOW),
  ],
)
def test_outputs_and_gradients_equal_loops(name, phase, x64):
  """Both implementations in float64: out, lse, KL and every gradient."""
  case = CASES[name]
  inputs = case.inputs(dtype=jnp.float64)
  d_out = jax.random.normal(jax.random.key(7), inputs[0].shape, jnp.float64)
  mask = jax.random.bernoulli(jax.random.key(8), 0.7, inputs[0].shape[:2])
  for implementation in DENSE_AND_SPARSE:

    @jax.jit
    def run(inputs, implementation=implementation):
      def loss(inputs):
        result = msa(
          case, implementation, phase=phase, with_kl=True, query_mask=mask
        )(*inputs)
        return jnp.sum(result.out * d_out) + result.kl, result

      return jax.grad(loss, has_aux=True)(inputs)

    grads, result = run(inputs)
    blocks = None if phase == "warmup" else result.block_indices
    out, lse, kl, main, index = loop_msa(case, *inputs, blocks, d_out, mask)
    assert_close(result.out, out, 1e-11)
    assert_close(result.lse, lse, 1e-11)
    assert_close(result.kl, kl, 1e-11)
    for got, want in zip(grads, (*main, *index)):
      assert_close(got, want, 1e-10)


# Loops say that both implementations have the same gradients.
@pytest.mark.parametrize(
  "implementation", [pytest.param("reference", marks=SLOW), "xla"]
)
@pytest.mark.parametrize("phase", ["sparse", "warmup"])
def test_gradients_equal_finite_differences(phase, implementation, x64):
  case = Case(
    batch=2, q_len=7, kv_len=9, num_heads=4, head_dim=3, index_dim=3, top_k=2
  )
  q, k, v, index_q, index_k = case.inputs(dtype=jnp.float64)
  blocks = random_blocks(case) if phase == "sparse" else None
  options = dict(block_size=case.block_size, implementation=implementation)

  def attend(q, k, v):
    if phase == "sparse":
      return msa_jax.sparse_attention(q, k, v, blocks, **options)
    return msa(case, implementation, phase=phase)(q, k, v, index_q, index_k).out

  def kl(index_q, index_k):
    return msa_jax.index_kl_loss(q, k, index_q, index_k, blocks, **options)

  check_grads(jax.jit(attend), (q, k, v), order=1, modes=["rev"])
  check_grads(jax.jit(kl), (index_q, index_k), order=1, modes=["rev"])


@pytest.mark.parametrize("implementation", DENSE_AND_SPARSE)
@pytest.mark.parametrize("name", ["even", "lengths"])
def test_caller_made_choices(name, implementation):
  """Every pattern gives the loops' values and gradients, and no NaN."""
  case = CASES[name]
  inputs = case.inputs()
  d_out = jax.random.normal(jax.random.key(7), inputs[0].shape)

  @jax.jit
  def run(inputs, blocks):
    def loss(inputs):
      q, k, v, index_q, index_k = inputs
      options = dict(
        block_size=case.block_size,
        kv_lengths=case.lengths,
        implementation=implementation,
      )
      out, lse = msa_jax.sparse_attention(
        q, k, v, blocks, return_lse=True, **options
      )
      kl = msa_jax.index_kl_loss(q, k, index_q, index_k, blocks, **options)
      return jnp.sum(out * d_out) + kl, (out, lse, kl)

    return jax.grad(loss, has_aux=True)(inputs)

  for pattern, blocks in patterns(case).items():
    grads, (out, lse, kl) = run(inputs, blocks)
    want = loop_msa(case, *inputs, blocks, d_out)
    for got, expected in zip(
      (out, lse, kl, *grads), (*want[:3], *want[3], *want[4])
    ):
      np.testing.assert_array_equal(np.isneginf(got), np.isneginf(expected))
      np.testing.assert_allclose(
        got, expected, rtol=2e-5, atol=2e-5, err_msg=pattern
      )


@pytest.mark.parametrize(
  "dtype", [jnp.bfloat16, pytest.param(jnp.float16, marks=SLOW)]
)
def test_low_precision_stays_near_the_yardstick(dtype):
  """xla in half precision errs no more than rounded probabilities do.

  Truth is the reference in float32 on the rounded inputs; the yardstick rounds
  p and dS to the working dtype, as xla does, and its error in `out` is one half
  unit in the last place of values of size 1.
  """
  case = Case(q_len=64, kv_len=64, block_size=8, top_k=4, head_dim=16)
  inputs = case.inputs(dtype=dtype)
  exact = tuple(x.astype(jnp.float32) for x in inputs)
  d_out = jax.random.normal(jax.random.key(7), inputs[0].shape, dtype)
  blocks = random_blocks(case)

  def run(inputs, implementation):
    def loss(q, k, v):
      out = msa_jax.sparse_attention(
        q,
        k,
        v,
        blocks,
        block_size=case.block_size,
        implementation=implementation,
      )
      return jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32)), out

    def kl(index_q, index_k):
      return msa_jax.index_kl_loss(
        *inputs[:2],
        index_q,
        index_k,
        blocks,
        block_size=case.block_size,
        implementation=implementation,
      )

    grad = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
    (_, out), grads = grad(*inputs[:3])
    kl_grad = jax.jit(jax.value_and_grad(kl, (0, 1)))
    return jax.tree.leaves((out, grads, kl_grad(*inputs[3:])))

  unit = float(jnp.finfo(dtype).eps)
  for got, want in zip(run(inputs, "xla"), run(exact, "reference")):
    error = np.asarray(got, np.float32) - np.asarray(want)
    assert np.sqrt(np.mean(error**2) / np.mean(np.square(want))) < unit
  index_q, index_k = inputs[3:]
  select = functools.partial(msa_jax.select_blocks, **case.select_options())
  np.testing.assert_array_equal(
    select(index_q, index_k, implementation="xla"),
    select(*exact[3:], implementation="reference"),
  )


def test_chunks_change_nothing(patched_programs):
  """Many chunks give what one chunk gives, backward included.

  They run inside of a `jax.shard_map` with check_vma=True, whose loops want
  their sums to vary over the mesh's axes as what is added.
  """
  case = CASES["ragged"]
  inputs = case.inputs()

  def run(phase, inputs):
    def loss(inputs):
      result = msa(case, "xla", phase=phase, with_kl=True)(*inputs)
      recall = msa_jax.selection_recall(
        *inputs[:2], result.block_indices, block_size=case.block_size
      )
      return jnp.sum(jnp.sin(result.out)) + result.kl, (result, recall)

    return jax.value_and_grad(loss, has_aux=True)(inputs)

  def one_device(phase):
    mesh = jax.make_mesh((1,), ("rows",))
    spec = jax.P("rows")

    def local(inputs):
      total, grads = run(phase, inputs)
      # Scalars get the axis along which they vary.
      return jax.tree.map(lambda x: x if x.ndim else x[None], (total, grads))

    return jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec)

  whole = {
    phase: jax.jit(functools.partial(run, phase))(inputs)
    for phase in ("sparse", "warmup")
  }
  patched_programs.setattr(xla, "_chunk_elements", lambda: 700)
  patched_programs.setattr(xla, "_TILE_ROWS", 2)
  # Once for both phases: to free all programs of a worker takes seconds.
  jax.clear_caches()
  k_blocks = jnp.zeros((4, 8, case.block_size, case.head_dim))
  split = xla._sparse_split(jnp.zeros((4, 29, case.top_k)), k_blocks, 2)
  assert split.rows.count == 4 and split.queries.count > 1
  inputs = jax.device_put(
    inputs, jax.NamedSharding(jax.make_mesh((1,), ("rows",)), jax.P("rows"))
  )
  for phase, want in whole.items():
    got = jax.jit(one_device(phase))(inputs)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
      np.testing.assert_allclose(x.reshape(y.shape), y, rtol=1e-5, atol=1e-6)


def test_gradient_stays_a_small_program():
  """Compile time grows with the program, above all with its loops' bodies."""
  arrays = [
    jax.ShapeDtypeStruct((1, 32768, *heads, 128), jnp.bfloat16)
    for heads in ((64,), (4,), (4,), (4,), ())
  ]

  def loss(inputs):
    out, kl, *_ = msa_jax.msa_attention(
      *inputs, with_kl=True, implementation="xla"
    )
    return jnp.sum(out, dtype=jnp.float32) + kl

  text = jax.jit(jax.grad(loss)).lower(arrays).as_text()
  # Selection has a loop over queries and one over keys, and each other pass
  # one over its chunks. In two of them, two loops sum the tiles of blocks.
  assert text.count("stablehlo.while") == 2 + 3 + 4
  assert text.count(" = ") < 3500


@pytest.mark.parametrize("num_local", [0, 1])
def test_choices_are_those_of_other_backends(patched_programs, num_local):
  """Off the CPU, a block's scores are neighbours in memory."""
  case = CASES["ragged"]
  *_, index_q, index_k = case.inputs()
  options = case.select_options() | dict(num_local_blocks=num_local)

  def choose(index_q, index_k):
    return msa_jax.select_blocks(
      index_q, index_k, implementation="xla", **options
    )

  want, product, seen = choose(index_q, index_k), xla._product, []

  def recorded(sum_of, *operands):
    seen.append(sum_of)
    return product(sum_of, *operands)

  patched_programs.setattr(jax, "default_backend", lambda: "gpu")
  patched_programs.setattr(xla, "_product", recorded)
  jax.clear_caches()
  np.testing.assert_array_equal(choose(index_q, index_k), want)
  assert seen == ["bri,bnji->brnj"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_numbers_are_rounded_without_a_cast(dtype, x64):
  """All finite numbers of a dtype, the middles between them, what is next to
  these, and others, up to those that become infinite.

  A program has no cast that XLA could leave out.
  """
  every = np.arange(1 << 16, dtype=np.uint16).view(jnp.dtype(dtype))
  every = np.sort(np.float64(every[np.isfinite(every)]))
  # XLA takes float32 numbers below 2^-126 for 0.
  every = every[(np.abs(every) >= 2.0**-126) | (every == 0)]
  middle = (every[1:] + every[:-1]) / 2
  middle = np.float32(middle[np.abs(middle) >= 2.0**-126])
  next_to = [np.nextafter(middle, np.float32(x)) for x in (-np.inf, np.inf)]
  rest = [65519.0, 65520.0, 3.4e38, np.inf, np.nan]
  x = np.float32([*every, *middle, *np.ravel(next_to), *rest])
  x = x[~(np.abs(x) < 2.0**-126) | (x == 0)]
  with np.errstate(over="ignore"):
    want = np.float32(x.astype(jnp.dtype(dtype)))
  rounded = jax.jit(functools.partial(reference.round_to, dtype=dtype))
  got = np.asarray(rounded(x))
  assert got.dtype == np.float32
  np.testing.assert_array_equal(got, want)
  np.testing.assert_array_equal(np.signbit(got), np.signbit(want))
  assert "convert_element_type" not in str(jax.make_jaxpr(rounded)(x))
  np.testing.assert_array_equal(rounded(np.float64(x)), want)


def test_memory_grows_linearly():
  """Forward, backward and KL at 16,384 tokens stay under 2 GB."""
  case = Case(
    q_len=16384,
    kv_len=16384,
    num_heads=8,
    num_kv_heads=2,
    head_dim=64,
    index_dim=64,
    block_size=64,
    top_k=8,
  )

  def loss(inputs):
    result = msa(case, "xla", with_kl=True)(*inputs)
    return jnp.sum(result.out) + result.kl

  shapes = jax.eval_shape(case.inputs)
  compiled = jax.jit(jax.grad(loss)).lower(shapes).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 2e9


@pytest.mark.parametrize("implementation", DENSE_AND_SPARSE)
def test_nan_stays_where_it_can_be_seen(implementation):
  case = Case(q_len=32, kv_len=32, block_size=4, top_k=3)
  inputs = case.inputs()
  blocks = jnp.asarray(
    np.where(np.array(patterns(case)["random"]) == 3, -1, random_blocks(case))
  )

  def run(q, k, v):
    attend = jax.jit(
      functools.partial(
        msa_jax.sparse_attention, block_size=4, implementation=implementation
      )
    )
    return jax.vjp(lambda *x: attend(*x, blocks), q, k, v)

  q, k, v = inputs[:3]
  clean, pullback = run(q, k, v)
  clean_grads = pullback(jnp.ones_like(clean))
  # Block 3 is picked by nobody: NaN there reaches nothing.
  out, pullback = run(
    q, k.at[:, 12:16].set(jnp.nan), v.at[:, 12:16].set(jnp.nan)
  )
  np.testing.assert_array_equal(out, clean)
  for got, want in zip(pullback(jnp.ones_like(out)), clean_grads):
    np.testing.assert_array_equal(got, want)
  assert not np.any(clean_grads[1][:, 12:16])
  assert not np.any(clean_grads[2][:, 12:16])
  # NaN in one query stays in that query, in the forward and in dq.
  out, pullback = run(q.at[:, 9].set(jnp.nan), k, v)
  bad = np.isnan(out).any((0, 2, 3))
  assert bad[9] and bad.sum() == 1
  # A NaN value is seen by the queries that may attend to it, and no earlier.
  out, _ = run(q, k, v.at[:, 17].set(jnp.nan))
  bad = np.isnan(out).any((0, 2, 3))
  assert not bad[:17].any() and bad[17:].any()


@pytest.mark.parametrize("implementation", DENSE_AND_SPARSE)
def test_nan_scores_and_ties(implementation):
  case = Case(q_len=32, kv_len=32, block_size=4, top_k=3)
  index_q, index_k = case.inputs()[3:]
  select = functools.partial(
    msa_jax.select_blocks,
    **case.select_options(),
    implementation=implementation,
  )
  # All scores equal: the own block, then the lowest ids.
  got = select(index_q, jnp.zeros_like(index_k))
  np.testing.assert_array_equal(got[0, 0, 31], [0, 1, 7])
  np.testing.assert_array_equal(got[0, 0, 5], [0, 1, -1])
  # Negative zero is zero.
  got = select(index_q, jnp.zeros_like(index_k).at[:, ::2].set(-0.0))
  np.testing.assert_array_equal(got[0, 0, 31], [0, 1, 7])


@pytest.mark.parametrize("block_size", [4, 8])
@pytest.mark.parametrize("implementation", DENSE_AND_SPARSE)
def test_a_block_with_a_nan_score_is_chosen_only_where_forced(
  implementation, block_size
):
  case = Case(q_len=64, kv_len=64, block_size=block_size, top_k=3)
  index_q, index_k = case.inputs()[3:]
  at = 2 * block_size + 1
  poisoned = index_k.at[:, at].set(jnp.nan)
  got = msa_jax.select_blocks(
    index_q, poisoned, **case.select_options(), implementation=implementation
  )
  np.testing.assert_array_equal(got, loop_select(case, index_q, poisoned))
  holds = (np.asarray(got) == 2).any(-1)[0, 0]
  assert holds[at : 3 * block_size].all()
  assert not holds[3 * block_size :].any()


def test_fp8_selection_recall():
  """e4m3 operands keep most exact choices on random data."""
  case = Case(q_len=256, kv_len=256, index_dim=64, block_size=8, top_k=8)
  index_q, index_k = case.inputs()[3:]
  chosen = {
    precision: np.asarray(
      msa_jax.select_blocks(
        index_q,
        index_k,
        **case.select_options(),
        score_precision=precision,
        implementation="xla",
      )
    )
    for precision in ("exact", "fp8")
  }
  kept = (chosen["fp8"][..., None] == chosen["exact"][..., None, :]).any(-1)
  assert 0.9 < kept[:, :, 64:].mean() < 1


def loop_recalls(case, q, k, block_indices):
  """`selection_recall` in float64, and the best blocks in its own layout."""
  q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
  group_size = case.num_heads // case.num_kv_heads
  best = np.full_like(block_indices, -1)
  rows = []
  for b, g, t in np.ndindex(block_indices.shape[:3]):
    position = case.positions()[b, t]
    if position < 0:
      continue
    mass = np.zeros(position // case.block_size + 1)
    for h in range(g * group_size, (g + 1) * group_size):
      s = k[b, : position + 1, g] @ q[b, t, h] * case.head_dim**-0.5
      p = np.exp(s) / np.exp(s).sum() / group_size
      for j in range(position + 1):
        mass[j // case.block_size] += p[j]
    picked = {n for n in block_indices[b, g, t] if 0 <= n < len(mass)}
    ids = sorted(np.argsort(-mass)[: case.top_k])
    best[b, g, t, : len(ids)] = ids
    rows.append(
      (
        len(picked & set(ids)) / len(ids),
        sum(mass[n] for n in picked),
        sum(mass[n] for n in ids),
      )
    )
  return np.mean(rows, axis=0), best


@pytest.mark.parametrize("name", CASES)
def test_recalls_equal_loops(name):
  """Of many choices, none holds more than the best blocks; these do."""
  case = CASES[name]
  q, k = case.inputs()[:2]
  recall = functools.partial(
    msa_jax.selection_recall,
    q,
    k,
    block_size=case.block_size,
    kv_lengths=case.lengths,
  )
  for blocks in patterns(case).values():
    got = recall(blocks)
    want, best = loop_recalls(case, q, k, np.asarray(blocks))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert got._fields == ("block_recall", "score_recall", "best_score_recall")
    assert got.score_recall <= got.best_score_recall * (1 + 1e-6)  # rounding
  found = msa_jax.best_blocks(
    q,
    k,
    block_size=case.block_size,
    top_k=case.top_k,
    kv_lengths=case.lengths,
  )
  np.testing.assert_array_equal(found, best)
  got = recall(found)
  np.testing.assert_allclose(got.block_recall, 1.0, rtol=1e-6)
  assert got.score_recall == got.best_score_recall


def test_vmap_remat_and_repeats_agree():
  case = CASES["even"]
  inputs = case.inputs()

  def loss(*inputs):
    result = msa(case, "xla", with_kl=True)(*inputs)
    return jnp.sum(jnp.sin(result.out)) + result.kl

  grad = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3, 4)))
  first, second = grad(*inputs), grad(*inputs)
  for a, b in zip(first, second):
    np.testing.assert_array_equal(a, b)
  every = (0, 1, 2, 3, 4)
  remat = jax.jit(jax.grad(jax.checkpoint(loss), argnums=every))(*inputs)
  stacked = tuple(jnp.stack([x, x]) for x in inputs)
  mapped = jax.jit(jax.vmap(jax.grad(loss, argnums=every)))(*stacked)
  for want, a, b in zip(first, remat, mapped):
    np.testing.assert_allclose(a, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(b[1], want, rtol=1e-5, atol=1e-6)


def test_kl_gradient_stops_at_the_index_operands():
  case = CASES["even"]
  inputs = case.inputs()
  for implementation in DENSE_AND_SPARSE:
    for phase in ("sparse", "warmup"):

      @jax.jit
      def both(inputs, implementation=implementation, phase=phase):
        run = msa(case, implementation, phase=phase, with_kl=True)
        return (
          jax.grad(lambda x: run(*x).kl)(inputs),
          jax.grad(lambda x: jnp.sum(run(*x).out))(inputs),
        )

      of_kl, of_out = both(inputs)
      assert [bool(np.any(g)) for g in of_kl] == [False] * 3 + [True] * 2
      assert [bool(np.any(g)) for g in of_out] == [True] * 3 + [False] * 2


@pytest.mark.parametrize("implementation", DENSE_AND_SPARSE)
def test_equals_another_implementation(implementation):
  """One layer of a tiny MiniMax-M3 model by Hugging Face transformers."""
  data = np.load("tests/data/m3_tiny_attention.npz")
  x = jnp.asarray(data["hidden_states"])
  cotangent = jnp.asarray(data["cotangent"])
  weights = {
    name: jnp.asarray(data[name])
    for name in data
    if name.endswith(".weight") and not name.startswith("grad.")
  }
  cos, sin = jnp.asarray(data["cos"])[0], jnp.asarray(data["sin"])[0]

  def heads(x, weights, name, norm=True):
    prefix, dot, short = name.rpartition(".")
    y = x @ weights[f"{name}_proj.weight"].T
    y = y.reshape(*x.shape[:2], -1, 32)
    if norm:
      y = y * jax.lax.rsqrt(jnp.mean(y**2, -1, keepdims=True) + 1e-6)
      y = y * (1 + weights[f"{prefix}{dot}{short}_norm.weight"])
      a, b = y[..., :8], y[..., 8:16]
      turned = jnp.concatenate([-b, a], -1)
      rotated = y[..., :16] * cos[:, None] + turned * sin[:, None]
      y = jnp.concatenate([rotated, y[..., 16:]], -1)
    return y

  def layer(x, weights):
    index_q = heads(x, weights, "indexer.q")
    index_k = heads(x, weights, "indexer.k")[:, :, 0]
    result = msa_jax.msa_attention(
      heads(x, weights, "q"),
      heads(x, weights, "k"),
      heads(x, weights, "v", norm=False),
      index_q,
      index_k,
      block_size=16,
      top_k=3,
      implementation=implementation,
    )
    out = result.out.reshape(*x.shape[:2], -1) @ weights["o_proj.weight"].T
    return jnp.sum(out * cotangent), (out, result.block_indices)

  grads, (out, blocks) = jax.jit(jax.grad(layer, argnums=(0, 1), has_aux=True))(
    x, weights
  )
  # Theirs are in score order.
  want = np.where(data["block_indices"] < 0, 99, data["block_indices"])
  want = np.sort(want, axis=-1)
  np.testing.assert_array_equal(np.where(blocks < 0, 99, blocks), want)
  np.testing.assert_allclose(out, data["output"], atol=2e-5)
  np.testing.assert_allclose(grads[0], data["grad_hidden_states"], atol=2e-4)
  checked = 0
  for name, grad in grads[1].items():
    if f"grad.{name}" in data:
      checked += 1
      scale = np.abs(data[f"grad.{name}"]).max()
      np.testing.assert_allclose(
        grad, data[f"grad.{name}"], atol=1e-5 * max(scale, 1)
      )
    else:
      assert name.startswith("indexer.")
  assert checked == 6


# Choices that a caller made, above, are given to both implementations.
@pytest.mark.parametrize(
  "implementation", [pytest.param("reference", marks=SLOW), "xla"]
)
def test_given_choices(implementation):
  """Attention, KL and gradients over given blocks, of another P than top_k."""
  case = Case(kv_len=26)
  inputs = case.inputs()
  blocks = random_blocks(case)[..., :2]
  options = dict(block_size=4, implementation=implementation)

  def given(*inputs):
    out = msa_jax.msa_attention(
      *inputs, block_indices=blocks, with_kl=True, top_k=3, **options
    )
    np.testing.assert_array_equal(out.block_indices, blocks)
    return jnp.sum(jnp.sin(out.out)) + out.kl + jnp.sum(_seen(out.lse))

  def apart(q, k, v, index_q, index_k):
    out, lse = msa_jax.sparse_attention(
      q, k, v, blocks, return_lse=True, **options
    )
    kl = msa_jax.index_kl_loss(q, k, index_q, index_k, blocks, **options)
    return jnp.sum(jnp.sin(out)) + kl + jnp.sum(_seen(lse))

  def _seen(lse):
    return jnp.where(lse == -jnp.inf, 0, lse)

  got = jax.value_and_grad(given, range(5))(*inputs)
  want = jax.value_and_grad(apart, range(5))(*inputs)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
    got, want,
  )  # fmt: skip
  dense = msa_jax.msa_attention(
    *inputs, block_indices=blocks, phase="warmup", top_k=3, **options
  )
  np.testing.assert_array_equal(dense.block_indices, blocks)
  chosen = msa_jax.msa_attention(*inputs, phase="warmup", top_k=3, **options)
  np.testing.assert_array_equal(dense.out, chosen.out)
  with pytest.raises(ValueError, match="block_indices must be int32"):
    msa_jax.msa_attention(*inputs, block_indices=blocks.astype(float))
