// The list of jobs, and several of them on one chart.
import { get, jobPath } from "./api.js";
import { CHARTS, Chart } from "./charts.js";
import { figure, make, spark, state } from "./dom.js";

const STATES = ["queued", "starting", "running", "stopping", "succeeded", "failed", "cancelled"];

export async function showList(main, signal, fail) {
  const chosen = new Set();
  const rows = new Map();
  const body = make("tbody");
  const compare = make("a", { href: "#/", hidden: true }, "Compare");
  const states = make("select", { id: "filter-state", onchange: () => start() },
    make("option", { value: "" }, "any"), ...STATES.map((name) => make("option", { value: name }, name)));
  const label = make("input", { id: "filter-label", placeholder: "key=value", onchange: () => start() });
  const more = make("button", { hidden: true, onclick: () => { limit += 50; load().catch(fail); } }, "More");
  const headings = ["", "Job", "State", "Steps", "Accuracy", "Reward", "Labels", "Submitted"];
  main.replaceChildren(
    make("h1", {}, "Jobs"),
    make("div", { class: "row" },
      make("div", {}, make("label", { for: "filter-state" }, "State"), states),
      make("div", {}, make("label", { for: "filter-label" }, "Label"), label), compare),
    make("div", { class: "scroll" }, make("table", {},
      make("thead", {}, make("tr", {}, ...headings.map((name, index) => make("th", { scope: "col", class: index > 5 ? "wide" : "" }, name)))), body)),
    more);
  let limit = 50;

  function row(job) {
    const box = make("input", { type: "checkbox", "aria-label": `compare ${job.id}`, onchange: () => {
      if (box.checked) chosen.add(job.id); else chosen.delete(job.id);
      compare.hidden = chosen.size < 2;
      compare.href = `#/compare/${[...chosen].join(",")}`;
      compare.textContent = `Compare ${chosen.size} jobs`;
    } });
    const cells = { state: make("td"), steps: make("td", { class: "number" }), accuracy: make("td", { class: "number" }), reward: make("td") };
    const labels = Object.entries(job.labels).map(([key, value]) => `${key}=${value}`).join(" ");
    const element = make("tr", {},
      make("td", {}, box), make("td", {}, make("a", { href: `#/jobs/${job.id}` }, job.id)),
      cells.state, cells.steps, cells.accuracy, cells.reward,
      make("td", { class: "wide" }, labels), make("td", { class: "wide soft" }, new Date(job.created).toLocaleString()));
    return { element, cells, step: -1 };
  }

  async function load() {
    const found = [];
    let cursor = null;
    do {
      const query = new URLSearchParams({ limit: String(Math.min(200, limit - found.length)) });
      if (states.value) query.set("state", states.value);
      if (label.value) query.set("label", label.value);
      if (cursor) query.set("cursor", cursor);
      const page = await get(`/v1/jobs?${query}`, { signal });
      found.push(...page.jobs);
      cursor = page.next_cursor;
    } while (cursor && found.length < limit);
    more.hidden = !cursor;
    for (const job of found) {
      if (!rows.has(job.id)) rows.set(job.id, row(job));
      const { cells } = rows.get(job.id);
      cells.state.replaceChildren(state(job));
      cells.steps.textContent = `${job.progress.step}/${job.steps}`;
      cells.accuracy.textContent = figure(job.progress.policy_accuracy);
    }
    const wanted = found.map((job) => rows.get(job.id).element);
    if (wanted.length !== body.children.length || wanted.some((one, index) => body.children[index] !== one)) {
      body.replaceChildren(...wanted);
    }
    if (!found.length) body.replaceChildren(make("tr", {}, make("td", { colspan: "8", class: "soft" }, "No jobs. Submit one.")));
    for (const job of found.slice(0, 50)) {
      const line = rows.get(job.id);
      if (!job.progress.step || line.step === job.progress.step) continue;
      line.step = job.progress.step;
      const { series } = await get(`${jobPath(job.id)}/metrics?name=reward/mean&points=40`, { signal });
      if (series["reward/mean"]) line.cells.reward.replaceChildren(spark(series["reward/mean"].y));
    }
  }

  const start = () => load().catch(fail);
  while (!signal.aborted) {
    await load().catch((error) => { if (error.name !== "AbortError") fail(error); });
    await new Promise((resolve) => setTimeout(resolve, 2000));
  }
}

export async function showComparison(main, ids, signal, fail) {
  const curves = CHARTS.flatMap(([title, , names]) => Object.entries(names).map(([label, name]) => [`${title}: ${label}`, name]));
  const picker = make("select", { id: "curve", onchange: () => draw() }, ...curves.map(([title, name]) => make("option", { value: name }, title)));
  const place = make("div");
  main.replaceChildren(make("h1", {}, `Comparison of ${ids.length} jobs`),
    make("div", { class: "row" }, make("div", {}, make("label", { for: "curve" }, "Curve"), picker)), place,
    make("ul", {}, ...ids.map((id) => make("li", {}, make("a", { href: `#/jobs/${id}` }, id)))));
  let chart = null;

  async function draw() {
    const found = await Promise.all(ids.map(async (id) => {
      const { series } = await get(`${jobPath(id)}/metrics?points=400&name=${encodeURIComponent(picker.value)}`, { signal });
      return [id, series[picker.value] || { x: [], y: [] }];
    }));
    if (chart?.curve !== picker.value) {
      chart?.close();
      chart = new Chart(picker.selectedOptions[0].textContent, "", ids);
      chart.curve = picker.value;
      place.replaceChildren(chart.element);
    }
    chart.show(Object.fromEntries(found));
  }

  signal.addEventListener("abort", () => chart?.close());
  while (!signal.aborted) {
    await draw().catch((error) => { if (error.name !== "AbortError") fail(error); });
    await new Promise((resolve) => setTimeout(resolve, 3000));
  }
}
