"""The embedded models by name: how each is served, and a request to try."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from qsharp_core.critic.checkpoint import read_card

HERE = Path(__file__).parent
DEFAULT, SEPARATE = "smollm2", "smollm2-separate"

HINT = """
Serving {name}{about} Try:

  curl http://localhost:{port}/v1/completions -H 'Content-Type: application/json' -d '{{
    {body}, "eta": {eta:g}}}'

and the same without "eta". Metrics: http://localhost:{port}/metrics, routes: http://localhost:{port}/docs
"""
SUMS = r'''"prompt": "Question: What is 1 + 5 + 3?\nAnswer: 1 + 5 = 6. 6 + 3 = 9. The answer is 9.\n\nQuestion: What is 7 + 2 + 8?\nAnswer:",
    "max_tokens": 40, "stop": "\n"'''  # noqa: E501
STAR_GRAPH = """"prompt": "21,13|20,15|17,9|17,5|16,19|1,18|3,0|17,16|5,12|7,3|9,7|11,1|18,4|19,23|17,14|23,8|12,20|13,10|14,21|17,11/17,4=",
    "max_tokens": 16, "n": 8"""  # noqa: E501


@dataclass(frozen=True)
class Preset:
    """A model, its critic, and how they are served.

    Attributes:
        name, critic: the names under which the model and the critic are served.
        critic_folder: the critic's folder.
        model: returns the model's folder, and makes it first if need be.
        about: continues the hint after the model's name: what the pair is for.
        body: the fields of the hint's request, as JSON without `eta`.
        max_model_len, max_num_seqs: vLLM's arguments.
        bfloat16: whether it is served in bfloat16 where the processor is fast at that.
    """

    name: str
    critic: str
    critic_folder: Path
    model: Callable[[], Path]
    about: str
    body: str
    max_model_len: int
    max_num_seqs: int
    bfloat16: bool

    def hint(self, port: int) -> str:
        """The text that `server.plugin` prints when the server listens: what it serves, and a request to try."""
        eta = read_card(self.critic_folder).recommended_eta or 0.1
        return HINT.format(name=self.name, about=self.about, body=self.body, port=port, eta=eta)


def _smollm2() -> Path:
    from server.presets.smollm2 import ensure_smollm2

    return ensure_smollm2()


_SUMS = Preset(
    name="SmolLM2-135M-Instruct",
    critic="sums",
    critic_folder=HERE / "sums" / "critic",
    model=_smollm2,
    about=' with the critic "sums", for sums of three one-digit numbers.',
    body=SUMS,
    max_model_len=2048,
    max_num_seqs=32,
    bfloat16=True,
)
PRESETS = {
    DEFAULT: _SUMS,
    # A critic of the same task with a backbone of its own. It can guide models that it was not made for, too.
    SEPARATE: replace(
        _SUMS,
        critic_folder=HERE / "sums" / "separate",
        about=' with the critic "sums" that has a backbone of its own, for sums of three one-digit numbers.',
    ),
    "star-graph": Preset(
        name="star-graph",
        critic="star-graph",
        critic_folder=HERE / "star_graph" / "critic",
        model=lambda: HERE / "star_graph" / "reference",
        about=""": a path through a graph of five arms, from 17 to 4. The model takes an arm at random; guided, the one
that leads there, 17,11,1,18,4.""",
        body=STAR_GRAPH,
        max_model_len=128,
        max_num_seqs=64,
        bfloat16=False,  # as it was trained and measured
    ),
}
