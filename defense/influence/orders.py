"""Which order of products is cheapest for a layer, by a cost model, and how to cut them.

On wide layers with few positions rotating first is 30 times cheaper, on narrow layers with many
positions 6 times dearer, so every layer gets its own.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from defense.influence.layers import Shape

# Time of one multiply-add of a batched product, and of writing and reading one element of a
# per-sample gradient, in multiply-adds of one large product.
BATCHED = 2.0
ELEMENT = 32.0

GROUP = 5 * 2**20  # elements of the activations that are treated together
TILE = 2**22  # elements of the per-sample gradients that are held together
LARGE_TILE = 7 * 2**20  # the same where each is multiplied by a wide matrix; below 32 MiB
BLOCK = 128  # outputs of a tile that spans not all inputs; products of few outputs are slow


def balanced(count: int, limit: int) -> Iterator[slice]:
    """Cut `count` rows into even parts of at most `limit`."""
    parts = -(-count // max(1, limit))
    for part in range(parts):
        yield slice(count * part // parts, count * (part + 1) // parts)


@dataclass(frozen=True)
class Order:
    """When to rotate: before contracting over positions, or the gradient afterwards."""

    inputs_first: bool
    outputs_first: bool

    def cost(self, shape: Shape) -> float:
        """Time per sample, in multiply-adds of a large product."""
        t, o, i = shape.positions, shape.outputs, shape.inputs
        inputs = t * i * i if self.inputs_first else o * i * i + ELEMENT * o * i
        outputs = t * o * o if self.outputs_first else BATCHED * o * o * i + ELEMENT * o * i
        return shape.groups * (inputs + outputs + BATCHED * t * o * i + ELEMENT * o * i)

    def __str__(self) -> str:
        """Name the order."""
        names = {
            (True, True): "rotate first",
            (True, False): "inputs first",
            (False, True): "outputs first",
            (False, False): "gradient first",
        }
        return names[self.inputs_first, self.outputs_first]


ROTATE_FIRST = Order(inputs_first=True, outputs_first=True)
ORDERS = tuple(Order(a, b) for a in (True, False) for b in (True, False))


@dataclass(frozen=True)
class Gramian:
    """Squared gradients from products of pairs of positions, without forming the gradients."""

    def cost(self, shape: Shape) -> float:
        """Time per sample, in multiply-adds of a large product."""
        t, o, i = shape.positions, shape.outputs, shape.inputs
        pairs = t * (t + 1) // 2
        return shape.groups * (t * i * i + t * o * o + pairs * (o * i + ELEMENT * (o + i)))

    def __str__(self) -> str:
        """Name the order."""
        return "Gramian"


def cheapest(shape: Shape) -> Order:
    """Choose the order for gradients themselves."""
    return min(ORDERS, key=lambda order: order.cost(shape))


def cheapest_squares(shape: Shape) -> Order | Gramian:
    """Choose the order for sums of squared gradients."""
    ways: tuple[Order | Gramian, ...] = (*ORDERS, Gramian())
    return min(ways, key=lambda order: order.cost(shape))


@dataclass(frozen=True)
class Frame:
    """Sides on which rows are rotated to meet queries; on the others queries are rotated back.

    With few rows it is cheaper to rotate the rows, with many the queries.
    """

    inputs: bool
    outputs: bool

    @classmethod
    def of(cls, shape: Shape, rows: int, queries: int, norms: bool) -> "Frame":
        """Choose one.

        Args:
            shape: Sizes of the layer.
            rows: Number of rows.
            queries: Number of queries, times dampings.
            norms: Whether the norms of the rows are wanted, which need the eigenbasis.
        """
        t, o, i = shape.positions, shape.outputs, shape.inputs
        return cls(norms or rows * min(t, o) < queries * o, norms or rows * t < queries * i)

    def cost(self, shape: Shape, rows: int, queries: int) -> float:
        """Time of all rotations, in multiply-adds of a large product."""
        t, o, i = shape.positions, shape.outputs, shape.inputs
        inputs = i * i * (rows * min(t, o) if self.inputs else queries * o)
        outputs = o * o * (rows * t if self.outputs else queries * i)
        return shape.groups * (inputs + outputs)

    def __str__(self) -> str:
        """Name it."""
        names = {
            (True, True): "rows rotated",
            (True, False): "rows' inputs rotated",
            (False, True): "rows' outputs rotated",
            (False, False): "queries rotated back",
        }
        return names[self.inputs, self.outputs]


@dataclass(frozen=True)
class Grid:
    """How the per-sample gradients ``[g, o, i]`` of a layer are cut into tiles.

    Attributes:
        outputs: Outputs of a tile, at most.
        inputs: Inputs of a tile, at most.
    """

    outputs: int
    inputs: int

    @classmethod
    def of(cls, shape: Shape, frame: Frame, rows: int) -> "Grid":
        """Choose one whose tiles span some samples.

        Args:
            shape: Sizes of the layer, of the rows.
            frame: Sides on which the rows are rotated.
            rows: Samples.
        """
        room = max(1, TILE // (rows * shape.groups))
        if rotates_late(shape, frame):
            return cls(max(1, min(shape.outputs, room // shape.inputs)), shape.inputs)
        outputs = min(shape.outputs, max(BLOCK, room // shape.inputs), room)
        return cls(outputs, min(shape.inputs, room // outputs))

    def cells(self, shape: Shape) -> list[tuple[slice, slice]]:
        """List the outputs and inputs of every tile."""
        return [
            (outputs, inputs)
            for outputs in balanced(shape.outputs, self.outputs)
            for inputs in balanced(shape.inputs, self.inputs)
        ]


def rotates_late(shape: Shape, frame: Frame) -> bool:
    """Tell whether inputs are rotated after the contraction, which takes all of them."""
    return frame.inputs and shape.positions > shape.outputs
