"""The paper's Star-Graph experiment: a reference that takes a shortcut, and a critic that knows the way.

graphs      graphs as text: prompts and their paths
model       the small reference and its tokenizer, a token a node
reference   pre-training of the reference
rows        rollouts that share a prompt, run once
critic      training of the critic
rollouts    the reference's rollouts, sampled and logged by a server
recipe      all stages, from nothing to the report
report      report.json's content, the table
plot        report.png
"""
