"""Experiment trackers: what a run says, for TensorBoard, Weights & Biases, MLflow, Trackio and whatever else Accelerate knows.

They decide nothing. A tracker that fails is left out from then on, with one line, and the run goes on.
"""

from __future__ import annotations

import json
import re
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from llm_unlearn.folder import TRACKERS, write
from llm_unlearn.recipe import Recipe
from llm_unlearn.sections import Track
from llm_unlearn.spec import parts_of, plain
from llm_unlearn.training.progress import LOOKS
from llm_unlearn.withheld import described
from llm_unlearn.written import object_in

KEPT = "runs.json"
"""Tracker -> its own name for this run, by which a resumed run finds it again."""
Value = str | int | float | bool


class Tracker:
    """One of Accelerate's trackers, which cannot end a run. It stands among `accelerator.trackers`."""

    def __init__(self, name: str, every: int) -> None:
        self.name, self.every, self.last = name, every, 0
        self._inner: Any = None

    def begin(self, track: Track, title: str, folder: Path, config: Mapping[str, Value], kept: dict[str, str]) -> None:
        """Begin, or go on with, this run in the tracker.

        Args:
            title: of the run.
            folder: for the tracker's files.
            kept: tracker -> its own name of the run; gets that of this one.
        """

        def start() -> None:
            known = self.name in kept
            kind = LOGGER_TYPE_TO_CLASS[self.name]
            made = SETTINGS[self.name](title, folder / self.name, kept) if self.name in SETTINGS else {}
            if kind.requires_logging_directory:
                self._inner = kind(track.project, str(folder / self.name), **made)
            else:
                self._inner = kind(track.project, **made)
            self._inner.start()
            if not known:
                self._inner.store_init_configuration(dict(config))
            kept.setdefault(self.name, self._inner.tracker.info.run_id if self.name == "mlflow" else title)

        self._try(start)

    def log(self, values: Mapping[str, float], step: int | None = None) -> None:
        """What Accelerate asks of a tracker."""
        if self._inner is not None:
            step = self.last = max(self.last, step or 0)  # some take no step twice that is behind another
            self._try(lambda: self._inner.log(dict(values), step=step))

    def finish(self) -> None:
        """What Accelerate asks of a tracker."""
        if self._inner is not None:
            self._try(lambda: self._inner.finish())

    @property
    def tracker(self) -> Any:
        """The library's own object, as `accelerator.get_tracker` gives it."""
        return self._inner.tracker

    def _try(self, act: Callable[[], object]) -> None:
        try:
            act()
        except Exception as error:  # whatever a library or a network makes of it
            self._inner = None
            reason = " ".join(str(error).split())[:200]
            print(f"track: {self.name} is left out from here on: {type(error).__name__}: {reason}", file=sys.stderr)


class Part:
    """A tracker that hears of one of several trainings: under its title, and behind those before it."""

    def __init__(self, whole: Tracker, title: str) -> None:
        self.whole, self.title, self.name, self.every, self.before = whole, title, whole.name, whole.every, whole.last

    def log(self, values: Mapping[str, float], step: int | None = None) -> None:
        """What Accelerate asks of a tracker."""
        self.whole.log({f"{self.title}/{name}": value for name, value in values.items()}, self.before + (step or 0))


def share(whole: Accelerator, part: Accelerator, title: str) -> None:
    """Let the trackers of a run hear of one of its trainings, which has an accelerator of its own."""
    part.trackers = [Part(one, title) for one in whole.trackers]


@contextmanager
def tracked(recipe: Recipe, accelerator: Accelerator) -> Iterator[None]:
    """Inside, what is told to the accelerator's trackers reaches those of the recipe; the first process tells.

    Their files lie in the run folder.
    """
    track, folder = recipe.track, (Path(recipe.output) / TRACKERS).absolute()
    if track and accelerator.is_main_process:
        kept = object_in(folder / KEPT, "remove it, and the trackers begin anew") if (folder / KEPT).is_file() else {}
        title, config = track.name or Path(recipe.output).name, configuration(recipe)
        for name in track.to:
            (folder / name).mkdir(parents=True, exist_ok=True)
            one = Tracker(name, track.every)
            one.begin(track, title, folder, config, kept)
            accelerator.trackers.append(one)
        write(folder / KEPT, json.dumps(kept))
    try:
        yield
    finally:
        for one in accelerator.trackers:
            one.finish()
        accelerator.trackers.clear()


def tell_step(accelerator: Accelerator, row: Mapping[str, float]) -> None:
    """Every number of a line of the log; of steps between two `every`, only looks at the dose are told."""
    if accelerator.trackers:
        step, every = int(row["step"]), accelerator.trackers[0].every
        told = {name: value for name, value in row.items() if name in LOOKS or step % every == 0 or step == 1}
        named = {("probe/" if name in LOOKS else "train/") + name: value for name, value in told.items() if name != "step"}
        if named:
            accelerator.log(named, step=step)


def tell_numbers(accelerator: Accelerator, numbers: Any, step: int = 0) -> None:
    """Every number of an evaluation, of every model: `evaluation/SET/MEASURE/MODEL`."""
    if accelerator.trackers:
        values = {
            plain_name(f"evaluation/{number['set']}/{number['title']}/{column}"): float(found["value"])
            for number in numbers
            for column, found in number["values"].items()
            if found.get("value") is not None
        }
        accelerator.log(values, step=step)


def plain_name(name: str) -> str:
    """A name that every tracker takes."""
    return re.sub(r"[^\w\-./ ]+", "_", name)


def configuration(recipe: Recipe) -> dict[str, Value]:
    """Every setting of a recipe under its dotted key, as strangers may read it."""
    found: dict[str, Value] = {"hash": recipe.hash}
    for path, value in parts_of(described(plain(recipe))):
        if not isinstance(value, (Mapping, list, tuple)):
            found[".".join(map(str, path))] = "null" if value is None else value  # type: ignore[assignment]
    return found


# ------------------------------------------------------------------------------------------------ what each is given


def _wandb(title: str, folder: Path, kept: dict[str, str]) -> dict[str, Any]:
    """Nothing that was printed, no code and no command line is sent: words of rows may stand there."""
    import wandb

    own = kept.setdefault("wandb", secrets.token_hex(4))
    quiet = wandb.Settings(console="off", disable_git=True, disable_code=True, x_disable_meta=True)
    return {"name": title, "dir": str(folder), "id": own, "resume": "allow", "settings": quiet}


def _mlflow(title: str, folder: Path, kept: dict[str, str]) -> dict[str, Any]:
    """A database in the run folder, unless the user's environment names a server or another place."""
    import mlflow

    found: dict[str, Any] = {"run_name": title, "run_id": kept.get("mlflow")}
    if not mlflow.is_tracking_uri_set() or mlflow.get_tracking_uri().endswith(DATABASE):  # of an earlier run of this process
        mlflow.set_tracking_uri(f"sqlite:///{folder}/{DATABASE}")
        found["logging_dir"] = (folder / "artifacts").as_uri()
    return found


DATABASE = "llm_unlearn_mlflow.db"


def _trackio(title: str, folder: Path, kept: dict[str, str]) -> dict[str, Any]:
    """Its place may hold other runs of the same name."""
    return {"name": kept.get("trackio", title), "resume": "allow" if "trackio" in kept else "never", "embed": False}


def _dvclive(title: str, folder: Path, kept: dict[str, str]) -> dict[str, Any]:
    return {"dir": str(folder), "resume": "dvclive" in kept, "save_dvc_exp": False, "dvcyaml": None}


def _clearml(title: str, folder: Path, kept: dict[str, str]) -> dict[str, Any]:
    return {"task_name": title, "auto_connect_arg_parser": False, "auto_connect_streams": False, "auto_connect_frameworks": False}


def _swanlab(title: str, folder: Path, kept: dict[str, str]) -> dict[str, Any]:
    return {"experiment_name": title, "logdir": str(folder)}


SETTINGS: Mapping[str, Callable[[str, Path, dict[str, str]], dict[str, Any]]] = {
    "wandb": _wandb,
    "mlflow": _mlflow,
    "trackio": _trackio,
    "dvclive": _dvclive,
    "clearml": _clearml,
    "swanlab": _swanlab,
}
"""Tracker -> what it is begun with besides the project; for others that is all."""
