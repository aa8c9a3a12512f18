# SPDX-License-Identifier: Apache-2.0
"""Streams to clients that are slow, that leave, or that never take anything."""

import asyncio

import pytest
from served import FakeService

from ospec_jax.data.prompts import Prompt
from ospec_jax.serving.asks import Ask, Ended, Failed, OverloadedError, Piece
from ospec_jax.serving.relay import Gone, Relay
from ospec_jax.serving.streams import EventStream


def run_stream(send, count=3, send_seconds=0.05):
    """Streams to somebody; says what became of it."""
    log = []

    async def lines():
        try:
            for i in range(count):
                yield b"%d" % i
        finally:
            log.append("closed")

    stream = EventStream(lines(), lambda: log.append("end"), send_seconds)
    asyncio.run(stream({"type": "http"}, None, send))
    return log


def test_a_stream_is_sent_to_its_end():
    sent = []

    async def send(message):
        sent.append(message)

    assert run_stream(send) == ["closed", "end"]
    start, *bodies = sent
    names = {name for name, _ in start["headers"]}
    assert b"content-length" not in names
    assert (b"content-type", b"text/event-stream; charset=utf-8") in start["headers"]
    assert [body["body"] for body in bodies] == [b"0", b"1", b"2", b""]
    assert [body["more_body"] for body in bodies] == [True] * 3 + [False]


@pytest.mark.parametrize("is_broken", [False, True])
def test_who_takes_nothing_is_left_with_half_of_it(is_broken):
    sent = []

    async def send(message):
        sent.append(message)
        if message.get("body") == b"1":
            if is_broken:
                raise OSError("broken pipe")
            await asyncio.sleep(10)

    assert run_stream(send) == ["closed", "end"]
    # Without its last part no client takes it for a whole one.
    assert all(message.get("more_body", True) for message in sent)
    assert len(sent) == 3


def ask(text, num_choices=1):
    return Ask(Prompt("1", text, ()), num_choices=num_choices)


def test_answers_to_several_prompts_are_numbered_through():
    service = FakeService()
    service.answer = lambda ask, choice: ask.prompt.text

    async def run():
        relay = Relay()
        prepared = [service.prepare(ask("ab", 2)), service.prepare(ask("c"))]
        relay.submit(service, prepared)
        events = []
        while not events or not isinstance(events[-1], Ended):
            events += await relay.receive(5)
        relay.close()
        return events

    events = asyncio.run(run())
    texts = {e.choice: e.text for e in events if isinstance(e, Piece)}
    assert texts == {0: "ab", 1: "ab", 2: "c"}
    assert [isinstance(e, Ended) for e in events].count(True) == 1
    assert events[-1].usage.completion == 5
    assert not any(ticket.is_cancelled.is_set() for ticket in service.tickets)


def test_of_several_prompts_all_are_taken_or_none():
    service = FakeService()
    service.may_go.clear()
    submit = service.submit

    def submit_one(prepared, on_event):
        if service.tickets:
            raise OverloadedError("full")
        return submit(prepared, on_event)

    service.submit = submit_one

    async def run():
        with pytest.raises(OverloadedError):
            Relay().submit(service, [service.prepare(ask(x)) for x in "ab"])

    asyncio.run(run())
    assert [ticket.is_cancelled.is_set() for ticket in service.tickets] == [True]


def test_who_leaves_gives_up_and_hears_no_more():
    service = FakeService()
    service.may_go.clear()

    async def run():
        relay = Relay()
        relay.submit(service, [service.prepare(ask("a"))])
        assert await relay.receive(0.01) == []
        relay.leave()
        events = await relay.receive(5)
        relay.close()
        return events

    assert asyncio.run(run()) == [Gone()]
    assert service.tickets[0].is_cancelled.is_set()


def test_one_prompt_s_failure_is_that_of_all():
    service = FakeService()
    service.answer = "a long answer of many passes"
    service.failure = RuntimeError()

    async def run():
        relay = Relay()
        relay.submit(service, [service.prepare(ask(x)) for x in "ab"])
        events = []
        while not events or not isinstance(events[-1], Failed):
            events += await relay.receive(5)
        relay.close()

    asyncio.run(run())
    assert all(ticket.is_cancelled.is_set() for ticket in service.tickets)


def test_events_after_the_loop_s_end_go_nowhere():
    service = FakeService()
    service.may_go.clear()
    heard = []
    submit = service.submit

    def submit_and_keep(prepared, on_event):
        heard.append(on_event)
        return submit(prepared, on_event)

    service.submit = submit_and_keep

    async def run():
        Relay().submit(service, [service.prepare(ask("a"))])

    asyncio.run(run())
    heard[0](Failed(RuntimeError()))
