"""Numbers that runs report, from NumPy arrays: bits per byte, answers by
distance, loss by position, facts in chosen blocks."""

import math

import numpy as np

from msa_jax.model_config import IndexConfig
from train import data as data_lib


def count_bytes(source: data_lib.Source, batch: data_lib.Batch) -> int | None:
  """Bytes of text that a batch's counted targets stand for; None if not all of
  them are text."""
  if source.token_bytes is None or (batch.distance >= 0).any():
    return None
  targets = batch.tokens[:, 1:][batch.loss_mask]
  return int(source.token_bytes[targets].sum())


def bits_per_byte(nats: float, sizes: list[int | None]) -> float | None:
  """Bits that a byte costs, of a summed loss in nats."""
  total = sum(size or 0 for size in sizes)
  return nats / math.log(2) / total if total else None


def _octaves(tokens: np.ndarray) -> np.ndarray:
  """The power of two below each number; that of 1 for 0."""
  return np.log2(np.maximum(tokens, 1)).astype(int)


def answers_by_distance(right: np.ndarray, distances: np.ndarray) -> list[dict]:
  """Accuracy by distance, low <= distance < high, in powers of two."""
  bins = _octaves(distances)
  return [
    {
      "low": 2**i,
      "high": 2 ** (i + 1),
      "accuracy": float(right[bins == i].mean()),
      "count": int((bins == i).sum()),
    }
    for i in sorted(set(bins.tolist()))
  ]


def loss_by_position(losses: np.ndarray, counts: np.ndarray) -> list[dict]:
  """Mean loss by how many tokens the query comes after, low <= tokens < high,
  in powers of two.

  Args:
    losses: float [T], summed over the targets of each query position.
    counts: int [T], their number.
  """
  bins = _octaves(np.arange(losses.size))
  found = []
  for i in range(bins[-1] + 1):
    here = bins == i
    count = int(counts[here].sum())
    if count:
      found.append(
        {
          "low": 2**i if i else 0,
          "high": 2 ** (i + 1),
          "loss": float(losses[here].sum()) / count,
          "count": count,
        }
      )
  return found


def facts_found(
  block_indices: np.ndarray, distance: np.ndarray, index: IndexConfig
) -> tuple[np.ndarray, np.ndarray]:
  """Which of the facts that are asked for lie in chosen blocks.

  Args:
    block_indices: int32 [L, B, K, T, P], -1 where nothing is chosen.
    distance: int32 [B, T], tokens back to the fact; -1: nothing is asked.
    index: sizes of the selection.

  Returns:
    bool [fact], for the facts in the order of `distance[distance >= 0]`:
    whether a fact lies beyond the local blocks (at least the own); bool
    [far fact, L], for those: whether some group of the asking token chose its
    block.
  """
  row, query = np.nonzero(distance >= 0)
  block = (query - distance[row, query]) // index.block_size
  own = query // index.block_size
  far = own - block >= max(index.num_local_blocks, 1)
  row, query, block = row[far], query[far], block[far]
  chosen = block_indices[:, row, :, query]  # [fact, L, K, P]
  return far, (chosen == block[:, None, None, None]).any((-1, -2))


def answers_by_choice(right: np.ndarray, found: np.ndarray) -> list[dict]:
  """Answers where a layer's chosen blocks held the fact, and where not.

  Args:
    right: bool [fact], of facts beyond the local blocks.
    found: bool [fact, L], as of `facts_found`.

  Returns:
    For each layer: facts found and missed, and how many of each are answered.
  """
  return [
    {
      "found": int(held.sum()),
      "found_right": int((right & held).sum()),
      "missed": int((~held).sum()),
      "missed_right": int((right & ~held).sum()),
    }
    for held in found.T
  ]


def selection_counts(block_indices: np.ndarray, block_size: int) -> np.ndarray:
  """Which blocks the queries of a block choose.

  Args:
    block_indices: int32 [L, B, K, T, P], -1 where nothing is chosen.
    block_size: tokens in a block.

  Returns:
    float32 [L, K, Nq, Nk]: the share of the queries in block i that chose j.
  """
  layers, _, heads, length, _ = block_indices.shape
  blocks = -(-length // block_size)
  counts = np.zeros((layers, heads, blocks, blocks), np.float32)
  for i in range(blocks):
    chosen = block_indices[:, :, :, i * block_size : (i + 1) * block_size]
    for j in range(i + 1):
      # A query chooses a block once, so any() counts it right.
      counts[:, :, i, j] = (chosen == j).any(-1).mean((1, 3))
  return counts
