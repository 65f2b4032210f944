"""Read the voxels of slices, one after the other, and the affine of the volume they form."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import nibabel as nib
import numpy as np
from nibabel.orientations import (
    apply_orientation,
    axcodes2ornt,
    inv_ornt_aff,
    io_orientation,
    ornt_transform,
)
from nibabel.volumeutils import apply_read_scaling

from totalfast.errors import InputError
from totalfast.files.dicom.codestream import compressed_sizes, rle_is_too_long
from totalfast.files.dicom.find import damage_refused, errors_of_damage, values_unchecked
from totalfast.files.dicom.header import LONGEST_HEADER, inflate

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from numpy.typing import DTypeLike, NDArray
    from pydicom import Dataset
    from pydicom.pixels.decoders.base import Decoder

    from totalfast.files.dicom.header import Slice

AXES = "LAS"
"""Axes of the image, those of dicom2nifti's."""

PIXELS = (
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "NumberOfFrames",
    "Rows",
    "Columns",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "PixelData",
    "ExtendedOffsetTable",
    "ExtendedOffsetTableLengths",
)
"""Attributes that are read for the pixels."""


class SliceVoxels:
    """Voxels of a volume that are read when they are needed: nibabel's array proxy.

    Parameters
    ----------
    source
        The user's path, for messages.
    slices
        Slices in the order of their positions.

    Notes
    -----
    Slope and intercept are the slices', if all have the same; then the stored integers are kept.
    Otherwise voxels are float64 intensities, as dicom2nifti's.
    """

    is_proxy = True
    file_like = None

    def __init__(self, source: Path, slices: Sequence[Slice]) -> None:
        self._source, self._slices = source, tuple(slices)
        rows, columns = slices[0].shape
        native = io_orientation(native_affine(self._slices))
        self._to_native = ornt_transform(axcodes2ornt(AXES), native)
        self.shape = tuple(
            (columns, rows, len(slices))[int(axis)] for axis in self._to_native[:, 0]
        )
        self.ndim = 3
        scalings = {(each.slope, each.intercept) for each in slices}
        dtypes = [each.dtype for each in slices]
        self._is_scaled = len(scalings) == 1
        self.slope, self.inter = scalings.pop() if self._is_scaled else (1.0, 0.0)
        self.dtype = np.result_type(*set(dtypes)) if self._is_scaled else np.dtype(np.float64)

    def get_unscaled(self) -> NDArray[Any]:
        """Read all voxels (x, y, z), before slope and intercept."""
        voxels: NDArray[Any] = np.empty(self.shape, self.dtype, order="F")
        native = apply_orientation(voxels, self._to_native)
        with damage_refused(self._source):
            for number, (each, plane) in enumerate(read_planes(self._source, self._slices)):
                place = native[:, :, number]
                if self._is_scaled:
                    place[...] = plane.T
                else:
                    np.multiply(plane.T, each.slope, out=place)
                    place += each.intercept
        return voxels

    def __array__(
        self, dtype: DTypeLike | None = None, *, copy: bool | None = None
    ) -> NDArray[Any]:
        """Read the voxels and scale them, as nibabel's proxies do; numpy's protocol."""
        slope, inter = np.asarray(self.slope), np.asarray(self.inter)
        return np.asarray(apply_read_scaling(self.get_unscaled(), slope, inter), dtype=dtype)

    def __getitem__(self, index: slice | tuple[slice | int, ...]) -> NDArray[Any]:
        """Part of the intensities; all voxels are read for it."""
        part: NDArray[Any] = np.asarray(self)[index]
        return part


def native_affine(slices: Sequence[Slice]) -> NDArray[np.float64]:
    """RAS+ affine of (column, row, slice), DICOM PS3.3, C.7.6.2.1.1.

    The step from slice to slice is the mean, which may be sheared.
    """
    first = slices[0]
    down_mm, right_mm = first.spacing_mm
    affine = np.eye(4)
    affine[:3, 0] = np.multiply(first.orientation[:3], right_mm)
    affine[:3, 1] = np.multiply(first.orientation[3:], down_mm)
    affine[:3, 2] = np.subtract(slices[-1].position, first.position) / (len(slices) - 1)
    affine[:3, 3] = first.position
    affine[:2] *= -1
    return affine


def image_of(source: Path, slices: Sequence[Slice]) -> nib.Nifti1Image:
    """Return the image of a volume; its voxels are read from the slices when they are needed."""
    voxels = SliceVoxels(source, slices)
    native = native_affine(slices)
    to_image = ornt_transform(io_orientation(native), axcodes2ornt(AXES))
    rows, columns = slices[0].shape
    affine = native @ inv_ornt_aff(to_image, (columns, rows, len(slices)))
    # The dtype is given because nibabel would read voxels to find it.
    image = nib.Nifti1Image(voxels, affine, dtype=voxels.dtype)
    header = image.header
    header.set_data_dtype(voxels.dtype)
    header.set_xyzt_units("mm")
    # Upstream reads the affine from a file, where it is float32.
    return nib.Nifti1Image(voxels, header.get_best_affine(), header, dtype=voxels.dtype)


def read_planes(source: Path, slices: Sequence[Slice]) -> Iterator[tuple[Slice, NDArray[Any]]]:
    """Read the stored pixels (row, column) of slices; a file of many frames is read once."""
    opened: tuple[object, Dataset | None] = (None, None)
    for each in slices:
        if opened[0] is not each.file or opened[1] is None:
            opened = (each.file, _open_pixels(source, each))
        yield each, _decode(source, opened[1], each)  # type: ignore[arg-type]


def _open_pixels(source: Path, each: Slice) -> Dataset:
    from pydicom import dcmread

    voxels = each.shape[0] * each.shape[1] * each.frames
    with each.file.open() as stream:
        inflated, all_of_it = inflate(stream, LONGEST_HEADER + voxels * each.dtype.itemsize)
        if not all_of_it:
            raise InputError(
                f"{source}: {each.file.name} unpacks to more data than its "
                f"{each.frames} x {each.shape[1]} x {each.shape[0]} pixels need; it was not read."
            )
        with values_unchecked():
            return dcmread(inflated, force=True, specific_tags=list(PIXELS))


def _decode(source: Path, opened: Dataset, each: Slice) -> NDArray[Any]:
    """Decode one plane; its values are those that BitsStored and HighBit promise."""
    from pydicom.pixels.decoders.base import get_decoder
    from pydicom.uid import ExplicitVRBigEndian, ImplicitVRLittleEndian

    if "TransferSyntaxUID" not in opened.file_meta:
        little = opened.original_encoding[1] is not False
        opened.file_meta.TransferSyntaxUID = (
            ImplicitVRLittleEndian if little else ExplicitVRBigEndian
        )
    syntax = opened.file_meta.TransferSyntaxUID
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError as error:
        raise InputError(
            f"{source}: pydicom has no decoder for the transfer syntax of {each.file.name} "
            f"({syntax.name}); convert the series, for example with gdcmconv --raw."
        ) from error
    if not decoder.is_available:
        raise InputError(
            f"{source}: {each.file.name} is compressed ({syntax.name}); to read it, install "
            f"{_packages(decoder)}."
        )
    try:
        if syntax.is_encapsulated:
            _check_compressed(source, opened, each)
        plane = decoder.as_array(opened, index=each.frame, raw=True)[0]
    except InputError:
        raise
    except errors_of_damage() as error:
        others = _packages(decoder)
        raise InputError(
            f"{source}: the pixels of {each.file.name} ({syntax.name}) are damaged, or of a kind "
            f"that the installed decoders can't read ({type(error).__name__})."
            + (f" Other decoders: {others}." if others else "")
        ) from error
    if plane.shape != each.shape or not np.can_cast(plane.dtype, each.dtype):
        raise InputError(
            f"{source}: {each.file.name} has {' x '.join(map(str, plane.shape))} pixels of type "
            f"{plane.dtype} instead of {' x '.join(map(str, each.shape))} of type {each.dtype}."
        )
    return _sign_extended(plane, opened)


def _packages(decoder: Decoder) -> str:
    """The packages with which pydicom could use further decoders."""
    needs = [text.partition(" - requires ")[2] or text for text in decoder.missing_dependencies]
    return " or ".join(needs).replace("gdcm>", "python-gdcm>")


def _check_compressed(source: Path, opened: Dataset, each: Slice) -> None:
    """Refuse a plane that would unpack to another size than the header's."""
    from pydicom.encaps import get_frame
    from pydicom.uid import RLELossless

    table, lengths = opened.get("ExtendedOffsetTable"), opened.get("ExtendedOffsetTableLengths")
    plane = get_frame(
        opened.PixelData,
        each.frame,
        number_of_frames=each.frames,
        extended_offsets=(table, lengths) if table and lengths else None,
    )
    if opened.file_meta.TransferSyntaxUID == RLELossless:
        if rle_is_too_long(plane, math.prod(each.shape) * each.dtype.itemsize):
            raise InputError(
                f"{source}: {each.file.name} has {len(plane)} bytes of compressed pixels for "
                f"{' x '.join(map(str, each.shape))} pixels; it was not read."
            )
        return
    sizes = compressed_sizes(plane)
    if not sizes:
        raise InputError(
            f"{source}: the compressed pixels of {each.file.name} have no size; they are damaged."
        )
    for rows, columns, samples in sizes:
        if (rows, columns, samples) != (*each.shape, 1):
            raise InputError(
                f"{source}: {each.file.name} has compressed pixels for {rows} x {columns} x "
                f"{samples}, but its header promises {' x '.join(map(str, each.shape))} x 1; it "
                "was not read."
            )


def _sign_extended(plane: NDArray[Any], header: Dataset) -> NDArray[Any]:
    """Repeat the sign bit in the unused high bits, where a scanner left them 0.

    dicom2nifti does the same; pydicom does not.
    """
    stored, high = int(header.BitsStored), int(header.HighBit)
    if plane.dtype.kind != "i" or stored >= plane.dtype.itemsize * 8 or high != stored - 1:
        return plane
    if plane.max(initial=0) < 1 << high:
        return plane
    return np.where(plane < 1 << high, plane, plane | np.array(-1 << high, plane.dtype))
