"""PyTorch 2.1, which AUTOMATIC1111's WebUI brings: its rules that newer versions have dropped, played on the one installed.

``python -m pytest tests/test_old_torch.py tests/test_job.py`` in an environment with torch 2.1 itself tries the rest.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from realera_nodes.core.alignment import AlignmentConfig
from tests.tiny import tiny_backend

REAL = torch.autocast


class OldAutocast(REAL):
    """On a CPU bfloat16 alone, and the type is set, and refused, even where it is switched off."""

    def __init__(self, device_type: str, dtype: torch.dtype | None = None, enabled: bool = True, **more: Any):
        super().__init__(device_type, dtype, enabled and dtype in (None, torch.bfloat16), **more)
        self.asked = (device_type, dtype)

    def __enter__(self) -> Any:
        device, dtype = self.asked
        if device == "cpu" and dtype not in (None, torch.bfloat16):
            raise RuntimeError("Currently, AutocastCPU only support Bfloat16 as the autocast_cpu_dtype")
        return super().__enter__()


@pytest.fixture
def old(monkeypatch: pytest.MonkeyPatch) -> None:
    if tuple(int(n) for n in torch.__version__.split(".")[:2]) > (2, 1):
        monkeypatch.setattr(torch, "autocast", OldAutocast)


def test_the_rule_bites(old: None) -> None:
    with pytest.raises(RuntimeError, match="only support Bfloat16"), torch.autocast("cpu", dtype=torch.float32, enabled=False):
        pass


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_training_on_a_cpu_works(old: None, kind: str) -> None:
    backend = tiny_backend(kind)
    text = backend.encode(["a cat"])
    with backend.training({}, AlignmentConfig(rank=2, alpha=1.0)) as student:
        noise = student.predict_noise(backend.noise([0]), torch.tensor([500]), text)
        with student.teacher(), torch.no_grad():
            before = student.predict_noise(backend.noise([0]), torch.tensor([500]), text)
        assert torch.allclose(noise, before, atol=1e-5)  # a LoRA begins with zeros
        noise.square().mean().backward()
        assert any(p.grad is not None and bool(p.grad.any()) for p in student.parameters())
