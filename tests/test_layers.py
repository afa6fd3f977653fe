"""Imports point one way, and `hydra_ppo` never imports what is installed beside it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LAYERS = [
    {"errors", "runtime.recorder", "compute.products", "runtime.files", "runtime.interruption", "runtime.host_memory"},
    {"compute.bases"},
    {
        "config.settings",
        "functional",
        "experience",
        "compute.logprobs",
        "runtime.memory",
        "data.sources",
        "data.formats",
        "runtime.announce",
        "model.roles",
        "compute.lora",
    }
    | {"compute.gated_mlp"}
    | {
        "compat",
        "compute.recompute",
        "compute.packing",
        "compute.trunk",
        "runtime.exhaustion",
        "runtime.random_sources",
        "model.fingerprint",
        "runtime.time_limit",
    },
    {
        "model.architecture",
        "config.reading",
        "data.rows",
        "views.lazy",
        "compute.padding",
        "compute.drawing",
        "compute.kv_cache",
    },
    {
        "model.loading",
        "training.optim",
        "rewards.scorer",
        "model.adapters",
        "model.manifest",
        "views.lazy_logits",
        "views.sampled_logits",
    },
    {"model.hydra", "views.passes", "model.saving", "views.views"},
    {"rollout.lean_decoding"},
    {"rollout.sampling", "runs.checkpoint"},
    {"rollout.collect"},
    {"training.joint_sft", "training.ppo", "training.ppo_metrics", "training.ppo_state"},
    {"runs.folder", "runs.run", "runs.plots", "runs.inspect", "cli.resume"},
    {"cli.dry_run", "cli.export", "cli.doctor"},
    {"cli.flags", "cli.commands"},
    {"quickstart.corpus", "quickstart.run"},
    {"cli.main"},
]
"""From the bottom up; a module may import from its own layer and from those before."""

LEVEL = {module: level for level, modules in enumerate(LAYERS) for module in modules}


def modules() -> dict[str, Path]:
    folder = ROOT / "hydra_ppo"
    found = {}
    for path in folder.rglob("*.py"):
        if path.name != "__init__.py":
            found[".".join(path.relative_to(folder).with_suffix("").parts)] = path
    return found


def imports(path: Path) -> set[str]:
    """Modules that a file imports from this project, imports inside functions included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "hydra_ppo":
            module = (node.module or "").removeprefix("hydra_ppo").removeprefix(".")
            for alias in node.names:
                name = f"{module}.{alias.name}".removeprefix(".")
                found.add(name if name in LEVEL or not module else module)
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("hydra_ppo.") for a in node.names if a.name.startswith("hydra_ppo.")}
    return found - {"__version__"}


def test_every_module_has_a_layer():
    assert set(modules()) == set(LEVEL)


@pytest.mark.parametrize("name", sorted(LEVEL))
def test_imports_point_down(name):
    for other in imports(modules()[name]):
        assert other in LEVEL, f"{name} imports {other}, which is not a module of the library"
        assert LEVEL[other] <= LEVEL[name], f"{name} imports {other} from a layer above"


def test_settings_and_help_need_no_torch():
    for name in (
        "errors",
        "config.settings",
        "config.reading",
        "cli.flags",
        "cli.dry_run",
        "runs.run",
        "cli.main",
        "cli.commands",
        "data.rows",
    ):
        tree = ast.parse(modules()[name].read_text())
        for node in tree.body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None) or ""]
            assert not {n.split(".")[0] for n in names} & {"torch", "transformers", "peft"}, name
