"""One self-contained HTML page about candidates: quality, size, errors, time. No script, no network."""

from aphroquant.reporting.page import render, write_report
from aphroquant.reporting.report import Candidate, Report, Step, candidate, report_of_run

__all__ = ["Candidate", "Report", "Step", "candidate", "render", "report_of_run", "write_report"]
