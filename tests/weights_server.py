"""A web server on this machine that misbehaves on purpose, and small models for it to send."""

from __future__ import annotations

import contextlib
import http.server
import io
import json
import re
import threading
import zipfile
from collections.abc import Callable, Iterator

from totalfast.models.weights import official_model
from totalfast.tasks import resolve_task

_TASK = resolve_task("total", fast=True)
MODEL = official_model(_TASK, _TASK.parts[0])
"""Model 297, of total --fast."""

Answer = Callable[["Handler"], None]


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers each request by the server's next answer; the last one is used again."""

    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_):
        pass

    def do_GET(self):
        with self.server.counting:
            number = len(self.server.requests)
            self.server.requests.append((self.command, self.path, dict(self.headers)))
        length = int(self.headers.get("Content-Length", 0))
        self.server.bodies.append(json.loads(self.rfile.read(length)) if length else None)
        with contextlib.suppress(OSError):
            self.server.answers[min(number, len(self.server.answers) - 1)](self)

    do_POST = do_GET

    def send(self, content: bytes, *, status=200, length=None, **headers):
        """Send a status, headers (``ETag="x"``) and content, then close the connection."""
        self.close_connection = True
        self.send_response(status)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)
        self.wfile.flush()


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, *answers: Answer):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.requests, self.bodies = answers, [], []
        self.counting, self.ended = threading.Lock(), threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"


@contextlib.contextmanager
def serve(*answers: Answer) -> Iterator[Server]:
    server = Server(*answers)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.ended.set()
        server.shutdown()
        server.server_close()


def whole(content: bytes, **headers: str) -> Answer:
    """Send everything; with an ETag, also the ranges that are asked for."""

    def answer(handler: Handler):
        asked = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
        if asked and handler.headers["If-Range"] in headers.values():
            start, size = int(asked.group(1)), len(content)
            place = f"bytes {start}-{size - 1}/{size}"
            handler.send(content[start:], status=206, Content_Range=place, **headers)
        else:
            handler.send(content, **headers)

    return answer


def broken_after(count: int, content: bytes, **headers: str) -> Answer:
    """Send the whole length in the header, ``count`` bytes, and close the connection."""
    return lambda handler: handler.send(content[:count], length=len(content), **headers)


def status(number: int) -> Answer:
    return lambda handler: handler.send(b"no", status=number)


def silent_after(count: int, content: bytes) -> Answer:
    """Send some bytes, then nothing, but keep the connection."""

    def answer(handler: Handler):
        handler.send(content[:count], length=len(content))
        handler.server.ended.wait(30)

    return answer


def model_files(*, folds=(0,), checkpoint=bytes(range(256)) * 2000) -> dict[str, bytes]:
    """Name to content of a model's files; random enough to be as long when compressed."""
    top = f"{MODEL.dataset.name}/{MODEL.folder_name}"
    files = {f"{top}/plans.json": b'{"a": 1}', f"{top}/dataset.json": b'{"b": 2}'}
    files |= {f"{top}/fold_{fold}/checkpoint_final.pth": checkpoint for fold in folds}
    return files


def zipped(files: dict[str, bytes], *, method=zipfile.ZIP_STORED, level=None) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", method, compresslevel=level) as zip_file:
        for name, content in files.items():
            zip_file.writestr(name, content)
    return target.getvalue()
