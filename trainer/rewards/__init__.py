"""Verifiers: what judges completions, and how they are run.

base         what a verifier gets and gives
builtin      verifiers that read text and are quick
mathematics  `math_verify` as a verifier
signatures   functions of other signatures as verifiers: TRL's reward functions
verifiers    verifiers by name, and the reward that several of them give together
pool         processes that verifiers run in, which can be killed
problems     which problem a stored rollout answers
run          stored rollouts, judged and given their rewards
"""
