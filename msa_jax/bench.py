"""Time and memory of the portable implementations on this device.

One training step of the operation (forward, backward and KL) by `"xla"` and
`"reference"`, beside dense GQA by `jax.nn.dot_product_attention` (forward and
backward, without KL):

    python -m msa_jax.bench --tokens 1024 4096 16384

Kernels for Hopper GPUs have a benchmark of their own, `pallas_kernels.bench`.
"""

from __future__ import annotations

import argparse
import functools
import platform
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

import msa_jax

# The reference holds several T x T arrays a head.
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
  """Median and spread of the seconds of one step, and its workspace."""
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


def main() -> None:
  parser = argparse.ArgumentParser(
    prog="python -m msa_jax.bench",
    description="Time forward + backward + KL of the portable implementations.",
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
  )
  add = functools.partial(parser.add_argument, type=int)
  add("--tokens", nargs="+", default=[1024, 4096, 16384], help="lengths")
  add("--num_heads", default=8, help="query heads")
  add("--num_kv_heads", default=2, help="KV heads")
  add("--head_dim", default=64, help="head and index dim")
  add("--block_size", default=64, help="tokens a block")
  add("--top_k", default=8, help="blocks kept")
  add("--repeats", default=5, help="timed steps")
  args = parser.parse_args()
  device = jax.devices()[0]
  kind = device.device_kind
  if device.platform == "cpu":
    kind = f"{platform.machine()} CPU"
  print(f"device: {kind}, jax {jax.__version__}, float32")
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
