"""Lets programs that use nnU-Net's predictor or export in Python use totalfast's."""

from __future__ import annotations

import functools
import logging
import sys
from typing import TYPE_CHECKING, Any

from totalfast.compat.rebinding import forget, rebind, when_imported
from totalfast.models.nnunet_versions import check_version

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeAlias

    Untyped: TypeAlias = Any
    """nnU-Net's arguments and results, which have no types."""

logger = logging.getLogger(__name__)

LEFT_ALONE = ("nnunetv2.training", "totalfast", "totalsegmentator.nnunet_runtime_patches")
"""Modules that keep nnU-Net's functions."""

TOTALSEGMENTATORS_PATCH = "totalsegmentator.nnunet_runtime_patches"
"""Module with a function that replaces some of the same methods and functions."""

TRAINER = "nnunetv2.training.nnUNetTrainer.nnUNetTrainer"

_ours: dict[str, Callable[..., Any]] = {}
"""The functions that stand in for nnU-Net's while the patch is installed."""


def patch_nnunet(*, export: str = "auto", backend: str = "torch", trust_model: bool = True) -> None:
    """Let nnU-Net's predictor and export work as totalfast's in this process.

    Replaces methods of ``nnUNetPredictor``, so that its instances and subclasses have them too, and
    the functions ``export_prediction_from_logits`` and
    ``convert_predicted_logits_to_segmentation_with_correct_shape``, also in modules that have
    already imported them. With the defaults, labels and files are nnU-Net's. What a program changes
    on the predictor is obeyed; see ``ArgmaxPredictor``. nnU-Net's training is left alone.

    Parameters
    ----------
    export, backend, trust_model
        As for ``ArgmaxPredictor``. By default models are trusted as nnU-Net trusts them: it runs
        code that a model's files may contain.

    Notes
    -----
    Processes that the program starts are not patched; ``python -m totalfast.patch`` does that.
    """
    check_version()
    from totalfast.nnunet import client_model

    client_model.defaults.update(export=export, backend=backend, trust_model=trust_model)
    _install()
    when_imported(TOTALSEGMENTATORS_PATCH, _follow_totalsegmentator)
    when_imported(TRAINER, _leave_trainer_alone)


def unpatch_nnunet() -> None:
    """Undo ``patch_nnunet``, also in modules that were imported after it."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    from totalfast.nnunet import client_model
    from totalfast.nnunet.originals import replaced
    from totalfast.nnunet.predictor import METHODS, ArgmaxPredictor

    forget(_follow_totalsegmentator)
    forget(_leave_trainer_alone)
    for name in METHODS:
        if name in replaced and vars(nnUNetPredictor)[name] is vars(ArgmaxPredictor)[name]:
            setattr(nnUNetPredictor, name, replaced[name])
    for name, ours in _ours.items():
        rebind(ours, replaced[name], skip=("totalfast",))
    _ours.clear()
    replaced.clear()
    client_model.defaults.clear()


def _install() -> None:
    """Replace what is not replaced yet, or has been replaced by TotalSegmentator since."""
    from nnunetv2.inference import export_prediction
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    from totalfast.nnunet import export
    from totalfast.nnunet.client_changes import EXPORT_FUNCTIONS, PREDICTOR
    from totalfast.nnunet.originals import replaced
    from totalfast.nnunet.predictor import METHODS, ArgmaxPredictor

    for name in METHODS:
        theirs, ours = vars(nnUNetPredictor).get(name), vars(ArgmaxPredictor)[name]
        if theirs is not None and theirs is not ours and _is_replaceable(theirs, name):
            replaced[name] = theirs
            setattr(nnUNetPredictor, name, ours)
    for name in EXPORT_FUNCTIONS[PREDICTOR]:
        theirs = getattr(export_prediction, name)
        if theirs is not _ours.get(name) and _is_replaceable(theirs, name):
            replaced[name] = theirs
            _ours.setdefault(name, _stand_in(theirs, getattr(export, name)))
            rebind(theirs, _ours[name], skip=LEFT_ALONE)


def _is_replaceable(theirs: Callable[..., Any], name: str) -> bool:
    """Whether a method or function is nnU-Net's or TotalSegmentator's, and not the program's."""
    from totalfast.nnunet.client_changes import is_known

    known = is_known(theirs, name)
    if not known:
        logger.warning("nnU-Net's %s is not patched, because the program has replaced it.", name)
    return known


def _stand_in(theirs: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    """Return our function with the name of theirs, by which other processes find it."""

    @functools.wraps(theirs)
    def function(*arguments: Untyped, **keywords: Untyped) -> Untyped:
        return ours(*arguments, **keywords)

    return function


def _follow_totalsegmentator() -> None:
    """Replace again what TotalSegmentator will have replaced."""
    module: Any = sys.modules[TOTALSEGMENTATORS_PATCH]
    theirs = module.patch_nnunet_cropped_logits_resampling
    if hasattr(theirs, "__wrapped__"):
        return

    @functools.wraps(theirs)
    def patch_nnunet_cropped_logits_resampling() -> bool:
        done: bool = theirs()
        if _ours:
            _install()
        return done

    module.patch_nnunet_cropped_logits_resampling = patch_nnunet_cropped_logits_resampling


def _leave_trainer_alone() -> None:
    """Give a trainer that was imported later nnU-Net's functions."""
    from totalfast.nnunet.originals import replaced

    names = vars(sys.modules[TRAINER])
    for name, ours in _ours.items():
        if names.get(name) is ours:
            names[name] = replaced[name]
