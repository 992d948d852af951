"""The options of a worker that injects faults."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from zmqagent.exceptions import InvalidOptionError, InvalidTypeError
from zmqagent.options import ZmqRpcBackendOptions
from zmqagent.testing.faults import message_type

if TYPE_CHECKING:
    from torch._C._distributed_rpc import _TensorPipeRpcBackendOptionsBase
    from typing_extensions import Self

__all__ = ["FaultyZmqRpcBackendOptions"]


class FaultyZmqRpcBackendOptions(ZmqRpcBackendOptions):
    """The options of the FAULTY_ZMQ backend. They concern what the worker that has them sends, to itself too; nothing that it
    receives.

    All are attributes too, and can be set until ``init_rpc`` reads them.

    Args:
        num_fail_sends: how many attempts to send one message fail before one succeeds. Calls of the same function with the same
            arguments, tensors and arrays apart, to one worker are one message; so are the gradients of repeated backward passes.
        messages_to_fail: the types of the messages that fail, by torch's names.
        messages_to_delay: by torch's names, after how many seconds messages leave. A call's timeout runs meanwhile.
        **options: those of `ZmqRpcBackendOptions`.

    Raises:
        InvalidOptionError: a value is out of its range, or a name belongs to no message that can fail (also a ``ValueError``).
        InvalidTypeError: a value has the wrong type (also a ``TypeError``).

    The names are those of torch's requests: ``SCRIPT_CALL`` and ``SCRIPT_REMOTE_CALL`` (operators and TorchScript functions),
    ``PYTHON_CALL`` and ``PYTHON_REMOTE_CALL``, ``SCRIPT_RREF_FETCH_CALL`` and ``PYTHON_RREF_FETCH_CALL`` (``to_here``; each of
    the two stands for both), ``RREF_USER_DELETE``, ``RREF_FORK_REQUEST``, ``RREF_CHILD_ACCEPT``, ``RREF_BACKWARD_REQ``,
    ``BACKWARD_AUTOGRAD_REQ``, ``CLEANUP_AUTOGRAD_CONTEXT_REQ``.
    """

    def __init__(
        self,
        *,
        num_fail_sends: int = 0,
        messages_to_fail: Iterable[str] = (),
        messages_to_delay: Mapping[str, float] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.num_fail_sends = num_fail_sends
        self.messages_to_fail = messages_to_fail
        self.messages_to_delay = {} if messages_to_delay is None else messages_to_delay

    @classmethod
    def from_tensorpipe(cls, options: _TensorPipeRpcBackendOptionsBase) -> Self:
        """What `ZmqRpcBackendOptions.from_tensorpipe` takes over and, from the options of FAULTY_TENSORPIPE, the faults.

        Raises:
            InvalidTypeError, InvalidOptionError: as the constructor.
        """
        made = super().from_tensorpipe(options)
        for name in ("num_fail_sends", "messages_to_fail", "messages_to_delay"):
            if hasattr(options, name):
                setattr(made, name, getattr(options, name))
        return made

    @property
    def num_fail_sends(self) -> int:
        """How many attempts to send one message fail before one succeeds."""
        return self._num_fail_sends

    @num_fail_sends.setter
    def num_fail_sends(self, value: int) -> None:
        if isinstance(value, bool) or not isinstance(value, int):
            raise InvalidTypeError(f"num_fail_sends must be an int, but got {value!r:.100} ({type(value).__name__})")
        if value < 0:
            raise InvalidOptionError(f"numFailSends should be non-negative: num_fail_sends is {value}")
        self._num_fail_sends = value

    @property
    def messages_to_fail(self) -> list[str]:
        """The types of the messages that fail, by torch's names."""
        return self._messages_to_fail

    @messages_to_fail.setter
    def messages_to_fail(self, value: Iterable[str]) -> None:
        if isinstance(value, str) or not isinstance(value, Iterable):
            raise InvalidTypeError(f"messages_to_fail must be a list of names, but got {value!r:.100} ({type(value).__name__})")
        self._messages_to_fail = [_name(name) for name in value]

    @property
    def messages_to_delay(self) -> dict[str, float]:
        """By torch's names, after how many seconds messages leave."""
        return self._messages_to_delay

    @messages_to_delay.setter
    def messages_to_delay(self, value: Mapping[str, float]) -> None:
        if not isinstance(value, Mapping):
            raise InvalidTypeError(
                f"messages_to_delay must map names to seconds, but got {value!r:.100} ({type(value).__name__})"
            )
        self._messages_to_delay = {_name(name): _delay(name, seconds) for name, seconds in value.items()}

    def __repr__(self) -> str:
        names = ("num_fail_sends", "messages_to_fail", "messages_to_delay")
        return f"{super().__repr__()[:-1]}, {', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"


def _name(value: Any) -> str:
    if not isinstance(value, str):
        raise InvalidTypeError(f"a message type goes by its name, a str, but got {value!r:.100} ({type(value).__name__})")
    message_type(value)
    return value


def _delay(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidTypeError(
            f"the delay of {name} must be a number of seconds, but got {value!r:.100} ({type(value).__name__})"
        )
    if not (math.isfinite(value) and value >= 0):
        raise InvalidOptionError(f"Delays passed to FAULTY_ZMQ must be non-negative, and finite: that of {name} is {value}")
    return float(value)
