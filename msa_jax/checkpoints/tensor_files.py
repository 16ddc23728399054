"""Reads and writes folders of safetensors files, one tensor at a time.

A file is 8 bytes of header length (little-endian), a JSON header that gives
each tensor's dtype, shape and offsets, and the raw tensors. A folder has one
file model.safetensors, or several files and an index that gives the file of
each tensor.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import operator
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from msa_jax.checks import wrong

_INDEX_FILE = "model.safetensors.index.json"
_SINGLE_FILE = "model.safetensors"
_UNFINISHED = ".unfinished"

DTYPES = {
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""The dtypes of parameters, by their safetensors names."""

_QUANTISED = {
  "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
  "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
  "U8": np.dtype(np.uint8),
}
_READABLE = DTYPES | _QUANTISED
# How pages begin, of HTML or XML. Prompts of chat templates begin with other
# tags.
_PAGE = re.compile(
  rb"(\xef\xbb\xbf)?\s*<(!doctype\b|!--|\?xml\b|(html|head|body|title|error)\b)",
  re.IGNORECASE,
)


class Tensor(NamedTuple):
  """File, offset, shape and dtype (by its safetensors name) of a tensor."""

  file: pathlib.Path
  dtype: str
  shape: tuple[int, ...]
  offset: int

  def open(self) -> np.ndarray:
    """The tensor, memory-mapped: its pages are read when they are used."""
    dtype = _READABLE[self.dtype]
    bits = np.memmap(
      self.file,
      dtype=f"u{dtype.itemsize}",
      mode="r",
      offset=self.offset,
      shape=self.shape,
    )
    return np.asarray(bits).view(dtype)


def read_headers(
  folder: pathlib.Path,
) -> tuple[dict[str, Tensor], list[pathlib.Path]]:
  """The tensors of a folder by name, and its files.

  Raises:
    ValueError: a file is missing, truncated or damaged, or the index and the
      files disagree; the text lists all of this.
  """
  index, single = folder / _INDEX_FILE, folder / _SINGLE_FILE
  if index.exists():
    try:
      raw = index.read_bytes()
      foreign = foreign_content(raw)
      if foreign:
        raise ValueError(foreign)
      places = dict(json.loads(raw)["weight_map"])
      outside = sorted({n for n in places.values() if _leaves_folder(n)})
      files = sorted({folder / name for name in places.values()})
    except (OSError, ValueError, KeyError, TypeError) as error:
      raise ValueError(f"{index} cannot be read: {error!r}") from None
    if outside:
      raise ValueError(
        f"{index} points outside of its folder: {some(outside)}; wanted names"
        " of files in it"
      )
  elif single.exists():
    places, files = {}, [single]
  else:
    raise ValueError(f"{folder} has neither {_INDEX_FILE} nor {_SINGLE_FILE}")
  problems: list[str] = []
  tensors: dict[str, Tensor] = {}
  for file in files:
    try:
      header = _read_header(file)
    except ValueError as error:
      problems.append(str(error))
      continue
    twice = sorted(set(header) & set(tensors))
    if twice:
      problems.append(f"in two files: {some(twice)}")
    absent = [
      name
      for name, place in places.items()
      if folder / place == file and name not in header
    ]
    if absent:
      problems.append(f"{file} lacks what the index says: {some(absent)}")
    tensors |= header
  if problems:
    raise ValueError(f"{folder}:\n  " + "\n  ".join(problems))
  return tensors, files


def _leaves_folder(name: str) -> bool:
  path = pathlib.PurePosixPath(name)
  return path.is_absolute() or ".." in path.parts


def foreign_content(head: bytes) -> str | None:
  """What a file is, if it stands in the place of a checkpoint's file.

  Args:
    head: the file's first bytes.
  """
  if head.startswith(b"version https://git-lfs.github.com/spec/"):
    return (
      "is a pointer of Git LFS and not the file itself: `git lfs pull` in the"
      " folder fetches it"
    )
  if _PAGE.match(head):
    return "is an HTML page and not the file itself: download it again"
  return None


def _read_header(path: pathlib.Path) -> dict[str, Tensor]:
  try:
    size = path.stat().st_size
    with path.open("rb") as file:
      foreign = foreign_content(file.read(512))
      if foreign:
        raise ValueError(f"{path} {foreign}")
      file.seek(0)
      head = file.read(60)
      # The header is an object of JSON.
      if head[8:] and head[8:9] != b"{":
        raise ValueError(
          f"{path} is no safetensors file: it begins with {head!r}"
        )
      file.seek(8)
      start = 8 + int.from_bytes(head[:8], "little")
      if size < start:
        raise ValueError(
          f"{path} is truncated: its header wants {start} bytes, it has {size}"
        )
      header = json.loads(file.read(start - 8))
    tensors, spans = {}, []
    for name, entry in header.items():
      if name == "__metadata__":
        continue
      first, last = map(operator.index, entry["data_offsets"])
      shape, dtype = tuple(entry["shape"]), entry["dtype"]
      if dtype in _READABLE:
        want = math.prod(shape) * _READABLE[dtype].itemsize
        if want != last - first:
          raise ValueError(
            f"{path} is damaged: {name} {dtype} {list(shape)} takes {want}"
            f" bytes, the header gives it {last - first}"
          )
      tensors[name] = Tensor(path, dtype, shape, start + first)
      spans.append((first, last, name))
    end = 0
    for first, last, name in sorted(spans):
      if not first == end <= last:
        raise ValueError(
          f"{path} is damaged: {name} lies at bytes {first} to {last} of the"
          f" data, wanted it to begin at {end}, where the one before ends"
        )
      end = last
    end += start
  except OSError as error:
    raise ValueError(f"{path} cannot be read: {error}") from None
  except (
    AttributeError,
    KeyError,
    TypeError,
    UnicodeDecodeError,
    json.JSONDecodeError,
  ) as error:
    raise ValueError(f"{path} is no safetensors file: {error!r}") from None
  if size != end:
    state = "truncated" if size < end else "damaged"
    raise ValueError(
      f"{path} is {state}: its tensors want {end} bytes, it has {size}"
    )
  return tensors


def some(names: Sequence[str]) -> str:
  """The first names as text, and the number of the others."""
  most = 20
  more = f", and {len(names) - most} more" if len(names) > most else ""
  return ", ".join(names[:most]) + more


def check_free(folder: pathlib.Path) -> None:
  """Raises ValueError unless the folder is empty or missing."""
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise wrong("folder", "empty or missing", str(folder))


def write(
  folder: pathlib.Path,
  tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
  fetch: Callable[[str], np.ndarray],
  *,
  documents: Mapping[str, Any],
  max_file_bytes: int,
) -> None:
  """Writes tensors, an index, and JSON documents beside them.

  The files go to a hidden folder beside it, .NAME.XXXXXXXX.unfinished, which is
  synced to disk and then renamed. So the folder appears whole or not at all,
  also if the machine stops. An error removes the hidden folder. A killed
  process leaves it, and the next call for the same folder removes it. A writer
  holds a lock on its hidden folder, so that another call can tell whether it is
  still in use; on a file system without locks, hidden folders are never
  removed.

  Args:
    folder: folder to write, empty or missing.
    tensors: dtype and shape of each tensor, by name.
    fetch: returns the tensor of a name; it is released once it is written.
    documents: content of further files, by file name: a text as it is,
      anything else as JSON.
    max_file_bytes: size beyond which a new file begins.
  """
  check_free(folder)
  codes = {dtype: code for code, dtype in DTYPES.items()}
  sizes = {
    name: math.prod(shape) * dtype.itemsize
    for name, (dtype, shape) in tensors.items()
  }
  files = _pack(sizes, max_file_bytes)
  folder.parent.mkdir(parents=True, exist_ok=True)
  _remove_unfinished(folder)
  work = pathlib.Path(
    tempfile.mkdtemp(
      prefix=f".{folder.name}.", suffix=_UNFINISHED, dir=folder.parent
    )
  )
  try:
    with _locked(work):
      places = {}
      for number, names in enumerate(files, 1):
        file = f"model-{number:05}-of-{len(files):05}.safetensors"
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in names:
          dtype, shape = tensors[name]
          header[name] = {
            "dtype": codes[dtype],
            "shape": list(shape),
            "data_offsets": [end, end + sizes[name]],
          }
          places[name] = file
          end += sizes[name]
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with (work / file).open("wb") as out:
          out.write(len(text).to_bytes(8, "little") + text)
          for name in names:
            array = np.ascontiguousarray(fetch(name))
            assert (array.dtype, array.shape) == tensors[name], name
            out.write(array.reshape(-1).view(np.uint8).data)
      index = {
        "metadata": {"total_size": sum(sizes.values())},
        "weight_map": places,
      }
      for name, content in {**documents, _INDEX_FILE: index}.items():
        if not isinstance(content, str):
          content = json.dumps(content, indent=2) + "\n"
        (work / name).write_text(content)
      # mkdtemp gives access to the user alone; give the usual permissions.
      mask = os.umask(0)
      os.umask(mask)
      work.chmod(0o777 & ~mask)
      for path in (*work.iterdir(), work):
        _sync(path)
      os.replace(work, folder)
      _sync(folder.parent)
  except BaseException:
    shutil.rmtree(work, ignore_errors=True)
    raise


@contextlib.contextmanager
def _locked(folder: pathlib.Path) -> Iterator[bool]:
  """Locks a folder until the block or its process ends.

  Yields:
    Whether the lock was free.
  """
  handle = os.open(folder, os.O_RDONLY)
  try:
    try:
      fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
      yield False
    else:
      yield True
  finally:
    os.close(handle)


def _remove_unfinished(folder: pathlib.Path) -> None:
  """Removes the hidden folders that killed calls of `write` have left."""
  name = re.compile(
    rf"\.{re.escape(folder.name)}\.[a-z0-9_]{{8}}{re.escape(_UNFINISHED)}"
  )
  for work in folder.parent.iterdir():
    if name.fullmatch(work.name):
      # Another call may remove it first, or it may belong to another user.
      gone = contextlib.suppress(FileNotFoundError, PermissionError)
      with gone, _locked(work) as free:
        if free:
          shutil.rmtree(work)


def _sync(path: pathlib.Path) -> None:
  handle = os.open(path, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)


def _pack(sizes: Mapping[str, int], most: int) -> list[list[str]]:
  """Sorted names, cut into files of at most `most` bytes (or one tensor)."""
  files: list[list[str]] = []
  left = 0
  for name, size in sorted(sizes.items()):
    if not files or size > left:
      files.append([])
      left = most
    files[-1].append(name)
    left -= size
  return files
