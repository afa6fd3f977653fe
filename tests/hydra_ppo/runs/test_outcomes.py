"""First and last evaluation of a run."""

from hydra_ppo.runs.outcomes import outcomes


def test_first_last_gain_and_error_by_hand():
    records = [
        {"step": 0, "eval/scores": 0.25, "eval/kl": 0.0},
        {"step": 5, "eval/scores": 0.5, "eval/kl": float("nan")},
        {"step": 9, "objective/scores": 3.0},
        {"step": 10, "eval/scores": 1.0, "eval/perplexity": 7.0},
    ]
    score, kl, perplexity = outcomes(records, {"eval_scores_gain_se": 0.125, "eval_independent_gain_se": 9.0})
    assert (score.steps, score.values, score.gain, score.error) == ((0, 10), (0.25, 1.0), 0.75, 0.125)
    assert (kl.steps, kl.values, kl.gain) == ((0, 0), (0.0, 0.0), None)
    assert (perplexity.label, perplexity.gain, perplexity.error) == ("perplexity", None, None)


def test_one_evaluation_has_no_error():
    assert outcomes([{"step": 3, "eval/scores": 1.0}], {"eval_scores_gain_se": 0.1})[0].error is None
    assert outcomes([], {}) == []
