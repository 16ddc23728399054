"""Notebooks on disk are what their sources say, have run, and still run."""

import json

import pytest
from flax import nnx
from matplotlib import pyplot as plt

from msa_jax import DecoderLM, ModelConfig, checkpoints
from notebooks import build
from train import corpus

# Small values for the parameters in the second code cell of each notebook.
SMALL = {
  "01_what_msa_selects": dict(STEPS=6, WARMUP=3, EVAL_BATCHES=1),
  "02_the_kernels": dict(KEY_TOKENS=1 << 13, RUN_TOKENS=128),
  "03_gqa_against_msa": dict(),
  # FOLDER is set below.
  "04_turn_a_pretrained_model_into_msa": dict(
    CONTEXT=64, BLOCK_SIZE=8, TOP_K=2, WARMUP=1, STEPS=1, NEW_TOKENS=2
  ),
  "05_msa_in_your_own_model": dict(STEPS=4, WARMUP=2, CONTEXT=64, BATCH=1),
}
# They compile a dozen programs, or train. What 05 does, docs/own_loop.md does
# too, whose examples test_docs runs.
LONG = (
  "01_what_msa_selects",
  "02_the_kernels",
  "04_turn_a_pretrained_model_into_msa",
  "05_msa_in_your_own_model",
)
each_notebook = pytest.mark.parametrize(
  "source", build.sources(), ids=lambda path: path.stem
)


@each_notebook
def test_notebooks_find_the_repository_from_their_folder(source):
  """Jupyter runs a notebook in its folder, where `train` cannot be imported."""
  kinds_and_texts = build.read_cells(source)
  imports = next(text for kind, text in kinds_and_texts if kind == "code")
  before, path, after = imports.partition('sys.path[:0] = [".", ".."]')
  assert path and "import msa_jax" not in before and "import" in after


def small_checkpoint(folder):
  """A tiny model without QK-norm, with a tokenizer of bytes."""
  config = ModelConfig(
    vocab_size=256,
    num_layers=2,
    embed_dim=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=32,
    qk_norm=False,
  )
  tokenizer = corpus.read_tokenizer(corpus.TextConfig(), None).saved()
  checkpoints.save(
    DecoderLM(config, rngs=nnx.Rngs(0)),
    folder,
    documents={"tokenizer.json": json.loads(tokenizer)},
  )
  return folder


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


@pytest.mark.parametrize(
  "source",
  [
    pytest.param(path, marks=[pytest.mark.slow] if path.stem in LONG else [])
    for path in build.sources()
  ],
  ids=lambda path: path.stem,
)
def test_a_notebook_runs(source, monkeypatch, tmp_path):
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
  if source.stem.startswith("04"):
    folder = small_checkpoint(tmp_path / "checkpoint")
    parameters = {**parameters, "FOLDER": str(folder)}
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
