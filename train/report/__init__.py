"""The report of a comparison.

`runs` reads run folders back, `gaps` compares them, `tables` and `figures` show
them, `page` puts them on one page.
"""

import pathlib


def check_packages() -> None:
  """Imports what `write` needs, so that a missing package is said before the
  training that the report is about.

  Raises:
    ModuleNotFoundError: names the package, and the option that goes without.
  """
  try:
    from train.report import page
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
      f"the report needs the package {error.name!r}, which is missing"
      " (--no-report trains without a report)",
      name=error.name,
    ) from error
  del page


def write(
  *folders: pathlib.Path, out: pathlib.Path | None = None
) -> pathlib.Path:
  """Writes the report of a comparison's folders (see `page.write`)."""
  # `page` needs matplotlib, which machines that only train may lack.
  from train.report import page

  return page.write(*folders, out=out)
