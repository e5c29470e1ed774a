"""Makes the PrometheusRule of Kubernetes from the alerts that Compose's Prometheus has: `make kubernetes-rules`.

Kustomize takes no file from outside of its folder, and a rule file is no object, so this is a copy;
`tests/deploy/test_kubernetes.py` fails where it is not the newest.
"""

from pathlib import Path
from textwrap import indent

HERE = Path(__file__).parent
SOURCE = HERE.parent / "docker" / "prometheus" / "rules.yml"
TARGET = HERE / "kubernetes" / "monitoring" / "rules.yaml"
HEAD = """# Made from docker/prometheus/rules.yml by `make kubernetes-rules`: change that.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: qsharp
spec:
"""


def made() -> str:
    """The text of the object."""
    rules = SOURCE.read_text()
    return HEAD + indent(rules[rules.index("groups:\n") :], "  ")


if __name__ == "__main__":
    TARGET.write_text(made())
