"""Synthetic tasks whose answers need more of the context than one fact.

The tasks are those of RULER (Hsieh et al., "RULER: What's the Real Context Size
of Your Long-Context Language Models?"), made of tokens instead of sentences, so
that models of a few million parameters learn them. A row is a start token, the
facts of one task at positions drawn uniformly among fillers, and at its end the
queries with their answers:

- `multi_query`: every key has one value. 1 to 8 keys are asked for, one after
  the other. The number is how many.
- `multi_value`: every key has 1 to 3 values, stated in different places. The
  answer is their sum modulo num_values, of which nothing is known as long as
  one of them is not. The number is how many values there are.
- `common_words`: words fill half of the row, and one of them is there more
  often than the others, which are all equally frequent. The answer is that
  word. The number is by how many percent it leads.
- `copy`: spans of symbols that follow a key. The keys are repeated at the end,
  each followed by its symbols. The number is that of a span's symbols.
- `variable_tracking`: a chain of variables for each value (x1 = value, x2 = x1,
  x3 = x2 ...). The value of one variable is asked for. The number is that of
  the hops: 0 if the variable was stated with its value.

A fact is one token: it stands for the pair (key, value), or for the pair of
variables, so that one layer of attention finds it. Values, words and symbols
are drawn independently and uniformly. A model that does not see the facts has
therefore an accuracy of 1 / num_values (`copy`: 1 / num_symbols), whatever it
knows of the format. (One that sees which values are stated, but not of which
key, may guess the most frequent one. In variable_tracking each is there once.)
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

from msa_jax.checks import as_integer, keep


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbesConfig:
  """Rows of tasks that need several facts, or the whole context."""

  tasks: tuple[str, ...] = (
    "multi_query",
    "multi_value",
    "common_words",
    "copy",
    "variable_tracking",
  )
  """Each is a probe with this name. The task of a training row, or of each of
  its documents, is drawn with equal probability."""

  lengths: tuple[int, ...] = ()
  """Tokens of the tasks of a training row. Each row draws one of these lengths,
  so that all have equally many tokens, and is filled with tasks of that length,
  which are documents that see nothing of each other; the last of them has the
  tokens that are left, too. (): one task, as long as the row. Held-out rows are
  always one task."""

  num_keys: int = 16
  """Keys, which are the variables of variable_tracking too."""

  num_values: int = 4
  """Values, which are the words of common_words too."""

  num_symbols: int = 16
  """Symbols of which the spans of copy consist."""

  num_fillers: int = 1

  num_queries: tuple[int, ...] = (1, 2, 4, 8)
  """multi_query: how many keys are asked for."""

  num_stated: tuple[int, ...] = (1, 2, 3)
  """multi_value: how many values a key has. One key of each number is asked
  for in a row."""

  leads: tuple[int, ...] = (10, 25, 50)
  """common_words: by how many percent the commonest word leads."""

  spans: tuple[int, ...] = (4, 8, 16)
  """copy: how many symbols are copied."""

  num_spans: int = 2
  """copy: how many spans are in a row. All are copied, in another order."""

  hops: tuple[int, ...] = (0, 1, 2, 3)
  """variable_tracking: how many links lead from a variable to its value. There
  are num_values chains of max(hops) + 1 variables, which are the first keys:
  the fewer there are, the sooner links are learnt."""

  asks: int = 1
  """variable_tracking: how many variables the task asks for in training rows,
  one after the other. In held-out rows it asks for one, because the last of
  several can be guessed from the answers before."""

  def __post_init__(self):
    least = {"num_keys": 1, "num_values": 2, "num_symbols": 2, "asks": 1}
    for name, low in (least | {"num_fillers": 1, "num_spans": 1}).items():
      number = as_integer(getattr(self, name))
      if number is None or number < low:
        raise ValueError(
          f"{name}={getattr(self, name)!r}: wanted an integer of at least"
          f" {low}."
        )
      keep(self, **{name: number})
    numbers = {"num_queries": 1, "num_stated": 1, "leads": 1, "spans": 1}
    for name, low in (numbers | {"hops": 0}).items():
      values = getattr(self, name)
      found = tuple(map(as_integer, values))
      if not found or any(x is None or x < low for x in found):
        raise ValueError(
          f"{name}={values!r}: wanted one or more integers of at least {low}."
        )
      keep(self, **{name: found})
    tasks = tuple(self.tasks)
    unknown = [task for task in tasks if task not in _TASKS]
    if not tasks or unknown or len(set(tasks)) < len(tasks):
      raise ValueError(
        f"tasks={tasks}: wanted one or more of {tuple(_TASKS)}, each once."
      )
    keep(self, tasks=tasks)
    keys = {
      "multi_query": (max(self.num_queries), "max(num_queries)"),
      "multi_value": (len(self.num_stated), "the numbers of num_stated"),
      "copy": (self.num_spans, "num_spans"),
      "variable_tracking": (
        self.num_values * (max(self.hops) + 1),
        "num_values chains of max(hops) + 1 variables",
      ),
    }
    for task in tasks:
      wanted, what = keys.get(task, (1, ""))
      if self.num_keys < wanted:
        raise ValueError(
          f"num_keys={self.num_keys}: task {task!r} wants at least {wanted},"
          f" for {what}."
        )
    most = self.num_values * len(set(self.hops))
    if self.asks > most:
      raise ValueError(
        f"asks={self.asks}: wanted at most {most}, the variables of"
        f" {self.num_values} chains with hops={self.hops}."
      )
    lengths = tuple(map(as_integer, self.lengths))
    least = self.least_context + 1
    if len(set(lengths)) < len(lengths) or any(
      x is None or x < least for x in lengths
    ):
      raise ValueError(
        f"lengths={self.lengths!r}: wanted integers of at least {least}, in"
        f" which the probes {tasks} have room, each once."
      )
    keep(self, lengths=lengths)

  @property
  def chances(self) -> dict[str, float]:
    """The accuracy of guessing, for each task."""
    return {
      task: 1 / (self.num_symbols if task == "copy" else self.num_values)
      for task in self.tasks
    }

  @property
  def least_context(self) -> int:
    """The shortest context in which every task has room."""
    return max(_TASKS[task].room(self) for task in self.tasks) - 1


class Ids:
  """The ids of tokens, which begin with the start token's 0."""

  def __init__(self, config: ProbesConfig):
    self._config = config
    self.filler = 1
    self.ask = self.filler + config.num_fillers
    self.key = self.ask + max(config.num_stated) + 1
    self.value = self.key + config.num_keys
    self.symbol = self.value + config.num_values
    self._fact = self.symbol + config.num_symbols
    self._link = self._fact + config.num_keys * config.num_values
    self.vocab_size = self._link + config.num_keys**2

  def fact(self, key, value):
    """The token "key = value"."""
    return self._fact + key * self._config.num_values + value

  def link(self, variable, other):
    """The token "variable = other variable"."""
    return self._link + variable * self._config.num_keys + other


class Row(NamedTuple):
  """A row of tokens and where its answers are.

  Attributes:
    tokens: ids.
    distance: where the target is an answer, the tokens from the query back to
      the fact that it needs: the farthest one of multi_value, the statement of
      the variable itself of variable_tracking. -1 elsewhere, and for all of
      common_words, which needs the whole row.
    number: where the target is an answer, the number of its task; -1 elsewhere.
  """

  tokens: Int32[np.ndarray, "T+1"]
  distance: Int32[np.ndarray, "T"]
  number: Int32[np.ndarray, "T"]


class _Token(NamedTuple):
  """A token of the row's end.

  Attributes:
    id: of the token, any integer.
    number: of the task, if the token is an answer.
    fact: position of the fact that the answer needs; None if it needs the
      whole row.
  """

  id: Any
  number: int | None = None
  fact: Any = None


def make_row(
  config: ProbesConfig, task: str, rng: np.random.Generator, context: int
) -> Row:
  """A row of a task, drawn from `rng`.

  Raises:
    ValueError: the context has no room for the config's largest numbers.
  """
  if context < config.least_context:
    raise ValueError(
      f"context={context} has no room for the probes {config.tasks}: wanted at"
      f" least {config.least_context}."
    )
  ids = Ids(config)
  tokens = rng.integers(ids.filler, ids.ask, context + 1).astype(np.int32)
  tokens[0] = 0
  end = _TASKS[task].write(config, ids, rng, tokens)
  distance = np.full(context, -1, np.int32)
  number = np.full(context, -1, np.int32)
  for query, token in enumerate(end, context - len(end)):
    tokens[query + 1] = token.id
    if token.number is not None:
      number[query] = token.number
      if token.fact is not None:
        distance[query] = query - token.fact
  return Row(tokens, distance, number)


# Each task writes its facts into a row of fillers, and returns the tokens with
# which the row ends.


def _places(
  rng: np.random.Generator, tokens: np.ndarray, end: int, count: int
) -> np.ndarray:
  """Different positions for facts, between the start and the last `end`."""
  return 1 + rng.choice(len(tokens) - 1 - end, count, replace=False)


def _multi_query(
  config: ProbesConfig, ids: Ids, rng: np.random.Generator, tokens: np.ndarray
) -> list[_Token]:
  asked = int(rng.choice(config.num_queries))
  keys = rng.permutation(config.num_keys)
  values = rng.integers(config.num_values, size=keys.size)
  places = _places(rng, tokens, 2 * asked, keys.size)
  tokens[places] = ids.fact(keys, values)
  end = []
  for key, value, place in zip(keys[:asked], values, places):
    end += [_Token(ids.key + key), _Token(ids.value + value, asked, place)]
  return end


def _multi_value(
  config: ProbesConfig, ids: Ids, rng: np.random.Generator, tokens: np.ndarray
) -> list[_Token]:
  keys = rng.permutation(config.num_keys)
  # The first keys, which are asked for, have each number once.
  first = rng.permutation(config.num_stated)
  rest = rng.choice(config.num_stated, keys.size - first.size)
  counts = np.concatenate([first, rest])
  stated = np.repeat(keys, counts)
  values = rng.integers(config.num_values, size=stated.size)
  places = _places(rng, tokens, 3 * first.size, stated.size)
  tokens[places] = ids.fact(stated, values)
  end = []
  for key, count in zip(keys, first):
    own = stated == key
    total = values[own].sum() % config.num_values
    end += [
      _Token(ids.ask + count),
      _Token(ids.key + key),
      _Token(ids.value + total, int(count), places[own].min()),
    ]
  return end


def _common_words(
  config: ProbesConfig, ids: Ids, rng: np.random.Generator, tokens: np.ndarray
) -> list[_Token]:
  lead = int(rng.choice(config.leads))
  share = 1 + lead / 100
  others = int((len(tokens) - 3) // 2 / (config.num_values - 1 + share))
  counts = np.full(config.num_values, others)
  word = rng.integers(config.num_values)
  counts[word] = round(others * share)
  places = _places(rng, tokens, 2, counts.sum())
  tokens[places] = ids.value + np.repeat(np.arange(counts.size), counts)
  return [_Token(ids.ask), _Token(ids.value + word, lead)]


def _copy(
  config: ProbesConfig, ids: Ids, rng: np.random.Generator, tokens: np.ndarray
) -> list[_Token]:
  length = int(rng.choice(config.spans))
  keys = rng.permutation(config.num_keys)[: config.num_spans]
  spans = rng.integers(config.num_symbols, size=(config.num_spans, length))
  # Positions without the spans, which are put in between.
  cells = config.num_spans * length
  room = cells + config.num_spans * (length + 1)
  places = _places(rng, tokens, room, config.num_spans)
  places = np.sort(places) + length * np.arange(config.num_spans)
  for key, place, span in zip(keys, places, spans):
    tokens[place] = ids.key + key
    tokens[place + 1 : place + 1 + length] = ids.symbol + span
  end = []
  for i in rng.permutation(config.num_spans):
    end.append(_Token(ids.key + keys[i]))
    for after, symbol in enumerate(spans[i], 1):
      end.append(_Token(ids.symbol + symbol, length, places[i] + after))
  return end


def _variable_tracking(
  config: ProbesConfig, ids: Ids, rng: np.random.Generator, tokens: np.ndarray
) -> list[_Token]:
  # With a chain for each value, and one question, nobody can guess from the
  # values that are there.
  shape = config.num_values, max(config.hops) + 1
  variables = rng.permutation(shape[0] * shape[1]).reshape(shape)
  places = _places(rng, tokens, 2 * config.asks, variables.size)
  # A variable is stated after the one that it is set to.
  places = np.sort(places.reshape(shape), axis=1)
  tokens[places[:, 0]] = ids.fact(variables[:, 0], np.arange(shape[0]))
  tokens[places[:, 1:]] = ids.link(variables[:, 1:], variables[:, :-1])
  first = int(rng.integers(config.num_values)), int(rng.choice(config.hops))
  asked = [first]
  if config.asks > 1:
    every = [(i, j) for i in range(shape[0]) for j in sorted(set(config.hops))]
    order = rng.permutation(len(every))
    asked += [every[i] for i in order if every[i] != first]
  end = []
  for value, hops in asked[: config.asks]:
    end += [
      _Token(ids.key + variables[value, hops]),
      _Token(ids.value + value, hops, places[value, hops]),
    ]
  return end


class _Task(NamedTuple):
  """A task.

  Attributes:
    write: writes the facts of a row, returns the tokens of its end.
    room: the tokens of the shortest row.
  """

  write: Callable[..., list[_Token]]
  room: Callable[[ProbesConfig], int]


_TASKS = {
  "multi_query": _Task(
    _multi_query, lambda c: 1 + c.num_keys + 2 * max(c.num_queries)
  ),
  "multi_value": _Task(
    _multi_value,
    lambda c: 1 + c.num_keys * max(c.num_stated) + 3 * len(c.num_stated),
  ),
  # The smallest lead is at least one word.
  "common_words": _Task(
    _common_words,
    lambda c: (
      3
      + 2 * (-(-100 // min(c.leads)) * (c.num_values + max(c.leads) // 100 + 1))
    ),
  ),
  "copy": _Task(_copy, lambda c: 1 + 2 * c.num_spans * (max(c.spans) + 1)),
  "variable_tracking": _Task(
    _variable_tracking,
    lambda c: 1 + c.num_keys + 2 * c.asks,
  ),
}
