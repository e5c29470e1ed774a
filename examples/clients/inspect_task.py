"""inspect-ai: a provider of any name with the address in NAME_BASE_URL; `extra_body` goes into the configuration."""

import os

from inspect_ai import Task, eval
from inspect_ai.dataset import Sample
from inspect_ai.model import GenerateConfig, get_model
from inspect_ai.scorer import includes
from inspect_ai.solver import generate

URL, MODEL = os.environ.get("QSHARP_URL", "http://localhost:8000"), os.environ["MODEL"]

model = get_model(
    f"openai-api/qsharp/{MODEL}",
    base_url=f"{URL}/v1",
    api_key="none",
    config=GenerateConfig(max_tokens=20, extra_body={"eta": 0.1}),
)
sums = [Sample(input=f"What is {a} + 9 + 1?", target=str(a + 10)) for a in range(4)]
(log,) = eval(Task(dataset=sums, solver=generate(), scorer=includes()), model=model, display="plain")
print(log.status, log.results.scores[0].metrics["accuracy"].value)
