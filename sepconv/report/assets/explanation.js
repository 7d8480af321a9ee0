// The controls of the explanation, and the panels that follow them.

const SHOWN_CHANNELS = 8;
const SHOWN_TERMS = 10;
const byId = (id) => document.getElementById(id);
const state = {layer: null, k: 0, row: 0, column: 0, channel: 0, hidden: 0};

function chooseLayer(index) {
  const {layers} = state.data;
  state.layer = state.unpacked[index] ??= unpack(layers[index]);
  state.hiddenMaps = state.depthwise[index] ??= depthwiseMaps(state.layer);
  const {layer} = state;
  byId("channel").replaceChildren(...layer.channels.map((o, k) => element("option", {value: k}, `${o} of ${layer.out_channels}`)));
  byId("row").max = layer.height - 1;
  byId("column").max = layer.width - 1;
  const style = byId("lab").style;
  for (const [name, size] of Object.entries({height: layer.height, width: layer.width, "input-height": layer.input_height, "input-width": layer.input_width})) {
    style.setProperty(`--${name}`, size);
  }
  style.setProperty("--step-down", layer.stride[0]);
  style.setProperty("--step-right", layer.stride[1]);
  style.setProperty("--patch-height", layer.dilation[0] * (layer.kernel[0] - 1) + 1);
  style.setProperty("--patch-width", layer.dilation[1] * (layer.kernel[1] - 1) + 1);
  showWindow(layer);
  byId("reduce").hidden = !layer.reduce_weight;
  setCounter(layer.kernel[0], layer.in_channels, layer.out_channels, layer.reduce_weight ? layer.hidden_channels : layer.depth_multiplier);
  computeChannel(0);
  startWhereMostHappens();
  drawWords();
  drawMaps();
}

// In the middle of an image a channel is often 0, and nine products of 0 explain nothing.
function startWhereMostHappens() {
  const {values} = state.parts[state.channel];
  const pixel = values.reduce((best, value, i) => (Math.abs(value) > Math.abs(values[best]) ? i : best), 0);
  state.row = Math.floor(pixel / state.layer.width);
  state.column = pixel % state.layer.width;
}

function showWindow({window: shown, output_size: [height, width]}) {
  const style = byId("lab").style;
  style.setProperty("--window-top", `${(100 * shown.top) / height}%`);
  style.setProperty("--window-left", `${(100 * shown.left) / width}%`);
  style.setProperty("--window-height", `${(100 * shown.height) / height}%`);
  style.setProperty("--window-width", `${(100 * shown.width) / width}%`);
}

function chooseChannel(k) {
  computeChannel(k);
  drawWords();
  drawMaps();
}

function computeChannel(k) {
  const {layer} = state;
  state.k = k;
  byId("channel").value = k;
  state.parts = contributions(layer, k);
  state.normal = addMaps(layer, state.parts, layer.normal_bias[k]);
  state.separable = pointwiseMap(layer, state.hiddenMaps, k);
  state.difference = difference(state.separable, state.normal);
  const energies = state.parts.map(energy);
  state.shown = splitTerms(energies, SHOWN_CHANNELS).shown;
  state.channel = state.shown.reduce((best, c) => (energies[c] > energies[best] ? c : best), state.shown[0]);
  state.shownHidden = shownHidden(layer, k);
  state.hidden = layer.reduce_weight ? strongest(layer, k, state.shownHidden) : state.channel * layer.depth_multiplier;
}

// Those of the channels shown above; channels of a bottleneck come from all of them: those that matter most to the output.
function shownHidden(layer, k) {
  const m = layer.depth_multiplier;
  if (!layer.reduce_weight) return state.shown.flatMap((c) => Array.from({length: m}, (_, i) => c * m + i));
  return splitTerms(state.hiddenMaps.map((_, h) => Math.sqrt(hiddenEnergy(layer, k, h))), SHOWN_CHANNELS).shown;
}

function hiddenEnergy(layer, k, h) {
  return layer.pointwise_weight[k * layer.hidden_channels + h] ** 2 * energy(state.hiddenMaps[h]);
}

function strongest(layer, k, hidden) {
  return hidden.reduce((best, h) => (hiddenEnergy(layer, k, h) > hiddenEnergy(layer, k, best) ? h : best), hidden[0]);
}

function drawWords() {
  const {layer} = state;
  const {in_channels: c, out_channels: o, depth_multiplier: m, hidden_channels: h} = layer;
  const size = layer.kernel.join("×");
  const part = layer.height < layer.output_size[0] || layer.width < layer.output_size[1];
  const folded = layer.batch_norm ? " Batch normalisation is folded into weights and bias, as for inference." : "";
  byId("layer-words").textContent =
    `${layer.name}: ${size} filters, ${c} channels in, ${o} out; its output has ${layer.output_size.join("×")} pixels` +
    (part ? `, of which the middle ${layer.height}×${layer.width} are shown (the frame in the image).` : ".") + folded;
  byId("normal-words").textContent =
    `Each of the ${c} input channels has a ${size} filter of its own; the ${c} results are added pixel by pixel and give one map, ` +
    `output channel ${layer.channels[state.k]}. All of this happens ${o} times, once per output channel, with new filters each time.`;
  byId("reduce-words").textContent =
    `At one pixel the ${c} channels are a list of ${c} numbers. Each of the ${h} channels between is this list times a row of ${c} weights, ` +
    `the same at every pixel: ${c} channels in, ${h} out${h < c ? ", fewer than before" : ""}.`;
  byId("depthwise-words").textContent =
    `The ${layer.reduce_weight ? `${h} mixtures` : `same ${c} channels`}, ${m === 1 ? "one filter" : `${m} filters`} each, and no addition: ` +
    `${layer.reduce_weight ? h : c} channels in, ${h} maps out, used for all output channels.`;
  byId("pointwise-words").textContent =
    `At one pixel the ${h} maps are a list of ${h} numbers. Output channel ${layer.channels[state.k]} is this list times a row of ${h} weights: ` +
    `one neuron of a fully connected layer with ${h} inputs and ${o} outputs${o < h ? ", fewer than it takes in" : ""}, the same at every pixel.`;
}

function tile(name, views, selected) {
  const button = element("button", {type: "button", class: "tile", "aria-pressed": selected}, ...views, element("span", {class: "name"}, name));
  return element("li", {}, button);
}

function drawMaps() {
  const {layer, k, shown, parts} = state;
  readColours();
  const m = layer.depth_multiplier;
  const inputLimit = largest(layer.input);
  const filterLimit = largest(...shown.map((c) => normalFilter(layer, k, c)));
  const partLimit = largest(...parts.map((map) => map.values));
  const tiles = shown.map((c) => {
    const views = [inputView(layer, layer.input, c, inputLimit), filterView(layer, normalFilter(layer, k, c), filterLimit), mapView(parts[c], partLimit, "output")];
    const made = tile(`channel ${c}`, views, c === state.channel);
    made.firstChild.addEventListener("click", () => selectChannel(c, layer.reduce_weight ? state.hidden : c * m));
    made.dataset.channel = c;
    return made;
  });
  const others = layer.in_channels - shown.length;
  if (others > 0) {
    const rest = addMaps(layer, parts.filter((_, c) => !shown.includes(c)), 0);
    const view = mapView(rest, Math.max(partLimit, largest(rest.values)), "output");
    tiles.push(element("li", {class: "tile rest"}, view, element("span", {class: "name"}, `${others} others,\nadded`)));
  }
  byId("normal-tiles").replaceChildren(...tiles);
  drawReduction();
  drawDepthwise(layer.reduce_weight ? largest(layer.depthwise_input) : inputLimit);
  drawResults();
  drawPixel();
}

function drawDepthwise(inputLimit) {
  const {layer, hiddenMaps, shownHidden: hidden} = state;
  const m = layer.depth_multiplier;
  const zLimit = largest(...hidden.map((h) => hiddenMaps[h].values));
  const wLimit = largest(...hidden.map((h) => depthwiseFilter(layer, h)));
  byId("depthwise-tiles").replaceChildren(...hidden.map((h) => {
    const c = Math.floor(h / m);
    const views = [inputView(layer, layer.depthwise_input, c, inputLimit), filterView(layer, depthwiseFilter(layer, h), wLimit), mapView(hiddenMaps[h], zLimit, "output")];
    const name = layer.reduce_weight ? `mixture ${h}` : `channel ${c}`;
    const made = tile(m === 1 ? name : `${name}\nfilter ${h % m}`, views, h === state.hidden);
    made.firstChild.addEventListener("click", () => selectChannel(layer.reduce_weight ? state.channel : c, h));
    made.dataset.hidden = h;
    return made;
  }));
}

// The chosen mixture: each channel times its weight, those that matter most alone, the others added.
function drawReduction() {
  const {layer, hidden} = state;
  if (!layer.reduce_weight) return;
  const parts = weighted(layer, hidden);
  const {shown} = splitTerms(parts.map((map) => Math.sqrt(energy(map))), SHOWN_CHANNELS);
  const others = parts.filter((_, c) => !shown.includes(c));
  const rest = {...parts[0], values: parts[0].values.map((_, i) => total(others.map((map) => map.values[i])))};
  const limit = largest(...shown.map((c) => parts[c].values), rest.values);
  const tiles = shown.map((c) => element("li", {class: "tile"}, mapView(parts[c], limit, "input"), element("span", {class: "name"}, `channel ${c}\n× ${figures(layer.reduce_weight[hidden * layer.in_channels + c])}`)));
  if (others.length) tiles.push(element("li", {class: "tile rest"}, mapView(rest, limit, "input"), element("span", {class: "name"}, `${others.length} others,\nadded`)));
  byId("reduce-tiles").replaceChildren(...tiles);
  const mixture = inputView(layer, layer.depthwise_input, hidden, largest(layer.depthwise_input));
  byId("reduce-map").replaceChildren(element("div", {class: "big"}, mixture), element("p", {class: "name"}, `mixture ${hidden}`));
}

function bigMap(map, limit, name) {
  const view = mapView(map, limit, "output");
  return element("button", {type: "button", class: "big", "aria-label": `${name}: arrow keys move the pixel`}, view);
}

function drawResults() {
  const {layer, normal, separable, difference: off} = state;
  const limit = largest(normal.values, separable.values);
  byId("normal-map").replaceChildren(
    bigMap(normal, limit, `Output channel ${layer.channels[state.k]}`),
    element("p", {class: "name"}, `output channel ${layer.channels[state.k]}`),
  );
  const named = [["normal", normal], ["separable", separable], ["separable − normal", off]];
  byId("compare").replaceChildren(...named.map(([name, map]) => {
    const value = element("p", {class: "name"}, `${name}: `, element("span", {class: "value"}));
    return element("div", {"data-map": name}, bigMap(map, limit, name), value);
  }));
  const relative = Math.sqrt(energy(off) / (energy(normal) || 1));
  byId("compare-words").replaceChildren(
    "The same input, the same output channel, computed both ways. Over all pixels shown, the difference is ",
    element("data", {value: relative, id: "relative-error"}, `${figures(100 * relative)} %`),
    " of the normal map (root of the sum of squares).",
  );
}

function selectChannel(channel, hidden) {
  state.channel = channel;
  state.hidden = hidden;
  markTiles();
  drawReduction();
  drawPixel();
}

function markTiles() {
  for (const li of byId("normal-tiles").children) li.firstChild.setAttribute?.("aria-pressed", Number(li.dataset.channel) === state.channel);
  for (const li of byId("depthwise-tiles").children) li.firstChild.setAttribute("aria-pressed", Number(li.dataset.hidden) === state.hidden);
}

// Everything that depends on the pixel.
function drawPixel() {
  const {layer, k, row, column, channel, hidden} = state;
  const pixel = row * layer.width + column;
  for (const id of ["row", "column"]) {
    byId(id).value = state[id];
    byId(`${id}-value`).textContent = state[id];
    byId("lab").style.setProperty(`--${id}`, state[id]);
  }
  const at = `at row ${row}, column ${column}`;
  const normalTerms = products(layer, layer.input, channel, normalFilter(layer, k, channel), row, column);
  byId("normal-products").replaceChildren(...productGrid(layer, normalTerms, `Channel ${channel} ${at}`, 0));
  if (layer.reduce_weight) byId("reduce-products").replaceChildren(...sumTable("channel", reduction(layer, hidden, row, column), SHOWN_TERMS));
  const depthwiseTerms = products(layer, layer.depthwise_input, Math.floor(hidden / layer.depth_multiplier), depthwiseFilter(layer, hidden), row, column);
  byId("depthwise-products").replaceChildren(...productGrid(layer, depthwiseTerms, `Map ${hidden} ${at}`, layer.depthwise_bias[hidden]));
  drawAddition(pixel);
  drawMixture(pixel);
  const maps = {normal: state.normal, separable: state.separable, "separable − normal": state.difference};
  for (const box of byId("compare").children) box.querySelector(".value").replaceChildren(datum(maps[box.dataset.map].values[pixel]));
  byId("spoken").textContent = `${at}: normal ${figures(state.normal.values[pixel])}, separable ${figures(state.separable.values[pixel])}`;
}

function drawAddition(pixel) {
  const {layer, k, shown, parts} = state;
  const terms = shown.map((c) => element("span", {class: c === state.channel ? "term current" : "term"}, datum(parts[c].values[pixel], {"data-channel": c}), element("small", {}, `channel ${c}`)));
  const others = parts.filter((_, c) => !shown.includes(c)).map((map) => map.values[pixel]);
  if (others.length) terms.push(element("span", {class: "term"}, datum(total(others), {class: "others"}), element("small", {}, `${others.length} others`)));
  terms.push(element("span", {class: "term"}, datum(layer.normal_bias[k], {class: "bias"}), element("small", {}, "bias")));
  const joined = terms.flatMap((term, i) => (i ? [" + ", term] : [term]));
  byId("normal-sum").replaceChildren(...joined, " = ", element("span", {class: "term result"}, datum(state.normal.values[pixel], {class: "result"}), element("small", {}, "output")));
}

function drawMixture(pixel) {
  const {layer, k, hiddenMaps} = state;
  const terms = mixture(layer, hiddenMaps, k, pixel);
  const {shown} = splitTerms(terms.map((term) => term.product), SHOWN_TERMS);
  const outputs = layer.channels.map((_, i) => layer.pointwise_bias[i] + total(mixture(layer, hiddenMaps, i, pixel).map((term) => term.product)));
  byId("network").replaceChildren(networkView(layer, terms, shown, k, outputs));
  byId("pointwise-products").replaceChildren(...sumTable("map", terms, SHOWN_TERMS, layer.pointwise_bias[k]));
}

function choosePixel(row, column) {
  const {layer} = state;
  const next = [Math.min(Math.max(row, 0), layer.height - 1), Math.min(Math.max(column, 0), layer.width - 1)];
  if (next[0] === state.row && next[1] === state.column) return;
  [state.row, state.column] = next;
  drawPixel();
}

// The output pixel under the pointer; on an input map the one whose patch has its middle there.
function pointedPixel(map, event) {
  const {layer} = state;
  const box = map.getBoundingClientRect();
  const y = (event.clientY - box.top) / box.height;
  const x = (event.clientX - box.left) / box.width;
  if (!map.classList.contains("input")) return [Math.floor(y * layer.height), Math.floor(x * layer.width)];
  const place = (share, size, d) => Math.round((share * size - (layer.dilation[d] * (layer.kernel[d] - 1) + 1) / 2) / layer.stride[d]);
  return [place(y, layer.input_height, 0), place(x, layer.input_width, 1)];
}

function followPointer(event) {
  const map = event.target.closest(".map");
  if (map) choosePixel(...pointedPixel(map, event));
}

const ARROWS = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]};

function followKeys(event) {
  const step = ARROWS[event.key];
  if (!step || !event.target.querySelector(".map")) return;
  event.preventDefault();
  choosePixel(state.row + step[0], state.column + step[1]);
}

function setCounter(...values) {
  ["k", "c", "o", "m"].forEach((id, i) => {
    const slider = byId(id);
    slider.max = Math.max(slider.max, values[i]);
    if (id === "k" && values[i] % 2 === 0) slider.step = 1;
    slider.value = values[i];
  });
  countMultiplications();
}

function countMultiplications() {
  const [k, c, o, m] = ["k", "c", "o", "m"].map((id) => Number(byId(id).value));
  for (const id of ["k", "c", "o", "m"]) byId(id).nextElementSibling.textContent = byId(id).value;
  const bottleneck = "bottleneck" in byId("counter").dataset;
  const found = multiplications(k, c, o, m, bottleneck);
  const longest = Math.max(found.normal, found.separable);
  for (const side of ["normal", "separable"]) {
    byId(`count-${side}`).replaceChildren(element("data", {value: found[side]}, counted(found[side])));
    byId(`bar-${side}`).style.setProperty("--share", `${(100 * found[side]) / longest}%`);
  }
  const ratio = found.separable / found.normal;
  byId("count-ratio").replaceChildren(element("data", {value: ratio}, ratio <= 1 ? `1/${(1 / ratio).toFixed(1)}` : `${ratio.toFixed(1)}×`));
  byId("count-formula").textContent = bottleneck
    ? `bottleneck / normal = R · (C + k² + O) / (k² · C · O) = ${m} · (${c} + ${k * k} + ${o}) / (${k * k} · ${c} · ${o}) = ${figures(ratio)}`
    : `separable / normal = M · (1/O + 1/k²) = ${m} · (1/${o} + 1/${k * k}) = ${figures(ratio)}`;
}

function openLab(data) {
  Object.assign(state, {data, unpacked: [], depthwise: []});
  byId("image").src = data.image.png;
  byId("image").alt = data.image.label ? `The image: ${data.image.label}` : "The image";
  byId("image-words").textContent = data.image.label ? `The image, ${data.image.label}. The dot is the chosen pixel.` : "The image. The dot is the chosen pixel.";
  byId("layer").replaceChildren(...data.layers.map((layer, i) => element("option", {value: i}, layer.name)));
  byId("lab").hidden = false;
  byId("layer").addEventListener("change", (event) => chooseLayer(Number(event.target.value)));
  byId("channel").addEventListener("change", (event) => chooseChannel(Number(event.target.value)));
  byId("row").addEventListener("input", (event) => choosePixel(Number(event.target.value), state.column));
  byId("column").addEventListener("input", (event) => choosePixel(state.row, Number(event.target.value)));
  for (const kind of ["pointermove", "pointerdown"]) byId("lab").addEventListener(kind, followPointer);
  byId("lab").addEventListener("keydown", followKeys);
  document.addEventListener("theme", drawMaps);
  chooseLayer(0);
}

for (const id of ["k", "c", "o", "m"]) byId(id).addEventListener("input", countMultiplications);
countMultiplications();
if (byId("explanation-data")) {
  // The result is on the screen before the first layer is computed.
  addEventListener("load", () => setTimeout(() => openLab(JSON.parse(byId("explanation-data").textContent))));
}
