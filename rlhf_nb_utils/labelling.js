// The screen of a labelling session. Python decides what is shown and keeps the labels; here are only the keys, the
// buttons and, for three responses, the ranks chosen so far. A text from a model is always set as text, never as HTML.

const KEYS = {
  2: { a: 0, arrowleft: 0, b: 1, arrowright: 1 },
  3: { 1: 0, 2: 1, 3: 2 },
};
const NAMES = { 2: ["A", "B"], 3: ["1", "2", "3"] };
const SHORTCUTS = { 2: ["A ArrowLeft", "B ArrowRight"], 3: ["1", "2", "3"] };
const PLACES = ["best", "second", "third"];
const HELP = {
  0: "All done.",
  2: "Which goes on better? Click it; or click here once, then press A or ←, B or →.",
  3: "Best first: click all three; or click here once, then press 1, 2, 3 in your order. The same again takes one back.",
};

/** What a key means for `count` responses: the index of a response, "skip", "undo" or null. */
export function meaning(key, count) {
  const name = key.toLowerCase();
  if (name === "z") return "undo";
  if (count && name === "s") return "skip";
  return KEYS[count]?.[name] ?? null;
}

/** The ranks after response `index` is chosen: of two the rest follows, of three it is added, or taken out again. */
export function choose(ranks, index, count) {
  if (count === 2) return [index, 1 - index];
  return ranks.includes(index) ? ranks.filter((other) => other !== index) : [...ranks, index];
}

function element(tag, properties, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

/** One response as a button: its key, its place so far, its text. */
function card(text, index, { count, ranks, busy, pick }) {
  const rank = ranks.indexOf(index);
  const place = rank < 0 ? "" : ` – ${PLACES[rank]}`;
  const name = element("span", { className: "small", textContent: NAMES[count][index] + place });
  const body = element("span", { className: "text", dir: "auto", textContent: text });
  const button = element("button", { type: "button", disabled: busy, onclick: () => pick(index) }, name, body);
  button.setAttribute("aria-keyshortcuts", SHORTCUTS[count][index]);
  if (count === 3) button.setAttribute("aria-pressed", String(rank >= 0));
  return button;
}

/** The nodes that stay; only what is in them changes, so that a screen reader follows the live regions. */
function skeleton() {
  const nodes = {
    help: element("div", { className: "small" }),
    query: element("div", { className: "query text", dir: "auto" }),
    responses: element("div", { className: "responses" }),
    skip: element("button", { type: "button", textContent: "Skip (S)" }),
    undo: element("button", { type: "button", textContent: "Undo (Z)" }),
    progress: element("span", { className: "small" }),
    problem: element("div", { className: "problem" }),
  };
  nodes.query.setAttribute("aria-live", "polite");
  nodes.progress.setAttribute("role", "status");
  nodes.problem.setAttribute("role", "alert");
  const footer = element("div", { className: "footer" }, nodes.skip, nodes.undo, nodes.progress);
  const { help, query, responses, problem } = nodes;
  nodes.root = element("div", { className: "rlhf-labelling", tabIndex: 0 }, help, query, responses, footer, problem);
  nodes.root.setAttribute("role", "group");
  nodes.root.setAttribute("aria-label", "Label responses by hand");
  nodes.root.dataset.lmSuppressShortcuts = "true"; // in JupyterLab A, B, Z and the digits have meanings of their own
  return nodes;
}

class Screen {
  constructor(model) {
    this.model = model;
    this.nodes = skeleton();
    this.ranks = [];
    this.busy = false; // from a choice until Python has it on the disk
    this.nodes.root.addEventListener("keydown", (event) => this.press(event));
    this.nodes.skip.onclick = () => this.send({ do: "skip" });
    this.nodes.undo.onclick = () => this.undo();
    this.draw();
  }

  get shown() {
    return this.model.get("screen");
  }

  /** Python has answered: a new comparison, or the same one with a problem. */
  update() {
    this.ranks = [];
    this.busy = false;
    this.draw();
  }

  send(message) {
    this.busy = true;
    this.draw();
    this.model.send({ turn: this.shown.turn, ...message });
  }

  pick(index) {
    const count = this.shown.responses.length;
    this.ranks = choose(this.ranks, index, count);
    if (this.ranks.length === count) this.send({ do: "label", order: this.ranks });
    else this.draw();
  }

  /** Takes back the last rank of an unfinished ranking, otherwise the last choice. */
  undo() {
    if (this.ranks.length) {
      this.ranks = this.ranks.slice(0, -1);
      this.draw();
    } else if (this.shown.can_undo) this.send({ do: "undo" });
  }

  press(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const what = meaning(event.key, this.shown.responses.length);
    // No letter leaves this box: one B too many would insert a cell.
    if (what !== null || event.key.length === 1) event.stopPropagation();
    if (what === null) return;
    event.preventDefault();
    if (this.busy || event.repeat) return;
    if (what === "undo") this.undo();
    else if (what === "skip") this.send({ do: "skip" });
    else this.pick(what);
  }

  draw() {
    const { nodes, ranks, busy, shown } = this;
    const count = shown.responses.length;
    const held = nodes.root.matches(":focus-within");
    const focused = [...nodes.responses.children].findIndex((node) => node.matches(":focus"));
    const state = { count, ranks, busy, pick: (index) => this.pick(index) };
    nodes.help.textContent = HELP[count];
    nodes.query.textContent = shown.query;
    nodes.query.hidden = !count;
    nodes.responses.replaceChildren(...shown.responses.map((text, index) => card(text, index, state)));
    nodes.skip.disabled = busy || !count;
    nodes.undo.disabled = busy || !(shown.can_undo || ranks.length);
    nodes.progress.textContent = busy ? "saving …" : shown.progress;
    nodes.problem.textContent = shown.problem;
    // A button that is replaced or switched off loses the focus, and the keys with it: give it back.
    const next = (!busy && nodes.responses.children[focused]) || nodes.root;
    if (held) next.focus({ preventScroll: true });
  }
}

function render({ model, el }) {
  const screen = new Screen(model);
  const update = () => screen.update();
  model.on("change:screen", update);
  el.append(screen.nodes.root);
  return () => model.off("change:screen", update);
}

export default { render };
