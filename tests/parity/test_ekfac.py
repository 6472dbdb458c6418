"""EK-FAC against explicit matrices, leave-one-out retraining and kronfluence."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from defense.influence.factors import FactorSettings, fit_factors
from defense.influence.queries import TransformSettings, make_queries
from defense.influence.scores import ScoreSettings, pairwise_scores
from defense.influence.task import CLASSIFICATION, Task
from defense.records import Queries, image_set
from tests.conftest import make_images


def small_model(*, groups: int = 1, bias: bool = True) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=bias),
        nn.Tanh(),
        nn.Conv2d(6, 4, 3, groups=groups),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(144, 4, bias=bias),
    ).eval()


def fit(model: nn.Module, images, fisher="empirical", batch_size=32):
    settings = FactorSettings(tier="exact", batch_size=batch_size, fisher=fisher)
    return fit_factors(model, images, settings, torch.Generator().manual_seed(0))


class UnitNoiseRegression(Task):
    """Squared loss; sampled targets are one above or below, so the Fisher matrix is exact."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return 0.5 * (outputs[:, 0] - targets).square()

    def sample(self, outputs: Tensor, draws: Tensor) -> Tensor:
        return outputs[:, 0] + (draws < 0.5).float() * 2 - 1

    def measure(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs[:, 0]

    def loss_scale(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return targets - outputs[:, 0]


def ridge_problem():
    """Pixels as features; the target depends on them, with noise."""
    rng = np.random.default_rng(5)
    pixels = rng.integers(0, 256, (600, 1, 2, 3), dtype=np.uint8)
    x = pixels.reshape(600, 6) / 255
    y = np.rint(8 * x @ rng.normal(size=6) + rng.normal(size=600)).astype(np.int64)
    ids = np.array([str(row) for row in range(600)])
    return image_set(pixels, y, ids, ("unused",)), x, y.astype(float)


def solve_ridge(x: np.ndarray, y: np.ndarray, count: int, penalty: float) -> np.ndarray:
    """Minimise sum 0.5 (x w - y)^2 / count + 0.5 penalty |w|^2, bias included."""
    wide = np.column_stack([x, np.ones(len(x))])
    return np.linalg.solve(wide.T @ wide / count + penalty * np.eye(7), wide.T @ y / count)


def test_influence_is_leave_one_out_on_ridge_regression() -> None:
    images, x, y = ridge_problem()
    penalty, rows = 0.05, np.arange(0, 600, 5)
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 1))
    weights = solve_ridge(x, y, 600, penalty)
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor(weights[None, :6]))
        model[1].bias.copy_(torch.tensor(weights[6:]))
    task = UnitNoiseRegression()
    generator = torch.Generator().manual_seed(0)
    factors = fit_factors(model, images, FactorSettings(tier="exact"), generator, task)
    damping = penalty / float(factors.layers["1"].lambda_matrix.mean())
    query = images.images(np.arange(3))
    nothing = torch.zeros(3, dtype=torch.int64)
    queries = Queries(query, nothing, torch.arange(3), nothing)
    scores = pairwise_scores(model, factors, queries, images, ScoreSettings(damping=damping), task)
    wide = np.column_stack([x[:3], np.ones(3)])
    true = np.empty((3, len(rows)))
    for place, row in enumerate(rows):
        kept = np.arange(600) != row
        without = solve_ridge(x[kept], y[kept], 600, penalty)
        true[:, place] = wide @ (weights - without)
    predicted = scores[:, rows] / 600
    large = np.abs(true) > 0.05 * np.abs(true).max()
    assert (np.sign(predicted) == np.sign(true))[large].all()
    assert np.corrcoef(predicted.ravel(), true.ravel())[0, 1] > 0.999
    # A removed row loses at most its leverage, here a few percent, against the estimate.
    np.testing.assert_allclose(predicted[large], true[large], rtol=0.04)


def scores_of(model: nn.Module, images, batch_size: int) -> np.ndarray:
    factors = fit(model, images, "sampled", batch_size)
    generator = torch.Generator().manual_seed(0)
    settings = TransformSettings(num_transforms=7)
    queries = make_queries(images.images(np.arange(2)), [0, 1], 4, settings, generator)
    return pairwise_scores(model, factors, queries, images, ScoreSettings(batch_size=batch_size))


def test_batch_size_does_not_change_the_result() -> None:
    model, images = small_model(), make_images(96, seed=4)
    first, second = (scores_of(model, images, size) for size in (7, 96))
    np.testing.assert_allclose(first, second, rtol=1e-2, atol=1e-3 * np.abs(second).max())


class HeadFirst(nn.Module):
    """Defines its layers in another order than it runs them."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.stem = nn.Linear(588, 4), nn.Conv2d(3, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.stem(x)).flatten(1))


def test_layers_may_be_defined_in_any_order() -> None:
    torch.manual_seed(0)
    model, images = HeadFirst().eval(), make_images(48, seed=4)
    same = nn.Sequential(model.stem, nn.Tanh(), nn.Flatten(), model.head)
    np.testing.assert_allclose(scores_of(model, images, 16), scores_of(same, images, 16), rtol=1e-4)


def test_sampled_labels_follow_the_model() -> None:
    outputs = torch.tensor([[0.0, 1.0, 2.0]]).repeat(20000, 1)
    draws = torch.rand(20000, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(CLASSIFICATION.sample(outputs, draws), minlength=3) / 20000
    torch.testing.assert_close(counts, outputs[0].softmax(0), atol=0.01, rtol=0)


def kronfluence_scores(model: nn.Module, images, queries: Queries, folder: Path):
    """Factors and pairwise scores of the peer, on the same rows with the same labels."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task as PeerTask
    from torch.utils.data import TensorDataset

    class Peer(PeerTask):
        def compute_train_loss(self, batch, model, sample=False):
            assert not sample
            return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")

        def compute_measurement(self, batch, model):
            return -CLASSIFICATION.measure(model(batch[0]), batch[1]).sum()

    train = TensorDataset(images.images(), images.targets())
    analyzer = Analyzer(
        "parity",
        prepare_model(model, Peer()),
        Peer(),
        cpu=True,
        output_dir=str(folder),
        disable_tqdm=True,
    )
    analyzer.fit_all_factors(
        "factors",
        train,
        per_device_batch_size=32,
        factor_args=FactorArguments(strategy="ekfac", use_empirical_fisher=True),
    )
    analyzer.compute_pairwise_scores(
        "scores",
        "factors",
        TensorDataset(queries.images, queries.labels),
        train,
        per_device_query_batch_size=16,
        per_device_train_batch_size=32,
        score_args=ScoreArguments(damping_factor=None),  # its heuristic: 0.1 x mean Lambda
    )
    factors = analyzer.load_all_factors("factors")
    return factors, analyzer.load_pairwise_scores("scores")["all_modules"].numpy()


def test_factors_and_scores_equal_kronfluence(tmp_path: Path) -> None:
    model, images = small_model(), make_images(96, seed=4)
    generator = torch.Generator().manual_seed(0)
    queries = make_queries(
        images.images(np.arange(2)), [0, 1], 4, TransformSettings(num_transforms=7), generator
    )
    ours = fit(model, images)
    scores = pairwise_scores(model, ours, queries, images, ScoreSettings(damping=0.1))
    theirs, peer_scores = kronfluence_scores(model, images, queries, tmp_path)
    for name, layer in ours.layers.items():
        count = theirs["num_lambda_processed"][name].item()
        peer = theirs["lambda_matrix"][name] / count
        torch.testing.assert_close(layer.lambda_matrix[0], peer, rtol=0.02, atol=1e-3 * peer.max())
    np.testing.assert_allclose(scores, peer_scores, rtol=5e-3, atol=2e-4 * np.abs(scores).max())
    assert np.corrcoef(scores.ravel(), peer_scores.ravel())[0, 1] > 0.9999
