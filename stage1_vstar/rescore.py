"""Recompute V̂* from cached rewards with another β1 or estimator: no model, no generation, and bounded memory."""

import re
from dataclasses import replace
from pathlib import Path

import polars as pl

from common.errors import UserError
from common.provenance import read_provenance
from common.vstar_file import estimator_of, scan_vstar, vstar_writer
from stage1_vstar.beta_binomial import BetaPrior, fit_prior
from stage1_vstar.table import success_groups, with_vstar


def rescore(source: Path, output: Path, beta1: float, estimator: str = "plugin") -> str:
    """Recompute V̂* under `beta1` (in [0, inf]) into `output`, which may be `source`; returns one line on the change.

    Raises UserError, and writes nothing, if the file breaks the contract or the estimator cannot use its rewards.
    """
    provenance = read_provenance(source)
    prior = fitted_prior(source) if estimator == "beta_binomial" else None
    context = {
        name: value for name, value in provenance.context.items() if name not in ("estimator", "prior")
    }
    if estimator != "plugin":
        context["estimator"] = estimator
    if prior is not None:
        context["prior"] = {"a": prior.a, "b": prior.b}
    prompts, before, after, old_beta1 = 0, 0.0, 0.0, beta1
    changed = ("beta1", "vstar", "vstar_se")
    with vstar_writer(output, replace(provenance, context=context), changed=changed) as write:
        for rows in scan_vstar(source):
            rescored = with_vstar(rows, beta1, estimator=estimator, prior=prior)
            write(rescored)
            prompts += rows.height
            before += float(rows["vstar"].sum())
            after += float(rescored["vstar"].sum())
            old_beta1 = rows["beta1"][0]
    what = f"β1 {old_beta1:g} → {beta1:g}"
    if (old := estimator_of(provenance)) != "plugin" or estimator != "plugin":
        what += f", {old} → {estimator}"
    line = f"{output}: {prompts:,} prompts, {what}, mean V̂* {before / prompts:.4f} → {after / prompts:.4f}"
    if rules := [name for name in context.get("filters", []) if _ABOUT_VSTAR.search(name)]:
        line += f"; prompts stay dropped as the old V̂* said ({', '.join(rules)}): run `python cli.py filter` again"
    return line


_ABOUT_VSTAR = re.compile(r"V\*|vstar|beta1|interval_width")
"""Marks the name of a rule of `filter` that depends on V̂*: another V̂* may drop other prompts."""


def fitted_prior(source: Path) -> BetaPrior:
    """The prior of pass rates fitted to all prompts of the file. Raises UserError unless rewards are 0 and 1."""
    parts = []
    for rows in scan_vstar(source, ["prompt_id", "rewards"]):
        rewards = rows["rewards"].explode()
        if len(graded := rewards.filter(~rewards.is_in([0.0, 1.0]))):
            raise UserError(
                f"{source}: the beta_binomial estimator needs rewards of 0 and 1, found {graded[0]:g}; "
                "use the plugin or the jackknife estimator"
            )
        parts.append(success_groups(rows))
    groups = pl.concat(parts).group_by("successes", "trials").agg(pl.col("prompts").sum())
    return fit_prior(*groups.sort("successes", "trials").to_numpy().T)
