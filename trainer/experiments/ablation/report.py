"""What an ablation came to: report.json as a model, and the table."""

from collections.abc import Mapping, Sequence

from pydantic import JsonValue
from rich.table import Table

from trainer.evaluation.of_problems import OfProblems
from trainer.evaluation.report import SettingReport
from trainer.evaluation.settings import REFERENCE, Setting
from trainer.evaluation.table import NAMES
from trainer.experiments.ablation.seeds import OverSeeds, differences, means, over_seeds, spread
from trainer.experiments.report import Outcome
from trainer.reports import ReportPart
from trainer.training.report import Measures


class VariantOutcome(ReportPart):
    """What one training of a variant came to.

    Attributes:
        variant: the variant's fields.
        seed: of the training.
        critic: the version that was trained, `name@version`.
        steps: of the optimizer.
        held_out: measures of the version; None if nothing was held out.
        results: the evaluation's; the reference first.
    """

    variant: dict[str, JsonValue]
    seed: int = 0
    critic: str
    steps: int
    held_out: Measures | None
    results: list[SettingReport]


class SettingOverSeeds(ReportPart):
    """A setting of the evaluation, over the seeds of a variant.

    Attributes:
        setting: as people read it.
        method, eta: of the setting.
        n: judged samples, of all seeds together; of the reference, of all variants together.
        accuracy: mean reward (pass@1). Each training measures the reference anew, and the samples of all of them are
            taken together.
        gain: accuracy less the reference's, paired by problem.
        apart: accuracy less the first variant's, paired by problem and seed; None of the first, and of the reference.
        kl: KL divergence to the reference in nats, per completion.
    """

    setting: str
    method: str
    eta: float | None
    n: int
    accuracy: OverSeeds | None
    gain: OverSeeds | None
    apart: OverSeeds | None = None
    kl: OverSeeds | None


class VariantOverSeeds(ReportPart):
    """A variant over its seeds; `log_loss` (in nats) and `auc` are of the held-out rollouts."""

    variant: str
    seeds: list[int]
    log_loss: OverSeeds | None
    auc: OverSeeds | None
    results: list[SettingOverSeeds]


class AblationOutcome(Outcome):
    """What the variants came to, the Parquet files that they learned from, and means over seeds."""

    data: list[str]
    results: list[VariantOutcome]
    over_seeds: list[VariantOverSeeds]


OfSeeds = Sequence[Mapping[Setting, OfProblems]]
"""For each seed of a variant: what each problem earned and cost, by setting."""


def compared(outcomes: Sequence[Sequence[VariantOutcome]], problems: Sequence[OfSeeds]) -> list[VariantOverSeeds]:
    """Every variant's figures over its seeds.

    Args:
        outcomes: by variant, of each seed.
        problems: by variant.
    """
    rewards = means([one[Setting()].rewards for some in problems for one in some])
    reference = SettingOverSeeds(
        setting=REFERENCE,
        method=REFERENCE,
        eta=None,
        n=sum(one.results[0].n for some in outcomes for one in some),
        accuracy=over_seeds([rewards]),
        gain=None,
        kl=over_seeds([dict.fromkeys(rewards, 0.0)]),
    )
    return [
        _variant(some, ours, reference, rewards, None if ours is problems[0] else problems[0])
        for some, ours in zip(outcomes, problems, strict=True)
    ]


def _variant(
    outcomes: Sequence[VariantOutcome],
    problems: OfSeeds,
    reference: SettingOverSeeds,
    rewards: Mapping[str, float],
    first: OfSeeds | None,
) -> VariantOverSeeds:
    """A variant's figures; `rewards` are the reference's, by problem."""
    measured = [one.held_out for one in outcomes if one.held_out is not None]
    aucs = [one.auc for one in measured if one.auc is not None]
    return VariantOverSeeds(
        variant=str(outcomes[0].variant["name"]),
        seeds=[one.seed for one in outcomes],
        log_loss=spread([one.log_loss for one in measured]) if measured else None,
        auc=spread(aucs) if aucs else None,
        results=[
            _setting(results, problems, rewards, first) if results[0].guided else reference
            for results in zip(*(one.results for one in outcomes), strict=True)
        ],
    )


def _setting(
    results: Sequence[SettingReport], problems: OfSeeds, rewards: Mapping[str, float], first: OfSeeds | None
) -> SettingOverSeeds:
    setting = results[0].setting
    ours = [one[setting] for one in problems]
    apart = [differences(one.rewards, other[setting].rewards) for one, other in zip(ours, first or (), strict=False)]
    return SettingOverSeeds(
        setting=setting.label,
        method=results[0].method,
        eta=results[0].eta,
        n=sum(one.n for one in results),
        accuracy=over_seeds([one.rewards for one in ours]),
        gain=over_seeds([differences(one.rewards, rewards) for one in ours]),
        apart=over_seeds(apart) if apart else None,
        kl=over_seeds([one.kl for one in ours]),
    )


def table(variants: Sequence[VariantOverSeeds], outcomes: Sequence[VariantOutcome], samples: int) -> Table:
    """A row for each variant and setting: means over seeds ± one standard error over problems, and s.d. over seeds.

    A gain has the accuracy's s.d., because the reference is the same for all seeds.

    Args:
        variants: over their seeds.
        outcomes: of every variant and seed.
        samples: of each problem, which majorities and best-of-k take; of these there is the mean alone.
    """
    made = Table(
        "critic", "seeds", "log-loss, s.d.", "AUC, s.d.", "setting", "pass@1", "s.d.", "gain, points",
        "above the first", "s.d.", "KL, nats", "s.d.", f"wmaj@{samples}", f"best of {samples}", "n",
    )  # fmt: skip
    for column in (*made.columns[1:4], *made.columns[5:]):
        column.justify = "right"
    for variant in variants:
        own = [one for one in outcomes if one.variant["name"] == variant.variant]
        for i, result in enumerate(variant.results):
            about = (
                variant.variant,
                str(len(variant.seeds)),
                _both(variant.log_loss, ".4f"),
                _both(variant.auc, ".3f"),
            )
            others = [[one.results[i].figure(name)[0] for one in own] for name in ("weighted_majority", "best_of")]
            made.add_row(
                *(about if i == 0 else ("", "", "", "")),
                result.setting.replace(result.method, NAMES.get(result.method, result.method), 1),
                *_columns(result.accuracy, 100, ".1f"),
                _columns(result.gain, 100, "+.1f")[0],
                *_columns(result.apart, 100, "+.1f"),
                *_columns(result.kl, 1, ".2f"),
                *map(_mean, others),
                str(result.n),
            )
    return made


def _both(figure: OverSeeds | None, form: str) -> str:
    if figure is None:
        return ""
    return format(figure.mean, form) + ("" if figure.sd is None else f", {format(figure.sd, form)}")


def _columns(figure: OverSeeds | None, scale: float, form: str) -> tuple[str, str]:
    """The mean ± its error, and the standard deviation over seeds."""
    if figure is None:
        return "", ""
    plain = form.lstrip("+")
    error = "" if figure.se is None else f" ± {format(scale * figure.se, plain)}"
    return format(scale * figure.mean, form) + error, "" if figure.sd is None else format(scale * figure.sd, plain)


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return format(100 * sum(known) / len(known), ".1f") if known and len(known) == len(values) else ""
