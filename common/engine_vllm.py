"""vLLM as the rollout engine, in this process. The only importer of vllm."""

import gc
import json
import logging
import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from common.config import Config, SamplingParams
from common.prompts import PromptRenderer, longest_allowed_prompt
from common.rollout import Completion, SampleRequest

if TYPE_CHECKING:
    import vllm

LOGGING_LEVEL = "ERROR"


class VllmEngine:
    """One vLLM engine, driven step by step so that a completion can be graded while others are sampled."""

    def __init__(
        self, config: Config, folder: Path, renderer: PromptRenderer, *, beside_trainer: bool
    ) -> None:
        """Load the model. Beside a trainer the engine takes its own share of the GPU."""
        _set_environment(config)
        import vllm
        from vllm.platforms import current_platform

        self._renderer = renderer
        self._eos_token_ids = frozenset(renderer.eos_token_ids)
        on_gpu = torch.cuda.is_available()
        max_model_len = context_length(config, folder)
        options: dict[str, Any] = {}
        if on_gpu:
            share = (
                config.engine.training_gpu_memory_utilization
                if beside_trainer
                else config.engine.gpu_memory_utilization
            )
            options["gpu_memory_utilization"] = share
            options["enforce_eager"] = config.engine.enforce_eager
            if beside_trainer and int(os.environ.get("WORLD_SIZE", "1")) > 1:
                # Each rank's engine runs in the rank's own process, on the rank's own GPU.
                options["distributed_executor_backend"] = "external_launcher"
        else:
            options["enforce_eager"] = True
            # Compiling the sampler's two small helpers takes ten seconds that they never win back on a CPU.
            current_platform.simple_compile_backend = "eager"
            # A prompt prefilled in chunks cannot be sampled with a seed: "CPU Generator does not use offset".
            options["max_num_batched_tokens"] = max(65536, max_model_len)
        self.llm: vllm.LLM | None = vllm.LLM(
            model=str(folder),
            dtype=config.model.dtype,
            max_model_len=max_model_len,
            max_num_seqs=config.engine.max_num_seqs,
            tensor_parallel_size=1 if beside_trainer else config.engine.tensor_parallel_size,
            logprobs_mode="processed_logprobs",
            seed=config.seed,
            disable_log_stats=True,
            use_tqdm_on_load=False,
            **options,
        )
        # The garbage collector would walk all of vLLM's and torch's objects again and again while samples pile up.
        gc.collect()
        gc.freeze()
        self._window = 2 * config.engine.max_num_seqs
        self._serial = 0

    def generate(self, requests: Iterable[SampleRequest], sampling: SamplingParams) -> Iterator[Completion]:
        """Keep a window of requests in the engine and yield each completion as it ends."""
        import vllm

        assert self.llm is not None, "the engine is closed"
        engine = self.llm.llm_engine
        waiting = iter(requests)
        running: dict[str, SampleRequest] = {}
        exhausted = False
        try:
            while running or not exhausted:
                while not exhausted and len(running) < self._window:
                    if (request := next(waiting, None)) is None:
                        exhausted = True
                        break
                    self._serial += 1
                    name = str(self._serial)
                    engine.add_request(
                        name,
                        {"prompt_token_ids": list(request.prompt_token_ids)},
                        self._sampling_params(request, sampling),
                    )
                    running[name] = request
                if not running:
                    break
                for output in engine.step():
                    if output.finished:
                        assert isinstance(output, vllm.RequestOutput)
                        yield self._completion(running.pop(output.request_id), output.outputs[0])
        finally:
            if running:
                engine.abort_request(list(running))

    def _sampling_params(self, request: SampleRequest, sampling: SamplingParams) -> "vllm.SamplingParams":
        import vllm
        from vllm.sampling_params import RequestOutputKind

        return vllm.SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_completion_tokens,
            seed=request.seed if sampling.temperature > 0 else None,
            stop_token_ids=list(self._eos_token_ids),
            logprobs=0 if request.with_logprobs else None,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _completion(self, request: SampleRequest, output: "vllm.CompletionOutput") -> Completion:
        token_ids = tuple(output.token_ids)
        logprobs = None
        if request.with_logprobs:
            assert output.logprobs is not None
            entries: list[Any] = list(output.logprobs)
            logprobs = tuple(entry[token].logprob for token, entry in zip(token_ids, entries, strict=True))
        return Completion(
            key=request.key,
            token_ids=token_ids,
            text=self._renderer.decode(token_ids),
            truncated=not token_ids or token_ids[-1] not in self._eos_token_ids,
            sampled_logprobs=logprobs,
        )

    def load_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replace the weights in place and forget the key-value cache of the old ones."""
        assert self.llm is not None, "the engine is closed"
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(named_tensors)})
        if not torch.cuda.is_available():
            self.llm.apply_model(_repack_output_layer)
        self.llm.reset_prefix_cache()

    def close(self) -> None:
        """Free the model's memory."""
        self.llm = None
        gc.unfreeze()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _repack_output_layer(model: torch.nn.Module) -> None:
    """Renew the packed copy of the output layer's weights that vLLM keeps on a CPU.

    A layer that is tied to the embedding gets no weights of its own in a reload and would keep the old copy.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


def context_length(config: Config, folder: Path) -> int:
    """Room for the longest allowed prompt and a completion, within the model's own context.

    That context may be shorter than what the config allows: the prompts themselves have been checked to fit.
    """
    document: dict[str, int] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    needed = longest_allowed_prompt(config) + config.sampling.max_completion_tokens
    return min(needed, document.get("max_position_embeddings", needed))


def _set_environment(config: Config) -> None:
    """What vLLM reads from the environment when it is imported; what the user has set stays."""
    settings = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": LOGGING_LEVEL,
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": str(config.engine.cpu_kv_cache_gib),
        # Bound threads fight with every other process on their cores: the graders, a second rank, a browser.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    logging.getLogger("vllm").setLevel(LOGGING_LEVEL)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.")
