"""Decoding as a CUDA graph: a step costs what the GPU takes for it, not what Python takes to launch its kernels.

A state that never grows makes every step the same work on the same tensors. So the first step on a cache runs as any
other, the second is captured, and from then on steps are replayed.
"""

import threading
from collections.abc import Callable

import torch
from torch import Tensor, nn

from t2r_kernels import takes_triton

from .cache import SlotCacheLayer, T2RCache

Step = Callable[..., Tensor]
"""From a step's inputs to its output; it leaves the cache as the step does."""

CAPTURING = threading.Lock()  # torch captures one graph at a time


class NotCapturable(RuntimeError):
    """What runs cannot be captured as a CUDA graph: it waits for the device, say, or the graph would not fit."""


class StepGraph:
    """The steps on one cache.

    Args:
        network: whose step it is.
        inputs: of the first step. Those of all others have the same shapes and dtypes.
    """

    def __init__(self, network: nn.Module, inputs: list[Tensor]):
        self.inputs, self.inference = [x.clone() for x in inputs], torch.is_inference_mode_enabled()
        self.state: list[Tensor] | None = None  # what steps begin with and leave; None before the first
        self.captured: torch.cuda.CUDAGraph | None = None
        self.output: Tensor | None = None
        self.modules = list(network.modules())
        self.weights = [*network.parameters(), *network.buffers()]
        self.adapters = [module for module in self.modules if hasattr(module, "_disable_adapters")]  # PEFT's
        self.setting = self._setting()
        # Elsewhere, or moved there as they are wanted (accelerate); quantised ones may wait for the device.
        self.goes = not any(hasattr(module, "_hf_hook") for module in self.modules) and all(
            x.device == inputs[0].device and x.is_floating_point() for x in self.weights
        )

    def _setting(self) -> list:
        """What steps depend on beside their inputs: where weights are, and which adapters are on."""
        adapters = (
            (x._disable_adapters, str(x._active_adapter), str(getattr(x, "merged_adapters", ""))) for x in self.adapters
        )
        return [x.data_ptr() for x in self.weights] + list(adapters)

    def fits(self, inputs: list[Tensor], state: list[Tensor]) -> bool:
        """Whether a step is like those before."""
        return (
            self.inference == torch.is_inference_mode_enabled()
            and _alike(inputs, self.inputs)
            and (self.state is None or _alike(state, self.state))
            and self.setting == self._setting()
        )

    def run(self, step: Step, inputs: list[Tensor], cache: T2RCache, state: list[Tensor]) -> Tensor:
        """Run a step; `state` is what the cache holds.

        Raises:
            NotCapturable: it cannot be captured. The cache is then as it was.
        """
        torch._foreach_copy_(self.inputs, inputs)
        if self.state is None:
            output = step(*self.inputs)
            self.state = cache.tensors()
            return output
        if self.captured is None:
            self.state = state
            self._capture(step, cache)
        else:
            self._take_up(cache, state)
        self.captured.replay()
        cache.count(1)
        return self.output.clone()

    def _capture(self, step: Step, cache: T2RCache) -> None:
        """Record a step, which does not run it."""
        before = [(layer, layer.groups, layer.cumulative_length) for layer in cache.layers]
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with CAPTURING, torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.output = step(*self.inputs)
                _copy_changed(self.state, cache.tensors())
        except RuntimeError as error:
            reason = error.__context__ or error  # that the capture has failed is what torch says last
            raise NotCapturable(" ".join(str(reason).split())) from error
        finally:
            torch.cuda.set_stream(stream)  # a capture that fails stays on its own
            for layer, groups, length in before:
                layer.groups, layer.cumulative_length = groups, length
        self.captured = graph

    def _take_up(self, cache: T2RCache, state: list[Tensor]) -> None:
        """Go on from what the cache holds, if that is not what the last step left: beams changed places, say."""
        if _copy_changed(self.state, state):
            left = iter(self.state)
            for layer in cache.layers:
                layer.groups = [slots.each(lambda _: next(left)) for slots in layer.groups]

    def __reduce__(self):
        return type(None), ()  # a copy of its cache is captured anew


def graphed(network: nn.Module, step: Step, inputs: list[Tensor], cache: T2RCache) -> Tensor:
    """Run a step, as a CUDA graph from the second of its kind on; as it is where somebody looks in.

    Args:
        network: whose step it is.
        step: reads `inputs`, and the cache.
        inputs: tensors on the current device.
        cache: whose layers all hold slots.

    Raises:
        NotCapturable: it cannot be captured. The cache is then as it was, without a graph.
    """
    state = cache.tensors()
    if cache.graph is None or not cache.graph.fits(inputs, state):
        cache.graph = StepGraph(network, inputs)
    if not cache.graph.goes or any(map(_is_watched, cache.graph.modules)):
        return step(*inputs)
    try:
        return cache.graph.run(step, inputs, cache, state)
    except NotCapturable:
        cache.graph = None
        raise


def takes_graph(head_dim: int, cache: T2RCache | None, hidden_states: Tensor, options: dict) -> bool:
    """Whether a pass may be a graph's: a step without gradients on the current GPU, all layers with slots.

    Autocast is left out, since the weights that it casts are freed with it.

    Args:
        head_dim: of the model.
        cache: of the pass.
        hidden_states: what layers read, `[B, T, hidden]`.
        options: what the caller has given beside.
    """
    if not hidden_states.is_cuda or hidden_states.shape[1] != 1 or cache is None or torch.is_grad_enabled():
        return False
    if torch.is_autocast_enabled("cuda") or torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
        return False
    if hidden_states.device.index != torch.cuda.current_device() or torch.nn.modules.module._has_any_global_hook():
        return False
    if any(option is not None and option is not False for option in options.values()):
        return False
    slots = all(isinstance(layer, SlotCacheLayer) and layer.groups for layer in cache.layers)
    return slots and takes_triton(head_dim)  # plain PyTorch waits for the device


def _is_watched(module: nn.Module) -> bool:
    """Whether a module has hooks, but for those by which transformers collects hidden states when asked to."""
    if not module._forward_hooks and not module._forward_pre_hooks:
        return False
    collects = all("output_capturing_hook" in getattr(x, "__qualname__", "") for x in module._forward_hooks.values())
    return bool(module._forward_pre_hooks) or not collects


def _copy_changed(old: list[Tensor], new: list[Tensor]) -> bool:
    """Copy what is another tensor into the old one; returns whether anything was."""
    changed = [pair for pair in zip(old, new, strict=True) if pair[0] is not pair[1]]
    if changed:
        torch._foreach_copy_(*map(list, zip(*changed, strict=True)))
    return bool(changed)


def _alike(some: list[Tensor], others: list[Tensor]) -> bool:
    return len(some) == len(others) and all(
        x is y or (x.shape == y.shape and x.dtype == y.dtype) for x, y in zip(some, others, strict=True)
    )
