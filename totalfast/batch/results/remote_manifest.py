"""The manifest of a batch whose results are elsewhere.

It works on a copy on this disk, which is uploaded from time to time. What a killed batch did after
its last upload is known from the completion markers, which hold the entries of their cases.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from totalfast.batch.remote.files import (
    AT_A_TIME,
    download,
    files_below,
    files_in,
    for_each,
    look_at,
    read,
    remove,
    write,
)
from totalfast.batch.remote.place import Remote
from totalfast.batch.results.entries import DONE, FILE_NAME, Entry
from totalfast.batch.results.manifest import Manifest, is_marker
from totalfast.batch.transfers import STAMP, name_in, named_elsewhere
from totalfast.batch.work_folders import work_folder
from totalfast.errors import InputError, OptionError, OutputError, TotalfastError
from totalfast.system.disk import kept_if_used
from totalfast.system.rescue import new_rescue_folder

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path
    from types import TracebackType

    from totalfast.batch.finding.cases import Case
    from totalfast.batch.remote.files import RemoteFile
    from totalfast.batch.remote.place import Place

logger = logging.getLogger(__name__)

UPLOAD_EVERY_S = 30.0
"""Time between two uploads of the manifest."""

LONGEST_SHARE = 10
"""Uploads of a long manifest may take one part in ten of the time."""


@contextlib.contextmanager
def opened_manifest(
    place: Place, options: Mapping[str, object], *, part: tuple[int, int] = (0, 1)
) -> Iterator[Manifest]:
    """Open the manifest of a batch's folder of results, here or elsewhere.

    The parameters and errors are those of ``Manifest``. A folder on this disk is removed at the end
    if it is empty.
    """
    if isinstance(place, Remote):
        with work_folder() as folder, RemoteManifest(place, folder, options, part=part) as manifest:
            yield manifest
        return
    with kept_if_used(place), Manifest(place, options, part=part) as manifest:
        yield manifest


class RemoteManifest(Manifest):
    """The manifest in a folder elsewhere, for one process.

    Parameters
    ----------
    place
        The batch's folder of results.
    folder
        An empty folder on this disk.
    options, part
        As for ``Manifest``.

    Raises
    ------
    OptionError
        As for ``Manifest``, and if nothing can be written to the protocol.
    OutputError
        If the folder can't be written to.
    InputError
        If the folder can't be read.
    TransferError
        If it can't be read now.

    Notes
    -----
    There are no locks elsewhere: two processes of one part are not noticed, and two batches with
    different options are not if they start at the same time.
    """

    def __init__(
        self,
        place: Remote,
        folder: Path,
        options: Mapping[str, object],
        *,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        if place.scheme in ("http", "https"):
            raise OptionError(
                f"{place} can't be written to; name a folder, or a place such as s3://bucket/out."
            )
        self.place = place
        self._copies: dict[str, RemoteFile] = {}
        """Manifests that were downloaded."""
        self._is_changed, self._stop = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        children = files_in(place)
        self._present = {each.remote.name for each in children}
        """What there was at the start."""
        self._copy_manifests(children, folder)
        with named_elsewhere({folder: place}):
            super().__init__(folder, options, part=part)
        if self.file.name not in self._copies:  # shows that the place can be written to
            write(place / self.file.name, self.file.read_bytes())

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        try:
            self._upload_last(is_interrupted=kind is not None)
        finally:
            super().__exit__(kind, error, traceback)

    def _forget(self) -> None:
        super()._forget()
        if not self.file.exists():
            with contextlib.suppress(TotalfastError):
                remove(self.place / self.file.name)

    def _copy_manifests(self, children: Iterable[RemoteFile], folder: Path) -> None:
        """Download the manifests that changed."""
        for file in children:
            name = file.remote.name
            if FILE_NAME.fullmatch(name) and file != self._copies.get(name):
                download(file, folder / name)
                self._copies[name] = file

    def add(self, entry: Entry) -> None:
        """Add an entry; it is on this disk when this returns, and elsewhere soon."""
        super().add(entry)
        self._is_changed.set()
        with self._threads:
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._upload_often, name="totalfast-manifest", daemon=True
                )
                self._thread.start()

    def _upload_often(self) -> None:
        pause_s = UPLOAD_EVERY_S
        while not self._stop.wait(pause_s):
            began_s = time.monotonic()
            try:
                self._upload()
            except OutputError as error:
                logger.warning("WARNING: %s It is tried again later.", error)
            pause_s = max(UPLOAD_EVERY_S, LONGEST_SHARE * (time.monotonic() - began_s))

    def _upload(self) -> None:
        if not self._is_changed.is_set():
            return
        self._is_changed.clear()
        with self._threads:
            content = self.file.read_bytes()
        try:
            write(self.place / self.file.name, content)
        except BaseException:
            self._is_changed.set()
            raise

    def _upload_last(self, *, is_interrupted: bool) -> None:
        try:
            self._upload()
        except OutputError as error:
            kept = new_rescue_folder() / self.file.name
            kept.write_bytes(self.file.read_bytes())
            text = (
                f"{error} It is kept in {kept}. Results that are uploaded stay; run the same "
                "command again to go on."
            )
            if not is_interrupted:
                raise OutputError(text) from error
            logger.warning("WARNING: %s", text)

    def entries(self) -> dict[str, Entry]:
        """Read the last entry of each case, also those that other processes have uploaded."""
        others = (each for each in files_in(self.place) if each.remote.name != self.file.name)
        self._copy_manifests(others, self.folder)
        return super().entries()

    def waiting(self, cases: Iterable[Case]) -> list[Case]:
        """Return the cases that are not done, in their order."""
        cases = list(cases)
        with ThreadPoolExecutor(AT_A_TIME, thread_name_prefix="totalfast-transfer") as pool:
            done = list(pool.map(self.is_done, cases))
        return [case for case, is_done in zip(cases, done, strict=True) if not is_done]

    def is_done(self, case: Case) -> bool:
        """Whether a case's results exist, whole, of these options and this input.

        A case without an entry is done if its completion markers hold one.
        """
        if case.name not in self._present:
            return False
        return super().is_done(case) or self._adopt(case)

    def _adopt(self, case: Case) -> bool:
        """Add the entry in the completion markers of a case, if all of its files are there."""
        names = self._names_of(case.name)
        for marker in filter(is_marker, sorted(names)):
            entry = _stamp(read(self.place / marker))
            if (
                entry is not None
                and (entry.name, entry.state) == (case.name, DONE)
                and entry.options == self.options_hash()
                and entry.fingerprint == case.fingerprint()
                and names.issuperset(entry.files)
            ):
                self.add(entry)
                return True
        return False

    def _is_complete(self, entry: Entry) -> bool:
        if not any(map(is_marker, entry.files)):
            return False
        return self._names_of(entry.name).issuperset(entry.files)

    def _names_of(self, case: str) -> set[str]:
        """Names of a case's files, as in entries."""
        folder = self.place / case
        return {f"{case}/{name_in(folder, each)}" for each in files_below(folder)}

    def bring(self, files: Iterable[Path]) -> None:
        """Download files of the batch's folder, unless they are here."""

        def fetch(path: Path) -> None:
            remote = self.place / path.relative_to(self.folder).as_posix()
            with contextlib.suppress(InputError):  # the table and the report tell what is missing
                path.parent.mkdir(parents=True, exist_ok=True)
                download(look_at(remote), path)

        for_each(functools.partial(fetch, path) for path in files if not path.exists())


def _stamp(marker: bytes) -> Entry | None:
    """Return the entry in a completion marker; None if there is none."""
    try:
        content: dict[str, Any] = json.loads(marker)
        return Entry.from_json(content[STAMP])
    except (ValueError, TypeError, LookupError):
        return None
