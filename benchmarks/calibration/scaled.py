"""A critic whose outputs are divided by a temperature: the same folder, with another last layer."""

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from qsharp_core.critic.checkpoint import read_card
from qsharp_core.critic.folder import CARD, HEAD
from qsharp_core.disk import whole_folder

LAST_LAYER = {"reference": ("out.weight", "out.bias"), None: ("weight", "bias")}


def write_scaled(critic: Path, target: Path, temperature: float) -> None:
    """Writes the folder of the scaled critic. Its version is the critic's with `.scaled`; its last layer is float32.

    Raises:
        CriticError: the critic cannot be read.
        FileExistsError: the target exists.
    """
    card = read_card(critic)
    with whole_folder(target) as folder:
        shutil.copytree(critic, folder, dirs_exist_ok=True)
        tensors = load_file(critic / HEAD)
        for name in LAST_LAYER[card.backbone]:
            tensors[name] = tensors[name].float() / temperature
        save_file(tensors, folder / HEAD)
        fields = json.loads((critic / CARD).read_bytes())
        fields |= {"version": f"{card.version}.scaled", "temperature": temperature}
        fields.pop("metrics", None)  # they are of the other one
        (folder / CARD).write_text(json.dumps(fields, indent=2) + "\n")
