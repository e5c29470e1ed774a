"""`python -m trainer.training …` is `qsharp train …`: what `accelerate launch -m` starts on several devices."""

import sys

from qsharp_core.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
