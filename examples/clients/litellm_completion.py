"""LiteLLM: the provider `hosted_vllm` passes `extra_body` on."""

import os

from litellm import completion

URL, MODEL = os.environ.get("QSHARP_URL", "http://localhost:8000"), os.environ["MODEL"]

made = completion(
    model=f"hosted_vllm/{MODEL}",
    api_base=f"{URL}/v1",
    api_key="none",
    messages=[{"role": "user", "content": "What is 3 + 9 + 1?"}],
    max_tokens=20,
    extra_body={"eta": 0.1},
)
print(made.choices[0].message.content)
