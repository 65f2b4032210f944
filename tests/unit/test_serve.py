"""The server and its client without scans: frames, places, who may connect, order, ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import stat
import threading
import time
from pathlib import Path

import pytest

from totalfast.errors import OptionError
from totalfast.serve import client, peers, places, server
from totalfast.serve.client import NotServed, ServerLost, absolute_paths, open_run
from totalfast.serve.conditions import conditions, differing
from totalfast.serve.frames import LENGTH, MAX_BYTES, FrameError, FrameSocket, encode, length_of
from totalfast.serve.listening import listening
from totalfast.serve.places import LOOPBACK, Place, make_private, place_of, read_token, write_token
from totalfast.serve.run_queue import RunQueue
from totalfast.serve.runs import Ending
from totalfast.serve.server import Server

pytestmark = pytest.mark.skipif(not places.HAS_UNIX_SOCKETS, reason="needs Unix sockets")

logger = logging.getLogger("totalfast.test_of_serve")


@pytest.fixture
def folder(monkeypatch):
    """A short path, because that of a socket is limited to about 100 bytes; the runtime folder."""
    import shutil
    import tempfile

    path = Path(tempfile.mkdtemp(prefix="tf", dir="/tmp"))
    monkeypatch.setattr("platformdirs.user_runtime_dir", lambda *_, **__: str(path / "run"))
    yield path
    shutil.rmtree(path)


class Running:
    """A server in a thread of this process."""

    def __init__(self, job, place, *, idle_s=None, at_a_time=1, queue=100, found=None):
        self.seconds, self._began = None, time.monotonic()
        self._ready, self._stack = threading.Event(), contextlib.ExitStack()
        opened, self.place, token = self._stack.enter_context(listening(place))
        self._limits = {"at_a_time": at_a_time, "waiting": queue}
        self._idle_s = idle_s
        found = found or conditions()
        arguments = (job, opened, token, found)
        self.thread = threading.Thread(target=lambda: asyncio.run(self._serve(*arguments)))
        self.thread.start()
        assert self._ready.wait(10)

    async def _serve(self, job, opened, token, found):
        queue = RunQueue(job, **self._limits)
        self.server = Server(queue, conditions=found, token=token, idle_s=self._idle_s)
        self._loop = asyncio.get_running_loop()
        self._ready.set()
        with self._stack:
            await self.server.serve(opened)
        self.seconds = time.monotonic() - self._began

    def stop(self):
        with contextlib.suppress(RuntimeError):  # it has ended
            self._loop.call_soon_threadsafe(self.server.stop)
        self.thread.join(20)
        assert not self.thread.is_alive()


@pytest.fixture
def serving(folder):
    """Start servers; each is stopped at the end."""
    running = []

    def start(job, place=None, **keywords):
        place = place or Place(socket=folder / "s.sock")
        running.append(Running(job, place, **keywords))
        return running[-1]

    yield start
    for one in running:
        one.stop()


def says(text):
    """A job that logs a line."""

    def job(words, paths, progress):
        logger.info("%s %s", text, " ".join(words))
        return Ending(code=len(words), error="")

    return job


def ended(where, *words):
    with open_run(str(where), words, {}) as run:
        return list(run.events())


# Frames


def test_a_frame_arrives_whole_when_it_comes_in_pieces():
    ours, theirs = socket.socketpair()
    sent = encode({"event": "log", "text": "ä" * 5000})
    with FrameSocket(ours) as frames, theirs:
        thread = threading.Thread(
            target=lambda: [theirs.sendall(sent[i : i + 997]) for i in range(0, len(sent), 997)]
        )
        thread.start()
        assert frames.receive() == {"event": "log", "text": "ä" * 5000}
        thread.join()
        theirs.sendall(encode({"a": 1}) + encode({"b": 2}) + b"\0")
        theirs.shutdown(socket.SHUT_WR)
        assert [frames.receive(), frames.receive(), frames.receive()] == [{"a": 1}, {"b": 2}, None]


@pytest.mark.parametrize("text", [b"[1]", b"nonsense", b"\xff", b"[" * 100_000, b""])
def test_what_is_no_object_is_refused(text):
    ours, theirs = socket.socketpair()
    with FrameSocket(ours) as frames, theirs:
        thread = threading.Thread(target=theirs.sendall, args=(LENGTH.pack(len(text)) + text,))
        thread.start()
        with pytest.raises(FrameError):
            frames.receive()
        thread.join()


def test_an_oversized_frame_is_refused_before_it_is_received():
    assert length_of(LENGTH.pack(MAX_BYTES)) == MAX_BYTES
    with pytest.raises(FrameError, match="too large"):
        length_of(LENGTH.pack(MAX_BYTES + 1))


# Places


def test_places_are_on_this_machine(folder):
    assert place_of("127.0.0.1:80") == place_of("localhost:80") == Place(port=80)
    assert place_of("/a/b.sock") == Place(socket=Path("/a/b.sock"))
    assert place_of("/a/b:80") == Place(socket=Path("/a/b:80"))
    assert place_of("auto") == Place(socket=folder / "run" / "server.sock")
    for other in ("example.com:80", "0.0.0.0:80", "192.168.0.1:1"):
        with pytest.raises(OptionError, match="on this machine"):
            place_of(other)


def test_the_runtime_folder_must_be_private(folder, monkeypatch):
    make_private(folder / "new" / "one")
    assert stat.S_IMODE((folder / "new" / "one").stat().st_mode) == 0o700
    (folder / "open").mkdir(mode=0o755)
    (folder / "link").symlink_to(folder / "new" / "one")
    (folder / "public").mkdir()
    (folder / "public").chmod(0o777)
    for bad in ("open", "link", "public/below"):
        with pytest.raises(OptionError, match="not safe"):
            make_private(folder / bad)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(OptionError, match="belongs to another user"):
        make_private(folder / "new" / "one")


def test_a_token_is_private_and_new_each_time(folder):
    file = folder / "run" / "port-1.token"
    token = write_token(file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert read_token(file) == token
    assert write_token(file) != token
    file.chmod(0o644)
    with pytest.raises(OptionError, match="not private"):
        read_token(file)


# Who is served


def test_a_run_is_handed_over_and_its_log_comes_back(serving):
    logging.getLogger("totalfast").setLevel(logging.DEBUG)
    place = serving(says("done:")).place
    events = ended(place, "-i", "a")
    assert [event["event"] for event in events] == ["begun", "log", "ended"]
    assert events[1]["text"] == "done: -i a"
    assert events[2]["code"] == 2


def test_a_port_needs_its_token(serving, folder):
    place = serving(says("x"), Place(port=0)).place
    assert str(place).startswith(f"{LOOPBACK}:")
    assert ended(place)[-1]["code"] == 0
    place.token_file.write_text("0" * 64)
    with pytest.raises(NotServed, match="token"):
        ended(place)
    place.token_file.write_text("\udc80".encode(errors="surrogatepass").decode("latin-1"))
    with pytest.raises(NotServed, match="token"):
        ended(place)
    place.token_file.unlink()
    with pytest.raises(NotServed, match="no server answers"):
        ended(place)


def test_another_users_process_is_not_served(serving, monkeypatch):
    place = serving(says("x")).place
    monkeypatch.setattr(server, "is_other_user", lambda _: True)
    with pytest.raises(NotServed):
        ended(place)
    monkeypatch.undo()


def test_another_users_server_gets_no_run(serving, monkeypatch):
    place = serving(says("x")).place
    monkeypatch.setattr(client, "is_other_user", lambda _: True)
    with pytest.raises(NotServed, match="another user"):
        ended(place)


def test_the_peers_user_is_known():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert peers.peer_user(ours) in (os.geteuid(), None)
        assert not peers.is_other_user(ours)


def test_other_conditions_are_named_and_refused(serving):
    found = {**conditions(), "TOTALSEG_HOME_DIR": "/elsewhere", "the version of totalfast": "0.0"}
    place = serving(says("x"), found=found).place
    with pytest.raises(NotServed, match="TOTALSEG_HOME_DIR, the version of totalfast differs"):
        ended(place)


def test_conditions_are_those_that_change_a_run(monkeypatch):
    before = conditions()
    monkeypatch.setenv("TOTALFAST_SERVER", "auto")
    monkeypatch.setenv("LANG", "xx")
    assert not differing(conditions(), before)
    monkeypatch.setenv("TOTALFAST_OFFLINE", "1")
    assert differing(conditions(), before) == ["TOTALFAST_OFFLINE"]
    umask = os.umask(0o027)
    try:
        assert differing(conditions(), before) == ["TOTALFAST_OFFLINE", "the umask"]
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(umask)


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        LENGTH.pack(MAX_BYTES + 1),
        LENGTH.pack(3) + b"[1]",
        encode({}),
        encode({"conditions": {}, "words": "x", "paths": {}}),
        encode({"conditions": {"a": 1}, "words": [], "paths": {}}),
        encode({"conditions": {}, "words": [1], "paths": []}),
        b"",
    ],
)
def test_malformed_requests_do_no_harm(serving, sent):
    place = serving(says("x")).place
    with socket.socket(socket.AF_UNIX) as raw:
        raw.connect(str(place))
        raw.sendall(sent)
        raw.shutdown(socket.SHUT_WR)
        raw.settimeout(5)
        with contextlib.suppress(ConnectionError):
            while raw.recv(4096):
                pass
    assert ended(place, "a")[-1]["code"] == 1


def test_unknown_fields_are_ignored(serving, monkeypatch):
    place = serving(says("x")).place
    with socket.socket(socket.AF_UNIX) as raw:
        raw.connect(str(place))
        request = {"conditions": conditions(), "words": [], "paths": {}, "new": [1]}
        raw.sendall(encode(request))
        frames = FrameSocket(raw)
        assert [frames.receive()["event"] for _ in range(2)] == ["queued", "begun"]


def test_paths_of_a_process_of_its_own_are_not_handed_over():
    with pytest.raises(NotServed, match="/dev/fd/63 can't be handed over"):
        open_run("/nowhere", [], {"input": "/dev/fd/63"})


def test_arguments_that_are_paths_become_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    from totalfast.cli.parser import build_parser

    words = ["-i", "a", "-o", "b", "-s", "c.json", "-rp", "d.json", "-sp", "e.npz", "-cp", "f"]
    args = vars(build_parser().parse_args(words))
    assert absolute_paths(args) == {
        "input": str(tmp_path / "a"),
        "output": str(tmp_path / "b"),
        "statistics": str(tmp_path / "c.json"),
        "report": str(tmp_path / "d.json"),
        "save_probabilities": str(tmp_path / "e.npz"),
        "crop_path": str(tmp_path / "f"),
    }
    assert "statistics" not in absolute_paths({"statistics": True})


# Order, cancelling, and errors


class Gate:
    """A job that waits until it is let go, or cancelled."""

    def __init__(self):
        self.began, self.open = [], threading.Event()

    def __call__(self, words, paths, progress):
        self.began.append(words[0])
        with progress:
            while not self.open.is_set():
                progress.advance(1.0)
                time.sleep(0.005)
        return Ending(code=0)

    def wait_for(self, *names):
        end = time.monotonic() + 10
        while self.began != list(names):
            assert time.monotonic() < end, self.began
            time.sleep(0.005)


def test_runs_are_done_in_order(serving):
    gate = Gate()
    place = serving(gate).place
    with contextlib.ExitStack() as opened:
        runs = [opened.enter_context(open_run(str(place), [name], {})) for name in "abcd"]
        gate.wait_for("a")
        gate.open.set()
        for run in runs:
            assert list(run.events())[-1]["code"] == 0
    assert gate.began == list("abcd")


def test_a_client_that_is_gone_ends_its_run_and_leaves_the_queue(serving):
    gate = Gate()
    place = serving(gate).place
    running = open_run(str(place), ["a"], {})
    gate.wait_for("a")
    waiting = open_run(str(place), ["b"], {})
    with open_run(str(place), ["c"], {}) as last:
        waiting.__exit__(None, None, None)
        time.sleep(0.1)
        running.__exit__(None, None, None)
        gate.wait_for("a", "c")
        gate.open.set()
        assert list(last.events())[-1]["code"] == 0


def test_cancelling_waits_for_the_end(serving):
    gate = Gate()
    place = serving(gate).place
    with open_run(str(place), ["a"], {}) as run, open_run(str(place), ["b"], {}) as waiting:
        gate.wait_for("a")
        assert waiting.cancel()["code"] == 130
        assert run.cancel()["code"] == 130
    gate.open.set()
    assert ended(place, "c")[-1]["code"] == 0
    assert gate.began == ["a", "c"]


def test_a_full_queue_refuses(serving):
    gate = Gate()
    place = serving(gate, queue=1).place
    with (
        open_run(str(place), ["a"], {}),
        open_run(str(place), ["b"], {}),
        pytest.raises(NotServed, match="1 runs are waiting"),
    ):
        open_run(str(place), ["c"], {})


@pytest.mark.parametrize("error", [MemoryError, RuntimeError, SystemExit])
def test_a_job_that_raises_does_not_end_the_server(serving, error):
    def job(words, paths, progress):
        if words:
            raise error
        return Ending(code=0)

    place = serving(job).place
    last = ended(place, "x")[-1]
    assert last["code"] == 1
    assert error.__name__ in last["error"]
    assert ended(place)[-1]["code"] == 0


def test_a_client_that_does_not_read_holds_nothing_up(serving, monkeypatch):
    monkeypatch.setattr(server, "UNSENT_BYTES", 100_000)

    def job(words, paths, progress):
        with progress:
            for number in range(300 if words[0] == "much" else 1):
                progress.stage(f"{number}" * 1000)
                time.sleep(0.001)
        return Ending(code=0)

    place = serving(job).place
    with open_run(str(place), ["much"], {}):
        assert ended(place, "little")[-1]["code"] == 0


# Beginning and end


def test_a_stopped_server_tells_its_clients(serving):
    gate = Gate()
    started = serving(gate)
    with (
        open_run(str(started.place), ["a"], {}) as run,
        open_run(str(started.place), ["b"], {}) as waiting,
    ):
        gate.wait_for("a")
        began = time.monotonic()
        started.stop()
        assert time.monotonic() - began < 5
        last = list(run.events())[-1]
        assert last["code"] == 1
        assert "the server was stopped" in last["error"]
        with pytest.raises(NotServed, match="the server ends"):
            list(waiting.events())
    assert not started.place.socket.exists()
    with pytest.raises(NotServed, match="no server answers"):
        ended(started.place)


def test_a_lost_server_is_told_apart_by_whether_the_run_had_begun():
    for sent, kind in (([], NotServed), (["begun"], ServerLost)):
        ours, theirs = socket.socketpair()
        with client.ServedRun(FrameSocket(ours)) as run:
            with theirs:
                for event in sent:
                    theirs.sendall(encode({"event": event}))
            with pytest.raises(kind):
                list(run.events())


def test_an_idle_server_ends_and_removes_its_socket(serving):
    started = serving(says("x"), idle_s=0.6)
    time.sleep(0.4)
    ended(started.place)
    started.thread.join(10)
    assert 0.9 < started.seconds < 3
    assert not started.place.socket.exists()


def test_a_port_and_its_token_are_removed(serving):
    started = serving(says("x"), Place(port=0), idle_s=0.1)
    started.thread.join(10)
    assert not started.place.token_file.exists()


def test_a_second_server_is_refused_while_the_first_is_alive(serving):
    place = serving(says("first")).place
    with pytest.raises(OptionError, match="already running"), listening(place):
        pass
    assert ended(place, "a")[-1]["code"] == 1
    port = serving(says("x"), Place(port=0)).place
    token = port.token_file.read_text()
    with pytest.raises(OptionError, match="can't be used"), listening(port):
        pass
    assert port.token_file.read_text() == token


def test_a_dead_servers_socket_is_taken_over(serving, folder):
    path = folder / "s.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    assert path.exists()
    assert ended(serving(says("x")).place)[-1]["code"] == 0


def test_another_file_is_not_replaced_by_a_socket(folder):
    file = folder / "s.sock"
    file.write_text("important")
    with pytest.raises(OptionError, match="no socket"), listening(Place(socket=file)):
        pass
    assert file.read_text() == "important"
    missing = Place(socket=folder / "missing" / "s.sock")
    with pytest.raises(OptionError, match="can't be created"), listening(missing):
        pass


def test_only_the_user_can_open_the_socket(serving):
    path = serving(says("x")).place.socket
    assert stat.S_IMODE(path.lstat().st_mode) & 0o077 == 0
