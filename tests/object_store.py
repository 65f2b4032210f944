"""Servers of files for tests: an S3 store (moto), a web server, and a proxy with faults between."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "synthetic",
    "AWS_SECRET_ACCESS_KEY": "synthetic",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}

GCS_CONTENT = "?alt=media"
"""Query with which GCS gives a file; without it, it gives what it knows of the file."""

HOP = {"connection", "keep-alive", "transfer-encoding", "proxy-connection"}
"""Headers that belong to one connection."""


@dataclass
class Fault:
    """What goes wrong with some requests.

    Parameters
    ----------
    kind
        "status": the answer has ``status``; "cut": half of the answer's body arrives, then the
        connection ends; "hang up": the connection ends in the middle of the request.
    method, path
        Which requests; the path is a regular expression.
    times
        How many requests, from the first one.
    """

    kind: str
    method: str
    path: str
    times: int = 1
    status: int = 503

    def hits(self, method: str, path: str) -> bool:
        if self.times and method == self.method and re.search(self.path, path):
            self.times -= 1
            return True
        return False


@dataclass
class Proxy:
    """Hands requests to a server, counts them, and has faults."""

    port: int
    upstream: int
    faults: list[Fault] = field(default_factory=list)
    requests: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Method and path without query to the number of requests."""
    bodies: Counter[str] = field(default_factory=Counter)
    """Path to the number of whole bodies that were sent to the client; with ``GCS_CONTENT``."""
    order: list[tuple[str, str]] = field(default_factory=list)
    """Method and path of each answered request that changed something."""
    is_down: bool = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def forget(self) -> None:
        self.faults.clear()
        self.requests.clear()
        self.bodies.clear()
        self.order.clear()

    def fault(self, method: str, path: str) -> Fault | None:
        return next((each for each in self.faults if each.hits(method, path)), None)


@contextlib.contextmanager
def proxy_to(upstream: int) -> Iterator[Proxy]:
    """Run a proxy in threads of this process."""
    lock = threading.Lock()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def handle_one_request(self) -> None:
            with contextlib.suppress(ConnectionError):
                super().handle_one_request()

        def answer(self) -> None:
            path = self.path.partition("?")[0]
            with lock:
                proxy.requests[self.command, path] += 1
                fault = proxy.fault(self.command, self.path)
            if proxy.is_down or (fault is not None and fault.kind == "hang up"):
                self.rfile.read(min(int(self.headers.get("Content-Length", 0)), 1000))
                self.close_connection = True
                return
            body = self.body()
            if fault is not None and fault.kind == "status":
                self.send_response(fault.status)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            status, headers, content = self.ask(body)
            is_cut = fault is not None and fault.kind == "cut"
            with lock:
                if self.command == "GET" and status in (200, 206) and not is_cut:
                    proxy.bodies[path + GCS_CONTENT * (GCS_CONTENT in self.path)] += 1
                if self.command in ("PUT", "POST", "DELETE"):
                    proxy.order.append((self.command, path))
            self.send_response_only(status)
            for name, value in headers:
                if name.lower() not in HOP | {"content-length"}:
                    self.send_header(name, value)
            length = dict(headers).get("Content-Length", str(len(content)))
            self.send_header("Content-Length", length)
            self.end_headers()
            if self.command == "HEAD":
                return
            if is_cut:
                self.wfile.write(content[: len(content) // 2])
                self.close_connection = True
                return
            self.wfile.write(content)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass
            return b"".join(parts)

        def ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
            connection = http.client.HTTPConnection("127.0.0.1", proxy.upstream, timeout=60)
            kept = {n: v for n, v in self.headers.items() if n.lower() not in HOP | {"expect"}}
            kept["Content-Length"] = str(len(body))
            connection.putrequest(
                self.command, self.path, skip_host=True, skip_accept_encoding=True
            )
            for name, value in kept.items():
                connection.putheader(name, value)
            connection.endheaders(body)
            response = connection.getresponse()
            content = response.read()
            connection.close()
            return response.status, response.getheaders(), content

    with _serving(Handler) as port:
        proxy = Proxy(port=port, upstream=upstream)
        yield proxy


@contextlib.contextmanager
def _serving(handler: type[http.server.BaseHTTPRequestHandler]) -> Iterator[int]:
    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True
        block_on_close = False

        def handle_error(self, *_: object) -> None:
            pass

    server = Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextlib.contextmanager
def moto_server(log: Path) -> Iterator[int]:
    """Run moto's server of S3 in a process of its own."""
    port = free_port()
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
        try:
            wait_for(port, process)
            yield port
        finally:
            process.terminate()
            process.wait()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_for(port: int, process: subprocess.Popen[bytes], seconds: float = 60.0) -> None:
    until_s = time.monotonic() + seconds
    while time.monotonic() < until_s:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode}")
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.1)
    raise RuntimeError("the server does not listen")


@contextlib.contextmanager
def web_server(
    folder: Path, *, ranges: bool, headers: dict[str, str] | None = None
) -> Iterator[str]:
    """Serve a folder; without ranges each answer is the whole file."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments, directory=str(folder))  # type: ignore[arg-type]

        def log_message(self, *_: object) -> None:
            pass

        def end_headers(self) -> None:
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            super().end_headers()

        def do_GET(self) -> None:
            wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            path = Path(self.translate_path(self.path))
            if not ranges or wanted is None or not path.is_file():
                super().do_GET()
                return
            data = path.read_bytes()
            start, end = int(wanted[1]), int(wanted[2] or len(data) - 1)
            part = data[start : end + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{start + len(part) - 1}/{len(data)}")
            self.send_header("Content-Length", str(len(part)))
            self.end_headers()
            self.wfile.write(part)

    with _serving(Handler) as port:
        yield f"http://127.0.0.1:{port}"
