
// ------------------------------------------------------------- a reader's place, and newer completions while a run goes on

const QUIET = 60_000;  // milliseconds without any input after which nobody is taken to be reading
const LONGEST_WAIT = 600_000;  // milliseconds
const LOADS = 30;  // of the time, loading takes at most a part in so many
let lastInput = -Infinity;

const kept = () => [...document.querySelectorAll("[data-keep]")];

function currentPlace() {
  const scrolled = kept().filter((box) => box.scrollTop || box.scrollLeft).map((box) => ({
    name: box.dataset.keep, top: box.scrollTop, left: box.scrollLeft,
    atEnd: box.scrollLeft > 0 && box.scrollLeft + box.clientWidth >= box.scrollWidth - 2,
  }));
  const focused = document.activeElement, prompt = document.querySelector("[data-prompt]")?.dataset.prompt;
  return {
    scrolled, top: scrollY, focused: focused.id || focused.dataset.keep, metric: valueOf("metric"),
    prompt: prompt == null ? null : digest(data.prompts[prompt]),
    open: [...document.querySelectorAll("details[open]")].map((details) => details.id),
  };
}

// What is drawn depends on it: the prompt that was shown, even if by now another has changed more.
function readPlace() {
  const place = history.state?.place;
  if (place) view.prompt ??= promptNamed(place.prompt);
}

function returnToPlace() {
  const place = history.state?.place;
  if (!place) return;
  document.querySelectorAll("details").forEach((details) => { details.open = place.open.includes(details.id); });
  const metric = byId("metric");
  if (metric && [...metric.options].some((option) => option.value === place.metric)) {
    metric.value = place.metric;
    metric.dispatchEvent(new Event("change"));
  }
  const boxes = new Map(kept().map((box) => [box.dataset.keep, box]));
  for (const { name, top, left, atEnd } of place.scrolled) {
    const box = boxes.get(name);
    if (box) [box.scrollTop, box.scrollLeft] = [top, atEnd ? box.scrollWidth : left];
  }
  const focused = byId(place.focused) ?? boxes.get(place.focused);
  if (focused?.matches(".card")) focused.tabIndex = -1;
  if (focused) focused.focus({ preventScroll: true });
  else document.activeElement.blur();
  scrollTo(0, place.top);
}

function keepPlace() {
  addEventListener("beforeunload", () => history.replaceState({ ...history.state, place: currentPlace() }, ""));
  addEventListener("popstate", () => {
    if (location.hash && !location.hash.includes("=")) return;  // a place in the page
    readAddress();
    draw();
  });
}

// --- a page that is written again while the run goes on

function isRead() {
  return performance.now() - lastInput < QUIET || !getSelection().isCollapsed;
}

function followRun() {
  if (data.refresh == null) return;
  const noticed = (event) => {
    if (event.type !== "pointermove" || event.movementX || event.movementY) lastInput = performance.now();
  };
  for (const type of ["pointermove", "pointerdown", "wheel", "touchmove", "keydown"]) {
    addEventListener(type, noticed, { capture: true, passive: true });
  }
  // The longer ago the last entry, the later is the next one to be expected: the run may have ended.
  const wait = Math.max(1000 * data.refresh, LOADS * performance.now(), (Date.now() - lastEntry()) / 2);
  setTimeout(loadNewer, Math.min(wait, LONGEST_WAIT));
}

// Load the page again, or offer it to somebody who is reading.
function loadNewer() {
  if (!isRead()) {
    location.reload();
    return;
  }
  if (!byId("newer").children.length) {
    const button = el("button", { id: "load", type: "button" }, "Load newer completions");
    button.addEventListener("click", () => location.reload());
    byId("newer").append(button);
  }
  setTimeout(loadNewer, 1000);
}
