"""Flags of the main command; names, short forms, defaults and choices are upstream's.

Each function adds one group of flags, in the order in which ``--help`` lists them.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from totalfast import upstream
from totalfast.backends import BACKENDS, PRECISIONS
from totalfast.backends.devices import validate_device
from totalfast.errors import OptionError
from totalfast.options import AGGREGATIONS, EXPORTS, MODEL_SIZES, SMALL_BLOB_MM3

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence


def add_list_flags(parser: argparse.ArgumentParser) -> None:
    """Add -lt and -lc, which print a list and exit."""
    parser.add_argument(
        "-lt",
        "--list-tasks",
        action="store_true",
        dest="list_tasks",
        help="List all tasks of TotalSegmentator and exit.",
    )
    parser.add_argument(
        "-lc",
        "--list-classes",
        dest="list_classes",
        nargs="?",
        const="total",
        metavar="task",
        help="List the classes of a task (default: total) and exit.",
    )


def add_file_flags(parser: argparse.ArgumentParser) -> None:
    """Add the paths of input and output, and the kinds of output."""
    add = parser.add_argument_group("input and output").add_argument
    add(
        "-i",
        metavar="filepath",
        dest="input",
        type=_path,
        help="Scan: a NIfTI (.nii, .nii.gz), NRRD or MetaImage file, or a folder or zip file of "
        "DICOM slices.",
    )
    add(
        "-o",
        metavar="directory",
        dest="output",
        type=_path,
        help="Directory for the masks. With --ml: the .nii.gz file for the label map. With "
        "-ot dicom_seg or dicom_rtstruct: the .dcm file.",
    )
    add("-ml", "--ml", action="store_true", help="Write one label map for all classes.")
    add(
        "-ot",
        "--output_type",
        nargs="+",
        metavar="type",
        help="One or more of nifti (default), dicom_rtstruct, dicom_seg. The DICOM types need "
        "DICOM input and pip install 'totalfast[dicom]'. Several types: one file per type, named "
        "after -o.",
    )
    add(
        "--series",
        metavar="number",
        help="DICOM input of several series: the SeriesNumber or SeriesInstanceUID of the one to "
        "segment. Without it several series are an error, which lists them.",
    )
    add("-ss", "--skip_saving", action="store_true", help="Write no masks and no label map.")
    add(
        "-sl",
        "--save_lowres",
        action="store_true",
        help="With --fast or --fastest: write the result at the model's resolution.",
    )
    add(
        "-ndm",
        "--no_derived_masks",
        action="store_true",
        help="Task body: write no body and skin masks.",
    )


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Add the task and the variants of its model."""
    add = parser.add_argument_group("task and model").add_argument
    add(
        "-ta",
        "--task",
        nargs="+",
        action=_OneOrSeveral,
        choices=upstream.TASKS,
        metavar="task",
        default="total",
        help="Structures to segment (default: total); see --list-tasks. Several tasks share the "
        "scan that is read; each gets a folder in -o.",
    )
    add("-f", "--fast", action="store_true", help="Use the 3 mm model: faster, coarser.")
    add("-ff", "--fastest", action="store_true", help="Use the 6 mm model: fastest, coarsest.")
    add(
        "-ms",
        "--model_size",
        choices=MODEL_SIZES,
        default="big",
        help="Task total_v3: 'small' uses the smaller models (default: big).",
    )
    add(
        "-l",
        "--license_number",
        help="Let TotalSegmentator check this licence number online and store it. Needed once, for "
        "tasks that require a licence.",
    )
    add(
        "--offline",
        action="store_true",
        help="Download nothing: stop with an error if a model is missing. The environment variable "
        "TOTALFAST_OFFLINE=1 does the same.",
    )
    add(
        "--trust-model",
        action="store_true",
        help="Also run models whose plans name networks or layers that are not nnU-Net's or "
        "torch's. Such a model can run any code.",
    )


def add_region_flags(parser: argparse.ArgumentParser) -> None:
    """Add the selection of classes and the crop to a region."""
    add = parser.add_argument_group("part of the scan").add_argument
    add(
        "-rs",
        "--roi_subset",
        nargs="+",
        metavar="class",
        help="Tasks total...: segment only these classes, within the region where a 6 mm model "
        "finds them. Much faster; see --list-classes.",
    )
    add(
        "-rsr",
        "--roi_subset_robust",
        nargs="+",
        metavar="class",
        help="Like --roi_subset, but with the 3 mm model: slower, safer.",
    )
    add(
        "-rc",
        "--robust_crop",
        action="store_true",
        help="Tasks that crop to a region: find it with the 3 mm model instead of the 6 mm model.",
    )
    add(
        "-bs",
        "--body_seg",
        action="store_true",
        help="Find the body first and crop to it; for scans with much air or table.",
    )


def add_label_flags(parser: argparse.ArgumentParser) -> None:
    """Add the resampling of scan and labels, and their clean-up."""
    add = parser.add_argument_group("resampling and labels").add_argument
    add(
        "-ro",
        "--resampling_order",
        type=int,
        choices=range(6),
        default=1,
        metavar="0-5",
        help="Spline order for resampling the scan (default: 1).",
    )
    add(
        "-ho",
        "--higher_order_resampling",
        "--high_order_resampling",
        action="store_true",
        help="Resample from the scan to the model and back as nnU-Net does, for smooth masks.",
    )
    add(
        "--higher_order_resampling_LEGACY",
        "--high_order_resampling_LEGACY",
        action="store_true",
        help="Resample the mask of each label linearly, as older versions of TotalSegmentator.",
    )
    add(
        "--export",
        choices=EXPORTS,
        default="auto",
        help="How labels are resampled to the scan. 'auto' (default): as TotalSegmentator; "
        "'nearest': by nearest neighbour, the same for most tasks; 'linear': from interpolated "
        "logits, for smooth masks.",
    )
    add(
        "-rmb",
        "--remove_small_blobs",
        nargs="?",
        const=SMALL_BLOB_MM3,
        default=False,
        type=_positive,
        metavar="mm3",
        help="Remove blobs of up to this volume in mm3 (200 if no number is given).",
    )
    add(
        "-v1o",
        "--v1_order",
        action="store_true",
        help="Task total: number the labels of the label map as in TotalSegmentator v1.",
    )


def add_extra_file_flags(parser: argparse.ArgumentParser) -> None:
    """Add files that are written beside masks or label map."""
    add = parser.add_argument_group("additional files").add_argument
    add(
        "-p",
        "--preview",
        action="store_true",
        help="Also draw a picture of the result, preview_{task}.png.",
    )
    add(
        "-rp",
        "--report",
        type=_path,
        metavar="filepath",
        help="Also write a report of the run (.json): versions, options, classes, files, and the "
        "reasons for empty classes.",
    )
    add(
        "-sp",
        "--save_probabilities",
        type=_path,
        metavar="filepath",
        help="Also write the probabilities of all classes (.npz) at the model's resolution, and "
        "nnU-Net's properties of the image (.pkl). Needs much memory.",
    )
    add(
        "--completion-marker",
        action="store_true",
        help="Also write a file that appears after all others, for programs that watch the folder: "
        "totalfast-complete.json among the masks, or NAME.complete.json beside a label map.",
    )
    add(
        "-t",
        "--nora_tag",
        default="None",
        metavar="project",
        help="Add the files to this project of the viewer Nora.",
    )


def add_statistics_flags(parser: argparse.ArgumentParser) -> None:
    """Add statistics and radiomics."""
    add = parser.add_argument_group("statistics").add_argument
    add(
        "-s",
        "--statistics",
        nargs="?",
        const=True,
        default=False,
        metavar="filepath",
        help="Also write the volume (mm3) and mean intensity of each class, to this file or to "
        "statistics.json in the output directory.",
    )
    add(
        "-sii",
        "--stats_include_incomplete",
        action="store_true",
        help="Include structures that are cut by the edge of the scan.",
    )
    add(
        "-sa",
        "--stats_aggregation",
        choices=AGGREGATIONS,
        default="mean",
        help="Mean (default) or median of the intensities.",
    )
    add(
        "-sx",
        "--statistics_extra",
        action="store_true",
        help="Add more statistics per structure; not with --fast.",
    )
    add(
        "-r",
        "--radiomics",
        action="store_true",
        help="Also write radiomics features of each mask, statistics_radiomics.json. Needs the "
        "package pyradiomics.",
    )


def add_hardware_flags(parser: argparse.ArgumentParser) -> None:
    """Add device, backend, tile step, and limits of memory and threads."""
    add = parser.add_argument_group("device, speed and memory").add_argument
    add(
        "-d",
        "--device",
        type=_device,
        default="gpu",
        help="'gpu' (default; the CPU if there is no GPU), 'cpu', 'mps', or 'gpu:X'.",
    )
    add(
        "--backend",
        choices=BACKENDS,
        default="auto",
        help="What runs the networks. 'torch': results identical to TotalSegmentator's; "
        "'winograd': fastest on CPUs, single voxels may differ; 'openvino': faster than "
        "torch on CPUs, needs pip install 'totalfast[cpu]'; 'compile': torch's compiler, for many "
        "tiles; 'auto' (default): winograd on CPUs with AVX2, else openvino or torch.",
    )
    add(
        "--precision",
        choices=PRECISIONS,
        default="f32",
        help="'bf16' computes networks in bfloat16, by OpenVINO on CPUs that have it (AVX512-BF16, "
        "AMX). Many voxels change. Default: f32.",
    )
    add(
        "--guided",
        action="store_true",
        help="Run the fast model first, and then only the tiles of each of the task's models that "
        "touch the box around what it found for that model, with a margin of 20 mm. Saves time for "
        "scans much larger than the structures, such as whole bodies. Labels there do not change; "
        "what the fast model missed elsewhere is lost.",
    )
    add(
        "--deterministic",
        action="store_true",
        help="Give the same labels in every run on one GPU. Always on for the rough pass that "
        "finds a region. On a CPU all runs are deterministic.",
    )
    add(
        "--tile_step_size",
        type=float,
        metavar="0-1",
        help="Maximum distance between the network's tiles, as a share of their size: with 0.8, "
        "neighbours overlap by at least 20 %%. Default: TotalSegmentator's, 0.8 for total tasks, "
        "0.5 for others. A larger step needs fewer tiles and less time, and changes the labels.",
    )
    add(
        "-fs",
        "--force_split",
        action="store_true",
        help="Predict the scan in 3 parts: less memory for large scans.",
    )
    add(
        "--max-memory",
        dest="max_memory_gb",
        type=float,
        metavar="GB",
        help="Stop, before networks run, if the run needs more memory than this. Default: only "
        "warn if the run needs more than the free memory.",
    )
    add(
        "-ns",
        "--nr_thr_saving",
        type=int,
        default=6,
        help="Maximum number of files written at the same time (default: 6).",
    )


def add_message_flags(parser: argparse.ArgumentParser) -> None:
    """Add the amount of messages."""
    add = parser.add_argument_group("messages").add_argument
    add("-q", "--quiet", action="store_true", help="Print nothing.")
    add("-v", "--verbose", action="store_true", help="Print more.")
    add("--debug", action="store_true", help="Show the traceback of an error.")


def add_compatibility_flags(parser: argparse.ArgumentParser) -> None:
    """Add upstream's flags that have no effect here."""
    add = parser.add_argument_group("accepted for compatibility").add_argument
    add("-nr", "--nr_thr_resamp", type=int, default=1, help="No effect: all cores are used.")
    add("-cp", "--crop_path", type=_path, help="No effect.")
    add(
        "--test",
        metavar="0|1|3",
        choices=[0, 1, 3],
        type=int,
        default=0,
        help="For TotalSegmentator's own tests; only 0 works.",
    )


class _OneOrSeveral(argparse.Action):
    """Stores one word as a string, like upstream's flag, and several words as a list."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        words = list(values or ())
        setattr(namespace, self.dest, words[0] if len(words) == 1 else words)


def tasks_of(args: argparse.Namespace) -> list[str]:
    """Return the tasks of a command line."""
    return [args.task] if isinstance(args.task, str) else list(args.task)


def keywords_of(args: argparse.Namespace, *, without: Collection[str]) -> dict[str, Any]:
    """Return the keywords of ``Session.segment`` for a command line; the tasks are not among them.

    ``without`` names the arguments that are no keywords.
    """
    left_out = {*without, "task", "stats_include_incomplete"}
    keywords = {name: value for name, value in vars(args).items() if name not in left_out}
    keywords["statistics_exclude_masks_at_border"] = not args.stats_include_incomplete
    keywords["output_type"] = args.output_type or "nifti"
    return keywords


def _path(text: str) -> Path:
    return Path(text).absolute()


def _device(value: str) -> str:
    try:
        return validate_device(value)
    except OptionError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _positive(value: str) -> float:
    number = float(value)
    if number <= 0:
        raise argparse.ArgumentTypeError("Value must be greater than 0.")
    return number


FLAG_GROUPS = (
    add_list_flags,
    add_file_flags,
    add_model_flags,
    add_region_flags,
    add_label_flags,
    add_extra_file_flags,
    add_statistics_flags,
    add_hardware_flags,
    add_message_flags,
    add_compatibility_flags,
)
"""Functions that add flags to a parser, in the order of the groups in ``--help``."""
