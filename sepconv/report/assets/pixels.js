// From an image of any size to the bytes that a network takes, as the library prepares images: resized as PyTorch does
// with antialiasing, cropped from the centre as torchvision does. An image is {width, height, channels, values}.

// How far a filter reaches from its middle, and what it is there.
const FILTERS = {
  bilinear: {reach: 1, at: (x) => Math.max(0, 1 - Math.abs(x))},
  bicubic: {reach: 2, at: cubic},
};

function cubic(x) {
  const t = Math.abs(x);
  if (t < 1) return (1.5 * t - 2.5) * t * t + 1;
  return t < 2 ? ((-0.5 * t + 2.5) * t - 4) * t + 2 : 0;
}

function roundedToEven(x) {
  const low = Math.floor(x);
  if (x - low !== 0.5) return Math.round(x);
  return low % 2 ? low + 1 : low;
}

// For each new pixel of a row or column the first old one that it is made of, and the weights of this and the next.
function contributions(before, after, interpolation) {
  const scale = before / after;
  if (interpolation === "nearest") {
    return Array.from({length: after}, (_, i) => ({first: Math.min(Math.floor((i + 0.5) * scale), before - 1), weights: [1]}));
  }
  const {reach, at} = FILTERS[interpolation];
  const wide = Math.max(scale, 1);
  return Array.from({length: after}, (_, i) => {
    const middle = (i + 0.5) * scale;
    const first = Math.max(Math.trunc(middle - reach * wide + 0.5), 0);
    const end = Math.min(Math.trunc(middle + reach * wide + 0.5), before);
    const weights = Array.from({length: end - first}, (_, j) => at((first + j - middle + 0.5) / wide));
    const sum = weights.reduce((a, b) => a + b, 0);
    return {first, weights: weights.map((weight) => weight / sum)};
  });
}

// Every row resized; the result lies column after column, so that the same again resizes the columns.
function resizedRows(image, width, interpolation) {
  const {height, channels, values} = image;
  const found = new Float64Array(width * height * channels);
  contributions(image.width, width, interpolation).forEach(({first, weights}, x) => {
    for (let y = 0; y < height; y++) {
      for (let c = 0; c < channels; c++) {
        let sum = 0;
        for (let j = 0; j < weights.length; j++) sum += weights[j] * values[(y * image.width + first + j) * channels + c];
        found[(x * height + y) * channels + c] = sum;
      }
    }
  });
  return {width: height, height: width, channels, values: found};
}

function resized(image, width, height, interpolation) {
  if (width === image.width && height === image.height) return image;
  const found = resizedRows(resizedRows(image, width, interpolation), height, interpolation);
  return {...found, values: found.values.map((value) => Math.min(Math.max(roundedToEven(value), 0), 255))};
}

function cropped(image, size) {
  const [left, top] = [image.width, image.height].map((side) => roundedToEven((side - size) / 2));
  const values = new Uint8Array(size * size * image.channels);
  for (let y = 0; y < size; y++) {
    const start = ((top + y) * image.width + left) * image.channels;
    values.set(image.values.subarray(start, start + size * image.channels), y * size * image.channels);
  }
  return {width: size, height: size, channels: image.channels, values};
}

// What a browser decodes (red, green, blue, alpha) in the channels of a network; grey as ITU-R 601 weights colours.
function inChannels(data, channels) {
  const {width, height} = data;
  const values = new Uint8Array(width * height * channels);
  for (let i = 0; i < width * height; i++) {
    const [r, g, b] = [data.data[4 * i], data.data[4 * i + 1], data.data[4 * i + 2]];
    if (channels === 3) values.set([r, g, b], 3 * i);
    else values[i] = (19595 * r + 38470 * g + 7471 * b + 32768) >> 16;
  }
  return {width, height, channels, values};
}

// `input`: {channels, size, resize, interpolation, squash}.
function prepared(data, input) {
  const image = inChannels(data, input.channels);
  const short = input.squash ? 0 : Math.min(image.width, image.height);
  const [width, height] = [image.width, image.height].map((side) => (short ? Math.trunc((input.resize * side) / short) : input.resize));
  return cropped(resized(image, width, height, input.interpolation), input.size);
}
