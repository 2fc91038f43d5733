"""Tasks that can't be loaded: errors name what is missing, and the network only if it is needed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gptailor.config import TaskSpec
from gptailor.errors import UsageError
from gptailor.evaluation.surroundings import quiet
from gptailor.evaluation.task_errors import not_loaded
from gptailor.evaluation.tasks import broken_file, load_tasks
from tests.evaluation.own_tasks import CHOICE, rows, write_task

HEAD = "output_type: multiple_choice\ndoc_to_text: a\ndoc_to_choice: [a, b]\ndoc_to_target: 0\n"
SPLIT = "test_split: test\n"
JSON = "dataset_path: json\ndataset_kwargs: {data_files: {test: '%s'}}\n"

FILES = [
    (JSON % "{here}/nothere.json" + SPLIT, "Unable to find '{here}/nothere.json'. Put the data"),
    (JSON % "nothere.json" + SPLIT, "Unable to find '{cwd}/nothere.json'. Put the data"),
    (JSON % "{here}/no*.json" + SPLIT, "no file matches its data_files"),
    ("dataset_path: {here}/nofolder\n" + SPLIT, "any data file at {here}/nofolder. Put the data"),
    ("dataset_path: ./nofolder\n" + SPLIT, "./nofolder does not exist. Put the data there, or"),
    (JSON % "{here}/broken.json" + SPLIT, "its data can't be read: "),
    (JSON % "{here}/good.json" + "test_split: tset\n", "its data have no split 'tset'"),
    ("custom_dataset: !function own.opens\n" + SPLIT, "No such file or directory: '{here}/gone'"),
    ("custom_dataset: !function own.fails\n" + SPLIT, "KeyError: 'boom' ({here}/own.py, line 7)"),
    ("custom_dataset: !function own.imports\n" + SPLIT, "No module named 'nosuchmodule'"),
    ("custom_dataset: !function own.nothing\n" + SPLIT, "has no attribute 'nothing'"),
    (JSON % "{here}/good.json" + SPLIT + "doc_to_txt: a\n", "argument 'doc_to_txt'"),
    (
        JSON % "{here}/good.json" + SPLIT + "metric_list: [{metric: accc}]\n",
        "lm-eval has no metric 'accc'. Correct the task's metric_list",
    ),
]
OF_THE_NETWORK = [
    ("dataset_path: nobody/no-such-data\n" + SPLIT, "Couldn't reach 'nobody/no-such-data'"),
    (JSON % "hf://datasets/nobody/x/x.json" + SPLIT, "Cannot reach https://huggingface.co/"),
    (JSON % "https://nowhere.invalid/x.json" + SPLIT, "find 'https://nowhere.invalid/x.json'"),
]
CODE = """import pathlib

def opens(**_):
    return (pathlib.Path(__file__).parent / "gone").read_text()

def fails(**_):
    return {}["boom"]

def imports(**_):
    import nosuchmodule
"""


@pytest.fixture
def cached_elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keeps what these tests load out of the user's cache."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def why_not(folder: Path, text: str, name: str = "own") -> str:
    folder.mkdir()
    (folder / "own.py").write_text(CODE)
    (folder / "good.json").write_text('[{"a": "x"}]')
    (folder / "broken.json").write_text('[{"a": "x"')
    (folder / f"{name}.yaml").write_text(
        f"task: {name}\n{HEAD}{text.replace('{here}', str(folder))}"
    )
    with quiet(), pytest.raises(UsageError) as caught:
        load_tasks([TaskSpec(task=name)], str(folder))
    message = str(caught.value)
    assert message.startswith(f"The task {name} can't be loaded: ")
    return message.replace(str(folder), "{here}").replace(str(Path.cwd()), "{cwd}")


@pytest.mark.usefixtures("cached_elsewhere")
@pytest.mark.parametrize(("text", "words"), FILES)
def test_what_is_missing_locally_is_not_blamed_on_the_network(
    tmp_path: Path, text: str, words: str
) -> None:
    message = why_not(tmp_path / "tasks", text)
    assert words in message
    assert "network" not in message


@pytest.mark.usefixtures("cached_elsewhere")
@pytest.mark.parametrize(("text", "words"), OF_THE_NETWORK)
def test_data_that_only_the_network_has(tmp_path: Path, text: str, words: str) -> None:
    message = why_not(tmp_path / "tasks", text)
    assert words in message
    assert os.environ["HF_HUB_OFFLINE"]
    assert (
        "It is not in the cache, and HF_HUB_OFFLINE is set: fetch it with `gptailor pref" in message
    )


def test_a_name_that_the_hub_does_not_know() -> None:
    from datasets.exceptions import DatasetNotFoundError

    error = DatasetNotFoundError(
        "Dataset 'nobody/x' doesn't exist on the Hub or cannot be accessed."
    )
    message = str(not_loaded("own", error))
    assert (
        "doesn't exist on the Hub or cannot be accessed. Correct the task's dataset_path" in message
    )
    assert "network" not in message


def test_a_file_that_is_not_a_task_is_named(tmp_path: Path) -> None:
    write_task(tmp_path, "good", rows(), **CHOICE)
    assert broken_file(str(tmp_path)) is None
    (tmp_path / "own.yaml").write_text("task: own\n  broken: [\n")
    message = str(broken_file(str(tmp_path)))
    assert message.startswith(f"{tmp_path}/own.yaml can't be read: mapping values are not allowed")


def test_tasks_that_ask_for_more_than_text(tmp_path: Path) -> None:
    write_task(tmp_path, "seen", rows(), **CHOICE, doc_to_image="{{q}}")
    write_task(tmp_path, "run", rows(), **CHOICE, unsafe_code=True)
    for name, words in (("seen", "uses images"), ("run", "runs code that a model wrote")):
        with quiet(), pytest.raises(UsageError, match=words):
            load_tasks([TaskSpec(task=name)], str(tmp_path))
