"""The module with which batch scripts start the supervisor (`python3 -m …`).

People's copies of scripts use this name; the program itself is
`gptailor.execution.slurm.supervisor`.
"""

from __future__ import annotations

import sys

from gptailor.execution.slurm.supervisor import main

if __name__ == "__main__":
    sys.exit(main())
