"""The DICOMweb servers that requests may name: their addresses, and how to log in to them."""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from totalfast.errors import OptionError
from totalfast.serve.conditions import CREDENTIALS_PREFIX

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, MutableMapping

FILE_ENDING = "_FILE"
"""Ending of the environment variable with the path of a file that holds the credentials."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DicomWebServer:
    """A DICOMweb server.

    Parameters
    ----------
    name
        What requests call it.
    url
        Its root, without a slash at the end.
    authorization
        Value of the header "Authorization"; empty for none.
    """

    name: str
    url: str
    authorization: str = field(default="", repr=False)

    @property
    def is_encrypted(self) -> bool:
        """Whether its address is that of HTTPS."""
        return urlsplit(self.url).scheme == "https"

    @property
    def host(self) -> str:
        """Host of its address."""
        return urlsplit(self.url).hostname or ""


def variable_of(name: str) -> str:
    """Environment variable with the credentials of a server."""
    return CREDENTIALS_PREFIX + name.upper().replace("-", "_")


def take_servers(
    texts: Iterable[str], environment: MutableMapping[str, str]
) -> dict[str, DicomWebServer]:
    """Return the servers of a command line, by name; take their credentials from the environment.

    Parameters
    ----------
    texts
        NAME=URL.
    environment
        Variables; those with credentials are removed, so that programs which this process starts do
        not inherit them.

    Raises
    ------
    OptionError
        If a text or credentials are not valid.
    """
    servers: dict[str, DicomWebServer] = {}
    for text in texts:
        name, _, url = text.partition("=")
        if re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name) is None:
            raise OptionError(
                "--dicomweb must be NAME=URL; a name has letters, digits, - and _ only."
            )
        variable = variable_of(name)
        if variable in map(variable_of, servers) or name.upper().endswith(FILE_ENDING):
            raise OptionError(f"--dicomweb: choose another name than {name}; {variable} is used.")
        servers[name] = DicomWebServer(
            name=name,
            url=_checked(url, variable),
            authorization=_authorization(variable, environment),
        )
    for name in servers:
        for ending in ("", FILE_ENDING):
            environment.pop(variable_of(name) + ending, None)
    return servers


def _checked(url: str, variable: str) -> str:
    """The address without a slash at the end. Messages do not quote it: it may hold a password."""
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid or parts.query or parts.fragment or re.search(r"[\s\\]", url):
        raise OptionError(
            "--dicomweb needs an address such as https://pacs.example.org/dicom-web, without a "
            "query."
        )
    if parts.username is not None or parts.password is not None:
        raise OptionError(
            "--dicomweb: other users of this machine can see passwords in a command line; put "
            f"user:password into the environment variable {variable}."
        )
    return url.rstrip("/")


def _authorization(variable: str, environment: Mapping[str, str]) -> str:
    """Value of the header "Authorization" for the credentials of an environment variable."""
    credentials = environment.get(variable, "").strip()
    file = environment.get(variable + FILE_ENDING)
    if file and credentials:
        raise OptionError(f"set {variable} or {variable}{FILE_ENDING}, not both.")
    if file:
        try:
            credentials = Path(file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise OptionError(
                f"the file of {variable}{FILE_ENDING} can't be read ({type(error).__name__})."
            ) from None
    if not credentials:
        return ""
    if not credentials.isprintable():
        raise OptionError(f"the credentials in {variable} must be one line.")
    if credentials.startswith("Bearer "):
        if not credentials.isascii():
            raise OptionError(f"the token in {variable} has letters other than ASCII.")
        return credentials
    if ":" not in credentials:
        raise OptionError(f"{variable} must be 'user:password' or 'Bearer TOKEN'.")
    return "Basic " + base64.b64encode(credentials.encode()).decode()
