"""A file that is not completely downloaded yet, and what is known about its source."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from typing import BinaryIO


class PartialFile:
    """An unfinished download at ``path``, which a later request can continue.

    A second file has the URL and the server's validator: a strong ETag or the time of the last
    change. Without a validator a download can't be continued, because the file at the URL may have
    changed.
    """

    def __init__(self, path: Path, url: str) -> None:
        self.path = path
        self._facts_path = path.with_name(f"{path.name}.json")
        self._url = url
        self.validator, self.total = self._read_facts()

    def _read_facts(self) -> tuple[str | None, int | None]:
        try:
            facts = json.loads(self._facts_path.read_text(encoding="utf-8"))
            if facts["url"] == self._url:
                return str(facts["validator"]), int(facts["total"])
        except (OSError, ValueError, LookupError, TypeError):
            pass  # nothing to continue
        return None, None

    @property
    def size(self) -> int:
        """Number of bytes that have arrived."""
        return self.path.stat().st_size if self.path.exists() else 0

    @property
    def offset(self) -> int:
        """Byte from which a request should continue; 0 if it must start anew.

        The last byte is requested again, so that a complete file is compared with the server's too.
        """
        return 0 if self.validator is None else max(min(self.size, self.total or 0) - 1, 0)

    def start(self, headers: Mapping[str, str], total: int | None) -> BinaryIO:
        """Begin anew: forget what has arrived, keep the validator, and open the file."""
        self.remove()
        self.total = total
        self.validator = _validator(headers)
        if self.validator is not None and total is not None:
            facts = {"url": self._url, "validator": self.validator, "total": total}
            self._facts_path.write_text(json.dumps(facts), encoding="utf-8")
        else:
            self.validator = None
        return self.path.open("xb")

    def continues(self, headers: Mapping[str, str], offset: int) -> bool:
        """Whether an answer with status 206 is the rest of this file, from ``offset``."""
        range_ = f"bytes {offset}-{(self.total or 0) - 1}/{self.total}"
        same_file = _validator(headers) in (None, self.validator)
        return same_file and headers.get("Content-Range") == range_

    def reopen(self, offset: int) -> BinaryIO:
        """Open the file for the bytes from ``offset``."""
        stream = self.path.open("r+b")
        stream.truncate(offset)
        stream.seek(offset)
        return stream

    def remove_unless_continuable(self) -> None:
        """Delete what has arrived if a later request can't continue it."""
        if self.validator is None:
            self.remove()

    def remove(self) -> None:
        """Delete the file and its facts."""
        self.validator = self.total = None
        for path in (self.path, self._facts_path):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()


def _validator(headers: Mapping[str, str]) -> str | None:
    """Return what If-Range accepts: a strong ETag, else the time of the last change."""
    etag = headers.get("ETag")
    if etag is not None and not etag.startswith("W/"):
        return etag
    return headers.get("Last-Modified")
