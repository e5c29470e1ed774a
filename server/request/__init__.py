"""What happens to a request that samples: admitted, sampled through a proxy of the engine, recorded, and answered.

`schema` has the fields, `call` the request's state on its way, `admission` checks what it asks for, `proxy` has its
choices sampled and guided, `telemetry` joins them with the workers' reports, `recording` and `draft` make rollouts of
what is stored (`messages` puts a stream's chunks together), `summary` makes a choice's `guidance` of its reports, and
`responses` puts that on vLLM's responses.
"""
