"""Run all of a task's models on a model image, and merge their labels."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from totalfast.engine.predict import predict_probabilities, queue_part
from totalfast.engine.sliding_window import WindowMemory, prepare_tiles
from totalfast.engine.source_image import SourceImage
from totalfast.engine.tiles import Tiling
from totalfast.files.write import write_probabilities
from totalfast.geometry import shifted
from totalfast.labels.merge import merge_part, thirds, wants_split, whole
from totalfast.models.model_summary import ModelSummary
from totalfast.run.device_plan import choose_ladder
from totalfast.system.process_memory import trim_memory
from totalfast.system.progress import timed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from concurrent.futures import Future
    from pathlib import Path
    from typing import TypeAlias

    from numpy.typing import NDArray

    from totalfast.engine.ladder import Ladder
    from totalfast.geometry import Box, Grid
    from totalfast.labels.merge import Piece
    from totalfast.models.model import Model
    from totalfast.options import Options
    from totalfast.run.context import RunContext
    from totalfast.scan import ModelImage
    from totalfast.tasks import Part, Task

    Waiting: TypeAlias = Callable[[], NDArray[np.unsignedinteger]]
    """A function that waits for labels, (z, y, x)."""

logger = logging.getLogger(__name__)


class _Window(NamedTuple):
    """Where one model is run."""

    piece: Piece
    source: SourceImage
    """The piece's voxels."""
    box: Box | None
    """Slices along (z, y, x) of the piece: only tiles that touch it are run; None runs all."""
    tile_count: int
    """An estimate: nnU-Net crops zeros at the border of an image, which moves its tiles."""


class _Layout(NamedTuple):
    """How the models of one task are run on one image."""

    windows: tuple[tuple[_Window, ...], ...]
    """Per model, one after the other."""
    tile_work: float
    """What a tile is of the run's work."""
    ladder: Ladder
    memory: WindowMemory
    """Sums of logits on the CPU, reused by one model after another."""


def label_grid(model_image: ModelImage, options: Options) -> Grid:
    """The grid, RAS+, of the labels that ``predict`` returns.

    The model grid; the scanner's with export "linear".
    """
    return model_image.canonical if options.export == "linear" else model_image.grid


def predict(
    context: RunContext,
    model_image: ModelImage,
    task: Task,
    *,
    boxes: Sequence[Box | None] | None = None,
) -> NDArray[np.uint8]:
    """Run all of a task's models and merge their labels, when it is this run's turn.

    Parameters
    ----------
    context
        Of the run.
    model_image
        The scan on the model grid.
    task
        Whose models.
    boxes
        Where each of them runs: the tiles that touch its box, slices along (z, y, x) of the model
        grid; None for a model that has nothing to do. Without boxes all run on the whole image.

    Returns
    -------
        uint8, (z, y, x), RAS+ axes, of ``label_grid``.
    """
    wait = partial(context.progress.stage, "Waiting")  # which ends a run that was cancelled
    if context.store.predicting.taken:
        wait()
    with context.store.predicting.turn(wait):
        return _predict(context, model_image, task, boxes)


def _predict(
    context: RunContext,
    model_image: ModelImage,
    task: Task,
    boxes: Sequence[Box | None] | None,
) -> NDArray[np.uint8]:
    """``predict``; a thread waits for a model's labels and merges them while the next one runs."""
    context.plan_memory(model_image.canonical, task).check(context.budget)
    shape_x, shape_y, shape_z = label_grid(model_image, context.options).shape
    labels = np.zeros((shape_z, shape_y, shape_x), dtype=np.uint8)
    tiling = Tiling(step=task.tile_step, deterministic=context.options.deterministic)
    pieces = _pieces(model_image, task, context.options, labelled=shape_z)
    windows = _windows(pieces, task)
    tile_count = _tile_count(windows)
    work = context.work
    if boxes is not None:
        full, windows = tile_count, _windows(pieces, task, boxes)
        tile_count = _tile_count(windows)
        work = work.of_models(len(task.parts), share=tile_count / full)
        context.progress.correct(work.total)
        logger.info("Guided: %d of %d tiles", tile_count, full)
        context = _without_idle(context, task, windows)
    layout = _Layout(
        windows=windows,
        tile_work=work.part * len(task.parts) / max(tile_count, 1),
        ladder=choose_ladder(context, model_image, task, tiling),
        memory=WindowMemory(),
    )
    merging: list[Future[None]] = []
    with (
        timed(None if task.several_models else "Predicting...", "  Predicted in"),
        ThreadPoolExecutor(1, thread_name_prefix="totalfast-merge") as merger,
    ):
        for index, part in enumerate(task.parts):
            if task.several_models:
                logger.info("Predicting part %d of %d ...", index + 1, len(task.parts))
            if index > 0 and not windows[index]:
                logger.info("  not run: the fast model found none of its classes")
                continue  # but the first model, which is being loaded
            context.progress.stage("Loading model")
            if context.device.type != "cuda":
                prepare_tiles(ModelSummary.of(task, part).patch)  # while it loads
            # The model is no local variable here, so that it is freed before the next is loaded.
            for piece, part_labels in _queue_model(context, model_image, task, part, layout):
                merging.append(merger.submit(_merge, labels, piece, part_labels, part))
            for done in [future for future in merging if future.done()]:
                done.result()  # errors end the run early
        for future in merging:
            future.result()
    return labels


def _queue_model(
    context: RunContext, model_image: ModelImage, task: Task, part: Part, layout: _Layout
) -> Iterator[tuple[Piece, Waiting]]:
    """Run one model on all pieces; yield functions that wait for its labels."""
    model = context.take(task, part)
    context.progress.stage(f"Predicting {task.parts.index(part) + 1}/{len(task.parts)}")
    for index, window in enumerate(layout.windows[task.parts.index(part)]):
        # Like upstream's, the file of probabilities is the last model's, of the first piece.
        archive = context.options.save_probabilities
        if part is not task.parts[-1] or index > 0:
            archive = None
        tiles = _TileProgress(context, layout.tile_work, window.tile_count)

        def queue(tiling: Tiling) -> Waiting:
            tiles.start()  # noqa: B023 - called in this round
            return _queue_piece(
                context,
                model_image,
                model,
                window,  # noqa: B023
                tiling,
                layout,
                on_tile=tiles.advance,  # noqa: B023
                archive=archive,  # noqa: B023
            )

        yield window.piece, layout.ladder.run(queue)
        tiles.finish()
    if model.device.type == "cpu":
        trim_memory()


def _queue_piece(
    context: RunContext,
    model_image: ModelImage,
    model: Model,
    window: _Window,
    tiling: Tiling,
    layout: _Layout,
    *,
    on_tile: Callable[[], None],
    archive: Path | None,
) -> Waiting:
    """Run one model on a range of slices; wait for its own labels, (z, y, x)."""
    options = context.options
    if options.save_probabilities is None:
        linear_to = model_image.canonical.shape[::-1] if options.export == "linear" else None
        return queue_part(
            window.source,
            model=model,
            tiling=tiling,
            memory=layout.memory,
            on_tile=on_tile,
            box=window.box,
            linear_to=linear_to,
        )
    part_labels, probabilities = predict_probabilities(
        window.source, model=model, tiling=tiling, memory=layout.memory, on_tile=on_tile
    )
    if archive is not None:
        context.progress.stage("Saving probabilities")
        write_probabilities(
            probabilities,
            archive,
            affine=model_image.grid.affine,
            reader=model.plans.image_reader_writer_class(),
            files=context.files,
        )
    return lambda: part_labels


def _merge(labels: NDArray[np.uint8], piece: Piece, part_labels: Waiting, part: Part) -> None:
    """Wait for the labels of a piece, and merge them into the task's, in place."""
    own = part_labels()[piece.inside]
    if part.labels is None:
        labels[piece.kept] = own
    else:
        merge_part(labels[piece.kept], own, part.labels)


class _TileProgress:
    """Counts each expected tile once, also if tiles are run again with less on the device."""

    def __init__(self, context: RunContext, work: float, expected: int) -> None:
        self._progress, self._work, self._expected = context.progress, work, expected
        self._done = self._shown = 0

    def start(self) -> None:
        self._done = 0

    def advance(self) -> None:
        self._done += 1
        is_new = self._shown < self._done <= self._expected
        self._shown += is_new
        self._progress.advance(self._work * is_new)  # 0 too: it ends a run that was cancelled

    def finish(self) -> None:
        """Add the tiles that were expected and not run."""
        self._progress.advance(self._work * (self._expected - self._shown))


def _windows(
    pieces: tuple[tuple[Piece, SourceImage], ...],
    task: Task,
    boxes: Sequence[Box | None] | None = None,
) -> tuple[tuple[_Window, ...], ...]:
    """Where each model runs: everywhere, or where its box is."""

    def windows(part: Part, box: Box | None) -> Iterator[_Window]:
        model = ModelSummary.of(task, part)
        for piece, source in pieces:
            _, height, width = source.shape
            own = box and shifted(box, (piece.predicted, slice(0, height), slice(0, width)))
            z, y, x = model.axes
            tiling = Tiling(step=task.tile_step, box=own and (own[z], own[y], own[x]))
            shape = (source.shape[z], source.shape[y], source.shape[x])
            tiles = tiling.tiles(shape, model.patch)
            if tiles.count:
                yield _Window(piece, source, own, tiles.count)

    return tuple(
        () if boxes and box is None else tuple(windows(part, box))
        for part, box in zip(task.parts, boxes or [None] * len(task.parts), strict=True)
    )


def _without_idle(
    context: RunContext, task: Task, windows: tuple[tuple[_Window, ...], ...]
) -> RunContext:
    """Return the context without the models that have nothing to do, but with the first one."""
    idle = [part for part, own in zip(task.parts[1:], windows[1:], strict=True) if not own]
    models = tuple(
        (of, part)
        for of, part in context.models
        if of is not task or not any(part is other for other in idle)
    )
    return replace(context, models=models)


def _tile_count(windows: tuple[tuple[_Window, ...], ...]) -> int:
    return sum(window.tile_count for own in windows for window in own)


def _pieces(
    model_image: ModelImage, task: Task, options: Options, *, labelled: int
) -> tuple[tuple[Piece, SourceImage], ...]:
    """All slices at once, or upstream's thirds of a very large image."""
    slices = model_image.voxels.shape[0]
    split = options.force_split or wants_split(
        model_image.grid.shape, several_models=task.several_models
    )
    if options.export == "linear" or not split:
        pieces = whole(slices, labelled=labelled)
    else:
        logger.info("Splitting into subparts...")
        pieces = thirds(slices)
    spacing_zyx = [float(mm) for mm in model_image.grid.spacing_mm[::-1]]
    return tuple(
        (piece, SourceImage(model_image.voxels[None, piece.predicted], spacing_mm=spacing_zyx))
        for piece in pieces
    )
