"""RegMean by LAPACK: it agrees with the float64 reference, and outputs stay near the sources'."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptailor.merging import reference
from gptailor.merging.regmean import regmean


def drawn(seed: int, num_sources: int, n_outputs: int, n_inputs: int) -> tuple[torch.Tensor, ...]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((num_sources, n_outputs, n_inputs))
    scales = np.exp(2 * rng.standard_normal(n_inputs))  # inputs differ: some are huge
    inputs = scales * (rng.standard_normal((num_sources, 3 * n_inputs, n_inputs)) + 0.5)
    gram = inputs.swapaxes(1, 2) @ inputs / inputs.shape[1]
    return torch.tensor(x).float(), torch.tensor(gram).float(), torch.tensor(inputs)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 5),
    st.integers(1, 7),
    st.integers(1, 9),
    st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    st.booleans(),
)
def test_it_equals_the_reference(
    seed: int, num_sources: int, n_outputs: int, n_inputs: int, ratio: float, has_dead: bool
) -> None:
    x, gram, _ = drawn(seed, num_sources, n_outputs, n_inputs)
    if has_dead:
        gram[:, 0] = gram[:, :, 0] = 0
    weights = np.random.default_rng(seed).uniform(0.1, 2, num_sources).tolist()
    before = [t.clone() for t in (x, gram)]
    found = regmean(list(x), list(gram), weights, ratio)
    assert all(map(torch.equal, before, (x, gram)))
    wanted = reference.merge(
        "regmean", x.numpy(), statistics=gram.numpy(), weights=weights,
        parameters={"reduce_non_diagonal_ratio": ratio},
    )  # fmt: skip
    np.testing.assert_allclose(found, wanted, rtol=1e-7, atol=1e-7)


def test_its_outputs_are_nearer_to_the_sources_than_those_of_the_average() -> None:
    x, gram, inputs = drawn(5, 3, 20, 12)

    def error(y: torch.Tensor) -> float:
        return sum(
            float(((i @ (w.double() - y).T) ** 2).sum()) for w, i in zip(x, inputs, strict=True)
        )

    average = error(x.double().mean(dim=0))
    errors = [error(regmean(list(x), list(gram), [1, 1, 1], r)) for r in (1.0, 0.9, 0.5, 0.0)]
    assert errors == sorted(errors)
    assert errors[-1] < average
    rng = torch.Generator().manual_seed(0)
    best = regmean(list(x), list(gram), [1, 1, 1], 1.0)
    for _ in range(20):  # at a minimum, every step away is worse
        step = 1e-3 * torch.randn(best.shape, generator=rng, dtype=torch.float64)
        assert error(best + step) > errors[0]


def test_too_little_data_is_refused() -> None:
    rng = np.random.default_rng(3)
    inputs = rng.standard_normal((2, 3, 8)).astype(np.float32)  # 2 × 3 tokens for 8 inputs
    gram = torch.tensor(inputs.swapaxes(1, 2) @ inputs)
    x = torch.randn(2, 4, 8)
    with pytest.raises(ValueError, match="use more calibration data"):
        regmean(list(x), list(gram), [1, 1], 1.0)
    assert torch.isfinite(regmean(list(x), list(gram), [1, 1], 0.9)).all()
