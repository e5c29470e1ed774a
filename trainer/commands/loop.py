"""`qsharp loop`: rounds of collect, reward, train, activate, evaluate, against a running server.

    qsharp loop --task sums --rounds 3 --n 16 8 --eta 0.1 --run runs/sums
    qsharp loop --watch --min-new 500 --name sums --run runs/watch -- --layers 3 --mlp 512 --borrow-embeddings

What follows `--` are flags of `qsharp train`; without any, critics are native ones of the served model. The server
needs a rollout store and an admin key, and must see --out, a folder or a URL. The same command goes on where it was
stopped, killed or not. With --watch it samples nothing: it trains whenever enough of the rollouts that the server
stored have got a reward.
"""

import argparse
import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

from rich.console import Console

from qsharp_core.secret_files import secret
from qsharp_core.wire.guidance import METHODS
from trainer.api.base_model import resolved_base
from trainer.api.calling import by_flags
from trainer.api.reward import judge_of
from trainer.commands import options
from trainer.commands.interruption import until_told
from trainer.commands.training_options import add_settings_arguments, add_storage_arguments, settings_of
from trainer.evaluation.settings import every_setting
from trainer.loop.activation import ServedCritic
from trainer.loop.rounds import REPORT, run_loop
from trainer.loop.settings import Budget, CriticRecipe, EvaluationPlan, LoopSettings
from trainer.loop.table import evaluations, reasons, table
from trainer.loop.trial import TrialSettings
from trainer.loop.versions import LoopError
from trainer.loop.watch import WatchSettings, watch
from trainer.rewards.verifiers import OWN, TaskRef
from trainer.rollouts.client import ServerClient
from trainer.rollouts.parameters import sampling_of
from trainer.tasks.sources import task_of
from trainer.training.launcher import launcher_of

LOOPS_OWN = (
    "--data",
    "--out",
    "--name",
    "--run",
    "--resume",
    "--parent",
    "--tensorboard",
    "--log-with",
    "--recommended-eta",
    "--publish-anyway",
    "--owner",
    "--rewards-by",
)
"""Flags of `qsharp train` that the loop sets itself."""


def main(argv: list[str]) -> None:
    """Runs the command.

    Raises:
        LoopError, TrainingError, CollectError, EvaluateError, RequestError, TaskError, VerifierError, JournalError
    """
    flags, training = _split(argv)
    args = _parser().parse_args(flags)
    args.verifier = args.verifier or [OWN]
    if not args.watch and args.rounds is None and args.max_rollouts is None and args.max_hours is None:
        raise LoopError("say when to stop: --rounds, --max-rollouts or --max-hours (or --watch)")
    trial = _trial(args)
    args.launcher = launcher_of(args.launcher) if args.launcher is not None else ()
    console = Console(stderr=True)
    work = _watch(args, training, trial, console) if args.watch else _loop(args, training, console)
    if not asyncio.run(until_told(work)):
        console.print("stopped; the same command goes on from here", highlight=False)


async def _loop(args: argparse.Namespace, training: list[str], console: Console) -> None:
    task = TaskRef(task_of(args.task, args.prompts), args.task)
    async with AsyncExitStack() as stack:
        judge = await stack.enter_async_context(by_flags(judge_of, args=args, tell=options.say))
        server, admin = await _clients(args, stack)
        model = args.model or await server.model()
        recipe = await _recipe(args, training, server, args.name or task.task.name)
        settings = LoopSettings(
            task=task,
            split=args.split,
            model=model,
            samples=tuple(args.n),
            branches=args.branch,
            sampling=by_flags(sampling_of, task.task.sampling, args=args),
            eta=args.eta,
            recipe=recipe,
            guidance=options.guidance_options_of(args),
            evaluation=_evaluation(args),
            limit=args.limit,
            seed=args.seed,
            concurrency=args.concurrency,
            trust=options.trust_of(args),
        )
        hours = args.max_hours
        budget = Budget(rounds=args.rounds, rollouts=args.max_rollouts, seconds=None if hours is None else hours * 3600)
        served = ServedCritic(admin, recipe.settings.name, recipe.out, args.seen_at)
        report = await run_loop(server, served, judge, settings, budget, args.run, console)
    measured = evaluations(report)
    Console().print(
        table(report), *reasons(report), *([] if measured is None else [measured]), sep="\n", highlight=False
    )
    console.print(f"report: {args.run / REPORT}; versions: {recipe.out / recipe.settings.name}", highlight=False)


async def _watch(args: argparse.Namespace, training: list[str], trial: TrialSettings | None, console: Console) -> None:
    async with AsyncExitStack() as stack:
        _, admin = await _clients(args, stack)  # who reads what others have stored
        recipe = await _recipe(args, training, admin, args.name or "critic")
        settings = WatchSettings(
            recipe=recipe,
            query=tuple((f"metadata.{key}", value) for key, value in args.metadata),
            least=args.min_new,
            interval=args.interval,
            rounds=args.rounds,
            trial=trial,
            trust=options.trust_of(args),
        )
        served = ServedCritic(admin, recipe.settings.name, recipe.out, args.seen_at)
        await watch(admin, served, settings, args.run, console)


def _trial(args: argparse.Namespace) -> TrialSettings | None:
    if args.trial is None:
        return None
    if not args.watch:
        raise LoopError("--trial needs live traffic: use it with --watch")
    for flag, number in (("--trial", args.trial), ("--trial-error", args.trial_error)):
        if not 0 < number < 1:
            raise LoopError(f"{flag} must be between 0 and 1; got {number:g}")
    return TrialSettings(
        share=args.trial,
        most=args.trial_rewards,
        alpha=args.trial_error,
        interval=args.interval,
        trust=options.trust_of(args),
    )


async def _clients(args: argparse.Namespace, stack: AsyncExitStack) -> tuple[ServerClient, ServerClient]:
    """Two clients: of the routes for everybody, and of those that need the admin key."""
    keys, scope = (args.api_key or args.admin_key, args.admin_key or args.api_key), options.trust_of(args).rollouts
    server, admin = (
        ServerClient(
            args.url, key=key, connections=args.concurrency, patience=args.patience, scope=scope, tell=options.say
        )
        for key in keys
    )
    return await stack.enter_async_context(server), await stack.enter_async_context(admin)


async def _recipe(args: argparse.Namespace, flags: list[str], server: ServerClient, name: str) -> CriticRecipe:
    """How versions of the critic of that name are made, by flags of `qsharp train`."""
    training = _training_parser(name).parse_args(flags)
    training.base = await resolved_base(server, training.base)
    return CriticRecipe(
        settings=settings_of(training),
        out=args.out,
        continues=args.continues,
        eta=args.eta,
        dtype=training.dtype,
        checkpoint_every=training.checkpoint_every,
        features=training.features,
        features_bytes=int(training.features_gb * 1e9),
        launcher=args.launcher,
    )


class _LoopsOwn(argparse.Action):
    """A flag of `qsharp train` that the loop sets itself."""

    def __call__(self, *_: object, **__: object) -> None:
        raise LoopError(f"{self.option_strings[0]} is the loop's own: leave it out after --")


def _training_parser(name: str) -> argparse.ArgumentParser:
    """The flags of `qsharp train` that stand after `--`, for a critic of that name."""
    parser = options.parser("train", "What stands after -- in a command of qsharp loop.")
    for flag in LOOPS_OWN:
        parser.add_argument(flag, nargs="*", action=_LoopsOwn, help=argparse.SUPPRESS)
    parser.set_defaults(name=name)
    add_storage_arguments(parser.add_argument_group("results"))
    add_settings_arguments(parser)
    return parser


def _evaluation(args: argparse.Namespace) -> EvaluationPlan | None:
    if not args.eval_samples:
        return None
    etas, methods = args.eval_eta or [args.eta], args.eval_method or METHODS[:1]
    return EvaluationPlan(
        split=args.eval_split,
        samples=args.eval_samples,
        settings=every_setting(methods, etas),
    )


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    """The loop's flags, and those after `--`."""
    at = argv.index("--") if "--" in argv else len(argv)
    return argv[:at], argv[at + 1 :]


def _parser() -> argparse.ArgumentParser:
    parser = options.parser("loop", __doc__, usage="qsharp loop --run FOLDER … -- [flags of qsharp train]")
    parser.add_argument("--run", type=Path, required=True, metavar="FOLDER", help="what was done, and the report")
    parser.add_argument(
        "--out",
        type=options.location,
        default=Path("critics"),
        help="versions are OUT/NAME/VERSION; a folder, or a URL as s3://BUCKET/FOLDER (%(default)s)",
    )
    parser.add_argument("--name", help="of the critic (default: the task's)")
    parser.add_argument(
        "--seen-at", type=options.location, metavar="FOLDER", help="where the server sees OUT (default: there)"
    )
    parser.add_argument("--admin-key", default=secret("QSHARP_ADMIN_KEY"), help="default: QSHARP_ADMIN_KEY")
    parser.add_argument("--n", type=options.positive, nargs="+", default=[8], help="rollouts of each problem, by round")
    parser.add_argument(
        "--branch", type=options.positive, default=0, metavar="N",
        help="then N more of each problem in the first round, as by `qsharp collect --branch` (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--continue", dest="continues", action="store_true", help="later versions go on from the active one"
    )
    options.add_launcher_argument(parser)
    group = parser.add_argument_group("budget")
    group.add_argument("--rounds", type=options.positive, help="in all")
    group.add_argument("--max-rollouts", type=options.positive, help="no round beyond so many in all")
    group.add_argument("--max-hours", type=float, help="no new round after so many, over all runs of the command")
    options.add_task_arguments(parser, split="train")
    options.add_guidance_arguments(parser, critic=False).add_argument(
        "--eta", type=float, default=0.1, help="of the roll-ins (%(default)s); written into the cards"
    )
    options.add_verifier_arguments(parser, [OWN])
    options.add_trust_arguments(parser.add_argument_group("trust"))
    group = parser.add_argument_group("evaluation after each round")
    group.add_argument("--eval-samples", type=int, default=0, help="of each problem; 0 is no evaluation (the default)")
    group.add_argument("--eval-split", default="held_out", help="default: %(default)s")
    group.add_argument("--eval-eta", type=float, action="append", help="may be repeated; default: that of --eta")
    group.add_argument("--eval-method", choices=METHODS, action="append", help="may be repeated; default: qsharp")
    group = parser.add_argument_group("the long-running mode")
    group.add_argument("--watch", action="store_true", help="train when enough is new; until SIGTERM or --rounds")
    group.add_argument("--min-new", type=options.positive, default=500, help="rollouts to wait for (%(default)s)")
    group.add_argument("--interval", type=float, default=60.0, help="seconds between two looks (%(default)s)")
    group.add_argument(
        "--metadata", action="append", type=options.key_value, default=[], metavar="KEY=VALUE", help="they have"
    )
    group.add_argument(
        "--trial",
        type=float,
        metavar="SHARE",
        help="first let a better version guide this share of the requests, between 0 and 1, and compare rewards",
    )
    group.add_argument(
        "--trial-rewards",
        type=options.positive,
        default=5000,
        metavar="N",
        help="if so many leave it undecided, the active version stays (%(default)s)",
    )
    group.add_argument(
        "--trial-error", type=float, default=0.05, metavar="P", help="probability of a wrong verdict (%(default)s)"
    )
    options.add_server_arguments(parser)
    return parser
