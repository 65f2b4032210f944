"""The flags of ``totalfast batch``, and what does not go together."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

from totalfast.backends.devices import validate_device
from totalfast.cli.flags import FLAG_GROUPS, add_file_flags, add_list_flags
from totalfast.errors import OptionError

if TYPE_CHECKING:
    from totalfast.batch.remote.place import Place

OWN = (
    "input",
    "output",
    "names",
    "modality",
    "series_description",
    "min_slices",
    "retries",
    "at_a_time",
    "num_parts",
    "part_id",
    "table",
    "json",
    "report",
    "workers",
    "engine",
    "ray_address",
    "words",
    "series",
)
"""Arguments that are the batch's, not of a single run."""

EXAMPLES = """examples:
  totalfast batch -i scans/ -o out --fast
  totalfast batch -i scans/ -o out --fast                    the same again: only what is missing
  totalfast batch -i 'study*/ct.nii.gz' -o out -ml --statistics
  totalfast batch -i cases.csv -o out                        columns: case, path
  totalfast batch -i archive/ -o out --modality CT --min-slices 40
  totalfast batch -i s3://bucket/scans/ -o s3://bucket/out -ml     needs totalfast[remote]
  totalfast batch -i scans/ -o out --num-parts 8 --part-id $SLURM_ARRAY_TASK_ID

results:
  out/CASE/            what a single run writes; with -ml segmentation.nii.gz
  out/manifest.jsonl   how each case ended: seconds, warnings, the reason of a failure
  out/statistics.csv   with --statistics: all cases in one table
"""


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the subcommand: the flags of a single run, and those of a batch."""
    parser = argparse.ArgumentParser(
        prog="totalfast batch",
        description="Segment many scans in one process. While the networks of one scan run,\n"
        "others are read and written. An interrupted batch goes on where it was.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        conflict_handler="resolve",
    )
    for add_flags in FLAG_GROUPS:
        if add_flags is not add_list_flags:
            add_flags(parser)
        if add_flags is add_file_flags:
            _add_batch_flags(parser)
    parser.add_argument(
        "-d",
        "--device",
        type=_device_list,
        default="gpu",
        help="'gpu' (default; the CPU if there is no GPU), 'cpu', 'mps', 'gpu:X', or 'gpu:0,1,3' "
        "with a worker for each GPU.",
    )
    parser.add_argument(
        "--report", type=_place, metavar="file.html", help="Also write a report of the batch."
    )
    return parser


def _device_list(text: str) -> str:
    """Check the name of a device, or of several GPUs."""
    if not re.fullmatch(r"gpu:\d+(,\d+)+", text):
        try:
            return validate_device(text)
        except OptionError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _place(text: str) -> Place:
    """Return an absolute path, or an address."""
    from totalfast.batch.remote.place import place_of

    try:
        place = place_of(text)
    except OptionError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return place.absolute() if isinstance(place, Path) else place


def _add_batch_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("batch").add_argument
    add(
        "-i",
        dest="input",
        required=True,
        metavar="scans",
        help="A folder (searched with its subfolders for image files and DICOM series), a pattern "
        "in quotes, a .csv file with columns case and path, or - for paths on stdin. All of them "
        "may be addresses (s3://, gs://, https:// and others that fsspec knows).",
    )
    add(
        "-o",
        dest="output",
        required=True,
        type=_place,
        metavar="folder",
        help="Folder for the results, or an address such as s3://bucket/out; each case gets a "
        "folder in it.",
    )
    add(
        "--names",
        choices=("auto", "uid", "accession"),
        default="auto",
        help="Names of DICOM cases: SeriesInstanceUID (auto, uid) or accession number.",
    )
    add("--modality", metavar="CT", help="Only DICOM series of this modality.")
    add(
        "--series-description",
        metavar="pattern",
        help="Only DICOM series whose description has this regular expression.",
    )
    add("--min-slices", type=int, metavar="N", help="Only scans with N slices or more.")
    add("--retries", type=int, default=1, help="How often a failed case is tried again (1).")
    add(
        "--at-a-time",
        type=int,
        metavar="N",
        help="Number of cases in work (default: 3, more with a GPU; fewer if memory is short).",
    )
    add(
        "--workers",
        type=int,
        metavar="N",
        help="Number of processes on this machine that share the cases and the cores (default: one "
        "per GPU, else 1). Worth trying on a CPU with many cores.",
    )
    add(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="'ray' uses all nodes of a Ray cluster (pip install 'totalfast[ray]'), which must see "
        "the files. --workers is then the number of processes of each node.",
    )
    add("--ray-address", metavar="host:port", help="Ray cluster (default: the environment variable "
        "RAY_ADDRESS; without it, Ray is started on this machine).")  # fmt: skip
    add("--num-parts", type=int, default=1, metavar="N", help="Number of commands that share the "
        "cases, for job arrays.")  # fmt: skip
    add("--part-id", type=int, default=0, metavar="I", help="Number of this command, from 0.")
    add(
        "--table",
        type=_place,
        metavar="file",
        help="With --statistics: the table of all cases (default: statistics.csv in -o; .parquet "
        "needs pyarrow).",
    )
    add("--json", action="store_true", help="Print one JSON object per line, for programs.")


def check_flags(args: argparse.Namespace) -> None:
    """Refuse flags that do not go together, before any work."""
    from totalfast.batch.shared_queue import SharedQueue

    if not 0 <= args.part_id < args.num_parts:
        raise OptionError(f"--part-id must be from 0 to {args.num_parts - 1}, not {args.part_id}.")
    if args.retries < 0:
        raise OptionError(f"--retries must be 0 or more, not {args.retries}.")
    if args.workers is not None and args.workers < 1:
        raise OptionError(f"--workers must be 1 or more, not {args.workers}.")
    if args.num_parts > 1 and len(devices_of(args)) > 1 and SharedQueue.of_parent() is None:
        raise OptionError(
            "--num-parts does not work with several workers; give each part one of the GPUs."
        )
    if args.ray_address is not None and args.engine != "ray":
        raise OptionError("--ray-address needs --engine ray.")
    if args.engine == "ray" and args.num_parts > 1:
        raise OptionError("--num-parts does not work with --engine ray, which shares the cases.")
    if args.engine == "ray" and ":" in args.device:
        raise OptionError(
            f"--device {args.device} does not work with --engine ray, which chooses the GPUs; use "
            "gpu."
        )
    if _is_same_folder(_place(args.input), args.output):
        raise OptionError(
            f"-i and -o are the same folder, {args.output}. Name another one with -o, which may be "
            "in the folder of the scans."
        )
    if args.at_a_time is not None and args.at_a_time < 1:
        raise OptionError(f"--at-a-time must be 1 or more, not {args.at_a_time}.")
    if args.save_probabilities is not None:
        raise OptionError("--save_probabilities names one file; a batch has several cases.")
    if not isinstance(args.statistics, bool):
        raise OptionError("--statistics takes no file in a batch; --table names the table.")
    if args.skip_saving:
        raise OptionError("--skip_saving does not work in a batch, which goes on by what is saved.")
    if args.table is not None:
        if not args.statistics:
            raise OptionError("--table needs --statistics.")
        from totalfast.batch.results.table import check_table

        check_table(args.table)


def _is_same_folder(scans: Place, output: Place) -> bool:
    if isinstance(scans, Path) and isinstance(output, Path):
        return scans.is_dir() and scans.resolve() == output.resolve()
    return str(scans).rstrip("/") == str(output).rstrip("/")


def devices_of(args: argparse.Namespace) -> list[str]:
    """The device of each worker."""
    name, _, numbers = args.device.partition(":")
    devices = [f"{name}:{number}" for number in numbers.split(",")] if numbers else [name]
    if args.workers is None:
        return devices
    return [devices[number % len(devices)] for number in range(args.workers)]
