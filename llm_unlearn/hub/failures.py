"""What goes wrong between here and a hub: what may pass by itself, what is refused for good, and what either leaves behind."""

from __future__ import annotations

import email.utils
import time
from dataclasses import dataclass

AGAIN = (408, 429)
"""Refusals that pass; so may every status from 500 on, whether it is the hub's or that of a gateway before it."""
MOVED = (409, 412)
LOG_IN = "log in with a token that may write there (hf auth login, or the variable HF_TOKEN)"


@dataclass
class Sent:
    """Whether a commit was sent that the hub did not refuse: then nobody here knows whether it arrived."""

    repo_id: str
    revision: str
    commit: bool = False

    @property
    def left(self) -> str:
        """What an error says of it."""
        if not self.commit:
            return "Nothing was pushed"
        where = f"{self.revision} of {self.repo_id}"
        return f"Whether a commit of this push arrived is not known: {where} has it whole, or not at all; look there"


def status_of(error: BaseException) -> int | None:
    """The HTTP status at the bottom of an error, where there is one."""
    at: BaseException | None = error
    while at is not None:
        response = getattr(at, "response", None)
        if response is not None:
            return int(response.status_code)
        at = at.__cause__
    return None


def may_pass(error: BaseException) -> bool:
    """Whether it is the network's fault, or the server asks to come again."""
    import httpx2
    from huggingface_hub.errors import OfflineModeIsEnabled

    if (status := status_of(error)) is not None:
        return status in AGAIN or status >= 500
    at: BaseException | None = error
    while at is not None:
        if isinstance(at, (OfflineModeIsEnabled, PermissionError, FileNotFoundError)):
            return False
        if isinstance(at, (httpx2.TransportError, ConnectionError, TimeoutError)) or type(at).__name__ == "JSONDecodeError":
            return True  # an answer that is no JSON is that of a gateway before the hub
        at = at.__cause__
    return isinstance(error, (RuntimeError, OSError))  # the uploader's own


def retry_after(error: BaseException) -> float | None:
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


def why(error: BaseException) -> str:
    """A failure in a few words: without addresses' queries, in which keys may stand."""
    status = status_of(error)
    if status is not None:
        return f"the hub answered {status}"
    while error.__cause__ is not None and not str(error):
        error = error.__cause__
    text = str(error).splitlines()[0] if str(error) else ""
    return f"no connection ({type(error).__name__}{f': {text}' if text and '://' not in text else ''})"


def refusal(error: BaseException, sent: Sent) -> str:
    """What the hub will not have, and what to do about it."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    status = status_of(error)
    said = str(getattr(error, "server_message", None) or "").splitlines()
    words = f" ({said[0]})" if said else ""
    nothing, name = sent.left, sent.repo_id
    if isinstance(error, OfflineModeIsEnabled):
        return f"the hub cannot be asked while HF_HUB_OFFLINE is set. {nothing}; unset it."
    if status == 401 or isinstance(error, PermissionError):
        return f"{name}: the hub does not accept who you are (401){words}. {nothing}; {LOG_IN}."
    if status == 403:
        return f"{name}: you may not write there (403){words}. {nothing}; {LOG_IN}, or choose another --repo-id."
    if status == 404:
        return f"{name}: not found (404){words}. {nothing}; look at --repo-id and --revision, and {LOG_IN}."
    if status is not None:
        return f"{name}: the hub refused it with status {status}{words}. {nothing}."
    return f"{name}: {' '.join(str(error).split())[:300] or type(error).__name__}. {nothing}."
