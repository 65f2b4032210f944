"""``totalfast.segment``: upstream's Python call, run by the default ``Session``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from totalfast.session import default_session

if TYPE_CHECKING:
    from pathlib import Path
    from typing import BinaryIO

    import nibabel as nib

    from totalfast.labels.statistics import Statistics


def segment(
    input: str | Path | nib.Nifti1Image | BinaryIO,  # noqa: A002 - upstream's name
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
    backend: str = "auto",
    tile_step_size: float | None = None,
    max_memory_gb: float | None = None,
    completion_marker: bool = False,
    offline: bool = False,
    trust_model: bool = False,
    series: str | int | None = None,
    deterministic: bool = False,
    precision: str = "f32",
    guided: bool = False,
) -> nib.Nifti1Image | tuple[nib.Nifti1Image, Statistics]:
    """Segment one scan with one of TotalSegmentator's tasks.

    Arguments, their order, meanings and defaults are those of
    ``totalsegmentator.python_api.totalsegmentator`` (2.18.0); the keyword-only ones are ours. The
    first call loads the models; later calls of the same task reuse them.

    Parameters
    ----------
    input
        Path of a NIfTI (``.nii``, ``.nii.gz``), NRRD (``.nrrd``, ``.nhdr``) or MetaImage (``.mha``,
        ``.mhd``) file, of a folder or zip file of one DICOM series, or of a multi-frame DICOM
        file; a NIfTI file open for reading bytes; or a nibabel image.
    output
        Directory for one mask per class, or with ``ml`` the ``.nii.gz`` file of the label map, or
        with a DICOM ``output_type`` its file. None writes nothing.
    ml
        Write one label map instead of one mask per class.
    nr_thr_resamp
        Accepted for compatibility; all cores are used.
    nr_thr_saving
        Most files written at a time; also limited by the number of cores.
    fast, fastest
        Use the 3 mm or the 6 mm model; ``fast`` wins.
    preview
        Also draw ``preview_{task}.png``: into ``output``, or beside it with ``ml``.
    task
        Task name; ``totalfast --list-tasks`` shows them.
    force_split
        Predict in three pieces along z, like upstream for very large images.
    output_type
        "nifti", "dicom_rtstruct", "dicom_seg", or several of them, as a list or with commas; the
        latter two for DICOM input. Several are written as ``{base}.nii.gz`` (a label map),
        ``{base}_rtstruct.dcm`` and ``{base}_seg.dcm``, where base is the name of ``output`` up to
        its first dot, or in an existing directory ``{task}_segmentation``.
    quiet, verbose
        Show no progress bar; log more.
    skip_saving
        Write no masks and no label map even if ``output`` is given.
    device
        "gpu", "cpu", "mps" or "gpu:X"; the CPU if there is no GPU.
    no_derived_masks
        Do not write the body and skin masks of task "body".
    save_lowres
        With ``fast`` or ``fastest``: return and write the result on the model's grid.
    resampling_order
        Spline order, 0 to 5, for resampling the scan to the model's spacing.
    plans
        nnU-Net plans identifier.
    robust_crop
        For tasks with a region: find it with the 3 mm model instead of the 6 mm model.
    higher_order_resampling
        Let nnU-Net resample the scan to the model's spacing and the logits back, for smooth masks.
    higher_order_resampling_LEGACY
        Resample each label's mask linearly to the scan's grid, like older TotalSegmentator.
    save_probabilities
        File for the probabilities of all classes (``.npz``, key "probabilities", float32,
        (classes, z, y, x)) of the last model at its resolution; a ``.pkl`` beside it describes the
        image. Takes much memory.
    statistics
        Measure each class: volume in mm3, mean intensity. Written to the file given, or with True
        to ``statistics.json`` in ``output``, or beside it with ``ml``. With ``fast`` on the
        model grid, like upstream.
    statistics_exclude_masks_at_border
        Report zeros for classes that the image's edge may cut.
    stats_aggregation
        "mean" or "median" of the intensities.
    statistics_extra
        Also number of voxels, spread and range of the intensities, centroid and bounding box; not
        with ``fast``.
    statistics_normalized_intensities
        Map intensities to 0..1 by the image's lowest and highest, before measuring.
    remove_small_blobs
        Remove blobs of up to this volume in mm3; True is 200.
    v1_order
        Task "total": number the labels of the label map like version 1. Masks stay those of
        ``task``.
    radiomics
        Also write ``statistics_radiomics.json`` beside the masks; needs the package pyradiomics.
    report
        File for a report of the run: versions, options, classes, files, and why classes are empty.
    nora_tag
        Project of the viewer Nora that files are added to; "None" adds none.
    license_number
        Let TotalSegmentator check this number online and keep it in its configuration file.
    crop_path, test
        Accepted for compatibility: no effect, and 0 only.
    export
        Not upstream's. How labels get to the scanner grid: "auto" or "nearest" like upstream,
        "linear" from interpolated logits, for smooth masks.
    backend
        Not upstream's. What runs the networks: "torch" gives upstream's voxels; "winograd",
        "openvino" (needs ``pip install 'totalfast[cpu]'``) and "compile" are faster, and single
        voxels may differ. "auto" is "winograd" on a CPU with AVX2, "openvino" or "torch" for
        networks or CPUs that it can't use, and "torch" on a GPU; the environment variable
        TOTALFAST_BACKEND changes it.
    tile_step_size
        Not upstream's. Largest distance between neighbouring tiles, as a share of the tile size,
        above 0 and up to 1: with 0.8 neighbours overlap by at least a fifth. None is upstream's,
        0.8 for the total tasks and 0.5 for others. A larger step means fewer tiles, less time and
        other labels. Rough models keep their own step.
    max_memory_gb
        Not upstream's. Raise an error before networks run if the run needs more main memory than
        this, in 10**9 bytes. None warns if the run needs more than the free memory.
    completion_marker
        Not upstream's. Also write a file that appears after all other files of the run: in a folder
        of masks ``totalfast-complete.json``, beside a label map ``{name}.complete.json``. It is for
        programs that watch a folder, and lists the files of the run.
    offline
        Not upstream's. Raise an error if a model is missing, instead of downloading it.
    trust_model
        Not upstream's. Also run models whose plans name networks or layers that are not nnU-Net's
        or torch's. Such a model can run any code; use this only for models of your own.
    series
        Not upstream's. DICOM input of several series: the SeriesInstanceUID or the SeriesNumber of
        the one to segment. Without it several series are an error, which lists them.
    deterministic
        Not upstream's. Give the same labels in every run on one GPU. The rough pass that finds a
        region always does. On a CPU all runs do.
    precision
        Not upstream's. "bf16" computes networks in bfloat16, by OpenVINO on CPUs that have it; many
        voxels change. "f32" is the default.
    guided
        Not upstream's. Run the task's fast model first, and then only the tiles of each default
        model that touch the box around what the fast model found for it, with a margin of 20 mm.
        Saves time for scans much larger than the structures, such as whole bodies. Labels there do
        not change; what the fast model missed elsewhere is lost.

    ``test`` other than 0, for upstream's own tests, raises ``UnsupportedError``.

    Returns
    -------
        uint8 label map, (x, y, z) of the input's grid, 0 is background; its header is the
        input's, with upstream's table of class names as an extension. With ``statistics`` a pair:
        the label map, and class name to the statistics of each class.

    Raises
    ------
    TotalfastError
        A subclass, if the input, an option, the output path or a model can't be used.
    """
    return default_session().segment(
        input,
        output,
        ml=ml,
        nr_thr_resamp=nr_thr_resamp,
        nr_thr_saving=nr_thr_saving,
        fast=fast,
        nora_tag=nora_tag,
        preview=preview,
        task=task,
        roi_subset=roi_subset,
        statistics=statistics,
        radiomics=radiomics,
        crop_path=crop_path,
        body_seg=body_seg,
        force_split=force_split,
        output_type=output_type,
        quiet=quiet,
        verbose=verbose,
        test=test,
        skip_saving=skip_saving,
        device=device,
        license_number=license_number,
        statistics_exclude_masks_at_border=statistics_exclude_masks_at_border,
        no_derived_masks=no_derived_masks,
        v1_order=v1_order,
        fastest=fastest,
        roi_subset_robust=roi_subset_robust,
        stats_aggregation=stats_aggregation,
        remove_small_blobs=remove_small_blobs,
        statistics_normalized_intensities=statistics_normalized_intensities,
        robust_crop=robust_crop,
        higher_order_resampling_LEGACY=higher_order_resampling_LEGACY,
        higher_order_resampling=higher_order_resampling,
        save_probabilities=save_probabilities,
        debug=debug,
        report=report,
        statistics_extra=statistics_extra,
        save_lowres=save_lowres,
        resampling_order=resampling_order,
        plans=plans,
        model_size=model_size,
        export=export,
        backend=backend,
        tile_step_size=tile_step_size,
        max_memory_gb=max_memory_gb,
        completion_marker=completion_marker,
        offline=offline,
        trust_model=trust_model,
        series=series,
        deterministic=deterministic,
        precision=precision,
        guided=guided,
    )
