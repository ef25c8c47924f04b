"use strict";
// Asks for /status/data every two seconds and shows it. Counters are told since the start: what is plotted is how they grow.

const PAUSE_MS = 2000;
const PATIENCE_MS = 5000;
// What a plot shows grows with what is known, up to this.
const LONGEST_S = 300;
const MINUTE_S = 60;
// In pixels: below it every second minute has a label.
const NARROW = 420;
// In answers: what a rate and what a quantile is taken over.
const RATE_WINDOW = 3;
const TIME_WINDOW = 6;

const WORDS = {
  states: {
    ready: "Ready", loading: "Loading", "not ready": "Not ready", draining: "Draining", down: "No pool",
    starting: "Starting", hung: "Hung", dead: "Dead", failed: "Failed",
  },
  ended: { stop: "finished", length: "finished at their longest" },
  cancelled: {
    client_gone: "their client left", left: "their client left, to come back", slow_reader: "their client did not read",
    deadline: "cut at their deadline", shutdown: "ended by a stop of the service",
  },
  refused: {
    key: "refused: no right key", key_limit: "refused: limit of their key", page: "refused: foreign page or name",
    name: "refused: bad host name", invalid: "refused: not valid", queue_full: "refused: queue full",
    queue_time: "refused: waited too long", poison: "refused: like one that ended workers",
    memory: "refused: not enough memory", unavailable: "refused: no model", shutdown: "refused: stopping",
  },
  failed: {
    internal: "failed: fault of the server", poison: "failed: ended model workers", memory: "failed: not enough memory",
    unavailable: "failed: no model worker left", queue_time: "failed: waited too long",
  },
  faults: {
    worker_deaths: "Deaths of model workers", hangs: "of them by the watchdog", replayed: "Requests taken up again",
    quarantined: "of them tried alone", poisoned: "Requests given up as the cause", out_of_memory: "Steps out of memory",
    preemptions: "Sequences that gave way",
  },
};

const answers = [];
const points = [];
const element = (id) => document.getElementById(id);
let paused = false;
let failedSince = null;

// --- numbers as words

function count(value) {
  if (value === null) return "–";
  if (value >= 10000) return Math.round(value / 1000) + "k";
  return value >= 100 || Number.isInteger(value) ? String(Math.round(value)) : value.toFixed(1);
}

function seconds(value) {
  if (value === null) return "–";
  if (value === 0) return "0";
  if (value < 0.01) return Number((value * 1000).toPrecision(2)) + " ms";
  if (value < 1) return Math.round(value * 1000) + " ms";
  return value < 10 ? Number(value.toFixed(1)) + " s" : Math.round(value) + " s";
}

function bytes(value) {
  if (!value) return "–";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  const power = Math.min(units.length - 1, Math.floor(Math.log2(value) / 10));
  const scaled = value / 1024 ** power;
  return (scaled < 10 ? scaled.toFixed(1) : Math.round(scaled)) + " " + units[power];
}

// --- how counters grow

function before(steps) {
  return answers[Math.max(0, answers.length - 1 - steps)];
}

function rate(read) {
  const now = answers[answers.length - 1], then = before(RATE_WINDOW);
  const passed = now.time - then.time, grown = read(now) - read(then);
  // Less than before: its process has begun anew.
  return passed <= 0 || grown < 0 ? null : grown / passed;
}

function quantile(name, part) {
  const now = answers[answers.length - 1].histograms[name], then = before(TIME_WINDOW).histograms[name];
  const fresh = now.counts.map((number, index) => number - then.counts[index]);
  const total = fresh.reduce((sum, number) => sum + number, 0);
  if (answers.length < 2 || total <= 0 || fresh.some((number) => number < 0)) return null;
  let below = 0;
  for (let index = 0; index < fresh.length; index += 1) {
    const low = index === 0 ? 0 : now.bounds[index - 1];
    if (below + fresh[index] >= part * total) {
      const high = index < now.bounds.length ? now.bounds[index] : low;
      return low + (high - low) * ((part * total - below) / fresh[index]);
    }
    below += fresh[index];
  }
  return null;
}

// --- plots

const SVG = "http://www.w3.org/2000/svg";

function drawn(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function ticks(top, least) {
  if (!(top > 0)) return [0, least || 1];
  const rough = top / 3, power = 10 ** Math.floor(Math.log10(rough));
  const step = Math.max(least, [1, 2, 5, 10].map((each) => each * power).find((each) => each >= rough));
  const marks = [];
  for (let mark = 0; mark < top + step; mark += step) marks.push(Number(mark.toPrecision(6)));
  return marks;
}

// Waits differ by orders of magnitude: a replay's pause must not hide the others.
function decades(values) {
  const known = values.filter((value) => value > 0);
  if (!known.length) return [0.01, 0.1, 1];
  const low = Math.floor(Math.log10(Math.min(...known)));
  const high = Math.max(low + 1, Math.ceil(Math.log10(Math.max(...known))));
  return Array.from({ length: high - low + 1 }, (_, index) => Number((10 ** (low + index)).toPrecision(3)));
}

class Plot {
  // `least` is the least distance of two marks; null for a scale of powers of ten.
  constructor(id, form, least, series) {
    this.figure = element(id);
    this.form = form;
    this.least = least;
    this.series = series;
    this.title = this.figure.querySelector("figcaption").textContent;
    this.legend = document.createElement("ul");
    for (const [label] of series) {
      const item = document.createElement("li");
      item.append(label + " ", document.createElement("b"));
      this.legend.append(item);
    }
    this.svg = drawn("svg", { role: "img" });
    this.figure.append(this.legend, this.svg);
    new ResizeObserver(() => this.draw()).observe(this.svg);
  }

  draw() {
    const { width, height } = this.svg.getBoundingClientRect();
    if (!width || !height) return;
    const left = 52, right = width - 10, top = 8, bottom = height - 20;
    const end = points.length ? points[points.length - 1].time : 0;
    const values = points.flatMap((point) => this.series.map(([, key]) => point[key])).filter((value) => value !== null);
    const marks = this.least === null ? decades(values) : ticks(Math.max(0, ...values), this.least);
    const known = points.length ? end - points[0].time : 0;
    const shown = Math.min(LONGEST_S, Math.max(1, Math.ceil(known / MINUTE_S)) * MINUTE_S);
    const scale = (value) => (this.least === null ? Math.log10(Math.max(value, marks[0])) : value);
    const lowest = scale(marks[0]), span = scale(marks[marks.length - 1]) - lowest;
    const x = (time) => right - ((end - time) / shown) * (right - left);
    const y = (value) => bottom - ((scale(value) - lowest) / span) * (bottom - top);
    const parts = [];
    for (const mark of marks) {
      const level = y(mark);
      parts.push(drawn("line", { x1: left, x2: right, y1: level, y2: level, class: mark === marks[0] ? "base" : "grid" }));
      parts.push(drawn("text", { x: left - 8, y: level + 4, "text-anchor": "end" }, this.form(mark)));
    }
    const step = width < NARROW && shown > 2 * MINUTE_S ? 2 : 1;
    for (let minute = 0; minute <= shown / MINUTE_S; minute += step) {
      const words = minute === 0 ? "now" : `−${minute} min`;
      const anchor = minute === 0 ? "end" : minute === shown / MINUTE_S ? "start" : "middle";
      parts.push(drawn("text", { x: x(end - minute * MINUTE_S), y: height - 4, "text-anchor": anchor }, words));
    }
    const told = [];
    this.series.forEach(([label, key], index) => {
      const look = index === 0 ? "one" : "two";
      let path = "", pen = "M";
      for (const point of points) {
        if (point[key] === null) {
          pen = "M";
        } else {
          path += `${pen}${x(point.time).toFixed(1)} ${y(point[key]).toFixed(1)}`;
          pen = "L";
        }
      }
      if (path) parts.push(drawn("path", { d: path, class: `series ${look}` }));
      const last = points.length ? points[points.length - 1][key] : null;
      if (last !== null) parts.push(drawn("circle", { cx: x(end), cy: y(last), r: 3.5, class: `dot ${look}` }));
      this.legend.children[index].querySelector("b").textContent = this.form(last);
      told.push(`${label} ${this.form(last)}`);
    });
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.svg.setAttribute("aria-label", `${this.title}, now: ${told.join(", ")}`);
    this.svg.replaceChildren(...parts);
  }
}

const plots = [
  new Plot("plot-throughput", count, 1, [["generated", "generated"], ["prompts read", "prompt"]]),
  new Plot("plot-requests", count, 1, [["running", "running"], ["waiting", "waiting"]]),
  new Plot("plot-first", seconds, null, [["median", "first50"], ["95 %", "first95"]]),
  new Plot("plot-gap", seconds, null, [["median", "gap50"], ["95 %", "gap95"]]),
];

// --- tables

function row(cells) {
  const made = document.createElement("tr");
  cells.forEach(([label, content], index) => {
    const cell = document.createElement(index === 0 ? "th" : "td");
    if (index === 0) cell.scope = "row";
    if (label) cell.dataset.label = label;
    cell.append(...[content].flat());
    made.append(cell);
  });
  return made;
}

function small(text) {
  const made = document.createElement("span");
  made.className = "detail";
  made.textContent = text;
  return made;
}

function bar(part, label) {
  const made = document.createElement("progress");
  made.value = part;
  made.setAttribute("aria-label", label);
  return made;
}

function workerRow(worker) {
  const name = `${worker.index} (${worker.device})`;
  const state = document.createElement("span");
  state.className = "state";
  state.dataset.state = worker.state;
  state.textContent = WORDS.states[worker.state];
  const stateCell = document.createElement("div");
  stateCell.append(state);
  if (worker.state === "loading" || worker.state === "starting") {
    stateCell.append(small(`${Math.round(worker.progress * 100)} % ${worker.stage}`), bar(worker.progress, `Loading of worker ${name}`));
  }
  const used = worker.blocks_total ? worker.blocks_used / worker.blocks_total : 0;
  const cache = document.createElement("div");
  cache.append(bar(used, `KV cache of worker ${name}`), ` ${Math.round(used * 100)} %`);
  return row([
    ["Worker", name],
    ["State", stateCell],
    ["Jobs", worker.waiting ? `${worker.jobs} (${worker.waiting} sequences wait)` : String(worker.jobs)],
    ["KV cache", cache],
    ["Memory", bytes(worker.memory_bytes)],
    ["Last progress", worker.state === "dead" ? "–" : worker.idle_s < 1 ? "now" : `${seconds(worker.idle_s)} ago`],
    ["Restarts", String(worker.restarts)],
    ["Last death", worker.cause || "none"],
  ]);
}

function numberRow(words, number) {
  const made = row([["", words], ["", number.toLocaleString("en")]]);
  made.lastChild.className = "number";
  return made;
}

function rowsOf(data) {
  const found = [];
  for (const group of ["ended", "cancelled", "failed", "refused"]) {
    for (const [name, number] of Object.entries(data[group])) {
      if (number) found.push(numberRow(WORDS[group][name] || `${group}: ${name}`, number));
    }
  }
  if (!found.length) {
    const made = row([["", "none yet"]]);
    made.firstChild.className = "empty";
    made.firstChild.colSpan = 2;
    found.push(made);
  }
  return found;
}

// --- the page

function say(id, text) {
  const place = element(id);
  if (place.textContent !== text) place.textContent = text;
}

function notice(text) {
  say("notice", text);
  element("notice").hidden = !text;
}

function showState(data) {
  const badge = element("state");
  let text = WORDS.states[data.state];
  if (data.state === "loading") {
    text += ` ${Math.round(Math.max(0, ...data.workers.map((each) => each.progress)) * 100)} %`;
  }
  badge.dataset.state = data.state;
  say("state", text);
  document.title = `${text} – Tailrace`;
  say("model", `${data.model} · version ${data.version}`);
  notice(data.state === "ready" ? "" : data.reason);
}

function show(data) {
  answers.push(data);
  if (answers.length > TIME_WINDOW + 1) answers.shift();
  const known = answers.length > 1;
  const point = {
    time: data.time,
    generated: known ? rate((each) => each.tokens.generated) : null,
    prompt: known ? rate((each) => each.tokens.prompt) : null,
    running: data.queue.running,
    waiting: data.queue.jobs,
    first50: quantile("first_token", 0.5),
    first95: quantile("first_token", 0.95),
    gap50: quantile("gap", 0.5),
    gap95: quantile("gap", 0.95),
  };
  points.push(point);
  while (points[0].time < data.time - LONGEST_S) points.shift();

  showState(data);
  const sequences = data.workers.reduce((sum, worker) => sum + worker.running, 0);
  say("running", count(data.queue.running));
  say("sequences", `${sequences} sequences, ${data.http.open_requests} open requests`);
  say("waiting", count(data.queue.jobs));
  say("limits", `of at most ${data.queue.max_jobs.toLocaleString("en")}`);
  say("throughput", count(point.generated));
  say("prompts", `and ${count(point.prompt)} of prompts`);
  say("first", seconds(point.first50));
  say("first95", `95 % within ${seconds(point.first95)}`);
  say("gap", seconds(point.gap50));
  say("gap95", `95 % within ${seconds(point.gap95)}`);
  say("http", String(data.http.workers));
  say("lag", `hub lag ${seconds(data.http.hub_lag_s)}, ${bytes(data.http.memory_bytes)}`);
  element("workers").replaceChildren(...data.workers.map(workerRow));
  element("ended").replaceChildren(...rowsOf(data));
  element("faults").replaceChildren(
    ...Object.entries(data.faults).map(([name, number]) => numberRow(WORDS.faults[name] || name, number)),
  );
  say("asked", `Last answer ${new Date(data.time * 1000).toLocaleTimeString("en-GB")}.`);
  for (const plot of plots) plot.draw();
}

async function ask() {
  const address = new URL("status/data", document.baseURI);
  // A browser that was given the key in the URL refuses to send it on so.
  address.username = address.password = "";
  try {
    const response = await fetch(address, { cache: "no-store", signal: AbortSignal.timeout(PATIENCE_MS) });
    if (!response.ok) throw new Error(response.status === 401 ? "The key is not right any more: load the page again." : "");
    show(await response.json());
    failedSince = null;
  } catch (error) {
    failedSince = failedSince || new Date();
    const badge = element("state");
    badge.dataset.state = "unknown";
    say("state", "No answer");
    const since = failedSince.toLocaleTimeString("en-GB");
    notice(error.message.startsWith("The key") ? error.message : `The server has not answered since ${since}; asking again.`);
  }
}

async function goOn() {
  for (;;) {
    if (!paused) await ask();
    await new Promise((resolve) => setTimeout(resolve, PAUSE_MS));
  }
}

element("pause").addEventListener("click", () => {
  paused = !paused;
  element("pause").setAttribute("aria-pressed", String(paused));
  say("pause", paused ? "Go on" : "Pause");
});

goOn();
