// The budget explorer. It shows `state`, says what size is `wanted`, and decides nothing itself.

const WIDE = 900;
const CHART = { left: 64, right: 16, top: 12, bottom: 40, height: 320 };
const BARS = { left: 64, right: 16, top: 8, bottom: 34, height: 150 };

/** About `count` round numbers from low to high. */
function roundSteps(low, high, count) {
  const rough = (high - low) / count;
  const unit = 10 ** Math.floor(Math.log10(rough));
  const step = unit * [1, 2, 5, 10].find((m) => m * unit >= rough);
  const found = [];
  for (let n = Math.ceil(low / step - 1e-9); n * step <= high * (1 + 1e-12); n++) found.push(n * step);
  return found;
}

function render({ model, el }) {
  const root = rootOf(el, "budget");
  const scale = model.get("scale");
  const mixes = model.get("mixes");
  const palette = model.get("palette");
  const [fileUnit, fileSize] = scale.high + scale.outside >= 1e9 ? ["GB", 1e9] : ["MB", 1e6];

  /** Units of the slider: from bytes of tensor data and back, and the target as dynq reads it. */
  const UNITS = {
    file: { label: fileUnit, of: (b) => (b + scale.outside) / fileSize, back: (v) => v * fileSize - scale.outside, text: (v) => `${v}${fileUnit}`, places: 4, axis: `file, ${fileUnit} (powers of ten)` },
    bpw: { label: "bpw", of: (b) => (8 * b) / scale.n_weights, back: (v) => (v * scale.n_weights) / 8, text: (v) => `${v}bpw`, places: 3, axis: "bits per weight, all tensors" },
    like: { label: "like a mix", of: (b) => (8 * b) / scale.n_weights, back: (v) => (v * scale.n_weights) / 8, text: (i) => `like:${mixes[i].name}`, places: 0, axis: "bits per weight, all tensors" },
  };
  const unitOf = (target) => (/^like:/i.test(target) ? "like" : /b(pw|its?)$/i.test(target) ? "bpw" : "file");
  let unit = unitOf(model.get("state").totals.target);
  let dragging = false;

  function want(target, moving) {
    model.set("wanted", { target, moving });
    model.save_changes();
  }

  /** Aim at a number in the present unit; among the mixes it is their place in the list. */
  function wantValue(value, moving) {
    if (unit === "like") want(UNITS.like.text(Math.round(value)), moving);
    else if (value > 0) want(UNITS[unit].text(Number(value.toFixed(UNITS[unit].places + 2))), moving);
  }

  // --- controls ---------------------------------------------------------------------------------------------------

  const choices = Object.entries(UNITS).map(([name, { label }]) =>
    element("button", { type: "button", "data-unit": name, onclick: () => take(name) }, label),
  );
  const slider = element("input", { type: "range", class: "dq-slider", "aria-label": "size" });
  const number = element("input", { type: "number", "aria-label": "size as a number", min: "0" });
  const list = element(
    "select",
    { "aria-label": "mix whose size is taken" },
    ...mixes.map(({ name }) => element("option", { value: name }, name)),
  );
  slider.addEventListener("input", () => ((dragging = true), wantValue(Number(slider.value), true)));
  slider.addEventListener("change", () => ((dragging = false), wantValue(Number(slider.value), false)));
  number.addEventListener("change", () => wantValue(Number(number.value), false));
  list.addEventListener("change", () => want(`like:${list.value}`, false));

  function take(name) {
    if (name === unit) return;
    unit = name;
    const { tensor_bytes } = model.get("state").totals;
    const near = mixes.reduce((best, mix, i) => (Math.abs(mix.bytes - tensor_bytes) < Math.abs(mixes[best].bytes - tensor_bytes) ? i : best), 0);
    limits();
    chart.axes();
    if (name === "like") want(UNITS.like.text(near), false);
    else want(UNITS[name].text(Number(UNITS[name].of(tensor_bytes).toFixed(UNITS[name].places))), false);
  }

  function limits() {
    const { of, places } = UNITS[unit];
    const [low, high] = unit === "like" ? [0, mixes.length - 1] : [of(scale.low), of(scale.high)];
    // the smallest size rounded up, so that it can be had
    const least = Math.ceil(low * 10 ** places) / 10 ** places;
    Object.assign(slider, { min: String(least), max: String(high), step: unit === "like" ? "1" : String(10 ** -places) });
    number.step = String(10 ** -Math.min(places, 2));
    number.hidden = unit === "like";
    list.hidden = unit !== "like";
  }

  // --- the frontier -----------------------------------------------------------------------------------------------

  class Chart {
    constructor() {
      const { height } = CHART;
      this.grid = drawn("g");
      this.line = drawn("path", { class: "dq-frontier" });
      this.marks = drawn("g");
      this.limit = drawn("line", { class: "dq-limit" });
      this.here = drawn("circle", { class: "dq-here", r: 7, "data-point": "here" });
      this.node = drawn(
        "svg",
        { viewBox: `0 0 ${WIDE} ${height}`, class: "dq-chart", role: "img", "aria-label": "predicted KLD of the best recipe of every size, and of llama.cpp's mixes" },
        this.grid, this.line, this.limit, this.marks, this.here,
      );
      const aim = (event, moving) => {
        const box = this.node.getBoundingClientRect();
        const x = ((event.clientX - box.left) / box.width) * WIDE;
        const bytes = Math.min(scale.high, Math.max(scale.low * 1.0005, this.bytesAt(x)));
        if (unit === "like") take("bpw");
        wantValue(UNITS[unit].of(bytes), moving);
      };
      this.node.addEventListener("pointerdown", (event) => {
        if (event.button !== 0) return;
        const name = event.target.dataset?.mix;
        if (name) return (unit = "like"), limits(), this.axes(), want(`like:${name}`, false);
        this.node.setPointerCapture?.(event.pointerId);
        dragging = true;
        aim(event, true);
      });
      this.node.addEventListener("pointermove", (event) => dragging && aim(event, true));
      this.node.addEventListener("pointerup", (event) => dragging && ((dragging = false), aim(event, false)));
    }

    /** Where the axes begin and end: all sizes of the slider, all losses of curve and mixes above a thousandth of a nat. */
    measure() {
      const { bytes, kld } = model.get("frontier");
      const inside = kld.filter((value, i) => value > 0 && bytes[i] <= scale.high);
      const seen = [...inside, ...mixes.filter((mix) => mix.kld > 0 && mix.bytes <= scale.high).map((mix) => mix.kld)];
      const low = Math.log10(Math.max(1e-6, Math.min(...seen)));
      const high = Math.log10(Math.max(...seen, 1e-5));
      this.y0 = low - 0.04 * (high - low);
      this.y1 = high + 0.06 * (high - low);
    }

    x(bytes) {
      return CHART.left + ((bytes - scale.low) / (scale.high - scale.low || 1)) * (WIDE - CHART.left - CHART.right);
    }

    bytesAt(x) {
      return scale.low + ((x - CHART.left) / (WIDE - CHART.left - CHART.right)) * (scale.high - scale.low);
    }

    y(kld) {
      const part = (Math.log10(Math.max(kld, 1e-12)) - this.y0) / (this.y1 - this.y0);
      return CHART.height - CHART.bottom - Math.min(1, Math.max(0, part)) * (CHART.height - CHART.top - CHART.bottom);
    }

    axes() {
      this.measure();
      const { of, back, axis } = UNITS[unit];
      const bottom = CHART.height - CHART.bottom;
      const nodes = [];
      for (const value of roundSteps(of(scale.low), of(scale.high), 10)) {
        const x = this.x(back(value));
        nodes.push(drawn("line", { class: "dq-axis", x1: x, x2: x, y1: CHART.top, y2: bottom }));
        nodes.push(drawn("text", { x, y: bottom + 15, "text-anchor": "middle" }, String(Number(value.toFixed(6)))));
      }
      for (let e = Math.floor(this.y0); e <= Math.ceil(this.y1); e++)
        for (const m of this.y1 - this.y0 < 3 ? [1, 2, 5] : [1]) {
          const log = e + Math.log10(m);
          if (log < this.y0 || log > this.y1) continue;
          const y = this.y(10 ** log);
          nodes.push(drawn("line", { class: "dq-axis", x1: CHART.left, x2: WIDE - CHART.right, y1: y, y2: y }));
          nodes.push(drawn("text", { x: CHART.left - 6, y: y + 4, "text-anchor": "end" }, digits(m * 10 ** e, 1)));
        }
      const middle = (CHART.top + bottom) / 2;
      nodes.push(drawn("text", { x: (CHART.left + WIDE) / 2, y: CHART.height - 6, "text-anchor": "middle", class: "dq-soft" }, axis));
      nodes.push(drawn("text", { x: 0, y: 0, "text-anchor": "middle", class: "dq-soft", transform: `translate(14 ${middle}) rotate(-90)` }, "predicted KLD, nats per token"));
      this.grid.replaceChildren(...nodes);
      this.curve();
    }

    curve() {
      const { bytes, kld } = model.get("frontier");
      const points = bytes.flatMap((size, i) => (size <= scale.high && kld[i] > 0 ? [`${this.x(size).toFixed(1)},${this.y(kld[i]).toFixed(1)}`] : []));
      this.line.setAttribute("d", points.length ? `M${points.join("L")}` : "");
      const shown = mixes.filter((mix) => mix.kld > 0 && mix.bytes <= scale.high);
      const around = (x, y) => ({ x0: x - 5, x1: x + 5, y0: y - 5, y1: y + 5 });
      const placed = shown.map((mix) => around(this.x(mix.bytes), this.y(mix.kld)));
      const free = (box) => placed.every((other) => box.x1 < other.x0 || box.x0 > other.x1 || box.y1 < other.y0 || box.y0 > other.y1);
      this.marks.replaceChildren(
        ...shown.map((mix) => {
          const [x, y] = [this.x(mix.bytes), this.y(mix.kld)];
          const width = 6.4 * mix.name.length;
          const spots = [[8, -6], [8, 4], [-width / 2, -10], [8, -16], [-width / 2, 18], [8, 14], [-width - 8, 4], [-width - 8, 14]];
          const spot = spots.find(([dx, dy]) => free({ x0: x + dx, x1: x + dx + width, y0: y + dy - 9, y1: y + dy + 2 }) && x + dx + width < WIDE);
          if (spot) placed.push({ x0: x + spot[0], x1: x + spot[0] + width, y0: y + spot[1] - 9, y1: y + spot[1] + 2 });
          const dot = drawn("circle", { class: "dq-mix", r: 5, cx: x, cy: y, "data-mix": mix.name },
            drawn("title", {}, `${mix.name}: ${bytesText(mix.bytes)}, predicted KLD ${digits(mix.kld)}`));
          return drawn("g", {}, dot, spot ? drawn("text", { x: x + spot[0], y: y + spot[1], "data-mix": mix.name }, mix.name) : null);
        }),
      );
    }

    point({ tensor_bytes, kld, target, used, budget }) {
      const [x, y] = [this.x(tensor_bytes), this.y(kld)];
      this.here.setAttribute("cx", x);
      this.here.setAttribute("cy", y);
      const at = this.x(tensor_bytes + budget - used);
      for (const [key, value] of Object.entries({ x1: at, x2: at, y1: CHART.top, y2: CHART.height - CHART.bottom })) this.limit.setAttribute(key, value);
      for (const dot of this.marks.querySelectorAll("circle")) dot.toggleAttribute("data-aimed", target.toUpperCase() === `LIKE:${dot.dataset.mix}`);
    }
  }

  // --- the layers -------------------------------------------------------------------------------------------------

  const bars = drawn("svg", { viewBox: `0 0 ${WIDE} ${BARS.height}`, class: "dq-bars", role: "img", "aria-label": "formats' share of each layer's weights" });
  const legend = element("div", { class: "dq-legend dq-row" });

  function showLayers(layers) {
    const bottom = BARS.height - BARS.bottom;
    const step = (WIDE - BARS.left - BARS.right) / layers.length;
    const order = Object.keys(palette);
    const every = Math.ceil(22 / step);
    const nodes = layers.flatMap(([layer, parts], i) => {
      const name = layer === null ? "no layer" : `layer ${layer}`;
      let y = bottom;
      const pieces = order.filter((format) => parts[format]).map((format) => {
        const height = parts[format] * (bottom - BARS.top);
        y -= height;
        return drawn("rect", { x: BARS.left + i * step + 0.5, y, width: Math.max(1, step - 1), height, fill: palette[format].colour, "data-layer": layer ?? "", "data-format": format },
          drawn("title", {}, `${name}: ${(100 * parts[format]).toFixed(1)} % ${format}`));
      });
      const label = i % every === 0 ? drawn("text", { x: BARS.left + (i + 0.5) * step, y: bottom + 14, "text-anchor": "middle" }, layer === null ? "–" : String(layer)) : null;
      return label ? [...pieces, label] : pieces;
    });
    for (const part of [0, 0.5, 1]) nodes.push(drawn("text", { x: BARS.left - 6, y: bottom - part * (bottom - BARS.top) + 4, "text-anchor": "end" }, `${100 * part} %`));
    nodes.push(drawn("text", { x: (BARS.left + WIDE) / 2, y: BARS.height - 4, "text-anchor": "middle", class: "dq-soft" }, "layer; share of its weights in each format"));
    bars.replaceChildren(...nodes);
    const used = order.filter((format) => layers.some(([, parts]) => parts[format]));
    legend.replaceChildren(...used.map((format) => element("span", { style: `background:${palette[format].colour};color:${palette[format].ink}`, title: `${digits(palette[format].bpw, 4)} bpw` }, format)));
  }

  // --- all of it --------------------------------------------------------------------------------------------------

  const figures = element("div", { class: "dq-figures", role: "status", "aria-label": "chosen size" });
  const message = element("div", { class: "dq-message", role: "status", "aria-live": "polite" });
  const chart = new Chart();
  root.append(
    element("div", { class: "dq-row" }, element("span", {}, "size in"), ...choices, slider, number, list),
    element("div", { class: "dq-row" }, figures),
    chart.node,
    bars,
    legend,
    message,
  );

  function show() {
    const { totals, mix_kld, pinned, layers } = model.get("state");
    const now = unitOf(totals.target);
    if (now !== unit && !dragging) {
      unit = now;
      limits();
      chart.axes();
    }
    for (const choice of choices) choice.setAttribute("aria-pressed", String(choice.dataset.unit === unit));
    const place = mixes.findIndex(({ name }) => `LIKE:${name}` === totals.target.toUpperCase());
    const value = unit === "like" ? place : UNITS[unit].of(totals.tensor_bytes + totals.budget - totals.used);
    if (!dragging) slider.value = String(value);
    slider.setAttribute("aria-valuetext", totals.target);
    if (document.activeElement !== number) number.value = value.toFixed(UNITS[unit].places);
    if (place >= 0) list.value = mixes[place].name;
    const figure = (name, text, label) => element("span", {}, `${label} `, element("b", { "data-total": name }, text));
    figures.replaceChildren(
      figure("target", totals.target, "target"),
      figure("size", bytesText(totals.used), unit === "file" ? "file" : "tensor data"),
      figure("bpw", digits(totals.bpw, 4), "bpw"),
      figure("kld", digits(totals.kld, 4), "predicted KLD"),
      ...(mix_kld ? [figure("ratio", (totals.kld / mix_kld).toFixed(2), "over that of the mixes at these bytes")] : []),
      ...(pinned ? [figure("pinned", String(pinned), "pinned")] : []),
    );
    chart.point(totals);
    showLayers(layers);
  }

  limits();
  chart.axes();
  const ends = [
    follow(model, ["frontier"], () => (chart.axes(), chart.point(model.get("state").totals))),
    follow(model, ["state"], show),
    follow(model, ["message"], () => {
      const { kind = "info", text = "" } = model.get("message");
      message.dataset.kind = kind;
      message.textContent = text;
    }),
  ];
  return () => ends.forEach((end) => end());
}

export default { render };
