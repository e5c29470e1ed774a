"""Whole chat messages out of the chunks of a stream."""

from typing import Any

# Fields whose pieces are added up; all others are what the last chunk says.
ADDED = ("content", "reasoning", "reasoning_content", "refusal")


class MessageBuilder:
    """The choices of one streamed chat completion, as they would stand in a whole response."""

    def __init__(self) -> None:
        self._choices: dict[int, dict[str, Any]] = {}

    def take(self, chunk: dict[str, Any]) -> None:
        """Adds a chunk."""
        for piece in chunk.get("choices", ()):
            choice = self._choices.setdefault(
                piece["index"],
                {"index": piece["index"], "message": {"role": "assistant", "content": None}, "logprobs": None},
            )
            for name, value in piece.items():
                if name == "delta":
                    _add(choice["message"], value)
                elif name == "logprobs":
                    _add_logprobs(choice, value)
                elif name not in ("index", "prompt_token_ids", "token_ids"):
                    choice[name] = value

    def choice(self, index: int) -> dict[str, Any]:
        """A choice that has ended; it is forgotten here."""
        choice = self._choices.pop(index)
        if "tool_calls" in (message := choice["message"]):
            message["tool_calls"] = [message["tool_calls"][i] for i in sorted(message["tool_calls"])]
        return choice


def _add(message: dict[str, Any], delta: dict[str, Any]) -> None:
    for name, value in delta.items():
        if name == "tool_calls":
            for call in value or ():
                _add_call(message.setdefault("tool_calls", {}).setdefault(call["index"], {}), call)
        elif name in ADDED:
            if value is not None:
                message[name] = (message.get(name) or "") + value
        else:
            message[name] = value


def _add_call(whole: dict[str, Any], piece: dict[str, Any]) -> None:
    for name, value in piece.items():
        if name == "function":
            function = whole.setdefault("function", {"arguments": ""})
            function["arguments"] += value.get("arguments") or ""
            if value.get("name"):
                function["name"] = value["name"]
        elif name != "index" and value is not None:
            whole[name] = value


def _add_logprobs(choice: dict[str, Any], logprobs: dict[str, Any] | None) -> None:
    if logprobs and logprobs.get("content"):
        choice["logprobs"] = choice["logprobs"] or {"content": []}
        choice["logprobs"]["content"].extend(logprobs["content"])
