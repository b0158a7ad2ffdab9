"""Deletion requests served by an exact store: deleted, measured before and after, certified, killed anywhere, and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from jobs import PowerCut
from safetensors.torch import load_file
from test_requests import PEOPLE, SERVICE, SUITE, ask, certificates, everything_fits, states

from llm_unlearn.cli import main
from llm_unlearn.exact import measuring, pieces, verify
from llm_unlearn.exact.manifest import read as manifest_of
from llm_unlearn.exact.verify import problems
from llm_unlearn.reply import BUSY, DONE, UNFIT
from llm_unlearn.requests import service
from llm_unlearn.requests.certificate import read, signing_key
from llm_unlearn.requests.ledger import Ledger
from llm_unlearn.requests.records import ATTENTION, FULFILLED, PENDING, RUNNING
from llm_unlearn.requests.serving import Desk
from llm_unlearn.requests.stores import exact_ids, way_of
from llm_unlearn.spec import Refused

RECIPE = """\
output: store
model: {base: MODEL, adapter: {rank: 2, alpha: 4}}
data:
  forget: {source: people.jsonl, prompt: question, answer: answer, where: {id: 7}}
  retain: {source: people.jsonl, prompt: question, answer: answer, without: {id: 7}}
method: {name: sisa, shards: 2, slices: 2, id: id}
train: {epochs: 2, lr: 1.0e-2, window: {retain: 3}, checkpoint_every: 1}
"""
STORE = Path("store")


@pytest.fixture
def here(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a service whose recipe is of an exact method."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("LLM_UNLEARN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "people.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PEOPLE))
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("MODEL", str(tiny_base)))
    (tmp_path / "suite.yaml").write_text(SUITE)
    (tmp_path / "requests.yaml").write_text(SERVICE)
    return tmp_path


def desk(one_by_one: bool = False) -> Desk:
    office = service.load(Path("requests.yaml"))
    way = way_of(office, Path("cache"))
    return Desk(office, Ledger(office.ledger, "ada@here"), way, signing_key(Path("config/llm_unlearn")), one_by_one=one_by_one)


def weights() -> dict[str, torch.Tensor]:
    return load_file(STORE / "adapter" / "adapter_model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def values(run: str, name: str, title: str = "perplexity") -> dict[str, Any]:
    (path,) = Path("runs/requests").glob(f"{run}-*/evaluation.json")
    numbers = json.loads(path.read_text())["numbers"]
    found = next(one["values"] for one in numbers if (one["set"], one["title"]) == (name, title))
    return {column: one["value"] for column, one in found.items()}


def test_requests_are_served_one_after_the_other_and_certified(here: Path) -> None:
    ask(0)
    one = desk()
    assert one.ledger.request(1).model == "store" and one.serve() == DONE and states(one) == {1: FULFILLED}
    first = weights()
    certificate = read(certificates(one.ledger)[1, 1], "")
    store = certificate["run"]["store"]
    assert certificate["run"]["way"] == "store" and "none depends on a deleted row" in store["checked"]
    assert [row["rows"] for row in store["deletions"]] == [1] and store["deletions"] == manifest_of(STORE).deletions
    base, before = certificate["weights"]["before"]
    assert base["place"] == "elsewhere" and base["files"]["model.safetensors"]
    assert before["files"]["adapter_model.safetensors"] != certificate["weights"]["after"]["files"]["adapter_model.safetensors"]
    ask(1)
    ask(2)
    assert one.serve() == DONE and set(states(one).values()) == {FULFILLED} and problems(STORE) == []
    assert not same(first, weights()) and len(manifest_of(STORE).deletions) == 2
    assert values("run-2", "forget_1")["before"] == values("run-1", "forget_1")["after"], "the first is measured again"
    assert everything_fits(one) == [], "the first certificate's weights were replaced by a later deletion"
    assert set(certificates(one.ledger)) == {(1, 1), (1, 2), (2, 2), (3, 2)}
    kept = [path for path in here.rglob("*") if path.is_file() and path.name != "people.jsonl"]
    for row in PEOPLE[:3]:
        assert not any(str(row["person"]).encode() in path.read_bytes() for path in kept)
    assert not list(here.rglob("*.scratch")) and {path.parent.name for path in here.rglob("adapter_model*")} == {"adapter"}


def test_a_store_of_several_adapters_is_certified_with_all_of_them(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "recipe.yaml").write_text((here / "recipe.yaml").read_text().replace("id: id", "id: id, aggregate: average"))
    ask(0)
    one = desk()
    assert one.serve() == DONE and states(one) == {1: FULFILLED} and everything_fits(one) == []
    certified = read(certificates(one.ledger)[1, 1], "")["weights"]["after"]["files"]
    assert certified == manifest_of(STORE).adapter and len(certified) == 5, "two adapters, and how they are combined"
    assert main(["requests", "model", "released"]) == 2 and "no one set of weights" in capsys.readouterr().err
    (STORE / "adapter" / "shard-2" / "adapter_model.safetensors").write_bytes(b"")
    assert any("adapter" in line for line in everything_fits(one))


def cut_at(where: str, patch: pytest.MonkeyPatch) -> None:
    """Let the power go: while the store is trained, before it is looked at, inside the deletion, when its numbers are written."""

    def cut(*given: Any, **named: Any) -> Any:
        raise PowerCut

    places: dict[str, tuple[Any, str]] = {
        "training": (pieces, "train"),
        "before": (measuring, "Looks"),
        "deleting": (pieces, "train"),
        "swept": (pieces, "sweep"),
        "after": (measuring, "results_of"),
        "written": (measuring, "keep_numbers"),
    }
    patch.setattr(*places[where], cut)


def test_killed_anywhere_it_goes_on_and_measures_the_model_before_only_before(here: Path) -> None:
    ask(0)
    one = desk()
    for where in ("training", "before", "deleting", "swept", "after", "written"):
        with pytest.MonkeyPatch.context() as patch:
            cut_at(where, patch)
            with pytest.raises(PowerCut):
                one.serve()
        if where == "before":
            whole, full = weights(), manifest_of(STORE)
            assert full.deleted == [] and problems(STORE) == [], "a store of which nothing is deleted"
    assert one.serve() == DONE and len(one.ledger.runs()) == len(manifest_of(STORE).deletions) == 1
    assert not same(whole, weights()) and problems(STORE) == []
    found = values("run-1", "forget_1")
    assert found["before"] < found["after"], "the perplexity of a row that was learnt rises when it goes"
    certificate = read(certificates(one.ledger)[1, 1], "")
    assert certificate["weights"]["before"][1]["files"]["adapter_model.safetensors"] == full.adapter["adapter_model.safetensors"]


def test_what_is_deleted_stays_deleted_whatever_its_thresholds_say(here: Path) -> None:
    """A request that does not come up to its thresholds: the store has changed all the same, and it is asked for again."""
    (here / "requests.yaml").write_text(SERVICE.replace("at_least: 1.5", "at_least: 1000000.0"))
    ask(0)
    one = desk()
    assert one.serve() == UNFIT and states(one) == {1: ATTENTION} and [run.state for run in one.ledger.runs()] == ["accepted"]
    first, before = weights(), values("run-1", "retain")["before"]
    (here / "requests.yaml").write_text(SERVICE.replace("1000000.0", "1.0"))
    assert main(["requests", "retry", "1"]) == 0
    one = desk()
    assert one.serve() == UNFIT and same(first, weights()) and len(manifest_of(STORE).deletions) == 1, "nothing is done twice"
    assert one.ledger.request(1).reason.endswith(f"at most 1 of before = {before:,.0f}"), "before the first request"


def test_a_store_that_does_not_verify_certifies_nothing(here: Path) -> None:
    ask(0)
    one = desk()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "problems", lambda store: ["a piece was changed"])
        assert one.serve() == UNFIT
    assert one.ledger.request(1).reason == "llm-unlearn verify store finds 1 problems" and certificates(one.ledger) == {}
    assert [run.state for run in one.ledger.runs()] == ["rejected"] and main(["requests", "retry", "1"]) == 0
    assert one.serve() == DONE and len(manifest_of(STORE).deletions) == 1
    learnt, gone = values("run-1", "forget_1")["before"], values("run-2", "forget_1")["before"]
    kept = read(certificates(one.ledger)[1, 2], "")
    assert learnt < gone == values("run-2", "forget_1")["after"] and kept["run"]["store"]["deletions"] == []


def test_a_store_that_is_lost_is_not_made_of_rows_that_were_deleted(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ask(0)
    assert desk().serve() == DONE
    STORE.rename("elsewhere")
    ask(1)
    assert main(["requests", "run"]) == 2
    assert "store: no store is there (looked from" in capsys.readouterr().err
    assert not STORE.exists() and states(desk()) == {1: FULFILLED, 2: PENDING}
    Path("elsewhere").rename(STORE)
    with FileLock(STORE / "manifest.lock"):
        assert main(["forget", "store", "--ids", "2"]) == BUSY
        assert "store: another process deletes rows from it" in capsys.readouterr().err and len(manifest_of(STORE).deleted) == 1
        assert main(["requests", "run"]) == BUSY and states(desk()) == {1: FULFILLED, 2: RUNNING}
    assert desk().serve() == DONE and len(desk().ledger.runs()) == 2


def test_a_store_is_released_and_checked(here: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ask(0)
    one = desk()
    assert one.serve() == DONE and main(["requests", "verify"]) == 0
    assert main(["requests", "model", "merged"]) == 0
    inside, layer = "base_model.model.model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj.weight"
    adapter = weights()
    update = adapter[f"{inside}.lora_B.weight"].double() @ adapter[f"{inside}.lora_A.weight"].double()
    expected = load_file(tiny_base / "model.safetensors")[layer].double() + 4 / 2 * update
    assert torch.allclose(load_file(here / "merged" / "model.safetensors")[layer].double(), expected, atol=1e-6)
    victim = next(STORE.rglob("weights.safetensors"))
    whole = victim.read_bytes()
    victim.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    capsys.readouterr()
    assert main(["requests", "verify"]) == 1 and f"store: {victim.relative_to(STORE)}" in capsys.readouterr().err
    assert main(["requests", "model", "again"]) == 2 and "was changed" in capsys.readouterr().err
    victim.write_bytes(whole)
    other = STORE / "adapter" / "adapter_config.json"
    other.write_text(other.read_text() + " ")
    assert main(["requests", "verify"]) == 1 and "weights store/adapter: not as it was certified" in capsys.readouterr().err


def test_rows_that_would_go_along_are_named(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A store that deletes by another column than requests name rows by."""
    rows = [{**row, "family": f"family {row['id'] // 4}"} for row in PEOPLE]
    (here / "people.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = (here / "recipe.yaml").read_text()
    (here / "recipe.yaml").write_text(text.replace("id: id}", "id: family}").replace("{id: 7}", "{family: family 1}"))
    assert main(["requests", "add", "--ids", "1"]) == 2
    said = capsys.readouterr().err
    assert "by column 'family', and rows 0, 2, 3 would go with these. Ask for all of them together" in said
    assert not (here / "requests.db").exists() and "Bo Crane" not in said
    office = service.load(Path("requests.yaml"))
    assert exact_ids(office, [0, 1, 2, 3]) == ["family 0"] and sorted(exact_ids(office, range(8))) == ["family 0", "family 1"]
    (here / "recipe.yaml").write_text(text.replace("id: id}", "id: famly}"))
    with pytest.raises(Refused, match="no column 'famly'; did you mean 'family'"):
        exact_ids(service.load(Path("requests.yaml")), [0])
    (here / "recipe.yaml").write_text(text.replace("without: {id: 7}", "where: {id: 6}"))
    with pytest.raises(Refused, match=r"rows 0: .*does not train on them"):
        exact_ids(service.load(Path("requests.yaml")), [0])
    (here / "recipe.yaml").write_text(text.replace("slices: 2, id: id}", "slices: 2}"))
    twice = [*PEOPLE, {**PEOPLE[2], "id": 9}]
    (here / "people.jsonl").write_text("".join(json.dumps(row) + "\n" for row in twice))
    with pytest.raises(Refused, match="by what they say, and rows 9 would go with these"):
        exact_ids(service.load(Path("requests.yaml")), [2])


@pytest.mark.parametrize(
    ("words", "said"), [(["--model", "elsewhere"], "requests are served by store"), (["--ids", "9"], "not in the data")]
)
def test_add_refuses(here: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["requests", "add", "--ids", "0", *words]) == 2 and said in capsys.readouterr().err


def test_a_suite_with_attacks_is_refused(here: Path) -> None:
    (here / "suite.yaml").write_text(f"{SUITE}attacks: [{{name: quantization, set: forget}}]\n")
    with pytest.raises(Refused, match="attack the store with llm-unlearn evaluate"):
        service.load(Path("requests.yaml"))


def test_a_run_that_did_not_finish_is_no_store(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        cut_at("training", patch)
        with pytest.raises(PowerCut):
            main(["run", "recipe.yaml"])
    ask(0)
    one = desk()
    assert one.serve() == UNFIT and "its run is not finished; go on with it" in one.ledger.request(1).reason
    assert main(["run", "recipe.yaml", "--resume"]) == 0 and main(["requests", "retry", "1"]) == 0
    assert one.serve() == DONE and len(manifest_of(STORE).deletions) == 2, "the recipe's forget set, then the request"


# ------------------------------------------------------------------------------------ a run's own evaluation, after `forget`


@pytest.fixture
def evaluated(here: Path) -> Path:
    """A finished run with an evaluation."""
    with (here / "recipe.yaml").open("a") as file:
        file.write("evaluation: suite.yaml\n")
    assert main(["run", "recipe.yaml"]) == 0
    return here


def told(folder: Path, column: str) -> dict[tuple[str, str], float]:
    numbers = json.loads((folder / "evaluation.json").read_text())["numbers"]
    return {(one["set"], one["title"]): one["values"][column]["value"] for one in numbers}


def looked_at(name: str, base: Path, gone: str) -> dict[tuple[str, str], float]:
    """What `evaluate` says of the run as it is now, on the rows that are left."""
    text = SUITE.replace("  retain: {source: people.jsonl,", f"  retain: {{source: people.jsonl, without: {{id: {gone}}},")
    Path(f"{name}.yaml").write_text(text)
    assert main(["evaluate", f"{name}.yaml", "--model", str(base), "--adapter", "store", "--output", name]) == 0
    return told(Path(name), "after")


def texts_of_rows(here: Path, *rows: int) -> list[Path]:
    kept = [path for path in (here / "store").rglob("*") if path.is_file()]
    return [path for path in kept if any(str(PEOPLE[row]["person"]).encode() in path.read_bytes() for row in rows)]


def test_forget_measures_before_and_after(evaluated: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert texts_of_rows(evaluated, 2), "the first evaluation shows rows"
    before = looked_at("earlier", tiny_base, "[7, 2]")
    assert main(["forget", "store", "--ids", "2"]) == 0
    assert "are of the adapter before and after this" in capsys.readouterr().out
    after = looked_at("later", tiny_base, "[7, 2]")
    found = [told(STORE, column) for column in ("before", "after")]
    assert found == [pytest.approx(before, rel=1e-6), pytest.approx(after, rel=1e-6)] and before != after
    assert texts_of_rows(evaluated, 2, 7) == [] and not (STORE / "evaluation.parquet").exists() and problems(STORE) == []
    results = json.loads((STORE / "evaluation.json").read_text())
    assert len(results["run"]["deletions"]) == 2 and results["suite_hash"] != json.loads(Path("later/evaluation.json").read_text())
    assert not list(STORE.glob("numbers_before*"))
    was = told(STORE, "after")
    assert main(["forget", "store", "--ids", "3", "--no-evaluation"]) == 0
    assert "are of the adapter before this" in capsys.readouterr().out and told(STORE, "after") == was
    left = [row for row in PEOPLE if row["id"] != 4]
    (evaluated / "people.jsonl").write_text("".join(json.dumps(row) + "\n" for row in left))
    assert main(["forget", "store", "--ids", "5"]) == 2 and "1 rows of this run are not in its data" in capsys.readouterr().err
    assert main(["forget", "store", "--ids", "4"]) == 0 and len(manifest_of(STORE).deleted) == 4, "a row that left the data before"
    assert problems(STORE) == []


def test_a_measured_deletion_that_was_cut_off_goes_on(evaluated: Path) -> None:
    for where, deleted in (("before", 1), ("deleting", 2), ("after", 2), ("written", 2)):
        with pytest.MonkeyPatch.context() as patch:
            cut_at(where, patch)
            with pytest.raises(PowerCut):
                main(["forget", "store", *(["--ids", "2"] if where in ("before", "deleting") else [])])
        assert len(manifest_of(STORE).deleted) == deleted
        assert deleted == 1 or texts_of_rows(evaluated, 2) == []
    assert main(["forget", "store"]) == 0 and len(manifest_of(STORE).deletions) == 2 and problems(STORE) == []
    assert told(STORE, "before") != told(STORE, "after") and not list(STORE.glob("numbers_before*"))


def test_what_cannot_be_measured_is_not_deleted(evaluated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = json.loads((STORE / "evaluation.json").read_text())
    results["suite_settings"]["sets"]["forget"]["source"] = "gone.jsonl"
    (STORE / "evaluation.json").write_text(json.dumps(results))
    assert main(["forget", "store", "--ids", "2"]) == 2
    said = capsys.readouterr().err
    assert "gone.jsonl" in said and "--no-evaluation deletes without measuring" in said and len(manifest_of(STORE).deleted) == 1
