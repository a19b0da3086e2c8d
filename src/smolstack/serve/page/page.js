"use strict";

const at = (id) => document.getElementById(id);
let chosen = null; // { url: a data URL, kind: of its part, shown: by the browser itself }
let asked = 0; // plans so far: only the last one is shown
let running = null; // the AbortController of the request at work

at("base").textContent = new URL("v1", location.href).href;
at("key").value = sessionStorage.getItem("key") || "";
at("key").addEventListener("change", () => {
  sessionStorage.setItem("key", at("key").value);
  start();
});

function headers() {
  const key = at("key").value;
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

function problem(text) {
  at("problem").textContent = text;
  at("problem").hidden = !text;
}

/** What to tell a person of a response that is no answer. */
async function reason(response) {
  if (response.status === 401) {
    at("access").open = true;
    return at("key").value
      ? "The server does not know this API key. Check it at the top of the page."
      : "This server asks for an API key. Enter it at the top of the page.";
  }
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answered with ${response.status}.`;
  }
}

/** What to tell a person of an error that was thrown. */
function sentence(error) {
  // Browsers throw a TypeError without a reason where nobody answers.
  return error instanceof TypeError
    ? "The server does not answer. Is it still running?"
    : error.message;
}

async function showModel() {
  const response = await fetch("v1/models", { headers: headers() });
  if (!response.ok) throw new Error(await reason(response));
  at("model").textContent = (await response.json()).data[0].id;
  problem("");
}

/** The model's name, and the plan of an image that was chosen before there was a key. */
async function start() {
  try {
    await showModel();
    if (chosen) await showPlan();
  } catch (error) {
    problem(sentence(error));
  }
}

/** "image", "pdf" or "video"; null for anything else. */
function kindOf(file) {
  if (file.type === "application/pdf" || /\.pdf$/i.test(file.name)) return "pdf";
  if (file.type.startsWith("video/") || /\.(mkv|mov|avi|ts|ogv)$/i.test(file.name)) return "video";
  return file.type.startsWith("image/") || /\.tiff?$/i.test(file.name) ? "image" : null;
}

function show(url, text) {
  at("shown").src = url;
  at("shown").alt = text;
  at("frame").hidden = false;
  at("hint").hidden = true;
}

/** The part of a message, or of a plan, that holds what was chosen. */
function part() {
  if (chosen.kind === "video") return { video_url: { url: chosen.url } };
  const page = at("pages").hidden ? "" : `#page=${at("page").value}`;
  return { image_url: { url: chosen.url + page } };
}

function take(file) {
  if (!file) return;
  const kind = kindOf(file);
  if (!kind) {
    problem(
      `${file.name} is not an image, a PDF file or a video. ` +
        "Choose a PNG, JPEG, WebP, GIF, AVIF, BMP, TIFF, PDF, MP4 or WebM file.",
    );
    return;
  }
  const reader = new FileReader();
  reader.onload = () => {
    const data = reader.result.slice(reader.result.indexOf(",") + 1);
    const type = kind === "pdf" ? "application/pdf" : file.type || "application/octet-stream";
    const url = `data:${type};base64,${data}`;
    // What browsers do not show themselves comes back with the plan.
    const shown = kind === "image" && !/tiff|hei[cf]/.test(type);
    chosen = { url, kind, shown, name: file.name };
    at("pages").hidden = true;
    at("page").value = 1;
    at("frame").hidden = !shown;
    at("hint").hidden = shown;
    if (shown) show(url, `The image ${file.name}`);
    showPlan().catch((error) => problem(sentence(error)));
  };
  reader.onerror = () => problem(`${file.name} cannot be read.`);
  reader.readAsDataURL(file);
}

async function showPlan() {
  problem("");
  at("plan").textContent = "";
  at("tiles").replaceChildren();
  const mine = ++asked;
  const response = await fetch("plan", {
    method: "POST",
    headers: headers(),
    body: JSON.stringify({ ...part(), preview: !chosen.shown, text: at("question").value }),
  });
  if (!response.ok) {
    const why = await reason(response);
    if (mine === asked) problem(why);
    return;
  }
  const plan = await response.json();
  if (mine !== asked) return;
  if (plan.pages > 1) {
    at("pages").hidden = false;
    at("page").max = plan.pages;
    at("count").textContent = `of ${plan.pages}`;
  }
  const page = plan.pages > 1 ? `Page ${at("page").value} of ` : "";
  if (plan.preview) {
    show(plan.preview, plan.frames ? `Frames of the video ${chosen.name}` : page + chosen.name);
  }
  if (plan.frames) {
    at("plan").textContent =
      `${plan.frames} ${plan.frames === 1 ? "frame" : "frames"} of ${plan.duration.toFixed(1)} s, ` +
      `one tile each, ${plan.visual_tokens} visual tokens`;
    return;
  }
  const [width, height] = plan.source;
  const boxes = plan.boxes.length ? plan.boxes : [[0, 0, width, height]];
  at("tiles").setAttribute("viewBox", `0 0 ${width} ${height}`);
  for (const [left, top, right, bottom] of boxes) {
    const box = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    const sizes = { x: left, y: top, width: right - left, height: bottom - top };
    for (const [name, value] of Object.entries(sizes)) box.setAttribute(name, value);
    at("tiles").append(box);
  }
  const grid = plan.rows ? `${plan.rows} × ${plan.cols} tiles and the whole` : "one tile";
  at("plan").textContent =
    `${width} × ${height} pixels: ${grid}, ${plan.visual_tokens} visual tokens`;
}

/** The events of a stream of server-sent events, as objects. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function ask() {
  problem("");
  at("answer").textContent = "";
  at("numbers").hidden = true;
  running = new AbortController();
  at("send").disabled = true;
  at("stop").hidden = false;
  const began = performance.now();
  let first = null;
  let reasonToEnd = null;
  const content = [{ type: "text", text: at("question").value }];
  if (chosen) {
    const shown = part();
    content.unshift({ type: Object.keys(shown)[0], ...shown });
  }
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST",
      headers: headers(),
      signal: running.signal,
      body: JSON.stringify({
        messages: [{ role: "user", content }],
        max_tokens: Number(at("tokens").value) || 256,
        stream: true,
        stream_options: { include_usage: true },
      }),
    });
    if (!response.ok) throw new Error(await reason(response));
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      for (const choice of event.choices) {
        if (choice.delta.content) {
          first ??= performance.now() - began;
          at("answer").append(choice.delta.content);
        }
        reasonToEnd = choice.finish_reason ?? reasonToEnd;
      }
      if (event.usage) numbers(event, first, performance.now() - began, reasonToEnd);
    }
  } catch (error) {
    if (error.name !== "AbortError") problem(sentence(error));
  } finally {
    at("send").disabled = false;
    at("stop").hidden = true;
    running = null;
  }
}

function numbers({ usage, timings }, first, total, reasonToEnd) {
  const seconds = (value) => (value < 1 ? `${Math.round(value * 1000)} ms` : `${value.toFixed(2)} s`);
  const details = usage.prompt_tokens_details;
  const rows = {
    "Prompt": `${usage.prompt_tokens} tokens`,
    "of them visual": `${details.visual_tokens} (${details.tiles} ${details.tiles === 1 ? "tile" : "tiles"})`,
    "Answer": `${usage.completion_tokens} tokens`,
    "Ended by": reasonToEnd === "length" ? "its length" : "itself",
    "First words": first === null ? "–" : seconds(first / 1000),
    "In all": seconds(total / 1000),
    "Vision": seconds(timings.vision),
    "Reading the prompt": seconds(timings.prefill),
    "Writing": timings.tokens_per_second ? `${timings.tokens_per_second} tokens/s` : "–",
  };
  at("numbers").replaceChildren(
    ...Object.entries(rows).map(([name, value]) => {
      const pair = document.createElement("div");
      for (const [tag, text] of [["dt", name], ["dd", value]]) {
        const cell = document.createElement(tag);
        cell.textContent = text;
        pair.append(cell);
      }
      return pair;
    }),
  );
  at("numbers").hidden = false;
}

at("file").addEventListener("change", () => take(at("file").files[0]));
at("page").addEventListener("change", () => {
  const last = Number(at("page").max);
  at("page").value = Math.min(Math.max(1, Math.round(Number(at("page").value)) || 1), last);
  showPlan().catch((error) => problem(sentence(error)));
});
at("outlines").addEventListener("change", () => {
  at("tiles").toggleAttribute("hidden", !at("outlines").checked);
});
for (const name of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(name, (event) => {
    event.preventDefault();
    at("drop").classList.toggle("over", name === "dragover");
    if (name === "drop") take(event.dataTransfer.files[0]);
  });
}
document.addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) take(event.clipboardData.files[0]);
});
at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!running) ask();
});
at("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    at("ask").requestSubmit();
  }
});
at("stop").addEventListener("click", () => running?.abort());
start();
