"""A model's weight files: those that the libraries load are read by their headers, hashed once, and must be whole."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from common.errors import UserError
from common.files import file_digest
from common.model import weights as module
from common.model.weights import INDEX, SINGLE, read_weights, weights_hash


def save(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    save_file(dict(tensors), path)


def sharded(folder: Path, shards: int = 3) -> Path:
    """A model of one tensor a shard."""
    folder.mkdir(exist_ok=True)
    names = {f"layers.{number}.weight": f"model-{number:05d}.safetensors" for number in range(shards)}
    for number, (tensor, file) in enumerate(names.items()):
        save(folder / file, {tensor: torch.full((2, 3), float(number))})
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))
    return folder


def test_the_files_that_the_index_names_are_the_model(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    save(folder / "consolidated.safetensors", {"tok_embeddings.weight": torch.zeros(100, 100)})
    weights = read_weights(folder)
    assert [file.name for file in weights.files] == [f"model-{number:05d}.safetensors" for number in range(3)]
    assert [file.name for file in weights.unread] == ["consolidated.safetensors"]
    assert dict(weights.shapes) == {f"layers.{number}.weight": (2, 3) for number in range(3)}
    assert weights.count(tied=False) == 18
    assert set(weights.formats.values()) == {"F32"}


def test_a_tied_output_layer_counts_once(tmp_path: Path) -> None:
    save(tmp_path / SINGLE, {"model.embed.weight": torch.zeros(5, 2), "lm_head.weight": torch.zeros(5, 2)})
    weights = read_weights(tmp_path)
    assert (weights.count(tied=False), weights.count(tied=True)) == (20, 10)


def test_folders_whose_weights_are_not_all_there_are_refused_by_what_is_missing(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "shard")
    (folder / "model-00001.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"lacks 1 of the 3 weight files that .*: model-00001\.safetensors; download"
    ):
        read_weights(folder)

    folder = sharded(tmp_path / "tensor")
    save(folder / "model-00001.safetensors", {"other": torch.zeros(1)})
    with pytest.raises(UserError, match=r"lack 1 tensors that .* names, such as layers\.1\.weight"):
        read_weights(folder)

    folder = sharded(tmp_path / "both")
    save(folder / SINGLE, {"old": torch.zeros(1)})
    with pytest.raises(UserError, match="would load different weights; remove the one"):
        read_weights(folder)

    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r"holds no \*\.safetensors weights; convert the model"):
        read_weights(tmp_path / "none")
    save(tmp_path / "none" / "policy.safetensors", {"a": torch.zeros(1)})
    with pytest.raises(
        UserError, match=r"weights that can be loaded: no .* names policy\.safetensors; convert"
    ):
        read_weights(tmp_path / "none")


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": "../b"}}', '{"weight_map": {}}']
)
def test_an_index_that_is_none_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(UserError, match="is not a list of weight files; download the model again"):
        read_weights(tmp_path)


def broken(folder: Path, kind: str) -> Path:
    file = sharded(folder) / "model-00002.safetensors"
    content = file.read_bytes()
    file.write_bytes(
        {
            "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
            "cut": content[: len(content) // 2],
            "cut tensors": content[:-1],
            "more": content + b"x",
            "empty": b"",
            "page": b"<html>404</html>" * 9,
            "header": (8).to_bytes(8, "little") + b"{not it}",
        }[kind]
    )
    return folder


@pytest.mark.parametrize("kind", ["cut", "cut tensors", "more", "empty", "page", "header"])
def test_a_file_that_is_no_whole_safetensors_file_is_named(tmp_path: Path, kind: str) -> None:
    with pytest.raises(
        UserError, match=r"model-00002\.safetensors is not a complete safetensors file .*download"
    ):
        read_weights(broken(tmp_path, kind))


def test_a_pointer_of_git_lfs_is_called_that(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"00002\.safetensors is a Git LFS pointer; .* `git lfs pull`"):
        read_weights(broken(tmp_path, "pointer"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_not_finite_is_found_wherever_it_is(
    tmp_path: Path, dtype: torch.dtype, wrong: float
) -> None:
    sound = torch.randn(7, 3).to(dtype)
    sound[0, 0] = torch.finfo(dtype).max
    save(tmp_path / SINGLE, {"a": sound, "b": sound * 0, "steps": torch.tensor([2**62])})
    weights_hash(read_weights(tmp_path))
    damaged = sound.clone()
    damaged[-1, -1] = wrong
    save(tmp_path / SINGLE, {"a": sound, "b": damaged})
    with pytest.raises(
        UserError, match=r"model\.safetensors: b holds NaN or infinity, so it can neither be sampled"
    ):
        weights_hash(read_weights(tmp_path))


def test_what_no_library_loads_may_hold_anything_but_belongs_to_the_hash(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    (folder / "consolidated.safetensors").write_bytes(b"no weights")
    first = weights_hash(read_weights(folder))
    (folder / "consolidated.safetensors").write_bytes(b"others")
    assert weights_hash(read_weights(folder)) != first


def test_a_file_is_read_whole_once_and_again_only_when_its_size_or_time_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, memory, read = sharded(tmp_path / "model"), tmp_path / "weights.json", []
    digest = file_digest

    def counting(path: Path) -> str:
        read.append(path.name)
        return digest(path)

    monkeypatch.setattr(module, "file_digest", counting)
    first = weights_hash(read_weights(folder), memory)
    assert len(read) == 3
    assert weights_hash(read_weights(folder), memory) == first == weights_hash(read_weights(folder))
    assert len(read) == 6  # without a memory

    save(folder / "model-00001.safetensors", {"layers.1.weight": torch.full((2, 3), 8.0)})
    assert weights_hash(read_weights(folder), memory) != first
    assert read[6:] == ["model-00001.safetensors"]

    status = (folder / "model-00001.safetensors").stat()
    save(folder / "model-00001.safetensors", {"layers.1.weight": torch.full((2, 3), 9.0)})
    os.utime(folder / "model-00001.safetensors", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert weights_hash(read_weights(folder), memory) == weights_hash(read_weights(folder))

    memory.write_text("{")
    assert weights_hash(read_weights(folder), memory) == weights_hash(read_weights(folder))


def test_a_file_is_looked_through_once_it_is_the_models_however_well_it_is_known(tmp_path: Path) -> None:
    save(tmp_path / "good.safetensors", {"a": torch.ones(3)})
    save(tmp_path / "bad.safetensors", {"a": torch.full((3,), float("nan"))})
    memory = tmp_path / "weights.json"

    def loads(name: str) -> None:
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
        weights_hash(read_weights(tmp_path), memory)

    loads("good.safetensors")
    with pytest.raises(UserError, match="a holds NaN"):
        loads("bad.safetensors")


def test_the_hash_is_that_of_earlier_versions(tmp_path: Path) -> None:
    save(tmp_path / SINGLE, {"a": torch.arange(4.0)})
    assert weights_hash(read_weights(tmp_path)) == "913f6f98a16c70c5de42742f2a90bc5d"


def test_weights_that_are_known_to_be_damaged_are_refused_again_without_being_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / SINGLE, {"a": torch.tensor([float("nan")])})
    memory = tmp_path / "weights.json"
    with pytest.raises(UserError, match="a holds NaN"):
        weights_hash(read_weights(tmp_path), memory)
    monkeypatch.setattr(module, "file_digest", None)
    with pytest.raises(UserError, match="a holds NaN"):
        weights_hash(read_weights(tmp_path), memory)
