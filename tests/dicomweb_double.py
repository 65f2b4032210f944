"""A small DICOMweb server in this process, whose answers can be exchanged for faulty ones."""

from __future__ import annotations

import asyncio
import contextlib
import io
import threading
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pydicom
from aiohttp import web
from aiohttp.test_utils import TestServer

ROOT = "/dicom-web"
AUTHORIZATION = "Basic YWxpY2U6c2VjcmV0"  # alice:secret
BOUNDARY = "boundary-of-parts"

Fault = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass
class Double:
    """Studies of a DICOMweb server.

    Parameters
    ----------
    series
        Study and series UID to the bytes of the instances.
    stored
        What was stored, by SOPInstanceUID.
    faults
        Service ("series", "instances", "retrieve", "store") to handlers that answer the next
        requests in place of the right ones.
    requests
        Number of requests by service.
    headers
        Of the requests, by service.
    """

    series: dict[tuple[str, str], list[bytes]] = field(default_factory=lambda: defaultdict(list))
    stored: dict[str, bytes] = field(default_factory=dict)
    faults: dict[str, list[Fault]] = field(default_factory=lambda: defaultdict(list))
    requests: Counter = field(default_factory=Counter)
    headers: dict[str, list] = field(default_factory=lambda: defaultdict(list))

    def add(self, folder: Path) -> tuple[str, str]:
        """Add a folder's DICOM files; return study and series UID of the last one."""
        key = ("", "")
        for path in sorted(folder.iterdir()):
            header = pydicom.dcmread(path, stop_before_pixels=True)
            key = str(header.StudyInstanceUID), str(header.SeriesInstanceUID)
            self.series[key].append(path.read_bytes())
        return key

    def app(self) -> web.Application:
        """Return the application."""
        app = web.Application(client_max_size=1 << 30)
        series = f"{ROOT}/studies/{{study}}/series"
        app.router.add_get(series, self._service("series", self._list_series))
        app.router.add_get(f"{series}/{{series}}", self._service("retrieve", self._retrieve))
        listed = f"{series}/{{series}}/instances"
        app.router.add_get(listed, self._service("instances", self._list_instances))
        app.router.add_post(f"{ROOT}/studies", self._service("store", self._store))
        return app

    def _service(self, name: str, handler: Fault) -> Fault:
        async def serve(request: web.Request) -> web.StreamResponse:
            self.requests[name] += 1
            self.headers[name].append(request.headers.copy())
            if request.headers.get("Authorization") != AUTHORIZATION:
                return web.Response(status=401)
            if self.faults[name]:
                return await self.faults[name].pop(0)(request)
            return await handler(request)

        return serve

    async def _list_series(self, request: web.Request) -> web.Response:
        found = []
        for (study, series), files in self.series.items():
            if study == request.match_info["study"]:
                header = pydicom.dcmread(io.BytesIO(files[0]), stop_before_pixels=True)
                found.append(
                    {
                        "0020000E": {"vr": "UI", "Value": [series]},
                        "00080060": {"vr": "CS", "Value": [header.Modality]},
                        "0008103E": {"vr": "LO", "Value": [header.SeriesDescription]},
                        "00201209": {"vr": "IS", "Value": [len(files)]},
                    }
                )
        return _page(request, found)

    async def _list_instances(self, request: web.Request) -> web.Response:
        found = []
        for file in self.series[request.match_info["study"], request.match_info["series"]]:
            header = pydicom.dcmread(io.BytesIO(file), stop_before_pixels=True)
            found.append({"00080018": {"vr": "UI", "Value": [header.SOPInstanceUID]}})
            if "NumberOfFrames" in header:
                found[-1]["00280008"] = {"vr": "IS", "Value": [int(header.NumberOfFrames)]}
        return _page(request, found)

    async def _retrieve(self, request: web.Request) -> web.StreamResponse:
        files = self.series.get((request.match_info["study"], request.match_info["series"]))
        if files is None:
            return web.Response(status=404)
        return await multipart(request, files)

    async def _store(self, request: web.Request) -> web.Response:
        reader = await request.multipart()
        stored = []
        while (part := await reader.next()) is not None:
            file = bytes(await part.read())
            uid = str(pydicom.dcmread(io.BytesIO(file), stop_before_pixels=True).SOPInstanceUID)
            self.stored[uid] = file
            stored.append(uid)
        return store_answer(stored)


async def multipart(
    request: web.Request, files: list[bytes], *, whole: bool = True, kind: str = "application/dicom"
) -> web.StreamResponse:
    """Answer with files as parts; without the end if it is not whole."""
    response = web.StreamResponse()
    response.headers["Content-Type"] = f'multipart/related; type="{kind}"; boundary={BOUNDARY}'
    await response.prepare(request)
    for file in files:
        head = f"--{BOUNDARY}\r\nContent-Type: {kind}\r\n\r\n".encode()
        await response.write(head + file + b"\r\n")
    if whole:
        await response.write(f"--{BOUNDARY}--\r\n".encode())
    await response.write_eof()
    return response


def store_answer(
    stored: list[str], failed: list[tuple[str, int]] = (), *, status: int = 200
) -> web.Response:
    """Answer of a server that has stored some instances, and not others."""
    referenced = [{"00081155": {"vr": "UI", "Value": [uid]}} for uid in stored]
    refused = [
        {
            "00081155": {"vr": "UI", "Value": [uid]},
            "00081197": {"vr": "US", "Value": [reason]},
        }
        for uid, reason in failed
    ]
    answer = {}
    if referenced:
        answer["00081199"] = {"vr": "SQ", "Value": referenced}
    if refused:
        answer["00081198"] = {"vr": "SQ", "Value": refused}
    return web.json_response(answer, status=status, content_type="application/dicom+json")


def status(number: int, **headers: str) -> Fault:
    """A fault: a status without a body."""

    async def answer(request: web.Request) -> web.Response:
        return web.Response(status=number, headers=headers)

    return answer


@contextlib.contextmanager
def in_thread(double: Double) -> Iterator[str]:
    """Serve from another thread; yield the address."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def wait(coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(30)

    server = TestServer(double.app())
    try:
        wait(server.start_server())
        yield str(server.make_url(ROOT))
        wait(server.close())
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def _page(request: web.Request, found: list) -> web.Response:
    start, count = int(request.query.get("offset", 0)), int(request.query.get("limit", 1000))
    return web.json_response(found[start : start + count], content_type="application/dicom+json")
