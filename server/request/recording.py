"""Records requests with `store: true`: their choices become rollouts, committed before the client sees a choice's end.

A `Recording` accompanies one request. The engine proxy shows it the sampled tokens (`watch`). The module `responses`
hands it what the client is about to get, and waits until that is committed (`save`).
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from qsharp_core.errors import GuidanceError
from qsharp_core.rollouts.records import Rollout, Route, first_valid_position, new_id
from qsharp_core.rollouts.text import DEEPEST, is_deeper
from qsharp_core.vllm_plugin.params import GuidanceParams
from qsharp_core.wire.guidance import BUDGETS
from qsharp_core.wire.metadata import CUT, FORCED, PARENT
from qsharp_core.wire.reports import ChoiceGuidance, SearchReport
from server import metrics
from server.access.principal import UNNAMED, Principal
from server.request.draft import Draft, joined_text, sampling_of
from server.request.schema import GuidedRequest
from server.request.search.fields import Search
from server.store.rollouts import RolloutStore

logger = logging.getLogger("vllm.qsharp")

# What OpenAI shows of the request in a stored chat completion.
SHOWN_REQUEST = ("tools", "tool_choice", "response_format", "presence_penalty", "frequency_penalty", "service_tier")


@dataclass(eq=False)
class Recording:
    """One request whose choices are stored.

    Attributes:
        guidance: what the request is guided by; None if it is not guided.
        body: the request as the client sent it.
        metadata: what the client wants to be kept with the rollouts.
        owner: whom the rollouts belong to.
        model: the name of their model; None if it is the response's.
        search: how the choices are searched for; None if each is a sample of its own.
        parent, cut: the stored rollout that the request continues, and after how many tokens; None for most requests.
        beginning: these `cut` tokens. The last of them differs from the parent's where the request forces another one.
        created: when the request came, in seconds since the epoch.
        drafts: the choices that have not ended, by their index in the response.
    """

    store: RolloutStore
    tokenizer: Any
    route: Route
    guidance: GuidanceParams | None
    body: Mapping[str, Any]
    metadata: Mapping[str, str]
    owner: str = UNNAMED
    model: str | None = None
    search: Search | None = None
    parent: Rollout | None = None
    cut: int | None = None
    beginning: Sequence[int] = ()
    created: float = field(default_factory=time.time)
    drafts: dict[int, Draft] = field(default_factory=dict)

    def check_prompt(self, prompt: Mapping[str, Any]) -> None:
        """Refuses a prompt that has no token ids, or one that does not end where the parent was cut.

        Raises:
            GuidanceError: names the field.
        """
        if prompt.get("type") != "token":
            raise GuidanceError("store must be false with prompts that are not text or token ids", "store")
        if self.parent is None:
            return
        wanted = [*self.parent.prompt_token_ids, *self.beginning]
        if list(prompt["prompt_token_ids"]) != wanted:
            raise _inconsistent(
                f"prompt must be the prompt of {self.parent.id} and the first {self.cut} tokens of its completion"
                + (f", the last of them as {FORCED} says" if FORCED in self.metadata else "")
            )

    async def watch(
        self, first: int, prompt: Mapping[str, Any], params: Any, outputs: AsyncGenerator[Any, None]
    ) -> AsyncGenerator[Any, None]:
        """Passes an engine request's outputs on, and notes what they sampled.

        Args:
            first: index in the response of the engine request's first choice.
            prompt: the engine request's prompt.
            params: its `SamplingParams`.
            outputs: what the engine yields.
        """
        async with aclosing(outputs):
            async for output in outputs:
                for choice in output.outputs:
                    index = first + choice.index
                    if index not in self.drafts:
                        seed = None if params.seed is None else params.seed + choice.index
                        text = output.prompt if output.prompt is not None else prompt.get("prompt")
                        if self.body.get("truncate_prompt_tokens") is not None:
                            text = None  # the client's whole text, of which the model has read only a part
                        self.drafts[index] = Draft(prompt["prompt_token_ids"], text, params, seed)
                    draft = self.drafts[index]
                    draft.token_ids.extend(choice.token_ids)
                    draft.text += choice.text
                    draft.finish_reason, draft.stop_reason = choice.finish_reason, choice.stop_reason
                yield output

    async def save(
        self,
        choices: Mapping[int, Mapping[str, Any] | None],
        results: Mapping[int, ChoiceGuidance],
        response: Mapping[str, Any],
    ) -> dict[int, str]:
        """Stores choices that have ended, and returns the ids of their rollouts, by index, when they are committed.

        Args:
            choices: by index, as the client gets them; None for a completion, whose form is not kept.
            results: what was done for the choices, by index.
            response: the response's `id` and `model`, and for a chat its other fields.

        Raises:
            StoreError: nothing was stored.
        """
        rollouts = [self._rollout(index, choice, results[index], response) for index, choice in choices.items()]
        started = time.perf_counter()
        try:
            await self.store.add(rollouts)
        except Exception:
            metrics.ROLLOUT_FAILURES.inc()
            logger.exception("rollouts of %s could not be stored", response["id"])
            raise
        with metrics.after_the_fact():
            metrics.ROLLOUT_WRITE.observe(time.perf_counter() - started)
            metrics.ROLLOUTS_STORED.inc(len(rollouts))
        return {rollout.choice: rollout.id for rollout in rollouts}

    def _rollout(
        self, index: int, choice: Mapping[str, Any] | None, result: ChoiceGuidance, response: Mapping[str, Any]
    ) -> Rollout:
        draft = self.drafts.pop(index)
        prompt, text = draft.prompt_token_ids, draft.prompt_text
        if text is None and self.tokenizer is not None:
            text = self.tokenizer.decode(prompt)
        tokens, completion, messages = draft.token_ids, draft.text, self.body.get("messages")
        if self.parent is not None:
            assert self.cut is not None
            prompt, text, messages = self.parent.prompt_token_ids, self.parent.prompt_text, self.parent.messages
            tokens = [*self.beginning, *tokens]
            completion = joined_text(self.tokenizer, prompt, tokens, self.cut, draft)
        if result.search is not None:
            draft.seed = _seed_of(draft, result.search)
        guidance = self.guidance
        return Rollout(
            id=new_id(),
            owner=self.owner,
            request_id=response["id"],
            choice=index,
            route=self.route,
            created=self.created,
            model=self.model or response["model"],
            prompt_token_ids=prompt,
            completion_token_ids=tokens,
            prompt_text=text,
            completion_text=completion,
            messages=messages,
            response=self._response(choice, response) if self.route == "chat" and choice is not None else None,
            sampling=sampling_of(draft),
            eta=guidance.eta if guidance else None,
            method=guidance.method if guidance else None,
            critic=guidance.critic if guidance else None,
            guidance=_options(guidance, self.search) if guidance else None,
            first_valid_position=first_valid_position(
                guided=guidance is not None, length=len(tokens), cut=self.cut, finish_reason=draft.finish_reason
            ),
            parent_id=self.parent.id if self.parent else None,
            cut=self.cut,
            kl=result.kl,
            value=result.value,
            finish_reason=draft.finish_reason,
            metadata=self.metadata,
        )

    def _response(self, choice: Mapping[str, Any], response: Mapping[str, Any]) -> Mapping[str, Any]:
        fields = {name: response[name] for name in ("created", "system_fingerprint") if response.get(name) is not None}
        request = {name: self.body[name] for name in SHOWN_REQUEST if self.body.get(name) is not None}
        return {"choice": choice, "request": request, **fields}


async def begin(
    request: GuidedRequest,
    body: Mapping[str, Any],
    store: RolloutStore,
    tokenizer: Any,
    guidance: GuidanceParams | None,
    sender: Principal,
) -> Recording:
    """Starts the recording of a request that has `store: true`.

    Args:
        request: the request, which was admitted.
        body: the request as the client sent it.
        store: where its rollouts go.
        tokenizer: the model's; None where it has none.
        guidance: what the request is guided by; None if it is not guided.
        sender: who sent it, and owns its rollouts.

    Raises:
        GuidanceError: its metadata name a parent that it cannot continue, or a field is too deep to be stored.
    """
    for name, value in body.items():
        if is_deeper(value, DEEPEST):
            raise GuidanceError(f"{name} must be nested at most {DEEPEST} deep with store", name)
    metadata = request.metadata or {}
    route: Route = "chat" if "messages" in body else "completion"
    recording = Recording(store, tokenizer, route, guidance, body, metadata, sender.name)
    if not {PARENT, CUT, FORCED} & metadata.keys():
        return recording
    if PARENT not in metadata or CUT not in metadata:
        raise _inconsistent(f"{PARENT} and {CUT} must be given together, with {FORCED} or without")
    if guidance is not None:
        raise _inconsistent(f"{PARENT} needs an unguided request: send eta: null")
    if recording.route != "completion" or not _is_token_ids(body.get("prompt")):
        raise _inconsistent(f"{PARENT} needs a completion request with a prompt of token ids")
    parent = await asyncio.to_thread(store.get, metadata[PARENT], owner=sender.sees)
    if parent is None:
        raise _inconsistent(f"{PARENT} must be the id of a stored rollout; got {metadata[PARENT]!r:.100}")
    length = len(parent.completion_token_ids)
    cut = _number(metadata[CUT])
    if cut is None or not 1 <= cut <= length:
        raise _inconsistent(
            f"{CUT} must be a whole number from 1 to {length}, its completion's length; got {metadata[CUT]!r:.50}"
        )
    beginning = list(parent.completion_token_ids[:cut])
    if FORCED in metadata:
        forced = _number(metadata[FORCED])
        if forced is None:
            raise _inconsistent(f"{FORCED} must be a token id; got {metadata[FORCED]!r:.50}")
        beginning[-1] = forced
    recording.parent, recording.cut, recording.beginning = parent, cut, beginning
    return recording


def _seed_of(draft: Draft, search: SearchReport) -> int | None:
    """The seed that a choice was sampled with; None for particles, whose rounds have seeds of their own."""
    if draft.params.seed is None or search.kind == "stop":
        return draft.seed
    return None if search.sample is None else draft.params.seed + search.sample


def _options(guidance: GuidanceParams, search: Search | None) -> Mapping[str, Any]:
    """What a rollout keeps of its guidance beside what has a column of its own."""
    options: dict[str, Any] = {name: getattr(guidance, name) for name in ("candidates", "min_prob", "tail", *BUDGETS)}
    options["search"] = None if search is None else search.model_dump(exclude_none=True)
    return {name: value for name, value in options.items() if value is not None}


def _number(digits: str) -> int | None:
    return int(digits) if digits.isascii() and digits.isdigit() and len(digits) <= 10 else None


def _is_token_ids(prompt: Any) -> bool:
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], list):
        prompt = prompt[0]
    return isinstance(prompt, list) and bool(prompt) and all(type(token) is int for token in prompt)


def _inconsistent(message: str) -> GuidanceError:
    return GuidanceError(f"metadata: {message}", "metadata")
