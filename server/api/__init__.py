"""The HTTP interface: one module for each group of routes, and the middleware that guards all other routes.

| module | routes |
|---|---|
| `completions` | `POST /v1/completions`, `POST /v1/chat/completions` |
| `critics` | `/v1/critics` |
| `rollouts` | `/v1/rollouts` |
| `stored_chat` | `GET`, `POST` and `DELETE` of stored chat completions, as OpenAI has them |
| `health` | `/liveness`, `/version` |

`queries` reads the query strings of lists, `scoring` the texts that a critic is asked to score.
"""
