"""openai-python: fields of ours go into `extra_body`, and come back as extra attributes."""

import os

from openai import OpenAI

URL, MODEL = os.environ.get("QSHARP_URL", "http://localhost:8000"), os.environ["MODEL"]

client = OpenAI(base_url=f"{URL}/v1", api_key="none")
made = client.chat.completions.create(
    model=MODEL,
    messages=[{"role": "user", "content": "What is 3 + 9 + 1?"}],
    max_tokens=20,
    extra_body={"eta": 0.1, "guidance": {"candidates": 8}},
)
print(made.choices[0].message.content, made.choices[0].guidance)
