
"use strict";

// Text of a run enters the page only as text: el() and svg() turn strings into text nodes, and nothing here parses
// markup.

const data = JSON.parse(document.getElementById("data").textContent);
const COLORS = 8;  // as many as page.css has
const colorOf = (index) => `var(--c${index % COLORS})`;

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "style") Object.assign(element.style, value);
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

function el(tag, attributes, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function svg(tag, attributes, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

// Three significant digits, without an exponent where that is readable.
function brief(value) {
  if (value == null) return "none";
  if (value === 0 || (Math.abs(value) >= 1e-3 && Math.abs(value) < 1e6)) {
    return String(Math.abs(value) >= 100 ? Math.round(value) : Number(value.toPrecision(3)));
  }
  return value.toExponential(1);
}

function swatch(run) {
  return el("span", { class: "swatch", style: { color: colorOf(run) } });
}

// ---------------------------------------------------------------------------------------------------------- header

// Milliseconds since 1970.
const lastEntry = () => 1000 * Math.max(...data.runs.map((run) => run.written));

function drawHeader() {
  const header = document.getElementById("header"), several = data.runs.length > 1;
  data.runs.forEach((run, index) => {
    header.append(el("p", { class: "facts" }, ...(several ? [swatch(index), el("span", { class: "run" }, run.name), ": "] : []), run.facts));
  });
  if (data.refresh != null) header.append(el("p", { class: "facts" }, `Newest completions of ${new Date(lastEntry()).toLocaleString()}. The page loads newer ones by itself while nobody reads it.`));
  data.runs.forEach((run) => run.notes.forEach((note) => header.append(el("p", { class: "note" }, several ? `${run.name}: ${note}` : note))));
  header.append(drawSettings(several));
}

// One column per run; with several runs, the settings that differ come first.
function drawSettings(several) {
  const names = [...new Set(data.runs.flatMap((run) => Object.keys(run.settings)))];
  const values = (name) => data.runs.map((run) => run.settings[name] ?? "");
  const differs = (name) => new Set(values(name)).size > 1;
  names.sort((one, other) => differs(other) - differs(one));
  const head = el("tr", {}, el("th", { scope: "col" }, "setting"), ...data.runs.map((run) => el("th", { scope: "col" }, several ? run.name : "value")));
  const body = names.map((name) => el("tr", differs(name) ? { class: "differs" } : {},
    el("th", { scope: "row" }, name), ...values(name).map((value) => el("td", {}, value))));
  const versions = data.runs.flatMap((run) => run.versions.map((line) => el("p", { class: "facts" }, several ? `${run.name}: ${line}` : line)));
  return el("details", { id: "settings" }, el("summary", {}, several ? "Settings (differences first) and versions" : "Settings and versions"), ...versions,
    el("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": "Settings", "data-keep": "settings" }, el("table", {}, el("thead", {}, head), el("tbody", {}, ...body))));
}
