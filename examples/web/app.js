// Classifies a picture by one checkpoint with several schedules, and shows which patches each dropped.

import { AutoModel, AutoProcessor, RawImage, env, softmax } from "./vendor/transformers.min.js";

const MAX_PIXELS = 50e6; // a larger picture may exhaust the memory of a phone
const ROUNDS = 5; // of timing, the models in turn
const NUM_CLASSES = 5;

env.allowRemoteModels = false;
env.allowLocalModels = true;
env.localModelPath = "models/";
env.backends.onnx.wasm.wasmPaths = new URL("vendor/", import.meta.url).href;

const find = (id) => document.getElementById(id);
const { levels } = await (await fetch("models/levels.json")).json(); // from unpruned to the strongest
const models = new Map(); // what is loaded, by level, device and dtype
let picture = null; // the last that was read
let wanted = 0; // counts what was asked for, so that only the last is shown

function say(text, isError = false) {
  find("status").textContent = text;
  find("status").classList.toggle("error", isError);
}

function load(level) {
  const device = find("device").value;
  const dtype = find("dtype").value;
  const key = [level.folder, device, dtype].join(" ");
  if (!models.has(key)) {
    const loading = AutoModel.from_pretrained(level.folder, { device, dtype });
    loading.catch(() => models.delete(key)); // to be tried again
    models.set(key, loading);
  }
  return models.get(key);
}

async function read(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    throw new Error(`${file.name ?? "The file"} is no picture that this browser can read; take a JPEG, PNG or WebP.`);
  }
  if (bitmap.width * bitmap.height > MAX_PIXELS) {
    const size = `${bitmap.width} x ${bitmap.height}`;
    bitmap.close();
    throw new Error(`The picture has ${size} pixels, more than ${MAX_PIXELS / 1e6} million; take a smaller one.`);
  }
  bitmap.close();
  return (await RawImage.fromBlob(file)).rgb();
}

// Outputs and median milliseconds of each model; they take turns, so that what slows the device slows them alike.
async function run(loaded, pixel_values) {
  const outputs = [];
  for (const model of loaded) outputs.push(await model({ pixel_values })); // the first call prepares
  const times = loaded.map(() => []);
  for (let round = 0; round < ROUNDS; round++) {
    for (const [index, model] of loaded.entries()) {
      const start = performance.now();
      await model({ pixel_values });
      times[index].push(performance.now() - start);
    }
  }
  return { outputs, medians: times.map((of) => of.sort((a, b) => a - b)[of.length >> 1]) };
}

const colour = (block, numBlocks) => `hsl(${Math.round((300 * block) / numBlocks)} 75% 45%)`;

function drawMap(pixel_values, processor, map, facts) {
  const [rows, columns] = facts.image_size.map((length) => length / facts.patch_size);
  const [, channels, height, width] = pixel_values.dims;
  const canvas = find("picture");
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d");
  const shown = context.createImageData(width, height);
  const { image_mean, image_std, do_normalize } = processor.image_processor;
  for (let pixel = 0; pixel < width * height; pixel++) {
    for (let channel = 0; channel < 3; channel++) {
      const value = pixel_values.data[Math.min(channel, channels - 1) * width * height + pixel];
      const light = do_normalize ? value * image_std[channel] + image_mean[channel] : value;
      shown.data[4 * pixel + channel] = 255 * light;
    }
    shown.data[4 * pixel + 3] = 255;
  }
  context.putImageData(shown, 0, 0);
  const blocks = [...new Set(map)].filter((block) => block < facts.num_hidden_layers).sort((a, b) => a - b);
  map.forEach((block, patch) => {
    if (block >= facts.num_hidden_layers) return;
    context.fillStyle = colour(block, facts.num_hidden_layers).replace(")", " / 80%)");
    const [row, column] = [Math.floor(patch / columns), patch % columns];
    context.fillRect(column * facts.patch_size, row * facts.patch_size, facts.patch_size, facts.patch_size);
  });
  const kept = map.filter((block) => block >= facts.num_hidden_layers).length;
  canvas.setAttribute("aria-label", `The picture; ${kept} of ${rows * columns} patches reach the last block.`);
  find("legend").replaceChildren(
    ...blocks.map((block) => {
      const entry = document.createElement("span");
      const swatch = document.createElement("i");
      swatch.style.background = colour(block, facts.num_hidden_layers);
      entry.append(swatch, `${block}`);
      return entry;
    }),
    blocks.length ? "" : "none",
  );
}

function list(logits, id2label) {
  const scores = softmax(logits).map((score, index) => [score, id2label[index]]);
  scores.sort((a, b) => b[0] - a[0]);
  find("classes").replaceChildren(
    ...scores.slice(0, NUM_CLASSES).map(([score, label]) => {
      const item = document.createElement("li");
      const meter = document.createElement("meter");
      meter.value = score;
      meter.setAttribute("aria-label", label);
      const [name, share] = [document.createElement("span"), document.createElement("span")];
      name.textContent = label;
      share.textContent = `${(100 * score).toFixed(1)} %`;
      item.append(name, meter, share);
      return item;
    }),
  );
}

async function show() {
  const level = levels[find("amount").value];
  find("amount-name").textContent = level.name;
  if (picture === null) return;
  const mine = ++wanted;
  try {
    say("Working …");
    const [unpruned, pruned] = await Promise.all([levels[0], level].map(load));
    const processor = await AutoProcessor.from_pretrained(level.folder);
    const { pixel_values } = await processor(picture);
    const chosen = level === levels[0] ? [unpruned] : [unpruned, pruned];
    const { outputs, medians } = await run(chosen, pixel_values);
    if (mine !== wanted) return;
    const { logits, pruned_after_block } = outputs.at(-1);
    drawMap(pixel_values, processor, Array.from(pruned_after_block.data, Number), pruned.config.cropr_hf);
    list(Array.from(logits.data), pruned.config.id2label);
    const [whole, time] = [medians[0].toFixed(1), medians.at(-1).toFixed(1)];
    const ratio = (medians[0] / medians.at(-1)).toFixed(2);
    find("time").textContent =
      chosen.length === 1 ? `${whole} ms, unpruned` : `${time} ms; unpruned ${whole} ms: ${ratio} times as fast`;
    find("result").hidden = false;
    say(`${pruned.config.cropr_hf.patches_kept.at(-1)} patches reach the last block.`);
  } catch (error) {
    if (mine !== wanted) return;
    find("result").hidden = true;
    say(`${error.message} Choose other weights, or the processor, if the GPU cannot run these.`, true);
  }
}

async function take(file) {
  const mine = ++wanted;
  try {
    const read_ = await read(file);
    if (mine !== wanted) return;
    picture = read_;
  } catch (error) {
    if (mine !== wanted) return;
    picture = null;
    find("result").hidden = true;
    say(error.message, true);
    return;
  }
  await show();
}

find("amount").max = levels.length - 1;
find("amount").value = levels.findIndex((level) => level.published);
find("amount").disabled = false;
find("amount").addEventListener("input", show);
find("device").addEventListener("change", show);
find("dtype").addEventListener("change", show);
find("file").addEventListener("change", ({ target }) => target.files.length && take(target.files[0]));
find("sample").addEventListener("click", async () => take(await (await fetch("sample.png")).blob()));
for (const event of ["dragover", "dragleave", "drop"]) {
  find("drop").addEventListener(event, (dragged) => {
    dragged.preventDefault();
    find("drop").classList.toggle("over", event === "dragover");
    if (event === "drop" && dragged.dataTransfer.files.length) take(dragged.dataTransfer.files[0]);
  });
}
if ((await navigator.gpu?.requestAdapter()) == null) {
  const option = find("device").querySelector("[value=webgpu]");
  option.disabled = true;
  option.textContent = "the GPU (this browser has no WebGPU)";
}
await show();
say("Choose a picture.");
