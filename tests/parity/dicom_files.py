"""Comparison of two DICOM files: all elements except times and generated identifiers."""

from __future__ import annotations

from pathlib import Path

import pydicom
from pydicom.multival import MultiValue

GENERATED_UIDS = "1.2.826.0.1.3680043."
"""Root of the identifiers that pydicom and highdicom generate; the input has other roots."""

TIMES = ("DA", "DT", "TM")


def dicom_problems(name: str, expected: Path, actual: Path, *, most: int = 5) -> list[str]:
    """Return the elements that differ, including pixels."""
    problems: list[str] = []
    _compare(pydicom.dcmread(expected), pydicom.dcmread(actual), name, problems)
    return problems[:most]


def structures(path: Path) -> int:
    """Return the number of structures in a DICOM SEG or RT structure set."""
    header = pydicom.dcmread(path, stop_before_pixels=True)
    return len(header.get("SegmentSequence") or header.get("StructureSetROISequence") or ())


def _compare(one: pydicom.Dataset, two: pydicom.Dataset, where: str, problems: list[str]) -> None:
    problems.extend(f"{where}: only one file has {tag}" for tag in sorted(one.keys() ^ two.keys()))
    for tag in one.keys() & two.keys():
        # Comparing raw bytes is fast because nothing is parsed.
        if getattr(one.get_item(tag), "value", 0) == getattr(two.get_item(tag), "value", 1):
            continue
        element, other = one[tag], two[tag]
        place = f"{where} {element.keyword or tag}"
        if element.VR == "SQ":
            if len(element.value) != len(other.value):
                problems.append(f"{place}: {len(element.value)} items and {len(other.value)}")
            for number, (a, b) in enumerate(zip(element.value, other.value, strict=False)):
                _compare(a, b, f"{place}[{number}]", problems)
        elif element.VR not in TIMES and not _same(element.VR, element.value, other.value):
            problems.append(f"{place}: {str(element.value)[:60]} and {str(other.value)[:60]}")


def _same(kind: str, one: object, two: object) -> bool:
    if kind == "UI" and not isinstance(one, MultiValue):
        generated = [str(uid).startswith(GENERATED_UIDS) for uid in (one, two)]
        return all(generated) or one == two
    return one == two
