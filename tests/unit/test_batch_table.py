"""The table has the numbers of all files of statistics, in one order, whole or not at all."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import threading
import tracemalloc
from pathlib import Path

import pytest

from totalfast.batch.results import table as module
from totalfast.batch.results.table import (
    COLUMNS,
    StatisticsRows,
    check_table,
    count_structures,
    write_table,
)
from totalfast.errors import OptionError, OutputError
from totalfast.labels.statistics import _zeros

PLAIN = {
    "spleen": {"volume": 3.3750000000000004, "intensity": -12.34567},
    "liver": _zeros(extra=False),
}
EXTRA = {
    "spleen": _zeros(extra=True),
    "liver": {
        "volume": 8.0,
        "intensity": 1.5,
        "n_voxels": 8,
        "intensity_std": 0.5,
        "intensity_min": 1.0,
        "intensity_max": 2.0,
        "centroid_vox": [1.5, 2.5, 3.5],
        "bbox_vox": [[1, 2], [3, 4], [5, 6]],
    },
}
needs_pyarrow = pytest.mark.skipif(
    importlib.util.find_spec("pyarrow") is None, reason="needs pyarrow"
)


def statistics(folder, **cases):
    """Write files of statistics as a run does, and return the rows of all."""
    files = {}
    for case, content in cases.items():
        files[case] = folder / f"{case}.json"
        files[case].write_text(json.dumps(content, indent=4))
    return StatisticsRows(files=files)


def read_csv(path):
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def read_parquet(path):
    import pyarrow.parquet

    return pyarrow.parquet.read_table(path, use_threads=False)


def test_csv_has_a_row_per_case_and_structure_with_all_digits(tmp_path):
    write_table(tmp_path / "t.csv", statistics(tmp_path, b=PLAIN, a=PLAIN))
    assert (tmp_path / "t.csv").read_bytes() == (
        b"case,structure,volume_mm3,intensity\n"
        b"a,spleen,3.3750000000000004,-12.34567\n"
        b"a,liver,0.0,0.0\n"
        b"b,spleen,3.3750000000000004,-12.34567\n"
        b"b,liver,0.0,0.0\n"
    )


def test_extra_statistics_are_flattened_and_none_is_empty(tmp_path):
    write_table(tmp_path / "t.csv", statistics(tmp_path, a=EXTRA))
    spleen, liver = read_csv(tmp_path / "t.csv")
    assert tuple(spleen) == COLUMNS
    assert " ".join(liver.values()) == "a liver 8.0 1.5 8 0.5 1.0 2.0 1.5 2.5 3.5 1 2 3 4 5 6"
    assert [name for name, value in spleen.items() if value == ""] == list(COLUMNS[8:])


def test_columns_are_the_same_if_every_structure_is_empty(tmp_path):
    write_table(tmp_path / "t.csv", statistics(tmp_path, a={"liver": _zeros(extra=True)}))
    (row,) = read_csv(tmp_path / "t.csv")
    assert tuple(row) == COLUMNS


@pytest.mark.parametrize("first", ["plain", "extra"])
def test_columns_that_a_later_case_adds_are_there_for_all(tmp_path, monkeypatch, first):
    monkeypatch.setattr(module, "ROWS_AT_A_TIME", 2)
    cases = [PLAIN, EXTRA] if first == "plain" else [EXTRA, PLAIN]
    rows = statistics(tmp_path, **dict(zip("ab", cases, strict=True)))
    write_table(tmp_path / "t.csv", rows)
    table = read_csv(tmp_path / "t.csv")
    assert [(row["case"], row["structure"]) for row in table] == [
        (case, structure) for case in "ab" for structure in ("spleen", "liver")
    ]
    assert all(tuple(row) == COLUMNS for row in table)
    plain = table[0 if first == "plain" else 2]
    assert (plain["volume_mm3"], plain["n_voxels"]) == ("3.3750000000000004", "")


def test_statistics_of_newer_versions_follow_by_name(tmp_path):
    new = {"liver": {"zeta": 1, "volume": 2.0, "shape": {"b": 1, "a": [5, 6]}, "intensity": 3.0}}
    write_table(tmp_path / "t.csv", statistics(tmp_path, a=new))
    assert read_csv(tmp_path / "t.csv") == [
        {
            "case": "a",
            "structure": "liver",
            "volume_mm3": "2.0",
            "intensity": "3.0",
            "shape_a_0": "5",
            "shape_a_1": "6",
            "shape_b": "1",
            "zeta": "1",
        }
    ]


def test_names_with_commas_quotes_and_other_alphabets_survive(tmp_path):
    names = ['a,"b"', "é 漢", "\udcff"]
    rows = [{"case": name, "structure": "liver", "volume_mm3": 1.0} for name in names]
    write_table(tmp_path / "t.csv", rows)
    assert [row["case"] for row in read_csv(tmp_path / "t.csv")] == [*names[:2], "\\udcff"]


def test_no_rows_are_a_header(tmp_path):
    write_table(tmp_path / "t.csv", [])
    assert (tmp_path / "t.csv").read_text() == "case,structure\n"


@pytest.mark.parametrize("text", [None, "", '{"liver": {"vol', "[]", '{"liver": 3}'])
def test_file_that_can_not_be_read_is_left_out_with_a_warning(tmp_path, caplog, text):
    rows = statistics(tmp_path, a=PLAIN, b=PLAIN)
    if text is None:
        rows.files["a"].unlink()
    else:
        rows.files["a"].write_text(text)
    write_table(tmp_path / "t.csv", rows)
    assert {row["case"] for row in read_csv(tmp_path / "t.csv")} == {"b"}
    assert "a.json" in caplog.text
    assert count_structures(rows.files["a"]) is None


def test_structures_with_a_volume_are_counted(tmp_path):
    rows = statistics(tmp_path, a=PLAIN, b=EXTRA, c={"liver": _zeros(extra=False)})
    assert [count_structures(file) for file in rows.files.values()] == [1, 1, 0]


def test_iterator_is_refused_because_a_second_pass_would_be_empty(tmp_path):
    with pytest.raises(TypeError, match="iterator"):
        write_table(tmp_path / "t.csv", iter([]))
    assert list(tmp_path.iterdir()) == []


@needs_pyarrow
def test_parquet_has_the_same_values_with_types(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ROWS_AT_A_TIME", 3)
    rows = statistics(tmp_path, a=PLAIN, b=EXTRA, c=EXTRA)
    write_table(tmp_path / "t.parquet", rows)
    table = read_parquet(tmp_path / "t.parquet")
    assert tuple(table.column_names) == COLUMNS
    types = dict(zip(table.column_names, map(str, table.schema.types), strict=True))
    assert types["case"] == types["structure"] == "string"
    assert types["n_voxels"] == types["bbox_vox_z_max"] == "int64"
    assert types["volume_mm3"] == types["centroid_vox_x"] == "double"
    expected = [{name: row.get(name) for name in COLUMNS} for row in rows]
    assert table.to_pylist() == expected


@needs_pyarrow
def test_parquet_column_that_is_whole_at_first_becomes_a_number_then_text(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ROWS_AT_A_TIME", 1)
    rows = [
        {"case": "a", "structure": "s", "x": x, "y": y} for x, y in [(1, None), (2.5, "é\udcff")]
    ]
    write_table(tmp_path / "t.parquet", rows)
    assert read_parquet(tmp_path / "t.parquet").to_pydict() == {
        "case": ["a", "a"],
        "structure": ["s", "s"],
        "x": [1.0, 2.5],
        "y": [None, "é\\udcff"],
    }


def test_without_pyarrow_parquet_is_refused_at_the_start_and_csv_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OptionError, match="pip install pyarrow"):
        check_table(tmp_path / "t.parquet")
    check_table(tmp_path / "t.csv")


def test_old_table_stays_if_the_new_one_fails(tmp_path):
    class Failing:
        def __iter__(self):
            yield {"case": "a", "structure": "b"}
            raise OSError(28, "No space left on device")

    (tmp_path / "t.csv").write_text("old")
    with pytest.raises(OutputError, match=r"t\.csv: No space left"):
        write_table(tmp_path / "t.csv", Failing())
    assert [path.name for path in tmp_path.iterdir()] == ["t.csv"]
    assert (tmp_path / "t.csv").read_text() == "old"


def test_what_a_killed_process_left_is_deleted_when_it_is_old(tmp_path):
    old, young, other = (tmp_path / f".{name}.part" for name in ("t.csv-1", "t.csv-2", "u.csv-3"))
    for path in (old, young, other):
        path.write_text("half")
    for path in (old, other):
        os.utime(path, (0, 0))
    write_table(tmp_path / "t.csv", [])
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"t.csv", young.name, other.name}


def test_folder_in_place_of_the_table_is_an_output_error(tmp_path):
    (tmp_path / "t.csv").mkdir()
    with pytest.raises(OutputError, match=r"t\.csv"):
        write_table(tmp_path / "t.csv", [])
    assert [path.name for path in tmp_path.iterdir()] == ["t.csv"]


def test_missing_folder_is_created_and_a_link_is_followed(tmp_path):
    write_table(tmp_path / "new" / "t.csv", [])
    if os.name == "posix":
        (tmp_path / "link.csv").symlink_to(Path("new", "t.csv"))
        write_table(tmp_path / "link.csv", [{"case": "a", "structure": "b"}])
        assert (tmp_path / "link.csv").is_symlink()
        assert (tmp_path / "new" / "t.csv").read_text() == "case,structure\na,b\n"


def test_writers_at_the_same_time_leave_one_whole_table_and_readers_always_find_one(tmp_path):
    path = tmp_path / "t.csv"
    tables = [[{"case": str(k), "structure": "s"}] * 500 for k in range(3)]
    write_table(path, tables[0])
    finished = []

    def write_often(rows):
        for _ in range(20):
            write_table(path, rows)
        finished.append(rows)

    threads = [threading.Thread(target=write_often, args=(rows,)) for rows in tables]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        rows = read_csv(path)
        assert len(rows) == 500
        assert len({row["case"] for row in rows}) == 1
    assert len(finished) == len(tables)
    assert [path.name for path in tmp_path.iterdir()] == ["t.csv"]


def test_memory_does_not_grow_with_the_number_of_cases(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ROWS_AT_A_TIME", 100)
    (tmp_path / "s.json").write_text(
        json.dumps({f"structure_{k}": EXTRA["liver"] for k in range(50)})
    )
    peaks = []
    for cases in (20, 200):
        rows = StatisticsRows(files={str(k): tmp_path / "s.json" for k in range(cases)})
        tracemalloc.start()
        write_table(tmp_path / "t.csv", rows)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (tmp_path / "t.csv").stat().st_size > 500_000
    assert peaks[1] < 1.3 * peaks[0]
