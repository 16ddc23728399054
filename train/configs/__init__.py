"""Presets: each module here holds one comparison, named COMPARISON."""

import importlib
import pkgutil

from train.config import ComparisonConfig


def names() -> tuple[str, ...]:
  """The presets' names, which are those of the modules."""
  return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def preset(name: str) -> ComparisonConfig:
  """The comparison of a preset.

  Raises:
    ValueError: there is no such preset.
  """
  if name not in names():
    raise ValueError(
      f"preset {name!r} is unknown: wanted one of {', '.join(names())}."
    )
  return importlib.import_module(f"train.configs.{name}").COMPARISON
