"""Which library decodes compressed pixels: none that ends the process for damaged data."""

from __future__ import annotations

import pytest
from pydicom.uid import (
    HTJ2K,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from totalfast.files.dicom.decoders import decoder_of


@pytest.mark.parametrize(
    "syntax",
    [
        HTJ2K,
        JPEG2000Lossless,
        JPEGBaseline8Bit,
        JPEGExtended12Bit,
        JPEGLSLossless,
        JPEGLosslessSV1,
    ],
)
def test_imagecodecs_decodes_what_gdcm_would(syntax):
    assert decoder_of(syntax).available_plugins == ("imagecodecs",)


def test_pydicom_decodes_the_rest_without_gdcm():
    assert decoder_of(ExplicitVRLittleEndian).available_plugins == ()
    assert "gdcm" not in decoder_of(RLELossless).available_plugins
