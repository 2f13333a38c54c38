
// --------------------------------------------------------------------------------------------- filters and address

const PAGE_SIZE = 60, SPLITS = { eval: "held-out", train: "training" };
// What the address says after "#": its names, and the controls that hold the values.
const IN_ADDRESS = {
  run: "run", split: "split", from: "from", to: "to", q: "text", part: "part", is: "condition", min: "low", max: "high",
  cut: "truncated", sort: "sort",
};
const FIRST_VALUES = { part: "score", sort: "step" };  // of the controls that do not begin empty
const rows = data.runs.flatMap((run, index) => run.samples.map((sample) => ({ ...sample, run: index })));
const partNames = [...new Set(rows.flatMap((row) => Object.keys(row.parts)))];
const loweredPrompts = [];
// What the reader chose: a prompt and a step of it, null if none; and how many cards of a list are shown.
const view = { prompt: null, step: null, shown: PAGE_SIZE };

const byId = (id) => document.getElementById(id);
const valueOf = (id) => byId(id)?.value ?? "";
const wantedView = () => document.querySelector("input[name=view]:checked").value;

function field(label, control) {
  return el("label", {}, label, control);
}

function choose(id, options) {
  return el("select", { id }, ...options.map(([value, text]) => el("option", { value }, text)));
}

function drawFilters() {
  const number = (id, attributes = {}) => el("input", { id, type: "number", step: "any", ...attributes });
  const radio = (value, text, checked) => el("label", { class: "choice" }, el("input", { type: "radio", name: "view", value, ...(checked ? { checked: "" } : {}) }), text);
  const parts = [["score", "score"], ...partNames.map((name) => [`part:${name}`, name])];
  byId("views").append(el("legend", { class: "unseen" }, "Show"), radio("prompts", "one prompt through training", true), radio("list", "a list"));
  byId("fields").append(
    ...(data.runs.length > 1 ? [field("Run", choose("run", [["", "all"], ...data.runs.map((run, index) => [index, run.name])]))] : []),
    field("Prompts", choose("split", [["", "all"], ["eval", "held-out"], ["train", "training"]])),
    field("From step", number("from", { min: 0, step: 1 })),
    field("To step", number("to", { min: 0, step: 1 })),
    field("Text in prompt or completion", el("input", { id: "text", type: "search" })),
    field("Score or reward part", choose("part", parts)),
    field("is", choose("condition", [["", "anything"], ["one", "1"], ["less", "less than 1"], ["range", "between"], ["none", "none"]])),
    el("fieldset", { id: "range", hidden: "" }, field("at least", number("low")), field("at most", number("high"))),
    field("Cut off at the limit", choose("truncated", [["", "any"], ["yes", "only cut off"], ["no", "only finished"]])),
    field("List sorted by", choose("sort", [["step", "step"], ["-step", "step, last first"], ["-score", "score, best first"],
      ["score", "score, worst first"], ["-length", "length, longest first"], ["length", "length, shortest first"]])),
    el("button", { type: "reset" }, "Reset"),
  );
  listenToFilters(byId("filters"));
}

function listenToFilters(form) {
  let waiting = 0;
  const later = (typedIn) => { clearTimeout(waiting); waiting = setTimeout(refresh, 120, typedIn); };
  form.addEventListener("input", ({ target }) => later(["number", "search"].includes(target.type) ? target.id : null));
  form.addEventListener("reset", () => { view.prompt = view.step = null; later(null); });
  form.addEventListener("submit", (event) => { event.preventDefault(); refresh(null); });
}

function refresh(typedIn) {
  view.shown = PAGE_SIZE;
  writeAddress(typedIn);
  draw();
}

// --- which completions pass

function passes(row, wanted) {
  const value = wanted.part.startsWith("part:") ? row.parts[wanted.part.slice(5)] : row.score;
  const one = value != null && Math.abs(value - 1) < 1e-6;
  const conditions = {
    "": true, one, less: value != null && value < 1 && !one, none: value == null,
    range: value != null && value >= wanted.low && value <= wanted.high,
  };
  return (wanted.run === "" || row.run === Number(wanted.run))
    && (!wanted.split || row.split === wanted.split)
    && row.step >= wanted.from && row.step <= wanted.to
    && (!wanted.truncated || row.truncated === (wanted.truncated === "yes"))
    && conditions[wanted.condition]
    && (!wanted.text || contains(row, wanted.text));
}

function contains(row, lowered) {
  loweredPrompts[row.prompt] ??= data.prompts[row.prompt].toLowerCase();
  row.lowered ??= row.completion.toLowerCase();
  return loweredPrompts[row.prompt].includes(lowered) || row.lowered.includes(lowered);
}

function filtered() {
  const number = (id, otherwise) => (valueOf(id) === "" ? otherwise : Number(valueOf(id)));
  const wanted = {
    run: valueOf("run"), split: valueOf("split"), text: valueOf("text").toLowerCase(), truncated: valueOf("truncated"),
    part: valueOf("part"), condition: valueOf("condition"), from: number("from", -Infinity), to: number("to", Infinity),
    low: number("low", -Infinity), high: number("high", Infinity),
  };
  return rows.filter((row) => passes(row, wanted));
}

// --- the address: a view that can be sent to others, kept when the page is loaded again, and left by going back

// A name of a text that is the same in every page.
function digest(text) {
  let hash = 0x811c9dc5;
  for (let at = 0; at < text.length; at++) hash = Math.imul(hash ^ text.charCodeAt(at), 0x01000193);
  return `${(hash >>> 0).toString(36)}.${text.length}`;
}

function promptNamed(name) {
  const index = name ? data.prompts.findIndex((text) => digest(text) === name) : -1;
  return index < 0 ? null : index;
}

function changedControls() {
  const used = (id) => byId(id) && (valueOf("condition") === "range" || !["low", "high"].includes(id));
  return Object.entries(IN_ADDRESS).filter(([, id]) => used(id) && valueOf(id) !== (FIRST_VALUES[id] ?? ""));
}

function address() {
  const said = new URLSearchParams(changedControls().map(([name, id]) => [name, valueOf(id)]));
  if (wantedView() === "list") said.set("view", "list");
  if (view.prompt != null) said.set("prompt", digest(data.prompts[view.prompt]));
  if (view.step != null) said.set("step", view.step);
  return String(said);
}

let lastTypedIn = null;

// One entry of the history for each choice, and one for all that is typed into a field.
function writeAddress(typedIn = null) {
  const now = location.href.split("#"), said = address();
  if (said === (now[1] ?? "")) return;
  const again = typedIn !== null && typedIn === lastTypedIn;
  history[again ? "replaceState" : "pushState"](null, "", said ? `#${said}` : now[0]);
  lastTypedIn = typedIn;
}

// Set the controls as the address says; what it does not say or what is not known is as at the beginning.
function readAddress() {
  const said = new URLSearchParams(location.hash.slice(1));
  if ((said.has("min") || said.has("max")) && !said.has("is")) said.set("is", "range");
  for (const [name, id] of Object.entries(IN_ADDRESS).filter(([, id]) => byId(id))) {
    const control = byId(id), first = FIRST_VALUES[id] ?? "";
    control.value = said.get(name) ?? first;
    if (control.selectedIndex === -1) control.value = first;
  }
  document.querySelector(`input[name=view][value=${said.get("view") === "list" ? "list" : "prompts"}]`).checked = true;
  view.prompt = promptNamed(said.get("prompt"));
  view.step = /^\d+$/.test(said.get("step") ?? "") ? Number(said.get("step")) : null;
  view.shown = history.state?.shown ?? PAGE_SIZE;
  lastTypedIn = null;
  if (changedControls().length) byId("filter-box").open = true;
}
