"""Synthetic DICOM series with known voxels and positions, for ``compare_dicom_readers.py``.

Each case is a function that writes files into a folder and returns the volumes that are there: one
volume is the answer that a reader must give; none means that the slices are no volume, so that it
must refuse; several mean that it must refuse or return them all. Its docstring is its name.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
from pydicom import Dataset, dcmread
from pydicom.encaps import encapsulate
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
    generate_uid,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.dicom_series import (  # noqa: E402 - of this repository
    AXIAL,
    ENHANCED_MR,
    in_syntax,
    new_file,
    write_multi_frame,
    write_series,
)

SHAPE = (12, 20, 16)
"""(slice, row, column)."""

SPACING_MM, ORIGIN_MM = (3.0, 2.0, 2.0), (-30.0, -40.0, 50.0)

MR: dict[str, Any] = {
    "Modality": "MR",
    "SOPClassUID": "1.2.840.10008.5.1.4.1.1.4",
    "RepetitionTime": 500,
    "EchoTime": 10,
}
PET: dict[str, Any] = {"Modality": "PT", "SOPClassUID": "1.2.840.10008.5.1.4.1.1.128"}
ENHANCED: dict[str, Any] = {"Modality": "MR", "SOPClassUID": ENHANCED_MR}

CORONAL = (1.0, 0.0, 0.0, 0.0, 0.0, -1.0)
SAGITTAL = (0.0, 1.0, 0.0, 0.0, 0.0, -1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Volume:
    """What is in the files.

    Parameters
    ----------
    voxels
        (slice, row, column), rescaled.
    affine
        Of (column, row, slice), RAS+, mm.
    """

    voxels: np.ndarray
    affine: np.ndarray


Case = Callable[[Path], list[Volume]]
ORDINARY: list[Case] = []
ODD: list[Case] = []


def hu(seed: int = 0, shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    """Random intensities."""
    return np.random.default_rng(seed).integers(-1000, 1500, shape)


def series(folder: Path, voxels: np.ndarray | None = None, **options: Any) -> Volume:
    """Write a series, and return its volume; the options are those of ``write_series``."""
    voxels = hu() if voxels is None else voxels
    attributes = {"Manufacturer": "SIEMENS", "SeriesNumber": 1, "AcquisitionNumber": 1}
    write_series(folder, voxels, **{"spacing_mm": SPACING_MM, **attributes, **options})
    return volume(voxels, **options)


def multi_frame(folder: Path, voxels: np.ndarray | None = None, **options: Any) -> Volume:
    """Write a file of many frames; the options are those of ``write_multi_frame``."""
    voxels = hu() if voxels is None else voxels
    write_multi_frame(folder / "enhanced.dcm", voxels, **{"SeriesNumber": 1, **options})
    return volume(voxels, **options)


def volume(
    voxels: np.ndarray,
    *,
    spacing_mm: tuple[float, float, float] = SPACING_MM,
    orientation: tuple[float, ...] = AXIAL,
    origin_mm: tuple[float, float, float] = ORIGIN_MM,
    step: np.ndarray | None = None,
    **_: Any,
) -> Volume:
    """The volume that ``write_series`` writes."""
    row, column = np.asarray(orientation[:3]), np.asarray(orientation[3:])
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = row * spacing_mm[2], column * spacing_mm[1]
    affine[:3, 2] = np.cross(row, column) * spacing_mm[0] if step is None else step
    affine[:3, 3] = origin_mm
    affine[:2] *= -1
    return Volume(voxels=voxels.astype(np.float64), affine=affine)


def change(folder: Path, edit: Callable[[Dataset, int], Dataset | None]) -> None:
    """Edit each file of a folder; ``edit`` gets its data set and its number in the series."""
    for number, path in enumerate(sorted(folder.glob("*.dcm"))):
        header = dcmread(path)
        edited = edit(header, number)
        (header if edited is None else edited).save_as(path, enforce_file_format=True)


def with_attributes(folder: Path, **values: Callable[[int], Any]) -> None:
    """Set attributes of each file; a value is a function of the slice's number."""

    def edit(header: Dataset, number: int) -> None:
        for keyword, value in values.items():
            setattr(header, keyword, value(number))

    change(folder, edit)


def ordinary(case: Case) -> Case:
    """Register an ordinary series."""
    ORDINARY.append(case)
    return case


def odd(case: Case) -> Case:
    """Register an odd series."""
    ODD.append(case)
    return case


@ordinary
def axial(folder: Path) -> list[Volume]:
    """Axial CT."""
    return [series(folder)]


@ordinary
def backwards(folder: Path) -> list[Volume]:
    """Axial CT, numbered from head to foot."""
    top = (*ORIGIN_MM[:2], ORIGIN_MM[2] + 33.0)
    return [series(folder, origin_mm=top, step=np.array([0.0, 0.0, -3.0]))]


@ordinary
def coronal(folder: Path) -> list[Volume]:
    """Coronal CT."""
    return [series(folder, orientation=CORONAL)]


@ordinary
def sagittal(folder: Path) -> list[Volume]:
    """Sagittal MR."""
    return [series(folder, orientation=SAGITTAL, **MR)]


@ordinary
def oblique(folder: Path) -> list[Volume]:
    """Oblique MR (two angles)."""
    a, b = np.radians((20.0, 15.0))
    row = np.array([np.cos(a), np.sin(a), 0.0])
    column = np.array([-np.sin(a) * np.cos(b), np.cos(a) * np.cos(b), -np.sin(b)])
    orientation = tuple(float(f"{value:.12f}") for value in (*row, *column))
    return [series(folder, orientation=orientation, **MR)]


@ordinary
def prone(folder: Path) -> list[Volume]:
    """Prone."""
    return [series(folder, orientation=(-1.0, 0, 0, 0, -1.0, 0), PatientPosition="HFP")]


@ordinary
def feet_first(folder: Path) -> list[Volume]:
    """Feet first."""
    return [series(folder, orientation=(-1.0, 0, 0, 0, 1.0, 0), PatientPosition="FFS")]


@ordinary
def decubitus(folder: Path) -> list[Volume]:
    """Decubitus, pixels that are not square."""
    orientation = (0, -1.0, 0, 1.0, 0, 0)
    return [series(folder, orientation=orientation, spacing_mm=(3.0, 1.5, 2.5))]


@ordinary
def shuffled_names(folder: Path) -> list[Volume]:
    """Shuffled file names without ending."""
    answer = series(folder)
    order = np.random.default_rng(1).permutation(len(hu()))
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(folder / f"IM{order[number]:04d}")
    return [answer]


@ordinary
def number_gaps(folder: Path) -> list[Volume]:
    """Instance numbers with gaps."""
    answer = series(folder)
    with_attributes(folder, InstanceNumber=lambda number: 7 + 3 * number + number // 4)
    return [answer]


@ordinary
def slope(folder: Path) -> list[Volume]:
    """Slope 0.25, intercept 10."""
    answer = series(folder, RescaleSlope=0.25, RescaleIntercept=10)
    return [Volume(voxels=(answer.voxels + 1024) * 0.25 + 10, affine=answer.affine)]


@ordinary
def slope_per_slice(folder: Path) -> list[Volume]:
    """PET, another slope in each slice."""
    answer = series(folder, **PET, RescaleIntercept=0)
    slopes = 1 + np.arange(SHAPE[0]) / 8
    with_attributes(folder, RescaleSlope=lambda number: slopes[number])
    return [Volume(voxels=(answer.voxels + 1024) * slopes[:, None, None], affine=answer.affine)]


@ordinary
def unsigned(folder: Path) -> list[Volume]:
    """12 bits, unsigned."""
    return [series(folder, BitsStored=12, HighBit=11, PixelRepresentation=0)]


@ordinary
def rounded_positions(folder: Path) -> list[Volume]:
    """0.7 mm slices, positions rounded to 0.01 mm."""
    answer = series(folder, spacing_mm=(0.703125, 2.0, 2.0))
    with_attributes(
        folder,
        ImagePositionPatient=lambda n: [*ORIGIN_MM[:2], round(ORIGIN_MM[2] + 0.703125 * n, 2)],
    )
    return [answer]


@ordinary
def overlapping(folder: Path) -> list[Volume]:
    """5 mm thick slices, every 3 mm."""
    answer = series(folder)
    with_attributes(folder, SliceThickness=lambda _: 5)
    return [answer]


@ordinary
def implicit(folder: Path) -> list[Volume]:
    """Implicit value representations."""
    answer = series(folder)
    change(folder, lambda header, _: in_syntax(header, ImplicitVRLittleEndian))
    return [answer]


@ordinary
def enhanced_ct(folder: Path) -> list[Volume]:
    """Enhanced CT."""
    return [multi_frame(folder)]


@ordinary
def enhanced_mr(folder: Path) -> list[Volume]:
    """Enhanced MR, sagittal."""
    return [multi_frame(folder, orientation=SAGITTAL, **ENHANCED)]


@odd
def acquisition_order(folder: Path) -> list[Volume]:
    """MR, instance numbers in the order of acquisition."""
    answer = series(folder, **MR)
    with_attributes(folder, InstanceNumber=lambda number: number // 2 + 1 + 6 * (number % 2))
    return [answer]


@odd
def equal_numbers(folder: Path) -> list[Volume]:
    """All instance numbers equal."""
    answer = series(folder)
    with_attributes(folder, InstanceNumber=lambda _: 1)
    return [answer]


@odd
def no_numbers(folder: Path) -> list[Volume]:
    """No instance numbers."""
    answer = series(folder)

    def edit(header: Dataset, _: int) -> None:
        del header.InstanceNumber

    change(folder, edit)
    return [answer]


@odd
def duplicates(folder: Path) -> list[Volume]:
    """Three slices twice."""
    answer = series(folder)
    for number in (2, 5, 6):
        shutil.copy(folder / f"slice{number:03d}.dcm", folder / f"copy{number:03d}.dcm")
    return [answer]


@odd
def missing_slice(folder: Path) -> list[Volume]:
    """A missing slice."""
    series(folder)
    (folder / "slice005.dcm").unlink()
    return []


@odd
def missing_end(folder: Path) -> list[Volume]:
    """PET, the last slice missing (NumberOfSlices)."""
    series(folder, **PET, NumberOfSlices=SHAPE[0])
    (folder / "slice011.dcm").unlink()
    return []


@odd
def scout_series(folder: Path) -> list[Volume]:
    """Scout in the folder, a series of its own."""
    answer = series(folder)
    scout = {"SeriesInstanceUID": "1.2.3.9", "SeriesNumber": 2}
    kind = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    write_series(folder, hu(1)[:1], name="scout", orientation=CORONAL, ImageType=kind, **scout)
    return [answer]


@odd
def scout_inside(folder: Path) -> list[Volume]:
    """Scouts within the series, not marked."""
    answer = series(folder)
    write_series(
        folder,
        hu(1, (2, 30, 30)),
        name="a_scout",
        orientation=CORONAL,
        SeriesNumber=1,
        AcquisitionNumber=1,
    )
    return [answer]


@odd
def two_series(folder: Path) -> list[Volume]:
    """Two series of one place."""
    first = series(folder)
    second = {"SeriesInstanceUID": "1.2.3.8", "SeriesNumber": 2, "name": "second"}
    return [first, series(folder, hu(1), **second)]


@odd
def two_sizes(folder: Path) -> list[Volume]:
    """Two volumes of different sizes in one series."""
    second = hu(1, (8, 12, 10))
    return [series(folder), series(folder, second, name="small", origin_mm=(0.0, 0.0, 300.0))]


@odd
def uneven(folder: Path) -> list[Volume]:
    """Spacing changes from 3 to 5 mm."""
    series(folder)
    with_attributes(
        folder,
        ImagePositionPatient=lambda n: [*ORIGIN_MM[:2], ORIGIN_MM[2] + 3 * n + 2 * max(n - 6, 0)],
    )
    return []


@odd
def tilt(folder: Path) -> list[Volume]:
    """Gantry tilt of 15 degrees."""
    step = np.array([0.0, 3.0 * np.tan(np.radians(15)), 3.0])
    return [series(folder, step=np.round(step, 6), GantryDetectorTilt=15)]


@odd
def echoes(folder: Path) -> list[Volume]:
    """Two echoes."""
    return [
        series(folder, hu(number), name=f"echo{number}_", **MR | {"EchoTime": 5 * number})
        for number in (1, 2)
    ]


@odd
def time_points(folder: Path) -> list[Volume]:
    """Three time points."""
    answers = [
        series(
            folder,
            hu(number),
            name=f"time{number}_",
            TemporalPositionIdentifier=number,
            AcquisitionNumber=number,
            AcquisitionTime=f"12000{number}",
            **MR,
        )
        for number in (1, 2, 3)
    ]
    with_attributes(folder, InstanceNumber=lambda number: number + 1)
    return answers


@odd
def kernels(folder: Path) -> list[Volume]:
    """Two reconstructions in one series."""
    return [
        series(folder, hu(number), name=kernel, ConvolutionKernel=kernel)
        for number, kernel in enumerate(("B30f", "B70f"))
    ]


@odd
def table_of_values(folder: Path) -> list[Volume]:
    """Intensities in a table (modality LUT)."""
    answer = series(folder, PixelRepresentation=0)
    stored = hu() % 100
    lut = Dataset()
    lut.LUTDescriptor, lut.ModalityLUTType = [100, 0, 16], "US"
    lut.LUTData = (3 * np.arange(100, dtype="<u2") + 7).tobytes()
    lut["LUTData"].VR = "OW"

    def edit(header: Dataset, number: int) -> None:
        del header.RescaleSlope, header.RescaleIntercept
        header.PixelData = stored[number].astype("<u2").tobytes()
        header.ModalityLUTSequence = [lut]

    change(folder, edit)
    return [Volume(voxels=3.0 * stored + 7, affine=answer.affine)]


@odd
def derived(folder: Path) -> list[Volume]:
    """Projections at the places of four slices."""
    answer = series(folder, ImageType=["ORIGINAL", "PRIMARY", "AXIAL"])
    kind = ["DERIVED", "SECONDARY", "PROJECTION IMAGE"]
    write_series(folder, hu(1)[:4], name="projection", ImageType=kind, SeriesNumber=1)
    return [answer]


@odd
def foreign_files(folder: Path) -> list[Volume]:
    """Empty, cut and macOS files, a report and a structure set."""
    answer = series(folder)
    whole = (folder / "slice003.dcm").read_bytes()
    (folder / "empty.dcm").write_bytes(b"")
    (folder / "cut.dcm").write_bytes(whole[:300])
    (folder / "._slice003.dcm").write_bytes(b"\x00\x05\x16\x07" + bytes(300))
    for number, modality in enumerate(("SR", "RTSTRUCT")):
        uid = f"1.2.3.7.{number}"
        new_file(Modality=modality, SeriesInstanceUID=uid, SOPInstanceUID=generate_uid()).save_as(
            folder / f"{modality}.dcm", enforce_file_format=True
        )
    return [answer]


@odd
def nested(folder: Path) -> list[Volume]:
    """In two nested folders."""
    answer = series(folder)
    for number, path in enumerate(sorted(folder.glob("*.dcm"))):
        target = folder / "study" / f"part {number % 2}"
        target.mkdir(parents=True, exist_ok=True)
        path.rename(target / path.name)
    return [answer]


@odd
def uid_per_file(folder: Path) -> list[Volume]:
    """Another SeriesInstanceUID in each file."""
    answer = series(folder)
    with_attributes(folder, SeriesInstanceUID=lambda number: f"1.2.3.4.{number}")
    return [answer]


@odd
def monochrome1(folder: Path) -> list[Volume]:
    """MONOCHROME1."""
    return [series(folder, PhotometricInterpretation="MONOCHROME1")]


@odd
def no_rescale(folder: Path) -> list[Volume]:
    """MR without rescale tags."""
    answer = series(folder, **MR)

    def edit(header: Dataset, _: int) -> None:
        del header.RescaleSlope, header.RescaleIntercept

    change(folder, edit)
    return [Volume(voxels=answer.voxels + 1024, affine=answer.affine)]


@odd
def eight_bits(folder: Path) -> list[Volume]:
    """8 bits."""
    answer = series(folder)
    stored = (hu() % 256).astype(np.uint8)

    def edit(header: Dataset, number: int) -> None:
        header.BitsAllocated = header.BitsStored = 8
        header.HighBit, header.PixelRepresentation = 7, 0
        header.PixelData = stored[number].tobytes()

    change(folder, edit)
    return [Volume(voxels=stored - 1024.0, affine=answer.affine)]


@odd
def high_bit(folder: Path) -> list[Volume]:
    """12 bits in the upper bits of 16 (HighBit 15)."""
    answer = series(folder, BitsStored=12, HighBit=15, PixelRepresentation=0)

    def edit(header: Dataset, _: int) -> None:
        stored = np.frombuffer(header.PixelData, "<u2")
        header.PixelData = (stored << 4).astype("<u2").tobytes()

    change(folder, edit)
    return [answer]


@odd
def padding(folder: Path) -> list[Volume]:
    """Bytes behind the pixels."""
    answer = series(folder)

    def edit(header: Dataset, _: int) -> None:
        header.PixelData += bytes(600)

    change(folder, edit)
    return [answer]


@odd
def half_derived(folder: Path) -> list[Volume]:
    """The last four slices are derived images."""
    answer = series(folder, ImageType=["ORIGINAL", "PRIMARY", "AXIAL"])
    kind = ("ORIGINAL", "DERIVED")
    with_attributes(folder, ImageType=lambda number: [kind[number >= 8], "PRIMARY", "AXIAL"])
    return [answer]


@odd
def no_preamble(folder: Path) -> list[Volume]:
    """Files without preamble."""
    answer = series(folder)
    for path in folder.glob("*.dcm"):
        path.write_bytes(path.read_bytes()[132:])
    return [answer]


def _compressed(name: str, syntax: str, encode: Callable[[np.ndarray], bytes]) -> Case:
    def case(folder: Path) -> list[Volume]:
        answer = series(folder)

        def edit(header: Dataset, _: int) -> None:
            plane = np.frombuffer(header.PixelData, "<u2").reshape(header.Rows, header.Columns)
            header.PixelData = encapsulate([bytes(encode(plane))])
            header["PixelData"].VR = "OB"
            header.file_meta.TransferSyntaxUID = syntax

        change(folder, edit)
        return [answer]

    case.__doc__ = name
    return case


def _jpeg_lossless(plane: np.ndarray) -> bytes:
    return imagecodecs.jpeg8_encode(plane, lossless=True, predictor=1, bitspersample=16)


def _jpeg_2000(plane: np.ndarray) -> bytes:
    return imagecodecs.jpeg2k_encode(plane, level=0, reversible=True, codecformat="j2k")


odd(_compressed("JPEG lossless.", JPEGLosslessSV1, _jpeg_lossless))
odd(_compressed("JPEG-LS.", JPEGLSLossless, imagecodecs.jpegls_encode))
odd(_compressed("JPEG 2000.", JPEG2000Lossless, _jpeg_2000))


@odd
def rle(folder: Path) -> list[Volume]:
    """RLE."""
    answer = series(folder)
    change(folder, lambda header, _: header.compress(RLELossless, generate_instance_uid=False))
    return [answer]


@odd
def deflated(folder: Path) -> list[Volume]:
    """Deflated."""
    answer = series(folder)

    def edit(header: Dataset, _: int) -> None:
        header.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian

    change(folder, edit)
    return [answer]


@odd
def big_endian(folder: Path) -> list[Volume]:
    """Big endian."""
    answer = series(folder)
    change(folder, lambda header, _: in_syntax(header, ExplicitVRBigEndian))
    return [answer]


@odd
def enhanced_shuffled(folder: Path) -> list[Volume]:
    """Enhanced CT, frames in another order."""
    return [multi_frame(folder, order=[int(n) for n in np.random.default_rng(2).permutation(12)])]


@odd
def enhanced_rescale(folder: Path) -> list[Volume]:
    """Enhanced CT, another rescaling in each frame."""
    scalings = [(1 + number / 4, -1024.0 + number) for number in range(SHAPE[0])]
    answer = multi_frame(folder, per_frame=scalings)
    slopes, intercepts = np.array(scalings).T[:, :, None, None]
    return [Volume(voxels=(answer.voxels + 1024) * slopes + intercepts, affine=answer.affine)]


@odd
def enhanced_stack_numbers(folder: Path) -> list[Volume]:
    """Enhanced MR, all stack numbers 1."""
    return [multi_frame(folder, stack_numbers=[1] * SHAPE[0], **ENHANCED)]


@odd
def enhanced_gap(folder: Path) -> list[Volume]:
    """Enhanced CT, a missing frame."""
    multi_frame(folder, order=[number for number in range(SHAPE[0]) if number != 5])
    return []


@odd
def enhanced_time_points(folder: Path) -> list[Volume]:
    """Enhanced MR, two time points."""
    voxels = np.concatenate([hu(), hu(1)])

    def edit(header: Dataset, _: int) -> None:
        for frame, group in enumerate(header.PerFrameFunctionalGroupsSequence):
            z = ORIGIN_MM[2] + 3.0 * (frame % 12)
            group.PlanePositionSequence[0].ImagePositionPatient = [*ORIGIN_MM[:2], z]
            content = group.FrameContentSequence[0]
            content.InStackPositionNumber = frame % 12 + 1
            content.TemporalPositionIndex = frame // 12 + 1

    multi_frame(folder, voxels, **ENHANCED)
    change(folder, edit)
    return [volume(hu()), volume(hu(1))]


@odd
def enhanced_stacks(folder: Path) -> list[Volume]:
    """Enhanced MR, an axial and a sagittal stack."""
    multi_frame(folder, np.concatenate([hu(), hu(1)]), **ENHANCED)

    def edit(header: Dataset, _: int) -> None:
        shared = header.SharedFunctionalGroupsSequence[0]
        del shared.PlaneOrientationSequence
        for frame, group in enumerate(header.PerFrameFunctionalGroupsSequence):
            number, second = frame % 12, frame >= 12
            plane = Dataset()
            plane.ImageOrientationPatient = list(SAGITTAL if second else AXIAL)
            group.PlaneOrientationSequence = [plane]
            place = np.add(ORIGIN_MM, np.multiply((-3.0, 0, 0) if second else (0, 0, 3.0), number))
            group.PlanePositionSequence[0].ImagePositionPatient = [float(mm) for mm in place]
            content = group.FrameContentSequence[0]
            content.StackID, content.InStackPositionNumber = str(1 + second), number + 1

    change(folder, edit)
    return [volume(hu()), volume(hu(1), orientation=SAGITTAL)]


@odd
def enhanced_files(folder: Path) -> list[Volume]:
    """Enhanced CT, one frame per file."""
    voxels = hu()
    for number in range(SHAPE[0]):
        write_multi_frame(
            folder / f"{number:03d}.dcm",
            voxels[number : number + 1],
            origin_mm=(*ORIGIN_MM[:2], ORIGIN_MM[2] + 3.0 * number),
            InstanceNumber=number + 1,
            SOPInstanceUID=generate_uid(),
        )
    return [volume(voxels)]
