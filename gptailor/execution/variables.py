"""Names in the environment through which a job's supervisor and its search talk to each other.

Like the supervisor, for any Python 3 without packages.
"""

EXIT_CODE_FILE = "GPTAILOR_VERDICT"
"""A file on the machine of rank 0, for the exit code that the search means."""

GAINED = "GPTAILOR_GAINED"
"""A file on the machine of rank 0 with a byte for each thing that the search put into its archive
in this turn of the job, however often its step was started."""

ENDS_AT = "GPTAILOR_ENDS_AT"
"""Unix time in seconds at which the job is killed: so long the search may wait for what runs."""
