"""axolotl's way in: `plugins: [dare_train.integrations.axolotl.DarePlugin]`, and a `DareCallback`'s arguments
under `dare:`.
"""

from __future__ import annotations

from typing import Any, Optional

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, field_validator

from ..snapshots.callback import DareCallback
from .written_options import check


class DareArgs(BaseModel):
    """What axolotl's configuration gets besides its own keys."""

    dare: Optional[dict[str, Any]] = None
    """Arguments of `DareCallback`; its defaults where there are none."""

    @field_validator("dare")
    @classmethod
    def can_be_arguments(cls, given: dict[str, Any] | None) -> dict[str, Any] | None:
        """
        Raises:
            ConfigError: `DareCallback` would not take them; axolotl says so before it loads anything.
        """
        check(given or {})
        return given


class DarePlugin(BasePlugin):  # type: ignore[misc]
    """Adds a `DareCallback` to the Trainer that axolotl makes."""

    def get_input_args(self) -> str:
        return f"{__name__}.{DareArgs.__name__}"

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[Any]:
        return [DareCallback(**_plain(cfg.dare or {}))]


def _plain(value: Any) -> Any:
    """Without axolotl's kinds of mappings, whose missing keys are None."""
    return {key: _plain(part) for key, part in value.items()} if isinstance(value, dict) else value
