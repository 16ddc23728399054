"""The training loop: takes one run from its config to a finished run folder."""

import contextlib
import dataclasses
import io
import json
import time
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np

from msa_jax import selection_stats
from train import config as config_lib
from train import data as data_lib
from train import evaluate, pretrained, sample
from train.checkpoint import RunFolder, replace_file, write_json
from train.program import (
  Program,
  check_data,
  compile_key,
  flatten_state,
  functions_called,
  train_step,
  unflatten_state,
)
from train.progress import Progress

# selection.npz holds the chosen blocks of this many queries one by one.
SAVED_QUERIES = 2048


class NonFiniteError(FloatingPointError):
  """The loss, a gradient or the state of a run became NaN or infinite."""


class _Clock:
  """Seconds spent training, without evaluation and compilation."""

  def __init__(self, seconds: float):
    self._before = seconds
    self._since: float | None = None

  @property
  def seconds(self) -> float:
    running = 0.0 if self._since is None else time.monotonic() - self._since
    return self._before + running

  @contextlib.contextmanager
  def stopped(self):
    self._before, self._since = self.seconds, None
    yield
    self._since = time.monotonic()

  def start(self) -> None:
    self._since = time.monotonic()


def run(
  config: config_lib.RunConfig,
  source: data_lib.Source | None = None,
  program: Program | None = None,
  stop_at: float | None = None,
) -> dict | None:
  """Trains a run, or continues one that was stopped.

  Args:
    config: the run; everything is written to its `folder`.
    source: the opened data, if they are open already.
    program: a program with the run's compile key, such as another seed's, to
      save compiling it again.
    stop_at: the time.monotonic() at which to stop with a checkpoint. A step or
      evaluation that has begun is finished first. None: do not stop.

  Returns:
    The content of done.json; None if the run was stopped.

  Raises:
    ValueError: the config cannot run here, the folder belongs to another run,
      or the program has another compile key.
    NonFiniteError: a number became NaN or infinite; the last checkpoint is
      good.
  """
  if not config.folder:
    raise ValueError("folder='': wanted the run's folder.")
  key = compile_key(config)
  if program is not None and program.config != key:
    raise ValueError(
      "program: wanted one whose config is compile_key(config); it differs in"
      f" {_different_fields(program.config, key)}."
    )
  source = data_lib.load(config.data) if source is None else source
  check_data(config, source)
  folder = RunFolder(config, source.fingerprint)
  try:
    finished = folder.read_done()
    if finished is not None:
      print(f"{folder.path}: finished at step {finished['step']} before.")
      return finished
    program = Program(key) if program is None else program
    return _Run(config, source, folder, program).train(stop_at)
  finally:
    folder.close()


def _different_fields(a: Any, b: Any) -> str:
  fields = (field.name for field in dataclasses.fields(a))
  return ", ".join(n for n in fields if getattr(a, n) != getattr(b, n))


class _Pending(NamedTuple):
  """A step whose metrics are read while the next one runs."""

  step: int
  metrics: dict[str, jax.Array]
  bytes: int | None
  targets: int
  imbalance: float | None


class _Run:
  """A run in progress."""

  def __init__(
    self,
    config: config_lib.RunConfig,
    source: data_lib.Source,
    folder: RunFolder,
    program: Program,
  ):
    self.config = config
    self.source = source
    self.folder = folder
    self.program = program
    self.first = config.recipe.init_step or 0
    self.memory: int | None = None
    self.saved: int | None = None
    seconds = 0.0
    if folder.start:
      wanted = flatten_state(self.program.abstract_state)
      flat, seconds = folder.checkpoints.restore(folder.start, wanted)
      self.state = unflatten_state(flat, self.program.abstract_state)
      self.first = folder.start
    elif config.recipe.init_from is not None:
      self.state = self.program.start_from_run(config.recipe, config.seed)
    elif config.recipe.pretrained is not None:
      self.state = self.program.start_from_pretrained(
        config.recipe, config.seed
      )
    else:
      self.state = self.program.init(config.seed)
    self.clock = _Clock(seconds)
    self.logged = (self.first, seconds)
    files = {"tokenizer.json": source.tokenizer}
    if not (folder.path / pretrained.FILE).exists():
      kept = pretrained.kept_of(config)
      files[pretrained.FILE] = None if kept is None else json.dumps(kept)
    folder.write_environment(
      source.fingerprint, self.program.count_parameters(), files
    )

  def tokens(self, step: int) -> int:
    return step * self.config.batch_size * self.config.context

  def train(self, stop_at: float | None) -> dict | None:
    config = self.config
    label = f"{config.task}/{config.side} seed {config.seed}"
    pending: _Pending | None = None
    phase = None
    with Progress(label, config.num_steps, self.folder.path) as self.progress:
      self.progress.start(self.first, self.program.count_parameters())
      self.clock.start()
      for step in range(self.first + 1, config.num_steps + 1):
        if config.phase(step) != phase:
          self._record(pending)
          pending, phase = None, config.phase(step)
          with self.clock.stopped():
            self.memory = self.program.compile(phase)
        batch = self.source.train_batch(
          config.seed,
          step - 1,
          batch_size=config.batch_size,
          context=config.context,
        )
        self.state, metrics = train_step(
          self.program, config, self.state, batch, step
        )
        self._record(pending)
        pending = _Pending(
          step,
          metrics,
          evaluate.count_bytes(self.source, batch),
          int(batch.loss_mask.sum()),
          evaluate.context_imbalance(self.program, batch),
        )
        if self._is_due(step):
          self._record(pending)
          pending = None
          with self.clock.stopped():
            self._pause(step)
        if (
          stop_at is not None
          and time.monotonic() > stop_at
          and step < config.num_steps
        ):
          self._record(pending)
          self._save(step)
          print(f"{self.folder.path}: stopped at step {step}.", flush=True)
          return None
      self._record(pending)
      return self._finish()

  def _is_due(self, step: int) -> bool:
    config = self.config
    every = (config.eval_every, config.layers_every, config.checkpoint_every)
    return (
      step == config.num_steps
      or step in config.keep_steps
      or any(step % n == 0 for n in every)
    )

  def _record(self, pending: _Pending | None) -> None:
    """Reads a step's metrics, and logs them if a record is due."""
    if pending is None:
      return
    config, step = self.config, pending.step
    metrics = jax.device_get(pending.metrics)
    load = metrics.pop("load", None)
    metrics = {k: v.item() for k, v in metrics.items()}
    if not metrics["finite"]:
      names = ("loss", "kl", "grad_norm", "index_grad_norm")
      self._stop(step, ", ".join(f"{n} {metrics[n]}" for n in names))
    if step % config.log_every and step != config.num_steps:
      return
    seconds = self.clock.seconds
    last_step, last_seconds = self.logged
    tokens = self.tokens(step) - self.tokens(last_step)
    speed = tokens / max(seconds - last_seconds, 1e-9)
    self.logged = (step, seconds)
    index = self.program.has_index
    record = {
      **self._stamp("train", step),
      "loss": metrics["loss"],
      "bits_per_byte": evaluate.bits_per_byte(
        metrics["loss"] * pending.targets, [pending.bytes]
      ),
      "kl": metrics["kl"] if index else None,
      "learning_rate": config.learning_rates(step)["backbone"],
      "grad_norm": metrics["grad_norm"],
      "index_grad_norm": metrics["index_grad_norm"] if index else None,
      "tokens_per_second": speed,
      "peak_bytes": self.memory,
    }
    if pending.imbalance is not None:
      record["context_imbalance"] = pending.imbalance
    if load is not None:
      record["router"] = evaluate.router_records(self.program, load)
    self._log(record)

  def _stop(self, step: int, why: str) -> NoReturn:
    saved = self.folder.checkpoints.latest()
    self.folder.mark_broken(step, why)
    raise NonFiniteError(
      f"step {step}: the training is not finite any more ({why}). The last good"
      " checkpoint is"
      + (f" that of step {saved}" if saved else " none")
      + f", in {self.folder.path}."
    )

  def _stamp(self, kind: str, step: int, phase: str | None = None) -> dict:
    return {
      "kind": kind,
      "step": step,
      "phase": phase or self.config.phase(step),
      "tokens": self.tokens(step),
      "seconds": self.clock.seconds,
    }

  def _log(self, record: dict) -> None:
    self.folder.log(record)
    self.progress.show(record)

  def _pause(self, step: int) -> None:
    """Does the evaluation, layer metrics and checkpoint due after a step."""
    config = self.config
    phase, last = config.phase(step), step == config.num_steps
    if step % config.eval_every == 0 or last:
      result = self._evaluate(step, phase, by_choice=last)
      if not np.isfinite(result["loss"]):
        self._stop(step, f"held-out loss {result['loss']}")
      self._log(self._stamp("eval", step) | result)
    if last and config.dense_at_end:
      # The same weights attending to all tokens show what choosing costs.
      result = self._evaluate(step, "warmup")
      if np.isfinite(result["loss"]):
        self._log(self._stamp("dense_eval", step, "warmup") | result)
      else:
        # The weights were not trained for dense attention, so this does not
        # mean that the run broke down.
        print(
          f"{self.folder.path}: with dense attention the held-out loss is"
          f" {result['loss']}: no dense_eval record.",
          flush=True,
        )
    if last and config.evaluates_oracle:
      result = self._evaluate(step, "oracle")
      if np.isfinite(result["loss"]):
        self._log(self._stamp("oracle_eval", step, "oracle") | result)
    if last and config.evaluates_window:
      result = evaluate.window_metrics(
        self.program,
        self.state.params,
        self.source,
        batches=config.eval_batches,
      )
      self._log(self._stamp("window_eval", step) | result)
    if self.program.msa_layers and (step % config.layers_every == 0 or last):
      metrics = evaluate.layer_metrics(
        self.program, self.state.params, self.source, phase
      )
      layers = evaluate.layer_records(self.program, metrics)
      record = {"kind": "layers", "step": step, "phase": phase}
      self._log(record | {"layers": layers})
    if step % config.checkpoint_every == 0 or step in config.keep_steps or last:
      self._save(step)

  def _evaluate(self, step: int, phase: str, by_choice: bool = False) -> dict:
    return evaluate.held_out_metrics(
      self.program,
      self.state.params,
      self.source,
      phase,
      batches=self.config.eval_batches,
      probe_batches=self.config.probe_batches_at(step),
      by_choice=by_choice and "choose" in functions_called(self.config),
    )

  def _save(self, step: int) -> None:
    if step != self.saved:
      self.folder.save(step, flatten_state(self.state), self.clock.seconds)
      self.saved = step

  def _finish(self) -> dict:
    config = self.config
    if config.goes_sparse:
      self._save_selection()
    if config.samples:
      self._save_samples()
    done = {"step": config.num_steps, "final": self.folder.last_eval()}
    self.folder.finish(done)
    return done

  def _save_samples(self) -> None:
    """Writes samples.json, see `sample.continuations`."""
    phase = self.config.phase(self.config.num_steps)
    why = f"{self.program.mesh.size} devices"
    if self.program.mesh.size == 1:
      try:
        found = sample.continuations(
          self.program.merge(self.state.params),
          self.config,
          self.source,
          "warmup" if phase == "warmup" else "sparse",
        )
        write_json(self.folder.path / "samples.json", found)
        return
      except NotImplementedError as error:  # some ablations have no cache
        why = str(error)
    print(f"{self.folder.path}: no samples.json ({why}).", flush=True)

  def _save_selection(self) -> None:
    """Writes selection.npz: what the trained model chose on held-out text.

    Its arrays are `counts`, as `evaluate.selection_counts` returns them; the
    statistics of `selection_stats.sharing` for each layer and group;
    `block_indices`, int16 [L, K, query, P], the choices of the last queries of
    one batch row; and `about`, JSON that says how the file was made.

    In packed data it looks at the batch rows that one document fills, where
    blocks have the numbers of a plain row. Without any there is no file.
    """
    config = self.config
    layers = np.asarray(self.program.msa_layers)
    block_size = config.model.index.block_size
    metrics = evaluate.layer_metrics(
      self.program,
      self.state.params,
      self.source,
      config.phase(config.num_steps),
    )
    ids = metrics.selection.block_indices[layers]
    batch = self.source.eval_batch(0, **self.program.eval_shape)
    if batch.segment_ids is not None:
      whole = (batch.segment_ids[:, :-1] == 1).all(axis=1)
      ids = ids[:, whole]
      if not whole.any():
        print(
          f"{self.folder.path}: no document of the first held-out batch fills a"
          " row: no selection.npz.",
          flush=True,
        )
        return
    statistics = {name: [] for name in selection_stats.SHARING}
    for layer in ids:
      found = selection_stats.sharing(layer, block_size=block_size)
      for name in selection_stats.SHARING:
        statistics[name].append(np.asarray(found[name]))
    about = {
      "made_by": "the end of the run in this folder",
      "rows": ids.shape[1],
      "context": config.context,
      "top_k": config.model.index.top_k,
      "last_queries_of_row": 0,
    }
    arrays: dict[str, Any] = {
      "counts": evaluate.selection_counts(ids, block_size),
      "layers": layers,
      "block_size": np.asarray(block_size),
      "block_indices": ids[:, 0, :, -SAVED_QUERIES:].astype(np.int16),
      "about": np.asarray(json.dumps(about)),
    }
    arrays |= {name: np.stack(values) for name, values in statistics.items()}
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    if jax.process_index() == 0:
      replace_file(self.folder.path / "selection.npz", content.getvalue())
