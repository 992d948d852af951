"""Immutable records for the path of every message.

Pure. A dataclass that is frozen at run time sets each field by a call of ``object.__setattr__``, and so takes four times as long
to make as others do; a message passes through a dozen of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from typing_extensions import dataclass_transform
else:

    def dataclass_transform(**_: object):
        return lambda decorator: decorator


__all__ = ["frozen"]

_T = TypeVar("_T")


@dataclass_transform(frozen_default=True)
def frozen(cls: type[_T]) -> type[_T]:
    """Makes ``cls`` a dataclass with slots whose fields are never assigned again. It is the type checker that sees to that."""
    return dataclass(slots=True, unsafe_hash=True)(cls)
