"""Ends a choice whose value falls: for clients that then ask another model."""

from contextlib import aclosing

from vllm.outputs import RequestOutput

from server.request.sample import Outputs, Sample
from server.request.search.found import Decode

STOP_REASON = "value"


async def watched(sample: Sample, below: float, decode: Decode, *, whole: bool) -> Outputs:
    """The sample's outputs up to the first token before which the value is below a limit; that token is the last.

    What is yielded never has a token after it, although the engine may have sampled some: an output is passed on when
    the reports of its tokens are known. The sample is cut there, too.

    Args:
        sample: followed, with outputs of new tokens.
        below: the limit, in units of reward.
        decode: makes text of a choice's tokens.
        whole: whether the outputs are put together and yielded as one.
    """
    text, passed, seen = "", 0, 0
    held: RequestOutput | None = None
    end: int | None = None
    async with aclosing(sample.outputs()) as outputs:
        async for output in outputs:
            if held is None:
                held = output
            else:
                held.add(output, aggregate=True)
            fallen = (i for i in range(seen, len(sample.reports)) if sample.reports[i].value < below)
            end = next((i + 1 for i in fallen), None)
            seen = len(sample.reports)
            if end is not None:
                break
            if not whole:
                (choice,) = held.outputs
                text += choice.text
                passed += len(choice.token_ids)
                yielded, held = held, None
                yield yielded
    if held is None:
        return
    if end is not None:
        (choice,) = held.outputs
        ends_by_token = (
            end == len(sample.tokens) and choice.finish_reason == "stop" and not _by_string(choice.stop_reason)
        )
        sample.cut(end)
        choice.text = decode(sample.tokens, ends_by_token).text[len(text) :]
        choice.token_ids = list(choice.token_ids)[: end - passed]
        if choice.logprobs is not None:
            choice.logprobs = choice.logprobs[: end - passed]
        choice.finish_reason, choice.stop_reason = "stop", STOP_REASON
        held.finished = True
    yield held


def _by_string(stop_reason: int | str | None) -> bool:
    return isinstance(stop_reason, str)
