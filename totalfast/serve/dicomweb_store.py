"""Store DICOM files at a server (STOW-RS), and check its answer instance by instance."""

from __future__ import annotations

import json
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import aiohttp

from totalfast.serve.dicomweb import DicomWebError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from totalfast.files.dicom.instances import Instance
    from totalfast.serve.dicomweb import DicomWeb

STORED, FAILED = "00081199", "00081198"
REFERENCED_UID, REASON = "00081155", "00081197"
"""Tags of DICOM's JSON: ReferencedSOPSequence, FailedSOPSequence; of their items
ReferencedSOPInstanceUID and FailureReason."""

DUPLICATE = 0x0111
"""Reason: the server has the instance already."""

ANSWERED = (200, 202, 409)
"""All are stored, some are, none is; other statuses come without a list."""


class Store:
    """Stores files.

    Parameters
    ----------
    web
        The server.
    instances
        The files.
    """

    def __init__(self, web: DicomWeb, instances: Sequence[Instance]) -> None:
        self._web, self._instances = web, instances
        self._tries = 0

    async def store(self) -> None:
        """Store the files, several times if need be.

        Raises
        ------
        DicomWebError
            If the server does not confirm that it has stored all of them.
        """
        await self._web.retrying(self._store_once)

    async def _store_once(self) -> None:
        self._tries += 1
        with ExitStack() as opened:
            body = aiohttp.MultipartWriter("related")
            for instance in self._instances:
                file = opened.enter_context(instance.path.open("rb"))
                body.append(file, {"Content-Type": "application/dicom"})
            kind = f'multipart/related; type="application/dicom"; boundary={body.boundary}'
            headers = {"Accept": "application/dicom+json", "Content-Type": kind}
            async with self._web.ask("POST", "/studies", headers=headers, data=body) as response:
                if response.status not in ANSWERED:
                    raise DicomWebError(
                        f"{self._web.name} does not store the result (HTTP status "
                        f"{response.status})."
                    )
                answer = await self._web.body(response)
        self._check(answer)

    def _check(self, answer: bytes) -> None:
        try:
            parsed = json.loads(answer)
        except (ValueError, RecursionError):
            parsed = None
        found = parsed[0] if isinstance(parsed, list) and parsed else parsed
        if not isinstance(found, dict):
            raise DicomWebError(
                f"{self._web.name} does not tell what it has stored (no JSON came)."
            )
        failed, done = _items(found, FAILED), set(_items(found, STORED))
        if self._tries > 1:  # an earlier try, whose answer was lost, may have stored it
            done |= {uid for uid, reason in failed.items() if reason == DUPLICATE}
            failed = {uid: reason for uid, reason in failed.items() if reason != DUPLICATE}
        wrong = [
            f"{each.uid} ({_reason(failed.get(each.uid))})"
            for each in self._instances
            if each.uid in failed or each.uid not in done
        ]
        if wrong:
            raise DicomWebError(
                f"{self._web.name} has not stored {len(wrong)} of {len(self._instances)} "
                f"instances: {', '.join(wrong)}."
            )


def _items(found: dict[str, Any], tag: str) -> dict[str, int | None]:
    """SOPInstanceUID to reason of the items of a sequence."""
    items: dict[str, int | None] = {}
    for item in _values(found, tag):
        if isinstance(item, dict):
            uids, reasons = _values(item, REFERENCED_UID), _values(item, REASON)
            reason = reasons[0] if reasons and isinstance(reasons[0], int) else None
            items |= {uid: reason for uid in uids if isinstance(uid, str)}
    return items


def _values(found: dict[str, Any], tag: str) -> list[Any]:
    attribute = found.get(tag)
    values = attribute.get("Value") if isinstance(attribute, dict) else None
    return values if isinstance(values, list) else []


def _reason(number: int | None) -> str:
    return "no reason given" if number is None else f"reason 0x{number:04X}"
