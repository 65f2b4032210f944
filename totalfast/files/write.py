"""Write label maps, masks and probabilities as files that appear whole or not at all.

The only stage that writes images to the disk. Knows label maps and headers; knows nothing of
models.
"""

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
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

    from totalfast.engine.predict import Probabilities

PIECE_BYTES = 4 << 20
"""Voxels that are turned into a mask and compressed at a time; small enough for the cache."""


def label_image(
    labels: NDArray[np.uint8],
    *,
    affine: NDArray[np.float64],
    header: nib.Nifti1Header | None,
    names: Mapping[int, str] | None,
) -> nib.Nifti1Image:
    """Wrap labels as a nibabel image, with upstream's header and label table.

    Parameters
    ----------
    labels
        uint8, (x, y, z).
    affine
        4x4, mm.
    header
        The scan's header, which is copied; None for a fresh one.
    names
        Label to name, stored as a header extension (code 0); None stores none.
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
    part = files.path(path)
    if path.name.endswith(".gz"):
        chunks = [voxels[at : at + PIECE_BYTES].data for at in range(0, voxels.size, PIECE_BYTES)]
        with ThreadPoolExecutor(max_workers=threads) as pool:
            pieces = list(pool.map(compress, chunks))
        part.write_bytes(b"".join(member(join([compress(head), *pieces]))))
    else:
        with part.open("wb") as stream:
            stream.write(head)
            stream.write(voxels.data)


def write_probabilities(
    probabilities: Probabilities,
    path: Path,
    *,
    affine: NDArray[np.float64],
    reader: Any,  # noqa: ANN401 - nnU-Net is untyped
    files: PendingFiles,
) -> None:
    """Write probabilities as nnU-Net does: ``path`` holds them, a ``.pkl`` beside it the image.

    Parameters
    ----------
    probabilities
        Of one model.
    path
        A compressed numpy archive whatever its name; float32 (classes, z, y, x) under the key
        "probabilities".
    affine
        4x4, mm, of the model grid, (x, y, z).
    reader
        nnU-Net's, of the model; decides what is said of an image.
    files
        Where they are registered.
    """
    shape = probabilities.values.shape[:0:-1]
    properties = _read_properties(reader, shape, affine) | probabilities.cropping
    with files.path(path).open("wb") as archive:
        np.savez_compressed(archive, probabilities=probabilities.values)
    with files.path(path.with_suffix(".pkl")).open("wb") as stream:
        pickle.dump(properties, stream)


def _read_properties(
    reader: Any,  # noqa: ANN401
    shape: tuple[int, ...],
    affine: NDArray[np.float64],
) -> dict[str, Any]:
    """What nnU-Net's reader says of an image file; it reads files only, so it gets one."""
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
    """Write one 0/1 mask a class, ``{folder}/{name}.nii.gz``.

    Parameters
    ----------
    image
        Label map of ``label_image``; the masks get its header without the table of names.
    names
        Label to class name; a class that is absent gets an empty mask.
    folder
        Where; made if it is missing.
    files
        Where the files are registered.
    threads
        Masks that are made at a time.
    """
    labels = np.asfortranarray(image.dataobj)
    plain = nib.Nifti1Image(image.dataobj, image.affine, image.header)
    plain.header.extensions.pop()
    head = compress(_header_bytes(plain))
    present = _present_labels(labels, threads)

    def write(item: tuple[int, str]) -> None:
        label, name = item
        pieces = join([head, *_mask_pieces(labels, label, present[:, label])])
        files_path = targets[name]
        with files_path.open("wb") as stream:
            stream.writelines(member(pieces))

    targets = {name: files.path(folder / f"{name}.nii.gz") for name in names.values()}
    with ThreadPoolExecutor(max_workers=threads) as pool:
        list(pool.map(write, names.items()))


def _present_labels(labels: NDArray[np.uint8], threads: int) -> NDArray[np.bool_]:
    """(z, 256): which labels each slice holds.

    Restoring repeats slices of the model grid; comparing two slices is far cheaper than counting.
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
    """Compress ``labels == label``; slices without the label are spliced in as zeros."""
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


def _header_bytes(image: nib.Nifti1Image) -> bytes:
    """Return the bytes before the voxels, as ``nibabel.save`` writes them for uint8 data."""
    header = image.header.copy()
    header.set_slope_inter(1.0, 0.0)
    stream = io.BytesIO()
    header.write_to(stream)
    return stream.getvalue().ljust(int(header.get_data_offset()), b"\0")
