"""What a user can get wrong in the parallel room."""


class PlanError(ValueError):
    """A model or mesh that cannot be built as asked. The message is one line that a user can act on."""

    exit_code = 2
