"""Every type of message, damaged in every way: the sender is told, the worker counts it, holds nothing of it, and serves on.

A new type of message needs a sample in `tests/support/wire_samples.py`, and is then tested here like the others.
"""

from __future__ import annotations

import pickle
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from queue import SimpleQueue
from typing import Any

import msgpack
import pytest
from torch.distributed.rpc import WorkerInfo
from torch.distributed.rpc.internal import PythonUDF
from torch.futures import Future

from tests.support.damage import all_damages, flip_bits, label_of
from tests.support.lone_worker import ALICE, BOB, DEADLINE_S, LoneWorker, encode
from tests.support.wire_samples import ANSWERS, CONTEXT, GOOD_CALL, REQUESTS
from zmqagent.agent.base import Reply
from zmqagent.agent.codec import Codec
from zmqagent.exceptions import CalleeError, ProtocolError, RpcError, UnreadableCallError
from zmqagent.rpc import pickler
from zmqagent.rpc.failures import new_future
from zmqagent.rpc.results import complete
from zmqagent.wire import types
from zmqagent.wire.commands import Failure, ForwardAutograd, Return, RRefFetch, RRefUserDelete, RunWithProfiling, parse
from zmqagent.wire.frames import Label, decode, read_label
from zmqagent.wire.types import AutogradMetadata, ForkId, Message, MessageType, RRefId

SEED = 20_240_229
GOODBYE = MessageType.GOODBYE
CALLS = (MessageType.PYTHON_CALL, MessageType.SCRIPT_CALL, MessageType.FORWARD_AUTOGRAD_REQ)
REMOTE_CALLS = (MessageType.PYTHON_REMOTE_CALL, MessageType.SCRIPT_REMOTE_CALL)


@pytest.fixture(scope="module")
def alice() -> Iterator[LoneWorker]:
    with LoneWorker() as alice:
        yield alice


@pytest.fixture(autouse=True)
def _serves_on_and_holds_nothing(alice: LoneWorker) -> Iterator[None]:
    before = alice.state()
    yield
    assert_good_call_is_answered(alice)
    deadline = time.monotonic() + DEADLINE_S
    # Counts go down just after answers are sent.
    while alice.state() != before and time.monotonic() < deadline:
        pass
    assert alice.state() == before
    assert not alice.has_sent()


def assert_good_call_is_answered(alice: LoneWorker) -> None:
    number = alice.draw()
    alice.deliver(encode(GOOD_CALL, number))
    answer = parse(alice.answer_to(number))
    assert isinstance(answer, Return)
    assert pickler.loads(answer.body) == "GOOD"


def is_reserved(kind: MessageType) -> bool:
    try:
        parse(Message(kind))
    except ProtocolError as error:
        return "no command is defined" in str(error)
    return False


def test_every_type_of_message_has_a_sample() -> None:
    wanted = {kind for kind in MessageType if not is_reserved(kind)}
    assert set(REQUESTS) == {kind for kind in wanted if kind.is_request}
    assert set(ANSWERS) == {kind for kind in wanted if kind.is_response}
    for kind, (request, answer) in ANSWERS.items():
        assert kind is MessageType.EXCEPTION or kind in types.ANSWERS[request.type], answer


def test_it_is_known_what_answers_each_request() -> None:
    assert set(types.ANSWERS) == set(REQUESTS)
    assert {kind for answers in types.ANSWERS.values() for kind in answers} == set(ANSWERS) - {MessageType.EXCEPTION}


def test_the_samples_are_good() -> None:
    with LoneWorker() as alice:
        # What two of the samples need: a context of Alice's own, and that she has come to the barrier.
        lease = alice.worker._contexts.new_context()
        alice.agent._group.enter_barrier(ALICE.worker_id, "tag", 4, lambda outcome: None)
        for number, (kind, message) in enumerate(REQUESTS.items()):
            alice.deliver(encode(message, number))
            if kind is not GOODBYE:
                assert alice.answer_to(number).type in types.ANSWERS[kind]
        assert alice.refused() == 0
        del lease


# Requests.


@pytest.mark.parametrize("kind", REQUESTS, ids=lambda kind: kind.name)
def test_who_sent_a_damaged_request_is_told_if_it_can_be_seen_who_that_is(alice: LoneWorker, kind: MessageType) -> None:
    message = REQUESTS[kind]
    refused = alice.refused()
    damages = all_damages(message, partial(encode, number=0))
    for damage in damages:
        number = alice.draw()
        frames = damage.apply(message, partial(encode, number=number))
        alice.deliver(frames)
        if frames and frames[0].startswith(label_of(encode(message, number))) and kind is not GOODBYE:
            assert_refusal(alice.answer_to(number), damage)
    if kind in REMOTE_CALLS:
        # Some damages were in the tensors only, and their RRef was made with an error.
        delete_rref(alice, message)
    assert_good_call_is_answered(alice)
    assert alice.refused() == refused + len(damages)


def delete_rref(alice: LoneWorker, call: Message) -> None:
    command = parse(call)
    number = alice.draw()
    alice.deliver(encode(RRefUserDelete(command.rref_id, command.fork_id).to_message(), number))
    assert alice.answer_to(number).type is MessageType.RREF_ACK


def assert_refusal(answer: Message, damage: object) -> None:
    failure = parse(answer)
    assert isinstance(failure, Failure), (damage, failure)
    assert failure.code in (ProtocolError.code, UnreadableCallError.code), (damage, failure)
    assert failure.text.startswith("On WorkerInfo(id=0, name=alice): "), damage
    assert 50 < len(failure.text) < 1000, (damage, failure)


@pytest.mark.parametrize("wrapper", [MessageType.FORWARD_AUTOGRAD_REQ, MessageType.RUN_WITH_PROFILING_REQ], ids=lambda k: k.name)
@pytest.mark.parametrize("inner", [*MessageType, 0x1FE], ids=str)
def test_what_is_no_call_is_refused_within_a_wrapper_too(alice: LoneWorker, wrapper: MessageType, inner: int) -> None:
    fields = REQUESTS[wrapper].fields[:-2]
    number = alice.draw()
    alice.deliver(encode(Message(wrapper, (*fields, int(inner), ("neither", "nor"))), number))
    assert_refusal(alice.answer_to(number), inner)


# Pickles are looked at last, and by whoever needs the object.


def bad_pickles(message: Message) -> Iterator[Message]:
    """``message`` with pickles that are cut short, or are of another object, or whose out-of-band parts are missing."""
    payload = bytes(message.payload)
    for size in range(len(payload)):
        yield replace(message, payload=payload[:size])
    for other in (None, 5, (), ((), {}, ()), ((), 5), (5, {}), "text", [[1]]):
        yield replace(message, payload=pickle.dumps(other), buffers=(), tensors=())
    for error in (ValueError, SystemExit, KeyboardInterrupt, RecursionError, MemoryError):
        yield replace(message, payload=pickle.dumps(RaisesWhenUnpickled(error)), buffers=(), tensors=())
    yield replace(message, payload=b"(" * 10_000 + b".")
    yield replace(message, payload=b"]" * 100_000 + b"a" * 99_999 + b".")
    if message.buffers:
        yield replace(message, buffers=())
    if message.tensors:
        yield replace(message, tensors=())


class RaisesWhenUnpickled:
    def __init__(self, error: type[BaseException]) -> None:
        self._error = error

    def __reduce__(self) -> tuple[object, ...]:
        return raise_it, (self._error,)


def raise_it(error: type[BaseException]) -> None:
    raise error("while unpickling")


@pytest.mark.parametrize("kind", CALLS, ids=lambda kind: kind.name)
def test_who_sent_a_bad_pickle_is_told(alice: LoneWorker, kind: MessageType) -> None:
    message = REQUESTS[kind]
    refused = alice.refused()
    number_of_pickles = 0
    for bad in bad_pickles(message):
        number_of_pickles += 1
        number = alice.draw()
        alice.deliver(encode(bad, number))
        failure = parse(alice.answer_to(number))
        assert isinstance(failure, Failure), (bad, failure)
        assert failure.code == UnreadableCallError.code, (bad, failure)
    release_context(alice)
    assert alice.refused() == refused + number_of_pickles


def release_context(alice: LoneWorker) -> None:
    """A call that is part of an autograd context leaves that behind, until its opener releases it."""
    number = alice.draw()
    alice.deliver(encode(REQUESTS[MessageType.CLEANUP_AUTOGRAD_CONTEXT_REQ], number))
    assert alice.answer_to(number).type is MessageType.CLEANUP_AUTOGRAD_CONTEXT_RESP


@pytest.mark.parametrize("kind", REMOTE_CALLS, ids=lambda kind: kind.name)
def test_a_bad_pickle_in_a_remote_call_is_the_error_of_its_rref(alice: LoneWorker, kind: MessageType) -> None:
    message = REQUESTS[kind]
    rref_id, fork_id = parse(message).rref_id, parse(message).fork_id
    for number, bad in enumerate(bad_pickles(message)):
        # Another RRef each time: a deleted one is remembered.
        rref_id, fork_id = RRefId(BOB.worker_id, 1000 + 2 * number), ForkId(BOB.worker_id, 1001 + 2 * number)
        call = replace(bad, fields=(*bad.fields[:-4], *rref_id, *fork_id))
        failure = None
        for asked in (call, RRefFetch(rref_id).to_message(), RRefUserDelete(rref_id, fork_id).to_message()):
            number = alice.draw()
            alice.deliver(encode(asked, number))
            answer = parse(alice.answer_to(number))
            failure = answer if asked.type is MessageType.PYTHON_RREF_FETCH_CALL else failure
        assert isinstance(failure, Failure), (bad, failure)


# Tensors are built before the pickle is read, and whoever waits for what a call was to make learns that they could not be.


def without_its_tensors(message: Message, number: int) -> list[bytes]:
    """The frames of ``message``, whose tensors' descriptions are missing."""
    header, *body = encode(message, number)
    content = list(msgpack.unpackb(header))
    content[-1] = []
    return [msgpack.packb(content), *body]


# Calls that bring tensors, by the remote call that differs from them in its RRef.
WITH_TENSORS = {
    MessageType.PYTHON_REMOTE_CALL: MessageType.PYTHON_CALL,
    MessageType.SCRIPT_REMOTE_CALL: MessageType.SCRIPT_CALL,
}


def in_context(call: Message) -> Message:
    return ForwardAutograd(AutogradMetadata(CONTEXT, 7), call).to_message()


def profiled(call: Message) -> Message:
    return RunWithProfiling(0, call).to_message()


WRAPS: tuple[Callable[[Message], Message], ...] = (
    lambda call: call,
    in_context,
    profiled,
    lambda call: profiled(in_context(call)),
)


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("kind", REMOTE_CALLS, ids=lambda kind: kind.name)
def test_tensors_of_a_remote_call_that_cannot_be_built_are_the_error_of_its_rref(
    alice: LoneWorker, kind: MessageType, wrap: Callable[[Message], Message]
) -> None:
    refused = alice.refused()
    rref_id, fork_id = RRefId(BOB.worker_id, 5000 + alice.draw()), ForkId(BOB.worker_id, 5001)
    body = REQUESTS[WITH_TENSORS[kind]]
    call = replace(body, type=kind, fields=(*body.fields, *rref_id, *fork_id))
    fetches = [alice.draw() for _ in range(2)]
    # One fetch waits for the call, and one comes behind it.
    alice.deliver(encode(RRefFetch(rref_id).to_message(), fetches[0]))
    assert_good_call_is_answered(alice)
    number = alice.draw()
    alice.deliver(without_its_tensors(wrap(call), number))
    alice.deliver(encode(RRefFetch(rref_id).to_message(), fetches[1]))
    answers = [parse(Codec.message(alice.sent())) for _ in range(3)]
    for answer in answers:
        assert isinstance(answer, Failure)
        assert answer.code == UnreadableCallError.code, answer
        assert "bytes arrived that belong to no tensor" in answer.text
    assert alice.refused() == refused + 1
    delete_rref(alice, call)


@pytest.mark.parametrize("wrap", WRAPS)
def test_tensors_of_a_call_that_cannot_be_built_make_it_an_unreadable_one(
    alice: LoneWorker, wrap: Callable[[Message], Message]
) -> None:
    number = alice.draw()
    alice.deliver(without_its_tensors(wrap(REQUESTS[MessageType.PYTHON_CALL]), number))
    failure = parse(alice.answer_to(number))
    assert isinstance(failure, Failure)
    assert failure.code == UnreadableCallError.code


def test_gradients_that_cannot_be_built_are_no_call(alice: LoneWorker) -> None:
    number = alice.draw()
    alice.deliver(without_its_tensors(REQUESTS[MessageType.BACKWARD_AUTOGRAD_REQ], number))
    failure = parse(alice.answer_to(number))
    assert isinstance(failure, Failure)
    assert failure.code == ProtocolError.code
    assert "bytes arrived that belong to no tensor" in failure.text


# Answers. Alice has asked, and Bob answers.


def ask(alice: LoneWorker, request: Message) -> tuple[SimpleQueue[Reply], int]:
    """Alice sends ``request``; where the reply will come, and the call's number."""
    replies: SimpleQueue[Reply] = SimpleQueue()
    alice.agent.request(BOB.worker_id, request, replies.put, timeout=0.0)
    return replies, alice.sent().call_id


@pytest.mark.parametrize("kind", ANSWERS, ids=lambda kind: kind.name)
def test_a_damaged_answer_ends_its_call_if_it_can_be_seen_which_that_is(alice: LoneWorker, kind: MessageType) -> None:
    request, answer = ANSWERS[kind]
    refused = alice.refused()
    damages = all_damages(answer, partial(encode, number=0))
    for damage in damages:
        replies, number = ask(alice, request)
        frames = damage.apply(answer, partial(encode, number=number))
        alice.deliver(frames)
        if not (frames and frames[0].startswith(label_of(encode(answer, number)))):
            alice.deliver(encode(answer, number))
            assert not isinstance(replies.get(timeout=DEADLINE_S), RpcError), damage
            continue
        reply = replies.get(timeout=DEADLINE_S)
        assert type(reply) is ProtocolError, (damage, reply)
        # What comes too late changes nothing.
        alice.deliver(encode(answer, number))
    assert_good_call_is_answered(alice)
    assert alice.refused() == refused + len(damages)


@pytest.mark.parametrize("asked", [kind for kind in REQUESTS if kind is not GOODBYE], ids=lambda kind: kind.name)
def test_an_answer_of_another_type_than_the_request_s_ends_the_call(alice: LoneWorker, asked: MessageType) -> None:
    right = types.ANSWERS[asked] | {MessageType.EXCEPTION}
    for kind in [kind for kind in ANSWERS if kind not in right]:
        replies, number = ask(alice, REQUESTS[asked])
        alice.deliver(encode(ANSWERS[kind][1], number))
        reply = replies.get(timeout=DEADLINE_S)
        assert type(reply) is ProtocolError
        assert f"a {asked.name} was answered by a {kind.name}, which is no answer to it" in str(reply)


@pytest.mark.parametrize("kind", [kind for kind in MessageType if is_reserved(kind)], ids=lambda kind: kind.name)
def test_a_type_that_is_reserved_is_refused(alice: LoneWorker, kind: MessageType) -> None:
    if kind.is_response:
        replies, number = ask(alice, GOOD_CALL)
        alice.deliver(encode(Message(kind), number))
        assert type(replies.get(timeout=DEADLINE_S)) is ProtocolError
        return
    number = alice.draw()
    alice.deliver(encode(Message(kind), number))
    failure = parse(alice.answer_to(number))
    assert isinstance(failure, Failure)
    assert f"no command is defined for messages of type {kind.name}" in failure.text


def finish(alice: LoneWorker, replies: SimpleQueue[Reply], request: Message, number: int) -> None:
    """Alice's call is answered as it should be."""
    (right, *_) = [ANSWERS[kind][1] for kind in types.ANSWERS[request.type] & set(ANSWERS)]
    alice.deliver(encode(right, number))
    assert not isinstance(replies.get(timeout=DEADLINE_S), RpcError)


@pytest.mark.parametrize("number_of_type", [0x1FE, 0x2FE, 0x3FE, 0x0FE, 1 << 40])
def test_a_type_that_is_unknown_is_a_request_or_an_answer_by_its_bits(alice: LoneWorker, number_of_type: int) -> None:
    replies, number = ask(alice, GOOD_CALL)
    header, *body = encode(Message(MessageType.RREF_ACK), number)
    content = list(msgpack.unpackb(header))
    content[6] = number_of_type
    alice.deliver([msgpack.packb(content), *body])
    if number_of_type == 0x2FE:
        reply = replies.get(timeout=DEADLINE_S)
        assert type(reply) is ProtocolError
        assert "message type 766 from worker 1 is unknown to protocol version 1" in str(reply)
        return
    if number_of_type in (0x1FE, 0x3FE):
        failure = parse(alice.answer_to(number))
        assert isinstance(failure, Failure)
        assert f"message type {number_of_type} from worker 1 is unknown to protocol version 1" in failure.text
    finish(alice, replies, GOOD_CALL, number)


def test_an_answer_that_nobody_waits_for_any_more_changes_nothing(alice: LoneWorker) -> None:
    late = int(alice.agent.get_metrics()["agent.late_replies"])
    replies, number = ask(alice, GOOD_CALL)
    answer = ANSWERS[MessageType.PYTHON_RET][1]
    alice.deliver(encode(answer, number + 1000))
    for _ in range(3):
        alice.deliver(encode(answer, number))
    assert isinstance(replies.get(timeout=DEADLINE_S), Return)
    assert_good_call_is_answered(alice)
    assert replies.empty()
    assert int(alice.agent.get_metrics()["agent.late_replies"]) == late + 3


def test_an_answer_of_another_worker_or_another_life_changes_nothing(alice: LoneWorker) -> None:
    replies, number = ask(alice, GOOD_CALL)
    answer = ANSWERS[MessageType.PYTHON_RET][1]
    for who, life, whose in ((ALICE.worker_id, ALICE.incarnation, 10), (7, 20, 10), (1, 21, 10), (1, 20, 11)):
        alice.deliver(Codec(types.WorkerId(who), life).encode(answer, number, whose))
    assert_good_call_is_answered(alice)
    assert replies.empty()
    finish(alice, replies, GOOD_CALL, number)


def test_a_bad_pickle_in_an_answer_is_what_the_future_raises(alice: LoneWorker) -> None:
    request, answer = ANSWERS[MessageType.PYTHON_RET]
    cut = range(len(answer.payload))
    for bad in [replace(answer, payload=bytes(answer.payload)[:size]) for size in cut]:
        replies, number = ask(alice, request)
        alice.deliver(encode(bad, number))
        future = new_future()
        complete(future, replies.get(timeout=DEADLINE_S))
        with pytest.raises(CalleeError, match="cannot unpickle what was sent"):
            future.wait()


def call_bob(alice: LoneWorker) -> tuple[Future[Any], int]:
    """Alice calls Bob as her user would."""
    body = pickler.dumps(PythonUDF(str.upper, ("text",), {}))
    future = alice.worker._invoker.rpc_python_udf(WorkerInfo("bob", BOB.worker_id), body.payload, body.tensors, 0.0, False)
    return future, alice.sent().call_id


@pytest.mark.parametrize(
    ("context_id", "inner_type", "inner_fields", "text"),
    [
        (CONTEXT, MessageType.PYTHON_RET, ((),), f"of autograd context [0-9]+ names context {CONTEXT} as its own"),
        (None, MessageType.PYTHON_RET, ((), 1), r"a PYTHON_RET message carries the fields \(tuple\)"),
        (None, MessageType.SCRIPT_RET, (), "no command is defined for messages of type SCRIPT_RET"),
        (None, MessageType.RREF_ACK, (), "a RREF_ACK message carries no tensors"),
        (None, MessageType.PYTHON_CALL, (False,), "a call was answered by a PythonCall, which is no result"),
    ],
)
def test_a_wrapped_answer_that_is_none_is_what_the_future_raises(
    alice: LoneWorker, context_id: int | None, inner_type: MessageType, inner_fields: tuple[Any, ...], text: str
) -> None:
    contexts = alice.worker._contexts
    lease = contexts.new_context()
    future, number = call_bob(alice)
    _, answer = ANSWERS[MessageType.FORWARD_AUTOGRAD_RESP]
    fields = (lease._context_id() if context_id is None else context_id, 8, int(inner_type), inner_fields)
    alice.deliver(encode(replace(answer, fields=fields), number))
    with pytest.raises(ProtocolError, match=text):
        future.wait()
    contexts.release_context(lease._context_id())
    cleanup = alice.sent()
    assert cleanup.type is MessageType.CLEANUP_AUTOGRAD_CONTEXT_REQ
    alice.deliver(encode(ANSWERS[MessageType.CLEANUP_AUTOGRAD_CONTEXT_RESP][1], cleanup.call_id))


def test_the_answer_to_a_remote_call_names_its_own_rref(alice: LoneWorker) -> None:
    body = pickler.dumps(PythonUDF(str.upper, ("text",), {}))
    bob = WorkerInfo("bob", BOB.worker_id)
    rref = alice.worker._invoker.remote_python_udf(bob, body.payload, body.tensors, 0.0, False)
    _, answer = ANSWERS[MessageType.REMOTE_RET]
    alice.deliver(encode(answer, alice.sent().call_id))
    with pytest.raises(ProtocolError, match="a remote call was answered by a RemoteReturn, and not for its own RRef"):
        rref._get_future().wait()
    del rref
    # It is unknown whether Bob holds the RRef.
    delete = alice.sent()
    assert delete.type is MessageType.RREF_USER_DELETE
    alice.deliver(encode(ANSWERS[MessageType.RREF_ACK][1], delete.call_id))


# Garbled.


@pytest.mark.parametrize("kind", [*REQUESTS, *ANSWERS], ids=lambda kind: kind.name)
def test_flipped_bits_are_refused_unless_they_make_another_header(alice: LoneWorker, kind: MessageType) -> None:
    print(f"seed {SEED}")
    rng = random.Random(f"{SEED} {kind.name}")
    request, message = ANSWERS[kind] if kind.is_response else (GOOD_CALL, REQUESTS[kind])
    refused = alice.refused()
    expected = 0
    while expected < 100:
        replies, number = ask(alice, request)
        good = encode(message, number if kind.is_response else alice.draw())
        frames = flip_bits(good, rng, 0)
        if is_unreadable(frames):
            expected += 1
            alice.deliver(frames)
            label = read_label(frames)
            if label is not None and is_heard(label):
                if label.is_request:
                    assert isinstance(parse(alice.answer_to(label.call_id)), Failure)
                if label.is_response and label.call_id == number:
                    assert type(replies.get(timeout=DEADLINE_S)) is ProtocolError
                    continue
        finish(alice, replies, request, number)
    assert_good_call_is_answered(alice)
    assert alice.refused() == refused + expected


def is_heard(label: Label) -> bool:
    is_known = label[:2] == (BOB.worker_id, BOB.incarnation) or label.type in (MessageType.JOIN_REQ, MessageType.LEAVE_REQ)
    return is_known and label.destination_incarnation in (0, ALICE.incarnation)


def is_unreadable(frames: list[bytes]) -> bool:
    try:
        decode(frames)
    except ProtocolError:
        return True
    return False


def test_flipped_bits_in_a_pickle_end_in_an_answer(alice: LoneWorker) -> None:
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    message = REQUESTS[MessageType.PYTHON_CALL]
    for _ in range(500):
        number = alice.draw()
        frames = flip_bits(encode(message, number), rng, 1)
        # CPython's unpickler takes memory for as many entries as this opcode's argument says, up to 64 GB.
        if frames[1].count(pickle.LONG_BINPUT) > bytes(message.payload).count(pickle.LONG_BINPUT):
            continue
        alice.deliver(frames)
        answer = parse(alice.answer_to(number))
        assert isinstance(answer, (Return, Failure))
