"""What README, CONTRIBUTING and docs/ say can be done as they say it."""

import contextlib
import importlib.util
import io
import itertools
import pathlib
import re
import runpy
import shlex
import subprocess
import sys
import tomllib

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_imports

import msa_jax
from pallas_kernels import kv_block_plan, tile_plan

ROOT = pathlib.Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")

by_name = lambda path: path.name  # noqa: E731


def text_of(page):
  """A page without its blocks of code."""
  return BLOCK.sub("", page.read_text())


def anchors(page):
  """Anchors of a page's headings, as code hosts and MkDocs make them."""
  headings = re.findall(r"^#+ (.*)$", text_of(page), re.MULTILINE)
  return {
    re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-")
    for heading in headings
  }


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_links_lead_to_something(page):
  """Each relative link names a file, and each anchor a heading of it."""
  for link in LINK.findall(text_of(page)):
    if re.match(r"https?:", link):
      continue
    name, _, anchor = link.partition("#")
    target = (page.parent / name).resolve() if name else page
    assert target.exists(), link
    assert not anchor or anchor in anchors(target), link


def test_the_readme_is_short():
  assert len((ROOT / "README.md").read_bytes()) <= 8000


def test_the_site_has_every_page():
  nav = re.findall(
    r"^  - [^:]+: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M
  )
  # The site's hook makes a page of the README.
  assert sorted(nav) == sorted(
    [*(page.name for page in DOCS), "first_steps.md"]
  )


def test_the_names_in_the_readme_resolve():
  """In a new process, where nothing has imported a submodule yet."""
  text = (ROOT / "README.md").read_text()
  table = re.search(
    r"^\| name \| what it does \|\n(.*?)\n\n", text, re.M | re.S
  )
  assert table
  names = [
    name.removeprefix("msa_jax.")
    for line in table[1].splitlines()
    for name in re.findall(r"`([^`]+)`", line.split("|")[1])
  ]
  assert {"MSAttention", "head_loss", "generate", "checkpoints"} <= {*names}
  code = "import sys, msa_jax\nfor name in sys.argv[1:]: getattr(msa_jax, name)"
  subprocess.run([sys.executable, "-c", code, *names], check=True, cwd=ROOT)


def test_the_api_reference_has_every_public_name():
  page = (ROOT / "docs" / "api.md").read_text()
  listed = {*re.findall(r"^::: (\S+)$", page, re.M)}
  assert "msa_jax.ops" in listed  # with all of its functions
  for name in {*msa_jax.__all__} - {"__version__"}:
    in_ops = getattr(msa_jax, name).__module__ == "msa_jax.ops"
    assert in_ops or f"msa_jax.{name}" in listed, name


PICTURE = re.compile(r"^```text\n( train/.*?)^```$", re.M | re.S)


def test_the_picture_of_the_house_is_right():
  """Each arrow is an import, and each module is in the picture.

  Two spaces or more part its chains, as in "a, b -> c -> d    e".
  """
  paths = test_imports.modules()
  edges = test_imports.graph(paths)
  picture = PICTURE.search((ROOT / "CONTRIBUTING.md").read_text())
  assert picture
  package, drawn, arrows = "", set(), 0

  def modules(name):
    """The module of that name, or all modules of a folder."""
    full = name.rstrip("/")
    if full not in test_imports.ORDER:
      full = f"{package}.{full}"
    assert full in paths, full
    if not name.endswith("/"):
      return {full}
    return {module for module in paths if f"{module}.".startswith(f"{full}.")}

  for line in picture[1].splitlines():
    head = re.match(r" (\w+)/  ", line)
    if head:
      package, line = head[1], line[head.end() :]
    for chain in filter(None, re.split(r"\s{2,}", line)):
      steps = [
        [modules(name) for name in step.strip().split(", ")]
        for step in chain.split("->")
      ]
      # An arrow to another package does not show that package's modules.
      found = set().union(*itertools.chain(*steps))
      drawn |= {module for module in found if module.startswith(f"{package}.")}
      for left, right in itertools.pairwise(steps):
        for a, b in itertools.product(left, right):
          arrows += 1
          assert any(edges[module] & b for module in a), (a, b)
  assert arrows > 30
  packages = {module for module in paths if paths[module].stem == "__init__"}
  # Every kernel imports it.
  assert {*paths} - drawn - packages == {"pallas_kernels.mosaic"}


@pytest.mark.parametrize(
  "plan",
  [tile_plan.TilePlan, tile_plan.PairPlan, kv_block_plan.KVBlockPlan],
  ids=lambda plan: plan.__name__,
)
def test_the_table_of_a_plan_has_its_arrays(plan):
  page = (ROOT / "docs" / "kernels.md").read_text()
  _, _, after = page.partition(f"\n`{plan.__name__}`, ")
  table = after.partition("\n\n")[2].partition("\n\n")[0]
  assert re.findall(r"^\| `(\w+)` \|", table, re.M) == [*plan._fields]


def test_the_page_on_speed_counts_the_measured_shapes_of_heads():
  said = re.search(
    r"\[(\d+) shapes of heads\]\(worth\.md\)",
    (ROOT / "docs" / "speed.md").read_text(),
  )
  page = (ROOT / "docs" / "worth.md").read_text()
  table = page.partition("<!-- times of benchmarks.worth -->")[2]
  table = table.partition("<!-- end of the table -->")[0]
  heads = re.findall(r"^\| (\d+, \d+, \d+) \|", table, re.M)
  assert said and int(said[1]) == len({*heads})


PRINTING = ("README.md", "layers.md")


def blocks(page):
  """(code, what it prints or None) of a page's Python examples, in order."""
  found = []
  for language, text in BLOCK.findall(page.read_text()):
    if language == "python":
      found.append([text, None])
    elif language == "text" and found and page.name in PRINTING:
      found[-1][1] = text
  return found


def test_pages_have_examples():
  with_examples = {page.name for page in PAGES if blocks(page)}
  assert with_examples == {
    "README.md",
    "checkpoints.md",
    "context.md",
    "generation.md",
    "layers.md",
    "own_loop.md",
  }
  assert blocks(ROOT / "README.md")[0][1]


def run_examples(page, tmp_path):
  """Runs a page's examples as printed, on the devices that are here and with a
  tiny checkpoint; returns their names."""
  stand_ins = {
    '"MiniMax-M3"': repr(str(ROOT / "tests" / "data" / "m3_tiny")),
    '"fine-tuned"': repr(str(tmp_path / "saved")),
    "(8,)": f"({jax.device_count()},)",
  }
  names = {}
  for code, printed in blocks(page):
    if page.name == "checkpoints.md":
      for name, stand_in in stand_ins.items():
        code = code.replace(name, stand_in)
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
      exec(compile(code, page.name, "exec"), names)
    if printed is not None:
      assert output.getvalue() == printed
  return names


@pytest.mark.parametrize(
  "page", [page for page in PAGES if blocks(page)], ids=by_name
)
def test_examples_run(page, tmp_path):
  names = run_examples(page, tmp_path)
  CHECKS.get(page.name, lambda names, tmp_path: None)(names, tmp_path)


def check_readme(names, tmp_path):
  assert names["out"].shape == names["x"].shape and names["kl"] > 0
  assert names["y"].shape == names["q"].shape


def check_generation(names, tmp_path):
  assert len(names["rows"]) == 2
  assert all(1 <= len(row) <= 100 for row in names["rows"])


def check_checkpoints(names, tmp_path):
  assert [len(row) for row in names["rows"]] == [10]
  assert (tmp_path / "saved" / "config.json").exists()
  assert names["msa"].config.layer_kinds == ("msa",)


def check_layers(names, tmp_path):
  """The merged parts are one softmax over the keys of both, gradients too."""
  q, blocks = names["q"], names["blocks"]
  of_both = (names[n] for n in ("k", "v", "window_k", "window_v"))
  k, v, window_k, window_v = (jnp.repeat(x, 2, axis=2) for x in of_both)
  token = jnp.arange(256)
  causal = token <= token[:, None]
  chosen = (blocks[..., None] == token // 16).any(-2) & causal
  window = causal & (token > token[:, None] - 64)
  seen = jnp.concatenate(
    [jnp.repeat(chosen, 2, axis=1), jnp.broadcast_to(window, (1, 4, 256, 256))],
    axis=-1,
  )

  def dense(q):
    keys = jnp.concatenate([k, window_k], axis=1)
    s = jnp.einsum("bthd,bjhd->bhtj", q, keys) / 4
    p = jax.nn.softmax(jnp.where(seen, s, -jnp.inf), axis=-1)
    values = jnp.concatenate([v, window_v], axis=1)
    return jnp.sum(jnp.einsum("bhtj,bjhd->bthd", p, values) ** 2)

  np.testing.assert_allclose(
    names["gradient"](q), jax.grad(dense)(q), atol=2e-5
  )
  assert names["kl"] > 0
  assert names["taken"] in ("xla", "mosaic_gpu")


def check_own_loop(names, tmp_path):
  """The loop has trained; the index is what the KL trains, in every form."""
  assert 0 < names["score"] <= names["best"] * (1 + 1e-6)
  assert np.isfinite(names["lm"]) and names["kl"] > 0
  ids = names["packed_ids"]
  assert names["fits"] and np.bincount(ids.flat).tolist() == [
    *(3 * 129 - 330, 129 + 71 + 90, 40)
  ]
  starts = names["packed"][np.diff(ids, axis=1, prepend=0) > 0]
  assert starts.tolist() == [0, 129, 0, 0]
  gradients = names["kl_gradient"]
  for labels in (names["labels"], names["linen_labels"]):
    for name, label in labels.items():
      assert label == ("index" if name.startswith("index_") else "rest")
      assert bool(jnp.any(gradients[name])) == (label == "index"), name
  assert names["linen_kl"] > 0
  assert np.isfinite(names["sharded_lm"]) and names["sharded_kl"] > 0


OWN_LOOP_ON_A_MESH = """
import test_docs
page = test_docs.ROOT / "docs" / "own_loop.md"
(code, _), *_, (several, _) = test_docs.blocks(page)
names = {}
exec(code.replace("WARMUP, STEPS = 4, 8", "WARMUP, STEPS = 0, 0"), names)
for mesh in ("(1, 1, 1)", "(2, 2, 2)"):
  exec(several.replace("(1, 1, 1)", mesh), names)
  for i in range(2):
    lm, kl = names["step"](
      names["model"], names["optimizer"], *names["batch"](i), "sparse")
  print(names["sharded_lm"], names["sharded_kl"], lm, kl)
"""


@pytest.mark.slow
def test_the_own_loop_on_eight_devices():
  """Three steps, so that the first two updates are compared too."""
  one, eight = helpers.run_on_devices(8, OWN_LOOP_ON_A_MESH).splitlines()
  np.testing.assert_allclose(
    [float(x) for x in eight.split()],
    [float(x) for x in one.split()],
    rtol=1e-4,  # sums in another order, of which AdamW takes a root
  )


CHECKS = {
  "own_loop.md": check_own_loop,
  "layers.md": check_layers,
  "README.md": check_readme,
  "generation.md": check_generation,
  "checkpoints.md": check_checkpoints,
}


def commands(page):
  """Words of the commands in a page's shell blocks and inline code."""
  text = page.read_text()
  lines = []
  for language, block in BLOCK.findall(text):
    if language == "sh":
      lines += block.replace("\\\n", " ").splitlines()
  lines += re.findall(r"`([^`]+)`", text_of(page))
  for line in lines:
    words = shlex.split(line.replace("\n", " "), comments=True)
    if words and re.search(r"(^|/)(python|make)$", words[0]):
      yield [words[0].rsplit("/")[-1], *words[1:]]


def test_make_targets_exist():
  makefile = (ROOT / "Makefile").read_text()
  targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
  said = {
    words[1] for page in PAGES for words in commands(page) if words[0] == "make"
  }
  assert {"demo", "test", "lint", "docs", "lock"} <= said
  assert said <= targets


def help_text(module, arguments):
  """What `python -m module arguments --help` prints, run in this process."""
  output = io.StringIO()
  argv = sys.argv
  sys.argv = [module, *arguments, "--help"]
  try:
    with contextlib.redirect_stdout(output), pytest.raises(SystemExit) as done:
      runpy.run_module(module, run_name="__main__", alter_sys=True)
  finally:
    sys.argv = argv
  assert not done.value.code
  return output.getvalue()


PROGRAMS = {
  "train",
  "train.report.thin",
  "benchmarks",
  "benchmarks.context_parallel",
  "benchmarks.portable",
  "msa_jax.checkpoints",
}

WITH_SUBCOMMANDS = {"train", "msa_jax.checkpoints"}
PRESETS = {path.stem for path in (ROOT / "train" / "configs").glob("*.py")}


# runpy warns when it runs a module that another test has imported.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_commands_are_as_said():
  """Modules exist, and subcommands, options and presets are in their help."""
  helps = {}
  used = set()
  for page in PAGES:
    for words in commands(page):
      if words[:2] == ["python", "-m"]:
        module, *rest = words[2:]
        assert importlib.util.find_spec(module) is not None, words
        if module not in PROGRAMS:
          continue
        used.add(module)
        # What chooses a parser: a subcommand, and all of a run that `train
        # train` names, whose fields are the options.
        chosen = rest[:1] if module in WITH_SUBCOMMANDS else []
        if rest[:1] == ["train"] and PRESETS & set(rest[1:2]):
          chosen = rest
        key = (module, *chosen)
        if key not in helps:
          helps[key] = help_text(module, chosen)
        named = [word for word in rest if word.startswith("--")]
        if module == "train":
          # A preset is the first argument, where it is no placeholder.
          named += [
            word for word in rest[1:2] if re.fullmatch(r"[a-z]\w+", word)
          ]
        for word in named:
          assert re.search(rf"(?<![\w-]){word}(?![\w-])", helps[key]), words
  assert used == PROGRAMS


def test_tests_named_exist():
  for page in PAGES:
    for name in re.findall(r"tests/test_\w+\.py", page.read_text()):
      assert (ROOT / name).exists(), name


def test_versions_agree():
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  cited = (ROOT / "CITATION.cff").read_text()
  assert f"\nversion: {project['version']}\n" in cited
  assert f"\nlicense: {project['license']}\n" in cited
  assert f"## {project['version']}" in (ROOT / "CHANGELOG.md").read_text()
