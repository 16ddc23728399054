"""Training data: batches that are a pure function of (seed, step).

There are these kinds of data behind one interface, `Source`:

- `TextConfig`: real text (see `train.corpus`). Rows hold whole documents, which
  see nothing of each other; an epoch visits every row once. With rows="stream"
  there is one token stream for each split: training windows start anywhere in
  it with equal probability, and held-out windows lie side by side and never
  overlap.
- `TokensConfig`: tokens that were made elsewhere, in rows like those of text.
- `FactoryConfig`: a `Source` of your own.
- `RecallConfig`: associative recall. Facts (key -> value) lie scattered over
  the context, a later query names a key, and only the value that answers it is
  a target. The distance back to the fact is log-uniform, so that accuracy can
  be drawn against distance.
- `ProbesConfig`: tasks that need several facts, or the whole context (see
  `train.probes`). Each of them is a probe as well.
- `MixConfig`: text and recall for one model. Some batch rows are recall alone,
  and the others are text with facts planted in it (needles). Held-out text has
  no needles. Two probes evaluate needles and recall.

A source keeps no position. A run therefore needs only its step to resume, and
two models that are compared see the same tokens.
"""

import abc
import dataclasses
import functools
import hashlib
import importlib
import itertools
import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32

from train.corpus import (
  TextConfig,
  TokensConfig,
  open_corpus,
  open_tokenizer,
)
from train.probes import Ids, ProbesConfig, make_row

_TRAIN_STREAM, _EVAL_STREAM, _MIX_STREAM = 0, 1, 2


class Batch(NamedTuple):
  """One batch on the host; inputs are tokens[:, :-1], targets tokens[:, 1:].

  Attributes:
    tokens: token ids.
    loss_mask: the targets that count in the loss.
    distance: where the target answers a query, the number of tokens from the
      query back to the fact that it asks for; -1 elsewhere.
    segment_ids: the document of each token, counted from 1 in each row; 0 for
      padding. None if rows are not packed.
    number: where the target answers a query of `train.probes`, the number by
      which its task is reported, such as that of hops; -1 elsewhere. None for
      other data.
  """

  tokens: Int32[np.ndarray, "B T+1"]
  loss_mask: Bool[np.ndarray, "B T"]
  distance: Int32[np.ndarray, "B T"]
  segment_ids: Int32[np.ndarray, "B T+1"] | None = None
  number: Int32[np.ndarray, "B T"] | None = None

  @property
  def answers(self) -> Bool[np.ndarray, "B T"]:
    """The targets that answer a query."""
    told = self.distance >= 0
    return told if self.number is None else told | (self.number >= 0)

  @classmethod
  def of(
    cls,
    tokens: Int32[np.ndarray, "B T+1"],
    segment_ids: Int32[np.ndarray, "B T+1"] | None = None,
  ) -> "Batch":
    """A batch of text, in which all targets count but padding and the first
    token of each document: what stands before it is the end of another one."""
    counted = np.ones((len(tokens), tokens.shape[1] - 1), np.bool_)
    if segment_ids is not None:
      left, right = segment_ids[:, :-1], segment_ids[:, 1:]
      counted = (left == right) & (right > 0)
    distance = np.full(counted.shape, -1, np.int32)
    return cls(tokens.astype(np.int32), counted, distance, segment_ids)

  def check_ids(self, vocab_size: int) -> None:
    """Refuses ids that a model does not have: on a device negative ones would
    silently count from the end, and others give NaN without saying why.

    Raises:
      ValueError: an id is out of range.
    """
    low, high = int(self.tokens.min()), int(self.tokens.max())
    if low < 0 or high >= vocab_size:
      raise ValueError(
        f"data: a batch has ids from {low} to {high}: wanted 0 to"
        f" {vocab_size - 1} (model.vocab_size={vocab_size})."
      )

  def positions(self) -> Int32[np.ndarray, "B T"]:
    """Tokens before each input in its document; anything for padding."""
    shape = self.loss_mask.shape
    slot = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    if self.segment_ids is None:
      return slot
    ids = self.segment_ids[:, :-1]
    first = np.diff(ids, axis=1, prepend=0) != 0
    return slot - np.maximum.accumulate(np.where(first, slot, 0), axis=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecallConfig:
  """Associative recall over distances up to a chosen one.

  After a start token the context is divided into cells of two tokens. A fact
  fills one cell. Its query fills a later one, with the key and then the value,
  which the model must predict. All other tokens are fillers. A sequence states
  and asks for each key once, so that only the fact itself can give the answer.
  Values are drawn independently: a model that does not see the fact has an
  accuracy of 1 / num_values.
  """

  num_keys: int = 32
  num_values: int = 8
  num_fillers: int = 1
  """Number of different filler tokens. The task takes longer to learn with more
  of them."""

  num_facts: int = 32
  """Facts drawn for a sequence. Those whose cells are already taken are
  dropped."""

  tokens_per_fact: Literal[1, 2] = 1
  """1: a fact is one token, which stands for the pair (key, value); one
  attention layer can answer. 2: a fact is the key and then the value; answering
  takes two layers (an induction circuit) and far longer to learn."""

  max_distance: int | None = None
  """The longest distance in tokens; None: the whole context."""

  def __post_init__(self):
    wanted = {"num_keys": 1, "num_values": 2, "num_fillers": 1, "num_facts": 1}
    for name, least in wanted.items():
      if getattr(self, name) < least:
        raise ValueError(
          f"{name}={getattr(self, name)}: wanted at least {least}."
        )
    if self.num_facts > self.num_keys:
      raise ValueError(
        f"num_facts={self.num_facts} is more than num_keys={self.num_keys}:"
        " a sequence states each key once."
      )
    if self.tokens_per_fact not in (1, 2):
      raise ValueError(
        f"tokens_per_fact={self.tokens_per_fact}: wanted 1 or 2."
      )
    if self.max_distance is not None and self.max_distance < 2:
      raise ValueError(
        f"max_distance={self.max_distance}: wanted at least 2, or None."
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixConfig:
  """Real text and retrieval for one model.

  A share of the batch rows is associative recall among fillers. The others are
  windows of text in which `num_needles` facts and their queries overwrite a few
  tokens. Both kinds use the same facts, whose ids follow those of the text.

  Small language models do not learn from text alone to retrieve over 16K
  tokens. Facts are therefore part of the training data, so that the answers
  show whether attention reaches the facts, and not whether the model
  understands the question.
  """

  text: TextConfig
  recall: RecallConfig

  recall_share: float = 0.25
  """Share of the training batch rows that are recall alone."""

  num_needles: int = 32
  """Facts drawn for a batch row of text; at most recall.num_keys."""

  asks: int = 1
  """How often a training batch row asks for each fact, every time from another
  position. Probes ask once, because a later query can be answered from an
  earlier one."""

  facts: Literal["tokens", "words"] = "tokens"
  """What facts, queries and fillers are made of. tokens: ids of their own,
  which follow those of the text. words: words that are one token each in the
  text's tokenizer, for models that know them already; a document's end starts a
  batch row of recall. Needs a tokenizer.json and recall.tokens_per_fact=2."""

  answer_share: float = 0.2
  """The weight of all answers of a batch together, as a share of the loss,
  whatever their number."""

  probes: ProbesConfig | None = None
  """Further tasks. Their ids follow those of recall."""

  probes_share: float = 0.0
  """Share of the training batch rows that are of these tasks."""

  def __post_init__(self):
    for name in ("recall_share", "answer_share"):
      value = getattr(self, name)
      if not 0.0 < value < 1.0:
        raise ValueError(f"{name}={value}: wanted 0 < {name} < 1.")
    share = self.probes_share
    if not 0.0 <= share < 1.0 - self.recall_share:
      raise ValueError(
        f"probes_share={share}: wanted at least 0.0, and below 1 with"
        f" recall_share={self.recall_share}."
      )
    if (self.probes is None) != (share == 0.0) or (
      self.probes is not None and self.facts == "words"
    ):
      raise ValueError(
        f"probes_share={share} with probes={self.probes} and"
        f" facts={self.facts!r}: wanted both probes and their share or none of"
        " them, and facts='tokens' with probes."
      )
    if self.facts not in ("tokens", "words"):
      raise ValueError(f"facts={self.facts!r}: wanted 'tokens' or 'words'.")
    if self.facts == "words" and (
      self.recall.tokens_per_fact != 2 or self.text.tokenizer in ("byte", "bpe")
    ):
      raise ValueError(
        f"facts='words' with tokenizer={self.text.tokenizer!r} and"
        f" recall.tokens_per_fact={self.recall.tokens_per_fact}: wanted a"
        " tokenizer.json, whose words the facts take, and 2."
      )
    if self.asks < 1:
      raise ValueError(f"asks={self.asks}: wanted at least 1.")
    if not 1 <= self.num_needles <= self.recall.num_keys:
      raise ValueError(
        f"num_needles={self.num_needles}: wanted 1 to recall.num_keys ="
        f" {self.recall.num_keys}, for a batch row states each key once."
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FactoryConfig:
  """Data of your own: a function that makes a `Source`."""

  factory: str
  """"module:function", called with `argument`."""

  argument: str = ""
  """Given to the function: a path, say."""

  packed: bool = False
  """Whether the batches hold several documents a row, with segment_ids."""

  def __post_init__(self):
    if ":" not in self.factory:
      raise ValueError(f"factory={self.factory!r}: wanted 'module:function'.")


DataConfig = (
  TextConfig
  | TokensConfig
  | RecallConfig
  | ProbesConfig
  | MixConfig
  | FactoryConfig
)


def loss_weights(
  config: DataConfig, batch: Batch
) -> Float32[np.ndarray, "B T"]:
  """The weight of each target in the loss, which is a weighted mean.

  All targets in the loss mask have the same weight, except in a mix and in
  probes. In a mix the answers have `answer_share` of the weight together, if
  the batch has other targets too. In probes the answers of a task have the
  weight of one together, so that tasks with few answers are learnt too.
  """
  weights = batch.loss_mask.astype(np.float32)
  if isinstance(config, ProbesConfig):
    ids = batch.segment_ids
    task = np.zeros_like(batch.distance) if ids is None else ids[:, :-1]
    for row, own in zip(weights, task):
      row /= np.maximum(np.bincount(own, row)[own], 1)
  if isinstance(config, MixConfig):
    answers = batch.loss_mask & batch.answers
    count = answers.sum()
    rest = batch.loss_mask.sum() - count
    if count and rest:
      share = config.answer_share
      weights[answers] = share / (1 - share) * rest / count
  return weights


def is_packed(config: DataConfig) -> bool:
  """Whether batch rows hold several documents, which `segment_ids` names."""
  if isinstance(config, FactoryConfig):
    return config.packed
  if isinstance(config, ProbesConfig):
    return bool(config.lengths)
  if isinstance(config, MixConfig):
    tasks = config.probes is not None and is_packed(config.probes)
    return tasks or is_packed(config.text)
  packs = isinstance(config, TextConfig | TokensConfig)
  return packs and config.rows != "stream"


def max_documents(context: int) -> int:
  """The most documents that a packed row of this many inputs holds."""
  return max(64, -(-context // 128))


def probes_of(config: DataConfig) -> tuple[str, ...]:
  """Names of the probes: retrieval tasks that are evaluated beside the held-out
  batches."""
  if isinstance(config, ProbesConfig):
    return config.tasks
  if not isinstance(config, MixConfig):
    return ()
  tasks = config.probes.tasks if config.probes is not None else ()
  return ("needle", "recall", *tasks)


def asks_for_facts(config: DataConfig) -> bool:
  """Whether the probes ask for facts, or the held-out batches if there are no
  probes."""
  return isinstance(config, RecallConfig | ProbesConfig | MixConfig)


class Source(abc.ABC):
  """Where batches come from.

  Attributes:
    vocab_size: ids are below this.
    token_bytes: how many bytes of text each id stands for (0 for
      end-of-text); None if the data are not text, or if it is not known.
    tokenizer: content of the tokenizer.json that `sample` and `export` need,
      which runs keep (see `corpus.read_tokenizer`); None if they need none.
    fingerprint: JSON values that are equal for equal data.
    chance: accuracy of a model that does not see the facts; None for text.
      For probes that differ in it, a dict by their names.
    probes: names of the probes (see `probes_of`).
  """

  vocab_size: int
  token_bytes: Int32[np.ndarray, "V"] | None = None
  tokenizer: str | None = None
  fingerprint: dict[str, Any]
  chance: float | dict[str, float] | None = None
  probes: tuple[str, ...] = ()

  @abc.abstractmethod
  def train_batch(
    self, seed: int, step: int, *, batch_size: int, context: int
  ) -> Batch:
    """The batch of one step: the same for the same arguments, always."""

  @abc.abstractmethod
  def eval_batch(self, index: int, *, batch_size: int, context: int) -> Batch:
    """A held-out batch, the same for every seed and every model.

    Raises:
      ValueError: index is beyond `num_eval_batches`.
    """

  def probe_batch(
    self, name: str, index: int, *, batch_size: int, context: int
  ) -> Batch:
    """A batch of a probe, the same for every seed and every model.

    Its only targets are answers. There is no limit to the number of batches.
    """
    raise ValueError(f"name={name!r}: wanted one of {self.probes}.")

  def num_eval_batches(self, *, batch_size: int, context: int) -> int | None:
    """The number of held-out batches; None: there is no limit."""
    return None


def load(config: DataConfig) -> Source:
  """Opens the data that a config names.

  Text is read and hashed at each call. It is tokenized only if `cache_dir` does
  not hold the tokens of the same text and settings.

  Raises:
    ValueError: the path holds no text, cannot be read, or is not what its
      name says.
  """
  if isinstance(config, RecallConfig):
    return _RecallSource(config)
  if isinstance(config, ProbesConfig):
    return _ProbesSource(config)
  if isinstance(config, TextConfig | TokensConfig):
    return _text_source(config)
  if isinstance(config, MixConfig):
    return _MixSource(config)
  if isinstance(config, FactoryConfig):
    return _factory_source(config)
  raise ValueError(
    f"config is a {type(config).__name__}: wanted TextConfig, TokensConfig,"
    " RecallConfig, ProbesConfig, MixConfig or FactoryConfig."
  )


def _factory_source(config: FactoryConfig) -> Source:
  module, _, name = config.factory.partition(":")
  try:
    function = getattr(importlib.import_module(module), name)
  except (ImportError, AttributeError) as error:
    raise ValueError(
      f"data.factory={config.factory!r} cannot be imported ({error}): wanted"
      " 'module:function' of an importable module."
    ) from error
  source = function(config.argument)
  if not isinstance(source, Source):
    raise ValueError(
      f"data.factory={config.factory!r} gave a {type(source).__name__}: wanted"
      " a train.data.Source."
    )
  return source


def _check_batch(batch_size: int, context: int, **counters: int):
  for name, value in {"batch_size": batch_size, "context": context}.items():
    if value < 1:
      raise ValueError(f"{name}={value}: wanted at least 1.")
  for name, value in counters.items():
    if value < 0:
      raise ValueError(f"{name}={value}: wanted at least 0.")


# --- Text --------------------------------------------------------------------


def _text_source(
  config: TextConfig | TokensConfig,
) -> "_StreamSource | _PackedSource":
  return (_StreamSource if config.rows == "stream" else _PackedSource)(config)


class _TextSource(Source):
  """A corpus."""

  chance = None

  def __init__(self, config: TextConfig | TokensConfig):
    self._corpus = open_corpus(config)
    self.fingerprint = self._corpus.fingerprint
    self.token_bytes = self._corpus.token_bytes
    self.tokenizer = self._corpus.tokenizer
    self.vocab_size = self.fingerprint["vocab_size"]

  def _held_out_rows(
    self, index: int, batch_size: int, context: int, there: int, unit: str
  ) -> np.ndarray:
    """Numbers of the rows of a held-out batch, of `there` rows.

    A stride near the golden section spreads the first rows evenly, however many
    are used. It visits each row once because it has no divisor in common with
    their number.
    """
    num_batches = there // batch_size
    if index >= num_batches:
      raise ValueError(
        f"index={index}: the held-out split has {there} {unit} of"
        f" context={context}, which make {num_batches} batches of"
        f" batch_size={batch_size}. Wanted fewer eval batches, a shorter"
        " context, or a larger held_out."
      )
    stride = max(1, round(there * 0.618))
    while np.gcd(stride, there) != 1:
      stride += 1
    order = index * batch_size + np.arange(batch_size)
    return order * stride % there


class _StreamSource(_TextSource):
  """Windows of a corpus."""

  def train_batch(self, seed, step, *, batch_size, context) -> Batch:
    _check_batch(batch_size, context, seed=seed, step=step)
    num_starts = self._corpus.train.size - context
    if num_starts < 1:
      raise ValueError(
        f"context={context} takes {context + 1} tokens, but the training"
        f" split has only {self._corpus.train.size}: wanted a shorter"
        " context or more text."
      )
    rng = np.random.default_rng((_TRAIN_STREAM, seed, step))
    starts = rng.integers(num_starts, size=batch_size)
    return _windows(self._corpus.train, starts, context)

  def eval_batch(self, index, *, batch_size, context) -> Batch:
    _check_batch(batch_size, context, index=index)
    num_windows = (self._corpus.held_out.size - 1) // context
    rows = self._held_out_rows(
      index, batch_size, context, num_windows, "windows"
    )
    return _windows(self._corpus.held_out, rows * context, context)

  def num_eval_batches(self, *, batch_size, context) -> int:
    _check_batch(batch_size, context)
    num_windows = (self._corpus.held_out.size - 1) // context
    return num_windows // batch_size


def _windows(stream: np.ndarray, starts: np.ndarray, context: int) -> Batch:
  return Batch.of(
    np.stack([stream[s : s + context + 1] for s in starts.tolist()])
  )


class _PackedSource(_TextSource):
  """Rows of whole documents.

  The documents of a split are packed once for each context, the same for every
  seed. An epoch visits every row once, in an order that the seed decides.
  """

  def __init__(self, config: TextConfig | TokensConfig):
    super().__init__(config)
    self.fingerprint = self.fingerprint | {"rows": config.rows}
    self._joins_folders = config.rows == "folders"
    self._packed: dict[tuple[str, int], _PackedRows] = {}
    self._order = functools.lru_cache(4)(_epoch)

  def _rows(self, split: Literal["train", "held_out"], context: int):
    key = split, context
    if key not in self._packed:
      stream: np.ndarray = getattr(self._corpus, split)
      ends = getattr(self._corpus, f"{split}_ends")
      if self._joins_folders:
        folders = getattr(self._corpus, f"{split}_folders")
        stream, ends = _join_folders(stream, ends, folders)
      self._packed[key] = _pack(stream, ends, context)
    return self._packed[key]

  def train_batch(self, seed, step, *, batch_size, context) -> Batch:
    _check_batch(batch_size, context, seed=seed, step=step)
    rows = self._rows("train", context)
    count, first = len(rows), step * batch_size
    return rows.batch(
      [
        self._order(seed, i // count, count)[i % count]
        for i in range(first, first + batch_size)
      ]
    )

  def eval_batch(self, index, *, batch_size, context) -> Batch:
    _check_batch(batch_size, context, index=index)
    rows = self._rows("held_out", context)
    return rows.batch(
      self._held_out_rows(index, batch_size, context, len(rows), "packed rows")
    )

  def num_eval_batches(self, *, batch_size, context) -> int:
    _check_batch(batch_size, context)
    return len(self._rows("held_out", context)) // batch_size


def _epoch(seed: int, epoch: int, count: int) -> np.ndarray:
  rng = np.random.default_rng((_TRAIN_STREAM, seed, epoch))
  return rng.permutation(count)


def _join_folders(
  stream: np.ndarray, ends: np.ndarray, folders: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """The stream with each folder's documents next to each other, and the ends
  of the folders in it."""
  starts = np.concatenate([[0], ends[:-1]])
  order = np.argsort(folders, kind="stable")
  joined = np.concatenate([stream[starts[i] : ends[i]] for i in order.tolist()])
  sizes = np.bincount(folders, weights=ends - starts).astype(int)
  return joined, np.cumsum(sizes)


class _PackedRows:
  """Rows of documents, or of pieces of those that are longer than a row.

  Args:
    stream: all tokens.
    context: inputs of a row, which has one token more.
    rows: for each row the (start, end) of its pieces in the stream.
  """

  def __init__(
    self,
    stream: np.ndarray,
    context: int,
    rows: list[list[tuple[int, int]]],
  ):
    self._stream, self._context, self._pieces = stream, context, rows

  def __len__(self) -> int:
    return len(self._pieces)

  def batch(self, rows) -> Batch:
    shape = (len(rows), self._context + 1)
    tokens, ids = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for b, row in enumerate(rows):
      at = 0
      for number, (start, end) in enumerate(self._pieces[row], 1):
        to = at + end - start
        tokens[b, at:to] = self._stream[start:end]
        ids[b, at:to] = number
        at = to
    return Batch.of(tokens, ids)


# Rows that wait for a document that fits, while others are packed.
_OPEN_ROWS = 64


def _pack(stream: np.ndarray, ends: np.ndarray, context: int) -> _PackedRows:
  """Puts documents into rows, each into the fullest open row that it fits.

  Args:
    stream: all tokens.
    ends: where each document ends in it.
    context: inputs of a row.
  """
  pieces = []
  for start, end in zip([0, *ends[:-1].tolist()], ends.tolist()):
    # Pieces share a token, which is the last target of one and the first input
    # of the next. A piece of one token has no target.
    for first in range(start, end - 1, context):
      pieces.append((first, min(first + context + 1, end)))
  if not pieces:
    raise ValueError(
      "path: no document has more than one token; wanted longer ones, or"
      " rows='stream'."
    )
  # In another order, the rows of one folder would look alike.
  rng = np.random.default_rng(0)
  most = max_documents(context)
  rows: list[list[tuple[int, int]]] = []
  open_rows = np.full(_OPEN_ROWS, -1)
  room = np.zeros(_OPEN_ROWS, int)
  for i in rng.permutation(len(pieces)).tolist():
    start, end = pieces[i]
    size = end - start
    fits = np.flatnonzero(room >= size)
    if fits.size:
      at = fits[np.argmin(room[fits])]
    else:
      at = np.argmin(room)
      open_rows[at], room[at] = len(rows), context + 1
      rows.append([])
    row = rows[open_rows[at]]
    row.append((start, end))
    room[at] = room[at] - size if len(row) < most else 0
  return _PackedRows(stream, context, rows)


# --- Recall ------------------------------------------------------------------


class _Facts(NamedTuple):
  """Facts to plant in batch rows, which consist of cells of two tokens.

  Attributes:
    fact_cell: [batch row, fact], the cell of each fact.
    query_cell: [batch row, fact, ask], the cells of its queries.
    keys: [batch row, fact].
    values: [batch row, fact].
    offset: [batch row, fact], which of the two tokens of its cell a fact of one
      token takes.
  """

  fact_cell: np.ndarray
  query_cell: np.ndarray
  keys: np.ndarray
  values: np.ndarray
  offset: np.ndarray


class _RecallSource(Source):
  """New sequences for every (seed, step).

  Id 0 starts a sequence. Then follow the ids of the fillers, the keys, the
  values and, if a fact is one token, the num_keys * num_values facts.
  """

  token_bytes = None

  def __init__(self, config: RecallConfig):
    self._config = config
    self._first_key = 1 + config.num_fillers
    self._first_value = self._first_key + config.num_keys
    self._first_fact = self._first_value + config.num_values
    self.vocab_size = self._first_fact
    if config.tokens_per_fact == 1:
      self.vocab_size += config.num_keys * config.num_values
    self.chance = 1.0 / config.num_values
    sample = self.eval_batch(0, batch_size=4, context=256)
    self.fingerprint = {
      "name": "recall",
      **dataclasses.asdict(config),
      "vocab_size": self.vocab_size,
      "chance": self.chance,
      # The hash of a sample, so that another generator gives another one.
      "sha256": hashlib.sha256(sample.tokens.tobytes()).hexdigest(),
    }

  def train_batch(self, seed, step, *, batch_size, context) -> Batch:
    _check_batch(batch_size, context, seed=seed, step=step)
    return self.make((_TRAIN_STREAM, seed, step), batch_size, context)

  def eval_batch(self, index, *, batch_size, context) -> Batch:
    _check_batch(batch_size, context, index=index)
    return self.make((_EVAL_STREAM, index), batch_size, context)

  def make(
    self,
    stream: tuple[int, ...],
    batch_size: int,
    context: int,
    asks: int = 1,
  ) -> Batch:
    """A batch drawn from a stream of random numbers, which asks for each fact
    `asks` times."""
    rng = np.random.default_rng(stream)
    num_facts = self._config.num_facts
    facts = self.draw(rng, num_facts, batch_size, context, asks)
    tokens = rng.integers(
      1, self._first_key, size=(batch_size, context + 1), dtype=np.int32
    )
    tokens[:, 0] = 0
    distance = self.plant(tokens, facts, 0)
    return Batch(tokens, distance >= 0, distance)

  def draw(
    self,
    rng: np.random.Generator,
    num_facts: int,
    batch_size: int,
    context: int,
    asks: int = 1,
  ) -> _Facts:
    """Draws facts, and the cells of the facts and their queries."""
    config = self._config
    num_cells = context // 2
    longest = min(config.max_distance or context, context) // 2
    longest = min(longest, num_cells - 1)
    if longest < 1:
      raise ValueError(
        f"context={context} has no room for a fact and its query: wanted at"
        " least 4."
      )
    shape = (batch_size, num_facts)
    # Distances are log-uniform over 1 .. longest cells, so that each octave has
    # the same share of them.
    apart = np.exp(rng.uniform(0.0, np.log(longest + 1), shape)).astype(int)
    apart = np.clip(apart, 1, longest)
    fact_cell = (rng.random(shape) * (num_cells - apart)).astype(int)
    keys = rng.permuted(
      np.tile(np.arange(config.num_keys), (batch_size, 1)), axis=1
    )[:, :num_facts]
    values = rng.integers(config.num_values, size=shape)
    offset = rng.integers(2, size=shape)
    # The distances of further queries are log-uniform over the cells that
    # follow the fact.
    room = np.minimum(longest, num_cells - 1 - fact_cell)[..., None]
    more = rng.uniform(0.0, np.log(room + 1), (*shape, asks - 1))
    more = np.clip(np.exp(more).astype(int), 1, room)
    apart = np.concatenate([apart[..., None], more], -1)
    query_cell = fact_cell[..., None] + apart
    return _Facts(fact_cell, query_cell, keys, values, offset)

  def plant(
    self,
    tokens: Int32[np.ndarray, "B T+1"],
    facts: _Facts,
    first_id: int,
    segment_ids: Int32[np.ndarray, "B T+1"] | None = None,
  ) -> Int32[np.ndarray, "B T"]:
    """Overwrites tokens with facts and their queries.

    A fact is planted if its cell and that of its first query are free. Further
    queries of a planted fact are planted if their cell is free. Facts and
    queries lie in the same document.

    Args:
      tokens: changed in place.
      facts: planted in their order.
      first_id: added to every id that is written.
      segment_ids: the documents of packed rows.

    Returns:
      The batch's `distance`.
    """
    config = self._config
    batch_size, context = tokens.shape[0], tokens.shape[1] - 1
    distance = np.full((batch_size, context), -1, np.int32)
    taken = np.zeros((batch_size, context // 2), np.bool_)
    every = np.arange(batch_size)
    stated = np.zeros(facts.keys.shape, np.bool_)
    _, num_facts, asks = facts.query_cell.shape
    for ask, i in itertools.product(range(asks), range(num_facts)):
      fact, query = facts.fact_cell[:, i], facts.query_cell[:, i, ask]
      key, value, offset = (x[:, i] for x in facts[2:])
      free = ~taken[every, query]
      free &= stated[:, i] if ask else ~taken[every, fact]
      if segment_ids is not None:
        cells = np.stack(
          [2 * fact + 1, 2 * fact + 2, 2 * query + 1, 2 * query + 2], axis=1
        )
        own = np.take_along_axis(segment_ids, cells, axis=1)
        free &= (own[:, 0] > 0) & (own == own[:, :1]).all(axis=1)
      stated[free, i] = True
      row = every[free]
      fact, query = fact[free], query[free]
      key, value = key[free], value[free]
      taken[row, fact] = taken[row, query] = True
      if config.tokens_per_fact == 1:
        fact_token = 1 + 2 * fact + offset[free]
        pair = key * config.num_values + value
        tokens[row, fact_token] = first_id + self._first_fact + pair
      else:
        fact_token = 2 + 2 * fact
        tokens[row, fact_token - 1] = first_id + self._first_key + key
        tokens[row, fact_token] = first_id + self._first_value + value
      query_token = 1 + 2 * query
      tokens[row, query_token] = first_id + self._first_key + key
      tokens[row, query_token + 1] = first_id + self._first_value + value
      distance[row, query_token] = query_token - fact_token
    return distance


# --- Probes ------------------------------------------------------------------


class _ProbesSource(Source):
  """A new row for every (seed, step, batch row).

  The rows of held-out batches take the tasks in turn, those of a probe have one
  task. Training rows hold one task, or several as documents (config.lengths).
  """

  token_bytes = None

  def __init__(self, config: ProbesConfig):
    self._config = config
    self._held_out = dataclasses.replace(config, asks=1)
    self.probes = config.tasks
    self.vocab_size = Ids(config).vocab_size
    self.chance = config.chances
    sample = self.eval_batch(
      0, batch_size=2 * len(config.tasks), context=config.least_context
    ).tokens.tobytes()
    fields = dataclasses.asdict(config)
    # Without these fields as before there were any.
    new = {"lengths": (), "asks": 1}
    if any(fields[name] != old for name, old in new.items()):
      context = max(config.lengths or (config.least_context,))
      trained = self.train_batch(0, 0, batch_size=4, context=context)
      sample += trained.tokens.tobytes()
    fields = {k: x for k, x in fields.items() if k not in new or x != new[k]}
    self.fingerprint = {
      "name": "probes",
      **{
        name: list(value) if isinstance(value, tuple) else value
        for name, value in fields.items()
      },
      "vocab_size": self.vocab_size,
      "chance": self.chance,
      # The hash of a sample, so that another generator gives another one.
      "sha256": hashlib.sha256(sample).hexdigest(),
    }

  def train_batch(self, seed, step, *, batch_size, context) -> Batch:
    _check_batch(batch_size, context, seed=seed, step=step)
    stream = _TRAIN_STREAM, seed, step
    return self._batch(stream, [None] * batch_size, context)

  def eval_batch(self, index, *, batch_size, context) -> Batch:
    _check_batch(batch_size, context, index=index)
    rows = index * batch_size + np.arange(batch_size)
    tasks = [self.probes[row % len(self.probes)] for row in rows]
    return self._batch((_EVAL_STREAM, 0, index), tasks, context)

  def probe_batch(self, name, index, *, batch_size, context) -> Batch:
    _check_batch(batch_size, context, index=index)
    if name not in self.probes:
      return super().probe_batch(
        name, index, batch_size=batch_size, context=context
      )
    stream = _EVAL_STREAM, 1 + self.probes.index(name), index
    return self._batch(stream, [name] * batch_size, context)

  def _batch(
    self, stream: tuple[int, ...], tasks: Sequence[str | None], context: int
  ) -> Batch:
    """A row for each task, each from random numbers of its own; None draws a
    training row."""
    shape = len(tasks), context
    tokens, ids = (np.ones((shape[0], context + 1), np.int32) for _ in range(2))
    distance, number = (np.full(shape, -1, np.int32) for _ in range(2))
    for i, task in enumerate(tasks):
      rng = np.random.default_rng((*stream, i))
      config = self._held_out if task else self._config
      sizes = [context + 1] if task else self._sizes(rng, context)
      at = 0
      for document, size in enumerate(sizes, 1):
        drawn = task or self.probes[rng.integers(len(self.probes))]
        row = make_row(config, drawn, rng, size - 1)
        to = at + size
        tokens[i, at:to], ids[i, at:to] = row.tokens, document
        # What follows a task's last token is no answer.
        distance[i, at : to - 1] = row.distance
        number[i, at : to - 1] = row.number
        at = to
    packed = ids if self._config.lengths else None
    return Batch(tokens, number >= 0, distance, packed, number)

  def _sizes(self, rng: np.random.Generator, context: int) -> list[int]:
    """The tokens of each task of a training row.

    Raises:
      ValueError: the context cannot hold tasks of the config's lengths.
    """
    lengths, most = self._config.lengths, max_documents(context)
    if not lengths:
      return [context + 1]
    if max(lengths) > context:
      raise ValueError(
        f"lengths={lengths} with context={context}: wanted none above the"
        " context."
      )
    if context // min(lengths) > most:
      raise ValueError(
        f"lengths={lengths} with context={context}: a row would hold"
        f" {context // min(lengths)} tasks, each a document, of at most {most}."
        f" Wanted none below {context // (most + 1) + 1}."
      )
    length = int(rng.choice(lengths))
    sizes = [length] * (context // length)
    sizes[-1] += context + 1 - sum(sizes)
    return sizes


# --- Mix ---------------------------------------------------------------------


# A word of one token, in byte-level BPE (which writes a space as the first of
# these characters) and in SentencePiece.
_WORD = re.compile("[\u0120\u2581][a-z]{4,8}")


def single_token_words(tokenizer: str, count: int) -> list[int]:
  """Ids of lower-case words of 4 to 8 letters that are one token each.

  Args:
    tokenizer: content of a tokenizer.json.
    count: of the words. They lie at equal distances in the order of ids, in
      which frequent words come first.

  Raises:
    ValueError: the tokenizer has fewer of them.
  """
  import tokenizers

  vocab = tokenizers.Tokenizer.from_str(tokenizer).get_vocab()
  ids = sorted(i for name, i in vocab.items() if _WORD.fullmatch(name))
  if len(ids) < count:
    raise ValueError(
      f"facts='words': the tokenizer has {len(ids)} words of 4 to 8 lower-case"
      f" letters with one token each; wanted {count} for recall's fillers, keys"
      " and values."
    )
  return [ids[i * len(ids) // count] for i in range(count)]


class _MixSource(Source):
  """Text with needles, and recall.

  The ids of facts follow those of text. With facts="words" they are written so
  first, and then replaced by those of words.
  """

  def __init__(self, config: MixConfig):
    self._config = config
    self.probes = probes_of(config)
    self._text = _text_source(config.text)
    self._recall = _RecallSource(config.recall)
    text_ids = self._text.vocab_size
    self.vocab_size = text_ids + self._recall.vocab_size
    self._tasks = None
    if config.probes is not None:
      self._tasks = _ProbesSource(config.probes)
      self._first_task_id = self.vocab_size
      self.vocab_size += self._tasks.vocab_size
    self.tokenizer = self._text.tokenizer
    self._words: np.ndarray | None = None
    if config.facts == "words":
      self.vocab_size = text_ids
      assert self.tokenizer is not None
      start = open_tokenizer(config.text).end_of_text
      words = single_token_words(self.tokenizer, self._recall.vocab_size - 1)
      self._words = np.array([start, *words], np.int32)
    if self._text.token_bytes is not None:
      self.token_bytes = np.zeros(self.vocab_size, np.int32)
      self.token_bytes[:text_ids] = self._text.token_bytes
    self.chance = self._recall.chance
    if config.probes is not None:
      own = dict.fromkeys(("needle", "recall"), 1 / config.recall.num_values)
      self.chance = own | config.probes.chances
    settings = ("recall_share", "num_needles", "asks", "answer_share")
    self.fingerprint = {
      "name": "text and retrieval",
      **{name: getattr(config, name) for name in settings},
      **({} if self._words is None else {"words": self._words.tolist()}),
      "vocab_size": self.vocab_size,
      "chance": self.chance,
      "text": self._text.fingerprint,
      "recall": self._recall.fingerprint,
    }
    if self._tasks is not None:
      self.fingerprint |= {
        "probes_share": config.probes_share,
        "probes": self._tasks.fingerprint,
      }

  def train_batch(self, seed, step, *, batch_size, context) -> Batch:
    shape: Any = dict(batch_size=batch_size, context=context)
    text = self._text.train_batch(seed, step, **shape)
    stream, asks = (_TRAIN_STREAM, seed, step), self._config.asks
    rng = np.random.default_rng((_MIX_STREAM, *stream))
    needles = self._with_needles(text, rng, asks)
    recall = self._moved(self._recall.make(stream, **shape, asks=asks))
    drawn = rng.random(batch_size)
    share = self._config.recall_share
    batch = _rows_of(drawn < share, recall, needles)
    if self._tasks is None:
      return batch
    tasks = self._moved_tasks(self._tasks.train_batch(seed, step, **shape))
    nothing = np.full_like(batch.distance, -1)
    batch = batch._replace(number=nothing)
    of_tasks = (drawn >= share) & (drawn < share + self._config.probes_share)
    return _rows_of(of_tasks, tasks, batch)

  def eval_batch(self, index, *, batch_size, context) -> Batch:
    return self._as_packed(
      self._text.eval_batch(index, batch_size=batch_size, context=context)
    )

  def num_eval_batches(self, *, batch_size, context) -> int | None:
    return self._text.num_eval_batches(batch_size=batch_size, context=context)

  def probe_batch(self, name, index, *, batch_size, context) -> Batch:
    shape: Any = dict(batch_size=batch_size, context=context)
    if name == "recall":
      recall = self._moved(self._recall.eval_batch(index, **shape))
      return self._as_packed(recall)
    if self._tasks is not None and name in self._tasks.probes:
      tasks = self._tasks.probe_batch(name, index, **shape)
      return self._as_packed(self._moved_tasks(tasks))
    if name != "needle":
      return super().probe_batch(name, index, **shape)
    # The index may exceed the number of windows. Their text then occurs again,
    # with other needles.
    windows = self._text.num_eval_batches(**shape)
    rng = np.random.default_rng((_MIX_STREAM, _EVAL_STREAM, index))
    text = self._text.eval_batch(index % max(windows, 1), **shape)
    batch = self._as_packed(self._with_needles(text, rng))
    return batch._replace(loss_mask=batch.distance >= 0)

  def _with_needles(
    self, text: Batch, rng: np.random.Generator, asks: int = 1
  ) -> Batch:
    tokens = text.tokens.copy()
    batch_size, context = text.distance.shape
    num_facts = self._config.num_needles
    facts = self._recall.draw(rng, num_facts, batch_size, context, asks)
    distance = self._recall.plant(
      tokens, facts, self._text.vocab_size, text.segment_ids
    )
    # Where facts and queries lie cannot be predicted, so they are no targets.
    planted = tokens[:, 1:] >= self._text.vocab_size
    counted = text.loss_mask & ~planted | (distance >= 0)
    tokens = self._as_words(tokens)
    return Batch(tokens, counted, distance, text.segment_ids)

  def _moved(self, recall: Batch) -> Batch:
    tokens = recall.tokens + self._text.vocab_size
    return recall._replace(tokens=self._as_words(tokens))

  def _as_packed(self, batch: Batch) -> Batch:
    """The batch in the form that all of this source have."""
    return _packed(batch) if is_packed(self._config) else batch

  def _moved_tasks(self, tasks: Batch) -> Batch:
    return tasks._replace(tokens=tasks.tokens + self._first_task_id)

  def _as_words(self, tokens: np.ndarray) -> np.ndarray:
    """The tokens with words in the places of facts' ids."""
    if self._words is None:
      return tokens
    facts = tokens - self._text.vocab_size
    return np.where(facts >= 0, self._words[np.maximum(facts, 0)], tokens)


def _packed(batch: Batch) -> Batch:
  """The batch with segment ids: a row without any is one document."""
  if batch.segment_ids is not None:
    return batch
  return batch._replace(segment_ids=np.ones_like(batch.tokens))


def _rows_of(first: np.ndarray, a: Batch, b: Batch) -> Batch:
  """The rows of a where `first` [B] is true, and those of b elsewhere."""
  if a.segment_ids is not None or b.segment_ids is not None:
    a, b = _packed(a), _packed(b)
  merged: Any = (
    None if x is None or y is None else np.where(first[:, None], x, y)
    for x, y in zip(a, b)
  )
  return Batch(*merged)
