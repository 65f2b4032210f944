"""The options of one run, keyword for keyword upstream's, checked once."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

from totalfast.backends import BFLOAT16, PRECISIONS, resolve_backend
from totalfast.backends.devices import validate_device
from totalfast.errors import OptionError, TotalfastError, UnsupportedError
from totalfast.tasks import resolve_task

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from totalfast.tasks import Task

EXPORTS = ("auto", "nearest", "linear")
"""``auto`` is upstream's way. ``nearest`` resamples labels by nearest neighbour, which is the same
for most tasks. ``linear`` interpolates logits on the scanner grid, for smooth
masks."""

AGGREGATIONS = ("mean", "median")
MODEL_SIZES = ("big", "small")
OUTPUT_TYPES = ("nifti", "dicom_rtstruct", "dicom_seg")
SMALL_BLOB_MM3 = 200.0
"""Volume for ``remove_small_blobs=True``."""


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

    Eleven are not upstream's: ``export``, one of ``EXPORTS``; ``backend``, one of
    ``totalfast.backends.BACKENDS``; ``tile_step_size``, None for the task's own;
    ``max_memory_gb``, None for the free memory; ``completion_marker``, ``offline``,
    ``trust_model``, ``series``, ``deterministic``, ``precision`` and ``guided``, as in
    ``totalfast.segment``.
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
    completion_marker: bool = False
    offline: bool = False
    trust_model: bool = False
    series: str | None = None
    deterministic: bool = False
    precision: str = "f32"
    guided: bool = False

    def __post_init__(self) -> None:
        validate_device(self.device)
        resolve_backend(self.backend)
        for rule in _RULES:
            if rule.is_broken(self):
                raise rule.error(rule.message.format(options=self))

    @classmethod
    def from_keywords(cls, keywords: Mapping[str, Any]) -> Options:
        """Take upstream's keywords.

        Raises
        ------
        UnsupportedError
            If totalfast does not support a value.
        OptionError
            If a keyword is unknown or a value is not valid.
        """
        own = {field.name for field in fields(cls)}
        for name in keywords:
            if name not in own:
                raise OptionError(f"unknown option '{name}'.")
        values = dict(keywords)
        if values.get("nora_tag") == "None":  # upstream's word for no tag
            values["nora_tag"] = None
        for name in ("save_probabilities", "crop_path", "statistics", "report"):
            if values.get(name) is not None and not isinstance(values[name], bool):
                values[name] = Path(values[name]).absolute()
        if "output_type" in values:
            values["output_type"] = parse_output_types(values["output_type"])
        if values.get("series") is not None:
            values["series"] = str(values["series"]).strip()
        for name in ("roi_subset", "roi_subset_robust"):
            if values.get(name) is not None:
                if not isinstance(values[name], list | tuple):
                    raise OptionError(
                        f"{name} must be a list of class names, not {values[name]!r}."
                    )
                values[name] = tuple(values[name])
        return cls(**values)

    @property
    def network_backend(self) -> str:
        """The backend of the networks, as ``backends.choose_backend`` takes it."""
        return self.backend if self.precision == "f32" else BFLOAT16

    @property
    def selected(self) -> tuple[str, ...] | None:
        """The classes that were asked for; None means all."""
        return self.roi_subset if self.roi_subset_robust is None else self.roi_subset_robust

    @property
    def dicom_types(self) -> tuple[str, ...]:
        """The output types that are DICOM."""
        return tuple(kind for kind in self.output_type if kind != "nifti")

    @property
    def multilabel(self) -> bool:
        """Whether ``output`` is a file of all classes, not a folder of masks."""
        return self.ml or bool(self.dicom_types)

    @property
    def blob_mm3(self) -> float | None:
        """Volume up to which blobs are removed; None keeps all blobs."""
        if self.remove_small_blobs is False:
            return None
        return SMALL_BLOB_MM3 if self.remove_small_blobs is True else self.remove_small_blobs

    @property
    def lowres(self) -> bool:
        """Whether the result stays on the model grid; as in upstream, -ho wins over -sl."""
        return self.save_lowres and not self.higher_order_resampling

    @property
    def measures_model_grid(self) -> bool:
        """Whether statistics are measured on the model grid: upstream's rule for ``fast``.

        Also with ``save_lowres``, where upstream fails. Not with export "linear", whose labels
        are on the scanner grid only.
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
            guided=self.guided,
        )
        if task.crop is not None and self.lowres:
            raise OptionError(
                f"save_lowres does not work with task {self.task}, which crops."
                if selected is None and not self.body_seg
                else "save_lowres does not work together with roi_subset or body_seg, which crop."
            )
        if self.tile_step_size is not None:
            task = replace(task, tile_step=self.tile_step_size)
        # nnU-Net then resamples from the scan's spacing to the model's, and back.
        return replace(task, spacing_mm=None) if self.higher_order_resampling else task


class _Rule(NamedTuple):
    """A combination of options that is refused, and the message for it."""

    is_broken: Callable[[Options], bool]
    message: str
    """A format string; ``options`` is the run's."""
    error: type[TotalfastError] = OptionError


def _is_folder(path: bool | Path | None) -> bool:
    return isinstance(path, Path) and path.is_dir()


_RULES: tuple[_Rule, ...] = (
    _Rule(
        lambda o: o.save_lowres and not (o.fast or o.fastest),
        "save_lowres only works together with fast or fastest mode.",
    ),
    _Rule(
        lambda o: o.save_lowres and bool(o.dicom_types),
        "save_lowres only supports nifti output.",
    ),
    _Rule(
        lambda o: o.resampling_order not in range(6),
        "resampling_order must be between 0 and 5, not {options.resampling_order}.",
    ),
    _Rule(
        lambda o: o.backend == BFLOAT16,
        "backend '{options.backend}' does not exist; precision 'bf16' asks for it.",
    ),
    _Rule(
        lambda o: o.precision not in PRECISIONS,
        "precision is '{options.precision}', but must be 'f32' or 'bf16'.",
    ),
    _Rule(
        lambda o: o.precision == "bf16" and o.backend not in ("auto", "openvino"),
        "precision bf16 is OpenVINO's; it does not work with backend '{options.backend}'.",
    ),
    _Rule(
        lambda o: o.guided and (o.fast or o.fastest),
        "guided finds with the fast model where the default models run; it does not work with fast "
        "or fastest.",
    ),
    _Rule(
        lambda o: o.guided and (o.higher_order_resampling or o.save_probabilities is not None),
        "guided does not work with higher_order_resampling or save_probabilities, which need all "
        "tiles.",
    ),
    _Rule(
        lambda o: o.export not in EXPORTS,
        f"export must be one of {', '.join(EXPORTS)}, not '{{options.export}}'.",
    ),
    _Rule(
        lambda o: o.tile_step_size is not None and not 0 < o.tile_step_size <= 1,
        "tile_step_size must be above 0 and at most 1, not {options.tile_step_size}.",
    ),
    _Rule(
        lambda o: o.max_memory_gb is not None and not o.max_memory_gb > 0,
        "max_memory_gb must be above 0, not {options.max_memory_gb}.",
    ),
    _Rule(
        lambda o: (
            o.export == "linear"
            and (o.save_lowres or o.force_split or o.higher_order_resampling_LEGACY)
        ),
        "export='linear' does not work with save_lowres, force_split or "
        "higher_order_resampling_LEGACY.",
    ),
    _Rule(
        lambda o: (
            o.export == "linear" and (o.higher_order_resampling or o.save_probabilities is not None)
        ),
        "export='linear' does not work with save_probabilities or higher_order_resampling, "
        "which interpolate logits in their own way.",
    ),
    _Rule(
        lambda o: (
            o.save_probabilities is not None
            and (o.save_probabilities.is_dir() or o.save_probabilities.suffix == ".pkl")
        ),
        "save_probabilities needs the name of an .npz file to write, not "
        "{options.save_probabilities}; a .pkl file is written beside it.",
    ),
    _Rule(
        lambda o: _is_folder(o.statistics),
        "statistics needs the name of a file to write; {options.statistics} is a folder.",
    ),
    _Rule(
        lambda o: _is_folder(o.report),
        "report needs the name of a file to write; {options.report} is a folder.",
    ),
    _Rule(
        lambda o: o.test != 0,
        "test={options.test} is for TotalSegmentator's own tests: it replaces predictions by "
        "reference files of its repository. totalfast accepts test=0 only.",
        UnsupportedError,
    ),
    _Rule(
        lambda o: o.stats_aggregation not in AGGREGATIONS,
        f"stats_aggregation must be one of {', '.join(AGGREGATIONS)}, "
        "not '{options.stats_aggregation}'.",
    ),
    _Rule(
        lambda o: o.model_size not in MODEL_SIZES,
        f"model_size must be one of {', '.join(MODEL_SIZES)}, not '{{options.model_size}}'.",
    ),
    _Rule(
        lambda o: o.remove_small_blobs is not False and o.remove_small_blobs <= 0,
        "remove_small_blobs must be a volume above 0, in mm3, not {options.remove_small_blobs}.",
    ),
    _Rule(
        lambda o: o.nr_thr_resamp < 1,
        "nr_thr_resamp must be at least 1, not {options.nr_thr_resamp}.",
    ),
    _Rule(
        lambda o: o.nr_thr_saving < 1,
        "nr_thr_saving must be at least 1, not {options.nr_thr_saving}.",
    ),
)
"""Checked in this order; the first broken rule is reported."""


class SegmentKeywords(TypedDict, total=False):
    """Keywords of ``totalfast.segment`` and ``Session.segment``, beside input and output."""

    ml: bool
    nr_thr_resamp: int
    nr_thr_saving: int
    fast: bool
    nora_tag: str
    preview: bool
    task: str
    roi_subset: list[str] | None
    statistics: bool | str | Path
    radiomics: bool
    crop_path: Path | None
    body_seg: bool
    force_split: bool
    output_type: str | list[str]
    quiet: bool
    verbose: bool
    test: int
    skip_saving: bool
    device: str
    license_number: str | None
    statistics_exclude_masks_at_border: bool
    no_derived_masks: bool
    v1_order: bool
    fastest: bool
    roi_subset_robust: list[str] | None
    stats_aggregation: str
    remove_small_blobs: bool | float
    statistics_normalized_intensities: bool
    robust_crop: bool
    higher_order_resampling_LEGACY: bool
    higher_order_resampling: bool
    save_probabilities: Path | None
    debug: bool
    report: Path | None
    statistics_extra: bool
    save_lowres: bool
    resampling_order: int
    plans: str
    model_size: str
    export: str
    backend: str
    tile_step_size: float | None
    max_memory_gb: float | None
    completion_marker: bool
    offline: bool
    trust_model: bool
    series: str | int | None
    deterministic: bool
    precision: str
    guided: bool


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
