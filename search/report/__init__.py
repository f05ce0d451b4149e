"""What a finished study shows: front.json, front.csv, front.png and report.html."""

from adq.search.report.write import FORMATS, render, write_report

__all__ = ["FORMATS", "render", "write_report"]
