"""Time and memory of the portable implementations on this device.

One training step of the operation (forward, backward and KL) by `"xla"` and
`"reference"`, beside dense GQA by `jax.nn.dot_product_attention` (forward and
backward, without KL):

    python -m benchmarks.portable --tokens 1024 4096 16384

With --generate, the speed at which a small model decodes when its cache holds
that many tokens, MSA beside GQA, for each implementation that can run here:

    python -m benchmarks.portable --generate --tokens 4096 32768 --batch 8

`python -m benchmarks` measures the kernels for Hopper GPUs.
"""

from __future__ import annotations

import argparse
import functools
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import msa_jax
from msa_jax import cache as cache_lib
from msa_jax import generate

# The reference holds several T x T arrays for each head.
_REFERENCE_LIMIT = 4096


def _inputs(args: argparse.Namespace, tokens: int) -> tuple[jax.Array, ...]:
  keys = jax.random.split(jax.random.key(0), 5)
  kv = (1, tokens, args.num_kv_heads, args.head_dim)
  shapes = (
    (1, tokens, args.num_heads, args.head_dim),
    kv,
    kv,
    kv,
    (1, tokens, args.head_dim),
  )
  return tuple(
    jax.random.normal(key, shape) for key, shape in zip(keys, shapes)
  )


def _msa_loss(args: argparse.Namespace, implementation: str, inputs):
  result = msa_jax.msa_attention(
    *inputs,
    block_size=args.block_size,
    top_k=args.top_k,
    with_kl=True,
    implementation=implementation,  # pyright: ignore[reportArgumentType]
  )
  return jnp.sum(jnp.sin(result.out)) + result.kl


def _dense_loss(inputs):
  out = jax.nn.dot_product_attention(*inputs[:3], is_causal=True)
  return jnp.sum(jnp.sin(out))


def _measure(
  loss: Callable, inputs: tuple[jax.Array, ...], repeats: int
) -> tuple[float, float, int]:
  """Median and spread of a step in seconds, and its workspace in bytes."""
  step = jax.jit(jax.grad(loss)).lower(inputs).compile()
  jax.block_until_ready(step(inputs))
  seconds = []
  for _ in range(repeats):
    start = time.perf_counter()
    jax.block_until_ready(step(inputs))
    seconds.append(time.perf_counter() - start)
  analysis = step.memory_analysis()
  memory = analysis.temp_size_in_bytes if analysis else 0
  return statistics.median(seconds), max(seconds) - min(seconds), memory


def _filled(cache: cache_lib.Cache, tokens: int) -> cache_lib.Cache:
  """The cache as if `tokens` tokens had been read: its entries are random."""
  keys = iter(jax.random.split(jax.random.key(1), 3 * len(cache.layers)))

  def fill(x: jax.Array) -> jax.Array:
    return jax.random.normal(next(keys), x.shape, jnp.float32).astype(x.dtype)

  layers = tuple(
    layer._replace(
      k=fill(layer.k),
      v=fill(layer.v),
      index_k=None if layer.index_k is None else fill(layer.index_k),
    )
    for layer in cache.layers
  )
  return cache._replace(
    layers=layers, lengths=jnp.full_like(cache.lengths, tokens)
  )


def _decode(
  args: argparse.Namespace, tokens: int, kind: str, name: str, fp8: bool
) -> tuple[float, float, int]:
  """Median and spread of the seconds of one step, and the cache's bytes."""
  options: Any = {
    "gqa_implementation" if kind == "gqa" else "implementation": name
  }
  embed_dim = args.num_heads * args.head_dim
  model = msa_jax.DecoderLM(
    msa_jax.ModelConfig(
      vocab_size=4096,
      num_layers=args.num_layers,
      embed_dim=embed_dim,
      num_heads=args.num_heads,
      num_kv_heads=args.num_kv_heads,
      head_dim=args.head_dim,
      mlp_dim=3 * embed_dim,
      layer_kinds=(kind,),  # pyright: ignore[reportArgumentType]
      index=msa_jax.IndexConfig(
        index_dim=args.head_dim, block_size=args.block_size, top_k=args.top_k
      ),
      dtype=args.dtype,
      param_dtype=args.dtype,
      **options,
    ),
    rngs=nnx.Rngs(0),
  )
  graphdef, params = nnx.split(model)
  needed = tokens + (args.repeats + 1) * args.steps
  capacity = -(-needed // args.block_size) * args.block_size
  index_dtype = jnp.float8_e4m3fn if fp8 else None
  cache = model.init_cache(args.batch, capacity, index_dtype=index_dtype)
  size = sum(x.nbytes for x in jax.tree.leaves(cache))
  state = generate.DecodeState(
    jax.jit(_filled, static_argnums=1, donate_argnums=0)(cache, tokens),
    jnp.zeros(args.batch, jnp.int32),
    jnp.full(args.batch, needed, jnp.int32),
    jax.random.split(jax.random.key(0), args.batch),
  )
  stop_tokens = jnp.zeros(0, jnp.int32)
  seconds = []
  for _ in range(args.repeats + 1):
    start = time.perf_counter()
    state, new = generate.decode_steps(
      graphdef, params, state, stop_tokens, steps=args.steps
    )
    jax.block_until_ready(new)
    seconds.append((time.perf_counter() - start) / args.steps)
  if not bool(jnp.all(new.tokens >= 0)):
    raise FloatingPointError(f"{kind}, {name}: the logits are NaN")
  seconds = seconds[1:]  # the first call compiles
  return statistics.median(seconds), max(seconds) - min(seconds), size


def _decode_table(args: argparse.Namespace) -> None:
  print(
    f"{args.num_layers} layers, {args.num_heads}/{args.num_kv_heads} heads of"
    f" {args.head_dim}, blocks of {args.block_size}, P {args.top_k}, batch"
    f" {args.batch}, {args.steps} steps a call"
  )
  print(
    "| cached tokens | attention | ms a step | spread | tokens/s | cache MB |"
  )
  print("|---:|---|---:|---:|---:|---:|")
  sides = [
    ("gqa", "cudnn", False),
    ("gqa", "xla", False),
    ("msa", "mosaic_gpu", False),
    ("msa", "mosaic_gpu", True),
    ("msa", "xla", False),
    ("msa", "xla", True),
  ]
  missing = {}
  for tokens in args.tokens:
    for kind, name, fp8 in sides:
      label = f"{kind}, {name}{', fp8 index' if fp8 else ''}"
      try:
        median, spread, size = _decode(args, tokens, kind, name, fp8)
      except NotImplementedError as error:
        missing[label] = error
        continue
      print(
        f"| {tokens:,} | {label} | {median * 1e3:.3f} | {spread * 1e3:.3f} |"
        f" {args.batch / median:,.0f} | {size / 1e6:,.0f} |",
        flush=True,
      )
  for label, error in missing.items():
    print(f"not here: {label}: {error}")


def main() -> None:
  parser = argparse.ArgumentParser(
    prog="python -m benchmarks.portable",
    description="Time forward + backward + KL of the portable implementations,"
    " or decoding with a cache.",
  )

  def add(name: str, *, help: str, **options: Any) -> None:
    text = f"{help} (default: %(default)s)"
    parser.add_argument(name, type=int, help=text, **options)

  add("--tokens", nargs="+", default=[1024, 4096, 16384], help="lengths")
  add("--num_heads", default=8, help="query heads")
  add("--num_kv_heads", default=2, help="KV heads")
  add("--head_dim", default=64, help="head and index dim")
  add("--block_size", default=64, help="tokens of a block")
  add("--top_k", default=8, help="blocks that a query keeps")
  add("--repeats", default=5, help="timed steps (calls, with --generate)")
  parser.add_argument(
    "--generate",
    action="store_true",
    help="time decoding; the options below are for it",
  )
  add("--batch", default=1, help="sequences")
  add("--num_layers", default=2, help="layers")
  add("--steps", default=generate.STEPS, help="tokens of a call")
  parser.add_argument(
    "--dtype", help="default: float32 on a CPU, else bfloat16"
  )
  args = parser.parse_args()
  device = jax.devices()[0]
  if args.dtype is None:
    args.dtype = "float32" if device.platform == "cpu" else "bfloat16"
  kind = device.device_kind
  if device.platform == "cpu":
    kind = f"{platform.machine()} CPU"
  dtype = args.dtype if args.generate else "float32"
  print(f"device: {kind}, jax {jax.__version__}, {dtype}")
  if args.generate:
    _decode_table(args)
    return
  print("| tokens | implementation | ms | spread | workspace MB |")
  print("|---:|---|---:|---:|---:|")
  for tokens in args.tokens:
    inputs = _inputs(args, tokens)
    losses: dict[str, Callable] = {
      name: functools.partial(_msa_loss, args, name)
      for name in ("xla", "reference")
    }
    losses["dense GQA, no KL"] = _dense_loss
    for name, loss in losses.items():
      if name != "xla" and tokens > _REFERENCE_LIMIT:
        continue
      median, spread, memory = _measure(loss, inputs, args.repeats)
      print(
        f"| {tokens:,} | {name} | {median * 1e3:.0f} | {spread * 1e3:.0f} |"
        f" {memory / 1e6:,.0f} |",
        flush=True,
      )


if __name__ == "__main__":
  main()
