"""Write label maps, masks and probabilities as files that appear completely or not at all."""

from __future__ import annotations

import io
import pickle
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nibabel as nib
import numpy as np

from totalfast.files.gzip_member import Piece, compress, join, member, zeros
from totalfast.system.pending_files import PendingFiles
from totalfast.upstream import label_table_xml

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from typing import TypeAlias

    from numpy.typing import NDArray
    from typing_extensions import Buffer

    from totalfast.engine.predict import Probabilities

    Reader: TypeAlias = Any
    """One of nnU-Net's image readers, which have no types."""

PIECE_BYTES = 4 << 20
"""Number of voxels that are turned into a mask and compressed at a time; they fit in the cache."""


def label_image(
    labels: NDArray[np.uint8],
    *,
    affine: NDArray[np.float64],
    header: nib.Nifti1Header | None,
    names: Mapping[int, str] | None,
) -> nib.Nifti1Image:
    """Create a nibabel image from labels, with upstream's header and label table.

    Parameters
    ----------
    labels
        uint8, (x, y, z).
    affine
        4x4, mm.
    header
        The scan's header, which is copied; None creates a new header.
    names
        Label to name, stored as a header extension (code 0); None stores no names.
    """
    if header is not None:
        header = header.copy()
        header.set_data_dtype(np.uint8)
    image = nib.Nifti1Image(labels, affine, header)
    if names is not None:
        extension = nib.nifti1.Nifti1Extension(0, label_table_xml(dict(names)))
        image.header.extensions.append(extension)
    return image


def write_labels(image: nib.Nifti1Image, path: Path, *, files: PendingFiles, threads: int) -> None:
    """Write a label map to a ``.nii`` or ``.nii.gz`` file."""
    voxels = np.asfortranarray(image.dataobj).reshape(-1, order="F")
    head = _header_bytes(image)
    content: list[Buffer] = [head, voxels.data]
    if path.name.endswith(".gz"):
        chunks = [voxels[at : at + PIECE_BYTES].data for at in range(0, voxels.size, PIECE_BYTES)]
        with ThreadPoolExecutor(max_workers=threads) as pool:
            pieces = list(pool.map(compress, chunks))
        content = list(member(join([compress(head), *pieces])))
    files.write(path, lambda staged: _write_parts(staged, content))


def write_probabilities(
    probabilities: Probabilities,
    path: Path,
    *,
    affine: NDArray[np.float64],
    reader: Reader,
    files: PendingFiles,
) -> None:
    """Write probabilities like nnU-Net: an archive at ``path``, and a ``.pkl`` file beside it.

    Parameters
    ----------
    probabilities
        Probabilities of one model.
    path
        Path of a compressed numpy archive, with any ending; it holds float32 (classes, z, y, x)
        under the key "probabilities".
    affine
        Affine of the model grid, (x, y, z), 4x4, mm.
    reader
        nnU-Net's reader of the model; it determines the image properties in the ``.pkl`` file.
    files
        Registers the files.
    """
    shape = probabilities.values.shape[:0:-1]
    properties = _read_properties(reader, shape, affine) | probabilities.cropping

    def write_archive(staged: Path) -> None:
        with staged.open("wb") as archive:
            np.savez_compressed(archive, probabilities=probabilities.values)

    files.write(path, write_archive)
    files.write(
        path.with_suffix(".pkl"), lambda staged: staged.write_bytes(pickle.dumps(properties))
    )


def _read_properties(
    reader: Reader, shape: tuple[int, ...], affine: NDArray[np.float64]
) -> dict[str, Any]:
    """Image properties from nnU-Net's reader, of a temporary file, because it reads only files."""
    with tempfile.TemporaryDirectory(prefix="totalfast-") as folder:
        path = Path(folder) / "image.nii"
        nib.save(nib.Nifti1Image(np.zeros(shape, dtype=np.uint8), affine), path)
        _, properties = reader.read_images([str(path)])
    return dict(properties)


def write_masks(
    image: nib.Nifti1Image,
    names: Mapping[int, str],
    *,
    folder: Path,
    files: PendingFiles,
    threads: int,
) -> None:
    """Write one 0/1 mask per class, ``{folder}/{name}.nii.gz``.

    Parameters
    ----------
    image
        Label map from ``label_image``; the masks have its header without the label table.
    names
        Label to class name; a class without voxels gets an empty mask.
    folder
        Folder of the masks; created if it is missing.
    files
        Registers the files.
    threads
        Number of masks that are written at a time.
    """
    labels = np.asfortranarray(image.dataobj)
    plain = nib.Nifti1Image(image.dataobj, image.affine, image.header)
    plain.header.extensions.pop()
    head = compress(_header_bytes(plain))
    present = _present_labels(labels, threads)

    def write(item: tuple[int, str]) -> None:
        label, name = item
        pieces = join([head, *_mask_pieces(labels, label, present[:, label])])
        content = list(member(pieces))
        files.write(folder / f"{name}.nii.gz", lambda staged: _write_parts(staged, content))

    with ThreadPoolExecutor(max_workers=threads) as pool:
        list(pool.map(write, names.items()))


def _present_labels(labels: NDArray[np.uint8], threads: int) -> NDArray[np.bool_]:
    """(z, 256): whether each slice contains each label.

    Neighbouring slices are often identical, because slices of the model grid are repeated on the
    scanner grid. Comparing two slices is much faster than counting labels.
    """

    def count(plane: int) -> NDArray[np.bool_] | None:
        if plane and np.array_equal(labels[:, :, plane], labels[:, :, plane - 1]):
            return None
        return np.bincount(labels[:, :, plane].ravel(order="F"), minlength=256) > 0

    with ThreadPoolExecutor(max_workers=threads) as pool:
        rows = list(pool.map(count, range(labels.shape[2])))
    present = np.zeros((len(rows), 256), dtype=np.bool_)
    for plane, row in enumerate(rows):
        present[plane] = present[plane - 1] if row is None else row
    return present


def _mask_pieces(
    labels: NDArray[np.uint8], label: int, present: NDArray[np.bool_]
) -> Iterator[Piece]:
    """Compress ``labels == label``; leading and trailing slices without the label are zeros."""
    plane_bytes = labels.shape[0] * labels.shape[1]
    planes_per_piece = max(PIECE_BYTES // plane_bytes, 1)
    used = np.flatnonzero(present)
    if used.size == 0:
        yield zeros(labels.size)
        return
    first, last = int(used[0]), int(used[-1]) + 1
    yield zeros(first * plane_bytes)
    for start in range(first, last, planes_per_piece):
        stop = min(start + planes_per_piece, last)
        mask = labels[:, :, start:stop] == label
        yield compress(mask.view(np.uint8).reshape(-1, order="F").data)
    yield zeros((labels.shape[2] - last) * plane_bytes)


def _write_parts(path: Path, parts: Sequence[Buffer]) -> None:
    with path.open("wb") as stream:
        stream.writelines(parts)


def _header_bytes(image: nib.Nifti1Image) -> bytes:
    """Return the bytes before the voxels, equal to those of ``nibabel.save`` for uint8 data."""
    header = image.header.copy()
    header.set_slope_inter(1.0, 0.0)
    stream = io.BytesIO()
    header.write_to(stream)
    return stream.getvalue().ljust(int(header.get_data_offset()), b"\0")
