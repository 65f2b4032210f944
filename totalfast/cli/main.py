"""The ``totalfast`` command: upstream's flags. It and its subcommands alone print and exit.

Nothing heavy is imported before a scan is segmented, so that ``--help``, ``--version``,
``--list-tasks`` and ``--list-classes`` answer at once.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import functools
import importlib
import logging
import os
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import totalfast
from totalfast import upstream
from totalfast.engine.backends import BACKENDS
from totalfast.engine.devices import validate_device
from totalfast.errors import OptionError, TotalfastError
from totalfast.options import AGGREGATIONS, EXPORTS, MODEL_SIZES, SMALL_BLOB_MM3
from totalfast.system.process_memory import prepare_process

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import FrameType

CITATION = "If you use this tool please cite: https://pubs.rsna.org/doi/10.1148/ryai.230024"

SUBCOMMANDS = {
    "demo": "totalfast.cli.demo",
    "nnunet": "totalfast.cli.nnunet",
    "preview": "totalfast.cli.preview",
    "shim": "totalfast.cli.shim",
}
"""Word to the module whose ``build_parser`` and ``run`` answer to it."""

WRONG_OPTION = 2
"""Exit code where options make no sense, as argparse has it."""

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""

EXAMPLES = """\
examples:
  totalfast -i ct.nii.gz -o segmentations          one mask a structure
  totalfast -i ct.nii.gz -o seg.nii.gz -ml         one label map
  totalfast -i ct.nii.gz -o segmentations --fast   3 mm model, for a laptop
  totalfast -i mr.nii.gz -o segmentations -ta total_mr
  totalfast -i dicom_folder -o seg.dcm -ot dicom_seg

other commands (each has a --help):
  totalfast demo                                   try it without a scan or a download
  totalfast preview ct.nii.gz seg.nii.gz out.png   a picture of a scan and its labels
  totalfast nnunet -i DIR -o DIR -m MODEL          any nnU-Net v2 model
  totalfast shim DIR                               a TotalSegmentator command that runs totalfast

The flags are TotalSegmentator's; --backend, --export and --tile_step_size are ours.
Not a medical device. TotalSegmentator is by Jakob Wasserthal et al.; please cite
https://pubs.rsna.org/doi/10.1148/ryai.230024 and nnU-Net."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    if words and words[0] in SUBCOMMANDS:
        module = importlib.import_module(SUBCOMMANDS[words[0]])
        return _run(module.run, module.build_parser().parse_args(words[1:]))
    return answer(build_parser(), words)


def answer(parser: argparse.ArgumentParser, words: Sequence[str]) -> int:
    """Do what upstream's flags ask for; return the exit code."""
    args = parser.parse_args(words)
    if args.list_tasks:
        print(upstream.format_tasks_table())
        return 0
    if args.list_classes is not None:
        if args.list_classes not in upstream.TASKS:
            parser.error(
                f"unknown task '{args.list_classes}' for --list-classes. "
                "Run --list-tasks to see all options."
            )
        print(upstream.format_classes_table(args.list_classes))
        return 0
    missing = [flag for flag, value in (("-i", args.input), ("-o", args.output)) if value is None]
    if missing:
        parser.error(f"the following arguments are required for segmentation: {', '.join(missing)}")
    _configure_output(quiet=args.quiet, verbose=args.verbose)
    return _run(_segment, args)


def _run(work: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Do the work; turn errors into a line on stderr and an exit code."""
    try:
        with _termination_as_interruption():
            return work(args)
    except TotalfastError as error:
        if args.debug:
            raise
        print(f"ERROR: {error}", file=sys.stderr)
        return WRONG_OPTION if isinstance(error, OptionError) else 1
    except MemoryError:
        if args.debug:
            raise
        print("ERROR: out of memory. Try --fast or --force_split.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted; no file is half-written.", file=sys.stderr)
        return INTERRUPTED


def command(run: Callable[[], int] = main) -> None:
    """Run a command and leave the process: the console script.

    Taking the interpreter down with torch in it costs half a second that nobody needs, so only
    what others registered to run at exit is run.
    """
    prepare_process()
    code = run()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _segment(args: argparse.Namespace) -> int:
    logging.getLogger("totalfast").info("\n%s\n", CITATION)
    keywords = vars(args).copy()
    for name in ("list_tasks", "list_classes"):
        del keywords[name]
    keywords["statistics_exclude_masks_at_border"] = not keywords.pop("stats_include_incomplete")
    keywords["output_type"] = keywords["output_type"] or "nifti"
    scan, output = keywords.pop("input"), keywords.pop("output")
    keywords["task"] = _task_of_modality(keywords["task"], scan)
    totalfast.Session(keep_models=False).segment(scan, output, **keywords)
    return 0


def _task_of_modality(task: str, scan: Path) -> str:
    """Take total for DICOM CT and total_mr for DICOM MR, whichever was asked for, as upstream."""
    if task not in ("total", "total_mr") or not scan.exists() or not _is_dicom(scan):
        return task
    modality = (upstream.dicom_modality(scan) or "").upper()
    swapped = {("total_mr", "CT"): "total", ("total", "MR"): "total_mr"}.get((task, modality))
    if swapped is None:
        return task
    logging.getLogger("totalfast").warning(
        "WARNING: you tried to run %s model, but input modality is %s. Will run %s model instead.",
        "MR" if task == "total_mr" else "CT",
        modality,
        modality,
    )
    return swapped


def _is_dicom(scan: Path) -> bool:
    from totalfast.files.read import is_dicom

    return is_dicom(scan)


def _stop(signal_number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@contextlib.contextmanager
def _termination_as_interruption() -> Iterator[None]:
    """Turn SIGTERM into KeyboardInterrupt meanwhile, so that half-written files are removed.

    Not in processes that a library forks from this one, whose pools end them by it: a handler in
    Python can miss the signal just after the fork or before a lock, and is then waited for forever.
    """
    before = signal.signal(signal.SIGTERM, _stop)
    if hasattr(os, "register_at_fork"):
        _end_forked_processes_by_termination()
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


@functools.cache
def _end_forked_processes_by_termination() -> None:
    """Let SIGTERM wait during each fork, until the new process has no handler of ours."""
    before = threading.local()

    def block() -> None:
        before.mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def restore() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, before.mask)

    def forget() -> None:
        if signal.getsignal(signal.SIGTERM) is _stop:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        restore()

    os.register_at_fork(before=block, after_in_parent=restore, after_in_child=forget)


class _LineHandler(logging.Handler):
    """Print records on stdout at once, above the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        with tqdm.external_write_mode(file=sys.stdout):
            print(self.format(record), flush=True)


def _configure_output(*, quiet: bool, verbose: bool) -> None:
    logger = logging.getLogger("totalfast")
    logger.handlers = [_LineHandler()]
    logger.propagate = False
    logger.setLevel(logging.CRITICAL if quiet else logging.DEBUG if verbose else logging.INFO)


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


def build_parser(
    *, program: str = "totalfast", version: str | None = None
) -> argparse.ArgumentParser:
    """Build the parser: names, short forms, defaults and choices are upstream's.

    Parameters
    ----------
    program
        What the command is called in its help.
    version
        What ``--version`` prints; None names totalfast and TotalSegmentator.
    """
    parser = argparse.ArgumentParser(
        prog=program,
        description="Segment anatomical structures in CT and MR images with TotalSegmentator's "
        "models: same flags, same files, same voxels, sooner.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--version",
        action="version",
        version=version
        or f"totalfast {totalfast.__version__} (TotalSegmentator {upstream.version()})",
    )
    _add_run_flags(parser)
    _add_model_flags(parser)
    _add_statistics_flags(parser.add_argument_group("statistics"))
    return parser


def _add_run_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
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
        help="Directory for the masks, or with --ml the .nii.gz file to write, or the .dcm file.",
    )
    add(
        "-ot",
        "--output_type",
        nargs="+",
        metavar="type",
        help="One or more of nifti (default), dicom_rtstruct, dicom_seg; the last two for DICOM "
        "input, with pip install 'totalfast[dicom]'. Several at once: one file each, named "
        "after -o.",
    )
    add("-ml", "--ml", action="store_true", help="Write one label map for all classes.")
    add("-ss", "--skip_saving", action="store_true", help="Write no masks and no label map.")
    add(
        "-sl",
        "--save_lowres",
        action="store_true",
        help="With --fast or --fastest: write the result at the model's resolution.",
    )
    add(
        "-sp",
        "--save_probabilities",
        type=_path,
        metavar="filepath",
        help="Also write the probabilities of all classes (.npz) at the model's resolution, and "
        "what nnU-Net knows of the image (.pkl). Takes much memory.",
    )
    add(
        "-ndm",
        "--no_derived_masks",
        action="store_true",
        help="Task body: write no body and skin masks.",
    )
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
        help="Also write a report of the run (.json): versions, options, classes and files, and "
        "why classes are empty.",
    )
    add(
        "-t",
        "--nora_tag",
        default="None",
        metavar="project",
        help="Add the files to this project of the viewer Nora.",
    )
    add("-q", "--quiet", action="store_true", help="Print nothing.")
    add("-v", "--verbose", action="store_true", help="Print more.")
    add("--debug", action="store_true", help="Show the traceback of an error.")
    add(
        "-nr",
        "--nr_thr_resamp",
        type=int,
        default=1,
        help="Accepted for TotalSegmentator's sake; all cores are used.",
    )
    add(
        "-ns",
        "--nr_thr_saving",
        type=int,
        default=6,
        help="Files written at a time, at most (default: 6).",
    )
    add(
        "-l",
        "--license_number",
        help="Have TotalSegmentator check a licence number online and keep it; needed once.",
    )
    add("-cp", "--crop_path", type=_path, help="Accepted for TotalSegmentator's sake; no effect.")
    add(
        "--test",
        metavar="0|1|3",
        choices=[0, 1, 3],
        type=int,
        default=0,
        help="For TotalSegmentator's own tests; only 0 works.",
    )
    add(
        "-lt",
        "--list-tasks",
        action="store_true",
        dest="list_tasks",
        help="List all tasks of TotalSegmentator and exit.",
    )
    add(
        "-lc",
        "--list-classes",
        dest="list_classes",
        nargs="?",
        const="total",
        metavar="task",
        help="List the classes of a task and exit (default: total).",
    )


def _add_model_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "-ta",
        "--task",
        choices=upstream.TASKS,
        metavar="task",
        default="total",
        help="What to segment (default: total); see --list-tasks.",
    )
    add("-f", "--fast", action="store_true", help="Use the 3 mm model: faster, coarser.")
    add("-ff", "--fastest", action="store_true", help="Use the 6 mm model.")
    add(
        "-d",
        "--device",
        type=_device,
        default="gpu",
        help="'gpu' (default; the CPU where there is none), 'cpu', 'mps', or 'gpu:X'.",
    )
    add(
        "--backend",
        choices=BACKENDS,
        default="auto",
        help="What runs the networks. 'torch': exactly TotalSegmentator's voxels; 'openvino': "
        "faster on CPUs, needs pip install 'totalfast[cpu]'; 'compile': torch's compiler, for many "
        "tiles; 'auto' (default): openvino on a CPU if it is installed, else torch.",
    )
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
        "-rc",
        "--robust_crop",
        action="store_true",
        help="Tasks that look at a region: find it with the 3 mm model instead of the 6 mm model.",
    )
    add(
        "-rs",
        "--roi_subset",
        nargs="+",
        metavar="class",
        help="Tasks total...: segment these classes only, where a rough model finds them. Much "
        "faster; see --list-classes.",
    )
    add(
        "-rsr",
        "--roi_subset_robust",
        nargs="+",
        metavar="class",
        help="The same, found with the 3 mm model instead of the 6 mm model: slower, safer.",
    )
    add(
        "-bs",
        "--body_seg",
        action="store_true",
        help="Find the body first and look at nothing else; for scans with much air or table.",
    )
    add(
        "-ms",
        "--model_size",
        choices=MODEL_SIZES,
        default="big",
        help="Task total_v3: 'small' takes the smaller models.",
    )
    add(
        "-rmb",
        "--remove_small_blobs",
        nargs="?",
        const=SMALL_BLOB_MM3,
        default=False,
        type=_positive,
        metavar="mm3",
        help="Remove blobs of up to this volume (200 if none is given).",
    )
    add(
        "-v1o",
        "--v1_order",
        action="store_true",
        help="Task total: number the labels of the label map as TotalSegmentator v1 did.",
    )
    add(
        "-fs",
        "--force_split",
        action="store_true",
        help="Predict in 3 pieces, for less memory on large scans.",
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
        help="Resample each label's mask linearly instead, as TotalSegmentator once did.",
    )
    add(
        "--export",
        choices=EXPORTS,
        default="auto",
        help="How labels come to the scan's resolution: 'auto' (default) as TotalSegmentator does, "
        "by nearest neighbour; 'linear' interpolates the logits, for smooth masks.",
    )
    add(
        "--max-memory",
        dest="max_memory_gb",
        type=float,
        metavar="GB",
        help="Stop before the scan is read if the run needs more memory than this. Default: what "
        "is free; a warning is given if it needs more.",
    )
    add(
        "--tile_step_size",
        type=float,
        metavar="0-1",
        help="Distance of the network's tiles, at most, as a share of their size: 0.8 lets "
        "neighbours overlap by at least 20 %%. Default: TotalSegmentator's, 0.8 for total tasks, "
        "0.5 for others. A larger step takes fewer tiles and less time, and changes the labels.",
    )


def _add_statistics_flags(group: Any) -> None:  # noqa: ANN401 - argparse's class is private
    add = group.add_argument
    add(
        "-s",
        "--statistics",
        nargs="?",
        const=True,
        default=False,
        metavar="filepath",
        help="Also write volume (mm3) and mean intensity of each class: statistics.json in the "
        "output directory, or the file given.",
    )
    add(
        "-sii",
        "--stats_include_incomplete",
        action="store_true",
        help="Count structures that the scan's edge cuts, too.",
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
        help="More figures of the intensities; not with --fast.",
    )
    add(
        "-r",
        "--radiomics",
        action="store_true",
        help="Also write radiomics features of each mask, statistics_radiomics.json; needs the "
        "package pyradiomics.",
    )
