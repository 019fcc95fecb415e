"""Check that engine, trainer and reference agree on the policy, before the first iteration and after the first load.

The engine loads the reference's weights itself; later it receives the policy's. Each can go wrong on its own.
"""

from collections.abc import Mapping, Sequence

from common.parity import COMPLETIONS, TOKENS, Gap, engine_logprobs, refuse_gap
from common.provenance import Allowance
from common.rollout import Rollout
from common.seeds import derive_seed
from common.terminal.console import Terminal
from stage2_train.batch import TokenSequence
from stage2_train.collate import Cutter
from stage2_train.config import Config
from stage2_train.data import TrainingData
from stage2_train.ranks import Ranks
from stage2_train.scorers import Scorer
from stage2_train.sources.pipeline import RolloutPipeline
from stage2_train.sources.sampler import Draw
from stage2_train.watchers import Turn

POLICY, REFERENCE = "policy", "reference"


def parity_draw(data: TrainingData, config: Config, ranks: Ranks) -> Draw:
    """A short completion of each of the first few prompts, with the engine's log-probs; this rank's share."""
    count = max(ranks.world_size, COMPLETIONS)
    places = range(ranks.rank, count, ranks.world_size)
    return Draw(
        prompts=[data.prompts[place % len(data.prompts)] for place in places],
        places=places,
        seed=derive_seed(config.seed, "parity"),
        logprob_checks=count,
        longest=min(TOKENS, config.sampling.max_completion_tokens),
    )


def scored(rollouts: Sequence[Rollout], scorer: Scorer, cut: Cutter) -> list[list[float]]:
    """The scorer's number for each completion token of each rollout. A collective operation."""
    sequences = [TokenSequence.of(row, rollout) for row, rollout in enumerate(rollouts)]
    batches = cut([[sequence] for sequence in sequences])
    found: dict[int, list[float]] = {}
    for batch, values_K in zip(batches, scorer.score(batches), strict=True):
        by_row = values_K.split([len(sequences[row].completion_token_ids) for row in batch.rows])
        found |= {row: values.tolist() for row, values in zip(batch.rows, by_row, strict=True)}
    return [found[row] for row in range(len(rollouts))]


class ParityGate:
    """Ends training if the engine does not sample from the policy that is trained."""

    def __init__(
        self,
        source: RolloutPipeline,
        draw: Draw,
        scorers: Mapping[str, Scorer],
        cut: Cutter,
        ranks: Ranks,
        config: Config,
        allowance: Allowance,
        console: Terminal,
    ) -> None:
        """`draw` gives the completions to compare; `scorers` are the trainer's policy, and its reference if any."""
        self._source = source
        self._draw = draw
        self._scorers = scorers
        self._cut = cut
        self._ranks = ranks
        self._config = config
        self._allowance = allowance
        self._console = console
        self._is_over = False

    def after(self, turn: Turn) -> None:
        """Compare before the first iteration, and after the first one that this process has trained.

        A collective operation. Raises UserError for a gap beyond the bound of the model's dtype, unless it is accepted.
        """
        if self._is_over:
            return
        self._is_over = turn.number > 0
        rollouts = self._source.now(self._draw, turn.number)
        sampled = [engine_logprobs(rollout.completion) for rollout in rollouts]
        when = f"after iteration {turn.number}" if turn.number else "before the first iteration"
        for name, scorer in self._scorers.items():
            if name == REFERENCE and turn.number:
                continue  # no longer the policy's
            gap = Gap.worst(self._ranks.gather([Gap.between(sampled, scored(rollouts, scorer, self._cut))]))
            said = self._refuse(
                gap, f"{when} the engine ({self._config.engine.backend}) and the trainer's {name}"
            )
            if name == POLICY:
                self._console.print(said)

    def _refuse(self, gap: Gap, sides: str) -> str:
        return refuse_gap(
            gap,
            sides,
            self._config,
            allowance=self._allowance,
            remedy="whatever this run has trained since it was started is suspect",
        )
