"""``totalfast weights``: list, download, verify and import TotalSegmentator's models."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from totalfast import upstream
from totalfast.cli.console import configure_output
from totalfast.errors import OptionError, WeightsError
from totalfast.models.catalogue import all_uses, models_by_id, select
from totalfast.models.weights import is_offline
from totalfast.weights.condition import Condition, inspect

if TYPE_CHECKING:
    from totalfast.models.catalogue import Use
    from totalfast.weights.condition import Finding
    from totalfast.weights.official_model import OfficialModel

ABOUT = """\
Manage TotalSegmentator's models on this machine. A run downloads what is missing; these commands
are for machines without internet access, for images of containers, and to check the files.

The models are in the folder that 'totalfast weights path' prints. TOTALSEG_WEIGHTS_PATH, or
TOTALSEG_HOME_DIR, sets it."""

EXAMPLES = """\
examples:
  totalfast weights list total                what 'total' needs, and what is there
  totalfast weights download total            all that 'totalfast -ta total' needs
  totalfast weights download total --fast     its 3 mm model
  totalfast weights download --all            all models that need no licence number
  totalfast weights verify                    compare all files with what was unpacked
  totalfast weights import Dataset297_TotalSegmentator_total_3mm_1559subj.zip

without internet access:
  Download the zip file on another machine, from the address that 'list --json' gives, and import
  it. Or copy the folder of the weights. TOTALFAST_OFFLINE=1, or --offline of the main command,
  forbids downloads.

environment:
  TOTALFAST_WEIGHTS_MIRROR     URL that replaces TotalSegmentator's release page; below it,
                               VERSION/DatasetNNN_NAME.zip must be found. Models that need a
                               licence number always come from TotalSegmentator's server.
  TOTALFAST_DOWNLOAD_STALL_S   seconds without data until a connection is given up (30)
  HTTPS_PROXY, NO_PROXY, REQUESTS_CA_BUNDLE
                               proxy and certificates, as for other programs"""

TASK_OR_ID = "A task, such as total, or a model's number, such as 297."


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the subcommand."""
    parser = argparse.ArgumentParser(
        prog="totalfast weights",
        description=ABOUT,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="Show the traceback of an error.")
    resolution = argparse.ArgumentParser(add_help=False)
    resolution.add_argument("models", nargs="*", metavar="TASK", help=TASK_OR_ID)
    resolution.add_argument("--fast", action="store_true", help="The tasks' 3 mm models.")
    resolution.add_argument("--fastest", action="store_true", help="The tasks' 6 mm models.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    add = commands.add_parser(
        "list",
        parents=[common],
        help="Which models each task needs, and which are there.",
        description="List the models of each task and whether they are whole, incomplete, changed "
        "or missing.",
    ).add_argument
    add("models", nargs="*", metavar="TASK", help=f"{TASK_OR_ID} All tasks, if none is given.")
    add("--json", action="store_true", help="Print JSON, with sizes in bytes and addresses.")

    download = commands.add_parser(
        "download",
        parents=[common, resolution],
        help="Download models.",
        description="Download the models that tasks need, unless they are whole. An interrupted "
        "download is continued by the same command.",
    )
    add = download.add_argument
    add("--all", action="store_true", help="All models that need no licence number.")
    add("--force", action="store_true", help="Replace whole models, too.")
    add("-q", "--quiet", action="store_true", help="Print nothing but errors.")

    add = commands.add_parser(
        "verify",
        parents=[common, resolution],
        help="Check the files of models.",
        description="Hash all files and compare them with the manifest that was written when they "
        "were unpacked. Models that TotalSegmentator unpacked have none: their files must be there "
        "and not cut off. Without a task, all models that are there are checked. The exit code is "
        "1 if a model is damaged, or a named one is missing.",
    ).add_argument
    add(
        "--record",
        action="store_true",
        help="Write a manifest for whole models that have none, from their present files.",
    )

    add = commands.add_parser(
        "import",
        parents=[common],
        help="Unpack a zip file from TotalSegmentator's release page.",
        description="Unpack zip files of models, for machines without internet access. The folder "
        "in the zip file tells which model it is.",
    ).add_argument
    add("files", nargs="+", type=Path, metavar="FILE.zip", help="Zip file of one model.")
    add("--force", action="store_true", help="Replace a whole model, too.")

    commands.add_parser(
        "path", parents=[common], help="Print the folder of the weights.", description="Print it."
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Run one of the commands."""
    commands = {
        "list": list_models,
        "download": download_models,
        "verify": verify_models,
        "import": import_models,
        "path": print_path,
    }
    return commands[args.command](args)


def list_models(args: argparse.Namespace) -> int:
    """Print a table, or JSON, of tasks, models and their condition."""
    for word in args.models:
        select([word], fast=False, fastest=False)  # an unknown word is an error
    uses = [
        use
        for use in all_uses()
        if not args.models or {use.task, str(use.model.model_id)} & set(args.models)
    ]
    findings = {use.model: _inspect(use.model) for use in uses}
    sizes = {model: _size(model.dataset) for model in findings}
    if args.json:
        rows = [_as_json(use, findings[use.model], sizes[use.model]) for use in uses]
        print(json.dumps({"folder": str(upstream.weights_home()), "models": rows}, indent=1))
        return 0
    before = ""
    for use in uses:
        name = f"{use.task} {use.flag}".strip()
        print(_row("" if name == before else name, use, findings[use.model], sizes[use.model]))
        before = name
    whole = [m for m, finding in findings.items() if finding.condition is Condition.WHOLE]
    total = sum(sizes[model] for model in whole)
    print(
        f"{len(whole)} of {len(findings)} models are whole, {total / 1e6:.0f} MB, "
        f"in {upstream.weights_home()}"
    )
    return 0


def _row(name: str, use: Use, finding: Finding, size: int) -> str:
    note = finding.detail
    if finding.condition is Condition.MISSING and _public_url(use.model) is None:
        licensed = upstream.is_licensed_model(use.model.model_id)
        note = "needs a licence number" if licensed else "no download is offered"
    size_text = f"{size / 1e6:.0f} MB" if size else ""
    return (
        f"{name:<30} {use.model.model_id:>4}  {finding.condition.value:<11}{size_text:>8}  "
        f"{use.model.dataset.name}{f' ({note})' if note else ''}"
    )


def _as_json(use: Use, finding: Finding, size: int) -> dict[str, object]:
    return {
        "task": use.task,
        "flag": use.flag,
        "model": use.model.model_id,
        "condition": finding.condition.value,
        "detail": finding.detail,
        "bytes": size,
        "folder": str(use.model.dataset),
        "licensed": upstream.is_licensed_model(use.model.model_id),
        "url": _public_url(use.model),
    }


def _public_url(model: OfficialModel) -> str | None:
    """Address of a model's zip file; None if it needs a licence number or is not offered."""
    if upstream.is_licensed_model(model.model_id):
        return None
    request = upstream.weights_request(model.model_id)
    return None if request is None else request.url


def download_models(args: argparse.Namespace) -> int:
    """Download the models that are not whole."""
    from totalfast.weights.install import download

    if args.all == bool(args.models):
        raise OptionError("give tasks or numbers of models, or --all; not both.")
    if is_offline():
        raise OptionError("TOTALFAST_OFFLINE forbids downloads.")
    models = (
        [model for model in models_by_id().values() if _public_url(model) is not None]
        if args.all
        else select(args.models, fast=args.fast, fastest=args.fastest)
    )
    configure_output(quiet=args.quiet, verbose=False)
    done = [download(model, quiet=args.quiet, force=args.force) for model in models]
    if not args.quiet:
        print(
            f"Done: {sum(done)} models downloaded, {len(done) - sum(done)} were there already, "
            f"in {upstream.weights_home()}"
        )
    return 0


def verify_models(args: argparse.Namespace) -> int:
    """Check the files of models; print a line for each."""
    named = select(args.models, fast=args.fast, fastest=args.fastest)
    models = named or [m for m in models_by_id().values() if m.dataset.exists()]
    damaged = 0
    for model in models:
        faults, note = _verify(model, record_missing=args.record)
        damaged += bool(faults)
        result = f"DAMAGED: {', '.join(faults)}" if faults else f"whole ({note})"
        print(f"{model.model_id:>4}  {model.dataset.name}: {result}", flush=True)
    if damaged:
        raise WeightsError(
            f"{damaged} of {len(models)} models in {upstream.weights_home()} are damaged; "
            "'totalfast weights download --force NUMBER' replaces a model."
        )
    print(f"{len(models)} models are whole, in {upstream.weights_home()}")
    return 0


def _verify(model: OfficialModel, *, record_missing: bool) -> tuple[list[str], str]:
    """Return a model's faults, and how it was checked."""
    from totalfast.weights.install import record
    from totalfast.weights.manifest import DamagedManifestError, find_damage, read_manifest

    finding = _inspect(model)
    if finding.condition in (Condition.MISSING, Condition.OTHER):
        return [f"no {model.folder_name}"], ""
    try:
        manifest = read_manifest(model.dataset)
    except DamagedManifestError:
        return [finding.detail], ""
    if manifest is not None:
        faults = find_damage(model.dataset, manifest)
        return faults, f"{len(manifest.files)} files, unpacked {manifest.date[:10]}"
    if finding.condition is not Condition.WHOLE:
        return [finding.detail], ""
    if record_missing:
        record(model)
        return [], "manifest written"
    return [], "no manifest; no file is missing or cut off"


def import_models(args: argparse.Namespace) -> int:
    """Unpack zip files of models."""
    from totalfast.weights.install import import_zip
    from totalfast.weights.unpack import top_folders

    configure_output(quiet=False, verbose=False)
    models = {model.dataset.name: model for model in models_by_id().values()}
    for path in args.files:
        if not path.is_file():
            raise OptionError(f"{path} is no file.")
        tops = top_folders(path)
        known = [models[name] for name in tops if name in models]
        if len(known) != 1:
            raise WeightsError(
                f"{path} is no zip file of one of TotalSegmentator's models: it holds "
                f"{', '.join(tops[:5]) or 'nothing'}, and one folder such as "
                f"{next(iter(models))} was expected."
            )
        imported = import_zip(known[0], path, force=args.force)
        state = "imported" if imported else "there already, and whole; --force replaces it"
        print(f"model {known[0].model_id}: {state}: {known[0].dataset}")
    return 0


def print_path(args: argparse.Namespace) -> int:
    """Print the folder of the weights."""
    print(upstream.weights_home())
    return 0


def _inspect(model: OfficialModel) -> Finding:
    try:
        return inspect(model)
    except OSError as error:
        raise WeightsError(f"model {model.model_id} can't be read: {error}.") from error


def _size(folder: Path) -> int:
    """Size of a folder's files in bytes; 0 if it does not exist."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
