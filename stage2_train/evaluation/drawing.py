"""Completions of a model on a benchmark: kept in a store, so that only missing ones are drawn, now or after a kill."""

import hashlib
import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import polars as pl

from common.engines import EngineSource, RolloutEngine
from common.grading import GraderPool, fingerprint
from common.grading.spec import GraderSpec
from common.model.files import network_hash
from common.model.weights import stored_weights
from common.parity import draw_compared
from common.provenance import Provenance, context, sampler_identity, sampling_identity
from common.remote.places import shown
from common.rollout import Completion, Prompt
from common.runs import run_paths
from common.sampling.generate import generate_samples
from common.sampling.missing import Missing, prompt_table
from common.sampling.regrading import grade_missing
from common.seeds import derive_seed
from common.store import SampleStore, set_aside_damaged
from common.terminal.console import Terminal
from stage2_train.config import Config
from stage2_train.evaluation.plan import GREEDY, SAMPLED, Benchmark, Draw, Model, roomy


class Drawing:
    """Draws missing completions. Models of one network share an engine, benchmarks of one grader its processes."""

    def __init__(
        self, config: Config, benchmarks: Sequence[Benchmark], engines: EngineSource, console: Terminal
    ) -> None:
        self._config = config
        self._engines = engines
        self._benchmarks = benchmarks
        self._roomy = roomy(config, benchmarks)
        self._console = console
        self._open = ExitStack()
        self._pools: dict[GraderSpec, GraderPool] = {}
        self._engine: RolloutEngine | None = None
        self._network = ""
        self._loaded: Path | None = None
        self.checks: dict[str, list[tuple[Prompt, Completion]]] = {}
        """By model, a few short completions with the engine's log-probs, if it was loaded for it."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._engine is not None:
            self._engine.close()
        for pool in self._pools.values():
            for line in pool.usage_lines():
                self._console.print(line)
        self._open.close()

    def grades(self, model: Model, benchmark: Benchmark, draw: Draw) -> pl.DataFrame:
        """The grades of these completions, after the missing ones have been drawn, and graded if others graded them."""
        prompts = model.prompts[benchmark.name]
        provenance = self._provenance(model, benchmark, draw)
        folder = self._folder(provenance, benchmark, draw)
        for line in set_aside_damaged(folder):
            self._console.print(f"{line}; its samples will be drawn again")
        store = SampleStore(folder, provenance)
        table = prompt_table(prompts)
        missing = Missing(prompts, ~store.present(table, draw.num_samples))
        if store.ungraded_count(table):
            grade_missing(store, benchmark.grader, self._console, prompts=table)
        if missing:
            self._console.print(
                f"{model.name} on {benchmark.name}: {len(missing):,} {draw.kind} completions of "
                f"{len(missing.incomplete().prompts):,} prompts to draw"
            )
            generate_samples(
                missing.incomplete(),
                self._engine_for(model, prompts),
                self._pool(benchmark),
                store,
                draw.sampling,
                derive_seed(self._config.seed, "evaluate"),
                self._console,
                keep_token_ids=True,  # KL may be measured on them later, and another grader may read them
            )
        return store.grades(table, draw.num_samples)

    def store(self, model: Model, benchmark: Benchmark, draw: Draw) -> SampleStore:
        """The store of these completions."""
        provenance = self._provenance(model, benchmark, draw)
        return SampleStore(self._folder(provenance, benchmark, draw), provenance)

    def _folder(self, provenance: Provenance, benchmark: Benchmark, draw: Draw) -> Path:
        """One per identity: other samplings, templates and models have other folders, other graders the same."""
        identity = {name: value for name, value in provenance.identity.items() if name != "grader"}
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        samples = run_paths(self._config.run).evaluations / "samples"
        return samples / f"{benchmark.name}-{draw.kind}-{digest}"

    def _provenance(self, model: Model, benchmark: Benchmark, draw: Draw) -> Provenance:
        config = self._config.model_copy(update={"sampling": draw.sampling, "data": benchmark.data})
        made = context(config)
        identity = {
            **sampling_identity(
                config, model.renderers[benchmark.name], model.identity, fingerprint(benchmark.grader)
            ),
            "seed": config.seed,
            "revision": None,
            **sampler_identity(config.engine.backend, config.model.dtype, made["versions"]),
        }
        return Provenance(identity=identity, context={**made, "model_path": shown(str(model.folder))})

    def _pool(self, benchmark: Benchmark) -> GraderPool:
        spec = benchmark.grader.spec
        if spec not in self._pools:
            self._pools[spec] = self._open.enter_context(GraderPool(benchmark.grader))
        return self._pools[spec]

    def _engine_for(self, model: Model, prompts: Sequence[Prompt]) -> RolloutEngine:
        """The engine with this model's weights."""
        if self._engine is not None and self._loaded == model.folder:
            return self._engine
        before, self._network = self._network, network_hash(model.folder)
        # Its workers may be other processes, which weights in memory do not reach; vLLM repacks quantised ones.
        takes_weights = (
            before == self._network
            and self._config.engine.tensor_parallel_size == 1
            and model.quantisation is None
        )
        if self._engine is not None and not takes_weights:
            self._engine.close()
            self._engine = None
        if self._engine is None:
            renderer = next(iter(model.renderers.values()))
            sizes = (
                len(model.prompts[each.name]) * draw.num_samples
                for each in self._benchmarks
                for draw in each.draws.values()
            )
            config = self._engines.sized(self._roomy, model.folder, max(sizes))
            self._engine = self._engines.build(config, model.folder, renderer, beside_trainer=False)
        else:
            self._engine.load_weights(stored_weights(model.folder))
        self._loaded = model.folder
        if model.quantisation is not None:
            return self._engine
        temperature = self._config.sampling.temperature or 1.0
        self.checks[model.name] = draw_compared(self._engine, prompts, self._config, temperature=temperature)
        return self._engine


def rows_of(prompts: Sequence[Prompt], grades: dict[str, pl.DataFrame]) -> pl.DataFrame:
    """One row per prompt with its greedy completion's grade and its samples' grades; `grades` by kind of draw."""
    rows = prompt_table(prompts).drop("prompt_token_hash")
    greedy = grades.get(GREEDY)
    if greedy is None:
        rows = rows.with_columns(
            greedy_outcome=pl.lit(None, pl.String),
            greedy_reward=pl.lit(None, pl.Float64),
            greedy_tokens=pl.lit(None, pl.Int32),
        )
    else:
        columns = {
            "outcome": "greedy_outcome",
            "reward": "greedy_reward",
            "completion_tokens": "greedy_tokens",
        }
        rows = rows.join(
            greedy.select("prompt_id", *(pl.col(old).alias(new) for old, new in columns.items())),
            on="prompt_id",
            how="left",
            maintain_order="left",
        )
    samples = grades.get(SAMPLED)
    many = {"outcome": "outcomes", "reward": "rewards", "completion_tokens": "completion_tokens"}
    if samples is None:
        empty = {"outcomes": pl.String, "rewards": pl.Float64, "completion_tokens": pl.Int32}
        return rows.with_columns(
            pl.lit(None, pl.List(kind)).fill_null([]).alias(name) for name, kind in empty.items()
        )
    grouped = (
        samples.sort("sample_index", maintain_order=True)
        .group_by("prompt_id", maintain_order=True)
        .agg(pl.col(old).alias(new) for old, new in many.items())
    )
    return rows.join(grouped, on="prompt_id", how="left", maintain_order="left")
