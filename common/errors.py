"""The error of a setting that cannot be used. Mesh and runtime end with exit status 2 and its text."""


class ConfigError(ValueError):
    """A flag, an environment variable or a field of a configuration file is invalid. The text names its source and its value."""

    @property
    def message(self) -> str:
        return str(self)
