"""A web page about the examples of a data set: one file that opens from disk, offline."""

from train.report.page import Column, Report, write

__all__ = ["Column", "Report", "write"]
