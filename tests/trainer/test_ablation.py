"""What an ablation computes around the trainings and evaluations, which `test_recipes` runs for real."""

import json
import math
import random
import statistics
import tomllib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qsharp_core.wire.metadata import FORCED
from tests.support import trainer_data as world
from trainer.evaluation.of_problems import OfProblems, of_problems
from trainer.evaluation.report import SettingReport
from trainer.evaluation.settings import Setting
from trainer.evaluation.statistics import JudgedSample
from trainer.experiments import files
from trainer.experiments.ablation.choice import RolloutChoice, chosen
from trainer.experiments.ablation.report import VariantOutcome, compared
from trainer.experiments.ablation.seeds import differences, over_seeds, spread
from trainer.experiments.ablation.settings import Ablation
from trainer.experiments.ablation.unchanged import refuse_changed
from trainer.experiments.files import RecipeError
from trainer.training import data
from trainer.training.job import Job
from trainer.training.settings import TrainingError, TrainSettings

SETTINGS = TrainSettings(base="anywhere", held_out=0.3, seed=5)


@pytest.fixture
def logged(tmp_path: Path) -> Path:
    """Whole rollouts, branches of them, guided ones and what goes on from them, and rollouts without a reward."""
    rows = world.rollouts(prompts=30, each=6)
    for i, row in enumerate(rows):
        row["metadata"] = json.dumps({"qsharp_run": "r"} | ({FORCED: "68"} if i % 6 in (2, 3, 4) else {}))
        row["parent_id"] = "other" if i % 6 > 1 else None
        row["reward"] = None if i % 12 == 0 else row["reward"]
    rows += [{**row, "id": f"{row['id']}-guided", "eta": 0.1, "parent_id": None} for row in rows[5::6]]
    rows += rows[7::9]  # as of several files
    return world.write(tmp_path / "logged.parquet", rows)


def split_of(paths: list[Path]) -> tuple[set[str], set[str]]:
    """Ids of the rollouts that are trained on, and of those that are held out."""
    rollouts = data.read(paths).rollouts
    train, held_out = data.split(rollouts, SETTINGS.held_out)
    return {r.id for r in train}, {r.id for r in held_out}


@pytest.mark.parametrize(("which", "kinds"), [("all", range(6)), ("whole", (0, 1)), ("branches", (2, 3, 4))])
def test_a_choice_is_of_training_rollouts_alone(logged: Path, tmp_path: Path, which: Any, kinds: Any) -> None:
    train, held_out = split_of([logged])
    wanted = train if which == "all" else {f"r0-{n}-{k}" for n in range(30) for k in kinds} & train
    if which != "all":
        assert split_of(chosen([logged], RolloutChoice(which=which), SETTINGS, tmp_path)) == (wanted, held_out)
    number = random.randint(1, len(wanted) // 4)
    choice = RolloutChoice(which=which, number=number)
    some, measured = split_of(chosen([logged], choice, SETTINGS, tmp_path))
    assert (len(some), measured) == (number, held_out)
    assert some <= wanted
    other = SETTINGS.model_copy(update={"seed": 6})
    again = split_of(chosen([logged], choice, SETTINGS, tmp_path / "again"))[0]
    assert again == some  # by the seed alone
    half = RolloutChoice(which=which, number=len(wanted) // 2)
    drawn = [split_of(chosen([logged], half, one, tmp_path))[0] for one in (SETTINGS, other)]
    assert drawn[0] != drawn[1]
    more = SETTINGS.model_copy(update={"held_out": 0.6})  # is a choice of its own
    (file,) = chosen([logged], choice, more, tmp_path)
    assert {r.id for r in data.split(data.read([file]).rollouts, 0.6)[1]} > held_out
    with pytest.raises(
        TrainingError, match=f"{len(wanted) + 1} are wanted, and the training prompts have {len(wanted)}"
    ):
        chosen([logged], RolloutChoice(which=which, number=len(wanted) + 1), SETTINGS, tmp_path)


def test_all_rollouts_are_the_files_themselves(logged: Path, tmp_path: Path) -> None:
    assert chosen([logged], RolloutChoice(), SETTINGS, tmp_path / "none") == [logged]
    assert not (tmp_path / "none").exists()


def test_the_split_goes_by_the_metadata_where_it_is_asked_to(logged: Path, tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"group_by": "qsharp_run"})  # one group: all is trained on, or held out
    (found,) = chosen([logged], RolloutChoice(which="whole"), settings.model_copy(update={"held_out": 0.0}), tmp_path)
    assert len(data.read([found], "qsharp_run").rollouts) == 45
    with pytest.raises(TrainingError, match="have 0 rollouts"):
        chosen([logged], RolloutChoice(which="whole"), settings.model_copy(update={"held_out": 0.999}), tmp_path / "o")


def test_means_over_seeds_have_both_errors() -> None:
    dice = np.random.default_rng()
    seeds, problems = int(dice.integers(2, 6)), int(dice.integers(3, 30))
    values = dice.normal(size=(seeds, problems))
    found = over_seeds([{str(i): value for i, value in enumerate(row)} for row in values.tolist()])
    assert found is not None
    assert found.mean == pytest.approx(values.mean())
    assert found.sd == pytest.approx(values.mean(1).std(ddof=1))
    assert found.se == pytest.approx(values.mean(0).std(ddof=1) / math.sqrt(problems))
    one = over_seeds([{"a": 1.0, "b": 3.0, "c": 9.0}, {"a": 2.0, "b": 4.0}])  # of what all seeds have
    assert one is not None
    assert (one.mean, one.se) == (2.5, 1.0)
    assert over_seeds([{"a": 1.0}, {}]) is None
    assert spread([2.0]).sd is None
    assert spread([1.0, 2.0, 4.0]).sd == pytest.approx(statistics.stdev([1, 2, 4]))
    assert differences({"a": 3.0, "b": 1.0}, {"a": 1.0}) == {"a": 2.0}


def test_means_of_problems_are_of_judged_samples() -> None:
    def samples(*each: tuple[float | None, float]) -> list[JudgedSample]:
        return [JudgedSample(reward=reward, kl=kl, tokens=1) for reward, kl in each]

    guided = Setting("qsharp", 0.1)
    found = of_problems(
        {
            Setting(): {"a": samples((1.0, 0.0), (0.0, 0.0)), "b": samples((None, 0.0)), "c": []},
            guided: {"a": samples((1.0, 0.5), (None, 1.5))},
        }
    )
    assert found == {
        Setting(): OfProblems({"a": 0.5}, {"a": 0.0, "b": 0.0}), guided: OfProblems({"a": 1.0}, {"a": 1.0}),
    }  # fmt: skip


def test_variants_are_compared_by_problem_and_the_reference_is_of_all_of_them() -> None:
    dice = np.random.default_rng()
    variants, seeds, problems = (int(dice.integers(2, high)) for high in (4, 4, 12))
    reference, guided, kl = dice.normal(size=(3, variants, seeds, problems))

    def named(values: Any) -> dict[str, float]:
        return {str(i): value for i, value in enumerate(values.tolist())}

    kept = [
        [
            {
                Setting(): OfProblems(named(reference[v, s]), {}),
                Setting("qsharp", 0.1): OfProblems(named(guided[v, s]), named(kl[v, s])),
            }
            for s in range(seeds)
        ]
        for v in range(variants)
    ]
    about: dict[str, Any] = {"critic": "c@1", "steps": 1, "held_out": None}
    results = [SettingReport.model_construct(**asdict(one), n=2) for one in (Setting(), Setting("qsharp", 0.1))]
    outcomes = [
        [
            VariantOutcome.model_construct(variant={"name": f"v{v}"}, seed=s, results=results, **about)
            for s in range(seeds)
        ]
        for v in range(variants)
    ]
    found = compared(outcomes, kept)
    for v, variant in enumerate(found):
        ours, theirs = variant.results[1], variant.results[0]
        assert (theirs.gain, theirs.apart, ours.n, theirs.n) == (None, None, 2 * seeds, 2 * seeds * variants)
        assert theirs.accuracy is not None
        assert theirs.accuracy.mean == pytest.approx(reference.mean())
        for figure, values in ((ours.gain, guided[v] - reference.mean((0, 1))), (ours.apart, guided[v] - guided[0])):
            if figure is None:
                assert (v, figure) == (0, ours.apart)
                continue
            assert figure.mean == pytest.approx(values.mean())
            assert figure.se == pytest.approx(values.mean(0).std(ddof=1) / math.sqrt(problems))
            assert figure.sd == pytest.approx(values.mean(1).std(ddof=1))


def recipe(text: str) -> Ablation:
    return Ablation.model_validate({"kind": "ablation", "task": "sums"} | tomllib.loads(text))


def test_a_variant_of_the_other_kind_takes_what_both_kinds_have() -> None:
    native = recipe(
        '[critic]\nbackbone = "reference"\nheld_out = 0.2\nepochs = 7\nweigh = "nodes"\n'
        '[[variants]]\nname = "a"\nmlp = 8\n[[variants]]\nname = "b"\nbackbone = "own"\nlayers = 2\n'
    )
    mine, other = (native.settings(variant, 3) for variant in native.variants)
    assert (mine.backbone, mine.head, mine.mlp, mine.epochs, mine.dropout) == ("reference", "Q", 8, 7, 0.2)
    assert (other.backbone, other.head, other.mlp, other.epochs, other.dropout) == ("own", "V", None, None, 0.0)
    assert (other.held_out, other.weigh, other.seed, other.layers) == (0.2, "nodes", 3, 2)
    own = recipe('[critic]\nlayers = 3\nmlp = 8\n[[variants]]\nname = "n"\nbackbone = "reference"\n')
    assert own.settings(own.variants[0], 0).mlp == 512


def test_seeds_have_critics_of_their_own_and_one_seed_is_as_it_was() -> None:
    variants = '[[variants]]\nname = "a"\n'
    alone = recipe("[critic]\nseed = 4\n" + variants)
    assert alone.every_seed == (4,)
    assert alone.settings(alone.variants[0], 4).name == "a"
    several = recipe("seeds = [3, 4]\n[critic]\nseed = 4\n" + variants)
    assert [several.settings(several.variants[0], seed).name for seed in several.every_seed] == ["a.3", "a"]


@pytest.mark.parametrize(
    ("variants", "said"),
    [
        ('{name="a", seed=1}', "seed: a variant has none of its own"),
        ('{name="a", layer=1}', "layer: there is no such field of a training"),
        ('{name="a", backbone="reference", layers=1}', "variants: a: --layers is for critics with a backbone"),
        ('{name="a", loss="cubic"}', "variants: a: loss: .*'likelihood' or 'squared'"),
        ('{name="a", rollouts={which="some"}}', "'all', 'whole' or 'branches'"),
        ('{name="a", rollouts={number=0}}', "greater than 0"),
    ],
)
def test_wrong_variants_are_told(tmp_path: Path, variants: str, said: str) -> None:
    path = tmp_path / "own.toml"
    path.write_text(f'kind = "ablation"\ntask = "sums"\nvariants = [{variants}]\n')
    with pytest.raises(RecipeError, match=said):
        files.load(str(path))
    with pytest.raises(RecipeError, match="seeds must differ"):
        files.load("ablation-native", ["seeds=[1, 1]"])


def test_a_changed_variant_is_refused(tmp_path: Path) -> None:
    place = tmp_path / "variant"
    refuse_changed(place, SETTINGS, [tmp_path / "a.parquet"])  # nothing is there
    place.mkdir()
    job = Job(data=[Path("elsewhere") / "a.parquet"], settings=SETTINGS, out=tmp_path, run=place / "training")
    (place / "training.json").write_text(job.model_dump_json())
    refuse_changed(place, SETTINGS.model_copy(update={"base": "moved"}), [tmp_path / "a.parquet"])
    with pytest.raises(RecipeError, match="variant was trained with mlp = None, not 8: give the variant another name"):
        refuse_changed(place, SETTINGS.model_copy(update={"mlp": 8}), [tmp_path / "a.parquet"])
    with pytest.raises(RecipeError, match=r"was trained on a\.parquet, not whole\.parquet"):
        refuse_changed(place, SETTINGS, [tmp_path / "whole.parquet"])
