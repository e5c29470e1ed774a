"""Links of the README, as a package index shows them: it has no files beside it."""

import re

# [text](target) or ![text](target), where the target is no URL and no heading of the same page. The text has no
# brackets in it.
RELATIVE = re.compile(r"(?P<image>!?)\[(?P<text>[^\[\]]*)\]\((?!https?:|mailto:|#)(?P<target>[^()\s]+)\)")
REPOSITORY = re.compile(r"^Project-URL: Repository, (?P<url>\S+)$", re.MULTILINE)
VERSION = re.compile(r"^Version: (?P<version>\S+)$", re.MULTILINE)


def without_relative_links(metadata: str) -> str:
    """A package's metadata, with links of its description that lead into the repository, at this version's tag.

    Without a URL of the repository (`[project.urls]` in pyproject.toml) the links' text alone is left, and images are
    left out.
    """
    headers, mark, description = metadata.partition("\n\n")
    found, version = REPOSITORY.search(headers), VERSION.search(headers)
    assert version is not None

    def absolute(link: re.Match[str]) -> str:
        if found is None:
            return "" if link["image"] else link["text"]
        kind = "raw" if link["image"] else "blob"
        url = f"{found['url'].rstrip('/')}/{kind}/v{version['version']}/{link['target']}"
        return f"{link['image']}[{link['text']}]({url})"

    return headers + mark + RELATIVE.sub(absolute, description)
