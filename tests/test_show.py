"""`llm-unlearn show`: what a folder is and where it stands, while others write it, and after they ended in any way."""

from __future__ import annotations

import contextlib
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from jobs import RECIPE
from rich.console import Console

from llm_unlearn import at_work, cli, durable
from llm_unlearn.at_work import AtWork
from llm_unlearn.at_work import at_work as working
from llm_unlearn.following import command
from llm_unlearn.following.standing import standing
from llm_unlearn.report.standing import print_standing, size, spark
from llm_unlearn.spec import Refused

RESULTS = {
    "title": "runs/x", "suite": "eval/quick.yaml", "suite_hash": "0", 
    "models": {name: {"name": name, "identity": "0"} for name in ("before", "after", "retrained")},
    "run": {"status": "finished", "reason": "the aim is reached at step 90", "steps": 90, "kept_step": 90},
    "numbers": [{
        "set": "forget", "title": "probability", "measure": "probability", "goal": "as retrained", "knowing": "raises",
        "settings": {}, "definition": "",
        "values": {"before": {"value": 0.99}, "after": {"value": 0.5}, "retrained": {"value": 0.51}},
    }],
    "curves": {}, "answers": {},
}  # fmt: skip


def run_folder(place: Path, rows: int = 90, more: str = "") -> Path:
    """A run folder as it is while the run is under way: its last line is half written."""
    place.mkdir(parents=True)
    text = RECIPE.replace("runs/x", str(place))
    (place / "recipe.yaml").write_text(f"# hash 0123456789abcdef\n# python 3\n{text}{more}", encoding="utf-8")
    lines = []
    for i in range(rows):
        row = {"step": i + 1, "lr": 1e-3, "forget": 3 - i / 90, "retain": "nan" if i == 5 else 0.25, "grad_norm": 0.5}
        looked = {"retain_perplexity": 1.0 + i} if i % 10 == 9 else {}
        lines.append(row | {"tokens": 400, "seconds": 0.2} | looked)
    (place / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines) + '{"step": 91, "lr": 0.0', encoding="utf-8")
    return place


def process(folder: Path, **changes: Any) -> None:
    mine = {"pid": os.getpid(), "began": psutil.Process().create_time(), "host": platform.node(), "steps": 120, "how": "running"}
    (folder / "process.json").write_text(json.dumps(mine | changes), encoding="utf-8")


def shown(facts: dict[str, Any], results: dict[str, Any] | None = None, encoding: str = "utf-8") -> str:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
    print_standing(facts, results, Console(file=file, width=80))
    file.seek(0)
    text = file.read()
    told, _, leads_on = text.partition("\nnext")  # a command is not broken into lines
    assert max(len(line) for line in told.splitlines()) <= 80 and bool(facts["next"]) == bool(leads_on)
    return text


def test_a_run_under_way(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "a")
    process(folder)
    facts = standing(folder)
    assert (facts["kind"], facts["state"], facts["hash"]) == ("run", "training", "0123456789abcdef")
    assert facts["objective"] == {"forget": "npo", "retain": "nll"} and (facts["step"], facts["steps"]) == (90, 120)
    assert facts["seconds_left"] == pytest.approx(6) and facts["tokens_per_second"] == pytest.approx(2000)
    assert facts["last"] == {"forget": pytest.approx(3 - 89 / 90), "retain": 0.25, "grad_norm": 0.5, "retain_perplexity": 90.0}
    assert len(facts["curves"]["forget"]) == 40 and facts["curves"]["retain_perplexity"] == [10.0 * i for i in range(1, 10)]
    assert facts["next"] == [f"llm-unlearn show {folder} --follow"]
    text = shown(facts | {"age": 1.0})
    course = "90 of 120, 0.200 s each, 2,000 tokens/s, 6 s left"
    for words in ("under way: training", course, "▁", "log.jsonl", "retain perplexity"):
        assert words in text, words
    plain = shown(facts, encoding="ascii")
    assert "#" in plain and "▁" not in plain


def test_the_weights_that_are_saved_say_that_it_is_being_measured(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "a")
    process(folder)
    (folder / "adapter").mkdir()
    assert standing(folder)["state"] == "measuring"
    (folder / "log.jsonl").unlink()
    (folder / "adapter").rmdir()
    assert standing(folder)["state"] == "beginning" and shown(standing(folder))


@pytest.mark.parametrize(
    ("changes", "state", "words"),
    [
        ({"how": "interrupted"}, "interrupted", "interrupted"),
        ({"how": "failed", "reason": "OutOfMemoryError"}, "failed", "failed (OutOfMemoryError; its words stand where it ran)"),
        ({"began": 1.0}, "killed", "killed: its process is gone"),
        ({"pid": 2**22 + 1}, "killed", "killed: its process is gone"),
        ({"host": "another"}, "training", "on another, as far as its files say"),
        (None, "unfinished", "not finished"),
    ],
)
def test_how_a_run_ended_early(changes: dict[str, Any] | None, state: str, words: str, tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "a")
    if changes is not None:
        process(folder, **changes)
    facts = standing(folder)
    assert facts["state"] == state and words in shown(facts)
    if state != "training":
        assert facts["next"] == [f"llm-unlearn run {folder / 'recipe.yaml'} --resume"] and facts["seconds_left"] is None
        moved = folder.rename(tmp_path / "b c")
        assert standing(moved)["next"] == [f"llm-unlearn run '{moved}/recipe.yaml' output='{moved}' --resume"]


def test_a_finished_run_with_its_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_folder(tmp_path / "a", more="evaluation: {suite: eval/quick.yaml}\n")
    (folder / "adapter").mkdir()
    assert standing(folder)["state"] == "unfinished"
    (folder / "evaluation.json").write_text(json.dumps(RESULTS), encoding="utf-8")
    facts = standing(folder)
    assert facts["state"] == "finished" and facts["steps"] == 90
    assert facts["next"][0] == f"open {folder}/report.html" and f"llm-unlearn push {folder} --repo-id USER/NAME" in facts["next"]
    text = shown(facts, RESULTS)
    assert "finished, finished: the aim is reached at step 90" in text and "probability" in text and "as retrained" in text
    assert cli.main(["show", str(folder), "--json"]) == 0
    found = capsys.readouterr()
    assert json.loads(found.out)["headline"] == facts["headline"] and "probability" in found.err


def test_a_finished_run_that_was_not_measured(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "a")
    (folder / "adapter").mkdir()
    facts = standing(folder)
    assert facts["state"] == "finished"
    assert facts["next"] == [f"llm-unlearn evaluate eval/quick.yaml --model embedded:target --adapter {folder}"]


def test_a_store_of_pieces(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "a", more="method: {name: sisa, shards: 2, slices: 3}\n")
    for name in ("pieces/aa", "pieces/bb", "pieces/.cc", "work/dd"):
        (folder / name).mkdir(parents=True)
        (folder / name / "weights.safetensors").write_bytes(b"12345")
    (folder / "log.jsonl").rename(folder / "work/dd/log.jsonl")
    (folder / "manifest.json").write_text(json.dumps({"state": "building", "rows": ["1", "2"], "pieces": []}), encoding="utf-8")
    process(folder, steps=0)
    facts = standing(folder)
    assert (facts["kind"], facts["state"], facts["pieces"], facts["lines"]) == ("store", "training", 2, 2)
    assert "2 there, of 2 lines, 1 under way at step 90; 0 of 2 rows are deleted" in shown(facts)
    (folder / "process.json").unlink()
    assert standing(folder)["state"] == "unfinished"
    shutil.rmtree(folder / "work")
    (folder / "manifest.json").write_text(
        json.dumps({"state": "complete", "serving": ["aa"], "deleted": ["1"], "rows": ["1", "2"]})
    )
    (folder / "adapter").mkdir()
    facts = standing(folder)
    assert facts["state"] == "finished" and f"llm-unlearn verify {folder}" in facts["next"]
    assert "1 serve; 1 of 2 rows are deleted" in shown(facts)


def test_other_folders_say_what_they_are(tmp_path: Path) -> None:
    bench = tmp_path / "bench"
    for seed, how in ((0, "finished"), (1, "killed")):
        folder = run_folder(bench / "npo" / f"seed-{seed}")
        if how == "killed":
            process(folder, began=1.0)
        else:
            (folder / "adapter").mkdir()
    facts = standing(bench)
    assert (facts["kind"], facts["state"], facts["runs"]) == ("bench", "unfinished", {"finished": 1, "killed": 1})
    shutil.rmtree(bench / "npo" / "seed-1")
    assert standing(bench)["state"] == "unfinished", "without a leaderboard there are more to come"
    process(bench, steps=60)
    facts = standing(bench)
    assert facts["state"] == "running" and "1 finished; 60 are wanted" in shown(facts) and facts["next"][0].endswith("--follow")
    process(bench, steps=60, how="interrupted")
    assert standing(bench)["state"] == "interrupted"
    (bench / "process.json").unlink()
    process(run_folder(bench / "npo" / "seed-1"), began=1.0)
    board = {"suite": "eval/quick.yaml", "command": "llm-unlearn bench recipes/methods"}
    (bench / "leaderboard.json").write_text(json.dumps(board), encoding="utf-8")
    assert "llm-unlearn bench recipes/methods" in standing(bench)["next"] and "1 finished, 1 killed" in shown(standing(bench))
    for name, held, state, said in (
        ("privacy_audit.json", {"recipe": "ab", "canaries": 8}, "unfinished", "llm-unlearn audit RECIPE"),
        ("privacy_audit.json", {"recipe": "ab", "verdict": "Not refuted."}, "finished", "Not refuted."),
        ("comparison.json", {"runs": [1, 2]}, "finished", "comparison.html"),
        ("evaluation.json", RESULTS, "unfinished", "report.html"),
    ):
        folder = tmp_path / f"{name}-{state}"
        folder.mkdir()
        (folder / name).write_text(json.dumps(held), encoding="utf-8")
        facts = standing(folder)
        assert facts["state"] == state and said in shown(facts), name


@pytest.mark.parametrize("there", [True, False])
def test_anything_else_is_refused(there: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "letters").mkdir()
    assert cli.main(["show", str(tmp_path / ("letters" if there else "nowhere"))]) == 2
    said = capsys.readouterr().err
    assert ("found no recipe.yaml" if there else "no such folder") in said and said.startswith("error: ") and said.count("\n") == 1


def trial(sweep: Path, number: int, after: float | None) -> Path:
    """A trial of a sweep, as its run left it; with numbers, if it has any."""
    folder = run_folder(sweep / f"trial-{number:04d}", more="evaluation: {suite: eval/quick.yaml}\n")
    if after is not None:
        one = {**RESULTS["numbers"][0], "values": {**RESULTS["numbers"][0]["values"], "after": {"value": after}}}
        kept = {"set": "retain", "title": "probability", "measure": "probability", "goal": "as before", "knowing": "raises"}
        kept |= {"settings": {}, "definition": "what it is"}
        kept["values"] = {name: {"value": 0.9} for name in ("before", "after", "retrained")}
        (folder / "evaluation.json").write_text(json.dumps(RESULTS | {"numbers": [one, kept]}), encoding="utf-8")
    return folder


def test_a_sweep_begun_and_finished(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = tmp_path / "sweep"
    (sweep / "locks" / "here-1").mkdir(parents=True)
    (sweep / "locks" / "study").touch()
    facts = standing(sweep)
    assert (facts["kind"], facts["state"], facts["best"]) == ("sweep", "unfinished", None) and shown(facts)
    process(sweep / "locks" / "here-1", steps=20)
    for number, after in ((0, 0.6), (1, 0.52), (2, None)):
        under_way = trial(sweep, number, after)
    assert standing(sweep)["state"] == "running", "a trial is begun, and says nothing yet"
    process(under_way)
    facts = standing(sweep)
    assert facts["state"] == "running" and facts["trials"] == {"complete": 2, "running": 1} and facts["wanted"] == 20
    assert facts["best"]["folder"] == "trial-0001" and facts["next"] == [f"llm-unlearn show {sweep} --follow"]
    text = shown(facts)
    assert "2 with numbers, 1 under way; 20 are wanted" in text and "trial-0001: forgotten 0.979, kept 1.000" in text
    process(sweep / "locks" / "here-1", began=1.0)
    process(under_way, how="interrupted")
    assert standing(sweep)["state"] == "killed"
    shutil.rmtree(sweep / "locks" / "here-1")
    scores = {"forgotten": 0.9, "kept": 1.0, "score": 0.95, "collapsed": False, "forget_quality": None, "steps": 4, "seconds": 2.0}
    rows = [{"folder": f"trial-000{i}", "number": i, "state": state} for i, state in enumerate(("complete", "collapsed", "pruned"))]
    rows[0] |= scores
    data = {"suite": "eval/quick.yaml", "command": "llm-unlearn sweep r.yaml", "wanted": 3, "chosen": 0, "trials": rows}
    for name in ("sweep.json", "comparison.json"):
        (sweep / name).write_text(json.dumps(data), encoding="utf-8")
    (sweep / "chosen.yaml").touch()
    facts = standing(sweep)
    assert (facts["kind"], facts["state"], facts["chosen"]) == ("sweep", "finished", "trial-0000"), "no comparison"
    assert facts["trials"] == {"complete": 1, "collapsed": 1, "pruned": 1} and facts["best"]["folder"] == "trial-0000"
    assert facts["next"] == [f"llm-unlearn plan {sweep}/chosen.yaml"] and "1 ended early" in shown(facts)
    assert cli.main(["show", str(sweep), "--follow"]) == 0 and "trial-0000" in capsys.readouterr().out
    trial(sweep, 3, None)
    assert standing(sweep)["state"] == "unfinished" and "llm-unlearn sweep r.yaml" in standing(sweep)["next"]


def test_a_folder_may_change_as_it_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run removes the checkpoint before its newest."""
    folder = run_folder(tmp_path / "a")
    (folder / "checkpoints" / "step-000005").mkdir(parents=True)
    (folder / "checkpoints" / "step-000005" / "progress.pt").write_bytes(b"12345")
    assert {"name": "checkpoints/", "bytes": 5} in standing(folder)["files"]
    listed = os.scandir

    def gone(path: Any) -> Any:
        if not isinstance(path, int) and Path(path).name == "checkpoints":
            found = list(listed(path))
            shutil.rmtree(folder / "checkpoints" / "step-000005")
            return contextlib.nullcontext(iter(found))
        return listed(path)

    monkeypatch.setattr(os, "scandir", gone)
    assert {"name": "checkpoints/", "bytes": 0} in standing(folder)["files"]


def test_a_recipe_that_somebody_wrote_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("extends: base.yaml\nobjective: {retain: null}\n")
    with pytest.raises(Refused, match=r"found a recipe\.yaml that no run wrote \(theirs begin with `# hash …`\), and no priv"):
        standing(tmp_path)


def test_what_a_killed_run_left_says_nothing_of_the_next(tmp_path: Path) -> None:
    """It was killed as it measured, and trains again from its checkpoint."""
    folder = run_folder(tmp_path / "a")
    (folder / "adapter").mkdir()
    now = psutil.Process().create_time()
    for name in ("adapter", "log.jsonl"):
        os.utime(folder / name, (now - 100, now - 100))
    process(folder)
    assert standing(folder)["state"] == "beginning"
    os.utime(folder / "log.jsonl")
    assert standing(folder)["state"] == "training"
    os.utime(folder / "adapter")
    assert standing(folder)["state"] == "measuring"


def test_who_is_at_work_says_so_and_how_it_ended(tmp_path: Path) -> None:
    with working(tmp_path, 9, active=True):
        there = at_work.read(tmp_path)
        assert there == AtWork(os.getpid(), psutil.Process().create_time(), platform.node(), 9) and there.alive
    assert at_work.read(tmp_path) is None
    with working(tmp_path, 9, active=True) as ended:
        ended.append("interrupted")
    assert (found := at_work.read(tmp_path)) and found.how == "interrupted" and not found.alive
    for error, how, reason in ((KeyboardInterrupt(), "interrupted", ""), (Refused("row 3 says Ada"), "failed", "Refused")):
        with pytest.raises(type(error)), working(tmp_path, 9, active=True):
            raise error
        assert (found := at_work.read(tmp_path)) and (found.how, found.reason) == (how, reason)
    assert "Ada" not in (tmp_path / "process.json").read_text()
    with working(tmp_path / "b", 9, active=False):
        assert not (tmp_path / "b").exists()


def test_who_was_killed_and_never_asked_after_is_not_at_work(tmp_path: Path) -> None:
    """As in a container whose first process does not look after those that lost their parent."""
    zombie = subprocess.Popen([sys.executable, "-c", ""])
    began = psutil.Process(zombie.pid).create_time()
    while psutil.Process(zombie.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert not AtWork(zombie.pid, began, platform.node(), 9).alive and not durable._alive(zombie.pid)
    assert durable._alive(os.getpid()) and AtWork(os.getpid(), psutil.Process().create_time(), platform.node(), 9).alive
    zombie.wait()


def test_follow_goes_on_until_the_run_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_folder(tmp_path / "a")
    process(folder)
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            (folder / "adapter").mkdir()
        if len(waits) == 5:
            (folder / "process.json").unlink()

    monkeypatch.setattr(command.time, "sleep", sleep)
    assert cli.main(["show", str(folder), "--follow"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{folder}: training, step 90 of 120, forget 2.01")
    assert lines[1].startswith(f"{folder}: measuring, step 90 of 120") and len(waits) == 5
    assert any("state" in line and "finished" in line for line in lines[2:])


def test_ctrl_c_leaves_a_run_that_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run_folder(tmp_path / "a")
    process(folder)

    def press(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command.time, "sleep", press)
    assert cli.main(["show", str(folder), "--follow"]) == 0


def test_it_needs_nothing_heavy(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "a")
    (folder / "adapter").mkdir()
    (folder / "evaluation.json").write_text(json.dumps(RESULTS), encoding="utf-8")
    heavy = "{'torch', 'transformers', 'accelerate', 'datasets', 'numpy', 'scipy'} & set(sys.modules)"
    code = f"import sys; from llm_unlearn.cli import main; assert main(['show', {str(folder)!r}]) == 0; assert not {heavy}, {heavy}"
    began = time.process_time()
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    assert time.process_time() - began < 1


def test_curves_and_sizes() -> None:
    assert spark([1.0, 1.0], Console(width=80)) == "▁▁" and spark([0.0, 1.0, 0.5], Console(width=80)) == "▁█▅"
    assert [size(x) for x in (12, 1200, 3_400_000, 5_600_000_000)] == ["12 B", "1.2 kB", "3.4 MB", "5.6 GB"]


def test_a_run_is_not_begun_beside_itself(tmp_path: Path) -> None:
    """As after a bench was killed whose child goes on."""
    folder = run_folder(tmp_path / "x")
    at_work.alone(folder)
    process(folder)
    at_work.alone(folder)  # it is we who are at work
    other = psutil.Process(os.getppid())
    process(folder, pid=other.pid, began=other.create_time())
    with pytest.raises(Refused, match=rf"output: process {other.pid} is at work in .*x\. Nothing was changed"):
        at_work.alone(folder)
    process(folder, pid=other.pid, began=other.create_time(), host="another machine")
    at_work.alone(folder)  # it may be gone, as a preempted node is
    process(folder, pid=other.pid, began=other.create_time(), how="interrupted")
    at_work.alone(folder)


def test_of_two_that_begin_at_once_one_is_refused(tmp_path: Path) -> None:
    """What the command looked at before it read data and models, minutes ago, is looked at again, by one after the other."""
    folder = run_folder(tmp_path / "x")
    other = psutil.Process(os.getppid())
    with at_work.turn(folder):
        at_work.claim(folder)
        assert (found := at_work.read(folder)) and found.alive and found.pid == os.getpid()
        code = "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)"
        assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], stderr=subprocess.DEVNULL, check=False).returncode == 1
    process(folder, pid=other.pid, began=other.create_time())
    with pytest.raises(Refused, match="is at work in"), at_work.turn(folder):
        raise AssertionError("not its turn")
    with pytest.raises(Refused, match="is at work in"), working(folder, 9, active=True):
        raise AssertionError("not its turn")
    assert (found := at_work.read(folder)) and found.pid == other.pid
