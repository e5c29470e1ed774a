"""Puts the choices of a streamed chat completion together, as a whole response would have had them."""

from typing import Any, TypeAlias

# Fields of a delta whose pieces are concatenated; of all others the last piece counts.
CONCATENATED = ("content", "reasoning", "reasoning_content", "refusal")
# vLLM's chunks as JSON's data: other versions of vLLM have other fields, and all are passed on.
Chunk: TypeAlias = dict[str, Any]


class MessageBuilder:
    """Collects the chunks of one stream."""

    def __init__(self) -> None:
        self._choices: dict[int, Chunk] = {}

    def take(self, chunk: Chunk) -> None:
        """Adds a chunk of the stream."""
        for piece in chunk.get("choices", ()):
            choice = self._choices.setdefault(
                piece["index"],
                {"index": piece["index"], "message": {"role": "assistant", "content": None}, "logprobs": None},
            )
            for name, value in piece.items():
                if name == "delta":
                    _add_delta(choice["message"], value)
                elif name == "logprobs":
                    _add_logprobs(choice, value)
                elif name not in ("index", "prompt_token_ids", "token_ids"):
                    choice[name] = value

    def pop(self, index: int) -> Chunk:
        """The whole choice with this index, which has ended; it is not kept here any longer."""
        choice = self._choices.pop(index)
        if "tool_calls" in (message := choice["message"]):
            message["tool_calls"] = [message["tool_calls"][i] for i in sorted(message["tool_calls"])]
        return choice


def _add_delta(message: Chunk, delta: Chunk) -> None:
    for name, value in delta.items():
        if name == "tool_calls":
            for call in value or ():
                _add_tool_call(message.setdefault("tool_calls", {}).setdefault(call["index"], {}), call)
        elif name in CONCATENATED:
            if value is not None:
                message[name] = (message.get(name) or "") + value
        else:
            message[name] = value


def _add_tool_call(whole: Chunk, piece: Chunk) -> None:
    for name, value in piece.items():
        if name == "function":
            function = whole.setdefault("function", {"arguments": ""})
            function["arguments"] += value.get("arguments") or ""
            if value.get("name"):
                function["name"] = value["name"]
        elif name != "index" and value is not None:
            whole[name] = value


def _add_logprobs(choice: Chunk, logprobs: Chunk | None) -> None:
    if logprobs and logprobs.get("content"):
        choice["logprobs"] = choice["logprobs"] or {"content": []}
        choice["logprobs"]["content"].extend(logprobs["content"])
