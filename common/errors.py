"""The exceptions that reach a user as a single line; everything else is our own defect."""


class UserError(ValueError):
    """What a user can cause: the message says what is wrong, what was found and what to do."""


class DamagedFile(UserError):
    """A file that cannot be read as what it should be: truncated, overwritten, or not ours."""
