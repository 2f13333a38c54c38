
// ---------------------------------------------------------------------------------------------------------- curves

const WIDTH = 360, HEIGHT = 190, LEFT = 46, RIGHT = 8, TOP = 8, BOTTOM = 24;
const MAX_TICKS = 12;
const MAX_RAW = 150;  // more single steps than this would hide the mean
const MAIN_METRICS = [
  ["score", "Score"],
  ["eval/accuracy", "Held-out accuracy, 95 % interval", "eval/accuracy_ci95"],
  ["length", "Completion length, tokens"],
  ["kl", "KL to the reference"],
  ["entropy", "Entropy"],
];

// Steps and values of a metric, without steps that lack it; margins are half widths of an interval.
function seriesOf(run, name, margin) {
  const values = run.metrics[name] || [], margins = run.metrics[margin] || [];
  const kept = values.map((value, index) => index).filter((index) => values[index] != null);
  return {
    label: "", color: "", run,
    steps: kept.map((index) => run.metrics.step[index]),
    values: kept.map((index) => values[index]),
    margins: kept.map((index) => margins[index] ?? 0),
  };
}

function metricNames(prefix) {
  const names = new Set(data.runs.flatMap((run) => Object.keys(run.metrics)));
  names.delete("step");
  return [...names].filter((name) => name.startsWith(prefix));
}

// One metric: a line for each run.
function metricPanel(name, title, margin) {
  const series = data.runs.map((run, index) => (
    { ...seriesOf(run, name, margin), label: data.runs.length > 1 ? run.name : "", color: colorOf(index), dashed: index >= COLORS }
  ));
  return { title, series: series.filter((line) => line.steps.length) };
}

function rewardPanels() {
  const names = metricNames("reward/");
  if (data.runs.length > 1) return names.map((name) => metricPanel(name, `Reward part ${name.slice(7)}`));
  const series = names.map((name, index) => (
    { ...seriesOf(data.runs[0], name), label: name.slice(7), color: colorOf(index), dashed: index >= COLORS }
  ));
  return [{ title: "Reward parts", series }];
}

// Seconds of a step: the phases of one run stacked, or the whole step of several runs.
function timePanel() {
  if (data.runs.length > 1) return metricPanel("time/step", "Seconds per step");
  const [run] = data.runs, total = { ...seriesOf(run, "time/step") };
  const at = (name) => {
    const line = seriesOf(run, name), found = new Map(line.steps.map((step, index) => [step, line.values[index]]));
    return total.steps.map((step) => found.get(step) ?? 0);
  };
  const before = at("time/value_init");  // a fit before the first step would hide the steps
  total.values = total.values.map((value, index) => value - before[index]);
  const sum = (values) => values.reduce((one, other) => one + other, 0);
  const phases = Object.entries(data.phases).map(([name, color]) => ({ label: name, color, values: at(`time/${name}`) }));
  const other = phases.find((phase) => phase.label === "other");
  other.values = total.values.map((value, index) => Math.max(value - sum(phases.map((phase) => phase.values[index])), 0));
  const shown = phases.filter((phase) => sum(phase.values) > 0.005 * sum(total.values));
  return {
    title: "Seconds per step, by phase", stacked: true,
    series: shown.map((phase) => ({ ...phase, run, steps: total.steps, margins: phase.values.map(() => 0) })),
  };
}

function drawCurves() {
  const container = document.getElementById("curves");
  const main = MAIN_METRICS.map((metric) => metricPanel(...metric));
  if (!main[1].series.length) main[1] = metricPanel("eval/score", "Held-out score");
  const panels = [...main, ...rewardPanels(), timePanel()].filter((panel) => panel.series.length);
  panels.forEach((panel) => container.append(drawPanel(panel)));
  const used = new Set([...MAIN_METRICS.flatMap(([name, , margin]) => [name, margin]), ...metricNames("reward/")]);
  const others = metricNames("").filter((name) => !used.has(name) && !name.startsWith("time/")).sort();
  if (others.length) container.append(otherPanel(others));
  if (!container.children.length) container.append(el("p", { class: "note" }, "No step has finished yet, so there is nothing to draw."));
}

function otherPanel(names) {
  const box = el("div", {});
  const select = el("select", { id: "metric", autocomplete: "off", "aria-label": "Metric to draw" }, ...names.map((name) => el("option", { value: name }, name)));
  const redraw = () => box.replaceChildren(drawPanel(metricPanel(select.value, select.value), select));
  const usual = ["policy/clip_fraction", "policy/grad_norm", "truncated"].find((name) => names.includes(name));
  select.value = usual || names[0];
  select.addEventListener("change", () => { redraw(); select.focus(); });
  redraw();
  return box;
}

// Centred mean over about a tenth of the run, taken twice, as in the run's curves.png.
function runningMean(values) {
  const reach = Math.floor(values.length / 20);
  if (!reach) return values;
  for (let pass = 0; pass < 2; pass++) {
    const sums = [0];
    values.forEach((value) => sums.push(sums[sums.length - 1] + value));
    values = values.map((value, index) => {
      const low = Math.max(index - reach, 0), high = Math.min(index + reach + 1, values.length);
      return (sums[high] - sums[low]) / (high - low);
    });
  }
  return values;
}

// At most about five round numbers between low and high.
function ticks(low, high, integers) {
  const rough = (high - low || 1) / 4, power = 10 ** Math.floor(Math.log10(rough));
  let size = [1, 2, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= rough);
  if (integers) size = Math.max(Math.round(size), 1);
  // By number, since adding a small size to a large tick may not change it.
  const first = Math.ceil(low / size), number = Math.min(Math.floor(high / size + 1e-6) - first + 1, MAX_TICKS);
  const found = Array.from({ length: Math.max(number, 0) || 0 }, (_, index) => Number(((first + index) * size).toPrecision(12)));
  return [...new Set(found.filter(Number.isFinite))];
}

function scales(layers) {
  const steps = layers.flatMap((layer) => [layer.steps[0], layer.steps[layer.steps.length - 1]]);
  let low = Infinity, high = -Infinity;
  for (const layer of layers) {
    layer.high.forEach((value) => { high = Math.max(high, value); });
    layer.low.forEach((value) => { low = Math.min(low, value); });
  }
  if (high === low) [low, high] = [low - Math.abs(low || 1) * 0.1, high + Math.abs(high || 1) * 0.1];
  const first = Math.min(...steps), last = Math.max(...steps), room = (high - low) * 0.05;
  if (low) low -= room;
  high += room;
  const x = (step) => LEFT + (last > first ? (step - first) / (last - first) : 0.5) * (WIDTH - LEFT - RIGHT);
  const y = (value) => TOP + (1 - (value - low) / (high - low)) * (HEIGHT - TOP - BOTTOM);
  return { x, y, first, last, low, high };
}

// How each series is drawn: a line with a band from low to high, or the area between them.
function layersOf(panel) {
  if (!panel.stacked) {
    return panel.series.map((line) => ({
      ...line, mean: runningMean(line.values),
      low: line.values.map((value, index) => value - line.margins[index]),
      high: line.values.map((value, index) => value + line.margins[index]),
    }));
  }
  let floor = panel.series[0].steps.map(() => 0);
  return panel.series.map((line) => {
    const low = floor;
    floor = runningMean(line.values).map((value, index) => low[index] + value);
    return { ...line, low, high: floor };
  });
}

const path = (xs, ys) => xs.map((value, index) => `${index ? "L" : "M"}${value.toFixed(1)} ${ys[index].toFixed(1)}`).join("");

function drawLayer(layer, { x, y }, stacked) {
  const xs = layer.steps.map(x), group = svg("g", {});
  const area = path([...xs, ...[...xs].reverse()], [...layer.high.map(y), ...[...layer.low].reverse().map(y)]);
  if (stacked) {
    group.append(svg("path", { d: area, style: { fill: layer.color } }));
    return group;
  }
  const style = { stroke: layer.color, strokeDasharray: layer.dashed ? "5 3" : "none" };
  if (layer.margins.some(Boolean)) group.append(svg("path", { d: area, class: "band", style: { fill: layer.color } }));
  if (layer.mean !== layer.values) {
    const every = Math.max(Math.floor(xs.length / MAX_RAW), 1), some = (values) => values.filter((value, index) => index % every === 0);
    group.append(svg("path", { d: path(some(xs), some(layer.values).map(y)), class: "raw", style }));
  }
  group.append(svg("path", { d: path(xs, layer.mean.map(y)), class: "mean", style }));
  if (xs.length <= 40) {
    xs.forEach((cx, index) => group.append(svg("circle", { cx, cy: y(layer.values[index]), r: 2.5, style: { fill: layer.color } })));
  }
  return group;
}

function drawAxes(picture, { x, y, first, last, low, high }) {
  for (const tick of ticks(low, high)) {
    picture.append(svg("line", { x1: LEFT, x2: WIDTH - RIGHT, y1: y(tick), y2: y(tick), class: "grid" }));
    picture.append(svg("text", { x: LEFT - 6, y: y(tick) + 4, "text-anchor": "end" }, brief(tick)));
  }
  for (const tick of ticks(first, last, true)) {
    picture.append(svg("text", { x: x(tick), y: HEIGHT - 8, "text-anchor": tick === last && tick !== first ? "end" : "middle" }, String(tick)));
  }
}

let followers = [];  // of each panel its picture and a function that shows the values of a step; null: of the last step

function point(step) {
  followers = followers.filter(([picture]) => picture.isConnected);
  followers.forEach(([, show]) => show(step));
}

function drawPanel(panel, select) {
  const layers = layersOf(panel), scale = scales(layers);
  const readout = el("div", { class: "readout" });
  const picture = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", tabindex: "0", "data-keep": `panel ${panel.title}`, "aria-label": describe(panel) });
  drawAxes(picture, scale);
  layers.forEach((layer) => picture.append(drawLayer(layer, scale, panel.stacked)));
  const cursor = svg("line", { y1: TOP, y2: HEIGHT - BOTTOM, class: "cursor", visibility: "hidden" });
  picture.append(cursor);
  const steps = [...new Set(panel.series.flatMap((line) => line.steps))].sort((one, other) => one - other);
  let shown = steps.length - 1;
  const show = (step) => {
    shown = step == null ? steps.length - 1 : nearest(steps, step);
    const x = scale.x(steps[shown]);
    cursor.setAttribute("visibility", step == null ? "hidden" : "visible");
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
    readout.replaceChildren(...readoutOf(panel, step == null ? null : steps[shown]));
  };
  followers.push([picture, show]);
  picture.addEventListener("pointermove", (event) => {
    const box = picture.getBoundingClientRect(), x = (event.clientX - box.left) / box.width * WIDTH;
    point(scale.first + (x - LEFT) / (WIDTH - LEFT - RIGHT) * (scale.last - scale.first));
  });
  picture.addEventListener("pointerleave", () => point(null));
  picture.addEventListener("blur", () => point(null));
  picture.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: shown - 1, ArrowRight: shown + 1, Home: 0, End: steps.length - 1 };
    if (!(event.key in moves)) return;
    event.preventDefault();
    point(steps[Math.min(Math.max(moves[event.key], 0), steps.length - 1)]);
    readout.setAttribute("aria-live", "polite");
  });
  show(null);
  const title = select ? el("label", {}, el("h3", {}, "Another metric "), select) : el("h3", {}, panel.title);
  return el("div", { class: "panel" }, title, readout, picture);
}

function nearest(sorted, wanted) {
  let best = 0;
  sorted.forEach((value, index) => { if (Math.abs(value - wanted) < Math.abs(sorted[best] - wanted)) best = index; });
  return best;
}

// Values of a step; null: the last value of each line, possibly of different steps.
function readoutOf(panel, wanted) {
  const lasts = panel.series.map((line) => line.steps[line.steps.length - 1]), step = wanted ?? Math.max(...lasts);
  const values = panel.series.map((line, number) => {
    const own = wanted ?? lasts[number], index = line.steps.indexOf(own);
    const text = index < 0 ? "none" : brief(line.values[index]) + (line.margins[index] ? ` ± ${brief(line.margins[index])}` : "");
    const label = line.label ? [el("span", { class: "swatch", style: { color: line.color } }), `${line.label} `] : [];
    return el("span", {}, ...label, el("b", {}, text), own === step ? "" : ` at step ${own}`);
  });
  return [el("span", {}, `step ${step}`), ...values];
}

function describe(panel) {
  const lines = panel.series.map((line) => {
    const last = line.steps.length - 1, what = line.label ? `${line.label}: ` : "";
    return `${what}${brief(line.values[0])} at step ${line.steps[0]}, ${brief(line.values[last])} at step ${line.steps[last]}`;
  });
  return `${panel.title}. ${lines.join("; ")}. Arrow keys read each step.`;
}
