"""Draws missing samples."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from common.config import RunConfig
from common.data.prompts import usable_prompts
from common.data.rendering import PromptRenderer
from common.engines import EngineSource, RolloutEngine
from common.engines.count import devices_of
from common.errors import UserError
from common.grading import GraderPool
from common.rollout import Prompt
from common.runs import WHOLE, Shard
from common.sampling.generate import generate_samples
from common.sampling.missing import Missing
from common.store import SampleStore
from common.terminal.console import Terminal

EngineCheck = Callable[[RolloutEngine, Sequence[Prompt]], None]


class Executor:
    """Draws missing samples. Graders and model are loaded for the first one and serve all later rounds."""

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        renderer: PromptRenderer,
        store: SampleStore,
        shard: Shard,
        console: Terminal,
        engines: EngineSource,
        check: EngineCheck | None,
        *,
        keep_token_ids: bool = False,
    ) -> None:
        """`check`, if any, is called with the engine and its prompts before anything is drawn."""
        self._config = config
        self._folder = folder
        self._renderer = renderer
        self._store = store
        self._shard = shard
        self._console = console
        self._engines = engines
        self._check = check
        self._keep_token_ids = keep_token_ids
        self._loaded = ExitStack()
        self._pool: GraderPool | None = None
        self._engine: RolloutEngine | None = None

    @property
    def has_drawn(self) -> bool:
        """Whether the model was loaded, because there was a sample to draw."""
        return self._engine is not None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loaded.close()

    def draw(self, missing: Missing, *, grader_proven: bool = False) -> None:
        """Draw these samples of the prompts that can be graded. Raises UserError before the model loads."""
        if not missing:
            return
        missing = only_gradable(missing, self._config, self._graders(), self._console)
        if not missing:
            if self._store.fragments() or self._shard != WHOLE:
                return
            raise UserError("no prompt is left: the grader can use none of the reference answers")
        self.sample(missing, self._store, grader_proven=grader_proven)

    def sample(
        self,
        missing: Missing,
        store: SampleStore,
        *,
        grader_proven: bool = False,
        prompts: str = "prompts",
    ) -> None:
        """Draw these samples, whose reference answers the grader is known to use, into a store.

        `prompts` is what messages call the prompts.
        """
        if not missing:
            return
        config, console = self._config, self._console
        pool = self._graders()
        if self._engine is None:
            console.print(
                f"{len(missing.prompts):,} {prompts}: {len(missing):,} samples to draw; loading the model"
            )
            config = self._engines.sized(config, self._folder, len(missing))
            self._engine = self._engines.build(config, self._folder, self._renderer, beside_trainer=False)
            self._loaded.callback(self._engine.close)
            if self._check is not None:
                self._check(self._engine, missing.prompts)
            self._store.loaded(devices_of(config.engine))
        generate_samples(
            missing,
            self._engine,
            pool,
            store,
            config.sampling,
            config.seed,
            console,
            grader_proven=grader_proven,
            keep_token_ids=self._keep_token_ids,
            prompts=prompts,
        )

    def _graders(self) -> GraderPool:
        if self._pool is None:
            self._pool = self._loaded.enter_context(GraderPool(self._config.grader))
        return self._pool


def only_gradable(missing: Missing, config: RunConfig, pool: GraderPool, console: Terminal) -> Missing:
    """The incomplete prompts whose reference answer the grader can use, with their missing samples."""
    incomplete = missing.incomplete()
    usable = {prompt.id for prompt in usable_prompts(incomplete.prompts, config.data, pool)}
    if dropped := len(incomplete.prompts) - len(usable):
        console.print(f"{dropped:,} prompts dropped: the grader cannot use their reference answers")
    return incomplete.of(usable)
