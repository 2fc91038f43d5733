// The two charts: accuracy against size, and hypervolume against evaluations.

function ticks(low, high, count) {
  const rough = (high - low) / Math.max(count, 1) || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((f) => f * power).find((v) => v >= rough * 0.999);
  const result = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i += 1) {
    result.push(Number((i * step).toPrecision(12)));
  }
  return result;
}
const digitsOf = (values) =>
  Math.max(0, ...values.map((v) => (String(v).split(".")[1] || "").length));
const scale = (low, high, from, to) => (value) =>
  from + ((value - low) / (high - low || 1)) * (to - from);

function drawWhenSized(host, draw) {
  let width = 0;
  const redraw = () => {
    const now = Math.round(host.clientWidth) || 640;
    if (Math.abs(now - width) < 2) return;
    width = now;
    const focused = host.contains(document.activeElement);
    host.replaceChildren(draw(width));
    if (focused) host.querySelector(".mark.selected")?.focus();
  };
  redraw();
  if (window.ResizeObserver) new ResizeObserver(redraw).observe(host);
}

function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[Math.floor(sorted.length / 2)];
}

const tooltip = byId("tooltip");
function showTooltip(event, lines) {
  tooltip.replaceChildren(...lines.map((line, i) => h(i ? "div" : "b", {}, line)));
  tooltip.hidden = false;
  const box = tooltip.getBoundingClientRect();
  const at = event.type === "focus" ? event.target.getBoundingClientRect() : null;
  const x = at ? at.right : event.clientX;
  const y = at ? at.top : event.clientY;
  const left = x + 14 + box.width > innerWidth ? x - 14 - box.width : x + 14;
  tooltip.style.left = `${Math.max(4, left)}px`;
  tooltip.style.top = `${Math.max(4, Math.min(y + 14, innerHeight - box.height - 8))}px`;
}
const hideTooltip = () => { tooltip.hidden = true; };

function pointLines(point) {
  const { search, holdout } = point;
  const lines = [
    `${point.layers} layers, ${format.percent(point.parameters_percent)} of the parameters`,
    `accuracy ${format.score(search.accuracy)} ${plusMinus(search.stderr)}`,
  ];
  if (search.retention_percent !== null) {
    lines.push(`keeps ${keptText("search", search)} of the best dense candidate`);
  } else if (search.above_chance_points !== null) {
    lines.push(`${format.points(search.above_chance_points)} points above chance`);
  }
  if (holdout) lines.push(`holdout ${format.score(holdout.accuracy)} ${plusMinus(holdout.stderr)}`);
  lines.push(`${describeKind(point)}, ${point.point}`);
  return lines;
}

// select(id) is called when the user chooses a point.
function frontChart(host, select) {
  if (!points.length) {
    host.append(h("p", { class: "hint" }, "No evaluation gave a score on all search documents."));
    return { mark() {} };
  }
  let selected = null;
  const ys = points.flatMap((p) => [p.search.accuracy, ...(frontIds.has(p.point) && p.search.stderr
    ? [p.search.accuracy - p.search.stderr, p.search.accuracy + p.search.stderr] : [])])
    .concat(data.others.map((o) => o[4]));
  const xs = points.map((p) => p.parameters_percent).concat(data.others.map((o) => o[3]));
  const padded = (values, part, least) => {
    const [low, high] = [Math.min(...values), Math.max(...values)];
    const pad = Math.max((high - low) * part, least);
    return [low - pad, high + pad];
  };
  const [x0, x1] = padded(xs, 0.035, 1);
  const [y0, y1] = padded(ys, 0.07, 0.005);

  const hasKept = bestDense && !isNearChance("search");

  function draw(width) {
    const wide = width > 520;
    const height = Math.round(Math.min(500, Math.max(310, width * 0.62)));
    const edge = { left: 50, right: hasKept ? 48 : 14, top: 40, bottom: 42 };
    const x = scale(x0, x1, edge.left, width - edge.right);
    const y = scale(y0, y1, height - edge.bottom, edge.top);
    const [right, bottom] = [width - edge.right, height - edge.bottom];
    const label = `Accuracy against parameters: ${data.front.length} points on the front, `
      + `${data.control_arms.length} control arms, ${data.others.length} other evaluations`;
    const svg = s("svg", { viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": label });

    const yTicks = ticks(y0, y1, height / 62);
    const yDigits = Math.max(2, digitsOf(yTicks));
    for (const value of yTicks) {
      svg.append(
        s("line", { class: "grid", x1: edge.left, x2: right, y1: y(value), y2: y(value) }),
        s("text", { x: edge.left - 8, y: y(value) + 4, "text-anchor": "end" },
          value.toFixed(yDigits)));
    }
    for (const value of ticks(x0, x1, width / 95)) {
      svg.append(
        s("line", { class: "axis", x1: x(value), x2: x(value), y1: bottom, y2: bottom + 4 }),
        s("text", { x: x(value), y: bottom + 17, "text-anchor": "middle" }, value));
    }
    svg.append(s("line", { class: "axis", x1: edge.left, x2: right, y1: bottom, y2: bottom }));
    const bySize = new Map();
    for (const [layers, at] of [...points.map((p) => [p.layers, p.parameters_percent]),
      ...data.others.map((o) => [o[2], o[3]])]) {
      bySize.set(layers, [...(bySize.get(layers) || []), at]);
    }
    let last = -Infinity;
    for (const layers of [...bySize.keys()].sort((a, b) => a - b)) {
      const at = x(median(bySize.get(layers)));
      if (at - last < 24) continue;
      last = at;
      svg.append(
        s("line", { class: "axis", x1: at, x2: at, y1: edge.top - 8, y2: edge.top - 4 }),
        s("text", { x: at, y: edge.top - 12, "text-anchor": "middle" }, layers));
    }
    const middle = (edge.left + right) / 2;
    svg.append(
      s("text", { class: "title", x: middle, y: height - 4, "text-anchor": "middle" },
        wide ? "parameters, % of the largest candidate" : "parameters, % of the largest"),
      s("text", { class: "title", x: 2, y: 12 }, "accuracy"),
      s("text", { class: "title", x: middle, y: 12, "text-anchor": "middle" }, "layers"));

    if (bestDense) {
      const best = bestDense.search.accuracy;
      for (const value of hasKept ? ticks((100 * y0) / best, (100 * y1) / best, height / 75) : []) {
        svg.append(s("text", { x: right + 8, y: y((value * best) / 100) + 4 }, `${value}${THIN}%`));
      }
      svg.append(
        s("line", { class: "dense-line", x1: edge.left, x2: right, y1: y(best), y2: y(best) }),
        s("text", { x: edge.left + 6, y: y(best) - 6 }, "best dense candidate"),
        s("text", { class: "title", x: width - 2, y: 12, "text-anchor": "end" }, hasKept ? "kept" : ""));
    }
    svg.append(s("g", { "aria-hidden": "true" }, data.others.map(([id, number, layers, at, accuracy]) =>
      s("circle", {
        class: "other", cx: x(at), cy: y(accuracy), r: 2.3,
        onpointerenter: (event) => showTooltip(event, [
          `${layers} layers, ${format.percent(at)} of the parameters`,
          `accuracy ${format.score(accuracy)}`, `evaluation ${number}, ${id}, not on the front`]),
        onpointerleave: hideTooltip,
      }))));
    let path = "";
    data.front.forEach((p, i) => {
      const [px, py] = [x(p.parameters_percent), y(p.search.accuracy)];
      path += i ? `H${px}V${py}` : `M${px} ${py}`;
    });
    svg.append(s("path", { class: "front-line", d: path }));
    for (const p of data.front) {
      if (!p.search.stderr) continue;
      const at = x(p.parameters_percent);
      svg.append(s("line", {
        class: "whisker", x1: at, x2: at,
        y1: y(p.search.accuracy - p.search.stderr), y2: y(p.search.accuracy + p.search.stderr),
      }));
    }
    const tabStop = selected || (data.front[0] || points[0]).point;
    for (const p of [...points].reverse()) {
      const onFront = frontIds.has(p.point);
      svg.append(s("g", {
        class: p.point === selected ? "mark selected" : "mark",
        transform: `translate(${x(p.parameters_percent)} ${y(p.search.accuracy)})`,
        tabindex: p.point === tabStop ? 0 : -1, role: "button", "data-point": p.point,
        "aria-pressed": String(p.point === selected),
        "aria-label": (onFront ? "On the front: " : "Control arm: ") + pointLines(p).join("; "),
        onclick: () => select(p.point), onkeydown: (event) => walk(event, p, x, y),
        onfocus: (event) => { if (event.target.matches(":focus-visible")) showTooltip(event, pointLines(p)); },
        onblur: hideTooltip,
        onpointerenter: (event) => showTooltip(event, pointLines(p)), onpointerleave: hideTooltip,
      }, s("circle", { class: "hit", r: 11 }), s("circle", { class: "ring", r: 9.5 }),
        shape(p.kinds[0], onFront)));
    }
    return svg;
  }

  function walk(event, from, x, y) {
    const bySize = (a, b) => a.parameters - b.parameters || a.search.accuracy - b.search.accuracy;
    const series = frontIds.has(from.point) ? [...data.front]
      : points.filter((p) => !frontIds.has(p.point));
    const row = series.sort(bySize);
    const at = row.indexOf(from);
    const upward = event.key === "ArrowUp" ? 1 : -1;
    const distance = (p) => 3 * Math.abs(x(p.parameters_percent) - x(from.parameters_percent))
      + Math.abs(y(p.search.accuracy) - y(from.search.accuracy));
    const vertical = () => points
      .filter((p) => upward * (p.search.accuracy - from.search.accuracy) > 0)
      .sort((a, b) => distance(a) - distance(b))[0];
    const target = {
      ArrowLeft: () => row[at - 1], ArrowRight: () => row[at + 1], ArrowUp: vertical,
      ArrowDown: vertical, Home: () => row[0], End: () => row[row.length - 1],
      Enter: () => from, " ": () => from,
    }[event.key];
    if (!target || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    const next = target();
    if (!next) return;
    select(next.point);
    host.querySelector(".mark.selected")?.focus();
  }

  drawWhenSized(host, draw);
  return {
    mark(id) {
      selected = id;
      for (const node of host.querySelectorAll(".mark")) {
        const on = node.dataset.point === id;
        node.classList.toggle("selected", on);
        node.setAttribute("aria-pressed", String(on));
        node.setAttribute("tabindex", on ? 0 : -1);
      }
    },
  };
}

function frontLegend(host) {
  const entries = [[shape("", true), "front"]];
  for (const kind of new Set(["dense", ...Object.keys(KINDS), ...points.flatMap((p) => p.kinds)])) {
    if (points.some((p) => p.kinds[0] === kind)) entries.push([shape(kind, false), kindName(kind)]);
  }
  if (data.others.length) {
    entries.push([s("circle", { class: "other", r: 3 }), "other evaluations"]);
  }
  if (points.length) host.append(...entries.map(([mark, name]) => h("li", {}, icon(mark), name)));
}

function volumeChart(host) {
  const history = data.hypervolume_history;
  if (!history.length) {
    host.append(h("p", { class: "hint" }, "No evaluation has given a score yet."));
    return;
  }
  const final = history[history.length - 1][1];
  const control = data.control_hypervolume;
  drawWhenSized(host, (width) => {
    const height = 220;
    const edge = { left: 50, right: 14, top: 26, bottom: 40 };
    const [x1, y1] = [history[history.length - 1][0], Math.max(final, control, 1e-6) * 1.12];
    const x = scale(0, x1, edge.left, width - edge.right);
    const y = scale(0, y1, height - edge.bottom, edge.top);
    const bottom = height - edge.bottom;
    const svg = s("svg", {
      viewBox: `0 0 ${width} ${height}`, role: "img",
      "aria-label": `Hypervolume ${format.score(final)} after ${x1} evaluations; `
        + `the control arms alone reach ${format.score(control)}`,
    });
    const yTicks = ticks(0, y1, 4);
    for (const value of yTicks) {
      svg.append(
        s("line", { class: "grid", x1: edge.left, x2: width - edge.right, y1: y(value), y2: y(value) }),
        s("text", { x: edge.left - 8, y: y(value) + 4, "text-anchor": "end" },
          value.toFixed(Math.max(1, digitsOf(yTicks)))));
    }
    for (const value of ticks(0, x1, width / 90).filter(Number.isInteger)) {
      svg.append(
        s("line", { class: "axis", x1: x(value), x2: x(value), y1: bottom, y2: bottom + 4 }),
        s("text", { x: x(value), y: bottom + 17, "text-anchor": "middle" }, format.count(value)));
    }
    let path = `M${x(history[0][0])} ${y(0)}`;
    for (const [number, value] of history) path += `H${x(number)}V${y(value)}`;
    const last = x(x1);
    svg.append(
      s("line", { class: "axis", x1: edge.left, x2: width - edge.right, y1: bottom, y2: bottom }),
      s("path", { class: "area", d: `${path}V${y(0)}Z` }),
      s("path", { class: "front-line", d: path }),
      s("text", { class: "title", x: 2, y: 12 }, "hypervolume"),
      s("text", { class: "title", x: width - 2, y: height - 4, "text-anchor": "end" }, "evaluations"),
      s("text", { class: "title", x: last, y: y(final) - 6, "text-anchor": "end" },
        format.score(final)));
    if (control > 0) {
      svg.append(
        s("line", { class: "control-line", x1: edge.left, x2: last, y1: y(control), y2: y(control) }),
        s("text", { class: "control-text", x: last, y: y(control) + 15, "text-anchor": "end" },
          `control arms alone ${format.score(control)}`));
    }
    return svg;
  });
}
