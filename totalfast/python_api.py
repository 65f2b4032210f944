"""Upstream's module name, so that an import of its Python call changes by one word."""

from __future__ import annotations

from totalfast.api import segment as totalsegmentator

__all__ = ["totalsegmentator"]
