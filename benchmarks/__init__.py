"""Benchmarks. Nothing imports this package but tests and notebooks.

  python -m benchmarks             the kernels on a Hopper GPU, each op checked
                                   against the reference before it is timed
  python -m benchmarks.portable    the "xla" and "reference" implementations and
                                   generation, on any device
  python -m benchmarks.packed      packed rows of documents and prefix trees
  python -m benchmarks.context_parallel
                                   one layer over all devices of a host
  python -m benchmarks.fuzz        random calls against the reference
  python -m benchmarks.worth       writes docs/worth.md from those results
  python -m benchmarks.fit RUN     makes inputs whose choices share as much as
                                   those of a trained model

`--help` lists the options of each. `python -m train speed PRESET` times whole
training steps of models.

Modules: `cases` names the shapes and makes the inputs; `forward`, `training`
and `decode` are groups of ops; `measure` times them; `fuzz_processes` runs the
fuzzer in several processes; `records` reads, merges, writes and plots
`results/<device>.json`. `results/LOG.md` says what was tried.
"""
