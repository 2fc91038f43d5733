"""The command line of each verb: its arguments, and how its result is printed."""

from gptailor.commands import jobs, models, plans, runs
from gptailor.commands.command import Command

COMMANDS: dict[str, Command] = {
    **plans.COMMANDS,
    **runs.COMMANDS,
    **jobs.COMMANDS,
    **models.COMMANDS,
}
