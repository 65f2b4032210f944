"""Scans elsewhere, found by the names of files: no header is read.

An image file is a scan, with the files that belong to it; so is a zip file, and a folder that
directly holds DICOM files.
"""

from __future__ import annotations

import re
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from totalfast.batch.finding.fingerprints import fingerprint_of, mark_of
from totalfast.batch.finding.remote_names import (
    DICOM_ENDINGS,
    has_parts,
    is_image,
    is_part,
    may_be_dicom,
    parts_of,
)
from totalfast.batch.finding.search import HIDDEN, is_hidden, kept_names
from totalfast.batch.remote.files import AT_A_TIME, files_below, files_in, look_at, read
from totalfast.batch.remote.place import WEB, Remote
from totalfast.errors import InputError, TotalfastError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from totalfast.batch.finding.left_out import Counted
    from totalfast.batch.remote.files import RemoteFile
    from totalfast.batch.remote.place import Place

PREAMBLE, SIGNATURE = 128, b"DICM"
"""Bytes before the signature of a DICOM file, and the signature."""

NO_SCAN = "file whose name is not that of a scan"
NOT_DICOM = "not DICOM"


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteScan:
    """A scan elsewhere.

    Parameters
    ----------
    source
        Image file, zip file, DICOM file, or folder of DICOM.
    files
        The files that are read.
    """

    source: Remote
    files: tuple[RemoteFile, ...]

    @property
    def size(self) -> int:
        """Bytes of all files, as far as they are known."""
        return sum(each.size or 0 for each in self.files)

    def fingerprint(self, series: str | None) -> str:
        """What the scan is: changes with the names, sizes and versions of its files."""
        return fingerprint_of(
            (mark_of(each.remote.name, _size(each), each.version) for each in self.files), series
        )


def _size(file: RemoteFile) -> int:
    return -1 if file.size is None else file.size


def scans_of(place: Remote, left_out: Counted, *, skip: Place | None) -> list[RemoteScan]:
    """Find the scans that an address means: a file, a folder, or a pattern.

    Parameters
    ----------
    place
        Of a web server, a folder ends with a slash.
    left_out, skip
        As in ``scans_below``.

    Raises
    ------
    InputError
        If it does not exist or can't be read.
    TransferError
        If it can't be read now.
    """
    if place.has_magic:
        scans = scans_below(start_of(place), left_out, skip=skip, pattern=place)
        if not scans:
            left_out.add("pattern without a match", place)
        return scans
    in_web = place.scheme in WEB
    if place.url.endswith("/") if in_web else look_at(place).is_folder:
        return scans_below(place, left_out, skip=skip)
    return [scan_at(place)]


def scans_below(
    folder: Remote, left_out: Counted, *, skip: Place | None = None, pattern: Remote | None = None
) -> list[RemoteScan]:
    """Find the scans below a folder, without hidden files, masks and results of totalfast.

    Parameters
    ----------
    folder
        A folder or a prefix.
    left_out
        Counts what is left out.
    skip
        A folder that is not searched.
    pattern
        Keep only files that match it, and files below folders that match it.
    """
    wanted = None if pattern is None else _Pattern(pattern)
    by_folder: dict[str, dict[str, RemoteFile]] = defaultdict(dict)
    for file in files_below(folder):
        if not file.remote.is_in(skip):
            by_folder[file.remote.parent.url][file.remote.name] = file
    scans: list[RemoteScan] = []
    closed: list[Remote] = []
    for url in sorted(by_folder):
        place = Remote(url)
        if any(place.is_in(above) for above in closed):
            continue
        if _has_hidden_part(folder, place):
            left_out.add(HIDDEN, place)
            closed.append(place)
            continue
        names = by_folder[url]
        kept = kept_names(place, names, left_out)
        if kept is None:
            closed.append(place)
            continue
        if wanted is not None:
            kept = [name for name in kept if wanted.has(names[name].remote)]
        scans += _scans_in(place, {name: names[name] for name in kept}, names, left_out)
    return _with_facts(scans)


def _has_hidden_part(folder: Remote, place: Remote) -> bool:
    parts = place.url[len(folder.url.rstrip("/")) :].split("/")
    return any(is_hidden(part) for part in parts if part)


class _Pattern:
    """Tells which files a pattern means."""

    def __init__(self, pattern: Remote) -> None:
        from fsspec.utils import glob_translate

        self._whole = re.compile(glob_translate(pattern.url.rstrip("/")))

    def has(self, file: Remote) -> bool:
        """Whether a file matches, or a folder above it."""
        url = file.url
        while "/" in url.partition("://")[2]:
            if self._whole.match(url):
                return True
            url = url.rpartition("/")[0]
        return False


def start_of(pattern: Remote) -> Remote:
    """Return the folder above the first part of a pattern that has a sign.

    Raises
    ------
    InputError
        If the host or bucket has one.
    """
    scheme, _, rest = pattern.url.partition("://")
    plain: list[str] = []
    for part in rest.split("/"):
        if Remote(f"{scheme}://{part}").has_magic:
            break
        plain.append(part)
    if not plain:
        raise InputError(f"{pattern} needs the name of a host or bucket before its first sign.")
    return Remote(f"{scheme}://{'/'.join(plain)}")


def scan_at(source: Remote) -> RemoteScan:
    """Look at one scan: which files it has now.

    Raises
    ------
    InputError
        If it does not exist or can't be read, or is a folder without DICOM files.
    TransferError
        If it can't be read now.
    """
    file = look_at(source)
    if not file.is_folder:
        if not has_parts(source.name):
            return RemoteScan(source=source, files=(file,))
        beside = {each.remote.name: each for each in files_in(source.parent)}
        parts = [beside[name] for name in parts_of(source.name, beside)]
        return RemoteScan(source=source, files=(file, *parts))
    names = {each.remote.name: each for each in files_in(source) if not each.is_folder}
    dicom = [name for name in sorted(names) if not is_hidden(name) and may_be_dicom(name, names)]
    if not dicom:
        raise InputError(
            f"{source} holds no DICOM files directly; name a file, or a folder that holds the "
            "files of one series."
        )
    return RemoteScan(source=source, files=tuple(names[name] for name in dicom))


def scans_now(sources: Iterable[Remote]) -> dict[Remote, RemoteScan]:
    """Look at several scans at the same time; those that can't be read have no files."""

    def look(source: Remote) -> RemoteScan:
        try:
            return scan_at(source)
        except (InputError, OSError, TotalfastError):  # its case tells why
            return RemoteScan(source=source, files=())

    unique = list(dict.fromkeys(sources))
    with ThreadPoolExecutor(AT_A_TIME, thread_name_prefix="totalfast-transfer") as pool:
        return dict(zip(unique, pool.map(look, unique), strict=True))


def _with_facts(scans: Sequence[RemoteScan]) -> list[RemoteScan]:
    """Look at files of which a list, such as a web page, tells nothing."""
    bare = [
        each.remote
        for scan in scans
        for each in scan.files
        if each.size is None and not each.version
    ]
    if not bare:
        return list(scans)
    with ThreadPoolExecutor(AT_A_TIME, thread_name_prefix="totalfast-transfer") as pool:
        facts = dict(zip(bare, pool.map(look_at, bare), strict=True))
    return [
        replace(scan, files=tuple(facts.get(each.remote, each) for each in scan.files))
        for scan in scans
    ]


def _scans_in(
    folder: Remote,
    kept: Mapping[str, RemoteFile],
    beside: Mapping[str, RemoteFile],
    left_out: Counted,
) -> list[RemoteScan]:
    """Sort the files of one folder into scans."""
    scans, dicom = [], []
    for name in sorted(kept):
        if is_image(name, beside):
            parts = [beside[part] for part in parts_of(name, beside)]
            scans.append(RemoteScan(source=kept[name].remote, files=(kept[name], *parts)))
        elif name.lower().endswith(".zip"):
            scans.append(RemoteScan(source=kept[name].remote, files=(kept[name],)))
        elif may_be_dicom(name, beside):
            dicom.append(name)
        elif not is_part(name, beside):
            left_out.add(NO_SCAN, kept[name].remote)
    if dicom and _are_dicom([kept[name].remote for name in dicom]):
        source = kept[dicom[0]].remote if len(dicom) == 1 else folder
        scans.append(RemoteScan(source=source, files=tuple(kept[name] for name in dicom)))
    else:
        for name in dicom:
            left_out.add(NOT_DICOM, kept[name].remote)
    return scans


def _are_dicom(files: Sequence[Remote]) -> bool:
    """Whether a folder's files are DICOM, by their endings or the signature in some of them."""
    if any(each.name.lower().endswith(DICOM_ENDINGS) for each in files):
        return True
    some = dict.fromkeys((files[0], files[len(files) // 2], files[-1]))
    return any(map(_has_signature, some))


def _has_signature(file: Remote) -> bool:
    try:
        return read(file, PREAMBLE + len(SIGNATURE))[PREAMBLE:] == SIGNATURE
    except InputError:  # it is gone, or access is refused
        return False
