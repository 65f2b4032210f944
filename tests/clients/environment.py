"""An environment for the clients: their packages, nnU-Net, and all packages of this environment.

The clients pin versions of torch and nnU-Net that exclude each other and this environment.
Therefore they are installed without their dependencies. MOOSE copies files into the folders of
MOOSE and of nnU-Net, so the environment has a copy of nnU-Net of its own.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import sysconfig
import venv
from importlib.metadata import distributions, version
from pathlib import Path

CLIENTS = ("HD_BET==2.0.1", "mrsegmentator==2.0.0", "moosez==3.2.2")
"""Installed without their dependencies."""

DEPENDENCIES = (
    *("colorama", "dask", "emoji", "halo", "matplotlib", "natsort", "pandas", "pyfiglet"),
    *("requests", "rich", "scikit-image"),
)
"""What the clients import and totalfast does not require."""

READY = "clients.txt"
"""File in the environment that lists the installed requirements; written last."""


class InstallError(Exception):
    """pip could not install the clients, most often because there is no package index."""


@dataclasses.dataclass(frozen=True)
class Environment:
    """A virtual environment with the clients."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def packages(self) -> Path:
        """Its folder site-packages."""
        schemes = {"base": str(self.folder), "platbase": str(self.folder)}
        return Path(sysconfig.get_path("purelib", "posix_prefix", schemes))

    def program(self, name: str) -> Path:
        """Path of a console script."""
        return self.folder / "bin" / name

    def versions(self) -> dict[str, str]:
        """Versions of the clients and of nnU-Net."""
        wanted = {requirement.partition("==")[0].lower() for requirement in CLIENTS} | {"nnunetv2"}
        installed = {
            found.metadata["Name"].replace("-", "_").lower(): found.version
            for found in distributions(path=[str(self.packages)])
        }
        return {name: installed[name] for name in sorted(wanted)}


def install(folder: Path, nnunet: str | None = None) -> Environment:
    """Return the environment in a folder; install it if it is not there.

    ``nnunet`` is a version of nnU-Net; None: the version of this environment.
    """
    environment = Environment(folder.absolute())
    own = (*CLIENTS, f"nnunetv2=={nnunet or version('nnunetv2')}")
    ready = environment.folder / READY
    if ready.exists() and ready.read_text().split() == list(own):
        return environment
    venv.EnvBuilder(with_pip=True, clear=True, symlinks=True).create(environment.folder)
    _share_packages(environment)
    constraints = environment.folder / "constraints.txt"
    constraints.write_text("".join(f"{line}\n" for line in _installed_here()))
    _pip(environment, "-c", str(constraints), *DEPENDENCIES)
    # Packages of this environment count as installed, but nnU-Net must be in the folder itself.
    _pip(environment, "--no-deps", "--ignore-installed", "--ignore-requires-python", *own)
    ready.write_text("".join(f"{line}\n" for line in own))
    return environment


def _share_packages(environment: Environment) -> None:
    """Let the environment import the packages of this one, after its own."""
    here = sysconfig.get_path("purelib")
    code = f"import site; site.addsitedir({here!r})\n"
    (environment.packages / "zz_packages_of_the_tests.pth").write_text(code)


def _installed_here() -> list[str]:
    """Requirements that keep the versions of the packages of this environment."""
    names = {found.metadata["Name"]: found.version for found in distributions()}
    return sorted(f"{name}=={number}" for name, number in names.items() if name != "totalfast")


def _pip(environment: Environment, *words: str) -> None:
    """Install packages."""
    command = [environment.python, "-m", "pip", "install", "--quiet", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip().splitlines() or ["no message"]
        message = f"pip can't install the clients into {environment.folder}: {reason[-1]}"
        raise InstallError(message)


if __name__ == "__main__":
    install(Path(sys.argv[1]), *sys.argv[2:3])
