// What the views share. It stands before each view's own module in one string: there is no bundler.

/** An element with attributes and children. Texts become text nodes, so nothing that comes from a model is markup. */
function element(name, attributes = {}, ...children) {
  return dressed(document.createElement(name), attributes, children);
}

/** The same for SVG. */
function drawn(name, attributes = {}, ...children) {
  return dressed(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
}

function dressed(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value === true) node.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(key, value);
  }
  // JupyterLab's shortcuts for whatever has the focus (arrow keys) look at the node itself before they look above it
  if (node.matches("button, input, select, summary, [tabindex]")) node.setAttribute("data-lm-suppress-shortcuts", "true");
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

/** The root of a view. JupyterLab's shortcuts (z, dd) stay out of it. */
function rootOf(el, name) {
  const root = element("div", { class: `dq dq-${name}`, "data-lm-suppress-shortcuts": "true" });
  el.replaceChildren(root);
  return root;
}

/** Calls `handler` now and whenever one of the traits changes; gives a function that ends this. */
function follow(model, names, handler) {
  for (const name of names) model.on(`change:${name}`, handler);
  handler();
  return () => names.forEach((name) => model.off(`change:${name}`, handler));
}

/** Bytes as "880 B", "6.370 MB", "8.030 GB" (powers of ten). */
function bytesText(bytes) {
  if (Math.abs(bytes) < 1e3) return `${Math.round(bytes)} B`;
  const [unit, size] = Math.abs(bytes) >= 1e9 ? ["GB", 1e9] : Math.abs(bytes) >= 1e6 ? ["MB", 1e6] : ["kB", 1e3];
  return `${digits(bytes / size, 4)} ${unit}`;
}

/** A number with so many significant digits, never with an exponent where it is readable without. */
function digits(value, count = 3) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  if (value === 0) return "0";
  const size = Math.floor(Math.log10(Math.abs(value)));
  return size < -5 ? value.toExponential(count - 1) : value.toFixed(Math.min(8, Math.max(0, count - 1 - size)));
}
