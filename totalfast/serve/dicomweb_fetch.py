"""Fetch a series (WADO-RS): instance by instance from the network to files.

Only one piece of an instance is in memory at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import aiohttp
from aiohttp.http import HttpProcessingError
from anyio import open_file, to_thread

from totalfast.errors import InputError
from totalfast.files.dicom.instances import read_instance
from totalfast.serve.dicomweb import DicomWebError, TransientError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from totalfast.serve.dicomweb import DicomWeb
    from totalfast.serve.dicomweb_series import ListedSeries

PIECE_BYTES = 1 << 18

MOST_INSTANCES = 100_000
"""Instances after which a series counts as endless."""

NOT_ACCEPTABLE = 406
MISSING = (404, 410)

ACCEPTED = (
    'multipart/related; type="application/dicom"; transfer-syntax=*',
    'multipart/related; type="application/dicom"',
)
"""As stored, which the standard calls "*"; a server that does not know it gets the second one."""


class SeriesFetch:
    """Fetches a series into a folder.

    Parameters
    ----------
    web, study, series
        What is fetched.
    folder
        An empty folder.
    grow
        Called with the number of bytes before they are written; it may raise an error.
    tell
        Called with the number of instances that are there.
    """

    def __init__(
        self,
        web: DicomWeb,
        study: str,
        series: ListedSeries,
        *,
        folder: Path,
        grow: Callable[[int], None],
        tell: Callable[[int], None],
    ) -> None:
        self._web, self._study, self._series = web, study, series
        self._folder, self._grow, self._tell = folder, grow, tell

    async def fetch(self) -> None:
        """Fetch the series, several times if need be, and check that it is whole.

        Raises
        ------
        DicomWebError
            If it can't be fetched, is not the series that was asked for, or is not whole.
        """
        await self._web.retrying(self._fetch_once)
        await to_thread.run_sync(self._check)

    async def _fetch_once(self) -> None:
        for earlier in self._folder.iterdir():
            self._grow(-earlier.stat().st_size)
            earlier.unlink()
        path = f"/studies/{self._study}/series/{self._series.uid}"
        for accepted in ACCEPTED:
            async with self._web.ask("GET", path, headers={"Accept": accepted}) as response:
                if response.status == NOT_ACCEPTABLE and accepted != ACCEPTED[-1]:
                    continue
                await self._receive(response)
                return

    async def _receive(self, response: aiohttp.ClientResponse) -> None:
        name = self._web.name
        if response.status in MISSING:
            raise DicomWebError(f"{name} can't send the series (HTTP status {response.status}).")
        if response.status != 200:  # noqa: PLR2004
            raise DicomWebError(f"{name} answers with HTTP status {response.status}.")
        if response.content_type.lower() != "multipart/related":
            raise DicomWebError(
                f"{name} sends the series as something else than multipart/related "
                "(a DICOMweb server was expected)."
            )
        number = 0
        try:
            async for part in _parts(response):
                number += 1
                if number > MOST_INSTANCES:
                    raise DicomWebError(f"{name} sends more than {MOST_INSTANCES} instances.")
                await self._write(part, self._folder / f"{number:06d}.dcm")
                self._tell(number)
        except (ValueError, HttpProcessingError) as error:
            raise TransientError(
                f"{name} broke off the series after {number} instances, or sends it malformed"
            ) from error

    async def _write(self, part: aiohttp.BodyPartReader, path: Path) -> None:
        async with await open_file(path, "wb") as file:
            while not part.at_eof():
                piece = await part.read_chunk(PIECE_BYTES)
                self._grow(len(piece))
                await file.write(piece)

    def _check(self) -> None:
        """Check that the files are all instances of the series."""
        name, uids = self._web.name, set()
        for path in self._folder.iterdir():
            try:
                instance = read_instance(path)
            except InputError as error:
                raise DicomWebError(f"{name} sends what can't be used: {error}") from error
            if (instance.study, instance.series) != (self._study, self._series.uid):
                raise DicomWebError(f"{name} sends instances of another series.")
            uids.add(instance.uid)
        listed = self._series.instances
        if listed is not None and len(uids) < listed:
            raise DicomWebError(
                f"{name} lists {listed} instances of the series and sends {len(uids)}; the series "
                "may still be arriving there."
            )


async def _parts(response: aiohttp.ClientResponse) -> AsyncIterator[aiohttp.BodyPartReader]:
    """Yield the parts of a multipart answer; ValueError if it is malformed or ends too early."""
    reader = aiohttp.MultipartReader(response.headers, response.content)
    while (part := await reader.next()) is not None:
        if not isinstance(part, aiohttp.BodyPartReader):
            raise ValueError("a part has parts")  # noqa: TRY004 - of the answer, not of a call
        yield part
