"""What `make test` leaves to `make test-long`, because one case of its kind is enough for every change: by module and test.

A test alone is all of its cases; a case is what stands between the brackets of its name, or a beginning of it.
"""

AGREE = "test_simulated_and_measured_peaks_agree"

LONG = {
    "profiling/benchmarks/test_ranks.py": ["test_teams_take_turns"],
    "profiling/cli/test_init.py": ["test_what_is_written_fits_the_card", "test_recipes_are_what_a_new_plan_gives"],
    "profiling/cli/test_plan.py": [
        "test_the_yaml_is_what_hydra_ppo_ppo_takes[1024-group",
        "test_plans_fit_and_what_would_be_better_does_not",
        "test_a_larger_gpu_costs_no_more_and_does_no_less",
        "test_where_nothing_fits_it_says_by_how_much",
        "test_the_critic_is_as_large_as_the_base",
        "test_a_plan_uses_nothing_that_it_does_not_need",
        "test_the_yaml_is_what_hydra_ppo_ppo_takes[5",
    ],
    "profiling/cli/test_savings.py": ["test_what_rungs_take_off_is_what_shapes_say"],
    "profiling/validate/test_validate.py": [
        "test_without_bitsandbytes_nf4_is_skipped_and_bf16_still_simulated",
    ],
    "profiling/learning/test_learning.py": [
        "test_every_method_is_trained_once_and_judged_against_one_opponent",
        "test_a_trunk_is_there_and_spared_by_the_update",
    ],
    "profiling/measuring/test_capture.py": [
        f"{AGREE}_where_answers_are_practised[2",
        "test_a_leaked_logits_tensor_is_named_with_its_phase_and_kind[True",
        *(f"{AGREE}_in_each_phase[{family}" for family in ("qwen3-tied", "gpt2", "opt", "gemma3")),
        *(f"{AGREE}_for_each_method[{name}" for name in ("lora", "dlora", "j-hydra")),
        *(f"{AGREE}_with_quantised_embeddings[{name}" for name in ("llama", "qwen3", "gemma3-nf4")),
        f"{AGREE}_in_fp16",
        f"{AGREE}_where_answers_are_practised[1",
        f"{AGREE}_without_a_critic_and_with_a_running_mean[{{'ema",
        "test_a_leaked_logits_tensor_is_named_with_its_phase_and_kind[False",
        "test_methods_hold_as_many_bases_as_their_table_says",
    ],
    "profiling/measuring/test_capture_optimizers.py": [
        f"{AGREE}_for_each_way_to_keep_moments[offloaded,",
        *(f"{AGREE}_for_each_way_to_keep_moments[{name}]" for name in ("8 bit", "offloaded", "in turn", "away")),
        "test_a_reward_model_with_8_bit_moments",
        "test_what_each_way_to_keep_moments_holds_by_hand",
    ],
    "profiling/measuring/test_int8_cache.py": [
        *(f"{AGREE}[{name}" for name in ("llama-60", "llama-100", "gpt2", "gemma3")),
        "test_bytes_of_the_cache_by_hand",
        f"{AGREE}[llama-24",
    ],
    "profiling/measuring/test_ranks.py": ["test_two_shallow_models_predict_a_deep_one_that_is_shared_out"],
    "profiling/subjects/test_fake.py": [
        *(f"test_simulated_sampling_peaks_where_the_cache_grows[{name}" for name in ("20-auto", "8-int8", "20-int8"))
    ],
    "profiling/measuring/test_long_rows.py": [
        f"{AGREE}[llama-nf4-{{'checkpoint_offload",
        *(f"test_two_shallow_models_predict_a_deep_one[{name}" for name in ("llama", "gpt2")),
        f"{AGREE}[llama-None",
        f"{AGREE}[gemma3",
        "test_less_is_held_with_each_and_least_with_both",
    ],
    "profiling/measuring/test_shallow.py": [
        "test_log_probs_in_many_blocks_and_groups_of_rows",
        *(
            f"test_shallow_models_predict_a_deep_one[{name}"
            for name in ("gpt2", "qwen3-tied", "opt", "gemma3", "llama-changes1")
        ),
        "test_what_is_not_in_proportion_is_simulated_for_itself",
    ],
    "real/test_quantized_embeddings.py": ["test_logprobs_of_real_text[nf4"],
    "profiling/subjects/test_load_peak.py": [
        *(
            f"test_loading_holds_what_it_ends_in_and_is_simulated_so[{name}"
            for name in ("tied-int8", "tied-None", "tied-nf4", "untied-int8", "untied-None")
        )
    ],
    "hydra_ppo/training/test_ppo.py": [
        "test_the_kl_penalty_holds_the_actor_back",
        *(f"test_ppo_raises_the_reward_and_leaves_the_base_alone[{{'{name}" for name in ("dtype", "trunk", "quantization")),
    ],
    "hydra_ppo/training/test_practice.py": ["test_what_is_practised_is_not_forgotten"],
    "hydra_ppo/training/test_update_order.py": ["test_a_run_that_is_cut_at_any_micro_batch_goes_on_with_the_same_bits[adamw-"],
    "hydra_ppo/test_end_to_end.py": [f"test_sft_then_ppo_then_inspect_then_export[{name}" for name in ("full", "nf4")],
    "hydra_ppo/parallel/test_runs.py": [
        "test_a_run_goes_on_with_another_number_of_processes",
        "test_a_base_that_is_shared_out[nf4",
        "test_heads_on_states_in_two_processes",
        "test_joint_sft_on_a_base_that_is_shared_out",
        "test_killed_ranks[3",
        "test_memory_runs_out_in_one_process[0",
        "test_a_stop_and_a_lack_of_memory_where_others_wait_in_a_pass",
        "test_memory_runs_out_in_one_process[1",
        "test_a_signal_to_any_stops_all_and_the_run_goes_on[1",
        "test_three_processes_and_pieces_of_all_kinds",
    ],
    "faults/test_over_optimisation.py": [
        "test_evaluators_never_enter_training",
        "test_thresholds_may_change_on_resume_and_evaluators_may_not",
        "test_an_alarm_between_evaluations_is_evaluated_and_the_rest_is_the_same",
        "test_a_signal_in_the_middle_of_an_evaluation",
    ],
    "profiling/benchmarks/peers/test_workers.py": ["test_our_workers_do_the_tiny_update"],
    "profiling/cli/test_profile_command.py": [
        "test_how_moments_are_kept_reaches_the_trainer",
        "test_methods_are_compared_and_the_report_can_be_redrawn",
    ],
    "hydra_ppo/rollout/test_vllm_run.py": ["test_two_processes_on_a_server"],
    "hydra_ppo/cli/test_quantize.py": ["test_a_run_on_it_is_the_run_on_the_base_and_can_be_resumed_and_exported"],
    "faults/test_savings.py": [
        "test_where_exact_moments_are_kept_may_change",
        "test_a_run_with_all_of_it_is_read_by_the_other_commands",
        "test_stopped_again_and_again[all of it",
        "test_stopped_again_and_again[8",
        "test_killed",
    ],
    "faults/test_methods.py": ["test_stopped_again_and_again[a bounded critic of its own pace"],
    "faults/test_reward_training.py": ["test_stopped_again_and_again[advantage", "test_killed"],
}


def is_long(nodeid: str) -> bool:
    """Say whether a test is left to `make test-long`."""
    module, _, test = nodeid.partition("::")
    names = LONG.get(module.removeprefix("tests/"), ())
    return any(test == name or test.startswith(name if "[" in name else f"{name}[") for name in names)
