"""Prints what pip is to install before our own code: a layer of the image that lasts until pyproject.toml changes.

python requirements.py [EXTRA]
"""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
extras = [package for extra in sys.argv[1:] for package in project["optional-dependencies"][extra]]
print(*project["dependencies"], *extras, sep="\n")
