"""The model that never saw the forget set, by whatever name it goes: a folder, a run, or a recipe that makes it on first use."""

from __future__ import annotations

import os
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from filelock import FileLock

from llm_unlearn import folder as run_folder
from llm_unlearn import recipe as recipes
from llm_unlearn.data.sources import rows
from llm_unlearn.durable import whole
from llm_unlearn.embedded.target import embedded, key_of
from llm_unlearn.methods.contrast import Contrast
from llm_unlearn.methods.exact import Exact
from llm_unlearn.models.load import folder_identity, load
from llm_unlearn.recipe import EMBEDDED_MODELS, Recipe
from llm_unlearn.run import run, start
from llm_unlearn.source import is_recipe
from llm_unlearn.spec import Refused, fingerprint, plain
from llm_unlearn.tree import locate


def found(name: str | None, cache: Path) -> str | None:
    """What can be loaded as a model under this name; that of a recipe is made now, if the cache does not have it.

    Raises:
        Refused: the recipe cannot be read or carried out.
        KeyboardInterrupt: making it was interrupted; it goes on from there the next time.
    """
    if name is None or not is_recipe(name):
        return run_folder.model_in(name) if name else None
    wanted = recipes.load(locate(name))
    if isinstance(wanted.method, Contrast | Exact):
        text = "makes a model of several parts, and what it is compared with is one; name a recipe such as that of retrain"
        raise Refused(f"retrained: {name}: {wanted.method.name} {text}.")
    final = home_of(wanted, cache) / run_folder.MODEL
    if final.is_dir():
        return str(final)
    accelerator = start(wanted.model)
    final.parent.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(final.parent.with_suffix(".lock")) if accelerator.is_main_process else nullcontext():
        accelerator.wait_for_everyone()  # another run may have made it while this one waited for the lock
        if not final.is_dir():
            _make(replace(wanted, output=str(final.parent), evaluation=None, track=None), cache, final)
    return str(final)


def home_of(wanted: Recipe, cache: Path) -> Path:
    """Where the model of a recipe is kept: under the fingerprint of the recipe, its base and the rows that it reads. Makes and
    downloads no model: a hub id stands for itself, with its revision."""
    model, rules = wanted.model, wanted.train.rules or ()
    of_rules = [one for rule in rules for one in getattr(rule, "adapters", ())]
    named = [model.base, *(run_folder.adapter_in(one) for one in (*model.starts, *of_rules))]
    template = Path(model.chat_template).expanduser().read_bytes() if model.chat_template else b""
    made = key_of((model.base.removeprefix("embedded:"),)) if model.base in EMBEDDED_MODELS else None
    folders = [folder_identity(Path(os.path.expanduser(one))) for one in named if Path(os.path.expanduser(one)).is_dir()]
    read = {name: list(rows(wanted.sources[name])) for name in wanted.window}
    settings = {key: value for key, value in plain(wanted).items() if key not in ("output", "evaluation", "track")}
    return (
        cache / "retrained" / fingerprint(settings, made, folders, read, *([template.decode(errors="replace")] if template else []))
    )


def _make(wanted: Recipe, cache: Path, final: Path) -> None:
    """Carry out the recipe, and keep what it trained as one whole model."""
    folder, main = Path(wanted.output), start(wanted.model).is_main_process
    if main:
        print(f"first use: training the model that is compared with, by {wanted.method.name if wanted.method else 'its recipe'}")
    trained = folder / run_folder.ADAPTER
    if not trained.is_dir() and run(wanted, None, cache=cache, resume=True).status == "interrupted":
        raise KeyboardInterrupt
    accelerator = start(wanted.model)
    if main and trained.is_dir():
        loaded = load(embedded(replace(wanted.model, quantize=None), cache), accelerator.device, adapter=str(trained))
        with whole(final) as unfinished:
            loaded.model.merge_and_unload().save_pretrained(str(unfinished))
            loaded.tokenizer.save_pretrained(str(unfinished))
        shutil.rmtree(trained)
    accelerator.wait_for_everyone()
