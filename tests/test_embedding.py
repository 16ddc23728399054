"""The embedding: values of `nnx.Embed`, and a gradient summed in float32."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import run_on_devices

from msa_jax import DecoderLM, ModelConfig, embedding

SIZE, WIDTH = 300, 16
SUMS = {
  "cpu": embedding._sum_by_scatter,
  "accelerator": embedding._sum_by_product,
}


def made(kind=embedding.TokenEmbedding, dtype="bfloat16", **named):
  named = dict(param_dtype=jnp.float32) | named
  return kind(SIZE, WIDTH, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0), **named)


def text(shape=(2, 6000)):
  """Tokens of which few are very often, as in text: a third are token 7."""
  keys = jax.random.split(jax.random.key(1), 2)
  often = jax.random.bernoulli(keys[0], 1 / 3, shape)
  return jnp.where(often, 7, jax.random.randint(keys[1], shape, 0, SIZE))


def cotangents(shape, dtype):
  # A mean, so that a sum grows with the number of its terms.
  x = 1 + jax.random.normal(jax.random.key(2), (*shape, WIDTH))
  return x.astype(dtype)


def gradient(layer, tokens, cotangent):
  graphdef, params = nnx.split(layer)
  _, pull = jax.vjp(lambda params: nnx.merge(graphdef, params)(tokens), params)
  return pull(cotangent)[0]["embedding"].get_value()


def exact(tokens, cotangent):
  """The sum in float64."""
  total = np.zeros((SIZE, WIDTH))
  np.add.at(total, np.asarray(tokens), np.asarray(cotangent, np.float64))
  return total


@pytest.fixture(params=SUMS)
def platform(request, monkeypatch):
  """Both ways of summing, on this CPU; the product in parts of 128 rows."""
  sums = SUMS[request.param]
  monkeypatch.setattr(embedding, "_sum_by_scatter", sums)
  monkeypatch.setattr(embedding, "_ONE_HOT_BYTES", 1)
  return request.param


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_gradient_is_summed_in_float32(platform, dtype):
  """Also where a token occurs thousands of times; bfloat16 sums stand still
  at 256, where the next number is 258."""
  tokens = text()
  cotangent = cotangents(tokens.shape, dtype)
  wanted = exact(tokens, cotangent)
  with (
    jax.numpy_rank_promotion("raise"),
    jax.numpy_dtype_promotion("strict"),
  ):
    found = gradient(made(dtype=dtype), tokens, cotangent)
  assert found.dtype == jnp.float32
  # Each of 4,000 additions rounds by at most 2^-24 of the sum.
  np.testing.assert_allclose(found, wanted, rtol=2.4e-4, atol=1e-4)
  again = gradient(made(dtype=dtype), tokens, cotangent)
  np.testing.assert_array_equal(found, again)
  if dtype == "bfloat16":
    plain = gradient(made(nnx.Embed), tokens, cotangent)
    assert abs(plain[7] - wanted[7]).min() > 0.3 * wanted[7].max()


def test_gradient_of_float64_and_of_narrow_parameters(platform):
  tokens = text((3, 50))
  with jax.enable_x64(True):
    cotangent = cotangents(tokens.shape, jnp.float64)
    layer = made(dtype="float64", param_dtype=jnp.float64)
    found = gradient(layer, tokens, cotangent)
    assert found.dtype == jnp.float64
    wanted = exact(tokens, cotangent)
    np.testing.assert_allclose(found, wanted, rtol=1e-14, atol=1e-14)
  cotangent = cotangents(tokens.shape, jnp.bfloat16)
  found = gradient(made(param_dtype=jnp.bfloat16), tokens, cotangent)
  assert found.dtype == jnp.bfloat16
  # Rounded once, by half of 2^-7, beside the rounding of the float32 sum.
  wanted = exact(tokens, cotangent)
  np.testing.assert_allclose(
    np.asarray(found, np.float64), wanted, rtol=2**-7.99
  )


@pytest.mark.parametrize("of", ["int8", "uint8", "int32", "uint32"])
def test_tokens_are_read_as_before(platform, of):
  """Values and gradients, also of ids outside of the vocabulary."""
  top = np.iinfo(of).max
  ids = [0, 5, 5, 127, top] + [299, 300, 301, 2**30] * (top > 2**20)
  if np.iinfo(of).min < 0:
    ids += [-1, -128] + [-300, -301, -(2**31)] * (top > 2**20)
  tokens = jnp.array(ids, of)
  values, before = made()(tokens), made(nnx.Embed)(tokens)
  assert values.dtype == before.dtype == jnp.bfloat16
  np.testing.assert_array_equal(
    np.asarray(values).view(np.uint16), np.asarray(before).view(np.uint16)
  )
  cotangent = jnp.round(cotangents(tokens.shape, "bfloat16"))  # exact sums
  missing = np.isnan(np.asarray(values, np.float32)).any(-1)
  assert not missing.all() and (missing.any() or top < 2**20)
  # What an unknown token gives back is NaN too, and reaches no parameter.
  poisoned = jnp.where(missing[:, None], jnp.nan, cotangent)
  found = gradient(made(), tokens, poisoned)
  wanted = gradient(made(nnx.Embed), tokens, cotangent)
  np.testing.assert_array_equal(found, wanted)


def test_one_row_and_no_tokens():
  one = embedding.TokenEmbedding(1, WIDTH, rngs=nnx.Rngs(0))
  assert one(jnp.array([0, 3])).shape == (2, WIDTH)
  tokens = jnp.zeros((2, 0), jnp.int32)
  found = gradient(made(), tokens, cotangents(tokens.shape, "bfloat16"))
  assert not found.any()


def test_errors():
  with pytest.raises(ValueError, match=r"inputs .*integers"):
    made()(jnp.zeros((2, 3)))
  graphdef, params = nnx.split(made())

  def look_up(params):
    return nnx.merge(graphdef, params)(jnp.array([1]))

  with pytest.raises(NotImplementedError, match="reverse mode only"):
    jax.jvp(look_up, (params,), (params,))


def test_gradients_of_each_row_of_a_batch(platform):
  """`jax.vmap` of a gradient, `jax.checkpoint` around the lookup, and the
  gradient of a gradient."""
  tokens = text((4, 30))
  cotangent = cotangents(tokens.shape, "bfloat16")
  graphdef, params = nnx.split(made())

  def loss(params, tokens, cotangent):
    out = jax.checkpoint(lambda p: nnx.merge(graphdef, p)(tokens))(params)
    return jnp.sum(out.astype(jnp.float32) * cotangent)

  found = jax.vmap(jax.grad(loss), (None, 0, 0))(params, tokens, cotangent)
  found = found["embedding"].get_value()
  for i in range(4):
    np.testing.assert_allclose(
      found[i], exact(tokens[i], cotangent[i]), rtol=1e-5, atol=1e-5
    )

  def squares(cotangent):
    grad = jax.grad(loss)(params, tokens, cotangent)
    return 0.5 * jnp.sum(grad["embedding"].get_value() ** 2)

  # d squares / d cotangent is the table's gradient, looked up.
  cotangent = cotangent.astype(jnp.float32)
  total = exact(tokens, cotangent.astype(jnp.bfloat16))
  np.testing.assert_allclose(
    jax.grad(squares)(cotangent), total[np.asarray(tokens)], rtol=2**-7
  )


def test_parts_of_the_vocabulary_keep_to_their_memory():
  rows = embedding._rows_at_once
  assert rows(8448, 4096, jnp.bfloat16) == 8448
  # 2 rows of 16,384 tokens: five parts of at most 128 MB.
  assert rows(8448, 32768, jnp.bfloat16) == 1792
  for size, tokens in ((8448, 32768), (128_256, 16384), (50_000, 1 << 18)):
    part = rows(size, tokens, jnp.bfloat16)
    assert part % 128 == 0 and part * tokens * 2 <= 128 * 2**20
    assert part * -(-size // part) < size + 128 * -(-size // part)


CONFIG = ModelConfig(
  vocab_size=SIZE,
  num_layers=1,
  embed_dim=16,
  num_heads=2,
  num_kv_heads=1,
  head_dim=8,
  mlp_dim=16,
  rope_dim=8,
  layer_kinds=("gqa",),
  dtype="bfloat16",
  tie_embeddings=False,
)


def test_training_for_a_gpu_scatters_nothing():
  """The gradient of a model, lowered for CUDA; on a CPU it is a scatter."""
  graphdef, params = nnx.split(DecoderLM(CONFIG, rngs=nnx.Rngs(0)))
  tokens = jnp.zeros((2, 8), jnp.int32)

  def loss(params):
    out = nnx.merge(graphdef, params)(tokens, with_logits=False)
    return jnp.sum(out.hidden)

  traced = jax.jit(jax.grad(loss)).trace(params)
  for platform, scatters in (("cuda", 0), ("tpu", 0), ("cpu", 1)):
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert len(re.findall(r"\"stablehlo\.scatter\"", text)) == scatters, (
      platform
    )


MESHES = """
import dataclasses, functools
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from jax.sharding import AxisType
from msa_jax import DecoderLM, Sharding, embedding
from test_embedding import CONFIG, cotangents, exact, made, text

jax.config.update("jax_disable_most_optimizations", True)
embedding._sum_by_scatter = embedding._sum_by_product
tokens = text((4, 64))
close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
# Three products of 128 rows on each device, however many tokens it has.
embedding._ONE_HOT_BYTES = 1


def gradient(out, params, tokens, cotangent):
  def loss(params, tokens, cotangent):
    return jnp.sum(out(params, tokens).astype(jnp.float32) * cotangent)

  grad = jax.grad(loss)(params, tokens, cotangent)
  return nnx.to_pure_dict(grad)


# A model, whose batch rows and tokens are split.
config = dataclasses.replace(CONFIG, dtype="float32")
cotangent = cotangents(tokens.shape, "float32")


def of_model(sharding, tokens):
  model = DecoderLM(config, rngs=nnx.Rngs(0), sharding=sharding)
  graphdef, params = nnx.split(model)

  def out(params, tokens):
    return nnx.merge(graphdef, params)(tokens, with_logits=False).hidden

  grad = jax.jit(functools.partial(gradient, out))(params, tokens, cotangent)
  return np.asarray(grad["embed"]["embedding"])


wanted = of_model(None, tokens)
assert abs(wanted[7]).max() > 1
mesh = jax.make_mesh((2, 2), ("fsdp", "context"),
                     axis_types=(AxisType.Explicit,) * 2)
with jax.set_mesh(mesh):
  close(of_model(Sharding(), jax.device_put(tokens, jax.P("fsdp"))), wanted)

# The layer alone, split by XLA, and inside of a user's shard_map that checks
# what varies.
mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
cotangent = cotangents(tokens.shape, "bfloat16")
wanted = exact(tokens, cotangent)
with jax.set_mesh(mesh):
  layer = made(sharding=Sharding())
  assert layer._parts(tokens) == 4
  graphdef, params = nnx.split(layer)

  def out(params, tokens):
    return nnx.merge(graphdef, params)(tokens)

  def local(params, tokens):
    assert layer._parts(tokens) == 1
    return out(params, tokens)

  manual = jax.shard_map(local, in_specs=(jax.P(), jax.P("data")),
                         out_specs=jax.P("data"))
  placed = jax.device_put((tokens, cotangent), jax.P("data"))
  for function in (out, manual):
    grad = jax.jit(functools.partial(gradient, function))(params, *placed)
    close(grad["embedding"], wanted)
"""


# Runs over a mesh, in test_train, embed tokens in the same way.
@pytest.mark.slow
def test_products_under_meshes():
  run_on_devices(4, MESHES)
