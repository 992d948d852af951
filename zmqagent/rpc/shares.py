"""Gives back the shares in RRefs that came with an answer which nobody can use: one that arrived after its call had ended, or
that cannot be read here. The worker that sent it counts on them: it keeps what they refer to until they die."""

from __future__ import annotations

import logging

from zmqagent.exceptions import ProtocolError
from zmqagent.rref.forks import receive_rref
from zmqagent.wire.commands import Command, ForwardAutograd, ProfiledReturn, Return, parse
from zmqagent.wire.types import Message

__all__ = ["give_back"]

_logger = logging.getLogger(__name__)


def give_back(answer: Command | Message) -> None:
    """Claims every share that ``answer`` brought, and drops it. Runs none of the code that unpickling its value would run."""
    try:
        while isinstance(answer, Message | ForwardAutograd | ProfiledReturn):
            answer = parse(answer if isinstance(answer, Message) else answer.inner)
    except ProtocolError as error:
        _logger.debug("an answer that nobody takes cannot be read either: %s", error)
        return
    if not isinstance(answer, Return):
        return
    for share in answer.shares:
        try:
            receive_rref(share)
        except RuntimeError as error:
            # Its RRef has ended, RPC has, or unpickling that failed half-way had claimed it: then its death is told already.
            _logger.debug("the share %s is not given back: %s", share, error)
