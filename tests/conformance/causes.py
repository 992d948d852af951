"""From pages of tracebacks to the one line that tells why. Pure text in, text out."""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["Verdict", "find_cause", "where_stuck"]


class Verdict(enum.Enum):
    """What a test came to."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"


_RANK = re.compile(r"^Process (\d+) exited with error code")
_FRAME = re.compile(r'^\s*File "([^"]+)", line (\d+), in (\S+)')
_ERROR = re.compile(r"^\s*((?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Failure|Interrupt|Exit|Warning|Mismatch))(?::|$)\s*(.*)")

_STACK = re.compile(r"^Current thread 0x\w+[^\n]*:\n((?:  File .*\n)+)", re.MULTILINE)
_STACK_FRAME = re.compile(r'^  File "([^"]+)", line (\d+) in (\S+)', re.MULTILINE)

_CONSEQUENCES = re.compile(
    r"timed out in _all_gather|[Cc]onnection (closed|reset|refused)|Broken pipe|eof \(this error|Socket Timeout|RemoteException"
    r"|wait timeout after|Process \d+ (exited|terminated)|WorkerLostError|ShutdownError"
)
"""What a worker says when another one failed before it."""

_PATHS = (("/zmqagent/", "zmqagent/"), ("/torch/", "torch/"), ("/tests/", "tests/"))
_WIDTH = 220


@dataclass(frozen=True)
class _Candidate:
    """One exception of one rank: ``place`` is the frame that raised it, ``order`` its place in the text."""

    rank: str
    error: str
    place: str
    order: int

    def __str__(self) -> str:
        where = f" ({self.place})" if self.place else ""
        return f"{self.rank}{self.error[:_WIDTH]}{where}"

    @property
    def weight(self) -> tuple[bool, bool, int]:
        """Sorts causes before consequences, and what our own code raised before what torch made of it."""
        return bool(_CONSEQUENCES.search(self.error)), "zmqagent/" not in self.place, self.order


def find_cause(text: str, logs: dict[str, str]) -> str:
    """The line of ``text`` (the result of a failed test) or of ``logs`` (by rank) that best tells why it failed.

    A traceback chain prints its root first, and so does an exception that came from another worker; a rank that fails
    because another one died says so in words that are known. What remains is taken in the order of the text.
    """
    found = list(_candidates(text))
    if not found or all(candidate.weight[0] for candidate in found):
        for name, log in logs.items():
            found += _candidates(log, f"[{name}] ")
    if found:
        return str(min(found, key=lambda candidate: candidate.weight))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:_WIDTH] if lines else "no message"


def where_stuck(logs: dict[str, str]) -> str:
    """Where each rank's main thread stood when the stacks were dumped: in our own code if it was there, else in torch's."""
    places: dict[str, list[str]] = {}
    for name, log in logs.items():
        if name.startswith("rank") and (stacks := _STACK.findall(log)):
            frames = [_shorten(*frame) for frame in _STACK_FRAME.findall(stacks[-1])]
            known = [frame for start in ("zmqagent/", "torch/", "") for frame in frames if frame.startswith(start)]
            places.setdefault(known[0], []).append(name)
    return "; ".join(f"{', '.join(names)} at {place}" for place, names in places.items())


def _candidates(text: str, rank: str = "") -> Iterator[_Candidate]:
    place = ""
    for order, line in enumerate(text.splitlines()):
        if match := _RANK.match(line):
            rank, place = f"[rank {match[1]}] ", ""
        elif match := _FRAME.match(line):
            place = _shorten(match[1], match[2], match[3])
        elif (match := _ERROR.match(line)) and not line.lstrip().startswith("File"):
            yield _Candidate(rank, f"{match[1].rpartition('.')[2]}: {match[2]}", place, order)


def _shorten(path: str, line: str, function: str) -> str:
    for marker, start in _PATHS:
        if marker in path:
            path = start + path.rpartition(marker)[2]
            break
    return f"{path}:{line} in {function}"
