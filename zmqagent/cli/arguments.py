"""What several commands ask of their arguments, and how they say that they did not get it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

__all__ = ["number", "unwritable"]


def number(kind: type[int] | type[float], allowed: Callable[[float], bool], meaning: str) -> Callable[[str], float]:
    """A parser of numbers for argparse, which says what it wants."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not allowed(value):
            raise argparse.ArgumentTypeError(f"must be {meaning}, not {text}")
        return value

    return parse


def unwritable(path: Path) -> str:
    """Why no file can be written to ``path``; empty if one can."""
    if path.is_dir() or not os.access(path if path.exists() else path.resolve().parent, os.W_OK):
        return "there is no such directory, or it may not be written to"
    return ""
