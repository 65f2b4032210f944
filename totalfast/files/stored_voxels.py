"""The voxels of a NIfTI file, which are read when they are needed.

The header was checked before; this module knows where the voxels begin, not what they mean.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from nibabel.volumeutils import apply_read_scaling

from totalfast.files.gunzip import unpack

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

GZIP_MAGIC = b"\x1f\x8b"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StoredVoxels:
    """Voxels in a file or in memory; an array proxy for nibabel's images.

    Parameters
    ----------
    content
        Path of the file, or its bytes.
    layers
        How many times the content was compressed by gzip.
    offset
        First byte of the voxels, after unpacking.
    shape
        Number of voxels along each axis; the first axis is contiguous.
    dtype
        As stored, with byte order.
    slope, inter
        value = stored * slope + inter.
    """

    content: Path | bytes
    layers: int
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    slope: float
    inter: float

    is_proxy: ClassVar[bool] = True

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def with_shape(self, shape: tuple[int, ...]) -> StoredVoxels:
        """Return the first voxels in another shape, which has as many or fewer voxels."""
        return replace(self, shape=shape)

    def get_unscaled(self) -> NDArray[Any]:
        """Read the voxels, and nothing that follows them.

        Raises
        ------
        EOFError, ValueError, OSError
            If the content is shorter than expected or damaged.
        """
        if self.layers == 0 and isinstance(self.content, Path):
            return np.memmap(
                self.content, self.dtype, mode="c", offset=self.offset, shape=self.shape, order="F"
            )
        count = math.prod(self.shape)
        size = count * self.dtype.itemsize
        content = unpacked(self.content, self.layers, self.offset + size, verified=True)
        if len(content) < self.offset + size:
            have = max(len(content) - self.offset, 0)
            raise EOFError(f"it ends after {have} of {size} bytes of voxels")
        voxels = np.frombuffer(content, self.dtype, offset=self.offset, count=count)
        return voxels.reshape(self.shape, order="F")

    def __array__(
        self, dtype: DTypeLike | None = None, *, copy: bool | None = None
    ) -> NDArray[Any]:
        """Read the voxels and scale them, as nibabel's proxies do; numpy's protocol."""
        slope, inter = np.asarray(self.slope), np.asarray(self.inter)
        return np.asarray(apply_read_scaling(self.get_unscaled(), slope, inter), dtype=dtype)


def unpacked(content: Path | bytes, layers: int, limit: int, *, verified: bool = False) -> bytes:
    """Read a file, unpack ``layers`` layers of gzip, and return at most ``limit`` bytes.

    ``verified`` is that of ``unpack``.
    """
    packed = content.read_bytes() if isinstance(content, Path) else content
    for layer in range(layers, 0, -1):
        # An inner gzip stream is hardly longer than its content.
        most = limit if layer == 1 else 2 * limit + 4096
        packed = unpack(packed, most, verified=verified)
    return packed[:limit] if layers == 0 else packed
