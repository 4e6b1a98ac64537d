"""BatchNorm folding: the scale of a BatchNorm goes into the weight of the layer before it.

In evaluation a BatchNorm multiplies channel ``c`` by ``s[c] = gamma[c] / sqrt(var[c] + eps)`` and
adds ``beta[c] - s[c] * mean[c]``. Engines that compute in integers fold that into the convolution
before it, so it is the folded weight that they round, and the one whose channels should have the
quantizer's scales (Jacob et al., Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference, CVPR 2018, section 3.2; Krishnamoorthi, arXiv:1806.08342, section
3.2.2).

The producer's weight and bias take the scale. The rest, a constant per channel, stays where it is:
the BatchNorm multiplies by one and adds it, as the bias of a convolution would, which many have
not got. So every module keeps its parameters, and ``state_dict`` its keys and shapes; the state
restores into a model that was never folded, and computes the same there. While the model is
quantized, the BatchNorm also ignores training mode (`bittern.nn.batchnorm.FoldedBatchNorm`):
statistics of a batch would undo the folding. `bittern.revert` gives it its class back, and not the
gain and the statistics: the model goes on computing the same in evaluation.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bittern.calibration.context import CalibrationContext, Forward
from bittern.calibration.moves import check_followed
from bittern.errors import CalibrationError
from bittern.nn.batchnorm import FoldedBatchNorm, freeze, is_folded, is_plain, keep_shift
from bittern.records import Plan
from bittern.tracing import Trace
from bittern.tracing.chains import stem
from bittern.tracing.flow import OpNode, Value

__all__ = ["freeze_folded", "run_fold_batchnorm"]

log = logging.getLogger("bittern.calibration")

NAME = "fold-batchnorm"

_CONVOLUTIONS = frozenset(["conv1d", "conv2d", "conv3d"])
_TRANSPOSED = frozenset(["conv_transpose1d", "conv_transpose2d", "conv_transpose3d"])
_PRODUCERS = frozenset(["linear"]) | _CONVOLUTIONS | _TRANSPOSED


@dataclass(frozen=True)
class _Producer:
    """The layer before a BatchNorm.

    Attributes:
        weight: Full name of its weight.
        bias: Full name of its bias; ``None`` where it has none.
        groups: Number of groups of a transposed convolution, whose weight has the shape
            ``(in_channels, out_channels / groups, ...)``; 0 for what has its output channels first.
    """

    weight: str
    bias: str | None
    groups: int


def run_fold_batchnorm(
    model: nn.Module, plan: Plan, forward: Forward | None, context: CalibrationContext
) -> None:
    """Fold every BatchNorm whose input is the output of one convolution or linear layer only.

    The weights of models in half precision are rounded once more by it.

    Args:
        model: The converted model; its weights change, its function does not.
        plan: Its plan.
        forward: Unused: the trace needs shapes only.
        context: Services; gives the trace.

    Raises:
        CalibrationError: There are BatchNorms and no trace, or no step that sets ranges follows.
    """
    norms = {
        n: m for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
    }
    if not norms:
        return
    check_followed(NAME, plan)
    trace = context.trace()
    if trace is None:
        raise CalibrationError(
            "folding BatchNorms needs a batch that the model can be traced on",
            hint="give the data as a list, a DataLoader or a path, not as a function or iterator",
        )
    holders = _holders(model)
    folded, left = [], []
    for name, norm in norms.items():
        if isinstance(norm, FoldedBatchNorm):
            continue
        found = _find(name, norm, trace, holders)
        if isinstance(found, str):
            left.append(f"{name} ({found})")
        else:
            folded.append(name)
            _fold(model, name, found, context)
    if folded:
        log.info("folded into the layers before them: %s", ", ".join(folded))
    if left:
        log.info("not folded: %s", "; ".join(left))


def freeze_folded(model: nn.Module) -> None:
    """Let the BatchNorms of a restored model that were folded ignore training mode again.

    Args:
        model: A model with the tensors of a saved one; a folded BatchNorm is known by its state.
    """
    for module in list(model.modules()):
        if is_plain(module) and not isinstance(module, FoldedBatchNorm) and is_folded(module):
            freeze(module)


def _find(name: str, norm: nn.Module, trace: Trace, holders: Mapping[int, int]) -> _Producer | str:
    """Return the layer that can take a BatchNorm's scale, or why there is none."""
    graph = trace.flow.graph
    if not is_plain(norm):
        return f"{type(norm).__qualname__} has a forward of its own"
    if "forward" in vars(norm):
        return "its forward was replaced on the object itself"
    if norm.running_mean is None:
        return "it keeps no running statistics"
    nodes = [n for n in graph.nodes if n.module == name and stem(n.op) == "batch_norm"]
    if len(nodes) != 1:
        return f"it ran {len(nodes)} times"
    node = nodes[0]
    read = node.tensor(0)
    producer = read.producer
    if producer is None or stem(producer.op) not in _PRODUCERS:
        return "what it reads is not the output of a convolution or linear layer"
    if read.users != [node] or read in graph.outputs or read in graph.waiting:
        return f"the output of {producer.module or 'the model'} is read elsewhere, too"
    weight, bias = producer.tensor(1), producer.arg(2, "bias")
    if not _channels_meet(producer, weight):
        return f"its channels are not the output channels of {producer.module or 'the model'}"
    own = [value for value in node.args[1:5] if isinstance(value, Value)]
    if any(value.name.rpartition(".")[0] != name for value in own):
        return "it computes with tensors that are not its own"
    for value, reader in [*((v, node) for v in own), (weight, producer), (bias, producer)]:
        if value is None:
            continue
        if not value.stored:
            return f"the weights of {producer.module or 'the model'} are computed"
        if value.users != [reader] or holders[id(_get(trace.model, value.name))] != 1:
            return f"{value.name} is used elsewhere, too"
    transposed = stem(producer.op) in _TRANSPOSED
    groups = producer.arg(6, "groups", 1) if transposed else 0
    return _Producer(weight.name, None if bias is None else bias.name, groups)


def _channels_meet(producer: OpNode, weight: Value) -> bool:
    """Whether axis 1 of the output, which a BatchNorm scales, is that of the output channels."""
    rank = 2 if stem(producer.op) == "linear" else len(weight.shape)
    return len(producer.out.shape) == rank


def _holders(model: nn.Module) -> Counter[int]:
    """Count under how many names the model has a tensor, by its id."""
    return Counter(id(tensor) for module in model.modules() for _, tensor in _tensors(module))


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Return a module's own parameters and buffers, each as often as it has a name."""
    every = (*module._parameters.items(), *module._buffers.items())
    return [(name, tensor) for name, tensor in every if tensor is not None]


def _get(model: nn.Module, name: str) -> Tensor:
    module, _, local = name.rpartition(".")
    found: Tensor = getattr(model.get_submodule(module), local)
    return found


def _fold(model: nn.Module, name: str, producer: _Producer, context: CalibrationContext) -> None:
    """Scale the producer, leave the constant to the BatchNorm."""
    norm: Any = model.get_submodule(name)
    layer = model.get_submodule(producer.weight.rpartition(".")[0])
    scaled = [producer.weight, *filter(None, [producer.bias])]
    own = [f"{name}.{local}" for local, _ in _tensors(norm)]

    @contextmanager
    def written() -> Iterator[None]:
        with context.access(layer, write=True), context.access(norm, write=True), torch.no_grad():
            yield

    with written():
        context.undo.append(_undo(model, norm, [*scaled, *own], written))
        mean, gain, bias = norm.running_mean, norm.weight, norm.bias
        scale = (norm.running_var.double() + norm.eps).rsqrt()
        scale = scale if gain is None else scale * gain
        shift = -scale * mean if bias is None else bias - scale * mean
        for tensor in (_get(model, full) for full in scaled):
            tensor.copy_(tensor * _shaped(scale, tensor, groups=producer.groups))
        keep_shift(norm, shift)
        freeze(norm)


def _undo(
    model: nn.Module,
    norm: nn.Module,
    names: list[str],
    written: Callable[[], AbstractContextManager[None]],
) -> Callable[[], None]:
    """Return a function that makes a BatchNorm and the layer before it what they are now."""
    cls = type(norm)
    before = {name: _get(model, name).detach().clone() for name in names}
    trained = {name: _get(model, name).requires_grad for name in names}

    def undo() -> None:
        with written():
            for name, value in before.items():
                _get(model, name).copy_(value).requires_grad_(trained[name])
        norm.__class__ = cls  # its quantizers are still there

    return undo


def _shaped(scale: Tensor, tensor: Tensor, *, groups: int) -> Tensor:
    """Return the scale of every output channel so that it multiplies a weight or bias."""
    if groups == 0 or tensor.dim() == 1:
        return scale.reshape(-1, *([1] * (tensor.dim() - 1)))
    inputs = tensor.shape[0] // groups
    rows = scale.reshape(groups, -1).repeat_interleave(inputs, 0)  # the group of each input channel
    return rows.reshape(*rows.shape, *([1] * (tensor.dim() - 2)))
