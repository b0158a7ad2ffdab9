"""Pending requests become a run, its numbers become states and certificates; one run of a model after the other."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_unlearn.data.files import Row as DataRow
from llm_unlearn.data.words import texts_of
from llm_unlearn.reply import BUSY, DONE, INTERRUPTED, UNFIT
from llm_unlearn.report.verdict import listed
from llm_unlearn.requests import chain
from llm_unlearn.requests.certificate import signed
from llm_unlearn.requests.judging import findings, of_request
from llm_unlearn.requests.ledger import Ledger
from llm_unlearn.requests.matching import RowId, read_training
from llm_unlearn.requests.records import ATTENTION, FULFILLED, PENDING, RUNNING, WITHDRAWN, Request, Row, Run, Verdict, now
from llm_unlearn.requests.service import Office
from llm_unlearn.requests.ways import Served, Way, Work, tidy, withheld
from llm_unlearn.source import is_forgotten
from llm_unlearn.spec import Busy, Refused, plain
from llm_unlearn.thresholds import Finding, reason_of

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

NAMED = 20
"""So many requests are named in a line."""


@dataclass
class Desk:
    """One process that serves the requests of a ledger."""

    office: Office
    ledger: Ledger
    way: Way
    key: Ed25519PrivateKey
    one_by_one: bool = False
    show_text: bool = False
    say: Callable[[str], None] = print
    data: dict[RowId, DataRow] = field(default_factory=dict)

    def serve(self) -> int:
        """Serve all that is pending, and go on with what was killed.

        Returns:
            DONE, all that was pending is fulfilled, or nothing was · UNFIT, some need attention · BUSY, another process serves
            this model · INTERRUPTED.

        Raises:
            Refused: the ledger is not as it was written, or the data cannot be read.
        """
        from filelock import FileLock, Timeout

        waiting = self.ledger.requests(PENDING, RUNNING)
        worst = DONE
        if waiting:
            chain.check(self.ledger)
            self.data = read_training(self.office)
        for model in dict.fromkeys(one.model for one in waiting):
            self.way.ready(self._before(model), tuple(self.data))
        for model in dict.fromkeys(one.model for one in waiting):
            # held by the kernel as long as this process lives: a run that is under way and not locked was killed
            lock = FileLock(f"{self.ledger.path}.{hashlib.sha256(model.encode()).hexdigest()[:8]}.lock")
            try:
                with lock.acquire(timeout=0):
                    found = self._serve(model)
            except Timeout:
                under_way = ", ".join(f"run {one.id}, process {one.process}" for one in self.ledger.runs("running", model=model))
                print(
                    f"{model}: another process is serving it ({under_way or 'about to begin'}); try again later.", file=sys.stderr
                )
                found = BUSY
            if found == INTERRUPTED:
                return found
            worst = max(worst, found)
        attention = listed((str(one.id) for one in self.ledger.requests(ATTENTION)), NAMED)
        if not waiting:
            self.say("nothing is pending")
        if attention:
            self.say(f"need attention: {attention}; llm-unlearn requests retry N has one served again, from the model as it is now")
        return worst

    def _serve(self, model: str) -> int:
        """All runs of one model, which this process holds."""
        worst, looked_at = DONE, set[int]()
        while True:
            for one in self.ledger.requests(PENDING, model=model):
                if one.id in looked_at:  # the data was read once
                    continue
                looked_at.add(one.id)
                if problem := rows_problem(self.ledger.rows_of(one.id), self.data, self.office, self.ledger):
                    self.ledger.move(one.id, [PENDING], ATTENTION, ATTENTION, problem)
                    self.say(f"request {one.id}: {ATTENTION}: {problem}")
                    worst = UNFIT
            under_way = self.ledger.runs("running", model=model)
            most = 1 if self.one_by_one else None
            run = under_way[0] if under_way else self.ledger.claim(model, self.office.hash, most, self._left(model))
            if run is None:
                return worst
            if run.settings != self.office.hash:
                text = "the service, its recipe or its suite has changed since it was begun"
                again = [Verdict(one.id, PENDING, "", None, None) for one in self.ledger.served_by(run.id)]
                tidy(self.office.output / run.folder)
                self.ledger.finish(run.id, "given up", again, [], [text])
                self.say(f"run {run.id}: given up, as {text}; its requests are served anew")
                continue
            found = self._carry_out(run, resumed=bool(under_way))
            if found in (INTERRUPTED, BUSY):
                return found
            worst = max(worst, found)

    def _before(self, model: str) -> list[Path]:
        """The run folders whose result is the model now."""
        return [self.office.output / one.folder for one in self.ledger.runs("accepted", model=model)]

    def _left(self, model: str) -> list[int]:
        """The requests whose rows have left the data, all of them."""
        known = self.ledger.requests(model=model)
        return [one.id for one in known if not any(row.id in self.data for row in self.ledger.rows_of(one.id))]

    def _carry_out(self, run: Run, resumed: bool) -> int:
        """One run: from its requests to their states."""
        mine = self.ledger.served_by(run.id)
        work, unmeasured = self._work(run, mine)
        count = sum(len(ids) for ids in work.requests.values())
        names = listed((str(one.id) for one in mine), NAMED)
        what = "goes on with" if resumed else "serves"
        self.say(f"run {run.id} {what} request{'s' * (len(mine) > 1)} {names} ({count} rows) on {run.model}: {work.output}")
        try:
            served = self.way.serve(work)
        except Busy as error:
            print(f"{error} llm-unlearn requests run then goes on with run {run.id}.", file=sys.stderr)
            return BUSY
        except Refused as error:
            forgotten = [self.data[one] for ids in work.requests.values() for one in ids if one in self.data]
            if self.show_text:
                print(f"run {run.id}: {error}", file=sys.stderr)
            texts = [text for row in forgotten for column in self.office.columns for text in texts_of(row[column])]
            said = withheld(error, texts)
            self._end(run, "rejected", [Verdict(one.id, ATTENTION, said, None, None) for one in mine], [], [])
            return UNFIT
        if served is None:
            print(f"interrupted; llm-unlearn requests run goes on with run {run.id}.", file=sys.stderr)
            return INTERRUPTED
        return self._judge(run, mine, work, served, unmeasured)

    def _work(self, run: Run, mine: Sequence[Request]) -> tuple[Work, list[int]]:
        """What a run is to do, and the earlier requests that cannot be measured again, as their rows are gone."""
        ids: dict[int, list[RowId]] = {}
        earlier, unmeasured = list[int](), list[int]()
        for one in self.ledger.requests(model=run.model):
            if one.state == WITHDRAWN:
                continue
            rows = self.ledger.rows_of(one.id)
            ids[one.id] = [row.id for row in rows]
            if one.state == FULFILLED:
                earlier.append(one.id)
                if rows_problem(rows, self.data, self.office, self.ledger):
                    unmeasured.append(one.id)
        asked = {one.id for one in mine}
        others = (number for number in self.ledger.spared(run.id) if number not in asked)
        gone = dict.fromkeys(row.id for number in others for row in self.ledger.rows_of(number))
        work = Work(
            model=run.model,
            requests={number: ids[number] for number in sorted(asked)},
            earlier={number: ids[number] for number in sorted(set(earlier) - set(unmeasured))},
            gone=tuple(gone),
            before=self._before(run.model),
            output=self.office.output / run.folder,
        )
        return work, unmeasured

    def _judge(self, run: Run, mine: Sequence[Request], work: Work, served: Served, unmeasured: Sequence[int]) -> int:
        """Thresholds on every request, the earlier ones too; then all states in one transaction."""
        # a rejected run, too, began with the model before; from a store it may have deleted rows
        measured = (one.numbers for one in self.ledger.runs("accepted", "rejected", model=run.model))
        baseline = next(filter(None, measured), None) or served.numbers
        kept = [one for one in baseline if _kept(one)]
        every = {one.id: one for one in self.ledger.requests(model=run.model)}
        thresholds = self.office.service.thresholds
        found: dict[int, list[Finding]] = {}
        for number in (*work.requests, *work.earlier):
            own = every[number].numbers
            first = own["numbers"] if own else of_request(served.numbers, number)
            asked = thresholds if number in work.requests else [one for one in thresholds if is_forgotten(one.set)]
            found[number] = findings(asked, served.numbers, number, [*first, *kept])
        reasons = {number: served.broken or reason_of(one) for number, one in found.items()}
        accepted = any(not reasons[one.id] for one in mine) or (served.lasting and not served.broken)
        notes = [f"request {one}: not measured again, as its rows are gone from the data or were changed" for one in unmeasured]
        again = {str(one): not reasons[one] for one in work.earlier}

        def verdict(request: Request) -> Verdict:
            number, reason = request.id, reasons[request.id]
            if reason:
                lost = f"no longer holds after run {run.id}: " if number in work.earlier else ""
                return Verdict(number, ATTENTION, lost + reason, self._first(request, served), None)
            content = self._content(request, run, work, served, found[number], again)
            return Verdict(
                number,
                FULFILLED,
                "",
                self._first(request, served),
                lambda place: signed({**content, "ledger": {"id": self.ledger.name, **place}}, self.key),
            )

        judged = [*mine, *(every[one] for one in work.earlier)] if accepted else list(mine)
        verdicts = [verdict(one) for one in judged]
        if not accepted and work.earlier and not served.lasting:
            notes.append("its weights are not taken: earlier requests stand on the model as it was")
        self._end(run, "accepted" if accepted else "rejected", verdicts, served.numbers, notes)
        return UNFIT if any(reasons[one.request] for one in verdicts) else DONE

    @staticmethod
    def _first(request: Request, served: Served) -> dict[str, Any] | None:
        """The numbers on a request's rows, where they are its first: what is `before` for every later run."""
        return None if request.numbers else {"numbers": of_request(served.numbers, request.id)}

    def _end(
        self, run: Run, state: str, verdicts: Sequence[Verdict], numbers: Sequence[Mapping[str, Any]], notes: Sequence[str]
    ) -> None:
        tidy(self.office.output / run.folder)  # before the ledger says that it is over: it holds texts of the rows
        self.ledger.finish(run.id, state, verdicts, numbers, notes)
        for one in verdicts:
            self.say(f"request {one.request}: {one.state}{': ' * bool(one.reason)}{one.reason}")
        for note in notes:
            self.say(f"run {run.id}: {note}")

    def _content(
        self, request: Request, run: Run, work: Work, served: Served, found: Sequence[Finding], again: Mapping[str, bool]
    ) -> dict[str, Any]:
        """What a certificate says, but for its place in the ledger and the signature."""
        rows = self.ledger.rows_of(request.id)
        thresholds = [
            {key: one[key] for key in ("measure", "set", "asked", "value", "bound", "holds") if key in one} for one in found
        ]
        return {
            "format": 1,
            "says": "The rows below were forgotten by the model below, as far as the thresholds below measure it.",
            "request": {key: getattr(request, key) for key in ("id", "kind", "selector", "model", "due", "added")},
            "rows": {
                "count": len(rows),
                "hash": "HMAC-SHA256 of id and content under the salt of the ledger",
                "hashes": sorted(row_seal(self.ledger, row) for row in rows),
            },
            "run": {"id": run.id, "folder": run.folder, "began": run.began, "certified": now(), **served.facts},
            "served": "now" if request.id in work.requests else "earlier",
            "served_together": sorted(work.requests),
            "earlier_requests_hold": dict(again),
            "weights": {"before": served.before, "after": served.after},
            "thresholds": thresholds,
            "settings": plain(self.office.service),
            "numbers": [*of_request(served.numbers, request.id), *(n for n in served.numbers if _kept(n))],
        }


def _kept(number: Mapping[str, Any]) -> bool:
    return not is_forgotten(str(number["set"]))


def row_seal(ledger: Ledger, row: Row) -> str:
    """What stands for a row in a certificate."""
    return ledger.digest("row", row.id, row.content)


def row_of(ledger: Ledger, office: Office, name: RowId, row: DataRow, score: float) -> Row:
    """A row of the data as it stands in a ledger."""
    return Row(name, ledger.digest("content", *(texts_of({column: row[column]}) for column in office.columns)), score)


def rows_problem(rows: Sequence[Row], data: Mapping[RowId, DataRow], office: Office, ledger: Ledger) -> str:
    """Why the rows of a request cannot be served or measured; empty where they are as they were when it was added."""
    gone = sum(one.id not in data for one in rows)
    changed = sum(one.id in data and row_of(ledger, office, one.id, data[one.id], one.score).content != one.content for one in rows)
    what = ((gone, "are gone from the data"), (changed, "were changed"))
    said = [f"{count} of its {len(rows)} rows {text}" for count, text in what if count]
    return f"{' and '.join(said)} since it was added; withdraw it, and add it again" if said else ""
