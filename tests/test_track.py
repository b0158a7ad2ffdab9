"""Experiment trackers: what they are told, where their files lie, and that they decide and disturb nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from jobs import RECIPE, adapted, job, log, refusal

from llm_unlearn import recipe, sections
from llm_unlearn.recipe import Recipe
from llm_unlearn.training import tracking
from llm_unlearn.training.dose import Harm, Stop
from llm_unlearn.training.loop import train
from llm_unlearn.training.tracking import configuration, share, tell_numbers, tracked

LOOKS = Stop(budget=Harm(retain_perplexity=1000.0), every=3, rows=4)


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def wanted(folder: Path, track: str, more: str = "") -> Recipe:
    (folder / "r.yaml").write_text(f"{RECIPE}track: {track}\n{more}", encoding="utf-8")
    return recipe.load(folder / "r.yaml", [f"output={folder / 'run'}"])


def trained(folder: Path, make_model: Callable[..., Any], track: str, **settings: Any) -> Path:
    """The run folder of a short training under the trackers."""
    accelerator, one = Accelerator(cpu=True), wanted(folder, track)
    with tracked(one, accelerator):
        train(job(steps=7, **settings), adapted(make_model), accelerator, folder / "run")
        numbers = [{"set": "forget", "title": "recall@5", "values": {"before": {"value": 0.9}, "after": {"missing": "no answers"}}}]
        tell_numbers(accelerator, numbers)
    assert accelerator.trackers == []
    return folder / "run"


class Told:
    """A tracker of Accelerate's kind that remembers, and breaks when it is told to."""

    name, requires_logging_directory = "aim", False
    made: ClassVar[list[Told]] = []
    breaks_at: ClassVar[int | None] = None

    def __init__(self, project: str) -> None:
        self.project, self.rows, self.config, self.finished = project, list[tuple[int, dict[str, float]]](), dict[str, Any](), False
        Told.made.append(self)

    @property
    def tracker(self) -> object:
        return self

    def start(self) -> None:
        if Told.breaks_at == 0:
            raise ConnectionError("no\nnetwork")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.config = values

    def log(self, values: dict[str, float], step: int) -> None:
        if step == Told.breaks_at:
            raise ConnectionError("no network")
        self.rows.append((step, values))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Told]]:
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "aim", Told)
    monkeypatch.setattr(sections, "find_spec", lambda name: name)
    monkeypatch.setattr(Told, "made", [])
    monkeypatch.setattr(Told, "breaks_at", None)
    yield Told


@pytest.mark.parametrize(
    "track", ["tensorboard", "[tensorboard]", "{to: tensorboard}", "{to: [tensorboard], every: 2, name: mine}"]
)
def test_trackers_are_named_in_short_and_decide_nothing(track: str, tmp_path: Path) -> None:
    found = wanted(tmp_path, track)
    assert found.track and found.track.to == ("tensorboard",) and found.track.project == "llm_unlearn"
    (tmp_path / "plain.yaml").write_text(RECIPE, encoding="utf-8")
    assert recipe.load(tmp_path / "plain.yaml").hash == found.hash
    assert recipe.load(tmp_path / "plain.yaml", [f"track={track}"]).track == found.track


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("track=tensorbord", "track.to[0]: found 'tensorbord'; did you mean 'tensorboard'?"),
        ("track={to: []}", "track.to: found []"),
        ("track={to: [tensorboard], evry: 2}", "track.evry: unknown key; did you mean 'every'?"),
    ],
)
def test_what_is_no_tracker_is_refused(override: str, said: str, tmp_path: Path) -> None:
    assert said in refusal(tmp_path, RECIPE, override)[1]


def test_a_tracker_that_is_not_installed_is_refused_with_the_line_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sections, "find_spec", lambda name: None)
    assert (
        "track.to: wandb is not installed; install it with: pip install 'llm-unlearn[wandb]'"
        in refusal(tmp_path, RECIPE, "track=wandb")[1]
    )
    assert "pip install 'comet-ml'" in refusal(tmp_path, RECIPE, "track=comet_ml")[1]


def test_every_number_of_the_log_is_told(tmp_path: Path, make_model: Callable[..., Any], told: type[Told]) -> None:
    folder = trained(tmp_path, make_model, "aim", stop=LOOKS)
    (one,) = told.made
    assert one.finished and one.project == "llm_unlearn" and one.config["objective.forget.loss.name"] == "npo"
    rows = log(folder)
    for (step, values), row in zip(one.rows[:-1], rows, strict=True):
        assert step == row.pop("step") and values.pop("train/seconds") > 0
        assert {name.partition("/")[2]: value for name, value in values.items()} == row
        assert {name for name in values if name.startswith("probe/")} == {
            f"probe/{name}" for name in row if name.startswith("retain_")
        }
    assert one.rows[-1] == (7, {"evaluation/forget/recall_5/before": 0.9})


def test_of_every_nth_step_and_of_every_look(tmp_path: Path, make_model: Callable[..., Any], told: type[Told]) -> None:
    trained(tmp_path, make_model, "{to: aim, every: 5}", stop=LOOKS)
    rows = dict(told.made[0].rows[:-1])
    assert list(rows) == [1, 3, 5, 6, 7]
    assert set(rows[3]) == set(rows[6]) == {"probe/retain_perplexity", "probe/retain_accuracy"} and "train/forget" in rows[5]


def test_a_set_may_be_called_train(tmp_path: Path, told: type[Told]) -> None:
    """Its final numbers are no rows of steps, of which some are left out."""
    accelerator = Accelerator(cpu=True)
    with tracked(wanted(tmp_path, "{to: aim, every: 10}"), accelerator):
        tell_numbers(accelerator, [{"set": "train", "title": "rouge", "values": {"after": {"value": 0.5}}}], step=7)
    assert told.made[0].rows == [(7, {"evaluation/train/rouge/after": 0.5})]


@pytest.mark.parametrize("at", [0, 3, 7], ids=["in the beginning", "in the middle", "at the end"])
def test_a_tracker_that_fails_is_left_out_with_one_line(
    at: int, tmp_path: Path, make_model: Callable[..., Any], told: type[Told], capsys: pytest.CaptureFixture[str]
) -> None:
    told.breaks_at = at
    folder = trained(tmp_path, make_model, "[aim, tensorboard]")
    assert [row["step"] for row in log(folder)] == list(range(1, 8))
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("track: ")]
    network = "no network"
    assert said == [f"track: aim is left out from here on: ConnectionError: {network}"]
    assert [step for step, _ in told.made[0].rows] == list(range(1, at))
    assert "train/forget" in scalars(folder), "the other hears all"


def test_what_chooses_rows_is_not_told(tmp_path: Path) -> None:
    text = RECIPE.replace("answer: answer}", "answer: answer, where: {person: Ada, city: [Rom, Ulm]}, like: {question: '*sc*'}}", 1)
    (tmp_path / "r.yaml").write_text(text, encoding="utf-8")
    config = configuration(recipe.load(tmp_path / "r.yaml", ["model.trainable=null", "train.rules=[{name: bilevel}]"]))
    assert config["data.forget.where.person"] == config["data.forget.like.question"] == "withheld"
    assert not {"Ada", "Rom", "*sc*"} & {str(value) for value in config.values()} and "Ulm" not in json.dumps(config)
    assert config["train.rules.0.name"] == "bilevel" and config["model.adapter.rank"] == 16
    assert config["data.retain.where"] == "null"
    assert all(isinstance(value, (str, int, float)) for value in config.values())


def test_trainings_of_one_run_follow_each_other(tmp_path: Path, make_model: Callable[..., Any], told: type[Told]) -> None:
    whole, one = Accelerator(cpu=True), wanted(tmp_path, "aim")
    with tracked(one, whole):
        for title in ("shard 1", "shard 2"):
            own = Accelerator(cpu=True)
            share(whole, own, title)
            train(job(steps=2), adapted(make_model), own, tmp_path / title)
    assert [(step, "shard 1/train/forget" in row, "shard 2/train/forget" in row) for step, row in told.made[0].rows] == [
        (1, True, False), (2, True, False), (3, False, True), (4, False, True),
    ]  # fmt: skip


def scalars(folder: Path) -> dict[str, list[int]]:
    """Name -> steps, of all that TensorBoard reads in a run folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "trackers" / "tensorboard" / "llm_unlearn"))
    found.Reload()
    return {name: [event.step for event in found.Scalars(name)] for name in found.Tags()["scalars"]}


def test_tensorboard_reads_what_was_told_also_after_a_resume(
    tmp_path: Path, make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    folder = trained(tmp_path, make_model, "tensorboard", stop=LOOKS)
    found = scalars(folder)
    assert found["train/forget"] == found["train/grad_norm"] == list(range(1, 8)) and found["probe/retain_perplexity"] == [3, 6, 7]
    assert found["evaluation/forget/recall_5/before"] == [7]
    trained(tmp_path, make_model, "tensorboard")
    assert len(scalars(folder)["train/forget"]) == 14, "the same run, as its folder is the same"
    assert len(list(folder.rglob("hparams.yml"))) == 1 and not list((tmp_path / "cwd").iterdir())
    hparams = next(folder.rglob("hparams.yml")).read_text()
    assert "objective.retain.loss.name: nll" in hparams and "train.lr" in hparams


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what these libraries use of others
@pytest.mark.parametrize("name", ["trackio", "mlflow", "wandb"])
def test_a_resumed_run_is_one_run_of_its_tracker(
    name: str, tmp_path: Path, make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where these are installed (they are in no extra that tests need)."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "run" / "trackers" / "trackio"))
    pytest.importorskip(name)  # Trackio reads its place when it is imported
    for _ in range(2):
        folder = trained(tmp_path, make_model, name)
    kept = json.loads((folder / "trackers" / tracking.KEPT).read_text())
    if name == "wandb":
        assert {path.name for path in folder.rglob("*.wandb")} == {f"run-{kept['wandb']}.wandb"}
    else:
        import sqlite3

        (path,) = (folder / "trackers").rglob("*.db")
        runs = "select run_uuid, max(step) from metrics where key = 'train/forget' group by run_uuid"
        if name == "trackio":
            runs = "select run_name, max(step) from metrics group by run_name"
        assert sqlite3.connect(path).execute(runs).fetchall() == [(kept[name], 7)]
    assert not list((tmp_path / "cwd").iterdir())


@pytest.mark.slow
@pytest.mark.two_processes("track")
def test_of_two_processes_one_tells(two_processes: Path) -> None:
    folder = two_processes / "run"
    files = [path for path in folder.rglob("events.out.tfevents.*") if path.parent.name == "llm_unlearn"]
    assert len(files) == 1 and scalars(folder)["train/forget"] == list(range(1, 8))
