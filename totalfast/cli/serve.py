"""``totalfast serve``: a resident process that does the runs of ``totalfast`` commands."""

from __future__ import annotations

import argparse
import asyncio
import logging
import shlex
import signal
import threading
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from totalfast import upstream
from totalfast.backends.devices import validate_device
from totalfast.cli.console import configure_output
from totalfast.cli.exit_codes import failure
from totalfast.cli.segment import segment_scan
from totalfast.cli.serve_http import add_http_flags, http_serving, open_http, seconds
from totalfast.cli.serve_requests import parse_quietly
from totalfast.errors import OptionError, TotalfastError
from totalfast.serve.places import HAS_UNIX_SOCKETS, SERVER_VARIABLE, Place, default_place
from totalfast.system.signals import ENDING_SIGNALS
from totalfast.weights.bar import downloads_shown_by

if TYPE_CHECKING:
    import socket
    from collections.abc import Mapping

    from totalfast.cli.serve_http import Http
    from totalfast.serve.runs import Ending, Job
    from totalfast.serve.server import Server
    from totalfast.session import Session
    from totalfast.system.progress import Progress
    from totalfast.tasks import Task

ABOUT = """\
Keep models loaded in a resident process, and do the runs of 'totalfast -i ... -o ...' commands, so
that they start without delay.

Commands hand their runs over if the environment variable TOTALFAST_SERVER is set: to the path of
the socket, to 127.0.0.1:PORT, or to 'auto' for the default socket. Flags, files, messages and exit
codes stay the same. If no server answers, or if the command's environment (version,
TOTALSEG_HOME_DIR, umask, ...) is not the server's, the command runs in its own process and says so.

Only processes of the same user on this machine can use the server."""

EXAMPLES = """\
examples:
  totalfast serve --preload fast &
  export TOTALFAST_SERVER=auto
  totalfast -i ct.nii.gz -o segmentations --fast"""

IDLE_S = 15 * 60.0
"""Default of --idle without --http."""

FORMAT = "%(asctime)s %(message)s"
"""Of lines in a log file."""

logger = logging.getLogger("totalfast.serve")


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the subcommand."""
    parser = argparse.ArgumentParser(
        prog="totalfast serve",
        description=ABOUT,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    place = parser.add_mutually_exclusive_group().add_argument
    place(
        "--socket",
        type=lambda text: Path(text).absolute(),
        metavar="PATH",
        help="Listen on this Unix socket (default: server.sock in the user's runtime folder).",
    )
    place(
        "--port",
        type=int,
        metavar="N",
        help="Listen on this port of 127.0.0.1 instead; 0 lets the system choose. Clients read a "
        "token from a file that only this user can read.",
    )
    add_http_flags(parser)
    add = parser.add_argument
    add(
        "--idle",
        type=seconds,
        default=argparse.SUPPRESS,
        metavar="TIME",
        help="End after this time without a run, such as 90s, 2h or never. Default: 15m; with "
        "--http never.",
    )
    add("--max-models", type=_count, metavar="N", help="Most models that stay loaded (10).")
    add(
        "-d",
        "--device",
        default="gpu",
        help="Device of preloaded models (default: gpu). Commands choose theirs with their own -d.",
    )
    add("--queue", type=int, default=100, metavar="N", help="Most runs that may wait (100).")
    add(
        "--at-a-time",
        type=_count,
        metavar="N",
        help="Runs in work at a time (default: 3, more with a GPU). Their networks take turns.",
    )
    add(
        "--preload",
        type=lambda text: text.split(","),
        default=[],
        metavar="TASKS",
        help="Load the models of these tasks at the start, such as total,fast,body:fast.",
    )
    add("--log-file", type=Path, metavar="PATH", help="Also append the log of runs to this file.")
    add("-q", "--quiet", action="store_true", help="Print nothing.")
    add("--debug", action="store_true", help="Show the traceback of an error.")
    return parser


def run(args: argparse.Namespace) -> int:
    """Serve until the server is idle or a signal stops it."""
    from totalfast.models.store import MAX_MODELS
    from totalfast.serve.conditions import conditions
    from totalfast.serve.listening import listening
    from totalfast.session import Session

    validate_device(args.device)
    if args.queue < 0:
        raise OptionError(f"--queue must be 0 or more, not {args.queue}.")
    tasks = [_task(name) for name in args.preload]
    found = conditions()
    # It is not closed: the process ends, while a cancelled run may still import torch.
    session = Session(
        device=args.device, max_models=args.max_models or MAX_MODELS, follow_modality=True
    )
    with ExitStack() as stack:
        opened, place, token = stack.enter_context(listening(_place(args)))
        _configure_log(args)
        http = open_http(args, stack)
        if not args.quiet:
            use = f"export {SERVER_VARIABLE}={shlex.quote(str(place))}"
            print(f"Ready; in another terminal: {use}", flush=True)
            if http is not None:
                print(f"HTTP: {http.url}, token in {http.token_file}", flush=True)
        if tasks:
            arguments = (session, tasks, args.device)
            threading.Thread(target=_preload, args=arguments, daemon=True).start()
        asyncio.run(_serve(args, opened, _job_of(session), found, token, http))
    return 0


async def _serve(
    args: argparse.Namespace,
    opened: socket.socket,
    job: Job,
    found: Mapping[str, str],
    token: str | None,
    http: Http | None,
) -> None:
    from totalfast.serve.run_queue import RunQueue
    from totalfast.serve.server import Server
    from totalfast.session import runs_at_a_time

    at_a_time = args.at_a_time or runs_at_a_time(args.device)
    idle_s = vars(args).get("idle", IDLE_S if args.http is None else None)
    queue = RunQueue(job, at_a_time=at_a_time, waiting=args.queue)
    server = Server(queue, conditions=found, token=token, idle_s=idle_s)
    _stop_on_signals(server)
    async with AsyncExitStack() as stack:
        if http is not None:
            await stack.enter_async_context(http_serving(http, queue, args))
        await server.serve(opened)


def _stop_on_signals(server: Server) -> None:
    """Stop the server on the signals that end a process, but not on ignored ones (nohup)."""
    loop = asyncio.get_running_loop()
    for number in ENDING_SIGNALS:
        if signal.getsignal(number) in (None, signal.SIG_IGN):
            continue
        try:
            loop.add_signal_handler(number, server.stop)
        except NotImplementedError:  # Windows
            signal.signal(number, lambda *_: loop.call_soon_threadsafe(server.stop))


def _job_of(session: Session) -> Job:
    """Return the function that does the run of a client's command line."""
    from totalfast.serve.runs import Ending

    def job(words: tuple[str, ...], paths: Mapping[str, str], progress: Progress) -> Ending:
        try:
            args = parse_quietly(words)
        except OptionError as error:
            return Ending(code=2, error=f"ERROR: {error}")
        if args.list_tasks or args.list_classes or args.input is None or args.output is None:
            return Ending(code=2, error="ERROR: the server only segments scans.")
        for name, path in paths.items():
            value = getattr(args, name, None)
            if isinstance(value, Path):
                setattr(args, name, Path(path))
            elif name == "statistics" and isinstance(value, str):
                args.statistics = path
        upstream.warn_of_untested_version.cache_clear()  # each client sees it
        session.models.announce_anew()
        try:
            with downloads_shown_by(progress):
                return Ending(code=segment_scan(args, session, progress))
        except Exception as error:  # noqa: BLE001 - it ends the run, not the server
            code, lines = failure(error, args)
            return Ending(code=code, error=lines)

    return job


def _configure_log(args: argparse.Namespace) -> None:
    """Print the server's own lines; everything else is for the clients."""
    configure_output(quiet=args.quiet, verbose=True)
    root = logging.getLogger("totalfast")
    if args.log_file is not None:
        to_file = logging.FileHandler(args.log_file, encoding="utf-8", errors="backslashreplace")
        to_file.setFormatter(logging.Formatter(FORMAT))
        root.addHandler(to_file)
    for handler in root.handlers:
        handler.setLevel(logging.CRITICAL if args.quiet and handler is root.handlers[0] else "INFO")
        handler.addFilter(logging.Filter(logger.name))
    root.setLevel(logging.DEBUG)  # clients choose what they print


def _preload(session: Session, tasks: list[Task], device: str) -> None:
    """Load the models of tasks; what fails is left to the runs."""
    from totalfast.models.weights import ensure_parts, parts_of

    try:
        for task in tasks:
            ensure_parts(task, quiet=True)
            for needed, part in parts_of(task):
                session.models.take(needed, part, device=device)
            logger.info("the models of %s are loaded", task.name)
    except (TotalfastError, OSError, MemoryError, RuntimeError) as error:
        logger.warning("WARNING: models are not preloaded: %s", error)


def _place(args: argparse.Namespace) -> Place:
    if args.port is not None:
        return Place(port=args.port)
    if args.socket is not None:
        if not HAS_UNIX_SOCKETS:
            raise OptionError("this system has no Unix sockets; use --port.")
        return Place(socket=args.socket)
    return default_place() if HAS_UNIX_SOCKETS else Place(port=0)


def _task(name: str) -> Task:
    """The task of a word of --preload: a task, fast, fastest, or a task with one of them."""
    from totalfast.options import Options

    task, _, size = name.rpartition(":") if ":" in name else (name, "", "")
    if task in ("fast", "fastest"):
        task, size = "total", task
    if task not in upstream.TASKS or size not in ("", "fast", "fastest"):
        raise OptionError(
            f"--preload does not know '{name}'; use a task, fast, fastest, or TASK:fast."
        )
    return Options.from_keywords(
        {"task": task, "fast": size == "fast", "fastest": size == "fastest"}
    ).resolved_task()


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, not {number}.")
    return number
