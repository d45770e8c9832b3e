export default {
  render({ model, el }) {
    const root = rootOf(el, "blocks");
    const ask = (change) => {
      model.set("asked", { ...model.get("asked"), ...change });
      model.save_changes();
    };
    const number = (key) =>
      element("input", {
        type: "number",
        min: 0,
        style: "width: 7em",
        onchange: (event) => ask({ [key]: Math.max(0, Math.round(Number(event.target.value) || 0)) }),
      });
    const tensor = element("select", { onchange: () => ask({ tensor: tensor.value }) });
    const format = element("select", { onchange: () => ask({ format: format.value }) });
    const row = number("row");
    const index = number("index");
    const rows = element("span", { class: "dq-soft" });
    const blocks = element("span", { class: "dq-soft" });
    const title = element("div", { class: "dq-soft" });
    const picture = element("div", { tabindex: 0, role: "group", "aria-label": "weights and bits; arrow keys choose a weight" });
    const detail = element("div", { class: "dq-message", "aria-live": "polite", style: "min-height: 2.8em; margin-top: 6px; font-family: var(--dq-mono)" });
    root.append(
      element("div", { class: "dq-row" },
        element("label", {}, "tensor ", tensor),
        element("label", {}, "format ", format),
        element("label", {}, "row ", row), rows,
        element("label", {}, "block ", index), blocks),
      title, picture, detail);

    let shown, overlay, weight;

    const fill = (select, values, chosen) => {
      if (select.options.length !== values.length || values.some((value, i) => select.options[i].value !== value))
        select.replaceChildren(...values.map((value) => element("option", { value }, value)));
      select.value = chosen;
    };

    const cornerOf = (bit) => {
      const { x, y, cell, gap, row, columns } = shown.geometry.bits;
      const byte = bit >> 3;
      return [x + (byte % columns) * (8 * cell + gap) + (7 - (bit & 7)) * cell, y + Math.floor(byte / columns) * row];
    };

    const frame = (fields, weights) => {
      const { cell, tall } = shown.geometry.bits;
      const band = shown.geometry.weights;
      overlay.replaceChildren(
        ...weights.map((i) =>
          drawn("rect", { x: band.x + i * band.step, y: band.top, width: band.step, height: band.bottom - band.top, fill: "currentColor", "fill-opacity": 0.13 })),
        ...fields.flatMap((field) =>
          field.bits.map((bit) => {
            const [x, y] = cornerOf(bit);
            return drawn("rect", { x, y, width: cell - 0.8, height: tall, fill: "none", stroke: "currentColor", "stroke-width": 1.6 });
          })));
    };

    const lookAtWeight = (i) => {
      weight = i;
      const fields = shown.fields.filter((field) => field.weights.includes(i));
      frame(fields, [i]);
      const values = Object.entries(shown.weights).map(([name, list]) => `${name} ${digits(list[i])}`);
      const made = fields.map((field) => `${field.name}: ${field.text}`);
      detail.textContent = `weight ${i}: ${values.join(", ")}  |  ${made.join("; ")}`;
    };

    const lookAtBit = (bit) => {
      const field = shown.fields.find((one) => one.bits.includes(bit));
      if (!field) return;
      frame([field], field.weights);
      const { length } = field.weights;
      const reach = length === 0 ? "no weight" : length === 1 ? `weight ${field.weights[0]}` : `${length} weights, the first is ${field.weights[0]}`;
      detail.textContent = `${field.name}: ${field.text}, reaches ${reach}`;
    };

    picture.addEventListener("pointermove", (event) => {
      const svg = picture.querySelector("svg");
      if (!svg) return;
      const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
      const band = shown.geometry.weights;
      const place = shown.geometry.bits;
      if (at.y <= band.bottom) {
        const i = Math.floor((at.x - band.x) / band.step);
        if (i >= 0 && i < shown.weights.stored.length) lookAtWeight(i);
        return;
      }
      const byte = Math.floor((at.x - place.x) / (8 * place.cell + place.gap));
      const inside = Math.floor((at.x - place.x - byte * (8 * place.cell + place.gap)) / place.cell);
      const line = Math.floor((at.y - place.y) / place.row);
      if (line >= 0 && byte >= 0 && byte < place.columns && inside < 8) lookAtBit(8 * (line * place.columns + byte) + 7 - inside);
    });
    picture.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!step) return;
      event.preventDefault();
      const count = shown.weights.stored.length;
      lookAtWeight(weight === undefined ? 0 : (weight + step + count) % count);
    });

    return follow(model, ["shown"], () => {
      shown = model.get("shown");
      fill(tensor, shown.tensors, shown.tensor);
      fill(format, shown.formats, shown.format);
      row.value = shown.row;
      row.max = shown.rows - 1;
      index.value = shown.index;
      index.max = shown.blocks - 1;
      rows.textContent = `of ${shown.rows}`;
      blocks.textContent = `of ${shown.blocks}`;
      title.textContent = shown.title;
      detail.textContent = shown.message;
      detail.dataset.kind = shown.message ? "error" : "";
      // as XML it is whole or an error, and not mended into something else
      picture.replaceChildren(document.importNode(new DOMParser().parseFromString(shown.svg, "image/svg+xml").documentElement, true));
      overlay = drawn("g", { "pointer-events": "none" });
      picture.querySelector("svg").append(overlay);
      weight = undefined;
    });
  },
};
