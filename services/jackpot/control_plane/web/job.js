// A job's page.
import { download, follow, get, jobPath, post, text } from "./api.js";
import { CHARTS, Chart } from "./charts.js";
import { figure, make, state } from "./dom.js";

export async function showJob(main, id, signal, fail) {
  const path = jobPath(id);
  const head = make("div");
  const alarms = make("div", { role: "status", "aria-live": "polite" });
  const charts = CHARTS.map(([title, axis, curves]) => ({ curves, chart: new Chart(title, axis, Object.keys(curves)) }));
  const ledger = make("div", { class: "scroll" });
  const samples = make("div");
  const checkpoints = make("div", { class: "row" });
  const history = make("ul");
  const spec = make("pre", { tabindex: "0" });
  const log = make("pre", { tabindex: "0", "aria-label": "log" });
  const services = make("select", { id: "service", onchange: () => showLog() });
  main.replaceChildren(
    head, alarms,
    make("section", { class: "charts", "aria-label": "Curves" }, ...charts.map(({ chart }) => chart.element)),
    make("h2", {}, "Ledger"), ledger,
    make("h2", {}, "Checkpoints"), checkpoints,
    make("h2", {}, "Sample trajectories"),
    make("p", { class: "soft" }, "Tokens the actor wrote, from blue (the policy would, too) to red (it would hardly); rejected ones are struck through."),
    samples,
    make("h2", {}, "Logs"), make("div", { class: "row" }, make("div", {}, make("label", { for: "service" }, "Process"), services)), log,
    make("details", {}, make("summary", {}, "History"), history),
    make("details", {}, make("summary", {}, "The job file, with every default"), spec),
  );
  signal.addEventListener("abort", () => charts.forEach(({ chart }) => chart.close()));

  const act = (what) => async () => {
    try {
      await post(`${path}:${what}`);
      await refresh();
      listen();
    } catch (error) { fail(error); }
  };

  const scale = (replicas) => async () => {
    try {
      await post(`${path}:scale`, JSON.stringify({ rollout_replicas: replicas }), "application/json");
      await refresh();
    } catch (error) { fail(error); }
  };

  function scaling(job) {
    const replicas = job.rollout_replicas;
    const text = `${replicas} rollout replica${replicas === 1 ? "" : "s"}`;
    if (job.state !== "running" || job.spec.weights.transport !== "store") return make("span", { class: "soft" }, text);
    const fewer = make("button", { onclick: scale(replicas - 1), "aria-label": "one rollout replica fewer" }, "−");
    fewer.disabled = replicas <= 1;
    return make("span", { class: "soft", id: "replicas" },
      fewer, ` ${text} `, make("button", { onclick: scale(replicas + 1), "aria-label": "one rollout replica more" }, "+"));
  }

  function showHead(job) {
    const finished = ["succeeded", "failed", "cancelled"].includes(job.state);
    const buttons = [];
    if (!finished && job.state !== "stopping") buttons.push(make("button", { class: "danger", onclick: act("cancel") }, "Cancel"));
    if (["failed", "cancelled"].includes(job.state)) buttons.push(make("button", { class: "primary", onclick: act("resume") }, "Resume"));
    // Redrawn under a focused button, the keyboard would lose its place.
    const focused = head.contains(document.activeElement) && document.activeElement.textContent;
    const done = job.progress.step;
    head.replaceChildren(
      make("h1", {}, job.id),
      make("p", { id: "state" }, state(job), ` · ${job.reason}`),
      job.error ? make("p", { class: "error" }, job.error) : "",
      make("div", { class: "row" },
        make("progress", { max: String(job.steps), value: String(done), "aria-label": "optimizer steps" }),
        make("span", { id: "steps" }, `step ${done} of ${job.steps}`),
        make("span", { class: "soft" }, `policy accuracy ${figure(job.progress.policy_accuracy)}${job.progress.accuracy_stderr === null ? "" : ` ± ${figure(job.progress.accuracy_stderr)}`}`),
        scaling(job),
        ...buttons),
    );
    if (focused) ([...head.querySelectorAll("button")].find((one) => one.textContent === focused) ?? head.querySelector("button"))?.focus();
    history.replaceChildren(...job.transitions.map((one) => make("li", {}, `${new Date(one.time).toLocaleString()}: ${one.state}, ${one.reason}`)));
    spec.textContent = JSON.stringify(job.spec, null, 2);
    return finished;
  }

  async function showLog() {
    if (!services.value) return;
    const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
    log.textContent = await text(`${path}/logs?tail=200&service=${encodeURIComponent(services.value)}`, { signal });
    if (atEnd) log.scrollTop = log.scrollHeight;
  }

  function showLedger(counts) {
    const rows = [["trained", counts.trained], ...Object.entries(counts.dropped).map(([why, n]) => [`dropped: ${why}`, n]),
      ["open", counts.open], ["dispatched", counts.dispatched]];
    ledger.replaceChildren(make("table", {}, make("caption", { class: "soft" }, "Every group ends in exactly one row"),
      ...rows.map(([name, count]) => make("tr", {}, make("th", { scope: "row" }, name), make("td", { class: "number" }, figure(count))))));
  }

  function showSamples(found) {
    samples.replaceChildren(...found.map((one) => make("div", { class: "sample" },
      make("div", { class: "meta" }, `step ${one.step} · reward ${figure(one.reward)} · prompt: ${one.prompt}`),
      ...one.tokens.map((token) => make("span", {
        class: `token a${Math.min(4, Math.floor(token.acceptance * 5))}${token.accepted ? "" : " rejected"}`,
        title: `acceptance ${token.acceptance}, ${token.accepted ? "accepted" : "rejected"}; log p policy ${token.target_logprob}, actor ${token.actor_logprob}`,
      }, token.text)))));
    if (!found.length) samples.replaceChildren(make("p", { class: "soft" }, "none yet"));
  }

  let finished = false;
  async function refresh() {
    const [job, { series }, counts, kept, taken, known] = await Promise.all([
      get(path, { signal }), get(`${path}/metrics?points=400`, { signal }), get(`${path}/ledger`, { signal }),
      get(`${path}/checkpoints`, { signal }), get(`${path}/samples?limit=4`, { signal }), get(`${path}/services`, { signal }),
    ]);
    finished = showHead(job);
    for (const { curves, chart } of charts) {
      chart.show(Object.fromEntries(Object.entries(curves).filter(([, name]) => series[name]).map(([label, name]) => [label, series[name]])));
    }
    showLedger(counts);
    showSamples(taken.samples);
    checkpoints.replaceChildren(...kept.checkpoints.flatMap((one) => Object.keys(one.roles).map((role) =>
      make("button", { onclick: () => download(`${path}/checkpoints/${one.name}?role=${role}`, `${id}-${one.name}-${role}.tar`).catch(fail) },
        `${one.name === "export" ? "final model" : `step ${one.step}`}, ${role}`))));
    if (!kept.checkpoints.length) checkpoints.replaceChildren(make("p", { class: "soft" }, "none yet"));
    const chosen = services.value || (known.services.includes("learner") ? "learner" : known.services[0]);
    if ([...services.options].map((one) => one.value).join() !== known.services.join()) {
      services.replaceChildren(...known.services.map((name) => make("option", { value: name }, name)));
      if (chosen) services.value = chosen;
    }
    await showLog();
  }

  // Events say when there is news; the curves come thinned out from the server, at most once a second.
  let due = true;
  let listening = false;
  async function listen() {
    if (listening) return;
    listening = true;
    alarms.replaceChildren();
    await follow(`${path}/events`, (name, data) => {
      due = true;
      if (name === "alarm") alarms.append(make("p", { class: "alarm" }, `step ${data.step}: ${data.message}`));
    }, signal);
    listening = false;
    due = true;
  }
  listen();
  let idle = 0;
  while (!signal.aborted) {
    if (due || (!finished && ++idle >= 3)) {
      due = false;
      idle = 0;
      await refresh().catch((error) => { if (error.name !== "AbortError") fail(error); });
    }
    await new Promise((resolve) => setTimeout(resolve, 1000));
  }
}
