"use strict";
// The page's data: rows are [id, labels, size, score, confident, mIoU, reasons, failure].
const data = (id) => JSON.parse(document.getElementById(id).textContent);
const classes = data("classes");
const rows = data("rows").map(([id, labels, size, score, sure, miou, reasons, failure], index) => ({
  index, id, labels, size, score, sure, miou, reasons, failure,
  text: [id, failure, ...reasons].join("\n").toLowerCase(),
}));
const pictures = new Map();
for (const template of document.querySelectorAll("template[data-row]"))
  pictures.set(Number(template.dataset.row), template);

const PER_PAGE = { sheet: 60, list: 12 };
const DEFAULTS = {
  q: "", class: "", sort: "queue", page: "1", open: "",
  view: rows.length <= PER_PAGE.list ? "list" : "sheet",
};
const tools = document.getElementById("tools");
const list = document.getElementById("items");
const pagers = document.querySelectorAll(".pager");
const dialog = document.querySelector("dialog");
const controls = { q: tools.elements.q, class: tools.elements.class, sort: tools.elements.sort, view: tools.elements.view };
let state = { ...DEFAULTS };
let found = [];

// Elements are made of text, never of markup: names come from outside.
function make(tag, className, ...content) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...content.filter((part) => part !== null));
  return element;
}
const percent = (share) => `${(100 * share).toFixed(1)} %`;

function chip(label) {
  const [name, colour] = classes[label];
  const mark = make("span", "swatch");
  mark.style.setProperty("--colour", colour);
  return make("span", "chip", mark, name);
}

function numbers(row) {
  const parts = [];
  if (row.score !== null) parts.push(`score ${row.score.toFixed(2)}`);
  if (row.sure !== null) parts.push(`confident ${percent(row.sure)}`);
  if (row.miou !== null) parts.push(`mIoU ${percent(row.miou)}`);
  return make("span", "numbers quiet", parts.join(" · "));
}

function reasons(row, most = Infinity) {
  const items = row.reasons.slice(0, most).map((reason) => make("li", "", reason));
  if (row.failure) items.unshift(make("li", "bad", `cannot be shown: ${row.failure}`));
  if (row.reasons.length > most) items.push(make("li", "quiet", `and ${row.reasons.length - most} more`));
  return items.length ? make("ul", "reasons", ...items) : make("p", "quiet", "nothing stands out");
}

function thumbnail(row) {
  const template = pictures.get(row.index);
  if (!template) return make("span", "nothing quiet", row.failure ? "no picture" : "picture not in this page");
  const image = make("img");
  image.src = template.dataset.thumb;
  image.alt = `${row.id}: mask`;
  image.style.aspectRatio = `${row.size[1]} / ${row.size[0]}`;
  return image;
}

function figures(row) {
  const template = pictures.get(row.index);
  if (template && template.content.childElementCount) {
    const all = make("div", "figures", template.content.cloneNode(true));
    all.style.setProperty("--columns", Math.min(all.childElementCount, 6));
    return all;
  }
  return make("div", "small-only", thumbnail(row), template ? make("p", "quiet", "no large pictures of it in this page") : null);
}

function title(row) {
  const name = make("h3", "", row.id);
  const size = row.size[0] ? make("span", "quiet", `${row.size[1]} × ${row.size[0]}`) : null;
  return make("header", "", name, ...row.labels.map(chip), size, numbers(row));
}

function tile(row) {
  const card = make("article", "card item tile-item", make("div", "thumb", thumbnail(row)), make("h3", "", row.id),
    make("div", "chips", ...row.labels.map(chip)), numbers(row), reasons(row, 3));
  card.setAttribute("role", "button");
  return card;
}

const large = (row) => make("article", "card item", title(row), reasons(row), figures(row));

const ORDERS = {
  queue: (row) => (row.failure || row.score === null ? -Infinity : -row.score),
  sure: (row) => row.sure ?? Infinity,
  worst: (row) => row.miou ?? Infinity,
  best: (row) => -(row.miou ?? -Infinity),
  data: (row) => row.index,
};

function select() {
  const words = state.q.toLowerCase().split(/\s+/).filter(Boolean);
  const label = state.class === "" ? null : classes.findIndex(([name]) => name === state.class);
  found = rows.filter((row) => (label === null || row.labels.includes(label)) && words.every((word) => row.text.includes(word)));
  if (state.sort === "name") {
    const { compare } = new Intl.Collator(undefined, { numeric: true });
    found.sort((a, b) => compare(a.id, b.id));
  } else {
    const key = new Map(found.map((row) => [row, ORDERS[state.sort](row)]));
    found.sort((a, b) => (key.get(a) === key.get(b) ? 0 : key.get(a) < key.get(b) ? -1 : 1));
  }
}

const pages = () => Math.max(1, Math.ceil(found.length / PER_PAGE[state.view]));

function show() {
  const per = PER_PAGE[state.view];
  const page = Math.min(pages(), Math.max(1, Number.parseInt(state.page, 10) || 1));
  state.page = String(page);
  const some = found.slice((page - 1) * per, page * per);
  list.className = state.view;
  list.replaceChildren(...some.map((row) => {
    const card = state.view === "sheet" ? tile(row) : large(row);
    card.tabIndex = 0;
    card.dataset.row = row.index;
    return card;
  }));
  if (!some.length) list.append(make("p", "quiet", "no image fits"));
  const from = found.length ? (page - 1) * per + 1 : 0;
  for (const pager of pagers) {
    const [back, next] = pager.querySelectorAll("button");
    pager.hidden = false;
    back.disabled = page === 1;
    next.disabled = page === pages();
    pager.querySelector("output").textContent =
      `${from.toLocaleString("en")}–${Math.min(page * per, found.length).toLocaleString("en")} of ${found.length.toLocaleString("en")}` +
      (found.length < rows.length ? ` (${rows.length.toLocaleString("en")} in all)` : "") +
      `, page ${page} of ${pages()}`;
  }
}

function open(row) {
  const close = make("button", "close", "Close");
  close.type = "button";
  close.addEventListener("click", () => dialog.close());
  dialog.replaceChildren(title(row), reasons(row), figures(row), close);
  if (!dialog.open) dialog.showModal();
  dialog.scrollTop = 0;
}

function remember(change) {
  const narrowed = ["q", "class", "sort", "view"].some((key) => key in change && change[key] !== state[key]);
  state = { ...state, ...(narrowed ? { page: "1" } : {}), ...change };
  const differs = Object.entries(state).filter(([key, value]) => value !== DEFAULTS[key]);
  const hash = new URLSearchParams(differs).toString();
  history.replaceState(null, "", hash ? `#${hash}` : "#");
}

function apply() {
  state = { ...DEFAULTS, ...Object.fromEntries(new URLSearchParams(location.hash.slice(1))) };
  if (!(state.view in PER_PAGE)) state.view = DEFAULTS.view;
  if (!(state.sort in ORDERS) && state.sort !== "name") state.sort = DEFAULTS.sort;
  if (state.class !== "" && !classes.some(([name]) => name === state.class)) state.class = "";
  for (const [key, control] of Object.entries(controls)) control.value = state[key];
  select();
  show();
  const row = state.open && rows.find((one) => one.id === state.open);
  if (row) open(row);
  else if (dialog.open) dialog.close();
  if (location.hash.length > 1) document.getElementById("images").scrollIntoView();
}

function change(what) {
  remember(what);
  select();
  show();
}

function turn(step, { top = true } = {}) {
  const page = Number(state.page) + step;
  if (page < 1 || page > pages()) return false;
  remember({ page: String(page) });
  show();
  if (top) document.getElementById("images").scrollIntoView();
  return true;
}

function step(by) {
  const at = found.findIndex((row) => row.id === state.open) + by;
  if (at < 0 || at >= found.length) return;
  remember({ open: found[at].id });
  open(found[at]);
}

function move(by) {
  const cards = [...list.querySelectorAll(".item")];
  const at = cards.indexOf(document.activeElement);
  const next = cards[at < 0 ? 0 : at + by];
  if (next) next.focus();
}

tools.addEventListener("submit", (event) => event.preventDefault());
tools.addEventListener("input", (event) => change({ [event.target.id]: event.target.value }));
for (const pager of pagers)
  pager.addEventListener("click", (event) => event.target.value && turn(Number(event.target.value)));
list.addEventListener("click", (event) => {
  const card = event.target.closest(".item");
  if (!card || (state.view === "list" && event.target.tagName !== "IMG")) return;
  const row = rows[card.dataset.row];
  remember({ open: row.id });
  open(row);
});
dialog.addEventListener("close", () => {
  const card = list.querySelector(`.item[data-row="${rows.findIndex((row) => row.id === state.open)}"]`);
  remember({ open: "" });
  if (card) card.focus();
});
dialog.addEventListener("click", (event) => {
  if (event.target === dialog) dialog.close();
  if (event.target.tagName === "IMG") event.target.closest("figure")?.classList.toggle("big");
});
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
  if (event.key === "Escape" && typing) event.target.blur();
  if (typing) return;
  const arrow = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (arrow) {
    if (dialog.open) step(arrow);
    else turn(arrow);
    event.preventDefault();
  } else if (dialog.open) {
    return;
  } else if (event.key === "/") {
    controls.q.focus();
    event.preventDefault();
  } else if (event.key === "j" || event.key === "k") move(event.key === "j" ? 1 : -1);
  else if (event.key === "Enter" || event.key === " ") {
    const card = document.activeElement.closest?.(".item");
    if (!card || card !== event.target) return;
    const row = rows[card.dataset.row];
    remember({ open: row.id });
    open(row);
    event.preventDefault();
  }
});

const used = new Set(rows.flatMap((row) => row.labels));
const names = classes.map(([name]) => name).filter((_, label) => used.has(label));
for (const name of names.sort((a, b) => a.localeCompare(b))) controls.class.append(new Option(name, name));
const scored = rows.some((row) => row.miou !== null);
for (const option of [...controls.sort.options])
  if ((!scored && /worst|best/.test(option.value)) || (option.value === "sure" && !rows.some((row) => row.sure !== null)))
    option.remove();
tools.hidden = false;
window.addEventListener("hashchange", apply);
apply();
