"""Notebooks on disk are what their sources say, and have run."""

import json

import pytest

from notebooks import build


@pytest.mark.parametrize("source", build.sources(), ids=lambda path: path.stem)
def test_a_notebook_holds_its_sources_cells_and_their_outputs(source):
  notebook = json.loads(source.with_suffix(".ipynb").read_text())
  cells = [
    (cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]
  ]
  assert cells == build.read_cells(source)
  for cell in notebook["cells"]:
    if cell["cell_type"] == "code":
      assert cell["execution_count"], "not executed"
      kinds = {output["output_type"] for output in cell["outputs"]}
      assert "error" not in kinds
