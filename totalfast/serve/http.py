"""HTTP for other programs: submit a scan, watch its run, fetch the result, cancel it.

Needs Starlette and uvicorn: the extra ``totalfast[serve]``.
"""

from __future__ import annotations

import hmac
import json
import logging
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Route

from totalfast import about
from totalfast.errors import OptionError
from totalfast.serve.http_description import description
from totalfast.serve.http_limits import OutsideError
from totalfast.serve.http_metrics import metrics
from totalfast.serve.http_runs import BusyError
from totalfast.serve.http_submissions import (
    discard_rest,
    read_flags,
    read_object,
    store_upload,
)
from totalfast.serve.storage import FullError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp, Receive, Scope, Send

    from totalfast.serve.http_runs import HttpRuns
    from totalfast.serve.storage import Storage
    from totalfast.serve.submitted import Submitted

logger = logging.getLogger(__name__)

OPEN_PATHS = ("/health", "/openapi.json")
"""Answered without a token; they tell nothing about runs."""


class BearerToken:
    """Lets only requests through that have the server's token."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app, self._expected = app, f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 401, or pass a request on."""
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._expected):
                refusal = JSONResponse(
                    {"error": "a bearer token is needed"},
                    status_code=401,
                    headers={"WWW-Authenticate": "Bearer"},
                )
                await refusal(scope, receive, send)
                return
        await self._app(scope, receive, send)


def create_app(runs: HttpRuns, token: str) -> ASGIApp:
    """Return the ASGI application.

    Parameters
    ----------
    runs
        Where runs are submitted.
    token
        What clients must send as ``Authorization: Bearer TOKEN``.
    """
    endpoints = _Endpoints(runs)
    routes = [
        Route("/health", endpoints.health),
        Route("/openapi.json", endpoints.openapi),
        Route("/metrics", endpoints.metrics),
        Route("/runs", endpoints.submit, methods=["POST"]),
        Route("/runs/{id}", endpoints.state),
        Route("/runs/{id}", endpoints.cancel, methods=["DELETE"]),
        Route("/runs/{id}/events", endpoints.events),
        Route("/runs/{id}/result", endpoints.result),
    ]
    handlers: Any = {HTTPException: _refusal}  # Starlette's type does not allow the narrower one
    return BearerToken(Starlette(routes=routes, exception_handlers=handlers), token)


async def _refusal(request: Request, error: HTTPException) -> Response:
    return JSONResponse({"error": error.detail}, status_code=error.status_code)


class _Endpoints:
    def __init__(self, runs: HttpRuns) -> None:
        self._runs = runs

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok", "version": about.version()})

    async def openapi(self, request: Request) -> Response:
        return JSONResponse(description())

    async def metrics(self, request: Request) -> Response:
        return PlainTextResponse(metrics(self._runs), media_type="text/plain; version=0.0.4")

    async def submit(self, request: Request) -> Response:
        try:
            submitted = await self._submitted(request)
        except HTTPException:
            await discard_rest(request)
            raise
        where = f"/runs/{submitted.id}"
        return JSONResponse(submitted.as_json(), status_code=202, headers={"Location": where})

    async def _submitted(self, request: Request) -> Submitted:
        try:
            self._runs.check_open()
            if request.headers.get("content-type", "").startswith("application/json"):
                return self._submit_object(await read_object(request))
            return await self._submit_upload(request)
        except BusyError as error:
            raise HTTPException(503, str(error)) from error
        except FullError as error:
            raise HTTPException(507, str(error)) from error
        except OutsideError as error:
            raise HTTPException(403, str(error)) from error
        except OptionError as error:
            raise HTTPException(400, str(error)) from error

    def _submit_object(self, wanted: dict[str, Any]) -> Submitted:
        """Submit the paths or the study that a JSON object names."""
        flags = read_flags(wanted.get("flags", []))
        if "dicomweb" in wanted:
            if self._runs.studies is None:
                raise OptionError("this server was started without --dicomweb.")
            return self._runs.submit_order(self._runs.studies.order(wanted), flags)
        source, output = wanted.get("input"), wanted.get("output")
        if not (isinstance(source, str) and isinstance(output, str)):
            raise OptionError("a JSON object with input, output and flags is expected.")
        if not (Path(source).is_absolute() and Path(output).is_absolute()):
            raise OptionError("input and output must be absolute paths.")
        return self._runs.submit_paths(Path(source), Path(output), flags)

    async def _submit_upload(self, request: Request) -> Submitted:
        name = request.query_params.get("name", "")
        flags = request.query_params.getlist("flags")
        if name in ("", ".", "..") or Path(name).name != name or "\\" in name or "\0" in name:
            raise OptionError("the query must have the file's name without a folder: ?name=...")
        folder = self._runs.storage.new_folder()
        with self._runs.removed_on_error(folder):
            limit = self._runs.limits.upload_bytes
            scan = await store_upload(request, self._runs.storage, folder, name, limit)
            return self._runs.submit_upload(scan, flags, folder)

    async def state(self, request: Request) -> Response:
        return JSONResponse(self._wanted(request).as_json())

    async def cancel(self, request: Request) -> Response:
        submitted = self._wanted(request)
        self._runs.cancel(submitted)
        return JSONResponse(submitted.as_json())

    async def events(self, request: Request) -> Response:
        submitted = self._wanted(request)

        async def lines() -> AsyncIterator[str]:
            async for event in submitted.watch():
                yield f"event: {event['event']}\ndata: {json.dumps(event)}\n\n"

        return StreamingResponse(lines(), media_type="text/event-stream")

    async def result(self, request: Request) -> Response:
        submitted = self._wanted(request)
        if submitted.state == "done" and submitted.folder is None:
            raise HTTPException(409, "the result is in the output that was submitted")
        if not submitted.has_result or submitted.folder is None:
            raise HTTPException(409, f"the run is {submitted.state} and has no result")
        files = sorted(path for path in (submitted.folder / "result").rglob("*") if path.is_file())
        if len(files) == 1:
            return FileResponse(files[0], filename=files[0].name)
        try:
            return await _zipped(self._runs.storage, submitted.folder, files)
        except FullError as error:
            raise HTTPException(507, str(error)) from error

    def _wanted(self, request: Request) -> Submitted:
        submitted = self._runs.get(request.path_params["id"])
        if submitted is None:
            raise HTTPException(404, "there is no such run, or it was removed")
        return submitted


async def _zipped(storage: Storage, folder: Path, files: Sequence[Path]) -> Response:
    """Return files as a zip file without compression; NIfTI files are compressed already."""
    import secrets

    from starlette.concurrency import run_in_threadpool

    archive = folder / f"{secrets.token_hex(8)}.zip"

    def write() -> None:
        with zipfile.ZipFile(archive, "w") as opened:
            for path in files:
                opened.write(path, path.relative_to(folder / "result"))

    async def remove() -> None:
        archive.unlink(missing_ok=True)
        storage.measure(folder)

    storage.claim(folder, sum(path.stat().st_size for path in files))
    try:
        await run_in_threadpool(write)
    except BaseException:
        await remove()
        raise
    return FileResponse(archive, filename="result.zip", background=BackgroundTask(remove))
