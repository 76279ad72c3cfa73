"""A study as one HTML page that needs nothing else: no network, no script, pictures inside."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Mapping
from html import escape

from .document import Chart, HeatMap, Study, Table

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2126; --soft: #5b6770; --line: #d9dee3; --paper: #fff;
  --card: #f6f8fa; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --soft: #9aa5ae; --line: #343b42;
  --paper: #15191d; --card: #1d2227; } }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 60rem; margin: 2.5rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin-bottom: .3rem; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .6rem; }
.question { color: var(--soft); font-size: 1.08rem; margin-top: 0; }
.findings { background: var(--card); border-left: 4px solid #1f5fa8; margin: 1.4rem 0;
  padding: .8rem 1rem .8rem 2.1rem; }
figure { margin: 1.6rem 0; }
figure img { width: 100%; background: #fff; border: 1px solid var(--line); border-radius: 4px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .32rem .8rem; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
th { border-bottom-width: 2px; white-space: normal; vertical-align: bottom; }
.note { color: var(--soft); font-size: .92rem; }
pre { background: var(--card); padding: 1rem; overflow-x: auto; font-size: .85rem; }
summary { cursor: pointer; }
"""

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""The browser itself refuses anything that the page does not hold."""


def html(study: Study, pictures: Mapping[str, bytes]) -> str:
    """The page; `pictures` has the PNG of each chart by name."""
    findings = "".join(f"<li>{escape(finding)}</li>" for finding in study.findings)
    shown = [
        f"<h1>{escape(study.title)}</h1>",
        f'<p class="question">{escape(study.question)}</p>',
        f'<ul class="findings">{findings}</ul>' if findings else "",
        *(_figure(chart, pictures[chart.name]) for chart in study.charts),
        *(_table(table) for table in study.tables),
        _details("How it was measured", study.as_json()["setup"]),
        _details("All figures", dict(study.data)),
    ]
    head = (
        '<meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(study.title)}</title><style>{_STYLE}</style>"
    )
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n'
        + "\n".join(filter(None, shown))
        + "\n</body></html>\n"
    )


def _figure(chart: Chart | HeatMap, picture: bytes) -> str:
    source = b64encode(picture).decode()
    text = escape(f"{chart.title}. {chart.caption}")
    return (
        f'<figure id="{escape(chart.name)}"><img alt="{text}" src="data:image/png;base64,{source}"></figure>'
    )


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in table.columns)
    rows = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in table.cells())
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    body = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    return f"<section><h2>{escape(table.title)}</h2>{body}{note}</section>"


def _details(title: str, what: object) -> str:
    content = escape(json.dumps(what, indent=1))
    return f"<details><summary>{escape(title)}</summary><pre>{content}</pre></details>"
