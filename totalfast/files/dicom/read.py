"""Open a DICOM series: choose its slices from headers; the image's voxels are read later."""

from __future__ import annotations

import contextlib
import functools
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
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    import nibabel as nib

    from totalfast.files.dicom.header import Slice
    from totalfast.files.dicom.series import LeftOut

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


class SeriesSource(contextlib.AbstractContextManager["SeriesSource"]):
    """A folder, zip file or file with a DICOM series, whose headers are read once.

    Its files can be read until the context ends.

    Parameters
    ----------
    source
        A folder (searched with all subfolders), a zip file of such a folder, or one multi-frame
        file.
    wanted
        SeriesInstanceUID or SeriesNumber, if the source holds several series.
    only
        Paths of the files, relative to a folder, if it holds many others; None reads all headers.
    """

    def __init__(
        self,
        source: Path,
        *,
        wanted: str | int | None = None,
        only: Sequence[str] | None = None,
    ) -> None:
        self._source = source
        self._only = only
        self._wanted = None if wanted is None else str(wanted).strip()
        self._stack = contextlib.ExitStack()

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def path(self) -> Path:
        """The folder, zip file or file."""
        return self._source

    @functools.cached_property
    def _slices(self) -> tuple[list[Slice], LeftOut]:
        """All slices of the series, before those that form a volume are chosen."""
        files = self._stack.enter_context(open_source(self._source, only=self._only))
        found, left_out = find_slices(self._source, files)
        return choose_series(self._source, found, left_out, wanted=self._wanted), left_out

    @property
    def modality(self) -> str | None:
        """Modality of the series, for example "CT"; None if there is no such series."""
        try:
            return self._slices[0][0].modality or None
        except TotalfastError:
            return None

    def series(self) -> Series:
        """Choose the slices that form a volume.

        Raises
        ------
        InputError
            If the source is missing or damaged, holds no scan or several scans, or its slices are
            no single, evenly spaced volume.
        OptionError
            If the wanted series does not exist.
        """
        logger.info("Reading DICOM series...")
        found, left_out = self._slices
        left_out.log()
        slices = tuple(choose_volume(self._source, found, self._same_pixels))
        if slices[0].modality == "CT" and not slices[0].rescaled:
            logger.warning(
                "WARNING: The slices of %s have no RescaleSlope and RescaleIntercept; their stored "
                "values are taken for Hounsfield units.",
                self._source,
            )
        image = image_of(self._source, slices)
        logger.info("  found image with shape %s", image.shape)
        return Series(source=self._source, slices=slices, image=image)

    def _same_pixels(self, one: Slice, other: Slice) -> bool:
        with damage_refused(self._source):
            (_, plane), (_, second) = read_planes(self._source, (one, other))
        scaling = (one.slope, one.intercept) == (other.slope, other.intercept)
        return scaling and bool(np.array_equal(plane, second))


@contextlib.contextmanager
def open_series(source: Path, *, wanted: str | None = None) -> Iterator[Series]:
    """Open the series of a source; parameters and errors are those of ``SeriesSource``."""
    with SeriesSource(source, wanted=wanted) as opened:
        yield opened.series()


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
