"""Exit statuses of a process that cannot be helped by starting it again, for its supervisor."""

USAGE = 2
"""The configuration is invalid."""

CANNOT_START = 3
"""The configuration is valid and this machine cannot run it: no such device, or less memory than the budget."""
