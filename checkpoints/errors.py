"""What a user can get wrong in the checkpoints room."""


class CheckpointError(ValueError):
    """A checkpoint that is absent, incomplete or of another model. The message is one line that a user can act on."""

    exit_code = 2
