"""A sampler that has vLLM servers draw the tokens; called as `sampling.sample` is."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from hydra_ppo.algorithms.losses import logprob_drift
from hydra_ppo.config.settings import RolloutSettings
from hydra_ppo.errors import ConfigError, ServerError
from hydra_ppo.experience import Experience, ScoredExperience
from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.model.loading import quantization_of
from hydra_ppo.model.quantized_embeddings import embeddings_kind
from hydra_ppo.parallel.world import ALONE, World
from hydra_ppo.rollout.sampling import Samples
from hydra_ppo.rollout.vllm.adapters import Adapters
from hydra_ppo.rollout.vllm.answers import Reader, Row, request
from hydra_ppo.rollout.vllm.asking import Refused, Server, Waiting, together
from hydra_ppo.rollout.vllm.launch import adapter_rank
from hydra_ppo.rollout.vllm.look import Needs, Seen, look

SEEDS = 2**48
IN_FLIGHT = 256
"""Most requests at one server at once; what it has no room for waits in its queue."""

PROBE_PROMPTS, PROBE_TOKENS, PROBE_RESPONSE = 2, 64, 16
"""Prompts, most tokens of each, and tokens of the response by which a base is told from another."""
PROBE_TEMPERATURE = 0.7
"""Another than 1, so that log-probs with and without it differ; below it, where bases differ more and rounding hardly does."""

EXACT, ROUNDED, QUANTISED = 0.02, 0.15, 1.5
"""Mean |difference| of log-probs of a first prompt, nats per token, up to which a base is taken for ours: both computed in
fp32, one of them in 16 bits, one of them quantised. Measured on a small model, which quantising hurts most: docs/vllm.md."""

DRIFT = 0.05
"""The same for a rollout, both computed in fp32; otherwise ROUNDED, or twice what the first prompt showed, if that is more."""


class VLLMSampler:
    """Samples from a role of a model on servers that hold the same base, to which it brings the role's adapter.

    Use as a context manager: at the end the adapters are unloaded and their folders removed.

    Args:
        rollout: settings; those of `rollout.vllm`, temperature and lengths are read.
        folder: where adapters are written, if the settings name no other.
        run: path of the run, which tells it apart from others on the same servers.
        note: takes a line for the user.
        world: the processes of the run. Rank 0 alone asks servers; all call `begin`, since a pass may need all of them.

    Memory: a copy of the adapter on the host; a thread and a connection for each response under way.
    """

    def __init__(
        self,
        rollout: RolloutSettings,
        folder: Path,
        *,
        run: Path | None = None,
        note: Callable[[str], None] = lambda text: None,
        world: World = ALONE,
    ) -> None:
        settings = rollout.vllm
        self.rollout, self.world = rollout, world
        self.note = note if world.is_main else lambda text: None
        self.servers = [Server(url, settings.timeout, settings.retries) for url in settings.urls]
        self.folder = Path(settings.adapter_folder) if settings.adapter_folder is not None else folder
        place = f"{socket.gethostname()}:{(run or folder).resolve()}"
        self.run = hashlib.sha256(place.encode()).hexdigest()[:8]
        self.seen: list[Seen] = []
        self.adapters: Adapters | None = None
        self.apart = 0.0
        self._told_of_drift = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Take leave of the servers; says nothing of what fails."""
        if self.adapters is not None:
            self.adapters.close()

    # -- before anything is sampled ----------------------------------------------------------------------------------

    def begin(self, model: HydraModel, prompts: Sequence[Sequence[int]], needs: Needs) -> None:
        """Look at the servers, and have each say a few tokens, by which it is known whether it serves our base.

        Args:
            prompts: some of the run's, token ids.
            needs: what the run asks of a server; its rank is the actor's.

        Raises:
            ConfigError: naming what is wrong, and the command that starts a server right.
        """
        for role in model.trainable_roles:
            if model.roles[role].head == "lm" and (name := model.roles[role].adapter) is not None:
                needs = replace(needs, rank=adapter_rank(vars(model.base.peft_config[name])))
        self.seen = self.world.from_main(lambda: [look(server, needs) for server in self.servers], "looking at vLLM servers")
        for seen in self.seen:
            self.note(f"rollout.engine=vllm: {seen}")
            if not seen.told:
                self.note(
                    f"{seen.url} does not say how it was started (VLLM_SERVER_DEV_MODE=1 makes it); rank, replicas and "
                    "--max-loras are not checked, --logprobs-mode by its numbers alone"
                )
        alone = self.rollout.vllm.adapter_folder is None
        if self.world.is_main:
            self.adapters = Adapters(self.servers, self.seen, self.folder, self.run, alone=alone)
        probes = [list(prompt[:PROBE_TOKENS]) for prompt in prompts[:PROBE_PROMPTS]]
        for server, seen in zip(self.servers, self.seen, strict=True):
            self._probe(model, server, seen, probes, needs)

    @torch.no_grad()
    def _probe(self, model: HydraModel, server: Server, seen: Seen, prompts: Sequence[Sequence[int]], needs: Needs) -> None:
        """Compare log-probs of a few tokens under the server's base with those under ours.

        Raises:
            ConfigError: where they are those of another base, or of another temperature.
        """
        settings = RolloutSettings(temperature=PROBE_TEMPERATURE, max_new_tokens=PROBE_RESPONSE)
        most = max(1, min(PROBE_RESPONSE, needs.tokens - max(len(prompt) for prompt in prompts)))
        rows = [Row(prompt, seed, most, given=True) for seed, prompt in enumerate(prompts)]
        reader = Reader(settings, (), _vocabulary(model))
        where = f"vLLM server {server.url}"
        bodies = [request(row, seen.base, settings, (), ()) for row in rows]

        def first_words() -> list[tuple[list[int], list[float]]]:
            try:
                answers = together([partial(_ask, server, body) for body in bodies], len(bodies))
                return [reader.read(answer, row, where) for answer, row in zip(answers, rows, strict=True)]
            except (Refused, ServerError) as error:
                raise ConfigError(
                    f"rollout.vllm.urls: {server.url} does not answer a first prompt: {str(error).rstrip('.')}."
                ) from None

        found = self.world.from_main(first_words, f"a first prompt to {server.url}")
        experience = Experience.from_lists(prompts, [ids for ids, _ in found], 0, model.device)
        theirs = torch.tensor([logprobs for _, logprobs in found], device=model.device)
        away = {}
        for temperature in (PROBE_TEMPERATURE, 1.0):
            with model.role("reference"), model.adapters.using(None):
                ours = model.logprobs(experience.sequences(), temperature).logprobs
            away[temperature] = logprob_drift(theirs, ours, experience.response_mask)[0].item()
        limit = self.tolerance(model)
        if away[PROBE_TEMPERATURE] <= limit:
            self.apart = max(self.apart, away[PROBE_TEMPERATURE])
            if limit > EXACT:
                self.note(
                    f"log-probs of {theirs.numel()} tokens of {server.url} are {away[PROBE_TEMPERATURE]:.2g} nats from ours: "
                    "the rounding of the base"
                )
            return
        if away[1.0] <= min(limit, away[PROBE_TEMPERATURE] / 2):
            raise ConfigError(
                f"rollout.vllm.urls: {server.url} gives log-probs without the temperature, not those of what it draws from "
                f"(--logprobs-mode); {needs.start(server.url)}"
            )
        raise ConfigError(
            f"rollout.vllm.urls: {server.url} serves another base than ours ({seen.root!r}): log-probs of {theirs.numel()} "
            f"tokens are {away[PROBE_TEMPERATURE]:.2g} nats away on average, up to {limit:g} would be rounding; "
            f"{needs.start(server.url)}"
        )

    def tolerance(self, model: HydraModel) -> float:
        """Return the mean |difference| of log-probs, nats per token, up to which the bases of servers and model may be one."""
        if quantization_of(model.causal_lm) or embeddings_kind(model.causal_lm) or any(seen.quantization for seen in self.seen):
            return QUANTISED
        exact = model.causal_lm.dtype is torch.float32 and all(seen.dtype == "float32" for seen in self.seen)
        return EXACT if exact else ROUNDED

    def expected_drift(self, model: HydraModel) -> float:
        """Return the mean |difference| of log-probs of a rollout, nats per token, that the rounding of the base explains."""
        return max(DRIFT if self.tolerance(model) == EXACT else ROUNDED, 2 * self.apart)

    # -- sampling ----------------------------------------------------------------------------------------------------

    def __call__(
        self,
        model: HydraModel,
        prompts: Sequence[Sequence[int]],
        settings: RolloutSettings,
        eos_ids: Sequence[int],
        generator: torch.Generator,
        role: str = "actor",
        lengths: Sequence[int] | None = None,
        never: Sequence[int] = (),
        stopped: Callable[[Sequence[Sequence[int]]], list[bool]] | None = None,
    ) -> Samples:
        """Sample one response per prompt; arguments, result and errors as of `sampling.sample`.

        Each row is a request of its own with a seed of its own, so that it does not depend on the others. Log-probs are the
        server's, of the distribution that it drew from: `never` is left out of it.

        Raises:
            ServerError: where a server cannot be asked, or answers what no response can be made of.
            StopRequested: on a wish to stop, also while servers are waited for.
        """
        if self.adapters is None:
            raise ConfigError("rollout.engine='vllm' samples once its servers were looked at; call begin before.")
        names = self.adapters.names(model, role)
        seeds = torch.randint(SEEDS, (len(prompts),), generator=generator, device=generator.device).tolist()
        most = [settings.max_new_tokens] * len(prompts) if lengths is None else list(lengths)
        rows = [Row(*parts, given=lengths is not None) for parts in zip(prompts, seeds, most, strict=True)]
        reader = Reader(settings, eos_ids, _vocabulary(model), stopped)

        def one(number: int, waiting: Waiting) -> tuple[list[int], list[float]]:
            place = number % len(self.servers)
            body = request(rows[number], names[place], settings, eos_ids, never)
            answer = self._response(self.servers[place], body, waiting)
            return reader.read(answer, rows[number], f"vLLM server {self.servers[place].url}")

        at_once = min(settings.generation_batch_size or len(rows), IN_FLIGHT * len(self.servers))
        found = together([partial(one, number) for number in range(len(rows))], at_once)
        return Samples([ids for ids, _ in found], [logprobs for _, logprobs in found])

    def _response(self, server: Server, body: dict[str, Any], waiting: Waiting) -> Any:
        """Return a server's answer; one that was started anew gets the adapter again."""
        assert self.adapters is not None
        for again in (True, False):
            try:
                return _ask(server, body, waiting)
            except Refused as error:
                if again and error.status == 404 and body["model"].startswith(self.adapters.ours):
                    self.adapters.load_again(waiting, server, body["model"])
                    continue
                raise ServerError(
                    f"vLLM server {server.url} refuses a request (it answered {error}); hydra-ppo serve says how it is started."
                ) from None
        raise AssertionError  # the second try returns or raises

    def watch(self, found: ScoredExperience, model: HydraModel, where: str) -> None:
        """Say, once, that a rollout's log-probs are further from ours than rounding explains."""
        if self._told_of_drift or found.sampler_logprobs is None:
            return
        drift = logprob_drift(found.sampler_logprobs, found.old_logprobs, found.response_mask)[0].item()
        if drift > (limit := self.expected_drift(model)):
            self._told_of_drift = True
            self.note(
                f"{where}: log-probs of the vLLM servers are {drift:.2g} nats per token away from ours, up to {limit:g} would "
                "be rounding; they may serve another base, another adapter, or log-probs of another temperature"
            )


def _ask(server: Server, body: dict[str, Any], waiting: Waiting) -> Any:
    return server.ask(waiting, "/v1/completions", body)


def _vocabulary(model: HydraModel) -> int:
    return int(model.architecture.output_embeddings.weight.shape[0])
