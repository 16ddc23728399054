"""Finds documents that are nearly copies of others, by MinHash.

A document is the set of its shingles, the runs of five words in it. Two
documents are as alike as the Jaccard similarity of their sets,

  J(a, b) = |a & b| / |a | b|.

`datasketch` (an extra) finds the documents that may be alike without a look at
every pair: it compares bands of the smallest hashes of each set. The similarity
of those that it finds is then computed from the sets themselves.
"""

import re
import zlib
from collections.abc import Hashable

import numpy as np

# Words of a shingle.
_SHINGLE = 5
# Smallest hashes that stand for a document.
_HASHES = 128
# A pair that is just as alike as the threshold is missed with at most this
# probability, and a pair that is more alike with less.
_MISSED = 0.01
# Shingles that are hashed at once, so that their hashes stay in a CPU's cache.
_AT_ONCE = 1 << 12


def require_datasketch() -> str:
  """The version of datasketch, on which the hashes depend.

  Raises:
    ModuleNotFoundError: it is not installed.
  """
  try:
    import datasketch
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
      "near_duplicates: datasketch is not installed. Wanted the extra"
      " train of msa-jax, which has it, or near_duplicates=None, which needs no"
      " such package",
      name=error.name,
    ) from error
  return datasketch.__version__


class NearDuplicates:
  """The documents kept so far, among which copies of a new one are looked for.

  Args:
    threshold: a document counts as a copy of another from this Jaccard
      similarity of their shingles on, 0.1 to 1.
  """

  def __init__(self, threshold: float):
    require_datasketch()
    import datasketch

    self._threshold = threshold
    # A band of `rows` hashes is equal in two documents with probability J^rows.
    # More rows find fewer pairs that are no copies.
    rows = max(
      rows
      for rows in range(1, _HASHES // 2 + 1)
      if rows == 1 or (1.0 - threshold**rows) ** (_HASHES // rows) <= _MISSED
    )
    self._index = datasketch.MinHashLSH(
      num_perm=_HASHES, params=(_HASHES // rows, rows)
    )
    self._empty = datasketch.MinHash(num_perm=_HASHES, hashfunc=int)
    self._kept: dict[Hashable, np.ndarray] = {}

  def keep(self, text: str) -> bool:
    """Keeps a document unless it is a copy of one that was kept before.

    Returns:
      Whether it is kept. A document without words always is.
    """
    own = _shingles(text)
    if not own.size:
      return True
    hashes = self._empty.copy()
    for first in range(0, own.size, _AT_ONCE):
      hashes.update_batch(own[first : first + _AT_ONCE].tolist())
    if any(self._alike(own, self._kept[i]) for i in self._index.query(hashes)):
      return False
    key = len(self._kept)
    self._index.insert(key, hashes)
    self._kept[key] = own
    return True

  def _alike(self, a: np.ndarray, b: np.ndarray) -> bool:
    smaller, larger = sorted((a.size, b.size))
    # At most all of the smaller set is in the other one.
    if smaller < self._threshold * larger:
      return False
    both = np.intersect1d(a, b, assume_unique=True).size
    return both >= self._threshold * (smaller + larger - both)


def _shingles(text: str) -> np.ndarray:
  """Hashes of the shingles of a text, ascending and each once: uint32.

  A text of fewer words than a shingle's is one shingle. Different shingles have
  the same hash so seldom (two of 10^5 between two sets of 10^5) that it does
  not change what counts as a copy.
  """
  words = re.findall(r"\w+", text)
  codes = np.fromiter(
    (zlib.crc32(word.encode()) for word in words), np.uint64, len(words)
  )
  length = min(_SHINGLE, len(words))
  count = len(words) - length + 1 if words else 0
  mixed = np.zeros(count, np.uint64)
  for i in range(length):
    mixed = mixed * np.uint64(0x9E3779B97F4A7C15) + codes[i : i + count]
  mixed ^= mixed >> np.uint64(32)
  mixed *= np.uint64(0xD6E8FEB86659FD93)
  return np.unique((mixed >> np.uint64(32)).astype(np.uint32))
