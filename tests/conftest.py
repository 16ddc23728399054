import atexit
import os
import pathlib
import shutil
import tempfile

# Most of the tests' time is compilation: trade run time for it. The first flag
# is for CPUs alone, since it also changes programs for GPUs: on an H200 six
# tests of the choice in packed rows fail with it and pass without it (jax
# 0.11.2). The second halves what is left: the CPU backend's newer
# emitters start a compiler of their own for every fused operation. The third
# and fourth save another fifth: a program is not split into modules for 32
# threads, each with an overhead of its own, and passes that only make programs
# faster are left out. The fifth keeps NaN in row maxima, which XLA's CPU
# backend (jax 0.11.2) loses otherwise (8 columns or more); interpreted kernels
# take maxima as the GPU does. The sixth is for GPUs: to time ways of
# multiplying takes longer than the tests' products. The rest is for busy
# machines, where a forced device or another process may come late to a
# collective. All are read when the backend starts.
os.environ["XLA_FLAGS"] = " ".join(
  (
    os.environ.get("XLA_FLAGS", ""),
    # JAX may not be asked before its flags are set.
    ""
    if (HAS_GPU := any(pathlib.Path("/dev").glob("nvidia[0-9]*")))
    else "--xla_backend_optimization_level=0",
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
    "--xla_cpu_parallel_codegen_split_count=1",
    "--xla_cpu_opt_preset=CPU_OPT_PRESET_FAST_COMPILE",
    "--xla_cpu_experimental_ynn_fusion_type=",
    "--xla_gpu_autotune_level=0",
    "--xla_cpu_collective_timeout_seconds=1200",
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds=600",
    "--xla_cpu_collective_call_terminate_timeout_seconds=1200",
  )
)

# Interpreted kernels block a thread for each warpgroup: on two cores the CPU
# backend's pool would starve.
os.environ.setdefault("NPROC", "16")

# An interpreted kernel multiplies tiles in NumPy, from several threads. BLAS's
# own threads would wait for each other in loops and take the cores from them.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# Where in Python an operation comes from is of use to who reads a program. JAX
# would write up to 100 frames for each, of which pytest alone has thirty.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "1")

# Tests of some files (RECOMPILING) find in this folder what others compiled.
# Each worker has its own in it, because JAX does not write an entry at once and
# another could read a part. To keep and to find a program takes longer than to
# compile a small one.
if not HAS_GPU and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  folder = tempfile.mkdtemp(prefix="msa_jax_compiled_")
  atexit.register(shutil.rmtree, folder, ignore_errors=True)
  os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"
elif (
  "PYTEST_XDIST_WORKER" in os.environ
  and "msa_jax_compiled_" in os.environ.get("JAX_COMPILATION_CACHE_DIR", "")
):
  os.environ["JAX_COMPILATION_CACHE_DIR"] += (
    "/" + os.environ["PYTEST_XDIST_WORKER"]
  )

# Several processes share a GPU. A fraction bounds one of them and reserves
# nothing; all `gpu_memory` tests run in the same process, and the others need
# less than 6 GB each.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
if "PYTEST_XDIST_WORKER" in os.environ:
  os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.35")

import gc

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

# Files whose tests make new functions of programs that were compiled before. In
# the others nearly nothing is found again, and to look for it and to write it
# takes 2 % of the time.
RECOMPILING = ("test_benchmarks", "test_commands", "test_train")

# A worker takes whole files, as their tests share what is trained and compiled.
# Files of less than half a minute go last, the shortest at the very end: so no
# worker waits long for another's last file.
SHORTEST = (
  *("cache", "checkpoints", "step_cost", "meshes", "notebooks", "errors"),
  *("kernels_masked", "report", "package", "imports", "data", "moe"),
  *("selection_stats", "results", "devices"),
)
# The same for files of GPU tests, whose workers take groups of tests (below):
# most groups of these files take less than 20 s, those of others up to 70 s
# (H200, 2026-11-30).
SHORTEST_ON_A_GPU = ("kernels_decode", "kernels_kl", "kernels_select")


# Tracing allocates many small objects that live on. At Python's threshold of
# 700 new ones the collector looks through them all again and again.
gc.set_threshold(100_000, 20, 50)


def _lower_kernels_quickly():
  """Kernels are lowered to the same text in two thirds of the time.

  JAX 0.11.2 sorts a kernel's values by what is printed of them, and prints the
  whole kernel for each. `test_quick_lowering_gives_the_same_text` compares.
  """
  from jax.experimental.mosaic.gpu import layout_inference

  site = layout_inference.ValueSite
  site.slow_str = site.__str__
  site.__str__ = lambda self: (
    f"{self.operation.OPERATION_NAME}:{self.type.name}-{self.index}"
  )


def _interpret_kernels_quickly():
  """Interpreted kernels compute the same in three fifths of the time.

  JAX 0.11.2 puts each operand of a callback on the device first. Nearly all are
  single integers, which the interpreter turns into Python's, and the others it
  turns into NumPy's arrays. Here callbacks get copies in NumPy.
  """
  from jax._src import callback as callbacks
  from jax._src.pallas.mosaic_gpu.interpret import shared_memory

  def call(*args, callback, **_):
    try:
      return [np.asarray(x) for x in callback(*map(np.array, args))]
    except BaseException:
      callbacks.logger.exception("jax.io_callback failed")
      raise

  to_int = shared_memory._to_int
  callbacks.io_callback_impl = call
  shared_memory._to_int = lambda x: (
    int(x) if isinstance(x, np.ndarray) else to_int(x)
  )


if jax.__version__ == "0.11.2":
  _lower_kernels_quickly()
  if not HAS_GPU:
    _interpret_kernels_quickly()


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
  """Frees compiled programs before a worker has too many.

  Each takes memory maps, of which Linux gives a process 65,530; XLA crashes
  when none is left. To free them after each file would take a second for most,
  and the next one would trace and compile the small operations of JAX again. On
  a GPU they hold its memory, of which each worker has a small part.
  """
  yield
  if HAS_GPU or _memory_maps() > 20_000:
    jax.clear_caches()


@pytest.fixture
def patched_programs(monkeypatch):
  """`monkeypatch` for what is compiled into programs, which end with the test.

  Also if it fails: the next test would find a patched program.
  """
  yield monkeypatch
  monkeypatch.undo()
  jax.clear_caches()


@pytest.fixture(autouse=True, scope="module")
def _keep_programs_where_it_pays(request):
  """Turns JAX's folder of compiled programs on or off for a file."""
  if not HAS_GPU:
    kept = request.path.stem in RECOMPILING
    jax.config.update("jax_enable_compilation_cache", kept)
    compilation_cache.reset_cache()  # It looks at the option once.


def _memory_maps():
  """Of this process; infinitely many where the system does not say."""
  maps = pathlib.Path("/proc/self/maps")
  return maps.read_bytes().count(b"\n") if maps.exists() else float("inf")


@pytest.fixture(autouse=True, scope="session")
def pairs_of_few_blocks():
  """Calls of few blocks, as tests make them, count the cost of pairs.

  Without it only `Config(shared_cost=0)` would be tested, which the kernels
  take for few blocks, and not what they do at the lengths that they are for.

  Yields:
    the function that chooses the config elsewhere.
  """
  from pallas_kernels import sparse_attention_fwd

  here = sparse_attention_fwd.heuristic_config
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      sparse_attention_fwd,
      "heuristic_config",
      lambda num_blocks, top_k: sparse_attention_fwd.Config(),
    )
    yield here


def pytest_configure(config):
  # xdist would put the files, or the groups, with the most tests first.
  config.option.loadscopereorder = False


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in its own hook
def pytest_collection_modifyitems(items):
  for item in items:
    if item.get_closest_marker("gpu") and (group := _group(item)):
      item.add_marker(pytest.mark.xdist_group(group))
  items.sort(key=_place)


def _group(item):
  """What a GPU test runs with, in one process; None for a test alone."""
  if item.get_closest_marker("gpu_memory"):
    return "gpu_memory"
  if "two_gpus" in item.fixturenames:
    return "two_gpus"
  # Calls of a test with one case share what is compiled for them.
  parameters = getattr(item, "callspec", None)
  if parameters and "name" in parameters.params:
    name = parameters.params["name"]
    return f"{item.path.stem}-{item.originalname}-{name}"
  return None


def _place(item):
  """Where a test stands among all: what takes long goes first."""
  last = SHORTEST
  if item.get_closest_marker("gpu"):
    if _group(item) in ("gpu_memory", "two_gpus"):  # minutes
      return -2
    last = SHORTEST_ON_A_GPU
  file = item.path.stem.removeprefix("test_")
  return last.index(file) if file in last else -1


@pytest.fixture
def blank_pictures(monkeypatch):
  """Leaves the pictures of reports blank.

  Figures are still made of what runs measured; to draw them takes most of the
  time of a report.
  """
  _draw(monkeypatch, lambda kind: False)


@pytest.fixture(scope="module")
def pictures_once():
  """Draws a picture of each kind once in a file; later ones are blank."""
  drawn = set()

  def is_new(kind):
    before = len(drawn)
    drawn.add(kind)
    return len(drawn) > before

  with pytest.MonkeyPatch.context() as patch:
    _draw(patch, is_new)
    yield


def _draw(patch, which):
  """Reports draw figures of which(last word of the name)."""
  from train.report import page

  add_figure = page._Page.add_figure

  def add(self, figure, name, caption):
    if figure is not None and not which(name.rpartition("_")[-1]):
      figure = page.Figure(figsize=(1, 1))
    add_figure(self, figure, name, caption)

  patch.setattr(page._Page, "add_figure", add)


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
def two_gpus(hopper):
  """Two Hopper GPUs; skips a test where there is one.

  These tests run in the same process, one after another: no two processes have
  kernels of collectives, which wait for each other, on the same GPUs.
  """
  if jax.device_count() < 2:
    pytest.skip(f"needs two GPUs, got {jax.device_count()}")
  return jax.devices()[:2]


@pytest.fixture
def no_gpu():
  """Skips a test of CPU-only error messages."""
  if jax.default_backend() == "gpu":
    pytest.skip("needs a machine without a GPU")


@pytest.fixture
def pretend_hopper(monkeypatch):
  """Enough of a GPU to trace and to lower."""
  from jax._src.cudnn import fused_attention_stablehlo as cudnn

  from pallas_kernels import mosaic

  monkeypatch.setattr(mosaic, "require_hopper", lambda: None)
  monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
  monkeypatch.setattr(cudnn, "check_compute_capability", lambda _: True)
