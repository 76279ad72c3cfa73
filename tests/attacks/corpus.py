"""What was found to do harm, made by code; each must be taken rightly, or refused."""

from __future__ import annotations

from judging import Input

CORPUS: dict[str, tuple[Input, ...]] = {}
