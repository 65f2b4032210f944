"""Compare ``totalfast nnunet`` and ``ArgmaxPredictor`` with several versions of nnU-Net.

    python scripts/nnunet_versions.py --json scripts/results/nnunet_versions.json [VERSION ...]

For each version of nnunetv2, an environment is made that has this version and those of nnU-Net's
four helper packages that it requires. All other packages, torch among them, are those of the
environment that runs this script; it needs pytest. There the tests of ``TESTS`` run: they compare
labels and files with those of that version's own nnU-Net, on small synthetic models. The exit code
is 1 if a supported version fails or an unsupported one is not refused.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

from packaging.requirements import Requirement
from readme import write_table

from totalfast.models.nnunet_versions import OLDEST, TESTED

ROOT = Path(__file__).resolve().parents[1]
TESTS = ("tests/parity/test_nnunet.py", "tests/unit/test_nnunet_versions.py")
VERSIONS = ("2.2.1", "2.3.1", "2.4.2", "2.5.2", "2.6.4", "2.7.0", "2.8.1")
"""The newest release of each minor version."""

HELPERS = (
    "acvl-utils",
    "batchgenerators",
    "batchgeneratorsv2",
    "dynamic-network-architectures",
)
"""Packages by nnU-Net's authors, which change with it."""

REFUSED = """
import sys
from pathlib import Path
from totalfast.errors import TotalfastError
from totalfast.models.loading import load_model
from totalfast.nnunet import export_prediction_from_logits
calls = {
    "load_model": lambda: load_model(Path("none"), folds=None, device=None),
    "export": lambda: export_prediction_from_logits(None, {}, None, None, {}, "none"),
}
for name, call in calls.items():
    try:
        call()
    except TotalfastError as error:
        if "is installed, but totalfast supports" not in str(error):
            sys.exit(f"{name}: {error}")
        message = error
    else:
        sys.exit(f"{name} is not refused")
print(message)
"""
"""What must be refused, with the same error."""


def main() -> int:
    """Test each version; write and print the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("versions", nargs="*", default=VERSIONS, metavar="VERSION")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--environments", type=Path, help="folder that keeps the environments")
    parser.add_argument("--tests", nargs="+", default=TESTS, help="other tests")
    parser.add_argument(
        "--readme", action="store_true", help="also write the table in scripts/results"
    )
    args = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory(prefix="nnunet") as temporary:
        folder = (args.environments or Path(temporary)).resolve()
        for version in args.versions:
            python = make_environment(folder / version, version)
            result = tested(python, args.tests) if is_supported(version) else refused(python)
            results.append({"version": version, **packages(python), **result})
            print(json.dumps(results[-1]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    if args.readme:
        write_table(Path(__file__).name, table(results))
    return 0 if all(result["failed"] == 0 for result in results) else 1


def table(results: list[dict[str, Any]]) -> str:
    """Return the results of all versions as Markdown."""
    lines = [
        "| nnunetv2 | tests: passed | failed | skipped | compared voxels | differing voxels |",
        "|---|---|---|---|---|---|",
    ]
    for row in results:
        cells = [row["version"]]
        if "differing_voxels" in row:
            cells += [str(row[key]) for key in ("passed", "failed", "skipped")]
            cells += [f"{row[key]:,}" for key in ("compared_voxels", "differing_voxels")]
        else:
            cells += ["refused" if row["failed"] == 0 else "not refused", "", "", "", ""]
        lines.append(f"| {' | '.join(cells)} |")
    first = results[0]
    lines += ["", f"On the CPU, torch {first['torch']}, numpy {first['numpy']}."]
    return "\n".join(lines) + "\n"


def is_supported(version: str) -> bool:
    """Whether totalfast says that it supports a version."""
    number = tuple(int(part) for part in re.findall(r"\d+", version)[:3])
    return number >= OLDEST and number[:2] <= TESTED


def make_environment(folder: Path, version: str) -> Path:
    """Make an environment for a version unless it exists; return its Python."""
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if python.exists():
        return python
    venv.create(folder, symlinks=os.name != "nt")
    own = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    # The own packages come first in sys.path, because those of .pth files are appended.
    (own / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install(python, f"nnunetv2=={version}")
    install(python, *required_helpers(own))
    return python


def install(python: Path, *requirements: str) -> None:
    """Install packages without what they require, also if the other environment has them."""
    pip = (sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet")
    subprocess.run([*pip, "--no-deps", "--ignore-installed", *requirements], check=True)


def required_helpers(site_packages: Path) -> list[str]:
    """Requirements of the installed nnunetv2 for the ``HELPERS``."""
    (metadata,) = site_packages.glob("nnunetv2-*.dist-info/METADATA")
    found = []
    for line in metadata.read_text(encoding="utf-8").splitlines():
        if line.startswith("Requires-Dist: "):
            requirement = Requirement(line.partition(": ")[2])
            if requirement.name.replace("_", "-") in HELPERS:
                found.append(str(requirement))
    return found


def packages(python: Path) -> dict[str, str]:
    """Versions of torch and of the helpers that a test runs with."""
    names = ("torch", "numpy", *HELPERS)
    code = (
        "import importlib.metadata as m, json, sys\n"
        "have = {d.name.replace('_', '-'): d.version for d in reversed(list(m.distributions()))}\n"
        "print(json.dumps({n: have[n] for n in sys.argv[1:] if n in have}))"
    )
    return dict(json.loads(run(python, "-c", code, *names).stdout))


def tested(python: Path, tests: list[str]) -> dict[str, Any]:
    """Run the tests; count them and the differing voxels."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        done = run(
            python,
            *("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow"),
            f"--junitxml={report}",
            *tests,
        )
        if not report.exists():
            return {"passed": 0, "failed": 1, "note": last_line(done)}
        cases = list(ET.parse(report).getroot().iter("testcase"))  # noqa: S314 - pytest's own file
    failed = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {
        "passed": len(cases) - len(failed) - skipped,
        "failed": len(failed),
        "skipped": skipped,
        "compared_voxels": total(cases, "voxels"),
        "differing_voxels": total(cases, "differing_voxels"),
        "note": "; ".join(case.get("name", "") for case in failed),
    }


def total(cases: list[ET.Element], name: str) -> int:
    """Sum of a property that the tests have recorded."""
    return sum(
        int(entry.get("value", ""))
        for case in cases
        for entry in case.iter("property")
        if entry.get("name") == name
    )


def refused(python: Path) -> dict[str, Any]:
    """Check that an unsupported version gives a clear error."""
    done = run(python, "-c", REFUSED)
    return {"passed": 0, "failed": int(done.returncode != 0), "note": last_line(done)}


def run(python: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run Python in an environment with this checkout's totalfast."""
    return subprocess.run(
        [python, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "default"},
        capture_output=True,
        text=True,
        check=False,
    )


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    """Last line of what a process has printed."""
    return (done.stdout + done.stderr).strip().rpartition("\n")[2]


if __name__ == "__main__":
    sys.exit(main())
