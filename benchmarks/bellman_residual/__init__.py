"""What the Bellman residual tells, on the default model and its held-out sums, through HTTP.

    python -m benchmarks.bellman_residual [--out runs/bellman-residual]

Two questions. Does the residual of an answer tell right from wrong ones? And does it notice a critic that was trained
for something else, loaded beside the right one and asked by the same requests?

tasks        what those critics were trained for
critics      their making, by the commands that users type; and one whose head is random
sampling     the requests, and what of their answers is kept
statistics   AUCs, means, and how many answers it takes to notice

Every stage keeps what it made in the folder, and is left out where that is there.
"""
