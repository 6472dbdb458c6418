"""The documents say what the code does."""

import re
from pathlib import Path

import pytest
import yaml

from defense.lineage import LINEAGE
from pipelines.__main__ import STAGES
from pipelines.reference import page

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_parameters_page_is_written_from_the_schema() -> None:
    text = (ROOT / "docs" / "parameters.md").read_text(encoding="utf-8")
    assert text == page(), "run: python -m pipelines.reference > docs/parameters.md"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_named_files_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", text)
    missing = [link for link in links if not (document.parent / link).exists()]
    assert missing == []


def test_first_code_block_of_the_readme_is_two_commands() -> None:
    """CI runs the second one as it stands there."""
    block = re.search(r"^```\w*\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    assert block is not None
    lines = block.group(1).splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("pip install ")
    assert lines[0].endswith("&& dvc repro")
    assert lines[1].startswith("pip install ")
    assert lines[1].endswith("&& pytest")


def test_the_readme_shows_the_verdict_that_is_committed() -> None:
    shown = re.search(r"^\$ defense gate\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    verdict = (ROOT / "reports" / "verdict.md").read_text(encoding="utf-8")
    assert shown is not None
    assert verdict.startswith(shown.group(1))


def test_readme_graph_has_every_stage() -> None:
    graph = re.search(r"```mermaid\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert graph is not None
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    assert stages.keys() <= set(STAGES)
    for stage in stages:
        assert re.search(rf"\b{stage}\b", graph.group(1)), stage
    assert LINEAGE.name in (ROOT / "README.md").read_text()
