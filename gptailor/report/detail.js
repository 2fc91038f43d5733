// The panel beside the chart: everything about the chosen point.

function commandFor(point) {
  return `${data.command} --point ${point.point} stitched-${point.point}`;
}

async function copy(text, node) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    getSelection().selectAllChildren(node); // pages opened from a file may lack the clipboard
    return document.execCommand("copy");
  }
}

function commandLine(point) {
  const text = commandFor(point);
  const code = h("code", { id: "command" }, text);
  const button = h("button", { type: "button", "aria-label": "Copy the command" }, "Copy");
  button.addEventListener("click", async () => {
    button.textContent = (await copy(text, code)) ? "Copied" : "Selected";
    setTimeout(() => { button.textContent = "Copy"; }, 1600);
  });
  return h("div", { class: "command" }, code, button);
}

function keptFacts(point) {
  const fact = (set) => {
    const measured = point[set];
    const title = h("dt", {}, `${keptTitle(set)}, ${set}`);
    if (!measured) return h("div", {}, title, h("dd", {}, "–", h("small", {}, "not scored")));
    const error = measured.retention_percent_stderr;
    const sure = error === null ? "" : `±${THIN}${error.toFixed(1)}${THIN}%, `;
    const accuracy = `accuracy ${format.score(measured.accuracy)} ${plusMinus(measured.stderr)}`;
    const unit = isNearChance(set) && measured.above_chance_points !== null ? " points" : "";
    return h("div", {}, title,
      h("dd", {}, keptText(set, measured) + unit, h("small", {}, sure + accuracy)));
  };
  return h("dl", { class: "kept" }, fact("search"), fact("holdout"));
}

function scoreGroup(title, set, measured) {
  if (!measured) return [];
  const row = (name, value, stderr, whole, kept, attributes, hover) => h("tr", attributes,
    h("th", { class: "wrap left", scope: "row", title: hover }, name),
    h("td", {}, format.score(value), " ", h("small", {}, plusMinus(stderr))),
    h("td", {}, format.score(whole)), h("td", {}, kept));
  const tasks = measured.scores.filter((x) => x.weight !== 0).map((x) => {
    const weight = x.weight === 1 ? "" : h("small", {}, ` weight ${format.number(x.weight)}`);
    const chance = x.chance === null ? "" : `, chance ${format.score(x.chance)}`;
    const hover = `${x.metric}, ${format.count(x.num_documents)} documents, weight ${x.weight}${chance}`;
    return row([x.task, weight], x.value, x.stderr, x.best_dense,
      format.percent(x.retention_percent), {}, hover);
  });
  // Tasks that are no part of the accuracy, such as the perplexity of a text: plain numbers.
  const others = measured.scores.filter((x) => x.weight === 0).map((x) => {
    const hover = `${x.metric}, ${format.count(x.num_documents)} documents, no part of the accuracy, `
      + "held against the base";
    return h("tr", { class: "uncounted" },
      h("th", { class: "wrap left", scope: "row", title: hover },
        x.task, h("small", {}, ` ${x.metric.replace(/,none$/, "")}`)),
      h("td", {}, format.plain(x.value), " ", h("small", {}, plusMinus(x.stderr))),
      h("td", {}, x.best_dense === null ? "–" : format.plain(x.best_dense)), h("td", {}));
  });
  return h("tbody", {},
    h("tr", { class: "group" }, h("th", { colspan: 4, scope: "rowgroup" }, title)), tasks,
    row("accuracy", measured.accuracy, measured.stderr, data.yardsticks[set].accuracy,
      format.percent(measured.retention_percent), { class: "total" }),
    others);
}

function scores(point) {
  return h("div", { class: "scroll" }, h("table", {},
    h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Task"), h("th", { scope: "col" }, "Score"),
      h("th", { scope: "col" }, "Best dense"), h("th", { scope: "col" }, "Kept"))),
    scoreGroup("Search documents", "search", point.search),
    scoreGroup("Holdout documents", "holdout", point.holdout),
    scoreGroup("Holdout documents, without repair", "holdout", point.holdout_without_repair)));
}

// [1, 2, 3, 6] → "1–3, 6"
function ranges(numbers) {
  const parts = [];
  for (const n of numbers) {
    const last = parts[parts.length - 1];
    if (last && last[1] === n - 1) last[1] = n;
    else parts.push([n, n]);
  }
  return parts.map(([a, b]) => (a === b ? `${a}` : `${a}–${b}`)).join(", ");
}

function repairText({ out_layers, teachers, documents, tokens_of_text }) {
  const read = [documents && `${format.count(documents)} documents`,
    tokens_of_text && `${format.count(tokens_of_text)} tokens of text`].filter(Boolean).join(" and ");
  const names = typeof teachers === "string" ? teachers
    : Object.entries(teachers).map(([group, model]) => `${model} for ${group}`).join(", ");
  return `Repaired: output layers ${ranges(out_layers)}, with ${read} at most. Teachers: ${names}.`;
}

function detail(point) {
  const cut = bySource(point).filter((entries) => !entries.length).length;
  const merged = point.layer_map.filter((entry) => entry.method).length;
  byId("detail").dataset.point = point.point;
  byId("detail-title").textContent =
    `${point.layers} of ${data.num_layers} layers, ${format.percent(point.parameters_percent)} of the parameters`;
  byId("detail-body").replaceChildren(
    h("p", { class: "tags" }, h("span", { class: "id" }, point.point), " · ",
      frontIds.has(point.point) ? "on the front · " : "", describeKind(point),
      ` · ${format.size(point.parameters)} parameters · evaluation ${point.evaluation}`),
    keptFacts(point),
    commandLine(point),
    h("h3", {}, "Layers"),
    h("p", { class: "hint" }, `Read from the bottom up, as the model computes: source layer 0 is next `
      + `to the embeddings. ${cut} cut, ${merged} merged.`),
    layerMap(point),
    ...(point.repair ? [h("p", { class: "hint" }, repairText(point.repair))] : []),
    h("h3", {}, "Scores"),
    h("p", { class: "hint" }, "Each task is held against the dense candidate that is best at it; no "
      + "percentage where that one is not clearly above chance."
      + (point.holdout?.scores.some((x) => x.weight === 0)
        ? " Below the accuracy: what is no part of it, held against the base." : "")),
    scores(point));
}
