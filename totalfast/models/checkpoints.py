"""Find and read a model's checkpoints, without running code in them.

Checkpoints are read with ``weights_only=True``: a file with objects other than tensors, containers
and plain numbers is refused, except for harmless data that are then left out.
"""

from __future__ import annotations

import pickle
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from totalfast.errors import MissingModelError, WeightsError
from totalfast.models.model_files import advice, damaged, shortened

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The checked content of a checkpoint.

    Parameters
    ----------
    path
        The file.
    weights
        Name to tensor, mapped from the file.
    trainer_name
        Name of the trainer's class.
    configuration
        Name of the plans' configuration.
    mirroring_axes
        Axes along which nnU-Net may mirror; None if it may not.
    """

    path: Path
    weights: dict[str, torch.Tensor]
    trainer_name: str
    configuration: str
    mirroring_axes: tuple[int, ...] | None


def checkpoint_paths(
    folder: Path, folds: Sequence[int | str] | None, checkpoint_name: str
) -> list[Path]:
    """Return the checkpoints of the given folds, or of all folds except "all".

    Raises
    ------
    MissingModelError
        If one is missing.
    """
    try:
        present = sorted(
            path.name for path in folder.glob("fold_*") if (path / checkpoint_name).is_file()
        )
        if folds is None:
            names = [name for name in present if name != "fold_all"]
        else:
            names = [f"fold_{fold}" for fold in folds]
        paths = [folder / name / checkpoint_name for name in names]
        missing = [f"{path.parent.name}/{path.name}" for path in paths if not path.is_file()]
    except OSError as error:
        raise damaged(folder, f"it can't be read: {error}") from error
    if missing or not paths:
        raise MissingModelError(
            f"{folder} has no {', '.join(missing) or checkpoint_name}; "
            f"folds with this file: {', '.join(present) or 'none'}. {advice(folder)}"
        )
    return paths


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and check a checkpoint.

    Raises
    ------
    WeightsError
        If it is damaged, or holds other things than a checkpoint of nnU-Net.
    """
    content = read_checkpoint(path)
    arguments = _value(path, content, "init_args", dict)
    axes = content.get("inference_allowed_mirroring_axes")
    if axes is not None and not (
        isinstance(axes, list | tuple)
        and all(type(axis) is int and 0 <= axis <= 2 for axis in axes)
        and len(set(axes)) == len(axes)
    ):
        raise damaged(
            path, f"inference_allowed_mirroring_axes is {shortened(axes)}, not a list of axes"
        )
    return Checkpoint(
        path=path,
        weights=_weights(path, _value(path, content, "network_weights", dict)),
        trainer_name=_value(path, content, "trainer_name", str),
        configuration=_value(path, arguments, "configuration", str),
        mirroring_axes=None if axes is None else tuple(axes),
    )


def _value(path: Path, content: Mapping[str, Any], key: str, kind: type) -> Any:  # noqa: ANN401
    """Return a value of the given type."""
    if key not in content:
        raise damaged(path, f"it has no {key}, so it is no checkpoint of nnU-Net")
    if not isinstance(content[key], kind):
        raise damaged(path, f"{key} is a {type(content[key]).__name__}, not a {kind.__name__}")
    return content[key]


def _weights(path: Path, weights: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Check that the weights are ordinary tensors whose numbers are in the file."""
    import torch

    for name, tensor in weights.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise damaged(
                path,
                f"network_weights has {shortened(name)}: {shortened(tensor)}, not a tensor by name",
            )
        if (
            type(tensor) not in (torch.Tensor, torch.nn.Parameter)
            or tensor.layout is not torch.strided
            or tensor.is_quantized
            or tensor.device.type != "cpu"
            or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes()
        ):
            raise damaged(path, f"the weights {name} are no ordinary tensor")
    return weights


def fit_weights(
    checkpoint: Checkpoint, expected: Mapping[str, torch.Tensor], *, copy: bool
) -> dict[str, Any]:
    """Return a checkpoint's weights in the precision of a network, after comparing their shapes.

    Weights in half precision are converted, like nnU-Net does.

    Parameters
    ----------
    checkpoint
        A checked checkpoint.
    expected
        The network's own ``state_dict()``.
    copy
        Whether the weights are needed for longer. Without a copy they stay mapped from the file,
        and another program that writes the file anew would end the process (SIGBUS).

    Raises
    ------
    WeightsError
        If a layer is missing, unexpected, or has another shape or kind of numbers.
    """
    weights = checkpoint.weights
    for found, others, text in (
        (weights, expected, "has layers that the network of the plans lacks"),
        (expected, weights, "lacks layers of the network of the plans"),
    ):
        if names := [name for name in found if name not in others]:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise damaged(
                checkpoint.path,
                f"the checkpoint does not fit its plans: it {text}: {names[0]}{more}",
            )
    for name, own in expected.items():
        tensor = weights[name]
        if tensor.shape != own.shape or tensor.is_floating_point() != own.is_floating_point():
            raise damaged(
                checkpoint.path,
                f"the checkpoint does not fit its plans: {name} has "
                f"{tuple(tensor.shape)} numbers of {tensor.dtype}, but the network needs "
                f"{tuple(own.shape)} of {own.dtype}",
            )
    return {name: tensor.to(expected[name].dtype, copy=copy) for name, tensor in weights.items()}


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint's tensors and numbers, mapped from the file, without running its code.

    Raises
    ------
    WeightsError
        If it is damaged, or holds types other than tensors, containers and the harmless ones of
        ``IGNORED``.
    """
    import torch

    # The file is data from anywhere, and torch and pickle raise errors of any kind about it.
    with torch.serialization.safe_globals(_stand_ins()):
        try:
            try:
                checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                # Files written before torch 1.6 are not zip archives and can't be mapped.
                if "mmap" not in str(error):
                    raise
                checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            forbidden = re.search(r"GLOBAL (\S+)", str(error))
            if forbidden is None:
                raise damaged(path, "it is not a checkpoint or is damaged") from error
            raise WeightsError(
                f"{path} holds more than weights ({forbidden.group(1)}) and was not opened. "
                f"Checkpoints of nnU-Net hold only tensors and numbers. {advice(path)}"
            ) from error
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise damaged(path, f"it is not a checkpoint or is damaged ({reason})") from error
    if not isinstance(checkpoint, dict):
        raise damaged(path, f"it holds a {type(checkpoint).__name__}, not a checkpoint of nnU-Net")
    content: dict[str, Any] = checkpoint
    return content


class Ignored:
    """Stands for an object of a checkpoint that is not needed; it keeps nothing."""

    def __new__(cls, *_: object, **__: object) -> Ignored:
        """Accept the arguments of any type."""
        return super().__new__(cls)

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        """Accept the state of any type."""


def _ignored_dict(*_: object) -> dict[object, object]:
    return {}


def _ignored_list(*_: object) -> list[object]:
    return []


IGNORED = (
    *(
        f"numpy.{core}.multiarray.{name}"
        for core in ("core", "_core")  # NumPy 1 and 2
        for name in ("_reconstruct", "scalar")
    ),
    "numpy.dtype",
    "numpy.ndarray",
    *(
        f"{module}.{name}"
        for module in ("pathlib", "pathlib._local")  # up to Python 3.12, and from 3.13 on
        for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")
    ),
    *(f"datetime.{name}" for name in ("date", "datetime", "time", "timedelta", "timezone")),
    "argparse.Namespace",
    "builtins.dict",
    "builtins.float",
    "builtins.frozenset",
    "builtins.int",
    "builtins.list",
    "builtins.range",
    "builtins.slice",
    "decimal.Decimal",
    "fractions.Fraction",
    "types.SimpleNamespace",
    "uuid.SafeUUID",
    "uuid.UUID",
)
"""Types of data that trainers put beside the weights: the training log, arguments of the trainer.
They are not made: reading numpy's dtypes, for example, can overwrite memory."""


def _stand_ins() -> list[Any]:
    """Stand-ins for harmless types, for torch's list of safe types."""
    containers = [
        (_ignored_dict, "collections.defaultdict"),
        (_ignored_list, "collections.deque"),
    ]
    return [*((Ignored, name) for name in IGNORED), *containers]
