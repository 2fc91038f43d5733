"""Debian's programs that a private cluster needs, and the packages to install for them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence

import pytest

PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
"""Daemons are in /usr/sbin, which is not on every user's path."""

PACKAGES = {
    "munged": "munge",
    "mariadbd": "mariadb-server",
    "mariadb-install-db": "mariadb-server",
    "slurmctld": "slurm-wlm",
    "slurmd": "slurm-wlm",
    "srun": "slurm-wlm",
    "slurmdbd": "slurmdbd",
    "mpirun": "openmpi-bin",
    "setpriv": "util-linux",
}
"""Program → the Debian package that has it. (slurmdbd also needs slurm-wlm-mysql-plugin.)"""


def missing_packages() -> list[str]:
    """The packages that must be installed before a cluster can start."""
    missing = [pack for name, pack in PACKAGES.items() if shutil.which(name, path=PATH) is None]
    return sorted({*missing, *(["slurm-wlm-mysql-plugin"] if "slurmdbd" in missing else [])})


def skip_without(packages: Sequence[str], how: str = "apt-get install") -> None:
    """Skips the test if any packages are missing; fails on CI, which has them installed."""
    if not packages:
        return
    hint = f"{how} {' '.join(packages)}"
    if os.environ.get("CI") == "true":
        pytest.fail(f"CI lacks a requirement of this test: {hint}")
    pytest.skip(f"needs Slurm's programs: {hint}")
