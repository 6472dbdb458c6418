"""Per-sample gradients and parameters in the layout of the factors, the plain way."""

from torch import Tensor

from defense.influence.layers import Trace, activations, output_gradients
from defense.influence.products import Workspace


def per_sample_gradient(trace: Trace) -> Tensor:
    """Contract activations and output gradients over positions: ``[n, g, o, i]``."""
    dtype = trace.x.dtype
    a, s = activations(trace, dtype, Workspace()), output_gradients(trace, dtype)
    return s.transpose(2, 3) @ a
