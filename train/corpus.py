"""Turns text files into token streams, which are kept in a cache.

A document is a text file, a jsonl line or a parquet row. Documents are split
into training and held-out ones, tokenized once, and joined into one stream for
each split, with an end-of-text token after each document. The cache's key is a
hash of every file's name and content and of every setting that the tokens
depend on. Text that has changed therefore gets new tokens.
"""

import bz2
import dataclasses
import gzip
import hashlib
import importlib.metadata
import io
import json
import lzma
import os
import pathlib
import platform
import re
import shutil
import stat
import sysconfig
import tempfile
import warnings
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Int32, Int64, UInt

from train.near_duplicates import NearDuplicates, require_datasketch

# Part of every cache key. Raise it when this module makes other token streams
# of the same text.
_CACHE_VERSION = 4
# A BPE tokenizer is trained on at most this many characters, because its merges
# hardly change with more.
_BPE_BYTES = 1 << 26
# BPE cuts longer words, because training takes the length of a word times the
# number of merges in it. Text with spaces has hardly any such words.
_BPE_WORD_BYTES = 256
# Bits per byte are reported if the bytes of all tokens are those of the text up
# to this share: a tokenizer may add a space before each text, say.
_BYTES_OFF = 1e-3
# This byte never occurs in UTF-8, so the byte tokenizer can end texts with it.
_BYTE_END_OF_TEXT = 0xFF
_COMPRESSED = {
  ".gz": gzip.decompress,
  ".bz2": bz2.decompress,
  ".xz": lzma.decompress,
}
# TextConfig.tokenizer: that of the trained model from which the run starts.
PRETRAINED = "pretrained"
_SKIPPED_FOLDERS = ("__pycache__", "site-packages", "dist-packages")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig:
  """Real text, as bytes or as BPE tokens."""

  path: str | None = None
  """A text, json, jsonl or parquet file, or a folder of them, which may be
  compressed with gzip, bzip2 or xz (.gz, .bz2, .xz). Hidden files and the
  folders __pycache__, site-packages and dist-packages are left out, and, with a
  warning, files that hold no text. None: the source of the running Python's
  standard library."""

  installed: bool = False
  """With path=None: whether the text is the Python source of the packages that
  are installed for the running Python, instead of its standard library."""

  tokenizer: str = "byte"
  """byte: 256 ids; bpe: byte-level BPE trained on the training split; or the
  path of a tokenizer.json of your own, a file of Hugging Face's tokenizers. Its
  truncation, padding and post-processor (which adds a token that begins a text,
  say) are not used, and text never becomes one of its special tokens.
  pretrained: the tokenizer.json of `recipe.pretrained`'s folder."""

  vocab_size: int = 4096
  """Number of ids of the bpe tokenizer, including the 256 bytes and
  end-of-text."""

  end_of_text: str | None = None
  """The token of a tokenizer.json that ends each document. None: its only one
  of <|endoftext|>, <|end_of_text|>, </s> and <eos>."""

  held_out: float = 0.05
  """Share of the documents that is held out, chosen by a hash of their names.
  If there is only one document, its last part is held out."""

  near_duplicates: float | None = None
  """Documents that are nearly copies of others are left out before the split: a
  document counts as a copy from this Jaccard similarity of the runs of five
  words in both. Of documents that are alike, the first in the order of a hash
  of their names stays. Needs datasketch, which the extra train installs. None
  keeps them all but exact copies."""

  max_bytes: int | None = None
  """Keep at most this much text: documents are taken in the order of a hash of
  their names, and the last one is cut."""

  text_field: str = "text"
  """The field of jsonl lines, of the objects in a json array or of parquet rows
  that holds the text."""

  rows: Literal["files", "folders", "stream"] = "files"
  """What a batch row holds. files: whole documents, packed, which see nothing
  of each other; a document is a text file, a jsonl line or a parquet row.
  folders: the same, but all documents of a folder are joined to one, in the
  order of their names. Documents that are longer than a row are cut into rows.
  stream: a window of all documents one after another, in which attention
  reaches from one document into the next."""

  cache_dir: str = "runs/.cache"
  """Where tokens and tokenizers are kept. The folder can be deleted."""

  def __post_init__(self):
    own = self.tokenizer.endswith(".json") or self.tokenizer == PRETRAINED
    if not own and self.tokenizer not in ("byte", "bpe"):
      raise ValueError(
        f"tokenizer={self.tokenizer!r} is unknown: wanted 'byte', 'bpe',"
        " 'pretrained' or the path of a tokenizer.json."
      )
    if self.end_of_text is not None and not own:
      raise ValueError(
        f"end_of_text={self.end_of_text!r}: wanted None with"
        f" tokenizer={self.tokenizer!r}, which has an end-of-text of its own."
      )
    if self.tokenizer == "bpe" and not 258 <= self.vocab_size <= 2**31:
      raise ValueError(
        f"vocab_size={self.vocab_size} is out of range for tokenizer='bpe':"
        " wanted at least 258 (256 bytes, one merge, end-of-text)."
      )
    if not 0.0 < self.held_out < 1.0:
      raise ValueError(
        f"held_out={self.held_out} is not a share: wanted 0 < held_out < 1."
      )
    if self.near_duplicates is not None and not (
      0.1 <= self.near_duplicates <= 1.0
    ):
      raise ValueError(
        f"near_duplicates={self.near_duplicates}: wanted a similarity of 0.1"
        " to 1, or None to keep all documents but exact copies."
      )
    if self.max_bytes is not None and self.max_bytes < 1:
      raise ValueError(
        f"max_bytes={self.max_bytes}: wanted at least 1, or None for all."
      )
    if self.path == "":
      raise ValueError(
        "path='' is empty: wanted a file, a folder, or None for the standard"
        " library's source."
      )
    if self.installed and self.path is not None:
      raise ValueError(
        f"installed=True with path={self.path!r}: wanted one of them."
      )
    if self.rows not in ("files", "folders", "stream"):
      raise ValueError(
        f"rows={self.rows!r}: wanted 'files', 'folders' or 'stream'."
      )
    if not self.text_field:
      raise ValueError("text_field is empty: wanted the name of a field.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokensConfig:
  """Tokens that were made elsewhere, in a folder with a tokens.json.

  `write_tokens` writes such a folder. tokens.json holds

    vocab_size     ids are below this
    dtype          "uint16" or "uint32", of the tokens in the files
    train          name of a file with the training documents, one after another
    held_out       the same of the held-out documents
    end_of_text    the id that ends each document; or
    document_ends  {"train": name, "held_out": name} of .npy files with the end
                   of each document, as integers that grow
    token_bytes    name of a .npy file with the bytes of text that each id
                   stands for; without it, losses are reported for each token
  """

  path: str
  """The folder."""

  rows: Literal["files", "stream"] = "files"
  """What a batch row holds. files: whole documents, packed; stream: a window of
  all documents one after another (see `TextConfig`)."""

  def __post_init__(self):
    if not self.path:
      raise ValueError("path='': wanted a folder with a tokens.json.")
    if self.rows not in ("files", "stream"):
      raise ValueError(f"rows={self.rows!r}: wanted 'files' or 'stream'.")


TOKENS_HEADER = "tokens.json"
_TOKEN_FIELDS = (
  *("vocab_size", "dtype", "train", "held_out"),
  *("end_of_text", "document_ends", "token_bytes"),
)


def write_tokens(
  folder: str | pathlib.Path,
  *,
  train: Iterable[np.ndarray],
  held_out: Iterable[np.ndarray],
  vocab_size: int,
  token_bytes: np.ndarray | None = None,
) -> None:
  """Writes tokens for `TokensConfig`.

  Args:
    folder: to write.
    train: the token ids of each training document, [tokens].
    held_out: the same of each held-out document.
    vocab_size: ids are below this, V.
    token_bytes: bytes of text that each id stands for, [V]; None: unknown.

  Raises:
    ValueError: an id is out of range, or a split has no tokens.
  """
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  dtype = np.dtype(_token_dtype(vocab_size))
  header: dict[str, Any] = {"vocab_size": vocab_size, "dtype": dtype.name}
  header["document_ends"] = {}
  for split, documents in {"train": train, "held_out": held_out}.items():
    ends, end = [], 0
    with open(folder / f"{split}.bin", "wb") as file:
      for number, document in enumerate(documents):
        ids = np.asarray(document)
        if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
          raise ValueError(
            f"{split}: document {number} has ids from {ids.min()} to"
            f" {ids.max()}: wanted 0 to vocab_size - 1 = {vocab_size - 1}."
          )
        file.write(ids.astype(dtype).tobytes())
        end += ids.size
        ends.append(end)
    if not end:
      raise ValueError(f"{split}: no tokens; wanted at least one document.")
    np.save(folder / f"{split}_ends.npy", np.array(ends, np.int64))
    header[split] = f"{split}.bin"
    header["document_ends"][split] = f"{split}_ends.npy"
  if token_bytes is not None:
    np.save(folder / "token_bytes.npy", np.asarray(token_bytes, np.int32))
    header["token_bytes"] = "token_bytes.npy"
  (folder / TOKENS_HEADER).write_text(json.dumps(header, indent=2) + "\n")


def read_tokens_header(folder: str | pathlib.Path) -> dict[str, Any]:
  """The content of a folder's tokens.json (see `TokensConfig`).

  Raises:
    ValueError: it cannot be read, or a field is missing, unknown or wrong.
  """
  path = pathlib.Path(folder) / TOKENS_HEADER
  try:
    header = json.loads(path.read_text())
  except (OSError, ValueError) as error:
    raise ValueError(f"path: {path} cannot be read ({error}).") from error
  needed = _TOKEN_FIELDS[:4]
  missing = [name for name in needed if name not in header]
  unknown = [name for name in header if name not in _TOKEN_FIELDS]
  if missing or unknown:
    raise ValueError(
      f"path: {path} lacks {missing} and has unknown fields {unknown}: wanted"
      f" {', '.join(needed)}, and may have {', '.join(_TOKEN_FIELDS[4:])}."
    )
  if header["dtype"] not in ("uint16", "uint32"):
    raise ValueError(
      f"path: {path} has dtype {header['dtype']!r}: wanted 'uint16' or"
      " 'uint32'."
    )
  if ("end_of_text" in header) == ("document_ends" in header):
    raise ValueError(
      f"path: {path}: wanted either end_of_text or document_ends."
    )
  return header


class Corpus(NamedTuple):
  """Token streams of both splits, memory-mapped.

  Attributes:
    train: the training documents' tokens.
    held_out: the held-out documents' tokens.
    train_ends: where each training document ends in `train`.
    held_out_ends: the same of the held-out documents.
    train_folders: number of the folder of each training document; None for
      tokens without folders.
    held_out_folders: the same of the held-out documents.
    token_bytes: bytes of text that each id stands for; 0 for end-of-text. None
      if unknown.
    fingerprint: JSON values that identify the text and its tokens.
    tokenizer: what `read_tokenizer` makes the tokenizer from; None if it needs
      nothing.
  """

  train: UInt[np.ndarray, "N"]
  held_out: UInt[np.ndarray, "M"]
  train_ends: Int64[np.ndarray, "D"]
  held_out_ends: Int64[np.ndarray, "F"]
  train_folders: Int32[np.ndarray, "D"] | None
  held_out_folders: Int32[np.ndarray, "F"] | None
  token_bytes: Int32[np.ndarray, "V"] | None
  fingerprint: dict[str, Any]
  tokenizer: str | None = None


def _open_tokens(config: TokensConfig) -> Corpus:
  """Maps the tokens of a folder into memory.

  Its fingerprint is of the header, the sizes and 64 pieces of each file: to
  read all of a large file would take minutes.

  Raises:
    ValueError: the folder is not as `TokensConfig` says.
  """
  folder = pathlib.Path(config.path)
  header = read_tokens_header(folder)
  vocab_size, dtype = header["vocab_size"], np.dtype(header["dtype"])

  def array(name: str) -> np.ndarray:
    try:
      return np.load(folder / name)
    except (OSError, ValueError) as error:
      raise ValueError(
        f"path: {folder / name} cannot be read as .npy ({error})."
      ) from error

  streams, ends, about = {}, {}, {}
  for split in ("train", "held_out"):
    path = folder / header[split]
    size = path.stat().st_size if path.is_file() else 0
    if not size or size % dtype.itemsize:
      raise ValueError(
        f"path: {path} has {size} bytes: wanted a file of {dtype.name} tokens."
      )
    stream = streams[split] = np.memmap(path, mode="r", dtype=dtype)
    if "end_of_text" in header:
      found = np.flatnonzero(stream == header["end_of_text"]) + 1
      # What follows the last end is a document too.
      ends[split] = np.union1d(found, [stream.size])
    else:
      ends[split] = array(header["document_ends"][split]).astype(np.int64)
    last = ends[split][-1] if ends[split].size else 0
    if last != stream.size or (np.diff(ends[split], prepend=0) < 0).any():
      raise ValueError(
        f"path: the document ends of {path} end at {last}: wanted integers"
        f" that grow up to its {stream.size} tokens."
      )
    starts = np.linspace(0, max(stream.size - 4096, 0), 64).astype(int)
    pieces = [stream[start : start + 4096] for start in starts.tolist()]
    largest = max(int(piece.max()) for piece in pieces)
    if largest >= vocab_size:
      raise ValueError(
        f"path: {path} has the id {largest}: wanted ids below vocab_size ="
        f" {vocab_size}."
      )
    about[split] = {
      "documents": int(ends[split].size),
      "tokens": int(stream.size),
      "sha256": hashlib.sha256(
        b"".join(p.tobytes() for p in pieces)
      ).hexdigest(),
    }
  token_bytes = None
  if "token_bytes" in header:
    token_bytes = array(header["token_bytes"]).astype(np.int32)
    if token_bytes.shape != (vocab_size,):
      raise ValueError(
        f"path: {header['token_bytes']} has shape {token_bytes.shape}: wanted"
        f" ({vocab_size},), a number for each id."
      )
  return Corpus(
    **streams,
    train_ends=ends["train"],
    held_out_ends=ends["held_out"],
    train_folders=None,
    held_out_folders=None,
    token_bytes=token_bytes,
    fingerprint={
      "name": _printable(folder.resolve().name), "vocab_size": vocab_size,
      **about,
    },
  )  # fmt: skip


def open_corpus(config: TextConfig | TokensConfig) -> Corpus:
  """Reads and hashes the text; tokenizes it unless the cache has its tokens.

  Raises:
    ValueError: the path holds no text, cannot be read, or is not what its
      name says.
    ModuleNotFoundError: a package that the settings need is missing.
  """
  if isinstance(config, TokensConfig):
    return _open_tokens(config)
  copies: dict[str, Any] = {}
  if config.near_duplicates is not None:
    copies["datasketch"] = require_datasketch()
    copies["near_duplicates"] = config.near_duplicates
  files = _find_files(config)
  own = None
  if config.tokenizer not in ("byte", "bpe"):
    own = open_tokenizer(config)
  content = _digest(
    [(name, hashlib.sha256(_read(path)).hexdigest()) for name, path in files]
  )
  fields = ["tokenizer", "held_out", "max_bytes", "text_field"]
  if config.tokenizer == "bpe":
    fields.append("vocab_size")
  settings: dict[str, Any] = {name: getattr(config, name) for name in fields}
  settings |= copies
  kind = config.tokenizer
  if own is not None:
    kind = "own"
    # The content of the file counts, not where it lies.
    digest = hashlib.sha256(own.source.encode()).hexdigest()
    settings["tokenizer"] = f"sha256:{digest}"
    settings["end_of_text"] = own.end_name
  about: dict[str, Any] = {}
  if config.installed:
    about["packages"] = _installed_packages()
  if config.tokenizer != "byte":
    import tokenizers  # an extra

    settings["tokenizers"] = tokenizers.__version__
  key = _digest([_CACHE_VERSION, content, settings])
  folder = pathlib.Path(config.cache_dir) / f"{kind}-{key[:32]}"
  if not folder.exists():
    _write_cache(folder, files, config, own)
  meta = json.loads((folder / "meta.json").read_text())

  def stream(split: str) -> np.ndarray:
    path = folder / f"{split}.bin"
    dtype = _token_dtype(meta["vocab_size"])
    wanted = meta[split]["tokens"] * dtype().itemsize
    if path.stat().st_size != wanted:
      raise ValueError(
        f"cache_dir={config.cache_dir!r}: {path} has {path.stat().st_size}"
        f" bytes, wanted {wanted}. Delete {folder} to make it anew."
      )
    return np.memmap(path, mode="r", dtype=dtype)

  if config.installed:
    name = "installed packages"
  elif config.path is None:
    name = f"Python {platform.python_version()} standard library"
  else:
    name = _printable(pathlib.Path(config.path).resolve().name)
  streams = {split: stream(split) for split in ("train", "held_out")}
  # The tokenizers that are made here end a document with their last id.
  end_of_text = meta["vocab_size"] - 1 if own is None else own.end_of_text
  token_bytes = None
  if meta.get("bytes_known", True):
    token_bytes = np.load(folder / "token_bytes.npy")
  else:
    warnings.warn(
      f"tokenizer={config.tokenizer!r}: the bytes of its tokens do not add up"
      " to those of the text, which it changes, so losses are reported for each"
      " token and not for each byte.",
      stacklevel=4,
    )
  saved = folder / "tokenizer.json"
  ends = {
    f"{split}_ends": np.flatnonzero(tokens == end_of_text) + 1
    for split, tokens in streams.items()
  }
  return Corpus(
    **streams,
    **ends,
    train_folders=np.load(folder / "train_folders.npy"),
    held_out_folders=np.load(folder / "held_out_folders.npy"),
    token_bytes=token_bytes,
    fingerprint={
      "name": name,
      "sha256": content,
      "settings": settings,
      **about,
      **meta,
    },
    tokenizer=saved.read_text() if saved.exists() else None,
  )


def open_tokenizer(config: TextConfig) -> "_OwnTokenizer":
  """The tokenizer of the user's that a config names.

  Raises:
    ValueError: it cannot be read, or has no end-of-text token.
  """
  if config.tokenizer == PRETRAINED:
    raise ValueError(
      f"tokenizer={PRETRAINED!r}: wanted a run with recipe.pretrained, whose"
      " tokenizer.json `train.pretrained.resolve` puts in its place."
    )
  try:
    source = pathlib.Path(config.tokenizer).read_text()
  except (OSError, UnicodeDecodeError) as error:
    raise ValueError(
      f"tokenizer={config.tokenizer!r} cannot be read ({error}): wanted the"
      " path of a tokenizer.json."
    ) from error
  return _OwnTokenizer(source, config)


def read_tokenizer(
  config: TextConfig, saved: str | None
) -> "_ByteTokenizer | _BPETokenizer":
  """The tokenizer with which a corpus was tokenized.

  Args:
    config: of the corpus.
    saved: its `Corpus.tokenizer`.
  """
  if config.tokenizer == "byte":
    return _ByteTokenizer()
  if saved is None:
    raise ValueError(
      f"saved=None: wanted a tokenizer.json for tokenizer={config.tokenizer!r}."
    )
  if config.tokenizer == "bpe":
    return _BPETokenizer(saved, config.vocab_size)
  return _OwnTokenizer(saved, config)


def _installed_packages() -> list[str]:
  """name==version of each package, from which the text can be made again."""
  folder = sysconfig.get_paths()["purelib"]
  found = importlib.metadata.distributions(path=[folder])
  return sorted({f"{p.metadata['Name']}=={p.version}" for p in found})


def _digest(value: Any) -> str:
  return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _token_dtype(vocab_size: int) -> type[np.unsignedinteger]:
  return np.uint16 if vocab_size <= 2**16 else np.uint32


def _find_files(config: TextConfig) -> list[tuple[str, pathlib.Path]]:
  """(name, path) of each file, sorted by name. The name is the path relative
  to the root.

  Linked folders are read too, unless they lie in the root themselves. For the
  standard library, only Python files. Installed packages are left out, and so
  is the record of how Python was built, which differs from machine to machine.
  """
  kind = "purelib" if config.installed else "stdlib"
  root = pathlib.Path(config.path or sysconfig.get_paths()[kind])
  # Unlike Path.is_file, these return False for what may not be accessed.
  if os.path.isfile(root):
    return [(_printable(root.name), root)]
  if not os.path.isdir(root):
    raise ValueError(
      f"path={str(root)!r} does not exist, or may not be looked at: wanted a"
      " text, jsonl or parquet"
      " file, or a folder of them."
    )

  def refuse(error: OSError):
    raise ValueError(
      f"path={str(root)!r}: folder {error.filename!r} cannot be read"
      f" ({error.strerror})."
    ) from error

  files, no_files, links, seen = [], [], [], set()

  def walk(top: pathlib.Path):
    """Reads a folder; leaves those that links lead to for later."""
    for folder, subfolders, names in os.walk(top, onerror=refuse):
      real = os.path.realpath(folder)
      if real in seen:
        subfolders.clear()
        continue
      seen.add(real)
      subfolders[:] = [
        name
        for name in subfolders
        if name not in _SKIPPED_FOLDERS and not name.startswith(".")
      ]
      paths = (pathlib.Path(folder, name) for name in sorted(subfolders))
      links.extend(path for path in paths if path.is_symlink())
      yield folder, names

  def walk_all():
    # A folder in the root keeps its own name, whatever links to it, so links
    # come last.
    yield from walk(root)
    while links:
      yield from walk(links.pop(0))

  for folder, names in walk_all():
    for name in names:
      path = pathlib.Path(folder, name)
      if name.startswith("."):
        continue
      try:
        regular = stat.S_ISREG(path.stat().st_mode)
      except FileNotFoundError:
        no_files.append((path, "a link to nowhere"))
        continue
      except OSError as error:
        raise ValueError(
          f"path: file {str(path)!r} cannot be read ({error.strerror})."
        ) from error
      if not regular:
        no_files.append((path, "no regular file"))
        continue
      if config.path is None and (
        path.suffix != ".py" or name.startswith("_sysconfigdata")
      ):
        continue
      files.append((_printable(path.relative_to(root).as_posix()), path))
  if config.path is not None:
    _warn_left_out(config, [(str(p), why) for p, why in sorted(no_files)])
  if not files:
    raise ValueError(
      f"path={str(root)!r} holds no files: wanted text, json, jsonl or parquet."
    )
  return sorted(files)


def _printable(name: str) -> str:
  """A file's name, with escapes for the bytes that are not UTF-8."""
  return os.fsencode(name).decode(errors="backslashreplace")


def _warn_left_out(config: TextConfig, left_out: list[tuple[str, str]]) -> None:
  """Warns of the documents that are left out: which, and why."""
  if not left_out:
    return
  shown = [f"{_printable(name)} ({why})" for name, why in left_out[:5]]
  if len(left_out) > 5:
    shown.append(f"{len(left_out) - 5} more")
  warnings.warn(
    f"path={config.path!r}: left out: {', '.join(shown)}.", stacklevel=6
  )


def _read(path: pathlib.Path) -> bytes:
  try:
    return path.read_bytes()
  except OSError as error:
    raise ValueError(
      f"path: file {str(path)!r} cannot be read ({error.strerror})."
    ) from error


class _NoText(NamedTuple):
  """Stands for the text of a document that has none.

  Attributes:
    kind: the key of its count in the corpus's metadata.
    why: what the warning says.
  """

  kind: str
  why: str


_NOT_UTF8 = _NoText("not_utf8", "not UTF-8 text")
_TOO_DEEP = _NoText("too_deep", "JSON nested too deep to be read")


def _decompress(name: str, content: bytes) -> tuple[str, bytes]:
  """The suffix of a file's name and its content, both without compression."""
  path = pathlib.PurePosixPath(name.lower())
  expand = _COMPRESSED.get(path.suffix)
  if expand is None:
    return path.suffix, content
  try:
    return path.with_suffix("").suffix, expand(content)
  except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
    raise ValueError(
      f"path: {name} cannot be decompressed ({error})."
    ) from error


def _documents(
  name: str, path: pathlib.Path, text_field: str
) -> Iterator[tuple[str, str | _NoText]]:
  """(name, text) of each document in a file."""

  def check(text: Any, where: str, fields: list[str]) -> str:
    if not isinstance(text, str):
      raise ValueError(
        f"text_field={text_field!r}: {where} has no text there (fields:"
        f" {fields}). Wanted a string in that field."
      )
    try:
      text.encode()
    except UnicodeEncodeError as error:
      raise ValueError(
        f"text_field={text_field!r}: {where} holds half of a surrogate pair"
        f" ({error}). Wanted text that UTF-8 can hold."
      ) from error
    return text

  def lines(content: bytes) -> Iterator[tuple[str, str | _NoText]]:
    for number, line in enumerate(content.splitlines(), 1):
      where = f"line {number} of {name}"
      if not line.strip():
        continue
      try:
        row = json.loads(line)
      except RecursionError:
        yield f"{name}:{number}", _TOO_DEEP
        continue
      except ValueError as error:
        raise ValueError(f"path: {where} is not JSON: {error}") from error
      if not isinstance(row, dict):
        raise ValueError(
          f"path: {where} is a {type(row).__name__}: wanted a JSON object."
        )
      text = check(row.get(text_field), where, list(row))
      yield f"{name}:{number}", text

  suffix, content = _decompress(name, _read(path))
  if suffix == ".json":
    rows = _json_rows(content, text_field)
    if rows == "lines":
      suffix = ".jsonl"
    elif isinstance(rows, _NoText):
      yield name, rows
      return
    elif rows is not None:
      for number, row in enumerate(rows, 1):
        text = row if isinstance(row, str) else row[text_field]
        yield f"{name}:{number}", check(text, f"entry {number} of {name}", [])
      return
  if suffix in (".jsonl", ".ndjson"):
    yield from lines(content)
  elif suffix == ".parquet":
    import pyarrow
    import pyarrow.parquet as pq

    try:
      table = pq.ParquetFile(io.BytesIO(content))
      fields = table.schema_arrow.names
      if text_field not in fields:
        check(None, name, fields)
      number = 0
      for batch in table.iter_batches(columns=[text_field]):
        for text in batch.column(0).to_pylist():
          number += 1
          yield (
            f"{name}:{number}",
            check(text, f"row {number} of {name}", fields),
          )
    except (pyarrow.ArrowException, OSError) as error:
      raise ValueError(
        f"path: {name} cannot be read as parquet: {error}"
      ) from error
  else:
    try:
      text = content.decode()
    except UnicodeDecodeError:
      text = "\0"
    # Binary formats can be valid UTF-8 by chance, but they often contain NUL,
    # which text does not.
    yield name, _NOT_UTF8 if "\0" in text else text


def _json_rows(
  content: bytes, text_field: str
) -> list[Any] | Literal["lines"] | _NoText | None:
  """What a .json file holds, if it is a data set.

  Returns:
    The entries of an array of texts, or of objects with the text field, or one
    such object; "lines" for objects with that field, one a line; None for any
    other JSON value but an array, such as a program's settings, which is itself
    a text.
  """

  def has_text(row: Any) -> bool:
    return isinstance(row, dict) and isinstance(row.get(text_field), str)

  try:
    value = json.loads(content)
  except RecursionError:
    return _TOO_DEEP
  except ValueError as error:
    first = content.lstrip().split(b"\n", 1)[0]
    try:
      line = json.loads(first)
    except (ValueError, RecursionError):
      return _NoText("not_json", f"no JSON: {error}")
    if has_text(line):
      return "lines"
    return _NoText("json_lines", f"JSON lines without a text in {text_field!r}")
  if has_text(value):
    return [value]
  if not isinstance(value, list):
    return None
  if all(isinstance(row, str) or has_text(row) for row in value):
    return value
  return _NoText(
    "json_array",
    f"a JSON array with entries that have no text in {text_field!r}",
  )


def _split(
  files: list[tuple[str, pathlib.Path]], config: TextConfig
) -> tuple[dict[str, list[tuple[str, str]]], dict[str, Any]]:
  """The documents of both splits, and what the corpus's metadata say of those
  left out: how many for which reason, and the bytes of near-duplicates.

  Of equal texts only the first is kept, so that no held-out document is also a
  training document. The same goes for near-duplicates, if the config says so.
  """
  documents: list[tuple[str, str]] = []
  left_out = {"not_utf8": 0, "empty": 0, "duplicate": 0}
  seen = set()
  no_text: list[tuple[str, str]] = []
  for file_name, path in files:
    for name, text in _documents(file_name, path, config.text_field):
      if isinstance(text, _NoText):
        left_out[text.kind] = left_out.get(text.kind, 0) + 1
        no_text.append((name, text.why))
      elif not text:
        left_out["empty"] += 1
      elif text in seen:
        left_out["duplicate"] += 1
      else:
        seen.add(text)
        documents.append((name, text))
  if config.path is not None:
    _warn_left_out(config, no_text)
  if not documents:
    raise ValueError(
      f"path={config.path!r} holds no text ({len(files)} files; documents left"
      f" out: {left_out}): wanted UTF-8 text, json, jsonl or parquet."
    )

  def order(salt: str):
    return lambda pair: hashlib.sha256(f"{salt}:{pair[0]}".encode()).digest()

  about: dict[str, Any] = {"left_out": left_out}
  chosen: Iterable[tuple[str, str]] = sorted(documents, key=order("sample"))
  copies: list[tuple[str, str]] = []
  if config.near_duplicates is not None:
    chosen = _without_copies(chosen, config.near_duplicates, copies)
  if config.max_bytes is None:
    documents = list(chosen)
  else:
    room, documents = config.max_bytes, []
    for name, text in chosen:
      cut = text.encode()[:room].decode(errors="ignore")
      room -= len(cut.encode())
      if cut:
        documents.append((name, cut))
      if room <= 0 or len(cut) < len(text):
        break
  if config.near_duplicates is not None:
    left_out["near_duplicate"] = len(copies)
    about["near_duplicate_bytes"] = _count_bytes(copies)
    print(
      f"near_duplicates={config.near_duplicates}: {len(documents):,} documents"
      f" with {_count_bytes(documents):,} bytes are kept; {len(copies):,} with"
      f" {_count_bytes(copies):,} bytes are nearly copies of them, and left"
      " out.",
      flush=True,
    )
  if len(documents) == 1:
    name, text = documents[0]
    cut = round(len(text) * (1.0 - config.held_out))
    splits = {
      "train": [(f"{name} (first part)", text[:cut])],
      "held_out": [(f"{name} (last part)", text[cut:])],
    }
  else:
    count = round(config.held_out * len(documents))
    count = min(max(count, 1), len(documents) - 1)
    ranked = sorted(documents, key=order("held out"))
    splits = {
      "train": sorted(ranked[count:]),
      "held_out": sorted(ranked[:count]),
    }
  for split, parts in splits.items():
    if not any(text for _, text in parts):
      raise ValueError(
        f"held_out={config.held_out} leaves the {split} split of"
        f" path={config.path!r} empty: wanted more text or another share."
      )
  return splits, about


def _without_copies(
  documents: Iterable[tuple[str, str]],
  threshold: float,
  copies: list[tuple[str, str]],
) -> Iterator[tuple[str, str]]:
  """The documents that are no near-duplicates of earlier ones; the others are
  added to `copies`. It reads no further than asked, since this takes time."""
  near = NearDuplicates(threshold)
  for name, text in documents:
    if near.keep(text):
      yield name, text
    else:
      copies.append((name, text))


def _count_bytes(documents: list[tuple[str, str]]) -> int:
  return sum(len(text.encode()) for _, text in documents)


# The name of the token that ends a document, in exported tokenizers.
END_OF_TEXT = "<|end_of_text|>"


class _ByteTokenizer:
  vocab_size = 256
  end_of_text = _BYTE_END_OF_TEXT
  end_name = END_OF_TEXT
  token_bytes = np.where(np.arange(256) == _BYTE_END_OF_TEXT, 0, 1)

  def encode(self, texts: list[str]) -> Iterator[np.ndarray]:
    return (np.frombuffer(text.encode(), np.uint8) for text in texts)

  def decode(self, ids: np.ndarray) -> str:
    """The text of ids, with U+FFFD for ids that are not text."""
    # Byte 255 is not text, and neither are the ids above it.
    return bytes(np.minimum(ids, 255).tolist()).decode(errors="replace")

  def saved(self) -> str:
    """The JSON text of a `tokenizers` object with the same ids."""
    import tokenizers

    # ByteLevel writes a byte as itself where it is printable in Latin-1, and
    # the others as the characters from 256 on.
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    names = {byte: chr(byte) for byte in printable}
    names |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    names[self.end_of_text] = END_OF_TEXT
    model = tokenizers.Tokenizer(
      tokenizers.models.BPE({name: byte for byte, name in names.items()}, [])
    )
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
      add_prefix_space=False, use_regex=False
    )
    model.decoder = tokenizers.decoders.ByteLevel()
    model.add_special_tokens([END_OF_TEXT])
    return model.to_str()


class _BPETokenizer:
  """Byte-level BPE.

  The last id is end-of-text. It is not in the vocabulary of the `tokenizers`
  object, so no text is encoded to it. The tokenizer is trained on every n-th
  text, with the smallest n that stays within `_BPE_BYTES`.
  """

  end_name = END_OF_TEXT

  def __init__(self, saved: str, vocab_size: int):
    """Reads the JSON text of a `tokenizers` object, kept as `source`."""
    import tokenizers

    self.source = saved
    self.model = tokenizers.Tokenizer.from_str(saved)
    self.vocab_size = vocab_size
    self.end_of_text = vocab_size - 1
    # Each character of a token's name stands for one byte. A small corpus may
    # leave ids unused; they have no name and never occur.
    self.token_bytes = np.zeros(vocab_size)
    for token, index in self.model.get_vocab().items():
      self.token_bytes[index] = len(token)

  @classmethod
  def train(cls, texts: list[str], vocab_size: int) -> "_BPETokenizer":
    import tokenizers

    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    words = tokenizers.Regex(f".{{1,{_BPE_WORD_BYTES}}}")
    cut = tokenizers.pre_tokenizers.Split(words, "isolated")
    model.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([byte_level, cut])
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
      vocab_size=vocab_size - 1,
      initial_alphabet=sorted(byte_level.alphabet()),
      show_progress=False,
    )
    every = -(-sum(map(len, texts)) // _BPE_BYTES)
    model.train_from_iterator(texts[:: max(every, 1)], trainer=trainer)
    return cls(model.to_str(pretty=True), vocab_size)

  def encode(self, texts: list[str]) -> Iterator[np.ndarray]:
    found = self.model.encode_batch_fast(texts, add_special_tokens=False)
    return (np.array(e.ids, np.int64) for e in found)

  def decode(self, ids: np.ndarray) -> str:
    """The text of ids, with U+FFFD for ids that are not text."""
    parts, start = [], 0
    known = np.isin(ids, list(self.model.get_vocab().values()))
    for stop in [*np.flatnonzero(~known), len(ids)]:
      part = ids[start:stop].tolist()
      parts.append(self.model.decode(part, skip_special_tokens=False))
      start = stop + 1
    return "\ufffd".join(parts)

  def saved(self) -> str:
    """The JSON text of a `tokenizers` object that has end-of-text too."""
    import tokenizers

    model = tokenizers.Tokenizer.from_str(self.model.to_str())
    # A small corpus may leave ids unused before that of end-of-text.
    unused = range(model.get_vocab_size(), self.end_of_text)
    model.add_special_tokens([f"<|unused_{i}|>" for i in unused])
    model.add_special_tokens([END_OF_TEXT])
    assert model.token_to_id(END_OF_TEXT) == self.end_of_text
    return model.to_str()


# Names of the token that ends a document, in tokenizers of others.
_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")


class _OwnTokenizer(_BPETokenizer):
  """A tokenizer.json of the user's.

  Text never becomes one of its special tokens, whatever it spells.
  """

  def __init__(self, source: str, config: TextConfig):
    """Reads the content of a tokenizer.json.

    Raises:
      ValueError: it is none, or does not have the end-of-text token.
    """
    import tokenizers

    name = f"tokenizer={config.tokenizer!r}"
    try:
      self.model = tokenizers.Tokenizer.from_str(source)
    except Exception as error:  # the package raises no narrower one
      raise ValueError(
        f"{name} cannot be read ({error}): wanted a tokenizer.json of Hugging"
        " Face's tokenizers."
      ) from error
    self.source = source
    self.model.no_truncation()
    self.model.no_padding()
    self.model.encode_special_tokens = True
    vocab = self.model.get_vocab()
    if config.end_of_text is not None:
      ends = [config.end_of_text] if config.end_of_text in vocab else []
      wanted = "the name of one of its tokens"
    else:
      ends = [end for end in _ENDS if end in vocab]
      wanted = f"the name of the token that ends a document; of {_ENDS} it has"
      wanted += f" {ends or 'none'}"
    if len(ends) != 1:
      raise ValueError(
        f"end_of_text={config.end_of_text!r} with {name}: wanted {wanted}."
      )
    (self.end_name,) = ends
    self.end_of_text = vocab[self.end_name]
    self.vocab_size = max(vocab.values()) + 1
    self.token_bytes = self._token_bytes(vocab)

  def _token_bytes(self, vocab: dict[str, int]) -> np.ndarray:
    """Bytes of text that each id stands for, by its name: 0 for special tokens.

    A tokenizer that changes text, to lower case say, has tokens that stand for
    other numbers of bytes. `_write_files` compares with the text.
    """
    import tokenizers

    parts = json.loads(self.model.to_str())
    kinds = _types([parts["pre_tokenizer"], parts["decoder"]])
    alphabet = set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    added = self.model.get_added_tokens_decoder()

    def size(token: str, index: int) -> int:
      if index in added:
        literal = not added[index].special and index != self.end_of_text
        return len(token.encode()) if literal else 0
      if index == self.end_of_text:
        return 0
      if "ByteLevel" in kinds and alphabet.issuperset(token):
        return len(token)  # each character stands for a byte
      if "ByteFallback" in kinds and re.fullmatch("<0x[0-9A-F]{2}>", token):
        return 1
      # SentencePiece writes a space as this character.
      return len(token.replace("\u2581", " ").encode())

    sizes = np.zeros(self.vocab_size)
    for token, index in vocab.items():
      sizes[index] = size(token, index)
    return sizes

  def saved(self) -> str:
    """The file's content, without tokens that it would add to texts: a run's
    documents have none but end-of-text."""
    parts = json.loads(self.source)
    if self.model.num_special_tokens_to_add(False):
      parts["post_processor"] = None
    return json.dumps(parts, ensure_ascii=False)


def _types(parts: Any) -> set[str]:
  """The names of all parts of a `tokenizers` object that JSON values hold."""
  if isinstance(parts, dict):
    parts, own = list(parts.values()), {str(parts.get("type"))}
  else:
    own = set()
  if isinstance(parts, list):
    return own.union(*map(_types, parts))
  return own


def _write_cache(
  folder: pathlib.Path,
  files: list[tuple[str, pathlib.Path]],
  config: TextConfig,
  own: _OwnTokenizer | None = None,
):
  """Writes tokens, tokenizer and their metadata. A failure leaves no files."""
  splits, about = _split(files, config)
  if own is not None:
    tokenizer = own
  elif config.tokenizer == "byte":
    tokenizer = _ByteTokenizer()
  else:
    texts = [text for _, text in splits["train"]]
    tokenizer = _BPETokenizer.train(texts, config.vocab_size)
  meta: dict[str, Any] = {
    "vocab_size": tokenizer.vocab_size,
    "files": len(files),
    **about,
  }
  try:
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = pathlib.Path(tempfile.mkdtemp(prefix="tmp-", dir=folder.parent))
  except OSError as error:
    raise ValueError(
      f"cache_dir={config.cache_dir!r} cannot be written ({error.strerror}):"
      " wanted a folder, or a path at which one can be made."
    ) from error
  try:
    _write_files(temporary, folder, splits, tokenizer, meta)
  except OSError as error:
    raise OSError(
      f"cache_dir={config.cache_dir!r}: tokens cannot be written"
      f" ({error.strerror or error}); nothing is left there."
    ) from error
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


def _write_files(
  temporary: pathlib.Path,
  folder: pathlib.Path,
  splits: dict[str, list[tuple[str, str]]],
  tokenizer: "_ByteTokenizer | _BPETokenizer",
  meta: dict[str, Any],
):
  """Writes the files of a cache entry, and then puts them in its place."""
  dtype = _token_dtype(tokenizer.vocab_size)
  own = isinstance(tokenizer, _OwnTokenizer)
  for split, parts in splits.items():
    num_tokens, num_bytes = 0, 0
    with open(temporary / f"{split}.bin", "wb") as file:
      for first in range(0, len(parts), 256):
        texts = [text for _, text in parts[first : first + 256]]
        for number, ids in enumerate(tokenizer.encode(texts), first):
          if own and (ids == tokenizer.end_of_text).any():
            raise ValueError(
              f"end_of_text={tokenizer.end_name!r}: {parts[number][0]} spells"
              " this token, which ends documents. Wanted one that text cannot"
              " become, such as a special token."
            )
          if own:
            num_bytes += tokenizer.token_bytes[ids].sum()
          ids = np.append(ids, tokenizer.end_of_text).astype(dtype)
          num_tokens += ids.size
          file.write(ids.tobytes())
    names = [name for name, _ in parts]
    parents = [str(pathlib.PurePosixPath(name).parent) for name in names]
    _, numbers = np.unique(parents, return_inverse=True)
    np.save(temporary / f"{split}_folders.npy", numbers.astype(np.int32))
    meta[split] = {
      "documents": len(parts),
      "bytes": _count_bytes(parts),
      "tokens": num_tokens,
      "names_sha256": _digest(names),
    }
    there = meta[split]["bytes"]
    if own and abs(num_bytes - there) > _BYTES_OFF * there:
      meta["bytes_known"] = False
    if split == "held_out":
      meta[split]["first_names"] = names[:500]
  np.save(temporary / "token_bytes.npy", tokenizer.token_bytes.astype(np.int32))
  if isinstance(tokenizer, _BPETokenizer):
    (temporary / "tokenizer.json").write_text(tokenizer.source)
  (temporary / "meta.json").write_text(json.dumps(meta, indent=2))
  try:
    os.replace(temporary, folder)
  except OSError:
    # Another process has made the folder meanwhile, with the same content.
    if not (folder / "meta.json").exists():
      raise
