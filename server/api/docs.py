"""`/docs`: the routes and their fields, without anything from elsewhere.

FastAPI's own page takes scripts, styles and an icon from a content network, so that a server without a way out shows an
empty page. vLLM has the same scripts and styles in its package.
"""

from importlib.metadata import version
from pathlib import Path

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html, get_swagger_ui_oauth2_redirect_html
from fastapi.responses import HTMLResponse
from fastapi.staticfiles import StaticFiles
from vllm.entrypoints.serve.instrumentator import offline_docs

TITLE = "qsharp-serve"
ABOUT = """vLLM's OpenAI-compatible API with value-guided decoding (Q♯): `eta` and `guidance` in a request steer what is
sampled by a critic, and each choice says what that did."""
ASSETS = Path(offline_docs.__file__).parent / "static"
REDIRECT = "/docs/oauth2-redirect"
REPLACED = {"/docs", REDIRECT, "/redoc", "/static"}  # Redoc is nowhere but on a content network
NO_ICON = "data:,"


def attach(app: FastAPI) -> None:
    """Puts our page in place of the app's own, unless that was turned off (`--disable-fastapi-docs`)."""
    app.title, app.version, app.description = TITLE, version("qsharp-serve"), ABOUT
    if app.openapi_url is None:
        return
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) not in REPLACED]
    app.mount("/static", StaticFiles(directory=ASSETS), name="static")
    app.add_api_route("/docs", lambda: _page(app), include_in_schema=False)
    app.add_api_route(REDIRECT, get_swagger_ui_oauth2_redirect_html, include_in_schema=False)


def _page(app: FastAPI) -> HTMLResponse:
    root = app.root_path or ""
    return get_swagger_ui_html(
        openapi_url=f"{root}{app.openapi_url}",
        title=f"{TITLE}: routes",
        oauth2_redirect_url=f"{root}{REDIRECT}",
        swagger_js_url=f"{root}/static/swagger-ui-bundle.js",
        swagger_css_url=f"{root}/static/swagger-ui.css",
        swagger_favicon_url=NO_ICON,
    )
