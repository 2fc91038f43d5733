"""The name by which batch scripts start the supervisor: `python3 -m gptailor.execution.supervisor`.

Scripts that people have copied say so; the program itself is `gptailor.execution.slurm.supervisor`.
"""

from __future__ import annotations

import sys

from gptailor.execution.slurm.supervisor import main

if __name__ == "__main__":
    sys.exit(main())
