"""Write a checkpoint as a Hugging Face folder, as training writes its last policy: on one process, without a GPU."""

import json
import re
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from common.errors import UserError, first_line
from common.files import file_digest, new_folder
from common.model.files import model_identity, resolve_model
from common.provenance import differences
from common.remote.copies import fetched, given
from common.runs import RunPaths, exclusive_run
from stage2_train.checkpoint import MANIFEST, POLICY, STATE, damage, read_state
from stage2_train.config import Config
from stage2_train.resume import with_defaults
from stage2_train.split import Split

CHECKPOINTS = "checkpoints"


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint of ours, perhaps a damaged one."""
    is_named = re.fullmatch(r"iteration-\d+", folder.name) is not None
    return is_named and folder.absolute().parent.name == CHECKPOINTS


def loadable_model(model: str | Path) -> Path:
    """The folder of a model given as a name on the hub, a folder or a checkpoint of ours.

    A checkpoint is exported to artifacts/<run>/exported/<iteration>, unless that holds it already. Raises UserError.
    """
    checkpoint = given(str(model))
    if not is_checkpoint(checkpoint):
        return resolve_model(str(model), None)
    run = run_of(checkpoint)
    _refuse_missing(checkpoint)
    folder = run.exported(int(checkpoint.name.removeprefix("iteration-")))
    with exclusive_run(run, "export"):
        if not _is_export_of(folder, checkpoint):
            _refuse_damaged(checkpoint)
            _write(checkpoint, folder)
    return folder


def export_checkpoint(checkpoint: Path, output: Path) -> None:
    """Write a checkpoint to a new folder, whole or not at all. Raises UserError."""
    if output.exists() or output.is_symlink():
        raise UserError(f"{output} exists; give the path of a new folder, or remove it")
    if not is_checkpoint(checkpoint):
        raise UserError(
            f"{checkpoint} is not a checkpoint: give a folder artifacts/<run>/{CHECKPOINTS}/iteration-… as `train` "
            "writes it"
        )
    _refuse_missing(checkpoint)
    _refuse_damaged(checkpoint)
    _write(checkpoint, output)


def run_of(checkpoint: Path) -> RunPaths:
    """The run that a checkpoint is in."""
    return RunPaths(fetched(checkpoint.absolute().parent.parent))


def _is_export_of(folder: Path, checkpoint: Path) -> bool:
    try:
        exported = json.loads((folder / RunPaths.TRAINED_WITH).read_bytes())["checkpoint"]
        return bool(exported == file_digest(checkpoint / MANIFEST))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _refuse_missing(checkpoint: Path) -> None:
    if not checkpoint.is_dir():
        raise UserError(f"there is no checkpoint {checkpoint}; check the path")


def _refuse_damaged(checkpoint: Path) -> None:
    """Raise UserError unless the policy's files are there and as they were written."""
    if found := damage(checkpoint, [STATE, f"{POLICY}/"]):
        raise UserError(f"{checkpoint} is damaged: {found}; export another checkpoint")


def _write(checkpoint: Path, folder: Path) -> None:
    state = read_state(checkpoint)
    config, run = _config_of(checkpoint, state), run_of(checkpoint)
    reference = resolve_model(config.model.path.replace("{run}", str(run.root)), config.model.revision)
    made_with = state.get("made_with", {})
    known = made_with.get("model") or state["origin"].get("identity", {}).get("model")
    _refuse_other_reference(reference, known, run)
    from stage2_train.card import CARD, Trained, evaluations_of
    from stage2_train.exported import broken_weight, refuse_broken
    from stage2_train.learner import saved_weights
    from stage2_train.network import Network

    network = Network(reference, config)
    try:
        weights = saved_weights(checkpoint, POLICY)
    except OSError as error:  # a training run may drop the checkpoint meanwhile
        raise UserError(
            f"cannot read {checkpoint}: {first_line(error)}; export another checkpoint"
        ) from error
    try:
        network.load(weights)
    except UserError as error:
        raise UserError(f"{checkpoint}: {error}") from error
    del weights
    trained = dict(network.named_weights())
    refuse_broken(broken_weight(trained), "train.learning_rate")
    number = state["iteration"]
    is_exported = _is_export_of(run.exported(number), checkpoint)
    figures = evaluations_of(run, number, is_exported=is_exported)
    card = Trained.of(run, config, number, made_with, figures)
    record = {
        "iterations": number,
        "origin": state["origin"],
        "checkpoint": file_digest(checkpoint / MANIFEST),
    }
    with new_folder(folder) as temporary:
        network.write(temporary, trained, dict(network.adapter_weights()))
        (temporary / CARD).write_text(card.card(), encoding="utf-8")
        (temporary / RunPaths.TRAINED_WITH).write_text(json.dumps(record, indent=2), encoding="utf-8")


def _config_of(checkpoint: Path, state: dict[str, Any]) -> Config:
    """The settings that a checkpoint was made with; those that do not change its training have their defaults."""
    settings = with_defaults(state["origin"])["config"]
    settings["train"]["zero_stage"] = Split.of(state).zero_stage
    try:
        return Config.model_validate({**settings, "run": run_of(checkpoint).root.name})
    except ValidationError as error:
        raise UserError(
            f"{checkpoint} was made with settings that this version does not read ({first_line(error)}); export it "
            "with the version that made it"
        ) from error


def _refuse_other_reference(reference: Path, expected: dict[str, Any] | None, run: RunPaths) -> None:
    """Raise UserError unless the reference is the model that the checkpoint was trained from; None is not recorded."""
    if expected is None:
        return
    if found := differences(model_identity(reference, run.known_weights), expected, "model."):
        raise UserError(
            f"{reference} is not the model that the checkpoint was trained from: {'; '.join(found.values())}; bring "
            "that model back"
        )
