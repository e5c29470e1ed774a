"""Writes the bill of materials of the Python packages that are installed here, as CycloneDX 1.6 in JSON, and checks it.

    python3 sbom.py PYPROJECT OUT [TOOLS]        PYPROJECT describes what they are there for

It is cyclonedx-bom that does it; TOOLS is a folder that has it, so that the image need not: the list is of what Python
finds without that folder. Packages of the operating system are not in it.
"""

import runpy
import sys


def main(pyproject: str, out: str, tools: str | None = None) -> None:
    """Ends with cyclonedx-bom's exit status: 0 if the document is valid."""
    if tools is not None:
        sys.path.insert(0, tools)  # and not in the environment, which the Python that is looked at would see, too
    options = ["--spec-version", "1.6", "--output-format", "JSON", "--output-reproducible", "--validate"]
    sys.argv = ["cyclonedx-py", "environment", *options, "--pyproject", pyproject, "--output-file", out, sys.executable]
    runpy.run_module("cyclonedx_py", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
