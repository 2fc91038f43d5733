"""What a private cluster is started from: Debian's programs, and what to install without them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence

import pytest

PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
"""Daemons lie in /usr/sbin, which is not on every user's path."""

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
"""Program: the Debian package that brings it. (slurmdbd wants slurm-wlm-mysql-plugin, too.)"""


def missing_packages() -> list[str]:
    """The packages to install before a cluster can start."""
    missing = [pack for name, pack in PACKAGES.items() if shutil.which(name, path=PATH) is None]
    return sorted({*missing, *(["slurm-wlm-mysql-plugin"] if "slurmdbd" in missing else [])})


def skip_without(packages: Sequence[str], how: str = "apt-get install") -> None:
    """Skips the test if there are any; on CI, where they are installed, it fails instead."""
    if not packages:
        return
    hint = f"{how} {' '.join(packages)}"
    if os.environ.get("CI") == "true":
        pytest.fail(f"CI must have what this test needs: {hint}")
    pytest.skip(f"needs a Slurm to start: {hint}")
