"""Model folders: damaged plans, data set files and checkpoints, and pickles that run code."""

from __future__ import annotations

import copy
import importlib
import io
import itertools
import json
import os
import pickle
import shutil
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fuzzing.case import Case, Place
from fuzzing.damage import VALUES, damage_bytes, damage_json
from tests.unit.model_folders import predict, undamaged_files

if TYPE_CHECKING:
    import random

FILES = {
    "plans": "plans.json",
    "dataset": "dataset.json",
    "checkpoint": "fold_0/checkpoint_final.pth",
}

SENTINEL = "fuzz_sentinel"
"""Name of a module that must not be imported; plans and pickles name it."""

WITHOUT_EFFECT = {
    "plans": ("plans_name", "dataset_name", "original_median_shape_after_transp", "more"),
    "dataset": ("numTraining", "description", "licence", "reference", "more"),
    "checkpoint": ("current_epoch", "logging", "optimizer_state", "grad_scaler_state", "more"),
}
"""Keys at the top of the files that labels do not depend on."""


class Model:
    """Very small models, of two architectures and both formats of plans, that segment an image."""

    slack_mb = 128

    def __init__(self, place: Place) -> None:
        (place.work / f"{SENTINEL}.py").write_text("def run(*_, **__): pass\n")
        sys.path.insert(0, str(place.work))
        self._place, self._folder = place, place.work / "model"
        self._bases = []
        for files in undamaged_files():
            packed = _saved(files["checkpoint"])
            for plans in ("plans", "old plans"):
                base = {"plans": files[plans], "dataset": files["dataset"]}
                self._write(base, packed)
                labels = predict(self._folder)
                self._bases.append((base, files["checkpoint"], packed, labels))
        first = self._bases[0]
        self._import_late_modules(first[0], first[2])

    def _import_late_modules(self, files: dict[str, Any], checkpoint: bytes) -> None:
        """Predict with all kinds of resampling, which are imported and compiled when needed."""
        for order, separate in itertools.product(range(6), (True, False)):
            changed = copy.deepcopy(files)
            base = changed["plans"]["configurations"]["base"]
            base["spacing"] = [2.5, 2.5, 2.0]
            for name in ("data", "probabilities"):
                keywords = base[f"resampling_fn_{name}_kwargs"]
                keywords.update(order=order, order_z=0, force_separate_z=separate)
            self._write(changed, checkpoint)
            predict(self._folder)

    def _write(self, files: dict[str, Any], checkpoint: bytes) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        (self._folder / "fold_0").mkdir(parents=True)
        for name in ("plans", "dataset"):
            (self._folder / FILES[name]).write_text(json.dumps(files[name]))
        (self._folder / FILES["checkpoint"]).write_bytes(checkpoint)

    def damage(self, chance: random.Random) -> Case:
        """Damage one of the files."""
        base, checkpoint, packed, labels = chance.choice(self._bases)
        base = copy.deepcopy(base)
        name = chance.choice(("plans", "plans", "plans", "dataset", "checkpoint"))
        action = chance.random()
        expected = None
        if action < 0.1:
            note, expected = "a value without effect", labels
            key, value = chance.choice(WITHOUT_EFFECT[name]), copy.deepcopy(chance.choice(VALUES))
            if name == "checkpoint":
                packed = _saved({**checkpoint, key: value})
            else:
                base[name][key] = value
            self._write(base, packed)
        elif action < 0.15:
            note = "a pickle that runs code"
            self._write(base, _evil(checkpoint, self._place, chance))
        elif action < 0.3:
            note = "bytes"
            self._write(base, packed)
            path = self._folder / FILES[name]
            path.write_bytes(damage_bytes(path.read_bytes(), chance))
        else:
            note = "values"
            if name == "checkpoint":
                packed = _saved(_damaged_checkpoint(checkpoint, chance))
            else:
                damage_json(base[name], chance)
            self._write(base, packed)
        return Case(
            source=self._folder,
            note=f"{name}: {note}",
            expected=expected,
            must_read=expected is not None,
        )

    def read(self, case: Case) -> Any:
        """Load the model, and segment a small image."""
        return predict(case.source)

    def equal(self, result: Any, expected: Any) -> bool:
        """Compare label maps."""
        return np.array_equal(result, expected)


def _saved(content: Any, *, zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def _damaged_checkpoint(checkpoint: dict[str, Any], chance: random.Random) -> Any:
    """Damage a checkpoint's values; of its weights only the first ones, to find other places."""
    content = {name: value for name, value in checkpoint.items() if name != "network_weights"}
    content = copy.deepcopy(content)
    weights = checkpoint["network_weights"]
    content["network_weights"] = dict.fromkeys(list(weights)[:4], 0)
    damage_json(content, chance)
    own = content.get("network_weights")
    if isinstance(own, dict):
        own = {name: weights.get(name) if value == 0 else value for name, value in own.items()}
        content["network_weights"] = {**weights, **own}
    return content


class _Code:
    """An object whose pickle calls a function when it is read."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> Any:
        return self._call


def _evil(checkpoint: dict[str, Any], place: Place, chance: random.Random) -> bytes:
    """A checkpoint that runs code when an ordinary pickle reads it."""
    sentinel = importlib.import_module(SENTINEL)
    file = str(place.root / "evil")
    code = chance.choice(
        (
            _Code(sentinel.run),
            _Code(os.system, f"touch {file}"),
            _Code(exec, f"open({file!r}, 'w')"),
            _Code(open, file, "w"),
            _Code(os.mkdir, file),
            _Code(torch.load, file),
        )
    )
    content = dict(checkpoint)
    key = chance.choice(("network_weights", "trainer_name", "more", "init_args"))
    content[key] = chance.choice((code, [code], {"a": code}))
    try:
        if chance.random() < 0.3:
            content.pop("network_weights")  # its tensors need torch's own pickle
            return pickle.dumps(content)
        return _saved(content, zipped=chance.random() < 0.7)
    finally:
        del sys.modules[SENTINEL]  # so that its import is seen
