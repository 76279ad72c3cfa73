"""What a configuration says of a token: where its row comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import ConfigError, brief

_MODEL, _ZERO = "model_token", "zero"


@dataclass(frozen=True, kw_only=True)
class TokenRow:
    """The row of a token in models that lack it; with `force` in all of them.

    Attributes:
        model: as the recipe calls it; empty for a row of zeros.
        token: whose row it is there; None for the token's own.
        id: the number of the row there, in place of a token.
    """

    model: str = ""
    token: str | None = None
    id: int | None = None
    force: bool = False

    def plain(self) -> dict[str, Any]:
        """As a configuration has it."""
        source: Any = self.model or {"kind": _ZERO}
        if self.token is not None:
            source = {"kind": _MODEL, "model": self.model, "token": self.token}
        if self.id is not None:
            source = {"kind": _MODEL, "model": self.model, "token_id": self.id}
        return {"source": source, **({"force": True} if self.force else {})}


def token_rows(value: object, where: str) -> dict[str, TokenRow]:
    """By token, what a configuration says.

    Raises:
        ConfigError: naming what cannot be read.
    """
    if not isinstance(value, Mapping) or not all(isinstance(token, str) and token for token in value):
        raise ConfigError(where, expected="sources by token", found=brief(value))
    return {token: _row(said, f"{where}[{token!r}]") for token, said in value.items()}


def _row(said: object, where: str) -> TokenRow:
    fields = said if isinstance(said, Mapping) else {}
    if not fields.keys() <= {"source", "force"} or fields.get("source") is None:
        expected = "source: a model, {kind: zero} or {kind: model_token, model, token or token_id}, and force"
        raise ConfigError(where, expected=expected, found=brief(said))
    force = fields.get("force", False)
    if not isinstance(force, bool):
        raise ConfigError(f"{where}.force", expected="true or false", found=brief(force))
    source = fields["source"]
    if isinstance(source, str) and source:
        return TokenRow(model=source, force=force)
    if source == {"kind": _ZERO}:
        return TokenRow(force=force)
    if isinstance(source, Mapping) and source.get("kind") == _MODEL and isinstance(source.get("model"), str):
        token, id = source.get("token"), source.get("token_id")
        whole = source.keys() <= {"kind", "model", "token", "token_id"} and (token is None) != (id is None)
        if whole and isinstance(token, (str, type(None))) and (id is None or (type(id) is int and id >= 0)):
            return TokenRow(model=source["model"], token=token, id=id, force=force)
    expected = "a model, {kind: zero}, or {kind: model_token, model: ...} with one of token and token_id"
    raise ConfigError(f"{where}.source", expected=expected, found=brief(source))
