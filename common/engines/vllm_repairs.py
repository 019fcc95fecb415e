"""Repairs of vLLM from outside: what it does to transformers, reloads, streams, closed models, and a CPU kernel."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import UserError


class PatchedClasses:
    """Restores the model classes of transformers that vLLM rewrites while it builds an engine.

    For a model that vLLM does not implement, it uses transformers' class and adds compilation to the class itself. From
    then on every model of that class, also the trainer's, needs a vLLM configuration.
    """

    def __init__(self) -> None:
        self._before: dict[type, tuple[tuple[type, ...], dict[str, Any]]] = {}
        self._rewritten: dict[type, type] = {}

    def note(self, kind: type) -> None:
        """Remember a class before vLLM rewrites it."""
        self._before.setdefault(kind, (kind.__bases__, dict(vars(kind))))

    def restore(self) -> None:
        """Restore the classes; vLLM's version of each becomes a separate class."""
        for kind, (bases, attributes) in self._before.items():
            added = tuple(base for base in kind.__bases__ if base not in bases)
            if not added:
                continue
            changed = {name: value for name, value in vars(kind).items() if attributes.get(name) is not value}
            for name in changed:
                if name in attributes:
                    setattr(kind, name, attributes[name])
                else:
                    delattr(kind, name)
            kind.__bases__ = bases
            self._rewritten[kind] = type(
                kind.__name__, (kind, *added), changed | {"__module__": kind.__module__}
            )

    def adopt(self, model: nn.Module) -> None:
        """Give the modules of the engine's model vLLM's classes again."""
        for module in model.modules():
            module.__class__ = self._rewritten.get(type(module), type(module))

    def __bool__(self) -> bool:
        return bool(self._rewritten)


@contextmanager
def unpatched_classes() -> Iterator[PatchedClasses]:
    """Restore transformers' classes after an engine has been built inside this context."""
    from vllm.model_executor.models.transformers import base as module

    base: Any = module
    found, decorate = PatchedClasses(), base.support_torch_compile

    def noting(**options: Any) -> Any:
        def decorated(kind: type) -> Any:
            found.note(kind)
            return decorate(**options)(kind)

        return decorated

    base.support_torch_compile = noting
    try:
        yield found
    finally:
        base.support_torch_compile = decorate
        found.restore()


class RenewedLayers:
    """Records the layers of an engine's model that a reload writes, to find those that it misses.

    Some of vLLM's models copy tensors into place themselves. A reload does not notice that and restores the old ones.
    """

    def __init__(self) -> None:
        self._renewed: list[nn.Module] = []

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Record the layers that a reload writes inside this context."""
        from vllm.model_executor.model_loader.reload import layerwise as module

        layerwise: Any = module
        process = layerwise._layerwise_process

        def noting(layer: nn.Module, info: object) -> None:
            self._renewed.append(layer)
            process(layer, info)

        layerwise._layerwise_process = noting
        try:
            yield
        finally:
            layerwise._layerwise_process = process

    def refuse_stale(self, model: nn.Module) -> None:
        """Raise UserError if a layer has weights that the reload did not renew."""
        from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

        renewed = {id(weight) for layer in self._renewed for weight in layer.parameters(recurse=False)}
        for name, layer in model.named_modules():
            loadable, _ = get_layerwise_info(layer).restore_metadata
            own = {id(weight) for weight in layer.parameters(recurse=False)}
            if loadable and not own <= renewed and layer not in self._renewed:
                raise UserError(
                    f"vLLM cannot take over new weights for its {type(model).__name__}: {name} "
                    f'({type(layer).__name__}) keeps the old ones; set engine.backend = "transformers"'
                )


def follow_stream(worker: Any) -> None:
    """Make an engine on a GPU compute in the stream of the calling thread, once the GPU has finished all earlier work.

    vLLM's second model runner keeps the stream in which it first sampled. In another stream it would copy samples to
    main memory before they are there, and go on in the first one.
    """
    torch.cuda.synchronize()
    worker.model_runner.main_stream = torch.cuda.current_stream()


def unhook_compiled(model: nn.Module) -> None:
    """Let go of a compiled model, which torch would keep for ever: call it before the engine is shut down.

    vLLM does so itself only if its engine is dropped while the model is still there.
    """
    from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper

    for module in model.modules():
        if isinstance(module, TorchCompileWithNoGuardsWrapper):
            module.cleanup()


def forget_packed_experts(model: nn.Module) -> None:
    """Make a reload pack the weights of experts as the first load did; on a CPU vLLM would not pack them again."""
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


def repack_output_layer(model: nn.Module) -> None:
    """Renew the packed copy of the output layer's weights that vLLM keeps on a CPU.

    A layer that is tied to the embedding receives no weights in a reload and would keep the old copy.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


def rotate_heads_on_a_cpu() -> None:
    """Make rotary embeddings correct for queries of shape (token, head, width), where vLLM's CPU kernel is wrong."""
    from vllm.model_executor.layers.rotary_embedding import base

    embedding: Any = base.RotaryEmbedding
    kernel = embedding.forward_cpu
    if kernel.__name__ == "forward_cpu":

        def repaired(self: Any, positions: Tensor, query: Tensor, key: Tensor | None = None) -> Any:
            forward = kernel if query.ndim == 2 else type(self).forward_native
            return forward(self, positions, query, key)

        embedding.forward_cpu = repaired
