"""``totalfast batch``: segment many scans, with the flags of a single run."""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
import traceback
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from totalfast.backends.devices import validate_device
from totalfast.cli.console import configure_output, print_only_cases
from totalfast.cli.flags import FLAG_GROUPS, add_file_flags, add_list_flags, keywords_of, tasks_of
from totalfast.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from totalfast.batch.cases import Case, Found
    from totalfast.batch.entries import Entry
    from totalfast.batch.manifest import Manifest
    from totalfast.batch.progress import Meter
    from totalfast.batch.ray_engine import RayEngine
    from totalfast.batch.remote import Place
    from totalfast.batch.run import Batch
    from totalfast.batch.shared_queue import SharedQueue
    from totalfast.batch.workers import Workers
    from totalfast.options import Options

logger = logging.getLogger(__name__)

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

SAME_RESULT = (
    "quiet", "verbose", "debug", "device", "max_memory_gb", "nr_thr_saving", "nr_thr_resamp",
    "offline", "license_number", "crop_path", "test", "completion_marker",
)  # fmt: skip
"""Flags that do not change results, so that a batch can go on with others."""

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
    from totalfast.batch.remote import place_of

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


def run(args: argparse.Namespace) -> int:
    """Segment the cases; 1 if one failed."""
    configure_output(quiet=args.quiet or args.json, verbose=args.verbose)
    print_only_cases(verbose=args.verbose)
    args.task = tasks_of(args)
    _check(args)
    keywords = _keywords(args)
    from totalfast.batch.run import check

    options = check(keywords, args.task)
    from totalfast.batch.cases import part_of
    from totalfast.batch.progress import typical_first
    from totalfast.batch.remote_manifest import opened_manifest
    from totalfast.batch.shared_queue import SharedQueue

    parent = SharedQueue.of_parent()
    part = (args.part_id, args.num_parts)
    with opened_manifest(args.output, _changing(args, keywords), part=part) as manifest:
        if parent is not None:
            _segment(args, keywords, parent.cases(), manifest, parent)
            return 0
        found = _find(args, manifest)
        cases = part_of(found.cases, *part)
        waiting = manifest.waiting(cases)
        done = len(cases) - len(waiting)
        _tell(
            args,
            _count(len(cases)) + (f", {done} of them already done" if done else ""),
            {
                "event": "cases",
                "cases": len(cases),
                "done": done,
                "left_out": [str(line) for line in found.left_out],
            },
        )
        last = _segment(args, keywords, typical_first(waiting), manifest, None)
        try:
            with manifest.summing_up() as entries:
                _write_table(args, options, manifest, entries)
                _write_report(args, manifest, entries, done)
        finally:
            code = _end(args, last, len(cases))
    return code


def _check(args: argparse.Namespace) -> None:
    from totalfast.batch.shared_queue import SharedQueue

    if not 0 <= args.part_id < args.num_parts:
        raise OptionError(f"--part-id must be from 0 to {args.num_parts - 1}, not {args.part_id}.")
    if args.retries < 0:
        raise OptionError(f"--retries must be 0 or more, not {args.retries}.")
    if args.workers is not None and args.workers < 1:
        raise OptionError(f"--workers must be 1 or more, not {args.workers}.")
    if args.num_parts > 1 and len(_devices(args)) > 1 and SharedQueue.of_parent() is None:
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
    if args.engine == "ray" and not isinstance(args.output, Path):
        raise OptionError(f"--engine ray can't write to {args.output}; name a folder with -o.")
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
        from totalfast.batch.table import check_table

        check_table(args.table)


def _is_same_folder(scans: Place, output: Place) -> bool:
    if isinstance(scans, Path) and isinstance(output, Path):
        return scans.is_dir() and scans.resolve() == output.resolve()
    return str(scans).rstrip("/") == str(output).rstrip("/")


def _keywords(args: argparse.Namespace) -> dict[str, Any]:
    """Keywords of ``Session.segment``."""
    keywords = keywords_of(args, without=OWN)
    return keywords | {"completion_marker": True, "quiet": True, "device": _devices(args)[0]}


def _changing(args: argparse.Namespace, keywords: dict[str, Any]) -> dict[str, Any]:
    """Keywords that change results, where they differ from the defaults, and the tasks."""
    defaults = _keywords(build_parser().parse_args(["-i", "", "-o", ""]))
    changing = {
        name: value
        for name, value in keywords.items()
        if name not in SAME_RESULT and value != defaults[name]
    }
    return changing | {"task": args.task}


def _find(args: argparse.Namespace, manifest: Manifest) -> Found:
    """Find the cases; those of an earlier run keep their names."""
    from totalfast.batch.cases import find_cases

    found = find_cases(
        args.input,
        modality=args.modality,
        series_description=args.series_description,
        min_slices=args.min_slices,
        names=args.names,
        skip=args.output,
        earlier={(entry.source, entry.series): name for name, entry in manifest.entries().items()},
    )
    for line in found.left_out:
        logger.info("Left out: %s", line)
    return found


def _segment(
    args: argparse.Namespace,
    keywords: dict[str, Any],
    cases: Sequence[Case],
    manifest: Manifest,
    parent: SharedQueue | None,
) -> dict[str, Entry]:
    """Segment the cases that are not done: the last entry of each."""
    from totalfast.batch.progress import Meter, Ticker
    from totalfast.run.many import Running

    running: Running[Case] = Running()
    meter = Meter(cases, running)
    last: dict[str, Entry] = {}
    with ExitStack() as stack:
        if args.engine == "ray":
            entries = _ray_engine(args, keywords, manifest).run(cases, running)
        elif len(_devices(args)) > 1 and parent is None:
            entries = _workers(args, manifest).run(cases)
        else:
            batch = stack.enter_context(_batch(args, keywords, manifest))
            to_do = cases if parent is None else parent.take()
            entries = batch.run(to_do, running, _print_traceback if args.debug else None)
        stack.enter_context(closing(entries))
        show = stack.enter_context(_Bar(args, meter))
        stack.enter_context(Ticker(show, every_s=10.0 if args.json else 0.5))
        for entry in entries:
            last[entry.name] = entry
            meter.end(entry.name, failed=entry.error is not None, seconds=entry.seconds)
            state = meter.state()
            ended = "done" if entry.error is None else f"failed: {entry.error}"
            _tell(
                args,
                f"[{state.done}/{state.total}] {entry.name}: {ended} ({entry.total_s:.1f} s)",
                {"event": "case", **entry.to_json()},
            )
    return last


@contextmanager
def _batch(
    args: argparse.Namespace, keywords: dict[str, Any], manifest: Manifest
) -> Iterator[Batch]:
    """A batch in the threads of this process."""
    from totalfast.batch.attempts import Attempts
    from totalfast.batch.run import Batch
    from totalfast.session import Session, runs_at_a_time

    device = _devices(args)[0]
    with Session(device=device, follow_modality=True) as session:
        attempts = Attempts(
            session=session,
            folder=args.output,
            keywords=keywords,
            tasks=args.task,
            options=manifest.options_hash(),
            part=manifest.part,
        )
        yield Batch(
            attempts=attempts,
            manifest=manifest,
            retries=args.retries,
            at_a_time=args.at_a_time or runs_at_a_time(device),
        )


def _workers(args: argparse.Namespace, manifest: Manifest) -> Workers:
    """A batch in several processes of this machine."""
    from totalfast.batch.workers import Workers

    return Workers(
        words=args.words, devices=_devices(args), manifest=manifest, retries=args.retries
    )


def _ray_engine(
    args: argparse.Namespace, keywords: dict[str, Any], manifest: Manifest
) -> RayEngine:
    """A batch on the nodes of a Ray cluster."""
    from totalfast.batch.ray_engine import RayEngine, job_of

    return RayEngine(
        job=job_of(args.output, keywords, args.task, manifest, at_a_time=args.at_a_time),
        manifest=manifest,
        retries=args.retries,
        per_node=args.workers,
        address=args.ray_address,
    )


def _print_traceback(error: Exception) -> None:
    from tqdm import tqdm

    with tqdm.external_write_mode(file=sys.stderr):
        print("".join(traceback.format_exception(error)), end="", file=sys.stderr, flush=True)


def _devices(args: argparse.Namespace) -> list[str]:
    """The device of each worker."""
    name, _, numbers = args.device.partition(":")
    devices = [f"{name}:{number}" for number in numbers.split(",")] if numbers else [name]
    if args.workers is None:
        return devices
    return [devices[number % len(devices)] for number in range(args.workers)]


class _Bar:
    """Shows how far a batch is: a bar, JSON lines, or nothing."""

    def __init__(self, args: argparse.Namespace, meter: Meter) -> None:
        from tqdm import tqdm

        self._args, self._meter = args, meter
        self._bar: Any = tqdm(
            total=1.0,
            disable=args.quiet or args.json,
            leave=False,
            dynamic_ncols=True,
            bar_format="{percentage:3.0f}%|{bar}| {desc}",
        )

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def __call__(self) -> None:
        state = self._meter.state()
        if self._args.json:
            _print_json(
                {
                    "event": "progress",
                    "share": round(state.share, 4),
                    "done": state.done,
                    "failed": state.failed,
                    "cases": state.total,
                    "per_hour": state.per_hour,
                    "left_s": state.left_s,
                }
            )
            return
        self._bar.n = min(state.share, 1.0)
        self._bar.set_description_str(str(state), refresh=False)
        self._bar.refresh()


def _write_table(
    args: argparse.Namespace, options: Options, manifest: Manifest, entries: Mapping[str, Entry]
) -> None:
    if not options.statistics:
        return
    from totalfast.batch.entries import DONE
    from totalfast.batch.remote_cases import local_copy
    from totalfast.batch.table import StatisticsRows, write_table

    path = args.table or args.output / "statistics.csv"
    folders = [""] if len(args.task) == 1 else args.task
    files = {
        str(Path(name, folder)): manifest.folder / name / folder / "statistics.json"
        for name, entry in entries.items()
        if entry.state == DONE
        for folder in folders
    }
    manifest.bring(files.values())
    with local_copy(path) as file:
        write_table(file, StatisticsRows(files=files))
    logger.info("Statistics of all cases: %s", path)


def _write_report(
    args: argparse.Namespace, manifest: Manifest, entries: Mapping[str, Entry], done: int
) -> None:
    if args.report is None:
        return
    from totalfast.batch.remote_cases import local_copy
    from totalfast.batch.report import write_report

    with local_copy(args.report) as file:
        write_report(
            file,
            entries,
            manifest.folder,
            skipped=done,
            place=args.output,
            bring=manifest.bring,
        )
    logger.info("Report of the batch: %s", args.report)


def _end(args: argparse.Namespace, last: dict[str, Entry], cases: int) -> int:
    """Print the failed cases and the last line."""
    failed = [entry for entry in last.values() if entry.error is not None]
    for entry in failed:
        logger.info("Failed: %s: %s", entry.name, entry.error)
    _tell(
        args,
        f"Done: {cases - len(failed)} of {_count(cases)}, results in {args.output}"
        + (f"; {len(failed)} failed" if failed else ""),
        {"event": "end", "cases": cases, "failed": [entry.name for entry in failed]},
    )
    if failed and not args.json:
        print(f"ERROR: {len(failed)} of {_count(cases)} failed.", file=sys.stderr)
    return 1 if failed else 0


def _count(cases: int) -> str:
    return "1 case" if cases == 1 else f"{cases} cases"


def _tell(args: argparse.Namespace, line: str, event: dict[str, Any]) -> None:
    if args.json:
        _print_json(event)
    else:
        logger.info(line)


def _print_json(event: dict[str, Any]) -> None:
    print(json.dumps(event), flush=True)
