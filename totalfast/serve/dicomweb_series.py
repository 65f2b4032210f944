"""Queries (QIDO-RS) for the series of a study, and the choice of the one to segment."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from totalfast.files.dicom.instances import is_uid
from totalfast.files.dicom.series import FEWEST_SLICES
from totalfast.serve.dicomweb import DicomWebError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from totalfast.serve.dicomweb import DicomWeb

SERIES_UID, MODALITY, INSTANCES = "0020000E", "00080060", "00201209"
INSTANCE_UID, FRAMES = "00080018", "00280008"
"""Tags of DICOM's JSON: SeriesInstanceUID, Modality, NumberOfSeriesRelatedInstances; of an instance
SOPInstanceUID and NumberOfFrames."""

SEGMENTED = ("CT", "MR")
"""Modalities among which a series is chosen."""

PAGE = 200
"""Objects that are asked for at a time."""

MOST_OBJECTS = 100_000
"""Objects after which a query counts as endless."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedSeries:
    """A series that a server lists.

    Parameters
    ----------
    uid, modality
        Of the series.
    instances
        Number of its instances; None if the server does not tell it.
    slices
        Number of its image planes: a multi-frame file has many. None if not known.
    """

    uid: str
    modality: str
    instances: int | None
    slices: int | None = None

    def __str__(self) -> str:
        count = "?" if self.instances is None else self.instances
        return f"{self.uid} ({self.modality or 'no modality'}, {count} instances)"


async def wanted_series(web: DicomWeb, study: str, series: str | None) -> ListedSeries:
    """Return the series of a study that is to be segmented.

    As among the files of a folder, it must be the only one with enough slices for a volume, or be
    named.

    Parameters
    ----------
    web, study
        The server and the StudyInstanceUID.
    series
        SeriesInstanceUID, or None to choose one.

    Raises
    ------
    DicomWebError
        If there is no such series, or several fit. The message lists UIDs, modalities and numbers
        of instances.
    """
    listed = await _list_series(web, study)
    if not listed:
        raise DicomWebError(f"{web.name} has no study {study}, or no series in it.")
    if series is not None:
        named = [each for each in listed if each.uid == series]
        if not named:
            raise DicomWebError(
                f"{web.name} has no series {series} in this study; it has {_text(listed)}."
            )
        return await _counted(web, study, named[0])
    images = [await _counted(web, study, each) for each in listed if each.modality in SEGMENTED]
    volumes = [each for each in images if (each.slices or 0) >= FEWEST_SLICES]
    if len(volumes) == 1:
        return volumes[0]
    if not volumes:
        raise DicomWebError(
            f"{web.name} has no {' or '.join(SEGMENTED)} series of {FEWEST_SLICES} slices or more "
            f"in this study; it has {_text(listed)}."
        )
    raise DicomWebError(
        f"{web.name} has {len(volumes)} series in this study that can be segmented; name one of "
        f'them with "series": {_text(volumes)}.'
    )


async def _list_series(web: DicomWeb, study: str) -> list[ListedSeries]:
    found = await _all(web, f"/studies/{study}/series", SERIES_UID, (MODALITY, INSTANCES))
    return [
        ListedSeries(
            uid=str(_value(each, SERIES_UID)),
            modality=_word(_value(each, MODALITY)),
            instances=_number(_value(each, INSTANCES)),
        )
        for each in found
    ]


async def _counted(web: DicomWeb, study: str, series: ListedSeries) -> ListedSeries:
    """Add the number of slices; instances are asked for only if there are few, or none is told."""
    if series.instances is not None and series.instances >= FEWEST_SLICES:
        return replace(series, slices=series.instances)
    path = f"/studies/{study}/series/{series.uid}/instances"
    found = await _all(web, path, INSTANCE_UID, (FRAMES,))
    frames = [_number(_value(each, FRAMES)) or 1 for each in found]
    return replace(series, instances=len(found), slices=sum(frames))


async def _all(web: DicomWeb, path: str, key: str, fields: Iterable[str]) -> list[dict[str, Any]]:
    """Return all objects of a query, page by page, each once; those without a UID are left out."""
    found: dict[str, dict[str, Any]] = {}
    offset = 0
    while offset < MOST_OBJECTS:
        params = {"limit": str(PAGE), "offset": str(offset), "includefield": ",".join(fields)}
        page = await web.json(path, params)
        before = len(found)
        for each in page:
            uid = _value(each, key)
            if isinstance(uid, str) and is_uid(uid):
                found.setdefault(uid, each)
        if len(found) == before:  # the end, or a server that knows no pages
            break
        offset += len(page)
    return list(found.values())


def _value(found: dict[str, Any], tag: str) -> object:
    """First value of an attribute in DICOM's JSON; None if it has none."""
    attribute = found.get(tag)
    values = attribute.get("Value") if isinstance(attribute, dict) else None
    return values[0] if isinstance(values, list) and values else None


def _word(value: object) -> str:
    """A modality; nothing else than letters and digits comes into messages."""
    return value if isinstance(value, str) and value.isalnum() and len(value) <= 16 else ""  # noqa: PLR2004


def _number(value: object) -> int | None:
    """A count, which some servers send as a text."""
    if isinstance(value, str) and value.strip().isdecimal():
        value = int(value)
    valid = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    return value if valid and isinstance(value, int) else None


def _text(series: Sequence[ListedSeries]) -> str:
    return "; ".join(map(str, series))
