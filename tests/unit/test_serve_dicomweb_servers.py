"""DICOMweb servers of a command line: addresses, and logins that stay secret."""

from __future__ import annotations

import pytest

from totalfast.errors import OptionError
from totalfast.serve.conditions import conditions
from totalfast.serve.dicomweb_servers import take_servers

VARIABLE = "TOTALFAST_DICOMWEB_PACS"


@pytest.mark.parametrize(
    ("credentials", "header"),
    [
        ("alice:secret", "Basic YWxpY2U6c2VjcmV0"),
        ("alice:a:b ü\n", "Basic YWxpY2U6YTpiIMO8"),
        ("Bearer abc.def", "Bearer abc.def"),
        ("", ""),
    ],
)
def test_logins_come_from_a_variable_or_a_file(tmp_path, credentials, header):
    environment = {VARIABLE: credentials, "OTHER": "x"}
    (server,) = take_servers(["pacs=https://example.org/dicom-web/"], environment).values()
    assert (server.name, server.url) == ("pacs", "https://example.org/dicom-web")
    assert server.authorization == header
    assert environment == {"OTHER": "x"}
    (tmp_path / "login").write_text(credentials, encoding="utf-8")
    environment = {f"{VARIABLE}_FILE": str(tmp_path / "login")}
    (server,) = take_servers(["pacs=http://example.org"], environment).values()
    assert server.authorization == header
    assert not environment
    assert header == "" or header not in repr(server)


@pytest.mark.parametrize(
    "text",
    [
        "http://example.org",
        "=http://example.org",
        "a b=http://example.org",
        "pacs=",
        "pacs=example.org",
        "pacs=ftp://example.org",
        "pacs=http://",
        "pacs=http://example.org/?key=topsecret",
        "pacs=http://example.org/#topsecret",
        "pacs=http://example.org:99999",
        "pacs=http://example.org/a b",
        "pacs=http://alice:topsecret@example.org",
        "pacs=http://[example.org",
        "pacs_file=http://example.org",
    ],
)
def test_addresses_that_are_not_valid_are_refused_and_not_quoted(text):
    with pytest.raises(OptionError) as error:
        take_servers([text], {})
    assert "topsecret" not in str(error.value)


@pytest.mark.parametrize(
    "environment",
    [
        {VARIABLE: "topsecret"},
        {VARIABLE: "alice:top\nsecret"},
        {VARIABLE: "Bearer topsecretü"},
        {VARIABLE: "alice:topsecret", f"{VARIABLE}_FILE": "/login"},
        {f"{VARIABLE}_FILE": "/does/not/exist"},
    ],
)
def test_logins_that_are_not_valid_are_refused_and_not_quoted(environment):
    with pytest.raises(OptionError, match=VARIABLE) as error:
        take_servers(["pacs=http://example.org"], dict(environment))
    assert "secret" not in str(error.value)


def test_names_that_share_a_variable_are_refused():
    with pytest.raises(OptionError, match=VARIABLE):
        take_servers(["pacs=http://a.org", "PACS=http://b.org"], {})


def test_logins_are_no_condition_of_a_run(monkeypatch):
    before = conditions()
    monkeypatch.setenv(VARIABLE, "alice:secret")
    assert conditions() == before
