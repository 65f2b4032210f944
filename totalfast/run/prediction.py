"""Run all of a task's models on a model image, and merge their labels."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from totalfast.engine.predict import predict_part, predict_probabilities
from totalfast.engine.sliding_window import WindowMemory, prepare_tiles
from totalfast.engine.tiles import Tiling, plan_tiles
from totalfast.files.write import write_probabilities
from totalfast.labels.merge import merge_part, thirds, wants_split, whole
from totalfast.models.model_summary import ModelSummary
from totalfast.system.progress import timed

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from totalfast.geometry import Grid
    from totalfast.labels.merge import Piece
    from totalfast.models.model import Model
    from totalfast.options import Options
    from totalfast.run.context import RunContext
    from totalfast.scan import ModelImage
    from totalfast.tasks import Part, Task

logger = logging.getLogger(__name__)


class _Layout(NamedTuple):
    """How the models of one task are run on one image."""

    pieces: tuple[Piece, ...]
    """Ranges of slices that are predicted one after the other."""
    tiling: Tiling
    memory: WindowMemory
    """Sums of logits on the CPU, reused by one model after another."""


def label_grid(model_image: ModelImage, options: Options) -> Grid:
    """The grid, RAS+, of the labels that ``predict`` returns.

    The model grid; the scanner's with export "linear".
    """
    return model_image.canonical if options.export == "linear" else model_image.grid


def predict(
    context: RunContext, model_image: ModelImage, task: Task, *, on_device: bool
) -> NDArray[np.uint8]:
    """Run all of a task's models and merge their labels.

    Parameters
    ----------
    context
        Of the run.
    model_image
        The scan on the model grid.
    task
        Whose models.
    on_device
        Whether logits are summed up on the GPU.

    Returns
    -------
        uint8, (z, y, x), RAS+ axes, of ``label_grid``.
    """
    shape_x, shape_y, shape_z = label_grid(model_image, context.options).shape
    labels = np.zeros((shape_z, shape_y, shape_x), dtype=np.uint8)
    layout = _Layout(
        pieces=_pieces(model_image, task, context.options, labelled=shape_z),
        tiling=Tiling(step=task.tile_step, on_device=on_device),
        memory=WindowMemory(),
    )
    with timed(None if task.several_models else "Predicting...", "  Predicted in"):
        for index, part in enumerate(task.parts):
            if task.several_models:
                logger.info("Predicting part %d of %d ...", index + 1, len(task.parts))
            context.progress.stage("Loading model")
            if not on_device:
                prepare_tiles(ModelSummary.of(task, part).patch)  # while it loads
            # The model is no local variable here, so that it is freed before the next is loaded.
            _predict_model(context, model_image, task, part, layout, labels)
    return labels


def _predict_model(
    context: RunContext,
    model_image: ModelImage,
    task: Task,
    part: Part,
    layout: _Layout,
    labels: NDArray[np.uint8],
) -> None:
    """Run one model on all pieces and merge its labels into the task's, in place."""
    model = context.take(task, part)
    context.progress.stage(f"Predicting {task.parts.index(part) + 1}/{len(task.parts)}")
    tile_count = sum(
        plan_tiles(
            model_image.voxels[piece.predicted].shape, model.patch_size, layout.tiling.step
        ).count
        for piece in layout.pieces
    )
    on_tile = partial(context.progress.advance, context.work.part / tile_count)
    for piece in layout.pieces:
        # Like upstream's, the file of probabilities is the last model's, of the first piece.
        archive = context.options.save_probabilities
        if part is not task.parts[-1] or piece is not layout.pieces[0]:
            archive = None
        part_labels = _predict_piece(
            context, model_image, model, piece, layout, on_tile=on_tile, archive=archive
        )
        if part.labels is None:
            labels[piece.kept] = part_labels[piece.inside]
        else:
            merge_part(labels[piece.kept], part_labels[piece.inside], part.labels)


def _predict_piece(
    context: RunContext,
    model_image: ModelImage,
    model: Model,
    piece: Piece,
    layout: _Layout,
    *,
    on_tile: Callable[[], None],
    archive: Path | None,
) -> NDArray[np.unsignedinteger]:
    """Run one model on a range of slices: its own labels, (z, y, x)."""
    options = context.options
    voxels = model_image.voxels[piece.predicted]
    spacing_zyx = [float(mm) for mm in model_image.grid.spacing_mm[::-1]]
    if options.save_probabilities is None:
        linear_to = model_image.canonical.shape[::-1] if options.export == "linear" else None
        with context.store.predicting:
            return predict_part(
                voxels,
                spacing_mm=spacing_zyx,
                model=model,
                tiling=layout.tiling,
                memory=layout.memory,
                on_tile=on_tile,
                linear_to=linear_to,
            )
    with context.store.predicting:
        part_labels, probabilities = predict_probabilities(
            voxels,
            spacing_mm=spacing_zyx,
            model=model,
            tiling=layout.tiling,
            memory=layout.memory,
            on_tile=on_tile,
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
    return part_labels


def _pieces(
    model_image: ModelImage, task: Task, options: Options, *, labelled: int
) -> tuple[Piece, ...]:
    """All slices at once, or upstream's thirds of a very large image."""
    slices = model_image.voxels.shape[0]
    split = options.force_split or wants_split(
        model_image.grid.shape, several_models=task.several_models
    )
    if options.export == "linear" or not split:
        return whole(slices, labelled=labelled)
    logger.info("Splitting into subparts...")
    return thirds(slices)
