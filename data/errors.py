"""The one exception of this room for mistakes that a user can correct."""


class DataError(ValueError):
    """A data set, shard, index or setting that cannot be used as it is.

    The message is one line: what is wrong (names, numbers) and what would be accepted. A command line prints it
    without a traceback and exits with `exit_code`.
    """

    exit_code = 2
