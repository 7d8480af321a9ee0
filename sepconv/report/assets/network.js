// A network of bytes of WebAssembly: it imports nothing but arithmetic, and computes in memory of its own.

function bytesOf(base64) {
  return Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
}

async function networkOf(stored) {
  let memory;
  const bytes = () => new Uint8Array(memory.buffer);
  const env = {
    expf: Math.exp, logf: Math.log, powf: Math.pow, sqrtf: Math.sqrt, floorf: Math.floor, tanhf: Math.tanh,
    sinf: Math.sin, cosf: Math.cos,
    memcpy: (to, from, count) => (bytes().copyWithin(to, from, from + count), to),
    memmove: (to, from, count) => (bytes().copyWithin(to, from, from + count), to),
    memset: (to, value, count) => (bytes().fill(value, to, to + count), to),
  };
  const {exports} = (await WebAssembly.instantiate(bytesOf(stored.wasm), {env})).instance;
  memory = exports.memory;
  const pixelsAt = (exports.__heap_base.value + 63) & ~63;
  const scoresAt = (pixelsAt + stored.pixels + 63) & ~63;
  const missing = scoresAt + 4 * stored.classes - memory.buffer.byteLength;
  memory.grow(Math.ceil(Math.max(0, missing) / 65536));
  return {
    ...stored,
    scores: (pixels) => {
      bytes().set(pixels, pixelsAt);
      const code = exports[`${stored.symbol}_run_image`](pixelsAt, scoresAt);
      if (code !== 0) throw new Error(`${stored.symbol}: error ${code}`);
      return new Float32Array(memory.buffer, scoresAt, stored.classes).slice();
    },
  };
}

function probabilities(scores) {
  const most = Math.max(...scores);
  const powers = Array.from(scores, (score) => Math.exp(score - most));
  const sum = powers.reduce((a, b) => a + b, 0);
  return powers.map((power) => power / sum);
}

// Milliseconds of a call: a browser's clock is too coarse for a single one of small networks.
function millisecondsOf(call, least) {
  const start = performance.now();
  let [calls, now] = [0, start];
  do {
    call();
    calls++;
    now = performance.now();
  } while (now - start < least);
  return (now - start) / calls;
}
