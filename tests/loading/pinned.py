"""An accelerator for machines that have none."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from torchwq.loading import internals


class Pinned:
    """Stands for an accelerator: marks what was pinned."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
        monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
        monkeypatch.setattr(torch.accelerator, "set_device_index", lambda index: None)
        monkeypatch.setattr(internals, "pin_memory", self.pin)

    def pin(self, data: Any, device: Any) -> Any:
        self.count += 1
        assert device == "cuda"
        return data.clone() if isinstance(data, torch.Tensor) else data
