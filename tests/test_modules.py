"""Attention layers and the decoder model."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.nnx import bridge
from helpers import run_on_devices

import msa_jax
from msa_jax import DecoderLM, IndexConfig, ModelConfig

INDEX = IndexConfig(index_dim=8, block_size=8, top_k=2)
CONFIG = ModelConfig(
  vocab_size=64,
  num_layers=3,
  embed_dim=32,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  mlp_dim=48,
  rope_dim=4,
  layer_kinds=("gqa", "msa"),
  index=INDEX,
  implementation="xla",
)
TOKENS = jax.random.randint(jax.random.key(0), (2, 40), 0, 64)


def build(seed=0, index=INDEX, **changes):
  config = dataclasses.replace(CONFIG, index=index, **changes)
  return DecoderLM(config, rngs=nnx.Rngs(seed))


@functools.partial(jax.jit, static_argnums=(0, 3))
def apply(graphdef, params, tokens, phase):
  model = nnx.merge(graphdef, params)
  return model(tokens, phase=phase, with_kl=True, with_selection=True)


def run(model, phase="sparse", tokens=TOKENS):
  return apply(*nnx.split(model), tokens, phase)


# One program in the place of many small operations.
@functools.partial(nnx.jit, static_argnames=("phase", "with_kl", "is_causal"))
def call(layer, x, **options):
  return layer(x, **options)


@functools.partial(nnx.jit, static_argnames="phase")
def extend(layer, x, cache, span, **options):
  return layer.extend(x, cache, span, **options)


def test_gqa_equals_flax():
  """Same weights, no rotation: flax's own multi-head attention."""
  ours = msa_jax.GQAttention(
    4, 24, num_kv_heads=2, rope_dim=0, rngs=nnx.Rngs(0)
  )
  theirs = nnx.MultiHeadAttention(
    4, 24, num_kv_heads=2, use_bias=False, decode=False, rngs=nnx.Rngs(1)
  )
  for name in ("query", "key", "value", "out"):
    getattr(theirs, name).kernel[...] = getattr(ours, name).kernel[...]
  x = jax.random.normal(jax.random.key(2), (2, 10, 24))
  np.testing.assert_allclose(
    call(ours, x),
    call(theirs, x, is_causal=True, mask=nnx.make_causal_mask(x[..., 0])),
    atol=1e-5,
  )


@pytest.mark.parametrize(
  "changes", [{}, dict(normalize_qk=True, rope_dim=4), dict(sinks=True)]
)
def test_msa_with_every_block_equals_gqa(changes):
  """With P large enough, MSA is GQA: they share all but the Index Branch."""
  options = dict(num_kv_heads=2, rngs=nnx.Rngs(0), **changes)
  gqa = msa_jax.GQAttention(4, 32, **options)
  if gqa.sinks is not None:
    gqa.sinks[...] = jnp.linspace(-1, 3, 4)
  index = IndexConfig(index_dim=8, block_size=8, top_k=4)
  msa = msa_jax.MSAttention(4, 32, index=index, implementation="xla", **options)
  shared = nnx.to_flat_state(nnx.state(gqa, nnx.Param))
  flat = dict(nnx.to_flat_state(nnx.state(msa, nnx.Param)))
  assert {path[0] for path in flat} - {path[0] for path, _ in shared} == {
    "index_query",
    "index_key",
  } | ({"index_query_norm", "index_key_norm"} if gqa.query_norm else set())
  nnx.update(msa, nnx.from_flat_state(shared))
  x = jax.random.normal(jax.random.key(1), (2, 30, 32))
  for phase in ("sparse", "warmup"):
    np.testing.assert_allclose(
      call(msa, x, phase=phase).out, call(gqa, x), atol=2e-6
    )


def test_the_index_rotates_as_many_dims_as_it_is_told():
  """None rotates as many as the main heads do; 0 leaves scores that know no
  position."""
  options = dict(num_kv_heads=2, implementation="xla", rope_dim=4)
  x = jax.random.normal(jax.random.key(0), (1, 16, 32))
  positions = jnp.arange(16)

  def keys(rope_dim, positions):
    layer = msa_jax.MSAttention(
      *(4, 32),
      index=dataclasses.replace(INDEX, rope_dim=rope_dim),
      rngs=nnx.Rngs(0),
      **options,
    )
    return layer._project_index(x, positions)[1]

  np.testing.assert_array_equal(keys(None, positions), keys(4, positions))
  np.testing.assert_array_equal(keys(0, positions), keys(0, positions + 7))
  for rope_dim in (4, 8):
    same = np.isclose(keys(rope_dim, positions)[0, 3], keys(0, positions)[0, 3])
    assert not same[:rope_dim].any() and same[rope_dim:].all()
  with pytest.raises(ValueError, match="even and from 0 to index_dim"):
    IndexConfig(index_dim=8, rope_dim=10)


@pytest.mark.parametrize("phase", ["sparse", "warmup"])
@pytest.mark.parametrize(
  "selection", ["index", pytest.param("window", marks=pytest.mark.slow)]
)
def test_sinks_take_a_share_of_each_head_and_none_of_the_kl(phase, selection):
  index = dataclasses.replace(INDEX, selection=selection)
  options = dict(num_kv_heads=2, index=index, implementation="xla")
  plain = msa_jax.MSAttention(4, 32, **options, rngs=nnx.Rngs(0))
  layer = msa_jax.MSAttention(4, 32, **options, sinks=True, rngs=nnx.Rngs(0))
  assert not layer.sinks[...].any()
  x = jax.random.normal(jax.random.key(1), (2, 30, 32))

  def loss(layer):
    out = layer(x, phase=phase, with_kl=True)
    return jnp.sum(jnp.sin(out.out)), out

  (_, out), grads = nnx.jit(nnx.value_and_grad(loss, has_aux=True))(layer)
  assert (grads.sinks[...] != 0).all()
  without = call(plain, x, phase=phase, with_kl=True)
  assert jnp.abs(out.out - without.out).max() > 0.1
  np.testing.assert_array_equal(out.kl, without.kl)
  # Nothing is left of a head whose sink is large, or all of it.
  layer.sinks[...] = jnp.full(4, -1e9)
  np.testing.assert_allclose(
    call(layer, x, phase=phase).out, without.out, atol=1e-6
  )
  layer.sinks[...] = jnp.full(4, 1e9)
  np.testing.assert_array_equal(call(layer, x, phase=phase).out, 0)


@pytest.mark.parametrize(
  "kind, phase",
  [
    ("GQAttention", None),
    ("MSAttention", "sparse"),
    # A warm-up reads densely, as GQA does.
    pytest.param("MSAttention", "warmup", marks=pytest.mark.slow),
  ],
)
def test_sinks_with_a_cache_equal_a_full_pass(kind, phase):
  """Prefill, a few tokens and single ones; unused slots may hold NaN."""
  options = {} if phase is None else dict(index=INDEX, implementation="xla")
  named = {} if phase is None else dict(phase=phase)
  layer = getattr(msa_jax, kind)(
    4, 32, num_kv_heads=2, sinks=True, scale=0.5, use_bias=True,
    rngs=nnx.Rngs(0), **options,
  )  # fmt: skip
  layer.sinks[...] = jnp.linspace(-1.0, 2.0, 4)
  x = jax.random.normal(jax.random.key(1), (2, 30, 32))
  want = call(layer, x, **named)
  want = want if phase is None else want.out
  cache = msa_jax.cache.empty((layer.init_cache(2, 40),))
  dirty = cache.layers[0]._replace(v=jnp.full_like(cache.layers[0].v, jnp.nan))
  cache, got = cache._replace(layers=(dirty,)), []
  for first, last in ((0, 20), (20, 25), (25, 26), (26, 30)):
    cache, span = cache.reserve(last - first)
    out = extend(layer, x[:, first:last], cache.layers[0], span, **named)
    cache = cache._replace(layers=(out.cache,))
    got.append(out.out)
  np.testing.assert_allclose(jnp.concatenate(got, 1), want, atol=2e-6)


def test_cudnn_has_no_cache_with_sinks():
  layer = msa_jax.GQAttention(
    4, 32, sinks=True, implementation="cudnn", rngs=nnx.Rngs(0)
  )
  cache, span = msa_jax.cache.empty((layer.init_cache(1, 16),)).reserve(2)
  with pytest.raises(
    NotImplementedError, match=r"with sinks=False .* 'xla' or"
  ):
    layer.extend(jnp.ones((1, 2, 32)), cache.layers[0], span)


@pytest.mark.parametrize("kind", ["GQAttention", "MSAttention"])
def test_scale_and_bias(kind):
  """A scale is a factor of the queries, a bias the weight of a feature 1."""
  options = dict(num_kv_heads=2, rngs=nnx.Rngs(0))
  if kind == "MSAttention":
    options |= dict(index=INDEX, implementation="xla")
  make = functools.partial(getattr(msa_jax, kind), 4, **options)
  layer = make(32, use_bias=True, scale=1.0)
  names = ("query", "key", "value")
  for i, name in enumerate(names):
    bias = getattr(layer, name).bias
    assert not bias[...].any()
    bias[...] = jax.random.normal(jax.random.key(i), bias.shape)
  wide = make(33, qkv_features=32, out_features=32)
  params = dict(nnx.to_flat_state(nnx.state(layer)))
  for path, leaf in nnx.to_flat_state(nnx.state(wide)):
    value = params[path][...]
    if path[0] in names:
      value = jnp.concatenate([value, getattr(layer, path[0]).bias[...][None]])
      value = value * 8**0.5 if path[0] == "query" else value
    elif path[0] in ("index_query", "index_key"):
      value = jnp.pad(value, ((0, 1),) + ((0, 0),) * (value.ndim - 1))
    leaf[...] = value
  x = jax.random.normal(jax.random.key(9), (2, 30, 32))
  ones = jnp.ones((2, 30, 1))
  named = dict(with_kl=True) if kind == "MSAttention" else {}
  got = jax.tree.leaves(call(layer, x, **named))
  want = jax.tree.leaves(call(wide, jnp.concatenate([x, ones], -1), **named))
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)
  with pytest.raises(ValueError, match="scale must be finite, got inf"):
    make(32, scale=np.inf)


@pytest.mark.parametrize(
  "selection", ["index", pytest.param("window", marks=pytest.mark.slow)]
)
def test_a_layer_takes_given_choices(selection):
  index = dataclasses.replace(INDEX, selection=selection)
  layer = msa_jax.MSAttention(
    4, 32, num_kv_heads=2, index=index, implementation="xla", rngs=nnx.Rngs(0)
  )
  x = jax.random.normal(jax.random.key(1), (2, 30, 32))

  @nnx.jit
  def run(layer, blocks):
    def loss(layer):
      out = layer(x, with_kl=True, with_selection=True, block_indices=blocks)
      return jnp.sum(jnp.sin(out.out)) + out.kl, out

    return nnx.value_and_grad(loss, has_aux=True)(layer)

  (_, own), grads = run(layer, None)
  # Its own choices replayed give the same bits.
  (_, again), same = run(layer, own.selection.block_indices)
  jax.tree.map(np.testing.assert_array_equal, (own, grads), (again, same))
  # Other choices, of another number of blocks, are what it attends to.
  first = jnp.zeros((2, 2, 30, 1), jnp.int32)
  (_, other), grads = run(layer, first)
  np.testing.assert_array_equal(other.selection.block_indices, first)
  q, k, v = layer._qkv(x, None)
  want = msa_jax.sparse_attention(
    q, k, v, first, block_size=8, implementation="reference"
  )
  np.testing.assert_allclose(other.out, layer.out(want), atol=1e-5)
  if selection == "index":
    index_q, index_k, _ = layer._project_index(x, None)
    kl = msa_jax.index_kl_loss(
      q, k, index_q, index_k, first, block_size=8, implementation="reference"
    )
    np.testing.assert_allclose(other.kl, kl, rtol=1e-5)
    assert grads.index_query.kernel[...].any()
  with pytest.raises(ValueError, match=r"block_indices must be an array of"):
    layer(x, block_indices=first[:, :1])


SINKS_MESH = """
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from test_modules import INDEX
import msa_jax
from msa_jax import Sharding

x = jax.random.normal(jax.random.key(0), (4, 40, 32))


def make(kind, sharding=None):
  options = dict(index=INDEX) if kind == "MSAttention" else {}
  layer = getattr(msa_jax, kind)(
    4, 32, num_kv_heads=2, implementation="xla", sinks=True,
    sharding=sharding, rngs=nnx.Rngs(0), **options)
  layer.sinks[...] = jax.device_put(
    jnp.linspace(-1.0, 3.0, 4), layer.sinks[...].sharding)
  return layer


@nnx.jit
def run(layer, x):
  def loss(layer):
    out = layer(x)
    return jnp.sum(jnp.sin(getattr(out, "out", out)))
  return nnx.value_and_grad(loss)(layer)


for kind in ("GQAttention", "MSAttention"):
  want = run(make(kind), x)
  mesh = jax.make_mesh((2, 1, 2), ("data", "fsdp", "tensor"),
                       axis_types=(jax.sharding.AxisType.Auto,) * 3)
  with jax.set_mesh(mesh):
    layer = make(kind, Sharding())
    assert layer.sinks[...].sharding.spec == jax.P("tensor")
    got = run(layer, x)
  for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got)):
    np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-5)
"""


@pytest.mark.slow
def test_sinks_split_over_a_mesh():
  run_on_devices(4, SINKS_MESH)


def test_partial_rope_turns_pairs_by_position():
  x = jax.random.normal(jax.random.key(0), (1, 6, 2, 8))
  y = msa_jax.partial_rope(x, jnp.arange(6), rope_dim=4, theta=100.0)
  np.testing.assert_array_equal(y[..., 4:], x[..., 4:])
  for t in range(6):
    for i in range(2):
      z = complex(x[0, t, 1, i], x[0, t, 1, i + 2])
      z *= np.exp(1j * t * 100.0 ** (-2 * i / 4))
      np.testing.assert_allclose(
        [z.real, z.imag], [y[0, t, 1, i], y[0, t, 1, i + 2]], rtol=1e-5
      )
  again = msa_jax.partial_rope(x, jnp.arange(6)[None], rope_dim=4, theta=100.0)
  np.testing.assert_array_equal(again, y)
  with pytest.raises(ValueError, match=r"positions must be of shape \[T\] = "):
    msa_jax.partial_rope(x, jnp.arange(5), rope_dim=4, theta=100.0)
  with pytest.raises(ValueError, match="rope_dim must be even"):
    msa_jax.partial_rope(x, jnp.arange(6), rope_dim=10, theta=100.0)


def test_index_kernels_from_main():
  """On arrays: what to_msa makes, and by which dims."""
  dims = msa_jax.index_dims
  assert dims(8, 8).tolist() == list(range(8))
  # Pairs of frequencies 0, 2 of 4, and of the 4 dims that do not rotate, none.
  assert dims(12, 4, rope_dim=8).tolist() == [0, 2, 4, 6]
  assert dims(12, 10, rope_dim=8).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
  # More index dims than main ones: the last two have no counterpart.
  assert dims(8, 10, rope_dim=4).tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
  # An index that rotates less than the main heads do, and not at all.
  assert dims(12, 8, 8, index_rope_dim=4).tolist() == [0, 2, 4, 6, 8, 9, 10, 11]
  assert dims(12, 8, 8, index_rope_dim=0).tolist() == [8, 9, 10, 11]
  with pytest.raises(ValueError, match="index_rope_dim must be 0 or None"):
    dims(8, 8, 0, index_rope_dim=4)
  query = jax.random.normal(jax.random.key(0), (5, 4, 8))
  key = jax.random.normal(jax.random.key(1), (5, 2, 8))
  index_query, index_key = msa_jax.index_kernels_from_main(
    query, key, index_dim=8
  )
  np.testing.assert_allclose(index_query[:, 1], query[:, 2:].mean(1), rtol=1e-5)
  np.testing.assert_allclose(index_key, key.mean(1), rtol=1e-5)
  with pytest.raises(ValueError, match=r"key must be a kernel like query's"):
    msa_jax.index_kernels_from_main(query, key[..., :4], index_dim=8)
  with pytest.raises(ValueError, match=r"query must be a kernel of rank 3"):
    msa_jax.index_kernels_from_main(query[0], key, index_dim=8)


def test_one_index_key_for_all_groups():
  """Key heads that one key can stand for: each group's scores are kept."""
  query = jax.random.normal(jax.random.key(0), (5, 4, 8))
  first = jax.random.normal(jax.random.key(1), (5, 8))
  # A complex number for each of 2 rotary pairs, a real one for the 4 others.
  turn, size = jnp.array([0.3, 2.0]), jnp.array([-0.7, 3.0])
  real, imag = first[:, :2], first[:, 2:4]
  second = jnp.concatenate(
    [
      size * (real * jnp.cos(turn) - imag * jnp.sin(turn)),
      size * (real * jnp.sin(turn) + imag * jnp.cos(turn)),
      first[:, 4:] * jnp.array([1.0, -2, 0, 0.5]),
    ],
    axis=-1,
  )
  key = jnp.stack([first, second], 1)
  x = jax.random.normal(jax.random.key(2), (7, 5))
  positions = jnp.arange(7)

  @jax.jit
  def scores(query, key):
    q, k = (
      msa_jax.partial_rope(
        jnp.einsum("te,ehd->thd", x, kernel)[None],
        positions,
        rope_dim=4,
        theta=100.0,
      )[0]
      for kernel in (query, key)
    )
    return jnp.einsum("tgd,sgd->gts", q, jnp.broadcast_to(k, q.shape))

  got = msa_jax.index_kernels_from_main(
    query, key, index_dim=8, rope_dim=4, shared_key="leading"
  )
  want = scores(query.reshape(5, 2, 2, 8).mean(2), key)
  close = dict(atol=1e-4 * float(jnp.abs(want).max()), rtol=0)
  np.testing.assert_allclose(scores(got[0], got[1][:, None]), want, **close)
  mean = msa_jax.index_kernels_from_main(query, key, index_dim=8, rope_dim=4)
  wrong = scores(mean[0], mean[1][:, None])
  assert jnp.abs(wrong - want).max() > 0.1 * jnp.abs(want).max()
  # A pair that nothing reads gives zeros, not NaN.
  got = msa_jax.index_kernels_from_main(
    query.at[..., :4].set(0), key, index_dim=8, rope_dim=4, shared_key="leading"
  )
  assert jnp.isfinite(got[0]).all() and not jnp.any(got[1][:, :4])
  with pytest.raises(ValueError, match="shared_key must be one of 'mean'"):
    msa_jax.index_kernels_from_main(
      query,
      key,
      index_dim=8,
      shared_key="max",  # pyright: ignore[reportArgumentType]
    )


def test_to_msa_starts_from_leading_keys():
  config = ModelConfig(
    vocab_size=16,
    num_layers=1,
    embed_dim=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=16,
    rope_dim=4,
    qk_norm=False,
  )
  gqa = DecoderLM(config, rngs=nnx.Rngs(0))
  index = IndexConfig(index_dim=8, block_size=4, top_k=2)
  config = dataclasses.replace(config, layer_kinds=("msa",), index=index)
  made = msa_jax.to_msa(gqa, config, rngs=nnx.Rngs(1), index_init="leading")
  attention = made.layers[0].attention
  want = msa_jax.index_kernels_from_main(
    attention.query.kernel[...],
    attention.key.kernel[...],
    index_dim=8,
    rope_dim=4,
    shared_key="leading",
  )
  got = attention.index_query.kernel[...], attention.index_key.kernel[...]
  for x, y in zip(got, want):
    np.testing.assert_allclose(x.reshape(y.shape), y, atol=1e-5)


def test_rope_scaling_slows_the_slow_pairs():
  """Llama 3.1's rule, one pair at a time."""
  scaling = msa_jax.RopeScaling(
    factor=8, low_frequency_factor=1, high_frequency_factor=4, context=64
  )
  frequency = 500.0 ** (-np.arange(16) / 16)
  got = scaling.scale(jnp.asarray(frequency, jnp.float32))
  kinds = set()
  for f, scaled in zip(frequency, got):
    turn = 2 * np.pi / f
    want, kind = f, "kept"
    if turn > 64:
      want, kind = f / 8, "slow"
    elif turn >= 16:
      part = (64 / turn - 1) / 3
      want, kind = (1 - part) * f / 8 + part * f, "between"
    kinds.add(kind)
    np.testing.assert_allclose(scaled, want, rtol=1e-5)
  assert len(kinds) == 3
  # Layers use it.
  x = jax.random.normal(jax.random.key(0), (1, 40, 16))
  outs = [
    call(msa_jax.GQAttention(2, 16, rope_scaling=s, rngs=nnx.Rngs(0)), x)
    for s in (None, dataclasses.replace(scaling, context=8))
  ]
  assert np.abs(outs[0] - outs[1]).max() > 1e-3


def test_qk_norm_over_the_whole_projection():
  """One RMS over all heads of q, and one over all of k; index heads keep
  their own."""
  index = dataclasses.replace(INDEX, index_dim=8)
  layer = msa_jax.MSAttention(
    4,
    16,
    32,
    num_kv_heads=2,
    index=index,
    normalize_qk=True,
    qk_norm_over="projection",
    rope_dim=0,
    rngs=nnx.Rngs(0),
  )
  assert layer.index_query_norm.scale.shape == (8,)
  x = jax.random.normal(jax.random.key(0), (1, 5, 16))
  q, k, _ = layer._qkv(x, None)
  for name, got, heads in (("query", q, 4), ("key", k, 2)):
    kernel = np.asarray(getattr(layer, name).kernel[...], np.float64)
    norm = getattr(layer, f"{name}_norm")
    norm.scale[...] = jnp.arange(1.0, 1 + heads * 8)
    flat = np.asarray(x[0], np.float64) @ kernel.reshape(16, -1)
    flat /= np.sqrt((flat**2).mean(-1, keepdims=True) + 1e-6)
    got = got[0].reshape(5, -1)
    np.testing.assert_allclose(got, flat, rtol=1e-4, atol=1e-6)
    scaled = layer._qkv(x, None)[0 if name == "query" else 1]
    np.testing.assert_allclose(
      scaled[0].reshape(5, -1), flat * np.arange(1, 1 + heads * 8), rtol=1e-4
    )


def test_models_of_one_seed_share_all_but_the_index_branch():
  gqa, msa = build(layer_kinds=("gqa",)), build()
  dense = dict(nnx.to_flat_state(nnx.state(gqa, nnx.Param)))
  sparse = dict(nnx.to_flat_state(nnx.state(msa, nnx.Param)))
  extra = set(sparse) - set(dense)
  assert extra and all(msa_jax.is_index_param(path) for path in extra)
  assert not any(msa_jax.is_index_param(path) for path in dense)
  for path, param in dense.items():
    np.testing.assert_array_equal(param[...], sparse[path][...])
  # So the warm-up starts as GQA.
  np.testing.assert_allclose(
    run(msa, "warmup").logits, run(gqa).logits, atol=1e-5
  )


@pytest.mark.parametrize("changes", [dict(scan_layers=True, remat=True)])
def test_scanned_layers_equal_unrolled_ones(changes):
  chex.assert_trees_all_close(run(build(**changes)), run(build()), atol=1e-5)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_to_msa_keeps_the_trained_model(scan_layers):
  gqa = build(3, layer_kinds=("gqa",), scan_layers=scan_layers)
  config = dataclasses.replace(CONFIG, scan_layers=not scan_layers)
  msa = msa_jax.to_msa(gqa, config, rngs=nnx.Rngs(9))
  np.testing.assert_allclose(
    run(msa, "warmup").logits, run(gqa).logits, atol=1e-5
  )
  assert run(msa).kl[0] == 0 and np.all(run(msa).kl[1:] > 0)


def test_to_msa_refuses_a_config_without_all_parameters():
  text = "config must be the config of a model .* got one without .*index_key"
  config = dataclasses.replace(CONFIG, layer_kinds=("gqa",))
  with pytest.raises(ValueError, match=text):
    msa_jax.to_msa(build(), config, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("scan_layers", [False, True])
def test_to_msa_makes_nothing_but_the_index_branch(scan_layers):
  """The arrays of the model, and index projections of the seed's bits."""
  changes = dict(layer_kinds=("msa",), scan_layers=scan_layers)
  gqa = build(3, layer_kinds=("gqa",), scan_layers=scan_layers)
  config = dataclasses.replace(CONFIG, **changes)
  rngs, same = nnx.Rngs(9), nnx.Rngs(9)
  msa = msa_jax.to_msa(gqa, config, rngs=rngs, index_init="random")
  want = msa_jax.DecoderLM(config, rngs=same)
  np.testing.assert_array_equal(*map(jax.random.key_data, (rngs(), same())))

  def params(model):
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {path: leaf[...] for path, leaf in flat}

  old, new, want = map(params, (gqa, msa, want))
  assert new.keys() == want.keys()
  assert any(map(msa_jax.is_index_param, new))
  for path, value in new.items():
    if msa_jax.is_index_param(path):
      np.testing.assert_array_equal(value, want[path])
    else:
      pointers = [x.unsafe_buffer_pointer() for x in (value, old[path])]
      assert pointers[0] == pointers[1], path


def test_untied_output_and_dtypes():
  model = build(tie_embeddings=False, dtype="bfloat16", param_dtype="float32")
  assert model.head.kernel.dtype == jnp.float32
  # Dense attention: rounding may change which of two close blocks is chosen.
  out = run(model, "warmup")
  assert out.logits.dtype == jnp.float32
  full = build(tie_embeddings=False)
  np.testing.assert_allclose(out.logits, run(full, "warmup").logits, atol=0.1)


def test_selection_of_each_layer():
  out = run(build()).selection
  assert out.block_indices.shape == (3, 2, 2, 40, 2)
  # Not NaN, which JAX_DEBUG_NANS would report.
  assert np.all(out.block_indices[0] == -1)
  assert out.block_recall[0] == out.score_recall[0] == -1
  own = np.arange(40) // 8
  assert np.all((out.block_indices[1:] == own[:, None]).any(-1))
  score, best = out.score_recall, out.best_score_recall
  assert score.shape == best.shape == (3,) and best[0] == -1
  assert np.all((score[1:] > 0) & (score[1:] < best[1:]) & (best[1:] <= 1))


ABLATIONS = {
  "window": dict(selection="window", top_k=3),
  "oracle": dict(selection="oracle"),
  "force_first_block": dict(force_first_block=True),
  "own_not_forced": dict(num_local_blocks=0),
  "input_attached": dict(detach_input=False),
  "teacher_attached": dict(detach_teacher=False),
  "value_head": dict(value_head=True),
}


@pytest.mark.parametrize(
  "name",
  [
    pytest.param(
      name,
      marks=[pytest.mark.slow]
      # test_train has a run whose index reads the input with its gradient.
      * (name in ("own_not_forced", "force_first_block", "input_attached")),
    )
    for name in ABLATIONS
  ],
)
def test_ablations(name):
  """Each switch does what it says, in both phases."""
  index = dataclasses.replace(INDEX, **ABLATIONS[name])
  # Only "reference" differentiates the teacher; None chooses it for the KL.
  implementation = "xla" if index.detach_teacher else None
  model = build(
    index=index,
    layer_kinds=("msa",),
    num_layers=1,
    implementation=implementation,
  )
  graphdef, params = nnx.split(model, nnx.Param)

  @functools.partial(jax.jit, static_argnums=1)
  def gradients(params, phase, kl_weight, lm_weight):
    def loss(params):
      out = nnx.merge(graphdef, params)(
        TOKENS, phase=phase, with_kl=True, with_selection=True
      )
      kl, lm = jnp.sum(out.kl), jnp.sum(jnp.sin(out.logits))
      return kl_weight * kl + lm_weight * lm, out

    return jax.grad(loss, has_aux=True)(params)

  for phase in ("warmup", "sparse"):
    kl, _ = gradients(params, phase, 1.0, 0.0)
    lm, out = gradients(params, phase, 0.0, 1.0)

    def reached(grads):
      return {
        msa_jax.is_index_param(path)
        for path, grad in nnx.to_flat_state(grads)
        if np.any(grad[...])
      }

    attached = name in ("input_attached", "teacher_attached")
    want = {True, False} if attached else {True}
    if name in ("window", "oracle"):
      want = set()
    assert reached(kl) == want
    assert reached(lm) == ({True, False} if name == "value_head" else {False})
    blocks = np.asarray(out.selection.block_indices)
    own = np.arange(40) // 8
    holds_own = (blocks == own[:, None]).any(-1)
    holds_first = (blocks == 0).any(-1)
    if name == "oracle":
      recalls = out.selection[1:]
      np.testing.assert_allclose(recalls[0], 1, rtol=1e-6)
      np.testing.assert_array_equal(recalls[1], recalls[2])
      continue
    assert holds_own.all() == (name != "own_not_forced")
    assert holds_first.all() == (name in ("window", "force_first_block"))
    if name == "window":
      assert set(blocks[0, 0, 0, 39]) == {0, 3, 4}
    if name == "force_first_block":
      plain = run(build(layer_kinds=("msa",), num_layers=1)).selection
      same = (np.asarray(plain.block_indices)[0] == blocks[0]).all(-1)
      had = (np.asarray(plain.block_indices)[0] == 0).any(-1)
      assert same[had].all()


@pytest.mark.parametrize("phase", ["sparse", "warmup"])
def test_an_attached_teacher_never_falls_back(phase):
  """xla says which implementations have this KL, and those agree."""
  x = jax.random.normal(jax.random.key(0), (1, 24, 32))

  def layer(implementation):
    return msa_jax.MSAttention(
      4,
      32,
      num_kv_heads=2,
      index=dataclasses.replace(INDEX, detach_teacher=False),
      implementation=implementation,
      rngs=nnx.Rngs(0),
    )

  text = "detach_teacher=False needs implementation='reference' or None"
  named = layer("xla")
  with pytest.raises(NotImplementedError, match=text):
    named(x, phase=phase, with_kl=True)
  # Without the KL there is no teacher.
  assert named(x, phase=phase).kl == 0
  want = layer("reference")(x, phase=phase, with_kl=True)
  got = layer(None)(x, phase=phase, with_kl=True)
  chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-5)
  assert want.kl > 0


def test_an_attached_teacher_never_falls_back_on_a_gpu(pretend_hopper):
  layer = msa_jax.MSAttention(
    8,
    64,
    qkv_features=512,
    num_kv_heads=1,
    index=IndexConfig(
      index_dim=64, block_size=64, top_k=2, detach_teacher=False
    ),
    dtype=jnp.bfloat16,
    implementation="mosaic_gpu",
    rngs=nnx.Rngs(0),
  )
  x = jnp.ones((1, 256, 64), jnp.bfloat16)
  with pytest.raises(NotImplementedError, match="detach_teacher=False"):
    nnx.eval_shape(lambda layer, x: layer(x, with_kl=True), layer, x)


def test_linen_bridge():
  """A Linen model may use the layers through flax's bridge."""
  layer = bridge.to_linen(
    msa_jax.MSAttention,
    4,
    32,
    num_kv_heads=2,
    index=INDEX,
    implementation="xla",
  )
  x = jax.random.normal(jax.random.key(0), (1, 20, 32))
  variables = layer.init(jax.random.key(1), x)
  out = layer.apply(variables, x, with_kl=True)
  assert out.out.shape == x.shape and out.kl > 0


MESH = """
import dataclasses, sys
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from test_modules import CONFIG, DecoderLM
from msa_jax import Sharding

jax.config.update("jax_disable_most_optimizations", True)
CONFIG = dataclasses.replace(CONFIG, num_layers=2)
tokens = jax.random.randint(jax.random.key(0), (4, 40), 0, 64)
mask = jax.random.bernoulli(jax.random.key(1), 0.6, (4, 40)).at[3].set(False)


# Packed rows, of which device 0 has the most padding.
ids = jnp.where(jnp.arange(40) < jnp.array([[5], [20], [40], [33]]), 1, 0)
ids = jnp.where(jnp.arange(40) > 17, 2 * ids, ids).astype(jnp.int32)


@nnx.jit
def run(model, tokens, mask, ids=None):
  def loss(model):
    out = model(tokens, with_kl=True, query_mask=mask, with_selection=True,
                segment_ids=ids)
    return jnp.mean(jnp.sin(out.logits)) + out.kl.sum(), out
  return nnx.value_and_grad(loss, has_aux=True)(model)


CASES = {"data and tensor": ((2, 1, 2), ids), "fsdp": ((1, 4, 1), None)}
for name in sys.argv[1:]:
  shape, ids = CASES[name]
  model = DecoderLM(CONFIG, rngs=nnx.Rngs(0))
  (want, out), grads = run(model, tokens, mask, ids)
  mesh = jax.make_mesh(shape, ("data", "fsdp", "tensor"),
                       axis_types=(jax.sharding.AxisType.Auto,) * 3)
  with jax.set_mesh(mesh):
    model = DecoderLM(CONFIG, rngs=nnx.Rngs(0), sharding=Sharding())
    specs = nnx.get_partition_spec(nnx.state(model, nnx.Param))
    assert "tensor" in str(specs.layers[1].attention.index_query.kernel)
    (got, sharded), sharded_grads = run(model, tokens, mask, ids)
  np.testing.assert_allclose(got, want, rtol=1e-6)
  # Values of size 1 whose sums are split in another way.
  for a, b in zip(jax.tree.leaves((out, grads)),
                  jax.tree.leaves((sharded, sharded_grads))):
    np.testing.assert_allclose(a, b, atol=1e-5)
"""


@pytest.mark.slow
@pytest.mark.parametrize("case", ["data and tensor", "fsdp"])
def test_mesh_gives_the_same_numbers(case):
  """Four forced CPU devices: batch, parameters and KV heads split."""
  run_on_devices(4, MESH, case)
