"""Tensors on the way from one worker to another, without the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgpack
import torch

from zmqagent.agent.tensors import pack, unpack

__all__ = ["travel", "wire"]


def wire(descriptions: Sequence[Any], buffers: Sequence[Any]) -> tuple[tuple[Any, ...], list[memoryview]]:
    """What arrives of ``descriptions`` and ``buffers``: msgpack's idea of the first, and memory that others do not own."""
    arrived = msgpack.unpackb(msgpack.packb(descriptions, strict_types=False), use_list=False)
    return arrived, [memoryview(bytearray(buffer)) for buffer in buffers]


def travel(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return unpack(*wire(*pack(tensors)))
