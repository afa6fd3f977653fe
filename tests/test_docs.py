"""The pages of docs/ tell the truth: their messages are in the source, their metrics are logged, their commands exist."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from hydra_ppo.cli.main import COMMANDS, main
from tests.faults.project import make_project, ppo_settings, sft_settings, write

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
INSTALLED = {"quickstart", "profile", "plan", "init", "serve"}
"""Commands that entry points add."""


def source() -> str:
    """All of the library as one text, string literals that follow each other joined."""
    text = "\n".join(path.read_text() for path in sorted((ROOT / "hydra_ppo").rglob("*.py")))
    return re.sub(r'"\s*\n\s*f?"', "", text)


def test_every_message_that_is_explained_is_in_the_source():
    quoted = re.findall(r"^\| `([^`]+)` \|", (DOCS / "messages.md").read_text(), flags=re.M)
    assert len(quoted) >= 30
    text = source()
    assert [words for words in quoted if words not in text] == []


def named_metrics() -> set[str]:
    """Keys that docs/metrics.md names, in patterns: NAME and PHASE stand for any name."""
    return set(re.findall(r"`([a-z_]+(?:/[A-Za-z0-9_/-]+)?)`", (DOCS / "metrics.md").read_text()))


@pytest.mark.parametrize("command", ["sft", "ppo"])
def test_every_metric_that_a_run_logs_is_explained(command, tmp_path):
    project = make_project(tmp_path)
    make = sft_settings if command == "sft" else ppo_settings
    settings = make(project, run={"memory": "always"}, **({"eval_every": 1} if command == "sft" else {"steps": 1}))
    assert main([command, write(tmp_path / "run.yaml", settings)]) == 0
    keys = {key for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines() for key in json.loads(line)}
    known = named_metrics()
    patterns = [re.sub("[A-Z]{4,}", "[^/]+", name) for name in known if re.search("[A-Z]{4,}", name)]
    unknown = [
        key for key in sorted(keys - {"step", "time"} - known) if not any(re.fullmatch(pattern, key) for pattern in patterns)
    ]
    assert unknown == []


def test_no_metric_is_explained_that_nothing_logs():
    text = source()
    for name in named_metrics():
        last = re.sub("[A-Z]{4,}.*", "", name).rsplit("/", 1)[-1]
        assert last in text, name


def test_the_commands_that_pages_type_exist():
    known = COMMANDS.keys() | INSTALLED
    for page in PAGES:
        for block in re.findall(r"```sh\n(.*?)```", page.read_text(), flags=re.S):
            for line in block.splitlines():
                if line.startswith("hydra-ppo ") and not line.split()[1].startswith("--"):
                    assert line.split()[1] in known, (page.name, line)


def test_pages_are_in_the_site_and_their_links_lead_somewhere():
    nav = (ROOT / "mkdocs.yml").read_text()
    for page in DOCS.glob("*.md"):
        assert page.name in nav, page.name
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
            if not target.startswith(("http://", "https://")):
                assert (page.parent / target).exists(), (page.name, target)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 150
