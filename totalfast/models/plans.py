"""Check the numbers in plans.json and dataset.json that the rest of this package relies on.

The names of classes and functions in them are checked by ``known_parts``.
"""

from __future__ import annotations

import copy
import math
import re
from typing import TYPE_CHECKING, Any

from totalfast.models.model_files import Entry, damaged, shortened

if TYPE_CHECKING:
    from collections.abc import Sequence


MAX_TILE_VOXELS = 2**29
"""Largest tile, 812 voxels cubed. 32 features of it in float32 need 69 GB."""

MAX_STAGES = 32
"""A tile of 2^29 voxels can be halved 29 times."""

MAX_LAYERS = 100
"""Most convolutions or blocks of a stage. nnU-Net's largest networks have 8."""

MAX_FEATURES = 2**16

MAX_CHANNELS = 1000

MAX_LABEL = 2**16 - 1
"""Label maps are uint16."""

SPACING = (1e-6, 1e6)
"""Range of spacings. nnU-Net is also used for microscopy and for images without a unit."""


def resolve_configuration(plans: Entry, name: str) -> Entry:
    """Copy a configuration with its inherited values, like nnU-Net's PlansManager.

    Raises
    ------
    WeightsError
        If the configuration or one that it inherits from is missing, or inherits from itself.
    """
    configurations = plans.item("configurations")
    chain: list[str] = []
    heir: str | None = name
    while heir is not None:
        if heir in chain:
            raise damaged(
                plans.path, f"the configuration {' -> '.join([*chain, heir])} is a circle"
            )
        if heir not in configurations:
            known = ", ".join(map(repr, configurations.mapping())) or "nothing"
            raise damaged(plans.path, f"there is no configuration {shortened(heir)}, only {known}")
        chain.append(heir)
        own = configurations.item(heir)
        heir = own.item("inherits_from").text() if "inherits_from" in own else None
    merged: dict[str, Any] = {}
    for part in reversed(chain):
        merged |= configurations.item(part).mapping()
    return Entry(plans.path, f"configurations.{name}", copy.deepcopy(merged))


def check_grid(plans: Entry, configuration: Entry) -> None:
    """Check tile, spacing and order of the axes.

    Parameters
    ----------
    plans
        The whole plans.json.
    configuration
        Returned by ``resolve_configuration``.

    Raises
    ------
    WeightsError
        If a value is missing or impossible.
    """
    patch = configuration.item("patch_size")
    sizes = [size.whole(1, MAX_TILE_VOXELS) for size in patch.items((2, 3))]
    if math.prod(sizes) > MAX_TILE_VOXELS:
        raise patch.error(f"a tile of at most {MAX_TILE_VOXELS} voxels")
    for spacing in configuration.item("spacing").items((2, 3)):
        spacing.number(*SPACING)
    forward, backward = (_permutation(plans.item(f"transpose_{way}")) for way in _WAYS)
    if [forward[axis] for axis in backward] != [0, 1, 2]:
        raise plans.item("transpose_backward").error(f"the inverse of {forward}")


_WAYS = ("forward", "backward")


def _permutation(axes: Entry) -> list[int]:
    order = [axis.whole(0, 2) for axis in axes.items((3,))]
    if sorted(order) != [0, 1, 2]:
        raise axes.error("an order of the axes 0, 1 and 2")
    return order


def check_dataset(dataset: Entry) -> None:
    """Check labels, channels and file ending in dataset.json.

    Raises
    ------
    WeightsError
        If a value is missing or impossible.
    """
    ending = dataset.item("file_ending")
    if re.fullmatch(r"(\.[A-Za-z0-9_]+)+", ending.text()) is None:
        raise ending.error("the ending of a file, such as '.nii.gz'")
    channel_names(dataset)
    labels = dataset.item("labels")
    numbers: set[int] = set()
    has_regions = False
    for name, entry in labels.entries().items():
        if name == "ignore":
            entry.whole(0, MAX_LABEL)
        elif isinstance(entry.value, list):
            has_regions |= len(entry.value) > 1
            numbers |= {_label(part) for part in entry.items(range(1, MAX_LABEL + 1))}
        else:
            numbers.add(_label(entry))
    if labels.item("background").value not in (0, "0"):
        raise labels.item("background").error("0")
    if numbers != set(range(len(numbers))):
        raise labels.error("consecutive numbers from 0")
    if has_regions:
        order = dataset.item("regions_class_order")
        for label in order.items(range(1, MAX_LABEL + 1)):
            label.whole(1, max(numbers))


def channel_names(dataset: Entry) -> list[str]:
    """Return the names of the input channels; "modality" is the key of old files."""
    channels = dataset.item("modality" if "modality" in dataset else "channel_names")
    names = list(channels.mapping())
    if not 1 <= len(names) <= MAX_CHANNELS:
        raise channels.error(f"1 to {MAX_CHANNELS} channels")
    return names


def _label(entry: Entry) -> int:
    """Return a label; nnU-Net also reads numbers that are written as texts."""
    if isinstance(entry.value, str) and re.fullmatch(r"[0-9]{1,5}", entry.value):
        return int(entry.value)
    return entry.whole(0, MAX_LABEL)


def check_intensities(plans: Entry, configuration: Entry, channels: int) -> None:
    """Check the statistics of each input channel that the normalisation needs."""
    key = "foreground_intensity_properties_"
    by_channel = plans.item(
        key + "by_modality"
        if key + "per_channel" not in plans and key + "by_modality" in plans
        else key + "per_channel"
    )
    schemes = configuration.item("normalization_schemes").items((channels,))
    for use_mask in configuration.item("use_mask_for_norm").items((channels,)):
        use_mask.flag()
    for number, scheme in enumerate(schemes):
        statistics = by_channel.item(str(number))
        statistics.mapping()
        if scheme.text() == "CTNormalization":
            low, high, _, _ = (statistics.item(name).number(-1e9, 1e9) for name in _CT_STATISTICS)
            if low > high:
                raise statistics.error("values with percentile_00_5 below percentile_99_5")


_CT_STATISTICS = ("percentile_00_5", "percentile_99_5", "mean", "std")


def check_old_network(configuration: Entry) -> None:
    """Check the description of a network in plans of the old format, before nnU-Net converts it."""
    if "architecture" in configuration:
        return
    configuration.item("UNet_class_name").one_of(("PlainConvUNet", "ResidualEncoderUNet"))
    for key in ("UNet_base_num_features", "unet_max_num_features"):
        configuration.item(key).whole(1, MAX_FEATURES)
    configuration.item("n_conv_per_stage_encoder").items(range(1, MAX_STAGES + 1))


def check_network(kwargs: Entry, patch: Sequence[int]) -> None:
    """Check the numbers in a U-Net's ``arch_kwargs``, and that they fit its tile.

    Raises
    ------
    WeightsError
        If a number is impossible, or the network could not run on a tile of this size.
    """
    stages = kwargs.item("n_stages").whole(1, MAX_STAGES)
    for feature in _each(kwargs.item("features_per_stage"), stages):
        feature.whole(1, MAX_FEATURES)
    for key in ("n_conv_per_stage", "n_blocks_per_stage", "n_conv_per_stage_decoder"):
        if key in kwargs:
            count = stages - 1 if key.endswith("decoder") else stages
            for layers in _each(kwargs.item(key), count):
                layers.whole(1, MAX_LAYERS)
    for key in ("bottleneck_channels", "stem_channels"):
        if key in kwargs and kwargs.value[key] is not None:
            for feature in _each(kwargs.item(key), stages):
                feature.whole(1, MAX_FEATURES)
    for key in ("conv_bias", "nonlin_first"):
        if key in kwargs:
            kwargs.item(key).flag()
    for sizes in _each(kwargs.item("kernel_sizes"), stages):
        for size in _each(sizes, len(patch)):
            if size.whole(1, MAX_FEATURES) % 2 == 0:
                raise size.error("an odd number")
    _check_strides(kwargs.item("strides"), stages, patch)


def _check_strides(strides: Entry, stages: int, patch: Sequence[int]) -> None:
    remaining = list(patch)
    for number, stage in enumerate(_each(strides, stages)):
        steps = _each(stage, len(patch))
        for axis in range(len(patch)):
            step = steps[axis].whole(1, MAX_TILE_VOXELS)
            if number == 0 and step != 1:
                raise strides.error("1 at the first stage, because the decoder does not undo it")
            if remaining[axis] % step:
                raise strides.error(f"divisors of the tile {list(patch)}")
            remaining[axis] //= step
    if math.prod(remaining) < 2:
        # Instance normalisation of one voxel is an error in torch.
        raise strides.error(f"small enough that 2 voxels of the tile {list(patch)} remain")


def _each(entry: Entry, count: int) -> list[Entry]:
    """Return a list's values; a single value stands for a list of equal ones."""
    return entry.items((count,)) if isinstance(entry.value, list) else [entry] * count
