"""``python -m zmqagent`` does what the ``zmqagent`` command does."""

from __future__ import annotations

import sys

from zmqagent.cli.main import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
