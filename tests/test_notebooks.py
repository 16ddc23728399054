"""Notebooks on disk are what their sources say, have run, and still run."""

import json

import pytest
from matplotlib import pyplot as plt

from notebooks import build

# Small values for the parameters in the second code cell of each notebook.
SMALL = {
  "01_what_msa_selects": dict(STEPS=6, WARMUP=3, EVAL_BATCHES=1),
  "02_the_kernels": dict(KEY_TOKENS=1 << 13, RUN_TOKENS=128),
  "03_gqa_against_msa": dict(),
  "05_msa_in_your_own_model": dict(STEPS=4, WARMUP=2, CONTEXT=64, BATCH=1),
}
each_notebook = pytest.mark.parametrize(
  "source", build.sources(), ids=lambda path: path.stem
)


def read_notebook(source):
  return json.loads(source.with_suffix(".ipynb").read_text())["cells"]


@each_notebook
def test_a_notebook_holds_its_sources_cells_and_their_outputs(source):
  cells = read_notebook(source)
  written = [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
  assert written == build.read_cells(source)
  for cell in cells:
    if cell["cell_type"] == "code":
      assert cell["execution_count"], "not executed"
      kinds = {output["output_type"] for output in cell["outputs"]}
      assert "error" not in kinds
  # Each execution adds as much to the history of the repository.
  assert source.with_suffix(".ipynb").stat().st_size < 500_000


@each_notebook
def test_a_notebook_runs(source, monkeypatch):
  """With small parameters it draws as many pictures as it holds on disk."""
  drawn = []

  def display(figure):
    figure.draw_without_rendering()
    drawn.append(figure)

  def show():
    for number in plt.get_fignums():
      display(plt.figure(number))
    plt.close("all")

  plt.switch_backend("agg")
  monkeypatch.setattr(plt, "show", show)
  parameters = SMALL[source.stem]
  names = {"display": display}
  codes = [text for kind, text in build.read_cells(source) if kind == "code"]
  with plt.rc_context():
    for number, code in enumerate(codes):
      exec(compile(code, f"{source.stem}, code cell {number}", "exec"), names)
      if number == 1:
        assert parameters.keys() <= names.keys()
        names.update(parameters)
  assert not plt.get_fignums(), "a figure was not shown"
  outputs = [
    o for cell in read_notebook(source) for o in cell.get("outputs", ())
  ]
  assert len(drawn) == sum("image/png" in o.get("data", ()) for o in outputs)
