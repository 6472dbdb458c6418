"""Everything that can be set, in one schema; unknown keys are refused before a stage computes."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError

from defense.attacks import AnyAttack
from defense.audit import AuditSettings
from defense.confirmation import ConfirmSettings
from defense.datasets import AnyDataSource
from defense.detectors import AnyDetector
from defense.errors import DefenseError
from defense.gate import Policy
from defense.influence.factors import FactorSettings
from defense.influence.queries import TransformSettings
from defense.influence.scores import ScoreSettings
from defense.influence.store import DirectionSettings
from defense.method import Method
from defense.models import AnyArchitecture
from defense.recipe import Recipe
from defense.scan import ScanSettings
from defense.unlearning import AnyUnlearner


class AffectedSettings(Method):
    """Which wrong predictions the investigation starts from.

    Attributes:
        count: Inputs drawn at random among the probe images that succeed.
        fill: If fewer succeed, take others of the probe as if they had; for measuring attacks
            that may fail, not for incidents.
    """

    count: int = Field(gt=0, le=100)
    fill: bool = False


class TrackingSettings(Method):
    """Where runs are recorded; the server comes from MLFLOW_TRACKING_URI.

    Attributes:
        experiment: Name of the MLflow experiment.
    """

    experiment: str = Field(min_length=1)


class Params(Method):
    """The contents of params.yaml.

    Attributes:
        seed: Seed of every random stream of the run.
        data: Where images come from.
        attack: How the training set is poisoned.
        model: What is trained.
        train: How it is trained.
        affected: Which inputs the investigation starts from.
        factors: How the curvature is estimated.
        directions: How the directions of the rows are stored.
        scan: How blocks of rows are sought without an incident.
        transforms: How the affected inputs are transformed.
        scores: How influence is computed.
        detector: How rows are flagged.
        confirm: How flagged rows are unlearnt in part, to confirm them.
        unlearner: How their effect is removed.
        audit: What counts as success.
        gate: What may be released.
        tracking: Where runs are recorded.
    """

    seed: int = Field(ge=0)
    data: AnyDataSource
    attack: AnyAttack
    model: AnyArchitecture
    train: Recipe
    affected: AffectedSettings
    factors: FactorSettings
    directions: DirectionSettings
    scan: ScanSettings = ScanSettings()
    transforms: TransformSettings
    scores: ScoreSettings
    detector: AnyDetector
    confirm: ConfirmSettings = ConfirmSettings()
    unlearner: AnyUnlearner
    audit: AuditSettings
    gate: Policy
    tracking: TrackingSettings


def read_params(path: Path) -> Params:
    """Read and validate a params file.

    Raises:
        DefenseError: The file is missing or not valid; lists every problem on one line.
    """
    return validate(path, read_yaml(path))


def read_yaml(path: Path) -> Any:
    """Read a YAML file.

    Raises:
        DefenseError: The file is missing or not YAML.
    """
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DefenseError(f"expected parameters in {path.resolve()}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DefenseError(f"{path} is not YAML: {' '.join(str(error).split())}") from error


def validate(path: Path, sections: Any) -> Params:
    """Validate the sections that were read from a file.

    Raises:
        DefenseError: They are not valid; lists every problem on one line.
    """
    try:
        return Params.model_validate(sections)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(str(part) for part in item['loc']) or 'file'}: {item['msg']}"
            for item in error.errors(include_url=False)
        )
        raise DefenseError(f"{path}: {problems}") from error
