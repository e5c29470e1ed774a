"""`qsharp run`: experiments, each described by a small TOML file.

recipes/     the recipes that come with the package
files        where recipes are, and what they say: TOML, `--set`, errors that name file and field
kinds        what kinds there are: the model of a recipe's fields, and what runs it
fields       tables that several kinds share: sampling, guidance, evaluation, the server, published numbers
report       report.json: what all kinds have in common
machine      the machine that an experiment runs on
served       the server that a recipe samples through
logged       rollouts of the reference, for kinds without rounds
trained      critics that are trained once

experiment   the loop and its evaluation: a critic learns a task
ablation/    critics that are trained differently, of the same rollouts, with seeds
cross_model  one critic, several references
quantise     a reference of fewer bits
tree_mdp/    the paper's Figure 4
star_graph/  the paper's Star-Graph

A kind is a pydantic model of its fields and `async def run(recipe, folder, console) -> Outcome`. It keeps what it has
done in `folder`, so that the same command goes on from there, writes `report.png`, and prints its table.
"""
