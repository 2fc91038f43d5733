"""A group is scored by what it aggregates, a tag by a metric that all of its tasks have."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from gptailor.config import EvaluationConfig
from gptailor.errors import TaskError, UsageError
from gptailor.evaluation.evaluator import Evaluator
from gptailor.evaluation.metrics import choose_key, common_keys, declared_keys, group_keys
from gptailor.evaluation.workload import Workload
from gptailor.models.family import Family
from gptailor.recipe import Recipe, Take
from tests.evaluation.own_tasks import ACC, CHOICE, GENERATE, rows, write_group, write_task
from tests.evaluation.test_equals_lm_eval import lm_eval_results

F1 = {**ACC, "metric": "f1", "aggregation": "f1"}
STRICT = {"name": "strict-match", "filter": [{"function": "regex", "regex_pattern": "w0(.)"}]}
LOOSE = {"name": "flexible-extract", "filter": [{"function": "take_first"}]}
FILTERED = {**GENERATE, "filter_list": [STRICT, LOOSE]}
RULE = {"metric": "acc", "weight_by_size": True}

UNFIT = ["generated_4", "generated_5"]
GROUPS: dict[str, tuple[list[str], list[dict[str, Any]], str]] = {
    # name: (tasks, rules, the expected key or part of the error)
    "as_leaves": (["both", "both_2"], [RULE], "acc,none"),
    "another": (["both", "both_2"], [{**RULE, "metric": "acc_norm"}], "acc_norm,none"),  # zhoblimp
    "second": (["f1_first", "f1_first_2"], [RULE], "acc,none"),  # masakhanews
    "partly": (["both_3", "generated_3"], [RULE], "acc,none"),  # evalita-mp: one has none
    "filtered": (
        ["generated", "generated_2"],
        [{"metric": "exact_match", "filter_list": ["flexible-extract"]}],
        "exact_match,flexible-extract",  # bbh_zeroshot
    ),
    "any_filter": (
        ["generated", "generated_2"],
        [{"metric": "exact_match"}],
        "exact_match,flexible-extract",
    ),
    "two_rules": (["both"], [{**RULE, "metric": "acc_norm"}, RULE], "acc_norm,none"),
    "unfit": (UNFIT, [RULE], "exact_match,strict-match"),  # mmlu_flan_cot_zeroshot
    "bare": (["both", "f1_first"], [], "acc,none"),
    "nested": (["another", "as_leaves_2"], [RULE], "acc,none"),
    "no_common": (["both", "generated"], [], "has no metric that is a number in all of its tasks"),
    "unfit_mixed": (
        ["f1_only", "generated"],
        [RULE],
        "has no metric that is a number in all of its tasks",
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("groups")
    for end, count in (("", 5), ("_2", 8), ("_3", 4), ("_4", 3), ("_5", 6)):
        write_task(root, f"both{end}", rows(count), **CHOICE)
        write_task(root, f"f1_first{end}", rows(count), **{**CHOICE, "metric_list": [F1, ACC]})
        write_task(root, f"f1_only{end}", rows(count), **{**CHOICE, "metric_list": [F1]})
        write_task(root, f"generated{end}", rows(count), **FILTERED)
    for name, (tasks, rules, _) in GROUPS.items():
        write_group(root, name, tasks, *rules)
    write_group(root, "as_leaves_2", ["both_3", "both_4"], RULE)
    return root


def workload(folder: Path, *specs: Any) -> Workload:
    config = EvaluationConfig.model_validate({"tasks": list(specs), "include_path": str(folder)})
    return Workload(config.tasks, config, None)


@pytest.mark.parametrize("name", GROUPS)
def test_the_metric_that_is_meant(folder: Path, name: str) -> None:
    expected = GROUPS[name][2]
    if "," in expected:
        assert workload(folder, name)._metrics == {name: expected}
    else:
        with pytest.raises(UsageError, match=expected):
            workload(folder, name)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"task": "another", "metric": "acc"}, "unknown metric 'acc' .* Known: acc_norm"),
        ({"task": "filtered", "metric": "exact_match,strict-match"}, "Known: exact_match,flexible"),
        ({"task": "partly", "metric": "exact_match"}, "Known: acc"),
        ({"task": "unfit", "metric": "acc"}, "Known: exact_match"),
    ],
)
def test_metrics_that_a_group_does_not_give(folder: Path, spec: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        workload(folder, spec)


def test_scores_of_groups_equal_lm_eval(models: dict[str, str], folder: Path) -> None:
    names = ("another", "second", "filtered", "partly", "unfit")
    config = EvaluationConfig.model_validate(
        {"tasks": names, "include_path": str(folder), "dtype": "float32", "device": "cpu"}
    )
    family = Family({"red": models["red"]}, "red")
    layers = tuple(Take("red", i) for i in range(family.num_layers))
    evaluator = Evaluator(family, config)
    outcome = evaluator.evaluate(Recipe(family.refs, "red", layers, "red", "red", "float32"))
    assert outcome.status == "ok", outcome.reason
    theirs = lm_eval_results(Path(models["red"]), folder, names, "float32", 8)["results"]
    for score in outcome.scores[:4]:
        metric, _, name = score.metric.partition(",")
        assert score.value == pytest.approx(theirs[score.task][score.metric])
        assert score.stderr == pytest.approx(theirs[score.task][f"{metric}_stderr,{name}"])
        assert score.num_documents == theirs[score.task]["sample_len"]
    unfit = outcome.scores[4]  # lm-eval gives this group no score: each document counts equally
    assert not [key for key in theirs.get("unfit", {}) if "exact_match" in key]
    parts = [(theirs[name][unfit.metric], theirs[name]["sample_len"]) for name in UNFIT]
    total = sum(size for _, size in parts)
    assert unfit.value == pytest.approx(sum(value * size for value, size in parts) / total)
    assert unfit.num_documents == total
    everything = {(s.task, s.metric): s for s in evaluator.all_scores()}
    for name, metrics in theirs.items():
        for key, value in metrics.items():
            if "," in key and "_stderr" not in key:
                assert everything.pop((name, key)).value == pytest.approx(value), (name, key)
    assert {task for task, _ in everything} == {"unfit"}


def test_a_metric_that_the_task_promises_but_does_not_give(folder: Path, tmp_path: Path) -> None:
    promised = {**ACC, "metric": "brier"}
    write_task(
        tmp_path,
        "own",
        rows(),
        "def judge(doc, results):\n    return {'extra': 1.0, 'acc': 0.5, 'table': {}}\n",
        **{**CHOICE, "metric_list": [promised, ACC, {**ACC, "metric": "table"}]},
        process_results="!judge",
    )
    assert workload(tmp_path, "own")._metrics == {"own": "acc,none"}
    assert workload(tmp_path, {"task": "own", "metric": "extra"})._metrics == {"own": "extra,none"}
    for missing in ("brier", "table"):
        with pytest.raises(UsageError, match=rf"unknown metric '{missing}' .* Known: acc, extra"):
            workload(tmp_path, {"task": "own", "metric": missing})


def test_a_metric_that_only_some_documents_have(tmp_path: Path) -> None:
    write_task(
        tmp_path,
        "own",
        rows(6),
        "def judge(doc, results):\n"
        "    return {'acc': 1.0} | ({'rare': 0.5} if doc['q'].startswith('w04') else {})\n",
        **{**CHOICE, "metric_list": [{**ACC, "metric": "rare"}, ACC]},
        process_results="!judge",
    )
    assert workload(tmp_path, "own")._metrics == {"own": "rare,none"}


@pytest.mark.parametrize(
    ("code", "config", "words"),
    [
        (
            "def judge(doc, results):\n    return {'acc': doc['nothing']}\n",
            {"process_results": "!judge"},
            r"The task own can't judge an answer: KeyError: 'nothing' \(.*own_code.py, line 8\)",
        ),
        (
            "def judge(doc, results):\n    import nosuchmodule\n",
            {"process_results": "!judge"},
            r"can't judge an answer: No module named 'nosuchmodule'",
        ),
        (
            "def text(doc):\n    return {'w00': ''}[doc['q'][:3]]\n",
            {"doc_to_text": "!text"},
            r"The task own can't make its requests: KeyError: 'w01' \(.*own_code.py, line 8\)",
        ),
    ],
)
def test_code_of_a_task_that_fails(
    tmp_path: Path, code: str, config: dict[str, str], words: str
) -> None:
    write_task(tmp_path, "own", rows(6), code, **{**CHOICE, **config})
    with pytest.raises(TaskError, match=words):
        workload(tmp_path, "own")


# Groups that come with lm-eval


class Leaf:
    """A task from a YAML file with what its metric keys depend on; its data are not loaded."""

    def __init__(self, name: str, config: Mapping[str, Any]) -> None:
        from lm_eval.api.registry import DEFAULT_METRIC_REGISTRY

        self.task_name = name
        self._config = config
        listed = config.get("metric_list")
        default = DEFAULT_METRIC_REGISTRY.get(config.get("output_type"), [])
        self._metrics = default if listed is None else [entry["metric"] for entry in listed]

    def dump_config(self) -> dict[str, Any]:
        return dict(self._config)

    def aggregation(self) -> dict[str, None]:
        return dict.fromkeys(self._metrics)


class Scan:
    """lm-eval's own groups and the YAML files of their tasks."""

    def __init__(self) -> None:
        from lm_eval.tasks import TaskManager

        self.index = TaskManager().task_index
        self._configs: dict[str, dict[str, Any]] = {}

    def config(self, name: str) -> dict[str, Any]:
        from lm_eval.tasks._yaml_loader import load_yaml

        entry = self.index[name]
        if name not in self._configs:
            path = entry.yaml_path
            found = load_yaml(path, resolve_func=False, recursive=True) if path else entry.cfg
            self._configs[name] = dict(found or {})
        return self._configs[name]

    def leaves(self, item: Any, given: Mapping[str, Any]) -> Iterator[Leaf]:
        """The tasks of a member of a group, with the settings of the groups around it."""
        own = {k: v for k, v in item.items() if k != "group"} if isinstance(item, dict) else {}
        name = item if isinstance(item, str) else item.get("group") or item["task"]
        entry = self.index.get(name)
        if entry is None:  # defined inside its group
            members = item.get("task") if "group" in item else None
            if members is None:
                yield Leaf(name, {**given, **own})
            for member in members or ():
                yield from self.leaves(member, given)
        elif entry.kind.name == "GROUP":
            yield from self.members(name, {**given, **own})
        else:
            for task in sorted(entry.tags) if entry.kind.name == "TAG" else [name]:
                yield Leaf(task, {**self.config(task), **given, **own})

    def members(self, name: str, given: Mapping[str, Any]) -> Iterator[Leaf]:
        config = self.config(name)
        about = ("group", "group_alias", "task", "aggregate_metric_list", "metadata")
        own = {key: value for key, value in config.items() if key not in about}
        tasks = config.get("task") or []
        for member in [tasks] if isinstance(tasks, str) else tasks:
            yield from self.leaves(member, {**own, **given})


UNFIT_GROUPS = {
    "adr", "african_flores", "african_ntrex", "afrimgsm-irokobench", "afrimgsm_cot-irokobench",
    "afrimgsm_tt-irokobench", "afrimgsm_tt_cot-irokobench", "afriqa", "afrobench",
    "evalita-mp_gen", "humaneval_infilling", "mafand", "masakhaner", "mmlu_flan_cot_zeroshot",
    "mmlu_flan_n_shot_generative", "salt", "xlum",
}  # fmt: skip
"""Groups of lm-eval 0.4.13 that aggregate a metric none of their tasks has: they have no score."""


@pytest.mark.slow
def test_every_group_of_lm_eval_has_a_metric_that_lm_eval_gives_it() -> None:
    """For 37 of the 820 groups that aggregate, it is not the first metric of their first task."""
    from lm_eval.config.group import GroupConfig

    logging.disable(logging.CRITICAL)
    try:
        scan = Scan()
    finally:
        logging.disable(logging.NOTSET)
    others, unfit = set(), set()
    for name, entry in scan.index.items():
        if entry.kind.name != "GROUP" or not scan.config(name).get("aggregate_metric_list"):
            continue
        rules = scan.config(name)["aggregate_metric_list"]
        group = GroupConfig(group=name, aggregate_metric_list=rules)
        leaves = list(scan.members(name, {}))
        group.get_all_tasks = lambda leaves=leaves: leaves
        keys = {leaf.task_name: declared_keys(leaf) for leaf in leaves}
        given = group_keys(group, keys)
        common = common_keys(list(keys.values()))
        if not given:
            unfit.add(name)
        elif choose_key(name, None, given) not in common[:1]:
            others.add(name)
    assert unfit == UNFIT_GROUPS
    assert {"metabench", "agieval_nous", "bbh_zeroshot", "leaderboard", "masakhanews"} <= others
    assert len(others) == 20
