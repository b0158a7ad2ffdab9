"""Whether certificates are true: signature, weights, the ledger's chain, and whether a request stands on the newest weights."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from llm_unlearn import folder
from llm_unlearn.requests import chain
from llm_unlearn.requests.certificate import STORE, Hashes, files_of, read, signature_problems, weight_problems
from llm_unlearn.requests.ledger import Ledger
from llm_unlearn.requests.records import FULFILLED, detail_of
from llm_unlearn.requests.serving import row_seal
from llm_unlearn.spec import Refused


def of_ledger(ledger: Ledger, output: Path, trusted: str) -> list[str]:
    """All that does not fit: in the ledger, and in every certificate that it holds.

    Args:
        output: where the run folders are.
        trusted: the public key that must have signed.
    """
    found, stores, certified = chain.problems(ledger), set[Path](), set[tuple[int, int | None]]()
    hashes, said = cache(files_of), cache(lambda run: _said(ledger, run))  # of weights that many certificates name
    for request, run, text in ledger.each_certificate():
        certified.add((request, run))
        name = f"request {request}, certificate of run {run}"
        found += [f"{name}: {problem}" for problem in of_certificate(text, name, ledger, output, trusted, hashes)]
        if not list(of_certificate(text, name, None, None, trusted)) and _of_store(certificate := read(text, name)):
            stores.add(_adapter(certificate).parent)
    newest: dict[str, int] = {run.model: run.id for run in ledger.runs("accepted")}  # in their order
    for one in ledger.requests(FULFILLED):
        last = newest.get(one.model)
        if (one.id, last) not in certified and f"request {one.id}" not in said(last):
            found.append(f"request {one.id}: is fulfilled, and has no certificate on the newest weights (run {last})")
    return found + [f"{store}: {text}" for store in sorted(stores) for text in _store_problems(store)]


def _adapter(certificate: dict[str, Any]) -> Path:
    return Path(certificate["weights"]["after"]["name"])


def _of_store(certificate: dict[str, Any]) -> bool:
    return bool(certificate["weights"]["after"]["place"] == STORE)


def _store_problems(store: Path) -> list[str]:
    """What `llm-unlearn verify` finds."""
    from llm_unlearn.exact.verify import problems

    try:
        return problems(store)
    except Refused as error:
        return [str(error)]


def _against_store(certificate: dict[str, Any], hashes: Hashes) -> list[str]:
    """Whether a store is as a certificate says, unless a later deletion has replaced its weights."""
    from llm_unlearn.exact.manifest import FILE, read

    after = certificate["weights"]["after"]
    adapter = _adapter(certificate)
    try:
        manifest = read(adapter.parent)
    except Refused as error:
        return [str(error)]
    if len(manifest.deletions) > after["deletions"]:
        return []
    manifest_is = folder.sha256(adapter.parent / FILE) == after["manifest"]
    checks = ((manifest_is, adapter.parent / FILE), (hashes(adapter) == after["files"], f"weights {adapter}"))
    return [f"{what}: not as it was certified" for holds, what in checks if not holds]


def of_certificate(
    text: str, name: str, ledger: Ledger | None, output: Path | None, trusted: str | None, hashes: Hashes = files_of
) -> Iterable[str]:
    """All that does not fit in one certificate.

    Args:
        ledger, output: its ledger and the run folders; None checks the signature alone.
        hashes: a folder -> the SHA-256 of its files.
    """
    try:
        certificate = read(text, name)
    except Refused as error:
        return [str(error)]
    found = list(signature_problems(certificate, trusted))
    if found:  # what nobody signed may have any shape
        return found
    if output:
        found += _against_store(certificate, hashes) if _of_store(certificate) else []
        found += weight_problems(certificate, output, hashes)
    return found + (_against_ledger(certificate, ledger) if ledger else [])


def _against_ledger(certificate: dict[str, Any], ledger: Ledger) -> list[str]:
    place, number = certificate["ledger"], certificate["request"]["id"]
    if place["id"] != ledger.name:
        return [f"was made for another ledger ({place['id']}; this is {ledger.name})"]
    if chain.hash_of_event(ledger, place["event"]) != place["hash"]:
        return [f"event {place['event']} of the ledger is not the one it was made after: the ledger was changed or cut"]
    if certificate["rows"]["hashes"] != sorted(row_seal(ledger, row) for row in ledger.rows_of(number)):
        return ["its rows are not those of the request"]
    return []


def _said(ledger: Ledger, run: int | None) -> set[str]:
    """The requests of which a run says why it did not measure them again."""
    with ledger.reading() as on:
        events = on.execute("SELECT detail FROM events WHERE what = 'run accepted' AND run = ?", (run,)).fetchall()
    said = [detail_of(event["detail"]).get("notes") for event in events]
    notes = [str(note).partition(": not measured again") for told in said if isinstance(told, list) for note in told]
    return {request for request, found, _ in notes if found}
