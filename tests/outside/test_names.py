"""Names of metrics, policies and readers: ours, those of installed packages, import paths, and what a file may say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bigram_tutor.metrics import RewardPerNat, TutorRatio
from bigram_tutor.policies import KeepMiddle
from bigram_tutor.readers import Bigrams

from distill_sampler import LocalNaturalness, Metric, Random, RankSurprisalRatio
from distill_sampler.artifacts.schema import metric_facts, metrics_in_file
from distill_sampler.metrics.steps import lines
from distill_sampler.plugins import GROUPS, plugins
from distill_sampler.specs import known_metrics, parse_metrics, parse_policies
from tests.cli.conftest import call, student_path
from tests.outside.conftest import Install

__all__ = ["student_path"]  # a fixture
METRICS, POLICIES = GROUPS["metric"], GROUPS["policy"]


def of_file(*facts: dict[str, Any]) -> dict[str, Metric]:
    """The metrics of a file that says this of them."""
    return metrics_in_file({"metrics": list(facts)}, [name for each in facts for name in each["columns"]])


def test_what_a_package_offers_is_used_by_name_like_ours(install: Install, tutors: tuple[Path, Path]) -> None:
    with pytest.raises(ValueError, match="no metric 'reward_per_nat'"):
        parse_metrics("reward_per_nat")
    install()
    text = f"reward_per_nat, TutorRatio(tutor=Bigrams('{tutors[0]}', smoothing=1.5)), rank_surprisal_ratio"
    tutor = Bigrams(str(tutors[0]), smoothing=1.5)
    assert parse_metrics(text) == [RewardPerNat(), TutorRatio(tutor=tutor), RankSurprisalRatio()]
    assert parse_metrics("reward_per_nat(column=verdict, name=r), RewardPerNat()") == [
        RewardPerNat(column="verdict", name="r"),
        RewardPerNat(),
    ]
    assert parse_policies(["KeepMiddle(tutor_ratio)"]) == [KeepMiddle("tutor_ratio")]
    with pytest.raises(ValueError, match=r"reward_per_na'.*Did you mean 'reward_per_nat'"):
        parse_metrics("reward_per_na")


def test_an_import_path_is_used_like_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_metrics("bigram_tutor.metrics:RewardPerNat") == [RewardPerNat()]
    assert parse_metrics("bigram_tutor.metrics:RewardPerNat(column='a:b'), random") == [
        RewardPerNat(column="a:b"),
        Random(),
    ]
    with pytest.raises(ValueError, match=r"RewardPerNat\(column=\{'a': 'b'\}\): column takes text"):
        parse_metrics("bigram_tutor.metrics:RewardPerNat(column={a:b})")
    assert parse_policies(["bigram_tutor.policies:KeepMiddle(random, share=0.2)"]) == [KeepMiddle("random", share=0.2)]
    assert parse_metrics("LocalNaturalness(splitter=distill_sampler.metrics.steps:lines)") == [
        LocalNaturalness(splitter=lines)
    ]
    # one's own file, in the folder where one works
    (tmp_path / "of_my_own.py").write_text("from bigram_tutor.policies import KeepMiddle as Mine\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert parse_policies(["of_my_own:Mine(random)"]) == [KeepMiddle("random")]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("nowhere.metrics:Gap()", r"no module 'nowhere'.*Install"),
        ("bigram_tutor.metrics:RewardPerNatt()", "Did you mean 'RewardPerNat'"),
        ("bigram_tutor.metrics:TutorRatio()", "missing 1 required .*'tutor'.*Its arguments: tutor, name='tutor_ratio'"),
        ("bigram_tutor.policies:KeepMiddle(random)", "not a metric: it has no .*reduce"),
        ("bigram_tutor.metrics.RewardPerNat", r"Write Name or package.module:Name"),
        ("os:getcwd()", "is of type str, which is not a metric"),
        ("os:sep", "of type str, which cannot make a metric"),
        ("'text'", "of type str, which is not a metric"),
        ("bigram_tutor:", "cannot be read"),
    ],
)
def test_what_cannot_be_imported_or_is_no_metric_is_refused_in_a_sentence(text: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        parse_metrics(text)


def test_a_module_that_fails_is_named_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half_installed.py").write_text("import not_there_either\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(
        ValueError, match=r"importing half_installed fails with ModuleNotFoundError: .*not_there_either"
    ):
        parse_metrics("half_installed:Metric()")


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("not_installed.at_all:Metric", "no module 'not_installed'"),
        ("bigram_tutor.metrics:Gone", "no name 'Gone'"),
        ("bigram_tutor.readers:np", "is a module"),
        ("bigram_tutor", "cannot be imported"),
        ("bigram_tutor.policies:KeepMiddle", "arguments"),
        ("builtins:dict", "is of type dict, which is not a metric"),
    ],
)
def test_a_broken_entry_point_is_reported_by_name_and_breaks_no_other(install: Install, path: str, told: str) -> None:
    install()
    install("careless", {METRICS: {"broken": path}})
    for text in ("broken", "broken()"):
        with pytest.raises(ValueError, match=f"(?s)(broken.*careless|KeepMiddle).*{told}"):
            parse_metrics(text)
    assert parse_metrics("reward_per_nat,random") == [RewardPerNat(), Random()]


def test_a_table_without_metadata_is_known_by_installed_metrics_too(
    install: Install, caplog: pytest.LogCaptureFixture
) -> None:
    install()
    install("careless", {METRICS: {"broken": "not_installed.at_all:Metric"}})
    assert known_metrics(["reward_per_nat", "random", "sample"]) == {
        "reward_per_nat": RewardPerNat(),
        "random": Random(),
    }
    assert "'broken' of the installed package careless" in caplog.text


def test_the_doctor_lists_what_packages_offer_and_what_is_broken(install: Install, student_path: Path) -> None:
    install()
    install("careless", {METRICS: {"broken": "not_installed.at_all:Metric"}})
    ended = call("doctor", "--model", student_path, "--seconds", 0)
    assert ended.code == 0, ended.said
    assert "reader Bigrams" in ended.said
    assert "no module 'not_installed'" in ended.said


@pytest.mark.parametrize("name", ["random", "Random", "rank_surprisal_ratio"])
def test_a_name_of_ours_that_another_package_takes_is_refused(install: Install, name: str) -> None:
    install("greedy", {METRICS: {name: "bigram_tutor.metrics:RewardPerNat"}})
    with pytest.raises(ValueError, match=r"distill_sampler and by greedy.*distill_sampler\.metrics\.\w+:.*uninstall"):
        parse_metrics(name)
    with pytest.raises(ValueError, match="distill_sampler and by greedy"):
        parse_metrics(f"{name}()")
    # the path says which; a file that we wrote means ours
    assert parse_metrics("distill_sampler.metrics:Random") == [Random()]
    assert of_file(*metric_facts([Random(seed=3), RankSurprisalRatio()])) == {
        "random": Random(seed=3),
        "rank_surprisal_ratio": RankSurprisalRatio(),
    }


def test_a_name_that_two_packages_take_is_refused(install: Install) -> None:
    install("one", {POLICIES: {"Middle": "bigram_tutor.policies:KeepMiddle"}})
    install("two", {POLICIES: {"Middle": "bigram_tutor.elsewhere:KeepMiddle"}})
    with pytest.raises(ValueError, match=r"one and by two.*bigram_tutor\.policies:KeepMiddle or"):
        parse_policies(["Middle(random)"])
    with pytest.raises(ValueError, match="one and by two"):  # the class, which neither of them gave as a name
        parse_policies(["KeepMiddle(random)"])


def test_only_what_is_typed_is_imported(install: Install) -> None:
    install()
    code = f"""
import sys
sys.path[:0] = {sys.path!r}
import distill_sampler
assert "importlib.metadata" not in sys.modules
import distill_sampler.specs
from distill_sampler.plugins import plugins
assert [plugin.name for plugin in plugins("metric")] == ["reward_per_nat", "tutor_ratio"]
assert not [name for name in sys.modules if name.startswith("bigram_tutor")]
distill_sampler.specs.parse_metrics("reward_per_nat")
assert "bigram_tutor.metrics" in sys.modules and "bigram_tutor.policies" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_plugins_are_listed_with_their_packages(install: Install) -> None:
    install()
    assert [(plugin.kind, plugin.name, plugin.package) for plugin in plugins()] == [
        ("metric", "reward_per_nat", "bigram-tutor"),
        ("metric", "tutor_ratio", "bigram-tutor"),
        ("policy", "KeepMiddle", "bigram-tutor"),
        ("reader", "Bigrams", "bigram-tutor"),
    ]


@pytest.mark.parametrize(
    "text", ["os:mkdir('{}')", "Random(seed=os:mkdir('{}'))", "pathlib:Path.mkdir(pathlib:Path('{}'))"]
)
def test_text_out_of_a_file_imports_nothing_by_its_path(tmp_path: Path, text: str) -> None:
    folder = tmp_path / "made_by_a_file"
    (facts,) = metric_facts([Random()])
    (metric,) = of_file({**facts, "text": text.format(folder)}).values()
    assert type(metric).__name__ == "RecordedMetric"
    assert not folder.exists()


def test_a_file_does_not_take_one_packages_metric_for_anothers(install: Install) -> None:
    install()
    (facts,) = metric_facts([RewardPerNat()])
    assert of_file(facts) == {"reward_per_nat": RewardPerNat()}
    (other,) = of_file({**facts, "package": "somebody_elses"}).values()
    assert type(other).__name__ == "RecordedMetric"
