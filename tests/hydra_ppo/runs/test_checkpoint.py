"""Checkpoints: whole or not there, checked before use, pruned by age and score."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch

from hydra_ppo.errors import CheckpointError
from hydra_ppo.runs.checkpoint import (
    FOLDER,
    TrainerState,
    checkpoint_name,
    newest_checkpoint,
    save_checkpoint,
    why_unusable,
)

STATE = TrainerState({"optimizer.a.exp_avg": torch.tensor([0.1, 0.2]), "random.torch": torch.get_rng_state()}, {"x": 0.1 + 0.2})


RUN = {"config": {"a": 1}, "digests": {}, "optimizer_steps": 4, "begun": "2026-01-02T03:04:05"}


def write_model(folder: Path) -> None:
    (folder / "actor").mkdir(parents=True)
    (folder / "actor" / "adapter_config.json").write_text("{}")
    (folder / "hydra.json").write_text('{"roles": {}}')


def save(run: Path, *position: int, **options) -> Path:
    step, part = (*position, 0)[:2]
    return save_checkpoint(run, (step, part), options.pop("write", write_model), STATE, RUN, **options)


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / FOLDER).iterdir())


def newest(run: Path) -> tuple[str | None, list[str]]:
    notes: list[str] = []
    found = newest_checkpoint(run, notes.append)
    return found and found.folder.name, notes


def test_what_was_saved_comes_back(tmp_path):
    folder = save(tmp_path, 3, 2)
    found = newest_checkpoint(tmp_path, print)
    assert (found.folder, found.position, found.run) == (folder, (3, 2), RUN)
    state = found.state()
    assert state.values == STATE.values
    assert state.tensors.keys() == STATE.tensors.keys()
    assert all(torch.equal(state.tensors[name], tensor) for name, tensor in STATE.tensors.items())
    assert state.groups()["optimizer"]["a.exp_avg"].tolist() == STATE.tensors["optimizer.a.exp_avg"].tolist()


def test_only_safetensors_and_json_are_written(tmp_path):
    folder = save(tmp_path, 1)
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} == {".safetensors", ".json"}


def test_the_last_are_kept_and_the_best(tmp_path):
    for step, score in enumerate([0.1, 0.9, None, 0.5, 0.2], 1):
        save(tmp_path, step, score=score, keep_last=2, keep_best=1)
    assert names(tmp_path) == ["step-000002", "step-000004", "step-000005"]


def test_parts_of_a_step_come_after_it(tmp_path):
    for position in ((1, 0), (1, 3), (2, 0)):
        save(tmp_path, *position, keep_last=3)
    assert names(tmp_path) == ["step-000001", "step-000001.003", "step-000002"]
    assert newest(tmp_path)[0] == "step-000002"
    assert checkpoint_name((1_000_000, 0)) == "step-1000000"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


class Bomb:
    """Unpickling it would write a file."""

    def __reduce__(self):
        return Path.write_text, (Path("exploded"), "boom")


DAMAGE = {
    "a flipped bit": (lambda f: flip(f / "trainer.safetensors"), "trainer.safetensors was altered"),
    "a flipped bit in the manifest": (lambda f: flip(f / "checkpoint.json"), "checkpoint.json"),
    "a torn file": (lambda f: (f / "trainer.json").write_text(""), "trainer.json has 0 bytes"),
    "a missing file": (lambda f: (f / "hydra.json").unlink(), "hydra.json is missing"),
    "no manifest": (lambda f: (f / "checkpoint.json").unlink(), "checkpoint.json is missing"),
    "an empty manifest": (lambda f: (f / "checkpoint.json").write_text(""), "checkpoint.json cannot be read"),
    "a manifest of another kind": (lambda f: (f / "checkpoint.json").write_text("[1]"), "checkpoint.json cannot be read"),
    "a planted pickle": (
        lambda f: (f / "optimizer.pt").write_bytes(pickle.dumps(Bomb())),
        "optimizer.pt does not belong to it",
    ),
    "a planted adapter": (lambda f: (f / "actor" / "adapter_model.bin").write_bytes(b"x"), "actor/adapter_model.bin does not"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found_named_and_the_one_before_used(damage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(tmp_path, 1)
    do, named = DAMAGE[damage]
    do(save(tmp_path, 2))
    found, notes = newest(tmp_path)
    assert found == "step-000001"
    assert len(notes) == 1
    assert notes[0].startswith(f"checkpoints/step-000002 is damaged: {named}")
    assert not (tmp_path / "exploded").exists()
    # Coming to that step again replaces it.
    save(tmp_path, 2)
    assert newest(tmp_path) == ("step-000002", [])


def test_a_sealed_manifest_cannot_name_a_pickle(tmp_path):
    """Even who writes a manifest of his own, seal and all, gets nothing but safetensors and JSON read."""

    def with_pickle(folder):
        write_model(folder)
        (folder / "optimizer.pt").write_bytes(pickle.dumps(Bomb()))

    folder = save(tmp_path, 1, write=with_pickle)
    assert why_unusable(folder) == "optimizer.pt is neither safetensors nor JSON"


def test_a_later_version_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("hydra_ppo.runs.checkpoint.FORMAT", 2)
    folder = save(tmp_path, 1)
    monkeypatch.undo()
    assert why_unusable(folder) == "format=2 is not the 1 that this version reads"


def test_a_whole_checkpoint_of_the_same_position_is_left_alone(tmp_path):
    folder = save(tmp_path, 1)
    before = (folder / "checkpoint.json").stat().st_mtime_ns
    save(tmp_path, 1, write=lambda folder: pytest.fail("written again"))
    assert (folder / "checkpoint.json").stat().st_mtime_ns == before


def test_a_failed_write_leaves_what_was_there_and_says_so(tmp_path):
    save(tmp_path, 1)

    def full(folder):
        (folder / "hydra.json").write_text("{")
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError) as error:
        save(tmp_path, 2, write=full)
    assert str(error.value) == (
        "checkpoints/step-000002 could not be written (No space left on device); checkpoints/step-000001 is intact. "
        "Make room on the disk, then go on with --resume."
    )
    assert names(tmp_path) == ["step-000001"]


def test_what_was_half_written_or_half_removed_is_no_checkpoint_and_goes(tmp_path):
    save(tmp_path, 1)
    for name in (".writing-step-000002", ".dropping-step-000000", "step-12", "step-000003.tmp"):
        (tmp_path / FOLDER / name).mkdir()
    assert newest(tmp_path) == ("step-000001", [])
    save(tmp_path, 2)
    assert names(tmp_path) == ["step-000001", "step-000002", "step-000003.tmp", "step-12"]


def test_numbers_survive_to_the_last_bit(tmp_path):
    values = {"a": 0.1 + 0.2, "b": 1e-300, "c": 2**53 + 1, "d": [3.0000000000000004, None, True]}
    save_checkpoint(tmp_path, (1, 0), write_model, TrainerState({}, values), {})
    assert json.loads((tmp_path / FOLDER / "step-000001" / "trainer.json").read_text()) == values
