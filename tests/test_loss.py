"""What tuning makes small, against torch's own functions (whole steps: test_tune.py)."""

import pytest
import torch

from dynq import loss


@pytest.mark.parametrize("cached", [1, 700, 1 << 18])
def test_divergence_row_by_row(cached: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rows are taken at once, it is torch's own divergence in float64 and its gradient."""
    monkeypatch.setattr(loss, "CACHED", cached)
    wanted, logits = 3 * torch.randn(2, 2, 5, 300, generator=torch.Generator().manual_seed(0))
    exact = logits.double().requires_grad_()
    p, q = torch.log_softmax(wanted.double(), -1), torch.log_softmax(exact, -1)
    expected = (p.exp() * (p - q)).sum()
    expected.backward()
    found, slope = loss.divergence(wanted, logits)
    assert found == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(slope.double(), exact.grad, rtol=1e-4, atol=1e-7)
