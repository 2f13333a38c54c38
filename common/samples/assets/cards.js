
// ----------------------------------------------------------------------------------------------------- a completion

const MAX_PIECES = 400;  // of one text: a search for "e" in a long completion finds thousands
const partRanges = new Map(partNames.map((name) => [name, rangeOf(rows.map((row) => row.parts[name]))]));
nameRows();

// What a reader has scrolled to or stands on is found again by its name when the page is loaded again.
function nameRows() {
  const seen = new Map();
  for (const row of rows) {
    const group = `${row.run} ${row.split} ${row.step}`, number = seen.get(group) ?? 0;
    row.name = `${group} ${number}`;
    seen.set(group, number + 1);
  }
}

function drawCard(row, withPrompt) {
  const facts = [
    ...(data.runs.length > 1 && withPrompt ? [el("span", { class: "run" }, swatch(row.run), data.runs[row.run].name)] : []),
    el("h4", {}, `step ${row.step}`),
    el("span", {}, `score ${brief(row.score)}`),
    ...(row.length == null ? [] : [el("span", { class: "faint" }, row.length === 1 ? "1 token" : `${row.length} tokens`)]),
    ...(withPrompt && SPLITS[row.split] ? [el("span", { class: "faint" }, SPLITS[row.split])] : []),
    ...(row.truncated ? [el("span", { class: "chip" }, "cut off")] : []),
  ];
  if (withPrompt) {
    const button = el("button", { type: "button", class: "small" }, "through training");
    button.addEventListener("click", () => goTo(row.prompt, row.step, row.run));
    facts.push(button);
  }
  const prompt = withPrompt ? [el("pre", { class: "text prompt", tabindex: "0", role: "group", "aria-label": "Prompt", "data-keep": `prompt ${row.name}` }, ...marked(data.prompts[row.prompt].slice(sharedStart)))] : [];
  const completion = el("pre", { class: "text", tabindex: "0", role: "group", "aria-label": `Completion of step ${row.step}`, "data-keep": `text ${row.name}` }, ...(row.completion ? highlighted(row.completion) : [el("span", { class: "faint" }, "(empty)")]));
  const here = !withPrompt && row.step === view.step ? " here" : "";
  return el("article", { class: `card${here}`, "data-keep": `card ${row.name}`, "data-step": row.step, "data-run": row.run }, el("div", { class: "line" }, ...facts), drawParts(row.parts), ...prompt, completion);
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
  for (let found = tags.exec(text); found && pieces.length < MAX_PIECES; found = tags.exec(text)) {
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
  for (let at = lowered.indexOf(wanted); at >= 0 && pieces.length < MAX_PIECES; at = lowered.indexOf(wanted, from)) {
    pieces.push(text.slice(from, at), el("mark", {}, text.slice(at, at + wanted.length)));
    from = at + wanted.length;
  }
  return [...pieces, text.slice(from)];
}
