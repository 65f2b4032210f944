"""The way of a model to its place: one process at a time, and by renaming."""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import secrets
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from totalfast import upstream
from totalfast.errors import WeightsError
from totalfast.system.disk import sync_folder
from totalfast.weights.condition import Condition, inspect
from totalfast.weights.connection import shown
from totalfast.weights.manifest import (
    MANIFEST_NAME,
    FileRecord,
    Manifest,
    sha256_of,
    write_manifest,
)
from totalfast.weights.official_model import CHECKPOINT_NAME
from totalfast.weights.partial_file import PartialFile
from totalfast.weights.transfer import fetch
from totalfast.weights.unpack import DamagedZipError, unpack

if TYPE_CHECKING:
    from collections.abc import Iterator

    from totalfast.weights.official_model import OfficialModel

logger = logging.getLogger(__name__)

WORKSHOP_NAME = ".totalfast"
"""Hidden folder beside the models: locks, unfinished downloads, temporary folders."""

MIRROR_VARIABLE = "TOTALFAST_WEIGHTS_MIRROR"
"""Environment variable: the URL that is used instead of upstream's release page. Below it,
``VERSION/DatasetNNN_NAME.zip`` must be found, as on that page."""

AT_REST_S = 10.0
"""An incomplete folder that changed in this time may be being filled by TotalSegmentator's own
downloader, which has no lock; it is left alone."""

LONGEST_WAIT_S = 300.0
LOCK_POLL_S = 0.2


def download(model: OfficialModel, *, quiet: bool, force: bool = False) -> bool:
    """Download a model unless it is whole; return whether it was downloaded.

    Parameters
    ----------
    model
        What to download.
    quiet
        Show no bar.
    force
        Replace a whole model too.

    Raises
    ------
    WeightsError
        If it can't be downloaded, unpacked or written.
    LicenseError
        If it needs a licence number and none is stored.
    """
    request = _request(model)
    with _alone(model, waits_for="downloads") as workshop:
        if not force and _is_whole(model):
            return False
        logger.info("Downloading model %d from %s", model.model_id, shown(request.url))
        began = time.perf_counter()
        partial = PartialFile(workshop / f"model-{model.model_id}.zip.part", request.url)
        try:
            continued = partial.offset > 0
            try:
                _fetch_and_put(model, request, partial, quiet=quiet)
            except DamagedZipError:
                if not continued:
                    raise
                logger.info("  the two parts of the download do not fit; starting anew")
                _fetch_and_put(model, request, partial, quiet=quiet)
        finally:
            partial.remove_unless_continuable()
        logger.info("  downloaded in %.2fs", time.perf_counter() - began)
        return True


def _fetch_and_put(
    model: OfficialModel, request: upstream.WeightsRequest, partial: PartialFile, *, quiet: bool
) -> None:
    fetch(request, partial, label=f"model {model.model_id}", quiet=quiet)
    label = f"the downloaded zip file of model {model.model_id}"
    try:
        _put(model, partial.path, label=label, source=shown(request.url))
    except WeightsError:
        partial.remove()
        raise
    partial.remove()


def import_zip(model: OfficialModel, archive: Path, *, force: bool = False) -> bool:
    """Unpack a model from a zip file unless it is whole; return whether it was unpacked.

    Raises
    ------
    WeightsError
        If the zip file is not that of the model, or can't be unpacked or written.
    """
    with _alone(model, waits_for="installs"):
        if not force and _is_whole(model):
            return False
        _put(model, archive, label=f"the zip file {archive}", source=archive.name)
        return True


def _request(model: OfficialModel) -> upstream.WeightsRequest:
    mirror = os.environ.get(MIRROR_VARIABLE, "").rstrip("/")
    request = upstream.weights_request(model.model_id, base_url=mirror or upstream.RELEASES_URL)
    if request is None:
        raise WeightsError(f"TotalSegmentator offers no download of model {model.model_id}.")
    return request


def _is_whole(model: OfficialModel) -> bool:
    """Whether the model is whole, or becomes so while another program fills its folder."""
    began_s = time.monotonic()
    finding = inspect(model)
    if finding.condition is Condition.INCOMPLETE and _changed_lately(model):
        logger.info("waiting whether another program completes %s", model.dataset)
    while (
        finding.condition is Condition.INCOMPLETE
        and _changed_lately(model)
        and time.monotonic() - began_s < LONGEST_WAIT_S
    ):
        time.sleep(LOCK_POLL_S)
        finding = inspect(model)
    return finding.condition is Condition.WHOLE


def _changed_lately(model: OfficialModel) -> bool:
    paths = [model.dataset, model.folder, *model.folder.rglob("*")]
    return 0 <= time.time() - max(map(_modified_s, paths)) < AT_REST_S


def _modified_s(path: Path) -> float:
    try:
        return path.lstat().st_mtime
    except OSError:  # it may be renamed at this moment
        return 0.0


@contextlib.contextmanager
def _alone(model: OfficialModel, *, waits_for: str) -> Iterator[Path]:
    """Hold the model's lock; yield the workshop, without what killed processes left in it."""
    import filelock

    workshop = model.dataset.parent / WORKSHOP_NAME
    try:
        workshop.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(workshop / f"model-{model.model_id}.lock", mode=0o664)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            logger.info("waiting for another process that %s model %d", waits_for, model.model_id)
            lock.acquire(poll_interval=LOCK_POLL_S)
        try:
            for leftover in workshop.glob(f"unpack-{model.model_id}-*"):
                shutil.rmtree(leftover, ignore_errors=True)
            yield workshop
        finally:
            lock.release()
    except OSError as error:
        raise WeightsError(
            f"model {model.model_id} can't be written to {model.dataset.parent}: {error}. "
            "TOTALSEG_HOME_DIR or TOTALSEG_WEIGHTS_PATH names another folder for the models."
        ) from error


def _put(model: OfficialModel, archive: Path, *, label: str, source: str) -> None:
    """Unpack a model beside its place, and rename it."""
    place, workshop = model.dataset, model.dataset.parent / WORKSHOP_NAME
    temporary = Path(tempfile.mkdtemp(prefix=f"unpack-{model.model_id}-", dir=workshop))
    new = temporary / place.name
    try:
        records = unpack(archive, place.name, temporary, label=label)
        folds = _folds(new)
        faults = model.faults(new, known_folds=folds.get(model.folder_name))
        if faults:
            raise WeightsError(f"{label} is not the model that is needed: {', '.join(faults)}.")
        write_manifest(new, _manifest(source, folds, records))
        for folder in (new, *new.rglob("*")):
            if folder.is_dir():
                sync_folder(folder)
        _exchange(new, place, workshop)
        sync_folder(place.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def record(model: OfficialModel) -> None:
    """Write a manifest of a model's present files, for a model that has none.

    Raises
    ------
    WeightsError
        If it can't be written.
    """
    dataset = model.dataset
    paths = [path for path in sorted(dataset.rglob("*")) if path.is_file()]
    records = {
        path.relative_to(dataset).as_posix(): FileRecord(
            size=path.stat().st_size,
            modified_ns=path.stat().st_mtime_ns,
            sha256=sha256_of(path),
        )
        for path in paths
        if path.name != MANIFEST_NAME
    }
    try:
        write_manifest(dataset, _manifest("files that were there", _folds(dataset), records))
    except OSError as error:
        raise WeightsError(f"the manifest of {dataset} can't be written: {error}.") from error


def _manifest(source: str, folds: dict[str, list[str]], records: dict[str, FileRecord]) -> Manifest:
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return Manifest(source=source, date=date, folds=folds, files=records)


def _folds(dataset: Path) -> dict[str, list[str]]:
    """Model folder to the names of its numbered folds; "fold_all" is not one of an ensemble."""
    folds: dict[str, list[str]] = {}
    for path in sorted(dataset.glob(f"*/fold_[0-9]*/{CHECKPOINT_NAME}")):
        folds.setdefault(path.parts[-3], []).append(path.parts[-2])
    return folds


def _exchange(new: Path, place: Path, workshop: Path) -> None:
    """Rename a folder to its place, and keep what was there before if it is not in ``new``.

    Other models in the old folder come into the new one. Files that differ from the new ones stay
    in the workshop, because they may be somebody's own weights.
    """
    if not os.path.lexists(place):
        new.rename(place)
        return
    old = workshop / f"replaced-{place.name}-{secrets.token_hex(4)}"
    shutil.move(place, old)  # copies a folder of a container's image, which can't be renamed
    try:
        new.rename(place)
    except BaseException:
        shutil.move(old, place)
        raise
    if old.is_symlink():
        old.unlink()
        return
    for path in old.iterdir():
        if not os.path.lexists(place / path.name):
            path.rename(place / path.name)
    if _holds_all_of(place, old):
        shutil.rmtree(old)
    else:
        logger.warning(
            "WARNING: files in %s were not those of the new model; they are kept in %s", place, old
        )


def _holds_all_of(new: Path, old: Path) -> bool:
    """Whether each file of ``old`` is in ``new``, or is the beginning of that file."""
    for path in old.rglob("*"):
        if path.is_symlink():
            return False
        if path.is_file() and path.name != MANIFEST_NAME:
            twin = new / path.relative_to(old)
            if not twin.is_file() or not _begins_with(twin, path):
                return False
    return True


def _begins_with(whole: Path, part: Path) -> bool:
    with whole.open("rb") as of_whole, part.open("rb") as of_part:
        while chunk := of_part.read(1 << 20):
            if of_whole.read(len(chunk)) != chunk:
                return False
    return True
