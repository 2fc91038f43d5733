"""A text as a task: lm-eval's own rolling log-likelihood of the documents of a file."""

from __future__ import annotations

from typing import Any

from gptailor.evaluation.text import read_documents


def text_task(name: str, path: str) -> Any:
    """lm-eval's task with the metrics word_perplexity, byte_perplexity and bits_per_byte.

    The documents stay in memory: datasets' cache is not used.

    Args:
        name: the task's.
        path: a file as for `read_documents`.

    Raises:
        UsageError: as for `read_documents`.
    """
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    documents = Dataset.from_dict({"text": read_documents(path)})
    return ConfigurableTask(
        config={
            "task": name,
            "custom_dataset": lambda **_: {"test": documents},
            "test_split": "test",
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "text",  # the column itself: a template would change some documents
        }
    )
