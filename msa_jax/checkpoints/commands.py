"""`python -m msa_jax.checkpoints`: prints a checkpoint's contents, or samples.

python -m msa_jax.checkpoints show FOLDER
python -m msa_jax.checkpoints sample FOLDER --text "The weather"
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import math
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType

from msa_jax import generate
from msa_jax.checkpoints import m3
from msa_jax.checks import wrong


def describe(folder: str | os.PathLike) -> Iterator[str]:
  """Yields lines that describe a checkpoint; reads its headers only.

  Raises:
    ValueError: as `msa_jax.m3.load`.
  """
  folder = pathlib.Path(folder)
  config, checkpoint = m3.open_checkpoint(folder)
  index, moe = config.index, config.moe
  counts = m3.count_parameters(config)
  sizes = collections.Counter()
  for name, tensor in checkpoint.tensors.items():
    words = name.split(".")
    layer = int(words[2]) if name.startswith("model.layers.") else None
    sizes[layer] += math.prod(tensor.shape)
  dtypes = collections.Counter(t.dtype for t in checkpoint.tensors.values())
  size = sum(file.stat().st_size for file in checkpoint.files)
  yield (
    f"model      {config.num_layers} layers, width {config.embed_dim},"
    f" vocabulary {config.vocab_size},"
    f" {'tied' if config.tie_embeddings else 'untied'} output"
  )
  yield (
    f"attention  {config.num_heads}/{config.num_kv_heads} heads of"
    f" {config.head_dim}, rotary {config.rope_dim}, theta"
    f" {config.rope_theta:g}, {'' if config.qk_norm else 'no '}QK-norm, norms"
    f" scale by {'1 + w' if config.zero_centered_norm else 'w'}"
  )
  if "msa" in config.kinds:
    yield (
      f"sparse     blocks of {index.block_size}, top {index.top_k} with"
      f" {index.num_local_blocks} local, index {config.num_kv_heads} heads of"
      f" {index.index_dim}"
    )
  else:
    yield "sparse     none: every layer is full attention"
  if "dense" in config.mlps:
    yield f"MLP        dense of {config.mlp_dim}, {config.activation}"
  if "moe" in config.mlps:
    shared = f", shared {moe.shared_dim}" if moe.shared_dim else ""
    yield (
      f"MLP        {moe.num_experts} experts of {moe.expert_dim}, top"
      f" {moe.top_k}, scale {moe.routed_scale:g}{shared}, {config.activation}"
    )
  kinds = list(zip(config.kinds, config.mlps))
  first = 0
  for (attention, mlp), run in itertools.groupby(kinds):
    count = len(list(run))
    last = first + count - 1
    name = f"{first}" if count == 1 else f"{first}-{last}"
    each = sizes[first]
    yield f"layers     {name:8} {attention} {mlp:6} {each:,} parameters each"
    first += count
  yield (
    f"parameters {counts.total:,}: {counts.active:,} active with"
    f" {counts.embedding:,} of the embeddings, {counts.index:,} of the Index"
    " Branch"
  )
  yield "dtype      " + ", ".join(
    f"{code} ({count} tensors)" for code, count in dtypes.most_common()
  )
  yield f"files      {len(checkpoint.files)}, {size:,} bytes"
  if checkpoint.skipped:
    yield f"skipped    {checkpoint.describe_skipped()}"


def sample(
  folder: str | os.PathLike,
  *,
  text: str | None = None,
  prompt_ids: Sequence[int] = (),
  max_new_tokens: int = 64,
  sampling: generate.Sampling = generate.GREEDY,
  seed: int = 0,
  dtype: Any = None,
  mesh: jax.sharding.Mesh | None = None,
) -> Iterator[str]:
  """Continues a prompt with a checkpoint's model.

  Args:
    folder: the checkpoint; `text` also needs its tokenizer.json.
    text: the prompt as text; either this or prompt_ids must be given.
    prompt_ids: the prompt as tokens.
    max_new_tokens: the most tokens to make; config.json's eos_token_id ends the
      text earlier.
    sampling: how to draw.
    seed: seed of the draws.
    dtype, mesh: see `msa_jax.m3.load`.

  Yields:
    The prompt, then new text (or token ids) as it comes.

  Raises:
    ValueError: an argument is wrong, or as `msa_jax.m3.load`.
  """
  folder = pathlib.Path(folder)
  if (text is None) == (not prompt_ids):
    raise wrong(
      "text or prompt_ids",
      "given, and not both",
      "neither" if text is None else "both",
    )
  tokenizer = None
  if text is not None:
    tokenizer = _tokenizer(folder)
    prompt_ids = tokenizer.encode(text).ids
  stop = _check_sample(folder, prompt_ids, max_new_tokens)
  model = m3.load(folder, dtype=dtype, mesh=mesh)

  def show(ids: Sequence[int]) -> str:
    if tokenizer is None:
      return "".join(f"{i} " for i in ids)
    return tokenizer.decode(ids, skip_special_tokens=False)

  yield show(prompt_ids) if text is None else text
  done, shown = [], 0
  with jax.set_mesh(mesh):
    for (new,) in generate.stream(
      model,
      [np.asarray(prompt_ids)],
      max_new_tokens=max_new_tokens,
      sampling=sampling,
      key=jax.random.key(seed),
      stop_tokens=stop,
    ):
      done.extend(i for i in new.tolist() if i not in stop)
      written = show(done)
      # The tokenizer decodes an incomplete character as U+FFFD; the next tokens
      # may complete it.
      ready = len(written.rstrip("\ufffd"))
      yield written[shown:ready]
      shown = max(shown, ready)
  yield show(done)[shown:]


def _tokenizer(folder: pathlib.Path) -> Any:
  path = folder / "tokenizer.json"
  if not path.exists():
    raise ValueError(
      f"text needs {path}, which is missing; give prompt_ids instead"
    )
  try:
    import tokenizers
  except ModuleNotFoundError as error:
    raise ValueError(
      f"text: {error}. It needs: pip install 'msa-jax[train]'"
    ) from None
  return tokenizers.Tokenizer.from_file(str(path))


def _check_sample(
  folder: pathlib.Path, prompt_ids: Sequence[int], max_new_tokens: int
) -> tuple[int, ...]:
  """Checks the arguments against config.json, before weights are read.

  Returns:
    The stop tokens: config.json's eos_token_id, which holds none, one or many.
  """
  config = m3.read_config(folder)
  outside = [i for i in prompt_ids if not 0 <= i < config.vocab_size]
  if outside or not len(prompt_ids):
    raise wrong(
      "the prompt",
      f"one or more ids below vocab_size = {config.vocab_size}",
      str(outside or "none"),
    )
  whole = json.loads((folder / "config.json").read_text())
  fields = {**whole, **(whole.get("text_config") or {})}
  most = fields.get("max_position_embeddings")
  if most is not None and len(prompt_ids) + max_new_tokens > most:
    raise ValueError(
      f"the prompt's {len(prompt_ids)} tokens and {max_new_tokens} new ones"
      f" must be at most max_position_embeddings = {most}"
    )
  stop = whole.get("eos_token_id")
  if stop is None:
    stop = fields.get("eos_token_id")
  if stop is None:
    return ()
  return tuple(stop) if isinstance(stop, list) else (stop,)


def _mesh(sizes: Sequence[str]) -> jax.sharding.Mesh | None:
  """The mesh that "axis=size" words describe; None if there are none."""
  if not sizes:
    return None
  axes = {}
  for word in sizes:
    name, _, size = word.partition("=")
    if not size.isdigit() or int(size) < 1:
      raise wrong("--mesh", "AXIS=SIZE words, such as expert=8", repr(word))
    axes[name] = int(size)
  # One prompt is sampled, and "data" and "fsdp" would split the batch.
  known = ("expert", "tensor")
  if not set(axes) <= set(known):
    raise wrong("--mesh", f"of axes among {known}", " ".join(sizes))
  count = math.prod(axes.values())
  if count > jax.device_count():
    raise wrong(
      "--mesh",
      f"a mesh of at most the {jax.device_count()} devices that are here",
      f"{' '.join(sizes)}, which needs {count} devices",
    )
  return jax.make_mesh(
    tuple(axes.values()),
    tuple(axes),
    devices=jax.devices()[:count],
    axis_types=(AxisType.Auto,) * len(axes),
  )


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m msa_jax.checkpoints",
    description="Look into a MiniMax-M3 checkpoint, or sample from it.",
  )
  commands = parser.add_subparsers(dest="command", required=True)
  about = "Print what a checkpoint folder holds, without reading weights."
  show = commands.add_parser("show", help=about, description=about)
  about = "Continue a prompt with a checkpoint's model."
  sample = commands.add_parser("sample", help=about, description=about)
  for command in (show, sample):
    command.add_argument("folder", type=pathlib.Path)
  add = sample.add_argument
  add("--text", help="the prompt; needs the folder's tokenizer.json")
  add(
    "--prompt-ids",
    nargs="+",
    type=int,
    default=(),
    help="the prompt as tokens, instead of --text",
  )
  add("--max-new-tokens", type=int, default=64, help="default: 64")
  add("--temperature", type=float, default=0.0, help="default: 0, greedy")
  add("--top-k", type=int, help="draw from this many of the likeliest tokens")
  add("--top-p", type=float, help="draw from tokens of this total probability")
  add("--seed", type=int, default=0, help="seed of the draws")
  add("--dtype", help="dtype of the computation (default: the checkpoint's)")
  add(
    "--mesh",
    nargs="+",
    default=(),
    metavar="AXIS=SIZE",
    help="devices: expert and tensor (default: one device)",
  )
  return parser


def main(arguments: Sequence[str] | None = None) -> int:
  args = _parser().parse_args(arguments)
  try:
    if args.command == "show":
      for line in describe(args.folder):
        print(line)
      return 0
    for part in sample(
      args.folder,
      text=args.text,
      prompt_ids=args.prompt_ids,
      max_new_tokens=args.max_new_tokens,
      sampling=generate.Sampling(
        temperature=args.temperature, top_k=args.top_k, top_p=args.top_p
      ),
      seed=args.seed,
      dtype=args.dtype,
      mesh=_mesh(args.mesh),
    ):
      print(part, end="", flush=True)
    print()
  except (ValueError, NotImplementedError, FloatingPointError, OSError) as e:
    print(f"error: {e}", file=sys.stderr)
    return 1
  return 0
