"""Names of the files and folders in a run folder."""

from __future__ import annotations

ARCHIVE = "archive.db"
"""Every evaluation (`run/archive.py`)."""

JOURNAL = "journal.jsonl"
"""What an island tells the others (`run/journal.py`)."""

CONFIG = "config.yaml"
"""The resolved configuration of the run."""

ENVIRONMENT = "environment.json"
"""Versions and machine."""

DTYPE = "dtype.json"
"""The dtype that all islands compute in (`run/dtype.py`)."""

ISLANDS = "islands"
"""`I/` for each island, with an archive and a journal."""

JOBS = "jobs"
"""A record for each Slurm job (`run/job_record.py`), and submitit's files."""

LOGS = "logs"
"""A log for each rank and for each Slurm job."""

RECIPES = "recipes"
"""`POINT.yaml` for each point of the front."""

FRONT_CSV, FRONT_JSON, FRONT_PNG = "front.csv", "front.json", "front.png"

PAGE = "report/index.html"
"""The report."""
