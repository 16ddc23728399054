"""Packed rows: which tokens of a row see which, and how a row is cut in blocks.

The tokens of a row lie in spans, one after another: the documents of a packed
row, or the nodes of prefix trees in depth-first order. A token at slot t sees
the token at slot j iff j <= t and t < visible_until[j], which is the end of j's
document or of the subtree of j's node. Slots of no span are padding: they see
nothing and nothing sees them.

Blocks start anew with each span, so what a document gets does not depend on
what it is packed with. Blocks are numbered along the row, padding has none.

There are two forms, both pytrees whose arrays have a leading B:

- `Segments` says for each slot what the rule above needs. Users build it with
  `tree_segments`, or give `segment_ids`, from which `document_segments` does.
- `BlockLayout` adds the blocks of one block size. All implementations take it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float32, Int, Int32

from msa_jax.checks import (
  as_integer,
  check_array,
  check_integer,
  require,
  wrong,
)

# The least number of spans that a row has room for, unless `max_segments` says
# otherwise; and what numbers of spans are rounded up to, so that rows of about
# as many spans share what is compiled.
_SPANS = 64


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Segments:
  """Which tokens of packed rows see which; a pytree.

  A token at slot t sees slot j iff j <= t < visible_until[j], and t is no
  padding.

  Attributes:
    span: number of each slot's span, counted from 0 along the row; -1 for
      padding.
    visible_until: the slot after the last one that sees this slot; 0 for
      padding.
    positions: the tokens before this one in its document, or along its tree's
      path; 0 for padding. They are the rotary positions.
    max_segments: the most spans of a row, static; None: what
      `with_max_segments` gives.
  """

  span: Int32[Array, "B S"]
  visible_until: Int32[Array, "B S"]
  positions: Int32[Array, "B S"]
  max_segments: int | None = dataclasses.field(
    default=None, metadata=dict(static=True)
  )


class BlockLayout(NamedTuple):
  """`Segments`, and the blocks of one block size.

  There are N = ceil(S / block_size) + max_segments block ids. Those that a row
  does not use have no tokens, and nothing sees them.

  Attributes:
    block_start: first slot of each block; S for an unused id.
    block_end: slot after its last one; S for an unused id.
    block_until: the block is seen by the queries at slots block_start ..
      block_until - 1 that are no padding; 0 for an unused id.
    block_depth: blocks before this one that its tokens see. The blocks that a
      query sees have the depths 0, 1, .. up to that of its own block.
    visible_until: as in `Segments`.
    own_block: the block in which each slot lies; -1 for padding.
    overflow: the row has more than max_segments spans. Its results are NaN.
  """

  block_start: Int32[Array, "B N"]
  block_end: Int32[Array, "B N"]
  block_until: Int32[Array, "B N"]
  block_depth: Int32[Array, "B N"]
  visible_until: Int32[Array, "B S"]
  own_block: Int32[Array, "B S"]
  overflow: Bool[Array, "B"]


def with_max_segments(segments: Segments, block_size: int) -> Segments:
  """The same with room for 64 spans, or as many as a row has blocks, unless
  max_segments says otherwise."""
  if segments.max_segments is not None:
    return segments
  length = segments.span.shape[1]
  most = min(length, max(_SPANS, -(-length // block_size)))
  return dataclasses.replace(segments, max_segments=most)


def document_segments(
  segment_ids: Int32[Array, "B S"], max_segments: int | None = None
) -> Segments:
  """The segments of documents, from ids.

  Args:
    segment_ids: each run of equal ids other than 0 is a document, also if the
      id came before; 0 is padding.
    max_segments: see `Segments`.
  """
  length = segment_ids.shape[1]
  slot = jnp.arange(length, dtype=jnp.int32)[None]
  before = jnp.pad(segment_ids, ((0, 0), (1, 0)))[:, :-1]
  real, changed = segment_ids != 0, segment_ids != before
  span = jnp.cumsum(changed & real, axis=1, dtype=jnp.int32) - 1
  start = lax.cummax(jnp.where(changed, slot, 0), axis=1)
  # Where the next run starts: the first change behind each slot.
  change = jnp.where(changed, slot, length)
  change = jnp.pad(change, ((0, 0), (0, 1)), constant_values=length)[:, 1:]
  end = lax.cummin(change, axis=1, reverse=True)
  return Segments(
    jnp.where(real, span, -1),
    jnp.where(real, end, 0),
    jnp.where(real, slot - start, 0),
    max_segments,
  )


def tree_segments(
  spans: Sequence[Sequence[tuple[int, int]]],
  parents: Sequence[Sequence[int]],
  *,
  length: int,
  max_segments: int | None = None,
) -> Segments:
  """The segments of rows that hold prefix trees.

  A row's spans are the nodes of its trees in depth-first order. A token sees
  the tokens before it in its span, and all tokens of the span's ancestors. A
  document is a tree of one node, so documents and trees can share a row.

  Runs on the host, with NumPy. `merge_prefixes` makes trees from sequences.

  Args:
    spans: for each batch row the (start, end) slots of its spans, ascending.
      Slots between spans are padding.
    parents: for each batch row and span the index of its parent among the row's
      spans; -1 for a root.
    length: slots of a row, S.
    max_segments: the most spans of a row, static; None: as many as the fullest
      row has, rounded up to a multiple of 64.

  Raises:
    ValueError: spans are no pairs of integers, overlap or leave the row,
      parents are no forest in depth-first order, or a row has more than
      max_segments spans.
  """
  length = check_integer("length", length)
  rows, parents = _items("spans", spans), _items("parents", parents)
  require(
    len(rows) == len(parents) and len(rows) > 0,
    "parents",
    f"one sequence for each of the {len(rows)} rows of spans, at least 1",
    len(parents),
  )
  shape = (len(rows), length)
  span = np.full(shape, -1, np.int32)
  until, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
  most = 0
  for b, (row, above) in enumerate(zip(rows, parents)):
    row, above = _items(f"spans[{b}]", row), _items(f"parents[{b}]", above)
    require(
      len(row) == len(above),
      f"parents[{b}]",
      f"one parent for each of the row's {len(row)} spans",
      len(above),
    )
    last_end, path = 0, []
    first, ends = [], []  # position of each span's first token; subtree's end
    slots = []
    for i, (one, parent) in enumerate(zip(row, above)):
      name = f"spans[{b}][{i}]"
      numbers = [as_integer(x) for x in _items(name, one)]
      start, end = numbers if len(numbers) == 2 else (None, None)
      if start is None or end is None or not last_end <= start < end <= length:
        want = (
          f"integers (start, end) with {last_end} <= start < end <= {length}"
        )
        raise wrong(name, want, repr(one))
      # In depth-first order, a parent is the span before or an ancestor of it.
      above_it = as_integer(parent)
      if above_it is None or above_it not in (-1, *path):
        raise wrong(
          f"parents[{b}][{i}]",
          f"-1 or one of {path}, which are the span before and its ancestors:"
          " parents must be a forest in depth-first order",
          repr(parent),
        )
      path = path[: path.index(above_it) + 1] if above_it >= 0 else []
      at = 0
      if above_it >= 0:
        at = first[above_it] + slots[above_it][1] - slots[above_it][0]
      first.append(at)
      slots.append((start, end))
      path.append(i)
      ends.append(end)
      for ancestor in path:
        ends[ancestor] = end
      last_end = end
    most = max(most, len(slots))
    for i, (start, end) in enumerate(slots):
      span[b, start:end] = i
      until[b, start:end] = ends[i]
      positions[b, start:end] = first[i] + np.arange(end - start)
  if max_segments is None:
    max_segments = -(-max(most, 1) // _SPANS) * _SPANS
  else:
    max_segments = check_integer("max_segments", max_segments)
    require(
      most <= max_segments,
      "max_segments",
      f"at least {most}, the spans of the fullest row",
      max_segments,
    )
  arrays: Any = dict(span=span, visible_until=until, positions=positions)
  return Segments(**arrays, max_segments=max_segments)


def _items(name: str, value: Any) -> list:
  """What a sequence holds."""
  try:
    return list(value)
  except TypeError:
    raise wrong(name, "a sequence", repr(value)) from None


def check_segments(
  segment_ids: Array | None,
  segments: Segments | None,
  max_segments: int | None,
  batch: int,
  length: int,
) -> Segments | None:
  """The segments that the arguments of an operation or layer stand for.

  Returns:
    None for plain rows.

  Raises:
    ValueError: an argument is wrong, or both forms came.
  """
  if max_segments is not None:
    max_segments = check_integer("max_segments", max_segments)
    if segment_ids is None:
      raise wrong("max_segments", "None without segment_ids", str(max_segments))
  if segment_ids is not None:
    if segments is not None:
      raise wrong("segments", "None with segment_ids", "both")
    _check_ids("segment_ids", segment_ids, batch, length)
    return document_segments(segment_ids, max_segments)
  if segments is None:
    return None
  if not isinstance(segments, Segments):
    want = "None or a msa_jax.Segments (tree_segments builds one)"
    raise wrong("segments", want, type(segments).__name__)
  for name in ("span", "visible_until", "positions"):
    _check_ids(f"segments.{name}", getattr(segments, name), batch, length)
  return segments


def _check_ids(name: str, x: Array, batch: int, length: int) -> None:
  check_array(name, x, (batch, length), "[B, S]")
  if x.dtype != jnp.int32:
    raise wrong(name, "int32", str(x.dtype))


def check_segment_values(segments: Segments, block_size: int) -> int:
  """Checks on the host what jit cannot see, and counts blocks.

  Returns:
    The largest number of blocks that a row uses.

  Raises:
    ValueError: a row has more spans than fit.
  """
  segments = with_max_segments(segments, block_size)
  most = segments.max_segments
  assert most is not None
  count = int(np.asarray(segments.span).max(initial=-1)) + 1
  require(
    count <= most,
    "max_segments",
    f"at least {count}, the spans of the fullest row (a row with more than"
    " max_segments gets NaN)",
    most,
  )
  layout = block_layout(segments, block_size)
  return int(np.asarray(layout.own_block).max(initial=-1)) + 1


def check_ids_return(segment_ids: Array) -> None:
  """Raises ValueError if an id comes again after another id, or after padding.

  The operations take each run as a document of its own.
  """
  for b, row in enumerate(np.asarray(segment_ids)):
    starts = np.flatnonzero(np.diff(row, prepend=0) != 0)
    seen: set[int] = set()
    for slot in starts[row[starts] != 0].tolist():
      require(
        int(row[slot]) not in seen,
        f"segment_ids[{b}, {slot}]",
        "an id that the row did not hold before: each run is a document",
        int(row[slot]),
      )
      seen.add(int(row[slot]))


def block_layout(segments: Segments, block_size: int) -> BlockLayout:
  """Cuts the spans of each row into blocks."""
  max_segments = with_max_segments(segments, block_size).max_segments
  assert max_segments is not None
  span = jnp.asarray(segments.span)
  length = span.shape[1]
  # An index outside the arrays must not come from wrong values.
  until = jnp.clip(jnp.asarray(segments.visible_until), 0, length)
  num_blocks = -(-length // block_size) + max_segments
  slot = jnp.arange(length, dtype=jnp.int32)[None]
  real = span >= 0
  before = jnp.pad(span, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
  changed = span != before
  span_start = lax.cummax(jnp.where(changed, slot, 0), axis=1)
  opens = real & ((slot - span_start) % block_size == 0)
  own = jnp.cumsum(opens, axis=1, dtype=jnp.int32) - 1
  own = jnp.where(real, own, -1)
  after = jnp.pad(own, ((0, 0), (0, 1)), constant_values=-2)[:, 1:]
  closes = real & (own != after)

  def by_block(values: Array, where: Array, fill: int) -> Array:
    """values of the slots at `where`, one in each block, by block."""

    def scatter(row, at):
      row = row.astype(jnp.int32)
      return jnp.full((num_blocks,), fill, jnp.int32).at[at].set(row)

    values = jnp.broadcast_to(values, span.shape)
    # An id of N is dropped.
    return jax.vmap(scatter)(values, jnp.where(where, own, num_blocks))

  start = by_block(slot, opens, length)
  end = by_block(slot + 1, closes, length)
  block_until = by_block(until, opens, 0)
  # All blocks before one are seen by it, but for those that nothing sees any
  # more: their number by slot is a running count of visible_until.
  ended = jax.vmap(
    lambda at: jnp.zeros((length + 1,), jnp.int32).at[at].add(1)
  )(jnp.where(opens, until, length))
  ended = jnp.cumsum(ended[:, :length], axis=1, dtype=jnp.int32)
  at = jnp.minimum(start, length - 1)
  depth = jnp.arange(num_blocks, dtype=jnp.int32)[None]
  depth = depth - jnp.take_along_axis(ended, at, axis=1)
  overflow = jnp.sum(changed & real, axis=1) > max_segments
  return BlockLayout(start, end, block_until, depth, until, own, overflow)


# --- sequences that share prefixes -------------------------------------------


class MergedPrefixes(NamedTuple):
  """Rows in which sequences share their prefixes, see `merge_prefixes`.

  Attributes:
    tokens: token ids; 0 for padding.
    positions: of each token in its sequences; equal to segments.positions.
    segments: which tokens see which.
    previous: the slot whose logits predict this token; -1 for the first token
      of a sequence and for padding, which nothing predicts.
    weights: how many sequences hold the token; 0 for padding.
  """

  tokens: Int32[np.ndarray, "B S"]
  positions: Int32[np.ndarray, "B S"]
  segments: Segments
  previous: Int32[np.ndarray, "B S"]
  weights: Float32[np.ndarray, "B S"]


class _Node:
  """A block of tokens that `weight` sequences share."""

  def __init__(self, tokens: tuple[int, ...]):
    self.tokens = tokens
    self.weight = 0
    self.children: dict[tuple[int, ...], _Node] = {}


def merge_prefixes(
  sequences: Sequence[Sequence[int] | Int[np.ndarray, "T"]],
  *,
  block_size: int = 128,
  length: int | None = None,
  max_segments: int | None = None,
) -> MergedPrefixes:
  """Packs sequences into rows that hold each shared prefix once.

  Prefixes are shared in whole blocks, counted from the sequence's start, so
  that a model chooses among the same blocks as in the sequences one by one.
  Equal sequences are shared altogether.

  With `out = model(tokens, segments=segments, with_kl=True,
  query_mask=weights)`, the loss of all sequences together is

    sum over slots with previous >= 0 of
      weights * CE(out.logits[previous], tokens) / count

  with one count for all, such as the number of predicted tokens; `head_loss`
  computes the sum from `out.hidden[previous]`. out.kl is the mean over all
  tokens of all sequences. Loss, KL and gradients equal those of the sequences
  one by one but for rounding, in both phases and every implementation.

  Runs on the host, with NumPy.

  Args:
    sequences: token ids of each sequence.
    block_size: of the model.
    length: slots of a row. Sequences are sorted, so that those with a common
      prefix are neighbours, and put into a row until the next one does not fit;
      each row holds its own copy of a prefix. None: one row, as long as needed.
    max_segments: see `tree_segments`.

  Raises:
    ValueError: an argument is wrong, or a sequence is longer than a row.
  """
  block_size = check_integer("block_size", block_size)
  if length is not None:
    length = check_integer("length", length)
  ordered = []
  for i, sequence in enumerate(_items("sequences", sequences)):
    try:
      array = np.asarray(sequence)
    except ValueError:  # lists of different lengths
      array = np.empty(0, object)
    require(
      array.ndim == 1
      and array.size > 0
      and np.issubdtype(array.dtype, np.integer),
      f"sequences[{i}]",
      "a sequence of at least one integer",
      f"shape {array.shape} of {array.dtype}",
    )
    ids = np.iinfo(np.int32)
    require(
      ids.min <= array.min() and array.max() <= ids.max,
      f"sequences[{i}]",
      f"token ids of int32, {ids.min} to {ids.max}",
      f"{array.min()} to {array.max()}",
    )
    require(
      length is None or array.size <= length,
      f"sequences[{i}]",
      f"at most length = {length} tokens",
      array.size,
    )
    ordered.append(tuple(array.tolist()))
  require(len(ordered) > 0, "sequences", "at least one sequence", 0)
  rows: list[_Node] = []
  used = 0
  for sequence in sorted(ordered):
    blocks = [
      sequence[i : i + block_size] for i in range(0, len(sequence), block_size)
    ]
    new = sum(map(len, _missing(rows[-1], blocks))) if rows else 0
    if not rows or (length is not None and used + new > length):
      rows.append(_Node(()))
      used, new = 0, len(sequence)
    used += new
    node = rows[-1]
    for block in blocks:
      node = node.children.setdefault(block, _Node(block))
      node.weight += 1
  packed = [_flatten(root) for root in rows]
  width = length or max(len(row.tokens) for row in packed)
  segments = tree_segments(
    [row.spans for row in packed],
    [row.parents for row in packed],
    length=width,
    max_segments=max_segments,
  )

  def stack(name: str, fill: int, dtype: type) -> np.ndarray:
    out = np.full((len(packed), width), fill, dtype)
    for b, row in enumerate(packed):
      values = getattr(row, name)
      out[b, : len(values)] = values
    return out

  return MergedPrefixes(
    tokens=stack("tokens", 0, np.int32),
    positions=np.asarray(segments.positions),
    segments=segments,
    previous=stack("previous", -1, np.int32),
    weights=stack("weights", 0, np.float32),
  )


def _missing(node: _Node, blocks: list[tuple[int, ...]]) -> list:
  """The blocks of a sequence that are not below a node yet."""
  for i, block in enumerate(blocks):
    if block not in node.children:
      return blocks[i:]
    node = node.children[block]
  return []


class _Row(NamedTuple):
  """The tokens of one row, in depth-first order, and its spans."""

  tokens: list[int]
  previous: list[int]
  weights: list[int]
  spans: list[tuple[int, int]]
  parents: list[int]


def _flatten(root: _Node) -> _Row:
  """Writes trees in depth-first order; blocks without a branch share a span."""
  row = _Row([], [], [], [], [])
  # (node, span of its parent, slot before its first token, may join the span)
  waiting = [(child, -1, -1, False) for child in root.children.values()][::-1]
  while waiting:
    node, parent, before, joins = waiting.pop()
    start = len(row.tokens)
    end = start + len(node.tokens)
    row.tokens.extend(node.tokens)
    row.previous.extend([before, *range(start, end - 1)])
    row.weights.extend([node.weight] * len(node.tokens))
    if joins:
      row.spans[parent] = (row.spans[parent][0], end)
      span = parent
    else:
      span = len(row.spans)
      row.spans.append((start, end))
      row.parents.append(parent)
    children = list(node.children.values())
    only = len(children) == 1
    waiting.extend((child, span, end - 1, only) for child in children[::-1])
  return row
