"""`totalfast cache`, and the cache of a run whose installation and home can't be written."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest

needs_openvino = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="OpenVINO is not installed"
)


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def run(standin_home, cache):
    def run_command(*arguments, **environment):
        return subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "totalfast", *map(str, arguments)],
            env={
                **os.environ,
                "TOTALSEG_HOME_DIR": str(standin_home),
                "TOTALFAST_CACHE_DIR": str(cache),
                **environment,
            },
            capture_output=True,
            text=True,
            check=False,
        )

    return run_command


@pytest.fixture
def scan(tmp_path):
    values = np.random.default_rng(0).normal(0, 300, (10, 8, 6)).astype(np.int16)
    path = tmp_path / "ct.nii.gz"
    nib.save(nib.Nifti1Image(values, np.diag([-6.0, 6.0, 6.0, 1.0])), path)
    return path


def entry(folder, name, size):
    (folder / name).mkdir(parents=True)
    (folder / name / "file").write_bytes(bytes(size))


def test_it_shows_where_and_how_much_and_the_limit(run, cache):
    entry(cache, "openvino-1", 2_000_000)
    entry(cache, "openvino-2", 3_000_000)
    entry(cache, "compiled-loops", 100_000)
    cache.chmod(0o700)
    done = run("cache", TOTALFAST_CACHE_MAX_GB="2.5")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"Cache folder: {cache}",
        "  networks converted for OpenVINO: 5.0 MB in 2 entries",
        "  compiled loops: 0.1 MB in 1 entries",
        "  networks compiled by torch: 0.0 MB in 0 entries",
        "Limit of the converted networks: 2.5 GB (TOTALFAST_CACHE_MAX_GB)",
    ]
    content = json.loads(run("cache", "--json").stdout)
    assert content["folder"] == str(cache)
    assert content["used"] is True
    assert content["limit_bytes"] == 10_000_000_000
    assert content["networks"] == {"entries": 2, "bytes": 5_000_000}


@pytest.mark.parametrize("words", [["clear"], ["--clear"], ["clear", "--json"]])
def test_clear_removes_all_that_is_totalfasts_and_nothing_else(run, cache, words):
    for name in ("openvino-1", "compiled-loops", "compiled-networks", ".old-1", "torch", "numba"):
        entry(cache, name, 1000)
    cache.chmod(0o700)
    done = run("cache", *words)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in cache.iterdir()) == ["numba", "torch"]
    if "--json" in words:
        assert json.loads(done.stdout)["freed_bytes"] == 3000


@pytest.mark.skipif(os.name != "posix", reason="Windows has other modes")
def test_a_folder_that_is_not_used_is_named_and_not_cleared(run, cache):
    entry(cache, "openvino-1", 1000)
    cache.chmod(0o777)
    shown, cleared = run("cache"), run("cache", "clear")
    assert shown.returncode == 0
    assert "other users can write to it (mode 777)" in shown.stdout
    assert cleared.returncode == 1
    assert "was not cleared" in cleared.stderr
    assert (cache / "openvino-1/file").exists()


def test_a_wrong_limit_is_an_error_in_one_line(run):
    done = run("cache", TOTALFAST_CACHE_MAX_GB="much")
    assert done.returncode == 2
    assert "TOTALFAST_CACHE_MAX_GB must be a number of GB" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_names_the_variables_and_imports_no_large_packages(run):
    done = run("cache", "--help")
    assert "TOTALFAST_CACHE_DIR" in done.stdout
    assert "TOTALFAST_CACHE_MAX_GB" in done.stdout
    code = (
        "import sys\nfrom totalfast.cli.main import main\nmain(['cache'])\n"
        "sys.exit(bool({'torch', 'numpy', 'numba'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@needs_openvino
def test_a_run_fills_the_cache_and_without_one_it_gives_the_same_labels(run, cache, scan, tmp_path):
    flags = ["-i", scan, "-ml", "--fastest", "-d", "cpu", "--backend", "openvino"]
    first = run(*flags, "-o", tmp_path / "first.nii.gz")
    assert first.returncode == 0, first.stderr
    assert json.loads(run("cache", "--json").stdout)["networks"]["entries"] == 1
    (tmp_path / "file").touch()
    second = run(
        *flags, "-o", tmp_path / "second.nii.gz", TOTALFAST_CACHE_DIR=str(tmp_path / "file")
    )
    assert second.returncode == 0, second.stderr
    assert second.stdout.count("is not used: it is not a folder") == 1
    labels = [nib.load(tmp_path / f"{name}.nii.gz").dataobj for name in ("first", "second")]
    np.testing.assert_array_equal(*labels)
