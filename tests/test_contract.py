"""`reference` and `xla` satisfy the contract of each operation."""

import pytest
from op_contract import (
  PortableAttention,
  PortableGradients,
  PortableKL,
  PortableLse,
)


class TestReferenceAttention(PortableAttention):
  implementation = "reference"
  # The truth is its own formula, so this tests dtypes, NaN and empty rows.
  # tests/test_ops.py compares its values with loops.
  scenarios = ("empty_rows", "poisoned")


class TestXlaAttention(PortableAttention):
  implementation = "xla"
  # Rows of lengths have two groups and a ragged batch, too.
  scenarios = (
    *("empty_rows", "poisoned", "rows"),
    *(
      pytest.param(name, marks=pytest.mark.slow)
      for name in ("block_64", "group_16")
    ),
  )


# A cotangent of lse changes one sum of the gradients.
WITHOUT_DLSE = (
  "rows",
  *(
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("block_64", "group_16")
  ),
)


class TestReferenceGradients(PortableGradients):
  implementation = "reference"
  scenarios = WITHOUT_DLSE
  without_dlse = WITHOUT_DLSE

  @pytest.mark.xfail(
    strict=True,
    reason="zeroes an operand that holds NaN, so dq and dk lose the NaN, while"
    " dv of keys that the query does not see gets it",
  )
  def test_nan_of_a_query_reaches_its_gradient_and_the_keys_it_sees(self):
    super().test_nan_of_a_query_reaches_its_gradient_and_the_keys_it_sees()


class TestXlaGradients(PortableGradients):
  implementation = "xla"
  without_dlse = WITHOUT_DLSE


# test_ops.py compares gradients in bfloat16.
LSE_DTYPES = ("float32", pytest.param("bfloat16", marks=pytest.mark.slow))


class TestReferenceLse(PortableLse):
  implementation = "reference"
  dtypes = LSE_DTYPES


class TestXlaLse(PortableLse):
  implementation = "xla"
  dtypes = LSE_DTYPES


class TestReferenceKL(PortableKL):
  implementation = "reference"
  # The truth is its own formula, so one case of each kind suffices by default.
  slow = ("block_64", "group_16")
  slow_dense = ("batch", "mask")
  # An operand that holds NaN is zeroed, and its scores are marked instead. So
  # the operand itself gets a gradient of zero.
  nan_reaches_gradients = False


class TestXlaKL(PortableKL):
  implementation = "xla"
  nan_reaches_gradients = False  # for the same reason
