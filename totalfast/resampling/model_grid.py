"""Bring a scan to the model's spacing, exactly as TotalSegmentator does, in slabs and threads.

The arithmetic is
scipy.ndimage.zoom's with mode="nearest" (TotalSegmentator 2.18.0, resampling.py), bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from totalfast.geometry import (
    CORNERS,
    linear_weights,
    nearest_indices,
    sample_positions,
    to_canonical,
)
from totalfast.scan import ModelImage, truncate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from totalfast.scan import ScannerImage

Fill: TypeAlias = Callable[["NDArray[np.float32]", "ScannerImage", "NDArray[Any]", int], None]
"""Fills the target voxels (z, y, x) from a scan, whose voxels (x, y, z) have RAS+ axes, in threads.
"""

PLANES_PER_SLAB = 16
"""Slices that one thread works on at a time; a slab of float64 stays in the tens of megabytes."""

SPLINE_HALO = 64
"""Source slices beside a slab that its spline coefficients are computed from. The filter's slowest
pole is 0.431 (order 5): 0.431**64 is 4e-24, below half a unit in the last place of a float64.
Measured on scipy: a halo of 12 changed 31 % of the values, one of 40 none."""

SPLINE_PADDING = 12
"""Edge voxels that scipy.ndimage.zoom adds on each side before it filters (scipy 1.17)."""


def to_model_grid(
    image: ScannerImage, *, spacing_mm: Sequence[float] | None, order: int, threads: int
) -> ModelImage:
    """Orient a scan to RAS+ and resample it to the model's spacing.

    Parameters
    ----------
    image
        The scan.
    spacing_mm
        Target spacing along (x, y, z); None keeps the spacing.
    order
        Spline order 0 to 5, as in scipy.ndimage.zoom.
    threads
        How many slabs are worked on at a time.

    Notes
    -----
    A resampled image is truncated to int32, towards zero. NaN, infinity and overflow become the
    result of the CPU's cast. An image that already has the spacing is not truncated.
    """
    canonical = image.grid.canonical()
    stored: NDArray[Any] = to_canonical(image.stored, image.grid)
    keeps_spacing = spacing_mm is None or canonical.has_spacing(spacing_mm)
    grid = canonical if keeps_spacing else canonical.resampled(spacing_mm or ())
    voxels = np.empty(grid.shape[::-1], dtype=np.float32)
    fill = _copy if keeps_spacing else _FILLS[order]
    fill(voxels, image, stored, threads)
    return ModelImage(
        voxels=voxels, grid=grid, canonical=canonical, keeps_scanner_grid=keeps_spacing
    )


def _copy(
    voxels: NDArray[np.float32], image: ScannerImage, stored: NDArray[Any], threads: int
) -> None:
    """Without resampling: the intensities, which are not truncated."""

    def planes(start: int, stop: int) -> NDArray[np.float64]:
        return image.scale(stored[:, :, start:stop].transpose(2, 1, 0))

    _fill_slabs(voxels, planes, threads)


def _fill_nearest(
    voxels: NDArray[np.float32], image: ScannerImage, stored: NDArray[Any], threads: int
) -> None:
    """Order 0: pick the nearest voxel."""
    x, y, z = (nearest_indices(n, m) for n, m in zip(stored.shape, voxels.T.shape, strict=True))

    def planes(start: int, stop: int) -> NDArray[np.int32]:
        picked = np.stack([stored[:, :, k].T[y[:, None], x] for k in z[start:stop]])
        return truncate(image.scale(picked))

    _fill_slabs(voxels, planes, threads)


def _fill_linear(
    voxels: NDArray[np.float32], image: ScannerImage, stored: NDArray[Any], threads: int
) -> None:
    """Order 1: the sum over the eight corners, in scipy's order, of ``((v * wx) * wy) * wz``.

    The partial products of a corner are rounded one by one, so they may be shared but not
    reordered. An ordinary separable interpolation differs by 3e-12, which the later truncation
    turns into another integer for some percent of the voxels.
    """
    x, y, z = (linear_weights(n, m) for n, m in zip(stored.shape, voxels.T.shape, strict=True))

    def weighted_corners(k: int) -> list[NDArray[np.float64]]:
        """``(v * wx) * wy`` of source plane k for the four in-plane corners, (y, x) each."""
        plane = stored[:, :, k].T
        corners = []
        for x_index, x_weight in ((x.lower, x.lower_weight), (x.upper, x.upper_weight)):
            for y_index, y_weight in ((y.lower, y.lower_weight), (y.upper, y.upper_weight)):
                values = image.scale(plane[y_index[:, None], x_index])
                values = values * x_weight
                values *= y_weight[:, None]
                corners.append(values)
        return corners

    def planes(start: int, stop: int) -> NDArray[np.int32]:
        out = np.zeros((stop - start, *voxels.shape[1:]), dtype=np.float64)
        cached: dict[int, list[NDArray[np.float64]]] = {}
        for row, j in enumerate(range(start, stop)):
            pair = (int(z.lower[j]), int(z.upper[j]))
            cached = {k: cached[k] if k in cached else weighted_corners(k) for k in pair}
            for below, above in zip(cached[pair[0]], cached[pair[1]], strict=True):
                out[row] += below * z.lower_weight[j]
                out[row] += above * z.upper_weight[j]
        return truncate(out)

    _fill_slabs(voxels, planes, threads)


def _fill_cubic(
    voxels: NDArray[np.float32], image: ScannerImage, stored: NDArray[Any], threads: int
) -> None:
    """Order 3, the usual one. scipy's axes are (x, y, z), so slabs are cut along x."""
    from totalfast.resampling.cubic import cubic_axis, resample_cubic

    target = voxels.T

    def read(y: int, planes: slice) -> NDArray[np.float64]:
        return image.scale(stored[planes, y])

    def write(planes: slice, values: NDArray[np.float64]) -> None:
        target[planes] = truncate(values)

    axes = [cubic_axis(n, m, CORNERS) for n, m in zip(stored.shape, target.shape, strict=True)]
    resample_cubic(read, stored.shape, axes, write, threads=threads)


def _fill_spline(
    voxels: NDArray[np.float32],
    image: ScannerImage,
    stored: NDArray[Any],
    threads: int,
    *,
    order: int,
) -> None:
    """Orders 2, 4 and 5: scipy's own prefilter and interpolation, on slabs with a halo."""
    from scipy import ndimage

    size_z = stored.shape[2]
    x, y, z = (
        sample_positions(n, m) + SPLINE_PADDING
        for n, m in zip(stored.shape, voxels.T.shape, strict=True)
    )

    def planes(start: int, stop: int) -> NDArray[np.int32]:
        # In padded coordinates; the filter starts at the padded edges, or a halo away from them.
        first = max(int(z[start]) - SPLINE_HALO, 0)
        last = min(int(z[stop - 1]) + 2 + SPLINE_HALO, size_z + 2 * SPLINE_PADDING)
        inside = slice(max(first - SPLINE_PADDING, 0), min(last - SPLINE_PADDING, size_z))
        before = max(SPLINE_PADDING - first, 0)
        after = (last - first) - before - (inside.stop - inside.start)
        padding = ((SPLINE_PADDING,) * 2, (SPLINE_PADDING,) * 2, (before, after))
        source = np.pad(image.scale(stored[:, :, inside]), padding, mode="edge")
        coefficients = ndimage.spline_filter(source, order, output=np.float64, mode="nearest")
        grid = np.meshgrid(x, y, z[start:stop] - first, indexing="ij")
        values = ndimage.map_coordinates(
            coefficients, grid, order=order, mode="nearest", prefilter=False
        )
        return truncate(values.transpose(2, 1, 0))

    _fill_slabs(voxels, planes, threads)


_FILLS: dict[int, Fill] = {
    0: _fill_nearest,
    1: _fill_linear,
    2: partial(_fill_spline, order=2),
    3: _fill_cubic,
    4: partial(_fill_spline, order=4),
    5: partial(_fill_spline, order=5),
}
"""How the target voxels of each spline order are filled."""


def _fill_slabs(
    voxels: NDArray[np.float32], planes: Callable[[int, int], NDArray[Any]], threads: int
) -> None:
    """Fill target slices with ``planes(start, stop)``, which returns (slices, y, x), in threads."""

    def fill(start: int) -> None:
        stop = min(start + PLANES_PER_SLAB, len(voxels))
        voxels[start:stop] = planes(start, stop)

    with ThreadPoolExecutor(max_workers=threads) as pool:
        list(pool.map(fill, range(0, len(voxels), PLANES_PER_SLAB)))
