// Puts the page together. `#point=ID` in the address chooses a point, so points can be linked to.

function bestDenseNames() {
  const { search, holdout } = data.yardsticks;
  const other = holdout.point && holdout.point !== search.point;
  return search.model
    + (other ? `; on the holdout ${holdout.model} ${format.score(holdout.accuracy)}` : "");
}

function facts(host) {
  const cost = data.cost;
  const lost = data.num_failed + data.num_infeasible;
  const entries = [
    ["Best dense candidate", bestDense ? format.score(bestDense.search.accuracy) : "–",
      bestDense ? bestDenseNames() : "not evaluated"],
    ["On the front", format.count(data.front.length),
      data.front.length ? `${sizeRange(data.front)} layers` : ""],
    ["Evaluations", format.count(cost.evaluations), lost ? `${lost} without a score` : ""],
    ["Documents answered", format.size(cost.num_documents), ""],
    ["Tokens", format.size(cost.num_tokens), ""],
    ["Worker time", format.hours(cost.hours), cost.forward_share === null ? ""
      : `${format.percent(100 * cost.forward_share, 0)} in the forward pass`],
  ];
  host.append(...entries.map(([title, value, more]) => h("div", {}, h("dt", {}, title),
    h("dd", {}, value, h("small", { title: more }, more)))));
}

function sizeRange(list) {
  const layers = list.map((point) => point.layers);
  const [low, high] = [Math.min(...layers), Math.max(...layers)];
  return low === high ? `${low}` : `${low} to ${high}`;
}

function main() {
  document.body.classList.toggle("empty", !points.length);
  facts(byId("facts"));
  if (data.finished) byId("finished").textContent = `· last evaluation ${data.finished}`;
  const parts = [
    frontChart(byId("front-chart"), choose), matrix(byId("matrix"), choose),
    pointTable(byId("table"), choose),
  ];
  frontLegend(byId("front-legend"));
  modelLegend(byId("model-legend"));
  volumeChart(byId("volume-chart"));
  costTable(byId("cost"));
  problemList(byId("problems"));
  if (Object.keys(data.config).length) {
    byId("config").textContent = JSON.stringify(data.config, null, 2);
    byId("config-details").hidden = false;
  }

  function show(id) {
    const point = pointById.get(id);
    if (!point) return;
    for (const part of parts) part.mark(id);
    detail(point);
  }
  function choose(id) {
    show(id);
    try {
      history.replaceState(null, "", `#point=${id}`);
    } catch {
      location.hash = `point=${id}`; // some browsers forbid replaceState on files
    }
  }
  const fromAddress = () => new URLSearchParams(location.hash.slice(1)).get("point");
  const first = [fromAddress(), data.headline.point, data.headline.control, points[0]?.point]
    .find((id) => pointById.has(id));
  if (first) show(first);
  else byId("detail-body").append(h("p", { class: "hint" }, "There is no model to show yet."));
  addEventListener("hashchange", () => show(fromAddress()));
  addEventListener("keydown", (event) => { if (event.key === "Escape") hideTooltip(); });
  addEventListener("scroll", hideTooltip, { passive: true });
  document.documentElement.dataset.ready = "true";
}

try {
  main();
} catch (error) {
  const box = byId("error");
  box.textContent = `This page could not be drawn: ${error.message}. The numbers are in front.json.`;
  box.hidden = false;
  document.documentElement.dataset.error = String(error.message);
}
