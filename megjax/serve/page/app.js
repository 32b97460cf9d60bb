"use strict";
// No framework and no build: the form's state is the form, and one function draws each answer.

const $ = (id) => document.getElementById(id);
const PATIENCE_S = 60;
let running = null;

// ---- Numbers for readers

function engineering(value, unit) {
  if (!(value > 0)) return `0 ${unit}`;
  const thousand = Math.min(Math.max(Math.floor(Math.log10(value) / 3), -3), 1);
  return `${Number((value / 1000 ** thousand).toPrecision(3))} ${["n", "µ", "m", "", "k"][thousand + 3]}${unit}`;
}

const count = (value) => value.toLocaleString("en");
const percent = (value) => `${Number((100 * value).toFixed(1))} %`;

// Eq. (4) over the paper's link: 30 dBm, -94 dBm of noise, 1 MHz, a path loss of 35.3 + 37.6 log10(d / m) dB.
function rateBps(distanceM) {
  const snrDb = 30 + 94 - (35.3 + 37.6 * Math.log10(distanceM));
  return 1e6 * Math.log2(1 + 10 ** (snrDb / 10));
}

// ---- The form

function drawForm() {
  const policy = $("by-policy").checked;
  $("request-part").hidden = policy;
  $("policy-part").hidden = !policy;
  // What is not shown must not keep the form from being sent.
  for (const id of ["latency", "energy"]) $(id).disabled = !policy;
  $("psnr").disabled = $("perfect").checked;
  say("steps", $("steps").value, `${$("steps").value} steps`);
  say("ratio", percent(Number($("ratio").value)));
  say("distance", `${$("distance").value} m, ${mega(rateBps(Number($("distance").value)))}`);
  say("psnr", $("perfect").checked ? "no noise" : `${$("psnr").value} dB`);
}

const mega = (bps) => (bps >= 1e5 ? `${(bps / 1e6).toFixed(2)} Mbit/s` : `${(bps / 1e3).toFixed(1)} kbit/s`);

function say(id, text, spoken = text) {
  $(`${id}-out`).textContent = text;
  $(id).setAttribute("aria-valuetext", spoken);
}

function request() {
  const body = {
    prompt: $("prompt").value.trim(),
    negative_prompt: $("negative").value.trim(),
    seed: Number($("seed").value),
    guidance: Number($("guidance").value),
    dtype: $("dtype").value,
    channel: {
      rate_bps: rateBps(Number($("distance").value)),
      psnr_db: $("perfect").checked ? null : Number($("psnr").value),
    },
  };
  if ($("size").value) [body.height, body.width] = $("size").value.split("x").map(Number);
  if ($("by-policy").checked) {
    body.limits = { latency_s: Number($("latency").value), energy_j: 1000 * Number($("energy").value) };
  } else {
    body.steps = Number($("steps").value);
    body.ratio = Number($("ratio").value);
  }
  return body;
}

// ---- What the server is

async function readInfo() {
  let info;
  try {
    const response = await fetch("v1/info");
    if (!response.ok) throw new Error();
    info = await response.json();
  } catch {
    return fail("The server does not say what it makes; reload the page once it is there.");
  }
  const limit = (id, [low, high], value) => {
    $(id).min = low;
    $(id).max = high;
    $(id).value = Math.min(Math.max(value, low), high);
  };
  limit("steps", info.steps, 8);
  limit("ratio", info.ratio, 0.4);
  limit("guidance", info.guidance, 2.5);
  const sizes = info.sizes.map(([height, width]) => `${height}x${width}`);
  $("size").replaceChildren(...sizes.map((size) => new Option(size.replace("x", " × "), size)));
  $("size-field").hidden = sizes.length < 2;
  const kept = info.policies.flatMap((policy) => policy.limits);
  $("by-policy").disabled = !kept.length;
  $("no-policy").hidden = kept.length > 0;
  if (kept.length) {
    const range = (name, unit) => {
      const values = kept.map((each) => (name === "energy_j" ? each[name] / 1000 : each[name]));
      const ends = [Math.min(...values), Math.max(...values)].map((value) => Number(value.toPrecision(4)));
      return ends[0] === ends[1] ? `${ends[0]} ${unit}` : `${ends[0]} to ${ends[1]} ${unit}`;
    };
    $("kept").textContent = `Limits that are kept here: ${range("latency_s", "s")}, ${range("energy_j", "kJ")}.`;
    const middle = kept[Math.floor(kept.length / 2)];
    $("latency").value = Number(middle.latency_s.toPrecision(4));
    $("energy").value = Number((middle.energy_j / 1000).toPrecision(4));
  }
  const facts = [
    `model ${info.model}`,
    ...sizes.map((size) => `${size.replace("x", " × ")} pixels`),
    `hardware profile ${info.profile}`,
    kept.length ? "policy loaded" : "no policy",
  ];
  $("facts").replaceChildren(...facts.map((fact) => element("li", {}, fact)));
  drawForm();
}

// ---- Asking

async function generate() {
  const controller = new AbortController();
  running = controller;
  busy(true);
  fail("");
  try {
    const body = request();
    draw(await ask(body, controller.signal), body);
  } catch (error) {
    $("status").textContent = "";
    if (error.name === "AbortError") $("status").textContent = "Cancelled.";
    else fail(error.message);
  } finally {
    running = null;
    busy(false);
  }
}

async function ask(body, signal) {
  const until = Date.now() + 1000 * PATIENCE_S;
  for (let tries = 1; ; tries++) {
    $("status").textContent = "Generating…";
    let response;
    try {
      response = await fetch("v1/picture", {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify(body),
        signal,
      });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Error("The server cannot be reached.");
    }
    if (response.ok) return response.json();
    const reason = await response.json().then((said) => String(said.error), () => response.statusText);
    const waitS = Math.max(Number(response.headers.get("Retry-After")) || 1, 1) + Math.random();
    const passes = response.status === 429 || response.status === 503;
    if (!passes || Date.now() + 1000 * waitS > until) {
      if (response.status === 401) throw new Error("The server asks for its token: reload the page and enter it.");
      throw new Error(reason.charAt(0).toUpperCase() + reason.slice(1));
    }
    $("status").textContent = `The server is busy; trying again in ${Math.round(waitS)} s.`;
    await pause(1000 * waitS, signal);
  }
}

function pause(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, milliseconds);
    signal.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(new DOMException("", "AbortError"));
    });
  });
}

function busy(is) {
  // Not `disabled`, which would take the keyboard's focus away.
  $("generate").setAttribute("aria-disabled", String(is));
  $("generate").textContent = is ? "Generating…" : "Generate";
  $("cancel").hidden = !is;
  $("pictures").dataset.state = is ? "busy" : $("image").hidden ? "empty" : "shown";
  $("results").setAttribute("aria-busy", String(is));
}

function fail(text) {
  $("error").textContent = text;
}

// ---- Drawing an answer

function element(name, properties, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function draw({ result, image, reference, mse, psnr_db: psnrDb }, { prompt, channel }) {
  const pictures = [["image", image, `On the device: ${prompt}`], ["reference", reference, `Clean reference: ${prompt}`]];
  for (const [id, data, text] of pictures) {
    $(id).src = `data:image/png;base64,${data}`;
    $(id).alt = text;
    $(id).hidden = false;
    $(id).nextElementSibling.hidden = true;
  }
  $("save").href = $("image").src;
  const bytes = result.payload_bits / 8;
  number("n-steps", String(result.steps), result.chosen_by === "policy" ? "the policy's choice" : "your choice");
  number("n-ratio", percent(result.ratio), `${count(result.tokens)} tokens are sent`);
  number("n-payload", `${count(bytes)} B`, "");
  $("image").decode().then(() => {
    const raw = 6 * $("image").naturalWidth * $("image").naturalHeight;
    number("n-payload", `${count(bytes)} B`, `${percent(bytes / raw)} of raw 16-bit RGB`);
  }, () => {});
  number("n-psnr", psnrDb === null ? "equal" : `${psnrDb.toFixed(1)} dB`, `MSE ${Number(mse.toPrecision(3))}`);
  drawModel(result, channel.rate_bps);
  drawServer(result.timings);
  $("account").hidden = false;
  $("status").textContent = `Done: ${result.steps} steps, ${percent(result.ratio)} merged, ${count(bytes)} bytes.`;
  // On a narrow screen the pictures are below what was just pressed; the keyboard's focus stays.
  if ($("pictures").getBoundingClientRect().top > 0.7 * innerHeight) $("pictures").scrollIntoView({ block: "start" });
}

function number(id, value, note) {
  $(id).replaceChildren(value, element("small", {}, note));
}

function drawModel({ latency_s: latency, energy_j: energy }, rate) {
  const parts = [
    ["es", "Edge server", latency.es, energy.es],
    ["tx", `Channel at ${mega(rate)}`, latency.tx, energy.tx],
    ["ue", "Device", latency.ue, energy.ue],
  ];
  bar("model", parts.map(([kind, name, seconds]) => [kind, name, seconds]));
  const rows = parts.map(([kind, name, seconds, joules]) => row(kind, name, engineering(seconds, "s"), engineering(joules, "J")));
  rows.push(row(null, "Total", engineering(latency.total, "s"), engineering(energy.total, "J")));
  $("model-rows").replaceChildren(...rows);
  $("model-caption").textContent = "Equations (1) to (7) over counted FLOPs and bits, with this server's hardware profile.";
}

function drawServer(timings) {
  const known = timings.queue_s + timings.text_s + timings.denoise_s + timings.merge_s;
  const parts = [
    ["other", "Queue", timings.queue_s],
    ["ue", "Text encoders", timings.text_s],
    ["es", "Denoising", timings.denoise_s],
    ["tx", "Merging and writing", timings.merge_s],
    ["rest", "Reference, device's half, the rest", Math.max(timings.total_s - known, 0)],
  ];
  bar("server", parts);
  const rows = parts.map(([kind, name, seconds]) => row(kind, name, engineering(seconds, "s")));
  rows.push(row(null, "Total", engineering(timings.total_s, "s")));
  $("server-rows").replaceChildren(...rows);
  $("server-caption").textContent = "Denoising is shared by the requests of one batch.";
}

function bar(name, parts) {
  const total = parts.reduce((sum, [, , seconds]) => sum + seconds, 0) || 1;
  const spans = parts.filter(([, , seconds]) => seconds > 0).map(([kind, , seconds]) => {
    const span = element("span", { className: kind });
    span.style.flexGrow = String(seconds / total);
    return span;
  });
  $(`${name}-bar`).replaceChildren(...spans);
  const shares = parts.map(([, part, seconds]) => `${part} ${percent(seconds / total)}`);
  $(`${name}-bar`).setAttribute("aria-label", shares.join(", "));
}

function row(kind, name, ...values) {
  const head = element("th", { scope: "row" });
  if (kind) head.append(element("span", { className: `swatch ${kind}` }));
  head.append(name);
  const made = element("tr", { className: kind ? "" : "total" }, head);
  made.append(...values.map((value) => element("td", { className: "n" }, value)));
  return made;
}

// ---- Events

$("form").addEventListener("input", drawForm);
$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!running) generate();
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit();
});
$("cancel").addEventListener("click", () => {
  running?.abort();
  $("generate").focus();
});
$("dice").addEventListener("click", () => {
  $("seed").value = crypto.getRandomValues(new Uint32Array(1))[0];
});
drawForm();
readInfo();
