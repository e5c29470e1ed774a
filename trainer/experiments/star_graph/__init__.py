"""The paper's Star-Graph experiment: a reference that takes a shortcut, and a critic that knows the way.

settings    the recipe's fields
model       the small reference and its tokenizer, a token a node
optimizer   what both models are trained with
reference   pre-training of the reference
rows        rollouts that share a prompt, run once
critic      training of the critic
rollouts    the reference's rollouts, sampled and logged by a server
recipe      all stages, from nothing to the report
report      report.json as a model, and the table
plot        report.png

Graphs are those of the task (`trainer.tasks.star_graph`).
"""
