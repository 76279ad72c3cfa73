"""Packages to the Hub while a model trains: one after another, each by a process of its own."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import IO

from ..errors import HubError
from ..hub.upload import can_upload, check_repository
from ..parallel.ranks import Ranks

_log = logging.getLogger("dare_train")
PATIENCE = 300.0
"""Seconds for which the end of a training waits for what is still being pushed."""
_LOOK_AGAIN = 0.05
"""Seconds between looks at a process that is waited for."""


@dataclass(frozen=True, kw_only=True)
class Destination:
    """A repository on the Hub, and what an upload needs to know."""

    repo: str
    revision: str | None = None
    private: bool | None = None
    token: str | None = None

    def check(self) -> None:
        """
        Raises:
            ConfigError: it is no repository's name, the Hub is switched off, or there is no token.
        """
        check_repository(self.repo)
        can_upload(self.token)


class Pusher:
    """Pushes packages in the order in which they come. Training never waits for it before its end, and what
    failed is tried again then.

    A process for each: an upload reads, hashes and sends with several threads, and could not be ended.
    """

    def __init__(self, destination: Destination) -> None:
        self.destination = destination
        self.pushed: list[Path] = []
        self._waiting: deque[Path] = deque()
        self._failed: dict[Path, str] = {}
        """What could not be pushed so far, and why."""
        self._current: _Push | None = None

    def push(self, package: Path) -> None:
        """Let it be pushed after those before it. One that is removed meanwhile, as `keep` says, is not."""
        self._waiting.append(package)
        self.look()

    def look(self) -> list[str]:
        """Take note of what ended, and start what comes next. Returns what failed since the last look, a line
        each.
        """
        failed = []
        current = self._current
        if current is not None and current.ended:
            self._current = None
            reason = current.failure()
            if reason is None:
                self.pushed.append(current.package)
            elif current.package.is_dir():
                self._failed[current.package] = reason
                failed.append(f"{current.package.name} was not pushed: {reason}")
        while self._current is None and self._waiting:
            package = self._waiting.popleft()
            if package.is_dir():
                self._current = _Push(package, self.destination)
        return failed

    def look_and_tell(self, name: str) -> None:
        """`look`, with a warning of what failed, in the name of a callback."""
        for failure in self.look():
            _log.warning("DareCallback %r: %s; it is tried again at the end", name, failure)

    def close(self) -> None:
        """Wait, at most `PATIENCE` seconds, for what is being pushed, with another try for what failed.

        Raises:
            HubError: not everything was pushed. It says how that is done by hand.
        """
        deadline = time.monotonic() + PATIENCE
        self._wait(deadline)
        self._waiting.extend(self._failed)
        self._failed.clear()
        self._wait(deadline)
        left = dict(self._failed)
        if self._current is not None:
            self._current.kill()
            left[self._current.package] = f"no answer within {PATIENCE:g} s"
            self._current = None
        late = dict.fromkeys((package for package in self._waiting if package.is_dir()), "no time was left")
        left |= late
        self._waiting.clear()
        if left:
            raise self._not_pushed(left)

    def _wait(self, deadline: float) -> None:
        self.look()
        while self._current is not None and time.monotonic() < deadline:
            time.sleep(_LOOK_AGAIN)
            self.look()

    def _not_pushed(self, left: dict[Path, str]) -> HubError:
        package, reason = next(iter(left.items()))
        others = f" and {len(left) - 1} more" if len(left) > 1 else ""
        repo = self.destination.repo
        branch = f" --revision {quote(self.destination.revision)}" if self.destination.revision else ""
        remedy = f"later: dare-train push {quote(str(package))} {repo} --folder {quote(package.name)}{branch}"
        return HubError(f"push_to_hub: {package.name}{others} did not arrive: {reason}", remedy=remedy)


def pusher_for(destination: Destination, ranks: Ranks) -> Pusher | None:
    """The first rank's. All ranks call it together.

    Raises:
        ConfigError: it cannot be pushed there.
    """
    ranks.together(lambda: destination.check() if ranks.first else None)
    return Pusher(destination) if ranks.first else None


class _Push:
    """A process that pushes one package."""

    def __init__(self, package: Path, to: Destination) -> None:
        self.package = package
        options = [f"--folder={package.name}"]
        options += [f"--revision={to.revision}"] if to.revision else []
        options += ["--private"] if to.private else []
        self._said: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed when it has been read
        command = [sys.executable, "-m", "dare_train", "push", str(package.absolute()), to.repo, *options]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._said,
            env=_environment(to.token),
        )

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def failure(self) -> str | None:
        """The last line that it said, if it failed."""
        with self._said as said:
            said.seek(0)
            lines = said.read().decode(errors="replace").split("\n")
        if self._process.returncode == 0:
            return None
        last = next((line for line in reversed(lines) if line.strip()), "")
        return last.removeprefix("dare-train: ") or f"exit code {self._process.returncode}"

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._said.close()


def _environment(token: str | None) -> dict[str, str]:
    """This process's, in which the same modules are found."""
    added = {
        "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path),
        "PYTHONSAFEPATH": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        **({} if token is None else {"HF_TOKEN": token}),
    }
    return {**os.environ, **added}
