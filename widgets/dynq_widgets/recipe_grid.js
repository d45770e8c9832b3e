// The recipe grid. It shows `state`, asks for changes by messages, and decides nothing itself.

const KEYS = [
  ["arrows", "move; with Shift, or the mouse held down, over many"],
  ["+ −", "one format up, down"],
  ["p", "pin, let go"],
  ["Enter", "to the list of formats; Escape back"],
  ["Ctrl+A", "all that are shown"],
  ["Ctrl+Z Ctrl+Y", "undo, do again"],
];

const shortName = (name) => name.replace(/\.weight$/, "");
const percent = (share) => (share === null ? "" : share >= 0.9995 ? "100" : (100 * share).toFixed(share >= 0.0995 ? 0 : 1));
const signed = (text, value) => (value > 0 ? `+${text}` : text.replace("-", "−"));

/** One recipe as a table. Knows its cells by name, paints them from a state. */
class Panel {
  constructor(cells, palette, label, editable) {
    Object.assign(this, { cells, palette, label, editable, nodes: new Map(), shown: [] });
    this.kinds = [...new Set(cells.map((cell) => cell[2]))];
    this.layers = [...new Set(cells.map((cell) => cell[1]))].sort((a, b) => (a ?? -1) - (b ?? -1));
    this.caption = element("caption");
    this.table = element("table", { role: "grid", "aria-label": label, "aria-multiselectable": editable ? "true" : null });
  }

  /** Lays out the kinds that are not hidden. `head` makes the content of a header: (what, kind or layer, text) => node. */
  build(hidden, head) {
    const at = new Map(this.cells.map(([name, layer, kind]) => [`${layer}\n${kind}`, name]));
    const kinds = this.kinds.filter((kind) => !hidden.has(kind));
    this.nodes.clear();
    this.shown = [];
    const rows = this.layers.map((layer) => {
      const names = kinds.map((kind) => at.get(`${layer}\n${kind}`) ?? null);
      if (names.every((name) => name === null)) return null;
      this.shown.push(names);
      const text = layer === null ? "–" : String(layer);
      return element(
        "tr",
        {},
        element("th", { scope: "row", "data-layer": text }, head("layer", layer, text)),
        ...names.map((name) => (name === null ? element("td", { class: "dq-none" }) : this.cell(name))),
      );
    });
    const heads = kinds.map((kind) => element("th", { scope: "col", "data-kind": kind }, head("kind", kind, kind)));
    this.table.replaceChildren(
      this.caption,
      element("thead", {}, element("tr", {}, element("th", {}, "layer"), ...heads)),
      element("tbody", {}, ...rows.filter((row) => row !== null)),
    );
  }

  cell(name) {
    const inside = element("div", { class: "dq-cell" }, element("span"), element("span"));
    const node = element("td", { role: "gridcell", tabindex: this.editable ? "-1" : null, "data-tensor": name }, inside);
    this.nodes.set(name, node);
    return node;
  }

  /** Formats, pins and shares of a state; `other`: name -> format of the recipe that its bits are compared with. */
  paint(state, other) {
    const pinned = new Set(state.pinned);
    const totals = state.totals;
    if (this.label)
      this.caption.textContent =
        `${this.label}${totals.target}: ${bytesText(totals.tensor_bytes)}, ${digits(totals.bpw, 4)} bpw, ` +
        `predicted KLD ${digits(totals.kld)}`;
    this.cells.forEach(([name], i) => {
      const node = this.nodes.get(name);
      if (!node) return;
      const format = state.formats[i];
      const share = state.shares[i];
      const look = this.palette[format] ?? { colour: "transparent", ink: "inherit", bpw: NaN };
      node.style.setProperty("--dq-colour", look.colour);
      node.style.setProperty("--dq-on", look.ink);
      const [first, second] = node.firstChild.children;
      const beside = this.palette[other?.get(name)]?.bpw ?? look.bpw;
      const mark = look.bpw > beside ? " ▲" : look.bpw < beside ? " ▼" : "";
      first.textContent = format + mark;
      second.textContent = percent(share);
      node.dataset.format = format;
      node.toggleAttribute("data-pinned", pinned.has(i));
      const said = [
        shortName(name),
        `${format}, ${digits(look.bpw, 4)} bpw`,
        share === null ? null : `${(100 * share).toFixed(2)} % of the predicted KLD`,
        pinned.has(i) ? "pinned" : null,
        mark ? `${mark === " ▲" ? "more" : "fewer"} bits than ${other.get(name)} on the left` : null,
      ].filter((part) => part !== null);
      node.title = said.join("\n");
      node.setAttribute("aria-label", said.join(", "));
    });
  }
}

function render({ model, el }) {
  const root = rootOf(el, "grid");
  const hidden = new Set();
  let selected = new Set(model.get("selection"));
  let anchor = null; // [row, column] where a range begins
  let focus = [0, 0];
  let dragging = false;
  let kept = new Set(); // what was selected before the range

  const ask = (what) => model.send(what);
  const names = () => [...selected];
  const button = (name, label, press, title = null) =>
    element("button", { type: "button", "data-do": name, onclick: press, title }, label);

  // --- parts ------------------------------------------------------------------------------------------------------

  const palette = model.get("palette");
  const twoOf = model.get("other") !== null;
  const mine = new Panel(model.get("cells"), palette, twoOf ? "left: " : "", true);
  const theirs = twoOf ? new Panel(model.get("other_cells"), palette, "right: ", false) : null;

  const totals = element("div", { class: "dq-figures", role: "status", "aria-label": "totals" });
  const buttons = {
    undo: button("undo", "↶ Undo", () => ask({ do: "undo" })),
    redo: button("redo", "↷ Redo", () => ask({ do: "redo" })),
    solve: button("solve", "Solve the rest", () => ask({ do: "solve" }), "choose all that is not pinned anew"),
    pin: button("pin", "Pin", () => ask({ do: "pin", names: names(), on: true })),
    unpin: button("unpin", "Let go", () => ask({ do: "pin", names: names(), on: false })),
    down: button("down", "− bits", () => ask({ do: "step", names: names(), up: false })),
    up: button("up", "+ bits", () => ask({ do: "step", names: names(), up: true })),
    none: button("none", "Select none", () => select([])),
  };
  const kinds = [...new Set([...mine.kinds, ...(theirs?.kinds ?? [])])];
  const filters = kinds.map((kind) =>
    element("button", { type: "button", "data-filter": kind, "aria-pressed": "true", onclick: () => filter(kind) }, kind),
  );
  const legend = Object.entries(palette).map(([format, { colour, ink, bpw }]) =>
    element("span", { style: `background:${colour};color:${ink}`, title: `${digits(bpw, 4)} bpw` }, format),
  );
  const panels = element("div", { class: "dq-panels" }, mine.table, theirs?.table);
  const picker = element("div", { class: "dq-picker", "aria-label": "formats for the selection", role: "group" });
  const path = element("input", { type: "text", class: "dq-path", "aria-label": "recipe file", spellcheck: "false" });
  const message = element("div", { class: "dq-message", role: "status", "aria-live": "polite" });
  const keys = KEYS.map(([key, does]) => element("div", {}, element("kbd", {}, key), ` ${does}`));

  path.addEventListener("change", () => {
    model.set("path", path.value);
    model.save_changes();
  });
  root.append(
    element("div", { class: "dq-row" }, totals),
    element("div", { class: "dq-row", role: "toolbar", "aria-label": "edit" }, ...Object.values(buttons)),
    element("div", { class: "dq-row", role: "toolbar", "aria-label": "roles shown" }, element("span", {}, "show"), ...filters),
    element("div", { class: "dq-main" }, panels, picker),
    element(
      "div",
      { class: "dq-legend dq-row" },
      ...legend,
      element("span", { class: "dq-soft" }, "number: % of the predicted KLD · corner: pinned"),
      theirs ? element("span", { class: "dq-soft" }, "▲ ▼: more, fewer bits than on the left") : null,
    ),
    element(
      "div",
      { class: "dq-row" },
      path,
      button("save", "Save", () => ask({ do: "save" })),
      button("load", "Load", () => ask({ do: "load" })),
      button("export", "Export tensor types", () => ask({ do: "export" }), "for llama-quantize --tensor-type-file"),
    ),
    message,
    element("details", {}, element("summary", { class: "dq-soft" }, "keys"), ...keys),
  );

  // --- what is selected -------------------------------------------------------------------------------------------

  function select(list) {
    selected = new Set(list);
    for (const [name, node] of mine.nodes) node.setAttribute("aria-selected", String(selected.has(name)));
    model.set("selection", [...selected]);
    model.save_changes();
    showButtons();
    showPicker();
  }

  /** All names in the rectangle between two places. */
  function between([r0, c0], [r1, c1]) {
    const found = [];
    for (let r = Math.min(r0, r1); r <= Math.max(r0, r1); r++)
      for (let c = Math.min(c0, c1); c <= Math.max(c0, c1); c++) if (mine.shown[r]?.[c]) found.push(mine.shown[r][c]);
    return found;
  }

  function placeOf(node) {
    const name = node.dataset.tensor;
    const row = mine.shown.findIndex((names) => names.includes(name));
    return [row, mine.shown[row].indexOf(name)];
  }

  function moveTo(place, scroll = true) {
    const old = mine.nodes.get(mine.shown[focus[0]]?.[focus[1]]);
    if (old) old.tabIndex = -1;
    focus = place;
    const node = mine.nodes.get(mine.shown[place[0]]?.[place[1]]);
    if (!node) return;
    node.tabIndex = 0;
    if (scroll) node.focus();
  }

  /** The next place with a tensor from `focus` in a direction, or null. */
  function neighbour(down, right) {
    let [r, c] = focus;
    for (;;) {
      r += down;
      c += right;
      if (r < 0 || c < 0 || r >= mine.shown.length || c >= (mine.shown[0]?.length ?? 0)) return null;
      if (mine.shown[r][c]) return [r, c];
    }
  }

  const cellAt = (event) => event.target.closest?.("td[data-tensor]");
  mine.table.addEventListener("pointerdown", (event) => {
    const node = cellAt(event);
    if (!node || event.button !== 0) return;
    event.preventDefault();
    const place = placeOf(node);
    const name = node.dataset.tensor;
    const more = event.ctrlKey || event.metaKey;
    kept = more ? new Set(selected) : new Set();
    if (event.shiftKey && anchor) return moveTo(place), select([...kept, ...between(anchor, place)]);
    anchor = place;
    moveTo(place);
    if (more && selected.has(name)) return select(names().filter((other) => other !== name));
    dragging = true;
    select([...kept, name]);
  });
  mine.table.addEventListener("pointerover", (event) => {
    const node = dragging && cellAt(event);
    if (!node) return;
    const place = placeOf(node);
    moveTo(place);
    select([...kept, ...between(anchor, place)]);
  });
  const release = () => (dragging = false);
  window.addEventListener("pointerup", release);

  // --- keys -------------------------------------------------------------------------------------------------------

  const ARROWS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  mine.table.addEventListener("keydown", (event) => {
    if (!cellAt(event)) return;
    const control = event.ctrlKey || event.metaKey;
    if (event.key in ARROWS) {
      const place = neighbour(...ARROWS[event.key]);
      if (place && event.shiftKey) {
        anchor ??= focus;
        moveTo(place);
        select(between(anchor, place));
      } else if (place) {
        anchor = place;
        moveTo(place);
        select(between(place, place));
      }
    } else if (control && event.key === "a") select(mine.shown.flat().filter((name) => name));
    else if (control || event.altKey) return;
    else if (event.key === " ") toggle(mine.shown[focus[0]][focus[1]]);
    else if (event.key === "Escape") select([]);
    else if (event.key === "p") {
      const pinned = new Set(model.get("state").pinned);
      const on = !model.get("cells").every(([name], i) => !selected.has(name) || pinned.has(i));
      ask({ do: "pin", names: names(), on });
    } else if (event.key === "+" || event.key === "=") ask({ do: "step", names: names(), up: true });
    else if (event.key === "-") ask({ do: "step", names: names(), up: false });
    else if (event.key === "Enter") (picker.querySelector("[aria-pressed=true]") ?? picker.querySelector("button"))?.focus();
    else return;
    event.preventDefault();
  });
  picker.addEventListener("keydown", (event) => {
    const all = [...picker.querySelectorAll("button")];
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (event.key === "Escape") moveTo(focus);
    else if (step) all[Math.max(0, Math.min(all.length - 1, all.indexOf(document.activeElement) + step))]?.focus();
    else return;
    event.preventDefault();
  });
  root.addEventListener("keydown", (event) => {
    if (!(event.ctrlKey || event.metaKey) || event.target === path) return;
    const key = event.key.toLowerCase();
    if (key !== "z" && key !== "y") return;
    event.preventDefault();
    ask({ do: key === "y" || event.shiftKey ? "redo" : "undo" });
  });

  function toggle(name) {
    select(selected.has(name) ? names().filter((other) => other !== name) : [...selected, name]);
  }

  function filter(kind) {
    if (!hidden.delete(kind)) hidden.add(kind);
    filters[kinds.indexOf(kind)].setAttribute("aria-pressed", String(!hidden.has(kind)));
    build();
  }

  // --- what is shown ----------------------------------------------------------------------------------------------

  function build() {
    const choose = (what, value) => (event) => {
      const own = mine.cells.filter((cell) => cell[what === "layer" ? 1 : 2] === value && mine.nodes.has(cell[0]));
      select([...(event.ctrlKey || event.metaKey || event.shiftKey ? names() : []), ...own.map((cell) => cell[0])]);
    };
    mine.build(hidden, (what, value, text) =>
      element("button", { type: "button", onclick: choose(what, value), "aria-label": `select ${what} ${text}` }, text),
    );
    theirs?.build(hidden, (_, __, text) => element("span", { class: "dq-soft" }, text));
    anchor = null;
    focus = [0, Math.max(0, mine.shown[0]?.findIndex((name) => name) ?? 0)];
    moveTo(focus, false);
    paint();
    select(names().filter((name) => mine.nodes.has(name)));
  }

  function formatsOf(cells, state) {
    return new Map(cells.map(([name], i) => [name, state.formats[i]]));
  }

  function paint() {
    const state = model.get("state");
    const other = model.get("other");
    mine.paint(state, null);
    theirs?.paint(other, formatsOf(mine.cells, state));
    showTotals(state.totals);
    showButtons();
  }

  function showTotals({ target, used, budget, bpw, kld }) {
    const left = budget - used;
    const figure = (name, text, label) => element("span", {}, `${label} `, element("b", { "data-total": name }, text));
    const part = Math.min(100, (100 * used) / budget);
    totals.replaceChildren(
      figure("target", target, "target"),
      figure("size", bytesText(used), "size"),
      element("div", { class: "dq-meter", "data-over": left < 0, title: `${part.toFixed(2)} % of the target` },
        element("div", { style: `width:${part}%` })),
      element("span", { "data-total": "left", class: left < 0 ? "" : "dq-soft" },
        `${bytesText(Math.abs(left))} ${left < 0 ? "over the target" : "left"}`),
      figure("bpw", digits(bpw, 4), "bpw"),
      figure("kld", digits(kld, 4), "predicted KLD"),
    );
  }

  function showButtons() {
    const { can_undo, can_redo } = model.get("state");
    buttons.undo.disabled = !can_undo;
    buttons.redo.disabled = !can_redo;
    for (const name of ["pin", "unpin", "down", "up", "none"]) buttons[name].disabled = selected.size === 0;
  }

  function showPicker() {
    const told = model.get("alternatives");
    const held = document.activeElement?.dataset?.format;
    const inside = picker.contains(document.activeElement);
    if (selected.size === 0) {
      const hint = "Click a cell, a layer or a role; hold the mouse down to take many. What you set is pinned.";
      picker.replaceChildren(element("div", { class: "dq-soft" }, hint));
      return;
    }
    const state = model.get("state");
    const current = new Set(mine.cells.flatMap(([name], i) => (selected.has(name) ? [state.formats[i]] : [])));
    const [only] = selected;
    const title = selected.size === 1 ? shortName(only) : `${selected.size} tensors`;
    const rows = told.map(({ format, tensors, bytes, kld }) => {
      const { colour } = palette[format];
      const some = tensors < selected.size ? ` (${tensors} of them)` : "";
      const size = signed(bytesText(bytes), bytes);
      const loss = signed(digits(kld), kld);
      const attributes = {
        type: "button",
        "data-format": format,
        "aria-pressed": String(current.has(format)),
        "aria-label": `${format}: size ${size}, predicted KLD ${loss}${some}`,
        title: some ? `an option of ${tensors} of the ${selected.size}` : null,
        onclick: () => ask({ do: "set", names: names(), format }),
      };
      return element("li", {}, element("button", attributes,
        element("span", { class: "dq-swatch", style: `background:${colour}` }),
        element("span", {}, format),
        element("span", { class: "dq-number" }, size),
        element("span", { class: "dq-number" }, loss)));
    });
    const heads = ["", "format", "size", "KLD"].map((text, i) => element("span", { class: i > 1 ? "dq-number" : "" }, text));
    picker.replaceChildren(
      element("div", { class: "dq-title" }, title),
      element("div", { class: "dq-heads dq-soft" }, ...heads),
      element("ul", {}, ...rows),
    );
    if (inside) [...picker.querySelectorAll("button")].find((node) => node.dataset.format === held)?.focus();
  }

  const ends = [
    follow(model, ["state", "other"], () => (mine.nodes.size ? (paint(), showPicker()) : build())),
    follow(model, ["alternatives"], showPicker),
    follow(model, ["path"], () => (path.value = model.get("path"))),
    follow(model, ["message"], () => {
      const { kind = "info", text = "" } = model.get("message");
      message.dataset.kind = kind;
      message.textContent = text;
    }),
  ];
  return () => {
    window.removeEventListener("pointerup", release);
    ends.forEach((end) => end());
  };
}

export default { render };
