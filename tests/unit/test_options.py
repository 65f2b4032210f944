from __future__ import annotations

import inspect
import logging
import typing

import pytest

from totalfast import OptionError, UnsupportedError, upstream
from totalfast.api import segment
from totalfast.options import Options, SegmentKeywords


def test_session_and_segment_have_the_same_keywords_of_the_same_types():
    parameters = list(inspect.signature(segment).parameters.values())[2:]
    ours = {parameter.name: parameter.annotation for parameter in parameters}
    shared = {name: kind.__forward_arg__ for name, kind in SegmentKeywords.__annotations__.items()}
    assert shared == ours


def test_segment_hands_on_every_keyword(monkeypatch):
    received = {}

    class Recorder:
        def segment(self, scan, output, **keywords):
            received.update(keywords, scan=scan, output=output)

    monkeypatch.setattr("totalfast.api.default_session", Recorder)
    names = list(inspect.signature(segment).parameters)
    segment(**{name: object() if name in ("input", "output") else name for name in names})
    for name in names[2:]:
        assert received[name] == name


def test_every_keyword_is_an_option():
    Options.from_keywords({})
    assert set(typing.get_type_hints(Options)) == set(SegmentKeywords.__annotations__)


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"save_lowres": True}, OptionError, "only works together with fast"),
        ({"save_lowres": True, "fast": True, "output_type": "dicom_seg"}, OptionError, "nifti"),
        ({"resampling_order": 6}, OptionError, "between 0 and 5, not 6"),
        ({"export": "cubic"}, OptionError, "one of auto, nearest, linear, not 'cubic'"),
        ({"tile_step_size": 0.0}, OptionError, "at most 1, not 0.0"),
        ({"max_memory_gb": 0}, OptionError, "above 0, not 0"),
        ({"export": "linear", "force_split": True}, OptionError, "does not work with save_lowres"),
        ({"export": "linear", "save_probabilities": "a.npz"}, OptionError, "in their own way"),
        ({"save_probabilities": "a.pkl"}, OptionError, "an .npz file to write"),
        ({"statistics": "/"}, OptionError, "statistics needs the name of a file to write; / is"),
        ({"report": "/"}, OptionError, "report needs the name of a file to write; / is a folder"),
        ({"test": 3}, UnsupportedError, "test=3"),
        ({"stats_aggregation": "max"}, OptionError, "one of mean, median, not 'max'"),
        ({"model_size": "huge"}, OptionError, "one of big, small, not 'huge'"),
        ({"remove_small_blobs": -1.0}, OptionError, "in mm3, not -1.0"),
        ({"nr_thr_resamp": 0}, OptionError, "nr_thr_resamp must be at least 1, not 0"),
        ({"nr_thr_saving": 0}, OptionError, "nr_thr_saving must be at least 1, not 0"),
    ],
)
def test_options_that_do_not_go_together_are_refused(keywords, error, message):
    with pytest.raises(error, match=message):
        Options.from_keywords(keywords)


def test_a_newer_minor_version_of_totalsegmentator_is_warned_of_once(monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("totalfast"), "propagate", True)
    upstream.warn_of_untested_version.cache_clear()
    monkeypatch.setattr(upstream, "version", lambda: "2.19.1")
    for _ in range(2):
        upstream.warn_of_untested_version()
    assert caplog.text.count("2.19.1 is newer than the version that totalfast was tested") == 1
    upstream.warn_of_untested_version.cache_clear()
    monkeypatch.setattr(upstream, "version", lambda: "2.18.9")
    caplog.clear()
    upstream.warn_of_untested_version()
    assert caplog.text == ""
    upstream.warn_of_untested_version.cache_clear()
