
// The app. The image is kept here and goes to the server with every wish; there nothing is kept.

const part = (id) => document.querySelector(`#${id}`);
const largest = Number(document.body.dataset.largest);
let image = null; // { name, bytes } of what is shown
let captions = []; // { row, wish } of each that is shown, row: its words, wish: what the server finds it by
let underway = null; // aborts the request that is no longer wanted

const silent = "The program behind this page does not answer: see whether `captioner app` still runs.";

async function post(path, image, wish, signal) {
  const asked = new URLSearchParams({ name: image.name, ...wish });
  let answer;
  try {
    const headers = { "Content-Type": "application/octet-stream" };
    answer = await fetch(`${path}?${asked}`, { method: "POST", body: image.bytes, headers, signal });
  } catch (error) {
    throw error.name === "AbortError" ? error : new Error(silent);
  }
  if (answer.ok) return answer;
  const said = await answer.json().catch(() => ({}));
  throw new Error(said.error ?? "The program behind this page failed: the terminal that it runs in says why.");
}

// Do what is wanted in place of what is still under way, and say what came of it.
async function work(state, deed) {
  underway?.abort();
  const own = (underway = new AbortController());
  part("state").textContent = state;
  part("fault").textContent = "";
  document.body.classList.add("busy");
  try {
    await deed(own.signal);
  } catch (error) {
    if (underway !== own || error.name === "AbortError") return;
    part("fault").textContent = error.message;
    part("fault").scrollIntoView({ block: "nearest" });
  } finally {
    if (underway === own) {
      underway = null;
      part("state").textContent = "";
      document.body.classList.remove("busy");
    }
  }
}

function settings() {
  const given = Object.fromEntries(new FormData(part("settings")));
  const names = given.way === "beam" ? ["beam_size"] : ["temperature", "top_p", "seed"];
  return Object.fromEntries(["way", ...names].map((name) => [name, given[name]]));
}

function parsed(html) {
  return new DOMParser().parseFromString(html, "text/html").querySelector("article");
}

async function captionIt(wanted, signal) {
  const wish = settings();
  const { article, captions } = await (await post("look", wanted, wish, signal)).json();
  if (signal.aborted) return;
  image = wanted;
  showAll(parsed(article), captions, wish);
}

function showAll(article, found, wish) {
  document.querySelector("main").replaceChildren(article);
  part("shown").hidden = false;
  document.body.classList.add("has-image");
  listenTo(article);
  const rows = [...article.querySelectorAll(".caption")];
  rows.slice(1).forEach((row) => row.remove());
  captions = [];
  part("captions").replaceChildren();
  part("note").textContent = "";
  found.forEach((caption, index) => add(caption, rows[index], { ...wish, rank: index }));
  choose(0);
}

function add({ text, probability, logarithm }, row, wish) {
  const label = document.createElement("label");
  const input = Object.assign(document.createElement("input"), { type: "radio", name: "caption" });
  const said = Object.assign(document.createElement("span"), { textContent: text || "(no word)", dir: "auto" });
  const numbers = Object.assign(document.createElement("small"), { textContent: `${probability} · log-probability ${logarithm}` });
  label.append(input, said, numbers);
  label.classList.toggle("own", "caption" in wish);
  part("captions").append(label);
  const index = captions.push({ row, wish }) - 1;
  input.addEventListener("change", () => choose(index));
}

function choose(index) {
  const article = document.querySelector("article");
  pin(article, null);
  article.querySelector(".caption").replaceWith(captions[index].row);
  part("captions").querySelectorAll("input")[index].checked = true;
  article.querySelector(".stage").scrollIntoView({ block: "nearest" });
}

async function take(file) {
  if (file.size > largest) {
    const size = (bytes) => (bytes / 2 ** 20).toFixed(0);
    throw new Error(`${file.name} has ${size(file.size)} MB, more than ${size(largest)}: make it smaller and try again.`);
  }
  try {
    return { name: file.name, bytes: await file.arrayBuffer() };
  } catch {
    throw new Error(`${file.name} cannot be read: give an image file, and no folder.`);
  }
}

function open(files) {
  if (!files.length) return;
  const only = files.length > 1 ? `, the first of ${files.length}` : "";
  work(`Looking at ${files[0].name}${only} …`, async (signal) => captionIt(await take(files[0]), signal));
}

part("file").addEventListener("change", (event) => {
  open([...event.target.files]);
  event.target.value = ""; // so that the same file can be chosen again
});
document.addEventListener("paste", (event) => open([...event.clipboardData.files]));
for (const kind of ["dragover", "drop", "dragleave"]) {
  document.addEventListener(kind, (event) => {
    if (!event.dataTransfer.types.includes("Files")) return;
    event.preventDefault(); // or the browser leaves the page for the file
    part("drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop") open([...event.dataTransfer.files]);
  });
}

part("settings").addEventListener("submit", (event) => event.preventDefault());
part("settings").addEventListener("change", () => {
  for (const each of document.querySelectorAll("[data-way]")) each.hidden = each.dataset.way !== settings().way;
  if (image !== null) work("Looking again …", (signal) => captionIt(image, signal));
});

part("say").addEventListener("submit", (event) => {
  event.preventDefault();
  const wish = { caption: part("said").value, rank: 0 };
  work("Looking again …", async (signal) => {
    const { article, captions: found, note } = await (await post("look", image, wish, signal)).json();
    if (signal.aborted) return;
    const row = parsed(article).querySelector(".caption");
    listenToWords(document.querySelector("article"), row.querySelectorAll(".word"));
    add(found[0], row, wish);
    choose(captions.length - 1);
    part("note").textContent = note;
  });
});

for (const button of document.querySelectorAll("[data-form]")) {
  button.addEventListener("click", () => {
    const index = [...part("captions").querySelectorAll("input")].findIndex((input) => input.checked);
    const wish = { ...captions[index].wish, view: chosen("view"), scale: chosen("scale") };
    work("Drawing …", async (signal) => {
      const link = document.createElement("a");
      link.href = URL.createObjectURL(await (await post(button.dataset.form, image, wish, signal)).blob());
      link.download = `${image.name.replace(/\.[^.]*$/, "")}-attention.${button.dataset.suffix}`;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 60000);
    });
  });
}
