"""Zip files of DICOM series and of models: damaged bytes, names that lead elsewhere, and bombs."""

from __future__ import annotations

import os
import shutil
import stat
import zipfile
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any

from fuzzing.case import Case, Place, WrongResultError
from fuzzing.damage import damage_bytes
from fuzzing.dicom import read_series
from fuzzing.dicom_bases import undamaged_series
from fuzzing.scans import Scan, same_scan
from totalfast.errors import TotalfastError
from totalfast.weights.install import WORKSHOP_NAME, import_zip
from totalfast.weights.manifest import MANIFEST_NAME
from totalfast.weights.official_model import OfficialModel

if TYPE_CHECKING:
    import random
    from pathlib import Path

NAMES = (
    *("../evil", "/evil", "..\\evil", "C:\\evil", "C:/evil", "a/../../evil", "//host/evil", "."),
    *("..", "a" * 300, "é\u202e.dcm", "con", "a\nb", "a/" * 200 + "b", "~/evil", "x\x1by", " "),
)
"""Names of entries that are added."""

BOMB = bytes(20_000_000)


@dataclass(kw_only=True)
class _Entry:
    name: str
    content: bytes
    method: int = zipfile.ZIP_DEFLATED
    mode: int = stat.S_IFREG | 0o644
    date: tuple[int, ...] = (2020, 1, 1, 0, 0, 0)
    extra: bytes = b""


@dataclass(frozen=True, kw_only=True)
class _AtMost:
    """A scan of which slices may be missing; those with a wrong checksum are left out."""

    scan: Scan


@dataclass(frozen=True, kw_only=True)
class _Base:
    """Undamaged content of a zip file, and what must be read from it."""

    entries: dict[str, bytes]
    expected: Any
    is_model: bool


class Zip:
    """Zip files of DICOM series, and of models that are imported."""

    slack_mb = 96

    def __init__(self, place: Place) -> None:
        self._place = place
        self._models = place.work / "models"
        os.environ["TOTALSEG_WEIGHTS_PATH"] = str(self._models)
        self._model = OfficialModel(
            model_id=297,
            trainer="nnUNetTrainer",
            plans="nnUNetPlans",
            configuration="3d_fullres",
            folds=(0,),
        )
        self._bases = [
            self._base({f"ct/{name}": content for name, content in base.files.items()})
            for base in undamaged_series(place.work)[:4]
        ]
        for size in (100, 20_000):
            self._bases.append(self._base(self._model_files(size), is_model=True))

    def _model_files(self, size: int) -> dict[str, bytes]:
        """The files of a model that is not loaded; its checkpoint is a zip file, as torch's."""
        checkpoint = BytesIO()
        with zipfile.ZipFile(checkpoint, "w") as archive:
            archive.writestr("archive/data.pkl", os.urandom(size))
        folder = f"{self._model.dataset.name}/{self._model.folder_name}"
        return {
            f"{folder}/plans.json": b"{}",
            f"{folder}/dataset.json": b"{}",
            f"{folder}/fold_0/checkpoint_final.pth": checkpoint.getvalue(),
        }

    def _base(self, entries: dict[str, bytes], *, is_model: bool = False) -> _Base:
        path = self._place.work / "undamaged.zip"
        path.write_bytes(_packed([_Entry(name=n, content=c) for n, c in entries.items()]))
        self._clear()
        expected = self._import(path) if is_model else read_series(path)
        return _Base(entries=entries, expected=expected, is_model=is_model)

    def _clear(self) -> None:
        shutil.rmtree(self._models, ignore_errors=True)
        self._models.mkdir()

    def damage(self, chance: random.Random) -> Case:
        """Change the entries, or bytes of the zip file."""
        self._clear()
        base = chance.choice(self._bases)
        entries = [_Entry(name=n, content=c) for n, c in base.entries.items()]
        path = self._place.work / ("model.zip" if base.is_model else "series.zip")
        action, note = chance.random(), ""
        expected, must_read = base.expected, False
        if action < 0.2:
            content, must_read = _unusual(entries, chance), True
        elif action < 0.45:
            note, expected = _damage_entries(entries, chance), None
            content = _packed(entries)
        else:
            content, note = _damage_bytes(_packed(entries), chance), "bytes"
            expected = expected if base.is_model else _AtMost(scan=expected)
        path.write_bytes(content)
        kind = "model" if base.is_model else "series"
        return Case(source=path, note=f"{kind}: {note}", expected=expected, must_read=must_read)

    def read(self, case: Case) -> Any:
        """Read a series, or import a model and read its files."""
        if case.source.name == "series.zip":
            return read_series(case.source)
        try:
            return self._import(case.source)
        except TotalfastError:
            if self._model.dataset.exists():
                raise WrongResultError("a model was refused, and is there") from None
            raise
        finally:
            left = {path.suffix for path in (self._models / WORKSHOP_NAME).glob("*")}
            if left - {".lock"} or len(list(self._models.iterdir())) > 2:
                raise WrongResultError("files are left beside the model")

    def _import(self, path: Path) -> dict[str, bytes]:
        import_zip(self._model, path)
        dataset = self._model.dataset
        return {
            file.relative_to(dataset).as_posix(): file.read_bytes()
            for file in dataset.rglob("*")
            if file.is_file() and file.name != MANIFEST_NAME
        }

    def equal(self, result: Any, expected: Any) -> bool:
        """Compare scans, or files."""
        if isinstance(expected, _AtMost):
            if result.intensities.shape != expected.scan.intensities.shape:
                return True
            expected = expected.scan
        return same_scan(result, expected) if isinstance(expected, Scan) else result == expected


def _packed(entries: list[_Entry], *, comment: bytes = b"") -> bytes:
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for entry in entries:
            info = zipfile.ZipInfo("name", entry.date)  # type: ignore[arg-type]
            info.filename = entry.name
            info.external_attr, info.compress_type = entry.mode << 16, entry.method
            info.extra = entry.extra
            archive.writestr(info, entry.content)
        archive.comment = comment
    return buffer.getvalue()


def _unusual(entries: list[_Entry], chance: random.Random) -> bytes:
    """A zip file as some programs write it; what is in it is the same."""
    for entry in entries:
        entry.method = chance.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
        entry.date = chance.choice(((1980, 1, 1, 0, 0, 0), (2107, 12, 31, 23, 59, 58)))
        entry.extra = chance.choice((b"", b"\xfe\xca\x04\x00abcd"))
        entry.mode = chance.choice((0, entry.mode))
    if chance.random() < 0.5:
        entries.append(_Entry(name="__MACOSX/._a", content=b"\0\x05\x16\x07", mode=0))
    chance.shuffle(entries)
    content = _packed(entries, comment=chance.choice((b"", b"a comment", b"x" * 60000)))
    return chance.choice((b"", b"#!/bin/sh\n")) + content


def _damage_entries(entries: list[_Entry], chance: random.Random) -> str:
    """Change names, kinds and methods of entries, remove or add some; a few are bombs."""
    entry = chance.choice(entries)
    action = chance.choice(
        ("name", "name", "add", "add", "remove", "twice", "link", "method", "cut")
    )
    if chance.random() < 0.02:
        entry.content, action = BOMB, "bomb"
    elif action == "name":
        folder = entry.name.rpartition("/")[0] if chance.random() < 0.5 else ""
        entry.name = f"{folder}/{chance.choice(NAMES)}" if folder else chance.choice(NAMES)
    elif action == "add":
        top = entry.name.partition("/")[0]
        name = chance.choice((chance.choice(NAMES), f"{top}/{chance.choice(NAMES)}"))
        entries.append(_Entry(name=name, content=chance.choice((b"", b"more", entry.content))))
    elif action == "remove":
        entries.remove(entry)
    elif action == "twice":
        entries.append(entry)
    elif action == "link":
        entry.mode = chance.choice((stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR)) | 0o777
        entry.content = chance.choice((b"/etc/passwd", b"..", entry.content))
    elif action == "method":
        entry.method = chance.choice((zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
    else:
        entry.content = entry.content[: chance.randrange(len(entry.content) + 1)]
    return action


def _damage_bytes(content: bytes, chance: random.Random) -> bytes:
    """Damage bytes anywhere, or in the headers of entries and in the table of contents."""
    if chance.random() < 0.4:
        return damage_bytes(content, chance)
    damaged = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 4))):
        magic = chance.choice((b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"))
        places = [at for at in range(len(content)) if content.startswith(magic, at)]
        at = chance.choice(places) + chance.randrange(4, 46)
        if at < len(damaged):
            damaged[at] = chance.choice((0, 1, 8, 9, 12, 14, 99, 0x7F, 0x80, 0xFF))
    return bytes(damaged)
