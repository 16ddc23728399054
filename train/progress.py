"""Shows the progress of a run: a bar in a terminal or lines of text elsewhere,
and TensorBoard files if tensorboardX is installed."""

import importlib.util
import pathlib
import sys

import jax

_EVALUATIONS = {
  "eval": "held out:",
  "dense_eval": "held out, the same weights with dense attention:",
  "oracle_eval": "held out, the same weights with the oracle's blocks:",
  "window_eval": "held out, the same weights without tokens far back:",
}
_LAYER_NUMBERS = ("kl", "block_recall", "score_recall", "best_score_recall")


class Progress:
  """Shows the records of metrics.jsonl. Only the first process shows any."""

  def __init__(self, label: str, num_steps: int, folder: pathlib.Path):
    self._label = label
    self._num_steps = num_steps
    self._folder = folder
    self._active = jax.process_index() == 0
    self._bar = None
    self._writer = None

  def __enter__(self) -> "Progress":
    return self

  def __exit__(self, *_) -> None:
    if self._bar is not None:
      self._bar.stop()
    if self._writer is not None:
      self._writer.close()

  def start(self, step: int, parameters: dict[str, int]) -> None:
    """Opens the displays at the step from which the run continues."""
    if not self._active:
      return
    if importlib.util.find_spec("tensorboardX") is not None:
      import tensorboardX

      # Points after this step come from an attempt that was stopped.
      self._writer = tensorboardX.SummaryWriter(
        str(self._folder / "tensorboard"), purge_step=step + 1
      )
    if sys.stdout.isatty() and importlib.util.find_spec("rich") is not None:
      from rich import progress

      self._bar = progress.Progress(
        progress.TextColumn("[bold]{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.fields[note]}"),
      )
      self._bar.start()
      self._task = self._bar.add_task(
        self._label, total=self._num_steps, completed=step, note=""
      )
    self._print(
      f"{self._label}: {parameters['total']:,} parameters"
      f" ({parameters['index']:,} of the index branch), step {step} of"
      f" {self._num_steps}, {self._folder}"
    )

  def _print(self, text: str) -> None:
    if self._bar is not None:
      self._bar.console.print(text, highlight=False, markup=False)
    else:
      print(text, flush=True)

  def show(self, record: dict) -> None:
    """Shows a record of metrics.jsonl."""
    if not self._active:
      return
    kind, step = record["kind"], record["step"]
    if self._writer is not None:
      for name, value in _scalars(record):
        self._writer.add_scalar(f"{kind}/{name}", value, step)
    note = _note(record)
    if self._bar is None or kind in _EVALUATIONS:
      count = f"step {step}/{self._num_steps}"
      self._print(f"{self._label}  {count}  {record['phase']}  {note}")
    if self._bar is not None and kind == "train":
      self._bar.update(self._task, completed=step, note=note)


def _scalars(record: dict):
  for layer in record.get("layers", ()):
    for name in _LAYER_NUMBERS:
      if layer[name] is not None:
        yield f"{name}/layer{layer['layer']}", layer[name]
  for layer in record.get("router", ()):
    for name in ("max_load", "min_load"):
      yield f"{name}/layer{layer['layer']}", layer[name]
  for name, value in record.items():
    number = isinstance(value, (int, float)) and name != "step"
    if number:
      yield name, value


def _note(record: dict) -> str:
  if record["kind"] == "layers":
    means = []
    for name in _LAYER_NUMBERS:
      values = [x[name] for x in record["layers"] if x[name] is not None]
      if values:
        means.append(f"{name} {sum(values) / len(values):.3f}")
    return "layers: " + "  ".join(means)
  words = [f"loss {record['loss']:.4f}"]
  if record["bits_per_byte"] is not None:
    words.append(f"bits/byte {record['bits_per_byte']:.4f}")
  if record["kind"] in _EVALUATIONS:
    words.insert(0, _EVALUATIONS[record["kind"]])
    for name, value in record.items():
      if name.endswith("accuracy") and value is not None:
        task = name.removesuffix("accuracy").replace("_", " ")
        words.append(f"{task}right {100 * value:.1f} %")
    return "  ".join(words)
  if record["kl"] is not None:
    words.append(f"kl {record['kl']:.4f}")
  return "  ".join([*words, f"{record['tokens_per_second']:,.0f} tokens/s"])
