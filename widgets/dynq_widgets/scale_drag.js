export default {
  render({ model, el }) {
    const root = rootOf(el, "scale");
    const { weights, importance, levels, scales, error, encoder } = model.get("block");
    const [width, left, right] = [860, 76, 8];
    const ends = Math.max(...weights.map(Math.abs)) * 1.15;
    const x = (value) => left + ((value + ends) / (2 * ends)) * (width - left - right);
    const blue = "#0072b2";
    const red = "#d55e00";
    const text = (px, py, words, anchor) => drawn("text", { x: px, y: py, "text-anchor": anchor }, words);

    const links = drawn("path", { stroke: "#999999", fill: "none" });
    const ticks = drawn("path", { stroke: red, "stroke-width": 3, fill: "none" });
    const line = drawn("svg", { viewBox: `0 0 ${width} 136`, width: "100%", style: `max-width: ${width}px; cursor: ew-resize; touch-action: none` },
      text(left - 8, 54, "weights", "end"), text(left - 8, 106, "levels", "end"), links,
      ...weights.map((w, i) =>
        drawn("circle", { cx: x(w), cy: 50, r: 2 + 1.8 * Math.sqrt(importance[i]), fill: blue, "fill-opacity": 0.75 },
          drawn("title", {}, `weight ${i}: ${digits(w)}, importance ${digits(importance[i])}`))),
      ticks, text(x(0), 128, "0", "middle"), text(x(-ends / 1.15), 128, digits(-ends / 1.15), "middle"), text(x(ends / 1.15), 128, digits(ends / 1.15), "middle"));

    // the error of every scale, on a logarithmic axis
    const curve = drawn("path", { stroke: blue, "stroke-width": 1.5, fill: "none" });
    const here = drawn("circle", { r: 5, fill: red });
    const star = drawn("path", { stroke: "currentColor", "stroke-width": 2, fill: "none" });
    const chart = drawn("svg", { viewBox: `0 0 ${width} 170`, width: "100%", style: `max-width: ${width}px; cursor: ew-resize; touch-action: none` },
      text(left - 8, 20, "error", "end"), text((left + width - right) / 2, 166, "scale", "middle"), curve, star, here);

    const slider = element("input", { type: "range", min: 0, max: scales.length - 1, class: "dq-grow", "aria-label": "scale" });
    const counts = element("input", { type: "checkbox" });
    const button = element("button", { type: "button" }, "Show what the encoder finds");
    const told = element("div", { class: "dq-number", "aria-live": "polite", style: "text-align: left" });
    root.append(line, element("div", { class: "dq-row" }, element("span", {}, "scale"), slider),
      element("div", { class: "dq-row" }, element("label", {}, counts, " importance counts"), button), told, chart);

    let revealed = false;
    const which = () => (model.get("weighted") ? "on" : "off");
    const nearest = (scale) => scales.reduce((best, one, i) => (Math.abs(one - scale) < Math.abs(scales[best] - scale) ? i : best), 0);
    const move = (at) => {
      model.set("at", at);
      model.save_changes();
    };
    const px = (scale) => left + ((scale - scales[0]) / (scales[scales.length - 1] - scales[0])) * (width - left - right);

    slider.addEventListener("input", () => move(Number(slider.value)));
    counts.addEventListener("change", () => {
      model.set("weighted", counts.checked);
      model.save_changes();
    });
    button.addEventListener("click", () => {
      revealed = true;
      move(nearest(encoder[which()][0]));
      draw();
    });

    // a level is taken where the pointer goes down, and the scale follows it
    const dragged = (svg, start, follow) => {
      let level = null;
      const point = (event) => new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse()).x;
      svg.addEventListener("pointerdown", (event) => {
        svg.setPointerCapture(event.pointerId);
        level = start(point(event));
        move(follow(point(event), level));
      });
      svg.addEventListener("pointermove", (event) => {
        if (level !== null) move(follow(point(event), level));
      });
      for (const name of ["pointerup", "pointercancel"]) svg.addEventListener(name, () => (level = null));
    };
    const value = (at) => ((at - left) / (width - left - right)) * 2 * ends - ends;
    dragged(line,
      (at) => {
        const scale = scales[model.get("at")] || 1e-6;
        const outer = levels.filter((level) => Math.abs(level) >= 1);
        return outer.reduce((best, one) => (Math.abs(one * scale - value(at)) < Math.abs(best * scale - value(at)) ? one : best));
      },
      (at, level) => nearest(value(at) / level));
    dragged(chart, () => 0, (at) => nearest(scales[0] + ((at - left) / (width - left - right)) * (scales[scales.length - 1] - scales[0])));

    const draw = () => {
      const at = model.get("at");
      const scale = scales[at];
      const errors = error[which()];
      const points = levels.map((level) => level * scale);
      const stored = weights.map((w) => points.reduce((best, one) => (Math.abs(one - w) < Math.abs(best - w) ? one : best)));
      links.setAttribute("d", weights.map((w, i) => `M${x(w)} 56L${x(stored[i])} 98`).join(""));
      ticks.setAttribute("d", points.filter((p) => Math.abs(p) <= ends).map((p) => `M${x(p)} 98v14`).join(""));
      const logs = errors.map((e) => Math.log10(e));
      const [low, high] = [Math.min(...logs) - 0.05, Math.max(...logs)];
      const y = (log) => 145 - ((log - low) / (high - low)) * 135;
      curve.setAttribute("d", logs.map((log, i) => `${i ? "L" : "M"}${px(scales[i]).toFixed(1)} ${y(log).toFixed(1)}`).join(""));
      here.setAttribute("cx", px(scale));
      here.setAttribute("cy", y(logs[at]));
      const [found, least] = encoder[which()];
      star.setAttribute("d", revealed ? `M${px(found)} ${y(Math.log10(least)) - 9}v18m-9 -9h18` : "");
      slider.value = at;
      counts.checked = model.get("weighted");
      const over = (100 * (errors[at] / Math.min(...errors) - 1)).toFixed(1);
      told.textContent = `scale ${digits(scale)}, ${model.get("weighted") ? "weighted error" : "error"} ${errors[at].toExponential(3)}` +
        (revealed ? `: ${over} % over the best of ${scales.length} scales; the encoder has ${digits(found)}, ${least.toExponential(3)}` : "");
    };
    return follow(model, ["at", "weighted"], draw);
  },
};
