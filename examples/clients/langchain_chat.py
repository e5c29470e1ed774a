"""LangChain (langchain-openai): `extra_body` is sent with every request of the model."""

import os

from langchain_openai import ChatOpenAI

URL, MODEL = os.environ.get("QSHARP_URL", "http://localhost:8000"), os.environ["MODEL"]

chat = ChatOpenAI(model=MODEL, base_url=f"{URL}/v1", api_key="none", max_tokens=20, extra_body={"eta": 0.1})
print(chat.invoke("What is 3 + 9 + 1?").content)

# What LangChain makes of an answer has no field for `guidance`; the request may be streamed, bound, or batched.
print([answer.content for answer in chat.batch(["What is 1 + 2 + 3?", "What is 4 + 5 + 6?"])])
