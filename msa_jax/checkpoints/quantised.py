"""Weights of 8 bits with a scale for each block, and what they stand for.

A matrix `X.weight` of e4m3 codes q [outputs, inputs] has its scales beside it,
in `X.weight_scale_inv`, one for each block of `weight_block_size`:

  w[i, j] = q[i, j] * scale[i // rows, j // columns].

Scales are float32 or bfloat16 (quant_method "fp8", blocks of 128 x 128: the
MiniMax-M2 series), or bytes s that stand for 2^(s - 127) (quant_method "mxfp8",
blocks of 1 x 32: MiniMax-M3-MXFP8). Whether a tensor is quantised is decided by
whether it has scales, not by the config's list of exceptions: programs name its
layers in different ways.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from msa_jax.checkpoints.fields import Fields
from msa_jax.checkpoints.tensor_files import DTYPES, Tensor

SCALE = "_scale_inv"
_POWERS = ("U8", "F8_E8M0")
_METHODS = ("fp8", "mxfp8")
# Rows that are converted at a time, so that little float32 is in memory.
_ROWS = 1024


class Quantised(NamedTuple):
  """A quantised matrix.

  Attributes:
    codes: the e4m3 codes.
    scales: the scales.
    block: rows and columns of a block.
    target: dtype of the values, by its safetensors name.
  """

  codes: Tensor
  scales: Tensor
  block: tuple[int, int]
  target: str

  @property
  def dtype(self) -> str:
    return self.target

  @property
  def shape(self) -> tuple[int, ...]:
    return self.codes.shape

  def problem(self) -> str | None:
    """What is wrong with the scales; None if nothing is."""
    if len(self.shape) != 2:
      return f"{list(self.shape)} is no matrix"
    wanted = [-(-size // n) for size, n in zip(self.shape, self.block)]
    if list(self.scales.shape) != wanted:
      return (
        f"scales {list(self.scales.shape)}, wanted {wanted} for"
        f" {list(self.shape)} in blocks of {list(self.block)}"
      )
    known = ("F32", "BF16", *_POWERS)
    if self.scales.dtype not in known:
      return f"scales of {self.scales.dtype}, wanted {' or '.join(known)}"
    return None

  def open(self) -> np.ndarray:
    """The values, rounded once to the target dtype."""
    rows, columns = self.block
    codes, scales = self.codes.open(), self.scales.open()
    target = DTYPES[self.target]
    values = np.empty(self.shape, target)
    step = max(_ROWS // rows, 1) * rows
    for first in range(0, self.shape[0], step):
      part = codes[first : first + step].astype(np.float32)
      factors = _factors(scales[first // rows :][: -(-len(part) // rows)])
      factors = np.repeat(factors, rows, axis=0)[: len(part)]
      factors = np.repeat(factors, columns, axis=1)[:, : part.shape[1]]
      values[first : first + step] = (part * factors).astype(target)
    return values


def _factors(scales: np.ndarray) -> np.ndarray:
  if scales.dtype not in (np.uint8, ml_dtypes.float8_e8m0fnu):
    return scales.astype(np.float32)
  powers = scales.view(np.uint8).astype(np.int32)
  factors = np.ldexp(np.float32(1), powers - 127)
  # The format's one code that is no power of two.
  return np.where(powers == 255, np.float32(np.nan), factors)


def read_block(fields: Fields) -> tuple[int, int] | None:
  """The block size of a config's quantised weights; None if it has none."""
  given = fields.values.get("quantization_config")
  if given is not None and not isinstance(given, Mapping):
    fields.read.add("quantization_config")
    fields.complain(f"quantization_config must be an object, got {given!r}")
    return None
  config = fields.part("quantization_config")
  if not config.values:
    return None
  algorithm = config.get("moe_quant_algo", "quant_algo")
  method = config.get("quant_method")
  packed = config.get("moe_quant_format")
  words = f"{algorithm} {method} {packed}".lower()
  if "nvfp4" in words:
    fields.complain(
      f"quantization_config (moe_quant_algo={algorithm!r},"
      f" quant_method={method!r}): experts packed as NVFP4 are not supported,"
      " because the convention of their scales is not published; take the BF16"
      " or MXFP8 folder"
    )
  elif method not in _METHODS:
    wanted = " or ".join(map(repr, _METHODS))
    fields.complain(
      f"quantization_config.quant_method={method!r} is not supported: only"
      f" {wanted}"
    )
  if fields.problems and (method not in _METHODS or "nvfp4" in words):
    config.read |= set(config.values)
    return None
  config.only("fmt", "e4m3", "float8_e4m3fn")
  config.only("scale_fmt", "ue8m0", "float")
  # How activations are quantised, and which layers are not: a checkpoint's
  # tensors say the latter, and here activations are not quantised.
  config.read |= {
    "activation_scheme",
    "dequantize",
    "ignored_layers",
    "modules_to_not_convert",
  }
  default = [1, 32] if method == "mxfp8" else None
  block = config.get("weight_block_size", default=default)
  good = isinstance(block, list) and len(block) == 2
  if not good or any(not isinstance(n, int) or n < 1 for n in block):
    fields.complain(
      "quantization_config.weight_block_size must be two integers of at least"
      f" 1, got {block!r}"
    )
    return None
  return block[0], block[1]


def pair(
  tensors: Mapping[str, Tensor], block: tuple[int, int] | None, target: str
) -> dict[str, Any]:
  """The tensors, with codes and scales of a quantised matrix as one.

  Codes without scales, and scales without codes, stay as they are.
  """
  paired: dict[str, Any] = dict(tensors)
  for name, tensor in tensors.items():
    scales = tensors.get(name + SCALE)
    if tensor.dtype == "F8_E4M3" and scales is not None and block is not None:
      paired[name] = Quantised(tensor, scales, block, target)
      del paired[name + SCALE]
  return paired
