"""Pixels of DICOM files: transfer syntaxes, kinds of values, and files that unpack to more."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import shutil
import subprocess
import sys
import zlib

import imagecodecs
import numpy as np
import pytest
from pydicom import Dataset, dcmread
from pydicom.encaps import encapsulate
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from tests.dicom_series import in_syntax, write_multi_frame, write_series
from totalfast import InputError
from totalfast.files.dicom.codestream import compressed_sizes
from totalfast.files.dicom.decoders import decoder_of
from totalfast.files.dicom.read import open_series
from totalfast.files.read import read_image

HU = np.random.default_rng(5).integers(-1000, 3000, (5, 8, 7))
"""(slice, row, column)."""

IMAGE = HU.transpose(2, 1, 0)[:, ::-1]
"""The same voxels with totalfast's axes, LAS."""


def jpeg(process, predictor=None):
    """Encoder of JPEG; ``process`` is lossless, or the 12 bits of JPEG Extended."""
    if process == "extended":
        return lambda plane: imagecodecs.jpeg8_encode(plane, level=95, bitspersample=12)
    return lambda plane: imagecodecs.jpeg8_encode(
        plane, lossless=True, predictor=predictor, bitspersample=16
    )


def jpeg_2000(**options):
    return lambda plane: imagecodecs.jpeg2k_encode(plane, level=0, reversible=True, **options)


ENCODERS = {
    "JPEG lossless, predictor 1": (JPEGLosslessSV1, jpeg("lossless", 1)),
    "JPEG lossless, predictor 6": (JPEGLossless, imagecodecs.ljpeg_encode),
    "JPEG-LS": (JPEGLSLossless, imagecodecs.jpegls_encode),
    "JPEG 2000": (JPEG2000Lossless, jpeg_2000(codecformat="j2k")),
    "JPEG 2000 in JP2 boxes": (JPEG2000Lossless, jpeg_2000(codecformat="jp2")),
    "HTJ2K": (HTJ2KLossless, imagecodecs.htj2k_encode),
}


def opened(source):
    with open_series(source) as series:
        image = read_image(series.image)
    return image.scale(image.stored), image.grid.affine


def rewritten(folder, change):
    """Read each file, change it, and write it again."""
    for path in sorted(folder.iterdir()):
        header = dcmread(path)
        header = change(header) or header
        header.save_as(path, enforce_file_format=True)
    return folder


def compressed(syntax, encode, *, dtype="<u2"):
    """Change of a file of 16 bits; ``encode`` turns a plane into bytes."""

    def change(header):
        plane = np.frombuffer(header.PixelData, dtype).reshape(header.Rows, header.Columns)
        header.PixelData = encapsulate([bytes(encode(plane))])
        header["PixelData"].VR = "OB"
        header.file_meta.TransferSyntaxUID = syntax

    return change


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("signed", [0, 1])
def test_planes_of_other_encoders_are_decoded_without_loss(tmp_path, name, signed):
    folder = write_series(tmp_path / "ct", HU, PixelRepresentation=signed)
    rewritten(folder, compressed(*ENCODERS[name]))
    np.testing.assert_array_equal(opened(folder)[0], IMAGE)


@pytest.mark.parametrize("name", ENCODERS)
def test_signed_values_survive_an_encoder_that_knows_no_sign(tmp_path, name):
    folder = write_series(tmp_path / "ct", HU - 1024, RescaleIntercept=0)
    rewritten(folder, compressed(*ENCODERS[name]))
    np.testing.assert_array_equal(opened(folder)[0], IMAGE)


def test_run_length_encoded_planes(tmp_path):
    folder = write_series(tmp_path / "ct", HU)
    rewritten(folder, lambda header: header.compress(RLELossless, generate_instance_uid=False))
    assert dcmread(folder / "slice000.dcm").file_meta.TransferSyntaxUID == RLELossless
    np.testing.assert_array_equal(opened(folder)[0], IMAGE)


@pytest.mark.parametrize(
    "syntax",
    [
        DeflatedExplicitVRLittleEndian,
        ExplicitVRBigEndian,
        ExplicitVRLittleEndian,
        ImplicitVRLittleEndian,
    ],
)
@pytest.mark.parametrize("start", ["whole", "no preamble", "no meta information"])
def test_byte_orders_deflation_and_files_without_their_start(tmp_path, syntax, start):
    folder = rewritten(write_series(tmp_path / "ct", HU), lambda header: in_syntax(header, syntax))
    for path in folder.iterdir():
        content = path.read_bytes()
        length = int.from_bytes(content[140:144], "little")
        begin = {"whole": 0, "no preamble": 132, "no meta information": 144 + length}[start]
        path.write_bytes(content[begin:])
    if start == "no meta information" and syntax == DeflatedExplicitVRLittleEndian:
        with pytest.raises(InputError, match="5 x not DICOM"):
            opened(folder)
        return
    np.testing.assert_array_equal(opened(folder)[0], IMAGE)


def test_monochrome1_changes_the_display_only(tmp_path):
    folder = write_series(tmp_path / "ct", HU, PhotometricInterpretation="MONOCHROME1")
    np.testing.assert_array_equal(opened(folder)[0], IMAGE)


def test_without_rescale_tags_stored_values_are_taken_and_ct_is_told(tmp_path, caplog):
    for modality in ("CT", "MR"):
        folder = write_series(tmp_path / modality, HU - 1024, Modality=modality)

        def change(header):
            del header.RescaleSlope, header.RescaleIntercept

        caplog.clear()
        np.testing.assert_array_equal(opened(rewritten(folder, change))[0], IMAGE)
        assert ("no RescaleSlope and RescaleIntercept" in caplog.text) == (modality == "CT")


def test_each_slice_has_its_own_rescaling(tmp_path):
    folder = write_series(tmp_path / "pt", HU - 1024, Modality="PT")

    def change(header):
        header.RescaleSlope, header.RescaleIntercept = header.InstanceNumber / 4, 0.5

    factors = np.arange(1, 6) / 4
    np.testing.assert_array_equal(opened(rewritten(folder, change))[0], IMAGE * factors + 0.5)


@pytest.mark.parametrize("dtype", ["u1", "i1", "<u2", "<i2", "<u4", "<i4"])
def test_integers_of_all_sizes(tmp_path, dtype):
    limits = np.iinfo(dtype)
    stored = np.linspace(limits.min, limits.max, HU.size).astype(dtype).reshape(HU.shape)
    folder = write_series(tmp_path / "ct", HU)

    def change(header):
        bits = limits.bits
        header.BitsAllocated, header.BitsStored, header.HighBit = bits, bits, bits - 1
        header.PixelRepresentation = int(limits.min < 0)
        header.RescaleIntercept = 0
        header.PixelData = stored[header.InstanceNumber - 1].tobytes()

    actual = opened(rewritten(folder, change))[0]
    np.testing.assert_array_equal(actual, stored.transpose(2, 1, 0)[:, ::-1])


@pytest.mark.parametrize("bits", [8, 16])
def test_values_in_a_table(tmp_path, bits):
    folder = write_series(tmp_path / "ct", HU, PixelRepresentation=0)
    stored = HU % 40 + 3
    values = np.arange(30, dtype="<u2")[::-1] * (8 if bits == 8 else 1000)

    def change(header):
        header.PixelData = stored[header.InstanceNumber - 1].astype("<u2").tobytes()
        lut = Dataset()
        lut.LUTDescriptor, lut.ModalityLUTType = [30, 5, bits], "US"
        lut.LUTData = values.tobytes()
        lut["LUTData"].VR = "OW"
        header.ModalityLUTSequence = [lut]
        del header.RescaleSlope, header.RescaleIntercept

    # Numbers before the first and behind the last have the first and the last value.
    expected = values[(stored - 5).clip(0, 29)].transpose(2, 1, 0)[:, ::-1]
    np.testing.assert_array_equal(opened(rewritten(folder, change))[0], expected)


def test_unused_high_bits_are_ignored(tmp_path):
    hu = HU.clip(-1000, 2000)
    folder = write_series(tmp_path / "ct", hu, BitsStored=12, HighBit=11, PixelRepresentation=0)

    def overlay(header):  # until 2004, overlays were stored in these bits
        stored = np.frombuffer(header.PixelData, "<u2") | 0x3000
        header.PixelData = stored.tobytes()

    expected = hu.transpose(2, 1, 0)[:, ::-1]
    np.testing.assert_array_equal(opened(rewritten(folder, overlay))[0], expected)


@pytest.mark.parametrize(("high", "signed"), [(15, 1), (15, 0), (13, 0), (13, 1)])
def test_stored_bits_that_are_not_the_lowest_are_moved(tmp_path, high, signed):
    stored = HU.clip(-1000, 2000) + (0 if signed else 1024)
    folder = write_series(
        tmp_path / "ct",
        HU,
        BitsStored=12,
        HighBit=high,
        PixelRepresentation=signed,
        RescaleIntercept=0,
    )

    def change(header):
        plane = stored[header.InstanceNumber - 1] & 0xFFF
        header.PixelData = (plane << (high - 11)).astype("<u2").tobytes()

    expected = stored.transpose(2, 1, 0)[:, ::-1]
    np.testing.assert_array_equal(opened(rewritten(folder, change))[0], expected)


def test_a_high_bit_that_the_pixels_contradict_is_ignored(tmp_path):
    folder = write_series(tmp_path / "ct", HU, BitsStored=12, HighBit=15, PixelRepresentation=0)
    np.testing.assert_array_equal(opened(folder)[0], IMAGE)


@pytest.mark.parametrize("extra", [2, 3, 112, 1000])
def test_bytes_behind_the_pixels_are_ignored_without_a_warning(tmp_path, extra):
    def change(header):
        header.PixelData += bytes(extra)

    folder = rewritten(write_series(tmp_path / "ct", HU), change)
    np.testing.assert_array_equal(opened(folder)[0], IMAGE)


def test_attributes_of_the_pixels_that_an_exporter_left_out(tmp_path):
    folder = write_series(tmp_path / "ct", HU, PixelRepresentation=0)

    def change(header):
        del header.SamplesPerPixel, header.PhotometricInterpretation, header.PixelRepresentation
        del header.BitsStored, header.HighBit

    np.testing.assert_array_equal(opened(rewritten(folder, change))[0], IMAGE)


def test_frames_in_several_fragments_are_found_by_the_extended_offset_table(tmp_path):
    path = write_multi_frame(tmp_path / "ct.dcm", HU)
    header = dcmread(path)
    planes = [imagecodecs.jpegls_encode((plane + 1024).astype("u2")) for plane in HU]
    content, offsets, lengths = b"", [], []
    for plane in planes:
        offsets.append(len(content))
        begin = len(content)
        for half in (plane[:40], plane[40:]):
            half += b"\0" * (len(half) % 2)
            content += b"\xfe\xff\x00\xe0" + len(half).to_bytes(4, "little") + half
        lengths.append(len(content) - begin - 8)
    header.PixelData = b"\xfe\xff\x00\xe0" + bytes(4) + content + b"\xfe\xff\xdd\xe0" + bytes(4)
    header["PixelData"].VR = "OB"
    header.file_meta.TransferSyntaxUID = JPEGLSLossless
    header.save_as(path, enforce_file_format=True)
    np.testing.assert_array_equal(opened(path)[0], IMAGE)


@pytest.mark.parametrize("has_table", [True, False])
@pytest.mark.parametrize("parts", [1, 2])
def test_compressed_frames_with_and_without_a_table_of_their_places(tmp_path, has_table, parts):
    path = write_multi_frame(tmp_path / "ct.dcm", HU, order=[3, 0, 4, 1, 2])
    header = dcmread(path)
    planes = np.frombuffer(header.PixelData, "<u2").reshape(-1, *HU.shape[1:])
    frames = [bytes(imagecodecs.jpegls_encode(plane)) for plane in planes]
    header.PixelData = encapsulate(frames, fragments_per_frame=parts, has_bot=has_table)
    header["PixelData"].VR = "OB"
    header.file_meta.TransferSyntaxUID = JPEGLSLossless
    header.save_as(path, enforce_file_format=True)
    np.testing.assert_array_equal(opened(path)[0], IMAGE)


def test_folder_links_nested_folders_and_zip_give_the_same_answer(tmp_path):
    plain = write_series(tmp_path / "plain", HU)
    nested = tmp_path / "nested"
    for number, path in enumerate(sorted(plain.iterdir())):
        target = nested / "study" / f"part {number % 2}" / "deep"
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target / "slice")  # the names are equal, the folders differ
        target.joinpath("slice").rename(target / f"{number // 2}")
    linked = tmp_path / "linked"
    linked.mkdir()
    try:
        (linked / "series").symlink_to(plain, target_is_directory=True)
        (linked / "again").symlink_to(linked, target_is_directory=True)
    except OSError:
        pytest.skip("links can't be made here")
    files = tmp_path / "files"
    files.mkdir()
    for path in plain.iterdir():
        (files / path.name).symlink_to(path)
    archives = [
        shutil.make_archive(str(tmp_path / path.name), "zip", path) for path in (plain, nested)
    ]
    expected, affine = opened(plain)
    np.testing.assert_array_equal(expected, IMAGE)
    for source in (nested, linked, files, *map(type(plain), archives)):
        actual, actual_affine = opened(source)
        np.testing.assert_array_equal(actual, expected)
        np.testing.assert_array_equal(actual_affine, affine)


def test_slices_that_the_header_counts_but_nobody_has(tmp_path):
    folder = write_series(tmp_path / "pt", HU, Modality="PT", NumberOfSlices=5)
    np.testing.assert_array_equal(opened(folder)[0], IMAGE)
    (folder / "slice004.dcm").unlink()  # at an end, so that the spacing stays even
    with pytest.raises(InputError, match=r"it has 4, and its header promises 5 \(NumberOfSlices\)"):
        opened(folder)


def commented(folder, comment):
    numbers = itertools.count(1)

    def change(header):
        header.ImageComments = comment.format(next(numbers))

    return rewritten(folder, change)


@pytest.mark.parametrize("comment", ["Image {} of 5", "{}/5", "slice {} OF 5, axial"])
def test_slices_that_comments_number_but_nobody_has(tmp_path, comment):
    folder = commented(write_series(tmp_path / "ct", HU), comment)
    np.testing.assert_array_equal(opened(folder)[0], IMAGE)
    (folder / "slice004.dcm").unlink()
    with pytest.raises(InputError, match=r"number 5 \(ImageComments\); missing: 5\."):
        opened(folder)


@pytest.mark.parametrize(
    "comment", ["phase 1 of 5", "no contrast", "2 mm, 3 of 4", "{}/900 mAs of 7"]
)
def test_other_comments_mean_nothing(tmp_path, comment):
    folder = commented(write_series(tmp_path / "ct", HU), comment)
    np.testing.assert_array_equal(opened(folder)[0], IMAGE)


def test_lossy_jpeg_of_12_bits_is_decoded(tmp_path):
    smooth = np.broadcast_to(np.arange(7) * 100, HU.shape)
    folder = write_series(tmp_path / "ct", smooth, BitsStored=12, HighBit=11, PixelRepresentation=0)
    rewritten(folder, compressed(JPEGExtended12Bit, jpeg("extended")))
    expected = smooth.transpose(2, 1, 0)[:, ::-1]
    np.testing.assert_allclose(opened(folder)[0], expected, rtol=0, atol=10)


def test_error_names_the_package_that_decodes(tmp_path, monkeypatch):
    folder = write_series(tmp_path / "ct", HU)
    rewritten(folder, compressed(*ENCODERS["JPEG-LS"]))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    decoder_of.cache_clear()
    with pytest.raises(InputError, match=r"compressed \(JPEG-LS .*to read it, install imagecodecs"):
        opened(folder)
    decoder_of.cache_clear()


def test_planes_with_more_bits_than_the_header_allows_are_refused(tmp_path):
    folder = write_series(tmp_path / "ct", HU)

    def change(header):
        compressed(*ENCODERS["JPEG 2000"])(header)
        header.BitsAllocated = header.BitsStored = 8
        header.HighBit = 7

    with pytest.raises(InputError, match="pixels of slice000.dcm .* are damaged"):
        opened(rewritten(folder, change))


@pytest.mark.parametrize("name", ENCODERS)
def test_damaged_planes_are_refused_or_decoded_but_never_end_the_process(tmp_path, name):
    syntax, encode = ENCODERS[name]
    folder = write_series(tmp_path / "ct", HU[:4])
    random = np.random.default_rng(9)

    def damaged(plane):
        content = bytearray(encode(plane))
        for place in random.integers(0, len(content), random.integers(1, 5)):
            content[place] = random.integers(256)
        return bytes(content)

    files = {path: path.read_bytes() for path in folder.iterdir()}
    for _ in range(60):
        for path, content in files.items():
            path.write_bytes(content)
        rewritten(folder, compressed(syntax, damaged))
        with contextlib.suppress(InputError):
            opened(folder)


def test_a_transfer_syntax_without_any_decoder_is_named(tmp_path):
    def change(header):
        header.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.102"
        header.PixelData = encapsulate([b"\0" * 200])
        header["PixelData"].VR = "OB"

    folder = rewritten(write_series(tmp_path / "ct", HU), change)
    with pytest.raises(InputError, match="MPEG-4 AVC/H.264 High Profile"):
        opened(folder)


GROWTH = """
import sys
from pathlib import Path
from totalfast.errors import InputError
from totalfast.files.dicom.read import open_series
from totalfast.files.read import read_image
import pydicom.pixels, imagecodecs, numpy
imagecodecs.jpeg8_decode, imagecodecs.jpegls_decode, imagecodecs.jpeg2k_decode
def peak_kb():
    # Not getrusage, whose peak includes that of the parent process before exec.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
before = peak_kb()
try:
    with open_series(Path(sys.argv[1])) as series:
        read_image(series.image)
    print("read")
except InputError as error:
    print(error)
print((peak_kb() - before) // 1024)
"""


def refusal_in_bounded_memory(folder):
    """Message of a child process that reads a series; its memory must not grow by 200 MB."""
    if not sys.platform.startswith("linux"):
        pytest.skip("the peak is read from /proc")
    child = subprocess.run(
        [sys.executable, "-c", GROWTH, folder],
        capture_output=True,
        check=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    *message, grown_mb = child.stdout.strip().split("\n")
    assert int(grown_mb) < 200
    return " ".join(message)


HUGE = 60_000


def with_size(plane, rows, columns):
    """Change the size in the header of a JPEG, JPEG-LS or JPEG 2000 plane."""
    content = bytearray(plane)
    if content[:2] == b"\xff\xd8":
        marker = next(
            content.index(bytes([0xFF, code]))
            for code in (0xC3, 0xC1, 0xF7)
            if bytes([0xFF, code]) in content
        )
        content[marker + 5 : marker + 9] = rows.to_bytes(2, "big") + columns.to_bytes(2, "big")
        return bytes(content)
    size = content.index(b"\xff\x51")
    for place, value in ((6, columns), (10, rows), (22, columns), (26, rows)):
        content[size + place : size + place + 4] = value.to_bytes(4, "big")
    return bytes(content)


@pytest.mark.parametrize("name", ENCODERS)
def test_a_plane_that_is_larger_inside_than_its_header_is_refused(tmp_path, name):
    syntax, encode = ENCODERS[name]

    def bomb(plane):
        return with_size(encode(plane), HUGE, HUGE)

    folder = write_series(tmp_path / "ct", HU)
    rewritten(folder, compressed(syntax, bomb))
    message = refusal_in_bounded_memory(folder)
    assert (
        f"compressed pixels for {HUGE} x {HUGE} x 1, but its header promises 8 x 7 x 1" in message
    )


@pytest.mark.parametrize("name", ENCODERS)
def test_a_small_file_that_promises_huge_planes_is_left_out(tmp_path, name):
    syntax, encode = ENCODERS[name]
    folder = write_series(tmp_path / "ct", HU)

    def bomb(header):
        compressed(syntax, lambda plane: with_size(encode(plane), HUGE, HUGE))(header)
        header.Rows = header.Columns = HUGE

    message = refusal_in_bounded_memory(rewritten(folder, bomb))
    assert "5 x pixels that would unpack to an unusual size" in message


def test_a_plane_that_repeats_one_byte_for_ever_is_refused(tmp_path):
    run = bytes([0x81, 0]) * (1 << 23)  # 128 zeros each: 1 GB

    def bomb(header):
        start = np.zeros(16, "<u4")
        start[:3] = 2, 64, 64 + len(run) // 2
        header.PixelData = encapsulate([start.tobytes() + run])
        header["PixelData"].VR = "OB"
        header.file_meta.TransferSyntaxUID = RLELossless

    folder = rewritten(write_series(tmp_path / "ct", HU[:4]), bomb)
    assert "16777280 bytes of compressed pixels for 8 x 7 pixels" in refusal_in_bounded_memory(
        folder
    )


@pytest.mark.parametrize("place", ["header", "pixels", "end"])
def test_a_deflated_file_that_grows_to_gigabytes_is_refused(tmp_path, place):
    folder = write_series(tmp_path / "ct", HU)
    tag = {"header": b"\x09\0\x10\x10", "end": b"\xfc\xff\xfc\xff", "pixels": b""}[place]
    zeros = 1 << 31
    for path in folder.iterdir():
        header = dcmread(path)
        header.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
        header.save_as(path, enforce_file_format=True)
        content = path.read_bytes()
        begin = 144 + int.from_bytes(content[140:144], "little")
        plain = zlib.decompress(content[begin:], -15)
        split = plain.index(b"\x10\0\x10\0") if place == "header" else len(plain)
        if place == "pixels":
            split = plain.index(b"\xe0\x7f\x10\0") + 8
        packer = zlib.compressobj(9, zlib.DEFLATED, -15)
        packed = packer.compress(plain[:split])
        packed += packer.compress((tag and tag + b"OB\0\0") + zeros.to_bytes(4, "little"))
        if path.name == "slice000.dcm":  # compressing 2 GB takes seconds; one file is enough
            for _ in range(zeros >> 24):
                packed += packer.compress(bytes(1 << 24))
        packed += packer.compress(plain[split:]) + packer.flush()
        path.write_bytes(content[:begin] + packed)
        assert path.stat().st_size < 3_000_000
    refusal_in_bounded_memory(folder)
    with pytest.raises(InputError):
        opened(folder)


@pytest.mark.filterwarnings("ignore:End of file reached before delimiter")
@pytest.mark.parametrize("name", ENCODERS)
def test_error_names_a_compressed_file_that_is_cut_off(tmp_path, name):
    folder = rewritten(write_series(tmp_path / "ct", HU), compressed(*ENCODERS[name]))
    path = folder / "slice002.dcm"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(InputError, match="slice002.dcm is cut off within its pixels"):
        opened(folder)


def test_sizes_are_found_behind_other_segments_and_boxes():
    plane = np.zeros((8, 7), np.uint16)
    comment = b"\xff\xfe\x00\x06\xff\xc3\x00\x0b"  # its content looks like a frame header
    for _, encode in ENCODERS.values():
        content = bytes(encode(plane))
        assert set(compressed_sizes(content)) == {(8, 7, 1)}
        if content[:2] == b"\xff\xd8":
            longer = content[:2] + comment + b"\xff" + content[2:]
            assert compressed_sizes(longer) == [(8, 7, 1)]
        for length in range(0, len(content), 3):
            assert set(compressed_sizes(content[:length])) <= {(8, 7, 1)}
    assert compressed_sizes(b"") == compressed_sizes(b"\xff" * 50) == []
