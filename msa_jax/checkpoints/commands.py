"""`python -m msa_jax.checkpoints`: prints a checkpoint's contents, or samples.

python -m msa_jax.checkpoints show FOLDER
python -m msa_jax.checkpoints sample FOLDER --text "The weather"
"""

from __future__ import annotations

import argparse
import collections
import itertools
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
from msa_jax.checkpoints import folders, generation, gguf_files
from msa_jax.checkpoints.fields import read_json
from msa_jax.checkpoints.quantised import Quantised
from msa_jax.checks import check_rope_dim, wrong


def describe(folder: str | os.PathLike) -> Iterator[str]:
  """Yields lines that describe a checkpoint; reads its headers only.

  Raises:
    ValueError: as `msa_jax.checkpoints.load`.
  """
  folder = pathlib.Path(folder)
  about, checkpoint, _ = folders.open_checkpoint(folder)
  config = about.config
  index, moe = config.index, config.moe
  counts = folders.count_parameters(config)
  sizes = collections.Counter()
  for name, tensor in checkpoint.tensors.items():
    words = name.split(".")
    layer = int(words[2]) if name.startswith("model.layers.") else None
    sizes[layer] += math.prod(tensor.shape)
  dtypes = collections.Counter(
    f"{t.codes.dtype} with {t.scales.dtype} scales"
    if isinstance(t, Quantised)
    else t.dtype
    for t in checkpoint.tensors.values()
  )
  size = sum(file.stat().st_size for file in checkpoint.files)
  yield f"family     {about.family.title}"
  yield (
    f"model      {config.num_layers} layers, width {config.embed_dim},"
    f" vocabulary {config.vocab_size},"
    f" {'tied' if config.tie_embeddings else 'untied'} output"
  )
  scaling = config.rope_scaling
  scaled = f" slowed by {scaling.factor:g}" if scaling else ""
  qk_norm = "QK-norm" if config.qk_norm else "no QK-norm"
  if config.qk_norm and config.qk_norm_over == "projection":
    qk_norm = "QK-norm over the projection"
  yield (
    f"attention  {config.num_heads}/{config.num_kv_heads} heads of"
    f" {config.head_dim}, rotary {config.rope_dim}, theta"
    f" {config.rope_theta:g}{scaled}, {qk_norm}, norms"
    f" scale by {'1 + w' if config.zero_centered_norm else 'w'}"
  )
  if "msa" in config.kinds:
    rotary = check_rope_dim(config.rope_dim, config.head_dim)
    yield (
      f"sparse     blocks of {index.block_size}, top {index.top_k} with"
      f" {index.num_local_blocks} local, index {config.num_kv_heads} heads of"
      f" {index.index_dim}, rotary {index.rotated(rotary)}"
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
  chat: str | None = None,
  prompt_ids: Sequence[int] = (),
  max_new_tokens: int = 64,
  sampling: generate.Sampling | None = None,
  seed: int = 0,
  dtype: Any = None,
  mesh: jax.sharding.Mesh | None = None,
) -> Iterator[str]:
  """Continues a prompt with a checkpoint's model.

  Args:
    folder: the checkpoint; `text` and `chat` also need its tokenizer.json.
    text: the prompt as text; one of text, chat and prompt_ids must be given.
    chat: a user's message, which the folder's chat template makes a prompt of.
    prompt_ids: the prompt as tokens.
    max_new_tokens: the most tokens to make; the eos_token_id of
      generation_config.json, or else of config.json, ends the text earlier.
    sampling: how to draw; None: as generation_config.json says, or else
      config.json, or greedily.
    seed: seed of the draws.
    dtype, mesh: see `msa_jax.checkpoints.load`.

  Yields:
    The prompt, then new text (or token ids) as it comes.

  Raises:
    ValueError: an argument is wrong, or as `msa_jax.checkpoints.load`.
  """
  folder = pathlib.Path(folder)
  given = {"text": text, "chat": chat, "prompt_ids": prompt_ids or None}
  given = [name for name, value in given.items() if value is not None]
  if len(given) != 1:
    raise wrong(
      "one of text, chat and prompt_ids", "given", " and ".join(given) or "none"
    )
  stop, sampling = generation.read_generation(folder, sampling)
  tokenizer = None
  if not prompt_ids:
    tokenizer = generation.read_tokenizer(folder)
    if chat is not None:
      # The template has written the special tokens already.
      text = generation.chat_prompt(folder, chat)
      prompt_ids = tokenizer.encode(text, add_special_tokens=False).ids
    else:
      prompt_ids = tokenizer.encode(text).ids
  _check_sample(folder, prompt_ids, max_new_tokens)
  model = folders.load(folder, dtype=dtype, mesh=mesh)

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


def _check_sample(
  folder: pathlib.Path, prompt_ids: Sequence[int], max_new_tokens: int
) -> None:
  """Checks the arguments against config.json, before weights are read."""
  config = folders.read_config(folder)
  outside = [i for i in prompt_ids if not 0 <= i < config.vocab_size]
  if outside or not len(prompt_ids):
    raise wrong(
      "the prompt",
      f"one or more ids below vocab_size = {config.vocab_size}",
      str(outside or "none"),
    )
  fields = folders.text_fields(read_json(folder / "config.json"))
  most = fields.get("max_position_embeddings")
  if most is not None and len(prompt_ids) + max_new_tokens > most:
    raise ValueError(
      f"the prompt's {len(prompt_ids)} tokens and {max_new_tokens} new ones"
      f" must be at most max_position_embeddings = {most}"
    )


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
    description="Look into a checkpoint, or sample from it.",
  )
  commands = parser.add_subparsers(dest="command", required=True)
  about = "Print what a checkpoint folder holds, without reading weights."
  show = commands.add_parser("show", help=about, description=about)
  about = "Continue a prompt with a checkpoint's model."
  sample = commands.add_parser("sample", help=about, description=about)
  about = "Write a GGUF file of a Llama model as a checkpoint folder."
  convert = commands.add_parser("from-gguf", help=about, description=about)
  convert.add_argument("file", type=pathlib.Path)
  for command in (show, sample, convert):
    command.add_argument("folder", type=pathlib.Path)
  add = sample.add_argument
  add("--text", help="the prompt; needs the folder's tokenizer.json")
  add("--chat", help="a message that the folder's chat template makes a prompt")
  add(
    "--prompt-ids",
    nargs="+",
    type=int,
    default=(),
    help="the prompt as tokens, instead of --text",
  )
  add("--max-new-tokens", type=int, default=64, help="default: 64")
  add(
    "--temperature",
    type=float,
    help="0: greedy. Without this, --top-k and --top-p, the folder's"
    " generation_config.json decides (default: greedy)",
  )
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
    if args.command == "from-gguf":
      gguf_files.from_gguf(args.file, args.folder)
      return 0
    sampling = None
    given = (args.temperature, args.top_k, args.top_p)
    if any(value is not None for value in given):
      sampling = generate.Sampling(
        temperature=args.temperature or 0.0, top_k=args.top_k, top_p=args.top_p
      )
    for part in sample(
      args.folder,
      text=args.text,
      chat=args.chat,
      prompt_ids=args.prompt_ids,
      max_new_tokens=args.max_new_tokens,
      sampling=sampling,
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
