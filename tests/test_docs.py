"""What README, CONTRIBUTING and docs/ say can be done as they say it."""

import contextlib
import importlib.util
import io
import pathlib
import re
import runpy
import shlex
import sys
import tomllib

import pytest

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
  assert sorted(nav) == [page.name for page in DOCS]


def blocks(page):
  """(code, what it prints or None) of a page's Python examples, in order."""
  found = []
  for language, text in BLOCK.findall(page.read_text()):
    if language == "python":
      found.append([text, None])
    elif language == "text" and found and page.name == "README.md":
      found[-1][1] = text
  return found


def test_pages_have_examples():
  with_examples = {page.name for page in PAGES if blocks(page)}
  assert with_examples == {
    "README.md",
    "checkpoints.md",
    "generation.md",
    "training.md",
  }
  assert blocks(ROOT / "README.md")[0][1]


@pytest.mark.parametrize(
  "page", [page for page in PAGES if blocks(page)], ids=by_name
)
def test_examples_run(page, tmp_path):
  """As printed, with a tiny checkpoint and one device in place of eight."""
  stand_ins = {
    '"MiniMax-M3"': repr(str(ROOT / "tests" / "data" / "m3_tiny")),
    '"fine-tuned"': repr(str(tmp_path / "saved")),
    "(8,)": "(1,)",
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


CHECKS = {
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
      lines += block.splitlines()
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
