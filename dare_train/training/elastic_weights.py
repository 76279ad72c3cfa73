"""What mattered to earlier tasks, held in place while another is learnt (Kirkpatrick et al.,
https://arxiv.org/abs/1612.00796, eq. 3).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import TrainerCallback


class ElasticWeights(TrainerCallback):  # type: ignore[misc]
    """Adds the gradient of λ/2 · Σ F (θ - θ*)² before each step.

    Args:
        importance: F and θ* by parameter.
        strength: λ.
    """

    def __init__(self, importance: Mapping[str, tuple[torch.Tensor, torch.Tensor]], strength: float) -> None:
        self._importance = importance
        self._strength = strength

    @torch.no_grad()
    def on_pre_optimizer_step(self, *_: Any, model: Any = None, **__: Any) -> None:
        for name, parameter in model.named_parameters():
            if parameter.grad is not None and name in self._importance:
                fisher, anchor = (tensor.to(parameter.device) for tensor in self._importance[name])
                parameter.grad.add_(
                    (fisher * (parameter - anchor)).to(parameter.grad.dtype), alpha=self._strength
                )
