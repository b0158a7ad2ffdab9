"""The study: which trials there are, what they came to, and the point of the next one. The only file that knows Optuna.

Processes, on one node or several, may work on one study at a time. They share the folder:

OUTPUT/
    study.journal      Optuna's record of all trials, unless --storage names a database
    study.name         under which name the study is kept in that database, which may hold those of other folders
    locks/study        held while a trial is drawn or taken up, so that no two processes draw the same
    locks/trial-0007   held by the process that carries this trial out; a trial that is under way and not locked was killed
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, Any, Literal

from llm_unlearn.folder import write
from llm_unlearn.places import check_place
from llm_unlearn.spec import Refused, fingerprint, reason
from llm_unlearn.sweeping.held import Held
from llm_unlearn.sweeping.space import Dimension, Listed, Point, Space, text_of

if TYPE_CHECKING:
    import optuna
    from optuna.storages.journal._file import BaseJournalFileLock

JOURNAL, NAME, LOCKS = "study.journal", "study.name", "locks"
REDRAWS = 10
"""So often is a point drawn anew that an earlier trial had, where points can be counted; then the first that none had is taken."""
POPULATION = 10
"""Points of one generation of nsga2; Optuna's 50 are more than most sweeps have trials."""
Sampler = Literal["tpe", "nsga2", "random", "grid"]
State = Literal["complete", "pruned", "failed", "running"]


@dataclass(frozen=True)
class Trial:
    """One trial as the study knows it."""

    number: int
    state: State
    point: Point
    facts: Mapping[str, Any]
    """What was told of it when it ended."""

    @property
    def name(self) -> str:
        """Its name, and that of its run folder."""
        return name_of(self.number)


@dataclass(frozen=True)
class Drawn:
    """A trial that this process is to carry out."""

    number: int
    point: Point
    held: Held


def name_of(number: int) -> str:
    return f"trial-{number:04d}"


@dataclass
class Study:
    """What this process knows of a study, and what it tells it."""

    optuna: optuna.Study
    output: Path
    space: Space
    sampler: Sampler
    seed: int
    wanted: int
    """Trials that are to be there in the end: those with numbers, and those that were ended."""
    known: int = field(init=False)
    """Trials that were there when this process began: those of them that failed are made up for, as a cause may be gone."""
    mine: dict[int, optuna.Trial] = field(default_factory=dict)
    """Those that this process carries out."""

    def __post_init__(self) -> None:
        self.known = len(self.optuna.get_trials(deepcopy=False))

    def next(self) -> Drawn | None:
        """A trial that was killed, else a new one; None where there are as many as wanted, or no point is left."""
        with _locked(self.output):
            found = self._raw()
            for trial in found:
                if trial.state.name == "RUNNING" and (held := self._left(trial.number)):
                    return Drawn(trial.number, self._suggest(self._reopened(trial)), held)
            if len([trial for trial in found if self._counts(trial)]) >= self.wanted:
                return None
            return self._drawn(found)

    def trials(self) -> list[Trial]:
        """All trials, in order; points that were drawn twice are no trials."""
        states: dict[str, State] = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running"}
        return [
            Trial(one.number, states[one.state.name], _texts(one.params), dict(one.user_attrs))
            for one in self._raw()
            if one.state.name in states
        ]

    def done(self, number: int, values: tuple[float, float], facts: Mapping[str, Any]) -> None:
        """A trial has its numbers."""
        self._say(number, facts)
        self.optuna.tell(number, list(values))

    def ended(self, number: int, state: Literal["PRUNED", "FAIL"], facts: Mapping[str, Any]) -> None:
        """A trial has none."""
        from optuna.trial import TrialState

        self._say(number, facts)
        self.optuna.tell(number, state=TrialState[state])

    # --------------------------------------------------------------------------------------------------------- drawing

    def _raw(self) -> list[Any]:
        return [one for one in self.optuna.get_trials(deepcopy=False) if "twin" not in one.user_attrs]

    def _counts(self, trial: Any) -> bool:
        return bool(trial.state.name != "FAIL" or trial.number >= self.known)

    def _left(self, number: int) -> Held | None:
        """The lock of a trial that nobody carries out; a trial without a lock here was begun in another folder."""
        path = self.output / LOCKS / name_of(number)
        return Held.take(path) if path.exists() else None

    def _reopened(self, trial: Any) -> optuna.Trial:
        from optuna.trial import Trial as Opened

        self.optuna.sampler = self._sampler(trial.number)
        return Opened(self.optuna, trial._trial_id)  # its settings are kept; one that it was not given yet is drawn

    def _drawn(self, found: Sequence[Any]) -> Drawn | None:
        """A new trial, at a point that no other has, where points can be counted."""
        countable = bool(self.space.size)
        tried = [_texts(trial.params) for trial in found if self._counts(trial)] if countable else []
        untried = (point for point in self.space.points() if point not in tried) if countable else iter(())
        ahead = next(untried, None)
        if countable and ahead is None:
            return None
        for draw in itertools.count():
            number = len(self.optuna.get_trials(deepcopy=False))
            held = self._hold(number)  # before the trial is there: without its lock, it would be taken for another folder's
            self.optuna.sampler = self._sampler(number)
            if ahead and (self.sampler == "grid" or draw >= REDRAWS):
                self.optuna.enqueue_trial(_values(self.space.dimensions, ahead))
            trial = self.optuna.ask()
            if trial.number != number:  # one that was put in line by a process that was killed then
                held.release()
                held = self._hold(trial.number)
            point = self._suggest(trial)
            if point not in tried:
                return Drawn(trial.number, point, held)
            self.ended(trial.number, "FAIL", {"twin": True})
            held.release()
        raise AssertionError("counts on")

    def _hold(self, number: int) -> Held:
        held = Held.take(self.output / LOCKS / name_of(number))
        assert held, "trials are drawn under the study's lock"
        return held

    def _suggest(self, trial: optuna.Trial) -> Point:
        """The value of every setting, drawn or, of a trial that has it, kept."""
        self.mine[trial.number] = trial
        point = {}
        for one in self.space.dimensions:
            if isinstance(one, Listed):
                value = trial.suggest_categorical(one.key, list(one.values))
            elif isinstance(one.low, int):
                value = trial.suggest_int(one.key, one.low, int(_last(one)), step=one.step or 1, log=one.log)
            else:
                value = trial.suggest_float(one.key, one.low, _last(one), step=one.step, log=one.log)
            point[one.key] = value if isinstance(value, str) else text_of(value)
        return point

    def _sampler(self, number: int) -> Any:
        """A sampler for one trial: its draws follow from seed, number and trials before, not from when a process began."""
        from optuna import samplers

        seed = int(fingerprint("sweep", self.seed, number)[:8], 16)
        match self.sampler:
            case "tpe":
                return samplers.TPESampler(seed=seed)
            case "nsga2":
                return samplers.NSGAIISampler(seed=seed, population_size=POPULATION)
            case _:
                return samplers.RandomSampler(seed=seed)

    def _say(self, number: int, facts: Mapping[str, Any]) -> None:
        for key, value in facts.items():
            self.mine[number].set_user_attr(key, value)


def _last(one: Dimension) -> float:
    """The highest value of a range, which a step may miss: Optuna warns of an end that it cannot reach."""
    assert not isinstance(one, Listed)
    return float(one.at(one.count - 1)) if one.step is not None else one.high


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    return {key: value if isinstance(value, str) else text_of(value) for key, value in values.items()}


def _values(dimensions: Sequence[Dimension], point: Point) -> dict[str, Any]:
    """A point as Optuna keeps it."""
    kinds: dict[str, Callable[[str], Any]] = {
        one.key: str if isinstance(one, Listed) else int if isinstance(one.low, int) else float for one in dimensions
    }
    return {key: kinds[key](text) for key, text in point.items()}


# --------------------------------------------------------------------------------------------------------------- opening


def open_study(
    output: Path, url: str | None, facts: Mapping[str, str], space: Space, sampler: Sampler, seed: int, wanted: int
) -> Study:
    """Begin a study in a folder, or join the one that is there.

    Args:
        facts: what may not change from one command to the next, in words that are shown.

    Raises:
        Refused: the folder holds something else, or a study of another recipe, suite or search space; nothing was changed.
    """
    check_folder(output)
    optuna = _imported()
    with _locked(output):
        storage = _storage(output, url)
        name = _name(output) if url else "sweep"
        if name in optuna.get_all_study_names(storage):
            study = optuna.load_study(study_name=name, storage=storage)
        else:
            study = optuna.create_study(storage=storage, study_name=name, directions=["maximize", "maximize"])
        earlier = study.user_attrs
        if other := [key for key in facts if earlier and earlier.get(key) != facts[key]]:
            found = "; ".join(f"{key}: {facts[key]}, not {earlier.get(key)}" for key in other)
            raise Refused(f"--output: {output} holds a sweep of another {other[0]} ({found}). Nothing was changed; choose another.")
        for key, value in facts.items():
            if not earlier:
                study.set_user_attr(key, value)
    return Study(study, output, space, sampler, seed, wanted)


def _name(output: Path) -> str:
    """The name of a folder's study in a database, kept in the folder, which may be moved, and which all nodes see. Two folders that
    are called alike, as of two projects, are two studies."""
    if not (path := output / NAME).is_file():
        write(path, f"{output.resolve().name or 'sweep'}-{token_hex(4)}\n")
    return path.read_text(encoding="utf-8").strip()


def check_folder(output: Path) -> None:
    """May a sweep write there?

    Raises:
        Refused: there is something else.
    """
    check_place(output, "--output")
    if output.is_dir() and any(output.iterdir()) and not (output / LOCKS).is_dir():
        raise Refused(f"--output: {output} exists and is not the folder of a sweep. Nothing was changed; choose another.")


def _locked(output: Path) -> Held:
    held = Held.take(output / LOCKS / "study", wait=True)
    assert held, "waited for"
    return held


def _imported() -> Any:
    try:
        import optuna
    except ImportError:
        raise Refused("sweep: needs optuna; install it with: pip install 'llm-unlearn[sweep]'.") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def _storage(output: Path, url: str | None) -> Any:
    """The database of a URL, or a journal in the folder."""
    import optuna
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    if not url:
        journal = output / JOURNAL
        lock = JournalFileOpenLock(str(journal))
        _mend(journal, lock)
        return optuna.storages.JournalStorage(JournalFileBackend(str(journal), lock))
    from sqlalchemy.exc import SQLAlchemyError

    try:
        return optuna.storages.RDBStorage(url)
    except (ImportError, ValueError, RuntimeError, SQLAlchemyError, optuna.exceptions.OptunaError) as error:
        said = reason(error)  # a RuntimeError: tables of another version of Optuna, and how to make them anew
        raise Refused(f"--storage: cannot be opened ({said}). Expected a database's URL, such as sqlite:///sweep.db.") from None


def _mend(journal: Path, lock: BaseJournalFileLock) -> None:
    """Take out half a last line, which a power cut may leave: what would be written behind it could not be read."""
    if not journal.is_file() or _whole(journal.read_bytes()):
        return
    lock.acquire()  # so that it is not half a line that is being written
    try:
        text = journal.read_bytes()
        if not _whole(text):
            with journal.open("r+b") as file:
                file.truncate(text.rfind(b"\n") + 1)
    finally:
        lock.release()


def _whole(text: bytes) -> bool:
    return not text or text.endswith(b"\n")
