"""Inputs, patterns, an oracle written in loops, and devices, for the tests."""

import dataclasses
import functools
import math
import multiprocessing
import os
import pathlib
import subprocess
import sys
import tempfile

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import cases
from pallas_kernels import sparse_attention_fwd

# Configs of the forward that a GPU runs: every way to go through the work.
FORWARD_CONFIGS = (
  sparse_attention_fwd.Config(),
  sparse_attention_fwd.Config(task=128),
  sparse_attention_fwd.Config(pair_warpgroups=2, query_stages=3),
  sparse_attention_fwd.Config(shared_cost=0.0),
  sparse_attention_fwd.Config(shared_cost=1e9, slack=0.0),
)


def run_on_devices(count: int, code: str, *arguments: object) -> str:
  """What Python code prints on forced CPU devices, in a process of its own.

  The process is a fork of a server's, which has imported what all need and has
  no devices yet: imports take two seconds. The server keeps the environment of
  the first call.

  Args:
    count: of devices.
    code: it can import the tests.
    arguments: its sys.argv[1:].

  Raises:
    AssertionError: the code failed.
  """
  server = multiprocessing.get_context("forkserver")
  server.set_forkserver_preload([*IMPORTED_ONCE])
  with tempfile.TemporaryDirectory() as folder:
    printed, errors = (pathlib.Path(folder) / name for name in ("out", "err"))
    printed.touch()
    errors.touch()
    words = ["-c", *map(str, arguments)]
    process = server.Process(
      target=_run_code, args=(count, code, words, printed, errors)
    )
    process.start()
    process.join()
    assert process.exitcode == 0, errors.read_text()[-3000:]
    return printed.read_text()


IMPORTED_ONCE = ("helpers", "flax.nnx", "msa_jax", "optax", "train.program")


def _run_code(count, code, words, printed, errors):
  """Runs code as a program; what it prints goes into two files."""
  for path, stream in ((printed, 1), (errors, 2)):
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
  os.environ["XLA_FLAGS"] += f" --xla_force_host_platform_device_count={count}"
  jax.config.update("jax_platforms", "cpu")
  # What is compiled here, nobody finds again.
  jax.config.update("jax_enable_compilation_cache", False)
  sys.argv = words
  assert len(jax.devices()) == count
  exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})
  sys.stdout.flush()


def run_in_a_new_process(count: int, code: str, *arguments: object) -> str:
  """The same in a process that imports all by itself.

  For what is about imports, and about the memory of a process.
  """
  flags = os.environ["XLA_FLAGS"]
  env = os.environ | {
    "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={count}",
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": os.path.dirname(__file__),
  }
  done = subprocess.run(
    [sys.executable, "-c", code, *map(str, arguments)],
    env=env,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return done.stdout


def launches(jaxpr, found=None):
  """How often each kernel and cuDNN call stands in a program, by name."""
  found = {} if found is None else found
  for eqn in jaxpr.eqns:
    name = eqn.primitive.name
    kernel = name == "mpmd_map"
    if kernel or name.startswith("dot_product_attention"):
      name = str(eqn.params["name"]) if kernel else name
      found[name] = found.get(name, 0) + 1
      continue
    for inner in jax.extend.core.jaxprs_in_params(eqn.params):
      launches(inner, found)
  return found


@dataclasses.dataclass(frozen=True)
class Case:
  """Sizes of one attention call."""

  batch: int = 1
  q_len: int = 24
  kv_len: int = 24
  num_heads: int = 4
  num_kv_heads: int = 2
  head_dim: int = 8
  index_dim: int = 8
  block_size: int = 4
  top_k: int = 3
  num_local_blocks: int = 1
  kv_lengths: tuple[int, ...] | None = None

  @property
  def lengths(self):
    if self.kv_lengths is None:
      return None
    return jnp.asarray(self.kv_lengths, jnp.int32)

  @property
  def num_blocks(self):
    return -(-self.kv_len // self.block_size)

  def positions(self):
    ends = self.kv_lengths or (self.kv_len,) * self.batch
    return np.asarray(ends)[:, None] - self.q_len + np.arange(self.q_len)

  # One program in the place of many small operations.
  @functools.partial(jax.jit, static_argnames=("self", "dtype"))
  def inputs(self, seed=0, dtype=jnp.float32):
    """q, k, v, index_q, index_k."""
    keys = jax.random.split(jax.random.key(seed), 5)
    kv = (self.batch, self.kv_len, self.num_kv_heads, self.head_dim)
    shapes = (
      (self.batch, self.q_len, self.num_heads, self.head_dim),
      kv,
      kv,
      (self.batch, self.q_len, self.num_kv_heads, self.index_dim),
      (self.batch, self.kv_len, self.index_dim),
    )
    return tuple(
      jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes)
    )

  def select_options(self):
    return dict(
      block_size=self.block_size,
      top_k=self.top_k,
      num_local_blocks=self.num_local_blocks,
      kv_lengths=self.lengths,
    )


# Ragged sizes, T < S, S < block, N < P, rows shorter than T, G 1 to 4.
CASES = {
  "even": Case(),
  "ragged": Case(batch=2, q_len=29, kv_len=29, num_local_blocks=2),
  "cached": Case(q_len=7, kv_len=33, num_heads=6, num_kv_heads=3, head_dim=4),
  "one_block": Case(batch=2, q_len=6, kv_len=6, block_size=8, top_k=2),
  "few_blocks": Case(q_len=10, kv_len=10, num_heads=2, top_k=9),
  "unforced": Case(num_heads=8, block_size=8, top_k=2, num_local_blocks=0),
  "lengths": Case(batch=3, q_len=9, kv_len=21, kv_lengths=(21, 13, 4)),
}

# Cases of the kernels that take chosen blocks, on a GPU. The truth holds about
# ten float32 arrays of H x T x S: 2.5 GB in the first case, the largest.
HOPPER_CASES = {
  "paper_heads": (Case(
    q_len=700, kv_len=1408, num_heads=64, num_kv_heads=4, head_dim=128,
    index_dim=128, block_size=128, top_k=8,
  ), "bfloat16"),
  "ragged_batch": (Case(
    batch=3, q_len=515, kv_len=2050, num_heads=16, num_kv_heads=2, head_dim=64,
    index_dim=128, block_size=64, top_k=6, kv_lengths=(2050, 301, 0),
  ), "float16"),
  "group_16_d64": (Case(
    q_len=700, kv_len=700, num_heads=32, num_kv_heads=2, head_dim=64,
    index_dim=64, block_size=128, top_k=3,
  ), "float16"),
  "group_8_block_64": (Case(
    batch=2, q_len=333, kv_len=1500, num_heads=16, num_kv_heads=2,
    head_dim=128, index_dim=64, block_size=64, top_k=32,
  ), "bfloat16"),
  "group_4": (Case(
    q_len=300, kv_len=900, num_heads=8, num_kv_heads=2, head_dim=128,
    index_dim=128, block_size=128, top_k=4,
  ), "bfloat16"),
  "ragged_rows": (Case(
    batch=4, q_len=300, kv_len=1100, num_heads=16, num_kv_heads=2, head_dim=128,
    index_dim=128, block_size=128, top_k=5, kv_lengths=(1100, 37, 700, 300),
  ), "bfloat16"),
  "group_1": (Case(
    q_len=300, kv_len=900, num_heads=3, num_kv_heads=3, head_dim=64,
    index_dim=64, block_size=128, top_k=1,
  ), "float16"),
  "group_6_d96": (Case(
    q_len=300, kv_len=900, num_heads=12, num_kv_heads=2, head_dim=96,
    index_dim=80, block_size=128, top_k=4,
  ), "bfloat16"),
  "group_11_p64": (Case(
    q_len=200, kv_len=4500, num_heads=11, num_kv_heads=1, head_dim=64,
    index_dim=64, block_size=64, top_k=64,
  ), "bfloat16"),
  "d256": (Case(
    q_len=700, kv_len=1408, num_heads=16, num_kv_heads=2, head_dim=256,
    index_dim=128, block_size=128, top_k=8,
  ), "bfloat16"),
  "d256_group_16_block_64": (Case(
    batch=2, q_len=333, kv_len=1500, num_heads=32, num_kv_heads=2,
    head_dim=256, index_dim=64, block_size=64, top_k=6,
    kv_lengths=(1500, 301),
  ), "float16"),
  "d256_group_4_of_200": (Case(
    q_len=300, kv_len=900, num_heads=8, num_kv_heads=2, head_dim=200,
    index_dim=80, block_size=128, top_k=4,
  ), "bfloat16"),
}  # fmt: skip

# Shapes at which the kernels that own KV blocks are lowered: the paper's, small
# heads, and batches of a training step, whose rows share a few launches. Those
# marked slow give kernels that differ from another one's in numbers only, or in
# which rows share a launch, which interpreted tests have too. Packed rows are
# lowered with the paper's heads in tests/test_kernels_packed.py.
LOWERED = {
  name: (cases.CASES | cases.BATCHES)[name]
  for name in ("8k", "128k", "1m", "small_heads_32k", "8x4k", "16x4k_16_heads")
}
LOWERED_NAMES = [
  pytest.param(name, marks=[pytest.mark.slow] * (name != "small_heads_32k"))
  for name in LOWERED
]


def random_blocks(case, seed=0, share=1):
  """Random choices; `share` neighbouring queries choose alike."""
  rng = np.random.default_rng(seed)
  rows = np.full(
    (case.batch, case.num_kv_heads, case.q_len, case.top_k), -1, np.int32
  )
  for b in range(case.batch):
    for g in range(case.num_kv_heads):
      for t, position in enumerate(case.positions()[b]):
        if t % share == 0:
          order = rng.permutation(case.num_blocks)
        own = position // case.block_size
        ids = np.sort([i for i in order if i <= own][: case.top_k])
        rows[b, g, t, : len(ids)] = ids
  return jnp.asarray(rows)


def patterns(case):
  """Choices a kernel must get right, by name."""
  shape = (case.batch, case.num_kv_heads, case.q_len, case.top_k)
  own = np.where(case.positions() < 0, -1, case.positions() // case.block_size)
  first = np.full(shape, -1, np.int32)
  first[..., 0] = 0
  only_own = np.full(shape, -1, np.int32)
  only_own[..., 0] = own[:, None]
  late = np.array(random_blocks(case, seed=3))
  late[:, :, ::2] = -1
  beyond = np.array(random_blocks(case, seed=4))
  beyond[..., -1] = case.num_blocks + 5
  return {
    "random": random_blocks(case),
    "sharing": random_blocks(case, share=8),
    "all_on_block_0": jnp.asarray(first),
    "own_only": jnp.asarray(only_own),
    "some_rows_empty": jnp.asarray(late),
    "beyond_the_end": jnp.asarray(beyond),
  }


@dataclasses.dataclass(frozen=True)
class Row:
  """What sees what in one batch row, spelled out.

  Attributes:
    seen: for each query the slots that it sees, its own last.
    block: for each slot the id of its block; -1 for padding.
  """

  seen: list[list[int]]
  block: list[int]


def plain_rows(case):
  return [
    Row(
      [list(range(position + 1)) for position in positions],
      [j // case.block_size for j in range(case.kv_len)],
    )
    for positions in case.positions()
  ]


def packed_rows(spans, parents, length, block_size):
  """Rows of spans (start, end) with parents, -1 for a root."""
  rows = []
  for row, above in zip(spans, parents):
    seen = [[] for _ in range(length)]
    block, blocks = [-1] * length, 0
    paths = {-1: []}
    for i, (start, end) in enumerate(row):
      before = paths[above[i]]
      for t in range(start, end):
        seen[t] = before + list(range(start, t + 1))
        block[t] = blocks + (t - start) // block_size
      paths[i] = before + list(range(start, end))
      blocks = block[end - 1] + 1
    rows.append(Row(seen, block))
  return rows


def loop_select(case, index_q, index_k, rows=None):
  """`select_blocks`, one score at a time; `rows` of packed rows."""
  rows = plain_rows(case) if rows is None else rows
  index_q, index_k = np.asarray(index_q), np.asarray(index_k)
  chosen = np.full(
    (case.batch, case.num_kv_heads, case.q_len, case.top_k), -1, np.int32
  )
  for b in range(case.batch):
    for g in range(case.num_kv_heads):
      for t in range(case.q_len):
        scores: dict[int, list[float]] = {}
        for j in rows[b].seen[t]:
          score = float(np.dot(index_q[b, t, g], index_k[b, j]))
          scores.setdefault(rows[b].block[j], []).append(score)
        # Blocks in the order in which the query sees them.
        forced = list(scores)[::-1][: case.num_local_blocks]
        ranked = []
        for n in scores:
          if n in forced:
            ranked.append((-math.inf, n))
          elif not any(math.isnan(s) for s in scores[n]):
            ranked.append((-max(scores[n]), n))
        ids = sorted(n for _, n in sorted(ranked)[: case.top_k])
        chosen[b, g, t, : len(ids)] = ids
  return chosen


def loop_msa(
  case, q, k, v, index_q, index_k, blocks, d_out, query_mask=None, rows=None
):
  """Output, lse, KL and all gradients, one query and head at a time.

  `blocks` None means all visible tokens, `query_mask` may be weights, `rows` is
  for packed rows, whose padding does not count in the KL. Returns out, lse, kl,
  (dq, dk, dv) for the cotangent d_out, and (dindex_q, dindex_k) of the KL.
  """
  packed = rows is not None
  rows = plain_rows(case) if rows is None else rows
  q, k, v, index_q, index_k, d_out = (
    np.asarray(x, np.float64) for x in (q, k, v, index_q, index_k, d_out)
  )
  group = case.num_heads // case.num_kv_heads
  scale, index_scale = case.head_dim**-0.5, case.index_dim**-0.5
  out = np.zeros_like(q)
  lse = np.full((case.batch, case.num_heads, case.q_len), -np.inf)
  dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
  d_iq, d_ik = np.zeros_like(index_q), np.zeros_like(index_k)
  kl = 0.0
  mask = np.ones((case.batch, case.q_len))
  if query_mask is not None:
    mask = np.array(query_mask, np.float64)
  if packed:
    mask = mask * [[n >= 0 for n in row.block] for row in rows]
  divisor = mask.sum() * case.num_kv_heads
  for b in range(case.batch):
    for t in range(case.q_len):
      for g in range(case.num_kv_heads):
        seen = [
          j
          for j in rows[b].seen[t]
          if blocks is None or rows[b].block[j] in np.asarray(blocks)[b, g, t]
        ]
        if not seen:
          continue
        teacher = np.zeros(len(seen))
        for h in range(g * group, (g + 1) * group):
          s = scale * k[b, seen, g] @ q[b, t, h]
          lse[b, h, t] = np.log(np.sum(np.exp(s)))
          p = np.exp(s - lse[b, h, t])
          teacher += p / group
          out[b, t, h] = p @ v[b, seen, g]
          dp = v[b, seen, g] @ d_out[b, t, h]
          ds = scale * p * (dp - out[b, t, h] @ d_out[b, t, h])
          dq[b, t, h] = ds @ k[b, seen, g]
          for j, p_j, ds_j in zip(seen, p, ds):
            dv[b, j, g] += p_j * d_out[b, t, h]
            dk[b, j, g] += ds_j * q[b, t, h]
        if mask[b, t]:
          u = index_scale * index_k[b, seen] @ index_q[b, t, g]
          student = np.exp(u - np.log(np.sum(np.exp(u))))
          weight = mask[b, t] / divisor
          kl += weight * np.sum(teacher * np.log(teacher / student))
          du = weight * index_scale * (student - teacher)
          d_iq[b, t, g] = du @ index_k[b, seen]
          for j, du_j in zip(seen, du):
            d_ik[b, j] += du_j * index_q[b, t, g]
  return out, lse, kl, (dq, dk, dv), (d_iq, d_ik)
