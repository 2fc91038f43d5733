"""What gptailor does, one function for each verb of the command line, with the same words.

Heavy imports happen inside the functions, so that a verb pays only for what it uses.
"""

from gptailor.verbs.checks import check
from gptailor.verbs.jobs import cancel, launch, status
from gptailor.verbs.models import calibrate, evaluate, stitch
from gptailor.verbs.plans import plan, prefetch
from gptailor.verbs.runs import demo, report, search

__all__ = [
    "calibrate",
    "cancel",
    "check",
    "demo",
    "evaluate",
    "launch",
    "plan",
    "prefetch",
    "report",
    "search",
    "status",
    "stitch",
]
