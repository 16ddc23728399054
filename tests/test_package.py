"""What holds of the package as a whole."""

import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

from beartype import beartype
from helpers import CASES, random_blocks
from jaxtyping import jaxtyped

import msa_jax
from msa_jax import reference

ROOT = pathlib.Path(__file__).parent.parent


def test_import_is_light():
  """After jax and nnx, `import msa_jax` loads itself and jaxtyping.

  So it needs no extra, and neither kernels nor Pallas nor a checkpoint format
  are loaded before something asks for them.
  """
  code = """
import sys
import jax
from flax import nnx
before = set(sys.modules)
import msa_jax
print(*sorted(set(sys.modules) - before))
"""
  loaded = subprocess.run(
    [sys.executable, "-c", code],
    capture_output=True,
    text=True,
    check=True,
    cwd=ROOT,
  ).stdout.split()
  # Names for what JAX has loaded already, and the rule that splits operations
  # over devices, which stands below kernels and the portable path.
  for name in (
    *("jax.ad_checkpoint", "jax.experimental.custom_partitioning"),
    *("pallas_kernels", "pallas_kernels.partition"),
  ):
    loaded.remove(name)
  assert {name.split(".")[0] for name in loaded} <= {"msa_jax", "jaxtyping"}
  assert "msa_jax.ops" in loaded
  assert not [name for name in loaded if "checkpoints" in name]


def test_the_wheel_holds_the_library_only(tmp_path):
  """A package called `train` in site-packages would collide with a user's."""
  source = tmp_path / "source"
  for name in ("msa_jax", "pallas_kernels", "train", "benchmarks", "tests"):
    shutil.copytree(
      ROOT / name,
      source / name,
      ignore=shutil.ignore_patterns("results", "data", "__pycache__"),
    )
  for name in ("pyproject.toml", "README.md", "LICENSE"):
    shutil.copy(ROOT / name, source)
  pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation"]
  pip += ["--no-deps", "--no-index", "--quiet", "--wheel-dir", str(tmp_path)]
  subprocess.run([*pip, str(source)], check=True, cwd=tmp_path)
  (wheel,) = tmp_path.glob("*.whl")
  with zipfile.ZipFile(wheel) as archive:
    names = [pathlib.PurePath(name) for name in archive.namelist()]
    (metadata,) = [name for name in names if name.name == "METADATA"]
    metadata = archive.read(str(metadata)).decode()
  (info,) = {name.parts[0] for name in names if "dist-info" in name.parts[0]}
  packages = {name.parts[0] for name in names} - {info}
  assert packages == {"msa_jax", "pallas_kernels"}
  for package in packages:
    for path in (ROOT / package).rglob("*.py"):
      assert pathlib.PurePath(path.relative_to(ROOT)) in names
    assert pathlib.PurePath(package, "py.typed") in names
  assert pathlib.PurePath(info, "licenses", "LICENSE") in names
  assert "License-Expression: Apache-2.0" in metadata
  assert not re.search(r"^Requires-Dist: (chex|optax)[^;]*$", metadata, re.M)


def test_annotations_hold():
  """Shapes and dtypes in the signatures are those of real calls."""
  check = lambda f: jaxtyped(f, typechecker=beartype)  # noqa: E731
  case = CASES["lengths"]
  q, k, v, index_q, index_k = case.inputs()
  blocks = random_blocks(case)
  for implementation in ("reference", "xla"):
    check(msa_jax.select_blocks)(
      index_q,
      index_k,
      **case.select_options(),
      implementation=implementation,
    )
    options = dict(
      block_size=case.block_size,
      kv_lengths=case.lengths,
      implementation=implementation,
    )
    check(msa_jax.sparse_attention)(q, k, v, blocks, return_lse=True, **options)
    check(msa_jax.index_kl_loss)(q, k, index_q, index_k, blocks, **options)
    check(msa_jax.msa_attention)(
      q,
      k,
      v,
      index_q,
      index_k,
      with_kl=True,
      **case.select_options(),
      implementation=implementation,
    )
    for keys in ((index_k, None), reference.fp8_codes(index_k)):
      check(msa_jax.decode_attention)(
        q,
        k,
        v,
        index_q,
        keys[0],
        index_k_scale=keys[1],
        **case.select_options(),
        implementation=implementation,
      )
