"""Frames of multi-frame files, for upstream's writers, which read files with one slice only.

The writers get a header for each frame, with an instance UID of its own. In the result, references
to these UIDs become references to the file and its frames (DICOM PS3.3, table 10-3).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pydicom import Dataset

    from totalfast.files.dicom.header import Slice

OF_ALL_FRAMES = (
    "NumberOfFrames",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
    "DimensionOrganizationSequence",
    "DimensionOrganizationType",
    "DimensionIndexSequence",
)
"""Attributes that a file of one slice does not have."""

WITHOUT_FRAMES = "ReferencedInstanceSequence"
"""Sequence whose items refer to whole files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameReference:
    """A frame of a file: class and instance UID of the file, and the number, from 1."""

    kind: str
    instance: str
    number: int


def has_frames(header: Dataset) -> bool:
    """Whether positions are in functional groups, which the writers do not read."""
    return any(keyword in header for keyword in OF_ALL_FRAMES[1:3])


def header_of_frame(header: Dataset, each: Slice) -> tuple[Dataset, FrameReference]:
    """Return the header of one frame as that of a file of its own, and what it refers to."""
    from pydicom import Dataset
    from pydicom.uid import generate_uid
    from pydicom.valuerep import format_number_as_ds

    left = {keyword: header[keyword].tag for keyword in OF_ALL_FRAMES if keyword in header}
    single = Dataset()
    for tag in header.keys() - set(left.values()):
        single[tag] = copy.deepcopy(header.get_item(tag))
    single.file_meta = copy.deepcopy(header.file_meta)
    single.SOPInstanceUID = single.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    single.SOPClassUID = ""  # upstream's writer chooses one by the modality
    single.InstanceNumber = each.frame + 1
    single.ImagePositionPatient = [format_number_as_ds(mm) for mm in each.position]
    single.ImageOrientationPatient = [format_number_as_ds(cosine) for cosine in each.orientation]
    single.PixelSpacing = [format_number_as_ds(mm) for mm in each.spacing_mm]
    thickness = _thickness(header, each.frame)
    if thickness is not None:
        single.SliceThickness = thickness
    instance = str(header.get("SOPInstanceUID") or "")
    return single, FrameReference(kind=each.kind, instance=instance, number=each.frame + 1)


def _thickness(header: Dataset, frame: int) -> object:
    """SliceThickness of a frame, or of all."""
    own = list(header.get("PerFrameFunctionalGroupsSequence") or ())[frame : frame + 1]
    for group in [*own, *(header.get("SharedFunctionalGroupsSequence") or ())]:
        for measures in group.get("PixelMeasuresSequence") or ():
            if measures.get("SliceThickness") is not None:
                return measures.SliceThickness
    return None


def refer_to_frames(result: Dataset, frames: Mapping[str, FrameReference]) -> None:
    """Replace references to the frames' headers by references to their files, in all sequences.

    Parameters
    ----------
    result
        A DICOM result; changed.
    frames
        Instance UID of a frame's header to the frame.
    """
    for element in result:
        if element.VR != "SQ":
            continue
        whole = element.keyword == WITHOUT_FRAMES
        kept, seen = [], set()
        for item in element.value:
            refer_to_frames(item, frames)
            frame = frames.get(str(item.get("ReferencedSOPInstanceUID")))
            if frame is not None:
                item.ReferencedSOPClassUID = frame.kind
                item.ReferencedSOPInstanceUID = frame.instance
                if whole and frame.instance in seen:
                    continue
                seen.add(frame.instance)
                if not whole:
                    item.ReferencedFrameNumber = frame.number
            kept.append(item)
        element.value = kept
