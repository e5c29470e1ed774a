"""The receiver against the worker's own sender, over a real socket."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest
import torch
import zmq

from qsharp_core.errors import CriticFailure
from qsharp_core.vllm_plugin.telemetry import CandidateReport, Columns, Keys, Sender, Status, StepFacts, StepReport
from server.request.telemetry import TelemetryReceiver

Send = Callable[..., None]
Connect = Callable[[Sender, TelemetryReceiver], None]
PROMPT = 4


def with_its_keys(sender: Sender, receiver: TelemetryReceiver) -> None:
    sender.connect(receiver.address, receiver.keys)


def with_receiver(
    test: Callable[[TelemetryReceiver, Send], Awaitable[None]],
    host: str | None = None,
    connect: Connect = with_its_keys,
) -> list[StepReport]:
    seen: list[StepReport] = []

    async def run() -> None:
        receiver = TelemetryReceiver(seen.append, host)
        receiver.start()
        sender = Sender(torch.device("cpu"))
        connect(sender, receiver)

        def send(sample_id: int, i: int, token: int, kl: float = 0.5, status: Status = Status.GUIDED) -> None:
            columns = Columns(
                *torch.tensor([[token], [status], [kl], [-1.0], [-0.5], [0.25], [1.0]], dtype=torch.float64)
            )
            failures = {sample_id: "not_finite"} if status == Status.FAILED else {}
            sender.send(StepFacts(ids=[sample_id], positions=[PROMPT + i], failures=failures), columns)

        try:
            async with asyncio.timeout(20):
                await test(receiver, send)
        finally:
            await receiver.close()
            sender._context.destroy(linger=0)

    asyncio.run(run())
    return seen


@pytest.mark.parametrize("host", [None, "127.0.0.1", "::1"])
def test_waits_for_every_token(host: str | None) -> None:
    async def test(receiver: TelemetryReceiver, send: Send) -> None:
        sample = receiver.register()
        waiting = asyncio.create_task(sample.wait(PROMPT, [7, 8], 10))
        send(sample.id, 1, 8)
        await asyncio.sleep(0.1)
        assert not waiting.done()
        send(sample.id, 0, 7)
        records = await waiting
        assert [r.token for r in records] == [7, 8]
        assert records[0].status is Status.GUIDED
        assert (records[0].ref_logprob, records[0].logprob, records[0].value) == (-1.0, -0.5, 0.25)

    assert len(with_receiver(test, host)) == 2


def _without_keys(sender: Sender, receiver: TelemetryReceiver) -> None:
    sender.connect(receiver.address)


def _with_keys_of_its_own(sender: Sender, receiver: TelemetryReceiver) -> None:
    assert receiver.keys is not None
    public, secret = zmq.curve_keypair()
    sender.connect(receiver.address, Keys(receiver.keys.server, public.decode(), secret.decode()))


@pytest.mark.parametrize("connect", [_without_keys, _with_keys_of_its_own])
def test_who_does_not_have_the_keys_reports_nothing(connect: Connect) -> None:
    async def test(receiver: TelemetryReceiver, send: Send) -> None:
        sample = receiver.register()
        send(sample.id, 0, 7)
        with pytest.raises(CriticFailure):
            await sample.wait(PROMPT, [7], 1.0)

    assert with_receiver(test, "127.0.0.1", connect) == []


def test_a_record_of_another_token_is_stale_and_the_last_word_counts() -> None:
    async def test(receiver: TelemetryReceiver, send: Send) -> None:
        sample = receiver.register()
        send(sample.id, 0, 9, kl=3.0)
        waiting = asyncio.create_task(sample.wait(PROMPT, [7], 10))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        send(sample.id, 0, 7, kl=1.0)
        assert [r.kl for r in await waiting] == [1.0]
        send(sample.id, 0, 7, kl=2.0)
        send(sample.id, 1, 8)
        assert [r.kl for r in await sample.wait(PROMPT, [7, 8], 10)] == [2.0, 0.5]

    with_receiver(test)


def test_a_failure_ends_the_wait_at_once_and_is_told() -> None:
    async def test(receiver: TelemetryReceiver, send: Send) -> None:
        told = asyncio.Event()
        sample = receiver.register(told.set)
        waiting = asyncio.create_task(sample.wait(PROMPT, [7, 8], 10))
        send(sample.id, 0, 7, status=Status.FAILED)
        with pytest.raises(CriticFailure) as raised:
            await waiting
        assert raised.value.reason == "not_finite"
        assert told.is_set()

    with_receiver(test)


def test_a_failure_behind_the_choices_end_does_not_concern_it() -> None:
    async def test(receiver: TelemetryReceiver, send: Send) -> None:
        sample = receiver.register()
        send(sample.id, 1, 8, status=Status.FAILED)  # drawn ahead, then a stop string ended the choice
        send(sample.id, 0, 7)
        assert len(await sample.wait(PROMPT, [7], 10)) == 1

    with_receiver(test)


def test_missing_reports_time_out() -> None:
    async def test(receiver: TelemetryReceiver, send: Send) -> None:
        sample = receiver.register()
        send(sample.id, 0, 7)
        with pytest.raises(CriticFailure, match="token 2 of 2") as raised:
            await sample.wait(PROMPT, [7, 8], 0.2)
        assert raised.value.reason == "telemetry_timeout"

    with_receiver(test)


def test_candidates_come_with_the_row_that_they_are_of() -> None:
    async def run() -> None:
        receiver = TelemetryReceiver(lambda report: None)
        receiver.start()
        sender = Sender(torch.device("cpu"))
        sender.connect(receiver.address)
        with_them, without = receiver.register(), receiver.register()
        facts = StepFacts(ids=[without.id, with_them.id], positions=[PROMPT, PROMPT])
        columns = Columns(*torch.tensor([[7.0, 8.0], [1, 1], [0.5, 0.5], [-1, -1], [-1, -1], [0, 0], [1, 1]]))
        packed = CandidateReport.packed(
            torch.tensor([True, True, False]), torch.tensor([8, 70_000, 3]), torch.tensor([-0.1, -2.0, -9.0]),
            torch.tensor([[0.5, 1.5], [2.5, 3.5], [9.0, 9.0]], dtype=torch.float64),
        )  # fmt: skip
        sender.send(facts, columns, {1: packed})
        try:
            (report,) = await with_them.wait(PROMPT, [8], 10)
            assert report.candidates is not None
            assert report.candidates.token_ids == [8, 70_000]
            assert report.candidates.ref_logprobs == pytest.approx([-0.1, -2.0])
            assert report.candidates.outputs == [[0.5, 1.5], [2.5, 3.5]]
            (report,) = await without.wait(PROMPT, [7], 10)
            assert report.candidates is None
        finally:
            await receiver.close()
            sender._context.destroy(linger=0)

    asyncio.run(run())


def test_only_registered_samples_are_kept() -> None:
    async def test(receiver: TelemetryReceiver, send: Send) -> None:
        sample = receiver.register()
        send(sample.id + 1, 0, 7)
        sample.close()
        send(sample.id, 0, 7)
        await asyncio.sleep(0.2)
        assert not receiver.samples

    assert len(with_receiver(test)) == 2
