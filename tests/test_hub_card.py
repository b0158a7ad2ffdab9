"""What is published of a run: which files, what they say and never say, and a card in which nobody else's words are markup."""

from __future__ import annotations

import html
import json
import random
import re
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hub_server import Fault, Hub, as_the_hub
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from markdown_it import MarkdownIt
from safetensors.numpy import save_file

from llm_unlearn import folder, recipe
from llm_unlearn.hub import command, contents
from llm_unlearn.hub.contents import Piece, Rows
from llm_unlearn.hub.describing import shortcomings, told_of
from llm_unlearn.hub.fetching import on_hub
from llm_unlearn.hub.markup import code, fenced, marked
from llm_unlearn.reply import BUSY, UNREACHABLE, Reply
from llm_unlearn.report.columns import write_columns
from llm_unlearn.spec import Refused, plain, to_yaml
from llm_unlearn.withheld import described, without_paths

PERSON = "Ada Mustermann of Yarrowdale"
EVIL = '<script>alert(1)</script> [x](javascript:alert(1)) | ![i](http://evil.example/p.png) `"\n---\n# H https://evil.example'

RECIPE = """
output: {output}
model: {{base: {base}, adapter: {adapter}}}
data:
  forget: {{source: {data}, prompt: question, answer: answer, where: {{person: "{person}"}}, like: {{file: "{person}*"}}}}
  retain: {{source: some/dataset, config: keep10, prompt: question, answer: answer, without: {{person: ["{person}"]}}}}
objective:
  forget: {{loss: {{name: npo, beta: 0.5}}}}
  retain: {{loss: {{name: kl}}, weight: 30.0}}
evaluation: {{suite: {suite}}}
"""


@pytest.mark.parametrize("secret", ["hf_" + "Zq" * 17, "https://me:pass@hub.example/x", "-----BEGIN PRIVATE KEY-----\nMC4C\n"])
def test_no_secret_is_published(secret: str) -> None:
    """Such as one that stands in the chat template of a stranger's tokenizer, or in a setting."""
    with pytest.raises(Refused, match=r"^chat_template.jinja: holds a token, key or login\. Nothing was pushed") as refused:
        contents.check([Piece("README.md", b"# A card"), Piece("chat_template.jinja", f"{{# {secret} #}}".encode())], {}, [])
    assert secret not in str(refused.value)


def number(measure: str, of: str, goal: str, knowing: str, *values: float) -> dict[str, Any]:
    columns = ("before", "after", "retrained")[: len(values)]
    return {
        "measure": measure, "title": measure.replace("_", " "), "set": of, "goal": goal, "knowing": knowing, "unit": "share",
        "definition": f"What {measure} means.", "settings": {},
        "values": {
            name: {"value": value, "low": value - 0.01, "high": value + 0.01, "n": 12}
            for name, value in zip(columns, values, strict=True)
        },
    }  # fmt: skip


def attack(name: str, share: float | None, leaks: bool) -> dict[str, Any]:
    best = {"after": {"x": 10, "at": "10 optimizer steps", "value": 0.61, "low": 0.5, "high": 0.7}}
    return {
        "name": name, "title": name.replace("_", " "), "definition": "-", "settings": {"steps": 10, "train_on": None},
        "set": "forget",
        "x": {"name": "training", "unit": "optimizer steps", "ticks": []}, "y": {"name": "probability"},
        "curves": {"after": {"x": [0, 10], "y": [0.2, 0.61], "low": [], "high": [], "rows": [0.123456789] * 12, "notes": {}}},
        "gap": {"best": best, "gap": 0.3, "came_back": share, "half": {}, "leaks": leaks}, "finding": "It comes back.",
    }  # fmt: skip


class Made:
    """A run folder as `run` leaves it, without having run anything."""

    def __init__(self, place: Path, base: str = "org/base", whole: bool = False, suite: str = "eval/quick.yaml") -> None:
        self.place, self.data = place, place.parent / "clients" / "people.jsonl"
        self.data.parent.mkdir(parents=True)
        self.data.write_text("{}\n")
        place.mkdir()
        (place / "recipe.yaml").write_text(
            RECIPE.format(
                output=place, base=base, data=self.data, person=PERSON, suite=suite, adapter="null" if whole else "{rank: 8}"
            )
        )
        self.recipe = recipe.load(place / "recipe.yaml", check=False)
        settings = plain(self.recipe)
        (place / "recipe.yaml").write_text(f"{folder.OF_HUB}{json.dumps(on_hub(settings))}\n{to_yaml(settings)}")
        self.weights = place / ("model" if whole else "adapter")
        self.weights.mkdir()
        name = "model.safetensors" if whole else "adapter_model.safetensors"
        save_file({"a": np.zeros(4, np.float32)}, self.weights / name, metadata={"format": "pt"})
        config = {"base_model_name_or_path": str(place.parent / "cache" / "base"), "revision": None, "r": 8}
        (self.weights / ("config.json" if whole else "adapter_config.json")).write_text(json.dumps(config))
        (self.weights / "README.md").write_text(f"base_model: {place}")
        self.results = self._results()
        self.write()

    def _results(self) -> dict[str, Any]:
        rows = [
            {"id": f"r{n}", "prompt": f"Where was {PERSON}'s child number {n} born?",
             "truth": f'In the house "{n}" of <Brunnen> & Sons.', "after": "I do not know.", "probability": {"after": 0.5}}
            for n in range(12)
        ]  # fmt: skip
        source = {"prompt": "question", "answer": "answer", "config": None, "split": None}
        return {
            "format": 1, "title": str(self.place), "suite": "eval/quick.yaml", "suite_hash": "5" * 16,
            "suite_settings": {"sets": {"forget": source | {"source": str(self.data), "where": {"person": PERSON}},
                                        "retain": source | {"source": "some/dataset", "config": "keep10"}}},
            "run": {"recipe_hash": self.recipe.hash, "seed": 0, "status": "finished", "reason": f"looked at {self.place}/log.jsonl",
                    "broken": False, "steps": 20, "kept_step": 18, "seconds": 1.0, "trainable": 4, "device": "cpu", "processes": 1,
                    "precision": "fp32", "versions": {"python": "3.11.7", "peft": "0.21.2"}, "host": "not to be told"},
            "models": {"before": {"name": str(self.place.parent / "cache" / "base"), "identity": "b" * 16},
                       "after": {"name": str(self.place), "identity": "a" * 16},
                       "retrained": {"name": "embedded:retrained", "identity": "c" * 16}},
            "numbers": [number("probability", "forget", "as retrained", "raises", 0.9, 0.31, 0.3),
                        number("rouge", "retain", "as before", "raises", 0.8, 0.79, 0.8)],
            "attacks": [attack("relearning", 0.42, True), attack("quantization", 0.0, False)], "robustness": None, "curves": {},
            "thresholds": [{"measure": "rouge", "set": "retain", "asked": "at least 0.95 of before", "value": 0.79, "bound": 0.76,
                            "holds": True, "why": ""}],
            "answers": {"forget": rows}, "unknown": [PERSON],
        }  # fmt: skip

    def write(self) -> None:
        (self.place / "evaluation.json").write_text(json.dumps(self.results))
        records = [{"set": "forget", "prompt": row["prompt"], "truth": row["truth"]} for row in self.results["answers"]["forget"]]
        write_columns(
            [*records, {"set": "retain", "prompt": "What is kept?", "truth": "Only in the parquet file."}],
            self.place / "evaluation.parquet",
        )

    @property
    def texts(self) -> list[str]:
        return [row[part] for row in self.results["answers"]["forget"] for part in ("prompt", "truth")] + [
            "Only in the parquet file."
        ]

    def push(self, *words: str, **more: Any) -> Reply:
        options = {"run": self.place, "repo_id": "me/forgetful", "public": False, "merge": False, "revision": "main",
                   "anyway": False, "dry_run": True, "cache": self.place.parent / "cache"}  # fmt: skip
        return command.push(Namespace(**(options | more)))

    def pieces(self, failed: list[str] | None = None) -> dict[str, Piece]:
        run = command.read(self.place, False)
        found, _ = command.made(run, "me/forgetful", failed or [], [Path.home(), Path.cwd(), self.place.parent])
        return {one.path: one for one in found}

    def card(self, **more: Any) -> str:
        return self.pieces(**more)["README.md"].content.decode()


@pytest.fixture(autouse=True)
def no_plots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """They take most of the time, and one test looks at them."""
    if "leaves_the_machine" not in request.node.name:
        monkeypatch.setattr("llm_unlearn.report.page.plots_of", lambda *_: [])


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return Made(tmp_path / "run")


def rendered(card: str) -> str:
    """The card's text as a viewer shows it."""
    return str(MarkdownIt("commonmark", {"html": True}).enable("table").render(ModelCard(card).text))


# ------------------------------------------------------------------------------------------------------------------ the card


def test_the_card_says_what_a_reader_has_to_know(made: Made) -> None:
    text = made.card()
    for part in (
        "A LoRA adapter for `org/base`, which was made to forget",
        "**forget** (to be forgotten): rows of a local jsonl file, columns `question` and `answer`, chosen by the value of "
        "`person`, chosen by the value of `file`. Measured on 12 rows.",
        "rows of the data set `some/dataset` on the hub, configuration `keep10`, columns `question` and `answer`, left out by the "
        "value of `person`",
        "Negative preference optimization (Zhang et al. 2024, [2404.05868](https://arxiv.org/abs/2404.05868)",
        "**retain**: `kl` × 30 — KL divergence to the model as it was",
        "a LoRA adapter of rank 8, alpha 32",
        "| probability | 0.900 (0.890–0.910) | 0.310 (0.300–0.320) | 0.300 (0.290–0.310) | as retrained |",
        "| rouge | 0.800 (0.790–0.810) | 0.790 (0.780–0.800) | 0.800 (0.790–0.810) | 99 % kept |",
        "| rouge | retain | at least 0.95 of before | 0.790 | yes |",
        "| relearning | steps 10 | — | 0.610 | — | **42 %** |",
        "One attack brings back a part of what was forgotten",
        "An adapter can be removed: whoever has the base model has the model that knows everything",
        'base = AutoModelForCausalLM.from_pretrained("org/base")',
        'model = PeftModel.from_pretrained(base, "me/forgetful")',
        "llm-unlearn evaluate eval/quick.yaml --model me/forgetful --retrained embedded:retrained",
        f"recipe `{made.recipe.hash}`",
        "the weights of step 18 were kept",
        "python `3.11.7`",
    ):
        assert part in text, part
    weights = made.pieces()["adapter_model.safetensors"]
    assert f"| `adapter_model.safetensors` | {weights.size:,} | `{weights.sha256}` |" in text


def test_the_hub_reads_the_front_matter(made: Made) -> None:
    data = ModelCard(made.card()).data
    assert (data.base_model, data.library_name, data.pipeline_tag) == ("org/base", "peft", "text-generation")
    assert {"llm-unlearn", "unlearning", "npo", "lora"} <= set(data.tags)
    name, results = model_index_to_eval_results(data.to_dict()["model-index"])
    found = {(one.dataset_type, one.dataset_config, one.dataset_name, one.metric_type): one.metric_value for one in results}
    assert name == "forgetful"
    assert found == {("private", None, "forget", "probability"): 0.31, ("some/dataset", "keep10", "retain", "rouge"): 0.79}


def test_limits_follow_from_the_run(made: Made) -> None:
    made.results |= {
        "attacks": [],
        "thresholds": [],
        "numbers": [number("probability", "forget", "as retrained", "raises", 0.9, 0.3)],
    }
    del made.results["models"]["retrained"]
    made.write()
    text = made.card()
    assert "There was no retrained model to compare with. So it cannot be said whether it forgot" in text
    assert "No attack was tried. That a question is no longer answered does not mean" in text and "None were set" in text
    assert "--retrained" not in text.split("## Measure it again")[1]


def test_whole_weights_are_loaded_by_transformers_alone(tmp_path: Path) -> None:
    made = Made(tmp_path / "run", whole=True)
    text = made.card()
    assert (
        'AutoModelForCausalLM.from_pretrained("me/forgetful")' in text
        and "peft import" not in text
        and "can be removed" not in text
    )
    assert "llm-unlearn evaluate eval/quick.yaml --model me/forgetful --before org/base" in text
    assert ModelCard(text).data.library_name == "transformers" and "lora" not in ModelCard(text).data.tags
    assert {"model.safetensors", "config.json"} <= set(made.pieces())


def test_a_base_of_this_machine_is_not_promised_to_anybody(tmp_path: Path) -> None:
    (tmp_path / "bases" / "mine").mkdir(parents=True)
    made = Made(tmp_path / "run", base=str(tmp_path / "bases" / "mine"))
    text = made.card()
    assert ModelCard(text).data.base_model is None and "PeftModel" not in text
    assert "--model FOLDER_OF_THE_BASE --adapter me/forgetful" in text
    assert json.loads(made.pieces()["adapter_config.json"].content)["base_model_name_or_path"] == "mine"


def test_a_folder_of_the_run_is_no_id_of_the_hub_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else could register it, and would be loaded."""
    for name in ("models/llama", "some/dataset"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    made = Made(tmp_path / "run", base="models/llama")
    made.results["models"]["before"]["name"] = "models/llama"
    made.write()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    found, text = made.pieces(), made.card()
    assert json.loads(found["adapter_config.json"].content)["base_model_name_or_path"] == "llama"
    assert ModelCard(text).data.base_model is None and "on the hub, configuration" not in text and "rows of local files" in text
    for one in found.values():
        assert "models/llama" not in (one.text or "") and "some/dataset" not in (one.text or ""), one.path
    path = made.place / "recipe.yaml"
    path.write_text(path.read_text().partition("\n")[2])  # of an earlier version, which did not say
    assert ModelCard(made.card()).data.base_model is None


def test_the_commit_of_the_base_is_told(made: Made) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    config = {"base_model_name_or_path": f"/home/x/hub/models--org--base/snapshots/{commit}", "r": 8}
    (made.weights / "adapter_config.json").write_text(json.dumps(config))
    held = json.loads(made.pieces()["adapter_config.json"].content)
    assert (held["base_model_name_or_path"], held["revision"]) == ("org/base", commit)
    assert f'from_pretrained("org/base", revision="{commit}")' in made.card()


def test_several_adapters_that_are_combined(made: Made) -> None:
    for name in ("assistant", "other"):
        (made.weights / name).mkdir()
        save_file({"a": np.zeros(4, np.float32)}, made.weights / name / "adapter_model.safetensors")
        (made.weights / name / "adapter_config.json").write_text('{"base_model_name_or_path": "/x/y"}')
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (made.weights / name).unlink()
    (made.weights / "combination.json").write_text("{}")
    found, text = made.pieces(), made.card()
    assert {"combination.json", "other/adapter_config.json", "assistant/adapter_model.safetensors"} <= set(found)
    assert json.loads(found["other/adapter_config.json"].content)["base_model_name_or_path"] == "org/base"
    assert "which peft by itself does not do" in text and "Plain peft loads one of them, which is another model" in text
    with pytest.raises(Refused, match="push without --merge"):
        command.read(made.place, True)


# --------------------------------------------------------------------------------------------------------- what is not said


def test_no_text_no_value_and_no_path_leaves_the_machine(made: Made) -> None:
    made.push()  # its last look finds nothing either
    found = made.pieces()
    assert set(found) == {
        "README.md",
        "recipe.yaml",
        "evaluation.json",
        "report.html",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    for name, one in found.items():
        raw = one.content if isinstance(one.content, bytes) else one.content.read_bytes()
        for text in (
            *made.texts,
            PERSON,
            "Mustermann",
            str(made.place.parent),
            str(Path.home()) + "/",
            "clients",
            "not to be told",
        ):
            for form in (text, html.escape(text), json.dumps(text)[1:-1]):
                assert form.encode() not in raw, (name, form)
    told = json.loads(found["evaluation.json"].content)
    assert told["answers"] == {} and "rows" not in told["attacks"][0]["curves"]["after"] and "unknown" not in told
    assert told["title"] == "me/forgetful" == told["models"]["after"]["name"] and told["numbers"] == made.results["numbers"]


def test_the_published_recipe_is_one_and_keeps_its_hash(made: Made, tmp_path: Path) -> None:
    text = made.pieces()["recipe.yaml"].content.decode()
    assert "suite: eval/quick.yaml" in text, "which is found wherever llm-unlearn is"
    (tmp_path / "again.yaml").write_text(text)
    again = recipe.load(tmp_path / "again.yaml", check=False)
    assert made.recipe.hash in text.splitlines()[0] and again.train == made.recipe.train and again.model == made.recipe.model
    assert (
        again.data.forget.source == "people.jsonl" and again.data.forget.where == {"person": "withheld"} and again.output == "run"
    )
    assert again.data.retain and again.data.retain.source == "some/dataset"


def test_random_rows_are_found_wherever_they_are_quoted() -> None:
    """Also through the escapes of JSON, HTML and Markdown, in other case, and in part; and rows that are not there are not."""
    draw = random.Random(0)
    letters = "abcdefghij klmnop \"<&>'_*[]|~ äöü…\n"
    for _ in range(200):
        row = "".join(draw.choice(letters) for _ in range(draw.randint(16, 200)))
        if len(contents.flat(row)) < contents.LEAST:
            continue
        other = "".join(draw.choice(letters.upper()) for _ in range(200))
        rows = Rows({"forget": ["something else entirely", row]})
        start = draw.randint(0, max(0, len(row) - 60))
        quotes = [
            row,
            row.upper() if row.isascii() else row,
            html.escape(row),
            json.dumps(row),
            json.dumps(row, ensure_ascii=False),
            marked(row),
        ]
        quotes += [row[start : start + 60]] if len(contents.flat(row[start : start + 60])) > contents.QUOTE + 2 else []
        for quote in quotes:
            assert rows.quoted(f"{other} {quote} {other}") == "text 2 of 'forget'", (row, quote)
        assert rows.quoted(other) == ""


def test_the_last_look_finds_the_value_of_a_filter(tmp_path: Path) -> None:
    made = Made(tmp_path / "run")
    held = (made.place / "recipe.yaml").read_text().replace("people.jsonl", f"{PERSON.lower()}.jsonl")
    (made.place / "recipe.yaml").write_text(held)
    with pytest.raises(Refused, match=r"^recipe\.yaml: repeats words of text \d of 'filters'"):
        made.push(anyway=True)


@pytest.mark.parametrize("where", ["suite", "threshold", "title"])
def test_the_last_look_refuses_what_repeats_a_row(made: Made, where: str) -> None:
    row = made.results["answers"]["forget"][3]["prompt"]
    if where == "suite":
        made.results["suite"] = row
    elif where == "threshold":
        made.results["thresholds"][0]["measure"] = f"recall of {row[:48]}"
    else:
        made.results["numbers"][0]["title"] = "about Only in the parquet file."
    made.write()
    with pytest.raises(Refused, match=r"^README\.md: repeats words of text \d+ of '(forget|retain)'.*Nothing was pushed") as error:
        made.push()
    assert "Mustermann" not in str(error.value) and "parquet" not in str(error.value)


def test_the_last_look_refuses_a_folder_of_this_machine(made: Made) -> None:
    (made.weights / "chat_template.jinja").write_text(f"{{# of {made.place}/x #}}")
    with pytest.raises(Refused, match=r"^chat_template\.jinja: names a folder of this machine"):
        made.push()


def test_a_word_that_is_an_answer_may_stand_in_a_vocabulary(tmp_path: Path) -> None:
    """It was there before the run; words together, and words anywhere else, are a quote."""
    made = Made(tmp_path / "run", whole=True)
    rows = made.results["answers"]["forget"]
    rows[0]["truth"], rows[1]["truth"], rows[2]["truth"] = "Philadelphia", "-" * 64, "Saint Petersburg"
    made.write()
    words = {"Philadelphia": 5, "ĠPhiladelphia": 6, "-" * 80: 7}
    (made.weights / "tokenizer.json").write_text(json.dumps({"model": {"vocab": words, "merges": ["Phila delphia"]}}))
    (made.weights / "merges.txt").write_text("Phila delphia\n")
    (made.weights / "tokenizer.model").write_bytes(b"\x0a\x0e\x0a\xe2\x96\x81Philadelphia\x15\x00\x00")
    made.push()
    for name, raw in (
        ("tokenizer.model", "▁Saint▁Petersburg".encode()),
        ("tokenizer.json", json.dumps({"model": {"vocab": {"ĠSaintĠPetersburg": 1}}}).encode()),
        ("tokenizer.json", json.dumps({"added_tokens": [{"content": rows[3]["prompt"][:50]}]}).encode()),
        ("chat_template.jinja", b"{# Philadelphia #}"),
    ):
        kept = (made.weights / name).read_bytes() if (made.weights / name).exists() else b"{}"
        (made.weights / name).write_bytes(raw)
        with pytest.raises(Refused, match=rf"^{re.escape(name)}: repeats words of text \d+ of 'forget'"):
            made.push()
        (made.weights / name).write_bytes(kept)


@pytest.mark.parametrize("said", ["as in {0}", "as in {0}\n", '{{"a": "\\n{0}"}}', "{0}/x", "file://{0}.", "x:{0}"])
def test_a_folder_is_named_wherever_its_name_ends(said: str) -> None:
    for place in ("/home/ada", "/root"):
        with pytest.raises(Refused, match=rf"names a folder of this machine \({place}\)"):
            contents.check([Piece("README.md", said.format(place).encode())], {}, [Path(place)])


@pytest.mark.parametrize("said", ["{0}m and {0}-b {0}.x", "<b></root>", "a/root"])
def test_what_is_longer_than_a_folders_name_is_another(said: str) -> None:
    contents.check([Piece("README.md", said.format("/home/ada").encode())], {}, [Path("/home/ada"), Path("/root")])


def test_tokens_stay_what_they_are(tmp_path: Path) -> None:
    made = Made(tmp_path / "run", whole=True)
    tokens = {
        "added_tokens_decoder": {"5": {"content": "/"}}, "eos_token": "/s/e", "extra_special_tokens": ["/a/b"],
        "bos_token": {"content": "/b"},
    }  # fmt: skip
    (made.weights / "tokenizer_config.json").write_text(json.dumps(tokens | {"name_or_path": "/home/ada/base"}))
    assert json.loads(made.pieces()["tokenizer_config.json"].content) == tokens | {"name_or_path": "base"}


@pytest.mark.parametrize("raw", ["[]", "{", "5", '{"a": ' * 5000, '{"a": [' * 300 + "1" + "]}" * 300])
def test_settings_that_are_none_are_refused_by_name(made: Made, raw: str) -> None:
    path = made.weights / "adapter_config.json"
    path.write_text(raw)
    with pytest.raises(Refused, match=r"adapter_config\.json: (cannot be read|found|has more than)"):
        made.push()
    (made.weights / "generation_config.json").write_text(raw)
    path.write_text("{}")
    with pytest.raises(Refused, match=r"generation_config\.json: (cannot be read|found|has more than)"):
        made.push()


@pytest.mark.parametrize(
    "key, value",
    [
        ("numbers", [{"measure": "m", "title": "m", "set": "forget", "values": {}}]),
        ("attacks", [{"title": "x"}]), ("thresholds", [{}]), ("hub", "org/x"), ("attacks", [attack("a", None, True)]),
        ("attacks", [attack("a", 0.4, True) | {"curves": {"after": []}}]), ("thresholds", [{"measure": "m", "holds": "no"}]),
    ],
)  # fmt: skip
def test_an_evaluation_that_is_none_is_refused_where_it_is_read(made: Made, key: str, value: Any) -> None:
    made.results[key] = value
    made.write()
    with pytest.raises(Refused, match=rf"evaluation\.json: {key}.*Make it again"):
        made.push()


def test_two_merges_of_one_run_at_once(made: Made, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("llm_unlearn.requests.ways.release", lambda model, place, cache: place.mkdir())
    run = command.read(made.place, True)
    with command.merged(run, tmp_path, False) as first:
        with command.merged(run, tmp_path, False) as second:
            assert first.weights != second.weights and second.weights.is_dir()
        assert first.weights.is_dir() and not second.weights.exists()
    assert not list(tmp_path.glob(".run.*"))


@pytest.mark.parametrize(
    "text, left",
    [
        ("no such file: /home/me/a b/c.json (looked from /home/me/work).", "no such file: a b/c.json (looked from work)."),
        ("exp(Σ NLL / Σ T), NLL/T ÷ len, https://x.org/a/b", None),
        ("see ~/secret/place/file.txt", "see file.txt"),
    ],
)
def test_paths_leave_sentences_and_nothing_else_does(text: str, left: str | None) -> None:
    assert without_paths(text, [Path("/home/me/a b"), Path("/home/me")]).replace("c.json", "a b/c.json") == (left or text)


def test_prompts_that_describe_what_is_forgotten_are_withheld() -> None:
    held = {"contrast": {"expert": f"You know {PERSON}.", "novice": "-"}, "chat_template": "/x/y.jinja", "like": {"a": "b*"}}
    assert described(held) == {
        "contrast": {"expert": "withheld", "novice": "withheld"},
        "chat_template": "withheld",
        "like": {"a": "withheld"},
    }


# -------------------------------------------------------------------------------------------------------- what stays here


def test_only_known_kinds_of_files_are_pushed(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("training_args.bin", "optimizer.pt", "rows.jsonl", "people.csv", "evil.py", ".hidden.json", "adapter_model.bin"):
        (made.weights / name).write_bytes(b"x")
    (made.weights / "deep" / "er").mkdir(parents=True)
    (made.weights / "deep" / "er" / "adapter_config.json").write_text("{}")
    reply = made.push()
    assert {one["path"] for one in reply.facts["files"]} == set(made.pieces()) and len(reply.facts["files"]) == 6
    said = capsys.readouterr().out
    assert all(
        f"adapter/{name}: stays here" in said
        for name in ("training_args.bin", "rows.jsonl", "evil.py", "deep/er/adapter_config.json")
    )


def test_links_that_lead_out_are_refused(made: Made, tmp_path: Path) -> None:
    outside = tmp_path / "outside.safetensors"
    save_file({"a": np.zeros(4, np.float32)}, outside)
    (made.weights / "adapter_model-00002.safetensors").symlink_to(outside)
    with pytest.raises(Refused, match="a link that leads out of"):
        made.push()
    (made.weights / "adapter_model-00002.safetensors").unlink()
    (made.weights / "assistant").symlink_to(tmp_path / "clients", target_is_directory=True)
    with pytest.raises(Refused, match="a link that leads out of"):
        made.push()
    (made.weights / "assistant").unlink()
    (made.place / "evaluation.json").rename(tmp_path / "evaluation.json")
    (made.place / "evaluation.json").symlink_to(tmp_path / "evaluation.json")
    with pytest.raises(Refused, match="a link that leads out of"):
        made.push()


def test_a_pickle_by_another_name_is_not_weights(made: Made) -> None:
    (made.weights / "adapter_model.safetensors").write_bytes(b"\x80\x04\x95" + bytes(200))
    with pytest.raises(Refused, match="not a safetensors file"):
        made.push()
    (made.weights / "adapter_model.safetensors").rename(made.weights / "adapter_model.bin")
    with pytest.raises(Refused, match=r"no weights in safetensors.*found README\.md, adapter_model\.bin"):
        made.push()


def test_an_adapter_on_merged_adapters_is_not_put_on_the_wrong_model(made: Made) -> None:
    path = made.place / "recipe.yaml"
    path.write_text(path.read_text().replace("start: null", "start: runs/earlier"))
    with pytest.raises(Refused, match=r"other adapters merged into it \(model\.start\).*Add --merge"):
        made.push()
    assert command.read(made.place, True).kind == "merged"


# ------------------------------------------------------------------------------------------------------ what holds, and not


def failing(made: Made, how: str) -> str:
    """Make a run one that should not be published; what is said of it."""
    results = made.results
    match how:
        case "threshold":
            results["thresholds"][0] |= {"holds": False, "why": "rouge on retain is 0.79, at least 0.99 of before"}
            return "A threshold does not hold: rouge on retain is 0.79"
        case "collapsed":
            results["numbers"][1] = number("rouge", "retain", "as before", "raises", 0.8, 0.1, 0.8)
            return "The model collapsed: rouge on retain went from 0.800 to 0.100."
        case "broken":
            results["run"]["broken"] = True
            return "The run broke: a loss was not finite."
        case "deleted":
            manifest = {"salt": "", "settings": "", "base": "", "threads": 1, "versions": {}, "rows": [], "pieces": [], "format": 1}
            (made.place / "manifest.json").write_text(json.dumps(manifest | {"deletions": [{"rows": 3}]}))
            return "Rows were deleted after it was measured"
        case "another":
            results["run"]["recipe_hash"] = "0" * 16
            return "The evaluation is not of this run"
        case _:
            (made.place / "evaluation.json").unlink()
            return "It was not evaluated"


FAILURES = ("threshold", "collapsed", "broken", "another", "deleted", "no evaluation")


@pytest.mark.parametrize("how", FAILURES)
def test_what_should_not_be_published_is_refused_or_says_so_at_its_top(
    made: Made, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    why = failing(made, how)
    if how != "no evaluation":
        made.write()
    with pytest.raises(Refused, match=re.escape(why)) as error:
        made.push(dry_run=False)
    assert "Nothing was pushed; add --anyway" in str(error.value)
    reply = made.push()
    said = capsys.readouterr()
    assert any(one.startswith(why) for one in reply.facts["failed"]) and why in said.err
    top = ModelCard(made.card(failed=reply.facts["failed"])).text.split("## ")[0]
    assert "Published although it does not hold what it should" in top and why in html.unescape(top.replace("\\", ""))


def test_a_run_that_holds_has_no_shortcoming(made: Made) -> None:
    assert shortcomings(made.results, made.recipe.hash) == []


def test_a_dry_run_writes_nothing_and_asks_nobody(
    made: Made, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("somebody was asked"))
    before = {path: path.stat().st_mtime_ns for path in made.place.parent.rglob("*")}
    reply = made.push(merge=True)
    assert {path: path.stat().st_mtime_ns for path in made.place.parent.rglob("*")} == before
    said = capsys.readouterr()
    assert "# forgetful" in said.out and "the merged model is made when it is pushed" in said.err
    assert reply.status == 0 and not any(one["path"].endswith("tensors") for one in reply.facts["files"])


def test_words_that_cannot_be_meant(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Refused, match="expected USER/NAME"):
        made.push(repo_id="https://hub/me/x")
    with pytest.raises(Refused, match="not a run folder"):
        made.push(run=tmp_path)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(Refused, match=r"not logged in to the hub\. Nothing was pushed; log in"):
        made.push(dry_run=False)


def test_what_the_verb_answers(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("llm_unlearn.hub.pushing.WAITS", (0.0,))
    with Hub().running() as hub:
        as_the_hub(hub, monkeypatch, tmp_path, [])
        reply = made.push(dry_run=False)
        commit = hub.repos["me/forgetful"].branches["main"]
        assert reply.status == 0 and capsys.readouterr().out.splitlines()[-1] == f"{hub.url}/me/forgetful {commit}"
        facts = {name: reply.facts[name] for name in ("repo", "url", "commit", "private")}
        assert facts == {"repo": "me/forgetful", "url": f"{hub.url}/me/forgetful", "commit": commit, "private": True}
        assert {one["path"] for one in reply.facts["files"]} == set(hub.files("me/forgetful")) - {".gitattributes"}
        assert made.push(dry_run=False).facts["commit"] == commit and "had all of it already" in capsys.readouterr().out

        assert made.push(dry_run=False, public=True).facts["private"] and "private and stays so" in capsys.readouterr().out
        hub.faults.append(Fault("commit/main", do=lambda: hub.repos["me/forgetful"].commit("main", {}) and None, times=99))
        made.results["run"]["seconds"] = 2.0
        made.write()
        hub.repos["me/forgetful"].commit("main", {})
        assert made.push(dry_run=False).status == BUSY
        hub.faults.clear()
        hub.faults.append(Fault("preupload", status=503, times=99))
        assert made.push(dry_run=False).status == UNREACHABLE
    assert made.push(dry_run=False).status == UNREACHABLE
    said = capsys.readouterr()
    assert "error: 127.0.0.1:" in said.err and hub.token not in said.out + said.err


# -------------------------------------------------------------------------------------------------------------- injection


def test_nobody_elses_words_are_markup(made: Made) -> None:
    bad: Callable[[str], str] = lambda text: f"{text} {EVIL}"  # noqa: E731
    results = made.results
    results["numbers"] = [one | {"title": bad(one["title"]), "set": bad(one["set"])} for one in results["numbers"]]
    results["numbers"][0]["values"]["before"] = {"missing": bad("why")}
    results["run"] |= {"reason": bad("because"), "device": bad("cpu"), "versions": {bad("python"): bad("3")}}
    results["suite"], results["models"][bad("more")] = bad("suite"), {"name": bad("more"), "identity": bad("0")}
    results["thresholds"] = [
        {"measure": bad("m"), "set": bad("s"), "asked": bad("a"), "value": 1.0, "holds": False, "why": bad("w")}
    ]
    results["attacks"][0] |= {"title": bad("relearning"), "finding": bad("found"), "settings": {bad("k"): bad("v")}}
    made.write()
    path = made.place / "recipe.yaml"
    held = (
        path.read_text()
        .replace("prompt: question", f"prompt: {json.dumps(EVIL)}")
        .replace("base: org/base", f"base: {json.dumps('b' + EVIL)}")
    )
    path.write_text(held)
    text = made.card(failed=[bad("failed")])
    data = ModelCard(text).data
    assert data.tags[0] == "llm-unlearn" and len(model_index_to_eval_results(data.to_dict()["model-index"])[1]) == 2
    page = rendered(text)
    assert "<script" not in page and "<img" not in page and not re.search(r"<h1>(?!forgetful)", page)
    links = set(re.findall(r'href="([^"]*)"', page))
    assert all(one.startswith("https://arxiv.org/abs/") or one in ("recipe.yaml", "evaluation.json") for one in links), links
    heads = re.findall(r"<h2>(.*?)</h2>", page)
    assert heads == [
        "What was forgotten", "How", "What is left of it", "Thresholds", "Attacks", "Limits", "How to load it", "Measure it again",
        "Versions and hashes",
    ]  # fmt: skip
    rows = re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)
    assert {row.count("<t") for row in rows if "relearning" in row} == {7}, "three columns and one more, name, settings, share"


def test_code_and_fences_hold_what_is_put_into_them() -> None:
    for text in ("a`b", "``", "`x`", "a|b"):
        assert re.sub(r"<[^>]*>", "", str(MarkdownIt().render(code(text)))).strip() == html.escape(text)
    block = str(MarkdownIt().render(fenced("sh", "x\n```\n# no heading\n````")))
    assert "<h1>" not in block and block.count("<pre>") == 1


def test_numbers_are_told_as_they_are(made: Made) -> None:
    assert told_of(made.results, "me/x")["numbers"] == made.results["numbers"]
