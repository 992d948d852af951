"""The version of this package, and the one place that holds it: builds, docs and `zmqagent.__version__` read it here."""

from __future__ import annotations

__all__ = ["__version__"]

__version__ = "0.1.0"
