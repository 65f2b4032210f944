"""``totalfast batch``: segment many scans, with the flags of a single run."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import traceback
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from totalfast.cli.batch_flags import OWN, build_parser, check_flags, devices_of
from totalfast.cli.console import configure_output, print_only_cases
from totalfast.cli.flags import keywords_of, tasks_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from totalfast.batch.cluster.engine import RayEngine
    from totalfast.batch.finding.cases import Case, Found
    from totalfast.batch.progress import Meter
    from totalfast.batch.results.entries import Entry
    from totalfast.batch.results.manifest import Manifest
    from totalfast.batch.run import Batch
    from totalfast.batch.shared_queue import SharedQueue
    from totalfast.batch.workers import Workers
    from totalfast.options import Options

logger = logging.getLogger(__name__)

SAME_RESULT = (
    "quiet", "verbose", "debug", "device", "max_memory_gb", "nr_thr_saving", "nr_thr_resamp",
    "offline", "license_number", "crop_path", "test", "completion_marker",
)  # fmt: skip
"""Flags that do not change results, so that a batch can go on with others."""


def run(args: argparse.Namespace) -> int:
    """Segment the cases; 1 if one failed."""
    configure_output(quiet=args.quiet or args.json, verbose=args.verbose)
    print_only_cases(verbose=args.verbose)
    args.task = tasks_of(args)
    check_flags(args)
    keywords = _keywords(args)
    from totalfast.batch.run import check

    options = check(keywords, args.task)
    from totalfast.batch.finding.cases import part_of
    from totalfast.batch.progress import typical_first
    from totalfast.batch.results.remote_manifest import opened_manifest
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


def _keywords(args: argparse.Namespace) -> dict[str, Any]:
    """Keywords of ``Session.segment``."""
    keywords = keywords_of(args, without=OWN)
    return keywords | {"completion_marker": True, "quiet": True, "device": devices_of(args)[0]}


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
    from totalfast.batch.finding.cases import find_cases

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
        elif len(devices_of(args)) > 1 and parent is None:
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

    device = devices_of(args)[0]
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
        words=args.words, devices=devices_of(args), manifest=manifest, retries=args.retries
    )


def _ray_engine(
    args: argparse.Namespace, keywords: dict[str, Any], manifest: Manifest
) -> RayEngine:
    """A batch on the nodes of a Ray cluster."""
    from totalfast.batch.cluster.engine import RayEngine, job_of

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
    from totalfast.batch.results.entries import DONE
    from totalfast.batch.results.table import StatisticsRows, write_table
    from totalfast.batch.transfers import local_copy

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
    from totalfast.batch.results.report import write_report
    from totalfast.batch.transfers import local_copy

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
