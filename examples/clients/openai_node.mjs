// openai-node: fields of ours stand among the others (TypeScript wants a // @ts-expect-error above each).
import OpenAI from "openai";

const { QSHARP_URL = "http://localhost:8000", MODEL } = process.env;

const client = new OpenAI({ baseURL: `${QSHARP_URL}/v1`, apiKey: "none" });
const made = await client.chat.completions.create({
  model: MODEL,
  messages: [{ role: "user", content: "What is 3 + 9 + 1?" }],
  max_tokens: 20,
  eta: 0.1,
});
console.log(made.choices[0].message.content, made.choices[0].guidance);
