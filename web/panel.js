/**
 * A node's panel: views of its results, one below the other, or a sentence where there are none yet.
 *
 * A view is {element, show(output), draw()}: `show` takes what a node's execution returned for the page and says whether there
 * is something to see, `draw` fits a picture to its present size. A class `realera-fills` marks a view that takes spare height.
 */

import { html } from "./elements.js";

const WIDTH = 340; // least width of a panel in the canvas's units

/** Hands the wheel and the middle button on to the canvas, so that it can be moved and zoomed over a panel too. */
function passToCanvas(element, canvas) {
  const whenClassic = (act) => (event) => {
    if (!globalThis.LiteGraph?.vueNodesMode) act(event); // nodes of the newer kind do so by themselves
  };
  element.addEventListener("wheel", whenClassic((event) => {
    event.preventDefault();
    canvas().processMouseWheel(event);
  }), { passive: false });
  element.addEventListener("pointerdown", whenClassic((e) => e.button === 1 && canvas().processMouseDown(e)));
  element.addEventListener("pointermove", whenClassic((e) => (e.buttons & 4) === 4 && canvas().processMouseMove(e)));
  element.addEventListener("pointerup", whenClassic((e) => e.button === 1 && canvas().processMouseUp(e)));
}

/**
 * Adds a panel to a node.
 *
 * @param node ComfyUI's node
 * @param views what it shows
 * @param waiting the sentence before there are results
 * @param canvas returns the page's canvas
 */
export function addPanel(node, views, waiting, canvas) {
  const empty = html("p", { class: "realera-empty" }, waiting);
  const inner = html("div", { class: "realera-panel" }, empty, ...views.map((v) => v.element));
  const element = html("div", { class: "realera" }, inner);
  let least = 0;

  /** Height of the panel with its pictures at their smallest, in the canvas's units. */
  function measure() {
    if (!element.isConnected || !element.clientWidth) return;
    inner.style.height = "auto";
    const height = inner.offsetHeight;
    inner.style.height = "";
    if (height !== least) {
      least = height;
      grow();
    }
  }

  function grow() {
    const [width, height] = node.computeSize();
    const [now, tall] = node.size;
    if (now < width || tall < height) node.setSize([Math.max(now, width), Math.max(tall, height)]);
    node.setDirtyCanvas?.(true, true);
  }

  const margin = 8;
  const fills = views.some((v) => v.element.classList.contains("realera-fills"));
  const wanted = () => (least || 44) + 2 * margin;
  const widget = node.addDOMWidget("realera_panel", "realera", element, {
    serialize: false, hideOnZoom: false, margin, getMinHeight: wanted, getMaxHeight: () => (fills ? undefined : wanted()),
  });
  widget.serialize = false; // results are no part of a saved workflow
  widget.computeLayoutSize = () => ({ minHeight: wanted(), maxHeight: fills ? undefined : wanted(), minWidth: WIDTH });

  const shown = (view, does) => {
    view.element.hidden = !does;
    return does;
  };
  const settle = () => {
    empty.hidden = views.some((v) => !v.element.hidden);
    measure();
    for (const view of views) if (!view.element.hidden) view.draw();
  };
  for (const view of views) shown(view, false);
  new ResizeObserver(settle).observe(element);
  passToCanvas(element, canvas);
  return {
    element,
    /** Shows what an execution returned; nothing where there was none. */
    show(output) {
      for (const view of views) shown(view, view.show(output));
      settle();
    },
    /** Passes news of a running node to the view that has a method for it. */
    tell(method, ...news) {
      for (const view of views) if (view[method] && (view[method](...news) ?? false)) shown(view, true);
      settle();
    },
  };
}
