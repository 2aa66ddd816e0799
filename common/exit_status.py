"""Exit statuses by which a process tells its supervisor that starting it again would not help."""

USAGE = 2
"""The configuration is invalid."""

CANNOT_START = 3
"""The configuration is valid and this machine cannot run it: no such device, or less memory than the budget."""
