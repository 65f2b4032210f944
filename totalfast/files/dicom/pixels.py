"""Read the stored pixels of slices, decoded, with memory that is bounded by their headers."""

from __future__ import annotations

import io
import math
import struct
from typing import TYPE_CHECKING, Any

import numpy as np

from totalfast.errors import InputError
from totalfast.files.dicom.codestream import compressed_sizes, rle_is_too_long
from totalfast.files.dicom.find import errors_of_damage, values_unchecked
from totalfast.files.dicom.header import LONGEST_HEADER, inflate, pixel_dtype

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from pydicom import Dataset
    from pydicom.pixels.decoders.base import Decoder

    from totalfast.files.dicom.header import Slice

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
    "ModalityLUTSequence",
    "PixelData",
    "ExtendedOffsetTable",
    "ExtendedOffsetTableLengths",
)
"""Attributes that are read for the pixels."""


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
            opened = dcmread(inflated, force=True, specific_tags=list(PIXELS))
    if "PixelData" not in opened:
        raise InputError(f"{source}: {each.file.name} is cut off within its pixels.")
    _complete(opened, voxels)
    return opened


def _complete(opened: Dataset, voxels: int) -> None:
    """Add what the decoders need and ``header`` takes for granted; remove bytes behind the pixels.

    The decoders warn of such bytes in each file.
    """
    opened.SamplesPerPixel = 1
    opened.PhotometricInterpretation = opened.get("PhotometricInterpretation") or "MONOCHROME2"
    opened.PixelRepresentation = opened.get("PixelRepresentation") or 0
    opened.BitsStored = opened.get("BitsStored") or opened.BitsAllocated
    if opened.get("HighBit") is None:
        opened.HighBit = opened.BitsStored - 1
    syntax = opened.file_meta.get("TransferSyntaxUID")
    if syntax is not None and syntax.is_compressed:
        _add_places(opened)
        return
    size = voxels * pixel_dtype(opened).itemsize
    size += size % 2
    if len(opened.PixelData) > size:
        opened["PixelData"].value = opened.PixelData[:size]


def _add_places(opened: Dataset) -> None:
    """Add a table of the frames' places, if it is missing; pydicom would search for each frame."""
    from pydicom.encaps import parse_basic_offsets, parse_fragments

    frames = int(opened.get("NumberOfFrames") or 1)
    buffer = io.BytesIO(opened.PixelData)
    if frames == 1 or "ExtendedOffsetTable" in opened or parse_basic_offsets(buffer):
        return
    start = buffer.tell()
    count, places = parse_fragments(buffer)
    if count != frames:
        return
    lengths = [
        int.from_bytes(opened.PixelData[place + 4 : place + 8], "little") for place in places
    ]
    begins = [place - start for place in places]
    opened.ExtendedOffsetTable = struct.pack(f"<{frames}Q", *begins)
    opened.ExtendedOffsetTableLengths = struct.pack(f"<{frames}Q", *lengths)


def _decode(source: Path, opened: Dataset, each: Slice) -> NDArray[Any]:
    """Decode one plane; its values are those that BitsStored and HighBit promise."""
    from pydicom.pixels.processing import apply_modality_lut

    decoder = _decoder(source, opened, each)
    syntax = opened.file_meta.TransferSyntaxUID
    try:
        if syntax.is_encapsulated:
            _check_compressed(source, opened, each)
        plane, _ = decoder.as_array(
            opened,
            index=each.frame,
            raw=True,
            correct_unused_bits=_unused_low_bits(opened) == 0,  # type: ignore[arg-type]
        )
    except InputError:
        raise
    except errors_of_damage() as error:
        raise InputError(
            f"{source}: the pixels of {each.file.name} ({syntax.name}) are damaged "
            f"({type(error).__name__})."
        ) from error
    expected = pixel_dtype(opened)
    if plane.shape != each.shape or not np.can_cast(plane.dtype, expected):
        raise InputError(
            f"{source}: {each.file.name} has {' x '.join(map(str, plane.shape))} pixels of type "
            f"{plane.dtype} instead of {' x '.join(map(str, each.shape))} of type {expected}."
        )
    plane = _sign_extended(_lowest_bits(plane, opened), opened)
    return apply_modality_lut(plane, opened) if each.in_table else plane


def _decoder(source: Path, opened: Dataset, each: Slice) -> Decoder:
    """Return the decoder for a file; the file gets a transfer syntax if it has none."""
    from pydicom.uid import ExplicitVRBigEndian, ImplicitVRLittleEndian

    from totalfast.files.dicom.decoders import decoder_of

    if "TransferSyntaxUID" not in opened.file_meta:
        little = opened.original_encoding[1] is not False
        opened.file_meta.TransferSyntaxUID = (
            ImplicitVRLittleEndian if little else ExplicitVRBigEndian
        )
    syntax = opened.file_meta.TransferSyntaxUID
    try:
        decoder = decoder_of(syntax)
    except NotImplementedError as error:
        raise InputError(
            f"{source}: pydicom has no decoder for the transfer syntax of {each.file.name} "
            f"({syntax.name}); convert the series, for example with gdcmconv --raw."
        ) from error
    if not decoder.is_available:
        raise InputError(
            f"{source}: {each.file.name} is compressed ({syntax.name}); to read it, install "
            "imagecodecs."
        )
    return decoder


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


def _unused_low_bits(header: Dataset) -> int:
    """Number of bits below the stored ones; not 0 in old files only."""
    allocated, stored, high = header.BitsAllocated, header.BitsStored, header.HighBit
    return max(int(high) + 1 - int(stored), 0) if high < allocated else 0


def _lowest_bits(plane: NDArray[Any], header: Dataset) -> NDArray[Any]:
    """Move the stored bits to the lowest place, if HighBit places them higher.

    If the bits below them are used, HighBit is not true; it is ignored then, as dicom2nifti ignores
    it.
    """
    unused = _unused_low_bits(header)
    if unused == 0 or np.any(plane & ((1 << unused) - 1)):
        return plane
    above = plane.dtype.itemsize * 8 - 1 - int(header.HighBit)
    moved: NDArray[Any] = (plane << above) >> (above + unused)
    return moved


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
