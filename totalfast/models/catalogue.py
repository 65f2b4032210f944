"""All of TotalSegmentator's models, and the tasks that need them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from totalfast import upstream
from totalfast.errors import OptionError
from totalfast.models.weights import official_model, parts_of
from totalfast.tasks import BROKEN_TASKS, resolve_task

if TYPE_CHECKING:
    from collections.abc import Iterable

    from totalfast.tasks import Task
    from totalfast.weights.official_model import OfficialModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """A model and the task that it is for."""

    task: str
    flag: str
    """"", "--fast" or "--fastest"."""
    model: OfficialModel


@functools.cache
def all_uses() -> tuple[Use, ...]:
    """All models of all tasks, each task's rough and refining models included."""
    uses = []
    for name in upstream.TASKS:
        if name in BROKEN_TASKS or name not in upstream.TASK_CONFIGS:
            continue
        resolutions = upstream.TASK_CONFIGS[name].get("sub_modes", {"default": None})
        for resolution in ("default", "fast", "fastest"):
            if resolution in resolutions:
                task = resolve_task(
                    name, fast=resolution == "fast", fastest=resolution == "fastest"
                )
                flag = "" if resolution == "default" else f"--{resolution}"
                uses += [Use(task=name, flag=flag, model=model) for model in models_of(task)]
    return tuple(uses)


def models_of(task: Task) -> list[OfficialModel]:
    """All models of a task, in the order of use, without repetitions.

    Tasks that accept ``--roi_subset`` need a rough model for it.
    """
    models = [official_model(*part) for part in parts_of(task)]
    if task.name.startswith("total"):
        first = next(iter(task.classes.values()))
        selected = resolve_task(
            task.name,
            fast=task.resolution == "fast",
            fastest=task.resolution == "fastest",
            roi_subset=[first],
        )
        models += [official_model(*part) for part in parts_of(selected)]
    return list(dict.fromkeys(models))


def models_by_id() -> dict[int, OfficialModel]:
    """Model number to model, of all models that a task needs."""
    return {use.model.model_id: use.model for use in all_uses()}


def select(words: Iterable[str], *, fast: bool, fastest: bool) -> list[OfficialModel]:
    """Return the models that tasks need, or that have these numbers, without repetitions."""
    selected: list[OfficialModel] = []
    for word in words:
        if word.isdecimal():
            if int(word) not in models_by_id():
                raise OptionError(
                    f"no task needs a model {word}; 'totalfast weights list' shows all models."
                )
            selected.append(models_by_id()[int(word)])
        else:
            selected += models_of(resolve_task(word, fast=fast, fastest=fastest))
    return list(dict.fromkeys(selected))
