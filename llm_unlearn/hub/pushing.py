"""Files become one commit on a hub, whole or not at all, against a network that fails and others who push.

What is large is uploaded first; the hub keeps it, and a later try, or the same command again, asks what is there and sends the
rest. A branch shows nothing of it before the commit, which names the one that it follows: a foreign one in between is seen.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from llm_unlearn.hub.contents import Piece, stale
from llm_unlearn.hub.failures import LOG_IN, MOVED, Sent, may_pass, refusal, retry_after, status_of, why
from llm_unlearn.hub.fetching import COMBINATION_FILE
from llm_unlearn.methods.combination import Combination
from llm_unlearn.spec import Refused, typed
from llm_unlearn.written import object_in

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds before each further try; a try of an upload has shorter ones of huggingface_hub's own within it."""
PATIENCE = 300.0
"""A server that asks for a longer wait is not waited for."""
OTHERS = 3
"""So often a push begins again because somebody else has pushed."""


class Unreachable(Exception):
    """The hub did not answer, or not in time; its text says what is there now."""


class Overtaken(Exception):
    """Others push to the same branch at the same time."""


@dataclass(frozen=True)
class Wanted:
    """What is to be pushed, and where."""

    repo_id: str
    pieces: Sequence[Piece]
    public: bool = False
    revision: str = "main"
    message: str = "Publish a model"


@dataclass(frozen=True)
class Pushed:
    """What is there now."""

    url: str
    commit: str
    private: bool
    removed: tuple[str, ...] = ()
    """Files of an earlier push that would have made it another model."""
    new: bool = True
    """False where the branch had all of it already."""


@dataclass
class _Head:
    """A branch as it is."""

    commit: str | None
    private: bool
    files: list[str] = field(default_factory=list)


def push(wanted: Wanted, *, token: str, tell: Callable[[str], None] = print, sleep: Callable[[float], None] = time.sleep) -> Pushed:
    """Push, trying again where that may help.

    Raises:
        Refused: the hub refuses it, or the repository is public and that was not asked for.
        Unreachable: it did not answer.
        Overtaken: somebody else pushed each time.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    hashes: dict[str, bytes] = {}
    tries, moved, sent = 0, 0, Sent(wanted.repo_id, wanted.revision)
    while True:
        try:
            head = _head(api, wanted, sent)
            additions = _additions(wanted, hashes)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # the hub's advice on metadata is for people who write cards by hand
                    api.preupload_lfs_files(wanted.repo_id, additions, revision=wanted.revision, free_memory=False)
                    return _commit(api, wanted, head, additions, sent)
            finally:
                hashes |= {one.path_in_repo: one.upload_info.sha256 for one in additions if one.upload_info.is_hashed}
        except Exception as error:
            if status_of(error) in MOVED:
                moved += 1
                if moved > OTHERS:
                    raise Overtaken(
                        f"{wanted.repo_id}: somebody else pushed to {wanted.revision} {moved} times meanwhile; the branch is as "
                        "they left it. The same command tries again."
                    ) from None
                tell(f"somebody else pushed to {wanted.revision} meanwhile; going on from there")
                continue
            wait = _wait(error, tries, sent)
            if wait is None:
                raise Unreachable(_gone(api, error, sent)) from None
            tries += 1
            tell(f"{why(error)}; trying again in {wait:.0f} s")
            sleep(wait)


def _head(api: HfApi, wanted: Wanted, sent: Sent) -> _Head:
    """The branch to be pushed to; repository and branch are made where they are not there.

    Raises:
        Refused: the repository is public, and that was not asked for; or it is there and cannot be read.
    """
    found = _info(api, wanted, None)
    if found is None:
        there = _is_there_already(api, wanted)
        found = _info(api, wanted, None)
        if found is None:
            state = "exists, and you may not read it" if there else "cannot be read after it was made"
            raise Refused(f"{wanted.repo_id}: {state}. {sent.left}; {LOG_IN}, or choose another --repo-id.")
    if not found.private and not wanted.public:
        raise Refused(
            f"{wanted.repo_id}: exists and is public. {sent.left}; add --public if everybody may read this, or name another."
        )
    private = bool(found.private)
    if wanted.revision != "main":
        found = _info(api, wanted, wanted.revision)
        if found is None:
            api.create_branch(wanted.repo_id, branch=wanted.revision, exist_ok=True)
            found = _info(api, wanted, wanted.revision)
    files = [one.rfilename for one in (found.siblings if found else None) or ()]
    return _Head(found.sha if found else None, private, files)


def _is_there_already(api: HfApi, wanted: Wanted) -> bool:
    """Make a repository; True where the hub says that there is one, made meanwhile, or hidden from this token."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        api.create_repo(wanted.repo_id, private=not wanted.public, exist_ok=False)
    except HfHubHTTPError as error:
        if status_of(error) != 409:
            raise
        return True
    return False


def _info(api: HfApi, wanted: Wanted, revision: str | None) -> Any:
    """What the hub says of a repository or branch; None where it is not there."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return api.model_info(wanted.repo_id, revision=revision, timeout=30)
    except HfHubHTTPError as error:
        if status_of(error) == 404:
            return None
        raise


def _additions(wanted: Wanted, hashes: dict[str, bytes]) -> list[CommitOperationAdd]:
    """Each file anew in every try, as what was there has to be asked again; what has been hashed is not hashed again."""
    from huggingface_hub import CommitOperationAdd

    made = [CommitOperationAdd(one.path, one.content) for one in wanted.pieces]
    for one in made:
        if one.path_in_repo in hashes:
            one.upload_info.sha256 = hashes[one.path_in_repo]
    return made


def _commit(api: HfApi, wanted: Wanted, head: _Head, additions: list[CommitOperationAdd], sent: Sent) -> Pushed:
    from huggingface_hub import CommitOperationDelete

    if ignored := [one.path_in_repo for one in additions if one._should_ignore]:
        raise Refused(f"{wanted.repo_id}: its .gitignore leaves out {', '.join(ignored)}. {sent.left}; change it there.")
    gone = stale(head.files, wanted.pieces, _members(api, wanted, head))
    try:
        made = api.create_commit(
            wanted.repo_id, [*additions, *(CommitOperationDelete(name) for name in gone)], commit_message=wanted.message,
            revision=wanted.revision, parent_commit=head.commit,
        )  # fmt: skip
    except Exception as error:
        status = status_of(error)
        sent.commit |= status is None or not 400 <= status < 500
        raise
    url = f"{api.endpoint}/{wanted.repo_id}" + ("" if wanted.revision == "main" else f"/tree/{wanted.revision}")
    return Pushed(url, str(made.oid), head.private, tuple(gone), made.oid != head.commit)


def _members(api: HfApi, wanted: Wanted, head: _Head) -> list[str]:
    """The folders of adapters that a branch combines; none of a branch that combines nothing, or says so in no way of ours."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    if COMBINATION_FILE not in head.files:
        return []
    try:
        path = api.hf_hub_download(wanted.repo_id, COMBINATION_FILE, revision=head.commit)
        return typed(Combination, object_in(Path(path), ""), path, "").adapters
    except LocalEntryNotFoundError as error:  # its text blames a cache
        raise error.__cause__ or error from None
    except Refused:
        return []


# ---------------------------------------------------------------------------------------------------------------- failures


def _wait(error: Exception, tries: int, sent: Sent) -> float | None:
    """Seconds until the next try; None where there have been enough.

    Raises:
        Refused: another try would end the same way.
    """
    if isinstance(error, Refused):
        raise error
    if not may_pass(error):
        raise Refused(refusal(error, sent)) from None
    asked = retry_after(error)
    if tries >= len(WAITS) or (asked or 0.0) > PATIENCE:
        return None
    return max(asked or 0.0, WAITS[tries])


def _gone(api: HfApi, error: BaseException, sent: Sent) -> str:
    host = urlsplit(api.endpoint).netloc
    asked = retry_after(error)
    long = f", and asks to wait {asked:.0f} s" if asked and asked > PATIENCE else ""
    state = f"{sent.revision} of {sent.repo_id} is as it was: nothing half-pushed is there"
    if sent.commit:
        state = sent.left[0].lower() + sent.left[1:]
    return f"{host}: {why(error)}{long}; {state}. The same command goes on with what the hub has by then."
