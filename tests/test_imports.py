"""Imports go one way: train -> msa_jax -> pallas_kernels -> jax, with no cycle.

Imports inside functions count too, and so do those by
`importlib.import_module`, because they can close a cycle as well.
"""

import ast
import builtins
import dis
import functools
import importlib
import pathlib
import sys
import types

import pytest
from helpers import run_in_a_new_process

ROOT = pathlib.Path(__file__).parent.parent
# A package may import itself and the packages after it.
ORDER = ("train", "msa_jax", "pallas_kernels")
# These import any package, and no package imports them.
OUTSIDE = ("benchmarks", "tests", "notebooks")
# pallas_kernels needs JAX alone, so that kernels can be reused without Flax.
KERNELS_MAY_IMPORT = {"jax", "jaxlib", "jaxtyping", "numpy", "pallas_kernels"}


def module_name(path):
  parts = path.relative_to(ROOT).with_suffix("").parts
  return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def modules():
  """Path of every module of the packages, by its name."""
  paths = [path for top in ORDER for path in (ROOT / top).rglob("*.py")]
  return {module_name(path): path for path in paths}


def imported_names(path):
  """Dotted names that a file imports: `from a import b` gives a.b."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path} has a relative import"
      yield from (f"{node.module}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Call):
      name = ast.unparse(node.func).rpartition(".")[2]
      first = node.args[0] if node.args else None
      if name == "import_module" and isinstance(first, ast.Constant):
        yield first.value


def resolve(name, known):
  """The module that an imported name belongs to; None for another package's."""
  while name and name not in known:
    name = name.rpartition(".")[0]
  return name or None


def graph(paths):
  """The modules that each module imports."""
  edges = {}
  for module, path in paths.items():
    found = {resolve(name, paths) for name in imported_names(path)}
    edges[module] = found - {None}
  return edges


def find_cycle(edges):
  """A cycle as a list of modules, or None; also of a module with itself."""
  done = set()

  def visit(module, path):
    if module in path:
      return [*path[path.index(module) :], module]
    if module in done:
      return None
    for other in sorted(edges[module]):
      cycle = visit(other, [*path, module])
      if cycle:
        return cycle
    done.add(module)
    return None

  cycles = (visit(module, []) for module in sorted(edges))
  return next((cycle for cycle in cycles if cycle), None)


def test_no_module_imports_itself_through_others():
  edges = graph(modules())
  assert len(edges) > 40
  assert edges["msa_jax.attention"] >= {"msa_jax.ops", "msa_jax.model_config"}
  assert find_cycle(edges) is None


@pytest.mark.parametrize("package", ORDER)
def test_packages_import_those_after_them(package):
  refused = {*ORDER[: ORDER.index(package)], *OUTSIDE}
  for module, path in modules().items():
    if module.split(".")[0] == package:
      tops = {name.split(".")[0] for name in imported_names(path)}
      assert not tops & refused, path


def globals_read(code):
  """Names of globals that the functions in compiled code read."""
  for instruction in dis.get_instructions(code):
    if instruction.opname == "LOAD_GLOBAL":
      yield instruction.argval
  for constant in code.co_consts:
    if isinstance(constant, types.CodeType):
      yield from globals_read(constant)


@pytest.mark.parametrize("package", [*ORDER, "benchmarks"])
def test_every_global_name_is_defined(package):
  """The linters do not check this: to them, the letters of jaxtyping's shape
  strings are undefined names."""
  for path in sorted((ROOT / package).rglob("*.py")):
    module = importlib.import_module(module_name(path))
    code = compile(path.read_text(), str(path), "exec")
    missing = {*globals_read(code)} - {*vars(module), *dir(builtins)}
    assert not missing, f"{path}: {sorted(missing)}"


def test_kernels_stand_on_jax_alone():
  for module, path in modules().items():
    if module.startswith("pallas_kernels"):
      tops = {name.split(".")[0] for name in imported_names(path)}
      tops -= set(sys.stdlib_module_names)
      assert tops <= KERNELS_MAY_IMPORT, path


def test_layers_reach_implementations_through_ops():
  """Only ops calls the implementations; xla shares the reference's formulas."""
  edges = graph(modules())
  for target, callers in {
    "msa_jax.reference": {"msa_jax.ops", "msa_jax.xla"},
    "msa_jax.xla": {"msa_jax.ops"},
    "msa_jax.mosaic_gpu": {"msa_jax.ops"},
  }.items():
    library = {m for m, others in edges.items() if target in others}
    assert {m for m in library if m.startswith("msa_jax")} == callers
  assert not {m for m in edges["msa_jax.checks"] if m.startswith("msa_jax.")}


def test_a_cycle_would_be_found(tmp_path, monkeypatch):
  """Through a function, a package's __init__ and import_module."""
  monkeypatch.setattr("test_imports.ROOT", tmp_path)
  files = {
    "p/__init__.py": "from p import a",
    "p/a.py": "import p.b",
    "p/b.py": "def f():\n  from p.c import x",
    "p/c.py": "import importlib\nimportlib.import_module('p.a')",
    "p/d.py": "import p.a\nfrom jax import numpy",
  }
  paths = {}
  for name, text in files.items():
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    paths[module_name(path)] = path
  edges = graph(paths)
  assert edges["p.d"] == {"p.a"}
  assert find_cycle(edges) == ["p.a", "p.b", "p.c", "p.a"]
  paths["p.c"].write_text("x = 1")
  assert find_cycle(graph(paths)) is None
  # `import p` names the package, whose __init__ imports a.
  paths["p.c"].write_text("import p")
  assert find_cycle(graph(paths))[0] in ("p", "p.a")


VERSION = """
import importlib
from importlib import metadata

find = metadata.version


def version(name):
  if name != "msa-jax":
    return find(name)
  if found is None:
    raise metadata.PackageNotFoundError(name)
  return found


metadata.version, found = version, "9.8.7"
import msa_jax
assert msa_jax.__version__ == "9.8.7"
found = None
assert importlib.reload(msa_jax).__version__ == "0+unknown"
from msa_jax import m3
assert m3 is importlib.import_module("msa_jax.checkpoints.m3") is msa_jax.m3
"""


def test_version_and_m3_of_the_package():
  """The version is the installed one's; a bare source tree has none."""
  run_in_a_new_process(1, VERSION)
