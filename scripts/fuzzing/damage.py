"""Damage of bytes and of JSON values, which all kinds share."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import random

VALUES: list[Any] = [
    *(None, True, False, 0, 1, 2, 3, 5, -1, 10**9, 10**30, 0.0, 0.5, 1e300, -1.5),
    *(float("nan"), float("inf"), "", "abc", "0", "os.system", "torch.nn.ReLU", "nnUNetTrainerBN"),
    *("no_resampling_hack", "ZScoreNormalization", "torch.nn.GELU", "NibabelIO", "\x00é𝔬𝔰"),
    *("fuzz_sentinel.run", "fuzz_sentinel", "antigravity", "../../etc", "a\nb"),
    *([], {}, [0], [1, 2, 3], [[1, 1, 1]], {"0": 0}, [2, 0, 1], [8, 8], ["abc"], {"a": {"b": [1]}}),
]
"""Values that JSON files are damaged with."""

KEYS = ("more", "modality", "inherits_from", "previous_stage")
"""Keys that are added to objects in JSON files, beside their own."""


def damage_bytes(content: bytes, chance: random.Random, *, start: int = 0) -> bytes:
    """Change, remove, repeat or cut bytes behind ``start``."""
    damaged = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 8))):
        if len(damaged) <= start:
            break
        at = chance.randrange(start, len(damaged))
        action = chance.random()
        if action < 0.6:
            damaged[at] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))
        elif action < 0.75:
            damaged[at] ^= 1 << chance.randrange(8)
        elif action < 0.85:
            del damaged[at : at + chance.choice((1, 2, 4, 64))]
        elif action < 0.95:
            piece = damaged[chance.randrange(start, len(damaged)) :][: chance.choice((1, 4, 64))]
            damaged[at:at] = piece
        else:
            del damaged[at:]
    return bytes(damaged)


def damage_json(content: Any, chance: random.Random) -> None:
    """Change, remove, add or exchange values at random places, in place."""
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        places = _containers(content)
        if not places:
            return
        place = chance.choice(places)
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key, other = chance.choice(keys), chance.choice(keys)
        action = chance.random()
        if action < 0.6:
            place[key] = copy.deepcopy(chance.choice(VALUES))
        elif action < 0.75:
            del place[key]
        elif action < 0.85:
            place[key], place[other] = place[other], place[key]
        elif isinstance(place, dict):
            added = chance.choice((*keys, *KEYS))
            place[added] = copy.deepcopy(chance.choice((*VALUES, place[key])))
        else:
            place.insert(key, copy.deepcopy(place[other]))


def _containers(content: Any) -> list[Any]:
    """All lists and dictionaries in a JSON value that are not empty."""
    found, waiting = [], [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict | list) and value:
            found.append(value)
            waiting.extend(value.values() if isinstance(value, dict) else value)
    return found
