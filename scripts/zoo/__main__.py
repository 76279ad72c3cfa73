"""The command line: tries architectures, one record each, and writes the table."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from .catalogue import MOST_USED, Architecture, architectures
from .records import read, write
from .table import summary, table
from .trial import tried

SHOWN = ("wrong", "refused")


def main() -> None:
    options = parser().parse_args()
    logging.disable(logging.WARNING)
    number, count = options.shard
    known = architectures()
    if unknown := {*options.only} - {one.name for one in known}:
        parser().error(f"--only: expected classes of the catalogue, found {', '.join(sorted(unknown))}")
    chosen = [one for one in known if not options.only or one.name in options.only]
    chosen = [one for one in chosen if not options.most_used or one.name in MOST_USED]
    left = [
        one for one in chosen[number - 1 :: count] if options.again or read(options.out, one.name) is None
    ]
    print(f"{len(chosen)} architectures, {len(left)} to try in this part", flush=True)
    for one in left:
        _try(one, options.out)
    done = [record for one in chosen if (record := read(options.out, one.name)) is not None]
    print(summary(done))
    if options.table:
        tried_before = {record.name for record in done}
        options.table.write_text(table(done, [one.name for one in chosen if one.name not in tried_before]))


def _try(one: Architecture, out: Path) -> None:
    record = tried(one)
    write(out, record)
    told = record.unbuilt or ", ".join(
        f"{step}: {verdict} ({why})" for step, (verdict, why) in record.steps.items() if verdict in SHOWN
    )
    print(f"{one.name} ({record.seconds:.1f} s): {told or 'right'}", flush=True)


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="scripts/architectures",
        description="Try every architecture that transformers can build tiny. Goes on where it was stopped.",
    )
    result.add_argument(
        "--shard", type=_shard, default=(1, 1), metavar="I/N", help="one of N parts of the work"
    )
    result.add_argument("--only", nargs="+", default=[], metavar="CLASS", help="these classes alone")
    result.add_argument("--most-used", action="store_true", help="those that the tests try")
    result.add_argument("--again", action="store_true", help="those of which there is a record, too")
    result.add_argument(
        "--out", type=Path, default=Path("architectures"), metavar="FOLDER", help="of the records"
    )
    result.add_argument(
        "--table", type=Path, metavar="FILE", help="also write the table, of all records, as Markdown"
    )
    return result


def _shard(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"expected I/N with I from 1 to N, found {text}")
    return int(number), int(count)


if __name__ == "__main__":
    main()
