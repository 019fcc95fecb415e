"""What `compare` and `rounds` have in common: steps, each a command of the command line in a process of its own."""

from common.files import discard
from common.runs import RunPaths

BY_SEVERAL = ("critic", "train")
"""The commands that several processes can do together."""
REMEDY = "remove it: the step is then repeated"
"""What to do about the damaged record of a step."""


def remove_result(command: str, paths: RunPaths) -> None:
    """Remove what `critic` or `advantages` has made in a run whose step has no record of its cost.

    The command would find it complete, and the step would cost next to nothing.
    """
    if command == "critic":
        discard(paths.critic)
    if command == "advantages":
        discard(paths.advantages)


def remove_checkpoints(paths: RunPaths) -> None:
    """Remove the checkpoints of a training that has ended; a large model's take most of the disk."""
    discard(paths.checkpoints)
