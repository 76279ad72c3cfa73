"""What users write for a place on the Hub: `user/repo`, `user/repo@revision`, `hf://user/repo@revision/folder`."""

from __future__ import annotations

import re
from dataclasses import dataclass

_NAME = r"[A-Za-z0-9_.-]+"
_ID = re.compile(
    rf"(?P<scheme>hf://)?(?P<repo>{_NAME}(?:/{_NAME})?)"
    rf"(?:@(?P<revision>refs/(?:pr|convert)/{_NAME}|[^/@]+))?"
    r"(?:/(?P<folder>.+?))?/?"
)


@dataclass(frozen=True, kw_only=True)
class HubId:
    """A repository, at a revision, and a folder in it; the revision and the folder may be left out."""

    repo: str
    revision: str | None = None
    folder: str = ""

    @classmethod
    def parse(cls, text: str) -> HubId | None:
        """None for what is no place on the Hub. A folder needs the scheme: without it, the name of a local
        folder that is not there would be asked for on a network.
        """
        match = _ID.fullmatch(text)
        if match is None or ".." in text.split("/") or text.startswith("."):
            return None
        repo, folder = match["repo"], match["folder"] or ""
        if (folder and match["scheme"] is None) or repo.startswith((".", "-")):
            return None
        return cls(repo=repo, revision=match["revision"], folder=folder)

    def __str__(self) -> str:
        at = f"@{self.revision}" if self.revision else ""
        return f"hf://{self.repo}{at}/{self.folder}" if self.folder else f"{self.repo}{at}"
