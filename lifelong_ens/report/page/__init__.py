"""``report.html``: one file that shows what one or more folders of records say, without a network."""

from __future__ import annotations

from lifelong_ens.report.page.page import read_source, render, write_page

__all__ = ["read_source", "render", "write_page"]
