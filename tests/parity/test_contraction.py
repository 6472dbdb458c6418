"""Every way of computing the same thing gives the same numbers."""

import pytest
import torch
from torch import Tensor, nn

from defense.influence import contraction, orders, products
from defense.influence.borders import worthwhile
from defense.influence.contraction import Basis, Rotation, add_squares, gradients, tiles
from defense.influence.covariance import Autocorrelation, Gram, shifted_size
from defense.influence.layers import Shape, Trace, activations
from defense.influence.orders import (
    ORDERS,
    Frame,
    Gramian,
    Grid,
    cheapest,
    cheapest_squares,
)
from defense.influence.products import Workspace
from tests.parity.layout import per_sample_gradient

SHIFTED = {
    "padding 1": {"kernel_size": 3, "padding": 1},
    "no padding": {"kernel_size": 3},
    "wide": {"kernel_size": 5, "padding": 2},
    "oblong": {"kernel_size": (3, 2), "padding": (2, 1)},
    "dilation": {"kernel_size": 3, "dilation": 2, "padding": 2},
    "uneven dilation": {"kernel_size": 3, "dilation": (1, 2), "padding": (1, 2)},
    "same": {"kernel_size": (3, 5), "padding": "same"},
    "padding beyond the kernel": {"kernel_size": 3, "padding": 3},
    "mostly padding": {"kernel_size": 5, "padding": 4},
}


def trace_of(layer: nn.Module, x: Tensor) -> Trace:
    y = layer(x).detach()
    positions = y.numel() // (len(y) * layer.weight.shape[0])
    return Trace(layer, x, positions, torch.randn_like(y))


@pytest.mark.parametrize("size", [(9, 8), (4, 4), (5, 3)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", SHIFTED)
def test_autocorrelation_is_the_covariance_of_patches(kind: str, bias: bool, size) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 4, bias=bias, **SHIFTED[kind]).double()
    trace = trace_of(layer, torch.randn(5, 3, *size, dtype=torch.float64))
    shifted, unfolded = Autocorrelation(layer, *size), Gram("activation")
    for rows in (slice(0, 2), slice(2, 5)):
        for covariance in (shifted, unfolded):
            covariance.add(trace.rows(rows), torch.float64, Workspace())
    torch.testing.assert_close(shifted.total(), unfolded.total(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [(9, 8), (4, 4), (5, 3)])
@pytest.mark.parametrize("kind", SHIFTED)
def test_products_of_shifts_are_the_convolution(kind: str, size) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 4, **SHIFTED[kind]).double()
    x = torch.randn(5, 3, *size, dtype=torch.float64)
    covariance = Autocorrelation(layer, *size)
    convolved, multiplied = covariance._by_convolution(x), covariance._by_products(x, Workspace())
    middle = layer.kernel_size[1] - 1
    torch.testing.assert_close(multiplied[:, :, 1:], convolved[:, :, 1:])
    torch.testing.assert_close(multiplied[:, :, 0, middle:], convolved[:, :, 0, middle:])


def test_wide_layers_have_the_same_covariance_in_bfloat16() -> None:
    torch.manual_seed(0)
    trace = trace_of(nn.Conv2d(128, 4, 3, padding=1), torch.randn(3, 128, 5, 6))
    shifted, unfolded = Autocorrelation(trace.layer, 5, 6), Gram("activation")
    for covariance, dtype in ((shifted, torch.bfloat16), (unfolded, torch.float32)):
        covariance.add(trace, dtype, Workspace())
    difference = shifted.total() - unfolded.total()
    assert difference.norm() < 0.01 * unfolded.total().norm()


def test_covariance_is_computed_the_cheaper_way() -> None:
    wide = trace_of(nn.Conv2d(64, 64, 3, padding=1), torch.randn(1, 64, 32, 32))
    strided = trace_of(nn.Conv2d(64, 64, 3, 2, 1), torch.randn(1, 64, 32, 32))
    assert shifted_size(wide) == (32, 32)
    assert shifted_size(strided) is None


FRAMES = [Frame(inputs, outputs) for inputs in (True, False) for outputs in (True, False)]

LAYERS = {
    "convolution": (lambda: nn.Conv2d(4, 6, 3, padding=1), (4, 5, 6)),
    "strided": (lambda: nn.Conv2d(4, 6, 3, stride=2, bias=False), (4, 7, 7)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (4, 5, 5)),
    "linear": (lambda: nn.Linear(7, 5), (7,)),
    "tokens": (lambda: nn.Linear(7, 5, bias=False), (3, 7)),
}


@pytest.fixture(params=LAYERS)
def problem(request) -> tuple[Trace, Basis, Tensor]:
    """A trace, a random basis, and the gradients in it."""
    torch.manual_seed(1)
    build, size = LAYERS[request.param]
    trace = trace_of(build().double(), torch.randn(9, *size, dtype=torch.float64))
    shape = trace.shape
    inputs, outputs = (
        torch.linalg.qr(torch.randn(shape.groups, width, width, dtype=torch.float64)).Q
        for width in (shape.inputs, shape.outputs)
    )
    basis = Basis.of(inputs, outputs, trace.x.device, torch.float64)
    return trace, basis, outputs.transpose(1, 2) @ per_sample_gradient(trace) @ inputs


@pytest.mark.parametrize("order", list(ORDERS), ids=str)
def test_every_order_gives_the_same_gradients(order, problem) -> None:
    trace, basis, expected = problem
    parts = gradients(trace, basis, order, torch.float64, Workspace())
    result = torch.cat([part.clone() for _, part in parts])
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("order", [*ORDERS, Gramian()], ids=str)
def test_every_order_gives_the_same_squares(order, problem) -> None:
    trace, basis, expected = problem
    total = torch.zeros_like(expected[0])
    add_squares(total, trace, basis, order, torch.float64, Workspace())
    torch.testing.assert_close(total, expected.square().sum(0), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("room", [2**4, 2**8, 2**20])
@pytest.mark.parametrize("frame", FRAMES, ids=str)
def test_tiles_are_rotated_on_the_sides_of_the_frame(frame, room, problem, monkeypatch) -> None:
    trace, basis, expected = problem
    monkeypatch.setattr(orders, "TILE", room)
    monkeypatch.setattr(orders, "BLOCK", 2)
    grid = Grid.of(trace.shape, frame, len(trace))
    cells = grid.cells(trace.shape)
    assert (len(cells) == 1) == (room == 2**20)
    if not frame.inputs:
        expected = expected @ basis.inputs.source
    if not frame.outputs:
        expected = basis.outputs.source.transpose(1, 2) @ expected
    monkeypatch.setattr(contraction, "GROUP", 2 * trace.positions * trace.shape.inputs)
    result = torch.full_like(expected, torch.nan)
    parts = tiles(trace, basis, frame, grid, torch.float64, Workspace())
    for samples, number, tile in parts:
        result[samples, :, *cells[number]] = tile
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("width", [3, 130])
def test_products_are_those_of_matmul(width: int, monkeypatch) -> None:
    monkeypatch.setattr(products, "DEEP", 1)
    monkeypatch.setattr(products, "LARGE", 1)
    torch.manual_seed(0)
    left, right = torch.randn(2, 7, 200)[..., 20 : 20 + width], torch.randn(2, 7, 150)
    out = torch.empty(2, width, 150)
    tolerance = {"rtol": 1e-5, "atol": 1e-5}
    expected = torch.einsum("bnx,bny->bxy", left, right)
    torch.testing.assert_close(products.outer_each(left, right, out), expected, **tolerance)
    torch.testing.assert_close(products.outer(left[0], right[0]), expected[0], **tolerance)
    plain, wide = left[0], torch.randn(5, 400)[:, 9 : 9 + width]
    expected = plain.double() @ wide.double().T
    for side in (wide, products.packed(wide)):
        result = products.product(plain, side)
        torch.testing.assert_close(result, expected.float(), **tolerance)


def test_a_frame_is_chosen_by_the_number_of_rows() -> None:
    shape = Shape(1, 16, 512, 4608)
    few, some, many = (Frame.of(shape, rows, 51, norms=False) for rows in (1000, 4096, 50_000))
    assert few == Frame(inputs=True, outputs=True)
    assert some == Frame(inputs=False, outputs=True)
    assert many == Frame(inputs=False, outputs=False)
    assert Frame.of(shape, 50_000, 51, norms=True) == Frame(inputs=True, outputs=True)
    for rows in (1000, 4096, 50_000):
        costs = {frame: frame.cost(shape, rows, 51) for frame in FRAMES}
        assert Frame.of(shape, rows, 51, norms=False) == min(costs, key=costs.__getitem__)


def test_the_cost_model_follows_the_shape() -> None:
    assert str(cheapest_squares(Shape(1, 16, 512, 4608))) == "rotate first"
    assert str(cheapest(Shape(1, 1024, 64, 27))) == "gradient first"
    assert str(cheapest(Shape(1, 256, 128, 1152))) == "outputs first"
    assert str(cheapest_squares(Shape(1, 1, 10, 513))) == "Gramian"


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(9, 8), (4, 4), (5, 3)])
@pytest.mark.parametrize("kind", SHIFTED)
def test_windows_without_padding_are_rotated_the_same(kind: str, size, stride: int) -> None:
    torch.manual_seed(0)
    if kind == "same" and stride > 1:
        return
    layer = nn.Conv2d(3, 4, bias=False, stride=stride, **SHIFTED[kind]).double()
    trace = trace_of(layer, torch.randn(5, 3, *size, dtype=torch.float64))
    width = trace.shape.inputs
    rotation = Rotation(
        torch.randn(1, width, width, dtype=torch.float64), torch.device("cpu"), torch.float64
    )
    expected = rotation(activations(trace, torch.float64, Workspace()))
    torch.testing.assert_close(
        rotation.windows(trace, Workspace()), expected, rtol=1e-12, atol=1e-12
    )


def test_small_maps_leave_out_the_padding_and_give_the_same_squares(monkeypatch) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(16, 8, 3, padding=1, bias=False)
    trace = trace_of(layer, torch.randn(6, 16, 4, 4))
    assert worthwhile(layer, trace.x)
    assert not worthwhile(layer, torch.randn(6, 16, 8, 8))
    assert not worthwhile(nn.Conv2d(16, 8, 3, padding=1), trace.x)
    basis = Basis.of(torch.randn(1, 144, 144), torch.randn(1, 8, 8), trace.x.device, torch.float32)
    totals = []
    for inside in (0.75, 0.0):
        monkeypatch.setattr("defense.influence.borders.INSIDE", inside)
        total = torch.zeros(1, 8, 144)
        add_squares(total, trace, basis, ORDERS[0], torch.float32, Workspace())
        totals.append(total)
    torch.testing.assert_close(totals[0], totals[1], rtol=1e-4, atol=1e-3)
