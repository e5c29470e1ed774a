"""`qsharp evaluate`: a task's accuracy against KL, over `eta` and methods.

settings    what is measured
searches    a search as command lines and recipes spell it
evaluate    samples, judges and scores what is missing, and writes the report
statistics  estimates and their standard errors: pure functions
of_problems what each problem earned and cost
report      report.json as a model
table       the report as a table
plot        the report as a plot of accuracy against KL
labels      labels of a plot's points, each where it covers the least
"""
