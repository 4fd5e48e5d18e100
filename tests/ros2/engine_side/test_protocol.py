"""The wire between node and worker: what is no message is a ProtocolError, in bounded memory."""

from __future__ import annotations

import random
import socket
import struct
import threading
import tracemalloc

import msgspec
import pytest
from edge_nodes.job import ChatTurn, Chosen, Ended, Figures, GrammarText, Job, Progress
from edge_nodes.protocol import (
    MAX_FRAME,
    Answer,
    Beat,
    Call,
    Cancel,
    Channel,
    ProtocolError,
    Submit,
    from_worker,
    to_worker,
)

JOB = Job(
    messages=(ChatTurn(role="user", content="grüße \x00 \ud7ff"),),
    stop=("\n",),
    deadline=1.5,
    grammar=GrammarText(kind="json", text="{}"),
)
DOWN = [Call(id=1, method="open", arguments=[{"path": "x"}]), Submit(number=7, job=JOB), Cancel(number=7)]
UP = [
    Answer(id=1, value=msgspec.Raw(b'{"a":[1]}')),
    Answer(id=2, error="BadRequest", why="no"),
    Beat(step_s=0.5, figures={"pages_used": 3, "finished": {"stop": 1}}),
    Progress(number=7, text="a", tokens=(1, 2), probs=(Chosen(token=1, top=((1, 0.5, "a"),)),)),
    Ended(number=7, reason="stop", figures=Figures(prompt_tokens=3)),
]


def receive(data: bytes, decoder: msgspec.json.Decoder[object]) -> object | None:
    """What a Channel makes of these bytes and the end of the stream."""
    ours, theirs = socket.socketpair()
    sender = threading.Thread(target=lambda: (ours.sendall(data), ours.close()))
    sender.start()
    channel = Channel(theirs, decoder)
    try:
        return channel.receive()
    finally:
        channel.close()
        sender.join()


def frame(message: object) -> bytes:
    data = msgspec.json.encode(message)
    return struct.pack(">I", len(data)) + data


@pytest.mark.parametrize("message", [*DOWN, *UP], ids=lambda m: type(m).__name__)
def test_messages_come_as_they_were_sent(message: msgspec.Struct) -> None:
    decoder = to_worker if message in DOWN else from_worker
    assert receive(frame(message), decoder) == message


def test_the_other_side_may_close_between_messages_only() -> None:
    whole = frame(UP[3])
    assert receive(b"", from_worker) is None
    for cut in range(1, len(whole)):
        with pytest.raises(ProtocolError, match="closed after"):
            receive(whole[:cut], from_worker)


def test_any_changed_byte_is_an_error_or_another_message() -> None:
    rng = random.Random(3)
    kinds = (Answer, Beat, Progress, Ended)
    refused = 0
    for _ in range(2000):
        data = bytearray(msgspec.json.encode(rng.choice(UP)))
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            found = receive(struct.pack(">I", len(data)) + bytes(data), from_worker)
        except ProtocolError:
            refused += 1
        else:
            assert isinstance(found, kinds)
    assert refused > 1000


@pytest.mark.parametrize("length", [0, MAX_FRAME + 1, 2**31, 2**32 - 1])
def test_a_length_out_of_bounds_takes_no_memory(length: int) -> None:
    tracemalloc.start()
    with pytest.raises(ProtocolError, match="a frame of"):
        receive(struct.pack(">I", length) + b"x" * 100, from_worker)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_a_message_beyond_a_frame_is_not_sent() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(ProtocolError, match="a frame holds"):
        Channel(ours, from_worker).send(Submit(number=1, job=Job(prompt="x" * (MAX_FRAME + 1))))


def test_messages_of_many_threads_do_not_mix() -> None:
    ours, theirs = socket.socketpair()
    sender, receiver = Channel(ours, from_worker), Channel(theirs, from_worker)
    texts = {f"{k}-" + "x" * (1000 * k) for k in range(20)}

    def send(text: str) -> None:
        sender.send(Progress(number=1, text=text, tokens=()))

    threads = [threading.Thread(target=send, args=(t,)) for t in texts]
    for thread in threads:
        thread.start()
    assert {receiver.receive().text for _ in texts} == texts  # type: ignore[union-attr]
    for thread in threads:
        thread.join()
    sender.close()
    receiver.close()
