"""The winning labels of a slab on a device: ``cells.fill_labels`` for many cells at a time.

Three steps, each for the whole slab: the cells that one label fills; the few candidates of each
other cell, compared in float32; the target voxels in which that is not enough, exactly. Every class
that can win is a candidate, so the labels are those of ``cells``, where fewer may be compared.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from totalfast.export.device_slab import batches, power_of_two

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from totalfast.export.device_slab import DeviceSlab

SLOTS = (2, 4, 8, 16)
"""Cells with at most this many candidates are compared together; with more, all classes are."""
FEW, ALL = 1, 2
"""Marks of target voxels to compare exactly: the candidates, or all classes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Undecided:
    """The n cells of a slab that not one label fills; tensors on the device."""

    slab: DeviceSlab
    cells: torch.Tensor
    """int64, (3, n): z, y and x."""
    candidates: torch.Tensor
    """int32, (slots, n): the ``count`` classes that can win, ascending, then zeros."""
    count: torch.Tensor
    """int64, (n,): number of candidates, more than slots if all classes are to be compared."""
    clear: torch.Tensor
    """float64, (n,): approximate values decide if one is ahead by more."""

    def classes(self, members: torch.Tensor, slots: int | None) -> torch.Tensor:
        """Candidates of some cells, int64, (slots, cells); None takes all classes.

        Class 0 stands for missing ones. That changes no first maximum: it is a candidate, or loses.
        """
        if slots is None:
            return self.ranks(None).expand(-1, len(members))
        return self.candidates[:slots, members].long()

    def ranks(self, slots: int | None) -> torch.Tensor:
        """Numbers of the candidates, as a column."""
        import torch

        return torch.arange(slots or len(self.slab.logits), device=self.cells.device)[:, None]


def winners(slab: DeviceSlab, dtype: torch.dtype) -> torch.Tensor:
    """Labels at the target voxels of a slab, (z, y, x), on its device."""
    import torch

    label, lead, size = _summary(slab.logits)
    lowest, highest = slab.on_cells(label, torch.minimum), slab.on_cells(label, torch.maximum)
    lead, size = slab.on_cells(lead, torch.minimum), slab.on_cells(size, torch.maximum)
    tolerance = _tolerance(size, slab)
    decided = (lowest == highest) & (lead > tolerance) & size.isfinite()
    labels = slab.on_target(lowest.to(dtype))
    cells = (~decided).nonzero().t().contiguous()
    if cells.shape[1]:
        at = tuple(cells)
        pivots = lowest[at], highest[at]
        undecided = _undecided(slab, cells, pivots, tolerance=tolerance[at], size=size[at])
        marks = _compare(undecided, labels)
        _compare_exactly(undecided, marks, labels)
    return labels


def _summary(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per source voxel: first maximum, its lead over smaller labels, largest absolute logit.

    The last is not finite if a logit is not.
    """
    import torch

    number = torch.arange(len(logits), device=logits.device).view(-1, 1, 1, 1)
    parts = []
    for part in batches(logits.shape[1], 2 * logits[:, 0].numel() * logits.element_size()):
        slices = logits[:, part]
        best, label = slices.max(0)
        before = slices.masked_fill(number >= label, -torch.inf).amax(0)
        size = torch.maximum(best.abs(), slices.amin(0).abs())
        parts.append((label.int(), best - before, size))
    label, lead, size = (torch.cat(values) for values in zip(*parts, strict=True))
    return label, lead, size


def _tolerance(size: torch.Tensor, slab: DeviceSlab) -> torch.Tensor:
    """``cells.spacing_at``, but at least the smallest normal number of float64."""
    import torch

    bits, lowest = slab.rounding
    exponent = torch.frexp(size.double()).exponent.long() - 1
    spacing = power_of_two((exponent.clamp_(min=lowest) - bits).clamp_(-1022, 1023))
    return spacing.to(size.dtype)


def _undecided(
    slab: DeviceSlab,
    cells: torch.Tensor,
    pivots: Sequence[torch.Tensor],
    *,
    tolerance: torch.Tensor,
    size: torch.Tensor,
) -> Undecided:
    """Drop the classes that lose to a pivot in a cell; the rule is in ``linear``.

    The pivots are the smallest and the largest label at the corners: two of them drop nearly all
    classes.
    """
    import torch

    device, classes, slots = cells.device, len(slab.logits), SLOTS[-1]
    number = torch.arange(classes, device=device, dtype=torch.int32)[:, None]
    # The n-th candidate goes to row n, and the other classes to row 0. The rows are not read where
    # there are more candidates than slots.
    table = torch.zeros((slots + 1, cells.shape[1]), dtype=torch.int32, device=device)
    corners, logits, counts = slab.corners(tuple(cells)), slab.logits.flatten(1), []
    for part in batches(cells.shape[1], classes * (2 * len(corners) * logits.element_size() + 16)):
        offsets = corners[:, part]
        values = logits.index_select(1, offsets.flatten()).view(classes, *offsets.shape)
        kept = torch.ones((), dtype=torch.bool, device=device)
        for pivot in pivots:
            own = values.gather(0, pivot[part].long().expand(1, *offsets.shape))
            lead = (own - values).amin(1)
            kept = kept & torch.where(number <= pivot[part], lead <= tolerance[part], lead < 0)
        row = kept.cumsum(0)
        counts.append(row[-1].clone())
        row.clamp_(max=slots).mul_(kept)
        table[:, part].scatter_(0, row, number.expand_as(row))
    return Undecided(
        slab=slab,
        cells=cells,
        candidates=table[1:],
        count=torch.cat(counts).masked_fill_(~size.isfinite(), slots + 1),
        clear=_clear(tolerance.double(), size.double(), slab.working_dtype),
    )


def _clear(tolerance: torch.Tensor, size: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A lead of values interpolated in ``dtype`` that decides, rounding included.

    Scipy's sum and this one make at most 40 rounding errors in a difference of two classes, each
    half a unit in the last place of the largest logit. The constant is for products so small that
    they are rounded to the smallest numbers. Where sums may overflow, no lead decides.
    """
    import torch

    numbers = torch.finfo(dtype)
    clear = tolerance + 64 * numbers.eps * size + 2.0**20 * numbers.smallest_normal
    return clear.masked_fill_(~(size < numbers.max / 4), torch.inf)


def _compare(undecided: Undecided, labels: torch.Tensor) -> torch.Tensor:
    """Fill in the best candidate; return marks of the target voxels in which it is not clear."""
    import torch

    marks = torch.zeros(labels.shape, dtype=torch.uint8, device=labels.device)
    more = torch.stack([undecided.count > slots for slots in SLOTS])
    order = more.sum(0).argsort(stable=True)
    # One transfer: how many cells have more candidates than each number of slots.
    above = [len(order), *more.sum(1).tolist(), 0]
    sizes = [one - next_one for one, next_one in itertools.pairwise(above)]
    start, box = 0, undecided.slab.box_size()
    for slots, size in zip((*SLOTS, None), sizes, strict=True):
        members = order[start : start + size]
        start += size
        candidates = slots or len(undecided.slab.logits)
        for part in batches(size, 8 * candidates * (box + 24) + 32 * box):
            _compare_some(undecided, members[part], slots, labels, marks)
    return marks


def _compare_some(
    undecided: Undecided,
    members: torch.Tensor,
    slots: int | None,
    labels: torch.Tensor,
    marks: torch.Tensor,
) -> None:
    """``_compare`` for cells of one number of slots; None compares all classes."""
    import torch

    slab, least = undecided.slab, torch.finfo(undecided.slab.working_dtype).min
    cells = tuple(undecided.cells[:, members])
    classes = undecided.classes(members, slots)
    values = slab.at_corners(cells, classes).to(slab.working_dtype)
    if slots is not None:
        missing = undecided.ranks(slots) >= undecided.count[members]
        values = values.masked_fill(missing[:, None], least)
    boxes = slab.boxes(cells)
    values = slab.interpolate(values, boxes)
    best, which = values.max(0)
    second = values.scatter_(0, which[None], least).amax(0)
    unclear = ~(best - second > undecided.clear[members])
    winner = classes.gather(0, which.flatten(0, 2))
    # A cell's last voxel may be written several times, with the same label.
    offsets = slab.offsets(boxes).flatten()
    labels.view(-1).scatter_(0, offsets, winner.flatten().to(labels.dtype))
    mark = unclear.to(marks.dtype) * (ALL if slots is None else FEW)
    marks.view(-1).scatter_(0, offsets, mark.flatten())


def _compare_exactly(undecided: Undecided, marks: torch.Tensor, labels: torch.Tensor) -> None:
    """Fill in the winner of each marked target voxel, as scipy and nnU-Net compute it."""
    import torch

    slab, count = undecided.slab, undecided.cells.shape[1]
    position = torch.zeros(slab.cell_shape, dtype=torch.int64, device=labels.device)
    position[tuple(undecided.cells)] = torch.arange(count, device=labels.device)
    for mark, slots in ((FEW, SLOTS[-1]), (ALL, None)):
        voxels = (marks == mark).nonzero().t().contiguous()
        for part in batches(voxels.shape[1], 8 * 6 * (slots or len(slab.logits))):
            some = tuple(voxels[:, part])
            classes = undecided.classes(position[slab.cells_of(some)], slots)
            winner = classes.gather(0, slab.exact(some, classes).argmax(0, keepdim=True))
            labels[some] = winner[0].to(labels.dtype)
