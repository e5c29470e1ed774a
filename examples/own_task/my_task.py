"""What a good answer is in this task: one sentence that has the word and fewer than twelve words."""

import re

SENTENCE_END = re.compile(r"[.!?](?=\s|$)")


def kept(text, word):
    """Which of the three conditions a text keeps."""
    text = text.strip()
    one_sentence = len(SENTENCE_END.findall(text)) == 1 and text.endswith((".", "!", "?"))
    return one_sentence, len(text.split()) < 12, word in text.lower()


def is_good(text, word):
    """Whether a text is a good answer."""
    return all(kept(text, word))


def good(case):
    """A verifier: 1 for a good answer, else 0. `case.problem.data` has the other fields of the prompt's line."""
    return float(is_good(case.completion, case.problem.data["word"]))


def graded(case):
    """A reward in steps: a quarter for each condition that is kept, and 1 for all three."""
    conditions = kept(case.completion, case.problem.data["word"])
    return 1.0 if all(conditions) else sum(conditions) / 4


def good_by_trl(prompts, completions, word, **columns):
    """The same as a reward function of TRL's: it gets lists, and of a chat each completion is a list of messages."""
    texts = [messages[-1]["content"] for messages in completions]
    return [float(is_good(text, one)) for text, one in zip(texts, word, strict=True)]
