"""A Ray cluster: connect to one, or start Ray on this machine; which nodes there are.

Ray on this machine listens on the loopback only, and a token keeps other users out. It collects no
usage statistics, has no dashboard, and leaves no files.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import socket
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from totalfast.errors import ClusterError, OptionError
from totalfast.system.cores import usable_cores

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

logger = logging.getLogger(__name__)

ADDRESS_VARIABLE = "RAY_ADDRESS"
"""Environment variable with the address of a running cluster, as in Ray's own programs."""

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # No copy of the current folder to the nodes if uv started this process.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    # Ray prints errors of nodes on stdout, which may be read by a program; this skips all of them.
    "RAY_DEDUP_LOGS_SKIP_REGEX": "^",
}
"""Environment variables that Ray reads when it is imported."""

OBJECT_STORE_BYTES = 80 * 1024**2
"""About Ray's minimum. Only cases and entries are sent; Ray would take 30 % of the memory."""

ANSWER_S = 10.0
"""How long to wait for the head of a running cluster; Ray would wait for many minutes."""

LONGEST_FOLDER = 40
"""Length of a path from which Ray's sockets would have names that are too long for the system."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A machine of a cluster.

    Parameters
    ----------
    identity
        Ray's name of the node.
    host
        Name of the machine.
    cores, gpus
        What Ray may use of it.
    """

    identity: str
    host: str
    cores: int
    gpus: int


def alive_nodes() -> list[Node]:
    """List the nodes that are there now."""
    import ray

    return [
        Node(
            identity=node["NodeID"],
            host=node["NodeManagerHostname"],
            cores=int(node["Resources"].get("CPU", 0)),
            gpus=int(node["Resources"].get("GPU", 0)),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Connect to a running cluster, or start Ray on this machine, until the context ends.

    Parameters
    ----------
    address
        Of the cluster's head, such as ``10.0.0.1:6379``, or "auto" for the one that runs on this
        machine. None takes the environment variable ``RAY_ADDRESS``; without it Ray is started.

    Raises
    ------
    OptionError
        If Ray is not installed.
    ClusterError
        If no cluster answers.
    """
    address = address or os.environ.get(ADDRESS_VARIABLE) or "local"
    with contextlib.ExitStack() as stack:
        options: dict[str, Any] = {"address": address}
        variables = dict(QUIET)
        if address == "local":
            folder = stack.enter_context(
                tempfile.TemporaryDirectory(prefix="totalfast-", dir=_short_place())
            )
            options |= _local_options(Path(folder))
            variables |= _local_variables()
        stack.enter_context(_variables_set(variables))
        ray = _import_ray()
        stack.callback(ray.shutdown)
        try:
            _reach(address)
            with _sigterm_kept():
                ray.init(log_to_driver=False, logging_level=logging.CRITICAL, **options)
        except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
            reason = str(error).partition("\n")[0].rstrip(".")
            raise ClusterError(
                f"Ray can't be started on this machine: {reason}."
                if address == "local"
                else f"no Ray cluster can be used at {address}: {reason}. Check --ray-address or "
                f"{ADDRESS_VARIABLE}."
            ) from error
        yield


def _reach(address: str) -> None:
    """Connect to a host and a port for a moment; words such as "auto" are Ray's.

    Raises
    ------
    OSError
        If nothing answers.
    """
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_S).close()


def _import_ray() -> Any:  # noqa: ANN401 - a module
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise OptionError(
            "--engine ray needs Ray, which is not installed: pip install 'totalfast[ray]'"
        ) from error
    return ray


def _local_options(folder: Path) -> dict[str, Any]:
    """Ray opens its folder for all users, so it is put into one that is for this user only."""
    return {
        "include_dashboard": False,
        "num_cpus": usable_cores(),
        "object_store_memory": OBJECT_STORE_BYTES,
        "_temp_dir": str(folder / "ray"),
    }


def _local_variables() -> dict[str, str]:
    return {
        # On Linux Ray listens on all interfaces. This variable makes it a program of one machine,
        # which it always is on macOS and Windows.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }


def _short_place() -> str | None:
    """Folder for temporary folders with a short path; None for the usual one."""
    is_long = os.name == "posix" and len(tempfile.gettempdir()) > LONGEST_FOLDER
    return "/tmp" if is_long else None  # noqa: S108 - for a folder that only this user can open


@contextlib.contextmanager
def _variables_set(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Restore the program's handler of SIGTERM, which Ray replaces by one that calls sys.exit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit:  # raised by Ray's handler
        signal.signal(signal.SIGTERM, handler)
        signal.raise_signal(signal.SIGTERM)
        raise
    finally:
        signal.signal(signal.SIGTERM, handler)
