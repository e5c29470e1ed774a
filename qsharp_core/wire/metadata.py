"""The entries of `metadata` that this project gives a meaning to; values are strings, as OpenAI's API has it.

The trainer sends them with a request, the server stores them with the rollout, and lists of rollouts are filtered by
them. `PARENT`, `CUT` and `FORCED` also mean something to the server: with them a request continues a stored rollout.

How much `metadata` may hold is OpenAI's limit, too.
"""

MOST_ENTRIES = 16
LONGEST_KEY = 64  # characters
LONGEST_VALUE = 512

PARENT = "qsharp_parent"  # id of the stored rollout that this request continues
CUT = "qsharp_cut"  # after how many tokens of the parent's completion
FORCED = "qsharp_forced"  # a token id that stands in place of the last one before the cut

ITEM = "qsharp_item"  # key of the piece of work that a rollout was sampled for: nothing is sampled twice
RUN = "qsharp_run"  # the collection that a rollout belongs to

TASK = "qsharp_task"  # the task's name
SPLIT = "qsharp_split"  # the part of the task's problems
PROBLEM = "qsharp_problem"  # the problem's id
CONTENT = "qsharp_content"  # a hash of what the problem asks: an id may mean another problem in another file
SAMPLE = "qsharp_sample"  # which of the problem's samples
ROUND = "qsharp_round"  # the round of rollouts
