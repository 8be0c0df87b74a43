"""The exceptions of this room: mistakes that a user can correct, and samples that a run can do without."""


class DataError(ValueError):
    """A data set, shard, index or setting that cannot be used as it is.

    The message is one line: what is wrong (names, numbers) and what would be accepted. A command line prints it
    without a traceback and exits with `exit_code`.
    """

    exit_code = 2


class BadSampleError(DataError):
    """One sample cannot be read as its index says; a stream may put it into quarantine and go on.

    Attributes:
        reason: one of `REASONS`.
    """

    REASONS = ("unreadable", "truncated", "corrupt", "undecodable")

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
