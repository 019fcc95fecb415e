"""Checkpoints on disk: whole or absent, verified before they are used; the newest few and the best are kept.

    checkpoints/iteration-000050/
      state/          DeepSpeed's files of the policy: weights, optimizer and schedule
      critic/         the same for the critic, if the objective trains one
      state.json      the iteration, everything the run depends on, processes and ZeRO stage, the held-out accuracy
      rollouts.json   the batches drawn ahead for the next iterations, if train.staleness is not 0
      history.parquet each prompt's history, if the objective keeps one
      manifest.json   the SHA-256 of each of these files
    checkpoints/damaged/   checkpoints whose files do not match their manifest

Data order, rollout seeds and random states are functions of the config's seed and the iteration (`prompt_batch`,
`derive_seed`), so only the iteration's number is stored.
"""

import json
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from common.files import FILES_AT_A_TIME, discard, file_digest, sync, writing_to
from common.remote.copies import fetched, fetched_anew, forget, forget_unfinished, published_folder, renamed
from stage2_train.ranks import Ranks
from stage2_train.split import Split

if TYPE_CHECKING:
    from stage2_train.learner import Learner

POLICY = "state"
CRITIC = "critic"
"""The names of the parts that are trained, and their folders in a checkpoint."""
STATE = "state.json"
ROLLOUTS = "rollouts.json"
HISTORY = "history.parquet"
MANIFEST = "manifest.json"


def checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints in a folder, oldest first."""
    return sorted(folder.glob("iteration-*"))


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The state saved beside the weights; {} if it cannot be read, and `newest_intact` then says why."""
    try:
        state: dict[str, Any] = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return state


def latest_state(folder: Path) -> dict[str, Any]:
    """The state of the newest checkpoint, unverified; {} without one."""
    found = checkpoints(folder)
    return read_state(found[-1]) if found else {}


def write(
    folder: Path,
    state: dict[str, Any],
    parts: "Mapping[str, Learner]",
    ranks: Ranks,
    *,
    keep: int,
    rollouts: Sequence[Sequence[Sequence[dict[str, Any]]]] = (),
    history: pl.DataFrame | None = None,
) -> None:
    """Write folder/iteration-<n>, whole or not at all, and drop all but the newest `keep` and the best.

    A collective operation; `state`, `rollouts` and `history` are the main rank's. Raises UserError for a full disk.
    """
    temporary = ranks.from_main(_unfinished(folder, state["iteration"]) if ranks.is_main else folder)
    with writing_to(temporary):
        for name, learner in parts.items():
            learner.save(temporary, name)
        ranks.wait()
        if ranks.is_main:
            if rollouts:
                (temporary / ROLLOUTS).write_text(json.dumps(rollouts), encoding="ascii")
            if history is not None:
                history.write_parquet(temporary / HISTORY)
            _finish(temporary, state, keep)
    ranks.wait()


def load(checkpoint: Path, parts: "Mapping[str, Learner]", ranks: Ranks) -> None:
    """Load each part from what `write` saved; a collective operation.

    The files of another split are first converted into a temporary folder, one part after the other. Raises UserError
    for a full disk.
    """
    saved = Split.of(read_state(checkpoint))
    for name, learner in parts.items():
        if learner.split.reads(saved):
            learner.load(checkpoint, name)
            continue
        converted = ranks.once(partial(_convert, checkpoint, name, learner))
        learner.load(converted, name, is_converted=True)
        ranks.wait()
        if ranks.is_main:
            shutil.rmtree(converted)


def _convert(checkpoint: Path, name: str, learner: "Learner") -> Path:
    """A new folder with a part's files for any split, named so that `newest_intact` removes it after a kill."""
    converted = checkpoint.with_name(f".{checkpoint.name}-converted.tmp")
    shutil.rmtree(converted, ignore_errors=True)
    with writing_to(converted):
        converted.mkdir()
        learner.convert(checkpoint, name, converted)
    return converted


def read_rollouts(checkpoint: Path, group_size: int) -> list[list[list[dict[str, Any]]]]:
    """The batches that were waiting for their iteration, each as groups in order of its places.

    Checkpoints of older versions have no groups, but `group_size` completions for each place.
    """
    file = checkpoint / ROLLOUTS
    batches: list[list[Any]] = json.loads(file.read_bytes()) if file.exists() else []
    return [
        batch
        if isinstance(batch[0], list)
        else [batch[start : start + group_size] for start in range(0, len(batch), group_size)]
        for batch in batches
    ]


def read_history(checkpoint: Path) -> pl.DataFrame:
    """Each prompt's history."""
    return pl.read_parquet(checkpoint / HISTORY, glob=False)


def _unfinished(folder: Path, iteration: int) -> Path:
    """An empty folder to write a checkpoint's files to; `_finish` gives it its final name."""
    temporary = folder / f".iteration-{iteration:06d}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def _finish(temporary: Path, state: dict[str, Any], keep: int) -> None:
    """Write the manifest of `temporary` and give it its final name; drop all but `keep` and the best."""
    (temporary / STATE).write_text(json.dumps(state, indent=2), encoding="utf-8")
    (temporary / MANIFEST).write_text(json.dumps(_hashes(temporary), indent=2), encoding="utf-8")
    for path in (*temporary.rglob("*"), temporary):
        sync(path)
    folder = temporary.parent
    final = folder / f"iteration-{state['iteration']:06d}"
    with published_folder(temporary, final):
        temporary.rename(final)
    sync(folder)
    found = checkpoints(folder)
    for old in set(found[:-keep]) - {best(found)}:
        # Renamed first: a half deleted folder must not look like a checkpoint.
        gone = old.rename(old.with_name(f".{old.name}.tmp"))
        forget(old)
        shutil.rmtree(gone)


def best(found: list[Path]) -> Path | None:
    """The checkpoint with the highest held-out accuracy, the earliest of equals; None if none was evaluated."""
    accuracy = {checkpoint: read_state(checkpoint).get("held_out_accuracy") for checkpoint in found}
    evaluated = {checkpoint: value for checkpoint, value in accuracy.items() if value is not None}
    return max(evaluated, key=evaluated.__getitem__, default=None)


def newest_intact(folder: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose files match its manifest; damaged ones are moved aside and reported.

    Also removes half-written files of killed jobs. Only for the main rank.
    """
    for leftover in folder.glob(".iteration-*.tmp"):
        shutil.rmtree(leftover)
    forget_unfinished(folder)
    for checkpoint in reversed(checkpoints(folder)):
        if damage(checkpoint) is None or (found := damage(fetched_anew(checkpoint))) is None:
            return checkpoint
        aside = folder / "damaged" / checkpoint.name
        aside.parent.mkdir(exist_ok=True)
        discard(aside)
        checkpoint.rename(aside)
        renamed(checkpoint, aside)
        earlier = checkpoints(folder)
        then = f"continuing from {earlier[-1].name}" if earlier else "there is none before it: starting over"
        say(f"warning: {checkpoint} is damaged ({found}); it is now {aside}, {then}")
    return None


def damage(checkpoint: Path, parts: Collection[str] = ("",)) -> str | None:
    """The damage of a checkpoint's files, None if there is none; `parts` are the beginnings of the names to check."""
    fetched(checkpoint, whole=True)
    try:
        expected: dict[str, str] = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"{MANIFEST} is missing or cannot be read"
    expected = {name: digest for name, digest in expected.items() if name.startswith(tuple(parts))}
    found = _hashes(checkpoint, parts)
    for name, digest in expected.items():
        if name not in found:
            return f"{name} is missing"
        if found[name] != digest:
            return f"{name} has changed since it was written"
    return None


def _hashes(checkpoint: Path, parts: Collection[str] = ("",)) -> dict[str, str]:
    """The SHA-256 of each file but the manifest, by its path in the checkpoint, which begins with one of `parts`."""
    found = {
        str(path.relative_to(checkpoint)): path for path in sorted(checkpoint.rglob("*")) if path.is_file()
    }
    files = {name: path for name, path in found.items() if name != MANIFEST and name.startswith(tuple(parts))}
    with ThreadPoolExecutor(FILES_AT_A_TIME) as threads:
        return dict(zip(files, threads.map(file_digest, files.values()), strict=True))
