"""Where every stage reads and writes, relative to the folder that holds dvc.yaml."""

from pathlib import Path

PARAMS = Path("params.yaml")
HOME = Path()
SCRATCH = Path("scratch")  # checkpoints of unfinished stages by name, not under DVC

ARTIFACTS = Path("artifacts")
CLEAN_TRAIN = ARTIFACTS / "clean_train"
TEST = ARTIFACTS / "test"
POISONED_TRAIN = ARTIFACTS / "poisoned_train"
PROBE = ARTIFACTS / "probe"
TRUTH = ARTIFACTS / "truth"
SUSPECT = ARTIFACTS / "suspect"
AFFECTED = ARTIFACTS / "affected"
FACTORS = ARTIFACTS / "factors"
SCORES = ARTIFACTS / "scores"
FLAGS = ARTIFACTS / "flags"
REMEDIATED = ARTIFACTS / "remediated"

REPORTS = Path("reports")
PLOTS = REPORTS / "plots"
METRICS = Path("metrics")
