/** Small builders for HTML and SVG elements. Text always goes in as text, never as markup. */

const SVG = "http://www.w3.org/2000/svg";

function build(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== undefined && value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((c) => c !== undefined && c !== null));
  return element;
}

/** An HTML element. */
export function html(tag, attributes = {}, ...children) {
  return build(document.createElement(tag), attributes, children);
}

/** An SVG element. */
export function svg(tag, attributes = {}, ...children) {
  return build(document.createElementNS(SVG, tag), attributes, children);
}

/** Where a pointer is in an element's own pixels, whatever the canvas's zoom. */
export function within(element, event) {
  const box = element.getBoundingClientRect();
  return [
    ((event.clientX - box.left) * element.clientWidth) / (box.width || 1),
    ((event.clientY - box.top) * element.clientHeight) / (box.height || 1),
  ];
}

/** A note at a point of a plot, kept inside it. */
export function placeTip(tip, plot, x, y) {
  tip.hidden = false;
  const [w, h] = [tip.offsetWidth, tip.offsetHeight];
  const left = Math.min(Math.max(4, x - w / 2), Math.max(4, plot.clientWidth - w - 4));
  const top = y - h - 12 < 2 ? y + 14 : y - h - 12;
  tip.style.transform = `translate(${Math.round(left)}px, ${Math.round(top)}px)`;
}

let pen;

/** Width of a text in pixels in the page's font. */
export function textWidth(text, size, weight = 400) {
  pen ??= document.createElement("canvas").getContext("2d");
  pen.font = `${weight} ${size}px Inter, Arial, sans-serif`;
  return pen.measureText(text).width;
}
