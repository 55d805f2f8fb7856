// Curves, drawn by uPlot. Colours are told apart without colour vision, too (Okabe and Ito), and lines by their dashes.
import { figure, make } from "./dom.js";

const COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"];
const DASHES = [[], [8, 4], [2, 3], [10, 3, 2, 3], [5, 5], [1, 2]];

export const CHARTS = [
  ["Reward and accuracy", "optimizer step", { "policy accuracy": "evaluation/policy_accuracy", reward: "reward/mean" }],
  ["Acceptance", "optimizer step", {
    "acceptance rate": "rollout_corr/obrs_acceptance_rate", accepted: "rollout_corr/obrs_accepted_fraction" }],
  ["Divergence, nats per token", "optimizer step", {
    "KL(policy ‖ actor)": "kl/policy_actor",
    "before OBRS": "rollout_corr/kl_before",
    "after OBRS": "rollout_corr/kl_after",
    "at sampled tokens": "rollout_corr/kl" }],
  ["Normalizer Z, and κ or τ", "optimizer step", {
    Z: "rollout_corr/obrs_normalizer", "κ or τ": "rollout_corr/obrs_bias_correction", "top-k mass": "rollout_corr/obrs_topk_mass" }],
  ["Effective sample size", "optimizer step", { "of all tokens": "rollout_corr/rollout_is_eff_sample_size" }],
  ["Staleness, steps", "optimizer step", { mean: "staleness/mean", greatest: "staleness/max", reference: "reference/age" }],
  ["Canary, nats between engine and version", "optimizer step", {
    greatest: "rollout/canary_max_difference", "root mean square": "rollout/canary_rms_difference" }],
  ["Throughput, tokens per second", "seconds", {
    rollout: "throughput/rollout_tokens_per_second",
    scorer: "throughput/scorer_tokens_per_second",
    learner: "throughput/learner_tokens_per_second" }],
  ["Queues, groups", "seconds", {
    "to score": "bus/rollouts_waiting", "to train": "bus/scored_waiting", "to commit": "bus/scored_pending" }],
];

// A flat curve lies in the middle of its chart: uPlot alone would show one of zeros on an axis from 0 to 100.
const range = (_, low, high) => (low === null ? [0, 1] : low === high ? [low - 1, high + 1] : uPlot.rangeNum(low, high, 0.1, true));

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

export class Chart {
  constructor(title, axis, names) {
    this.names = names;
    this.axis = axis;
    this.latest = make("span", { class: "soft" });
    this.body = make("div", { role: "img", "aria-label": `${title}: no data yet` });
    this.title = title;
    this.element = make("figure", {}, make("figcaption", {}, title, this.latest), this.body);
    this.plot = null;
    this.observer = new ResizeObserver(() => this.plot?.setSize(this.size()));
    this.observer.observe(this.element);
  }

  size() {
    return { width: Math.max(200, this.element.clientWidth - 24), height: 190 };
  }

  // curves: { label: { x: […], y: […] } }, in the order of `names`.
  show(curves) {
    const tables = this.names.map((name) => (curves[name] ? [curves[name].x, curves[name].y] : [[], []]));
    const data = uPlot.join(tables.map(([x, y]) => [x, y]));
    const told = this.names
      .map((name) => [name, curves[name]?.y.findLast((value) => value !== null)])
      .filter(([, value]) => value !== undefined)
      .map(([name, value]) => `${name} ${figure(value)}`);
    this.latest.textContent = told.join(", ") || "no data yet";
    this.body.setAttribute("aria-label", `${this.title}: ${this.latest.textContent}`);
    this.element.dataset.points = String(data[0].length);
    if (this.plot) this.plot.setData(data);
    else if (data[0].length) this.plot = new uPlot(this.options(), data, this.body);
  }

  options() {
    const axis = { stroke: css("--soft"), grid: { stroke: css("--grid"), width: 1 }, ticks: { stroke: css("--grid"), width: 1 } };
    return {
      ...this.size(),
      scales: { x: { time: false }, y: { range } },
      axes: [{ ...axis, label: this.axis, labelSize: 18, size: 34 }, { ...axis, size: 52 }],
      series: [
        { label: this.axis },
        ...this.names.map((label, index) => ({
          label, stroke: COLORS[index % COLORS.length], dash: DASHES[index % DASHES.length], width: 2, spanGaps: true,
          points: { show: false }, value: (_, value) => figure(value),
        })),
      ],
    };
  }

  close() {
    this.observer.disconnect();
    this.plot?.destroy();
  }
}
