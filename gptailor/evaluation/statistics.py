"""Statistics of a transformers model on sequences: Fisher information, Gram matrices of inputs.

Shapes: T tokens of one sequence, V words of the vocabulary, I inputs of a linear layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

Tokens = Sequence[Sequence[int]]


def fisher_information(
    model: nn.Module, sequences: Tokens, parameters: Mapping[str, nn.Parameter], seed: int = 0
) -> dict[str, torch.Tensor]:
    """The diagonal of the Fisher information per token.

    F = E[(∂ log p(y | x) / ∂θ)²] with y drawn from the model itself (Matena and Raffel 2021, eq. 3,
    arXiv 2111.09832), not the text's next token, which would give a different quantity (Kunstner et
    al. 2019, arXiv 1905.12558). For each sequence, one word is drawn after each of its tokens;
    given the sequence, these draws are independent and their gradients have mean zero, so the
    square of the gradient of Σₜ log p(yₜ) is an unbiased estimate of Σₜ Fₜ with one backward pass.

    Args:
        model: returns logits; it is not changed.
        sequences: token ids.
        parameters: name → a parameter of the model.
        seed: for the draws, which do not depend on the device.

    Returns:
        Name → F, float32, on the parameter's device.

    Raises:
        FloatingPointError: logits or gradients are not finite.
    """
    device = next(iter(parameters.values())).device
    generator = torch.Generator().manual_seed(seed)
    sums = {n: torch.zeros_like(p, dtype=torch.float32) for n, p in parameters.items()}
    by_id = {id(p): sums[n] for n, p in parameters.items()}

    def add(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        gradient = parameter.grad.float()
        by_id[id(parameter)].addcmul_(gradient, gradient)
        parameter.grad = None  # so that only one gradient is in memory at a time

    hooks = []
    needed = {p: p.requires_grad for p in model.parameters()}
    wanted = set(map(id, parameters.values()))
    for parameter in needed:
        parameter.requires_grad_(id(parameter) in wanted)
    for parameter in parameters.values():
        hook = parameter.register_post_accumulate_grad_hook(add)  # type: ignore[no-untyped-call]
        hooks.append(hook)
    try:
        for tokens in sequences:
            ids_1T = torch.tensor([list(tokens)], device=device)
            with torch.enable_grad():
                logits_TV = model(input_ids=ids_1T, use_cache=False).logits[0].float()
                log_p_TV = logits_TV.log_softmax(-1)
                drawn_T1 = _drawn(log_p_TV.detach(), generator)
                total = log_p_TV.gather(1, drawn_T1).sum()
            if not torch.isfinite(total):
                raise FloatingPointError("its logits are not finite numbers")
            total.backward()
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, before in needed.items():
            parameter.requires_grad_(before)
    num_tokens = sum(map(len, sequences))
    for name, squares in sums.items():
        if not torch.isfinite(squares).all():
            raise FloatingPointError(f"the squared gradients of {name} are not finite numbers")
        squares.div_(num_tokens)
    return sums


def _drawn(log_p_TV: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A word for each token, shape (T, 1)."""
    cumulative_TV = log_p_TV.exp().cumsum(-1)
    u_T1 = torch.rand(len(log_p_TV), 1, generator=generator).to(log_p_TV.device)
    drawn_T1 = torch.searchsorted(cumulative_TV, u_T1 * cumulative_TV[:, -1:], right=True)
    return drawn_T1.clamp(max=log_p_TV.shape[1] - 1)


def gram_matrices(
    model: nn.Module, sequences: Tokens, linears: Mapping[str, nn.Linear], budget_bytes: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """X Xᵀ / tokens of the inputs X of linear layers, one layer after another.

    The model runs over all sequences once for each group of layers whose matrices fit the budget.

    Args:
        model: the model.
        sequences: token ids.
        linears: name → a layer of the model.
        budget_bytes: for the matrices in memory at a time; there is always at least one.

    Yields:
        The name and the matrix (I, I), float32.

    Raises:
        FloatingPointError: inputs are not finite.
    """
    num_tokens = sum(map(len, sequences))
    for group in _groups(linears, budget_bytes):
        sums = _gram_sums(model, sequences, group)
        while sums:
            name = next(iter(sums))
            gram_II = sums.pop(name)
            if not torch.isfinite(gram_II).all():
                raise FloatingPointError(f"the inputs of {name} are not finite numbers")
            yield name, gram_II / num_tokens


def _groups(linears: Mapping[str, nn.Linear], budget_bytes: int) -> Iterator[dict[str, nn.Linear]]:
    group: dict[str, nn.Linear] = {}
    left = budget_bytes
    for name, linear in linears.items():
        n_bytes = 4 * linear.in_features**2
        if group and n_bytes > left:
            yield group
            group, left = {}, budget_bytes
        group[name] = linear
        left -= n_bytes
    yield group


def _gram_sums(
    model: nn.Module, sequences: Tokens, linears: Mapping[str, nn.Linear]
) -> dict[str, torch.Tensor]:
    device = next(model.parameters()).device
    sums = {n: torch.zeros(m.in_features, m.in_features, device=device) for n, m in linears.items()}

    def add_to(gram_II: torch.Tensor) -> Any:
        def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs = args[0] if args else kwargs["input"]
            x_TI = inputs.detach().reshape(-1, gram_II.shape[0]).float()
            gram_II.addmm_(x_TI.T, x_TI)

        return add

    hooks = [
        module.register_forward_pre_hook(add_to(sums[name]), with_kwargs=True)
        for name, module in linears.items()
    ]
    try:
        with torch.inference_mode():
            for tokens in sequences:
                model(input_ids=torch.tensor([list(tokens)], device=device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return sums
