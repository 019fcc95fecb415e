"""The one exception that reaches a user as a single line; everything else is our own defect."""


class UserError(ValueError):
    """What a user can cause: the message says what is wrong, what was found and what to do."""
