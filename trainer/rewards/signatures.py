"""Functions of other signatures as verifiers: TRL's reward functions, and what cannot be one.

A reward function of TRL is `reward_func(prompts, completions, **columns) -> list[float | None]`. It gets a batch of one
here: completions are judged one by one, so that one that hangs costs its own. Of a chat the prompt is its messages and
the completion a list with the assistant's message, as TRL has it. The columns are the fields of the problem's line.
"""

import inspect
from collections.abc import Callable
from typing import Any

from trainer.rewards.base import Case, Verifier, VerifierError

COMPLETIONS = "completions"


def as_verifier(function: Callable[..., Any], name: str) -> Verifier:
    """The verifier that a callable is, or a verifier that calls a reward function of TRL's.

    Args:
        function: what was found under the name.
        name: for messages.

    Raises:
        VerifierError: it takes neither a case nor prompts and completions.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of some builtins: calling them tells
        return function
    if COMPLETIONS in signature.parameters:
        return _of_trl(function, signature)
    try:
        signature.bind(None)
    except TypeError as error:
        raise VerifierError(
            f"verifier {name} has the signature {signature}: it must take one argument, the case "
            "(case.completion, case.problem, case.answer), or prompts and completions as in TRL"
        ) from error
    return function


def _of_trl(function: Callable[..., Any], signature: inspect.Signature) -> Verifier:
    takes_all = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in signature.parameters.values())

    def arguments(case: Case) -> dict[str, list[Any]]:
        columns = {} if case.problem is None else {**case.problem.data, "answer": case.problem.answer}
        chat = case.messages is not None
        own = {
            "prompts": list(case.messages or ()) if chat else case.prompt,
            COMPLETIONS: [{"role": "assistant", "content": case.completion}] if chat else case.completion,
        }
        return {key: [value] for key, value in (columns | own).items() if takes_all or key in signature.parameters}

    if inspect.iscoroutinefunction(function):

        async def awaited(case: Case) -> Any:
            return _only(await function(**arguments(case)))

        return awaited
    return lambda case: _only(function(**arguments(case)))


def _only(rewards: Any) -> Any:
    """The reward of a batch of one."""
    (reward,) = rewards
    return reward
