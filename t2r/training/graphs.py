"""Forward and backward passes as CUDA graphs: a small model's step costs what it costs the host to launch its kernels.

A graph is captured once for each shape of micro-batch and then replayed. What it reads and writes stays where it is:
inputs are copied in, outputs are copied out, and gradients are added to buffers that outlive the optimizer's step.
"""

import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import Tensor, nn

from t2r.model import T2RConfig
from t2r.model.graphs import NotCapturable
from t2r.training.config import TrainConfig
from t2r_kernels import takes_triton

MOST_PARAMETERS = 2_000_000_000  # of a model whose step waits for the host rather than for the device
FEWEST_DOCUMENTS = 32

Pass = Callable[[dict[str, Tensor], Hashable], tuple[Tensor, ...]]
"""From inputs, and what else the pass depends on, to outputs. It runs the backward pass too."""


@dataclass
class Captured:
    """A captured pass: the tensors it reads and writes, and how to run it again."""

    inputs: dict[str, Tensor]
    outputs: tuple[Tensor, ...]
    replay: Callable[[], None]


class GraphedPass:
    """Runs a forward and backward pass over micro-batches as CUDA graphs.

    Nothing in the pass may wait for the device, nor depend on the values of its inputs on the host.

    Args:
        run: the pass.
        parameters: all that the backward pass has gradients for.
    """

    def __init__(self, run: Pass, parameters: list[nn.Parameter]):
        self.run, self.parameters = run, parameters
        self.gradients = [torch.zeros_like(p) for p in parameters]
        self.captured: dict[Hashable, Captured] = {}
        self.pool = None  # of memory, common to all graphs

    def __call__(self, inputs: dict[str, Tensor], kind: Hashable = None) -> tuple[Tensor, ...]:
        """Run the pass and add its gradients to the parameters'.

        Args:
            inputs: tensors of any shape; each combination of shapes has a graph of its own.
            kind: handed to the pass as it is; each has graphs of its own.

        Raises:
            NotCapturable: the pass cannot be captured. Gradients are then what they were, and all graphs are gone.
            ValueError: a capture failed though all seemed well.
        """
        self._hold_gradients()
        key = kind, *((name, x.shape) for name, x in inputs.items())
        if key not in self.captured:
            self.captured[key] = self._capture({name: x.clone() for name, x in inputs.items()}, kind)
        captured = self.captured[key]
        for name, x in inputs.items():
            captured.inputs[name].copy_(x)
        captured.replay()
        return tuple(x.clone() for x in captured.outputs)

    def _hold_gradients(self) -> None:
        """Give each parameter its buffer, with the gradient that it has so far."""
        for parameter, buffer in zip(self.parameters, self.gradients, strict=True):
            if parameter.grad is None:
                buffer.zero_()
            elif parameter.grad is not buffer:
                buffer.copy_(parameter.grad)
            parameter.grad = buffer

    def _capture(self, inputs: dict[str, Tensor], kind: Hashable) -> Captured:
        so_far, random = [buffer.clone() for buffer in self.gradients], torch.cuda.get_rng_state()
        try:
            self._warm_up(inputs, kind)
        except NotCapturable:
            self.captured, self.pool = {}, None  # what they hold is wanted elsewhere
            raise
        finally:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # the graph takes its memory from a pool of its own
            torch.cuda.set_rng_state(random)  # a resumed run captures anew, and must not draw other numbers for it
            torch._foreach_copy_(self.gradients, so_far)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self.pool):
                outputs = self.run(inputs, kind)
        except RuntimeError as error:  # what a broken capture leaves behind is not to be gone on from
            reason = str(error).partition("\n")[0]
            message = f"a CUDA graph of this model cannot be captured ({reason}); set cuda_graphs: false"
            raise ValueError(message) from error
        self.pool = graph.pool()
        return Captured(inputs, outputs, graph.replay)

    def _warm_up(self, inputs: dict[str, Tensor], kind: Hashable) -> None:
        """Run the pass twice: kernels are compiled, libraries take their workspaces; and see that nothing waits."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                self.run(inputs, kind)
                with _no_waiting():
                    self.run(inputs, kind)
        except torch.OutOfMemoryError as error:
            raise NotCapturable("there is no memory for them") from error
        except RuntimeError as error:
            if "synchroniz" not in str(error):
                raise
            raise NotCapturable("it waits for the device") from error
        finally:
            torch.cuda.current_stream().wait_stream(stream)


@contextmanager
def _no_waiting() -> Iterator[None]:
    """Within the context, what waits for the device is an error."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a prototype, says torch
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def wants_graphs(config: TrainConfig, network: T2RConfig, parameters: int, dtype: str, state: PartialState) -> bool:
    """Whether passes are to be CUDA graphs: as the recipe says, or where that serves.

    Args:
        config: of the run.
        network: of the model.
        parameters: of the model.
        dtype: of its frozen weights.
        state: this process among the others.

    Raises:
        ValueError: graphs are asked for where they cannot be.
    """
    against = {
        "a GPU": state.device.type != "cuda",
        "the operator's triton backend": not takes_triton(network.head_dim),
        "dtype: bfloat16": dtype != "bfloat16",
        "one process": state.distributed_type != DistributedType.NO,
        "gradient_checkpointing: false": config.gradient_checkpointing,
        "no teacher_bits": bool(config.teacher_bits),
    }
    if config.cuda_graphs is None:
        return not any(against.values()) and parameters <= MOST_PARAMETERS
    missing = [what for what, lacks in against.items() if lacks]
    if config.cuda_graphs and missing:
        raise ValueError(f"cuda_graphs: true needs {' and '.join(missing)}; leave it unset")
    return config.cuda_graphs


def padded_bounds(cu_seqlens: Tensor, total: int) -> Tensor:
    """Bounds of packed documents, with empty ones behind, so that batches of many numbers of documents share a shape.

    Args:
        cu_seqlens: `[N + 1]`.
        total: tokens of all documents.

    Returns:
        `[M + 1]`: M is a power of two.
    """
    documents = len(cu_seqlens) - 1
    wanted = max(FEWEST_DOCUMENTS, 1 << (documents - 1).bit_length())
    return F.pad(cu_seqlens, (0, wanted - documents), value=total)
