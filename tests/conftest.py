import os

# Most of the tests' time is compilation: trade run time for it. The second flag
# keeps NaN in row maxima, which XLA's CPU backend (jax 0.11.2) loses otherwise
# (8 columns or more); interpreted kernels take maxima as the GPU does. Both are
# read when the backend starts. The third one is for GPUs: to time ways of
# multiplying takes longer than the tests' products.
os.environ["XLA_FLAGS"] = " ".join(
  (
    os.environ.get("XLA_FLAGS", ""),
    "--xla_backend_optimization_level=0",
    "--xla_cpu_experimental_ynn_fusion_type=",
    "--xla_gpu_autotune_level=0",
  )
)

# Interpreted kernels block a thread for each warpgroup: on two cores the CPU
# backend's pool would starve.
os.environ.setdefault("NPROC", "16")

import jax
import pytest


@pytest.fixture
def x64():
  """float64 on, for one test."""
  with jax.enable_x64(True):
    yield


@pytest.fixture
def hopper():
  """Skips a test that needs a Hopper GPU, naming what is there."""
  from pallas_kernels import mosaic

  try:
    mosaic.require_hopper()
  except NotImplementedError as error:
    pytest.skip(str(error))


@pytest.fixture
def pretend_hopper(monkeypatch):
  """Enough of a GPU to trace and to lower."""
  from jax._src.cudnn import fused_attention_stablehlo as cudnn

  from pallas_kernels import mosaic

  monkeypatch.setattr(mosaic, "require_hopper", lambda: None)
  monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
  monkeypatch.setattr(cudnn, "check_compute_capability", lambda _: True)
