"""The report of a comparison.

`runs` reads run folders back, `gaps` compares them, `tables` and `figures` show
them, `page` puts them on one page.
"""

import pathlib


def write(folder: pathlib.Path) -> pathlib.Path:
  """Writes the report of a comparison's folder (see `page.write`)."""
  # `page` needs matplotlib, which machines that only train may lack.
  from train.report import page

  return page.write(folder)
