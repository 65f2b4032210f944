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
from totalfast.serve.http_runs import BusyError, OutsideError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp, Receive, Scope, Send

    from totalfast.serve.http_runs import HttpRuns, Submitted

logger = logging.getLogger(__name__)

OPEN_PATHS = ("/health", "/openapi.json")
"""Answered without a token; they tell nothing about runs."""

UPLOAD_S = 1800
"""Maximum seconds of an upload."""

SUBMISSION_BYTES = 1 << 20
"""Maximum size of a submission that names paths."""


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
        lines = ["# TYPE totalfast_runs_ended_total counter"]
        for state, count in self._runs.ended.items():
            lines.append(f'totalfast_runs_ended_total{{state="{state}"}} {count}')
        lines += ["# TYPE totalfast_runs gauge", f"totalfast_runs {len(self._runs)}", ""]
        return PlainTextResponse("\n".join(lines), media_type="text/plain; version=0.0.4")

    async def submit(self, request: Request) -> Response:
        try:
            self._runs.check_open()
            if request.headers.get("content-type", "").startswith("application/json"):
                submitted = await self._submit_paths(request)
            else:
                submitted = await self._submit_upload(request)
        except BusyError as error:
            raise HTTPException(503, str(error)) from error
        except OutsideError as error:
            raise HTTPException(403, str(error)) from error
        except OptionError as error:
            raise HTTPException(400, str(error)) from error
        where = f"/runs/{submitted.id}"
        return JSONResponse(submitted.as_json(), status_code=202, headers={"Location": where})

    async def _submit_paths(self, request: Request) -> Submitted:
        body = b"".join([part async for part in _limited(request, SUBMISSION_BYTES)])
        try:
            wanted = json.loads(body)
            source, output = Path(wanted["input"]), Path(wanted["output"])
            flags = wanted.get("flags", [])
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise OptionError("a JSON object with input, output and flags is expected.") from error
        if not isinstance(flags, list) or not all(isinstance(flag, str) for flag in flags):
            raise OptionError("flags must be a list of texts.")
        if not (source.is_absolute() and output.is_absolute()):
            raise OptionError("input and output must be absolute paths.")
        return self._runs.submit(source, output, flags, None)

    async def _submit_upload(self, request: Request) -> Submitted:
        name = request.query_params.get("name", "")
        flags = request.query_params.getlist("flags")
        if name in ("", ".", "..") or Path(name).name != name or "\\" in name or "\0" in name:
            raise OptionError("the query must have the file's name without a folder: ?name=...")
        folder = self._runs.new_folder()
        stored = await self._stored(request, folder, name)
        (folder / "result").mkdir()
        output = folder / "result" / _output_name(flags)
        try:
            return self._runs.submit(stored, output, flags, folder)
        except (BusyError, OptionError, OutsideError):
            self._runs.discard(folder)
            raise

    async def _stored(self, request: Request, folder: Path, name: str) -> Path:
        """Write an upload to a file; nothing is left of one that is too large or is broken off."""
        from anyio import fail_after, open_file

        path = folder / "scan" / name
        path.parent.mkdir()
        complete = False
        try:
            with fail_after(UPLOAD_S):
                async with await open_file(path, "wb") as file:
                    async for part in _limited(request, self._runs.limits.upload_bytes):
                        await file.write(part)
            complete = True
        except TimeoutError as error:
            raise HTTPException(408, f"the upload took more than {UPLOAD_S} s") from error
        finally:
            if not complete:
                self._runs.discard(folder)
        return path

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
        if submitted.state != "done":
            raise HTTPException(409, f"the run is {submitted.state}")
        if submitted.folder is None:
            raise HTTPException(409, "the result is in the output that was submitted")
        files = sorted(path for path in (submitted.folder / "result").rglob("*") if path.is_file())
        if len(files) == 1:
            return FileResponse(files[0], filename=files[0].name)
        return await _zipped(submitted.folder, files)

    def _wanted(self, request: Request) -> Submitted:
        submitted = self._runs.get(request.path_params["id"])
        if submitted is None:
            raise HTTPException(404, "there is no such run, or it was removed")
        return submitted


async def _limited(request: Request, limit: int) -> AsyncIterator[bytes]:
    """Yield the parts of a request's body, up to a number of bytes."""
    received = 0
    async for part in request.stream():
        received += len(part)
        if received > limit:
            raise HTTPException(413, f"at most {limit} bytes are accepted")
        yield part


async def _zipped(folder: Path, files: Sequence[Path]) -> Response:
    """Return files as a zip file without compression; NIfTI files are compressed already."""
    import secrets

    from starlette.concurrency import run_in_threadpool

    archive = folder / f"{secrets.token_hex(8)}.zip"

    def write() -> None:
        with zipfile.ZipFile(archive, "w") as opened:
            for path in files:
                opened.write(path, path.relative_to(folder / "result"))

    await run_in_threadpool(write)
    removal = BackgroundTask(archive.unlink, missing_ok=True)
    return FileResponse(archive, filename="result.zip", background=removal)


def _output_name(flags: Sequence[str]) -> str:
    """Name of the output among the results, by the kind of output that flags ask for."""
    if any(flag.startswith("dicom_") for flag in flags):
        return "segmentation.dcm"
    return "segmentation.nii.gz" if {"-ml", "--ml"} & {*flags} else "segmentations"
