"""Takes a Parquet file of rollouts that comes from elsewhere: checks it in a process of its own, and writes it anew.

    python -m qsharp_core.rollouts.foreign SOURCE TARGET OWNER

pyarrow reads most damaged files as errors, but some end the process (an exception in C++ that nothing catches), and a
file made for it may ask for any amount of memory. So another process reads the file, with limits on its memory and
time, and writes one of our own in its place, with every rollout checked. Only that one is read by the program that
asked. The process answers with one JSON object on its output.
"""

import asyncio
import json
import os
import resource
import signal
import sys
from pathlib import Path

from qsharp_core.errors import RolloutError
from qsharp_core.rollouts import parquet
from qsharp_core.rollouts.text import cleaned

MEMORY = 3 * 2**30  # bytes of address space; files of ours take less than one third of it
SECONDS = 1800


async def take(source: Path, target: Path, owner: str) -> int:
    """Writes the rollouts of `source`, a Parquet file of anybody's, to `target`, and returns how many there are.

    Args:
        owner: of rollouts for which the file names none.

    Raises:
        RolloutError: the file cannot be taken; names the column.
    """
    command = (sys.executable, "-m", __name__, str(source), str(target), owner)
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe)
    try:
        output, errors = await asyncio.wait_for(process.communicate(), SECONDS)
    except TimeoutError as error:
        raise RolloutError(f"the file takes longer than {SECONDS} seconds to read: send it in parts") from error
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode == 0:
        return int(json.loads(output)["rollouts"])
    if process.returncode == 1 and output:
        raise RolloutError(**json.loads(output))
    raise RolloutError(f"this is not a Parquet file, or a damaged one: {_last_words(process.returncode, errors)}")


def _last_words(status: int | None, errors: bytes) -> str:
    if status is not None and status < 0:
        return f"reading it ended with {signal.Signals(-status).name}"
    lines = errors.decode(errors="replace").strip().splitlines() or [f"reading it ended with status {status}"]
    return lines[-1][:200]


def main(source: Path, target: Path, owner: str) -> int:
    """What the process does; its exit status."""
    count = 0
    try:
        with target.open("wb") as file:
            for piece in parquet.write(parquet.read(source, owner)):
                file.write(piece)
        count = parquet.rows(target)
    except RolloutError as error:
        print(json.dumps(cleaned({"message": str(error), "param": error.param})))
        return 1
    print(json.dumps({"rollouts": count}))
    return 0


if __name__ == "__main__":
    os.nice(5)  # requests come first
    if (score := Path("/proc/self/oom_score_adj")).exists():
        score.write_text("1000")  # if memory runs out, this process ends and not the one that asked
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]))
