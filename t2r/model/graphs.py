"""Decoding as a CUDA graph: a step costs what the GPU takes for it, not what Python takes to launch its kernels.

A state that never grows makes every step the same work on the same tensors. So the first step on a cache runs as any
other, the second is captured, and from then on steps are replayed.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from t2r_kernels import takes_triton

from .cache import SlotCacheLayer, T2RCache

Step = Callable[..., Tensor]
"""From a step's inputs to its output; it leaves the cache as the step does."""


class StepGraph:
    """The steps on one cache. Weights must stay where they are as long as it is in use.

    Args:
        inputs: of the first step. Those of all others have the same shapes and dtypes.
    """

    def __init__(self, inputs: list[Tensor]):
        self.inputs, self.inference = [x.clone() for x in inputs], torch.is_inference_mode_enabled()
        self.state: list[Tensor] | None = None  # what steps begin with and leave; None before the first
        self.graph: torch.cuda.CUDAGraph | None = None
        self.output: Tensor | None = None

    def fits(self, inputs: list[Tensor], state: list[Tensor]) -> bool:
        """Whether a step is like those before."""
        return (
            self.inference == torch.is_inference_mode_enabled()
            and _alike(inputs, self.inputs)
            and (self.state is None or _alike(state, self.state))
        )

    def run(self, step: Step, inputs: list[Tensor], cache: T2RCache) -> Tensor:
        """Run a step.

        Raises:
            NotCapturable: it cannot be captured. The cache is then as it was.
        """
        torch._foreach_copy_(self.inputs, inputs)
        if self.state is None:
            output = step(*self.inputs)
            self.state = cache.tensors()
            return output
        if self.graph is None:
            self.state = cache.tensors()
            self._capture(step, cache)
        else:
            self._take_up(cache)
        self.graph.replay()
        cache.count(1)
        return self.output.clone()

    def _capture(self, step: Step, cache: T2RCache) -> None:
        """Record a step, which does not run it."""
        before = [(layer, layer.groups, layer.cumulative_length) for layer in cache.layers]
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.output = step(*self.inputs)
                _copy_changed(self.state, cache.tensors())
        except RuntimeError as error:
            raise NotCapturable(" ".join(str(error).split())) from error
        finally:
            for layer, groups, length in before:
                layer.groups, layer.cumulative_length = groups, length
        self.graph = graph

    def _take_up(self, cache: T2RCache) -> None:
        """Go on from what the cache holds, if that is not what the last step left: beams changed places, say."""
        if _copy_changed(self.state, cache.tensors()):
            left = iter(self.state)
            for layer in cache.layers:
                layer.groups = [slots.each(lambda _: next(left)) for slots in layer.groups]

    def __reduce__(self):
        return type(None), ()  # a copy of its cache is captured anew


class NotCapturable(RuntimeError):
    """A step cannot be recorded."""


def graphed(step: Step, inputs: list[Tensor], cache: T2RCache) -> Tensor:
    """Run a step, as a CUDA graph from the second of its kind on.

    Raises:
        NotCapturable: it cannot be captured. The cache is then as it was.
    """
    if cache.graph is None or not cache.graph.fits(inputs, cache.tensors()):
        cache.graph = StepGraph(inputs)
    return cache.graph.run(step, inputs, cache)


def takes_graph(layers: nn.ModuleList, cache: T2RCache | None, hidden_states: Tensor, options: dict) -> bool:
    """Whether a pass may be a graph's: a step without gradients on one GPU, all layers with slots, nobody looking in.

    Autocast is left out, since the weights that it casts are freed with it.

    Args:
        layers: of the model.
        cache: of the pass.
        hidden_states: what layers read, `[B, T, hidden]`.
        options: what the caller has given beside.
    """
    if not hidden_states.is_cuda or hidden_states.shape[1] != 1 or cache is None or torch.is_grad_enabled():
        return False
    if torch.is_autocast_enabled("cuda") or torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
        return False
    if any(option is not None and option is not False for option in options.values()):
        return False
    if not all(isinstance(layer, SlotCacheLayer) and layer.groups for layer in cache.layers):
        return False
    if not takes_triton(layers[0].self_attn.head_dim):  # plain PyTorch waits for the device
        return False
    return (cache.graph is not None and cache.graph.graph is not None) or not _watched(layers, hidden_states.device)


def _watched(layers: nn.ModuleList, device: torch.device) -> bool:
    """Whether modules have hooks, somebody's or accelerate's, or are elsewhere."""
    hooked = any(m._forward_hooks or m._forward_pre_hooks or hasattr(m, "_hf_hook") for m in layers.modules())
    return hooked or any(parameter.device != device for parameter in layers.parameters())


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
