"""``totalfast cache``: where files that can be created again are, and how large; clears them."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any, NamedTuple

from totalfast.errors import OutputError
from totalfast.system.cache_entries import (
    LIMIT_GB,
    LIMIT_VARIABLE,
    Entry,
    limit_bytes,
    list_entries,
    remove,
    remove_leftovers,
)
from totalfast.system.cache_folder import FOLDER_VARIABLE, check_cache

if TYPE_CHECKING:
    from pathlib import Path

ABOUT = """\
Show where totalfast keeps files that it can create again, and how large they are. Such files
make the next run start faster. They are never needed: it is safe to clear the cache at any time."""

DETAILS = f"""\
what is kept:
  networks    models that were converted for OpenVINO (--backend openvino). A conversion takes
              seconds per model and run. If they exceed the limit, those that were used least
              recently are removed.
  loops       the compiled loops of --export linear and of cubic resampling, if the installation
              is read-only. They take some seconds to compile.
  compiled    the code that torch compiles for --backend compile.

The folder must belong to you or to root, and nobody else may be able to write to it. Otherwise it
is not used, and each run starts more slowly.

environment:
  {FOLDER_VARIABLE:<22}  folder of the cache
  {LIMIT_VARIABLE:<22}  limit of the converted networks in GB ({LIMIT_GB:g})

examples:
  totalfast cache             where, how much, and the limit
  totalfast cache --json      the same for programs, with sizes in bytes
  totalfast cache clear       remove everything"""


class Kind(NamedTuple):
    """One kind of entries."""

    name: str
    prefix: str
    """Start of the names of their folders."""
    about: str


KINDS = (
    Kind("networks", "openvino-", "networks converted for OpenVINO"),
    Kind("loops", "compiled-loops", "compiled loops"),
    Kind("compiled", "compiled-networks", "networks compiled by torch"),
)


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the subcommand."""
    parser = argparse.ArgumentParser(
        prog="totalfast cache",
        description=ABOUT,
        epilog=DETAILS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "action",
        nargs="?",
        choices=["show", "clear"],
        default="show",
        metavar="show|clear",
        help="What to do; 'show' if nothing is given.",
    )
    add("--clear", action="store_true", help="The same as 'totalfast cache clear'.")
    add("--json", action="store_true", help="Print JSON, with sizes in bytes.")
    add("--debug", action="store_true", help="Show the traceback of an error.")
    return parser


def run(args: argparse.Namespace) -> int:
    """Show the cache, or clear it."""
    folder, reason = check_cache()
    clears = args.clear or args.action == "clear"
    if clears and folder is not None and reason:
        raise OutputError(f"{reason} It was not cleared.")
    limit = limit_bytes()
    found = {kind: [] if folder is None else list_entries(folder, kind.prefix) for kind in KINDS}
    freed = _clear(folder, found) if clears and folder is not None else None
    if args.json:
        print(json.dumps(_as_json(folder, reason, limit, found, freed), indent=2))
    elif freed is not None:
        print(f"Removed {_megabytes(freed)} from {folder}")
    else:
        print(reason or f"Cache folder: {folder}")
        for kind, entries in found.items():
            print(f"  {kind.about}: {_megabytes(_size(entries))} in {len(entries)} entries")
        print(f"Limit of the converted networks: {limit / 1e9:g} GB ({LIMIT_VARIABLE})")
    return 0


def _clear(folder: Path, found: dict[Kind, list[Entry]]) -> int:
    """Remove all entries and leftovers; return the bytes that were freed."""
    remove_leftovers(folder)
    return sum(
        entry.size for entries in found.values() for entry in entries if remove(entry.folder)
    )


def _as_json(
    folder: Path | None,
    reason: str,
    limit: float,
    found: dict[Kind, list[Entry]],
    freed: int | None,
) -> dict[str, Any]:
    content: dict[str, Any] = {
        "folder": None if folder is None else str(folder),
        "used": not reason,
        "reason": reason or None,
        "limit_bytes": int(limit),
    }
    if freed is not None:
        return content | {"freed_bytes": freed}
    kinds = {
        kind.name: {"entries": len(entries), "bytes": _size(entries)}
        for kind, entries in found.items()
    }
    return content | kinds


def _size(entries: list[Entry]) -> int:
    return sum(entry.size for entry in entries)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
