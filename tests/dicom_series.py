"""Synthetic DICOM series: a file per slice, or one file of many frames."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pydicom
from pydicom.datadict import tag_for_keyword
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, generate_uid

CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"
ENHANCED_CT = "1.2.840.10008.5.1.4.1.1.2.1"
ENHANCED_MR = "1.2.840.10008.5.1.4.1.1.4.1"
AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


def in_syntax(header: pydicom.Dataset, syntax: str) -> pydicom.Dataset:
    """Return an uncompressed data set of 16 bits in another uncompressed transfer syntax.

    It is a new data set, because pydicom keeps the encoding of one that was read.
    """
    new = pydicom.Dataset()
    new.update({element.tag: element for element in header})
    new.file_meta = header.file_meta
    new.file_meta.TransferSyntaxUID = syntax
    if syntax == ExplicitVRBigEndian:
        new.PixelData = np.frombuffer(header.PixelData, "<i2").astype(">i2").tobytes()
    return new


def new_file(**attributes) -> pydicom.Dataset:
    """Return a CT data set without position and pixels."""
    header = pydicom.Dataset()
    header.file_meta = FileMetaDataset()
    header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header.SOPClassUID = CT_IMAGE
    header.SOPInstanceUID = generate_uid()
    header.Modality = "CT"
    header.PatientName, header.PatientID = "Made^Up", "1"
    header.StudyDate, header.StudyTime, header.StudyID = "20200101", "120000", "1"
    header.StudyInstanceUID = header.FrameOfReferenceUID = "1.2.3"
    header.SeriesInstanceUID, header.SeriesDescription = "1.2.3.4", "synthetic"
    header.BitsAllocated = header.BitsStored = 16
    header.HighBit, header.PixelRepresentation, header.SamplesPerPixel = 15, 1, 1
    header.PhotometricInterpretation = "MONOCHROME2"
    header.RescaleSlope, header.RescaleIntercept = 1, -1024
    for name, value in attributes.items():
        setattr(header, name, value)
    header.file_meta.MediaStorageSOPClassUID = header.SOPClassUID
    header.file_meta.MediaStorageSOPInstanceUID = header.SOPInstanceUID
    return header


def write_series(
    folder: Path,
    voxels: np.ndarray,
    *,
    spacing_mm: tuple[float, float, float] = (3.0, 2.0, 2.0),
    orientation: tuple[float, ...] = AXIAL,
    origin_mm: tuple[float, float, float] = (-30.0, -40.0, 50.0),
    step: np.ndarray | None = None,
    name: str = "slice",
    **attributes,
) -> Path:
    """Write one file per slice. Intensities are in HU; the files store them plus 1024.

    Parameters
    ----------
    folder
        Folder of the series; created if it is missing.
    voxels
        (slice, row, column), integers.
    spacing_mm
        Distances along the same axes, (slice, row, column).
    orientation
        Direction cosines of a row and of a column, LPS.
    origin_mm
        Position of the first voxel, LPS.
    step
        Vector from one slice to the next in mm, LPS; default: along the normal.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if step is None:
        step = np.cross(orientation[:3], orientation[3:]) * spacing_mm[0]
    for number, plane in enumerate(voxels):
        header = new_file(**attributes)
        header.InstanceNumber = number + 1
        header.ImageOrientationPatient = list(orientation)
        header.ImagePositionPatient = [float(mm) for mm in np.add(origin_mm, number * step)]
        header.PixelSpacing, header.SliceThickness = list(spacing_mm[1:]), spacing_mm[0]
        header.Rows, header.Columns = plane.shape
        header.PixelData = (plane + 1024).astype("<i2").tobytes()
        header.save_as(folder / f"{name}{number:03d}.dcm", enforce_file_format=True)
    return folder


def write_multi_frame(
    path: Path,
    voxels: np.ndarray,
    *,
    spacing_mm: tuple[float, float, float] = (3.0, 2.0, 2.0),
    orientation: tuple[float, ...] = AXIAL,
    origin_mm: tuple[float, float, float] = (-30.0, -40.0, 50.0),
    order: Sequence[int] | None = None,
    stack_numbers: Sequence[int] | None = None,
    per_frame: tuple[float, float] | Sequence[tuple[float, float]] | None = (1, -1024),
    shared: tuple[float, float] | None = None,
    **attributes,
) -> Path:
    """Write one enhanced CT or MR file; the parameters are those of ``write_series``, and these.

    Parameters
    ----------
    order
        Slices in the order of the frames; default: by position.
    stack_numbers
        InStackPositionNumber of each frame; default: 1 for the first slice, 2 for the second.
    per_frame, shared
        (slope, intercept): for each frame, for all, or None for no such attribute.
    """
    header = new_file(**{"SOPClassUID": ENHANCED_CT, "InstanceNumber": 1, **attributes})
    del header.RescaleSlope, header.RescaleIntercept
    order = range(len(voxels)) if order is None else order
    header.NumberOfFrames, (header.Rows, header.Columns) = len(order), voxels.shape[1:]
    step = np.cross(orientation[:3], orientation[3:]) * spacing_mm[0]
    measures = {"PixelSpacing": list(spacing_mm[1:]), "SliceThickness": spacing_mm[0]}
    organization = generate_uid()
    header.DimensionOrganizationSequence = [_attributes(DimensionOrganizationUID=organization)]
    header.DimensionIndexSequence = [
        _attributes(
            DimensionOrganizationUID=organization,
            DimensionIndexPointer=tag_for_keyword(keyword),
            FunctionalGroupPointer=tag_for_keyword("FrameContentSequence"),
        )
        for keyword in ("StackID", "InStackPositionNumber")
    ]
    header.SharedFunctionalGroupsSequence = [
        _group(
            PlaneOrientationSequence={"ImageOrientationPatient": list(orientation)},
            PixelMeasuresSequence=measures,
            **_rescaling(shared),
        )
    ]
    each = isinstance(per_frame, list)
    header.PerFrameFunctionalGroupsSequence = [
        _group(
            PlanePositionSequence={
                "ImagePositionPatient": [float(mm) for mm in np.add(origin_mm, number * step)]
            },
            FrameContentSequence={
                "StackID": "1",
                "InStackPositionNumber": stack_numbers[frame] if stack_numbers else number + 1,
                "DimensionIndexValues": [1, number + 1],
            },
            **_rescaling(per_frame[frame] if each else per_frame),
        )
        for frame, number in enumerate(order)
    ]
    header.PixelData = (voxels[list(order)] + 1024).astype("<i2").tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    header.save_as(path, enforce_file_format=True)
    return path


def _attributes(**values) -> pydicom.Dataset:
    item = pydicom.Dataset()
    for keyword, value in values.items():
        setattr(item, keyword, value)
    return item


def _group(**sequences) -> pydicom.Dataset:
    return _attributes(**{name: [_attributes(**values)] for name, values in sequences.items()})


def _rescaling(values) -> dict[str, dict[str, object]]:
    if values is None:
        return {}
    slope, intercept = values
    part = {"RescaleSlope": slope, "RescaleIntercept": intercept, "RescaleType": "HU"}
    return {"PixelValueTransformationSequence": part}
