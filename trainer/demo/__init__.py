"""`qsharp demo`: the whole loop, from nothing to a critic that helps, on a small model and task.

sums        what is run: server, loop, evaluation
report      what came of it: report.json and the table
plot        report.png
command     the command line
"""
