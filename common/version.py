"""The version of the installed distribution."""

from importlib.metadata import PackageNotFoundError, version


def package_version() -> str:
    """Return the version, or "unknown" when the code runs from a source tree that is not installed."""
    try:
        return version("repertory")
    except PackageNotFoundError:
        return "unknown"
