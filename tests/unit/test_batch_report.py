"""The report is one file that loads nothing, shows what matters, and runs no text of a name."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from totalfast.batch.results.entries import DONE, FAILED, Entry
from totalfast.batch.results.page import table
from totalfast.batch.results.report import busy_time_s, write_report
from totalfast.errors import OutputError
from totalfast.files.targets import FOLDER_MARKER

EVIL = "<script>alert('x')</script>\"&\udcff"


class Page(HTMLParser):
    """What a browser finds in a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.texts, self.open = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attributes]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style" and data.strip():
            self.texts.append(data.strip())

    @property
    def pictures(self):
        """Caption and picture of each figure."""
        sources = [value for tag, name, value in self.attributes if (tag, name) == ("img", "src")]
        captions = [value for tag, name, value in self.attributes if (tag, name) == ("img", "alt")]
        pictures = []
        for source in sources:
            kind, _, data = source.partition(",")
            assert kind == "data:image/jpeg;base64"
            pictures.append(Image.open(io.BytesIO(base64.b64decode(data))))
        return dict(zip(captions, pictures, strict=True))


def entry(name, *, state=DONE, finished_s=0, **fields):
    return Entry(name=name, state=state, finished=f"2026-11-27T10:00:{finished_s:02}Z", **fields)


def with_preview(folder, name, *, structures=None, colour="red", **fields):
    """Write a preview, and statistics of a number of structures, and return the case's entry."""
    (folder / name).mkdir(parents=True)
    files = [f"{name}/preview_total.png"]
    Image.new("RGBA", (1800, 1200), colour).save(folder / files[0])
    if structures is not None:
        files.append(f"{name}/statistics.json")
        volumes = {f"s{k}": {"volume": float(k < structures)} for k in range(10)}
        (folder / files[1]).write_text(json.dumps(volumes))
    return entry(name, files=files, **fields)


def written(folder, entries, **keywords):
    path = folder / "report.html"
    write_report(path, {case.name: case for case in entries}, folder, **keywords)
    return Page(path.read_text(encoding="utf-8"))


def test_page_has_no_scripts_and_loads_nothing(tmp_path):
    page = written(tmp_path, [with_preview(tmp_path, "a"), entry("b", state=FAILED)])
    assert not {"script", "link", "iframe", "object", "a"} & set(page.tags)
    assert not page.open
    addresses = [v for _, name, v in page.attributes if name in ("src", "href", "srcset")]
    assert addresses
    assert all(value.startswith("data:") for value in addresses)
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|url\(|@import", text)
    assert "default-src 'none'" in text
    assert "prefers-color-scheme: dark" in text


def test_text_of_names_errors_and_warnings_is_escaped(tmp_path):
    folder = tmp_path / "<i>out"
    folder.mkdir()
    preview = with_preview(folder, "p")
    evil = [
        entry(EVIL, state=FAILED, error=EVIL, source=EVIL, warnings=[EVIL], host=EVIL),
        entry(f"{EVIL}2", seconds={EVIL: 1.0}, total_s=1.0, host=EVIL, files=preview.files),
    ]
    page = written(folder, evil)
    assert not {"script", "i"} & set(page.tags)
    shown = EVIL.replace("\udcff", "\\udcff")
    assert page.texts.count(shown) >= 5  # name, error, source, warning, stage
    assert list(page.pictures) == [f"{shown}2"]


def test_counts_and_times_are_shown(tmp_path):
    cases = [
        entry("a", total_s=10.0, finished_s=10, seconds={"Reading": 2.0, "Predicting": 8.0}),
        entry("b", total_s=20.0, finished_s=30, seconds={"Reading": 4.0, "Predicting": 16.0}),
        entry("c", total_s=30.0, finished_s=30, seconds={"Predicting": 30.0}),
        entry("d", state=FAILED, error="no scan", attempt=2, source="d.nii", total_s=1.0),
    ]
    texts = written(tmp_path, cases, skipped=7).texts
    facts = dict(zip(texts, texts[1:], strict=False))
    assert (facts["Done"], facts["Failed"], facts["Skipped, done before"]) == ("3", "1", "7")
    assert facts["Median time of a case"] == "20.0 s"
    assert facts["95 % take at most"] == "29.0 s"
    assert facts["Time with cases in work"] == "31.0 s"  # the failed one ends where c starts
    assert facts["Throughput"] == f"{3 / 31 * 3600:.1f} cases per hour"
    row = texts[texts.index("Reading") :]
    assert row[:4] == ["Reading", "3.0", "3.9", "10.0"]
    assert row[4:8] == ["Predicting", "16.0", "28.6", "90.0"]
    failure = texts[texts.index("no scan") - 1 :]
    assert failure[:4] == ["d", "no scan", "2", "d.nii"]


def test_ten_slowest_cases_are_listed_from_the_slowest(tmp_path):
    cases = [
        entry(f"case{k:02}", total_s=float(k), seconds={"S": k, "L": 0.5}) for k in range(1, 13)
    ]
    texts = written(tmp_path, cases).texts
    after = texts[texts.index("Slowest cases") :]
    assert [t for t in after if t.startswith("case")] == [f"case{k:02}" for k in range(12, 2, -1)]
    assert "S, 12.0 s" in after


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        ([(0, 10), (5, 15)], 15),
        ([(0, 10), (2, 5)], 10),
        ([(0, 10), (20, 30)], 20),
        ([(0, 10), (10, 20)], 20),
        ([], 0),
    ],
    ids=["overlap", "within", "pause", "touching", "none"],
)
def test_busy_time_is_that_of_at_least_one_case(spans, expected):
    cases = [entry("a", finished_s=end, total_s=float(end - start)) for start, end in spans]
    assert busy_time_s(cases) == pytest.approx(expected)


def test_warnings_are_counted_by_case_most_frequent_first(tmp_path):
    cases = [entry(str(k), warnings=["rare"] * 3 if k == 0 else ["often"]) for k in range(3)]
    cases += [entry(f"x{k}", warnings=[f"single {k}"]) for k in range(60)]
    texts = written(tmp_path, cases).texts
    start = texts.index("Warning")
    assert texts[start + 1 : start + 5] == ["2", "often", "1", "rare"]
    assert "12 other warnings are in the manifest." in texts


def test_first_and_worst_pictures_are_shown_small(tmp_path):
    cases = [with_preview(tmp_path, f"first{k}", structures=9) for k in range(3)]
    cases += [with_preview(tmp_path, f"good{k}", structures=9) for k in range(6)]
    cases += [with_preview(tmp_path, "empty", structures=0, colour="blue")]
    cases += [with_preview(tmp_path, "some", structures=1)]
    cases += [with_preview(tmp_path, "warned", structures=9, warnings=["a", "b"])]
    cases += [entry("failed", state=FAILED, files=cases[0].files, warnings=["c"] * 9)]
    pictures = written(tmp_path, cases).pictures
    assert list(pictures)[:6] == [
        "first0, 9 structures",
        "first1, 9 structures",
        "first2, 9 structures",
        "warned, 9 structures, 2 warnings",
        "empty, 0 structures",
        "some, 1 structure",
    ]
    assert len(pictures) == 9
    empty = pictures["empty, 0 structures"]
    assert empty.size == (900, 600)
    red, green, blue = empty.getpixel((0, 0))
    assert blue > 250
    assert red < 5
    assert green < 5


def test_pictures_are_found_through_the_completion_marker(tmp_path):
    case = with_preview(tmp_path, "a", structures=2)
    names = [name.partition("/")[2] for name in case.files]
    (tmp_path / "a" / FOLDER_MARKER).write_text(json.dumps({"files": names}))
    page = written(tmp_path, [entry("a", files=[f"a/{FOLDER_MARKER}"])])
    assert list(page.pictures) == ["a, 2 structures"]


def test_without_statistics_and_warnings_no_case_is_called_worst(tmp_path):
    page = written(tmp_path, [with_preview(tmp_path, str(k)) for k in range(5)])
    assert list(page.pictures) == ["0", "1", "2"]
    assert not [text for text in page.texts if "Worst" in text]


def test_without_previews_the_report_names_the_flag(tmp_path):
    assert any("--preview" in text for text in written(tmp_path, [entry("a")]).texts)
    assert not any(
        "--preview" in text for text in written(tmp_path, [with_preview(tmp_path, "b")]).texts
    )


@pytest.mark.parametrize("damage", ["missing", "cut", "no picture"])
def test_damaged_preview_is_left_out_with_a_warning(tmp_path, caplog, damage):
    cases = [with_preview(tmp_path, "a"), with_preview(tmp_path, "b")]
    file = tmp_path / "a" / "preview_total.png"
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:2000] if damage == "cut" else b"text")
    assert list(written(tmp_path, cases).pictures) == ["b"]
    assert "a/preview_total.png" in caplog.text.replace("\\", "/")


@pytest.mark.parametrize("cases", [[], [entry("a", state=FAILED)], [entry("a")]])
def test_batch_with_little_to_report_has_a_report(tmp_path, cases):
    page = written(tmp_path, cases)
    assert not page.open
    assert "Done" in page.texts


def test_numbers_are_aligned_to_the_right_and_names_are_not():
    page = Page(table(("Name", "Number"), [("a", 1.25), ("b", 2)]))
    classes = [(tag, value) for tag, _, value in page.attributes]
    assert classes == [("th", "text"), ("th", "number"), ("td", "number"), ("td", "number")]
    assert page.texts == ["Name", "Number", "a", "1.2", "b", "2"]


def test_report_replaces_an_older_one_or_leaves_it(tmp_path):
    (tmp_path / "report.html").write_text("old")
    written(tmp_path, [entry("a")])
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    with pytest.raises(OutputError, match="report"):
        write_report(tmp_path / "report.html" / "x.html", {}, tmp_path)
