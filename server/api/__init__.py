"""The HTTP interface: one module for each group of routes, and the middleware that guards all other routes.

| module | routes |
|---|---|
| `completions` | `POST /v1/completions`, `POST /v1/chat/completions` |
| `critics` | `/v1/critics` |
| `rollouts` | `/v1/rollouts`, but for rewards |
| `rewards` | `POST /v1/rollouts/{id}/reward`, `POST /v1/rollouts/rewards` |
| `stored_chat` | `GET`, `POST` and `DELETE` of stored chat completions, as OpenAI has them |
| `health` | `/liveness`, `/version` |
| `docs` | `/docs` |

`queries` reads the query strings of lists, `bodies` the JSON bodies of the store's routes, `uploads` takes in
files, `scoring` reads the texts that a critic is asked to score.
"""
