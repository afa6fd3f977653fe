"""`run.max_time`: a run that stops by the clock stops as on SIGTERM, and goes on with the same bits."""

from __future__ import annotations

import signal
import threading
import time

import pytest

from hydra_ppo.cli import commands
from hydra_ppo.cli.flags import load_config
from hydra_ppo.cli.main import main
from hydra_ppo.config.running import RunSettings
from hydra_ppo.config.settings import PPOConfig
from hydra_ppo.errors import ConfigError
from hydra_ppo.runs.inspect import inspect_run
from hydra_ppo.runtime.interruption import StopRequested, check_stop, stopping_after, stopping_on_signals
from tests.faults.project import assert_same, make_project, ppo_settings, write


def test_lengths_of_time_by_hand():
    texts = {"90s": 90, "30m": 1800, "4h": 14400, "1d": 86400, "1h30m": 5400, "1d2h3m4s": 93784}
    assert {text: RunSettings("run", max_time=text).most_seconds for text in texts} == texts
    assert RunSettings("run").most_seconds is None


@pytest.mark.parametrize("text", ["", "4", "h", "4 hours", "-1h", "0s", "1m1h", "1.5h", "4H", "infs"])
def test_what_is_no_length_of_time_is_refused(text):
    with pytest.raises(ConfigError, match=r"^max_time='.*' is no length of time; write for example 30m, 4h or 1h30m\.$"):
        RunSettings("run", max_time=text)


def test_a_stop_comes_once_the_time_is_over_and_not_after_the_block():
    with stopping_on_signals(), stopping_after(0.05):
        check_stop()
        time.sleep(0.3)
        with pytest.raises(StopRequested):
            check_stop()
    before = signal.getsignal(signal.SIGTERM)
    with stopping_on_signals(), stopping_after(0.2):
        pass
    time.sleep(0.4)  # a signal now would end this process
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_run_stops_saves_and_goes_on_with_the_same_bits(tmp_path, capsys):
    """Stopped by the clock somewhere, then run to two steps more, as one that was left alone."""
    project = make_project(tmp_path)
    settings = ppo_settings(project, "stopped", steps=5000, run={"max_time": "4s"})
    assert main(["ppo", write(tmp_path / "stopped.yaml", settings)]) == 0
    assert f"Stopped. Go on with: hydra-ppo ppo {tmp_path / 'stopped' / 'config.yaml'} --resume" in capsys.readouterr().out
    found = inspect_run(tmp_path / "stopped")
    assert found["state"] == "interrupted"
    done = found["last_step"]
    assert 0 < done < 5000
    more = ["--resume", "--steps", str(done + 2), "--run.max_time", "null"]
    assert main(["ppo", str(tmp_path / "stopped" / "config.yaml"), *more]) == 0
    assert main(["ppo", write(tmp_path / "whole.yaml", ppo_settings(project, "whole", steps=done + 2))]) == 0
    assert_same(tmp_path / "stopped", tmp_path / "whole")


def test_outside_the_main_thread_it_is_refused(tmp_path):
    project = make_project(tmp_path)
    config = load_config(PPOConfig, write(tmp_path / "p.yaml", ppo_settings(project, run={"max_time": "1h"})))
    errors = []

    def train():
        try:
            commands.ppo(config)
        except ConfigError as error:
            errors.append(str(error))

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert errors == ["run.max_time='1h' needs the main thread of the process; train there, or set it to null."]
