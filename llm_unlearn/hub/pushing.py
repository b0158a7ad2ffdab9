"""Files become one commit on a hub, whole or not at all, against a network that fails and others who push.

What is large is uploaded first; the hub keeps it, and a later try, or the same command again, asks what is there and sends the
rest. A branch shows nothing of it before the commit, which names the one that it follows: a foreign one in between is seen.
"""

from __future__ import annotations

import email.utils
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from llm_unlearn.hub.contents import Piece, stale
from llm_unlearn.spec import Refused

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds before each further try; a try of an upload has shorter ones of huggingface_hub's own within it."""
PATIENCE = 300.0
"""A server that asks for a longer wait is not waited for."""
OTHERS = 3
"""So often a push begins again because somebody else has pushed."""
AGAIN = (408, 429, 500, 502, 503, 504)
MOVED = (409, 412)
LOG_IN = "log in with a token that may write there (hf auth login, or the variable HF_TOKEN)"


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
    tries, moved, committing = 0, 0, False
    while True:
        try:
            head = _head(api, wanted)
            additions = _additions(wanted, hashes)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # the hub's advice on metadata is for people who write cards by hand
                    api.preupload_lfs_files(wanted.repo_id, additions, revision=wanted.revision, free_memory=False)
                    committing = True
                    return _commit(api, wanted, head, additions)
            finally:
                hashes |= {one.path_in_repo: one.upload_info.sha256 for one in additions if one.upload_info.is_hashed}
        except Exception as error:
            if _status(error) in MOVED:
                moved += 1
                if moved > OTHERS:
                    raise Overtaken(
                        f"{wanted.repo_id}: somebody else pushed to {wanted.revision} {moved} times meanwhile; the branch is as "
                        "they left it. The same command tries again."
                    ) from None
                tell(f"somebody else pushed to {wanted.revision} meanwhile; going on from there")
                continue
            wait = _wait(error, tries, wanted)
            if wait is None:
                raise Unreachable(_gone(api, wanted, error, committing)) from None
            tries += 1
            tell(f"{_why(error)}; trying again in {wait:.0f} s")
            sleep(wait)


def _head(api: HfApi, wanted: Wanted) -> _Head:
    """The branch to be pushed to; repository and branch are made where they are not there.

    Raises:
        Refused: the repository is public, and that was not asked for.
    """
    found = _info(api, wanted, None)
    if found is None:
        api.create_repo(wanted.repo_id, private=not wanted.public, exist_ok=False)
        found = _info(api, wanted, None)
    if found is None:
        raise Refused(f"{wanted.repo_id}: cannot be read after it was made; {LOG_IN}.")
    if not found.private and not wanted.public:
        raise Refused(
            f"{wanted.repo_id}: exists and is public. Nothing was pushed; add --public if everybody may read this, or name another."
        )
    private = bool(found.private)
    if wanted.revision != "main":
        found = _info(api, wanted, wanted.revision)
        if found is None:
            api.create_branch(wanted.repo_id, branch=wanted.revision, exist_ok=True)
            found = _info(api, wanted, wanted.revision)
    files = [one.rfilename for one in (found.siblings if found else None) or ()]
    return _Head(found.sha if found else None, private, files)


def _info(api: HfApi, wanted: Wanted, revision: str | None) -> Any:
    """What the hub says of a repository or branch; None where it is not there."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return api.model_info(wanted.repo_id, revision=revision, timeout=30)
    except HfHubHTTPError as error:
        if _status(error) == 404:
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


def _commit(api: HfApi, wanted: Wanted, head: _Head, additions: list[CommitOperationAdd]) -> Pushed:
    from huggingface_hub import CommitOperationDelete

    if ignored := [one.path_in_repo for one in additions if one._should_ignore]:
        raise Refused(f"{wanted.repo_id}: its .gitignore leaves out {', '.join(ignored)}. Nothing was pushed; change it there.")
    gone = stale(head.files, wanted.pieces)
    made = api.create_commit(
        wanted.repo_id, [*additions, *(CommitOperationDelete(name) for name in gone)], commit_message=wanted.message,
        revision=wanted.revision, parent_commit=head.commit,
    )  # fmt: skip
    url = f"{api.endpoint}/{wanted.repo_id}" + ("" if wanted.revision == "main" else f"/tree/{wanted.revision}")
    return Pushed(url, str(made.oid), head.private, tuple(gone), made.oid != head.commit)


# ---------------------------------------------------------------------------------------------------------------- failures


def _status(error: BaseException) -> int | None:
    """The HTTP status at the bottom of an error, where there is one."""
    at: BaseException | None = error
    while at is not None:
        response = getattr(at, "response", None)
        if response is not None:
            return int(response.status_code)
        at = at.__cause__
    return None


def _wait(error: Exception, tries: int, wanted: Wanted) -> float | None:
    """Seconds until the next try; None where there have been enough.

    Raises:
        Refused: another try would end the same way.
    """
    if isinstance(error, Refused):
        raise error
    if not _may_pass(error):
        raise Refused(_refusal(error, wanted)) from None
    asked = _retry_after(error)
    if tries >= len(WAITS) or (asked or 0.0) > PATIENCE:
        return None
    return max(asked or 0.0, WAITS[tries])


def _may_pass(error: BaseException) -> bool:
    """Whether it is the network's fault, or the server asks to come again."""
    import httpx2
    from huggingface_hub.errors import OfflineModeIsEnabled

    if (status := _status(error)) is not None:
        return status in AGAIN
    at: BaseException | None = error
    while at is not None:
        if isinstance(at, (OfflineModeIsEnabled, PermissionError, FileNotFoundError)):
            return False
        if isinstance(at, (httpx2.TransportError, ConnectionError, TimeoutError)) or type(at).__name__ == "JSONDecodeError":
            return True  # an answer that is no JSON is that of a gateway before the hub
        at = at.__cause__
    return isinstance(error, (RuntimeError, OSError))  # the uploader's own


def _retry_after(error: BaseException) -> float | None:
    at: BaseException | None = error
    while at is not None and getattr(at, "response", None) is None:
        at = at.__cause__
    said = "" if at is None else str(at.response.headers.get("Retry-After", "")).strip()  # type: ignore[attr-defined]
    if said.isdigit():
        return float(said)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(said).timestamp() - time.time()) if said else None
    except ValueError:
        return None


def _why(error: BaseException) -> str:
    """A failure in a few words: without addresses' queries, in which keys may stand."""
    status = _status(error)
    if status is not None:
        return f"the hub answered {status}"
    while error.__cause__ is not None and not str(error):
        error = error.__cause__
    text = str(error).splitlines()[0] if str(error) else ""
    return f"no connection ({type(error).__name__}{f': {text}' if text and '://' not in text else ''})"


def _refusal(error: BaseException, wanted: Wanted) -> str:
    """What the hub will not have, and what to do about it."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    status = _status(error)
    said = str(getattr(error, "server_message", None) or "").splitlines()
    words = f" ({said[0]})" if said else ""
    nothing = "Nothing was pushed"
    if isinstance(error, OfflineModeIsEnabled):
        return f"the hub cannot be asked while HF_HUB_OFFLINE is set. {nothing}; unset it."
    if status == 401 or isinstance(error, PermissionError):
        return f"{wanted.repo_id}: the hub does not accept who you are (401){words}. {nothing}; {LOG_IN}."
    if status == 403:
        return f"{wanted.repo_id}: you may not write there (403){words}. {nothing}; {LOG_IN}, or choose another --repo-id."
    if status == 404:
        return f"{wanted.repo_id}: not found (404){words}. {nothing}; look at --repo-id and --revision, and {LOG_IN}."
    if status is not None:
        return f"{wanted.repo_id}: the hub refused it with status {status}{words}. {nothing}."
    return f"{wanted.repo_id}: {' '.join(str(error).split())[:300] or type(error).__name__}. {nothing}."


def _gone(api: HfApi, wanted: Wanted, error: BaseException, committing: bool) -> str:
    host = urlsplit(api.endpoint).netloc
    asked = _retry_after(error)
    long = f", and asks to wait {asked:.0f} s" if asked and asked > PATIENCE else ""
    state = (
        "whether the last commit arrived is not known; it is there whole, or not at all"
        if committing and _status(error) is None
        else f"{wanted.revision} of {wanted.repo_id} is as it was: nothing half-pushed is there"
    )
    return f"{host}: {_why(error)}{long}; {state}. The same command goes on with what the hub has by then."
