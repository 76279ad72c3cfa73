"""Sending files to a repository of the Hub, in one commit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from ..errors import ConfigError, HubError
from .ids import HubId

_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write there"
CARD = "README.md"


def check_repository(name: str) -> None:
    """
    Raises:
        ConfigError: no repository can be called that.
    """
    if HubId.parse(name) != HubId(repo=name) or name.count("/") != 1:
        raise ConfigError("repository", expected="the id of one on the Hub, as user/name", found=repr(name))


def can_upload(token: str | None = None) -> None:
    """Look, without a network, whether uploads stand a chance.

    Raises:
        ConfigError: the Hub is switched off, or there is no token.
    """
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        remedy = "leave push_to_hub away, and later run: dare-train push PACKAGE REPO"
        raise ConfigError("push_to_hub", expected="a Hub", found="HF_HUB_OFFLINE", remedy=remedy)
    if not (token or get_token()):
        raise ConfigError("push_to_hub", expected="a token of the Hub", found="none", remedy=_LOG_IN)


def upload(
    repo: str,
    files: Mapping[str, Path],
    *,
    message: str,
    card: str = "",
    revision: str | None = None,
    private: bool | None = None,
    tag: str | None = None,
    token: str | None = None,
) -> str:
    """Add files to a model repository, which is made if it is not there.

    Args:
        repo: as `user/name`.
        files: where each lies, by its path in the repository.
        message: of the commit.
        card: the repository's model card, for one that has none.
        revision: the branch, which is made if it is not there; `main` by default.
        private: whether a repository that is made is private; the account's default otherwise.
        tag: a name for the commit.
        token: by default the one that this machine is logged in with.

    Returns:
        The commit's address.

    Raises:
        ConfigError: `repo` is no name of a repository.
        HubError: the Hub refused, or cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError

    check_repository(repo)
    # Of httpx, or of whatever that version speaks with.
    client_error = cast("type[Exception]", HfHubHTTPError.__mro__[1])
    api = HfApi(token=token)
    try:
        repo = api.create_repo(repo, exist_ok=True, private=private).repo_id
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        changes = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
        if card and CARD not in files and not api.file_exists(repo, CARD, revision=revision):
            changes.append(CommitOperationAdd(CARD, card.encode()))
        commit = api.create_commit(repo, changes, commit_message=message, revision=revision)
        if tag is not None:
            api.create_tag(repo, tag=tag, revision=commit.oid)
    except (client_error, OSError, RuntimeError, ValueError) as error:  # the Xet client's are RuntimeErrors
        raise _refused(repo, error) from error
    return str(commit.commit_url)


def _refused(repo: str, error: Exception) -> HubError:
    status = getattr(getattr(error, "response", None), "status_code", None)
    said = getattr(error, "server_message", None) or _first_line(error)
    by_status = {401: _LOG_IN, 403: _LOG_IN, 409: "choose another name"}
    remedy = by_status.get(status or 0, "check the name and the network, and run it again")
    if type(error).__name__ == "LocalTokenNotFoundError":
        said, remedy = "no token on this machine", _LOG_IN
    found = f"{status}: {said}" if status else said
    return HubError(repo, expected="a repository that takes the upload", found=found, remedy=remedy)


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return re.sub(r"\s*\(Request ID:[^)]*\)", "", text.splitlines()[0])
