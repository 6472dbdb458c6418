"""Per-sample gradients of linear and convolution layers, from inputs and output gradients.

Every supported layer is brought to one form. With `g` groups, `t` positions (pixels or tokens)
that share the weights, `i` inputs (counting the bias) and `o` outputs per group, the gradient
of sample n is ``sum_t s[n, g, t, :] a[n, g, t, :]^T`` in ``[g, o, i]``, where `a` are the
layer's inputs and `s` the gradients of its outputs (Grosse & Martens 2016, section 3).
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from defense.errors import UnsupportedLayerError
from defense.influence.products import Workspace
from defense.records import Coverage

Layer = nn.Linear | nn.Conv2d
NORMALISATIONS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def find_layers(model: nn.Module, exclude: Sequence[str] = ()) -> dict[str, Layer]:
    """List the layers EK-FAC treats, by name.

    Args:
        model: The model.
        exclude: Names of modules to leave out, with all they contain, and of parameters that no
            factors are known for.

    Raises:
        UnsupportedLayerError: There is none, a name in `exclude` is none of these, or a module
            holds parameters that are neither those of a plain linear layer, a plain convolution
            or a normalisation, nor excluded.
    """
    layers, bare = dict[str, Layer](), dict[str, str]()
    modules = dict(model.named_modules())
    unsupported = {name: _without_factors(name, module) for name, module in modules.items()}
    _require_known(exclude, modules.keys() | set().union(*unsupported.values()))
    for name, module in modules.items():
        _require_statistics(name, module)
        if _within(name, exclude) or _within(name, bare):
            continue
        if isinstance(module, Layer):
            _require_plain(name, module)
            layers[name] = module
        bare |= dict.fromkeys(sorted(unsupported[name] - {*exclude}), type(module).__name__)
    if not layers:
        kinds = sorted({type(module).__name__ for module in modules.values()})
        raise UnsupportedLayerError(
            f"expected a model with at least one Linear or Conv2d layer, got {', '.join(kinds)}"
        )
    if bare:
        told = ", ".join(f"{name} ({kind})" for name, kind in bare.items())
        raise UnsupportedLayerError(
            f"no EK-FAC factors are known for {told}: only for Linear and Conv2d; to trace "
            f"influence through the other layers alone, add to factors.exclude: {listed(bare)}"
        )
    return layers


def _require_known(exclude: Sequence[str], known: Collection[str]) -> None:
    if unknown := sorted({*exclude} - {*known}):
        raise UnsupportedLayerError(
            "factors.exclude names no module, nor a parameter that has no factors by itself: "
            + ", ".join(unknown)
        )


def _require_statistics(name: str, module: nn.Module) -> None:
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
        raise UnsupportedLayerError(
            f"{name} ({type(module).__name__}) keeps no running statistics, so a sample's "
            "gradient depends on its batch; train it with track_running_stats=True"
        )


def _within(name: str, modules: Collection[str]) -> bool:
    """Tell whether a module is one of some, or lies in one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _without_factors(name: str, module: nn.Module) -> set[str]:
    """Name a module's own parameters that have no factors.

    The module itself is named if no layer lies in it, or if it is an attention, which uses the
    parameters of its parts without calling them.
    """
    own = {parameter for parameter, _ in module.named_parameters(name, recurse=False)}
    if not own or isinstance(module, (Layer, *NORMALISATIONS)):
        return set()
    called = any(isinstance(part, Layer) for part in module.modules())
    whole = name and (not called or isinstance(module, nn.MultiheadAttention))
    return {name} if whole else own


def listed(names: Iterable[str]) -> str:
    """Write names as a list that can be pasted into params.yaml."""
    return f"[{', '.join(names)}]"


def _require_plain(name: str, layer: Layer) -> None:
    """Refuse a layer whose gradient is not the outer product of its input and output gradient."""
    kind, used = type(layer), nn.Conv2d if isinstance(layer, nn.Conv2d) else nn.Linear
    methods = [method for method in ("forward", "_conv_forward") if hasattr(used, method)]
    same = all(getattr(kind, method) is getattr(used, method) for method in methods)
    parameters = layer.weight, layer.bias
    own = all(part is None or isinstance(part, nn.Parameter) for part in parameters)
    if not (same and own):
        raise UnsupportedLayerError(
            f"{name or 'the model'} ({kind.__name__}) changes its weight or its input on the way "
            "(such as weight normalisation, pruning, or padding in forward), so that its gradient "
            f"is not that of a plain {used.__name__}; add '{name}' to factors.exclude to leave it "
            "out"
        )


def coverage(model: nn.Module, names: Iterable[str]) -> Coverage:
    """Account for the parameters of a model, given the layers that are treated."""
    treated, inside, left = set(names), 0, Counter[str]()
    for name, module in model.named_modules():
        count = sum(parameter.numel() for parameter in module.parameters(recurse=False))
        if name in treated:
            inside += count
        elif count:
            left[type(module).__name__] += count
    return Coverage(inside / (inside + sum(left.values())), dict(left))


@dataclass(frozen=True)
class Shape:
    """Sizes of a layer's per-sample gradient ``[g, o, i]``.

    Attributes:
        groups: Blocks of a grouped convolution, else 1.
        positions: Pixels or tokens that share the weights, `t`.
        outputs: Outputs per group, `o`.
        inputs: Inputs per group, `i`, counting the bias.
    """

    groups: int
    positions: int
    outputs: int
    inputs: int


@dataclass(frozen=True)
class Trace:
    """What one layer saw of a batch of `n` samples.

    Attributes:
        layer: The layer.
        x: Its input, ``[n, ...]``.
        positions: Pixels or tokens of its output.
        gradient: Gradient of the differentiated total with respect to its output,
            ``[n, ...]``; empty after a forward pass alone.
    """

    layer: Layer
    x: Tensor
    positions: int
    gradient: Tensor

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.x)

    def rows(self, part: slice) -> "Trace":
        """Select some of the samples."""
        return Trace(self.layer, self.x[part], self.positions, self.gradient[part])

    @property
    def shape(self) -> Shape:
        """Sizes of the per-sample gradient."""
        layer = self.layer
        groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
        inputs = layer.weight[0].numel() + (layer.bias is not None)
        return Shape(groups, self.positions, layer.weight.shape[0] // groups, inputs)


def activations(trace: Trace, dtype: torch.dtype, space: Workspace) -> Tensor:
    """Bring a layer's input to ``[n, g, t, i]``, with a last column of ones for a bias.

    The inputs of a convolution are ordered by kernel row, kernel column and channel, so that
    they are copied in long runs from channels-last memory.

    Args:
        trace: The layer and its input.
        dtype: Of the result.
        space: Where the result may lie; it lasts until the next call.
    """
    layer, shape = trace.layer, trace.shape
    windows = _windows(layer, trace.x) if isinstance(layer, nn.Conv2d) else _tokens(trace.x)
    inner = shape.inputs - (layer.bias is not None)
    full = (len(trace), shape.groups, shape.positions, shape.inputs)
    if inner == windows.shape[-1] == shape.inputs and windows.dtype == dtype:
        return windows.reshape(full)  # as it lies in memory
    result = space.take("activations", full, dtype, trace.x.device)
    kernel, place = windows.shape[4:], windows.shape[2:4]
    result[..., :inner].unflatten(-1, kernel).unflatten(2, place).copy_(windows)
    result[..., inner:] = 1
    return result


def _tokens(x: Tensor) -> Tensor:
    """Bring the input of a linear layer to ``[n, 1, t, 1, i]``."""
    return x.reshape(x.shape[0], 1, -1, 1, x.shape[-1])


def _windows(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """View what a convolution's kernel sees: ``[n, g, h, w, kernel rows, columns, c]``."""
    p = padded(layer, x).contiguous(memory_format=torch.channels_last)
    (rows, columns), (down, right) = layer.kernel_size, layer.stride
    n, channels, height, width = p.shape
    reach = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    places = (height - reach[0] - 1) // down + 1, (width - reach[1] - 1) // right + 1
    sn, sc, sh, sw = p.stride()
    each = channels // layer.groups
    return p.as_strided(
        (n, layer.groups, *places, rows, columns, each),
        (sn, each * sc, sh * down, sw * right, sh * layer.dilation[0], sw * layer.dilation[1], sc),
    )


def padded(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """Pad the input as the convolution does."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)


def output_gradients(trace: Trace, dtype: torch.dtype) -> Tensor:
    """Bring the gradient of a layer's output to ``[n, g, t, o]``."""
    grad, shape = trace.gradient, trace.shape
    if isinstance(trace.layer, nn.Conv2d):
        grad = grad.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
    full = (len(trace), shape.positions, shape.groups, shape.outputs)
    return grad.reshape(full).transpose(1, 2).to(dtype)


def flat_gradient(layer: Layer, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Bring the gradients of a layer's parameters to ``[g, o, i]``, as above."""
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    if isinstance(layer, nn.Conv2d):
        weight = weight.permute(0, 2, 3, 1)
    matrix = weight.reshape(groups, weight.shape[0] // groups, -1)
    return matrix if bias is None else torch.cat([matrix, bias.reshape(groups, -1, 1)], dim=2)


Visit = Callable[[str, Trace], None]


class Tape:
    """Shows what every layer saw of a batch, as soon as it is known, and keeps nothing after.

    Attributes:
        order: Names of the layers in the order they ran.
    """

    def __init__(self, layers: dict[str, Layer]) -> None:
        """Watch `layers`, on which the hooks are to be registered."""
        self.layers = layers
        self.start(0)

    def start(self, num_samples: int) -> None:
        """Begin a forward pass, forgetting the one before."""
        self.num_samples = num_samples
        self.order: list[str] = []
        self.seen: dict[str, Trace] = {}
        self.roots: list[Tensor] = []
        self.visit: Visit | None = None

    def hook(self, name: str) -> Callable[..., Tensor]:
        """Return the forward hook, with keywords, of one layer."""
        return lambda module, inputs, named, output: self.keep(
            name, inputs[0] if inputs else named["input"], output
        )

    def keep(self, name: str, x: Tensor, output: Tensor) -> Tensor:
        """Note one call of a layer; returns the output for the layers after it.

        Raises:
            UnsupportedLayerError: The layer ran before, or its input does not have one entry
                per sample in front.
        """
        if name in self.order:
            raise UnsupportedLayerError(
                f"layer {name} runs more than once per forward pass; "
                "per-sample gradients of recurrent layers are not supported"
            )
        if len(x) != self.num_samples:
            raise UnsupportedLayerError(
                f"layer {name} gets an input {list(x.shape)} for {self.num_samples} samples, "
                "expected the samples in front: keep tokens in a dimension of their own"
            )
        layer = self.layers[name]
        positions = output.numel() // (len(output) * layer.weight.shape[0])
        self.order.append(name)
        self.seen[name] = Trace(layer, x.detach(), positions, output.new_empty(0))
        if not torch.is_grad_enabled():
            return output
        if not output.requires_grad:
            self.roots.append(output.detach().requires_grad_())
            output = self.roots[-1].clone()  # a leaf would refuse an activation in place
        # The hook sees the output as it is before any activation in place.
        output.register_hook(lambda gradient: self.show(name, gradient))
        return output

    def show(self, name: str, gradient: Tensor) -> None:
        """Show a layer whose output gradient has arrived."""
        trace = self.seen.pop(name)
        if self.visit is not None:
            self.visit(name, replace(trace, gradient=gradient))

    def forward(self, visit: Visit) -> None:
        """Show every layer that ran in the latest forward pass, without gradients."""
        for name in self.order:
            visit(name, self.seen.pop(name))

    def backward(
        self, outputs: Tensor, cotangents: Tensor, visit: Visit, wanted: Sequence[Tensor] = ()
    ) -> Sequence[Tensor | None]:
        """Differentiate, and show every layer the gradient reaches, last layer first.

        Args:
            outputs: The model's outputs, ``[n, k]``; sample n must depend on input n alone,
                which holds in eval mode.
            cotangents: Gradient of the value of interest with respect to them, ``[n, k]``.
            visit: What to do with a layer.
            wanted: What else to differentiate with respect to.

        Returns:
            The gradients of what is wanted, None where it has no part in the outputs.
        """
        self.visit, sources = visit, [*wanted, *self.roots]
        found = (
            torch.autograd.grad(outputs, sources, cotangents, allow_unused=True) if sources else ()
        )
        self.seen, self.roots, self.visit = {}, [], None
        return found[: len(wanted)]
