"""Check which packages are installed, before anything heavy loads."""

import importlib.util

from common.errors import UserError


def is_installed(package: str) -> bool:
    """Whether a package can be imported; a mere folder of that name, such as W&B's output, does not count."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def refuse_missing(package: str, why: str, remedy: str) -> None:
    """Raise UserError unless a package is installed; `why` names its user, `remedy` is the command to install it."""
    if not is_installed(package):
        raise UserError(f"{why} but {package} is not installed: {remedy}")
