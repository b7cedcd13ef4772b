"use strict";

// What a run says reaches the page as text alone: every element is made by h(), which knows no markup.
const DATA = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const own = (object, key) => (Object.hasOwn(object, key) ? object[key] : undefined);

function h(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === false || value === null) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name in made && typeof value === "boolean") made[name] = value;
    else made.setAttribute(name === "cls" ? "class" : name, value);
  }
  made.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}

// Values -------------------------------------------------------------------------------------------------------------

const RUNS = DATA.runs;
const BY_KEY = new Map(RUNS.map((run) => [run.key, run]));
const WITHOUT_EFFECT = new Set(DATA.without_effect);
const WRITTEN = instant(DATA.written);
const STATES = ["running", "finished", "stopped", "diverged", "failed", "damaged"];

function instant(text) {
  const time = Date.parse((text || "").replace(/([+-]\d\d)(\d\d)$/, "$1:$2"));
  return Number.isNaN(time) ? undefined : time;
}

for (const run of RUNS) {
  run.lacking = new Set(run.lacks || []);
  run.last = new Map(); // what was logged last, of a run that has no final metrics
  for (const [, metrics] of run.curves)
    for (const [name, values] of Object.entries(metrics)) run.last.set(name, values.findLast((v) => v !== null));
  run.hash = run.ablation && (/_([0-9a-f]{8})$/.exec(run.name) || [])[1];
  run.begun = instant(run.started);
  const end = run.state === "running" ? WRITTEN : instant(run.ended);
  run.took = run.seconds ?? (end !== undefined && run.begun !== undefined ? (end - run.begun) / 1000 : undefined);
  const said = [run.name, run.ablation, run.state, run.error, ...run.problems];
  for (const [key, value] of Object.entries(run.words)) said.push(`${key}=${value}`);
  run.text = said.join("\n").toLowerCase();
}

const BUILT_IN = {
  name: (run) => run.name,
  state: (run) => run.state,
  ablation: (run) => run.ablation ?? undefined,
  started: (run) => (run.begun === undefined ? undefined : localTime(run.begun)),
  took: (run) => run.took,
  error: (run) => run.error || run.problems[0],
};

function fromConfig(run, key) {
  if (run.lacks === null || run.lacking.has(key)) return undefined;
  return Object.hasOwn(run.config, key) ? run.config[key] : own(DATA.config, key);
}

function metric(run, name) {
  return own(run.metrics, name) ?? (run.state === "finished" ? undefined : run.last.get(name));
}

function value(run, key) {
  if (Object.hasOwn(BUILT_IN, key)) return BUILT_IN[key](run);
  return own(run.words, key) ?? own(run.choices, key) ?? metric(run, key) ?? fromConfig(run, key);
}

const distinct = (runs, key) => new Set(runs.map((run) => show(value(run, key)))).size;

function counted(maps) {
  const counts = new Map();
  for (const map of maps) for (const key of Object.keys(map)) counts.set(key, (counts.get(key) || 0) + 1);
  return [...counts].sort((a, b) => b[1] - a[1] || a[0].localeCompare(b[0])).map(([key]) => key);
}

const METRICS = counted(RUNS.map((run) => run.metrics));
const LOGGED = counted(RUNS.flatMap((run) => run.curves.map((part) => part[1])));
for (const name of LOGGED) if (name.startsWith("val/") && !METRICS.includes(name)) METRICS.push(name);
// Choices of groups first, the seed last, each kind by how many runs have it.
const rank = (key) => (key === "seed" ? 2 : key.includes(".") ? 1 : 0);
const WORDS = counted(RUNS.map((run) => run.words)).sort((a, b) => rank(a) - rank(b));
const KEYS = new Set([...Object.keys(BUILT_IN), ...WORDS, ...counted(RUNS.map((run) => run.choices)), ...METRICS]);
for (const key of Object.keys(DATA.config)) KEYS.add(key);
for (const run of RUNS) for (const key of Object.keys(run.config)) KEYS.add(key);

// The columns: words that differ among the runs, and are not of a few runs alone, and the metrics that most have, that
// of the test first.
const SETTINGS = WORDS.filter((key) => distinct(RUNS, key) > 1);
const USUAL = SETTINGS.filter((key) => RUNS.filter((run) => Object.hasOwn(run.words, key)).length >= RUNS.length / 20);
const SHOWN_SETTINGS = [...USUAL.filter((key) => key !== "seed").slice(0, 5), ...USUAL.filter((key) => key === "seed")];
const MONITORED = counted(RUNS.filter((run) => run.monitor).map((run) => ({ [run.monitor]: 1 })));
const FIRST = MONITORED.flatMap((name) => [name.replace(/^val\//, "test/"), name]);
const SHOWN_METRICS = [...new Set([...FIRST, ...METRICS.filter((name) => name === "test/loss"), ...METRICS])]
  .filter((name) => RUNS.some((run) => metric(run, name) !== undefined))
  .slice(0, Math.max(3, Math.min(FIRST.length, 4)));

// Texts --------------------------------------------------------------------------------------------------------------

function show(value) {
  if (value === undefined) return "";
  if (Array.isArray(value)) return "[]";
  return typeof value === "object" && value !== null ? "{}" : String(value);
}

function figure(number) {
  if (typeof number !== "number") return show(number);
  const size = Math.abs(number);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return number.toExponential(2).replace("e+", "e");
  return number.toFixed(size >= 1000 ? 0 : size >= 100 ? 1 : size >= 10 ? 2 : 4);
}

const spread = (sd) => (sd >= 1e-3 && sd < 10 ? String(+sd.toPrecision(2)) : figure(sd));

function axisFigure(number) {
  const size = Math.abs(number);
  if (size >= 1e5 || (size !== 0 && size < 1e-3)) return number.toExponential().replace("e+", "e");
  return String(+number.toPrecision(6));
}

function localTime(time) {
  const local = new Date(time - new Date(time).getTimezoneOffset() * 60000).toISOString();
  return `${local.slice(0, 10)} ${local.slice(11, 16)}`;
}

function day(time) {
  const date = new Date(time), month = date.toLocaleString("en", { month: "short" });
  const rest = date.getFullYear() === new Date(WRITTEN).getFullYear() ? localTime(time).slice(11) : date.getFullYear();
  return `${date.getDate()} ${month} ${rest}`;
}

function duration(seconds) {
  if (seconds === undefined) return "";
  if (seconds < 9.95) return `${seconds.toFixed(1)} s`;
  const s = Math.round(seconds), m = Math.floor(s / 60), hours = Math.floor(m / 60);
  if (s < 60) return `${s} s`;
  if (m < 60) return `${m} min ${s % 60} s`;
  return hours < 48 ? `${hours} h ${m % 60} min` : `${Math.floor(hours / 24)} d ${hours % 24} h`;
}

const short = (key) => key.split(".").pop();
const plural = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;

// What tells each run from the others, as it is typed; "" where nothing does.
function labels(among, without = []) {
  const keys = [...new Set([...WORDS, "model", "norm"])].filter((key) => !without.includes(key) && distinct(among, key) > 1);
  const said = (run) => keys.filter((key) => value(run, key) !== undefined).map((key) => `${short(key)}=${show(value(run, key))}`);
  return (run) => said(run).join(" ");
}

// A run's name in a narrow place: its date is in another column, and so are the settings that name an ablation's.
const title = (run) => run.hash || /^(?:\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_)?(.*)$/s.exec(run.name)[1] || run.name;

// The view, which the address holds --------------------------------------------------------------------------------

const VIEW = { q: "", sort: "-started", sel: new Set(), panel: "", metric: "", x: "step", log: false, group: "", all: false };
const DEFAULTS = { ...VIEW };

function readAddress() {
  let words;
  try {
    words = new URLSearchParams(location.hash.slice(1));
  } catch {
    words = new URLSearchParams();
  }
  for (const name of ["q", "sort", "panel", "metric", "x", "group"]) VIEW[name] = words.get(name) ?? DEFAULTS[name];
  for (const name of ["log", "all"]) VIEW[name] = words.get(name) === "1";
  VIEW.sel = new Set(words.getAll("sel").filter((key) => BY_KEY.has(key)));
}

function writeAddress(newEntry = false) {
  const words = new URLSearchParams();
  for (const name of ["q", "sort", "panel", "metric", "x", "group"])
    if (VIEW[name] !== DEFAULTS[name]) words.set(name, VIEW[name]);
  for (const name of ["log", "all"]) if (VIEW[name]) words.set(name, "1");
  for (const key of VIEW.sel) words.append("sel", key); // one of a copied run is its path, which may have spaces
  const address = `#${words}`;
  if (address !== (location.hash || "#")) history[newEntry ? "pushState" : "replaceState"](null, "", address);
}

// The filter ---------------------------------------------------------------------------------------------------------

// A key as it is typed: whole, or its last part where that is enough.
function meant(typed) {
  if (KEYS.has(typed)) return typed;
  const ends = [...KEYS].filter((key) => key.endsWith(`.${typed}`) || key.endsWith(`/${typed}`));
  if (ends.length === 1) return ends[0];
  const inWords = ends.filter((key) => WORDS.includes(key));
  if (inWords.length === 1) return inWords[0];
  throw new Error(ends.length ? `${typed}: which one? ${ends.slice(0, 6).join(", ")}` : `${typed}: no run has such a key`);
}

const asNumber = (text) => (text.trim() === "" ? NaN : Number(text));

function compared(found, wanted) {
  const a = asNumber(show(found)), b = asNumber(wanted);
  if (!Number.isNaN(a) && !Number.isNaN(b)) return a - b;
  return show(found).toLowerCase().localeCompare(wanted.toLowerCase());
}

function test(term) {
  const found = /^([\w.\/+-]+?)(!=|>=|<=|=|>|<)(.*)$/.exec(term);
  if (!found) return (run) => run.text.includes(term.toLowerCase());
  const key = meant(found[1]), sign = found[2], wanted = found[3];
  if (wanted === "") return () => true; // it is being typed
  const equals = (run) => {
    const there = value(run, key);
    return there !== undefined && [wanted, ...wanted.split(",")].some((one) => compared(there, one) === 0);
  };
  if (sign === "=") return equals;
  if (sign === "!=") return (run) => !equals(run);
  return (run) => {
    const there = value(run, key);
    if (there === undefined || there === null) return false;
    const order = compared(there, wanted);
    return sign[0] === ">" ? order > 0 || (sign === ">=" && order === 0) : order < 0 || (sign === "<=" && order === 0);
  };
}

function filtered() {
  const terms = VIEW.q.match(/(?:[^\s"]|"[^"]*"?)+/g) || [];
  let complaint = "";
  const tests = [];
  for (const term of terms) {
    try {
      tests.push(test(term.replaceAll('"', "")));
    } catch (error) {
      complaint = error.message;
      tests.push((run) => run.text.includes(term.toLowerCase()));
    }
  }
  $("complaint").textContent = complaint;
  $("complaint").hidden = !complaint;
  return sorted(RUNS.filter((run) => tests.every((one) => one(run))));
}

function sorted(runs) {
  const down = VIEW.sort.startsWith("-"), key = VIEW.sort.replace(/^-/, "");
  const values = new Map(runs.map((run) => [run, key === "state" ? STATES.indexOf(run.state) : key === "started" ? run.begun : value(run, key)]));
  return runs.toSorted((a, b) => {
    const x = values.get(a), y = values.get(b);
    if (x === undefined || y === undefined) return (x === undefined) - (y === undefined); // those without it are last
    const order = compareValues(x, y);
    return down ? -order : order;
  });
}

const COLLATOR = new Intl.Collator(undefined, { numeric: true }); // making one takes longer than a thousand comparisons

function compareValues(x, y) {
  const a = typeof x === "number" ? x : asNumber(show(x)), b = typeof y === "number" ? y : asNumber(show(y));
  if (!Number.isNaN(a) && !Number.isNaN(b)) return a - b;
  return COLLATOR.compare(show(x), show(y));
}

// The list -----------------------------------------------------------------------------------------------------------

const COLUMNS = [
  { key: "state", name: "state" },
  { key: "started", name: "started" },
  { key: "name", name: "run" },
  ...(RUNS.some((run) => run.ablation) ? [{ key: "ablation", name: "ablation" }] : []),
  ...SHOWN_SETTINGS.map((key) => ({ key, name: short(key), setting: true })),
  ...SHOWN_METRICS.map((key) => ({ key, name: key, metric: true })),
  { key: "took", name: "took" },
];
const ROWS = new Map();
let listed = [];
let lastChosen = null;

function heading(column) {
  const down = VIEW.sort === `-${column.key}`, up = VIEW.sort === column.key;
  const first = column.metric || column.key === "started" || column.key === "took" ? "-" : "";
  const next = down ? column.key : up ? `-${column.key}` : first + column.key;
  const [kind, rest] = column.metric ? column.name.split(/\/(.*)/) : ["", column.name];
  return h(
    "th",
    { scope: "col", cls: `k-${column.key.replace(/\W/g, "_")} ${column.metric || column.key === "took" ? "number" : ""}`, "aria-sort": down ? "descending" : up ? "ascending" : "none" },
    h(
      "button",
      { title: `sort by ${column.key}`, "data-key": column.key, onclick: () => change({ sort: next }) },
      column.metric && rest ? [h("small", {}, `${kind} `), rest] : column.name,
      h("i", { "aria-hidden": "true" }, down ? " ↓" : up ? " ↑" : ""),
    ),
  );
}

function cell(run, { key, name, setting, metric: isMetric }) {
  const found = value(run, key);
  const props = { "data-label": isMetric ? name : short(key), cls: `k-${key.replace(/\W/g, "_")}` };
  if (key === "state") return h("td", props, stateOf(run));
  if (key === "name")
    return h("td", props, h("button", { cls: "link name", title: run.path, onclick: () => open(`run:${run.key}`) }, title(run)));
  if (key === "ablation") return h("td", { ...props, cls: `${props.cls} soft clip`, title: run.ablation }, run.ablation || "");
  if (key === "started") return h("td", { ...props, cls: `${props.cls} soft`, title: found }, run.begun === undefined ? "" : day(run.begun));
  if (key === "took") return h("td", { ...props, cls: `${props.cls} soft number` }, duration(found));
  if (isMetric) {
    const last = found !== undefined && own(run.metrics, key) === undefined;
    const cls = last ? "number soft" : "number";
    return h("td", { ...props, cls, title: last ? "logged last, not final" : undefined }, found === undefined ? "" : figure(found));
  }
  const given = own(run.words, key) !== undefined;
  const clipped = { ...props, cls: `setting clip${given ? "" : " soft"}`, title: `${key}=${show(found)}${given ? "" : " (not in the command)"}` };
  return setting ? h("td", found === undefined ? { ...props, cls: "" } : clipped, show(found)) : h("td", props);
}

function stateOf(run) {
  return h("span", { cls: `state ${run.state}`, title: run.error || run.problems.join("\n") || undefined }, run.state);
}

function row(run) {
  if (!ROWS.has(run.key)) {
    const box = h("input", { type: "checkbox", "aria-label": `choose ${run.name}` });
    box.addEventListener("click", (event) => choose(run, box.checked, event.shiftKey));
    const made = h("tr", { "data-key": run.key }, h("td", { cls: "box" }, box), COLUMNS.map((column) => cell(run, column)));
    if (run.error || run.problems.length) made.querySelector(".k-name").append(h("p", { cls: "trouble" }, h("span", {}, run.error || run.problems.join("; "))));
    ROWS.set(run.key, { row: made, box });
  }
  return ROWS.get(run.key);
}

function choose(run, chosen, range) {
  const from = listed.indexOf(lastChosen), to = listed.indexOf(run);
  const all = range && from >= 0 ? listed.slice(Math.min(from, to), Math.max(from, to) + 1) : [run];
  const sel = new Set(VIEW.sel);
  for (const one of all) chosen ? sel.add(one.key) : sel.delete(one.key);
  lastChosen = run;
  change({ sel });
}

function renderList() {
  listed = filtered();
  const every = h("input", { type: "checkbox", "aria-label": "choose all runs that are listed" });
  const chosen = listed.filter((run) => VIEW.sel.has(run.key)).length;
  every.checked = listed.length > 0 && chosen === listed.length;
  every.indeterminate = chosen > 0 && !every.checked;
  every.addEventListener("click", () => {
    const sel = new Set(VIEW.sel);
    for (const run of listed) every.checked ? sel.add(run.key) : sel.delete(run.key);
    change({ sel });
  });
  const focused = document.activeElement?.closest?.("th button")?.dataset.key;
  $("runs").tHead.replaceChildren(h("tr", {}, h("th", { cls: "box" }, every), COLUMNS.map(heading)));
  if (focused) [...$("runs").tHead.querySelectorAll("button")].find((button) => button.dataset.key === focused)?.focus();
  const rows = listed.map((run) => {
    const made = row(run);
    made.box.checked = VIEW.sel.has(run.key);
    const isOpen = VIEW.panel === `run:${run.key}`;
    made.row.className = [made.box.checked && "chosen", isOpen && "open", COLOUR_OF.get(run)].filter(Boolean).join(" ");
    return made.row;
  });
  const body = $("runs").tBodies[0];
  if (rows.length !== body.children.length || rows.some((one, i) => one !== body.children[i])) body.replaceChildren(...rows);
  if (!rows.length) body.replaceChildren(h("tr", {}, h("td", { colspan: COLUMNS.length + 1, cls: "nothing" }, "no run is like that")));
  $("count").textContent = listed.length === RUNS.length ? plural(RUNS.length, "run") : `${listed.length} of ${plural(RUNS.length, "run")}`;
  $("compare").textContent = VIEW.sel.size ? `compare ${VIEW.sel.size}` : "compare";
  $("compare").disabled = VIEW.sel.size === 0;
  $("clear").hidden = VIEW.sel.size === 0;
  if ($("filter").value !== VIEW.q) $("filter").value = VIEW.q;
  $("sort").value = VIEW.sort;
}

function renderStates() {
  const parts = STATES.map((state) => [state, RUNS.filter((run) => run.state === state).length]).filter(([, n]) => n);
  $("states").replaceChildren(
    ...parts.map(([state, n]) => {
      const on = VIEW.q === `state=${state}`;
      const press = () => change({ q: on ? "" : `state=${state}` });
      return h("button", { cls: `state ${state}`, "aria-pressed": String(on), onclick: press }, `${n} ${state}`);
    }),
  );
  $("ablations").replaceChildren(
    ...DATA.ablations.map((ablation) => {
      const runs = RUNS.filter((run) => run.ablation === ablation.name);
      const finished = runs.filter((run) => run.state === "finished").length;
      const on = VIEW.panel === `ablation:${ablation.name}`;
      const all = Math.max(ablation.planned, runs.length);
      return h(
        "button",
        { cls: "chip", title: ablation.question, "aria-pressed": String(on), onclick: () => open(on ? "" : `ablation:${ablation.name}`) },
        ablation.name, " ", h("small", {}, ablation.problems.length ? "damaged" : `${finished}/${all}`),
      );
    }),
  );
}

// The curves ---------------------------------------------------------------------------------------------------------

const COLOUR_OF = new Map(); // of the runs that are compared, for the list
const COLOURS = 7; // of Okabe and Ito, in page.css; further lines are dashed
const svg = (tag, properties = {}, ...children) => {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(properties)) made.setAttribute(name, value);
  made.append(...children);
  return made;
};
const colour = (i) => `c${i % COLOURS} d${Math.floor(i / COLOURS) % 3}`;

// The points of a run, [x, y], those that are not finite left out.
function points(run, name, x) {
  const part = run.curves.find((one) => Object.hasOwn(one[1], name));
  if (!part) return [];
  const scale = x === "epoch" && run.epoch ? 1 / run.epoch : null;
  return part[0].map((step, i) => [scale ? (step + 1) * scale : step, part[1][name][i]]).filter((point) => point[1] !== null);
}

// Mean and standard deviation of several runs, at the points of the longest; between its points a run is a line.
function together(curves) {
  const longest = curves.reduce((a, b) => (b.length > a.length ? b : a), []);
  return longest.map(([x]) => {
    const values = curves.map((curve) => at(curve, x)).filter((y) => y !== undefined);
    const mean = values.reduce((a, b) => a + b, 0) / values.length;
    const sd = values.length > 1 ? Math.sqrt(values.reduce((a, y) => a + (y - mean) ** 2, 0) / (values.length - 1)) : 0;
    return [x, mean, sd, values.length];
  });
}

function at(curve, x) {
  if (!curve.length || x < curve[0][0] || x > curve[curve.length - 1][0]) return undefined;
  const i = curve.findIndex((point) => point[0] >= x);
  const [x1, y1] = curve[i];
  if (x1 === x) return y1;
  const [x0, y0] = curve[i - 1];
  return y0 + ((y1 - y0) * (x - x0)) / (x1 - x0);
}

// Runs that are equal but for their seeds have one signature.
function signature(run) {
  const matters = (key) => !WITHOUT_EFFECT.has(key) && short(key) !== "seed";
  const config = Object.entries(run.config).filter(([key]) => matters(key)).sort();
  return JSON.stringify([config, [...run.lacking].filter(matters).sort(), run.lacks === null && run.key]);
}

function grouped(runs) {
  const groups = new Map();
  for (const run of runs) {
    const by = VIEW.group === "seeds" ? signature(run) : VIEW.group ? show(value(run, VIEW.group)) : run.key;
    if (!groups.has(by)) groups.set(by, []);
    groups.get(by).push(run);
  }
  const label = labels(runs, VIEW.group === "seeds" ? ["seed"] : []);
  return [...groups.values()].map((members) => {
    const [run] = members;
    const byKey = VIEW.group && VIEW.group !== "seeds";
    const text = byKey ? `${short(VIEW.group)}=${show(value(run, VIEW.group)) || "(none)"}` : label(run);
    return { runs: members, label: text || (VIEW.group ? "all" : title(run)) };
  });
}

function ticks(low, high, log) {
  if (log) {
    const found = [];
    const wide = Math.log10(high / low) > 3;
    for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++)
      for (const m of wide ? [1] : [1, 2, 5]) if (m * 10 ** e >= low * 0.999 && m * 10 ** e <= high * 1.001) found.push(+`${m}e${e}`);
    if (found.length > 1) return found.filter((_, i) => i % Math.ceil(found.length / 8) === 0);
  }
  const rough = (high - low) / 7 || 1, size = 10 ** Math.floor(Math.log10(rough));
  const step = size * [1, 2, 5, 10].find((m) => m * size >= rough);
  const found = [];
  for (let i = Math.ceil(low / step); i * step <= high + step * 1e-9; i++) found.push(+(i * step).toPrecision(12));
  return found;
}

function extent(values) {
  let low = Infinity, high = -Infinity;
  for (const one of values) {
    if (one < low) low = one;
    if (one > high) high = one;
  }
  return [low, high];
}

function chart(groups, width) {
  const height = Math.round(Math.min(360, Math.max(230, width * 0.5))), left = 58, right = 10, top = 10, bottom = 34;
  const log = VIEW.log;
  let hidden = 0;
  const lines = groups.map((group, i) => {
    const curves = group.runs.map((run) => points(run, VIEW.metric, VIEW.x)).filter((curve) => curve.length);
    let line = group.runs.length > 1 ? together(curves) : (curves[0] || []).map(([x, y]) => [x, y, 0, 1]);
    if (log) {
      hidden += line.filter((point) => point[1] <= 0).length;
      line = line.filter((point) => point[1] > 0);
    }
    return { ...group, i, line, n: curves.length };
  }).filter((one) => one.line.length);
  if (!lines.length) return h("p", { cls: "nothing" }, VIEW.metric ? `none of these runs has logged ${VIEW.metric}` : "nothing was logged");
  const all = lines.flatMap((one) => one.line);
  let [x0, x1] = extent(all.map((point) => point[0]));
  let [y0, y1] = extent(all.flatMap(([, y, sd]) => (log ? [y, y + sd, y - sd > 0 ? y - sd : y] : [y - sd, y + sd])));
  if (x0 === x1) [x0, x1] = [x0 - 1, x1 + 1];
  if (log) [y0, y1] = y0 === y1 ? [y0 / 2, y1 * 2] : [y0 / (y1 / y0) ** 0.04, y1 * (y1 / y0) ** 0.04];
  else [y0, y1] = y0 === y1 ? [y0 - 0.5, y1 + 0.5] : [y0 - (y1 - y0) * 0.04, y1 + (y1 - y0) * 0.04];
  const px = (x) => left + ((x - x0) / (x1 - x0)) * (width - left - right);
  const scale = log ? Math.log : (y) => y;
  const py = (y) => height - bottom - ((scale(Math.max(y, log ? y0 : -Infinity)) - scale(y0)) / (scale(y1) - scale(y0))) * (height - top - bottom);
  const path = (list) => list.map(([x, y], i) => `${i ? "L" : "M"}${px(x).toFixed(1)} ${py(y).toFixed(1)}`).join("");
  const picture = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", tabindex: "0", "aria-label": `${VIEW.metric} over ${VIEW.x}, ${plural(lines.length, "line")}` });
  for (const y of ticks(y0, y1, log)) {
    picture.append(svg("line", { class: "grid", x1: left, x2: width - right, y1: py(y), y2: py(y) }));
    picture.append(svg("text", { class: "tick", x: left - 6, y: py(y) + 4, "text-anchor": "end" }, axisFigure(y)));
  }
  for (const x of ticks(x0, x1, false)) {
    picture.append(svg("line", { class: "grid", x1: px(x), x2: px(x), y1: top, y2: height - bottom }));
    picture.append(svg("text", { class: "tick", x: px(x), y: height - bottom + 15, "text-anchor": "middle" }, axisFigure(x)));
  }
  picture.append(svg("text", { class: "tick axis", x: (left + width - right) / 2, y: height - 3, "text-anchor": "middle" }, VIEW.x));
  for (const one of lines) {
    const spread = one.line.filter((point) => point[3] > 1);
    if (spread.length > 1) {
      const upper = spread.map(([x, y, sd]) => [x, y + sd]), lower = spread.map(([x, y, sd]) => [x, y - sd]).reverse();
      picture.append(svg("path", { class: `band ${colour(one.i)}`, d: `${path([...upper, ...lower])}Z` }));
    }
  }
  for (const one of lines) {
    one.path = svg("path", { class: `curve ${colour(one.i)}`, d: path(one.line) });
    picture.append(one.path);
    if (one.line.length === 1) picture.append(svg("circle", { class: `point ${colour(one.i)}`, cx: px(one.line[0][0]), cy: py(one.line[0][1]), r: 3.5 }));
  }
  const cross = svg("line", { class: "cross", y1: top, y2: height - bottom, visibility: "hidden" });
  picture.append(cross);
  const tip = h("div", { cls: "tip", hidden: true });
  let cursor = null;
  const hover = (x, y) => {
    const nearest = lines.map((one) => {
      const point = one.line.reduce((a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a));
      return { one, point, away: y === null ? 0 : Math.abs(py(point[1]) - y) };
    });
    const closest = nearest.reduce((a, b) => (Math.abs(b.point[0] - x) < Math.abs(a.point[0] - x) ? b : a));
    cursor = closest.point[0];
    const marked = y === null ? null : nearest.reduce((a, b) => (b.away < a.away ? b : a));
    lines.forEach((one) => one.path.classList.toggle("marked", one === marked?.one && lines.length > 1));
    for (const name of ["x1", "x2"]) cross.setAttribute(name, px(cursor));
    cross.setAttribute("visibility", "visible");
    const ranked = nearest.toSorted((a, b) => b.point[1] - a.point[1]);
    const at = Math.max(0, Math.min(ranked.indexOf(marked) - 5, ranked.length - 11));
    const part = ranked.slice(at, at + 11);
    tip.replaceChildren(
      h("b", {}, `${VIEW.x} ${VIEW.x === "step" ? cursor : cursor.toFixed(2)}`),
      ...part.map((near) =>
        h("div", { cls: near === marked && lines.length > 1 ? "marked" : "" },
          h("span", { cls: `key ${colour(near.one.i)}` }),
          h("span", { cls: "value" }, figure(near.point[1]) + (near.point[3] > 1 ? ` ± ${spread(near.point[2])}` : "")),
          h("span", { cls: "who" }, near.one.label + (near.point[3] < near.one.n ? ` (n = ${near.point[3]})` : "")))),
      ranked.length > part.length ? h("small", {}, `${ranked.length - part.length} more`) : "",
    );
    tip.hidden = false;
    tip.classList.toggle("below", width < 520); // no room beside a finger
    if (width < 520) return;
    const onRight = px(cursor) > width / 2;
    tip.style.left = onRight ? "auto" : `${px(cursor) + 12}px`;
    tip.style.right = onRight ? `${width - px(cursor) + 12}px` : "auto";
    tip.style.maxWidth = `${Math.max(px(cursor), width - px(cursor)) - 16}px`;
  };
  const leave = () => {
    tip.hidden = true;
    cross.setAttribute("visibility", "hidden");
    lines.forEach((one) => one.path.classList.remove("marked"));
  };
  const follow = (event) => {
    const box = picture.getBoundingClientRect();
    const x = x0 + ((event.clientX - box.left - left) / (width - left - right)) * (x1 - x0);
    hover(Math.min(x1, Math.max(x0, x)), event.clientY - box.top);
  };
  for (const name of ["pointermove", "pointerdown"]) picture.addEventListener(name, follow);
  picture.addEventListener("pointerleave", leave);
  picture.addEventListener("blur", leave);
  picture.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by) return;
    event.preventDefault();
    const places = [...new Set(all.map((point) => point[0]))].sort((a, b) => a - b);
    const now = cursor === null ? (by > 0 ? -1 : places.length) : places.indexOf(cursor);
    hover(places[Math.min(places.length - 1, Math.max(0, now + by))], null);
  });
  const legend = h("ul", { cls: "legend" }, lines.map((one) => {
    const text = [h("span", { cls: `key ${colour(one.i)}` }), h("span", {}, one.label), one.runs.length > 1 ? h("small", {}, ` n = ${one.n}`) : null];
    const mark = (on) => () => one.path.classList.toggle("marked", on);
    const press = () => (one.runs.length === 1 ? open(`run:${one.runs[0].key}`) : change({ sel: new Set(one.runs.map((run) => run.key)), group: "" }, true));
    const hint = one.runs.length === 1 ? one.runs[0].path : "compare these runs with each other";
    return h("li", {}, h("button", { cls: "link", title: hint, onclick: press, onpointerenter: mark(true), onpointerleave: mark(false) }, text));
  }));
  const without = groups.flatMap((group) => group.runs).filter((run) => !points(run, VIEW.metric, VIEW.x).length).length;
  const most = Math.max(...groups.flatMap((group) => group.runs.map((run) => run.curves.find((part) => Object.hasOwn(part[1], VIEW.metric))?.[2] || 0)));
  const notes = [];
  if (lines.some((one) => one.runs.length > 1)) notes.push("Line: mean; band: ± one standard deviation of the runs.");
  if (most > DATA.points) notes.push(`Up to ${DATA.points} points a curve, of up to ${most} that were logged; a spike may be missing.`);
  if (without) notes.push(`${plural(without, "run")} without this curve.`);
  if (hidden) notes.push(`${plural(hidden, "value")} of 0 and below cannot be shown on this scale.`);
  if (VIEW.x === "epoch" && groups.some((group) => group.runs.some((run) => !run.epoch))) notes.push("Runs that do not tell their epoch are shown over steps.");
  return h("div", {}, h("div", { cls: "picture" }, picture, tip), groups.length > 1 || groups[0].runs.length > 1 ? legend : null, notes.length ? h("p", { cls: "note" }, notes.join(" ")) : null);
}

function curvesOf(runs, several) {
  const names = counted(runs.flatMap((run) => run.curves.map((part) => part[1]))).sort();
  if (!names.includes(VIEW.metric)) {
    const usual = runs.map((run) => run.monitor).find((name) => names.includes(name));
    VIEW.metric = usual ?? names.find((name) => name === "train/loss") ?? names[0] ?? "";
  }
  const differing = [...KEYS].filter((key) => !Object.hasOwn(BUILT_IN, key) && !METRICS.includes(key) && !WITHOUT_EFFECT.has(key) && !key.endsWith("_target_") && key !== "seed" && distinct(runs, key) > 1);
  if (VIEW.group && VIEW.group !== "seeds" && !KEYS.has(VIEW.group)) VIEW.group = "";
  if (VIEW.group && VIEW.group !== "seeds" && !differing.includes(VIEW.group)) differing.unshift(VIEW.group);
  const usualFirst = [...differing.filter((key) => SETTINGS.includes(key)), ...differing.filter((key) => !SETTINGS.includes(key))];
  const option = (of, text, chosen) => h("option", { value: of, selected: chosen === of }, text);
  const controls = h("div", { cls: "controls" },
    h("label", {}, "curve ", h("select", { id: "metric", onchange: (e) => change({ metric: e.target.value }) }, names.map((n) => option(n, n, VIEW.metric)))),
    h("label", {}, "over ", h("select", { id: "x", onchange: (e) => change({ x: e.target.value }) }, ["step", "epoch"].map((n) => option(n, n, VIEW.x)))),
    several ? h("label", {}, "lines ", h("select", { id: "group", onchange: (e) => change({ group: e.target.value }) },
      option("", "each run", VIEW.group), option("seeds", "seeds together", VIEW.group), usualFirst.map((key) => option(key, `by ${key}`, VIEW.group)))) : null,
    h("label", {}, h("input", { id: "log", type: "checkbox", checked: VIEW.log, onchange: (e) => change({ log: e.target.checked }) }), " log scale"));
  const place = h("div", { cls: "chart" });
  const groups = several ? grouped(runs) : [{ runs, label: title(runs[0]) }];
  if (several) groups.forEach((group, i) => group.runs.forEach((run) => COLOUR_OF.set(run, `c${i % COLOURS}`)));
  // drawn once the place has a width, and anew when it has another
  let width = 0;
  new ResizeObserver(() => {
    const now = Math.floor(place.clientWidth);
    if (now && now !== width) place.replaceChildren(chart(groups, (width = now)));
  }).observe(place);
  return h("div", {}, controls, place);
}

// The panels ---------------------------------------------------------------------------------------------------------

const MOST_CONFIGS = 24; // side by side

function panelHead(text, ...more) {
  return h("div", { cls: "head" }, h("h2", {}, text), ...more, h("button", { cls: "close", "aria-label": "close", title: "close (esc)", onclick: () => open("") }, "✕"));
}

function comparePanel() {
  const runs = inOrder(RUNS.filter((run) => VIEW.sel.has(run.key)));
  if (!runs.length) return [panelHead("compare"), h("p", { cls: "nothing" }, "choose runs in the list")];
  return [panelHead(`${plural(runs.length, "run")} compared`), curvesOf(runs, true), configsOf(runs)];
}

// By their settings, so that those that belong together are side by side.
function inOrder(runs) {
  return runs.toSorted((a, b) => {
    for (const key of SETTINGS) {
      const order = compareValues(value(a, key) ?? "", value(b, key) ?? "");
      if (order) return order;
    }
    return 0;
  });
}

function configsOf(runs) {
  const shown = runs.slice(0, MOST_CONFIGS);
  const keys = [...new Set(shown.flatMap((run) => [...Object.keys(DATA.config), ...Object.keys(run.config)]))].sort();
  const differs = (key) => !WITHOUT_EFFECT.has(key) && new Set(shown.map((run) => show(fromConfig(run, key)))).size > 1;
  const rows = keys.filter((key) => (VIEW.all ? shown.some((run) => fromConfig(run, key) !== undefined) : differs(key)));
  const label = labels(shown);
  const names = shown.map((run) => h("th", { scope: "col" }, h("button", { cls: "link", title: run.path, onclick: () => open(`run:${run.key}`) }, label(run) || title(run))));
  return h("section", {},
    h("h3", {}, "config ", h("label", { cls: "switch" }, h("input", { id: "all", type: "checkbox", checked: VIEW.all, onchange: (e) => change({ all: e.target.checked }) }), " all keys")),
    runs.length > shown.length ? h("p", { cls: "note" }, `The first ${shown.length} of ${runs.length} runs.`) : null,
    rows.length
      ? h("div", { cls: "scroll" }, h("table", { cls: "configs" }, h("thead", {}, h("tr", {}, h("th", {}, "key"), names)), h("tbody", {}, rows.map((key) =>
          h("tr", { cls: VIEW.all && differs(key) ? "differs" : "" }, h("th", { scope: "row" }, key), shown.map((run) => h("td", {}, show(fromConfig(run, key)))))))))
      : h("p", { cls: "nothing" }, shown.length > 1 ? "nothing differs that can change a result" : "one run alone: all keys shows its config"));
}

function copyable(name, text) {
  const code = h("code", {}, text);
  const button = h("button", { "aria-label": `copy the command: ${name}` }, "copy");
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "copied";
    } catch {
      getSelection().selectAllChildren(code); // a browser that keeps the clipboard from files
      button.textContent = "selected";
    }
    setTimeout(() => (button.textContent = "copy"), 1500);
  });
  return h("div", { cls: "command" }, h("span", { cls: "soft" }, name), code, button);
}

function facts(pairs) {
  const there = pairs.filter(([, text]) => text !== undefined && text !== null && text !== "");
  return h("dl", {}, there.map(([name, text]) => [h("dt", {}, name), h("dd", {}, text)]));
}

function runPanel(run) {
  const record = run.record, identity = record.identity || {}, data = record.data || {}, sizes = record.batch_sizes || {};
  const chosen = VIEW.sel.has(run.key);
  const words = Object.entries(run.words).map(([key, text]) => h("span", { cls: "word" }, `${key}=${text}`));
  const finals = Object.entries(run.metrics);
  const config = Object.keys(DATA.config).concat(Object.keys(run.config).filter((key) => !Object.hasOwn(DATA.config, key))).sort();
  return [
    panelHead(run.name, h("button", { onclick: () => choose(run, !chosen, false) }, chosen ? "chosen ✓" : "choose")),
    h("p", { cls: "words" }, stateOf(run), " ", words),
    run.error ? h("pre", { cls: "error" }, run.error) : null,
    run.problems.map((text) => h("pre", { cls: "error" }, text)),
    finals.length ? h("table", { cls: "finals" }, h("tbody", {}, finals.map(([name, of]) => h("tr", {}, h("th", { scope: "row" }, name), h("td", { cls: "number" }, of === null ? "not finite" : figure(of)))))) : null,
    run.curves.length ? curvesOf([run], false) : null,
    run.commands.length ? h("section", {}, h("h3", {}, "commands"), run.commands.map(([name, text]) => copyable(name, text))) : null,
    h("section", {}, h("h3", {}, "record"), facts([
      ["folder", run.path],
      ["ablation", run.ablation],
      ["started", run.begun && localTime(run.begun)],
      ["took", duration(run.took)],
      ["resumed", Array.isArray(record.resumed) ? plural(record.resumed.length, "time") : undefined],
      ["on", [record.host, record.processes > 1 && `${record.processes} processes`].filter(Boolean).join(", ")],
      ["command", record.command],
      ["commit", record.git_commit && show(record.git_commit).replace(/^([0-9a-f]{12})[0-9a-f]*/, "$1")],
      ["identity", Object.entries(identity).map(([name, hash]) => `${name} ${show(hash).slice(0, 8)}`).join(", ")],
      ["data", Object.entries(data).map(([name, of]) => `${name} ${name === "fingerprint" ? show(of).slice(0, 12) : show(of)}`).join(", ")],
      ["batch", Object.entries(sizes).map(([name, of]) => `${name} ${show(of)}`).join(", ")],
    ]),
    h("p", { cls: "files" }, run.files.map((name) => h("a", { href: `${run.link}/${name}` }, name)))),
    run.lacks ? h("details", {}, h("summary", {}, "config"), h("div", { cls: "scroll" }, h("table", { cls: "configs" }, h("tbody", {}, config.filter((key) => fromConfig(run, key) !== undefined).map((key) => h("tr", {}, h("th", { scope: "row" }, key), h("td", {}, show(fromConfig(run, key))))))))) : null,
    Object.keys(record).length ? h("details", {}, h("summary", {}, "run.json"), h("pre", {}, JSON.stringify(record, null, 1))) : null,
  ];
}

function ablationPanel(ablation) {
  const runs = RUNS.filter((run) => run.ablation === ablation.name);
  const counts = STATES.map((state) => [state, runs.filter((run) => run.state === state).length]).filter(([, n]) => n).map(([state, n]) => `${n} ${state}`);
  if (ablation.missing) counts.push(`${ablation.missing} missing`);
  const look = () => change({ q: `ablation=${ablation.name}`, sel: new Set(runs.filter((run) => run.curves.length).map((run) => run.key)), panel: "compare", group: "seeds" }, true);
  return [
    panelHead(ablation.name),
    ablation.question ? h("p", { cls: "question" }, ablation.question) : null,
    ablation.problems.map((text) => h("pre", { cls: "error" }, text)),
    h("p", {}, counts.join(", ") || "no run yet"),
    h("p", { cls: "actions" },
      ablation.report ? h("a", { cls: "main", href: ablation.report }, "report") : null,
      h("button", { onclick: () => change({ q: `ablation=${ablation.name}` }) }, "list its runs"),
      h("button", { onclick: look }, "compare its runs")),
    ablation.verdicts.length ? h("section", {}, h("h3", {}, "verdict"), h("ul", { cls: "verdicts" }, ablation.verdicts.map((text) => h("li", {}, text)))) : h("p", { cls: "nothing" }, "no verdict yet"),
    h("section", {}, h("h3", {}, "commands"), ablation.command ? copyable("go on", ablation.command) : null, copyable("report", ablation.report_command)),
  ];
}

function renderPanel() {
  const [kind, name] = VIEW.panel.split(/:(.*)/s);
  const ablation = kind === "ablation" && DATA.ablations.find((one) => one.name === name);
  const run = kind === "run" && BY_KEY.get(name);
  const content = kind === "compare" ? comparePanel() : run ? runPanel(run) : ablation ? ablationPanel(ablation) : null;
  const panel = $("panel");
  panel.hidden = !content;
  document.body.classList.toggle("split", Boolean(content));
  const focused = panel.contains(document.activeElement) ? document.activeElement.id : "";
  const opened = [...panel.querySelectorAll("details[open] > summary")].map((one) => one.textContent);
  panel.replaceChildren(...(content || []).flat().filter(Boolean));
  for (const one of panel.querySelectorAll("details")) one.open = opened.includes(one.firstChild.textContent);
  if (focused) $(focused)?.focus();
}

// What a person does -------------------------------------------------------------------------------------------------

function change(what, newEntry = false) {
  const panelBefore = VIEW.panel;
  Object.assign(VIEW, what);
  render();
  if (VIEW.panel !== panelBefore) $("panel").scrollTop = 0;
  writeAddress(newEntry);
}

function open(panel) {
  const before = VIEW.panel;
  change({ panel }, true);
  if (panel && !matchMedia("(min-width: 70rem)").matches) scrollTo(0, 0); // the panel is the page then
  if (!panel && before.startsWith("run:")) rowOf(before.slice(4))?.scrollIntoView({ block: "nearest" });
}

function rowOf(key) {
  return ROWS.get(key)?.row;
}

function render() {
  COLOUR_OF.clear();
  renderPanel(); // first: it gives the lines their colours
  renderStates();
  renderList();
}

function goTo(by) {
  const now = listed.findIndex((run) => rowOf(run.key).contains(document.activeElement));
  const next = listed[Math.min(listed.length - 1, Math.max(0, now + by))];
  if (next) rowOf(next.key).querySelector(".name").focus();
}

const KEYBOARD = {
  "/": () => $("filter").focus(),
  j: () => goTo(1),
  k: () => goTo(-1),
  c: () => VIEW.sel.size && open("compare"),
  x: (event) => press(event.shiftKey),
  X: () => press(true),
  Escape: () => VIEW.panel && open(""),
};

function press(range) {
  const run = BY_KEY.get(document.activeElement.closest("tr")?.dataset.key);
  if (run) choose(run, !VIEW.sel.has(run.key), range);
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape" && document.activeElement === $("filter")) return $("filter").blur();
  if (event.target.matches("input:not([type=checkbox]), select, textarea")) return;
  const action = KEYBOARD[event.key];
  if (!action) return;
  event.preventDefault();
  action(event);
});

$("filter").addEventListener("input", (event) => change({ q: event.target.value }));
$("sort").addEventListener("change", (event) => change({ sort: event.target.value }));
$("compare").addEventListener("click", () => open("compare"));
$("clear").addEventListener("click", () => change({ sel: new Set(), panel: VIEW.panel === "compare" ? "" : VIEW.panel }));
for (const column of COLUMNS) {
  const down = column.metric || column.key === "started" || column.key === "took";
  for (const sign of down ? ["-", ""] : ["", "-"])
    $("sort").append(h("option", { value: sign + column.key }, `${column.key} ${sign ? "↓" : "↑"}`));
}
for (const name of ["hashchange", "popstate"])
  addEventListener(name, () => {
    readAddress();
    render();
  });
$("folder").textContent = DATA.folder;
document.title = `${DATA.folder} · ablab`;
$("written").textContent = `as of ${localTime(WRITTEN)}`;
$("written").title = "give the command again for a newer page: python scripts/browse.py";
readAddress();
render();
