"""What a user can get wrong in the launch room."""


class LaunchError(ValueError):
    """A request that no machine could serve. The message is one line with names, numbers and what would be accepted."""

    exit_code = 2
