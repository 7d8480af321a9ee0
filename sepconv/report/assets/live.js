// Networks of the run, at work in this page on what the reader draws or on an image file of his.

const TIMED_MS = 60;
const ANSWERS = 3;

const live = {};

function liveImage() {
  const {channels, size} = live.input;
  const shown = byId("seen");
  shown.width = shown.height = size;
  const data = new ImageData(size, size);
  for (let i = 0; i < size * size; i++) {
    for (let c = 0; c < 3; c++) data.data[4 * i + c] = live.pixels[i * channels + (channels === 3 ? c : 0)];
    data.data[4 * i + 3] = 255;
  }
  shown.getContext("2d").putImageData(data, 0, 0);
}

function answerOf(network) {
  const shares = probabilities(network.scores(live.pixels));
  const best = shares.map((share, i) => ({share, name: live.classes[i]})).sort((a, b) => b.share - a.share);
  millisecondsOf(() => network.scores(live.pixels), TIMED_MS);
  return {best, ms: millisecondsOf(() => network.scores(live.pixels), TIMED_MS)};
}

function showAnswer(network, {best, ms}) {
  const style = network.name === "normal" ? "normal" : "separable";
  const rows = best.slice(0, ANSWERS).flatMap(({name, share}) => {
    const bar = element("span", {class: `bar ${style}`});
    bar.style.setProperty("--share", `${(100 * share).toFixed(3)}%`);
    const number = element("data", {value: share}, `${(100 * share).toFixed(1)} %`);
    return [element("dt", {}, name), element("dd", {}, number, bar)];
  });
  const time = element("p", {class: "note"}, element("data", {class: "ms", value: ms}, `${figures(ms)} ms`), " an image");
  const heading = element("h3", {}, network.name + (network.precision === "float32" ? "" : `, ${network.precision}`));
  const card = element("article", {class: "card", "data-network": network.symbol}, heading);
  card.append(element("p", {class: "change"}, best[0].name), element("dl", {class: "pair"}, ...rows), time);
  byId("live-answers").append(card);
}

function answer(pixels, words) {
  live.pixels = pixels;
  liveImage();
  byId("seen-words").textContent = words;
  byId("live-answers").replaceChildren();
  for (const network of live.networks) showAnswer(network, answerOf(network));
}

function answerTo(data, words) {
  answer(prepared(data, live.input).values, words);
}

async function readFile(file) {
  byId("live-fault").textContent = "";
  try {
    const image = await createImageBitmap(file, {premultiplyAlpha: "none", colorSpaceConversion: "none"});
    const canvas = element("canvas", {width: image.width, height: image.height});
    const context = canvas.getContext("2d");
    context.drawImage(image, 0, 0);
    answerTo(context.getImageData(0, 0, image.width, image.height), file.name);
  } catch {
    byId("live-fault").textContent = `${file.name} is not an image that this browser can read.`;
  }
}

// Drawing: the ink is as bright against its ground as it is in the images that the networks were trained on.
const paper = {lines: []};

function clearPaper() {
  paper.lines = [];
  const context = byId("paper").getContext("2d");
  context.fillStyle = live.ink.dark ? "#fff" : "#000";
  context.fillRect(0, 0, context.canvas.width, context.canvas.height);
}

function drawLine(event) {
  const canvas = byId("paper");
  const place = canvas.getBoundingClientRect();
  const at = [event.clientX - place.left, event.clientY - place.top].map((x) => (x * canvas.width) / place.width);
  const last = paper.lines.at(-1);
  const context = canvas.getContext("2d");
  Object.assign(context, {lineWidth: canvas.width / 9, lineCap: "round", strokeStyle: live.ink.dark ? "#000" : "#fff"});
  context.beginPath();
  context.moveTo(...(last.at(-1) ?? at));
  context.lineTo(...at);
  context.stroke();
  last.push(at);
}

// The part of the paper that the ink is on, with as much ground around it as the networks are used to.
function framed() {
  const canvas = byId("paper");
  const points = paper.lines.flat();
  const [x, y] = [0, 1].map((i) => points.map((point) => point[i]));
  const pen = canvas.width / 9;
  const ends = [x, y].map((values) => [Math.min(...values) - pen / 2, Math.max(...values) + pen / 2]);
  const side = Math.max(...ends.map(([low, high]) => high - low)) / live.ink.share;
  const [left, top] = ends.map(([low, high]) => (low + high - side) / 2);
  const frame = element("canvas", {width: canvas.width, height: canvas.height});
  const context = frame.getContext("2d");
  context.fillStyle = live.ink.dark ? "#fff" : "#000";
  context.fillRect(0, 0, frame.width, frame.height);
  context.drawImage(canvas, left, top, side, side, 0, 0, frame.width, frame.height);
  return context.getImageData(0, 0, frame.width, frame.height);
}

function openPaper() {
  const canvas = byId("paper");
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    paper.lines.push([]);
    drawLine(event);
  });
  canvas.addEventListener("pointermove", (event) => event.buttons && paper.lines.length && drawLine(event));
  canvas.addEventListener("pointerup", () => paper.lines.length && answerTo(framed(), "your drawing"));
  byId("clear").addEventListener("click", clearPaper);
  byId("drawing").hidden = false;
  clearPaper();
}

function openFiles() {
  const place = byId("live");
  byId("file").addEventListener("change", (event) => event.target.files[0] && readFile(event.target.files[0]));
  place.addEventListener("dragover", (event) => event.preventDefault());
  place.addEventListener("drop", (event) => {
    event.preventDefault();
    if (event.dataTransfer.files[0]) readFile(event.dataTransfer.files[0]);
  });
}

async function openLive(found) {
  Object.assign(live, found);
  live.networks = await Promise.all(found.networks.map(networkOf));
  byId("live").hidden = byId("live-link").hidden = false;
  openFiles();
  if (live.ink) openPaper();
  const {pixels, label} = found.example;
  answer(bytesOf(pixels), label ? `an image of the test set: ${label}` : "an image of the test set");
}

// Where there is no WebAssembly, or none with vectors, the page is what it is without this part.
function withoutVectors(error) {
  if (!(error instanceof WebAssembly.CompileError)) throw error;
}

if (byId("live-data") && typeof WebAssembly === "object") {
  addEventListener("load", () => setTimeout(() => openLive(JSON.parse(byId("live-data").textContent)).catch(withoutVectors)));
}
