"""`guidance.search`: several samples of a prompt, or one that is watched, and the choices that are returned of them.

fields      what a request asks for, and what a response says of it
checks      what cannot be combined with a search
stop        ends a choice whose value falls
best_of     the best of several samples, with those that fall behind ended on the way
particles   twisted sequential Monte Carlo; its arithmetic is `qsharp_core.particles`
ranking     which of several samples are the best
found       a sample that a search returns

Each kind runs its samples by `server.request.sample`, and knows nothing of HTTP or of other choices.
"""
