"""Runs the notebooks: NAME.py (py:percent cells) -> NAME.ipynb with outputs.

  python notebooks/build.py [NAME.py ...]     # without names: all of them

Needs the extra "notebooks": nbformat, nbclient and ipykernel.
"""

import base64
import io
import json
import os
import pathlib
import re
import sys
import tempfile

FOLDER = pathlib.Path(__file__).parent
_MARK = re.compile(r"^# %%(.*)$", re.MULTILINE)


def read_cells(path: pathlib.Path) -> list[tuple[str, str]]:
  """("markdown" or "code", text) of every cell of a py:percent file."""
  _, *parts = _MARK.split(path.read_text())
  cells = []
  for mark, text in zip(parts[::2], parts[1::2]):
    kind = "markdown" if "[markdown]" in mark else "code"
    lines = text.strip("\n").split("\n")
    if kind == "markdown":
      lines = [line.removeprefix("#").removeprefix(" ") for line in lines]
    cells.append((kind, "\n".join(lines)))
  return cells


def shrink(picture: bytes) -> bytes:
  """A PNG with at most 256 colours, which takes less than half the space."""
  from PIL import Image

  image = Image.open(io.BytesIO(picture)).convert("RGB")
  smaller = io.BytesIO()
  image.quantize(256, dither=Image.Dither.NONE).save(
    smaller, "PNG", optimize=True
  )
  return smaller.getvalue()


def sources() -> list[pathlib.Path]:
  """The notebooks' sources, in order."""
  return sorted(FOLDER.glob("[0-9][0-9]_*.py"))


def build(path: pathlib.Path) -> pathlib.Path:
  """Executes a source's cells and writes the notebook beside it, whole."""
  import nbformat
  from nbclient import NotebookClient

  make = {
    "markdown": nbformat.v4.new_markdown_cell,
    "code": nbformat.v4.new_code_cell,
  }
  notebook = nbformat.v4.new_notebook(
    cells=[
      # A fixed id, so that only what changed shows in a diff.
      make[kind](text, id=f"cell-{i}")
      for i, (kind, text) in enumerate(read_cells(path))
    ],
    metadata={
      "kernelspec": {
        "name": "python3", "language": "python", "display_name": "Python 3",
      },
    },
  )  # fmt: skip
  NotebookClient(
    notebook,
    timeout=None,
    record_timing=False,
    resources={"metadata": {"path": str(FOLDER.parent)}},
  ).execute()
  for cell in notebook.cells:
    for output in cell.get("outputs", ()):
      pictures = output.get("data", {})
      if "image/png" in pictures:
        picture = shrink(base64.b64decode(pictures["image/png"]))
        pictures["image/png"] = base64.b64encode(picture).decode()
  target = path.with_suffix(".ipynb")
  with tempfile.NamedTemporaryFile(
    "w", dir=FOLDER, suffix=".tmp", delete=False
  ) as file:
    json.dump(notebook, file, indent=1, ensure_ascii=False)
    file.write("\n")
  os.chmod(file.name, 0o644)
  os.replace(file.name, target)
  return target


if __name__ == "__main__":
  for source in map(pathlib.Path, sys.argv[1:] or sources()):
    print(source.name, "->", build(source).name, flush=True)
