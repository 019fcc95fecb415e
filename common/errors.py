"""The exceptions that reach a user as a single line; everything else is our own defect."""


def first_line(error: BaseException) -> str:
    """What an exception of another library says, or where that is nothing what it is, in one line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def cause(error: BaseException) -> str:
    """What kind of exception of another library it is and what it says, at most three lines of that, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no reason given"]
    return f"{type(error).__name__}: {' '.join(lines[:3])}"


class UserError(ValueError):
    """What a user can cause: the message says what is wrong, what was found and what to do."""


class DamagedFile(UserError):
    """A file that cannot be read as what it should be: truncated, overwritten, or not ours."""


class EngineFailed(UserError):
    """A rollout engine that has failed while it sampled; another one may be built in its place."""
