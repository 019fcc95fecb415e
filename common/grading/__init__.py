"""The one grader that both stages use: rules, outcomes, and the worker processes that survive model output.

A rule is a pure function of (prompt, completion, answer); `GraderPool` runs it in processes that can be
killed. Names that need pydantic or threads load on first use: a worker imports this package too.
"""

from typing import TYPE_CHECKING, Any

from common.grading.outcome import OUTCOMES, UNJUDGED, Grade, Outcome, negative_rewards_warning, reward_of

if TYPE_CHECKING:
    from common.grading.config import GraderConfig, fingerprint
    from common.grading.graders import RULES, Grader, find_grader
    from common.grading.needs import row_needs
    from common.grading.pool import GraderPool, GradingTask

__all__ = [
    "OUTCOMES",
    "RULES",
    "UNJUDGED",
    "Grade",
    "Grader",
    "GraderConfig",
    "GraderPool",
    "GradingTask",
    "Outcome",
    "find_grader",
    "fingerprint",
    "negative_rewards_warning",
    "reward_of",
    "row_needs",
]

_HOME = {
    "GraderConfig": "config",
    "fingerprint": "config",
    "GraderPool": "pool",
    "GradingTask": "pool",
    "row_needs": "needs",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOME.get(name, 'graders')}"), name)
