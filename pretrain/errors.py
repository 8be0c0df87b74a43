"""What a user can get wrong in the pretrain room."""


class ConfigError(ValueError):
    """A configuration that cannot be run. The message is one line that names the key, the value and the file."""

    exit_code = 2
