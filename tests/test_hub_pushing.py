"""Pushing to a hub with its own client, against a server on this machine that fails as ordered: a branch shows all of a push or
nothing of it."""

from __future__ import annotations

import copy
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import Fault, Files, Hub, as_the_hub

from llm_unlearn.hub.contents import Piece
from llm_unlearn.hub.pushing import OTHERS, WAITS, Overtaken, Pushed, Unreachable, Wanted, push
from llm_unlearn.spec import Refused

REPO = "me/forgetful"
NAMES = ("README.md", "adapter_config.json", "adapter_model.safetensors", "more.safetensors")


@pytest.fixture
def waited() -> list[float]:
    """Seconds that were to be waited, by us and by huggingface_hub."""
    return []


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, waited: list[float]) -> Iterator[Hub]:
    """A hub that huggingface_hub takes for the hub, and nobody waits for."""
    with Hub().running() as made:
        yield as_the_hub(made, monkeypatch, tmp_path, waited)


def pieces(tmp_path: Path, mark: str, size: int = 50_000) -> list[Piece]:
    """A push of two small files and two large ones, all of whose bytes follow from its mark."""
    found: list[Piece] = []
    for number, name in enumerate(NAMES):
        raw = (f"---\ntags: [a]\n---\n{mark} {name}\n" if name == "README.md" else f"{mark} {number} ").encode()
        if name.endswith("tensors"):
            path = tmp_path / f"{mark}_{name}"
            path.write_bytes(raw * (size // len(raw)))
            found.append(Piece(name, path))
        else:
            found.append(Piece(name, raw))
    return found


def content(found: list[Piece]) -> Files:
    return {one.path: one.content if isinstance(one.content, bytes) else one.content.read_bytes() for one in found}


@pytest.fixture
def pushed(hub: Hub, tmp_path: Path, waited: list[float]) -> Callable[..., Pushed]:
    def go(mark: str, **more: Any) -> Pushed:
        token = more.pop("token", hub.token)
        said = more.pop("said", [])
        wanted = Wanted(REPO, pieces(tmp_path, mark), **more)
        return push(wanted, token=token, tell=said.append, sleep=waited.append)

    return go


def shows(hub: Hub, mark: str, tmp_path: Path, branch: str = "main") -> bool:
    """Whether a branch shows this push and nothing of another."""
    there = {name: raw for name, raw in hub.files(REPO, branch).items() if name != ".gitattributes"}
    return there == content(pieces(tmp_path, mark))


def test_a_push_makes_a_private_repository_and_one_commit(hub: Hub, pushed: Callable[..., Pushed], tmp_path: Path) -> None:
    found = pushed("first")
    assert hub.repos[REPO].private and found.private and found.new
    assert found.url == f"{hub.url}/{REPO}" and found.commit == hub.repos[REPO].branches["main"]
    assert shows(hub, "first", tmp_path) and hub.asked("/commit/main") == 1 == hub.asked("repos/create")
    assert len(hub.repos[REPO].commits) == 2, "the one that the hub makes, and ours"


def test_the_same_again_changes_nothing_and_uploads_nothing(hub: Hub, pushed: Callable[..., Pushed]) -> None:
    one, received = pushed("first"), hub.received
    again = pushed("first")
    assert again.commit == one.commit and not again.new
    assert hub.asked("PUT /lfs/") == 2 and hub.received - received < 10_000


def test_public_only_where_it_is_asked_for(hub: Hub, pushed: Callable[..., Pushed]) -> None:
    assert not pushed("first", public=True).private and not hub.repos[REPO].private
    before = dict(hub.files(REPO))
    with pytest.raises(Refused, match=r"exists and is public\. Nothing was pushed; add --public"):
        pushed("second")
    assert hub.files(REPO) == before and hub.asked("PUT /lfs/") == 2


def test_a_repository_that_turns_public_during_the_push_is_seen(hub: Hub, pushed: Callable[..., Pushed]) -> None:
    repo = hub.make(REPO)
    hub.faults.append(Fault("commit/main", status=503, do=lambda: setattr(repo, "private", False)))
    with pytest.raises(Refused, match="is public"):
        pushed("first")
    assert set(hub.files(REPO)) == {".gitattributes"}


def test_a_branch_is_made_and_main_stays_what_it_is(hub: Hub, pushed: Callable[..., Pushed], tmp_path: Path) -> None:
    pushed("first")
    found = pushed("second", revision="second-try")
    assert shows(hub, "first", tmp_path) and shows(hub, "second", tmp_path, "second-try")
    assert found.url.endswith("/tree/second-try")


def test_what_would_make_it_another_model_goes_with_the_push(hub: Hub, pushed: Callable[..., Pushed]) -> None:
    old = {"config.json": b"{}", "model.safetensors": b"all", "pytorch_model.bin": b"pickle", "LICENSE": b"mine", "notes.md": b"-"}
    hub.make(REPO, files=old)
    assert set(pushed("first").removed) == {"config.json", "model.safetensors", "pytorch_model.bin"}
    assert set(hub.files(REPO)) == {".gitattributes", "LICENSE", "notes.md", *NAMES}


OTHER_MODELS = {
    name: b"-"
    for name in ("onnx/config.json", "v2/model.safetensors", "other/adapter_config.json", "other/adapter_model.safetensors")
}


def test_other_models_in_folders_stay(hub: Hub, pushed: Callable[..., Pushed]) -> None:
    hub.make(REPO, files=OTHER_MODELS)
    assert pushed("first").removed == () and set(OTHER_MODELS) < set(hub.files(REPO))


def test_the_members_of_what_was_combined_go_with_it(hub: Hub, pushed: Callable[..., Pushed]) -> None:
    said = json.dumps({"rule": "sum", "members": [None, "assistant"], "weights": [1.0, 0.5]}).encode()
    member = {f"assistant/{name}": b"-" for name in ("adapter_config.json", "adapter_model.safetensors", "notes.md")}
    hub.make(REPO, files=OTHER_MODELS | member | {"combination.json": said})
    gone = {"assistant/adapter_config.json", "assistant/adapter_model.safetensors", "combination.json"}
    assert set(pushed("first").removed) == gone
    assert {*OTHER_MODELS, "assistant/notes.md"} < set(hub.files(REPO))


@pytest.mark.parametrize("said", [b"{}", b"\xff", b"[" * 5000])
def test_a_combination_that_says_nothing_names_no_folder(hub: Hub, pushed: Callable[..., Pushed], said: bytes) -> None:
    hub.make(REPO, files=OTHER_MODELS | {"combination.json": said})
    assert pushed("first").removed == ("combination.json",)


# ------------------------------------------------------------------------------------------------------ failures that pass

PASSING = {
    "503 where the repository is looked up": [Fault("GET /api/models", status=503, times=2)],
    "500 where it is made": [Fault("repos/create", status=500)],
    "made, and nobody heard of it": [Fault("repos/create", cut="after")],
    "503 of a gateway, in words": [Fault("validate-yaml", status=503)],
    "500 before the upload": [Fault("preupload", status=500, times=3)],
    "500 where what is there is asked": [Fault("objects/batch", status=500)],
    "503 in an upload": [Fault("PUT /lfs/", status=503, times=3)],
    "the connection cut in an upload": [Fault("PUT /lfs/", cut="half", times=2)],
    "more cuts than huggingface_hub bears": [Fault("PUT /lfs/", cut="half", times=7)],
    "cut before the commit": [Fault("commit/main", cut="before")],
    "cut in the commit": [Fault("commit/main", cut="half")],
    "503 at the commit": [Fault("commit/main", status=503, times=2)],
    "statuses of gateways": [
        Fault("GET /api/models", status=520),
        Fault("preupload", status=524),
        Fault("objects/batch", status=507),
        Fault("commit/main", status=521),
    ],
    "what is combined there cannot be read": [Fault("resolve/.*/combination.json", status=503)],
    "the whole day": [
        Fault("GET /api/models", status=502),
        Fault("preupload", status=429),
        Fault("PUT", cut="half"),
        Fault("commit", cut="before"),
    ],
}


@pytest.mark.parametrize("case", PASSING)
def test_failures_that_pass_are_passed_over(hub: Hub, pushed: Callable[..., Pushed], tmp_path: Path, case: str) -> None:
    hub.faults += copy.deepcopy(PASSING[case])
    if "combined" in case:
        hub.make(REPO, files={"combination.json": b"{}"})
    found = pushed("first")
    assert shows(hub, "first", tmp_path) and len(hub.repos[REPO].commits) == 2 and found.private
    assert not any(one.times for one in hub.faults), "every failure was met"


def test_a_commit_that_arrived_unheard_is_not_made_twice(hub: Hub, pushed: Callable[..., Pushed], tmp_path: Path) -> None:
    hub.make(REPO)
    hub.faults.append(Fault("commit/main", cut="after"))
    found = pushed("first")
    assert shows(hub, "first", tmp_path) and len(hub.repos[REPO].commits) == 2
    assert found.commit == hub.repos[REPO].branches["main"] and hub.asked("POST .*commit/main") == 1


def test_waits_grow_and_a_server_that_names_one_gets_it(hub: Hub, pushed: Callable[..., Pushed], waited: list[float]) -> None:
    hub.faults.append(Fault("GET /api/models", status=503, times=3))
    said: list[str] = []
    pushed("first", said=said)
    assert waited == [1.0, 2.0, 4.0] and said[0] == "the hub answered 503; trying again in 1 s"
    waited.clear()
    hub.faults.append(Fault("commit/main", status=429, headers={"Retry-After": "30"}))
    pushed("second", said=said)
    assert waited == [30.0] and said[-1] == "the hub answered 429; trying again in 30 s"


def test_a_wait_without_end_is_not_waited_for(hub: Hub, pushed: Callable[..., Pushed], waited: list[float]) -> None:
    hub.faults.append(Fault("GET /api/models", status=429, headers={"Retry-After": "3600"}))
    with pytest.raises(Unreachable, match="answered 429, and asks to wait 3600 s; main of me/forgetful is as it was"):
        pushed("first")
    assert waited == []


# ------------------------------------------------------------------------------------------------- failures that do not pass

STAYING = {
    "lookup": Fault("GET /api/models", status=503, times=99),
    "batch": Fault("objects/batch", status=500, times=99),
    "upload": Fault("PUT /lfs/", cut="half", times=99),
    "one of two uploads": Fault("", cut="half", times=0),
    "commit refused": Fault("commit/main", status=429, times=99),
    "commit at a gateway": Fault("commit/main", status=504, times=99),
    "commit cut": Fault("commit/main", cut="half", times=99),
}


@pytest.mark.parametrize("case", STAYING)
def test_what_does_not_pass_leaves_the_branch_whole_and_the_same_command_goes_on(
    hub: Hub, pushed: Callable[..., Pushed], tmp_path: Path, case: str
) -> None:
    pushed("first")
    fault = STAYING[case]
    if case == "one of two uploads":
        second = content(pieces(tmp_path, "second"))["more.safetensors"]
        oid = hashlib.sha256(second).hexdigest()
        fault = Fault(f"PUT /lfs/{oid}", cut="half", times=99)
    hub.faults.append(Fault(fault.pattern, fault.status, fault.headers, fault.cut, times=99))
    with pytest.raises(Unreachable, match="The same command goes on with what the hub has by then") as error:
        pushed("second")
    assert hub.token not in str(error.value)
    assert ("not known" in str(error.value)) == (case in ("commit cut", "commit at a gateway"))
    assert shows(hub, "first", tmp_path), "all of the old and nothing of the new"
    hub.faults.clear()
    uploaded, before = len(hub.objects), hub.asked("PUT /lfs/")
    found = pushed("second")
    assert shows(hub, "second", tmp_path) and found.new and len(hub.repos[REPO].commits) == 3
    assert hub.asked("PUT /lfs/") - before == 4 - uploaded, "only what was missing"
    if case == "one of two uploads":
        assert uploaded == 3


@pytest.mark.parametrize("status", [503, 401])
def test_a_commit_that_may_have_arrived_is_never_called_undone(hub: Hub, pushed: Callable[..., Pushed], status: int) -> None:
    """It arrives unheard, and then the hub cannot be asked, or says something else."""
    hub.make(REPO)
    then = Fault("GET /api/models", status=status, times=99)
    hub.faults.append(Fault("commit/main", cut="after", do=lambda: hub.faults.append(then)))
    kind: type[Exception] = Unreachable if status == 503 else Refused
    with pytest.raises(kind, match="hether a commit of this push arrived is not known: main of me/forgetful has it whole") as error:
        pushed("first")
    assert "as it was" not in str(error.value) and "Nothing was pushed" not in str(error.value)
    assert set(NAMES) < set(hub.files(REPO))


def test_parts_of_a_large_file_are_sent_again_only_where_the_whole_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, waited: list[float]
) -> None:
    with Hub(part=20_000).running() as hub:
        as_the_hub(hub, monkeypatch, tmp_path, waited)
        hub.faults.append(Fault("PUT /lfs/", cut="half", times=2))
        push(Wanted(REPO, pieces(tmp_path, "first")), token=hub.token, tell=str, sleep=waited.append)
        assert shows(hub, "first", tmp_path) and hub.asked("PUT /lfs/") == 6 + 2 and hub.asked("POST /lfs/") == 2


def test_a_hub_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, waited: list[float]) -> None:
    with Hub().running() as hub:
        as_the_hub(hub, monkeypatch, tmp_path, waited)
    with pytest.raises(Unreachable, match=rf"^{re.escape(hub.url[7:])}: no connection \(ConnectError"):
        push(Wanted(REPO, pieces(tmp_path, "first")), token=hub.token, tell=str, sleep=waited.append)
    assert waited == list(WAITS)


# --------------------------------------------------------------------------------------------------------- what is refused

REFUSED = {
    401: (r"does not accept who you are \(401\).*hf auth login", "GET /api/models"),
    403: (r"you may not write there \(403\).*choose another --repo-id", "commit/main"),
    404: (r"not found \(404\)", "commit/main"),
    400: "commit/main",
    422: "PUT /lfs/",
}


@pytest.mark.parametrize("status", REFUSED)
def test_what_is_refused_is_not_tried_again(
    hub: Hub, pushed: Callable[..., Pushed], tmp_path: Path, waited: list[float], status: int
) -> None:
    pushed("first")
    words, pattern = REFUSED[status] if isinstance(REFUSED[status], tuple) else (f"status {status}", REFUSED[status])
    hub.faults.append(Fault(str(pattern), status=status, times=99))
    before = hub.asked(str(pattern))
    with pytest.raises(Refused, match=str(words)) as error:
        pushed("second")
    assert "Nothing was pushed" in str(error.value) and hub.token not in str(error.value)
    assert hub.asked(str(pattern)) - before <= 2 and waited == [] and shows(hub, "first", tmp_path)


def test_a_repository_that_is_hidden_from_this_token(hub: Hub, pushed: Callable[..., Pushed], waited: list[float]) -> None:
    """Looked up, it is not there; made, it is there already."""
    hub.make(REPO)
    hub.faults.append(Fault("GET /api/models", status=404, times=99))
    with pytest.raises(Refused, match=r"exists, and you may not read it\. Nothing was pushed; log in.*choose another --repo-id"):
        pushed("first")
    assert waited == [] and hub.asked("repos/create") == 1


def test_a_repository_that_was_made_meanwhile(hub: Hub, pushed: Callable[..., Pushed], tmp_path: Path) -> None:
    hub.faults.append(Fault("repos/create", do=lambda: hub.make(REPO) and None))
    pushed("first")
    assert shows(hub, "first", tmp_path)


def test_a_wrong_token_is_said_once(hub: Hub, pushed: Callable[..., Pushed]) -> None:
    with pytest.raises(Refused, match="log in with a token that may write there") as error:
        pushed("first", token="hf_of_somebody_else")
    assert "hf_of" not in str(error.value) and len(hub.log) == 1


def test_nobody_is_asked_offline(hub: Hub, pushed: Callable[..., Pushed], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(Refused, match="while HF_HUB_OFFLINE is set"):
        pushed("first")
    assert hub.log == []


def test_weights_that_the_repository_ignores_are_not_left_out_in_silence(hub: Hub, pushed: Callable[..., Pushed]) -> None:
    hub.make(REPO, files={".gitignore": b"more.safetensors\n"})
    with pytest.raises(Refused, match=r"its \.gitignore leaves out more\.safetensors"):
        pushed("first")
    assert set(hub.files(REPO)) == {".gitattributes", ".gitignore"}


# ------------------------------------------------------------------------------------------------------------- two who push


def test_a_foreign_commit_is_seen_and_followed(hub: Hub, pushed: Callable[..., Pushed], tmp_path: Path) -> None:
    """Between the look at the branch and the commit somebody else pushes: files that both have, and one of another model."""
    pushed("first")
    repo, said = hub.repos[REPO], list[str]()
    foreign = {name: b"foreign" for name in (*NAMES, "model.safetensors", "LICENSE")}
    hub.faults.append(Fault("commit/main", do=lambda: repo.commit("main", dict(foreign)) and None))
    found = pushed("second", said=said)
    assert said == ["somebody else pushed to main meanwhile; going on from there"]
    assert hub.files(REPO) == {"LICENSE": b"foreign", **content(pieces(tmp_path, "second"))}
    assert found.removed == ("model.safetensors",) and len(repo.commits) == 4, "theirs is in the history"


def test_a_file_that_was_the_same_before_the_foreign_commit_is_pushed(
    hub: Hub, pushed: Callable[..., Pushed], tmp_path: Path
) -> None:
    """What the branch had already when the push began, the foreign commit changed: half of each would be nobody's model."""
    pushed("first")
    mixed = dict(hub.files(REPO)) | {"README.md": b"foreign"}
    hub.repos[REPO].commit("main", mixed)  # three files are as ours, one is not
    foreign = {name: b"foreign" for name in NAMES}
    hub.faults.append(Fault("commit/main", do=lambda: hub.repos[REPO].commit("main", dict(foreign)) and None))
    pushed("first")
    assert hub.files(REPO) == content(pieces(tmp_path, "first"))


def test_whoever_is_overtaken_again_and_again_says_so(hub: Hub, pushed: Callable[..., Pushed]) -> None:
    hub.make(REPO)
    numbers = iter(range(99))
    hub.faults.append(
        Fault("commit/main", do=lambda: hub.repos[REPO].commit("main", {"theirs": str(next(numbers)).encode()}) and None, times=99)
    )
    with pytest.raises(Overtaken, match=rf"somebody else pushed to main {OTHERS + 1} times.*as they left it"):
        pushed("first")
    assert hub.files(REPO) == {"theirs": str(OTHERS).encode()}


def test_two_at_once_leave_the_whole_of_one(hub: Hub, tmp_path: Path) -> None:
    hub.make(REPO)
    results: list[Pushed] = []
    sides = [
        threading.Thread(
            target=lambda mark=mark: results.append(
                push(Wanted(REPO, pieces(tmp_path, mark)), token=hub.token, tell=str, sleep=lambda _: None)
            )
        )
        for mark in ("first", "second")
    ]
    for one in sides:
        one.start()
    for one in sides:
        one.join()
    assert len(results) == 2 and len({one.commit for one in results}) == 2
    assert shows(hub, "first", tmp_path) or shows(hub, "second", tmp_path)
    assert all(set(files) - {".gitattributes"} in (set(), set(NAMES)) for files in hub.repos[REPO].commits.values())
