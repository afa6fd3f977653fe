"""The run folder: what is written, what is refused, what overwriting may remove."""

import importlib.util
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from hydra_ppo import __version__
from hydra_ppo.cli.flags import load_config
from hydra_ppo.config.rewards import RewardSettings, RewardSource
from hydra_ppo.config.settings import DataSettings, ModelSettings, PPOConfig, RunSettings, SFTConfig
from hydra_ppo.errors import ConfigError
from hydra_ppo.runs.contents import WRITTEN_FILES, WRITTEN_FOLDERS
from hydra_ppo.runs.folder import check_output
from hydra_ppo.runs.plots import LINE_PLOTS
from hydra_ppo.runs.run import Run
from hydra_ppo.runs.tracker_names import TRL
from hydra_ppo.training.ppo_metrics import POLICY, VALUE


def make_config(folder: Path, **settings) -> PPOConfig:
    run = RunSettings(output=str(folder), **{"progress": False, **settings})
    return PPOConfig(ModelSettings("m"), DataSettings("d.jsonl"), run)


def create(config: PPOConfig | SFTConfig) -> Run:
    return Run.create(config.run, config, "ppo")


def state_of(folder: Path) -> dict:
    return json.loads((folder / "state.json").read_text())


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_finished_run(tmp_path, capsys):
    folder = tmp_path / "runs/first"
    config = make_config(folder)
    with create(config) as run:
        assert run.folder == folder
        state = state_of(folder)
        assert (state["command"], state["state"], state["pid"], state["finished"]) == ("ppo", "running", os.getpid(), None)
        run.log(1, {"objective/kl": 0.1 + 0.2, "eval/scores": None, "count": 3, "numpy": np.float32(0.5)})
        run.log(2, {"objective/kl": 1e-300})
        run.samples(1, [{"prompt": "a [b]", "response": "é\n", "score": 0.5}, {"prompt": "c", "response": "d", "score": None}])
        run.note("two\nlines")
        with run.progress(3, "steps") as advance:
            advance(1, "kl 0.1")
        run.finish({"steps": 2, "score": math.nan, "array": np.arange(2)})
    assert load_config(PPOConfig, folder / "config.yaml") == config
    first, second = lines_of(folder / "metrics.jsonl")
    assert abs(first.pop("time") - (folder / "metrics.jsonl").stat().st_mtime) < 60
    assert first == {"step": 1, "objective/kl": 0.1 + 0.2, "eval/scores": None, "count": 3, "numpy": 0.5}
    assert second["objective/kl"] == 1e-300
    assert lines_of(folder / "samples.jsonl") == [
        {"step": 1, "prompt": "a [b]", "response": "é\n", "score": 0.5},
        {"step": 1, "prompt": "c", "response": "d", "score": None},
    ]
    assert json.loads((folder / "summary.json").read_text()) == {"steps": 2, "score": None, "array": [0, 1]}
    state = state_of(folder)
    assert (state["state"], state["error"], state["version"]) == ("finished", None, __version__)
    assert state["finished"] >= state["started"]
    assert state["packages"]["torch"]
    assert (folder / "log.txt").read_text().endswith(" two lines\n")
    assert "two lines\n" in capsys.readouterr().err
    assert tree(folder) == [".lock", "config.yaml", "log.txt", "metrics.jsonl", "samples.jsonl", "state.json", "summary.json"]


def test_settings_may_be_a_plain_dict(tmp_path):
    with Run.create(RunSettings(str(tmp_path / "q")), {"seed": 0, "stages": ["sft", "ppo"]}, "quickstart") as run:
        run.finish({})
    assert yaml.safe_load((run.folder / "config.yaml").read_text()) == {"seed": 0, "stages": ["sft", "ppo"]}


def test_metrics_are_on_disk_at_once(tmp_path):
    run = create(make_config(tmp_path / "run"))
    run.log(1, {"a": 1.0})
    assert len(lines_of(run.folder / "metrics.jsonl")) == 1


def test_what_json_lacks_becomes_null_and_is_noted_once(tmp_path):
    run = create(make_config(tmp_path / "run"))
    for step in (1, 2):
        run.log(step, {"objective/kl": math.nan, "policy/loss": math.inf, "fine": 1.0})
    assert [(line["objective/kl"], line["policy/loss"], line["fine"]) for line in lines_of(run.folder / "metrics.jsonl")] == [
        (None, None, 1.0)
    ] * 2
    log = (run.folder / "log.txt").read_text()
    assert log.count("step 1: objective/kl is nan; it is written as null.") == 1
    assert log.count("\n") == 2
    run.samples(1, [{"prompt": "p", "score": math.nan}])
    assert lines_of(run.folder / "samples.jsonl")[0]["score"] is None


@pytest.mark.parametrize(
    ("error", "state", "line"),
    [
        (ValueError("loss is nan\nat step 3"), "failed", "ValueError: loss is nan at step 3"),
        (KeyboardInterrupt(), "interrupted", "KeyboardInterrupt"),
        (None, "failed", "RuntimeError: the run ended without a summary"),
    ],
)
def test_how_a_run_ends(error, state, line, tmp_path):
    def use() -> None:
        with create(make_config(tmp_path / "run")):
            if error is not None:
                raise error

    if error is None:
        use()
    else:
        with pytest.raises(type(error)):
            use()
    ended = state_of(tmp_path / "run")
    assert (ended["state"], ended["error"]) == (state, line)
    assert ended["finished"] is not None
    assert not (tmp_path / "run/summary.json").exists()


def test_an_error_after_finish_still_counts(tmp_path):
    run = create(make_config(tmp_path / "run"))
    run.finish({})
    run.__exit__(ValueError, ValueError("late"), None)
    assert state_of(run.folder)["state"] == "failed"


def leave_run(folder: Path, ending: str) -> None:
    run = create(make_config(folder))
    if ending == "finished":
        run.finish({})
    elif ending == "failed":
        run.__exit__(ValueError, ValueError("x"), None)
    elif ending == "killed":
        (folder / "state.json").write_text(json.dumps(state_of(folder) | {"pid": 2**22 + 1}))
    elif ending == "broken":
        (folder / "state.json").write_text("{")


@pytest.mark.parametrize(
    ("ending", "message"),
    [
        ("finished", "holds a finished run"),
        ("failed", "holds an unfinished run (failed)"),
        ("killed", "holds an unfinished run (running)"),
        ("broken", "holds an unfinished run (unreadable state)"),
    ],
)
def test_an_earlier_run_is_kept_unless_overwrite(ending, message, tmp_path):
    folder = tmp_path / "run"
    leave_run(folder, ending)
    (folder / "actor").mkdir()
    (folder / "actor/adapter_model.safetensors").write_text("weights")
    before = tree(folder)
    with pytest.raises(ConfigError) as error:
        create(make_config(folder))
    remedy = "choose another folder, go on with --resume, or pass --run.overwrite true."
    assert str(error.value) == f"run.output={str(folder)!r} {message}; {remedy}"
    assert tree(folder) == before
    create(make_config(folder, overwrite=True)).finish({})
    assert tree(folder) == [".lock", "config.yaml", "state.json", "summary.json"]


def test_a_run_in_progress_is_never_overwritten(tmp_path):
    run = create(make_config(tmp_path / "run"))
    with pytest.raises(ConfigError, match=f"is being written by process {os.getpid()}; wait for it, stop it, or choose"):
        create(make_config(tmp_path / "run", overwrite=True))
    run.finish({})
    create(make_config(tmp_path / "run", overwrite=True)).finish({})


def test_overwrite_removes_only_what_this_program_writes(tmp_path):
    folder, outside = tmp_path / "run", tmp_path / "outside"
    leave_run(folder, "finished")
    outside.mkdir()
    (outside / "precious").write_text("kept")
    for name in WRITTEN_FILES:
        (folder / name).write_text((folder / name).read_text() if (folder / name).exists() else "old")
    inside = [
        *("actor/adapter_model.safetensors", "base/model-00001-of-00002.safetensors", "checkpoints/step-000002/hydra.json"),
        *("checkpoints/step-000002/actor/adapter_model.safetensors", "checkpoints/.dropping-step-000001/trainer.json"),
        *("tensorboard/p/events.out.tfevents.1", "wandb/run-1/files/config.yaml"),
    ]
    for name in inside:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("old")
    (folder / "plots").symlink_to(outside)  # the link goes, what it points at stays
    own = [
        "earlier-1/metrics.jsonl",
        "checkpoints/notes.md",
        "checkpoints/step-000002/why.txt",
        "sft/mine.safetensors",
        "tensorboard/p/seen.csv",
    ]
    for name in own:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")
    (folder / "notes.md").write_text("mine")
    (folder / "mine").mkdir()
    (folder / "mine/metrics.jsonl").write_text("mine")
    create(make_config(folder, overwrite=True)).finish({})
    left = {path for path in tree(folder) if (folder / path).is_file()}
    assert left == {".lock", "config.yaml", "mine/metrics.jsonl", "notes.md", "state.json", "summary.json", *own}
    assert not (folder / "plots").exists()
    assert (outside / "precious").read_text() == "kept"


def test_every_folder_that_is_cleared_is_one_that_is_written():
    others = {"memory.png", "monitor.png", "over_optimisation.png"}
    assert {plot.file for plot in LINE_PLOTS} | others == set(WRITTEN_FOLDERS["plots"])


@pytest.mark.parametrize("left", [[], [".lock"], [".lock", "state.json.partial"]])
@pytest.mark.parametrize("resume", [False, True])
def test_a_process_that_died_before_it_wrote_anything_blocks_nothing(left, resume, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in left:
        (folder / name).write_text("")
    config = make_config(folder)
    Run.create(config.run, config, "ppo", resume=resume).finish({})
    assert state_of(folder)["state"] == "finished"


def test_one_that_was_cut_off_while_it_cleared_begins_anew_without_being_asked_twice(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    leave_run(folder, "finished")
    (folder / "metrics.jsonl").write_text("{}\n")

    def cut_off(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("hydra_ppo.runs.run.clear", cut_off)
    with pytest.raises(KeyboardInterrupt):
        create(make_config(folder, overwrite=True))
    assert state_of(folder)["state"] == "starting"
    monkeypatch.undo()
    create(make_config(folder)).finish({})
    assert tree(folder) == [".lock", "config.yaml", "state.json", "summary.json"]


@pytest.mark.parametrize("ending", ["finished", "broken"])
def test_resume_never_clears_what_somebody_could_want(ending, tmp_path):
    folder = tmp_path / "run"
    leave_run(folder, ending)
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    before = {name: (folder / name).read_bytes() for name in tree(folder)}
    config = make_config(folder)
    with pytest.raises(ConfigError, match=r"without a checkpoint to go on from, and is left as it is; choose another folder\."):
        Run.create(config.run, config, "ppo", resume=True)
    assert {name: (folder / name).read_bytes() for name in tree(folder)} == before


def test_a_model_that_was_saved_without_coming_to_a_checkpoint_is_kept_aside(tmp_path):
    folder = tmp_path / "run"
    leave_run(folder, "failed")
    (folder / "sft").mkdir()
    (folder / "sft/adapter_model.safetensors").write_text("weights")
    (folder / "hydra.json").write_text(json.dumps({"base": {"name_or_path": "../base", "relative": True}}))
    config = make_config(folder)
    Run.create(config.run, config, "ppo", resume=True).finish({})
    assert (folder / "earlier-1/sft/adapter_model.safetensors").read_text() == "weights"
    assert json.loads((folder / "earlier-1/hydra.json").read_text())["base"]["name_or_path"] == "../../base"
    assert not (folder / "hydra.json").exists()
    assert not (folder / "sft").exists()


def test_what_was_logged_without_coming_to_a_checkpoint_is_kept_aside(tmp_path):
    folder = tmp_path / "run"
    for number in (1, 2):
        config = make_config(folder)
        run = Run.create(config.run, config, "ppo", resume=True)
        run.log(1, {"number": number})
        run.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    config = make_config(folder)
    run = Run.create(config.run, config, "ppo", resume=True)
    assert [lines_of(folder / f"earlier-{i}/metrics.jsonl")[0]["number"] for i in (1, 2)] == [1, 2]
    assert not (folder / "metrics.jsonl").exists()
    assert "is in earlier-2" in (folder / "log.txt").read_text()
    run.finish({})


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_is_no_run_is_refused(overwrite, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}")
    with pytest.raises(ConfigError, match="is not empty and holds no run; choose another folder"):
        create(make_config(tmp_path, overwrite=overwrite))
    assert tree(tmp_path) == ["metrics.jsonl"]


def test_an_empty_folder_is_used(tmp_path):
    create(make_config(tmp_path)).finish({})


def test_files_in_the_way(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="is a file; choose a folder"):
        create(make_config(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"cannot be made, .*file is a file; choose another folder"):
        create(make_config(tmp_path / "file/run"))


def test_overwrite_never_deletes_what_the_run_reads(tmp_path):
    leave_run(tmp_path / "sft", "finished")
    (tmp_path / "sft/base").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/hydra.json").write_text(json.dumps({"base": {"name_or_path": "../sft/base", "relative": True}}))
    config = make_config(tmp_path / "sft", overwrite=True)
    for model, named in (("sft", "model.name_or_path"), ("sft/base", "model.name_or_path"), ("other", "the base of")):
        with pytest.raises(ConfigError, match=f"would delete {named}"):
            create(replace(config, model=ModelSettings(str(tmp_path / model))))
    (tmp_path / "sft/samples.jsonl").write_text("{}")
    with pytest.raises(ConfigError, match=r"would delete data\.train"):
        create(replace(config, data=DataSettings(str(tmp_path / "sft/samples.jsonl"))))
    assert check_output(config.run, config) == tmp_path / "sft"


def judged(folder: Path, *targets: str, overwrite: bool = True) -> PPOConfig:
    config = make_config(folder, overwrite=overwrite)
    sources = [RewardSource("classifier", str(target)) for target in targets]
    return replace(config, reward=RewardSettings(sources))


def test_overwrite_spares_what_rewards_read(tmp_path, monkeypatch):
    leave_run(tmp_path / "run", "finished")
    for name in ("run/reward", "elsewhere", "run/plots"):
        (tmp_path / name).mkdir(exist_ok=True)
    (tmp_path / "run/critic").symlink_to(tmp_path / "elsewhere")  # the link would go, not what it leads to
    monkeypatch.chdir(tmp_path)
    for target in ("run/reward", tmp_path / "run/reward", "run/critic"):
        with pytest.raises(ConfigError, match=r"would delete reward\.sources\[1\]\.target="):
            create(judged(Path("run"), "elsewhere", target))
        assert Path(target).exists()
    create(judged(Path("run"), "elsewhere", "org/on-the-hub")).finish({})
    assert (tmp_path / "elsewhere").exists()


def test_a_resumed_run_that_starts_anew_spares_what_it_reads(tmp_path):
    leave_run(tmp_path / "run", "failed")
    (tmp_path / "run/reward").mkdir()
    config = judged(tmp_path / "run", str(tmp_path / "run/reward"), overwrite=False)
    with pytest.raises(ConfigError, match=r"--resume, without a checkpoint to go on from, would delete reward\.sources\[0\]"):
        Run.create(config.run, config, "ppo", resume=True)
    assert (tmp_path / "run/reward").is_dir()
    (tmp_path / "run/checkpoints/step-000001").mkdir(parents=True)  # nothing is cleared then
    Run.create(config.run, config, "ppo", resume=True, done=1).finish({})
    assert (tmp_path / "run/reward").is_dir()


def test_sample_table_and_progress(tmp_path, capsys):
    run = create(make_config(tmp_path / "run", progress=True))
    run.samples(3, [{"prompt": f"[bold]prompt {i}", "response": "r" * 1000, "score": -1.25 * i} for i in range(6)])
    with run.progress(2, "PPO") as advance:
        advance(1, "score 1.0")
        advance(1, "")
    shown = capsys.readouterr().err
    assert "[bold]prompt 3" in shown
    assert "[bold]prompt 4" not in shown  # the first four only
    assert "-1.250" in shown
    assert len(lines_of(run.folder / "samples.jsonl")) == 6
    run.samples(4, [])


def test_tensorboard(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with create(make_config(tmp_path / "run", trackers=["tensorboard"], project="proj")) as run:
        run.log(1, {"objective/kl": 0.5, "eval/scores": None})
        run.log(2, {"objective/kl": 0.25})
        run.finish({})
    events = accumulator.EventAccumulator(str(run.folder / "tensorboard/proj"))
    events.Reload()
    assert events.Tags()["scalars"] == ["objective/kl"]
    assert [(event.step, event.value) for event in events.Scalars("objective/kl")] == [(1, 0.5), (2, 0.25)]


@pytest.mark.parametrize(("settings", "name"), [({}, "policy/clipfrac_avg"), ({"tracker_names": "own"}, "policy/clip_frac")])
def test_trackers_show_the_names_of_trl_and_the_file_its_own(settings, name, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with create(make_config(tmp_path / "run", trackers=["tensorboard"], project="proj", **settings)) as run:
        run.log(1, {"policy/clip_frac": 0.5, "objective/kl": 2.0, "rollout/truncated": 0.25})
        run.finish({})
    events = accumulator.EventAccumulator(str(run.folder / "tensorboard/proj"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == sorted([name, "objective/kl", "rollout/truncated"])
    assert [(event.step, event.value) for event in events.Scalars(name)] == [(1, 0.5)]
    assert lines_of(run.folder / "metrics.jsonl")[0]["policy/clip_frac"] == 0.5


def test_renamed_numbers_are_logged_here_and_by_trl():
    """TRL's own source says what it calls them; no name is taken twice."""
    own = {*POLICY, *VALUE}
    assert set(TRL) <= own
    assert not set(TRL.values()) & own
    assert len(set(TRL.values())) == len(TRL)
    found = importlib.util.find_spec("trl")
    if found is None:
        pytest.skip("trl is not installed")
    places = [Path(found.origin).parent / place / "ppo_trainer.py" for place in ("experimental/ppo", "trainer")]
    text = next(place.read_text() for place in places if place.is_file())
    alike = ("objective/kl", "objective/entropy", "objective/scores", "objective/rlhf_reward", "lr")
    assert [name for name in (*TRL.values(), *alike) if f'metrics["{name}"]' not in text] == []


def test_a_run_that_goes_on_logs_no_step_twice(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = make_config(tmp_path / "run", trackers=["tensorboard"], project="proj")
    run = create(config)
    for step in (1, 2, 3):
        run.log(step, {"objective/kl": float(step)})
        run.samples(step, [{"prompt": "p"}])
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "objec')  # killed here
    first = state_of(run.folder)
    run.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    again = Run.create(config.run, config, "ppo", resume=True, done=2, sampled=3)
    again.log(3, {"objective/kl": 30.0})
    again.finish({})
    assert [(line["step"], line["objective/kl"]) for line in lines_of(run.folder / "metrics.jsonl")] == [
        (1, 1.0),
        (2, 2.0),
        (3, 30.0),
    ]
    assert [line["step"] for line in lines_of(run.folder / "samples.jsonl")] == [1, 2, 3]
    state = state_of(run.folder)
    assert (state["started"], state["tracking_id"]) == (first["started"], first["tracking_id"])
    assert [entry["step"] for entry in state["resumed"]] == [2]
    events = accumulator.EventAccumulator(str(run.folder / "tensorboard/proj"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("objective/kl")] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_missing_tracker_package_leaves_nothing(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "wandb" else find(name, *rest))
    with pytest.raises(ConfigError) as error:
        create(make_config(tmp_path / "run", trackers=["wandb"]))
    assert str(error.value) == (
        "run.trackers=[wandb] needs the package wandb, which is not installed; run pip install 'hydra-ppo[track]'."
    )
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_does_not_start_marks_the_run_failed(tmp_path, monkeypatch):
    def fail(self, values, done):
        raise OSError("no connection")

    monkeypatch.setattr(Run, "_start_trackers", fail)
    with pytest.raises(OSError):
        create(make_config(tmp_path / "run"))
    assert state_of(tmp_path / "run")["error"] == "OSError: no connection"
