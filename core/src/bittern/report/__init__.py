"""Reports: one record of what was done, shown on a terminal or written as JSON."""

from bittern.report.report import Report, Result, plain

__all__ = ["Report", "Result", "plain"]
