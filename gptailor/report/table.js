// The sortable table of the front and the control arms, the costs, and what went wrong.

function pointTable(host, select) {
  if (!points.length) {
    host.append(h("p", { class: "hint" }, "There is nothing to show yet."));
    return { mark() {} };
  }
  const tasks = [...new Map(points.flatMap((p) => p.search.scores)
    .map((x) => [`${x.task}\n${x.metric}`, x])).values()];
  const several = new Set(tasks.map((x) => x.task)).size < tasks.length;
  const scoreOf = (p, task) => p.search.scores
    .find((x) => x.task === task.task && x.metric === task.metric)?.value ?? null;
  const anyHoldout = points.some((p) => p.holdout);
  const order = (p) => (frontIds.has(p.point) ? "0" : "1") + p.arms.join(" ");
  // title, value to sort by, cell, whether text
  const columns = [
    ["Point", (p) => p.point, (p) => h("button", { class: "plain id", type: "button" }, p.point), true],
    ["Kind", order, (p) => h("span", {}, icon(shape(p.kinds[0], frontIds.has(p.point))),
      [frontIds.has(p.point) ? "front" : "", ...p.arms].filter(Boolean).join(", ")), true],
    ["Layers", (p) => p.layers, (p) => p.layers],
    ["Parameters", (p) => p.parameters, (p) => format.size(p.parameters)],
    ["Size", (p) => p.parameters, (p) => format.percent(p.parameters_percent)],
    ["Accuracy", (p) => p.search.accuracy, (p) => [format.score(p.search.accuracy), " ",
      h("small", {}, plusMinus(p.search.stderr))]],
    [keptTitle("search"), (p) => keptValue("search", p.search), (p) => keptText("search", p.search)],
    ...(anyHoldout ? [
      ["Holdout", (p) => p.holdout?.accuracy, (p) => [format.score(p.holdout?.accuracy), " ",
        h("small", {}, plusMinus(p.holdout?.stderr))]],
      [`Holdout ${keptTitle("holdout").toLowerCase()}`, (p) => keptValue("holdout", p.holdout),
        (p) => keptText("holdout", p.holdout)],
    ] : []),
    ...tasks.map((task) => [several ? `${task.task} ${task.metric}` : task.task,
      (p) => scoreOf(p, task), (p) => format.score(scoreOf(p, task))]),
  ];
  const body = h("tbody");
  const rows = points.map((p) => [p, h("tr", {
    "data-point": p.point, "aria-selected": "false", onclick: () => select(p.point),
  }, columns.map(([, , cell, text]) => h("td", {
    class: text ? "left" : "", title: text ? p.arms.join(", ") || null : null,
  }, cell(p))))]);
  const heads = columns.map(([title, , , text], i) => h("th", {
    scope: "col", class: text ? "left" : "",
  }, h("button", { class: "plain", type: "button", onclick: () => sort(i) }, title)));
  let state = { column: -1, ascending: false };

  function sort(column) {
    const text = Boolean(columns[column][3]);
    const ascending = state.column === column ? !state.ascending : text;
    state = { column, ascending };
    const value = columns[column][1];
    const missing = (v) => v === null || v === undefined;
    rows.sort(([a], [b]) => {
      const [x, y] = [value(a), value(b)];
      if (missing(x) || missing(y)) return missing(x) - missing(y);
      const sign = x < y ? -1 : x > y ? 1 : 0;
      return (ascending ? sign : -sign) || b.parameters - a.parameters;
    });
    body.replaceChildren(...rows.map(([, row]) => row));
    heads.forEach((head, i) => {
      head.classList.toggle("sorted", i === column);
      if (i === column) head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
      else head.removeAttribute("aria-sort");
    });
  }

  host.append(h("table", {}, h("thead", {}, h("tr", {}, heads)), body));
  sort(3);
  return {
    mark(id) {
      for (const [p, row] of rows) row.setAttribute("aria-selected", String(p.point === id));
    },
  };
}

function costTable(host) {
  const row = (part, name, attributes) => h("tr", attributes,
    h("th", { class: "wrap left", scope: "row" }, name),
    h("td", {}, format.count(part.evaluations)), h("td", {}, format.size(part.num_documents)),
    h("td", {}, format.size(part.num_tokens)), h("td", {}, format.hours(part.hours)),
    h("td", {}, format.percent(part.forward_share === null ? null : 100 * part.forward_share, 0)));
  const titles = ["On", "Evaluations", "Documents", "Tokens", "Time", "Forward"];
  host.append(h("table", {},
    h("thead", {}, h("tr", {}, titles.map((title) => h("th", { scope: "col" }, title)))),
    h("tbody", {}, data.cost_by_documents.map((part) => row(part, part.documents, {})),
      row(data.cost, "all", { class: "total" }))));
}

function problemList(host) {
  if (!data.problems.length) {
    host.append(h("p", { class: "hint" },
      data.cost.evaluations ? "None: every evaluation gave a score." : "None."));
    return;
  }
  host.append(
    h("p", { class: "hint" }, `${data.num_failed} failed (a crash), ${data.num_infeasible} infeasible `
      + "(can't be built or doesn't fit). None of them counts as a score."),
    ...data.problems.map((problem) => h("details", { class: "problem" },
      h("summary", {}, `${problem.count} × ${problem.status}: ${problem.reason}`),
      h("p", { class: "hint" }, `First seen in evaluation ${problem.number}.`),
      h("pre", {}, problem.text || problem.reason))));
}
