"""Addresses of files elsewhere, such as ``s3://bucket/scans/ct.nii.gz``, in the manner of paths.

Nothing is opened here. The text of an address, for messages and manifests, has no password and no
signature.
"""

from __future__ import annotations

import hashlib
import posixpath
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

from totalfast.errors import OptionError

SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
"""Start of an address. It has two letters or more, so ``C:`` is a Windows disk."""

WEB = ("http", "https")
"""Protocols whose addresses may have a query."""

SIGNATURES = re.compile(
    r"(x-amz-.*|x-goog-.*|awsaccesskeyid|googleaccessid|signature|expires|key-pair-id|policy"
    r"|sig|se|sp|sr|st|sv|spr|sip|ske|skoid|sks|skt|sktid|skv"
    r"|(.*[_-])?token|api[_-]?key|auth|authorization|password|secret)",
    re.IGNORECASE,
)
"""Parameters of a query that give access (of AWS, Google, Azure and others) but name no file."""

MAGIC = "*?["

HASH_DIGITS = 8


@dataclass(frozen=True, slots=True, repr=False)
class Remote:
    """A file, a folder (a prefix) or a pattern elsewhere.

    Parameters
    ----------
    url
        The whole address. It may hold a password or a signature, so it is for fsspec only; use
        ``str`` for everything that people or later runs read.
    """

    url: str

    def __str__(self) -> str:
        scheme, _, rest = self.url.partition("://")
        if scheme not in WEB:
            place, slash, path = rest.partition("/")
            user, at, host = place.rpartition("@")
            return f"{scheme}://{user.partition(':')[0]}{at}{host}{slash}{path}"
        parts = urlsplit(self.url)
        host = parts.netloc.rpartition("@")[2]
        return parts._replace(netloc=host, query=_query(parts.query), fragment="").geturl()

    def __repr__(self) -> str:
        return f"Remote({str(self)!r})"

    def __truediv__(self, name: str) -> Remote:
        """Return the address of a file or folder below this one."""
        return Remote(f"{self.url.rstrip('/')}/{name}")

    @property
    def scheme(self) -> str:
        """The protocol, for example "s3"."""
        return self.url.partition("://")[0]

    @property
    def has_secrets(self) -> bool:
        """Whether parts of the address are left out of its text."""
        return str(self) != self.url

    @property
    def path(self) -> str:
        """Host or bucket, and the path, without a slash at the end; of web addresses unquoted."""
        if self.scheme in WEB:
            parts = urlsplit(str(self))
            return unquote(parts.netloc + parts.path).rstrip("/")
        return str(self).partition("://")[2].rstrip("/")

    @property
    def name(self) -> str:
        """The last part of the path."""
        return posixpath.basename(self.path)

    @property
    def suffix(self) -> str:
        """Ending of the name."""
        return posixpath.splitext(self.name)[1]

    @property
    def parent(self) -> Remote:
        """The folder above; that of a web address has no query."""
        url = urlsplit(self.url)._replace(query="", fragment="").geturl()
        return Remote((url if self.scheme in WEB else self.url).rstrip("/").rpartition("/")[0])

    @property
    def has_magic(self) -> bool:
        """Whether it has the signs of a pattern; in a web address "?" is none."""
        magic = "*[" if self.scheme in WEB else MAGIC
        return any(letter in self.url for letter in magic)

    def is_in(self, folder: Place | None) -> bool:
        """Whether this is a folder, or below it."""
        return isinstance(folder, Remote) and f"{self.url.rstrip('/')}/".startswith(
            f"{folder.url.rstrip('/')}/"
        )


Place: TypeAlias = Path | Remote
"""Where a file or a folder is: on a disk of this machine, or elsewhere."""


def place_of(text: str | Path) -> Place:
    """Return a path, or the address that a text is.

    Raises
    ------
    OptionError
        If it is a chain of addresses.
    """
    text = str(text)
    if not SCHEME.match(text):
        return Path(text)
    if "::" in text.partition("?")[0]:
        raise OptionError(f"{Remote(text)} is a chain of addresses, which is not supported.")
    scheme, _, rest = text.partition("://")
    if scheme.lower() == "file":
        return Path(unquote(rest))
    return Remote(f"{scheme.lower()}://{rest}")


def address_of(place: Place) -> str:
    """Return the text that ``place_of`` turns into the same place; it may hold a password."""
    return place.url if isinstance(place, Remote) else str(place)


def _query(query: str) -> str:
    """Return a hash of the parameters that can tell one file from another."""
    parameters = parse_qsl(query, keep_blank_values=True)
    naming = sorted(each for each in parameters if not SIGNATURES.fullmatch(each[0]))
    if not naming:
        return ""
    return hashlib.sha256(urlencode(naming).encode()).hexdigest()[:HASH_DIGITS]
