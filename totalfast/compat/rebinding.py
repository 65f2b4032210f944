"""Replace a function in every imported module, and act when a module is imported later."""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec


def rebind(old: object, new: object, *, skip: tuple[str, ...] = ()) -> None:
    """In every imported module, bind each name that refers to ``old`` to ``new``.

    The modules ``skip`` and those below them are left alone.
    """
    for module_name, module in list(sys.modules.items()):
        inside = (module_name == room or module_name.startswith(f"{room}.") for room in skip)
        if not isinstance(module, ModuleType) or any(inside):
            continue
        # Plain attribute access would import modules that are loaded lazily.
        names = object.__getattribute__(module, "__dict__")
        for name, value in list(names.items()):
            if value is old:
                names[name] = new


def when_imported(name: str, action: Callable[[], object]) -> None:
    """Call a function after a module was imported: now if it is already, else once it is."""
    if name in sys.modules:
        action()
        return
    if _watcher not in sys.meta_path:
        sys.meta_path.insert(0, _watcher)
    _watcher.actions.setdefault(name, []).append(action)


def forget(action: Callable[[], object]) -> None:
    """Undo ``when_imported`` for modules that were not imported yet."""
    for actions in _watcher.actions.values():
        while action in actions:
            actions.remove(action)


class _Watcher(importlib.abc.MetaPathFinder):
    """Finds the watched modules like Python's other finders, with a loader that tells."""

    def __init__(self) -> None:
        self.actions: dict[str, list[Callable[[], object]]] = {}
        self._looked_for: set[str] = set()

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,  # noqa: ARG002 - Python's signature
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> ModuleSpec | None:
        if not self.actions.get(fullname) or fullname in self._looked_for:
            return None
        self._looked_for.add(fullname)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._looked_for.discard(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _TellingLoader(spec.loader, self.actions[fullname])
        return spec


class _TellingLoader(importlib.abc.Loader):
    """A module's own loader; calls the actions after the module has run."""

    def __init__(self, own: Any, actions: list[Callable[[], object]]) -> None:  # noqa: ANN401
        self._own = own
        self._actions = actions

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._own, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._own.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._own
        if module.__spec__ is not None:
            module.__spec__.loader = self._own
        self._own.exec_module(module)
        actions = list(self._actions)
        self._actions.clear()
        for action in actions:
            action()


_watcher = _Watcher()
