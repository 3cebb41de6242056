// The playground: things and queries -> vectors of POST /embed -> a heat map and a ranking, computed here.
"use strict";

const MAX_THINGS = 24; // a larger matrix cannot be read
const RESULTS_AT_ONCE = 24;
const SLOW_S = 8;
const SUGGESTIONS = ["red", "fruit", "animal", "car", "night"]; // words that the small model knows

const byId = (id) => document.getElementById(id);

// --- the page's small tools

function make(tag, properties = {}, ...children) {
  const { dataset, ...plain } = properties;
  const node = Object.assign(document.createElement(tag), plain);
  Object.assign(node.dataset, dataset);
  node.append(...children);
  return node;
}

function megabytes(bytes) {
  return `${(bytes / 2 ** 20).toLocaleString("en", { maximumFractionDigits: 1 })} MiB`;
}

function counted(number, noun) {
  return `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;
}

/** A picture of an entry, or a question mark where the browser cannot show it. */
function thumb(entry) {
  const image = make("img", { className: "thumb", alt: "", src: entry.url });
  image.onerror = () => image.replaceWith(make("span", { className: "thumb blank", textContent: "?" }));
  return image;
}

// --- the service

let info = null;
let dimensions = 0;
let key = sessionStorage.getItem("key") ?? "";
let askingForKey = null;

class ServiceError extends Error {}

/** Asks for the service's key; all requests that were refused wait for the same one. */
function askForKey() {
  const form = byId("key-form");
  byId("key-reason").textContent = key ? "The service does not take this API key." : "The service asks for an API key.";
  form.hidden = false;
  byId("key").focus();
  askingForKey ??= new Promise((resolve) => {
    form.onsubmit = (event) => {
      event.preventDefault();
      key = byId("key").value.trim();
      sessionStorage.setItem("key", key); // gone with the tab
      byId("key").value = "";
      form.hidden = true;
      askingForKey = null;
      resolve();
    };
  });
  return askingForKey;
}

/** `fetch` with the key, if one is known; refused for the want of it, it is sent again. */
async function send(path, options = {}) {
  const used = key;
  const headers = { ...options.headers, ...(used && { authorization: `Bearer ${used}` }) };
  const response = await fetch(path, { ...options, headers });
  if (response.status !== 401) return response;
  if (used === key) await askForKey(); // else another request has asked meanwhile
  return send(path, options);
}

async function ask(path, options) {
  let response;
  try {
    response = await send(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServiceError("The service cannot be reached. Is it running?");
  }
  const body = await response.json().catch(() => null);
  if (response.ok && body) return body;
  if (body?.results) return body; // every item failed: each says why
  const wait = response.headers.get("retry-after");
  const said = body?.error?.message ?? `it answered ${response.status} ${response.statusText}`;
  throw new ServiceError(`The service says: ${said}${wait ? ` (come back in ${wait} s)` : ""}`);
}

async function base64Of(file) {
  const reader = new FileReader();
  await new Promise((resolve, reject) => {
    reader.onload = resolve;
    reader.onerror = () => reject(new ServiceError(`${file.name} cannot be read.`));
    reader.readAsDataURL(file);
  });
  return reader.result.slice(reader.result.indexOf(",") + 1);
}

function vectorOf(base64) {
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  return new Float32Array(bytes.buffer);
}

/** Entries ({text} or {file}) -> one {vector} or {error} each, in as many requests as the limits ask for. */
async function embed(entries, instruction, signal) {
  const limits = info.limits;
  const outcomes = [];
  let items = [], places = [], size = 0;
  const send = async () => {
    if (!items.length) return;
    const body = { items, encoding_format: "base64", ...(instruction && { instruction }) };
    const options = { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body), signal };
    const answer = await ask("embed", options);
    for (const result of answer.results) {
      outcomes[places[result.index]] = result.error ? { error: result.error.message } : { vector: vectorOf(result.embedding) };
    }
    items = [], places = [], size = 0;
  };
  for (const [place, entry] of entries.entries()) {
    if (entry.file && entry.file.size > limits.max_image_bytes) {
      outcomes[place] = { error: `${megabytes(entry.file.size)}; the service takes images of up to ${megabytes(limits.max_image_bytes)}` };
      continue;
    }
    const item = entry.file ? { image: await base64Of(entry.file) } : entry.text;
    const cost = (entry.file ? item.image : item).length * (entry.file ? 1 : 3) + 1000;
    if (items.length === limits.max_items_per_request || size + cost > limits.max_body_bytes) await send();
    items.push(item), places.push(place), (size += cost);
  }
  await send();
  return outcomes;
}

/** The first values, at unit length again: what the service answers for `dimensions`. */
function cut(vector) {
  const part = vector.subarray(0, dimensions);
  const length = Math.hypot(...part) || 1;
  return part.map((value) => value / length);
}

function dot(left, right) {
  let sum = 0;
  for (let index = 0; index < left.length; index += 1) sum += left[index] * right[index];
  return sum;
}

// --- what is under way, and what went wrong

function hideState(node) {
  clearInterval(node.timer);
  node.hidden = true;
}

function showProgress(node, text, cancel) {
  hideState(node);
  const words = make("p", { role: "status" });
  const button = make("button", { type: "button", textContent: "Cancel", onclick: cancel });
  node.className = "state";
  node.replaceChildren(make("span", { className: "spinner", ariaHidden: "true" }), words, button);
  const start = Date.now();
  const tick = () => {
    const seconds = Math.round((Date.now() - start) / 1000);
    const slow = seconds >= SLOW_S ? " A large model or a busy service takes its time." : "";
    words.textContent = `${text}${seconds ? ` ${seconds} s.` : ""}${slow}`;
    node.hidden = Date.now() - start < 150; // a quick answer does not flash
  };
  tick();
  node.timer = setInterval(tick, 200);
}

function showFailure(node, error, retry) {
  hideState(node);
  const isCancelled = error.name === "AbortError";
  node.className = isCancelled ? "state" : "state bad";
  const words = make("p", { role: "alert", textContent: isCancelled ? "Cancelled." : error.message });
  node.replaceChildren(words, make("button", { type: "button", textContent: "Try again", onclick: retry }));
  node.hidden = false;
}

// --- compare

let things = []; // {key, name, text | file, url, vector?, error?}
let comparing = null;

function nextKey() {
  const taken = new Set(things.map((thing) => thing.key));
  return [..."ABCDEFGHIJKLMNOPQRSTUVWXYZ"].find((key) => !taken.has(key));
}

function entryOf(source) {
  if (typeof source === "string") return { text: source, name: source };
  return { file: source, name: source.name || "image.png", url: URL.createObjectURL(source) };
}

function addThings(sources) {
  const fitting = sources.slice(0, Math.max(0, MAX_THINGS - things.length));
  for (const source of fitting) things.push({ key: nextKey(), ...entryOf(source) });
  byId("limits").classList.toggle("bad", fitting.length < sources.length);
  compareAll();
}

function removeThing(thing) {
  if (thing.url) URL.revokeObjectURL(thing.url);
  const place = things.indexOf(thing);
  things = things.filter((other) => other !== thing);
  byId("limits").classList.remove("bad");
  compareAll();
  const buttons = byId("items").querySelectorAll("button");
  (buttons[Math.min(place, buttons.length - 1)] ?? byId("text")).focus();
}

function instructionOf(tab) {
  return byId(`${tab}-instruction`).value.trim();
}

/** Embeds what has no vector yet; what is added meanwhile is taken in the next round. */
async function compareAll() {
  drawCompare();
  const state = byId("compare-state");
  if (comparing) return;
  const run = (comparing = new AbortController());
  try {
    const waiting = () => things.filter((thing) => !thing.vector && !thing.error);
    for (let batch = waiting(); batch.length; batch = waiting()) {
      showProgress(state, `Embedding ${counted(batch.length, "thing")}…`, () => run.abort());
      const outcomes = await embed(batch, instructionOf("compare"), run.signal);
      batch.forEach((thing, index) => Object.assign(thing, outcomes[index]));
      drawCompare();
    }
    hideState(state);
  } catch (error) {
    if (comparing === run) showFailure(state, error, compareAll);
  } finally {
    if (comparing === run) comparing = null;
  }
}

function compareAgain() {
  comparing?.abort();
  comparing = null;
  for (const thing of things) delete thing.vector, delete thing.error;
  compareAll();
}

function drawCompare() {
  byId("compare-empty").hidden = things.length > 0;
  byId("items").replaceChildren(...things.map(drawThing));
  drawMatrix();
  drawRequest();
}

function drawThing(thing) {
  const remove = make("button", { type: "button", textContent: "✕", ariaLabel: `Remove ${thing.key}: ${thing.name}`, onclick: () => removeThing(thing) });
  const picture = thing.url ? thumb(thing) : make("span", { className: "no-picture" });
  const what = make("span", { className: "what", textContent: thing.name, title: thing.name });
  const item = make("li", { className: "item" }, make("span", { className: "key", textContent: thing.key }), picture, what, remove);
  if (thing.error) {
    item.classList.add("failed");
    item.append(make("p", { className: "error", role: "alert", textContent: thing.error }));
  }
  return item;
}

function drawMatrix() {
  const shown = things.filter((thing) => thing.vector);
  byId("matrix-box").hidden = shown.length < 2;
  if (shown.length < 2) return;
  const vectors = shown.map((thing) => cut(thing.vector));
  const head = make("tr", {}, make("td"), ...shown.map((thing) => drawHeader(thing, "col")));
  const rows = shown.map((thing, row) =>
    make("tr", {}, drawHeader(thing, "row"), ...vectors.map((other, column) => drawCell(dot(vectors[row], other), thing, shown[column]))),
  );
  byId("matrix").replaceChildren(make("thead", {}, head), make("tbody", {}, ...rows));
  byId("summary").textContent = closest(shown, vectors);
}

function drawHeader(thing, scope) {
  const key = make("span", { className: "key", textContent: thing.key });
  const label = thing.url ? thumb(thing) : make("span", { className: "clip", textContent: thing.name });
  const header = make("th", { scope, title: thing.name }, make("div", { className: "who" }, key, label));
  header.ariaLabel = `${thing.key}: ${thing.name}`;
  return header;
}

function drawCell(value, row, column) {
  const cell = make("td", { className: "heat", textContent: value.toFixed(2), title: `${row.name} · ${column.name}: ${value.toFixed(4)}` });
  cell.style.setProperty("--value", value.toFixed(4));
  cell.classList.toggle("high", value > 0.6);
  return cell;
}

function closest(shown, vectors) {
  let best = { value: -2 };
  for (let row = 0; row < shown.length; row += 1) {
    for (let column = row + 1; column < shown.length; column += 1) {
      const value = dot(vectors[row], vectors[column]);
      if (value > best.value) best = { value, row, column };
    }
  }
  const named = (thing) => `${thing.key} (${thing.name})`;
  return `Most alike: ${named(shown[best.row])} and ${named(shown[best.column])}, ${best.value.toFixed(2)}.`;
}

/** Three shapes and their names, drawn here. */
async function addExample() {
  const shapes = [["red circle", "#d92b2b"], ["green square", "#1f9d3f"], ["blue triangle", "#2450d6"]];
  const pictures = await Promise.all(shapes.map(async ([name, color]) => {
    const canvas = make("canvas", { width: 128, height: 128 });
    const pen = canvas.getContext("2d");
    pen.fillStyle = "#ffffff";
    pen.fillRect(0, 0, 128, 128);
    pen.fillStyle = color;
    pen.beginPath();
    if (name.endsWith("circle")) pen.arc(64, 64, 48, 0, 7);
    else if (name.endsWith("square")) pen.rect(20, 20, 88, 88);
    else pen.moveTo(64, 14), pen.lineTo(116, 110), pen.lineTo(12, 110);
    pen.fill();
    const blob = await new Promise((resolve) => canvas.toBlob(resolve));
    return new File([blob], `${name}.png`, { type: "image/png" });
  }));
  addThings([...shapes.map(([name]) => name), ...pictures]);
}

// --- search

let collection = null; // {pictures: [{name, thumbnail, vector}], ..} once it is built
let collectionAsked = false;
let query = null; // {name, text | file, url, vector?, error?}
let searching = null;
let numShown = RESULTS_AT_ONCE;

async function loadCollection() {
  if (collectionAsked) return;
  collectionAsked = true;
  const state = byId("search-state");
  try {
    const answer = await ask("playground/collection");
    drawBuilding(answer);
    if (answer.status.startsWith("building")) {
      collectionAsked = false;
      setTimeout(() => tab === "search" && loadCollection(), 1000);
      return;
    }
    for (const picture of answer.pictures) picture.vector = vectorOf(picture.vector);
    collection = answer;
    drawCollection();
    drawResults();
  } catch (error) {
    collectionAsked = false;
    byId("search-box").hidden = false;
    showFailure(state, error, () => (hideState(state), loadCollection()));
  }
}

function drawBuilding(answer) {
  const isBuilding = answer.status.startsWith("building");
  byId("collection-none").hidden = answer.status !== "none";
  byId("collection-building").hidden = !isBuilding;
  byId("search-box").hidden = answer.status !== "ready";
  byId("building").textContent = `Reading the pictures: ${answer.status}.`;
  Object.assign(byId("building-progress"), { max: answer.num_pictures || 1, value: answer.num_done });
}

function drawCollection() {
  const { title, license, pictures, skipped, num_left_out } = collection;
  byId("search-label").textContent = `Search ${counted(pictures.length, "picture")} of ${title}`;
  if (license) {
    byId("attribution").textContent = `Pictures: ${title}, ${license}`;
    byId("attribution").hidden = false;
  }
  if (info.is_bundled_model) {
    const chips = SUGGESTIONS.map((word) => make("button", { type: "button", textContent: word, onclick: () => searchText(word) }));
    byId("suggestions").replaceChildren(...chips);
  }
  const notes = [];
  if (num_left_out) notes.push(make("p", { className: "muted small", textContent: `${counted(num_left_out, "more picture")} of the folder left out.` }));
  if (skipped.length) {
    const rows = skipped.map(({ name, message }) => make("li", {}, make("strong", { textContent: name }), `: ${message}`));
    notes.push(make("details", { className: "more" }, make("summary", { textContent: `${counted(skipped.length, "file")} skipped` }), make("ul", { className: "small" }, ...rows)));
  }
  byId("skipped").replaceChildren(...notes);
}

function searchText(text) {
  byId("query").value = text;
  searchFor(text);
}

/** A new query: a text or a file. */
function searchFor(source) {
  if (query?.url) URL.revokeObjectURL(query.url);
  query = entryOf(source);
  if (query.file) byId("query").value = "";
  searchAgain();
}

async function searchAgain() {
  if (!query) return;
  const state = byId("search-state");
  searching?.abort();
  const run = (searching = new AbortController());
  numShown = RESULTS_AT_ONCE;
  drawRequest();
  showProgress(state, "Embedding the query…", () => run.abort());
  try {
    const [outcome] = await embed([query], instructionOf("search"), run.signal);
    if (searching !== run) return;
    if (outcome.error) throw new ServiceError(`${query.name}: ${outcome.error}`);
    query.vector = outcome.vector;
    hideState(state);
    drawResults();
  } catch (error) {
    if (searching !== run) return;
    delete query.vector;
    drawResults();
    showFailure(state, error, searchAgain);
  } finally {
    if (searching === run) searching = null;
  }
}

/** Best first; before the first query, as they come. */
function drawResults() {
  drawRequest();
  if (!collection) return;
  const ranked = rank();
  byId("results").replaceChildren(...ranked.slice(0, numShown).map(drawResult));
  byId("more-results").hidden = numShown >= ranked.length;
  const asked = byId("asked");
  asked.hidden = !query?.vector;
  if (asked.hidden) return;
  const words = make("p", {}, `${counted(ranked.length, "picture")} by likeness to `, make("strong", { textContent: query.name }), `, ${dimensions} dimensions`);
  asked.replaceChildren(...(query.url ? [thumb(query)] : []), words);
}

function rank() {
  if (!query) return collection.pictures.map((picture) => ({ picture }));
  if (!query.vector) return [];
  const own = cut(query.vector);
  const ranked = collection.pictures.map((picture) => ({ picture, score: dot(own, cut(picture.vector)) }));
  return ranked.sort((left, right) => right.score - left.score);
}

function drawResult({ picture, score }, index) {
  const image = make("img", { alt: "", loading: "lazy", width: 96, height: 96 });
  showThumbnail(image, picture);
  const result = make("li", { className: "result" }, image, make("span", { className: "name", textContent: picture.name, title: picture.name }));
  if (score === undefined) return result;
  const meter = make("meter", { min: 0, max: 1, value: Math.max(0, score), ariaHidden: "true" });
  result.prepend(make("span", { className: "rank", textContent: index + 1 }));
  result.append(make("span", { className: "score" }, meter, make("span", { className: "value", textContent: score.toFixed(3) })));
  return result;
}

/** Tried again where it fails: another worker may not have it yet. With a key it is fetched here: `img` sends none. */
async function showThumbnail(image, picture, tries = 0) {
  image.onerror = () => tries < 5 && setTimeout(() => showThumbnail(image, picture, tries + 1), 1000);
  const path = `playground/${picture.thumbnail}${tries ? `?${tries}` : ""}`;
  if (key && !picture.url) {
    const response = await send(path).catch(() => null);
    if (!response?.ok) return image.onerror();
    picture.url = URL.createObjectURL(await response.blob());
  }
  image.src = picture.url ?? path;
}

// --- the same request, to copy

function drawRequest() {
  const entries = tab === "compare" ? things : query ? [query] : [];
  byId("request").hidden = !entries.length || !info;
  if (!entries.length || !info) return;
  const options = {};
  if (instructionOf(tab)) options.instruction = instructionOf(tab);
  if (dimensions < info.hidden_size) options.dimensions = dimensions;
  const language = document.querySelector("input[name=language]:checked").value;
  const url = new URL("embed", document.baseURI).href;
  byId("code").textContent = language === "curl" ? curlOf(url, entries, options) : pythonOf(url, entries, options);
  byId("code-note").hidden = !entries.some((entry) => entry.file);
}

function curlOf(url, entries, options) {
  const plain = (value) => JSON.stringify(value).replace(/[\\$`]/g, "\\$&"); // the shell looks into the body
  const path = (name) => `'./${name.replaceAll("'", "'\\''")}'`;
  const image = (name) => `{"image": "$(base64 < ${path(name)} | tr -d '\\n')"}`;
  const items = entries.map((entry) => `    ${entry.file ? image(entry.name) : plain(entry.text)}`).join(",\n");
  const rest = Object.entries(options).map(([name, value]) => `,\n  "${name}": ${plain(value)}`).join("");
  const auth = key ? ` -H "authorization: Bearer $EMBEDDER_API_KEY"` : "";
  return `curl -s '${url}' -H 'content-type: application/json'${auth} --data-binary @- <<JSON\n{\n  "items": [\n${items}\n  ]${rest}\n}\nJSON\n`;
}

function pythonOf(url, entries, options) {
  const plain = (value) => JSON.stringify(value); // a JSON string is a Python string
  const items = entries.map((entry) => `        ${entry.file ? `image(${plain(entry.name)})` : plain(entry.text)},\n`).join("");
  const rest = Object.entries(options).map(([name, value]) => `    "${name}": ${plain(value)},\n`).join("");
  const image = `def image(path):\n    return {"image": base64.b64encode(pathlib.Path(path).read_bytes()).decode()}\n\n\n`;
  const hasImage = entries.some((entry) => entry.file);
  const auth = key ? `, "authorization": "Bearer " + os.environ["EMBEDDER_API_KEY"]` : "";
  return (
    `${hasImage ? "import base64\n" : ""}import json\n${key ? "import os\n" : ""}${hasImage ? "import pathlib\n" : ""}import urllib.request\n\n` +
    (hasImage ? `\n${image}` : "") +
    `body = {\n    "items": [\n${items}    ],\n${rest}}\n` +
    `request = urllib.request.Request(\n    ${plain(url)},\n    json.dumps(body).encode(),\n    {"content-type": "application/json"${auth}},\n)\n` +
    `for result in json.load(urllib.request.urlopen(request))["results"]:\n    print(result)\n`
  );
}

async function copyCode() {
  try {
    await navigator.clipboard.writeText(byId("code").textContent);
  } catch {
    getSelection().selectAllChildren(byId("code")); // no clipboard without https
    document.execCommand("copy");
  }
  byId("copy").textContent = "Copied";
  setTimeout(() => (byId("copy").textContent = "Copy"), 1500);
}

// --- tabs, dimensions, dropping

let tab = "compare";

function openTab(name) {
  tab = name;
  for (const other of ["compare", "search"]) {
    const isOpen = other === name;
    byId(other).hidden = !isOpen;
    byId(`tab-${other}`).ariaSelected = String(isOpen);
    byId(`tab-${other}`).tabIndex = isOpen ? 0 : -1;
  }
  if (name === "search" && info) loadCollection();
  drawRequest();
}

function drawDimensions() {
  const sizes = [64, 128, 256, 512, 1024, 2048, 4096, 8192].filter((size) => size < info.hidden_size);
  dimensions = info.hidden_size;
  byId("dimensions").replaceChildren(...[...sizes, info.hidden_size].map((size) => {
    const input = make("input", { type: "radio", name: "dimensions", value: size, checked: size === dimensions });
    input.onchange = () => {
      dimensions = size;
      drawMatrix();
      drawResults();
    };
    return make("label", {}, input, make("span", { textContent: size }));
  }));
}

function takeImages(files) {
  if (!files.length || !info) return;
  if (tab === "compare") addThings(files);
  else if (collection) searchFor(files[0]);
}

function listen() {
  for (const name of ["compare", "search"]) {
    const button = byId(`tab-${name}`);
    const other = name === "compare" ? "search" : "compare";
    button.onclick = () => openTab(name);
    button.onkeydown = (event) => {
      if (!["ArrowLeft", "ArrowRight"].includes(event.key)) return;
      openTab(other);
      byId(`tab-${other}`).focus();
    };
  }
  byId("add-text").onsubmit = (event) => {
    event.preventDefault();
    const text = byId("text").value;
    if (text.trim() && info) addThings([text]);
    byId("text").value = "";
    byId("text").focus();
  };
  byId("search-form").onsubmit = (event) => {
    event.preventDefault();
    if (byId("query").value.trim()) searchFor(byId("query").value);
  };
  for (const id of ["images", "query-image"]) {
    byId(id).onchange = (event) => {
      takeImages([...event.target.files]);
      event.target.value = ""; // the same file may be chosen again
    };
  }
  byId("example").onclick = () => info && addExample();
  byId("compare-instruction").onchange = compareAgain;
  byId("search-instruction").onchange = searchAgain;
  byId("more-results").onclick = () => {
    numShown += 2 * RESULTS_AT_ONCE;
    drawResults();
  };
  byId("copy").onclick = copyCode;
  for (const input of document.querySelectorAll("input[name=language]")) input.onchange = drawRequest;
  listenForDrops();
}

function listenForDrops() {
  const veil = byId("veil");
  const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
  document.addEventListener("dragover", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    veil.hidden = false;
  });
  document.addEventListener("dragleave", (event) => (veil.hidden = veil.hidden || !event.relatedTarget));
  document.addEventListener("drop", (event) => {
    veil.hidden = true;
    if (!hasFiles(event)) return;
    event.preventDefault();
    takeImages([...event.dataTransfer.files]);
  });
  document.addEventListener("paste", (event) => {
    const images = [...(event.clipboardData?.files ?? [])];
    if (images.length) event.preventDefault();
    takeImages(images);
  });
}

// --- start

async function start() {
  try {
    await ask("health");
    info = await ask("info");
  } catch (error) {
    byId("banner").textContent = `${error.message} Trying again every 2 seconds.`;
    byId("banner").hidden = false;
    setTimeout(start, 2000);
    return;
  }
  byId("banner").hidden = true;
  const name = info.is_bundled_model ? "the small model of the package" : info.model;
  byId("model").replaceChildren(make("strong", { textContent: name }), `, ${info.hidden_size} dimensions, on ${info.device}`);
  byId("limits").textContent =
    `Images are sent as they are: up to ${megabytes(info.limits.max_image_bytes)} and ` +
    `${(info.limits.max_image_pixels / 1e6).toLocaleString("en")} million pixels each. Up to ${MAX_THINGS} things.`;
  for (const id of ["compare-instruction", "search-instruction"]) byId(id).placeholder = info.default_instruction;
  drawDimensions();
  openTab(tab);
}

listen();
start();
