"""Tasks: problems, prompts and a reward for a completion's text. Pure functions, without models and servers.

base              what a task is
registry          tasks and other things, found by name
files             rows as a task: JSON lines, or a list
hub               data sets of the package datasets as tasks
sources           where prompts come from, in whatever form a person has them
answers           the answer in a completion's text
mathematics       mathematical answers compared
sums              sums of three digits
splits            problems of word lists, drawn and parted into two splits
sentence          a sentence with given words in it
tone              praise in a review's continuation
extraction        facts out of a passage, as JSON
benchmarks        questions of public benchmarks, from the hub or from files
gsm8k, competition_math, svamp   three of these
worked            problems that are asked after solved ones
star_graph        paths in star graphs
tree_mdp          a tree whose optimal policy is known
"""
