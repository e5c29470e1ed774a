"""What guidance costs: throughput guided and not, the critic's arithmetic, and other ways to do the same.

python -m benchmarks.guidance --json benchmarks/results/guidance.json
"""
