"""The options of one run, keyword for keyword upstream's, checked once.

Knows names and rules; knows nothing of arrays or files' contents.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from totalfast.engine.backends import resolve_backend
from totalfast.engine.devices import validate_device
from totalfast.errors import OptionError, UnsupportedError
from totalfast.tasks import resolve_task

if TYPE_CHECKING:
    from collections.abc import Sequence

    from totalfast.tasks import Task

EXPORTS = ("auto", "nearest", "linear")
"""Upstream's own way (nearest-neighbour from the model grid), the same said aloud, and smooth
masks from logits that are interpolated on the scanner grid."""

AGGREGATIONS = ("mean", "median")
MODEL_SIZES = ("big", "small")
OUTPUT_TYPES = ("nifti", "dicom_rtstruct", "dicom_seg")
SMALL_BLOB_MM3 = 200.0
"""What ``remove_small_blobs=True`` stands for."""


def parse_output_types(value: str | Sequence[str]) -> tuple[str, ...]:
    """Take one type, several, or several with commas between them; "dicom" is "dicom_rtstruct".

    Raises
    ------
    OptionError
        If one of them is unknown.
    """
    words = [value] if isinstance(value, str) else list(value)
    types = [word.strip() for text in words for word in text.split(",")]
    types = ["dicom_rtstruct" if word == "dicom" else word for word in types]
    unknown = [word for word in types if word not in OUTPUT_TYPES]
    if unknown or not types:
        raise OptionError(
            f"Invalid output types: {unknown}. Allowed are: {', '.join(OUTPUT_TYPES)}."
        )
    return tuple(dict.fromkeys(types))


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of a run; names, meanings and defaults are those of ``totalsegmentator()``.

    Ours are ``export``, how labels come to the scanner grid, one of ``EXPORTS``; ``backend``, what
    runs the networks, one of ``totalfast.engine.backends.BACKENDS``; ``tile_step_size``, the
    task's own if None; and ``max_memory_gb``, which is what is free if None.
    """

    ml: bool = False
    nr_thr_resamp: int = 1
    nr_thr_saving: int = 6
    fast: bool = False
    fastest: bool = False
    task: str = "total"
    roi_subset: tuple[str, ...] | None = None
    roi_subset_robust: tuple[str, ...] | None = None
    body_seg: bool = False
    statistics: bool | Path = False
    statistics_exclude_masks_at_border: bool = True
    stats_aggregation: str = "mean"
    statistics_extra: bool = False
    statistics_normalized_intensities: bool = False
    radiomics: bool = False
    report: Path | None = None
    nora_tag: str | None = None
    v1_order: bool = False
    remove_small_blobs: bool | float = False
    model_size: str = "big"
    crop_path: Path | None = None
    force_split: bool = False
    output_type: tuple[str, ...] = ("nifti",)
    quiet: bool = False
    verbose: bool = False
    skip_saving: bool = False
    device: str = "gpu"
    preview: bool = False
    no_derived_masks: bool = False
    debug: bool = False
    save_lowres: bool = False
    resampling_order: int = 1
    plans: str = "nnUNetPlans"
    robust_crop: bool = False
    higher_order_resampling: bool = False
    higher_order_resampling_LEGACY: bool = False
    save_probabilities: Path | None = None
    license_number: str | None = field(default=None, repr=False)
    test: int = 0
    export: str = "auto"
    backend: str = "auto"
    tile_step_size: float | None = None
    max_memory_gb: float | None = None

    def __post_init__(self) -> None:
        validate_device(self.device)
        resolve_backend(self.backend)
        if self.save_lowres and not (self.fast or self.fastest):
            raise OptionError("save_lowres only works together with fast or fastest mode.")
        if self.save_lowres and self.dicom_types:
            raise OptionError("save_lowres only supports nifti output.")
        if self.resampling_order not in range(6):
            raise OptionError(
                f"resampling_order must be between 0 and 5, not {self.resampling_order}."
            )
        if self.export not in EXPORTS:
            raise OptionError(f"export must be one of {', '.join(EXPORTS)}, not '{self.export}'.")
        step = self.tile_step_size
        if step is not None and not 0 < step <= 1:
            raise OptionError(f"tile_step_size must be above 0 and at most 1, not {step}.")
        if self.max_memory_gb is not None and not self.max_memory_gb > 0:
            raise OptionError(f"max_memory_gb must be above 0, not {self.max_memory_gb}.")
        if self.export == "linear" and (
            self.save_lowres or self.force_split or self.higher_order_resampling_LEGACY
        ):
            raise OptionError(
                "export='linear' does not work with save_lowres, force_split or "
                "higher_order_resampling_LEGACY."
            )
        if self.export == "linear" and (self.higher_order_resampling or self.save_probabilities):
            raise OptionError(
                "export='linear' does not work with save_probabilities or higher_order_resampling, "
                "which interpolate logits in their own way."
            )
        archive = self.save_probabilities
        if archive is not None and (archive.is_dir() or archive.suffix == ".pkl"):
            raise OptionError(
                f"save_probabilities needs the name of an .npz file to write, not {archive}; "
                "a .pkl file is written beside it."
            )
        for name in ("statistics", "report"):
            path = getattr(self, name)
            if isinstance(path, Path) and path.is_dir():
                raise OptionError(f"{name} needs the name of a file to write; {path} is a folder.")
        if self.test != 0:
            raise UnsupportedError(
                f"test={self.test} makes TotalSegmentator's own tests take reference files of its "
                "repository for predictions; totalfast accepts test=0 only."
            )
        if self.stats_aggregation not in AGGREGATIONS:
            raise OptionError(
                f"stats_aggregation must be one of {', '.join(AGGREGATIONS)}, "
                f"not '{self.stats_aggregation}'."
            )
        if self.model_size not in MODEL_SIZES:
            raise OptionError(
                f"model_size must be one of {', '.join(MODEL_SIZES)}, not '{self.model_size}'."
            )
        if self.remove_small_blobs is not False and self.remove_small_blobs <= 0:
            raise OptionError(
                "remove_small_blobs must be a volume above 0, in mm3, "
                f"not {self.remove_small_blobs}."
            )
        for name in ("nr_thr_resamp", "nr_thr_saving"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} must be at least 1, not {getattr(self, name)}.")

    @classmethod
    def from_keywords(cls, keywords: dict[str, Any]) -> Options:
        """Take upstream's keywords.

        Raises
        ------
        UnsupportedError
            If one of them asks for what totalfast can't do yet.
        OptionError
            If one of them is unknown or makes no sense.
        """
        own = {field.name for field in fields(cls)}
        for name in keywords:
            if name not in own:
                raise OptionError(f"unknown option '{name}'.")
        taken = dict(keywords)
        if taken.get("nora_tag") == "None":  # upstream's word for it
            taken["nora_tag"] = None
        for name in ("save_probabilities", "crop_path", "statistics", "report"):
            if taken.get(name) is not None and not isinstance(taken[name], bool):
                taken[name] = Path(taken[name]).absolute()
        if "output_type" in taken:
            taken["output_type"] = parse_output_types(taken["output_type"])
        for name in ("roi_subset", "roi_subset_robust"):
            if taken.get(name) is not None:
                if not isinstance(taken[name], list | tuple):
                    raise OptionError(f"{name} must be a list of class names, not {taken[name]!r}.")
                taken[name] = tuple(taken[name])
        return cls(**taken)

    @property
    def selected(self) -> tuple[str, ...] | None:
        """The classes that were asked for; None: all."""
        return self.roi_subset if self.roi_subset_robust is None else self.roi_subset_robust

    @property
    def dicom_types(self) -> tuple[str, ...]:
        """Those of the output types that are DICOM."""
        return tuple(kind for kind in self.output_type if kind != "nifti")

    @property
    def multilabel(self) -> bool:
        """Whether ``output`` stands for files that hold all classes, not for a folder of masks."""
        return self.ml or bool(self.dicom_types)

    @property
    def blob_mm3(self) -> float | None:
        """Volume up to which blobs are removed; None: none are."""
        if self.remove_small_blobs is False:
            return None
        return SMALL_BLOB_MM3 if self.remove_small_blobs is True else self.remove_small_blobs

    @property
    def lowres(self) -> bool:
        """Whether the result stays on the model's grid; as upstream's, -ho comes before -sl."""
        return self.save_lowres and not self.higher_order_resampling

    @property
    def measures_model_grid(self) -> bool:
        """Whether statistics are taken on the model's grid: upstream's rule for ``fast``.

        So are those of a result that stays there, on which upstream fails, but not those of export
        "linear", which has labels on no other grid than the scan's.
        """
        return bool(self.statistics) and (self.fast or self.lowres) and self.export != "linear"

    def resolved_task(self) -> Task:
        """Look up the task at the resolution that was asked for."""
        selected = self.selected
        task = resolve_task(
            self.task,
            fast=self.fast,
            fastest=self.fastest,
            plans=self.plans,
            model_size=self.model_size,
            # For MR upstream always finds classes with the finer model.
            robust_crop=self.robust_crop
            or self.roi_subset_robust is not None
            or (selected is not None and self.task.endswith("_mr")),
            roi_subset=selected,
            body_seg=self.body_seg,
        )
        if task.crop is not None and self.lowres:
            raise OptionError(
                f"save_lowres does not work with task {self.task}, which crops."
                if selected is None and not self.body_seg
                else "save_lowres does not work together with roi_subset or body_seg, which crop."
            )
        if self.tile_step_size is not None:
            task = replace(task, tile_step=self.tile_step_size)
        # The model's own resampling then goes all the way from the scan and back to it.
        return replace(task, spacing_mm=None) if self.higher_order_resampling else task


def check_radiomics(source: object, output: Path | None, options: Options) -> None:
    """Refuse radiomics where they can't be computed, before any work is done.

    Parameters
    ----------
    source
        Path of the scan, or an image.
    output
        Directory of the masks.
    options
        Of the run.

    Raises
    ------
    OptionError
        Without a folder of masks, for DICOM, or if pyradiomics is not installed.
    """
    if not options.radiomics:
        return
    if output is None:
        raise OptionError("Output path is required for radiomics.")
    if options.ml:
        raise OptionError(
            "Radiomics not supported for multilabel segmentation. Use without --ml option."
        )
    if options.skip_saving:
        raise OptionError("radiomics are computed from the masks; do not skip saving them.")
    if isinstance(source, str | Path) and not str(source).endswith((".nii", ".nii.gz")):
        raise OptionError("Radiomics not supported for DICOM input. Use nifti input.")
    if importlib.util.find_spec("radiomics") is None:
        raise OptionError(
            "radiomics need the package pyradiomics, which is not installed: "
            "pip install pyradiomics."
        )
