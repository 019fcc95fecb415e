"""A rollout engine that runs vLLM in this process. Only the files here that begin with vllm_ import it."""

import gc
import logging
import os
import warnings
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.distributed as dist

from common.config import RunConfig, SamplingParams
from common.data.prompts import longest_allowed_completion, longest_allowed_prompt
from common.data.rendering import PromptRenderer
from common.engines.endings import Endings, StopStrings
from common.engines.loadable import loadable_folder
from common.engines.protocol import LowRank
from common.engines.shared_engine import SharedEngine, refuse_wrong_size
from common.engines.vllm_adapter import VllmAdapter, lora_options
from common.engines.vllm_repairs import (
    RenewedLayers,
    follow_stream,
    forget_packed_experts,
    repack_output_layer,
    rotate_heads_on_a_cpu,
    unhook_compiled,
    unpatched_classes,
)
from common.errors import EngineFailed, UserError, cause
from common.model.files import model_numbers
from common.model.reading import quantisation_of
from common.rollout import Completion, SampleRequest
from common.runs import run_paths

if TYPE_CHECKING:
    import vllm

LOGGING_LEVEL = "ERROR"


class VllmEngine:
    """A vLLM engine, run step by step so that a completion can be graded while others are sampled.

    In a training job several ranks may form one engine, each with a shard. They must then call `generate`,
    `load_weights` and `sleep` together, and read each `generate` to its end.
    """

    _leftover: ClassVar[bool] = False
    """Whether a closed engine's objects wait for the garbage collector."""

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        renderer: PromptRenderer,
        *,
        beside_trainer: bool,
        adapter: LowRank | None = None,
    ) -> None:
        """Load the model. With `beside_trainer` it takes engine.training_gpu_memory_utilization of the GPU.

        With an adapter it keeps the model's weights and takes adapters of that shape, see EngineBuilder.
        Raises UserError before loading if the ranks or the model cannot be divided into the configured groups.
        """
        self._is_guest = beside_trainer and dist.is_initialized()
        self._group: SharedEngine | None = None
        processes = dist.get_world_size() if self._is_guest else 1
        ranks_per_engine = config.engine.training_tensor_parallel_size if beside_trainer else 1
        if ranks_per_engine > 1:
            refuse_wrong_size(ranks_per_engine, processes, folder)
            self._group = SharedEngine(ranks_per_engine)
        set_environment(config.model.dtype)
        leave_uncompiled()
        import vllm

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
            options["enable_sleep_mode"] = beside_trainer and config.engine.sleep_while_training
            if beside_trainer:
                keep_threads()
        else:
            options["enforce_eager"] = True
            options["kv_cache_memory_bytes"] = round(config.engine.cpu_kv_cache_gib * 2**30)
            rotate_heads_on_a_cpu()
            if config.model.dtype == "float32" and model_numbers(folder).get("kv_lora_rank") is not None:
                # Of its two kernels for latent attention, the one for CPUs with AMX knows bfloat16 alone.
                options["attention_backend"] = "CPU_MLA"
            # A prompt prefilled in chunks cannot be sampled with a seed: "CPU Generator does not use offset".
            options["max_num_batched_tokens"] = max(65536, max_model_len)
        if processes > 1:
            # Each rank runs its engine, or its shard of one, in its own process and on its own GPU.
            options["distributed_executor_backend"] = _executor(self._group.name if self._group else "")
        self._adapter = None if adapter is None else VllmAdapter(adapter)
        if adapter is not None:
            options |= lora_options(adapter)
        if VllmEngine._leftover:
            gc.collect()
            VllmEngine._leftover = False
        # vLLM collects garbage several times while it loads; frozen objects are not walked each time.
        gc.freeze()
        # A trainer's engine may draw in another thread than the one that has built it.
        self._follows_stream = on_gpu and beside_trainer
        self._is_in_process = beside_trainer or config.engine.tensor_parallel_size == 1
        self._can_sleep: bool = options.get("enable_sleep_mode", False)
        self._is_asleep = False
        with (
            unpatched_classes() as classes,
            _in_one_line(
                f"{folder}: vLLM cannot load the model",
                "correct what it says, or "
                + (
                    "use the model without quantisation"
                    if quantisation_of(folder)
                    else 'set engine.backend = "transformers"'
                )
                + (
                    '; if it has no LoRA for the model, set train.lora.in_engine = "merged"'
                    if adapter
                    else ""
                ),
            ),
        ):
            self.llm: vllm.LLM | None = vllm.LLM(
                model=str(loadable_folder(folder, run_paths(config.run).root)),
                config_format="hf",
                skip_tokenizer_init=True,  # it receives and returns token ids
                dtype=config.model.dtype,
                max_model_len=max_model_len,
                max_num_seqs=config.engine.max_num_seqs,
                tensor_parallel_size=ranks_per_engine
                if beside_trainer
                else config.engine.tensor_parallel_size,
                logprobs_mode="processed_logprobs",
                seed=config.seed,
                disable_log_stats=True,
                use_tqdm_on_load=False,
                **options,
            )
        if classes:
            self.llm.apply_model(classes.adopt)
        # Otherwise the garbage collector would walk all objects of vLLM and torch again and again during sampling.
        gc.collect()
        gc.freeze()
        self._window = 2 * config.engine.max_num_seqs
        self._serial = 0

    def generate(self, requests: Iterable[SampleRequest], sampling: SamplingParams) -> Iterator[Completion]:
        """Keep a window of requests in the engine and yield each completion as it ends.

        The ranks of a group run all their requests together; each yields its own. Raises EngineFailed if vLLM fails.
        In a group it raises UserError instead: the other ranks then wait in a step that needs this rank, so the whole
        job has to start again.
        """
        shared = self._group.share(requests) if self._group else ((True, request) for request in requests)
        endings = Endings(self._renderer, sampling)
        with closing(self._outputs(shared, sampling, endings.stop)) as outputs:
            try:
                for is_own, request, output in outputs:
                    if is_own:
                        yield self._completion(request, output, endings)
            except GeneratorExit:
                # The caller has stopped reading, but the other ranks of the group need this one in each step.
                if self._group:
                    deque(outputs, maxlen=0)
                raise

    def _outputs(
        self, requests: Iterable[tuple[bool, SampleRequest]], sampling: SamplingParams, stop: StopStrings
    ) -> "Generator[tuple[bool, SampleRequest, vllm.CompletionOutput]]":
        import vllm

        assert self.llm is not None, "the engine is closed"
        assert not self._is_asleep, "load_weights wakes the engine"
        if self._follows_stream:
            self.llm.collective_rpc(follow_stream)
        engine = self.llm.llm_engine
        waiting = iter(requests)
        running: dict[str, tuple[bool, SampleRequest]] = {}
        exhausted = False
        try:
            while running or not exhausted:
                while not exhausted and len(running) < self._window:
                    if (item := next(waiting, None)) is None:
                        exhausted = True
                        break
                    _, request = item
                    self._serial += 1
                    name = str(self._serial)
                    with self._failing_in_one_line():
                        engine.add_request(
                            name,
                            {"prompt_token_ids": [*request.prompt_token_ids, *request.prefix]},
                            self._sampling_params(request, sampling),
                            lora_request=self._adapter.request if self._adapter else None,
                        )
                    running[name] = item
                if not running:
                    break
                with self._failing_in_one_line():
                    outputs = engine.step()
                    if stopped := _stopped(outputs, running, stop):
                        engine.abort_request(stopped)
                for output in outputs:
                    if output.finished or output.request_id in stopped:
                        assert isinstance(output, vllm.RequestOutput)
                        yield *running.pop(output.request_id), output.outputs[0]
        finally:
            if running:
                engine.abort_request(list(running))

    def _failing_in_one_line(self) -> AbstractContextManager[None]:
        return _in_one_line(
            "vLLM failed while it sampled",
            "start the job again: it goes on from what is kept; if it fails again, set "
            'engine.backend = "transformers"',
            EngineFailed if self._group is None else UserError,
        )

    def _sampling_params(self, request: SampleRequest, sampling: SamplingParams) -> "vllm.SamplingParams":
        import vllm
        from vllm.sampling_params import RequestOutputKind

        return vllm.SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            max_tokens=sampling.max_completion_tokens - len(request.prefix),
            seed=request.seed if sampling.temperature > 0 else None,
            stop_token_ids=list(self._eos_token_ids),
            logprobs=0 if request.with_logprobs else None,
            detokenize=False,
            # We search for stop strings ourselves, token by token, so that both engines end at the same token.
            output_kind=RequestOutputKind.CUMULATIVE if sampling.stop else RequestOutputKind.FINAL_ONLY,
        )

    def _completion(
        self, request: SampleRequest, output: "vllm.CompletionOutput", endings: Endings
    ) -> Completion:
        logprobs = None
        if request.with_logprobs:
            assert output.logprobs is not None
            entries: list[Any] = list(output.logprobs)
            logprobs = [entry[token].logprob for token, entry in zip(output.token_ids, entries, strict=True)]
        token_ids = [*request.prefix, *output.token_ids]
        return endings.completion(request, token_ids, output.finish_reason, logprobs)

    def load_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replace the weights in place, or the adapter, and clear the key-value cache; wakes the engine.

        Each rank of a group receives the full tensors and keeps its shard. If the tensors of a layer follow each other,
        vLLM holds those of one layer at a time. If the vocabulary is not a multiple of 64, vLLM pads the embedding and
        the output layer, and holds their tensors to the end.
        """
        assert self.llm is not None, "the engine is closed"
        if self._adapter is not None:
            if self._is_asleep:
                torch.cuda.empty_cache()  # as below
                self.llm.wake_up()
                self._is_asleep = False
            with _in_one_line(
                "vLLM cannot take the adapter", 'set train.lora.in_engine = "merged", or adapt other layers'
            ):
                self._adapter.replace(self.llm.llm_engine, named_tensors)
            self.llm.reset_prefix_cache()
            return
        if self._is_asleep:
            # vLLM takes its memory from the driver, which knows nothing of what torch keeps for the trainer.
            torch.cuda.empty_cache()
            self.llm.wake_up(tags=["weights"])  # its content is undefined until it is written below
        on_gpu = torch.cuda.is_available()
        if not on_gpu:
            self.llm.apply_model(forget_packed_experts)
        layers = RenewedLayers()
        with layers.watched():
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(named_tensors)})
        self.llm.apply_model(layers.refuse_stale)
        if self._is_asleep:
            self.llm.wake_up(tags=["kv_cache"])
            self._is_asleep = False
        if not on_gpu:
            self.llm.apply_model(repack_output_layer)
        self.llm.reset_prefix_cache()

    def sleep(self) -> None:
        """With engine.sleep_while_training, free weights and key-value cache until the next `load_weights`.

        This is level 2 of vLLM's sleep mode, which keeps no copy of the weights: training replaces them anyway. With an
        adapter, which leaves them as they are, it is level 1, which keeps a copy in main memory. On a CPU it does
        nothing. It has not been run on a GPU; only the order of calls has been tested.
        """
        assert self.llm is not None, "the engine is closed"
        if self._can_sleep and not self._is_asleep:
            self.llm.sleep(level=2 if self._adapter is None else 1)
            self._is_asleep = True

    def close(self) -> None:
        """Free the model's memory; leaves the trainer's torch.distributed groups as they are.

        On a CPU beside a trainer what is left for the garbage collector waits for the next engine: collecting walks the
        objects of all libraries, a second at the end of each training.
        """
        llm, self.llm = self.llm, None
        if llm is None:
            return
        if self._is_asleep:
            # Its allocator would give back once more what it gave back when it fell asleep.
            torch.cuda.empty_cache()
            llm.wake_up()
            self._is_asleep = False
        if self._is_in_process:
            llm.apply_model(unhook_compiled)
        client: Any = llm.llm_engine.engine_core
        if not self._is_guest:
            client.shutdown()
        else:
            # vLLM's own shutdown would destroy torch.distributed, which belongs to the trainer.
            client._finalizer.detach()
            client.engine_core.model_executor.shutdown()
            client.engine_core.scheduler.shutdown()
            if self._group:
                # The ranks of a group close together, and their process groups hold shared memory. A rank with its own
                # engine may have to rebuild it alone, and a process group can only be made by all ranks.
                from vllm.distributed import parallel_state

                parallel_state.destroy_model_parallel()  # type: ignore[no-untyped-call]
            VllmEngine._leftover = not torch.cuda.is_available()
        del llm, client
        gc.unfreeze()
        if torch.cuda.is_available():
            gc.collect()
            torch.cuda.empty_cache()


def _stopped(
    outputs: Iterable[Any], running: Mapping[str, tuple[bool, SampleRequest]], stop: StopStrings
) -> list[str]:
    """Find the requests that a stop string ends, and mark their completions as ended."""
    found = []
    for output in outputs if stop else ():
        (completion,) = output.outputs
        _, request = running[output.request_id]
        if stop.end([*request.prefix, *completion.token_ids]):
            completion.finish_reason = "stop"
            found.append(output.request_id)
    return found


@contextmanager
def _in_one_line(failure: str, advice: str, kind: type[UserError] = UserError) -> Iterator[None]:
    """Turn exceptions of vLLM into a UserError of one line; the traceback goes to the run's log of libraries."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        logging.getLogger(__name__).error(failure, exc_info=True)
        raise kind(f"{failure} ({cause(error)}); {advice}") from error


def _executor(group: str) -> Any:
    """vLLM's executor for processes that torchrun started ("external_launcher"), without ties between engines.

    vLLM's own takes the least free memory of all ranks of the job, so that an engine could be rebuilt only together
    with all others. On a CPU it gives the shared memory of every job the same name, so that a second job on the
    machine, or a job after one that was killed, fails to create it.
    """
    from vllm.distributed.parallel_state import get_tp_group
    from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher, UniProcExecutor

    class Executor(ExecutorWithExternalLauncher):
        def _distributed_args(self) -> tuple[str, int, int]:
            method, rank, local_rank = super()._distributed_args()
            return f"{method}:{group}", rank, local_rank  # the name contains the part after the last colon

        def determine_available_memory(self) -> list[int]:
            least = torch.tensor(UniProcExecutor.determine_available_memory(self))
            dist.all_reduce(least, dist.ReduceOp.MIN, group=get_tp_group().cpu_group)
            return [int(free) for free in least]

    return Executor


def context_length(config: RunConfig, folder: Path) -> int:
    """The context length that the engine needs for the longest allowed prompt and a completion. Raises UserError.

    It is at most the model's own. The actual prompts have been checked to fit that.
    """
    needed = longest_allowed_prompt(config) + longest_allowed_completion(config)
    return min(needed, model_numbers(folder).get("max_position_embeddings") or needed)


def set_environment(dtype: str) -> None:
    """Set variables that vLLM and Triton read from the environment, unless the user has set them."""
    settings = {
        # Otherwise Triton's kernels round the factors of float32 products to 10 bits (TF32); torch does not.
        **({"TRITON_F32_DEFAULT": "ieee"} if dtype == "float32" else {}),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # A fork cannot use a GPU that its parent has looked for, and would hold the locks of its parent's threads.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_LOGGING_LEVEL": LOGGING_LEVEL,
        "VLLM_NO_USAGE_STATS": "1",
        # Threads bound to cores compete with every other process there, such as the graders or a second rank.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"].upper())
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.")


def keep_threads() -> None:
    """Keep vLLM on a GPU from leaving this process one thread of torch, with which an optimizer on the CPU is slow."""
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))


def leave_uncompiled() -> None:
    """Keep vLLM from compiling small helpers of its sampler on a CPU: call it before they are imported.

    Compiling takes ten seconds, or two with a cache, more than it saves, and needs a C++ compiler.
    """
    from vllm.platforms import current_platform

    if not torch.cuda.is_available():
        current_platform.simple_compile_backend = "eager"
