"""Statistics of chosen blocks, and inputs fitted to them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import msa_jax
from benchmarks import cases, fit
from msa_jax import selection_stats


def test_sharing_against_loops():
  rng = np.random.default_rng(0)
  block, top_k, length = 4, 2, 80
  ids = np.full((1, 1, length, top_k), -1)
  for t in range(length):
    number = min(t // block + 1, top_k)
    picks = rng.choice(t // block + 1, number, replace=False)
    ids[0, 0, t, :number] = np.sort(picks)
  found = selection_stats.sharing(jnp.asarray(ids), block_size=block)
  rows = [set(row.tolist()) - {-1} for row in ids[0, 0]]
  chosen = [t for t in range(length) if t // block >= 2 * top_k]
  wanted = {
    "first_block": np.mean([0 in rows[t] for t in chosen]),
    "previous_block": np.mean([t // block - 1 in rows[t] for t in chosen]),
    "kept": np.mean(
      [len(rows[t] & rows[t + 16]) / 2 for t in chosen if t + 16 < length]
    ),
    "union8": np.mean(
      [len(set.union(*rows[t : t + 8])) for t in range(16, length, 8)]
    ),
  }
  for name, value in wanted.items():
    np.testing.assert_allclose(found[name], [value], rtol=1e-6, err_msg=name)
  # The last queries alone give the same, where they are all that choose.
  last = selection_stats.sharing(
    jnp.asarray(ids[:, :, 16:]), block_size=block, kv_len=length
  )
  for name, value in wanted.items():
    np.testing.assert_allclose(last[name], [value], rtol=1e-6)


def test_fitted_knobs_share_as_wanted(tmp_path, monkeypatch):
  """Of choices that the generator itself made."""
  case = cases.Case(
    tokens=256, num_kv_heads=4, index_dim=128, block_size=8, top_k=4
  )
  knobs = cases.Sharing(noise=0.3, drift=256, sink=0.12, near=3.0)
  ids = msa_jax.select_blocks(
    *cases.sharing_inputs(jax.random.key(5), case, knobs),
    block_size=8,
    top_k=4,
  )
  found = selection_stats.sharing(ids, block_size=8)
  arrays = {name: np.asarray(value)[None] for name, value in found.items()}
  about = json.dumps(dict(context=256, top_k=4))
  np.savez(tmp_path / "selection.npz", block_size=8, about=about, **arrays)
  monkeypatch.setattr(fit, "DRIFTS", (256,))
  monkeypatch.setattr(fit, "AGAIN", (4,))
  out = tmp_path / "fitted.json"
  monkeypatch.setattr(cases, "FITTED", out)
  with pytest.raises(ValueError, match=r"benchmarks\.fit"):
    cases.index_inputs(jax.random.key(0), case, "fitted")
  assert fit.main([str(tmp_path), "--lengths", "--out", str(out)]) == 0
  (row,) = json.loads(out.read_text())["knobs"]
  for _, statistic, *_ in fit.KNOBS:
    wanted = float(arrays[statistic].mean())
    # A knob's last interval is 4 % wide, and one moves the others' statistics.
    assert row["reached"][statistic] == pytest.approx(wanted, rel=0.15)
  index_q, index_k = cases.index_inputs(jax.random.key(0), case, "fitted")
  assert index_q.shape == (1, 256, 4, 128) and index_k.shape == (1, 256, 128)


def test_fit_refuses(tmp_path, capsys):
  assert fit.main([str(tmp_path)]) == 1
  assert "no selection.npz" in capsys.readouterr().err
  np.savez(tmp_path / "selection.npz", counts=np.zeros(3))
  assert fit.main([str(tmp_path)]) == 1
  assert "lacks union8" in capsys.readouterr().err
