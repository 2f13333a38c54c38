
// ----------------------------------------------------------------------------------------------------- completions

const MATRIX_ROWS = 100;
// Of one prompt; a browser lays out so many in a moment. More are reached with the filters or in the list.
const MAX_COLUMNS = 60, MAX_IN_COLUMN = 12;
const scoreRange = rangeOf(rows.map((row) => row.score));
const sharedStart = commonStart(data.prompts);

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
  const text = data.prompts[index].slice(sharedStart, sharedStart + 20 * width).replace(/\s+/g, " ").trim();
  const begin = [...text.slice(0, 2 * width)].slice(0, width).join("");  // between characters, not within one
  return (sharedStart ? "… " : "") + (begin.length < text.length ? `${begin}…` : text || "(empty)");
}

const sortedSteps = (some) => [...new Set(some.map((row) => row.step))].sort((one, other) => one - other);

// The first, the last and evenly spread ones between; also the chosen one if it is among them.
function spread(steps, number) {
  if (steps.length <= number) return steps;
  const places = new Set(Array.from({ length: number }, (_, index) => Math.round(index * (steps.length - 1) / (number - 1))));
  return steps.filter((step, index) => places.has(index) || step === view.step);
}

function meanScore(some) {
  const scores = some.filter((row) => row.score != null).map((row) => row.score);
  return scores.length ? scores.reduce((one, other) => one + other, 0) / scores.length : null;
}

function grouped(some, keyOf) {
  const groups = new Map();
  for (const row of some) {
    const key = keyOf(row);
    if (!groups.has(key)) groups.set(key, []);
    groups.get(key).push(row);
  }
  return groups;
}

function draw() {
  const found = filtered(), results = byId("results"), number = changedControls().filter(([, id]) => id !== "sort").length;
  byId("range").hidden = valueOf("condition") !== "range";
  byId("filter-title").textContent = number ? `Filters (${number} in use)` : "Filters";
  byId("count").value = `${found.length} of ${rows.length} completions`;
  byId("sort").disabled = wantedView() !== "list";
  if (!found.length) {
    results.replaceChildren(el("p", { class: "note" }, rows.length ? "No completion passes the filters. Reset shows all." : "There are no completions yet."));
  } else {
    results.replaceChildren(...(wantedView() === "list" ? drawList(found) : drawPrompts(found)));
    showPlace();
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
    history.replaceState({ ...history.state, shown: view.shown }, "");
    draw();
    const next = document.querySelectorAll("#results .card")[shown];
    next.tabIndex = -1;
    next.focus();
  });
  return [cards, el("p", {}, more)];
}

// --- one prompt through training

function drawPrompts(found) {
  const byPrompt = grouped(found, (row) => row.prompt);
  const heldOut = new Set(found.filter((row) => row.split === "eval").map((row) => row.prompt));
  const order = [...byPrompt.keys()].sort((one, other) => heldOut.has(other) - heldOut.has(one) || one - other);
  const shown = shownPrompt(order, byPrompt), first = order.filter((prompt) => heldOut.has(prompt));
  return [
    ...(first.length ? drawMatrix(first, byPrompt, shown) : []),
    drawChooser(order, byPrompt, shown),
    el("pre", { class: "text prompt", tabindex: "0", role: "group", "aria-label": "Prompt", "data-keep": "prompt", "data-prompt": shown }, ...marked(data.prompts[shown])),
    ...data.runs.flatMap((run, index) => drawStrip(byPrompt.get(shown).filter((row) => row.run === index), run, index)),
  ];
}

// The prompt that was chosen; else, of those that come first, the one whose score has changed most.
function shownPrompt(order, byPrompt) {
  if (byPrompt.has(view.prompt)) return view.prompt;
  const better = (one, other) => Math.abs(one.change) - Math.abs(other.change) || one.change - other.change;
  const changes = order.map((prompt) => ({ prompt, change: changeOf(byPrompt.get(prompt)) }));
  return changes.reduce((best, next) => (better(next, best) > 0 ? next : best)).prompt;
}

// From the first to the last step, in the run where it is largest.
function changeOf(own) {
  const changes = [...grouped(own, (row) => row.run).values()].map((ofRun) => {
    const steps = sortedSteps(ofRun.filter((row) => row.score != null)), at = (step) => meanScore(ofRun.filter((row) => row.step === step));
    return steps.length ? at(steps[steps.length - 1]) - at(steps[0]) : 0;
  });
  return changes.reduce((most, change) => (Math.abs(change) > Math.abs(most) ? change : most));
}

// Rows: a held-out prompt in a run; columns: steps; cells: mean score, which leads to the completions.
function drawMatrix(prompts, byPrompt, shown) {
  const shownPrompts = prompts.slice(0, MATRIX_ROWS);
  const cells = shownPrompts.flatMap((prompt) => byPrompt.get(prompt)).filter((row) => row.split === "eval");
  const steps = spread(sortedSteps(cells), 3 * MAX_COLUMNS);
  const lines = shownPrompts.flatMap((prompt) => {
    const byRun = grouped(byPrompt.get(prompt).filter((row) => row.split === "eval"), (row) => row.run);
    return data.runs.flatMap((run, index) => (byRun.has(index) ? [drawMatrixLine(prompt, index, byRun.get(index), steps, shown)] : []));
  });
  const head = el("tr", {}, el("th", { scope: "col" }, "step"), ...steps.map((step) => el("th", { scope: "col", ...(step === view.step ? { class: "here" } : {}) }, String(step))));
  const left = prompts.length > MATRIX_ROWS ? `; the first ${MATRIX_ROWS} of ${prompts.length} prompts` : "";
  const table = el("table", { class: "matrix" }, el("thead", {}, head), el("tbody", {}, ...lines));
  moveByArrows(table);
  return [
    el("p", { class: "hint" }, `Scores of the held-out prompts through training${left}. Click a score to see its completion. The page begins with the prompt whose score has changed most.`),
    el("div", { class: "scroll", role: "group", "aria-label": "Scores of the held-out prompts by step; arrow keys go from score to score", "data-keep": "matrix" }, table),
  ];
}

// One stop of the Tab key, at the chosen step or the last one; from there arrow keys go from score to score.
function moveByArrows(table) {
  const at = (line, column) => table.rows[line]?.cells[column]?.querySelector("button");
  const own = [...table.querySelectorAll(".chosen button")], here = table.querySelector("thead .here")?.cellIndex;
  let stop = own.find((button) => button.closest("td").cellIndex === here) ?? own[own.length - 1] ?? table.querySelector("button");
  if (stop) stop.tabIndex = 0;
  table.addEventListener("keydown", (event) => {
    const [down, right] = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key] ?? [0, 0];
    const cell = event.target.closest("td");
    if (!cell || !(down || right)) return;
    event.preventDefault();
    let [line, column] = [cell.parentNode.rowIndex + down, cell.cellIndex + right];
    while (table.rows[line]?.cells[column] && !at(line, column)) [line, column] = [line + down, column + right];
    const next = at(line, column);
    if (!next) return;
    [stop.tabIndex, next.tabIndex, stop] = [-1, 0, next];
    next.focus();
  });
}

function drawMatrixLine(prompt, run, own, steps, shown) {
  const label = promptLabel(prompt), byStep = grouped(own, (row) => row.step);
  const [low, high] = scoreRange;
  const cells = steps.map((step) => {
    const mean = meanScore(byStep.get(step) ?? []);
    if (mean == null) return el("td", {});
    const button = el("button", { type: "button", tabindex: "-1", "aria-label": `score ${brief(mean)} at step ${step}, ${label}` }, brief(mean));
    button.style.setProperty("--share", `${(100 * (mean - low) / (high - low)).toFixed(0)}%`);
    button.addEventListener("click", () => goTo(prompt, step, run));
    return el("td", {}, button);
  });
  const head = el("th", { scope: "row" }, ...(data.runs.length > 1 ? [swatch(run)] : []), label);
  return el("tr", prompt === shown ? { class: "chosen", "aria-current": "true" } : {}, head, ...cells);
}

function goTo(prompt, step, run) {
  [view.prompt, view.step] = [prompt, step];
  document.querySelector("input[name=view][value=prompts]").checked = true;
  writeAddress();
  draw();
  const card = document.querySelector(`#results .card[data-step="${step}"][data-run="${run}"]`);
  card.tabIndex = -1;
  card.focus({ preventScroll: true });
  card.scrollIntoView({ block: "nearest", inline: "center" });
}

// Within their own boxes: the chosen prompt's line of scores, and the chosen step or the last one.
function showPlace() {
  const line = document.querySelector("#results .chosen"), box = line?.closest(".scroll");
  if (box) box.scrollTop = line.offsetTop + line.offsetHeight - box.clientHeight;
  for (const wide of document.querySelectorAll("#results .scroll, #results .strip")) {
    const here = wide.querySelector(".here");
    wide.scrollLeft = here ? here.offsetLeft - (wide.clientWidth - here.offsetWidth) / 2 : wide.scrollWidth;
  }
}

function drawChooser(order, byPrompt, shown) {
  const split = (index) => SPLITS[byPrompt.get(index)[0].split] || "";
  const select = el("select", { id: "prompt", autocomplete: "off" }, ...order.map((index) => el("option", { value: index }, `${split(index)}: ${promptLabel(index)}`)));
  select.value = shown;
  const turn = (prompt, id) => {
    [view.prompt, view.step] = [prompt, null];
    writeAddress();
    draw();
    byId(id).focus();
  };
  const at = order.indexOf(shown);
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
  const byStep = grouped(own, (row) => row.step), steps = sortedSteps(own), shown = spread(steps, MAX_COLUMNS);
  if (steps.length === 1) return [...head, ...someCards(own, PAGE_SIZE, "cards")];
  const columns = shown.map((step) => el("div", { class: "column" }, ...someCards(byStep.get(step), MAX_IN_COLUMN, "stack")));
  const left = shown.length < steps.length ? [el("p", { class: "hint" }, `${shown.length} of ${steps.length} steps, evenly spread; with "From step" and "To step" the others.`)] : [];
  return [...head, ...left, el("div", { class: "strip", tabindex: "0", role: "group", "aria-label": "Completions by step", "data-keep": `strip ${index}` }, ...columns)];
}

function someCards(own, number, kind) {
  const left = own.length - number;
  const cards = el("div", { class: kind }, ...own.slice(0, number).map((row) => drawCard(row, false)));
  return left > 0 ? [cards, el("p", { class: "hint" }, `${left} more are in the list.`)] : [cards];
}
