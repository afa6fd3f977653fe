"""What the doctor says of a model that somebody brings."""

from __future__ import annotations

import json

from hydra_ppo.cli.doctor import doctor
from hydra_ppo.cli.doctor_model import examine_model
from tests.training import tokenizer, write_model


def test_a_model_is_described_and_where_its_answers_end(tmp_path, capsys):
    write_model(tmp_path / "base")
    model, ends = examine_model(str(tmp_path / "base"))
    assert (model.state, ends.name) == ("ok", "answers end")
    assert model.value.startswith("LlamaForCausalLM, ")
    assert "adapters can sit on down_proj, gate_proj" in model.value
    assert tokenizer().eos_token in ends.value
    doctor(as_json=True, model=str(tmp_path / "base"))
    assert [f["name"] for f in json.loads(capsys.readouterr().out)["findings"]][-2:] == ["model", "answers end"]


def test_what_is_no_model_is_a_problem(tmp_path):
    assert [finding.state for finding in examine_model(str(tmp_path))] == ["problem", "problem"]
