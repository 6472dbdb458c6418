"""The lock, metrics and reports in the repository are of the code beside them."""

from pathlib import Path

from dvc.dependency import ParamsDependency
from dvc.repo import Repo

ROOT = Path(__file__).parents[2]
CODE = tuple(str(ROOT / folder) for folder in ("defense", "pipelines"))


def test_the_committed_record_is_of_this_code() -> None:
    with Repo(str(ROOT)) as repo:
        stages = [stage for stage in repo.index.stages if Path(stage.wdir) == ROOT]
        known = [
            (stage.name, part)
            for stage in stages
            for part in stage.deps
            if isinstance(part, ParamsDependency) or part.fs_path.startswith(CODE)
        ]
        known += [(stage.name, out) for stage in stages for out in stage.outs if out.exists]
        changed = {f"{name}: {part}" for name, part in known if part.status()}
    assert len(stages) > 10
    assert not changed, "run dvc repro and commit dvc.lock, metrics/ and reports/ with the change"
