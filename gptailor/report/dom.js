// Elements, numbers as text, and colours. Text only ever enters the page as text nodes.

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const THIN = "\u202f";

// Characters that would reorder or hide the text around a name are shown as U+FFFD.
const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200e\u200f\u202a-\u202e\u2066-\u2069]/g;
const visible = (value) => String(value).replace(HIDDEN, "\ufffd");

function build(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : visible(value));
  }
  for (const child of children.flat(2)) {
    if (child === null || child === undefined || child === "") continue;
    node.append(child instanceof Node ? child : document.createTextNode(visible(child)));
  }
  return node;
}
const h = (tag, attributes, ...children) =>
  build(document.createElement(tag), attributes, children);
const s = (tag, attributes, ...children) =>
  build(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

const format = {
  score: (value) => (value === null || value === undefined ? "–" : value.toFixed(3)),
  percent: (value, digits = 1) =>
    value === null || value === undefined ? "–" : value.toFixed(digits) + THIN + "%",
  count: (value) => value.toLocaleString("en-US"),
  size(value) {
    for (const [unit, name] of [[1e9, "B"], [1e6, "M"], [1e3, "k"]]) {
      if (value >= unit) return Number((value / unit).toPrecision(3)) + THIN + name;
    }
    return String(value);
  },
  hours(value) {
    if (value >= 1) return value.toFixed(value >= 100 ? 0 : 1) + THIN + "h";
    if (value * 60 >= 1) return (value * 60).toFixed(1) + THIN + "min";
    return (value * 3600).toFixed(1) + THIN + "s";
  },
  points: (value) => (value === null || value === undefined ? "–"
    : `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(1)}`),
  // A score in its own unit, such as a perplexity: three digits, or all before the point.
  plain(value) {
    if (value === null || value === undefined) return "not finite";
    const size = Math.abs(value);
    if (size >= 1e7) return value.toExponential(2);
    return size < 999.5 ? value.toPrecision(3) : Math.round(value).toLocaleString("en-US");
  },
  number: (value) => String(Number(value.toPrecision(4))),
};
const plusMinus = (stderr) =>
  stderr === null || stderr === undefined ? "" : "±" + THIN + stderr.toFixed(3);

// The base is grey and the variants have the colours of Okabe and Ito, which the colour-blind can
// tell apart; every cell also has a short code, so that nothing depends on colour alone.
const PALETTE = [
  "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#8c6bb1",
];
const modelNames = Object.keys(data.models);
const codes = shortCodes(modelNames);
const colours = new Map();
for (const name of modelNames) {
  const next = colours.size - (colours.has(data.base) ? 1 : 0);
  colours.set(name, name === data.base ? "#8a949e" : PALETTE[next % PALETTE.length]);
}

function shortCodes(names) {
  const wanted = (name, length) => [...name].slice(0, length).join("");
  const result = new Map();
  names.forEach((name, index) => {
    let length = 1;
    const same = () => names.filter((other) => wanted(other, length) === wanted(name, length));
    while (length < 3 && same().length > 1) length += 1;
    result.set(name, same().length > 1 ? String(index) : wanted(name, length));
  });
  return result;
}

function inkOn(colour) {
  const [r, g, b] = [1, 3, 5].map((at) => (parseInt(colour.slice(at, at + 2), 16) / 255) ** 2.2);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.18 ? "#000000" : "#ffffff";
}

function band(model, part, text) {
  const node = h("span", {}, text);
  const colour = colours.get(model) || "#8a949e";
  node.style.backgroundColor = colour;
  node.style.color = inkOn(colour);
  node.style.flex = `${Math.max(part, 0.08)} 1 0`;
  return node;
}

function swatch(model) {
  const node = band(model, 1, codes.get(model) || "?");
  node.className = "swatch";
  node.style.flex = "none";
  return node;
}

// Kinds of points: a shape for each, with an outline that can be told apart without colour.
const KINDS = {
  dense: ["dense candidate", "M0-6L6 0L0 6L-6 0Z"],
  block_influence: ["Block Influence", "M0-6L5.8 4.4L-5.8 4.4Z"],
  angular: ["angular block", "M-4.6-4.6H4.6V4.6H-4.6Z"],
  uniform: ["uniform average", "M-2-6H2V-2H6V2H2V6H-2V2H-6V-2H-2Z"],
  paper: ["paper's starting point", "M0-6.4L1.6-2L6.2-2L2.5 .9L3.8 5.4L0 2.7L-3.8 5.4L-2.5 .9L-6.2-2L-1.6-2Z"],
  random: ["random cut", "M-4.6-4.6L4.6 4.6M4.6-4.6L-4.6 4.6"],
};
const CIRCLE = "M-4.6 0A4.6 4.6 0 1 0 4.6 0A4.6 4.6 0 1 0-4.6 0Z";
const kindName = (kind) => (Object.hasOwn(KINDS, kind) ? KINDS[kind][0] : kind);

function shape(kind, onFront) {
  if (!kind) return s("path", { class: "shape front", d: CIRCLE });
  const path = Object.hasOwn(KINDS, kind) ? KINDS[kind][1] : "M0 6L5.8-4.4L-5.8-4.4Z";
  const style = [kind === "dense" ? "dense" : "control", onFront ? "on-front" : ""].join(" ");
  return s("path", { class: `shape ${style}`, d: path });
}
const icon = (child) => s("svg", { viewBox: "-8 -8 16 16", "aria-hidden": "true" }, child);

// Points by id, each once: a control arm can be on the front too.
const frontIds = new Set(data.front.map((point) => point.point));
const points = [...data.front, ...data.control_arms.filter((p) => !frontIds.has(p.point))];
const pointById = new Map(points.map((point) => [point.point, point]));
const bestDense = pointById.get(data.best_dense) || null;

// On each set of documents, the percentage kept of the best dense candidate's accuracy; points above
// chance if that candidate is not clearly above it. `set` is "search" or "holdout".
const isNearChance = (set) => data.yardsticks[set].is_near_chance;
const keptTitle = (set) => (isNearChance(set) ? "Above chance" : "Kept");
const keptValue = (set, measured) =>
  (isNearChance(set) ? measured?.above_chance_points : measured?.retention_percent) ?? null;
const keptText = (set, measured) =>
  (isNearChance(set) ? format.points : format.percent)(keptValue(set, measured));
const describeKind = (point) =>
  point.arms.length ? point.arms.join(", ") : "stitched by the search";
