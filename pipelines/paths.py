"""Where every stage reads and writes, relative to the folder that holds dvc.yaml."""

from dataclasses import dataclass
from pathlib import Path

HOME = Path()
PARAMS = Path("params.yaml")
REFERENCES = ("truth", "chance", "nothing")  # stand for a detector in a matrix of runs

DEPTHS = {
    "data": 2,
    "poison": 3,
    "train": 3,
    "factors": 3,
    "directions": 3,
    "scan": 3,
    "influence": 3,
    "detect": 4,
    "confirm": 4,
    "reference": 4,
    "counterfactual": 4,
    "remediate": 5,
    "audit": 5,
}  # parts of a cell's name that a stage's results depend on
LEVELS = {2: "data", 3: "attack", 4: "detection"}


@dataclass(frozen=True)
class Paths:
    """The folders of one run; a matrix of runs shares those of its earlier stages.

    Attributes:
        data: Folder of what depends on the data alone.
        attack: Folder of what follows up to the influence scores.
        detection: Folder of the flags.
        remediation: Folder of the remediated model and everything after it.
    """

    data: Path = HOME
    attack: Path = HOME
    detection: Path = HOME
    remediation: Path = HOME

    @property
    def clean_train(self) -> Path:
        """Artefact of the data stage."""
        return self.data / "artifacts/clean_train"

    @property
    def test(self) -> Path:
        """Artefact of the data stage."""
        return self.data / "artifacts/test"

    @property
    def poisoned_train(self) -> Path:
        """Artefact of the poison stage."""
        return self.attack / "artifacts/poisoned_train"

    @property
    def probe(self) -> Path:
        """Artefact of the poison stage."""
        return self.attack / "artifacts/probe"

    @property
    def truth(self) -> Path:
        """Artefact of the poison stage; no detector or unlearner may read it."""
        return self.attack / "artifacts/truth"

    @property
    def suspect(self) -> Path:
        """Artefact of the train stage."""
        return self.attack / "artifacts/suspect"

    @property
    def affected(self) -> Path:
        """Artefact of the train stage."""
        return self.attack / "artifacts/affected"

    @property
    def factors(self) -> Path:
        """Artefact of the factors stage."""
        return self.attack / "artifacts/factors"

    @property
    def directions(self) -> Path:
        """Artefact of the directions stage."""
        return self.attack / "artifacts/directions"

    @property
    def scan(self) -> Path:
        """Artefact of the scan stage."""
        return self.attack / "artifacts/scan"

    @property
    def doubts(self) -> Path:
        """Artefact of the scan stage."""
        return self.attack / "artifacts/doubts"

    @property
    def scores(self) -> Path:
        """Artefact of the influence stage."""
        return self.attack / "artifacts/scores"

    @property
    def flags(self) -> Path:
        """Artefact of the detect stage."""
        return self.detection / "artifacts/flags"

    @property
    def confirmation(self) -> Path:
        """Artefact of the confirm stage."""
        return self.detection / "artifacts/confirmation"

    @property
    def remediated(self) -> Path:
        """Artefact of the remediate stage."""
        return self.remediation / "artifacts/remediated"

    @property
    def reports(self) -> Path:
        """Folder of the audit's and the gate's reports."""
        return self.remediation / "reports"

    @property
    def plots(self) -> Path:
        """Folder of the audit's pictures."""
        return self.reports / "plots"

    def metrics(self, stage: str) -> Path:
        """File of a stage's figures."""
        return self._home(stage) / "metrics" / f"{stage}.json"

    def scratch(self, stage: str) -> Path:
        """Folder of a stage's checkpoints, not under DVC."""
        return self._home(stage) / "scratch" / stage

    def _home(self, stage: str) -> Path:
        home: Path = getattr(self, LEVELS.get(DEPTHS.get(stage, 5), "remediation"))
        return home
