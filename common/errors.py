"""The exceptions that reach a user as a single line; everything else is our own defect."""


def first_line(error: BaseException) -> str:
    """The message of another library's exception, or its type if it has none, in one line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def cause(error: BaseException) -> str:
    """The type and message of another library's exception, at most three lines of it, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no reason given"]
    return f"{type(error).__name__}: {' '.join(lines[:3])}"


class UserError(ValueError):
    """An error that a user can cause: the message says what is wrong, what was found and what to do."""


class DamagedFile(UserError):
    """A file without the expected content: truncated, overwritten, or not ours."""


class RankLost(UserError):
    """Another process of a training job is gone; the message is for when that one could not say why."""


class EngineFailed(UserError):
    """A rollout engine failed while it sampled; another one may be built in its place."""
