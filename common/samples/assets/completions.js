
// ----------------------------------------------------------------------------------------------------- completions

const PAGE_SIZE = 60, MATRIX_ROWS = 100, SPLITS = { eval: "held-out", train: "training" };
const rows = data.runs.flatMap((run, index) => run.samples.map((sample) => ({ ...sample, run: index })));
const partNames = [...new Set(rows.flatMap((row) => Object.keys(row.parts)))];
const partRanges = new Map(partNames.map((name) => [name, rangeOf(rows.map((row) => row.parts[name]))]));
const scoreRange = rangeOf(rows.map((row) => row.score));
const sharedStart = commonStart(data.prompts);
const view = { prompt: null, step: null, shown: PAGE_SIZE };

// The smallest and the largest value, and at least from 0 to 1; null is ignored.
function rangeOf(values) {
  return values.reduce(([low, high], value) => [Math.min(low, value ?? 0), Math.max(high, value ?? 0)], [0, 1]);
}

// Length of the beginning that all prompts share, such as a system message, up to the line or word in which they
// differ; 0 if it is short.
function commonStart(prompts) {
  if (prompts.length < 2) return 0;
  const [least, greatest] = [prompts.reduce((a, b) => (a < b ? a : b)), prompts.reduce((a, b) => (a > b ? a : b))];
  let length = 0;
  while (length < least.length && least[length] === greatest[length]) length++;
  const shared = least.slice(0, length), borders = [shared.lastIndexOf("\n") + 1, shared.search(/\s\S*$/) + 1];
  return borders.find((border) => border > 30) || 0;
}

function promptLabel(index, width = 80) {
  const text = data.prompts[index].slice(sharedStart).replace(/\s+/g, " ").trim();
  const begin = [...text.slice(0, 2 * width)].slice(0, width).join("");  // between characters, not within one
  return (sharedStart ? "… " : "") + (begin.length < text.length ? `${begin}…` : text || "(empty)");
}

// --- filters

function field(label, control) {
  return el("label", {}, label, control);
}

function choose(id, options) {
  return el("select", { id }, ...options.map(([value, text]) => el("option", { value }, text)));
}

function drawFilters() {
  const form = document.getElementById("filters");
  const number = (id, attributes = {}) => el("input", { id, type: "number", step: "any", ...attributes });
  const radio = (value, text, checked) => el("label", { class: "choice" }, el("input", { type: "radio", name: "view", value, ...(checked ? { checked: "" } : {}) }), text);
  const parts = [["score", "score"], ...partNames.map((name) => [`part:${name}`, name])];
  form.append(
    el("fieldset", {}, el("legend", {}, "Show"), radio("prompts", "one prompt through training", true), radio("list", "a list")),
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
  let waiting = 0;
  const later = () => { clearTimeout(waiting); waiting = setTimeout(refresh, 120); };
  form.addEventListener("input", later);
  form.addEventListener("reset", later);
  form.addEventListener("submit", (event) => { event.preventDefault(); refresh(); });
}

const valueOf = (id) => document.getElementById(id)?.value ?? "";

function wantedView() {
  return document.querySelector("input[name=view]:checked").value;
}

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
    && (!wanted.text || lower(row).includes(wanted.text));
}

function lower(row) {
  row.lower ??= `${data.prompts[row.prompt]}\n${row.completion}`.toLowerCase();
  return row.lower;
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

function refresh() {
  document.getElementById("range").hidden = valueOf("condition") !== "range";
  view.shown = PAGE_SIZE;
  draw();
}

function draw() {
  const found = filtered(), results = document.getElementById("results");
  document.getElementById("count").value = `${found.length} of ${rows.length} completions`;
  document.getElementById("sort").disabled = wantedView() !== "list";
  if (!found.length) {
    results.replaceChildren(el("p", { class: "note" }, rows.length ? "No completion passes the filters. Reset shows all." : "There are no completions yet."));
  } else {
    results.replaceChildren(...(wantedView() === "list" ? drawList(found) : drawPrompts(found)));
  }
}

// --- a list

function drawList(found) {
  const name = valueOf("sort").replace("-", ""), sign = valueOf("sort").startsWith("-") ? -1 : 1;
  const last = sign * Infinity;  // rows without a value come last in both directions
  const key = (row) => row[name] ?? last;
  const sorted = [...found].sort((one, other) => (key(one) === key(other) ? 0 : sign * (key(one) - key(other))));
  const cards = el("div", { class: "cards" }, ...sorted.slice(0, view.shown).map((row) => drawCard(row, true)));
  const left = sorted.length - view.shown;
  if (left <= 0) return [cards];
  const more = el("button", { type: "button" }, `Show ${Math.min(left, PAGE_SIZE)} more of ${left}`);
  more.addEventListener("click", () => {
    const shown = view.shown;
    view.shown += PAGE_SIZE;
    draw();
    const next = document.querySelectorAll("#results .card")[shown];
    next.tabIndex = -1;
    next.focus();
  });
  return [cards, el("p", {}, more)];
}

// --- one prompt through training

function drawPrompts(found) {
  const byPrompt = new Map();
  for (const row of found) {
    if (!byPrompt.has(row.prompt)) byPrompt.set(row.prompt, []);
    byPrompt.get(row.prompt).push(row);
  }
  const isHeldOut = (index) => byPrompt.get(index).some((row) => row.split === "eval");
  const order = [...byPrompt.keys()].sort((one, other) => isHeldOut(other) - isHeldOut(one) || one - other);
  if (!byPrompt.has(view.prompt)) view.prompt = order[0];
  const heldOut = order.filter(isHeldOut);
  return [
    ...(heldOut.length ? drawMatrix(heldOut, byPrompt) : []),
    drawChooser(order, byPrompt),
    el("pre", { class: "text prompt", tabindex: "0", role: "group", "aria-label": "Prompt" }, ...marked(data.prompts[view.prompt])),
    ...data.runs.flatMap((run, index) => drawStrip(byPrompt.get(view.prompt).filter((row) => row.run === index), run, index)),
  ];
}

// Rows: a held-out prompt in a run; columns: steps; cells: mean score, which leads to the completions.
function drawMatrix(prompts, byPrompt) {
  const cells = prompts.flatMap((prompt) => byPrompt.get(prompt)).filter((row) => row.split === "eval");
  const steps = [...new Set(cells.map((row) => row.step))].sort((one, other) => one - other);
  const lines = prompts.slice(0, MATRIX_ROWS).flatMap((prompt) => data.runs.map((run, index) => {
    const own = byPrompt.get(prompt).filter((row) => row.run === index && row.split === "eval");
    return own.length ? drawMatrixLine(prompt, index, own, steps) : null;
  })).filter(Boolean);
  const head = el("tr", {}, el("th", { scope: "col" }, "step"), ...steps.map((step) => el("th", { scope: "col" }, String(step))));
  const left = prompts.length > MATRIX_ROWS ? `; the first ${MATRIX_ROWS} of ${prompts.length} prompts` : "";
  return [
    el("p", { class: "hint" }, `Scores of the held-out prompts through training${left}. Click a score to see its completion.`),
    el("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": "Scores of the held-out prompts by step" },
      el("table", { class: "matrix" }, el("thead", {}, head), el("tbody", {}, ...lines))),
  ];
}

function drawMatrixLine(prompt, run, own, steps) {
  const label = [...(data.runs.length > 1 ? [swatch(run)] : []), promptLabel(prompt)];
  const [low, high] = scoreRange;
  const cells = steps.map((step) => {
    const scores = own.filter((row) => row.step === step && row.score != null).map((row) => row.score);
    if (!scores.length) return el("td", {});
    const mean = scores.reduce((one, other) => one + other, 0) / scores.length;
    const button = el("button", { type: "button", "aria-label": `score ${brief(mean)} at step ${step}, ${promptLabel(prompt)}` }, brief(mean));
    button.style.setProperty("--share", `${(100 * (mean - low) / (high - low)).toFixed(0)}%`);
    button.addEventListener("click", () => goTo(prompt, step, run));
    return el("td", {}, button);
  });
  return el("tr", prompt === view.prompt ? { class: "chosen" } : {}, el("th", { scope: "row" }, ...label), ...cells);
}

function goTo(prompt, step, run) {
  view.prompt = prompt;
  document.querySelector("input[name=view][value=prompts]").checked = true;
  draw();
  const card = document.querySelector(`#results .card[data-step="${step}"][data-run="${run}"]`);
  card.classList.add("here");
  card.tabIndex = -1;
  card.focus({ preventScroll: true });
  card.scrollIntoView({ block: "nearest", inline: "center" });
}

function drawChooser(order, byPrompt) {
  const split = (index) => SPLITS[byPrompt.get(index)[0].split] || "";
  const select = el("select", { id: "prompt" }, ...order.map((index) => el("option", { value: index }, `${split(index)}: ${promptLabel(index)}`)));
  select.value = view.prompt;
  const turn = (prompt, id) => { view.prompt = prompt; draw(); document.getElementById(id).focus(); };
  const at = order.indexOf(view.prompt);
  const step = (id, text, index) => {
    const button = el("button", { id, type: "button" }, text);
    button.disabled = index < 0 || index >= order.length;
    button.addEventListener("click", () => turn(order[index], id));
    return button;
  };
  select.addEventListener("change", () => turn(Number(select.value), "prompt"));
  return el("div", { class: "chooser" }, field(`Prompt ${at + 1} of ${order.length}`, select),
    step("previous", "Previous prompt", at - 1), step("next", "Next prompt", at + 1));
}

// The completions of the chosen prompt in one run: one column per step, or a grid if there is only one step.
function drawStrip(own, run, index) {
  if (!own.length) return [];
  const head = data.runs.length > 1 ? [el("p", { class: "run" }, swatch(index), run.name)] : [];
  const steps = [...new Set(own.map((row) => row.step))].sort((one, other) => one - other);
  if (steps.length === 1) return [...head, el("div", { class: "cards" }, ...own.map((row) => drawCard(row)))];
  const columns = steps.map((step) => el("div", { class: "column" }, ...own.filter((row) => row.step === step).map((row) => drawCard(row))));
  return [...head, el("div", { class: "strip", tabindex: "0", role: "group", "aria-label": "Completions by step" }, ...columns)];
}

// --- a completion

function drawCard(row, withPrompt) {
  const facts = [
    ...(data.runs.length > 1 && withPrompt ? [el("span", { class: "run" }, swatch(row.run), data.runs[row.run].name)] : []),
    el("h4", {}, `step ${row.step}`),
    el("span", {}, `score ${brief(row.score)}`),
    ...(row.length == null ? [] : [el("span", { class: "faint" }, row.length === 1 ? "1 token" : `${row.length} tokens`)]),
    ...(SPLITS[row.split] ? [el("span", { class: "faint" }, SPLITS[row.split])] : []),
    ...(row.truncated ? [el("span", { class: "chip" }, "cut off")] : []),
  ];
  if (withPrompt) {
    const button = el("button", { type: "button", class: "small" }, "through training");
    button.addEventListener("click", () => goTo(row.prompt, row.step, row.run));
    facts.push(button);
  }
  const prompt = withPrompt ? [el("pre", { class: "text prompt", tabindex: "0", role: "group", "aria-label": "Prompt" }, ...marked(data.prompts[row.prompt].slice(sharedStart)))] : [];
  const completion = el("pre", { class: "text", tabindex: "0", role: "group", "aria-label": `Completion of step ${row.step}` }, ...(row.completion ? highlighted(row.completion) : [el("span", { class: "faint" }, "(empty)")]));
  return el("article", { class: "card", "data-step": row.step, "data-run": row.run }, el("div", { class: "line" }, ...facts), drawParts(row.parts), ...prompt, completion);
}

function drawParts(parts) {
  return el("dl", { class: "parts" }, ...Object.entries(parts).flatMap(([name, value]) => {
    const [low, high] = partRanges.get(name), percent = (number) => 100 * (number - low) / (high - low);
    const bar = el("i", value < 0 ? { class: "negative" } : {});
    bar.style.left = `${percent(Math.min(value ?? 0, 0))}%`;
    bar.style.width = `${percent(Math.max(value ?? 0, 0)) - percent(Math.min(value ?? 0, 0))}%`;
    return [el("dt", {}, name), el("dd", { class: "bar", "aria-hidden": "true" }, bar), el("dd", {}, value == null ? "none" : brief(value))];
  }));
}

// Text in pieces: tags, the content of an answer or a box, and the rest.
function highlighted(text) {
  const pieces = [], tags = /<\/?(?:think|answer|reasoning)>|\\boxed\{/g;
  let from = 0, inAnswer = false;
  const add = (until) => { if (until > from) pieces.push(...(inAnswer ? [el("span", { class: "answer" }, ...marked(text.slice(from, until)))] : marked(text.slice(from, until)))); };
  for (let found = tags.exec(text); found; found = tags.exec(text)) {
    add(found.index);
    from = tags.lastIndex;
    if (found[0].startsWith("\\")) {
      const end = endOfBraces(text, from);
      pieces.push(el("span", { class: "tag" }, "\\boxed{"), el("span", { class: "answer" }, ...marked(text.slice(from, end))));
      from = tags.lastIndex = end;
    } else {
      pieces.push(el("span", { class: "tag" }, ...marked(found[0])));
      inAnswer = found[0] === "<answer>" || (inAnswer && found[0] !== "</answer>");
    }
  }
  add(text.length);
  return pieces;
}

// Index of the brace that closes the one just before `from`; the end of the text if there is none.
function endOfBraces(text, from) {
  let depth = 1, at = from;
  for (; at < text.length; at++) {
    depth += text[at] === "{" ? 1 : text[at] === "}" ? -1 : 0;
    if (!depth) return at;
  }
  return at;
}

// Text with matches of the search marked, always as text.
function marked(text) {
  const wanted = valueOf("text").toLowerCase(), lowered = text.toLowerCase();
  if (!wanted || lowered.length !== text.length) return [text];
  const pieces = [];
  let from = 0;
  for (let at = lowered.indexOf(wanted); at >= 0; at = lowered.indexOf(wanted, from)) {
    pieces.push(text.slice(from, at), el("mark", {}, text.slice(at, at + wanted.length)));
    from = at + wanted.length;
  }
  return [...pieces, text.slice(from)];
}
