"""The endpoint plugin that adds our routes, our error responses and our engine proxy to vLLM's app.

    VLLM_PLUGINS=qsharp vllm serve MODEL --logits-processors … --worker-extension-cls … --additional-config …

vLLM finds it by the entry point `qsharp` in the group `vllm.endpoint_plugins`. `qsharp serve` sets these flags itself.
"""

import asyncio
import logging
from argparse import Namespace
from pathlib import Path
from typing import Any, ClassVar

from fastapi import FastAPI
from starlette.datastructures import State
from starlette.exceptions import HTTPException

from qsharp_core.errors import ConfigError, CriticError, QSharpError
from qsharp_core.locations import parse_location
from qsharp_core.vllm_plugin import processors
from qsharp_core.vllm_plugin.settings import EngineSettings, parse_critic
from server import errors, metrics
from server.access.install import install_gate
from server.api import completions, critics, docs, health, playground, rewards, rollouts, stored_chat
from server.api.elsewhere import GuideElsewhere
from server.api.encodable import RefuseHalfCharacters
from server.critics.decisions import OwnDecisions
from server.critics.following import Follower
from server.critics.loaded import Fetching, LoadedCritics
from server.critics.published import SharedDecisions
from server.critics.roots import CriticRoots
from server.critics.workers import Workers
from server.request import responses
from server.request.proxy import GuidedEngineClient
from server.request.slots import PER_SEQUENCE, Slots
from server.request.telemetry import TelemetryReceiver
from server.request.virtual_models import VirtualModels
from server.settings import ARGUMENT, Settings
from server.state import QSharpState
from server.store.rollouts import RolloutStore
from server.upstream import shared_address

logger = logging.getLogger("vllm.qsharp")
WORKER_EXTENSION = "qsharp_core.vllm_plugin.worker.CriticWorker"


class QSharpEndpoints:
    """Implements vLLM's `EndpointPlugin` protocol."""

    name = "qsharp"
    required_tasks = ("generate",)
    engine: ClassVar[GuidedEngineClient | None] = None  # of this process's server, when it runs

    def attach_router(self, app: FastAPI) -> None:
        """Adds our routes, our middleware, the handler of our errors, and the gate in front of all of it."""
        completions.attach(app)
        critics.attach(app)
        rewards.attach(app)
        rollouts.attach(app)
        stored_chat.attach(app)
        health.attach(app)
        docs.attach(app)
        playground.attach(app, app.state.args)
        app.add_middleware(GuideElsewhere)
        app.add_middleware(RefuseHalfCharacters)
        app.add_exception_handler(QSharpError, errors.handle)
        app.add_exception_handler(RecursionError, errors.handle_depth)
        app.add_exception_handler(HTTPException, errors.handle_no_route)
        install_gate(app, app.state.args)

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """Connects to the workers, and makes all of vLLM's handlers sample through our proxy.

        Raises:
            ConfigError: the engine was started without our parts.
        """
        settings = Settings.of(args)
        parallel = engine_client.vllm_config.parallel_config
        if parallel.worker_extension_cls != WORKER_EXTENSION:
            raise ConfigError(f"start the engine with --worker-extension-cls {WORKER_EXTENSION}, or use `qsharp serve`")
        telemetry = TelemetryReceiver(metrics.observe_step, shared_address(parallel))
        engine_settings = EngineSettings.of(engine_client.vllm_config)
        fetched: dict[str, str] = getattr(args, ARGUMENT + "fetched", {})  # URLs of critics, by folder
        started_with = [parse_critic(critic)[1] for critic in engine_settings.critics]
        roots = CriticRoots.of(
            settings.critic_root, [parse_location(fetched.get(str(one), str(one))) for one in started_with]
        )
        fetching = Fetching(settings.critic_cache_folder, engine_settings.max_bytes, engine_settings.load_seconds)
        loaded = LoadedCritics(Workers(engine_client), roots, fetching)
        qsharp = QSharpState(
            settings,
            loaded,
            OwnDecisions(loaded),
            telemetry,
            engine_client.tokenizer,
            engine_client.model_config.get_vocab_size(),
        )
        qsharp.slots = Slots(self._limit(engine_client.vllm_config, settings))
        if settings.rollouts is not None:
            url, count = settings.rollouts.get_secret_value(), metrics.ROLLOUTS_UNREADABLE.inc
            qsharp.rollouts = store = await asyncio.to_thread(RolloutStore, url, count)
            metrics.ROLLOUT_LAG.set_function(lambda: store.lag)
        telemetry.start()
        try:
            await qsharp.critics.workers.connect(telemetry.address, telemetry.keys)
        except CriticError as error:
            wanted = processors.processor_name(engine_client.vllm_config)
            raise ConfigError(f"start the engine with --logits-processors {wanted}, or use `qsharp serve`") from error
        await qsharp.critics.refresh()
        for one in started_with:
            if not isinstance(one, Path):  # plain vLLM was given a URL, and its worker has fetched it
                fetched[str(await loaded.on_disk(one))] = str(one)
        for info in loaded.catalog.critics.values():
            info.source = fetched.get(info.status.path)
        if qsharp.rollouts is not None and settings.share_critics:
            records = qsharp.rollouts.critics
            qsharp.follower = follower = Follower(loaded, records.desired, records.changes)
            qsharp.decisions = SharedDecisions(loaded, records, follower)
            await follower.settle()  # before anybody is served
            state.qsharp_follows = asyncio.create_task(follower.follow())
        engine = GuidedEngineClient(
            engine_client, telemetry, settings.telemetry_timeout, guides_all=settings.default_eta is not None
        )
        engine.stand_before(state[name] for name in state)
        state.engine_client = type(self).engine = engine
        served = state.openai_serving_models
        names = [path.name for path in served.base_model_paths]
        qsharp.models = VirtualModels(names, qsharp.critics.catalog, settings.model_etas)
        qsharp.models.install(served)
        responses.install(state.openai_serving_completion, "create_completion")
        responses.install(state.openai_serving_chat, "create_chat_completion")
        state.qsharp = qsharp
        state.qsharp_pulse = asyncio.create_task(health.watch_engines(qsharp.critics.workers, settings.rpc_timeout))
        logger.info("guided decoding is on; critics: %s", ", ".join(qsharp.critics.catalog.critics) or "none yet")
        if hint := getattr(args, ARGUMENT + "hint", None):  # there is none under `vllm serve`
            state.qsharp_hint = asyncio.create_task(_print_when_listening(state, hint))

    def _limit(self, config: Any, settings: Settings) -> int:
        """How many samples may be on their way."""
        engines = config.parallel_config.data_parallel_size
        return settings.max_queued or PER_SEQUENCE * engines * config.scheduler_config.max_num_seqs


async def _print_when_listening(state: State, hint: str) -> None:
    # vLLM prints pages before it listens; the hint must stand below them to be read.
    while not (hasattr(state, "server") and state.server.started):
        await asyncio.sleep(0.1)
    print(hint, flush=True)
