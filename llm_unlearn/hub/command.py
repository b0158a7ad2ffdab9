"""The verb `push`: a finished run becomes a repository on a model hub."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llm_unlearn import folder, recipe
from llm_unlearn.hub import contents
from llm_unlearn.hub.card import card
from llm_unlearn.hub.describing import shortcomings, texts_of, told_of
from llm_unlearn.hub.facts import Facts, Kind, Paper
from llm_unlearn.hub.failures import LOG_IN
from llm_unlearn.hub.fetching import COMBINATION_FILE, is_shaped_so
from llm_unlearn.reply import BUSY, DONE, UNREACHABLE, Reply
from llm_unlearn.source import Source, is_shipped
from llm_unlearn.spec import Refused, parts_of, plain, to_yaml
from llm_unlearn.tree import shipped
from llm_unlearn.withheld import described, local_name

REPO_ID = re.compile(r"[A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*")


@dataclass(frozen=True)
class Run:
    """A run folder that is to be published."""

    place: Path
    wanted: recipe.Recipe
    results: Mapping[str, Any] | None
    weights: Path
    """The folder of what is pushed: in the run folder, or the merged model's."""
    kind: Kind
    hub: frozenset[str]
    """The names in recipe and suite that were ids of the hub where the run was."""

    @property
    def base(self) -> str:
        """The base by a name that means something elsewhere."""
        name = self.wanted.model.base
        return name if is_shipped(name) or name in self.hub else local_name(name)


def push(options: argparse.Namespace) -> Reply:
    """Look whether the run may be published, make its card, and push all of it in one commit."""
    if not REPO_ID.fullmatch(options.repo_id):
        raise Refused(f"--repo-id: found {options.repo_id!r}; expected USER/NAME.")
    run = read(options.run, options.merge)
    failed = [*shortcomings(run.results, run.wanted.hash), *deleted_since(run)]
    if failed and not options.anyway and not options.dry_run:
        lines = "\n".join(f"{options.run}: {one}" for one in failed)
        raise Refused(f"{lines}\nNothing was pushed; add --anyway, and the card says so at its top.")
    places = [Path.home(), Path.cwd(), run.place.resolve().parent, options.cache.resolve()]
    with merged(run, options.cache, options.dry_run) as ready:
        pieces, left = made(ready, options.repo_id, failed, places)
        contents.check(pieces, texts_in(run), places)
        show(ready, pieces, left)
        facts = {"repo": options.repo_id, "files": [{"path": one.path, "bytes": one.size} for one in pieces]}
        if options.dry_run:
            return _tried(ready, pieces, failed, facts | {"private": not options.public})
        return _pushed(options, pieces, facts)


def _tried(run: Run, pieces: list[contents.Piece], failed: list[str], facts: dict[str, Any]) -> Reply:
    """What a dry run says: the card, and whether the run would be refused."""
    print()
    print(next(one.text for one in pieces if one.path == contents.CARD))
    for one in failed:
        print(f"would be refused without --anyway: {one}", file=sys.stderr)
    if run.kind == "merged":
        print("the merged model is made when it is pushed", file=sys.stderr)
    return Reply(DONE, facts | {"failed": failed, "dry_run": True})


def _pushed(options: argparse.Namespace, pieces: list[contents.Piece], facts: dict[str, Any]) -> Reply:
    """Push, and say what is there now."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.utils.tqdm import enable_progress_bars

    from llm_unlearn.hub import pushing

    token = get_token()
    if not token:
        raise Refused(f"you are not logged in to the hub. Nothing was pushed; {LOG_IN}.")
    if constants.HF_HUB_DISABLE_PROGRESS_BARS is None:
        enable_progress_bars()  # loading a model to merge it has switched them off
    wanted = pushing.Wanted(
        options.repo_id, pieces, public=options.public, revision=options.revision, message="Publish with llm-unlearn"
    )
    try:
        found = pushing.push(wanted, token=token, tell=lambda text: print(text, file=sys.stderr, flush=True))
    except (pushing.Unreachable, pushing.Overtaken) as error:
        print(f"error: {error}", file=sys.stderr)
        return Reply(UNREACHABLE if isinstance(error, pushing.Unreachable) else BUSY, facts | {"error": str(error)})
    if found.removed:
        print(f"removed from the branch, being of another model: {', '.join(found.removed)} (its history still has them)")
    if options.public and found.private:
        print("the repository is private and stays so; its settings on the hub make it public")
    if not found.new:
        print("the branch had all of it already")
    print(f"{found.url} {found.commit}")
    return Reply(DONE, facts | {"url": found.url, "commit": found.commit, "private": found.private, "removed": list(found.removed)})


def read(place: Path, merge: bool) -> Run:
    """A run folder, and what of it can be published.

    Raises:
        Refused: there is nothing, or an adapter that belongs on more than its base.
    """
    weights = contents.weights_of(place)
    for name in (folder.RECIPE, folder.RESULTS, folder.LOG, folder.ROWS):
        contents.inside(place / name, place)
    wanted = recipe.load(place / folder.RECIPE, check=False)
    combined = (weights / COMBINATION_FILE).is_file()
    kind: Kind = "model" if weights.name == folder.MODEL else "combination" if combined else "adapter"
    if merge and combined:
        raise Refused(f"{weights}: combines the logits of several models, which no one set of weights does; push without --merge.")
    if merge and kind == "adapter":
        kind = "merged"
    if kind in ("adapter", "combination") and wanted.model.start:
        raise Refused(
            f"{place}: the adapter belongs on {wanted.model.base} with other adapters merged into it (model.start), and by itself "
            "would be put on the wrong model. Add --merge to push the whole model."
        )
    results = folder.results_in(place) if (place / folder.RESULTS).is_file() else None
    hub = {*folder.names_on_hub(place), *((results or {}).get("hub") or ())}
    if contents.commit_of(place) and is_shaped_so(wanted.model.base):  # of an earlier version's run, too
        hub.add(wanted.model.base)
    return Run(place, wanted, results, weights, kind, frozenset(hub))


def deleted_since(run: Run) -> list[str]:
    """Of a run in pieces: whether its numbers are those of weights that are no more."""
    from llm_unlearn.exact.manifest import FILE
    from llm_unlearn.exact.manifest import read as read_manifest

    if run.results is None or not (run.place / FILE).is_file():
        return []
    told = len((run.results.get("run") or {}).get("deletions", ()))
    if len(read_manifest(run.place).deletions) == told:
        return []
    return ["Rows were deleted after it was measured: the numbers are of the weights before that."]


@contextlib.contextmanager
def merged(run: Run, cache: Path, dry: bool) -> Iterator[Run]:
    """Inside, the whole model lies in a folder, where that is what is pushed. The same run makes the same bytes, so that a push
    that was cut goes on."""
    if run.kind != "merged" or dry:
        yield run
        return
    from llm_unlearn.requests.ways import release

    start = (*run.wanted.model.starts, str(run.weights))
    beside = run.place.resolve()
    with tempfile.TemporaryDirectory(prefix=f".{beside.name}.merged.", dir=beside.parent, ignore_cleanup_errors=True) as place:
        release(replace(run.wanted.model, start=start), Path(place, folder.MODEL), cache)
        yield replace(run, weights=Path(place, folder.MODEL))


def made(run: Run, repo_id: str, failed: list[str], places: list[Path]) -> tuple[list[contents.Piece], list[str]]:
    """Every file that is pushed, and the names of what stays here."""
    lies_in = run.place if run.weights.is_relative_to(run.place) else run.weights
    revision = contents.commit_of(run.place) or run.wanted.model.revision
    weights, left = contents.pieces_of(run.weights, lies_in, run.base, revision)
    if run.kind == "merged" and run.weights.name == folder.ADAPTER:  # a dry run
        weights = []
    settings = told_recipe(run, places)
    results = told_of(run.results, repo_id, places, run.hub) if run.results else None
    facts = Facts(
        repo_id=repo_id, kind=run.kind, recipe=settings, recipe_hash=run.wanted.hash, results=results,
        papers=papers_of(run.wanted), suite=suite_of(run.wanted), base_on_hub=run.wanted.model.base in run.hub,
        base_revision=revision,
        data_on_hub=frozenset(one.source for one in sources_of(run) if one.source in run.hub), failed=failed,
        files=[(one.path, one.size, one.sha256) for one in weights if one.is_weights],
    )  # fmt: skip
    header = f"# hash {run.wanted.hash}, of the whole recipe: values of filters and folders of local files are withheld here\n"
    texts = {contents.CARD: card(facts), folder.RECIPE: header + to_yaml(settings)}
    if results:
        from llm_unlearn.report.page import page

        texts[folder.RESULTS] = json.dumps(results, indent=1, ensure_ascii=False)
        texts[folder.REPORT] = page(results, folder.steps_in(run.place / folder.LOG))
    beside = [contents.Piece(name, text.encode("utf-8", "replace")) for name, text in texts.items()]
    return [*beside, *weights], [name for name in left if name != contents.CARD]


def told_recipe(run: Run, places: list[Path]) -> dict[str, Any]:
    """The recipe as plain data that can be shown to anybody; it is a recipe still."""
    found: dict[str, Any] = described(plain(run.wanted), places, hub=run.hub)
    found["model"]["base"] = run.base
    if suite := suite_of(run.wanted):
        found["evaluation"]["suite"] = suite
    return found


def sources_of(run: Run) -> list[Source]:
    """Every source that the recipe names, and those of the suite's sets by the same columns."""
    found = [one for _, one in parts_of(run.wanted) if isinstance(one, Source)]
    sets = (run.results or {}).get("suite_settings", {}).get("sets", {})
    return found + [Source(source=str(one["source"]), text="text") for one in sets.values()]


def papers_of(wanted: recipe.Recipe) -> list[Paper]:
    """What the run did, each part with the first sentence of its definition, where its paper stands."""
    found = []
    if wanted.method:
        found.append(Paper("method", wanted.method.name, first_sentence(wanted.method)))
    for name, term in ({} if wanted.method else wanted.objective).items():
        weight = f"{term.weight:g}" if isinstance(term.weight, float) else "a weight that moves"
        found.append(Paper(name, term.loss.name, first_sentence(term.loss), "" if weight == "1" else weight))
    found += [Paper("rule", rule.name, first_sentence(rule)) for rule in wanted.train.rules]
    return found


def first_sentence(of: object) -> str:
    """The first paragraph of a definition: its name, paper and equation."""
    return " ".join((type(of).__doc__ or "").split("\n\n")[0].split())


def suite_of(wanted: recipe.Recipe) -> str:
    """The suite as it is named where llm-unlearn is installed; \"\" for one of the user's own."""
    name = wanted.evaluation.suite if wanted.evaluation else ""
    ours = shipped() / name
    if not name or not ours.is_file() or (Path(name).is_file() and Path(name).read_bytes() != ours.read_bytes()):
        return ""
    return name if not Path(name).is_absolute() else ""


def texts_in(run: Run) -> dict[str, list[str]]:
    """Set -> the texts that no published file may repeat: those of every row, or of those that the evaluation kept."""
    found = texts_of(run.results or {})
    if (run.place / folder.ROWS).is_file():
        from llm_unlearn.report.columns import read_columns

        for row in read_columns(run.place / folder.ROWS, ("set", "prompt", "truth")):
            texts = found.setdefault(str(row.get("set")), [])
            texts += [str(row[part]) for part in ("prompt", "truth") if row.get(part)]
    found = {name: list(dict.fromkeys(texts)) for name, texts in found.items()}
    if not any(found.values()):
        print("the run keeps no texts of its rows: that no file repeats them could not be checked", file=sys.stderr)
    return found | {"filters": sorted({text for one in sources_of(run) for text in filtered_by(one)})}


def filtered_by(source: Source) -> Iterator[str]:
    """The texts by which a source chooses its rows."""
    for one in (source.where, source.without, source.like):
        for value in (one or {}).values():
            yield from (text.strip("* ") for text in (value if isinstance(value, tuple) else (value,)) if isinstance(text, str))


def show(run: Run, pieces: list[contents.Piece], left: list[str]) -> None:
    """What is pushed, and what is not."""
    width = max(len(one.path) for one in pieces)
    for one in pieces:
        print(f"{one.path:<{width}}  {one.size:>13,}")
    for name in left:
        print(f"{run.weights.name}/{name}: stays here, being of no kind that is published")
