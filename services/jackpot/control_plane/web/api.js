// The REST API, as far as the page needs it.

const KEY = "jackpot-token";

export class Refusal extends Error {
  constructor(status, problem) {
    const errors = (problem.errors || []).map((one) => `${one.field}: ${one.problem}. ${one.remedy}`);
    super(errors.length ? errors.join("\n") : problem.detail || `The server answered ${status}.`);
    this.status = status;
  }
}

// Kept for this tab only.
export const useToken = (token) => sessionStorage.setItem(KEY, token);

function headers(more = {}) {
  const token = sessionStorage.getItem(KEY);
  return token ? { ...more, Authorization: `Bearer ${token}` } : more;
}

async function request(path, options = {}) {
  let response;
  try {
    response = await fetch(path, { ...options, headers: headers(options.headers) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal(0, { detail: "The server does not answer. The page goes on by itself once it is back." });
  }
  if (!response.ok) {
    const problem = await response.json().catch(() => ({}));
    if (response.status === 401) document.getElementById("token-form").hidden = false;
    throw new Refusal(response.status, problem);
  }
  return response;
}

export const get = async (path, options) => (await request(path, options)).json();
export const text = async (path, options) => (await request(path, options)).text();
export const post = async (path, body, type, more) =>
  (await request(path, { method: "POST", body, headers: { ...(type ? { "Content-Type": type } : {}), ...more } })).json();

export const jobPath = (id) => `/v1/jobs/${encodeURIComponent(id)}`;

export async function download(path, name) {
  const blob = await (await request(path)).blob();
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  URL.revokeObjectURL(link.href);
}

// Server-sent events over fetch, because EventSource cannot send a token. Goes on where it was after a break.
export async function follow(path, onEvent, signal) {
  let last = null;
  while (!signal.aborted) {
    try {
      const response = await request(path, { signal, headers: last ? { "Last-Event-ID": last } : {} });
      const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
      let buffer = "";
      for (;;) {
        const { value, done } = await reader.read();
        if (done) break;
        const parts = (buffer + value).split("\n\n");
        buffer = parts.pop();
        for (const part of parts) {
          const fields = Object.fromEntries(
            part.split("\n").map((line) => [line.slice(0, line.indexOf(":")), line.slice(line.indexOf(":") + 1).trim()]),
          );
          if (!fields.data) continue;
          last = fields.id || last;
          onEvent(fields.event, JSON.parse(fields.data));
          if (fields.event === "end") return;
        }
      }
    } catch (error) {
      if (error.name === "AbortError" || [401, 403, 404].includes(error.status)) return;
    }
    await new Promise((resolve) => setTimeout(resolve, 1000));
  }
}
