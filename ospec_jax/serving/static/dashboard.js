// SPDX-License-Identifier: Apache-2.0
// What the server does, second by second, and a chat that shows who wrote what.

const MOST_SAMPLES = 900;
const ROWS_OF_TABLE = 15;
const RETRY_MS = 2000;
const PROPOSERS = {
  draft: "the draft",
  ngrams: "n-grams of the chat",
  memory: "n-grams of earlier requests",
  prediction: "a prediction",
};
const LETTERS = { promotion: "P", rollback: "R", load: "L" };

const byId = (id) => document.getElementById(id);
const settings = { key: "", model: "", showsDrafted: true };

function headers() {
  const found = { "Content-Type": "application/json" };
  if (settings.key) found.Authorization = `Bearer ${settings.key}`;
  return found;
}

function say(id, text, isError = false) {
  const place = byId(id);
  if (place.textContent !== text) place.textContent = text;
  place.classList.toggle("error", isError);
}

function element(name, text = "", className = "") {
  const made = document.createElement(name);
  made.textContent = text;
  if (className) made.className = className;
  return made;
}

// Events of a stream: what `EventSource` does, which cannot send a key.
async function* readEvents(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (!part.startsWith("data: ")) continue;
      const data = part.slice("data: ".length);
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function errorOf(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered ${response.status}`;
  }
}

// Numbers as people read them.

const number = (value, digits = 1) =>
  value === null || value === undefined ? "–" : value.toFixed(digits);

function seconds(value) {
  if (value === null || value === undefined) return "–";
  return value < 1 ? `${number(1000 * value, value < 0.01 ? 1 : 0)} ms` : `${number(value, 2)} s`;
}

const pair = (found) => `${seconds(found?.p50)} / ${seconds(found?.p99)}`;
const clock = (time) => new Date(1000 * time).toLocaleTimeString();

// The charts.

const history = { columns: {}, marks: [] };

const CHARTS = [
  { title: "Tokens per second", fields: ["tokens_per_second"], names: ["tokens/s"] },
  { title: "Tokens per step (acceptance)", fields: ["tokens_per_pass"], names: ["tokens/step"] },
  {
    title: "Between two tokens, seconds",
    fields: ["between_tokens_p50", "between_tokens_p99"],
    names: ["p50", "p99"],
  },
  { title: "Learning’s share of time", fields: ["learning_share"], names: ["share"] },
  {
    title: "Answers running and waiting",
    fields: ["num_running", "num_waiting"],
    names: ["running", "waiting"],
  },
];

const color = (name) =>
  getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

function drawMarks(plot) {
  const { ctx, bbox } = plot;
  const ratio = window.devicePixelRatio || 1;
  ctx.save();
  ctx.strokeStyle = color("quiet");
  ctx.fillStyle = color("text");
  ctx.font = `${12 * ratio}px system-ui, sans-serif`;
  ctx.setLineDash([4 * ratio, 4 * ratio]);
  for (const mark of history.marks) {
    const x = plot.valToPos(mark.time, "x", true);
    if (x < bbox.left || x > bbox.left + bbox.width) continue;
    ctx.beginPath();
    ctx.moveTo(x, bbox.top);
    ctx.lineTo(x, bbox.top + bbox.height);
    ctx.stroke();
    ctx.fillText(LETTERS[mark.kind] ?? "?", x + 2 * ratio, bbox.top + 12 * ratio);
  }
  ctx.restore();
}

function makeChart(chart) {
  const axis = {
    stroke: color("quiet"),
    grid: { stroke: color("grid"), width: 1 },
    ticks: { stroke: color("line"), width: 1 },
  };
  const strokes = [color("accent"), color("second")];
  const series = chart.names.map((label, i) => ({
    label,
    stroke: strokes[i],
    width: 2,
    // The second line is dashed: nobody has to tell the colours apart.
    dash: i ? [6, 4] : undefined,
    spanGaps: true,
  }));
  const options = {
    width: chart.place.clientWidth || 400,
    height: 180,
    series: [{}, ...series],
    axes: [axis, { ...axis, size: 60 }],
    scales: { y: { range: (_, low, high) => [Math.min(low ?? 0, 0), (high || 1) * 1.1] } },
    hooks: { draw: [drawMarks] },
  };
  chart.plot?.destroy();
  chart.plot = new window.uPlot(options, dataOf(chart), chart.place);
}

const dataOf = (chart) =>
  ["time", ...chart.fields].map((field) => history.columns[field] ?? []);

function makeCharts() {
  for (const chart of CHARTS) {
    if (!chart.place) {
      const figure = element("figure");
      figure.append(element("figcaption", chart.title));
      chart.place = element("div");
      chart.place.setAttribute("role", "img");
      chart.place.setAttribute("aria-label", `${chart.title}; its values are in the table below`);
      figure.append(chart.place);
      byId("charts").append(figure);
    }
    makeChart(chart);
  }
}

function takeHistory(found) {
  for (const [i, field] of found.fields.entries()) {
    const column = (history.columns[field] ??= []);
    column.push(...found.samples.map((sample) => sample[i]));
    column.splice(0, Math.max(column.length - MOST_SAMPLES, 0));
  }
  history.marks.push(...found.marks);
  for (const chart of CHARTS) chart.plot?.setData(dataOf(chart));
  if (found.marks.length) fillMarks();
  if (byId("values").closest("details").open) fillValues(found.fields);
}

function fillMarks() {
  const rows = history.marks.map((mark) => {
    const row = element("tr");
    const cells = [clock(mark.time), mark.kind, String(mark.version)];
    row.append(...cells.map((text) => element("td", text)));
    return row;
  });
  byId("marks").tBodies[0].replaceChildren(...rows.reverse());
}

function fillValues(fields) {
  const head = element("tr");
  for (const field of fields) {
    const cell = element("th", field.replaceAll("_", " "));
    cell.scope = "col";
    head.append(cell);
  }
  const count = history.columns.time.length;
  const rows = [head];
  for (let i = count - 1; i >= Math.max(count - ROWS_OF_TABLE, 0); i -= 1) {
    const row = element("tr");
    for (const field of fields) {
      const value = history.columns[field][i];
      const isWhole = Number.isInteger(value);
      const text = field === "time" ? clock(value) : number(value, isWhole ? 0 : 3);
      row.append(element("td", text));
    }
    rows.push(row);
  }
  byId("values").replaceChildren(...rows);
}

// What is going on now.

const last = (field) => history.columns[field]?.at(-1);

// Between two requests nothing is accepted: the newest sample in which something was.
function lastKnown(field) {
  return (history.columns[field] ?? []).findLast((value) => value !== null);
}

function showNow(status, latency) {
  settings.model = status.model;
  say("model", status.model);
  say("tokens-per-second", number(last("tokens_per_second")));
  say("tokens-per-pass", number(lastKnown("tokens_per_pass"), 2));
  say("version", String(status.draft?.version ?? "none"));
  say("learning-share", `${number(100 * (last("learning_share") ?? 0), 0)} %`);
  say("queue", `${status.queue?.num_running ?? "–"} / ${status.queue?.num_waiting ?? "–"}`);
  say("first-token", pair(latency.first_token));
  say("between-tokens", pair(latency.between_tokens));
  say("queued", pair(latency.queue));
  say("learning", learningInWords(status.learning, status.draft?.waiting));
  byId("status").textContent = JSON.stringify(status, null, 2);
}

function learningInWords(learning, waiting) {
  if (!learning?.learner) return "Nothing is learned: the server was started without a learner.";
  const written = learning.practice?.num_exercises;
  const count = `${learning.num_updates ?? 0} updates` +
    (written ? `, ${written} exercises in pauses` : "") +
    (waiting?.num_updates ? `, ${waiting.num_updates} of them wait to be promoted` : "") +
    (learning.own_drafts?.num ? `, ${learning.own_drafts.num} keys and tenants with a draft of their own` : "");
  if (learning.paused_for) return `Learning is off (${learning.paused_for}); ${count} until now.`;
  return `Learning with “${learning.learner}”; ${count} until now.`;
}

async function follow() {
  for (;;) {
    try {
      const response = await fetch("/status/stream", { headers: headers() });
      byId("key-form").hidden = response.status !== 401;
      if (!response.ok) throw new Error(await errorOf(response));
      history.columns = {};
      history.marks = [];
      for await (const event of readEvents(response)) {
        takeHistory(event.history);
        showNow(event.status, event.history.latency);
        say("state", event.status.is_ready === false ? "compiling" : "connected");
      }
      say("state", "the server has ended; trying again", true);
    } catch (error) {
      say("state", `${error.message}; trying again`, true);
      if (!byId("key-form").hidden) {
        await new Promise((resolve) => {
          byId("key-form").addEventListener("submit", resolve, { once: true });
        });
      }
    }
    await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
  }
}

// The chat.

const chat = { messages: [], abort: null };

function addTurn(role) {
  const turn = element("div", "", "turn");
  turn.append(element("b", role));
  byId("turns").append(turn);
  return turn;
}

// Shows an answer's tokens as its text confirms them: a token may bring a part of a
// character alone, and what may begin a stop string is not yet told.
class Answer {
  constructor(place) {
    this.place = place;
    this.text = "";
    this.shown = 0;
    this.waiting = [];
    this.decoder = new TextDecoder();
    this.step = -1;
    this.numDrafted = {};
    this.numTokens = 0;
  }

  add(text, tokens) {
    this.text += text;
    for (const token of tokens) {
      const bytes = new Uint8Array(token.bytes);
      const own = this.decoder.decode(bytes, { stream: true });
      this.waiting.push({ ...token, own });
      this.numTokens += 1;
      if (token.drafted) {
        this.numDrafted[token.source] = (this.numDrafted[token.source] ?? 0) + 1;
      }
    }
    this.settle(false);
  }

  finish() {
    this.settle(true);
    this.show(this.text.slice(this.shown), null);
  }

  settle(isOver) {
    while (this.waiting.length) {
      const token = this.waiting[0];
      const rest = this.text.slice(this.shown);
      const own = this.shown === 0 && rest[0] !== " " ? token.own.trimStart() : token.own;
      if (rest.startsWith(own)) this.show(own, token);
      else if (own.startsWith(rest) && !isOver) return;
      else if (own.startsWith(rest)) this.show(rest, token);
      this.waiting.shift();
    }
  }

  show(text, token) {
    if (!text) return;
    const span = element("span", text, token?.drafted ? `drafted ${token.source}` : "target");
    if (token && token.step !== this.step) {
      span.classList.add("first");
      this.step = token.step;
    }
    if (token) span.title = titleOf(token);
    this.place.append(span);
    this.shown += text.length;
  }
}

function titleOf(token) {
  const step = `step ${token.step + 1}`;
  if (!token.drafted) return `${step}, by the target`;
  const member = token.drafter === undefined ? "" : ` (drafter ${token.drafter})`;
  return `${step}, proposed by ${PROPOSERS[token.source]}${member}`;
}

function bodyOf(messages) {
  const speculative = { enabled: byId("drafting").checked };
  if (settings.showsDrafted) speculative.show = true;
  return {
    model: settings.model,
    messages,
    stream: true,
    stream_options: { include_usage: true },
    temperature: Number(byId("temperature").value),
    max_completion_tokens: Number(byId("max-tokens").value),
    learn: byId("learn").checked,
    speculative,
  };
}

async function askServer(messages, signal) {
  const send = () =>
    fetch("/v1/chat/completions", {
      method: "POST",
      headers: headers(),
      body: JSON.stringify(bodyOf(messages)),
      signal,
    });
  let response = await send();
  // Some servers do not tell who proposed a token.
  if (response.status === 400 && settings.showsDrafted) {
    const error = (await response.json()).error;
    if (error.param !== "speculative.show") throw new Error(error.message);
    settings.showsDrafted = false;
    response = await send();
  }
  if (!response.ok) throw new Error(await errorOf(response));
  return response;
}

function acceptedInWords(counts) {
  const found = Object.keys(PROPOSERS).filter((source) => counts[source]);
  const total = found.reduce((sum, source) => sum + counts[source], 0);
  const each = found.map((source) => `${counts[source]} by ${PROPOSERS[source]}`);
  return `${total} proposed tokens accepted${total ? ` (${each.join(", ")})` : ""}`;
}

function noteOf(answer, end) {
  const found = end?.metrics;
  const parts = [];
  if (end?.usage) parts.push(`${end.usage.completion_tokens} tokens`);
  if (answer.numTokens) {
    parts.push(`${answer.step + 1} steps`, acceptedInWords(answer.numDrafted));
  }
  if (found?.tokens_per_second) parts.push(`${number(found.tokens_per_second)} tokens/s`);
  if (end?.system_fingerprint) parts.push(`draft ${end.system_fingerprint.split("-").at(-1)}`);
  return parts.join(", ");
}

async function converse(text) {
  const messages = [...chat.messages, { role: "user", content: text }];
  const asked = addTurn("You");
  asked.append(text);
  const turn = addTurn(settings.model);
  const answer = new Answer(turn);
  const turns = byId("turns");
  let end = null;
  try {
    for await (const chunk of readEvents(await askServer(messages, chat.abort.signal))) {
      if (chunk.error) throw new Error(chunk.error.message);
      if (chunk.usage) end = chunk;
      for (const choice of chunk.choices) {
        answer.add(choice.delta.content ?? "", choice.speculative?.tokens ?? []);
      }
      turns.scrollTop = turns.scrollHeight;
    }
  } finally {
    answer.finish();
    if (answer.text) {
      // Of an answer that was stopped, the next one goes on from what there is.
      turn.append(element("div", noteOf(answer, end), "note"));
      chat.messages = [...messages, { role: "assistant", content: answer.text }];
    } else {
      asked.remove();
      turn.remove();
      byId("message").value = text;
    }
    turns.scrollTop = turns.scrollHeight;
  }
}

async function onSend(event) {
  event.preventDefault();
  const text = byId("message").value.trim();
  if (!text || chat.abort) return;
  byId("message").value = "";
  chat.abort = new AbortController();
  byId("send").disabled = true;
  byId("stop").disabled = false;
  say("chat-state", "answering");
  try {
    await converse(text);
    say("chat-state", "answered");
  } catch (error) {
    const isStopped = error.name === "AbortError";
    say("chat-state", isStopped ? "stopped" : error.message, !isStopped);
  } finally {
    chat.abort = null;
    byId("send").disabled = false;
    byId("stop").disabled = true;
    byId("message").focus();
  }
}

byId("chat-form").addEventListener("submit", onSend);
byId("stop").addEventListener("click", () => chat.abort?.abort());
byId("clear").addEventListener("click", () => {
  chat.abort?.abort();
  chat.messages = [];
  byId("turns").replaceChildren();
  say("chat-state", "");
});
byId("steps").addEventListener("change", (event) => {
  byId("turns").classList.toggle("steps", event.target.checked);
});
byId("message").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("chat-form").requestSubmit();
});
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  settings.key = byId("key").value;
  byId("key").value = "";
});

makeCharts();
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", makeCharts);
new ResizeObserver(() => {
  for (const chart of CHARTS) {
    const width = chart.place.clientWidth;
    if (width && width !== chart.plot.width) chart.plot.setSize({ width, height: 180 });
  }
}).observe(byId("charts"));
follow();
