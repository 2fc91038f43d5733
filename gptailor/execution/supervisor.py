"""Batch scripts start the supervisor by this name: `python3 -m gptailor.execution.supervisor`.

Users' copies of the scripts depend on it; the program itself is
`gptailor.execution.slurm.supervisor`.
"""

from __future__ import annotations

import sys

from gptailor.execution.slurm.supervisor import main

if __name__ == "__main__":
    sys.exit(main())
