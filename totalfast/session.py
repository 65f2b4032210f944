"""``Session``: calls that share loaded models, and the default session of ``totalfast.segment``."""

from __future__ import annotations

import contextlib
import functools
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from totalfast.backends.devices import validate_device
from totalfast.errors import OptionError
from totalfast.files.targets import OutputPlan, output_in
from totalfast.models.store import MAX_MODELS, ModelStore
from totalfast.options import Options, check_radiomics
from totalfast.system.cores import usable_cores
from totalfast.system.disk import kept_if_used
from totalfast.system.forks import working
from totalfast.system.gpus import may_have_gpu
from totalfast.system.pending_files import PendingFiles

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from typing import Any, TypeAlias

    import nibabel as nib
    from typing_extensions import Unpack

    from totalfast.files.dicom.read import SeriesSource
    from totalfast.labels.statistics import Statistics
    from totalfast.options import SegmentKeywords
    from totalfast.run.many import Outcome, Running
    from totalfast.run.pipeline import Source
    from totalfast.run.shared_scan import SharedScan
    from totalfast.system.progress import Progress

    Result: TypeAlias = nib.Nifti1Image | tuple[nib.Nifti1Image, Statistics]
    """Label map, or label map and statistics."""

logger = logging.getLogger(__name__)

TRAINED_ON = {"total": "CT", "total_mr": "MR"}
OTHER_MODALITY = {("total", "MR"): "total_mr", ("total_mr", "CT"): "total"}
"""The tasks that exist for both modalities; the one that fits, for a task and another modality."""


class Session:
    """Keeps models loaded, so that a second call loads nothing.

    Parameters
    ----------
    device
        "gpu", "cpu", "mps" or "gpu:X"; "gpu" falls back to the CPU. The default for ``segment``.
    keep_models
        False frees each model after use, for programs with a single call. Two models are then in
        memory at a time, the current one and the next, instead of all of a task's models.
    max_models
        Maximum number of models that stay loaded between calls; then the least recently used one is
        freed. None sets no limit.
    follow_modality
        Run task total_mr instead of total on DICOM MR, and total instead of total_mr on DICOM CT,
        as TotalSegmentator's command does. False keeps the task, with a warning, as its Python call
        keeps it.

    Notes
    -----
    Safe to use from several threads; predictions then take turns. ``close``, or the end of a
    ``with`` block, frees the models. A model whose folder changes while it is loaded stays what it
    was. After a network has run, forked processes can't run networks (``ForkError``); start
    processes with multiprocessing's "spawn", and create a session in each.

    Examples
    --------
    >>> with totalfast.Session(device="cpu") as session:
    ...     for scan in scans:
    ...         session.segment(scan, results / scan.name, ml=True)
    """

    def __init__(
        self,
        *,
        device: str = "gpu",
        keep_models: bool = True,
        max_models: int | None = MAX_MODELS,
        follow_modality: bool = False,
    ) -> None:
        self.device = validate_device(device)
        self.follow_modality = follow_modality
        self.models = ModelStore(keep=keep_models, max_models=max_models)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free all models; later calls of ``segment`` raise ``SessionError``."""
        self.models.close()

    def segment(
        self,
        input: Source,  # noqa: A002 - upstream's name
        output: str | Path | None = None,
        **keywords: Unpack[SegmentKeywords],
    ) -> Result:
        """Segment one scan; arguments and result are those of ``totalfast.segment``."""
        return self.segment_shown(input, output, keywords, None)

    def segment_many(
        self,
        cases: Iterable[tuple[Source, str | Path | None]],
        *,
        at_a_time: int | None = None,
        running: Running[tuple[Source, str | Path | None]] | None = None,
        **keywords: Unpack[SegmentKeywords],
    ) -> Iterator[Outcome[tuple[Source, str | Path | None], Result]]:
        """Segment scans in a few threads; yield an ``Outcome`` as each ends.

        While the networks of one scan run, others are read, restored and written. An error of one
        scan does not stop the others.

        Parameters
        ----------
        cases
            Pairs of input and output, as in ``segment``. They are taken one by one.
        at_a_time
            Number of scans in work. Fewer are, if the free memory is too small. None chooses.
        running
            Filled with the runs that have begun, for a progress bar.
        keywords
            As in ``segment``.

        Examples
        --------
        >>> for outcome in session.segment_many([("a.nii.gz", "a"), ("b.nii.gz", "b")], fast=True):
        ...     scan, folder = outcome.key
        ...     print(scan, "failed" if outcome.error else f"done in {outcome.total_s:.1f} s")
        """
        from totalfast.run.many import run_many

        def segment(case: tuple[Source, str | Path | None], progress: Progress) -> Result:
            return self.segment_shown(*case, keywords, progress)

        self.models.check()
        threads = at_a_time or runs_at_a_time(keywords.get("device", self.device))
        yield from run_many(cases, segment, threads=threads, running=running)

    def segment_tasks(
        self,
        input: Source,  # noqa: A002 - upstream's name
        output: str | Path,
        tasks: Sequence[str],
        **keywords: Unpack[SegmentKeywords],
    ) -> dict[str, Result]:
        """Segment one scan with several tasks, each into a folder of its name in ``output``.

        The scan is read once; tasks with the same spacing share the resampled scan, and tasks with
        the same rough pass share its labels. Files and voxels are those of single calls. With
        ``ml`` the label map is ``segmentation.nii.gz``.

        Parameters
        ----------
        input
            As in ``segment``.
        output
            Folder.
        tasks
            Names of tasks.
        keywords
            As in ``segment``, for all tasks.

        Returns
        -------
            Task to its label map, or to its label map and statistics.

        Raises
        ------
        OptionError
            If a task is named twice, or an option names one file for all tasks.
        """
        return self.tasks_shown(input, Path(output), tasks, keywords, None)

    def tasks_shown(
        self,
        source: Source | SeriesSource,
        output: Path,
        tasks: Sequence[str],
        keywords: SegmentKeywords,
        progress: Progress | None,
    ) -> dict[str, Result]:
        """``segment_tasks``, with a place where progress is shown; None shows a bar.

        The source can also be a DICOM series that was not opened yet.
        """
        from totalfast.run.shared_scan import SharedScan

        shared, results = SharedScan(), {}
        outputs = task_outputs(output, tasks, keywords)
        with kept_if_used(output), self._opened(source, keywords) as opened:
            for task, place in outputs.items():
                of_task: SegmentKeywords = {**keywords, "task": task}
                with kept_if_used(output / task):
                    results[task] = self._segment(source, place, of_task, progress, opened, shared)
        return results

    def segment_shown(
        self,
        source: Source | SeriesSource,
        output: str | Path | None,
        keywords: SegmentKeywords,
        progress: Progress | None,
    ) -> Result:
        """``segment``, with a place where progress is shown; None shows a bar unless quiet.

        The source can also be a DICOM series that was not opened yet.
        """
        with self._opened(source, keywords) as opened:
            return self._segment(source, output, keywords, progress, opened, None)

    def _opened(
        self, source: Source | SeriesSource, keywords: SegmentKeywords
    ) -> contextlib.AbstractContextManager[SeriesSource | None]:
        """Open the DICOM series of a source; None if it is no DICOM."""
        from totalfast.files.dicom.read import SeriesSource
        from totalfast.files.read import is_dicom

        self.models.check()
        if isinstance(source, SeriesSource):
            return source
        if not is_dicom(source):
            return contextlib.nullcontext()
        return SeriesSource(Path(source), wanted=keywords.get("series"))

    def _segment(
        self,
        source: Source | SeriesSource,
        output: str | Path | None,
        keywords: SegmentKeywords,
        progress: Progress | None,
        opened: SeriesSource | None,
        shared: SharedScan | None,
    ) -> Result:
        """Check everything that can be checked before the network runs, then run."""
        from totalfast.files.dicom.read import SeriesSource, refuse_slices
        from totalfast.files.dicom.write import check_packages, check_series
        from totalfast.run.pipeline import run

        source = source.path if isinstance(source, SeriesSource) else source
        keywords = {"device": self.device, **keywords}
        if opened is not None and self.follow_modality:
            keywords["task"] = _task_of_modality(keywords.get("task", "total"), opened)
        options = Options.from_keywords(keywords)
        target = None if output is None else Path(output)
        check_radiomics(source, target, options)
        if options.dicom_types and opened is None:
            raise OptionError(
                "To use output type dicom_rtstruct or dicom_seg you also have to use a Dicom "
                "image as input."
            )
        if options.series is not None and opened is None:
            raise OptionError(f"series ({options.series}) can only be chosen for DICOM input.")
        check_packages(options.dicom_types)
        outputs = OutputPlan.of(target, options.resolved_task(), options)
        outputs.check(source)
        with working(), PendingFiles(rescue_from=outputs.folder) as files:
            files.prepare(outputs.paths)
            series = None
            if opened is not None:
                refuse_slices(outputs.paths)
                series = opened.series()
                _warn_of_modality(options.task, series.modality)
                check_series(series, options.dicom_types)
            segmentation = run(
                source if series is None else series.image,
                outputs,
                options=options,
                store=self.models,
                files=files,
                series=series,
                progress=progress,
                shared=shared,
            )
        if segmentation.statistics is None:
            return segmentation.image
        return segmentation.image, segmentation.statistics


def task_outputs(
    folder: Path, tasks: Sequence[str], keywords: Mapping[str, Any]
) -> dict[str, Path]:
    """Return the output of each of several tasks, after their options were checked.

    Raises
    ------
    OptionError
        If a task is named twice, an option is not valid for one of them, or names one file for all.
    """
    outputs: dict[str, Path] = {}
    for task in tasks:
        options = Options.from_keywords({**keywords, "task": task})
        if task in outputs:
            raise OptionError(f"task {task} is named twice.")
        files = (options.report, options.save_probabilities)
        if any(files) or not isinstance(options.statistics, bool):
            raise OptionError(
                "report, save_probabilities and a file of statistics can't be shared by several "
                "tasks; statistics without a file name are written for each task."
            )
        options.resolved_task()
        outputs[task] = output_in(folder / task, options)
    return outputs


def runs_at_a_time(device: str) -> int:
    """Number of scans that are worth being in work at a time.

    On a CPU one is read and one is written while a third one's networks take all cores. A GPU is so
    fast that the cores must work on several scans to keep it busy.
    """
    if may_have_gpu(device):
        return min(max(usable_cores() // 2, 3), 8)
    return 3


def _task_of_modality(task: str, opened: SeriesSource) -> str:
    """Return total for CT and total_mr for MR; other tasks and modalities keep the task."""
    if task not in TRAINED_ON:
        return task
    modality = opened.modality or ""
    fitting = OTHER_MODALITY.get((task, modality))
    if fitting is None:
        return task
    logger.warning(
        "WARNING: you tried to run %s model, but input modality is %s. Will run %s model instead.",
        TRAINED_ON[task],
        modality,
        modality,
    )
    return fitting


def _warn_of_modality(task: str, modality: str) -> None:
    """Warn if the task is for the other modality; upstream's Python call keeps the task, too."""
    fitting = OTHER_MODALITY.get((task, modality))
    if fitting is not None:
        logger.warning(
            "WARNING: The input's modality is %s, but task %s was trained on %s. Use task %s.",
            modality,
            task,
            TRAINED_ON[task],
            fitting,
        )


@functools.cache
def default_session() -> Session:
    """Return the session that ``totalfast.segment`` uses."""
    return Session()
