/** The loss of a training: its course while it runs, and its whole curve afterwards. */

import { html, placeTip, svg, within } from "./elements.js";

const EDGE = { left: 46, right: 12, top: 12, bottom: 24 };
const MOST = 2000; // points of a line; longer trainings are drawn as means of neighbors

/** Steps of a running mean: a tenth of them, 5 at least, as losses of odd and even steps differ. */
const spanOf = (losses) => Math.max(5, Math.floor(losses.length / 10));

/** Running mean of losses. */
export function smooth(losses) {
  const span = spanOf(losses);
  let sum = 0;
  return losses.map((loss, i) => {
    sum += loss - (i >= span ? losses[i - span] : 0);
    return sum / Math.min(i + 1, span);
  });
}

function thinned(points) {
  const stride = Math.ceil(points.length / MOST);
  if (stride < 2) return points;
  const means = [];
  for (let i = 0; i < points.length; i += stride) {
    const part = points.slice(i, i + stride);
    means.push([part[Math.floor(part.length / 2)][0], part.reduce((sum, p) => sum + p[1], 0) / part.length]);
  }
  return means;
}

/** Round numbers that cut a range into about `count` parts. */
export function ticks(low, high, count) {
  const raw = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].find((m) => m * power >= raw) * power;
  const first = Math.ceil(low / step - 1e-9) * step;
  const length = Math.floor((high - first) / step + 1e-9) + 1;
  return Array.from({ length }, (_, i) => Number((first + i * step).toPrecision(12)));
}

export function short(value) {
  return value !== 0 && Math.abs(value) < 1e-3 ? value.toExponential(1) : String(Number(value.toPrecision(3)));
}

/** A view of a training's losses; see panel.js for what a view is. `live` takes what the node sends while it trains. */
export function lossCurve() {
  const picture = svg("svg", { role: "img", "aria-label": "Loss of every training step" });
  const tip = html("div", { class: "realera-tip", hidden: true });
  const plot = html("div", { class: "realera-plot realera-curve" }, picture, tip);
  const status = html("div", { class: "realera-status" });
  const element = html("section", { class: "realera-view realera-fills", "data-state": "empty" }, status, plot);
  // losses of the steps after `before`, which is above 0 in a page that was opened in the middle of a training
  let [losses, before, total, means, place] = [[], 0, 0, [], null];

  function draw() {
    const [width, height] = [plot.clientWidth, plot.clientHeight];
    if (!losses.length || !width || !height) return;
    means = smooth(losses);
    const steps = Math.max(total, before + losses.length, 2);
    // one wild step must not press the rest flat against the axis
    const sorted = [...losses].sort((a, b) => a - b);
    const high = Math.max(sorted[Math.floor((sorted.length - 1) * 0.98)] * 1.1, Math.max(...means) * 1.05) || 1;
    const [w, h] = [width - EDGE.left - EDGE.right, height - EDGE.top - EDGE.bottom];
    place = (step, loss) => [EDGE.left + ((step - 1) / (steps - 1)) * w, EDGE.top + (1 - Math.min(loss / high, 1)) * h];

    const axes = svg("g", { class: "realera-axes" });
    for (const value of ticks(0, high, Math.max(2, Math.round(h / 30)))) {
      const [, y] = place(1, value);
      axes.append(svg("line", { x1: EDGE.left, x2: width - EDGE.right, y1: y, y2: y }));
      axes.append(svg("text", { x: EDGE.left - 6, y: y + 3.5, "text-anchor": "end" }, short(value)));
    }
    const whole = ticks(0, steps, Math.max(2, Math.round(w / 80))).filter((step) => Number.isInteger(step));
    for (const step of whole.map((s) => s || 1)) {
      const [x] = place(step, 0);
      const anchor = x > width - EDGE.right - 12 ? "end" : "middle";
      axes.append(svg("text", { x, y: height - 8, "text-anchor": anchor }, step === steps ? `${step} steps` : String(step)));
    }
    const line = (values, kind) => {
      const points = thinned(values.map((v, i) => [before + i + 1, v]));
      const written = points.map(([step, v]) => place(step, v).map((c) => c.toFixed(1)).join()).join(" ");
      return svg("polyline", { class: kind, points: written, "data-steps": values.length });
    };
    picture.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const [x, y] = place(before + losses.length, means[means.length - 1]);
    const now = svg("circle", { class: "realera-now", cx: x, cy: y, r: 3.5 });
    const ring = svg("circle", { class: "realera-ring", r: 0 });
    picture.replaceChildren(axes, line(losses, "realera-raw"), line(means, "realera-mean"), now, ring);
  }

  function point(event) {
    if (!place) return;
    const [x] = within(plot, event);
    const [first] = place(1, 0);
    const [second] = place(2, 0);
    const i = Math.min(Math.max(Math.round((x - first) / (second - first)) - before, 0), losses.length - 1);
    const [px, py] = place(before + i + 1, means[i]);
    const ring = picture.querySelector(".realera-ring");
    ring.setAttribute("cx", px);
    ring.setAttribute("cy", py);
    ring.setAttribute("r", 6);
    const said = `loss ${short(losses[i])}, mean ${short(means[i])}`;
    tip.replaceChildren(html("b", {}, `step ${before + i + 1}`), html("span", {}, said));
    placeTip(tip, plot, px, py);
  }

  function leave() {
    tip.hidden = true;
    picture.querySelector(".realera-ring")?.setAttribute("r", 0);
  }

  function become(state, ...words) {
    element.dataset.state = state;
    status.replaceChildren(...words);
    draw();
  }

  const between = () => {
    const curve = smooth(losses);
    const start = curve[Math.min(curve.length, spanOf(losses)) - 1];
    return `loss ${short(start)} → ${short(curve[curve.length - 1])}`;
  };

  plot.addEventListener("pointermove", point);
  plot.addEventListener("pointerleave", leave);
  return {
    element,
    draw,
    show(output) {
      losses = output?.realera_loss ?? [];
      [before, total] = [0, losses.length];
      if (!total) return false;
      become("done", html("b", {}, `${losses.length} steps`), html("span", {}, between()));
      return true;
    },
    /** {start, losses, total}: losses from step `start` on, counted from 0. */
    live(news) {
      const known = news.start - before;
      if (known < 0 || known > losses.length) [losses, before] = [[], news.start];
      losses = [...losses.slice(0, news.start - before), ...news.losses];
      total = news.total;
      become("live", html("b", {}, `step ${before + losses.length} of ${total}`), html("span", {}, between()));
      return true;
    },
    /** The run ended without a result. */
    stop() {
      if (element.dataset.state !== "live") return;
      become("stopped", html("b", {}, `stopped at step ${before + losses.length} of ${total}`), html("span", {}, between()));
    },
  };
}
