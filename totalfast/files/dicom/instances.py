"""Identify one DICOM file: the UIDs of its instance, series and study, without its values."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from totalfast.errors import InputError
from totalfast.files.dicom.find import errors_of_damage, values_unchecked

if TYPE_CHECKING:
    from pathlib import Path

LONGEST_UID = 64
"""Characters of a UID at most (DICOM PS3.5, chapter 9)."""

UIDS = ("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID")


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """A DICOM file on the disk.

    Parameters
    ----------
    path
        Where it is.
    uid, series, study
        SOPInstanceUID, SeriesInstanceUID and StudyInstanceUID.
    """

    path: Path
    uid: str
    series: str
    study: str


def is_uid(text: str) -> bool:
    """Whether a text is a UID: numbers with dots between them, at most 64 characters."""
    return len(text) <= LONGEST_UID and re.fullmatch(r"[0-9]+(\.[0-9]+)*", text) is not None


def read_instance(path: Path) -> Instance:
    """Read the UIDs of a file.

    Raises
    ------
    InputError
        If it is no DICOM file, or one of its UIDs is missing or not valid.
    """
    from pydicom import dcmread

    try:
        with values_unchecked():
            header = dcmread(path, stop_before_pixels=True, specific_tags=list(UIDS))
            uid, series, study = (str(header.get(keyword) or "") for keyword in UIDS)
    except errors_of_damage() as error:
        raise InputError(f"{path.name} is no DICOM file, or is damaged.") from error
    if not all(map(is_uid, (uid, series, study))):
        raise InputError(f"{path.name} has no valid {', '.join(UIDS)}.")
    return Instance(path=path, uid=uid, series=series, study=study)
