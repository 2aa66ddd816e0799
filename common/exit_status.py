"""Defines the exit statuses by which a supervisor recognises that restarting a process would not help."""

USAGE = 2
"""The configuration is invalid."""

CANNOT_START = 3
"""The configuration is valid and this machine cannot run it: no such device, or less memory than the budget."""
