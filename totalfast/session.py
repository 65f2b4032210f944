"""Models kept loaded between calls, and the default session behind ``totalfast.segment``.

Knows devices and loaded models; the steps of a run are in ``pipeline``.
"""

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
        "gpu", "cpu", "mps" or "gpu:X"; "gpu" falls back to the CPU. What ``segment`` uses unless
        its own ``device`` says otherwise.
    keep_models
        False lets each model go when it has been used, for a program that makes one call: two are
        in memory at a time, one that predicts and the next, instead of all that a task has.

    Notes
    -----
    May be used from several threads; predictions then take turns.
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
        options.resolved_task()  # before a series is converted for a task that makes no sense
        check_packages(options.dicom_types)
        with open_series(Path(input)) as series:
            check_series(series, options.dicom_types)
            found = run(series.image, target, options=options, store=self.models, series=series)
            return _result(found)


def _result(found: Segmentation) -> nib.Nifti1Image | tuple[nib.Nifti1Image, Statistics]:
    """What upstream's call returns: the label map, and the figures if they were asked for."""
    return found.image if found.statistics is None else (found.image, found.statistics)


@functools.cache
def default_session() -> Session:
    """Return the session that ``totalfast.segment`` uses."""
    return Session()
