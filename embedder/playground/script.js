// The playground. POST /embed computes the vectors; this script computes the heat map and the ranking by similarity.
"use strict";

const MAX_ENTRIES = 24; // a larger matrix is not readable
const RESULTS_AT_ONCE = 24;
const NUM_RERANKED = 24; // the service's limit
const SLOW_S = 8;
const SUGGESTIONS = ["red", "fruit", "animal", "car", "night"]; // words that the bundled model was trained on

const byId = (id) => document.getElementById(id);

// --- DOM and formatting

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

/** A thumbnail of the entry's image, or a question mark if the browser cannot decode it. */
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

/** Show the key form. All rejected requests wait for the same key. */
function askForKey() {
  const form = byId("key-form");
  byId("key-reason").textContent = key ? "The service rejected this API key." : "This service requires an API key.";
  form.classList.toggle("bad", Boolean(key));
  form.hidden = false;
  for (const id of ["bar", "main"]) byId(id).hidden = !info; // until the service has let the caller in
  byId("key").focus();
  askingForKey ??= new Promise((resolve) => {
    form.onsubmit = (event) => {
      event.preventDefault();
      key = byId("key").value.trim();
      sessionStorage.setItem("key", key); // until the tab is closed
      byId("key").value = "";
      form.hidden = true;
      askingForKey = null;
      resolve();
    };
  });
  return askingForKey;
}

/** `fetch` with the API key. If the service rejects the key, ask for another one and retry. */
async function send(path, options = {}) {
  const used = key;
  const headers = { ...options.headers, ...(used && { authorization: `Bearer ${used}` }) };
  const response = await fetch(path, { ...options, headers });
  if (response.status !== 401) return response;
  if (used === key) await askForKey(); // otherwise another request has already asked
  return send(path, options);
}

async function ask(path, options) {
  let response;
  try {
    response = await send(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServiceError("The service does not respond. Check that it is running.");
  }
  const body = await response.json().catch(() => null);
  if (response.ok && body) return body;
  if (body?.results) return body; // every item failed; each result has its own error
  const wait = response.headers.get("retry-after");
  const message = body?.error?.message ?? `status ${response.status} ${response.statusText}`;
  throw new ServiceError(`Error from the service: ${message}${wait ? ` (retry after ${wait} s)` : ""}`);
}

async function readBase64(file) {
  const reader = new FileReader();
  await new Promise((resolve, reject) => {
    reader.onload = resolve;
    reader.onerror = () => reject(new ServiceError(`${file.name} cannot be read.`));
    reader.readAsDataURL(file);
  });
  return reader.result.slice(reader.result.indexOf(",") + 1);
}

function decodeVector(base64) {
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  return new Float32Array(bytes.buffer);
}

/** Embed entries ({text} or {file}). Returns {vector} or {error} per entry; sends as many requests as the limits require. */
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
      outcomes[places[result.index]] = result.error ? { error: result.error.message } : { vector: decodeVector(result.embedding) };
    }
    items = [], places = [], size = 0;
  };
  for (const [place, entry] of entries.entries()) {
    if (entry.file && entry.file.size > limits.max_image_bytes) {
      outcomes[place] = { error: `the file is ${megabytes(entry.file.size)}; allowed: up to ${megabytes(limits.max_image_bytes)}` };
      continue;
    }
    const item = entry.file ? { image: await readBase64(entry.file) } : entry.text;
    const cost = (entry.file ? item.image : item).length * (entry.file ? 1 : 3) + 1000;
    if (items.length === limits.max_items_per_request || size + cost > limits.max_body_bytes) await send();
    items.push(item), places.push(place), (size += cost);
  }
  await send();
  return outcomes;
}

function encodeVector(vector) {
  return btoa(String.fromCharCode(...new Uint8Array(vector.buffer, vector.byteOffset, vector.byteLength)));
}

/** The first `dimensions` values, normalized: equal to the service's vector for this `dimensions`. */
function truncate(vector) {
  const part = vector.subarray(0, dimensions);
  const length = Math.hypot(...part) || 1;
  return part.map((value) => value / length);
}

function dot(left, right) {
  let sum = 0;
  for (let index = 0; index < left.length; index += 1) sum += left[index] * right[index];
  return sum;
}

// --- progress and errors

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
    const slow = seconds >= SLOW_S ? " A large model or a busy service can take longer." : "";
    words.textContent = `${text}${seconds ? ` ${seconds} s.` : ""}${slow}`;
    node.hidden = Date.now() - start < 150; // no flicker for fast responses
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

let compared = []; // {key, name, text | file, url, vector?, error?}
let example = "unseen"; // then shown, and over once other items have replaced it
let comparing = null;

function nextKey() {
  const taken = new Set(compared.map((entry) => entry.key));
  return [..."ABCDEFGHIJKLMNOPQRSTUVWXYZ"].find((key) => !taken.has(key));
}

function makeEntry(source) {
  if (typeof source === "string") return { text: source, name: source };
  return { file: source, name: source.name || "image.png", url: URL.createObjectURL(source) };
}

function addEntries(sources) {
  if (example === "shown") dropEntries();
  example = "over";
  const fitting = sources.slice(0, Math.max(0, MAX_ENTRIES - compared.length));
  for (const source of fitting) compared.push({ key: nextKey(), ...makeEntry(source) });
  byId("limits").classList.toggle("bad", fitting.length < sources.length);
  compareAll();
}

function dropEntries() {
  for (const entry of compared) if (entry.url) URL.revokeObjectURL(entry.url);
  compared = [];
}

function removeEntry(entry) {
  if (entry.url) URL.revokeObjectURL(entry.url);
  const place = compared.indexOf(entry);
  compared = compared.filter((other) => other !== entry);
  byId("limits").classList.remove("bad");
  compareAll();
  const buttons = byId("items").querySelectorAll("button");
  (buttons[Math.min(place, buttons.length - 1)] ?? byId("text")).focus();
}

function instructionFor(tab) {
  return byId(`${tab}-instruction`).value.trim();
}

/** Embed all entries without a vector. Entries added in the meantime are embedded in the next round. */
async function compareAll() {
  drawCompare();
  const state = byId("compare-state");
  if (comparing) return;
  const run = (comparing = new AbortController());
  try {
    const waiting = () => compared.filter((entry) => !entry.vector && !entry.error);
    for (let batch = waiting(); batch.length; batch = waiting()) {
      showProgress(state, `Embedding ${counted(batch.length, "item")}…`, () => run.abort());
      const outcomes = await embed(batch, instructionFor("compare"), run.signal);
      batch.forEach((entry, index) => Object.assign(entry, outcomes[index]));
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
  for (const entry of compared) delete entry.vector, delete entry.error;
  compareAll();
}

function drawCompare() {
  byId("compare-empty").hidden = compared.length > 0;
  byId("example-note").hidden = example !== "shown" || !compared.length;
  byId("items").replaceChildren(...compared.map(drawEntry));
  drawMatrix();
  drawRequest();
}

function drawEntry(entry) {
  const remove = make("button", { type: "button", textContent: "✕", ariaLabel: `Remove ${entry.key}: ${entry.name}`, onclick: () => removeEntry(entry) });
  const picture = entry.url ? thumb(entry) : make("span", { className: "no-picture" });
  const what = make("span", { className: "what", textContent: entry.name, title: entry.name });
  const item = make("li", { className: "item" }, make("span", { className: "key", textContent: entry.key }), picture, what, remove);
  if (entry.error) {
    item.classList.add("failed");
    item.append(make("p", { className: "error", role: "alert", textContent: entry.error }));
  }
  return item;
}

/** The heat map of all pairs. Colors span the values off the diagonal: an item's cosine to itself is always 1. */
function drawMatrix() {
  const shown = compared.filter((entry) => entry.vector);
  byId("matrix-box").hidden = shown.length < 2;
  if (shown.length < 2) return;
  const vectors = shown.map((entry) => truncate(entry.vector));
  const values = vectors.map((left) => vectors.map((right) => dot(left, right)));
  const others = values.flatMap((row, index) => row.toSpliced(index, 1));
  const lowest = Math.min(...others), highest = Math.max(...others);
  const share = (value) => (highest > lowest ? (value - lowest) / (highest - lowest) : 0.5);
  const head = make("tr", {}, make("td"), ...shown.map((entry) => drawHeader(entry, "col")));
  const rows = shown.map((entry, row) => {
    const cell = (value, column) => (row === column ? drawDiagonal() : drawCell(value, share(value), entry, shown[column]));
    return make("tr", {}, drawHeader(entry, "row"), ...values[row].map(cell));
  });
  byId("matrix").replaceChildren(make("thead", {}, head), make("tbody", {}, ...rows));
  drawScrollHint();
  byId("legend").hidden = shown.length < 3; // one pair has no range
  byId("lowest").textContent = lowest.toFixed(2);
  byId("highest").textContent = highest.toFixed(2);
  byId("summary").textContent = mostSimilar(shown, values);
}

function drawScrollHint() {
  const box = byId("matrix-scroll");
  byId("scroll-hint").hidden = box.scrollWidth <= box.clientWidth;
}

function drawHeader(entry, scope) {
  const key = make("span", { className: "key", textContent: entry.key });
  const label = entry.url ? thumb(entry) : make("span", { className: "clip", textContent: entry.name });
  const header = make("th", { scope, title: entry.name }, make("div", { className: "who" }, key, label));
  header.ariaLabel = `${entry.key}: ${entry.name}`;
  return header;
}

function drawDiagonal() {
  return make("td", { className: "diagonal", ariaLabel: "the same item" });
}

/** `share`: the position of `value` on the color ramp, 0 to 1. */
function drawCell(value, share, row, column) {
  const cell = make("td", { className: "heat", textContent: value.toFixed(2), title: `${row.name} · ${column.name}: ${value.toFixed(4)}` });
  cell.style.setProperty("--share", share.toFixed(4));
  cell.classList.toggle("high", share > 0.6);
  return cell;
}

function mostSimilar(shown, values) {
  let best = { value: -2 };
  for (let row = 0; row < shown.length; row += 1) {
    for (let column = row + 1; column < shown.length; column += 1) {
      const value = values[row][column];
      if (value > best.value) best = { value, row, column };
    }
  }
  const named = (entry) => `${entry.key} (${entry.name})`;
  return `Most similar: ${named(shown[best.row])} and ${named(shown[best.column])}, ${best.value.toFixed(2)}.`;
}

/** Show three shapes, drawn on a canvas, and their names. */
async function showExample() {
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
  if (compared.length) return; // the user was faster
  addEntries([...shapes.map(([name]) => name), ...pictures]);
  example = "shown";
  drawCompare();
}

// --- search

let collection = null; // the body of playground/collection, once all images are embedded
let collectionRequested = false;
let query = null; // {name, text | file, url, vector?, error?, reranked: {score} by row}
let searching = null;
let ranking = null;
let numShown = RESULTS_AT_ONCE;

async function loadCollection() {
  if (collectionRequested) return;
  collectionRequested = true;
  const state = byId("search-state");
  try {
    const answer = await ask("playground/collection");
    drawBuilding(answer);
    if (answer.status.startsWith("building")) {
      collectionRequested = false;
      setTimeout(() => tab === "search" && loadCollection(), 1000);
      return;
    }
    for (const [row, picture] of (answer.pictures ?? []).entries()) Object.assign(picture, { row, vector: decodeVector(picture.vector) });
    collection = answer;
    drawCollection();
    drawResults();
  } catch (error) {
    collectionRequested = false;
    byId("search-box").hidden = false;
    showFailure(state, error, () => (hideState(state), loadCollection()));
  }
}

function drawBuilding(answer) {
  const isBuilding = answer.status.startsWith("building");
  byId("collection-none").hidden = answer.status !== "none";
  byId("collection-building").hidden = !isBuilding;
  byId("search-box").hidden = answer.status !== "ready";
  byId("building").textContent = `Embedding the images: ${answer.num_done} of ${answer.num_pictures}.`;
  Object.assign(byId("building-progress"), { max: answer.num_pictures || 1, value: answer.num_done });
}

/** The switch of the reranker, or how to start one. */
function drawRerankSwitch() {
  byId("rerank-row").hidden = !info.reranker;
  byId("rerank-hint").hidden = Boolean(info.reranker);
  const name = info.is_bundled_model ? "bundled" : "Qwen/Qwen3-VL-Reranker-2B";
  const settings = `${info.is_bundled_model ? "EMBEDDER_MODEL=bundled " : ""}EMBEDDER_RERANKER=${name}`;
  byId("rerank-what").textContent = collection.has_pages ? "this search" : "the service";
  byId("rerank-option").textContent = collection.has_pages ? `--rerank ${name}` : settings;
}

function drawCollection() {
  drawRerankSwitch();
  if (collection.has_pages) {
    const { unit } = collection;
    byId("search-label").textContent = `Search ${counted(collection.num_pictures, unit)}${collection.title && ` of ${collection.title}`}`;
    byId("query").placeholder = `a question about the ${unit}s`;
    byId("search-instruction").placeholder = collection.query_instruction;
    byId("results").className = "pages";
    byId("api-reference").hidden = true; // a page of BentoML's
    byId("results").ariaLabel = `${unit === "row" ? "Rows" : "Pages"}, most similar first`;
    return;
  }
  const { title, license, pictures, skipped, num_left_out } = collection;
  byId("search-label").textContent = `Search ${counted(pictures.length, "image")} of ${title}`;
  if (license) {
    byId("attribution").textContent = `Images: ${title}, ${license}`;
    byId("attribution").hidden = false;
  }
  if (info.is_bundled_model) {
    const chips = SUGGESTIONS.map((word) => make("button", { type: "button", textContent: word, onclick: () => searchText(word) }));
    byId("suggestions").replaceChildren(...chips);
    byId("suggestions-row").hidden = false;
  }
  const notes = [];
  if (num_left_out) notes.push(make("p", { className: "muted small", textContent: `The folder contains ${counted(num_left_out, "more image")}, not included here.` }));
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

/** The instruction of the query: pages were embedded to be found by the one for questions. */
function searchInstruction() {
  const usual = query?.file ? collection?.default_instruction : collection?.query_instruction;
  return instructionFor("search") || usual || "";
}

/** Start a search with a new query: a text or a file. */
function searchFor(source) {
  if (query?.url) URL.revokeObjectURL(query.url);
  query = makeEntry(source);
  if (query.file) byId("query").value = "";
  searchAgain();
}

async function searchAgain() {
  if (!query) return;
  const state = byId("search-state");
  searching?.abort();
  const run = (searching = new AbortController());
  numShown = RESULTS_AT_ONCE;
  ranking?.abort();
  ranking = null;
  query.reranked = new Map();
  drawRequest();
  showProgress(state, "Embedding the query…", () => run.abort());
  try {
    const [outcome] = await embed([query], searchInstruction(), run.signal);
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

/** Show what is most similar to the query, then, if that is wanted, the first of it in the order of the reranker. */
async function drawResults() {
  drawRequest();
  if (!collection) return;
  const state = byId("search-state");
  ranking?.abort();
  if (ranking?.isShown) hideState(state);
  const run = (ranking = new AbortController());
  try {
    const draw = collection.has_pages ? drawPages : drawPictures;
    const found = await (collection.has_pages ? findPages(run.signal) : rank());
    if (ranking !== run) return;
    draw(found);
    if (!byId("rerank").checked || !query?.vector || !found.length) return;
    const first = found.slice(0, NUM_RERANKED);
    const isAsked = first.some((hit) => !query.reranked.has(hit.row));
    run.isShown = isAsked;
    if (isAsked) showProgress(state, `Reranking the first ${first.length}…`, () => run.abort());
    const reranked = await rerank(first, run.signal);
    if (ranking !== run) return;
    if (isAsked) hideState(state);
    draw([...reranked, ...found.slice(NUM_RERANKED)]);
  } catch (error) {
    if (ranking !== run) return;
    run.isShown = true;
    showFailure(state, error, drawResults);
  }
}

/** The hits, each with `reranked`: {score} or {error}. The best are the first; those with an error the last. */
async function rerank(hits, signal) {
  const { reranked } = query; // scores stay valid if the dimensions change
  const rows = hits.map(({ row }) => row).filter((row) => !reranked.has(row));
  const errors = new Map();
  if (rows.length) {
    const asked = query.file ? { image: await readBase64(query.file) } : query.text;
    const instruction = instructionFor("search");
    const body = JSON.stringify({ query: asked, rows, ...(instruction && { instruction }) });
    const answer = await ask("playground/rerank", { method: "POST", headers: { "content-type": "application/json" }, body, signal });
    for (const { row, score, error } of answer.results) error ? errors.set(row, { error: error.message }) : reranked.set(row, { score });
  }
  const judged = hits.map((hit) => Object.assign(hit, { reranked: reranked.get(hit.row) ?? errors.get(hit.row) }));
  return judged.sort((left, right) => (right.reranked.score ?? -1) - (left.reranked.score ?? -1));
}

function drawPictures(ranked) {
  byId("results").replaceChildren(...ranked.slice(0, numShown).map(drawResult));
  byId("more-results").hidden = numShown >= ranked.length;
  drawAsked(counted(ranked.length, "image"), ranked);
}

function drawAsked(found, hits) {
  const asked = byId("asked");
  asked.hidden = !query?.vector;
  if (asked.hidden) return;
  const judged = hits.filter((hit) => hit.reranked).length;
  const words = make("p", {}, `${found} by similarity to `, make("strong", { textContent: query.name }), `, ${dimensions} dimensions`);
  if (judged) words.append(`; the first ${judged} in the order of the reranker`);
  asked.replaceChildren(...(query.url ? [thumb(query)] : []), words);
}

function rank() {
  if (!query) return collection.pictures.map((picture) => ({ picture, row: picture.row }));
  if (!query.vector) return [];
  const own = truncate(query.vector);
  const ranked = collection.pictures.map((picture) => ({ picture, row: picture.row, score: dot(own, truncate(picture.vector)) }));
  return ranked.sort((left, right) => right.score - left.score);
}

function drawResult(hit, index) {
  const { picture } = hit;
  const image = make("img", { alt: "", loading: "lazy", width: 96, height: 96 });
  showThumbnail(image, picture);
  const result = make("li", { className: "result" }, image, make("span", { className: "name", textContent: picture.name, title: picture.name }));
  if (hit.score === undefined) return result;
  result.prepend(make("span", { className: "rank", textContent: index + 1 }));
  result.append(...drawScores(hit));
  return result;
}

/** The similarity; if the hit was reranked, first the reranker's score or why there is none, each with its name. */
function drawScores({ score, reranked }) {
  const similarity = drawScore(score, reranked ? "similarity" : "");
  if (!reranked) return [similarity];
  if (reranked.error) return [make("p", { className: "not-reranked small", textContent: `Not reranked: ${reranked.error}` }), similarity];
  return [drawScore(reranked.score, "reranker"), similarity];
}

function drawScore(score, name) {
  const meter = make("meter", { min: 0, max: 1, value: Math.max(0, score), ariaHidden: "true" });
  const value = make("span", { className: "value", textContent: score.toFixed(3) });
  return make("span", { className: `score ${name}` }, ...(name ? [make("span", { className: "muted", textContent: name })] : []), meter, value);
}

/** Load a thumbnail. Retry, because another worker may not have it yet. With a key use `fetch`: `img` sends no header. */
async function showThumbnail(image, picture, maxTries = 6, tries = 1) {
  image.onerror = () => tries < maxTries && setTimeout(() => showThumbnail(image, picture, maxTries, tries + 1), 1000);
  const path = `playground/${picture.thumbnail}${tries > 1 ? `?${tries}` : ""}`;
  if (key && !picture.url) {
    const response = await send(path).catch(() => null);
    if (!response?.ok) return image.onerror();
    picture.url = URL.createObjectURL(await response.blob());
  }
  image.src = picture.url ?? path;
}

// --- pages of documents, and rows of data sets: the service ranks them and renders their pictures

const MAX_PAGES_SHOWN = 500; // the service's limit

// the results: {row, file, page, seconds, is_clip, score, lines, text, has_picture, unread?, url?, reranked?}; the text is
// null of a file of a folder
let pages = [];
let viewed = null; // one of them

/** The pages by similarity to the query; before the first query, in their own order. */
async function findPages(signal) {
  if (query && !query.vector) return [];
  const limit = Math.min(numShown, MAX_PAGES_SHOWN);
  const asked = query ? { vector: encodeVector(truncate(query.vector.subarray(0, collection.dimensions))), question: query.text ?? "" } : {};
  const options = { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify({ ...asked, limit }), signal };
  return (await ask("playground/search", options)).results;
}

function drawPages(found) {
  for (const page of pages) if (page.url && !found.includes(page)) URL.revokeObjectURL(page.url);
  pages = found;
  const limit = Math.min(numShown, MAX_PAGES_SHOWN);
  byId("results").replaceChildren(...pages.map(drawPage));
  byId("more-results").hidden = pages.length < limit || limit === MAX_PAGES_SHOWN;
  drawAsked(`The best ${counted(pages.length, collection.unit)}`, pages);
  if (viewed) drawNeighbors();
}

function pageName({ file, page, seconds }) {
  return `${file}${page ? `, page ${page}` : seconds ? `, ${seconds} s` : ""}`;
}

/** The part of a file's URL that names the page of a document or the segment of a clip. */
function fragment({ page, seconds }) {
  return page ? `#page=${page}` : seconds ? `#t=${seconds.replace("-", ",")}` : "";
}

function drawPage(hit) {
  const name = make("span", { className: "name", textContent: hit.file.split("/").at(-1), title: hit.file });
  const words = make("div", { className: "words" }, name);
  const card = make("li", { className: "page" }, words);
  const onclick = () => viewPage(hit);
  if (hit.has_picture) {
    const image = make("img", { alt: "", loading: "lazy" });
    showThumbnail(image, Object.assign(hit, { thumbnail: `thumbnails/${hit.row}` }), 1);
    card.prepend(make("button", { type: "button", className: "open", ariaLabel: `Show ${pageName(hit)}`, onclick }, image));
  }
  card.classList.toggle("text-only", !hit.has_picture);
  const place = hit.page ? `Page ${hit.page}` : hit.seconds ? `${hit.seconds} s` : "";
  if (place) words.append(make("span", { className: "muted small", textContent: place }));
  if (hit.score !== null) words.append(...drawScores(hit));
  if (hit.unread) words.append(make("p", { className: "unread small", textContent: `Not shown: ${hit.unread}` }));
  if (hit.text) words.append(make("button", { type: "button", className: "open passage", onclick }, ...marked(hit.text)));
  words.append(make("ul", { className: "lines small" }, ...hit.lines.map(drawLine)));
  return card;
}

/** A line of the text layer. */
function drawLine(line) {
  return make("li", {}, ...marked(line));
}

/** The parts of a text, with the words of the question marked. */
function marked(text) {
  const wanted = new Set((query?.text ?? "").toLowerCase().match(/[\p{L}\p{N}_]+/gu));
  const parts = text.split(/([\p{L}\p{N}_]+)/u);
  return parts.map((part) => (wanted.has(part.toLowerCase()) ? make("mark", { textContent: part }) : part));
}

/** Show a page large or play a clip, or show the reason why that cannot be done. */
async function viewPage(hit) {
  viewed = hit;
  byId("viewer-name").textContent = pageName(hit);
  byId("viewer-lines").replaceChildren(...hit.lines.map(drawLine));
  byId("viewer-text").replaceChildren(...marked(hit.text ?? ""));
  drawNeighbors();
  const file = byId("viewer-file");
  file.hidden = hit.text !== null; // a row of a data set is no file
  file.textContent = hit.page ? `Open at page ${hit.page}` : hit.seconds ? `Open at ${hit.seconds} s` : "Open the file";
  file.href = `playground/files/${hit.row}${fragment(hit)}`;
  file.onclick = (event) => key && (event.preventDefault(), openFile(hit)); // a link sends no key
  byId("viewer-image").hidden = true;
  stopClip();
  if (!byId("viewer").open) byId("viewer").showModal();
  byId("viewer-state").textContent = "";
  if (!hit.has_picture) return;
  try {
    await (hit.is_clip ? playClip(hit) : showPicture(hit));
  } catch (error) {
    if (viewed === hit) byId("viewer-state").textContent = error.message;
  }
}

function drawNeighbors() {
  const index = pages.indexOf(viewed);
  byId("viewer-previous").disabled = index < 1;
  byId("viewer-next").disabled = index < 0 || index === pages.length - 1;
}

async function showPicture(hit) {
  const image = byId("viewer-image");
  byId("viewer-state").textContent = `Rendering the ${collection.unit === "row" ? "picture" : "page"}…`;
  const url = await load(`playground/pages/${hit.row}`);
  if (viewed !== hit) return URL.revokeObjectURL(url);
  URL.revokeObjectURL(image.src);
  Object.assign(image, { src: url, alt: pageName(hit), hidden: false });
  byId("viewer-state").textContent = "";
}

/** Play a clip, of a segment only that part. If the browser cannot play it, show its first frame. */
async function playClip(hit) {
  const video = byId("viewer-video");
  byId("viewer-state").textContent = "Loading the clip…";
  const path = `playground/files/${hit.row}`;
  const source = key ? await load(path) : path; // a video sends no key
  if (viewed !== hit) return;
  video.onloadeddata = () => (byId("viewer-state").textContent = "");
  video.onerror = async () => {
    stopClip();
    try {
      await showPicture(hit);
      if (viewed === hit) byId("viewer-state").textContent = "This browser cannot play the clip. This is its first frame.";
    } catch (error) {
      if (viewed === hit) byId("viewer-state").textContent = error.message;
    }
  };
  Object.assign(video, { src: `${source}${fragment(hit)}`, hidden: false });
  video.play().catch(() => {}); // where playing needs another click, the controls are there
}

function stopClip() {
  const video = byId("viewer-video");
  video.onerror = null;
  URL.revokeObjectURL(video.src.split("#")[0]);
  video.removeAttribute("src");
  video.load(); // ends the download
  video.hidden = true;
}

async function openFile(hit) {
  try {
    open(`${await load(`playground/files/${hit.row}`)}${fragment(hit)}`);
  } catch (error) {
    byId("viewer-state").textContent = error.message;
  }
}

/** A URL of the bytes at `path`. Throws the service's error. */
async function load(path) {
  const response = await send(path).catch(() => null);
  if (response?.ok) return URL.createObjectURL(await response.blob());
  const body = await response?.json().catch(() => null);
  throw new ServiceError(body?.error?.message ?? "The service does not respond. Check that it is running.");
}

function listenToViewer() {
  const viewer = byId("viewer");
  byId("viewer-close").onclick = () => viewer.close();
  const step = (by) => pages[pages.indexOf(viewed) + by];
  byId("viewer-previous").onclick = () => viewPage(step(-1));
  byId("viewer-next").onclick = () => viewPage(step(1));
  viewer.onclose = () => (stopClip(), (viewed = null));
  viewer.onclick = (event) => event.target === viewer && viewer.close(); // the area around it
  viewer.onkeydown = ({ key: pressed }) => {
    if (document.activeElement === byId("viewer-video")) return; // its own keys
    if (pressed === "ArrowLeft" && !byId("viewer-previous").disabled) viewPage(step(-1));
    if (pressed === "ArrowRight" && !byId("viewer-next").disabled) viewPage(step(1));
  };
}

// --- the same request as code

function drawRequest() {
  const entries = tab === "compare" ? compared : query ? [query] : [];
  byId("request").hidden = !entries.length || !info;
  if (!entries.length || !info) return;
  const options = {};
  const instruction = tab === "search" ? searchInstruction() : instructionFor(tab);
  if (instruction) options.instruction = instruction;
  if (dimensions < info.hidden_size) options.dimensions = dimensions;
  const language = document.querySelector("input[name=language]:checked").value;
  const url = new URL("embed", document.baseURI).href;
  byId("code").textContent = language === "curl" ? curlCode(url, entries, options) : pythonCode(url, entries, options);
  byId("code-note").hidden = !entries.some((entry) => entry.file);
}

function curlCode(url, entries, options) {
  const plain = (value) => JSON.stringify(value).replace(/[\\$`]/g, "\\$&"); // the shell expands the body
  const path = (name) => `'./${name.replaceAll("'", "'\\''")}'`;
  const image = (name) => `{"image": "$(base64 < ${path(name)} | tr -d '\\n')"}`;
  const items = entries.map((entry) => `    ${entry.file ? image(entry.name) : plain(entry.text)}`).join(",\n");
  const rest = Object.entries(options).map(([name, value]) => `,\n  "${name}": ${plain(value)}`).join("");
  const auth = key ? ` -H "authorization: Bearer $EMBEDDER_API_KEY"` : "";
  return `curl -s '${url}' -H 'content-type: application/json'${auth} --data-binary @- <<JSON\n{\n  "items": [\n${items}\n  ]${rest}\n}\nJSON\n`;
}

function pythonCode(url, entries, options) {
  const plain = (value) => JSON.stringify(value); // a JSON string is a valid Python string
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
    getSelection().selectAllChildren(byId("code")); // the clipboard API requires https
    document.execCommand("copy");
  }
  byId("copy").textContent = "Copied";
  setTimeout(() => (byId("copy").textContent = "Copy"), 1500);
}

// --- tabs, dimensions, drag and drop

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
  if (name === "compare" && info) openCompare();
  drawRequest();
}

function openCompare() {
  drawScrollHint();
  if (example !== "unseen") return;
  example = "over";
  info.roles.includes("embedder") ? showExample() : drawCompare();
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

function addImages(files) {
  if (!files.length || !info) return;
  if (tab === "compare") addEntries(files);
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
    if (text.trim() && info) addEntries([text]);
    byId("text").value = "";
    byId("text").focus();
  };
  byId("search-form").onsubmit = (event) => {
    event.preventDefault();
    if (byId("query").value.trim()) searchFor(byId("query").value);
  };
  for (const id of ["images", "query-image"]) {
    byId(id).onchange = (event) => {
      addImages([...event.target.files]);
      event.target.value = ""; // allow the same file again
    };
  }
  byId("example").onclick = () => info && showExample();
  addEventListener("resize", drawScrollHint);
  byId("compare-instruction").onchange = compareAgain;
  byId("search-instruction").onchange = searchAgain;
  byId("rerank").onchange = drawResults;
  byId("more-results").onclick = () => {
    numShown += 2 * RESULTS_AT_ONCE;
    drawResults();
  };
  byId("copy").onclick = copyCode;
  for (const input of document.querySelectorAll("input[name=language]")) input.onchange = drawRequest;
  listenForDrops();
  listenToViewer();
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
    addImages([...event.dataTransfer.files]);
  });
  document.addEventListener("paste", (event) => {
    const images = [...(event.clipboardData?.files ?? [])];
    if (images.length) event.preventDefault();
    addImages(images);
  });
}

// --- start

async function start() {
  try {
    await ask("health");
    info = await ask("info");
  } catch (error) {
    byId("banner").textContent = `${error.message} Retrying every 2 seconds.`;
    byId("banner").hidden = false;
    setTimeout(start, 2000);
    return;
  }
  for (const id of ["bar", "main"]) byId(id).hidden = false;
  byId("banner").hidden = true;
  const name = info.is_bundled_model ? "Bundled demo model" : info.model;
  const judge = info.reranker ? `; reranker ${info.reranker.model}` : "";
  byId("model").replaceChildren(make("strong", { textContent: name }), `, ${info.hidden_size} dimensions, on ${info.device}${judge}`);
  byId("limits").textContent =
    `Limits: ${MAX_ENTRIES} items; images of up to ${megabytes(info.limits.max_image_bytes)} and ` +
    `${(info.limits.max_image_pixels / 1e6).toLocaleString("en")} megapixels.`;
  for (const id of ["compare-instruction", "search-instruction"]) byId(id).placeholder = info.default_instruction;
  drawDimensions();
  openTab(tab);
}

if (location.hash === "#search") tab = "search";
listen();
start();
