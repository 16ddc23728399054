"""Checks of arguments that ops, layers, configs, caches and generation share.

There is one rule for integers: what `operator.index` takes is an integer, but a
bool is none. The checks return Python ints, because a NumPy integer would give
its own width to what is computed from it. There is one wording: "NAME must be
WANT, got GOT". This module imports nothing else of the package, so that every
other module can use it.
"""

from __future__ import annotations

import math
import operator
import typing
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array

# --- the wording -------------------------------------------------------------


def wrong(name: str, want: str, got: str) -> ValueError:
  """The error that says which argument is wrong, what is wanted, what came."""
  return ValueError(f"{name} must be {want}, got {got}")


def require(condition: bool | np.bool_, name: str, want: str, got: Any) -> None:
  """Raises `wrong` with the repr of what came, unless the condition holds."""
  if not condition:
    raise wrong(name, want, repr(got))


# --- integers, numbers and choices -------------------------------------------


def as_integer(value: Any) -> int | None:
  """What `operator.index` gives for a value; None for a bool or no integer."""
  if isinstance(value, bool):
    return None
  try:
    return operator.index(value)
  except TypeError:
    return None


def is_integer(value: Any) -> bool:
  """Whether a value counts as an integer."""
  return as_integer(value) is not None


def check_integer(name: str, value: Any, least: int = 1) -> int:
  """Returns the value as a Python int.

  Raises:
    ValueError: the value is no integer of at least `least`.
  """
  number = as_integer(value)
  if number is None or number < least:
    raise wrong(name, f"an integer of at least {least}", repr(value))
  return number


def check_sizes(least: int = 1, /, **sizes: Any) -> list[int]:
  """Returns the arguments as Python ints.

  Raises:
    ValueError: one is no integer of at least `least`.
  """
  return [check_integer(name, value, least) for name, value in sizes.items()]


def keep(config: Any, **fields: Any) -> None:
  """Puts checked values into the fields of a frozen dataclass."""
  for name, value in fields.items():
    object.__setattr__(config, name, value)


def check_choice(name: str, value: Any, choices: Any) -> None:
  """Raises ValueError unless the value is one of the choices.

  Args:
    name: of the argument.
    value: what came.
    choices: a `Literal` type, or a sequence of values.
  """
  allowed = typing.get_args(choices) or tuple(choices)
  want = f"one of {', '.join(map(repr, allowed))}"
  if isinstance(value, Tracer):
    want += ", and a static argument of jax.jit"
  require(value in allowed, name, want, value)


def is_number(value: Any) -> bool:
  """Whether a value is a Python or NumPy number; a bool is none."""
  numbers = (int, float, np.integer, np.floating)
  return isinstance(value, numbers) and not isinstance(value, bool)


def check_positive(**values: float) -> None:
  """Raises ValueError unless each number is above 0 and finite."""
  for name, value in values.items():
    good = is_number(value) and 0 < value < math.inf
    require(good, name, "above 0 and finite", value)


def check_precision(dtype: Any, param_dtype: Any) -> None:
  """Refuses float64 parameters whose digits the computation would drop.

  Raises:
    ValueError: param_dtype is float64 and dtype is not.
  """
  require(
    jnp.dtype(param_dtype) != jnp.float64 or jnp.dtype(dtype) == jnp.float64,
    "dtype",
    "float64, because param_dtype is float64",
    jnp.dtype(dtype).name,
  )


def reverse_mode(function: Callable[[], Any], supported: str) -> Any:
  """What `function` returns, with an error that a reader of `jax.jvp` knows.

  Args:
    function: calls something with a gradient in reverse mode only.
    supported: what supports it, and what else does, for the message.

  Raises:
    NotImplementedError: forward mode. JAX raises a TypeError.
  """
  try:
    return function()
  except TypeError as error:
    if "custom_vjp" not in str(error):
      raise
    raise NotImplementedError(supported) from error


def check_scale(name: str, value: Any, size: int) -> float:
  """The factor of attention scores; None stands for size^-0.5.

  Raises:
    ValueError: the value is no finite Python number (a traced one is none).
  """
  if value is None:
    return size**-0.5
  try:
    number = float(value)
  except (TypeError, ValueError, jax.errors.ConcretizationTypeError):
    raise wrong(name, "a Python number or None", repr(value)) from None
  require(math.isfinite(number), name, "finite", number)
  return number


def compute_dtype(dtype: Any) -> np.dtype:
  """float32, or float64 for float64: what sums of this dtype are computed in.

  Unlike `jnp.promote_types` it works under strict dtype promotion.
  """
  dtype = jnp.dtype(dtype)
  return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


# --- options of layers -------------------------------------------------------


def check_blocks(
  block_size: Any, top_k: Any, num_local_blocks: Any
) -> tuple[int, int, int]:
  """The arguments as Python ints.

  Raises:
    ValueError: one is no integer, or num_local_blocks is above top_k.
  """
  block_size = check_integer("block_size", block_size)
  top_k = check_integer("top_k", top_k)
  local = as_integer(num_local_blocks)
  if local is None or not 0 <= local <= top_k:
    want = f"an integer from 0 to top_k = {top_k}"
    raise wrong("num_local_blocks", want, repr(num_local_blocks))
  return block_size, top_k, local


def check_rope_dim(
  rope_dim: Any, head_dim: int, head_dim_name: str = "head_dim"
) -> int:
  """The number of dims that rotate; None stands for all of head_dim.

  Raises:
    ValueError: it is no even integer from 0 to head_dim.
  """
  dims = head_dim if rope_dim is None else as_integer(rope_dim)
  if dims is None or dims % 2 or not 0 <= dims <= head_dim:
    want = f"even and from 0 to {head_dim_name} = {head_dim}"
    raise wrong("rope_dim", want, repr(rope_dim))
  return dims


def check_heads(
  *,
  num_heads: int,
  num_kv_heads: int,
  qkv_features: int,
  rope_dim: int | None,
  rope_theta: float,
  norm_eps: float,
) -> tuple[int, int, int, int]:
  """The sizes of a `GQAttention` as Python ints.

  Returns:
    (num_heads, num_kv_heads, head_dim, rope_dim).

  Raises:
    ValueError: an argument is wrong.
  """
  num_heads, num_kv_heads, qkv_features = check_sizes(
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
    f"a multiple of num_heads = {num_heads} (it is in_features unless it is"
    " given)",
    qkv_features,
  )
  head_dim = qkv_features // num_heads
  rope_dim = check_rope_dim(rope_dim, head_dim)
  check_positive(rope_theta=rope_theta, norm_eps=norm_eps)
  return num_heads, num_kv_heads, head_dim, rope_dim


def check_rngs(rngs: nnx.Rngs) -> None:
  """Raises ValueError unless rngs are streams of random keys."""
  # Flax would say that a key or a seed has no attribute "params".
  if not isinstance(rngs, nnx.Rngs):
    want = "a flax.nnx.Rngs, such as nnx.Rngs(0)"
    raise wrong("rngs", want, type(rngs).__name__)


# --- arrays ------------------------------------------------------------------


def check_array(
  name: str, x: Array, shape: Sequence[int | None], letters: str
) -> None:
  """Raises ValueError unless x is an array of this shape.

  Args:
    name: of the argument.
    x: what came.
    shape: sizes; None leaves one free.
    letters: the axes, such as "[B, T]".
  """
  if not hasattr(x, "shape") or not hasattr(x, "dtype"):
    raise wrong(name, f"an array of shape {letters}", type(x).__name__)
  if len(x.shape) != len(shape) or any(
    want is not None and size != want for size, want in zip(x.shape, shape)
  ):
    want = ", ".join("any" if size is None else str(size) for size in shape)
    raise wrong(
      name, f"an array of shape {letters} = ({want})", str(tuple(x.shape))
    )


def check_integers(name: str, x: Array) -> None:
  """Raises ValueError unless x is an array of integers."""
  if not jnp.issubdtype(x.dtype, jnp.integer):
    raise wrong(name, "an array of integers", str(x.dtype))


def check_rank(name: str, x: Array, letters: str) -> None:
  """Raises ValueError unless x is an array with one axis a letter."""
  axes = letters.split()
  want = f"[{', '.join(axes)}]"
  if not hasattr(x, "shape") or not hasattr(x, "dtype"):
    raise wrong(name, f"an array of shape {want}", type(x).__name__)
  if len(x.shape) != len(axes):
    raise wrong(
      name,
      f"an array of rank {len(axes)}, {want}",
      f"shape {tuple(x.shape)}",
    )


def check_floats(**arrays: tuple[Array, str]) -> None:
  """Checks ranks, sizes and dtypes of the floating-point arrays of one call.

  Args:
    **arrays: each array with the letters of its axes. All must have the dtype
      of the first.

  Raises:
    ValueError: names the first array that is wrong.
  """
  first_name, first = "", None
  for name, (x, letters) in arrays.items():
    check_rank(name, x, letters)
    if 0 in x.shape:
      raise wrong(name, "an array without empty axes", f"shape {x.shape}")
    if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64):
      want = "an array of bfloat16, float16, float32 or float64"
      raise wrong(name, want, str(x.dtype))
    if first is None:
      first_name, first = name, x.dtype
    elif x.dtype != first:
      want = f"an array of {first}, the dtype of {first_name}"
      raise wrong(name, want, str(x.dtype))


def _check_axis(
  name: str, x: Array, axis: int, want: int, letter: str, other: str
) -> None:
  if x.shape[axis] != want:
    raise wrong(
      name,
      f"an array with {letter} = {want} (as {other}) in axis {axis}",
      f"{x.shape[axis]} in shape {tuple(x.shape)}",
    )


def check_attention(q: Array, k: Array, v: Array) -> None:
  """Raises ValueError unless the shapes of q, k and v fit each other."""
  b, t, h, d = q.shape
  _, s, num_kv_heads, _ = k.shape
  _check_axis("k", k, 0, b, "B", "q")
  _check_axis("v", v, 0, b, "B", "q")
  _check_axis("v", v, 1, s, "S", "k")
  _check_axis("v", v, 2, num_kv_heads, "K", "k")
  _check_axis("k", k, 3, d, "D", "q")
  _check_axis("v", v, 3, d, "D", "q")
  if t > s:
    raise wrong(
      "q",
      "an array of at most as many tokens as k (the queries are the last T of"
      " S)",
      f"T = {t} in shape {tuple(q.shape)}, [B, T, H, D], and S = {s} in shape"
      f" {tuple(k.shape)}, [B, S, K, D]",
    )
  if h % num_kv_heads:
    raise wrong(
      "q",
      f"an array with a multiple of K = {num_kv_heads} heads (as k) in axis 2",
      f"{h} in shape {tuple(q.shape)}",
    )


def check_index(
  index_q: Array,
  index_k: Array,
  q: Array | None = None,
  k: Array | None = None,
) -> None:
  """Raises ValueError unless the index operands fit each other, and q and k."""
  b, t, _, i = index_q.shape
  if q is not None and k is not None:
    _check_axis("index_q", index_q, 0, q.shape[0], "B", "q")
    _check_axis("index_q", index_q, 1, q.shape[1], "T", "q")
    _check_axis("index_q", index_q, 2, k.shape[2], "K", "k")
    _check_axis("index_k", index_k, 1, k.shape[1], "S", "k")
  _check_axis("index_k", index_k, 0, b, "B", "index_q")
  _check_axis("index_k", index_k, 2, i, "I", "index_q")
  if t > index_k.shape[1]:
    raise wrong(
      "index_q",
      "an array of at most as many tokens as index_k (the queries are the last"
      " T of S)",
      f"T = {t} in shape {tuple(index_q.shape)}, [B, T, K, I], and S ="
      f" {index_k.shape[1]} in shape {tuple(index_k.shape)}, [B, S, I]",
    )


def check_decode_index(
  index_q: Array,
  index_k: Array,
  index_k_scale: Array | None,
  q: Array,
  k: Array,
) -> None:
  """Raises ValueError unless the index operands of decoding fit.

  Index keys may be e4m3 codes; they then need their scales, and only then.
  """
  check_array("index_k", index_k, (None,) * 3, "[B, C, I]")
  codes = index_k.dtype == jnp.float8_e4m3fn
  if not codes and index_k.dtype != index_q.dtype:
    raise wrong(
      "index_k",
      f"an array of {index_q.dtype}, the dtype of index_q, or of float8_e4m3fn",
      str(index_k.dtype),
    )
  check_index(index_q, index_k, q, k)
  if not codes:
    if index_k_scale is not None:
      raise wrong(
        "index_k_scale",
        "None unless index_k is float8_e4m3fn",
        f"an index_k of {index_k.dtype}",
      )
    return
  if index_k_scale is None:
    raise wrong(
      "index_k_scale", "an array with an index_k of float8_e4m3fn", "None"
    )
  check_array("index_k_scale", index_k_scale, index_k.shape[:2], "[B, C]")
  if index_k_scale.dtype != jnp.float32:
    raise wrong("index_k_scale", "float32", str(index_k_scale.dtype))


def check_chosen_blocks(block_indices: Array, q: Array, k: Array) -> None:
  """Raises ValueError unless block_indices has the shape and dtype of a choice.

  Its entries are not looked at; `msa_jax.check_block_indices` does that.
  """
  shape = (q.shape[0], k.shape[2], q.shape[1], None)
  check_array("block_indices", block_indices, shape, "[B, K, T, P]")
  if block_indices.dtype != jnp.int32:
    raise wrong("block_indices", "int32", str(block_indices.dtype))
  if block_indices.shape[-1] < 1:
    raise wrong("block_indices", "an array with P of at least 1", "P = 0")


def check_kv_lengths(kv_lengths: Array | None, batch: int) -> None:
  """Raises ValueError unless kv_lengths is None or integers [B]."""
  if kv_lengths is not None:
    check_array("kv_lengths", kv_lengths, (batch,), "[B]")
    check_integers("kv_lengths", kv_lengths)


def check_positions(positions: Array, batch: int, length: int) -> None:
  """Raises ValueError unless positions are integers [T] or [B, T]."""
  want = f"of shape [T] = ({length},) or [B, T] = ({batch}, {length})"
  if not hasattr(positions, "shape") or not hasattr(positions, "dtype"):
    raise wrong("positions", f"an array {want}", type(positions).__name__)
  if positions.shape not in ((length,), (1, length), (batch, length)):
    raise wrong("positions", want, str(tuple(positions.shape)))
  check_integers("positions", positions)


def check_query_pieces(
  query_pieces: Any, batch: int, q_len: int, kv_len: int
) -> list[tuple[Any, int]]:
  """The (start, length) of each piece of the queries, lengths as Python ints.

  Raises:
    ValueError: they are not one or two such pairs, they do not add up to the
      queries, or a start that is an integer leaves the keys.
  """
  name, want = "query_pieces", "one or two pairs (start, length)"
  if not isinstance(query_pieces, (tuple, list)) or not all(
    isinstance(piece, (tuple, list)) and len(piece) == 2
    for piece in query_pieces
  ):
    raise wrong(name, want, repr(query_pieces))
  require(len(query_pieces) in (1, 2), name, want, query_pieces)
  pieces = []
  for i, (start, length) in enumerate(query_pieces):
    length = check_integer(f"{name}[{i}][1]", length)
    if is_integer(start):
      most = kv_len - length
      want = f"an integer from 0 to S - length = {most}"
      start = check_integer(f"{name}[{i}][0]", start, 0)
      require(start <= most, f"{name}[{i}][0]", want, start)
    else:
      shape = getattr(start, "shape", None)
      if shape not in ((), (batch,)):
        want = f"an integer, or integers of shape () or [B] = ({batch},)"
        got = type(start).__name__ if shape is None else f"shape {shape}"
        raise wrong(f"{name}[{i}][0]", want, got)
      check_integers(f"{name}[{i}][0]", start)
    pieces.append((start, length))
  total = sum(length for _, length in pieces)
  want = f"pairs whose lengths add up to T = {q_len}"
  require(total == q_len, name, want, total)
  return pieces


def check_query_mask(query_mask: Array | None, x: Array) -> None:
  """Raises ValueError unless query_mask is None, or bool or float32 [B, T].

  Args:
    query_mask: what came.
    x: an array of the same tokens, [B, T, ...].
  """
  if query_mask is None:
    return
  check_array("query_mask", query_mask, x.shape[:2], "[B, T]")
  if query_mask.dtype not in (jnp.bool_, jnp.float32):
    want = "an array of bool or float32"
    raise wrong("query_mask", want, str(query_mask.dtype))


def check_lse(lse: Array, q: Array) -> None:
  """Raises ValueError unless lse is floating point [B, H, T]."""
  shape = (q.shape[0], q.shape[2], q.shape[1])
  check_array("lse", lse, shape, "[B, H, T]")
  if not jnp.issubdtype(lse.dtype, jnp.floating):
    raise wrong("lse", "an array of floating point", str(lse.dtype))
