"""`qsharp run`: experiments, each described by a small TOML file.

files       where recipes are, and what they say: TOML, `--set`, errors that name file and field
kinds       what kinds there are: the model of a recipe's fields, and what runs it
fields      tables that kinds share: sampling, guidance, evaluation, the server, published numbers
serving     the server that a recipe samples through
report      report.json, the table and the plot that kinds share
experiment  the loop and its evaluation: a model learns a task
tree_mdp    the paper's Figure 4
ablation    critics of different heads and losses, trained on the same rollouts
cross_model one critic, several references
quantise    a reference of fewer bits
command     the command line

A kind is a pydantic model of its fields and `async def run(recipe, folder, console) -> report`. It keeps what it has
done in `folder`, so that the same command goes on from there, writes `report.png`, and prints its table.
"""
