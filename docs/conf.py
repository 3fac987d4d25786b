"""Sphinx with furo: the API comes from docstrings alone, and -W makes a warning an error."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eca_fused._version import __version__

project = "eca_fused"
copyright = "the eca_fused authors"
release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = "eca_fused"
exclude_patterns: list[str] = []
myst_heading_anchors = 3
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
nitpicky = False
default_role = "code"  # of `names` in docstrings


def plain_text(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are plain text: (N, C, *spatial) is no emphasis, |a| no substitution."""
    for i, line in enumerate(lines):
        lines[i] = line.replace("*", r"\*").replace("|", r"\|")


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", plain_text, priority=900)  # after napoleon
