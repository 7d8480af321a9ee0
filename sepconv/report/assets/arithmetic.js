// The arithmetic of the explanation. A map is {height, width, values}, a layer the object that explanation.json holds.

const ACTIVATIONS = {
  "": (x) => x,
  relu: (x) => Math.max(x, 0),
  relu6: (x) => Math.min(Math.max(x, 0), 6),
  silu: (x) => x / (1 + Math.exp(-x)),
  hardswish: (x) => (x * Math.min(Math.max(x + 3, 0), 6)) / 6,
  sigmoid: (x) => 1 / (1 + Math.exp(-x)),
  gelu: (x) => 0.5 * x * (1 + erf(x / Math.SQRT2)),
  gelu_tanh: (x) => 0.5 * x * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3))),
};

// The error function by a series of positive terms (Abramowitz & Stegun 1964, 7.1.6); beyond 6 it is 1 in float64.
function erf(x) {
  if (Math.abs(x) > 6) return Math.sign(x);
  let term = x;
  let sum = x;
  for (let n = 1; Math.abs(term) > 1e-17 * Math.abs(sum); n++) {
    term *= (2 * x * x) / (2 * n + 1);
    sum += term;
  }
  return (2 / Math.sqrt(Math.PI)) * Math.exp(-x * x) * sum;
}

// Base64 of little-endian float32, which is also the order of every machine that browsers run on.
function floats(base64) {
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return new Float32Array(bytes.buffer);
}

// A layer as it is computed with: arrays instead of base64, and the sizes of its padded input.
function unpack(stored) {
  const layer = {...stored};
  for (const name of ["input", "normal_weight", "normal_bias", "depthwise_weight", "depthwise_bias", "pointwise_weight", "pointwise_bias"]) {
    layer[name] = floats(stored[name]);
  }
  layer.height = stored.window.height;
  layer.width = stored.window.width;
  layer.taps = stored.kernel[0] * stored.kernel[1];
  layer.hidden_channels = layer.depthwise_bias.length;
  layer.input_height = (layer.height - 1) * stored.stride[0] + stored.dilation[0] * (stored.kernel[0] - 1) + 1;
  layer.input_width = (layer.width - 1) * stored.stride[1] + stored.dilation[1] * (stored.kernel[1] - 1) + 1;
  layer.reduce_weight = stored.reduce_weight ? floats(stored.reduce_weight) : null;
  layer.depthwise_input = layer.reduce_weight ? reduced(layer) : layer.input;
  return layer;
}

// The first convolution of a bottleneck: mixtures of the padded input's channels.
function reduced(layer) {
  const size = layer.input_height * layer.input_width;
  const found = new Float64Array(layer.hidden_channels * size);
  for (let r = 0; r < layer.hidden_channels; r++) {
    const sum = found.subarray(r * size, (r + 1) * size);
    for (let c = 0; c < layer.in_channels; c++) {
      const weight = layer.reduce_weight[r * layer.in_channels + c];
      for (let i = 0; i < size; i++) sum[i] += weight * layer.input[c * size + i];
    }
  }
  return found;
}

// The parts of one such mixture: every channel of the padded input times its weight.
function weighted(layer, r) {
  const size = layer.input_height * layer.input_width;
  return Array.from({length: layer.in_channels}, (_, c) => {
    const weight = layer.reduce_weight[r * layer.in_channels + c];
    const values = Float64Array.from(layer.input.subarray(c * size, (c + 1) * size), (x) => weight * x);
    return {height: layer.input_height, width: layer.input_width, values};
  });
}

// The products of one such mixture in the middle of the patch of an output pixel: [{x, weight, product}].
function reduction(layer, r, row, column) {
  const [i, j] = layer.kernel.map((taps) => Math.floor(taps / 2));
  return Array.from({length: layer.in_channels}, (_, c) => {
    const x = layer.input[inputIndex(layer, c, row, column, i, j)];
    const weight = layer.reduce_weight[r * layer.in_channels + c];
    return {x, weight, product: x * weight};
  });
}

// Index of the input value that tap (i, j) meets at output pixel (row, column) of a channel.
function inputIndex(layer, channel, row, column, i, j) {
  const y = row * layer.stride[0] + i * layer.dilation[0];
  const x = column * layer.stride[1] + j * layer.dilation[1];
  return (channel * layer.input_height + y) * layer.input_width + x;
}

// The products of one filter on one channel of an input at one pixel: [{x, weight, product}], row by row.
function products(layer, input, channel, filter, row, column) {
  const found = [];
  for (let i = 0; i < layer.kernel[0]; i++) {
    for (let j = 0; j < layer.kernel[1]; j++) {
      const x = input[inputIndex(layer, channel, row, column, i, j)];
      const weight = filter[i * layer.kernel[1] + j];
      found.push({x, weight, product: x * weight});
    }
  }
  return found;
}

function total(numbers) {
  let sum = 0;
  for (const number of numbers) sum += number;
  return sum;
}

function emptyMap(layer, value = 0) {
  const values = new Float64Array(layer.height * layer.width).fill(value);
  return {height: layer.height, width: layer.width, values};
}

// One channel of an input under one filter.
function filtered(layer, input, channel, filter) {
  const map = emptyMap(layer);
  const [rows, columns] = layer.kernel;
  for (let row = 0; row < layer.height; row++) {
    for (let column = 0; column < layer.width; column++) {
      let sum = 0;
      for (let i = 0; i < rows; i++) {
        const start = inputIndex(layer, channel, row, column, i, 0);
        for (let j = 0; j < columns; j++) sum += input[start + j * layer.dilation[1]] * filter[i * columns + j];
      }
      map.values[row * layer.width + column] = sum;
    }
  }
  return map;
}

// Add `map`, times `weight`, to `sum`, pixel by pixel.
function accumulate(sum, map, weight = 1) {
  for (let i = 0; i < sum.values.length; i++) sum.values[i] += weight * map.values[i];
}

function normalFilter(layer, k, channel) {
  const start = (k * layer.in_channels + channel) * layer.taps;
  return layer.normal_weight.subarray(start, start + layer.taps);
}

function depthwiseFilter(layer, hidden) {
  return layer.depthwise_weight.subarray(hidden * layer.taps, (hidden + 1) * layer.taps);
}

// Normal convolution before the addition: every input channel under its filter for the k-th kept output channel.
function contributions(layer, k) {
  return Array.from({length: layer.in_channels}, (_, channel) => filtered(layer, layer.input, channel, normalFilter(layer, k, channel)));
}

function addMaps(layer, maps, bias) {
  const sum = emptyMap(layer, bias);
  for (const map of maps) accumulate(sum, map);
  return sum;
}

// Depthwise convolution: hidden channel h sees channel floor(h / M) of its input alone.
function depthwiseMaps(layer) {
  const activation = ACTIVATIONS[layer.activation];
  return Array.from({length: layer.hidden_channels}, (_, h) => {
    const map = filtered(layer, layer.depthwise_input, Math.floor(h / layer.depth_multiplier), depthwiseFilter(layer, h));
    map.values = map.values.map((value) => activation(value + layer.depthwise_bias[h]));
    return map;
  });
}

// Pointwise convolution at one pixel, for the k-th kept output channel: [{x, weight, product}].
function mixture(layer, hiddenMaps, k, pixel) {
  return hiddenMaps.map((map, h) => {
    const x = map.values[pixel];
    const weight = layer.pointwise_weight[k * layer.hidden_channels + h];
    return {x, weight, product: x * weight};
  });
}

function pointwiseMap(layer, hiddenMaps, k) {
  const sum = emptyMap(layer, layer.pointwise_bias[k]);
  hiddenMaps.forEach((map, h) => accumulate(sum, map, layer.pointwise_weight[k * layer.hidden_channels + h]));
  return sum;
}

function difference(a, b) {
  return {...a, values: a.values.map((value, i) => value - b.values[i])};
}

function energy(map) {
  return total(map.values.map((value) => value * value));
}

// Multiplications for one output pixel of all O channels; a bottleneck has m channels between, else M filters a channel.
function multiplications(k, c, o, m, bottleneck) {
  return {normal: k * k * c * o, separable: bottleneck ? m * (c + k * k + o) : k * k * c * m + c * m * o};
}
