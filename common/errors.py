"""The exceptions that reach a user as a single line; everything else is our own defect."""


def first_line(error: BaseException) -> str:
    """What an exception of another library says, or where that is nothing what it is, in one line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class UserError(ValueError):
    """What a user can cause: the message says what is wrong, what was found and what to do."""


class DamagedFile(UserError):
    """A file that cannot be read as what it should be: truncated, overwritten, or not ours."""
