// Elements, made without ever writing HTML from data.

export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (typeof value === "boolean") element.toggleAttribute(name, value);
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

export const figure = (value, digits = 3) =>
  value === null || value === undefined ? "–" : Number.isInteger(value) ? String(value) : value.toFixed(digits);

export const state = (job) => make("span", { class: `state ${job.state}` }, job.state);

export function spark(values) {
  const points = values.filter((value) => value !== null);
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("class", "spark");
  svg.setAttribute("viewBox", "0 0 100 20");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  if (points.length < 2) return svg;
  const low = Math.min(...points);
  const span = Math.max(...points) - low || 1;
  svg.setAttribute("aria-label", `reward from ${figure(points[0])} to ${figure(points.at(-1))}`);
  const line = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
  const place = (value, index) => `${(index / (points.length - 1)) * 100},${19 - ((value - low) / span) * 18}`;
  line.setAttribute("points", points.map(place).join(" "));
  svg.append(line);
  return svg;
}
