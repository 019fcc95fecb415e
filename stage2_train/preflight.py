"""Find what training would refuse in a config and its model, before any cost: `vstar` and `forecast` report it.

Reads no weights, and needs no library that only training needs.
"""

from collections.abc import Iterator
from pathlib import Path

from common.data.datasets import read_rows
from common.data.files import local_files
from common.errors import UserError
from stage2_train.config import Config
from stage2_train.objectives.protocol import TrainsCritic


def refuse_uneven_split(config: Config, processes: int) -> None:
    """Raise UserError unless each process trains on equally many completions of an optimizer step."""
    if config.train.mini_batch_size % processes:
        raise UserError(
            f"train.mini_batch_size {config.train.mini_batch_size} cannot be split evenly over {processes} processes; "
            "choose a multiple of their number"
        )


def refuse_first(config: Config, folder: Path) -> None:
    """Raise UserError for the first thing that training refuses."""
    for problem in _problems(config, folder):
        raise problem


def foresight(config: Config, folder: Path) -> list[str]:
    """One line for each thing that training will refuse, or will leave unchanged."""
    if problems := list(_problems(config, folder)):
        return [f"`train` will refuse this: {problem}" for problem in problems]
    return remarks(config, folder)


def remarks(config: Config, folder: Path) -> list[str]:
    """One line for each thing that training unexpectedly leaves unchanged."""
    if config.train.lora is None:
        return []
    from common.model.pretrained import empty_causal_lm
    from stage2_train.adapted_layers import unadapted

    names = sorted(unadapted(empty_causal_lm(folder)))
    return (
        [f"train.lora: weights called {', '.join(names)} get no adapter and stay as they are"]
        if names
        else []
    )


def _problems(config: Config, folder: Path) -> Iterator[UserError]:
    yield from _settings(config)
    for check in (_layers, _critic, _engine, _held_out):
        try:
            check(config, folder)
        except UserError as error:
            yield error


def _settings(config: Config) -> Iterator[UserError]:
    if config.sampling.temperature == 0:
        yield UserError("sampling.temperature is 0: training needs a policy that samples; set it above 0")
    for key, value in config.sampling.cut_by.items():
        yield UserError(
            f"sampling.{key} is {value:g}: completions would not come from the policy whose log-probs are trained on; "
            "leave it out to train"
        )


def _layers(config: Config, folder: Path) -> None:
    if config.train.lora is not None:
        from stage2_train.adapted_layers import refuse_unknown_layers

        refuse_unknown_layers(folder, config.train.lora)


def _engine(config: Config, folder: Path) -> None:
    if (size := config.engine.training_tensor_parallel_size) > 1:
        from common.engines.shared_engine import refuse_wrong_size

        refuse_wrong_size(size, size, folder)


def _held_out(config: Config, folder: Path) -> None:
    """Checks files on this machine only; a data set of the hub is looked up when it is used."""
    data = config.held_out
    if data is not None and data.path and local_files(data) is not None:
        read_rows(data, config)


def _critic(config: Config, folder: Path) -> None:
    if isinstance(config.train.objective, TrainsCritic):
        from common.model.pretrained import token_classifier

        token_classifier(folder)
