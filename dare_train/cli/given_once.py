"""Commands whose options that take one value are given once. Of several, the last would count without a word:
`--p 0.5 --p 0.9` would ask for 0.9 alone.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from typer.core import TyperCommand, TyperOption


class OnceCommand(TyperCommand):
    """One that refuses what is given twice."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        _, _, given = self.make_parser(ctx).parse_args(args=[*args])
        for option, times in Counter(given).items():
            several = not isinstance(option, TyperOption) or option.multiple or option.is_flag
            if times > 1 and not several:
                ctx.fail(f"{option.opts[0]}: expected once, found {times} times")
        return super().parse_args(ctx, args)
