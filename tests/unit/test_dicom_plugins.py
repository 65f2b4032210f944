"""Which library decodes compressed pixels: none that ends the process, where another one can."""

from __future__ import annotations

import pytest
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import (
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from totalfast.files.dicom.pixels import _plugin


@pytest.mark.parametrize(
    ("syntax", "expected"),
    [
        (JPEGBaseline8Bit, "pillow"),
        (JPEG2000Lossless, "pillow"),
        (JPEGLSLossless, "pyjpegls"),
        (RLELossless, "pydicom"),
        (JPEGExtended12Bit, ""),
        (JPEGLosslessSV1, ""),
        (ExplicitVRLittleEndian, ""),
    ],
)
def test_gdcm_decodes_only_what_no_other_library_decodes(syntax, expected):
    decoder = get_decoder(syntax)
    assert not syntax.is_encapsulated or expected in ("", *decoder.available_plugins)
    assert _plugin(decoder, syntax) == expected
