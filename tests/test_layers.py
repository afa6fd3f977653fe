"""Imports point one way, and `hydra_ppo` never imports what is installed beside it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LAYERS = [
    {"errors", "recorder", "products", "files", "interruption", "host_memory"},
    {"bases"},
    {"config", "functional", "experience", "logprobs", "memory", "sources", "row_formats", "announce", "stages", "lora"}
    | {"gated_mlp"}
    | {"compat", "recompute", "packing", "trunk", "exhaustion", "random_sources", "fingerprint", "time_limit"},
    {"architecture", "config_io", "data", "lazy", "padding", "drawing", "kv_cache"},
    {"loading", "optim", "rewards", "adapters", "manifest", "lazy_logits", "sampled_logits"},
    {"model", "passes", "saving", "views"},
    {"lean_decoding"},
    {"sampling", "checkpoint"},
    {"rollout"},
    {"joint_sft", "ppo", "ppo_metrics", "ppo_state"},
    {"run_folder", "run", "plots", "inspect_run", "resume"},
    {"dry_run", "export", "doctor"},
    {"cli_config", "commands"},
    {"quickstart.corpus", "quickstart.run", "quickstart"},
    {"cli"},
]
"""From the bottom up; a module may import from its own layer and from those before."""

LEVEL = {module: level for level, modules in enumerate(LAYERS) for module in modules}


def modules() -> dict[str, Path]:
    folder = ROOT / "hydra_ppo"
    found = {}
    for path in folder.rglob("*.py"):
        name = ".".join(path.relative_to(folder).with_suffix("").parts).removesuffix(".__init__")
        if name != "__init__":
            found[name] = path
    return found


def imports(path: Path) -> set[str]:
    """Modules that a file imports from this project, imports inside functions included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "hydra_ppo":
            module = (node.module or "").removeprefix("hydra_ppo").removeprefix(".")
            found |= {module} if module else {alias.name for alias in node.names}
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
    for name in ("errors", "config", "config_io", "cli_config", "dry_run", "run", "cli", "commands", "data"):
        tree = ast.parse(modules()[name].read_text())
        for node in tree.body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None) or ""]
            assert not {n.split(".")[0] for n in names} & {"torch", "transformers", "peft"}, name
