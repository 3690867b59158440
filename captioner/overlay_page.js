"use strict";

// The maps are those of `captioner.overlay.attention_map`, computed anew from the regions' weights.

const colours = decode(document.querySelector("main").dataset.colours); // red, green, blue of 256 steps
const STRIPE = 6; // pixels of the canvas
let maps = { of: null, found: [] }; // those of one image: they are large

function decode(text) {
  return Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
}

function chosen(name) {
  return document.querySelector(`input[name=${name}]:checked`).value;
}

// How much each cell between start and stop counts for each pixel, row by row: (length, cells), or with a border
// (length, cells + 2) where the view is smooth.
function coefficients(view, length, start, stop, cells) {
  const across = view === "raw" ? cells : cells + 2;
  const found = new Float64Array(length * across);
  for (let pixel = 0; pixel < length; pixel++) {
    const inside = Math.max(Math.min(pixel + 1, stop) - Math.max(pixel, start), 0);
    if (view === "raw") {
      const side = (stop - start) / cells;
      for (let cell = 0; cell < cells; cell++) {
        const [from, to] = [start + cell * side, start + (cell + 1) * side];
        found[pixel * across + cell] = Math.max(Math.min(pixel + 1, to) - Math.max(pixel, from), 0);
      }
    } else if (inside > 0) {
      // Cubic Hermite splines, level at the centres of the cells; beyond the border it goes on.
      const position = ((pixel + 0.5 - start) / (stop - start)) * cells - 0.5;
      const first = Math.floor(position);
      for (const cell of [first, first + 1]) {
        const d = Math.abs(position - cell);
        found[pixel * across + Math.min(Math.max(cell + 1, 0), cells + 1)] += ((2 * d - 3) * d * d + 1) * inside;
      }
    }
  }
  return found;
}

// The weights in a border of cells: in each the lesser of the two outermost weights, so that peaks stay in place.
function bordered(weights, h, w) {
  const clamp = (at, cells) => Math.min(Math.max(at, 0), cells - 1);
  const lesser = (at, cells, value) =>
    at >= 0 && at < cells ? value(at) : Math.min(value(clamp(at, cells)), value(clamp(at < 0 ? 1 : cells - 2, cells)));
  const found = new Float64Array((h + 2) * (w + 2));
  for (let i = -1; i <= h; i++) {
    for (let j = -1; j <= w; j++) {
      found[(i + 1) * (w + 2) + j + 1] = lesser(i, h, (y) => lesser(j, w, (x) => weights[y * w + x]));
    }
  }
  return found;
}

// Weights of h x w regions over a box (left, top, right, bottom) in width x height pixels, to sum 1.
function spread(weights, [h, w], [width, height], box, view) {
  const rows = coefficients(view, height, box[1], box[3], h);
  const columns = coefficients(view, width, box[0], box[2], w);
  if (view !== "raw") [weights, h, w] = [bordered(weights, h, w), h + 2, w + 2];
  const found = new Float64Array(width * height);
  const across = new Float64Array(w);
  let sum = 0;
  for (let y = 0; y < height; y++) {
    for (let j = 0; j < w; j++) {
      across[j] = 0;
      for (let i = 0; i < h; i++) across[j] += rows[y * h + i] * weights[i * w + j];
    }
    for (let x = 0; x < width; x++) {
      let value = 0;
      for (let j = 0; j < w; j++) value += across[j] * columns[x * w + j];
      sum += found[y * width + x] = value;
    }
  }
  return found.map((value) => value / sum);
}

function weightsOf(word) {
  const bytes = decode(word.dataset.weights);
  const whole = new DataView(bytes.buffer);
  return Float64Array.from({ length: bytes.length / 2 }, (_, i) => whole.getUint16(2 * i, true));
}

function geometry(article) {
  const canvas = article.querySelector("canvas");
  const size = [canvas.width, canvas.height];
  const grid = article.dataset.grid.split(" ").map(Number);
  const box = article.dataset.box.split(" ").map((share, edge) => Number(share) * size[edge % 2]);
  return { size, grid, box };
}

// An image's maps, in even shares, and what of each pixel was seen; each word's is made when it is first wanted.
function mapsOf(article) {
  if (maps.of !== article) {
    const { size, box } = geometry(article);
    maps = { of: article, seen: spread([1], [1, 1], size, box, "raw"), found: new Map() };
  }
  return maps;
}

function mapOf(article, word) {
  const { seen, found } = mapsOf(article);
  if (!found.has(word)) {
    const { size, grid, box } = geometry(article);
    const shares = spread(weightsOf(word), grid, size, box, chosen("view"));
    let top = 0;
    const values = new Float32Array(shares.length);
    for (let i = 0; i < shares.length; i++) {
      if (seen[i] > 0) top = Math.max(top, (values[i] = shares[i] / seen[i]));
    }
    found.set(word, { values, top });
  }
  return found.get(word);
}

function wordsOf(article) {
  return [...article.querySelectorAll(".word")];
}

// The value that has the brightest colour.
function topOf(article, word) {
  const alike = chosen("scale") === "shared" ? wordsOf(article) : [word];
  return Math.max(...alike.map((each) => mapOf(article, each).top));
}

function brightestOf(article, word) {
  const [own, top] = [mapOf(article, word).top, topOf(article, word)].map((value) => value.toFixed(1));
  const scale = chosen("scale") === "shared" ? `; the brightest colour of the shared scale is ${top}` : "";
  return `At its brightest: ${own} times an even share${scale}.`;
}

function paint(article, word) {
  const canvas = article.querySelector("canvas");
  const { values } = mapOf(article, word);
  const { seen } = mapsOf(article);
  const top = topOf(article, word);
  const context = canvas.getContext("2d");
  const image = context.createImageData(canvas.width, canvas.height);
  for (let i = 0; i < values.length; i++) {
    if (seen[i] > 0) {
      const strength = values[i] / top;
      const step = 3 * Math.round(255 * strength);
      image.data.set([colours[step], colours[step + 1], colours[step + 2], 255 * (0.08 + 0.67 * strength)], 4 * i);
    } else {
      const slant = (i % canvas.width) + Math.floor(i / canvas.width);
      image.data.set([255, 255, 255, Math.floor(slant / STRIPE) % 2 ? 242 : 217], 4 * i);
    }
  }
  context.putImageData(image, 0, 0);
}

function say(article, text) {
  article.querySelector(".numbers").textContent = text;
}

// What is pointed at is told until something else is asked for.
function show(article, word) {
  for (const each of wordsOf(article)) each.classList.toggle("shown", each === word);
  article.classList.toggle("lit", word !== null);
  if (word !== null) paint(article, word);
  if (article.querySelector(".marker").hidden) {
    say(article, word === null ? "" : `${word.dataset.said}. ${brightestOf(article, word)}`);
  }
}

function unpoint(article) {
  for (const word of wordsOf(article)) word.style.removeProperty("--heat");
  article.querySelector(".marker").hidden = true;
}

function ask(article, word) {
  unpoint(article);
  show(article, word);
}

function pinned(article) {
  return article.querySelector(".word[aria-pressed=true]");
}

function pin(article, word) {
  for (const each of wordsOf(article)) each.setAttribute("aria-pressed", each === word);
  ask(article, word);
}

// The other way round: x and y are shares of the image's width and height.
function point(article, x, y) {
  const { size } = geometry(article);
  const at = Math.min(Math.floor(y * size[1]), size[1] - 1) * size[0] + Math.min(Math.floor(x * size[0]), size[0] - 1);
  const looked = [];
  for (const word of wordsOf(article)) {
    const heat = mapOf(article, word).values[at] / topOf(article, word);
    word.style.setProperty("--heat", heat.toFixed(3));
    looked.push([heat, word.firstElementChild.textContent]);
  }
  const most = looked.filter(([heat]) => heat >= 0.1).sort((one, other) => other[0] - one[0]);
  const named = most.slice(0, 4).map(([heat, text]) => `${text} ${heat.toFixed(2)}`);
  const unseen = mapsOf(article).seen[at] === 0;
  say(article, unseen ? "Not seen: outside the crop." : `Looked here: ${named.join(", ") || "no word much"}.`);
  const marker = article.querySelector(".marker");
  marker.hidden = false;
  marker.style.left = `${100 * x}%`;
  marker.style.top = `${100 * y}%`;
}

function leave(article) {
  ask(article, pinned(article));
}

function listenToWords(article, words) {
  for (const word of words) {
    word.addEventListener("pointerenter", () => ask(article, word));
    word.addEventListener("pointerleave", () => show(article, pinned(article)));
    word.addEventListener("focus", () => ask(article, word));
    word.addEventListener("blur", () => show(article, pinned(article)));
    word.addEventListener("click", () => pin(article, word === pinned(article) ? null : word));
    word.addEventListener("keydown", (event) => {
      const words = wordsOf(article);
      const right = getComputedStyle(word).direction === "rtl" ? -1 : 1;
      const step = { ArrowRight: right, ArrowLeft: -right }[event.key];
      if (step !== undefined) {
        event.preventDefault();
        words[(words.indexOf(word) + step + words.length) % words.length].focus();
      } else if (event.key === "Escape") {
        pin(article, null);
      }
    });
  }
}

function listenTo(article) {
  listenToWords(article, wordsOf(article));
  const stage = article.querySelector(".stage");
  const [width, height] = geometry(article).size;
  stage.style.maxWidth = `calc(60vh * ${width / height})`; // so that its words are on the screen, too
  let place = [0.5, 0.5];
  const pointed = (event) => {
    const { left, top, width, height } = stage.getBoundingClientRect();
    place = [(event.clientX - left) / width, (event.clientY - top) / height];
    if (Math.min(...place) >= 0 && Math.max(...place) < 1) point(article, ...place);
  };
  stage.addEventListener("pointermove", pointed);
  stage.addEventListener("pointerdown", pointed);
  stage.addEventListener("pointerleave", (event) => {
    if (event.pointerType === "mouse") leave(article); // a finger that is lifted leaves what it pointed at
  });
  stage.addEventListener("focus", () => {
    if (stage.matches(":focus-visible")) point(article, ...place);
  });
  stage.addEventListener("blur", () => leave(article));
  stage.addEventListener("keydown", (event) => {
    const { grid } = geometry(article);
    const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    if (event.key in steps) {
      event.preventDefault();
      const move = (axis) => place[axis] + steps[event.key][axis] / grid[1 - axis];
      place = [0, 1].map((axis) => Math.min(Math.max(move(axis), 0), 0.999));
      point(article, ...place);
    } else if (event.key === "Escape") {
      leave(article);
    }
  });
}

document.querySelectorAll("article").forEach(listenTo);

for (const input of document.querySelectorAll(".controls input")) {
  input.addEventListener("change", () => {
    maps = { of: null, found: [] };
    document.querySelector("#most").textContent =
      chosen("scale") === "shared" ? "the maximum of all words of an image" : "each word's own maximum";
    for (const article of document.querySelectorAll("article.lit")) show(article, pinned(article));
  });
}

document.querySelector("#theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.style.colorScheme
    ? root.style.colorScheme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  root.style.colorScheme = dark ? "light" : "dark";
});
