"""How the build writes names anew, and what it refuses; and what becomes of the README's links."""

import pytest

from readme_links import without_relative_links
from relocated_wheel import RelocationError, relocated


def moved(source: str) -> str:
    files = {"server/__init__.py": b"", "server/a.py": b"X = 1\n", "trainer/b.py": source.encode()}
    return relocated(files)["qsharp_serve/trainer/b.py"].decode()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("from server import a\n", "from qsharp_serve.server import a\n"),
        ("if True:\n    from  server.a import (\n        X,\n    )\n",
         "if True:\n    from  qsharp_serve.server.a import (\n        X,\n    )\n"),
        ("é = 1; from server.a import X\n", "é = 1; from qsharp_serve.server.a import X\n"),
        ("M = {'x': ('server.a', 'trainer.b:f.g')}\n",
         "M = {'x': ('qsharp_serve.server.a', 'qsharp_serve.trainer.b:f.g')}\n"),
        ("A, B = 'server.a:X', 'server.a:X'\n", "A, B = 'qsharp_serve.server.a:X', 'qsharp_serve.server.a:X'\n"),
        *((text, text) for text in (
            "from . import a\n", "import serverless\n", "from servers import a\n", "L = 'server.log'\n",
            '"""Uses server.a."""\n', "S = 'server'\n", "x = {'server': 1}\n",
        )),
    ],
)  # fmt: skip
def test_names_are_written_anew_and_nothing_else(before: str, after: str) -> None:
    assert moved(before) == after


@pytest.mark.parametrize(
    "source", ["import server.a\n", "import os, trainer.b as b\n", "x = 'server' '.a'\n", "f'trainer.{x}'\n"]
)
def test_what_cannot_be_written_anew_ends_the_build(source: str) -> None:
    with pytest.raises(RelocationError, match=r"trainer/b\.py:1"):
        moved(source)


METADATA = """Name: x
Version: 1.2
{url}
See [serving](docs/serving.md#use), [the paper](https://arxiv.org/abs/1), [above](#use).

![A plot](docs/images/plot.png)
"""


def test_without_a_repository_links_become_text() -> None:
    expected = METADATA.format(url="").replace("[serving](docs/serving.md#use)", "serving")
    assert without_relative_links(METADATA.format(url="")) == expected.replace("![A plot](docs/images/plot.png)", "")


def test_with_a_repository_they_lead_to_the_versions_tag() -> None:
    text = METADATA.format(url="Project-URL: Repository, https://example.org/x/\n")
    expected = text.replace("](docs/serving", "](https://example.org/x/blob/v1.2/docs/serving")
    expected = expected.replace("](docs/images", "](https://example.org/x/raw/v1.2/docs/images")
    assert without_relative_links(text) == expected
