// The divergence reader. It shows one `page`; turning to another chunk asks for that one.

const visible = (text) => text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "·");
const inPercent = (part) => `${(100 * part).toFixed(part >= 0.0995 ? 0 : part >= 0.00995 ? 1 : 2)} %`;
const SCALE = [["< 0.01", 0], ["0.03", 0.19], ["0.1", 0.4], ["0.3", 0.6], ["1", 0.81], ["≥ 3 nats", 1]];

function render({ model, el }) {
  const root = rootOf(el, "reader");
  let nodes = [];
  let order = []; // places, worst first
  let chosen = null; // the place that stays shown when the mouse is elsewhere

  const button = (name, label, press) => element("button", { type: "button", "data-do": name, onclick: press }, label);
  const turn = (by) => {
    const to = model.get("chunk") + by;
    if (to < 0 || to >= model.get("n_chunks")) return;
    root.setAttribute("aria-busy", "true");
    model.set("chunk", to);
    model.save_changes();
  };
  const jump = (by) => {
    const rank = chosen === null ? (by > 0 ? -1 : 0) : order.indexOf(chosen);
    choose(order[Math.max(0, Math.min(order.length - 1, rank + by))]);
  };
  const back = button("previous", "◂ chunk", () => turn(-1));
  const on = button("next", "chunk ▸", () => turn(1));
  const where = element("span", { "data-total": "chunk", role: "status" });
  const text = element("div", { class: "dq-text", role: "listbox", "aria-label": "text, by token", tabindex: "-1" });
  const about = element("div", { class: "dq-about", role: "status", "aria-live": "polite", "aria-label": "the token and both models' guesses" });
  const scale = SCALE.map(([label, shade]) => element("span", { style: `--dq-shade:${shade}` }, label));
  root.append(
    element("div", { class: "dq-row" }, back, where, on, button("worse", "worse token", () => jump(-1)), button("worst", "next worst", () => jump(1)),
      element("span", { class: "dq-grow" }), element("span", { class: "dq-soft" }, "KLD"), element("span", { class: "dq-scale" }, ...scale)),
    element("div", { class: "dq-main" }, text, about),
  );

  function table(caption, rows, followed) {
    const bar = (part) => element("span", { class: "dq-part", style: `width:${(100 * part).toFixed(1)}%` });
    return element(
      "table",
      {},
      element("caption", {}, caption),
      element("thead", {}, element("tr", {}, ...["", "original", "file"].map((head) => element("th", { class: "dq-soft", scope: "col" }, head)))),
      element("tbody", {}, ...rows.map(([word, p, q]) =>
        element("tr", { "data-followed": word === followed },
          element("td", { title: word }, visible(word)), element("td", {}, inPercent(p), bar(p)), element("td", {}, inPercent(q), bar(q))))),
    );
  }

  function tell(place) {
    const { tokens } = model.get("page");
    if (place === null || !tokens[place]) {
      about.replaceChildren(element("div", { class: "dq-soft" }, "Point at a token, or walk with the arrow keys. Coloured are the places where the file's prediction differs from the original's."));
      return;
    }
    const { kld, followed, original, file } = tokens[place];
    about.replaceChildren(
      element("div", {}, "KLD ", element("b", { "data-total": "kld" }, digits(kld, 3)), " nats, rank ", element("b", {}, String(order.indexOf(place) + 1)), ` of ${tokens.length}`),
      table("what followed", [followed], followed[0]),
      table("the original expects", original, followed[0]),
      table("the file expects", file, followed[0]),
    );
  }

  function choose(place) {
    if (chosen !== null && nodes[chosen]) {
      nodes[chosen].setAttribute("aria-selected", "false");
      nodes[chosen].tabIndex = -1;
    }
    chosen = place;
    const node = nodes[place];
    node.setAttribute("aria-selected", "true");
    node.tabIndex = 0;
    node.focus({ preventScroll: true });
    // the box of the text alone scrolls: the page stays where it is
    const [inner, outer] = [node.getBoundingClientRect(), text.getBoundingClientRect()];
    if (inner.top < outer.top || inner.bottom > outer.bottom) text.scrollTop += inner.top - outer.top - outer.height / 2;
    tell(place);
  }

  text.addEventListener("pointerover", (event) => event.target.dataset.place && tell(Number(event.target.dataset.place)));
  text.addEventListener("pointerleave", () => tell(chosen));
  text.addEventListener("click", (event) => event.target.dataset.place && choose(Number(event.target.dataset.place)));
  text.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 8, ArrowUp: -8, Home: -1e9, End: 1e9 }[event.key];
    if (!step || !nodes.length) return;
    event.preventDefault();
    choose(Math.max(0, Math.min(nodes.length - 1, (chosen ?? -step) + step)));
  });

  function show() {
    const { chunk, before, mean_kld, tokens } = model.get("page");
    const n = model.get("n_chunks");
    root.removeAttribute("aria-busy");
    where.textContent = `${chunk + 1} of ${n}, mean KLD ${digits(mean_kld, 3)}`;
    back.disabled = chunk <= 0;
    on.disabled = chunk >= n - 1;
    order = tokens.map((_, place) => place).sort((a, b) => tokens[b].kld - tokens[a].kld);
    chosen = null;
    nodes = tokens.map(({ piece, kld, shade }, place) =>
      element("span", { class: "dq-token", role: "option", "aria-selected": "false", tabindex: place ? "-1" : "0", "data-place": place, "data-kld": kld, style: `--dq-shade:${shade}`,
        "aria-label": `${visible(piece)}, KLD ${digits(kld, 2)}` }, piece || "·"));
    text.replaceChildren(element("span", { class: "dq-soft" }, before), ...nodes);
    // the text that was only read is long: begin where the scores do, its last lines still in sight
    if (nodes[0]) text.scrollTop = Math.max(0, nodes[0].offsetTop - text.offsetTop - 60);
    tell(null);
  }

  return follow(model, ["page"], show);
}

export default { render };
