"""Which packages are installed, asked before anything heavy loads."""

import importlib.util

from common.errors import UserError


def is_installed(package: str) -> bool:
    """Whether it can be imported; a mere folder of that name, such as the one that W&B leaves, is no package."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def refuse_missing(package: str, why: str, remedy: str) -> None:
    """Raise UserError unless it is installed; `why` says what needs it, `remedy` is the command that installs it."""
    if not is_installed(package):
        raise UserError(f"{why} but {package} is not installed: {remedy}")
