// Routes and the form to submit.
import { get, post, useToken } from "./api.js";
import { make } from "./dom.js";
import { showJob } from "./job.js";
import { showComparison, showList } from "./list.js";

const main = document.getElementById("main");
const notice = document.getElementById("notice");
let leave = new AbortController();

function fail(error) {
  if (error.name === "AbortError") return;
  notice.textContent = error.message;
  notice.hidden = false;
}

async function showForm() {
  const document_ = await get("/openapi.json");
  const example = document_.paths["/v1/jobs"].post.requestBody.content["application/json"].examples.demo.value;
  const job = make("textarea", { id: "job", spellcheck: "false" });
  job.value = JSON.stringify(example, null, 2);
  const labels = make("input", { id: "labels", placeholder: "team=a run=3" });
  const priority = make("input", { id: "priority", type: "number", value: "0", min: "-1000", max: "1000" });
  const outcome = make("p", { role: "status" });
  // One key per form: pressing twice makes one job.
  const key = crypto.randomUUID ? crypto.randomUUID() : String(Math.random()).slice(2);
  const send = (dry) => async (event) => {
    event.preventDefault();
    notice.hidden = true;
    const query = new URLSearchParams({ priority: priority.value || "0", dry_run: String(dry) });
    labels.value.split(/\s+/).filter(Boolean).forEach((label) => query.append("label", label));
    const type = job.value.trimStart().startsWith("{") ? "application/json" : "application/yaml";
    try {
      const answer = await post(`/v1/jobs?${query}`, job.value, type, dry ? {} : { "Idempotency-Key": key });
      if (dry) outcome.textContent = ["This is a valid job.", ...answer.notes].join(" ");
      else location.hash = `#/jobs/${answer.id}`;
    } catch (error) { outcome.textContent = ""; fail(error); }
  };
  main.replaceChildren(make("h1", {}, "Submit a job"), make("form", { onsubmit: send(false) },
    make("label", { for: "job" }, "Job file, YAML or JSON"), job,
    make("div", { class: "row" },
      make("div", {}, make("label", { for: "labels" }, "Labels"), labels),
      make("div", {}, make("label", { for: "priority" }, "Priority"), priority),
      make("button", { type: "button", onclick: send(true) }, "Check"),
      make("button", { class: "primary" }, "Submit")), outcome));
}

function route() {
  leave.abort();
  leave = new AbortController();
  notice.hidden = true;
  const [, where = "", rest = ""] = location.hash.split("/");
  document.title = rest ? `${rest} · Jackpot` : "Jackpot";
  if (where === "jobs" && rest) return showJob(main, decodeURIComponent(rest), leave.signal, fail);
  if (where === "compare" && rest) return showComparison(main, rest.split(","), leave.signal, fail);
  if (where === "submit") return showForm().catch(fail);
  return showList(main, leave.signal, fail);
}

document.getElementById("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useToken(document.getElementById("token").value);
  document.getElementById("token").value = "";
  event.target.hidden = true;
  route();
});
addEventListener("hashchange", () => { route(); main.focus(); });
route();
