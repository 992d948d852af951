"""Settings of the documentation."""

from __future__ import annotations

import runpy
from pathlib import Path

project = "zmqagent"
author = "The zmqagent authors"
copyright = author
release = runpy.run_path(str(Path(__file__).parents[1] / "zmqagent" / "version.py"))["__version__"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
# Docstrings name things in single backticks, whether or not they have an entry here.
default_role = "code"
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_default_options = {"members": True, "show-inheritance": True, "member-order": "bysource"}
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
napoleon_google_docstring = True
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = f"zmqagent {release}"
