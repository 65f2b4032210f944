"""``Session``: calls that share loaded models, and the default session of ``totalfast.segment``."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from totalfast.engine.devices import validate_device
from totalfast.engine.store import ModelStore
from totalfast.errors import OptionError
from totalfast.files.targets import check_output
from totalfast.options import Options, check_radiomics

if TYPE_CHECKING:
    import nibabel as nib
    from typing_extensions import Unpack

    from totalfast.labels.statistics import Statistics
    from totalfast.options import SegmentKeywords
    from totalfast.run.results import Segmentation


logger = logging.getLogger(__name__)


class Session:
    """Keeps models loaded, so that a second call loads nothing.

    Parameters
    ----------
    device
        "gpu", "cpu", "mps" or "gpu:X"; "gpu" falls back to the CPU. The default for ``segment``.
    keep_models
        False frees each model after use, for programs with a single call. Two models are then in
        memory at a time, the current one and the next, instead of all of a task's models.

    Notes
    -----
    Safe to use from several threads; predictions then take turns.
    """

    def __init__(self, *, device: str = "gpu", keep_models: bool = True) -> None:
        self.device = validate_device(device)
        self.models = ModelStore(keep=keep_models)

    def segment(
        self,
        input: str | Path | nib.Nifti1Image | BinaryIO,  # noqa: A002 - upstream's name
        output: str | Path | None = None,
        **keywords: Unpack[SegmentKeywords],
    ) -> nib.Nifti1Image | tuple[nib.Nifti1Image, Statistics]:
        """Segment one scan; arguments and result are those of ``totalfast.segment``."""
        from totalfast.files.dicom.read import open_series
        from totalfast.files.dicom.write import check_packages, check_series
        from totalfast.files.read import is_dicom
        from totalfast.run.pipeline import run

        options = Options.from_keywords({"device": self.device, **keywords})
        target = None if output is None else Path(output)
        if target is not None and not options.skip_saving:
            check_output(target, options)
        check_radiomics(input, target, options)
        if not is_dicom(input):
            if options.dicom_types:
                raise OptionError(
                    "To use output type dicom_rtstruct or dicom_seg you also have to use a Dicom "
                    "image as input."
                )
            return _result(run(input, target, options=options, store=self.models))
        options.resolved_task()  # an invalid task is refused before a series is converted
        check_packages(options.dicom_types)
        with open_series(Path(input)) as series:
            check_series(series, options.dicom_types)
            return _result(
                run(series.image, target, options=options, store=self.models, series=series)
            )


def _result(segmentation: Segmentation) -> nib.Nifti1Image | tuple[nib.Nifti1Image, Statistics]:
    """Return the label map, or with ``statistics`` the pair (label map, statistics)."""
    if segmentation.statistics is None:
        return segmentation.image
    return segmentation.image, segmentation.statistics


@functools.cache
def default_session() -> Session:
    """Return the session that ``totalfast.segment`` uses."""
    return Session()
