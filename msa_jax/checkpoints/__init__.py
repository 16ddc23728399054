"""Released checkpoints as models: one module for each family."""
