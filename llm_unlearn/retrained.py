"""Models that a recipe makes on first use and the cache keeps: the base to be unlearned, or the retrained model."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from filelock import FileLock

from llm_unlearn import folder as run_folder
from llm_unlearn import recipe as recipes
from llm_unlearn.bases import home_of, resolve_base
from llm_unlearn.durable import whole
from llm_unlearn.methods.contrast import Contrast
from llm_unlearn.methods.exact import Exact
from llm_unlearn.models.load import load
from llm_unlearn.models.merging import merge_adapter
from llm_unlearn.recipe import Recipe
from llm_unlearn.run import run, start
from llm_unlearn.source import is_recipe
from llm_unlearn.spec import Refused
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
        text = "makes a model of several parts, and one is needed; name a recipe such as that of retrain"
        raise Refused(f"retrained: {name}: {wanted.method.name} {text}.")
    make_base(wanted, cache)
    final = home_of(wanted, cache) / run_folder.MODEL
    if final.is_dir():
        return str(final)
    accelerator = start(wanted.model)
    final.parent.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(final.parent.with_suffix(".lock")) if accelerator.is_main_process else nullcontext():
        accelerator.wait_for_everyone()  # another run may have made it while this one waited for the lock
        if not final.is_dir():
            _make(name, replace(wanted, output=str(final.parent), evaluation=None, track=None), cache, final)
    return str(final)


def make_base(wanted: Recipe, cache: Path) -> None:
    """Train the base of a recipe now, where another recipe makes it and the cache does not have it.

    Raises:
        Refused, KeyboardInterrupt: as `found`.
    """
    if is_recipe(wanted.model.base):
        found(wanted.model.base, cache)


def _make(name: str, wanted: Recipe, cache: Path, final: Path) -> None:
    """Carry out the recipe, and keep what it trained as one whole model."""
    folder, main = Path(wanted.output), start(wanted.model).is_main_process
    if main:
        print(f"first use: training the model of {name}", flush=True)
    trained = folder / run_folder.ADAPTER
    if not trained.is_dir() and run(wanted, None, cache=cache, resume=True).status == "interrupted":
        raise KeyboardInterrupt
    accelerator = start(wanted.model)
    if main and trained.is_dir():
        exact = "fp32" if accelerator.device.type == "cpu" else wanted.model.precision  # bf16 would round the update away
        plain = replace(wanted.model, quantize=None, precision=exact)
        loaded = load(resolve_base(plain, cache), accelerator.device, adapter=str(trained), full_precision=True)
        with whole(final) as unfinished:
            merge_adapter(loaded.model, str(trained)).save_pretrained(str(unfinished))
            loaded.tokenizer.save_pretrained(str(unfinished))
        shutil.rmtree(trained)
    accelerator.wait_for_everyone()
