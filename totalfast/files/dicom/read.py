"""Open a DICOM series: choose its slices from headers; the image's voxels are read later."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from totalfast.errors import OutputError, TotalfastError
from totalfast.files.dicom.find import DicomFile, damage_refused, errors_of_damage, open_source
from totalfast.files.dicom.header import NotASlice, read_slices
from totalfast.files.dicom.pixels import read_planes
from totalfast.files.dicom.series import choose_series, choose_volume, find_slices
from totalfast.files.dicom.voxels import image_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    import nibabel as nib

    from totalfast.files.dicom.header import Slice

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """The slices of a DICOM series that form a volume, and its image.

    Parameters
    ----------
    source
        The user's path.
    slices
        In the order of their positions along the normal.
    image
        (x, y, z), LAS axes. Its voxels are read from the slices when they are needed.
    """

    source: Path
    slices: tuple[Slice, ...]
    image: nib.Nifti1Image

    @property
    def modality(self) -> str:
        """For example "CT"."""
        return self.slices[0].modality


@contextlib.contextmanager
def open_series(source: Path, *, wanted: str | None = None) -> Iterator[Series]:
    """Find the slices of a DICOM series; their files can be read until the context ends.

    Parameters
    ----------
    source
        A folder (searched with all subfolders), a zip file of such a folder, or one multi-frame
        file.
    wanted
        SeriesInstanceUID or SeriesNumber, if the source holds several series.

    Raises
    ------
    InputError
        If the source is missing or damaged, holds no scan or several scans, or its slices are no
        single, evenly spaced volume.
    OptionError
        If the wanted series does not exist.
    """
    with open_source(source) as files:
        logger.info("Reading DICOM series...")
        found, left_out = find_slices(source, files)
        left_out.log()
        series = choose_series(source, found, left_out, wanted=wanted)

        def same_pixels(one: Slice, other: Slice) -> bool:
            with damage_refused(source):
                (_, plane), (_, second) = read_planes(source, (one, other))
            scaling = (one.slope, one.intercept) == (other.slope, other.intercept)
            return scaling and bool(np.array_equal(plane, second))

        slices = tuple(choose_volume(source, series, same_pixels))
        if slices[0].modality == "CT" and not slices[0].rescaled:
            logger.warning(
                "WARNING: The slices of %s have no RescaleSlope and RescaleIntercept; their stored "
                "values are taken for Hounsfield units.",
                source,
            )
        image = image_of(source, slices)
        logger.info("  found image with shape %s", image.shape)
        yield Series(source=source, slices=slices, image=image)


def find_modality(source: Path, *, wanted: str | None = None) -> str | None:
    """Modality of the series that ``open_series`` would open.

    Returns
    -------
        For example "CT"; None if there is no such series.
    """
    try:
        with open_source(source) as files:
            found, left_out = find_slices(source, files)
            series = choose_series(source, found, left_out, wanted=wanted)
    except TotalfastError:
        return None
    return series[0].modality or None


def refuse_slices(targets: Iterable[Path]) -> None:
    """Refuse to write over files that are slices of a scan.

    Raises
    ------
    OutputError
        If one of the files exists and is an image slice.
    """
    for target in targets:
        if not target.is_file():
            continue
        file = DicomFile(name=target.name, path=target, size=target.stat().st_size)
        with contextlib.suppress(NotASlice, *errors_of_damage()):
            if read_slices(file):
                raise OutputError(f"{target} is a slice of a DICOM scan; give another name.")
