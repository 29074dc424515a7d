// Runs the networks. Resizes as unetseg's predict does: area averages down, linear up; the logits, not the classes.
importScripts("ort/ort.wasm.min.js");
ort.env.wasm.wasmPaths = new URL("ort/", self.location).href;
ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(navigator.hardwareConcurrency, 4) : 1;
const models = fetch("models.json").then((answer) => answer.json()), sessions = {};

function taps(from, to, area) { // for each new pixel: the first old one that it is made of, and the weights
  return Array.from({ length: to }, (_, i) => {
    const scale = from / to, middle = Math.min(Math.max((i + 0.5) * scale - 0.5, 0), from - 1);
    const [begin, end] = area ? [i * scale, (i + 1) * scale] : [middle, middle + 1];
    const first = Math.floor(begin + 1e-9), weights = [];
    for (let k = first; k < Math.min(end - 1e-9, from); k++) weights.push((Math.min(k + 1, end) - Math.max(k, begin)) / (end - begin));
    return [first, weights];
  });
}

function resize(from, width, height, stride, channels, newWidth, newHeight, area) { // to (newHeight, newWidth, channels)
  const wide = new Float32Array(height * newWidth * channels), to = new Float32Array(newHeight * newWidth * channels);
  taps(width, newWidth, area).forEach(([first, weights], x) => {
    for (let y = 0; y < height; y++) {
      for (let c = 0; c < channels; c++) {
        let sum = 0;
        for (let k = 0; k < weights.length; k++) sum += weights[k] * from[(y * width + first + k) * stride + c];
        wide[(y * newWidth + x) * channels + c] = sum;
      }
    }
  });
  const row = newWidth * channels;
  taps(height, newHeight, area).forEach(([first, weights], y) => {
    weights.forEach((weight, k) => {
      for (let at = 0; at < row; at++) to[y * row + at] += weight * wide[(first + k) * row + at];
    });
  });
  return to;
}

function highest(logits, [, classes, height, width], newWidth, newHeight) { // class ids (newHeight, newWidth)
  const ids = new Uint8Array(newWidth * newHeight);
  let best = null;
  for (let id = 0; id < classes; id++) {
    const plane = logits.subarray(id * height * width, (id + 1) * height * width);
    const large = resize(plane, width, height, 1, 1, newWidth, newHeight, false);
    best ??= large;
    for (let at = 0; at < large.length; at++) if (large[at] > best[at]) { best[at] = large[at]; ids[at] = id; }
  }
  return ids;
}

async function predict({ model, pixels, width, height }) {
  const about = (await models)[model];
  sessions[model] ??= ort.InferenceSession.create(about.file).catch((error) => { delete sessions[model]; throw error; });
  const session = await sessions[model], started = performance.now();
  const area = width >= about.width && height >= about.height, halves = width === 2 * about.width && height === 2 * about.height;
  const small = resize(pixels, width, height, 4, 3, about.width, about.height, area);
  const rounded = Uint8Array.from(small, (x) => (x % 1 === 0.5 && area && !halves ? 2 * Math.round(x / 2) : Math.round(x))); // as OpenCV
  const image = new ort.Tensor("uint8", rounded, [1, about.height, about.width, 3]);
  const { logits } = await session.run({ image });
  const ids = highest(logits.data, logits.dims, width, height), counts = new Array(about.names.length).fill(0);
  for (const id of ids) counts[id]++;
  return { ids, counts, milliseconds: performance.now() - started };
}

self.onmessage = async ({ data }) => {
  const result = await predict(data).catch((error) => ({ error: `The network cannot run here: ${error.message}` }));
  self.postMessage({ id: data.id, ...result }, result.ids ? [result.ids.buffer] : []);
};
