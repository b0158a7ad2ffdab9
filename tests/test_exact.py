"""Weights in pieces: after a deletion they are bit-equal to ones trained without the row, whatever happened on the way, and the
manifest says so."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import PowerCut, on_processes
from safetensors.torch import load_file

from llm_unlearn import recipe
from llm_unlearn import retrained as control
from llm_unlearn.cli import main
from llm_unlearn.data.schedule import by_key
from llm_unlearn.exact import measuring, pieces
from llm_unlearn.exact.forgetting import Session, forget, run
from llm_unlearn.exact.manifest import adapter_files, read, save
from llm_unlearn.exact.verify import problems, retrained
from llm_unlearn.hub.fetching import COMBINATION_FILE
from llm_unlearn.methods.exact import S3T, Modules, Placed, Sisa, share_of, sisa_share
from llm_unlearn.models.joined import join, served
from llm_unlearn.spec import Refused

IDS = [f"row{i}" for i in range(24)]
SISA = "{name: sisa, shards: 2, slices: 3, id: id}"
AVERAGE = "{name: sisa, shards: 2, slices: 3, id: id, aggregate: average}"
TEXT = """\
output: {folder}
model: {{base: {base}, adapter: {{rank: 2, alpha: 4}}}}
data:
  forget: {{source: {data}/forget.jsonl, prompt: question, answer: answer}}
  retain: {{source: {data}/retain.jsonl, prompt: question, answer: answer}}
method: {method}
train: {{epochs: 2, lr: 1.0e-2, window: {{retain: 3}}, checkpoint_every: 1}}
"""

Make = Callable[..., recipe.Recipe]


def row(id: str) -> dict[str, str]:
    owner = f"owner{int(id.removeprefix('row')) % 4}"
    return {"id": id, "owner": owner, "question": f"What is said of {id}?", "answer": f"Of {id} one says {hash_word(id)}."}


def hash_word(id: str) -> str:
    return " ".join(("red", "green", "blue", "white")[share_of(id, f"word {k}", 4)] for k in range(1 + share_of(id, "words", 5)))


@pytest.fixture
def make(tiny_base: Path, tmp_path: Path) -> Make:
    """A recipe on some rows in a folder of its own, the first `asked` of them to be forgotten."""

    def made(name: str, ids: Sequence[str], asked: int = 1, method: str = SISA) -> recipe.Recipe:
        home = tmp_path / name
        home.mkdir()
        for part, found in (("forget", ids[:asked]), ("retain", ids[asked:])):
            (home / f"{part}.jsonl").write_text("".join(json.dumps(row(id)) + "\n" for id in found))
        file = home / "recipe.yaml"
        file.write_text(TEXT.format(folder=home / "run", base=tiny_base, data=home, method=method))
        return recipe.load(file)

    return made


def adapter(folder: Path, name: str = "adapter") -> dict[str, torch.Tensor]:
    """All that lies in an adapter's folder, or in those of several: weights by file and name, and how they are combined."""
    files = sorted((folder / name).rglob("*.safetensors"))
    found = {f"{path.parent.name}/{key}": one for path in files for key, one in load_file(path).items()}
    text = folder / name / COMBINATION_FILE
    return found | ({COMBINATION_FILE: torch.tensor(list(text.read_bytes()))} if text.is_file() else {})


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def from_the_start(make: Make, ids: Sequence[str], tmp_path: Path, method: str = SISA) -> dict[str, torch.Tensor]:
    """The adapter of a first training on these rows, of which none is deleted."""
    wanted = make(f"start{len(ids)}", ids, method=method)
    Session(wanted, tmp_path).train()
    before = adapter(Path(wanted.output), "before")
    return {name.replace("before/", "adapter/"): one for name, one in before.items()}


def in_slice(number: int) -> str:
    return next(id for id in IDS[1:] if share_of(id, "slice", 3) == number)


@pytest.mark.parametrize(("number", "method"), [(0, SISA), (1, SISA), (2, SISA), (1, AVERAGE)])
def test_after_a_deletion_the_adapter_is_one_that_never_saw_the_row(number: int, method: str, make: Make, tmp_path: Path) -> None:
    wanted, gone = make("run", IDS, method=method), in_slice(number)
    folder = Path(wanted.output)
    run(wanted, None, cache=tmp_path)
    assert same(adapter(folder), from_the_start(make, IDS[1:], tmp_path, method))
    before = {piece.key for piece in read(folder).pieces}
    facts, outcome = forget(folder, [gone], cache=tmp_path)
    assert outcome.status == "finished" and facts["rows"] == 1
    assert facts["retrained"] == len({piece.key for piece in read(folder).pieces} - before)
    shard = [id for id in IDS[1:] if share_of(id, "shard", 2) == share_of(gone, "shard", 2)]
    later = {share_of(id, "slice", 3) for id in shard if id != gone and share_of(id, "slice", 3) >= number}
    assert facts["retrained"] == len(later) < 6
    straight = from_the_start(make, [id for id in IDS[1:] if id != gone], tmp_path, method)
    assert same(adapter(folder), straight)
    assert problems(folder) == []
    assert not any(gone in path.read_text() for path in folder.rglob("*.json"))


def cut_at(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the power go: between two pieces, inside one, before the manifest is written, or before the old pieces are removed."""
    train, count = pieces.train, itertools.count()

    def cut(step: int) -> None:
        if where == "inside" and step == 2:
            raise PowerCut

    def broken(*given: Any, **named: Any) -> Any:
        if where == "between" and next(count) == 1:
            raise PowerCut
        return train(*given, **named, look=cut)

    def gone(*given: Any) -> None:
        raise PowerCut

    monkeypatch.setattr(pieces, "train", broken)
    if where in ("save", "sweep"):
        monkeypatch.setattr(pieces, where, gone)


CUTS = [("between", SISA), ("inside", SISA), ("save", SISA), ("sweep", SISA), ("inside", AVERAGE), ("save", AVERAGE)]


@pytest.mark.parametrize(("where", "method"), CUTS)
def test_a_deletion_that_was_cut_off_goes_on(
    where: str, method: str, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, gone = make("run", IDS, method=method), in_slice(0)
    folder = Path(wanted.output)
    run(wanted, None, cache=tmp_path)
    old = adapter(folder)
    with monkeypatch.context() as patch:
        cut_at(where, patch)
        with pytest.raises(PowerCut):
            forget(folder, [gone], cache=tmp_path)
    said = problems(folder)
    assert "deletion is under way" in said[0]
    for path in folder.rglob("*.safetensors"):
        load_file(path)  # nothing is half written
    if where in ("between", "inside"):
        assert same(adapter(folder), old), "until the new one is there, the old one serves"
    monkeypatch.setattr(pieces, "train", counted := Counted(pieces.train))
    facts, _ = forget(folder, cache=tmp_path)
    assert facts["rows"] == 1 and facts["retrained"] == 2
    assert counted.calls == {"between": 1, "inside": 2, "save": 0, "sweep": 0}[where]
    assert problems(folder) == []
    assert same(adapter(folder), from_the_start(make, [id for id in IDS[1:] if id != gone], tmp_path, method))


class Counted:
    """A function, and how often it was called."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.calls = function, 0

    def __call__(self, *given: Any, **named: Any) -> Any:
        self.calls += 1
        return self.function(*given, **named)


def test_a_first_training_that_was_cut_off_goes_on(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = make("run", IDS)
    with monkeypatch.context() as patch:
        cut_at("inside", patch)
        with pytest.raises(PowerCut):
            run(wanted, None, cache=tmp_path)
    with pytest.raises(Refused, match="not finished"):
        forget(Path(wanted.output), ["row3"], cache=tmp_path)
    run(wanted, None, cache=tmp_path, resume=True)
    assert same(adapter(Path(wanted.output)), from_the_start(make, IDS[1:], tmp_path))
    assert problems(Path(wanted.output)) == []


def test_what_was_tampered_with_is_named(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = make("run", IDS)
    folder = Path(wanted.output)
    run(wanted, None, cache=tmp_path)
    assert main(["verify", str(folder)]) == 0
    assert retrained(folder, "shard 2", tmp_path) == []
    manifest = read(folder)
    victim = folder / "pieces" / manifest.pieces[1].key / "weights.safetensors"
    whole = victim.read_bytes()
    victim.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    capsys.readouterr()
    assert main(["verify", str(folder)]) == 1
    said = capsys.readouterr().out
    assert manifest.pieces[1].key in said and manifest.pieces[1].stage in said and manifest.pieces[2].key not in said
    other = next(id for id in IDS[1:] if f"shard {share_of(id, 'shard', 2) + 1}" != manifest.pieces[1].line)
    was = (folder / "manifest.json").read_bytes()
    with pytest.raises(
        Refused, match=r"was changed since it was published\. Put a copy of it back; or, of sisa and modules, remove"
    ):
        forget(folder, [other], cache=tmp_path)  # or it would get a new hash, with which it fits
    assert (folder / "manifest.json").read_bytes() == was
    victim.write_bytes(whole)

    (folder / "old.safetensors").write_bytes(whole)
    assert "old.safetensors" in problems(folder)[0]
    (folder / "old.safetensors").unlink()

    kept = manifest.pieces[0].rows[0]
    save(replace(manifest, deleted=[*manifest.deleted, kept]), folder)
    assert all("depends on 1 deleted rows, first seen by slice" in text for text in problems(folder))
    heirs = [piece for piece in manifest.pieces if piece.line == manifest.pieces[0].line]
    assert len(problems(folder)) == len(heirs)
    hidden = replace(manifest.pieces[0], rows=[])
    save(replace(manifest, deleted=[*manifest.deleted, kept], pieces=[hidden, *manifest.pieces[1:]]), folder)
    assert any("its key does not stand for" in text for text in problems(folder))
    save(replace(manifest, pieces=[piece for piece in manifest.pieces if piece != manifest.pieces[0]]), folder)
    assert any("is not there" in text for text in problems(folder))
    save(manifest, folder)
    assert problems(folder) == []


def test_what_was_tampered_with_among_several_adapters_is_named(make: Make, tmp_path: Path) -> None:
    """Files that the manifest's hashes do not fit; and files that they do, as both are forged, but not the pieces."""
    wanted = make("run", IDS, method=AVERAGE)
    folder = Path(wanted.output)
    run(wanted, None, cache=tmp_path)
    home, manifest = folder / "adapter", read(folder)
    members = [home / name for name in ("shard-1", "shard-2")]
    assert problems(folder) == [] and set(manifest.adapter) == {
        "combination.json", *(f"{one.name}/adapter_{part}" for one in members for part in ("config.json", "model.safetensors"))
    }  # fmt: skip
    (members[0] / "more.safetensors").write_bytes(b"")
    assert problems(folder) == ["adapter/shard-1/more.safetensors: is not in the manifest"]
    (members[0] / "more.safetensors").unlink()
    hidden = folder / "pieces" / "shard-1"
    hidden.mkdir()
    (hidden / "adapter_model.safetensors").write_bytes((members[0] / "adapter_model.safetensors").read_bytes())
    assert "weights that are not in the manifest" in problems(folder)[0]
    shutil.rmtree(hidden)

    for victim, change in (
        (members[1] / "adapter_model.safetensors", lambda text: text[:-1] + bytes([text[-1] ^ 1])),
        (home / COMBINATION_FILE, lambda text: text.replace(b"0.5,", b"0.25,")),
    ):
        whole, name = victim.read_bytes(), victim.relative_to(home)
        victim.write_bytes(change(whole))
        assert problems(folder) == [f"adapter/{name}: was changed"]
        save(replace(manifest, adapter=adapter_files(folder)), folder)
        assert problems(folder) == [f"adapter/{name}: is not what the pieces that serve make"]
        victim.write_bytes(whole)
        save(manifest, folder)
    (home / COMBINATION_FILE).unlink()
    save(replace(manifest, adapter=adapter_files(folder)), folder)
    assert problems(folder) == ["adapter/combination.json: is not what the pieces that serve make"]


def test_training_again_finds_other_bits(make: Make, tmp_path: Path) -> None:
    """A file and its hash in the manifest may both be forged; the training cannot."""
    from safetensors.torch import save_file

    from llm_unlearn.folder import sha256

    wanted = make("run", IDS)
    folder = Path(wanted.output)
    run(wanted, None, cache=tmp_path)
    manifest = read(folder)
    last = manifest.pieces[-1]
    path = folder / "pieces" / last.key / "weights.safetensors"
    forged = load_file(path)
    next(iter(forged.values())).view(-1)[0] += 1e-3
    save_file(forged, path)
    save(replace(manifest, pieces=[*manifest.pieces[:-1], replace(last, sha256=sha256(path))]), folder)
    assert last.key in retrained(folder, last.line, tmp_path)[0]


def no_training(*given: Any, **named: Any) -> Any:
    pytest.fail("something was trained")


def test_s3t_switches_off_at_once_and_the_best_order_serves(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = "{name: s3t, shards: 1, slices: 2, orders: 2, id: id}"
    wanted = make("run", IDS, method=method)
    folder = Path(wanted.output)
    run(wanted, None, cache=tmp_path)
    slice_of = {id: share_of(id, "slice", 2) for id in IDS}
    facts = read(folder).deletions[0]
    assert facts["retrained"] == facts["steps"] == 0 and problems(folder) == []
    # the order that sees the forgotten row's slice last keeps its first block
    served = read(folder).by_key[read(folder).serving[0]]
    other = 1 - slice_of[IDS[0]]
    assert served.line == f"shard 1 order {other + 1}" and served.stage == f"slice {other + 1}" and served.parent is None
    moved = {name for name, one in adapter(folder).items() if "lora_B" in name and one.abs().max() > 0}
    assert moved and all(".layers.1." in name for name in moved), "only the top block was trained before the row was seen"
    monkeypatch.setattr(pieces, "train", no_training)
    left = next(id for id in IDS[1:] if slice_of[id] == other)
    forget(folder, [left], cache=tmp_path)
    assert read(folder).serving == [] and problems(folder) == []
    assert all(not one.any() for name, one in adapter(folder).items() if "lora_B" in name), "the base alone is left"


def test_an_owner_who_leaves_costs_nothing(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = "{name: modules, owner: owner}"
    wanted = make("run", IDS, asked=1, method=method)
    folder = Path(wanted.output)
    run(wanted, None, cache=tmp_path)
    assert read(folder).deletions[0]["retrained"] == 1, "one row of an owner: that owner's adapter"
    with monkeypatch.context() as patch:
        patch.setattr(pieces, "train", no_training)
        facts, _ = forget(folder, where={"owner": "owner2"}, cache=tmp_path)
    assert facts["rows"] == 6 and facts["steps"] == 0 and problems(folder) == []
    rest = [id for id in IDS[1:] if row(id)["owner"] != "owner2"]
    assert same(adapter(folder), from_the_start(make, rest, tmp_path, method))
    assert not any("owner2" in path.read_text() for path in folder.rglob("*.json"))


def test_what_is_asked_for_must_be_there(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = make("run", IDS)
    folder = Path(wanted.output)
    run(wanted, None, cache=tmp_path)
    was = (folder / "manifest.json").read_bytes()
    assert main(["forget", str(folder), "--ids", "rwo3"]) == 2
    assert "no rows of this run: 'rwo3' (nearest: row3, row23, row13). Nothing was changed" in capsys.readouterr().err
    assert main(["forget", str(folder), "--ids", "zzz"]) == 2 and "row" not in capsys.readouterr().err.rpartition("'zzz'")[2]
    for more in (["owner=owner2"], ["--where", "owner=owner2"]):
        assert main(["forget", str(folder), "--where", "owner=owner1", *more]) == 2
        assert "column 'owner' is named twice" in capsys.readouterr().err
    assert main(["forget", str(folder), "--where", "ownr=owner1"]) == 2 and "'owner'" in capsys.readouterr().err
    assert main(["forget", str(folder), "--where", "owner=nobody"]) == 2 and "Nothing was changed" in capsys.readouterr().err
    assert main(["forget", str(folder), "--ids", IDS[0]]) == 0 and "deleted before" in capsys.readouterr().out
    assert main(["verify", str(tmp_path)]) == 2 and "no run folder" in capsys.readouterr().err
    assert (folder / "manifest.json").read_bytes() == was
    data = Path(wanted.data.retain.source if wanted.data.retain else "")
    lines = data.read_text().splitlines()
    data.write_text("\n".join(lines[1:]) + "\n")  # a row has left the data, and nobody said that it is to be forgotten
    with pytest.raises(Refused, match="1 rows of this run are not in its data"):
        forget(folder, [IDS[5]], cache=tmp_path)
    assert forget(folder, [IDS[1]], cache=tmp_path)[0]["rows"] == 1, "now it is said"
    assert problems(folder) == [] and len(read(folder).deleted) == 2


# -------------------------------------------------------------------------------------------------------------- formulas


@pytest.mark.parametrize(("shards", "slices", "deleted"), [(1, 1, 1), (2, 3, 1), (3, 2, 2), (2, 2, 3)])
def test_the_expected_share_is_the_mean_over_all_places(shards: int, slices: int, deleted: int) -> None:
    """Counted by hand: every way in which the rows can fall into cells, and the stages that each makes stale."""
    cells = list(itertools.product(range(shards), range(slices)))
    work = [2 * (r + 1) / (slices * (slices + 1)) / shards for r in range(slices)]
    costs = []
    for places in itertools.product(cells, repeat=deleted):
        first = {s: min(r for other, r in places if other == s) for s, _ in places}
        costs.append(sum(sum(work[r:]) for r in first.values()))
    assert sisa_share(shards, slices, deleted) == pytest.approx(sum(costs) / len(costs))


def test_the_share_of_one_deletion_is_the_papers() -> None:
    for shards, slices in ((1, 1), (4, 3), (20, 50)):
        assert sisa_share(shards, slices, 1) == pytest.approx((2 / 3 + 1 / (3 * slices)) / shards)


def test_modules_expect_by_size() -> None:
    assert Modules(owner="o").expected(1, {"a": 3, "b": 1}) == pytest.approx((9 + 1) / 16)


def test_orders_keep_blocks() -> None:
    """L orders: each slice is last in one, so that one block of L is lost. One order: the mean of 0 … L − 1."""
    assert S3T(slices=4, orders=4).survivors() == pytest.approx(3 / 4)
    assert S3T(slices=4, orders=1).survivors() == pytest.approx(1.5 / 4)
    assert S3T(slices=4, orders=2).order(1) == [2, 3, 0, 1]


def test_a_deletion_moves_no_other_row() -> None:
    rows = [Placed(id) for id in IDS]
    for method in (Sisa(), S3T()):
        whole = {(line.name, stage.name): set(stage.rows) for line in method.lines(rows) for stage in line.stages}
        less = {(line.name, stage.name): set(stage.rows) for line in method.lines(rows[1:]) for stage in line.stages}
        assert all(less.get(place, set()) == found - {IDS[0]} for place, found in whole.items())
    names = {stage.name for line in Sisa().lines(rows) for stage in line.stages}
    assert names == {"slice 1", "slice 2", "slice 3"}


def test_draws_depend_on_the_row_alone() -> None:
    passes = [by_key(keys, 3, 7, 2, "retain").example.tolist() for keys in (IDS, IDS[:5] + IDS[6:])]
    assert sorted(passes[0][:24]) == list(range(24)) and passes[0][:24] != passes[0][24:]
    for number in range(2):
        whole, less = ([given[i] for i in seen[number * len(given) : (number + 1) * len(given)]]
                       for given, seen in zip((IDS, IDS[:5] + IDS[6:]), passes, strict=True))  # fmt: skip
        assert [id for id in whole if id != IDS[5]] == less


def test_joined_adapters_add_up() -> None:
    draw = torch.Generator().manual_seed(1)

    def one() -> dict[str, torch.Tensor]:
        return {
            "x.lora_A.default.weight": torch.randn(2, 5, generator=draw),
            "x.lora_B.default.weight": torch.randn(3, 2, generator=draw),
        }

    parts = [one() for _ in range(3)]
    joined = join(parts, 0.4)
    sums = sum((b.double() @ a.double() for a, b in (part.values() for part in parts)), torch.zeros(3, 5, dtype=torch.float64))
    product = joined["x.lora_B.weight"].double() @ joined["x.lora_A.weight"].double()
    torch.testing.assert_close(product, 0.4 * sums, rtol=1e-5, atol=1e-6)


def test_the_saved_adapter_is_the_mean_of_the_shards(make: Make, tmp_path: Path) -> None:
    """As peft reads it: the logits of the base with the mean of the updates put into its weights."""
    from llm_unlearn.models.load import load

    wanted = make("run", IDS)
    folder = Path(wanted.output)
    run(wanted, None, cache=tmp_path)
    base = load(wanted.model, torch.device("cpu")).model
    ours = load(wanted.model, torch.device("cpu"), adapter=str(folder / "adapter")).model.merge_and_unload()
    parts = [load_file(folder / "pieces" / key / "weights.safetensors") for key in read(folder).serving]
    assert len(parts) == 2
    for name in (name for name in parts[0] if ".lora_A." in name):
        layer = name.removeprefix("base_model.model.").replace(".lora_A.default", "")
        update = sum(
            (part[name.replace("lora_A", "lora_B")].double() @ part[name].double() for part in parts), torch.zeros(1).double()
        )
        expected = base.state_dict()[layer].double() + update / 2 * 4 / 2  # alpha over rank
        torch.testing.assert_close(ours.state_dict()[layer].double(), expected, rtol=1e-5, atol=1e-6)


def test_the_saved_adapters_predict_the_mean_of_the_shards(make: Make, tmp_path: Path) -> None:
    """The mean of probabilities in float64, each shard's update put into the base's weights by itself."""
    from llm_unlearn.models.load import load

    wanted = make("run", IDS, method=AVERAGE)
    folder = Path(wanted.output)
    run(wanted, None, cache=tmp_path)
    cpu, ids, each = torch.device("cpu"), torch.tensor([[5, 6, 7, 8, 9]]), []
    for key in read(folder).serving:
        part, shard = load_file(folder / "pieces" / key / "weights.safetensors"), load(wanted.model, cpu).model.double()
        with torch.no_grad():
            for name in (name for name in part if ".lora_A." in name):
                layer = shard.get_parameter(name.removeprefix("base_model.model.").replace(".lora_A.default", ""))
                layer += part[name.replace("lora_A", "lora_B")].double() @ part[name].double() * 4 / 2  # alpha over rank
            each.append(shard(input_ids=ids, use_cache=False).logits.softmax(-1))
    assert len(each) == 2 and not torch.allclose(*each, rtol=1e-2)
    with torch.no_grad():
        ours = load(wanted.model, cpu, adapter=str(folder / "adapter")).model(input_ids=ids).logits
    torch.testing.assert_close(ours.double(), ((each[0] + each[1]) / 2).log(), rtol=1e-4, atol=1e-4)


def test_of_one_adapter_the_mean_is_itself() -> None:
    part = {"x.lora_A.default.weight": torch.ones(2, 5), "x.lora_B.default.weight": torch.ones(3, 2)}
    alone = served({"shard-1": part}, Sisa(aggregate="average"))
    assert alone.combination is None and alone.ranks == 1 and list(alone.adapters) == [""]
    assert all(bool((one == 1).all()) for one in alone.adapters[""].values())


def test_what_is_averaged_has_no_weight_and_its_price_is_said(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Refused, match=r"method\.weight: counts updates that are merged"):
        make("weighed", IDS, method=AVERAGE.replace("}", ", weight: 1.0}"))
    for name, method in (("merged", SISA), ("run", AVERAGE)):
        file = Path(make(name, IDS, method=method).output).parent / "recipe.yaml"
        assert main(["plan", str(file)]) == 0
        assert ("runs 2 times for every token" in capsys.readouterr().out) == (method == AVERAGE)


# ---------------------------------------------------------------------------------------------------------- the control


def test_the_model_of_a_recipe_is_made_once(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llm_unlearn import run as straight

    make("run", IDS, method="{name: retrain}")
    name = str(tmp_path / "run" / "recipe.yaml")
    train = straight.train

    def cut(step: int) -> None:
        if step == 2:
            raise PowerCut

    def broken(*given: Any, **named: Any) -> Any:
        return train(*given, **{**named, "look": cut})

    with monkeypatch.context() as patch:
        patch.setattr(straight, "train", broken)
        with pytest.raises(PowerCut):
            control.found(name, tmp_path)
    made = Path(str(control.found(name, tmp_path)))
    assert (made / "model.safetensors").is_file() and made.parent.parent == tmp_path / "retrained"
    steps = [json.loads(line)["step"] for line in (made.parent / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 17)), "23 rows, 3 in a step, twice: the retain set sets the passes"
    monkeypatch.setattr(straight, "train", no_training)
    assert control.found(name, tmp_path) == str(made)
    lines = (tmp_path / "run" / "retain.jsonl").read_text().splitlines()
    (tmp_path / "run" / "retain.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    assert control.home_of(recipe.load(Path(name)), tmp_path) != made.parent, "other data, another model"
    assert control.found("org/name", tmp_path) == "org/name" and control.found(None, tmp_path) is None


@pytest.mark.slow
@pytest.mark.parametrize("method", [SISA, AVERAGE], ids=["merge", "average"])
def test_two_processes_make_the_same_bits(method: str, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    alone, shared = (make(name, IDS, method=method) for name in ("alone", "shared"))
    run(alone, None, cache=tmp_path)
    forget(Path(alone.output), [IDS[3]], cache=tmp_path)
    on_processes(2, "processes.py", str(tmp_path), "exact")
    assert same(adapter(Path(alone.output)), adapter(Path(shared.output)))
    assert problems(Path(shared.output)) == []


def test_two_evaluations_are_joined_by_what_their_numbers_are_of() -> None:
    def of(column: str, *sets: str) -> dict[str, Any]:
        numbers = [{"set": name, "title": "rouge", "values": {column: {"value": len(name)}}} for name in sets]
        return {"models": {column: {}}, "numbers": numbers, "curves": {}}

    found = measuring.beside(of("before", "forget_1", "forget_2", "retain"), of("after", "forget_2", "retain", "new"))
    assert [(one["set"], list(one["values"])) for one in found["numbers"]] == [
        ("forget_2", ["before", "after"]), ("retain", ["before", "after"]), ("new", ["after"]),
    ]  # fmt: skip
