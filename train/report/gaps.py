"""Gaps between the sides of a comparison, with their intervals.

Every side of a comparison is compared with the side named ``gqa``, seed by seed
and on the same held-out tokens.
"""

import bisect
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from train.report.runs import BASELINE, Metric, Run


def t_interval(values: Sequence[float]) -> tuple[float, float] | None:
  """Student-t 95 % interval of the mean; None for fewer than two values."""
  if len(values) < 2:
    return None
  half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
  mean = statistics.fmean(values)
  return mean - float(half), mean + float(half)


def deviation_interval(values: Sequence[float]) -> tuple[float, float] | None:
  """95 % interval of the standard deviation of what the values were drawn from,
  if it is normal; None for fewer than two values."""
  if len(values) < 2:
    return None
  free = len(values) - 1
  low, high = (
    statistics.stdev(values) * (free / float(stats.chi2.ppf(q, free))) ** 0.5
    for q in (0.975, 0.025)
  )
  return low, high


def pairs_needed(deviation: float, half: float) -> int:
  """The fewest pairs of seeds whose 95 % t-interval reaches `half` to either
  side of the mean, if their standard deviation is `deviation`."""

  def reached(count: int) -> bool:
    sem = deviation / count**0.5
    return float(stats.t.ppf(0.975, count - 1)) * sem <= half

  most = 2
  while not reached(most):
    most *= 2
  # More pairs always give a narrower interval.
  return bisect.bisect_left(range(most), True, lo=2, key=reached)


def paired_runs(
  sides: dict[str, list[Run]],
) -> dict[str, list[tuple[Run, Run]]]:
  """Pairs of runs (baseline, side) for each side other than the baseline.

  There is a pair for every seed that both sides have finished. Without a
  baseline there are no pairs.
  """
  if BASELINE not in sides:
    return {}
  base = {r.seed: r for r in sides[BASELINE] if r.finished}
  return {
    side: [(base[r.seed], r) for r in runs if r.finished and r.seed in base]
    for side, runs in sides.items()
    if side != BASELINE
  }


def paired_gap(pairs: list[tuple[Run, Run]], metric: Metric) -> dict[str, Any]:
  """Side minus baseline after training, paired by seed.

  Percentages are relative to the baseline of the same seed. Only bits per byte
  have them.

  Raises:
    ValueError: the runs of a pair were evaluated on different numbers of
      batches or at different steps.
  """
  for a, b in pairs:
    lengths = [len(r.final["batch_loss"]) for r in (a, b)]
    if lengths[0] != lengths[1] or a.final["step"] != b.final["step"]:
      raise ValueError(
        f"{a.label} and {b.label} end with {lengths[0]} and {lengths[1]} "
        f"held-out batches at steps {a.final['step']} and {b.final['step']}; "
        "a pair needs the same batches at the same step"
      )
  base = [a.final[metric.key] for a, _ in pairs]
  values = [b.final[metric.key] - x for (_, b), x in zip(pairs, base)]
  # The loss of answers can come close to 0, where a percentage means nothing.
  relative = metric.key == "bits_per_byte"
  percents = [100 * v / x for v, x in zip(values, base) if relative]
  return {
    "metric": metric.key,
    "unit": metric.unit,
    "seeds": [a.seed for a, _ in pairs],
    "values": values,
    "mean": statistics.fmean(values) if values else None,
    "interval": t_interval(values),
    "percents": percents,
    "percent": statistics.fmean(percents) if percents else None,
    "percent_interval": t_interval(percents),
    "batch_percent_interval": _batch_interval(pairs) if relative else None,
    "batches": [len(a.final["batch_loss"]) for a, _ in pairs],
    "batches_with_higher_loss": [
      sum(y > x for x, y in zip(a.final["batch_loss"], b.final["batch_loss"]))
      for a, b in pairs
    ],
  }


def _batch_interval(
  pairs: list[tuple[Run, Run]],
) -> tuple[float, float] | None:
  """95 % interval of a gap over held-out batches, in percent of the baseline's
  loss. It is given for a single pair only; with more, the interval is over
  seeds."""
  if len(pairs) != 1:
    return None
  ((base, run),) = pairs
  losses = base.final["batch_loss"], run.final["batch_loss"]
  interval = t_interval([b - a for a, b in zip(*losses)])
  if interval is None:
    return None
  low, high = (100 * x / statistics.fmean(losses[0]) for x in interval)
  return low, high


def answer_gaps(
  pairs: list[tuple[Run, Run]], key: str, oracle: bool = False
) -> list[dict[str, Any]]:
  """Shares of right answers of baseline and side, in each octave of distance or
  for each number, and over all seeds.

  "error" is the standard error of the difference of two shares that come from
  different facts. The sides are asked for the same facts, so the true error is
  smaller.

  Args:
    pairs: of runs, as `paired_runs` returns them.
    key: a probe's by_distance or by_number.
    oracle: whether the side is evaluated with the best possible choice. Pairs
      that were not evaluated with it are left out.
  """
  bins: dict[tuple, list[tuple[float, float, int]]] = {}
  for base, run in pairs:
    other = run.final_oracle if oracle else run.final
    for a, b in zip(base.final.get(key) or [], other.get(key) or []):
      place = tuple((x, a[x]) for x in ("low", "high", "number") if x in a)
      bins.setdefault(place, []).append(
        (a["accuracy"], b["accuracy"], a["count"])
      )
  found = []
  for place, values in bins.items():
    count = sum(n for *_, n in values)
    base, side = (sum(v[i] * v[2] for v in values) / count for i in (0, 1))
    spread = base * (1 - base) + side * (1 - side)
    found.append(
      {
        **dict(place),
        "seeds": len(values),
        "count": count,
        "baseline": base,
        "side": side,
        "difference": side - base,
        "error": (spread / count) ** 0.5,
      }
    )
  return found


def gaps_by_position(
  against: dict[str, list[tuple[Run, Run]]],
) -> dict[str, list[dict[str, Any]]]:
  """Loss after training by the number of tokens before the query.

  Differences are paired by seed, of the seeds that a side has measured, which
  may be others than another side's. Sides that measured in no seed are left
  out.

  Args:
    against: pairs of runs, as `paired_runs` returns them.

  Returns:
    For each side a list of bins low <= tokens < high. "baseline" is the
    baseline's mean loss over the seeds of all sides, "difference" the mean of
    the side's loss minus the baseline's, "by_seed" the same for each seed, and
    "dense_difference" the same for the side's weights with dense attention
    (None if a seed was not evaluated with it).
  """
  key = "loss_by_position"
  measured = {
    side: [
      (a.final, b.final, b.final_dense)
      for a, b in pairs
      if key in a.final and key in b.final
    ]
    for side, pairs in against.items()
  }
  bases = {
    a.seed: [bin_["loss"] for bin_ in a.final[key]]
    for pairs in against.values()
    for a, b in pairs
    if key in a.final and key in b.final
  }
  baseline = np.array([*bases.values()]).mean(0) if bases else np.zeros(0)
  return {
    side: _bins(finals, key, baseline)
    for side, finals in measured.items()
    if finals
  }


def _bins(
  finals: list[tuple[dict, dict, dict]], key: str, baseline: np.ndarray
) -> list[dict]:
  """The bins of a side.

  Args:
    finals: for each seed the final records of the baseline, of the side, and of
      the side with dense attention.
    key: of the bins in a record.
    baseline: mean loss in each bin.
  """

  def losses(i: int) -> np.ndarray:
    """[seed, bin]"""
    return np.array([[x["loss"] for x in seed[i][key]] for seed in finals])

  base = losses(0)
  apart = losses(1) - base
  dense: Any = [None] * base.shape[1]
  if all(key in record for *_, record in finals):
    dense = (losses(2) - base).mean(0).tolist()
  return [
    {
      "low": bin_["low"],
      "high": bin_["high"],
      "count": bin_["count"] * len(finals),
      "baseline": float(loss),
      "difference": float(differences.mean()),
      "by_seed": differences.tolist(),
      "dense_difference": other,
    }
    for bin_, loss, differences, other in zip(
      finals[0][0][key], baseline, apart.T, dense, strict=True
    )
  ]
