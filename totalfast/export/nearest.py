"""Labels by nearest neighbour on another grid; on the scanner grid together with its flips."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from totalfast.geometry import nearest_indices

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from numpy.typing import NDArray

    from totalfast.geometry import Box, Grid


def first_maximum(logits: torch.Tensor) -> torch.Tensor:
    """Return ``logits.argmax(0)``: the first maximum wins, NaN before all.

    On the CPU torch's ``max`` gives the same three times faster, and is fastest in float32. For
    float16, two passes that compute values without indices are five times faster again.
    """
    import torch

    if logits.device.type != "cpu":
        return logits.argmax(0)
    if logits.dtype == torch.half:
        labels = _first_maximum_of_halves(logits)
        # The sum is NaN if a logit was NaN or a maximum infinite.
        if not torch.isnan(labels.sum()):
            return labels.long()
        del labels
    exact = logits.float() if logits.dtype.itemsize < 4 else logits
    return exact.max(0).indices


def _first_maximum_of_halves(logits: torch.Tensor) -> torch.Tensor:
    """First maximum of float16 logits of up to 2**16 classes, as float32; NaN if undecided."""
    import torch

    # Zero at the maximum, and -2**16 or less elsewhere, because float16's numbers are at least
    # 2**-24 apart.
    behind = logits.float().sub_(logits.amax(0).float()).mul_(2.0**40)
    classes = torch.arange(len(logits), dtype=behind.dtype, device=behind.device)
    return behind.sub_(classes.view(-1, *[1] * (logits.dim() - 1))).amax(0).neg_()


def labels_at_source(logits: torch.Tensor, regions: Sequence[int] | None) -> torch.Tensor:
    """Return the labels of logits (classes, z, y, x) at their own resolution, on their device.

    ``regions`` is the label of each channel of a region-based model, in the order of painting;
    None takes the first maximum.
    """
    import torch

    if regions is None:
        return first_maximum(logits)
    inside = torch.sigmoid(logits.float()) > 0.5
    labels = torch.zeros(logits.shape[1:], dtype=torch.int32, device=logits.device)
    for label, mask in zip(regions, inside, strict=True):
        labels.masked_fill_(mask, int(label))
    return labels


def label_dtype(foreground_labels: int) -> type[np.unsignedinteger]:
    """Return uint8, or uint16 from 255 foreground labels on (nnU-Net, export_prediction.py)."""
    return np.uint8 if foreground_labels < 255 else np.uint16


def gather(
    labels: NDArray[np.unsignedinteger], indices: Sequence[NDArray[np.intp]], *, threads: int
) -> NDArray[np.unsignedinteger]:
    """Pick source voxels: ``labels[z[:, None, None], y[:, None], x]``, slice by slice in threads.

    Neighbouring target slices that come from one source slice are gathered once and copied.
    """
    z, y, x = indices
    out = np.empty((len(z), len(y), len(x)), dtype=labels.dtype)

    def fill(run: NDArray[np.intp]) -> None:
        first = run[0]
        rows = labels[z[first]][:, x]
        np.take(rows, y, axis=0, out=out[first])
        for other in run[1:]:
            out[other] = out[first]

    runs = np.split(np.arange(len(z)), np.flatnonzero(np.diff(z)) + 1)
    with ThreadPoolExecutor(max_workers=threads) as pool:
        list(pool.map(fill, runs))
    return out


@dataclass(frozen=True, slots=True, kw_only=True)
class ScannerMap:
    """The source of each scanner voxel's label.

    Parameters
    ----------
    labels
        The model grid's labels with the scanner's axis order, (x, y, z); a view.
    indices
        For each scanner axis, the index into ``labels`` of every voxel.

    Notes
    -----
    Index rule of scipy.ndimage.zoom(order=0) (TotalSegmentator 2.18.0, resampling.py), then
    nibabel's orientation transform.
    """

    labels: NDArray[np.unsignedinteger]
    indices: tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.intp]]

    @classmethod
    def of(cls, labels: NDArray[np.unsignedinteger], scanner: Grid) -> ScannerMap:
        """Map labels (z, y, x), RAS+ axes, of a model grid to a scanner grid."""
        canonical = scanner.canonical().shape
        orientation = scanner.orientation
        x, y, z = (
            nearest_indices(labels.shape[2 - int(axis)], canonical[int(axis)])[:: int(direction)]
            for axis, direction in orientation
        )
        source = labels.T.transpose([int(axis) for axis, _ in orientation])
        return cls(labels=source, indices=(x, y, z))


def nearest_to_scanner_grid(
    labels: NDArray[np.unsignedinteger], *, scanner: Grid, threads: int, box: Box | None = None
) -> NDArray[np.unsignedinteger]:
    """Map labels from the model grid back to the scanner grid.

    Parameters
    ----------
    labels
        (z, y, x), RAS+ axes, model grid.
    scanner
        The grid to fill; any orientation.
    threads
        How many slices are worked on at a time.
    box
        Fill only this part of the scanner grid; None fills all of it.

    Returns
    -------
        Same dtype, (x, y, z) of the scanner grid or of the box, Fortran order; a new array.
    """
    mapped = ScannerMap.of(labels, scanner)
    x, y, z = (
        index[part] for index, part in zip(mapped.indices, box or 3 * (slice(None),), strict=True)
    )
    # A Fortran-ordered (x, y, z) array is a C-ordered (z, y, x) one, transposed.
    out: NDArray[np.unsignedinteger] = gather(mapped.labels.T, (z, y, x), threads=threads).T
    return out
