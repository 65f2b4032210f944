"""``totalfast nnunet``: flags and files of nnUNetv2_predict and nnUNetv2_predict_from_modelfolder.

``ArgmaxPredictor`` does the work.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from totalfast.backends import BACKENDS
from totalfast.cli.advice import explain
from totalfast.cli.console import configure_output
from totalfast.errors import InputError, OptionError, TotalfastError
from totalfast.nnunet.file_checks import is_utf8

if TYPE_CHECKING:
    import torch

DEVICES = ("cpu", "cuda", "mps")
EXPORTS = ("auto", "nearest", "linear", "plans")
FOLDS = ("0", "1", "2", "3", "4")
DESCRIPTIONS = ("dataset.json", "plans.json", "predict_from_raw_data_args.json")
"""Files that nnU-Net writes beside the segmentations."""


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the subcommand; the flags are those of nnUNetv2_predict."""
    parser = argparse.ArgumentParser(
        prog="totalfast nnunet",
        description="Predict a folder of images with a trained nnU-Net v2 model. The flags and\n"
        "files are those of nnUNetv2_predict; one process does everything, with less memory.",
        epilog="examples:\n"
        "  totalfast nnunet -i imagesTs -o labels -m Dataset004/nnUNetTrainer__nnUNetPlans__2d\n"
        "  totalfast nnunet -i imagesTs -o labels -d 4 -c 3d_fullres -f 0\n\n"
        "Please cite nnU-Net: Isensee et al., Nature Methods 18, 203-211 (2021).",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_file_flags(parser)
    _add_model_flags(parser)
    _add_prediction_flags(parser)
    _add_other_flags(parser)
    return parser


def _add_file_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("input and output").add_argument
    add(
        "-i",
        required=True,
        metavar="FOLDER",
        help="Folder of images, one file per channel: CASE_0000.nii.gz.",
    )
    add("-o", required=True, metavar="FOLDER", help="Folder for the segmentations.")
    add("--save_probabilities", action="store_true", help="Also write .npz and .pkl files.")
    add("--continue_prediction", "--c", action="store_true", help="Skip cases whose output exists.")
    add(
        "-prev_stage_predictions",
        metavar="FOLDER",
        help="For the second stage of a cascade: folder of the first stage's predictions.",
    )
    add("-num_parts", type=int, default=1, help="Number of commands that share the cases.")
    add("-part_id", type=int, default=0, help="Number of this command, counted from 0.")


def _add_model_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("the model: -m, or -d and -c").add_argument
    add("-m", metavar="FOLDER", help="Folder of the trained model, which contains fold_X.")
    add("-d", metavar="DATASET", help="Dataset, by name or number.")
    add("-p", default="nnUNetPlans", help="Plans (default: %(default)s).")
    add("-tr", default="nnUNetTrainer", help="Trainer (default: %(default)s).")
    add("-c", metavar="CONFIGURATION", help="2d, 3d_fullres, ...")
    add("-f", nargs="+", default=FOLDS, help="Folds (default: 0 1 2 3 4), or all.")
    add("-chk", default="checkpoint_final.pth", help="Checkpoint (default: %(default)s).")
    add(
        "--trust-model",
        action="store_true",
        help="Allow plans that name classes and functions that are not nnU-Net's or torch's, such "
        "as an architecture of your own. Such a model can run any code.",
    )


def _add_prediction_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("prediction").add_argument
    add(
        "-step_size",
        type=float,
        default=0.5,
        help="Maximum distance between tiles, as a share of their size (default: %(default)s).",
    )
    add("--disable_tta", action="store_true", help="Do not average over mirrored images.")
    add(
        "--export",
        choices=EXPORTS,
        default="auto",
        help="How labels are resampled to the image. auto (default): nnU-Net's labels, in the "
        "cheapest way; nearest: by nearest neighbour, the fastest; linear: from linearly "
        "interpolated logits, for any plans; plans: as the plans specify, class by class.",
    )
    add(
        "--backend",
        choices=BACKENDS,
        default="torch",
        help="What runs the networks. torch (default): results identical to nnU-Net's; winograd: "
        "fastest on CPUs; openvino: for CPUs, needs pip install 'totalfast[cpu]'; compile: torch's "
        "compiler; auto: winograd on CPUs with AVX2, else openvino or torch.",
    )
    add("-device", choices=DEVICES, help="Default: cuda or mps if available, else cpu.")
    add(
        "--not_on_device",
        action="store_true",
        help="Sum the logits in main memory instead of the device's memory.",
    )


def _add_other_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("messages and compatibility").add_argument
    add("--disable_progress_bar", action="store_true", help="Show no progress bar.")
    add("--verbose", action="store_true", help="Print nnU-Net's messages.")
    add("--debug", action="store_true", help="Show the traceback of an error.")
    for flag in ("-npp", "-nps"):
        add(flag, type=int, default=3, help="No effect: totalfast uses threads, not processes.")


def run(args: argparse.Namespace) -> int:
    """Check the flags, predict all cases, print the time and the cases that failed."""
    if bool(args.m) == bool(args.d):
        raise OptionError("give the model by -m FOLDER, or by -d DATASET and -c CONFIGURATION.")
    if args.d and not args.c:
        raise OptionError("-d needs -c, a configuration of the dataset, such as 3d_fullres.")
    if not 0 <= args.part_id < args.num_parts:
        raise OptionError(f"-part_id must be from 0 to {args.num_parts - 1}, not {args.part_id}.")
    if not 0 < args.step_size <= 1:
        raise OptionError(f"-step_size must be above 0 and at most 1, not {args.step_size}.")
    for flag, folder in (("-i", args.i), ("-o", args.o)):
        if not folder or not is_utf8(folder):
            # SimpleITK ends the process if a name is not UTF-8.
            raise OptionError(f"{flag} needs a folder whose name is UTF-8, not {folder!r}.")
    if not Path(args.i).is_dir():
        raise InputError(f"{args.i} is no folder.")
    began = time.perf_counter()
    configure_output(quiet=False, verbose=args.verbose)
    failures: dict[str, str] = {}
    try:
        count = predict_folder(args, failures)
        print(f"Done in {time.perf_counter() - began:.1f} s: {count} cases in {args.o}", flush=True)
    finally:
        for case, reason in failures.items():
            print(f"ERROR: {case} failed: {reason}", file=sys.stderr)
    return 1 if failures else 0


def predict_folder(args: argparse.Namespace, failures: dict[str, str]) -> int:
    """Predict all cases of a folder; return the number of predicted cases.

    ``failures`` is filled with the name of each case that fails, and the reason.
    """
    from totalfast.nnunet.predictor import ArgmaxPredictor

    def note_failure(case: str, error: Exception) -> None:
        if args.debug:
            traceback.print_exception(error)
        print(f"WARNING: {case} failed.", flush=True)
        failures[case] = one_line(error)

    predictor = ArgmaxPredictor(
        tile_step_size=args.step_size,
        use_mirroring=not args.disable_tta,
        perform_everything_on_device=not args.not_on_device,
        device=choose_device(args.device),
        verbose=args.verbose,
        verbose_preprocessing=args.verbose,
        allow_tqdm=not args.disable_progress_bar,
        export=args.export,
        backend=args.backend,
        trust_model=args.trust_model,
        on_failure=note_failure,
    )
    folds = [fold if fold == "all" else int(fold) for fold in args.f]
    predictor.initialize_from_trained_model_folder(model_folder(args), folds, args.chk)
    model = predictor.model
    if model.configuration.previous_stage_name is not None and not args.prev_stage_predictions:
        raise OptionError(
            f"{model.folder.name} is the second stage of a cascade: "
            f"give the predictions of {model.configuration.previous_stage_name} by "
            "-prev_stage_predictions."
        )
    check_folders(args, model.dataset["file_ending"])
    results = predictor.predict_from_files(
        args.i,
        args.o,
        save_probabilities=args.save_probabilities,
        overwrite=not args.continue_prediction,
        folder_with_segs_from_prev_stage=args.prev_stage_predictions,
        num_parts=args.num_parts,
        part_id=args.part_id,
    )
    return len(results or ())


def check_folders(args: argparse.Namespace, ending: str) -> None:
    """Check, before any prediction, that there are images and that results can be written."""
    from totalfast.nnunet.cases import list_cases
    from totalfast.system.pending_files import PendingFiles

    cases = list_cases(args.i, ending)
    if not cases:
        others = sorted({"".join(path.suffixes[-2:]) for path in Path(args.i).glob("[!.]*_0000.*")})
        seen = f"; it has images with the endings {', '.join(others)}" if others else ""
        raise InputError(
            f"{args.i} has no image of the model's kind: no file *_0000{ending}{seen}."
        )
    output = Path(args.o)
    targets = [output / (Path(files[0]).name[: -len("_0000" + ending)] + ending) for files in cases]
    images = {_identity(Path(file)) for files in cases for file in files} - {None}
    if args.prev_stage_predictions:
        images |= {_identity(Path(args.prev_stage_predictions, path.name)) for path in targets}
    for target in targets:
        identity = _identity(target)
        if identity is not None and identity in images:
            raise OptionError(f"{target} would replace one of the input files; use another folder.")
    mine = targets[args.part_id :: args.num_parts]
    with PendingFiles() as files:
        files.prepare([*mine, *(output / name for name in DESCRIPTIONS)])


def _identity(path: Path) -> tuple[int, int] | None:
    """Device and inode of a file; None if there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def one_line(error: Exception) -> str:
    """Return an error's reason in one line, with advice if there is some.

    The message of an unexpected error is left out, because it may quote a header.
    """
    if isinstance(error, TotalfastError):
        return " ".join(str(error).split())
    return explain(error) or (
        f"unexpected {type(error).__name__}; --debug shows its message and a traceback."
    )


def model_folder(args: argparse.Namespace) -> str:
    """Return the folder of the model: -m, or the folder of -d, -tr, -p and -c in nnUNet_results."""
    if args.m:
        return str(args.m)
    from nnunetv2.paths import nnUNet_results
    from nnunetv2.utilities.file_path_utilities import get_output_folder

    if not nnUNet_results:
        raise OptionError("-d needs the environment variable nnUNet_results; or use -m FOLDER.")
    return str(get_output_folder(args.d, args.tr, args.p, args.c))


def choose_device(name: str | None) -> torch.device:
    """Return the device of that name; for None, the fastest that is available."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise OptionError("no CUDA device is available; use -device cpu.")
    if name == "mps" and not torch.backends.mps.is_available():
        raise OptionError("no MPS device is available; use -device cpu.")
    if name is None and torch.cuda.is_available():
        name = "cuda"
    elif name is None:
        name = "mps" if torch.backends.mps.is_available() else "cpu"
    return torch.device(name)
