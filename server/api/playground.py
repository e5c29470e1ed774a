"""`/playground`: a page on which people see what guidance does, token by token. `/` leads there.

The page is static files of this package, for everybody. What it shows it asks of this server's API, with the key that
its reader enters.
"""

from argparse import Namespace
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import RedirectResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.types import Scope

from server.access.gate import LOOPBACK
from server.settings import Settings

PATH = "/playground"
FOLDER = Path(__file__).parent.parent / "playground"
HEADERS = {
    # Nothing runs, is shown or is asked but what comes from this server; no other page may frame this one.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-cache",  # asks whether there is a newer one
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class PlaygroundFiles(StaticFiles):
    """The page's files, with headers that let it do no more than it must."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(HEADERS)
        return response


def attach(app: FastAPI, args: Namespace) -> None:
    """Adds the page, where the server shows it."""
    if not is_shown(Settings.of(args), args):
        return
    for path in ("/", PATH):
        app.add_api_route(path, _lead, methods=["GET", "HEAD"], include_in_schema=False)
    app.mount(PATH, PlaygroundFiles(directory=FOLDER, html=True), name="playground")


def is_shown(settings: Settings, args: Namespace) -> bool:
    """Whether this server has the page: as its settings say, else if it listens to this machine alone."""
    return args.host in LOOPBACK if settings.playground is None else settings.playground


def _lead(request: Request) -> RedirectResponse:
    return RedirectResponse(f"{request.scope.get('root_path', '')}{PATH}/")
