"""Checks of sizes and options, which the layers and their configs share."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np

from msa_jax import ops


def require(condition: bool | np.bool_, name: str, want: str, got: Any) -> None:
  """Raises ValueError that names an argument, what came and what is wanted."""
  if not condition:
    raise ValueError(f"{name} must be {want}, got {got!r}")


def check_sizes(least: int = 1, /, **sizes: Any) -> None:
  """Raises ValueError unless each argument is an integer of at least that."""
  for name, value in sizes.items():
    require(
      isinstance(value, (int, np.integer)) and value >= least,
      name,
      f"an integer of at least {least}",
      value,
    )


def check_heads(
  *,
  num_heads: int,
  num_kv_heads: int,
  qkv_features: int,
  rope_dim: int | None,
  rope_theta: float,
  norm_eps: float,
) -> None:
  """Raises ValueError unless the arguments are those of `GQAttention`."""
  check_sizes(
    num_heads=num_heads, num_kv_heads=num_kv_heads, qkv_features=qkv_features
  )
  require(
    num_heads % num_kv_heads == 0,
    "num_heads",
    f"a multiple of num_kv_heads = {num_kv_heads}",
    num_heads,
  )
  require(
    qkv_features % num_heads == 0,
    "qkv_features",
    f"a multiple of num_heads = {num_heads}",
    qkv_features,
  )
  head_dim = qkv_features // num_heads
  rope_dim = head_dim if rope_dim is None else rope_dim
  require(
    rope_dim % 2 == 0 and 0 <= rope_dim <= head_dim,
    "rope_dim",
    f"even and from 0 to head_dim = {head_dim}",
    rope_dim,
  )
  for name, value in (("rope_theta", rope_theta), ("norm_eps", norm_eps)):
    require(0 < value < float("inf"), name, "above 0 and finite", value)


def check_index_branch(
  *,
  index_dim: int,
  block_size: int,
  top_k: int,
  num_local_blocks: int,
  score_precision: str,
  selection: str,
  force_first_block: bool,
  detach_input: bool,
  detach_teacher: bool,
  value_head: bool,
) -> None:
  """Raises ValueError unless the arguments are those of `MSAttention`."""
  check_sizes(index_dim=index_dim, block_size=block_size, top_k=top_k)
  require(
    isinstance(num_local_blocks, (int, np.integer))
    and 0 <= num_local_blocks <= top_k,
    "num_local_blocks",
    f"an integer from 0 to top_k = {top_k}",
    num_local_blocks,
  )
  for name, value, allowed in (
    ("score_precision", score_precision, get_args(ops.ScorePrecision)),
    ("selection", selection, ("index", "window")),
  ):
    require(value in allowed, name, " or ".join(map(repr, allowed)), value)
  require(
    not force_first_block or top_k > max(num_local_blocks, 1),
    "top_k",
    "greater than num_local_blocks, and than 1, with force_first_block",
    top_k,
  )
  for name, value, plain in (
    ("force_first_block", force_first_block, False),
    ("detach_input", detach_input, True),
    ("detach_teacher", detach_teacher, True),
    ("value_head", value_head, False),
  ):
    require(
      selection == "index" or value == plain,
      name,
      f"{plain} with selection='window', which has no Index Branch",
      value,
    )
