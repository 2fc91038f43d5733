"""Fisher information and Gram matrices of a running model, against autograd and sums by hand."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from gptailor.errors import UsageError
from gptailor.evaluation import statistics
from gptailor.evaluation.statistics import fisher_information, gram_matrices
from gptailor.evaluation.text import make_sequences, read_documents

SEQUENCES = ((1, 5, 9, 2, 8), (3,), (4, 4, 6, 7, 0, 11, 30))


class Bigram(nn.Module):
    """Two layers and five words: small enough to compute the exact expectation."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Embedding(5, 3)
        self.second = nn.Linear(3, 5)

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        del use_cache
        return SimpleNamespace(logits=self.second(torch.tanh(self.first(input_ids))))


def llama(tied: bool = True) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    model: nn.Module = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=tied,
            initializer_range=0.2, attention_bias=True,
        )
    )  # fmt: skip
    return model.eval()


def squares_of(model: nn.Module, tokens: tuple[int, ...], drawn: Any) -> dict[str, torch.Tensor]:
    """(∂ Σₜ log p(drawn) / ∂θ)² of one sequence."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    terms = (torch.log_softmax(logits[t], 0)[word] for t, word in enumerate(drawn))
    total = sum(terms, torch.zeros(()))
    gradients = torch.autograd.grad(total, parameters)
    return {n: g.detach() ** 2 for n, g in zip(names, gradients, strict=True)}


@pytest.mark.parametrize("tied", [True, False])
def test_fisher_is_the_mean_of_squared_gradients(tied: bool) -> None:
    model = llama(tied)
    parameters = dict(model.named_parameters())
    model.requires_grad_(False)
    found = fisher_information(model, SEQUENCES, parameters, seed=3)
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    model.requires_grad_(True)
    generator = torch.Generator().manual_seed(3)
    wanted = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for tokens in SEQUENCES:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
        p = logits.double().softmax(-1).numpy()
        u = torch.rand(len(tokens), 1, generator=generator).numpy()
        drawn = (np.cumsum(p, axis=1) <= u * p.sum(axis=1, keepdims=True)).sum(axis=1)
        for name, squares in squares_of(model, tokens, drawn).items():
            wanted[name] += squares / 13
    assert ("lm_head.weight" in found) != tied
    for name, value in wanted.items():
        assert value.any(), name
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-9)


def test_fisher_is_unbiased() -> None:
    """Against the definition: Σₜ E_y (∂ log p(y) / ∂θ)², each token alone, over all words."""
    model, tokens = Bigram(), (0, 3, 3, 1)
    names, parameters = zip(*model.named_parameters(), strict=True)
    exact = {n: torch.zeros_like(p) for n, p in zip(names, parameters, strict=True)}
    for t in range(len(tokens)):
        for word in range(5):
            log_p = model(torch.tensor([tokens]), False).logits[0, t].log_softmax(0)[word]
            gradients = torch.autograd.grad(log_p, parameters)
            for name, gradient in zip(names, gradients, strict=True):
                exact[name] += float(log_p.detach().exp()) * gradient**2 / len(tokens)
    draws = [fisher_information(model, (tokens,), dict(model.named_parameters()), seed)
             for seed in range(600)]  # fmt: skip
    for name, value in exact.items():
        each = torch.stack([draw[name] for draw in draws])
        error = 4.5 * each.std(dim=0) / 600**0.5 + 1e-7
        assert (abs(each.mean(dim=0) - value) <= error).all(), name
    same = fisher_information(model, (tokens,), dict(model.named_parameters()), 7)
    assert all(torch.equal(same[name], draws[7][name]) for name in names)


def test_fisher_refuses_numbers_that_are_not_finite() -> None:
    model = Bigram()
    with torch.no_grad():
        model.second.weight[2, 1] = float("inf")
    with pytest.raises(FloatingPointError, match="logits"):
        fisher_information(model, ((1, 2),), dict(model.named_parameters()))


def test_words_of_probability_zero_are_never_drawn() -> None:
    log_p = torch.tensor([[-torch.inf, 0.0, -torch.inf]]).repeat(2000, 1)
    drawn = statistics._drawn(log_p, torch.Generator().manual_seed(0))
    assert (drawn == 1).all()


@pytest.mark.parametrize("budget", [1, 2500, 1 << 30])
def test_gram_matrices_are_those_of_the_inputs(budget: int) -> None:
    model = llama()
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    seen: dict[str, list[np.ndarray[Any, Any]]] = {name: [] for name in linears}
    hooks = [
        module.register_forward_hook(lambda m, x, y, n=name: seen[n].append(x[0][0].numpy()))
        for name, module in linears.items()
    ]
    with torch.no_grad():
        for tokens in SEQUENCES:
            model(input_ids=torch.tensor([tokens]))
    for hook in hooks:
        hook.remove()
    runs = 0

    def count(*_: object) -> None:
        nonlocal runs
        runs += 1

    model.register_forward_pre_hook(count)
    found = dict(gram_matrices(model, SEQUENCES, linears, budget))
    assert list(found) == list(linears)
    for name, parts in seen.items():
        x = np.concatenate(parts).astype(np.float64)
        assert len(x) == 13
        np.testing.assert_allclose(found[name], x.T @ x / 13, rtol=1e-5, atol=1e-6)
    groups = {1: len(linears), 1 << 30: 1}.get(budget)
    assert runs == 3 * groups if groups else 3 < runs < 3 * len(linears)
    assert not any(module._forward_pre_hooks for module in linears.values())


def test_gram_matrices_refuse_numbers_that_are_not_finite() -> None:
    model = Bigram()
    with torch.no_grad():
        model.first.weight[2, 1] = float("nan")
    with pytest.raises(FloatingPointError, match="inputs of second"):
        list(gram_matrices(model, ((1, 2),), {"second": model.second}, 1 << 20))


def test_documents_become_sequences(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("one two three\r\n\n  \nfour\n five six seven eight", "utf-8")
    documents = read_documents(tmp_path / "t.txt")
    assert documents == ["one two three", "four", " five six seven eight"]
    lines = [json.dumps({"text": d, "id": 1}) for d in documents]
    (tmp_path / "t.jsonl").write_text("\n".join([*lines, ""]))
    assert read_documents(tmp_path / "t.jsonl") == documents

    def encode(text: str) -> list[int]:
        return [1, *map(len, text.split())]

    made = make_sequences(documents, encode, 100, 4)
    assert made.tokens == ((1, 3, 3, 5), (1, 4), (1, 4, 3, 5), (5,))
    assert made.num_tokens == 11
    short = make_sequences(documents, encode, 7, 4)
    assert short.tokens == ((1, 3, 3, 5), (1, 4), (1,))
    assert short.digest != made.digest
    with pytest.raises(UsageError, match="no tokens"):
        make_sequences([" "], lambda _: [], 10, 4)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.txt", None, "No such file"),
        ("t.txt", b"\xff\xfe", "not UTF-8"),
        ("t.txt", b" \n\n", "is empty"),
        ("t.jsonl", b'{"text": "a"}\n{"txet": "b"}\n', "line 2, is not a JSON object with a text"),
        ("t.jsonl", b"plain\n", "line 1"),
        ("t.jsonl", b"[" * 100_000, "line 1"),
    ],
)
def test_texts_that_are_refused(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read_documents(tmp_path / name)
