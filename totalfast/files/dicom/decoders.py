"""Decoders of compressed planes: pydicom's handling of bits and signs, imagecodecs' codecs.

pydicom would prefer GDCM, which ends the process (abort, segmentation fault) for damaged JPEG.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import TYPE_CHECKING

from pydicom.pixels.decoders.base import Decoder, get_decoder
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
)

if TYPE_CHECKING:
    from pydicom.pixels.decoders.base import DecodeRunner
    from pydicom.uid import UID

CODECS = {
    **dict.fromkeys(
        (JPEGBaseline8Bit, JPEGExtended12Bit, JPEGLossless, JPEGLosslessSV1), "jpeg8_decode"
    ),
    **dict.fromkeys((JPEGLSLossless, JPEGLSNearLossless), "jpegls_decode"),
    **dict.fromkeys(
        (JPEG2000Lossless, JPEG2000, HTJ2KLossless, HTJ2KLosslessRPCL, HTJ2K), "jpeg2k_decode"
    ),
}
"""Transfer syntax to the function of imagecodecs."""

DECODER_DEPENDENCIES = dict.fromkeys(CODECS, ("imagecodecs",))
"""For pydicom, which reads this name."""


@functools.cache
def decoder_of(syntax: UID) -> Decoder:
    """Return the decoder of a transfer syntax.

    Raises
    ------
    NotImplementedError
        If there is none.
    """
    if syntax not in CODECS:
        return get_decoder(syntax)
    decoder = Decoder(syntax)
    decoder.add_plugin("imagecodecs", (__name__, "decode_plane"))
    return decoder


def is_available(syntax: str) -> bool:
    """Whether a transfer syntax can be decoded; pydicom asks."""
    return syntax in CODECS and importlib.util.find_spec("imagecodecs") is not None


def decode_plane(compressed: bytes, runner: DecodeRunner) -> bytes:
    """Decode one plane; pydicom calls this.

    Raises
    ------
    ValueError
        If the samples have more bits than the header allows.
    """
    import imagecodecs

    plane = getattr(imagecodecs, CODECS[runner.transfer_syntax])(compressed)
    bits = plane.dtype.itemsize * 8
    if bits > runner.bits_allocated:
        raise ValueError(f"{bits} bits instead of {runner.bits_allocated}")
    runner.set_option("bits_allocated", bits)
    content: bytes = plane.tobytes()
    return content
