"""The sub-verbs of `llm-unlearn requests`. Heavy imports stand inside the verb that needs them."""

from __future__ import annotations

import argparse
import getpass
import os
import socket
import sys
from collections import Counter
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from llm_unlearn import folder
from llm_unlearn.data.words import asked_for
from llm_unlearn.reply import DONE, UNFIT, Reply
from llm_unlearn.report.verdict import listed
from llm_unlearn.requests import service
from llm_unlearn.requests.certificate import PUBLIC, public_pem, public_text, read_public, signing_key
from llm_unlearn.requests.file import is_absent
from llm_unlearn.requests.ledger import Ledger
from llm_unlearn.requests.matching import Found
from llm_unlearn.requests.records import ATTENTION, FULFILLED, PENDING, WITHDRAWN, Request
from llm_unlearn.requests.service import Office
from llm_unlearn.source import missing
from llm_unlearn.spec import Refused

SHOWN = 20
"""So many rows of a request are shown before it is put in."""
LISTED = 200
"""So many requests are listed where nobody asks for all."""


def _office(options: argparse.Namespace) -> Office:
    if int(options.environment.get("WORLD_SIZE", "1")) > 1:
        raise Refused("requests: expected one process, found several; start it without `accelerate launch`.")
    return service.load(options.service)


def _open(options: argparse.Namespace) -> tuple[Office, Ledger]:
    office = _office(options)
    return office, _ledger(office, begin=False)


def _ledger(office: Office, begin: bool) -> Ledger:
    return Ledger(office.ledger, f"{_user()}@{socket.gethostname()}", begin)


def _user() -> str:
    """Who asks; by number where it has no name, as in a container."""
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):
        return f"uid {os.getuid()}"


def new(options: argparse.Namespace) -> Reply:
    if options.service.exists():
        raise Refused(f"{options.service}: exists already. Nothing was changed; choose another name with --service.")
    folder.write(options.service, service.TEMPLATE)
    print(f"{options.service}\nnext: llm-unlearn requests add --dry-run --where column=value")
    return Reply(facts={"path": str(options.service)})


def add(options: argparse.Namespace) -> Reply:
    office = _office(options)
    name = options.model or office.model
    if missing(name) and name != office.model:
        raise Refused(f"--model: no such folder: {name} (looked from {Path.cwd()}).")
    if office.in_pieces and name != office.model:
        raise Refused(f"--model: found {name}; this service's requests are served by {office.model}, its recipe's output.")
    from llm_unlearn.requests import matching
    from llm_unlearn.requests.serving import row_of

    rows = matching.read_training(office)
    if options.where:
        wanted = asked_for(options.where)
        kind, selector, found = "where " + ", ".join(sorted(wanted)), sorted(wanted.items()), matching.by_columns(wanted, rows)
    elif options.ids:
        names = (
            [line.strip() for line in _standard_input("--ids").splitlines() if line.strip()]
            if options.ids == ["-"]
            else options.ids
        )
        found = matching.by_ids(names, rows)
        kind, selector = "ids", sorted((str(one.id), "") for one in found)
    else:
        text = _text(options.text)
        found = matching.by_text(text, rows, office.columns, options.score)
        kind, selector = f"text, score {options.score:g}", [("text", text), ("score", str(options.score))]
    _preview(found, office, len(rows), options.show_text)
    if len(found) > office.service.most * len(rows) and not options.yes_many:
        raise Refused(
            f"{len(found)} of {len(rows)} rows are more than the service's `most` ({office.service.most:g} of all). Nothing was "
            "added; look at them with --dry-run, and add --yes-many if they are meant."
        )
    if office.in_pieces:
        from llm_unlearn.requests.stores import exact_ids

        exact_ids(office, [one.id for one in found])
    if options.dry_run:
        print("dry run: nothing was added")
        return Reply(facts={"request": None, "rows": [one.id for one in found]})
    ledger = _ledger(office, begin=True)
    data = office.service.data
    request, is_new = ledger.add(
        key=options.key,
        kind=kind,
        selector=ledger.digest("selector", selector, data.source, data.config, data.split),
        model=name,
        due=options.due,
        rows=[row_of(ledger, office, one.id, one.row, one.score) for one in found],
    )
    print(f"request {request.id}: {'added, ' if is_new else 'is there already, '}{request.state}")
    if not is_new and request.state == ATTENTION:
        print(f"to have it served again: llm-unlearn requests retry {request.id}")
    said = {"request": request.id, "state": request.state, "added": is_new}
    return Reply(facts={**said, "rows": [one.id for one in found]})


def _text(word: str) -> str:
    if word == "-":
        return _standard_input("--text")
    if word.startswith("@"):
        if not Path(word[1:]).is_file():
            raise Refused(f"--text: no such file: {word[1:]} (looked from {Path.cwd()}).")
        try:
            return Path(word[1:]).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise _no_text(f"--text: {word[1:]}", error) from None
    return word


def _standard_input(option: str) -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise _no_text(f"{option}: standard input", error) from None


def _no_text(where: str, error: UnicodeDecodeError) -> Refused:
    """What is said of text in another encoding, without its words."""
    said = f"{where}: not text in UTF-8 ({error.reason} at byte {error.start})"
    return Refused(f"{said}. Save it as UTF-8. Nothing was added.")


def _preview(found: Sequence[Found], office: Office, of: int, show_text: bool) -> None:
    print(f"{len(found)} of {of} rows of {office.service.data.source}:")
    for one in found[:SHOWN]:
        print(f"  {one.id}  {one.score:.0f}")
        for column in office.columns if show_text else ():
            print(f"      {column}: {one.row[column]}")
    if len(found) > SHOWN:
        print(f"  … and {len(found) - SHOWN} more")


def show(options: argparse.Namespace) -> Reply:
    office = _office(options)
    if is_absent(office.ledger):
        print(f"no requests yet: {office.ledger} is not there, and the first `llm-unlearn requests add` begins it")
        return Reply(facts={"requests": []})
    ledger = _ledger(office, begin=False)
    today, rows = date.today().isoformat(), ledger.row_counts()
    found = [(one, rows.get(one.id, 0), is_overdue(one, today)) for one in ledger.requests(*(options.state or ()))]
    keys = ("id", "state", "reason", "kind", "model", "due", "added", "run")
    said = [{key: getattr(one, key) for key in keys} | {"rows": count, "overdue": late} for one, count, late in found]
    if not found:
        print(f"no requests{' in this state' if options.state else ''}")
        return Reply(facts={"requests": said})
    from llm_unlearn.report.listing import print_requests

    shown = found if options.all else found[:LISTED]
    print_requests([_cells(one, count, late) for one, count, late in shown])
    if len(shown) < len(found):
        states = ", ".join(f"{count} {state}" for state, count in Counter(one.state for one, _, _ in found).items())
        print(f"… and {len(found) - len(shown):,} more of {len(found):,} ({states}); see --state, --all and --json")
    return Reply(facts={"requests": said})


def _cells(one: Request, rows: int, late: bool) -> tuple[str, ...]:
    """A request as a line of a table."""
    due = f"{one.due or ''}{' overdue' * late}"
    return str(one.id), one.state, one.kind, str(rows), due, one.model, one.added[:10], one.reason


def is_overdue(request: Request, today: str) -> bool:
    """Whether its day has passed and it is not fulfilled."""
    return request.due is not None and request.due < today and request.state not in (FULFILLED, WITHDRAWN)


def run(options: argparse.Namespace) -> Reply:
    office, ledger = _open(options)
    key = signing_key(options.config)
    from llm_unlearn.requests.serving import Desk
    from llm_unlearn.requests.stores import way_of

    desk = Desk(office, ledger, way_of(office, options.cache), key, one_by_one=options.one_by_one, show_text=options.show_text)
    status = desk.serve()
    return Reply(status, {"states": {str(one.id): one.state for one in ledger.requests()}})


def verify(options: argparse.Namespace) -> Reply:
    alone = options.certificates and not options.service.is_file()  # who receives a certificate has no ledger
    office, ledger = (None, None) if alone else _open(options)
    trusted = read_public(options.key) if options.key else None
    if trusted is None and not alone:
        trusted = public_text(signing_key(options.config))
    from llm_unlearn.requests import chain, verifying

    old: list[str] = []
    if options.certificates:
        found = []
        for path in options.certificates:
            if not path.is_file():
                raise Refused(f"{path}: no such file (looked from {Path.cwd()}).")
            text, output = path.read_text(encoding="utf-8", errors="replace"), office.output if office else None
            found += [f"{path}: {said}" for said in verifying.of_certificate(text, str(path), ledger, output, trusted)]
        what = f"{len(options.certificates)} certificates" + (", signatures only: no service file here" if alone else "")
    else:
        assert office and ledger and trusted
        found, old = verifying.of_ledger(ledger, office.output, trusted), chain.unchecked(ledger)
        what = f"the ledger {office.ledger} and its {ledger.count_certificates():,} certificates"
    for line in found:
        print(line, file=sys.stderr)
    signer = f"signed with {trusted}" if trusted else "by whom was not checked: give --key PEM"
    print(f"{what}: {f'{len(found)} things do not fit' if found else f'all fits; {signer}'}")
    if old:
        print(f"not covered by events of an earlier version (key, run, times, process, scores): {listed(old, 20)}")
    return Reply(UNFIT if found else DONE, {"problems": found, "signed_with": trusted, "not_covered": old})


def export(options: argparse.Namespace) -> Reply:
    _, ledger = _open(options)
    key = signing_key(options.config)
    states = {one.id: one.state for one in ledger.requests()}
    newest: dict[int, int] = {}
    for request, run, text in ledger.each_certificate():  # the newest of a request comes last, and stays
        newest[request] = run
        folder.write(options.folder / f"request-{request}.json", text)
    folder.write(options.folder / PUBLIC, public_pem(key))
    print(f"{options.folder}: {len(newest)} certificates and {PUBLIC}")
    for request in newest:
        if states[request] != FULFILLED:
            print(f"request {request} is {states[request]} now; its certificate is of an earlier run", file=sys.stderr)
    return Reply(facts={"folder": str(options.folder), "requests": list(newest)})


def model(options: argparse.Namespace) -> Reply:
    office, ledger = _open(options)
    if options.folder.exists():
        raise Refused(f"{options.folder}: exists already. Nothing was changed; choose another name.")
    name = options.model or office.model
    runs = ledger.runs("accepted", model=name)
    if not runs:
        known = ", ".join(dict.fromkeys(run.model for run in ledger.runs("accepted"))) or "none yet"
        raise Refused(f"--model: {name}: no request on it was fulfilled; models with fulfilled requests: {known}.")
    from llm_unlearn.requests.stores import way_of
    from llm_unlearn.requests.ways import release

    release(way_of(office, options.cache).model(name, [office.output / run.folder for run in runs]), options.folder, options.cache)
    print(f"{options.folder}: {name} after run{'s' * (len(runs) > 1)} {', '.join(str(run.id) for run in runs)}")
    return Reply(facts={"folder": str(options.folder), "model": name, "runs": [run.id for run in runs]})


def withdraw(options: argparse.Namespace) -> Reply:
    _, ledger = _open(options)
    state = ledger.move(options.request, [PENDING, ATTENTION], WITHDRAWN, WITHDRAWN).state
    print(f"request {options.request}: {state}")
    return Reply(facts={"request": options.request, "state": state})


def retry(options: argparse.Namespace) -> Reply:
    _, ledger = _open(options)
    state = ledger.move(options.request, [ATTENTION], PENDING, "retried").state
    print(f"request {options.request}: {state}")
    return Reply(facts={"request": options.request, "state": state})
