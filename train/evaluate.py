"""Turns a model's outputs into the metrics that a run reports.

`held_out_metrics` and `layer_metrics` run a program's compiled functions on
held-out batches. The functions below them work on NumPy arrays alone.
"""

import functools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from msa_jax import context as context_lib
from msa_jax.model_config import IndexConfig
from msa_jax.segments import block_layout, document_segments
from train import data as data_lib
from train.program import Params, Program

_NO_ANSWERS = {"accuracy": None, "by_distance": None}


class LayerMetrics(NamedTuple):
  """What the layers of a model do on held-out batches, as NumPy arrays.

  Attributes:
    kl: [L], the KL loss of each layer.
    selection: chosen blocks and recalls of each layer.
    facts_found: [L], the share of the asked facts that lie in blocks which the
      layer chose (see `facts_found`); None if the data ask for no facts.
  """

  kl: np.ndarray
  selection: Any
  facts_found: np.ndarray | None


def held_out_metrics(
  program: Program,
  params: Params,
  source: data_lib.Source,
  phase: str,
  *,
  batches: int,
  probe_batches: int,
  by_choice: bool = False,
) -> dict[str, Any]:
  """Loss and answers on the held-out batches, and answers to the probes.

  Args:
    program: of the model.
    params: its parameters.
    source: the data.
    phase: "dense", "warmup" or "sparse".
    batches: how many held-out batches to evaluate.
    probe_batches: how many batches of each probe to evaluate.
    by_choice: also counts the answers by whether each msa layer chose the
      block of the fact. The data must ask for facts, and the model must have
      an msa layer.

  Returns:
    The fields of an "eval" record. Those of a probe begin with its name.
  """
  run = functools.partial(_evaluate_batches, program, params, source, phase)
  get = functools.partial(source.eval_batch, **program.eval_shape)
  losses, counts, sizes, answers = run(
    map(get, range(batches)), by_choice=by_choice and not source.probes
  )
  # Where there are probes, they say what the answers of a mixture do not.
  if source.probes:
    answers = _NO_ANSWERS
  result = {**_loss_metrics(losses, counts, sizes), **answers}
  for name in source.probes:
    get = functools.partial(source.probe_batch, name, **program.eval_shape)
    *_, answers = run(map(get, range(probe_batches)), by_choice=by_choice)
    result |= {f"{name}_{key}": value for key, value in answers.items()}
  return result


def context_imbalance(program: Program, batch: data_lib.Batch) -> float | None:
  """`msa_jax.context.imbalance` of the index scores of a packed batch.

  None without documents, or if no mesh axis splits the sequences: plain rows
  are balanced.
  """
  devices = program.mesh.shape["context"]
  if devices == 1 or batch.segment_ids is None:
    return None
  ids = batch.segment_ids[:, : program.config.context]
  slot = np.arange(ids.shape[1])
  begins = np.diff(ids, axis=1, prepend=-1) != 0
  positions = slot - np.maximum.accumulate(np.where(begins, slot, 0), axis=1)
  # Padding sees nothing.
  return context_lib.imbalance(np.where(ids > 0, positions, -1), devices)


def window_metrics(
  program: Program, params: Params, source: data_lib.Source, *, batches: int
) -> dict[str, Any]:
  """Loss on the held-out batches where tokens far back are not seen.

  Each batch row is cut into pieces that overlap by `eval_window` tokens, and
  each target is evaluated in the first piece that holds it. So it sees at least
  `eval_window` tokens before it, or all, and depends on nothing farther back
  than the piece is long. The model reads a piece as it reads any row. Attention
  with a window in every layer would measure something else: the layers pass on
  what lies farther back, and the weights were not trained with it.

  Args:
    program: of a run with `evaluates_window`.
    params: its parameters.
    source: the data.
    batches: how many held-out batches to evaluate.

  Returns:
    The fields of a "window_eval" record: those of an "eval" record for the same
    targets, without answers; "window", the tokens that a target's query sees
    before it at least; and "window_most", the length of a piece.
  """
  window, length = program.config.eval_window, program.window_piece
  assert window is not None
  last = program.config.context - length
  starts = [*range(0, last, length - window), last]
  losses, counts, sizes = [], [], []
  for number in range(batches):
    batch = source.eval_batch(number, **program.eval_shape)
    batch.check_ids(program.model_config.vocab_size)
    pieces = []
    for start in starts:
      tokens = batch.tokens[:, start : start + length + 1]
      mask = batch.loss_mask[:, start : start + length]
      ids = batch.segment_ids
      if ids is not None:
        ids = ids[:, start : start + length + 1]
      operands = program.put(tokens), program.put(mask)
      operands += program.put_segments(ids)
      pieces.append(program.call("evaluate", "window", params, *operands)[0])
    loss, done = np.zeros(batch.loss_mask.shape), 0
    for start, piece in zip(starts, pieces):
      loss[:, done : start + length] = np.asarray(piece)[:, done - start :]
      done = start + length
    losses.append(sum_by_position(loss, batch))
    counts.append(sum_by_position(batch.loss_mask, batch).astype(int))
    sizes.append(count_bytes(source, batch))
  return {
    **_loss_metrics(np.stack(losses), np.stack(counts), sizes),
    "window": window,
    "window_most": length,
  }


def _loss_metrics(
  losses: np.ndarray, counts: np.ndarray, sizes: list[int | None]
) -> dict[str, Any]:
  """The losses of a record.

  Args:
    losses: float [batch, position], summed over its targets.
    counts: int [batch, position], their number.
    sizes: bytes of each batch.
  """
  batch_losses, targets = losses.sum(1), counts.sum(1)
  total = float(batch_losses.sum())
  return {
    "loss": total / int(targets.sum()),
    "bits_per_byte": bits_per_byte(total, sizes),
    "batch_loss": (batch_losses / np.maximum(targets, 1)).tolist(),
    "loss_by_position": loss_by_position(losses.sum(0), counts.sum(0)),
  }


def _evaluate_batches(
  program: Program,
  params: Params,
  source: data_lib.Source,
  phase: str,
  batches: Iterable[data_lib.Batch],
  by_choice: bool = False,
) -> tuple[np.ndarray, np.ndarray, list[int | None], dict[str, Any]]:
  """Evaluates batches.

  Returns:
    Summed loss and number of targets, both [batch, position]; the bytes of
    each batch; the answers of all batches together.
  """
  losses, counts, sizes, right, distances = [], [], [], [], []
  far, found, numbers = [], [], []

  def read(batch: data_lib.Batch, loss, correct, chosen=None) -> None:
    asked = batch.answers
    losses.append(sum_by_position(np.asarray(loss, np.float64), batch))
    counts.append(sum_by_position(batch.loss_mask, batch).astype(int))
    sizes.append(count_bytes(source, batch))
    right.append(np.asarray(correct)[asked])
    distances.append(batch.distance[asked])
    if batch.number is not None:
      numbers.append(np.where(asked, batch.number, -1))
    if chosen is not None:
      beyond, held = facts_found(
        np.asarray(chosen),
        batch.distance,
        program.model_config.index,
        batch.segment_ids,
      )
      far.append(beyond)
      found.append(held)

  before = None
  for batch in batches:
    batch.check_ids(program.model_config.vocab_size)
    tokens, mask = program.put(batch.tokens), program.put(batch.loss_mask)
    ids = program.put_segments(batch.segment_ids)
    result = program.call("evaluate", phase, params, tokens, mask, *ids)
    if by_choice:
      result = (*result, program.call("choose", phase, params, tokens, *ids))
    # A batch's results are read while the device computes the next batch.
    if before is not None:
      read(*before)
    before = batch, *result
  if before is not None:
    read(*before)
  answers: dict[str, Any] = dict(_NO_ANSWERS)
  hits, apart = np.concatenate(right), np.concatenate(distances)
  facts = apart >= 0
  if hits.size:
    answers["accuracy"] = float(hits.mean())
  if facts.any():
    answers["by_distance"] = answers_by_distance(hits[facts], apart[facts])
  if hits.size and numbers:
    answers["by_number"] = answers_by_number(hits, np.concatenate(numbers))
  if found and facts.any():
    layers = answers_by_choice(
      hits[facts][np.concatenate(far)], np.concatenate(found)
    )
    answers["by_choice"] = [
      {"layer": layer, **layers[layer]} for layer in program.msa_layers
    ]
  return np.stack(losses), np.stack(counts), sizes, answers


def layer_metrics(
  program: Program, params: Params, source: data_lib.Source, phase: str
) -> LayerMetrics:
  """What the layers do on the first held-out batch.

  Facts are those of the first batch that asks for any: a probe's, if the data
  have probes.
  """

  def run(function: str, batch: data_lib.Batch):
    operands = (
      program.put(batch.tokens),
      *program.put_segments(batch.segment_ids),
    )
    return jax.device_get(program.call(function, phase, params, *operands))

  batch = source.eval_batch(0, **program.eval_shape)
  kl, selection = run("layer_metrics", batch)
  chosen = selection.block_indices
  if source.probes:
    batch = source.probe_batch(source.probes[0], 0, **program.eval_shape)
    chosen = run("choose", batch)
  _, found = facts_found(
    chosen, batch.distance, program.model_config.index, batch.segment_ids
  )
  return LayerMetrics(kl, selection, found.mean(0) if found.size else None)


def layer_records(program: Program, metrics: LayerMetrics) -> list[dict]:
  """The "layers" of a record: KL and recalls of each msa layer; None for what
  is not defined."""

  def number(value) -> float | None:
    return float(value) if math.isfinite(value) else None

  found, selection = metrics.facts_found, metrics.selection
  return [
    {
      "layer": layer,
      "kl": number(metrics.kl[layer]) if program.has_index else None,
      "block_recall": number(selection.block_recall[layer]),
      "score_recall": number(selection.score_recall[layer]),
      "best_score_recall": number(selection.best_score_recall[layer]),
      "facts_found": None if found is None else number(found[layer]),
    }
    for layer in program.msa_layers
  ]


def router_records(program: Program, load: np.ndarray) -> list[dict]:
  """The "router" of a record: the largest and smallest load of an expert in
  each MoE layer, as multiples of the mean load.

  Args:
    program: of the model.
    load: [MoE layer, X], tokens that chose each expert.
  """
  shares = load / load.mean(axis=-1, keepdims=True)
  return [
    {
      "layer": layer,
      "max_load": float(share.max()),
      "min_load": float(share.min()),
    }
    for layer, share in zip(program.moe_layers, shares, strict=True)
  ]


# ------------------------------------------------------ NumPy arrays alone


def count_bytes(source: data_lib.Source, batch: data_lib.Batch) -> int | None:
  """Bytes of text that the counted targets of a batch stand for; None if some
  of the targets are not text."""
  if source.token_bytes is None or batch.answers.any():
    return None
  targets = batch.tokens[:, 1:][batch.loss_mask]
  return int(source.token_bytes[targets].sum())


def bits_per_byte(nats: float, sizes: list[int | None]) -> float | None:
  """Bits per byte of text.

  Args:
    nats: the summed loss of the text.
    sizes: bytes of each part of the text; None counts as 0.

  Returns:
    None if there are no bytes.
  """
  total = sum(size or 0 for size in sizes)
  return nats / math.log(2) / total if total else None


def sum_by_position(values: np.ndarray, batch: data_lib.Batch) -> np.ndarray:
  """Sums values [B, T] over the inputs with as many tokens before them in their
  document: float [T]."""
  if batch.segment_ids is None:
    return values.sum(0)
  positions = batch.positions().ravel()
  return np.bincount(positions, values.ravel(), minlength=values.shape[1])


def _octaves(tokens: np.ndarray) -> np.ndarray:
  """floor(log2(x)) of each number x; 0 for x = 0."""
  return np.log2(np.maximum(tokens, 1)).astype(int)


def answers_by_distance(right: np.ndarray, distances: np.ndarray) -> list[dict]:
  """Accuracy by distance, in bins low <= distance < high of powers of two.

  Args:
    right: bool [fact], whether each answer is right.
    distances: int [fact], tokens back to each fact.
  """
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


def answers_by_number(right: np.ndarray, numbers: np.ndarray) -> list[dict]:
  """Accuracy by the number of a task, such as that of hops.

  Args:
    right: bool [answer], whether each answer is right.
    numbers: int [batch row, T], the numbers of the answers; -1 where there is
      none.

  Returns:
    For each number also the batch rows that ask with it, and the share of those
    in which all of its answers are right.
  """
  row, query = np.nonzero(numbers >= 0)
  of_answer = numbers[row, query]
  found = []
  for number in np.unique(of_answer).tolist():
    here = of_answer == number
    answers, rights = (
      np.bincount(row[here], weights, len(numbers))
      for weights in (None, right[here])
    )
    rows = int((answers > 0).sum())
    whole = (answers > 0) & (answers == rights)
    found.append(
      {
        "number": number,
        "accuracy": float(right[here].mean()),
        "count": int(here.sum()),
        "all_right": float(whole.sum()) / rows,
        "rows": rows,
      }
    )
  return found


def loss_by_position(losses: np.ndarray, counts: np.ndarray) -> list[dict]:
  """Mean loss by the number of tokens before the query, in bins low <= tokens
  < high of powers of two.

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
  block_indices: np.ndarray,
  distance: np.ndarray,
  index: IndexConfig,
  segment_ids: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """Which of the asked facts lie in chosen blocks.

  A fact is far if it lies in none of the asking token's local blocks, which
  are always chosen (its own block counts as local in any case).

  Args:
    block_indices: int32 [L, B, K, T, P], -1 where nothing is chosen.
    distance: int32 [B, T], tokens back to the fact; -1 where none is asked.
    index: sizes of the selection.
    segment_ids: int32 [B, T + 1], the documents of packed rows. A fact lies in
      the document that asks for it.

  Returns:
    far: bool [fact], whether each fact is far. Facts are in the order of
      `distance[distance >= 0]`.
    found: bool [far fact, L], whether some group of the asking token chose the
      far fact's block in each layer.
  """
  row, query = np.nonzero(distance >= 0)
  fact = query - distance[row, query]
  if segment_ids is None:
    block, own = fact // index.block_size, query // index.block_size
  else:
    ids = segment_ids[:, :-1]
    packed = document_segments(
      jnp.asarray(ids), data_lib.max_documents(ids.shape[1])
    )
    blocks = np.asarray(block_layout(packed, index.block_size).own_block)
    block, own = blocks[row, fact], blocks[row, query]
  far = own - block >= max(index.num_local_blocks, 1)
  row, query, block = row[far], query[far], block[far]
  chosen = block_indices[:, row, :, query]  # [fact, L, K, P]
  return far, (chosen == block[:, None, None, None]).any((-1, -2))


def answers_by_choice(right: np.ndarray, found: np.ndarray) -> list[dict]:
  """Right answers by whether a layer chose the block of the fact.

  Args:
    right: bool [far fact], whether each answer is right.
    found: bool [far fact, L], as `facts_found` returns it.

  Returns:
    For each layer the number of facts found and missed, and how many of each
    are answered right.
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
  """How often the queries of a block choose each block.

  Args:
    block_indices: int32 [L, B, K, T, P], -1 where nothing is chosen.
    block_size: tokens in a block.

  Returns:
    float32 [L, K, N, N]: element [.., i, j] is the share of the queries in
    block i that chose block j.
  """
  layers, _, heads, length, _ = block_indices.shape
  blocks = -(-length // block_size)
  counts = np.zeros((layers, heads, blocks, blocks), np.float32)
  for i in range(blocks):
    chosen = block_indices[:, :, :, i * block_size : (i + 1) * block_size]
    for j in range(i + 1):
      # A query chooses a block at most once, so any() counts it once.
      counts[:, :, i, j] = (chosen == j).any(-1).mean((1, 3))
  return counts
