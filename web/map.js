/** The neighbor map: concept, anchor, random samples and named words around a concept, in two dimensions. */

import { html, placeTip, svg, within } from "./elements.js";
import { placeLabels } from "./labels.js";

const EDGE = { left: 12, right: 12, top: 14, bottom: 14 };
const NEAR = 16; // pixels within which a pointer means a point

/** role: radius of its mark, what its name's note says, whether it is named in the map */
const ROLES = {
  beyond: { radius: 3, note: (m) => `random sample beyond “${m.concept}”: kept` },
  neighbors: { radius: 3.5, note: (m) => `random sample near “${m.concept}”: erased` },
  stays: { radius: 2.5, named: true, note: (m) => `near “${m.concept}”, but draws something else: stays` },
  goes: { radius: 3, named: true, note: (m) => `goes with “${m.concept}”: erased with it` },
  preserved: { radius: 4, named: true, note: () => "you preserve it: stays" },
  anchor: { radius: 6, named: true, note: (m) => `anchor: what “${m.concept}” becomes` },
  concept: { radius: 7, named: true, note: () => "the concept to erase" },
};
const UNNAMED = { beyond: "beyond-concept sample", neighbors: "neighbor sample" };

/** All points of a map as [{role, name, x, y}], in the order in which they are drawn. */
export function pointsOf(map) {
  const at = map.points;
  const all = [];
  const add = (role, places, names) => {
    places.forEach(([x, y], i) => all.push({ role, name: names?.[i] ?? UNNAMED[role], x, y }));
  };
  add("beyond", at.beyond);
  add("neighbors", at.neighbors);
  map.words.forEach((w, i) => add(w.near ? "goes" : "stays", [at.words[i]], [w.word]));
  add("preserved", at.preserved, map.preserved);
  add("anchor", at.anchor, [map.anchor]);
  add("concept", at.concept, [map.concept]);
  return all.sort((a, b) => Object.keys(ROLES).indexOf(a.role) - Object.keys(ROLES).indexOf(b.role));
}

function star(x, y, r) {
  const corners = Array.from({ length: 10 }, (_, i) => {
    const [far, angle] = [i % 2 ? r * 0.45 : r * 1.15, (i * Math.PI) / 5];
    return `${(x + far * Math.sin(angle)).toFixed(2)},${(y - far * Math.cos(angle)).toFixed(2)}`;
  });
  return svg("polygon", { points: corners.join(" ") });
}

/** The mark of a role: shapes differ as well as colours. */
export function mark(role, x, y) {
  const r = ROLES[role].radius;
  if (role === "concept") return star(x, y, r);
  const out = r + 1;
  if (role === "anchor") return svg("polygon", { points: `${x},${y - out} ${x + out},${y} ${x},${y + out} ${x - out},${y}` });
  return svg("circle", { cx: x, cy: y, r });
}

function scales(points, width, height) {
  const range = (key) => [Math.min(...points.map((p) => p[key])), Math.max(...points.map((p) => p[key]))];
  const [[x0, x1], [y0, y1]] = [range("x"), range("y")];
  const [w, h] = [width - EDGE.left - EDGE.right, height - EDGE.top - EDGE.bottom];
  return (p) => [EDGE.left + ((p.x - x0) / (x1 - x0 || 1)) * w, EDGE.top + (1 - (p.y - y0) / (y1 - y0 || 1)) * h];
}

function nameTags(placed, width, height) {
  const order = ["concept", "anchor", "preserved", "goes", "stays"];
  const named = placed.filter((p) => ROLES[p.role].named).sort((a, b) => order.indexOf(a.role) - order.indexOf(b.role));
  const labels = named.map((p) => {
    const main = p.role === "concept" || p.role === "anchor";
    const style = main ? { size: 12.5, weight: 600, must: true } : { size: 11, weight: 400, must: false };
    return { x: p.px, y: p.py, radius: ROLES[p.role].radius + 1, text: p.name, ...style };
  });
  const marks = placed.map((p) => ({ x: p.px, y: p.py, radius: ROLES[p.role].radius }));
  const spots = placeLabels(labels, marks, { left: 3, top: 3, right: width - 3, bottom: height - 3 });
  const lines = svg("g", { class: "realera-leaders" });
  const texts = svg("g", {});
  spots.forEach((spot, i) => {
    if (!spot) return;
    const { box, line } = spot;
    const p = named[i];
    if (line) lines.append(svg("line", line));
    const at = { x: box.left + 1, y: box.bottom - 3, "font-size": labels[i].size, "font-weight": labels[i].weight };
    texts.append(svg("text", { ...at, class: `realera-label realera-${p.role}` }, p.name));
  });
  return [lines, texts];
}

function legendOf(map) {
  const at = map.points;
  const entries = [
    ["concept", `concept: ${map.concept}`], ["anchor", `anchor: ${map.anchor}`],
    at.preserved.length && ["preserved", "preserved"],
    map.words.some((w) => w.near) && ["goes", "goes with it"],
    map.words.some((w) => !w.near) && ["stays", "near, but stays"],
    at.neighbors.length && ["neighbors", `${at.neighbors.length} neighbor samples`],
    at.beyond.length && ["beyond", `${at.beyond.length} beyond-concept samples`],
  ].filter(Boolean);
  return entries.map(([role, words]) => {
    const box = { width: 14, height: 14, viewBox: "0 0 14 14", class: `realera-point realera-${role}` };
    const sign = svg("svg", box, mark(role, 7, 7));
    return html("span", { class: "realera-entry" }, sign, words);
  });
}

/** The words that go with a concept: all of them where the node's text has them, else those of the map. */
function wordsOf(map, text) {
  const line = text.split("\n").find((l) => l.startsWith(`${map.concept}: `));
  const listed = line && line.slice(map.concept.length + 2);
  if (listed) return listed === "no word found" ? [] : listed.split(", ");
  return map.words.filter((w) => w.near).map((w) => w.word);
}

/** A view of Mine Neighbor Concepts' results; see panel.js for what a view is. */
export function neighborMap() {
  const picture = svg("svg", { role: "img" });
  const tip = html("div", { class: "realera-tip", hidden: true });
  const plot = html("div", { class: "realera-plot realera-map" }, picture, tip);
  const tabs = html("div", { class: "realera-tabs", role: "tablist" });
  const legend = html("div", { class: "realera-legend" });
  const words = html("div", { class: "realera-words" });
  const element = html("section", { class: "realera-view realera-fills" }, tabs, plot, legend, words);
  let [maps, chosen, text, placed] = [[], 0, "", []];

  function draw() {
    const [width, height] = [plot.clientWidth, plot.clientHeight];
    const map = maps[chosen];
    if (!map || !width || !height) return;
    const points = pointsOf(map);
    const place = scales(points, width, height);
    placed = points.map((p) => {
      const [px, py] = place(p);
      return { ...p, px, py };
    });
    const marks = svg("g", {});
    for (const p of placed) {
      const told = { class: `realera-point realera-${p.role}`, "data-role": p.role, "data-name": p.name };
      marks.append(svg("g", told, mark(p.role, p.px, p.py)));
    }
    const ring = svg("circle", { class: "realera-ring", r: 0 });
    picture.setAttribute("viewBox", `0 0 ${width} ${height}`);
    picture.setAttribute("aria-label", `Map of what lies around ${map.concept}`);
    const [lines, texts] = nameTags(placed, width, height);
    picture.replaceChildren(lines, marks, texts, ring);
  }

  function point(event) {
    const [x, y] = within(plot, event);
    let best = null;
    let nearest = NEAR ** 2;
    for (const p of placed) {
      const distance = (p.px - x) ** 2 + (p.py - y) ** 2;
      if (distance <= nearest) [best, nearest] = [p, distance]; // of two equally near, the one on top
    }
    const ring = picture.querySelector(".realera-ring");
    ring?.setAttribute("r", best ? ROLES[best.role].radius + 4 : 0);
    tip.hidden = !best;
    if (!best) return;
    ring.setAttribute("cx", best.px);
    ring.setAttribute("cy", best.py);
    tip.replaceChildren(html("b", {}, best.name), html("span", {}, ROLES[best.role].note(maps[chosen])));
    placeTip(tip, plot, best.px, best.py);
  }

  function leave() {
    tip.hidden = true;
    picture.querySelector(".realera-ring")?.setAttribute("r", 0);
  }

  function fill() {
    const map = maps[chosen];
    tabs.replaceChildren(...(maps.length < 2 ? [] : maps.map((m, i) => {
      const tab = html("button", { type: "button", role: "tab", "aria-selected": String(i === chosen) }, m.concept);
      tab.addEventListener("click", () => {
        chosen = i;
        leave();
        fill();
        draw();
      });
      return tab;
    })));
    legend.replaceChildren(...legendOf(map));
    const found = wordsOf(map, text);
    const list = found.length ? found.map((w) => html("span", { class: "realera-word" }, w)) : ["no word found"];
    const title = found.length ? `${found.length} words go with “${map.concept}”` : `Words that go with “${map.concept}”`;
    words.replaceChildren(html("b", {}, title), ...list);
  }

  plot.addEventListener("pointermove", point);
  plot.addEventListener("pointerleave", leave);
  return {
    element,
    draw,
    show(output) {
      maps = output?.realera_map ?? [];
      if (!maps.length) return false;
      text = (output.text ?? []).join("\n");
      chosen = Math.min(chosen, maps.length - 1);
      fill();
      draw();
      return true;
    },
  };
}
