"""What ends a benchmark early."""

from __future__ import annotations

__all__ = ["ProcessFailed"]


class ProcessFailed(Exception):
    """A process of the benchmark raised, died or did not answer; the text says which, and why."""
