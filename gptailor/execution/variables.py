"""Environment variables through which a job's supervisor and its search communicate.

Like the supervisor, this runs on any Python 3 without packages.
"""

EXIT_CODE_FILE = "GPTAILOR_VERDICT"
"""Path of a file on rank 0's machine for the search's intended exit code."""

GAINED = "GPTAILOR_GAINED"
"""Path of a file on rank 0's machine with one byte for each result that the search put into its
archive in this turn of the job, however often its step was started."""

ENDS_AT = "GPTAILOR_ENDS_AT"
"""Unix time in seconds at which the job is killed, which limits how long the search may wait."""
