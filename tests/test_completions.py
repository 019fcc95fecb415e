"""The completions that training keeps for people to read."""

from pathlib import Path

from stage2_train.completions import MOST_FILES, forget_completions, write_completions


def iterations(folder: Path) -> list[int]:
    return sorted(int(path.stem.rpartition("-")[2]) for path in folder.glob("iteration-*.parquet"))


def test_a_long_training_keeps_the_first_the_latest_and_fewer_of_those_between(tmp_path: Path) -> None:
    most = 0
    numbers = [*range(0, 4000, 10), *range(999_000, 1_001_000, 10)]
    for number in numbers:
        write_completions(tmp_path, number, training=[], held_out=[], pass_rate={}, vstar={})
        most = max(most, len(iterations(tmp_path)))
    found = iterations(tmp_path)
    assert most <= MOST_FILES
    assert len(found) > MOST_FILES / 2
    assert found[0] == 0
    assert found[-MOST_FILES // 2 :] == numbers[-MOST_FILES // 2 :]
    between = found[1 : -MOST_FILES // 2]
    assert between[0] < 1000 < between[-1]
    forget_completions(tmp_path, 2000)
    assert iterations(tmp_path) == [number for number in found if number < 2000]
