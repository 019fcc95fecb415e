"""The command `sweep`: sweep an artifact and write the results to report/."""

from collections.abc import Sequence
from pathlib import Path

from common.files import atomic_path, file_digest, write_text
from common.remote.places import shown
from common.report.sweep_files import SamplesDigest, sweep_file
from common.vstar_file import read_vstar
from stage1_vstar.sweep import SweepFile, parse_betas, parse_sizes, sweep


def run_sweep(source: Path, *, beta1: Sequence[str] = (), num_samples: Sequence[str] = ()) -> SweepFile:
    """Sweep an artifact over β1 and N and write report/sweep.json, .png and .svg beside it; returns the figures.

    The JSON holds the digests of its samples and its drawings, and is written last. A JSON that does not belong to the
    files beside it, left by a killed or an earlier sweep, can therefore be recognised.

    The arguments are comma-separated lists. The defaults are BETAS, and the powers of two up to the largest number of
    samples that a prompt has. Raises UserError for a β1 that is no number from 0 to inf, and for an N that no prompt
    has.
    """
    betas = parse_betas(beta1)
    rows, _ = read_vstar(source)
    samples = SamplesDigest()
    samples.add(rows)
    figures = sweep(rows, betas, parse_sizes(num_samples, rows["num_samples"].to_list()))
    from common.report.plots import figure_style, save
    from stage1_vstar.sweep_view import draw

    drawings = {}
    with figure_style():
        figure = draw(figures)
        for suffix in ("png", "svg"):
            with atomic_path(sweep_file(source, suffix)) as temporary:
                save(figure, temporary, suffix)
                drawings[suffix] = file_digest(temporary)
    swept = SweepFile(
        path=shown(str(source)), samples=samples.hexdigest(), drawings=drawings, figures=figures
    )
    write_text(sweep_file(source, "json"), swept.to_json() + "\n")
    return swept
