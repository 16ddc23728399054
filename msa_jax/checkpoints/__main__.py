"""`python -m msa_jax.checkpoints`: see `msa_jax.checkpoints.commands`."""

import sys

from msa_jax.checkpoints.commands import main

if __name__ == "__main__":
  sys.exit(main())
