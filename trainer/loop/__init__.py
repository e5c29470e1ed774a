"""`qsharp loop`: round after round, logged rollouts become the next critic of a running server.

settings    what a loop does, how versions are made, and when it stops
versions    published versions of a critic
state       the stages that are done: what makes a killed loop go on
rounds      collect, reward, export, train, activate, evaluate, and again
stages      what each of these does
training    the next version, trained in a process of its own
activation  whether a version deserves to guide, and making it so in the server
watch       the long-running mode: trains when enough new rollouts have a reward
report      results of stages, and report.json, as models
table       the report as a table
"""
