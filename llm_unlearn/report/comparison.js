"use strict";
// Which runs are shown beside each other: the page's style follows the boxes, and only the examples are made here.
const boxes = [...document.querySelectorAll("#choice input")];
for (const box of boxes) box.addEventListener("change", () => browse());
for (const button of document.querySelectorAll("#choice button")) button.addEventListener("click", () => {
  boxes.forEach((box, i) => { box.checked = i < Number(button.value); });
  browse();
});

// A click on a head of the runs' table sorts it; a second click turns the order round.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, at) => head.querySelector("button").addEventListener("click", () => {
    const down = at === 0 ? head.getAttribute("aria-sort") === "ascending" : head.getAttribute("aria-sort") !== "descending";
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = row => row.cells[at].dataset.value ?? row.cells[at].textContent.trim();
    const rows = [...body.rows].sort((a, b) => {
      const x = value(a), y = value(b);
      if (x === "" || y === "") return (x === "") - (y === "");
      const order = isNaN(x) || isNaN(y) ? x.localeCompare(y, undefined, {numeric: true}) : x - y;
      return down ? -order : order;
    });
    body.append(...rows);
  }));
}

// The examples: read as data, written as text.
const data = JSON.parse(document.querySelector("#data")?.textContent ?? "null");
const MOST = 50;
let page = 0;
const at = name => document.querySelector(`#${name}`);

function element(name, text, kind) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (kind) made.className = kind;
  return made;
}
// A text that may run either way; a long one begins with what one reads, and the rest opens.
function fill(cell, text) {
  cell.dir = "auto";
  if (text.length <= 900) cell.textContent = text;
  else {
    const more = element("details", undefined, "more");
    more.append(element("summary", `${(text.length - 700).toLocaleString("en")} more characters`), text.slice(700));
    cell.append(text.slice(0, 700), more);
  }
  return cell;
}
function small(text) {
  const made = element("small", text);
  made.dir = "ltr";
  return made;
}
function heading(text, title, kind) {
  const made = element("th", text, kind);
  made.scope = "col";
  if (title) made.title = title;
  return made;
}
function shown(column) {
  return column.place === null || (boxes[column.place]?.checked ?? true);
}
function option(select, value, text) {
  const made = element("option", text);
  made.value = value;
  select.append(made);
}
const same = (a, b) => a.split(/\s+/).filter(Boolean).join(" ") === b.split(/\s+/).filter(Boolean).join(" ");

function spread(values) {
  const found = values.filter(value => value !== null);
  return found.length ? Math.max(...found) - Math.min(...found) : -1;
}
// High values come first; what has no value comes last.
function rank(row, order, chosen) {
  const [kind, column] = order.split(" ").length > 1 ? [order.split(" ")[0], Number(order.split(" ")[1])] : [order, 0];
  const runs = chosen.filter(i => data.columns[i].place !== null);
  const control = data.columns.findIndex(one => one.class === "retrained");
  if (kind === "differ") return spread(runs.map(i => row.p[i]));
  if (kind === "far") return control < 0 ? -1 : Math.max(-1, ...runs.filter(i => row.p[i] !== null && row.p[control] !== null)
    .map(i => Math.abs(row.p[i] - row.p[control])));
  return row.p[column] === null ? -Infinity : kind === "most" ? row.p[column] : -row.p[column];
}
function browse() {
  if (!data) return;
  const set = data.sets[Number(at("set").value)], wanted = at("search").value.trim().toLowerCase();
  const order = at("order").value, chosen = data.columns.map((_, i) => i).filter(i => shown(data.columns[i]));
  const text = row => [row.id, row.q, row.t, ...chosen.filter(i => row.a[i] >= 0).map(i => data.texts[row.a[i]])].join("\n");
  let rows = set.rows.filter(row => !wanted || text(row).toLowerCase().includes(wanted));
  if (order !== "set") rows = rows.map(row => [rank(row, order, chosen), row]).sort((a, b) => b[0] - a[0]).map(pair => pair[1]);
  const pages = Math.max(1, Math.ceil(rows.length / MOST));
  page = Math.min(Math.max(0, page), pages - 1);
  const left = set.of > set.rows.length ? `; ${set.of - set.rows.length} of ${set.of} are not in the files` : "";
  at("found").textContent = `${rows.length} of ${set.rows.length} examples${left}; page ${page + 1} of ${pages}`;
  at("earlier").disabled = page === 0;
  at("later").disabled = page === pages - 1;
  const head = element("tr");
  head.append(heading("question"), heading("true answer"));
  for (const i of chosen) head.append(heading(data.columns[i].name, data.columns[i].title, data.columns[i].place === null ? data.columns[i].class : ""));
  const body = rows.slice(page * MOST, (page + 1) * MOST).map(row => {
    const line = element("tr"), question = fill(element("th"), row.q);
    question.scope = "row";
    question.append(small(row.id));
    line.append(question, fill(element("td"), row.t));
    for (const i of chosen) {
      const said = row.a[i] < 0 ? "" : data.texts[row.a[i]];
      const cell = fill(element("td", undefined, row.a[i] >= 0 && same(said, row.t) ? "same" : ""), said);
      if (row.p[i] !== null) cell.append(small(`p = ${row.p[i]}`));
      line.append(cell);
    }
    return line;
  });
  at("examples").tHead.replaceChildren(head);
  at("examples").tBodies[0].replaceChildren(...body);
  at("examples").style.minWidth = `${16 * (chosen.length + 2) / 1.4}rem`;
}
if (data) {
  data.sets.forEach((set, i) => option(at("set"), i, set.name));
  option(at("order"), "set", "in the order of the set");
  option(at("order"), "differ", "where the runs differ most");
  if (data.columns.some(one => one.class === "retrained")) option(at("order"), "far", "where a run is farthest from retrained");
  data.columns.forEach((column, i) => {
    option(at("order"), `most ${i}`, `likeliest for ${column.name}`);
    option(at("order"), `least ${i}`, `least likely for ${column.name}`);
  });
  for (const name of ["set", "order", "search"]) at(name).addEventListener("input", () => { page = 0; browse(); });
  at("earlier").addEventListener("click", () => { page--; browse(); });
  at("later").addEventListener("click", () => { page++; browse(); });
}
browse();
addEventListener("beforeprint", () => document.querySelectorAll("details.why, details.more").forEach(one => one.open = true));
