"""The words of each verb: its arguments, and how its result is printed."""

from gptailor.commands import models, runs
from gptailor.commands.command import Command

COMMANDS: dict[str, Command] = {**runs.COMMANDS, **models.COMMANDS}
