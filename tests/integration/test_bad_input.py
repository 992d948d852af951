"""Garbage at the socket of a worker that runs: it answers who can be answered, says little in its log, and serves on."""

from __future__ import annotations

import logging
import random
import socket
import struct
import time
from functools import partial
from typing import Any
from urllib.parse import urlparse

import torch.distributed.rpc as rpc
import zmq

from tests.integration.harness import DEADLINE_S, on_group
from tests.support.damage import all_damages, label_of
from tests.support.wire_samples import REQUESTS
from zmqagent.agent.codec import Codec
from zmqagent.wire.commands import RRefUserDelete, RRefUserDeletes, parse
from zmqagent.wire.types import Message, MessageType, WorkerId

SEED = 20_240_301
FLOOD = 10_000
ENOUGH_LINES = 100
"""Far fewer than messages, and more than a slow machine writes while the flood lasts (six in ten seconds)."""

_lines: list[str] = []


class _Lines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        _lines.append(record.getMessage())


def listen() -> None:
    """Notes what this worker logs from now on."""
    logging.getLogger("zmqagent").addHandler(_Lines())


def lines() -> list[str]:
    return _lines


def metric(name: str) -> int:
    agent: Any = rpc.api._get_current_rpc_agent()
    return int(agent.get_metrics()[name])


def record() -> tuple[int, int, tuple[str, ...]]:
    """This worker's id, incarnation and addresses."""
    agent: Any = rpc.api._get_current_rpc_agent()
    return agent._me.worker_id, agent._me.incarnation, agent._me.addresses


def state() -> dict[str, str]:
    """What this worker holds for others, as it says itself."""
    counters = torch_counters()
    return {name: value for name, value in counters.items() if name.startswith("num_")}


def torch_counters() -> dict[str, str]:
    from torch.distributed import autograd

    return {**rpc._rref_context_get_debug_info(), **autograd._get_debug_info()}


def there(function: Any, *args: Any) -> Any:
    return rpc.rpc_sync("worker1", function, args=args)


def send(address: str, messages: list[list[bytes]]) -> None:
    """Sends as anybody could who knows the address."""
    with zmq.Context() as context, context.socket(zmq.PUSH) as push:
        push.linger = int(DEADLINE_S * 1000)
        push.sndhwm = 0
        push.connect(address)
        for frames in messages:
            push.send_multipart(frames)


def wait_for(what: Any, wanted: int) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while what() < wanted:
        assert time.monotonic() < deadline, (what(), wanted)


def _damage_everything() -> tuple[Any, ...]:
    there(listen)
    (me, mine, _), (_, theirs, (address, *_)) = record(), there(record)
    codec = Codec(WorkerId(me), mine)
    # Numbers far above those of this worker's own calls.
    number = 1 << 30
    messages: list[list[bytes]] = []
    answers = 0

    def encode(message: Message, number: int) -> list[bytes]:
        return [bytes(frame) for frame in codec.encode(message, number, theirs)]

    for kind, sample in REQUESTS.items():
        for damage in all_damages(sample, partial(encode, number=number)):
            number += 1
            good = encode(sample, number)
            frames = damage.apply(sample, lambda message, number=number: encode(message, number))
            if frames:
                messages.append(frames)
                answers += frames[0].startswith(label_of(good)) and kind is not MessageType.GOODBYE
    before, late = there(state), metric("agent.late_replies")
    send(address, messages)
    wait_for(lambda: there(metric, "agent.refused_messages"), len(messages))
    # Remote calls that were damaged in their tensors only have made their RRefs, with an error.
    calls = [parse(REQUESTS[kind]) for kind in (MessageType.PYTHON_REMOTE_CALL, MessageType.SCRIPT_REMOTE_CALL)]
    deletes = RRefUserDeletes(tuple(RRefUserDelete(call.rref_id, call.fork_id) for call in calls))
    send(address, [encode(deletes.to_message(), number + 1)])
    # Nobody here made these calls, so their answers are late ones.
    wait_for(lambda: metric("agent.late_replies"), late + answers + 1)
    return len(messages), there(metric, "agent.refused_messages"), before, there(state), len(there(lines))


def test_a_worker_that_gets_every_damaged_request_over_tcp_answers_them_and_serves_on() -> None:
    sent, refused, before, after, lines = on_group(_damage_everything, transport="tcp")
    assert sent > 1000
    assert refused == sent
    assert after == before
    assert 5 <= lines < ENOUGH_LINES


def _flood() -> tuple[int, list[str], int]:
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    there(listen)
    future = rpc.rpc_async("worker1", str.upper, args=("under way",))
    _, _, (address, *_) = there(record)
    send(address, [[rng.randbytes(rng.randrange(200)) for _ in range(rng.randint(1, 4))] for _ in range(FLOOD)])
    calls = 0
    while there(metric, "agent.refused_messages") < FLOOD:
        calls += 1
    assert future.wait() == "UNDER WAY"
    return there(metric, "agent.refused_messages"), there(lines), calls


def test_a_flood_of_garbage_over_tcp_fills_no_log_and_holds_up_nobody() -> None:
    refused, lines, _ = on_group(_flood, transport="tcp")
    assert refused == FLOOD
    assert 5 <= len(lines) < ENOUGH_LINES
    assert all("worker worker1" in line and len(line) < 1000 for line in lines)


def _announce_a_huge_frame() -> tuple[bytes, str]:
    _, _, (address, *_) = there(record)
    url = urlparse(address)
    assert url.hostname is not None
    with socket.create_connection((url.hostname, url.port), timeout=DEADLINE_S) as connection:
        # ZMTP 3.0 (https://rfc.zeromq.org/spec/23): greeting, READY of a PUSH socket, head of a long frame.
        connection.sendall(b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32))
        ready = b"\x05READY\x0bSocket-Type\x00\x00\x00\x04PUSH"
        connection.sendall(b"\x04" + bytes([len(ready)]) + ready + b"\x02" + struct.pack(">Q", 1 << 60) + b"x")
        received = b"more"
        while received:
            received = connection.recv(1000)
    return received, there(str.upper, "serving")


def test_who_announces_a_frame_of_2_to_the_60_bytes_is_disconnected() -> None:
    assert on_group(_announce_a_huge_frame, transport="tcp") == (b"", "SERVING")
