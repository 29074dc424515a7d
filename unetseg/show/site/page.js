// What one sees and does; the networks run in worker.js.
const $ = (id) => document.getElementById(id), MOST = 2048; // pixels of the longest side that a picture is labelled at
const views = [...document.querySelectorAll("figure")].map((figure) => ({
  figure, canvas: figure.querySelector("canvas"), caption: figure.querySelector("figcaption"), model: -1, result: null,
}));
const worker = new Worker("worker.js"), waiting = new Map(), off = new Set();
let models = [], picture = null, occluders = [], drag = null, round = 0, session = 0, stream = null;
worker.onmessage = ({ data }) => { waiting.get(data.id)(data); waiting.delete(data.id); };
worker.onerror = (event) => waiting.forEach((done) => done({ error: `This browser cannot run the network: ${event.message}` }));
const say = (text) => { $("status").textContent = text; };
function ask(message) { // the worker's answer
  const id = Math.random();
  return new Promise((done) => { waiting.set(id, done); worker.postMessage({ id, ...message }); });
}

function show(source, width, height) { // take a bitmap, or a video's frame, as the picture
  const scale = Math.min(1, MOST / Math.max(width, height));
  picture = new OffscreenCanvas(Math.max(1, Math.round(width * scale)), Math.max(1, Math.round(height * scale)));
  const context = picture.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingQuality = "high";
  context.drawImage(source, 0, 0, picture.width, picture.height);
}

async function open(blob) {
  const mine = stop();
  const bitmap = await createImageBitmap(await blob, { imageOrientation: "from-image", colorSpaceConversion: "none" }).catch(() => null);
  if (mine !== session) return; // another picture was chosen meanwhile
  if (!bitmap) return say("This file is no picture that the browser can read.");
  show(bitmap, bitmap.width, bitmap.height);
  occluders = [];
  await predict();
}

function covered() { // the picture with its occluders, (H, W, 4)
  const canvas = new OffscreenCanvas(picture.width, picture.height), context = canvas.getContext("2d");
  context.drawImage(picture, 0, 0);
  context.fillStyle = "rgb(110, 110, 110)";
  for (const box of occluders.concat(drag ?? [])) context.fillRect(...box);
  return context.getImageData(0, 0, canvas.width, canvas.height);
}

async function predict() {
  const mine = ++round, image = covered();
  for (const view of views) view.result = null;
  for (const view of views.filter((view) => view.model >= 0)) {
    say(`${models[view.model].name} …`);
    const result = await ask({ model: view.model, pixels: image.data, width: image.width, height: image.height });
    if (mine !== round) return; // the picture has changed meanwhile
    if (result.error) return say(result.error);
    view.result = result;
  }
  say("");
  paint();
}

function paint() {
  const known = list();
  $("clear").disabled = !occluders.length;
  if (!picture) return;
  const image = covered(), opacity = Number($("opacity").value);
  for (const { canvas, caption, model, result } of views) {
    if (model < 0) continue;
    const { names, title } = models[model], colours = names.map((name) => !off.has(name) && known.get(name).colour);
    const shown = new ImageData(image.data.slice(), image.width, image.height), context = canvas.getContext("2d");
    for (let at = 0; result && at < shown.data.length; at++) {
      const colour = colours[result.ids[at >> 2]];
      if (colour && at % 4 < 3) shown.data[at] += opacity * (colour[at % 4] - shown.data[at]);
    }
    [canvas.width, canvas.height] = [image.width, image.height];
    context.putImageData(shown, 0, 0);
    Object.assign(context, { strokeStyle: "white", lineWidth: Math.max(1, image.width / 500) });
    for (const box of occluders.concat(drag ?? [])) context.strokeRect(...box);
    caption.textContent = title + (result ? `, ${Math.round(result.milliseconds)} ms` : "");
  }
}

function list() { // the classes, by name: a colour, shares in each view, and a box to switch them off
  const used = views.filter((view) => view.model >= 0), rows = new Map();
  used.forEach(({ model, result }, column) => models[model].names.forEach((name, id) => {
    const row = rows.get(name) ?? { colour: models[model].colours[id], shares: used.map(() => "–") };
    if (result) row.shares[column] = `${(100 * result.counts[id] / result.ids.length).toFixed(1)} %`;
    rows.set(name, row);
  }));
  $("classes").replaceChildren(...[...rows].map(([name, { colour, shares }]) => {
    const label = document.createElement("label"), box = document.createElement("input"), patch = document.createElement("i");
    label.className = "class";
    Object.assign(box, { type: "checkbox", checked: !off.has(name), name });
    box.onchange = () => { off[box.checked ? "delete" : "add"](name); paint(); };
    patch.style.background = `rgb(${colour})`;
    const cells = shares.map((share) => Object.assign(document.createElement("b"), { textContent: share }));
    label.append(box, patch, Object.assign(document.createElement("span"), { textContent: name }), ...cells);
    return label;
  }));
  return rows;
}

async function choose() { // networks for the two views
  [$("first"), $("second")].forEach((select, place) => { views[place].model = Number(select.value); views[place].result = null; });
  views[1].figure.hidden = views[1].model < 0;
  paint();
  if (picture) await predict();
}

const press = (name, on) => $(name).setAttribute("aria-pressed", on), pressed = (name) => $(name).getAttribute("aria-pressed") === "true";
function stop() { // the camera; returns the number of what is looked at from now on
  stream?.getTracks().forEach((track) => track.stop());
  stream = null;
  press("camera", false);
  return ++session;
}

async function live() { // label the camera's pictures until the button is pressed again, which keeps the last one
  if (stream) return stop();
  const mine = stop(), found = await navigator.mediaDevices?.getUserMedia({ video: { facingMode: "environment" } }).catch(() => null);
  if (!found) return say("There is no camera, or the browser does not allow it.");
  const video = Object.assign(document.createElement("video"), { srcObject: found, muted: true, playsInline: true });
  await video.play().catch(() => null);
  if (mine !== session || !video.videoWidth) return found.getTracks().forEach((track) => track.stop());
  stream = found;
  press("camera", true);
  for (occluders = []; mine === session; await predict()) show(video, video.videoWidth, video.videoHeight);
}

function place(event) { // of the pointer, in pixels of the picture
  const box = event.target.getBoundingClientRect();
  return [(event.clientX - box.left) * picture.width / box.width, (event.clientY - box.top) * picture.height / box.height];
}

for (const { canvas } of views) {
  canvas.onpointerdown = (event) => {
    if (!picture || !pressed("draw")) return;
    canvas.setPointerCapture(event.pointerId);
    drag = [[...place(event), 0, 0]];
  };
  canvas.onpointermove = (event) => {
    if (!drag) return;
    const [x, y] = place(event), [x0, y0] = drag[0];
    drag[0] = [x0, y0, x - x0, y - y0];
    paint();
  };
  canvas.onpointerup = canvas.onpointercancel = () => {
    if (!drag) return;
    [occluders, drag] = [[...occluders, ...drag], null];
    predict();
  };
}
function drawing(on) {
  press("draw", on);
  for (const { canvas } of views) canvas.style.touchAction = on ? "none" : "auto";
}
$("draw").onclick = () => drawing(!pressed("draw"));
$("clear").onclick = () => { occluders = []; predict(); };
[$("opacity").oninput, $("camera").onclick] = [paint, live];
$("first").onchange = $("second").onchange = choose;
$("sample").onclick = () => open(fetch("street.jpg").then((answer) => answer.blob()));
$("file").onclick = () => { $("file").value = ""; }; // the same file may be chosen again
$("file").onchange = () => $("file").files[0] && open($("file").files[0]);
for (const kind of ["dragover", "dragleave", "drop"]) document.addEventListener(kind, (event) => {
  event.preventDefault();
  $("views").classList.toggle("drop", kind === "dragover");
  if (kind === "drop" && event.dataTransfer.files[0]) open(event.dataTransfer.files[0]);
});

async function start() {
  navigator.serviceWorker?.register("offline.js");
  models = await (await fetch("models.json")).json();
  models.forEach(({ name }, model) => { $("first").add(new Option(name, model)); $("second").add(new Option(name, model)); });
  $("second").add(new Option("nothing", -1, true, true), 0);
  $("second").value = -1;
  drawing(matchMedia("(pointer: fine)").matches);
  await choose();
  await $("sample").onclick();
}
if (location.protocol === "file:") say("This page needs a web server, such as: python -m http.server");
else start().catch((error) => say(error.message));
