"""Shared by the tests: a tiny family of real Llama models, and tasks of every kind.

The family is random but not arbitrary: the variants are small steps away from the base, like
finetunes, and the tokenizer is a real one.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("DISABLE_MULTIPROC", "1")  # lm-eval's bootstrap: its pool can wait forever
# Tests run side by side, one per core. With models this small, a second thread mostly waits.
os.environ.setdefault("OMP_NUM_THREADS", "1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # a shell ignores Ctrl-C for what it starts in the background, and programs inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)

TESTS = Path(__file__).parent
LONGEST_FIRST = ("execution", "search", "cluster", "verbs", "commands", "docs", "evaluation")
"""Folders whose files take longest: started first, so none is left running alone at the end."""

NUM_LAYERS = 6
WORDS = [f"w{i:02d}" for i in range(90)]


@pytest.hookimpl(trylast=True)  # after -m has made its choice
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts long files first, and before them tests marked with the minutes that they take.

    `make test` keeps a file in one process (`loadfile`). `make test-long` cuts the list into one
    piece per process (`worksteal`), so the longest tests are dealt out to the heads of the pieces.
    """
    order = {folder: number for number, folder in enumerate(LONGEST_FIRST)}

    def rank(item: pytest.Item) -> tuple[float, int]:
        mark = item.get_closest_marker("long")
        minutes = mark.kwargs.get("minutes", 0) if mark else 0
        return -minutes, order.get(item.path.relative_to(TESTS).parts[0], len(order))

    items.sort(key=rank)
    if all(item.get_closest_marker("long") for item in items):
        count = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
        items[:] = [item for first in range(count) for item in items[first::count]]


def save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    fast.save_pretrained(folder)


def save_llama(
    folder: Path, seed: int, like: Path | None = None, *, tied: bool = True, dtype: str = "bfloat16"
) -> Path:
    """A tiny Llama: random, or a small step away from the one in `like`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.15,
    )
    model = LlamaForCausalLM(config)
    if like is not None:
        start = LlamaForCausalLM.from_pretrained(like, dtype=torch.float32)
        with torch.no_grad():
            for parameter, step in zip(start.parameters(), model.parameters(), strict=True):
                parameter.add_(step, alpha=0.2 if step.ndim > 1 else 0.01)
        model = start
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def family_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders base, red, green, blue: six layers each, bfloat16, tied embeddings."""
    root = tmp_path_factory.mktemp("family")
    save_llama(root / "base", 0)
    for seed, name in enumerate(("red", "green", "blue"), start=1):
        save_llama(root / name, seed, like=root / "base")
    return root


@pytest.fixture(scope="session")
def models(family_dir: Path) -> dict[str, str]:
    return {name: str(family_dir / name) for name in ("base", "red", "green", "blue")}


_TASKS = {
    "t_lambada": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{ctx}}",
        "doc_to_target": " {{last}}",
        "metric_list": [
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        ],
    },
    "t_shared": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{ctx}}",
        "doc_to_choice": "{{options}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "t_long": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{ctx}}",
        "doc_to_choice": "{{endings}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
            {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
        ],
    },
    "t_differing": {
        # like winogrande: one context for each choice, one continuation for all
        "output_type": "multiple_choice",
        "doc_to_text": "{{gold}}",
        "doc_to_choice": "{{contexts}}",
        "doc_to_target": "{{' ' + ending}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "t_rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{page}}",
        "metric_list": [
            {
                "metric": "word_perplexity",
                "aggregation": "weighted_perplexity",
                "higher_is_better": False,
            }
        ],
    },
    "t_generate": {
        "output_type": "generate_until",
        "doc_to_text": "{{ctx}}",
        "doc_to_target": "{{last}}",
        "generation_kwargs": {"until": [" w05"], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}


def write_tasks(root: Path, num_documents: int = 24) -> Path:
    """A folder of local lm-eval tasks, one of each output type."""
    import random

    rng = random.Random(7)

    def words(n: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(n))

    rows = [
        {
            "ctx": words(rng.randint(3, 12)),
            "last": rng.choice(WORDS),
            "options": [rng.choice(WORDS) for _ in range(4)],
            "endings": [words(rng.randint(1, 5)) for _ in range(3)],
            "contexts": [words(rng.randint(3, 9)) for _ in range(2)],
            "ending": words(rng.randint(2, 4)),
            "gold": rng.randint(0, 1),
            "page": words(rng.randint(20, 150)),
        }
        for _ in range(num_documents)
    ]
    root.mkdir(parents=True, exist_ok=True)
    (root / "data.json").write_text(json.dumps(rows))
    (root / "load.py").write_text(
        "import json, pathlib\nimport datasets\n\n"
        "def rows(**_):\n"
        "    text = (pathlib.Path(__file__).parent / 'data.json').read_text()\n"
        "    return {'test': datasets.Dataset.from_list(json.loads(text))}\n"
    )
    for name, task in _TASKS.items():
        lines = [f"task: {name}", "custom_dataset: !function load.rows", "test_split: test"]
        lines += ["fewshot_split: test", "fewshot_config: {sampler: first_n}"]
        (root / f"{name}.yaml").write_text("\n".join(lines) + "\n" + _yaml(task))
    (root / "t_group.yaml").write_text(
        "group: t_group\ntask: [t_shared, t_long]\n"
        "aggregate_metric_list: [{metric: acc, aggregation: mean, weight_by_size: true}]\n"
    )
    return root


def _yaml(data: object) -> str:
    import yaml

    return yaml.safe_dump(data, sort_keys=False)


@pytest.fixture(scope="session")
def tasks_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))
