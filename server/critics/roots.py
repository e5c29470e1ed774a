"""Where critics may be loaded from over HTTP: only folders of which the one who started the server has said so.

Loading reads files of the server's machine, or of object stores, with the server's rights, and what is in them steers
everybody's answers.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Self

from qsharp_core.errors import CriticError
from qsharp_core.locations import Location, RemoteFolder, is_url, parse_location
from server.errors import ForbiddenError


class CriticRoots:
    """The folders under which critics may be loaded.

    Args:
        folders: these, and all that is in them.
    """

    def __init__(self, folders: Iterable[Location]) -> None:
        self.folders: list[Location] = [one.resolve() if isinstance(one, Path) else one for one in folders]

    @classmethod
    def of(cls, given: Iterable[Location], started_with: Iterable[Location]) -> Self:
        """The folders that were given, or else those that a server knows by itself.

        These are the folder that it was started in, unless that is the whole machine, and the critics' that it was
        started with.

        Args:
            given: by `--critic-root`.
            started_with: folders of the critics that the server was started with.
        """
        given, here = list(given), Path.cwd()
        return cls(given or [*([here] if here != Path(here.anchor) else []), *started_with])

    def admit(self, path: str) -> Location:
        """The folder at a path, with all symbolic links resolved, or at a URL.

        Raises:
            ForbiddenError: it is not under one of the folders.
            CriticError: no path, and no URL of a folder.
        """
        try:
            location = parse_location(path)
            folder = location.resolve() if isinstance(location, Path) else location
        except (OSError, RuntimeError, ValueError) as error:
            raise CriticError(f"path: {getattr(error, 'strerror', None) or error}") from error
        if not any(_is_in(folder, root) for root in self.folders):
            raise ForbiddenError(
                f"path: {folder} is not where this server may load critics from, which is under "
                f"{', '.join(map(str, self.folders)) or 'no folder'}: start it with --critic-root "
                f"{'URL' if is_url(path) else 'FOLDER'} (QSHARP_CRITIC_ROOT) to allow others"
            )
        return folder


def _is_in(folder: Location, root: Location) -> bool:
    if isinstance(folder, RemoteFolder):
        return isinstance(root, RemoteFolder) and folder.is_relative_to(root)
    return isinstance(root, Path) and folder.is_relative_to(root)
