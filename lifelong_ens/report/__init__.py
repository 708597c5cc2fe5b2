"""Records of runs -> tidy pandas tables, a Markdown summary and plots."""

from __future__ import annotations

from lifelong_ens.report.report import Report

__all__ = ["Report"]
