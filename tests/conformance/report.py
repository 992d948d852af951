"""What a run tells: a line for each failure, totals for each suite, the closing line, and JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from tests.conformance.causes import Verdict
from tests.conformance.process import Outcome

__all__ = ["Report"]

_SIGN_OF_LIFE = 50


class Report:
    """Collects outcomes, prints what needs to be known as it comes, and judges the whole."""

    def __init__(self, backend: str, total: int) -> None:
        self.outcomes: list[Outcome] = []
        self._total = total
        self._backend = backend

    def add(self, outcome: Outcome) -> None:
        """Take an outcome; a failure is printed at once, and now and then how far the run has come."""
        self.outcomes.append(outcome)
        if outcome.verdict is Verdict.FAILED:
            print(f"FAIL  {outcome.name} ({outcome.seconds:.1f} s)  {outcome.cause}", flush=True)
        if len(self.outcomes) % _SIGN_OF_LIFE == 0:
            print(f"      {len(self.outcomes)} of {self._total} tests done", flush=True)

    @property
    def has_failures(self) -> bool:
        """Whether a test failed, and the run with it."""
        return any(o.verdict is Verdict.FAILED for o in self.outcomes)

    def close(self, seconds: float) -> None:
        """Print totals and, as the last line, ``N passed, N failed, N skipped``."""
        print()
        print(f"{'suite':<36}{'passed':>8}{'failed':>8}{'skipped':>9}{'seconds':>10}")
        for suite in dict.fromkeys(o.suite for o in self.outcomes):
            own = [o for o in self.outcomes if o.suite == suite]
            passed, failed, skipped = _count(own)
            print(f"{suite:<36}{passed:>8}{failed:>8}{skipped:>9}{sum(o.seconds for o in own):>10.1f}")
        passed, failed, skipped = _count(self.outcomes)
        print(f"\n{self._backend}, torch {torch.__version__}: {seconds:.0f} s")
        print(f"{passed} passed, {failed} failed, {skipped} skipped", flush=True)

    def write_json(self, path: Path) -> None:
        """Write every outcome to ``path``, for `tests.conformance.table`."""
        tests = [{**asdict(o), "verdict": o.verdict.value} for o in self.outcomes]
        path.write_text(json.dumps({"backend": self._backend, "torch": torch.__version__, "tests": tests}, indent=1) + "\n")


def _count(outcomes: Sequence[Outcome]) -> tuple[int, int, int]:
    counts = Counter(o.verdict for o in outcomes)
    return counts[Verdict.PASSED], counts[Verdict.FAILED], counts[Verdict.SKIPPED]
