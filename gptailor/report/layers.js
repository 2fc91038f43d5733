// Layer maps: where each source layer comes from, for one model and along the whole front.

function bySource(point) {
  const rows = Array.from({ length: data.num_layers }, () => []);
  for (const entry of point.layer_map) rows[entry.src_layer]?.push(entry);
  return rows;
}

// In a small cell the sources of a merge get equal parts, and codes only where they fit.
function bar(entries, small) {
  const sources = entries.flatMap((entry) => entry.sources);
  const withCodes = !small || data.num_layers <= (sources.length > 1 ? 16 : 28);
  return h("div", { class: sources.length ? "cell" : "cell gone" }, sources.map((source) =>
    band(source.model, small ? 1 : source.part, withCodes ? codes.get(source.model) : "")));
}

const flags = new Set(data.flags);

function parameterInWords([name, value]) {
  if (flags.has(name)) return value ? `, ${name === "normalize" ? "normalised" : name}` : "";
  const shown = typeof value === "object"
    ? Object.entries(value).map(([model, one]) => `${model}\u00a0${format.number(one)}`).join("/")
    : format.number(value);
  return `, ${name === "lambda" ? "λ" : name}\u00a0${shown}`;
}

// "math", or "task_arithmetic: math 0.5 + code 0.5, lambda 0.7", or "math; mlp from code".
function inWords(entry) {
  const modules = entry.modules.map((part) => `; ${part.module} from ${inWords(part)}`).join("");
  const scaled = entry.scale === 1 ? "" : `, output\u00a0×\u00a0${format.number(entry.scale)}`;
  if (!entry.method) return entry.sources[0].model + scaled + modules;
  const sources = entry.sources.map((x) =>
    x.weight === null ? x.model : `${x.model}\u00a0${format.number(x.weight)}`).join(" + ");
  const values = Object.entries(entry.parameters)
    .filter(([name]) => name !== data.shares[entry.method]).map(parameterInWords).join("");
  return `${entry.method}: ${sources}${values}${scaled}${modules}`;
}

function layerMap(point) {
  const rows = bySource(point).map((entries, src) => {
    const what = entries.length ? entries.map(inWords).join("; ") : "cut";
    return h("tr", { class: entries.length ? "" : "gone" },
      h("th", { class: "index", scope: "row" }, src),
      h("td", { class: "bar" }, bar(entries, false)),
      h("td", { class: "what" }, what),
      h("td", { class: "index" }, entries.map((e) => e.out_layer).join(", ") || "–"));
  });
  const end = (title, entry) => h("tr", { class: "end" },
    h("th", { class: "index", scope: "row" }, ""),
    h("td", { class: "bar" }, bar([entry], false)),
    h("td", { class: "what" }, inWords(entry), h("span", { class: "method" }, ` · ${title}`)),
    h("td", { class: "index" }, ""));
  return h("table", { class: data.num_layers > 24 ? "map long" : "map" },
    h("thead", {}, h("tr", {},
      h("th", { class: "index", scope: "col" }, "source"),
      h("th", { class: "left", scope: "col", colspan: 2 }, "taken from"),
      h("th", { class: "index", scope: "col" }, "output"))),
    h("tbody", {}, end(endNames.head, point.ends.head), rows.reverse(),
      end(endNames.embeddings, point.ends.embeddings)));
}

const endNames = { embeddings: "embeddings", head: "final norm and head" };

function isOfBase(entry) {
  return !entry.method && entry.sources[0].model === data.base && !entry.modules.length;
}

// Embeddings and head get columns if any point has other ones than the base's.
function matrix(host, select) {
  const front = [...data.front].reverse();
  if (!front.length) {
    host.append(h("p", { class: "hint" }, "There is no front yet."));
    return { mark() {} };
  }
  const indices = Array.from({ length: data.num_layers }, (_, i) => i);
  const kept = indices.map(() => 0);
  const [embeddings, head] = ["embeddings", "head"].map((key) =>
    front.every((point) => isOfBase(point.ends[key])) ? [] : [key]);
  const rows = front.map((point) => {
    const cells = bySource(point).map((entries, src) => {
      if (entries.length) kept[src] += 1;
      const text = entries.length ? entries.map(inWords).join("; ") : "cut";
      return h("td", { title: `source layer ${src}: ${text}` }, bar(entries, true));
    });
    const end = (key) => h("td", { title: `${endNames[key]}: ${inWords(point.ends[key])}` },
      bar([point.ends[key]], true));
    const name = `${point.layers} layers, ${format.score(point.search.accuracy)}`;
    return h("tr", { "data-point": point.point, onclick: () => select(point.point) },
      h("th", { scope: "row" }, h("button", { class: "plain", type: "button" }, name)),
      embeddings.map(end), cells, head.map(end));
  });
  const every = data.num_layers > 28 ? 5 : 1;
  const line = (title, values, end) => h("tr", {}, h("th", { scope: "row" }, title),
    embeddings.map(end), values.map((value, i) => h("td", {}, i % every ? "" : value)),
    head.map(end));
  const letter = (key) => h("td", { title: endNames[key] }, key[0].toUpperCase());
  const size = data.num_layers > 28 ? "long" : data.num_layers <= 16 ? "roomy" : "";
  host.append(h("table", { class: `matrix ${size}` }, h("tbody", {}, rows),
    h("tfoot", {}, line("source layer", indices, letter),
      line(`kept, of ${front.length}`, kept, () => h("td", {})))));
  const ends = [...embeddings, ...head].map((key) => `${key[0].toUpperCase()}: ${endNames[key]}`);
  if (ends.length) host.append(h("p", { class: "hint" }, ends.join(", ")));
  return {
    mark(id) {
      for (const row of rows) row.classList.toggle("selected", row.dataset.point === id);
    },
  };
}

function modelLegend(host) {
  const entries = modelNames.map((name) => h("li", {}, swatch(name),
    name === data.base && name !== "base" ? `${name}, the base` : name));
  const merged = h("div", { class: "cell" },
    modelNames.slice(0, 2).map((name) => band(name, 1, codes.get(name))));
  merged.style.width = "34px";
  if (modelNames.length > 1) entries.push(h("li", {}, merged, "merged"));
  const gone = h("div", { class: "cell gone" });
  gone.style.width = "26px";
  gone.style.backgroundColor = "var(--gone)";
  host.append(...entries, h("li", {}, gone, "cut"));
}
