"""`qsharp loop`: round after round, logged rollouts become the next critic of a running server.

settings    what a loop does, and when it stops
state       the stages that are done: what makes a killed loop go on
rounds      collect, reward, export, train, activate, evaluate, and again
stages      what these do
watch       the long-running mode: trains when enough new rollouts have a reward
training    the next version, in a process of its own
activation  whether it deserves to guide, and making it so in the server
command     the command line
"""
