"""Links from the documentation to files of the repository, for the site.

The pages link to files outside `docs/`, such as `../train/README.md`, so that
they can be read and followed in the repository itself. A built site does not
hold those files. This hook makes a page of the repository's README, copies
linked pictures into the site, and turns a link to any other file into the
file's path.
"""

import pathlib
import posixpath
import re

from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).parent.parent
_LINK = re.compile(r"(!?)\[([^\]]*)\]\((\.\./[^)#]*)(#[^)]*)?\)")
# MkDocs would take a page named readme for the site's start.
README_PAGE = "first_steps.md"


def readme_page():
  """The README as a page of `docs/`, from where its links lead elsewhere."""
  text = (ROOT / "README.md").read_text()
  text = re.sub(r"\]\((?!https?:|#)", "](../", text)
  return text.replace("](../docs/", "](")


def on_files(files, config):
  """Adds the README and the pictures that pages link to."""
  files.append(File.generated(config, README_PAGE, content=readme_page()))
  for page in list(files.documentation_pages()):
    for mark, _, target, _ in _LINK.findall(page.content_string):
      path = posixpath.normpath(target.removeprefix("../"))
      if mark and files.get_file_from_path(path) is None:
        files.append(
          File.generated(config, path, abs_src_path=str(ROOT / path))
        )
  return files


def on_page_markdown(markdown, page, config, files):
  """Rewrites the links of one page."""

  def replace(match):
    mark, text, target, _ = match.groups()
    path = target.removeprefix("../")
    if path == "README.md":
      return f"[{text}]({README_PAGE})"
    if mark:
      return f"![{text}]({path})"
    return f"`{path}`" if text.strip("`") == path else f"{text} (`{path}`)"

  return _LINK.sub(replace, markdown)
