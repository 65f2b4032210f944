"""Studies of DICOMweb servers as the input of runs, and their results as new series there."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from anyio import to_thread

from totalfast.errors import OptionError
from totalfast.files.dicom.instances import is_uid, read_instance
from totalfast.serve.dicomweb import DicomWeb, DicomWebError
from totalfast.serve.dicomweb_fetch import SeriesFetch
from totalfast.serve.dicomweb_series import wanted_series
from totalfast.serve.dicomweb_store import Store

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import aiohttp

    from totalfast.files.dicom.instances import Instance
    from totalfast.serve.dicomweb_servers import DicomWebServer
    from totalfast.serve.frames import Frame
    from totalfast.serve.storage import Storage

KEYS = ("dicomweb", "study", "series", "flags", "push")
"""Of a submission."""

PAUSE_S = 0.25
"""Minimum pause between two events of progress."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyOrder:
    """What a request wants to be fetched, and where its result goes.

    Parameters
    ----------
    server, study
        Name of the server, and StudyInstanceUID.
    series
        SeriesInstanceUID; None to choose the one volume of the study.
    push
        Name of the server that stores the result; None for none.
    """

    server: str
    study: str
    series: str | None
    push: str | None


class Studies:
    """Fetches and stores for runs.

    Parameters
    ----------
    http
        For requests to all servers.
    servers
        By name; requests can name no others.
    storage
        Has the folders of the runs.
    series_bytes
        Maximum size of a series.
    """

    def __init__(
        self,
        http: aiohttp.ClientSession,
        servers: Mapping[str, DicomWebServer],
        *,
        storage: Storage,
        series_bytes: int,
    ) -> None:
        self._http, self._servers = http, servers
        self._storage, self._series_bytes = storage, series_bytes
        self.counts = {"fetched_instances": 0, "fetched_bytes": 0, "stored_instances": 0}
        """What was transferred."""
        self.failures = {"fetch": 0, "push": 0}
        """Transfers that failed."""

    def order(self, wanted: Mapping[str, Any]) -> StudyOrder:
        """Check a submission.

        Raises
        ------
        OptionError
            If a server is not known, or a UID is not valid.
        """
        if wanted.keys() - KEYS:
            raise OptionError(f"a study is submitted with {', '.join(KEYS)} only.")
        server, push = wanted["dicomweb"], wanted.get("push", False)
        if push is True:
            push = server
        for name in (server, push) if push is not False else (server,):
            if not isinstance(name, str) or name not in self._servers:
                known = ", ".join(self._servers) or "none"
                raise OptionError(f"dicomweb and push must name a server of --dicomweb: {known}.")
        uids = [wanted.get("study"), wanted.get("series")]
        if not all(isinstance(uid, str) and is_uid(uid) for uid in uids if uid is not None):
            raise OptionError("study and series must be UIDs: digits and dots, at most 64.")
        if uids[0] is None:
            raise OptionError("a study is needed: its StudyInstanceUID.")
        return StudyOrder(server=server, study=uids[0], series=uids[1], push=push or None)

    async def fetch(self, order: StudyOrder, folder: Path, note: Callable[[Frame], None]) -> str:
        """Fetch a series into the subfolder "scan" of a run's folder; return its UID.

        Parameters
        ----------
        order
            What is fetched.
        folder
            Of the run.
        note
            Called with events of progress.

        Raises
        ------
        DicomWebError, FullError
            If it can't be fetched, or is too large.
        """
        note({"event": "fetching", "instances": 0, "of": None})
        web = DicomWeb(self._http, self._servers[order.server])
        size, told_s = 0, time.monotonic()

        def grow(count: int) -> None:
            nonlocal size
            if size + count > self._series_bytes:
                raise DicomWebError(
                    f"the series is larger than {self._series_bytes} bytes, the limit of this "
                    "server (--max-upload)."
                )
            self._storage.claim(folder, count)
            size += count

        def tell(number: int) -> None:
            nonlocal told_s
            self.counts["fetched_instances"] += 1
            if number == series.instances or time.monotonic() - told_s > PAUSE_S:
                note({"event": "fetching", "instances": number, "of": series.instances})
                told_s = time.monotonic()

        try:
            series = await wanted_series(web, order.study, order.series)
            (folder / "scan").mkdir()
            fetch = SeriesFetch(
                web, order.study, series, folder=folder / "scan", grow=grow, tell=tell
            )
            await fetch.fetch()
        except Exception:
            self.failures["fetch"] += 1
            raise
        finally:
            self.counts["fetched_bytes"] += size
        return series.uid

    async def push(self, order: StudyOrder, folder: Path) -> dict[str, Any]:
        """Store the DICOM results in a run's folder; return what was stored where.

        Raises
        ------
        DicomWebError
            If the server does not confirm that it has stored all of them.
        """
        web = DicomWeb(self._http, self._servers[order.push or order.server])
        try:
            instances = await to_thread.run_sync(_dicom_files, folder)
            await Store(web, instances).store()
        except Exception:
            self.failures["push"] += 1
            raise
        self.counts["stored_instances"] += len(instances)
        return {
            "server": web.name,
            "study": order.study,
            "instances": [{"series": each.series, "instance": each.uid} for each in instances],
        }


def _dicom_files(folder: Path) -> list[Instance]:
    instances = [read_instance(path) for path in sorted(folder.rglob("*.dcm"))]
    if not instances:
        raise DicomWebError("the run has no DICOM result.")
    return instances
