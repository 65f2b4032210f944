"""``totalfast.segment``: upstream's Python call.

Only the signature is here; the work is done by the default ``Session``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from totalfast.session import default_session

if TYPE_CHECKING:
    from pathlib import Path

    import nibabel as nib


def segment(
    input: str | Path | nib.Nifti1Image,  # noqa: A002 - upstream's name
    output: str | Path | None = None,
    ml: bool = False,
    nr_thr_resamp: int = 1,
    nr_thr_saving: int = 6,
    fast: bool = False,
    nora_tag: str = "None",
    preview: bool = False,
    task: str = "total",
    roi_subset: list[str] | None = None,
    statistics: bool | str | Path = False,
    radiomics: bool = False,
    crop_path: Path | None = None,
    body_seg: bool = False,
    force_split: bool = False,
    output_type: str | list[str] = "nifti",
    quiet: bool = False,
    verbose: bool = False,
    test: int = 0,
    skip_saving: bool = False,
    device: str = "gpu",
    license_number: str | None = None,
    statistics_exclude_masks_at_border: bool = True,
    no_derived_masks: bool = False,
    v1_order: bool = False,
    fastest: bool = False,
    roi_subset_robust: list[str] | None = None,
    stats_aggregation: str = "mean",
    remove_small_blobs: bool | float = False,
    statistics_normalized_intensities: bool = False,
    robust_crop: bool = False,
    higher_order_resampling_LEGACY: bool = False,  # noqa: N803 - upstream's name
    higher_order_resampling: bool = False,
    save_probabilities: Path | None = None,
    debug: bool = False,
    report: Path | None = None,
    statistics_extra: bool = False,
    save_lowres: bool = False,
    resampling_order: int = 1,
    plans: str = "nnUNetPlans",
    model_size: str = "big",
    *,
    export: str = "auto",
    tile_step_size: float | None = None,
    max_memory_gb: float | None = None,
) -> nib.Nifti1Image:
    """Segment one scan with one of TotalSegmentator's tasks.

    Arguments, their order, meanings and defaults are those of
    ``totalsegmentator.python_api.totalsegmentator`` (2.18.0); those that can only be named are
    ours. The first call loads the models, later ones with the same task reuse them.

    Parameters
    ----------
    input
        Path of a ``.nii`` or ``.nii.gz`` file, or a nibabel image.
    output
        Directory for one mask a class, or with ``ml`` the ``.nii.gz`` file of the label map. None
        writes nothing.
    ml
        Write one label map instead of one mask a class.
    nr_thr_resamp
        Accepted for upstream's sake; all cores are used.
    nr_thr_saving
        Files that are written at a time, at most; the cores are the limit too.
    fast, fastest
        Use the 3 mm or the 6 mm model; ``fast`` wins.
    preview
        Also draw ``preview_{task}.png``: into ``output``, or beside it with ``ml``.
    task
        Task name; ``totalfast --list-tasks`` shows them.
    force_split
        Predict in three pieces along z, as upstream does for very large images.
    quiet, verbose
        Show no progress bar; log more.
    skip_saving
        Write no masks and no label map even if ``output`` is given.
    device
        "gpu", "cpu", "mps" or "gpu:X"; an absent GPU becomes the CPU.
    no_derived_masks
        Do not write the body and skin masks of task "body".
    save_lowres
        With ``fast`` or ``fastest``: return and write the result on the model's grid.
    resampling_order
        Spline order, 0 to 5, for resampling the scan to the model's spacing.
    plans
        nnU-Net plans identifier.
    robust_crop
        For tasks that look at a region: find it with the 3 mm model instead of the 6 mm model.
    higher_order_resampling
        Let nnU-Net's own resampling go all the way from the scan to the model's spacing and, for
        the logits, back, for smooth masks.
    higher_order_resampling_LEGACY
        Resample each label's mask linearly to the scan's grid, as TotalSegmentator once did.
    save_probabilities
        File for the probabilities of all classes (``.npz``, key "probabilities", float32,
        (classes, z, y, x)) of the last model at its resolution; a ``.pkl`` beside it describes the
        image. Takes much memory.
    license_number
        Let TotalSegmentator check this number online and keep it in its configuration file.
    crop_path, test
        Accepted for upstream's sake: no effect, and 0 only.
    export
        Not upstream's. How labels come to the scan's grid: "auto" or "nearest" as upstream does,
        "linear" from interpolated logits, for smooth masks.
    tile_step_size
        Not upstream's. Distance of the network's tiles, at most, as a share of their size, above 0
        and up to 1: 0.8 lets neighbours overlap by at least a fifth. None takes upstream's, 0.8
        for the total tasks and 0.5 for others. A larger step means fewer tiles, less time and
        other labels. Rough models that look for a region keep theirs.
    max_memory_gb
        Not upstream's. Raise an error before the scan is read if the run needs more memory than
        this, in 10**9 bytes; of a GPU's memory what is free is taken. None warns if more is needed
        than is free.

    Other keywords are upstream's and raise ``UnsupportedError`` unless they have their default.

    Returns
    -------
        uint8 label map, (x, y, z) of the input's grid, 0 is background; its header is the
        input's, with upstream's table of class names as an extension.

    Raises
    ------
    TotalfastError
        One of its kinds: the input, an option, the output path, or a model can't be used.
    """
    keywords = dict(locals())
    scan, target = keywords.pop("input"), keywords.pop("output")
    return default_session().segment(scan, target, **keywords)
