// Maps and filters as pictures: orange is negative, blue positive, the page's own colour zero.

const MINUS = "−";

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function svg(tag, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function figures(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  const written = size >= 1000 || size < 0.001 ? value.toExponential(1) : value.toPrecision(3).replace(/(\.\d*?)0+$/, "$1").replace(/\.$/, "");
  return written.replace("-", MINUS);
}

function counted(value) {
  return value.toLocaleString("en");
}

// A number with three figures for people and all of them for machines.
function datum(value, attributes = {}) {
  return element("data", {...attributes, value}, figures(value));
}

function colourOf(selector) {
  return getComputedStyle(document.querySelector(selector)).backgroundColor.match(/[\d.]+/g).slice(0, 3).map(Number);
}

const STEPS = 127;
let colours;

// Red, green and blue of every shade from the most negative value (0) over zero (STEPS) to the most positive.
function readColours() {
  const [minus, zero, plus] = [".minus", ".zero", ".plus"].map((end) => colourOf(`.scale ${end}`));
  colours = new Uint8Array(3 * (2 * STEPS + 1));
  for (let shade = -STEPS; shade <= STEPS; shade++) {
    const share = (Math.abs(shade) / STEPS) ** 0.8;
    const end = shade < 0 ? minus : plus;
    for (let i = 0; i < 3; i++) colours[3 * (shade + STEPS) + i] = Math.round(zero[i] + share * (end[i] - zero[i]));
  }
}

// Where the colour of a value starts; what is no number is drawn like zero.
function shadeOf(value, limit) {
  const shade = Math.round((STEPS * value) / limit) || 0;
  return 3 * (Math.min(Math.max(shade, -STEPS), STEPS) + STEPS);
}

function colour(value, limit) {
  const start = shadeOf(value, limit);
  return `rgb(${colours.subarray(start, start + 3).join(" ")})`;
}

function largest(...arrays) {
  let limit = 0;
  for (const values of arrays) {
    for (let i = 0; i < values.length; i++) limit = Math.max(limit, Math.abs(values[i]) || 0);
  }
  return limit;
}

function picture(height, width, values, limit) {
  const canvas = element("canvas", {height, width, "aria-hidden": "true"});
  const context = canvas.getContext("2d");
  const image = context.createImageData(width, height);
  for (let i = 0; i < height * width; i++) {
    const start = shadeOf(values[i], limit);
    for (let c = 0; c < 3; c++) image.data[4 * i + c] = colours[start + c];
    image.data[4 * i + 3] = 255;
  }
  context.putImageData(image, 0, 0);
  return canvas;
}

// A picture on which pixels can be chosen; its cursor stands where the style's variables say.
function mapView(map, limit, kind) {
  return element("span", {class: `map ${kind}`}, picture(map.height, map.width, map.values, limit));
}

function inputView(layer, input, channel, limit) {
  const size = layer.input_height * layer.input_width;
  const values = input.subarray(channel * size, (channel + 1) * size);
  return mapView({height: layer.input_height, width: layer.input_width, values}, limit, "input");
}

function filterView(layer, filter, limit) {
  return element("span", {class: "filter"}, picture(layer.kernel[0], layer.kernel[1], filter, limit));
}

// The grid of products of one filter at one pixel, and their sum.
function productGrid(layer, terms, title, bias) {
  const limit = largest(terms.map((term) => term.product));
  const grid = element("div", {class: "grid", style: `--columns: ${layer.kernel[1]}`});
  for (const {x, weight, product} of terms) {
    const factors = element("small", {}, datum(x, {class: "x"}), " × ", datum(weight, {class: "weight"}));
    grid.append(element("div", {class: "cell", style: `background: ${colour(product, 2.5 * limit)}`}, factors, datum(product, {class: "product"})));
  }
  const sum = total(terms.map((term) => term.product));
  const words = element("p", {class: "subtotal"}, `${terms.length} products added: `, datum(sum, {class: "sum"}));
  if (bias) words.append(` + bias `, datum(bias, {class: "bias"}), " = ", datum(sum + bias, {class: "with-bias"}));
  return [element("p", {class: "title"}, title), grid, words];
}

// A row of a long sum: its largest terms, what is left of the others, and the bias.
function splitTerms(terms, count) {
  const order = terms.map((_, i) => i).sort((a, b) => Math.abs(terms[b]) - Math.abs(terms[a]) || a - b);
  const shown = order.slice(0, count).sort((a, b) => a - b);
  const rest = order.slice(count);
  return {shown, rest: rest.length, remainder: total(rest.map((i) => terms[i]))};
}

// A table of a long sum: its largest terms, what is left of the others, and the bias if it has one.
function sumTable(name, terms, count, bias) {
  const {shown, rest, remainder} = splitTerms(terms.map((term) => term.product), count);
  const head = [name, "value", "weight", "product"].map((title) => element("th", {scope: "col"}, title));
  const rows = shown.map((i) => {
    const cells = ["x", "weight", "product"].map((part) => element("td", {}, datum(terms[i][part], {class: part})));
    return element("tr", {"data-hidden": i}, element("th", {scope: "row"}, `${i}`), ...cells);
  });
  const sum = total(terms.map((term) => term.product)) + (bias ?? 0);
  const lines = [["bias", bias, "bias"], ["sum", sum, "result"]].slice(bias === undefined ? 1 : 0);
  if (rest) lines.unshift([`${rest} others`, remainder, "others"]);
  for (const [title, value, kind] of lines) {
    rows.push(element("tr", {class: kind}, element("th", {scope: "row", colspan: 3}, title), element("td", {}, datum(value, {class: kind}))));
  }
  return [element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...rows)];
}

// The pixel's channels on the left, the kept output channels on the right, one line a weight.
function networkView(layer, terms, shown, selected, outputs) {
  const rows = shown.length;
  const others = terms.length - rows;
  const height = Math.max(rows, layer.channels.length) * 26 + 50;
  const y = (i, n) => 34 + ((height - 50) * (i + 0.5)) / n;
  const limit = largest(layer.pointwise_weight);
  const view = svg("svg", {viewBox: `0 0 400 ${height + (others ? 12 : 0)}`, role: "img", "aria-label": "The pixel's channels, connected with the output channels"});
  view.append(svg("text", {x: 70, y: 16, "text-anchor": "middle"}, `${layer.hidden_channels} in`));
  view.append(svg("text", {x: 320, y: 16, "text-anchor": "middle"}, `${layer.out_channels} out`));
  if (others) view.append(svg("text", {x: 70, y: height + 6, "text-anchor": "middle"}, `and ${others} others`));
  layer.channels.forEach((_, k) => {
    if (k !== selected) drawEdges(view, layer, shown, k, y, limit, 0.16);
  });
  drawEdges(view, layer, shown, selected, y, limit, 1);
  const inputs = largest(shown.map((h) => terms[h].x));
  shown.forEach((h, i) => view.append(...node(70, y(i, rows), terms[h].x, inputs, `${h}`, "end")));
  const results = largest(outputs);
  layer.channels.forEach((o, k) => {
    view.append(...node(320, y(k, layer.channels.length), outputs[k], results, `${o}`, "start", k === selected));
  });
  return view;
}

function drawEdges(view, layer, shown, k, y, limit, opacity) {
  shown.forEach((h, i) => {
    const weight = layer.pointwise_weight[k * layer.hidden_channels + h];
    const stroke = weight < 0 ? "var(--minus)" : "var(--accent)";
    const width = 0.5 + (4.5 * Math.abs(weight)) / (limit || 1);
    view.append(svg("line", {x1: 78, y1: y(i, shown.length), x2: 311, y2: y(k, layer.channels.length), stroke, "stroke-width": width, opacity}));
  });
}

function node(x, y, value, limit, name, anchor, selected = false) {
  const side = anchor === "end" ? -14 : 14;
  const circle = svg("circle", {cx: x, cy: y, r: selected ? 10 : 8, fill: colour(value, limit), class: selected ? "selected" : ""});
  return [circle, svg("text", {x: x + side, y: y + 4, "text-anchor": anchor}, name)];
}
