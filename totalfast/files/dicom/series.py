"""Choose the slices that are the scan, from headers alone: one series, one volume.

What is left out is told in the log; what can't be one volume is an ``InputError``.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from totalfast.errors import InputError, OptionError
from totalfast.files.dicom.find import errors_of_damage
from totalfast.files.dicom.header import PHASES, NotASlice, Slice, read_slices

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from totalfast.files.dicom.find import DicomFile

logger = logging.getLogger(__name__)

FEWEST_SLICES = 4
"""Series with fewer slices are not converted by upstream (dicom2nifti), because they are
localizers."""

SAME_PLACE_MM = 0.01
"""Slices that are closer are at the same place."""

SAME_DIRECTION = 1e-3
"""Largest difference of direction cosines of parallel slices; dicom2nifti's tolerance."""

SLACK_MM, SLACK = 0.1, 0.05
"""A slice lies within 0.1 mm and 5 % of the distance of slices, of its place on an even grid.
dicom2nifti allows the same between neighbours."""

SHEAR = 0.05
"""Largest difference between the normal and the direction from slice to slice; dicom2nifti's
tolerance. More is a tilted gantry."""

ROUTINE = ("no scan", "not DICOM", "index of", "scout", "attributes that macOS")
"""Reasons for leaving files out that are no cause for a warning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """Files that are no slices of the scan: name and reason of each."""

    source: Path
    reasons: Mapping[str, list[str]]

    def log(self) -> None:
        """Tell each reason in a line, with the number of files and an example."""
        for reason, names in self.reasons.items():
            routine = reason.startswith(ROUTINE)
            logger.log(
                logging.INFO if routine else logging.WARNING,
                "%sLeft out of %s: %d file%s, for example %s: %s.",
                "" if routine else "WARNING: ",
                self.source,
                len(names),
                "" if len(names) == 1 else "s",
                names[0],
                reason,
            )

    def summary(self) -> str:
        """All reasons in one line."""
        parts = [f"{len(names)} x {reason}" for reason, names in self.reasons.items()]
        return "; ".join(parts)


def find_slices(source: Path, files: Iterable[DicomFile]) -> tuple[list[Slice], LeftOut]:
    """Read the headers of all files and keep the slices.

    A damaged file is left out; if the volume needs it, ``choose_volume`` finds the gap.
    """
    slices: list[Slice] = []
    reasons: dict[str, list[str]] = defaultdict(list)
    damage = errors_of_damage()
    for file in files:
        try:
            slices.extend(read_slices(file))
        except NotASlice as reason:  # noqa: PERF203 - each file on its own
            reasons[str(reason)].append(file.name)
        except damage:
            reasons["damaged, or cut off within the header"].append(file.name)
    return slices, LeftOut(source=source, reasons=reasons)


def choose_series(
    source: Path, slices: Sequence[Slice], left_out: LeftOut, *, wanted: str | None = None
) -> list[Slice]:
    """Take the slices of one series, which must be the only one, or is the wanted one.

    Anonymisers give each file its own UID. If no series has enough slices, all are taken; whether
    they form a volume is decided by their positions.

    Parameters
    ----------
    source
        The user's path, for messages.
    slices
        All slices that were found.
    left_out
        What was found beside them, for messages.
    wanted
        SeriesInstanceUID or SeriesNumber.

    Raises
    ------
    InputError
        If there is no series, or there are several and none is wanted.
    OptionError
        If the wanted series does not exist, or its number is that of several.
    """
    by_uid: dict[str, list[Slice]] = defaultdict(list)
    for each in slices:
        by_uid[each.series].append(each)
    if not by_uid:
        seen = f": {left_out.summary()}" if left_out.reasons else ""
        raise InputError(
            f"{source} holds no DICOM image slices with a position and an orientation{seen}. "
            "totalfast reads NIfTI, NRRD, MetaImage, and a folder or zip file with one DICOM "
            "series."
        )
    volumes = [part for part in by_uid.values() if len(part) >= FEWEST_SLICES]
    if wanted is None and not volumes and len(slices) >= FEWEST_SLICES:
        logger.warning(
            "WARNING: The slices of %s have %d different values of SeriesInstanceUID, none of them "
            "enough for a volume; they are read as one series.",
            source,
            len(by_uid),
        )
        return list(slices)
    if wanted is not None:
        matching = [
            part for uid, part in by_uid.items() if wanted in (uid, part[0].number) and wanted
        ]
        if len(matching) != 1:
            found = "no" if not matching else f"{len(matching)} DICOM"
            raise OptionError(
                f"{source} has {found} series {wanted}; it has {_list(by_uid.values())}."
            )
        return matching[0]
    if len(volumes) > 1:
        raise InputError(
            f"{source} holds {len(volumes)} DICOM series: {_list(volumes)}. Choose one with "
            "--series NUMBER or --series UID (series=... in Python), or give a folder with only "
            "one of them."
        )
    chosen = volumes[0] if volumes else max(by_uid.values(), key=len)
    others = [each for part in by_uid.values() if part is not chosen for each in part]
    if others:
        logger.warning(
            "WARNING: Left out of %s: %d image%s of other series that have fewer than %d slices, "
            "for example %s.",
            source,
            len(others),
            "" if len(others) == 1 else "s",
            FEWEST_SLICES,
            others[0].file.name,
        )
    return chosen


def _list(series: Iterable[Sequence[Slice]]) -> str:
    parts = []
    for part in series:
        first = part[0]
        (rows, columns), _ = Counter(each.shape for each in part).most_common(1)[0]
        number = first.number or "without a number"
        parts.append(
            f"series {number}: '{first.description or first.series}' ({first.modality}, "
            f"{len(part)} slices of {columns} x {rows}, UID {first.series})"
        )
    return "; ".join(parts)


def choose_volume(
    source: Path, series: Sequence[Slice], same_pixels: Callable[[Slice, Slice], bool]
) -> list[Slice]:
    """Take the slices of a series that form one volume, in the order of their positions.

    Parameters
    ----------
    source
        The user's path, for messages.
    series
        All slices of one series.
    same_pixels
        Whether two slices have the same pixels; asked for slices at the same position only.

    Raises
    ------
    InputError
        If the slices are no single, evenly spaced volume.
    """
    slices = _without_duplicates(source, _one_geometry(source, series), same_pixels)
    if len(slices) < FEWEST_SLICES:
        if source.is_file() and len(series) == 1:
            raise InputError(f"{source} is one DICOM slice; give the folder with its series.")
        raise InputError(
            f"{source} can't be converted: it has fewer than {FEWEST_SLICES} slices of a volume "
            f"({len(slices)})."
        )
    _refuse_uneven(source, slices)
    _tell_incomplete(source, slices, found=len(series))
    return slices


def _one_geometry(source: Path, series: Sequence[Slice]) -> list[Slice]:
    """Keep the largest group of parallel slices of one size and kind; a second one is refused."""
    groups: list[list[Slice]] = []
    for each in series:
        for group in groups:
            if _same_geometry(group[0], each):
                group.append(each)
                break
        else:
            groups.append([each])
    groups.sort(key=len, reverse=True)
    kept, *others = groups
    # Pictures that were computed from the slices, such as projections, lie at the same places;
    # slices that were compressed or corrected continue the others, and are derived images, too.
    original = [each for each in kept if not each.derived]
    if FEWEST_SLICES <= len(original) < len(kept) and not _are_even(kept):
        others.append([each for each in kept if each.derived])
        kept = original
    elif others and len(others[0]) >= FEWEST_SLICES:
        many = any(each.frames > 1 for each in series)
        raise InputError(
            f"{source} can't be converted: its slices are not parallel, or not of one size; "
            f"{'its frames are several stacks' if many else 'it holds several volumes'}: "
            f"{'; '.join(map(_plane, [kept, *others]))}. Give files of one of them."
        )
    for group in others:
        logger.warning(
            "WARNING: Left out of %s: %d image%s of the same series that %s (%s, for example %s).",
            source,
            len(group),
            "" if len(group) == 1 else "s",
            _difference(group[0], kept[0]),
            _plane(group),
            group[0].file.name,
        )
    return kept


def _are_even(slices: Sequence[Slice]) -> bool:
    """Whether all distances from slice to slice are the same."""
    gaps = np.diff(np.sort([each.distance for each in slices]))
    typical = float(np.median(gaps))
    return bool(np.abs(gaps - typical).max() <= SLACK_MM + SLACK * typical)


def _same_geometry(one: Slice, other: Slice) -> bool:
    return (
        one.shape == other.shape
        and one.kind == other.kind
        and np.allclose(one.orientation, other.orientation, rtol=0, atol=SAME_DIRECTION)
        and np.allclose(one.spacing_mm, other.spacing_mm, rtol=1e-3)
    )


def _difference(one: Slice, other: Slice) -> str:
    if not np.allclose(one.orientation, other.orientation, rtol=0, atol=SAME_DIRECTION):
        return "are not parallel to the slices, such as scouts (localizers)"
    if one.shape != other.shape or not np.allclose(one.spacing_mm, other.spacing_mm, rtol=1e-3):
        return "have another size than the slices"
    return "were derived from the slices" if one.derived else "are of another kind"


def _plane(group: Sequence[Slice]) -> str:
    first = group[0]
    axis = int(np.argmax(np.abs(first.normal)))
    plane = ("sagittal", "coronal", "axial")[axis]
    return f"{len(group)} {plane} of {first.shape[1]} x {first.shape[0]}"


def _without_duplicates(
    source: Path, slices: list[Slice], same_pixels: Callable[[Slice, Slice], bool]
) -> list[Slice]:
    """Sort by position and leave out copies; other images at the same place are refused."""
    ordered = sorted(slices, key=lambda each: each.distance)
    places: list[list[Slice]] = []
    copies = []
    for each in ordered:
        if not places or abs(each.distance - places[-1][0].distance) > SAME_PLACE_MM:
            places.append([each])
        elif any(same_pixels(each, other) for other in places[-1]):
            copies.append(each)
        else:
            places[-1].append(each)
    if copies:
        logger.warning(
            "WARNING: Left out of %s: %d duplicate slice%s, for example %s.",
            source,
            len(copies),
            "" if len(copies) == 1 else "s",
            copies[0].file.name,
        )
    if len(places) == 1 and len(ordered) - len(copies) > 1:
        raise InputError(f"{source} can't be converted: all its slices have the same position.")
    most = max(map(len, places))
    if most > 1:
        several = [place for place in places if len(place) > 1]
        raise InputError(
            f"{source} can't be converted: at {len(several)} of {len(places)} positions it has "
            f"{'up to ' if len(several) < len(places) else ''}{most} images: "
            f"{_phases(several)}. Give only the files of one of them."
        )
    return [place[0] for place in places]


def _phases(places: Sequence[Sequence[Slice]]) -> str:
    """Name the attributes in which images of the same place differ, and their kind."""
    names = {
        "TemporalPosition": "several time points",
        "Trigger": "several time points",
        "NominalCardiac": "several time points",
        "E": "several echoes",
        "DiffusionBValue": "several b-values",
        "InversionTime": "several inversion times",
        "KVP": "several energies",
        "ConvolutionKernel": "several reconstructions",
        "AcquisitionNumber": "several acquisitions or time points",
        "ImageType": "several kinds of images, such as phase and magnitude",
        "FrameType": "several kinds of images, such as phase and magnitude",
    }
    for keyword in PHASES:
        if any(len({each.phase.get(keyword) for each in place}) > 1 for place in places):
            kind = next((text for start, text in names.items() if keyword.startswith(start)), "")
            return f"{kind or 'several settings'} ({keyword} differs)"
    return "several time points or volumes (no attribute that totalfast knows differs)"


def _refuse_uneven(source: Path, slices: Sequence[Slice]) -> None:
    """Refuse slices that do not lie on an even grid, or on one that is sheared."""
    positions = np.array([each.position for each in slices])
    step = (positions[-1] - positions[0]) / (len(slices) - 1)
    distances = np.array([each.distance for each in slices])
    step_mm = float(distances[-1] - distances[0]) / (len(slices) - 1)
    gaps = np.diff(distances)
    typical = float(np.median(gaps))
    direction = step / np.linalg.norm(step)
    if not np.allclose(direction, slices[0].normal, rtol=SHEAR, atol=SHEAR):
        raise InputError(
            f"{source} can't be converted: its slices are sheared, for example by a tilted gantry, "
            f"by {np.degrees(np.arccos(min(abs(direction @ slices[0].normal), 1))):.1f} degrees; "
            "resample it to a volume with right angles first."
        )
    off = np.abs(distances - (distances[0] + step_mm * np.arange(len(slices))))
    even = positions[0] + np.outer(np.arange(len(slices)), step)
    across = np.linalg.norm(positions - even, axis=1)
    slack = SLACK_MM + SLACK * typical
    if off.max() <= slack and np.abs(gaps - typical).max() <= slack and across.max() <= 2 * slack:
        return
    wide = int(np.sum(gaps > 1.5 * typical))
    stacks = " stacks or" if any(each.frames > 1 for each in slices) else ""
    reason = (
        f"{wide} gap{'' if wide == 1 else 's'} of up to {gaps.max():.4g} mm; slices are missing, "
        f"or it holds more than one scan"
        if wide
        else f"from {gaps.min():.4g} to {gaps.max():.4g} mm; the spacing changes, or it holds "
        f"several{stacks} scans"
    )
    raise InputError(
        f"{source} can't be converted: its {len(slices)} slices are not evenly spaced "
        f"(mostly {typical:.4g} mm, {reason})."
    )


def _tell_incomplete(source: Path, slices: Sequence[Slice], *, found: int) -> None:
    """Compare the number of slices with the header's.

    NumberOfSlices counts the slices of a volume (PET), and ImageComments may number them.
    ImagesInAcquisition may count images of other series, too, so that it can't be refused.
    """
    for_volume, for_acquisition = slices[0].expected
    if for_volume is not None and for_volume > len(slices):
        raise InputError(
            f"{source} can't be converted: slices are missing; it has {len(slices)}, and its "
            f"header promises {for_volume} (NumberOfSlices)."
        )
    counted = [each.counted for each in slices if each.counted is not None]
    numbers, totals = {number for number, _ in counted}, {total for _, total in counted}
    if len(totals) == 1 and len(numbers) == len(slices):  # all of them, and each another one
        (total,) = totals
        if max(numbers) <= total and total > len(slices):
            missing = sorted(set(range(1, total + 1)) - numbers)
            some = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")  # noqa: PLR2004
            raise InputError(
                f"{source} can't be converted: slices are missing; it has {len(slices)}, and its "
                f"comments number {total} (ImageComments); missing: {some}."
            )
    if for_acquisition is not None and for_acquisition > found:
        logger.warning(
            "WARNING: %s has %d slices, and its header counts %d images in the acquisition "
            "(ImagesInAcquisition): slices may be missing at the ends.",
            source,
            len(slices),
            for_acquisition,
        )
