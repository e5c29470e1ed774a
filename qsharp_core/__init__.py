"""The method of Q-sharp (arXiv 2502.20548): return distributions, guided policies, the critic and its engine."""
