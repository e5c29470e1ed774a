"""Makes the deployment's secrets, a file each, with random values: `make secrets`.

    python3 docker/make_secrets.py [FOLDER]        default: docker/secrets, which git does not keep

Files that are there stay as they are, so that it may be run again; to change a secret, write it into its file (or
remove the file and run this again) and start the services anew. The folder is its owner's alone. The files in it are
readable by all, because the services that they are mounted into run as different users.
"""

import os
import secrets
import sys
from collections.abc import Callable
from pathlib import Path

FOLDER = Path(__file__).parent / "secrets"


def random() -> str:
    """192 bits, in letters and digits alone: one of them becomes part of a URL."""
    return secrets.token_hex(24)


def make(folder: Path) -> list[str]:
    """Writes the secrets that are missing; their names.

    Raises:
        ValueError: the password of the database is empty.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    made = []

    def write(name: str, value: Callable[[], str]) -> None:
        path = folder / name
        if not path.exists():
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(value())
                os.fchmod(file.fileno(), 0o444)  # whatever the umask
            made.append(name)

    def rollouts() -> str:
        password = (folder / "postgres_password").read_text().strip()
        if not password:
            raise ValueError(f"{folder / 'postgres_password'} is empty")
        return f"postgresql://qsharp:{password}@postgres/qsharp"

    for name in ("vllm_api_key", "qsharp_admin_key", "postgres_password", "grafana_password"):
        write(name, random)
    write("qsharp_rollouts", rollouts)
    write("hf_token", str)  # empty: for models of a hub that asks who you are
    return made


if __name__ == "__main__":
    given = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    print(f"{given}: made {', '.join(make(given)) or 'nothing, all are there'}")
