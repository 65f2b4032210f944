"""Which scans of a batch are kept: by modality, description and number of slices."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from totalfast.batch.finding.images import slices_of
from totalfast.errors import OptionError

if TYPE_CHECKING:
    from pathlib import Path

    from totalfast.batch.finding.series_cases import FoundSeries

LONGEST_DESCRIPTION = 256
"""Letters of a series description that are searched; DICOM allows 64."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a scan must have to be kept; None for anything.

    Parameters
    ----------
    modality
        Of a DICOM series, in upper case.
    description
        Searched in the description of a DICOM series.
    min_slices
        Of a DICOM series, or along the third axis of an image file.
    """

    modality: str | None
    description: re.Pattern[str] | None
    min_slices: int | None

    @classmethod
    def of(
        cls, modality: str | None, series_description: str | None, min_slices: int | None
    ) -> Wanted:
        """Check the arguments of ``find_cases``.

        Raises
        ------
        OptionError
            If one of them is not valid.
        """
        try:
            pattern = None if series_description is None else re.compile(series_description, re.I)
        except re.error as error:
            raise OptionError(
                f"series_description is {series_description!r}, which is no regular expression: "
                f"{error}."
            ) from error
        if min_slices is not None and min_slices < 1:
            raise OptionError(f"min_slices is {min_slices}, but must be at least 1.")
        upper = None if modality is None else modality.strip().upper()
        return cls(modality=upper, description=pattern, min_slices=min_slices)

    @property
    def is_everything(self) -> bool:
        """Whether nothing is left out."""
        return self.modality is None and self.description is None and self.min_slices is None

    def refusal_of_series(self, series: FoundSeries) -> str | None:
        """Why a series is left out; None if it is kept."""
        if self.modality is not None and series.header.modality != self.modality:
            return f"series of another modality than {self.modality}"
        if self.description is not None and not self.description.search(
            series.header.description[:LONGEST_DESCRIPTION]
        ):
            return f"series without {self.description.pattern!r} in its description"
        if self.min_slices is not None and series.slices < self.min_slices:
            return f"series with fewer than {self.min_slices} slices"
        return None

    def refusal_of_image(self, path: Path) -> str | None:
        """Why an image file is left out; files whose header can't be read are kept."""
        if self.min_slices is None:
            return None
        slices = slices_of(path)
        if slices is None or slices >= self.min_slices:
            return None
        return f"image file with fewer than {self.min_slices} slices"
