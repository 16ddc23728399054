"""The report of a comparison: runs read back, tables, figures, one page."""
